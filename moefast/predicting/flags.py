"""Why a spectrum is unlike those that a model was fitted on, and which labels lie at an end of the training set's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefast.mixture import Prediction
from moefast.model import Model
from moefast.posterior.mixture import PosteriorMixture
from moefast.spectra.quality import Quality

__all__ = ["EDGE", "SURE", "at_the_edge", "labels_at_the_edge", "unlike", "unlike_reasons"]

SURE = 5.0
"""By how many standard errors χ² must differ to be told."""
EDGE = 0.5
"""Stars within the training set's labels are not pulled nearer to an end than this, in their errors."""
_EDGES = ("log_g", "T_eff", "M_H")
"""Labels that every training set has, well enough known for that."""
_LEAST_STRENGTH = 1e-6


def unlike(result: Prediction, limits: Mapping[str, Any], quality: Quality) -> NDArray[np.bool_]:
    """Rows whose spectra lie beyond what the model was fitted on."""
    reasons = unlike_reasons(result, limits, quality)
    return np.any([beyond for _, _, beyond in reasons.values()], axis=0)


def unlike_reasons(
    result: Prediction, limits: Mapping[str, Any], quality: Quality
) -> dict[str, tuple[NDArray, NDArray, NDArray[np.bool_]]]:
    """Why spectra lie beyond what the model was fitted on.

    Returns
    -------
    dict of str to (array, array, array of bool)
        What is compared ("chi2, largest", "chi2, least", "foreign", "strength", "distance", as far as the model has a
        limit): the number of each row, the limit of each row, and whether the number lies beyond it.
    """
    n = len(result.chi2)
    least, largest = np.full(n, -np.inf), np.full(n, limits["chi2"])
    if "least_chi2" in limits:
        # χ² of few pixels scatters more, and of a handful says nothing.
        spread = SURE * np.sqrt(2.0 / np.maximum(quality.n_good, 1))
        least, largest = np.minimum(limits["least_chi2"], 1 - spread), np.maximum(largest, 1 + spread)
    # Numbers that overflowed to NaN compare false with everything: "not within", never "beyond".
    reasons = {
        "chi2, largest": (result.chi2, largest, ~(result.chi2 <= largest)),
        "chi2, least": (result.chi2, least, result.chi2 < least),
    }
    if result.foreign is not None and "foreign" in limits:
        limit = np.full(n, limits["foreign"])
        reasons["foreign"] = (result.foreign, limit, ~(result.foreign <= limit))
    strength, distance = result.strength, result.distance
    if strength is not None and "strength" in limits:
        limit = np.full(n, limits["strength"])
        reasons["strength"] = (strength, limit, ~(strength >= limit))
    if strength is not None and distance is not None and "distance" in limits:
        table = limits["distance"]
        place = np.log(np.maximum(strength, _LEAST_STRENGTH))
        limit = np.interp(place, table["log_strength"], table["limit"])
        reasons["distance"] = (distance, limit, ~(distance <= limit))
    return reasons


def at_the_edge(model: Model, result: Prediction) -> NDArray[np.bool_]:
    """Rows with a label at an end of the training set's: a star beyond ends there."""
    rows = list(labels_at_the_edge(model, result).values())
    return np.any(rows, axis=0) if rows else np.zeros(len(result.log_g), bool)


def labels_at_the_edge(model: Model, result: Prediction) -> dict[str, NDArray[np.bool_]]:
    """Rows in which each label lies within `EDGE` of its error of an end of the training set; empty for models of log g
    alone.
    """  # noqa: D205
    if (
        not isinstance(model.mixture, PosteriorMixture)
        or result.labels is None
        or result.label_errors is None
    ):
        return {}
    ranges = model.manifest["training"].get("labels", {})
    values = np.column_stack([result.log_g, result.labels])
    errors = np.column_stack([result.log_g_err, result.label_errors])
    found = {}
    for i, name in enumerate(model.mixture.label_names):
        if name in _EDGES and name in ranges:
            low, high = ranges[name]
            found[name] = ~(np.minimum(values[:, i] - low, high - values[:, i]) >= EDGE * errors[:, i])
    return found
