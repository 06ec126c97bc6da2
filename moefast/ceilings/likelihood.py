"""Log-likelihoods of one observed spectrum whose sky subtraction and calibration are not perfect.

    x = f (1 + Σ_k a_k P_k) + m Σ_g b_g S_g + noise,    a, b ~ N(0, 1),    m_i = Σ_j w_j f_ij,
    var_ij = constant_j + m_i linear_j max(f_ij, 0) + m_i² quadratic_j,    good pixels j only,
    log L_i = −½ Σ_j [(x_j − f_ij)² / var_ij + ln var_ij] + ½ bᵀA⁻¹b − ½ ln det A,
    A = 1 + B diag(1/var) Bᵀ,    b = B diag(1/var) (x − f),    B = [f P; m S].

Without S it is `moefast.kernels.gaussian_log_likelihood`, by which it is tested.

Design: the shapes P and S are the same for every supposed spectrum f, so that all entries of A for many f are three
matrix products, with f²/var, f/var and 1/var. Lost pixels are left out from the start.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["VisitLikelihood"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


class VisitLikelihood:
    """Log-likelihood of one spectrum under many supposed ones, without the term in 2π.

    Parameters
    ----------
    data : array of shape (p,)
        Observed spectrum x; its value at a bad pixel is not used.
    good : array of shape (p,), bool, or None
        Pixels to use; all if None.
    multiplied : array of shape (k, p), or None
        Shapes P of multiplicative errors, each of unit variance.
    added : array of shape (g, p), or None
        Shapes S of additive errors, each of unit variance where the band mean is 1.
    constant, linear, quadratic : arrays of shape (p,)
        Terms of the variance.
    band_weight : array of shape (p,)
        Weights w of the band mean.
    """

    def __init__(
        self, data: F64, good: NDArray[np.bool_] | None, multiplied: F64 | None, added: F64 | None, *,
        constant: F64, linear: F64, quadratic: F64, band_weight: F64,
    ) -> None:  # fmt: skip
        use = np.ones(len(data), bool) if good is None else np.asarray(good, bool)
        p = len(data)
        shapes = [np.zeros((0, p)) if one is None else one for one in (multiplied, added)]
        times, plus = (np.ascontiguousarray(one[:, use].T, np.float32) for one in shapes)
        self._use = None if use.all() else np.flatnonzero(use)
        self._band_weight = band_weight.astype(np.float32)
        self._data, self._constant, self._linear, self._quadratic = (
            one[use].astype(np.float32) for one in (data, constant, linear, quadratic)
        )
        self._times, self._plus = times, plus
        # Products of two shapes, each pair once.
        self._pairs = tuple(np.triu_indices(one.shape[1]) for one in (times, plus))
        (i, j), (g, h) = self._pairs
        self._times_times, self._plus_plus = times[:, i] * times[:, j], plus[:, g] * plus[:, h]
        self._times_plus = (times[:, :, None] * plus[:, None, :]).reshape(len(times), -1)

    def __call__(self, flux: F32) -> F64:
        """Log-likelihoods of noise-free spectra, array of shape (n, p), float32; returns shape (n,)."""
        n, k, g = len(flux), self._times.shape[1], self._plus.shape[1]
        mean = (flux @ self._band_weight)[:, None]
        f = flux if self._use is None else flux[:, self._use]
        variance = np.maximum(f, 0)
        variance *= mean * self._linear
        variance += mean**2 * self._quadratic
        variance += self._constant
        weight = 1 / variance
        apart = self._data - f
        pull = weight * apart
        chi2 = np.einsum("np,np->n", pull, apart, dtype=np.float64)
        logarithm = np.log(variance, out=variance).sum(1, dtype=np.float64)
        weighed = weight * f
        vector = np.concatenate([(pull * f) @ self._times, mean * (pull @ self._plus)], axis=1).astype(float)
        matrix = np.zeros((n, k + g, k + g))
        (a, b), (c, d) = self._pairs
        matrix[:, b, a] = (weighed * f) @ self._times_times
        matrix[:, k + d, k + c] = mean**2 * (weight @ self._plus_plus)
        matrix[:, k:, :k] = (mean * (weighed @ self._times_plus)).reshape(n, k, g).transpose(0, 2, 1)
        matrix[:, np.arange(k + g), np.arange(k + g)] += 1
        factor = np.linalg.cholesky(matrix)  # Reads the lower triangle alone.
        gain = np.linalg.solve(factor, vector[:, :, None])[:, :, 0]
        half_log_determinant = np.log(np.diagonal(factor, axis1=1, axis2=2)).sum(1)
        found: F64 = -0.5 * (chi2 + logarithm) + 0.5 * (gain**2).sum(1) - half_log_determinant
        return found
