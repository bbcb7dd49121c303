"""Rows of a run: splits that never move, pickles that never run, chain-of-thought files, errors with file and line."""

import gzip
import hashlib
import json
import os
import pickle
import random
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.cot import DATASET_KEYS, clean_answer, extract_answers, judge, load_cot, parse_preset, save_predictions
from src.data import Example, TaskData, stable_split
from src.frames import read_pickle
from src.instruction import load_instruction
from tests.commands import read_json, refused, write_cot, write_jsonl


def texts_of(data: TaskData, split: str) -> list[tuple[str, str, str]]:
    return [(e.task, e.prompt, e.completion) for e in data.examples if e.split == split]


def toy_data() -> TaskData:
    rows = [("b", "train"), ("a", "train"), ("a", "validation"), ("c", "validation"), ("b", "train"), ("c", "test")]
    return TaskData(tuple(Example(i, task, split, f"p{i}", f"c{i}") for i, (task, split) in enumerate(rows)))


def test_task_and_target_ids():
    data = toy_data()
    assert (data.tasks, data.targets, len(data)) == (("a", "b"), ("a", "c"), 6)
    assert data.task_of_sample.tolist() == [1, 0, -1, -1, 1, -1]
    assert data.target_of_sample.tolist() == [-1, -1, 0, 1, -1, 1]
    assert data.indices("train").tolist() == [0, 1, 4]
    assert data.indices("train", [1]).tolist() == [0, 4] and data.indices("train", []).tolist() == []
    clusters = data.with_tasks({0: "x", 4: "a"})
    assert (clusters.tasks, clusters.targets) == (("a", "x"), ("a", "c"))
    assert clusters.task_of_sample.tolist() == [1, -1, -1, -1, 0, -1] and clusters.examples[1].split == "left out"
    assert [e.prompt for e in clusters.examples] == [e.prompt for e in data.examples]


def test_fingerprint_sees_every_field():
    example = Example(0, "a", "train", "p", "c", 7, "yes")
    changes = [{"task": "b"}, {"split": "test"}, {"prompt": "pc"}, {"completion": ""}, {"record_index": 8}]
    variants = [TaskData((Example(**{**vars(example), **change}),)) for change in [{}, *changes, {"answer": None}]]
    assert len({data.fingerprint for data in variants}) == len(variants) == 7


def test_what_cannot_be_is_refused():
    for action, arguments, message in [
        *[(toy_data().indices, split, "expected") for split in (("dev", None), ("test", [0]), ("train", [2]), ("train", [-1]))],
        *[(stable_split, (["a"], *shares), "must add up") for shares in ((-0.1, 5), (0.5, 5), (0.6, 5, 0.4))],
    ]:  # fmt: skip
        refused(message, action, *arguments)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text(max_size=3), max_size=40),
    st.sampled_from([0, 0.05, 0.1, 0.3, 0.49]),
    st.integers(0, 5),
    st.randoms(),
)
def test_stable_split_rules(keys, share, cap, rng):
    sides = stable_split(keys, share, cap)
    side_of_key = dict(zip(keys, sides, strict=True))
    assert [side_of_key[key] for key in keys] == sides  # equal keys, equal side
    shuffled = rng.sample(keys, len(keys))
    assert stable_split(shuffled, share, cap) == [side_of_key[key] for key in shuffled]
    counts = Counter(side_of_key.values())
    expected = min(max(1, int(share * len(side_of_key))), cap) if share and len(side_of_key) >= 3 else 0
    assert counts["validation"] == counts["test"] == expected
    assert counts["train"] >= bool(keys)


def test_stable_split_is_the_ranking_by_sha256():
    keys = [f"question {i}" for i in range(97)] + ["naïve ключ", "\ud800", ""]
    ranked = sorted(keys, key=lambda key: hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest())
    sides = dict(zip(ranked, ["validation"] * 10 + ["test"] * 5 + ["train"] * 85, strict=True))
    assert stable_split(keys, 0.1, 50, test_share=0.05) == [sides[key] for key in keys]


BASE = pd.DataFrame({"skill": ["a", "b", "ä"], "text": ["x", "line\nbreak", "日本"]}, index=[4, 2, 9])
FRAMES = {
    "str": BASE,
    "object": BASE.astype(object),
    "string[python]": BASE.astype("string[python]"),
    "str on python": BASE.astype(pd.StringDtype("python", na_value=np.nan)),
    "string[pyarrow]": BASE.astype("string[pyarrow]"),
    "arrow": BASE.astype(pd.ArrowDtype(pyarrow.string())),
    "missing str": BASE.assign(text=["x", None, "z"]),
    "missing string": BASE.assign(text=["x", None, "z"]).astype("string[python]"),
    "missing object": BASE.assign(text=pd.Series(["x", None, np.nan], index=BASE.index, dtype=object)),
    "slice": BASE.assign(text=["x", None, "z"]).iloc[1:],
    "nothing": BASE.iloc[:0],
    "category": BASE.astype({"skill": "category"}).assign(other=pd.Categorical(["x", None, "x"])),
    "numbers": BASE.assign(i=[1, 2, 3], f=[0.5, np.nan, 2], b=[True, False, True], small=np.int8([1, 2, 3])),
    "masked": BASE.assign(i=pd.array([1, None, 3], dtype="Int64"), b=pd.array([True, None, False], dtype="boolean")),
    "lists": BASE.assign(parts=[["x"], ["y"], ["z"]]),
    "text index": BASE.set_axis(["p", "q", "r"]),
    "range": BASE.reset_index(drop=True),
    "big-endian": BASE.assign(i=np.array([1, 2, 3], dtype=">i8")),
    "2d blocks": pd.DataFrame(np.arange(6.0).reshape(2, 3), columns=list("abc"), copy=False),
}


def plain(frame: pd.DataFrame) -> dict[str, list]:
    return {c: [None if v is pd.NA or v != v else v for v in frame[c].tolist()] for c in frame.columns}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", FRAMES)
def test_frames_read_as_pandas_reads_them(tmp_path, name, protocol):
    path = tmp_path / "frame.pkl"
    FRAMES[name].to_pickle(path, protocol=protocol)
    frame, expected = read_pickle(path), pd.read_pickle(path)
    assert plain(frame) == plain(expected)
    assert frame.index.tolist() == expected.index.tolist()


def test_label_maps(tmp_path):
    content = {"a": np.array([1, 2]), "b": ["x"], "c": pd.Index([3]), "d": [np.int64(5)], "e": pd.RangeIndex(2)}
    (tmp_path / "map.pkl").write_bytes(pickle.dumps(content))
    assert read_pickle(tmp_path / "map.pkl") == {"a": [1, 2], "b": ["x"], "c": [3], "d": [5], "e": [0, 1]}


class Calls:
    """Pickles as a call of anything."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


def named(module: str, name: str, arguments: bytes = b")") -> bytes:
    """A pickle (protocol 4) that calls module.name, whatever that is."""
    text = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name))
    return b"\x80\x04" + text + b"\x93" + arguments + b"R."


def attacks(victim: Path) -> dict[str, bytes]:
    touch = f"touch {victim}"
    build = b"c<>)\x81}(X\x01\0\0\0xK\x01ub"
    ways = {"obj": b"(c<>o", "newobj": b"c<>)\x81", "newobj ex": b"c<>)}\x92", "build": build, "list": b"](c<>)Re"}
    line = b"\x8c" + bytes([len(touch)]) + touch.encode()
    return {
        "os.system": pickle.dumps(Calls(os.system, touch)),
        **{name: b"\x80\x04" + way.replace(b"<>", b"os\nsystem\n") + b"." for name, way in ways.items()},
        "builtins.getattr": pickle.dumps(Calls(getattr, "x", "upper")),
        "io.common.os.system": named("pandas", "io.common.os.system", line + b"\x85"),
        "DataFrame.__class__": named("pandas", "DataFrame.__class__"),
        "_reconstructor": pickle.dumps(Calls(__import__("copyreg")._reconstructor, Path, object, None)),
        "numpy.load": named("numpy", "load", line + b"\x85"),
        "memory_map": named("pyarrow.lib", "memory_map", line + b"\x85"),
        "old style instance": b"\x80\x02(X" + len(touch).to_bytes(4, "little") + touch.encode() + b"ios\nsystem\n.",
        "hidden in a state": pickle.dumps(Calls(pd.DataFrame, state={"_mgr": Calls(os.system, touch)})),
        "hidden in a cell": pickle.dumps(pd.DataFrame({"skill": [Calls(os.system, touch)], "text": ["x"]})),
        "state of a class": b"\x80\x04\x8c\x06pandas\x8c\x09DataFrame\x93}\x8c\x01a" + line + b"sb.",
        "slots of a class": b"\x80\x04\x8c\x06pandas\x8c\x09DataFrame\x93N}\x8c\x05apply" + line + b"s\x86b.",
    }


@pytest.mark.parametrize("name", attacks(Path("x")))
def test_nothing_a_pickle_asks_for_is_run(tmp_path, name):
    victim, path = tmp_path / "victim", tmp_path / "bad.pkl"
    path.write_bytes(attacks(victim)[name])
    before = dict(vars(pd.DataFrame))
    with pytest.raises(ValueError, match=r"bad\.pkl cannot be read") as caught:
        read_pickle(path)
    assert not victim.exists() and dict(vars(pd.DataFrame)) == before
    assert "of a class" not in name or "it sets the state of a type" in str(caught.value)
    if "." in name or "_" in name:
        assert f"{name.rpartition('.')[2]}, which no frame needs" in str(caught.value)


def lies() -> list[tuple[bytes, str]]:
    """Pickles whose claims numpy, Arrow or pandas would follow past the end of memory, and pickles of other things."""
    numbers, texts = pickle.dumps(pd.DataFrame({"a": [1, 2]}), 4), pickle.dumps(pd.DataFrame({"a": ["x" * 99]}), 4)
    codes = pd.Categorical(["x", "y"])
    codes._ndarray[:] = 120
    array = (np._core.multiarray._reconstruct, np.ndarray, (0,), b"b")
    table = datasets.Dataset.from_dict({"skill": ["a"], "text": ["b"]})
    return [
        (numbers.replace(b"\x8c\x02i8", b"\x8c\x02O8"), ""),  # bytes for pointers
        (texts.replace(b"\x00\x63\x00\x00", b"\x00\x63\x00\x7f"), ""),  # offsets of texts
        (pickle.dumps(pd.DataFrame({"a": codes})), ""),
        (pickle.dumps({"a": Calls(*array, state=(1, (10**6,), np.dtype("O"), False, ["x"]))}), ""),
        (pickle.dumps({"a": Calls(*array, state=(1, (2**40,), np.dtype("i8"), False, b"x" * 8))}), ""),
        (b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"x.", ""),  # length of bytes
        (gzip.compress(pickle.dumps(BASE)), "compressed"),
        (pickle.dumps(pd.Series([1])), "Series"),
        (pickle.dumps(BASE.assign(when=pd.Timestamp(0))), "DatetimeArray"),
        (pickle.dumps([1, 2]), "holds a list"),
        (pickle.dumps({"a": [1, 1]}), "repeat"),
        (pickle.dumps(table), r"convert it with \.to_pandas\(\)"),
    ]


def test_what_memory_depends_on_is_not_believed_and_other_pickles_are_refused(tmp_path):
    for content, message in lies():
        (tmp_path / "bad.pkl").write_bytes(content)
        refused(rf"bad\.pkl .*{message}", read_pickle, tmp_path / "bad.pkl")


def test_damaged_pickles_fail_with_one_kind_of_error(tmp_path):
    rng, path = random.Random(0), tmp_path / "frame.pkl"
    for trial in range(500):
        frame = FRAMES[rng.choice(list(FRAMES))]
        content = bytearray(pickle.dumps(frame, protocol=rng.choice([2, 4, 5])))
        place = rng.randrange(2, len(content))
        if trial % 3:
            content[place] = rng.randrange(256)
        else:
            del content[place : place + rng.choice([1, 8, len(content)])]
        path.write_bytes(content)
        try:
            read_pickle(path)
        except ValueError as error:
            assert str(path) in str(error)


def flan(task: str, inputs: str, targets: str = "out", **more) -> dict:
    return {"inputs": inputs, "targets": targets, "_task_name": task, **more}


def loaded(folder: Path, records: list[dict], name: str = "a.jsonl", index=None, **options) -> TaskData:
    """The rows of a file with these records."""
    if name.endswith("jsonl"):
        write_jsonl(folder / name, records)
    else:
        pd.DataFrame(records, index=index).to_pickle(folder / name)
    return load_instruction([folder / name], **options)


def alpaca(skill: str, number: int, output: str | None = None) -> dict:
    output, task = f"answer {number}" if output is None else output, f"do {number}"
    text = f"Instruction: {task}\n{output}"
    return {"skill": skill, "text": text, "instruction": task, "input": "", "output": output}


def test_flan_prompts_end_as_in_the_recipe(tmp_path):
    kept = {text: text for text in ("a:", "a: ", "a:\n \n", "a\n")}
    for inputs, prompt in (kept | {"a": "a\n", "a ": "a \n", "": "\n"}).items():
        data = loaded(tmp_path, [flan("t", inputs)])
        assert texts_of(data, "train") == [("t", prompt, "out")]
        frame = [{"skill": "t", "text": "ignored", "inputs": inputs, "targets": "out"}]
        assert list(loaded(tmp_path, frame, "a.pkl").examples) == list(data.examples)


def slow_sides(keys_of_task: dict[str, set[str]], share: float, most: int) -> dict[str, str]:
    """One key at a time: the smallest task first, by sha256, until it has its share in validation, then in test."""
    sides: dict[str, str] = {}
    for task in sorted(keys_of_task, key=lambda task: (len(keys_of_task[task]), task)):
        keys = keys_of_task[task]
        quota = min(max(1, int(share * len(keys))), most) if len(keys) >= 3 else 0
        for key in sorted(keys - set(sides), key=lambda key: hashlib.sha256(key.encode()).digest()):
            there = [sides.get(other) for other in keys]
            open_sides = [side for side in ("validation", "test") if there.count(side) < quota]
            sides[key] = open_sides[0] if open_sides else "train"
    return sides


@pytest.mark.parametrize("most", [50, 2])
def test_equal_prompts_are_on_one_side_in_all_tasks(tmp_path, most):
    sizes = {"a": range(10), "b": range(100), "c": range(5, 45), "d": range(200, 203)}
    records = [flan(task, f"q{i}", task) for task, numbers in sizes.items() for i in numbers]
    data = loaded(tmp_path, records, max_heldout=most)
    expected = slow_sides({task: {f"q{i}\n" for i in numbers} for task, numbers in sizes.items()}, 0.1, most)
    counts = Counter((e.task, e.split) for e in data.examples)
    assert [e.prompt for e in data.examples] == [f"{record['inputs']}\n" for record in records]
    for example in data.examples:
        assert example.split == expected[example.prompt]
    for task, numbers in sizes.items():
        quota = min(max(1, len(numbers) // 10), most)
        assert min(counts[task, "validation"], counts[task, "test"]) >= quota
        assert most == 2 or counts[task, "validation"] == counts[task, "test"] == quota


def test_rows_without_inputs_split_by_their_answer_and_few_prompts_hold_nothing_out(tmp_path):
    data = loaded(tmp_path, [flan("t", "", f"a{i}") for i in range(10)])
    assert Counter(e.split for e in data.examples) == {"train": 8, "validation": 1, "test": 1}
    records = [flan("tiny", "same") for _ in range(9)] + [flan("t", f"q{i}") for i in range(3)]
    data = loaded(tmp_path, records)
    assert data.targets == ("t",) and data.tasks == ("t", "tiny")
    assert len(data.notices) == 1 and "1 of 2 tasks have no held-out rows" in data.notices[0]


def test_split_field_decides(tmp_path):
    sides = ["train", "validation", "test", "train"]
    records = [flan("t", "same", _split=side) for side in sides] + [flan("u", f"q{i}") for i in range(5)]
    data = loaded(tmp_path, records)
    assert [e.split for e in data.examples[:4]] == sides
    frame = [{"skill": r["_task_name"], "text": "x", "_split": None, **r} for r in records]
    assert list(loaded(tmp_path, frame, "a.pkl").examples) == list(data.examples)


def test_alpaca_prompt_is_told_from_output(tmp_path):
    records = [alpaca("s", i) for i in range(5)] + [alpaca("s", 5, output="")]
    records.append({**alpaca("s", 6), "text": "something else"})
    data = loaded(tmp_path, records, "a.pkl", heldout_share=0)
    assert texts_of(data, "train")[0] == ("s", "Instruction: do 0\n", "answer 0")
    assert texts_of(data, "train")[-1] == ("s", "", "something else") and len(data) == 6
    assert "1 of 7 rows have no prompt apart from the answer" in data.notices[0]
    assert "1 of 7 rows have an empty output and are left out" in data.notices[1]


@pytest.mark.parametrize("name", ["x.pkl", "x_final.pkl"])
def test_dev_split_map_holds_out_its_rows(tmp_path, name):
    dev_map = {"s": np.array([100, 106, 110, 112]), "t": np.array([103])}
    (tmp_path / "x_dev_split_map.pkl").write_bytes(pickle.dumps(dev_map))
    data = loaded(tmp_path, [alpaca("st"[i % 2], i) for i in range(30)], name, range(100, 130))
    heldout = {e.sample_index + 100: e.split for e in data.examples if e.split != "train"}
    assert set(heldout) == {100, 106, 110, 112, 103} and heldout[103] == "validation"
    ranked = sorted((0, 6, 10, 12), key=lambda i: hashlib.sha256(f"Instruction: do {i}\n".encode()).digest())
    assert [heldout[100 + i] for i in ranked] == ["validation", "validation", "test", "test"]
    for other, index, message in (
        ({"s": [99]}, range(5), "holds out row 99 of skill 's'"),
        ({"t": [0]}, range(5), "no such row of that skill"),
        (BASE, range(5), "must hold a dict"),
        ({"s": [0]}, [0, 1, 1, 2, 3], "labels that do not repeat"),
    ):
        (tmp_path / "x_dev_split_map.pkl").write_bytes(pickle.dumps(other))
        refused(message, loaded, tmp_path, [alpaca("s", i) for i in range(5)], name, index)


def test_target_files_are_never_trained_on(tmp_path):
    data_file = write_jsonl(tmp_path / "a.jsonl", [flan("t", f"q{i}") for i in range(10)])
    targets = write_jsonl(tmp_path / "b.jsonl", [flan("u", f"q{i // 2}") for i in range(10)])
    data = load_instruction([data_file], [targets])
    assert data.tasks == ("t",) and data.targets == ("u",) and len(data.indices("train")) == 10
    assert load_instruction([data_file], [targets], heldout_share=0.1).targets == ("t", "u")
    assert "5 of 5 held-out prompts are trained on too" in data.notices[0]
    sides = {e.prompt: e.split for e in data.examples if e.task == "u"}
    assert Counter(sides.values()) == {"validation": 3, "test": 2}
    assert all(sides[e.prompt] == e.split for e in data.examples if e.task == "u")


def test_bad_lines_are_named(tmp_path):
    for line, message in [
        (b"{", "line 2 is not JSON"),
        (b'{"inputs": "\xff"}', "line 2 is not JSON in UTF-8"),
        (b"null", "line 2 holds None"),
        (b'{"inputs": "\\ud83d", "targets": "a", "_task_name": "t"}', "line 2: inputs holds half a character"),
        (b'{"inputs": "a", "targets": "a", "_task_name": "\\ud83d"}', "line 2: _task_name holds half a character"),
        (b'{"targets": "a", "_task_name": "t"}', "line 2: there is no field 'inputs'"),
        (b'{"inputs": "a", "targets": "b"}', "line 2: there is no field '_task_name'"),
        (b'{"inputs": "a", "targets": 3, "_task_name": "t"}', "line 2: targets is 3"),
        (b'{"inputs": "a", "targets": "b", "_task_name": "t", "_split": ["x"]}', "line 2: _split is"),
        (b'{"inputs": "a", "targets": "b", "_task_name": "t", "_split": "test"}', "line 1 has no split .* line 2 has one"),
    ]:  # fmt: skip
        (tmp_path / "a.jsonl").write_bytes(json.dumps(flan("t", "q")).encode() + b"\n" + line + b"\n\n")
        refused(rf"{tmp_path}/a\.jsonl.* {message}", load_instruction, [tmp_path / "a.jsonl"])


def test_bad_files_are_named(tmp_path):
    refused("empty list of data files", load_instruction, [])
    rows = [alpaca("s", 0), alpaca(None, 1)]
    refused(r"row 2 \(index label 7\): skill is nan", loaded, tmp_path, rows, "a.pkl", [5, 7])
    refused("no training rows", loaded, tmp_path, [flan("t", "q", _split="validation")])


REAL = [("flan_mini.jsonl", 6480, 44, None), ("alpaca_mini.pkl", 3039, 34, 763), ("dolly_mini.pkl", 1070, 8, 269)]


@pytest.mark.parametrize("file, rows, tasks, heldout", REAL)
def test_real_instruction_files(shared_data, file, rows, tasks, heldout):
    source = shared_data / "instruction" / file
    data = load_instruction([source])
    assert (len(data), len(data.tasks), len(data.targets)) == (rows, tasks, tasks)
    if file.endswith("pkl"):
        frame, labels = source, source.with_name(file.replace(".pkl", "_dev_split_map.pkl"))
        assert rows - len(data.indices("train")) == heldout
        assert plain(read_pickle(frame)) == plain(pd.read_pickle(frame))
        assert read_pickle(labels) == {skill: found.tolist() for skill, found in pd.read_pickle(labels).items()}
    sides = [{e[:2] for e in texts_of(data, split)} for split in ("train", "validation", "test")]
    assert not file.endswith("jsonl") or len(set.union(*sides)) == sum(map(len, sides))  # no prompt on two sides
    assert len(data.notices) == (file == "dolly_mini.pkl")  # its map holds out a prompt that is trained on too


def test_extract_answers():
    for dataset_key, answers in {
        "strategy_qa": {" no.": ["no"], " that it is not common.": [], " Yes, but\tNO": ["yes", "no"], "no-one nope yes! (yes)": []},
        "coin_flip": {"'Yes':no": ["yes", "no"]},
        "gsm8k": {"1,234.50 - 7 and -3. x2": ["1234.50", "7", "-3", "2"]},
        "multiarith": {"none": []},
        "svamp": {"$1,000.5": [1000.5]},
        "last_letter_concatenation": {' "ab c".\n': ["abc"], " . ": []},
        "commonsense_qa": {" (B) enforce.": ["B"], " Answer: C": ["C"], "A dog is an Animal. B.": ["B"], "It is (A). A bank has E": ["A", "E"],
                           "the answer is A because": ["A"], "A) ignore": ["A"], "U.S.A. B&B D-Day C's F": []},
        "aqua": {"[E], D: or\nB": ["E", "D", "B"]},
        "date_understanding": {"F G": ["F"]},
    }.items():  # fmt: skip
        assert {text: extract_answers(dataset_key, text) for text in answers} == answers


RIGHT = [
    ("strategy_qa", "yes --> no yes", "ft_cot_token", "no"),  # the answer stands behind the marker
    ("strategy_qa", "yes or no", "ft_cot_token", "no"),  # no marker: the last one
    ("strategy_qa", "yes or no", "ft_token", "yes"),
    ("gsm8k", "1 The answer is 2. The answer is 3", "fs_cot", "2"),
    ("gsm8k", "5, so 6", None, "5"),
    ("svamp", "3.0000001", None, "3"),
    ("gsm8k", "1000", None, "1,000"),
]
WRONG = [("strategy_qa", "no --> maybe", "ft_cot_token", "no"), ("svamp", "3.1", None, "3"), ("gsm8k", "18.0", None, "18")]  # fmt: skip


def test_completions_are_judged():
    for key, text, template, answer in RIGHT + WRONG:
        assert judge(key, text, answer, template)["correct"] == ((key, text, template, answer) in RIGHT), text
    right = {"correct": True, "contains_answer": True, "correct_format": True}
    assert judge("strategy_qa", "a --> maybe no", "No", "ft_cot_token") == right
    wrong = judge("strategy_qa", "no, then yes", "no", "ft_cot_token")
    assert wrong == {"correct": False, "contains_answer": True, "correct_format": False}
    for key in DATASET_KEYS:  # cleaning twice changes nothing
        once = clean_answer(key, "1,234")
        assert clean_answer(key, str(once)) == once


class Project:
    """A tiny strategy_qa project: train 0 to 9, test 10 and 11; completion 0 of sample i is right iff i is even."""

    def __init__(self, root: Path) -> None:
        self.root = root
        answers = ["Yes" if i % 3 else "No" for i in range(12)]
        self.samples = [{"sample_index": i, "question": f" q{i}? ", "answer": a} for i, a in enumerate(answers)]
        self.samples[11]["rationale"] = " because. "
        self.split = {"train": list(range(10)), "test": [10, 11]}
        self.metadata = {"completion_key": "zs_cot"}
        self.completions = {str(i): [self.completion(i, i % 2 == 0)] for i in range(12)}
        self.write()

    def completion(self, i: int, right: bool, **more) -> dict:
        sample = self.samples[i]
        said = sample["answer"] if right else {"Yes": "no", "No": "yes"}[sample["answer"]]
        texts = {"reasoning_completion": f"\n r{i} ", "completion": f" {said}."}
        return {**sample, "completion_index": 0, **texts, **more}

    def write(self) -> None:
        texts = self.samples, self.split, self.metadata, self.completions
        self.completion_file = write_cot(self.root, "strategy_qa", *texts)

    def load(self, preset_key: str = "ft_cot", **options) -> TaskData:
        folders = {"data_dir": self.root / "data", "saved_dir": self.root / "saved"}
        options = {"architecture": "encoder_decoder", "heldout_share": 0, **options}
        return load_cot("strategy_qa", preset_key, **folders, **options)


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


TEMPLATES = [
    ("ft", "encoder_decoder", 1, "q1?", "Yes"),
    ("ft", "decoder", 1, "q1? ###", " Yes"),
    ("ft_cot", "encoder_decoder", 2, "q2?", "r2 --> Yes"),
    ("ft_cot", "decoder", 2, "q2? ###", " r2 --> Yes"),
]


@pytest.mark.parametrize("preset, architecture, record, prompt, completion", TEMPLATES)
def test_cot_templates(project, preset, architecture, record, prompt, completion):
    row = project.load(preset, architecture=architecture).examples[1]
    assert (row.record_index, row.prompt, row.completion, row.answer) == (record, prompt, completion, "yes")
    assert project.load("zs_cot").examples == project.load("ft_cot").examples


def test_cot_keeps_correct_completions_and_labels_test_rows(project):
    data = project.load("ft_cot")
    assert [e.record_index for e in data.examples] == [0, 2, 4, 6, 8, 10, 11]
    assert [row[1:] for row in texts_of(data, "test")] == [("q10?", "r10 --> Yes"), ("q11?", "because. --> Yes")]
    assert len(data.notices) == 1 and "5 of 10 completions are left out" in data.notices[0]
    assert (data.answer_key, data.tasks, data.targets) == ("strategy_qa", ("strategy_qa",), ("strategy_qa",))
    everything = project.load("ft_cot", keep_incorrect=True)
    assert [e.record_index for e in everything.examples] == list(range(12)) and everything.notices == ()
    assert texts_of(everything, "test") == texts_of(data, "test")  # a wrong completion is never a test label


def test_cot_validation_part_is_the_same_for_every_preset(project):
    sides = stable_split([f"q{i}?" for i in range(10)], 0.2, 500, test_share=0)
    expected = [i for i, side in enumerate(sides) if side == "validation"]
    for preset in ("ft", "ft_cot"):
        data = project.load(preset, heldout_share=0.2)
        assert [data.examples[i].record_index for i in data.indices("validation")] == expected
        assert not {data.examples[i].record_index for i in data.indices("train")} & set(expected)
        assert [data.examples[i].record_index for i in data.indices("test")] == [10, 11]
        assert preset != "ft" or len(data) == 12  # the train part gives nothing to the test split
    labels = {e.record_index: e.completion for e in data.examples if e.split == "validation"}
    answer = {i: project.samples[i]["answer"] for i in expected}
    assert labels == {i: answer[i] if i % 2 else f"r{i} --> {answer[i]}" for i in expected}


def test_cot_augmented_presets_count_missing_completions_once(project):
    project.metadata["completion_key"] = "zs_cot_t70"
    for i in range(4):
        project.completions[str(i)] += [project.completion(i, True, reasoning_completion=f"s{i}{k}") for k in range(i)]
    project.write()
    data = project.load("ft_cot_t70_4aug")
    expected = ["r0", "s10", "r2", "s20", "s21", "s30", "s31", "s32", "r4", "r6", "r8"]
    assert [c.split(" -->")[0] for _, _, c in texts_of(data, "train")] == expected
    assert len(data.notices) == 2 and "24 of 40 completions" in data.notices[0] and "5 of 16" in data.notices[1]
    assert len(project.load("ft_cot_t70_1aug").indices("train")) == 5
    assert [c.split(" -->")[0] for _, _, c in texts_of(project.load("ft_cot_t70_2aug"), "train")][:4] == expected[:4]


def test_cot_task_column(project):
    for i, records in project.completions.items():
        records[0]["teacher"] = "ab"[int(i) % 4 > 0]
    project.write()
    data = project.load("ft_cot", task_column="teacher", heldout_share=0.2)
    assert data.tasks == ("a", "b") and data.targets == ("strategy_qa",)
    refused(r"sample 0, task_column: there is no field 'school'", project.load, "ft_cot", task_column="school")


BREAKAGES = {
    "no question": (lambda p: p.samples[3].pop("question"), r"qa\.json, data\[3\]: there is no field 'question'"),
    "sample index": (lambda p: p.samples[3].update(sample_index=4), r"data\[3\]: sample_index is 4, expected 3"),
    "past the end": (lambda p: p.split["test"].append(12), r"default\.json: 12 in test is no index"),
    "in both": (lambda p: p.split["test"].append(3), "3 in test is .* or stands there twice"),
    "no list": (lambda p: p.split.pop("train"), "no list 'train'"),
    "metadata": (lambda p: p.metadata.update(base_model="gpt"), r"base_model 'gpt' \(expected 'text-davinci-002'\)"),
    "epoch": (lambda p: p.metadata.update(epoch=3), r"epoch 3 \(expected None\); put the teacher"),
    "absent": (lambda p: p.completions.pop("3"), "no completions of 1 training samples, the first is 3"),
    "stranger": (lambda p: p.completions.update({"12": []}), "'12' in data is no index"),
    "no reasoning": (lambda p: p.completions["3"][0].pop("reasoning_completion"), "sample 3, completion 0: there"),
    "question": (lambda p: p.completions["3"][0].update(question="?"), r"question is '\?', the data set has 'q3\?'"),
    "answer": (lambda p: p.completions["3"][0].update(answer="maybe"), "answer is 'maybe', the data set has 'No'"),
    "nothing left": (lambda p: [r[0].update(completion="") for r in p.completions.values()], "no training row is left"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_cot_errors_name_file_and_cure(project, name):
    damage, message = BREAKAGES[name]
    damage(project)
    project.write()
    refused(message, project.load, "ft_cot")


def test_cot_missing_and_damaged_files(project):
    project.completion_file.write_text("{")
    refused(r"D_strategy_qa\.json is not JSON", project.load, "ft_cot")
    project.completion_file.unlink()
    refused("use preset ft", project.load, "ft_cot", error=FileNotFoundError)
    assert len(project.load("ft")) == 12
    refused("split_key", project.load, "ft", split_key="other", error=FileNotFoundError)
    refused("expected one of commonsense_qa", load_cot, "squad", "ft", architecture="decoder")
    for preset_key in ("zs", "fs_cot", "ft_cot_t70_3aug", "ft_cot_t70_", ""):
        refused("expected ft, ft_cot", parse_preset, preset_key)


def test_predictions_are_written_in_the_completion_format(project, tmp_path):
    data = project.load("ft_cot", architecture="decoder")
    path, test_rows = tmp_path / "new" / "D_strategy_qa__T_run.json", data.indices("test").tolist()
    outputs = {test_rows[1]: "because --> yes", test_rows[0]: "hm"}
    about = {"base_model": "t5_small", "train_key": "run", "epoch": 3, "train_lora": True, "lora_rank": 16}
    save_predictions(path, data, outputs, preset_key="ft_cot", **about)
    content = read_json(path)
    keys = {"dataset_key": "strategy_qa", "completion_key": "ft_cot", "finetune_key": "zs_cot_strategy_qa"}
    assert content["metadata"] == {**about, **keys, "prediction_template": "ft_cot_token"}
    assert list(content["data"]) == ["10", "11"]
    texts = {"question": "q11?", "answer": "Yes", "prompt": "q11? ###", "completion": "because --> yes"}
    assert content["data"]["11"] == [{"sample_index": 11, "completion_index": 0, **texts}]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.fixture
def load_real(shared_data):
    """`load_cot` on the real files."""
    folder = shared_data / "chain_of_thought"
    common = {"architecture": "decoder", "heldout_share": 0, "data_dir": folder, "saved_dir": folder / "saved"}
    return lambda *keys, **options: load_cot(*keys, **(common | options))


ROW_COUNTS = [
    ("strategy_qa", "ft", 1268, 1268),
    ("strategy_qa", "ft_cot", 682, 1268),
    ("commonsense_qa", "ft_cot", 3043, 4000),
    ("strategy_qa", "ft_cot_t70_64aug", 1950, 2536),
    ("commonsense_qa", "ft_cot_t70_64aug", 9583, 10540),
]


@pytest.mark.parametrize("dataset_key, preset_key, correct, everything", ROW_COUNTS)
def test_real_row_counts(load_real, dataset_key, preset_key, correct, everything):
    assert len(load_real(dataset_key, preset_key).indices("train")) == correct
    assert len(load_real(dataset_key, preset_key, keep_incorrect=True).indices("train")) == everything


def test_real_example_and_teachers_as_tasks(load_real):
    first = load_real("strategy_qa", "ft_cot").examples[0]
    question = "Hydrogen's atomic number squared exceeds number of Spice Girls? ###"
    assert (first.record_index, first.prompt) == (1, question)
    assert first.completion.startswith(" The atomic number of hydrogen is 1. 1 squared")
    assert first.completion.endswith("5. --> No")
    data = load_real("commonsense_qa", "ft_cot_t70_64aug", task_column="teacher", heldout_share=0.1)
    assert len(data.tasks) == 3 and data.targets == ("commonsense_qa",)
    assert len(data.indices("validation")) == 400 and len(data.indices("test")) == 821
    refused("choose a smaller split", load_real, "commonsense_qa", "ft_cot", split_key="full")
