"""Fine-tuning and evaluating: one Lightning module for both tracks.

Meta-training, the one fine-tuning at the end and every fine-tuning for ground truth are the same call with
other rows. What differs is kept in callbacks (checkpoints on the way) and in the caller (which rows).
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from tqdm import tqdm

from src.cli import Hardware, progress, say_once
from src.data import TaskData
from src.datamodule import Batch, TaskDataModule
from src.models import LanguageModel, per_sample_loss, save_model, state_to_save
from src.paths import (
    LOGS,
    MANIFEST,
    UNFINISHED,
    WEIGHTS,
    epoch_checkpoint_name,
    files_facts,
    os_errors,
    step_checkpoint_name,
    write_json,
    write_manifest,
)

LEAST_CHANGE = 0.005
"""Optimizer steps times learning rate below which training is noted: AdamW moves a weight by about the learning rate in a
step. SmolLM2-135M stays at its first loss at 0.0002 and learns at 0.05; the published commands are at 0.08 and above."""


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how fast. `accumulate` is in batches per optimizer step, `max_new_tokens` bounds a generation, and
    `loss_over` is what a batch's loss is the mean over: its target tokens ("token"), or the mean losses of its rows ("row").
    """

    epochs: int
    lr: float
    weight_decay: float = 0.0
    accumulate: int = 1
    max_new_tokens: int = 256
    loss_over: str = "token"


class FineTuning(pl.LightningModule):
    """AdamW with a constant learning rate on the mean loss of a batch.

    Validation and test record the mean loss of every sample they see (`losses`, (N,), NaN where not seen) and,
    where completions can be judged, what is generated for its prompt (`completions`, by sample index). Under
    several processes each sample is computed by one of them and the records are joined.
    """

    def __init__(self, model: LanguageModel, data: TaskData, plan: TrainingPlan) -> None:
        super().__init__()
        self.model, self.data, self.plan = model, data, plan
        self.losses = np.full(len(data), np.nan)
        self.completions: dict[int, str] = {}

    def configure_model(self) -> None:
        """Under `--strategy fsdp`, spread the weights over the processes."""
        if self.device_mesh is not None:
            self.model.shard(self.device_mesh["data_parallel"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits, labels, rows = self.model.target_logits(batch)
        if self.plan.loss_over == "row":
            loss = per_sample_loss(logits, labels, rows, len(batch["labels"])).mean()
        else:
            loss = nn.functional.cross_entropy(logits.float(), labels)
        if not loss.isfinite():
            self._stop_at(batch["sample_index"], f"the training loss is {float(loss.detach())}")
        self.log("train_loss", loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trainable, lr=self.plan.lr, weight_decay=self.plan.weight_decay)

    def on_validation_epoch_start(self) -> None:
        # -inf marks "not seen here", so that a maximum joins the records of several processes
        self._seen = torch.full((len(self.data),), float("-inf"), dtype=torch.float64)
        self.completions = {}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if "labels" not in batch:
            if self.trainer.sanity_checking:  # before training only losses are wanted
                return
            texts = self.model.generate(batch, self.plan.max_new_tokens)
            self.completions.update(zip(batch["sample_index"].tolist(), texts, strict=True))
            return
        logits, labels, rows = self.model.target_logits(batch)
        losses = per_sample_loss(logits, labels, rows, len(batch["labels"]))
        if not losses.isfinite().all():
            self._stop_at(batch["sample_index"][~losses.isfinite()], "a held-out loss is not finite")
        self._seen[batch["sample_index"].cpu()] = losses.double().cpu()

    def _stop_at(self, sample_index: Tensor, what: str) -> None:
        """Nothing that comes after a loss that is no number is worth its time, and a mean would hide it."""
        indices = sample_index.tolist()
        named = ", ".join(f"{index} ({self.data.examples[index].task})" for index in indices[:20])
        after = f" after {self.trainer.global_step} optimizer steps" if self.trainer.state.fn == "fit" else ""
        more = f" and {len(indices) - 20} more" if len(indices) > 20 else ""
        raise ValueError(
            f"{what}{after}, at samples {named}{more}; lower --lr (or --scale), pass --precision 32 or bf16 in place of 16, or "
            "look at these rows"
        )

    def on_validation_epoch_end(self) -> None:
        seen = self.trainer.strategy.reduce(self._seen.to(self.device), reduce_op="max").cpu()
        seen[seen == float("-inf")] = float("nan")
        self.losses = seen.numpy()
        self.log("val_loss", float(np.nanmean(self.losses)), rank_zero_only=True)
        if self.data.judge is not None and not self.trainer.sanity_checking:
            self.completions = join_completions(self.trainer, self.completions)
            correct = [correct_of(self.data, index, text) for index, text in self.completions.items()]
            self.log("val_accuracy", float(np.mean(correct)), rank_zero_only=True)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end


def correct_of(data: TaskData, sample_index: int, completion: str) -> bool:
    """Whether a generated completion has the right answer."""
    judge, answer = data.judge, data.examples[sample_index].answer
    return judge is not None and answer is not None and judge(completion, answer)["correct"]


def join_completions(trainer: pl.Trainer, completions: dict[int, str]) -> dict[int, str]:
    """The completions of all processes."""
    if trainer.world_size == 1:
        return completions
    gathered: list[dict[int, str]] = [{} for _ in range(trainer.world_size)]
    torch.distributed.all_gather_object(gathered, completions)
    return {index: text for part in gathered for index, text in part.items()}


class FitProgress(pl.Callback):
    """One bar over all optimizer steps of a fit, with the last training and validation loss; `leave` it when it is done."""

    def __init__(self, desc: str, leave: bool = True) -> None:
        self.desc, self.leave = desc, leave
        self.bar: tqdm | None = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            total = int(trainer.estimated_stepping_batches)
            self.bar = progress(desc=self.desc, total=total, unit="step", leave=self.leave)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if self.bar is not None:
            shown = {name: f"{float(value):.3f}" for name, value in trainer.callback_metrics.items()}
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(trainer.global_step - self.bar.n)

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if self.bar is not None:
            self.bar.close()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, module, "fit")


class EvaluationProgress(pl.Callback):
    """A bar over the batches of each evaluation, gone when it is done: generating answers takes its time."""

    bar: tqdm | None = None

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._start(trainer, trainer.num_val_batches, "validation")

    def on_test_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._start(trainer, trainer.num_test_batches, "test")

    def _start(self, trainer: pl.Trainer, batches: Sequence[int | float], desc: str) -> None:
        if trainer.is_global_zero:
            self.bar = progress(desc=desc, total=int(sum(batches)), unit="step", leave=False)

    def on_validation_batch_end(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.update(1)

    def on_validation_end(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    on_test_batch_end = on_validation_batch_end
    on_test_end = on_validation_end
    on_exception = on_validation_end


class Checkpoints(pl.Callback):
    """Saves the model at shares of the course and at the epoch of the best validation loss.

    Each checkpoint is a folder that `load_checkpoint` opens, with a manifest written last. The names of those written so far
    stand in a file beside them, so that a training that was cut off can be told from what others put there.
    Each checkpoint is a folder that `load_checkpoint` opens, with a manifest written last. `validation_losses` says how
    good the model was before training ("base") and at the last validation ("last", by target; "last_step"), and whether
    that was the end of the whole training.

    Args:
        folder: Where checkpoints go.
        shares: Shares of all optimizer steps, in [0, 1].
        describe: What every manifest says.
        stop_after: End the training with the last of the shares.
        spent_before: Seconds that trainings which were cut off have taken.
    """

    def __init__(
        self,
        folder: Path,
        shares: Sequence[float],
        describe: dict[str, Any],
        stop_after: bool = False,
        spent_before: float = 0.0,
    ) -> None:
        self.folder, self.shares, self.describe, self.stop_after = folder, sorted(set(shares)), describe, stop_after
        self.trajectory: list[str] = []
        self.best: str | None = None
        self.best_loss = float("inf")
        self.losses: list[float] = []  # of every validation
        self.written: list[str] = []
        self.validation_losses: dict[str, Any] = {}
        self.started = time.perf_counter() - spent_before

    def on_train_start(self, trainer: pl.Trainer, module: FineTuning) -> None:
        steps = int(trainer.estimated_stepping_batches)
        self.steps = {max(1, round(fraction * steps)) for fraction in self.shares if fraction}
        names = [step_checkpoint_name(step) for step in (*self.steps, *([0] if 0.0 in self.shares else []))]
        names += [epoch_checkpoint_name(epoch) for epoch in range(trainer.max_epochs or 0)]
        if there := [name for name in sorted(names) if (self.folder / name / MANIFEST).is_file()]:
            raise ValueError(
                f"{self.folder / there[0]} is not of this training, which may write a checkpoint there; move it elsewhere, or "
                "choose another --save_name"
            )
        if 0.0 in self.shares:
            self._save(trainer, module, step_checkpoint_name(0), step=0)
            self.trajectory.append(step_checkpoint_name(0))

    def on_train_batch_end(self, trainer: pl.Trainer, module: FineTuning, *_: Any) -> None:
        step = trainer.global_step
        if step in self.steps:
            self.steps.remove(step)
            name = step_checkpoint_name(step)
            self._save(trainer, module, name, step=step)
            self.trajectory.append(name)
        if self.stop_after and not self.steps:
            trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, module: FineTuning) -> None:
        loss, by_target = float(np.nanmean(module.losses)), target_losses(module.data, module.losses)
        if trainer.sanity_checking:
            self.validation_losses["base"] = by_target
            return
        if trainer.state.fn != "fit":
            return
        self.losses.append(loss)
        step, steps = trainer.global_step, int(trainer.estimated_stepping_batches)
        self.validation_losses |= {"last": by_target, "last_step": step, "whole": step >= steps}
        if loss >= self.best_loss:
            return
        replaced, self.best = self.best, epoch_checkpoint_name(trainer.current_epoch)
        self.best_loss = loss
        self._save(trainer, module, self.best, epoch=trainer.current_epoch, validation_loss=loss)
        if replaced and trainer.is_global_zero:
            shutil.rmtree(self.folder / replaced, ignore_errors=True)

    def _save(self, trainer: pl.Trainer, module: FineTuning, name: str, **facts: Any) -> None:
        state = state_to_save(module.model) if module.device_mesh is not None else None
        if trainer.is_global_zero:
            self.written.append(name)
            seconds = time.perf_counter() - self.started
            write_json(self.folder / UNFINISHED, {"checkpoints": self.written, "seconds": seconds})
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
    """Write a checkpoint folder anew, its manifest last with the weights' checksums; `state` as in `save_model`."""
    shutil.rmtree(folder, ignore_errors=True)
    with os_errors(folder):
        save_model(model, folder, state)
    files = files_facts(folder, sorted(path.name for path in folder.glob(WEIGHTS)))
    write_manifest(folder, {"kind": "meta-initialization", "model_key": model.key, **facts, "files": files})


def strategy_of(hardware: Hardware) -> str | Strategy:
    """Lightning's strategy: "fsdp" is its FSDP2, which also runs on the CPU."""
    if hardware.strategy != "fsdp":
        return hardware.strategy
    backend = {"process_group_backend": "gloo"} if hardware.accelerator == "cpu" else {}
    return ModelParallelStrategy(data_parallel_size=hardware.num_processes, tensor_parallel_size=1, **backend)


def make_logger(kind: str, folder: Path) -> Logger | None:
    """Lightning's logger of a kind ("none", "csv", "tensorboard", "wandb") for a run's folder.

    Raises:
        ValueError: the package that it needs is not installed.
    """
    make = {
        "none": lambda: None,
        "csv": lambda: CSVLogger(folder, name=LOGS, version=""),
        "tensorboard": lambda: TensorBoardLogger(folder, name=LOGS, version=""),
        "wandb": lambda: WandbLogger(project="gradex", name=folder.name, save_dir=folder),
    }
    try:
        return make[kind]()
    except ModuleNotFoundError as error:
        raise ValueError(f"--logger {kind}: its package is not installed; pip install {kind}, or take csv") from error


def build_trainer(
    hardware: Hardware,
    plan: TrainingPlan | None = None,
    callbacks: Sequence[pl.Callback] = (),
    validate: bool = False,
    logger: Logger | None = None,
) -> pl.Trainer:
    """A Trainer that writes nothing of its own: checkpoints and bars are callbacks of ours.

    Args:
        hardware: Resolved hardware flags.
        plan: The training; None for evaluation only.
        callbacks: What else happens on the way.
        validate: Whether training begins, and every epoch ends, with a validation.
        logger: Where losses are logged, if anywhere.
    """
    return pl.Trainer(
        accelerator=hardware.accelerator,
        devices=hardware.devices,
        strategy=strategy_of(hardware),
        precision=hardware.precision,
        num_nodes=hardware.num_nodes,
        max_epochs=plan.epochs if plan else 1,
        accumulate_grad_batches=plan.accumulate if plan else 1,
        callbacks=[*callbacks, EvaluationProgress()],
        limit_val_batches=1.0 if validate or plan is None else 0,
        num_sanity_val_steps=-1 if validate else 0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=logger or False,
        # a step count in checkpoint names and bars is worth more than a log line every 50 steps
        log_every_n_steps=1,
    )


@contextlib.contextmanager
def _interruptible(trainer: pl.Trainer) -> Iterator[None]:
    """A Trainer that is interrupted ends the program; here an interruption is one like any other."""
    try:
        yield
    except SystemExit:
        if trainer.interrupted:
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
    logger: Logger | None = None,
) -> None:
    """Train the model's trainable parameters in place on the data module's training rows; a training that cannot teach an
    adapter much is noted before it starts."""
    rows_per_step = datamodule.batch_size * plan.accumulate * hardware.num_processes
    steps = plan.epochs * -(-len(datamodule.train_indices) // rows_per_step)
    if model.has_adapter and steps * plan.lr < LEAST_CHANGE:
        say_once(
            f"note: {steps} optimizer steps at --lr {plan.lr:g} move each weight by at most about {steps * plan.lr:.2g}, which "
            "hardly trains an adapter; with so few rows pass a smaller --batch_size (8) and a higher --lr (1e-3)"
        )
    pl.seed_everything(seed, verbose=False)
    model.train()
    trainer = build_trainer(hardware, plan, callbacks, validate, logger)
    with _interruptible(trainer):
        trainer.fit(FineTuning(model, datamodule.data, plan), datamodule=datamodule)


@dataclass(frozen=True)
class Evaluation:
    """What a model does on the held-out rows: `losses` (N,), NaN for training rows; `completions` by sample index."""

    losses: np.ndarray
    completions: dict[int, str]


def evaluate(
    model: LanguageModel, datamodule: TaskDataModule, hardware: Hardware, plan: TrainingPlan, splits: Sequence[str]
) -> Evaluation:
    """Losses, and where they can be judged completions, of the rows of the given splits."""
    losses = np.full(len(datamodule.data), np.nan)
    completions: dict[int, str] = {}
    module = FineTuning(model, datamodule.data, plan)
    trainer = build_trainer(hardware)
    runs = {"validation": trainer.validate, "test": trainer.test}
    for split in splits:
        with _interruptible(trainer):
            runs[split](module, datamodule=datamodule, verbose=False)
        losses = np.fmax(losses, module.losses)
        completions |= module.completions
    return Evaluation(losses, completions)


def target_losses(data: TaskData, losses: np.ndarray, split: str = "validation") -> dict[str, float]:
    """Mean of the losses (N,) over each target's rows of a split."""
    held_out = data.indices(split)
    rows_of = {name: held_out[data.target_of_sample[held_out] == target] for target, name in enumerate(data.targets)}
    return {name: float(np.mean(losses[rows])) for name, rows in rows_of.items() if len(rows)}


def target_metrics(data: TaskData, evaluation: Evaluation, splits: Sequence[str]) -> dict[str, float]:
    """Mean loss of each target, `<split>_loss/<target>`, and where completions are judged its accuracy,
    `<split>_accuracy/<target>`."""
    metrics = {}
    for split in splits:
        for target, loss in target_losses(data, evaluation.losses, split).items():
            metrics[f"{split}_loss/{target}"] = loss
        if data.judge is not None:
            correct = np.full(len(data), np.nan)
            for index in data.indices(split).tolist():
                correct[index] = correct_of(data, index, evaluation.completions[index])
            for target, accuracy in target_losses(data, correct, split).items():
                metrics[f"{split}_accuracy/{target}"] = accuracy
    return metrics


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
) -> tuple[dict[str, float], np.ndarray]:
    """The fine-tuned value of a subset: train from `start` on its tasks, then evaluate.

    Args:
        model: Any model of this shape; its trainable parameters are overwritten.
        start: Trainable state to begin with (`LanguageModel.trainable_state`).
        datamodule: All rows; its training rows are set to the subset's.
        subset: Task ids; empty means the base model as it is.
        plan: The training.
        hardware: Where it runs.
        seed: Seed of order and dropout.
        task_shares: Share of the rows to draw from each task (n,); None = every row of the subset once an epoch.
        callbacks: Of this one fit.

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
        fit(model, datamodule, plan, hardware, seed=seed, callbacks=callbacks)
    splits = ("validation", "test")
    evaluation = evaluate(model, datamodule, hardware, plan, splits)
    return {"num_rows": len(rows), **target_metrics(datamodule.data, evaluation, splits)}, evaluation.losses
