"""Noise and folds belong to a row, whatever block it comes in."""

import numpy as np
import pytest
import scipy.stats

from moefast.core.random import add_noise, fold_of_rows, philox_words, standard_normals


def test_a_row_has_the_same_draw_in_any_block_and_order():
    whole = standard_normals(3, np.arange(300), 65)
    assert whole.dtype == np.float32
    shuffled = np.random.default_rng(0).permutation(300)
    np.testing.assert_array_equal(standard_normals(3, shuffled, 65), whole[shuffled])
    np.testing.assert_array_equal(standard_normals(3, np.array([211]), 65), whole[[211]])
    for a, b in ((0, 1), (1, 130), (130, 300)):
        np.testing.assert_array_equal(standard_normals(3, np.arange(a, b), 65), whole[a:b])


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_the_number_of_threads_changes_nothing(monkeypatch, workers):
    expected = standard_normals(3, np.arange(500), 9)
    monkeypatch.setattr("moefast.core.threads.CORES", workers)
    np.testing.assert_array_equal(standard_normals(3, np.arange(500), 9), expected)


def test_draws_are_box_and_mullers_of_the_words():
    # Pixels of a tile of 256: the first, second … word of 64 counters.
    draws = standard_normals(7, np.array([2**33 + 5]), 256, stream=4)[0].astype(float).reshape(4, 64)
    for counter in (0, 1, 31, 63):
        words = [int(w) for w in philox_words(counter, 4, 5, 2, 7, 0)]
        for pair in (0, 2):
            radius = np.sqrt(-2 * np.log((words[pair] + 0.5) / 2**32))
            angle = 2 * np.pi * words[pair + 1] / 2**32 - np.pi / 4
            expected = radius * np.cos(angle), radius * np.sin(angle)
            np.testing.assert_allclose(draws[pair : pair + 2, counter], expected, rtol=0, atol=2e-6)


def test_a_pixel_is_the_same_for_any_number_of_pixels():
    whole = standard_normals(3, np.arange(5), 1000)
    for n_pixels in (1, 63, 64, 255, 256, 257, 999):
        np.testing.assert_array_equal(standard_normals(3, np.arange(5), n_pixels), whole[:, :n_pixels])


@pytest.mark.parametrize("n", [1, 130])
def test_noise_is_added_in_one_pass(n):
    rng = np.random.default_rng(n)
    flux, error = rng.random((2, n, 300), dtype=np.float32)
    rows = rng.permutation(1000)[:n]
    expected = flux + error * standard_normals(11, rows, 300)
    found = add_noise(flux, error, 11, rows)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(add_noise(flux, error, 11, rows, out=flux), found)
    assert not np.allclose(add_noise(flux, error, 11, rows, stream=1), add_noise(flux, error, 11, rows))
    with pytest.raises(ValueError, match="expected shape"):
        add_noise(flux, error[:, 1:], 11, rows)
    with pytest.raises(ValueError, match="C-contiguous"):
        add_noise(flux, error, 11, rows, out=np.empty((n, 300)))


def test_draws_are_standard_normal():
    draws = standard_normals(0, np.arange(2000), 100).astype(np.float64).ravel()
    n = draws.size
    assert abs(draws.mean()) < 4 / np.sqrt(n)
    assert abs(draws.var() - 1) < 4 * np.sqrt(2 / n)
    assert scipy.stats.kstest(draws, "norm").pvalue > 1e-3
    assert abs(scipy.stats.skew(draws)) < 4 * np.sqrt(6 / n)
    assert abs(scipy.stats.kurtosis(draws)) < 4 * np.sqrt(24 / n)
    assert 4.2 < np.abs(draws).max() < 6.0


def test_rows_and_seeds_are_independent():
    rows = np.arange(200)
    one, two = standard_normals(0, rows, 400), standard_normals(1, rows, 400)
    between_rows = np.corrcoef(one)[np.triu_indices(200, 1)]
    assert np.abs(between_rows).max() < 6 / np.sqrt(400)
    assert between_rows.std() == pytest.approx(1 / np.sqrt(400), rel=0.05)
    assert abs(np.mean(one * two)) < 4 / np.sqrt(one.size)
    # Neighbouring seeds and rows must not be shifted copies of each other.
    assert abs(np.mean(one[1:] * two[:-1])) < 4 / np.sqrt(one.size)
    assert abs(np.mean(one[:, 1:] * one[:, :-1])) < 4 / np.sqrt(one.size)


@pytest.mark.parametrize("seed", [0, 2**32, 2**63, 2**64 - 1])
def test_every_64_bit_seed_works(seed):
    assert np.isfinite(standard_normals(seed, np.array([0, 2**40]), 3)).all()


@pytest.mark.parametrize(("seed", "row"), [(-1, 0), (2**64, 0), (0, -1)])
def test_seeds_and_rows_out_of_range_are_refused(seed, row):
    with pytest.raises(ValueError, match="a seed in 0"):
        standard_normals(seed, np.array([row]), 3)


def test_no_rows_give_no_draws():
    assert standard_normals(0, np.arange(0), 5).shape == (0, 5)
    assert fold_of_rows(np.arange(0), 3).shape == (0,)


@pytest.mark.parametrize("n_folds", [2, 3, 5, 10])
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_folds_are_balanced(n_folds, seed):
    n = 20_000
    folds = fold_of_rows(np.arange(n), n_folds, seed)
    counts = np.bincount(folds, minlength=n_folds)
    assert counts.size == n_folds
    assert scipy.stats.chisquare(counts).pvalue > 1e-4
    assert np.bincount(fold_of_rows(np.arange(0, n, 8), n_folds, seed)).min() > 0.8 * n / 8 / n_folds


def test_folds_belong_to_rows():
    rows = np.arange(1000)
    folds = fold_of_rows(rows, 3)
    order = np.random.default_rng(0).permutation(1000)
    np.testing.assert_array_equal(fold_of_rows(order, 3), folds[order])
    np.testing.assert_array_equal(fold_of_rows(rows[500:], 3), folds[500:])


def test_folds_of_two_seeds_are_independent():
    rows = np.arange(30_000)
    table = np.zeros((3, 5))
    np.add.at(table, (fold_of_rows(rows, 3, 0), fold_of_rows(rows, 5, 1000)), 1)
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-4
    assert np.mean(fold_of_rows(rows, 3, 0) == fold_of_rows(rows, 3, 1)) == pytest.approx(1 / 3, abs=0.02)
