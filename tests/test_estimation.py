"""Estimation: batched solves from moments against one subset at a time on the raw rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import Ridge

from src import estimation as module
from src.estimation import (
    Part,
    Rows,
    estimate,
    mixture_weights,
    part_weights,
    principal_basis,
    solutions,
    task_moments,
    token_weights,
)
from src.selection import Step, forward_selection
from tests.commands import refused

NUM_TASKS, NUM_TARGETS, DIM = 6, 3, 8
RHO = 0.05


def make_rows(seed: int = 0, num_rows: int = 150, dim: int = DIM) -> Rows:
    """Rows in random order: tasks of uneven size, targets, and some rows that are neither."""
    rng = np.random.default_rng(seed)
    group = np.concatenate([np.arange(10), rng.choice(10, num_rows - 10, p=[0.19] + [0.09] * 9)])
    gradients = rng.standard_normal((num_rows, dim)) + 2 * rng.standard_normal((10, dim))[group]
    return Rows(
        rows=gradients.astype(np.float32),
        outputs=(rng.standard_normal(num_rows) * 2).astype(np.float32),
        task_of_row=np.where(group < NUM_TASKS, group, -1),
        target_of_row=np.where((group >= NUM_TASKS) & (group < NUM_TASKS + NUM_TARGETS), group - NUM_TASKS, -1),
    )


def target_tokens(rows: Rows) -> np.ndarray:
    """Rows of 1 to 13 tokens."""
    return 1 + np.arange(len(rows.outputs)) * 7 % 13


def make_part(rows: Rows, weight_by: str = "sample") -> Part:
    weights = token_weights(target_tokens(rows), rows.task_of_row >= 0) if weight_by == "token" else None
    groups = (rows.task_of_row, NUM_TASKS), (rows.target_of_row, NUM_TARGETS)
    moments = [task_moments(rows.rows, rows.outputs, *group, weights=weights) for group in groups]
    return Part(*moments, replace(rows, weights=weights), weight_by=weight_by)


@pytest.fixture(scope="module")
def rows():
    return make_rows()


@pytest.fixture(scope="module")
def part(rows):
    return make_part(rows)


@pytest.fixture(scope="module")
def membership():
    """Every pair and triple of tasks: (35, n)."""
    bits = np.arange(2**NUM_TASKS)[:, None] >> np.arange(NUM_TASKS) & 1
    return bits[(bits.sum(axis=1) >= 2) & (bits.sum(axis=1) <= 3)].astype(bool)


def row_weights(rows: Rows, task_weights: np.ndarray, weight_by: str) -> np.ndarray:
    """The weight of every row (R,) in a subset, task by task."""
    weights = np.zeros(len(rows.outputs))
    tokens = target_tokens(rows)
    relative = tokens / tokens[rows.task_of_row >= 0].mean()
    for task, weight in enumerate(task_weights):
        of_task = rows.task_of_row == task
        weights[of_task] = weight / (of_task.sum() if weight_by == "task" else 1)
    return weights * relative if weight_by == "token" else weights


def ridge_strength(rows: Rows, weight_by: str, rho: float = RHO) -> float:
    """lambda = rho times the mean squared norm over the rows of all tasks."""
    weights = row_weights(rows, np.ones(NUM_TASKS), weight_by)
    return rho * weights @ (rows.rows.astype(float) ** 2).sum(axis=1) / weights.sum()


def target_means(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Mean output (k,) and mean gradient (k, d) of each target."""
    groups = [rows.target_of_row == target for target in range(NUM_TARGETS)]
    means, slopes = ([of[group].mean(axis=0, dtype=float) for group in groups] for of in (rows.outputs, rows.rows))
    return np.array(means), np.array(slopes)


def quadratic_terms(rows: Rows, solutions: np.ndarray) -> np.ndarray:
    """Half the variance of the change of each target's rows along each solution, (m, k)."""
    changes = rows.rows.astype(float) @ solutions.T
    return np.array([changes[rows.target_of_row == target].var(axis=0) / 2 for target in range(NUM_TARGETS)]).T


def direct_ridge(rows: Rows, task_weights: np.ndarray, weight_by: str) -> np.ndarray:
    """x_S by scikit-learn, from the raw rows: regress -1 on the gradients without intercept, with one ridge for all subsets."""
    weights = row_weights(rows, task_weights, weight_by)
    chosen = weights > 0
    of_all = row_weights(rows, np.ones(NUM_TASKS), weight_by).sum()
    ridge = Ridge(alpha=ridge_strength(rows, weight_by) * of_all, fit_intercept=False, solver="cholesky")
    ridge.fit(rows.rows[chosen].astype(float), -np.ones(chosen.sum()), sample_weight=weights[chosen])
    return ridge.coef_


def without_outers(part: Part) -> Part:
    """As it comes where there are fewer rows than dimensions."""
    return replace(part, train=replace(part.train, outers=None), target=replace(part.target, outers=None))


@pytest.mark.parametrize("weight_by", ["token", "sample", "task"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("dim", "by_rows"), [(DIM, False), (DIM, True), (200, True)])
def test_ridge_equals_a_regression_on_the_raw_rows(membership, weight_by, weighted, dim, by_rows):
    """Moments, the rows' kernel, batching and float32 change nothing: each x_S is a ridge regression on the rows of S."""
    rows = make_rows(dim=dim)
    part = without_outers(make_part(rows, weight_by)) if by_rows else make_part(rows, weight_by)
    weights = membership * np.random.default_rng(1).random(membership.shape) if weighted else membership
    expected = np.array([direct_ridge(rows, subset, weight_by) for subset in weights])
    np.testing.assert_allclose(solutions(part, weights, rho=RHO), expected, rtol=1e-4, atol=1e-5)
    means, slopes = target_means(rows)
    first_order = means + expected @ slopes.T
    second_order = first_order + quadratic_terms(rows, expected)
    of_margins = ("ridge", replace(part, output_function="margin"), first_order)
    for name, of, values in (("linear", part, first_order), ("ridge", part, second_order), of_margins):
        found = estimate([of], weights, estimator=name, rho=RHO)
        np.testing.assert_allclose(found, values, rtol=1e-4, atol=1e-5)


def test_displacements_have_the_products_of_solutions(part, rows, membership):
    """In whatever coordinates: of a part in principal directions too. Without solutions they are the tasks' equal shares."""
    basis = principal_basis(rows.rows, rows.task_of_row >= 0, 5)
    moments = [
        task_moments(rows.rows, rows.outputs, *group, basis=basis)
        for group in ((rows.task_of_row, NUM_TASKS), (rows.target_of_row, NUM_TARGETS))
    ]
    parts, options = [part, Part(*moments, basis=basis)], {"estimator": "ridge", "rho": RHO}
    for of_part, found in zip(parts, module.displacements(parts, membership, **options), strict=True):
        expected = solutions(of_part, membership, **options)
        np.testing.assert_allclose(found @ found.T, expected @ expected.T, rtol=1e-4, atol=1e-6)
    (shares,) = module.displacements(
        parts, np.eye(2, NUM_TASKS) + np.eye(2, NUM_TASKS, k=1), estimator="alignment", rho=1
    )
    np.testing.assert_allclose(shares, [[0.5, 0.5, 0, 0, 0, 0], [0, 0.5, 0.5, 0, 0, 0]])


def test_weights_of_rows(rows, membership):
    """Tasks that differ in size and rows in length make a difference; rows of one length weigh the same."""
    by_token, by_sample, by_task = (
        estimate([make_part(rows, weight_by)], membership) for weight_by in module.WEIGHT_BY
    )
    assert min(np.abs(by_sample - by_task).max(), np.abs(by_sample - by_token).max()) > 1e-3
    np.testing.assert_array_equal(token_weights(np.full(5, 9), np.arange(5) < 3), np.ones(5))


@pytest.mark.parametrize(
    ("weight_by", "offset", "rho"), [*[(by, 0, RHO) for by in module.WEIGHT_BY], ("sample", 20, 1e-3)]
)
def test_logistic_equals_a_general_minimiser(rows, membership, weight_by, offset, rho):
    """The paper's estimator against scipy, a subset at a time, from the raw rows.

    Margins of -20 leave almost no curvature at the start, where an undamped Newton step goes astray.
    """
    outputs = rows.outputs + np.float32(offset)
    strength = ridge_strength(rows, weight_by, rho)
    part = make_part(replace(rows, outputs=outputs), weight_by)
    options = {"estimator": "logistic", "rho": rho}
    found, solved = estimate([part], membership, **options), solutions(part, membership, **options)
    for subset, estimates, at in zip(membership[::5], found[::5], solved[::5], strict=True):
        weights = row_weights(rows, subset, weight_by)

        def objective(x, weights=weights):
            losses = np.logaddexp(0, outputs + rows.rows @ x)
            return float(np.average(losses, weights=weights) + strength * x @ x)

        solution = minimize(objective, np.zeros(DIM), method="BFGS", options={"gtol": 1e-7}).x
        losses = np.logaddexp(0, outputs + rows.rows @ solution)
        expected = [losses[rows.target_of_row == target].mean() for target in range(NUM_TARGETS)]
        np.testing.assert_allclose(estimates, expected, rtol=1e-4)
        np.testing.assert_allclose(at, solution, rtol=0.01, atol=0.01 * np.abs(solution).max())


def test_targets_can_be_chosen(part, membership):
    """The chosen columns, in the order asked for."""
    cases = [(part, name) for name in module.ESTIMATORS] + [(without_outers(part), "ridge")]
    for from_part, estimator in cases:
        expected = estimate([from_part], membership, estimator=estimator)[:, [2, 0]]
        found = estimate([from_part], membership, estimator=estimator, targets=[2, 0])
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight_by", module.WEIGHT_BY)
def test_alignment_and_constant_by_hand(rows, membership, weight_by):
    """L_val minus the inner product of the mean gradients of target and subset; L_val alone."""
    means, slopes = target_means(rows)
    weights = [row_weights(rows, subset, weight_by) for subset in membership]
    gradients = np.array([np.average(rows.rows.astype(float), axis=0, weights=of_rows) for of_rows in weights])
    part = make_part(rows, weight_by)
    found = estimate([part], membership, estimator="alignment")
    np.testing.assert_allclose(found, means - gradients @ slopes.T, rtol=1e-6)
    constant = estimate([part], membership, estimator="constant")
    np.testing.assert_allclose(constant, np.tile(means, (len(membership), 1)))


@pytest.mark.parametrize("estimator", module.ESTIMATORS)
def test_chunks_are_irrelevant(part, membership, estimator, monkeypatch):
    """Solving one subset at a time gives the same estimates."""
    expected = estimate([part], membership, estimator=estimator, rho=RHO)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)
    found = estimate([part], membership, estimator=estimator, rho=RHO)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("estimator", ["ridge", "logistic"])
@pytest.mark.parametrize("scale", [1e-8, 1e6])
def test_estimates_do_not_depend_on_the_unit_of_gradients(rows, part, membership, estimator, scale):
    """rho is relative, so gradients of another model's size give the same estimates, also in float32."""
    scaled = make_part(replace(rows, rows=rows.rows * np.float32(scale)))
    expected = estimate([part], membership, estimator=estimator)
    np.testing.assert_allclose(estimate([scaled], membership, estimator=estimator), expected, rtol=5e-4, atol=1e-5)


def test_several_checkpoints_are_averaged(part, membership):
    """The estimate over checkpoints is the mean of theirs; they may differ in d."""
    other = make_part(make_rows(seed=1, dim=5))
    expected = (estimate([part], membership) + estimate([other], membership)) / 2
    np.testing.assert_allclose(estimate([part, other], membership), expected)


def test_no_checkpoint_rules_the_mean_by_its_spread(part, rows, membership):
    """Gradients and losses of ten times the size count a tenth; where one checkpoint tells no difference, all count alike;
    random halves are of tasks with rows."""
    louder = make_part(replace(rows, rows=10 * rows.rows, outputs=rows.outputs * 100))
    weights, by_part = part_weights([part, louder], estimator="alignment")
    np.testing.assert_allclose(weights, np.tile([[100 / 101], [1 / 101]], NUM_TARGETS), rtol=1e-4)
    expected = (
        100 * estimate([part], membership, estimator="alignment")
        + estimate([louder], membership, estimator="alignment")
    ) / 101
    options = {"estimator": "alignment", "weights": weights}
    np.testing.assert_allclose(estimate([part, louder], membership, **options), expected, rtol=1e-4)
    assert by_part.shape[0::2] == (2, NUM_TARGETS) and (by_part.std(axis=1) > 0).all()
    np.testing.assert_allclose(part_weights([part, part], estimator="constant", targets=[1])[0], [[0.5], [0.5]])
    few = replace(part, train=replace(part.train, counts=part.train.counts * (np.arange(NUM_TASKS) < 2)))
    assert np.isfinite(part_weights([few, few])[1]).all()


@pytest.mark.parametrize("estimator", module.ESTIMATORS)
def test_training_on_nothing_changes_nothing(rows, part, membership, estimator):
    """The empty subset is the target as it is, and so is any whose gradients are 0; "logistic" is in log(1 + exp(-margin))."""
    outputs = np.logaddexp(0, rows.outputs) if estimator == "logistic" else rows.outputs
    means, _ = target_means(replace(rows, outputs=outputs))
    empty = estimate([part], np.eye(2, NUM_TASKS, k=-1), estimator=estimator)
    np.testing.assert_allclose(empty[0], means, rtol=1e-6)
    zero = estimate([make_part(replace(rows, rows=np.zeros_like(rows.rows)))], membership, estimator=estimator)
    np.testing.assert_allclose(zero, np.tile(means, (len(membership), 1)), rtol=1e-6)


@pytest.mark.parametrize("block_rows", [7, 10_000])
@pytest.mark.parametrize("weighted", [False, True])
def test_moments_are_sums_over_rows(rows, block_rows, weighted, tmp_path, monkeypatch):
    """Block by block from a file, a task's moments are sums over its rows; rows of no task count for nothing."""
    monkeypatch.setattr(module, "_BLOCK_ROWS", block_rows)
    np.save(tmp_path / "rows.npy", rows.rows[:, :3])
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    weights = np.random.default_rng(0).random(len(mapped)) if weighted else np.ones(len(mapped))
    options = {"weights": weights} if weighted else {}
    task_of_row = rows.task_of_row // 3  # two tasks, so that a block of them is short
    moments = task_moments(mapped, rows.outputs, task_of_row, 2, **options)
    for task in range(2):
        own = np.flatnonzero(task_of_row == task)
        expected = {
            "counts": len(own),
            "weights": sum(weights[row] for row in own),
            "output_sums": sum(weights[row] * float(rows.outputs[row]) for row in own),
            "sums": sum(weights[row] * mapped[row] for row in own),
            "squares": sum(weights[row] * mapped[row] @ mapped[row] for row in own),
            "outers": sum(weights[row] * np.outer(mapped[row], mapped[row]) for row in own),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(getattr(moments, name)[task], value, rtol=1e-5, atol=1e-5, err_msg=name)
    assert task_moments(mapped, rows.outputs, task_of_row, 2, outers=False).outers is None


def test_approximation_error_by_hand():
    """|residual|^2 / |displaced outputs|^2; a model that is linear in its parameters has none."""
    rows, solution = np.array([[1.0, 2.0], [0.0, 1.0]]), np.array([1.0, 1.0])
    start = np.array([1.0, 2.0])
    assert module.first_order_error(start, rows, solution, start + rows @ solution) == 0
    assert module.first_order_error(start, rows, solution, np.array([4.0, 4.0])) == pytest.approx(1 / 32)
    assert module.zero_order_error(start, np.array([4.0, 4.0])) == pytest.approx(13 / 32)


def test_bad_input_is_refused(rows, part, membership):
    """A task without rows may sit beside others, but cannot be a subset; a target needs rows; what is not finite is named."""
    one = np.eye(NUM_TASKS, dtype=bool)
    refused("need the rows of a part", estimate, [replace(part, rows=None)], one, estimator="logistic")
    refused("rho above 0, found rho 0", estimate, [part], one, rho=0)
    refused("not negative", estimate, [part], -np.eye(NUM_TASKS))
    for name in ("alignment", "representation", "constant"):
        message = f"'{name}' has no solution .*; choose one of ridge, linear, logistic"
        refused(message, solutions, part, membership, estimator=name)
    without = make_part(replace(rows, task_of_row=np.where(rows.task_of_row == 2, -1, rows.task_of_row)))
    assert np.isfinite(estimate([replace(without, weight_by="task")], membership)).all()
    refused(r"subset 1 \(tasks 2\) has no rows", estimate, [without], one[1:])
    without = make_part(replace(rows, target_of_row=np.where(rows.target_of_row == 1, -1, rows.target_of_row)))
    refused("target 1 has no rows", estimate, [without], membership)
    gradients = np.where(rows.task_of_row[:, None] == 4, np.nan, rows.rows)
    of_tasks = (rows.outputs, rows.task_of_row, NUM_TASKS)
    refused("task 4 has outputs or gradients that are not finite", task_moments, gradients, *of_tasks)
    target = replace(part.target, output_sums=part.target.output_sums * np.inf)
    refused("target 0 has outputs", estimate, [replace(part, target=target)], membership)


@pytest.mark.parametrize("with_outers", [True, False])
def test_mixture_weights_find_the_lowest_estimate(part, rows, with_outers):
    """As low as a general minimiser gets from the same start, and the shares are what the estimates were of."""
    part = part if with_outers else without_outers(part)
    shares, course = mixture_weights([part], [1], rho=RHO)
    counts = np.bincount(rows.task_of_row[rows.task_of_row >= 0])

    def mean_estimate(logits):
        weights = np.exp(logits) * counts.sum() / (np.exp(logits) @ counts)  # an epoch is as long as of all tasks
        return float(estimate([part], weights[None], rho=RHO, targets=[1])[0, 0])

    assert course[0] == pytest.approx(mean_estimate(np.zeros(NUM_TASKS)), rel=1e-6)
    found = minimize(mean_estimate, np.zeros(NUM_TASKS), method="Nelder-Mead", options={"maxiter": 4000})
    assert course[0] - course.min() > 0.99 * (course[0] - found.fun) > 0.1
    assert shares.sum() == pytest.approx(1)
    of_shares = estimate([part], (shares * counts.sum() / counts)[None], rho=RHO, targets=[1])
    assert of_shares[0, 0] == pytest.approx(course.min(), rel=1e-3)


def test_neighbours_are_estimated_as_they_are_alone(part):
    """Subsets one task apart share their sums; the estimates are those of each subset by itself."""
    forward = np.eye(NUM_TASKS, dtype=bool) | np.isin(np.arange(NUM_TASKS), [0, 2])
    any_weights = np.random.default_rng(0).random((9, NUM_TASKS)) + 0.1
    part = replace(part, weight_by="task")
    for membership in (forward, ~np.eye(NUM_TASKS, dtype=bool), any_weights, np.vstack([forward, forward[0] & False])):
        alone = np.concatenate([estimate([part], row[None]) for row in membership])
        np.testing.assert_allclose(estimate([part], membership), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight_by", module.WEIGHT_BY)
@pytest.mark.parametrize("size", [0, 1, 4])
@pytest.mark.parametrize(("dim", "few"), [(200, NUM_TASKS), (80, NUM_TASKS - 1), (20, 0)])
def test_subsets_one_task_apart_are_solved_by_its_own_factors(weight_by, size, dim, few, monkeypatch):
    """A search's step: as one subset at a time with whole matrices, in float64, whatever the tasks weigh, whether they have few
    rows (then by factors), some of them, or none; of a target's curvature too."""
    part = make_part(make_rows(dim=dim), weight_by)
    candidates = (np.arange(NUM_TASKS) < size) | np.eye(NUM_TASKS, dtype=bool)[size:]
    by_factors, solve = [], module._Common.solve
    monkeypatch.setattr(
        module._Common, "solve", lambda self, own, *rest: by_factors.append(len(own)) or solve(self, own, *rest)
    )
    found = estimate([part], candidates, rho=RHO)
    weights, train, target = candidates / part.train.counts ** (weight_by == "task"), part.train, part.target
    assert train.has_factors.sum() == few
    assert sum(by_factors) == train.has_factors[size:].sum()
    ridge = ridge_strength(part.rows, weight_by) * (train.weights / train.counts ** (weight_by == "task")).sum()
    for of_task, estimates in zip(weights, found, strict=True):
        curvature = np.tensordot(of_task, train.outers.astype(float), 1) + ridge * np.eye(dim)
        x = -np.linalg.solve(curvature, of_task @ train.sums)
        change = target.sums @ x / target.counts
        squares = np.einsum("kde,d,e->k", target.outers.astype(float), x, x) / target.counts
        expected = target.output_sums / target.counts + change + (squares - change**2) / 2
        np.testing.assert_allclose(estimates, expected, rtol=1e-5, atol=1e-5)
    for moments in (train, target):
        products = (moments.factors.mT @ moments.factors).numpy()[moments.has_factors]
        np.testing.assert_allclose(
            products, moments.outers[moments.has_factors], atol=2e-6 * np.abs(moments.outers).max()
        )


@pytest.mark.parametrize("rho", [1e-3, 1e-7])
def test_a_search_by_factors_takes_the_steps_of_direct_solves(rho, monkeypatch):
    """Spectra over four orders of magnitude, three checkpoints: the same tasks, values to 1e-5; also where the ridge is so small
    that factors in float32 are not precise."""
    rng, parts = np.random.default_rng(0), []
    tasks, targets = np.repeat(np.arange(12), rng.integers(14, 22, 12)), np.repeat([0, 1], 12)
    for _ in range(3):
        scales, outputs = 0.9 ** np.arange(90), rng.standard_normal(len(tasks))
        rows, of_targets = (
            rng.standard_normal((len(ids), 90)) + rng.standard_normal((12, 90))[ids] for ids in (tasks, targets)
        )
        train = task_moments(rows * scales, outputs, tasks, 12)
        parts.append(Part(train, task_moments(of_targets * scales, outputs[: len(targets)], targets, 2)))

    def path() -> tuple[Step, ...]:
        def means(membership: np.ndarray) -> np.ndarray:
            return estimate(parts, membership, rho=rho).mean(axis=1)

        return forward_selection(means, 12, start_from=range(6), past_best=12).steps

    taken, solve = [], module._Common.solve

    def watched(self, *arguments):
        taken.append(solve(self, *arguments)[1])
        return solve(self, *arguments)

    monkeypatch.setattr(module._Common, "solve", watched)
    found = path()
    assert len(found) == 6 and bool(torch.cat(taken).all()) == (rho == 1e-3)
    monkeypatch.setattr(module, "_one_apart", lambda shares: None)
    expected = path()
    assert [step.task for step in found] == [step.task for step in expected]
    np.testing.assert_allclose(*([step.estimate for step in steps] for steps in (found, expected)), rtol=1e-5)


@pytest.mark.parametrize(("num_rows", "dim"), [(30, 40), (300, 20)])
def test_principal_directions_are_those_of_a_decomposition(num_rows: int, dim: int) -> None:
    """The same subspace as a full decomposition gives; all of the rows where there are few."""
    rng = np.random.default_rng(0)
    values = (
        1e-6
        * (rng.standard_normal((num_rows, 60)) * 0.9 ** np.arange(60))
        @ np.linalg.qr(rng.standard_normal((60, 60)))[0]
    )
    is_training = np.arange(num_rows) < num_rows * 0.9
    basis = principal_basis(values, is_training, dim)
    kept = min(dim, num_rows)
    np.testing.assert_allclose(basis.T @ basis, np.eye(kept), atol=1e-5)
    balanced = values / np.sqrt(np.where(is_training, is_training.sum(), (~is_training).sum()))[:, None]
    _, lengths, directions = np.linalg.svd(balanced)
    held = np.square(balanced @ basis).sum()
    assert held == pytest.approx(np.square(lengths[:kept]).sum(), rel=1e-4)
    if num_rows > dim:
        np.testing.assert_allclose(abs(np.linalg.det(basis.T[:5] @ directions[:5].T)), 1.0, atol=1e-3)


def test_estimates_in_principal_directions_are_those_of_all(rows: Rows, membership: np.ndarray) -> None:
    """Where these hold all of the rows: estimates, and solutions in the store's dimensions; by moments and by rows."""
    turned = np.linalg.qr(np.random.default_rng(0).standard_normal((50, 50)))[0][: rows.rows.shape[1]]
    wide = replace(rows, rows=rows.rows @ turned)
    basis = principal_basis(wide.rows, rows.task_of_row >= 0, rows.rows.shape[1])
    narrow = replace(make_part(replace(wide, rows=wide.rows @ basis)), basis=basis)
    plain = make_part(wide)
    np.testing.assert_allclose(estimate([narrow], membership), estimate([plain], membership), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(solutions(narrow, membership), solutions(plain, membership), rtol=1e-2, atol=1e-4)
    of_coordinates = task_moments(wide.rows, rows.outputs, rows.task_of_row, NUM_TASKS, basis=basis)
    np.testing.assert_allclose(of_coordinates.sums @ basis.T, plain.train.sums, rtol=1e-3, atol=1e-4)
