"""The Fisher (Cramér-Rao) bound on log g.

    I = J V⁻¹ Jᵀ (+ P),    CRLB = [I⁻¹]_gg = 1 / (I_gg − I_gn I_nn⁻¹ I_ng),    R²max = 1 − CRLB / Var(log g),

with J the derivatives of the spectrum by the five labels and the varied nuisances, V the variance of the pixels and P
the information of the prior. The bracket is the Schur complement: what is left of the information on log g once the
other parameters must be found, too.

It bounds unbiased estimators only. With P = 12/range² for a uniform label it is the bound of van Trees (1968) for a
normal prior of that variance, which regression towards the mean respects. Nuisances (velocity, reddening,
calibration) keep their prior information in both: nobody takes them as unbounded. The information that the variance
itself carries is left out, as it is in the published curve.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moefast.simulate.emulator import LABELS
from moefast.simulate.forward import ForwardModel

__all__ = ["bounds", "information", "retained"]

F64 = NDArray[np.float64]
LOG_G = LABELS.index("log_g")


def information(
    forward: ForwardModel,
    parameters: dict[str, F64],
    error: NDArray[np.floating],
    sky_shapes: F64 | None = None,
) -> tuple[tuple[str, ...], F64]:
    """Fisher information of the data, without any prior.

    Parameters
    ----------
    forward : ForwardModel
    parameters : dict of str to array of shape (n,)
        True values: labels [K, dex], redshift, ebv [mag], velocity [km/s].
    error : array of shape (n, p)
        1σ of each pixel; a pixel of infinite error counts for nothing.
    sky_shapes : array of shape (n, g, p), optional
        What sky subtraction may leave in each spectrum, in shapes of unit variance.

    Returns
    -------
    names : tuple of str
        The five labels, then the nuisances that vary, coefficients of calibration and of sky residuals last.
    information : array of shape (n, n_names, n_names), float64
        Per unit of each parameter squared.
    """
    names, slopes = forward.derivatives(parameters)
    shapes = forward.calibration_shapes
    if shapes is not None:
        flux = forward.flux(parameters).astype(float)
        slopes = np.concatenate([slopes, flux[:, None] * shapes], axis=1)
        names = (*names, *(f"calibration_{k + 1}" for k in range(len(shapes))))
    if sky_shapes is not None:
        slopes = np.concatenate([slopes, sky_shapes], axis=1)
        names = (*names, *(f"sky_{k + 1}" for k in range(sky_shapes.shape[1])))
    weighted = slopes / np.asarray(error, dtype=float)[:, None] ** 2
    return names, weighted @ slopes.transpose(0, 2, 1)


def prior_information(forward: ForwardModel, names: tuple[str, ...], *, labels: bool) -> F64:
    """Diagonal P of the prior information, shape (n_names,).

    Parameters
    ----------
    forward : ForwardModel
    names : tuple of str
        From `information`.
    labels : bool
        Whether the labels have a prior, too; nuisances always do. A label that does not vary is known: its
        information is infinite.
    """
    result = np.zeros(len(names))
    for i, name in enumerate(names):
        if name == "velocity":
            result[i] = 1.0 / forward.velocity_scatter**2
        elif name.startswith(("calibration", "sky")):
            result[i] = 1.0
        elif name not in forward.uniform:
            result[i] = np.inf
        elif labels or name not in LABELS:
            low, high = forward.uniform[name]
            result[i] = 12.0 / (high - low) ** 2
    return result


def bounds(information: F64, prior: F64) -> F64:
    """CRLB of log g, [(I + P)⁻¹]_gg in dex², shape (n,); infinite where the data do not determine it."""
    known = np.isinf(prior)
    if known[LOG_G]:
        return np.zeros(len(information))
    kept = np.flatnonzero(~known)
    matrices = information[:, kept[:, None], kept] + np.diag(prior[kept])
    place = int(np.flatnonzero(kept == LOG_G)[0])
    return 1.0 / _schur(matrices, place, [i for i in range(len(kept)) if i != place])


def retained(information: F64, names: tuple[str, ...], prior: F64, order: tuple[str, ...]) -> F64:
    """Share of the information on log g that is left when more and more parameters are free ("Schur decay").

    Parameters
    ----------
    information, names, prior
        From `information` and `prior_information`.
    order : tuple of str
        Parameters in the order in which they are set free.

    Returns
    -------
    array of shape (n, len(order) + 1)
        1 in the first column, (I_gg − I_gn I_nn⁻¹ I_ng) / I_gg with the first k of `order` free in the others.
    """
    matrices = information + np.diag(np.where(np.isinf(prior), 0.0, prior))
    alone = matrices[:, LOG_G, LOG_G]
    free = [names.index(name) for name in order]
    columns = [_schur(matrices, LOG_G, free[:k]) / alone for k in range(len(free) + 1)]
    return np.stack(columns, axis=1)


def _schur(matrices: F64, place: int, others: list[int]) -> F64:
    """M_aa − M_ab M_bb⁻¹ M_ba, never below 0, for stacks of matrices scaled to a unit diagonal first."""
    scale = np.sqrt(np.maximum(np.diagonal(matrices, axis1=1, axis2=2), 1e-300))
    scaled = matrices / (scale[:, :, None] * scale[:, None, :])
    b = np.array(others, dtype=int)
    if not len(b):
        return matrices[:, place, place]
    cross = scaled[:, b, place]
    # A ridge at the level of rounding: two labels may leave the same trace in a spectrum of no lines.
    block = scaled[:, b[:, None], b] + 1e-12 * np.eye(len(b))
    rest = scaled[:, place, place] - np.einsum(
        "ni,ni->n", cross, np.linalg.solve(block, cross[..., None])[..., 0]
    )
    return np.maximum(rest, 1e-12) * scale[:, place] ** 2
