"""A family replaces the base only where it is better beyond doubt, and then the whole is better too."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close

from moefast.core.metrics import bootstrap_difference, r2
from moefast.experts.choice import choose, hybrid

BASE = "linear"


def stars(seed=0, n=3000, n_bins=9):
    rng = np.random.default_rng(seed)
    return rng, rng.uniform(1, 5, n), rng.integers(0, n_bins, n)


def ss_res(y, predicted):
    return ((y - predicted) ** 2).sum()


def test_a_family_that_is_clearly_better_in_one_bin_is_taken_there_alone():
    rng, y, bins = stars()
    linear = y + rng.normal(0, 0.6, y.size)
    trees = np.where(bins == 4, y + rng.normal(0, 0.4, y.size), y + rng.normal(0, 0.8, y.size))
    found = choose(y, {BASE: linear, "trees": trees}, bins, BASE)
    assert found.families == (BASE,) * 4 + ("trees",) + (BASE,) * 4
    assert found.names == (BASE, "trees")
    assert found.n.tolist() == np.bincount(bins).tolist()


def test_gain_and_its_error_by_hand():
    y = np.array([1.0, 2.0, 3.0, 4.0])
    linear, trees = y + [1, 1, 1, 1], y + [0, 0.5, 1, 2]
    found = choose(y, {BASE: linear, "trees": trees}, [1, 1, 1, 1], BASE)
    difference = np.array([1, 0.75, 0, -3])
    assert_close(found.gain[1], np.array([0, difference.mean()]))
    assert_close(found.standard_error[1], np.array([0, difference.std(ddof=1) / 2]))
    assert np.isnan(found.gain[0]).all()
    assert np.isnan(found.standard_error[0]).all()


@pytest.mark.parametrize(("margin", "expected"), [(0.0, "trees"), (1.0, "trees"), (2.0, BASE)])
def test_the_margin_counts_in_standard_errors(margin, expected):
    # Δ = 1.5 ± 1: mean 0.15, standard error 0.1 for a hundred stars.
    delta = 0.15 + np.tile([1.0, -1.0], 50) * np.sqrt(99 / 100)
    y = np.zeros(100)
    linear, trees = np.full(100, 2.0), np.sqrt(4.0 - delta)
    found = choose(y, {BASE: linear, "trees": trees}, np.zeros(100, int), BASE, margin=margin)
    assert_close(found.standard_error[0, 1], np.float64(0.1))
    assert found.families == (expected,)


def test_the_best_of_those_that_pass_is_taken():
    rng, y, bins = stars(n_bins=2)
    predictions = {
        name: y + rng.normal(0, s, y.size) for name, s in (("cnn", 0.5), (BASE, 0.6), ("trees", 0.3))
    }
    assert choose(y, predictions, bins, BASE).families == ("trees", "trees")


def test_equal_predictions_change_nothing():
    rng, y, bins = stars()
    linear = y + rng.normal(0, 0.6, y.size)
    assert set(choose(y, {"trees": linear, BASE: linear}, bins, BASE).families) == {BASE}


def test_a_family_is_no_candidate_where_one_prediction_is_not_finite():
    rng, y, bins = stars(n_bins=3)
    linear = y + rng.normal(0, 0.6, y.size)
    perfect = y.copy()
    perfect[np.flatnonzero(bins == 0)[5]] = np.nan
    perfect[np.flatnonzero(bins == 1)[7]] = np.inf
    found = choose(y, {BASE: linear, "trees": perfect}, bins, BASE)
    assert found.families == (BASE, BASE, "trees")
    assert np.isnan(found.gain[:2, 1]).all()
    assert np.isfinite(hybrid({BASE: linear, "trees": perfect}, bins, found.families)).all()


def test_too_few_stars_keep_the_base():
    y = np.array([2.0, 3.0, 3.0])
    found = choose(y, {BASE: y + 1, "trees": y}, [2, 4, 4], BASE, n_bins=6)
    assert found.families == (BASE, BASE, BASE, BASE, "trees", BASE)
    empty = choose([], {BASE: []}, np.array([], int), BASE, n_bins=2)
    assert empty.families == (BASE, BASE)
    assert choose([], {BASE: []}, [], BASE).families == ()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 400),
    n_bins=st.integers(1, 9),
    n_families=st.integers(1, 5),
    margin=st.sampled_from([0.0, 1.0, 3.0]),
)
def test_better_in_every_bin_that_changes_means_better_overall(seed, n, n_bins, n_families, margin):
    # Families of any quality, with biases and errors that differ from bin to bin, and unequal bins.
    rng = np.random.default_rng(seed)
    bins = rng.choice(n_bins, n, p=rng.dirichlet(np.full(n_bins, 0.7)))
    y = rng.normal(rng.uniform(1, 5, n_bins)[bins], 0.5)
    predictions = {
        name: y + rng.normal(rng.normal(0, 0.3, n_bins)[bins], rng.gamma(2, 0.3, n_bins)[bins])
        for name in (BASE, *map(str, range(n_families)))
    }
    found = choose(y, predictions, bins, BASE, n_bins=n_bins, margin=margin)
    chosen = hybrid(predictions, bins, found.families)
    by_bin = [ss_res(y[bins == k], chosen[bins == k]) for k in range(n_bins)]
    assert_close(np.float64(sum(by_bin)), ss_res(y, chosen))
    for k, family in enumerate(found.families):
        if family != BASE:
            assert by_bin[k] < ss_res(y[bins == k], predictions[BASE][bins == k])
    if set(found.families) != {BASE}:
        assert ss_res(y, chosen) < ss_res(y, predictions[BASE])
        if n > 2:
            assert r2(y, chosen) > r2(y, predictions[BASE])
    else:
        assert np.array_equal(chosen, predictions[BASE])


def test_other_ways_to_compare_can_turn_the_sign():
    """Covered stars against all stars: the better prediction looks worse."""
    rng, y, bins = stars(1, 8000, 2)
    covered = np.ones(y.size, bool)
    linear = y + rng.normal(0, 0.60, y.size)
    other = y + rng.normal(0, 0.58, y.size)
    outside = rng.random(y.size) < 0.17
    covered[outside] = False
    linear[outside] += rng.normal(0, 1.0, outside.sum())
    other[outside] += rng.normal(0, 1.0, outside.sum())
    found = choose(y, {BASE: linear, "trees": other}, bins, BASE)
    assert found.families == ("trees", "trees")
    assert r2(y, hybrid({BASE: linear, "trees": other}, bins, found.families)) > r2(y, linear)
    # The better one on all stars against the worse one on covered stars.
    assert r2(y, other) < r2(y[covered], linear[covered])


def test_the_gain_of_pure_chance_is_below_the_margin_most_of_the_time():
    taken, stayed = 0, 0
    for seed in range(20):
        rng, y, bins = stars(seed, 900, 3)
        linear = y + rng.normal(0, 0.6, y.size)
        equal = y + rng.normal(0, 0.6, y.size)
        families = choose(y, {BASE: linear, "equal": equal}, bins, BASE).families
        taken, stayed = taken + families.count("equal"), stayed + families.count(BASE)
    # One standard error is passed by chance in 16 % of the cases: 9.5 of 60.
    assert 2 <= taken <= 20
    assert taken + stayed == 60


def test_the_standard_error_agrees_with_the_bootstrap_of_the_difference():
    rng, y, bins = stars(3, 4000, 1)
    linear = y + rng.normal(0, 0.6, y.size)
    other = y + rng.normal(0, 0.58, y.size)
    found = choose(y, {BASE: linear, "trees": other}, bins, BASE)
    interval = bootstrap_difference(y, other, linear)
    assert_close(found.gain[0, 1] / y.var(), np.float64(interval.value))
    # R² also has the scatter of SS_tot, which is small here; a bootstrap is known to 2 %.
    assert found.standard_error[0, 1] / y.var() == pytest.approx(interval.standard_error, rel=0.1)


def test_what_does_not_fit_is_refused():
    y, bins = np.array([1.0, 2.0]), np.array([0, 1])
    good = {BASE: y}
    for arguments, words in (
        ((y, {"trees": y}, bins, BASE), "no predictions"),
        ((y, {BASE: y[:1]}, bins, BASE), "per star"),
        ((y[:1], good, bins, BASE), "per star"),
        ((y, good, bins.astype(float), BASE), "integers"),
        ((y, good, bins - 1, BASE), "bins must lie"),
        ((np.array([1.0, np.nan]), good, bins, BASE), "row 1"),
        ((y, {BASE: np.array([np.inf, 1.0])}, bins, BASE), "row 0"),
    ):
        with pytest.raises(ValueError, match=words):
            choose(*arguments)
    with pytest.raises(ValueError, match="bins must lie"):
        choose(y, good, bins, BASE, n_bins=1)
    for margin in (-1.0, np.nan):
        with pytest.raises(ValueError, match="margin"):
            choose(y, good, bins, BASE, margin=margin)
    with pytest.raises(ValueError, match="no predictions"):
        hybrid(good, bins, (BASE, "trees"))
    with pytest.raises(ValueError, match="bins must lie"):
        hybrid(good, bins, (BASE,))
