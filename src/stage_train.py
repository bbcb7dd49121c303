"""Stages 1 and 5: train on all tasks and keep checkpoints, or fine-tune the base model on chosen subsets; and what every
stage that needs a model loads it with."""

from __future__ import annotations

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
from src.config import ModelConfig, RunConfig, TrainConfig, recorded
from src.console import counted
from src.data import TaskData
from src.datamodule import TaskDataModule
from src.distributed import is_first_process
from src.run_data import chosen_subsets, load_data, named

# --- models --------------------------------------------------------------------------------------------------


def make_datamodule(config: RunConfig, data: TaskData, model: models.LanguageModel) -> TaskDataModule:
    """Tokenise the data for a model; notices are printed. ValueError: a row is longer than the model reads, or the
    embedding has no row for a token of the data."""
    names = ("max_length", "max_target_length", "batch_size", "inference_batch_size", "loss_on_prompt")
    options = {name: getattr(config, name) for name in names}
    datamodule = TaskDataModule(data, model.tokenizer, model.kind, token_cache=artifacts.TOKENS, **options)
    longest = int(datamodule.row_lengths.max())
    if model.kind == "decoder" and model.context is not None and longest > model.context:
        found = f"a row has {longest} tokens, and {model.key} reads {model.context}"
        repair = f"pass --max_length {model.context}, which cuts prompts at their beginning"
        raise ValueError(f"--max_length {config.max_length}: {found}; {repair}")
    check_vocabulary(model, datamodule)
    console.say_notices((*data.notices, *datamodule.tokens.notices))
    return datamodule


def check_vocabulary(model: models.LanguageModel, datamodule: TaskDataModule) -> None:
    """Refuse data with tokens that the embedding has no row for; a tokenizer may have more of them than the data."""
    size = model.network.get_input_embeddings().weight.shape[0]
    for ids in (datamodule.tokens.prompts, datamodule.tokens.completions):
        if ids.values.max(initial=0) >= size:
            position = int(np.argmax(ids.values >= size))
            token = model.tokenizer.convert_ids_to_tokens(int(ids.values[position]))
            row = int(np.searchsorted(ids.offsets, position, "right")) - 1
            raise ValueError(
                f"{model.key}: the tokenizer has {len(model.tokenizer)} tokens, the embedding {size} rows, and none for "
                f"{token} in sample {row} ({datamodule.data.where(row)}); enlarge the model with "
                f"resize_token_embeddings({len(model.tokenizer)}) and save it, or take the tokenizer that belongs to it"
            )


def base_weights(config: RunConfig) -> models.BaseWeights:
    """How the base model's weights are stored."""
    return models.BaseWeights(config.base_dtype, config.hardware.device if config.use_qlora else None)


def base_fingerprint(config: ModelConfig) -> str | None:
    """`folder_fingerprint` of the base model; None for a hub id."""
    return artifacts.folder_fingerprint(Path(models.resolve_model_key(config.model_key)))


def check_base(config: ModelConfig, checkpoint: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse an adapter of another base model. Two folders are compared by what is in them, two models of the hub by their
    names without the organisation, as mirrors keep those; a folder may hold any of the hub's."""
    described = artifacts.described(checkpoint, artifacts.ADAPTER_CONFIG)
    key = manifest.get("model_key") or described.get("base_model_name_or_path")
    if not (described and key):
        return
    theirs, ours = (Path(models.resolve_model_key(name)) for name in (key, config.model_key))
    trained_on = manifest.get("base_fingerprint") or artifacts.folder_fingerprint(theirs)
    given = artifacts.folder_fingerprint(ours)
    on_hub = not (trained_on or given or key.startswith((".", "/", "~")))  # a path that is gone may have been any
    if trained_on != given if trained_on and given else on_hub and theirs.name.lower() != ours.name.lower():
        other = f"and --model_key is {config.model_key}; pass --model_key {key}"
        raise ValueError(f"{checkpoint} is an adapter of the base model {key}, {other}")


def model_at(config: RunConfig, checkpoint: Path, untrained_seed: int | None = None) -> models.LanguageModel:
    """The model of a checkpoint, or what it was before training (`models.load_checkpoint`): one of ours, or any folder that
    peft or transformers saved. FileNotFoundError: it is not finished. ValueError: its weights were cut, or its base model or
    shape is not the configuration's."""
    manifest: dict[str, Any] = {}
    if (checkpoint / MANIFEST).is_file() or artifacts.META_INITIALIZATIONS in checkpoint.parents:
        manifest = artifacts.read_manifest(checkpoint, config.training_script)
        artifacts.check_files(checkpoint, manifest, "Remove the run's folder and train it again.")
    check_base(config, checkpoint, manifest)
    described = artifacts.described(checkpoint, artifacts.ADAPTER_CONFIG)
    found = (described["r"], described["lora_alpha"]) if described else None
    if found != ((config.lora_rank, config.lora_alpha) if config.train_lora else None):
        has = f"an adapter of rank {found[0]} and alpha {found[1]}" if found else "no adapter"
        flags = f"--train_lora --lora_rank {found[0]} --lora_alpha {found[1]}" if found else "no --train_lora"
        raise ValueError(f"{checkpoint} has {has}, which the flags do not say; pass {flags}")
    model = models.load_checkpoint(checkpoint, config.model_key, base_weights(config), untrained_seed)
    return model.checkpoint_activations() if config.gradient_checkpointing else model


def starting_model(config: TrainConfig, seed: int) -> models.LanguageModel:
    """The base model with a fresh adapter, or the checkpoint of `--load_model_dir`."""
    if config.load_model_dir:
        return model_at(config, artifacts.resolve_checkpoint(config.load_model_dir))
    modules = tuple(config.lora_target_modules) if config.lora_target_modules else None
    shape = models.LoraShape(config.lora_rank, config.lora_alpha, target_modules=modules) if config.train_lora else None
    model = models.load_model(config.model_key, shape, seed=seed, weights=base_weights(config))
    return model.checkpoint_activations() if config.gradient_checkpointing else model


# --- training ------------------------------------------------------------------------------------------------


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
    the model has to be there too."""
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
    has_model = [holds_model(model, of_model) for model, of_model in zip(kept, described, strict=False)]
    pairs = itertools.product(runs, subsets)
    todo = [(run, subset) for run, subset in pairs if not table.has(subset, run) or (kept and not has_model[run])]
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
