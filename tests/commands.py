"""What a user types, and what tests share to type it: scripts by path, rows in files, errors by their words."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from src import config
from src.console import ROOT, load_script

__all__ = ["ROOT", "STAGES", "load_script"]

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


def typed(script: str, *flags: object) -> dict[str, Any]:
    """The flags that are typed for a script, by name."""
    return config.typed_flags(load_script(script).parse_args(list(map(str, flags))))


def training(*flags: object) -> config.TrainConfig:
    """What stage 1's script makes of these flags."""
    return config.for_training(typed(TRAIN, *flags))


def refused(message: str, action: Callable, *arguments: object, error: type = ValueError, **options: object) -> None:
    """The action ends with an error whose text has this pattern."""
    with pytest.raises(error, match=message):
        action(*arguments, **options)


def write_jsonl(path: Path | str, rows: Iterable[dict]) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_cot(root: Path, key: str, samples: list, split: dict, metadata: dict, completions: dict) -> Path:
    """Write a data set in the reasoning-teacher layout; the file of the completions."""
    metadata = {"base_model": "text-davinci-002", "dataset_key": key, **metadata}
    folder = f"saved/completion_data/B_text-davinci-002__C_{metadata['completion_key']}"
    for name, content in (
        (f"data/dataset/{key}.json", {"metadata": {"dataset_key": key}, "data": samples}),
        (f"data/split/{key}__default.json", split),
        (f"{folder}/D_{key}.json", {"metadata": metadata, "data": completions}),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(content), encoding="utf-8")
    return root / name


def read_json(path: Path | str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_jsonl(path: Path | str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
