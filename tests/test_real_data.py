"""Real data through the stages, on a tiny model whose tokenizer is trained on it, and the worlds that are made of it."""

import json
from datetime import date
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from src.finetune import save_checkpoint
from src.models import LoraShape, add_adapter, load_base_model
from tests import commands
from tests.commands import COLLECT, ESTIMATE, SELECT, TRAIN, load_script, read_jsonl, refused, run_script


@pytest.fixture
def tiny_llama(workspace, shared_data):
    """A folder made from the first rows of the real file."""
    with open(shared_data / "instruction" / "flan_mini.jsonl", encoding="utf-8") as file:
        Path("flan.jsonl").write_text("".join(islice(file, 300)), encoding="utf-8")
    made = "data/make_base_model.py --data_files flan.jsonl --output_dir tiny --architecture llama --hidden_size 32 "
    run_script(f"{made} --num_layers 2 --num_heads 2 --vocab_size 800 --pretrain_steps 2")
    return "tiny"


def stages(flags: list[str]) -> pd.DataFrame:
    """Stages 1 to 4; the estimates."""
    run_script(f"{TRAIN} --epochs 1 --batch_size 16 --checkpoint_at 1.0 --max_length 96", *flags)
    run_script(*COLLECT, "--max_length", "96", *flags)
    run_script(f"{ESTIMATE} --number_of_subsets 20 --save_name real", *flags)
    run_script(f"{SELECT} --save_name real --max_tasks 2", *flags)
    return pd.read_csv("results/real/estimates.csv")


def test_flan_rows(tiny_llama):
    frame = stages(["--data_files", "flan.jsonl", "--model_key", tiny_llama, "--train_lora"])
    estimates = frame.filter(like="estimate/").to_numpy(float)
    assert estimates.shape[1] >= 30 and np.isfinite(estimates).all()
    assert (estimates.std(axis=0) > 0).all()


def test_alpaca_pickle_with_its_dev_map(tiny_llama, shared_data):
    source = shared_data / "instruction"
    frame = pd.read_pickle(source / "alpaca_mini.pkl").groupby("skill").head(12)
    held_out = pd.read_pickle(source / "alpaca_mini_dev_split_map.pkl")
    kept = {skill: np.intersect1d(labels, frame.index) for skill, labels in held_out.items()}
    kept = {skill: labels for skill, labels in kept.items() if len(labels) >= 2}
    frame[frame["skill"].isin(kept)].to_pickle("alpaca_final.pkl")
    pd.to_pickle(kept, "alpaca_dev_split_map.pkl")
    frame = stages(["--data_files", "alpaca_final.pkl", "--model_key", tiny_llama, "--train_lora"])
    estimates = frame.filter(like="estimate/").to_numpy(float)
    assert estimates.shape[1] == len(kept) and np.isfinite(estimates).all()


def test_strategy_qa_from_gradients_to_selection(workspace, shared_data, model_folders):
    """The real StrategyQA files through gradients, clusters, 200 estimates and forward selection."""
    for folder, name in (("data", "dataset"), ("data", "split"), ("saved", "completion_data")):
        Path(folder).mkdir(exist_ok=True)
        source = shared_data / "chain_of_thought" / (name if folder == "data" else f"saved/{name}")
        Path(folder, name).symlink_to(source, target_is_directory=True)
    Path("data/split").unlink()
    Path("data/split").mkdir()
    split = json.loads((shared_data / "chain_of_thought/split/strategy_qa__default.json").read_text())
    few = {"train": split["train"][:400], "test": split["test"][:20]}
    Path("data/split/strategy_qa__default.json").write_text(json.dumps(few))
    flags = f"--dataset_key strategy_qa --preset_key ft_cot --train_lora --model_key {model_folders['t5']}"
    at = [*flags.split(), "--project_dim", "64", "--load_model_dir", "start/step_step=0"]
    short = ["--max_length", "96", "--max_target_length", "96"]
    model = add_adapter(load_base_model(model_folders["t5"]), LoraShape(16, 32), seed=0)
    save_checkpoint(model, Path("external_lightning_logs/start/step_step=0"), {"step": 0})
    run_script(commands.COT_COLLECT, *at, *short)
    clusters = ["--load_clusters", "--num_clusters", "12", "--save_name", "qa"]
    run_script(commands.COT_ESTIMATE, *at, *short, *clusters, "--number_of_subsets", "200")
    run_script(SELECT, *at, *clusters)
    frame = pd.read_csv("results/qa/estimates.csv")
    assert len(frame) == 200 and frame["score/strategy_qa"].std() > 0
    selected = Path("sampled_tasks/qa_forward_selection.txt").read_text().splitlines()[-1]
    assert 1 <= len(selected.split()) <= 12


def test_calendar_asks_the_target_for_days_of_its_own_in_the_words_of_cldr(workspace):
    pytest.importorskip("babel")
    run_script("data/make_calendar.py", "--rows", "40", "--target_rows", "90")
    texts: dict[str, dict[str, str]] = {}
    for path in Path("data/calendar").glob("*/*.jsonl"):
        talks = [row["messages"] for row in read_jsonl(path)]
        texts[path.stem] = {talk[1]["content"]: talk[2]["content"] for talk in talks}
    target = texts.pop("norwegian")
    assert len(texts) == 12 and all(target.keys().isdisjoint(asked) for asked in texts.values())
    for name in ("danish", "swedish", "german", "dutch"):
        right, wrong = texts[name], texts[f"{name}_shuffled"]
        assert right.keys() == wrong.keys() and sorted(right.values()) == sorted(wrong.values())
        assert all(right[question] != wrong[question] for question in right)
    refused("more days than a year has", run_script, "data/make_calendar.py", "--rows", "300", "--target_rows", "90")
    written, day = load_script("data/make_calendar.py").date_in, date(2024, 3, 15)
    assert written(day, "nb") == "fredag 15. mars" and written(day, "da") == "fredag den 15. marts"
    assert written(day, "es") == "viernes, 15 de marzo" and written(day, "en") == "Friday, March 15"
    refused("one that ends with the year", written, day, "hu")


def test_flan_world_holds_the_named_tasks(workspace):
    world = load_script("data/make_flan_world.py")
    tasks = [task for task in (*world.FLAN_SOURCES, *world.TARGETS) for _ in range(6)]
    texts = ((task, {"inputs": f"{task} {n % 6}", "targets": f"answer {n % 6}"}) for n, task in enumerate(tasks))
    commands.write_jsonl("flan.jsonl", ({**row, "_task_name": task} for task, row in texts))
    skills = [(name, f"{name} {i}", "", f"answer {i}") for name in (*world.SKILLS, "find") for i in range(5)]
    pd.DataFrame(skills, columns=["skill", "instruction", "input", "output"]).to_pickle("alpaca.pkl")
    here = ["--flan_file", "flan.jsonl", "--alpaca_file", "alpaca.pkl", "--output_dir", "world"]
    run_script("data/make_flan_world.py", *here, "--rows", "4", "--target_rows", "5")
    sources, targets = read_jsonl(Path("world/flan.jsonl")), read_jsonl(Path("world/target.jsonl"))
    assert len(sources) == 15 * 4 and len(targets) == 3 * 5
    assert {row["_task_name"] for row in targets} == set(world.TARGETS)
    for name in world.SHUFFLED:
        wrong = [row for row in sources if row["_task_name"] == f"{name}_shuffled"]
        assert len(wrong) == 4 and all(row["inputs"].split()[-1] != row["targets"].split()[-1] for row in wrong)
    refused("rows of at most 12 characters", run_script, "data/make_flan_world.py", *here, "--max_characters", "12")
