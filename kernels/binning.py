"""Bins of rows: which T_eff × [M/H] or SNR bin a row belongs to, and rows grouped by bin.

Design: a public function checks its arguments, allocates the output and calls one private Numba loop; the
loops neither check nor allocate. The contract is `moefast.kernels.reference_binning` (plain NumPy). All
comparisons are made in float64, so that float32 labels and float64 edges meet exactly as NumPy would have
them meet. The loops run on one thread: a million rows take a few milliseconds, less than reading them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moefast.core.compiled import njit
from moefast.core.grids import MAX_BINS, finite_rows, increasing_edges
from moefast.kernels.dispatch import on_cuda

__all__ = ["assign_bins", "assign_snr_bins", "sort_by_bin"]

F64 = NDArray[np.float64]


def assign_bins(
    teff: ArrayLike,
    mh: ArrayLike,
    teff_edges: Sequence[float],
    mh_edges: Sequence[float],
    *,
    backend: str = "cpu",
) -> NDArray[np.int16]:
    """Bin index of each row on a rectangular T_eff × [M/H] grid, edge-clamped.

    bin = n_mh · i(T_eff) + i([M/H]),    i(v) = clip(#{j : e_j ≤ v} − 1, 0, n − 1)

    Intervals are half-open, [e_j, e_{j+1}), and the last edge belongs to the last interval. Rows outside the
    grid get the nearest bin, never a bin of their own.

    Parameters
    ----------
    teff : array of shape (n,)
        Effective temperature in K.
    mh : array of shape (n,)
        Metallicity [M/H] in dex.
    teff_edges, mh_edges : sequence of float
        Strictly increasing edges, at least two each, in K and dex.
    backend : "cpu" or "cuda"

    Returns
    -------
    array of shape (n,), int16

    Raises
    ------
    ValueError
        A label is not finite (the first row is named), shapes differ, or the edges are unusable.
    BackendError
        The backend is unknown, or there is no usable CUDA device.
    """
    if backend != "cpu":
        return on_cuda("assign_bins", backend)(teff, mh, teff_edges, mh_edges)
    t_eff, m_h, inner_t, inner_m = check_grid(teff, mh, teff_edges, mh_edges)
    out = np.empty(t_eff.size, dtype=np.int16)
    _assign_bins(t_eff, m_h, inner_t, inner_m, out)
    return out


def check_grid(
    teff: ArrayLike, mh: ArrayLike, teff_edges: Sequence[float], mh_edges: Sequence[float]
) -> tuple[F64, F64, F64, F64]:
    """The arguments of `assign_bins` as float64 arrays, edges without the outermost, or a ValueError."""
    t_eff = finite_rows("teff", teff)
    m_h = finite_rows("mh", mh)
    if t_eff.shape != m_h.shape:
        raise ValueError(f"teff and mh must have equal length; found {t_eff.size} and {m_h.size}")
    inner_t = increasing_edges("teff_edges", teff_edges, 2)
    inner_m = increasing_edges("mh_edges", mh_edges, 2)
    n_bins = (inner_t.size - 1) * (inner_m.size - 1)
    if n_bins > MAX_BINS:
        raise ValueError(f"a grid may have at most {MAX_BINS} bins (int16); found {n_bins}")
    return t_eff, m_h, inner_t[1:-1], inner_m[1:-1]


def assign_snr_bins(snr: ArrayLike, edges: Sequence[float], *, backend: str = "cpu") -> NDArray[np.int16]:
    """Bin index of each row by its SNR: bin = #{j : e_j < snr}.

    Intervals are open on the left and closed on the right, as the frozen protocol has them: with edges
    (2, 4, 7), X is snr ≤ 2, L is (2, 4], M is (4, 7] and H is snr > 7.

    Parameters
    ----------
    snr : array of shape (n,)
        Signal-to-noise ratio (either definition; the edges must be of the same one).
    edges : sequence of float
        Strictly increasing; m edges make m + 1 bins.
    backend : "cpu" or "cuda"

    Returns
    -------
    array of shape (n,), int16

    Raises
    ------
    ValueError
        An SNR is not finite (the first row is named) or the edges are unusable.
    BackendError
        The backend is unknown, or there is no usable CUDA device.
    """
    if backend != "cpu":
        return on_cuda("assign_snr_bins", backend)(snr, edges)
    rows, cuts = check_snr(snr, edges)
    out = np.empty(rows.size, dtype=np.int16)
    _assign_right_closed(rows, cuts, out)
    return out


def check_snr(snr: ArrayLike, edges: Sequence[float]) -> tuple[F64, F64]:
    """The arguments of `assign_snr_bins` as float64 arrays, or a ValueError."""
    rows = finite_rows("snr", snr)
    cuts = increasing_edges("edges", edges, 1)
    if cuts.size >= MAX_BINS:
        raise ValueError(f"there may be at most {MAX_BINS} bins (int16); found {cuts.size + 1}")
    return rows, cuts


def sort_by_bin(
    bins: ArrayLike, n_bins: int, *, backend: str = "cpu"
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Group rows by bin with a stable counting sort (histogram, scan, scatter).

    Rows of bin k are order[offsets[k] : offsets[k + 1]], in their input order.

    Parameters
    ----------
    bins : array of shape (n,), integer
        Bin of each row, 0 … n_bins − 1.
    n_bins : int
        Number of bins; empty bins are allowed.
    backend : "cpu" or "cuda"

    Returns
    -------
    order : array of shape (n,), int64
    offsets : array of shape (n_bins + 1,), int64

    Raises
    ------
    ValueError
        A bin lies outside 0 … n_bins − 1 (the first row is named), or `bins` is not a vector of integers.
    BackendError
        The backend is unknown, or there is no usable CUDA device.
    """
    if backend != "cpu":
        return on_cuda("sort_by_bin", backend)(bins, n_bins)
    rows = check_bins(bins, n_bins)
    order = np.empty(rows.size, dtype=np.int64)
    offsets = np.zeros(n_bins + 1, dtype=np.int64)
    _counting_sort(rows, offsets, np.empty(n_bins, dtype=np.int64), order)
    return order, offsets


def check_bins(bins: ArrayLike, n_bins: int) -> NDArray[np.int64]:
    """The bins as int64, or a ValueError that names the first row outside 0 … n_bins − 1."""
    rows = np.asarray(bins)
    if rows.ndim != 1 or not (np.issubdtype(rows.dtype, np.integer) or rows.size == 0):
        raise ValueError(f"bins must be a vector of integers; found {rows.dtype} of shape {rows.shape}")
    if n_bins < 1:
        raise ValueError(f"n_bins must be at least 1; found {n_bins}")
    bad = (rows < 0) | (rows >= n_bins)
    if bad.any():
        row = int(np.argmax(bad))
        raise ValueError(f"bins must lie in 0 … {n_bins - 1}; found {rows[row]} in row {row}")
    return rows.astype(np.int64, copy=False)


# Only inner edges are compared: that alone clamps outside rows and includes the last edge.
@njit(cache=True, nogil=True)
def _assign_bins(t_eff, m_h, inner_t, inner_m, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    n_m = inner_m.size + 1
    for row in range(t_eff.size):
        i = 0
        for j in range(inner_t.size):
            i += t_eff[row] >= inner_t[j]
        k = 0
        for j in range(inner_m.size):
            k += m_h[row] >= inner_m[j]
        out[row] = i * n_m + k


@njit(cache=True, nogil=True)
def _assign_right_closed(snr, cuts, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    for row in range(snr.size):
        k = 0
        for j in range(cuts.size):
            k += snr[row] > cuts[j]
        out[row] = k


@njit(cache=True, nogil=True)
def _counting_sort(bins, offsets, cursor, order):  # type: ignore[no-untyped-def]  # pragma: no cover
    for row in range(bins.size):
        offsets[bins[row] + 1] += 1
    for k in range(cursor.size):
        offsets[k + 1] += offsets[k]
        cursor[k] = offsets[k]
    for row in range(bins.size):
        k = bins[row]
        order[cursor[k]] = row
        cursor[k] += 1
