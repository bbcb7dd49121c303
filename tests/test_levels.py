"""Estimates are in the unit of what they stand beside: measured losses of the base model and of the model of all tasks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from src import config
from src.estimation import estimate, part_weights
from src.selection import forward_selection
from src.stage_estimate import Estimator, stored
from src.stage_select import reference_estimates
from tests.commands import COLLECT, COMPARE, ESTIMATE, SELECT, TRAIN, read_json, run_script, typed
from tests.conftest import TOY_TRAINING, write_toy

DIM = ["--project_dim", "32"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_folders):
    """Stages 1 and 2 to the end, and the same training ended at a quarter."""
    folder = tmp_path_factory.mktemp("levels")
    made = f"{TRAIN} {write_toy(folder)} --model_key {model_folders['llama']} {TOY_TRAINING} --checkpoint_at 0 0.25"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, stop in (("cut", ["--stop_after_checkpoints"]), ("whole", [])):
            run_script(made, "--save_name", name, *stop)
            run_script(*COLLECT, "--save_name", name, *DIM)
    return folder


@pytest.fixture
def flags(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(trained, tmp_path / "copy"))
    return ["--save_name", "whole"]


def estimator_of(*flags: str) -> Estimator:
    return Estimator(*stored(config.EstimateConfig, typed(ESTIMATE, *flags, *DIM)))


def measured(flags: list[str], *subset: str) -> pd.Series:
    """Validation losses of the base model fine-tuned on a subset, by stage 5."""
    run_script(TRAIN, *flags, "--results_name", "measured", "--task_idxes", *subset)
    table = pd.read_csv("results/measured/results.csv", dtype={"subset": str}, keep_default_na=False)
    wanted = " ".join(map(str, range(4))) if subset else ""
    return table[table["subset"] == wanted].iloc[0].filter(like="validation_loss/")


def test_nothing_and_everything_are_what_fine_tuning_gives(flags):
    estimator = estimator_of(*flags)
    ends = np.array([[False] * 4, [True] * 4])
    found = estimator(ends)
    np.testing.assert_allclose(found[0], measured(flags).to_numpy(float), rtol=1e-5)
    np.testing.assert_allclose(found[1], measured(flags, "all").to_numpy(float), rtol=1e-5)
    assert list(reference_estimates(estimator, [0])) == ["base model (measured)", "all tasks (measured)"]


def test_all_other_estimates_are_shifted_together(flags):
    """At whatever rho; so that a search takes the same tasks, the first from the empty subset too."""
    estimator = estimator_of(*flags)
    members = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 0, 1], [1, 1, 1, 1]], bool)
    for rho in (1e-3, 0.1):
        plain = estimate(estimator.parts, members, rho=rho, weights=estimator.part_weights([0], rho))
        shifts, expected = estimator(members, rho=rho) - plain, np.tile(estimator.levels.all_tasks - plain[-1], (4, 1))
        np.testing.assert_allclose(shifts, expected, rtol=1e-5, atol=1e-6)
    weights = estimator.part_weights([0])
    values = (lambda tried: estimate(estimator.parts, tried, weights=weights).mean(axis=1),
              lambda tried: estimator(tried).mean(axis=1))  # fmt: skip
    plain, shifted = (forward_selection(of, 4, past_best=5) for of in values)
    assert [step.task for step in plain.steps] == [step.task for step in shifted.steps]
    assert plain.selected == shifted.selected


def test_a_training_that_was_ended_early_says_so(flags, capsys):
    cut = ["--save_name", "cut"]
    estimator = estimator_of(*cut)
    assert estimator.levels.names == ("base model (measured)", "all tasks (estimated)")
    assert estimator.levels.step == 5 and not estimator.levels.whole
    np.testing.assert_allclose(estimator.levels.base, estimator_of(*flags).levels.base, rtol=1e-5)
    last = estimator.stored[-1]
    goal = last.samples["target"] == last.targets.index("goal")
    assert estimator.levels.all_tasks[last.targets.index("goal")] == pytest.approx(last.outputs[goal].mean(), rel=1e-4)
    run_script(ESTIMATE, *cut, *DIM)
    manifest = read_json("results/cut/manifest.json")
    assert manifest["levels"]["base"].keys() == manifest["levels"]["all_tasks"].keys()
    run_script(SELECT, *cut, *DIM)
    said = capsys.readouterr().out
    assert "the loss of all tasks is estimated: it was last measured after 5 steps" in said
    assert " base model (measured), " in said and " all tasks (estimated).\n" in said


def change_training(change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change the manifest of the whole training; its folder."""
    (training,) = (path for path in Path("external_lightning_logs").iterdir() if "cut" not in path.name)
    known = read_json(training / "manifest.json")
    change(known)
    (training / "manifest.json").write_text(json.dumps(known))
    return training


def test_what_the_training_does_not_say_the_store_does(flags):
    """A folder of checkpoints whose training is not known: the losses of the rows at the first and the last of them."""
    whole = estimator_of(*flags)
    training = change_training(lambda known: known.pop("validation_losses"))
    levels = estimator_of(*flags).levels
    np.testing.assert_allclose(levels.base, whole.levels.base, rtol=1e-4)
    assert levels.step == 5 and not levels.whole
    alone = estimator_of(*flags, "--load_model_dir", f"{training.name}/step_step=5")
    assert alone.levels is None and alone.ranks_only


def test_what_is_no_loss_is_called_a_score(flags, capsys):
    scored = [*flags, *DIM, "--estimator", "alignment", "--results_name", "scored"]
    run_script(ESTIMATE, *scored, "--number_of_subsets", "4")
    table = pd.read_csv("results/scored/estimates.csv")
    assert {name.partition("/")[0] for name in table.columns} == {"subset", "run", "score"}
    run_script(SELECT, *scored)
    said = capsys.readouterr().out
    assert "Score (ranking only): " in said and "measured" not in said
    assert "score" in pd.read_csv("results/scored/selection.csv").columns
    table.rename(columns=lambda name: name.replace("score/", "validation_loss/")).to_csv("truth.csv", index=False)
    run_script(COMPARE, "results/scored/estimates.csv", "truth.csv")
    compared = pd.read_csv("results/scored/comparison.csv").set_index("predictor")
    assert compared.loc["score (ranking only)", ["lds", "relative_error"]].isna().tolist() == [False, True]


def test_a_selection_that_is_not_below_the_base_model_is_named(flags, capsys):
    """The same gradients after a training that made everything worse."""
    named = [*flags, *DIM, "--target_task", "goal", "--results_name", "worse"]
    run_script(SELECT, *named)
    assert "No selection is estimated to beat" not in capsys.readouterr().out
    change_training(lambda known: known["validation_losses"]["base"].update(goal=0.01))
    run_script(SELECT, *named)
    assert "No selection is estimated to beat the base model: its measured loss, 0.01, " in capsys.readouterr().out


def test_a_selection_says_how_far_its_checkpoints_agree(flags, capsys):
    """Rank correlation over random halves; one checkpoint alone cannot say it."""
    estimator = estimator_of(*flags)
    _, by_part = part_weights(estimator.parts)
    assert estimator.agreement([0]) == pytest.approx(spearmanr(*by_part[:, :, 0]).statistic)
    run_script(SELECT, *flags, *DIM, "--results_name", "trusted")
    said = capsys.readouterr().out
    assert "gradients at step 0, 5 of meta-training" in said
    assert f"rank random halves at {estimator.agreement([0]):.2f} alike: trust is " in said
    estimator.parts[1] = estimator.parts[0]
    estimator._weights.clear()
    assert "at 1.00 alike: trust is high" in estimator.trust([0])
    del estimator.parts[1], estimator.stored[1]
    estimator._weights.clear()
    assert "only several that tell subsets apart" in estimator.trust([0])
