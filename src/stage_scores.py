"""What stage 3's table says without the store: how good its estimates are, and random-ensemble scores of the tasks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src import artifacts, evaluation, figures, selection, tables
from src.console import command_typed, counted, spent, waiting_for
from src.subsets import membership_matrix, write_subsets
from src.tables import ESTIMATE, parse_subset, subset_text

LEGEND = """lds: Spearman over subsets, with its 90 % bootstrap interval; lds_top_quarter: of the quarter with the lowest
fine-tuned values; attainable: the highest lds that is to be expected of any estimate, as far as the runs agree."""


def compare(estimates_file: Path, truth_file: Path, metric: str, target_task: Sequence[str] | None) -> pd.DataFrame:
    """Compare estimates with fine-tuned values: a table and a figure beside them.

    The targets that are no training task, else all that both tables have, are judged over the subsets that both have.
    The base model and training on all tasks, where the truth has them, stand as predictors: they give every subset the
    same value. ValueError: the tables have no such target in common, or fewer than three subsets.
    """
    started, path, truth = time.perf_counter(), estimates_file, tables.read_table(truth_file, of_subsets=True)
    estimates = tables.read_table(path, of_subsets=True).drop_duplicates("subset").set_index("subset")
    manifest = artifacts.manifest_of(path.parent)
    tasks, ranks_only = manifest.get("tasks", []), manifest.get("ranks_only", False)
    of_estimates = tables.estimate_prefix(estimates)
    in_truth = tables.columns_of(truth, metric)
    available = [name for name in tables.columns_of(estimates, of_estimates) if name in in_truth]
    targets = target_task or tables.own_targets(available, tasks)
    if unknown := [name for name in targets if name not in available]:
        both = ", ".join(available) or "no target in common"
        raise ValueError(f"--target_task {unknown[0]}: both tables have {both}")
    subsets, values = tables.fine_tuned_values(truth, metric, targets)
    common = [position for position, text in enumerate(subsets) if text in estimates.index]
    if len(common) < 3:
        raise ValueError(f"{path} and {truth_file} have {len(common)} subsets in common; a rank correlation needs 3")
    subsets, values = [subsets[position] for position in common], values[common]
    estimated = tables.RANKING_ONLY if ranks_only else ESTIMATE
    predictions = {
        name: estimates.loc[subsets, [f"{prefix}/{target}" for target in targets]].to_numpy(float)
        for name, prefix in ((estimated, of_estimates), (tables.CALIBRATED, tables.CALIBRATED))
        if tables.columns_of(estimates, prefix)
    }
    known = {"base model": "", "all tasks": subset_text(range(len(tasks)))} if tasks else {"base model": ""}
    for name, text in known.items():
        if (truth["subset"] == text).any():
            rows = truth.loc[truth["subset"] == text, [f"{metric}/{target}" for target in targets]]
            constant = tables.lower_is_better(rows, metric).mean(axis=0)
            predictions[name] = np.broadcast_to(constant, predictions[estimated].shape)
    members = membership_matrix([parse_subset(text) for text in subsets], len(tasks)) if tasks else None
    inclusion = evaluation.own_inclusion(members, targets, tasks) if members is not None else None
    with waiting_for("bootstrap intervals"):
        table = evaluation.comparison(predictions, values, targets, inclusion)
    table.insert(2, "subsets", len(subsets))
    if ranks_only:
        table.loc[table["predictor"] == estimated, ["relative_error", "squared_relative_error"]] = np.nan
    written = [path.with_name(artifacts.COMPARISON_FILE), path.with_name(artifacts.COMPARISON_FIGURE)]
    facts = {"estimates": str(path), "truth": str(truth_file), "metric": metric, **spent(started)}
    tables.write_result(written[0], table, **facts, command=command_typed())
    about_run = figures.about_run(manifest, *(targets if len(targets) == 1 else []))
    drawn: dict[str, Any] = {"about": about_run, "ranks_only": ranks_only}
    figures.comparison_figure(predictions[estimated], values, table, estimated, written[1], **drawn)
    shown = table[table["target"].isin([evaluation.AVERAGE, evaluation.MEAN] if len(targets) > 1 else targets)]
    print(shown.round(3).to_string(index=False))
    print(LEGEND)
    if left_out := len(set(subsets) & set(manifest.get("calibrated_on", []))):
        of = f"{counted(left_out, 'subset')} of {len(subsets)}"
        print(f"{tables.CALIBRATED}: {of} calibrated the others; each of these is estimated without itself.")
    about = f"{counted(len(subsets), 'subset')}, {counted(len(targets), 'target')}"
    print(f"Wrote {written[0]} and {written[1]}: {about}. Next: stage 3 again with --calibrate {truth_file}")
    return table


def random_ensemble(
    results: str, target_task: Sequence[str] | None = None, *,
    top_k: int | None = None, ratio: float | None = None, threshold: float | None = None,
) -> tuple[int, ...]:  # fmt: skip
    """Score each task by the mean estimate, over some targets, of the subsets that hold it, and keep the best-scoring tasks
    as `selection.select_by_score` does. `results` is the folder of stage 3's estimates, below `results/`, or its name."""
    started = time.perf_counter()
    folder = artifacts.results_folder(results)
    stage_3 = "fast_estimate_linear_regression.py or fast_estimate_linear_regression_alpaca.py"
    manifest = artifacts.read_manifest(folder, stage_3)
    repair = "Run stage 3 again, it was cut off or the table was changed."
    artifacts.check_files(folder, manifest, repair, [artifacts.ESTIMATES_FILE])
    tasks, frame = manifest["tasks"], tables.read_table(folder / artifacts.ESTIMATES_FILE, of_subsets=True)
    prefix = tables.estimate_prefix(frame)
    targets = target_task or tables.own_targets(tables.columns_of(frame, prefix), tasks)
    membership = membership_matrix([parse_subset(text) for text in frame["subset"]], len(tasks))
    values = tables.mean_over_targets(frame, prefix, targets)
    scores, errors = selection.random_ensemble_scores(membership, values)
    selected = selection.select_by_score(scores, top_k=top_k, ratio=ratio, threshold=threshold)
    table = pd.DataFrame({"task": range(len(tasks)), "name": tasks, "score": scores, "standard_error": errors})
    table["selected"] = table["task"].isin(selected)
    chosen = artifacts.subset_file(f"{folder.relative_to(artifacts.RESULTS)}_random_ensemble")
    written, figure = folder / artifacts.SCORES_FILE, folder / artifacts.SCORES_FIGURE
    facts = {"targets": targets, **spent(started), "command": command_typed()}
    tables.write_result(written, table.sort_values("score"), **facts)
    about = figures.about_run(manifest, ", ".join(targets), counted(len(values), "random subset"))
    drawn: dict[str, Any] = {"about": about, "ranks_only": manifest.get("ranks_only", False)}
    figures.scores_figure(table, selection.ranking_convergence(membership, values), figure, **drawn)
    write_subsets(chosen, [selected], comment=f"random ensemble for {', '.join(targets)}", tasks=tasks)
    print(
        f"Selected {len(selected)} of {len(tasks)} tasks for {', '.join(targets)}: {tables.names_of(selected, tasks)}\n"
        f"Wrote {chosen}, {written}, {figure}. Next: fine-tune the base model on it with stage 1's script and "
        f"--subset_file {chosen}"
    )
    return selected
