"""Sufficient statistics of linear regression: the training data of everything linear.

Design: for rows x (a fixed reference spectrum subtracted), target y, noise variance v, bin k and fold f, the totals
n, Σx, Σy, Σy², Σxy, Σxxᵀ, Σv are all that ridge regression, PCA, whitening, the α path, every noise level and
hold-out errors ever need. Totals of disjoint rows add, so shards, nodes and nights merge with `+`, and a fold is left
out with `-`. Products are float32 BLAS over 4096 rows at most, totals float64. Each bin and fold gathers its rows
in a buffer of its own, the reference subtracted on the way, and multiplies them when it is full: every row is written
once, and the result depends neither on the blocks in which rows arrived nor on the number of cores. With scales, totals
are sums of units, runs of rows that end with `end_unit`, and have the same bits in whatever order and in how many parts
these are added (`moefast.experts.exact_sums`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moefast.core.archives import read_archive
from moefast.core.atomic import atomic_file
from moefast.core.errors import ModelError
from moefast.experts.exact_sums import Scales, rounded
from moefast.kernels import GRAM_ROWS, add_gram, all_within, collect_rows, packed_size, unpack_symmetric

__all__ = ["Moments", "NormalEquations", "checked_groups"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

SCHEMA = 1
WHAT = "moefast normal equations"
BUFFER_ROWS = GRAM_ROWS
"""Rows of each bin and fold that are gathered before they are multiplied, if memory allows."""
BUFFER_BYTES = 2**30
"""Memory for the rows that wait, of all bins and folds together."""
LARGEST = 1e15
"""Largest |value| of a row: squares of larger ones overflow float32 sums."""
_TOTALS = ("count", "sum_x", "sum_y", "sum_yy", "sum_xy", "gram", "sum_v")
_SUMS = ("sum_x", "sum_y", "sum_yy", "sum_xy", "sum_v")
"""Totals to which rows are added one by one."""


@dataclass(frozen=True)
class Moments:
    """Centred second moments of one set of rows: what a linear solver needs.

    With x̄ = Σx/n and ȳ = Σy/n (x relative to the reference):

    Attributes
    ----------
    n : int
    mean_x : array of shape (p,), float64
    mean_y : float
    gram : array of shape (p, p), float64
        G = Σ(x − x̄)(x − x̄)ᵀ.
    cross : array of shape (p,), float64
        b = Σ(x − x̄)(y − ȳ).
    sum_yy : float
        Σ(y − ȳ)².
    variance : array of shape (p,), float64
        Mean noise variance Σv/n.
    """

    n: int
    mean_x: F64
    mean_y: float
    gram: F64
    cross: F64
    sum_yy: float
    variance: F64

    def sse(self, weights: F64, intercept: float, noise: float | F64 = 0.0) -> float:
        """Σ(y − wᵀx − c)² over these rows, plus n Σ_j noise_j w_j² for noise that the rows do not contain.

        SSE = wᵀGw − 2wᵀb + Σ(y − ȳ)² + n (ȳ − wᵀx̄ − c)²; no row is looked at again.
        """
        offset = self.mean_y - weights @ self.mean_x - intercept
        value = weights @ (self.gram @ weights) - 2 * weights @ self.cross + self.sum_yy
        return float(value + self.n * (offset * offset + np.sum(noise * weights * weights)))


class NormalEquations:
    """Totals per bin and fold of n, Σx, Σy, Σy², Σxy, Σxxᵀ and Σv, in float64.

    Parameters
    ----------
    reference : array of shape (p,), float64
        Fixed spectrum subtracted from every row before it is multiplied: Σxxᵀ of flux near 1 is badly conditioned.
        Totals can be merged only if they share it.
    n_bins, n_folds : int
    scales : Scales, optional
        Makes totals of units exact: see `end_unit`.
    """

    def __init__(
        self, reference: NDArray, n_bins: int = 1, n_folds: int = 1, *, scales: Scales | None = None
    ) -> None:
        self.reference: F64 = np.array(reference, np.float64)
        self.scales = scales
        p, shape = self.reference.size, (n_bins, n_folds)
        self.count: NDArray[np.int64] = np.zeros(shape, np.int64)
        self.sum_x: F64 = np.zeros((*shape, p))
        self.sum_y: F64 = np.zeros(shape)
        self.sum_yy: F64 = np.zeros(shape)
        self.sum_xy: F64 = np.zeros((*shape, p))
        self.gram: F64 = np.zeros((*shape, packed_size(p)))
        self.sum_v: F64 = np.zeros((*shape, p))
        self._rows: F32 | None = None
        self._waiting: NDArray[np.int64] = np.zeros(n_bins * n_folds, np.int64)
        self._unit = {} if scales is None else {name: np.zeros_like(getattr(self, name)) for name in _SUMS}

    @property
    def n_pixels(self) -> int:
        """Number of columns p of a row."""
        return self.reference.size

    @property
    def n_bins(self) -> int:
        """Number of bins."""
        return self.count.shape[0]

    @property
    def n_folds(self) -> int:
        """Number of folds."""
        return self.count.shape[1]

    @property
    def n_rows(self) -> int:
        """Rows seen."""
        return int(self.count.sum())

    @classmethod
    def of_totals(cls, reference: F64, shape: tuple[int, int], totals: dict[str, NDArray]) -> NormalEquations:
        """From totals that were gathered elsewhere: arrays by name, one entry per group bin · n_folds + fold.

        Raises
        ------
        ValueError
            An array has another shape or type.
        """
        result = cls(reference, *shape)
        for name in _TOTALS:
            own = getattr(result, name)
            setattr(result, name, _expected(name, totals[name].reshape(own.shape), own))
        return result

    @property
    def nbytes(self) -> int:
        """Memory of the totals in bytes."""
        return sum(getattr(self, name).nbytes for name in _TOTALS)

    @staticmethod
    def memory(n_pixels: int, n_bins: int, n_folds: int) -> int:
        """Bytes while rows are added: totals, 67 MB per bin and fold at 4096 pixels, and at most 1 GiB of rows."""
        groups = n_bins * n_folds
        totals = 8 * groups * (packed_size(n_pixels) + 3 * n_pixels + 3)
        return totals + 4 * groups * _buffer_rows(n_pixels, groups) * n_pixels

    # -- rows in ------------------------------------------------------------------------------------------------

    def add(
        self,
        x: F32,
        y: NDArray,
        variance: NDArray | None = None,
        bins: NDArray | None = None,
        folds: NDArray | None = None,
        *,
        error: NDArray | None = None,
        clipped: bool = False,
    ) -> None:
        """Add rows.

        Parameters
        ----------
        x : array of shape (n, p), float32
            Flux as observed or clean; the reference is subtracted here.
        y : array of shape (n,)
        variance : array of shape (n, p), optional
            Noise variance σ² of each pixel; zero if absent.
        bins, folds : array of shape (n,), integer, optional
            0 if absent.
        error : array of shape (n, p), optional
            Noise 1σ of each pixel, instead of its variance: saves the caller an array of squares.
        clipped : bool
            Count negative flux as zero.

        Raises
        ------
        ValueError
            Shapes that do not fit, a value that is not finite or beyond ±`LARGEST`, or a bin or fold out of range;
            nothing has been added then.
        """
        n = len(x)
        # Refused before anything is changed.
        group = checked_groups(self.n_pixels, self.count.shape, x, y, variance, bins, folds, error)
        if self._rows is None:
            self._rows = self._buffers()
        reference = self.reference.astype(np.float32)
        if self.scales is not None and not self._unit:
            self._unit = {name: np.zeros_like(getattr(self, name)) for name in _SUMS}
        sums = self._unit or {name: getattr(self, name) for name in _SUMS}
        totals = (
            self.count.reshape(-1),
            sums["sum_x"].reshape(-1, self.n_pixels),
            sums["sum_y"].reshape(-1),
            sums["sum_yy"].reshape(-1),
            sums["sum_xy"].reshape(-1, self.n_pixels),
            sums["sum_v"].reshape(-1, self.n_pixels),
        )
        done = 0
        while done < n:
            done = collect_rows(
                x, y, group, done, reference, self._rows, self._waiting, totals,
                variance=variance, error=error, floor=0 if clipped else -np.inf,
            )  # fmt: skip
            for full in np.flatnonzero(self._waiting == self._rows.shape[1]):
                self._multiply(int(full))

    def _multiply(self, group: int) -> None:
        """Add the products of the rows that wait in a group's buffer, and empty it."""
        if self._rows is not None and self._waiting[group]:
            add_gram(
                self._rows[group, : self._waiting[group]],
                self.gram.reshape(self.count.size, -1)[group],
                scales=None if self.scales is None else self.scales.x,
            )
        self._waiting[group] = 0

    def _flush(self) -> None:
        for group in range(self.count.size):
            self._multiply(group)
        if self.scales is not None and self._unit:
            x, v, y, one = self.scales
            scale = {"sum_x": x * one, "sum_y": y * one, "sum_yy": y * y, "sum_xy": x * y, "sum_v": v}
            for name, sums in self._unit.items():
                total = getattr(self, name)
                total += rounded(sums, scale[name])
                sums[:] = 0

    def end_unit(self) -> None:
        """Add the rows since the last unit ended to the totals.

        With scales, totals of the same units have the same bits, in whatever order and by how many processes they were
        gathered and merged, as long as `is_exact`.
        """
        self._flush()

    @property
    def is_exact(self) -> bool:
        """Whether all totals are within the scales, so that the order of units did not matter."""
        self._flush()
        if self.scales is None:
            return False
        x, v, y, one = self.scales
        diagonal = np.cumsum(np.arange(self.n_pixels, 0, -1)) - np.arange(self.n_pixels, 0, -1)
        within = (
            self.gram[..., diagonal] <= x * x, self.sum_v <= v, self.sum_yy <= y * y, self.count <= one * one,
        )  # fmt: skip
        return all(bool(one.all()) for one in within)

    def finish(self) -> NormalEquations:
        """Multiply the rows still waiting, end the unit and free the buffers; more rows may be added later."""
        self._flush()
        self._rows, self._unit = None, {}
        return self

    def state(self) -> dict[str, NDArray]:
        """Everything by name, the rows still waiting included: `from_state` goes on from it to the last bit.

        Arrays are views: use them before the next row is added.
        """
        arrays: dict[str, NDArray] = {"reference": self.reference, "waiting": self._waiting}
        arrays |= {name: getattr(self, name) for name in _TOTALS}
        if self._rows is not None:
            arrays |= {f"rows/{g}": self._rows[g, : self._waiting[g]] for g in np.flatnonzero(self._waiting)}
        if self.scales is not None:
            arrays["scales"] = self.scales.array()
            unit = self._unit or {name: np.zeros_like(getattr(self, name)) for name in _SUMS}
            arrays |= {f"unit/{name}": sums for name, sums in unit.items()}
        return arrays

    @classmethod
    def from_state(cls, read: Callable[[str], NDArray], *, exact: bool = False) -> NormalEquations:
        """Go on from what `state` gave; `read` gives the array of a name. `exact` says that it had scales.

        Raises
        ------
        ValueError
            An array has another shape or type than such a state has.
        """
        reference, count = read("reference"), read("count")
        if reference.ndim != 1 or reference.dtype != np.float64 or count.ndim != 2:
            raise ValueError(f"reference {reference.shape} and count {count.shape} are not those of a state")
        scales = None
        if exact:
            both = _expected("scales", read("scales"), np.zeros(2 * len(reference) + 2))
            scales = Scales.of_array(both)
        result = cls(reference, *count.shape, scales=scales)
        for name in _TOTALS:
            setattr(result, name, _expected(name, read(name), getattr(result, name)))
        for name, sums in result._unit.items():
            result._unit[name] = _expected(name, read(f"unit/{name}"), sums)
        result._waiting = _expected("waiting", read("waiting"), result._waiting)
        if result._waiting.any():
            result._rows = result._buffers()
            if not (result._waiting >= 0).all() or result._waiting.max() >= result._rows.shape[1]:
                raise ValueError(f"more than {result._rows.shape[1]} rows of a group are waiting")
            for g in np.flatnonzero(result._waiting):
                here = result._rows[g, : result._waiting[g]]
                here[:] = _expected("rows", read(f"rows/{g}"), here)
        return result

    def _buffers(self) -> F32:
        n_groups = self.count.size
        return np.empty((n_groups, _buffer_rows(self.n_pixels, n_groups), self.n_pixels), np.float32)

    # -- arithmetic ---------------------------------------------------------------------------------------------

    def _check_alike(self, other: NormalEquations) -> None:
        if not np.array_equal(self.reference, other.reference):
            raise ValueError("normal equations with different reference spectra cannot be combined")
        if self.count.shape != other.count.shape:
            raise ValueError(
                f"normal equations of {self.count.shape} and {other.count.shape} bins and folds cannot be combined"
            )
        if (self.scales is None) != (other.scales is None) or (
            self.scales is not None
            and other.scales is not None
            and not np.array_equal(self.scales.array(), other.scales.array())
        ):
            raise ValueError("normal equations with different scales cannot be combined")

    def include(self, other: NormalEquations, add_gram: Callable[[F64], None] | None = None) -> None:
        """Add the totals of another set of rows in place: `+` without the memory for a third.

        Parameters
        ----------
        other : NormalEquations
        add_gram : callable, optional
            Adds the products of `other` to `gram`, where `other` does not hold them; it may raise.

        Raises
        ------
        ValueError
            Its reference, bins, folds or scales are others.
        """
        self._check_alike(other)
        self._flush()
        other._flush()
        for name in _TOTALS:
            total = getattr(self, name)
            if name == "gram" and add_gram is not None:
                add_gram(total)
            else:
                total += getattr(other, name)

    def _combine(self, other: NormalEquations, sign: int) -> NormalEquations:
        self._check_alike(other)
        self._flush()
        other._flush()
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in _TOTALS}
        result = _like(self, {name: a + b if sign > 0 else a - b for name, (a, b) in pairs.items()})
        if (result.count < 0).any():
            raise ValueError(
                "cannot subtract more rows than there are: the second set is no part of the first"
            )
        return result

    def __add__(self, other: NormalEquations) -> NormalEquations:
        return self._combine(other, +1)

    def __sub__(self, other: NormalEquations) -> NormalEquations:
        return self._combine(other, -1)

    def fold(self, index: int) -> NormalEquations:
        """The totals of one fold (a copy), with all its bins."""
        self._flush()
        return _like(self, {name: getattr(self, name)[:, [index]] for name in _TOTALS})

    def bin(self, index: int) -> NormalEquations:
        """The totals of one bin (a copy), with all its folds."""
        self._flush()
        return _like(self, {name: getattr(self, name)[[index]] for name in _TOTALS})

    def pooled(self) -> NormalEquations:
        """All bins and folds added up: the statistics of the global fit."""
        self._flush()
        return _like(self, {name: getattr(self, name).sum((0, 1), keepdims=True) for name in _TOTALS})

    def transform(self, basis: F64) -> NormalEquations:
        """The totals of z = Tᵀx for a basis T of shape (p, r): linear maps of rows are linear maps of totals.

        Noise is kept as the diagonal of TᵀΣvT. The reference of the result is zero: z is relative to this reference.
        """
        self._flush()
        r = basis.shape[1]
        upper = np.triu_indices(r)
        result = NormalEquations(np.zeros(r), self.n_bins, self.n_folds)
        for name in ("count", "sum_y", "sum_yy"):
            setattr(result, name, getattr(self, name).copy())
        result.sum_x = self.sum_x @ basis
        result.sum_xy = self.sum_xy @ basis
        result.sum_v = self.sum_v @ basis**2
        for cell in np.ndindex(*self.count.shape):
            if self.count[cell]:
                gram = unpack_symmetric(self.gram[cell], self.n_pixels)
                result.gram[cell] = (basis.T @ (gram @ basis))[upper]
        return result

    def moments(
        self, bins: int | None = None, without_fold: int | None = None, fold: int | None = None
    ) -> Moments:
        """Centred moments of a bin (None: all) over all folds, one fold, or all but one.

        One dense matrix is made, whatever the number of bins and folds.

        Raises
        ------
        ValueError
            The selection holds no rows.
        """
        self._flush()
        chosen = range(self.n_bins) if bins is None else [bins]
        folds = [f for f in range(self.n_folds) if (fold is None or f == fold) and f != without_fold]
        p, n = self.n_pixels, 0
        sum_x, sum_xy, sum_v, packed = np.zeros(p), np.zeros(p), np.zeros(p), np.zeros(packed_size(p))
        sum_y = sum_yy = 0.0
        for k in chosen:
            for f in folds:
                n += int(self.count[k, f])
                sum_x += self.sum_x[k, f]
                sum_xy += self.sum_xy[k, f]
                sum_v += self.sum_v[k, f]
                packed += self.gram[k, f]
                sum_y += self.sum_y[k, f]
                sum_yy += self.sum_yy[k, f]
        if n == 0:
            raise ValueError(f"bin {bins}, folds {folds}: no rows, so no moments")
        mean_x, mean_y = sum_x / n, float(sum_y) / n
        gram = unpack_symmetric(packed, p)
        del packed
        root = math.sqrt(n) * mean_x
        gram -= np.multiply.outer(root, root)
        return Moments(
            n, mean_x, mean_y, gram, sum_xy - mean_x * float(sum_y), float(sum_yy) - n * mean_y**2, sum_v / n
        )

    # -- files --------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the totals as one .npz (no pickle); the final name is absent or complete."""
        self._flush()
        header = json.dumps({"schema": SCHEMA, "what": WHAT})
        with atomic_file(path) as partial, partial.open("wb") as file:
            np.savez(
                file,
                header=np.frombuffer(header.encode(), np.uint8),
                reference=self.reference,
                **{name: getattr(self, name) for name in _TOTALS},
            )

    @classmethod
    def load(cls, path: str | Path) -> NormalEquations:
        """Read totals written by `save`.

        Raises
        ------
        ModelError
            The file is not such a file, is cut off, or has another schema.
        """
        try:
            arrays = read_archive(Path(path))
            header = json.loads(arrays["header"].tobytes())
            if header["what"] != WHAT:
                raise ValueError(f"it holds {header['what']!r}")
            if header["schema"] != SCHEMA:
                raise ModelError(f"{path}: schema {header['schema']} found, {SCHEMA} expected; fit again")
            result = cls(arrays["reference"], *arrays["count"].shape)
            for name in _TOTALS:
                setattr(result, name, _expected(name, arrays[name], getattr(result, name)))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{path}: not a complete file of normal equations ({error}); write it again"
            ) from error
        return result


def checked_groups(
    n_pixels: int,
    shape: tuple[int, ...],
    x: NDArray,
    y: NDArray,
    variance: NDArray | None,
    bins: NDArray | None,
    folds: NDArray | None,
    error: NDArray | None,
) -> NDArray[np.int64]:
    """Group bin · n_folds + fold of each row, if the arguments of `NormalEquations.add` are what they should be.

    Raises
    ------
    ValueError
        They are not.
    """
    n, (n_bins, n_folds) = len(x), shape
    noise = [a for a in (variance, error) if a is not None]
    if x.shape != (n, n_pixels) or y.shape != (n,) or any(a.shape != x.shape for a in noise):
        raise ValueError(f"rows of {n_pixels} pixels expected; found x {x.shape}, y {y.shape}")
    if len(noise) == 2:
        raise ValueError("variance and error say the same; give one of them")
    k = np.zeros(n, np.int64) if bins is None else np.asarray(bins, np.int64)
    f = np.zeros(n, np.int64) if folds is None else np.asarray(folds, np.int64)
    if n and not (0 <= k.min() <= k.max() < n_bins and 0 <= f.min() <= f.max() < n_folds):
        raise ValueError(f"bins must lie in 0…{n_bins - 1} and folds in 0…{n_folds - 1}")
    for name, values in (("flux", x), ("label", y[:, None]), ("variance", variance), ("error", error)):
        if values is not None and not all_within(values, -LARGEST, LARGEST):
            raise ValueError(f"a row with NaN, infinite or absurdly large {name} cannot be added")
    return k * n_folds + f


def _buffer_rows(n_pixels: int, n_groups: int) -> int:
    """Rows in the buffer of each group."""
    return max(1, min(BUFFER_ROWS, BUFFER_BYTES // (4 * n_pixels * n_groups)))


def _expected(name: str, array: NDArray, like: NDArray) -> NDArray:
    if array.shape != like.shape or array.dtype != like.dtype:
        raise ValueError(f"{name} is {array.dtype} of shape {array.shape}")
    return array


def _like(source: NormalEquations, totals: dict[str, NDArray]) -> NormalEquations:
    result = NormalEquations.__new__(NormalEquations)
    result.reference, result._rows, result.scales, result._unit = source.reference, None, source.scales, {}
    result._waiting = np.zeros(totals["count"].size, np.int64)
    for name, value in totals.items():
        setattr(result, name, value)
    return result
