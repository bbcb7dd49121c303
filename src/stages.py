"""The stages, from parsed arguments to artifacts: what the scripts of the two tracks share.

A stage script parses its flags, loads its track's data and calls one function of this module.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from src.cli import Hardware, hardware_from, instruction_files, progress, run_from, say_notices
from src.cot import load_cot, parse_preset, save_predictions
from src.data import TaskData
from src.datamodule import TaskDataModule
from src.estimation import Part, estimate, first_order_error, ridge_solutions, zero_order_error
from src.finetune import (
    Checkpoints,
    FitProgress,
    SavePredictions,
    TrainingPlan,
    evaluate,
    fine_tune_on_subset,
    fit,
    target_metrics,
)
from src.gradients import (
    PROJECTION_SIGNS,
    StoredPart,
    StoreWriter,
    collect_gradients,
    open_store,
    outputs_of,
    save_projection_signs,
)
from src.instruction import load_instruction
from src.models import LanguageModel, LoraShape, displaced, load_checkpoint, load_model, model_kind
from src.paths import (
    APPROXIMATION_FIGURE,
    APPROXIMATION_FILE,
    ESTIMATES_FILE,
    MANIFEST,
    RESULTS,
    RESULTS_FILE,
    SCORES_FIGURE,
    SCORES_FILE,
    SELECTION_FIGURE,
    SELECTION_FILE,
    TOKENS,
    Run,
    atomic_write,
    check_manifest,
    clusters_file,
    file_fingerprint,
    prediction_file,
    read_manifest,
    resolve_checkpoint,
    results_dir,
    subset_file,
    write_manifest,
)
from src.projection import make_projection
from src.report import (
    ESTIMATE,
    ResultsTable,
    approximation_figure,
    columns_of,
    mean_over_targets,
    parse_subset,
    read_table,
    scores_figure,
    selection_figure,
    subset_text,
    write_table,
)
from src.selection import SelectionPath, forward_selection, random_ensemble_scores, select_by_score
from src.subsets import cluster_samples, load_or_draw_subsets, membership_matrix, read_subsets, write_subsets


def lora_shape(args: argparse.Namespace) -> LoraShape | None:
    """The adapter that the flags name, or None for full fine-tuning."""
    if not args.train_lora:
        return None
    modules = tuple(args.lora_target_modules) if args.lora_target_modules else None
    return LoraShape(args.lora_rank, args.lora_alpha, target_modules=modules)


def make_datamodule(args: argparse.Namespace, data: TaskData, model: LanguageModel) -> TaskDataModule:
    """Tokenise the data for a model as the flags say; notices are printed."""
    options = ("batch_size", "inference_batch_size", "max_tokens_per_batch", "loss_on_prompt")
    datamodule = TaskDataModule(
        data,
        model.tokenizer,
        model.kind,
        max_length=args.max_length,
        max_target_length=args.max_target_length,
        token_cache=TOKENS,
        **{name: getattr(args, name) for name in options if hasattr(args, name)},
    )
    say_notices((*data.notices, *datamodule.tokens.notices))
    return datamodule


def load_data(args: argparse.Namespace) -> TaskData:
    """The data that the flags name: chain of thought (in the template of the model's architecture) or instruction.

    Raises:
        ValueError: neither track's data is named.
    """
    held_out = {"heldout_share": args.heldout_share}
    if args.max_heldout is not None:
        held_out["max_heldout"] = args.max_heldout
    if getattr(args, "dataset_key", None) is None:
        return load_instruction(instruction_files(args), args.target_files, **held_out)
    return load_cot(
        args.dataset_key,
        args.preset_key,
        architecture=model_kind(args.model_key),
        data_dir=args.data_dir,
        saved_dir=args.saved_dir,
        split_key=args.split_key,
        keep_incorrect=args.keep_incorrect,
        letters=args.letters,
        task_column=args.task_column,
        **held_out,
    )


# --- stage 1 and 5: training ---------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> None:
    """Meta-training on all tasks, or fine-tuning on the subsets that the flags name."""
    data = load_data(args)
    hardware = hardware_from(args)
    plan = TrainingPlan(args.epochs, args.lr, args.weight_decay, args.accumulate, **generation_options(args))
    if getattr(args, "load_clusters", False):
        data = clusters_as_tasks(args, data)
    if args.subset_file is not None:
        subsets = read_subsets(Path(args.subset_file), len(data.tasks))
    elif args.task_idxes is not None:
        subsets = [valid_subset(args.task_idxes, len(data.tasks))]
    else:
        for run_index in range(args.runs):
            meta_train(args, data, plan, hardware, run_index)
        return
    fine_tune_subsets(args, data, plan, hardware, subsets)


def generation_options(args: argparse.Namespace) -> dict[str, int]:
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
    if wrong := [task for task in tasks if not 0 <= task < num_tasks]:
        raise ValueError(f"--task_idxes {wrong[0]}: this data has tasks 0 to {num_tasks - 1}")
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"--task_idxes {' '.join(map(str, tasks))}: a task is named twice")
    return tuple(sorted(tasks))


def starting_model(args: argparse.Namespace, seed: int) -> LanguageModel:
    """The base model with a fresh adapter, or the checkpoint of `--load_model_dir`."""
    if args.load_model_dir:
        return model_at(args, resolve_checkpoint(args.load_model_dir))
    model = load_model(args.model_key, lora_shape(args), seed=seed, attn_implementation=args.attn_implementation)
    return model.checkpoint_activations() if args.gradient_checkpointing else model


def model_at(args: argparse.Namespace, checkpoint: Path) -> LanguageModel:
    """The model of a checkpoint, loaded as the flags say."""
    model = load_checkpoint(checkpoint, args.model_key, attn_implementation=args.attn_implementation)
    return model.checkpoint_activations() if args.gradient_checkpointing else model


def training_facts(args: argparse.Namespace, data: TaskData) -> dict[str, Any]:
    """What a training's outcome depends on, besides the rows and the seed."""
    names = [
        "model_key",
        "lora_alpha",
        "lora_target_modules",
        "lr",
        "weight_decay",
        "epochs",
        "batch_size",
        "accumulate",
        "max_length",
        "max_target_length",
        "load_model_dir",
        "precision",
    ]
    return {
        "data_fingerprint": data.fingerprint,
        "lora_rank": args.lora_rank if args.train_lora else None,
        "loss_on_prompt": getattr(args, "loss_on_prompt", False),
        **{name: getattr(args, name) for name in names},
    }


def meta_train(
    args: argparse.Namespace, data: TaskData, plan: TrainingPlan, hardware: Hardware, run_index: int
) -> None:
    """Stage 1: train on every task and keep checkpoints on the way and at the best validation loss."""
    folder = run_from(args, run_index).meta_initialization_dir
    facts = {**training_facts(args, data), "checkpoint_at": args.checkpoint_at, "run": run_index}
    repair = "Choose another --save_name, or remove the folder to train it again."
    if (folder / MANIFEST).is_file():
        check_manifest(folder, read_manifest(folder, "custom_train.py"), facts, repair)
        print(f"{folder} is there already and fits; nothing to train.")
        return
    started = time.perf_counter()
    model = starting_model(args, run_index)
    datamodule = make_datamodule(args, data, model)
    datamodule.select_training_rows(None, run_index)
    checkpoints = Checkpoints(folder, args.checkpoint_at, {"data_fingerprint": data.fingerprint, "run": run_index})
    callbacks = [checkpoints, FitProgress(f"meta-training, run {run_index}")]
    if data.judge is not None:
        callbacks.append(SavePredictions(lambda epoch, completions: write_predictions(args, data, epoch, completions)))
    fit(model, datamodule, plan, hardware, seed=run_index, callbacks=callbacks, validate=True)
    write_manifest(
        folder,
        {
            **facts,
            "trajectory": checkpoints.trajectory,
            "best": checkpoints.best,
            "best_validation_loss": checkpoints.best_loss,
            "tasks": list(data.tasks),
            "seconds": time.perf_counter() - started,
        },
    )
    kept = ", ".join(
        [*checkpoints.trajectory, f"{checkpoints.best} (best validation loss {checkpoints.best_loss:.3f})"]
    )
    print(f"Wrote {folder}: {kept}. Next: the projected gradients there (stage 2), with the same data and model flags.")


def write_predictions(args: argparse.Namespace, data: TaskData, epoch: int, completions: dict[int, str]) -> None:
    """Keep the model's own completions of the validation rows in the completion format."""
    rank = args.lora_rank if args.train_lora else None
    key = parse_preset(args.preset_key).student_key
    save_predictions(
        prediction_file(args.saved_dir, args.model_key, key, args.dataset_key, args.train_key, epoch, rank),
        data,
        completions,
        base_model=args.model_key,
        preset_key=args.preset_key,
        train_key=args.train_key,
        epoch=epoch,
        train_lora=args.train_lora,
        lora_rank=rank,
    )


def fine_tune_subsets(
    args: argparse.Namespace,
    data: TaskData,
    plan: TrainingPlan,
    hardware: Hardware,
    subsets: Sequence[tuple[int, ...]],
) -> None:
    """Stage 5 and ground truth: fine-tune once for each subset and seed, and append a row of losses for each.

    The base model is loaded once; the adapter starts from the same state for every subset. Rows that are there
    are not trained again, so that a killed run goes on at the next line.
    """
    path = results_dir(run_from(args, 0).results_name) / RESULTS_FILE
    table = ResultsTable(path, training_facts(args, data), "Choose another --save_name, or remove the file.")
    todo = [(run, subset) for run in range(args.runs) for subset in subsets if not table.has(subset, run)]
    model = datamodule = start = None
    loaded_run = None
    with progress(desc="fine-tuning", total=len(subsets) * args.runs, unit="subset") as bar:
        bar.update(bar.total - len(todo))
        for run, subset in todo:
            if run != loaded_run:
                model, loaded_run = starting_model(args, run), run
                start = model.trainable_state()
                datamodule = datamodule or make_datamodule(args, data, model)
            started = time.perf_counter()
            values = fine_tune_on_subset(model, start, datamodule, subset, plan, hardware, seed=run)
            table.append(subset, run, {**values, "seconds": round(time.perf_counter() - started, 3)})
            bar.update(1)
    print(f"Wrote {path}: {len(table.frame)} fine-tuned values, losses of {len(data.targets)} targets each.")


def store_dir(args: argparse.Namespace, run: Run) -> Path:
    """The run's store of projected gradients, by the dimension that the flags name."""
    return run.store_dir(None if args.projection == "none" else args.project_dim, args.output_function)


# --- stage 2: gradients --------------------------------------------------------------------------------------


def checkpoint_folders(args: argparse.Namespace, run: Run) -> list[Path]:
    """The checkpoints to take gradients at: those named, else those that meta-training kept on its way."""
    if args.load_model_dir:
        return [resolve_checkpoint(name) for name in args.load_model_dir]
    folder = run.meta_initialization_dir
    manifest = read_manifest(folder, "custom_train.py or custom_train_alpaca.py with the same data and model flags")
    return [folder / name for name in manifest["trajectory"] or [manifest["best"]]]


def collect(args: argparse.Namespace) -> None:
    """Stage 2: projected gradients of every training and validation row, at each checkpoint."""
    data = load_data(args)
    hardware = hardware_from(args)
    run = run_from(args)
    store = store_dir(args, run)
    rows = np.sort(np.concatenate([data.indices("train"), data.indices("validation")]))
    samples = {"sample_index": rows, "task": data.task_of_sample[rows], "target": data.target_of_sample[rows]}
    datamodule = None
    for folder in checkpoint_folders(args, run):
        started = time.perf_counter()
        model = model_at(args, folder).to(hardware.device)
        check_adapter(args, model, folder)
        datamodule = datamodule or make_datamodule(args, data, model)
        dim = None if args.projection == "none" else args.project_dim
        projection = make_projection(args.projection, dim, args.run, shapes=model.layout.shapes)
        request = {
            "model_key": args.model_key,
            "checkpoint": folder.name,
            "checkpoint_fingerprint": file_fingerprint(sorted(folder.glob("*.safetensors"))),
            "data_fingerprint": data.fingerprint,
            "max_length": args.max_length,
            "max_target_length": args.max_target_length,
            "loss_on_prompt": datamodule.loss_on_prompt,
            "output_function": args.output_function,
            "projection": args.projection,
            "dim": projection.dim,
            "seed": args.run,
            "precision": hardware.precision,
            "parameters": model.layout.describe(),
            "num_rows": len(rows),
            "representations": args.representations,
        }
        repair = f"Remove {store / folder.name} to take the gradients again, or choose another --run or --save_name."
        hidden_size = model.network.get_output_embeddings().weight.shape[1] if args.representations else None
        writer = StoreWriter(store / folder.name, request, samples, projection.dim, repair, hidden_size)
        if writer.complete:
            print(f"{writer.folder} is there already and fits; nothing to compute.")
            continue
        collect_gradients(
            model,
            datamodule,
            projection,
            writer,
            output_function=args.output_function,
            autocast=hardware.autocast,
            desc=f"gradients at {folder.name}",
        )
        step = read_manifest(folder, "custom_train.py").get("step", -1)
        names = {"tasks": list(data.tasks), "targets": list(data.targets)}
        writer.finish({**names, "step": step, "seconds": time.perf_counter() - started})
        if args.save_projection_matrix:
            save_projection_signs(writer.folder / PROJECTION_SIGNS, projection, model.layout.shapes)
    print(
        f"Wrote {store}: {len(rows):,} projected gradients (d = {projection.dim}, p = {model.layout.num_parameters:,}) "
        "at each checkpoint. Next: estimates (stage 3), with the same data and model flags."
    )


def check_adapter(args: argparse.Namespace, model: LanguageModel, folder: Path) -> None:
    """Refuse a checkpoint whose adapter is not the one that the flags name.

    Raises:
        ValueError: adapter or none, or another rank.
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


# --- stages 3 and 4: estimates and selection -----------------------------------------------------------------


def cluster_tasks(
    store: Path, stored: Sequence[StoredPart], num_clusters: int, seed: int
) -> tuple[np.ndarray, list[str]]:
    """Clusters of the training rows as tasks; made on first use from the last part and kept beside the store.

    Returns:
        Cluster of each stored row (R,), -1 for validation rows; names of the clusters.
    """
    path = clusters_file(store, num_clusters)
    training = stored[-1].samples["task"] >= 0
    if not path.is_file():
        clusters = np.full(len(training), -1, dtype=np.int32)
        clusters[training] = cluster_samples(np.asarray(stored[-1].rows[training]), num_clusters, seed)
        with atomic_write(path) as temporary:
            np.save(temporary, clusters)
        print(f"Wrote {path}: {training.sum():,} training rows in {num_clusters} clusters.")
    clusters = np.load(path)
    if clusters.shape != training.shape or not np.array_equal(clusters >= 0, training):
        raise ValueError(f"{path} does not fit the rows of {store}; remove it, and it is made anew")
    return clusters, [f"cluster_{number:04d}" for number in range(num_clusters)]


def own_targets(targets: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """The targets that are no training task (the tasks of `--target_files`), or all where there is none."""
    return [name for name in targets if name not in tasks] or list(targets)


class Estimator:
    """Estimates from a run's store: what stages 3 and 4 compute with.

    Args:
        args: Flags of `add_model`, a data group, `add_meta_init`, `add_projection`, `add_estimator`.
        stage_2: The script that makes the store, for messages.
    """

    def __init__(self, args: argparse.Namespace, stage_2: str) -> None:
        self.run = run_from(args)
        self.stored: list[StoredPart] = open_store(store_dir(args, self.run), args.load_model_dir, stage_2)
        self.targets = self.stored[0].targets
        self.tasks: list[str] = self.stored[0].manifest["tasks"]
        self.division: str | None = None  # names another division into tasks than the data's own
        task_of_row = None
        if getattr(args, "load_clusters", False):
            store = store_dir(args, self.run)
            task_of_row, self.tasks = cluster_tasks(store, self.stored, args.num_clusters, args.run)
            self.division = f"clusters_{len(self.tasks)}"
        manifest = self.stored[0].manifest
        if args.estimator == "logistic" and manifest["output_function"] != "margin":
            raise ValueError("--estimator logistic is of margins; take the gradients with --output_function margin too")
        # fewer rows than dimensions: their kernel is the smaller matrix
        by_rows = args.estimator in ("logistic", "kernel") or manifest["num_rows"] <= manifest["dim"]
        self.parts: list[Part] = [
            part.estimation_part(
                task_of_row,
                len(self.tasks),
                self.division or "tasks",
                by_rows=by_rows,
                represented=args.estimator == "representation",
            )
            for part in self.stored
        ]
        self.options = {"estimator": args.estimator, "rho": args.rho, "weight_by": args.weight_by}

    def __call__(self, membership: np.ndarray, targets: Sequence[int] | None = None) -> np.ndarray:
        """Estimates (m, k) of the subsets in `membership` (m, n), or of the given targets only."""
        return estimate(self.parts, membership, targets=targets, **self.options)

    @property
    def facts(self) -> dict[str, Any]:
        """What the estimates depend on, for the tables made of them."""
        shown = ("model_key", "data_fingerprint", "projection", "dim", "seed", "output_function")
        manifest = self.stored[0].manifest
        return {
            **{name: manifest[name] for name in shown},
            "tasks": self.tasks,
            "checkpoints": [part.manifest["checkpoint_fingerprint"] for part in self.stored],
            **self.options,
        }

    def chosen_targets(self, names: Sequence[str] | None) -> list[int]:
        """Ids of the targets that `--target_task` names.

        Default: those that are no training task (the tasks of `--target_files`), else all.

        Raises:
            ValueError: no such target.
        """
        if names is None:
            names = own_targets(self.targets, self.tasks)
        if unknown := [name for name in names if name not in self.targets]:
            raise ValueError(f"--target_task {unknown[0]}: the targets are {', '.join(self.targets)}")
        return [self.targets.index(name) for name in names]


def estimate_subsets(args: argparse.Namespace, stage_2: str) -> None:
    """Stage 3: the estimated loss of every target for every subset, one row each."""
    started = time.perf_counter()
    estimator = Estimator(args, stage_2)
    path = Path(args.sampled_tasks) if args.sampled_tasks else subset_file(estimator.run.name(estimator.division))
    subsets = load_or_draw_subsets(
        path, args.number_of_subsets, len(estimator.tasks), args.subset_size, seed=estimator.run.run
    )
    columns = estimator.chosen_targets(args.target_task) if args.target_task else range(len(estimator.targets))
    values = estimator(membership_matrix(subsets, len(estimator.tasks)), columns)
    frame = pd.DataFrame(values, columns=[f"{ESTIMATE}/{estimator.targets[column]}" for column in columns])
    frame.insert(0, "subset", [subset_text(subset) for subset in subsets])
    frame.insert(1, "run", estimator.run.run)
    if args.evaluate == "displaced":
        frame = pd.concat([frame, displaced_values(args, estimator, subsets)], axis=1)
    folder = results_dir(estimator.run.results_name)
    write_manifest(folder, {**estimator.facts, "targets": estimator.targets, "subsets": str(path)})
    write_table(folder / ESTIMATES_FILE, frame)
    print(
        f"Wrote {folder / ESTIMATES_FILE}: estimates of {len(subsets):,} subsets ({path}) for {len(columns)} targets in "
        f"{time.perf_counter() - started:.1f} s. Next: python notebook/select_random_ensemble.py {folder}"
    )


class ModelAtPart:
    """The model at a stored part's checkpoint, the data as the store saw them, and the projection of its rows.

    Args:
        args: Flags of the data, model and hardware groups.
        run: The run of the store.
        part: One of its parts.

    Raises:
        ValueError: the data are not those of the store.
    """

    def __init__(self, args: argparse.Namespace, run: Run, part: StoredPart) -> None:
        self.part, self.hardware, self.data = part, hardware_from(args), load_data(args)
        expected = {"data_fingerprint": self.data.fingerprint}
        check_manifest(part.folder, part.manifest, expected, "Give the data flags that the gradients were taken with.")
        folder = next(path for path in checkpoint_folders(args, run) if path.name == part.folder.name)
        self.model = model_at(args, folder).to(self.hardware.device)
        self.datamodule = make_datamodule(args, self.data, self.model)
        manifest, shapes = part.manifest, self.model.layout.shapes
        self.projection = make_projection(manifest["projection"], manifest["dim"], manifest["seed"], shapes=shapes)
        self.norm = norm_of(self.model.trainable_state())

    def displacement(self, solution: np.ndarray, scale: float | None) -> tuple[dict[str, torch.Tensor], float]:
        """lift(x) and the factor that gives it `scale` times the norm of the trained weights (1 without a scale)."""
        lifted = self.projection.lift(torch.as_tensor(solution, dtype=torch.float32), self.model.layout.shapes)
        factor = scale * self.norm / max(norm_of(lifted), np.finfo(float).tiny) if scale else 1.0
        return {name: factor * change for name, change in lifted.items()}, factor


def displaced_values(
    args: argparse.Namespace, estimator: Estimator, subsets: Sequence[tuple[int, ...]]
) -> pd.DataFrame:
    """Validation metrics of the model at w* + lift(x_S), a row per subset: columns `displaced_loss/<target>` and,
    where answers are judged, `displaced_accuracy/<target>`.

    w* is the last checkpoint of the store, or the one that `--load_model_dir` names. With `--scale` the
    displacement has that length, relative to the norm of the trained weights.
    """
    at = ModelAtPart(args, estimator.run, estimator.stored[-1])
    membership = membership_matrix(subsets, len(estimator.tasks))
    solutions = ridge_solutions(estimator.parts[-1], membership, rho=args.rho, weight_by=args.weight_by)
    plan = TrainingPlan(epochs=1, lr=1.0, **generation_options(args))
    records = []
    for solution in progress(solutions, desc="displaced models", unit="subset"):
        displacement, _ = at.displacement(solution, args.scale)
        with displaced(at.model, displacement):
            evaluation = evaluate(at.model, at.datamodule, at.hardware, plan, ("validation",))
        metrics = target_metrics(at.data, evaluation, ("validation",))
        records.append({name.replace("validation_", "displaced_"): value for name, value in metrics.items()})
    return pd.DataFrame(records)


def approximation_error(args: argparse.Namespace, stage_2: str) -> None:
    """How far outputs at displaced weights are from their first-order approximation, by length of the displacement.

    Directions are random in the projected space, where the stored rows give g.δ exactly; outputs are those of the
    validation rows at the last checkpoint of the store, or the one that `--load_model_dir` names.
    """
    run = run_from(args)
    part = open_store(store_dir(args, run), args.load_model_dir, stage_2)[-1]
    at = ModelAtPart(args, run, part)
    validation = part.samples["target"] >= 0
    indices, rows, start = part.samples["sample_index"][validation], part.rows[validation], part.outputs[validation]
    output_function = part.manifest["output_function"]
    records = []
    settings = [(seed, scale) for seed in args.seed for scale in args.scale]
    for seed, scale in progress(settings, desc="displaced models", unit="model"):
        solution = np.random.default_rng(seed).standard_normal(rows.shape[1])
        displacement, factor = at.displacement(solution, scale)
        with displaced(at.model, displacement):
            moved = outputs_of(at.model, at.datamodule, indices, output_function)
        errors = (first_order_error(start, rows, factor * solution, moved), zero_order_error(start, moved))
        records.append({"scale": scale, "seed": seed, "first_order": errors[0], "zero_order": errors[1]})
    folder = results_dir(run.results_name)
    write_table(folder / APPROXIMATION_FILE, frame := pd.DataFrame(records))
    approximation_figure(frame, folder / APPROXIMATION_FIGURE)
    means = frame.groupby("scale")[["first_order", "zero_order"]].mean()
    for scale, row in means.iterrows():
        print(f"distance {scale:g}: first order {row['first_order']:.2e}, zero order {row['zero_order']:.2e}")
    print(f"Wrote {folder / APPROXIMATION_FILE} and {folder / APPROXIMATION_FIGURE}. Next: estimates (stage 3).")


def norm_of(tensors: Mapping[str, torch.Tensor]) -> float:
    """Euclidean norm of all the numbers together."""
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors.values()]).sum().sqrt())


def select(args: argparse.Namespace, stage_2: str) -> SelectionPath:
    """Stage 4: forward selection on the estimates; writes the subset, the path and a figure."""
    estimator = Estimator(args, stage_2)
    columns = estimator.chosen_targets(args.target_task)
    num_tasks = len(estimator.tasks)
    path = forward_selection(
        lambda membership: estimator(membership, columns).mean(axis=1),
        num_tasks,
        start_from=valid_subset(args.start_from, num_tasks),
        max_tasks=args.max_tasks,
        tolerance=args.tolerance,
        patience=args.patience,
        progress=progress,
    )
    name = estimator.run.results_name
    folder = results_dir(name)
    steps = pd.DataFrame(
        {
            "step": range(1, len(path.steps) + 1),
            "task": [step.task for step in path.steps],
            "name": [estimator.tasks[step.task] for step in path.steps],
            "estimate": [step.estimate for step in path.steps],
            "selected": [set(step.subset) <= set(path.selected) for step in path.steps],
            "subset": [subset_text(step.subset) for step in path.steps],
        }
    )
    write_table(folder / SELECTION_FILE, steps)
    selection_figure(steps, estimator.tasks, folder / SELECTION_FIGURE)
    chosen = subset_file(f"{name}_forward_selection")
    targets = ", ".join(estimator.targets[column] for column in columns)
    write_subsets(chosen, [path.selected], comment=f"forward selection for {targets}")
    print(
        f"Selected {len(path.selected)} of {num_tasks} tasks for {targets}: "
        f"{', '.join(estimator.tasks[task] for task in path.selected)}\n"
        f"Wrote {chosen}, {folder / SELECTION_FILE}, {folder / SELECTION_FIGURE}. Next: fine-tune the base model on it "
        f"with stage 1's script and --subset_file {chosen}"
    )
    return path


def random_ensemble(args: argparse.Namespace) -> tuple[int, ...]:
    """Stage 4: score each task by the mean estimate of the subsets that hold it, and keep the best-scoring tasks.

    Reads the estimates of stage 3 (`args.results`, a folder below `results/`); writes the subset, the scores and
    a figure.
    """
    folder = results_dir(
        str(Path(args.results).relative_to(RESULTS) if Path(args.results).is_relative_to(RESULTS) else args.results)
    )
    manifest = read_manifest(folder, "fast_estimate_linear_regression.py or fast_estimate_linear_regression_alpaca.py")
    tasks, frame = manifest["tasks"], read_table(folder / ESTIMATES_FILE)
    targets = args.target_task or own_targets(columns_of(frame, ESTIMATE), tasks)
    membership = membership_matrix([parse_subset(text) for text in frame["subset"]], len(tasks))
    scores, errors = random_ensemble_scores(membership, mean_over_targets(frame, ESTIMATE, targets))
    selected = select_by_score(scores, top_k=args.top_k, ratio=args.ratio, threshold=args.threshold)
    table = pd.DataFrame({"task": range(len(tasks)), "name": tasks, "score": scores, "standard_error": errors})
    table["selected"] = table["task"].isin(selected)
    write_table(folder / SCORES_FILE, table.sort_values("score"))
    scores_figure(scores, errors, selected, tasks, folder / SCORES_FIGURE)
    chosen = subset_file(f"{folder.relative_to(RESULTS)}_random_ensemble")
    write_subsets(chosen, [selected], comment=f"random ensemble for {', '.join(targets)}")
    print(
        f"Selected {len(selected)} of {len(tasks)} tasks for {', '.join(targets)}: "
        f"{', '.join(tasks[task] for task in selected)}\n"
        f"Wrote {chosen}, {folder / SCORES_FILE}, {folder / SCORES_FIGURE}. Next: fine-tune the base model on it with "
        f"stage 1's script and --subset_file {chosen}"
    )
    return selected
