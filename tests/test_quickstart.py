"""The main job on a small world of another seed: the selection pays there too."""

import json
from pathlib import Path

from tests.commands import load_script


def test_selection_beats_everything_else(workspace, capsys):
    """Orders, not digits: the selected subset's test loss is below the base model's, all tasks' and random halves'."""
    world = ["--world", "--num_tasks", "12", "--pretrain_steps", "900"]
    quickstart = load_script("scripts/quickstart.py")
    quickstart.main(quickstart.parse_args(["--seed", "3", "--num_halves", "3", *world]))
    printed = capsys.readouterr().out
    summary = json.loads(Path("results/quickstart/summary.json").read_text())
    loss = summary["test_loss"]
    assert set(loss) == {"base", "all_tasks", "random_half", "random_ensemble", "forward_selection"}
    assert loss["forward_selection"] < min(loss["base"], loss["all_tasks"], loss["random_half"])
    assert loss["random_ensemble"] < min(loss["all_tasks"], loss["random_half"])
    assert -1 <= summary["spearman"] <= 1 and len(summary["selected_tasks"]) >= 1
    assert {"make_synthetic", "meta_training", "gradients", "forward_selection"} <= set(summary["seconds"])
    assert Path("results/quickstart/estimates.png").stat().st_size > 10_000
    for script in ("custom_train_alpaca.py", "fast_estimate_forward_selection.py", "data/make_synthetic.py"):
        assert f"$ python {script}" in printed
