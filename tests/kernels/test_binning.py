"""Bins and counting sort against their NumPy references, at block edges and on the bin edges themselves."""

import numpy as np
import pytest

from moefast.kernels import binning
from moefast.kernels import reference_binning as reference

SIZES = [0, 1, 2, 31, 32, 33, 127, 1009]
T_EDGES = (3750.0, 4500.0, 5250.0, 6000.0)
M_EDGES = (-2.0, -1.0, 0.0, 0.5)
SNR_EDGES = (2.0, 4.0, 7.0)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("edges", [(T_EDGES, M_EDGES), ((3750.0, 6000.0), (-2.0, 0.5))])
def test_assign_bins_matches_reference(n, dtype, edges):
    rng = np.random.default_rng(n)
    teff = rng.uniform(3000, 7000, n).astype(dtype)
    mh = rng.uniform(-3, 1, n).astype(dtype)
    found = binning.assign_bins(teff, mh, *edges)
    assert found.dtype == np.int16
    assert found.shape == (n,)
    np.testing.assert_array_equal(found, reference.assign_bins(teff, mh, *edges))


def test_assign_bins_known_answers_on_the_edges():
    teff = [3750, 4499.999, 4500, 5250, 6000, 3000, 9000, 6000]
    mh = [-2, -1.0001, -1, 0, 0.5, -3, 2, -5]
    expected = [0, 0, 4, 8, 8, 0, 8, 6]
    np.testing.assert_array_equal(binning.assign_bins(teff, mh, T_EDGES, M_EDGES), expected)
    np.testing.assert_array_equal(reference.assign_bins(teff, mh, T_EDGES, M_EDGES), expected)


def test_assign_bins_is_row_major_in_t_eff():
    centres_t = np.repeat([4000.0, 5000.0, 5500.0], 3)
    centres_m = np.tile([-1.5, -0.5, 0.25], 3)
    np.testing.assert_array_equal(binning.assign_bins(centres_t, centres_m, T_EDGES, M_EDGES), np.arange(9))


def test_assign_bins_reads_strided_rows():
    table = np.random.default_rng(0).uniform([3000, -3], [7000, 1], (101, 2))
    found = binning.assign_bins(table[::-2, 0], table[::-2, 1], T_EDGES, M_EDGES)
    expected = binning.assign_bins(table[::-2, 0].copy(), table[::-2, 1].copy(), T_EDGES, M_EDGES)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_labels_that_are_not_finite_are_refused_by_row(bad):
    teff = np.array([5000.0, 5000.0, 5000.0])
    mh = np.array([0.0, 0.0, bad])
    with pytest.raises(ValueError, match=r"mh must be finite.*row 2"):
        binning.assign_bins(teff, mh, T_EDGES, M_EDGES)
    with pytest.raises(ValueError, match=r"teff must be finite.*row 2"):
        binning.assign_bins(mh, teff, T_EDGES, M_EDGES)
    with pytest.raises(ValueError, match=r"snr must be finite.*row 2"):
        binning.assign_snr_bins(mh, SNR_EDGES)


@pytest.mark.parametrize("edges", [(1.0,), (1.0, 1.0), (2.0, 1.0), (0.0, np.nan), ((0.0, 1.0), (2.0, 3.0))])
def test_unusable_edges_are_refused(edges):
    with pytest.raises(ValueError, match="teff_edges"):
        binning.assign_bins([5000.0], [0.0], edges, M_EDGES)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="equal length; found 2 and 1"):
        binning.assign_bins([5000.0, 5000.0], [0.0], T_EDGES, M_EDGES)
    with pytest.raises(ValueError, match="one-dimensional"):
        binning.assign_bins([[5000.0]], [[0.0]], T_EDGES, M_EDGES)
    with pytest.raises(ValueError, match="at most 32767 bins"):
        binning.assign_bins([5000.0], [0.0], np.arange(300), np.arange(300))
    with pytest.raises(ValueError, match="at most 32767 bins"):
        binning.assign_snr_bins([5.0], np.arange(32767.0))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_assign_snr_bins_matches_reference(n, dtype):
    snr = np.random.default_rng(n).uniform(0, 10, n).astype(dtype)
    found = binning.assign_snr_bins(snr, SNR_EDGES)
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found, reference.assign_snr_bins(snr, SNR_EDGES))


def test_assign_snr_bins_includes_upper_edges():
    snr = [0.0, 2.0, 2.0000001, 4.0, 4.1, 7.0, 7.1, -1.0]
    np.testing.assert_array_equal(binning.assign_snr_bins(snr, SNR_EDGES), [0, 0, 1, 1, 2, 2, 3, 0])


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("n_bins", [1, 2, 9, 49])
@pytest.mark.parametrize("dtype", [np.int16, np.int64, np.uint8])
def test_sort_by_bin_matches_reference(n, n_bins, dtype):
    bins = np.random.default_rng(n).integers(0, n_bins, n).astype(dtype)
    order, offsets = binning.sort_by_bin(bins, n_bins)
    expected_order, expected_offsets = reference.sort_by_bin(bins, n_bins)
    assert order.dtype == offsets.dtype == np.int64
    np.testing.assert_array_equal(order, expected_order)
    np.testing.assert_array_equal(offsets, expected_offsets)
    for k in range(n_bins):
        assert (bins[order[offsets[k] : offsets[k + 1]]] == k).all()


def test_sort_by_bin_is_stable_and_keeps_empty_bins():
    order, offsets = binning.sort_by_bin(np.array([3, 0, 3, 0, 3]), 5)
    np.testing.assert_array_equal(order, [1, 3, 0, 2, 4])
    np.testing.assert_array_equal(offsets, [0, 2, 2, 2, 5, 5])


@pytest.mark.parametrize("bad", [-1, 9])
def test_sort_by_bin_refuses_foreign_bins(bad):
    with pytest.raises(ValueError, match=rf"0 … 8; found {bad} in row 1"):
        binning.sort_by_bin(np.array([0, bad, 2]), 9)


def test_sort_by_bin_refuses_what_is_not_a_vector_of_integers():
    with pytest.raises(ValueError, match="vector of integers"):
        binning.sort_by_bin(np.array([0.0, 1.0]), 2)
    with pytest.raises(ValueError, match="vector of integers"):
        binning.sort_by_bin(np.zeros((2, 2), np.int64), 2)
    with pytest.raises(ValueError, match="n_bins"):
        binning.sort_by_bin(np.array([], dtype=np.int64), 0)
