"""From files to an answer in one command."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from src.cli import flags_of
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
    """It names the better of both selections by validation loss; its model, its rows and the page are there."""
    run_script(SCRIPT, *flags, "--save_name", "answer", "--halves", "3")
    printed = capsys.readouterr().out
    folder = Path("results/answer")
    summary = json.loads((folder / "summary.json").read_text())
    losses = summary["test_loss"]
    assert set(losses) == {"base", "all_tasks", "random_half", "random_ensemble", "forward_selection"}
    assert -1 <= summary["spearman"] <= 1 and (folder / "estimates.png").is_file()
    rows = pd.read_json(folder / "selected.jsonl", lines=True)
    last = printed.strip().splitlines()[-2:]
    assert last[0].startswith("Train on: ") and all(name in last[0] for name in rows["task"].unique())
    truth = pd.read_csv(folder / "results.csv", dtype={"subset": str}, keep_default_na=False).set_index("subset")
    tasks = json.loads((folder / "manifest.json").read_text())["tasks"]
    assert tasks == ["down", "left", "right", "up"]
    chosen = {}
    for method in ("forward_selection", "random_ensemble"):
        (line,) = [
            line
            for line in Path(f"sampled_tasks/answer_{method}.txt").read_text().splitlines()
            if not line.startswith("#")
        ]
        chosen[method] = line
    best = min(chosen.values(), key=lambda text: truth.loc[text, "validation_loss/goal"])
    assert set(rows["task"]) == {tasks[int(task)] for task in best.split()}
    model = last[1].split("The model trained on it: ")[1].split(";")[0]
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(flags[5]), model)
    assert "Really fine-tuned" in (folder / "report.html").read_text()


def test_flags_are_handed_on_as_typed(flags: list[str], capsys: pytest.CaptureFixture) -> None:
    """Every flag whose value is not a stage's own default reaches the stages; a dry run writes nothing."""
    script = load_script(SCRIPT)
    more = ["--max_length", "99", "--prompt_column", "a b", "--accelerator", "cpu", "--precision", "bf16"]
    args = script.parse_args([*flags, *more])
    handed = flags_of(args, *(group for group in (script.cli.add_instruction_data, script.cli.add_hardware)))
    assert handed == ["--data_files", "my", "--prompt_column", "a b", "--target_files", "my/goal.jsonl",
                      "--accelerator", "cpu", "--precision", "bf16"]  # fmt: skip
    before = sorted(Path().rglob("*"))
    script.main(script.parse_args([*flags, "--dry_run"]))
    assert "would write  results/" in capsys.readouterr().out and sorted(Path().rglob("*")) == before
