"""Plain NumPy contracts of `moefast.kernels.binning`: same results, no checks, no speed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["assign_bins", "assign_snr_bins", "sort_by_bin"]


def assign_bins(
    teff: ArrayLike, mh: ArrayLike, teff_edges: Sequence[float], mh_edges: Sequence[float]
) -> NDArray[np.int16]:
    """bin = n_mh · i(T_eff) + i([M/H]), i(v) = clip(#{j : e_j ≤ v} − 1, 0, n − 1)."""  # noqa: D403
    i = np.searchsorted(np.asarray(teff_edges, dtype=np.float64), np.asarray(teff, np.float64), "right") - 1
    k = np.searchsorted(np.asarray(mh_edges, dtype=np.float64), np.asarray(mh, np.float64), "right") - 1
    n_t, n_m = len(teff_edges) - 1, len(mh_edges) - 1
    return (n_m * np.clip(i, 0, n_t - 1) + np.clip(k, 0, n_m - 1)).astype(np.int16)


def assign_snr_bins(snr: ArrayLike, edges: Sequence[float]) -> NDArray[np.int16]:
    """bin = #{j : e_j < snr}."""  # noqa: D403
    return np.searchsorted(np.asarray(edges, np.float64), np.asarray(snr, np.float64), "left").astype(
        np.int16
    )


def sort_by_bin(bins: ArrayLike, n_bins: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """order = stable argsort of bins; offsets = cumulative histogram, starting at 0."""  # noqa: D403
    rows = np.asarray(bins, dtype=np.int64)
    counts = np.bincount(rows, minlength=n_bins)
    return np.argsort(rows, kind="stable"), np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
