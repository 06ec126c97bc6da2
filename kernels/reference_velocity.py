"""The posterior of velocities in plain NumPy and float64: the contract of `moefast.kernels.velocity`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["velocity_conclusion_reference", "velocity_evidence_reference", "velocity_step_reference"]

F64 = NDArray[np.float64]


def velocity_evidence_reference(
    flux: F64, error: F64, continuum: F64, precision: F64, lines: F64, log_weights: F64
) -> F64:
    """Ln E(v) (n_v,) of one star.

    Parameters
    ----------
    flux, error : array of shape (k,)
        Bad pixels have an infinite error.
    continuum : array of shape (c, k)
    precision : array of shape (c,)
    lines : array of shape (n_v, m, k)
        ℓ_j at every velocity.
    log_weights : array of shape (m,)
    """
    weight = 1 / error**2
    solved = np.linalg.solve((continuum * weight) @ continuum.T, continuum @ (weight * flux))
    scale = max(solved[0], 1 / np.sqrt(np.sum(weight * continuum[0] ** 2)))
    known, apart = scale**2 * weight, flux / scale - continuum[0]
    matrix = (continuum * known) @ continuum.T + np.diag(precision)
    left = known * (apart - np.linalg.solve(matrix, continuum @ (known * apart)) @ continuum)
    gain = lines @ left
    across = (lines * known) @ continuum.T
    energy = np.einsum("vmk,k,vmk->vm", lines, known, lines)
    energy -= np.einsum("vmc,cd,vmd->vm", across, np.linalg.inv(matrix), across)
    total = gain - energy / 2 + log_weights
    best = total.max(1)
    return best + np.log(np.exp(total - best[:, None]).sum(1))


def velocity_step_reference(
    flux: F64,
    error: F64,
    reference: F64,
    directions: F64,
    precision: F64,
    pull: F64,
    of_reference: F64,
    of_directions: F64,
) -> tuple[float, float]:
    """Velocity and its 1σ of one star, by one Gaussian over the space, the nuisances and the velocity together.

    Parameters
    ----------
    flux, error : array of shape (p,)
        Bad pixels have an infinite error.
    reference : array of shape (p,)
    directions, of_directions : array of shape (p, n + q)
    precision, pull : array of shape (n + q, n + q), (n + q,)
    of_reference : array of shape (p,)
    """
    weight = 1 / error**2
    curvature, overlap = weight @ reference**2, weight @ (flux * reference)
    scale = max(overlap, np.sqrt(curvature)) / curvature
    known, apart = scale**2 * weight, flux / scale - reference
    width = directions.shape[1]
    best = np.linalg.solve(
        (directions.T * known) @ directions + precision, directions.T @ (known * apart) + pull
    )
    # The change with velocity is that of the best point; then one more column.
    design = np.column_stack([directions, of_reference + of_directions @ best])
    prior = np.zeros((width + 1, width + 1))
    prior[:width, :width] = precision
    covariance = np.linalg.inv((design.T * known) @ design + prior)
    answer = covariance @ (design.T @ (known * apart) + np.append(pull, 0.0))
    return float(answer[-1]), float(np.sqrt(covariance[-1, -1]))


def velocity_conclusion_reference(
    fine: F64, log_p: F64, velocity: float, sigma: float, near: float, near_sigmas: float, wider: float
) -> tuple[float, float, float]:
    """Velocity, 1σ and the probability of all other velocities of one star.

    Parameters
    ----------
    fine, log_p : array of shape (f,)
        Velocities and the logarithm of their probabilities.
    velocity, sigma : float
        Of the step.
    near, near_sigmas, wider : float
        See `moefast.kernels.velocity.velocity_conclusion`.
    """
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    here = np.where(np.abs(fine - velocity) < max(near, near_sigmas * sigma), p, 0)
    here /= max(here.sum(), 1e-300)
    mean = float(here @ fine)
    spread = float(np.sqrt(here @ (fine - mean) ** 2))
    if spread > wider * sigma:
        velocity, sigma = mean, spread
    return velocity, sigma, float(p[np.abs(fine - velocity) >= max(near, near_sigmas * sigma)].sum())
