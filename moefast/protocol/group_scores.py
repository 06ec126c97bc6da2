"""How predictions of labelled stars score: all of them, and groups by signal-to-noise ratio, bin and metallicity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefast.core import metrics
from moefast.core.grids import PHYSICAL_GRID, SNR_NORM_EDGES
from moefast.core.groups import Group, groups_of, octile_edges
from moefast.protocol import distributions
from moefast.protocol.report_parts import (
    BinScores,
    ErrorCoverage,
    GridGroups,
    GroupKind,
    LowSnr,
    Metallicity,
    MetallicityPart,
    MetallicityScores,
    NamedScores,
    NormBinScores,
    OctileScores,
    OverallScores,
    PartOctileScores,
    SnrMedianGroups,
    SnrNormGroups,
)

__all__ = ["LOW_SNR_NORM", "Bootstrap", "MeasuredStars"]

LOW_SNR_NORM = 4.0
"""Stars up to this snr_norm, the bins X and L, are looked at by themselves."""

Members = NDArray[np.bool_]


@dataclass(frozen=True)
class Bootstrap:
    """Resamples of the intervals, and their seed."""

    n_resamples: int = metrics.N_RESAMPLES
    seed: int = metrics.SEED


@dataclass(frozen=True)
class MeasuredStars:
    """Labelled stars with their predictions, as float64.

    Attributes
    ----------
    truth, filled : array of shape (n,)
        True and predicted log g [dex]; a prediction that is missing is the mean label.
    missing : array of shape (n,), bool
    sigma : array of shape (n,), or None
        Claimed 1σ error [dex].
    t_eff, m_h, snr_norm, snr_median : array of shape (n,)
    ceilings : mapping of str to sequence of mapping
        R² ceilings by name within each group of a kind.
    bootstrap : Bootstrap
    step : callable
        Called before each interval.
    """

    truth: NDArray[np.float64]
    filled: NDArray[np.float64]
    missing: Members
    sigma: NDArray[np.float64] | None
    t_eff: NDArray[np.float64]
    m_h: NDArray[np.float64]
    snr_norm: NDArray[np.float64]
    snr_median: NDArray[np.float64]
    ceilings: Mapping[str, Sequence[Mapping[str, float]]]
    bootstrap: Bootstrap
    step: Callable[[], None]

    @cached_property
    def groups(self) -> dict[str, list[Group]]:
        """Names and members of all groups, by their kind."""
        return groups_of(self.t_eff, self.m_h, self.snr_norm, self.snr_median)

    @cached_property
    def centres(self) -> list[Any]:
        """Median SNR of each octile; None of an empty one."""
        octiles = self.groups["snr_median"]
        return [np.median(self.snr_median[members]) if members.any() else None for _, members in octiles]

    @cached_property
    def predicted(self) -> NDArray[np.float64]:
        """Predicted log g [dex]; NaN where it is missing."""
        return np.where(self.missing, np.nan, self.filled)

    def intervals(self, n_references: int) -> int:
        """How many intervals a report has."""
        sizes = {kind: len(members) for kind, members in self.groups.items()}
        # Of all stars, of each group, of the octiles of both metallicities, of faint stars; and of each reference.
        n = 3 + len(metrics.STATISTICS) + sum(sizes.values()) + 2 * n_references
        return n + sizes["metallicity"] * (sizes["snr_median"] + 1) + sizes["grid"]

    def scores(self, members: Members) -> dict[str, Any]:
        """What every group has, as arguments of its class."""
        self.step()
        truth, filled = self.truth[members], self.filled[members]
        interval = metrics.bootstrap(truth, filled, **vars(self.bootstrap))
        return {
            **metrics.scores(truth, filled),
            "n_nan": int(self.missing[members].sum()),
            "r2_interval": (interval.low, interval.high),
        }

    def error_coverage(self, members: Members) -> ErrorCoverage | None:
        """How often claimed errors hold the truth; None without claims."""
        if self.sigma is None:
            return None
        return distributions.error_coverage(self.truth[members], self.predicted[members], self.sigma[members])

    def named(self, name: str, members: Members) -> NamedScores:
        """Scores of some stars."""
        return NamedScores(name=name, **self.scores(members))

    def limits(self, kind: GroupKind) -> Sequence[Mapping[str, float]]:
        """R² ceilings within each group of a kind; empty where there are none."""
        found, n = self.ceilings.get(kind), len(self.groups[kind])
        if found is not None and len(found) != n:
            raise ValueError(f"group_ceilings[{kind!r}] must have {n} entries; found {len(found)}")
        return found or [{}] * n

    def overall(self) -> OverallScores:
        """Of all stars, with an interval for every statistic."""
        everyone = np.ones(len(self.truth), dtype=bool)
        of_all = self.scores(everyone)
        for statistic in metrics.STATISTICS:
            self.step()
            interval = metrics.bootstrap(self.truth, self.filled, statistic, **vars(self.bootstrap))
            of_all[f"{statistic}_interval"] = (interval.low, interval.high)
        return OverallScores(name="overall", **of_all, error_coverage=self.error_coverage(everyone))

    def covered(self) -> NamedScores:
        """Of stars within the grid."""
        return self.named("covered only", PHYSICAL_GRID.covered(self.t_eff, self.m_h))

    def by_snr_norm(self) -> SnrNormGroups:
        """Of the bins of snr_norm."""
        cuts = [None, *SNR_NORM_EDGES, None]
        groups = tuple(
            NormBinScores(
                name=name,
                range=(cuts[k], cuts[k + 1]),
                error_coverage=self.error_coverage(members),
                ceilings=self.limits("snr_norm")[k],
                **self.scores(members),
            )
            for k, (name, members) in enumerate(self.groups["snr_norm"])
        )
        return SnrNormGroups(n_unassigned=int((~np.isfinite(self.snr_norm)).sum()), groups=groups)

    def by_snr_median(self) -> SnrMedianGroups:
        """Of the octiles of snr_median."""
        edges = octile_edges(self.snr_median)
        groups = tuple(
            OctileScores(
                name=name,
                range=(edges[k], edges[k + 1]),
                centre=self.centres[k],
                ceilings=self.limits("snr_median")[k],
                **self.scores(members),
            )
            for k, (name, members) in enumerate(self.groups["snr_median"])
        )
        n_unassigned = int((~np.isfinite(self.snr_median)).sum())
        return SnrMedianGroups(n_unassigned=n_unassigned, edges=tuple(edges), groups=groups)

    def by_bin(self) -> GridGroups:
        """Of the bins of the grid, stars outside in the nearest one."""
        covered = PHYSICAL_GRID.covered(self.t_eff, self.m_h)
        groups = tuple(
            BinScores(
                name=name,
                n_covered=int(covered[members].sum()),
                ceilings=self.limits("grid")[k],
                **self.scores(members),
            )
            for k, (name, members) in enumerate(self.groups["grid"])
        )
        return GridGroups(groups=groups)

    def by_metallicity(self) -> Metallicity:
        """Of metal-poor stars and the others, and of the octiles of snr_median within both."""
        kinds, octiles = self.groups["metallicity"], self.groups["snr_median"]
        groups = tuple(
            MetallicityScores(name=name, ceilings=self.limits("metallicity")[k], **self.scores(members))
            for k, (name, members) in enumerate(kinds)
        )
        parts = tuple(
            MetallicityPart(
                name=part,
                groups=tuple(
                    PartOctileScores(name=octile, centre=self.centres[k], **self.scores(chosen & members))
                    for k, (octile, members) in enumerate(octiles)
                ),
            )
            for part, chosen in kinds
        )
        return Metallicity(groups=groups, by_snr_median=parts)

    def low_snr(self) -> LowSnr:
        """Of stars up to `LOW_SNR_NORM`."""
        low = self.snr_norm <= LOW_SNR_NORM

        def within(kind: GroupKind) -> tuple[NamedScores, ...]:
            return tuple(self.named(name, low & members) for name, members in self.groups[kind])

        return LowSnr(
            snr_norm_up_to=LOW_SNR_NORM,
            overall=self.named("low SNR", low),
            grid=within("grid"),
            metallicity=within("metallicity"),
        )
