"""Laws that hold for any input (hypothesis), and a long run in miniature."""

import gc
import os
import resource
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from src.artifacts import results_dir, slug, subset_file
from src.data import SPLITS, TEXT, StoredExamples, TaskData, store_rows
from src.estimation import ESTIMATORS, Part, Rows, estimate, task_moments
from src.selection import forward_selection
from src.store import open_store
from src.subsets import membership_matrix

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

texts = st.text(max_size=20)


@QUICK
@given(texts)
def test_no_name_climbs_out(name):
    made_of = {Path("r") / slug(name): "r", results_dir(name): "results", subset_file(name): "sampled_tasks"}
    for made, root in ((made, Path(root)) for made, root in made_of.items()):
        assert made.resolve().is_relative_to(root.resolve()) and "\0" not in str(made)
        assert len(made.parts) >= len(root.parts)


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != "logistic"])
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_estimates_do_not_depend_on_the_order_of_tasks_and_rows(estimator, seed):
    rng = np.random.default_rng(seed)
    rows, outputs = rng.standard_normal((60, 8)).astype(np.float32), rng.random(60).astype(np.float32)
    task, target = rng.integers(0, 5, 60), np.full(60, -1)
    task[:5], task[40:], target[40:] = np.arange(5), -1, np.arange(20) % 2
    members = membership_matrix([(0, 1), (2, 3, 4), (1, 4)], 5)

    def estimates(order, renamed):
        """Rows in another order, task t called renamed[t]."""
        names = np.where(task >= 0, renamed[task], -1)[order]
        parts = [rows[order], outputs[order]]
        moments = task_moments(*parts, names, 5), task_moments(*parts, target[order], 2)
        part = Part(*moments, Rows(*parts, names, target[order]), "loss")
        columns = np.empty_like(members)
        columns[:, renamed] = members
        return estimate([part], columns, estimator=estimator)

    expected = estimates(np.arange(60), np.arange(5))
    np.testing.assert_allclose(estimates(rng.permutation(60), rng.permutation(5)), expected, rtol=1e-4, atol=1e-5)


@QUICK
@given(st.lists(st.tuples(texts, texts, st.sampled_from(SPLITS)), min_size=1, max_size=30))
def test_stored_texts_are_the_texts(rows):
    """By position, by slice and in a loop; surrogates aside, which no file in UTF-8 has."""
    rows = [tuple(text.encode("utf-8", "replace").decode() for text in row) for row in rows]
    table = store_rows(rows, pa.schema({"prompt": TEXT, "completion": TEXT, "split": TEXT}))
    examples = StoredExamples(table).with_columns(task=["t"] * len(rows))
    found = [(example.prompt, example.completion, example.split) for example in examples]
    assert found == rows and [examples[i] for i in range(len(rows))] == list(examples) == examples[:]
    assert TaskData(examples).fingerprint == TaskData(tuple(examples)).fingerprint


def test_two_hundred_cycles_do_not_grow(here):
    """Open a store, estimate, select: memory and open files after 200 times are those after 50."""
    (store,) = [path for path in Path("gradients").iterdir() if path.name.endswith("dim_32_run_0")]
    members = membership_matrix([(0, 1), (2, 3)], 4)
    taken = {}
    for cycle in range(1, 201):
        part = open_store(store, None, "stage 2")[0].estimation_part(by_rows=True)
        estimates = estimate([part], members)
        forward_selection(lambda tried, part=part: estimate([part], tried).mean(axis=1), 4)
        if cycle in (50, 200):
            gc.collect()
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
            taken[cycle] = (resident, len(os.listdir("/proc/self/fd")))
    assert np.isfinite(estimates).all()
    assert taken[200][0] - taken[50][0] < 8e6
    assert taken[200][1] == taken[50][1]
