"""Plain NumPy contract of `moefast.kernels.template`: same results, float64, n × m numbers, no checks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["template_posterior_reference"]

F64 = NDArray[np.float64]


def template_posterior_reference(
    z: NDArray, level: NDArray, keys: NDArray, values: NDArray, *, free_scale: bool = False
) -> tuple[F64, F64, F64]:
    """Posterior mean (n, q), log evidence (n,) and effective number of templates (n,)."""
    stars, templates = np.asarray(z, np.float64), np.asarray(keys, np.float64)
    labels, s = np.asarray(values, np.float64).reshape(len(templates), -1), np.asarray(level, np.float64)
    stars, s = stars.copy(), s.copy()
    bad = ~(np.isfinite(stars).all(1) & (s > 0) & np.isfinite(s))
    stars[bad], s[bad] = 0.0, 1.0
    scale = np.ones((len(stars), len(templates)))
    if free_scale:
        square = (templates**2).sum(1)
        scale = stars @ templates.T / np.where(square > 0, square, 1.0)
    chi2 = ((stars[:, None, :] - scale[:, :, None] * templates) ** 2).sum(2)
    exponents = -0.5 * chi2 / s[:, None] ** 2
    top = exponents.max(1, keepdims=True)
    shares = np.exp(exponents - top)
    total = shares.sum(1)
    weights = shares / total[:, None]
    found = weights @ labels, top[:, 0] + np.log(total / len(templates)), 1.0 / (weights**2).sum(1)
    for array in found:
        array[bad] = np.nan
    return found
