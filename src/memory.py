"""What a run will need, against what is there: told before it starts, refused where it cannot end well.

Weights, stores and moments are counted. Activations are measured: one forward of the longest row, whose tensors kept
for the backward are added up, stands for every row of the largest batch.

Letters: L transformer blocks, p parameters of the gradient, d projection dimension.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from src.cli import Hardware
from src.datamodule import TaskDataModule
from src.models import LanguageModel

BACKWARD_SHARE = 2.5
"""Peak of forward and backward over the activations kept for the backward: what is in flight comes on top (measured: 2.1
in a pass for gradients, 2.6 in a training step)."""
USABLE_SHARE = 0.7
"""Of the free memory that `--max_tokens_per_batch auto` plans with; another program may want some too."""
LARGEST_ON_CPU = 4096
"""Tokens of a batch beyond which a CPU gains nothing."""
OPTIMIZER_BYTES = 12
"""For each trained number: its gradient and AdamW's two moments, in float32."""


def readable(size: float) -> str:
    """A number of bytes for people: 5.8 GB."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def free_memory(device: str, processes_here: int = 1) -> int:
    """Bytes that this process may still take on its device; processes on one CPU share its memory."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # a container's own limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return free // processes_here


def weight_bytes(model: LanguageModel, world: int = 1, trained_only: bool = False) -> int:
    """Bytes of the weights, or the number of trained ones; each process's share where `world` of them divide it."""
    chosen = [p for p in model.parameters() if p.requires_grad or not trained_only]
    return sum(p.numel() * (1 if trained_only else p.element_size()) for p in chosen) // world


@torch.enable_grad()
def activation_bytes(model: LanguageModel, datamodule: TaskDataModule, row: int, half: bool) -> int:
    """Bytes that one row's forward keeps for its backward, measured.

    With activation checkpointing: the blocks' inputs, and what one block keeps while it is computed again.

    Args:
        model: The model, its parameters still to be trained; weights may be spread over processes, which then all ask.
        datamodule: Its data.
        row: Sample index.
        half: Whether mixed precision will be used.
    """
    storages: dict[int, tuple[int, bool]] = {}
    weights: set[int] = set()
    inside: list[nn.Module] = []
    block_inputs: list[int] = []

    def enter(module: nn.Module, arguments: tuple) -> None:
        inside.append(module)
        block_inputs.append(sum(value.nbytes for value in arguments if isinstance(value, Tensor)))

    def note_weights(module: nn.Module, _: tuple) -> None:
        own = (getattr(p, "_local_tensor", p) if isinstance(p, DTensor) else p for p in module.parameters(False))
        weights.update(p.untyped_storage().data_ptr() for p in own)

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages.setdefault(storage.data_ptr(), (storage.nbytes(), bool(inside)))
        return tensor

    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    hooks = [module.register_forward_pre_hook(note_weights) for module in model.modules()]
    hooks += [block.register_forward_pre_hook(enter) for block in blocks]
    hooks += [block.register_forward_hook(lambda *_: inside.pop() and None) for block in blocks]
    batch = {name: value.to(model.device) for name, value in datamodule.collate([row]).items()}
    dtype = torch.bfloat16 if half else torch.float32
    try:
        with (
            _evaluating(model),
            torch.autocast(model.device.type, dtype, enabled=half),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            logits, *_ = model.target_logits(batch)
    finally:
        for hook in hooks:
            hook.remove()
    of_blocks = sum(size for size, in_block in storages.values() if in_block)
    others = sum(size for size, in_block in storages.values() if not in_block) + logits.numel() * 4
    if blocks and any(getattr(block, "gradient_checkpointing", False) for block in blocks):
        of_blocks = of_blocks // len(blocks) + sum(block_inputs)
    return of_blocks + others


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode (nothing is checkpointed or dropped), and back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by what they are for, on the device and on disk, and what is free there.

    Attributes:
        device: Where the model is, for messages.
        needs: What for -> bytes on the device.
        free: Bytes free on the device.
        disk_needs: What for -> bytes on disk.
        disk_free: Bytes free there.
        cure: What to do when the device is too small.
    """

    device: str
    needs: dict[str, int]
    free: int
    cure: str
    disk_needs: dict[str, int] | None = None
    disk_free: int = 0

    def describe(self) -> str:
        """One line for the terminal."""
        line = f"Memory on {self.device}: {_sum(self.needs)} of {readable(self.free)} free"
        return line + (
            f". Disk: {_sum(self.disk_needs)} of {readable(self.disk_free)} free." if self.disk_needs else "."
        )

    def check(self) -> None:
        """Refuse what does not fit.

        Raises:
            ValueError: it does not; with the plan and the cure.
        """
        if sum(self.needs.values()) > self.free:
            raise ValueError(f"this does not fit. {self.describe()} {self.cure}")
        if self.disk_needs and sum(self.disk_needs.values()) > self.disk_free:
            raise ValueError(f"this does not fit. {self.describe()} Make room, or pass a smaller --project_dim")


def _sum(needs: dict[str, int]) -> str:
    parts = " + ".join(f"{name} {readable(size)}" for name, size in needs.items())
    return f"{parts} = {readable(sum(needs.values()))}"


SMALLER = "--gradient_checkpointing, --precision bf16, --base_dtype bfloat16, --use_qlora or --strategy fsdp"


def plan_training(model: LanguageModel, datamodule: TaskDataModule, hardware: Hardware, batch_size: int) -> MemoryPlan:
    """Of a fit that has the longest training rows in one batch."""
    rows = datamodule.by_length(datamodule.train_indices)[:batch_size]
    world = hardware.num_processes if hardware.strategy == "fsdp" else 1
    activations = len(rows) * activation_bytes(model, datamodule, int(rows[0]), hardware.autocast is not None)
    needs = {
        "weights": weight_bytes(model, world),
        "optimizer": OPTIMIZER_BYTES * weight_bytes(model, world, trained_only=True),
        _batch_name(datamodule, rows): int(BACKWARD_SHARE * activations),
    }
    free = free_memory(hardware.device, hardware.processes_here)
    if hardware.device == "cpu":
        free += needs.pop("weights")  # they are there already
        needs = {"weights": weight_bytes(model, world), **needs}
    return MemoryPlan(hardware.device, needs, free, f"Pass a smaller --batch_size with --accumulate, {SMALLER}")


def plan_gradients(
    model: LanguageModel,
    datamodule: TaskDataModule,
    rows: np.ndarray,
    hardware: Hardware,
    *,
    max_tokens: int | str,
    projection_bytes: int,
    moment_bytes: int,
    store: Path,
    part_bytes: int,
    num_parts: int,
) -> tuple[MemoryPlan, int]:
    """Of a pass over the sample indices `rows`, with the model on its device already.

    Args:
        model: The model.
        datamodule: Its data.
        rows: Sample indices.
        hardware: Where it runs.
        max_tokens: Budget of a batch, or "auto" for the largest power of two that fits.
        projection_bytes: Kept by the projection.
        moment_bytes: Of a part's moments on disk; they are summed in twice the precision in the CPU's memory.
        store: Folder of the store.
        part_bytes: Of a part's rows on disk.
        num_parts: Parts that are still to be taken.

    Returns:
        The plan, and the budget in tokens.
    """
    longest = datamodule.by_length(rows)[0]
    tokens = int(datamodule.row_lengths[longest])
    each = BACKWARD_SHARE * activation_bytes(model, datamodule, int(longest), hardware.autocast is not None)
    weights = weight_bytes(model, hardware.num_processes if model.is_sharded else 1)
    free = free_memory(hardware.device, hardware.processes_here)
    needs = {"projection": projection_bytes}
    if hardware.device == "cpu":
        needs["moments"] = 2 * moment_bytes
    if isinstance(max_tokens, str):  # "auto"
        room = max(0.0, USABLE_SHARE * (free - sum(needs.values())))
        fitting = max(1, int(room / each)) * tokens
        max_tokens = 1 << int(np.log2(fitting)) if fitting > tokens else tokens
        max_tokens = min(max_tokens, max(tokens, LARGEST_ON_CPU)) if hardware.device == "cpu" else max_tokens
    largest = datamodule.budgeted(rows, max_tokens)[0]
    needs = {"weights": weights, **needs, _batch_name(datamodule, largest): int(len(largest) * each)}
    existing = next(parent for parent in (store, *store.absolute().parents) if parent.is_dir())
    plan = MemoryPlan(
        hardware.device,
        needs,
        free + weights,  # they are there already
        f"Pass --max_tokens_per_batch auto, {SMALLER}",
        {"gradients": num_parts * part_bytes, "moments": num_parts * moment_bytes},
        shutil.disk_usage(existing).free,
    )
    return plan, max_tokens


def _batch_name(datamodule: TaskDataModule, rows: np.ndarray) -> str:
    return f"a batch of {len(rows)} x {int(datamodule.row_lengths[rows].max())} tokens"
