"""Plain NumPy contract of `moefast.kernels.likelihood`: same results, float64, no checks, no speed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["gaussian_log_likelihood"]


def gaussian_log_likelihood(
    flux: NDArray,
    data: NDArray,
    *,
    constant: NDArray,
    linear: NDArray | None = None,
    quadratic: NDArray | None = None,
    band_weight: NDArray | None = None,
    basis: NDArray | None = None,
    good: NDArray | None = None,
) -> NDArray[np.float64]:
    """Log N(x; f, V) without the term in 2π, V = diag(var) + Σ_k (f P_k)(f P_k)ᵀ, over the good pixels."""
    out = np.empty(len(flux))
    use = np.ones(flux.shape[1], bool) if good is None else np.asarray(good, bool)
    for i, f in enumerate(np.asarray(flux, np.float64)):
        mean = 1.0 if band_weight is None else f @ band_weight
        variance = np.array(constant, np.float64)
        if linear is not None:
            variance += mean * linear * np.maximum(f, 0)
        if quadratic is not None:
            variance += mean**2 * quadratic
        covariance = np.diag(variance[use])
        if basis is not None:
            shaped = (basis * f)[:, use]
            covariance += shaped.T @ shaped
        difference = (data - f)[use]
        _, log_determinant = np.linalg.slogdet(covariance)
        out[i] = -0.5 * (difference @ np.linalg.solve(covariance, difference) + log_determinant)
    return out
