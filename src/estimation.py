"""From projected gradients to the estimated loss of a target after fine-tuning on any subset of the tasks.

Why this module exists: once each task is summed up in its moments (N_t, sum of gradients, sum of their outer products),
the estimate for a subset is a d x d solve. No sample, no model and no file is touched again, and a thousand subsets take
a second (DESIGN section 2, "Estimation from moments"). Everything is lower-is-better: outputs are losses or, in a margin
store, minus the margins, and so are the estimates.

An estimator is a function of `_ESTIMATORS`: given one checkpoint's `Part` and the ridge strength lambda it returns a
function from row weights (c, n) of some subsets to their estimates (c, k). To add one, write it and name it there.

Shapes: R stored rows, N rows of the tasks, d projection dimension, n tasks, m subsets, c subsets of a chunk, k targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot, softplus

WEIGHT_BY = ("sample", "task")

# Memory for the work on a chunk of subsets.
_CHUNK_BYTES = 1 << 27
# Rows whose n x n kernel fits in memory (3 GB).
_MAX_KERNEL_ROWS = 20_000
# Newton's method of the logistic estimator: the gradient norm to reach, relative to the start, and when to give up.
_NEWTON_TOLERANCE, _NEWTON_STEPS = 1e-5, 50


@dataclass(frozen=True)
class TaskMoments:
    """Sums over the rows of each task (or of each target).

    Outer products are added up in float64 and kept in float32: they are the memory of a run (n d^2 numbers), and with
    rounding this small the estimates move by less than 1e-6, also at a tenth of a thousandth of the default ridge.

    Attributes:
        counts: N_t, (n,) int64.
        output_sums: sum of the outputs, (n,) float64.
        sums: b_t, sum of the gradients, (n, d) float64.
        outers: H_t, sum of their outer products, (n, d, d) float32.
    """

    counts: np.ndarray
    output_sums: np.ndarray
    sums: np.ndarray
    outers: np.ndarray


@dataclass(frozen=True)
class Rows:
    """The rows behind the moments; estimators "logistic" and "kernel" need them.

    Attributes:
        rows: projected gradients (R, d); may be memory-mapped.
        outputs: (R,).
        task_of_row: (R,), -1 for rows of no task.
        target_of_row: (R,), -1 for rows of no target.
    """

    rows: np.ndarray
    outputs: np.ndarray
    task_of_row: np.ndarray
    target_of_row: np.ndarray


@dataclass(frozen=True)
class Part:
    """What was collected at one checkpoint of meta-training: moments of the n tasks and of the k targets."""

    train: TaskMoments
    target: TaskMoments
    rows: Rows | None = None


OnSubsets = Callable[[Tensor], Tensor]


def task_moments(
    rows: np.ndarray, outputs: np.ndarray, task_of_sample: np.ndarray, num_tasks: int, block_rows: int = 8192
) -> TaskMoments:
    """The moments of each task, read in blocks: no copy of all rows is made.

    Args:
        rows: projected gradients (N, d); may be memory-mapped.
        outputs: (N,).
        task_of_sample: task of each row (N,), -1 for rows that are left out.
        num_tasks: n.
        block_rows: rows in memory at once.

    Raises:
        ValueError: the lengths differ, a task id is out of range, or a row is not finite.
    """
    if not len(rows) == len(outputs) == len(task_of_sample):
        raise ValueError(f"{len(rows)} rows, {len(outputs)} outputs and {len(task_of_sample)} task ids must be equally many")
    task_of_sample = np.asarray(task_of_sample)
    outside = (task_of_sample < -1) | (task_of_sample >= num_tasks)
    if outside.any():
        sample = int(np.flatnonzero(outside)[0])
        raise ValueError(f"row {sample} has task {task_of_sample[sample]}; tasks are 0 to {num_tasks - 1}, or -1 for none")
    dim = rows.shape[1]
    moments = TaskMoments(
        counts=np.bincount(task_of_sample[task_of_sample >= 0], minlength=num_tasks),
        output_sums=np.zeros(num_tasks),
        sums=np.zeros((num_tasks, dim)),
        outers=np.empty((num_tasks, dim, dim), np.float32),
    )
    for task in range(num_tasks):
        outer = np.zeros((dim, dim))
        samples = np.flatnonzero(task_of_sample == task)
        for start in range(0, len(samples), block_rows):
            block = samples[start : start + block_rows]
            gradients = np.asarray(rows[block], np.float64)
            moments.output_sums[task] += np.asarray(outputs[block], np.float64).sum()
            moments.sums[task] += gradients.sum(axis=0)
            outer += gradients.T @ gradients
        moments.outers[task] = outer
    _check_finite(moments, "task")
    return moments


def estimate(
    parts: Sequence[Part],
    membership: np.ndarray,
    *,
    estimator: str = "ridge",
    rho: float = 0.01,
    weight_by: str = "sample",
    progress: Callable[..., Any] | None = None,
) -> np.ndarray:
    """The estimated output of every target after fine-tuning on every subset; lower is better.

    With several parts the result is the mean of the parts' estimates (DESIGN section 2: gradients at several
    checkpoints say more than at one; the mean ranks like their sum). An empty subset gets the target's mean output.

    Args:
        parts: one for each checkpoint, all with the same tasks and targets.
        membership: (m, n) bool, or float weights of the tasks, not negative.
        estimator: one of `ESTIMATORS`:
            "ridge", L_val + b_val.x_S/N_val with x_S = -(H_S/N_S + lambda I)^-1 b_S/N_S, the regression of -1 on the
            gradients of the subset;
            "logistic", the paper's (arXiv:2409.19458, section 3): x_S = argmin mean log(1 + exp(o_i + g_i.x)) +
            lambda |x|^2 with outputs o = minus the margin, evaluated as the mean of log(1 + exp(o_i + g_i.x_S)) over the
            target's rows;
            "kernel", ridge computed in the kernel of the rows: the same numbers, faster for fewer rows than d;
            "alignment", L_val - b_val.b_S/(N_val N_S), a step along the mean gradient as in LESS: ranks only;
            "constant", L_val, what an estimate must beat.
        rho: ridge strength relative to the mean squared norm of a gradient: lambda = rho trace(H_all/N).
        weight_by: "sample", every row counts the same; "task", every task of a subset does.
        progress: makes a progress bar, called as progress(desc=..., total=..., unit=...).

    Returns:
        (m, k) float64.

    Raises:
        ValueError: an unknown name, shapes that do not fit, a subset or target without rows, moments that are not
            finite, rho not above 0, or an estimator that needs rows in a part without them.
    """
    if estimator not in _ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}; choose one of {', '.join(ESTIMATORS)}")
    if not parts:
        raise ValueError("no projected gradients to estimate from: parts is empty")
    sizes = {(len(part.train.counts), *part.target.sums.shape) for part in parts}
    if len({(num_tasks, num_targets) for num_tasks, num_targets, _ in sizes}) > 1:
        raise ValueError(f"the parts must agree on tasks and targets, found (tasks, targets, d) = {sorted(sizes)}")
    jobs = []
    for part in parts:
        _check_finite(part.target, "target")
        if not part.target.counts.all():
            raise ValueError(f"target {int(np.argmin(part.target.counts))} has no rows, so nothing can be estimated for it")
        weights, strength = _row_weights(part, membership, rho, weight_by)
        jobs.append((part, weights, _ESTIMATORS[estimator](part, strength)))
    bar = progress(desc=f"estimates ({estimator})", total=len(parts) * len(membership), unit="subset") if progress else None
    total = sum(_over_chunks(part, weights, on_subsets, bar) for part, weights, on_subsets in jobs)
    if bar is not None:
        bar.close()
    return total / len(parts)


def ridge_solutions(
    part: Part, membership: np.ndarray, rho: float = 0.01, weight_by: str = "sample"
) -> np.ndarray:
    """x_S of estimator "ridge" for every subset, (m, d) float64; `Projection.lift` takes one to the parameters.

    Arguments and errors as in `estimate`.
    """
    weights, strength = _row_weights(part, membership, rho, weight_by)
    return _over_chunks(part, weights, _ridge_solver(part, strength), None)


def first_order_error(
    outputs_at_start: np.ndarray, rows: np.ndarray, solution: np.ndarray, outputs_displaced: np.ndarray
) -> float:
    """How far outputs after a displacement are from their first-order approximation.

    |f(w* + delta) - f(w*) - g.delta|^2 / |f(w* + delta)|^2 over samples (DESIGN section 2, "Approximation error"), with
    delta = P x, so that g.delta is the row times x. To be judged beside `zero_order_error`.

    Args:
        outputs_at_start: f(w*), (N,).
        rows: projected gradients (N, d).
        solution: x (d,), scaled as the displacement was.
        outputs_displaced: f(w* + P x), (N,).
    """
    changes = np.asarray(rows, np.float64) @ np.asarray(solution, np.float64)
    return zero_order_error(np.asarray(outputs_at_start, np.float64) + changes, outputs_displaced)


def zero_order_error(outputs_at_start: np.ndarray, outputs_displaced: np.ndarray) -> float:
    """|f(w* + delta) - f(w*)|^2 / |f(w* + delta)|^2: the error of taking the outputs (N,) not to change at all."""
    displaced = np.asarray(outputs_displaced, np.float64)
    return float(np.sum((displaced - outputs_at_start) ** 2) / np.sum(displaced**2))


# --- estimators: (part, lambda) -> (row weights (c, n) -> estimates (c, k)) -----------------------------------


def _ridge(part: Part, strength: float) -> OnSubsets:
    solve, means, slopes = _ridge_solver(part, strength), *_target_means(part)
    return lambda weights: means + solve(weights) @ slopes.T


def _alignment(part: Part, strength: float) -> OnSubsets:
    sums, counts, (means, slopes) = _tensor(part.train.sums), _tensor(part.train.counts), _target_means(part)
    return lambda weights: means - _shares(weights, counts) @ sums @ slopes.T


def _constant(part: Part, strength: float) -> OnSubsets:
    means, _ = _target_means(part)
    return lambda weights: means.expand(len(weights), -1)


def _kernel(part: Part, strength: float) -> OnSubsets:
    """x = -G' (G G' + lambda I)^-1 s with the rows of G times s, the roots of their shares."""
    gradients, _, task_of_row = _task_rows(part)
    if len(gradients) > _MAX_KERNEL_ROWS:
        raise ValueError(
            f"estimator 'kernel' holds a matrix of rows x rows and takes up to {_MAX_KERNEL_ROWS:,} rows, found "
            f"{len(gradients):,}; estimator 'ridge' gives the same numbers"
        )
    gradients = gradients.double()
    kernel, counts, (means, slopes) = gradients @ gradients.T, _tensor(part.train.counts), _target_means(part)
    target_kernel = slopes @ gradients.T  # (k, N)

    def on_subset(shares: Tensor) -> Tensor:
        chosen = shares.nonzero().squeeze(1)
        roots = shares[chosen].sqrt()
        gram = roots[:, None] * kernel[chosen][:, chosen] * roots
        gram.diagonal().add_(strength)
        return means - target_kernel[:, chosen] @ (roots * _solve(gram, roots))

    return lambda weights: torch.stack([on_subset(shares) for shares in _shares(weights, counts)[:, task_of_row]])


def _logistic(part: Part, strength: float) -> OnSubsets:
    """Newton's method for all subsets of a chunk at once, its d x d systems solved by conjugate gradients.

    The systems are well conditioned (lambda is a share of their trace), so that a few products with the rows do what a
    d x d Hessian for every subset and step would cost hundreds of times more for.
    """
    gradients, outputs, task_of_row = _task_rows(part)
    stored, counts = part.rows, _tensor(part.train.counts)
    of_target = np.flatnonzero(np.asarray(stored.target_of_row) >= 0)
    target_gradients = torch.from_numpy(np.asarray(stored.rows[of_target], np.float32))
    target_outputs = torch.from_numpy(np.asarray(stored.outputs[of_target], np.float32))
    target_shares = one_hot(torch.from_numpy(np.asarray(stored.target_of_row)[of_target]).long(), len(part.target.counts))
    target_shares = target_shares / target_shares.sum(0)  # (rows of targets, k)

    def on_subsets(weights: Tensor) -> Tensor:
        shares = _shares(weights, counts).float()[:, task_of_row]  # (c, N)
        solutions = _minimise_logistic(gradients, outputs, shares, strength)
        return (softplus(target_outputs + solutions @ target_gradients.T) @ target_shares).double()

    return on_subsets


_ESTIMATORS: dict[str, Callable[[Part, float], OnSubsets]] = {
    "ridge": _ridge,
    "logistic": _logistic,
    "kernel": _kernel,
    "alignment": _alignment,
    "constant": _constant,
}
ESTIMATORS = tuple(_ESTIMATORS)


def _ridge_solver(part: Part, strength: float) -> OnSubsets:
    """From row weights (c, n) to x_S (c, d), one batched Cholesky."""
    counts, sums = _tensor(part.train.counts), _tensor(part.train.sums)
    num_tasks, dim = sums.shape
    outers = torch.from_numpy(np.asarray(part.train.outers, np.float32)).view(num_tasks, dim * dim)

    def solve(weights: Tensor) -> Tensor:
        shares = _shares(weights, counts)
        second_moments = (shares.float() @ outers).view(-1, dim, dim)
        second_moments.diagonal(dim1=1, dim2=2).add_(strength)
        return -_solve(second_moments, (shares @ sums).float()).double()

    return solve


def _minimise_logistic(gradients: Tensor, outputs: Tensor, shares: Tensor, strength: float) -> Tensor:
    """argmin_x sum_i share_i log(1 + exp(o_i + g_i.x)) + lambda |x|^2 for each row of shares: (c, d).

    Args:
        gradients: g (N, d). outputs: o (N,). shares: (c, N), each line sums to 1 (or is 0: an empty subset).
    """
    solutions = gradients.new_zeros(len(shares), gradients.shape[1])
    logits = outputs.expand(len(shares), -1)  # (c, N)
    first_norm = None
    for _ in range(_NEWTON_STEPS):
        likely = logits.sigmoid()
        slope = (shares * likely) @ gradients + 2 * strength * solutions  # (c, d)
        norm = slope.norm(dim=1)
        first_norm = norm if first_norm is None else first_norm
        active = norm > _NEWTON_TOLERANCE * first_norm
        if not active.any():
            return solutions
        curvature = shares * likely * (1 - likely)
        step = _conjugate_gradients(
            lambda x, c=curvature: (c * (x @ gradients.T)) @ gradients + 2 * strength * x, -slope
        )
        change = step @ gradients.T
        length = _step_length(solutions, step, logits, change, shares, strength)
        solutions = solutions + length * step
        logits = logits + length * change
    raise ValueError(
        f"estimator 'logistic' did not converge for {int(active.sum())} subsets in {_NEWTON_STEPS} Newton steps; raise rho"
    )
