"""Every table of the paper from its shell file, on the embedded default."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from src.console import run_command
from tests.commands import ROOT, load_script

COLUMNS = {
    "approximation_error": ["distance", "addsub", "addsub, no change", "instruction", "instruction, no change"],
    "correlation": ["data set", "target", "predictor", "subsets", "lds", "lds_low", "lds_high", "relative_error",
                    "squared_relative_error", "attainable"],
    "cost": ["data set", "subsets", "meta-training (s)", "gradients (s)", "estimation (s)", "one fine-tuning (s)",
             "all subsets fine-tuned (s)", "times faster"],
    "fine_tuned": ["data set", "trained on", "tasks", "test loss", "test accuracy", "seconds"],
}  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


def shell(name: str, *flags: str, here: Path) -> str:
    """What `bash scripts/tables/<name>.sh` prints."""
    command = ["bash", str(ROOT / "scripts" / "tables" / f"{name}.sh"), *flags]
    finished = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    return finished.stdout


@pytest.mark.parametrize("name", COLUMNS)
def test_smoke(name: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell file's commands make their world, run the stages and render the table; one of them from the shell, the
    others here, where the libraries are imported. The worlds are shared by all."""
    monkeypatch.chdir(here)
    if name == "cost":
        if not (ROOT / ".venv").is_dir():
            pytest.skip("scripts/environment.sh has not made .venv")
        shell(name, "--smoke", here=here)
    else:
        for line in shell(name, "--smoke", "--dry_run", here=here).splitlines():
            run_command(line.removeprefix("python "))
    table = pd.read_csv(here / "results" / "tables" / name / "table.csv")
    assert list(table.columns) == COLUMNS[name]
    text = (here / "results" / "tables" / name / "table.md").read_text()
    assert text.startswith(f"| {' | '.join(COLUMNS[name])} |") and len(text.splitlines()) >= len(table) + 2
    if name == "fine_tuned":
        assert table["trained on"].tolist() == 2 * ["base model", "all tasks", "forward selection", "random ensemble"]
        assert table["test accuracy"].notna().tolist() == 4 * [True] + 4 * [False]


@pytest.mark.parametrize("name", COLUMNS)
def test_the_full_tables_commands_parse(name: str, here: Path) -> None:
    """Without --smoke they take a GPU and the paper's data; a dry run shows them, and every script takes its flags."""
    printed = shell(name, "--dry_run", here=here)
    for line in printed.splitlines():
        script, *arguments = shlex.split(line.removeprefix("python "))
        load_script(script).parse_args(arguments)
    assert "flan_t5_base" in printed and "TinyLlama/" in printed


def test_an_unknown_flag_is_refused(here: Path) -> None:
    command = ["bash", str(ROOT / "scripts" / "tables" / "cost.sh"), "--smok"]
    finished = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    assert finished.returncode == 2 and "error: unrecognized argument --smok" in finished.stderr
