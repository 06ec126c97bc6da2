"""Pixels, rows and signal-to-noise, against NumPy and SciPy; a row never depends on its neighbours."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moefast.spectra import QUALITY_FEATURES, Flag, assess, good_pixels, quality_features
from moefast.spectra.quality import QUALITY_STEP

BAD_VALUES = (np.nan, np.inf, -np.inf)


def spectra(n, p, seed=0):
    rng = np.random.default_rng([seed, n, p])
    flux = rng.normal(1, 0.5, (n, p)).astype("f4")
    error = rng.gamma(2, 0.2, (n, p)).astype("f4") + np.float32(0.01)
    return flux, error


def spoiled(n, p, seed=0):
    """Spectra with every kind of bad pixel, rows without any and rows without anything good among them."""
    flux, error = spectra(n, p, seed)
    rng = np.random.default_rng(seed)
    share = rng.choice([0, 0.1, 0.6, 1], n)[:, None]
    flux[rng.random((n, p)) < share / 3] = rng.choice(BAD_VALUES)
    error[rng.random((n, p)) < share / 3] = rng.choice([*BAD_VALUES, 0, -0.0, -1])
    mask = rng.random((n, p)) < share
    return flux, error, mask


def naive_good(flux, error, mask=None):
    good = np.isfinite(flux) & np.isfinite(error) & (np.nan_to_num(error, nan=-1) > 0)
    return good if mask is None else good & ~mask


SIZES = [(1, 1), (1, 2), (3, 7), (5, 64), (7, 1023), (13, 4096)]


@pytest.mark.parametrize(("n", "p"), SIZES)
def test_all_good(n, p):
    flux, error = spectra(n, p)
    assert good_pixels(flux, error) is None
    assert good_pixels(flux, error, np.zeros((n, p), bool)) is None
    quality = assess(flux, error, None)
    np.testing.assert_allclose(
        quality.snr_norm,
        np.linalg.norm(flux.astype("f8"), axis=1) / np.linalg.norm(error.astype("f8"), axis=1),
        rtol=2e-7,
    )
    np.testing.assert_array_equal(
        quality.snr_median, np.median((flux / error).astype("f8"), axis=1).astype("f4")
    )
    np.testing.assert_array_equal(quality.n_good, p)
    np.testing.assert_array_equal(quality.flag, 0)
    assert [x.dtype for x in (quality.snr_norm, quality.snr_median, quality.n_good, quality.flag)] == [
        np.float32,
        np.float32,
        np.int32,
        np.uint32,
    ]


@pytest.mark.parametrize("bad", BAD_VALUES)
def test_one_bad_flux(bad):
    flux, error = spectra(4, 50)
    flux[2, 17] = bad
    good = good_pixels(flux, error)
    assert (~good).sum() == 1
    assert not good[2, 17]
    assert list(assess(flux, error, good).flag) == [0, 0, 0, 0]


@pytest.mark.parametrize("bad", [*BAD_VALUES, 0, -0.0, -1e-30, -2])
def test_one_bad_error(bad):
    flux, error = spectra(4, 50)
    error[1, 49] = bad
    good = good_pixels(flux, error)
    assert (~good).sum() == 1
    assert not good[1, 49]
    assert list(assess(flux, error, good).flag) == [0, Flag.BAD_ERROR, 0, 0]
    mask = np.zeros((4, 50), bool)
    mask[1, 49] = True
    np.testing.assert_array_equal(good_pixels(flux, error, mask), good)
    assert list(assess(flux, error, good, mask).flag) == [0, 0, 0, 0]


def test_smallest_and_largest_numbers_are_good():
    flux = np.array([[0, -3.4e38, 3.4e38, 1e-45]], "f4")
    error = np.array([[1e-45, 1e6, 1, 1]], "f4")
    assert good_pixels(flux, error) is None


def test_an_enormous_error_says_that_a_pixel_is_bad():
    flux, error = np.ones((1, 4), "f4"), np.array([[0.1, 1.1e6, 1e10, 3.4e38]], "f4")
    good = good_pixels(flux, error)
    assert good.tolist() == [[True, False, False, False]]
    assert assess(flux, error, good).flag[0] & 4


@pytest.mark.parametrize(("n", "p"), [*SIZES, (200, 96)])
def test_any_mixture_of_bad_pixels(n, p):
    flux, error, mask = spoiled(n, p, seed=n)
    good = good_pixels(flux, error, mask)
    expected = naive_good(flux, error, mask)
    np.testing.assert_array_equal(np.ones((n, p), bool) if good is None else good, expected)
    quality = assess(flux, error, good, mask)
    count = expected.sum(axis=1)
    np.testing.assert_array_equal(quality.n_good, count)
    wrong = np.isfinite(flux) & ~mask & ~(np.isfinite(error) & (np.nan_to_num(error, nan=-1) > 0))
    flags = np.where(count == 0, 1, 0) + np.where(2 * count < p, 2, 0) + np.where(wrong.any(axis=1), 4, 0)
    np.testing.assert_array_equal(quality.flag, flags)
    features = quality_features(error, good)
    for i in range(n):
        f, e = flux[i, expected[i]].astype("f8"), error[i, expected[i]]
        if not len(f):
            assert np.isnan(quality.snr_norm[i])
            assert np.isnan(quality.snr_median[i])
            assert np.isnan(features[i]).all()
            continue
        norm = np.linalg.norm(f) / np.linalg.norm(e.astype("f8"))
        np.testing.assert_allclose(quality.snr_norm[i], norm, rtol=2e-7)
        ratio = (flux[i, expected[i]] / e).astype("f8")
        assert quality.snr_median[i] == np.float32(np.median(ratio))


def test_rows_do_not_depend_on_their_block():
    flux, error, mask = spoiled(97, 700)
    good = good_pixels(flux, error, mask)
    whole = assess(flux, error, good, mask)
    features = quality_features(error, good)
    for size in (1, 2, 5, 96):
        for start in range(0, 97, size):
            rows = slice(start, start + size)
            part_good = good_pixels(flux[rows], error[rows], mask[rows])
            part = assess(flux[rows], error[rows], part_good, mask[rows])
            for name in ("snr_norm", "snr_median", "n_good", "flag"):
                np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[rows])
            np.testing.assert_array_equal(quality_features(error[rows], part_good), features[rows])


def test_good_rows_have_the_same_numbers_beside_bad_ones():
    flux, error = spectra(20, 512)
    alone, alone_features = assess(flux, error, None), quality_features(error)
    flux[3] = np.nan
    error[7, 5] = 0
    good = good_pixels(flux, error)
    beside, beside_features = assess(flux, error, good), quality_features(error, good)
    untouched = [i for i in range(20) if i not in (3, 7)]
    for name in ("snr_norm", "snr_median"):
        np.testing.assert_array_equal(getattr(alone, name)[untouched], getattr(beside, name)[untouched])
    np.testing.assert_array_equal(alone_features[untouched], beside_features[untouched])
    assert beside.flag[3] == Flag.NO_DATA | Flag.FEW_GOOD_PIXELS


@pytest.mark.parametrize(("n", "p"), SIZES)
def test_features(n, p):
    error = spectra(n, p)[1]
    features = quality_features(error)
    assert features.shape == (n, len(QUALITY_FEATURES))
    assert features.dtype == np.float32
    e = error.astype("f8")
    expected = [e.mean(1), e.std(1), e.min(1), e.max(1), np.median(e, 1), e.sum(1)]
    expected += [np.quantile(e, 0.25, axis=1), np.quantile(e, 0.75, axis=1)]
    expected += [stats.skew(e, 1), stats.kurtosis(e, 1)] if p > 1 else [np.zeros(n)] * 2
    expected = np.stack(expected, 1)
    # On the logarithmic grid, and nowhere further from the exact statistic than half a step.
    with np.errstate(divide="ignore"):
        exact = np.concatenate([np.log(expected[:, :8]), np.log1p(np.abs(expected[:, 8:]))], axis=1)
        found = np.concatenate([np.log(features[:, :8]), np.log1p(np.abs(features[:, 8:]))], axis=1)
        both = np.isfinite(exact)
    np.testing.assert_array_equal(found[~both], exact[~both])
    assert (np.abs(found[both] - exact[both]) <= 0.5 * QUALITY_STEP + 1e-5).all()
    steps = found[np.isfinite(found)] / QUALITY_STEP
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
    assert (np.sign(features[:, 8:]) == np.sign(expected[:, 8:]))[
        np.abs(expected[:, 8:]) > QUALITY_STEP
    ].all()
    rng = np.random.default_rng(1)
    shuffled = quality_features(rng.permuted(error, axis=1))
    np.testing.assert_allclose(shuffled, features, rtol=1e-6, atol=1e-6)


def test_features_of_a_constant():
    row = quality_features(np.full((1, 10), 1.0, "f4"))[0]
    np.testing.assert_allclose(row, [1, 0, 1, 1, 1, np.exp(2.3), 1, 1, 0, 0], rtol=1e-6)


def test_no_more_than_a_tenth_of_an_error_shows():
    error = np.full((1, 10), 1.0, "f4")
    np.testing.assert_array_equal(quality_features(1.04 * error)[:, 2:5], quality_features(error)[:, 2:5])
    assert (quality_features(1.11 * error)[:, 2:5] > quality_features(error)[:, 2:5]).all()


@given(
    st.lists(
        st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from([0.0, -0.0, 1.0]),
        min_size=1,
        max_size=60,
    )
)
@settings(max_examples=200, deadline=None)
def test_the_median_is_exact_whatever_the_values(values):
    flux = np.array([values], "f4")
    found = assess(flux, np.ones_like(flux), None).snr_median[0]
    assert found == np.float32(np.median(flux.astype("f8")))


def test_other_types_and_strides_are_accepted():
    flux, error = spectra(6, 40)
    wide = np.zeros((6, 80))
    wide[:, ::2] = flux
    expected = assess(flux, error, None)
    found = assess(wide[:, ::2], error.astype(">f4"), None)
    np.testing.assert_array_equal(found.snr_median, expected.snr_median)
    mask = np.zeros((6, 40), "i8")
    mask[2, 3] = 8
    assert (~good_pixels(wide[:, ::2], error, mask)).sum() == 1


def test_shapes_are_checked():
    flux, error = spectra(4, 10)
    with pytest.raises(ValueError, match="share a shape"):
        good_pixels(flux, error[:3])
    with pytest.raises(ValueError, match="mask must have shape"):
        good_pixels(flux, error, np.zeros((4, 9), bool))
    with pytest.raises(ValueError, match="good must have shape"):
        assess(flux, error, np.ones((3, 10), bool))
    with pytest.raises(ValueError, match="error must have shape"):
        quality_features(error[0])


def test_no_rows():
    flux = np.zeros((0, 10), "f4")
    assert good_pixels(flux, flux) is None
    assert assess(flux, flux, None).snr_norm.shape == (0,)
    assert quality_features(flux).shape == (0, 10)


def test_flags_are_bits_below_16():
    assert [flag.value for flag in Flag] == [1, 2, 4, 8, 16, 32, 64]
