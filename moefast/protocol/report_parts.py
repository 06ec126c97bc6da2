"""The parts of a report: what report.json holds, as types.

Design: the fields of a class are the entries of report.json, in their order (`moefast.core.records`), so that an entry
is named in one place. Scores of a group stand behind what describes the group: a dataclass lists the fields of its last
base first. A value that does not exist is None. Entries that earlier versions did not write have a default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moefast.core.records import entry

__all__ = [
    "BinScores",
    "CalibrationLevel",
    "CeilingComparison",
    "ClaimedErrors",
    "Density",
    "ErrorCalibration",
    "ErrorCoverage",
    "ErrorsOfGroup",
    "Giants",
    "GiantsPart",
    "GiantsShare",
    "GridEdges",
    "GridGroups",
    "GroupKind",
    "GroupScores",
    "Interval",
    "Kiel",
    "LowSnr",
    "MeasuredSet",
    "Metallicity",
    "MetallicityPart",
    "MetallicityScores",
    "NamedScores",
    "NormBinScores",
    "OctileScores",
    "OverallScores",
    "PartOctileScores",
    "PosteriorMeans",
    "Protocol",
    "ReferenceScores",
    "Report",
    "ResidualStep",
    "Rho",
    "Routing",
    "RoutingOfGroup",
    "Scores",
    "SnrMedianGroups",
    "SnrNormGroups",
    "SnrOracle",
    "WorstMetalPoor",
]

Interval = tuple[float | None, float | None]
"""Limits of a bootstrap interval; None where it does not exist."""

GroupKind = Literal["snr_norm", "snr_median", "grid", "metallicity"]


# --- scores ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of predictions on some stars.

    Attributes
    ----------
    n, n_nan : int
        Stars, and those among them whose prediction is not finite.
    r2, mae, rmse, bias : float or None
        R² and, in dex, mean absolute error, root mean square error and mean of predicted − true log g.
    r2_interval : Interval
    """

    n: int
    n_nan: int
    r2: float | None
    mae: float | None
    rmse: float | None
    bias: float | None
    r2_interval: Interval


@dataclass(frozen=True, kw_only=True)
class CalibrationLevel:
    """Expected and found share (`fraction`) of stars within z times their claimed error."""

    level: float
    z: float
    expected: float
    fraction: float | None


@dataclass(frozen=True, kw_only=True)
class ErrorCoverage:
    """Shares of stars within their claimed errors; stars without prediction or error (`n_undefined`) are outside."""

    n: int
    n_undefined: int
    levels: tuple[CalibrationLevel, ...]


@dataclass(frozen=True, kw_only=True)
class _Named:
    name: str


@dataclass(frozen=True, kw_only=True)
class _NormBin(_Named):
    range: Interval
    error_coverage: ErrorCoverage | None
    ceilings: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Octile(_Named):
    range: Interval
    centre: float | None
    ceilings: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Bin(_Named):
    n_covered: int
    ceilings: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Metallicity(_Named):
    ceilings: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _PartOctile(_Named):
    centre: float | None


@dataclass(frozen=True, kw_only=True)
class NamedScores(Scores, _Named):
    """Scores of a named group of stars."""


@dataclass(frozen=True, kw_only=True)
class OverallScores(NamedScores):
    """Scores of all stars, with an interval of each, and the coverage of claimed errors if there are any."""

    mae_interval: Interval
    rmse_interval: Interval
    bias_interval: Interval
    error_coverage: ErrorCoverage | None


@dataclass(frozen=True, kw_only=True)
class NormBinScores(Scores, _NormBin):
    """Scores of a bin of snr_norm: its range (None where it is open), and R² ceilings within it by name."""


@dataclass(frozen=True, kw_only=True)
class OctileScores(Scores, _Octile):
    """Scores of an octile of snr_median: its range, its median (`centre`), and R² ceilings within it by name."""


@dataclass(frozen=True, kw_only=True)
class BinScores(Scores, _Bin):
    """Scores of a bin of T_eff and [M/H]; `n_covered` of its stars lie on the grid."""


@dataclass(frozen=True, kw_only=True)
class MetallicityScores(Scores, _Metallicity):
    """Scores of the metal-poor stars, or of the others."""


GroupScores = NormBinScores | OctileScores | BinScores | MetallicityScores
"""Scores of a group of any kind."""


@dataclass(frozen=True, kw_only=True)
class PartOctileScores(Scores, _PartOctile):
    """Scores of the stars of one metallicity in an octile of snr_median of all stars."""


@dataclass(frozen=True, kw_only=True)
class ReferenceScores(Scores):
    """Scores of a reference on the same stars.

    Attributes
    ----------
    r2_gain, r2_gain_interval
        R² of the model − R² of the reference, paired over the stars.
    r2_snr_norm, r2_snr_median, r2_grid, r2_metallicity : tuple of float or None
        R² of the reference within each group.
    """

    r2_gain: float | None
    r2_gain_interval: Interval
    r2_snr_norm: tuple[float | None, ...]
    r2_snr_median: tuple[float | None, ...]
    r2_grid: tuple[float | None, ...]
    r2_metallicity: tuple[float | None, ...]

    def r2_by(self, kind: GroupKind) -> tuple[float | None, ...]:
        """R² within each group of a kind."""
        return {
            "snr_norm": self.r2_snr_norm,
            "snr_median": self.r2_snr_median,
            "grid": self.r2_grid,
            "metallicity": self.r2_metallicity,
        }[kind]


# --- groups ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SnrNormGroups:
    """Bins of snr_norm; stars without a finite one (`n_unassigned`) are in none."""

    n_unassigned: int
    groups: tuple[NormBinScores, ...]


@dataclass(frozen=True, kw_only=True)
class SnrMedianGroups:
    """Octiles of snr_median with their edges; stars without a finite one (`n_unassigned`) are in none."""

    n_unassigned: int
    edges: tuple[float | None, ...]
    groups: tuple[OctileScores, ...]


@dataclass(frozen=True, kw_only=True)
class GridGroups:
    """Bins of T_eff and [M/H]."""

    groups: tuple[BinScores, ...]


@dataclass(frozen=True, kw_only=True)
class MetallicityPart:
    """The metal-poor stars, or the others, in octiles of snr_median."""

    name: str
    groups: tuple[PartOctileScores, ...]


@dataclass(frozen=True, kw_only=True)
class Metallicity:
    """Metal-poor stars and the others, at all SNRs and in octiles of snr_median."""

    groups: tuple[MetallicityScores, ...]
    by_snr_median: tuple[MetallicityPart, ...]


@dataclass(frozen=True, kw_only=True)
class LowSnr:
    """Stars up to an snr_norm: all of them, by bin of T_eff and [M/H], and by metallicity."""

    snr_norm_up_to: float
    overall: NamedScores
    grid: tuple[NamedScores, ...]
    metallicity: tuple[NamedScores, ...]


# --- comparisons -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rho:
    """ρ: where R² lies between the global and the oracle reference; without a value there is a reason."""

    value: float | None
    interval: Interval
    n_undefined: int
    reason: str
    global_reference: str = entry("global")
    oracle: str


@dataclass(frozen=True, kw_only=True)
class CeilingComparison:
    """A ceiling of R², the efficiency R²/ceiling, and how much of the gap to it is closed; else why not."""

    r2: float | None
    efficiency: float | None
    efficiency_reason: str
    gap_closed: float | None
    gap_closed_interval: Interval | None
    gap_closed_reason: str


@dataclass(frozen=True, kw_only=True)
class PosteriorMeans:
    """R² of the exact posterior means on the same stars, and the model's R² over it; else why there is none.

    The ceiling is what posterior means are expected to reach, this is what they have on these stars.
    """

    r2: float | None
    r2_interval: Interval
    efficiency: float | None
    efficiency_interval: Interval
    efficiency_reason: str


@dataclass(frozen=True, kw_only=True)
class SnrOracle:
    """What one ridge for each of the four bins of snr_norm, which is known, brings over one for all stars.

    All of them are of the average noise of their stars and of the same training set.

    Attributes
    ----------
    r2_one, r2 : float or None
        R² of one ridge, and of one in each bin.
    gain, gain_interval
        R² of one in each bin − R² of one, paired over the stars.
    """

    r2_one: float | None
    r2: float | None
    gain: float | None
    gain_interval: Interval


@dataclass(frozen=True, kw_only=True)
class WorstMetalPoor:
    """The metal-poor bin in which linear experts of one noise draw, true bins, do worst, and what was made of it.

    Attributes
    ----------
    name, n
        Of the bin, and its stars.
    r2_sampled, r2_oracle, r2 : float or None
        R² in it of those experts, of the model's own with true bins, and of the model.
    gain, gain_interval
        R² of the model's own experts − R² of the sampled ones, paired over the stars.
    """

    name: str
    n: int
    r2_sampled: float | None
    r2_oracle: float | None
    r2: float | None
    gain: float | None
    gain_interval: Interval


# --- tables of figures -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GridEdges:
    """Edges of the bins in K and dex."""

    t_eff_edges: tuple[float, ...]
    m_h_edges: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class RoutingOfGroup:
    """How the gate weighs its experts in a group of stars; None where the group is empty."""

    name: str
    n: int
    mean_weight: tuple[float, ...] | None
    mean_largest_weight: float | None
    accuracy: float | None


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How the gate weighs its experts.

    Attributes
    ----------
    n_experts, n_unrouted : int
        Experts; stars without finite weights.
    accuracy : float or None
        Share of stars whose largest weight is that of the expert of their true bin.
    mean_largest_weight : float or None
    usage, mean_weight : tuple of float
        Of each expert: share of stars whose largest weight it has, and mean weight.
    names : tuple of str
    grid : GridEdges or None
        The grid whose bins are the experts.
    by_group : mapping of str to tuple of RoutingOfGroup
        By kind of group.
    """

    n_experts: int
    n_unrouted: int
    accuracy: float | None
    mean_largest_weight: float | None
    usage: tuple[float | None, ...]
    mean_weight: tuple[float | None, ...]
    names: tuple[str, ...]
    grid: GridEdges | None
    by_group: Mapping[str, tuple[RoutingOfGroup, ...]]


@dataclass(frozen=True, kw_only=True)
class Density:
    """Stars per cell of (true, predicted) log g [dex].

    Attributes
    ----------
    edges : tuple of float
        The same for both axes: the range of the labels and 8 % of it on either side.
    cells : tuple of (int, int, int)
        Index of true, index of predicted, number of stars; empty cells are left out.
    n_beyond : int
        Predictions beyond the edges, counted in the outermost cells.
    """

    edges: tuple[float, ...]
    cells: tuple[tuple[int, int, int], ...]
    n_beyond: int


@dataclass(frozen=True, kw_only=True)
class Kiel:
    """Bias and scatter of log g per cell of true T_eff and true log g.

    Attributes
    ----------
    t_eff, log_g : tuple of float
        Edges [K, dex].
    cells : tuple of (int, int, int, float, float)
        Index of T_eff, index of log g, number of stars, mean and root mean square of ŷ − y [dex]; empty cells are left
        out.
    """

    t_eff: tuple[float, ...]
    log_g: tuple[float, ...]
    cells: tuple[tuple[int, int, int, float, float], ...]


@dataclass(frozen=True, kw_only=True)
class GiantsShare:
    """Giants, or dwarfs, of a group: bias and rmse [dex], and the share predicted on their side (`right`)."""

    name: str
    centre: float | None
    n: int
    bias: float | None
    rmse: float | None
    right: float | None


@dataclass(frozen=True, kw_only=True)
class GiantsPart:
    """Giants, or dwarfs, in octiles of snr_median."""

    name: str
    groups: tuple[GiantsShare, ...]


@dataclass(frozen=True, kw_only=True)
class Giants:
    """How well giants are told from dwarfs; giants have a log g below `below` [dex]."""

    below: float
    parts: tuple[GiantsPart, ...]


@dataclass(frozen=True, kw_only=True)
class ErrorsOfGroup:
    """Errors made (rmse) and claimed (root mean square and quantiles) in a group [dex]; None where there is none."""

    name: str
    centre: float | None
    n: int
    rmse: float | None
    rms: float | None = None
    p16: float | None
    median: float | None
    p84: float | None


@dataclass(frozen=True, kw_only=True)
class ResidualStep:
    """Mean and quantiles of ŷ − y [dex] of the stars in a range of a label or an SNR; `centre` is its median."""

    range: tuple[float, float]
    centre: float
    n: int
    mean: float
    p16: float
    median: float
    p84: float


@dataclass(frozen=True, kw_only=True)
class ClaimedErrors:
    """Stars of similar claimed error: root mean square of the claims and of ŷ − y [dex]."""

    n: int
    err: float
    rmse: float


@dataclass(frozen=True, kw_only=True)
class ErrorCalibration:
    """Whether claimed errors are as large as those made.

    Attributes
    ----------
    levels : tuple of CalibrationLevel
    n_undefined : int
        Stars without a prediction or a usable error.
    scale : float
        Factor that would make the errors cover 68.27 % of the stars.
    pull_mean, pull_std : float
        Of (ŷ − y)/err.
    by_error : tuple of ClaimedErrors
        Ten steps of the claimed error.
    """

    levels: tuple[CalibrationLevel, ...]
    n_undefined: int
    scale: float
    pull_mean: float
    pull_std: float
    by_error: tuple[ClaimedErrors, ...]


# --- the whole -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MeasuredSet:
    """The stars measured and their noise.

    Attributes
    ----------
    name, fingerprint : str
        Name and content fingerprint of the test set.
    n, n_unlabelled : int
        Stars measured, and those of the set that have no labels and are not measured.
    reference_set : mapping or None
        reference_set, part and fingerprint, if the test set is part of one.
    noise : str or None
        "stored", "drawn" or "none"; None if it was not recorded.
    noise_level : float or None
    noise_seed : int or None
    """

    name: str
    fingerprint: str
    n: int
    n_unlabelled: int = 0
    reference_set: Mapping[str, str] | None = None
    noise: str | None = None
    noise_level: float | None = None
    noise_seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The rules by which the numbers of a report were made."""

    grid: GridEdges
    snr_norm_edges: tuple[float, ...]
    metal_poor_below: float
    n_octiles: int
    n_resamples: int
    seed: int
    level: float
    coverage_levels: tuple[float, ...]
    r2: str
    outside_grid: str
    not_finite: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """One set of predictions scored by the frozen protocol; its entries (`as_entries`) are report.json.

    Attributes
    ----------
    schema_version : int
    data_set : MeasuredSet
    model : mapping
        What the subject says of itself, as it is (JSON values).
    protocol : Protocol
    overall, covered : OverallScores, NamedScores
        Of all stars, and of those on the grid of bins.
    snr_norm, snr_median, grid, metallicity, low_snr
        Groups of stars.
    routing : Routing or None
        None if there is no gate.
    density, kiel, giants, errors_by_snr, residuals, calibration
        Tables of the figures. None, or empty, where earlier versions did not write them; calibration is None if no
        errors are claimed.
    references : mapping of str to ReferenceScores
    rho : Rho or None
        None if the global or the oracle reference is missing.
    rho_bayes : Rho or None
        ρ of the same experts mixed by Bayes' rule; None unless the model's gate is another one beside a library.
    worst_metal_poor : WorstMetalPoor or None
        None unless linear experts of one noise draw are among the references.
    snr_oracle : SnrOracle or None
        None unless ridges of average noise, one and four by snr_norm, are among the references.
    ceilings : mapping of str to CeilingComparison
    posterior_means : PosteriorMeans or None
        None unless the ceiling holds the exact posterior mean of every star.
    """

    schema_version: int
    data_set: MeasuredSet
    model: Mapping[str, Any]
    protocol: Protocol
    overall: OverallScores
    covered: NamedScores
    snr_norm: SnrNormGroups
    snr_median: SnrMedianGroups
    grid: GridGroups
    metallicity: Metallicity
    low_snr: LowSnr
    routing: Routing | None
    density: Density
    kiel: Kiel | None = None
    giants: Giants | None = None
    errors_by_snr: tuple[ErrorsOfGroup, ...] = ()
    residuals: Mapping[str, tuple[ResidualStep, ...]]
    calibration: ErrorCalibration | None
    references: Mapping[str, ReferenceScores]
    rho: Rho | None
    rho_bayes: Rho | None = None
    worst_metal_poor: WorstMetalPoor | None = None
    snr_oracle: SnrOracle | None = None
    ceilings: Mapping[str, CeilingComparison]
    posterior_means: PosteriorMeans | None = None

    def groups(self, kind: GroupKind) -> tuple[GroupScores, ...]:
        """Scores of the groups of a kind."""
        by_kind: Mapping[GroupKind, tuple[GroupScores, ...]] = {
            "snr_norm": self.snr_norm.groups,
            "snr_median": self.snr_median.groups,
            "grid": self.grid.groups,
            "metallicity": self.metallicity.groups,
        }
        return by_kind[kind]
