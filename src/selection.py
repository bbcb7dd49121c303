"""Choose a subset of tasks by estimates alone: greedy searches and random-ensemble scores (arXiv:2409.19458).

A search needs nothing but a function from subsets to estimates, lower is better. Shapes: n tasks, m subsets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import spearmanr

Estimate = Callable[[np.ndarray], np.ndarray]
"""Membership (m, n) bool -> estimates (m,); or (m, 2), with how far subsets are beyond a limit: above 0 is not taken."""


@dataclass(frozen=True)
class Step:
    """One step of a search: the subset after `task` was added (or removed), and its estimate."""

    subset: tuple[int, ...]
    task: int
    estimate: float
    refused: tuple[int, ...] = ()  # tasks whose estimates are lower, and that go beyond a limit


@dataclass(frozen=True)
class SelectionPath:
    """A search: where it started, every step taken in order, and the best subset on the way."""

    start: tuple[int, ...]
    start_estimate: float
    steps: tuple[Step, ...]
    selected: tuple[int, ...]
    selected_estimate: float


def forward_selection(
    estimate: Estimate,
    num_tasks: int,
    *,
    start_from: Sequence[int] = (),
    max_tasks: int | None = None,
    budget_rows: int | None = None,
    rows_of_task: Sequence[int] | np.ndarray | None = None,
    past_best: int = 1,
    direction: str = "forward",
    try_at_most: int | None = None,
    progress: Callable[..., Any] | None = None,
) -> SelectionPath:
    """Repeatedly add the best task until the estimate no longer falls; or, backward, remove the worst.

    Every step estimates all subsets that are one task away, in one batch, and takes the lowest (of equals, the lowest id). The
    first step from the empty set always counts; a backward search goes on until it is within the limits, and never removes
    the last task.

    Args:
        start_from: tasks that are in at the start. Backward, none means all.
        max_tasks, budget_rows: the most tasks and rows (of rows_of_task, (n,)) that a subset may have.
        past_best: steps to take beyond the best subset before the search ends.
        try_at_most: from the second step on, estimate only this many of the subsets: those whose task gave the lowest
            estimate when it was last tried. An approximation, for thousands of tasks; None tries all.
        progress: makes a progress bar, called as progress(desc=..., total=..., unit=...).

    Raises:
        ValueError: a start out of range or beyond the limits, no task within them, or an estimate that is not a number.
    """
    forward, rows = direction == "forward", None if rows_of_task is None else np.asarray(rows_of_task)
    if wrong := [task for task in start_from if not 0 <= task < num_tasks]:
        raise ValueError(f"start_from holds task {wrong[0]}; tasks are 0 to {num_tasks - 1}")

    def allowed(subsets: np.ndarray) -> np.ndarray:
        """Whether subsets (..., n) are within both limits."""
        few = np.sum(subsets, axis=-1) <= (num_tasks if max_tasks is None else max_tasks)
        return few if budget_rows is None else few & (subsets @ rows <= budget_rows)

    def estimates(subsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Estimates of subsets, and whether they keep to the limit that these come with."""
        found = np.asarray(estimate(subsets), float).reshape(len(subsets), -1)
        if (wrong := np.isnan(found).any(axis=1)).any():
            raise ValueError(f"the estimate of subset {_tasks(subsets[np.argmax(wrong)])} is not a number")
        return found[:, 0], np.all(found[:, 1:] <= 0, axis=1)

    current = np.zeros(num_tasks, bool)
    current[list(start_from) if forward or len(start_from) else slice(None)] = True
    if forward and not allowed(current):
        raise ValueError(f"the {current.sum()} tasks of start_from are beyond max_tasks or budget_rows already")
    (start_estimate, is_within), start = (of_start.item() for of_start in estimates(current[None])), current
    is_choice = current.any() and allowed(current) and is_within
    best, best_estimate = (current, start_estimate) if is_choice else (None, np.inf)
    steps, singles = list[Step](), np.eye(num_tasks, dtype=bool)
    last_estimates, beyond = np.full(num_tasks, -np.inf), 0  # a task that could not be tried yet comes first
    with progress(desc=f"{direction} selection", total=num_tasks, unit="step") if progress else nullcontext() as bar:
        while beyond < past_best:
            movable = np.flatnonzero(~current if forward else current)
            candidates = current ^ singles[movable]
            is_open = allowed(candidates) if forward else candidates.any(axis=1)
            movable, candidates = movable[is_open], candidates[is_open]
            if not len(movable):
                break
            if try_at_most is not None and steps:
                promising = np.sort(np.argsort(last_estimates[movable], kind="stable")[:try_at_most])
                movable, candidates = movable[promising], candidates[promising]
            values, within = estimates(candidates)
            last_estimates[movable] = values
            if not within.any():
                break
            chosen = int(np.argmin(np.where(within, values, np.inf)))
            current, value = candidates[chosen], float(values[chosen])
            refused = movable[~within & (values < value)]
            steps.append(Step(_tasks(current), int(movable[chosen]), value, tuple(refused.tolist())))
            if bar is not None:
                bar.update(1)
            if allowed(current):
                improved = best is None or value < best_estimate
                best, best_estimate, beyond = (current, value, 0) if improved else (best, best_estimate, beyond + 1)
    if best is None:
        raise ValueError("no task fits into max_tasks, budget_rows and tolerance_keep; raise them")
    return SelectionPath(_tasks(start), start_estimate, tuple(steps), _tasks(best), best_estimate)


@dataclass(frozen=True)
class Method:
    """A way to search: `search(estimate, num_tasks, **options)` with the options of `forward_selection`."""

    search: Callable[..., SelectionPath]
    meaning: str


METHODS = {
    "forward": Method(forward_selection, "repeatedly add the task that helps most"),
    "backward": Method(partial(forward_selection, direction="backward"), "repeatedly remove the worst task"),
}
"""Searches by name. To add one, write a function that returns a `SelectionPath` and name it here."""


def random_ensemble_scores(membership: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """T_j = mean of the values (m,), estimated or fine-tuned, of the subsets that contain task j; lower is better.

    Returns:
        Scores (n,) and their standard errors (n,), nan for a task that is in one subset only; refused (ValueError) where a
        value is not finite or a task is in no subset.
    """
    if not np.isfinite(values).all():
        raise ValueError(f"the value of subset {int(np.argmin(np.isfinite(values)))} is not finite")
    counts = membership.sum(axis=0)
    if not counts.all():
        missing = ", ".join(map(str, np.flatnonzero(counts == 0)))
        raise ValueError(f"tasks {missing} are in none of the {len(values)} subsets; take more or larger subsets")
    scores = values @ membership / counts
    squares = (((values[:, None] - scores) * membership) ** 2).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return scores, np.sqrt(squares / (counts - 1) / counts)


def ranking_convergence(membership: np.ndarray, values: np.ndarray, points: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """How soon the ranking of the tasks settles: numbers m' of subsets, evenly spaced by ratio from the first that leaves no
    task out, and Spearman of the scores of the first m' with those of all; (points,) or fewer."""
    final, _ = random_ensemble_scores(membership, values)
    covered = np.flatnonzero(np.logical_or.accumulate(membership).all(axis=1))
    sizes = np.unique(np.geomspace(covered[0] + 1, len(values), points).round().astype(int))
    scores = [random_ensemble_scores(membership[:size], values[:size])[0] for size in sizes]
    return sizes, np.array([spearmanr(of_first, final).statistic for of_first in scores])


def select_by_score(
    scores: np.ndarray, *, top_k: int | None = None, ratio: float | None = None, threshold: float | None = None
) -> tuple[int, ...]:
    """The tasks with the lowest scores (n,): top_k of them, this ratio of the tasks (at least one), or those not above the
    threshold. Default: the mean of the scores as threshold, so that a task stays when subsets with it are better than average.
    """
    if sum(rule is not None for rule in (top_k, ratio, threshold)) > 1:
        raise ValueError("give one of top_k, ratio and threshold, not several")
    if ratio is not None:
        top_k = max(1, round(ratio * len(scores)))
    if top_k is not None:
        if not 1 <= top_k <= len(scores):
            raise ValueError(f"top_k must be 1 to {len(scores)}, found {top_k}")
        return tuple(sorted(np.argsort(scores, kind="stable")[:top_k].tolist()))
    # the mean of equal scores may be rounded to below them
    limit = max(scores.mean(), scores.min()) if threshold is None else threshold
    if limit < scores.min():
        raise ValueError(f"no score is at or below the threshold {limit:g}; the lowest is {scores.min():g}")
    return _tasks(scores <= limit)


def _tasks(subset: np.ndarray) -> tuple[int, ...]:
    """The ids of a membership row (n,)."""
    return tuple(np.flatnonzero(subset).tolist())
