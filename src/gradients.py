"""Projected per-sample gradients: taking them, and keeping them.

Taking: one forward and one backward of the *sum* of the per-sample outputs. Samples of a batch do not meet
before that sum, so the gradient at a layer's output, row by row, is the gradient of that row's own output;
with the layer's input it gives the per-sample gradient G_i = sum_t delta_t a_t^T of the layer's weight, which
is projected at once. Weight gradients, a p-vector or a p x d matrix are never formed (DESIGN 2).

Keeping: one folder per checkpoint, rows keyed by sample index, complete or absent.

Letters: N samples, R stored rows (training and validation), B batch, T tokens, d projection dimension, n tasks.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from src.cli import progress, say_once
from src.datamodule import Batch, TaskDataModule
from src.estimation import MomentSums, Part, Rows, TaskMoments, task_moments
from src.models import OUTPUT_FUNCTIONS, AdaptedMatrix, LanguageModel
from src.paths import MANIFEST, atomic_write, check_manifest, read_manifest, write_json, write_manifest
from src.processes import Processes
from src.projection import Projection

PROJECTED = "projected.npy"
OUTPUTS = "outputs.npy"
REPRESENTATIONS = "representations.npy"
SAMPLES = "samples.npz"
DONE = "done.npy"
REQUEST = "request.json"
PROJECTION_SIGNS = "projection_signs.npz"
FLUSH_EVERY = 200
"""Batches after which rows are forced to disk."""


class GradientCollector:
    """Projected gradients of a batch in one backward.

    Used as a context: inside it the model is in evaluation mode and its parameters are frozen (the backward
    needs activations and output gradients, never `param.grad`); on exit both are as before. Activation checkpointing,
    where it is on, goes on.

    Args:
        model: The model at the meta-initialization.
        projection: Where each matrix's per-sample gradients are added.
        output_function: "loss" or "margin".
        autocast: dtype name of mixed precision, or None. Projections are added up in float32 either way.
        represent: Also keep the samples' representations.

    Attributes:
        representations: Of the last batch, (B, H) float32 of unit length: the hidden states that the output layer
            sees, averaged with weights that grow linearly along the sample (Muennighoff, 2022, arXiv:2202.08904).
    """

    def __init__(
        self,
        model: LanguageModel,
        projection: Projection,
        output_function: str = "loss",
        autocast: str | None = None,
        represent: bool = False,
    ) -> None:
        self.model, self.projection, self.represent = model, projection, represent
        self.layout = model.layout
        self.output_function = OUTPUT_FUNCTIONS[output_function]
        self.autocast = autocast

    def __enter__(self) -> GradientCollector:
        self._mode = {module: module.training for module in self.model.modules()}
        self._trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.model.eval()
        for module in self.model.modules():
            if getattr(module, "gradient_checkpointing", False) and isinstance(module, GradientCheckpointingLayer):
                # transformers checkpoints in training mode only; a layer with dropout of its own is left in evaluation
                module.training = not any("drop" in name and value for name, value in vars(module).items())
        for parameter in self._trainable:
            parameter.requires_grad_(False)
        self._modules = dict(self.model.network.named_modules())
        self._hooks = [
            self._modules[matrix.module_name].register_forward_hook(self._watch(matrix))
            for matrix in self.layout.matrices
        ]
        if self.represent:
            outputs = self.model.network.get_output_embeddings()
            self._hooks.append(outputs.register_forward_pre_hook(self._keep_representations))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        for module, training in self._mode.items():
            module.training = training

    def _watch(self, matrix: AdaptedMatrix) -> Callable[..., Tensor | None]:
        """A forward hook that projects the layer's per-sample gradient as soon as backward reaches its output."""

        # the output layer sees the target positions of all rows in one line (`LanguageModel.target_logits`)
        at_targets = self._modules[matrix.module_name] is self.model.network.get_output_embeddings()

        def forward_hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            inputs, rows = arguments[0].detach(), self._rows

            def project(output_gradients: Tensor) -> None:
                factors = (output_gradients, inputs)
                if at_targets:
                    factors = tuple(self._by_row(factor) for factor in factors)
                elif inputs.dim() == 2 and len(inputs) in self._positions:  # a block that lays all rows in one line
                    factors = tuple(factor.unflatten(0, (len(rows), -1)) for factor in factors)
                self.projection.add(matrix.name, matrix.shape, *factors, rows)

            if output.requires_grad:
                output.register_hook(project)
                return None
            # the lowest adapted layers: the graph starts here, nothing below them is ever differentiated
            output = output.detach().requires_grad_()
            output.register_hook(project)
            return output

        return forward_hook

    def _keep_representations(self, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        hidden = arguments[0].detach().float()  # (B, T, H)
        weights = self._valid.cumsum(1) * self._valid
        pooled = (weights[:, :, None] * hidden).sum(1)
        self.representations = nn.functional.normalize(pooled, dim=1)

    def _by_row(self, values: Tensor) -> Tensor:
        """(1, K, size) of target positions -> (B, T, size), each row's positions padded with zeros."""
        pieces = values[0].split(torch.bincount(self._target_rows, minlength=len(self._rows)).tolist())
        return nn.utils.rnn.pad_sequence(list(pieces), batch_first=True)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Take one batch.

        Returns:
            rows (B, d) float32, outputs (B,) float32.
        """
        device = self.model.device
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        num_rows = len(batch["labels"])
        self._rows = torch.zeros(num_rows, self.projection.dim, device=device)
        self._positions = {batch["input_ids"].numel(), batch["labels"].numel()}
        if self.represent:
            self._valid = self.model.valid_positions(batch)
        mixed = (
            torch.autocast(device.type, getattr(torch, self.autocast)) if self.autocast else contextlib.nullcontext()
        )
        with torch.enable_grad():
            with mixed:
                logits, labels, rows = self.model.target_logits(batch)
            self._target_rows = rows
            outputs = self.output_function(logits, labels, rows, num_rows)
            outputs.sum().backward()
        return self._rows, outputs.detach()


# --- the store -----------------------------------------------------------------------------------------------


class StoreWriter:
    """The rows of one checkpoint on their way to disk.

    Rows go to memory-mapped arrays in a hidden `.part` folder; `finish` writes the manifest and gives the
    folder its name, so that a folder that exists is whole. A killed run leaves the `.part`, and the next run
    with the same request goes on where it was.

    Args:
        folder: The part's final folder.
        request: Everything the rows depend on; another request is refused.
        samples: Arrays of length R that say which row is which: `sample_index`, `task`, `target`.
        dim: d.
        repair: What to do about a mismatch, for the message.
        representation_size: H, where representations are kept too.
        groups: Name -> group of each row (R,) and their number: whose moments are summed on the way, for
            `StoredPart.estimation_part`.
        row_dtype: numpy dtype of the rows on disk.

    Raises:
        ValueError: the folder, finished or not, was made from something else.
    """

    def __init__(
        self,
        folder: Path,
        request: Mapping[str, Any],
        samples: Mapping[str, np.ndarray],
        dim: int,
        repair: str,
        representation_size: int | None = None,
        groups: Mapping[str, tuple[np.ndarray, int]] | None = None,
        row_dtype: str = "float32",
    ) -> None:
        self.folder, self.request, self.repair = folder, json.loads(json.dumps(request)), repair
        self.samples = {name: np.asarray(values) for name, values in samples.items()}
        self.complete = folder.is_dir()
        if self.complete:
            check_manifest(folder, read_manifest(folder, repair), self.request, repair)
            return
        self.partial = folder.with_name(f".{folder.name}.part")
        shape = (len(self.samples["sample_index"]), dim)
        if (self.partial / REQUEST).is_file():
            begun = json.loads((self.partial / REQUEST).read_text(encoding="utf-8"))
            check_manifest(self.partial, begun, self.request, repair)
            mode = "r+"
        else:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            mode = "w+"
        self.rows = self._array(PROJECTED, mode, np.dtype(row_dtype), shape)
        self.outputs = self._array(OUTPUTS, mode, np.float32, shape[:1])
        self.representations = None
        if representation_size:
            self.representations = self._array(REPRESENTATIONS, mode, np.float32, (shape[0], representation_size))
        self.done = self._array(DONE, mode, np.bool_, shape[:1])
        if mode == "w+":
            with atomic_write(self.partial / SAMPLES) as temporary:
                np.savez(temporary, **self.samples)
            # written last: arrays without a request are not resumed
            write_json(self.partial / REQUEST, self.request)
        self._sums = {
            name: (group_of_row, MomentSums(number, dim, outers=not kernel_is_smaller(*shape)))
            for name, (group_of_row, number) in (groups or {}).items()
        }
        done = np.flatnonzero(self.done)
        for start in range(0, len(done), 8192):
            self._add_to_sums(done[start : start + 8192])

    def _add_to_sums(self, positions: np.ndarray) -> None:
        for group_of_row, sums in self._sums.values():
            sums.add(self.rows[positions], self.outputs[positions], group_of_row[positions])

    def _array(self, name: str, mode: str, dtype: type, shape: tuple[int, ...]) -> np.memmap:
        if mode == "r+":
            return np.lib.format.open_memmap(self.partial / name, mode="r+")
        return np.lib.format.open_memmap(self.partial / name, mode="w+", dtype=dtype, shape=shape)

    def missing(self) -> np.ndarray:
        """Sample indices without a row yet, ascending."""
        return self.samples["sample_index"][:0] if self.complete else self.samples["sample_index"][~self.done]

    def write(
        self,
        sample_index: np.ndarray,
        rows: np.ndarray,
        outputs: np.ndarray,
        representations: np.ndarray | None = None,
    ) -> None:
        """Store the rows (B, d), outputs (B,) and, where they are kept, representations (B, H) of these samples.

        Raises:
            ValueError: a value is not finite; the message names the sample.
        """
        finite = np.isfinite(rows).all(axis=1) & np.isfinite(outputs)
        if not finite.all():
            raise ValueError(
                f"sample {sample_index[~finite][0]}: its output or gradient is not finite; look at the row's text, "
                "lower the learning rate of meta-training, or take gradients with --precision 32"
            )
        positions = np.searchsorted(self.samples["sample_index"], sample_index)
        self.rows[positions] = self._as_kept(rows)
        self.outputs[positions] = outputs
        if self.representations is not None:
            self.representations[positions] = representations
        # after the rows: a row counts as done only when it is there
        self.done[positions] = True
        self._add_to_sums(positions)

    def _as_kept(self, rows: np.ndarray) -> np.ndarray:
        """The rows in the dtype of the store.

        Raises:
            ValueError: that takes more than a hundredth of a row away: its numbers are too large or too small for it.
        """
        if rows.dtype == self.rows.dtype:
            return rows
        with np.errstate(over="ignore", invalid="ignore"):
            kept = rows.astype(self.rows.dtype)
        lost = ~(np.linalg.norm(rows - kept, axis=1) <= 0.01 * np.linalg.norm(rows, axis=1))
        if lost.any():
            raise ValueError(
                f"a gradient of norm {np.linalg.norm(rows[lost][0]):.1e} does not fit into {self.rows.dtype}; remove "
                f"{self.partial} and pass --row_dtype float32"
            )
        return kept

    def flush(self) -> None:
        """Force what was written to disk, the done-mask after the rows it speaks for."""
        for array in (self.rows, self.outputs, self.representations, self.done):
            if array is not None:
                array.flush()

    def shard(self, rank: int, sample_index: np.ndarray) -> StoreWriter:
        """A writer of its own for the process `rank`, for these samples (ascending); `absorb` takes its rows over."""
        kept = np.isin(self.samples["sample_index"], sample_index)
        samples = {name: values[kept] for name, values in self.samples.items()}
        hidden_size = None if self.representations is None else self.representations.shape[1]
        folder = self.folder.with_name(f"{self.folder.name}.rank_{rank}")
        options = {"representation_size": hidden_size, "row_dtype": self.rows.dtype.name}
        return StoreWriter(folder, self.request, samples, self.rows.shape[1], self.repair, **options)

    def absorb(self) -> None:
        """Take over the rows that shards have finished, of this run or of one that was cut off, and remove the shards."""
        for partial in sorted(self.folder.parent.glob(f".{self.folder.name}.rank_*.part")):
            if (partial / REQUEST).is_file():
                begun = json.loads((partial / REQUEST).read_text(encoding="utf-8"))
                check_manifest(partial, begun, self.request, self.repair)
                self._absorb(partial)
            shutil.rmtree(partial)
        self.flush()

    def _absorb(self, partial: Path, block_rows: int = 8192) -> None:
        with np.load(partial / SAMPLES) as arrays:
            indices = arrays["sample_index"]
        names = [PROJECTED, OUTPUTS, *([REPRESENTATIONS] if self.representations is not None else [])]
        values = [np.load(partial / name, mmap_mode="r") for name in names]
        done = np.flatnonzero(np.load(partial / DONE, mmap_mode="r"))
        done = done[np.isin(indices[done], self.missing())]
        for start in range(0, len(done), block_rows):
            block = done[start : start + block_rows]
            self.write(indices[block], *(array[block] for array in values))

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Make the part whole: manifest last, then its final name."""
        if len(missing := self.missing()):
            raise ValueError(f"{len(missing)} of {len(self.done)} rows are missing in {self.partial}")
        self.flush()
        for name, (group_of_row, sums) in self._sums.items():
            save_moments(moments_file(self.partial, name, sums.has_outers), group_of_row, sums.moments())
        (self.partial / DONE).unlink()
        (self.partial / REQUEST).unlink()
        write_manifest(self.partial, {**self.request, **facts})
        os.replace(self.partial, self.folder)
        self.complete = True


def kernel_is_smaller(num_rows: int, dim: int) -> bool:
    """Whether the rows' kernel is the smaller matrix, so that no d x d outer products are kept."""
    return num_rows <= dim


def moment_bytes(num_groups: int, num_rows: int, dim: int) -> int:
    """Bytes on disk of the moments of so many groups: sums in float64, outer products in float32 where they are kept."""
    return num_groups * dim * (8 if kernel_is_smaller(num_rows, dim) else 8 + 4 * dim)


def moments_file(folder: Path, name: str, outers: bool) -> Path:
    """Cached moments of a part: of a division into groups, with or without outer products."""
    return folder / f"moments_{name}{'' if outers else '_sums'}.npz"


def save_moments(path: Path, group_of_row: np.ndarray, moments: TaskMoments) -> None:
    """Keep moments beside the rows they sum."""
    kept = {field: values for field, values in vars(moments).items() if values is not None}
    with atomic_write(path) as temporary:
        np.savez(temporary, group_of_row=group_of_row, **kept)


@dataclass(frozen=True)
class StoredPart:
    """The finished rows of one checkpoint."""

    folder: Path
    manifest: dict[str, Any]

    @cached_property
    def rows(self) -> np.ndarray:
        """Projected gradients (R, d), memory-mapped."""
        return np.load(self.folder / PROJECTED, mmap_mode="r")

    @cached_property
    def outputs(self) -> np.ndarray:
        """Per-sample outputs at the checkpoint (R,), lower is better (a margin store holds minus the margin)."""
        return np.load(self.folder / OUTPUTS)

    @cached_property
    def representations(self) -> np.ndarray:
        """Representations (R, H), memory-mapped.

        Raises:
            FileNotFoundError: the store was made without them.
        """
        path = self.folder / REPRESENTATIONS
        if not path.is_file():
            raise FileNotFoundError(
                f"{self.folder} holds no representations; remove it and take the gradients again with --representations"
            )
        return np.load(path, mmap_mode="r")

    @cached_property
    def samples(self) -> dict[str, np.ndarray]:
        """`sample_index`, `task`, `target`, each (R,); task is -1 for validation rows, target for training rows."""
        with np.load(self.folder / SAMPLES) as arrays:
            return dict(arrays)

    @property
    def targets(self) -> list[str]:
        """Names of the targets, in the order of their ids."""
        return self.manifest["targets"]

    def estimation_part(
        self,
        task_of_row: np.ndarray | None = None,
        num_tasks: int | None = None,
        name: str = "tasks",
        *,
        by_rows: bool = False,
        represented: bool = False,
    ) -> Part:
        """Moments of tasks and targets for the estimators, computed once and cached beside the rows.

        Args:
            task_of_row: Task of each row (R,), -1 for none; None = the tasks of the data.
            num_tasks: n.
            name: Names the cache; another division into tasks needs another name.
            by_rows: Give the rows themselves instead of their outer products.
            represented: Representations in place of the gradients (estimator `representation`).
        """
        task_of_row = self.samples["task"] if task_of_row is None else task_of_row
        num_tasks = len(self.manifest["tasks"]) if num_tasks is None else num_tasks
        target_of_row = self.samples["target"]
        values = self.representations if represented else self.rows
        outers = not (by_rows or represented)
        of = "_represented" if represented else ""
        train = self._cached_moments(f"{name}{of}", values, task_of_row, num_tasks, outers)
        target = self._cached_moments(f"targets{of}", values, target_of_row, len(self.targets), outers)
        rows = Rows(values, self.outputs, task_of_row, target_of_row) if by_rows else None
        return Part(train, target, rows, self.manifest["output_function"])

    def _cached_moments(
        self, name: str, rows: np.ndarray, group_of_row: np.ndarray, num_groups: int, outers: bool
    ) -> TaskMoments:
        path = moments_file(self.folder, name, outers)
        if path.is_file():
            with np.load(path) as arrays:
                stored = dict(arrays)
            if np.array_equal(stored.pop("group_of_row"), group_of_row):
                return TaskMoments(**({"outers": None} | stored))
        moments = task_moments(rows, self.outputs, group_of_row, num_groups, outers=outers)
        save_moments(path, group_of_row, moments)
        return moments


def save_projection_signs(path: Path, projection: Projection, shapes: Mapping[str, tuple[int, int]]) -> None:
    """The random signs of every matrix, packed in bits, as a .npz with an array for each parameter name.

    `Projection.packed_signs` says in which order. Matrix by matrix, so that never more than one is in memory.
    """
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, shape in shapes.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, projection.packed_signs(name, shape))


def open_store(folder: Path, checkpoints: Sequence[str] | None, made_by: str) -> list[StoredPart]:
    """The finished parts of a store.

    Args:
        folder: `Run.store_dir`.
        checkpoints: Names of the checkpoints wanted; None = all that are there, in the order of training.
        made_by: The script that makes the store, for messages.

    Raises:
        FileNotFoundError: there is no store, or not for a checkpoint.
        ValueError: parts do not belong together.
    """
    if checkpoints is None:
        found = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}")) if folder.is_dir() else []
        if not found:
            raise FileNotFoundError(f"no projected gradients in {folder}; make them with: python {made_by}")
    else:
        found = [folder / Path(name.removesuffix("/")).name.removesuffix(".ckpt") for name in checkpoints]
    parts = [StoredPart(path, read_manifest(path, made_by)) for path in found]
    parts.sort(key=lambda part: (part.manifest["step"], part.folder.name))
    shared = ("data_fingerprint", "tasks", "targets", "output_function", "dim")
    for part in parts[1:]:
        check_manifest(
            part.folder,
            part.manifest,
            {key: parts[0].manifest[key] for key in shared},
            f"The parts of a store must belong together: remove it and run python {made_by}",
        )
    return parts


def collect_gradients(
    model: LanguageModel,
    datamodule: TaskDataModule,
    projection: Projection,
    store: StoreWriter,
    *,
    output_function: str,
    autocast: str | None = None,
    desc: str = "gradients",
    processes: Processes | None = None,
) -> None:
    """Take the gradients that the store still misses, by length within the token budget.

    A batch that does not fit into the GPU's memory is halved, and all after it. With several processes each takes whole
    batches of its own into a shard beside the store, and the first takes the shards over: every sample is computed
    once, and what a process that dies has finished is kept. Where they share one model's weights they go in step, and
    one that has a batch less takes part in the last step with a row that it does not keep.

    Raises:
        ValueError: a single row does not fit.
    """
    options = {"output_function": output_function, "autocast": autocast}
    if processes is None or processes.world == 1:
        _collect(model, datamodule, projection, store, datamodule.budgeted(store.missing()), desc=desc, **options)
        return
    if processes.is_first:
        store.absorb()
    processes.wait()
    batches = datamodule.budgeted(store.missing())
    own = batches[processes.rank :: processes.world]
    if own:
        shard = store.shard(processes.rank, np.concatenate(own))
        _collect(model, datamodule, projection, shard, own, desc=f"{desc}, own share", **options)
        shard.flush()
    if model.is_sharded and len(own) < -(-len(batches) // processes.world):
        with GradientCollector(model, projection, **options) as collect:
            collect(datamodule.collate(batches[-1][-1:]))
    processes.wait()
    if processes.is_first:
        store.absorb()


def _collect(
    model: LanguageModel,
    datamodule: TaskDataModule,
    projection: Projection,
    store: StoreWriter,
    batches: Iterable[np.ndarray],
    *,
    output_function: str,
    autocast: str | None,
    desc: str,
) -> None:
    """Take batches of sample indices, of which the store has no row yet."""
    represent = store.representations is not None
    sign = -1.0 if output_function == "margin" else 1.0  # the store holds losses: lower is better
    waiting, unflushed = deque(batches), 0
    with (
        GradientCollector(model, projection, output_function, autocast, represent) as collect,
        progress(desc=desc, total=len(store.samples["sample_index"]), unit="sample") as bar,
    ):
        bar.update(bar.total - len(store.missing()))
        while waiting:
            indices = waiting.popleft()
            taken = _unless_out_of_memory(collect, datamodule.collate(indices))
            if taken is None:
                torch.cuda.empty_cache()
                waiting = _halved([indices, *waiting], datamodule, model.is_sharded)
                continue
            values = [sign * value for value in taken] + ([collect.representations] if represent else [])
            store.write(indices, *(value.cpu().numpy() for value in values))
            bar.update(len(indices))
            unflushed += 1
            if unflushed == FLUSH_EVERY or not waiting:
                store.flush()
                unflushed = 0


def _unless_out_of_memory(collect: GradientCollector, batch: Batch) -> tuple[Tensor, Tensor] | None:
    """The batch's rows and outputs; None where the device has no memory for it (the error, which holds the batch's
    tensors, ends here)."""
    try:
        return collect(batch)
    except torch.OutOfMemoryError:
        return None


def _halved(batches: Sequence[np.ndarray], datamodule: TaskDataModule, in_step: bool) -> deque[np.ndarray]:
    """The batches in halves, the first of which did not fit into memory."""
    count, tokens = len(batches[0]), int(datamodule.row_lengths[batches[0]].max())
    if count == 1 or in_step:
        raise ValueError(
            f"a batch of {count} rows of up to {tokens} tokens does not fit into the GPU's memory; pass "
            "--gradient_checkpointing, a smaller --max_length or --max_tokens_per_batch, --precision bf16, or spread "
            "the weights with --strategy fsdp"
        )
    say_once(f"note: {count} rows of up to {tokens} tokens do not fit into the GPU's memory: batches are halved.")
    return deque(half for batch in batches for half in np.array_split(batch, min(2, len(batch))))


@torch.no_grad()
def outputs_of(
    model: LanguageModel, datamodule: TaskDataModule, indices: np.ndarray, output_function: str
) -> np.ndarray:
    """Outputs of the given samples as a store holds them (losses, or minus the margins), in their order, float64."""
    model.eval()
    outputs = np.full(len(datamodule.data), np.nan)
    sign = -1.0 if output_function == "margin" else 1.0
    for batch in datamodule.evaluation_batches(indices):
        batch = {name: value.to(model.device) for name, value in batch.items()}
        values = OUTPUT_FUNCTIONS[output_function](*model.target_logits(batch), len(batch["labels"]))
        outputs[batch["sample_index"].cpu()] = sign * values.double().cpu()
    return outputs[indices]
