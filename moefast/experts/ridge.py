"""Linear experts from sufficient statistics, one per noise level.

Design: with noise variance s²D known when a star is scored, the best linear predictor of y is
w(s) = (G + n s²D)⁻¹ b: ridge regression in the basis in which the noise is white, with penalty n s². It needs no
second look at the data and no noise draws. Clean spectra span few directions, so G is first rotated into its
leading noise-white principal components T; there, one eigendecomposition per bin gives every noise level and the
whole α path. A dense Cholesky solve in pixel space is kept for fits that must be exactly as published.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from moefast.experts.normal_equations import Moments

__all__ = ["NoisePath", "Subspace", "principal_subspace", "ridge"]

F64 = NDArray[np.float64]

NEGLIGIBLE = 1e-5
"""A component whose variance is below this fraction of the mean noise variance carries nothing at any noise level."""


@dataclass(frozen=True)
class Subspace:
    """Leading principal components of noise-white spectra: z = Tᵀ(x − reference).

    Attributes
    ----------
    basis : array of shape (p, r), float64
        T = D^(-1/2) V with V orthonormal, so that noise of covariance s²D becomes s² I in z.
    variance : array of shape (r,), float64
        Variance of each component over the training rows, in units of the mean noise variance; descending.
    discarded : float
        Variance, in the same units, that the spectra have outside the basis (all other components together).
    noise_shape : array of shape (p,), float64
        D, mean noise variance per pixel.
    """

    basis: F64
    variance: F64
    discarded: float
    noise_shape: F64

    @property
    def captured(self) -> F64:
        """Σ_r T_jr² of each pixel: its share of the noise energy that the basis takes up."""
        return (self.basis**2).sum(1)


def principal_subspace(moments: Moments, noise_shape: F64, *, max_rank: int = 256, seed: int = 0) -> Subspace:
    """Leading eigenvectors of D^(-1/2) G D^(-1/2) by randomised subspace iteration.

    Parameters
    ----------
    moments : Moments
        Of all rows together, in pixel space.
    noise_shape : array of shape (p,)
        D, positive.
    max_rank : int
        Components kept at most; components of variance below `NEGLIGIBLE` are dropped.
    seed : int
        Of the random start.

    Source: Halko, Martinsson & Tropp 2011, SIAM Review 53, 217, algorithm 4.4.
    """
    scale = 1.0 / np.sqrt(noise_shape)
    p = scale.size
    white = moments.gram * (scale[:, None] / moments.n)
    white *= scale
    total = float(np.trace(white))
    rank = min(max_rank, p)
    width = min(rank + 16, p)
    block = np.random.default_rng(seed).standard_normal((p, width))
    for _ in range(6):
        block, _ = np.linalg.qr(white @ block)
    values, vectors = np.linalg.eigh(block.T @ (white @ block))
    values, vectors = values[::-1][:rank], block @ vectors[:, ::-1][:, :rank]
    kept = max(1, int(np.count_nonzero(values > NEGLIGIBLE)))
    values, vectors = values[:kept], vectors[:, :kept]
    # The sign of an eigenvector is arbitrary; fix it, so that a refit gives the same model.
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(kept)])
    return Subspace(scale[:, None] * vectors, values, max(0.0, total - float(values.sum())), noise_shape)


class NoisePath:
    """w(s) = (G + n(s² + α) I)⁻¹ b for every s and α from one eigendecomposition of G.

    Parameters
    ----------
    moments : Moments
        In a basis where noise of level s has covariance s² I.
    noise_in_gram : float
        Mean squared noise level that the rows already contain (0 for clean spectra); it is taken off the spectrum
        of G before s² is added.
    """

    def __init__(self, moments: Moments, noise_in_gram: float = 0.0) -> None:
        self.moments = moments
        values, self._vectors = np.linalg.eigh(moments.gram)
        self._values = np.maximum(values - moments.n * noise_in_gram, 0.0)
        self._cross = self._vectors.T @ moments.cross

    def solve(self, level: float, alpha: float = 0.0) -> tuple[F64, float]:
        """Weights (r,) and intercept at noise level s and ridge penalty α (in units of the mean noise variance)."""
        weights = self._vectors @ (self._cross / (self._values + self.moments.n * (level**2 + alpha)))
        return weights, self.moments.mean_y - float(weights @ self.moments.mean_x)

    def condition(self, level: float, alpha: float = 0.0) -> float:
        """Condition number of the system solved at this noise level."""
        penalty = self.moments.n * (level**2 + alpha)
        return float((self._values.max() + penalty) / (self._values.min() + penalty))


def ridge(moments: Moments, alpha: float, noise: F64 | float = 0.0) -> tuple[F64, float]:
    """W = (G + α I + n diag(v))⁻¹ b in pixel space by Cholesky, with an unpenalised intercept.

    Parameters
    ----------
    moments : Moments
        In pixel space.
    alpha : float
        Penalty, in units of flux² (scikit-learn's `Ridge(alpha)`).
    noise : array of shape (p,) or float
        Noise variance per pixel that the rows do not contain.

    Returns
    -------
    weights : array of shape (p,), float64
    intercept : float
        Relative to x with the reference subtracted.

    Raises
    ------
    numpy.linalg.LinAlgError
        The matrix is not positive definite: α and noise are too small for these rows.
    """
    system = moments.gram.copy()
    system[np.diag_indices_from(system)] += alpha + moments.n * np.broadcast_to(noise, moments.mean_x.shape)
    # Its transpose is the same matrix in the order of LAPACK, and OpenBLAS is several times faster on the upper half.
    factor = scipy.linalg.cho_factor(system.T, lower=False, overwrite_a=True, check_finite=False)
    weights = scipy.linalg.cho_solve(factor, moments.cross, check_finite=False)
    return weights, moments.mean_y - float(weights @ moments.mean_x)
