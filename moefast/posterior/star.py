"""The whole posterior of one star: its clouds, its labels, and the spectrum that they make of it.

With the values of `moefast.posterior.forward.cloud_values`, S = (I + M)⁻¹ and w_j the posterior weight of cloud j, the
coordinates of the star's spectrum follow

    ζ | j ~ N(u₁ + S (k_j + T_jᵀγ_j),  S + S T_jᵀ A_j⁻¹ T_j S),
    η | ζ ~ N(K (u_η − M_ηζ ζ), K),    K = (H + M_ηη)⁻¹,

and its flux without noise is c₀ (r + G ζ + N η). Labels within cloud j are Gaussian with the mean and covariance that
`moefast.posterior.forward` gives.

Design: for pictures and for looking into single stars, in NumPy and float64. What is told of the labels agrees with
`PosteriorMixture.predict`, whose errors are calibrated and whose log g is corrected besides
(`moefast.posterior.correction`); here the posterior speaks for itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import InputError
from moefast.ops.on_numpy import NumPyArithmetic
from moefast.posterior.forward import cloud_values
from moefast.posterior.mixture import PosteriorMixture

__all__ = ["StarPosterior", "star_posterior"]

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class StarPosterior:
    """The posterior of one star.

    Attributes
    ----------
    weights : array of shape (m,)
        Probability of each cloud; they add up to 1. The last clouds may be of spectra that are no stars.
    label_names : tuple of str
    means : array of shape (m, l)
        Mean of each label within a cloud.
    covariances : array of shape (m, l, l)
    library : array of shape (m, l)
        Mean labels of the stars of each cloud, whatever this star is.
    n_stars : int
        Clouds before those of spectra that are no stars.
    model, model_sd : array of shape (p,)
        Posterior mean and standard deviation of the flux without noise, in units of the flux that was given. Scale,
        slopes and residuals of sky lines are part of it.
    star, star_sd : array of shape (p,)
        The same without residuals of sky lines: the star itself, at its scale and slope.
    """

    weights: F64
    label_names: tuple[str, ...]
    means: F64
    covariances: F64
    library: F64
    n_stars: int
    model: F64
    model_sd: F64
    star: F64
    star_sd: F64

    def _place(self, label: str) -> int:
        if label not in self.label_names:
            raise InputError(f"label {label!r} is unknown; the posterior has {', '.join(self.label_names)}")
        return self.label_names.index(label)

    def moments(self, label: str) -> tuple[float, float]:
        """Posterior mean and standard deviation of a label."""
        i = self._place(label)
        mean = self.weights @ self.means[:, i]
        variance = self.weights @ (self.covariances[:, i, i] + (self.means[:, i] - mean) ** 2)
        return float(mean), float(np.sqrt(variance))

    def density(self, label: str, at: NDArray) -> F64:
        """Posterior density of a label at the values (k,) `at`, per unit of the label."""
        i = self._place(label)
        sd = np.sqrt(self.covariances[:, i, i])
        apart = (np.asarray(at, np.float64)[:, None] - self.means[:, i]) / sd
        return np.exp(-0.5 * apart**2) @ (self.weights / (np.sqrt(2 * np.pi) * sd))

    def joint_density(self, x: str, y: str, at_x: NDArray, at_y: NDArray) -> F64:
        """Posterior density of two labels on a grid, of shape (len(at_y), len(at_x))."""
        i, j = self._place(x), self._place(y)
        out = np.zeros((len(at_y), len(at_x)))
        for weight, mean, covariance in zip(self.weights, self.means, self.covariances, strict=True):
            if weight < 1e-6:
                continue
            a, b, c = covariance[i, i], covariance[j, j], covariance[i, j]
            determinant = max(a * b - c * c, 1e-12 * a * b)
            dx, dy = at_x[None] - mean[i], at_y[:, None] - mean[j]
            exponent = (b * dx**2 - 2 * c * dx * dy + a * dy**2) / determinant
            out += weight / (2 * np.pi * np.sqrt(determinant)) * np.exp(-0.5 * exponent)
        return out


def star_posterior(
    mixture: PosteriorMixture, flux: NDArray, error: NDArray, mask: NDArray[np.bool_] | None = None
) -> StarPosterior:
    """The posterior of one star.

    Parameters
    ----------
    mixture : PosteriorMixture
    flux, error : array of shape (p,)
        On the grid of the mixture, in any unit.
    mask : array of shape (p,), bool, optional
        True where a pixel is bad.

    Raises
    ------
    ValueError
        Not one pixel is good.
    """
    seen = np.asarray(error, np.float64) if mask is None else np.where(mask, np.nan, error)
    numbers = mixture.numbers
    op = NumPyArithmetic(numbers)
    with np.errstate(invalid="ignore", over="ignore"):
        values = cloud_values(op, mixture.sizes, np.asarray(flux, np.float64)[None], seen[None])
    if values.n_good[0, 0] == 0:
        raise ValueError("a star needs at least one good pixel")
    evidence = values.evidence[0]
    weights = np.exp(evidence - evidence.max())
    weights /= weights.sum()

    # -- labels: the scale, the last one, is told by itself -------------------------------------------------------
    count = len(mixture.label_names)
    gains = numbers["gains"][:, :, :count].astype(np.float64)
    inverse, gamma = values.inverse[0], values.coefficients[0, :, :, 0]
    library = mixture.labels.astype(np.float64)
    means = library + np.einsum("mt,mtl->ml", gamma, gains)
    covariances = mixture.scatter + np.einsum("mtl,mts,msk->mlk", gains, inverse, gains, optimize=True)

    # -- coordinates --------------------------------------------------------------------------------------------
    n = mixture.n_coordinates
    smoothing, u1 = values.smoothing[0], values.smoothed[0, :, 0]
    tangents, keys = numbers["tangents"].astype(np.float64), mixture.keys.astype(np.float64)
    middles = u1 + (keys + np.einsum("mt,mtn->mn", gamma, tangents)) @ smoothing
    centre = weights @ middles
    apart = middles - centre
    along = tangents @ smoothing
    spread = smoothing + (weights * apart.T) @ apart
    spread += np.einsum("m,mta,mts,msb->ab", weights, along, inverse, along, optimize=True)

    # -- nuisances ----------------------------------------------------------------------------------------------
    point, covariance = centre, spread
    if mixture.n_nuisances:
        matrix, vector = values.matrix[0], values.vector[0, :, 0]
        nuisance_covariance = np.linalg.inv(values.prior[0] + matrix[n:, n:])
        follows = -nuisance_covariance @ matrix[n:, :n]
        nuisances = nuisance_covariance @ vector[n:] + follows @ centre
        point = np.concatenate([centre, nuisances])
        shared = spread @ follows.T
        covariance = np.block([[spread, shared], [shared.T, nuisance_covariance + follows @ shared]])
    directions, reference = mixture.directions.astype(np.float64), mixture.reference.astype(np.float64)
    scale = float(values.scale[0, 0])
    kept = directions.shape[1] - mixture.n_sky

    def flux_of(count: int) -> tuple[F64, F64]:
        """Mean and standard deviation of what the first directions make."""
        across = directions[:, :count]
        variance = np.einsum("pa,ab,pb->p", across, covariance[:count, :count], across, optimize=True)
        return scale * (reference + across @ point[:count]), scale * np.sqrt(np.maximum(variance, 0))

    model, model_sd = flux_of(directions.shape[1])
    star, star_sd = flux_of(kept)
    return StarPosterior(
        weights=weights,
        label_names=mixture.label_names,
        means=means,
        covariances=covariances,
        library=library,
        n_stars=int(mixture.first[mixture.n_experts]),
        model=model,
        model_sd=model_sd,
        star=star,
        star_sd=star_sd,
    )
