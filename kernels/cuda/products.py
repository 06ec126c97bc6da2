"""Three ways to make Σxxᵀ of the rows of each group on the device, and the choice between them.

Design: a registry of classes with one method, `add`, so that accumulator, tests and benchmark iterate over it. All add
float32 sums of at most PARTIAL_ROWS rows to the same packed float64 triangles.

    numba    `gram.add_gram`: register tiles, float32 multiply-add
    tensor   `tensor`: cuBLASDx inside a Numba kernel, two float16 numbers per pixel; needs nvmath-python
    cublas   SGEMM of torch on gathered rows, block rows of the upper triangle, without TF32; needs torch with CUDA
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib import util
from typing import Any, Protocol

import numpy as np
from numba import cuda

from moefast.errors import BackendError
from moefast.kernels.cuda import gram
from moefast.kernels.cuda.tensor import TensorProducts

__all__ = ["METHODS", "Choice", "CublasProducts", "NumbaProducts", "Products", "choose", "multiply_upper"]

UPPER_COLUMNS = 1024
"""Columns of one product of the upper triangle: four products for 4096 pixels are 0.63 of the whole square."""
GATHER_BLOCKS = 256
"""Blocks along the rows of `gather_rows`."""
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

    @staticmethod
    def missing() -> str:
        """Nothing: a device is enough."""
        return ""

    def add(self, x: Any, order: Any, offsets: Any, bounds: np.ndarray, totals: Any, stream: Any) -> None:
        """See `Products.add`."""
        gram.add_gram[(self.pairs, len(bounds) - 1), gram.THREADS, stream](x, order, offsets, totals)


class CublasProducts:
    """SGEMM of cuBLAS, called through torch, which shares the device arrays through the CUDA array interface."""

    name = "cublas"

    def __init__(self, rows: int, p: int, n_groups: int) -> None:
        self.sorted = cuda.device_array((rows, p), np.float32)
        self.square = cuda.device_array((p, p), np.float32)
        self.matrices = self._matrices()

    def _matrices(self) -> tuple[Any, Any]:
        import torch

        return torch.as_tensor(self.sorted, device="cuda"), torch.as_tensor(self.square, device="cuda")

    @staticmethod
    def missing() -> str:
        """Torch, or a torch that sees the device."""
        if util.find_spec("torch") is None:
            return "torch is not installed"
        import torch

        return "" if torch.cuda.is_available() else "torch sees no CUDA device"

    def _multiply(self, start: int, stop: int, stream: Any) -> None:
        import torch

        rows, square = self.matrices
        allowed = torch.backends.cuda.matmul.allow_tf32
        # TF32 keeps 11 bits of each factor: far from what is promised.
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            with torch.cuda.stream(torch.cuda.ExternalStream(int(stream))):
                multiply_upper(torch, rows[start:stop], square)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = allowed

    def add(self, x: Any, order: Any, offsets: Any, bounds: np.ndarray, totals: Any, stream: Any) -> None:
        """See `Products.add`."""
        p = x.shape[1]
        columns = -(-p // gram.SUM_THREADS)
        gather = gram.gather_rows[(columns, min(GATHER_BLOCKS, len(x))), gram.SUM_THREADS, stream]
        gather(x, order, self.sorted)
        add_square = gram.add_square[(columns, p), gram.SUM_THREADS, stream]
        for group in range(len(bounds) - 1):
            for start in range(bounds[group], bounds[group + 1], gram.PARTIAL_ROWS):
                self._multiply(start, min(start + gram.PARTIAL_ROWS, bounds[group + 1]), stream)
                add_square(self.square, totals[group])


def multiply_upper(torch: Any, rows: Any, square: Any) -> None:
    """rowsᵀ rows on and above the diagonal of `square`, in block rows; the rest is left as it was."""
    p = rows.shape[1]
    for start in range(0, p, UPPER_COLUMNS):
        stop = min(start + UPPER_COLUMNS, p)
        torch.mm(rows[:, start:stop].T, rows[:, start:], out=square[start:stop, start:])


METHODS: dict[str, type[Products]] = {
    "numba": NumbaProducts,
    "tensor": TensorProducts,
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

    "auto" takes the fastest of numba and cublas, measured once per process and p on TRIAL_ROWS random rows. It never
    takes "tensor", whose kernel takes minutes to build.

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
