"""Selection: planted subsets, and a plain greedy loop over all neighbours."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import spearmanr

from src.selection import forward_selection, random_ensemble_scores, ranking_convergence, select_by_score

Estimate = Callable[[np.ndarray], np.ndarray]


def planted(values: list[float]) -> Estimate:
    """10 + the sum of the values of the tasks."""
    return lambda membership: 10 + membership @ np.array(values)


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


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("start_from", [(), (1, 4)])
@pytest.mark.parametrize("past_best", [1, 3, 100])
def test_the_path_is_the_greedy_one(seed: int, direction: str, start_from: tuple[int, ...], past_best: int) -> None:
    """Step by step equal to a plain loop, which ends so many steps past the best subset, or at the last task."""
    estimate, forward = random_landscape(6, seed), direction == "forward"
    start = set(start_from) if forward or start_from else set(range(6))
    path = forward_selection(estimate, 6, start_from=start_from, direction=direction, past_best=past_best)
    expected, best, length = plain_greedy(estimate, 6, start, forward), (path.start, path.start_estimate), 0
    for number, point in enumerate(expected, start=1):
        if point[1] < best[1] or not best[0]:
            best, length = point, number
        elif number == length + past_best:
            expected = expected[:number]
            break
    assert [(step.subset, step.estimate) for step in path.steps] == expected
    assert path.start == tuple(sorted(start)) and (path.selected, path.selected_estimate) == best


def test_equal_estimates_take_the_lowest_task() -> None:
    """Whatever the order of evaluation, the same subset; an estimate that stays the same is no improvement."""
    assert forward_selection(planted([-1, -1, -1, 0]), 4, max_tasks=2).selected == (0, 1)
    assert forward_selection(planted([-1, 0, 0, 0]), 4).selected == (0,)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_training_on_nothing_is_no_answer(direction: str) -> None:
    """Even when every task hurts the least harmful one is selected; backward, the last one stays."""
    assert forward_selection(planted([3, 1, 2]), 3, direction=direction).selected == (1,)


def test_start_is_kept_when_nothing_improves() -> None:
    path = forward_selection(planted([-1, 1, 1]), 3, start_from=[1, 0])
    assert path.selected == path.start == (0, 1)
    assert path.selected_estimate == path.start_estimate == 10


def test_budget_of_rows() -> None:
    """The best task that does not fit is left out, and a smaller one taken."""
    values, rows = planted([-5, -3, -2, -1]), [100, 60, 50, 5]
    assert forward_selection(values, 4, budget_rows=115, rows_of_task=rows).selected == (0, 3)
    assert forward_selection(values, 4, budget_rows=90, rows_of_task=rows).selected == (1, 3)


@pytest.mark.parametrize("limits", [{"max_tasks": 2}, {"budget_rows": 20, "rows_of_task": [10] * 5}])
def test_backward_goes_on_until_it_is_within_the_limits(limits: dict) -> None:
    """Every task helps, so every removal hurts, but three of the five must go: those that help least."""
    path = forward_selection(planted([-5, -4, -3, -2, -1]), 5, direction="backward", **limits)
    assert path.selected == (0, 1)
    assert len(path.steps) == 4  # and one more that did not improve


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_trying_only_the_promising(direction: str) -> None:
    """A step is one batch: of all tasks at first, of so many after it; without interactions the path is that of trying all."""
    estimate, sizes = planted([3, -2, -5, 1, -1, 4, -3, 2]), []

    def counted(membership: np.ndarray) -> np.ndarray:
        sizes.append(len(membership))
        return estimate(membership)

    every = forward_selection(counted, 8, direction=direction, past_best=9)
    assert sizes[:5] == [1, 8, 7, 6, 5]
    sizes.clear()
    assert forward_selection(counted, 8, direction=direction, past_best=9, try_at_most=2) == every
    assert sizes[:5] == [1, 8, 2, 2, 2]


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([1, 2, 3], {"start_from": [3]}, "start_from holds task 3; tasks are 0 to 2"),
        ([1, 2, 3], {"start_from": [0, 1], "max_tasks": 1}, "the 2 tasks of start_from are beyond"),
        ([1, 2, 3], {"budget_rows": 4, "rows_of_task": [5, 6, 7]}, "no task fits"),
        ([1, 2, np.nan], {"start_from": [2]}, r"the estimate of subset \(2,\) is not a number"),
    ],
)
def test_bad_searches_are_refused(values: list[float], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forward_selection(planted(values), 3, **options)


def test_scores_are_means_over_subsets_with_the_task() -> None:
    """By hand, one task at a time; one that was tried once has no standard error, one never tried no score."""
    rng = np.random.default_rng(0)
    membership, values = rng.random((30, 5)) < 0.5, rng.standard_normal(30)
    membership[:, 4] = np.arange(30) == 3
    scores, errors = random_ensemble_scores(membership, values)
    for task in range(4):
        of_task = values[membership[:, task]]
        assert scores[task] == pytest.approx(of_task.mean())
        assert errors[task] == pytest.approx(of_task.std(ddof=1) / np.sqrt(len(of_task)))
    assert scores[4] == values[3] and np.isnan(errors[4])
    with pytest.raises(ValueError, match="tasks 1, 3 are in none of the 2 subsets"):
        random_ensemble_scores(np.array([[1, 0, 1, 0], [1, 0, 0, 0]], bool), np.ones(2))
    with pytest.raises(ValueError, match="value of subset 1 is not finite"):
        random_ensemble_scores(np.ones((2, 2), bool), np.array([1, np.inf]))


def test_the_ranking_settles_with_more_subsets() -> None:
    """The last point is the ranking itself; the first has a subset for every task and no more."""
    rng = np.random.default_rng(0)
    membership = rng.random((400, 8)) < 0.5
    values = planted([-4, -3, -2, -1, 1, 2, 3, 4])(membership) + 4 * rng.standard_normal(400)
    sizes, correlations = ranking_convergence(membership, values)
    assert sizes[-1] == 400 and correlations[-1] == pytest.approx(1)
    assert membership[: sizes[0]].any(axis=0).all() and not membership[: sizes[0] - 1].any(axis=0).all()
    half, full = (random_ensemble_scores(membership[:size], values[:size])[0] for size in (sizes[5], 400))
    assert correlations[5] == pytest.approx(spearmanr(half, full).statistic)


SCORES = np.array([3.0, 1.0, 2.0, 1.0, 8.0])


@pytest.mark.parametrize(
    ("scores", "rule", "selected"),
    [
        (SCORES, {"top_k": 1}, (1,)),
        (SCORES, {"top_k": 3}, (1, 2, 3)),
        (np.ones(100), {"top_k": 3}, (0, 1, 2)),
        (SCORES, {"ratio": 0.4}, (1, 3)),
        (SCORES, {"ratio": 0.01}, (1,)),
        (SCORES, {"threshold": 2}, (1, 2, 3)),
        (SCORES, {}, (0, 1, 2, 3)),  # the mean is 3
        (np.full(7, 0.1), {}, tuple(range(7))),
        (SCORES, {"top_k": 1, "ratio": 0.5}, "give one of top_k, ratio and threshold"),
        (SCORES, {"top_k": 6}, "top_k must be 1 to 5, found 6"),
        (SCORES, {"threshold": -1}, "at or below the threshold -1; the lowest is 1"),
    ],
)
def test_select_by_score(scores: np.ndarray, rule: dict, selected: tuple[int, ...] | str) -> None:
    """The lowest scores, by number, share, threshold or the mean; of equals, the lowest ids."""
    if isinstance(selected, str):
        with pytest.raises(ValueError, match=selected):
            select_by_score(scores, **rule)
    else:
        assert select_by_score(scores, **rule) == selected
