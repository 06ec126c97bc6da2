"""Sufficient statistics of linear regression: the training data of everything linear.

Design: for rows x (a fixed reference spectrum subtracted), target y, noise variance v, bin k and fold f, the totals
n, Σx, Σy, Σy², Σxy, Σxxᵀ, Σv are all that ridge regression, PCA, whitening, the α path, every noise level and
hold-out errors ever need. Totals of disjoint rows add, so shards, nodes and nights merge with `+`, and a fold is left
out with `-`. Products are float32 BLAS over a few thousand rows, totals float64. Rows are gathered in a buffer and
multiplied when it is full: the result does not depend on the blocks in which they arrived.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moefast.errors import ModelError
from moefast.kernels import add_rows, normal_equations, packed_size, unpack_symmetric

__all__ = ["Moments", "NormalEquations"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

SCHEMA = 1
WHAT = "moefast normal equations"
BUFFER_ROWS = 16384
LARGEST = 1e15
"""Largest |value| of a row: squares of larger ones overflow float32 sums."""
_TOTALS = ("count", "sum_x", "sum_y", "sum_yy", "sum_xy", "gram", "sum_v")


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
    """

    def __init__(self, reference: NDArray, n_bins: int = 1, n_folds: int = 1) -> None:
        self.reference: F64 = np.array(reference, np.float64)
        p, shape = self.reference.size, (n_bins, n_folds)
        self.count: NDArray[np.int64] = np.zeros(shape, np.int64)
        self.sum_x: F64 = np.zeros((*shape, p))
        self.sum_y: F64 = np.zeros(shape)
        self.sum_yy: F64 = np.zeros(shape)
        self.sum_xy: F64 = np.zeros((*shape, p))
        self.gram: F64 = np.zeros((*shape, packed_size(p)))
        self.sum_v: F64 = np.zeros((*shape, p))
        self._rows: F32 | None = None
        self._labels: F64 = np.empty(BUFFER_ROWS)
        self._groups: NDArray[np.int64] = np.empty(BUFFER_ROWS, np.int64)
        self._waiting = 0

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
        """Rows seen, those still in the buffer included."""
        return int(self.count.sum()) + self._waiting

    @property
    def nbytes(self) -> int:
        """Memory of the totals in bytes."""
        return sum(getattr(self, name).nbytes for name in _TOTALS)

    @staticmethod
    def memory(n_pixels: int, n_bins: int, n_folds: int) -> int:
        """Bytes that totals of this size take: 67 MB per bin and fold at 4096 pixels."""
        return 8 * n_bins * n_folds * (packed_size(n_pixels) + 3 * n_pixels + 3)

    # -- rows in ------------------------------------------------------------------------------------------------

    def add(
        self,
        x: F32,
        y: NDArray,
        variance: NDArray | None = None,
        bins: NDArray | None = None,
        folds: NDArray | None = None,
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

        Raises
        ------
        ValueError
            Shapes that do not fit, a value that is not finite or beyond ±`LARGEST`, or a bin or fold out of range;
            nothing has been added then.
        """
        n = len(x)
        if (
            x.shape != (n, self.n_pixels)
            or y.shape != (n,)
            or (variance is not None and variance.shape != x.shape)
        ):
            raise ValueError(f"rows of {self.n_pixels} pixels expected; found x {x.shape}, y {y.shape}")
        k = np.zeros(n, np.int64) if bins is None else np.asarray(bins, np.int64)
        f = np.zeros(n, np.int64) if folds is None else np.asarray(folds, np.int64)
        if n and not (0 <= k.min() <= k.max() < self.n_bins and 0 <= f.min() <= f.max() < self.n_folds):
            raise ValueError(f"bins must lie in 0…{self.n_bins - 1} and folds in 0…{self.n_folds - 1}")
        group = k * self.n_folds + f
        for name, values in (("flux", x), ("label", y), ("variance", variance)):
            # Refused before anything is changed; comparisons with NaN are false.
            if n and values is not None and not (values.min() > -LARGEST and values.max() < LARGEST):
                raise ValueError(f"a row with NaN, infinite or absurdly large {name} cannot be added")
        if variance is not None:
            add_rows(variance, group, self.sum_v.reshape(-1, self.n_pixels))
        if self._rows is None:
            self._rows = np.empty((BUFFER_ROWS, self.n_pixels), np.float32)
        reference = self.reference.astype(np.float32)
        done = 0
        while done < n:
            m = min(n - done, BUFFER_ROWS - self._waiting)
            here = slice(self._waiting, self._waiting + m)
            np.subtract(x[done : done + m], reference, out=self._rows[here])
            self._labels[here] = y[done : done + m]
            self._groups[here] = group[done : done + m]
            self._waiting += m
            done += m
            if self._waiting == BUFFER_ROWS:
                self._flush()

    def _flush(self) -> None:
        if self._rows is None or self._waiting == 0:
            return
        m, self._waiting = self._waiting, 0
        out = (
            self.count.reshape(-1),
            self.sum_x.reshape(-1, self.n_pixels),
            self.sum_y.reshape(-1),
            self.sum_yy.reshape(-1),
            self.sum_xy.reshape(-1, self.n_pixels),
            self.gram.reshape(self.count.size, -1),
        )
        normal_equations(self._rows[:m], self._labels[:m], self._groups[:m], self.count.size, out=out)

    def finish(self) -> NormalEquations:
        """Multiply the rows still waiting and free the buffer; more rows may be added later."""
        self._flush()
        self._rows = None
        return self

    # -- arithmetic ---------------------------------------------------------------------------------------------

    def _combine(self, other: NormalEquations, sign: int) -> NormalEquations:
        self._flush()
        other._flush()
        if not np.array_equal(self.reference, other.reference):
            raise ValueError("normal equations with different reference spectra cannot be combined")
        if self.count.shape != other.count.shape:
            raise ValueError(
                f"normal equations of {self.count.shape} and {other.count.shape} bins and folds cannot be combined"
            )
        result = _like(self, {})
        for name in _TOTALS:
            a, b = getattr(self, name), getattr(other, name)
            setattr(result, name, a + b if sign > 0 else a - b)
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
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                np.savez(
                    file,
                    header=np.frombuffer(header.encode(), np.uint8),
                    reference=self.reference,
                    **{name: getattr(self, name) for name in _TOTALS},
                )
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> NormalEquations:
        """Read totals written by `save`.

        Raises
        ------
        ModelError
            The file is not such a file, is cut off, or has another schema.
        """
        try:
            # Opened here, because np.load leaves the file open if it is no archive.
            with Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                header = json.loads(file["header"].tobytes())
                if header["what"] != WHAT:
                    raise ValueError(f"it holds {header['what']!r}")
                if header["schema"] != SCHEMA:
                    raise ModelError(f"{path}: schema {header['schema']} found, {SCHEMA} expected; fit again")
                reference = file["reference"]
                result = cls(reference, *file["count"].shape)
                for name in _TOTALS:
                    array, expected = file[name], getattr(result, name)
                    if array.shape != expected.shape or array.dtype != expected.dtype:
                        raise ValueError(f"{name} is {array.dtype} of shape {array.shape}")
                    setattr(result, name, array)
        # A cut-off archive raises BadZipFile, a lone .npy array TypeError.
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise ModelError(
                f"{path}: not a complete file of normal equations ({error}); write it again"
            ) from error
        return result


def _fill(target: NormalEquations, reference: F64, arrays: dict[str, NDArray]) -> None:
    target.reference = reference
    target._rows, target._waiting = None, 0
    target._labels, target._groups = np.empty(BUFFER_ROWS), np.empty(BUFFER_ROWS, np.int64)
    for name, value in arrays.items():
        setattr(target, name, value)


def _like(source: NormalEquations, arrays: dict[str, NDArray]) -> NormalEquations:
    result = NormalEquations.__new__(NormalEquations)
    _fill(result, source.reference, arrays)
    return result
