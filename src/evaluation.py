"""Judge estimates against fine-tuned values, calibrate them, and pick the best subset that was fine-tuned.

The score is the linear datamodeling score (LDS, arXiv:2303.14186): Spearman's correlation over subsets.
Shapes: m subsets, c fine-tuned subsets, k targets, r runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import logsumexp, ndtri, stdtrit

from src import tables
from src.artifacts import RESULTS_FILE, SELECTION_FILE, described, losses_file

CONSTANT, INCLUSION = "constant", "own task in the subset"
AVERAGE, MEAN = "(average)", "(mean over targets)"
_LEVELS = (0.0, 0.1, 0.25, 0.45, 0.65, 0.8, 0.9, 0.96, 0.99)
SHARES = [(estimate, sources) for estimate in _LEVELS for sources in _LEVELS if estimate + sources < 0.995]
"""Shares of the variance of fine-tuned values that the estimate and the sources may have; the rest is noise."""
SPREADS = np.geomspace(0.6, 3.0, 7)
"""Standard deviations that the values of a target may have, relative to that of the ones that were fine-tuned."""
FREEDOM = 0.19
"""The share of chance in the slope of the estimate. The slope is expected to be positive, 2 standard deviations above 0."""
MIN_SUBSETS = 5
"""Fewer fine-tuned subsets than these calibrate nothing: each of them is to be estimated by the others."""


def linear_datamodeling_score(estimates: np.ndarray, fine_tuned: np.ndarray) -> float:
    """Spearman's correlation of estimates (m,) and fine-tuned values (m,); nan where either does not vary."""
    if np.ptp(estimates) == 0 or np.ptp(fine_tuned) == 0:
        return float("nan")
    return float(mean_rank_correlation(np.stack([estimates, fine_tuned], axis=1)))


def mean_rank_correlation(values: np.ndarray) -> np.ndarray:
    """Spearman's correlation of the columns of (..., m, r), the mean over their pairs: (...); nan where one does not vary, or
    for a single one."""
    if (runs := values.shape[-1]) < 2:
        return np.full(values.shape[:-2], np.nan)
    rows = np.moveaxis(values, -2, 0)
    ranks = (
        pd.DataFrame(rows.reshape(len(rows), -1)).rank().to_numpy().reshape(rows.shape)
    )  # scipy.stats is slow to load
    ranks = np.moveaxis(ranks - (len(rows) + 1) / 2, 0, -2)
    with np.errstate(invalid="ignore"):
        scaled = ranks / np.sqrt((ranks**2).sum(axis=-2, keepdims=True))
        return ((scaled.sum(axis=-1) ** 2).sum(axis=-1) - runs) / (runs * (runs - 1))


def bootstrap_interval(values: np.ndarray, draws: int = 1000) -> tuple[float, float]:
    """Where the mean rank correlation of the columns of values (m, r) falls in 90 % of the draws of m subsets with
    replacement (percentile bootstrap), whatever the order of the subsets."""
    values = values[np.lexsort(values.T[::-1])]
    samples = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    scores = mean_rank_correlation(values[samples])
    if np.isnan(scores).all():
        return float("nan"), float("nan")
    return tuple(np.nanquantile(scores, [0.05, 0.95]).tolist())


def attainable_maximum(fine_tuned_by_run: np.ndarray, draws: int = 1000) -> tuple[float, float, float]:
    """The highest score against the mean of the runs that is to be expected of any estimate, as far as runs (m, r) differ,
    and its 90 % bootstrap interval; nan for a single run.

    With q the mean of Spearman's correlation over pairs of runs, the mean of r runs has the reliability
    r q / (1 + (r - 1) q) (Spearman-Brown), and what all runs have in common correlates with it by its root.
    """
    runs = fine_tuned_by_run.shape[1]
    if runs < 2:
        return float("nan"), float("nan"), float("nan")
    found = mean_rank_correlation(fine_tuned_by_run), *bootstrap_interval(fine_tuned_by_run, draws)
    q = np.maximum(np.array(found, float), 0.0)  # keeps nan
    return tuple(np.sqrt(runs * q / (1 + (runs - 1) * q)).tolist())


def given_inclusion(values: np.ndarray, is_in: np.ndarray) -> np.ndarray:
    """Values (m,) minus the mean of the subsets that `is_in` (m,) marks, or of the others: what is left to explain
    once it is known whether the target's own task is in the subset."""
    values, is_in = np.asarray(values, float), np.asarray(is_in, bool)
    return values - pd.Series(values).groupby(is_in).transform("mean").to_numpy()


def own_inclusion(membership: np.ndarray, targets: Sequence[str], tasks: Sequence[str]) -> np.ndarray | None:
    """Whether each target's own task is in each subset, (m, k) bool, from membership (m, n); None where a target is not a task."""
    if not set(targets) <= set(tasks):
        return None
    return membership[:, [list(tasks).index(name) for name in targets]] > 0


def judge(estimates: np.ndarray, fine_tuned: np.ndarray) -> dict[str, float]:
    """Every figure for estimates (m,) of one target: `lds` with its 90 % bootstrap interval; `lds_top_quarter`, of the quarter
    of the subsets with the lowest fine-tuned values (nan for fewer than 3); `regret`, the fine-tuned value of the subset that
    is estimated best minus the lowest; `pearson`; `relative_error`, the mean of |estimate - true| / |true|; and
    `squared_relative_error`, |estimates - true|^2 / |true|^2 as in the paper."""
    estimates, fine_tuned = np.asarray(estimates, float), np.asarray(fine_tuned, float)
    lds = linear_datamodeling_score(estimates, fine_tuned)
    varies = np.isfinite(lds)
    low, high = bootstrap_interval(np.stack([estimates, fine_tuned], axis=1)) if varies else (lds, lds)
    best = np.argsort(fine_tuned, kind="stable")[: round(len(fine_tuned) / 4)]
    return {
        "lds": lds,
        "lds_low": low,
        "lds_high": high,
        "lds_top_quarter": linear_datamodeling_score(estimates[best], fine_tuned[best]) if len(best) >= 3 else np.nan,
        "regret": float(fine_tuned[estimates.argmin()] - fine_tuned.min()) if varies else np.nan,
        "pearson": float(np.corrcoef(estimates, fine_tuned)[0, 1]) if varies else np.nan,
        "relative_error": float(np.mean(np.abs(estimates - fine_tuned) / np.abs(fine_tuned))),
        "squared_relative_error": float(np.sum((estimates - fine_tuned) ** 2) / np.sum(fine_tuned**2)),
    }


def comparison(
    predictions: Mapping[str, np.ndarray], fine_tuned: np.ndarray, targets: Sequence[str], inclusion: np.ndarray | None = None
) -> pd.DataFrame:  # fmt: skip
    """Every figure of every predictor for every target, beside the attainable maximum and two predictors that know little.

    Args:
        predictions: Name -> (m, k).
        fine_tuned: (m, k, r); the truth is the mean over runs.
        targets: Names of the targets (k,).
        inclusion: Whether a target's own task is in the subset, (m, k) bool; None where targets are no tasks.

    Returns:
        A row for each target and predictor: the figures of `judge`, `attainable` with its 90 % interval, and with `inclusion`
        `lds_given_inclusion` and `attainable_given_inclusion`. Predictor "constant" is the mean of the truth, "own task in the
        subset" knows nothing but that. With several targets, target "(average)" has the mean of the targets' figures, "(mean
        over targets)" those of the mean value.
    """

    def attainable(by_run: np.ndarray) -> dict[str, float]:
        return dict(zip(("attainable", "attainable_low", "attainable_high"), attainable_maximum(by_run), strict=True))

    truth = fine_tuned.mean(axis=2)
    predictors = {**predictions, CONSTANT: np.broadcast_to(truth.mean(axis=0), truth.shape)}
    if inclusion is not None:
        rests = np.stack([given_inclusion(*of) for of in zip(truth.T, inclusion.T, strict=True)], axis=1)
        predictors[INCLUSION] = truth - rests
    records = []
    for k, target in enumerate(targets):
        shared = attainable(fine_tuned[:, k])
        if inclusion is not None:
            by_run = np.stack([given_inclusion(run, inclusion[:, k]) for run in fine_tuned[:, k].T], axis=1)
            shared["attainable_given_inclusion"] = attainable_maximum(by_run)[0]
        for name, values in predictors.items():
            record = {"target": target, "predictor": name, **judge(values[:, k], truth[:, k]), **shared}
            if inclusion is not None:
                knows_more = name not in (CONSTANT, INCLUSION)
                given = given_inclusion(values[:, k], inclusion[:, k]) if knows_more else np.zeros(len(truth))
                record["lds_given_inclusion"] = linear_datamodeling_score(given, rests[:, k])
            records.append(record)
    frame = pd.DataFrame(records)
    if len(targets) == 1:
        return frame
    average = frame.groupby("predictor", sort=False).mean(numeric_only=True).reset_index().assign(target=AVERAGE)
    shared = attainable(fine_tuned.mean(axis=1))
    means = [
        {"target": MEAN, "predictor": name, **judge(values.mean(axis=1), truth.mean(axis=1)), **shared}
        for name, values in predictors.items()
    ]
    return pd.concat([average, pd.DataFrame(means), frame], ignore_index=True)[frame.columns]


class Calibration:
    """A Gaussian process over subsets for each target, from estimates to fine-tuned values; call it for other subsets.

    The logarithm of a value is a level, a slope times the estimate, a linear function of the subset's features, and noise.
    Which shares of the variance these have (`SHARES`) is averaged over, weighted by how well they explain the fine-tuned values
    of all targets: a few values leave the ranking to the estimate, many correct it. Estimates and features may have any unit;
    where values are not all above 0, their logarithm is not taken.
    """

    def __init__(self, estimates: np.ndarray, features: np.ndarray, fine_tuned: np.ndarray) -> None:
        """Estimates (c, k), features (c, f) and values (c, k) of the subsets that were fine-tuned."""
        self._estimates, self._features = estimates, features
        self._known = self._scaled(estimates, features)
        self._logarithms = bool((fine_tuned > 0).all())
        fine_tuned = np.log(fine_tuned) if self._logarithms else fine_tuned
        self._center, deviation = fine_tuned.mean(axis=0), fine_tuned.std(axis=0, ddof=1)
        self._unit = np.where(deviation > 0, deviation, np.finfo(float).tiny)
        values, spreads = ((fine_tuned - self._center) / self._unit).T, SPREADS[:, None]
        self._systems, likelihoods = [], []
        for shares in SHARES:
            slopes, covariance = self._prior(shares, self._known)
            inverse = np.linalg.inv(covariance + (1 - sum(shares)) * np.eye(values.shape[1]))  # (k, c, c)
            total = inverse.sum(axis=(1, 2))
            level = inverse.sum(axis=1) / total[:, None]  # weights of the values in it: nothing else is known of it
            inner = inverse - total[:, None, None] * level[:, :, None] * level[:, None]
            data = np.stack([values, slopes], axis=2)  # (k, c, 2)
            squares = np.einsum("kci,kcd,kdj->kij", data, inner, data)
            errors = squares[:, 0, 0] / spreads**2 - 2 * squares[:, 0, 1] / spreads + squares[:, 1, 1]
            constant = np.linalg.slogdet(inverse)[1] - np.log(total)
            likelihoods.append((constant - errors) / 2 - (len(fine_tuned) - 1) * np.log(spreads))
            self._systems.append((data, inner, level, total))
        by_spread = np.array(likelihoods)  # (shares, spreads, k)
        of_target = logsumexp(by_spread, axis=1)
        together = of_target.sum(axis=1)
        self._weights = np.exp(together - logsumexp(together))[:, None, None] * np.exp(by_spread - of_target[:, None])

    def __call__(
        self, estimates: np.ndarray, features: np.ndarray, share: float = 0.9
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Calibrated estimates (m, k) of subsets with these estimates (m, k) and features (m, f), and the ends (m, k) of
        intervals that hold this share of fine-tuned values."""
        asked, spreads = self._scaled(estimates, features), SPREADS[:, None, None]
        mean, square = np.zeros((2, *asked[0].T.shape))
        for shares, system, weights in zip(SHARES, self._systems, self._weights[..., None], strict=True):
            data, inner, level, total = system
            slopes, across = self._prior(shares, asked)  # (k, m), (k, m, c)
            gain = across @ inner
            found = (gain + level[:, None]) @ data  # (k, m, 2)
            own = shares[0] * FREEDOM * asked[0].T ** 2 + shares[1] * (asked[1] ** 2).sum(axis=1) + 1 - sum(shares)
            variance = own - (gain * across).sum(axis=2) + 1 / total[:, None] - 2 * (across @ level[..., None])[..., 0]
            values = found[..., 0] + spreads * (slopes - found[..., 1])  # (spreads, k, m)
            mean += (weights * values).sum(axis=0)
            square += (weights * (values**2 + spreads**2 * variance)).sum(axis=0)
        values = self._center + self._unit * mean.T
        half = ndtri((1 + share) / 2) * self._unit * np.sqrt(np.maximum(square - mean**2, 0.0)).T
        found = values, values - half, values + half
        return tuple(np.exp(found)) if self._logarithms else found

    def _scaled(self, estimates: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Estimates (m, k) and features (m, f), of mean 0 and variance 1 over the fine-tuned subsets: features together."""
        deviation, known = self._estimates.std(axis=0), self._features - (mean := self._features.mean(axis=0))
        length = np.sqrt((known**2).sum(axis=1).mean()) or 1.0
        scaled = (estimates - self._estimates.mean(axis=0)) / np.where(deviation > 0, deviation, np.inf)
        return scaled, (features - mean) / length

    def _prior(
        self, shares: tuple[float, float], asked: tuple[np.ndarray, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of subsets as `_scaled` gives them: what the expected slope says of them (k, m), and their covariance with the
        fine-tuned ones (k, m, c)."""
        slopes = asked[0].T[:, :, None] * self._known[0].T[:, None]
        covariance = shares[0] * FREEDOM * slopes + shares[1] * (asked[1] @ self._known[1].T)
        return np.sqrt(shares[0] * (1 - FREEDOM)) * asked[0].T, covariance


@dataclass(frozen=True)
class Answer:
    """The best of what was fine-tuned: `subset` (empty is the base model), and what to say about it, a line each."""

    subset: tuple[int, ...]
    lines: tuple[str, ...]


def best_fine_tuned(folder: Path, tasks: Sequence[str], chosen_by: Mapping[str, str] | None = None) -> Answer:
    """The subset with the lowest validation loss in `results/<name>`, of equals the smallest, and how sure that is.

    `tasks` are the names of the tasks; `chosen_by` says what chose a subset, by its text.
    """
    truth = tables.read_table(folder / RESULTS_FILE, of_subsets=True)
    kept, tolerance = kept_targets(folder)
    targets = tables.own_targets(tables.columns_of(truth, tables.VALIDATION_LOSS), tasks)
    targets = [name for name in targets if name not in kept]
    truth["loss"] = tables.mean_over_targets(truth, tables.VALIDATION_LOSS, targets)
    means = truth.groupby("subset")["loss"].mean()
    ranked = sorted(means.index, key=lambda text: (means[text], len(tables.parse_subset(text))))
    rises = pd.DataFrame(index=means.index)
    if kept and "" in means.index:
        of_kept = truth.groupby("subset")[[f"{tables.VALIDATION_LOSS}/{name}" for name in kept]].mean()
        rises = (of_kept - of_kept.loc[""]).set_axis(kept, axis=1)
        ranked = [text for text in ranked if text == "" or rises.loc[text].max() <= tolerance]
    best, everything = ranked[0], tables.subset_text(range(len(tasks)))
    called = {"": "the base model", everything: f"all {len(tasks)} sources"}
    rest = [text for text in ranked[1:] if text not in called][:1]
    rivals = rest if best == "" and rest else [text for text in called if text in ranked[1:]] + rest
    basis: list[str] = []
    said = [f"Validation loss {means[best]:.3f}, the lowest of {len(ranked)} subsets that were tried"]
    if len(ranked) < len(means):
        said[0] += f" and raise no loss of {', '.join(kept)} by more than {tolerance:g} ({len(means) - len(ranked)} do)"
    if "" not in means.index:
        said[0] += " (the base model is not among them: --task_idxes without ids evaluates it)"
    for text in rivals:
        name = called.get(text) or tables.names_of(tables.parse_subset(text), tasks, 6)
        found, rests_on = _difference(folder, truth, best, text, targets, name)
        said.append(found)
        basis = [rests_on] if rests_on else basis
    if rivals and not basis:
        basis = ["How sure this is cannot be said of one seed; --runs 2 or more shows it."]
    ids = tables.parse_subset(best)
    by = f", by {chosen_by[best]}" if chosen_by and best in chosen_by else ""
    headline = "Nothing here helps: keep the base model."
    if best:
        headline = f"Train on: {tables.names_of(ids, tasks)} ({len(ids)} of {len(tasks)} sources{by})."
    if best and len(rises.columns):
        changes = ", ".join(f"{name} {rise:+.3f}" for name, rise in rises.loc[best].items())
        basis.append(f"Kept, against the base model's validation loss: {changes}.")
    return Answer(ids, (headline, f"{'; '.join(said)}.", *basis))


def kept_targets(folder: Path) -> tuple[list[str], float]:
    """The targets that the selection in a results folder was told to keep, and by how much their losses may rise."""
    facts = described(folder, str(Path(SELECTION_FILE).with_suffix(".json")), "select again")
    return facts.get("keep_task", []), facts.get("tolerance_keep", 0.0)


def _difference(
    folder: Path, truth: pd.DataFrame, best: str, other: str, targets: Sequence[str], name: str
) -> tuple[str, str]:
    """How much lower the best's loss is than another's, in words, and what its interval rests on, if it has one: the variance of the difference is
    that of paired validation rows, where both have them, plus that of the seeds, where there are several."""
    by_run = truth.pivot_table(index="run", columns="subset", values="loss")
    of_runs = (by_run[other] - by_run[best]).dropna()
    gap = float(of_runs.mean() if len(of_runs) else by_run[other].mean() - by_run[best].mean())
    parts, basis = [], []  # variances of the difference, with their degrees of freedom
    subsets = [tuple(map(int, text.split())) for text in (best, other)]
    files = [[losses_file(folder, subset, run) for run in of_runs.index] for subset in subsets]
    if len(of_runs) and all(path.is_file() for of_subset in files for path in of_subset):
        losses = [pd.concat(map(pd.read_csv, of)).groupby(["target", "sample_index"])["loss"].mean() for of in files]
        rows = (losses[1] - losses[0]).groupby("target").agg(["var", "count"]).loc[list(targets)]
        if rows["count"].min() > 1:
            variance = float((rows["var"] / rows["count"]).sum()) / len(rows) ** 2
            parts.append((variance, int(rows["count"].sum()) - len(rows)))
            basis.append(f"{rows['count'].sum():,} validation rows")
    if len(of_runs) > 1:
        parts.append((float(of_runs.var() / len(of_runs)), len(of_runs) - 1))
        basis.append(f"{len(of_runs)} seeds")
    if not parts:
        return f"lower than that of {name} by {gap:.3f} (one seed)", ""
    total = sum(variance for variance, _ in parts)
    freedom = total**2 / max(sum(variance**2 / degrees for variance, degrees in parts), np.finfo(float).tiny)
    half = float(stdtrit(max(freedom, 1), 0.95)) * math.sqrt(total)
    found = f"lower than that of {name} by" if gap > half else f"no difference from {name} is shown:"
    alone = "" if len(of_runs) > 1 else "; what another seed would change is not in them (--runs 2 or more shows it)"
    interval = f"{gap:.3f} (90 % interval {gap - half:.3f} to {gap + half:.3f})"
    return f"{found} {interval}", f"Intervals are over {' and '.join(basis)}{alone}."
