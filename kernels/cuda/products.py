"""Two ways to make Σxxᵀ of the rows of each group on the device, and the choice between them.

Design: a registry of classes with one method, `add`, so that accumulator, tests and benchmark iterate over it. All add
float32 sums of at most PARTIAL_ROWS rows to the same packed float64 triangles.

    numba    `gram.add_gram`: register tiles, float32 multiply-add
    cublas   SGEMM of torch on gathered rows, block rows of the upper triangle, without TF32; needs torch with CUDA

Few pixels are few tiles, and few tiles leave most of a device idle. `numba` then cuts the rows of each group in shares
that are multiplied side by side; `cublas` multiplies as many parts of at most PARTIAL_ROWS rows at once as fit
SQUARES_BYTES, which also makes few launches, and few passes over the float64 totals: one for 8 parts of 4096 pixels.

Why parts are not longer: cuBLAS adds one row after the other. Of m rows in a float32 sum, n rows in all, the largest
of 8 million errors is 4.3 · 0.4 u m/√(3 n), u = 2⁻²⁴: 6·10⁻⁷ for m = 512 and n = 2222, and 8·10⁻⁶ where 16384 rows are
one sum; measured are 6.3·10⁻⁷ and 7.7·10⁻⁶. 10⁻⁶ for groups of a few thousand rows asks for m ≤ 800.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib import util
from typing import Any, Protocol

import numpy as np
from numba import cuda

from moefast.core.errors import BackendError
from moefast.kernels.cuda import gram

__all__ = ["METHODS", "Choice", "CublasProducts", "NumbaProducts", "Products", "choose", "multiply_upper"]

UPPER_BLOCKS = 8
"""Products that the upper triangle is made of: 8 block rows are 0.56 of the square, 4 would be 0.63. Of 16 (0.53), the
short ones leave multiprocessors without work: of eight squares of 4096 pixels in tiles of 128, 132 multiprocessors make
40 rounds with 4 or 16, and 36 with 8."""
UPPER_SIDE = 128
"""Fewest rows of such a block."""
GATHER_BLOCKS = 4096
"""Blocks along the rows of `gather_rows`, shared by the groups."""
SQUARES_BYTES = 1 << 29
"""Device memory for the products of parts: 8 of 4096 pixels."""
ENOUGH_BLOCKS = 528
"""Blocks of `add_gram` that keep a device busy: two rounds of two on each of 132 multiprocessors."""
MOST_SHARES = 128
"""Shares of a group that are multiplied side by side at most."""
TRIAL_ROWS = 4096
TRIAL_ROUNDS = 3


class Products(Protocol):
    """One way to add Σxxᵀ to packed float64 triangles."""

    name: str

    def __init__(self, rows: int, p: int, n_groups: int) -> None:
        """Allocate scratch for blocks of up to `rows` rows of `p` pixels in `n_groups` groups."""

    @staticmethod
    def missing() -> str:
        """What this method lacks here, in words; empty if it can be used."""

    def add(self, x: Any, order: Any, offsets: Any, bounds: np.ndarray, totals: Any, stream: Any) -> None:
        """Add Σxxᵀ of each group of rows, in `stream`, without waiting.

        Parameters
        ----------
        x : device array of shape (m, p), float32
        order : device array of shape (m,), int64
        offsets : device array of shape (n_groups + 1,), int64
        bounds : array of shape (n_groups + 1,), int64
            The same as `offsets`, on the host.
        totals : device array of shape (n_groups, p(p+1)/2), float64
        stream : Numba stream
        """


class NumbaProducts:
    """Register-tiled float32 multiply-add: `gram.add_gram`."""

    name = "numba"

    def __init__(self, rows: int, p: int, n_groups: int) -> None:
        self.pairs = gram.tile_pairs(p)
        self.shares = min(
            MOST_SHARES, -(-ENOUGH_BLOCKS // (self.pairs * n_groups)), max(1, rows // gram.PANEL)
        )
        if self.shares > 1:
            self.finer = cuda.device_array(n_groups * self.shares + 1, np.int64)
            self.parts = cuda.device_array((n_groups * self.shares, p * (p + 1) // 2), np.float64)

    @staticmethod
    def missing() -> str:
        """Nothing: a device is enough."""
        return ""

    def add(self, x: Any, order: Any, offsets: Any, bounds: np.ndarray, totals: Any, stream: Any) -> None:
        """See `Products.add`."""
        n_groups, threads = len(bounds) - 1, gram.SUM_THREADS
        if self.shares == 1:
            gram.add_gram[(self.pairs, n_groups), gram.THREADS, stream](x, order, offsets, totals)
            return
        gram.split_offsets[1, threads, stream](offsets, self.shares, self.finer)
        gram.set_zero(self.parts, stream)
        grid = (self.pairs, n_groups * self.shares)
        gram.add_gram[grid, gram.THREADS, stream](x, order, self.finer, self.parts)
        grid = (-(-totals.shape[1] // threads), n_groups)
        gram.add_shares[grid, threads, stream](self.parts, self.shares, totals)


class CublasProducts:
    """SGEMM of cuBLAS, called through torch, which shares the device arrays through the CUDA array interface."""

    name = "cublas"

    def __init__(self, rows: int, p: int, n_groups: int) -> None:
        # Each group is filled up to parts of one height: less than a row for each of its parts.
        parts = -(-rows // gram.PARTIAL_ROWS)
        self.together = max(1, min(parts, SQUARES_BYTES // (4 * p * p)))
        self.sorted = cuda.device_array((rows + parts + n_groups, p), np.float32)
        self.squares = cuda.device_array((self.together, p, p), np.float32)
        self.padded = cuda.device_array(n_groups + 1, np.int64)
        # For torch, "cuda" alone is a current device of its own, to which it would copy arrays of another one.
        self.place = f"cuda:{cuda.gpus.current.id}"
        self.matrices = self._matrices()

    def _matrices(self) -> tuple[Any, ...]:
        import torch

        return tuple(torch.as_tensor(array, device=self.place) for array in (self.sorted, self.squares))

    @staticmethod
    def missing() -> str:
        """Torch, or a torch that sees the device."""
        if util.find_spec("torch") is None:
            return "torch is not installed"
        import torch

        return "" if torch.cuda.is_available() else "torch sees no CUDA device"

    def _multiply(self, start: int, parts: int, height: int, stream: Any) -> None:
        """The products of some parts of equal height, from row `start` of the sorted rows on."""
        import torch

        rows, squares = self.matrices
        rows = rows[start : start + parts * height].reshape(parts, height, -1)
        allowed = torch.backends.cuda.matmul.allow_tf32
        # TF32 keeps 11 bits of each factor: far from what is promised.
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            with torch.cuda.device(self.place), torch.cuda.stream(torch.cuda.ExternalStream(int(stream))):
                multiply_upper(torch, rows, squares[:parts])
        finally:
            torch.backends.cuda.matmul.allow_tf32 = allowed

    def add(self, x: Any, order: Any, offsets: Any, bounds: np.ndarray, totals: Any, stream: Any) -> None:
        """See `Products.add`."""
        p, n_groups, threads = x.shape[1], len(bounds) - 1, gram.SUM_THREADS
        columns = -(-p // threads)
        counts = np.diff(bounds)
        parts = -(-counts // gram.PARTIAL_ROWS)
        heights = -(-counts // np.maximum(parts, 1))
        padded = np.concatenate([[0], np.cumsum(parts * heights)])
        self.padded.copy_to_device(padded, stream=stream)
        grid = (columns, min(-(-GATHER_BLOCKS // n_groups), max(len(x), 1)), n_groups)
        gram.gather_rows[grid, threads, stream](x, order, offsets, self.padded, self.sorted)
        add_squares = gram.add_squares[(columns, p), threads, stream]
        for group in range(n_groups):
            height = int(heights[group])
            for first in range(0, int(parts[group]), self.together):
                here = min(self.together, int(parts[group]) - first)
                self._multiply(int(padded[group]) + first * height, here, height, stream)
                add_squares(self.squares, here, totals[group])


def multiply_upper(torch: Any, rows: Any, squares: Any) -> None:
    """rowsᵀ rows of each part (b, m, p), on and above the diagonal of its square (b, p, p), in block rows.

    The rest of the squares is left as it was.
    """
    p = rows.shape[2]
    # Whole multiples of eight pixels, for vectors.
    side = max(UPPER_SIDE, 8 * -(-p // (8 * UPPER_BLOCKS)))
    for start in range(0, p, side):
        stop = min(start + side, p)
        left = rows[:, :, start:stop].swapaxes(1, 2)
        torch.bmm(left, rows[:, :, start:], out=squares[:, start:stop, start:])


METHODS: dict[str, type[Products]] = {
    "numba": NumbaProducts,
    "cublas": CublasProducts,
}


@dataclass(frozen=True)
class Choice:
    """The method taken, and why, in words."""

    method: str
    reason: str


_MEASURED: dict[int, Choice] = {}


def choose(method: str, p: int) -> Choice:
    """The method to use for rows of `p` pixels.

    "auto" takes the fastest of numba and cublas, measured once per process and p on TRIAL_ROWS random rows.

    Raises
    ------
    BackendError
        The method is unknown, or lacks a package.
    """
    if method not in ("auto", *METHODS):
        raise BackendError(f"method {method!r} is unknown; choose one of auto, {', '.join(METHODS)}")
    if method != "auto":
        if lack := METHODS[method].missing():
            raise BackendError(f"method {method!r} cannot be used: {lack}; use method 'numba' or 'auto'")
        return Choice(method, "as asked")
    if lack := CublasProducts.missing():
        return Choice("numba", f"cublas cannot be used: {lack}")
    if p not in _MEASURED:
        seconds = {name: _trial(METHODS[name], p) for name in ("numba", "cublas")}
        best = min(seconds, key=seconds.__getitem__)
        times = ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in seconds.items())
        _MEASURED[p] = Choice(best, f"fastest of {times} for {TRIAL_ROWS} rows of {p} pixels")
    return _MEASURED[p]


def _trial(method: type[Products], p: int) -> float:
    """Seconds of the fastest of TRIAL_ROUNDS products, after one that is not counted."""
    products = method(TRIAL_ROWS, p, 1)
    x = cuda.to_device(np.random.default_rng(0).standard_normal((TRIAL_ROWS, p), np.float32))
    order = cuda.to_device(np.arange(TRIAL_ROWS))
    bounds = np.array([0, TRIAL_ROWS])
    offsets = cuda.to_device(bounds)
    totals = cuda.device_array((1, p * (p + 1) // 2), np.float64)
    stream = cuda.stream()
    seconds = []
    for _ in range(TRIAL_ROUNDS + 1):
        cuda.synchronize()
        begin = time.perf_counter()
        products.add(x, order, offsets, bounds, totals, stream)
        cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])
