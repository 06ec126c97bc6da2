"""Labels of stars whose velocities are not known: averaged over the posterior of the velocity.

Design: p(labels | x) = ∫ p(labels | x, v) p(v | x) dv as a sum over a few velocities of each star, most often one or
three. At each of them the star is put to rest, resampled from the pixels that were measured, and predicted like any
other by whatever engine; means, variances and correlations of the sum follow from those of its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
from numpy.typing import NDArray

from moefast.mixture import Prediction
from moefast.posterior.velocities import AtRest, FittedVelocities, VelocityFit
from moefast.spectra.quality import Flag, Quality

__all__ = ["averaged", "predict_moving"]

Predict = Callable[[NDArray, NDArray, NDArray[np.bool_]], tuple[Prediction, Quality]]


def predict_moving(
    fit: VelocityFit, predict: Predict, n: int, at_rest: AtRest, given: tuple[NDArray, NDArray] | None = None
) -> tuple[Prediction, Quality, FittedVelocities]:
    """Velocities of n stars and, averaged over their posterior, everything else.

    Parameters
    ----------
    fit : VelocityFit
    predict : callable
        Predictions and quality of flux, error and mask.
    n : int
    at_rest, given
        See `VelocityFit.fit`.

    Returns
    -------
    Prediction, Quality, FittedVelocities
        Of quality, the flag tells velocities that are uncertain.
    """
    found = fit.fit(n, at_rest, given)
    first, quality = predict(*at_rest(found.nodes[:, 0], np.arange(n)))
    parts = [(np.arange(n), first)]
    for k in range(1, found.nodes.shape[1]):
        rows = np.flatnonzero(found.weights[:, k] > 0)
        if len(rows):
            parts.append((rows, predict(*at_rest(found.nodes[rows, k], rows))[0]))
    weights = [found.weights[rows, k] for k, (rows, _) in enumerate(parts)]
    told = found.uncertain & (quality.flag & np.uint32(Flag.NO_DATA) == 0)
    flag = quality.flag | np.where(told, np.uint32(Flag.VELOCITY_UNCERTAIN), np.uint32(0))
    return averaged(parts, weights), replace(quality, flag=flag), found


def averaged(parts: list[tuple[NDArray[np.intp], Prediction]], weights: list[NDArray]) -> Prediction:
    """The mixture of predictions for the same stars.

    Parameters
    ----------
    parts : list of (rows, Prediction)
        The first is of all stars, in order; the others of some.
    weights : list of array
        Of each row of each part; those of a star add up to 1.
    """
    first = parts[0][1]
    several = np.zeros(len(first.log_g), bool)
    for rows, _ in parts[1:]:
        several[rows] = True
    if not several.any():
        return first
    sums = {name: np.zeros_like(a, np.float64) for name, a in _arrays(first).items()}
    pairs = zip(parts, weights, strict=True)
    terms = [(rows, weight, _moments(part)) for (rows, part), weight in pairs]
    for rows, weight, moments in terms:
        for name, values in moments.items():
            sums[name][rows] += weight.reshape(-1, *(1,) * (values.ndim - 1)) * values
    mixed = _from_moments(sums)
    out = {}
    for name, values in _arrays(first).items():
        # Stars with one velocity keep every bit.
        here = several.reshape(-1, *(1,) * (values.ndim - 1))
        out[name] = np.where(here, mixed[name], values).astype(values.dtype)
    return replace(first, **out)


def _arrays(prediction: Prediction) -> dict[str, NDArray]:
    named = {one.name: getattr(prediction, one.name) for one in fields(prediction)}
    return {name: values for name, values in named.items() if values is not None}


_SPREADS = {"log_g_err": "log_g", "log_g_err_raw": "log_g", "label_errors": "labels"}
"""Standard deviations, and the means that they are around."""


def _moments(prediction: Prediction) -> dict[str, NDArray]:
    """Second moments in place of standard deviations and of correlations with log g; all others as they are."""
    out = _arrays(prediction)
    values = dict(out)
    for spread, mean in _SPREADS.items():
        if spread in out:
            out[spread] = values[spread] ** 2 + values[mean] ** 2
    if "label_correlations" in out:
        log_g, error = values["log_g"][:, None], values["log_g_err"][:, None]
        with_log_g = values["label_correlations"] * values["label_errors"] * error
        out["label_correlations"] = with_log_g + values["labels"] * log_g
    return out


def _from_moments(sums: dict[str, NDArray]) -> dict[str, NDArray]:
    """The inverse of `_moments`."""
    out = dict(sums)
    for spread, mean in _SPREADS.items():
        if spread in out:
            out[spread] = np.sqrt(np.maximum(sums[spread] - sums[mean] ** 2, 0))
    if "label_correlations" in out:
        covariance = sums["label_correlations"] - sums["labels"] * sums["log_g"][:, None]
        scale = out["label_errors"] * out["log_g_err"][:, None]
        out["label_correlations"] = np.clip(covariance / np.maximum(scale, 1e-12), -1, 1)
    return out
