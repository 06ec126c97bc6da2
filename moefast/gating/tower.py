"""A second tower of the gate: logits of its own, from other features than the first, or for faint stars alone.

    l = share · (tanh(f W₁ + b₁) W₂ + b₂),    share = min(1, max(0, (limit − snr_norm)/(RAMP · limit))),

added to the logits of the first tower. f are the features of the first, or a view of the star of its own, one of
`VIEWS`: "quality" are the logarithms of the ten `moefast.spectra.quality.quality_features`. Without a limit, share = 1.

Design: a tower with a limit works on the few stars below it, so it may be wide. Its share falls to zero on the last
hundredths before the limit: log g is continuous in flux, and stars beyond are scored to the last bit as without it.
A view says what it is in NumPy and on an arithmetic, and is entered in `VIEWS`, where fits, models and graphs find it.
The quality features are the only view of the error vector that a gate may have, rounded, since exact ones give log g
away. Their logarithms are multiples of a step; the graph counts in double precision up to there, so that no star falls
on another step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefast.kernels import perceptron
from moefast.kernels.forward import LARGEST_FLUX, LAYERS
from moefast.kernels.forward import perceptron as perceptron_of
from moefast.ops.arithmetic import SolvingArithmetic
from moefast.spectra.quality import QUALITY_FEATURES, QUALITY_STEP, quality_features

__all__ = ["FEATURES", "RAMP", "VIEWS", "Tower", "View", "known_views", "quality_logs"]

F32 = NDArray[np.float32]

FEATURES = "features"
"""What a tower sees that sees what the first one does."""

RAMP = 0.02
"""Part of the limit over which the share of a tower falls from one to zero."""
LEAST_LOG = -140
"""Smallest logarithm, in steps of `QUALITY_STEP`: that of a standard deviation of zero."""


def quality_logs(error: NDArray, good: NDArray[np.bool_] | None = None) -> F32:
    """Logarithms of the ten quality features; sign(v) ln(1 + |v|) of skewness and kurtosis; all multiples of 0.1.

    Parameters
    ----------
    error : array of shape (n, p), float32
    good : array of shape (n, p), bool, optional
        Pixels to use; None = all.

    Returns
    -------
    array of shape (n, 10), float32
        NaN without good pixels.
    """
    features = quality_features(error, good).astype(np.float64)
    sizes, shape = features[:, :-2], features[:, -2:]
    logs = np.log(np.maximum(sizes, math.exp(LEAST_LOG * QUALITY_STEP)))
    logs = np.concatenate([logs, np.copysign(np.log1p(np.abs(shape)), shape)], axis=1)
    return (np.round(logs / QUALITY_STEP) * QUALITY_STEP).astype(np.float32)


@dataclass(frozen=True)
class View:
    """What a tower may see of stars.

    Attributes
    ----------
    n_features : int
        f.
    hidden : int
        Width of a tower that is fitted on it.
    of_errors : bool
        Whether it is made of errors and good pixels alone, so that draws of noise do not change it.
    of_stars : callable
        Gives it, (n, f), of the first tower's features (None if it is `of_errors`), errors (n, p), and good pixels
        (n, p) or None for all.
    describe : callable
        The same on an arithmetic: features, errors, good pixels and p.
    """

    n_features: int
    hidden: int
    of_errors: bool
    of_stars: Callable[[NDArray | None, NDArray, NDArray[np.bool_] | None], NDArray]
    describe: Callable[[SolvingArithmetic, Any, Any, Any, int], Any]


@dataclass(frozen=True)
class Tower:
    """A perceptron on a view of a star, for all stars or for those below a signal-to-noise ratio.

    Attributes
    ----------
    sees : str
        `FEATURES`, those of the first tower, (n, f), or one of `VIEWS`.
    layers : tuple of arrays W₁ (f, h), b₁ (h,), W₂ (h, K), b₂ (K,), float32
    limit : float
        Largest snr_norm of the stars that it speaks to; inf for all.

    Raises
    ------
    ValueError
        Unknown view, layers that do not fit together, or a limit that is not positive.
    """

    sees: str
    layers: tuple[F32, F32, F32, F32]
    limit: float = math.inf

    def __post_init__(self) -> None:
        if self.sees not in known_views():
            raise ValueError(f"a tower sees one of {known_views()}; found {self.sees!r}")
        w1, b1, w2, b2 = self.layers
        if w1.shape[1:] != b1.shape or w2.shape != (b1.size, b2.size):
            raise ValueError(f"the layers of a tower do not fit together: {[a.shape for a in self.layers]}")
        if (view := VIEWS.get(self.sees)) is not None and len(w1) != view.n_features:
            raise ValueError(f"a {self.sees} tower takes {view.n_features} features; found {len(w1)}")
        if not self.limit > 0:
            raise ValueError(f"the limit of a tower must be positive; found {self.limit}")
        # As a file keeps it.
        object.__setattr__(self, "limit", float(np.float32(self.limit)))

    @property
    def n_features(self) -> int:
        """Features that it takes."""
        return self.layers[0].shape[0]

    @property
    def n_experts(self) -> int:
        """Logits that it gives."""
        return self.layers[3].size

    def share(self, snr_norm: NDArray) -> NDArray:
        """How much of its logits counts, in the dtype of `snr_norm`; none where that is NaN.

        Parameters
        ----------
        snr_norm : array of shape (n,)
        """
        if math.isinf(self.limit):
            return np.where(np.isnan(snr_norm), 0, 1).astype(snr_norm.dtype)
        width, limit = snr_norm.dtype.type(RAMP * self.limit), snr_norm.dtype.type(self.limit)
        share = np.clip((limit - snr_norm) / width, 0, 1)
        return np.where(np.isnan(share), 0, share).astype(snr_norm.dtype)

    def logits(self, snr_norm: NDArray, view: Callable[[NDArray[np.intp]], NDArray]) -> NDArray:
        """What is added to the gate's logits, (n, K), in the dtype of `snr_norm`.

        Parameters
        ----------
        snr_norm : array of shape (n,)
        view : callable
            Gives what the tower sees of some rows, by their numbers.
        """
        share = self.share(snr_norm)
        out = np.zeros((len(share), self.n_experts), share.dtype)
        rows = np.flatnonzero(share)
        if rows.size:
            out[rows] = share[rows, None] * perceptron(view(rows), self.layers)
        return out

    @property
    def stem(self) -> str:
        """What the names of its numbers in a file begin with."""
        return f"tower.{self.sees}"

    def arrays(self) -> dict[str, NDArray]:
        """Its layers, and its limit if it has one."""
        limit = {} if math.isinf(self.limit) else {"limit": np.array([self.limit], np.float32)}
        return dict(zip(LAYERS, self.layers, strict=True)) | limit

    def describe(
        self, op: SolvingArithmetic, features: Any, snr_norm: Any, error: Any, good: Any, n_pixels: int
    ) -> Any:
        """What is added to the gate's logits, (n, K).

        Parameters
        ----------
        op : SolvingArithmetic
            With the numbers of `arrays`.
        features : value of shape (n, f)
            Of the first tower.
        snr_norm : value of shape (n, 1)
        error, good : values of shape (n, p)
        n_pixels : int
            p.
        """
        seen = features
        if (view := VIEWS.get(self.sees)) is not None:
            seen = view.describe(op, features, error, good, n_pixels)
        logits = perceptron_of(op, seen, "")
        if math.isinf(self.limit):
            return logits
        limit = op.number("limit")
        width = op.multiply(limit, op.constant(RAMP))
        share = op.divide(op.subtract(limit, snr_norm), width)
        return op.multiply(op.clip(share, op.constant(0.0), op.constant(1.0)), logits)


def _quality_logs(op: SolvingArithmetic, error: Any, good: Any, n_pixels: int) -> Any:
    """`quality_logs` of the good pixels, (n, 10): zeros in a row without any."""
    number = op.double

    def total(value: Any) -> Any:
        return op.shaped(op.total(value, 1), (1,))

    def positive(value: Any) -> Any:
        return op.where(op.above(value, zero), value, one)

    zero, one = number(0.0), number(1.0)
    used = op.where(good, op.precise(error), zero)
    n = op.larger(total(op.where(good, one, zero)), one)
    whole = total(used)
    mean = op.divide(whole, n)
    apart = op.where(good, op.subtract(used, mean), zero)
    square = op.multiply(apart, apart)
    second, third, fourth = (
        op.divide(total(power), n)
        for power in (square, op.multiply(square, apart), op.multiply(square, square))
    )
    sd = op.root(second)

    # Bad pixels are put behind the good ones, where no quantile reaches.
    ordered = op.ascending(op.where(good, error, op.constant(LARGEST_FLUX)), n_pixels)
    last = op.subtract(n, one)

    position = op.multiply(last, number([0.0, 0.25, 0.5, 0.75, 1.0]))
    below = op.floor(position)
    above = op.smaller(op.add(below, one), last)
    low, high = (op.precise(op.taken(ordered, places)) for places in (below, above))
    quantiles = op.add(low, op.multiply(op.subtract(position, below), op.subtract(high, low)))
    names = ("min", "q25", "median", "q75", "max")
    by_name = {name: op.part(quantiles, 1, i, i + 1) for i, name in enumerate(names)}
    # Where all errors are equal, what is left of the powers is rounding.
    spread = op.above(by_name["max"], by_name["min"])
    by_name |= {"mean": mean, "sum": whole, "std": op.where(spread, sd, zero)}
    # Rounded to single precision, as `quality_features` are before their logarithms are taken.
    sizes = op.rounded_to_single(op.joined([by_name[name] for name in QUALITY_FEATURES[:-2]], 1))
    sizes = op.log(op.larger(sizes, number(math.exp(LEAST_LOG * QUALITY_STEP))))

    skewness = op.divide(third, positive(op.multiply(second, sd)))
    kurtosis = op.subtract(op.divide(fourth, positive(op.multiply(second, second))), number(3.0))
    shape = op.where(spread, op.joined([skewness, kurtosis], 1), zero)
    shape = op.rounded_to_single(shape)
    logs = op.log(op.add(op.absolute(shape), one))
    logs = op.where(op.above(shape, zero), logs, op.subtract(zero, logs))

    step = number(QUALITY_STEP)
    steps = op.rounded(op.divide(op.joined([sizes, logs], 1), step))
    # As the kernels keep them.
    return op.single(op.rounded_to_single(op.multiply(steps, step)))


VIEWS = {
    "quality": View(
        n_features=len(QUALITY_FEATURES),
        hidden=32,
        of_errors=True,
        of_stars=lambda _, error, good: quality_logs(error, good),
        describe=lambda op, _, error, good, n_pixels: _quality_logs(op, error, good, n_pixels),
    ),
}
"""What a second tower may see instead of the features of the first."""


def known_views() -> tuple[str, ...]:
    """Names of all that a tower may see."""
    return (FEATURES, *VIEWS)
