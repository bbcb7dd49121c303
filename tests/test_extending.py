"""What docs/extending.md promises a contributor: an architecture, a format, an estimator and a search are one entry each."""

import csv
import inspect
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from src.data import require_file
from src.estimation import ESTIMATORS, EstimatorKind, OnSubsets, Part, _target_means, _tensor, part_weights
from src.instruction import FORMATS, Record, _numbered, load_instruction
from src.models import LORA_TARGETS
from src.selection import METHODS, Estimate, Method, SelectionPath, Step
from src.store import open_store
from src.subsets import read_subsets
from tests.commands import ESTIMATE, MEASURE, ROOT, SELECT, TRAIN, refused, run_script
from tests.conftest import write_sources


def test_an_architecture_is_an_entry_of_lora_targets(workspace, model_folders, monkeypatch):
    """Phi-3 computes queries, keys and values in one layer. Once that has a name, its gradients are taken."""
    write_sources(workspace / "sources.jsonl", {"up": 12, "down": 12})
    flags = ["--data_files", "sources.jsonl", "--model_key", model_folders["phi3"], "--train_lora", "--lora_rank", "4"]
    stage_1 = [TRAIN, *flags, "--epochs", "1", "--batch_size", "4", "--lr", "1e-2", "--checkpoint_at", "1.0"]
    refused("architecture phi3; name them with --lora_target_modules", run_script, *stage_1)

    monkeypatch.setitem(LORA_TARGETS, "phi3", ("qkv_proj",))
    run_script(*stage_1)
    run_script(MEASURE, "--compute_pretrained_outputs", "--projection", "none")
    (store,) = Path("gradients").iterdir()
    (part,) = open_store(store, None, MEASURE)
    assert part.rows.shape[1] == 2 * 4 * (32 + 64) and np.abs(part.rows).max() > 0  # rank 4 of both layers' (64, 32)


def psv_records(source: str) -> Iterator[tuple[str, Record]]:
    with open(require_file(Path(source)), encoding="utf-8", newline="") as file:
        yield from _numbered(source, csv.DictReader(file, delimiter="|"))


def test_a_data_format_is_a_reader_in_the_table_of_formats(workspace, monkeypatch):
    """A .psv file is refused by its name; with a reader it gives what the same data in .jsonl give, a damaged one is named."""
    write_sources(workspace / "rows.jsonl", {"up": 20, "down": 20})
    pd.read_json("rows.jsonl", lines=True).to_csv("rows.psv", sep="|", index=False)
    refused(r"^rows\.psv: instruction data are files that end in \.jsonl", load_instruction, ["rows.psv"])
    monkeypatch.setitem(FORMATS, ".psv", psv_records)
    data, expected = load_instruction(["rows.psv"]), load_instruction(["rows.jsonl"])
    assert list(data.examples) == list(expected.examples) and len(data) == 40
    assert data.fingerprint == expected.fingerprint
    Path("damaged.psv").write_bytes(b"inputs|targets\nup|\xff\n")
    refused(r"^damaged\.psv cannot be read", load_instruction, ["damaged.psv"])


def diagonal(part: Part, strength: float) -> OnSubsets:
    sums, (means, slopes) = _tensor(part.train.sums), _target_means(part)
    squares = _tensor(np.diagonal(part.train.outers, axis1=1, axis2=2))
    return lambda shares: means - (shares @ sums) / (shares @ squares + strength) @ slopes.T


@pytest.mark.parametrize("shown", [psv_records, diagonal])
def test_what_the_page_shows_is_what_is_tested(shown):
    assert inspect.getsource(shown) in (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def test_an_estimator_is_an_entry_of_estimators(here, monkeypatch):
    """Stage 3 takes it by its name and writes its estimates: the weighted mean over the checkpoints of what the rows give."""
    kind = EstimatorKind(diagonal, "as linear, each coordinate by itself", needs_outers=True)
    monkeypatch.setitem(ESTIMATORS, "diagonal", kind)
    subsets = [(0,), (3,), (0, 2), (1, 2, 3)]
    Path("some.txt").write_text("\n".join(" ".join(map(str, subset)) for subset in subsets))
    flags = ["--project_dim", "32", "--estimator", "diagonal", "--rho", "0.02", "--weight_by", "sample"]
    run_script(ESTIMATE, "--save_name", "toy", *flags, "--sampled_tasks", "some.txt", "--results_name", "diagonal")
    found = pd.read_csv("results/diagonal/estimates.csv").filter(like="estimate/")
    (store,) = Path("gradients").glob("*_toy_dim_32_run_0")
    parts = open_store(store, None, MEASURE)
    assert len(parts) == 2 and found.shape == (4, 5)
    expected, stored = np.zeros(found.shape), [part.estimation_part(weight_by="sample") for part in parts]
    weights, _ = part_weights(stored, estimator="diagonal", rho=0.02)
    for part, of_part in zip(parts, weights, strict=True):
        rows, task = part.rows.astype(float), part.samples["task"]
        ridge = 0.02 * np.square(rows[task >= 0]).sum()
        of_subsets = [rows[np.isin(task, subset)] for subset in subsets]
        steps = np.stack([-of.sum(axis=0) / (np.square(of).sum(axis=0) + ridge) for of in of_subsets])
        for j, column in enumerate(found):
            target = part.targets.index(column.removeprefix("estimate/"))
            own = part.samples["target"] == target
            expected[:, j] += of_part[target] * (part.outputs[own].mean() + steps @ rows[own].mean(axis=0))
    # levels are measured ones
    np.testing.assert_allclose(np.diff(found, axis=0), np.diff(expected, axis=0), rtol=1e-5, atol=1e-7)


def second(estimate: Estimate, num_tasks: int, **_: object) -> SelectionPath:
    """The task that alone has the second lowest estimate."""
    values = estimate(np.eye(num_tasks, dtype=bool))
    task = int(np.argsort(values)[1])
    return SelectionPath((), 0.0, (Step((task,), task, values[task]),), (task,), values[task])


def test_a_selection_method_is_an_entry_of_methods(here, monkeypatch):
    """Stage 4 takes it by its name; its estimates are stage 3's."""
    at = ["--save_name", "toy", "--project_dim", "32", "--target_task", "goal", "--results_name", "mine"]
    Path("singles.txt").write_text("0\n1\n2\n3\n")
    run_script(ESTIMATE, *at, "--sampled_tasks", "singles.txt")
    task, value = list(pd.read_csv("results/mine/estimates.csv")["estimate/goal"].nsmallest(2).items())[1]
    monkeypatch.setitem(METHODS, "second", Method(second, "the second best"))
    run_script(SELECT, *at, "--method", "second")
    assert read_subsets(Path("sampled_tasks/mine_second_selection.txt"), 4) == [(task,)]
    path = pd.read_csv("results/mine/selection.csv")
    assert path["task"].tolist() == [task] and path["estimate"][0] == pytest.approx(value, rel=1e-6)
    message = r"--method second selected 1 task.* beyond"
    refused(message, run_script, SELECT, *at, "--method", "second", "--budget_rows", "3")
