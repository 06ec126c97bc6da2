"""The ruler against hand-computed values, scikit-learn, SciPy and a naive bootstrap."""

import json
import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from moefast.core import metrics
from moefast.core.errors import LabelError


def stars(n=500, noise=0.6, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.uniform(1, 5, n)
    return y, y + rng.normal(0.05, noise, n)


def test_known_answers():
    # Residuals 0, 1, −1, 1 around labels 1, 2, 3, 4: SS_res = 3, SS_tot = 5.
    y, yhat = [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 5.0]
    assert metrics.r2(y, yhat) == pytest.approx(1 - 3 / 5)
    assert metrics.mae(y, yhat) == pytest.approx(0.75)
    assert metrics.rmse(y, yhat) == pytest.approx(math.sqrt(0.75))
    assert metrics.bias(y, yhat) == pytest.approx(0.25)
    assert metrics.scores(y, yhat) == pytest.approx(
        {"n": 4, "n_nan": 0, "r2": 0.4, "mae": 0.75, "rmse": math.sqrt(0.75), "bias": 0.25}
    )


@pytest.mark.parametrize("n", [2, 3, 31, 1009])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_agrees_with_scikit_learn(n, dtype):
    y, yhat = (values.astype(dtype) for values in stars(n))
    y64, yhat64 = y.astype(np.float64), yhat.astype(np.float64)
    assert metrics.r2(y, yhat) == pytest.approx(sklearn_metrics.r2_score(y64, yhat64), rel=1e-12)
    assert metrics.mae(y, yhat) == pytest.approx(sklearn_metrics.mean_absolute_error(y64, yhat64), rel=1e-12)
    assert metrics.rmse(y, yhat) == pytest.approx(
        sklearn_metrics.root_mean_squared_error(y64, yhat64), rel=1e-12
    )


def test_r2_keeps_its_digits_far_from_zero():
    y, yhat = stars()
    assert metrics.r2(y + 1e6, yhat + 1e6) == pytest.approx(metrics.r2(y, yhat), rel=1e-8)


def test_missing_predictions_count_as_the_mean_label():
    y = np.array([1.0, 2.0, 3.0, 6.0])
    yhat = np.array([1.0, np.nan, np.inf, 6.0])
    filled = np.array([1.0, 3.0, 3.0, 6.0])
    found = metrics.scores(y, yhat)
    assert found["n"] == 4
    assert found["n_nan"] == 2
    assert found["r2"] == pytest.approx(sklearn_metrics.r2_score(y, filled))
    assert metrics.scores(y, np.full(4, np.nan))["r2"] == 0.0
    assert metrics.bootstrap(y, yhat) == metrics.bootstrap(y, filled)


@pytest.mark.parametrize("y", [[], [2.0], [0.1, 0.1, 0.1]])
def test_degenerate_labels_give_nan_in_silence(y):
    yhat = np.asarray(y) + 0.5
    assert math.isnan(metrics.r2(y, yhat))
    for statistic in metrics.STATISTICS:
        interval = metrics.bootstrap(y, yhat, statistic, n_resamples=20)
        assert math.isnan(interval.value) == (statistic == "r2" or len(y) == 0)
    assert math.isnan(metrics.bootstrap_difference(y, yhat, yhat, n_resamples=20).low)
    assert math.isnan(metrics.bootstrap_rho(y, yhat, yhat, yhat, n_resamples=20).value)
    assert math.isnan(metrics.coverage(y, yhat, yhat)["levels"][0]["fraction"]) == (len(y) == 0)
    assert (metrics.mae(y, yhat) == pytest.approx(0.5)) == (len(y) > 0)


def test_labels_must_be_finite_and_shapes_equal():
    with pytest.raises(LabelError, match="found nan in row 1"):
        metrics.r2([1.0, np.nan], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"\(2,\) and \(1,\)"):
        metrics.r2([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="one of r2, mae, rmse, bias; found 'mse'"):
        metrics.bootstrap([1.0, 2.0], [1.0, 2.0], "mse")
    with pytest.raises(ValueError, match="n_resamples"):
        metrics.bootstrap([1.0, 2.0], [1.0, 2.0], n_resamples=0)
    with pytest.raises(ValueError, match="level"):
        metrics.bootstrap([1.0, 2.0], [1.0, 2.0], level=95)


def naive(y, predictions, statistic, n_resamples, seed):
    rows = np.random.default_rng(seed).integers(0, y.size, (n_resamples, y.size))
    function = getattr(metrics, statistic)
    return np.array([[function(y[row], yhat[row]) for yhat in predictions] for row in rows])


@pytest.mark.parametrize("statistic", list(metrics.STATISTICS))
@pytest.mark.parametrize("n", [7, 211])
def test_bootstrap_matches_a_naive_loop(statistic, n, monkeypatch):
    # Blocks that do not divide the number of resamples must not change the draws.
    monkeypatch.setattr(metrics, "_DRAWS_PER_BLOCK", 37 * n)
    y, a = stars(n)
    b = stars(n, 0.9, seed=0)[1] * 0.9
    table = naive(y, [a, b], statistic, 200, 5)
    found = metrics.bootstrap(y, a, statistic, n_resamples=200, seed=5)
    assert found.value == pytest.approx(getattr(metrics, statistic)(y, a))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(table[:, 0], [0.025, 0.975])))
    assert found.standard_error == pytest.approx(table[:, 0].std(ddof=1))
    assert found.n_undefined == 0
    paired = metrics.bootstrap_difference(y, a, b, statistic, n_resamples=200, seed=5, level=0.8)
    difference = table[:, 0] - table[:, 1]
    assert (paired.low, paired.high) == pytest.approx(tuple(np.quantile(difference, [0.1, 0.9])))


def test_resamples_without_variance_are_counted_not_used():
    y, yhat = np.array([1.0, 2.0]), np.array([1.1, 1.9])
    found = metrics.bootstrap(y, yhat, n_resamples=400)
    assert 150 < found.n_undefined < 250
    assert found.low == pytest.approx(found.value)


def test_paired_interval_is_narrower_than_unpaired():
    y, a = stars(2000)
    b = a + np.random.default_rng(1).normal(0, 0.05, y.size)
    paired = metrics.bootstrap_difference(y, a, b)
    single = metrics.bootstrap(y, a)
    assert paired.standard_error < 0.3 * single.standard_error
    assert metrics.bootstrap_difference(y, a, a)[:4] == pytest.approx((0, 0, 0, 0), abs=1e-14)


def test_bootstrap_standard_error_of_the_bias_is_the_textbook_one():
    y, yhat = stars(4000)
    found = metrics.bootstrap(y, yhat, "bias")
    assert found.standard_error == pytest.approx(np.std(yhat - y) / math.sqrt(y.size), rel=0.08)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    # R² of the population: 1 − σ²/(Var y) with labels uniform over 4 dex.
    truth = 1 - (0.6**2 + 0.05**2) / (16 / 12)
    inside = 0
    for seed in range(200):
        interval = metrics.bootstrap(*stars(300, seed=seed), n_resamples=200)
        inside += interval.low <= truth <= interval.high
    # Binomial(200, 0.95) lies above 175 with probability 0.9999.
    assert stats.binom.sf(175, 200, 0.95) > 0.999
    assert inside > 175


def test_rho_gap_and_efficiency():
    assert metrics.rho(0.6, 0.5, 0.7).value == pytest.approx(0.5)
    assert metrics.gap_closed(0.601, 0.4957, 0.87).value == pytest.approx(0.28, abs=0.005)
    assert metrics.gap_closed(0.78, 0.4957, 0.87).value == pytest.approx(0.76, abs=0.005)
    assert metrics.efficiency(0.6, 0.8).value == pytest.approx(0.75)
    for found, words in [
        (metrics.rho(0.6, 0.7, 0.7), "oracle is no better"),
        (metrics.rho(0.6, 0.7, 0.6), "oracle is no better"),
        (metrics.rho(math.nan, 0.5, 0.6), "does not exist"),
        (metrics.gap_closed(0.6, 0.5, 0.4), "not above the published ridge"),
        (metrics.efficiency(0.6, 0.0), "not above zero"),
    ]:
        assert math.isnan(found.value)
        assert words in found.reason


def test_bootstrap_of_ratios_matches_a_naive_loop():
    rng = np.random.default_rng(2)
    y = rng.uniform(1, 5, 150)
    deploy, base, oracle = (y + rng.normal(0, s, y.size) for s in (0.65, 0.8, 0.6))
    table = naive(y, [deploy, base, oracle], "r2", 300, 9)
    quotient = (table[:, 0] - table[:, 1]) / (table[:, 2] - table[:, 1])
    quotient = quotient[table[:, 2] > table[:, 1]]
    found = metrics.bootstrap_rho(y, deploy, base, oracle, n_resamples=300, seed=9)
    point = metrics.rho(metrics.r2(y, deploy), metrics.r2(y, base), metrics.r2(y, oracle))
    assert found.value == pytest.approx(point.value)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(quotient, [0.025, 0.975])))
    assert found.n_undefined == 300 - quotient.size

    gap = metrics.bootstrap_gap_closed(y, deploy, base, 0.9, n_resamples=300, seed=9)
    expected = (table[:, 0] - table[:, 1]) / (0.9 - table[:, 1])
    assert (gap.low, gap.high) == pytest.approx(tuple(np.quantile(expected, [0.025, 0.975])))


def test_rho_interval_without_an_uplift():
    y, yhat = stars(100)
    found = metrics.bootstrap_rho(y, yhat, yhat, yhat, n_resamples=50)
    assert math.isnan(found.value)
    assert found.n_undefined == 50


def test_coverage_of_gaussian_errors():
    y, yhat = stars(200_000)
    found = metrics.coverage(y, yhat - 0.05, np.full(y.size, 0.6), (0.68, 0.95, 0.5))
    one, two, half = found["levels"]
    assert one["z"] == 1.0
    assert one["expected"] == pytest.approx(0.6826894921370859)
    assert two["z"] == pytest.approx(1.959963984540054)
    assert half["z"] == pytest.approx(stats.norm.ppf(0.75))
    for row in found["levels"]:
        assert row["fraction"] == pytest.approx(row["expected"], abs=0.004)


def test_coverage_counts_what_is_undefined_as_missed():
    y = np.zeros(6)
    yhat = np.array([0.0, 1.0, np.nan, 0.0, 0.0, 0.0])
    err = np.array([1.0, 1.0, 1.0, np.nan, 0.0, np.inf])
    found = metrics.coverage(y, yhat, err)
    assert found["n"] == 6
    assert found["n_undefined"] == 4
    assert found["levels"][0]["fraction"] == pytest.approx(2 / 6)
    with pytest.raises(ValueError, match="levels must lie"):
        metrics.coverage(y, y, err, (68,))
    with pytest.raises(ValueError, match="err must have the shape"):
        metrics.coverage(y, y, err[:3])


# -- in one pass ----


@pytest.mark.parametrize("block", [1, 7, 100])
def test_streamed_r2_counts_missing_rows_as_the_label_mean(block):
    rng = np.random.default_rng(3)
    y = 100 + rng.normal(size=500)
    yhat = y + rng.normal(size=500)
    yhat[rng.random(500) < 0.2] = np.nan
    yhat[:block] = np.nan
    running = metrics.SquaredErrors()
    for start in range(0, 500, block):
        running.add(y[start : start + block], yhat[start : start + block])
    assert running.r2() == pytest.approx(metrics.r2(y, yhat), abs=1e-12)
    filled = np.where(np.isnan(yhat), y.mean(), yhat)
    assert running.r2() == pytest.approx(sklearn_metrics.r2_score(y, filled), abs=1e-12)


@pytest.mark.parametrize("values", [(), (3.0,), (3.0, 3.0)])
def test_r2_that_does_not_exist(values):
    running = metrics.SquaredErrors()
    running.add(np.array(values), np.array(values))
    assert running.r2() is None


def test_sums_of_parts_are_those_of_the_whole():
    rng = np.random.default_rng(4)
    y = 1e4 + rng.normal(size=300)
    yhat = y + rng.normal(size=300)
    yhat[rng.random(300) < 0.2] = np.nan
    parts = []
    for rows in (slice(0, 0), slice(0, 10), slice(10, 11), slice(11, 300)):
        parts.append(metrics.SquaredErrors())
        parts[-1].add(y[rows], yhat[rows])
    total = sum(parts, metrics.SquaredErrors())
    assert total.r2() == pytest.approx(metrics.r2(y, yhat), abs=1e-9)
    assert sum(parts[::-1], metrics.SquaredErrors()).r2() == pytest.approx(metrics.r2(y, yhat), abs=1e-9)
    assert metrics.SquaredErrors.from_numbers(json.loads(json.dumps(total.numbers()))) == total
    with pytest.raises(ValueError, match="sums"):
        metrics.SquaredErrors.from_numbers({"n": 1})
