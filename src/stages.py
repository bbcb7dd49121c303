"""Stages 1, 2 and 5, from parsed arguments to artifacts: what the scripts of the two tracks share.

A stage script parses its flags, loads its track's data and calls one function of this module.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pytorch_lightning.utilities import rank_zero_only

from src.cli import (
    ALL_TASKS,
    AUTO,
    Hardware,
    command_typed,
    counted,
    hardware_from,
    instruction_files,
    instruction_flags,
    is_dry_run,
    progress,
    run_from,
    say,
    say_notices,
    spent,
    waiting_for,
)
from src.cot import load_cot, parse_preset, save_predictions
from src.data import TaskData
from src.datamodule import TaskDataModule, read_arrays, tokenizer_fingerprint, write_arrays
from src.finetune import (
    Checkpoints,
    FitProgress,
    SavePredictions,
    TrainingPlan,
    fine_tune_on_subset,
    fit,
    make_logger,
    save_checkpoint,
)
from src.gradients import (
    PROJECTION_SIGNS,
    GradientCollector,
    StoredPart,
    StoreWriter,
    collect_gradients,
    fitting_budget,
    open_store,
    save_projection_signs,
)
from src.instruction import Columns, files_of, load_instruction
from src.models import (
    ADAPTER_CONFIG,
    BaseWeights,
    LanguageModel,
    LoraShape,
    load_checkpoint,
    load_model,
    load_tokenizer,
    model_kind,
    resolve_model_key,
    state_to_save,
)
from src.paths import (
    LOGS,
    MANIFEST,
    MIXTURE_FILE,
    RESULTS_FILE,
    SELECTED_ROWS,
    TOKENS,
    UNFINISHED,
    WEIGHTS,
    Run,
    atomic_write,
    check_file,
    check_manifest,
    clusters_file,
    file_fingerprint,
    is_checkpoint_name,
    locked,
    losses_file,
    model_dir,
    prediction_file,
    read_manifest,
    resolve_checkpoint,
    results_dir,
    shorten,
    tasks_label,
    write_json,
    write_manifest,
)
from src.processes import Processes, launch
from src.projection import Projection, make_projection
from src.report import TEST_LOSS, ResultsTable, columns_of, mean_over_targets, own_targets, subset_text, write_table
from src.subsets import cluster_samples, read_subsets, read_task_weights


def lora_shape(args: argparse.Namespace) -> LoraShape | None:
    """The adapter that the flags name, or None for full fine-tuning."""
    if not args.train_lora:
        return None
    modules = tuple(args.lora_target_modules) if args.lora_target_modules else None
    return LoraShape(args.lora_rank, args.lora_alpha, target_modules=modules)


def base_weights(args: argparse.Namespace) -> BaseWeights:
    """How the flags say that the base model's weights are held."""
    return BaseWeights(
        args.base_dtype, args.attn_implementation, hardware_from(args).device if args.use_qlora else None
    )


def make_datamodule(args: argparse.Namespace, data: TaskData, model: LanguageModel) -> TaskDataModule:
    """Tokenise the data for a model as the flags say; notices are printed."""
    options = ("batch_size", "inference_batch_size", "loss_on_prompt")
    datamodule = TaskDataModule(
        data,
        model.tokenizer,
        model.kind,
        max_length=args.max_length,
        max_target_length=args.max_target_length,
        token_cache=TOKENS,
        **{name: value for name in options if (value := getattr(args, name, None)) is not None},
    )
    longest = int(datamodule.row_lengths.max())
    if model.kind == "decoder" and model.context is not None and longest > model.context:
        raise ValueError(
            f"--max_length {args.max_length}: a row has {longest} tokens, and {model.key} reads {model.context}; pass "
            f"--max_length {model.context}, which cuts prompts at their beginning"
        )
    check_vocabulary(model, datamodule)
    say_notices((*data.notices, *datamodule.tokens.notices))
    return datamodule


def check_vocabulary(model: LanguageModel, datamodule: TaskDataModule) -> None:
    """Refuse data with tokens that the embedding has no row for; a tokenizer may have more of them than the data.

    Raises:
        ValueError: names such a token, its row and both sizes.
    """
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


def load_data(args: argparse.Namespace) -> TaskData:
    """The data that the flags name: chain of thought (in the template of the model's architecture) or instruction.

    Raises:
        ValueError: neither track's data is named.
    """
    typed = {name: getattr(args, name) for name in ("heldout_share", "max_heldout")}
    held_out = {name: value for name, value in typed.items() if value is not None}
    if getattr(args, "dataset_key", None) is None:
        if missing := [file for file in instruction_files(args) if not args.data_files and not Path(file).is_file()]:
            track = ", or chain-of-thought data with --dataset_key" if hasattr(args, "dataset_key") else ""
            raise FileNotFoundError(
                f"no data: name your files with --data_files{track}; without, {missing[0]} is expected, which does not exist"
            )
        return load_instruction(
            instruction_files(args),
            args.target_files,
            columns=Columns(args.task_column, args.prompt_column, args.completion_column),
            load_tokenizer=lambda: load_tokenizer(resolve_model_key(args.model_key)),
            **held_out,
        )
    return load_cot(
        args.dataset_key,
        args.preset_key,
        architecture=model_kind(args.model_key),
        data_dir=args.data_dir,
        saved_dir=args.saved_dir,
        split_key=args.split_key,
        keep_incorrect=args.keep_incorrect,
        task_column=args.task_column,
        **held_out,
    )


# --- stage 1 and 5: training ---------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> None:
    """Meta-training on all tasks, or fine-tuning on the subsets that the flags name."""
    data = load_data(args)
    hardware = hardware_from(args)
    plan = TrainingPlan(
        args.epochs, args.lr, args.weight_decay, args.accumulate, **generation_options(args), loss_over=args.loss_over
    )
    if getattr(args, "load_clusters", False):
        data = clusters_as_tasks(args, data)
    chosen = chosen_subsets(args, data)
    table = results_dir(run_from(args, 0).results_name) / RESULTS_FILE
    folders = [run_from(args, run_index).meta_initialization_dir for run_index in range(args.runs)]
    if chosen is None:
        written = folders + ([predictions_file(args, 0).parent] if data.judge else [])
    else:
        written = [table, *kept_models(args, data, table.parent, chosen[0])]
    if is_dry_run(args, sources_read(args, args.load_model_dir), written):
        return
    if chosen is not None:
        with held_by_first(table):
            fine_tune_subsets(args, data, plan, hardware, *chosen)
        return
    for run_index, folder in enumerate(folders):
        with held_by_first(folder):
            meta_train(args, data, plan, hardware, run_index)


def sources_read(args: argparse.Namespace, *more: str | Path | None) -> list[str | Path]:
    """What a stage reads: the data and the base model that the flags name, and more."""
    sources: list[str | Path]
    if getattr(args, "dataset_key", None) is not None:
        sources = [f"{args.dataset_key}, {args.preset_key} below {args.data_dir} and {args.saved_dir}"]
    else:
        sources = [*instruction_files(args), *args.target_files]
    model = resolve_model_key(args.model_key)
    named = model if Path(model).is_dir() else f"{model} (from the hub: there is no such folder here)"
    return [*sources, named, *(name for name in more if name is not None)]


def held_by_first(*paths: Path) -> contextlib.AbstractContextManager[None]:
    """Hold artifacts against other commands; of this one's processes only the first does, before it starts the others."""
    return locked(*([] if rank_zero_only.rank else paths))


def chosen_subsets(args: argparse.Namespace, data: TaskData) -> tuple[list[tuple[int, ...]], np.ndarray | None] | None:
    """The subsets that the flags of `add_truth` name, and the tasks' shares (n,) where they name those; None for neither."""
    if args.subset_file is not None:
        path = Path(args.subset_file)
        return each_once(read_subsets(path, len(data.tasks), data.tasks), path), None
    if args.task_weights is not None:
        shares = read_task_weights(Path(args.task_weights), data.tasks)
        return [tuple(np.flatnonzero(shares).tolist())], shares
    if args.task_idxes is not None:
        everything = args.task_idxes == [ALL_TASKS]
        return [valid_subset(range(len(data.tasks)) if everything else args.task_idxes, len(data.tasks))], None
    return None


def each_once(subsets: Sequence[tuple[int, ...]], path: Path) -> list[tuple[int, ...]]:
    """The different subsets of a file, in order; a notice counts the lines that say one again."""
    different = list(dict.fromkeys(subsets))
    if repeated := len(subsets) - len(different):
        say_notices([f"{path}: {counted(repeated, 'line')} with a subset that stands there before; each is taken once"])
    return different


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """Flags that only a track with generated answers has."""
    return {"max_new_tokens": args.max_new_tokens} if hasattr(args, "max_new_tokens") else {}


def clusters_as_tasks(args: argparse.Namespace, data: TaskData) -> TaskData:
    """The data with the clusters of its run's store as the training rows' tasks."""
    store = store_dir(args, run_from(args, args.run))
    stored = open_store(store, None, "fast_estimate_compute_gradients.py")
    cluster_of_row, names = cluster_tasks(store, stored, args.num_clusters, args.run)
    training = cluster_of_row >= 0
    rows = stored[-1].samples["sample_index"][training]
    return data.with_tasks({int(row): names[c] for row, c in zip(rows, cluster_of_row[training], strict=True)})


def valid_subset(tasks: Sequence[int], num_tasks: int) -> tuple[int, ...]:
    """Task ids typed at the terminal, sorted.

    Raises:
        ValueError: an id out of range, or twice.
    """
    if wrong := [task for task in tasks if task == ALL_TASKS or not 0 <= task < num_tasks]:
        raise ValueError(f"--task_idxes {wrong[0]}: this data has tasks 0 to {num_tasks - 1}")
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"--task_idxes {' '.join(map(str, tasks))}: a task is named twice")
    return tuple(sorted(tasks))


def starting_model(args: argparse.Namespace, seed: int) -> LanguageModel:
    """The base model with a fresh adapter, or the checkpoint of `--load_model_dir`."""
    if args.load_model_dir:
        return model_at(args, resolve_checkpoint(args.load_model_dir))
    model = load_model(args.model_key, lora_shape(args), seed=seed, weights=base_weights(args))
    return model.checkpoint_activations() if args.gradient_checkpointing else model


def training_script(args: argparse.Namespace) -> str:
    """Stage 1's script of the track that the flags name."""
    return "custom_train_alpaca.py" if getattr(args, "dataset_key", None) is None else "custom_train.py"


def model_at(args: argparse.Namespace, checkpoint: Path) -> LanguageModel:
    """The model of a checkpoint, loaded as the flags say.

    Raises:
        FileNotFoundError: the checkpoint is not finished.
        ValueError: its weights are not those that were saved, or its adapter is of another base model or shape than the
            flags name.
    """
    manifest = read_manifest(checkpoint, training_script(args))
    for name in manifest["files"]:
        check_file(checkpoint, manifest, name, "Remove the run's folder and train it again.")
    check_base(args, checkpoint, manifest)
    model = load_checkpoint(checkpoint, args.model_key, base_weights(args))
    check_adapter(args, model, checkpoint)
    return model.checkpoint_activations() if args.gradient_checkpointing else model


def training_facts(args: argparse.Namespace, data: TaskData) -> dict[str, Any]:
    """What a training's outcome depends on, besides the rows and the seed.

    Of batches and processes only the rows of an optimizer step count, and of precisions the one that this machine takes.
    ddp and fsdp compute the same.
    """
    hardware = hardware_from(args)
    names = (
        "model_key",
        "lora_alpha",
        "lora_target_modules",
        "lr",
        "weight_decay",
        "epochs",
        "loss_over",
        "max_length",
        "max_target_length",
        "load_model_dir",
        "base_dtype",
        "use_qlora",
        *(("max_new_tokens",) if data.judge else ()),
    )
    start = (
        file_fingerprint(sorted(resolve_checkpoint(args.load_model_dir).glob(WEIGHTS))) if args.load_model_dir else None
    )
    return {
        "data_fingerprint": data.fingerprint,
        "base_fingerprint": base_fingerprint(args),
        "start_fingerprint": start,
        "lora_rank": args.lora_rank if args.train_lora else None,
        "rows_per_step": args.batch_size * args.accumulate * hardware.num_processes,
        "precision": hardware.precision,
        "loss_on_prompt": getattr(args, "loss_on_prompt", False),
        **{name: getattr(args, name) for name in names},
    }


def meta_train(
    args: argparse.Namespace, data: TaskData, plan: TrainingPlan, hardware: Hardware, run_index: int
) -> None:
    """Stage 1: train on every task and keep checkpoints on the way and at the best validation loss."""
    folder = run_from(args, run_index).meta_initialization_dir
    facts = {**training_facts(args, data), "checkpoint_at": args.checkpoint_at, "run": run_index}
    if (folder / MANIFEST).is_file():
        found = read_manifest(folder, training_script(args))
        check_manifest(folder, found, facts, "Choose another --save_name, or remove the folder to train it again.")
        if args.stop_after_checkpoints or not found["stop_after_checkpoints"]:  # a whole one has the checkpoints too
            (folder / UNFINISHED).unlink(missing_ok=True)  # where it was killed after its last line
            say(f"{folder} is there already and fits; nothing to train.")
            return
        say(f"{folder} ended with its last checkpoint; it is trained again, to the end.")
    started, spent_before = time.perf_counter(), 0.0
    model = starting_model(args, run_index)
    if not rank_zero_only.rank:
        start = resolve_checkpoint(args.load_model_dir) if args.load_model_dir else None
        spent_before = remove_checkpoints(folder, start)
    datamodule = make_datamodule(args, data, model)
    datamodule.select_training_rows(None, run_index)
    described = {
        name: facts[name] for name in ("data_fingerprint", "base_fingerprint", "run", "use_qlora", "loss_over")
    }
    checkpoints = Checkpoints(folder, args.checkpoint_at, described, args.stop_after_checkpoints, spent_before)
    callbacks = [checkpoints, FitProgress(f"meta-training, run {run_index}")]
    if data.judge is not None:
        callbacks.append(SavePredictions(partial(write_predictions, args, data)))
    logger = make_logger(args.logger, folder)
    fit(model, datamodule, plan, hardware, seed=run_index, callbacks=callbacks, validate=True, logger=logger)
    if rank_zero_only.rank:  # of several processes the first writes, and speaks for all
        return
    write_manifest(
        folder,
        {
            **facts,
            **{name: getattr(checkpoints, name) for name in ("trajectory", "best", "validation_losses")},
            "best_validation_loss": checkpoints.best_loss,
            "tasks": list(data.tasks),
            **{name: getattr(args, name) for name in ("batch_size", "accumulate", "stop_after_checkpoints")},
            **spent(started - spent_before),
            "command": command_typed(),
        },
    )
    (folder / UNFINISHED).unlink(missing_ok=True)
    best = f"{checkpoints.best} (best validation loss {checkpoints.best_loss:.3f})"
    kept = ", ".join([*checkpoints.trajectory, *([best] if checkpoints.best else [])])
    print(f"Wrote {folder}: {kept}. Next: the projected gradients there (stage 2), with the same data and model flags.")


def remove_checkpoints(folder: Path, start: Path | None) -> float:
    """Remove the checkpoints of an earlier training, cut off or whole, from a run's folder. What others put there stays,
    and is named; so does the checkpoint to start from.

    Returns:
        The seconds that the earlier training took, as far as they are known.
    """
    manifest, unfinished = folder / MANIFEST, folder / UNFINISHED
    earlier: dict[str, Any] = {"checkpoints": [], "seconds": 0.0}
    if manifest.is_file():
        found = json.loads(manifest.read_text(encoding="utf-8"))
        earlier = {"checkpoints": [*found["trajectory"], found["best"]], "seconds": found["seconds"]}
        write_json(unfinished, earlier)  # before the manifest goes: a kill in between must not leave them unknown
        manifest.unlink()
    elif unfinished.is_file():
        earlier = json.loads(unfinished.read_text(encoding="utf-8"))
    others = []
    for path in sorted(folder.glob("[!.]*")):
        if start is not None and path.resolve() == start.resolve():
            continue
        if path.name in earlier["checkpoints"] or (is_checkpoint_name(path.name) and not (path / MANIFEST).is_file()):
            shutil.rmtree(path)
        elif path not in (unfinished, folder / LOGS):
            others.append(path.name)
    if others:
        say_notices([f"{folder} holds {shorten(', '.join(others))}, not written by this training; left as it is"])
    return float(earlier["seconds"])


def predictions_file(args: argparse.Namespace, epoch: int) -> Path:
    """Where the model's own completions of an epoch are kept."""
    rank, key = args.lora_rank if args.train_lora else None, parse_preset(args.preset_key).student_key
    return prediction_file(args.saved_dir, args.model_key, key, args.dataset_key, args.train_key, epoch, rank)


def write_predictions(args: argparse.Namespace, data: TaskData, epoch: int, completions: dict[int, str]) -> None:
    """Keep the model's own completions of the validation rows in the completion format."""
    save_predictions(
        predictions_file(args, epoch),
        data,
        completions,
        base_model=args.model_key,
        preset_key=args.preset_key,
        train_key=args.train_key,
        epoch=epoch,
        train_lora=args.train_lora,
        lora_rank=args.lora_rank if args.train_lora else None,
    )


def fine_tune_subsets(
    args: argparse.Namespace,
    data: TaskData,
    plan: TrainingPlan,
    hardware: Hardware,
    subsets: Sequence[tuple[int, ...]],
    task_shares: np.ndarray | None = None,
) -> None:
    """Stage 5 and ground truth: fine-tune once for each subset and seed, and append a row of losses for each.

    The base model is loaded once; the adapter starts from the same state for every subset. Rows that are there
    are not trained again, so that a killed run goes on at the next line; of a single subset the
    model has to be there too.
    """
    folder = results_dir(run_from(args, 0).results_name)
    shares = None if task_shares is None else task_shares.round(6).tolist()
    facts = {**training_facts(args, data), "task_shares": shares}
    table = ResultsTable(folder / RESULTS_FILE, facts, "Choose another --results_name, or remove the file.")
    models = kept_models(args, data, folder, subsets)
    described = [
        {**facts, "kind": "fine-tuned model", "subset": list(subsets[0]), "run": run} for run in range(args.runs)
    ]
    has_model = [
        holds_model(model, of_model, training_script(args)) for model, of_model in zip(models, described, strict=False)
    ]
    pairs = itertools.product(range(args.runs), subsets)
    todo = [(run, subset) for run, subset in pairs if not table.has(subset, run) or (models and not has_model[run])]
    datamodule = None
    with progress(desc="fine-tuning", total=len(subsets) * args.runs, unit="subset") as bar:
        bar.update(bar.total - len(todo))
        for run, of_run in itertools.groupby(todo, key=lambda run_and_subset: run_and_subset[0]):
            model = starting_model(args, run)
            start = model.trainable_state()
            if datamodule is None:
                datamodule = make_datamodule(args, data, model)
            for _, subset in of_run:
                started = time.perf_counter()
                values, losses = fine_tune_on_subset(
                    model, start, datamodule, subset, plan, hardware,
                    seed=run, task_shares=task_shares,
                    callbacks=[FitProgress(f"subset {bar.n + 1} of {bar.total}", leave=False)],
                )  # fmt: skip
                seconds = round(time.perf_counter() - started, 3)
                state = state_to_save(model) if models and model.is_sharded else None
                if not rank_zero_only.rank:
                    if models:
                        facts_of_model = {**described[run], **spent(started), "command": command_typed()}
                        save_checkpoint(model, models[run], facts_of_model, state)
                    if len(subsets) == 1:  # of many subsets the means are enough
                        write_losses(losses_file(folder, subset, run), data, losses)
                    if not table.has(subset, run):
                        table.append(subset, run, {**values, "seconds": seconds})
                bar.update(1)
    if not rank_zero_only.rank:
        say_fine_tuned(table, data, subsets, models)


def write_losses(path: Path, data: TaskData, losses: np.ndarray) -> None:
    """Keep the losses of the validation rows out of those of all rows (N,): differences of two models are judged by them."""
    rows = data.indices("validation")
    targets = [data.targets[target] for target in data.target_of_sample[rows]]
    write_table(path, pd.DataFrame({"sample_index": rows, "target": targets, "loss": losses[rows]}))


def kept_models(
    args: argparse.Namespace, data: TaskData, folder: Path, subsets: Sequence[tuple[int, ...]]
) -> list[Path]:
    """Where the model of each run is kept when one subset is fine-tuned on; of many subsets none is."""
    if len(subsets) != 1 or not subsets[0] or getattr(args, "refine", None):  # candidates of a search are not kept
        return []
    if args.subset_file or args.task_weights:
        label = Path(args.subset_file or args.task_weights).stem
    else:
        label = tasks_label(subsets[0], len(data.tasks))
    return [model_dir(folder, label, run) for run in range(args.runs)]


def holds_model(folder: Path, described: dict[str, Any], made_by: str) -> bool:
    """Whether the very model that is described is kept there, whole; another one that is there is named."""
    if not (folder / MANIFEST).is_file():
        return False
    found, wanted = read_manifest(folder, made_by), json.loads(json.dumps(described, default=str))
    if other := [name for name, value in wanted.items() if found.get(name) != value]:
        shown = f"{other[0]}: found {shorten(found.get(other[0]))}, expected {shorten(wanted[other[0]])}"
        say_notices([f"{folder} holds a model of another training ({shown}), which is replaced"])
        return False
    return all((folder / name).is_file() for name in found["files"])


def say_fine_tuned(
    table: ResultsTable, data: TaskData, subsets: Sequence[tuple[int, ...]], models: Sequence[Path]
) -> None:
    """The last line of fine-tuning: what was written, and of one subset how good it is."""
    print(
        f"Wrote {table.path}: {counted(len(table.frame), 'row')}, losses of {counted(len(data.targets), 'target')} each."
        + (" Of several subsets no model is kept." if len(subsets) > 1 else "")
    )
    if models:
        print(f"Wrote {', '.join(map(str, models))}: the fine-tuned model" + ("s." if len(models) > 1 else "."))
    if len(subsets) != 1 or not (tested := columns_of(table.frame, TEST_LOSS)):
        return
    targets = own_targets(tested, data.tasks)
    known = {"these tasks": subsets[0], "the base model": (), "all tasks": tuple(range(len(data.tasks)))}
    losses = {name: table.frame[table.frame["subset"] == subset_text(subset)] for name, subset in known.items()}
    shown = [
        f"{mean_over_targets(rows, TEST_LOSS, targets).mean():.3f} of {name}"
        for name, rows in losses.items()
        if len(rows) and not (name == "these tasks" and subsets[0] in (known["the base model"], known["all tasks"]))
    ]
    what = targets[0] if len(targets) == 1 else f"{len(targets)} targets (mean)"
    print(f"Test loss of {what}, in nats per token: {', '.join(shown)}.")


def export(args: argparse.Namespace) -> None:
    """Write the training rows of a subset, and how often each source is to be drawn, for other trainers.

    Raises:
        ValueError: no subset is named, or several.
    """
    data = load_data(args)
    if args.load_clusters:
        data = clusters_as_tasks(args, data)
    subsets, shares = chosen_subsets(args, data) or ([], None)
    if len(subsets) != 1 or not subsets[0]:
        raise ValueError(
            f"found {len(subsets)} subsets to export, expected one: name it with --subset_file, --task_weights or --task_idxes"
        )
    indices = data.indices("train", subsets[0])
    examples = [data.examples[index] for index in indices.tolist()]
    fields = ("prompt", "completion", "task", "sample_index")
    rows = pd.DataFrame([{field: getattr(example, field) for field in fields} for example in examples])
    counts = rows["task"].value_counts()
    of_task = counts / counts.sum() if shares is None else pd.Series(shares, index=data.tasks)
    folder = results_dir(run_from(args, args.run).results_name)
    path = folder / f"{SELECTED_ROWS}.{args.format}"
    if is_dry_run(args, sources_read(args, args.subset_file, args.task_weights), [path, folder / MIXTURE_FILE]):
        return
    with atomic_write(path) as temporary:
        if args.format == "parquet":
            rows.to_parquet(temporary, index=False)
        else:
            rows.to_json(temporary, orient="records", lines=True, force_ascii=False)
    sources = [
        {"source": name, "rows": int(counts[name]), "weight": float(of_task[name])}
        for name in data.tasks
        if name in counts.index
    ]
    write_json(folder / MIXTURE_FILE, {"file": path.name, "sources": sources})
    chosen = {data.tasks[task] for task in subsets[0]}
    held_out = sum(data.targets[target] in chosen for target in data.target_of_sample[data.target_of_sample >= 0])
    left = f"; the {held_out:,} held out for validation and test are not among them" if held_out else ""
    print(
        f"Wrote {path} and {folder / MIXTURE_FILE}: {counted(len(rows), 'training row')} of "
        f"{counted(len(sources), 'source')}{left}."
    )


def store_dir(args: argparse.Namespace, run: Run) -> Path:
    """The run's store of projected gradients, by the dimension that the flags name: of the meta-training with this
    `--save_name` where there is one, else of the one without a name."""
    described = (None if args.projection == "none" else args.project_dim, args.output_function)
    named, plain = run.store_dir(*described), replace(run, save_name=None).store_dir(*described)
    if run.save_name is None or run.meta_initialization_dir.is_dir() or named.is_dir():
        return named
    say_notices([f"no meta-training is called {run.save_name}: the gradients of the one without a name are taken, and "
                 "--save_name names the results, as --results_name does"])  # fmt: skip
    return plain


# --- stage 2: gradients --------------------------------------------------------------------------------------


def checkpoint_folders(args: argparse.Namespace, run: Run, data: TaskData) -> list[Path]:
    """The checkpoints to take gradients at: those named, else those that meta-training kept on its way.

    Raises:
        ValueError: this run's meta-training was of other data or of another model.
    """
    if args.load_model_dir:
        return [resolve_checkpoint(name) for name in args.load_model_dir]
    folder = run.meta_initialization_dir
    manifest = read_manifest(folder, f"{training_script(args)} with the same data and model flags")
    expected = {
        "model_key": args.model_key,
        "base_fingerprint": base_fingerprint(args),
        "data_fingerprint": data.fingerprint,
    }
    repair = "Train again under another --save_name, or name checkpoints of other data with --load_model_dir."
    check_manifest(folder, manifest, expected, repair)
    return [folder / name for name in manifest["trajectory"] or [manifest["best"]]]


def placed(model: LanguageModel, processes: Processes) -> LanguageModel:
    """The model on this process's device: whole, or its share of the weights."""
    if processes.mesh is None:
        return model.to(processes.device)
    model.shard(processes.mesh)
    return model


def base_fingerprint(args: argparse.Namespace) -> str | None:
    """`folder_fingerprint` of the model that the flags name; None for a hub id."""
    return folder_fingerprint(Path(resolve_model_key(args.model_key)))


def folder_fingerprint(folder: Path) -> str | None:
    """sha256 over the configuration and the ends of every weights file of a model in a local folder: models that were
    trained differ everywhere, so that gigabytes need not be read. None where there is no such folder."""
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob(WEIGHTS)), *sorted(folder.glob("*.bin"))]:
        if path.is_file():
            with open(path, "rb") as file:
                digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(1 << 20))
                file.seek(-min(1 << 20, path.stat().st_size), os.SEEK_END)
                digest.update(file.read())
    return digest.hexdigest()


def data_source(args: argparse.Namespace) -> dict[str, Any] | None:
    """The data flags, and size and time of every file they name: what is the same as long as nobody touched the files.
    None where files are not named one by one."""
    if getattr(args, "dataset_key", None) is not None:
        return None
    named = [Path(file) for source in (*instruction_files(args), *args.target_files) for file in files_of(str(source))]
    if not all(path.is_file() for path in named):  # folders and hub ids do not show that they have changed
        return None
    # what stands beside a file under its name, such as a dev-split map, belongs to it
    files = {path for name in named for path in name.parent.glob(f"{glob.escape(name.stem)}*")}
    if not files.issuperset(named):
        return None
    stats = {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(files)}
    return {"flags": instruction_flags(args), "files": stats}


def collect(args: argparse.Namespace) -> None:
    """Stage 2: projected gradients of every training and validation row, at each checkpoint."""
    data = load_data(args)
    hardware = hardware_from(args)
    run = run_from(args)
    folders = checkpoint_folders(args, run, data)
    if is_dry_run(args, sources_read(args, *folders), [store_dir(args, run) / folder.name for folder in folders]):
        return
    with held_by_first(*(store_dir(args, run) / folder.name for folder in folders)):
        GradientPasses(args, data, hardware, launch(hardware)).take_at(folders)


class GradientPasses:
    """Stage 2 over checkpoints of one run: what its steps share.

    Args:
        args: The stage's flags.
        data: Its rows.
        hardware: Where it runs.
        processes: This process and the others.
    """

    def __init__(self, args: argparse.Namespace, data: TaskData, hardware: Hardware, processes: Processes) -> None:
        self.args, self.data, self.hardware, self.processes = args, data, hardware, processes
        self.store = store_dir(args, run_from(args))
        self.rows = rows = np.sort(np.concatenate([data.indices("train"), data.indices("validation")]))
        self.samples = {"sample_index": rows, "task": data.task_of_sample[rows], "target": data.target_of_sample[rows]}
        self.datamodule: TaskDataModule | None = None
        self.max_tokens = args.max_tokens_per_batch

    def take_at(self, folders: Sequence[Path]) -> None:
        """The gradients at each checkpoint, where they are not there yet."""
        args, processes = self.args, self.processes
        for folder in folders:
            started = time.perf_counter()
            model = placed(model_at(args, folder), processes)
            datamodule = self.datamodule = self.datamodule or make_datamodule(args, self.data, model)
            self.samples["target_tokens"] = datamodule.target_tokens[self.rows]
            dim = None if args.projection == "none" else args.project_dim
            projection = make_projection(args.projection, dim, args.run, shapes=model.layout.shapes)
            writer = self.open_writer(model, self.request(model, datamodule, projection, folder))
            if not writer.complete:
                self.prepare(model, datamodule, projection)
                collect_gradients(
                    model,
                    datamodule,
                    projection,
                    writer,
                    output_function=args.output_function,
                    autocast=self.hardware.autocast,
                    desc=f"gradients at {folder.name}",
                    processes=processes,
                )
            if processes.is_first:
                self.finish(writer, projection, model, folder, started)
            processes.wait()
        print(
            f"Wrote {self.store}: {len(self.rows):,} projected gradients (d = {projection.dim}, "
            f"p = {model.layout.num_parameters:,}) at each checkpoint. Next: estimates (stage 3), with the same data and "
            "model flags."
        )

    def prepare(self, model: LanguageModel, datamodule: TaskDataModule, projection: Projection) -> None:
        """Settle the size of batches, which all processes share; `auto` is the default on a CPU and of spread weights."""
        if self.max_tokens == AUTO:
            budget = datamodule.max_tokens_per_batch
            if self.processes.is_first and model.device.type == "cuda" and not model.is_sharded:
                collector = GradientCollector(
                    model, projection, self.args.output_function, self.hardware.autocast, self.args.representations
                )
                budget = fitting_budget(collector, datamodule, self.rows)
                say(f"Batches of up to {budget:,} tokens fit into the GPU's memory.")
            self.max_tokens = self.processes.from_first(budget)
        datamodule.max_tokens_per_batch = self.max_tokens
        if projection.dim > model.layout.num_parameters:
            say_notices(
                [f"--project_dim {projection.dim} is above p = {model.layout.num_parameters:,}, the numbers of a gradient: "
                 "projecting buys nothing; --projection none keeps them as they are"]
            )  # fmt: skip

    def request(
        self, model: LanguageModel, datamodule: TaskDataModule, projection: Projection, folder: Path
    ) -> dict[str, Any]:
        """Everything that the rows taken at a checkpoint depend on."""
        args = self.args
        flags = (
            "model_key", "max_length", "max_target_length", "output_function", "projection", "base_dtype", "use_qlora",
            "representations", "row_dtype",
        )  # fmt: skip
        return {
            **{name: getattr(args, name) for name in flags},
            "base_fingerprint": base_fingerprint(args),
            "tokenizer_fingerprint": tokenizer_fingerprint(model.tokenizer),
            "lora_rank": args.lora_rank if args.train_lora else None,
            "lora_alpha": args.lora_alpha if args.train_lora else None,
            "checkpoint": folder.name,
            "checkpoint_fingerprint": file_fingerprint(sorted(folder.glob(WEIGHTS))),
            "data_fingerprint": self.data.fingerprint,
            "loss_on_prompt": datamodule.loss_on_prompt,
            "dim": projection.dim,
            "seed": args.run,
            "precision": self.hardware.precision,
            "parameters": model.layout.describe(),
            "num_rows": len(self.rows),
        }

    def open_writer(self, model: LanguageModel, request: dict[str, Any]) -> StoreWriter:
        """The writer of a part in every process: the first makes what is missing, the others join it."""
        args, data, samples = self.args, self.data, self.samples
        part = self.store / request["checkpoint"]

        def writer(joins: bool) -> StoreWriter:
            return StoreWriter(
                part,
                request,
                samples,
                request["dim"],
                f"Remove {part} to take the gradients again, or give meta-training a --save_name of its own, and this stage too.",
                model.network.get_output_embeddings().weight.shape[1] if args.representations else None,
                {"tasks": (samples["task"], len(data.tasks)), "targets": (samples["target"], len(data.targets))},
                args.row_dtype,
                on_nonfinite=args.on_nonfinite,
                describe=lambda index: f"sample {index} ({data.where(index)})",
                joins=joins,
            )

        opened = writer(joins=False) if self.processes.is_first else None
        self.processes.wait()
        opened = opened or writer(joins=True)
        self.processes.wait()
        return opened

    def finish(
        self, writer: StoreWriter, projection: Projection, model: LanguageModel, checkpoint: Path, started: float
    ) -> None:
        """Make a part whole where it is not, add the projection's signs where they are wanted, and say what it lacks."""
        data = self.data
        if writer.complete:
            print(f"{writer.folder} is there already and fits; nothing to compute.")
        else:
            trained = read_manifest(checkpoint, training_script(self.args))
            known = {"step": trained.get("step", -1), "loss_over": trained.get("loss_over", "token")}
            facts = {**known, "checkpoint_dir": str(checkpoint), **spent(started), "command": command_typed()}
            names = {"tasks": list(data.tasks), "targets": list(data.targets)}
            writer.finish({**names, **facts, "data_source": data_source(self.args)})
        signs = writer.folder / PROJECTION_SIGNS
        if self.args.save_projection_matrix and not signs.is_file():
            save_projection_signs(signs, projection, model.layout.shapes)
        say_notices(StoredPart(writer.folder, read_manifest(writer.folder, writer.repair)).notices())


def check_base(args: argparse.Namespace, checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Refuse an adapter of another base model than the flags'.

    Two folders are compared by what is in them, two models of the hub by their names without the organisation, as mirrors
    keep those. A folder may hold any of the hub's.

    Raises:
        ValueError: names both models.
    """
    adapter = checkpoint / ADAPTER_CONFIG
    if not adapter.is_file():
        return
    key = manifest.get("model_key") or json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    if not key:
        return
    theirs, ours = (Path(resolve_model_key(name)) for name in (key, args.model_key))
    trained_on, given = manifest.get("base_fingerprint") or folder_fingerprint(theirs), folder_fingerprint(ours)
    if trained_on and given:
        differ = trained_on != given
    else:  # a path that is gone may have been any model
        on_hub = not (trained_on or given or key.startswith((".", "/", "~")))
        differ = on_hub and theirs.name.lower() != ours.name.lower()
    if differ:
        found, expected = ({"model_key": name, "base_fingerprint": fingerprint} for name, fingerprint in (
            (key, trained_on), (args.model_key, given)
        ))  # fmt: skip
        check_manifest(checkpoint, found, expected, f"It is an adapter of that model: pass --model_key {key}.")


def check_adapter(args: argparse.Namespace, model: LanguageModel, folder: Path) -> None:
    """Refuse a checkpoint whose adapter is not the one that the flags name.

    Raises:
        ValueError: adapter or none, or another rank or alpha.
    """
    rank = model.network.peft_config["default"].r if model.has_adapter else None
    expected = args.lora_rank if args.train_lora else None
    if rank != expected:
        shown = {None: "no adapter"}
        raise ValueError(
            f"{folder} has {shown.get(rank, f'an adapter of rank {rank}')}, the flags say "
            f"{shown.get(expected, f'rank {expected}')}; pass "
            + (f"--train_lora --lora_rank {rank}" if rank else "no --train_lora")
        )
    if rank and (alpha := model.network.peft_config["default"].lora_alpha) != args.lora_alpha:
        raise ValueError(
            f"{folder} has an adapter of alpha {alpha}, the flags say {args.lora_alpha}; pass --lora_alpha {alpha}"
        )
    trained = {"use_qlora": False} | read_manifest(folder, training_script(args))
    check_manifest(
        folder, trained, {"use_qlora": args.use_qlora}, "Pass --use_qlora where it was trained with it only."
    )


# --- clusters as tasks ---------------------------------------------------------------------------------------


def cluster_tasks(
    store: Path, stored: Sequence[StoredPart], num_clusters: int, seed: int
) -> tuple[np.ndarray, list[str]]:
    """Clusters of the training rows as tasks; made on first use from the last part and kept beside the store.

    Returns:
        Cluster of each stored row (R,), -1 for validation rows; names of the clusters.
    """
    path = clusters_file(store, num_clusters)
    kept, data_fingerprint = read_arrays(path), stored[-1].manifest["data_fingerprint"]
    if kept is None:
        training = stored[-1].samples["task"] >= 0
        clusters = np.full(len(training), -1, dtype=np.int32)
        with waiting_for(f"clustering {training.sum():,} rows"):
            clusters[training] = cluster_samples(np.asarray(stored[-1].rows[training], np.float32), num_clusters, seed)
        kept = {"clusters": clusters, "data_fingerprint": np.array(data_fingerprint)}
        write_arrays(path, kept)
        sizes = np.bincount(clusters[training])
        print(
            f"Wrote {path}: {training.sum():,} training rows in {num_clusters} clusters of {sizes.min():,} to "
            f"{sizes.max():,} rows, median {np.median(sizes):,.0f}."
        )
    if kept.get("data_fingerprint") != data_fingerprint:
        raise ValueError(f"{path} has clusters of other data than {store} has now; remove it, and it is made anew")
    return kept["clusters"], [f"cluster_{number:04d}" for number in range(num_clusters)]
