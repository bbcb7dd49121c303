"""Where the instruction track's examples come from.

A source is a file, a folder that `datasets` saved, or a data set on the hub: `FORMATS` says how each is read, record by
record. A record's columns say how it becomes a prompt and a completion: `LAYOUTS`. Pickled frames are read by
`src.frames`, with the layout that the published files have.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import datasets
import pandas as pd
import pyarrow as pa

from src.cli import progress
from src.data import (
    SPLITS,
    StoredExamples,
    TaskData,
    TextSpool,
    key_digest,
    require_file,
    stable_ranks,
    stable_split,
    text_field,
)
from src.frames import read_pickle
from src.paths import MANIFEST, shorten, source_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Record = Mapping[str, Any]
TASK_COLUMNS = ("_task_name", "skill", "task")
"""Columns that name a row's task where `Columns.task` does not, in the order in which they are looked for."""


class Columns(NamedTuple):
    """Names of columns, where the user gives them."""

    task: str | None = None
    prompt: str | None = None
    completion: str | None = None


class Chat:
    """Conversations as a prompt and a completion, by a tokenizer's chat template.

    Args:
        load_tokenizer: Called for the first conversation only.
    """

    def __init__(self, load_tokenizer: Callable[[], PreTrainedTokenizerBase]) -> None:
        self._load, self._tokenizer = load_tokenizer, None

    def texts(self, messages: Any, where: str) -> tuple[str, str]:
        """Everything up to the last turn, and that turn, which must be the assistant's.

        Raises:
            ValueError: no such conversation, or a tokenizer without a template.
        """
        turns = list(messages) if isinstance(messages, (list, tuple)) else []
        if (
            not all(isinstance(turn, Mapping) and isinstance(turn.get("content"), str) for turn in turns)
            or len(turns) < 2
        ):
            raise ValueError(
                f"{where}: messages is {shorten(messages)}, expected two or more turns of role and content"
            )
        if turns[-1].get("role") != "assistant":
            raise ValueError(f"{where}: the last of its messages is by {turns[-1].get('role')!r}, expected 'assistant'")
        self._tokenizer = tokenizer = self._tokenizer or self._load()
        if not tokenizer.chat_template:
            raise ValueError(
                f"{where}: the tokenizer of {tokenizer.name_or_path} has no chat template, so that messages cannot become "
                "a prompt; take a chat model, or give columns prompt and completion"
            )
        prompt = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        if not whole.startswith(prompt):  # a template that opens the assistant's turn in another way
            whole = prompt + turns[-1]["content"]
        completion = whole[len(prompt) :].rstrip().removesuffix(tokenizer.eos_token or "")
        begin = tokenizer.bos_token or ""
        if begin and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:  # the tokenizer puts it there itself
            prompt = prompt.removeprefix(begin)
        return prompt, completion


def _halves(keys: Sequence[str | bytes]) -> list[str]:
    """Validation or test for each row, half of the distinct keys each; an odd one validates."""
    ranks = stable_ranks(keys)
    return ["validation" if 2 * ranks[key] < len(ranks) else "test" for key in keys]


class _Placed(NamedTuple):
    """A row whose texts are stored; `key` is the `key_digest` of what identifies it in a split."""

    where: str
    task: str
    key: bytes
    split: str | None


class _Row(NamedTuple):
    where: str  # file and line or row, for messages
    task: str
    prompt: str
    completion: str
    split: str | None  # None: still to be chosen

    @property
    def without_texts(self) -> _Placed:
        """What has to be kept of the row when its texts are stored."""
        return _Placed(self.where, self.task, key_digest(self.key), self.split)

    @property
    def key(self) -> str:
        """What identifies a row in a split: its prompt, or its completion when it has none."""
        return self.prompt if self.prompt.strip() else self.completion


def _split_of(record: Record, where: str) -> str | None:
    split = record.get("_split")
    if split is not None and split not in SPLITS and split == split:  # a frame's missing value is no equal of itself
        raise ValueError(f"{where}: _split is {split!r}, expected one of {', '.join(SPLITS)}")
    return split if split in SPLITS else None


def _flan_texts(record: Record, where: str, _: Chat) -> tuple[str, str]:
    """FLAN's fields; the prompt is ended so that the answer can follow."""
    prompt = text_field(record, "inputs", where, allow_empty=True)
    if not prompt.endswith("\n") and not prompt.rstrip().endswith(":"):
        prompt += "\n"
    return prompt, text_field(record, "targets", where)


def _alpaca_texts(record: Record, where: str, _: Chat) -> tuple[str, str]:
    """Alpaca's fields, a line for the instruction and one for its input."""
    instruction, given = text_field(record, "instruction", where), record.get("input") or ""
    prompt = "".join(f"{part}\n" for part in (instruction, given) if part)
    return prompt, text_field(record, "output", where)


def _plain_texts(prompt: str, completion: str) -> Callable[[Record, str, Chat], tuple[str, str]]:
    """Two columns, taken as they are."""

    def texts(record: Record, where: str, _: Chat) -> tuple[str, str]:
        return text_field(record, prompt, where, allow_empty=True), text_field(record, completion, where)

    return texts


LAYOUTS: dict[tuple[str, ...], Callable[[Record, str, Chat], tuple[str, str]]] = {
    ("inputs", "targets"): _flan_texts,
    ("prompt", "completion"): _plain_texts("prompt", "completion"),
    ("messages",): lambda record, where, chat: chat.texts(record.get("messages"), where),
    ("instruction", "output"): _alpaca_texts,
}
"""Columns that a source has -> how a record becomes a prompt and a completion; the first that fits."""


def _record_rows(
    source: str, records: Iterator[tuple[str, Record]], columns: Columns, chat: Chat, columns_used: set[str]
) -> Iterator[_Row]:
    """Rows of a source's records; its first record says which layout it has and which column names the task. A source
    without the columns that the user named is read by those that it has."""
    first = next(records, None)
    if first is None:
        return
    where, record = first
    given = [name for name in (columns.prompt, columns.completion) if name]
    if set(given) & set(record):
        named: tuple[str, ...] = (columns.prompt or "prompt", columns.completion or "completion")
        texts = _plain_texts(*named)
        columns_used.update(given)
    else:
        fitting = [layout for layout in LAYOUTS if set(layout) <= set(record)]
        # a record that lacks one of the columns is told so by the layout it comes nearest to
        named = (fitting or [max(LAYOUTS, key=lambda layout: len(set(layout) & set(record)))])[0]
        if not set(named) & set(record):
            layouts = "; ".join(" and ".join(layout) for layout in LAYOUTS)
            raise ValueError(
                f"{where} has the columns {shorten(', '.join(map(str, record)))}; expected {layouts}, or name yours with "
                "--prompt_column and --completion_column"
            )
        texts = LAYOUTS[named]
    task_column = columns.task or next((name for name in TASK_COLUMNS if name in record), None)
    # published files name tasks in _task_name: there a row without one is a fault, not a source of its own
    task_column = task_column or (TASK_COLUMNS[0] if named == ("inputs", "targets") else None)
    for where, record in itertools.chain([first], records):
        task = text_field(record, task_column, where) if task_column else source_name(source)
        yield _Row(where, task, *texts(record, where, chat), _split_of(record, where))


def _json_records(source: str) -> Iterator[tuple[str, Record]]:
    opened = gzip.open if source.endswith(".gz") else open
    with opened(require_file(Path(source)), "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{source}, line {number}"
            try:
                record = json.loads(line.decode("utf-8")) if line.strip() else None
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise ValueError(f"{where} is not JSON in UTF-8 ({error}); expected one object per line") from error
            if isinstance(record, dict):
                yield where, record
            elif line.strip():
                raise ValueError(f"{where} holds {shorten(record)}, expected an object with inputs and targets")


def _parquet_records(source: str) -> Iterator[tuple[str, Record]]:
    path = str(require_file(Path(source)))
    with _clear_errors(source):  # streamed: no copy of the file is made, and no old one is found
        stream = datasets.load_dataset("parquet", data_files=path, split="train", streaming=True)
    yield from _numbered(source, stream)


def _csv_records(source: str) -> Iterator[tuple[str, Record]]:
    """Every field as the text that stands there: `02` is no number and `NA` is not missing."""

    def rows() -> Iterator[Record]:
        with pd.read_csv(require_file(Path(source)), dtype=str, keep_default_na=False, chunksize=10_000) as chunks:
            for chunk in chunks:
                yield from chunk.to_dict("records")

    yield from _numbered(source, rows())


def _saved_records(source: str) -> Iterator[tuple[str, Record]]:
    """A folder that `save_to_disk` wrote; of several splits, `train`."""
    with _clear_errors(source):
        saved = datasets.load_from_disk(source)
    if isinstance(saved, datasets.DatasetDict):
        if "train" not in saved:
            raise ValueError(
                f"{source} has the splits {', '.join(saved)}, expected train among them, or a folder of one split"
            )
        saved = saved["train"]
    yield from _numbered(source, saved)


def _hub_records(source: str) -> Iterator[tuple[str, Record]]:
    """`name` or `organisation/name` on the hub, with `:split` behind it where that is not train."""
    name, _, split = source.partition(":")
    try:
        stream = datasets.load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:  # whatever the network, the hub or the data set's own files raise
        raise FileNotFoundError(
            f"{source}: no such file or folder, and as a data set on the hub it cannot be opened ({_first_line(error)})"
        ) from error
    yield from _numbered(source, stream)


def _numbered(source: str, records: Any) -> Iterator[tuple[str, Record]]:
    number = 0
    records = iter(records)
    while True:
        with _clear_errors(source):
            record = next(records, None)
        if record is None:
            return
        number += 1
        yield f"{source}, row {number}", record


@contextlib.contextmanager
def _clear_errors(source: str) -> Iterator[None]:
    """One error for everything that a damaged file raises in the libraries; our own pass."""
    try:
        yield
    except (
        OSError,
        UnicodeError,
        pa.ArrowException,
        datasets.exceptions.DatasetsError,
        pd.errors.ParserError,
        pd.errors.EmptyDataError,
    ) as error:
        raise ValueError(f"{source} cannot be read ({_first_line(error)}); write it again") from error


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return shorten((str(cause).strip() or type(cause).__name__).splitlines()[0], 200)


FORMATS: dict[str, Callable[[str], Iterator[tuple[str, Record]]]] = {
    ".jsonl": _json_records,
    ".json": _json_records,
    ".csv": _csv_records,
    ".parquet": _parquet_records,
}
"""How a file's name ends, but for .gz -> its records, each with where it stands, for messages. To add a format, write a
function of a few lines and name it here."""


def _format_of(name: str) -> str:
    packed = Path(name.removesuffix(".gz")).suffix
    return packed if packed in (".jsonl", ".json", ".csv") else Path(name).suffix


def files_of(source: str, without: Sequence[str] = ()) -> list[str]:
    """The data files of a folder, sorted, but for some; any other source is itself.

    Raises:
        ValueError: a folder that has none and that `datasets` did not save.
    """
    folder = Path(source)
    if not folder.is_dir() or any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        return [source]
    excluded = {Path(file).resolve() for file in without}
    known = [path for path in sorted(folder.iterdir()) if path.is_file() and _is_data_file(path.name)]
    found = [str(path) for path in known if path.resolve() not in excluded]
    if not found:
        raise ValueError(
            f"{source} is a folder without data files; expected files that end in {', '.join(FORMATS)} or .pkl in it, or "
            "what the save_to_disk of datasets writes"
        )
    return found


def _is_data_file(name: str) -> bool:
    if name.endswith(".pkl"):
        return not name.endswith("_dev_split_map.pkl")
    return _format_of(name) in FORMATS and name != MANIFEST


def _records_of(source: str) -> Iterator[tuple[str, Record]]:
    if Path(source).is_dir():
        return _saved_records(source)
    if (ending := _format_of(source)) in FORMATS:
        return FORMATS[ending](source)
    is_named_like_a_file = re.fullmatch(r"\.[A-Za-z]\w*", Path(source).suffix)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:\w+)?", source) and not is_named_like_a_file:
        return _hub_records(source)
    raise ValueError(
        f"{source}: instruction data are files that end in {', '.join(FORMATS)} or .pkl, folders of them or of "
        "`save_to_disk`, and hub ids"
    )


def _frame_rows(path: Path, use_dev_map: bool, chat: Chat, notices: list[str]) -> Iterator[_Row]:
    """Rows of a pickled frame, with the splits of its dev split map if there is one."""
    frame = read_pickle(path)
    columns = set(frame.columns) if isinstance(frame, pd.DataFrame) else set()
    if isinstance(frame, dict) or not columns >= {"skill", "text"}:
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
            task = text_field(record, "skill", where)
            rows[position] = _Row(where, task, *_flan_texts(record, where, chat), _split_of(record, where))
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


def _read_rows(
    sources: Sequence[str],
    use_dev_map: bool,
    columns: Columns,
    chat: Chat,
    spool: TextSpool,
    notices: list[str],
    columns_used: set[str],
) -> list[_Placed]:
    """Rows of all sources, in the order of the sources and of the rows in them; their texts go into the spool."""
    rows: list[_Placed] = []
    for source in sources:
        if source.endswith(".pkl"):
            found = _frame_rows(require_file(Path(source)), use_dev_map, chat, notices)
        else:
            found = _record_rows(source, _records_of(source), columns, chat, columns_used)
        before = len(rows)
        for row in progress(found, desc=f"reading {shorten(source, 40)}", unit="row"):
            spool.append(row.prompt, row.completion)
            rows.append(row.without_texts)
        if len(rows) == before:
            raise ValueError(f"{source} is empty: no row could be taken from it")
    return rows


def _split_rows(rows: list[_Placed], split: Callable[[list[bytes]], list[str]]) -> list[_Placed]:
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
    columns: Columns = Columns(),  # noqa: B008 a tuple of three Nones
    load_tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None,
) -> TaskData:
    """Instruction data from files, folders and the hub.

    A task's rows are divided by `stable_split` over their prompts, unless they say it themselves: in a field
    `_split`, or by a dev split map beside a pickle, whose rows are halved into validation and test. Tasks of
    `target_files` are targets only: half validation, half test, or as `_split` says; dev split maps beside those
    files are not consulted. Without a column that names tasks, a source is a task by its own name.

    Args:
        data_files: Training sources.
        target_files: Sources of targets; one that lies in a folder of `data_files` is a target only.
        heldout_share: Share of a task's prompts that validates, and that tests.
        max_heldout: At most so many of them.
        columns: Names of columns that are not the usual ones.
        load_tokenizer: Gives the tokenizer whose chat template turns `messages` into prompts.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: with file and line or row, what was found and what was expected.
    """
    notices: list[str] = []

    def no_tokenizer() -> PreTrainedTokenizerBase:
        raise ValueError("these data hold messages, which only a model's tokenizer can turn into prompts")

    chat, spool = Chat(load_tokenizer or no_tokenizer), TextSpool()
    columns_used: set[str] = set()
    targets = [file for source in target_files for file in files_of(str(source))]
    training = list(dict.fromkeys(file for source in data_files for file in files_of(str(source), without=targets)))
    rows = _split_rows(
        _read_rows(training, True, columns, chat, spool, notices, columns_used),
        lambda keys: stable_split(keys, heldout_share, max_heldout),
    )
    target_rows = _split_rows(_read_rows(targets, False, columns, chat, spool, notices, columns_used), _halves)
    for flag, name in (("--prompt_column", columns.prompt), ("--completion_column", columns.completion)):
        if name and name not in columns_used:
            sources_read = shorten(", ".join((*training, *targets)), 200)
            raise ValueError(f"{flag} {name}: none of {sources_read} has such a column")
    sources = {row.task for row in rows}
    for row in target_rows:
        if row.task in sources or row.split == "train":
            reason = "is a task of the training data too" if row.task in sources else "has _split train"
            raise ValueError(
                f"{row.where}: target {row.task!r} {reason}; tasks of target files are never trained on: leave its rows out "
                "of --data_files, or give them another task"
            )
    if not any(row.split == "train" for row in rows):
        raise ValueError(f"no training rows in {', '.join(map(str, data_files)) or 'an empty list of data files'}")
    if bare := sorted(sources - {row.task for row in rows if row.split == "validation"}):
        notices.append(
            f"{len(bare)} of {len(sources)} tasks have no held-out rows (too few distinct prompts, or nothing in "
            f"the dev split map) and are no targets: {shorten(', '.join(bare), 200)}"
        )
    placed = rows + target_rows
    splits = [cast(str, row.split) for row in placed]  # all have one by now
    examples = StoredExamples(spool.table(), [row.task for row in placed], splits)
    return TaskData(examples, tuple(notices))
