"""Projected per-sample gradients: one forward and one backward of the *sum* of a batch's outputs.

Samples of a batch do not interact before that sum, so the gradient at a layer's output, row by row, is that of the row's own
output; with the layer's input it gives the per-sample gradient G_i = sum_t delta_t a_t^T of the layer's weight, which is
projected at once. Weight gradients, a p-vector or a p x d matrix are never formed.

Letters: B batch, T tokens, d projection dimension, H hidden size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

from src.console import is_out_of_memory, progress, say_once
from src.datamodule import Batch, TaskDataModule
from src.distributed import Processes
from src.models import OUTPUT_FUNCTIONS, AdaptedMatrix, GradientCheckpointingLayer, LanguageModel
from src.projection import Directions, Projection
from src.store import StoreWriter

LARGEST_BUDGET = 1 << 16
"""Tokens of a batch beyond which `--max_tokens_per_batch auto` looks no further: a GPU gains nothing there."""


class _InStep(DefaultAllGather):
    """The gathering of weights that processes share, once all of them have come so far: one whose memory has run out says so
    in the place of its next gathering, so that no other is left waiting there. Nothing, where weights are not shared."""

    def __init__(self, model: LanguageModel) -> None:
        self.parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self.group = dist.new_group(backend="gloo") if self.parts else None  # takes no memory of a GPU
        self.fits = True
        for part in self.parts:
            part.set_custom_all_gather(self)

    def __call__(self, *arguments: Any, **options: Any) -> dist.Work | None:
        if not self.all_fit(True):
            raise torch.OutOfMemoryError("out of memory in another process")
        return super().__call__(*arguments, **options)

    def all_fit(self, own: bool) -> bool:
        """Whether the batches of all processes have fitted so far; asked alike by all until it is not so."""
        self.fits = self.fits and not self.largest(not own)
        return self.fits

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        found = torch.tensor(int(number))
        if self.group is not None:
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return int(found)


class GradientCollector:
    """Projected gradients of a batch in one backward.

    Used as a context: inside it the model is in evaluation mode and its parameters are frozen (the backward needs
    activations and output gradients, never `param.grad`); on exit both are as before. Activation checkpointing goes on.

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
        self.output_function = OUTPUT_FUNCTIONS[output_function]
        self.autocast = autocast
        self.matrices = model.layout.matrices  # a layout is of trainable parameters
        self.in_step = _InStep(model)

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
        modules = dict(self.model.network.named_modules())
        self._hooks = [
            modules[matrix.module_name].register_forward_hook(self._watch(matrix, modules[matrix.module_name]))
            for matrix in self.matrices
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

    def _watch(self, matrix: AdaptedMatrix, module: nn.Module) -> Callable[..., Tensor | None]:
        """A forward hook that projects the layer's per-sample gradient as soon as backward reaches its output."""
        # the output layer sees the target positions of all rows in one line (`LanguageModel.target_logits`)
        at_targets = module is self.model.network.get_output_embeddings()

        def project(output_gradients: Tensor, inputs: Tensor) -> None:
            factors = [output_gradients, inputs]
            if at_targets:  # (1, K, size) -> (B, T, size), each row's positions padded with zeros
                counts = torch.bincount(self._target_rows, minlength=len(self._rows)).tolist()
                pieces = [list(factor[0].split(counts)) for factor in factors]
                factors = [nn.utils.rnn.pad_sequence(of_factor, batch_first=True) for of_factor in pieces]
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
        self.representations = nn.functional.normalize((weights[:, :, None] * hidden).sum(1), dim=1)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Rows (B, d) and outputs (B,) of one batch, float32."""
        device, num_rows = self.model.device, len(batch["labels"])
        batch = batch if "targets" in batch else {**batch, "targets": self.model.targets(batch)}
        _, self._target_rows, _ = batch["targets"]
        if device.type == "cuda":  # only from pinned memory it is copied while the GPU is at work
            batch = {name: value.pin_memory() for name, value in batch.items()}
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        self._rows = torch.zeros(num_rows, self.projection.dim, device=device)
        self._positions = {batch["input_ids"].numel(), batch["labels"].numel()}
        if self.represent:
            self._valid = self.model.valid_positions(batch)
        dtype = getattr(torch, self.autocast) if self.autocast else None
        mixed = torch.autocast(device.type, dtype, enabled=dtype is not None)
        with torch.enable_grad():
            with mixed:
                logits, labels, rows = self.model.target_logits(batch)
            outputs = self.output_function.function(logits, labels, rows, num_rows)
            outputs.sum().backward()
        return self._rows, outputs.detach()

    def unless_out_of_memory(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """As `__call__`; None where the batch does not fit into memory, or another's of those that share the weights."""
        taken, self.in_step.fits = None, True
        try:
            taken = self(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if self.in_step.all_fit(taken is not None):
            return taken
        for root in self.in_step.parts[:1]:
            root.reset_iter_state()
        del taken
        torch.cuda.empty_cache()  # after the error, which holds the batch's tensors
        return None


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

    A batch that does not fit into memory is halved, and all after it. With several processes each takes whole batches of
    its own into a shard beside the store, and the first takes the shards over: every sample is computed once, and what a
    process that dies has finished is kept. Where they share one model's weights they go in step, and halve together; one
    that has no batch left takes part with a row that it does not keep. ValueError: a single row does not fit.
    """
    rank, world = (processes.rank, processes.world) if processes else (0, 1)
    wait = processes.wait if processes else lambda: None
    collector = GradientCollector(model, projection, output_function, autocast, store.representations is not None)
    if rank == 0:
        store.absorb()
    wait()
    everything = datamodule.budgeted(store.to_compute)
    batches = store.unfinished(everything)
    own = batches[rank::world]
    done = datamodule.padded_tokens(everything) - datamodule.padded_tokens(batches) if world == 1 else 0
    writer = store.shard(rank, np.concatenate(own)) if world > 1 and own else store
    if batches:
        _collect(collector, datamodule, writer, own, batches[-1][-1:], desc + ", own share" * (world > 1), done)
    wait()
    if rank == 0:
        store.absorb()


def _collect(
    collector: GradientCollector,
    datamodule: TaskDataModule,
    store: StoreWriter,
    batches: Sequence[np.ndarray],
    spare: np.ndarray,
    desc: str,
    done: int,
) -> None:
    """Take batches of sample indices, and `spare` as long as another process has some. Progress counts padded tokens, of
    which `done` are there already: the longest rows come first, and take the longest. From a GPU a batch's rows are copied
    while it is at work on the next."""
    waiting, total = deque(batches), done + datamodule.padded_tokens(batches)
    copied, on_gpu = deque[tuple[np.ndarray, list[Tensor], Any]](), collector.model.device.type == "cuda"
    with collector, progress(desc=desc, total=total, initial=done, unit="token") as bar:

        def write() -> None:
            indices, values, copy = copied.popleft()
            if copy is not None:
                copy.synchronize()
            store.write(indices, *(value.numpy() for value in values))
            bar.update(datamodule.padded_tokens([indices]))

        while rows := collector.in_step.largest(len(waiting[0]) if waiting else 0):
            indices = waiting[0] if waiting else spare
            if (taken := collector.unless_out_of_memory(datamodule.collate(indices))) is None:
                tokens = int(datamodule.row_lengths[indices].max())
                if rows == 1:
                    raise ValueError(
                        f"a batch of 1 row of up to {tokens} tokens does not fit into memory; pass --gradient_checkpointing, "
                        "a smaller --max_length, --precision bf16, or spread the weights with --strategy fsdp"
                    )
                while copied:
                    write()
                say_once(f"note: {rows} rows of up to {tokens} tokens do not fit into memory: batches are halved.")
                waiting = deque(half for batch in waiting for half in np.array_split(batch, min(2, len(batch))))
                bar.total = bar.n + datamodule.padded_tokens(waiting)
                continue
            if not waiting:
                continue
            waiting.popleft()
            values = [collector.output_function.sign * value for value in taken]
            values += [collector.representations] if collector.represent else []
            on_host = [value.to("cpu", non_blocking=True) for value in values]
            copied.append((indices, on_host, torch.cuda.current_stream().record_event() if on_gpu else None))
            while len(copied) > 1:
                write()
        while copied:
            write()
    if batches:
        store.flush()


def fitting_budget(collector: GradientCollector, datamodule: TaskDataModule, rows: np.ndarray) -> int:
    """The data module's budget of tokens, doubled as long as a batch of the longest of `rows` (sample indices) fits."""
    budget = datamodule.max_tokens_per_batch
    with collector:
        while budget < LARGEST_BUDGET and len(rows) > len(datamodule.budgeted(rows, budget)[0]):
            if collector.unless_out_of_memory(datamodule.collate(datamodule.budgeted(rows, 2 * budget)[0])) is None:
                break
            budget *= 2
    return budget


@torch.no_grad()
def outputs_of(
    model: LanguageModel, datamodule: TaskDataModule, indices: np.ndarray, output_function: str
) -> np.ndarray:
    """Outputs of the given samples as a store holds them (losses, or minus the margins), in their order, float64."""
    model.eval()
    outputs, kind = np.full(len(datamodule.data), np.nan), OUTPUT_FUNCTIONS[output_function]
    for batch in datamodule.evaluation_batches(indices):
        batch = {name: value.to(model.device) for name, value in batch.items()}
        values = kind.function(*model.target_logits(batch), len(batch["labels"]))
        outputs[batch["sample_index"].cpu()] = kind.sign * values.double().cpu()
    return outputs[indices]


def products_with(
    model: LanguageModel,
    datamodule: TaskDataModule,
    indices: np.ndarray,
    output_function: str,
    directions: Sequence[Mapping[str, Tensor]],
) -> np.ndarray:
    """Exact products g.delta of the given samples' gradients, as a store holds them, with k displacements (name -> (out, in)):
    (len(indices), k) float64, in their order."""
    products = np.full((len(datamodule.data), len(directions)), np.nan)
    with GradientCollector(model, Directions(directions), output_function) as collector:
        for batch in datamodule.evaluation_batches(indices):
            rows, _ = collector(batch)
            products[batch["sample_index"].cpu()] = rows.double().cpu()
    return OUTPUT_FUNCTIONS[output_function].sign * products[indices]
