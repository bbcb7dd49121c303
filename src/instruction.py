"""Read the instruction track's examples: `FORMATS` maps a source to its records, `LAYOUTS` a record's columns to a prompt
and a completion."""

from __future__ import annotations

import codecs
import contextlib
import csv
import datetime
import functools
import io
import itertools
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from src.artifacts import MANIFEST, shorten, source_names
from src.console import progress
from src.data import (
    HELD_OUT,
    SPLITS,
    TEXT,
    StoredExamples,
    TaskData,
    heldout_quotas,
    is_missing,
    key_digest,
    require_file,
    stable_sides,
    store_rows,
    text_field,
    unchanged,
)
from src.frames import read_pickle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Record = Mapping[str, Any]
TASK_COLUMNS = ("_task_name", "skill", "task")
"""Columns that name a row's task where `Columns.task` does not; the first that is there."""
HINTED_COLUMNS = ("source", "dataset", "category", "subset", "domain", "subject", "topic", "config")
"""Columns that are pointed out where a source is read as one task: few values in them may well be tasks."""
HALVED = "validation or test"
"""In place of a row's split: held out; half of a task's distinct keys validate, half test."""
TEXTS = ("prompt", "completion", "messages", "task", "split", "where")
ROWS = pa.schema([*((name, TEXT) for name in TEXTS), ("key", pa.binary())])
"""Rows as they are stored: `messages` is a conversation with its tools as JSON, or null; `split` is what the row says itself,
HALVED, or null; `where` is its file and line, for what is said of it; rows of equal `key` are on one side."""


class Columns(NamedTuple):
    """Column names given by the user."""

    task: str | None = None
    prompt: str | None = None
    completion: str | None = None


# --- conversations -------------------------------------------------------------------------------------------

ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
ROLES["observation"] = "tool"
"""Names that roles have in published conversations -> what chat templates call them."""
TEMPLATE_DATE = datetime.date(2024, 7, 26)
"""What templates take for today, so that rows are the same on any day."""


def _plain(value: Any, name: str = "") -> Any:
    """Drop the nulls of columnar files, and parse JSON that is held in texts."""
    if isinstance(value, str) and name in ("messages", "tools", "arguments"):
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
    if isinstance(value, Mapping):
        return {key: _plain(item, key) for key, item in value.items() if not is_missing(item)}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _turn(turn: Any, where: str, is_last: bool) -> dict[str, Any]:
    """A turn with `role` and `content` as chat templates take them, and with what else it has."""
    turn = dict(turn) if isinstance(turn, dict) else {"": turn}
    role, content = turn.pop("role", turn.pop("from", None)), turn.pop("content", turn.pop("value", None))
    if not isinstance(role, str):
        raise ValueError(f"{where} is {shorten(turn)}, expected an object with role and content, or from and value")
    role, calls = ROLES.get(role, role), bool(turn.get("tool_calls"))
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    if calls and content is None:
        return {"role": role, **turn}
    if not isinstance(content, str) or not (content.strip() or calls or is_last or role == "system"):
        raise ValueError(f"{where} ({role}) has content {shorten(json.dumps(content, default=str))}, expected text")
    return {"role": role, "content": content, **turn}


class Chat:
    """Conversations as a prompt and a completion, by the chat template of a tokenizer, loaded for the first of them."""

    def __init__(self, load_tokenizer: Callable[[], PreTrainedTokenizerBase]) -> None:
        self._tokenizer = functools.cache(load_tokenizer)
        self.notices: dict[str, None] = {}

    def texts(self, messages: Any, where: str, tools: Any = None) -> tuple[str, str, str, str]:
        """Everything up to the last turn; that turn, which must be the assistant's; what identifies the prompt whatever the
        template: its turns and tools; and all of them as JSON. ValueError: no such conversation, no template takes it."""
        given = _plain({"messages": messages, "tools": tools})
        messages, tools = given.get("messages"), given.get("tools") or None
        if not isinstance(messages, list) or len(messages) < 2:
            raise ValueError(f"{where}: messages is {shorten(messages)}, expected two or more turns with role, content")
        turns = [_turn(turn, f"{where}: turn {n}", n == len(messages)) for n, turn in enumerate(messages, 1)]
        *before, last = turns
        if last["role"] != "assistant":
            raise ValueError(f"{where}: the last of its messages is by {last['role']!r}, expected 'assistant'")
        is_question = len(before) == 1 and not tools and before[0]["role"] == "user"
        key = before[0].get("content", "") if is_question else json.dumps([before, tools], sort_keys=True)
        if not last.get("content", "").strip() and not last.get("tool_calls"):
            return "", "", key, ""
        prompt, whole = self._render(before, tools, where, True), self._render(turns, tools, where, False)
        if not whole.startswith(prompt):  # a template that opens the assistant's turn in another way
            whole = prompt + text_field(last, "content", where)
        tokenizer = self._tokenizer()
        completion = whole[len(prompt) :].rstrip().removesuffix(tokenizer.eos_token or "")
        if tokenizer.bos_token and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:  # it adds one itself
            prompt = prompt.removeprefix(tokenizer.bos_token)
        text_field({"the conversation": prompt + completion}, "the conversation", where)
        return prompt, completion, key, json.dumps({"messages": turns} | ({"tools": tools} if tools else {}))

    def _render(self, turns: list[dict], tools: list | None, where: str, opened: bool) -> str:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        tokenizer = self._tokenizer()
        whose = f"{where}: the tokenizer of {tokenizer.name_or_path}"
        if not tokenizer.chat_template:
            raise ValueError(f"{whose} has no chat template; take a chat model, or give columns prompt and completion")
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
                f"({_first_line(error)}); correct the row (a system text can stand in front of the first user turn's) or "
                "leave it out, or take a model whose template does"
            ) from error

    def _date(self, pattern: str) -> str:
        self.notices[f"the chat template writes the date: it is {TEMPLATE_DATE} for all rows, on any day"] = None
        return TEMPLATE_DATE.strftime(pattern)


# --- layouts -------------------------------------------------------------------------------------------------

LAYOUTS: tuple[tuple[str, ...], ...] = (
    *(("inputs", "targets"), ("prompt", "completion"), ("messages",), ("conversations",), ("conversation",)),
    *(("skill", "text"), ("instruction", "output"), ("instruction", "response")),
    *(("question", "answer"), ("query", "response"), ("input", "output")),
)
"""Columns that a source has, as `_texts` makes a prompt and a completion of them; the first that fits."""


def _layout_of(record: Record, where: str, columns: Columns) -> tuple[str, ...]:
    """The layout of a source by its first record; a source without the columns that the user named has its own."""
    if {columns.prompt, columns.completion} & set(record):
        named = (columns.prompt or "prompt", columns.completion or "completion")
        return named[:1] if isinstance(record.get(named[0]), list) else named
    # the nearest layout names the column that a record lacks
    layout = max(LAYOUTS, key=lambda names: 9 if set(names) <= set(record) else len(set(names) & set(record)))
    if not set(layout) & set(record):
        known = "; ".join(map(" and ".join, LAYOUTS))
        expected = f"expected {known}, or name yours with --prompt_column and --completion_column"
        raise ValueError(f"{where} has the columns {shorten(', '.join(map(str, record)))}; {expected}")
    return layout


def _texts(layout: tuple[str, ...], record: Record, where: str, chat: Chat) -> tuple[str, str, str, str | None]:
    """Prompt, completion (empty: the row is left out), the key that decides the split: mostly the prompt; the conversation."""

    def text(field: str) -> str:
        is_null = field in record and is_missing(record[field])
        return "" if is_null and field != layout[0] else text_field(record, field, where, allow_empty=True)

    match layout:
        case (column,):
            return chat.texts(record.get(column), where, record.get("tools"))
        case ("skill", "text"):  # the published frames: a text that ends with the output, if there is one
            whole, output = text_field(record, "text", where), text("output") if "output" in record else None
            prompt = whole.removesuffix(output) if output and whole.endswith(output) else ""
            completion = whole[len(prompt) :] if output is None or output.strip() else ""
        case ("instruction", answer):  # Alpaca and Dolly: a line for the instruction, and one for what is given with it
            name = "input" if answer == "output" else "context"
            given = record.get(name)
            given = "" if is_missing(given) else str(given) if isinstance(given, (int, float)) else text(name)
            prompt, completion = "".join(f"{part}\n" for part in (text("instruction"), given) if part), text(answer)
        case (question, answer):
            prompt, completion = text(question), text(answer)
            if question == "inputs" and not (prompt.endswith("\n") or prompt.rstrip().endswith(":")):
                prompt += "\n"  # FLAN: the prompt is ended so that the answer can follow
    return prompt, completion, prompt if prompt.strip() else completion, None


# --- files ---------------------------------------------------------------------------------------------------


def _opened(source: str) -> io.BufferedReader:
    stream = pa.input_stream(require_file(Path(source)), COMPRESSED.get(Path(source).suffix.lower()))
    return io.BufferedReader(cast(io.RawIOBase, stream))


def _numbered(source: str, records: Iterable[Any], place: str = "row") -> Iterator[tuple[str, Any]]:
    return ((f"{source}, {place} {number}", record) for number, record in enumerate(records, start=1))


def _json_value(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        expected = "an object per line, or an array of objects"
        raise ValueError(f"{where} is not JSON in UTF-8 ({error}); expected {expected}") from error


def _json_records(source: str) -> Iterator[tuple[str, Record]]:
    """An object per line, or one array of objects."""
    with _opened(source) as file:
        if re.match(rb"\[|\{\s*\n", file.peek(4096).removeprefix(codecs.BOM_UTF8).lstrip()):
            whole = _json_value(file.read(), source)
            if not isinstance(whole, list):
                raise ValueError(f"{source} holds one object, expected rows: one object per line, or an array of them")
            values = _numbered(source, whole)
        else:
            lines = _numbered(source, file, "line")
            values = ((where, _json_value(line, where)) for where, line in lines if line.strip())
        for where, record in values:
            if not isinstance(record, dict):
                raise ValueError(f"{where} holds {shorten(record)}, expected an object with a field for each column")
            yield where, record


def _csv_records(source: str) -> Iterator[tuple[str, Record]]:
    """Read every field as text: `02` is not a number and `NA` is not missing. Fields are separated by
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
                expected = f"the first line names {len(header)} columns ({', '.join(header)})"
                cure = "give each row as many, with quotation marks around a text that holds the separator"
                raise ValueError(f"{where} has {len(fields)} fields, and {expected}; {cure}")
            yield where, dict(zip(header, fields, strict=False))


def _parquet_records(source: str) -> Iterator[tuple[str, Record]]:
    with pq.ParquetFile(require_file(Path(source))) as file:
        yield from _numbered(source, (row for batch in file.iter_batches(1000) for row in batch.to_pylist()))


def _pickle_records(source: str, use_dev_map: bool) -> Iterator[tuple[str, Record]]:
    """Rows of a pickled frame. A dev split map beside it decides their splits, whatever their prompts."""
    frame, path = read_pickle(source), Path(source)
    if isinstance(frame, dict):
        raise ValueError(f"{source} holds no columns, expected a DataFrame with the columns skill and text")
    maps = [path.with_name(f"{stem}_dev_split_map.pkl") for stem in (path.stem, path.stem.removesuffix("_final"))]
    found = [candidate for candidate in maps if use_dev_map and candidate.is_file()][:1]
    splits: dict[Any, str] = {}
    for dev_map in map(read_pickle, found):
        splits = dict.fromkeys(frame.index, "train")
        if not isinstance(dev_map, dict) or len(splits) < len(frame) or "_split" in frame or "skill" not in frame:
            expected = f"must hold a dict from skill to index labels, and {source} a column skill and no column _split"
            raise ValueError(f"{found[0]} {expected}, with labels that do not repeat; correct them, or remove the map")
        for skill, label in ((skill, label) for skill, labels in dev_map.items() for label in labels):
            if label not in splits or frame["skill"].at[label] != skill:
                wrong = f"holds out row {label!r} of skill {skill!r}, but {source} has no such row of that skill"
                raise ValueError(f"{found[0]} {wrong}; give the map of this file, or remove it to split by prompts")
            splits[label] = HALVED
    for (where, record), label in zip(_numbered(source, frame.to_dict("records")), frame.index, strict=True):
        yield f"{where} (index label {label!r})", record | ({"_split": splits[label]} if splits else {})


def _hub_records(source: str) -> Iterator[tuple[str, Record]]:
    """`name`, `organisation/name` or `organisation/name/configuration` on the hub, with `:split` behind it where that is not
    train."""
    name, _, split = source.partition(":")
    *organisation, name = name.split("/", 1)
    name, *configuration = name.split("/", 1)
    import datasets

    try:
        stream = datasets.load_dataset(
            "/".join([*organisation, name]), *configuration, split=split or "train", streaming=True
        )
    except Exception as error:  # whatever the network, the hub or the data set's own files raise
        found = f"no such file or folder, and as a data set on the hub it cannot be opened ({_first_line(error)})"
        raise FileNotFoundError(f"{source}: {found}") from error
    yield from _numbered(source, stream)


FORMATS: dict[str, Callable[[str], Iterator[tuple[str, Record]]]] = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), _json_records),
    **dict.fromkeys((".csv", ".tsv"), _csv_records),
    ".parquet": _parquet_records,
}
"""Ending of a file's name, without .gz -> its records, each with its place. A new format is an entry here."""
COMPRESSED = {".gz": "gzip"}


def _format_of(name: str) -> str:
    path = Path(name.lower())
    return path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix


def _records_of(source: str, use_dev_map: bool) -> Iterator[tuple[str, Record]]:
    """Records of a source, each with where it stands; whatever a damaged file raises in the libraries is one error."""
    try:
        with unchanged(Path(source)):
            if Path(source).is_dir():
                import datasets

                records = _numbered(source, cast(datasets.Dataset, datasets.load_from_disk(source)).with_format(None))
            elif _format_of(source) == ".pkl":
                records = _pickle_records(source, use_dev_map)
            elif reader := FORMATS.get(_format_of(source)):
                records = reader(source)
            elif re.fullmatch(r"(?!.*\.[A-Za-z]\w*$)[\w.-]+(/[\w.-]+){0,2}(:\w+)?", source):  # not named like a file
                records = _hub_records(source)
            else:
                known = f"files that end in {', '.join(FORMATS)} or .pkl, folders of them or of save_to_disk, hub ids"
                raise ValueError(f"{source}: instruction data are {known}")
            yield from records
    except Exception as error:
        if type(error) in (ValueError, FileNotFoundError):  # our own
            raise
        raise ValueError(f"{source} cannot be read ({_first_line(error)}); write it again") from error


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return shorten((str(cause).strip() or type(cause).__name__).splitlines()[0], 200)


# --- folders -------------------------------------------------------------------------------------------------

_ABOUT_DATA = rf"(?i)\..*|(readme|licen[sc]e).*|.*\.(md|py)|.*_dev_split_map\.pkl|dataset_(infos|dict)\.json|{MANIFEST}"
"""Names of files that belong to data and hold none."""


def files_of(source: str, without: Sequence[str] = (), notices: list[str] | None = None) -> list[str]:
    """List the data files of a folder, sorted, without some; any other source is returned as it is.

    A folder without data files of its own is read as its sub-folders are. What is not read is named in `notices`: other
    endings, sub-folders beside data files, and a data set's test and validation splits. ValueError: no data files.
    """
    if not Path(source).is_dir():
        return [source]
    found = _files_below(Path(source), {Path(file).resolve() for file in without}, [] if notices is None else notices)
    if not found:
        expected = f"files that end in {', '.join(FORMATS)} or .pkl in it, or what the save_to_disk of datasets writes"
        raise ValueError(f"{source} is a folder without data files; expected {expected}")
    return found


def _files_below(folder: Path, without: set[Path], notices: list[str]) -> list[str]:
    if (folder / "dataset_info.json").is_file():
        return [str(folder)]
    there = [path for path in sorted(folder.iterdir()) if not re.fullmatch(_ABOUT_DATA, path.name)]
    there = [
        path for path in there if path.resolve() not in without and not (path / "config.json").is_file()
    ]  # a model
    known = [str(path) for path in there if path.is_dir() or _format_of(path.name) in (*FORMATS, ".pkl")]
    kept = [path for path in known if path not in _other_splits(known, in_folder=True)]
    files = [path for path in kept if os.path.isfile(path)] or kept
    if unread := [str(path) for path in there if str(path) not in files]:
        notices.append(f"in the folder {folder} these are not read: {shorten(', '.join(unread), 300)}")
    below = (_files_below(Path(path), without, notices) if os.path.isdir(path) else [path] for path in files)
    return [*itertools.chain.from_iterable(below)]


def _other_splits(paths: Iterable[str], in_folder: bool = False) -> list[str]:
    """Those of some files or folders that are test or validation splits of a data set whose training rows are among them;
    in a folder also `test` by itself, beside other files."""
    stems = {path: re.sub(r"-\d+-of-\d+.*|(\.\w+){1,2}$", "", os.path.abspath(path)).lower() for path in paths}
    pattern = re.compile(r"(.*[-_./])(?:test|testing|validation|valid|val|dev|eval)([-_.][^/]*|)")
    found = {path: match.groups() for path, stem in stems.items() if (match := pattern.fullmatch(stem))}
    rest = {stem for path, stem in stems.items() if path not in found or found[path][1]}
    beside = {head for head, end in found.values() if in_folder and rest and head.endswith("/") and not end}
    return [path for path, (head, end) in found.items() if (not end and head in beside)
            or rest & {f"{head}train{end}", head.rstrip("-_.") if not end else ""}]  # fmt: skip


# --- all sources together ------------------------------------------------------------------------------------


@dataclass
class _Reader:
    """Reads sources and collects notices about them."""

    columns: Columns
    chat: Chat
    names: Mapping[str, str]  # of sources
    notices: list[str]
    columns_used: set[str | None] = field(default_factory=set)

    def table(self, sources: Sequence[str], is_target: bool) -> pa.Table:
        """Rows of sources, as `ROWS` says, in their order."""
        rows = ((source, self.rows(source, is_target)) for source in sources)
        bars = (progress(found, desc=f"reading {shorten(source, 40)}", unit="row") for source, found in rows)
        return store_rows(itertools.chain.from_iterable(bars), ROWS)

    def rows(self, source: str, is_target: bool) -> Iterator[tuple]:
        """The first record decides which layout the source has and which column names the task."""
        counts, hinted = Counter[str](), defaultdict[str, set[str]](set)
        empty = "an empty output and are left out"
        bare = "no prompt apart from the answer; there the loss is on the whole text"
        for where, record in _records_of(source, use_dev_map=not is_target):
            if not counts:
                layout = _layout_of(record, where, self.columns)
                self.columns_used.update(set(self.columns) & set(record))
                task_column = next((name for name in (self.columns.task, *TASK_COLUMNS) if name in record), None)
                if layout == ("inputs", "targets"):  # published files name tasks in each row
                    task_column = task_column or TASK_COLUMNS[0]
                if not Path(source).exists():  # of the hub: nobody has looked at its columns here
                    of_task = f"tasks from {task_column}" if task_column else "one task"
                    given = [name for name in ("input", "context") if name in record and layout[0] == "instruction"]
                    self.notices.append(
                        f"{source}: texts from {', '.join([layout[0], *given, *layout[1:]])}; {of_task}"
                    )
            prompt, completion, key, messages = _texts(layout, record, where, self.chat)
            counts["all"] += 1
            if not completion.strip():
                counts[empty] += 1
                continue
            counts[bare] += not prompt
            task = text_field(record, task_column, where) if task_column else self.names[source]
            for column in () if task_column or is_target else HINTED_COLUMNS:
                if isinstance(value := record.get(column), str) and len(hinted[column]) <= 100:
                    hinted[column].add(value)
            split = record.get("_split")
            if is_missing(split):
                split = HALVED if is_target else None
            elif split not in (*SPLITS, HALVED):
                raise ValueError(f"{where}: _split is {split!r}, expected one of {', '.join(SPLITS)}")
            yield prompt, completion, messages, task, split, where, key_digest(key)
        if counts["all"] == counts[empty]:
            raise ValueError(f"{source} is empty: no row could be taken from it")
        for what in (bare, empty):
            if counts[what]:
                self.notices.append(f"{source}: {counts[what]:,} of {counts['all']:,} rows have {what}")
        for column, values in hinted.items():
            if 2 <= len(values) <= min(100, counts["all"] / 2):
                made = f"--task_column {column} would make {len(values)} of it"
                self.notices.append(f"{source} is read as one task; {made}")


def _split_rows(rows: pa.Table, quotas: Callable[[int], tuple[int, int]]) -> list[str]:
    """A split for every row: its own, or the one of its key, which is the same in all tasks."""
    tasks, given, keys = (rows[name].to_pylist() for name in ("task", "split", "key"))
    where = {task: rows["where"][row] for row, task in reversed([*enumerate(tasks)]) if given[row]}
    bare, halved = defaultdict[str, set[bytes]](set), defaultdict[str, set[bytes]](set)
    for row, (task, split, key) in enumerate(zip(tasks, given, keys, strict=True)):
        if not split and task in where:
            found = f"{rows['where'][row]} has no split of its own, but {where[task]} has one"
            cure = "give one (a field _split, a dev split map) to all rows of a task, or to none"
            raise ValueError(f"task {task!r}: {found}; {cure}")
        if split in (None, HALVED):
            (halved if split else bare)[task].add(key)
    halves = stable_sides(halved, lambda n: ((n + 1) // 2, n))
    splits = [halves[key] if split == HALVED else split for split, key in zip(given, keys, strict=True)]
    pairs = set(zip(tasks, splits, strict=True))
    for task in sorted(task for task, split in pairs if split == "test" and (task, "validation") not in pairs):
        raise ValueError(f"task {task!r} ({where[task]}) has test rows but no validation rows")
    decided = {key: split for key, split in zip(keys, splits, strict=True) if split in HELD_OUT}
    side_of = stable_sides(bare, quotas, decided)
    return [split or side_of[key] for key, split in zip(keys, splits, strict=True)]


def load_instruction(
    data_files: Sequence[str | Path],
    target_files: Sequence[str | Path] = (),
    heldout_share: float | None = None,
    max_heldout: int = 50,
    columns: Columns = Columns(),  # noqa: B008 a tuple of three Nones
    load_tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None,
) -> TaskData:
    """Instruction data from files, folders and the hub.

    Of each task `heldout_share` of the prompts (by default 0.1; 0 with target files), at most `max_heldout`, validates and
    as many test, as `stable_sides` chooses; or as rows say themselves: in a field `_split`, or by a dev split map beside a
    pickle, whose rows are halved. Tasks of `target_files` are targets only: half validation, half test, or as `_split`
    says. Without a column that names tasks, a source is a task by its name (`source_names`). The tokenizer's chat template
    turns conversations into prompts. FileNotFoundError: a file does not exist. ValueError: with file and line or row, what
    was found and what was expected.
    """

    def no_tokenizer() -> PreTrainedTokenizerBase:
        raise ValueError("these data hold messages, which only a model's tokenizer can turn into prompts")

    notices: list[str] = []
    share = heldout_share if heldout_share is not None else 0.0 if target_files else 0.1
    quotas = heldout_quotas(share, max_heldout)
    targets = [file for source in target_files for file in files_of(str(source), notices=notices)]
    files = [file for source in data_files for file in files_of(str(source), targets, notices)]
    if others := _other_splits(files):
        notices.append(f"test and validation splits of sources are left out: {shorten(', '.join(others), 300)}")
    training = list({os.path.abspath(file): file for file in files if file not in others}.values())
    chat = Chat(load_tokenizer or no_tokenizer)
    reader = _Reader(columns, chat, source_names([*training, *targets]), notices)
    rows, target_rows = reader.table(training, False), reader.table(targets, True)
    for flag, name in zip(("--task_column", "--prompt_column", "--completion_column"), columns, strict=True):
        if name and name not in reader.columns_used:
            listed = shorten(", ".join([*training, *targets]), 200)
            raise ValueError(f"{flag} {name}: none of {listed} has such a column")
    sources = set(rows["task"].to_pylist())
    for row, (task, split) in enumerate(zip(*(target_rows[c].to_pylist() for c in ("task", "split")), strict=True)):
        if task in sources or split == "train":
            reason = "is a task of the training data too" if task in sources else "has _split train"
            cure = "tasks of target files are never trained on: leave its rows out of --data_files, or give them another task"
            raise ValueError(f"{target_rows['where'][row]}: target {task!r} {reason}; {cure}")
    splits = [*_split_rows(rows, quotas), *_split_rows(target_rows, quotas)]
    if "train" not in splits:
        raise ValueError(f"no training rows in {', '.join(map(str, data_files)) or 'an empty list of data files'}")
    table = pa.concat_tables([rows, target_rows])

    found = list(zip(table["task"].to_pylist(), table["key"].to_pylist(), splits, strict=True))
    heldout = {key for _, key, split in found if split in HELD_OUT}
    if overlap := len(heldout & {key for _, key, split in found if split == "train"}):
        what = "held-out prompts are trained on too: losses on them say little of new ones"
        notices.append(f"{overlap:,} of {len(heldout):,} {what}")
    if share and (bare := sorted(sources - {task for task, _, split in found if split == "validation"})):
        what = "tasks have no held-out rows (too few distinct prompts, or none in the dev split map) and are no targets"
        notices.append(f"{len(bare)} of {len(sources)} {what}: {shorten(', '.join(bare), 200)}")
    examples = StoredExamples(table.select(["prompt", "completion", "task"])).with_columns(split=splits)
    return TaskData(examples, (*notices, *chat.notices), messages=table["messages"])
