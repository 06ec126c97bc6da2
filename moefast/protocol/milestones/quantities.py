"""How the numbers that milestones ask for are found in evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moefast.core import metrics
from moefast.core.grids import METAL_POOR, PHYSICAL_GRID, SNR_NORM_NAMES, assign_snr_bins
from moefast.protocol.comparisons import PUBLISHED, SAMPLED_ORACLE
from moefast.protocol.milestones.evaluations import Interval, NotRunError, ReadEvaluation, Section
from moefast.protocol.milestones.rules import Measured, Quantity
from moefast.protocol.report_parts import Report, Scores

__all__ = [
    "HYBRID_ORACLE",
    "N_SEEDS",
    "RIDGE_ORACLE",
    "SAMPLED_ORACLE",
    "TEST_PART",
    "TEST_SIZE",
    "efficiency_of",
    "focus_gain",
    "fusion_gain_x",
    "fusion_least_gain",
    "gap_closed",
    "hybrid_gain",
    "hybrid_r2",
    "least_gain",
    "mean_of",
    "over_heads",
    "r2_of",
    "rho_of",
    "runs_of",
    "runs_on_main_set",
    "spread",
    "worst_bin_r2",
    "worst_metal_poor_gain",
]

N_SEEDS = 5
"""Training seeds and noise seeds over which the ruler must be stable."""
TEST_SIZE = 10_000
"""Stars of the main test set."""
TEST_PART = "test_10k"
HYBRID_ORACLE = "oracle-hybrid"
RIDGE_ORACLE = "oracle-ridge"


def _defined(value: float | None, what: str) -> float:
    if value is None:
        raise NotRunError(f"{what} does not exist")
    return value


def _interval(bounds: Sequence[float | None] | None) -> Interval | None:
    if bounds is None or bounds[0] is None or bounds[1] is None:
        return None
    return bounds[0], bounds[1]


def r2_of(recipe: str) -> Quantity:
    """R² of a model."""

    def measure(_: Section, one: ReadEvaluation) -> Measured:
        overall = one.report.overall
        return Measured(_defined(overall.r2, f"R² of {one.path}"), _interval(overall.r2_interval))

    return Quantity(f"R² of {recipe}", measure, (recipe,))


def gap_closed(recipe: str) -> Quantity:
    """The part of the gap between the published ridge and the ceiling that a model closes."""

    def measure(_: Section, one: ReadEvaluation) -> Measured:
        ceiling = one.ceiling()
        if ceiling.gap_closed is None:
            raise NotRunError(f"no closed gap in {one.path}: {ceiling.gap_closed_reason}")
        return Measured(ceiling.gap_closed, _interval(ceiling.gap_closed_interval))

    return Quantity(f"gap closed by {recipe}", measure, (recipe,))


def efficiency_of(recipe: str, reference: str | None = None) -> Quantity:
    """R²/R²_ceiling of a model, or of a reference in its report; the ceiling is held fixed."""

    def measure(_: Section, one: ReadEvaluation) -> Measured:
        own: Scores = one.report.overall if reference is None else one.reference(reference)
        top = _defined(one.ceiling().r2, f"the Bayes ceiling in {one.path}")
        value = metrics.efficiency(_defined(own.r2, f"R² of {reference or recipe} in {one.path}"), top)
        if value.reason:
            raise NotRunError(f"no efficiency in {one.path}: {value.reason}")
        bounds = _interval(own.r2_interval)
        return Measured(value.value, bounds and (bounds[0] / top, bounds[1] / top))

    return Quantity(f"R² of {reference or recipe} / Bayes ceiling", measure, (recipe,))


def rho_of(recipe: str, oracle: str | None = None) -> Quantity:
    """ρ of a model: where it lies between the global and the oracle reference, which must be the one that is named."""

    def measure(_: Section, one: ReadEvaluation) -> Measured:
        rho = one.report.rho
        if rho is not None and oracle is not None and rho.oracle != oracle:
            raise NotRunError(f"ρ in {one.path} is to {rho.oracle}, not to {oracle}")
        if rho is None:
            raise NotRunError(f"{one.path} holds no ρ: it lacks the global or the oracle reference")
        if rho.value is None:
            raise NotRunError(f"no ρ in {one.path}: {rho.reason}")
        return Measured(rho.value, _interval(rho.interval), f"from {rho.global_reference} to {rho.oracle}")

    return Quantity(f"ρ of {recipe}", measure, (recipe,))


class _Run(NamedTuple):
    training: tuple[Any, ...] | None
    noise: int | None
    r2: float


def runs_of(section: Section) -> list[_Run]:
    """R² of the published-style ridge in every report that scores it, by training set and noise seed.

    The ridge is part of every fit, so any model's report will do. Only runs of one training size are compared: the
    size with the most training sets.
    """
    sizes: dict[int | None, list[_Run]] = {}
    for one in section.reports:
        if one.recipe == PUBLISHED:
            r2 = one.report.overall.r2
        elif PUBLISHED in one.report.references:
            r2 = one.reference(PUBLISHED).r2
        else:
            continue
        known = one.training
        training = (known["fingerprint"], known.get("seed")) if "fingerprint" in known else None
        run = _Run(training, one.report.data_set.noise_seed, _defined(r2, f"R² of {PUBLISHED} in {one.path}"))
        sizes.setdefault(known.get("n_spectra"), []).append(run)
    if not sizes:
        raise NotRunError(f"no evaluation holds {PUBLISHED}")
    by_seeds = {
        size: (len({run.training for run in runs}), len(runs), size or 0) for size, runs in sizes.items()
    }
    return sizes[max(sizes, key=lambda size: by_seeds[size])]


def runs_on_main_set(section: Section) -> list[_Run]:
    """The same, if the section is the main test set or as large."""
    runs = runs_of(section)
    n = section.reports[0].report.data_set.n
    if section.part != TEST_PART and (section.reference_set is not None or n < TEST_SIZE):
        raise NotRunError(
            f"needs the test set of {TEST_SIZE} stars, found {section.part or 'another'} of {n}"
        )
    return runs


def mean_of(runs: Sequence[_Run]) -> Measured:
    """Mean R² of runs, with their range."""
    values = [run.r2 for run in runs]
    return Measured(
        math.fsum(values) / len(values),
        (min(values), max(values)) if len(values) > 1 else None,
        f"range over {len(values)} runs" if len(values) > 1 else "one run",
    )


def spread(section: Section) -> Measured:
    """Half the range of R² over training and noise seeds."""
    runs = runs_on_main_set(section)
    if any(run.training is None for run in runs):
        raise NotRunError("reports do not say what their models were trained on (model.training.fingerprint)")
    trainings, noises = len({run.training for run in runs}), len({run.noise for run in runs})
    if trainings < N_SEEDS or noises < N_SEEDS:
        raise NotRunError(
            f"needs {N_SEEDS} training and {N_SEEDS} noise seeds, found {trainings} and {noises}"
        )
    values = [run.r2 for run in runs]
    note = f"{trainings} training and {noises} noise seeds, {len(values)} runs"
    return Measured((max(values) - min(values)) / 2, None, note)


def hybrid_r2(_: Section, one: ReadEvaluation) -> Measured:
    """R² of the hybrid's experts with true bins."""
    own = one.reference(HYBRID_ORACLE)
    return Measured(_defined(own.r2, f"R² of {HYBRID_ORACLE} in {one.path}"), _interval(own.r2_interval))


def hybrid_gain(_: Section, one: ReadEvaluation) -> Measured:
    """How much that is above the ridge oracle's."""
    own, base = (_defined(one.reference(name).r2, f"R² of {name}") for name in (HYBRID_ORACLE, RIDGE_ORACLE))
    return Measured(own - base)


def _gains_per_bin(one: ReadEvaluation) -> list[tuple[str, float, float]]:
    """(bin, R² of the sampled ridge, how much the hybrid is above it), both with true bins."""
    own, base = one.reference(HYBRID_ORACLE).r2_grid, one.reference(SAMPLED_ORACLE).r2_grid
    rows = []
    for name, a, b in zip(PHYSICAL_GRID.names, own, base, strict=True):
        below = _defined(b, f"R² in bin {name}")
        rows.append((name, below, _defined(a, f"R² in bin {name}") - below))
    return rows


def worst_metal_poor_gain(section: Section, one: ReadEvaluation) -> Measured:
    """The hybrid's gain in the metal-poor bin in which the sampled ridge does worst."""
    poor = zip(_gains_per_bin(one), PHYSICAL_GRID.metal_poor, strict=True)
    name, _, gain = min((row for row, is_poor in poor if is_poor), key=lambda row: row[1])
    known = one.report.worst_metal_poor
    interval = _interval(known.gain_interval) if known is not None and known.name == name else None
    return Measured(gain, interval, f"bin {name}")


def least_gain(section: Section, one: ReadEvaluation) -> Measured:
    """The hybrid's least gain over all bins."""
    name, _, gain = min(_gains_per_bin(one), key=lambda row: row[2])
    return Measured(gain, None, f"bin {name}")


def _paired(
    one: ReadEvaluation, other: ReadEvaluation, members: Callable[[Mapping[str, NDArray]], NDArray]
) -> Interval | None:
    """Interval of R²_one − R²_other on a group of stars, by resampling stars, where both kept their predictions."""
    own, base = one.stars(), other.stars()
    if own is None or base is None or not np.array_equal(own["log_g_true"], base["log_g_true"]):
        return None
    truth, chosen = own["log_g_true"], members(own)
    a, b = (metrics.fill_missing(truth, stars["log_g"])[0][chosen] for stars in (own, base))
    found = metrics.bootstrap_difference(truth[chosen], a, b)
    return _interval([found.low, found.high])


def _in_norm_bin(name: str) -> Callable[[Mapping[str, NDArray]], NDArray]:
    wanted = SNR_NORM_NAMES.index(name)

    def members(stars: Mapping[str, NDArray]) -> NDArray:
        norm = stars["snr_norm"].astype(np.float64)
        inside = np.isfinite(norm)
        inside[inside] = assign_snr_bins(norm[inside]) == wanted
        return inside

    return members


def worst_bin_r2(_: Section, one: ReadEvaluation) -> Measured:
    """R² of a model's own experts in the metal-poor bin in which the sampled ridge does worst."""
    worst = one.report.worst_metal_poor
    if worst is None:
        raise NotRunError(f"{one.path} holds no {SAMPLED_ORACLE} to find its worst metal-poor bin")
    value = _defined(worst.r2_oracle, f"R² in bin {worst.name}")
    below = "–" if worst.r2_sampled is None else f"{worst.r2_sampled:.3f}"
    return Measured(value, None, f"bin {worst.name}, sampled ridge {below}")


def focus_gain(_: Section, focused: ReadEvaluation, base: ReadEvaluation) -> Measured:
    """R² of the metal-poor stars by a recipe for them, less that by the recipe that it is made of."""
    own, other = (
        _defined(one.report.metallicity.groups[0].r2, f"R² of metal-poor stars in {one.path}")
        for one in (focused, base)
    )
    return Measured(own - other, _paired(focused, base, lambda stars: stars["M_H"] < METAL_POOR))


def _fusion_gains(conditional: ReadEvaluation, phys: ReadEvaluation) -> dict[str, float]:
    """R² of conditional-moe less that of phys-moe per snr_norm bin; bins without R² are left out."""
    own, base = (
        {group.name: group.r2 for group in one.report.snr_norm.groups} for one in (conditional, phys)
    )
    return {
        name: r2 - other for name, r2 in own.items() if r2 is not None and (other := base[name]) is not None
    }


def fusion_gain_x(_: Section, conditional: ReadEvaluation, phys: ReadEvaluation) -> Measured:
    """What conditional fusion gains in the bin of the faintest stars."""
    gains = _fusion_gains(conditional, phys)
    if "X" not in gains:
        raise NotRunError("no R² in snr_norm bin X")
    return Measured(gains["X"], _paired(conditional, phys, _in_norm_bin("X")))


def fusion_least_gain(_: Section, conditional: ReadEvaluation, phys: ReadEvaluation) -> Measured:
    """The least that it gains in the others."""
    gains = {name: gain for name, gain in _fusion_gains(conditional, phys).items() if name != "X"}
    if not gains:
        raise NotRunError("no R² in the snr_norm bins other than X")
    name = min(gains, key=lambda key: gains[key])
    return Measured(gains[name], _paired(conditional, phys, _in_norm_bin(name)), f"bin {name}")


def over_heads(
    what: str,
    select: Callable[[Report], Scores],
    members: Callable[[Mapping[str, NDArray]], NDArray],
) -> Quantity:
    """R² of residual-moe less that of heads within a group of stars."""

    def measure(_: Section, residual: ReadEvaluation, heads: ReadEvaluation) -> Measured:
        own, base = (_defined(select(one.report).r2, f"R² {what}") for one in (residual, heads))
        return Measured(own - base, _paired(residual, heads, members))

    return Quantity(f"R² of residual-moe over heads' {what}", measure, ("residual-moe", "heads"))
