"""What a terminal shows: the lines that we print, and nothing of any library."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, STAGES, load_script
from tests.test_stages_cot import write_reasoning_teacher

COT = ["--dataset_key", "addsub", "--preset_key", "ft_cot_t70_2aug", "--train_lora", "--lora_rank", "4"]
TRAINING = "custom_train.py --epochs 1 --batch_size 8 --lr 2e-3 --max_new_tokens 6 --gradient_checkpointing"
GRADIENTS = "fast_estimate_compute_gradients.py --project_dim 16 --output_function margin"
ESTIMATES = (
    "fast_estimate_linear_regression.py --project_dim 16 --output_function margin --load_clusters --num_clusters 4 "
)
ESTIMATES += "--number_of_subsets 3 --evaluate displaced --max_new_tokens 6"
OURS = [
    r"loading the libraries …",
    r"going on from [\w/.=-]+",
    r"No CUDA GPU here: everything runs on the CPU\.",
    r"note: \S+D_addsub\.json: \d+ of \d+ completions are left out, as their answer is wrong",
    r"Wrote [\w/.]+.*",
    r"[\w ,=]+: \d+ %, [\d,]+ of [\d,]+ \[.*\]",
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
