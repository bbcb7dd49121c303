"""`TaskData`: the rows of a run, whatever their format.

A row's position keys everything that later stages write about it. Rows are read afresh from the user's files on every
run; their texts stay in a memory-mapped temporary file. Shapes: N rows, n tasks, k targets.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import mmap
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from src.artifacts import atomic_write, shorten
from src.console import say_once

HELD_OUT = ("validation", "test")
SPLITS = ("train", *HELD_OUT)
LEFT_OUT = "left out"
"""In place of a split: a row that nothing is trained or evaluated on."""
TEXT = pa.large_string()


@dataclass(frozen=True)
class Example:
    """One row. The prompt is not part of the loss unless asked for; the completion is."""

    sample_index: int  # position in TaskData.examples; rows on disk are keyed by it
    task: str  # source task of a training row, target of a validation or test row
    split: str  # one of SPLITS, or LEFT_OUT
    prompt: str
    completion: str
    record_index: int | None = None  # chain of thought: the data set's own sample_index
    answer: str | None = None  # chain of thought: the cleaned gold answer


def store_rows(rows: Iterable[Sequence[Any]], schema: pa.Schema) -> pa.Table:
    """Write rows to an anonymous temporary file (below `TMPDIR`, deleted with the process) and memory-map it."""
    rows = iter(rows)
    with tempfile.TemporaryFile() as file:
        with pa.ipc.new_file(file, schema) as writer:
            while block := list(itertools.islice(rows, 4096)):
                columns = zip(schema.types, zip(*block, strict=True), strict=True)
                writer.write_batch(pa.record_batch([pa.array(values, kind) for kind, values in columns], schema))
        file.flush()
        return pa.ipc.open_file(pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))).read_all()


class StoredExamples(Sequence[Example]):
    """Examples made on access from an Arrow table, (N,), whose columns are fields of `Example` but `sample_index`."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def with_columns(self, **columns: Sequence[str]) -> StoredExamples:
        """The same rows with some text columns, (N,), replaced."""
        rest = dict(zip(self.table.column_names, self.table.columns, strict=True))
        return StoredExamples(pa.table(rest | {name: pa.array(values, TEXT) for name, values in columns.items()}))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [self[index] for index in range(len(self))[position]]
        position = range(len(self))[position]
        return Example(position, **{name: self.table[name][position].as_py() for name in self.table.column_names})

    def __iter__(self) -> Iterator[Example]:
        rows = (row for block in self.table.to_batches(max_chunksize=4096) for row in block.to_pylist())
        return (Example(position, **row) for position, row in enumerate(rows))


@dataclass(eq=False)
class TaskData:
    """All examples of a run, what to tell the user about them, and whose answer rule applies."""

    examples: Sequence[Example]
    notices: tuple[str, ...] = ()  # one-line messages for the script to print
    answer_key: str | None = None  # chain of thought: the dataset_key that decides how answers are read
    judge: Callable[[str, str], dict[str, bool]] | None = None  # (completion, gold answer) -> its properties
    # (N,) conversations that texts were made of, JSON; null where there was none
    messages: pa.ChunkedArray | None = None
    tasks: tuple[str, ...] = field(init=False)  # (n,) sorted names of tasks with training rows; a position is a task id
    targets: tuple[str, ...] = field(init=False)  # (k,) sorted names of tasks with held-out rows
    task_of_sample: np.ndarray = field(init=False)  # (N,) int32 task id of training rows, -1 elsewhere
    target_of_sample: np.ndarray = field(init=False)  # (N,) int32 position in targets of held-out rows, -1 elsewhere

    def __post_init__(self) -> None:
        if isinstance(self.examples, StoredExamples):
            self._table = self.examples.table
        else:
            kinds = [(f.name, pa.int64() if f.name == "record_index" else TEXT) for f in fields(Example)[1:]]
            self._table = pa.Table.from_pylist([vars(example) for example in self.examples], pa.schema(kinds))
        self.tasks, self.task_of_sample = self._numbered("train")
        self.targets, self.target_of_sample = self._numbered(*HELD_OUT)

    def __len__(self) -> int:
        return len(self.examples)

    def _numbered(self, *splits: str) -> tuple[tuple[str, ...], np.ndarray]:
        """Sorted names of the tasks in some splits, and each row's position among them, -1 in other splits."""
        chosen = pc.is_in(self._table["split"], pa.array(splits, TEXT))
        tasks = pc.if_else(chosen, self._table["task"], pa.scalar(None, TEXT))
        names = sorted(tasks.unique().drop_null().to_pylist())
        ids = pc.index_in(tasks, pa.array(names, TEXT)).fill_null(-1)
        return tuple(names), ids.to_numpy().astype(np.int32)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over every field of every example, in order."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(json.dumps(list(vars(example).values())).encode() + b"\n")
        return digest.hexdigest()

    def with_tasks(self, task_of: Mapping[int, str]) -> TaskData:
        """The same rows with other tasks for the training rows: sample index -> task; those without one are left out."""
        tasks, splits = (self._table[name].to_pylist() for name in ("task", "split"))
        for row, split in enumerate(splits):
            if split == "train":
                tasks[row], splits[row] = task_of.get(row, tasks[row]), split if row in task_of else LEFT_OUT
        return replace(self, examples=StoredExamples(self._table).with_columns(task=tasks, split=splits))

    def where(self, sample_index: int) -> str:
        """Task and split of a sample, for messages."""
        example = self.examples[sample_index]
        return f"{example.split} row of task {example.task}: {shorten(example.prompt.strip(), 40)!r}"

    def indices(self, split: str, tasks: Iterable[int] | None = None) -> np.ndarray:
        """Ascending sample indices of a split, (.,) int64; of "train" optionally only those of some task ids."""
        if split not in SPLITS or (tasks is not None and split != "train"):
            raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}, and task ids for train only")
        if tasks is None:
            return np.flatnonzero(pc.equal(self._table["split"], split))
        task_ids = [int(task) for task in tasks]
        if strangers := [task for task in task_ids if not 0 <= task < len(self.tasks)]:
            raise ValueError(f"task ids {strangers}: expected ids from 0 to {len(self.tasks) - 1}")
        return np.flatnonzero(np.isin(self.task_of_sample, task_ids))


# --- stable splits ------------------------------------------------------------------------------------------


def key_digest(key: str) -> bytes:
    """SHA-256 of a split key, by which keys are ranked."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def stable_sides(
    keys_of_task: Mapping[str, Iterable[bytes]],
    quotas: Callable[[int], tuple[int, int]],
    decided: Mapping[bytes, str] | None = None,
) -> dict[bytes, str]:
    """One side for each key (of `key_digest`), the same in every task that has it, whatever the order of rows and tasks.

    Task by task, the smallest first, keys are taken in the order of their digests: until the task has its quota in
    validation, then in test; the rest trains. Keys that an earlier task `decided` count. `quotas` says how many of a
    task's n distinct keys validate and test.
    """
    sides, tasks = dict(decided or {}), {task: set(keys) for task, keys in keys_of_task.items()}
    for _, keys in sorted(tasks.items(), key=lambda item: (len(item[1]), item[0])):
        free = iter(sorted(keys - sides.keys()))
        for side, quota in zip(HELD_OUT, quotas(len(keys)), strict=True):
            there = sum(sides.get(key) == side for key in keys)
            sides |= dict.fromkeys(itertools.islice(free, max(0, quota - there)), side)
        sides |= dict.fromkeys(free, "train")
    return sides


def heldout_quotas(share: float, most: int, test_share: float | None = None) -> Callable[[int], tuple[int, int]]:
    """How many of a task's n distinct keys validate and test: these shares of them, at most `most`, and from three keys on
    at least one where the share is above zero; below three, all train."""
    shares = (share, share if test_share is None else test_share)
    if min(*shares, most) < 0 or sum(shares) >= 1:
        found = f"held-out shares {shares[0]} and {shares[1]}, at most {most} keys"
        raise ValueError(f"{found}: none may be negative, and the shares must add up to less than 1")

    def quotas(n: int) -> tuple[int, int]:
        validation, test = (min(max(1, int(part * n)), most) if part > 0 and n >= 3 else 0 for part in shares)
        return validation, test

    return quotas


def stable_split(
    keys: Sequence[str], heldout_share: float, max_heldout: int, test_share: float | None = None
) -> list[str]:
    """Split of each row of one task by `stable_sides`, with the quotas of `heldout_quotas`."""
    digests = list(map(key_digest, keys))
    sides = stable_sides({"": digests}, heldout_quotas(heldout_share, max_heldout, test_share))
    return [sides[digest] for digest in digests]


# --- fields of records ----------------------------------------------------------------------------------------


def require_file(path: Path, cure: str = "check the name") -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {cure}")
    return path


@contextlib.contextmanager
def unchanged(path: Path) -> Iterator[None]:
    """ValueError, whatever else went wrong, where a file does not stay as it is in the block."""

    def stamp() -> tuple[int, int] | None:
        return ((found := path.stat()).st_size, found.st_mtime_ns) if path.exists() else None

    before, error = stamp(), None
    try:
        yield
    except Exception as raised:
        error = raised
    if stamp() != before:
        raise ValueError(f"{path} was changed while it was read; run the command again when it is complete") from error
    if error:
        raise error


def is_missing(value: Any) -> bool:
    """Whether a field is empty: null, or what frames write for it."""
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def text_field(record: Mapping, field: str, where: str, allow_empty: bool = False) -> str:
    """The text in a field of a record, or one error that says where it should have been."""
    record = record if isinstance(record, Mapping) else {}
    value = record.get(field)
    if not isinstance(value, str) or not (allow_empty or value.strip()):
        found = f"{field} is {shorten(repr(value))}" if field in record else f"there is no field {field!r}"
        raise ValueError(f"{where}: {found}, expected {'text' if allow_empty else 'text that is not empty'}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = f"half a character ({value[error.start]!r}, a lone surrogate, as in text that was cut)"
        raise ValueError(f"{where}: {field} holds {found}; correct the row or leave it out") from error
    return value


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a cached .npz; None where there is none, or with a notice where its checksums find damage."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except OSError:
        raise
    except Exception as error:  # damage can make the zip reader raise anything
        say_once(f"note: {path} is damaged ({type(error).__name__}: {error}); it is made anew.")
        return None


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write a .npz as `read_arrays` reads it, atomically."""
    with atomic_write(path) as temporary:
        np.savez(temporary, **arrays)
