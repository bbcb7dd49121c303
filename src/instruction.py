"""Where the instruction track's examples come from.

A source is a file, the shards of a data set, a folder that `datasets` saved, or a data set on the hub: `FORMATS` says how
files are read, record by record. A record's columns say how it becomes a prompt and a completion: `LAYOUTS`. Pickled
frames are read by `src.frames`.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import datetime
import gzip
import io
import itertools
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import datasets
import pandas as pd
import pyarrow.parquet as pq

from src.console import progress
from src.data import (
    HELD_OUT,
    LEFT_OUT,
    SPLITS,
    StoredExamples,
    TaskData,
    heldout_quotas,
    is_missing,
    key_digest,
    require_file,
    require_unicode,
    stable_sides,
    store_texts,
    text_field,
)
from src.frames import read_pickle
from src.artifacts import MANIFEST, shorten, source_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Record = Mapping[str, Any]
TASK_COLUMNS = ("_task_name", "skill", "task")
"""Columns that name a row's task where `Columns.task` does not, in the order in which they are looked for."""
HINTED_COLUMNS = ("source", "dataset", "category", "subset", "domain", "subject", "topic", "config")
"""Columns that are said to be there where a source is read as one task: few values in them may well be tasks."""
HALVED = "validation or test"
"""In place of a row's split: held out; half of a task's distinct keys validate, half test."""


class Columns(NamedTuple):
    """Names of columns, where the user gives them."""

    task: str | None = None
    prompt: str | None = None
    completion: str | None = None


class _Row(NamedTuple):
    """What is kept of a row beside its texts."""

    where: str  # file and line or row, for messages
    task: str
    key: bytes  # decides the split: rows with equal keys are on one side
    split: str | None  # None: to be chosen; or HALVED
    is_target: bool


# --- conversations -------------------------------------------------------------------------------------------

ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
         "observation": "tool"}  # fmt: skip
"""Names that roles have in published conversations -> what chat templates call them."""
TEMPLATE_DATE = datetime.date(2024, 7, 26)
"""What templates take for today, so that rows are the same on any day."""


def _plain(value: Any, name: str = "") -> Any:
    """JSON without the nulls that columnar files put where rows have different keys. Messages, tools and the arguments of
    a call may be JSON in a text."""
    if isinstance(value, str) and name in ("messages", "tools", "arguments"):
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
    if isinstance(value, Mapping):
        return {key: _plain(item, key) for key, item in value.items() if not is_missing(item)}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _turn(turn: Any, where: str, may_be_empty: bool) -> dict[str, Any]:
    """A turn with `role` and `content` as chat templates take them, and with what else it has."""
    more = dict(turn) if isinstance(turn, dict) else {}
    role, content = more.pop("role", more.pop("from", None)), more.pop("content", more.pop("value", None))
    if not isinstance(role, str):
        raise ValueError(f"{where} is {shorten(turn)}, expected an object with role and content, or from and value")
    role = ROLES.get(role, role)
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    is_call = bool(more.get("tool_calls"))
    if is_call and content is None:
        return {"role": role, **more}
    if not isinstance(content, str) or not (content.strip() or may_be_empty or role == "system" or is_call):
        raise ValueError(f"{where} ({role}) has content {shorten(json.dumps(content, default=str))}, expected text")
    return {"role": role, "content": content, **more}


class Chat:
    """Conversations as a prompt and a completion, by a tokenizer's chat template.

    Args:
        load_tokenizer: Called for the first conversation only.
    """

    def __init__(self, load_tokenizer: Callable[[], PreTrainedTokenizerBase]) -> None:
        self._load = load_tokenizer
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self.notices: dict[str, None] = {}

    def texts(self, messages: Any, where: str, tools: Any = None) -> tuple[str, str, str]:
        """Everything up to the last turn, and that turn, which must be the assistant's; and what identifies the prompt
        whatever the template: its turns and tools. An empty answer is an empty completion.

        Raises:
            ValueError: no such conversation, or no template that takes it.
        """
        given = _plain({"messages": messages, "tools": tools})
        messages, tools = given.get("messages"), given.get("tools") or None
        if not isinstance(messages, list) or len(messages) < 2:
            raise ValueError(
                f"{where}: messages is {shorten(messages)}, expected two or more turns of role and content"
            )
        *before, last = turns = [
            _turn(turn, f"{where}: turn {number}", number == len(messages)) for number, turn in enumerate(messages, 1)
        ]
        if last["role"] != "assistant":
            raise ValueError(f"{where}: the last of its messages is by {last['role']!r}, expected 'assistant'")
        is_question = len(before) == 1 and not tools and before[0]["role"] == "user"
        key = before[0].get("content", "") if is_question else json.dumps([before, tools], sort_keys=True)
        if not last.get("content", "").strip() and not last.get("tool_calls"):
            return "", "", key
        tokenizer = self._tokenizer = self._tokenizer or self._load()
        prompt, whole = (self._render(part, tools, where, part is before) for part in (before, turns))
        if not whole.startswith(prompt):  # a template that opens the assistant's turn in another way
            whole = prompt + text_field(last, "content", where)
        completion = whole[len(prompt) :].rstrip().removesuffix(tokenizer.eos_token or "")
        begin = tokenizer.bos_token or ""
        if begin and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:  # the tokenizer puts it there itself
            prompt = prompt.removeprefix(begin)
        require_unicode(prompt + completion, f"{where}: the conversation")
        return prompt, completion, key

    def _render(self, turns: list[dict], tools: list | None, where: str, opened: bool) -> str:
        """The turns in the tokenizer's template, on the same date every day."""
        from transformers.utils.chat_template_utils import _compile_jinja_template

        tokenizer = cast("PreTrainedTokenizerBase", self._tokenizer)
        if not tokenizer.chat_template:
            raise ValueError(
                f"{where}: the tokenizer of {tokenizer.name_or_path} has no chat template, so that messages cannot become "
                "a prompt; take a chat model, or give columns prompt and completion"
            )
        try:
            template = tokenizer.get_chat_template(tools=tools)
            if "tool_calls" not in template and any(turn.get("tool_calls") for turn in turns):
                raise ValueError("it has no place for tool_calls")
            if tools and "tools" not in template:
                self.notices["the chat template has no place for the column tools: prompts do not show it"] = None
            # transformers keeps what it compiled, so that its own call below finds our date; it takes no functions
            _compile_jinja_template(template).globals["strftime_now"] = self._date
            return cast(str, tokenizer.apply_chat_template(turns, tools, add_generation_prompt=opened, tokenize=False))
        except Exception as error:  # a template is a program: it can raise anything
            raise ValueError(
                f"{where}: the chat template of {tokenizer.name_or_path} does not take this conversation "
                f"({_first_line(error)}); correct the row or leave it out (a system text can stand in front of the first "
                "user turn's), or take a model whose template does"
            ) from error

    def _date(self, pattern: str) -> str:
        self.notices[f"the chat template writes the date: it is {TEMPLATE_DATE} for all rows, on any day"] = None
        return TEMPLATE_DATE.strftime(pattern)


# --- layouts -------------------------------------------------------------------------------------------------

LAYOUTS: tuple[tuple[str, ...], ...] = (
    ("inputs", "targets"),
    ("prompt", "completion"),
    ("messages",),
    ("conversations",),
    ("conversation",),
    ("skill", "text"),
    ("instruction", "output"),
    ("instruction", "response"),
)
"""Columns that a source has, as `_texts` makes a prompt and a completion of them; the first that fits."""


def _texts(layout: tuple[str, ...], record: Record, where: str, chat: Chat) -> tuple[str, ...]:
    """Prompt, completion (empty: the row is left out), and a key for the split where that is not the prompt."""

    def text(field: str) -> str:
        is_null = field in record and is_missing(record[field])
        return "" if is_null and field != prompt_column else text_field(record, field, where, allow_empty=True)

    prompt_column, answer = layout[0], layout[-1]
    match layout:
        case ("inputs", "targets"):  # FLAN: the prompt is ended so that the answer can follow
            prompt = text(prompt_column)
            is_ended = prompt.endswith("\n") or prompt.rstrip().endswith(":")
            return prompt if is_ended else f"{prompt}\n", text(answer)
        case ("skill", "text"):  # the published frames: a text that ends with the output, if there is one
            whole, output = text_field(record, "text", where), text("output") if "output" in record else None
            prompt = whole.removesuffix(output) if output and whole.endswith(output) else ""
            return prompt, "" if output is not None and not output.strip() else whole[len(prompt) :]
        case ("instruction", _):  # Alpaca and Dolly: a line for the instruction, and one for what is given with it
            name = "input" if answer == "output" else "context"
            given = record.get(name)
            given = "" if is_missing(given) else str(given) if isinstance(given, (int, float)) else text(name)
            return "".join(f"{part}\n" for part in (text(prompt_column), given) if part), text(answer)
        case (column,):
            return chat.texts(record.get(column), where, record.get("tools"))
    return text(prompt_column), text(answer)


def _layout_of(record: Record, where: str, columns: Columns) -> tuple[str, ...]:
    """The layout of a source by its first record. A source without the columns that the user named is read by those that
    it has."""
    if {columns.prompt, columns.completion} & set(record):
        named = (columns.prompt or "prompt", columns.completion or "completion")
        return named[:1] if isinstance(record.get(named[0]), list) else named
    # a record that lacks one of the columns is told so by the layout it comes nearest to
    layout = max(LAYOUTS, key=lambda names: 9 if set(names) <= set(record) else len(set(names) & set(record)))
    if not set(layout) & set(record):
        raise ValueError(
            f"{where} has the columns {shorten(', '.join(map(str, record)))}; expected {'; '.join(map(' and '.join, LAYOUTS))}, "
            "or name yours with --prompt_column and --completion_column"
        )
    return layout


# --- files ---------------------------------------------------------------------------------------------------


def _opened(source: str) -> io.BufferedReader:
    """The bytes of a file, unpacked."""
    unpacked = gzip.open if source.lower().endswith(".gz") else open
    return cast(io.BufferedReader, unpacked(require_file(Path(source)), "rb"))


def _numbered(source: str, records: Iterable[Any], place: str = "row") -> Iterator[tuple[str, Any]]:
    return ((f"{source}, {place} {number}", record) for number, record in enumerate(records, start=1))


def _json_records(source: str) -> Iterator[tuple[str, Record]]:
    """An object per line, or one array of objects."""
    with _opened(source) as file:
        start = file.peek(4096).removeprefix(codecs.BOM_UTF8).lstrip()
        is_array = start.startswith(b"[")
        if is_array or re.match(rb"\{\s*\n", start):
            whole = _json_value(file.read(), source)
            if not is_array:
                raise ValueError(
                    f"{source} holds one object, expected rows: an object per line, or one array of objects"
                )
            values = _numbered(source, whole)
        else:
            lines = _numbered(source, file, "line")
            values = ((where, _json_value(line, where)) for where, line in lines if line.strip())
        for where, record in values:
            if not isinstance(record, dict):
                raise ValueError(f"{where} holds {shorten(record)}, expected an object with a field for each column")
            yield where, record


def _json_value(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"{where} is not JSON in UTF-8 ({error}); expected an object per line, or an array of objects"
        ) from error


def _csv_records(source: str) -> Iterator[tuple[str, Record]]:
    """Every field as the text that stands there: `02` is no number and `NA` is not missing. Fields are separated by
    commas, tabs or semicolons, whichever makes the most columns of the first line."""
    csv.field_size_limit(2**31 - 1)
    with io.TextIOWrapper(_opened(source), encoding="utf-8-sig", newline="") as file:
        first, marks = file.readline(), "\t,;" if ".tsv" in source.lower() else ",;\t"
        mark = max(marks, key=lambda mark: len(next(csv.reader([first], delimiter=mark), [])))
        rows = csv.reader(itertools.chain([first], file), delimiter=mark, strict=True)
        header = next(rows, [])
        if len(set(header)) < len(header):
            raise ValueError(f"{source} names a column twice: {', '.join(header)}; rename one of them")
        for where, fields in _numbered(source, filter(None, rows)):
            if len(fields) < len(header) or any(fields[len(header) :]):
                raise ValueError(
                    f"{where} has {len(fields)} fields, and the first line names {len(header)} columns ({', '.join(header)}); "
                    "give each row as many, with quotation marks around a text that holds the separator"
                )
            yield where, dict(zip(header, fields, strict=False))


def _parquet_records(source: str) -> Iterator[tuple[str, Record]]:
    with pq.ParquetFile(require_file(Path(source))) as file:
        yield from _numbered(source, (row for batch in file.iter_batches(1000) for row in batch.to_pylist()))


def _pickle_records(source: str, use_dev_map: bool) -> Iterator[tuple[str, Record]]:
    """Rows of a pickled frame, with the splits of its dev split map if there is one."""
    frame = read_pickle(require_file(Path(source)))
    if isinstance(frame, dict):
        raise ValueError(f"{source} holds no columns, expected a DataFrame with the columns skill and text")
    splits = _dev_map_splits(Path(source), frame) if use_dev_map else None
    for (where, record), label in zip(_numbered(source, frame.to_dict("records")), frame.index, strict=True):
        yield f"{where} (index label {label!r})", record | ({"_split": splits[label]} if splits else {})


def _dev_map_splits(path: Path, frame: pd.DataFrame) -> dict[Any, str] | None:
    """Index label -> split, from a dev split map beside the file; None where there is none.

    The map alone decides: a training row may repeat the prompt of a held-out one, as in the published files.
    """
    stems = (path.stem, path.stem.removesuffix("_final"))
    maps = [path.with_name(f"{stem}_dev_split_map.pkl") for stem in stems]
    map_path = next((candidate for candidate in maps if candidate.is_file()), None)
    if map_path is None:
        return None
    dev_map, splits = read_pickle(map_path), dict.fromkeys(frame.index, "train")
    if not isinstance(dev_map, dict) or len(splits) < len(frame) or "_split" in frame or "skill" not in frame:
        raise ValueError(
            f"{map_path} must hold a dict from skill to index labels, and {path} a column skill, index labels that do not "
            "repeat and no column _split; correct them, or remove the map to have the rows split by their prompts"
        )
    for skill, labels in dev_map.items():
        for label in labels:
            if label not in splits or frame["skill"].at[label] != skill:
                raise ValueError(
                    f"{map_path} holds out row {label!r} of skill {skill!r}, but {path} has no such row of that "
                    "skill; the map belongs to another file: replace it, or remove it to split by prompts"
                )
        splits |= dict.fromkeys(labels, HALVED)
    return splits


def _saved_records(source: str) -> Iterator[tuple[str, Record]]:
    """A folder that `save_to_disk` wrote."""
    return _numbered(source, cast(datasets.Dataset, datasets.load_from_disk(source)).with_format(None))


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


FORMATS: dict[str, Callable[[str], Iterator[tuple[str, Record]]]] = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), _json_records),
    **dict.fromkeys((".csv", ".tsv"), _csv_records),
    ".parquet": _parquet_records,
}
"""How a file's name ends, in small letters and but for .gz -> its records, each with where it stands, for
messages. To add a format, write a function of a few lines and name it here."""


def _format_of(name: str) -> str:
    return Path(name.lower().removesuffix(".gz")).suffix


def _records_of(source: str, use_dev_map: bool) -> Iterator[tuple[str, Record]]:
    """Records of a source, each with where it stands; whatever a damaged file raises in the libraries is one error."""
    try:
        if Path(source).is_dir():
            yield from _saved_records(source)
        elif _format_of(source) == ".pkl":
            yield from _pickle_records(source, use_dev_map)
        elif reader := FORMATS.get(_format_of(source)):
            yield from reader(source)
        elif re.fullmatch(r"(?!.*\.[A-Za-z]\w*$)[\w.-]+(/[\w.-]+)?(:\w+)?", source):  # not named like a file
            yield from _hub_records(source)
        else:
            raise ValueError(
                f"{source}: instruction data are files that end in {', '.join(FORMATS)} or .pkl, folders of them or of "
                "`save_to_disk`, and hub ids"
            )
    except Exception as error:
        if type(error) in (ValueError, FileNotFoundError):  # our own
            raise
        raise ValueError(f"{source} cannot be read ({_first_line(error)}); write it again") from error


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return shorten((str(cause).strip() or type(cause).__name__).splitlines()[0], 200)


# --- folders -------------------------------------------------------------------------------------------------


def files_of(source: str, without: Sequence[str] = (), notices: list[str] | None = None) -> list[str]:
    """The data files of a folder, sorted, but for some; any other source is itself.

    A folder without data files of its own is read as its sub-folders are. What is not read is named in `notices`: other
    endings, sub-folders beside data files, and a data set's test and validation splits.

    Raises:
        ValueError: a folder that has none and that `datasets` did not save.
    """
    if not Path(source).is_dir():
        return [source]
    unread: list[str] = []
    found = _files_below(Path(source), {Path(file).resolve() for file in without}, unread)
    if not found:
        raise ValueError(
            f"{source} is a folder without data files; expected files that end in {', '.join(FORMATS)} or .pkl in it, or "
            "what the save_to_disk of datasets writes"
        )
    if notices is not None and unread:
        notices.append(f"in the folder {source} these are not read: {shorten(', '.join(unread), 300)}")
    return found


_ABOUT_DATA = re.compile(
    rf"(?i)\..*|(readme|licen[sc]e).*|.*\.(md|py)|.*_dev_split_map\.pkl|dataset_(infos|dict)\.json|{MANIFEST}"
)
"""Names of files that belong to data and hold none."""


def _files_below(folder: Path, without: set[Path], unread: list[str]) -> list[str]:
    if (folder / "dataset_info.json").is_file():
        return [str(folder)]
    there = [path for path in sorted(folder.iterdir()) if not _ABOUT_DATA.fullmatch(path.name)]
    folders = [path for path in there if path.is_dir() and not (path / "config.json").is_file()]  # that is a model
    files = [path for path in there if path.is_file() and _format_of(path.name) in (*FORMATS, ".pkl")]
    others = {Path(path) for path in _other_splits(map(str, files + folders), in_folder=True)}
    kept = [str(path) for path in files if path not in others and path.resolve() not in without]
    below = [path for path in folders if path not in others and kept and _files_below(path, without, [])]
    unknown = [path for path in there if path.is_file() and path not in files]
    unread += [str(path) for path in [*unknown, *sorted(others), *below] if path.resolve() not in without]
    return kept or [file for path in folders if path not in others for file in _files_below(path, without, unread)]


def _other_splits(paths: Iterable[str], in_folder: bool = False) -> list[str]:
    """Those of some files or folders that are test or validation splits of a data set whose training rows are among them;
    in a folder also `test` by itself, beside other files."""
    stems = {path: re.sub(r"-\d+-of-\d+.*|(\.\w+){1,2}$", "", os.path.abspath(path)).lower() for path in paths}
    pattern = r"(?P<head>.*[-_./])(test|testing|validation|valid|val|dev|eval)(?P<tail>[-_][^/]*)?"
    named = {path: match for path, stem in stems.items() if (match := re.fullmatch(pattern, stem))}
    rest = {stem for path, stem in stems.items() if path not in named}
    others = []
    for path, match in named.items():
        head, tail = match["head"], match["tail"] or ""
        is_alone = in_folder and head.endswith("/") and not tail and rest
        if is_alone or rest & {f"{head}train{tail}", head.rstrip("-_.") + tail}:
            others.append(path)
    return others


# --- all sources together ------------------------------------------------------------------------------------


class _Reader:
    """Reads sources and keeps what there is to say about them.

    Args:
        columns: Names of columns that are not the usual ones.
        chat: Turns conversations into texts.
        notices: Where to say it.
    """

    def __init__(self, columns: Columns, chat: Chat, notices: list[str]) -> None:
        self.columns, self.chat, self.notices = columns, chat, notices
        self.rows: list[_Row] = []
        self.columns_used: set[str] = set()

    def texts(self, training: Sequence[str], targets: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Prompt and completion of every row, in the order of the sources; what else is known of it goes into `rows`."""
        names = source_names([*training, *targets])
        for source, is_target in [*((file, False) for file in training), *((file, True) for file in targets)]:
            before, found = len(self.rows), self._rows(source, names[source], is_target)
            for prompt, completion, row in progress(found, desc=f"reading {shorten(source, 40)}", unit="row"):
                self.rows.append(row)
                yield prompt, completion
            if len(self.rows) == before:
                raise ValueError(f"{source} is empty: no row could be taken from it")

    def _rows(self, source: str, name: str, is_target: bool) -> Iterator[tuple[str, str, _Row]]:
        """Rows of a source; its first record says which layout it has and which column names the task."""
        records = _records_of(source, use_dev_map=not is_target)
        first = next(records, None)
        if first is None:
            return
        layout = _layout_of(first[1], first[0], self.columns)
        self.columns_used |= {column for column in self.columns if column and column in first[1]}
        task_column = next((column for column in (self.columns.task, *TASK_COLUMNS) if column in first[1]), None)
        # published files name tasks in _task_name: there a row without one is a fault, not a source of its own
        task_column = task_column or (TASK_COLUMNS[0] if layout == ("inputs", "targets") else None)
        counts, hinted = Counter[str](), defaultdict[str, set[str]](set)
        for where, record in itertools.chain([first], records):
            prompt, completion, *key = _texts(layout, record, where, self.chat)
            counts["all"] += 1
            if not completion.strip():
                counts["an empty output and are left out"] += 1
                continue
            counts["no prompt apart from the answer; there the loss is on the whole text"] += not prompt
            task = text_field(record, task_column, where) if task_column else name
            for column in () if task_column or is_target else HINTED_COLUMNS:
                if isinstance(value := record.get(column), str) and len(hinted[column]) <= 100:
                    hinted[column].add(value)
            digest = key_digest(key[0] if key else prompt if prompt.strip() else completion)
            yield prompt, completion, _Row(where, task, digest, _split_of(record, where, is_target), is_target)
        total = counts.pop("all")
        self.notices += [f"{source}: {n:,} of {total:,} rows have {what}" for what, n in counts.items() if n]
        self.notices += [
            f"{source} is read as one task; --task_column {column} would make {len(values)} of it"
            for column, values in hinted.items()
            if 2 <= len(values) <= min(100, total / 2)
        ]


def _split_of(record: Record, where: str, for_target: bool) -> str | None:
    split = record.get("_split")
    if is_missing(split):
        return HALVED if for_target else None
    if split not in (*SPLITS, HALVED):
        raise ValueError(f"{where}: _split is {split!r}, expected one of {', '.join(SPLITS)}")
    return split


def _split_rows(rows: Sequence[_Row], quotas: Callable[[int], tuple[int, int]], most: int) -> list[str]:
    """A split for every row: its own, or the one of its key, which is the same in all tasks."""
    given = {row.task: row.where for row in reversed(rows) if row.split}  # where its first row with a split stands
    halved, bare = defaultdict[str, set[bytes]](set), defaultdict[str, set[bytes]](set)
    for row in rows:
        if not row.split and row.task in given:
            raise ValueError(
                f"task {row.task!r}: {row.where} has no split of its own, but {given[row.task]} has one (a field _split or "
                "a dev split map); give one to all rows of a task, or to none"
            )
        if row.split in (None, HALVED):
            (halved if row.split else bare)[row.task].add(row.key)
    halves = stable_sides(halved, lambda n: ((n + 1) // 2, n))
    splits = [halves[row.key] if row.split == HALVED else row.split or "" for row in rows]
    sides = stable_sides(
        bare, quotas, {row.key: side for row, side in zip(rows, splits, strict=True) if side in HELD_OUT}
    )
    # keys that other tasks hold out may be more than a task wants: the rest is neither trained on nor evaluated
    kept: dict[str, set[bytes]] = {}
    for task, keys in bare.items():
        of_side = {side: sorted(key for key in keys if sides[key] == side) for side in SPLITS}
        heldout = (of_side[side][:most] for side in HELD_OUT if of_side["validation"])
        kept[task] = {*of_side["train"], *itertools.chain(*heldout)}
    tested, validated = ({row.task for row, split in zip(rows, splits, strict=True) if split == side} for side in ("test", "validation"))  # fmt: skip
    if only := sorted(tested - validated):
        raise ValueError(f"task {only[0]!r} ({given[only[0]]}) has test rows but no validation rows")
    chosen = (sides[row.key] if not split and row.key in kept[row.task] else split for row, split in zip(rows, splits, strict=True))  # fmt: skip
    return [split or LEFT_OUT for split in chosen]


def load_instruction(
    data_files: Sequence[str | Path],
    target_files: Sequence[str | Path] = (),
    heldout_share: float | None = None,
    max_heldout: int = 50,
    columns: Columns = Columns(),  # noqa: B008 a tuple of three Nones
    load_tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None,
) -> TaskData:
    """Instruction data from files, folders and the hub.

    Rows are divided by `stable_sides` over their prompts (of conversations: the turns before the last), unless they say
    it themselves: in a field `_split`, or by a dev split map beside a pickle, whose rows are halved into validation and
    test. Tasks of `target_files` are targets only: half validation, half test, or as `_split` says; dev split maps beside
    those files are not consulted. Without a column that names tasks, a source is a task by its name (`source_names`).

    Args:
        data_files: Training sources.
        target_files: Sources of targets; one that lies in a folder of `data_files` is a target only.
        heldout_share: Share of a task's prompts that validates, and that tests; by default 0.1, with target files 0.
        max_heldout: At most so many of them.
        columns: Names of columns that are not the usual ones.
        load_tokenizer: Gives the tokenizer whose chat template turns conversations into prompts.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: with file and line or row, what was found and what was expected.
    """
    notices: list[str] = []

    def no_tokenizer() -> PreTrainedTokenizerBase:
        raise ValueError("these data hold messages, which only a model's tokenizer can turn into prompts")

    share = heldout_share if heldout_share is not None else 0.0 if target_files else 0.1
    quotas = heldout_quotas(share, max_heldout)
    targets = [file for source in target_files for file in files_of(str(source), notices=notices)]
    files = [file for source in data_files for file in files_of(str(source), targets, notices)]
    if others := _other_splits(files):
        notices.append(f"test and validation splits of sources are left out: {shorten(', '.join(others), 300)}")
    training = list({os.path.abspath(file): file for file in files if file not in others}.values())
    reader = _Reader(columns, Chat(load_tokenizer or no_tokenizer), notices)
    table = store_texts(reader.texts(training, targets))
    for flag, name in zip(("--task_column", "--prompt_column", "--completion_column"), columns, strict=True):
        if name and name not in reader.columns_used:
            listed = shorten(", ".join([*training, *targets]), 200)
            raise ValueError(f"{flag} {name}: none of {listed} has such a column")
    rows, target_rows = ([row for row in reader.rows if row.is_target == side] for side in (False, True))
    sources = {row.task for row in rows}
    for row in target_rows:
        if row.task in sources or row.split == "train":
            reason = "is a task of the training data too" if row.task in sources else "has _split train"
            raise ValueError(
                f"{row.where}: target {row.task!r} {reason}; tasks of target files are never trained on: leave its rows out "
                "of --data_files, or give them another task"
            )
    splits = [*_split_rows(rows, quotas, max_heldout), *_split_rows(target_rows, quotas, max_heldout)]
    if "train" not in splits:
        raise ValueError(f"no training rows in {', '.join(map(str, data_files)) or 'an empty list of data files'}")
    notices += _about_splits(reader.rows, splits, share)
    examples = StoredExamples(table, [row.task for row in reader.rows], splits)
    return TaskData(examples, (*notices, *reader.chat.notices))


def _about_splits(rows: Sequence[_Row], splits: Sequence[str], share: float) -> Iterator[str]:
    """What a user should know of who is trained on and who is held out."""
    keys = {side: {row.key for row, split in zip(rows, splits, strict=True) if split == side} for side in SPLITS}
    held_out = keys["validation"] | keys["test"]
    if overlap := len(held_out & keys["train"]):
        yield f"{overlap:,} of {len(held_out):,} held-out prompts are trained on too: losses on them say little of new ones"
    if left_out := splits.count(LEFT_OUT):
        yield f"{left_out:,} rows are left out: other tasks hold out their prompts, and their own task has enough of them"
    sources = {row.task for row in rows if not row.is_target}
    bare = sorted(sources - {row.task for row, split in zip(rows, splits, strict=True) if split == "validation"})
    if share and bare:
        yield (
            f"{len(bare)} of {len(sources)} tasks have no held-out rows (too few distinct prompts, or nothing in "
            f"the dev split map) and are no targets: {shorten(', '.join(bare), 200)}"
        )
