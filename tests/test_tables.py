"""Every table of the paper from its shell file, on the embedded default."""

import shlex
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from src.console import run_command
from tests.commands import ROOT, load_script

JUDGED = ["subsets", "lds", "lds_low", "lds_high", "relative_error", "squared_relative_error", "attainable"]
SECONDS = ["meta-training", "gradients", "estimation", "one fine-tuning", "all subsets fine-tuned"]
COLUMNS = {
    "approximation_error": ["distance", "addsub", "addsub, no change", "instruction", "instruction, no change"],
    "correlation": ["data set", "target", "predictor", *JUDGED],
    "cost": ["data set", "subsets", *(f"{what} (s)" for what in SECONDS), "times faster"],
    "fine_tuned": ["data set", "trained on", "tasks", "test loss", "test accuracy", "seconds"],
}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return tmp_path_factory.mktemp("tables")


def shell(name: str, *flags: str, here: Path) -> subprocess.CompletedProcess:
    """`bash scripts/tables/<name>.sh <flags>`."""
    command = ["bash", str(ROOT / "scripts" / "tables" / f"{name}.sh"), *flags]
    return subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", COLUMNS)
def test_a_table_and_its_commands(name, here, monkeypatch):
    """The shell file's commands make their worlds, shared by all tables, and render the table; one of them from the shell,
    the others here, where the libraries are imported. Those of the paper's data, which take a GPU, are parsed."""
    monkeypatch.chdir(here)
    full = shell(name, "--dry_run", here=here).stdout
    for line in full.splitlines():
        script, *arguments = shlex.split(line.removeprefix("python "))
        load_script(script).parse_args(arguments)
    assert "flan_t5_base" in full and "TinyLlama/" in full
    if name == "cost":
        if not (ROOT / ".venv").is_dir():
            pytest.skip("scripts/environment.sh has not made .venv")
        finished = shell(name, "--smoke", here=here)
        assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    else:
        for line in shell(name, "--smoke", "--dry_run", here=here).stdout.splitlines():
            run_command(line.removeprefix("python "))
    table = pd.read_csv(f"results/tables/{name}/table.csv")
    text = Path(f"results/tables/{name}/table.md").read_text()
    assert list(table.columns) == COLUMNS[name] and text.startswith(f"| {' | '.join(COLUMNS[name])} |")
    assert len(text.splitlines()) >= len(table) + 2
    if name == "fine_tuned":
        assert table["trained on"].tolist() == 2 * ["base model", "all tasks", "forward selection", "random ensemble"]
        assert table["test accuracy"].notna().tolist() == 4 * [True] + 4 * [False]


def test_an_unknown_flag_is_refused(here):
    refused = shell("cost", "--smok", here=here)
    assert refused.returncode == 2 and "error: unrecognized argument --smok" in refused.stderr
