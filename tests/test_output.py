"""What a terminal and a log file show: the lines that we print, progress, and nothing of any library."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from src import console
from src.distributed import Hardware
from src.finetune import FineTuning, FitProgress, TrainingPlan, fit
from tests.commands import ROOT, STAGES, load_script, refused
from tests.test_models import adapted, make_datamodule
from tests.test_stages_cot import write_reasoning_teacher

COT = ["--dataset_key", "addsub", "--preset_key", "ft_cot_t70_2aug", "--train_lora", "--lora_rank", "4"]
TRAINING = "custom_train.py --epochs 1 --batch_size 8 --lr 2e-3 --max_new_tokens 6 --gradient_checkpointing"
GRADIENTS = "fast_estimate_compute_gradients.py --project_dim 16 --output_function margin"
ESTIMATES = "fast_estimate_linear_regression.py --project_dim 16 --output_function margin --load_clusters "
ESTIMATES += "--num_clusters 4 --number_of_subsets 3 --evaluate displaced --max_new_tokens 6"
OURS = [
    r"loading the libraries …",
    r"going on from [\w/.=-]+",
    r"No CUDA GPU here: everything runs on the CPU\.",
    r"note: \S+D_addsub\.json: \d+ of \d+ completions are left out, as their answer is wrong",
    r"Wrote [\w/.]+.*",
    r"[\w ,=-]+: +\d+%\|.*\| \d+/\d+ \[.*\]",
    r"(loading|checksums?|clustering) .* …",
]
"""Patterns of our lines: a slow machine shows bars, and what is waited for, where a fast one does not."""


def run(folder: Path, *command: str) -> list[str]:
    """All lines that `python <command>` prints in a folder, as a user starts it: standard output, then standard error."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(ROOT / command[0]), *command[1:]]
    ended = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return (ended.stdout + ended.stderr).splitlines()


def test_nothing_of_the_libraries_is_shown(model_folders, workspace):
    """Training with generated answers in half precision, gradients and estimates, each in a process of its own."""
    write_reasoning_teacher(workspace)
    for command in (TRAINING, GRADIENTS, ESTIMATES):
        lines = run(workspace, *command.split(), *COT, "--model_key", model_folders["t5"], "--precision", "bf16")
        assert sum(line.startswith("Wrote ") for line in lines) >= 1
        assert [line for line in lines if not any(re.fullmatch(pattern, line) for pattern in OURS)] == []


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_nor_by_several_processes(strategy, model_folders, workspace):
    write_reasoning_teacher(workspace)
    several = ["--accelerator", "cpu", "--devices", "0", "1", "--strategy", strategy]
    for command in (TRAINING, GRADIENTS):
        lines = run(workspace, *command.split(), *COT, "--model_key", model_folders["llama"], *several)
        assert [line for line in lines if not any(re.fullmatch(pattern, line) for pattern in OURS)] == []


@pytest.mark.parametrize("script", STAGES)
def test_help_is_all_that_help_shows(script, workspace, capsys):
    with pytest.raises(SystemExit):
        load_script(script).parse_args(["--help"])
    usage, *lines = run(workspace, script, "--help")
    assert usage.startswith("usage: python ") and lines == capsys.readouterr().out.splitlines()[1:]
    flags, shown = [line for line in lines if line.startswith("  --")], "\n".join(lines)
    assert len(flags) <= 40 and len(re.findall(r"\(default:\s", shown)) >= len(flags)


@pytest.fixture
def wait(monkeypatch):
    """Lets the clock of progress bars go on by so many seconds at once, whatever the machine does meanwhile."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_a_log_file_gets_a_line_now_and_then(wait, capsys):
    """Whole lines with share, pace and remaining time, no control characters, far fewer than steps; none for short work."""
    with console.progress(desc="gradients", total=60, initial=20, unit="sample") as bar:
        for _ in range(40):
            wait(1)
            bar.update(1)
    for _ in console.progress(iter(range(30)), desc="reading", unit="row"):
        wait(1)
    for _ in console.progress(range(3), desc="short"):
        wait(0.5)
    for _ in console.progress(range(4), desc="reading outside", unit="file"):
        for _ in console.progress(range(4), desc="reading inside", unit="row", leave=False):
            wait(8)
    lines = capsys.readouterr().err.splitlines()
    counted, uncounted = ([line for line in lines if line.startswith(name)] for name in ("gradients: ", "reading: "))
    nested = [line for line in lines if line.startswith(("reading outside: ", "reading inside: "))]
    assert len(counted) + len(uncounted) + len(nested) == len(lines) and len(nested) >= 8
    assert not set("\r\x1b") & set("".join(lines))
    shown = [re.sub(r" *\|.*\| ", " ", line) for line in counted]
    times = " 58% 35/60 [00:15<00:25", " 83% 50/60 [00:30<00:10", "100% 60/60 [00:40<00:00"
    assert shown == [f"gradients: {of},  1.00sample/s]" for of in times]
    assert uncounted[-1].startswith("reading: 30row [") and len(uncounted) <= 3


def test_work_without_steps_says_what_it_is(capsys, monkeypatch):
    monkeypatch.setattr(console, "SHOWN_AFTER_SECONDS", 0.5)
    said, ends = "", time.monotonic() + 30
    with console.waiting_for("clustering"):
        while not said and time.monotonic() < ends:
            said = capsys.readouterr().err
            time.sleep(0.01)
    with console.waiting_for("nothing"):
        pass
    time.sleep(0.7)
    assert said + capsys.readouterr().err == "clustering …\n"


def test_a_fit_shows_its_steps_and_losses_and_each_evaluation(model_folders, tmp_path, capsys, monkeypatch):
    for name in ("SHOWN_AFTER_SECONDS", "LOG_INTERVAL_SECONDS"):
        monkeypatch.setattr(console, name, 0)
    model = adapted(model_folders["llama"])
    datamodule = make_datamodule(model, tmp_path, batch_size=4)
    steps = -(-len(datamodule.data.indices("train")) // 4)
    hardware = Hardware("cpu", 1, "auto", "32-true", 1)
    fit(model, datamodule, TrainingPlan(2, 1e-3), hardware, seed=0, callbacks=[FitProgress("fit")], validate=True)
    said = capsys.readouterr().err
    losses = r"val_loss=\d\.\d{3}, train_loss=\d\.\d{3}"
    assert re.search(rf"fit:  50%\|.*\| {steps}/{2 * steps} \[.*<.*, {losses}\]", said), said
    assert len(re.findall(r"validation: 100%\|.*\| 1/1 \[", said)) == 3, said  # before training, and after each epoch


def test_losses_that_are_looked_at_later_are_named_all_the_same(model_folders, tmp_path):
    """As on a GPU, where a look at each step's would wait for it."""
    model = adapted(model_folders["llama"])
    module = FineTuning(model, make_datamodule(model, tmp_path), TrainingPlan(1, 1e-3))
    samples = [torch.tensor(pair) for pair in ((0, 1), (2, 5), (3, 4))]
    losses = torch.tensor([1.0, float("nan"), float("inf")])
    module._unseen = list(zip(losses, (7, 8, 9), samples, strict=True))
    refused(r"training loss is nan after 8 optimizer steps, at samples 2 \(a\), 5 \(a\); lower", module.look_at_losses)
