"""What fine-tuning showed: of everything in a results table the best on validation rows, and how sure that is.

Estimates choose what to fine-tune; this chooses among what was fine-tuned, the base model included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import t as student

from src.paths import RESULTS_FILE, losses_file
from src.tables import (
    VALIDATION_LOSS,
    columns_of,
    mean_over_targets,
    names_of,
    own_targets,
    parse_subset,
    read_table,
    subset_text,
)


@dataclass(frozen=True)
class Answer:
    """The best of what was fine-tuned: `subset` (empty is the base model), and what to say about it, a line each."""

    subset: tuple[int, ...]
    lines: tuple[str, ...]


def best_fine_tuned(folder: Path, tasks: Sequence[str], chosen_by: Mapping[str, str] | None = None) -> Answer:
    """The subset with the lowest validation loss of a results folder; of equals the smallest.

    Args:
        folder: `results/<name>` with fine-tuned values.
        tasks: Names of the tasks.
        chosen_by: What chose a subset, by its text.
    """
    truth = read_table(folder / RESULTS_FILE, of_subsets=True)
    targets = own_targets(columns_of(truth, VALIDATION_LOSS), tasks)
    truth["loss"] = mean_over_targets(truth, VALIDATION_LOSS, targets)
    means = truth.groupby("subset")["loss"].mean()
    ranked = sorted(means.index, key=lambda text: (means[text], len(parse_subset(text))))
    best, everything = ranked[0], subset_text(range(len(tasks)))
    called = {"": "the base model", everything: f"all {len(tasks)} sources"}
    rest = [text for text in ranked[1:] if text not in called]
    rivals = rest[:1] if best == "" and rest else [text for text in ("", everything) if text in ranked[1:]] + rest[:1]
    if best == "":
        headline = "Nothing here helps: keep the base model."
    else:
        by = f", by {chosen_by[best]}" if chosen_by and best in chosen_by else ""
        ids = parse_subset(best)
        headline = f"Train on: {names_of(ids, tasks)} ({len(ids)} of {len(tasks)} sources{by})."
    said, basis = [], ""
    for text in rivals:
        name = called.get(text) or names_of(parse_subset(text), tasks, 6)
        comparison, basis = _compared(folder, truth, best, text, targets, name)
        said.append(comparison)
    found = f"Validation loss {means[best]:.3f}, the lowest of {len(means)} subsets that were tried"
    if "" not in means.index:
        found += " (the base model is not among them: --task_idxes without ids evaluates it)"
    return Answer(parse_subset(best), (headline, f"{'; '.join([found, *said])}.", *([basis] if basis else [])))


def _compared(
    folder: Path, truth: pd.DataFrame, best: str, other: str, targets: Sequence[str], name: str
) -> tuple[str, str]:
    """How much lower the best's loss is than another's, in words, and what that rests on.

    The variance of the difference is that of the paired differences of validation rows, where both have them, plus that
    of the seeds, where there are several.
    """
    by_run = truth.pivot_table(index="run", columns="subset", values="loss")
    of_runs = (by_run[other] - by_run[best]).dropna()
    gap = float(of_runs.mean() if len(of_runs) else by_run[other].mean() - by_run[best].mean())
    parts, basis = [], []  # variances of the difference, with their degrees of freedom
    paths = [[losses_file(folder, parse_subset(text), run) for run in of_runs.index] for text in (best, other)]
    if len(of_runs) and all(path.is_file() for path in (*paths[0], *paths[1])):
        losses = [
            pd.concat(map(pd.read_csv, of_subset)).groupby(["target", "sample_index"])["loss"].mean()
            for of_subset in paths
        ]
        rows = (losses[1] - losses[0]).groupby("target").agg(["var", "count"]).loc[list(targets)]
        if rows["count"].min() > 1:
            parts.append(
                (float((rows["var"] / rows["count"]).sum()) / len(rows) ** 2, int(rows["count"].sum()) - len(rows))
            )
            basis.append(f"{rows['count'].sum():,} validation rows")
    if len(of_runs) > 1:
        parts.append((float(of_runs.var() / len(of_runs)), len(of_runs) - 1))
        basis.append(f"{len(of_runs)} seeds")
    if not parts:
        return f"{gap:.3f} above it: {name}", "How sure this is cannot be said of one seed; --runs 2 or more shows it."
    total = sum(variance for variance, _ in parts)
    freedom = total**2 / max(sum(variance**2 / degrees for variance, degrees in parts), np.finfo(float).tiny)
    half = float(student.ppf(0.95, max(freedom, 1))) * math.sqrt(total)
    interval = f"90 % interval {gap - half:.3f} to {gap + half:.3f}"
    words = (
        f"lower than that of {name} by {gap:.3f}" if gap > half else f"no difference from {name} is shown: {gap:.3f}"
    )
    alone = "" if len(of_runs) > 1 else "; what another seed would change is not in them (--runs 2 or more shows it)"
    return f"{words} ({interval})", f"Intervals are over {' and '.join(basis)}{alone}."
