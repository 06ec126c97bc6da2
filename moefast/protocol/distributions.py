"""What pictures of an evaluation need: densities, profiles of residuals, calibration of errors, use of the experts.

Design: small tables that go into the report, so that every figure is a function of the report alone and can be drawn
again from its JSON. Predictions come filled (`moefast.core.metrics.fill_missing`), so no star is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moefast.core import metrics

__all__ = ["N_CELLS", "N_STEPS", "calibration", "density", "residual_profile", "routing_by_group"]

N_CELLS = 40
"""Cells of the density of predicted against true log g, each way."""

N_STEPS = 12
"""Steps of equal numbers of stars along a label."""

N_ERROR_STEPS = 10
_LEVELS = (*(round(0.05 * k, 2) for k in range(1, 20)), 0.99)
_ONE_SIGMA = 0.682689492137

F64 = NDArray[np.float64]


def density(y: F64, yhat: F64) -> dict[str, Any]:
    """Number of stars per cell of (true, predicted) log g [dex].

    Returns
    -------
    dict
        edges (N_CELLS + 1 numbers, the same for both axes: the range of the labels and 8 % of it on either side),
        cells (lists of three: index of true, index of predicted, number of stars; empty cells are left out),
        n_beyond (predictions beyond the edges, counted in the outermost cells).
    """
    if not y.size:
        return {"edges": [], "cells": [], "n_beyond": 0}
    low, high = float(y.min()), float(y.max())
    margin = max(0.25, 0.08 * (high - low))
    edges = np.linspace(low - margin, high + margin, N_CELLS + 1)
    inside = np.clip(yhat, edges[0], edges[-1])
    counts, _, _ = np.histogram2d(y, inside, bins=[edges, edges])
    i, k = np.nonzero(counts)
    cells = np.column_stack([i, k, counts[i, k]]).astype(int)
    return {"edges": edges, "cells": cells.tolist(), "n_beyond": int((inside != yhat).sum())}


def residual_profile(values: F64, residual: F64) -> list[dict[str, Any]]:
    """Residuals ŷ − y [dex] along a label or an SNR, in steps of equal numbers of stars.

    Parameters
    ----------
    values : array of shape (n,)
        Values that are not finite belong to no step.
    residual : array of shape (n,)

    Returns
    -------
    list of dict
        range, centre (median of `values`), n, mean, and the quantiles p16, median, p84 of the residuals; steps
        without stars are left out.
    """
    known = np.isfinite(values)
    values, residual = values[known], residual[known]
    if not values.size:
        return []
    edges = np.quantile(values, np.arange(N_STEPS + 1) / N_STEPS)
    step = np.searchsorted(edges[1:-1], values, side="right")
    rows = []
    for k in range(N_STEPS):
        members = step == k
        if not members.any():
            continue
        p16, median, p84 = np.quantile(residual[members], [0.16, 0.5, 0.84])
        rows.append(
            {
                "range": edges[k : k + 2],
                "centre": np.median(values[members]),
                "n": int(members.sum()),
                "mean": residual[members].mean(),
                "p16": p16,
                "median": median,
                "p84": p84,
            }
        )
    return rows


def calibration(y: F64, yhat: F64, err: F64) -> dict[str, Any] | None:
    """Whether claimed errors are as large as those made.

    Parameters
    ----------
    y, yhat, err : array of shape (n,)
        True log g, prediction (NaN where there is none) and claimed 1σ [dex].

    Returns
    -------
    dict or None
        levels (expected and found share of stars within z·err); scale, the factor that would make the errors cover
        68.27 % of the stars; pull_mean and pull_std of (ŷ − y)/err; by_error, in ten steps of the claimed error: n,
        err (root mean square of the claims), rmse; n_undefined. None if no star has both a prediction and an error.
    """
    defined = np.isfinite(yhat) & np.isfinite(err) & (err > 0)
    if not defined.any():
        return None
    covered = metrics.coverage(y, yhat, err, levels=_LEVELS)
    residual, sigma = (yhat - y)[defined], err[defined]
    pull = residual / sigma
    order = np.argsort(sigma, kind="stable")
    by_error = [
        {
            "n": int(part.size),
            "err": np.sqrt((sigma[part] ** 2).mean()),
            "rmse": np.sqrt((residual[part] ** 2).mean()),
        }
        for part in np.array_split(order, N_ERROR_STEPS)
        if part.size
    ]
    return {
        "levels": covered["levels"],
        "n_undefined": covered["n_undefined"],
        "scale": np.quantile(np.abs(pull), _ONE_SIGMA),
        "pull_mean": pull.mean(),
        "pull_std": pull.std(),
        "by_error": by_error,
    }


def routing_by_group(
    gate: F64, true_bin: ArrayLike | None, members: Sequence[tuple[str, NDArray[np.bool_]]]
) -> list[dict[str, Any]]:
    """How a gate weighs its experts in each group of stars.

    Parameters
    ----------
    gate : array of shape (n, n_experts)
        Weights; rows that are not finite are left out.
    true_bin : array of shape (n,), int, or None
        The expert whose bin holds the star; without it there is no accuracy.
    members : sequence of (name, array of shape (n,), bool)

    Returns
    -------
    list of dict
        name, n, mean_weight (n_experts numbers), mean_largest_weight, accuracy; None where a group is empty.
    """
    routed = np.isfinite(gate).all(axis=1)
    rows = []
    for name, chosen in members:
        here = gate[chosen & routed]
        row: dict[str, Any] = {"name": name, "n": len(here)}
        row["mean_weight"] = here.mean(axis=0) if len(here) else None
        row["mean_largest_weight"] = here.max(axis=1).mean() if len(here) else None
        row["accuracy"] = None
        if true_bin is not None and len(here):
            row["accuracy"] = (here.argmax(axis=1) == np.asarray(true_bin)[chosen & routed]).mean()
        rows.append(row)
    return rows
