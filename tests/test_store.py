"""The store: rows are taken over by their content, a part is whole or absent, and nothing half-written is taken."""

import errno
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from src import store
from src.artifacts import MANIFEST
from src.estimation import task_moments, token_weights
from src.store import StoreWriter, open_store
from tests.commands import refused

DIM = 4
FACTS = {"step": 1, "output_function": "loss"}


def writer(folder: Path, keys: Sequence[str], tasks: Sequence[str] = ("a", "b"), **request: object) -> StoreWriter:
    """Of rows with such keys, every third a target's, numbered with gaps."""
    ids, validation = np.arange(len(keys)) % len(tasks), np.arange(len(keys)) % 3 == 2
    numbers = np.arange(len(keys))
    samples = {"sample_index": 2 * numbers, "key": np.array(keys, "<U32"), "target_tokens": 1 + numbers % 5}
    samples |= {"task": np.where(validation, -1, ids), "target": np.where(validation, ids, -1)}
    names = {"tasks": tasks, "targets": tasks}
    return StoreWriter(folder, {"model_key": "m", "dim": DIM, **request}, samples, DIM, "Take them again.", 3, names)


def values_of(keys: Sequence[str]) -> tuple[np.ndarray, ...]:
    """What is computed for rows with such keys: rows, outputs, representations."""
    numbers = np.array([float(key) for key in keys])
    return np.outer(numbers, np.arange(1, DIM + 1)), -numbers, np.outer(numbers, np.ones(3))


def compute(of: StoreWriter, indices: np.ndarray) -> int:
    """Rows of these samples, two at a time; their number."""
    for pair in np.array_split(indices, -(-len(indices) // 2) or 1):
        of.write(pair, *values_of(of.samples["key"][np.searchsorted(of.samples["sample_index"], pair)]))
    return len(indices)


def run(folder: Path, keys: Sequence[str], tasks: Sequence[str] = ("a", "b"), shards: int = 0) -> int:
    """A whole run; how many rows it computed."""
    of = writer(folder, keys, tasks)
    if of.complete:
        return 0
    of.absorb()
    computed = 0
    for rank in range(shards):
        if len(own := of.missing()[rank::shards]):
            shard = of.shard(rank, own)
            computed += compute(shard, own)
            shard.flush()
    of.absorb()
    computed += compute(of, of.missing())
    of.finish(FACTS)
    return computed


def check(folder: Path, keys: Sequence[str], tasks: Sequence[str] = ("a", "b"), alone: bool = True) -> None:
    """The part is what one run from nothing makes, and nothing is beside it, but for a part of other rows."""
    (part,) = open_store(folder.parent, None, "")
    for found, expected in zip((part.rows, part.outputs, part.representations), values_of(keys), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert part.samples["key"].tolist() == list(keys) and part.manifest["tasks"] == part.targets == list(tasks)
    weights = token_weights(part.samples["target_tokens"], part.samples["task"] >= 0)
    moments = part.estimation_part()
    for kind, found in (("task", moments.train), ("target", moments.target)):
        groups = part.samples[kind]
        expected = task_moments(part.rows, part.outputs, groups, len(tasks), weights=weights)
        for name, value in vars(expected).items():
            np.testing.assert_array_equal(getattr(found, name), value)
    assert not alone or [path.name for path in folder.parent.iterdir()] == [folder.name]
    kept = {f"{name}.npy" for name in ("projected", "outputs", "representations")} | {"samples.npz", MANIFEST}
    assert {path.name for path in folder.iterdir() if "moments" not in path.name} - {"projection_signs.npz"} == kept


def text(numbers: Sequence[int]) -> list[str]:
    return [f"{number:032d}" for number in numbers]


OLD = text([1, 2, 3, 4, 5, 3, 7, 8])


CHANGES = [
    ([1, 2, 3, 4, 5, 3, 7, 8, 20, 21, 20], "ab", 2),  # added, one of them twice
    ([9, 1, 2, 3, 4, 5, 3, 7, 8], "ab", 1),  # in front: all others have other indices
    ([1, 2, 3, 7, 8], "ab", 0),  # dropped
    ([1, 2, 3, 4, 6, 3, 7, 8], "ab", 1),  # corrected
    ([1, 2, 3, 4, 5, 3, 7, 8], "az", 0),  # renamed
    ([8, 7, 3, 5, 4, 3, 2, 1], "ab", 0),
    ([1, 2, 3, 4, 5, 3, 7, 8], "abc", 0),  # other tasks
    ([30, 31, 32, 33], "ab", 4),  # nothing in common
]


@pytest.mark.parametrize("shards", [0, 2])
@pytest.mark.parametrize(("keys", "tasks", "computed"), CHANGES)
def test_rows_are_taken_over_by_their_content(keys, tasks, computed, shards, tmp_path):
    folder, keys, tasks = tmp_path / "store" / "step_step=1", text(keys), tuple(tasks)
    assert run(folder, OLD, shards=shards) == 7  # one is there twice
    check(folder, OLD)
    (folder / "projection_signs.npz").write_bytes(b"signs")
    begun = writer(folder, keys, tasks)
    assert begun.reused == sum(key in OLD for key in keys) and len(begun.missing()) == computed
    check(folder, OLD, alone=False)  # whole until the other is
    assert run(folder, keys, tasks, shards) == computed
    check(folder, keys, tasks)
    assert (folder / "projection_signs.npz").read_bytes() == b"signs"
    assert run(folder, keys, tasks) == 0 and writer(folder, keys, tasks).complete


def test_what_was_not_forced_to_disk_does_not_count(tmp_path, monkeypatch):
    """Flushed rows are resumed; others, and those whose flush failed, are computed again. A part that lacks any is refused."""
    folder = tmp_path / "store" / "step_step=1"
    first = writer(folder, OLD)
    compute(first, first.missing()[:2])
    first.flush()
    compute(first, first.missing()[:2])
    assert len(first.missing()) == 3 and writer(folder, OLD).missing().tolist() == [4, 6, 8, 12, 14]
    monkeypatch.setattr(np.memmap, "flush", lambda array: (_ for _ in ()).throw(OSError(errno.EIO, "no")))
    with pytest.raises(OSError):
        first.flush()
    monkeypatch.undo()
    resumed = writer(folder, OLD)
    assert resumed.missing().tolist() == [4, 6, 8, 12, 14] and resumed.reused == 0
    batches = [np.array([0, 2]), np.array([2, 4])]
    assert [batch.tolist() for batch in resumed.unfinished(batches)] == [[2, 4]]  # as a whole
    refused(r"model_key: found m, expected other\. Take them again", writer, folder, OLD, model_key="other")
    refused("5 of 8 rows are missing", resumed.finish, FACTS)
    refused("no projected gradients", open_store, folder.parent, None, "stage2.py", error=FileNotFoundError)
    monkeypatch.setattr(store, "FLUSH_SECONDS", 0)
    compute(resumed, resumed.missing()[:2])
    assert len(writer(folder, OLD).missing()) == 3  # flushed as time goes by
    assert run(folder, OLD) == 3
    check(folder, OLD)


@pytest.fixture
def no_sync(monkeypatch):
    """Nothing waits for the disk: no process really ends."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(np.memmap, "flush", lambda array: None)


def killed(action: Callable[[], object], at: int) -> bool:
    """Do it, and stop before its change number `at` of the file system; whether it was stopped."""
    changes = 0

    def counted(original: Callable) -> Callable:
        def change(*arguments: object, **options: object) -> object:
            nonlocal changes
            changes += 1
            if changes == at:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        return change

    with pytest.MonkeyPatch.context() as patch:
        places = [(os, "replace"), (shutil, "rmtree"), (Path, "unlink"), (Path, "mkdir"), (np.memmap, "flush")]
        for module, name in places:
            patch.setattr(module, name, counted(getattr(module, name)))
        try:
            action()
        except KeyboardInterrupt:
            return True
    return False


@pytest.mark.parametrize(("shards", "back"), [(0, False), (0, True), (2, False)])
@pytest.mark.usefixtures("no_sync")
def test_killed_before_each_change_of_a_folder(shards, back, tmp_path):
    """While a part is replaced by one of other rows: the next run, of either rows, gets there and computes no more."""
    new = text([9, 1, 2, 3, 20, 21])
    for at in range(1, 1000):
        folder = tmp_path / str(at) / "step_step=1"
        run(folder, OLD)
        if not killed(lambda: run(folder, new, shards=shards), at):  # noqa: B023
            break
        if back:
            assert run(folder, OLD) <= 4
            check(folder, OLD, alone=False)
        assert run(folder, new, shards=shards) <= 3
        check(folder, new)
    assert at > 10


@pytest.mark.usefixtures("no_sync")
def test_killed_again_and_again_while_data_change(tmp_path):
    rng, folder = random.Random(0), tmp_path / "store" / "step_step=1"
    for _ in range(40):
        keys = text([rng.randrange(12) for _ in range(rng.randrange(4, 12))])
        for _ in range(rng.randrange(3)):
            killed(lambda: run(folder, keys, shards=rng.randrange(3)), rng.randrange(1, 40))  # noqa: B023
        run(folder, keys, shards=rng.randrange(3))
        check(folder, keys, alone=False)


def test_room_is_taken_at_once(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="the rows need 256 bytes") as caught:
        writer(tmp_path / "store" / "x", OLD)
    assert caught.value.errno == errno.ENOSPC and not list((tmp_path / "store").iterdir())
    monkeypatch.undo()
    path = writer(tmp_path / "store" / "x", text(range(9000))).partial / "projected.npy"
    assert path.stat().st_blocks * 512 >= path.stat().st_size  # no holes


def test_parts_of_other_rows_or_with_damaged_files_are_refused(tmp_path):
    for step, keys in ((1, OLD), (2, OLD[::-1])):
        run(tmp_path / f"step_step={step}", keys)
    refused("rows_fingerprint: found", open_store, tmp_path, None, "")
    assert len(open_store(tmp_path, ["step_step=1.ckpt"], "")) == 1
    for name in ("projected.npy", "outputs.npy", "samples.npz", MANIFEST):
        folder = shutil.copytree(tmp_path / "step_step=1", tmp_path / "damaged" / name)
        (folder / name).write_bytes((folder / name).read_bytes()[:-8])
        refused(rf"{name} is damaged", open_store, folder.parent, [name], "")
        (folder / name).unlink()
        refused(name, open_store, folder.parent, [name], "", error=FileNotFoundError)


def test_moments_of_other_rows_or_groups_are_made_anew(tmp_path):
    run(tmp_path / "step_step=1", OLD), run(tmp_path / "other" / "x", OLD[::-1])
    (part,) = open_store(tmp_path, ["step_step=1"], "")
    expected, path = part.estimation_part(), part.folder / "moments_tasks.npz"
    damaged = path.read_bytes()[:100]
    for spoil in (
        lambda: shutil.copy(tmp_path / "other" / "x" / path.name, path),
        lambda: path.write_bytes(damaged),
        lambda: part.estimation_part(np.zeros(len(OLD), int), 1),  # under the same name
    ):
        spoil()
        for name, values in vars(part.estimation_part().train).items():
            np.testing.assert_array_equal(values, getattr(expected.train, name))
