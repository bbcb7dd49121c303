"""Checkpoints of transformers' and TRL's trainers go in, and everything after stage 1 runs on them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl.scripts.utils import DatasetMixtureConfig, TrlParser, get_dataset

from src.store import open_store
from tests.commands import COLLECT, COMPARE, ESTIMATE, EXPORT, SELECT, TRAIN, read_json, refused, run_script
from tests.conftest import write_sources

yaml = pytest.importorskip("yaml")  # it comes with transformers
THEIRS = f"{' '.join(COLLECT)} --data_files my --load_model_dir"
IMPORT = "scripts/import_results.py measured.csv"
SHAPE = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
STEPS = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "per_device_train_batch_size": 5, "logging_steps": 1,
         "learning_rate": 0.01, "report_to": [], "use_cpu": True, "disable_tqdm": True}  # fmt: skip


@pytest.fixture
def rows(workspace: Path) -> list[dict[str, str]]:
    """Three sources of 20 rows in my/."""
    Path("my").mkdir()
    for name in ("down", "left", "up"):
        write_sources(Path("my") / f"{name}.jsonl", {name: 20})
    lines = [line for path in sorted(Path("my").glob("*.jsonl")) for line in path.read_text().splitlines()]
    return [{"prompt": row["inputs"], "completion": row["targets"]} for row in map(json.loads, lines)]


def transformers_trainer(model: str, rows: list[dict[str, str]], whole: bool = False) -> None:
    """Train 4 steps, saved as out/checkpoint-2 and out/checkpoint-4."""
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    ids = [tokenizer(row["prompt"] + row["completion"])["input_ids"][:20] for row in rows]
    ids = [row + [tokenizer.eos_token_id] * (20 - len(row)) for row in ids]
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    torch.manual_seed(0)  # of the adapter
    network = network if whole else get_peft_model(network, LoraConfig(**SHAPE))
    options = TrainingArguments("out", **STEPS)
    Trainer(network, options, train_dataset=data, processing_class=tokenizer).train()


def trl_trainer(model: str, rows: list[dict[str, str]]) -> None:
    """The same by TRL's supervised fine-tuning."""
    data, shape = Dataset.from_list(rows), LoraConfig(**SHAPE)
    trl.SFTTrainer(model, trl.SFTConfig("out", **STEPS), train_dataset=data, peft_config=shape).train()


def parts_of(store: str) -> list:
    return open_store(Path("gradients") / store, None, "stage 2")


def test_gradients_at_a_trainers_checkpoint_are_those_at_ours(rows, model_folders, capsys):
    """Of the same weights in a folder that stage 1 wrote."""
    model = model_folders["llama"]
    transformers_trainer(model, rows)
    run_script(f"{THEIRS} out/checkpoint-2 --save_name theirs")
    said = capsys.readouterr().out
    assert "taken from out/checkpoint-2" in said
    assert "lora_rank 4, lora_alpha 8, lora_target_modules q_proj v_proj" in said
    shape = "--train_lora --lora_rank 4 --lora_alpha 8 --lora_target_modules q_proj v_proj --epochs 1 --checkpoint_at 0"
    run_script(f"{TRAIN} --data_files my --model_key {model} {shape} --stop_after_checkpoints --save_name ours")
    (ours,) = Path("external_lightning_logs").glob("*_ours_run_0/step_step=0")
    shutil.copy("out/checkpoint-2/adapter_model.safetensors", ours)
    run_script(*COLLECT, "--save_name", "ours")
    theirs, ours = (parts_of(next(Path("gradients").glob(f"*_{name}_dim*")).name)[0] for name in ("theirs", "ours"))
    assert (theirs.manifest["step"], ours.manifest["step"]) == (2, 0)
    assert len(theirs.rows) == len(ours.rows) > 40 and np.abs(ours.rows).max() > 0
    np.testing.assert_allclose(theirs.rows, ours.rows, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("trainer", [trl_trainer, transformers_trainer])
def test_every_stage_runs_without_ours(trainer, rows, model_folders, capsys):
    """With the base model as the first checkpoint levels are known; fine-tuning takes the trainer's own settings."""
    trainer(model_folders["llama"], rows)
    named = ["--save_name", "law"]
    run_script(f"{THEIRS} base out/checkpoint-2 out/checkpoint-4", *named)
    run_script(ESTIMATE, *named)
    assert "estimate/up" in pd.read_csv("results/law/estimates.csv").columns
    run_script(SELECT, *named)
    capsys.readouterr()
    run_script(TRAIN, *named, "--subset_file", "sampled_tasks/law_forward_selection.txt")
    facts = read_json("results/law/results.json")
    assert (facts["lr"], facts["epochs"], facts["lora"]) == (0.01, 1, [4, 8]) and facts["rows_per_step"] == 5
    run_script(f"{EXPORT} --subset_file sampled_tasks/law_forward_selection.txt --for trl", *named)
    assert Path("results/law/export_trl/trl.yaml").is_file()
    (store,) = Path("gradients").glob("*_law_dim_4000_run_0")
    base, first, last = parts_of(store.name)
    assert [part.manifest["step"] for part in (base, first, last)] == [0, 2, 4]
    assert base.outputs.mean() > first.outputs.mean() > last.outputs.mean()


def test_whole_models_and_their_base(rows, model_folders):
    """The base model is that of --model_key, which such a folder does not name."""
    model = model_folders["llama"]
    transformers_trainer(model, rows, whole=True)
    run_script(f"{THEIRS} out/checkpoint-4 base --model_key {model} --save_name law")
    (store,) = Path("gradients").glob("*_law_dim_4000_run_0")
    base, last = parts_of(store.name)
    assert (base.manifest["step"], last.manifest["step"]) == (0, 4) and base.outputs.mean() > last.outputs.mean()


def test_checkpoints_that_do_not_belong_together_are_refused(rows, model_folders):
    transformers_trainer(model_folders["llama"], rows)
    for name in ("a", "b"):
        shutil.copytree("out/checkpoint-2", Path(name) / "checkpoint-2")
    described = Path("b/checkpoint-2/adapter_config.json")
    described.write_text(json.dumps(read_json(described) | {"lora_alpha": 16}))
    for names, message in (
        (["out/checkpoint-4", "b/checkpoint-2"], "--lora_alpha is 8 in out/checkpoint-4 and 16 in b/checkpoint-2"),
        (["out/checkpoint-2", "a/checkpoint-2"], "names two checkpoints checkpoint-2; rename one"),
        (["base"], "--load_model_dir base: name a checkpoint that was trained from it too"),
    ):
        refused(message, run_script, THEIRS, *names)


def test_losses_that_others_measured_judge_and_calibrate(rows, model_folders):
    """A table by names of tasks is what stage 5 would have written."""
    transformers_trainer(model_folders["llama"], rows)
    named = ["--save_name", "law"]
    run_script(f"{THEIRS} base out/checkpoint-4", *named)
    run_script(ESTIMATE, *named)
    values = {"": 4.0, "all": 1.0, "up": 2.5, "down, up": 1.5, "left": 3.0, "left,up": 2.0, "0": 2.75, "0 1": 1.25}
    lines = [f'"{subset}",{target},{loss}' for subset, loss in values.items() for target in ("up", "left")]
    Path("measured.csv").write_text("\n".join(["subset,target,loss", *lines]) + "\n")
    run_script(IMPORT, *named)
    table = pd.read_csv("results/law/results.csv", dtype={"subset": str}, keep_default_na=False).set_index("subset")
    found = table["validation_loss/up"].to_dict()
    assert found == {"": 4.0, "0 1 2": 1.0, "2": 2.5, "0 2": 1.5, "1": 3.0, "1 2": 2.0, "0": 2.75, "0 1": 1.25}
    run_script(f"{COMPARE} results/law/estimates.csv results/law/results.csv --target_task up left")
    run_script(f"{ESTIMATE} --target_task up --calibrate results/law/results.csv", *named)
    assert "calibrated/up" in pd.read_csv("results/law/estimates.csv").columns
    run_script("scripts/report.py", "results/law")
    assert Path("results/law/report.html").is_file()
    for header, line, message in (
        ("subset,target", "up,up", "no column 'loss'"),
        ("subset,target,loss", "up,up,high", "line 2: loss is 'high', expected a number"),
        ("subset,target,loss", "up,law,1", "line 2: target 'law'; the gradients have down, left, up"),
        ("subset,target,loss", "sideways,up,1", "line 2: 'sideways' is no task id"),
        ("subset,target,loss", "up,up,1\nup,up,2", "line 3: a value of this subset and target stands above"),
        ("subset,target,loss", "up,up,1\nup,left,1\nleft,up,2", "no loss of target left for left, run 0"),
    ):
        Path("measured.csv").write_text(f"{header}\n{line}\n")
        refused(message, run_script, IMPORT, *named, "--results_name", "again")
    refused(r"results\.csv is there already", run_script, IMPORT, *named)


def test_trls_own_parser_reads_what_is_exported(rows, model_folders, monkeypatch):
    """As many rows of each source as the mixture says."""
    Path("w.csv").write_text("name,share\nup,0.6\nleft,0.4\n")
    mixed = f"{EXPORT} --data_files my --task_weights w.csv --results_name mine --for trl --model_key"
    run_script(f"{mixed} {model_folders['llama']}")
    monkeypatch.chdir("results/mine/export_trl")
    parser = TrlParser([trl.ScriptArguments, DatasetMixtureConfig])
    _, mixture = parser.parse_args_and_config(["--config", "trl.yaml"])
    read = get_dataset(mixture)["train"]
    expected = {source["source"]: source["rows"] for source in read_json("mixture.json")["sources"]}
    assert read.column_names == ["prompt", "completion"]
    assert Counter(prompt.split()[0] for prompt in read["prompt"]) == expected


def test_axolotls_own_schema_knows_every_key(rows, model_folders):
    """Where it is installed, in an environment of its own."""
    schema = pytest.importorskip("axolotl.utils.schemas.datasets").SFTDataset
    named = ["--model_key", model_folders["llama"], "--results_name", "mine"]
    run_script(f"{EXPORT} --data_files my --task_idxes 0 --for axolotl", *named)
    for entry in yaml.safe_load(Path("results/mine/export_axolotl/axolotl.yaml").read_text())["datasets"]:
        assert schema(**entry).path == "down.jsonl" and set(entry) <= set(schema.model_fields)
