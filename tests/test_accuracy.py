"""Scores of estimates against values worked out by hand or by a general library."""

from itertools import product

import numpy as np
import pytest
from scipy.special import logsumexp, softmax
from scipy.stats import bootstrap, multivariate_normal, norm, spearmanr

from src import evaluation
from src.evaluation import FREEDOM, SHARES, SPREADS, Calibration, attainable_maximum, comparison, judge
from src.evaluation import linear_datamodeling_score as lds


def test_figures_by_hand():
    """Four subsets, one neighbouring pair exchanged: 1 - 6 * 2 / (4 * 15)."""
    assert lds(np.array([1.0, 2, 3, 4]), np.array([10.0, 30, 20, 40])) == pytest.approx(0.8)
    assert np.isnan(lds(np.ones(4), np.arange(4.0)))
    figures = judge(np.array([1.0, 2.0, 4.0]), np.array([2.5, 2.0, 5.0]))
    assert figures["relative_error"] == pytest.approx((0.6 + 0 + 0.2) / 3)
    assert figures["squared_relative_error"] == pytest.approx(3.25 / 35.25)
    assert figures["regret"] == pytest.approx(0.5)


def test_an_interval_does_not_depend_on_the_order_of_subsets():
    values = np.random.default_rng(3).normal(size=(12, 2))
    assert evaluation.bootstrap_interval(values) == evaluation.bootstrap_interval(values[::-1])


def test_bootstrap_interval_is_scipys():
    rng = np.random.default_rng(0)
    truth = rng.standard_normal(60)
    estimates = truth + rng.standard_normal(60)
    found = evaluation.bootstrap_interval(np.stack([estimates, truth], axis=1), draws=4000)
    options = {"paired": True, "vectorized": False, "method": "percentile", "confidence_level": 0.9, "rng": 1}
    scipys = bootstrap((estimates, truth), lambda a, b: spearmanr(a, b).statistic, n_resamples=2000, **options)
    np.testing.assert_allclose(found, scipys.confidence_interval, atol=0.03)
    assert found[0] < lds(estimates, truth) < found[1]


def test_attainable_maximum_is_what_the_exact_truth_scores():
    """Spearman-Brown by hand; over many draws it is the score of the noiseless values against the mean of the runs."""
    runs = np.random.default_rng(0).standard_normal((20, 3)) + np.arange(20.0)[:, None] / 5
    r = np.mean([spearmanr(runs[:, a], runs[:, b]).statistic for a, b in ((0, 1), (0, 2), (1, 2))])
    found, low, high = attainable_maximum(runs)
    assert found == pytest.approx(np.sqrt(3 * r / (1 + 2 * r))) and low < found < high
    assert np.isnan(attainable_maximum(runs[:, :1])).all()
    opposite = np.stack([np.arange(9.0), -np.arange(9.0)], axis=1)
    assert attainable_maximum(opposite)[0] == 0
    rng = np.random.default_rng(1)
    maxima, scores = [], []
    for _ in range(100):
        exact = rng.standard_normal(60)
        by_run = exact[:, None] + 0.5 * rng.standard_normal((60, 2))
        maxima.append(attainable_maximum(by_run, draws=2)[0])
        scores.append(lds(exact, by_run.mean(axis=1)))
    assert np.mean(maxima) == pytest.approx(np.mean(scores), abs=0.01)


def test_score_of_the_best_quarter():
    """Of twelve subsets the three that are best after fine-tuning; of eleven too, but not of nine."""
    fine_tuned = np.random.default_rng(0).permutation(np.arange(1.0, 13.0))
    estimates = fine_tuned.copy()
    best = np.argsort(fine_tuned)[:3]
    estimates[best] = estimates[best[[1, 0, 2]]]
    assert judge(estimates, fine_tuned)["lds_top_quarter"] == pytest.approx(0.5)
    assert np.isnan(judge(estimates[:9], fine_tuned[:9])["lds_top_quarter"])


def test_comparison_has_every_predictor_for_every_target():
    """Estimates that know inclusion alone score like the predictor that does, and nothing once it is given."""
    is_in = np.array([True, True, False, False])
    np.testing.assert_allclose(evaluation.given_inclusion(np.array([1.0, 3, 10, 20]), is_in), [-1, 1, -5, 5])
    rng = np.random.default_rng(0)
    inclusion = rng.random((40, 3)) < 0.5
    truth = -2.0 * inclusion + 5 + 0.3 * rng.standard_normal((40, 3))
    runs = np.stack([truth + 0.01 * rng.standard_normal(truth.shape) for _ in range(2)], axis=2)
    table = comparison({"estimate": truth, "own": 5.0 - inclusion}, runs, ["a", "b", "c"], inclusion)
    table = table.set_index(["target", "predictor"])
    assert set(table.index.get_level_values("target")) == {"a", "b", "c", evaluation.AVERAGE, evaluation.MEAN}
    predictors = {"estimate", "own", evaluation.CONSTANT, evaluation.INCLUSION}
    assert set(table.index.get_level_values("predictor")) == predictors
    for target in "abc":
        assert table.loc[(target, "estimate"), "lds"] > 0.99 and table.loc[(target, "estimate"), "attainable"] > 0.99
        assert table.loc[(target, "estimate"), "lds_given_inclusion"] > 0.99
        assert table.loc[(target, "own"), "lds"] == pytest.approx(table.loc[(target, evaluation.INCLUSION), "lds"])
        assert np.isnan(table.loc[(target, "own"), "lds_given_inclusion"])
        assert table.loc[(target, evaluation.CONSTANT), ["lds", "lds_given_inclusion"]].isna().all()
    lds = [table.loc[(target, "estimate"), "lds"] for target in "abc"]
    assert table.loc[(evaluation.AVERAGE, "estimate"), "lds"] == pytest.approx(np.mean(lds))
    assert set(comparison({"estimate": truth[:, :1]}, runs[:, :1], ["a"])["target"]) == {"a"}


def halves(count: int, rng: np.random.Generator) -> np.ndarray:
    """Five of ten sources each."""
    return np.array([rng.permutation(10) < 5 for _ in range(count)])


def test_calibration_is_the_normal_distribution_given_what_was_fine_tuned() -> None:
    """Against the joint distribution of known and new values, for each share and spread, with a level of huge variance."""
    rng = np.random.default_rng(0)
    members, estimates = halves(9, rng), rng.standard_normal((9, 2))
    estimates[:, 1] *= 100
    known, values = slice(0, 6), 9 + estimates[:6] / 50 + rng.standard_normal((6, 2))
    found = Calibration(estimates[known], members[known], values)(estimates[6:], members[6:], share=0.8)
    sources = members / members.sum(axis=1, keepdims=True)
    sources = (sources - sources[known].mean(axis=0)) / np.sqrt(sources[known].var(axis=0).sum())
    logs, means, variances = (np.zeros((len(SHARES), len(SPREADS), 2, *size)) for size in ((), (3,), (3,)))
    logarithms = np.log(values)
    centers, units = logarithms.mean(axis=0), logarithms.std(axis=0, ddof=1)
    for (i, (of_estimate, of_sources)), (j, spread), k in product(enumerate(SHARES), enumerate(SPREADS), range(2)):
        slopes = (estimates[:, k] - estimates[known, k].mean()) / estimates[known, k].std()
        covariance = of_estimate * FREEDOM * np.outer(slopes, slopes) + of_sources * sources @ sources.T
        covariance = spread**2 * (covariance + (1 - of_estimate - of_sources) * np.eye(9)) + 1e5
        mean = spread * np.sqrt(of_estimate * (1 - FREEDOM)) * slopes
        rest = (logarithms[:, k] - centers[k]) / units[k] - mean[known]
        logs[i, j, k] = multivariate_normal(np.zeros(6), covariance[known, known]).logpdf(rest)
        gain = np.linalg.solve(covariance[known, known], covariance[known, 6:]).T
        means[i, j, k] = mean[6:] + gain @ rest
        variances[i, j, k] = np.diag(covariance[6:, 6:] - gain @ covariance[known, 6:])
    of_share = logsumexp(logs, axis=1)
    weights = softmax(of_share.sum(axis=1))[:, None, None] * np.exp(logs - of_share[:, None])
    mean = np.einsum("ijk,ijkm->mk", weights, means)
    deviation = np.sqrt(np.einsum("ijk,ijkm->mk", weights, means**2 + variances) - mean**2)
    half = norm.ppf(0.9) * deviation * units
    center = centers + mean * units
    np.testing.assert_allclose(found, np.exp([center, center - half, center + half]), rtol=1e-3)


@pytest.mark.parametrize("count", [8, 20])
def test_intervals_hold_what_they_promise(count: int) -> None:
    """Over 210 draws of fine-tuned subsets, 85 to 95 % of new values lie within 90 % intervals, whatever explains them."""
    rng, held = np.random.default_rng(0), {}
    for of_estimate, of_sources, of_noise in 70 * [(1.0, 0.0, 0.5), (0.6, 0.6, 0.5), (0.0, 0.0, 1.0)]:
        members, estimates = halves(count + 10, rng), rng.standard_normal((count + 10, 2))
        effects = members @ rng.standard_normal((10, 2)) * np.sqrt(10) / 5
        values = 9 + of_estimate * estimates + of_sources * effects + of_noise * rng.standard_normal(estimates.shape)
        calibration = Calibration(estimates[:count], members[:count], values[:count])
        _, low, high = calibration(estimates[count:], members[count:])
        held.setdefault(of_estimate, []).append((low <= values[count:]) & (values[count:] <= high))
    for of_kind in held.values():
        assert 0.85 <= np.mean(of_kind) <= 0.95


def test_few_values_leave_the_ranking_to_the_estimate_and_many_correct_it() -> None:
    """Where the estimate knows half of what the sources do, five values keep its score, and forty make it much better."""
    rng, scores = np.random.default_rng(0), {5: [], 40: []}
    for count, _ in product(scores, range(20)):
        members = halves(count + 40, rng)
        seen, unseen = members @ rng.standard_normal((2, 10, 1))
        values, estimates = seen + unseen + 0.3 * rng.standard_normal(seen.shape), 50 * seen
        calibration = Calibration(estimates[:count], members[:count], values[:count])
        calibrated, _, _ = calibration(estimates[count:], members[count:])
        of_both = [lds(of[:, 0], values[count:, 0]) for of in (estimates[count:], calibrated)]
        scores[count].append(of_both)
    few, many = (np.mean(scores[count], axis=0) for count in scores)
    assert few[1] > few[0] - 0.02 and many[1] > many[0] + 0.15


def test_calibration_knows_no_units_and_what_does_not_vary() -> None:
    rng = np.random.default_rng(0)
    members, estimates = halves(12, rng), rng.standard_normal((12, 2))
    values = estimates + 0.1 * rng.standard_normal((12, 2))
    plain = np.array(Calibration(estimates[:7], members[:7], values[:7])(estimates, members))
    other = Calibration(1e4 * estimates[:7] - 3, members[:7], 1e-3 * values[:7] - 8)(1e4 * estimates - 3, members)
    np.testing.assert_allclose((np.array(other) + 8) * 1e3, plain, rtol=1e-6, atol=1e-8)
    above, tenfold = (Calibration(estimates[:7], members[:7], factor * np.exp(values[:7])) for factor in (1, 10))
    np.testing.assert_allclose(tenfold(estimates, members), 10 * np.array(above(estimates, members)), rtol=1e-6)
    np.testing.assert_allclose(np.log(above(estimates, members)), plain, rtol=1e-6, atol=1e-8)
    same = np.ones((12, 2))
    for of_estimates, of_members in ((same, members), (same, same > 0)):
        found = Calibration(of_estimates[:7], of_members[:7], values[:7])(of_estimates, of_members)
        assert np.isfinite(found).all()
    np.testing.assert_allclose(Calibration(estimates, members, same)(estimates, members), 1.0)
