"""A base model in 4 bits: the same gradients as one backward per row, trained on and projected."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from src.models import BaseWeights, LoraShape, load_model
from tests.commands import refused, run_script
from tests.conftest import write_sources
from tests.test_gradients import rows_with_base

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: requirements-qlora.txt"
)


def test_four_bits_need_bitsandbytes(model_folders, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(
        "--use_qlora: bitsandbytes is not installed; pip install -r requirements-qlora",
        load_model,
        model_folders["llama"],
        LoraShape(4, 8),
        weights=BaseWeights(four_bit_device="cpu"),
    )


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["llama", "llama-wide"])
def test_gradients_on_a_four_bit_base(kind, model_folders, tmp_path):
    """Layers narrower than a block of 64 numbers too; an evaluation before takes no gradient away."""
    own, exact = rows_with_base(model_folders[kind], BaseWeights(four_bit_device="cpu"), tmp_path)
    assert own.min() > 0.99
    assert exact.min() > 0.5


@needs_bitsandbytes
def test_four_bit_stages(model_folders, workspace, capsys):
    """Training and gradients on a 4-bit base; gradients without the flag are refused, and 4 bits without an adapter."""
    write_sources(workspace / "sources.jsonl", {"up": 20, "down": 20})
    flags = ["--data_files", "sources.jsonl", "--model_key", model_folders["llama-wide"], "--lora_rank", "4"]
    stage_2 = ["fast_estimate_eval_approximation_alpaca.py", "--compute_pretrained_outputs", "--project_dim", "24"]
    training = ["--epochs", "2", "--batch_size", "8", "--checkpoint_at", "1.0"]
    run_script("custom_train_alpaca.py", *flags, "--train_lora", "--use_qlora", *training)
    run_script(*stage_2)
    (rows,) = Path("gradients").glob("*/*/projected.npy")
    assert np.isfinite(np.load(rows)).all()
    refused(
        r"--use_qlora is for a base model that stays as it is.*--train_lora",
        run_script,
        "custom_train_alpaca.py",
        *flags,
        "--use_qlora",
        "--epochs",
        "1",
    )
