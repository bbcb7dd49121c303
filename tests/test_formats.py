"""Users' data as they have it: every format and layout gives the rows that FLAN-layout jsonl gives."""

import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import pandas as pd
import pytest
from transformers import PreTrainedTokenizerFast

from src.data import TaskData
from src.instruction import Chat, Columns, load_instruction
from src.models import load_tokenizer
from tests.commands import refused, write_jsonl
from tests.conftest import character_tokenizer, write_sources


def texts(data: TaskData) -> list[tuple[str, ...]]:
    """What matters of every row."""
    return [(row.task, row.split, row.prompt, row.completion) for row in data.examples]


@pytest.fixture
def frame(tmp_path):
    """Rows of two tasks whose prompts end with a line break, as FLAN's are made to."""
    lines = write_sources(tmp_path / "flan.jsonl", {"a": 12, "b": 9}).read_text().splitlines()
    rows = pd.DataFrame([json.loads(line) for line in lines])[["inputs", "targets", "_task_name"]]
    return rows.assign(inputs=rows["inputs"] + " é\n2 \"x\", 'y'\n")


def saved_dict(frame: pd.DataFrame, path: Path) -> None:
    """A folder of several splits."""
    train, test = (datasets.Dataset.from_pandas(part) for part in (frame, frame.head(2)))
    datasets.DatasetDict(train=train, test=test).save_to_disk(path)


def pickled(frame: pd.DataFrame, path: Path) -> None:
    frame.assign(skill=frame["_task_name"], text=frame["inputs"] + frame["targets"]).to_pickle(path)


FORMATS: dict[str, Callable[[pd.DataFrame, Path], object]] = {
    "rows.jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "rows.jsonl.gz": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "rows.parquet": lambda frame, path: frame.to_parquet(path),
    "rows.csv": lambda frame, path: frame.to_csv(path, index=False),
    "saved": lambda frame, path: datasets.Dataset.from_pandas(frame).save_to_disk(path),
    "splits": saved_dict,
    "rows.pkl": pickled,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(name, frame, tmp_path):
    FORMATS["rows.jsonl"](frame, tmp_path / "expected.jsonl")
    FORMATS[name](frame, tmp_path / name)
    expected, found = load_instruction([tmp_path / "expected.jsonl"]), load_instruction([tmp_path / name])
    assert texts(found) == texts(expected) and found.fingerprint == expected.fingerprint
    assert {row.split for row in found.examples} == {"train", "validation", "test"}


def appended(path: Path) -> None:
    with path.open("ab") as file:
        file.write(path.read_bytes()[:200])


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replaced(path: Path) -> None:
    """By one of the same size."""
    other = path.with_name("other")
    other.write_bytes(path.read_bytes().replace(b"alpha", b"omega"))
    os.replace(other, path)


@pytest.mark.parametrize("change", [appended, cut, replaced])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.csv", "rows.parquet"])
def test_a_file_that_changes_while_it_is_read_is_refused(name, change, tmp_path, monkeypatch):
    """Whatever its reader makes of it, or takes no notice of; the same file is read as it is then."""
    lines = write_sources(tmp_path / "flan.jsonl", {"a": 3000}).read_text().splitlines()
    path = tmp_path / name
    FORMATS[name](pd.DataFrame(map(json.loads, lines)), path)
    whole, changes = path.read_bytes(), [change]
    os.utime(path, (1e9, 1e9))

    def reading(rows, **_):
        for position, row in enumerate(rows):
            if position == 5 and changes:
                changes.pop()(path)
            yield row

    monkeypatch.setattr("src.instruction.progress", reading)
    message = rf"^\S*{re.escape(name)} was changed while it was read; run the command again when it is complete$"
    refused(message, load_instruction, [path])
    assert not changes
    path.write_bytes(whole)
    assert len(load_instruction([path])) == 3000


def test_a_later_turn_is_part_of_the_prompt_and_special_tokens_are_not_doubled():
    tokenizer = character_tokenizer(end_appended=False)
    tokenizer.chat_template = CALLING.replace("{{ m.content or '' }}", "{{ m.content }}{{ eos_token }}")
    turns = said(*((role, role[0]) for role in ("system", "user", "assistant", "user", "assistant")))
    prompt, completion, *_ = Chat(lambda: tokenizer).texts(turns, "here")
    assert prompt.count("<assistant>") == 2 and prompt.endswith("<assistant>") and completion == "a"


CHAT = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
BAD = {
    "no layout": ({"ask": "x", "reply": "y"}, r" has the columns ask, reply; expected inputs and targets"),
    "half a layout": ({"prompt": "x", "reply": "y"}, r": there is no field 'completion'"),
    "a list as input": ({"instruction": "x", "input": ["y"], "output": "z"}, r": input is \['y'\], expected text"),
    "no template": (CHAT, r": the tokenizer of .* has no chat template.*columns prompt and completion"),
    "no answer": ({"messages": [*CHAT["messages"], CHAT["messages"][0]]}, r"last of its messages is by 'user', expected 'assistant'"),
    "no turns": ({"messages": "x"}, r": messages is x, expected two or more turns"),
    "one turn": ({"messages": CHAT["messages"][1:]}, r": messages is \[.*expected two or more turns"),
    "no role": ({"messages": [{"content": "x"}, CHAT["messages"][1]]}, r": turn 1 is .*expected an object with role"),
    "null": ({"messages": [CHAT["messages"][0], {"role": "assistant", "content": None}]}, r"turn 2 \(assistant\) has content null"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, CHAT["messages"][1]]}, r"turn 1 \(user\) has content .*image"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors_name_file_row_and_column(case, tmp_path, model_folders):
    row, message = BAD[case]
    path, tokenizer = write_jsonl(tmp_path / "bad.jsonl", [row]), lambda: load_tokenizer(model_folders["llama"])
    refused(rf"bad\.jsonl, line 1.*{message}", load_instruction, [path], load_tokenizer=tokenizer)


def test_damaged_sources_are_named(frame, tmp_path, workspace):
    FORMATS["rows.parquet"](frame, tmp_path / "cut.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "cut.parquet").read_bytes()[:-40])
    (tmp_path / "latin.csv").write_bytes("prompt,completion\nx,\xe9\n".encode("latin-1"))
    (tmp_path / "ragged.csv").write_text('prompt,completion\nx,y\nx,y,z,"u\n')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "x", "completion": "y"}\n' * 99)[:-9])
    for name in ("cut.parquet", "latin.csv", "ragged.csv", "cut.jsonl.gz"):
        refused(rf"{name} cannot be read \(.*\); write it again", load_instruction, [tmp_path / name])
    message = r"^nobody/nothing:train: no such file .* data set on the hub"
    refused(message, load_instruction, ["nobody/nothing:train"], error=FileNotFoundError)
    FORMATS["rows.parquet"](frame.assign(inputs=None), tmp_path / "gap.parquet")
    refused("row 1: inputs is None, expected text", load_instruction, [tmp_path / "gap.parquet"])


ON_THE_HUB = {"org/math:test": ("org/math", "test"), "squad": ("squad", "train"), "org/math/main": ("org/math", "main", "train")}  # fmt: skip


@pytest.mark.parametrize(("source", "asked"), ON_THE_HUB.items())
def test_a_data_set_on_the_hub_is_read_and_its_columns_named(source, asked, workspace, monkeypatch):
    calls, rows = [], [{"instruction": f"q{n}", "input": "", "output": f"a{n}", "skill": "sums"} for n in range(9)]
    monkeypatch.setattr("datasets.load_dataset", lambda *names, split, streaming: calls.append((*names, split)) or rows)
    data = load_instruction([source])
    assert calls == [asked] and data.tasks == ("sums",) and len(data) == 9
    assert f"{source}: texts from instruction, input, output; tasks from skill" in data.notices


def pairs(count: int = 20) -> list[dict]:
    return [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(count)]


def said(*turns: tuple[str, object]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"q": "x"}'}}
TOLD = "<system>s\n<user>q\n<assistant>"
WRITTEN: dict[str, tuple[str | bytes, str, str]] = {
    "bom.jsonl": (b'\xef\xbb\xbf{"prompt": "q", "completion": "a"}\n', "q", "a"),
    "bom.json": (b'\xef\xbb\xbf\n [{"prompt": "q", "completion": "a"}]', "q", "a"),
    "array.json": (json.dumps([{"instruction": "q", "input": "", "output": "a"}], indent=4), "q\n", "a"),
    "array.jsonl": (json.dumps([{"instruction": "q", "output": "a"}]), "q\n", "a"),
    "nan.jsonl": (json.dumps({"instruction": "q", "input": float("nan"), "output": "a"}), "q\n", "a"),
    "zero.jsonl": (json.dumps({"instruction": "q", "input": 0, "output": "a"}), "q\n0\n", "a"),
    "dolly.jsonl": (json.dumps({"instruction": "q", "context": "c", "response": "a", "category": "x"}), "q\nc\n", "a"),
    "excel.csv": (b'\xef\xbb\xbfprompt;completion\r\n"q, r";02\r\n', "q, r", "02"),
    "lines.csv": ('prompt,completion\n"q\nr",NA\n', "q\nr", "NA"),
    "trailing.csv": ("prompt,completion\nq,a,,\n", "q", "a"),
    "tabs.tsv": ("prompt\tcompletion\nq,r\ta\n", "q,r", "a"),
    "UPPER.JSONL": ('{"prompt": "q", "completion": "a"}', "q", "a"),
    "openai.jsonl": (json.dumps({"messages": said(("system", "s"), ("user", "q"), ("assistant", "a"))}), TOLD, "a"),
    "text.jsonl": (json.dumps({"messages": json.dumps(said(("system", "s"), ("user", "q"), ("assistant", "a")))}), TOLD, "a"),
    "sharegpt.jsonl": (json.dumps({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}), TOLD, "a"),
    "lmsys.jsonl": (json.dumps({"conversation": said(("system", "s"), ("human", "q"), ("gpt", "a"))}), TOLD, "a"),
    "named.jsonl": (json.dumps({"prompt": "q", "completion": "a", "other": "b"}), "q", "a"),
    "parts.jsonl": (json.dumps({"messages": said(("system", "s"), ("user", [{"type": "text", "text": "q"}]), ("assistant", "a"))}), TOLD, "a"),
    "calls.jsonl": (json.dumps({"messages": [*said(("user", "q")), {"role": "assistant", "content": None, "tool_calls": [CALL]}, *said(("tool", "r"), ("assistant", "a"))], "tools": [{"name": "f"}]}),
                    "[f]<user>q\n<assistant>f(x)\n<tool>r\n<assistant>", "a"),
    "last.jsonl": (json.dumps({"messages": [*said(("user", "q")), {"role": "assistant", "content": None, "tool_calls": [CALL]}]}), "<user>q\n<assistant>", "f(x)"),
}  # fmt: skip
CALLING = (
    "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}{% for m in messages %}<{{ m.role }}>"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments.q }}){% endfor %}{{ m.content or '' }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat(template: str = CALLING) -> Callable[[], PreTrainedTokenizerFast]:
    """Gives a tokenizer with a chat template."""
    tokenizer = character_tokenizer(end_appended=False)
    tokenizer.chat_template = template
    return lambda: tokenizer


@pytest.mark.parametrize("name", WRITTEN)
def test_files_are_read_as_tools_write_them(name, tmp_path):
    content, prompt, completion = WRITTEN[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (row,) = load_instruction([tmp_path / name], load_tokenizer=chat()).examples
    assert (row.prompt, row.completion, row.task) == (prompt, completion, name.split(".")[0])


def test_conversations_in_parquet_are_those_in_jsonl(tmp_path):
    """A columnar file has nulls where rows have different keys."""
    asking = {"role": "assistant", "tool_calls": [CALL]}
    turns = [*said(("user", "q")), asking, *said(("tool", "r"), ("assistant", "a"))]
    rows = [{"messages": turns}, {"messages": said(("user", "p"), ("assistant", "b"))}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    found = load_instruction([tmp_path / "rows.parquet"], load_tokenizer=chat())
    assert texts(found) == texts(load_instruction([write_jsonl(tmp_path / "rows.jsonl", rows)], load_tokenizer=chat()))


def test_columns_can_be_named(tmp_path):
    """Those of a layout are that layout."""
    for row, columns, expected in (
        (
            {"instruction": "q", "context": "c", "response": "a"},
            Columns(None, "instruction", "response"),
            ("d", "q\nc\n"),
        ),
        ({"my": "q", "own": "a", "from": "law"}, Columns("from", "my", "own"), ("law", "q")),
    ):
        source = write_jsonl(tmp_path / "d.jsonl", [row])
        (found,) = load_instruction([source], columns=columns).examples
        assert (found.task, found.prompt, found.completion) == (*expected, "a")


def test_a_csv_row_never_shifts(tmp_path):
    for content in ("id,prompt,completion\n0,q,a,note", "id,prompt,completion\nq,a", "prompt,completion\n0,q,a"):
        (tmp_path / "a.csv").write_text(content)
        message = r"a\.csv, row 1 has \d fields, and the first line names \d columns \("
        refused(message, load_instruction, [tmp_path / "a.csv"])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.csv", "saved", "rows.pkl"])
def test_empty_outputs_are_left_out_and_counted_in_every_format(name, frame, tmp_path):
    frame.loc[[2, 5], "targets"] = ["", " "] if name in ("rows.csv", "rows.pkl") else ["", None]
    FORMATS[name](frame, tmp_path / name)
    data = load_instruction([tmp_path / name])
    assert len(data) == len(frame) - 2 and "2 of 21 rows have an empty output and are left out" in data.notices[0]


def test_sources_are_told_apart_by_their_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("law/train", "medicine/train", "code/train", "x/code", "y/code", "same/a", "goal"):
        write_jsonl(Path(f"{name}.jsonl"), pairs())
    Path("same/a.csv").write_text("prompt,completion\nq,a\n")
    three = ["law", "medicine"]
    assert load_instruction([f"{name}/train.jsonl" for name in three]).tasks == ("law", "medicine")
    assert load_instruction([tmp_path / name for name in three], ["goal.jsonl"]).tasks == ("law", "medicine")
    assert load_instruction(["x/code.jsonl", "y", "law"]).tasks == ("law", "x/code", "y/code")
    assert load_instruction(["same"]).tasks == ("same/a.csv", "same/a.jsonl")
    assert load_instruction(["law/train.jsonl", "./law/train.jsonl", tmp_path / "law"]).tasks == ("law",)
    data = load_instruction(["law/train.jsonl"], ["code/train.jsonl"])
    assert (data.tasks, data.targets) == (("law",), ("code",))
    message = "target 'law' is a task of the training data too"
    refused(message, load_instruction, ["law/train.jsonl"], ["./law/train.jsonl"])


SNAPSHOT = ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl")


@pytest.mark.parametrize("source", ["law", "law/data", *[f"law/data/{SNAPSHOT[0]}"]])
def test_shards_are_one_source_and_a_test_split_is_not_trained_on(source, tmp_path):
    for number, name in enumerate(SNAPSHOT):
        rows = [{"prompt": f"{number} {i}", "completion": "a"} for i in range(10)]
        write_jsonl(tmp_path / "law" / "data" / name, rows)
    (tmp_path / "law" / "README.md").write_text("# law")
    is_file = source.endswith("l")
    sources = [tmp_path / "law" / "data" / name for name in SNAPSHOT] if is_file else [tmp_path / source]
    data = load_instruction(sources)
    assert data.tasks == ("law",) and len(data) == 20 and len(data.notices) == 1 and SNAPSHOT[2] in data.notices[0]
    assert load_instruction(sources[:1] if is_file else sources, sources[2:]).targets in (("test",), ("law",), ())


def test_other_splits_beside_their_data_set(tmp_path):
    for name in ("law", "law_test", "unit_test", "mix/train/0000", "mix/validation/0000"):
        write_jsonl(tmp_path / f"{name}.jsonl", pairs())
    data = load_instruction([tmp_path])
    assert data.tasks == ("law", "unit_test") and "law_test.jsonl" in data.notices[0] and "mix" in data.notices[0]
    data = load_instruction([tmp_path / "mix"])
    assert data.tasks == ("mix",) and len(data) == 20 and "validation" in data.notices[0]
    for name in ("train_en", "test_en", "train_de", "test_de", "test_fr", "test_cases"):
        write_jsonl(tmp_path / "pair" / f"{name}.jsonl", pairs())
    data = load_instruction([tmp_path / "pair"])
    assert data.tasks == ("test_cases", "test_fr", "train_de", "train_en")
    assert "test_de" in data.notices[0] and "test_en" in data.notices[0]
    assert load_instruction([tmp_path], [tmp_path / "law_test.jsonl"]).targets == ("law_test",)


def test_what_a_folder_holds_and_is_not_read_is_named(tmp_path):
    for name in ("law.jsonl", "UPPER.JSONL", "packed.jsonl.zst", "rows.xlsx", "sub/extra.jsonl", "model/config.json"):
        write_jsonl(tmp_path / name, pairs())
    data = load_instruction([tmp_path])
    assert data.tasks == ("UPPER", "law") and len(data.notices) == 1
    named = data.notices[0].partition(": ")[2].split(", ")
    assert named == [str(tmp_path / name) for name in ("packed.jsonl.zst", "rows.xlsx", "sub")]


def test_a_task_column_is_for_the_sources_that_have_it(tmp_path):
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [{**row, "source": "ab"[i % 2]} for i, row in enumerate(pairs())])
    goal = write_jsonl(tmp_path / "goal.jsonl", pairs())
    data = load_instruction([mixed], [goal], columns=Columns("source"))
    assert (data.tasks, data.targets) == (("a", "b"), ("goal",))
    data = load_instruction([mixed])
    assert data.tasks == ("mixed",) and "--task_column source would make 2 of it" in data.notices[0]
    message = r"--task_column kind: none of .*mixed\.jsonl, .*goal\.jsonl has such"
    refused(message, load_instruction, [mixed], [goal], columns=Columns("kind"))


def test_splits_and_texts_are_the_same_on_any_day(tmp_path):
    talks = [{"messages": said(("user", f"q{i}"), ("assistant", "a"))} for i in range(20)]
    source = write_jsonl(tmp_path / "chat.jsonl", talks)

    templates = ("{{ strftime_now('%d %b %Y') }}" + CALLING, CALLING)
    dated, undated = (load_instruction([source], load_tokenizer=chat(template)) for template in templates)
    assert dated.examples[0].prompt == "26 Jul 2024<user>q0\n<assistant>"
    assert any("the chat template writes the date: it is 2024-07-26" in notice for notice in dated.notices)
    assert [row.split for row in dated.examples] == [row.split for row in undated.examples]
    assert "date" not in "".join(undated.notices)


def test_what_a_template_raises_names_the_row(tmp_path):
    for reason, template in {
        "System role not supported": "{{ raise_exception('System role not supported') }}",
        "has no attribute 'nothing'": "{{ messages[0].nothing.at_all }}",
        "not iterable": "{% for part in none %}{% endfor %}",
        "unexpected end": "{% for m in messages %}{{ m",
    }.items():
        source = write_jsonl(tmp_path / "chat.jsonl", [CHAT])
        with pytest.raises(ValueError, match=r"chat\.jsonl, line 1: the chat template of .* does not take") as caught:
            load_instruction([source], load_tokenizer=chat(template))
        assert reason in str(caught.value) and "\n" not in str(caught.value)
