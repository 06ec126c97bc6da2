"""Which residuals beside a strong answer are kept: those that make it better beyond doubt, and no region worse.

Design: a good answer leaves little to find, and a fit to what is nearly noise does harm: so residuals are taken one by
one, the best first, while they are better beyond doubt on judging stars, and dropped again where a region (a bin,
metal-poor stars, a range of snr_norm) came out worse. Draws of one star's noise are no stars of their own: every mean
and standard error is over stars.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moefast.core.grids import METAL_POOR
from moefast.experts.choice import MARGIN

__all__ = ["Gain", "Judge", "KeptResiduals", "choose_residuals", "regions"]

F64 = NDArray[np.float64]

SURE = 2.0
"""Standard errors by which all residuals together must be better, and a region worse, for that not to be chance: some
twenty residuals are tried, and harm is looked for in some fifteen regions."""
NEGLIGIBLE = 1e-3
"""Share of a region's mean squared error below which harm is none: by the tail of the gate's weights every residual
touches every region a little, and how many standard errors that is does not depend on how little."""


def regions(
    bins: NDArray[np.integer],
    names: Sequence[str],
    m_h: F64,
    snr_bins: NDArray[np.integer],
    snr_names: Sequence[str],
) -> dict[str, NDArray[np.bool_]]:
    """Where residuals must do no harm: each bin, metal-poor stars and the rest, each range of snr_norm; masks (n,).

    Parameters
    ----------
    bins : array of shape (n,), int
        True bin of each star.
    names : sequence of str
        Of the bins.
    m_h : array of shape (n,), dex
    snr_bins : array of shape (n,), int
        Range of snr_norm that each star lies in.
    snr_names : sequence of str
        Of the ranges.
    """
    poor = m_h < METAL_POOR
    found = {name: bins == k for k, name in enumerate(names)}
    found |= {"metal-poor": poor, "not metal-poor": ~poor}
    return found | {f"snr_norm {name}": snr_bins == k for k, name in enumerate(snr_names)}


class Gain(NamedTuple):
    """How much smaller the mean squared error is, its standard error over `stars` stars, and what it was; dex²."""

    gain: float
    standard_error: float
    stars: int
    before: float

    def better(self, margin: float) -> bool:
        """By more than so many standard errors."""
        return self.stars > 1 and self.gain > margin * self.standard_error

    def worse(self, margin: float) -> bool:
        """By more than so many standard errors, and more than is negligible."""
        return self.stars > 1 and self.gain < -max(margin * self.standard_error, NEGLIGIBLE * self.before)


@dataclass(frozen=True)
class KeptResiduals:
    """What was kept, and why.

    Attributes
    ----------
    kept : dict of int to str
        Name of the candidate of each expert that keeps a residual.
    steps : dict of int to Gain
        What each of them gained when it was taken.
    dropped : dict of int to str
        Those that were taken and dropped again, and the region that came out worse with them; "" where there was none
        and all together were no better beyond doubt.
    total : Gain
        Of all together.
    regions : dict of str to Gain
        Of all together in each region.
    """

    kept: dict[int, str] = field(default_factory=dict)
    steps: dict[int, Gain] = field(default_factory=dict)
    dropped: dict[int, str] = field(default_factory=dict)
    total: Gain = field(default_factory=lambda: Gain(0.0, 0.0, 0, 0.0))
    regions: dict[str, Gain] = field(default_factory=dict)

    def summary(self, names: Sequence[str]) -> dict[str, Any]:
        """In words and numbers for a manifest; `names` are those of the bins."""
        return {
            "kept": {
                names[k]: {"residual": name, **self.steps[k]._asdict()}
                for k, name in sorted(self.kept.items())
            },
            "dropped": {
                names[k]: f"made {region} worse" if region else "no better beyond doubt"
                for k, region in sorted(self.dropped.items())
            },
            "all": self.total._asdict(),
            "regions": {name: gain._asdict() for name, gain in self.regions.items()},
        }


def choose_residuals(
    y: F64,
    strong: F64,
    gate: F64,
    candidates: Mapping[str, Mapping[int, NDArray]],
    star: NDArray[np.integer],
    where: Mapping[str, NDArray[np.bool_]],
    label_range: tuple[float, float],
    *,
    margin: float = MARGIN,
    sure: float = SURE,
) -> KeptResiduals:
    """Residuals that make judging stars better beyond doubt, and no region of them worse beyond noise.

        Δ_i = (y_i − ŷ_i)² − (y_i − ŷ_i − w_ik r_k(i))², averaged over the draws of a star

    The best is taken first and the others are judged beside it, as long as mean Δ > margin · SE. Then, while a region
    is worse than without any residual by more than sure · SE and a thousandth, or all stars are not better by as much,
    the residual to which that is owed is dropped. So on these stars what is kept is better than the strong answer
    alone, or nothing is.

    Parameters
    ----------
    y : array of shape (n,), dex
        True log g of noisy stars on which neither the strong answer nor the candidates were fitted.
    strong : array of shape (n,), dex
        Σ_k w_k v_k.
    gate : array of shape (n, K)
        w_k.
    candidates : dict of str to dict of int to array of shape (n,), dex
        By name and expert, what a residual says of every star.
    star : array of shape (n,), int
        Which rows are of one star.
    where : dict of str to array of shape (n,), bool
        Regions.
    label_range : tuple of float, dex
        Predictions are clipped to it, as the mixture's are.
    margin, sure : float
        Not negative.

    Raises
    ------
    ValueError
        Shapes differ, a number is not finite, an expert is unknown, or a margin is negative.
    """
    _check(y, strong, gate, candidates, star, where)
    if not (margin >= 0 and sure >= 0):
        raise ValueError(f"margins must not be negative; found {margin} and {sure}")
    if len(gate) == 0:
        return KeptResiduals()
    judge = Judge(y, strong, star, label_range)
    shares = {(k, name): gate[:, k] * r for name, each in candidates.items() for k, r in each.items()}
    kept, steps = _take(judge, shares, margin)
    return _drop(judge, shares, kept, steps, where, sure)


def _check(
    y: F64,
    strong: F64,
    gate: F64,
    candidates: Mapping[str, Mapping[int, NDArray]],
    star: NDArray[np.integer],
    where: Mapping[str, NDArray[np.bool_]],
) -> None:
    n, n_experts = gate.shape
    columns = {
        "y": y,
        "strong": strong,
        "star": star,
        **{f"residual {k} of {name}": r for name, each in candidates.items() for k, r in each.items()},
        **where,
    }
    for name, column in columns.items():
        if np.shape(column) != (n,) or not np.isfinite(column).all():
            raise ValueError(f"{name}: {n} finite values expected; found {np.shape(column)}")
    if not all(0 <= k < n_experts for each in candidates.values() for k in each):
        raise ValueError(f"residuals of experts 0 … {n_experts - 1} expected")


def _take(
    judge: Judge, shares: Mapping[tuple[int, str], F64], margin: float
) -> tuple[dict[int, str], dict[int, Gain]]:
    """Take residuals one by one, the best first: the name of that of each expert, and what it gained."""
    kept: dict[int, str] = {}
    steps: dict[int, Gain] = {}
    now = judge.strong
    while free := [key for key in shares if key[0] not in kept]:
        gains = {key: judge.gain(now, now + shares[key]) for key in free}
        helping = [key for key in free if gains[key].better(margin)]
        if not helping:
            break
        k, name = best = max(helping, key=lambda key: gains[key].gain)
        kept[k], steps[k] = name, gains[best]
        now = now + shares[best]
    return kept, steps


def _drop(
    judge: Judge,
    shares: Mapping[tuple[int, str], F64],
    kept: dict[int, str],
    steps: dict[int, Gain],
    where: Mapping[str, NDArray[np.bool_]],
    sure: float,
) -> KeptResiduals:
    """Drop residuals that were taken until no region is worse and the whole is better."""
    strong = judge.strong
    dropped: dict[int, str] = {}
    while kept:
        with_all = strong + sum(shares[item] for item in kept.items())
        gains = {name: judge.gain(strong, with_all, mask) for name, mask in where.items()}
        bad = [name for name in gains if gains[name].worse(sure)]
        total = judge.gain(strong, with_all)
        if not bad and total.better(sure):
            return KeptResiduals(kept, steps, dropped, total, gains)
        # Without a bad region, what is left is no better than nothing as a whole.
        region = min(bad, key=lambda name: gains[name].gain) if bad else ""
        mask = where.get(region)
        k = min(kept, key=lambda k: judge.gain(with_all - shares[k, kept[k]], with_all, mask).gain)
        dropped[k] = region
        del kept[k], steps[k]
    return KeptResiduals(dropped=dropped)


class Judge:
    """Paired differences of squared errors, by star; `strong` is the answer without any residual."""

    def __init__(self, y: F64, strong: F64, star: NDArray, label_range: tuple[float, float]) -> None:
        self.y, self.strong, self.label_range = y, strong, label_range
        self.star = np.unique(star, return_inverse=True)[1]

    def gain(self, before: F64, after: F64, mask: NDArray[np.bool_] | None = None) -> Gain:
        """What `after` is better by than `before`, of all rows or of some."""
        rows = slice(None) if mask is None else mask
        y, star = self.y[rows], self.star[rows]
        off, now = (np.clip(each[rows], *self.label_range) - y for each in (before, after))
        count = np.bincount(star)
        there = count > 0
        old, new = (np.bincount(star, e * e)[there] / count[there] for e in (off, now))
        if old.size == 0:
            return Gain(0.0, 0.0, 0, 0.0)
        each = old - new
        error = float(each.std(ddof=1) / np.sqrt(each.size)) if each.size > 1 else 0.0
        return Gain(float(each.mean()), error, each.size, float(old.mean()))
