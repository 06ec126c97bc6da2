"""The groups of stars that every evaluation reports: by signal-to-noise ratio, by bin of the grid, by metallicity."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moefast.core.grids import METAL_POOR, PHYSICAL_GRID, SNR_NORM_NAMES, assign_snr_bins

__all__ = ["N_OCTILES", "Group", "assign_octiles", "groups_of", "octile_edges"]

N_OCTILES = 8
"""Number of groups by snr_median, with as many stars each."""

Group = tuple[str, NDArray[np.bool_]]
"""Name of a group of stars, and which stars are in it."""


def octile_edges(snr_median: ArrayLike) -> NDArray[np.float64]:
    """Quantiles 0, 1/8 … 1 of the finite values (linear interpolation), shape (9,); NaN if there are none."""
    rows = np.asarray(snr_median, dtype=np.float64)
    rows = rows[np.isfinite(rows)]
    if rows.size == 0:
        return np.full(N_OCTILES + 1, np.nan)
    return np.quantile(rows, np.arange(N_OCTILES + 1) / N_OCTILES)


def assign_octiles(snr_median: ArrayLike, edges: ArrayLike) -> NDArray[np.int16]:
    """Octile 0 … 7 of each spectrum, [a, b) with the last edge included; −1 where the SNR is not finite.

    Equal values stay together, so octiles of data with ties differ in size.
    """
    rows = np.asarray(snr_median, dtype=np.float64)
    inner = np.asarray(edges, dtype=np.float64)[1:-1]
    octile = np.searchsorted(inner, rows, side="right").astype(np.int16)
    octile[~np.isfinite(rows)] = -1
    return octile


def groups_of(
    t_eff: ArrayLike, m_h: ArrayLike, snr_norm: ArrayLike, snr_median: ArrayLike
) -> dict[str, list[Group]]:
    """The groups of the protocol: "snr_norm" (4), "snr_median" (8), "grid" (9), "metallicity" (2).

    Parameters
    ----------
    t_eff, m_h : array of shape (n,)
        True T_eff [K] and [M/H] [dex].
    snr_norm, snr_median : array of shape (n,)
        A star whose SNR is not finite is in no group by that SNR.

    Returns
    -------
    dict of str to list of (name, array of shape (n,), bool)

    Raises
    ------
    LabelError
        A label is not finite or the lengths differ.
    """
    norm, median = np.asarray(snr_norm, dtype=np.float64), np.asarray(snr_median, dtype=np.float64)
    norm_bins = np.full(norm.size, -1, dtype=np.int16)
    norm_bins[np.isfinite(norm)] = assign_snr_bins(norm[np.isfinite(norm)])
    octiles = assign_octiles(median, octile_edges(median))
    bins = PHYSICAL_GRID.assign(t_eff, m_h)
    poor = np.asarray(m_h, dtype=np.float64) < METAL_POOR
    return {
        "snr_norm": [(name, norm_bins == k) for k, name in enumerate(SNR_NORM_NAMES)],
        "snr_median": [(f"octile {k + 1}", octiles == k) for k in range(N_OCTILES)],
        "grid": [(name, bins == k) for k, name in enumerate(PHYSICAL_GRID.names)],
        "metallicity": [("[M/H] < -1", poor), ("[M/H] >= -1", ~poor)],
    }
