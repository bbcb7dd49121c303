"""Estimates the loss of every target after fine-tuning on any subset of the tasks, from projected gradients.

Each task is reduced to its moments, after which the estimate for a subset is one d x d solve. Lower is better everywhere.
Shapes: R stored rows, d projection dimension, n tasks, m subsets, c subsets of a chunk, k targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
import torch
from scipy.linalg.lapack import dpstrf
from torch import Tensor
from torch.nn.functional import one_hot, softplus

WEIGHT_BY = ("token", "sample", "task")
DEFAULT_RHO = 1e-3

OnSubsets = Callable[[Tensor], Tensor]
"""Shares (c, n), the tasks' weights in subsets over N, the sum of all rows' weights -> estimates (c, k), or solutions (c, d)."""
Make = Callable[["Part", float], OnSubsets]
"""A part and the ridge strength lambda -> a function of shares."""
Progress = Callable[..., Any]
"""Makes a progress bar, called as progress(iterable, desc=..., unit=...)."""

# Memory for the work on chunks of subsets side by side; rows in memory at once.
_CHUNK_BYTES, _BLOCK_ROWS = 1 << 28, 8192
# Factors of H_t: the most rows with which they save work, as a share of d; and where they end, relative to its largest diagonal
# entry: it is float32.
_FACTOR_ROWS, _FACTOR_TOLERANCE = 1 / 4, 1e-7
# Solutions in float32 are improved by what they leave, in float64: so often at most, until one changes by so little of itself.
_MOST_STEPS, _LAST_CHANGE = 4, 1e-4
# Random halves of the tasks, over which the estimates of one checkpoint are compared with another's.
_REFERENCE_HALVES = 64
# Newton's method of "logistic": the gradient norm to reach, relative to the start, and when to give up.
_NEWTON_TOLERANCE, _NEWTON_STEPS = 1e-5, 50


@dataclass(frozen=True)
class TaskMoments:
    """Weighted sums over the rows of each task, or of each target."""

    counts: np.ndarray  # number of rows, (n,) int64
    weights: np.ndarray  # N_t, sum of the rows' weights, (n,) float64
    output_sums: np.ndarray  # of outputs, (n,) float64
    sums: np.ndarray  # b_t, of gradients, (n, d) float64
    squares: np.ndarray  # trace of H_t, (n,) float64
    # H_t, of outer products, (n, d, d); None where the rows are used instead.
    # Float32, since they are most of a run's memory; it changes estimates by less than 1e-6 of themselves.
    outers: np.ndarray | None

    @cached_property
    def has_factors(self) -> np.ndarray:
        """Which tasks have so few rows that factors of H_t save work, (n,) bool."""
        dim = 0 if self.outers is None else self.outers.shape[1]
        return (self.counts > 0) & (self.counts <= _FACTOR_ROWS * dim)

    @cached_property
    def factors(self) -> Tensor:
        """F_t with F_t' F_t = H_t of the tasks that `has_factors`, (n, r, d) float32, else 0: Cholesky with pivots."""
        ranks = np.where(self.has_factors, self.counts, 0)
        found = np.zeros((len(ranks), ranks.max(), self.sums.shape[1]), np.float32)
        for of_task, outer, rank in zip(found, () if self.outers is None else self.outers, ranks, strict=False):
            if rank:
                factor, pivots, known, _ = dpstrf(outer.T, tol=_FACTOR_TOLERANCE * outer.diagonal().max())
                known = min(known, rank)  # what is beyond is rounding
                of_task[:known, pivots - 1] = np.triu(factor[:known])
        return torch.from_numpy(found)


@dataclass(frozen=True)
class Rows:
    """The rows that moments sum up: for "logistic", and for "ridge" and "linear" where moments have no `outers`."""

    rows: np.ndarray  # projected gradients (R, d); may be memory-mapped
    outputs: np.ndarray  # (R,)
    task_of_row: np.ndarray  # (R,), -1 for none
    target_of_row: np.ndarray  # (R,), -1 for none
    weights: np.ndarray | None = None  # of a row in all sums (R,); None = 1


@dataclass(frozen=True)
class Part:
    """The moments of tasks and targets at one checkpoint of meta-training."""

    train: TaskMoments  # of the n tasks
    target: TaskMoments  # of the k targets
    rows: Rows | None = None
    output_function: str = "loss"  # "loss" or "margin": what the rows are gradients of
    weight_by: str = (
        "sample"  # "token" for moments with `token_weights`; "task" where the tasks of a subset weigh the same
    )
    basis: np.ndarray | None = None  # what moments and rows are coordinates in (d, r); None = the store's d dimensions


def token_weights(target_tokens: np.ndarray, is_training: np.ndarray) -> np.ndarray:
    """Weights of the rows (R,) in all sums, for training on the mean over tokens.

    A training row of n target tokens counts n times; n (R,) is taken relative to its mean where `is_training` (R,). The
    other rows are a target's, whose loss is a mean over rows. In H_S independent gradients of tokens would ask for n squared;
    on two synthetic worlds (`data/make_synthetic.py --joined 4`) LDS was 0.92 and 0.83 with n, 0.90 and 0.80 with n squared.
    """
    return np.where(is_training, target_tokens / target_tokens[is_training].mean(), 1.0)


def task_moments(
    rows: np.ndarray,
    outputs: np.ndarray,
    task_of_sample: np.ndarray,
    num_tasks: int,
    *,
    weights: np.ndarray | None = None,
    outers: bool = True,
    basis: np.ndarray | None = None,
    progress: Progress | None = None,
) -> TaskMoments:
    """The moments of each task, read block by block; arguments as in `Rows`. `outers` are n d^2 numbers; with a `basis` (d, r)
    moments are of the rows' coordinates, in r dimensions.

    Raises:
        ValueError: a row is not finite.
    """
    of_row = np.ones(len(rows)) if weights is None else weights
    dim, of_task = (rows if basis is None else basis).shape[1], np.flatnonzero(task_of_sample >= 0)
    counts, summed_weights, output_sums = (
        np.bincount(task_of_sample[of_task], values[of_task], num_tasks)
        for values in (np.ones(len(rows)), of_row, of_row * outputs)
    )
    sums, squares = np.zeros((num_tasks, dim)), np.zeros(num_tasks)
    summed_outers = np.zeros((num_tasks, dim, dim), np.float32) if outers else None
    block_rows = max(_BLOCK_ROWS, 64 * num_tasks)  # a task has several in a block
    starts = range(0, len(rows), block_rows)
    for start in progress(starts, desc="moments", unit="block") if progress else starts:
        block, tasks = np.asarray(rows[start : start + block_rows]), task_of_sample[start : start + block_rows]
        for task in np.unique(tasks[tasks >= 0]):
            own = np.flatnonzero(tasks == task)
            gradients, samples = block[own].astype(np.float64), start + own
            gradients = gradients if basis is None else gradients @ basis
            scaled = of_row[samples, None] * gradients
            sums[task] += of_row[samples] @ gradients
            squares[task] += np.vdot(scaled, gradients)
            if summed_outers is not None:
                summed_outers[task] += gradients.T @ scaled
    moments = TaskMoments(counts.astype(np.int64), summed_weights, output_sums, sums, squares, summed_outers)
    _check_finite(moments, "task")
    return moments


def principal_basis(rows: np.ndarray, is_training: np.ndarray, dim: int) -> np.ndarray:
    """An orthonormal basis (d, r) of the directions in which rows (R, d) are longest, r = `dim` or the number of rows.

    Training rows (`is_training`, (R,)) and the others count half each. Exact where no more than `dim` rows are there; else
    by subspace iteration on their second moments, d x d numbers.
    """
    if len(rows) <= dim:
        return np.linalg.qr(np.asarray(rows, np.float64).T)[0]
    weights = np.where(is_training, 1 / max(is_training.sum(), 1), 1 / max((~is_training).sum(), 1))
    moments = np.zeros((rows.shape[1],) * 2, np.float32)
    unit = np.abs(rows[:_BLOCK_ROWS]).max() or 1.0  # squares of small gradients would be lost in float32
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = np.asarray(rows[start : start + _BLOCK_ROWS], np.float32) / np.float32(unit)
        moments += block.T @ (block * weights[start : start + _BLOCK_ROWS, None].astype(np.float32))
    width = min(dim + 50, len(moments))
    basis = np.random.default_rng(0).standard_normal((len(moments), width)).astype(np.float32)
    for _ in range(4):
        basis, _ = np.linalg.qr(moments @ basis)
    _, within = np.linalg.eigh((basis.T @ moments @ basis).astype(np.float64))
    return basis @ within[:, : -dim - 1 : -1]


def estimate(
    parts: Sequence[Part],
    membership: np.ndarray,
    *,
    estimator: str = "ridge",
    rho: float = DEFAULT_RHO,
    targets: Sequence[int] | None = None,
    weights: np.ndarray | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """The estimated output of every target after fine-tuning on every subset, (m, k) float64: the mean over the parts.

    Args:
        parts: one for each checkpoint, all with the same tasks and targets.
        membership: (m, n) bool, or float weights of the tasks, not negative. An empty subset changes nothing.
        estimator: one of `ESTIMATORS`.
        rho: ridge strength relative to the mean squared norm of a gradient: lambda = rho trace(H_all/N).
        targets: ids of the targets wanted; None = all k.
        weights: of the parts in the mean, (p, k) as `part_weights` gives them; None = all alike.

    Raises:
        ValueError: a subset or target without rows, moments that are not finite, or another argument out of range.
    """
    chosen = range(len(parts[0].target.counts)) if targets is None else targets
    parts, make = [_with_targets(part, chosen) for part in parts], ESTIMATORS[estimator].make
    by_part = _over_chunks(parts, membership, rho, make, progress)
    return by_part.mean(axis=0) if weights is None else (weights[:, None] * by_part).sum(axis=0)


def part_weights(parts: Sequence[Part], **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """How much each part is to count in the mean, (p, k), and what that is told by: the estimates of random halves of the
    tasks at each part, (p, halves, k). Options as in `estimate`.

    Between subsets, the estimates at one checkpoint may differ many times as much as those at another, and would rule the
    mean: each counts by one over its standard deviation. Where one has none, all count alike.
    """
    has_rows = np.all([part.train.counts > 0 for part in parts], axis=0)
    draws = (
        np.random.default_rng(0).random((_REFERENCE_HALVES, len(has_rows))) - has_rows
    )  # those without rows come last
    halves = (draws.argsort(axis=1).argsort(axis=1) < max(has_rows.sum() // 2, 1)) & has_rows
    by_part = np.stack([estimate([part], halves, **options) for part in parts])
    spreads = by_part.std(axis=1)
    spreads = np.where((spreads > 1e-9 * abs(by_part).max(axis=1)).all(axis=0), spreads, 1.0)
    return (1 / spreads) / (1 / spreads).sum(axis=0), by_part


def solutions(part: Part, membership: np.ndarray, *, estimator: str = "ridge", rho: float = DEFAULT_RHO) -> np.ndarray:
    """x_S of an estimator for every subset, (m, d) float64; arguments and errors as in `estimate` and `solver_of`."""
    (found,) = _over_chunks([part], membership, rho, solver_of(estimator))
    return found if part.basis is None else found @ part.basis.T


def displacements(parts: Sequence[Part], membership: np.ndarray, *, estimator: str, rho: float) -> list[np.ndarray]:
    """x_S of every subset at each part, (m, d) float32, in coordinates whose inner products are those of the solutions; the
    share of each task, (m, n), for an estimator without solutions."""
    if (solver := ESTIMATORS[estimator].solver) is None:
        return [(membership / np.maximum(np.sum(membership, axis=1, keepdims=True), 1)).astype(np.float32)]
    return [_over_chunks([part], membership, rho, solver)[0].astype(np.float32) for part in parts]


def solver_of(estimator: str) -> Make:
    """Return an estimator's solver. ValueError: it has none."""
    if (solver := ESTIMATORS[estimator].solver) is None:
        having = ", ".join(name for name, kind in ESTIMATORS.items() if kind.solver)
        raise ValueError(f"estimator {estimator!r} has no solution to displace a model by; choose one of {having}")
    return solver


def mixture_weights(
    parts: Sequence[Part],
    targets: Sequence[int],
    *,
    rho: float = DEFAULT_RHO,
    weights: np.ndarray | None = None,
    steps: int = 300,
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The share of rows to draw from each task (n,), summing to 1, for the lowest mean "ridge" estimate of some targets; and
    that estimate at every step (steps,).

    The estimates are a smooth function of the tasks' weights; Adam on their logarithms finds a local minimum from equal
    weights on. Arguments as in `estimate`.
    """
    parts, num_tasks = [_with_targets(part, targets) for part in parts], len(parts[0].train.counts)
    models = []
    for part in parts:
        of_row, strength = _shares(part, np.ones((1, num_tasks)), rho)
        models.append((of_row, _tensor(part.train.weights), _ridge(part, strength)))
    of_part = torch.full((len(parts), 1), 1 / len(parts)) if weights is None else _tensor(weights)
    logits = torch.zeros(1, num_tasks, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    course: list[float] = []
    best = logits.detach()[0]
    for _ in progress(range(steps), desc="mixture weights", unit="step") if progress else range(steps):
        of_task = logits.softmax(1)
        values = [estimates_of(_of_subset(of_task * of_row, totals))[0] for of_row, totals, estimates_of in models]
        value = (of_part * torch.stack(values)).sum(0).mean()
        if not course or value < min(course):
            best = of_task.detach()[0]
        course.append(float(value.detach()))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    rows = (best * models[0][0][0]).numpy() * parts[0].train.counts
    return rows / rows.sum(), np.array(course)


def zero_order_error(start: np.ndarray, displaced: np.ndarray) -> float:
    """|f(w* + P x) - f(w*)|^2 / |f(w* + P x)|^2: the error of taking the outputs (N,) not to change at all."""
    return float(np.sum((displaced - start.astype(float)) ** 2) / np.sum(displaced.astype(float) ** 2))


def first_order_error(start: np.ndarray, rows: np.ndarray, solution: np.ndarray, displaced: np.ndarray) -> float:
    """|f(w* + P x) - f(w*) - g.x|^2 / |f(w* + P x)|^2, for outputs (N,), projected gradients g (N, d) and x (d,)."""
    return zero_order_error(start + rows.astype(float) @ solution, displaced)


# --- solvers: (part, lambda) -> (shares (c, n) -> solutions (c, d))


def _ridge_solver(part: Part, strength: float) -> OnSubsets:
    """x_S = -(H_S + lambda N I)^-1 b_S, the lowest point of the quadratic model of the subset's loss whose curvature is the
    empirical Fisher matrix: one batched Cholesky, or a solve in the rows' kernel where there are no `outers`."""
    if part.train.outers is None:
        return _kernel_solver(part, strength)
    sums, outers = _tensor(part.train.sums), torch.from_numpy(part.train.outers).flatten(1)
    dim, lock, found_last = sums.shape[1], Lock(), list[_Common]()

    def solve(shares: Tensor) -> Tensor:
        if (near := _one_apart(shares)) is None:
            return dense((shares.float() @ outers).view(-1, dim, dim), shares)
        in_all, task, weight = near
        with lock:  # the chunks of a search have one in common
            fitting = [last for last in found_last if torch.equal(in_all, last.shares)]
            found_last[:] = [common := (fitting or [_Common(in_all, sums, outers, strength)])[0]]
        found, precise = sums.new_zeros(len(shares), dim), torch.from_numpy(part.train.has_factors)[task]
        if (few := precise.nonzero()[:, 0]).numel():
            goal = common.sums + weight[few, None] * sums[task[few]]
            x, precise[few] = common.solve(part.train.factors.index_select(0, task[few]), weight[few], goal)
            found[few] = -x
        if (many := (~precise).nonzero()[:, 0]).numel():
            moments = torch.addcmul(
                common.moments.flatten(), weight[many, None].float(), outers.index_select(0, task[many])
            )
            found[many] = dense(moments.view(-1, dim, dim), shares[many])
        return found

    def dense(second_moments: Tensor, shares: Tensor) -> Tensor:
        second_moments.diagonal(dim1=1, dim2=2).add_(strength)
        return -_solve(second_moments, (shares @ sums).float()).double()

    return solve


def _one_apart(shares: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Shares (c, n) of subsets that have one task each besides common ones, as a search's do: what is common (n,), the task
    (c,) and its share (c,); None of other subsets. Shares that are 0 have a slope nevertheless, so where one is wanted there is
    none."""
    if shares.requires_grad or len(shares) < 2:
        return None
    common = shares.amin(0)
    rest = shares - common
    share, task = rest.max(1)
    return (common, task, share) if (rest.count_nonzero(1) <= 1).all() else None


class _Common:
    """The moments that subsets one task apart share, and what solves with them and with the one task's factors."""

    def __init__(self, shares: Tensor, sums: Tensor, outers: Tensor, ridge: float) -> None:
        self.shares, self.sums, total = shares, shares @ sums, outers.new_zeros(outers.shape[1])
        for task in shares.nonzero()[:, 0].tolist():
            total.add_(outers[task], alpha=float(shares[task]))
        self.moments = total.view(len(self.sums), -1)
        self.double, self.ridge = self.moments.double(), ridge
        values, basis = torch.linalg.eigh(self.moments)
        self.whiten = basis * (values.clamp(min=0) + ridge).rsqrt()

    def solve(self, own: Tensor, weight: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        """x (c, d) of (moments + weight F'F + ridge I) x = goal, for factors F `own` (c, r, d), and which are precise (c,): where
        the common moments and the ridge are whitened, Woodbury's identity adds the factors."""
        turned = (own.flatten(0, 1) @ self.whiten).view(own.shape).mul_(weight.sqrt().float()[:, None, None])
        inner, _ = torch.linalg.cholesky_ex(torch.baddbmm(torch.eye(own.shape[1]), turned, turned.mT))
        x, left = torch.zeros_like(goal), goal
        for _ in range(_MOST_STEPS):
            step = (left.float() @ self.whiten)[:, :, None]
            step -= turned.mT @ torch.cholesky_solve(turned @ step, inner)
            x += (change := step[:, :, 0] @ self.whiten.T)
            if (precise := change.norm(dim=1) <= _LAST_CHANGE * x.norm(dim=1)).all():
                break
            of_own = (own.mT @ (own @ x.float()[:, :, None]))[:, :, 0]
            left = goal - x @ self.double - self.ridge * x - of_own.double() * weight[:, None]
        return x, precise


def _kernel_solver(part: Part, strength: float) -> OnSubsets:
    """x = -G' (G G' + lambda I)^-1 r with the rows of G times r, the roots of their shares."""
    gradients, _, task_of_row, of_row = _rows_of(part, "task_of_row")
    kernel = gradients @ gradients.T

    def on_subset(shares: Tensor) -> Tensor:
        chosen = shares.nonzero().squeeze(1)
        roots = shares[chosen].sqrt().float()
        gram = roots[:, None] * kernel[chosen][:, chosen] * roots
        gram.diagonal().add_(strength)
        return -(roots * _solve(gram, roots)) @ gradients[chosen]

    return lambda shares: torch.stack([on_subset(of_rows) for of_rows in shares[:, task_of_row] * of_row]).double()


def _logistic_solver(part: Part, strength: float) -> OnSubsets:
    """x_S that minimises the mean of log(1 + exp(o_i + g_i.x)) + lambda |x|^2, for outputs o = minus the margin: Newton's
    method for all subsets of a chunk at once, each step halved until the subset's objective does not rise."""
    single, outputs, task_of_row, of_row = _rows_of(part, "task_of_row")
    gradients = single.double()

    def hessian(curvatures: Tensor) -> Tensor:
        rows = single[curvatures > 0] * curvatures[curvatures > 0].sqrt().unsqueeze(1)
        return torch.addmm(2 * strength * torch.eye(rows.shape[1]), rows.T, rows)

    def solve(shares: Tensor) -> Tensor:
        shares = _of_subset(shares, _tensor(part.train.weights))[:, task_of_row] * of_row  # (c, rows)
        found, start_norm = gradients.new_zeros(len(shares), gradients.shape[1]), None

        def objective(x: Tensor) -> Tensor:
            return (shares * softplus(outputs + x @ gradients.T)).sum(1) + strength * x.square().sum(1)

        for _ in range(_NEWTON_STEPS):
            likely = (outputs + found @ gradients.T).sigmoid()
            slope = (shares * likely) @ gradients + 2 * strength * found
            norm = slope.norm(dim=1)
            start_norm = norm if start_norm is None else start_norm
            if (norm <= _NEWTON_TOLERANCE * start_norm).all():
                return found
            hessians = torch.stack([hessian(curvatures) for curvatures in (shares * likely * (1 - likely)).float()])
            step, highest = _solve(hessians, slope.float()).double(), objective(found) * (1 + 1e-12)  # rounding
            for _ in range(20):
                if not (rises := objective(found - step) > highest).any():
                    break
                step[rises] /= 2
            found = found - step
        raise ValueError(f"estimator 'logistic' has not converged after {_NEWTON_STEPS} Newton steps; raise rho")

    return solve


# --- estimators: (part, lambda) -> (shares (c, n) -> estimates (c, k))


def _ridge(part: Part, strength: float) -> OnSubsets:
    """L_val + b_val.x_S/N_val + x_S.C_val x_S/2; without the last term for margins, which are no losses.

    The curvature C_val is the covariance of the gradients of the target's rows: H_val/N_val, as of a target that is fitted,
    would count the mean gradient of one that is not as curvature, in the very direction of the first term.
    """
    if part.output_function != "loss":
        return _linear(part, strength)
    solve, (means, slopes), totals = _ridge_solver(part, strength), _target_means(part), _tensor(part.target.weights)
    if part.target.outers is None:
        gradients, _, target_of_row, of_row = _rows_of(part, "target_of_row")

    def curvatures(x: Tensor) -> Tensor:
        if (outers := part.target.outers) is None:
            squares = of_row * (x @ gradients.T).double().square()
            return squares.new_zeros(len(x), len(totals)).index_add_(1, target_of_row, squares)
        factors = part.target.factors
        found = (x @ factors.flatten(0, 1).T).square().view(len(x), *factors.shape[:2]).sum(2)
        for target in np.flatnonzero(~part.target.has_factors):
            found[:, target] = ((x @ torch.from_numpy(outers[target])) * x).sum(1)
        return found

    def estimates(shares: Tensor) -> Tensor:
        x = solve(shares)
        change = x @ slopes.T
        return means + change + (curvatures(x.float()).double() / totals - change.square()) / 2

    return estimates


def _linear(part: Part, strength: float) -> OnSubsets:
    """L_val + b_val.x_S/N_val."""
    solve, (means, slopes) = _ridge_solver(part, strength), _target_means(part)
    return lambda shares: means + solve(shares) @ slopes.T


def _logistic(part: Part, strength: float) -> OnSubsets:
    """The paper's (arXiv:2409.19458): the mean of log(1 + exp(o_i + g_i.x_S)) over the target's rows."""
    solve, (gradients, outputs, target_of_row, _) = _logistic_solver(part, strength), _rows_of(part, "target_of_row")
    in_target = one_hot(target_of_row, len(part.target.counts)).double()
    in_target /= in_target.sum(0)  # (rows of targets, k)
    return lambda shares: softplus(outputs + solve(shares) @ gradients.double().T) @ in_target


def _alignment(part: Part, strength: float) -> OnSubsets:
    """L_val - b_val.b_S/(N_val N_S): a step along the mean gradient as in LESS; of unit-length representations, RDS."""
    sums, totals, (means, slopes) = _tensor(part.train.sums), _tensor(part.train.weights), _target_means(part)
    return lambda shares: means - _of_subset(shares, totals) @ sums @ slopes.T


def _constant(part: Part, strength: float) -> OnSubsets:
    means, _ = _target_means(part)
    return lambda shares: means.expand(len(shares), -1)


@dataclass(frozen=True)
class EstimatorKind:
    """An estimator, and what it needs."""

    make: Make  # its estimates
    meaning: str  # for a person who chooses
    solver: Make | None = None  # its solutions x_S; None where there are none
    needs_rows: bool = False  # it reads a part's rows, not their moments alone
    needs_outers: bool = False  # it reads the outer products even where there are fewer rows than dimensions
    output_function: str | None = None  # the only one whose rows it takes; None = any
    represented: bool = False  # its rows are representations instead of gradients
    ranks_only: bool = False  # its estimates are not losses; only their ranking is meaningful


ESTIMATORS = {
    "ridge": EstimatorKind(_ridge, "quadratic models of the subset and of the target", _ridge_solver),
    "linear": EstimatorKind(_linear, "as ridge, first order in the target", _ridge_solver),
    "logistic": EstimatorKind(
        _logistic,
        "the paper's regression, for --output_function margin",
        _logistic_solver,
        needs_rows=True,
        output_function="margin",
        ranks_only=True,
    ),
    "alignment": EstimatorKind(_alignment, "inner product of mean gradients, as in LESS", ranks_only=True),
    "representation": EstimatorKind(
        _alignment, "similarity of hidden states, for stage 2's --representations", represented=True, ranks_only=True
    ),
    "constant": EstimatorKind(_constant, "the target's loss before training, which an estimate must beat"),
}


def _shares(part: Part, membership: np.ndarray, rho: float) -> tuple[Tensor, float]:
    """The factor of the moments of each task in each subset, over N, (m, n) float64, and the ridge strength lambda."""
    _check_finite(part.train, "task")
    counts, weights = part.train.counts, np.asarray(membership, np.float64)
    if not (np.isfinite(weights).all() and (weights >= 0).all() and rho > 0):
        raise ValueError(f"weights of tasks must be finite and not negative, and rho above 0, found rho {rho:g}")
    without_rows = weights.any(axis=1) & ~(weights @ counts > 0)
    if without_rows.any():
        subset = int(np.argmax(without_rows))
        tasks = ", ".join(map(str, np.flatnonzero(weights[subset])))
        raise ValueError(f"subset {subset} (tasks {tasks}) has no rows; leave it out, or give its tasks rows")
    of_row = 1 / np.maximum(counts, 1) if part.weight_by == "task" else np.ones(len(counts))
    of_all = of_row @ part.train.weights or 1.0
    # gradients that are all zero have the solution 0 with any ridge
    return torch.from_numpy(weights * of_row / of_all), float(rho * (of_row @ part.train.squares) / of_all) or 1.0


def _over_chunks(
    parts: Sequence[Part], membership: np.ndarray, rho: float, make: Make, progress: Progress | None = None
) -> np.ndarray:
    """Estimates or solutions of all subsets at each part, (p, m, ...), chunk by chunk: d x d matrices and R-vectors of all do
    not fit. Chunks are taken side by side, a thread each: several threads at one small matrix would wait for each other."""
    threads, work = torch.get_num_threads(), list[tuple[OnSubsets, Tensor]]()
    for part in parts:
        shares, strength = _shares(part, membership, rho)
        of_subset = 16 * part.train.sums.shape[1] ** 2 + 96 * (len(part.rows.outputs) if part.rows else 0)  # bytes
        on_subsets = make(part, strength)
        size = max(_CHUNK_BYTES // max(threads, 2) // of_subset, 1)
        work += [(on_subsets, chunk) for chunk in shares.split(size)]
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = pool.map(lambda of_chunk: of_chunk[0](of_chunk[1]).numpy(), work)
        bar = progress(found, desc="estimates", total=len(work), unit="chunk of subsets") if progress else found
        try:
            values = np.concatenate(list(bar))
        finally:
            torch.set_num_threads(threads)
    return values.reshape(len(parts), len(membership), *values.shape[1:])


def _of_subset(weights: Tensor, totals: Tensor) -> Tensor:
    """Factors of the tasks' moments (c, n) that make means over the subset, with N_t in `totals` (n,); 0 for an empty one."""
    of_subset = weights @ totals
    return weights / torch.where(of_subset > 0, of_subset, 1.0).unsqueeze(1)


def _target_means(part: Part) -> tuple[Tensor, Tensor]:
    """Mean output (k,) and mean gradient (k, d) of each target."""
    totals = _tensor(part.target.weights)
    return _tensor(part.target.output_sums) / totals, _tensor(part.target.sums) / totals.unsqueeze(1)


def _with_targets(part: Part, targets: Sequence[int]) -> Part:
    """Restrict a part to these targets, in this order; ValueError where one has no rows."""
    _check_finite(part.target, "target")
    if empty := [target for target in targets if not part.target.counts[target]]:
        raise ValueError(f"target {empty[0]} has no rows, so nothing can be estimated for it")
    wanted = np.asarray(targets)
    if np.array_equal(wanted, np.arange(len(part.target.counts))):
        return part
    moments = {field.name: getattr(part.target, field.name) for field in fields(part.target)}
    chosen = {name: values[wanted] for name, values in moments.items() if values is not None}
    position = np.full(len(part.target.counts) + 1, -1)  # the last is for rows of no target, id -1
    position[wanted] = np.arange(len(wanted))
    rows = part.rows and replace(part.rows, target_of_row=position[part.rows.target_of_row])
    target = replace(part.target, **chosen)
    vars(target)["factors"] = part.target.factors[wanted]  # found once for all choices of targets
    return replace(part, target=target, rows=rows)


def _rows_of(part: Part, group: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the rows that have a task or a target (`group`): gradients (float32), outputs, group ids, weights."""
    if (rows := part.rows) is None:
        raise ValueError("this estimator would need the rows of a part, and this one has moments only")
    groups = np.asarray(getattr(rows, group))
    chosen = np.flatnonzero(groups >= 0)
    weights = np.ones(len(groups)) if rows.weights is None else rows.weights
    gradients, ids = torch.from_numpy(np.asarray(rows.rows[chosen], np.float32)), torch.from_numpy(groups[chosen])
    return gradients, _tensor(rows.outputs[chosen]), ids.long(), _tensor(weights[chosen])


def _solve(matrices: Tensor, vectors: Tensor) -> Tensor:
    """x of matrix x = vector, positive definite: (..., d, d), (..., d) -> (..., d)."""
    factors, failed = torch.linalg.cholesky_ex(matrices)
    if failed.any():
        raise ValueError("the ridge is lost in rounding, so a regression has no solution; raise rho")
    return torch.cholesky_solve(vectors.unsqueeze(-1), factors).squeeze(-1)


def _check_finite(moments: TaskMoments, noun: str) -> None:
    """Reject tasks or targets with non-finite sums."""
    finite = np.isfinite(moments.output_sums) & np.isfinite(moments.sums).all(axis=1) & np.isfinite(moments.squares)
    if not finite.all():
        bad = f"{noun} {int(np.argmin(finite))} has outputs or gradients that are not finite"
        raise ValueError(f"{bad}; take the gradients again, at a checkpoint whose loss is finite")


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.float64))
