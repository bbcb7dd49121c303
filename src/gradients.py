"""Projected per-sample gradients: taking them, and keeping them.

Taking: one forward and one backward of the *sum* of the per-sample outputs. Samples of a batch do not meet
before that sum, so the gradient at a layer's output, row by row, is the gradient of that row's own output;
with the layer's input it gives the per-sample gradient G_i = sum_t delta_t a_t^T of the layer's weight, which
is projected at once. Weight gradients, a p-vector or a p x d matrix are never formed.

Keeping: one folder per checkpoint, rows keyed by sample index, complete or absent.

Letters: N samples, R stored rows (training and validation), B batch, T tokens, d projection dimension, n tasks.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
import shutil
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from src.cli import is_out_of_memory, progress, say_once, waiting_for
from src.datamodule import Batch, TaskDataModule, read_arrays, write_arrays
from src.estimation import CURVATURE_POWER, Part, Rows, TaskMoments, task_moments, token_weights
from src.models import OUTPUT_FUNCTIONS, AdaptedMatrix, LanguageModel
from src.paths import (
    MANIFEST,
    atomic_write,
    check_file,
    check_manifest,
    files_facts,
    read_manifest,
    write_json,
    write_manifest,
)
from src.processes import Processes
from src.projection import Projection

PROJECTED = "projected.npy"
OUTPUTS = "outputs.npy"
REPRESENTATIONS = "representations.npy"
SAMPLES = "samples.npz"
STATE = "state.npy"
REQUEST = "request.json"
BOOT = "boot"
PROJECTION_SIGNS = "projection_signs.npz"
FLUSH_EVERY = 200
"""Batches after which rows are forced to disk."""
LARGEST_BUDGET = 1 << 16
"""Tokens of a batch beyond which `--max_tokens_per_batch auto` looks no further: a GPU gains nothing there."""

MISSING, WRITTEN, ON_DISK = range(3)
"""State of a row on its way: not there; written, which a process that dies does not undo; forced to disk."""


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
        self.output_function = OUTPUT_FUNCTIONS[output_function].function
        self.sign = OUTPUT_FUNCTIONS[output_function].sign
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

        def project(output_gradients: Tensor, inputs: Tensor) -> None:
            factors = [output_gradients, inputs]
            if at_targets:
                factors = [self._by_row(factor) for factor in factors]
            elif inputs.dim() == 2 and len(inputs) in self._positions:  # a block that lays all rows in one line
                factors = [factor.unflatten(0, (len(self._rows), -1)) for factor in factors]
            self.projection.add(matrix.name, matrix.shape, factors[0], factors[1], self._rows)

        def forward_hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            if not output.requires_grad:
                # the lowest adapted layers: the graph starts here, nothing below them is ever differentiated
                output = output.detach().requires_grad_()
            return _Projecting.apply(output, arguments[0].detach(), project)

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


class _Projecting(torch.autograd.Function):
    """The identity; its backward hands the layer's output gradients and inputs to `project`.

    The inputs are a saved tensor, which activation checkpointing lets go and computes again in the backward.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, project: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.project = project
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.project(output_gradients[0], *ctx.saved_tensors)
        return output_gradients[0], None, None


# --- the store -----------------------------------------------------------------------------------------------


class StoreWriter:
    """The rows of one checkpoint on their way to disk.

    Rows go to memory-mapped arrays in a hidden `.part` folder; `finish` writes the manifest and gives the
    folder its name, so that a folder that exists is whole. A killed run leaves the `.part`, and the next run
    with the same request goes on where it was. After a failure of the machine itself only those rows count
    that `flush` had forced to disk.

    The arrays have their room on disk from the beginning: a full disk is an error there, where a write through the map
    would end the process.

    Args:
        folder: The part's final folder.
        request: Everything the rows depend on; another request is refused.
        samples: Arrays of length R that say which row is which: `sample_index`, `task`, `target`; and `target_tokens`, how
            many tokens its output is a mean over.
        dim: d.
        repair: What to do about a mismatch, for the message.
        representation_size: H, where representations are kept too.
        groups: "tasks" and "targets" -> group of each row (R,) and their number: whose moments `finish` sums, for
            `StoredPart.estimation_part`.
        row_dtype: numpy dtype of the rows on disk.
        on_nonfinite: "stop" at a sample that is not finite, or "skip" it: its row is not a number, and it belongs
            to no task and no target.
        describe: A sample's index -> its name, for messages.
        joins: Another process has opened the part already, and it is taken as that one left it.

    Raises:
        ValueError: the folder, finished or not, was made from something else.
        OSError: there is no room.
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
        *,
        on_nonfinite: str = "stop",
        describe: Callable[[int], str] = "sample {}".format,
        joins: bool = False,
    ) -> None:
        self.folder, self.request, self.repair = folder, json.loads(json.dumps(request)), repair
        self.samples = {name: np.asarray(values) for name, values in samples.items()}
        self.groups, self.on_nonfinite, self.describe = groups or {}, on_nonfinite, describe
        self.partial = folder.with_name(f".{folder.name}.part")
        self.complete = folder.is_dir()
        if self.complete:
            check_manifest(folder, read_manifest(folder, repair), self.request, repair)
            return
        if (self.partial / MANIFEST).is_file():  # the last run was cut off when it had all but the name
            check_manifest(self.partial, read_manifest(self.partial, repair), self.request, repair)
            self._publish()
            return
        num_rows = len(self.samples["sample_index"])
        arrays: dict[str, tuple[str, tuple[int, ...]]] = {
            PROJECTED: (row_dtype, (num_rows, dim)),
            OUTPUTS: ("float32", (num_rows,)),
            REPRESENTATIONS: ("float32", (num_rows, representation_size or 0)),
            STATE: ("uint8", (num_rows,)),
        }
        if not representation_size:
            del arrays[REPRESENTATIONS]
        begun = self._begun(self.partial)
        if begun is None:
            self._create(arrays)
        opened = {name: np.lib.format.open_memmap(self.partial / name, mode="r+") for name in arrays}
        self.rows, self.outputs, self.state = opened[PROJECTED], opened[OUTPUTS], opened[STATE]
        self.representations = opened.get(REPRESENTATIONS)
        if begun is not None and not joins:
            self._take_up(begun)

    def _begun(self, partial: Path) -> dict[str, Any] | None:
        """The request of a part that was begun, checked; None where none was."""
        if not (partial / REQUEST).is_file():
            return None
        begun = json.loads((partial / REQUEST).read_text(encoding="utf-8"))
        check_manifest(partial, begun, self.request, self.repair)
        return begun

    def _create(self, arrays: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """Make the arrays, all zero and with their room on disk."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        try:
            for name, (dtype, shape) in arrays.items():
                array = np.lib.format.open_memmap(self.partial / name, mode="w+", dtype=dtype, shape=shape)
                with open(self.partial / name, "rb+") as file:
                    os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)
        except OSError as error:
            shutil.rmtree(self.partial)
            needed = sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in arrays.values())
            free = shutil.disk_usage(self.folder.parent).free
            reason = f"{error.strerror} (the rows need {needed:,} bytes, {free:,} are free)"
            raise OSError(error.errno, reason, str(self.folder.parent)) from error
        write_arrays(self.partial / SAMPLES, self.samples)
        # written last: arrays without a request are not resumed
        write_json(self.partial / REQUEST, {**self.request, BOOT: boot_id()})

    def _take_up(self, begun: Mapping[str, Any]) -> None:
        """Forget what cannot be relied on: rows that a machine which has stopped since had not forced to disk, and
        rows that were left out where none is to be."""
        if begun.get(BOOT) != boot_id():
            self.state[self.state == WRITTEN] = MISSING
            self.state.flush()
            write_json(self.partial / REQUEST, {**self.request, BOOT: boot_id()})
        if self.on_nonfinite == "stop":
            self.state[~np.isfinite(self.outputs)] = MISSING

    def missing(self) -> np.ndarray:
        """Sample indices without a row yet, ascending."""
        indices = self.samples["sample_index"]
        return indices[:0] if self.complete else indices[self.state == MISSING]

    def unfinished(self, batches: Iterable[np.ndarray]) -> list[np.ndarray]:
        """Those batches of sample indices that have one without a row. Batches are taken again as a whole, so that
        no row depends on where a run was cut off."""
        missing = self.state == MISSING
        return [batch for batch in batches if missing[self._positions(batch)].any()]

    def _positions(self, sample_index: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.samples["sample_index"], sample_index)

    def write(
        self,
        sample_index: np.ndarray,
        rows: np.ndarray,
        outputs: np.ndarray,
        representations: np.ndarray | None = None,
    ) -> None:
        """Store the rows (B, d), outputs (B,) and, where they are kept, representations (B, H) of these samples.

        Raises:
            ValueError: a value is not finite, and `on_nonfinite` is "stop"; the message names the sample.
        """
        finite = {"output": np.isfinite(outputs), "gradient": np.isfinite(rows).all(axis=1)}
        bad = ~(finite["output"] & finite["gradient"])
        if bad.any():
            first = int(np.argmax(bad))
            if self.on_nonfinite == "stop":
                what = " and ".join(name for name, values in finite.items() if not values[first])
                raise ValueError(
                    f"{self.describe(int(sample_index[first]))}: its {what} is not finite at {self.folder.name}; look at "
                    "the row's text, lower the learning rate of meta-training, take gradients with --precision 32, or "
                    "leave such rows out with --on_nonfinite skip"
                )
            rows, outputs = np.where(bad[:, None], np.nan, rows), np.where(bad, np.nan, outputs)
        positions = self._positions(sample_index)
        self.rows[positions] = self._as_kept(rows)
        self.outputs[positions] = outputs
        if self.representations is not None:
            self.representations[positions] = representations
        # after the rows: a row counts only when it is there
        self.state[positions] = WRITTEN

    def _as_kept(self, rows: np.ndarray) -> np.ndarray:
        """The rows in the dtype of the store.

        Raises:
            ValueError: that takes more than a hundredth of a row away: its numbers are too large or too small for it.
        """
        if rows.dtype == self.rows.dtype:
            return rows
        with np.errstate(over="ignore", invalid="ignore"):
            kept = rows.astype(self.rows.dtype)
        lost = np.linalg.norm(rows - kept, axis=1) > 0.01 * np.linalg.norm(rows, axis=1)
        if lost.any():
            raise ValueError(
                f"a gradient of norm {np.linalg.norm(rows[lost][0]):.1e} does not fit into {self.rows.dtype}; remove "
                f"{self.partial} and pass --row_dtype float32"
            )
        return kept

    def flush(self) -> None:
        """Force what was written to disk; only then is it marked as being there."""
        for array in (self.rows, self.outputs, self.representations):
            if array is not None:
                array.flush()
        self.state[self.state == WRITTEN] = ON_DISK
        self.state.flush()

    def shard(self, rank: int, sample_index: np.ndarray) -> StoreWriter:
        """A writer of its own for the process `rank`, for these samples (ascending); `absorb` takes its rows over."""
        kept = np.isin(self.samples["sample_index"], sample_index)
        samples = {name: values[kept] for name, values in self.samples.items()}
        hidden_size = None if self.representations is None else self.representations.shape[1]
        folder = self.folder.with_name(f"{self.folder.name}.rank_{rank}")
        described = (folder, self.request, samples, self.rows.shape[1], self.repair, hidden_size)
        return StoreWriter(
            *described, on_nonfinite=self.on_nonfinite, describe=self.describe, row_dtype=self.rows.dtype.name
        )

    def absorb(self) -> None:
        """Take over the rows that shards have finished, of this run or of one that was cut off, and remove the shards."""
        shards = sorted(self.folder.parent.glob(f".{self.folder.name}.rank_*.part"))
        for partial in shards:
            if (begun := self._begun(partial)) is not None:
                self._absorb(partial, WRITTEN if begun.get(BOOT) == boot_id() else ON_DISK)
        if shards:
            self.flush()
        for partial in shards:
            (partial / REQUEST).unlink(missing_ok=True)  # first, so that half a shard is none
            shutil.rmtree(partial)

    def _absorb(self, partial: Path, least: int, block_rows: int = 8192) -> None:
        with np.load(partial / SAMPLES) as arrays:
            indices = arrays["sample_index"]
        names = [PROJECTED, OUTPUTS, *([REPRESENTATIONS] if self.representations is not None else [])]
        values = [np.load(partial / name, mmap_mode="r") for name in names]
        done = np.flatnonzero(np.load(partial / STATE, mmap_mode="r") >= least)
        done = done[np.isin(indices[done], self.missing())]
        for start in range(0, len(done), block_rows):
            block = done[start : start + block_rows]
            self.write(indices[block], *(array[block] for array in values))

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Make the part whole: checksums, moments with the weights of the training (`loss_over` of the facts), the manifest,
        then its final name.

        Moments are summed in the order of the samples, so that they do not depend on the batches, the number of
        processes or where a run was cut off.
        """
        if len(missing := self.missing()):
            raise ValueError(f"{len(missing)} of {len(self.state)} rows are missing in {self.partial}")
        self.flush()
        left_out = ~np.isfinite(self.outputs)
        groups = {name: np.where(left_out, -1, self.samples[name]) for name in ("task", "target")}
        write_arrays(self.partial / SAMPLES, {**self.samples, **groups, "left_out": left_out})
        names = [PROJECTED, OUTPUTS, SAMPLES, *([REPRESENTATIONS] if self.representations is not None else [])]
        with waiting_for(f"checksums of {self.folder}"):
            files = files_facts(self.partial, names)
        indices = self.samples["sample_index"][left_out]
        counted = {"left_out": {"count": len(indices), "first_samples": indices[:20].tolist()}}
        manifest = {**self.request, **facts, **counted, "files": files}
        part = StoredPart(self.partial, manifest)
        vars(part).update(rows=self.rows, outputs=self.outputs)  # their checksums were taken just now
        for name, (group_of_row, number) in self.groups.items():
            outers = not kernel_is_smaller(*self.rows.shape)
            part.moments(name, np.where(left_out, -1, group_of_row), number, part.weight_by, outers=outers)
        write_manifest(self.partial, manifest)
        self._publish()

    def _publish(self) -> None:
        """Give a part with a manifest its name."""
        for name in (REQUEST, STATE):
            (self.partial / name).unlink(missing_ok=True)
        os.replace(self.partial, self.folder)
        self.complete = True


def boot_id() -> str:
    """What is the same as long as this machine runs: what processes wrote to files is there even when they were killed."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()


def kernel_is_smaller(num_rows: int, dim: int) -> bool:
    """Whether the rows' kernel is the smaller matrix, so that no d x d outer products are kept."""
    return num_rows <= dim


@dataclass(frozen=True)
class StoredPart:
    """The finished rows of one checkpoint.

    What is read is checked. `open_store` compares the checksums of the small files, outputs and samples, and the size of
    the rows; the rows' own checksum is compared when they are first read, which costs about as much as reading them.
    Estimates from cached moments never read them: moments name the checksum of the rows that they sum, so that moments
    of other rows are made anew, as are damaged ones.
    """

    folder: Path
    manifest: dict[str, Any]

    def check(self, name: str, *, content: bool = True) -> Path:
        """The path of a file, after `check_file`."""
        check_file(
            self.folder, self.manifest, name, f"Remove {self.folder} and take the gradients again.", content=content
        )
        return self.folder / name

    @cached_property
    def rows(self) -> np.ndarray:
        """Projected gradients (R, d), memory-mapped; not a number in rows that were left out."""
        with waiting_for(f"checksum of {self.folder / PROJECTED}"):
            return np.load(self.check(PROJECTED), mmap_mode="r")

    @cached_property
    def outputs(self) -> np.ndarray:
        """Per-sample outputs at the checkpoint (R,), lower is better (a margin store holds minus the margin)."""
        return np.load(self.check(OUTPUTS))

    @cached_property
    def representations(self) -> np.ndarray:
        """Representations (R, H), memory-mapped.

        Raises:
            FileNotFoundError: the store was made without them.
        """
        if REPRESENTATIONS not in self.manifest["files"]:
            raise FileNotFoundError(
                f"{self.folder} holds no representations; remove it and take the gradients again with --representations"
            )
        return np.load(self.check(REPRESENTATIONS), mmap_mode="r")

    @cached_property
    def samples(self) -> dict[str, np.ndarray]:
        """`sample_index`, `task`, `target`, `target_tokens`, each (R,); task is -1 for validation rows, target for training
        rows, both for rows that were `left_out` because they are not finite."""
        with np.load(self.check(SAMPLES)) as arrays:
            return dict(arrays)

    @property
    def weight_by(self) -> str:
        """How the training at whose checkpoint the rows were taken weighs them."""
        return "sample" if self.manifest.get("loss_over") == "row" else "token"

    @property
    def targets(self) -> list[str]:
        """Names of the targets, in the order of their ids."""
        return self.manifest["targets"]

    def rows_of(self, kind: str) -> np.ndarray:
        """How many rows each of the "task"s, or "target"s, has."""
        groups = self.samples[kind]
        return np.bincount(groups[groups >= 0], minlength=len(self.manifest[f"{kind}s"]))

    def notices(self) -> list[str]:
        """What estimates go without: samples that are not finite, tasks and targets without rows."""
        count, first = (self.manifest["left_out"][name] for name in ("count", "first_samples"))
        shown = f"{', '.join(map(str, first))}{', …' if count > len(first) else ''}"
        found = (
            [f"{self.folder}: {count:,} samples are left out, they are not finite (samples {shown})"] if count else []
        )
        for kind in ("task", "target"):
            empty = [self.manifest[f"{kind}s"][group] for group in np.flatnonzero(self.rows_of(kind) == 0)]
            found += [f"{self.folder}: {kind} {name} has no rows, so that nothing is estimated of it" for name in empty]
        return found

    def estimation_part(
        self,
        task_of_row: np.ndarray | None = None,
        num_tasks: int | None = None,
        name: str = "tasks",
        *,
        weight_by: str | None = None,
        by_rows: bool = False,
        represented: bool = False,
    ) -> Part:
        """Moments of tasks and targets for the estimators, computed once and cached beside the rows.

        Args:
            task_of_row: Task of each row (R,), -1 for none; None = the tasks of the data.
            num_tasks: n.
            name: Names the cache; another division into tasks needs another name.
            weight_by: How rows weigh, one of `estimation.WEIGHT_BY`; None = as in the training.
            by_rows: Give the rows themselves instead of their outer products.
            represented: Representations in place of the gradients (estimator `representation`).
        """
        weight_by = weight_by or self.weight_by
        task_of_row = self.samples["task"] if task_of_row is None else task_of_row
        task_of_row = np.where(self.samples["left_out"], -1, task_of_row)
        num_tasks = len(self.manifest["tasks"]) if num_tasks is None else num_tasks
        target_of_row = self.samples["target"]
        options: dict[str, Any] = {"outers": not (by_rows or represented), "represented": represented}
        train = self.moments(name, task_of_row, num_tasks, weight_by, **options)
        target = self.moments("targets", target_of_row, len(self.targets), weight_by, **options)
        rows = None
        if by_rows:
            values = self.representations if represented else self.rows
            rows = Rows(values, self.outputs, task_of_row, target_of_row, *self.row_weights(weight_by))
        return Part(train, target, rows, self.manifest["output_function"], weight_by)

    def row_weights(self, weight_by: str) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Weights of the rows in sums of gradients (R,) and of outer products (R,); None where all weigh the same."""
        if weight_by != "token":
            return None, None
        return token_weights(self.samples["target_tokens"], self.samples["task"] >= 0)

    def moments(
        self,
        name: str,
        group_of_row: np.ndarray,
        num_groups: int,
        weight_by: str,
        *,
        outers: bool = True,
        represented: bool = False,
    ) -> TaskMoments:
        """The moments of the rows of each group, kept in a .npz beside the rows, which has checksums of its own arrays."""
        by_token = weight_by == "token"
        file = f"moments_{name}{'_represented' * represented}{'_by_row' * (not by_token)}{'_sums' * (not outers)}.npz"
        path, of = self.folder / file, REPRESENTATIONS if represented else PROJECTED
        made_from = self.manifest["files"].get(of, {}).get("sha256", "") + f"^{CURVATURE_POWER}" * by_token
        stored = read_arrays(path)
        if stored is not None:
            named, groups = stored.pop("made_from", None), stored.pop("group_of_row", None)
            if named == made_from and groups is not None and np.array_equal(groups, group_of_row):
                return TaskMoments(**{"outers": cast(Any, None), **stored})
        weights, curvatures = self.row_weights(weight_by)
        moments = task_moments(
            self.representations if represented else self.rows, self.outputs, group_of_row, num_groups,
            weights=weights, curvatures=curvatures, outers=outers, progress=progress,
        )  # fmt: skip
        kept = {field: values for field, values in vars(moments).items() if values is not None}
        write_arrays(path, {"group_of_row": group_of_row, "made_from": np.array(made_from), **kept})
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
            like = difflib.get_close_matches(
                folder.name, [path.name for path in folder.parent.glob("*")], n=3, cutoff=0.8
            )
            beside = (
                f" (there are {', '.join(like)}: of another model, adapter, projection or --save_name)" if like else ""
            )
            raise FileNotFoundError(f"no projected gradients in {folder}{beside}; make them with: python {made_by}")
    else:
        found = [folder / Path(name.removesuffix("/")).name.removesuffix(".ckpt") for name in checkpoints]
    parts = [StoredPart(path, read_manifest(path, made_by)) for path in found]
    for part in parts:
        for name in part.manifest["files"]:
            part.check(name, content=name in (OUTPUTS, SAMPLES))
    parts.sort(key=lambda part: (part.manifest["step"], part.folder.name))
    trainings = sorted({str(Path(part.manifest.get("checkpoint_dir", "")).parent.resolve()) for part in parts})
    if checkpoints is None and len(trainings) > 1:
        raise ValueError(
            f"{folder} has gradients at checkpoints of several meta-trainings ({', '.join(trainings)}); name those to be "
            "used with --load_model_dir"
        )
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

    A batch that does not fit into memory is halved, and all after it. With several processes each takes whole
    batches of its own into a shard beside the store, and the first takes the shards over: every sample is computed
    once, and what a process that dies has finished is kept. Where they share one model's weights they go in step, and
    one that has a batch less takes part in the last step with a row that it does not keep.

    Raises:
        ValueError: a single row does not fit.
    """
    represent = store.representations is not None

    def collector() -> GradientCollector:
        return GradientCollector(model, projection, output_function, autocast, represent)

    if processes is None or processes.is_first:
        store.absorb()
    everything = datamodule.budgeted(store.samples["sample_index"])
    if processes is None or processes.world == 1:
        batches = store.unfinished(everything)
        done = datamodule.padded_tokens(everything) - datamodule.padded_tokens(batches)
        _collect(collector(), datamodule, store, batches, desc, done)
        return
    processes.wait()
    batches = store.unfinished(everything)
    own = batches[processes.rank :: processes.world]
    if own:
        shard = store.shard(processes.rank, np.concatenate(own))
        _collect(collector(), datamodule, shard, own, f"{desc}, own share")
        shard.flush()
    if model.is_sharded and len(own) < -(-len(batches) // processes.world):
        with collector() as collect:
            collect(datamodule.collate(batches[-1][-1:]))
    processes.wait()
    if processes.is_first:
        store.absorb()


def _collect(
    collector: GradientCollector,
    datamodule: TaskDataModule,
    store: StoreWriter,
    batches: Sequence[np.ndarray],
    desc: str,
    done: int = 0,
) -> None:
    """Take batches of sample indices, of which the store has no row yet; `done` padded tokens are there already.

    Progress is counted in padded tokens: the longest rows come first, and take the longest.
    """
    waiting, unflushed = deque(batches), 0
    total = done + datamodule.padded_tokens(batches)
    with collector as collect, progress(desc=desc, total=total, initial=done, unit="token") as bar:
        while waiting:
            indices = waiting.popleft()
            taken = _unless_out_of_memory(collect, datamodule.collate(indices))
            if taken is None:
                waiting = _halved([indices, *waiting], datamodule, collect.model.is_sharded)
                bar.total = bar.n + datamodule.padded_tokens(waiting)
                continue
            values = [collect.sign * value for value in taken]
            values += [collect.representations] if collect.represent else []
            store.write(indices, *(value.cpu().numpy() for value in values))
            bar.update(datamodule.padded_tokens([indices]))
            unflushed += 1
            if unflushed == FLUSH_EVERY or not waiting:
                store.flush()
                unflushed = 0


def _unless_out_of_memory(collect: GradientCollector, batch: Batch) -> tuple[Tensor, Tensor] | None:
    """The batch's rows and outputs; None where the device has no memory for it."""
    try:
        return collect(batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    torch.cuda.empty_cache()  # after the error, which holds the batch's tensors
    return None


def fitting_budget(collector: GradientCollector, datamodule: TaskDataModule, rows: np.ndarray) -> int:
    """The data module's budget of tokens, doubled as long as a batch of the longest rows fits into memory.

    Args:
        collector: Takes the batches that are tried.
        datamodule: Its data.
        rows: Sample indices of all rows.
    """
    budget = datamodule.max_tokens_per_batch
    with collector as collect:
        while budget < LARGEST_BUDGET and len(rows) > len(datamodule.budgeted(rows, budget)[0]):
            if _unless_out_of_memory(collect, datamodule.collate(datamodule.budgeted(rows, 2 * budget)[0])) is None:
                break
            budget *= 2
    return budget


def _halved(batches: Sequence[np.ndarray], datamodule: TaskDataModule, in_step: bool) -> deque[np.ndarray]:
    """The batches in halves, the first of which did not fit into memory."""
    count, tokens = len(batches[0]), int(datamodule.row_lengths[batches[0]].max())
    if count == 1 or in_step:
        raise ValueError(
            f"a batch of {count} rows of up to {tokens} tokens does not fit into memory; pass --gradient_checkpointing, a smaller --max_length or --max_tokens_per_batch, --precision bf16, or spread "
            "the weights with --strategy fsdp"
        )
    say_once(f"note: {count} rows of up to {tokens} tokens do not fit into memory: batches are halved.")
    return deque(half for batch in batches for half in np.array_split(batch, min(2, len(batch))))


@torch.no_grad()
def outputs_of(
    model: LanguageModel, datamodule: TaskDataModule, indices: np.ndarray, output_function: str
) -> np.ndarray:
    """Outputs of the given samples as a store holds them (losses, or minus the margins), in their order, float64."""
    model.eval()
    outputs = np.full(len(datamodule.data), np.nan)
    output = OUTPUT_FUNCTIONS[output_function]
    for batch in datamodule.evaluation_batches(indices):
        batch = {name: value.to(model.device) for name, value in batch.items()}
        values = output.function(*model.target_logits(batch), len(batch["labels"]))
        outputs[batch["sample_index"].cpu()] = output.sign * values.double().cpu()
    return outputs[indices]
