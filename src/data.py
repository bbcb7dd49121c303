"""Where examples come from, and how a completion is judged.

Both tracks end in one `TaskData`: a flat tuple of `Example`s, whose positions key every row that later stages
write. Rows are compiled afresh from the user's files on every run; nothing is cached beside them, because a cache
that does not look at its sources goes stale. Held-out rows are chosen by hashing their text, so every process
chooses the same ones. Section numbers refer to the description of the file formats.

Shapes: N samples, n tasks, k targets.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from src.paths import DATA, SAVED, shorten, write_json

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    """One row. The prompt is not part of the loss unless asked for; the completion is."""

    sample_index: int  # position in TaskData.examples; rows on disk are keyed by it
    task: str  # source task of a training row, target of a validation or test row
    split: str  # one of SPLITS
    prompt: str
    completion: str
    record_index: int | None = None  # chain of thought: the data set's own sample_index
    answer: str | None = None  # chain of thought: the cleaned gold answer


@dataclass(frozen=True)
class TaskData:
    """All examples of a run, what to tell the user about them, and whose answer rule applies.

    Raises:
        ValueError: an example's `sample_index` is not its position, or its split is unknown.
    """

    examples: tuple[Example, ...]
    notices: tuple[str, ...] = ()  # one-line messages for the script to print
    answer_key: str | None = None
    judge: Callable[[str, str], dict[str, bool]] | None = (
        None  # (completion, gold) -> properties  # the dataset_key that decides how answers are read; None for instruction
    )

    def __post_init__(self) -> None:
        for position, example in enumerate(self.examples):
            if example.sample_index != position or example.split not in SPLITS:
                raise ValueError(
                    f"example {position} has sample_index {example.sample_index} and split {example.split!r}, "
                    f"expected its own position and one of {', '.join(SPLITS)}"
                )

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """(n,) sorted names of tasks with training rows; a task id is a position here."""
        return tuple(sorted({example.task for example in self.examples if example.split == "train"}))

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """(k,) sorted names of tasks with held-out rows (validation rows, unless nothing was to be held out)."""
        return tuple(sorted({example.task for example in self.examples if example.split != "train"}))

    @cached_property
    def task_of_sample(self) -> np.ndarray:
        """(N,) int32 task id of training rows, -1 elsewhere."""
        ids = {name: task_id for task_id, name in enumerate(self.tasks)}
        return np.array([ids[e.task] if e.split == "train" else -1 for e in self.examples], dtype=np.int32)

    @cached_property
    def target_of_sample(self) -> np.ndarray:
        """(N,) int32 position in `targets` of validation and test rows, -1 for training rows."""
        ids = {name: position for position, name in enumerate(self.targets)}
        return np.array([-1 if e.split == "train" else ids[e.task] for e in self.examples], dtype=np.int32)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over every field of every example, in order."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(json.dumps(list(vars(example).values())).encode() + b"\n")
        return digest.hexdigest()

    def indices(self, split: str, tasks: Iterable[int] | None = None) -> np.ndarray:
        """Ascending sample indices of a split, (.,) int64; of "train" optionally only those of some task ids.

        Raises:
            ValueError: unknown split, task ids for a split other than "train", or a task id out of range.
        """
        if split not in SPLITS or (tasks is not None and split != "train"):
            raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}, and task ids for train only")
        chosen = np.array([example.split == split for example in self.examples], dtype=bool)
        if tasks is not None:
            task_ids = [int(task) for task in tasks]
            if strangers := [task for task in task_ids if not 0 <= task < len(self.tasks)]:
                raise ValueError(f"task ids {strangers}: expected ids from 0 to {len(self.tasks) - 1}")
            chosen &= np.isin(self.task_of_sample, task_ids)
        return np.flatnonzero(chosen)


# --- stable splits ------------------------------------------------------------------------------------------


def _ranks(keys: Sequence[str]) -> dict[str, int]:
    """Rank of each distinct key by its sha256: the same in any process and for any row order."""
    ranked = sorted(set(keys), key=lambda key: hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest())
    return {key: rank for rank, key in enumerate(ranked)}


def stable_split(
    keys: Sequence[str], heldout_share: float, max_heldout: int, test_share: float | None = None
) -> list[str]:
    """Split of each row, decided by its key: equal keys fall on the same side, row order is irrelevant.

    Distinct keys are ranked by sha256; the first share validates, the next tests, the rest trains. From three
    distinct keys on, a share above zero holds out at least one key; below three, all rows train.

    Args:
        keys: What identifies a row, usually its prompt.
        heldout_share: Share of the distinct keys that validates.
        max_heldout: Most keys in validation, and most in test.
        test_share: Share of the distinct keys that tests; as `heldout_share` unless given.

    Raises:
        ValueError: a share below zero, shares that leave nothing to train on, or a negative `max_heldout`.
    """
    test_share = heldout_share if test_share is None else test_share
    if min(heldout_share, test_share, max_heldout) < 0 or heldout_share + test_share >= 1:
        raise ValueError(
            f"held-out shares {heldout_share} and {test_share}, at most {max_heldout} keys: none may be negative, "
            "and the shares must add up to less than 1"
        )
    ranks = _ranks(keys)
    num_validation, num_test = (
        min(max(1, int(share * len(ranks))), max_heldout) if share > 0 and len(ranks) >= 3 else 0
        for share in (heldout_share, test_share)
    )
    sides = ["validation"] * num_validation + ["test"] * num_test
    sides += ["train"] * (len(ranks) - len(sides))
    return [sides[ranks[key]] for key in keys]


def _halves(keys: Sequence[str]) -> list[str]:
    """Validation or test for each row, half of the distinct keys each; an odd one validates."""
    ranks = _ranks(keys)
    return ["validation" if 2 * ranks[key] < len(ranks) else "test" for key in keys]


# --- pickled frames, without running them -------------------------------------------------------------------

# What frames written by pandas 2.0 to 3 with numpy 1.26 to 2 ask for, by the package they ask it of.
_PICKLE_NAMES = {
    "pandas": r"DataFrame|BlockManager|_unpickle_block|_new_Index|(Int64|Range|)Index|NA|Categorical"
    r"|__pyx_unpickle_NDArrayBacked|(Arrow)?StringArray(NumpySemantics)?|ArrowExtensionArray"
    r"|(Integer|Floating|Boolean)Array|(U?Int\d+|Float\d+|Boolean|String|Categorical|Arrow)Dtype",
    "numpy": r"_reconstruct|_frombuffer|scalar|ndarray|dtype",
    "pyarrow": r"_restore_array|py_buffer|type_for_alias",
    "builtins": r"slice|bytearray",
    "__builtin__": r"slice|bytearray|bytes",
    "_codecs": r"encode",
}


class _Recorded:
    """What a pickle asks to have built, on record and never built: a name, the arguments, the state."""

    name = ""

    def __new__(cls, *args: Any) -> _Recorded:
        recorded = super().__new__(cls)
        recorded.args, recorded.state = args, None
        return recorded

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _RecordingUnpickler(pickle._Unpickler):
    """Turns every name that a pickle mentions into a recorder; names that no frame needs are refused.

    It builds on the unpickler written in Python: the one in C sizes its tables by what a damaged file claims.
    """

    def find_class(self, module: str, name: str) -> type[_Recorded]:
        package = module.split(".")[0]
        if not re.fullmatch(_PICKLE_NAMES.get(package, r"(?!)"), name):
            hint = " (a Hugging Face Dataset: convert it with .to_pandas() first)" if package == "datasets" else ""
            raise pickle.UnpicklingError(f"refused, it asks for {module}.{name}, which no frame needs{hint}")
        return type(name, (_Recorded,), {"name": name})


def _decode(node: Any) -> Any:
    """The array, range, slice or scalar behind a recorded object; anything else is given back as it is.

    Only the nesting that pandas writes is decoded, and numpy checks every length against the bytes that are there.
    """
    match getattr(node, "name", None):
        case None:
            return node
        case "NA":
            return None
        case "encode" | "bytes" | "bytearray":  # how older pickle protocols spell bytes
            data = node.args[0] if node.args else b""
            return data.encode("latin-1") if isinstance(data, str) else b"".join([_decode(data)])
        case "slice":
            return slice(*node.args)
        case "dtype":  # only kinds whose bytes are plain values; the flags in the pickle are not believed
            if not re.fullmatch(r"[biufUS]\d+", node.args[0]):
                raise ValueError(f"values of numpy type {node.args[0]} are not read; keep text and numbers")
            return np.dtype(node.args[0]).newbyteorder(node.state[1])
        case "scalar":
            return np.frombuffer(_decode(node.args[1]), _decode(node.args[0]), count=1).item()
        case "_frombuffer":
            data, dtype, shape, order = node.args
            return np.frombuffer(_decode(data), _decode(dtype)).reshape(shape, order=order)
        case "_reconstruct":
            _, shape, dtype, is_fortran, data = node.state
            values = _decode_items(data) if isinstance(data, list) else np.frombuffer(_decode(data), _decode(dtype))
            return values.reshape(shape, order="F" if is_fortran else "C")
        case "_new_Index":
            kind, parts = node.args
            is_range = kind.name == "RangeIndex"
            return range(parts["start"], parts["stop"], parts["step"]) if is_range else _decode(parts["data"])
        case "__pyx_unpickle_NDArrayBacked":  # a dtype and an array, in the order of the pandas version
            dtype, array = (node.state or node.args[2])[:2]
            if dtype.name in ("_reconstruct", "_frombuffer"):
                dtype, array = array, dtype
            if node.args[0].name == "Categorical":
                return np.array([*_decode(dtype.state["categories"]), None], dtype=object)[_decode(array)]
            return _decode(array)
        case "ArrowStringArray" | "ArrowStringArrayNumpySemantics" | "ArrowExtensionArray":
            return _decode_arrow_strings(*node.state["_pa_array" if "_pa_array" in node.state else "_data"].args[0])
        case "IntegerArray" | "FloatingArray" | "BooleanArray":
            return np.where(_decode(node.state["_mask"]), None, _decode(node.state["_data"]))
        case name:
            raise ValueError(f"{name} is not expected in this place")


def _decode_items(items: list) -> np.ndarray:
    """(len,) objects; recorded numbers and missing values among them are decoded, and nothing deeper."""
    values = (_decode(item) if getattr(item, "name", None) in ("scalar", "NA") else item for item in items)
    return np.fromiter(values, dtype=object, count=len(items))


def _decode_arrow_strings(
    kind: Any, length: int, _nulls: int, start: int, buffers: list, _children: list, _dictionary: None
) -> np.ndarray:
    """(length,) texts of a pickled Arrow string array: offsets into one UTF-8 buffer, and a validity bitmap."""
    width = {"string": "<i4", "large_string": "<i8"}.get(kind.args[0])
    if width is None:
        raise ValueError(f"values of Arrow type {kind.args[0]} are not read; keep text and plain numpy numbers")
    validity, offsets, text = (b"" if buffer is None else b"".join([_decode(buffer.args[0])]) for buffer in buffers)
    bounds = np.frombuffer(offsets or bytes(8), width)[start : start + length + 1]  # no rows may mean no offsets
    there = np.unpackbits(np.frombuffer(validity, np.uint8), bitorder="little")[start : start + length]
    if len(bounds) != length + 1 or (np.diff(bounds, prepend=0, append=len(text)) < 0).any():
        raise ValueError(f"an Arrow text column of {length} rows has damaged offsets")
    texts = (text[first:last].decode("utf-8") for first, last in pairwise(bounds.tolist()))
    flags = there if validity else np.ones(length)
    return _decode_items([value if flag else None for value, flag in zip(texts, flags, strict=True)])


def _decode_frame(node: _Recorded) -> pd.DataFrame:
    blocks, axes = node.state["_mgr"].args
    names, labels = (_decode(axis) for axis in axes)
    columns: dict[int, np.ndarray] = {}
    for block in blocks:
        values, placement = (_decode(part) for part in block.args[:2])
        places = range(*placement.indices(len(names))) if isinstance(placement, slice) else placement.tolist()
        columns |= zip(places, values if values.ndim == 2 else [values], strict=True)
    if len(columns) != len(names) or set(columns) != set(range(len(names))):
        raise ValueError(f"its blocks do not make up {len(names)} columns")
    return pd.DataFrame(columns, index=pd.Index(labels)).sort_index(axis=1).set_axis(list(names), axis=1)


def _decode_labels(node: Any) -> list:
    """Index labels in an array, an index or a list."""
    labels = _decode(node)
    labels = labels.tolist() if isinstance(labels, np.ndarray) else _decode_items(list(labels)).tolist()
    if len(set(labels)) < len(labels):
        raise ValueError(f"among {len(labels)} index labels some repeat")
    return labels


def read_pickle(path: str | Path) -> pd.DataFrame | dict[Any, list]:
    """Read a pickled DataFrame of texts and numbers, or a pickled dict of index labels, and run no code of it.

    Unpickling imports and calls whatever a file asks for. Here every such request is refused unless pandas (2.0
    to 3) or numpy (1.26 to 2) makes it for a frame, and even then it is only recorded; the columns are rebuilt
    from the recorded bytes and strings. Categories come back as their values, missing values as None.

    Raises:
        FileNotFoundError: no such file.
        ValueError: compressed, damaged, or neither frame nor dict; names the file and what it asks for.
    """
    content = _require_file(Path(path)).read_bytes()
    if not content.startswith(b"\x80"):
        raise ValueError(
            f"{path} is not a pickle of protocol 2 or later; if it is compressed (gzip, zip), unpack it, or save "
            "it with df.to_pickle(path, compression=None)"
        )
    try:
        root = _RecordingUnpickler(io.BytesIO(content)).load()
        if isinstance(root, dict):
            return {key: _decode_labels(labels) for key, labels in root.items()}
        if getattr(root, "name", None) != "DataFrame":
            raise ValueError(f"it holds a {getattr(root, 'name', type(root).__name__)}")
        return _decode_frame(root)
    except Exception as error:  # a damaged file can make unpickling and decoding raise anything
        raise ValueError(
            f"{path} cannot be read as a pickled DataFrame or dev split map: {type(error).__name__}: {error}. "
            "Expected what DataFrame.to_pickle writes for columns of text and numbers; use .jsonl for anything else"
        ) from error


# --- instruction track --------------------------------------------------------------------------------------


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


def _require_file(path: Path, cure: str = "check the name") -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {cure}")
    return path


def _text(record: Mapping, field: str, where: str, allow_empty: bool = False) -> str:
    """The text in a field of a record, or one error that says where it should have been."""
    record = record if isinstance(record, Mapping) else {}
    value = record.get(field)
    if not isinstance(value, str) or not (allow_empty or value.strip()):
        found = f"{field} is {shorten(repr(value))}" if field in record else f"there is no field {field!r}"
        raise ValueError(f"{where}: {found}, expected {'text' if allow_empty else 'text that is not empty'}")
    return value


def _flan_row(record: Mapping, task_field: str, where: str) -> _Row:
    """A row with FLAN's fields; its prompt is ended so that the answer can follow (section 13)."""
    split = record.get("_split")
    if split is not None and split not in SPLITS and split == split:  # a frame's missing value is no equal of itself
        raise ValueError(f"{where}: _split is {split!r}, expected one of {', '.join(SPLITS)}")
    prompt = _text(record, "inputs", where, allow_empty=True)
    if not prompt.endswith("\n") and not prompt.rstrip().endswith(":"):
        prompt += "\n"
    completion, task = _text(record, "targets", where), _text(record, task_field, where)
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
        task, text = _text(record, "skill", where), _text(record, "text", where)
        output = _text(record, "output", where, allow_empty=True) if has_output else ""
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
        _require_file(path)
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


# --- chain-of-thought track: presets and files --------------------------------------------------------------

TEACHER = "text-davinci-002"


@dataclass(frozen=True)
class Preset:
    """What a preset key stands for (section 5)."""

    teacher_key: str | None  # completion key of the teacher's file; None: train on the bare answers
    num_completions: int  # completions asked for, of each sample
    template: str  # how rows are formatted and student completions are read: "ft_token" or "ft_cot_token"
    student_key: str  # completion key of the student's predictions
    finetune_key: str  # "{}" stands for the dataset key


def parse_preset(preset_key: str) -> Preset:
    """Look up `ft`, `ft_cot`, its other name `zs_cot`, or `ft_cot_t70_<k>aug`.

    Raises:
        ValueError: any other key.
    """
    if preset_key == "ft":
        return Preset(None, 1, "ft_token", "ft", "{}")
    if preset_key in ("ft_cot", "zs_cot"):
        return Preset("zs_cot", 1, "ft_cot_token", "ft_cot", "zs_cot_{}")
    if match := re.fullmatch(r"ft_cot_t70_(1|2|4|8|16|32|64)aug", preset_key):
        return Preset("zs_cot_t70", int(match[1]), "ft_cot_token", "ft_cot", f"zs_cot_t70_{{}}_{match[1]}aug")
    raise ValueError(
        f"preset {preset_key!r} is unknown; expected ft, ft_cot, zs_cot or ft_cot_t70_<k>aug with k one of 1, 2, "
        "4, 8, 16, 32, 64 (presets for inference only have no training rows)"
    )


def _read_json(path: Path, cure: str, data_type: type | None = None, **metadata: str | None) -> dict[str, Any]:
    """A JSON object from a file: any, or one whose `data` are of a type and whose metadata hold these values."""
    try:
        content = json.loads(_require_file(path, cure).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON in UTF-8 ({error}); {cure}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object; {cure}")
    if data_type:
        found = content.get("metadata")
        if not isinstance(found, dict) or not isinstance(content.get("data"), data_type):
            raise ValueError(f"{path} lacks metadata, or data that are a {data_type.__name__}; {cure}")
        if wrong := [key for key, expected in metadata.items() if found.get(key) != expected]:
            details = ", ".join(f"{key} {found.get(key)!r} (expected {metadata[key]!r})" for key in wrong)
            raise ValueError(f"{path}: the metadata say {details}; {cure}")
    return content


def _read_dataset(path: Path, dataset_key: str) -> list[dict]:
    """Records of a data set (section 2), stripped and with their `gold` answer and a `rationale` or None."""
    cure = "put the data set there, or name its folder with data_dir"
    data = _read_json(path, cure, list, dataset_key=dataset_key)["data"]
    for position, record in enumerate(data):
        where = f"{path}, data[{position}]"
        texts = {field: _text(record, field, where).strip() for field in ("question", "answer")}
        if record.get("sample_index") != position:
            raise ValueError(f"{where}: sample_index is {record.get('sample_index')!r}, expected {position}")
        try:
            record |= texts | {"gold": str(clean_answer(dataset_key, texts["answer"]))}
        except ValueError as error:
            raise ValueError(
                f"{where}: the answer {texts['answer']!r} is not a number, as {dataset_key} has"
            ) from error
        record["rationale"] = record.get("rationale") and _text(record, "rationale", where, allow_empty=True).strip()
    return data


def _read_split(path: Path, num_samples: int) -> dict[str, list[int]]:
    split = _read_json(path, "put the split there, or choose another with split_key")
    seen: set[int] = set()
    for side in ("train", "test"):
        if not isinstance(split.get(side), list):
            raise ValueError(f"{path} has no list {side!r}, expected the sample indices of train and of test")
        for index in split[side]:
            if type(index) is not int or not 0 <= index < num_samples or index in seen:
                raise ValueError(
                    f"{path}: {index!r} in {side} is no index of the data set (0 to {num_samples - 1}) or stands there twice"
                )
            seen.add(index)
    return split


def _read_teacher(
    path: Path, dataset: Sequence[Mapping], train: Sequence[int], **metadata: str | None
) -> tuple[dict[int, list[dict]], str | None]:
    """The teacher's completions by sample index, and the template that says how to read their answers (section 4)."""
    cure = "put the teacher's completions of this data set there, or use preset ft, which needs none"
    content = _read_json(path, cure, dict, **metadata)
    for key, records in content["data"].items():
        if not (key.isdecimal() and int(key) < len(dataset) and isinstance(records, list)):
            raise ValueError(f"{path}: {key!r} in data is no index of the data set with a list; {cure}")
        for position, record in enumerate(records):
            where, sample = f"{path}, sample {key}, completion {position}", dataset[int(key)]
            for field in ("reasoning_completion", "completion", "question", "answer"):
                text = _text(record, field, where, allow_empty=True).strip()
                if text != sample.get(field, text):
                    raise ValueError(
                        f"{where}: {field} is {shorten(text)!r}, the data set has {shorten(sample[field])!r}; {cure}"
                    )
    completions = {int(key): records for key, records in content["data"].items()}
    if absent := [index for index in train if index not in completions]:
        raise ValueError(
            f"{path} has no completions of {len(absent)} training samples, the first is {absent[0]}; {cure}, or choose "
            "a smaller split with split_key"
        )
    return completions, content["metadata"].get("prediction_template")


def _render(architecture: str, question: str, answer: str, reasoning: str | None) -> tuple[str, str]:
    """Prompt and completion by template `ft_cot_token`, without reasoning by `ft_token` (section 6)."""
    label = answer if reasoning is None else f"{reasoning.strip()} --> {answer}"
    return (f"{question} ###", f" {label}") if architecture == "decoder" else (question, label)


def load_cot(
    dataset_key: str,
    preset_key: str,
    *,
    architecture: str,
    data_dir: str | Path = DATA,
    saved_dir: str | Path = SAVED,
    split_key: str = "default",
    keep_incorrect: bool = False,
    letters: str = "word",
    heldout_share: float = 0.1,
    max_heldout: int = 500,
    task_column: str | None = None,
) -> TaskData:
    """Chain-of-thought data in the reasoning-teacher formats (sections 1 to 6).

    Training rows come first, in split order, then completion order. A part of the split's train questions, the same
    one for every preset, validates; the split's test questions test. A held-out question is one row, labelled with its
    first kept completion (test: completion 0 if correct), else the data set's rationale, else the bare answer.

    Args:
        architecture: "encoder_decoder" or "decoder"; decides the template.
        keep_incorrect: Train also on completions whose answer is wrong, as published.
        letters: How multiple-choice answers are read; see `extract_answers`.
        heldout_share: Share of the train questions that validates; 0 leaves the target without validation rows.
        max_heldout: Most validation questions.
        task_column: Field of the completion or the data-set record that names a training row's task, for example
            `teacher`; without it all training rows are one task, `dataset_key`.

    Raises:
        FileNotFoundError: the data set, split or completion file is missing.
        ValueError: an unknown key, a file that does not fit the others, or no training row left.
    """
    preset = parse_preset(preset_key)
    if dataset_key not in DATASET_KEYS or architecture not in ("encoder_decoder", "decoder"):
        raise ValueError(
            f"data set {dataset_key!r} for architecture {architecture!r}: expected one of {', '.join(DATASET_KEYS)} for "
            "encoder_decoder or decoder"
        )
    dataset = _read_dataset(Path(data_dir, "dataset", f"{dataset_key}.json"), dataset_key)
    path = Path(data_dir, "split", f"{dataset_key}__{split_key}.json")
    split = _read_split(path, len(dataset))
    if preset.teacher_key:
        path = Path(saved_dir, "completion_data", f"B_{TEACHER}__C_{preset.teacher_key}", f"D_{dataset_key}.json")
        expected = {"base_model": TEACHER, "completion_key": preset.teacher_key, "dataset_key": dataset_key}
        completions, template = _read_teacher(path, dataset, split["train"], **expected, train_key=None, epoch=None)

    def kept(index: int, count: int, any_answer: bool) -> list[dict]:
        """Those of a sample's first completions to learn from; for `ft` a single one without reasoning."""
        if not preset.teacher_key:
            return [{}]
        return [
            record
            for record in completions.get(index, [])[:count]
            if any_answer or judge(dataset_key, record["completion"], record["answer"], template, letters)["correct"]
        ]

    questions = [dataset[index]["question"] for index in split["train"]]
    sides = stable_split(questions, heldout_share, max_heldout, test_share=0)
    indices = {side: [i for i, s in zip(split["train"], sides, strict=True) if s == side] for side in SPLITS}
    indices["test"] = split["test"]
    rows: list[tuple[str, str, int, str | None]] = []  # split, task, record index, reasoning
    for index in indices["train"]:
        for record in kept(index, preset.num_completions, keep_incorrect):
            fields = {**dataset[index], **record, "dataset_key": dataset_key}
            task = _text(fields, task_column or "dataset_key", f"{path}, sample {index}, task_column")
            rows.append(("train", task, index, record.get("reasoning_completion")))
    num_train, num_bare = len(rows), 0
    if not num_train:
        raise ValueError(f"{path}: no training row is left of {len(questions)} train samples with preset {preset_key}")
    for side, count, any_answer in (("validation", preset.num_completions, keep_incorrect), ("test", 1, False)):
        for index in indices[side]:
            source, *_ = [*kept(index, count, any_answer), {"reasoning_completion": dataset[index]["rationale"]}]
            reasoning = source.get("reasoning_completion") or None
            num_bare += bool(preset.teacher_key and not reasoning)
            rows.append((side, dataset_key, index, reasoning))
    notices = []
    if preset.teacher_key:
        num_asked = preset.num_completions * len(indices["train"])
        num_there = sum(len(completions[index][: preset.num_completions]) for index in indices["train"])
        counted = (
            (num_asked - num_there, f"of {num_asked:,} completions that {preset_key} asks for are not there"),
            (num_there - num_train, f"of {num_there:,} completions are left out, as their answer is wrong"),
            (num_bare, "held-out rows have neither correct completion nor rationale; the label is the bare answer"),
        )
        notices = [f"{path}: {number:,} {message}" for number, message in counted if number]
    examples = []
    for position, (side, task, index, reasoning) in enumerate(rows):
        sample = dataset[index]
        texts = _render(architecture, sample["question"], sample["answer"], reasoning)
        examples.append(Example(position, task, side, *texts, record_index=index, answer=sample["gold"]))
    return TaskData(tuple(examples), tuple(notices), answer_key=dataset_key)


# --- chain-of-thought track: answers ------------------------------------------------------------------------

_CHOICES = {
    "commonsense_qa": "A-E",
    "aqua": "A-E",
    "date_understanding": "A-F",
    "tracking_shuffled_objects": "A-C",
}
_FLOATS = ("addsub", "svamp", "single_eq")
_NUMBERS = ("gsm8k", "multiarith", *_FLOATS)
_YES_NO = ("strategy_qa", "coin_flip")
DATASET_KEYS = (*_CHOICES, *_NUMBERS, *_YES_NO, "last_letter_concatenation")

# What stands between reasoning and answer, by template; None where the answer comes at once (section 10).
_MARKERS = {
    "ft_cot_token": "-->",
    "fs_cot": "The answer is",
    "ft_cot_natural": "Therefore, the answer is",
    **dict.fromkeys((None, "zs", "zs_cot", "ft_token", "ft_natural")),
}


def extract_answers(dataset_key: str, text: str, letters: str = "word") -> list[str | float]:
    """Candidate answers in a text, in order (section 10).

    Args:
        letters: For multiple choice, "published" takes every capital letter in range, also inside words; "word"
            only letters that stand alone, as `(B)` or `B.`. There an A that begins a sentence and is followed by a
            word in lower case is the article, so that a bare "A because ..." gives nothing.

    Raises:
        ValueError: unknown data set or letter rule.
    """
    if dataset_key not in DATASET_KEYS or letters not in ("word", "published"):
        raise ValueError(f"no rule to read answers of {dataset_key!r} with letters {letters!r}")
    if dataset_key in _YES_NO:
        return [word for word in re.sub(r"[\"'.\s:,]", " ", text.lower()).split(" ") if word in ("yes", "no")]
    if dataset_key in _NUMBERS:
        numbers = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
        return [float(number) for number in numbers] if dataset_key in _FLOATS else numbers
    if dataset_key == "last_letter_concatenation":
        rest = re.sub(r"[\"'.\s]", "", text)
        return [rest] if rest else []
    letter = f"[{_CHOICES[dataset_key]}]"
    if letters == "published":
        return re.findall(letter, text)
    text = re.sub(r"(^|[.!?\n])(\s*)A(?=\s+[a-z])", r"\1\2", text)
    return re.findall(rf"(?<![\w'\u2019&+.-]){letter}(?![\w'\u2019&+-]|\.\w)", text)


def clean_answer(dataset_key: str, answer: str) -> str | float:
    """The gold answer in the form of the candidates; cleaning twice changes nothing (section 10)."""
    if dataset_key in _NUMBERS:
        answer = answer.replace(",", "")
        return float(answer) if dataset_key in _FLOATS else answer
    return answer.lower() if dataset_key == "strategy_qa" else answer


def _candidates(dataset_key: str, completion: str, template: str | None, letters: str) -> tuple[list, bool]:
    """Candidates after the template's marker, and whether the completion has the template's format."""
    if template not in _MARKERS:
        raise ValueError(f"template {template!r} is unknown; expected one of {', '.join(map(str, _MARKERS))}")
    marker = _MARKERS[template]
    has_format = marker is None or marker in completion
    text = completion.split(marker, 1)[1] if marker and has_format else completion
    return extract_answers(dataset_key, text, letters), has_format


def predict_answer(
    dataset_key: str, completion: str, template: str | None, letters: str = "word"
) -> str | float | None:
    """The first candidate, or the last one when the marker is missing; None without candidates."""
    candidates, has_format = _candidates(dataset_key, completion, template, letters)
    return candidates[0 if has_format else -1] if candidates else None


def judge(dataset_key: str, completion: str, gold: str, template: str | None, letters: str = "word") -> dict[str, bool]:
    """`correct`, `contains_answer` and `correct_format` of one completion (section 11).

    Args:
        gold: The gold answer, cleaned or not.
        template: The template the completion was made with; None for the teacher's short answers.
    """
    answer = clean_answer(dataset_key, gold)

    def equal(candidate: str | float | None) -> bool:
        return abs(candidate - answer) <= 1e-6 if isinstance(candidate, float) else candidate == answer

    candidates, has_format = _candidates(dataset_key, completion, template, letters)
    return {
        "correct": equal(predict_answer(dataset_key, completion, template, letters)),
        "contains_answer": any(map(equal, candidates)),
        "correct_format": has_format,
    }


def summarize(judgements: Iterable[Mapping[str, bool]]) -> dict[str, float]:
    """Share of completions with each property: `accuracy`, `contains_answer`, `correct_format`; {} of none."""
    judgements = list(judgements)
    if not judgements:
        warnings.warn("no completions to summarize", stacklevel=2)
        return {}
    names = {"accuracy": "correct", "contains_answer": "contains_answer", "correct_format": "correct_format"}
    return {name: sum(j[key] for j in judgements) / len(judgements) for name, key in names.items()}


def save_predictions(
    path: str | Path,
    data: TaskData,
    completions: Mapping[int, str],
    *,
    base_model: str,
    preset_key: str,
    train_key: str | None = None,
    epoch: int | None = None,
    train_lora: bool = False,
    lora_rank: int | None = None,
) -> None:
    """Write a student's completions in the format of the completion files (sections 4 and 12), atomically.

    Args:
        completions: Whole decoded output by sample index of `data`; the file is keyed by the data set's own index.
        base_model: The student's model key.

    Raises:
        ValueError: a sample index that is not one of a chain-of-thought example.
    """
    preset, records = parse_preset(preset_key), {}
    for sample_index, completion in sorted(completions.items()):
        example = data.examples[sample_index] if 0 <= sample_index < len(data) else None
        if example is None or example.record_index is None:
            raise ValueError(f"sample index {sample_index} is none of the {len(data)} chain-of-thought examples")
        record = {
            "sample_index": example.record_index,
            "completion_index": 0,
            "question": example.prompt.removesuffix(" ###"),
            "answer": example.completion.split(_MARKERS["ft_cot_token"])[-1].strip(),
            "prompt": example.prompt,
            "completion": completion,
        }
        records[str(example.record_index)] = [record]
    metadata = {
        "base_model": base_model,
        "dataset_key": data.answer_key,
        "completion_key": preset.student_key,
        "finetune_key": preset.finetune_key.format(data.answer_key),
        "train_key": train_key,
        "prediction_template": preset.template,
        "epoch": epoch,
        "train_lora": train_lora,
        "lora_rank": lora_rank,
    }
    write_json(Path(path), {"metadata": metadata, "data": records})
