"""From projected gradients to the estimated loss of a target after fine-tuning on any subset of the tasks.

Why this module exists: once each task is summed up in its moments (N_t, sum of gradients, sum of their outer products,
each row with a weight), the estimate for a subset is a d x d solve. No sample, no model and no file is touched again, and a thousand subsets take
a second. Where there are fewer rows than dimensions, the same numbers come
from the rows' kernel, and no d x d matrix is made. Everything is lower-is-better: outputs are losses or, in a margin
store, minus the margins, and so are the estimates.

An estimator is an entry of `ESTIMATORS`: a function that takes one checkpoint's `Part` and the ridge strength lambda and
returns a function from row weights (c, n) of some subsets to their estimates (c, k); and what it needs. To add one, write
the function and name it there.

Shapes: R stored rows, N rows of the tasks, d projection dimension, n tasks, m subsets, c subsets of a chunk, k targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot, softplus

WEIGHT_BY = ("token", "sample", "task")
DEFAULT_RHO = 1e-3
CURVATURE_POWER = 1
"""A training row of n target tokens counts n to this power in H_S. Power 2 is what independent gradients of tokens would ask
for. Two synthetic worlds of 16 sources, every other one with four answers in a row (`data/make_synthetic.py --joined 4`, seeds
0 and 1), 29 and 25 halves fine-tuned under two seeds, LDS of "ridge", attainable maximum 0.965 and 0.964:

                       rho 0.001        0.003         0.01
    rows alike         0.90  0.77   0.92  0.68   0.90  0.76
    power 1            0.92  0.83   0.93  0.78   0.90  0.82
    power 2            0.90  0.80   0.90  0.83   0.88  0.83

Power 2 without a power of 1 in the target's curvature, which is then in another unit: 0.51 and 0.26 at rho 0.001."""

OnSubsets = Callable[[Tensor], Tensor]
"""Row weights (c, n) -> estimates (c, k), or solutions (c, d)."""

# Memory for the work on a chunk of subsets.
_CHUNK_BYTES = 1 << 28
# Rows whose kernel, rows x rows in float32, fits in memory (1.6 GB).
_MAX_KERNEL_ROWS = 20_000
# Newton's method of the logistic estimator: the gradient norm to reach, relative to the start, and when to give up.
_NEWTON_TOLERANCE, _NEWTON_STEPS = 1e-5, 50


@dataclass(frozen=True)
class TaskMoments:
    """Weighted sums over the rows of each task (or of each target).

    Outer products are added up block by block and kept in float32, since they are most of a run's memory (n d^2 numbers).
    With the solves in float32 too, estimates change by less than 1e-6 of themselves at the default ridge, and by less
    than 1e-5 with a ridge ten thousand times smaller.

    Attributes:
        counts: number of rows, (n,) int64.
        weights: N_t, sum of the rows' weights, (n,) float64.
        output_sums: weighted sum of the outputs, (n,) float64.
        sums: b_t, weighted sum of the gradients, (n, d) float64.
        squares: trace of H_t, sum of their squared norms with the weights of the curvature, (n,) float64.
        outers: H_t, sum of their outer products with these weights, (n, d, d) float32; None where the rows are to be used
            instead.
    """

    counts: np.ndarray
    weights: np.ndarray
    output_sums: np.ndarray
    sums: np.ndarray
    squares: np.ndarray
    outers: np.ndarray | None


@dataclass(frozen=True)
class Rows:
    """The rows that the moments sum up: for moments without `outers`, and for estimators "logistic" and "kernel".

    Attributes:
        rows: projected gradients (R, d); may be memory-mapped.
        outputs: (R,).
        task_of_row: (R,), -1 for rows of no task.
        target_of_row: (R,), -1 for rows of no target.
        weights: (R,), of a row in sums of gradients; None = 1.
        curvatures: (R,), of a row in sums of outer products; None = 1.
    """

    rows: np.ndarray
    outputs: np.ndarray
    task_of_row: np.ndarray
    target_of_row: np.ndarray
    weights: np.ndarray | None = None
    curvatures: np.ndarray | None = None


@dataclass(frozen=True)
class Part:
    """What was collected at one checkpoint of meta-training: moments of the n tasks and of the k targets.

    Attributes:
        train, target: Moments.
        rows: What they sum, where it is needed.
        output_function: "loss" or "margin", what the rows are gradients of.
        weight_by: One of `WEIGHT_BY`: "token" for moments with `token_weights`, "sample" for rows that weigh the same,
            "task" for such moments of which every task of a subset weighs the same.
    """

    train: TaskMoments
    target: TaskMoments
    rows: Rows | None = None
    output_function: str = "loss"
    weight_by: str = "sample"


def token_weights(target_tokens: np.ndarray, is_training: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of rows for an estimate of training that minimises the mean over tokens.

    A training row of n target tokens counts n times in b_S and N_S, and n to the power of `CURVATURE_POWER` in H_S. The
    target's loss is a mean over rows, which weigh the same there; in its curvature they have one power less, so that it
    is in the unit of H_S. Lengths are taken relative to their mean over training rows: where all are equal, every weight is 1.

    Args:
        target_tokens: n, (R,).
        is_training: Which rows are trained on, (R,) bool; the others are a target's.

    Returns:
        Weights of gradients (R,) and of outer products (R,), for `task_moments` and `Rows`.
    """
    relative = target_tokens / target_tokens[is_training].mean()
    return np.where(is_training, relative, 1.0), relative ** np.where(is_training, CURVATURE_POWER, CURVATURE_POWER - 1)


def task_moments(
    rows: np.ndarray,
    outputs: np.ndarray,
    task_of_sample: np.ndarray,
    num_tasks: int,
    *,
    weights: np.ndarray | None = None,
    curvatures: np.ndarray | None = None,
    outers: bool = True,
    block_rows: int | None = None,
    progress: Callable[..., Any] | None = None,
) -> TaskMoments:
    """The moments of each task, read in blocks: no copy of all rows is made.

    Args:
        rows: projected gradients (N, d); may be memory-mapped.
        outputs: (N,).
        task_of_sample: task of each row (N,), -1 for rows that are left out.
        num_tasks: n.
        weights: weight of each row in sums of outputs and gradients (N,); None = 1.
        curvatures: and in sums of squares and outer products (N,); None = 1.
        outers: also sum the outer products, n d^2 numbers.
        block_rows: rows in memory at once; None = so many that a task has several, whose outer products are taken together.
        progress: makes a progress bar, called as progress(iterable, desc=..., unit=...).

    Raises:
        ValueError: the lengths differ, a task id is out of range, or a row is not finite.
    """
    if not len(rows) == len(outputs) == len(task_of_sample):
        raise ValueError(
            f"{len(rows)} rows, {len(outputs)} outputs and {len(task_of_sample)} task ids must be equally many"
        )
    task_of_sample = np.asarray(task_of_sample)
    outside = (task_of_sample < -1) | (task_of_sample >= num_tasks)
    if outside.any():
        sample = int(np.flatnonzero(outside)[0])
        raise ValueError(
            f"row {sample} has task {task_of_sample[sample]}; tasks are 0 to {num_tasks - 1}, or -1 for none"
        )
    dim, block_rows = rows.shape[1], block_rows or max(8192, 64 * num_tasks)
    of_gradient, of_square = (np.ones(len(rows)) if of is None else np.asarray(of) for of in (weights, curvatures))
    moments = TaskMoments(
        counts=np.zeros(num_tasks, np.int64),
        weights=np.zeros(num_tasks),
        output_sums=np.zeros(num_tasks),
        sums=np.zeros((num_tasks, dim)),
        squares=np.zeros(num_tasks),
        outers=np.zeros((num_tasks, dim, dim), np.float32) if outers else None,
    )
    starts = range(0, len(rows), block_rows)
    for start in progress(starts, desc="moments", unit="block") if progress else starts:
        block, tasks = np.asarray(rows[start : start + block_rows]), task_of_sample[start : start + block_rows]
        order = np.argsort(tasks, kind="stable")[np.count_nonzero(tasks < 0) :]
        for own in np.split(order, np.flatnonzero(np.diff(tasks[order])) + 1) if len(order) else ():
            task, gradients, samples = tasks[own[0]], block[own].astype(np.float64), start + own
            scaled = of_square[samples, None] * gradients
            moments.counts[task] += len(own)
            moments.weights[task] += of_gradient[samples].sum()
            moments.output_sums[task] += of_gradient[samples] @ np.asarray(outputs[samples], np.float64)
            moments.sums[task] += of_gradient[samples] @ gradients
            moments.squares[task] += np.vdot(scaled, gradients)
            if moments.outers is not None:
                moments.outers[task] += gradients.T @ scaled
    _check_finite(moments, "task")
    return moments


def estimate(
    parts: Sequence[Part],
    membership: np.ndarray,
    *,
    estimator: str = "ridge",
    rho: float = DEFAULT_RHO,
    targets: Sequence[int] | None = None,
    progress: Callable[..., Any] | None = None,
) -> np.ndarray:
    """The estimated output of every target after fine-tuning on every subset; lower is better.

    With several parts the result is the mean of the parts' estimates (gradients at several
    checkpoints say more than at one; the mean ranks like their sum). An empty subset gets the target's mean output.

    Args:
        parts: one for each checkpoint, all with the same tasks and targets.
        membership: (m, n) bool, or float weights of the tasks, not negative.
        estimator: one of `ESTIMATORS`:
            "ridge", x_S = -(H_S/N_S + lambda I)^-1 b_S/N_S, the regression of -1 on the gradients of the subset and the
            lowest point of the quadratic model of its loss whose curvature is H_S/N_S (the empirical Fisher matrix). The
            target has the same model: L_val + b_val.x_S/N_val + x_S.H_val x_S/(2 N_val). In a margin store, whose
            outputs are no losses, the last term is left out;
            "linear", the same without the last term: first order in the target;
            "logistic", the paper's (arXiv:2409.19458), for stores of outputs o = minus the margin: x_S minimises the
            mean of log(1 + exp(o_i + g_i.x)) + lambda |x|^2, and the estimate is the mean of log(1 + exp(o_i + g_i.x_S))
            over the target's rows, for an empty subset too;
            "kernel", ridge from the kernel of the rows, whatever their number: the same numbers;
            "alignment", L_val - b_val.b_S/(N_val N_S), a step along the mean gradient as in LESS: ranks only;
            "representation", alignment in parts whose rows are representations of unit length instead of gradients, so
            that it ranks by mean cosine similarity to the target, as in RDS;
            "constant", L_val, what an estimate must beat.
        rho: ridge strength relative to the mean squared norm of a gradient: lambda = rho trace(H_all/N).
        targets: ids of the targets wanted; None = all k.
        progress: makes a progress bar, called as progress(desc=..., total=..., unit=...).

    Returns:
        (m, k) float64.

    Raises:
        ValueError: an unknown name, shapes that do not fit, a subset or target without rows, moments that are not
            finite, rho not above 0, or an estimator that needs rows in a part without them.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}; choose one of {', '.join(ESTIMATORS)}")
    if not parts:
        raise ValueError("no projected gradients to estimate from: parts is empty")
    sizes = {(len(part.train.counts), *part.target.sums.shape) for part in parts}
    if len({(num_tasks, num_targets) for num_tasks, num_targets, _ in sizes}) > 1:
        raise ValueError(f"the parts must agree on tasks and targets, found (tasks, targets, d) = {sorted(sizes)}")
    wanted = np.arange(len(parts[0].target.counts)) if targets is None else np.asarray(targets)
    for part in parts:
        _check_finite(part.target, "target")
        if not part.target.counts[wanted].all():
            target = int(wanted[np.argmin(part.target.counts[wanted])])
            raise ValueError(f"target {target} has no rows, so nothing can be estimated for it")
    if targets is not None:
        parts = [_with_targets(part, targets) for part in parts]
    weighted = [_row_weights(part, membership, rho) for part in parts]
    total = np.zeros((len(membership), len(parts[0].target.counts)))
    length = len(parts) * len(membership)
    with progress(desc="estimates", total=length, unit="subset") if progress else nullcontext() as bar:
        for part, (weights, strength) in zip(parts, weighted, strict=True):
            total += _over_chunks(part, weights, ESTIMATORS[estimator].make(part, strength), bar)
    return total / len(parts)


def solutions(
    part: Part,
    membership: np.ndarray,
    *,
    estimator: str = "ridge",
    rho: float = DEFAULT_RHO,
) -> np.ndarray:
    """x_S of an estimator for every subset, (m, d) float64; `Projection.lift` takes one to the parameters.

    Arguments and errors as in `estimate`.

    Raises:
        ValueError: an estimator without a solution.
    """
    weights, strength = _row_weights(part, membership, rho)
    return _over_chunks(part, weights, solver_of(estimator)(part, strength), None)


def solver_of(estimator: str) -> Callable[[Part, float], OnSubsets]:
    """What makes an estimator's solutions.

    Raises:
        ValueError: it has none.
    """
    if (solver := ESTIMATORS[estimator].solver) is None:
        having = ", ".join(name for name, kind in ESTIMATORS.items() if kind.solver)
        raise ValueError(f"estimator {estimator!r} has no solution to displace a model by; choose one of {having}")
    return solver


def mixture_weights(
    parts: Sequence[Part],
    targets: Sequence[int],
    *,
    rho: float = DEFAULT_RHO,
    steps: int = 300,
    progress: Callable[..., Any] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """How much to draw from each task for the lowest mean estimate of some targets.

    The estimates of "ridge" are a smooth function of row weights, so that the weights of the tasks, positive and of fixed
    sum, follow its gradient (Adam on their logarithms) from equal weights on. A local minimum, as with any selection.

    Args:
        parts: As in `estimate`.
        targets: Ids of the targets whose mean is minimised.
        rho: As in `estimate`.
        steps: Steps of the descent; the best of them counts.
        progress: As in `estimate`.

    Returns:
        Share of the rows to draw from each task (n,), summing to 1; the mean estimate at every step (steps,).
    """
    parts = [_with_targets(part, targets) for part in parts]
    num_tasks = len(parts[0].train.counts)
    everything = np.ones((1, num_tasks))
    models = []
    for part in parts:
        of_row, strength = _row_weights(part, everything, rho)
        models.append((of_row, _ridge(part, strength)))
    logits = torch.zeros(1, num_tasks, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    course: list[float] = []
    best = logits.detach()[0]
    with progress(desc="mixture weights", total=steps, unit="step") if progress else nullcontext() as bar:
        for _ in range(steps):
            weights = num_tasks * logits.softmax(1)
            value = torch.stack([estimates_of(weights * of_row).mean() for of_row, estimates_of in models]).mean()
            if not course or value < min(course):
                best = weights.detach()[0]
            course.append(float(value.detach()))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            if bar is not None:
                bar.update(1)
    rows = (best * models[0][0][0]).numpy() * parts[0].train.counts
    return rows / rows.sum(), np.array(course)


def first_order_error(
    outputs_at_start: np.ndarray, rows: np.ndarray, solution: np.ndarray, outputs_displaced: np.ndarray
) -> float:
    """How far outputs after a displacement are from their first-order approximation.

    |f(w* + delta) - f(w*) - g.delta|^2 / |f(w* + delta)|^2 over samples, with
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
    solve, predict = _ridge_solver(part, strength), _target_model(part)
    return lambda weights: predict(solve(weights))


def _linear(part: Part, strength: float) -> OnSubsets:
    solve, means, slopes = _ridge_solver(part, strength), *_target_means(part)
    return lambda weights: means + solve(weights) @ slopes.T


def _kernel(part: Part, strength: float) -> OnSubsets:
    solve, predict = _kernel_solver(part, strength), _target_model(part)
    return lambda weights: predict(solve(weights))


def _alignment(part: Part, strength: float) -> OnSubsets:
    sums, totals, (means, slopes) = _tensor(part.train.sums), _tensor(part.train.weights), _target_means(part)
    return lambda weights: means - _shares(weights, totals) @ sums @ slopes.T


def _constant(part: Part, strength: float) -> OnSubsets:
    means, _ = _target_means(part)
    return lambda weights: means.expand(len(weights), -1)


def _logistic(part: Part, strength: float) -> OnSubsets:
    rows, solve = _needed_rows(part), _logistic_solver(part, strength)
    gradients, outputs, target_of_row = _rows_of_groups(rows, rows.target_of_row)
    in_target = one_hot(target_of_row, len(part.target.counts)).double()
    in_target /= in_target.sum(0)  # (rows of targets, k)
    return lambda weights: softplus(outputs + solve(weights) @ gradients.T) @ in_target


def _ridge_solver(part: Part, strength: float) -> OnSubsets:
    """From row weights (c, n) to x_S (c, d): one batched Cholesky, or the kernel where there are no `outers`."""
    if part.train.outers is None:
        return _kernel_solver(part, strength)
    totals, sums = _tensor(part.train.weights), _tensor(part.train.sums)
    num_tasks, dim = sums.shape
    outers = torch.from_numpy(np.asarray(part.train.outers, np.float32)).view(num_tasks, dim * dim)

    def solve(weights: Tensor) -> Tensor:
        shares = _shares(weights, totals)
        second_moments = _combined(shares.float(), outers).view(-1, dim, dim)
        second_moments.diagonal(dim1=1, dim2=2).add_(strength)
        return -_solve(second_moments, (shares @ sums).float()).double()

    return solve


def _logistic_solver(part: Part, strength: float) -> OnSubsets:
    """From row weights (c, n) to the x_S (c, d) of "logistic": Newton's method for all subsets of a chunk at once, its
    d x d systems solved by conjugate gradients.

    Lambda is a share of their trace, so these systems are well conditioned: a few products with the rows solve them,
    where forming a d x d Hessian for every subset and step would cost about d/10 times as much.
    """
    rows, totals = _needed_rows(part), _tensor(part.train.weights)
    gradients, outputs, task_of_row = _rows_of_groups(rows, rows.task_of_row)
    of_row = _chosen(rows.weights, rows.task_of_row)
    return lambda weights: _minimise_logistic(
        gradients, outputs, _shares(weights, totals)[:, task_of_row] * of_row, strength
    )


def _combined(shares: Tensor, outers: Tensor) -> Tensor:
    """shares (c, n) @ outers (n, d^2). Where subsets differ from one of them by a task or two, as a search's do, that one's
    sum is taken once and the others' few terms are added to it: c d^2 numbers are moved, not n c d^2 multiplied. Terms that
    are left out because they are 0 have a slope, so that where one is wanted it is the plain product."""
    if shares.requires_grad:
        return shares @ outers
    scale, common = (values.values for values in (shares.max(1), (shares / shares.amax(1, keepdim=True)).min(0)))
    # shares are weights over totals, so that subsets with equal weights have proportional rows
    rest = shares / scale[:, None] - common
    rows, tasks = rest.nonzero(as_tuple=True)
    if not scale.all() or len(rows) > 2 * len(shares):
        return shares @ outers
    total = (common @ outers).expand(len(shares), -1).clone()
    total.index_add_(0, rows, outers[tasks] * rest[rows, tasks, None])
    return total * scale[:, None]


def _kernel_solver(part: Part, strength: float) -> OnSubsets:
    """x = -G' (G G' + lambda I)^-1 s/r with the rows of G times r, the roots of their shares in the curvature, and s their
    shares in the gradient: x_S (c, d) as above."""
    rows = _needed_rows(part)
    chosen_rows, task_of_row = _in_group(rows.task_of_row)
    if len(chosen_rows) > _MAX_KERNEL_ROWS:
        raise ValueError(
            f"estimator 'kernel' holds a matrix of rows x rows and takes up to {_MAX_KERNEL_ROWS:,} rows, found "
            f"{len(chosen_rows):,}; estimator 'ridge' gives the same numbers"
        )
    gradients = torch.from_numpy(np.asarray(rows.rows[chosen_rows], np.float32))
    kernel, totals = gradients @ gradients.T, _tensor(part.train.weights)
    of_row, in_curvature = (_chosen(of, rows.task_of_row) for of in (rows.weights, rows.curvatures))

    def on_subset(shares: Tensor) -> Tensor:
        chosen = (shares * in_curvature).nonzero().squeeze(1)
        shares = shares[chosen]
        roots = (shares * in_curvature[chosen]).sqrt()
        goals, roots = (shares * of_row[chosen] / roots).float(), roots.float()
        gram = roots[:, None] * kernel[chosen][:, chosen] * roots
        gram.diagonal().add_(strength)
        return -(roots * _solve(gram, goals)) @ gradients[chosen]

    return lambda weights: torch.stack(
        [on_subset(shares) for shares in _shares(weights, totals)[:, task_of_row]]
    ).double()


def _target_model(part: Part) -> OnSubsets:
    """From x (c, d) to the estimates (c, k) of "ridge"."""
    means, slopes = _target_means(part)
    if part.output_function != "loss":
        return lambda solutions: means + solutions @ slopes.T
    totals = _tensor(part.target.weights)
    if part.target.outers is None:
        rows = _needed_rows(part)
        chosen, target_of_row = _in_group(rows.target_of_row)
        in_curvature = _chosen(rows.curvatures, rows.target_of_row)
        gradients = torch.from_numpy(np.asarray(rows.rows[chosen], np.float32))

        def squares(solutions: Tensor) -> Tensor:
            changes = (solutions.float() @ gradients.T).double()
            summed = changes.new_zeros(len(changes), len(totals))
            return summed.index_add_(1, target_of_row, in_curvature * changes.square()) / totals
    else:
        outers = torch.from_numpy(np.asarray(part.target.outers, np.float32))

        def squares(solutions: Tensor) -> Tensor:
            solutions = solutions.float()
            return torch.stack([((solutions @ outer) * solutions).sum(1) for outer in outers], dim=1).double() / totals

    return lambda solutions: means + solutions @ slopes.T + squares(solutions) / 2


def _minimise_logistic(gradients: Tensor, outputs: Tensor, shares: Tensor, strength: float) -> Tensor:
    """argmin over x of sum_i share_i log(1 + exp(o_i + g_i.x)) + lambda |x|^2.

    Args:
        gradients: g (N, d).
        outputs: o (N,).
        shares: (c, N), each line a subset; lines sum to 1, or are 0 for an empty subset.
        strength: lambda.

    Returns:
        (c, d).
    """
    solutions = gradients.new_zeros(len(shares), gradients.shape[1])
    logits = outputs.expand(len(shares), -1)
    start_norm = None
    for _ in range(_NEWTON_STEPS):
        likely = logits.sigmoid()
        slope = (shares * likely) @ gradients + 2 * strength * solutions  # (c, d)
        norm = slope.norm(dim=1)
        start_norm = norm if start_norm is None else start_norm
        if (norm <= _NEWTON_TOLERANCE * start_norm).all():
            return solutions
        curvature = shares * likely * (1 - likely)
        step = _conjugate_gradients(gradients, curvature, 2 * strength, -slope)
        change = step @ gradients.T
        length = _step_length(logits, change, solutions, step, shares, strength)
        solutions = solutions + length * step
        logits = logits + length * change
    raise ValueError(f"estimator 'logistic' has not converged after {_NEWTON_STEPS} Newton steps; raise rho")


def _conjugate_gradients(gradients: Tensor, curvature: Tensor, ridge: float, goal: Tensor) -> Tensor:
    """Solve (sum_i curvature_i g_i g_i^T + ridge I) x = goal for each subset, to 1 % of the goal's norm: (c, d)."""
    solution, residual = torch.zeros_like(goal), goal
    direction, square = residual, residual.square().sum(1, keepdim=True)
    enough, tiny = 1e-4 * square, torch.finfo(goal.dtype).tiny
    for _ in range(goal.shape[1]):
        if (square <= enough).all():
            break
        product = (curvature * (direction @ gradients.T)) @ gradients + ridge * direction
        length = square / (direction * product).sum(1, keepdim=True).clamp_min(tiny)
        solution = solution + length * direction
        residual = residual - length * product
        previous, square = square, residual.square().sum(1, keepdim=True)
        direction = residual + square / previous.clamp_min(tiny) * direction
    return solution


def _step_length(
    logits: Tensor, change: Tensor, solutions: Tensor, step: Tensor, shares: Tensor, strength: float
) -> Tensor:
    """The damping of Newton's method: 1, halved for each subset until its objective does not rise, (c, 1)."""

    def objective(length: Tensor) -> Tensor:
        penalty = strength * (solutions + length * step).square().sum(1, keepdim=True)
        return (shares * softplus(logits + length * change)).sum(1, keepdim=True) + penalty

    length = torch.ones_like(step[:, :1])
    highest = objective(torch.zeros_like(length)) * (1 + 1e-12)  # rounding
    for _ in range(20):
        rises = objective(length) > highest
        if not rises.any():
            break
        length = torch.where(rises, length / 2, length)
    return length


# --- shared by the estimators --------------------------------------------------------------------------------


def _row_weights(part: Part, membership: np.ndarray, rho: float) -> tuple[Tensor, float]:
    """The factor of the moments of each task in each subset, (m, n) float64, and the ridge strength lambda."""
    _check_finite(part.train, "task")
    counts = part.train.counts
    weights = np.asarray(membership, np.float64)
    if weights.ndim != 2 or weights.shape[1] != len(counts):
        raise ValueError(f"membership has shape {weights.shape}, expected (subsets, {len(counts)} tasks)")
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError("weights of tasks must be finite and not negative")
    if not rho > 0:
        raise ValueError(f"rho must be above 0, found {rho}")
    if part.weight_by not in WEIGHT_BY:
        raise ValueError(f"unknown weight_by {part.weight_by!r}; choose one of {', '.join(WEIGHT_BY)}")
    without_rows = weights.any(axis=1) & ~(weights @ counts > 0)
    if without_rows.any():
        subset = int(np.argmax(without_rows))
        tasks = ", ".join(map(str, np.flatnonzero(weights[subset])))
        raise ValueError(f"subset {subset} (tasks {tasks}) has no rows; leave it out, or give its tasks rows")
    of_row = 1 / np.maximum(counts, 1) if part.weight_by == "task" else np.ones(len(counts))
    mean_square = (of_row @ part.train.squares) / (of_row @ part.train.weights or 1.0)
    # gradients that are all zero have the solution 0 with any ridge
    return torch.from_numpy(weights * of_row), float(rho * mean_square) or 1.0


def _over_chunks(part: Part, weights: Tensor, on_subsets: OnSubsets, bar: Any | None) -> np.ndarray:
    """`on_subsets` of all weights (m, n), chunk by chunk: d x d matrices and R-vectors of all subsets do not fit."""
    num_rows = len(part.rows.outputs) if part.rows else 0
    bytes_per_subset = 12 * part.train.sums.shape[1] ** 2 + 96 * num_rows
    results = []
    for chunk in weights.split(max(_CHUNK_BYTES // bytes_per_subset, 1)):
        results.append(on_subsets(chunk).numpy())
        if bar is not None:
            bar.update(len(chunk))
    return np.concatenate(results)


def _shares(weights: Tensor, totals: Tensor) -> Tensor:
    """Factors of the tasks' moments (c, n) divided by N_S, with N_t in `totals` (n,); 0 for an empty subset."""
    of_subset = weights @ totals
    return weights / torch.where(of_subset > 0, of_subset, 1.0).unsqueeze(1)


def _target_means(part: Part) -> tuple[Tensor, Tensor]:
    """Mean output (k,) and mean gradient (k, d) of each target."""
    totals = _tensor(part.target.weights)
    return _tensor(part.target.output_sums) / totals, _tensor(part.target.sums) / totals.unsqueeze(1)


def _with_targets(part: Part, targets: Sequence[int]) -> Part:
    """The part as if it had these targets only, in this order."""
    wanted = np.asarray(targets)
    target = replace(
        part.target, **{name: values[wanted] for name, values in vars(part.target).items() if values is not None}
    )
    if part.rows is None:
        return replace(part, target=target)
    position = np.full(len(part.target.counts) + 1, -1)  # the last is for rows of no target, id -1
    position[wanted] = np.arange(len(wanted))
    return replace(part, target=target, rows=replace(part.rows, target_of_row=position[part.rows.target_of_row]))


def _needed_rows(part: Part) -> Rows:
    """The part's rows.

    Raises:
        ValueError: it has moments only.
    """
    if part.rows is None:
        raise ValueError("this estimator would need the rows of a part, and this one has moments only")
    return part.rows


def _in_group(group_of_row: np.ndarray) -> tuple[np.ndarray, Tensor]:
    """Positions and group ids of the rows that belong to a group."""
    group_of_row = np.asarray(group_of_row)
    chosen = np.flatnonzero(group_of_row >= 0)
    return chosen, torch.from_numpy(group_of_row[chosen]).long()


def _chosen(of_row: np.ndarray | None, group_of_row: np.ndarray) -> Tensor:
    """Weights of the rows that belong to a group; 1 where there are none."""
    chosen = np.flatnonzero(np.asarray(group_of_row) >= 0)
    return torch.ones(len(chosen), dtype=torch.float64) if of_row is None else _tensor(of_row[chosen])


def _rows_of_groups(rows: Rows, group_of_row: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients and outputs in float64 and group ids of the rows that belong to a group."""
    chosen, groups = _in_group(group_of_row)
    return _tensor(rows.rows[chosen]), _tensor(rows.outputs[chosen]), groups


def _solve(matrices: Tensor, vectors: Tensor) -> Tensor:
    """x of matrix x = vector, positive definite: (..., d, d), (..., d) -> (..., d)."""
    factors, failed = torch.linalg.cholesky_ex(matrices)
    if failed.any():
        raise ValueError("the ridge is lost in rounding, so a regression has no solution; raise rho")
    return torch.cholesky_solve(vectors.unsqueeze(-1), factors).squeeze(-1)


def _check_finite(moments: TaskMoments, noun: str) -> None:
    """A bad row shows in its task's sums."""
    finite = np.isfinite(moments.output_sums) & np.isfinite(moments.sums).all(axis=1) & np.isfinite(moments.squares)
    if not finite.all():
        raise ValueError(
            f"{noun} {int(np.argmin(finite))} has outputs or gradients that are not finite; take the gradients again, "
            "at a checkpoint whose loss is finite"
        )


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.float64))


# --- the table -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EstimatorKind:
    """An estimator, and what it needs.

    Attributes:
        make: From a part and lambda to a function of row weights.
        meaning: What it is, for a person who chooses.
        solver: From a part and lambda to a function from row weights to the solutions x_S; None where there are none.
        needs_rows: It reads a part's rows, not their moments alone.
        needs_outers: It reads the outer products even where there are fewer rows than dimensions, and the rows' kernel
            would be smaller.
        output_function: The only one whose rows it takes; None = any.
        represented: Its rows are representations instead of gradients.
        ranks_only: Its estimates are no losses; only their order says something.
    """

    make: Callable[[Part, float], OnSubsets]
    meaning: str
    solver: Callable[[Part, float], OnSubsets] | None = None
    needs_rows: bool = False
    needs_outers: bool = False
    output_function: str | None = None
    represented: bool = False
    ranks_only: bool = False


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
    "kernel": EstimatorKind(_kernel, "as ridge, from all pairs of rows", _kernel_solver, needs_rows=True),
    "alignment": EstimatorKind(_alignment, "inner product of mean gradients, as in LESS", ranks_only=True),
    "representation": EstimatorKind(
        _alignment,
        "similarity of hidden states, for stage 2's --representations",
        represented=True,
        ranks_only=True,
    ),
    "constant": EstimatorKind(_constant, "the target's loss before training, which an estimate must beat"),
}
