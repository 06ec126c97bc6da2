"""The frozen ruler: R², MAE, RMSE, bias, error coverage, and their bootstrap intervals.

Design: every statistic is a function of a few sums over stars (Σr, Σ|r|, Σr², Σy, Σy²), so a bootstrap
resample is a vector of multinomial counts and a block of resamples is one matrix product, counts @ columns.
All resamples of one call share their counts between the predictions compared: every comparison is paired.
Rules that hold everywhere: a prediction that is not finite counts as the mean label (the best constant) and
is reported as n_nan, never dropped; a statistic that does not exist (fewer than two stars, labels without
variance) is NaN, without a warning; labels must be finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import erf, ndtri

from moefast.core.errors import LabelError

__all__ = [
    "COVERAGE_LEVELS",
    "LEVEL",
    "N_RESAMPLES",
    "SEED",
    "STATISTICS",
    "Interval",
    "Ratio",
    "SquaredErrors",
    "bias",
    "bootstrap",
    "bootstrap_difference",
    "bootstrap_efficiency",
    "bootstrap_gap_closed",
    "bootstrap_rho",
    "coverage",
    "efficiency",
    "fill_missing",
    "gap_closed",
    "mae",
    "r2",
    "rho",
    "rmse",
    "scores",
]

N_RESAMPLES = 1000
"""Bootstrap resamples of the frozen protocol."""

SEED = 20250101
"""Bootstrap seed of the frozen protocol."""

LEVEL = 0.95
"""Confidence level of the reported intervals."""

COVERAGE_LEVELS = (0.68, 0.95)
"""Levels of the error coverage; 0.68 stands for one sigma, 0.6827 exactly."""

_ONE_SIGMA = float(erf(1 / math.sqrt(2)))  # 0.682689492137
_DRAWS_PER_BLOCK = 1 << 20

# A resample that repeats one star has no variance but for rounding; far below any real one.
_NO_VARIANCE = 1e-12

# Equal predictions in different columns of one matrix product differ by rounding: that is no uplift.
_NO_UPLIFT = 1e-12


class Interval(NamedTuple):
    """A statistic with its bootstrap percentile interval.

    `n_undefined` counts resamples in which the statistic does not exist; the interval is over the others.
    """

    value: float
    low: float
    high: float
    standard_error: float
    n_undefined: int


class Ratio(NamedTuple):
    """A ratio of R² differences; where it does not exist, NaN with the reason in words."""

    value: float
    reason: str = ""


def fill_missing(y: ArrayLike, yhat: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Predictions with every value that is not finite replaced by the mean label.

    Parameters
    ----------
    y : array of shape (n,)
        True log g [dex].
    yhat : array of shape (n,)
        Predicted log g [dex].

    Returns
    -------
    filled : array of shape (n,), float64
    missing : array of shape (n,), bool
        Where a value was replaced.
    """
    truth, predicted = _pair(y, yhat)
    missing = ~np.isfinite(predicted)
    if missing.any():
        predicted = np.where(missing, truth.mean(), predicted)
    return predicted, missing


def r2(y: ArrayLike, yhat: ArrayLike) -> float:
    """R² = 1 − SS_res/SS_tot = 1 − Σ(y − ŷ)²/Σ(y − ȳ)²; NaN for n < 2 or equal labels."""
    return _score(y, yhat, "r2")


def mae(y: ArrayLike, yhat: ArrayLike) -> float:
    """MAE = mean |ŷ − y| [dex]."""
    return _score(y, yhat, "mae")


def rmse(y: ArrayLike, yhat: ArrayLike) -> float:
    """RMSE = √mean (ŷ − y)² [dex]."""
    return _score(y, yhat, "rmse")


def bias(y: ArrayLike, yhat: ArrayLike) -> float:
    """Bias = mean (ŷ − y) [dex]: positive where gravities come out too high."""
    return _score(y, yhat, "bias")


def scores(y: ArrayLike, yhat: ArrayLike) -> dict[str, Any]:
    """All point statistics at once.

    Parameters
    ----------
    y, yhat : array of shape (n,)
        True and predicted log g [dex].

    Returns
    -------
    dict
        n, n_nan (predictions replaced by the mean label), r2, mae, rmse, bias.

    Raises
    ------
    LabelError
        A label is not finite.
    """
    truth, filled, n_nan = _filled(y, yhat)
    sums = _columns(truth, [filled]).sum(axis=0, keepdims=True)
    values = {name: float(function(sums, truth, 0)[0]) for name, function in STATISTICS.items()}
    return {"n": truth.size, "n_nan": n_nan, **values}


def bootstrap(
    y: ArrayLike,
    yhat: ArrayLike,
    statistic: str = "r2",
    *,
    n_resamples: int = N_RESAMPLES,
    seed: int = SEED,
    level: float = LEVEL,
) -> Interval:
    """Percentile bootstrap over stars: [q((1 − level)/2), q((1 + level)/2)] of the resampled statistic.

    Parameters
    ----------
    y, yhat : array of shape (n,)
        True and predicted log g [dex].
    statistic : str
        A key of `STATISTICS`.
    n_resamples, seed, level
        Number of resamples, seed of the draws, confidence level.

    Returns
    -------
    Interval

    Notes
    -----
    Resample b takes rows default_rng(seed).integers(0, n, (n_resamples, n))[b]; blocks do not change it.
    """
    value, resampled = _resampled(y, [yhat], statistic, n_resamples, seed)
    return _interval(value[0], resampled[:, 0], level)


def bootstrap_difference(
    y: ArrayLike,
    a: ArrayLike,
    b: ArrayLike,
    statistic: str = "r2",
    *,
    n_resamples: int = N_RESAMPLES,
    seed: int = SEED,
    level: float = LEVEL,
) -> Interval:
    """Paired bootstrap of statistic(y, a) − statistic(y, b): both on the same resampled stars.

    Parameters
    ----------
    y : array of shape (n,)
        True log g [dex].
    a, b : array of shape (n,)
        Two predictions of it [dex].
    statistic, n_resamples, seed, level
        As in `bootstrap`.
    """
    value, resampled = _resampled(y, [a, b], statistic, n_resamples, seed)
    return _interval(value[0] - value[1], resampled[:, 0] - resampled[:, 1], level)


def bootstrap_rho(
    y: ArrayLike,
    deploy: ArrayLike,
    global_: ArrayLike,
    oracle: ArrayLike,
    *,
    n_resamples: int = N_RESAMPLES,
    seed: int = SEED,
    level: float = LEVEL,
) -> Interval:
    """Paired bootstrap of `rho` over three predictions of the same stars.

    Resamples in which the oracle is no better than the global model have no ρ and are counted in
    `n_undefined`; many of them mean that ρ is not a useful number here.
    """
    value, resampled = _resampled(y, [deploy, global_, oracle], "r2", n_resamples, seed)
    return _interval(_quotient(*value), _quotient(*resampled.T), level)


def bootstrap_gap_closed(
    y: ArrayLike,
    yhat: ArrayLike,
    published: ArrayLike,
    r2_ceiling: float,
    *,
    n_resamples: int = N_RESAMPLES,
    seed: int = SEED,
    level: float = LEVEL,
) -> Interval:
    """Paired bootstrap of `gap_closed`; the ceiling is held fixed."""
    value, resampled = _resampled(y, [yhat, published], "r2", n_resamples, seed)
    return _interval(
        _quotient(value[0], value[1], np.float64(r2_ceiling)),
        _quotient(resampled[:, 0], resampled[:, 1], np.float64(r2_ceiling)),
        level,
    )


def bootstrap_efficiency(
    y: ArrayLike,
    yhat: ArrayLike,
    best: ArrayLike,
    *,
    n_resamples: int = N_RESAMPLES,
    seed: int = SEED,
    level: float = LEVEL,
) -> Interval:
    """Paired bootstrap of `efficiency` against the R² of other predictions of the same stars."""
    value, resampled = _resampled(y, [yhat, best], "r2", n_resamples, seed)
    return _interval(
        _quotient(value[0], 0.0, value[1]), _quotient(resampled[:, 0], 0.0, resampled[:, 1]), level
    )


def rho(r2_deploy: float, r2_global: float, r2_oracle: float) -> Ratio:
    """ρ = (R²_deploy − R²_global)/(R²_oracle − R²_global): the share of the oracle's gain that is kept."""
    return _ratio(
        r2_deploy - r2_global, r2_oracle - r2_global, "the oracle is no better than the global model"
    )


def gap_closed(r2: float, r2_published: float, r2_ceiling: float) -> Ratio:
    """Gap closed = (R² − R²_published-ridge)/(R²_ceiling − R²_published-ridge)."""
    return _ratio(
        r2 - r2_published, r2_ceiling - r2_published, "the ceiling is not above the published ridge"
    )


def efficiency(r2: float, r2_ceiling: float) -> Ratio:
    """Efficiency = R²/R²_ceiling."""
    return _ratio(r2, r2_ceiling, "the ceiling is not above zero")


def coverage(
    y: ArrayLike, yhat: ArrayLike, err: ArrayLike, levels: Sequence[float] = COVERAGE_LEVELS
) -> dict[str, Any]:
    """Fraction of stars with |y − ŷ| ≤ z·err, z = Φ⁻¹((1 + level)/2).

    Exact Gaussian quantiles: level 0.68 stands for one sigma, z = 1 and an expected fraction of 0.682689;
    level 0.95 has z = 1.959964.

    Parameters
    ----------
    y, yhat : array of shape (n,)
        True and predicted log g [dex].
    err : array of shape (n,)
        Claimed 1σ error [dex].
    levels : sequence of float
        Levels, each in (0, 1).

    Returns
    -------
    dict
        n, n_undefined (no finite prediction or no finite error above zero: counted as not covered), and
        levels, a list of dicts with level, z, expected, fraction.
    """
    truth, predicted = _pair(y, yhat)
    sigma = np.asarray(err, dtype=np.float64)
    if sigma.shape != truth.shape:
        raise ValueError(f"err must have the shape of y, {truth.shape}; found {sigma.shape}")
    defined = np.isfinite(predicted) & np.isfinite(sigma) & (sigma > 0)
    distance = np.full(truth.shape, np.inf)
    distance[defined] = np.abs(predicted[defined] - truth[defined]) / sigma[defined]
    rows = []
    for level in levels:
        if not 0 < level < 1:
            raise ValueError(f"levels must lie between 0 and 1; found {level}")
        expected = _ONE_SIGMA if level == COVERAGE_LEVELS[0] else float(level)
        z = 1.0 if level == COVERAGE_LEVELS[0] else float(ndtri((1 + level) / 2))
        fraction = float((distance <= z).mean()) if truth.size else math.nan
        rows.append({"level": float(level), "z": z, "expected": expected, "fraction": fraction})
    return {"n": truth.size, "n_undefined": int((~defined).sum()), "levels": rows}


@dataclass
class SquaredErrors:
    """Sums that give R², 1 − SS_res/SS_tot, in one pass; a missing prediction counts as the mean label.

    The sums of two parts of the data add up to those of the whole: ``SquaredErrors() + a + b``. Labels are taken
    relative to `shift`, one of them, so that the sums are well conditioned.

    Attributes
    ----------
    n, missing : float
        Labels, and those without a prediction.
    shift : float
        Label from which others are counted.
    residual : float
        Σ (y − ŷ)² where there is a prediction.
    sum_y, sum_yy, missing_y, missing_yy : float
        Σ (y − shift) and its squares, of all labels and of those without a prediction.
    """

    n: float = 0.0
    shift: float = 0.0
    residual: float = 0.0
    sum_y: float = 0.0
    sum_yy: float = 0.0
    missing: float = 0.0
    missing_y: float = 0.0
    missing_yy: float = 0.0

    def add(self, y: NDArray, yhat: NDArray) -> None:
        """Take in labels and predictions, each of shape (n,)."""
        if not self.n and y.size:
            self.shift = float(y[0])
        d = y - self.shift
        gone = ~np.isfinite(yhat)
        self.residual += float(np.sum((y[~gone] - yhat[~gone]) ** 2))
        self.n += y.size
        self.sum_y += float(d.sum())
        self.sum_yy += float(d @ d)
        self.missing += int(gone.sum())
        self.missing_y += float(d[gone].sum())
        self.missing_yy += float(d[gone] @ d[gone])

    def __add__(self, other: SquaredErrors) -> SquaredErrors:
        """Sums of both."""
        if not self.n or not other.n:
            return replace(self if self.n else other)
        step = other.shift - self.shift
        return SquaredErrors(
            self.n + other.n,
            self.shift,
            self.residual + other.residual,
            self.sum_y + other.sum_y + step * other.n,
            self.sum_yy + other.sum_yy + step * (2 * other.sum_y + step * other.n),
            self.missing + other.missing,
            self.missing_y + other.missing_y + step * other.missing,
            self.missing_yy + other.missing_yy + step * (2 * other.missing_y + step * other.missing),
        )

    def r2(self) -> float | None:
        """R²; None where it is not defined: fewer than two labels, all alike, or no prediction at all."""
        if self.n < 2:
            return None
        mean = self.sum_y / self.n
        total = self.sum_yy - self.n * mean**2
        residual = self.residual + self.missing_yy - 2 * mean * self.missing_y + self.missing * mean**2
        return 1 - residual / total if total > 0 and self.missing < self.n else None

    def numbers(self) -> dict[str, float]:
        """The sums, as JSON keeps them to the last bit."""
        return asdict(self)

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, float]) -> SquaredErrors:
        """Sums that `numbers` gave.

        Raises
        ------
        ValueError
            If a sum is missing, or another is there.
        """
        names = {field.name for field in fields(cls)}
        if set(numbers) != names:
            raise ValueError(f"sums {sorted(names)} expected, found {sorted(numbers)}")
        return cls(**{name: float(value) for name, value in numbers.items()})


def _pair(y: ArrayLike, yhat: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    truth = np.asarray(y, dtype=np.float64)
    predicted = np.asarray(yhat, dtype=np.float64)
    if truth.ndim != 1 or predicted.shape != truth.shape:
        raise ValueError(
            f"y and yhat must be vectors of equal length; found shapes {truth.shape} and {predicted.shape}"
        )
    bad = ~np.isfinite(truth)
    if bad.any():
        row = int(np.argmax(bad))
        raise LabelError(
            f"log_g must be finite to score against; found {truth[row]} in row {row} ({int(bad.sum())} such "
            f"rows): leave these rows out of the test set"
        )
    return truth, predicted


def _filled(y: ArrayLike, yhat: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    filled, missing = fill_missing(y, yhat)
    return np.asarray(y, dtype=np.float64), filled, int(missing.sum())


def _columns(truth: NDArray[np.float64], predictions: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Columns 1, y, y², then r, |r|, r² of each prediction; y is centred, or Σy² − (Σy)²/n would cancel."""
    centred = truth - truth.mean() if truth.size else truth
    columns = [np.ones_like(truth), centred, centred**2]
    for predicted in predictions:
        residual = predicted - truth
        columns += [residual, np.abs(residual), residual**2]
    return np.stack(columns, axis=1)


_Sums = NDArray[np.float64]


def _r2_from(sums: _Sums, truth: NDArray[np.float64], i: int) -> NDArray[np.float64]:
    if truth.size < 2 or truth.min() == truth.max():
        return np.full(len(sums), np.nan)
    total = sums[:, 2] - sums[:, 1] ** 2 / sums[:, 0]
    exists = total > _NO_VARIANCE * truth.size * np.ptp(truth) ** 2 / 4
    return np.where(exists, 1 - sums[:, 5 + 3 * i] / np.where(exists, total, 1), np.nan)


def _mean_from(sums: _Sums, column: int) -> NDArray[np.float64]:
    n = sums[:, 0]
    return np.where(n > 0, sums[:, column] / np.maximum(n, 1), np.nan)


STATISTICS: Mapping[str, Callable[[_Sums, NDArray[np.float64], int], NDArray[np.float64]]] = {
    "r2": _r2_from,
    "mae": lambda sums, truth, i: _mean_from(sums, 4 + 3 * i),
    "rmse": lambda sums, truth, i: np.sqrt(_mean_from(sums, 5 + 3 * i)),
    "bias": lambda sums, truth, i: _mean_from(sums, 3 + 3 * i),
}
"""Statistics by name, each from (sums, labels, which prediction)."""


def _score(y: ArrayLike, yhat: ArrayLike, statistic: str) -> float:
    truth, filled, _ = _filled(y, yhat)
    sums = _columns(truth, [filled]).sum(axis=0, keepdims=True)
    return float(STATISTICS[statistic](sums, truth, 0)[0])


def _resampled(
    y: ArrayLike, predictions: Sequence[ArrayLike], statistic: str, n_resamples: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Statistic of each prediction, on all stars (m,) and on each resample (n_resamples, m)."""
    if statistic not in STATISTICS:
        raise ValueError(f"statistic must be one of {', '.join(STATISTICS)}; found {statistic!r}")
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1; found {n_resamples}")
    truth = np.asarray(y, dtype=np.float64)
    columns = _columns(truth, [_filled(truth, predicted)[1] for predicted in predictions])
    which = range(len(predictions))
    function = STATISTICS[statistic]
    whole = columns.sum(axis=0, keepdims=True)
    value = np.array([function(whole, truth, i)[0] for i in which])
    if truth.size == 0:
        return value, np.full((n_resamples, len(predictions)), np.nan)
    sums = _resampled_sums(columns, n_resamples, seed)
    return value, np.stack([function(sums, truth, i) for i in which], axis=1)


def _resampled_sums(columns: NDArray[np.float64], n_resamples: int, seed: int) -> NDArray[np.float64]:
    n, m = columns.shape
    rng = np.random.default_rng(seed)
    block = max(1, _DRAWS_PER_BLOCK // n)
    out = np.empty((n_resamples, m))
    for start in range(0, n_resamples, block):
        size = min(block, n_resamples - start)
        draws = rng.integers(0, n, (size, n))
        draws += n * np.arange(size)[:, None]
        counts = np.bincount(draws.ravel(), minlength=size * n).reshape(size, n)
        out[start : start + size] = counts.astype(np.float64) @ columns
    return out


def _interval(value: float, resampled: NDArray[np.float64], level: float) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1; found {level}")
    exists = resampled[np.isfinite(resampled)]
    n_undefined = resampled.size - exists.size
    if not math.isfinite(value) or exists.size < 2:
        return Interval(float(value), math.nan, math.nan, math.nan, n_undefined)
    low, high = np.quantile(exists, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high), float(exists.std(ddof=1)), n_undefined)


def _quotient(top: Any, base: Any, ceiling: Any) -> Any:
    """(top − base)/(ceiling − base), NaN where the denominator is not above zero."""
    denominator = ceiling - base
    exists = denominator > _NO_UPLIFT
    return np.where(exists, (top - base) / np.where(exists, denominator, 1), np.nan)


def _ratio(numerator: float, denominator: float, reason: str) -> Ratio:
    if not (math.isfinite(numerator) and math.isfinite(denominator)):
        return Ratio(math.nan, "an R² that enters does not exist")
    if denominator <= _NO_UPLIFT:
        return Ratio(math.nan, f"{reason} (denominator {denominator:+.4f})")
    return Ratio(numerator / denominator)
