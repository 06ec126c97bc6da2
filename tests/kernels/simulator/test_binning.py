"""Bins and counting sort as CUDA kernels, simulated, against their NumPy references at block edges."""

import numpy as np
import pytest

from moefast.kernels import assign_bins, assign_snr_bins, sort_by_bin
from moefast.kernels import reference_binning as reference
from moefast.kernels.cuda import binning

SIZES = [0, 1, 31, 32, 33, 127, 128, 129, 509]
T_EDGES = (3750.0, 4500.0, 5250.0, 6000.0)
M_EDGES = (-2.0, -1.0, 0.0, 0.5)
SNR_EDGES = (2.0, 4.0, 7.0)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("edges", [(T_EDGES, M_EDGES), ((3750.0, 6000.0), (-2.0, 0.5))])
def test_assign_bins_matches_reference(n, edges):
    rng = np.random.default_rng(n)
    teff, mh = rng.uniform(3000, 7000, n).astype(np.float32), rng.uniform(-3, 1, n)
    found = assign_bins(teff, mh, *edges, backend="cuda")
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found, reference.assign_bins(teff, mh, *edges))


def test_assign_bins_on_the_edges_and_strided():
    table = np.array([[3750, 4499.999, 4500, 5250, 6000, 3000, 9000], [-2, -1.0001, -1, 0, 0.5, -3, 2]]).T
    found = assign_bins(table[::-1, 0], table[::-1, 1], T_EDGES, M_EDGES, backend="cuda")
    np.testing.assert_array_equal(found, [8, 0, 8, 8, 4, 0, 0])


@pytest.mark.parametrize("n", SIZES)
def test_assign_snr_bins_matches_reference(n):
    snr = np.random.default_rng(n).uniform(0, 10, n)
    snr[: n // 4] = np.resize(SNR_EDGES, n // 4)
    found = assign_snr_bins(snr, SNR_EDGES, backend="cuda")
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found, reference.assign_snr_bins(snr, SNR_EDGES))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("n_bins", [1, 2, 49, 257])
def test_sort_by_bin_matches_reference(n, n_bins, monkeypatch):
    # Chunks of a few rows, so that blocks and chunks end everywhere.
    monkeypatch.setattr(binning, "CHUNK_ROWS", 3)
    bins = np.random.default_rng(n).integers(0, n_bins, 2 * n).astype(np.int16)[::2]
    order, offsets = sort_by_bin(bins, n_bins, backend="cuda")
    expected_order, expected_offsets = reference.sort_by_bin(bins, n_bins)
    assert order.dtype == offsets.dtype == np.int64
    np.testing.assert_array_equal(order, expected_order)
    np.testing.assert_array_equal(offsets, expected_offsets)


def test_chunks_grow_where_there_are_many_bins(monkeypatch):
    monkeypatch.setattr(binning, "LARGEST_TABLE", 500)
    assert binning.table_size(1009, 100) <= 500
    bins = np.random.default_rng(0).integers(0, 100, 1009)
    order, offsets = sort_by_bin(bins, 100, backend="cuda")
    np.testing.assert_array_equal(order, reference.sort_by_bin(bins, 100)[0])
    np.testing.assert_array_equal(offsets, reference.sort_by_bin(bins, 100)[1])


@pytest.mark.parametrize(("n_rows", "n_bins"), [(572, 7), (134, 30), (64, 3), (50, 501)])
def test_the_table_for_many_rows_is_large_enough_for_fewer(n_rows, n_bins, monkeypatch):
    """Of 7 bins, 571 rows are 72 chunks of 8, and 572 rows 64 chunks of 9: a table of 64 columns would be too small."""
    monkeypatch.setattr(binning, "CHUNK_ROWS", 8)
    monkeypatch.setattr(binning, "LARGEST_TABLE", 500)
    needed = [n_bins * -(-n // binning._chunk_rows(n, n_bins)) for n in range(1, n_rows + 1)]
    assert max(needed) <= binning.table_size(n_rows, n_bins) <= 500 + n_bins


def test_arguments_are_checked_like_on_the_cpu():
    with pytest.raises(ValueError, match=r"mh must be finite.*row 1"):
        assign_bins([5000.0, 5000.0], [0.0, np.nan], T_EDGES, M_EDGES, backend="cuda")
    with pytest.raises(ValueError, match="edges must be finite"):
        assign_snr_bins([1.0], (2.0, 1.0), backend="cuda")
    with pytest.raises(ValueError, match=r"0 … 8; found 9 in row 1"):
        sort_by_bin(np.array([0, 9, 2]), 9, backend="cuda")
