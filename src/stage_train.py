"""Stages 1 and 5: train on all tasks and keep checkpoints, or fine-tune the base model on chosen subsets."""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src import artifacts, console, cot, finetune, models, tables
from src.artifacts import MANIFEST, UNFINISHED, results_dir, write_json
from src.config import RunConfig, TrainConfig, recorded
from src.console import counted
from src.data import TaskData
from src.distributed import is_first_process
from src.run_data import chosen_subsets, load_data, named
from src.run_model import base_fingerprint, make_datamodule, starting_model


def train(config: TrainConfig, data: TaskData | None = None) -> None:
    """Meta-training on all tasks, or fine-tuning on the subsets that the configuration names; `data` where the rows are
    not the configuration's own: with clusters as tasks."""
    data = load_data(config) if data is None else data
    if (chosen := chosen_subsets(config, data)) is not None:
        with artifacts.locked(results_dir(config.results) / artifacts.RESULTS_FILE):
            fine_tune_subsets(config, data, *chosen)
        return
    for run in range(config.runs):
        with artifacts.locked(config.training_dir(run)):
            meta_train(config, data, run)


def training_facts(config: TrainConfig, data: TaskData) -> dict[str, Any]:
    """Settings that determine a training's outcome, besides the rows and the seed: of batches and processes only the rows of an
    optimizer step count, and of precisions the one that this machine takes."""
    names = ("lora_target_modules", "lr", "weight_decay", "epochs", "loss_over", "max_length", "max_target_length",
             "base_dtype", "use_qlora", "loss_on_prompt", *(("max_new_tokens",) if data.judge else ()))  # fmt: skip
    start = artifacts.resolve_checkpoint(config.load_model_dir).glob(artifacts.WEIGHTS) if config.load_model_dir else []
    return {
        "data_fingerprint": data.fingerprint,
        "model_key": config.model_key,
        "base_fingerprint": base_fingerprint(config),
        "start_fingerprint": artifacts.file_fingerprint(sorted(start)) if config.load_model_dir else None,
        "lora": [config.lora_rank, config.lora_alpha] if config.train_lora else None,
        "rows_per_step": config.batch_size * config.accumulate * config.hardware.num_processes,
        "precision": config.hardware.precision,
        **{name: getattr(config, name) for name in names},
    }


def training_plan(config: RunConfig) -> finetune.TrainingPlan:
    """Hyperparameters of the configuration's training."""
    names = ("epochs", "lr", "weight_decay", "accumulate", "max_new_tokens", "loss_over")
    return finetune.TrainingPlan(*(getattr(config, name) for name in names))


def meta_train(config: TrainConfig, data: TaskData, run: int) -> None:
    """Train on every task and keep checkpoints on the way and at the best validation loss."""
    folder = config.training_dir(run)
    note, repair = folder / UNFINISHED, "Choose another --save_name, or remove it to train again."
    facts = {**training_facts(config, data), "checkpoint_at": config.checkpoint_at, "run": run}
    if (folder / MANIFEST).is_file():
        found = artifacts.read_manifest(folder, config.training_script)
        artifacts.check_manifest(folder, found, facts, repair)
        remove_state(note)  # where it was killed after its last line
        if config.stop_after_checkpoints or not found["stop_after_checkpoints"]:  # a whole one has the checkpoints too
            console.say(f"{folder} is there already and fits; nothing to train.")
            return
        console.say(f"{folder} ended with its last checkpoint; it is trained again, to the end.")
        if is_first_process():
            write_json(note, {"checkpoints": [*found["trajectory"], found["best"]], "seconds": found["seconds"]})
    described = {name: facts[name] for name in ("data_fingerprint", "base_fingerprint", "run", "loss_over")}
    kept = finetune.Checkpoints(**resuming(config, note, facts, repair), shares=config.checkpoint_at, describe=described,
                                stop_after=config.stop_after_checkpoints)  # fmt: skip
    model = starting_model(config, run)
    if is_first_process() and not kept.resumes:
        start = artifacts.resolve_checkpoint(config.load_model_dir) if config.load_model_dir else None
        remove_checkpoints(folder, start)
    datamodule = make_datamodule(config, data, model)
    datamodule.select_training_rows(None, run)
    callbacks: list[Any] = [finetune.FitProgress(f"meta-training, run {run}")]
    if data.judge is not None:
        callbacks.append(finetune.SavePredictions(partial(write_predictions, config, data)))
    plan = training_plan(config)
    finetune.fit(model, datamodule, plan, config.hardware, seed=run, callbacks=callbacks, validate=True, resumable=kept)
    if not is_first_process():
        return
    facts |= {
        "config": recorded(config) | {"run": run},
        **{name: getattr(kept, name) for name in ("trajectory", "best", "validation_losses")},
        "best_validation_loss": kept.best_loss,
        "tasks": list(data.tasks),
        "stop_after_checkpoints": config.stop_after_checkpoints,
    }
    artifacts.write_manifest(folder, {**facts, **console.spent(kept.started), "command": console.command_typed()})
    remove_state(note)
    best = [f"{kept.best} (best validation loss {kept.best_loss:.3f})"] if kept.best else []
    on_instructions = "fast_estimate_eval_approximation_alpaca.py --compute_pretrained_outputs"
    stage_2 = "fast_estimate_compute_gradients.py" if config.dataset_key else on_instructions
    print(f"Wrote {folder}: {', '.join([*kept.trajectory, *best])}. Next: python {stage_2}{named(config)}")


def resuming(config: TrainConfig, note: Path, facts: Mapping[str, Any], repair: str) -> dict[str, Any]:
    """What a `Resumable` takes: `facts` are what the outcome depends on, and a state on how rows make up a step too."""
    hardware = config.hardware
    parts = {"batch_size": config.batch_size, "accumulate": config.accumulate, "processes": hardware.num_processes}
    made_from = {**facts, **parts, "fsdp": hardware.strategy == "fsdp"}
    return {"note": note, "made_from": made_from, "repair": repair, "minutes": config.save_every}


def remove_state(note: Path) -> None:
    """Remove a training's state and the note beside it."""
    if is_first_process():
        for path in (artifacts.state_file(note), note):
            path.unlink(missing_ok=True)


def write_predictions(config: RunConfig, data: TaskData, epoch: int, completions: dict[int, str]) -> None:
    """Keep the model's own completions of an epoch's validation rows in the completion format."""
    model, preset, train_key, rank = config.model_key, config.preset_key, config.train_key, config.lora
    key = cot.parse_preset(preset).student_key
    path = artifacts.prediction_file(config.saved_dir, model, key, str(config.dataset_key), train_key, epoch, rank)
    facts = {"train_key": train_key, "epoch": epoch, "train_lora": config.train_lora, "lora_rank": rank}
    cot.save_predictions(path, data, completions, base_model=model, preset_key=preset, **facts)


def remove_checkpoints(folder: Path, start: Path | None) -> None:
    """Remove the checkpoints of an earlier training, cut off or whole, from a run's folder. What others put there stays,
    and is named; so does the checkpoint to start from."""
    unfinished, earlier = folder / UNFINISHED, {"checkpoints": list[str]()}
    if unfinished.is_file():
        earlier = json.loads(unfinished.read_text(encoding="utf-8"))
    (folder / MANIFEST).unlink(missing_ok=True)
    others = []
    for path in sorted(folder.glob("[!.]*")):
        if start is not None and path.resolve() == start.resolve():
            continue
        half_written = artifacts.is_checkpoint_name(path.name) and not (path / MANIFEST).is_file()
        if half_written or path.name in earlier["checkpoints"]:
            shutil.rmtree(path)
        elif path != unfinished:
            others.append(path.name)
    if others:
        there = artifacts.shorten(", ".join(others))
        console.say_notices([f"{folder} holds {there}, not written by this training; left as it is"])


def fine_tune_subsets(
    config: TrainConfig, data: TaskData, subsets: Sequence[tuple[int, ...]], task_shares: np.ndarray | None = None, *,
    keep_model: bool = True,
) -> None:  # fmt: skip
    """Fine-tune once for each subset and seed, from the same state for every subset, and append a row of losses for each.
    Rows that are there are not trained again, so that a killed run goes on in the line where it was; of a single subset
    the model has to be there too, or under another name, as of another selection that took the same tasks: it is copied."""
    folder, runs = results_dir(config.results), range(config.runs)
    plan = replace(training_plan(config), max_steps=config.max_steps)
    shares = None if task_shares is None else task_shares.round(6).tolist()
    facts = {**training_facts(config, data), "task_shares": shares}
    facts |= {"epochs": None, "max_steps": config.max_steps} if config.max_steps else {}
    repair = "Choose another --results_name, or remove the file."
    table = tables.ResultsTable(folder / artifacts.RESULTS_FILE, facts, repair)
    kept: list[Path] = []
    if keep_model and len(subsets) == 1 and subsets[0]:
        file = config.subset_file or config.task_weights
        label = Path(file).stem if file else artifacts.tasks_label(subsets[0], len(data.tasks))
        kept = [artifacts.model_dir(folder, label, run) for run in runs]
    described = [{**facts, "kind": "fine-tuned model", "subset": list(subsets[0]), "run": run} for run in runs]
    held_in = [
        model if holds_model(model, of_model) else model_beside(model, of_model)
        for model, of_model in zip(kept, described, strict=False)
    ]
    pairs = itertools.product(runs, subsets)
    todo = [(run, subset) for run, subset in pairs if not table.has(subset, run) or (kept and not held_in[run])]
    for run, (place, other) in enumerate(zip(kept, held_in, strict=True)):
        if is_first_process() and other and other != place and (run, subsets[0]) not in todo:
            with artifacts.whole_folder(place) as copy:
                shutil.copytree(other, copy, dirs_exist_ok=True)
    datamodule = None
    with console.progress(desc="fine-tuning", total=len(subsets) * config.runs, unit="subset") as bar:
        bar.update(bar.total - len(todo))
        for run, of_run in itertools.groupby(todo, key=lambda run_and_subset: run_and_subset[0]):
            model = starting_model(config, run)
            start = model.trainable_state()
            datamodule = datamodule or make_datamodule(config, data, model)
            for _, subset in of_run:
                note = artifacts.unfinished_file(folder, subset, run)
                state = finetune.Resumable(**resuming(config, note, facts, repair))
                callbacks = [finetune.FitProgress(f"subset {bar.n + 1} of {bar.total}", leave=False)]
                values, losses = finetune.fine_tune_on_subset(
                    model, start, datamodule, subset, plan, config.hardware, seed=run, task_shares=task_shares,
                    callbacks=callbacks, resumable=state,
                )  # fmt: skip
                values["seconds"] = round(console.spent(state.started)["seconds"], 3)
                weights = models.state_to_save(model) if kept and model.is_sharded else None
                if is_first_process():
                    if kept:
                        spent = {**console.spent(state.started), "command": console.command_typed()}
                        finetune.save_checkpoint(model, kept[run], {**described[run], **spent}, weights)
                    if len(subsets) == 1:  # of many subsets the means are enough
                        rows = data.indices("validation")
                        targets = [data.targets[target] for target in data.target_of_sample[rows]]
                        frame = pd.DataFrame({"sample_index": rows, "target": targets, "loss": losses[rows]})
                        tables.write_table(artifacts.losses_file(folder, subset, run), frame)
                    if not table.has(subset, run):
                        table.append(subset, run, values)
                    remove_state(note)
                bar.update(1)
    if is_first_process():
        for left in folder.glob(f"{Path(UNFINISHED).stem}_*"):  # where it was killed while it removed a state
            left.unlink()
        say_fine_tuned(table, data, subsets, kept)


def holds_model(folder: Path, described: dict[str, Any]) -> bool:
    """Whether the folder holds exactly the described model, complete; a different one is reported."""
    if not (folder / MANIFEST).is_file():
        return False
    found = artifacts.read_manifest(folder, "custom_train*.py")
    try:
        artifacts.check_manifest(folder, found, described, "It is replaced.")
    except ValueError as error:
        console.say_notices([str(error)])
        return False
    return all((folder / name).is_file() for name in found["files"])


def model_beside(folder: Path, described: dict[str, Any]) -> Path | None:
    """A folder beside this one that holds exactly the described model, complete; None where there is none."""
    for path, found in artifacts.finished(f"{glob.escape(str(folder.parent))}/[!.]*"):
        with contextlib.suppress(ValueError, FileNotFoundError):
            artifacts.check_manifest(path, found, described, "")
            artifacts.check_files(path, found, "")
            return path
    return None


def say_fine_tuned(
    table: tables.ResultsTable, data: TaskData, subsets: Sequence[tuple[int, ...]], kept: Sequence[Path]
) -> None:
    """Print the last line of fine-tuning: what was written, and of one subset how good it is."""
    about = f"{counted(len(table.frame), 'row')}, losses of {counted(len(data.targets), 'target')} each."
    print(f"Wrote {table.path}: {about}{' Of several subsets no model is kept.' if len(subsets) > 1 else ''}")
    if kept:
        print(f"Wrote {', '.join(map(str, kept))}: the fine-tuned model" + ("s." if len(kept) > 1 else "."))
    tested = tables.columns_of(table.frame, tables.TEST_LOSS)
    if len(subsets) != 1 or not tested:
        return
    targets = tables.own_targets(tested, data.tasks)
    references = {(): "the base model", tuple(range(len(data.tasks))): "all tasks"}
    shown = []
    for subset, name in ({subsets[0]: "these tasks"} | references).items():
        rows = table.frame[table.frame["subset"] == tables.subset_text(subset)]
        if len(rows):
            shown.append(f"{tables.mean_over_targets(rows, tables.TEST_LOSS, targets).mean():.3f} of {name}")
    what = targets[0] if len(targets) == 1 else f"{len(targets)} targets (mean)"
    print(f"Test loss of {what}, in nats per token: {', '.join(shown)}.")
