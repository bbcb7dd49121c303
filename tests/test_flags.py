"""Flags that need each other: what has no effect is named once, what has one is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy

from src import cli
from tests.commands import load_script, run_script
from tests.conftest import write_sources

COT_ESTIMATES, SELECT = "fast_estimate_linear_regression.py", "fast_estimate_forward_selection.py"
APPROXIMATION = "fast_estimate_eval_approximation_alpaca.py"


@pytest.mark.parametrize(
    ("script", "typed", "note"),
    [
        (COT_ESTIMATES, "--dataset_key gsm8k --scale 0.4", "--scale has no effect without --evaluate displaced"),
        (COT_ESTIMATES, "--dataset_key gsm8k --scale 0.4 --evaluate displaced", None),
        (COT_ESTIMATES, "--dataset_key gsm8k --num_clusters 9", "--num_clusters has no effect without --load_clusters"),
        (COT_ESTIMATES, "--dataset_key gsm8k --num_clusters 9 --load_clusters", None),
        (COT_ESTIMATES, "--dataset_key gsm8k --num_clusters 100", None),  # the default
        (SELECT, "--lr 0.1", "--lr has no effect without --refine"),
        (SELECT, "--lr 0.1 --refine 3", None),
        (SELECT, "--rho 0.1 --estimator alignment", "--rho has no effect on this estimator, which has no ridge"),
        (SELECT, "--rho 0.1 --estimator alignment --weights", None),
        (SELECT, "--rho 0.1", None),
        (SELECT, "--project_dim 9 --projection none", "--project_dim has no effect with --projection none"),
        (APPROXIMATION, "--scale 0.3 --compute_pretrained_outputs", "--scale has no effect with --compute_pretrained"),
        (APPROXIMATION, "--scale 0.3", None),
        (APPROXIMATION, "--batch_size 2", "--batch_size has no effect where nothing is trained"),
        (COT_ESTIMATES, "--dataset_key gsm8k --batch_size 2", "--batch_size has no effect where nothing is trained"),
        (COT_ESTIMATES, "--dataset_key gsm8k --lora_rank 8", "--lora_rank has no effect without --train_lora"),
        (COT_ESTIMATES, "--dataset_key gsm8k --project_gradients", None),
        (SELECT, "--project_gradients --projection none", "--project_gradients has no effect with --projection none"),
        ("custom_train_alpaca.py", "--batch_size 2", None),
        (
            "custom_train_alpaca.py",
            "--precision bf16-true",
            "--precision bf16-true is taken as bf16-mixed: weights that",
        ),
        ("custom_train_alpaca.py", "--train_lora --precision 16-true", "--precision 16-true is taken as bf16-true"),
        (APPROXIMATION, "--row_dtype float16", "--row_dtype has no effect without --compute_pretrained_outputs"),
        ("fast_estimate_compute_gradients.py", "--dataset_key gsm8k --row_dtype float16", None),
        ("custom_train_alpaca.py", "--task_idxes --logger csv", "--logger has no effect in fine-tuning on subsets"),
        ("custom_train_alpaca.py", "--logger csv --epochs 3 --lr 0.1", None),
        ("custom_train_alpaca.py", "--results_name a", "--results_name has no effect in meta-training"),
        ("custom_train_alpaca.py", "--results_name a --task_idxes", None),
        (APPROXIMATION, "--results_name a --compute_pretrained_outputs", "--results_name has no effect with --compute"),
        (SELECT, "--results_name a", None),
    ],
)
def test_flags_without_effect_are_named(
    script: str, typed: str, note: str | None, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_said", set())
    for _ in range(2):
        load_script(script).parse_args(typed.split())
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == (note is not None) and all(line.startswith(f"note: {note}") for line in printed)


@pytest.mark.parametrize(
    ("typed", "same"),
    [
        ("32-true", "--precision 32"),
        ("16-mixed", "--precision 16"),
        ("bf16-mixed", "--precision bf16"),
        ("bf16-true", "--precision bf16 --base_dtype bfloat16"),
        ("16-true", "--precision bf16 --base_dtype bfloat16"),
    ],
)
def test_lightnings_names_of_precisions(typed: str, same: str) -> None:
    """They are ours under other names, so that stages and manifests agree whichever is typed."""
    script = load_script("custom_train_alpaca.py")
    assert script.parse_args(["--train_lora", "--precision", typed]) == script.parse_args(
        ["--train_lora", *same.split()]
    )


def test_16_bits_on_the_cpu_are_said_once(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_said", set())
    args = load_script(SELECT).parse_args(["--accelerator", "cpu", "--precision", "16"])
    assert {cli.hardware_from(args).precision for _ in range(2)} == {"32-true"}
    assert capsys.readouterr().out == "note: --precision 16 is for a GPU: the CPU computes in 32 bits\n"


@pytest.mark.parametrize(("strategy", "precision"), [("fsdp", "bf16-mixed"), ("ddp", "16-mixed")])
def test_the_published_precision_on_four_gpus(
    strategy: str, precision: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published command spreads the weights in 16 bits, which Lightning refuses: bf16 is taken, and that is said."""
    monkeypatch.setattr(cli, "_said", set())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    typed = f"--train_instruction --strategy {strategy} --devices 0 1 2 3 --runs 1 --precision 16 --accumulate 1"
    hardware = cli.hardware_from(load_script("custom_train_alpaca.py").parse_args(typed.split()))
    assert (hardware.devices, hardware.precision, hardware.num_processes) == ([0, 1, 2, 3], precision, 4)
    assert ("--precision bf16 is taken" in capsys.readouterr().out) == (strategy == "fsdp")
    check = {"fsdp": ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1), "ddp": "auto"}
    pl.Trainer(accelerator="cpu", devices=1, strategy=check[strategy], logger=False, enable_checkpointing=False,
               precision=precision if strategy == "fsdp" else None)  # fmt: skip


def test_another_process_says_nothing(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_said", set())
    monkeypatch.setenv("LOCAL_RANK", "1")
    load_script(SELECT).parse_args(["--lr", "0.1"])
    with cli.progress(desc="bar", total=2) as bar:
        bar.update(2)
    assert capsys.readouterr() == ("", "")


def test_a_training_too_short_for_an_adapter_is_noted_before_it_starts(
    model_folders: dict[str, str], workspace: Path, capsys: pytest.CaptureFixture
) -> None:
    write_sources(workspace / "flan.jsonl", {"upper": 12, "lower": 12})
    here = ["--data_files", "flan.jsonl", "--model_key", model_folders["llama"], "--train_lora", "--max_length", "96"]
    for lr, batch_size, is_noted in (("2e-5", "128", True), ("1e-2", "8", False)):
        cli._said.clear()
        run_script(
            "custom_train_alpaca.py", *here, "--lr", lr, "--batch_size", batch_size, "--epochs", "2", "--save_name", lr
        )
        printed = capsys.readouterr().out
        assert ("2 optimizer steps at --lr 2e-05" in printed) == is_noted
        if is_noted:
            assert printed.index("optimizer steps") < printed.index("Wrote")
