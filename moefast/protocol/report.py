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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moefast.core import metrics
from moefast.core.errors import LabelError
from moefast.core.grids import METAL_POOR, PHYSICAL_GRID, SNR_NORM_EDGES, Grid
from moefast.core.groups import N_OCTILES, Group, groups_of, octile_edges
from moefast.core.progress import RowProgress
from moefast.core.records import as_entries
from moefast.protocol import distributions
from moefast.protocol.report_parts import (
    BinScores,
    CeilingComparison,
    ErrorCoverage,
    GridEdges,
    GridGroups,
    GroupKind,
    LowSnr,
    MeasuredSet,
    Metallicity,
    MetallicityPart,
    MetallicityScores,
    NamedScores,
    NormBinScores,
    OctileScores,
    OverallScores,
    PartOctileScores,
    PosteriorMeans,
    Protocol,
    ReferenceScores,
    Report,
    Rho,
    Routing,
    SnrMedianGroups,
    SnrNormGroups,
    SnrOracle,
    WorstMetalPoor,
)

__all__ = [
    "SCHEMA_VERSION",
    "Bootstrap",
    "Comparisons",
    "DataSet",
    "Predictions",
    "Stars",
    "evaluate_predictions",
]

SCHEMA_VERSION = 2
LOW_SNR_NORM = 4.0
"""Stars up to this snr_norm, the bins X and L, are looked at by themselves."""

PUBLISHED = "published-ridge"
"""Reference against which the closed gap is measured."""

GLOBAL = "global-ridge"
"""Reference that stands for one global model in ρ."""

ORACLE = "oracle"
"""Start of the name of the reference that stands for the oracle in ρ; the first such one is taken."""

SAMPLED_ORACLE = "oracle-ridge, sampled"
"""Reference of linear experts with true bins that were fitted to one noise draw per star, as published."""

MEANS = "posterior means"
"""Name, beside the ceilings within a group, of the R² that the exact posterior means have there."""

GLOBAL_AVERAGE = "global-ridge, average noise"
"""Reference of one ridge whose noise is the average of all stars."""

SNR_ORACLE = "snr-oracle, average noise"
"""Reference of four such ridges, each for the stars of one bin of snr_norm and for their average noise."""

BAYES_GATE = "bayes-gate"
"""Reference of the model's own experts, mixed by the evidence of its library alone."""

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


@dataclass(frozen=True)
class Comparisons:
    """What the predictions are compared with.

    Attributes
    ----------
    references : mapping of str to array of shape (n,)
        Predictions of reference models for the same stars and the same noise, by name.
    global_reference, oracle_reference : str
        Which references enter ρ; the oracle defaults to the first whose name starts with "oracle".
    ceilings : mapping of str to float
        R² ceilings of this test set by name ("bayes", "fisher median", …): adds efficiency and closed gap.
    group_ceilings : mapping of str to sequence of mapping, or None
        R² ceilings by name within each group, in the order of `groups_of`.
    posterior_means : array of shape (n,), or None
        Exact posterior means of log g of the same stars [dex].
    """

    references: Mapping[str, ArrayLike] = field(default_factory=dict)
    global_reference: str = GLOBAL
    oracle_reference: str | None = None
    ceilings: Mapping[str, float] = field(default_factory=dict)
    group_ceilings: Mapping[str, Sequence[Mapping[str, float]]] | None = None
    posterior_means: ArrayLike | None = None


@dataclass(frozen=True)
class Bootstrap:
    """Resamples of the intervals, and their seed."""

    n_resamples: int = metrics.N_RESAMPLES
    seed: int = metrics.SEED


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
    n_resamples, seed = resamples.n_resamples, resamples.seed
    truth = np.asarray(stars.log_g, dtype=np.float64)
    filled, missing = metrics.fill_missing(truth, predictions.log_g)
    n = truth.size
    sigma = None if predictions.err is None else _column("err", predictions.err, n)
    temperature, metallicity = _column("t_eff", stars.t_eff, n), _column("m_h", stars.m_h, n)
    norm, median = _column("snr_norm", stars.snr_norm, n), _column("snr_median", stars.snr_median, n)
    covered = PHYSICAL_GRID.covered(temperature, metallicity)

    groups = groups_of(temperature, metallicity, norm, median)
    edges = octile_edges(median)

    sizes = {kind: len(members) for kind, members in groups.items()}
    # Of all stars, of each group, of the octiles of both metallicities, of faint stars; and of each reference.
    n_intervals = 3 + len(metrics.STATISTICS) + sum(sizes.values()) + 2 * len(against.references)
    n_intervals += sizes["metallicity"] * (sizes["snr_median"] + 1) + sizes["grid"]
    done = itertools.count(1)

    def step() -> None:
        if progress is not None:
            progress(next(done), n_intervals)

    def scores(members: NDArray[np.bool_]) -> dict[str, Any]:
        """What every group has, as arguments of its class."""
        step()
        interval = metrics.bootstrap(truth[members], filled[members], n_resamples=n_resamples, seed=seed)
        return {
            **metrics.scores(truth[members], filled[members]),
            "n_nan": int(missing[members].sum()),
            "r2_interval": (interval.low, interval.high),
        }

    def error_coverage(members: NDArray[np.bool_]) -> ErrorCoverage | None:
        if sigma is None:
            return None
        predicted = np.where(missing, np.nan, filled)
        return distributions.error_coverage(truth[members], predicted[members], sigma[members])

    def limits(kind: GroupKind) -> Sequence[Mapping[str, float]]:
        """R² ceilings within each group of a kind; empty where there are none."""
        found = (against.group_ceilings or {}).get(kind)
        if found is not None and len(found) != len(groups[kind]):
            raise ValueError(
                f"group_ceilings[{kind!r}] must have {len(groups[kind])} entries; found {len(found)}"
            )
        return found or [{}] * len(groups[kind])

    everyone = np.ones(n, dtype=bool)
    of_all = scores(everyone)
    for statistic in metrics.STATISTICS:
        step()
        interval = metrics.bootstrap(truth, filled, statistic, n_resamples=n_resamples, seed=seed)
        of_all[f"{statistic}_interval"] = (interval.low, interval.high)
    overall = OverallScores(name="overall", **of_all, error_coverage=error_coverage(everyone))

    by_norm = tuple(
        NormBinScores(
            name=name,
            range=_snr_range(k),
            error_coverage=error_coverage(members),
            ceilings=limits("snr_norm")[k],
            **scores(members),
        )
        for k, (name, members) in enumerate(groups["snr_norm"])
    )
    centres = [np.median(median[members]) if members.any() else None for _, members in groups["snr_median"]]
    by_octile = tuple(
        OctileScores(
            name=name,
            range=(edges[k], edges[k + 1]),
            centre=centres[k],
            ceilings=limits("snr_median")[k],
            **scores(members),
        )
        for k, (name, members) in enumerate(groups["snr_median"])
    )
    by_bin = tuple(
        BinScores(
            name=name,
            n_covered=int(covered[members].sum()),
            ceilings=limits("grid")[k],
            **scores(members),
        )
        for k, (name, members) in enumerate(groups["grid"])
    )
    by_metal = tuple(
        MetallicityScores(name=name, ceilings=limits("metallicity")[k], **scores(members))
        for k, (name, members) in enumerate(groups["metallicity"])
    )
    low = norm <= LOW_SNR_NORM
    others: dict[str, NDArray[np.float64]] = {}
    references: dict[str, ReferenceScores] = {}
    for name, prediction in against.references.items():
        others[name], absent = metrics.fill_missing(truth, prediction)
        other = others[name]
        step()
        alone = metrics.bootstrap(truth, other, n_resamples=n_resamples, seed=seed)
        step()
        versus = metrics.bootstrap_difference(truth, filled, other, n_resamples=n_resamples, seed=seed)
        references[name] = ReferenceScores(
            **metrics.scores(truth, other) | {"n_nan": int(absent.sum())},
            r2_interval=(alone.low, alone.high),
            r2_gain=versus.value,
            r2_gain_interval=(versus.low, versus.high),
            r2_snr_norm=_r2_by(truth, other, groups["snr_norm"]),
            r2_snr_median=_r2_by(truth, other, groups["snr_median"]),
            r2_grid=_r2_by(truth, other, groups["grid"]),
            r2_metallicity=_r2_by(truth, other, groups["metallicity"]),
        )
    report = Report(
        schema_version=SCHEMA_VERSION,
        data_set=MeasuredSet(
            name=data_set.name,
            fingerprint=data_set.fingerprint,
            n=n,
            n_unlabelled=data_set.n_unlabelled,
            reference_set=data_set.reference_set,
            noise=data_set.noise,
            noise_level=data_set.noise_level,
            noise_seed=data_set.noise_seed,
        ),
        model=model or {},
        protocol=Protocol(
            grid=_edges(PHYSICAL_GRID),
            snr_norm_edges=SNR_NORM_EDGES,
            metal_poor_below=METAL_POOR,
            n_octiles=N_OCTILES,
            n_resamples=n_resamples,
            seed=seed,
            level=metrics.LEVEL,
            coverage_levels=metrics.COVERAGE_LEVELS,
            r2="1 - SS_res/SS_tot",
            outside_grid="edge-clamped to the nearest bin",
            not_finite="counts as the mean label of the whole set",
        ),
        overall=overall,
        covered=NamedScores(name="covered only", **scores(covered)),
        snr_norm=SnrNormGroups(n_unassigned=int((~np.isfinite(norm)).sum()), groups=by_norm),
        snr_median=SnrMedianGroups(
            n_unassigned=int((~np.isfinite(median)).sum()), edges=tuple(edges), groups=by_octile
        ),
        grid=GridGroups(groups=by_bin),
        metallicity=Metallicity(
            groups=by_metal,
            by_snr_median=tuple(
                MetallicityPart(
                    name=part,
                    groups=tuple(
                        PartOctileScores(name=octile, centre=centres[k], **scores(chosen & members))
                        for k, (octile, members) in enumerate(groups["snr_median"])
                    ),
                )
                for part, chosen in groups["metallicity"]
            ),
        ),
        low_snr=LowSnr(
            snr_norm_up_to=LOW_SNR_NORM,
            overall=NamedScores(name="low SNR", **scores(low)),
            grid=tuple(NamedScores(name=name, **scores(low & members)) for name, members in groups["grid"]),
            metallicity=tuple(
                NamedScores(name=name, **scores(low & members)) for name, members in groups["metallicity"]
            ),
        ),
        routing=None
        if predictions.weights is None
        else _routing(predictions.weights, n, predictions.expert_grid, temperature, metallicity, groups),
        density=distributions.density(truth, filled),
        kiel=distributions.kiel(temperature, truth, filled),
        giants=distributions.giants_and_dwarfs(truth, filled, groups["snr_median"], centres),
        errors_by_snr=distributions.error_by_group(truth, filled, sigma, groups["snr_median"], centres),
        residuals={
            name: distributions.residual_profile(values, filled - truth)
            for name, values in (
                ("log_g", truth),
                ("T_eff", temperature),
                ("M_H", metallicity),
                ("snr_median", median),
            )
        },
        calibration=None
        if sigma is None
        else distributions.calibration(truth, np.where(missing, np.nan, filled), sigma),
        references=references,
        rho=_rho(
            truth,
            filled,
            others,
            global_name=against.global_reference,
            oracle_name=against.oracle_reference,
            n_resamples=n_resamples,
            seed=seed,
        ),
        rho_bayes=None
        if BAYES_GATE not in others
        else _rho(
            truth,
            others[BAYES_GATE],
            others,
            global_name=against.global_reference,
            oracle_name=against.oracle_reference,
            n_resamples=n_resamples,
            seed=seed,
        ),
        worst_metal_poor=_worst_metal_poor(
            truth,
            filled,
            others,
            groups["grid"],
            oracle_name=against.oracle_reference,
            n_resamples=n_resamples,
            seed=seed,
        ),
        snr_oracle=_snr_oracle(truth, others, n_resamples=n_resamples, seed=seed),
        ceilings={
            name: _against_ceiling(
                truth, filled, others.get(PUBLISHED), float(ceiling), n_resamples=n_resamples, seed=seed
            )
            for name, ceiling in against.ceilings.items()
        },
        posterior_means=None
        if against.posterior_means is None
        else _against_means(
            truth,
            filled,
            _column("posterior_means", against.posterior_means, n),
            n_resamples=n_resamples,
            seed=seed,
        ),
    )
    rounded: Report = _rounded(report)
    # What the model says is written as it is: lists stay lists.
    return replace(rounded, model=as_entries(rounded.model))


# --- parts of the report -------------------------------------------------------------------------------


def _column(name: str, values: ArrayLike, n: int) -> NDArray[np.float64]:
    column = np.asarray(values, dtype=np.float64)
    if column.shape != (n,):
        message = f"{name} must have shape ({n},), one value per star; found {column.shape}"
        raise LabelError(message) if name in ("t_eff", "m_h") else ValueError(message)
    return column


def _edges(grid: Grid) -> GridEdges:
    return GridEdges(t_eff_edges=grid.t_eff_edges, m_h_edges=grid.m_h_edges)


def _snr_range(k: int) -> tuple[float | None, float | None]:
    cuts = [None, *SNR_NORM_EDGES, None]
    return cuts[k], cuts[k + 1]


def _r2_by(y: NDArray[np.float64], yhat: NDArray[np.float64], groups: Sequence[Group]) -> tuple[float, ...]:
    return tuple(metrics.r2(y[members], yhat[members]) for _, members in groups)


def _routing(
    weights: ArrayLike,
    n: int,
    grid: Grid | None,
    t_eff: NDArray[np.float64],
    m_h: NDArray[np.float64],
    groups: Mapping[str, Sequence[Group]],
) -> Routing:
    gate = np.asarray(weights, dtype=np.float64)
    if gate.ndim != 2 or len(gate) != n:
        raise ValueError(f"weights must have shape ({n}, n_experts); found {gate.shape}")
    n_experts = gate.shape[1]
    if grid is not None and grid.n_bins != n_experts:
        raise ValueError(f"expert_grid has {grid.n_bins} bins and weights {n_experts} columns")
    true_bin = None if grid is None else grid.assign(t_eff, m_h)
    by_group = {
        kind: distributions.routing_by_group(gate, true_bin, members) for kind, members in groups.items()
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


def _first_oracle(others: Mapping[str, Any]) -> str | None:
    return next((name for name in others if name.startswith(ORACLE)), None)


def _rho(
    y: NDArray[np.float64],
    yhat: NDArray[np.float64],
    others: Mapping[str, NDArray[np.float64]],
    *,
    global_name: str,
    oracle_name: str | None,
    n_resamples: int,
    seed: int,
) -> Rho | None:
    if oracle_name is None:
        oracle_name = _first_oracle(others)
    elif oracle_name not in others:
        raise ValueError(f"oracle_reference {oracle_name!r} is not among the references {list(others)}")
    if global_name != GLOBAL and global_name not in others:
        raise ValueError(f"global_reference {global_name!r} is not among the references {list(others)}")
    if oracle_name is None or global_name not in others:
        return None
    base, oracle = others[global_name], others[oracle_name]
    point = metrics.rho(metrics.r2(y, yhat), metrics.r2(y, base), metrics.r2(y, oracle))
    interval = metrics.bootstrap_rho(y, yhat, base, oracle, n_resamples=n_resamples, seed=seed)
    return Rho(
        value=point.value,
        interval=(interval.low, interval.high),
        n_undefined=interval.n_undefined,
        reason=point.reason,
        global_reference=global_name,
        oracle=oracle_name,
    )


def _worst_metal_poor(
    y: NDArray[np.float64],
    yhat: NDArray[np.float64],
    others: Mapping[str, NDArray[np.float64]],
    bins: Sequence[Group],
    *,
    oracle_name: str | None,
    n_resamples: int,
    seed: int,
) -> WorstMetalPoor | None:
    oracle_name = oracle_name or _first_oracle(others)
    if SAMPLED_ORACLE not in others or oracle_name is None:
        return None
    sampled, oracle = others[SAMPLED_ORACLE], others[oracle_name]
    poor = [one for one, is_poor in zip(bins, PHYSICAL_GRID.metal_poor, strict=True) if is_poor]
    # A bin with fewer than two stars has no R².
    known = [(metrics.r2(y[members], sampled[members]), name, members) for name, members in poor]
    known = [one for one in known if math.isfinite(one[0])]
    if not known:
        return None
    r2, name, members = min(known, key=lambda one: one[:2])
    gain = metrics.bootstrap_difference(
        y[members], oracle[members], sampled[members], n_resamples=n_resamples, seed=seed
    )
    return WorstMetalPoor(
        name=name,
        n=int(members.sum()),
        r2_sampled=r2,
        r2_oracle=metrics.r2(y[members], oracle[members]),
        r2=metrics.r2(y[members], yhat[members]),
        gain=gain.value,
        gain_interval=(gain.low, gain.high),
    )


def _snr_oracle(
    y: NDArray[np.float64], others: Mapping[str, NDArray[np.float64]], *, n_resamples: int, seed: int
) -> SnrOracle | None:
    if GLOBAL_AVERAGE not in others or SNR_ORACLE not in others:
        return None
    one, four = others[GLOBAL_AVERAGE], others[SNR_ORACLE]
    gain = metrics.bootstrap_difference(y, four, one, n_resamples=n_resamples, seed=seed)
    return SnrOracle(
        r2_one=metrics.r2(y, one),
        r2=metrics.r2(y, four),
        gain=gain.value,
        gain_interval=(gain.low, gain.high),
    )


def _against_means(
    y: NDArray[np.float64],
    yhat: NDArray[np.float64],
    means: NDArray[np.float64],
    *,
    n_resamples: int,
    seed: int,
) -> PosteriorMeans:
    alone = metrics.bootstrap(y, means, n_resamples=n_resamples, seed=seed)
    paired = metrics.bootstrap_efficiency(y, yhat, means, n_resamples=n_resamples, seed=seed)
    return PosteriorMeans(
        r2=alone.value,
        r2_interval=(alone.low, alone.high),
        efficiency=paired.value,
        efficiency_interval=(paired.low, paired.high),
        efficiency_reason=metrics.efficiency(metrics.r2(y, yhat), alone.value).reason,
    )


def _against_ceiling(
    y: NDArray[np.float64],
    yhat: NDArray[np.float64],
    published: NDArray[np.float64] | None,
    ceiling: float,
    *,
    n_resamples: int,
    seed: int,
) -> CeilingComparison:
    own = metrics.r2(y, yhat)
    efficiency = metrics.efficiency(own, ceiling)
    alone = CeilingComparison(
        r2=ceiling,
        efficiency=efficiency.value,
        efficiency_reason=efficiency.reason,
        gap_closed=None,
        gap_closed_interval=None,
        gap_closed_reason=f"no predictions of {PUBLISHED} were given",
    )
    if published is None:
        return alone
    gap = metrics.gap_closed(own, metrics.r2(y, published), ceiling)
    interval = metrics.bootstrap_gap_closed(y, yhat, published, ceiling, n_resamples=n_resamples, seed=seed)
    return replace(
        alone,
        gap_closed=gap.value,
        gap_closed_interval=(interval.low, interval.high),
        gap_closed_reason=gap.reason,
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
