"""Σxxᵀ on tensor cores from inside a Numba kernel: cuBLASDx through nvmath-python's device `Matmul`.

Design: tensor cores multiply float16 numbers and add in float32, many times faster than float32 multiply-add. Each
pixel becomes two float16 numbers, and three products of them replace one float32 product:

    s x = h + l,    h = float16(s x),    l = float16(s x − h),    s a power of two per pixel column
    s² x xᵀ ≈ h hᵀ + h lᵀ + l hᵀ          (l lᵀ, 2⁻²² of the whole or less, is left out)

s brings the largest |x| of a column to 2¹³ … 2¹⁴, so that h cannot overflow; it is exact to undo. h and l hold 22 bits
of values down to 2⁻²⁷ of the largest, and lose a bit with each factor of two below.

Rows are first split, in the order of their groups, each group padded with rows of zeros to a multiple of STEP_ROWS.
Then one block of threads owns one tile of one group, as in `gram.add_gram`. Panels of PANEL rows are copied to shared
memory asynchronously, one ahead of the products:

    h, l of both sides, rows 0-15 | copy to buffer 0 | multiply      |
                       rows 16-31                    | copy to 1     | multiply   |
                       next rows 0-15                                | copy to 0  | …

Accuracy: tensor cores cut off what they cannot hold where float32 would round, an error of one sign that grows with the
number of additions. They therefore add STEP_ROWS rows only; those sums are added in float32 with rounding over
PARTIAL_ROWS rows, as in `gram`, and then to float64 totals. On sums of one sign, 6 additions that each lose 2⁻²⁴ on
average of a sum that grows evenly lose 2·10⁻⁷ of it.

Not proven without a device: the products of the built kernel, and so its accuracy. It is compiled for sm_80 and sm_90;
the split, the padding and the scales run in the simulator, with NumPy in the place of tensor cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from importlib import import_module, util
from typing import Any

import numpy as np
from numba import cuda, float32, float64, int32, int64
from numba.types import float16  # type: ignore[attr-defined]

from moefast.kernels.cuda import gram
from moefast.kernels.cuda.registry import kernel

__all__ = ["SIGNATURE", "STEP_ROWS", "THREADS", "TensorProducts", "make_kernel", "make_matmul"]

TILE = 64
"""Pixels along each side of a block's tile. Tiles of 128 would read half as much, but spill registers: 460 bytes with
256 threads, 352 with 512."""
PANEL = 16
"""Rows in one buffer: two buffers of four pieces take 16 kB, within what every launch may use."""
STEP_ROWS = 2 * PANEL
"""Rows that tensor cores add up before float32 additions take over; groups are padded to a multiple of it."""
THREADS = 256
"""Threads per block of the product: each holds 16 sums of a step and 16 partial sums in registers."""
ALIGNMENT = 16
"""Bytes: copies move 16 at a time, so that rows are padded to a multiple of TILE pixels."""
TOP = 14
"""The largest |x| of a column is scaled to below 2^TOP; float16 ends at 2^16."""
ROW_BLOCKS = 64
"""Blocks along the rows of `find_largest` and `split_rows`."""
SUM_THREADS = gram.SUM_THREADS
SIGNATURE = "void(float16[:,::1], float16[:,::1], int64[::1], float32[::1], float64[:,::1])"


@kernel("void(float32[:,::1], float32[::1])", threads=SUM_THREADS, serves=("normal_equations",))
def find_largest(x, largest):  # type: ignore[no-untyped-def]
    """Raise `largest[j]` to max |x_j|; the order does not matter to a maximum, so that atomics repeat exactly.

    Launch: (⌈p / SUM_THREADS⌉, ROW_BLOCKS) blocks of SUM_THREADS threads, which share the rows.
    """
    column = cuda.grid(1)
    if column < x.shape[1]:
        found = float32(0)
        for row in range(cuda.blockIdx.y, x.shape[0], cuda.gridDim.y):
            found = max(found, abs(x[row, column]))
        cuda.atomic.max(largest, column, found)


@kernel("void(float32[::1], float32[::1], float32[::1])", threads=SUM_THREADS, serves=("normal_equations",))
def make_scales(largest, scale, inverse):  # type: ignore[no-untyped-def]
    """Powers of two that bring each column below 2^TOP, and their inverses; `largest` is set to zero again.

    Launch: ⌈p / SUM_THREADS⌉ blocks of SUM_THREADS threads.
    """
    column = cuda.grid(1)
    if column < largest.size:
        _, exponent = math.frexp(largest[column])
        # Bounded, so that scale and inverse are normal float32 numbers; 0 has the exponent 0.
        power = min(max(TOP - exponent, -120), 120)
        scale[column] = math.ldexp(float32(1), power)
        inverse[column] = math.ldexp(float32(1), -power)
        largest[column] = float32(0)


@kernel("void(int64[::1], int64[::1])", threads=1, serves=("normal_equations",))
def pad_offsets(offsets, padded):  # type: ignore[no-untyped-def]
    """Offsets of the groups if each were a multiple of STEP_ROWS rows long. Launch: one thread."""
    total = int64(0)
    padded[0] = total
    for group in range(offsets.size - 1):
        steps = (offsets[group + 1] - offsets[group] + STEP_ROWS - 1) // STEP_ROWS
        total += steps * STEP_ROWS
        padded[group + 1] = total


@kernel(
    "void(float32[:,::1], int64[::1], int64[::1], int64[::1], float32[::1], float16[:,::1], float16[:,::1])",
    threads=SUM_THREADS,
    serves=("normal_equations",),
)
def split_rows(x, order, offsets, padded, scale, high, low):  # type: ignore[no-untyped-def]
    """Scaled rows as high + low, grouped and padded with zeros.

    Launch: (⌈padded p / SUM_THREADS⌉, ROW_BLOCKS, n_groups) blocks of SUM_THREADS threads; the blocks along the second
    axis share the rows of a group.
    """
    column = cuda.grid(1)
    group = cuda.blockIdx.z
    if column < high.shape[1]:
        inside = column < x.shape[1]
        count = offsets[group + 1] - offsets[group]
        for here in range(cuda.blockIdx.y, padded[group + 1] - padded[group], cuda.gridDim.y):
            value = float32(0)
            if inside and here < count:
                value = x[order[offsets[group] + here], column] * scale[column]
            upper = float16(value)
            high[padded[group] + here, column] = upper
            low[padded[group] + here, column] = float16(value - float32(upper))


def make_kernel(matmul: Any) -> Callable[..., None]:
    """The Python function of the kernel that multiplies, around an nvmath `Matmul` of one target.

    Launch: (tile_pairs(p, TILE), n_groups) blocks of THREADS threads, with 16 kB of dynamic shared memory. Its
    arguments are `high`, `low`, `padded`, `inverse` as `split_rows` and `make_scales` left them, and the packed totals.
    """
    from nvmath.device import copy, copy_wait, make_tensor

    left_layout = matmul.suggest_layout_smem_a()
    right_layout = matmul.suggest_layout_smem_b()
    sums_layout = matmul.suggest_layout_rmem_c()
    left_size, right_size, sums_size = left_layout.cosize, right_layout.cosize, sums_layout.cosize
    partial_steps = gram.PARTIAL_ROWS // STEP_ROWS

    def add_gram_tensor(high, low, padded, inverse, totals):  # type: ignore[no-untyped-def]
        shared = cuda.shared.array(0, np.float16, alignment=ALIGNMENT)
        stage = 2 * (left_size + right_size)
        left_high_0 = make_tensor(shared[0:left_size], left_layout)
        left_low_0 = make_tensor(shared[left_size : 2 * left_size], left_layout)
        right_high_0 = make_tensor(shared[2 * left_size : 2 * left_size + right_size], right_layout)
        right_low_0 = make_tensor(shared[2 * left_size + right_size : stage], right_layout)
        left_high_1 = make_tensor(shared[stage : stage + left_size], left_layout)
        left_low_1 = make_tensor(shared[stage + left_size : stage + 2 * left_size], left_layout)
        right_high_1 = make_tensor(
            shared[stage + 2 * left_size : stage + 2 * left_size + right_size], right_layout
        )
        right_low_1 = make_tensor(shared[stage + 2 * left_size + right_size : 2 * stage], right_layout)

        corner = cuda.shared.array(3, int32)
        sums_buffer = cuda.local.array(sums_size, float32, alignment=ALIGNMENT)
        partial = cuda.local.array(sums_size, float32)
        sums = make_tensor(sums_buffer, sums_layout)
        places = matmul.suggest_accumulator()

        width = high.shape[1]
        p = inverse.size
        tiles = width // TILE
        pair = cuda.blockIdx.x
        row_tile = 0
        while pair >= tiles - row_tile:
            pair -= tiles - row_tile
            row_tile += 1
        left = row_tile * TILE
        right = (row_tile + pair) * TILE
        if cuda.threadIdx.x == 0:
            corner[0] = left
            corner[1] = right
            corner[2] = 0
        group = cuda.blockIdx.y
        begin = padded[group]
        end = padded[group + 1]

        if begin < end:
            rows = slice(begin, begin + PANEL)
            copy(make_tensor(high[rows, left:], matmul.get_layout_gmem_a(width)), left_high_0)
            copy(make_tensor(low[rows, left:], matmul.get_layout_gmem_a(width)), left_low_0)
            copy(make_tensor(high[rows, right:], matmul.get_layout_gmem_b(width)), right_high_0)
            copy(make_tensor(low[rows, right:], matmul.get_layout_gmem_b(width)), right_low_0)
        for start in range(begin, end, partial_steps * STEP_ROWS):
            for i in range(sums_size):
                partial[i] = float32(0)
            for step in range(start, min(end, start + partial_steps * STEP_ROWS), STEP_ROWS):
                for i in range(sums_size):
                    sums_buffer[i] = float32(0)
                copy_wait()
                rows = slice(step + PANEL, step + STEP_ROWS)
                copy(make_tensor(high[rows, left:], matmul.get_layout_gmem_a(width)), left_high_1)
                copy(make_tensor(low[rows, left:], matmul.get_layout_gmem_a(width)), left_low_1)
                copy(make_tensor(high[rows, right:], matmul.get_layout_gmem_b(width)), right_high_1)
                copy(make_tensor(low[rows, right:], matmul.get_layout_gmem_b(width)), right_low_1)
                matmul.execute(left_high_0, right_high_0, sums)
                matmul.execute(left_high_0, right_low_0, sums)
                matmul.execute(left_low_0, right_high_0, sums)
                copy_wait()
                if step + STEP_ROWS < end:
                    rows = slice(step + STEP_ROWS, step + STEP_ROWS + PANEL)
                    copy(make_tensor(high[rows, left:], matmul.get_layout_gmem_a(width)), left_high_0)
                    copy(make_tensor(low[rows, left:], matmul.get_layout_gmem_a(width)), left_low_0)
                    copy(make_tensor(high[rows, right:], matmul.get_layout_gmem_b(width)), right_high_0)
                    copy(make_tensor(low[rows, right:], matmul.get_layout_gmem_b(width)), right_low_0)
                matmul.execute(left_high_1, right_high_1, sums)
                matmul.execute(left_high_1, right_low_1, sums)
                matmul.execute(left_low_1, right_high_1, sums)
                for i in range(sums_size):
                    partial[i] += sums_buffer[i]
            # Corner and index are read anew behind a barrier, so that the compiler makes one place at a time; otherwise
            # it keeps all of them in registers throughout, and registers spill.
            for i in range(sums_size):
                cuda.syncthreads()
                row, column = places.map_fragment_index(int32(i + corner[2]))
                row += corner[0]
                column += corner[1]
                if row <= column < p:
                    value = float64(partial[i]) * float64(inverse[row]) * float64(inverse[column])
                    totals[group, row * p - row * (row + 1) // 2 + column] += value

    return add_gram_tensor


def make_matmul(target: Any = None) -> Any:
    """The nvmath `Matmul` of one panel, for a compute capability, or for the current device."""
    from nvmath.device import Matmul

    return Matmul(
        size=(TILE, TILE, PANEL),
        precision=(np.float16, np.float16, np.float32),
        data_type="real",
        # Rows lie in memory pixel by pixel: that is xᵀ column by column on the left, and x row by row on the right.
        arrangement=("col_major", "row_major", "row_major"),
        execution="Block",
        block_size=THREADS,
        alignment=(ALIGNMENT, ALIGNMENT, ALIGNMENT),
        static_block_dim=True,
        sm=target,
    )


@cache
def _built() -> tuple[Any, int]:
    """The kernel for the current device, and the bytes of shared memory of its launch; building takes a minute."""
    matmul = make_matmul()
    pieces = matmul.suggest_layout_smem_a().cosize + matmul.suggest_layout_smem_b().cosize
    launch = cuda.jit(launch_bounds=(THREADS, 1))(make_kernel(matmul))
    return launch, 2 * 2 * pieces * np.dtype(np.float16).itemsize


class TensorProducts:
    """Σxxᵀ by cuBLASDx on tensor cores; see `moefast.kernels.cuda.products.Products`."""

    name = "tensor"

    def __init__(self, rows: int, p: int, n_groups: int) -> None:
        width = -(-p // TILE) * TILE
        room = rows + STEP_ROWS * n_groups
        self.high = cuda.device_array((room, width), np.float16)
        self.low = cuda.device_array((room, width), np.float16)
        self.largest = cuda.to_device(np.zeros(p, np.float32))
        self.scale = cuda.device_array(p, np.float32)
        self.inverse = cuda.device_array(p, np.float32)
        self.padded = cuda.device_array(n_groups + 1, np.int64)

    @staticmethod
    def missing() -> str:
        """nvmath-python's device functions, or a device with tensor cores for float16."""
        for package in ("nvmath", "cffi"):
            if util.find_spec(package) is None:
                return f"{package} is not installed (pip install 'moefast[tensor]')"
        if cuda.get_current_device().compute_capability < (8, 0):
            return "the device is older than compute capability 8.0"
        try:
            import_module("nvmath.device")
        except (ImportError, RuntimeError) as error:
            # Its loader raises a RuntimeError that goes on with listings of the folders where it looked.
            return f"nvmath.device does not load ({next(iter(str(error).splitlines()), type(error).__name__)[:200]})"
        return ""

    def add(self, x: Any, order: Any, offsets: Any, bounds: np.ndarray, totals: Any, stream: Any) -> None:
        """See `Products.add`."""
        p, n_groups = x.shape[1], len(bounds) - 1
        columns = -(-p // SUM_THREADS)
        find_largest[(columns, ROW_BLOCKS), SUM_THREADS, stream](x, self.largest)
        make_scales[columns, SUM_THREADS, stream](self.largest, self.scale, self.inverse)
        pad_offsets[1, 1, stream](offsets, self.padded)
        grid = (-(-self.high.shape[1] // SUM_THREADS), ROW_BLOCKS, n_groups)
        split_rows[grid, SUM_THREADS, stream](x, order, offsets, self.padded, self.scale, self.high, self.low)
        self._multiply(totals, stream)

    def _multiply(self, totals: Any, stream: Any) -> None:
        launch, shared = _built()
        grid = (gram.tile_pairs(self.inverse.size, TILE), len(totals))
        launch[grid, THREADS, stream, shared](self.high, self.low, self.padded, self.inverse, totals)
