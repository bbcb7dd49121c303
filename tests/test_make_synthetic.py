"""The built-in worlds: the same bytes for a seed, the users' formats, ordinary model folders."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from src.cot import load_cot
from src.instruction import load_instruction
from tests.commands import run_script

QUICK = ("--num_tasks", "6", "--rows_per_task", "20", "--target_rows", "9", "--pretrain_steps", "2")
DATA_FILES = ("flan.jsonl", "target.jsonl", "alpaca.pkl", "alpaca_dev_split_map.pkl")


def digests(folder: str, names: tuple[str, ...] = DATA_FILES) -> list[str]:
    return [hashlib.sha256(Path(folder, name).read_bytes()).hexdigest() for name in names]


def test_a_seed_decides_every_byte(workspace: Path, capsys: pytest.CaptureFixture) -> None:
    for folder, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        run_script("data/make_synthetic.py", "--output_dir", folder, "--seed", seed, *QUICK)
    assert digests("a") == digests("b")
    assert not set(digests("a")) & set(digests("c"))
    capsys.readouterr()
    run_script("data/make_synthetic.py", "--output_dir", "a", "--seed", "3", *QUICK)
    assert "nothing to do" in capsys.readouterr().out


def test_instruction_world_is_in_the_users_formats(workspace: Path) -> None:
    run_script("data/make_synthetic.py", "--output_dir", "world", *QUICK)
    rows = [json.loads(line) for line in Path("world/flan.jsonl").read_text().splitlines()]
    assert set(rows[0]) == {"inputs", "targets", "_template_idx", "_task_name", "_task_source", "_template_type"}
    data = load_instruction(["world/flan.jsonl"], ["world/target.jsonl"])
    assert len(data.tasks) == 6 and "target" in data.targets and len(data.indices("train")) == 6 * 16
    prompts = {
        e.task == "target": {x.prompt for x in data.examples if (x.task == "target") == (e.task == "target")}
        for e in data.examples
    }
    assert not prompts[True] & prompts[False]
    alpaca = load_instruction(["world/alpaca.pkl"], ["world/target.jsonl"])
    assert alpaca.tasks == data.tasks
    tokenizer, model = (auto.from_pretrained("world/model") for auto in (AutoTokenizer, AutoModelForCausalLM))
    assert tokenizer.pad_token_id is not None and tokenizer.eos_token_id is not None
    assert model.config.model_type == "llama"


def test_wrong_answers_are_as_many_as_the_name_says(workspace: Path) -> None:
    from tests.commands import load_script

    run_script("data/make_synthetic.py", "--output_dir", "world", *QUICK)
    skills = load_script("data/make_synthetic.py").SKILLS
    rewrite = {skill.instruction: skill.rewrite for skill in skills.values()}
    wrong: dict[str, list[bool]] = {}
    for line in Path("world/flan.jsonl").read_text().splitlines():
        row = json.loads(line)
        instruction, word = row["inputs"].split(": ")
        wrong.setdefault(row["_task_name"], []).append(rewrite[instruction](word) != row["targets"])
    shares = {name: sum(flags) / len(flags) for name, flags in wrong.items()}
    assert all(share == 0 for name, share in shares.items() if "clean" in name)
    assert all(0.3 <= share <= 0.5 for name, share in shares.items() if "noisy50" in name)


def test_chain_of_thought_world(workspace: Path) -> None:
    run_script("data/make_synthetic_cot.py", "--output_dir", "cot", "--num_questions", "40", "--pretrain_steps", "2")
    data = load_cot("addsub", "ft_cot_t70_4aug", architecture="encoder_decoder", data_dir="cot/data", saved_dir="cot/saved",
                    task_column="teacher")  # fmt: skip
    assert len(data.tasks) >= 3 and "careful" in data.tasks
    assert all(example.completion.endswith(f"--> {int(float(example.answer))}") for example in data.examples)
    first = digests("cot", ("data/dataset/addsub.json", "data/split/addsub__default.json"))
    run_script("data/make_synthetic_cot.py", "--output_dir", "cot2", "--num_questions", "40", "--pretrain_steps", "2")
    assert digests("cot2", ("data/dataset/addsub.json", "data/split/addsub__default.json")) == first
    tokenizer, model = (auto.from_pretrained("cot/model") for auto in (AutoTokenizer, AutoModelForSeq2SeqLM))
    assert tokenizer("1 + 2").input_ids[-1] == tokenizer.eos_token_id and model.config.model_type == "t5"
