"""Scores of estimates against values worked out by hand or by a general library."""

import numpy as np
import pytest
from scipy.stats import bootstrap, spearmanr

from src import evaluation
from src.evaluation import attainable_maximum, calibrate, comparison, fit_calibration, judge
from src.evaluation import linear_datamodeling_score as lds
from tests.commands import refused


def test_figures_by_hand():
    """Four subsets, one neighbouring pair exchanged: 1 - 6 * 2 / (4 * 15)."""
    assert lds(np.array([1.0, 2, 3, 4]), np.array([10.0, 30, 20, 40])) == pytest.approx(0.8)
    assert np.isnan(lds(np.ones(4), np.arange(4.0)))
    figures = judge(np.array([1.0, 2.0, 4.0]), np.array([2.5, 2.0, 5.0]))
    assert figures["relative_error"] == pytest.approx((0.6 + 0 + 0.2) / 3)
    assert figures["squared_relative_error"] == pytest.approx(3.25 / 35.25)
    assert figures["regret"] == pytest.approx(0.5)


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
    assert set(table.index.get_level_values("predictor")) == {
        "estimate",
        "own",
        evaluation.CONSTANT,
        evaluation.INCLUSION,
    }
    for target in "abc":
        assert table.loc[(target, "estimate"), "lds"] > 0.99 and table.loc[(target, "estimate"), "attainable"] > 0.99
        assert table.loc[(target, "estimate"), "lds_given_inclusion"] > 0.99
        assert table.loc[(target, "own"), "lds"] == pytest.approx(table.loc[(target, evaluation.INCLUSION), "lds"])
        assert np.isnan(table.loc[(target, "own"), "lds_given_inclusion"])
        assert table.loc[(target, evaluation.CONSTANT), ["lds", "lds_given_inclusion"]].isna().all()
    lds = [table.loc[(target, "estimate"), "lds"] for target in "abc"]
    assert table.loc[(evaluation.AVERAGE, "estimate"), "lds"] == pytest.approx(np.mean(lds))
    assert set(comparison({"estimate": truth[:, :1]}, runs[:, :1], ["a"])["target"]) == {"a"}


def test_calibration_is_a_least_squares_line():
    rng = np.random.default_rng(0)
    estimates, fine_tuned = rng.standard_normal((7, 2)), rng.standard_normal((7, 2))
    fine_tuned[:, 0] += 3 * estimates[:, 0]
    fine_tuned[:, 1] -= 3 * estimates[:, 1]  # a map that would turn the ranking round becomes a constant
    values, low, high = fit_calibration(estimates, fine_tuned)(np.array([[0.5, 0.5], [2.0, 2.0]]))
    line = np.polyfit(estimates[:, 0], fine_tuned[:, 0], 1)
    np.testing.assert_allclose(values[:, 0], np.polyval(line, [0.5, 2.0]))
    np.testing.assert_allclose(values[:, 1], fine_tuned[:, 1].mean())
    assert high[1, 0] - low[1, 0] > high[0, 0] - low[0, 0]  # farther from what was fine-tuned


def test_intervals_hold_what_they_promise():
    """Over many draws of seven fine-tuned subsets with normal noise, 90 % of new values lie within."""
    rng = np.random.default_rng(0)
    estimates = rng.standard_normal((8, 4000))
    fine_tuned = 1 + 2 * estimates + 0.5 * rng.standard_normal(estimates.shape)
    _, low, high = fit_calibration(estimates[:7], fine_tuned[:7])(estimates[7:])
    assert np.mean((low <= fine_tuned[7:]) & (fine_tuned[7:] <= high)) == pytest.approx(0.9, abs=0.02)


def test_leave_one_out_chooses_the_ridge_that_predicts():
    """Where it is clearly better than the default."""
    rng = np.random.default_rng(0)
    fine_tuned = rng.standard_normal((8, 3))
    noises = {0.1: 2.0, 0.2: 0.1, 0.3: 1.0}
    by_rho = {rho: fine_tuned + noise * rng.standard_normal((8, 3)) for rho, noise in noises.items()}
    nearly = {0.1: by_rho[0.2], 0.2: by_rho[0.2] + 0.01 * rng.standard_normal((8, 3))}
    assert all(calibrate(nearly, fine_tuned, default)[0] == default for default in nearly)
    rho, calibration = calibrate(by_rho, fine_tuned, 0.1)
    assert rho == 0.2 and (calibration.errors < 0.3).all()
    direct = []
    for left_out in range(8):
        others = np.arange(8) != left_out
        line = np.polyfit(by_rho[0.2][others, 0], fine_tuned[others, 0], 1)
        direct.append((np.polyval(line, by_rho[0.2][left_out, 0]) - fine_tuned[left_out, 0]) ** 2)
    found = evaluation.leave_one_out_error(by_rho[0.2][:, :1], fine_tuned[:, :1])
    assert found == pytest.approx(np.mean(direct) / fine_tuned[:, 0].var())
    refused("at least 5 fine-tuned subsets, found 4", calibrate, {0.1: np.zeros((4, 1))}, np.zeros((4, 1)), 0.1)
