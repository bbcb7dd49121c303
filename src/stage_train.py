"""Stages 1 and 5: train on all tasks and keep checkpoints, or fine-tune the base model on chosen subsets; and what every
stage that needs rows or a model loads them with."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.artifacts import (
    MANIFEST,
    META_INITIALIZATIONS,
    RESULTS_FILE,
    TOKENS,
    UNFINISHED,
    WEIGHTS,
    check_files,
    check_manifest,
    file_fingerprint,
    folder_fingerprint,
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
from src.config import ALL_TASKS, DataConfig, ModelConfig, RunConfig, TrainConfig, recorded
from src.console import command_typed, counted, progress, say, say_notices, spent
from src.cot import load_cot, parse_preset, save_predictions
from src.data import TaskData
from src.datamodule import TaskDataModule
from src.distributed import is_first_process
from src.finetune import (
    Checkpoints,
    FitProgress,
    SavePredictions,
    TrainingPlan,
    fine_tune_on_subset,
    fit,
    save_checkpoint,
)
from src.instruction import Columns, load_instruction
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
from src.subsets import read_subsets, read_task_weights
from src.tables import TEST_LOSS, ResultsTable, columns_of, mean_over_targets, own_targets, subset_text, write_table

# --- rows and models -----------------------------------------------------------------------------------------


def load_data(config: RunConfig) -> TaskData:
    """The rows that a configuration names: of chain of thought, in the template of the model's architecture, or of
    instruction data.

    Raises:
        FileNotFoundError: no data are named, and the default file is not there.
    """
    typed = {"heldout_share": config.heldout_share, "max_heldout": config.max_heldout}
    held_out: dict[str, Any] = {name: value for name, value in typed.items() if value is not None}
    if config.dataset_key:
        return load_cot(
            config.dataset_key,
            config.preset_key,
            architecture=model_kind(config.model_key),
            data_dir=config.data_dir,
            saved_dir=config.saved_dir,
            split_key=config.split_key,
            keep_incorrect=config.keep_incorrect,
            task_column=config.task_column,
            **held_out,
        )
    if missing := [file for file in config.sources if not config.data_files and not Path(file).is_file()]:
        raise FileNotFoundError(
            f"no data: name your files with --data_files (chain of thought: --dataset_key); without, {missing[0]} is "
            "expected, which does not exist"
        )
    return load_instruction(
        config.sources,
        config.target_files,
        columns=Columns(config.task_column, config.prompt_column, config.completion_column),
        load_tokenizer=lambda: load_tokenizer(resolve_model_key(config.model_key)),
        **held_out,
    )


def make_datamodule(config: RunConfig, data: TaskData, model: LanguageModel) -> TaskDataModule:
    """Tokenise the data for a model; notices are printed.

    Raises:
        ValueError: a row is longer than the model reads, or the embedding has no row for a token of the data.
    """
    datamodule = TaskDataModule(
        data,
        model.tokenizer,
        model.kind,
        max_length=config.max_length,
        max_target_length=config.max_target_length,
        token_cache=TOKENS,
        batch_size=config.batch_size,
        inference_batch_size=config.inference_batch_size,
        loss_on_prompt=config.loss_on_prompt,
    )
    longest = int(datamodule.row_lengths.max())
    if model.kind == "decoder" and model.context is not None and longest > model.context:
        raise ValueError(
            f"--max_length {config.max_length}: a row has {longest} tokens, and {model.key} reads {model.context}; pass "
            f"--max_length {model.context}, which cuts prompts at their beginning"
        )
    check_vocabulary(model, datamodule)
    say_notices((*data.notices, *datamodule.tokens.notices))
    return datamodule


def check_vocabulary(model: LanguageModel, datamodule: TaskDataModule) -> None:
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


def base_weights(config: RunConfig) -> BaseWeights:
    """How the base model's weights are held."""
    return BaseWeights(config.base_dtype, config.hardware.device if config.use_qlora else None)


def base_fingerprint(config: ModelConfig) -> str | None:
    """`folder_fingerprint` of the base model; None for a hub id."""
    return folder_fingerprint(Path(resolve_model_key(config.model_key)))


def check_base(config: ModelConfig, checkpoint: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse an adapter of another base model. Two folders are compared by what is in them, two models of the hub by their
    names without the organisation, as mirrors keep those; a folder may hold any of the hub's."""
    adapter = checkpoint / ADAPTER_CONFIG
    described = json.loads(adapter.read_text(encoding="utf-8")) if adapter.is_file() else {}
    key = manifest.get("model_key") or described.get("base_model_name_or_path")
    if not (described and key):
        return
    theirs, ours = (Path(resolve_model_key(name)) for name in (key, config.model_key))
    trained_on, given = manifest.get("base_fingerprint") or folder_fingerprint(theirs), folder_fingerprint(ours)
    on_hub = not (trained_on or given or key.startswith((".", "/", "~")))  # a path that is gone may have been any
    if trained_on != given if trained_on and given else on_hub and theirs.name.lower() != ours.name.lower():
        raise ValueError(
            f"{checkpoint} is an adapter of the base model {key}, and --model_key is {config.model_key}; pass "
            f"--model_key {key}"
        )


def model_at(config: RunConfig, checkpoint: Path) -> LanguageModel:
    """The model of a checkpoint: one of ours, or any folder that peft or transformers saved.

    Raises:
        FileNotFoundError: the checkpoint is not finished.
        ValueError: its weights were cut, or it is an adapter of another base model or shape than the configuration's.
    """
    adapter = checkpoint / ADAPTER_CONFIG
    described: dict[str, Any] = json.loads(adapter.read_text(encoding="utf-8")) if adapter.is_file() else {}
    if (checkpoint / MANIFEST).is_file() or META_INITIALIZATIONS in checkpoint.parents:
        manifest = read_manifest(checkpoint, config.training_script)
        check_files(checkpoint, manifest, "Remove the run's folder and train it again.")
        key, trained_on = manifest["model_key"], manifest.get("base_fingerprint")
    else:
        key, trained_on = described.get("base_model_name_or_path"), None
    check_base(config, checkpoint, {"model_key": key, "base_fingerprint": trained_on})
    found = (described["r"], described["lora_alpha"]) if described else None
    if found != ((config.lora_rank, config.lora_alpha) if config.train_lora else None):
        has = f"an adapter of rank {found[0]} and alpha {found[1]}" if found else "no adapter"
        flags = f"--train_lora --lora_rank {found[0]} --lora_alpha {found[1]}" if found else "no --train_lora"
        raise ValueError(f"{checkpoint} has {has}, which the flags do not say; pass {flags}")
    model = load_checkpoint(checkpoint, config.model_key, base_weights(config))
    return model.checkpoint_activations() if config.gradient_checkpointing else model


def starting_model(config: TrainConfig, seed: int) -> LanguageModel:
    """The base model with a fresh adapter, or the checkpoint of `--load_model_dir`."""
    if config.load_model_dir:
        return model_at(config, resolve_checkpoint(config.load_model_dir))
    modules = tuple(config.lora_target_modules) if config.lora_target_modules else None
    shape = LoraShape(config.lora_rank, config.lora_alpha, target_modules=modules) if config.train_lora else None
    model = load_model(config.model_key, shape, seed=seed, weights=base_weights(config))
    return model.checkpoint_activations() if config.gradient_checkpointing else model


# --- training ------------------------------------------------------------------------------------------------


def train(config: TrainConfig, data: TaskData | None = None) -> None:
    """Meta-training on all tasks, or fine-tuning on the subsets that the configuration names.

    Args:
        config: Of the stage.
        data: Its rows, where they are not the configuration's own: with clusters as tasks.
    """
    data = load_data(config) if data is None else data
    chosen = chosen_subsets(config, data)
    held = lambda path: locked(*([path] if is_first_process() else []))  # noqa: E731
    if chosen is not None:
        with held(results_dir(config.results) / RESULTS_FILE):
            fine_tune_subsets(config, data, *chosen)
        return
    for run in range(config.runs):
        with held(config.training_dir(run)):
            meta_train(config, data, run)


def chosen_subsets(config: Any, data: TaskData) -> tuple[list[tuple[int, ...]], np.ndarray | None] | None:
    """The subsets that `ChosenTasks` names, and the tasks' shares (n,) where it names those; None for neither.

    Raises:
        ValueError: several ways at once, an id out of range or twice.
    """
    ways = {name: getattr(config, name) for name in ("subset_file", "task_weights", "task_idxes")}
    if len(given := [name for name, value in ways.items() if value is not None]) > 1:
        raise ValueError(f"--{given[0]} and --{given[1]} both name tasks; leave one of them out")
    if config.subset_file is not None:
        subsets = read_subsets(Path(config.subset_file), len(data.tasks), data.tasks)
        different = list(dict.fromkeys(subsets))
        if repeated := len(subsets) - len(different):
            say_notices([f"{config.subset_file}: {counted(repeated, 'line')} with a subset that stands there before; each is "
                         "taken once"])  # fmt: skip
        return different, None
    if config.task_weights is not None:
        shares = read_task_weights(Path(config.task_weights), data.tasks)
        return [tuple(np.flatnonzero(shares).tolist())], shares
    if config.task_idxes is None:
        return None
    tasks = range(len(data.tasks)) if tuple(config.task_idxes) == (ALL_TASKS,) else config.task_idxes
    return [valid_subset(tasks, len(data.tasks), "task_idxes")], None


def valid_subset(tasks: Sequence[Any], num_tasks: int, flag: str) -> tuple[int, ...]:
    """Task ids typed at the terminal, sorted.

    Raises:
        ValueError: an id out of range, or twice.
    """
    if wrong := [task for task in tasks if task == ALL_TASKS or not 0 <= task < num_tasks]:
        raise ValueError(f"--{flag} {wrong[0]}: this data has tasks 0 to {num_tasks - 1}")
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"--{flag} {' '.join(map(str, tasks))}: a task is named twice")
    return tuple(sorted(tasks))


def training_facts(config: TrainConfig, data: TaskData) -> dict[str, Any]:
    """What a training's outcome depends on, besides the rows and the seed.

    Of batches and processes only the rows of an optimizer step count, and of precisions the one that this machine takes.
    """
    names = ("lora_target_modules", "lr", "weight_decay", "epochs", "loss_over", "max_length", "max_target_length",
             "base_dtype", "use_qlora", "loss_on_prompt", *(("max_new_tokens",) if data.judge else ()))  # fmt: skip
    start = resolve_checkpoint(config.load_model_dir).glob(WEIGHTS) if config.load_model_dir else ()
    return {
        "data_fingerprint": data.fingerprint,
        "model_key": config.model_key,
        "base_fingerprint": base_fingerprint(config),
        "start_fingerprint": file_fingerprint(sorted(start)) if config.load_model_dir else None,
        "lora": [config.lora_rank, config.lora_alpha] if config.train_lora else None,
        "rows_per_step": config.batch_size * config.accumulate * config.hardware.num_processes,
        "precision": config.hardware.precision,
        **{name: getattr(config, name) for name in names},
    }


def training_plan(config: RunConfig) -> TrainingPlan:
    """How long and how fast."""
    return TrainingPlan(
        config.epochs, config.lr, config.weight_decay, config.accumulate, config.max_new_tokens, config.loss_over
    )


def meta_train(config: TrainConfig, data: TaskData, run: int) -> None:
    """Train on every task and keep checkpoints on the way and at the best validation loss."""
    folder = config.training_dir(run)
    facts = {**training_facts(config, data), "checkpoint_at": config.checkpoint_at, "run": run}
    if (folder / MANIFEST).is_file():
        found = read_manifest(folder, config.training_script)
        check_manifest(folder, found, facts, "Choose another --save_name, or remove the folder to train it again.")
        if config.stop_after_checkpoints or not found["stop_after_checkpoints"]:  # a whole one has the checkpoints too
            (folder / UNFINISHED).unlink(missing_ok=True)  # where it was killed after its last line
            say(f"{folder} is there already and fits; nothing to train.")
            return
        say(f"{folder} ended with its last checkpoint; it is trained again, to the end.")
    started, spent_before = time.perf_counter(), 0.0
    model = starting_model(config, run)
    if is_first_process():
        start = resolve_checkpoint(config.load_model_dir) if config.load_model_dir else None
        spent_before = remove_checkpoints(folder, start)
    datamodule = make_datamodule(config, data, model)
    datamodule.select_training_rows(None, run)
    described = {name: facts[name] for name in ("data_fingerprint", "base_fingerprint", "run", "loss_over")}
    checkpoints = Checkpoints(folder, config.checkpoint_at, described, config.stop_after_checkpoints, spent_before)
    callbacks = [checkpoints, FitProgress(f"meta-training, run {run}")]
    if data.judge is not None:
        callbacks.append(SavePredictions(partial(write_predictions, config, data)))
    fit(model, datamodule, training_plan(config), config.hardware, seed=run, callbacks=callbacks, validate=True)
    if not is_first_process():
        return
    write_manifest(
        folder,
        {
            **facts,
            "config": recorded(config) | {"run": run},
            **{name: getattr(checkpoints, name) for name in ("trajectory", "best", "validation_losses")},
            "best_validation_loss": checkpoints.best_loss,
            "tasks": list(data.tasks),
            "stop_after_checkpoints": config.stop_after_checkpoints,
            **spent(started - spent_before),
            "command": command_typed(),
        },
    )
    (folder / UNFINISHED).unlink(missing_ok=True)
    best = f"{checkpoints.best} (best validation loss {checkpoints.best_loss:.3f})"
    kept = ", ".join([*checkpoints.trajectory, *([best] if checkpoints.best else [])])
    stage_2 = (
        "fast_estimate_compute_gradients.py"
        if config.dataset_key
        else "fast_estimate_eval_approximation_alpaca.py --compute_pretrained_outputs"
    )
    print(f"Wrote {folder}: {kept}. Next: python {stage_2}{named(config)}")


def write_predictions(config: RunConfig, data: TaskData, epoch: int, completions: dict[int, str]) -> None:
    """Keep the model's own completions of an epoch's validation rows in the completion format."""
    key = parse_preset(config.preset_key).student_key
    path = prediction_file(
        config.saved_dir, config.model_key, key, str(config.dataset_key), config.train_key, epoch, config.lora
    )
    save_predictions(
        path,
        data,
        completions,
        base_model=config.model_key,
        preset_key=config.preset_key,
        train_key=config.train_key,
        epoch=epoch,
        train_lora=config.train_lora,
        lora_rank=config.lora,
    )


def named(config: RunConfig) -> str:
    """The flag by which the next stage finds this run; nothing where it has no name."""
    return f" --save_name {config.save_name}" if config.save_name else ""


def remove_checkpoints(folder: Path, start: Path | None) -> float:
    """Remove the checkpoints of an earlier training, cut off or whole, from a run's folder. What others put there stays,
    and is named; so does the checkpoint to start from. Gives the seconds that the earlier training took, where known."""
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
        elif path != unfinished:
            others.append(path.name)
    if others:
        say_notices([f"{folder} holds {shorten(', '.join(others))}, not written by this training; left as it is"])
    return float(earlier["seconds"])


def fine_tune_subsets(
    config: TrainConfig,
    data: TaskData,
    subsets: Sequence[tuple[int, ...]],
    task_shares: np.ndarray | None = None,
    *,
    keep_model: bool = True,
) -> None:
    """Fine-tune once for each subset and seed, and append a row of losses for each.

    The base model is loaded once; the adapter starts from the same state for every subset. Rows that are there are not
    trained again, so that a killed run goes on at the next line; of a single subset the model has to be there too.
    """
    folder = results_dir(config.results)
    shares = None if task_shares is None else task_shares.round(6).tolist()
    facts = {**training_facts(config, data), "task_shares": shares}
    table = ResultsTable(folder / RESULTS_FILE, facts, "Choose another --results_name, or remove the file.")
    models: list[Path] = []
    if keep_model and len(subsets) == 1 and subsets[0]:
        file = config.subset_file or config.task_weights
        label = Path(file).stem if file else tasks_label(subsets[0], len(data.tasks))
        models = [model_dir(folder, label, run) for run in range(config.runs)]
    described = [
        {**facts, "kind": "fine-tuned model", "subset": list(subsets[0]), "run": run} for run in range(config.runs)
    ]
    has_model = [holds_model(model, of_model) for model, of_model in zip(models, described, strict=False)]
    pairs = itertools.product(range(config.runs), subsets)
    todo = [(run, subset) for run, subset in pairs if not table.has(subset, run) or (models and not has_model[run])]
    datamodule = None
    with progress(desc="fine-tuning", total=len(subsets) * config.runs, unit="subset") as bar:
        bar.update(bar.total - len(todo))
        for run, of_run in itertools.groupby(todo, key=lambda run_and_subset: run_and_subset[0]):
            model = starting_model(config, run)
            start = model.trainable_state()
            datamodule = datamodule or make_datamodule(config, data, model)
            for _, subset in of_run:
                started = time.perf_counter()
                values, losses = fine_tune_on_subset(
                    model,
                    start,
                    datamodule,
                    subset,
                    training_plan(config),
                    config.hardware,
                    seed=run,
                    task_shares=task_shares,
                    callbacks=[FitProgress(f"subset {bar.n + 1} of {bar.total}", leave=False)],
                )
                seconds = round(time.perf_counter() - started, 3)
                state = state_to_save(model) if models and model.is_sharded else None
                if is_first_process():
                    if models:
                        facts_of_model = {**described[run], **spent(started), "command": command_typed()}
                        save_checkpoint(model, models[run], facts_of_model, state)
                    if len(subsets) == 1:  # of many subsets the means are enough
                        rows = data.indices("validation")
                        targets = [data.targets[target] for target in data.target_of_sample[rows]]
                        frame = pd.DataFrame({"sample_index": rows, "target": targets, "loss": losses[rows]})
                        write_table(losses_file(folder, subset, run), frame)
                    if not table.has(subset, run):
                        table.append(subset, run, {**values, "seconds": seconds})
                bar.update(1)
    if is_first_process():
        say_fine_tuned(table, data, subsets, models)


def holds_model(folder: Path, described: dict[str, Any]) -> bool:
    """Whether the very model that is described is kept there, whole; another one that is there is named."""
    if not (folder / MANIFEST).is_file():
        return False
    found, wanted = read_manifest(folder, "custom_train*.py"), json.loads(json.dumps(described, default=str))
    if other := [name for name, value in wanted.items() if found.get(name) != value]:
        shown = f"{other[0]}: found {shorten(found.get(other[0]))}, expected {shorten(wanted[other[0]])}"
        say_notices([f"{folder} holds a model of another training ({shown}), which is replaced"])
        return False
    return all((folder / name).is_file() for name in found["files"])


def say_fine_tuned(
    table: ResultsTable, data: TaskData, subsets: Sequence[tuple[int, ...]], models: Sequence[Path]
) -> None:
    """Print the last line of fine-tuning: what was written, and of one subset how good it is."""
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


def data_of(config: DataConfig) -> str:
    """The data in a few words, for titles."""
    return config.dataset_key or ", ".join(Path(source).stem for source in config.sources)
