"""How good estimates are, judged against values that were really fine-tuned.

The score is the linear datamodeling score (Park et al., 2023, arXiv:2303.14186): Spearman's correlation of estimates and
fine-tuned values over subsets. Errors stand beside the errors of a constant, because a constant comes close where
values hardly differ.

Letters: m subsets, k targets, r runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import pearsonr, rankdata, spearmanr


def linear_datamodeling_score(estimates: np.ndarray, fine_tuned: np.ndarray) -> float:
    """Spearman's correlation of estimates (m,) and fine-tuned values (m,); nan where either does not vary."""
    if np.ptp(estimates) == 0 or np.ptp(fine_tuned) == 0:
        return float("nan")
    return float(spearmanr(estimates, fine_tuned).statistic)


def _rank_correlation(values: np.ndarray) -> np.ndarray:
    """Spearman's correlation of the columns of (..., m, r), the mean over their pairs: (...); nan where one does not vary."""
    runs = values.shape[-1]
    ranks = rankdata(values, axis=-2) - (values.shape[-2] + 1) / 2
    with np.errstate(invalid="ignore"):
        scaled = ranks / np.sqrt((ranks**2).sum(axis=-2, keepdims=True))
    return ((scaled.sum(axis=-1) ** 2).sum(axis=-1) - runs) / (runs * (runs - 1))


def _bootstrap(values: np.ndarray, share: float, draws: int, seed: int) -> tuple[float, float]:
    """Percentile bootstrap over the subsets of `_rank_correlation` of values (m, r): where this share of the draws falls."""
    samples = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    scores = _rank_correlation(values[samples])
    if np.isnan(scores).all():
        return float("nan"), float("nan")
    low, high = np.nanquantile(scores, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def bootstrap_interval(
    estimates: np.ndarray, fine_tuned: np.ndarray, *, share: float = 0.9, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Where the score falls for this share of the draws of m subsets with replacement (percentile bootstrap)."""
    return _bootstrap(np.stack([estimates, fine_tuned], axis=1), share, draws, seed)


def attainable_maximum(
    fine_tuned_by_run: np.ndarray, *, share: float = 0.9, draws: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """The highest score against the mean of the runs that is to be expected of any estimate, as far as runs differ.

    With r the mean of Spearman's correlation over pairs of runs, the mean of k runs has the reliability
    r_k = k r / (1 + (k - 1) r) (Spearman-Brown), and what all runs have in common correlates with it by its root.

    Args:
        fine_tuned_by_run: (m, k), only the seed differs between columns.
        share, draws, seed: As in `bootstrap_interval`.

    Returns:
        The maximum, and the lower and upper end of its bootstrap interval; nan for a single run.
    """
    runs = fine_tuned_by_run.shape[1]
    if runs < 2:
        return float("nan"), float("nan"), float("nan")
    found = _rank_correlation(fine_tuned_by_run), *_bootstrap(fine_tuned_by_run, share, draws, seed)
    r = np.maximum(np.array(found, float), 0.0)  # keeps nan
    maximum, low, high = np.sqrt(runs * r / (1 + (runs - 1) * r)).tolist()
    return maximum, low, high


def given_inclusion(values: np.ndarray, is_in: np.ndarray) -> np.ndarray:
    """Values (m,) minus the mean of the subsets that `is_in` (m,) marks, or of the others: what is left to explain
    once it is known whether the target's own task is in the subset."""
    values, is_in = np.asarray(values, float), np.asarray(is_in, bool)
    rest = values.copy()
    for group in (is_in, ~is_in):
        if group.any():
            rest[group] -= values[group].mean()
    return rest


def own_inclusion(membership: np.ndarray, targets: Sequence[str], tasks: Sequence[str]) -> np.ndarray | None:
    """Whether each target's own task is in each subset, (m, k) bool, from membership (m, n); None where a target is no
    task."""
    if not set(targets) <= set(tasks):
        return None
    return membership[:, [list(tasks).index(name) for name in targets]] > 0


def judge(estimates: np.ndarray, fine_tuned: np.ndarray) -> dict[str, float]:
    """Every figure for estimates (m,) of one target.

    Returns:
        `lds` with its 90 % bootstrap interval `lds_low`, `lds_high`; `lds_top_quarter`, the same of the quarter of the
        subsets with the lowest fine-tuned values (nan for fewer than 3 of them); `regret`, the fine-tuned value of the
        subset that is estimated best minus the lowest (nan where estimates are equal); `pearson`; `relative_error`, the mean of
        |estimate - true| / |true|; and `squared_relative_error`, |estimates - true|^2 / |true|^2 as in the paper.
    """
    estimates, fine_tuned = np.asarray(estimates, float), np.asarray(fine_tuned, float)
    lds = linear_datamodeling_score(estimates, fine_tuned)
    low, high = bootstrap_interval(estimates, fine_tuned) if np.isfinite(lds) else (lds, lds)
    best = np.argsort(fine_tuned, kind="stable")[: round(len(fine_tuned) / 4)]
    top_quarter = linear_datamodeling_score(estimates[best], fine_tuned[best]) if len(best) >= 3 else float("nan")
    return {
        "lds": lds,
        "lds_low": low,
        "lds_high": high,
        "lds_top_quarter": top_quarter,
        "regret": float(fine_tuned[estimates.argmin()] - fine_tuned.min()) if np.isfinite(lds) else float("nan"),
        "pearson": float(pearsonr(estimates, fine_tuned).statistic) if np.isfinite(lds) else float("nan"),
        "relative_error": float(np.mean(np.abs(estimates - fine_tuned) / np.abs(fine_tuned))),
        "squared_relative_error": float(np.sum((estimates - fine_tuned) ** 2) / np.sum(fine_tuned**2)),
    }


CONSTANT, INCLUSION = "constant", "own task in the subset"
AVERAGE, MEAN = "(average)", "(mean over targets)"


def comparison(
    predictions: Mapping[str, np.ndarray],
    fine_tuned: np.ndarray,
    targets: Sequence[str],
    inclusion: np.ndarray | None = None,
) -> pd.DataFrame:
    """Every figure of every predictor for every target, beside the attainable maximum and two predictors that know little.

    Args:
        predictions: Name -> (m, k).
        fine_tuned: (m, k, r); the truth is the mean over runs.
        targets: Names of the targets (k,).
        inclusion: Whether a target's own task is in the subset, (m, k) bool; None where targets are no tasks.

    Returns:
        A row for each target and predictor: `target`, `predictor`, the figures of `judge`, `attainable` with its 90 %
        interval `attainable_low`, `attainable_high` (`attainable_maximum`), and with `inclusion` `lds_given_inclusion` and
        `attainable_given_inclusion`, the same after `given_inclusion`. Predictor
        "constant" is the mean of the truth, "own task in the subset" knows nothing but that. With several targets,
        target "(average)" has the mean of the targets' figures, "(mean over targets)" those of the mean value.
    """

    def attainable(by_run: np.ndarray) -> dict[str, float]:
        return dict(zip(("attainable", "attainable_low", "attainable_high"), attainable_maximum(by_run), strict=True))

    truth = fine_tuned.mean(axis=2)
    predictors = {**predictions, CONSTANT: np.broadcast_to(truth.mean(axis=0), truth.shape)}
    if inclusion is not None:
        predictors[INCLUSION] = np.stack(
            [truth[:, k] - given_inclusion(truth[:, k], inclusion[:, k]) for k in range(len(targets))], axis=1
        )
    records = []
    for k, target in enumerate(targets):
        shared = attainable(fine_tuned[:, k])
        if inclusion is not None:
            is_in = inclusion[:, k]
            rest = given_inclusion(truth[:, k], is_in)
            by_run = np.stack([given_inclusion(run, is_in) for run in fine_tuned[:, k].T], axis=1)
            shared["attainable_given_inclusion"] = attainable_maximum(by_run)[0]
        for name, values in predictors.items():
            record = {"target": target, "predictor": name, **judge(values[:, k], truth[:, k]), **shared}
            if inclusion is not None:
                given = np.zeros(len(rest)) if name == INCLUSION else given_inclusion(values[:, k], is_in)
                record["lds_given_inclusion"] = linear_datamodeling_score(given, rest)
            records.append(record)
    frame = pd.DataFrame(records)
    if len(targets) == 1:
        return frame
    average = frame.groupby("predictor", sort=False).mean(numeric_only=True).reset_index()
    average.insert(0, "target", AVERAGE)
    shared = attainable(fine_tuned.mean(axis=1))
    means = [
        {"target": MEAN, "predictor": name, **judge(values.mean(axis=1), truth.mean(axis=1)), **shared}
        for name, values in predictors.items()
    ]
    return pd.concat([average, pd.DataFrame(means), frame], ignore_index=True)
