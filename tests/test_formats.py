"""Users' data as they have it: every format and layout gives the rows that FLAN-layout jsonl gives."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pandas as pd
import pytest

from src.data import TaskData
from src.instruction import Columns, load_instruction
from src.models import load_tokenizer
from tests.commands import run_script
from tests.conftest import character_tokenizer, write_sources

TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def texts(data: TaskData) -> list[tuple[str, ...]]:
    """What matters of every row."""
    return [(row.task, row.split, row.prompt, row.completion) for row in data.examples]


@pytest.fixture
def frame(tmp_path: Path) -> pd.DataFrame:
    """Rows of two tasks whose prompts end with a line break, as FLAN's are made to."""
    lines = write_sources(tmp_path / "flan.jsonl", {"a": 12, "b": 9}).read_text().splitlines()
    rows = pd.DataFrame([json.loads(line) for line in lines])[["inputs", "targets", "_task_name"]]
    return rows.assign(inputs=rows["inputs"] + " é\n2 \"x\", 'y'\n")


def saved_dict(frame: pd.DataFrame, path: Path) -> None:
    """A folder of several splits."""
    half = datasets.Dataset.from_pandas(frame.head(2))
    datasets.DatasetDict(train=datasets.Dataset.from_pandas(frame), test=half).save_to_disk(path)


def gzipped(frame: pd.DataFrame, path: Path) -> None:
    path.write_bytes(gzip.compress(frame.to_json(orient="records", lines=True).encode()))


FORMATS: dict[str, Callable[[pd.DataFrame, Path], object]] = {
    "rows.jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "rows.jsonl.gz": gzipped,
    "rows.parquet": lambda frame, path: frame.to_parquet(path),
    "rows.csv": lambda frame, path: frame.to_csv(path, index=False),
    "saved": lambda frame, path: datasets.Dataset.from_pandas(frame).save_to_disk(path),
    "splits": saved_dict,
    "rows.pkl": lambda frame, path: frame.assign(skill=frame["_task_name"], text="").assign(
        text=frame["inputs"] + frame["targets"]
    ).to_pickle(path),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(name: str, frame: pd.DataFrame, tmp_path: Path) -> None:
    FORMATS["rows.jsonl"](frame, tmp_path / "expected.jsonl")
    FORMATS[name](frame, tmp_path / name)
    expected, found = load_instruction([tmp_path / "expected.jsonl"]), load_instruction([tmp_path / name])
    assert texts(found) == texts(expected) and found.fingerprint == expected.fingerprint
    assert {row.split for row in found.examples} == {"train", "validation", "test"}


def test_a_changed_file_is_read_anew(frame: pd.DataFrame, tmp_path: Path) -> None:
    """No copy of an earlier state of a file is used, even where name, size and number of rows stay."""
    for name in ("rows.csv", "rows.parquet"):
        FORMATS[name](frame, tmp_path / name)
        first = texts(load_instruction([tmp_path / name]))
        FORMATS[name](frame.assign(targets=frame["targets"].str[::-1]), tmp_path / name)
        second = texts(load_instruction([tmp_path / name]))
        assert [row[3][::-1] for row in second] == [row[3] for row in first] and first != second


@pytest.mark.parametrize("layout", ["prompt", "named", "alpaca", "messages"])
def test_every_layout_gives_the_same_rows(layout: str, frame: pd.DataFrame, tmp_path: Path) -> None:
    expected = texts(load_instruction([write_frame(frame, tmp_path / "expected.jsonl")]))
    prompts, answers, tasks = (frame[name] for name in ("inputs", "targets", "_task_name"))
    columns, tokenizer = Columns(), character_tokenizer(end_appended=False)
    tokenizer.chat_template = TEMPLATE
    if layout == "prompt":
        other = pd.DataFrame({"prompt": prompts, "completion": answers, "task": tasks})
    elif layout == "named":
        other, columns = pd.DataFrame({"q": prompts, "a": answers, "from": tasks}), Columns("from", "q", "a")
    elif layout == "alpaca":
        other = pd.DataFrame({"instruction": prompts.str[:-1], "input": "", "output": answers, "skill": tasks})
    else:
        turns = [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        other = pd.DataFrame({"messages": turns, "task": tasks})
        expected = [(t, None, f"<user>{p}\n<assistant>", a) for t, _, p, a in expected]
    for name in ("other.jsonl", "other.parquet"):
        path = tmp_path / name
        other.to_json(path, orient="records", lines=True) if name.endswith("l") else other.to_parquet(path)
        if name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(row) + "\n" for row in other.to_dict("records")))
        else:
            other.to_parquet(path)
        found = texts(load_instruction([path], columns=columns, load_tokenizer=lambda: tokenizer))
        if layout == "messages":  # other prompts, other splits
            found = [(task, None, prompt, answer.removeprefix("<assistant>")) for task, _, prompt, answer in found]
        assert found == expected


def write_frame(frame: pd.DataFrame, path: Path) -> Path:
    frame.to_json(path, orient="records", lines=True)
    return path


def test_a_source_without_tasks_is_one_by_its_name(frame: pd.DataFrame, tmp_path: Path) -> None:
    for name in ("maths", "law"):
        FORMATS["rows.csv"](frame[["inputs", "targets"]].rename(columns=lambda c: {"inputs": "prompt", "targets": "completion"}[c]), tmp_path / f"{name}.csv")  # fmt: skip
    assert load_instruction([tmp_path / "maths.csv", tmp_path / "law.csv"]).tasks == ("law", "maths")


def test_numbers_in_a_csv_are_texts(tmp_path: Path) -> None:
    (tmp_path / "sums.csv").write_text("prompt,completion\n1+1=,02\n2+2=,NA\n3+3=,6\n")
    assert sorted(row.completion for row in load_instruction([tmp_path / "sums.csv"]).examples) == ["02", "6", "NA"]


def test_a_later_turn_is_part_of_the_prompt_and_special_tokens_are_not_doubled() -> None:
    from src.instruction import Chat

    tokenizer = character_tokenizer(end_appended=False)
    tokenizer.chat_template = TEMPLATE.replace("{{ m.content }}", "{{ m.content }}{{ eos_token }}")
    turns = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user", "assistant")]
    prompt, completion = Chat(lambda: tokenizer).texts(turns, "here")
    assert prompt.count("<assistant>") == 2 and prompt.endswith("<assistant>") and completion == "a"


CHAT = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
BAD = {
    "no layout": ({"question": "x", "reply": "y"}, r"line 1 has the columns question, reply; expected inputs and targets"),
    "half a layout": ({"prompt": "x", "reply": "y"}, r"line 1: there is no field 'completion'"),
    "a number": ({"prompt": "x", "completion": 3}, r"line 1: completion is 3, expected text"),
    "nothing": ({"prompt": "x", "completion": " "}, r"line 1: completion is ' ', expected text that is not empty"),
    "no task": ({"inputs": "x", "targets": "y"}, r"line 1: there is no field '_task_name'"),
    "no template": (CHAT, r"line 1: the tokenizer of .* has no chat template.*columns prompt and completion"),
    "no answer": ({"messages": [*CHAT["messages"], CHAT["messages"][0]]}, r"last of its messages is by 'user', expected 'assistant'"),
    "no turns": ({"messages": "x"}, r"line 1: messages is x, expected two or more turns"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors_name_file_row_and_column(case: str, tmp_path: Path, model_folders: dict[str, str]) -> None:
    row, message = BAD[case]
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 1") as error:
        load_instruction([tmp_path / "bad.jsonl"], load_tokenizer=lambda: load_tokenizer(model_folders["llama"]))
    assert pd.Series([str(error.value)]).str.contains(message).all(), str(error.value)


def test_damaged_sources_are_named(frame: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FORMATS["rows.parquet"](frame, tmp_path / "cut.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "cut.parquet").read_bytes()[:-40])
    (tmp_path / "latin.csv").write_bytes("prompt,completion\nx,\xe9\n".encode("latin-1"))
    (tmp_path / "ragged.csv").write_text('prompt,completion\nx,y\nx,y,z,"u\n')
    for name in ("cut.parquet", "latin.csv", "ragged.csv"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read \(.*\); write it again"):
            load_instruction([tmp_path / name])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"^nobody/nothing:train: no such file or folder, and as a data set on the hub"
    ):
        load_instruction(["nobody/nothing:train"])
    with pytest.raises(ValueError, match="row 3: targets is None, expected text"):
        frame.loc[2, "targets"] = None
        FORMATS["rows.parquet"](frame, tmp_path / "gap.parquet")
        load_instruction([tmp_path / "gap.parquet"])


def test_training_from_csv_folder_and_chat(workspace: Path, model_folders: dict[str, str], tmp_path: Path) -> None:
    """The stage with each, as a user runs it; the folder's name tells which."""
    rows = pd.DataFrame([json.loads(line) for line in write_sources(tmp_path / "x.jsonl", {"a": 12}).open()])
    pairs = rows.rename(columns={"inputs": "q", "targets": "a"})[["q", "a"]]
    pairs.to_csv("law.csv", index=False)
    datasets.Dataset.from_pandas(pairs.assign(kind=["x", "y"] * 6)).save_to_disk("mixed")
    training = ["--model_key", model_folders["llama"], "--train_lora", "--lora_rank", "2", "--epochs", "1"]
    training += ["--batch_size", "8", "--prompt_column", "q", "--completion_column", "a"]
    run_script("custom_train_alpaca.py", "--data_files", "law.csv", *training)
    run_script("custom_train_alpaca.py", "--data_files", "mixed", "--task_column", "kind", *training)
    manifests = {
        path.parent.name: json.loads(path.read_text())
        for path in Path("external_lightning_logs").glob("*/manifest.json")
    }
    tasks = {name.split("llama_")[1].split("_lora")[0]: manifest["tasks"] for name, manifest in manifests.items()}
    assert tasks == {"law": ["law"], "mixed": ["x", "y"]}
