"""What a user types, and what tests share to type it: scripts by path, rows in files, errors by their words."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from src.console import ROOT, load_script

__all__ = ["ROOT", "STAGES", "load_script", "read_jsonl", "refused", "run_script", "write_jsonl"]

TRAIN, SELECT = "custom_train_alpaca.py", "fast_estimate_forward_selection.py"
MEASURE, ESTIMATE = "fast_estimate_eval_approximation_alpaca.py", "fast_estimate_linear_regression_alpaca.py"
COLLECT = (MEASURE, "--compute_pretrained_outputs")
COT, COT_COLLECT = "custom_train.py", "fast_estimate_compute_gradients.py"
COT_ESTIMATE, EXPORT = "fast_estimate_linear_regression.py", "scripts/export_selection.py"
ENSEMBLE, COMPARE = "notebook/select_random_ensemble.py", "notebook/compare_estimates.py"
STAGES = (COT, TRAIN, COT_COLLECT, MEASURE, COT_ESTIMATE, ESTIMATE, SELECT, ENSEMBLE, COMPARE, EXPORT)
STAGES += ("scripts/status.py",)


def run_script(command: str, *arguments: object) -> object:
    """`python <command> <arguments>` in this process; the words of the command are separated by spaces."""
    path, *words = command.split()
    script = load_script(path)
    return script.main(script.parse_args([*words, *map(str, arguments)]))


def refused(message: str, action: Callable, *arguments: object, error: type = ValueError, **options: object) -> None:
    """The action ends with an error whose text has this pattern."""
    with pytest.raises(error, match=message):
        action(*arguments, **options)


def write_jsonl(path: Path | str, rows: Iterable[dict]) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path | str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
