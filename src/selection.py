"""Choosing a subset of tasks by estimates alone: forward selection, backward elimination, random-ensemble scores.

Why this module exists: the searches of the paper (arXiv:2409.19458) need nothing but a function from subsets
to estimates, so they know no estimator, model or file, and tests plant their own. Estimates are lower-is-better.

Shapes: n tasks, m subsets.
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
"""Membership (m, n) bool -> estimates (m,)."""


@dataclass(frozen=True)
class Step:
    """One step of a search: the subset after `task` was added (or removed), and its estimate."""

    subset: tuple[int, ...]
    task: int
    estimate: float


@dataclass(frozen=True)
class SelectionPath:
    """A search from its start: every step taken, those past the best subset too.

    Attributes:
        start: the subset it started from.
        start_estimate: its estimate.
        steps: in order.
        selected: the best subset on the way.
        selected_estimate: its estimate.
    """

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
    tolerance: float = 0.0,
    patience: int = 0,
    direction: str = "forward",
    try_at_most: int | None = None,
    progress: Callable[..., Any] | None = None,
) -> SelectionPath:
    """Add the best task again and again until nothing improves; or, backward, remove the worst.

    Every step estimates all subsets that are one task away, in one batch, and takes the lowest (of equals, the task of
    the lowest id). A step improves when its estimate is below the best so far by more than `tolerance` times the best's
    size. The search stops when more than `patience` steps in a row did not improve, and the best subset is selected.
    Nothing and more than allowed are no answers: the first step from the empty set always counts, a backward search
    goes on until it is within `max_tasks` and `budget_rows`, and it never removes the last task.

    Args:
        estimate: from membership (m, n) bool to estimates (m,).
        num_tasks: n.
        start_from: tasks that are in at the start. Backward, none means all.
        max_tasks: the most tasks that a subset may have.
        budget_rows: the most rows that a subset may have; needs `rows_of_task`.
        rows_of_task: (n,) rows of each task.
        tolerance: relative improvement that does not count.
        patience: steps without improvement to go on for.
        direction: "forward" or "backward".
        try_at_most: from the second step on, estimate only this many of the subsets one task away: those whose task gave
            the lowest estimate when it was last tried. An approximation, for thousands of tasks; None tries all.
        progress: makes a progress bar, called as progress(desc=..., total=..., unit=...).

    Raises:
        ValueError: an argument out of range, a start beyond the limits, no task within the budget, or an estimate that
            is not a number.
    """
    search = _Search(estimate, num_tasks, max_tasks, budget_rows, rows_of_task)
    _check_options(direction, try_at_most, tolerance, patience)
    forward = direction == "forward"
    current = search.start(start_from, forward)
    start_estimate = search.estimates(current[None])[0]
    best, best_estimate = (current, start_estimate) if current.any() and search.allows(current) else (None, np.inf)
    start, without_improvement = current, 0
    steps: list[Step] = []
    last_estimates = np.full(num_tasks, -np.inf)  # a task that could not be tried yet comes first
    with progress(desc=f"{direction} selection", total=num_tasks, unit="step") if progress else nullcontext() as bar:
        while without_improvement <= patience:
            movable, candidates = search.one_task_away(current, forward)
            if not len(movable):
                break
            if try_at_most is not None and len(steps):
                promising = np.sort(np.argsort(last_estimates[movable], kind="stable")[:try_at_most])
                movable, candidates = movable[promising], candidates[promising]
            values = search.estimates(candidates)
            last_estimates[movable] = values
            chosen = int(np.argmin(values))
            current, value = candidates[chosen], float(values[chosen])
            steps.append(Step(_tasks(current), int(movable[chosen]), value))
            if bar is not None:
                bar.update(1)
            if not search.allows(current):
                continue
            if best is None or value < best_estimate - tolerance * abs(best_estimate):
                best, best_estimate, without_improvement = current, value, 0
            else:
                without_improvement += 1
        if bar is not None:
            bar.total = bar.n  # it ends where nothing improves
            bar.refresh()
    if best is None:
        raise ValueError("no task fits into max_tasks and budget_rows; raise them")
    return SelectionPath(_tasks(start), float(start_estimate), tuple(steps), _tasks(best), float(best_estimate))


def _check_options(direction: str, try_at_most: int | None, tolerance: float, patience: int) -> None:
    if direction not in ("forward", "backward"):
        raise ValueError(f"unknown direction {direction!r}; choose forward or backward")
    if try_at_most is not None and try_at_most < 1:
        raise ValueError(f"try_at_most must be at least 1, found {try_at_most}")
    if tolerance < 0 or patience < 0:
        raise ValueError(f"tolerance and patience must not be negative, found {tolerance} and {patience}")


@dataclass(frozen=True)
class _Search:
    """What a search may ask: whether a subset is within the limits, and estimates."""

    estimate: Estimate
    num_tasks: int
    max_tasks: int | None
    budget_rows: int | None
    rows_of_task: Sequence[int] | np.ndarray | None

    def __post_init__(self) -> None:
        if self.max_tasks is not None and self.max_tasks < 1:
            raise ValueError(f"max_tasks must be at least 1, found {self.max_tasks}")
        if self.budget_rows is not None and (self.rows_of_task is None or len(self.rows_of_task) != self.num_tasks):
            raise ValueError(f"budget_rows needs rows_of_task with the rows of each of the {self.num_tasks} tasks")

    def start(self, tasks: Sequence[int], forward: bool) -> np.ndarray:
        """The subset (n,) to start from; backward, no tasks means all.

        Raises:
            ValueError: a task out of range, or tasks beyond the limits.
        """
        if wrong := [task for task in tasks if not 0 <= task < self.num_tasks]:
            raise ValueError(f"start_from holds task {wrong[0]}; tasks are 0 to {self.num_tasks - 1}")
        subset = np.zeros(self.num_tasks, bool)
        subset[list(tasks) if forward or len(tasks) else slice(None)] = True
        if forward and not self.allows(subset):
            raise ValueError(f"the {len(set(tasks))} tasks of start_from are beyond max_tasks or budget_rows already")
        return subset

    def one_task_away(self, subset: np.ndarray, forward: bool) -> tuple[np.ndarray, np.ndarray]:
        """The tasks that can be added to a subset (n,), or removed from it, (c,); and the subsets that this makes, (c, n)."""
        movable = np.flatnonzero(~subset if forward else subset)
        candidates = np.repeat(subset[None], len(movable), axis=0)
        candidates[np.arange(len(movable)), movable] = forward
        is_open = [self.allows(candidate) if forward else bool(candidate.any()) for candidate in candidates]
        return movable[is_open], candidates[is_open]

    def allows(self, subset: np.ndarray) -> bool:
        """Whether a subset (n,) is within both limits."""
        if self.max_tasks is not None and subset.sum() > self.max_tasks:
            return False
        return self.budget_rows is None or bool(np.asarray(self.rows_of_task)[subset].sum() <= self.budget_rows)

    def estimates(self, membership: np.ndarray) -> np.ndarray:
        """Estimates (m,) of membership (m, n), checked."""
        values = np.asarray(self.estimate(membership), float)
        if values.shape != (len(membership),):
            raise ValueError(f"estimates of {len(membership)} subsets have shape {values.shape}")
        if np.isnan(values).any():
            subset = _tasks(membership[np.argmax(np.isnan(values))])
            raise ValueError(f"the estimate of subset {subset} is not a number")
        return values


@dataclass(frozen=True)
class Method:
    """A way to search: `search(estimate, num_tasks, **options)` with the options of `forward_selection`."""

    search: Callable[..., SelectionPath]
    meaning: str


METHODS = {
    "forward": Method(forward_selection, "add the best task again and again"),
    "backward": Method(partial(forward_selection, direction="backward"), "remove the worst again and again"),
}
"""Searches by name. To add one, write a function that returns a `SelectionPath` and name it here."""


def random_ensemble_scores(membership: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How good subsets with a task are on average: T_j = mean of the values of the subsets that contain task j.

    From the random-ensemble selection of the paper (arXiv:2409.19458); lower is better.

    Args:
        membership: (m, n) bool.
        values: estimates, or fine-tuned values, (m,).

    Returns:
        Scores (n,) and their standard errors (n,), nan for a task that is in one subset only.

    Raises:
        ValueError: the lengths differ, a value is not finite, or a task is in no subset.
    """
    membership, values = np.asarray(membership, bool), np.asarray(values, float)
    if membership.shape[:1] != values.shape:
        raise ValueError(
            f"membership of {len(membership)} subsets and values of shape {values.shape} do not fit together"
        )
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
    """How soon the ranking of the tasks settles: Spearman of the scores of the first m' subsets with those of all.

    Args:
        membership: (m, n) bool.
        values: (m,).
        points: how many m' are tried, evenly spaced by ratio; those that leave a task in no subset are passed over.

    Returns:
        The m' (points or fewer,), ascending, and the correlations.
    """
    final, _ = random_ensemble_scores(membership, values)
    covered = np.flatnonzero(np.logical_or.accumulate(np.asarray(membership, bool)).all(axis=1))
    sizes = np.unique(np.geomspace(covered[0] + 1, len(values), points).round().astype(int))
    scores = [random_ensemble_scores(membership[:size], values[:size])[0] for size in sizes]
    return sizes, np.array([spearmanr(of_first, final).statistic for of_first in scores])


def select_by_score(
    scores: np.ndarray, *, top_k: int | None = None, ratio: float | None = None, threshold: float | None = None
) -> tuple[int, ...]:
    """The tasks with the lowest scores, by at most one of three rules.

    Args:
        scores: (n,), lower is better.
        top_k: keep this many; of equals, the lowest ids.
        ratio: keep this share of the tasks, at least one.
        threshold: keep every task whose score is not above it. This is the rule when none is given, with the mean of
            the scores; over random subsets of one size that is about the mean of all estimates, so that a task stays
            when subsets with it are better than average.

    Raises:
        ValueError: several rules, a rule out of range, or a threshold that leaves nothing.
    """
    scores = np.asarray(scores, float)
    if sum(rule is not None for rule in (top_k, ratio, threshold)) > 1:
        raise ValueError("give one of top_k, ratio and threshold, not several")
    if ratio is not None:
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio must be above 0 and at most 1, found {ratio}")
        top_k = max(1, round(ratio * len(scores)))
    if top_k is not None:
        if not 1 <= top_k <= len(scores):
            raise ValueError(f"top_k must be 1 to {len(scores)}, found {top_k}")
        return tuple(sorted(np.argsort(scores, kind="stable")[:top_k].tolist()))
    # the mean of equal scores may be rounded to below them
    limit = max(scores.mean(), scores.min()) if threshold is None else threshold
    selected = tuple(np.flatnonzero(scores <= limit).tolist())
    if not selected:
        raise ValueError(f"no score is at or below the threshold {limit:g}; the lowest is {scores.min():g}")
    return selected


def _tasks(subset: np.ndarray) -> tuple[int, ...]:
    """The ids of a membership row (n,)."""
    return tuple(np.flatnonzero(subset).tolist())
