"""The benchmarks on a world of minutes made seconds: every row, every file, and going on where a run ended."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from src.console import load_script, run_command
from src.estimation import ESTIMATORS
from tests.commands import refused, run_script

WORLD = "synthetic:9,num_tasks=6,pretrain_steps=30,rows_per_task=12,target_rows=12"
TINY = ["--world", WORLD, "--epochs", "1", "--runs", "2", "--project_dim", "32", "--json"]


def test_every_estimator_and_every_method_is_judged(tmp_path, monkeypatch, capsys):
    """With --json nothing else is printed; the second benchmark goes on with the world of the first."""
    monkeypatch.chdir(tmp_path)
    run_script("scripts/benchmark_estimates.py", *TINY, "--subsets", "6", "--calibration_subsets", "5", "--experts")
    *records, speed = map(json.loads, capsys.readouterr().out.splitlines())
    experts = "experts' probabilities", "merged experts"
    assert [record["estimator"] for record in records] == ["mean matching", *experts, *ESTIMATORS, "linear datamodel"]
    assert speed["estimates"] == 1000 and speed["seconds"] > 0
    (truth_file,) = Path("results/benchmark_estimates").glob("*/results.csv")
    truth = pd.read_csv(truth_file, dtype={"subset": str})
    assert len(truth) == 2 * (6 + 5) and (truth["subset"].str.split().str.len() == 3).all()
    values = truth.groupby(["run", "subset"], sort=False)["validation_loss/target"].first().unstack(0).iloc[5:]
    r = max(np.corrcoef(values.rank().T)[0, 1], 0)
    expected = [np.sqrt(2 * r / (1 + r))] * len(records)
    assert [record["attainable"] for record in records] == pytest.approx(expected, abs=1e-4)
    assert len(pd.read_csv("results/benchmark_estimates/table.csv")) == len(records)

    more = ["--subsets", "6", "--calibration_subsets", "5", "--checkpoints", "0.5", "0/0.5/1"]
    run_script("scripts/benchmark_estimates.py", *TINY, *more)  # at other checkpoints, and judged by the same truth
    *records, _ = map(json.loads, capsys.readouterr().out.splitlines())
    assert [record["estimator"] for record in records] == ["50 %", "base, 50 %, 100 %"]
    assert len(pd.read_csv(truth_file)) == len(truth)
    benchmark = load_script("scripts/benchmark_estimates.py")
    args = benchmark.parse_args([*TINY, *more])
    world = replace(benchmark.worlds.parse_world(WORLD, args), checkpoint_at=(0, 0.5, 1))
    steps = [[part.manifest["step"] for part in of_set.stored] for _, of_set in benchmark.estimators_of(world, args)]
    assert steps == [[round(steps[1][2] / 2)], [0, round(steps[1][2] / 2), steps[1][2]]] and steps[1][2] > 1

    run_script("scripts/benchmark_selection.py", *TINY, "--experts", "--keep", "kept.csv")
    of = {record["method"]: record for record in map(json.loads, capsys.readouterr().out.splitlines())}
    kept = pd.read_csv("kept.csv").set_index("method")
    assert (
        list(kept.index) == list(of) and set(kept["data"]) == {"synthetic:9"} and kept["test_loss_half"].notna().all()
    )
    assert len(of) == 15 and set(experts) < set(of) and of["oracle"]["regret"] == 0 and of["all tasks"]["regret"] == 1
    assert of["base model"]["tasks"] == 0 and of["base model"]["passes"] == 0
    forward = of["forward selection"]
    assert all(of[name]["tasks"] == forward["tasks"] for name in of if name.endswith(("top k", "k tasks")))
    (results,) = Path("results/benchmark_selection").glob("*/results.csv")
    truth = pd.read_csv(results, dtype={"subset": str}, keep_default_na=False)
    chosen = truth[truth["subset"] == forward["selected"]]
    assert forward["test_loss"] == pytest.approx(chosen["test_loss/target"].mean(), abs=1e-4)
    half = stats.t.ppf(0.95, 1) * chosen["test_loss/target"].std(ddof=1) / np.sqrt(2)
    assert forward["test_loss_half"] == pytest.approx(half, abs=1e-4)
    assert truth["subset"].str.fullmatch(r"\d+").sum() == 2 * 6  # the oracle's first step tried every task
    assert all(path.stat().st_size > 10_000 for path in Path("results").glob("benchmark_*/figure.png"))
    assert len(list(Path("results").glob("benchmark_*/figure.png"))) == 2


def test_experts_are_fine_tuned_on_one_source_each(tmp_path, monkeypatch):
    """One expert alone says what fine-tuning on its source gives; two are mixed by their rows, token by token."""
    monkeypatch.chdir(tmp_path)
    worlds, script = load_script("scripts/worlds.py"), load_script("scripts/benchmark_estimates.py")
    args = script.parse_args(TINY)
    world = worlds.parse_world(WORLD, args)
    worlds.prepare(world, args, margins=False)
    experts = worlds.experts_of(world, args)
    run_command(f"{worlds.fine_tuning(world, args, 'alone')} --task_idxes 2")
    (file,) = Path("results/alone").glob("*/results.csv")
    expected = pd.read_csv(file)["validation_loss/target"][0]
    alone, both = np.eye(6, dtype=bool)[[2]], np.array([[0, 1, 1, 0, 0, 0]], dtype=bool)
    column = list(experts.data.targets).index("target")
    for losses in (experts.probabilities, experts.merged):
        assert losses(alone)[0, column] == pytest.approx(expected, rel=1e-4)
    mean = np.log((experts.of_experts[1] + experts.of_experts[2]) / 2)  # sources of equal size
    rows = pd.Series(mean).groupby(experts.row_of_token).mean()
    target = [row for row in rows.index if experts.data.target_of_sample[row] == column]
    assert experts.probabilities(both)[0, column] == pytest.approx(-rows[target].mean(), rel=1e-6)


def test_worlds_are_named_by_what_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    worlds, script = load_script("scripts/worlds.py"), load_script("scripts/benchmark_estimates.py")
    args = script.parse_args(["--epochs", "3"])
    first, second = (worlds.parse_world(f"synthetic:1,noise=0/1{more}", args) for more in ("", ",epochs=5"))
    assert "--noise 0 1" in first.made_by and "--epochs 3" in first.training and "--epochs 5" in second.training
    assert first.folder != second.folder and "--load_clusters" in worlds.parse_world("cot:0", args).tasks
    rows = [{"inputs": "x" * size, "targets": "y", "_task_name": task} for task in "ab" for size in (5, 10, 900, 7)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args, more = (script.parse_args(["--model_key", "m", "--rows_per_task", count]) for count in "24")
    world = worlds.parse_world("rows.jsonl", args)
    kept = [json.loads(line) for line in (world.folder / "flan.jsonl").read_text().splitlines()]
    assert [(row["_task_name"], len(row["inputs"])) for row in kept] == [("a", 5), ("a", 10), ("b", 5), ("b", 10)]
    real = script.parse_args(["--model_key", "m", "--flan_file", "f", "--alpaca_file", "a"])
    made = {name: worlds.parse_world(f"real:{name},rows=8", real).made_by for name in ("flan", "alpaca")}
    assert "--sources" not in made["flan"] and "--shuffled --targets find determine --rows 8" in made["alpaca"]
    worlds_that_are_none = {"martian:0": "expected synthetic:SEED", "none.jsonl": "no such file"}
    for name, message in worlds_that_are_none.items():
        refused(message, worlds.parse_world, name, args, error=(ValueError, FileNotFoundError))
    refused("0 tasks have 4 rows", worlds.parse_world, "rows.jsonl", more)


def test_a_store_of_many_rows(tmp_path, monkeypatch, capsys):
    """The script at a small size: all rows are written, summed and estimated from, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    flags = "--rows 5000 --dim 16 --tasks 20 --targets 3 --subsets 7"
    run_script("scripts/benchmark_scale.py", *flags.split())
    figures = json.loads(capsys.readouterr().out)
    assert figures["finite"] and figures["rows"] == 5000 and not list(tmp_path.iterdir())
    run_script("scripts/benchmark_scale.py", "--texts", "300")
    figures = json.loads(capsys.readouterr().out)
    assert (
        figures["texts"] == 300 and figures["file_mb"] == pytest.approx(0.2, abs=0.05) and not list(tmp_path.iterdir())
    )
