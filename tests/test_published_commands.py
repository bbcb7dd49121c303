"""The commands that the method was published with are taken as they stand: every flag by every script that had it."""

import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from src import config
from src.artifacts import META_INITIALIZATIONS, resolve_checkpoint
from tests import commands
from tests.commands import ESTIMATE, MEASURE, SELECT, TRAIN, run_script
from tests.conftest import write_sources

LLAMA = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
COT = (
    "--dataset_key strategy_qa --model_key flan_t5_base --preset_key ft_cot_t70_64aug "
    "--load_model_dir flan_t5_base_strategy_qa_ft_cot_t70_64aug_lora_r_16_new_run_0/epoch_epoch=17 "
    "--train_lora --lora_rank 16 --lora_alpha 128 --run 0 --project_dim 100 --device 1"
)
CLUSTERS = "--load_clusters --num_clusters 100 --number_of_subsets 1000 --subset_size 0.5 --scale 0.4"
ADAPTER = f"--model_key {LLAMA} --train_lora --lora_rank 128 --lora_alpha 512"
PROJECTED = (
    f"{ADAPTER} --precision bf16-true --load_model_dir {LLAMA.replace('/', '_')}_lora_r_128_run_0/epoch_epoch=3 "
    "--batch_size 2 --max_length 256 --project_gradients --project_dimension 100 --devices 0 1 2 --strategy auto"
)
COMMANDS = [
    "custom_train.py --dataset_key strategy_qa --model_key flan_t5_base --train_key ft_cot --preset_key ft_cot_t70_64aug "
    "--devices 1 --batch_size 8 --inference_batch_size 32 --train_lora --lora_rank 16 --lora_alpha 128 --runs 8",
    f"custom_train_alpaca.py --train_instruction --model_key {LLAMA} --lr 2e-5 --batch_size 128 --max_length 256 --epochs 10 "
    "--train_lora --lora_rank 128 --lora_alpha 512 --strategy fsdp --devices 0 1 2 3 --runs 1 --precision 16 --accumulate 1",
    f"fast_estimate_compute_gradients.py {COT}",
    f"fast_estimate_linear_regression.py {COT} {CLUSTERS}",
    f"fast_estimate_eval_approximation_alpaca.py {PROJECTED} --compute_pretrained_outputs --save_name test",
    f"fast_estimate_linear_regression_alpaca.py {PROJECTED} --save_name test --number_of_subsets 1000 --subset_size 0.5",
    f"fast_estimate_forward_selection.py {PROJECTED} --save_name test",
    # the projection's flags and --batch_size on the other track's scripts
    f"fast_estimate_compute_gradients.py {COT} --project_gradients --project_dimension 100 --batch_size 8",
    f"fast_estimate_linear_regression.py {COT} {CLUSTERS} --project_gradients --project_dimension 100 --batch_size 8",
    f"fast_estimate_forward_selection.py {COT} --load_clusters --num_clusters 100 --project_gradients --batch_size 4",
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[0])
@pytest.mark.parametrize("gpus", [0, 4])
def test_published_commands(command, gpus, capsys, monkeypatch):
    """On GPUs and without: every flag is taken, and has the value that is typed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    script, *arguments = shlex.split(command)
    typed = commands.typed(script, *arguments)
    asked = {"device": "devices", "project_dimension": "project_dim"}
    flags = [word[2:] for word in arguments if word.startswith("--")]
    assert {asked.get(name, name) for name in flags} == set(typed)
    found = config.inherit(config.TrainConfig if script.startswith("custom") else config.EstimateConfig, typed)
    own = [name for name in typed if hasattr(found, name) and name != "precision"]
    assert [getattr(found, name) for name in own] == [typed[name] for name in own]
    hardware = found.hardware
    assert (hardware.accelerator, hardware.devices) == (("cuda", list(typed["devices"])) if gpus else ("cpu", 1))
    assert ("No CUDA GPU here" in capsys.readouterr().out) == (gpus == 0)
    if "bf16-true" in command:
        assert (found.base_dtype, hardware.precision) == ("bfloat16", "bf16-mixed")


@pytest.mark.parametrize("precision", ["bf16", "bf16-true", "16"])
def test_half_precision_runs_every_stage(precision, model_folders, workspace):
    """On the CPU too: training, gradients, estimates at displaced weights, the approximation error, selection."""
    write_sources(workspace / "sources.jsonl", {"up": 20, "down": 20, "other": 20})
    flags = f"--data_files sources.jsonl --model_key {model_folders['llama']} --train_lora --lora_rank 4 --precision {precision}"
    projected = f"{flags} --project_gradients --project_dimension 16"
    run_script(f"{TRAIN} {flags} --epochs 1 --batch_size 8 --gradient_checkpointing")
    run_script(f"{MEASURE} --compute_pretrained_outputs {projected} --batch_size 2")
    run_script(f"{ESTIMATE} {projected} --number_of_subsets 2 --evaluate displaced --scale 0.4")
    run_script(f"{MEASURE} {projected} --scale 0.1")
    run_script(f"{SELECT} {projected}")
    (estimates,) = Path("results").glob("*/estimates.csv")
    assert np.isfinite(pd.read_csv(estimates).filter(like="displaced_loss").to_numpy(float)).all()


def test_checkpoints_are_named_with_or_without_ckpt(workspace):
    folder = META_INITIALIZATIONS / "run_0" / "epoch_epoch=3"
    folder.mkdir(parents=True)
    assert resolve_checkpoint("run_0/epoch_epoch=3") == resolve_checkpoint("run_0/epoch_epoch=3.ckpt") == folder
