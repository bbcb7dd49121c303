"""Fine-tuning and evaluating: one Lightning module for both tracks.

Meta-training, final fine-tuning and fine-tuning for ground truth are the same call on different rows.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import pickle
import random
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from src import artifacts
from src.console import end_at_sigterm, progress, say, say_once
from src.data import TaskData
from src.datamodule import Batch, TaskDataModule
from src.distributed import Hardware, cluster
from src.models import LanguageModel, per_sample_loss, save_model, standing_in, state_to_save, token_losses

# Lightning asks of what is logged whether it is a metric. None is, and torchmetrics takes more than a second to load.
_NONE = type("NoMetric", (), {})
_NO_METRICS = SimpleNamespace(
    Metric=_NONE, MetricCollection=_NONE, __version__=importlib.metadata.version("torchmetrics")
)
with standing_in("torchmetrics", _NO_METRICS):
    import pytorch_lightning as pl
    from pytorch_lightning.plugins.io import TorchCheckpointIO
    from pytorch_lightning.strategies import ModelParallelStrategy, Strategy

for _name in ("lightning_fabric", "pytorch_lightning", "pytorch_lightning.utilities.rank_zero"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # what it says of every start; being imported, it has set INFO

# Optimizer steps times learning rate below which training is noted: AdamW moves a weight by about the learning rate in a
# step. SmolLM2-135M stays at its first loss at 0.0002 and learns at 0.05; the published commands are at 0.08 and above.
LEAST_CHANGE = 0.005
LOOK_EVERY = 50  # steps between looks at a GPU's training losses, each of which waits for it


@dataclass(frozen=True)
class TrainingPlan:
    """Hyperparameters of a training. `accumulate` is in batches per optimizer step, `max_new_tokens` bounds a generation,
    `loss_over` is what a batch's loss is the mean over: its target tokens ("token"), or the mean losses of its rows ("row"), and
    `max_steps` of the optimizer take the place of `epochs`.
    """

    epochs: int
    lr: float
    weight_decay: float = 0.0
    accumulate: int = 1
    max_new_tokens: int = 256
    loss_over: str = "token"
    max_steps: int | None = None


class FineTuning(pl.LightningModule):
    """AdamW with a constant learning rate on the mean loss of a batch.

    Validation and test record the mean loss of every sample they see (`losses`, (N,), NaN where not seen) and, where
    completions can be judged, what is generated for its prompt (`completions`, by sample index), of all processes.
    `shown` is the last value of each loss and accuracy, for progress bars.
    """

    def __init__(self, model: LanguageModel, datamodule: TaskDataModule, plan: TrainingPlan) -> None:
        super().__init__()
        self.model, self.datamodule, self.data, self.plan = model, datamodule, datamodule.data, plan
        self.strict_loading = False  # a state holds what trains alone
        self.shown: dict[str, Tensor | float] = {}
        self._unseen: list[tuple[Tensor, int, Tensor]] = []  # training losses with their step and samples
        self.on_validation_epoch_start()

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed  # where its state stands
        return self.datamodule.training_batches(trainer.global_rank, trainer.world_size, trainer.current_epoch, done)

    def val_dataloader(self) -> list[DataLoader]:
        return self.datamodule.held_out_batches("validation", self.trainer.global_rank, self.trainer.world_size)

    def test_dataloader(self) -> list[DataLoader]:
        return self.datamodule.held_out_batches("test", self.trainer.global_rank, self.trainer.world_size)

    def configure_model(self) -> None:
        """Under `--strategy fsdp`, spread the weights over the processes."""
        if self.device_mesh is not None:
            self.model.shard(self.device_mesh["data_parallel"])

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return {**batch, "targets": self.model.targets(batch)} if "labels" in batch else batch

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits, labels, rows = self.model.target_logits(batch)
        if self.plan.loss_over == "row":
            loss = per_sample_loss(logits, labels, rows, len(batch["labels"])).mean()
        else:
            loss = token_losses(logits, labels).mean()
        self.shown["train_loss"] = loss.detach()
        self._unseen.append((loss.detach(), self.global_step, batch["sample_index"]))
        if not loss.is_cuda or len(self._unseen) == LOOK_EVERY:
            self.look_at_losses()
        return loss

    def look_at_losses(self) -> None:
        """Stop at the first training loss that is not finite, of those since the last look."""
        unseen, self._unseen = self._unseen, []
        values = torch.stack([loss for loss, _, _ in unseen]).tolist() if unseen else []
        for value, (_, step, samples) in zip(values, unseen, strict=True):
            if not np.isfinite(value):
                self._stop_at(samples, f"the training loss is {value}", step)

    def on_train_end(self) -> None:
        self.look_at_losses()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, weight in self.named_parameters() if weight.requires_grad}
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in trained}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trainable, lr=self.plan.lr, weight_decay=self.plan.weight_decay)

    def on_validation_epoch_start(self) -> None:
        self.look_at_losses()
        self.losses = np.full(len(self.data), np.nan)
        self.completions: dict[int, str] = {}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if "labels" not in batch:
            if not self.trainer.sanity_checking:  # before training only losses are wanted
                texts = self.model.generate(batch, self.plan.max_new_tokens)
                self.completions.update(zip(batch["sample_index"].tolist(), texts, strict=True))
            return
        losses = per_sample_loss(*self.model.target_logits(batch), len(batch["labels"])).cpu()
        samples = batch["sample_index"].cpu()
        if not losses.isfinite().all():
            self._stop_at(samples[~losses.isfinite()], "a held-out loss is not finite", self.global_step)
        self.losses[samples] = losses

    def _stop_at(self, samples: Tensor, what: str, step: int) -> None:
        """Abort on a non-finite loss and name its samples."""
        named = [f"{index} ({self.data.examples[index].task})" for index in samples.tolist()]
        more = f" and {len(named) - 20} more" if len(named) > 20 else ""
        after = f" after {step} optimizer steps" if step else ""
        raise ValueError(
            f"{what}{after}, at samples {', '.join(named[:20])}{more}; lower --lr (or --scale), pass --precision 32 or bf16 in "
            "place of 16, or look at these rows"
        )

    def on_validation_epoch_end(self) -> None:
        if (world := self.trainer.world_size) > 1:
            gathered: list[Any] = [None] * world
            torch.distributed.all_gather_object(gathered, (self.losses, self.completions))
            self.losses = np.fmax.reduce([losses for losses, _ in gathered])
            self.completions = {index: text for _, completions in gathered for index, text in completions.items()}
        self.shown["val_loss"] = float(np.nanmean(self.losses))
        if self.completions:
            self.shown["val_accuracy"] = float(np.nanmean(_correct(self.data, self.completions)))

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end


def _correct(data: TaskData, completions: dict[int, str]) -> np.ndarray:
    """Whether each row's completion has the right answer, (N,), NaN where there is none."""
    correct = np.full(len(data), np.nan)
    for index, text in completions.items():
        answer = data.examples[index].answer
        correct[index] = data.judge is not None and answer is not None and data.judge(text, answer)["correct"]
    return correct


class FitProgress(pl.Callback):
    """A bar over all optimizer steps of a fit, with the last losses; and over the batches of each evaluation, gone when it
    is done. The fit's stays where `leave` says so."""

    def __init__(self, desc: str = "training", leave: bool = True) -> None:
        self.desc, self.leave = desc, leave
        self.bars: list[tqdm] = []  # the fit's below an evaluation's

    def __str__(self) -> str:
        """Text behind the fit's bar, evaluated when drawn: losses are read from the device only then."""
        return "".join(f", {name}={float(value):.3f}" for name, value in self.shown.items())

    def _open(self, trainer: pl.Trainer, desc: str, total: float, leave: bool = False, initial: int = 0) -> None:
        if trainer.is_global_zero:
            self.bars.append(progress(desc=desc, total=int(total), unit="step", leave=leave, initial=initial))

    def _close(self, *_: Any) -> None:
        if self.bars:
            self.bars.pop().close()

    def _advance(self, *_: Any) -> None:
        if self.bars:
            self.bars[-1].update(1)

    def on_train_start(self, trainer: pl.Trainer, module: FineTuning) -> None:
        self.shown = module.shown
        self._open(trainer, self.desc, trainer.estimated_stepping_batches, self.leave, trainer.global_step)
        if self.bars:
            self.bars[0].postfix = self

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.bars:
            self.bars[0].update(trainer.global_step - self.bars[0].n)

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        batches = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
        self._open(trainer, "test" if trainer.testing else "validation", sum(batches))

    def on_exception(self, *_: Any) -> None:
        while self.bars:
            self._close()

    on_test_start = on_validation_start
    on_validation_batch_end = on_test_batch_end = _advance
    on_validation_end = on_test_end = on_train_end = _close


class Resumable(pl.Callback):
    """Keeps the state of a training, so that the same command goes on where it was cut off.

    The state is Lightning's checkpoint, of the weights that train alone. It is written at every epoch's end, every `minutes`
    between two optimizer steps, and at SIGTERM, which ends the program. A file beside it, `note`, says what the training is
    `made_from`, its seconds so far, and which checkpoints it has written, so that they can be told from what others put
    there. ValueError: a state is there that is damaged, or of another training, with the `repair`.
    """

    def __init__(self, note: Path, made_from: Mapping[str, Any], repair: str, minutes: float) -> None:
        self.note, self.state, self.made_from, self.minutes = note, artifacts.state_file(note), made_from, minutes
        self.repair = repair
        earlier = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        self.resumes, self.terminated = self.state.is_file(), False
        self.written: list[str] = earlier.get("checkpoints", []) if self.resumes else []
        self.started = time.perf_counter() - earlier.get("seconds", 0.0)
        self._saved, self._random = time.monotonic(), dict[str, Any]()
        if self.resumes:
            artifacts.check_manifest(self.state, earlier.get("made_from", {}), made_from, repair)
            if not zipfile.is_zipfile(self.state):
                raise ValueError(f"{self.state} is damaged. {repair}")

    def take_note(self) -> None:
        """Write the file beside the state."""
        spent = {"checkpoints": self.written, "seconds": time.perf_counter() - self.started}
        artifacts.write_json(self.note, {"made_from": self.made_from, **spent})

    def on_train_start(self, trainer: pl.Trainer, module: FineTuning) -> None:
        if self._random:
            steps = f"{trainer.global_step:,} of {int(trainer.estimated_stepping_batches):,} optimizer steps"
            say(f"Going on after {steps} ({self.state}).")

    def on_train_batch_start(self, trainer: pl.Trainer, module: FineTuning, batch: Batch, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches:
            return  # a state has no gradients
        if self._random:
            _set_random_state(self._random)
            self._random = {}
            return
        due = self.terminated or time.monotonic() - self._saved >= 60 * self.minutes
        if trainer.strategy.reduce_boolean_decision(due, all=False) or (batch_idx == 0 and trainer.current_epoch):
            self._write(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: FineTuning) -> None:
        if not trainer.should_stop:
            self._write(trainer, module)

    def _write(self, trainer: pl.Trainer, module: FineTuning) -> None:
        module.look_at_losses()
        if trainer.is_global_zero:
            self.take_note()
        trainer.save_checkpoint(self.state)
        self._saved = time.monotonic()
        if trainer.strategy.reduce_boolean_decision(self.terminated, all=False):
            if not trainer.is_global_zero:
                sys.exit(0)  # with an error its launcher would kill the first
            end_at_sigterm(f" after {trainer.global_step:,} optimizer steps; the same command goes on there")

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["random"] = [_random_state()]
        if trainer.world_size > 1:
            checkpoint["random"] *= trainer.world_size
            torch.distributed.all_gather_object(checkpoint["random"], _random_state())

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._random = checkpoint["random"][trainer.global_rank]

    @contextlib.contextmanager
    def heeding_sigterm(self) -> Iterator[None]:
        """Let SIGTERM wait for the end of an optimizer step."""
        before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "terminated", True))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def _random_state() -> dict[str, Any]:
    """This process's random numbers, as what can be read without running anything."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (kind, np.array(keys).tolist(), *rest),
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def _set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


class Checkpoints(Resumable):
    """Saves the model too, besides its state: at `shares` of all optimizer steps and at the epoch of the best validation loss.

    Each checkpoint is a folder that `load_checkpoint` opens, with a manifest written last that says what `describe` does.
    `stop_after` ends the training with the last share. `validation_losses` says how good the model was before training
    ("base") and at the last validation ("last", by target; "last_step"), and whether that was the end of the whole training.
    """

    def __init__(self, shares: Sequence[float], describe: dict, stop_after: bool, **of_state: Any) -> None:
        super().__init__(**of_state)
        self.folder, self.shares, self.describe, self.stop_after = self.note.parent, shares, describe, stop_after
        self.trajectory: list[str] = []
        self.best: str | None = None
        self.best_loss = float("inf")
        self.validation_losses: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("trajectory", "best", "best_loss", "validation_losses")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        if gone := [name for name in self.trajectory if not (self.folder / name / artifacts.MANIFEST).is_file()]:
            raise ValueError(f"{self.folder / gone[0]} is gone, which was written before {self.state}. {self.repair}")
        if self.best and not (self.folder / self.best / artifacts.MANIFEST).is_file():
            self.best, self.best_loss = None, float("inf")  # replaced after the state, by one that comes again

    def on_train_start(self, trainer: pl.Trainer, module: FineTuning) -> None:
        super().on_train_start(trainer, module)
        total = int(trainer.estimated_stepping_batches)
        steps = {max(1, round(share * total)) if share else 0 for share in self.shares}
        self.steps = {step for step in steps if artifacts.step_checkpoint_name(step) not in self.trajectory}
        names = [artifacts.step_checkpoint_name(step) for step in steps]
        names += [artifacts.epoch_checkpoint_name(epoch) for epoch in range(trainer.max_epochs or 0)]
        for name in sorted({*names} - {*self.trajectory, self.best}):
            if name in self.written and trainer.is_global_zero:
                shutil.rmtree(self.folder / name, ignore_errors=True)  # after the state: it comes again
            elif name not in self.written and (self.folder / name / artifacts.MANIFEST).is_file():
                found = f"{self.folder / name} is not of this training, which may write a checkpoint there"
                raise ValueError(f"{found}; move it elsewhere, or choose another --save_name")
        self._save_at(trainer, module, 0)

    def on_train_batch_end(self, trainer: pl.Trainer, module: FineTuning, *_: Any) -> None:
        self._save_at(trainer, module, trainer.global_step)
        if self.stop_after and not self.steps:
            trainer.should_stop = True

    def _save_at(self, trainer: pl.Trainer, module: FineTuning, step: int) -> None:
        if step in self.steps:
            self.steps.remove(step)
            self.trajectory.append(artifacts.step_checkpoint_name(step))
            self._save(trainer, module, self.trajectory[-1], step=step)

    def on_validation_end(self, trainer: pl.Trainer, module: FineTuning) -> None:
        loss, by_target = float(np.nanmean(module.losses)), target_losses(module.data, module.losses)
        if trainer.sanity_checking:
            self.validation_losses.setdefault("base", by_target)
            return
        step, total = trainer.global_step, int(trainer.estimated_stepping_batches)
        self.validation_losses |= {"last": by_target, "last_step": step, "whole": step >= total}
        if loss < self.best_loss:
            replaced, self.best, self.best_loss = (
                self.best,
                artifacts.epoch_checkpoint_name(trainer.current_epoch),
                loss,
            )
            self._save(trainer, module, self.best, epoch=trainer.current_epoch, validation_loss=loss)
            if replaced and trainer.is_global_zero:
                shutil.rmtree(self.folder / replaced, ignore_errors=True)

    def _save(self, trainer: pl.Trainer, module: FineTuning, name: str, **facts: Any) -> None:
        module.look_at_losses()
        state = state_to_save(module.model) if module.device_mesh is not None else None
        if trainer.is_global_zero:
            self.written.append(name)
            self.take_note()
            save_checkpoint(module.model, self.folder / name, {**self.describe, **facts}, state)
        trainer.strategy.barrier()


class SavePredictions(pl.Callback):
    """Hands every validation's completions to `write(epoch, completions)`."""

    def __init__(self, write: Callable[[int, dict[int, str]], None]) -> None:
        self.write = write

    def on_validation_end(self, trainer: pl.Trainer, module: FineTuning) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            self.write(trainer.current_epoch, module.completions)


def save_checkpoint(
    model: LanguageModel, folder: Path, facts: dict[str, Any], state: dict[str, Tensor] | None = None
) -> None:
    """Write a checkpoint folder from scratch, its manifest last, with the weights' sizes; `state` as in `save_model`."""
    shutil.rmtree(folder, ignore_errors=True)
    with artifacts.os_errors(folder):
        save_model(model, folder, state)
    files = artifacts.file_sizes(folder, sorted(path.name for path in folder.glob(artifacts.WEIGHTS)))
    artifacts.write_manifest(folder, {"kind": "meta-initialization", "model_key": model.key, **facts, "files": files})


class _Written(TorchCheckpointIO):
    """A state takes the place of the last one when it is whole; Lightning makes a second copy in memory instead."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with artifacts.atomic_write(Path(path)) as temporary, open(temporary, "wb") as file:
            torch.save(checkpoint, file)  # by a path, it hides errors of the system


@contextlib.contextmanager
def _trainer(
    hardware: Hardware, plan: TrainingPlan | None = None, callbacks: Sequence[pl.Callback] = (), validate: bool = False
) -> Iterator[pl.Trainer]:
    """Make a Trainer without Lightning's own files: checkpoints and bars are our callbacks. Without a plan it evaluates;
    `validate` says whether training begins, and every epoch ends, with a validation."""
    strategy: str | Strategy = hardware.strategy
    if strategy == "fsdp":  # as FSDP2, which also runs on the CPU
        backend = {"process_group_backend": "gloo"} if hardware.accelerator == "cpu" else {}
        sizes = {"data_parallel_size": hardware.num_processes, "tensor_parallel_size": 1}
        strategy = ModelParallelStrategy(**sizes, save_distributed_checkpoint=False, **backend)  # unpickled, if spread
    trainer = pl.Trainer(
        accelerator=hardware.accelerator,
        devices=hardware.devices,
        strategy=strategy,
        precision=hardware.precision,
        num_nodes=hardware.num_nodes,
        max_epochs=-1 if plan and plan.max_steps else plan.epochs if plan else 1,
        max_steps=plan.max_steps if plan and plan.max_steps else -1,
        accumulate_grad_batches=plan.accumulate if plan else 1,
        callbacks=list(callbacks),
        limit_val_batches=1.0 if validate or plan is None else 0,
        num_sanity_val_steps=-1 if validate else 0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[_Written(), *cluster()],
    )
    # its handlers communicate in the midst of whatever is going on
    trainer._signal_connector.register_signal_handlers = lambda: None
    try:
        yield trainer
    except SystemExit as end:  # with 1 it ends the program where it is interrupted
        if trainer.interrupted and end.code == 1:
            raise KeyboardInterrupt from None
        raise


def fit(
    model: LanguageModel,
    datamodule: TaskDataModule,
    plan: TrainingPlan,
    hardware: Hardware,
    *,
    seed: int,
    callbacks: Sequence[pl.Callback] = (),
    validate: bool = False,
    resumable: Resumable | None = None,
) -> None:
    """Train the model's trainable parameters in place on the data module's training rows, from the state on that
    `resumable` has; a training that cannot teach an adapter much is noted before it starts. SystemExit: SIGTERM came."""
    rows_per_step = datamodule.batch_size * plan.accumulate * hardware.num_processes
    steps = plan.max_steps or plan.epochs * -(-len(datamodule.train_indices) // rows_per_step)
    if model.has_adapter and steps * plan.lr < LEAST_CHANGE:
        say_once(
            f"note: {steps} optimizer steps at --lr {plan.lr:g} move a weight by at most about {steps * plan.lr:.2g} and hardly "
            "train an adapter; with so few rows pass a smaller --batch_size (8) and a higher --lr (1e-3)"
        )
    pl.seed_everything(seed, verbose=False)
    model.train()
    module, path = FineTuning(model, datamodule, plan), None
    with contextlib.ExitStack() as entered:
        if resumable is not None:
            callbacks, path = [resumable, *callbacks], resumable.state if resumable.resumes else None
            entered.enter_context(resumable.heeding_sigterm())
        trainer = entered.enter_context(_trainer(hardware, plan, callbacks, validate))
        try:
            trainer.fit(module, ckpt_path=path, weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path} holds more than data and is not read; remove it to train again") from error


Evaluation = tuple[np.ndarray, dict[int, str]]
"""What a model does on held-out rows: losses (N,), NaN for other rows; and completions by sample index."""


def evaluate(
    model: LanguageModel, datamodule: TaskDataModule, hardware: Hardware, plan: TrainingPlan, splits: Sequence[str]
) -> Evaluation:
    """Losses, and where they can be judged completions, of the rows of the given splits."""
    losses, completions = np.full(len(datamodule.data), np.nan), dict[int, str]()
    module = FineTuning(model, datamodule, plan)
    with _trainer(hardware, callbacks=[FitProgress()]) as trainer:
        for split in splits:
            run = trainer.validate if split == "validation" else trainer.test
            run(module, verbose=False)
            losses = np.fmax(losses, module.losses)
            completions |= module.completions
    return losses, completions


def target_losses(data: TaskData, losses: np.ndarray, split: str = "validation") -> dict[str, float]:
    """Mean of the losses (N,) over each target's rows of a split."""
    held_out = data.indices(split)
    rows_of = {name: held_out[data.target_of_sample[held_out] == target] for target, name in enumerate(data.targets)}
    return {name: float(np.mean(losses[rows])) for name, rows in rows_of.items() if len(rows)}


def target_metrics(data: TaskData, evaluation: Evaluation, splits: Sequence[str]) -> dict[str, float]:
    """`<split>_loss/<target>`, the mean loss of each target, and where completions are judged `<split>_accuracy/<target>`."""
    losses, completions = evaluation
    values = {"loss": losses, **({"accuracy": _correct(data, completions)} if data.judge else {})}
    return {
        f"{split}_{kind}/{target}": mean
        for split in splits
        for kind, of_row in values.items()
        for target, mean in target_losses(data, of_row, split).items()
    }


def fine_tune_on_subset(
    model: LanguageModel,
    start: dict[str, Tensor],
    datamodule: TaskDataModule,
    subset: Sequence[int],
    plan: TrainingPlan,
    hardware: Hardware,
    *,
    seed: int,
    task_shares: np.ndarray | None = None,
    callbacks: Sequence[pl.Callback] = (),
    resumable: Resumable | None = None,
) -> tuple[dict[str, float], np.ndarray]:
    """The fine-tuned value of a subset: train `model` from the trainable state `start` on its tasks' rows, then evaluate.

    Args:
        subset: Task ids; empty means the base model as it is.
        task_shares: Share of the rows to draw from each task (n,); None = every row of the subset once an epoch.

    Returns:
        `num_rows` and the columns of `target_metrics` on validation and test rows; and the loss of every held-out row,
        (N,), NaN for the others.
    """
    model.load_trainable_state(start)
    rows = datamodule.data.indices("train", subset)
    if len(subset):
        shares = None
        if task_shares is not None:
            task_of_row = datamodule.data.task_of_sample[rows]
            shares = (task_shares / np.maximum(np.bincount(task_of_row, minlength=len(task_shares)), 1))[task_of_row]
            shares = shares / shares.sum()
        datamodule.select_training_rows(rows, seed, shares)
        fit(model, datamodule, plan, hardware, seed=seed, callbacks=callbacks, resumable=resumable)
    evaluation = evaluate(model, datamodule, hardware, plan, splits := ("validation", "test"))
    return {"num_rows": len(rows), **target_metrics(datamodule.data, evaluation, splits)}, evaluation[0]
