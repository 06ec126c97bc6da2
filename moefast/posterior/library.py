"""Clouds of clean training spectra, and the coordinates in which they are told.

Design: a cloud is the training stars around one place of the Hertzsprung-Russell diagram: their mean spectrum, the few
directions in which they scatter most (tangents), and the regression of every label on these. What the tangents leave
out is nearly the same everywhere, so its mean over all clouds serves for each, and coordinates are chosen in which it
is the identity: a star's likelihood is blurred by it once, not once per cloud. One cloud with all tangents is the
linear expert of a bin at the star's own noise; many clouds of few tangents are a posterior over templates.

Clouds are found as those of `moefast.experts.template`, by k-means among the stars of an expert's bin, where labels
count beside components.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter1d, median_filter, minimum_filter1d, uniform_filter1d

from moefast.experts.template import clouds_of_bins
from moefast.posterior.linear import gravity_bins
from moefast.posterior.mixture import SCALE_UNIT

__all__ = ["LEAST_SCATTER", "fit_clouds", "sky_residuals", "slopes"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

GROUPED_BY = [0, 1, 2]
"""Labels in which a cloud should be small: log g, T_eff, [M/H], which every training set has."""
LEAST_SCATTER = 1e-3
"""Variance within clouds, at the least, in units of the noise of the training set."""
SKY_BANDS = 10
"""Bands of wavelength in which residuals of sky lines are free apart."""
FOREIGN_SHARE = 0.02
"""Share of spectra, before they are looked at, that have no lines: dead fibres, hot stars, galaxies."""
WIDEST_LINE, CONTINUUM_DEGREE = 101, 5
"""Pixels beyond which no line reaches, and degree of a polynomial that no line makes."""
ENVELOPE = 41
"""Pixels, odd: the least noise within so many is that between sky lines."""


def slopes(wave: F64, reference: NDArray, widths: Sequence[float]) -> F64:
    """Legendre polynomials 1, 2, … of wavelength times the reference spectrum and their prior widths, (p, q)."""
    x = 2 * (wave - wave[0]) / (wave[-1] - wave[0]) - 1
    each = [
        width * reference * np.polynomial.legendre.Legendre.basis(k + 1)(x) for k, width in enumerate(widths)
    ]
    return np.stack(each, axis=1) if each else np.empty((wave.size, 0))


def sky_residuals(noise_shape: F64, width: float, n_bands: int = SKY_BANDS) -> F64:
    """What sky subtraction leaves of the lines of the night sky, (p, `n_bands`), in units of the training set's flux.

    The lines are what the noise variance has above its lower envelope; bands of wavelength, each fading into the next,
    are free apart.

    Parameters
    ----------
    noise_shape : array of shape (p,)
        Mean noise variance of the training set.
    width : float
        Prior width in standard deviations of the noise, in the pixel where the lines are brightest.
    n_bands : int
    """
    envelope = median_filter(minimum_filter1d(noise_shape, ENVELOPE), 2 * ENVELOPE + 1)
    lines = np.maximum(noise_shape - envelope, 0)
    brightest = lines.argmax()
    if not width or lines[brightest] == 0:
        return np.empty((noise_shape.size, 0))
    place = np.linspace(0, n_bands - 1, noise_shape.size)
    bands = np.maximum(1 - np.abs(place[:, None] - np.arange(n_bands)), 0)
    height = width * np.sqrt(noise_shape[brightest]) / lines[brightest]
    shapes = height * lines[:, None] * bands
    return shapes[:, shapes.any(0)]


def fit_clouds(
    z: F32,
    labels: F64,
    bins: NDArray[np.integer],
    n_experts: int,
    *,
    basis: F64,
    reference: F64,
    noise_shape: F64,
    n_clouds: int,
    n_tangents: int,
    n_gravity_bins: int = 0,
    seed: int = 0,
) -> dict[str, NDArray]:
    """Clouds of the stars of each bin, as many as its share of the stars, in coordinates of their own.

    Parameters
    ----------
    z : array of shape (n, r), float32
        Stars in noise-white components, without noise.
    labels : array of shape (n, l)
        What the clouds predict, log g first.
    bins : array of shape (n,), int
        0 … n_experts − 1.
    n_experts : int
    basis : array of shape (p, r)
        Noise-white principal components T; a spectrum is reference + D T z.
    reference, noise_shape : array of shape (p,)
        Reference spectrum, and mean noise variance D of the training set.
    n_clouds, n_tangents : int
        Clouds in all, and tangents of each.
    n_gravity_bins : int
        Clouds are so many bins of log g within each expert's bin, instead of `n_clouds` found by k-means; see
        `moefast.posterior.linear`. 0 for k-means.
    seed : int

    Returns
    -------
    dict of str to array
        Arrays of a `PosteriorMixture`: `directions` (p, r + 2), that of what a spectrum without lines has beside all
        stars and the scale last; `keys`, `tangents`, `gains`, `log_weights`, `labels`, `scatter`, `first`. The last
        expert is one cloud: a spectrum without lines, which is no star.

    Raises
    ------
    ValueError
        A bin is empty.
    """
    if n_gravity_bins:
        clouds, first = gravity_bins(labels[:, 0], bins, n_experts, n_gravity_bins)
    else:
        clouds, first = clouds_of_bins(
            z, labels[:, GROUPED_BY], bins, n_experts, n_clouds=n_clouds, seed=seed
        )
    r, t = z.shape[1], min(n_tangents, z.shape[1])
    parts, within = [], np.zeros((r, r))
    for cloud in clouds:
        *part, left = _cloud(z[cloud].astype(np.float64), labels[cloud], t, len(bins))
        within += len(cloud) / len(bins) * left
        parts.append(part)
    keys, tangents, gains, log_weights, means, scatter = (
        np.array(column) for column in zip(*parts, strict=True)
    )
    # Coordinates in which what is left within clouds is the identity: z = F ζ with F Fᵀ = E.
    variances, vectors = np.linalg.eigh(within)
    root = np.sqrt(np.maximum(variances, 0) + LEAST_SCATTER)
    forth, back = vectors * root, vectors / root
    directions = (noise_shape[:, None] * basis) @ forth
    own, beside, height = _without_lines(reference, noise_shape, directions)
    none = np.zeros((len(keys), 2))
    arrays = {
        "directions": np.column_stack([directions, beside, SCALE_UNIT * reference]),
        "keys": np.concatenate([keys @ back, none], axis=1),
        "tangents": np.concatenate([tangents @ back, np.zeros((*tangents.shape[:2], 2))], axis=2),
        "gains": gains,
        "log_weights": log_weights,
        "labels": means,
        "scatter": scatter,
    }
    every = labels - labels.mean(0)
    foreign = {
        "keys": np.concatenate([own, [height, 0.0]]),
        "tangents": np.zeros((t, r + 2)),
        "gains": np.zeros((t, labels.shape[1])),
        "log_weights": np.log(FOREIGN_SHARE),
        "labels": labels.mean(0),
        "scatter": every.T @ every / len(every),
    }
    arrays |= {name: np.concatenate([arrays[name], np.asarray(one)[None]]) for name, one in foreign.items()}
    return {name: np.ascontiguousarray(value, np.float32) for name, value in arrays.items()} | {
        "first": np.array([*first, first[-1] + 1], np.int64)
    }


def _without_lines(reference: F64, noise_shape: F64, directions: F64) -> tuple[F64, F64, float]:
    """A spectrum that is all continuum: its coordinates, a direction for what they leave out, and how far along it."""
    x = np.linspace(-1, 1, reference.size)
    envelope = uniform_filter1d(maximum_filter1d(reference, WIDEST_LINE), WIDEST_LINE)
    continuum = np.polynomial.Legendre.fit(x, envelope, CONTINUUM_DEGREE)(x)
    white = 1 / np.sqrt(noise_shape)
    apart = continuum - reference
    own = np.linalg.lstsq(directions * white[:, None], apart * white, rcond=None)[0]
    left = apart - directions @ own
    height = float(np.linalg.norm(left * white) / np.sqrt(LEAST_SCATTER))
    return own.astype(np.float64), left / max(height, 1e-12), height


def _cloud(z: F64, y: F64, t: int, n_all: int) -> tuple:
    """Mean, tangents, gains, ln share, mean labels, and what is left of the covariances of labels and of z."""
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
    return mean, tangents, gains, np.log(n / n_all), label, scatter, left
