"""What pictures of an evaluation need: densities, profiles of residuals, calibration of errors, use of the experts.

Design: small tables that go into the report (types in `report_parts.py`), so that every figure is a function of the
report alone and can be drawn again from its JSON. Predictions come filled (`moefast.core.metrics.fill_missing`), so no
star is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moefast.core import metrics
from moefast.protocol.report_parts import (
    CalibrationLevel,
    ClaimedErrors,
    Density,
    ErrorCalibration,
    ErrorCoverage,
    ErrorsOfGroup,
    Giants,
    GiantsPart,
    GiantsShare,
    Kiel,
    ResidualStep,
    RoutingOfGroup,
)

__all__ = [
    "GIANTS_BELOW",
    "KIEL_CELLS",
    "N_CELLS",
    "N_STEPS",
    "calibration",
    "density",
    "error_by_group",
    "error_coverage",
    "giants_and_dwarfs",
    "kiel",
    "residual_profile",
    "routing_by_group",
]

N_CELLS = 40
"""Cells of the density of predicted against true log g, each way."""

N_STEPS = 12
"""Steps of equal numbers of stars along a label."""

KIEL_CELLS = (14, 12)
"""Cells of the Kiel diagram in T_eff and log g."""

GIANTS_BELOW = 3.5
"""log g [dex] below which a star counts as a giant."""

N_ERROR_STEPS = 10
_LEVELS = (*(round(0.05 * k, 2) for k in range(1, 20)), 0.99)
_ONE_SIGMA = 0.682689492137

F64 = NDArray[np.float64]


def density(y: F64, yhat: F64) -> Density:
    """Number of stars per cell of (true, predicted) log g [dex], N_CELLS each way."""
    if not y.size:
        return Density(edges=(), cells=(), n_beyond=0)
    low, high = float(y.min()), float(y.max())
    margin = max(0.25, 0.08 * (high - low))
    edges = np.linspace(low - margin, high + margin, N_CELLS + 1)
    inside = np.clip(yhat, edges[0], edges[-1])
    counts, _, _ = np.histogram2d(y, inside, bins=[edges, edges])
    i, k = np.nonzero(counts)
    cells = zip(i.tolist(), k.tolist(), counts[i, k].astype(int).tolist(), strict=True)
    return Density(edges=tuple(edges), cells=tuple(cells), n_beyond=int((inside != yhat).sum()))


def residual_profile(values: F64, residual: F64) -> tuple[ResidualStep, ...]:
    """Residuals ŷ − y [dex] along a label or an SNR, in steps of equal numbers of stars.

    Parameters
    ----------
    values : array of shape (n,)
        Values that are not finite belong to no step.
    residual : array of shape (n,)

    Returns
    -------
    tuple of ResidualStep
        Steps without stars are left out.
    """
    known = np.isfinite(values)
    values, residual = values[known], residual[known]
    if not values.size:
        return ()
    edges = np.quantile(values, np.arange(N_STEPS + 1) / N_STEPS)
    step = np.searchsorted(edges[1:-1], values, side="right")
    rows = []
    for k in range(N_STEPS):
        members = step == k
        if not members.any():
            continue
        p16, median, p84 = np.quantile(residual[members], [0.16, 0.5, 0.84])
        rows.append(
            ResidualStep(
                range=(edges[k], edges[k + 1]),
                centre=float(np.median(values[members])),
                n=int(members.sum()),
                mean=residual[members].mean(),
                p16=p16,
                median=median,
                p84=p84,
            )
        )
    return tuple(rows)


def error_coverage(
    y: F64, yhat: F64, err: F64, levels: Sequence[float] = metrics.COVERAGE_LEVELS
) -> ErrorCoverage:
    """`moefast.core.metrics.coverage` as it stands in a report."""
    found = metrics.coverage(y, yhat, err, levels=levels)
    return ErrorCoverage(
        n=found["n"],
        n_undefined=found["n_undefined"],
        levels=tuple(CalibrationLevel(**row) for row in found["levels"]),
    )


def calibration(y: F64, yhat: F64, err: F64) -> ErrorCalibration | None:
    """Whether claimed errors are as large as those made.

    Parameters
    ----------
    y, yhat, err : array of shape (n,)
        True log g, prediction (NaN where there is none) and claimed 1σ [dex].

    Returns
    -------
    ErrorCalibration or None
        None if no star has both a prediction and an error.
    """
    defined = np.isfinite(yhat) & np.isfinite(err) & (err > 0)
    if not defined.any():
        return None
    covered = error_coverage(y, yhat, err, _LEVELS)
    residual, sigma = (yhat - y)[defined], err[defined]
    pull = residual / sigma
    order = np.argsort(sigma, kind="stable")
    by_error = tuple(
        ClaimedErrors(
            n=int(part.size),
            err=np.sqrt((sigma[part] ** 2).mean()),
            rmse=np.sqrt((residual[part] ** 2).mean()),
        )
        for part in np.array_split(order, N_ERROR_STEPS)
        if part.size
    )
    return ErrorCalibration(
        levels=covered.levels,
        n_undefined=covered.n_undefined,
        scale=float(np.quantile(np.abs(pull), _ONE_SIGMA)),
        pull_mean=pull.mean(),
        pull_std=pull.std(),
        by_error=by_error,
    )


def routing_by_group(
    gate: F64, true_bin: ArrayLike | None, members: Sequence[tuple[str, NDArray[np.bool_]]]
) -> tuple[RoutingOfGroup, ...]:
    """How a gate weighs its experts in each group of stars.

    Parameters
    ----------
    gate : array of shape (n, n_experts)
        Weights; rows that are not finite are left out.
    true_bin : array of shape (n,), int, or None
        The expert whose bin holds the star; without it there is no accuracy.
    members : sequence of (name, array of shape (n,), bool)
    """
    routed = np.isfinite(gate).all(axis=1)
    rows = []
    for name, chosen in members:
        here = gate[chosen & routed]
        accuracy = None
        if true_bin is not None and len(here):
            accuracy = (here.argmax(axis=1) == np.asarray(true_bin)[chosen & routed]).mean()
        rows.append(
            RoutingOfGroup(
                name=name,
                n=len(here),
                mean_weight=tuple(here.mean(axis=0)) if len(here) else None,
                mean_largest_weight=here.max(axis=1).mean() if len(here) else None,
                accuracy=accuracy,
            )
        )
    return tuple(rows)


def kiel(t_eff: F64, y: F64, yhat: F64) -> Kiel:
    """Bias and scatter of log g per cell of true T_eff and true log g.

    Parameters
    ----------
    t_eff, y, yhat : array of shape (n,)
        K, dex, dex.
    """
    if not y.size:
        return Kiel(t_eff=(), log_g=(), cells=())
    edges = [
        np.linspace(values.min(), values.max() if np.ptp(values) else values.min() + 1, n + 1)
        for values, n in zip((t_eff, y), KIEL_CELLS, strict=True)
    ]
    i, k = (
        np.clip(np.searchsorted(e, values, side="right") - 1, 0, n - 1)
        for e, values, n in zip(edges, (t_eff, y), KIEL_CELLS, strict=True)
    )
    cell, residual = i * KIEL_CELLS[1] + k, yhat - y
    n = KIEL_CELLS[0] * KIEL_CELLS[1]
    count, total, squares = (np.bincount(cell, w, n) for w in (None, residual, residual**2))
    cells = tuple(
        (*divmod(int(c), KIEL_CELLS[1]), int(count[c]), total[c] / count[c], np.sqrt(squares[c] / count[c]))
        for c in np.flatnonzero(count)
    )
    return Kiel(t_eff=tuple(edges[0]), log_g=tuple(edges[1]), cells=cells)


def giants_and_dwarfs(
    y: F64, yhat: F64, members: Sequence[tuple[str, NDArray[np.bool_]]], centres: Sequence[float | None]
) -> Giants:
    """How well giants are told from dwarfs, in each group of stars.

    Parameters
    ----------
    y, yhat : array of shape (n,)
    members : sequence of (name, array of shape (n,), bool)
    centres : sequence of float or None
        Signal-to-noise ratio of each group.
    """
    parts = []
    for name, side in (("giants", y < GIANTS_BELOW), ("dwarfs", y >= GIANTS_BELOW)):
        groups = []
        for (group, chosen), centre in zip(members, centres, strict=True):
            here = chosen & side
            residual = yhat[here] - y[here]
            right = (yhat[here] < GIANTS_BELOW) == (name == "giants")
            groups.append(
                GiantsShare(
                    name=group,
                    centre=centre,
                    n=int(here.sum()),
                    bias=residual.mean() if here.any() else None,
                    rmse=np.sqrt((residual**2).mean()) if here.any() else None,
                    right=right.mean() if here.any() else None,
                )
            )
        parts.append(GiantsPart(name=name, groups=tuple(groups)))
    return Giants(below=GIANTS_BELOW, parts=tuple(parts))


def error_by_group(
    y: F64,
    yhat: F64,
    err: F64 | None,
    members: Sequence[tuple[str, NDArray[np.bool_]]],
    centres: Sequence[float | None],
) -> tuple[ErrorsOfGroup, ...]:
    """Errors that are made and errors that are claimed, in each group of stars."""
    rows = []
    for (name, chosen), centre in zip(members, centres, strict=True):
        residual = yhat[chosen] - y[chosen]
        claimed = np.empty(0) if err is None else err[chosen]
        claimed = claimed[np.isfinite(claimed) & (claimed > 0)]
        p16, median, p84 = np.quantile(claimed, [0.16, 0.5, 0.84]) if claimed.size else (None,) * 3
        rows.append(
            ErrorsOfGroup(
                name=name,
                centre=centre,
                n=int(chosen.sum()),
                rmse=np.sqrt((residual**2).mean()) if residual.size else None,
                rms=np.sqrt((claimed**2).mean()) if claimed.size else None,
                p16=p16,
                median=median,
                p84=p84,
            )
        )
    return tuple(rows)
