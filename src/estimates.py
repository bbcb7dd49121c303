"""Stages 3 and 4, from parsed arguments to artifacts: estimates, how good they are, and the subset to train on.

What the scripts of both tracks share, as `stages` is for training and gradients.

Letters: m subsets, n tasks, k targets.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from src.cli import (
    command_typed,
    counted,
    hardware_from,
    is_dry_run,
    progress,
    run_from,
    say_notices,
    spent,
    waiting_for,
)
from src.datamodule import tokenizer_fingerprint
from src.estimation import (
    ESTIMATORS,
    Part,
    estimate,
    first_order_error,
    mixture_weights,
    solutions,
    solver_of,
    zero_order_error,
)
from src.evaluation import (
    AVERAGE,
    CALIBRATION_RHOS,
    MEAN,
    calibrate,
    comparison,
    fit_calibration,
    own_inclusion,
)
from src.finetune import (
    TrainingPlan,
    evaluate,
    target_metrics,
)
from src.gradients import (
    StoredPart,
    kernel_is_smaller,
    open_store,
    outputs_of,
)
from src.models import displaced, load_tokenizer
from src.paths import (
    AFFINITY_FIGURE,
    AFFINITY_FILE,
    APPROXIMATION_FIGURE,
    APPROXIMATION_FILE,
    COMPARISON_FIGURE,
    COMPARISON_FILE,
    ESTIMATES_FILE,
    MANIFEST,
    RESULTS,
    RESULTS_FILE,
    SCORES_FIGURE,
    SCORES_FILE,
    SELECTION_FIGURE,
    SELECTION_FILE,
    WEIGHTS,
    check_file,
    check_manifest,
    file_fingerprint,
    files_facts,
    read_manifest,
    results_dir,
    shorten,
    subset_file,
    weights_file,
    write_json,
    write_manifest,
)
from src.projection import make_projection
from src.report import (
    CALIBRATED,
    ESTIMATE,
    HIGH,
    LOW,
    RANKING_ONLY,
    SCORE,
    VALIDATION_LOSS,
    affinity_figure,
    approximation_figure,
    columns_of,
    comparison_figure,
    estimate_prefix,
    fine_tuned_values,
    lower_is_better,
    mean_over_targets,
    names_of,
    own_targets,
    parse_subset,
    read_table,
    scores_figure,
    selection_figure,
    subset_text,
    write_table,
)
from src.selection import METHODS, SelectionPath, random_ensemble_scores, ranking_convergence, select_by_score
from src.stages import (
    base_fingerprint,
    cluster_tasks,
    data_source,
    each_once,
    generation_options,
    load_data,
    make_datamodule,
    model_at,
    store_dir,
    train,
    valid_subset,
)
from src.subsets import (
    DEFAULT_SUBSET_SIZE,
    draw_subsets,
    load_or_draw_subsets,
    membership_matrix,
    tasks_in_subset,
    write_subsets,
    write_task_weights,
)


@dataclass(frozen=True)
class Levels:
    """Validation losses that were measured, of every target; nan of one without rows.

    Attributes:
        base: Of the base model, (k,).
        all_tasks: Of the model trained on all tasks, (k,).
        step: After how many optimizer steps.
        whole: Whether these were all; otherwise `all_tasks` is an estimate of the loss after all of them.
    """

    base: np.ndarray
    all_tasks: np.ndarray
    step: int
    whole: bool

    @property
    def names(self) -> tuple[str, str]:
        """What the two are called beside estimates."""
        return "base model (measured)", f"all tasks ({'measured' if self.whole else 'estimated'})"

    def describe(self, targets: Sequence[str]) -> dict[str, Any]:
        """For a manifest."""
        losses = {name: dict(zip(targets, getattr(self, name).tolist(), strict=True)) for name in ("base", "all_tasks")}
        return {**losses, "step": self.step, "whole": self.whole}


def known_levels(stored: Sequence[StoredPart], meta_training: Mapping[str, Any]) -> Levels | None:
    """The losses that meta-training measured, else those of the store's rows at its first and last checkpoint; None where
    neither has the base model's and a later one."""
    targets, of_target = stored[0].targets, stored[0].rows_of("target") > 0
    losses = meta_training.get("validation_losses", {})
    known = [np.array([losses.get(when, {}).get(name, np.nan) for name in targets]) for when in ("base", "last")]
    same_data = meta_training.get("data_fingerprint") == stored[0].manifest["data_fingerprint"]
    if same_data and np.isfinite(known)[:, of_target].all():
        return Levels(known[0], known[1], losses["last_step"], losses["whole"])
    first, last = stored[0], stored[-1]  # in the order of training
    if first.manifest["step"] != 0 or last.manifest["step"] == 0:
        return None
    means = []
    for part in (first, last):
        target = part.samples["target"]
        sums = np.bincount(target[target >= 0], part.outputs[target >= 0], len(targets))
        means.append(np.where(of_target, sums / np.maximum(part.rows_of("target"), 1), np.nan))
    return Levels(means[0], means[1], last.manifest["step"], whole=False)


class Estimator:
    """Estimates from a run's store: what stages 3 and 4 compute with.

    Args:
        args: Flags of `add_model`, a data group, `add_meta_init`, `add_projection`, `add_estimator`.
        stage_2: The script that makes the store, for messages.
    """

    def __init__(self, args: argparse.Namespace, stage_2: str) -> None:
        self.run = run_from(args)
        self.stored: list[StoredPart] = open_store(store_dir(args, self.run), args.load_model_dir, stage_2)
        check_belongs(args, self.stored, stage_2)
        say_notices(notice for part in self.stored for notice in part.notices())
        self.targets = self.stored[0].targets
        self.tasks: list[str] = self.stored[0].manifest["tasks"]
        self.division: str | None = None  # names another division into tasks than the data's own
        task_of_row = None
        if getattr(args, "load_clusters", False):
            store = store_dir(args, self.run)
            task_of_row, self.tasks = cluster_tasks(store, self.stored, args.num_clusters, args.run)
            self.division = f"clusters_{len(self.tasks)}"
        manifest, kind = self.stored[0].manifest, ESTIMATORS[args.estimator]
        if kind.output_function not in (None, manifest["output_function"]):
            raise ValueError(
                f"--estimator {args.estimator} is of {kind.output_function}s; take the gradients with --output_function "
                f"{kind.output_function} too"
            )
        by_kernel = kernel_is_smaller(manifest["num_rows"], manifest["dim"]) and not kind.needs_outers
        use_rows = kind.needs_rows or by_kernel
        weight_by = args.weight_by or self.stored[0].weight_by
        self.parts: list[Part] = [
            part.estimation_part(
                task_of_row,
                len(self.tasks),
                self.division or "tasks",
                weight_by=weight_by,
                by_rows=use_rows,
                represented=kind.represented,
            )
            for part in self.stored
        ]
        self.has_rows = np.all([part.train.counts > 0 for part in self.parts], axis=0)
        self.options = {"estimator": args.estimator, "rho": args.rho}
        of_losses = manifest["output_function"] == "loss" and not kind.ranks_only
        self.levels = known_levels(self.stored, self.meta_training) if of_losses else None
        self._shifts: dict[tuple[float, tuple[int, ...]], np.ndarray] = {}
        if self.levels is not None and not self.levels.whole:
            when = f"after {self.levels.step} steps" if self.levels.step > 0 else "at the last checkpoint"
            say_notices(
                [f"the loss of all tasks is estimated: it was last measured {when}, and training may have gone on"]
            )
        if of_losses and self.levels is None:
            say_notices(["estimates are scores, for ranking only: neither the training's manifest nor gradients at its start "
                         "and later say what the losses of the base model and of all tasks are"])  # fmt: skip

    def __call__(
        self, membership: np.ndarray, targets: Sequence[int] | None = None, rho: float | None = None
    ) -> np.ndarray:
        """Estimates (m, k) of the subsets in `membership` (m, n), or of the given targets only; at another rho.

        Local models of the loss rank subsets; their levels are off. Where losses are known, all estimates of a target are
        shifted by one number, so that the estimate of all tasks is the known loss; this changes no comparison of two
        subsets. The empty subset, which no training follows, has the base model's loss itself.
        """
        columns = list(range(len(self.targets))) if targets is None else list(targets)
        options = {**self.options, "rho": self.options["rho"] if rho is None else rho}
        bar = partial(progress, leave=False)
        estimates = estimate(self.parts, membership, targets=columns, progress=bar, **options)
        if self.levels is not None:
            estimates += self.shift(columns, options["rho"])
            estimates[~np.asarray(membership, bool).any(axis=1)] = self.levels.base[columns]
        return estimates

    def shift(self, columns: Sequence[int], rho: float) -> np.ndarray:
        """What is added to the estimates of some targets, (k,), so that those of all tasks are what is known."""
        if self.levels is None:
            return np.zeros(len(columns))
        key = rho, tuple(columns)
        if key not in self._shifts:
            options = {**self.options, "rho": rho}
            of_all = estimate(self.parts, self.has_rows[None], targets=columns, **options)[0]
            self._shifts[key] = self.levels.all_tasks[list(columns)] - of_all
        return self._shifts[key]

    def calibrated(
        self, truth: pd.DataFrame, membership: np.ndarray, targets: Sequence[int]
    ) -> tuple[float, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Estimates calibrated on really fine-tuned subsets.

        Args:
            truth: A results table; its validation losses are used, the mean over runs.
            membership: Subsets to estimate (m, n).
            targets: Ids of the targets (k,).

        Returns:
            The ridge strength, its own or one that is clearly better by leave-one-out; calibrated estimates, lower and upper
            ends, each (m, k). For a subset that was fine-tuned they come from a map fitted without it.
        """
        subsets, values = fine_tuned_values(truth, VALIDATION_LOSS, [self.targets[target] for target in targets])
        known = membership_matrix([parse_subset(text) for text in subsets], len(self.tasks))
        default = self.options["rho"]
        by_rho = {rho: self(known, targets, rho) for rho in {*CALIBRATION_RHOS, default}}
        fine_tuned = values.mean(axis=2)
        rho, calibration = calibrate(by_rho, fine_tuned, default)
        estimates = self(membership, targets, rho)
        calibrated = calibration(estimates)
        for left_out, subset in enumerate(known):
            others, same = np.arange(len(known)) != left_out, (np.asarray(membership) == subset).all(axis=1)
            without = fit_calibration(by_rho[rho][others], fine_tuned[others])
            for of_all, of_others in zip(calibrated, without(estimates[same]), strict=True):
                of_all[same] = of_others
        return rho, calibrated

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
            "weight_by": self.parts[0].weight_by,
            "ranks_only": self.ranks_only,
            "levels": self.levels and self.levels.describe(self.targets),
        }

    @property
    def ranks_only(self) -> bool:
        """Whether the estimates are no losses, or their levels are not known, so that only their order says something."""
        return self.levels is None

    @property
    def meta_training(self) -> dict[str, Any]:
        """The manifest of the meta-training that the gradients were taken on; empty where its folder is gone."""
        folder = Path(self.stored[0].manifest["checkpoint_dir"]).parent
        return read_manifest(folder, "") if (folder / MANIFEST).is_file() else {}

    @property
    def seconds(self) -> dict[str, float]:
        """What the estimates cost before the first of them."""
        trained = self.meta_training
        gradients = sum(part.manifest["seconds"] for part in self.stored)
        return ({"meta_training": trained["seconds"]} if trained else {}) | {"gradients": gradients}

    @property
    def commands(self) -> list[str]:
        """What was typed to get here."""
        manifests = [*filter(None, [self.meta_training]), self.stored[0].manifest]
        return [manifest["command"] for manifest in manifests]

    @property
    def targets_with_rows(self) -> list[str]:
        """The targets that have validation rows at every checkpoint."""
        has_rows = np.all([part.target.counts > 0 for part in self.parts], axis=0)
        return [name for name, some in zip(self.targets, has_rows, strict=True) if some]

    def chosen_targets(self, names: Sequence[str] | None) -> list[int]:
        """Ids of the targets that `--target_task` names.

        Default: those that are no training task (the tasks of `--target_files`), else all.

        Raises:
            ValueError: no such target.
        """
        if names is None:
            names = own_targets(self.targets_with_rows, self.tasks)
        if unknown := [name for name in names if name not in self.targets]:
            raise ValueError(f"--target_task {unknown[0]}: the targets are {', '.join(self.targets)}")
        if empty := [name for name in names if name not in self.targets_with_rows]:
            raise ValueError(
                f"target {empty[0]} has no validation rows in the store, so nothing can be estimated for it; name other "
                "targets with --target_task"
            )
        if not names:
            raise ValueError("no target has validation rows in the store, so nothing can be estimated")
        return [self.targets.index(name) for name in names]


def check_belongs(args: argparse.Namespace, stored: Sequence[StoredPart], stage_2: str) -> None:
    """Refuse a store that was not made with the data and model flags given.

    Data files are read only where their flags, sizes and times are not those that stage 2 saw. A model that is not here
    is not compared: estimates need the gradients alone.

    Raises:
        ValueError: names every difference with both values.
    """
    for part in stored:
        manifest = part.manifest
        expected = {
            "model_key": args.model_key,
            "lora_rank": args.lora_rank if args.train_lora else None,
            "lora_alpha": args.lora_alpha if args.train_lora else None,
            "output_function": args.output_function,
            "projection": args.projection,
            "dim": manifest["dim"] if args.projection == "none" else args.project_dim,
            "seed": args.run,
        }
        if (fingerprint := base_fingerprint(args)) is not None:
            expected["base_fingerprint"] = fingerprint
            expected["tokenizer_fingerprint"] = tokenizer_fingerprint(load_tokenizer(args.model_key))
        source = data_source(args)
        if source is None or source != manifest["data_source"]:
            expected["data_fingerprint"] = load_data(args).fingerprint
        repair = f"Give the flags and files of stage 2, or remove {part.folder} and run: python {stage_2}"
        check_manifest(part.folder, manifest, expected, repair)


def estimate_subsets(args: argparse.Namespace, stage_2: str) -> None:
    """Stage 3: the estimated loss of every target for every subset, one row each."""
    started = time.perf_counter()
    if args.evaluate == "displaced":
        solver_of(args.estimator)  # refuses one without, before anything is computed
    estimator = Estimator(args, stage_2)
    columns = estimator.chosen_targets(args.target_task or estimator.targets_with_rows)
    truth = read_table(Path(args.calibrate), of_subsets=True) if args.calibrate else None
    calibration: dict[str, Any] = {"calibrate": args.calibrate}
    if truth is not None:  # before the subsets are drawn and written
        known, _ = fine_tuned_values(truth, VALIDATION_LOSS, [estimator.targets[column] for column in columns])
        calibration["calibrated_on"] = known
    path = Path(args.sampled_tasks) if args.sampled_tasks else subset_file(estimator.run.name(estimator.division))
    folder = results_dir(estimator.run.results_name)
    drawn = [] if path.exists() else [path]
    read = [part.folder for part in estimator.stored] + ([] if drawn else [path])
    size = args.subset_size or DEFAULT_SUBSET_SIZE
    drawing = (args.number_of_subsets, len(estimator.tasks), size, estimator.run.run)
    if args.dry_run and drawn:
        draw_subsets(*drawing)  # refuses what cannot be drawn
    if is_dry_run(args, read, [*drawn, folder / ESTIMATES_FILE, folder / MANIFEST]):
        return
    subsets = each_once(load_or_draw_subsets(path, *drawing, tasks=estimator.tasks), path)
    say_other_subsets(args, path, subsets, len(estimator.tasks))
    membership = membership_matrix(subsets, len(estimator.tasks))
    tables = {SCORE if estimator.ranks_only else ESTIMATE: estimator(membership, columns)}
    if truth is not None:
        rho, values = estimator.calibrated(truth, membership, columns)
        tables |= dict(zip((CALIBRATED, LOW, HIGH), values, strict=True))
        calibration["rho_calibrated"] = rho
        other = "" if rho == args.rho else f" (the columns {ESTIMATE}/ are at rho {args.rho:g})"
        print(f"Calibrated on {args.calibrate}{how_trained(Path(args.calibrate))}, with rho {rho:g}{other}.")
    names = [f"{prefix}/{estimator.targets[column]}" for prefix in tables for column in columns]
    frame = pd.DataFrame(np.concatenate(list(tables.values()), axis=1), columns=names)
    frame.insert(0, "subset", [subset_text(subset) for subset in subsets])
    frame.insert(1, "run", estimator.run.run)
    if args.evaluate == "displaced":
        frame = pd.concat([frame, displaced_values(args, estimator, subsets)], axis=1)
    seconds = {**estimator.seconds, "estimation": round(time.perf_counter() - started, 2)}
    facts = {"targets": estimator.targets, "subsets": str(path), **calibration, "seconds": seconds}
    write_table(folder / ESTIMATES_FILE, frame)
    facts |= {"commands": [*estimator.commands, command_typed()], "files": files_facts(folder, [ESTIMATES_FILE])}
    facts["peak_memory"] = spent(started)["peak_memory"]
    write_manifest(folder, {**estimator.facts, **facts})
    print(
        f"Wrote {folder / ESTIMATES_FILE}: estimates of {counted(len(subsets), 'subset')} ({path}) for "
        f"{counted(len(columns), 'target')} in {time.perf_counter() - started:.1f} s. Next: "
        f"fast_estimate_forward_selection.py with the same flags, or python notebook/select_random_ensemble.py {folder}"
    )


def say_other_subsets(args: argparse.Namespace, path: Path, subsets: Sequence[tuple[int, ...]], num_tasks: int) -> None:
    """Say where a file that is there holds other subsets than the flags ask for: the file is taken."""
    sizes = sorted({len(subset) for subset in subsets})
    asked = []
    if args.number_of_subsets not in (None, len(subsets)):
        asked.append(f"holds {len(subsets):,} subsets, and --number_of_subsets asks for {args.number_of_subsets:,}")
    if args.subset_size and sizes != [tasks_in_subset(num_tasks, args.subset_size)]:
        found = counted(sizes[0], "task") if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} tasks"
        wanted = tasks_in_subset(num_tasks, args.subset_size)
        asked.append(f"holds subsets of {found}, and --subset_size {args.subset_size:g} asks for {wanted}")
    say_notices(f"{path} {what}; the file is taken, remove it to draw others" for what in asked)


def how_trained(table: Path) -> str:
    """The training flags behind a table of fine-tuned values, in brackets; nothing where they are not known."""
    described = table.with_suffix(".json")
    facts = json.loads(described.read_text(encoding="utf-8")) if described.is_file() else {}
    flags = [f"{name} {facts[name]}" for name in ("lr", "epochs", "rows_per_step") if name in facts]
    return f" (fine-tuned with {', '.join(flags)})" if flags else ""


LEGEND = """lds: Spearman over subsets, with its 90 % bootstrap interval; lds_top_quarter: of the quarter with the lowest
fine-tuned values; attainable: the highest lds that is to be expected of any estimate, as far as the runs agree."""


def compare(args: argparse.Namespace) -> pd.DataFrame:
    """How good estimates are: a table and a figure beside them.

    The targets that are no training task, else all that both tables have, are judged over the subsets that both have.
    The base model and training on all tasks, where the truth has them, stand as predictors: they give every subset the
    same value.
    """
    started = time.perf_counter()
    path, truth = Path(args.estimates), read_table(Path(args.truth), of_subsets=True)
    estimates = read_table(path, of_subsets=True).drop_duplicates("subset").set_index("subset")
    written = [path.with_name(COMPARISON_FILE), path.with_name(COMPARISON_FIGURE)]
    if is_dry_run(args, [path, args.truth], written):
        return pd.DataFrame()
    manifest = read_manifest(path.parent, "stage 3") if (path.parent / MANIFEST).is_file() else {}
    tasks, ranks_only = manifest.get("tasks", []), manifest.get("ranks_only", False)
    of_estimates = estimate_prefix(estimates)
    available = [name for name in columns_of(estimates, of_estimates) if name in columns_of(truth, args.metric)]
    targets = args.target_task or own_targets(available, tasks)
    if unknown := [name for name in targets if name not in available]:
        raise ValueError(
            f"--target_task {unknown[0]}: both tables have {', '.join(available) or 'no target in common'}"
        )
    subsets, values = fine_tuned_values(truth, args.metric, targets)
    common = [position for position, text in enumerate(subsets) if text in estimates.index]
    if len(common) < 3:
        raise ValueError(f"{path} and {args.truth} have {len(common)} subsets in common; a rank correlation needs 3")
    subsets, values = [subsets[position] for position in common], values[common]
    estimated = RANKING_ONLY if ranks_only else ESTIMATE
    predictions = {
        name: estimates.loc[subsets, [f"{prefix}/{target}" for target in targets]].to_numpy(float)
        for name, prefix in ((estimated, of_estimates), (CALIBRATED, CALIBRATED))
        if columns_of(estimates, prefix)
    }
    known = {"base model": "", "all tasks": subset_text(range(len(tasks)))} if tasks else {"base model": ""}
    for name, text in known.items():
        if (truth["subset"] == text).any():
            rows = truth.loc[truth["subset"] == text, [f"{args.metric}/{target}" for target in targets]]
            constant = lower_is_better(rows, args.metric).mean(axis=0)
            predictions[name] = np.broadcast_to(constant, predictions[estimated].shape)
    members = membership_matrix([parse_subset(text) for text in subsets], len(tasks)) if tasks else None
    inclusion = None if members is None else own_inclusion(members, targets, tasks)
    with waiting_for("bootstrap intervals"):
        table = comparison(predictions, values, targets, inclusion)
    table.insert(2, "subsets", len(subsets))
    if ranks_only:
        table.loc[table["predictor"] == estimated, ["relative_error", "squared_relative_error"]] = np.nan
    write_result(written[0], table, started, estimates=str(path), truth=args.truth, metric=args.metric)
    comparison_figure(predictions[estimated], values.mean(axis=2), table, estimated, written[1], ranks_only=ranks_only)
    shown = table[table["target"].isin([AVERAGE, MEAN] if len(targets) > 1 else targets)]
    print(shown.round(3).to_string(index=False))
    print(LEGEND)
    if left_out := len(set(subsets) & set(manifest.get("calibrated_on", []))):
        print(
            f"{CALIBRATED}: {counted(left_out, 'subset')} of {len(subsets)} calibrated the others; each of these is estimated without itself."
        )
    print(
        f"Wrote {written[0]} and {written[1]}: {counted(len(subsets), 'subset')}, {counted(len(targets), 'target')}. Next: "
        f"stage 3 again with --calibrate {args.truth}"
    )
    return table


def write_result(path: Path, frame: pd.DataFrame, started: float, **facts: Any) -> None:
    """Write a table, and beside it as `<stem>.json` what was typed, how long it took and what else is worth knowing."""
    write_table(path, frame)
    write_json(path.with_suffix(".json"), {**facts, **spent(started), "command": command_typed()})


class ModelAtPart:
    """The model at a stored part's checkpoint, the data as the store saw them, and the projection of its rows.

    Args:
        args: Flags of the data, model and hardware groups.
        part: One of its parts.

    Raises:
        ValueError: the data are not those of the store.
        FileNotFoundError: the checkpoint is gone.
    """

    def __init__(self, args: argparse.Namespace, part: StoredPart) -> None:
        self.part, self.hardware, self.data = part, hardware_from(args), load_data(args)
        checkpoint = Path(part.manifest["checkpoint_dir"])
        if not checkpoint.is_dir():
            raise FileNotFoundError(
                f"{part.folder} was taken at {checkpoint}, which is gone; train it again with custom_train.py or "
                "custom_train_alpaca.py"
            )
        self.model = model_at(args, checkpoint).to(self.hardware.device)
        self.datamodule = make_datamodule(args, self.data, self.model)
        expected = {
            "data_fingerprint": self.data.fingerprint,
            "checkpoint_fingerprint": file_fingerprint(sorted(checkpoint.glob(WEIGHTS))),
            "max_length": args.max_length,
            "max_target_length": args.max_target_length,
            "loss_on_prompt": self.datamodule.loss_on_prompt,
        }
        repair = f"Give the flags that the gradients were taken with, or remove {part.folder} and take them again."
        check_manifest(part.folder, part.manifest, expected, repair)
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
    """Validation metrics of the model at w* + lift(x_S) of the estimator, a row per subset: columns
    `displaced_loss/<target>` and, where answers are judged, `displaced_accuracy/<target>`.

    w* is the last checkpoint of the store, or the one that `--load_model_dir` names. With `--scale` the
    displacement has that length, relative to the norm of the trained weights.
    """
    at = ModelAtPart(args, estimator.stored[-1])
    membership = membership_matrix(subsets, len(estimator.tasks))
    displacements = solutions(estimator.parts[-1], membership, **estimator.options)
    plan = TrainingPlan(epochs=1, lr=1.0, **generation_options(args))
    records = []
    for solution in progress(displacements, desc="displaced models", unit="subset"):
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
    started, run = time.perf_counter(), run_from(args)
    part = open_store(store_dir(args, run), args.load_model_dir, stage_2)[-1]
    check_belongs(args, [part], stage_2)
    folder = results_dir(run.results_name)
    written = [folder / APPROXIMATION_FILE, folder / APPROXIMATION_FIGURE]
    if is_dry_run(args, [part.folder, part.manifest["checkpoint_dir"], args.model_key], written):
        return
    at = ModelAtPart(args, part)
    validation = part.samples["target"] >= 0
    indices, rows, start = part.samples["sample_index"][validation], part.rows[validation], part.outputs[validation]
    output_function = part.manifest["output_function"]
    records = []
    settings = [(seed, scale) for seed in args.seed for scale in args.scale]
    for seed, scale in progress(settings, desc="displaced models", unit="model"):
        solution = np.random.default_rng(seed).standard_normal((rows.shape[1],))
        displacement, factor = at.displacement(solution, scale)
        with displaced(at.model, displacement):
            moved = outputs_of(at.model, at.datamodule, indices, output_function)
        errors = (first_order_error(start, rows, factor * solution, moved), zero_order_error(start, moved))
        records.append({"scale": scale, "seed": seed, "first_order": errors[0], "zero_order": errors[1]})
    write_result(written[0], frame := pd.DataFrame(records), started, checkpoint=part.manifest["checkpoint_dir"])
    about = f"{run.data_key}, {output_function} at {part.folder.name}, {len(indices):,} validation rows"
    approximation_figure(frame, written[1], title=about)
    means = frame.groupby("scale")[["first_order", "zero_order"]].mean()
    for scale, row in means.iterrows():
        print(f"distance {scale:g}: first order {row['first_order']:.2e}, zero order {row['zero_order']:.2e}")
    print(f"Wrote {written[0]} and {written[1]}. Next: estimates (stage 3).")


def norm_of(tensors: Mapping[str, torch.Tensor]) -> float:
    """Euclidean norm of all the numbers together."""
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors.values()]).sum().sqrt())


def search(args: argparse.Namespace, estimator: Estimator, columns: Sequence[int]) -> SelectionPath:
    """The search of `--method` for the mean over some targets; before refining, a few steps past the best."""
    num_tasks, rows_of_task = len(estimator.tasks), estimator.parts[0].train.counts
    path = METHODS[args.method].search(
        lambda membership: estimator(membership & estimator.has_rows, columns).mean(axis=1),
        num_tasks,
        start_from=valid_subset(args.start_from, num_tasks),
        max_tasks=args.max_tasks,
        budget_rows=args.budget_rows,
        rows_of_task=rows_of_task,
        past_best=3 if args.refine else 1,
        try_at_most=args.try_at_most,
        progress=progress,
    )
    num_rows = int(rows_of_task[list(path.selected)].sum())
    if len(path.selected) > (args.max_tasks or num_tasks) or num_rows > (args.budget_rows or num_rows):
        raise ValueError(
            f"--method {args.method} selected {counted(len(path.selected), 'task')} with {counted(num_rows, 'row')}, which is "
            "beyond --max_tasks or --budget_rows; it does not know these flags"
        )
    return path


def select(args: argparse.Namespace, stage_2: str) -> list[tuple[int, ...]]:
    """Stage 4: forward selection on the estimates, for the targets together or for each; writes the subsets, the
    paths and a figure."""
    started, estimator = time.perf_counter(), Estimator(args, stage_2)
    columns = estimator.chosen_targets(args.target_task)
    name = estimator.run.results_name
    folder, method = results_dir(name), f"{args.method}_selection"
    groups = [[column] for column in columns] if args.per_target else [columns]
    figures = [AFFINITY_FILE, AFFINITY_FIGURE] if args.per_target else [SELECTION_FIGURE]
    outputs = [subset_file(f"{name}_{method}"), *(folder / file for file in (SELECTION_FILE, *figures))]
    if is_dry_run(args, [part.folder for part in estimator.stored], outputs):
        return []
    paths = [search(args, estimator, group) for group in groups]
    labels = [", ".join(estimator.targets[column] for column in group) for group in groups]
    chosen = subset_file(f"{name}_{method}")
    selected = [
        refined(args, estimator, group, path) if args.refine else path.selected
        for group, path in zip(groups, paths, strict=True)
    ]
    steps = [path_table(*of_path, estimator) for of_path in zip(paths, selected, labels, strict=True)]
    write_result(folder / SELECTION_FILE, pd.concat(steps), started, targets=labels, **estimator.facts)
    comment = "\n".join(f"{method.replace('_', ' ')} for {label}" for label in labels)
    write_subsets(chosen, selected, comment=comment, tasks=estimator.tasks)
    written = outputs
    references = [reference_estimates(estimator, group) for group in groups]
    if args.per_target:
        write_affinity(estimator, columns, folder)
    else:
        title = f"{method.replace('_', ' ').capitalize()} for {shorten(labels[0], 40)}"
        selection_figure(
            steps[0], estimator.tasks, folder / SELECTION_FIGURE,
            title=title, references=references[0], ranks_only=estimator.ranks_only,
        )  # fmt: skip
    if args.weights:
        shares, course = mixture_weights(estimator.parts, columns, rho=args.rho, progress=progress)
        written.append(weights_file(name))
        write_task_weights(written[-1], estimator.tasks, shares)
        course += estimator.shift(columns, args.rho).mean()
        called = RANKING_ONLY if estimator.ranks_only else ESTIMATE
        print(f"Mixture weights: {called} {course[0]:.4f} with equal weights, {course.min():.4f} with these.")
    for of_group in zip(selected, labels, groups, references, strict=True):
        say_selected(estimator, *of_group)
    print(
        f"Wrote {', '.join(map(str, written))}. Next: fine-tune the base model on it with stage 1's script and "
        f"--subset_file {chosen}"
    )
    return selected


def reference_estimates(estimator: Estimator, columns: Sequence[int]) -> dict[str, float]:
    """What a selection is to beat: the mean over some targets of the base model's loss and of all tasks'; where losses are
    not known, the scores of training on nothing and on everything."""
    ends = np.array([[False], [True]]) & estimator.has_rows
    names = estimator.levels.names if estimator.levels is not None else ("no task", "all tasks")
    return dict(zip(names, estimator(ends, columns).mean(axis=1).tolist(), strict=True))


def say_selected(
    estimator: Estimator, subset: Sequence[int], label: str, columns: Sequence[int], references: Mapping[str, float]
) -> None:
    """Print a selection by name, and its estimate beside its `reference_estimates`."""
    tasks = estimator.tasks
    estimate = estimator(membership_matrix([tuple(subset)], len(tasks)) & estimator.has_rows, columns).mean()
    beside = "".join(f", {value:.4g} {name}" for name, value in references.items())
    print(
        f"Selected {len(subset)} of {len(tasks)} tasks for {label}: {names_of(subset, tasks)}\n"
        f"{(RANKING_ONLY if estimator.ranks_only else ESTIMATE).capitalize()}: {estimate:.4g} with these{beside}."
    )
    if estimator.levels is not None and estimate >= (base := estimator.levels.base[list(columns)].mean()):
        print(
            f"No selection is estimated to beat the base model: its measured loss, {base:.4g}, is not above the estimate."
        )


def refined(
    args: argparse.Namespace, estimator: Estimator, columns: Sequence[int], path: SelectionPath
) -> tuple[int, ...]:
    """Of the subsets on a search's way with the best estimates, the one that is best after really fine-tuning them all:
    the lowest mean validation loss of the targets. Their results stand with those of stage 1's script."""
    name = estimator.run.results_name
    steps = sorted(path.steps, key=lambda step: step.estimate)[: args.refine]
    candidates = subset_file(f"{name}_candidates")
    comment = "candidates of a selection, really fine-tuned"
    write_subsets(candidates, [step.subset for step in steps], comment=comment, tasks=estimator.tasks)
    chosen = {"subset_file": str(candidates), "task_weights": None, "task_idxes": None, "load_model_dir": None}
    train(argparse.Namespace(**{**vars(args), **chosen, **inherited_training(args, estimator.meta_training)}))
    table = read_table(results_dir(name) / RESULTS_FILE)
    table["mean"] = mean_over_targets(table, VALIDATION_LOSS, [estimator.targets[column] for column in columns])
    values = table.groupby("subset")["mean"].mean()
    return min((step.subset for step in steps), key=lambda subset: values[subset_text(subset)])


def inherited_training(args: argparse.Namespace, trained: Mapping[str, Any]) -> dict[str, Any]:
    """The training flags of `--refine`: those typed, else those in the manifest of meta-training, with as many rows in an
    optimizer step.

    Raises:
        ValueError: there is no manifest to take them from, or other flags are not those of meta-training.
    """
    recorded = {"lr": "lr", "epochs": "epochs", "batch_size": "rows_per_step"}
    if missing := [flag for flag, name in recorded.items() if getattr(args, flag) is None and name not in trained]:
        raise ValueError(
            f"--refine fine-tunes, and these gradients belong to no meta-training of this project whose flags it could take: "
            f"pass {' '.join(f'--{name}' for name in missing)}"
        )
    names = ("max_length", "max_target_length", "loss_on_prompt", "lora_target_modules", "base_dtype", "use_qlora",
             "max_new_tokens")  # fmt: skip
    expected = {name: getattr(args, name) for name in names if name in trained}
    check_manifest(Path("meta-training"), trained, expected, "Give --refine the flags of meta-training.")
    found = {"accumulate": 1, "weight_decay": 0.0, "loss_over": "token", **trained}
    flags = ("lr", "epochs", "batch_size", "accumulate", "weight_decay", "loss_over")
    values: dict[str, Any] = {
        name: found.get(name) if getattr(args, name) is None else getattr(args, name) for name in flags
    }
    if args.batch_size is None:
        batches = int(values["accumulate"]) * hardware_from(args).num_processes
        values["batch_size"], left = divmod(trained["rows_per_step"], batches)
        if left:
            raise ValueError(
                f"meta-training took {trained['rows_per_step']} rows in an optimizer step, which {batches} batches cannot "
                "share; pass --batch_size"
            )
    return values


def path_table(path: SelectionPath, selected: tuple[int, ...], label: str, estimator: Estimator) -> pd.DataFrame:
    """A search as a table, a row per step."""
    kept = set(selected)
    forward = not path.steps or len(path.steps[0].subset) > len(path.start)
    return pd.DataFrame(
        {
            "target": label,
            "step": range(1, len(path.steps) + 1),
            "task": [step.task for step in path.steps],
            "name": [estimator.tasks[step.task] for step in path.steps],
            SCORE if estimator.ranks_only else ESTIMATE: [step.estimate for step in path.steps],
            "selected": [set(step.subset) <= kept if forward else set(step.subset) >= kept for step in path.steps],
            "subset": [subset_text(step.subset) for step in path.steps],
        }
    )


def write_affinity(estimator: Estimator, columns: Sequence[int], folder: Path) -> None:
    """How much each task alone is estimated to lower each target's loss: a table and a heat map."""
    alone = np.vstack([np.zeros(len(estimator.tasks), bool), np.eye(len(estimator.tasks), dtype=bool)])
    estimates = estimator(alone & estimator.has_rows, columns)
    targets = [estimator.targets[column] for column in columns]
    frame = pd.DataFrame(estimates[0] - estimates[1:], columns=targets)
    affinity_figure(
        frame.to_numpy(), estimator.tasks, targets, folder / AFFINITY_FIGURE, ranks_only=estimator.ranks_only
    )
    frame.insert(0, "task", estimator.tasks)
    write_table(folder / AFFINITY_FILE, frame)


def results_folder(typed: str) -> Path:
    """The folder that `results/<name>`, `<name>`, or a file in there names."""
    typed = str(Path(typed).parent) if Path(typed).is_file() else typed
    return results_dir(str(Path(typed).relative_to(RESULTS) if Path(typed).is_relative_to(RESULTS) else typed))


def random_ensemble(args: argparse.Namespace) -> tuple[int, ...]:
    """Stage 4: score each task by the mean estimate of the subsets that hold it, and keep the best-scoring tasks.

    Reads the estimates of stage 3 (`args.results`, a folder below `results/`); writes the subset, the scores and
    a figure.
    """
    started, folder = time.perf_counter(), results_folder(args.results)
    manifest = read_manifest(folder, "fast_estimate_linear_regression.py or fast_estimate_linear_regression_alpaca.py")
    check_file(folder, manifest, ESTIMATES_FILE, "Run stage 3 again, it was cut off or the table was changed.")
    tasks, frame = manifest["tasks"], read_table(folder / ESTIMATES_FILE, of_subsets=True)
    prefix = estimate_prefix(frame)
    targets = args.target_task or own_targets(columns_of(frame, prefix), tasks)
    membership = membership_matrix([parse_subset(text) for text in frame["subset"]], len(tasks))
    values = mean_over_targets(frame, prefix, targets)
    scores, errors = random_ensemble_scores(membership, values)
    selected = select_by_score(scores, top_k=args.top_k, ratio=args.ratio, threshold=args.threshold)
    chosen = subset_file(f"{folder.relative_to(RESULTS)}_random_ensemble")
    if is_dry_run(args, [folder / ESTIMATES_FILE], [chosen, folder / SCORES_FILE, folder / SCORES_FIGURE]):
        return ()
    table = pd.DataFrame({"task": range(len(tasks)), "name": tasks, "score": scores, "standard_error": errors})
    table["selected"] = table["task"].isin(selected)
    write_result(folder / SCORES_FILE, table.sort_values("score"), started, targets=targets)
    settling = ranking_convergence(membership, values)
    scores_figure(
        scores, errors, selected, tasks, settling, folder / SCORES_FIGURE,
        target=shorten(", ".join(targets), 40), ranks_only=manifest.get("ranks_only", False),
    )  # fmt: skip
    write_subsets(chosen, [selected], comment=f"random ensemble for {', '.join(targets)}", tasks=tasks)
    print(
        f"Selected {len(selected)} of {len(tasks)} tasks for {', '.join(targets)}: "
        f"{names_of(selected, tasks)}\n"
        f"Wrote {chosen}, {folder / SCORES_FILE}, {folder / SCORES_FIGURE}. Next: fine-tune the base model on it with "
        f"stage 1's script and --subset_file {chosen}"
    )
    return selected
