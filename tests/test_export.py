"""Exports for other trainers, read back as each trainer's documents say that it reads them."""

import shlex
import shutil
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from transformers import AutoTokenizer

from src import config, console, export, stage_train
from src.data import Example, TaskData
from src.subsets import drawn_rows, row_counts
from tests.commands import read_json, refused, run_script, training, write_jsonl
from tests.commands import read_jsonl as read

yaml = pytest.importorskip("yaml")  # it comes with transformers

SCRIPT = "scripts/export_selection.py"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
TOOLS = TEMPLATE.replace("{{ m.content }}", "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}{% if tools %} {% endif %}")  # fmt: skip
ROLES = ("system", "user", "assistant", "user", "assistant")
SHARES = {"law": 0.55, "chat": 0.3, "b-1": 0.1, "b/1": 0.05}


def said(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def lines(path: Path, rows: list[dict]) -> str:
    return str(write_jsonl(path, rows))


@pytest.fixture
def flags(workspace, model_folders):
    """Four sources, one of them of conversations, two with names that make one file name; rows are held out of each."""
    shutil.copytree(model_folders["llama"], "model")
    Path("model/chat_template.jinja").write_text(TEMPLATE)
    turns = (zip(ROLES, ("short", f"hé {i}?", "no", "so", f"c{i}"), strict=True) for i in range(30))
    sources = [lines(Path("my/chat.jsonl"), [{"messages": said(*of_row)} for of_row in turns])]
    for name, count in (("law", 40), ("b/1", 20), ("b-1", 50)):
        texts = ((f"{name} {i}: ", f"answer {i} " + "x" * (i % 7)) for i in range(count))
        rows = [{"prompt": prompt, "completion": completion, "task": name} for prompt, completion in texts]
        sources.append(lines(Path(f"my/{name.replace('/', '_')}.jsonl"), rows))
    return ["--data_files", *sources, "--model_key", "model", "--save_name", "mine"]


def weights(shares: dict[str, float] = SHARES) -> list[str]:
    pd.DataFrame({"name": shares.keys(), "share": shares.values()}).to_csv("shares.csv", index=False)
    return ["--task_weights", "shares.csv"]


def data_of(flags: list[str]) -> TaskData:
    return stage_train.load_data(training(*flags))


# Each trainer's way of reading: (file, rows of an epoch, names of the two texts of a row, or of its turns, their roles and
# their texts) for each entry of the snippet. Where keys and rules are from is named; "field.md 2b" is the survey of the
# trainers' own sources of November 2026.

Entry = tuple[str, int, tuple[str, ...]]
TURNS = ("messages", "role", "content")
SHAREGPT = {"system": "system", "human": "user", "gpt": "assistant"}


def taken(row: dict, names: tuple[str, ...]) -> Any:
    """(prompt, completion) or [(role, text), ...]."""
    if len(names) == 2:
        return tuple(row[name] for name in names)
    column, role, content = names
    return [(SHAREGPT[turn[role]] if role == "from" else turn[role], turn[content]) for turn in row[column]]


def axolotl(folder: Path) -> Iterator[Entry]:
    """docs/dataset_loading.qmd and src/axolotl/utils/schemas/datasets.py (field.md 2b); `format` without input:
    src/axolotl/prompt_strategies/user_defined.py."""
    document = yaml.safe_load((folder / "axolotl.yaml").read_text())
    assert document.keys() == {"datasets"}
    for entry in document["datasets"]:
        share, kind = entry.pop("weight", 1), entry["type"]
        assert 0 < share <= 1  # share of THIS source that is kept
        assert (entry["ds_type"], entry["split"]) == ("json", "train")
        if kind == "chat_template":
            assert entry.keys() == {"path", "ds_type", "type", "split", "field_messages"}
            names = (entry["field_messages"], *TURNS[1:])
        else:
            assert kind.keys() == {"field_instruction", "field_output", "format", "no_input_format"}
            assert kind["format"] == kind["no_input_format"] == "{instruction}"
            names = kind["field_instruction"], kind["field_output"]
        yield entry["path"], round(share * len(read(folder / entry["path"]))), names


def llamafactory(folder: Path) -> Iterator[Entry]:
    """data/README.md, src/llamafactory/hparams/data_args.py (field.md 2b)."""
    info = read_json(folder / "dataset_info.json")
    settings = yaml.safe_load((folder / "llamafactory.yaml").read_text())
    assert settings == {"dataset_dir": ".", "dataset": ",".join(info), "mix_strategy": "concat"}
    for entry in info.values():
        if entry.get("formatting") == "sharegpt":
            assert entry.keys() == {"file_name", "num_samples", "formatting", "columns", "tags"}
            tags = entry["tags"]
            assert {tags[f"{role}_tag"] for role in ("user", "assistant", "system")} == {"user", "assistant", "system"}
            names = entry["columns"]["messages"], tags["role_tag"], tags["content_tag"]
        else:  # alpaca formatting: columns prompt, query, response
            assert entry.keys() == {"file_name", "num_samples", "columns"}
            names = entry["columns"]["prompt"], entry["columns"]["response"]
        yield entry["file_name"], entry["num_samples"], names  # data/loader.py: a permutation, above the length repeats


def trl(folder: Path) -> Iterator[Entry]:
    """trl/scripts/utils.py DatasetConfig, DatasetMixtureConfig (field.md 2b): N = min(len / share), the first
    round(share x N) rows; fraction at all or at none."""
    document = yaml.safe_load((folder / "trl.yaml").read_text())
    assert document.keys() == {"datasets", "streaming"} and document["streaming"] is False
    entries = document["datasets"]
    known = {"path", "data_files", "split", "columns", "fraction"}
    assert len({entry.keys() <= known and frozenset(entry) for entry in entries}) == 1  # all or none
    assert {(entry["path"], entry["split"]) for entry in entries} == {("json", "train")}
    (columns,) = {tuple(entry["columns"]) for entry in entries}  # they are concatenated
    assert columns in (("messages",), ("prompt", "completion"))
    counts = [len(read(folder / entry["data_files"])) for entry in entries]
    if "fraction" in entries[0]:
        shares = [entry["fraction"] for entry in entries]
        most = min(length / share for length, share in zip(counts, shares, strict=True))
        counts = [round(share / sum(shares) * most) for share in shares]
    for entry, count in zip(entries, counts, strict=True):
        yield entry["data_files"], count, TURNS if columns == ("messages",) else columns


def open_instruct(folder: Path) -> Iterator[Entry]:
    """open_instruct/dataset_transformation.py load_dataset_configs (field.md 2b): a decimal point means a share, none means
    rows; local files only with split train; sft_messages_key "messages"."""
    flag, *mixer, splits, split = shlex.split((folder / "open-instruct.txt").read_text())
    assert (flag, splits, split) == ("--dataset_mixer_list", "--dataset_mixer_list_splits", "train")
    for file, amount in zip(mixer[::2], mixer[1::2], strict=True):
        assert file.endswith(".jsonl")
        assert amount == "1.0" or amount.isdigit()  # any other share would be rounded down, perhaps by a row
        yield file, len(read(folder / file)) if amount == "1.0" else int(amount), TURNS


def ms_swift(folder: Path) -> Iterator[Entry]:
    """docs/source_en/Instruction/Command-line-parameters.md (field.md 2b): #rows, above the length they repeat; columns query
    and response, or messages: ResponsePreprocessor and MessagesPreprocessor of swift."""
    flag, *words = shlex.split((folder / "ms-swift.txt").read_text())
    assert flag == "--dataset"
    for file, count in (word.split("#") for word in words):
        yield file, int(count), TURNS if "messages" in read(folder / file)[0] else ("query", "response")


def torchtune(folder: Path) -> Iterator[Entry]:
    """A list becomes a ConcatDataset; chat_dataset with style sharegpt (field.md 2b), whose roles are system, human and gpt;
    instruct_dataset reads the columns input and output (torchtune's docs, basics/instruct_datasets)."""
    document = yaml.safe_load((folder / "torchtune.yaml").read_text())
    assert document.keys() == {"dataset"}
    chat = {"conversation_column": "conversations", "conversation_style": "sharegpt"}
    known = {"chat": (chat, ("conversations", "from", "value")), "instruct": ({}, ("input", "output"))}
    for entry in document["dataset"]:
        source, file, split, component = (entry.pop(key) for key in ("source", "data_files", "split", "_component_"))
        rest, names = known[component.removeprefix("torchtune.datasets.").removesuffix("_dataset")]
        assert (source, entry) == ("json", rest) and component.startswith("torchtune.datasets.")
        loaded = datasets.load_dataset("json", data_files=str(folder / file), split=split, cache_dir="cache/datasets")
        yield file, len(loaded), names


READERS = {"axolotl": axolotl, "llamafactory": llamafactory, "trl": trl, "open-instruct": open_instruct, "ms-swift": ms_swift,
           "torchtune": torchtune}  # fmt: skip


def test_every_trainer_is_read_and_explained():
    assert READERS.keys() == export.TRAINERS.keys()
    source, page = ((console.ROOT / name).read_text() for name in (SCRIPT, "docs/export.md"))
    assert all(name in source and f"| `{name}` |" in page for name in READERS)


@pytest.mark.parametrize("by", [[], ["--trainer_samples"]], ids=["files", "trainer"])
@pytest.mark.parametrize("name", READERS)
def test_a_trainer_reads_what_the_mixture_says(name, by, flags):
    """Its keys, its fields, as many rows of each source as the shares say, no held-out row, every conversation whole."""
    run_script(SCRIPT, *flags, *weights(), "--for", name, *by)
    folder, data = Path(f"results/mine/export_{name}"), data_of(flags)
    mixture = read_json(folder / "mixture.json")
    sources = {source["file"]: source for source in mixture["sources"]}
    assert {path.name for path in folder.glob("*.jsonl")} == sources.keys() and len(sources) == len(SHARES)
    available = Counter(data.tasks[task] for task in data.task_of_sample if task >= 0)
    assert available["law"] == 32 and sum(available.values()) < len(data)  # some are held out
    of_tasks = ([of[task] for task in data.tasks] for of in (SHARES, available))
    expected = dict(zip(data.tasks, slow_counts(*of_tasks, sum(available.values()), 4), strict=True))
    assert {source["source"]: source["rows"] for source in sources.values()} == expected
    assert min(expected.values()) > 0 and mixture["rows"] == sum(expected.values()) == sum(available.values())
    found, taken_from = Counter[str](), [data.examples[row] for row in data.indices("train")]
    is_alike = name in ("open-instruct", "trl")  # every source as conversations
    for file, count, names in READERS[name](folder):
        task, rows = sources[file]["source"], [taken(row, names) for row in read(folder / file)]
        found[task] += count
        assert count > 0 and len(rows) == (available[task] if by else expected[task])
        texts = Counter((row.prompt, row.completion) for row in taken_from if row.task == task)
        if task == "chat":
            numbers = {row.completion.strip()[1:] for row in taken_from if row.task == "chat"}
            whole = [list(zip(ROLES, ("short", f"hé {n}?", "no", "so", f"c{n}"), strict=True)) for n in numbers]
            assert all(row in whole for row in rows)
        else:
            times = Counter((row[0][1], row[1][1]) if is_alike else row for row in rows)
            assert times.keys() <= texts.keys() and max(times.values()) - min(times[pair] for pair in texts) <= 1
            assert not is_alike or [role for role, _ in rows[0]] == ["user", "assistant"]
    if name == "trl" and by:  # it cannot repeat: the scarcest source sets the total, in the same shares
        total, of_all = sum(found.values()), sum(expected.values())
        scarcest = max(expected[task] / available[task] for task in expected)
        assert total == pytest.approx(of_all / scarcest, abs=len(expected))
        assert all(found[task] / total == pytest.approx(rows / of_all, abs=0.01) for task, rows in expected.items())
    else:
        assert found == Counter(expected)


def slow_counts(shares: list[float], available: list[int], total: int, most: float) -> list[int]:
    """By the level at which capped shares add up to the total, found from cap to cap; then one row after the other to the
    largest remainder."""
    exact, caps = list(map(Fraction, shares)), [int(Fraction(str(most)) * rows) for rows in available]
    total = min(total, sum(cap for cap, share in zip(caps, exact, strict=True) if share))
    filled = lambda level: [min(Fraction(cap), level * share) for cap, share in zip(caps, exact, strict=True)]  # noqa: E731
    levels = (Fraction(0), *(cap / share for cap, share in zip(caps, exact, strict=True) if share))
    below = max(level for level in levels if sum(filled(level)) <= total)
    growing = sum(share for cap, share in zip(caps, exact, strict=True) if share and below * share < cap)
    quotas = filled(below + (total - sum(filled(below))) / growing if growing else below)
    counts = [int(quota) for quota in quotas]
    while sum(counts) < total:
        counts[max(range(len(counts)), key=lambda n: (quotas[n] - counts[n], -n))] += 1
    return counts


@pytest.mark.parametrize("seed", range(60))
def test_counts_are_those_of_a_slow_reference(seed):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 9))
    shares = rng.choice([0, 0.1, 0.25, 1 / 3, rng.random(), 1e-6], size).tolist()
    shares[0] = shares[0] or 0.5
    available, most = rng.integers(1, 60, size).tolist(), float(rng.choice([1, 1.15, 2.5, 4]))
    total = int(rng.integers(1, 2 * sum(available)))
    counts = row_counts(shares, available, total, most)
    assert counts == slow_counts(shares, available, total, most)
    caps = [int(Fraction(str(most)) * rows) for rows in available]
    assert all(0 <= count <= cap for count, cap in zip(counts, caps, strict=True))
    assert sum(counts) == min(total, sum(cap for cap, share in zip(caps, shares, strict=True) if share))


def test_rows_are_drawn_evenly_and_by_seed():
    rows = np.array([3, 5, 8, 9])
    for count in (1, 4, 7, 12):
        drawn = drawn_rows(rows, count, 0, "a")
        times = Counter(drawn.tolist())
        assert len(drawn) == count and times.keys() <= set(rows.tolist())
        assert max(times.values()) - min(times[row] for row in rows.tolist()) <= 1
        assert drawn.tolist() == drawn_rows(rows, count, 0, "a").tolist()
    different = {tuple(drawn_rows(np.arange(20), 20, seed, name)) for seed in (0, 1) for name in "ab"}
    assert len(different) == 4


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "mixture.json"}


def test_a_seed_decides_everything(flags, tmp_path):
    """The same seed writes the same bytes, another other rows; files of an earlier selection are gone; a source's file does
    not depend on the other sources."""
    folder = Path("results/mine/export_trl")
    found = []
    for seed in ("0", "0", "1"):
        run_script(SCRIPT, *flags, *weights(), "--for", "trl", "--seed", seed)
        found.append(bytes_of(folder))
        assert read_json(folder / "mixture.json")["seed"] == int(seed)
    assert found[0] == found[1] and found[0].keys() == found[2].keys()
    assert all(found[0][name] != found[2][name] for name in found[0] if name.endswith(".jsonl"))
    order = data_of(flags).tasks
    run_script(SCRIPT, *flags, "--task_idxes", str(order.index("law")), "--for", "ms-swift", "--seed", "1")
    alone = read(Path("results/mine/export_ms-swift/law.jsonl"))
    run_script(SCRIPT, *flags, "--task_idxes", "all", "--for", "ms-swift", "--seed", "1")
    assert read(Path("results/mine/export_ms-swift/law.jsonl")) == alone
    run_script(SCRIPT, *flags, "--task_idxes", str(order.index("law")), "--for", "ms-swift")
    files = {path.name for path in Path("results/mine/export_ms-swift").iterdir()}
    assert files == {"law.jsonl", "ms-swift.txt", "mixture.json"}


def test_the_mixture_says_rows_tokens_repeats_and_where_it_is_from(flags, capsys):
    data = data_of(flags)
    chosen = [data.tasks.index("chat"), data.tasks.index("law")]
    text = " ".join(map(str, chosen))
    Path("results/mine").mkdir(parents=True)
    steps = pd.DataFrame({"target": "goal", "step": [1, 2], "task": chosen, "name": ["chat", "law"], "estimate": [0.9, 0.25],
                          "selected": True, "subset": [str(chosen[0]), text]})  # fmt: skip
    steps.to_csv("results/mine/selection.csv", index=False)
    export_it = [SCRIPT, *flags, "--for", "axolotl"]
    run_script(*export_it, "--task_idxes", *map(str, chosen), "--total_rows", "100")
    folder = Path("results/mine/export_axolotl")
    mixture = read_json(folder / "mixture.json")
    assert mixture["estimates"] == [{"target": "goal", "estimate": 0.25}] and mixture["rows"] == 100
    tokenizer, tokens = AutoTokenizer.from_pretrained("model"), {}
    for source in mixture["sources"]:
        task, rows = source["source"], read(folder / source["file"])
        examples = [data.examples[row] for row in data.indices("train", [data.tasks.index(task)])]
        counts = {e.completion.strip(): len(tokenizer(e.prompt + e.completion)["input_ids"]) for e in examples}
        answers = [row["completion"] if task == "law" else row["messages"][-1]["content"] for row in rows]
        tokens[task] = sum(counts[answer.strip()] for answer in answers)  # files hold the rows that are counted
        assert source["tokens"] == tokens[task] and source["repeat"] == source["rows"] / len(examples)
        assert source["share_of_rows"] == source["rows"] / 100 and source["available"] == len(examples)
    shares = {source["source"]: source["share_of_tokens"] for source in mixture["sources"]}
    assert shares == pytest.approx({task: count / sum(tokens.values()) for task, count in tokens.items()})
    run_script(*export_it, *weights({"law": 1, "chat": 3}))  # other shares than those that were estimated
    assert read_json(folder / "mixture.json")["estimates"] == []
    steps.assign(name=["law", "chat"]).to_csv("results/mine/selection.csv", index=False)  # of other data
    run_script(*export_it, "--task_idxes", *map(str, chosen))
    assert read_json(folder / "mixture.json")["estimates"] == []
    assert "tokens are not counted" not in capsys.readouterr().out


NOTES = [
    ({"law": 1, "b/1": 9}, ["--total_rows", "200"], "note: --max_repeat 4 caps b/1; 192 rows remain of 200\n"),
    ({"law": 1, "b/1": 9}, ["--max_repeat", "2.5", "--total_rows", "50"], "note: --max_repeat 2.5 caps b/1; the others take the rest"),
    ({"law": 1, "b/1": 1e-6}, [], "note: left out, with less than a row of 48: b/1\n"),
    ({"law": 1, "b/1": 1}, [], None),
]  # fmt: skip


@pytest.mark.parametrize(("shares", "more", "note"), NOTES)
def test_caps_and_sources_without_a_row_are_named(shares, more, note, flags, capsys):
    run_script(SCRIPT, *flags, *weights(shares), "--for", "llamafactory", *more)
    printed = capsys.readouterr().out
    notes = [line for line in printed.splitlines() if "caps" in line or "left out" in line]
    assert note in printed if note else not notes, printed
    info = read_json("results/mine/export_llamafactory/dataset_info.json")
    assert all(entry["num_samples"] > 0 for entry in info.values())


def test_tools_stay_with_a_conversation_or_are_refused(flags):
    call = {"type": "function", "function": {"name": "look", "arguments": {"for": "é"}}}
    asking = {"role": "assistant", "tool_calls": [call]}
    turns = [*said(("user", "q")), asking, *said(("tool", "r"), ("assistant", "a"))]
    Path("model/chat_template.jinja").write_text(TOOLS)
    source = lines(Path("tools.jsonl"), [{"messages": turns, "tools": [{"name": "look"}]}])
    chosen = f"{SCRIPT} --data_files {source} --model_key model --save_name mine --task_idxes 0 --for".split()
    for name in ("axolotl", "trl", "open-instruct", "ms-swift"):
        run_script(*chosen, name)
        (row,) = read(Path(f"results/mine/export_{name}/tools.jsonl"))
        assert row == {"messages": turns, "tools": [{"name": "look"}]}
    for name in ("llamafactory", "torchtune"):
        refused(rf"--for {name} takes texts by system, user and assistant.*a row of tools", run_script, *chosen, name)
        assert not Path(f"results/mine/export_{name}").exists()


def direct(examples: list[tuple[str, str, str]], name: str, model: str = "nowhere/model") -> Path:
    data = TaskData([Example(n, task, "train", p, c) for n, (task, p, c) in enumerate(examples)])
    export.export(config.TrainConfig(task_idxes=("all",), save_name="own", model_key=model), data, name)
    return Path(f"results/own/export_{name}")


def test_texts_become_conversations_where_only_those_are_taken(workspace, capsys):
    """Without a tokenizer tokens are not counted, and the run goes on; a row without a prompt is refused by name."""
    folder = direct([("a", "p", "c"), ("b", "q", "d")], "open-instruct")
    assert read(folder / "a.jsonl") == [{"messages": said(("user", "p"), ("assistant", "c"))}]
    printed = capsys.readouterr().out
    assert "note: 2 rows without a conversation" in printed and "tokens are not counted: --model_key nowhere" in printed
    (first, _) = read_json(folder / "mixture.json")["sources"]
    assert (first["tokens"], first["share_of_tokens"], first["share_of_rows"]) == (None, None, 0.5)
    message = r"a row without a prompt in b \(leave it out, or name another trainer\): 'd'"
    refused(message, direct, [("a", "p", "c"), ("b", "", "d")], "open-instruct")
    assert (folder / "a.jsonl").is_file()  # the earlier export is whole


def test_a_source_of_both_kinds_is_written_as_conversations(flags, capsys):
    more = lines(Path("more.jsonl"), [{"prompt": "p", "completion": "c", "task": "chat"}])
    typed = [*flags[:2], more, *flags[2:]]
    data = data_of(typed)
    chat = str(data.tasks.index("chat"))
    run_script(SCRIPT, *typed, "--task_idxes", chat, "--for", "axolotl", "--heldout_share", "0")
    assert "note: 1 row without a conversation" in capsys.readouterr().out
    rows = read(Path("results/mine/export_axolotl/chat.jsonl"))
    assert said(("user", "p"), ("assistant", "c")) in [row["messages"] for row in rows] and len(rows) == 31


def test_clusters_keep_conversations(flags):
    data = data_of(flags)
    of_cluster = data.with_tasks({int(row): f"c{row % 2}" for row in data.indices("train")})
    known = {row: text for row, text in enumerate(data.messages.to_pylist()) if text}
    assert known and of_cluster.messages.to_pylist() == data.messages.to_pylist()
    assert {data.examples[row].task for row in known} == {"chat"}
