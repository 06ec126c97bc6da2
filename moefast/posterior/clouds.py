"""One cloud of stars that are alike: their mean spectrum, the directions in which they scatter, and what that tells."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["GROUPED_BY", "Cloud", "cloud_of"]

F64 = NDArray[np.float64]

GROUPED_BY = [0, 1, 2]
"""Labels in which a cloud should be small: log g, T_eff, [M/H], which every training set has."""


class Cloud(NamedTuple):
    """Of n stars in r components with l labels: t tangents, along each of which they scatter by one.

    `mean` (r,) and `tangents` (t, r) of spectra; `gains` (t, l), the covariance of tangents with labels; `log_share`
    of all stars; the mean `label` (l,); and what tangents leave of the covariance of labels, `scatter` (l, l), and of
    spectra, `left` (r, r).
    """

    mean: F64
    tangents: F64
    gains: F64
    log_share: float
    label: F64
    scatter: F64
    left: F64


def cloud_of(z: F64, y: F64, t: int, n_all: int) -> Cloud:
    """The cloud of stars z (n, r) with labels y (n, l), of `n_all` stars in all."""
    n = len(z)
    mean, label = z.mean(0), y.mean(0)
    apart, dy = z - mean, y - label
    covariance = apart.T @ apart / n
    variances, vectors = np.linalg.eigh(covariance)
    # Fewer stars than tangents span fewer.
    kept = min(t, n - 1)
    along = np.sqrt(np.maximum(variances[::-1][:kept], 0))
    tangents, gains = np.zeros((t, z.shape[1])), np.zeros((t, y.shape[1]))
    tangents[:kept] = vectors.T[::-1][:kept] * along[:, None]
    towards = vectors.T[::-1][:kept] / np.maximum(along, 1e-9)[:, None]
    gains[:kept] = towards @ (apart.T @ dy / n)
    scatter = dy.T @ dy / n - gains.T @ gains
    left = covariance - tangents.T @ tangents
    return Cloud(mean, tangents, gains, float(np.log(n / n_all)), label, scatter, left)
