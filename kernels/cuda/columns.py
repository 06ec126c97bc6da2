"""Flux less a reference times columns, on the device, of rows whose good pixels are marked.

Contract: `columns` and `windows` of `moefast.kernels.reference.project_reference`.

Floor: a spectrum is 16 kB of flux and half a kB of marks, 4 ns at 4.3 TB/s, and 2 · 48 · 4096 operations of the product
are 0.4 MFLOP, 8 ns at 50 TFLOP/s. What counts in practice are instructions beside the multiply-adds: of 16 pixels of a
row 768 of some 960.

Design: a block of threads takes ROWS spectra and COLUMNS columns and walks over the pixels in panels of PANEL. While a
panel is multiplied, the next is on its way from memory to registers; panels lie in shared memory twice, so that a panel
takes one barrier:

    registers | fetch 1   | fetch 2   | …
    A  store 0 |A  store 1 |A  store 2
               |C  product 0 |C  product 1 | …
               ^             ^ barriers

A  A thread fetches QUAD neighbouring pixels of QUAD rows, in vectors, subtracts the reference, makes zeros of bad
   pixels, and stores them transposed, in vectors again: eight threads side by side store 32 rows of a pixel.
C  The product, as in `moefast.kernels.cuda.project`. Line columns are zero but for short stretches: the owner of a row
   adds them up where they are not.

Sums over a row are float32, in the order of the pixels. With more than COLUMNS columns or LINES lines, blocks along the
second axis do the rest, and flux is read again, mostly from the L2 cache.
"""

from __future__ import annotations

from numba import cuda, float32, int32, int64

from moefast.kernels.cuda.gram import ALIGNED
from moefast.kernels.cuda.lanes import WRITTEN_OUT, load_four
from moefast.kernels.cuda.project import (
    COLUMNS,
    EACH_COLUMNS,
    EACH_ROWS,
    LINES,
    NOT_NEGATIVE,
    PAIR,
    PANEL,
    QUAD,
    ROWS,
    THREADS,
    WIDE,
    multiply_pixel,
)
from moefast.kernels.cuda.registry import kernel
from moefast.kernels.quality import LARGEST32

__all__ = ["project_columns"]

BLOCKS_TOGETHER = 4
"""Blocks on one multiprocessor: while one waits at its barrier, others multiply."""
PANELS = 2 * PANEL
"""Pixels of both panels in shared memory: those of even number come first."""
WEIGHTS = PANEL * COLUMNS // QUAD
"""Vectors of weights of a panel; each thread fetches one, and some a second one."""


@cuda.jit(device=True, **WRITTEN_OUT)
def _multiply_four(centred, weights, pixel, tx, ty, a, b, sums):  # type: ignore[no-untyped-def]
    """Add the products of four pixels to a thread's tile."""
    multiply_pixel(centred, weights, 0, pixel, tx, ty, a, b, sums)
    multiply_pixel(centred, weights, 0, pixel | 1, tx, ty, a, b, sums)
    multiply_pixel(centred, weights, 0, pixel | 2, tx, ty, a, b, sums)
    multiply_pixel(centred, weights, 0, pixel | 3, tx, ty, a, b, sums)


@kernel(
    "void(float32[::1], uint8[::1], boolean, float32[::1], float32[::1], float32[:,::1], int64[::1], int64[::1],"
    " boolean[::1], int64, float32[:,::1], float32[:,::1])",
    threads=THREADS,
    blocks=BLOCKS_TOGETHER,
    serves=("score",),
)
def project_columns(  # type: ignore[no-untyped-def]
    flux, marks, clipped, reference, matrix, lines, starts, stops, busy, p, columns, windows
):
    """Project spectra; see `moefast.kernels.Projection` for the arguments and `Projected` for the results.

    `flux` is flat and begins at a multiple of 16 bytes; `p` is a multiple of eight, and `marks` (n · p / 8), flat, has
    a bit for each good pixel. `reference` is filled up with zeros to whole panels, and so is `matrix`, which holds,
    tile by tile and pixel by pixel, COLUMNS columns; `busy` says of each panel whether a line column is not zero.

    Launch: (⌈n / ROWS⌉, max(⌈c / COLUMNS⌉, ⌈l / LINES⌉)) blocks of THREADS threads.
    """
    centred = cuda.shared.array((PANELS, ROWS), float32, alignment=ALIGNED)
    weights = cuda.shared.array((1, PANELS, COLUMNS), float32, alignment=ALIGNED)
    in_lines = cuda.shared.array((LINES, ROWS), float32)
    sums = cuda.local.array((EACH_ROWS, EACH_COLUMNS), float32)
    a = cuda.local.array(EACH_ROWS, float32)
    b = cuda.local.array(EACH_COLUMNS, float32)
    next_flux = cuda.local.array((QUAD, QUAD), float32)
    next_marks = cuda.local.array(QUAD, int32)
    next_weight = cuda.local.array((2, QUAD), float32)
    of_pixel = cuda.local.array(QUAD, float32)
    row_begins = cuda.local.array(QUAD, int64)

    # Masks tell the compiler that indices are not negative: it then reads and writes vectors.
    thread = cuda.threadIdx.x & (THREADS - 1)
    tx = thread & 7
    ty = (thread >> 3) & 15
    # Rows and pixels that a thread fetches.
    quad = (thread & 7) | ((thread >> 5) & 3) << 3
    group = (thread >> 3) & 3
    # Of its vectors of weights.
    pixel_of_weight = thread // (COLUMNS // QUAD)
    column_of_weight = QUAD * (thread % (COLUMNS // QUAD))
    second_pixel = (thread + THREADS) // (COLUMNS // QUAD)
    second_column = QUAD * ((thread + THREADS) % (COLUMNS // QUAD))

    n = columns.shape[0]
    c = columns.shape[1]
    top = cuda.blockIdx.x * ROWS
    tile = cuda.blockIdx.y
    left = tile * COLUMNS
    first_line = tile * LINES
    last_line = min(first_line + LINES, lines.shape[0])
    panels = busy.size
    lowest = float32(0) if clipped else -LARGEST32
    # Rows that are not there are the last one, and are not written.
    for i in range(QUAD):
        row_begins[i] = min(top + QUAD * quad + i, n - 1) * p
    last_pixel = int32(p - QUAD)
    corner_of_weights = tile * panels * PANEL * COLUMNS

    for i in range(EACH_ROWS):
        for j in range(EACH_COLUMNS):
            sums[i, j] = float32(0)
    for line in range(LINES):
        in_lines[line, thread] = float32(0)

    # One panel more than there are: the first round only fetches.
    for panel in range(-1, panels):
        start = panel * PANEL
        side = (panel & 1) * PANEL
        if panel >= 0:
            for j in range(QUAD):
                here = side | QUAD * group | j
                for i in range(QUAD):
                    x = max(next_flux[i, j], lowest) - of_pixel[j]
                    centred[here, QUAD * quad + i] = x if next_marks[i] & (1 << j) else float32(0)
            for j in range(QUAD):
                weights[0, side + pixel_of_weight, column_of_weight + j] = next_weight[0, j]
            if thread < WEIGHTS - THREADS:
                for j in range(QUAD):
                    weights[0, side + second_pixel, second_column + j] = next_weight[1, j]
        if panel + 1 < panels:
            pixel = int32(start + PANEL + QUAD * group)
            of_pixel[0], of_pixel[1], of_pixel[2], of_pixel[3] = load_four(reference, pixel)
            # Beyond the last pixel weights are zero, whatever the flux is.
            pixel = min(pixel, last_pixel)
            for i in range(QUAD):
                here = row_begins[i] + pixel
                next_marks[i] = int32(marks[(here >> 3) & NOT_NEGATIVE])
                next_flux[i, 0], next_flux[i, 1], next_flux[i, 2], next_flux[i, 3] = load_four(flux, here)
                next_marks[i] = int32(next_marks[i] >> (pixel & int32(4)))
            here = corner_of_weights + (panel + 1) * PANEL * COLUMNS + QUAD * thread
            (next_weight[0, 0], next_weight[0, 1], next_weight[0, 2], next_weight[0, 3]) = load_four(
                matrix, here
            )
            if thread < WEIGHTS - THREADS:
                (next_weight[1, 0], next_weight[1, 1], next_weight[1, 2], next_weight[1, 3]) = load_four(
                    matrix, here + QUAD * THREADS
                )
        cuda.syncthreads()

        if panel >= 0:
            # The loop written out takes no address arithmetic.
            _multiply_four(centred, weights, side, tx, ty, a, b, sums)
            _multiply_four(centred, weights, side | 4, tx, ty, a, b, sums)
            _multiply_four(centred, weights, side | 8, tx, ty, a, b, sums)
            _multiply_four(centred, weights, side | 12, tx, ty, a, b, sums)
            if busy[panel]:
                for line in range(first_line, last_line):
                    total = in_lines[line - first_line, thread]
                    for j in range(max(starts[line], start), min(stops[line], start + PANEL)):
                        total += centred[side + j - start, thread] * lines[line, j]
                    in_lines[line - first_line, thread] = total

    for i in range(EACH_ROWS):
        row = top + QUAD * ty + i + (ROWS // 2 - QUAD) * (i // QUAD)
        if row < n:
            for k in range(EACH_COLUMNS):
                place = left + (QUAD * tx + k if k < QUAD else WIDE + PAIR * tx + k - QUAD)
                if place < c:
                    columns[row, place] = sums[i, k]
    row = top + thread
    if row < n:
        for line in range(first_line, last_line):
            windows[row, line] = in_lines[line - first_line, thread]
