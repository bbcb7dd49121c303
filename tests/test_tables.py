"""Every table of the paper from its shell file, on the embedded default."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pandas as pd
import pytest

from tests.commands import ROOT

COLUMNS = {
    "approximation_error": ["distance", "addsub", "instruction"],
    "correlation": ["data set", "target", "predictor", "subsets", "lds", "lds_low", "lds_high", "relative_error",
                    "squared_relative_error", "ceiling"],
    "cost": ["data set", "subsets", "meta-training (s)", "gradients (s)", "estimation (s)", "one fine-tuning (s)",
             "all subsets fine-tuned (s)", "times faster"],
    "fine_tuned": ["data set", "trained on", "tasks", "test loss", "test accuracy", "seconds"],
}  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


@pytest.mark.parametrize("name", COLUMNS)
def test_smoke(name: str, here: Path) -> None:
    """The shell file makes its world, runs its stages and renders the table; the worlds are shared by all three."""
    if not (ROOT / ".venv").is_dir():
        pytest.skip("scripts/environment.sh has not made .venv")
    command = ["bash", str(ROOT / "scripts" / "tables" / f"{name}.sh"), "--smoke"]
    finished = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    table = pd.read_csv(here / "results" / "tables" / name / "table.csv")
    assert list(table.columns) == COLUMNS[name]
    text = (here / "results" / "tables" / name / "table.md").read_text()
    assert text.startswith(f"| {' | '.join(COLUMNS[name])} |") and len(text.splitlines()) >= len(table) + 2
    if name == "fine_tuned":
        assert table["trained on"].tolist() == 2 * ["base model", "all tasks", "forward selection", "random ensemble"]
        assert table["test accuracy"].notna().tolist() == 4 * [True] + 4 * [False]
