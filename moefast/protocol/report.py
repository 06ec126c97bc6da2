"""The frozen protocol as one report.

Design: every model enters by the same door, `evaluate_predictions`, which needs predictions and labels only
and knows nothing of models or files. The report is a pure function of its arguments: values are rounded to
ten significant digits (and to zero below 1e-12), because the last bits of a matrix product depend on the
number of threads, and what does not exist is null (NaN is not JSON). Nothing measured with a clock is in it: the same
model on the same stars gives the same bytes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moefast.core import metrics
from moefast.core.errors import LabelError
from moefast.core.grids import METAL_POOR, PHYSICAL_GRID, SNR_NORM_EDGES, Grid
from moefast.core.groups import N_OCTILES
from moefast.core.progress import RowProgress
from moefast.core.records import as_entries
from moefast.protocol import distributions
from moefast.protocol.comparisons import Comparisons, compared
from moefast.protocol.group_scores import Bootstrap, MeasuredStars
from moefast.protocol.report_parts import GridEdges, MeasuredSet, Protocol, Report, Routing

__all__ = ["SCHEMA_VERSION", "DataSet", "Predictions", "Stars", "evaluate_predictions"]

SCHEMA_VERSION = 2

_SIGNIFICANT_DIGITS = 10
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Stars:
    """Labelled stars.

    Attributes
    ----------
    log_g : array of shape (n,)
        True log g [dex].
    t_eff, m_h : array of shape (n,)
        True T_eff [K] and [M/H] [dex]; they define the bins (edge-clamped) and the covered part.
    snr_norm, snr_median : array of shape (n,)
        ‖flux‖₂/‖error‖₂ and median(flux/error); a value that is not finite leaves the star out of the groups by that
        SNR, and only there, and is counted.
    """

    log_g: ArrayLike
    t_eff: ArrayLike
    m_h: ArrayLike
    snr_norm: ArrayLike
    snr_median: ArrayLike


@dataclass(frozen=True)
class Predictions:
    """What a model says of the stars.

    Attributes
    ----------
    log_g : array of shape (n,)
        Predicted log g [dex]. One that is not finite counts as the mean label of the whole set, in every group, and is
        reported.
    err : array of shape (n,), or None
        Claimed 1σ error [dex].
    weights : array of shape (n, n_experts), or None
        Gate weights, for the routing summary.
    expert_grid : Grid or None
        Grid whose bins are the experts; gives the accuracy of the routing.
    """

    log_g: ArrayLike
    err: ArrayLike | None = None
    weights: ArrayLike | None = None
    expert_grid: Grid | None = None


@dataclass(frozen=True)
class DataSet:
    """Which stars these are, and where their noise comes from.

    Attributes
    ----------
    name, fingerprint : str
        Name and content fingerprint of the test set.
    n_unlabelled : int
        Stars of the test set that have no labels and are not among those measured.
    reference_set : mapping or None
        reference_set, part and fingerprint (`moefast.simulate.identify`), if the test set is part of one.
    noise : str or None
        Where the noise of the test set comes from: "stored", "drawn" or "none".
    noise_level, noise_seed
        Of the noise drawn on the test set.
    """

    name: str
    fingerprint: str
    n_unlabelled: int = 0
    reference_set: Mapping[str, str] | None = None
    noise: str | None = None
    noise_level: float | None = None
    noise_seed: int | None = None


def evaluate_predictions(
    stars: Stars,
    predictions: Predictions,
    data_set: DataSet,
    *,
    comparisons: Comparisons | None = None,
    model: Mapping[str, Any] | None = None,
    bootstrap: Bootstrap | None = None,
    progress: RowProgress | None = None,
) -> Report:
    """Score one set of predictions by the frozen protocol.

    Parameters
    ----------
    stars : Stars
    predictions : Predictions
        Of the same stars.
    data_set : DataSet
    comparisons : Comparisons, optional
    model : mapping, optional
        Written into the report as it is (JSON values).
    bootstrap : Bootstrap, optional
    progress : callable, optional
        Called with the number of intervals done and of all.

    Returns
    -------
    Report
        `moefast.core.records.as_entries` of it is the content of report.json.

    Raises
    ------
    LabelError
        A label is missing or not finite, or label columns differ in length.
    ValueError
        Another argument has the wrong shape, or an oracle or global reference named here does not exist.
    """
    against, resamples = comparisons or Comparisons(), bootstrap or Bootstrap()
    truth = np.asarray(stars.log_g, dtype=np.float64)
    filled, missing = metrics.fill_missing(truth, predictions.log_g)
    n = truth.size
    done = itertools.count(1)

    def step() -> None:
        if progress is not None:
            progress(next(done), measured.intervals(len(against.references)))

    measured = MeasuredStars(
        truth,
        filled,
        missing,
        sigma=None if predictions.err is None else _column("err", predictions.err, n),
        t_eff=_column("t_eff", stars.t_eff, n),
        m_h=_column("m_h", stars.m_h, n),
        snr_norm=_column("snr_norm", stars.snr_norm, n),
        snr_median=_column("snr_median", stars.snr_median, n),
        ceilings=against.group_ceilings or {},
        bootstrap=resamples,
        step=step,
    )
    means = None
    if against.posterior_means is not None:
        means = _column("posterior_means", against.posterior_means, n)
    report = Report(
        schema_version=SCHEMA_VERSION,
        data_set=MeasuredSet(n=n, **vars(data_set)),
        model=model or {},
        protocol=_protocol(resamples),
        overall=measured.overall(),
        snr_norm=measured.by_snr_norm(),
        snr_median=measured.by_snr_median(),
        grid=measured.by_bin(),
        metallicity=measured.by_metallicity(),
        covered=measured.covered(),
        low_snr=measured.low_snr(),
        routing=_routing(predictions, measured),
        **_distributions(measured),
        **compared(measured, against, means),
    )
    rounded: Report = _rounded(report)
    # What the model says is written as it is: lists stay lists.
    return replace(rounded, model=as_entries(rounded.model))


def _column(name: str, values: ArrayLike, n: int) -> NDArray[np.float64]:
    column = np.asarray(values, dtype=np.float64)
    if column.shape != (n,):
        message = f"{name} must have shape ({n},), one value per star; found {column.shape}"
        raise LabelError(message) if name in ("t_eff", "m_h") else ValueError(message)
    return column


def _edges(grid: Grid) -> GridEdges:
    return GridEdges(t_eff_edges=grid.t_eff_edges, m_h_edges=grid.m_h_edges)


def _protocol(bootstrap: Bootstrap) -> Protocol:
    return Protocol(
        grid=_edges(PHYSICAL_GRID),
        snr_norm_edges=SNR_NORM_EDGES,
        metal_poor_below=METAL_POOR,
        n_octiles=N_OCTILES,
        n_resamples=bootstrap.n_resamples,
        seed=bootstrap.seed,
        level=metrics.LEVEL,
        coverage_levels=metrics.COVERAGE_LEVELS,
        r2="1 - SS_res/SS_tot",
        outside_grid="edge-clamped to the nearest bin",
        not_finite="counts as the mean label of the whole set",
    )


def _distributions(stars: MeasuredStars) -> dict[str, Any]:
    """The entries that figures are drawn from, by their names."""
    truth, filled, sigma = stars.truth, stars.filled, stars.sigma
    octiles, centres = stars.groups["snr_median"], stars.centres
    values = {"log_g": truth, "T_eff": stars.t_eff, "M_H": stars.m_h, "snr_median": stars.snr_median}
    return {
        "density": distributions.density(truth, filled),
        "kiel": distributions.kiel(stars.t_eff, truth, filled),
        "giants": distributions.giants_and_dwarfs(truth, filled, octiles, centres),
        "errors_by_snr": distributions.error_by_group(truth, filled, sigma, octiles, centres),
        "residuals": {
            name: distributions.residual_profile(column, filled - truth) for name, column in values.items()
        },
        "calibration": None if sigma is None else distributions.calibration(truth, stars.predicted, sigma),
    }


def _routing(predictions: Predictions, stars: MeasuredStars) -> Routing | None:
    """What the gate does, of all stars and by group; None without a gate."""
    if predictions.weights is None:
        return None
    n, grid = len(stars.truth), predictions.expert_grid
    gate = np.asarray(predictions.weights, dtype=np.float64)
    if gate.ndim != 2 or len(gate) != n:
        raise ValueError(f"weights must have shape ({n}, n_experts); found {gate.shape}")
    n_experts = gate.shape[1]
    if grid is not None and grid.n_bins != n_experts:
        raise ValueError(f"expert_grid has {grid.n_bins} bins and weights {n_experts} columns")
    true_bin = None if grid is None else grid.assign(stars.t_eff, stars.m_h)
    by_group = {
        kind: distributions.routing_by_group(gate, true_bin, members)
        for kind, members in stars.groups.items()
    }
    routed = np.isfinite(gate).all(axis=1)
    gate = gate[routed]
    expert = gate.argmax(axis=1)
    usage = np.bincount(expert, minlength=n_experts) / max(len(gate), 1)
    accuracy = None
    if true_bin is not None and len(gate):
        accuracy = float((expert == true_bin[routed]).mean())
    return Routing(
        n_experts=n_experts,
        n_unrouted=int((~routed).sum()),
        accuracy=accuracy,
        mean_largest_weight=gate.max(axis=1).mean() if len(gate) else None,
        usage=tuple(usage),
        mean_weight=tuple(gate.mean(axis=0)) if len(gate) else (None,) * n_experts,
        names=grid.names if grid is not None else tuple(f"expert {k}" for k in range(n_experts)),
        grid=None if grid is None else _edges(grid),
        by_group=by_group,
    )


def _rounded(value: Any) -> Any:
    """A part of a report with values that JSON has, rounded; lists and arrays become tuples."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{item.name: _rounded(getattr(value, item.name)) for item in fields(value)})
    if isinstance(value, Mapping):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _rounded(value.tolist())
    if isinstance(value, list | tuple):
        return tuple(_rounded(item) for item in value)
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        number = float(value)
        if not math.isfinite(number):
            return None
        return 0.0 if abs(number) < _ROUNDING else float(f"{number:.{_SIGNIFICANT_DIGITS}g}")
    if value is None or isinstance(value, str):
        return value
    raise TypeError(f"a report holds JSON values only; found {type(value).__name__}")
