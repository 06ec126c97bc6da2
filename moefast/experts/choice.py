"""Which family of experts serves which bin: another one than the base only where it is better beyond doubt.

    Δ_i = (y_i − ŷ_i,base)² − (y_i − ŷ_i,family)²        a family replaces the base where mean(Δ) > margin · SE(Δ)

Design: all families are judged on the same stars with the same noise draw, so Δ is a paired difference and most of the
scatter of the residuals cancels. Sums of squared residuals add up over bins, SS_res = Σ_bins SS_res(bin), and SS_tot is
the same for every prediction: a choice whose SS_res is smaller in every bin that it changes has the larger pooled R²,
always. R² of covered stars against R² of all stars, or a mean of per-bin R² against pooled R², have no such property;
no such number enters here. On other stars than those that chose, the gain is smaller: the best of several was taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["MARGIN", "Choice", "choose", "hybrid"]

F64 = NDArray[np.float64]

MARGIN = 1.0
"""Standard errors of the paired difference by which a family must be better than the base."""


class Choice(NamedTuple):
    """What was chosen for each of K bins among F families, and on what grounds.

    Attributes
    ----------
    families : tuple of str, length K
        Of each bin.
    names : tuple of str, length F
        All families, in the order of the columns below.
    gain : array of shape (K, F), float64, dex²
        Mean of Δ: how much smaller the mean squared residual of a family is than that of the base. Zero for the base;
        NaN where a family is no candidate (a prediction in the bin is not finite) or the bin has no stars.
    standard_error : array of shape (K, F), float64, dex²
        Standard deviation of Δ over √n; NaN where there are fewer than two stars.
    n : array of shape (K,), int64
        Stars.
    """

    families: tuple[str, ...]
    names: tuple[str, ...]
    gain: F64
    standard_error: F64
    n: NDArray[np.int64]


def choose(
    y: ArrayLike,
    predictions: Mapping[str, ArrayLike],
    bins: ArrayLike,
    base: str,
    *,
    n_bins: int | None = None,
    margin: float = MARGIN,
) -> Choice:
    """Family of each bin: that with the largest mean(Δ) among those with mean(Δ) > margin · SE(Δ), else the base.

    Parameters
    ----------
    y : array of shape (n,), dex
        True log g of stars that no family was fitted on.
    predictions : mapping of str to array of shape (n,), dex
        By family, for the same stars with the same noise. A family that does not serve a bin has NaN there.
    bins : array of shape (n,), integers in 0 … n_bins − 1
    base : str
        The family that stays in doubt; its predictions must be finite.
    n_bins : int, optional
        K; one more than the largest bin if absent. Bins without stars, or with one, keep the base.
    margin : float
        Not negative: then the chosen families together are never worse than the base alone on these stars.

    Returns
    -------
    Choice

    Raises
    ------
    ValueError
        Shapes differ, a label or a prediction of the base is not finite, a bin is out of range, the base has no
        predictions, or the margin is negative.
    """
    truth, each, group, n_bins = _checked(y, predictions, bins, n_bins)
    if base not in each:
        raise ValueError(f"the base {base!r} has no predictions; there are {', '.join(each) or 'none'}")
    if not margin >= 0:
        raise ValueError(f"the margin must not be negative; found {margin}")
    for name, values in (("y", truth), (f"the prediction of the base {base!r}", each[base])):
        if not np.isfinite(values).all():
            row = int(np.argmin(np.isfinite(values)))
            raise ValueError(f"{name} must be finite; found {values[row]} in row {row}")
    residual = truth - each[base]
    names = tuple(each)
    gain, error = np.full((n_bins, len(names)), np.nan), np.full((n_bins, len(names)), np.nan)
    n = np.bincount(group, minlength=n_bins)
    for f, name in enumerate(names):
        difference = residual**2 - (truth - each[name]) ** 2
        for k in np.flatnonzero(n):
            here = difference[group == k]
            if np.isfinite(here).all():
                gain[k, f] = here.mean()
                if here.size > 1:
                    error[k, f] = here.std(ddof=1) / np.sqrt(here.size)
    # NaN compares as false: who is no candidate, or has no standard error, does not replace the base.
    better = np.where(gain > margin * error, gain, 0.0)
    best = better.argmax(1)
    families = tuple(names[f] if better[k, f] > 0 else base for k, f in enumerate(best))
    return Choice(families, names, gain, error, n)


def hybrid(predictions: Mapping[str, ArrayLike], bins: ArrayLike, families: Sequence[str]) -> F64:
    """ŷ_i = ŷ_i,families[bins_i]: each star's prediction by the family of its bin.

    Parameters
    ----------
    predictions : mapping of str to array of shape (n,), dex
    bins : array of shape (n,), integers
    families : sequence of str
        One per bin.

    Returns
    -------
    array of shape (n,), float64

    Raises
    ------
    ValueError
        Shapes differ, a bin is out of range, or a family has no predictions.
    """
    _, each, group, _ = _checked(np.zeros(np.shape(bins)), predictions, bins, len(families))
    out = np.full(group.shape, np.nan)
    for k, family in enumerate(families):
        if family not in each:
            raise ValueError(f"family {family!r} of bin {k} has no predictions; there are {', '.join(each)}")
        here = group == k
        out[here] = each[family][here]
    return out


def _checked(
    y: ArrayLike, predictions: Mapping[str, ArrayLike], bins: ArrayLike, n_bins: int | None
) -> tuple[F64, dict[str, F64], NDArray[np.int64], int]:
    truth = np.asarray(y, np.float64)
    each = {name: np.asarray(values, np.float64) for name, values in predictions.items()}
    group = np.asarray(bins)
    if group.size and not np.issubdtype(group.dtype, np.integer):
        raise ValueError(f"bins must be integers; found {group.dtype}")
    group = group.astype(np.int64)
    for name, values in (("bins", group), *each.items()):
        if truth.ndim != 1 or values.shape != truth.shape:
            raise ValueError(
                f"one label and one value of {name} per star; found {truth.shape} and {values.shape}"
            )
    known = int(group.max(initial=-1)) + 1
    total = known if n_bins is None else n_bins
    if known > total or group.min(initial=0) < 0:
        raise ValueError(f"bins must lie in 0…{total - 1}; found {group.min()}…{group.max()}")
    return truth, each, group, total
