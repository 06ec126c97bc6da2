"""Normal equations on the device: one call, or blocks of rows streamed from the host.

Design: two slots take turns. Each has a stream, a pinned host buffer and its device twin. While the device multiplies
the rows of one slot, the host fills the other's buffer and its copy runs:

    slot 0   fill | copy | sort | multiply |       fill | copy | sort |    multiply |
    slot 1               fill | copy | sort |         multiply |       fill | copy  | …

Multiplications follow one another, by an event, whatever the slot: all add to the same float64 totals, so that the
result depends on the rows and their order alone. Memory is plain device memory and pinned host memory, never managed
memory. If device memory is short, blocks are halved down to FLOOR_ROWS rows; below that it is an error.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import cuda
from numpy.typing import NDArray

from moefast.core.errors import BackendError
from moefast.core.threads import in_threads
from moefast.kernels.cuda import gram
from moefast.kernels.cuda.binning import sort_on_device, table_size
from moefast.kernels.cuda.device import (
    DeviceMemoryError,
    PinnedMemoryError,
    current_device,
    out_of_memory,
    pinned_array,
    pinned_shortage,
    require_device,
)
from moefast.kernels.cuda.products import METHODS, choose

__all__ = ["BLOCK_ROWS", "FLOOR_ROWS", "NormalEquationsAccumulator", "Totals", "normal_equations"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

BLOCK_ROWS = 16384
"""Rows per block: 268 MB for 4096 pixels, in each of two slots, and again if noise variances come with the rows."""
FILL_ROWS = 256
"""Fewest rows that a thread of its own copies to a pinned buffer; one core alone would be slower than the products."""
FLOOR_ROWS = 1024
"""Smallest block: below it, launches would take longer than products."""


class Totals(NamedTuple):
    """Totals per group, on the host, laid out as in `moefast.experts.normal_equations.NormalEquations`.

    `count` (g,) int64; `sum_x` (g, p), `sum_y` (g,), `sum_yy` (g,), `sum_xy` (g, p), `gram` (g, p(p+1)/2: upper
    triangle, row by row) and `sum_v` (g, p), all float64.
    """

    # A tuple has a method of this name, which the totals of a fit do not need.
    count: NDArray[np.int64]  # type: ignore[assignment]
    sum_x: F64
    sum_y: F64
    sum_yy: F64
    sum_xy: F64
    gram: F64
    sum_v: F64


def normal_equations(
    x: F32,
    y: F64,
    group: NDArray[np.integer],
    n_groups: int,
    *,
    out: tuple[NDArray[np.int64], F64, F64, F64, F64, F64] | None = None,
    method: str = "auto",
) -> tuple[NDArray[np.int64], F64, F64, F64, F64, F64]:
    """n, Σx, Σy, Σy², Σxy and Σxxᵀ per group of rows; see `moefast.kernels.normal_equations`.

    Launch: per block of rows, `sort_on_device`, then the kernels of `moefast.kernels.cuda.gram`.

    Parameters
    ----------
    x, y, group, n_groups, out
        As the CPU twin.
    method : "auto", "numba", "tensor" or "cublas"
        See `moefast.kernels.cuda.products`.

    Raises
    ------
    ValueError
        As the CPU twin.
    BackendError
        There is no usable device, the method cannot be used, or device memory is too small.
    """
    if x.ndim != 2:
        raise ValueError(f"x (n, p) expected; found {x.shape}")
    block = min(BLOCK_ROWS, max(len(x), 1))
    accumulator = NormalEquationsAccumulator(x.shape[1], n_groups, method=method, block_rows=block)
    accumulator.add_block(x, y, group)
    found = accumulator.fetch()
    if out is None:
        return found[:6]
    for total, part in zip(out, found[:6], strict=True):
        np.add(total, part, out=total)
    return out


class NormalEquationsAccumulator:
    """Totals of the normal equations on the device, to which blocks of rows from the host are added.

    Parameters
    ----------
    n_pixels : int
    n_groups : int
        Groups of rows, for instance bins × folds.
    method : "auto", "numba", "tensor" or "cublas"
        How Σxxᵀ is made; `choice` says which was taken and why.
    with_variance : bool
        Whether blocks come with noise variances.
    block_rows : int
        Rows per block at most; halved while device memory is too small for two blocks.

    Attributes
    ----------
    choice : Choice
    block_rows : int
        The rows per block that memory allows.

    Raises
    ------
    BackendError
        There is no usable device or the method cannot be used.
    DeviceMemoryError
        Device memory is too small for the totals and two blocks of FLOOR_ROWS rows.
    PinnedMemoryError
        Pinned memory of the host is too small for two such blocks.

    Examples
    --------
    >>> totals = NormalEquationsAccumulator(4096, 9)     # doctest: +SKIP
    >>> for x, y, group in blocks:                       # doctest: +SKIP
    ...     totals.add_block(x - reference, y, group)
    >>> count, sum_x, *rest = totals.fetch()             # doctest: +SKIP
    """

    def __init__(
        self,
        n_pixels: int,
        n_groups: int,
        *,
        method: str = "auto",
        with_variance: bool = False,
        block_rows: int = BLOCK_ROWS,
    ) -> None:
        if n_pixels < 1 or n_groups < 1 or block_rows < 1:
            raise ValueError(
                f"n_pixels, n_groups and block_rows must be at least 1; found {n_pixels}, {n_groups}, {block_rows}"
            )
        require_device()
        self._device = current_device()
        self.n_pixels, self.n_groups, self.with_variance = n_pixels, n_groups, with_variance
        self.choice = choose(method, n_pixels)
        self.block_rows = block_rows
        self._totals: Any = None
        self._slots: Any = None
        self._products: Any = None
        floor = min(FLOOR_ROWS, block_rows)
        while True:
            try:
                self._allocate()
                break
            except Exception as error:
                if not out_of_memory(error):
                    raise
                if self.block_rows == floor:
                    raise self._shortage(error) from error
            # Outside the handler, whose traceback keeps the arrays that were allocated alive.
            self._totals = self._slots = self._products = None
            self.block_rows = max(floor, self.block_rows // 2)
        self._turn = 0
        self._multiplied: Any = None

    def _allocate(self) -> None:
        g, p, rows = self.n_groups, self.n_pixels, self.block_rows
        self._totals = _DeviceTotals(g, p)
        self._slots = [_Slot(rows, p, g, self.with_variance) for _ in range(2)]
        self._products = METHODS[self.choice.method](rows, p, g)

    def _shortage(self, error: Exception) -> BackendError:
        g, p = self.n_groups, self.n_pixels
        totals = 8 * g * (p * (p + 1) // 2 + 3 * p + 3)
        rows = 2 * 4 * p * self.block_rows * (2 if self.with_variance else 1)
        if isinstance(error, PinnedMemoryError):
            return pinned_shortage(rows, f"two blocks of {self.block_rows} rows", error)
        free = cuda.current_context().get_memory_info().free
        return DeviceMemoryError(
            f"device memory: {totals / 1e9:.2f} GB for the totals of {g} groups of {p} pixels and {rows / 1e9:.2f} GB "
            f"for two blocks of {self.block_rows} rows are needed, {free / 1e9:.2f} GB are free; end other programs "
            "on the device, use fewer groups, or backend cpu"
        )

    def add_block(
        self, x: F32, y: NDArray, group: NDArray[np.integer], variance: NDArray | None = None
    ) -> None:
        """Add rows; returns when the last of them are in a pinned buffer, not when they are multiplied.

        Parameters
        ----------
        x : array of shape (n, p), float32
            Rows, with a fixed reference subtracted; any n, any layout.
        y : array of shape (n,)
        group : array of shape (n,), integer in 0 … n_groups−1
        variance : array of shape (n, p), only and always if made `with_variance`
            Noise variance σ² of each pixel.

        Raises
        ------
        ValueError
            Shapes that do not fit, or a group outside its range; nothing has been added then.
        """
        n = len(x)
        if x.shape != (n, self.n_pixels) or y.shape != (n,) or group.shape != (n,):
            raise ValueError(
                f"x (n, {self.n_pixels}), y (n,), group (n,) expected; found {x.shape}, {y.shape}, {group.shape}"
            )
        if (variance is not None) != self.with_variance or (
            variance is not None and variance.shape != x.shape
        ):
            expected = f"of shape {x.shape}" if self.with_variance else "None (with_variance was not set)"
            found = "None" if variance is None else f"shape {variance.shape}"
            raise ValueError(f"variance: {expected} expected; found {found}")
        if n and not 0 <= group.min() <= group.max() < self.n_groups:
            raise ValueError(f"bins must lie in 0 … {self.n_groups - 1}; found {group.min()} … {group.max()}")
        for start in range(0, n, self.block_rows):
            here = slice(start, min(start + self.block_rows, n))
            # The caller may be a thread whose own device is another one.
            with self._device:
                self._add(x[here], y[here], group[here], None if variance is None else variance[here])

    def _add(self, x: F32, y: NDArray, group: NDArray[np.integer], variance: NDArray | None) -> None:
        slot = self._slots[self._turn]
        self._turn = 1 - self._turn
        # The block before last has left this slot.
        slot.stream.synchronize()
        arrays = slot.load(x, y, group, variance)
        sort_on_device(
            arrays["group"], self.n_groups, slot.counts, slot.offsets, arrays["order"], slot.stream
        )
        if self._multiplied is not None:
            self._multiplied.wait(slot.stream)
        order, stream, p = arrays["order"], slot.stream, self.n_pixels
        totals, threads = self._totals, gram.SUM_THREADS
        columns = (-(-p // gram.COLUMNS), self.n_groups), (gram.COLUMNS, gram.LANES)
        gram.add_labels[self.n_groups, threads, stream](
            arrays["y"], order, slot.offsets, totals.count, totals.sum_y, totals.sum_yy
        )
        gram.add_columns[*columns, stream](
            arrays["x"], arrays["y"], order, slot.offsets, totals.sum_x, totals.sum_xy
        )
        if variance is not None:
            gram.add_variances[*columns, stream](arrays["variance"], order, slot.offsets, totals.sum_v)
        bounds = np.concatenate([[0], np.cumsum(np.bincount(group, minlength=self.n_groups))])
        self._products.add(arrays["x"], order, slot.offsets, bounds, totals.gram, stream)
        self._multiplied = slot.done
        self._multiplied.record(stream)

    def fetch(self) -> Totals:
        """Wait for the rows added so far and copy their totals to the host; more rows may be added later."""
        with self._device:
            for slot in self._slots:
                slot.stream.synchronize()
            return Totals(*(getattr(self._totals, name).copy_to_host() for name in Totals._fields))


class _DeviceTotals:
    """The arrays of `Totals` on the device, zero at first."""

    def __init__(self, g: int, p: int) -> None:
        self.count = cuda.to_device(np.zeros(g, np.int64))
        self.sum_y = _zeros((g,))
        self.sum_yy = _zeros((g,))
        self.sum_x = _zeros((g, p))
        self.sum_xy = _zeros((g, p))
        self.sum_v = _zeros((g, p))
        self.gram = _zeros((g, p * (p + 1) // 2))


def _zeros(shape: tuple[int, ...]) -> Any:
    array = cuda.device_array(shape, np.float64)
    gram.set_zero(array, cuda.default_stream())
    # The slots' streams do not wait for the default stream.
    cuda.synchronize()
    return array


class _Slot:
    """One of two places that blocks of rows pass through: pinned buffers, device buffers, a stream and an event."""

    def __init__(self, rows: int, p: int, g: int, with_variance: bool) -> None:
        kinds: dict[str, tuple[tuple[int, ...], Any]] = {
            "x": ((rows, p), np.float32),
            "y": ((rows,), np.float64),
            "group": ((rows,), np.int64),
        }
        if with_variance:
            kinds["variance"] = ((rows, p), np.float32)
        self.device = {name: cuda.device_array(*kind) for name, kind in kinds.items()}
        self.order = cuda.device_array(rows, np.int64)
        self.counts = cuda.device_array(table_size(rows, g), np.int64)
        self.offsets = cuda.device_array(g + 1, np.int64)
        self.host = {name: pinned_array(*kind) for name, kind in kinds.items()}
        self.stream = cuda.stream()
        self.done = cuda.event()

    def load(
        self, x: F32, y: NDArray, group: NDArray[np.integer], variance: NDArray | None
    ) -> dict[str, Any]:
        """Fill the pinned buffers and start their copies; the device arrays cut to the rows there are."""
        rows = {"x": x, "y": y, "group": group}
        if variance is not None:
            rows["variance"] = variance
        m = len(x)

        def fill(first: int, stop: int) -> None:
            for name, values in rows.items():
                self.host[name][first:stop] = values[first:stop]

        in_threads(m, fill, least=FILL_ROWS)
        found = {"order": self.order[:m]}
        for name in rows:
            found[name] = self.device[name][:m]
            found[name].copy_to_device(self.host[name][:m], stream=self.stream)
        return found
