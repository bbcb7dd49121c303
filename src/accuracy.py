"""How good estimates are, judged against values that were really fine-tuned.

The score is the linear datamodeling score (Park et al., 2023, arXiv:2303.14186): Spearman's correlation of estimates and
fine-tuned values over subsets. Errors stand beside the errors of a constant, because a constant comes close where
values hardly differ (DESIGN section 2, "How an estimate is judged").

Letters: m subsets, r runs.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import pearsonr, rankdata, spearmanr


def linear_datamodeling_score(estimates: np.ndarray, fine_tuned: np.ndarray) -> float:
    """Spearman's correlation of estimates (m,) and fine-tuned values (m,); nan where either does not vary."""
    if np.ptp(estimates) == 0 or np.ptp(fine_tuned) == 0:
        return float("nan")
    return float(spearmanr(estimates, fine_tuned).statistic)


def bootstrap_interval(
    estimates: np.ndarray, fine_tuned: np.ndarray, *, share: float = 0.9, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Where the score falls for this share of the draws of m subsets with replacement (percentile bootstrap)."""
    samples = np.random.default_rng(seed).integers(len(estimates), size=(draws, len(estimates)))
    ranks, true_ranks = (
        rankdata(np.asarray(values)[samples], axis=1) - (len(estimates) + 1) / 2 for values in (estimates, fine_tuned)
    )
    norms = np.sqrt((ranks**2).sum(axis=1) * (true_ranks**2).sum(axis=1))
    scores = (ranks * true_ranks).sum(axis=1)[norms > 0] / norms[norms > 0]
    if not len(scores):
        return float("nan"), float("nan")
    low, high = np.quantile(scores, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def noise_ceiling(fine_tuned_by_run: np.ndarray) -> float:
    """How well one seed's fine-tuned values predict another's: mean Spearman over pairs of runs.

    Args:
        fine_tuned_by_run: (m, r), only the seed differs between columns.

    Returns:
        nan for a single run.
    """
    runs = fine_tuned_by_run.shape[1]
    pairs = [
        linear_datamodeling_score(fine_tuned_by_run[:, a], fine_tuned_by_run[:, b])
        for a in range(runs)
        for b in range(a)
    ]
    return float(np.mean(pairs)) if pairs else float("nan")


def given_inclusion(values: np.ndarray, is_in: np.ndarray) -> np.ndarray:
    """Values (m,) minus the mean of the subsets that `is_in` (m,) marks, or of the others: what is left to explain
    once it is known whether the target's own task is in the subset."""
    values, is_in = np.asarray(values, float), np.asarray(is_in, bool)
    rest = values.copy()
    for group in (is_in, ~is_in):
        if group.any():
            rest[group] -= values[group].mean()
    return rest


def judge(estimates: np.ndarray, fine_tuned: np.ndarray) -> dict[str, float]:
    """Every figure for estimates (m,) of one target.

    Returns:
        `lds` with its 90 % bootstrap interval `lds_low`, `lds_high`; `pearson`; `relative_error`, the mean of
        |estimate - true| / |true|; and `squared_relative_error`, |estimates - true|^2 / |true|^2 as in the paper.
    """
    estimates, fine_tuned = np.asarray(estimates, float), np.asarray(fine_tuned, float)
    lds = linear_datamodeling_score(estimates, fine_tuned)
    low, high = bootstrap_interval(estimates, fine_tuned) if np.isfinite(lds) else (lds, lds)
    return {
        "lds": lds,
        "lds_low": low,
        "lds_high": high,
        "pearson": float(pearsonr(estimates, fine_tuned).statistic) if np.isfinite(lds) else float("nan"),
        "relative_error": float(np.mean(np.abs(estimates - fine_tuned) / np.abs(fine_tuned))),
        "squared_relative_error": float(np.sum((estimates - fine_tuned) ** 2) / np.sum(fine_tuned**2)),
    }
