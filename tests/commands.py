"""Loads the stage scripts by path, as a user names them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]

STAGES = (
    "custom_train.py",
    "custom_train_alpaca.py",
    "fast_estimate_compute_gradients.py",
    "fast_estimate_eval_approximation_alpaca.py",
    "fast_estimate_linear_regression.py",
    "fast_estimate_linear_regression_alpaca.py",
    "fast_estimate_forward_selection.py",
    "notebook/select_random_ensemble.py",
)


def load_script(path: str) -> ModuleType:
    """The module of a script, without running it."""
    name = "script_" + path.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def run_script(path: str, *arguments: str) -> object:
    """`python <path> <arguments>` in this process."""
    script = load_script(path)
    return script.main(script.parse_args([str(argument) for argument in arguments]))
