"""Laws that hold for any input (hypothesis), and a long run in miniature."""

from __future__ import annotations

import gc
import os
import pickle
import resource
import struct
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from src.data import SPLITS, StoredExamples, TaskData, stable_split, store_texts
from src.estimation import ESTIMATORS, Part, Rows, estimate, task_moments
from src.frames import read_pickle
from src.paths import results_dir, slug, subset_file
from src.projection import make_projection
from src.selection import forward_selection
from src.store import open_store
from src.subsets import membership_matrix, read_subsets, write_subsets
from tests.test_stages import here, track

__all__ = ["here", "track"]
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

texts = st.text(max_size=20)
subsets = st.lists(st.sets(st.integers(0, 30), min_size=1).map(lambda ids: tuple(sorted(ids))), min_size=1, max_size=8)


@QUICK
@given(subsets, st.text(st.characters(blacklist_categories=["Cs"]), max_size=30))
def test_subset_files_round_trip(drawn: list[tuple[int, ...]], comment: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_subsets(Path(folder) / "s.txt", drawn, comment)
        assert read_subsets(Path(folder) / "s.txt", 31) == drawn


@QUICK
@given(texts)
def test_no_name_climbs_out(name: str) -> None:
    for made, root in (
        (Path("r") / slug(name), Path("r")),
        (results_dir(name), Path("results")),
        (subset_file(name), Path("sampled_tasks")),
    ):
        assert made.resolve().is_relative_to(root.resolve()) and "\0" not in str(made)
        assert len(made.parts) >= len(root.parts)


SHAPES = {"a": (5, 3), "b": (2, 7)}


@QUICK
@given(
    st.sampled_from(["sketch", "two_sided", "dense", "none"]),
    st.integers(2, 40),
    st.integers(0, 2**31),
    st.integers(1, 4),
)
def test_projections_are_linear_and_adjoint_to_lift(kind: str, dim: int, seed: int, tokens: int) -> None:
    projection = make_projection(kind, None if kind == "none" else dim, seed, shapes=SHAPES)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    solution = draw(projection.dim)
    lifted = projection.lift(solution, SHAPES)
    for name, (out, inner) in SHAPES.items():
        deltas, inputs = draw(2, tokens, out), draw(2, tokens, inner)
        rows = torch.zeros(2, projection.dim)
        projection.add(name, SHAPES[name], deltas, inputs, rows)
        gradients = torch.einsum("bto,bti->boi", deltas, inputs)
        inner_products = (gradients * lifted[name]).sum((1, 2))
        torch.testing.assert_close(rows @ solution, inner_products, rtol=1e-3, atol=1e-3)
        other = draw(2, tokens, out)
        separate, together = torch.zeros(2, projection.dim), torch.zeros(2, projection.dim)
        projection.add(name, SHAPES[name], 2 * deltas, inputs, separate)
        projection.add(name, SHAPES[name], other, inputs, separate)
        projection.add(name, SHAPES[name], 2 * deltas + other, inputs, together)
        torch.testing.assert_close(separate, together, rtol=1e-3, atol=1e-3)


@QUICK
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_moments_add_up_over_any_partition(seed: int, count: int, groups: int, pieces: int, outers: bool) -> None:
    rng = np.random.default_rng(seed)
    rows, outputs = rng.standard_normal((count, 6)).astype(np.float32), rng.standard_normal(count).astype(np.float32)
    group_of_row = rng.integers(-1, groups, count)
    whole = task_moments(rows, outputs, group_of_row, groups, outers=outers)
    of_pieces = [
        vars(task_moments(rows[piece], outputs[piece], group_of_row[piece], groups, outers=outers))
        for piece in np.array_split(rng.permutation(count), pieces)
    ]
    for field, values in vars(whole).items():
        if values is not None:
            np.testing.assert_allclose(sum(of[field] for of in of_pieces), values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != "logistic"])
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_estimates_do_not_depend_on_the_order_of_tasks_and_rows(estimator: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, outputs = rng.standard_normal((60, 8)).astype(np.float32), rng.random(60).astype(np.float32)
    task, target = rng.integers(0, 5, 60), np.full(60, -1)
    task[:5], task[40:], target[40:] = np.arange(5), -1, np.arange(20) % 2
    members = membership_matrix([(0, 1), (2, 3, 4), (1, 4)], 5)

    def estimates(order: np.ndarray, renamed: np.ndarray) -> np.ndarray:
        """Rows in another order, task t called renamed[t]."""
        names = np.where(task >= 0, renamed[task], -1)[order]
        parts = [rows[order], outputs[order]]
        part = Part(
            task_moments(*parts, names, 5),
            task_moments(*parts, target[order], 2),
            Rows(*parts, names, target[order]),
            "loss",
        )
        columns = np.empty_like(members)
        columns[:, renamed] = members
        return estimate([part], columns, estimator=estimator)

    expected = estimates(np.arange(60), np.arange(5))
    np.testing.assert_allclose(estimates(rng.permutation(60), rng.permutation(5)), expected, rtol=1e-4, atol=1e-5)


@QUICK
@given(st.lists(texts, min_size=1, max_size=40), st.floats(0, 0.4), st.integers(0, 10), st.randoms())
def test_splits_do_not_depend_on_the_order_of_rows(keys: list[str], share: float, most: int, random) -> None:
    sides = dict(zip(keys, stable_split(keys, share, most), strict=True))
    shuffled = list(keys)
    random.shuffle(shuffled)
    assert [sides[key] for key in shuffled] == stable_split(shuffled, share, most)


@QUICK
@given(st.lists(st.tuples(texts, texts, st.sampled_from(SPLITS)), min_size=1, max_size=30))
def test_stored_texts_are_the_texts(rows: list[tuple[str, str, str]]) -> None:
    """By position, by slice and in a loop; surrogates aside, which no file in UTF-8 has."""
    rows = [tuple(text.encode("utf-8", "replace").decode() for text in row) for row in rows]
    table = store_texts((prompt, completion) for prompt, completion, _ in rows)
    examples = StoredExamples(table, ["t"] * len(rows), [split for *_, split in rows])
    found = [(example.prompt, example.completion, example.split) for example in examples]
    assert found == rows and [examples[i] for i in range(len(rows))] == list(examples) == examples[:]
    assert TaskData(examples).fingerprint == TaskData(tuple(examples)).fingerprint


# --- pickles that want more than a frame -----------------------------------------------------------------------

called: list[str] = []
sentinel = types.ModuleType("sentinel_module")
sentinel.touch = lambda *arguments: called.append("touched")
names = st.one_of(
    st.sampled_from([
        ("sentinel_module", "touch"), ("os", "system"), ("builtins", "eval"), ("builtins", "getattr"), ("numpy", "load"),
        ("numpy.f2py", "run_main"), ("pandas.io.common", "os.system"), ("pandas", "read_pickle"), ("numpy", "os.system"),
        ("torch", "load"), ("functools", "partial"), ("operator", "attrgetter"), ("importlib", "import_module"),
    ]),
    st.tuples(st.from_regex(r"[a-z_]{1,12}(\.[a-z]{1,8})?", fullmatch=True), st.from_regex(r"[A-Za-z_]{1,12}", fullmatch=True)),
)  # fmt: skip


def asks_for(module: str, name: str, way: str) -> bytes:
    """A pickle that calls module.name, by each of the ways in which a pickle can."""
    text = lambda value: b"X" + struct.pack("<I", len(value.encode())) + value.encode()  # noqa: E731
    named = f"{module}\n{name}\n".encode()
    calls = {
        "global": b"c" + named + b")R",
        "stack_global": text(module) + text(name) + b"\x93)R",
        "inst": b"(i" + named,
        "obj": b"(c" + named + b"o",
        "newobj": b"c" + named + b")\x81",
        "newobj_ex": b"c" + named + b")}\x92",
        "build": b"c" + named + b")\x81}(" + text("x") + b"K\x01ub",
        "in_a_list": b"](c" + named + b")Re",
    }
    return b"\x80\x04" + calls[way] + b"."


@QUICK
@given(names, st.sampled_from(["global", "stack_global", "inst", "obj", "newobj", "newobj_ex", "build", "in_a_list"]))
def test_pickles_reach_no_callable(asked: tuple[str, str], way: str) -> None:
    sys.modules["sentinel_module"] = sentinel
    hostile = asks_for(*asked, way)
    if asked == ("sentinel_module", "touch") and way in ("global", "stack_global", "inst", "obj"):
        called.clear()
        pickle.loads(hostile)
        assert called == ["touched"]  # the pickle does what it says where it is let
    called.clear()
    modules = set(sys.modules)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hostile.pkl"
        path.write_bytes(hostile)
        with pytest.raises(ValueError, match="cannot be read as a pickled DataFrame"):
            read_pickle(path)
    assert called == [] and not {
        name for name in set(sys.modules) - modules if name.split(".")[0] == asked[0].split(".")[0]
    }


# --- long -----------------------------------------------------------------------------------------------------


def test_two_hundred_cycles_do_not_grow(here: list[str]) -> None:
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
