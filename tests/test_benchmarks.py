"""The benchmarks on a world of minutes made seconds: every row, every file, and going on where a run ended."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from src.console import load_script
from src.estimation import ESTIMATORS
from tests.commands import run_script

WORLD = "synthetic:9,num_tasks=6,pretrain_steps=30,rows_per_task=12,target_rows=12"
TINY = ["--world", WORLD, "--epochs", "1", "--runs", "2", "--project_dim", "32", "--json"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmarks")


def lines_of_json(printed: str) -> list[dict]:
    """With --json nothing else is printed."""
    return [json.loads(line) for line in printed.splitlines()]


def test_every_estimator_is_judged(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(here)
    run_script("scripts/benchmark_estimates.py", *TINY, "--subsets", "6", "--calibration_subsets", "5")
    *records, speed = lines_of_json(capsys.readouterr().out)
    assert [record["estimator"] for record in records] == list(ESTIMATORS)
    assert speed["estimates"] == 1000 and speed["seconds"] > 0
    (truth_file,) = Path("results/benchmark_estimates").glob("*/results.csv")
    truth = pd.read_csv(truth_file, dtype={"subset": str})
    assert len(truth) == 2 * (6 + 5) and (truth["subset"].str.split().str.len() == 3).all()
    values = truth.groupby(["run", "subset"], sort=False)["validation_loss/target"].first().unstack(0).iloc[5:]
    ranks = values.rank()
    r = max(np.corrcoef(ranks[0], ranks[1])[0, 1], 0)
    for record in records:
        assert record["attainable"] == pytest.approx(np.sqrt(2 * r / (1 + r)), abs=1e-4)
    table = pd.read_csv("results/benchmark_estimates/table.csv")
    assert len(table) == len(ESTIMATORS)
    assert Path("results/benchmark_estimates/figure.png").stat().st_size > 10_000


def test_every_method_selects(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Regret is 0 for the oracle and 1 for all tasks; the oracle's passes are those of every fine-tuning it made."""
    monkeypatch.chdir(here)
    run_script("scripts/benchmark_selection.py", *TINY)
    records = {record["method"]: record for record in lines_of_json(capsys.readouterr().out)}
    assert len(records) == 13
    assert records["oracle"]["regret"] == 0 and records["all tasks"]["regret"] == 1
    assert records["base model"]["tasks"] == 0 and records["base model"]["passes"] == 0
    k = records["forward selection"]["tasks"]
    assert all(records[name]["tasks"] == k for name in records if name.endswith(("top k", "k tasks")))
    (results,) = Path("results/benchmark_selection").glob("*/results.csv")
    truth = pd.read_csv(results, dtype={"subset": str}, keep_default_na=False)
    chosen = truth[truth["subset"] == records["forward selection"]["selected"]]
    assert records["forward selection"]["test_loss"] == pytest.approx(chosen["test_loss/target"].mean(), abs=1e-4)
    singles = truth[truth["subset"].str.fullmatch(r"\d+")]
    assert len(singles) == 2 * 6  # the oracle's first step tried every task
    assert Path("results/benchmark_selection/figure.png").stat().st_size > 10_000


def test_worlds_are_named_by_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    worlds, script = load_script("scripts/worlds.py"), load_script("scripts/benchmark_estimates.py")
    args = script.parse_args(["--epochs", "3"])
    first, second = (
        worlds.parse_world(name, args) for name in ("synthetic:1,noise=0/1", "synthetic:1,noise=0/1,epochs=5")
    )
    assert "--noise 0 1" in first.made_by and "--epochs 3" in first.training and "--epochs 5" in second.training
    assert first.folder != second.folder
    assert "--load_clusters" in worlds.parse_world("cot:0", args).tasks
    rows = [{"inputs": "x" * size, "targets": "y", "_task_name": task} for task in "ab" for size in (5, 10, 900, 7)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = script.parse_args(["--model_key", "m", "--rows_per_task", "2"])
    world = worlds.parse_world("rows.jsonl", args)
    kept = [json.loads(line) for line in (world.folder / "flan.jsonl").read_text().splitlines()]
    assert [(row["_task_name"], len(row["inputs"])) for row in kept] == [("a", 5), ("a", 10), ("b", 5), ("b", 10)]
    for name, message in (("martian:0", "expected synthetic:SEED"), ("none.jsonl", "no such file")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            worlds.parse_world(name, args)
    args = script.parse_args(["--model_key", "m", "--rows_per_task", "4"])
    with pytest.raises(ValueError, match="0 tasks have 4 rows"):
        worlds.parse_world("rows.jsonl", args)


def test_a_store_of_many_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The script at a small size: all rows are written, summed and estimated from, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    flags = ["--rows", "5000", "--dim", "16", "--tasks", "20", "--targets", "3", "--subsets", "7"]
    run_script("scripts/benchmark_scale.py", *flags)
    (figures,) = lines_of_json(capsys.readouterr().out)
    assert figures["finite"] and figures["rows"] == 5000 and not list(tmp_path.iterdir())
