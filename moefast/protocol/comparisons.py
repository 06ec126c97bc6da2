"""What predictions are compared with: reference models, oracles, exact posterior means and ceilings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moefast.core import metrics
from moefast.core.grids import PHYSICAL_GRID
from moefast.core.groups import Group
from moefast.protocol.group_scores import Bootstrap, MeasuredStars
from moefast.protocol.report_parts import (
    CeilingComparison,
    PosteriorMeans,
    ReferenceScores,
    Rho,
    SnrOracle,
    WorstMetalPoor,
)

__all__ = [
    "BAYES_GATE",
    "GLOBAL",
    "GLOBAL_AVERAGE",
    "MEANS",
    "ORACLE",
    "PUBLISHED",
    "SAMPLED_ORACLE",
    "SNR_ORACLE",
    "Comparisons",
    "compared",
]

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


def compared(stars: MeasuredStars, against: Comparisons, means: NDArray[np.float64] | None) -> dict[str, Any]:
    """The entries of a report that compare, by their names.

    Parameters
    ----------
    stars : MeasuredStars
    against : Comparisons
    means : array of shape (n,), or None
        Its posterior means.
    """
    truth, filled, bootstrap = stars.truth, stars.filled, stars.bootstrap
    others = {name: metrics.fill_missing(truth, found) for name, found in against.references.items()}
    references = {name: _reference(stars, other, absent) for name, (other, absent) in others.items()}
    filled_others = {name: other for name, (other, _) in others.items()}

    def rho(predicted: NDArray[np.float64]) -> Rho | None:
        return _rho(
            truth,
            predicted,
            filled_others,
            global_name=against.global_reference,
            oracle_name=against.oracle_reference,
            bootstrap=bootstrap,
        )

    return {
        "references": references,
        "rho": rho(filled),
        "rho_bayes": rho(filled_others[BAYES_GATE]) if BAYES_GATE in filled_others else None,
        "worst_metal_poor": _worst_metal_poor(
            truth,
            filled,
            filled_others,
            stars.groups["grid"],
            oracle_name=against.oracle_reference,
            bootstrap=bootstrap,
        ),
        "snr_oracle": _snr_oracle(truth, filled_others, bootstrap=bootstrap),
        "ceilings": {
            name: _against_ceiling(
                truth, filled, filled_others.get(PUBLISHED), float(ceiling), bootstrap=bootstrap
            )
            for name, ceiling in against.ceilings.items()
        },
        "posterior_means": None
        if means is None
        else _against_means(truth, filled, means, bootstrap=bootstrap),
    }


def _reference(
    stars: MeasuredStars, other: NDArray[np.float64], absent: NDArray[np.bool_]
) -> ReferenceScores:
    """Scores of a reference, and what the predictions gain over it."""
    truth, groups = stars.truth, stars.groups
    stars.step()
    alone = metrics.bootstrap(truth, other, **vars(stars.bootstrap))
    stars.step()
    versus = metrics.bootstrap_difference(truth, stars.filled, other, **vars(stars.bootstrap))
    return ReferenceScores(
        **metrics.scores(truth, other) | {"n_nan": int(absent.sum())},
        r2_interval=(alone.low, alone.high),
        r2_gain=versus.value,
        r2_gain_interval=(versus.low, versus.high),
        r2_snr_norm=_r2_by(truth, other, groups["snr_norm"]),
        r2_snr_median=_r2_by(truth, other, groups["snr_median"]),
        r2_grid=_r2_by(truth, other, groups["grid"]),
        r2_metallicity=_r2_by(truth, other, groups["metallicity"]),
    )


def _r2_by(y: NDArray[np.float64], yhat: NDArray[np.float64], groups: Sequence[Group]) -> tuple[float, ...]:
    return tuple(metrics.r2(y[members], yhat[members]) for _, members in groups)


def _first_oracle(others: Mapping[str, Any]) -> str | None:
    return next((name for name in others if name.startswith(ORACLE)), None)


def _rho(
    y: NDArray[np.float64],
    yhat: NDArray[np.float64],
    others: Mapping[str, NDArray[np.float64]],
    *,
    global_name: str,
    oracle_name: str | None,
    bootstrap: Bootstrap,
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
    interval = metrics.bootstrap_rho(y, yhat, base, oracle, **vars(bootstrap))
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
    bootstrap: Bootstrap,
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
    gain = metrics.bootstrap_difference(y[members], oracle[members], sampled[members], **vars(bootstrap))
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
    y: NDArray[np.float64], others: Mapping[str, NDArray[np.float64]], *, bootstrap: Bootstrap
) -> SnrOracle | None:
    if GLOBAL_AVERAGE not in others or SNR_ORACLE not in others:
        return None
    one, four = others[GLOBAL_AVERAGE], others[SNR_ORACLE]
    gain = metrics.bootstrap_difference(y, four, one, **vars(bootstrap))
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
    bootstrap: Bootstrap,
) -> PosteriorMeans:
    alone = metrics.bootstrap(y, means, **vars(bootstrap))
    paired = metrics.bootstrap_efficiency(y, yhat, means, **vars(bootstrap))
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
    bootstrap: Bootstrap,
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
    interval = metrics.bootstrap_gap_closed(y, yhat, published, ceiling, **vars(bootstrap))
    return replace(
        alone,
        gap_closed=gap.value,
        gap_closed_interval=(interval.low, interval.high),
        gap_closed_reason=gap.reason,
    )
