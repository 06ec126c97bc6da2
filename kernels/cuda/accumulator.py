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

from collections.abc import Callable
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
from moefast.kernels.cuda.products import METHODS, Choice, choose

__all__ = [
    "BLOCK_ROWS",
    "FLOOR_ROWS",
    "GroupTotals",
    "NormalEquationsAccumulator",
    "Totals",
    "fitting_rows",
    "normal_equations",
    "shortage",
]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

BLOCK_ROWS = 16384
"""Rows per block: 268 MB for 4096 pixels, in each of two slots."""
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
    method : "auto", "numba" or "cublas"
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
    method : "auto", "numba" or "cublas"
        How Σxxᵀ is made; `choice` says which was taken and why.
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
        block_rows: int = BLOCK_ROWS,
    ) -> None:
        if n_pixels < 1 or n_groups < 1 or block_rows < 1:
            raise ValueError(
                f"n_pixels, n_groups and block_rows must be at least 1; found {n_pixels}, {n_groups}, {block_rows}"
            )
        require_device()
        self._device = current_device()
        self.n_pixels, self.n_groups = n_pixels, n_groups
        self.choice = choose(method, n_pixels)
        self._totals: Any = None
        self._slots: Any = None
        self.block_rows = fitting_rows(self._allocate, self._release, block_rows, self._shortage)
        self._turn = 0
        self._multiplied: Any = None

    def _allocate(self, rows: int) -> None:
        self._totals = GroupTotals(rows, self.n_pixels, self.n_groups, self.choice)
        self._slots = [_Slot(rows, self.n_pixels, self.n_groups) for _ in range(2)]

    def _release(self) -> None:
        self._totals = self._slots = None

    def _shortage(self, error: Exception, block_rows: int) -> BackendError:
        g, p = self.n_groups, self.n_pixels
        rows = 2 * 4 * p * block_rows
        return shortage(
            error, GroupTotals.nbytes(p, g), rows, f"two blocks of {block_rows} rows", f"{g} groups of {p}"
        )

    def add_block(self, x: F32, y: NDArray, group: NDArray[np.integer]) -> None:
        """Add rows; returns when the last of them are in a pinned buffer, not when they are multiplied.

        Parameters
        ----------
        x : array of shape (n, p), float32
            Rows, with a fixed reference subtracted; any n, any layout.
        y : array of shape (n,)
        group : array of shape (n,), integer in 0 … n_groups−1

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
        if n and not 0 <= group.min() <= group.max() < self.n_groups:
            raise ValueError(f"bins must lie in 0 … {self.n_groups - 1}; found {group.min()} … {group.max()}")
        for start in range(0, n, self.block_rows):
            here = slice(start, min(start + self.block_rows, n))
            # The caller may be a thread whose own device is another one.
            with self._device:
                self._add(x[here], y[here], group[here])

    def _add(self, x: F32, y: NDArray, group: NDArray[np.integer]) -> None:
        slot = self._slots[self._turn]
        self._turn = 1 - self._turn
        # The block before last has left this slot.
        slot.stream.synchronize()
        arrays = slot.load(x, y, group)
        sort_on_device(
            arrays["group"], self.n_groups, slot.counts, slot.offsets, arrays["order"], slot.stream
        )
        if self._multiplied is not None:
            self._multiplied.wait(slot.stream)
        bounds = np.concatenate([[0], np.cumsum(np.bincount(group, minlength=self.n_groups))])
        self._totals.add(arrays["x"], arrays["y"], arrays["order"], slot.offsets, bounds, slot.stream)
        self._multiplied = slot.done
        self._multiplied.record(slot.stream)

    def fetch(self) -> Totals:
        """Wait for the rows added so far and copy their totals to the host; more rows may be added later."""
        with self._device:
            for slot in self._slots:
                slot.stream.synchronize()
            return self._totals.fetch()


def fitting_rows(
    allocate: Callable[[int], None],
    release: Callable[[], None],
    rows: int,
    shortage_of: Callable[[Exception, int], BackendError],
) -> int:
    """Call `allocate` for `rows` rows, then for half of them, … until memory holds them; how many they became.

    Raises
    ------
    BackendError
        What `shortage_of` makes of the last refusal: memory does not hold FLOOR_ROWS rows.
    """
    floor = min(FLOOR_ROWS, rows)
    while True:
        try:
            allocate(rows)
            return rows
        except Exception as error:
            if not out_of_memory(error):
                raise
            if rows == floor:
                raise shortage_of(error, rows) from error
        # Outside the handler, whose traceback keeps the arrays that were allocated alive.
        release()
        rows = max(floor, rows // 2)


def shortage(error: Exception, totals: int, rows: int, blocks: str, groups: str) -> BackendError:
    """The error for so many bytes of totals and of rows, both also in words."""
    if isinstance(error, PinnedMemoryError):
        return pinned_shortage(rows, blocks, error)
    free = cuda.current_context().get_memory_info().free
    return DeviceMemoryError(
        f"device memory: {totals / 1e9:.2f} GB for the totals of {groups} pixels and {rows / 1e9:.2f} GB "
        f"for {blocks} are needed, {free / 1e9:.2f} GB are free; end other programs "
        "on the device, use fewer groups, or backend cpu"
    )


class GroupTotals:
    """Totals of groups of rows on the device, zero at first, and the scratch of their products.

    Parameters
    ----------
    rows : int
        Rows of a block at most.
    p, g : int
        Pixels and groups.
    choice : Choice
        How Σxxᵀ is made.
    """

    def __init__(self, rows: int, p: int, g: int, choice: Choice) -> None:
        self._arrays = {
            "count": cuda.to_device(np.zeros(g, np.int64)),
            "sum_x": _zeros((g, p)),
            "sum_y": _zeros((g,)),
            "sum_yy": _zeros((g,)),
            "sum_xy": _zeros((g, p)),
            "gram": _zeros((g, p * (p + 1) // 2)),
            "sum_v": _zeros((g, p)),
        }
        self._products = METHODS[choice.method](rows, p, g)

    @staticmethod
    def nbytes(p: int, g: int) -> int:
        """Device memory of the totals."""
        return 8 * g * (p * (p + 1) // 2 + 3 * p + 3)

    def add(
        self,
        x: Any,
        y: Any,
        order: Any,
        offsets: Any,
        bounds: NDArray[np.int64],
        stream: Any,
        error: Any = None,
    ) -> None:
        """Add sorted rows that are on the device, in `stream`, without waiting; nothing is checked.

        Parameters
        ----------
        x : device array of shape (m, p), float32
            Rows, with a fixed reference subtracted.
        y : device array of shape (m,), float64
        order, offsets : device arrays
            See `sort_on_device`.
        bounds : array of shape (g + 1,)
            The same as `offsets`, on the host.
        stream : Numba stream
        error : device array of shape (m, p), float32, optional
            Noise σ of each pixel.
        """
        totals, (g, p), threads = self._arrays, self._arrays["sum_x"].shape, gram.SUM_THREADS
        columns = (-(-p // gram.COLUMNS), g), (gram.COLUMNS, gram.LANES)
        gram.add_labels[g, threads, stream](
            y, order, offsets, totals["count"], totals["sum_y"], totals["sum_yy"]
        )
        gram.add_columns[*columns, stream](x, y, order, offsets, totals["sum_x"], totals["sum_xy"])
        if error is not None:
            gram.add_variances[*columns, stream](error, order, offsets, totals["sum_v"])
        self._products.add(x, order, offsets, bounds, totals["gram"], stream)

    def fetch(self) -> Totals:
        """The totals on the host; all that was added must be done."""
        return Totals(**{name: array.copy_to_host() for name, array in self._arrays.items()})


def _zeros(shape: tuple[int, ...]) -> Any:
    array = cuda.device_array(shape, np.float64)
    gram.set_zero(array, cuda.default_stream())
    # The slots' streams wait for the default stream only where that is not one of each thread.
    cuda.synchronize()
    return array


class _Slot:
    """One of two places that blocks of rows pass through: pinned buffers, device buffers, a stream and an event."""

    def __init__(self, rows: int, p: int, g: int) -> None:
        kinds: dict[str, tuple[tuple[int, ...], Any]] = {
            "x": ((rows, p), np.float32),
            "y": ((rows,), np.float64),
            "group": ((rows,), np.int64),
        }
        self.device = {name: cuda.device_array(*kind) for name, kind in kinds.items()}
        self.order = cuda.device_array(rows, np.int64)
        self.counts = cuda.device_array(table_size(rows, g), np.int64)
        self.offsets = cuda.device_array(g + 1, np.int64)
        self.host = {name: pinned_array(*kind) for name, kind in kinds.items()}
        self.stream = cuda.stream()
        self.done = cuda.event()

    def load(self, x: F32, y: NDArray, group: NDArray[np.integer]) -> dict[str, Any]:
        """Fill the pinned buffers and start their copies; the device arrays cut to the rows there are."""
        rows = {"x": x, "y": y, "group": group}
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
