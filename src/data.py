"""The rows of a run, whatever they come from.

Both tracks end in one `TaskData`: a flat tuple of `Example`s, whose positions key every row that later stages
write. Rows are compiled afresh from the user's files on every run; nothing is cached beside them, because a cache
that does not look at its sources goes stale. Held-out rows are chosen by hashing their text, so every process
chooses the same ones.

Texts may be more than fits into memory: `store_texts` leaves them in a temporary file.

Shapes: N samples, n tasks, k targets.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import mmap
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from src.artifacts import shorten

HELD_OUT = ("validation", "test")
SPLITS = ("train", *HELD_OUT)
LEFT_OUT = "left out"
"""In place of a split: a row that nothing is trained or evaluated on."""


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


def store_texts(rows: Iterable[tuple[str, str]]) -> pa.Table:
    """Prompts and completions, (N, 2), for `StoredExamples`: memory-mapped from a temporary file (below `TMPDIR`) without
    a name, which is gone with the process."""
    schema, rows = pa.schema({"prompt": pa.large_string(), "completion": pa.large_string()}), iter(rows)
    with tempfile.TemporaryFile() as file:
        with pa.ipc.new_file(file, schema) as writer:
            while block := list(itertools.islice(rows, 4096)):
                writer.write_batch(
                    pa.record_batch([pa.array(texts, pa.large_string()) for texts in zip(*block, strict=True)], schema)
                )
        file.flush()
        return pa.ipc.open_file(pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))).read_all()


class StoredExamples(Sequence[Example]):
    """Examples made on access from texts in an Arrow table, which may be a file's: no text is held.

    Args:
        texts: Columns `prompt` and `completion`, N rows.
        tasks: Task of each row.
        splits: Split of each row, of `SPLITS`.
    """

    def __init__(self, texts: pa.Table, tasks: Sequence[str], splits: Sequence[str]) -> None:
        self.texts, self.tasks, self.splits = texts, list(tasks), list(splits)

    def __len__(self) -> int:
        return len(self.tasks)

    @overload
    def __getitem__(self, position: int) -> Example: ...

    @overload
    def __getitem__(self, position: slice) -> list[Example]: ...

    def __getitem__(self, position: int | slice) -> Example | list[Example]:
        if isinstance(position, slice):
            return [self[index] for index in range(*position.indices(len(self)))]
        position = range(len(self))[position]
        prompt, completion = (column[position].as_py() for column in self.texts.columns)
        return Example(position, self.tasks[position], self.splits[position], prompt, completion)

    def __iter__(self) -> Iterator[Example]:
        position = 0
        for block in self.texts.to_batches(max_chunksize=4096):
            for prompt, completion in zip(*(column.to_pylist() for column in block.columns), strict=True):
                yield Example(position, self.tasks[position], self.splits[position], prompt, completion)
                position += 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(Example.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]  # of a sequence that is compared by its content


@dataclass(frozen=True)
class TaskData:
    """All examples of a run, what to tell the user about them, and whose answer rule applies.

    Raises:
        ValueError: an example's `sample_index` is not its position, or its split is unknown.
    """

    examples: tuple[Example, ...] | StoredExamples
    notices: tuple[str, ...] = ()  # one-line messages for the script to print
    answer_key: str | None = None  # chain of thought: the dataset_key that decides how answers are read
    judge: Callable[[str, str], dict[str, bool]] | None = None  # (completion, gold answer) -> its properties

    def __post_init__(self) -> None:
        if isinstance(self.examples, StoredExamples):  # made with their positions
            return
        for position, example in enumerate(self.examples):
            if example.sample_index != position or example.split not in (*SPLITS, LEFT_OUT):
                raise ValueError(
                    f"example {position} has sample_index {example.sample_index} and split {example.split!r}, "
                    f"expected its own position and one of {', '.join(SPLITS)}"
                )

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def _columns(self) -> tuple[Sequence[str], np.ndarray]:
        """Task of each row, and its position in `SPLITS`, (N,)."""
        if isinstance(self.examples, StoredExamples):
            tasks, splits = self.examples.tasks, self.examples.splits
        else:
            tasks, splits = ([getattr(e, field) for e in self.examples] for field in ("task", "split"))
        return tasks, np.fromiter(map((*SPLITS, LEFT_OUT).index, splits), np.int8, count=len(tasks))

    def _names(self, training: bool) -> tuple[str, ...]:
        tasks, chosen = self._columns[0], self._side(training)
        return tuple(sorted({tasks[row] for row in np.flatnonzero(chosen).tolist()}))

    def _side(self, training: bool) -> np.ndarray:
        """Which rows are training rows, or held out, (N,) bool."""
        return np.isin(self._columns[1], [SPLITS.index(split) for split in (("train",) if training else HELD_OUT)])

    def _ids(self, training: bool) -> np.ndarray:
        """Position of each row's task among `tasks` or `targets`, -1 for the rows of the other kind."""
        ids = {name: position for position, name in enumerate(self.tasks if training else self.targets)}
        tasks, _ = self._columns
        of_row = np.fromiter((ids.get(task, -1) for task in tasks), np.int32, count=len(tasks))
        return np.where(self._side(training), of_row, -1).astype(np.int32)

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """(n,) sorted names of tasks with training rows; a task id is a position here."""
        return self._names(training=True)

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """(k,) sorted names of tasks with held-out rows (validation rows, unless nothing was to be held out)."""
        return self._names(training=False)

    @cached_property
    def task_of_sample(self) -> np.ndarray:
        """(N,) int32 task id of training rows, -1 elsewhere."""
        return self._ids(training=True)

    @cached_property
    def target_of_sample(self) -> np.ndarray:
        """(N,) int32 position in `targets` of validation and test rows, -1 for other rows."""
        return self._ids(training=False)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over every field of every example, in order."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(json.dumps(list(vars(example).values())).encode() + b"\n")
        return digest.hexdigest()

    def with_tasks(self, task_of: Mapping[int, str]) -> TaskData:
        """The same rows with other tasks for the training rows: sample index -> task; those without one are left out."""
        rows = [
            (e.task, e.split)
            if e.split != "train"
            else (task_of.get(row, e.task), "train" if row in task_of else LEFT_OUT)
            for row, e in enumerate(self.examples)
        ]
        if isinstance(self.examples, StoredExamples):
            return replace(self, examples=StoredExamples(self.examples.texts, *zip(*rows, strict=True)))
        changed = (replace(e, task=task, split=split) for e, (task, split) in zip(self.examples, rows, strict=True))
        return replace(self, examples=tuple(changed))

    def where(self, sample_index: int) -> str:
        """Task and split of a sample, for messages."""
        example = self.examples[sample_index]
        return f"{example.split} row of task {example.task}: {shorten(example.prompt.strip(), 40)!r}"

    def indices(self, split: str, tasks: Iterable[int] | None = None) -> np.ndarray:
        """Ascending sample indices of a split, (.,) int64; of "train" optionally only those of some task ids.

        Raises:
            ValueError: unknown split, task ids for a split other than "train", or a task id out of range.
        """
        if split not in SPLITS or (tasks is not None and split != "train"):
            raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}, and task ids for train only")
        chosen = self._columns[1] == SPLITS.index(split)
        if tasks is not None:
            task_ids = [int(task) for task in tasks]
            if strangers := [task for task in task_ids if not 0 <= task < len(self.tasks)]:
                raise ValueError(f"task ids {strangers}: expected ids from 0 to {len(self.tasks) - 1}")
            chosen &= np.isin(self.task_of_sample, task_ids)
        return np.flatnonzero(chosen)


# --- stable splits ------------------------------------------------------------------------------------------


def key_digest(key: str) -> bytes:
    """What a row's key is ranked by, in the place of the key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def stable_sides(
    keys_of_task: Mapping[str, Iterable[bytes]],
    quotas: Callable[[int], tuple[int, int]],
    decided: Mapping[bytes, str] | None = None,
) -> dict[bytes, str]:
    """One side for each key, the same in every task that has it.

    Task by task, the smallest first, keys are taken in the order of their digests: until the task has its quota in
    validation, then in test; the rest trains. Keys that an earlier task decided count. The order of rows and tasks
    changes nothing.

    Args:
        keys_of_task: The distinct keys of each task, as `key_digest` gives them.
        quotas: Number of a task's distinct keys -> how many validate and how many test.
        decided: Sides of keys that are held out already.
    """
    sides = dict(decided or {})
    for _, keys in sorted(
        ((task, set(keys)) for task, keys in keys_of_task.items()), key=lambda item: (len(item[1]), item[0])
    ):
        free = iter(sorted(keys - sides.keys()))
        for side, quota in zip(HELD_OUT, quotas(len(keys)), strict=True):
            there = sum(sides.get(key) == side for key in keys)
            sides |= dict.fromkeys(itertools.islice(free, max(0, quota - there)), side)
        sides |= dict.fromkeys(free, "train")
    return sides


def heldout_quotas(share: float, most: int, test_share: float | None = None) -> Callable[[int], tuple[int, int]]:
    """How many of a task's n distinct keys validate and test: these shares of them, at most `most`. From three keys on,
    a share above zero holds out at least one key; below three, all rows train.

    Raises:
        ValueError: a share below zero, shares that leave nothing to train on, or a negative `most`.
    """
    shares = (share, share if test_share is None else test_share)
    if min(*shares, most) < 0 or sum(shares) >= 1:
        raise ValueError(
            f"held-out shares {shares[0]} and {shares[1]}, at most {most} keys: none may be negative, and the shares must "
            "add up to less than 1"
        )

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


# --- reading, with one clear error ----------------------------------------------------------------------------


def require_file(path: Path, cure: str = "check the name") -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {cure}")
    return path


def is_missing(value: Any) -> bool:
    """Whether a field holds nothing: null, or what frames write for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def text_field(record: Mapping, field: str, where: str, allow_empty: bool = False) -> str:
    """The text in a field of a record, or one error that says where it should have been."""
    record = record if isinstance(record, Mapping) else {}
    value = record.get(field)
    if not isinstance(value, str) or not (allow_empty or value.strip()):
        found = f"{field} is {shorten(repr(value))}" if field in record else f"there is no field {field!r}"
        raise ValueError(f"{where}: {found}, expected {'text' if allow_empty else 'text that is not empty'}")
    require_unicode(value, f"{where}: {field}")
    return value


def require_unicode(text: str, what: str) -> None:
    """Refuse half a surrogate pair, which JSON can spell and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} holds half a character ({text[error.start]!r}, a lone surrogate, as in text that was cut); correct "
            "the row or leave it out"
        ) from error
