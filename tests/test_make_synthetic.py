"""The built-in worlds: the same bytes for a seed, the users' formats, ordinary model folders."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from src.cot import load_cot
from src.datamodule import TaskDataModule
from src.frames import read_pickle
from src.gradients import outputs_of
from src.instruction import load_instruction
from src.models import load_base_model
from tests.commands import load_script, read_jsonl, refused, run_script, write_jsonl
from tests.conftest import write_sources

QUICK = ["--num_tasks", "6", "--rows_per_task", "20", "--target_rows", "9", "--pretrain_steps", "2"]
SMALL = "data/make_base_model.py --data_files text.jsonl --hidden_size 32 --num_layers 1 --vocab_size 300 --window 16"
DATA_FILES = ("flan.jsonl", "target.jsonl", "alpaca.pkl", "alpaca_dev_split_map.pkl")


def digests(folder: str, names: tuple[str, ...] = DATA_FILES) -> list[str]:
    return [hashlib.sha256(Path(folder, name).read_bytes()).hexdigest() for name in names]


def make_world(folder: str, *flags: str) -> None:
    run_script("data/make_synthetic.py", "--output_dir", folder, *QUICK, *flags)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small world that several tests read."""
    folder = tmp_path_factory.mktemp("made") / "world"
    make_world(str(folder))
    return folder


def test_a_seed_decides_every_byte(workspace, capsys):
    for folder, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        make_world(folder, "--seed", seed)
    assert digests("a") == digests("b")
    assert not set(digests("a")) & set(digests("c"))
    capsys.readouterr()
    make_world("a", "--seed", "3")
    assert "nothing to do" in capsys.readouterr().out


def test_instruction_world_is_in_the_users_formats(world):
    keys = {"inputs", "targets", "_template_idx", "_task_name", "_task_source", "_template_type"}
    assert set(read_jsonl(world / "flan.jsonl")[0]) == keys
    data = load_instruction([world / "flan.jsonl"], [world / "target.jsonl"])
    assert len(data.tasks) == 6 and data.targets == ("target",) and len(data.indices("train")) == 6 * 20
    assert load_instruction([world / "alpaca.pkl"], [world / "target.jsonl"]).tasks == data.tasks
    tokenizer, model = (auto.from_pretrained(world / "model") for auto in (AutoTokenizer, AutoModelForCausalLM))
    assert tokenizer.pad_token_id is not None and tokenizer.eos_token_id is not None
    assert model.config.model_type == "llama"
    for text in [*read_pickle(world / "alpaca.pkl")["text"], "Any printable text: 0-9, {A|b}\n~"]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids)
        assert len(ids) < 32


def test_wrong_answers_are_as_many_as_the_name_says(world):
    skills = load_script("data/make_synthetic.py").SKILLS
    rewrite = {skill.instruction: skill.rewrite for skill in skills.values()}
    wrong: dict[str, list[bool]] = {}
    for row in read_jsonl(world / "flan.jsonl"):
        instruction, word = row["inputs"].split(": ")
        wrong.setdefault(row["_task_name"], []).append(rewrite[instruction](word) != row["targets"])
    shares = {name: sum(flags) / len(flags) for name, flags in wrong.items()}
    assert all(share == 0 for name, share in shares.items() if "clean" in name)
    assert all(0.3 <= share <= 0.5 for name, share in shares.items() if "noisy50" in name)


def test_every_other_source_can_ask_for_several_words(workspace):
    make_world("joined", "--joined", "3")
    counts: dict[str, set[tuple[int, int]]] = {}
    for row in read_jsonl("joined/flan.jsonl"):
        asked, answered = row["inputs"].split(": ")[1].split(" "), row["targets"].split(" ")
        counts.setdefault(row["_task_name"], set()).add((len(asked), len(answered)))
    assert all(of_task == {(3, 3) if name.endswith("_x3") else (1, 1)} for name, of_task in counts.items())
    assert sum(name.endswith("_x3") for name in counts) == 3


def test_target_words_and_alpaca_rows_are_those_of_the_sources(world):
    """No target row's word is in a source, in any wording; both layouts tell the same rows in the same order."""
    sources, targets = read_jsonl(world / "flan.jsonl"), read_jsonl(world / "target.jsonl")
    words, target_words = ({row["inputs"].split(": ")[1] for row in rows} for rows in (sources, targets))
    assert not words & target_words
    assert [row["_split"] for row in targets] == ["validation"] * 9 + ["test"] * 9
    frame, dev_labels = read_pickle(world / "alpaca.pkl"), read_pickle(world / "alpaca_dev_split_map.pkl")
    assert list(frame.columns) == ["skill", "text", "instruction", "input", "output"]
    assert [f"{row.instruction}: {row.input}" for row in frame.itertuples()] == [row["inputs"] for row in sources]
    assert frame["output"].tolist() == [row["targets"] for row in sources]
    assert all(row.text.endswith(f"{row.input}\n\n### Response:\n{row.output}") for row in frame.itertuples())
    assert set(dev_labels) == set(frame["skill"])
    assert all((frame["skill"][labels] == skill).all() for skill, labels in dev_labels.items())


def test_a_folder_of_another_world_is_kept(workspace):
    """Other arguments, a changed file, a folder of the user's own: each is refused, and stays as it is."""
    make_world("world")
    refused(r"seed is 0, not 1.*--overwrite", make_world, "world", "--seed", "1", error=FileExistsError)
    Path("world/target.jsonl").write_text("{}")
    refused(r"target.jsonl is missing or changed", make_world, "world", error=FileExistsError)
    make_world("world", "--seed", "1", "--overwrite")
    assert json.loads(Path("world/manifest.json").read_text())["arguments"]["seed"] == 1
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("keep")
    refused("was not made here", make_world, "mine", "--overwrite", error=FileExistsError)
    assert Path("mine/notes.txt").read_text() == "keep"


def test_a_failure_on_the_way_and_a_world_that_cannot_be_leave_no_folder(workspace, monkeypatch):
    command = "data/make_synthetic.py --output_dir world"
    for message, flags in {
        "at least as many tasks as target skills": "--num_tasks 2",
        "at most 416 tasks": "--num_tasks 500",
        "at most 16 target skills": "--num_tasks 20 --num_target_skills 17",
        "for example 64": "--hidden_size 60 --num_heads 8",
    }.items():
        refused(message, run_script, f"{command} {flags}")
    script = load_script("data/make_synthetic.py")
    monkeypatch.setattr(script.base, "pretrain", lambda *_: 1 / 0)
    refused("division", run_script, command, *QUICK, error=ZeroDivisionError)
    assert not list(workspace.iterdir())


@pytest.mark.parametrize(("architecture", "auto"), [("llama", AutoModelForCausalLM), ("t5", AutoModelForSeq2SeqLM)])
@pytest.mark.parametrize("steps", [0, 3])
def test_base_model_of_users_text(workspace, architecture, auto, steps):
    write_sources(Path("text.jsonl"), {"a": 20, "b": 20})
    command = f"{SMALL} --architecture {architecture} --pretrain_steps {steps}"
    for folder in ("first", "second"):  # the second starts from another state of torch's generator
        run_script(command, "--output_dir", folder)
    weights = ("model.safetensors", "tokenizer.json")
    assert digests("first", weights) == digests("second", weights)
    tokenizer, model = (opened.from_pretrained("first") for opened in (AutoTokenizer, auto))
    assert model.config.model_type == architecture and len(tokenizer) == model.config.vocab_size <= 300
    ids = tokenizer("größer → 😀")["input_ids"]
    assert (ids[-1] == tokenizer.eos_token_id) == (architecture == "t5")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "größer → 😀"
    with Path("text.jsonl").open("a") as file:  # the same name with other text is another model
        file.write(json.dumps({"inputs": "new", "targets": "row", "_task_name": "a"}) + "\n")
    refused("data_sha256", run_script, command, "--output_dir", "first", error=FileExistsError)


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_pretraining_on_completions_learns_to_answer(workspace, architecture):
    """Answers are learned, and prompts are read only: a decoder's loss on them stays that of a random model."""
    letters = "abcdefgh" * 5
    write_jsonl("text.jsonl", ({"inputs": f"{x} =", "targets": x.upper() * 3, "_task_name": "t"} for x in letters))
    flags = f"--window 256 --pretrain_steps 150 --pretrain_on completions --architecture {architecture}"
    run_script(f"{SMALL} {flags} --pretrain_lr 1e-2 --output_dir m")
    model = load_base_model("m")
    data = load_instruction(["text.jsonl"])
    datamodule = TaskDataModule(data, model.tokenizer, model.kind)
    assert outputs_of(model, datamodule, data.indices("train"), "loss").max() < 0.3
    if architecture == "llama":
        prompts = torch.tensor(np.stack([datamodule.tokens.prompts[i] for i in data.indices("train")])).long()
        assert model.network(input_ids=prompts, labels=prompts).loss.item() > 3


def test_chain_of_thought_world(workspace):
    for folder in ("cot", "cot2"):
        run_script(f"data/make_synthetic_cot.py --output_dir {folder} --num_questions 40 --pretrain_steps 2")
    folders = {"data_dir": "cot/data", "saved_dir": "cot/saved"}
    data = load_cot("addsub", "ft_cot_t70_4aug", architecture="encoder_decoder", task_column="teacher", **folders)
    assert len(data.tasks) >= 3 and "careful" in data.tasks
    assert all(example.completion.endswith(f"--> {int(float(example.answer))}") for example in data.examples)
    names = ("data/dataset/addsub.json", "data/split/addsub__default.json")
    assert digests("cot", names) == digests("cot2", names)
    tokenizer, model = (auto.from_pretrained("cot/model") for auto in (AutoTokenizer, AutoModelForSeq2SeqLM))
    assert tokenizer("1 + 2").input_ids[-1] == tokenizer.eos_token_id and model.config.model_type == "t5"
