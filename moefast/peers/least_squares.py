"""Labels of one star by least squares over all of its pixels, with the star's own noise and gaps and a free scale.

    χ²(s, ℓ) = Σ_j a_j (x_j − s (A h(ℓ))_j)²,    a_j = 1/(σ_j² + scatter_j²), 0 at a bad pixel,
    minimised over s and over ℓ within the label box,    covariance = (JᵀJ)⁻¹ with J of the weighted residuals.

Design: a model of spectra is linear in a few dozen columns A, whatever h is. With RᵀR = Aᵀ diag(a) A and
Rᵀz = Aᵀ diag(a) x, χ² is |z − s R h(ℓ)|² + ρ²: the same minimum to rounding, from as many residuals as there are
columns instead of one per pixel, so that an iteration costs what the labels cost. The minimiser is SciPy's trust-region
reflective method with analytic derivatives, from several starts within the box; the best of them is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

__all__ = ["STARTS", "LabelFit", "SpectralModel", "fit_labels"]

F64 = NDArray[np.float64]

STARTS = ((0.3, 0.25, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5, 0.5), (0.7, 0.75, 0.5, 0.5, 0.5))
"""Where fits begin, as fractions of the label box: a cool giant, its middle, a warm dwarf."""
TOLERANCE = 1e-5
"""Relative change of χ² (without ρ²) and of the labels at which a fit ends."""
RANK = 1e-13
"""Eigenvalues of AᵀaA below this share of the largest are of directions that the good pixels do not show."""


class SpectralModel(Protocol):
    """Spectra as functions of the five labels: columns @ coefficients(labels), to a scale.

    Attributes
    ----------
    wave : array of shape (p,), Å
    columns : array of shape (p, q)
    scatter2 : array of shape (p,) or None
        Variance of the model's own error at median flux 1; None if it has none.
    low, high : arrays of shape (5,)
        The label box [K, dex].
    """

    @property
    def wave(self) -> F64:
        """See above."""
        ...

    @property
    def columns(self) -> F64:
        """See above."""
        ...

    @property
    def scatter2(self) -> F64 | None:
        """See above."""
        ...

    @property
    def low(self) -> F64:
        """See above."""
        ...

    @property
    def high(self) -> F64:
        """See above."""
        ...

    def coefficients(self, labels: F64) -> F64:
        """At labels (5,): shape (q,)."""
        ...

    def derivatives(self, labels: F64) -> F64:
        """Of the coefficients by the labels: shape (5, q)."""
        ...


@dataclass(frozen=True)
class LabelFit:
    """Labels of a star.

    Attributes
    ----------
    labels : array of shape (5,)
        T_eff [K], log g, [M/H], [α/M], [C/M] [dex]; NaN where nothing could be fitted.
    errors : array of shape (5,)
        1σ from the covariance; NaN where the star does not determine a label.
    chi2 : float
        Of all good pixels.
    """

    labels: F64
    errors: F64
    chi2: float


_NONE = LabelFit(np.full(5, np.nan), np.full(5, np.nan), np.nan)


def fit_labels(
    model: SpectralModel,
    flux: NDArray[np.floating],
    error: NDArray[np.floating],
    good: NDArray[np.bool_] | None = None,
) -> LabelFit:
    """Fit the labels of one spectrum.

    Parameters
    ----------
    model : SpectralModel
    flux, error : arrays of shape (p,)
        Flux and its 1σ error, in any unit.
    good : array of shape (p,), bool, optional
        Pixels to use; all if absent.
    """
    x, sigma, columns = np.asarray(flux, float), np.asarray(error, float), model.columns
    scatter2 = model.scatter2
    if good is not None:
        x, sigma, columns = x[good], sigma[good], columns[good]
        scatter2 = None if scatter2 is None else scatter2[good]
    if not len(x):
        return _NONE
    level = max(float(np.median(x)), float(np.median(sigma)))
    x, variance = x / level, (sigma / level) ** 2
    weight = 1 / np.sqrt(variance if scatter2 is None else variance + scatter2)
    r, z, rest2 = _reduced(columns * weight[:, None], x * weight)
    width = model.high - model.low

    def residuals(parameters: F64) -> F64:
        predicted: F64 = parameters[0] * (r @ model.coefficients(model.low + width * parameters[1:])) - z
        return predicted

    def jacobian(parameters: F64) -> F64:
        labels = model.low + width * parameters[1:]
        by_labels = parameters[0] * (model.derivatives(labels) * width[:, None])
        slopes: F64 = r @ np.column_stack([model.coefficients(labels), by_labels.T])
        return slopes

    bounds = np.array([-np.inf, *np.zeros(5)]), np.array([np.inf, *np.ones(5)])
    best = None
    for start in STARTS:
        shape = r @ model.coefficients(model.low + width * np.array(start))
        scale = float(shape @ z) / max(float(shape @ shape), 1e-300)
        found = least_squares(
            residuals, [scale, *start], jacobian, bounds, ftol=TOLERANCE, xtol=TOLERANCE, gtol=TOLERANCE
        )
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    errors = _errors(best.jac) * width
    return LabelFit(model.low + width * best.x[1:], errors, 2 * float(best.cost) + rest2)


def _reduced(columns: F64, x: F64) -> tuple[F64, F64, float]:
    """R (k, q), z (k,) and ρ² with |x − columns h|² = |z − R h|² + ρ² for every h; k is the rank of the columns."""
    values, vectors = np.linalg.eigh(columns.T @ columns)
    kept = values > RANK * values[-1]
    root = np.sqrt(values[kept])
    z = (vectors[:, kept].T @ (columns.T @ x)) / root
    return root[:, None] * vectors[:, kept].T, z, max(float(x @ x - z @ z), 0.0)


def _errors(jacobian: F64) -> F64:
    """Square roots of the diagonal of (JᵀJ)⁻¹ without the scale's; NaN where it is singular."""
    scale = np.sqrt((jacobian**2).sum(0))
    if not (scale > 0).all():
        return np.full(jacobian.shape[1] - 1, np.nan)
    values, vectors = np.linalg.eigh((jacobian / scale).T @ (jacobian / scale))
    if values[0] <= 1e-12 * values[-1]:
        return np.full(jacobian.shape[1] - 1, np.nan)
    covariance = ((vectors**2) / values).sum(1) / scale**2
    errors: F64 = np.sqrt(covariance[1:])
    return errors
