"""Clouds of clean training spectra, and the coordinates in which they are told.

Design: a cloud is the training stars around one place of the Hertzsprung-Russell diagram: their mean spectrum, the few
directions in which they scatter most (tangents), and the regression of every label on these. What the tangents leave
out is nearly the same everywhere, so its mean over all clouds serves for each, and coordinates are chosen in which it
is the identity: a star's likelihood is blurred by it once, not once per cloud. One cloud with all tangents is the
linear expert of a bin at the star's own noise; many clouds of few tangents are a posterior over templates. Time grows
with the square of the number of coordinates, so few are kept: those in which clouds differ most at the noise of bright
stars, and those in which spectra change with log g as with no other label.

Clouds are found as those of `moefast.experts.template`, by k-means among the stars of an expert's bin, where labels
count beside components.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefast.experts.template import clouds_of_bins
from moefast.posterior.clouds import GROUPED_BY, cloud_of
from moefast.posterior.further_clouds import BEYOND_LABEL, clouds_beyond, clouds_of_blends
from moefast.posterior.linear import gravity_bins
from moefast.posterior.mixture import SCALE_UNIT

__all__ = ["LEAST_SCATTER", "fit_clouds"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

LEAST_SCATTER = 1e-3
"""Variance within clouds, at the least, in units of the noise of the training set."""
BRIGHT_NOISE = 0.5
"""Standard deviation of the noise of bright stars, in units of that of the training set."""
LEAST_TANGENT = 0.05
"""Mean variance of tangents along a coordinate, in units of what is not known of a bright star, for it to have any."""
N_CHANGES = 300
"""Stars, about, at which changes of spectra with labels are looked at."""
FOREIGN_SHARE = 0.02
"""Share of spectra, before they are looked at, that have no lines: dead fibres, hot stars, galaxies."""
SLOW, LEAST_OF_A_KIND = 15.0, 100
"""km/s; and stars of each kind, slow and fast, that every expert must have for clouds of them to be told apart."""
FAST_SHARE = 0.33
"""Of the clouds that are of fast stars."""
WIDEST_LINE, CONTINUUM_DEGREE = 101, 5
"""Pixels beyond which no line reaches, and degree of a polynomial that no line makes."""


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
    n_coordinates: int | None = None,
    n_gravity_bins: int = 0,
    velocity: F64 | None = None,
    beyond: bool = False,
    n_blends: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
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
    n_coordinates : int, optional
        Coordinates besides those of spectra without lines and of the scale; all r components by default.
    n_gravity_bins : int
        Clouds are so many bins of log g within each expert's bin, instead of `n_clouds` found by k-means; see
        `moefast.posterior.linear`. 0 for k-means.
    velocity : array of shape (n,), km/s, optional
        `FAST_SHARE` of the clouds are of stars that move by more than `SLOW`, and small in velocity, too; where each
        expert has stars of both kinds.
    beyond : bool
        Whether there are clouds of stars that are hotter than all of the training set, too: those of its hot end,
        continued. They belong to the expert of the star from which they are continued.
    n_blends : int
        Clouds of blends, the light of two stars, whose labels are those of the brighter one; see
        `moefast.posterior.further_clouds`.
    seed : int

    Returns
    -------
    dict
        Fields of a `PosteriorMixture`: `directions` (p, n + 2), that of what a spectrum without lines has beside all
        stars and the scale last; `keys`, `tangents`, `gains`, `log_weights`, `labels`, `scatter`, `first`. Behind the
        experts are two more groups: blends, if `blends` says so, and one cloud, a spectrum without lines, which is no
        star; `n_foreign` counts them. `n_fast` counts the clouds of stars that move, the last ones of each expert.

    Raises
    ------
    ValueError
        A bin is empty.
    """
    if n_gravity_bins:
        clouds, first = gravity_bins(labels[:, 0], bins, n_experts, n_gravity_bins)
        n_fast = np.zeros(n_experts, np.int64)
    else:
        clouds, first, n_fast = _by_velocity(z, labels, velocity, bins, n_experts, n_clouds, seed)
    r, t = z.shape[1], min(n_tangents, z.shape[1])
    parts = [cloud_of(z[cloud].astype(np.float64), labels[cloud], t, len(bins)) for cloud in clouds]
    within = np.zeros((r, r))
    for cloud, part in zip(clouds, parts, strict=True):
        within += len(cloud) / len(bins) * part.left
    still = np.ones(len(z), bool)
    if velocity is not None and n_fast.any():
        still = np.abs(velocity) <= SLOW
    if beyond and np.ptp(labels[:, BEYOND_LABEL]) > 0:
        experts = np.repeat(np.arange(n_experts), np.diff(first))
        further, of_expert = clouds_beyond(z[still], labels[still], bins[still], t, seed)
        # Stars that move stay the last of each expert.
        fast = [rank >= stop - n for rank, stop, n in zip(*_ranks(first, n_fast), strict=True)]
        experts = np.concatenate([experts, of_expert])
        order = np.lexsort(([*fast, *np.zeros(len(further), bool)], experts))
        parts = [(parts + further)[i] for i in order]
        first = np.searchsorted(experts[order], np.arange(n_experts + 1))
    blends = clouds_of_blends(z[still], labels[still], t, n_blends, seed) if n_blends else []
    if blends:
        parts += blends
        first = np.append(first, len(parts))
    keys, tangents, gains, log_weights, means, scatter = (
        np.array(column) for column in zip(*(part[:-1] for part in parts), strict=True)
    )
    within += LEAST_SCATTER * np.eye(r)
    told = labels if velocity is None else np.column_stack([labels, velocity])
    forth, keys, tangents = _coordinates(
        keys, tangents, np.exp(log_weights), within, _changes(z, told, bins, n_experts), n_coordinates or r
    )
    directions = (noise_shape[:, None] * basis) @ forth
    own, beside, height = _without_lines(reference, noise_shape, directions)
    none = np.zeros((len(keys), 2))
    arrays = {
        "directions": np.column_stack([directions, beside, SCALE_UNIT * reference]),
        "keys": np.concatenate([keys, none], axis=1),
        "tangents": np.concatenate([tangents, np.zeros((*tangents.shape[:2], 2))], axis=2),
        "gains": gains,
        "log_weights": log_weights,
        "labels": means,
        "scatter": scatter,
    }
    every = labels - labels.mean(0)
    foreign = {
        "keys": np.concatenate([own, [height, 0.0]]),
        "tangents": np.zeros((t, keys.shape[1] + 2)),
        "gains": np.zeros((t, labels.shape[1])),
        "log_weights": np.log(FOREIGN_SHARE),
        "labels": labels.mean(0),
        "scatter": every.T @ every / len(every),
    }
    arrays |= {name: np.concatenate([arrays[name], np.asarray(one)[None]]) for name, one in foreign.items()}
    return {name: np.ascontiguousarray(value, np.float32) for name, value in arrays.items()} | {
        "first": np.array([*first, first[-1] + 1], np.int64),
        "n_foreign": 1 + bool(blends),
        "blends": bool(blends),
        "n_fast": tuple(int(n) for n in n_fast) if n_fast.any() else (),
    }


def _ranks(first: NDArray[np.int64], n_fast: NDArray[np.int64]) -> tuple[NDArray, NDArray, NDArray]:
    """Of each cloud its number, and of its expert the end and how many clouds of stars that move it has."""
    sizes = np.diff(first)
    return np.arange(first[-1]), np.repeat(first[1:], sizes), np.repeat(n_fast, sizes)


def _by_velocity(
    z: F32,
    labels: F64,
    velocity: F64 | None,
    bins: NDArray[np.integer],
    n_experts: int,
    n_clouds: int,
    seed: int,
) -> tuple[list[NDArray[np.intp]], NDArray[np.int64], NDArray[np.int64]]:
    """Stars of each cloud by expert, first clouds, and how many clouds at the end of each expert are of fast stars."""
    places = labels[:, GROUPED_BY]
    fast = np.zeros(len(z), bool) if velocity is None else np.abs(velocity) > SLOW
    counts = [np.bincount(bins[part], minlength=n_experts) for part in (fast, ~fast)]
    if velocity is None or min(count.min() for count in counts) < LEAST_OF_A_KIND:
        clouds, first = clouds_of_bins(z, places, bins, n_experts, n_clouds=n_clouds, seed=seed)
        return clouds, first, np.zeros(n_experts, np.int64)
    parts, firsts = [], []
    for rows in (np.flatnonzero(~fast), np.flatnonzero(fast)):
        where, n_fast = places[rows], round(FAST_SHARE * n_clouds)
        if of_fast := bool(fast[rows[0]]):
            where = np.column_stack([where, velocity[rows]])
        found, first = clouds_of_bins(
            z[rows],
            where,
            bins[rows],
            n_experts,
            n_clouds=n_fast if of_fast else n_clouds - n_fast,
            seed=seed,
        )
        parts.append([rows[cloud] for cloud in found])
        firsts.append(first)
    clouds = [
        cloud
        for k in range(n_experts)
        for part, first in zip(parts, firsts, strict=True)
        for cloud in part[first[k] : first[k + 1]]
    ]
    return clouds, firsts[0] + firsts[1], np.diff(firsts[1])


def _coordinates(
    keys: F64, tangents: F64, share: F64, within: F64, changes: F64, n_coordinates: int
) -> tuple[F64, F64, F64]:
    """Coordinates ζ of components z = F ζ in which clouds are told: F (r, n), and keys and tangents in them.

    Half of them are those in which clouds differ most at the noise of bright stars, the other half those in which
    spectra change most besides with the first label, as with no other one; `changes` (k, l, r) are those with each
    label. What clouds and tangents have in others is scatter within clouds, which is the identity in these coordinates.
    Tangents have only the first of them, those in which they vary.
    """
    r = len(within)
    # In units of what is not known of a bright star within a cloud.
    root = np.linalg.cholesky(within + BRIGHT_NOISE**2 * np.eye(r))
    white = np.linalg.inv(root)
    keys, tangents, changes = keys @ white.T, tangents @ white.T, changes @ white.T
    share = share / share.sum()
    along = np.einsum("m,mta,mtb->ab", share, tangents, tangents, optimize=True)
    n_differing = n_coordinates if n_coordinates >= r else n_coordinates // 2
    axes = _leading((share * keys.T) @ keys + along, n_differing)
    if n_differing < n_coordinates:
        first, others = changes[:, :1], changes[:, 1:]
        known = others @ others.transpose(0, 2, 1) + np.eye(others.shape[1])
        alone = first - np.linalg.solve(known, others @ first.transpose(0, 2, 1)).transpose(0, 2, 1) @ others
        besides = alone[:, 0] - (alone[:, 0] @ axes) @ axes.T
        axes = np.concatenate([axes, _leading(besides.T @ besides, n_coordinates - n_differing)], axis=1)
    turn = _leading(axes.T @ along @ axes, axes.shape[1])
    axes = axes @ turn
    few = np.einsum("ab,ab->b", axes, along @ axes) < LEAST_TANGENT
    in_axes, along_axes = keys @ axes, np.where(few, 0.0, tangents @ axes)
    apart, astray = keys - in_axes @ axes.T, tangents - along_axes @ axes.T
    scatter = white @ within @ white.T + (share * apart.T) @ apart
    scatter += np.einsum("m,mta,mtb->ab", share, astray, astray, optimize=True)
    half = np.linalg.cholesky(scatter)
    # The axes in coordinates where scatter is one; a triangular U keeps tangents in the first of them.
    turned, upper = np.linalg.qr(np.linalg.solve(half, axes))
    return root @ half @ turned, in_axes @ upper.T, along_axes @ upper.T


def _leading(matrix: F64, n: int) -> F64:
    """Eigenvectors of the n largest eigenvalues, (r, n)."""
    return np.linalg.eigh(matrix)[1][:, ::-1][:, :n]


def _changes(z: F32, labels: F64, bins: NDArray[np.integer], n_experts: int) -> F64:
    """Changes of spectra with each label, in units of the scatter of that label, (k, l, r), at k stars of all bins.

    They are derivatives of a polynomial of second degree in the labels.
    """
    spread = labels.std(0)
    q = (labels - labels.mean(0)) / np.where(spread > 0, spread, 1.0)
    count = q.shape[1]
    i, j = np.triu_indices(count)
    parts = []
    for k in range(n_experts):
        y = q[bins == k]
        terms = np.concatenate([np.ones((len(y), 1)), y, y[:, i] * y[:, j]], axis=1)
        of_terms = np.linalg.lstsq(terms, z[bins == k].astype(np.float64), rcond=None)[0][1:]
        of_squares = np.zeros((count, count, z.shape[1]))
        of_squares[i, j] += of_terms[count:]
        of_squares[j, i] += of_terms[count:]
        parts.append(of_terms[:count] + np.tensordot(y[:: max(1, len(q) // N_CHANGES)], of_squares, 1))
    return np.concatenate(parts)


def _without_lines(reference: F64, noise_shape: F64, directions: F64) -> tuple[F64, F64, float]:
    """A spectrum that is all continuum: its coordinates, a direction for what they leave out, and how far along it."""
    x = np.linspace(-1, 1, reference.size)
    from scipy.ndimage import maximum_filter1d, uniform_filter1d

    envelope = uniform_filter1d(maximum_filter1d(reference, WIDEST_LINE), WIDEST_LINE)
    continuum = np.polynomial.Legendre.fit(x, envelope, CONTINUUM_DEGREE)(x)
    white = 1 / np.sqrt(noise_shape)
    apart = continuum - reference
    own = np.linalg.lstsq(directions * white[:, None], apart * white, rcond=None)[0]
    left = apart - directions @ own
    height = float(np.linalg.norm(left * white) / np.sqrt(LEAST_SCATTER))
    return own.astype(np.float64), left / max(height, 1e-12), height
