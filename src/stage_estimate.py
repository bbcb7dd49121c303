"""Stage 3: estimates of subsets from a store of gradients, and their comparison with fine-tuned values.

Letters: m subsets, n tasks, k targets.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src import artifacts, evaluation, tables
from src.config import Config, EstimateConfig, EstimationConfig, TrainConfig, from_store
from src.console import command_typed, counted, progress, say_notices, spent, waiting_for
from src.data import TaskData, read_arrays, write_arrays
from src.estimation import ESTIMATORS, Part, displacements, estimate, part_weights, solutions
from src.run_data import load_data, named
from src.store import StoredPart, open_store
from src.subsets import DEFAULT_SUBSET_SIZE, cluster_samples, load_or_draw_subsets, membership_matrix, tasks_in_subset
from src.tables import ESTIMATE, VALIDATION_LOSS, parse_subset, subset_text

# --- clusters as tasks ---------------------------------------------------------------------------------------


def cluster_tasks(store: Path, part: StoredPart, num_clusters: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Clusters of the training rows as tasks; made on first use and kept beside the store. Gives the cluster of each stored
    row (R,), -1 for validation rows, and the names of the clusters."""
    path, training = artifacts.clusters_file(store, num_clusters), part.samples["task"] >= 0
    kept = read_arrays(path)
    if kept is None or not np.array_equal(kept["key"], part.samples["key"]):
        clusters = np.full(len(training), -1, dtype=np.int32)
        with waiting_for(f"clustering {training.sum():,} rows"):
            clusters[training] = cluster_samples(np.asarray(part.rows[training], np.float32), num_clusters, seed)
        write_arrays(path, kept := {"clusters": clusters, "key": part.samples["key"]})
        sizes = np.bincount(clusters[training])
        about = f"{num_clusters} clusters of {sizes.min():,} to {sizes.max():,} rows, median {np.median(sizes):,.0f}"
        print(f"Wrote {path}: {training.sum():,} training rows in {about}.")
    return kept["clusters"], [f"cluster_{number:04d}" for number in range(num_clusters)]


def clustered(config: TrainConfig, typed: Mapping[str, Any], run: int = 0) -> TaskData:
    """The data of a training with the clusters of its run's store as the training rows' tasks."""
    names = ("load_model_dir", "subset_file", "task_weights", "task_idxes")
    _, store = from_store(EstimationConfig, {name: value for name, value in typed.items() if name not in names})
    part = open_store(store, None, "stage 2")[-1]
    cluster_of_row, names_of_clusters = cluster_tasks(store, part, config.num_clusters, run)
    training = cluster_of_row >= 0
    rows = part.samples["sample_index"][training]
    pairs = zip(rows, cluster_of_row[training], strict=True)
    return load_data(config).with_tasks({int(row): names_of_clusters[c] for row, c in pairs})


TRUST = (
    (0.85, "trust is high", "0.94 to 0.96"),
    (0.6, "trust is middling", "0.62 to 0.79; a few fine-tuned subsets tell (--calibrate)"),
    (-1.0, "trust is low", "0.31 to 0.78; fine-tune some subsets first (--calibrate)"),
)
"""From what agreement of checkpoints on, what is said, and Spearman's correlation with fine-tuned values that was measured
there (`docs/decisions.md`)."""

# --- estimates -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Levels:
    """Validation losses (k,) of the base model and of the model trained on all tasks, after so many optimizer steps; nan of
    a target without rows. Where these were not all of the steps, not the `whole` training, `all_tasks` is an estimate."""

    base: np.ndarray
    all_tasks: np.ndarray
    step: int
    whole: bool

    @property
    def names(self) -> tuple[str, str]:
        """Names of the two beside estimates."""
        return "base model (measured)", f"all tasks ({'measured' if self.whole else 'estimated'})"


def known_levels(
    stored: Sequence[StoredPart], parts: Sequence[Part], meta_training: Mapping[str, Any]
) -> Levels | None:
    """The losses that meta-training measured, else those of the store's rows at its first and last checkpoint; None where
    neither has the base model's and a later one."""
    targets, counts = stored[0].targets, parts[0].target.counts
    losses = meta_training.get("validation_losses", {})
    known = [np.array([losses.get(when, {}).get(name, np.nan) for name in targets]) for when in ("base", "last")]
    same_data = meta_training.get("data_fingerprint") == stored[0].manifest["data_fingerprint"]
    if same_data and np.isfinite(known)[:, counts > 0].all():
        return Levels(known[0], known[1], losses["last_step"], losses["whole"])
    first, last = stored[0].manifest["step"], stored[-1].manifest["step"]  # in the order of training
    if first != 0 or last == 0:
        return None
    sums = np.array([parts[0].target.output_sums, parts[-1].target.output_sums])
    base, all_tasks = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return Levels(base, all_tasks, last, whole=False)


def stored(cls: type[Config], typed: Mapping[str, Any]) -> tuple[Config, Path]:
    """The configuration of stage 3 or 4 by the flags that are typed, and the store with the gradients of its estimator."""
    kind = ESTIMATORS.get(typed.get("estimator", "ridge"))
    return from_store(cls, typed, kind.output_function if kind else None)


class Estimator:
    """Estimates from a store, for stages 3 and 4."""

    def __init__(self, config: EstimationConfig, store: Path) -> None:
        if config.estimator not in ESTIMATORS:
            raise ValueError(f"--estimator {config.estimator}: choose one of {', '.join(ESTIMATORS)}")
        self.config, self.store, kind = config, store, ESTIMATORS[config.estimator]
        self.stored: list[StoredPart] = open_store(store, config.load_model_dir, "stage 2")
        manifest = self.stored[0].manifest
        self.targets, self.tasks = self.stored[0].targets, list(manifest["tasks"])
        self.division: str | None = None  # names another division into tasks than the data's own
        task_of_row = None
        samples = self.stored[-1].samples
        self.task_of_row, self.target_tokens = samples["task"], samples["target_tokens"]
        if config.load_clusters:
            self.task_of_row, self.tasks = cluster_tasks(store, self.stored[-1], config.num_clusters, config.run)
            self.division, task_of_row = f"clusters_{len(self.tasks)}", self.task_of_row
        if kind.output_function not in (None, manifest["output_function"]):
            wanted = f"take the gradients with --output_function {kind.output_function} too"
            raise ValueError(f"--estimator {config.estimator} is of {kind.output_function}s; {wanted}")
        self.parts: list[Part] = []
        for part in self.stored:
            by_rows = kind.needs_rows or (part.kernel_is_smaller and not kind.needs_outers)
            options: dict[str, Any] = {"weight_by": config.weight_by, "represented": kind.represented}
            division = task_of_row, len(self.tasks), self.division or "tasks"
            self.parts.append(part.estimation_part(*division, by_rows=by_rows, **options))
        self.has_rows = np.all([part.train.counts > 0 for part in self.parts], axis=0)
        of_losses = manifest["output_function"] == "loss" and not kind.ranks_only
        self.levels = known_levels(self.stored, self.parts, self.meta_training) if of_losses else None
        self._shifts: dict[tuple[float, tuple[int, ...]], np.ndarray] = {}
        self.ranks_only = self.levels is None  # no losses, or their levels are not known: only the order says something
        self._weights: dict[tuple[float, tuple[int, ...]], tuple[np.ndarray, np.ndarray]] = {}
        if self.levels is not None and not self.levels.whole:
            when = f"after {self.levels.step} steps" if self.levels.step > 0 else "at the last checkpoint"
            note = "the loss of all tasks is estimated: it was last measured"
            say_notices([f"{note} {when}, and training may have gone on"])
        if of_losses and self.levels is None:
            say_notices(["estimates are scores, for ranking only: neither the training's manifest nor gradients at its start "
                         "and later say what the losses of the base model and of all tasks are; with checkpoints of another "
                         f"trainer, stage 2 with `{artifacts.BASE}` before them in --load_model_dir says it"])  # fmt: skip

    def __call__(
        self, membership: np.ndarray, targets: Sequence[int] | None = None, rho: float | None = None
    ) -> np.ndarray:
        """Estimates (m, k) of the subsets in `membership` (m, n), or of the given targets only; at another rho.

        Local models of the loss rank subsets; their levels are off. Where losses are known, all estimates of a target are
        shifted by one number, so that the estimate of all tasks is the known loss; this changes no comparison of two
        subsets. The empty subset, which no training follows, has the base model's loss itself.
        """
        columns = list(range(len(self.targets))) if targets is None else list(targets)
        rho = self.config.rho if rho is None else rho
        estimates = self._raw(membership, columns, rho, partial(progress, leave=False))
        if self.levels is not None:
            estimates += self.shift(columns, rho)
            estimates[~np.asarray(membership, bool).any(axis=1)] = self.levels.base[columns]
        return estimates

    def _raw(self, membership: np.ndarray, columns: Sequence[int], rho: float, bar: Any = None) -> np.ndarray:
        options: dict[str, Any] = {"estimator": self.config.estimator, "targets": columns, "rho": rho}
        return estimate(self.parts, membership, weights=self.part_weights(columns, rho), progress=bar, **options)

    def part_weights(self, columns: Sequence[int], rho: float | None = None) -> np.ndarray:
        """How much each checkpoint counts in the estimates of some targets, (p, k)."""
        rho = self.config.rho if rho is None else rho
        if (key := (rho, tuple(columns))) not in self._weights:
            options: dict[str, Any] = {"estimator": self.config.estimator, "targets": columns, "rho": rho}
            self._weights[key] = part_weights(self.parts, **options)
        return self._weights[key][0]

    def agreement(self, columns: Sequence[int]) -> float:
        """How far single checkpoints rank random halves of the tasks alike, the mean rank correlation of two of them for the
        mean over some targets; nan for one checkpoint."""
        self.part_weights(columns)
        weights, by_part = self._weights[self.config.rho, tuple(columns)]
        return float(evaluation.mean_rank_correlation((weights[:, None] * by_part).mean(axis=2).T))

    def trust(self, columns: Sequence[int]) -> str:
        """In words, which checkpoints the estimates of some targets are from, and how far they can be trusted."""
        steps = [part.manifest["step"] for part in self.stored]
        names = map(str, steps) if min(steps) >= 0 else (part.folder.name for part in self.stored)
        where = f"Estimates are from gradients at step {', '.join(names)} of meta-training, each counted alike"
        if not np.isfinite(agreement := self.agreement(columns)):
            return f"{where}; only several that tell subsets apart say how far they can be trusted."
        where_so = "where it was, estimates ranked halves at"
        level, known = next(words for least, *words in TRUST if agreement >= least)
        return f"{where}. These rank random halves at {agreement:.2f} alike: {level}; {where_so} {known}."

    def shift(self, columns: Sequence[int], rho: float) -> np.ndarray:
        """Offsets of the estimates of some targets, (k,), that make those of all tasks the known losses."""
        if self.levels is None:
            return np.zeros(len(columns))
        key = rho, tuple(columns)
        if key not in self._shifts:
            of_all = self._raw(self.has_rows[None], columns, rho)[0]
            self._shifts[key] = self.levels.all_tasks[list(columns)] - of_all
        return self._shifts[key]

    def base_losses(self, targets: Sequence[int]) -> np.ndarray:
        """Validation losses of the base model (k,). ValueError: they are not known."""
        if self.levels is None:
            where = "take gradients of losses there too (of another trainer's checkpoints: --load_model_dir base …)"
            raise ValueError(f"--keep_task compares with the base model's losses, which are not known; {where}")
        return self.levels.base[list(targets)]

    def above_base(self, membership: np.ndarray, targets: Sequence[int]) -> np.ndarray:
        """By how much subsets (m, n) are estimated to raise losses above the base model's, (m, k); errors as there."""
        return self(membership & self.has_rows, targets) - self.base_losses(targets)

    def calibrated(
        self, truth: pd.DataFrame, membership: np.ndarray, targets: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Estimates of subsets (m, n) calibrated on the validation losses of really fine-tuned ones, the mean over runs: these,
        and the lower and upper ends of 90 % intervals, each (m, k). A subset that was fine-tuned is calibrated on the others.

        What estimates miss is taken for a linear function of the displacements, those of each checkpoint alike: as if the
        target's gradient were another.

        Refuses (ValueError) fewer than `MIN_SUBSETS` fine-tuned subsets.
        """
        subsets, values = tables.fine_tuned_values(truth, VALIDATION_LOSS, [self.targets[target] for target in targets])
        if len(subsets) < evaluation.MIN_SUBSETS:
            needed = f"at least {evaluation.MIN_SUBSETS} fine-tuned subsets"
            raise ValueError(f"--calibrate needs {needed}, found {len(subsets)}")
        known = membership_matrix([parse_subset(text) for text in subsets], len(self.tasks))
        asked = np.asarray(membership)
        fine_tuned, of_known, estimates = values.mean(axis=2), self(known, targets), self(membership, targets)
        options: dict[str, Any] = {"estimator": self.config.estimator, "rho": self.config.rho}
        of_parts = displacements(self.parts, np.concatenate([known, asked]), **options)
        alike = [x / (np.sqrt(x[: len(known)].var(axis=0).sum()) or 1.0) for x in of_parts]
        known_features, features = np.split(np.concatenate(alike, axis=1), [len(known)])
        calibrated = evaluation.Calibration(of_known, known_features, fine_tuned)(estimates, features)
        for left_out, subset in enumerate(known):
            others, same = np.arange(len(known)) != left_out, (asked == subset).all(axis=1)
            if same.any():
                without = evaluation.Calibration(of_known[others], known_features[others], fine_tuned[others])
                for of_all, of_others in zip(calibrated, without(estimates[same], features[same]), strict=True):
                    of_all[same] = of_others
        return calibrated

    @property
    def meta_training(self) -> dict[str, Any]:
        """The manifest of the meta-training that the gradients were taken on; empty where it is not ours, or gone."""
        return artifacts.manifest_of(Path(self.stored[0].manifest["checkpoint_dir"]).parent)

    @property
    def facts(self) -> dict[str, Any]:
        """Settings and costs of the estimates, for the tables made of them."""
        manifest, trained = self.stored[0].manifest, self.meta_training
        shown = ("model_key", "projection", "dim", "seed", "output_function", "data_fingerprint")
        names, of_targets = ("base", "all_tasks"), lambda values: dict(zip(self.targets, values.tolist(), strict=True))
        levels = self.levels and {name: of_targets(getattr(self.levels, name)) for name in names}
        seconds = {"meta_training": trained["seconds"]} if trained else {}
        return {
            **{name: manifest[name] for name in shown},
            "data": self.config.data_name,
            "store": str(self.store),
            "tasks": self.tasks,
            "checkpoints": [part.folder.name for part in self.stored],
            "estimator": self.config.estimator,
            "rho": self.config.rho,
            "weight_by": self.parts[0].weight_by,
            "ranks_only": self.ranks_only,
            "levels": levels,
            "seconds": {**seconds, "gradients": sum(part.manifest["seconds"] for part in self.stored)},
            "commands": [*([trained["command"]] if trained else []), manifest["command"]],
        }

    @property
    def targets_with_rows(self) -> list[str]:
        """The targets that have validation rows at every checkpoint."""
        has_rows = np.all([part.target.counts > 0 for part in self.parts], axis=0)
        return [name for name, some in zip(self.targets, has_rows, strict=True) if some]

    def chosen_targets(self, default: Sequence[str] | None = None) -> list[int]:
        """Ids of the targets that `target_task` names; else the default's, else those that are no training task, else all.
        ValueError: no such target, or one without validation rows."""
        names = self.config.target_task or default or tables.own_targets(self.targets_with_rows, self.tasks)
        if not names:
            raise ValueError("no target has validation rows in the store, so nothing can be estimated")
        return self.ids_of(names, "target_task")

    def ids_of(self, names: Sequence[str], flag: str) -> list[int]:
        """Ids of targets that a flag names. ValueError: no such target, or one without validation rows."""
        if unknown := [name for name in names if name not in self.targets]:
            raise ValueError(f"--{flag} {unknown[0]}: the targets are {', '.join(self.targets)}")
        if empty := [name for name in names if name not in self.targets_with_rows]:
            why = "has no validation rows in the store, so nothing can be estimated for it"
            raise ValueError(f"target {empty[0]} {why}; name other targets with --{flag}")
        return [self.targets.index(name) for name in names]


def estimate_subsets(config: EstimateConfig, store: Path) -> None:
    """Estimate the loss of every target for every subset, one row each."""
    started = time.perf_counter()
    if config.evaluate == "displaced" and ESTIMATORS[config.estimator].solver is None:
        raise ValueError(f"--evaluate displaced: estimator {config.estimator} has no solution to displace weights by")
    estimator = Estimator(config, store)
    columns, num_tasks = estimator.chosen_targets(estimator.targets_with_rows), len(estimator.tasks)
    truth = tables.read_table(Path(config.calibrate), of_subsets=True) if config.calibrate else None
    calibration: dict[str, Any] = {"calibrate": config.calibrate}
    if truth is not None:  # before the subsets are drawn and written
        known, _ = tables.fine_tuned_values(truth, VALIDATION_LOSS, [estimator.targets[column] for column in columns])
        calibration["calibrated_on"] = known
    name = config.name(config.run, "_".join(filter(None, [config.save_name, estimator.division])))
    path = Path(config.sampled_tasks) if config.sampled_tasks else artifacts.subset_file(name)
    size, asked_for = config.subset_size or DEFAULT_SUBSET_SIZE, config.number_of_subsets
    subsets = load_or_draw_subsets(path, asked_for, num_tasks, size, config.run, tasks=estimator.tasks)
    subsets = list(dict.fromkeys(subsets))
    sizes, other = sorted({len(subset) for subset in subsets}), []
    if asked_for not in (None, len(subsets)):
        other.append(f"holds {len(subsets):,} subsets, and --number_of_subsets asks for {asked_for:,}")
    if config.subset_size and sizes != [wanted := tasks_in_subset(num_tasks, config.subset_size)]:
        found = counted(sizes[0], "task") if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} tasks"
        other.append(f"holds subsets of {found}, and --subset_size {config.subset_size:g} asks for {wanted}")
    say_notices(f"{path} {what}; the file is taken, remove it to draw others" for what in other)
    membership = membership_matrix(subsets, num_tasks)
    values = {tables.SCORE if estimator.ranks_only else ESTIMATE: estimator(membership, columns)}
    if truth is not None:
        calibrated = estimator.calibrated(truth, membership, columns)
        values |= dict(zip((tables.CALIBRATED, tables.LOW, tables.HIGH), calibrated, strict=True))
        print(f"Calibrated on {config.calibrate}.")
    names = [f"{prefix}/{estimator.targets[column]}" for prefix in values for column in columns]
    frame = pd.DataFrame(np.concatenate(list(values.values()), axis=1), columns=names)
    frame.insert(0, "subset", [subset_text(subset) for subset in subsets])
    frame.insert(1, "run", config.run)
    if config.evaluate == "displaced":
        frame = pd.concat([frame, displaced_values(config, estimator, membership)], axis=1)
    folder, facts = artifacts.results_dir(config.results), estimator.facts
    written = folder / artifacts.ESTIMATES_FILE
    tables.write_table(written, frame)
    facts["seconds"]["estimation"] = round(time.perf_counter() - started, 2)
    facts["commands"].append(command_typed())
    select = f"python fast_estimate_forward_selection.py{named(config)}"
    facts |= {"next": select, "targets": estimator.targets, "subsets": str(path), **calibration}
    facts |= {"peak_memory": spent(started)["peak_memory"], "files": artifacts.file_sizes(folder, [written.name])}
    artifacts.write_manifest(folder, facts)
    print(
        f"Wrote {written}: estimates of {counted(len(subsets), 'subset')} ({path}) for "
        f"{counted(len(columns), 'target')} in {time.perf_counter() - started:.1f} s. "
        f"Next: {select}, or python notebook/select_random_ensemble.py {folder}"
    )


def displaced_values(config: EstimateConfig, estimator: Estimator, membership: np.ndarray) -> pd.DataFrame:
    """Validation metrics of the model at w* + lift(x_S) of the estimator, a row per subset: columns
    `displaced_loss/<target>` and, where answers are judged, `displaced_accuracy/<target>`.

    w* is the last checkpoint of the store, or the one that `load_model_dir` names. With `scale` the displacement has
    that length, relative to the norm of the trained weights.
    """
    from src.finetune import evaluate, target_metrics
    from src.models import displaced
    from src.stage_collect import ModelAtPart
    from src.stage_train import training_plan

    at = ModelAtPart(config, estimator.stored[-1])
    found = solutions(estimator.parts[-1], membership, estimator=config.estimator, rho=config.rho)
    records = []
    for solution in progress(found, desc="displaced models", unit="subset"):
        displacement, _ = at.displacement(solution, config.scale)
        with displaced(at.model, displacement):
            evaluation = evaluate(at.model, at.datamodule, at.hardware, training_plan(config), ("validation",))
        metrics = target_metrics(at.data, evaluation, ("validation",))
        records.append({name.replace("validation_", "displaced_"): value for name, value in metrics.items()})
    return pd.DataFrame(records)
