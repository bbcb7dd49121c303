"""Stage 4: the subset to train on, by a search on the estimates."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src import artifacts, figures, selection, tables
from src.config import SelectConfig, TrainConfig, recorded
from src.console import command_typed, counted, progress, spent
from src.estimation import mixture_weights
from src.run_data import load_data, named, valid_subset
from src.selection import SelectionPath
from src.stage_estimate import Estimator, clustered
from src.subsets import membership_matrix, write_subsets, write_task_weights
from src.tables import ESTIMATE, VALIDATION_LOSS, subset_text


def search(config: SelectConfig, estimator: Estimator, columns: Sequence[int], kept: Sequence[int]) -> SelectionPath:
    """The search of `method` for the mean over some targets; before refining, a few steps past the best. Losses of the
    targets that are `kept` stay within --tolerance_keep."""
    if config.method not in selection.METHODS:
        raise ValueError(f"--method {config.method}: choose one of {', '.join(selection.METHODS)}")
    num_tasks, rows_of_task = len(estimator.tasks), estimator.parts[0].train.counts
    together = list(dict.fromkeys([*columns, *kept]))  # solved once for all of them

    def estimates(membership: np.ndarray) -> np.ndarray:
        found = estimator(membership & estimator.has_rows, together)
        of_target = found[:, : len(columns)].mean(axis=1)
        if not kept:
            return of_target
        rises = found[:, [together.index(column) for column in kept]] - estimator.base_losses(kept)
        return np.stack([of_target, rises.max(axis=1) - config.tolerance_keep], axis=1)

    path = selection.METHODS[config.method].search(
        estimates,
        num_tasks,
        start_from=valid_subset(config.start_from, num_tasks, "start_from"),
        max_tasks=config.max_tasks,
        budget_rows=config.budget_rows,
        rows_of_task=rows_of_task,
        past_best=3 if config.refine else 1,
        try_at_most=config.try_at_most,
        progress=progress,
    )
    num_rows = int(rows_of_task[list(path.selected)].sum())
    if len(path.selected) > (config.max_tasks or num_tasks) or num_rows > (config.budget_rows or num_rows):
        found = f"{counted(len(path.selected), 'task')} with {counted(num_rows, 'row')}"
        beyond = "which is beyond --max_tasks or --budget_rows; it does not know these flags"
        raise ValueError(f"--method {config.method} selected {found}, {beyond}")
    return path


def select(config: SelectConfig, store: Path) -> list[tuple[int, ...]]:
    """Search on the estimates, for the targets together or for each; write the subsets, the paths and a figure."""
    started, estimator = time.perf_counter(), Estimator(config, store)
    kept, method = estimator.ids_of(config.keep_task, "keep_task"), f"{config.method} selection"
    if kept and config.refine is None:  # estimates of rises are too low to hold a limit: docs/selection.md
        config = dataclasses.replace(config, refine=1)
    columns = [c for c in estimator.chosen_targets() if config.target_task or c not in kept]
    if not columns:
        raise ValueError(
            f"--keep_task names every target ({', '.join(config.keep_task)}); name one to lower with --target_task"
        )
    folder = artifacts.results_dir(config.results)
    chosen = artifacts.subset_file(f"{config.results}_{config.method}_selection")
    groups = [[column] for column in columns] if config.per_target else [columns]
    labels = [", ".join(estimator.targets[column] for column in group) for group in groups]
    paths = [search(config, estimator, group, kept) for group in groups]
    selected = [path.selected for path in paths]
    if config.refine:
        selected = [refined(config, estimator, group, kept, path) for group, path in zip(groups, paths, strict=True)]
    steps = [path_table(*of_path, estimator) for of_path in zip(paths, selected, labels, strict=True)]
    written = [chosen, folder / artifacts.SELECTION_FILE]
    if estimator.levels is not None and (kept or (config.per_target and len(columns) > 1)):
        written.append(folder / artifacts.TRADEOFF_FIGURE)
        write_tradeoff(config, estimator, groups, paths, steps, written[-1])
    facts = {
        "targets": labels,
        "keep_task": config.keep_task,
        "tolerance_keep": config.tolerance_keep,
        **estimator.facts,
    }
    references = [reference_estimates(estimator, group) for group in groups]
    training, trust = f"python {config.training_script}{named(config)}", estimator.trust(columns)
    facts |= {"references": dict(zip(labels, references, strict=True)), "trust": trust, "training": training}
    facts |= {"subset_file": str(chosen), **spent(started), "command": command_typed()}
    tables.write_result(written[1], pd.concat(steps), **facts)
    written.append(folder / artifacts.SOURCES_FILE)
    of_groups = zip(groups, labels, selected, strict=True)
    tables.write_table(written[-1], pd.concat(source_table(estimator, *of_group) for of_group in of_groups))
    comment = "\n".join(f"{method} for {label}" for label in labels)
    write_subsets(chosen, selected, comment=comment, tasks=estimator.tasks)
    if config.per_target:
        written += write_affinity(estimator, columns, folder)
    else:
        written.append(folder / artifacts.SELECTION_FIGURE)
        drawn: dict[str, Any] = {"title": method.capitalize(), "about": figures.about_run(facts, labels[0])}
        drawn |= {"references": references[0], "ranks_only": estimator.ranks_only}
        figures.selection_figure(steps[0], estimator.tasks, written[-1], **drawn)
    if config.weights:
        weights = estimator.part_weights(columns)
        shares, course = mixture_weights(estimator.parts, columns, rho=config.rho, weights=weights, progress=progress)
        written.append(artifacts.weights_file(config.results))
        write_task_weights(written[-1], estimator.tasks, shares)
        course += estimator.shift(columns, config.rho).mean()
        called = tables.RANKING_ONLY if estimator.ranks_only else ESTIMATE
        print(f"Mixture weights: {called} {course[0]:.4f} with equal weights, {course.min():.4f} with these.")
        found = {"target": ", ".join(estimator.targets[column] for column in columns), called: float(course.min())}
        artifacts.write_json(written[-1].with_suffix(".json"), {"estimates": [found], "command": command_typed()})
    for of_group in zip(selected, labels, groups, references, strict=True):
        say_selected(estimator, *of_group)
    if kept:
        say_kept(config, estimator, kept, selected, paths)
    print(trust)
    print(
        f"Wrote {', '.join(map(str, written))}. Next: fine-tune the base model on it: {training} --subset_file {chosen}"
    )
    return selected


def reference_estimates(estimator: Estimator, columns: Sequence[int]) -> dict[str, float]:
    """Baselines of a selection: the mean over some targets of the base model's loss and of all tasks'; where losses are
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
        f"Selected {len(subset)} of {len(tasks)} tasks for {label}: {tables.names_of(subset, tasks)}\n"
        f"{(tables.RANKING_ONLY if estimator.ranks_only else ESTIMATE).capitalize()}: {estimate:.4g} with these{beside}."
    )
    if estimator.levels is not None and estimate >= (base := estimator.levels.base[list(columns)].mean()):
        measured = f"its measured loss, {base:.4g}, is not above the estimate"
        print(f"No selection is estimated to beat the base model: {measured}.")


def refined(
    config: SelectConfig, estimator: Estimator, columns: Sequence[int], kept: Sequence[int], path: SelectionPath
) -> tuple[int, ...]:
    """Fine-tune the subsets on a search's path with the best estimates, and return the best of them: the lowest mean
    validation loss of the targets. Where none of them keeps, in every run, what is to be kept, go on with the next.
    Their results stand with those of stage 1's script. ValueError: none on the path does."""
    from src.stage_train import fine_tune_subsets

    steps, at_once = sorted(path.steps, key=lambda step: step.estimate), config.refine or 1
    names = {f.name for f in dataclasses.fields(TrainConfig)} - {"load_model_dir"}
    training = TrainConfig(**{name: value for name, value in vars(config).items() if name in names})
    of_store = recorded(config) | {"load_clusters": True}
    data = clustered(training, of_store, config.run) if config.load_clusters else load_data(training)
    bases = pd.Series(
        {f"{VALIDATION_LOSS}/{estimator.targets[c]}": estimator.base_losses([c])[0] for c in kept}, dtype=float
    )
    for first in range(0, len(steps), at_once):
        subsets = [step.subset for step in steps[first : first + at_once]]
        fine_tune_subsets(training, data, subsets, keep_model=False)
        table = tables.read_table(artifacts.results_dir(config.results) / artifacts.RESULTS_FILE)
        table["mean"] = tables.mean_over_targets(table, VALIDATION_LOSS, [estimator.targets[c] for c in columns])
        of_subset, texts = table.groupby("subset"), [subset_text(subset) for subset in subsets]
        worst = of_subset[list(bases.index)].max().loc[texts] - bases  # of all runs
        within = (worst <= config.tolerance_keep).all(axis=1)
        if within.any():
            best = int(np.argmin(of_subset["mean"].mean().loc[texts].where(within, np.inf)))
            if measured := ", ".join(f"{name} {rise:+.3g}" for name, rise in worst.iloc[best].items()):
                print(f"Above the base model's, measured at subset {first + best + 1} of {len(steps)}: {measured}.")
            return subsets[best]
    found = f"each of the {counted(len(steps), 'subset')} of the search raises a loss of {', '.join(config.keep_task)} by more"
    repair = "keep the base model, or raise the tolerance"
    raise ValueError(f"{found} than --tolerance_keep {config.tolerance_keep:g} when it is really fine-tuned; {repair}")


def say_kept(
    config: SelectConfig, estimator: Estimator, kept: Sequence[int], selected: Sequence[tuple[int, ...]],
    paths: Sequence[SelectionPath],
) -> None:  # fmt: skip
    """Print what the selections are estimated to do to the targets that are kept, and which tasks were refused for them."""
    of_selected = estimator.above_base(membership_matrix(selected, len(estimator.tasks)), kept).max(axis=0)
    rises = zip(config.keep_task, of_selected, strict=True)
    changes = ", ".join(f"{name} {rise:+.3g}" for name, rise in rises)
    limit = f"--tolerance_keep {config.tolerance_keep:g}"
    print(f"Kept, in nats per token above the base model's loss, estimated ({limit}): {changes}.")
    if refused := sorted({task for path in paths for step in path.steps for task in step.refused}):
        names = tables.names_of(refused, estimator.tasks)
        print(f"Refused for it at a step, though estimated to lower the target more: {names}")


def write_tradeoff(
    config: SelectConfig, estimator: Estimator, groups: Sequence[Sequence[int]], paths: Sequence[SelectionPath],
    steps: Sequence[pd.DataFrame], figure: Path,
) -> None:  # fmt: skip
    """Add to the steps of each search by how much they raise the worst of the targets to keep, or of the other targets, and
    which tasks were refused; draw the one against the other."""
    num_tasks, limit = len(estimator.tasks), config.tolerance_keep if config.keep_task else None
    everything = [column for group in groups for column in group]
    for group, path, table in zip(groups, paths, steps, strict=True):
        others = estimator.ids_of(config.keep_task, "keep_task") or [
            column for column in everything if column not in group
        ]
        members = membership_matrix([step.subset for step in path.steps], num_tasks)
        table["worst_rise"] = estimator.above_base(members, others).max(axis=1)
        table["refused"] = ["; ".join(estimator.tasks[task] for task in step.refused) for step in path.steps]
    bases, about = [estimator.base_losses(group).mean() for group in groups], figures.about_run(estimator.facts)
    figures.tradeoff_figure(steps, bases, figure, limit, about)


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
            tables.SCORE if estimator.ranks_only else ESTIMATE: [step.estimate for step in path.steps],
            "selected": [set(step.subset) <= kept if forward else set(step.subset) >= kept for step in path.steps],
            "subset": [subset_text(step.subset) for step in path.steps],
        }
    )


def write_affinity(estimator: Estimator, columns: Sequence[int], folder: Path) -> list[Path]:
    """How much each task alone is estimated to lower each target's loss: a table and a heat map."""
    alone = np.vstack([np.zeros(len(estimator.tasks), bool), np.eye(len(estimator.tasks), dtype=bool)])
    estimates = estimator(alone & estimator.has_rows, columns)
    targets = [estimator.targets[column] for column in columns]
    frame = pd.DataFrame(estimates[0] - estimates[1:], columns=targets)
    table, figure = folder / artifacts.AFFINITY_FILE, folder / artifacts.AFFINITY_FIGURE
    drawn: dict[str, Any] = {"about": figures.about_run(estimator.facts), "ranks_only": estimator.ranks_only}
    figures.affinity_figure(frame.to_numpy(), estimator.tasks, targets, figure, **drawn)
    frame.insert(0, "task", estimator.tasks)
    tables.write_table(table, frame)
    return [table, figure]


def source_table(estimator: Estimator, columns: Sequence[int], label: str, subset: Sequence[int]) -> pd.DataFrame:
    """What each source has and does to the mean over some targets: rows, tokens that are trained on, `affinity` (how much it
    alone is estimated to lower the loss), and `change` of the selection's estimate if it alone is taken out or put in."""
    num_tasks, one = len(estimator.tasks), np.eye(len(estimator.tasks), dtype=bool)
    chosen = membership_matrix([tuple(subset)], num_tasks) > 0
    asked = np.concatenate([np.zeros_like(chosen), one, chosen, chosen ^ one])
    nothing, alone, of_chosen, changed = np.split(
        estimator(asked & estimator.has_rows, columns).mean(axis=1), [1, 1 + num_tasks, 2 + num_tasks]
    )
    is_training = estimator.task_of_row >= 0
    tokens = np.bincount(estimator.task_of_row[is_training], estimator.target_tokens[is_training], num_tasks)
    return pd.DataFrame(
        {
            "target": label,
            "name": estimator.tasks,
            "rows": estimator.parts[0].train.counts,
            "tokens": tokens.astype(int),
            "affinity": nothing - alone,
            "selected": chosen[0],
            "change": changed - of_chosen,
        }
    )
