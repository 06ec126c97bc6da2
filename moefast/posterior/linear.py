"""Linear experts at a star's own noise: which training stars are one Gaussian.

With the mean μ and covariance C of the spectra of a group of stars, and c = cov(spectrum, label), the linear expert of
the group at the noise of one star is ȳ + cᵀ(C + M⁻¹)⁻¹(M⁻¹u − μ), and its evidence that of the Gaussian N(μ, C). This
is what `moefast.posterior.forward` computes for one cloud, as far as its tangents hold C. Nothing but counts, means and
covariances of each group enters: the sufficient statistics of spectra and labels together.

Design: the regression of a label on the flux is straight only within a narrow range of log g, where lines do not change
from dwarfs to giants; so groups are bins of log g within the bins of T_eff × [M/H] that experts have.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEAST_STARS", "gravity_bins"]

LEAST_STARS = 50
"""Stars of a group, at the least, where the bin of the expert has as many."""


def gravity_bins(
    log_g: NDArray, bins: NDArray[np.integer], n_experts: int, n_bins: int
) -> tuple[list[NDArray[np.intp]], NDArray[np.int64]]:
    """Groups of stars with neighbouring log g within the bin of each expert, alike in number.

    Parameters
    ----------
    log_g : array of shape (n,), dex
    bins : array of shape (n,), int
        0 … n_experts − 1.
    n_experts : int
    n_bins : int
        Groups in each bin; fewer where a group would have fewer than `LEAST_STARS` stars.

    Returns
    -------
    list of array of int
        Rows of the stars of each group, groups sorted by expert and log g.
    array of shape (n_experts + 1,), int64
        First group of each expert, and the number of groups.

    Raises
    ------
    ValueError
        A bin is empty.
    """
    groups: list[NDArray[np.intp]] = []
    first = [0]
    for k in range(n_experts):
        rows = np.flatnonzero(bins == k)
        if rows.size == 0:
            raise ValueError(f"no star in bin {k}; a linear expert needs some in each")
        rows = rows[np.argsort(log_g[rows], kind="stable")]
        groups += np.array_split(rows, max(1, min(n_bins, rows.size // LEAST_STARS)))
        first.append(len(groups))
    return groups, np.array(first, np.int64)
