"""What the README promises a contributor: an architecture, a format, an estimator and a search are one entry each."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from src.data import TaskData, require_file
from src.datamodule import Batch
from src.estimation import ESTIMATORS, EstimatorKind, OnSubsets, Part, _shares, _target_means, _tensor
from src.instruction import FORMATS, Record, _numbered
from src.models import LORA_TARGETS, LanguageModel, load_checkpoint, per_sample_loss
from src.selection import METHODS, Estimate, Method, SelectionPath, Step
from src.stages import load_data, make_datamodule
from src.store import StoredPart, open_store
from src.subsets import read_subsets
from tests.commands import load_script, run_script
from tests.conftest import write_sources
from tests.test_stages import here, track

__all__ = ["here", "track"]  # the fixtures: a workspace in which stages 1 and 2 have run

STAGE_1, STAGE_2 = "custom_train_alpaca.py", "fast_estimate_eval_approximation_alpaca.py"
STAGE_3, STAGE_4 = "fast_estimate_linear_regression_alpaca.py", "fast_estimate_forward_selection.py"


# --- an architecture -----------------------------------------------------------------------------------------


def loop_of_backwards(model: LanguageModel, batches: Iterable[Batch]) -> tuple[np.ndarray, np.ndarray]:
    """Gradients (R, p) and losses (R,) of batches of one row: a forward and a backward for each."""
    parameters = dict(model.network.named_parameters())
    weights = [parameters[name] for name in model.layout.shapes]
    gradients, losses = [], []
    for batch in batches:
        loss = per_sample_loss(*model.target_logits(batch), 1).sum()
        gradients.append(torch.cat([slope.flatten() for slope in torch.autograd.grad(loss, weights)]).numpy())
        losses.append(loss.item())
    return np.stack(gradients), np.array(losses)


def test_an_architecture_is_an_entry_of_lora_targets(
    workspace: Path, model_folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Phi-3 computes queries, keys and values in one layer. Once that has a name, rows are the loop's of backwards."""
    write_sources(workspace / "sources.jsonl", {"up": 12, "down": 12})
    flags = ["--data_files", "sources.jsonl", "--model_key", model_folders["phi3"], "--train_lora", "--lora_rank", "4"]
    stage_1 = [STAGE_1, *flags, "--epochs", "1", "--batch_size", "4", "--lr", "1e-2", "--checkpoint_at", "1.0"]
    with pytest.raises(ValueError, match="known for the architecture phi3; name them with --lora_target_modules"):
        run_script(*stage_1)

    monkeypatch.setitem(LORA_TARGETS, "phi3", ("qkv_proj",))
    run_script(*stage_1)
    run_script(STAGE_2, "--compute_pretrained_outputs", *flags, "--projection", "none")
    (store,) = Path("gradients").iterdir()
    (part,) = open_store(store, None, STAGE_2)
    args = load_script(STAGE_1).parse_args(flags)
    model = load_checkpoint(Path(part.manifest["checkpoint_dir"]), args.model_key).eval()
    assert {matrix.module_name.split(".")[-3] for matrix in model.layout.matrices} == {"qkv_proj"}
    datamodule = make_datamodule(args, load_data(args), model)
    batches = (datamodule.collate([index]) for index in part.samples["sample_index"])
    gradients, losses = loop_of_backwards(model, batches)
    assert np.linalg.norm(gradients, axis=1).min() > 0.1
    np.testing.assert_allclose(part.outputs, losses, rtol=1e-5)
    assert np.linalg.norm(part.rows - gradients) <= 1e-5 * np.linalg.norm(gradients)


# --- a data format -------------------------------------------------------------------------------------------


def psv_records(source: str) -> Iterator[tuple[str, Record]]:
    """Columns with bars between them; the first line names them."""
    with open(require_file(Path(source)), encoding="utf-8", newline="") as file:
        yield from _numbered(source, csv.DictReader(file, delimiter="|"))


def test_a_data_format_is_a_reader_in_the_table_of_formats(
    workspace: Path, model_folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A .psv file is refused by its name; with a reader it gives the rows and losses of the same data in .jsonl, and a
    damaged one is named."""
    write_sources(workspace / "rows.jsonl", {"up": 20, "down": 20})
    pd.read_json("rows.jsonl", lines=True).to_csv("rows.psv", sep="|", index=False)

    def taken_by_stage_1(source: str) -> tuple[TaskData, pd.DataFrame]:
        flags = ["--data_files", source, "--model_key", model_folders["llama"], "--save_name", source]
        run_script(STAGE_1, *flags, "--task_idxes")
        return load_data(load_script(STAGE_1).parse_args(flags)), pd.read_csv(f"results/{source}/results.csv")

    with pytest.raises(ValueError, match=r"^rows\.psv: instruction data are files that end in \.jsonl"):
        taken_by_stage_1("rows.psv")
    monkeypatch.setitem(FORMATS, ".psv", psv_records)
    (data, losses), (expected, expected_losses) = taken_by_stage_1("rows.psv"), taken_by_stage_1("rows.jsonl")
    assert list(data.examples) == list(expected.examples) and len(data) == 40
    assert data.fingerprint == expected.fingerprint
    pd.testing.assert_frame_equal(losses.drop(columns="seconds"), expected_losses.drop(columns="seconds"))
    Path("damaged.psv").write_bytes(b"inputs|targets\nup|\xff\n")
    with pytest.raises(ValueError, match=r"^damaged\.psv cannot be read"):
        taken_by_stage_1("damaged.psv")


# --- an estimator --------------------------------------------------------------------------------------------


def diagonal(part: Part, strength: float) -> OnSubsets:
    """As "linear", but of H_S only the diagonal, so that each coordinate is solved by itself."""
    totals, sums, (means, slopes) = _tensor(part.train.weights), _tensor(part.train.sums), _target_means(part)
    squares = _tensor(np.diagonal(part.train.outers, axis1=1, axis2=2))

    def estimates(weights: Tensor) -> Tensor:
        shares = _shares(weights, totals)
        return means - (shares @ sums) / (shares @ squares + strength) @ slopes.T

    return estimates


def slow_diagonal(part: StoredPart, subset: Sequence[int], target: str, rho: float) -> float:
    """What `diagonal` estimates for one target, from the rows of one checkpoint."""
    rows, task = part.rows.astype(np.float64), part.samples["task"]
    strength = rho * np.square(rows[task >= 0]).sum(axis=1).mean()
    chosen, own = rows[np.isin(task, subset)], part.samples["target"] == part.targets.index(target)
    solution = -chosen.mean(axis=0) / (np.square(chosen).mean(axis=0) + strength)
    return float(part.outputs[own].mean() + rows[own].mean(axis=0) @ solution)


def test_an_estimator_is_an_entry_of_estimators(
    here: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Stage 3 takes it by its name, says what it is, and writes its estimates: the mean over the checkpoints."""
    stage_3 = [STAGE_3, *here, "--project_dim", "32", "--estimator", "diagonal", "--rho", "0.02"]
    stage_3 += ["--weight_by", "sample"]
    stage_3 += ["--sampled_tasks", "some.txt", "--save_name", "diagonal"]
    with pytest.raises(SystemExit):
        run_script(*stage_3)
    assert "argument --estimator: invalid choice: 'diagonal'" in capsys.readouterr().err

    meaning = "as linear, each coordinate by itself"
    monkeypatch.setitem(ESTIMATORS, "diagonal", EstimatorKind(diagonal, meaning, needs_outers=True))
    with pytest.raises(SystemExit):
        run_script(STAGE_3, "--help")
    assert f"diagonal: {meaning}" in " ".join(capsys.readouterr().out.split())
    subsets = [(0,), (3,), (0, 2), (1, 2, 3)]
    Path("some.txt").write_text("\n".join(" ".join(map(str, subset)) for subset in subsets))
    run_script(*stage_3)
    (store,) = Path("gradients").glob("*_dim_32_run_0")
    parts = open_store(store, None, STAGE_2)
    found = pd.read_csv("results/diagonal/estimates.csv").filter(like="estimate/")
    assert len(parts) == 2 and found.shape == (4, 5)
    for column in found:
        target = column.removeprefix("estimate/")
        expected = [np.mean([slow_diagonal(part, subset, target, 0.02) for part in parts]) for subset in subsets]
        np.testing.assert_allclose(np.diff(found[column]), np.diff(expected), rtol=1e-6)  # levels are measured ones


# --- a selection method --------------------------------------------------------------------------------------


def alone(estimate: Estimate, num_tasks: int, *, max_tasks: int | None = None, **_: object) -> SelectionPath:
    """Add tasks in the order of their own estimates, as many as there may be."""
    nothing, singles = np.zeros((1, num_tasks), bool), np.eye(num_tasks, dtype=bool)
    order = np.argsort(estimate(singles), kind="stable")[:max_tasks]
    subsets = np.logical_or.accumulate(singles[order])
    steps = tuple(
        Step(tuple(np.flatnonzero(subset).tolist()), int(task), float(value))
        for subset, task, value in zip(subsets, order, estimate(subsets), strict=True)
    )
    return SelectionPath((), float(estimate(nothing)[0]), steps, steps[-1].subset, steps[-1].estimate)


def test_a_selection_method_is_an_entry_of_methods(here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 4 takes it by its name and selects the two tasks that stage 3 estimates lowest on their own."""
    at = [*here, "--project_dim", "32", "--target_task", "goal", "--save_name", "mine"]
    Path("singles.txt").write_text("0\n1\n2\n3\n")
    run_script(STAGE_3, *at, "--sampled_tasks", "singles.txt")
    estimates = pd.read_csv("results/mine/estimates.csv")["estimate/goal"]
    best = estimates.nsmallest(2)

    monkeypatch.setitem(METHODS, "alone", Method(alone, "add tasks in the order of their own estimates"))
    run_script(STAGE_4, *at, "--method", "alone", "--max_tasks", "2")
    assert read_subsets(Path("sampled_tasks/mine_alone_selection.txt"), 4) == [tuple(sorted(best.index))]
    with pytest.raises(ValueError, match="--method alone selected 4 tasks with 64 rows, which is beyond"):
        run_script(STAGE_4, *at, "--method", "alone", "--budget_rows", "20")
    path = pd.read_csv("results/mine/selection.csv")
    assert path["task"].tolist() == best.index.tolist() and path["selected"].all()
    assert path["estimate"][0] == pytest.approx(best.iloc[0], rel=1e-6)
