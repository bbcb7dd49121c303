"""What counts how much: an estimate weighs rows as the training does whose outcome it predicts."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from src.data import Example, TaskData
from src.datamodule import TaskDataModule
from src.estimation import Part, estimate, part_weights, task_moments
from src.finetune import FineTuning, TrainingPlan
from src.gradients import outputs_of
from src.models import LanguageModel, load_base_model
from src.store import open_store
from tests.commands import COLLECT, ESTIMATE, TRAIN, run_script


def rows_of_different_lengths(model: LanguageModel, **options: bool) -> TaskDataModule:
    examples = [Example(i, "t", "train", "ask " * (1 + i % 3), "yes " * (1 + i * i)) for i in range(6)]
    return TaskDataModule(TaskData(tuple(examples)), model.tokenizer, model.kind, **options)


@pytest.mark.parametrize(("kind", "loss_on_prompt"), [("llama", False), ("llama", True), ("t5", False)])
def test_target_tokens_are_those_that_meet_a_logit(model_folders, kind, loss_on_prompt):
    model = load_base_model(model_folders[kind])
    datamodule = rows_of_different_lengths(model, loss_on_prompt=loss_on_prompt)
    _, _, rows = model.target_logits(datamodule.collate(range(6)))
    assert datamodule.target_tokens.tolist() == torch.bincount(rows).tolist()


def test_a_batch_is_a_mean_over_tokens_or_over_rows(model_folders):
    model = load_base_model(model_folders["llama"]).eval()
    datamodule = rows_of_different_lengths(model)
    losses = outputs_of(model, datamodule, np.arange(6), "loss")
    expected = {"token": np.average(losses, weights=datamodule.target_tokens), "row": losses.mean()}
    for loss_over, value in expected.items():
        module = FineTuning(model, datamodule, TrainingPlan(epochs=1, lr=1.0, loss_over=loss_over))
        module.log = lambda *_: None
        found = module.training_step(datamodule.collate(range(6)), 0)
        assert found.item() == pytest.approx(value, rel=1e-5)
    assert abs(expected["token"] - expected["row"]) > 1e-3 * expected["row"]


def test_stage_3_weighs_rows_as_the_training_did(here):
    """Of a training on the mean over rows, the weights of such a training; those of the other one where they are asked for."""
    by_row, toy = ["--save_name", "by_row"], ["--save_name", "toy"]
    run_script(TRAIN, *here, *by_row, "--loss_over", "row")
    run_script(*COLLECT, *by_row, "--project_dim", "16")
    run_script(*COLLECT, *toy, "--project_dim", "16")
    Path("three.txt").write_text("0\n1 2\n0 1 3\n")
    drawn = ["--project_dim", "16", "--sampled_tasks", "three.txt"]
    run_script(ESTIMATE, *by_row, *drawn)
    runs = {"default": [], "token": ["--weight_by", "token"], "sample": ["--weight_by", "sample"]}
    for name, flags in runs.items():
        run_script(ESTIMATE, *toy, *drawn, "--results_name", f"weights/{name}", *flags)
    folders = [Path("results/by_row"), *(Path("results/weights") / name for name in runs)]
    used = {path.name: json.loads((path / "manifest.json").read_text())["weight_by"] for path in folders}
    assert used == {"by_row": "sample", "default": "token", "token": "token", "sample": "sample"}
    tables = {name: pd.read_csv(f"results/weights/{name}/estimates.csv") for name in runs}
    pd.testing.assert_frame_equal(tables["default"], tables["token"])

    (store,) = Path("gradients").glob("*_toy_dim_16_run_0")
    parts = open_store(store, None, "")
    members = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 0, 1]])
    alike = []
    for part in parts:
        groups = (part.samples["task"], 4), (part.samples["target"], len(part.targets))
        alike.append(Part(*(task_moments(part.rows, part.outputs, *group) for group in groups)))
    differences = np.diff(estimate(alike, members, weights=part_weights(alike)[0]), axis=0)  # levels are another matter
    found = tables["sample"].filter(like="estimate/").to_numpy()
    np.testing.assert_allclose(np.diff(found, axis=0), differences, rtol=1e-3, atol=1e-6)
    assert np.abs(np.diff(found - tables["token"].filter(like="estimate/").to_numpy(), axis=0)).max() > 1e-4
