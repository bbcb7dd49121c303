"""From files to an answer in one command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from src import console
from tests.commands import load_script, read_json, run_script, typed
from tests.conftest import write_sources
from tests.test_other_trainers import transformers_trainer

SCRIPT = "scripts/choose_sources.py"


@pytest.fixture
def flags(workspace, model_folders):
    """A folder of files, one of them the target, and a tiny model."""
    Path("my").mkdir()
    for name in ("up", "down", "left", "right", "goal"):
        write_sources(Path("my") / f"{name}.jsonl", {name: 20})
    data = ["--data_files", "my", "--target_files", "my/goal.jsonl", "--model_key", model_folders["llama"]]
    return [*data, "--train_lora", "--lora_rank", "4", "--lr", "1e-2", "--batch_size", "4", "--epochs", "1"]


def truth_of(name: str) -> pd.DataFrame:
    path = f"results/{name}/results.csv"
    return pd.read_csv(path, dtype={"subset": str}, keep_default_na=False).set_index("subset")


def make_best(name: str, subset: str) -> None:
    """Change a table, so that this subset has the lowest loss."""
    truth = truth_of(name)
    truth.loc[subset, "validation_loss/goal"] = 0.001
    truth.to_csv(f"results/{name}/results.csv")


def test_a_folder_becomes_an_answer(flags, capsys):
    """It names the best of everything by validation loss, random halves too; its model, its rows and the page are there."""
    named = [*flags, "--save_name", "answer", "--halves", "3"]
    run_script(SCRIPT, *named)
    printed = capsys.readouterr().out
    folder = Path("results/answer")
    summary = read_json(folder / "summary.json")
    losses = summary["test_loss"]
    assert set(losses) == {"base", "all_tasks", "random_half", "random_ensemble", "forward_selection"}
    assert -1 <= summary["spearman"] <= 1 and (folder / "estimates.png").is_file()
    low = float(re.search(r"Spearman of .*\(90 % interval (\S+) to", printed).group(1))
    assert ("no better than chance" in printed) == (low <= 0)
    rows = pd.read_json(folder / "selected.jsonl", lines=True)
    last = printed.strip().splitlines()[-7:]
    assert last[0].startswith("Train on: ") and all(name in last[0] for name in rows["task"].unique())
    assert last[:3] == summary["answer"]["lines"]
    truth = truth_of("answer")
    tasks = read_json(folder / "manifest.json")["tasks"]
    assert tasks == ["down", "left", "right", "up"]
    best = truth["validation_loss/goal"].idxmin()
    assert set(rows["task"]) == {tasks[int(task)] for task in best.split()}
    assert last[3].startswith("Test loss, on rows that chose nothing: ") and "of all 4 sources" in last[3]
    assert last[4].startswith("Cost: ") and "meta training" in last[4] and "fine-tuning" in last[4]
    command = last[5].removeprefix("To train on it: python ").split()
    before = (folder / "results.csv").read_text()
    run_script(*command)  # everything that it needs is there
    assert (folder / "results.csv").read_text() == before
    model = last[6].split("The model trained on it: ")[1].split(";")[0]
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(flags[5]), model)
    page = (folder / "report.html").read_text()
    answer = page.index(last[0].split(", by")[0].rstrip(")."))
    assert 0 < answer < page.index("<svg") < page.index("Are the estimates right?")
    assert re.search("Over [345] subsets", page)  # halves, and what is one too
    seconds = summary["seconds"]
    assert seconds["fine_tuning_base"] == pytest.approx(truth.loc["", "seconds"], abs=0.01)
    fine_tuning = sum(value for stage, value in seconds.items() if stage.startswith("fine_tuning"))
    assert fine_tuning == pytest.approx(truth["seconds"].sum(), abs=0.1)
    run_script(SCRIPT, *named)  # trains nothing, and what was spent stays spent
    again = read_json(folder / "summary.json")["seconds"]
    assert again.keys() == seconds.keys()
    kept = [stage for stage in seconds if stage in ("meta_training", "gradients") or stage.startswith("fine_tuning")]
    assert len(kept) >= 4 and {stage: again[stage] for stage in kept} == {stage: seconds[stage] for stage in kept}


def test_nothing_may_help(flags, capsys):
    """The base model is best on validation rows: no model and no rows are recommended, and the page says so first."""
    run_script(SCRIPT, *flags, "--save_name", "none")
    assert Path("results/none/selected.jsonl").is_file()
    make_best("none", "")
    capsys.readouterr()
    run_script(SCRIPT, *flags, "--save_name", "none")
    printed = capsys.readouterr().out
    assert "\nNothing here helps: keep the base model.\n" in printed
    last = printed.split("Nothing here helps")[1]
    assert "Train on" not in last and "model trained on it" not in last
    assert not list(Path("results/none").glob("selected*")) and not Path("results/none/mixture.json").exists()
    assert read_json("results/none/summary.json")["answer"]["tasks"] == []
    page = Path("results/none/report.html").read_text()
    assert 0 < page.index("Nothing here helps") < page.index("Are the estimates right?")


def test_a_random_half_may_be_the_answer(flags, capsys):
    """No model of many subsets is kept: that of the best is made then."""
    run_script(SCRIPT, *flags, "--save_name", "half", "--halves", "6")
    selected = {Path(f"sampled_tasks/half_{m}_{n}.txt").read_text().splitlines()[-1]
                for m, n in (("forward", "selection"), ("random", "ensemble"))}  # fmt: skip
    half = next(text for text in truth_of("half").index if len(text.split()) == 2 and text not in selected)
    make_best("half", half)
    capsys.readouterr()
    run_script(SCRIPT, *flags, "--save_name", "half", "--halves", "6")
    last = capsys.readouterr().out.strip().splitlines()[-1]
    model = Path(f"results/half/models/tasks_{half.replace(' ', '_')}_run_0")
    assert str(model) in last and (model / "adapter_model.safetensors").is_file()
    tasks = read_json("results/half/manifest.json")["tasks"]
    rows = pd.read_json("results/half/selected.jsonl", lines=True)
    assert set(rows["task"]) == {tasks[int(task)] for task in half.split()}


def test_flags_are_handed_on_as_typed(flags):
    """Each to the stage that it belongs to, nothing else."""
    script = load_script(SCRIPT)
    more = "--max_length 99 --precision bf16 --project_dim 4000 --rho 0.03 --checkpoint_at 0.5 --runs 2 --prompt_column"
    pipeline = script.pipeline_from(typed(SCRIPT, *flags, *more.split(), "a b"), "b")
    assert pipeline.training["checkpoint_at"] == (0.5,) and pipeline.training["prompt_column"] == "a b"
    assert (pipeline.gradients, pipeline.estimation) == ({"project_dim": 4000}, {"rho": 0.03})
    assert (pipeline.hardware, pipeline.runs) == ({"precision": "bf16"}, 2)
    assert "lr" in pipeline.training and "epochs" in pipeline.training and "max_length" in pipeline.training


def test_checkpoints_of_another_trainer(flags, capsys):
    """No meta-training; what must not get worse does not; the rows go back to a trainer."""
    lines = [json.loads(line) for path in Path("my").glob("*.jsonl") for line in path.read_text().splitlines()]
    transformers_trainer(flags[5], [{"prompt": row["inputs"], "completion": row["targets"]} for row in lines])
    write_sources(Path("old.jsonl"), {"old": 20})
    data = "--data_files my --target_files my/goal.jsonl old.jsonl --load_model_dir base out/checkpoint-4"
    more = "--keep_task old --tolerance_keep 1 --for trl --project_dim 16 --save_name theirs"
    run_script(f"{SCRIPT} {data} {more}")
    printed = capsys.readouterr().out
    assert "meta" not in printed.split("Cost: ")[1]
    folder = Path("results/theirs")
    assert read_json(folder / "results.json")["lr"] == 0.01
    described = read_json(folder / "selection.json")
    assert described["targets"] == ["goal"] and described["keep_task"] == ["old"] and described["dim"] == 16
    answer = read_json(folder / "summary.json")["answer"]
    truth = truth_of("theirs")
    old, goal = truth["validation_loss/old"], truth["validation_loss/goal"]
    within = old <= old[""] + 1
    within[""] = True
    best = goal[within].idxmin()
    assert answer["tasks"] == [int(task) for task in best.split()]
    assert (folder / "export_trl" / "trl.yaml").is_file() == bool(best)
    assert not best or "Kept, against the base model's validation loss: old " in printed


def test_several_processes_run_what_uses_a_model(flags, monkeypatch):
    """As commands of their own: each of the processes runs its command from the beginning."""
    calls, call = [], console.call

    def alone(script: str, *, apart: bool = False, **values: object) -> object:
        calls.append((script, apart, values.pop("devices", None), values.pop("accelerator", None)))
        return call(script, **values)

    monkeypatch.setattr(console, "call", alone)
    run_script(SCRIPT, *flags, "--save_name", "two", "--accelerator", "cpu", "--devices", "0", "1")
    by_two = {script for script, apart, devices, _ in calls if apart and devices == (0, 1)}
    assert by_two == {"custom_train_alpaca.py", "fast_estimate_eval_approximation_alpaca.py"}
    assert not [call for call in calls if call[0] in by_two and not call[1]]
    monkeypatch.setattr(console, "call", call)
    Path("results/two/report.html").unlink()
    console.call("scripts/report.py", apart=True, results=Path("results/two"))
    assert Path("results/two/report.html").is_file()
