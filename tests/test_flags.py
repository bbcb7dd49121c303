"""Flags: what is inherited, what contradicts, what has no effect, and what machines make of hardware flags."""

from dataclasses import fields
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy

from src import config, console
from src.artifacts import META_INITIALIZATIONS, write_manifest
from src.distributed import cluster
from tests import commands
from tests.commands import refused, run_script
from tests.conftest import write_sources
from tests.faults import srun_environments


def settings(typed: str, cls: type = config.EstimateConfig, script: str = "fast_estimate_linear_regression.py"):
    return config.inherit(cls, commands.typed(script, *typed.split()))


NOTES = {
    "--scale 0.4": "--scale has no effect without --evaluate displaced",
    "--scale 0.4 --evaluate displaced": None,
    "--num_clusters 9": "--num_clusters has no effect without --load_clusters",
    "--num_clusters 9 --load_clusters": None,
    "--lora_rank 8": "--lora_rank has no effect without --train_lora",
    "--precision bf16-true": "--precision bf16-true is taken as bf16-mixed",
    "--project_gradients --batch_size 2": None,
}


@pytest.mark.parametrize(("typed", "note"), NOTES.items())
def test_flags_without_effect_are_named_once(typed, note, capsys):
    for _ in range(2):
        settings(typed)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == (note is not None) and all(line.startswith(f"note: {note}") for line in printed)


def test_lightnings_names_of_precisions():
    found = settings("--train_lora --precision bf16-true")
    assert (found.base_dtype, found.hardware.precision) == ("bfloat16", "bf16-mixed")
    assert settings("--train_lora --precision 32-true").hardware.precision == "32-true"


@pytest.mark.parametrize(("strategy", "precision"), [("fsdp", "bf16-mixed"), ("ddp", "16-mixed")])
def test_the_published_precision_on_four_gpus(strategy, precision, capsys, monkeypatch):
    """The published command spreads the weights in 16 bits, which Lightning refuses: bf16 is taken, and that is said."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    hardware = config.HardwareConfig((0, 1, 2, 3), "auto", strategy, "16").hardware
    assert (hardware.devices, hardware.precision, hardware.num_processes) == ([0, 1, 2, 3], precision, 4)
    assert ("--precision bf16 is taken" in capsys.readouterr().out) == (strategy == "fsdp")
    check = {"fsdp": ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1), "ddp": "auto"}
    pl.Trainer(accelerator="cpu", devices=1, strategy=check[strategy], logger=False, enable_checkpointing=False,
               precision=precision if strategy == "fsdp" else None)  # fmt: skip
    with pytest.raises(ValueError, match="--devices 7: this machine has GPUs 0 to 3"):
        _ = config.HardwareConfig((7,)).hardware


@pytest.mark.parametrize("seen", [1, 4], ids=["--gpus-per-task=1", "all GPUs of the node"])
def test_a_process_of_srun_takes_one_gpu(seen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of three on the first of two nodes, which has one more than the second."""
    for name, value in srun_environments(5, nodes=2)[2].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    hardware = config.HardwareConfig().hardware
    number = 0 if seen == 1 else 2
    assert (hardware.devices, hardware.device, hardware.num_processes) == ([number], f"cuda:{number}", 5)
    (environment,) = cluster()
    assert (environment.global_rank(), environment.local_rank(), environment.world_size()) == (2, 0, 5)


def finished_run(name: str | None, **values: object) -> Path:
    """A run that has finished, as far as the next stage looks at it."""
    made = config.TrainConfig(**{"save_name": name, "model_key": "M", "data_files": ("a.jsonl",), **values})
    folder = made.training_dir(0)
    write_manifest(folder, {"config": config.recorded(made) | {"run": 0}})
    return folder


def collecting(typed: str) -> tuple[config.CollectConfig, Path | None]:
    return config.from_run(config.CollectConfig, commands.typed(commands.MEASURE, *typed.split()))


def test_a_stage_takes_what_is_not_typed_from_its_run(workspace, capsys):
    """By name; by flags that fit; or the last one, which is said."""
    law = finished_run("law", lr=1e-3, train_lora=True, lora_rank=4, max_length=64)
    plain = finished_run(None, lr=2e-3, model_key="N")
    found, folder = collecting("--save_name law --project_dim 32 --precision bf16")
    assert folder == law and (found.lr, found.lora_rank, found.max_length, found.project_dim) == (1e-3, 4, 64, 32)
    assert found.precision == "bf16" and not capsys.readouterr().out
    assert collecting("--model_key M --lora_rank 4")[1] == law
    found, folder = collecting("")
    assert folder == plain and (found.model_key, found.lr) == ("N", 2e-3)
    assert f"going on from {plain}" in capsys.readouterr().out


def test_what_is_typed_and_contradicts_is_refused_with_both_values(workspace):
    finished_run("law", lr=1e-3)
    refused("--lr 0.001 there, (--lr )?0.5 typed", collecting, "--save_name law --lr 0.5")
    refused("--model_key M there, other typed", collecting, "--model_key other")
    refused("nothing finished is called that; there is law", collecting, "--save_name poems")
    refused("--run 0 there, 3 typed", collecting, "--save_name law --run 3")
    both = {"dataset_key": "gsm8k", "data_files": ("a",)}
    refused("name one of them", config.inherit, config.TrainConfig, both)
    assert collecting("--save_name law --data_files b.jsonl")[0].data_files == ("b.jsonl",)  # a source added later


def test_fine_tuning_goes_on_from_its_run_and_meta_training_starts_anew(workspace):
    def training(typed):
        return commands.training(*typed.split())

    finished_run("law", lr=1e-3, epochs=3)
    assert training("--save_name law --task_idxes 0 1").lr == 1e-3
    assert training("--task_idxes").epochs == 3
    assert training("--data_files a.jsonl --model_key M").lr == 2e-5  # meta-training without a name: the defaults
    assert training("--model_key other --task_idxes").lr == 2e-5  # of another model, where no name is typed
    for more in ("--task_idxes --lr 0.5", "--lr 0.5", "--task_idxes --data_files b"):
        refused(r"law.*does not fit what is typed", training, f"--save_name law {more}")
    assert training("--save_name law").epochs == 3


def test_every_flag_is_declared_once_and_has_a_meaning():
    configs = [value for value in vars(config).values() if isinstance(value, type)]
    groups = [value for value in configs if issubclass(value, (config.RunConfig, config.ApproximationConfig))]
    declared: dict[str, set[int]] = {}
    for group in groups:
        for f in fields(group):
            assert f.metadata["help"], f.name
            declared.setdefault(f.name, set()).add(id(f.metadata["help"]))
    # under one published name each: a checkpoint to start from, and those to take gradients at; one length, and several
    assert {name for name, texts in declared.items() if len(texts) > 1} == {"load_model_dir", "scale"}


def test_a_training_too_short_for_an_adapter_is_noted_before_it_starts(model_folders, workspace, capsys):
    write_sources(workspace / "flan.jsonl", {"upper": 12, "lower": 12})
    here = ["--data_files", "flan.jsonl", "--model_key", model_folders["llama"], "--train_lora", "--max_length", "96"]
    for lr, batch_size, is_noted in (("2e-5", "128", True), ("1e-2", "8", False)):
        console._said.clear()
        options = ["--lr", lr, "--batch_size", batch_size, "--epochs", "2", "--save_name", lr]
        run_script("custom_train_alpaca.py", *here, *options)
        printed = capsys.readouterr().out
        assert ("2 optimizer steps at --lr 2e-05" in printed) == is_noted
        assert META_INITIALIZATIONS.is_dir()
        assert not is_noted or printed.index("optimizer steps") < printed.index("Wrote")
