"""Σxxᵀ and the other totals of the normal equations, per group of rows, on the device.

Contract: `moefast.kernels.reference.normal_equations_reference`.

Design: rows are not moved. The counting sort gives `order` and `offsets`, so that the rows of group g are
order[offsets[g] : offsets[g + 1]], and every kernel here reads its rows through `order`: a row of 4096 pixels is read
in stretches of 512 bytes, whatever its place. Σxxᵀ is cut in tiles of TILE × TILE pixels; only tiles on and above the
diagonal are computed, and only numbers on and above the diagonal are written, straight into the packed triangle that
the host knows. A block of threads owns its tile of its group: no two write the same number, so nothing is atomic and
results repeat to the last bit.

Accuracy: products are summed in float32 with fused multiply-add over PARTIAL_ROWS rows at most, then added to the
float64 total. A float32 sum is rounded once per row, by 0.4 u of itself on average (u = 2⁻²⁴); as the sum grows evenly,
m rows leave it off by 0.4 u √(m/3), 3·10⁻⁷ for m = 512, and the partial sums of n rows have independent errors, which
leave the total off by 0.4 u m/√(3 n), 7·10⁻⁹ for n = 1M. `tests/kernels/test_cuda_accuracy.py` measures it, with a loop
on the CPU that makes the same operations in the same order. All other totals are summed in float64 throughout.
"""

from __future__ import annotations

from typing import Any

from numba import config, cuda, float32, float64, int32

from moefast.kernels.cuda.registry import kernel

__all__ = [
    "COLUMNS",
    "LANES",
    "PARTIAL_ROWS",
    "SUM_THREADS",
    "THREADS",
    "TILE",
    "add_columns",
    "add_gram",
    "add_labels",
    "add_shares",
    "add_squares",
    "add_variances",
    "clear",
    "gather_rows",
    "set_zero",
    "split_offsets",
    "tile_pairs",
]

TILE = 128
"""Pixels along each side of the tile of Σxxᵀ that one block of threads owns."""
EACH = 8
"""Each thread owns EACH × EACH numbers of the tile, as four squares of 4 × 4, half a tile apart."""
THREADS = (TILE // EACH) ** 2
"""Threads per block of `add_gram`: 256."""
PANEL = 8
"""Rows that are staged in shared memory at a time."""
PARTIAL_ROWS = 512
"""Most rows whose products are summed in float32."""
BLOCKS_TOGETHER = 2
"""Blocks of `add_gram` on one multiprocessor: while one waits for rows, the other multiplies."""
SUM_THREADS = 128
"""Threads per block of the other kernels, but for the two that sum columns:"""
COLUMNS = 32
"""pixels of their blocks, one warp wide,"""
LANES = 16
"""and threads that share the rows of a pixel: one thread alone would wait for one row after the other."""
CLEAR_BLOCKS = 1024
"""Most blocks of `clear`."""
ALIGNED = None if config.ENABLE_CUDASIM else 16  # type: ignore[attr-defined]
"""Bytes to which shared memory is aligned, for vectors of four; the simulator knows no alignment."""

QUAD = EACH // 2
HALF = TILE // 2
LOADS = PANEL * TILE // THREADS
"""Numbers of each panel that a thread fetches."""
STEP = THREADS // TILE
"""Rows of a panel that all threads fetch at once."""


def set_zero(array: Any, stream: Any) -> None:
    """Set a contiguous float64 device array to zero, in `stream`, without waiting."""
    flat = array.reshape(array.size)
    blocks = min(CLEAR_BLOCKS, -(-flat.size // SUM_THREADS))
    clear[blocks, SUM_THREADS, stream](flat)


def tile_pairs(p: int, side: int = TILE) -> int:
    """Number of tiles of side × side numbers on and above the diagonal of a (p, p) matrix."""
    tiles = -(-p // side)
    return tiles * (tiles + 1) // 2


@kernel(
    "void(float32[:,::1], int64[::1], int64[::1], float64[:,::1])",
    threads=THREADS,
    blocks=BLOCKS_TOGETHER,
    serves=("normal_equations",),
)
def add_gram(x, order, offsets, gram):  # type: ignore[no-untyped-def]
    """Add Σ x_i x_j over the rows of each group to the packed upper triangle `gram[group]`.

    Launch: (tile_pairs(p), n_groups) blocks of THREADS threads. Per panel of PANEL rows, each thread fetches LOADS
    numbers of either side into registers, while the panel before, staged in shared memory, is multiplied:

        thread (ty, tx) owns rows    4 ty … 4 ty + 3  and  64 + 4 ty … 64 + 4 ty + 3   of the tile
                       and columns   4 tx … 4 tx + 3  and  64 + 4 tx … 64 + 4 tx + 3

    so that 8 + 8 numbers from shared memory, in vectors of four, feed 64 multiply-adds.
    """
    left = cuda.shared.array((2, PANEL, TILE), float32, alignment=ALIGNED)
    right = cuda.shared.array((2, PANEL, TILE), float32, alignment=ALIGNED)
    corner = cuda.shared.array(2, int32)
    sums = cuda.local.array((EACH, EACH), float32)
    a = cuda.local.array(EACH, float32)
    b = cuda.local.array(EACH, float32)
    next_left = cuda.local.array(LOADS, float32)
    next_right = cuda.local.array(LOADS, float32)

    # Masks instead of divisions tell the compiler that indices are not negative: it then reads vectors of four.
    thread = cuda.threadIdx.x
    tx = thread & 15
    ty = (thread >> 4) & 15
    lane = thread & (TILE - 1)
    first = (thread >> 7) & 1

    p = x.shape[1]
    tiles = (p + TILE - 1) // TILE
    pair = cuda.blockIdx.x
    row_tile = 0
    while pair >= tiles - row_tile:
        pair -= tiles - row_tile
        row_tile += 1
    left_column = row_tile * TILE + lane
    right_column = (row_tile + pair) * TILE + lane
    if thread == 0:
        corner[0] = row_tile * TILE
        corner[1] = (row_tile + pair) * TILE
    group = cuda.blockIdx.y
    end = offsets[group + 1]

    for start in range(offsets[group], end, PARTIAL_ROWS):
        stop = min(end, start + PARTIAL_ROWS)
        for i in range(EACH):
            for j in range(EACH):
                sums[i, j] = float32(0)
        side = 0
        # One panel more than there are: the first round only fetches.
        for panel in range(start - PANEL, stop, PANEL):
            for s in range(LOADS):
                next_left[s] = float32(0)
                next_right[s] = float32(0)
                here = panel + PANEL + first + STEP * s
                if here < stop:
                    row = order[here]
                    if left_column < p:
                        next_left[s] = x[row, left_column]
                    if right_column < p:
                        next_right[s] = x[row, right_column]
            if panel >= start:
                for k in range(PANEL):
                    for i in range(QUAD):
                        a[i] = left[side, k, QUAD * ty + i]
                    for i in range(QUAD):
                        a[QUAD + i] = left[side, k, HALF + QUAD * ty + i]
                    for j in range(QUAD):
                        b[j] = right[side, k, QUAD * tx + j]
                    for j in range(QUAD):
                        b[QUAD + j] = right[side, k, HALF + QUAD * tx + j]
                    for i in range(EACH):
                        for j in range(EACH):
                            sums[i, j] += a[i] * b[j]
            side = (side + 1) & 1
            for s in range(LOADS):
                left[side, first + STEP * s, lane] = next_left[s]
                right[side, first + STEP * s, lane] = next_right[s]
            cuda.syncthreads()
        # The corner is read anew and the barrier stands inside the loop, so that the compiler makes the 64 addresses
        # one row at a time; otherwise it keeps them in registers throughout, and registers spill.
        for i in range(EACH):
            edge = corner[1] + QUAD * tx
            row = corner[0] + QUAD * ty + i + (HALF - QUAD) * (i // QUAD)
            begin = row * p - row * (row + 1) // 2
            for j in range(EACH):
                column = edge + j + (HALF - QUAD) * (j // QUAD)
                if row <= column < p:
                    gram[group, begin + column] += float64(sums[i, j])
            cuda.syncthreads()


@kernel(
    "void(float32[:,::1], float64[::1], int64[::1], int64[::1], float64[:,::1], float64[:,::1])",
    threads=COLUMNS * LANES,
    serves=("normal_equations",),
)
def add_columns(x, y, order, offsets, sum_x, sum_xy):  # type: ignore[no-untyped-def]
    """Add Σ x and Σ x y of each group, in float64.

    Launch: (⌈p / COLUMNS⌉, n_groups) blocks of (COLUMNS, LANES) threads. A thread adds up every LANES-th row of one
    pixel; the first lane of a pixel then adds up the others, in their order.
    """
    sums = cuda.shared.array((2, LANES, COLUMNS), float64)
    lane = cuda.threadIdx.y
    place = cuda.threadIdx.x
    column = cuda.blockIdx.x * COLUMNS + place
    group = cuda.blockIdx.y
    total = float64(0)
    with_y = float64(0)
    if column < x.shape[1]:
        for here in range(offsets[group] + lane, offsets[group + 1], LANES):
            row = order[here]
            value = float64(x[row, column])
            total += value
            with_y += value * y[row]
    sums[0, lane, place] = total
    sums[1, lane, place] = with_y
    cuda.syncthreads()
    if lane == 0 and column < x.shape[1]:
        for other in range(1, LANES):
            total += sums[0, other, place]
            with_y += sums[1, other, place]
        sum_x[group, column] += total
        sum_xy[group, column] += with_y


@kernel(
    "void(float32[:,::1], int64[::1], int64[::1], float64[:,::1])",
    threads=COLUMNS * LANES,
    serves=("normal_equations",),
)
def add_variances(error, order, offsets, sum_v):  # type: ignore[no-untyped-def]
    """Add Σ σ² of each group, squares in float32 and sums in float64. Launch: as `add_columns`."""
    sums = cuda.shared.array((LANES, COLUMNS), float64)
    lane = cuda.threadIdx.y
    place = cuda.threadIdx.x
    column = cuda.blockIdx.x * COLUMNS + place
    group = cuda.blockIdx.y
    total = float64(0)
    if column < error.shape[1]:
        for here in range(offsets[group] + lane, offsets[group + 1], LANES):
            sigma = error[order[here], column]
            total += float64(sigma * sigma)
    sums[lane, place] = total
    cuda.syncthreads()
    if lane == 0 and column < error.shape[1]:
        for other in range(1, LANES):
            total += sums[other, place]
        sum_v[group, column] += total


@kernel(
    "void(float64[::1], int64[::1], int64[::1], int64[::1], float64[::1], float64[::1])",
    threads=SUM_THREADS,
    serves=("normal_equations",),
)
def add_labels(y, order, offsets, count, sum_y, sum_yy):  # type: ignore[no-untyped-def]
    """Add n, Σ y and Σ y² of each group, in float64.

    Launch: n_groups blocks of SUM_THREADS threads; a thread adds up every SUM_THREADS-th row, then the sums of one half
    of the threads are added to those of the other, again and again.
    """
    sums = cuda.shared.array((2, SUM_THREADS), float64)
    thread = cuda.threadIdx.x
    group = cuda.blockIdx.x
    begin = offsets[group]
    end = offsets[group + 1]
    total = float64(0)
    squares = float64(0)
    for here in range(begin + thread, end, SUM_THREADS):
        value = y[order[here]]
        total += value
        squares += value * value
    sums[0, thread] = total
    sums[1, thread] = squares
    cuda.syncthreads()
    half = SUM_THREADS // 2
    while half > 0:
        if thread < half:
            sums[0, thread] += sums[0, thread + half]
            sums[1, thread] += sums[1, thread + half]
        cuda.syncthreads()
        half //= 2
    if thread == 0:
        count[group] += end - begin
        sum_y[group] += sums[0, 0]
        sum_yy[group] += sums[1, 0]


@kernel(
    "void(float32[:,::1], int64[::1], int64[::1], int64[::1], float32[:,::1])",
    threads=SUM_THREADS,
    serves=("normal_equations",),
)
def gather_rows(x, order, offsets, padded, out):  # type: ignore[no-untyped-def]
    """Rows of each group side by side from padded[g] on, and rows of zeros up to padded[g + 1].

    Launch: (⌈p / SUM_THREADS⌉, any, n_groups) blocks of SUM_THREADS threads; the blocks along the second axis share the
    rows of a group.
    """
    column = cuda.grid(1)
    group = cuda.blockIdx.z
    if column < x.shape[1]:
        begin = offsets[group]
        count = offsets[group + 1] - begin
        for here in range(cuda.blockIdx.y, padded[group + 1] - padded[group], cuda.gridDim.y):
            value = float32(0)
            if here < count:
                value = x[order[begin + here], column]
            out[padded[group] + here, column] = value


@kernel(
    "void(float32[:,:,::1], int64, float64[::1])",
    threads=SUM_THREADS,
    serves=("normal_equations",),
)
def add_squares(squares, n, packed):  # type: ignore[no-untyped-def]
    """Add the upper triangles of the first n (p, p) float32 matrices to a packed float64 triangle.

    Launch: (⌈p / SUM_THREADS⌉, p) blocks of SUM_THREADS threads: a block row per row of the matrices.
    """
    column = cuda.grid(1)
    row = cuda.blockIdx.y
    p = squares.shape[1]
    if row <= column < p:
        total = float64(0)
        for part in range(n):
            total += float64(squares[part, row, column])
        packed[row * p - row * (row + 1) // 2 + column] += total


@kernel("void(int64[::1], int64, int64[::1])", threads=SUM_THREADS, serves=("normal_equations",))
def split_offsets(offsets, shares, finer):  # type: ignore[no-untyped-def]
    """Cut the rows of each group in `shares` equal parts. Launch: one block of SUM_THREADS threads."""
    groups = offsets.size - 1
    for part in range(cuda.threadIdx.x, groups * shares, cuda.blockDim.x):
        group = part // shares
        begin = offsets[group]
        finer[part] = begin + (offsets[group + 1] - begin) * (part - group * shares) // shares
    if cuda.threadIdx.x == 0:
        finer[groups * shares] = offsets[groups]


@kernel("void(float64[:,::1], int64, float64[:,::1])", threads=SUM_THREADS, serves=("normal_equations",))
def add_shares(parts, shares, totals):  # type: ignore[no-untyped-def]
    """Add to each row of `totals` its `shares` rows of `parts`, in their order.

    Launch: (⌈columns / SUM_THREADS⌉, rows of totals) blocks of SUM_THREADS threads.
    """
    place = cuda.grid(1)
    group = cuda.blockIdx.y
    if place < totals.shape[1]:
        total = float64(0)
        for part in range(group * shares, (group + 1) * shares):
            total += parts[part, place]
        totals[group, place] += total


@kernel("void(float64[::1])", threads=SUM_THREADS, serves=("normal_equations",))
def clear(values):  # type: ignore[no-untyped-def]
    """Set all numbers to zero. Launch: any number of blocks of SUM_THREADS threads, which share the numbers."""
    for here in range(cuda.grid(1), values.size, cuda.gridsize(1)):
        values[here] = float64(0)
