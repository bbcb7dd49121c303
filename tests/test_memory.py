"""The memory plan: what it counts, what it refuses, and batches that are made to fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from src import gradients, memory
from src.gradients import GradientCollector, StoreWriter, collect_gradients
from src.projection import make_projection
from tests.commands import run_script
from tests.test_models import KINDS, adapted, make_datamodule
from tests.test_stages import here, track

__all__ = ["here", "track"]  # the fixtures: a workspace in which stages 1 and 2 have run
STAGE_2 = ["fast_estimate_eval_approximation_alpaca.py", "--compute_pretrained_outputs"]


@pytest.mark.parametrize("kind", KINDS)
def test_activations_grow_with_the_row_and_shrink_by_checkpointing(
    kind: str, model_folders: dict[str, str], tmp_path: Path
) -> None:
    """At least what the layers' outputs take, a batch of rows as many times one row, less where blocks are computed again."""
    model = adapted(model_folders[kind])
    datamodule = make_datamodule(model, tmp_path)
    short, long = datamodule.by_length(np.arange(20))[[-1, 0]]
    kept = [memory.activation_bytes(model, datamodule, row, half=False) for row in (short, long)]
    outputs = 0

    def count(_: torch.nn.Module, __: tuple, output: torch.Tensor) -> None:
        nonlocal outputs
        outputs += output.nbytes

    # a lower bound that needs no hook into autograd: adapters keep their inputs, H numbers and r numbers a token
    hooks = [
        module.register_forward_hook(count) for name, module in model.named_modules() if name.endswith("lora_A.default")
    ]
    model.target_logits(datamodule.collate([long]))
    for hook in hooks:
        hook.remove()
    assert outputs < kept[1]
    ratio = datamodule.row_lengths[long] / datamodule.row_lengths[short]
    assert 0.7 * ratio < kept[1] / kept[0] < 1.5 * ratio * ratio
    assert memory.activation_bytes(model.checkpoint_activations(), datamodule, long, half=False) < kept[1]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_pass_that_does_not_fit_is_refused_before_it_writes(here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    free = memory.free_memory
    monkeypatch.setattr(memory, "free_memory", lambda *_: 100_000)
    before = sorted(Path("gradients").rglob("*"))
    with pytest.raises(
        ValueError, match=r"does not fit\. Memory on cpu: weights .* batch of .* free.*--max_tokens_per_batch auto"
    ):
        run_script(*STAGE_2, *here, "--project_dim", "16")
    with pytest.raises(ValueError, match=r"does not fit\. Memory on cpu: .*optimizer.*--batch_size with --accumulate"):
        run_script("custom_train_alpaca.py", *here, "--save_name", "large", "--epochs", "1")
    monkeypatch.setattr(memory, "free_memory", free)
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match=r"does not fit.*Disk: gradients .* 0\.0 MB free.*--project_dim"):
        run_script(*STAGE_2, *here, "--project_dim", "16")
    assert sorted(Path("gradients").rglob("*")) == before


def test_auto_takes_what_fits(model_folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More memory, larger batches, up to what a CPU gains by; the plan of the batch it names fits."""
    from src.cli import Hardware

    model = adapted(model_folders["llama"])
    datamodule = make_datamodule(model, tmp_path)
    hardware = Hardware("cpu", 1, "auto", "32-true", 1)
    rows, budgets = np.arange(20), []
    for free in (3e5, 3e6, 3e7, 3e9):
        monkeypatch.setattr(memory, "free_memory", lambda *_, free=free: int(free))
        sizes = {"projection_bytes": 1000, "moment_bytes": 1000, "part_bytes": 1, "num_parts": 1}
        plan, budget = memory.plan_gradients(
            model, datamodule, rows, hardware, max_tokens="auto", store=tmp_path, **sizes
        )
        budgets.append(budget)
        if free > 3e5:
            plan.check()
    assert (
        budgets == sorted(budgets)
        and budgets[0] == datamodule.row_lengths.max()
        and budgets[-1] == memory.LARGEST_ON_CPU
    )
    with pytest.raises(ValueError, match="does not fit"):
        monkeypatch.setattr(memory, "free_memory", lambda *_: 1000)
        memory.plan_gradients(model, datamodule, rows, hardware, max_tokens="auto", store=tmp_path, **sizes)[0].check()


def test_a_batch_that_ends_the_memory_is_halved(
    model_folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Three rows fit, more do not: the same rows as with memory for all; one that does not fit alone is named."""
    model = adapted(model_folders["llama"])
    datamodule = make_datamodule(model, tmp_path, max_tokens_per_batch=10_000)
    rows = datamodule.data.indices("train")
    samples = {"sample_index": rows, "task": datamodule.data.task_of_sample[rows], "target": np.full(len(rows), -1)}
    projection, taken, fitting = make_projection("sketch", 16, 0), [], 100

    class Small(GradientCollector):
        def __call__(self, batch):
            if len(batch["labels"]) > fitting:
                raise torch.OutOfMemoryError("CUDA out of memory")
            taken.append(len(batch["labels"]))
            return super().__call__(batch)

    monkeypatch.setattr(gradients, "GradientCollector", Small)
    stores = []
    for name, fitting in (("all", 100), ("three", 3)):  # noqa: B007 read by the collector
        stores.append(StoreWriter(tmp_path / name, {}, samples, 16, ""))
        collect_gradients(model, datamodule, projection, stores[-1], output_function="loss")
        assert not len(stores[-1].missing())
    assert taken[0] == len(rows) and 1 <= max(taken[1:]) <= 3 and sum(taken) == 2 * len(rows)
    np.testing.assert_allclose(stores[1].rows, stores[0].rows, rtol=1e-4, atol=1e-6)
    assert "batches are halved" in capsys.readouterr().out
    fitting = 0
    with pytest.raises(
        ValueError, match=r"a batch of 1 rows of up to \d+ tokens does not fit.*--gradient_checkpointing"
    ):
        collect_gradients(
            model, datamodule, projection, StoreWriter(tmp_path / "none", {}, samples, 16, ""), output_function="loss"
        )


def test_rows_of_half_precision(here: list[str], tmp_path: Path) -> None:
    """Half the room, near the same rows, estimates from them; a gradient too large for it is refused."""
    run_script(*STAGE_2, *here, "--project_dim", "32", "--run", "0", "--row_dtype", "float32")
    run_script(*STAGE_2, *here, "--project_dim", "48", "--row_dtype", "float16")
    run_script(*STAGE_2, *here, "--project_dim", "48", "--row_dtype", "float32", "--max_tokens_per_batch", "auto", "--run", "0",
               "--output_function", "margin")  # fmt: skip
    (half,) = Path("gradients").glob("*dim_48_run_0")
    rows = np.load(half / "step_step=8" / "projected.npy")
    assert rows.dtype == np.float16
    run_script("fast_estimate_linear_regression_alpaca.py", *here, "--project_dim", "48", "--number_of_subsets", "4",
               "--save_name", "half")  # fmt: skip
    with pytest.raises(ValueError, match="row_dtype: found float16, expected float32"):
        run_script(*STAGE_2, *here, "--project_dim", "48", "--row_dtype", "float32")
    samples = {"sample_index": np.arange(2), "task": np.zeros(2, int), "target": np.full(2, -1)}
    for size in (1e6, 1e-9):
        store = StoreWriter(tmp_path / "store", {}, samples, 4, "", row_dtype="float16")
        with pytest.raises(ValueError, match=r"does not fit into float16.*--row_dtype float32"):
            store.write(np.arange(2), np.full((2, 4), size, np.float32), np.zeros(2, np.float32))


def test_four_bit_stages(here: list[str], capsys: pytest.CaptureFixture) -> None:
    """Training and gradients on a 4-bit base; gradients without the flag are refused, and 4 bits without an adapter."""
    quantized = [*here, "--use_qlora", "--save_name", "four"]
    run_script("custom_train_alpaca.py", *quantized, "--epochs", "1", "--batch_size", "8", "--checkpoint_at", "1.0")
    run_script(*STAGE_2, *quantized, "--project_dim", "24")
    (store,) = Path("gradients").glob("*dim_24_run_0")
    assert np.isfinite(np.load(store / "step_step=8" / "projected.npy")).all()
    with pytest.raises(ValueError, match="use_qlora: found True, expected False"):
        run_script(*STAGE_2, *here, "--save_name", "four", "--project_dim", "20")
    with pytest.raises(SystemExit):
        run_script("custom_train_alpaca.py", *[flag for flag in quantized if flag != "--train_lora"], "--epochs", "1")
    assert "--use_qlora is for a base model that stays as it is; pass --train_lora" in capsys.readouterr().err
