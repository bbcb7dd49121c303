"""Where the instruction track's examples come from: FLAN-layout jsonl and Alpaca-layout pickles."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from src.data import SPLITS, Example, TaskData, require_file, stable_ranks, stable_split, text_field
from src.frames import read_pickle
from src.paths import shorten


def _halves(keys: Sequence[str]) -> list[str]:
    """Validation or test for each row, half of the distinct keys each; an odd one validates."""
    ranks = stable_ranks(keys)
    return ["validation" if 2 * ranks[key] < len(ranks) else "test" for key in keys]


class _Row(NamedTuple):
    where: str  # file and line or row, for messages
    task: str
    prompt: str
    completion: str
    split: str | None  # None: still to be chosen

    @property
    def key(self) -> str:
        """What identifies a row in a split: its prompt, or its completion when it has none."""
        return self.prompt if self.prompt.strip() else self.completion


def _flan_row(record: Mapping, task_field: str, where: str) -> _Row:
    """A row with FLAN's fields; its prompt is ended so that the answer can follow (section 13)."""
    split = record.get("_split")
    if split is not None and split not in SPLITS and split == split:  # a frame's missing value is no equal of itself
        raise ValueError(f"{where}: _split is {split!r}, expected one of {', '.join(SPLITS)}")
    prompt = text_field(record, "inputs", where, allow_empty=True)
    if not prompt.endswith("\n") and not prompt.rstrip().endswith(":"):
        prompt += "\n"
    completion, task = text_field(record, "targets", where), text_field(record, task_field, where)
    return _Row(where, task, prompt, completion, split if split in SPLITS else None)


def _jsonl_rows(path: Path) -> Iterator[_Row]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                record = json.loads(line.decode("utf-8")) if line.strip() else None
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise ValueError(f"{where} is not JSON in UTF-8 ({error}); expected one object per line") from error
            if isinstance(record, dict):
                yield _flan_row(record, "_task_name", where)
            elif line.strip():
                raise ValueError(f"{where} holds {shorten(record)}, expected an object with inputs and targets")


def _frame_rows(path: Path, use_dev_map: bool, notices: list[str]) -> Iterator[_Row]:
    """Rows of a pickled frame (section 13), with the splits of its dev split map if there is one."""
    frame = read_pickle(path)
    columns = set(frame.columns) if isinstance(frame, pd.DataFrame) else set()
    if not columns >= {"skill", "text"}:
        raise ValueError(
            f"{path} holds {f'the columns {sorted(map(str, columns))}' if columns else 'no columns'}, expected a "
            "DataFrame with the columns skill and text"
        )
    has_output = columns >= {"instruction", "input", "output"}
    rows: dict[int, _Row] = {}
    num_empty = num_whole = 0
    for position, (label, record) in enumerate(zip(frame.index, frame.to_dict("records"), strict=True)):
        where = f"{path}, row {position + 1} (index label {label!r})"
        if columns >= {"inputs", "targets"}:
            rows[position] = _flan_row(record, "skill", where)
            continue
        task, text = text_field(record, "skill", where), text_field(record, "text", where)
        output = text_field(record, "output", where, allow_empty=True) if has_output else ""
        if has_output and not output.strip():  # the public Alpaca file has some such rows
            num_empty += 1
            continue
        prompt = text.removesuffix(output) if output and text.endswith(output) else ""
        num_whole += not prompt
        rows[position] = _Row(where, task, prompt, text[len(prompt) :], None)
    if num_empty:
        notices.append(f"{path}: {num_empty:,} of {len(frame):,} rows have an empty output and are left out")
    if num_whole:
        notices.append(
            f"{path}: the prompt cannot be told from the answer in {num_whole:,} of {len(frame):,} rows; there the "
            "loss is on the whole text"
        )
    splits = _dev_map_splits(path, frame, rows) if use_dev_map else {}
    yield from (row._replace(split=splits.get(position, row.split)) for position, row in rows.items())


def _dev_map_splits(path: Path, frame: pd.DataFrame, rows: Mapping[int, _Row]) -> dict[int, str]:
    """Split of each row position, from a dev split map beside the file; empty when there is none.

    The map alone decides: a training row may repeat the prompt of a held-out one, as in the published files.
    """
    stems = (path.stem, path.stem.removesuffix("_final"))
    maps = [path.with_name(f"{stem}_dev_split_map.pkl") for stem in stems]
    map_path = next((candidate for candidate in maps if candidate.is_file()), None)
    if map_path is None:
        return {}
    dev_map, positions = read_pickle(map_path), {label: place for place, label in enumerate(frame.index)}
    if not isinstance(dev_map, dict) or len(positions) < len(frame) or "_split" in frame.columns:
        raise ValueError(
            f"{map_path} must hold a dict from skill to index labels, and {path} index labels that do not repeat "
            "and no column _split; correct them, or remove the map to have the rows split by their prompts"
        )
    splits, skills = dict.fromkeys(rows, "train"), frame["skill"].tolist()
    for skill, labels in dev_map.items():
        for label in labels:
            if label not in positions or skills[positions[label]] != skill:
                raise ValueError(
                    f"{map_path} holds out row {label!r} of skill {skill!r}, but {path} has no such row of that "
                    "skill; the map belongs to another file: replace it, or remove it to split by prompts"
                )
        heldout = [positions[label] for label in labels if positions[label] in rows]
        splits |= zip(heldout, _halves([rows[place].key for place in heldout]), strict=True)
    return splits


def _read_rows(files: Sequence[str | Path], use_dev_map: bool, notices: list[str]) -> list[_Row]:
    """Rows of all files, in the order of the files and of the rows in them."""
    rows: list[_Row] = []
    for path in map(Path, files):
        if path.suffix not in (".jsonl", ".pkl"):
            raise ValueError(f"{path}: instruction data are read from .jsonl and .pkl files")
        require_file(path)
        found = list(_jsonl_rows(path) if path.suffix == ".jsonl" else _frame_rows(path, use_dev_map, notices))
        if not found:
            raise ValueError(f"{path} is empty: no row could be taken from it")
        rows += found
    return rows


def _split_rows(rows: list[_Row], split: Callable[[list[str]], list[str]]) -> list[_Row]:
    """Give every row a split: its own, or for tasks without one by `split(keys)`, task by task."""
    positions_of_task: dict[str, list[int]] = {}
    for position, row in enumerate(rows):
        positions_of_task.setdefault(row.task, []).append(position)
    divided = list(rows)
    for task, positions in positions_of_task.items():
        members = [rows[position] for position in positions]
        given, bare = [row for row in members if row.split], [row for row in members if not row.split]
        if given and bare:
            raise ValueError(
                f"task {task!r}: {bare[0].where} has no split of its own, but {given[0].where} has one (a field "
                "_split or a dev split map); give one to all rows of a task, or to none"
            )
        sides = [row.split for row in given] or split([row.key for row in members])
        if "test" in sides and "validation" not in sides:
            raise ValueError(f"task {task!r} ({members[0].where}) has test rows but no validation rows")
        for position, side in zip(positions, sides, strict=True):
            divided[position] = rows[position]._replace(split=side)
    return divided


def load_instruction(
    data_files: Sequence[str | Path],
    target_files: Sequence[str | Path] = (),
    heldout_share: float = 0.1,
    max_heldout: int = 50,
) -> TaskData:
    """Instruction data from FLAN-style `.jsonl` and Alpaca-style `.pkl` files (section 13).

    A task's rows are divided by `stable_split` over their prompts, unless they say it themselves: in a field
    `_split`, or by a dev split map beside a pickle, whose rows are halved into validation and test. Tasks of
    `target_files` are targets only: half validation, half test, or as `_split` says; dev split maps beside those
    files are not consulted.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: with file and line or row, what was found and what was expected.
    """
    notices: list[str] = []
    rows = _split_rows(
        _read_rows(data_files, True, notices), lambda keys: stable_split(keys, heldout_share, max_heldout)
    )
    target_rows = _split_rows(_read_rows(target_files, False, notices), _halves)
    sources = {row.task for row in rows}
    for row in target_rows:
        if row.task in sources or row.split == "train":
            reason = "is a task of the training data too" if row.task in sources else "has _split train"
            raise ValueError(f"{row.where}: target {row.task!r} {reason}; tasks of target files are never trained on")
    if not any(row.split == "train" for row in rows):
        raise ValueError(f"no training rows in {', '.join(map(str, data_files)) or 'an empty list of data files'}")
    if bare := sorted(sources - {row.task for row in rows if row.split == "validation"}):
        notices.append(
            f"{len(bare)} of {len(sources)} tasks have no held-out rows (too few distinct prompts, or nothing in "
            f"the dev split map) and are no targets: {shorten(', '.join(bare), 200)}"
        )
    examples = (Example(i, r.task, r.split, r.prompt, r.completion) for i, r in enumerate(rows + target_rows))
    return TaskData(tuple(examples), tuple(notices))
