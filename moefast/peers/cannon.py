"""The Cannon's way: every pixel a quadratic function of the labels, learnt from labelled spectra.

    x_ij = θ_jᵀ v(ℓ_i) + noise of variance σ_ij² + s_j²,    v(ℓ) = (1, ℓ, ℓ ℓᵀ), 21 terms of five scaled labels,
    θ_j and s_j by maximum likelihood of the labelled stars.

Design: θ_j is a weighted least-squares solution for any s_j, so that the likelihood is computed on a grid of s_j and
its best value is kept: for each of them the normal equations of all pixels are one matrix product.

Source: the model of Ness et al. (2015, ApJ 808, 16), written anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import InputError
from moefast.simulate.emulator import LABELS
from moefast.simulate.source import SimulatedSpectra
from moefast.spectra.quality import good_pixels

__all__ = ["LABELLED", "QuadraticModel", "fit_quadratic", "quadratic_of_set"]

F64 = NDArray[np.float64]

LABELLED = 2000
"""Labelled stars that the model is learnt from."""
SCATTERS = (0.0, *np.geomspace(1e-3, 0.256, 9).tolist())
"""Values of s_j that are tried, for spectra of median 1."""
SILENT = 1e12
"""Variance of a pixel that nothing was learnt about."""
_PAIRS = np.triu_indices(len(LABELS))


def _terms(scaled: F64) -> F64:
    """Terms v of scaled labels (n, 5), shape (n, 21)."""
    products = scaled[:, _PAIRS[0]] * scaled[:, _PAIRS[1]]
    return np.concatenate([np.ones((len(scaled), 1)), scaled, products], axis=1)


@dataclass(frozen=True)
class QuadraticModel:
    """A learnt model, as `moefast.peers.least_squares.SpectralModel`.

    Attributes
    ----------
    wave : array of shape (p,), Å
    columns : array of shape (p, 21)
        θ of each pixel.
    scatter2 : array of shape (p,)
        s² of each pixel.
    low, high : arrays of shape (5,)
        Least and largest label of the labelled stars [K, dex]; scaled labels go from −1 to 1.
    """

    wave: F64
    columns: F64
    scatter2: F64
    low: F64
    high: F64

    def coefficients(self, labels: F64) -> F64:
        """Of the columns at labels (5,)."""
        terms: F64 = _terms(self._scaled(labels)[None])[0]
        return terms

    def derivatives(self, labels: F64) -> F64:
        """Of the coefficients by the labels, (5, 21)."""
        scaled, one = self._scaled(labels), np.eye(len(LABELS))
        products = one[:, _PAIRS[0]] * scaled[_PAIRS[1]] + scaled[_PAIRS[0]] * one[:, _PAIRS[1]]
        slopes = np.concatenate([np.zeros((len(LABELS), 1)), one, products], axis=1)
        return slopes * (2 / (self.high - self.low))[:, None]

    def _scaled(self, labels: F64) -> F64:
        return 2 * (labels - self.low) / (self.high - self.low) - 1


def fit_quadratic(
    wave: F64,
    flux: NDArray[np.floating],
    error: NDArray[np.floating],
    labels: Mapping[str, NDArray],
    good: NDArray[np.bool_] | None = None,
) -> QuadraticModel:
    """Learn the model from labelled spectra, each divided by its median.

    Parameters
    ----------
    wave : array of shape (p,), Å
    flux, error : arrays of shape (n, p)
    labels : mapping of str to array of shape (n,)
        T_eff [K], log_g, M_H, a_M, C_M [dex].
    good : array of shape (n, p), bool, optional
        Pixels to use; all if absent. Where a pixel is good in too few stars, it gets a scatter that silences it.

    Raises
    ------
    InputError
        There are fewer stars than twice the terms, or a label is the same for all.
    """
    values = np.column_stack([labels[name] for name in LABELS]).astype(float)
    low, high = values.min(0), values.max(0)
    n_terms = 1 + len(LABELS) + len(_PAIRS[0])
    if len(values) < 2 * n_terms or not (high > low).all():
        raise InputError(
            f"the quadratic model needs {2 * n_terms} labelled stars at least, and five labels that vary; found "
            f"{len(values)} stars, ranges "
            + ", ".join(f"{a:g} to {b:g}" for a, b in zip(low, high, strict=True))
        )
    v = _terms(2 * (values - low) / (high - low) - 1)
    rows, columns = np.triu_indices(n_terms)
    pairs = v[:, rows] * v[:, columns]
    use = np.ones(flux.shape, bool) if good is None else good
    level = np.nanmedian(np.where(use, flux, np.nan), axis=1, keepdims=True)
    x = np.where(use, flux, 0) / level
    variance = np.where(use, np.square(error, dtype=float), 1) / level**2
    p = x.shape[1]
    best = np.full(p, -np.inf)
    theta, scatter2 = np.zeros((p, n_terms)), np.full(p, SILENT)
    known = use.sum(0) >= 2 * n_terms
    for s in SCATTERS:
        weight = use / (variance + s * s)
        matrix = np.empty((p, n_terms, n_terms))
        matrix[:, rows, columns] = matrix[:, columns, rows] = weight.T @ pairs
        matrix[~known] = np.eye(n_terms)
        vector = (weight * x).T @ v
        solution = np.linalg.solve(matrix, vector[:, :, None])[:, :, 0]
        chi2 = (weight * x * x).sum(0) - (solution * vector).sum(1)
        likelihood = -0.5 * (chi2 + np.log(variance + s * s, where=use, out=np.zeros_like(x)).sum(0))
        better = known & (likelihood > best)
        best[better], theta[better], scatter2[better] = likelihood[better], solution[better], s * s
    return QuadraticModel(np.asarray(wave, float), theta, scatter2, low, high)


def quadratic_of_set(name: str, n: int = LABELLED) -> QuadraticModel:
    """The model learnt from the first stars of the training part of a reference set, with their noise.

    Parameters
    ----------
    name : str
        See `moefast.simulate.sets.REFERENCE_SETS`.
    n : int
    """
    spectra = SimulatedSpectra.of_set(name, rows=(0, n))
    block = next(iter(spectra.blocks(n, array="noisy")))
    good = good_pixels(block.flux, block.error, block.mask)
    return fit_quadratic(spectra.wave, block.flux, block.error, spectra.labels(LABELS), good)
