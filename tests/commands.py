"""Loads the stage scripts by path, as a user names them."""

from src.console import ROOT, load_script

__all__ = ["ROOT", "STAGES", "load_script", "run_script"]

STAGES = (
    "custom_train.py",
    "custom_train_alpaca.py",
    "fast_estimate_compute_gradients.py",
    "fast_estimate_eval_approximation_alpaca.py",
    "fast_estimate_linear_regression.py",
    "fast_estimate_linear_regression_alpaca.py",
    "fast_estimate_forward_selection.py",
    "notebook/select_random_ensemble.py",
    "notebook/compare_estimates.py",
    "scripts/export_selection.py",
    "scripts/status.py",
)


def run_script(path: str, *arguments: str) -> object:
    """`python <path> <arguments>` in this process."""
    script = load_script(path)
    return script.main(script.parse_args([str(argument) for argument in arguments]))
