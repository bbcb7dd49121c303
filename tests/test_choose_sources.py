"""From files to an answer in one command."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from src import config
from tests.commands import load_script, run_script
from tests.conftest import write_sources

SCRIPT = "scripts/choose_sources.py"


@pytest.fixture
def flags(workspace: Path, model_folders: dict[str, str]) -> list[str]:
    """A folder of files, one of them the target, and a tiny model."""
    Path("my").mkdir()
    for name in ("up", "down", "left", "right", "goal"):
        write_sources(Path("my") / f"{name}.jsonl", {name: 20})
    data = ["--data_files", "my", "--target_files", "my/goal.jsonl", "--model_key", model_folders["llama"]]
    return [*data, "--train_lora", "--lora_rank", "4", "--lr", "1e-2", "--batch_size", "4", "--epochs", "1"]


def test_a_folder_becomes_an_answer(flags: list[str], capsys: pytest.CaptureFixture) -> None:
    """It names the best of everything by validation loss, random halves too; its model, its rows and the page are there."""
    named = [*flags, "--save_name", "answer", "--halves", "3"]
    run_script(SCRIPT, *named)
    printed = capsys.readouterr().out
    folder = Path("results/answer")
    summary = json.loads((folder / "summary.json").read_text())
    losses = summary["test_loss"]
    assert set(losses) == {"base", "all_tasks", "random_half", "random_ensemble", "forward_selection"}
    assert -1 <= summary["spearman"] <= 1 and (folder / "estimates.png").is_file()
    rows = pd.read_json(folder / "selected.jsonl", lines=True)
    last = printed.strip().splitlines()[-4:]
    assert last[0].startswith("Train on: ") and all(name in last[0] for name in rows["task"].unique())
    assert last[:3] == summary["answer"]["lines"]
    truth = pd.read_csv(folder / "results.csv", dtype={"subset": str}, keep_default_na=False).set_index("subset")
    tasks = json.loads((folder / "manifest.json").read_text())["tasks"]
    assert tasks == ["down", "left", "right", "up"]
    best = truth["validation_loss/goal"].idxmin()
    assert set(rows["task"]) == {tasks[int(task)] for task in best.split()}
    model = last[3].split("The model trained on it: ")[1].split(";")[0]
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(flags[5]), model)
    page = (folder / "report.html").read_text()
    assert page.index(last[0].split(", by")[0].rstrip(").")) < page.index("Selected by estimates")
    seconds = summary["seconds"]
    assert seconds["fine_tuning_base"] == pytest.approx(truth.loc["", "seconds"], abs=0.01)
    fine_tuning = sum(value for stage, value in seconds.items() if stage.startswith("fine_tuning"))
    assert fine_tuning == pytest.approx(truth["seconds"].sum(), abs=0.1)
    run_script(SCRIPT, *named)  # trains nothing, and what was spent stays spent
    again = json.loads((folder / "summary.json").read_text())["seconds"]
    assert again.keys() == seconds.keys()
    kept = [stage for stage in seconds if stage in ("meta_training", "gradients") or stage.startswith("fine_tuning")]
    assert len(kept) >= 4 and {stage: again[stage] for stage in kept} == {stage: seconds[stage] for stage in kept}


def test_nothing_may_help(flags: list[str], capsys: pytest.CaptureFixture) -> None:
    """The base model is best on validation rows: no model and no rows are recommended, and the page says so first."""
    run_script(SCRIPT, *flags, "--save_name", "none")
    assert Path("results/none/selected.jsonl").is_file()
    path = Path("results/none/results.csv")
    table = pd.read_csv(path, dtype={"subset": str}, keep_default_na=False)
    table.loc[table["subset"] == "", "validation_loss/goal"] = 0.001
    table.to_csv(path, index=False)
    capsys.readouterr()
    run_script(SCRIPT, *flags, "--save_name", "none")
    printed = capsys.readouterr().out
    assert "\nNothing here helps: keep the base model.\n" in printed
    last = printed.split("Nothing here helps")[1]
    assert "Train on" not in last and "model trained on it" not in last
    assert not list(Path("results/none").glob("selected*")) and not Path("results/none/mixture.json").exists()
    assert json.loads(Path("results/none/summary.json").read_text())["answer"]["tasks"] == []
    page = Path("results/none/report.html").read_text()
    assert 0 < page.index("Nothing here helps") < page.index("Selected by estimates")


def test_a_random_half_may_be_the_answer(flags: list[str], capsys: pytest.CaptureFixture) -> None:
    """No model of many subsets is kept: that of the best is made then."""
    run_script(SCRIPT, *flags, "--save_name", "half", "--halves", "6")
    path = Path("results/half/results.csv")
    table = pd.read_csv(path, dtype={"subset": str}, keep_default_na=False)
    selected = {Path(f"sampled_tasks/half_{m}_{n}.txt").read_text().splitlines()[-1]
                for m, n in (("forward", "selection"), ("random", "ensemble"))}  # fmt: skip
    half = next(text for text in table["subset"] if len(text.split()) == 2 and text not in selected)
    table.loc[table["subset"] == half, "validation_loss/goal"] = 0.001
    table.to_csv(path, index=False)
    capsys.readouterr()
    run_script(SCRIPT, *flags, "--save_name", "half", "--halves", "6")
    last = capsys.readouterr().out.strip().splitlines()[-1]
    model = Path(f"results/half/models/tasks_{half.replace(' ', '_')}_run_0")
    assert str(model) in last and (model / "adapter_model.safetensors").is_file()
    tasks = json.loads(Path("results/half/manifest.json").read_text())["tasks"]
    rows = pd.read_json("results/half/selected.jsonl", lines=True)
    assert set(rows["task"]) == {tasks[int(task)] for task in half.split()}


def test_flags_are_handed_on_as_typed(flags: list[str]) -> None:
    """Each to the stage that it belongs to, nothing else."""
    script = load_script(SCRIPT)
    more = [
        "--max_length",
        "99",
        "--prompt_column",
        "a b",
        "--precision",
        "bf16",
        "--project_dim",
        "4000",
        "--rho",
        "0.03",
    ]
    typed = config.typed_flags(script.parse_args([*flags, *more, "--checkpoint_at", "0.5", "--runs", "2"]))
    pipeline = script.pipeline_from(typed, "b")
    assert pipeline.training["checkpoint_at"] == (0.5,) and pipeline.training["prompt_column"] == "a b"
    assert (pipeline.gradients, pipeline.estimation) == ({"project_dim": 4000}, {"rho": 0.03})
    assert (pipeline.hardware, pipeline.runs) == ({"precision": "bf16"}, 2)
    assert "lr" in pipeline.training and "epochs" in pipeline.training and "max_length" in pipeline.training
