"""Selection: planted subsets, and a plain greedy loop over all neighbours."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import spearmanr

from src.selection import (
    SelectionPath,
    forward_selection,
    random_ensemble_scores,
    ranking_convergence,
    select_by_score,
)

Estimate = Callable[[np.ndarray], np.ndarray]


def planted(values: list[float], interaction: float = 0.0) -> Estimate:
    """10 + the sum of the values of the tasks, + interaction for every pair of tasks."""

    def estimate(membership: np.ndarray) -> np.ndarray:
        size = membership.sum(axis=1)
        return 10 + membership @ np.array(values) + interaction * size * (size - 1) / 2

    return estimate


def random_landscape(num_tasks: int, seed: int) -> Estimate:
    """A value of its own for every subset."""
    table = np.random.default_rng(seed).standard_normal(2**num_tasks)
    return lambda membership: table[membership @ (1 << np.arange(num_tasks))]


def plain_greedy(
    estimate: Estimate, num_tasks: int, start: set[int], forward: bool
) -> list[tuple[tuple[int, ...], float]]:
    """Every step until nothing is left to add (or one task is left), one estimate at a time."""

    def value(subset: set[int]) -> float:
        return float(estimate(np.array([[task in subset for task in range(num_tasks)]]))[0])

    path, current = [], set(start)
    while len(current) < num_tasks if forward else len(current) > 1:
        movable = sorted(set(range(num_tasks)) - current if forward else current)
        neighbours = [current ^ {task} for task in movable]
        current = min(neighbours, key=value)
        path.append((tuple(sorted(current)), value(current)))
    return path


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_planted_subset_is_found(direction: str) -> None:
    """Tasks that help stay, tasks that hurt go, from either side."""
    path = forward_selection(planted([0.5, -1, 2, -3, 0.1, -0.2]), 6, direction=direction)
    assert path.selected == (1, 3, 5)
    assert path.selected_estimate == pytest.approx(5.8)
    assert [step.task for step in path.steps] == ([3, 1, 5, 4] if direction == "forward" else [2, 0, 4, 5])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("start_from", [(), (1, 4)])
def test_the_path_is_the_greedy_one(seed: int, direction: str, start_from: tuple[int, ...]) -> None:
    """Step by step equal to a plain loop; with endless patience the lowest point of the whole path is selected."""
    estimate, forward = random_landscape(6, seed), direction == "forward"
    start = set(start_from) if forward or start_from else set(range(6))
    path = forward_selection(estimate, 6, start_from=start_from, direction=direction, patience=100)
    expected = plain_greedy(estimate, 6, start, forward)
    assert [(step.subset, step.estimate) for step in path.steps] == expected
    assert path.start == tuple(sorted(start))
    reachable = expected if not start else [(path.start, path.start_estimate), *expected]
    assert (path.selected, path.selected_estimate) == min(reachable, key=lambda point: point[1])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("patience", [0, 1, 2])
def test_patience_is_steps_without_improvement(seed: int, patience: int) -> None:
    """The search ends `patience + 1` steps after the selected subset, or at the last task."""
    path = forward_selection(random_landscape(7, seed), 7, patience=patience)
    subsets = [step.subset for step in path.steps]
    assert len(subsets) == min(7, subsets.index(path.selected) + 1 + patience + 1)


def test_tolerance_is_relative() -> None:
    """Improvements of 2 % count with a tolerance of 1 % and not with one of 3 %, whatever the unit."""
    for unit in (1e-3, 1.0, 1e3):
        estimate = lambda membership, unit=unit: unit * 0.98 ** membership.sum(axis=1)  # noqa: E731
        assert len(forward_selection(estimate, 5, tolerance=0.01).selected) == 5
        assert len(forward_selection(estimate, 5, tolerance=0.03).selected) == 1


def test_a_rise_of_negative_estimates_is_no_improvement() -> None:
    """Minus the margin may be negative: the tolerance is of its size."""
    path = forward_selection(lambda membership: planted([-1, 0.1, -0.001])(membership) - 20, 3, tolerance=0.01)
    assert path.selected == (0,)


def test_equal_estimates_take_the_lowest_task() -> None:
    """Whatever the order of evaluation, the same subset; an estimate that stays the same is no improvement."""
    path = forward_selection(planted([-1, -1, -1, 0]), 4, max_tasks=2)
    assert path.selected == (0, 1)
    assert forward_selection(planted([-1, 0, 0, 0]), 4).selected == (0,)


def test_training_on_nothing_is_no_answer() -> None:
    """Even when every task hurts the least harmful one is selected; backward, the last one stays."""
    for direction in ("forward", "backward"):
        path = forward_selection(planted([3, 1, 2]), 3, direction=direction)
        assert path.selected == (1,)


def test_start_is_kept_when_nothing_improves() -> None:
    """Forward selection from a subset only adds, and may add nothing."""
    path = forward_selection(planted([-1, 1, 1]), 3, start_from=[1, 0])
    assert path.selected == path.start == (0, 1)
    assert path.selected_estimate == path.start_estimate == 10


def test_budget_of_rows() -> None:
    """The best task that does not fit is left out, and a smaller one taken."""
    rows = [100, 60, 50, 5]
    path = forward_selection(planted([-5, -3, -2, -1]), 4, budget_rows=115, rows_of_task=rows)
    assert path.selected == (0, 3)
    path = forward_selection(planted([-5, -3, -2, -1]), 4, budget_rows=90, rows_of_task=rows)
    assert path.selected == (1, 3)
    with pytest.raises(ValueError, match="no task fits"):
        forward_selection(planted([-5, -3]), 2, budget_rows=4, rows_of_task=[5, 6])


@pytest.mark.parametrize("limits", [{"max_tasks": 2}, {"budget_rows": 20, "rows_of_task": [10] * 5}])
def test_backward_goes_on_until_it_is_within_the_limits(limits: dict) -> None:
    """Every task helps, so every removal hurts, but three of the five must go: those that help least."""
    path: SelectionPath = forward_selection(planted([-5, -4, -3, -2, -1]), 5, direction="backward", **limits)
    assert path.selected == (0, 1)
    assert len(path.steps) == 4  # and one more that did not improve


def test_candidates_come_in_one_batch() -> None:
    """A step is one call with a row for every task that could be added."""
    sizes = []

    def estimate(membership: np.ndarray) -> np.ndarray:
        sizes.append(len(membership))
        return planted([-1, -1, -1, -1])(membership)

    forward_selection(estimate, 4)
    assert sizes == [1, 4, 3, 2, 1]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_trying_only_the_promising(direction: str) -> None:
    """All tasks at the first step, so many after it; without interactions the path is that of trying all."""
    estimate, sizes = planted([3, -2, -5, 1, -1, 4, -3, 2]), []

    def counted(membership: np.ndarray) -> np.ndarray:
        sizes.append(len(membership))
        return estimate(membership)

    every = forward_selection(estimate, 8, direction=direction, patience=8)
    some = forward_selection(counted, 8, direction=direction, patience=8, try_at_most=2)
    assert some == every
    assert sizes[:5] == [1, 8, 2, 2, 2]
    with pytest.raises(ValueError, match="try_at_most must be at least 1"):
        forward_selection(estimate, 8, try_at_most=0)


def test_bad_searches_are_refused() -> None:
    """One clear error each."""
    estimate = planted([1, 2, 3])
    for options, message in [
        ({"direction": "sideways"}, "unknown direction 'sideways'"),
        ({"start_from": [3]}, "start_from holds task 3; tasks are 0 to 2"),
        ({"start_from": [0, 1], "max_tasks": 1}, "the 2 tasks of start_from are beyond"),
        ({"max_tasks": 0}, "max_tasks must be at least 1, found 0"),
        ({"budget_rows": 10}, "needs rows_of_task with the rows of each of the 3 tasks"),
        ({"budget_rows": 10, "rows_of_task": [1, 2]}, "needs rows_of_task"),
        ({"patience": -1}, "must not be negative"),
    ]:
        with pytest.raises(ValueError, match=message):
            forward_selection(estimate, 3, **options)
    with pytest.raises(ValueError, match=r"the estimate of subset \(2,\) is not a number"):
        forward_selection(planted([1, 2, np.nan]), 3, start_from=[2])
    with pytest.raises(ValueError, match=r"estimates of 1 subsets have shape \(1, 3\)"):
        forward_selection(lambda membership: membership * 1.0, 3)


def test_scores_are_means_over_subsets_with_the_task() -> None:
    """By hand, one task at a time."""
    rng = np.random.default_rng(0)
    membership, values = rng.random((30, 5)) < 0.5, rng.standard_normal(30)
    scores, errors = random_ensemble_scores(membership, values)
    for task in range(5):
        of_task = values[membership[:, task]]
        assert scores[task] == pytest.approx(of_task.mean())
        assert errors[task] == pytest.approx(of_task.std(ddof=1) / np.sqrt(len(of_task)))


def test_scores_rank_planted_tasks() -> None:
    """Over random subsets the noise of the other tasks averages out."""
    values = [-1.0, 0.5, -0.5, 1.0, 0.0]
    membership = np.random.default_rng(1).random((2000, 5)) < 0.5
    scores, _ = random_ensemble_scores(membership, planted(values)(membership))
    assert np.argsort(scores).tolist() == [0, 2, 4, 1, 3]
    assert select_by_score(scores, top_k=2) == (0, 2)


def test_the_ranking_settles_with_more_subsets() -> None:
    """The last point is the ranking itself; the first has a subset for every task and no more."""
    rng = np.random.default_rng(0)
    membership = rng.random((400, 8)) < 0.5
    values = planted([-4, -3, -2, -1, 1, 2, 3, 4])(membership) + 4 * rng.standard_normal(400)
    sizes, correlations = ranking_convergence(membership, values)
    assert sizes[-1] == 400 and correlations[-1] == pytest.approx(1)
    assert membership[: sizes[0]].any(axis=0).all() and not membership[: sizes[0] - 1].any(axis=0).all()
    assert correlations[-3:].mean() > correlations[:3].mean()
    half, _ = random_ensemble_scores(membership[: sizes[5]], values[: sizes[5]])
    full, _ = random_ensemble_scores(membership, values)
    assert correlations[5] == pytest.approx(spearmanr(half, full).statistic)


def test_scores_need_a_subset_for_every_task() -> None:
    """A task that was never tried has no score; one that was tried once has no standard error."""
    membership = np.array([[1, 0, 1, 0], [1, 0, 0, 0]], bool)
    with pytest.raises(ValueError, match="tasks 1, 3 are in none of the 2 subsets"):
        random_ensemble_scores(membership, np.ones(2))
    _, errors = random_ensemble_scores(membership[:, [0, 2]], np.array([1.0, 3.0]))
    assert errors[0] == pytest.approx(1)
    assert np.isnan(errors[1])
    with pytest.raises(ValueError, match="do not fit together"):
        random_ensemble_scores(membership, np.ones(3))
    with pytest.raises(ValueError, match="value of subset 1 is not finite"):
        random_ensemble_scores(membership, np.array([1, np.inf]))


def test_select_by_score() -> None:
    """The lowest scores, by number, share, threshold or the mean; of equals, the lowest ids."""
    scores = np.array([3.0, 1.0, 2.0, 1.0, 8.0])
    assert select_by_score(scores, top_k=1) == (1,)
    assert select_by_score(scores, top_k=3) == (1, 2, 3)
    assert select_by_score(np.ones(100), top_k=3) == (0, 1, 2)
    assert select_by_score(scores, ratio=0.4) == (1, 3)
    assert select_by_score(scores, ratio=0.01) == (1,)
    assert select_by_score(scores, threshold=2) == (1, 2, 3)
    assert select_by_score(scores) == (0, 1, 2, 3)  # the mean is 3
    assert select_by_score(np.full(7, 0.1)) == tuple(range(7))


def test_bad_rules_are_refused() -> None:
    """Several rules, or one that leaves nothing."""
    scores = np.arange(3.0)
    for rules, message in [
        ({"top_k": 1, "ratio": 0.5}, "give one of top_k, ratio and threshold"),
        ({"top_k": 4}, "top_k must be 1 to 3, found 4"),
        ({"top_k": 0}, "top_k must be 1 to 3, found 0"),
        ({"ratio": 1.5}, "ratio must be above 0 and at most 1, found 1.5"),
        ({"threshold": -1}, "at or below the threshold -1; the lowest is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            select_by_score(scores, **rules)
