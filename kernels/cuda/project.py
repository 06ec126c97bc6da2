"""Everything linear in flux, or in variance, from one read of flux and error on the device.

Contract: `moefast.kernels.reference.project_reference`, but for `variances`, of which `moefast.kernels.cuda.mix` needs
two noise levels only, and `snr_median`, which `moefast.kernels.cuda.median` makes.

Floor: a spectrum is 32 kB of flux and error, and 2 · 48 · 4096 operations of the product and some 25 per pixel for the
rest make 0.5 MFLOP: at 3 TB/s and at 45 TFLOP/s in float32, 11 ns each. Neither can wait for the other. What counts in
practice are instructions beside the arithmetic: 2210 for 16 pixels of a row, 768 of which multiply and add.

Design: a block of threads takes ROWS spectra and COLUMNS columns and walks over the pixels in panels of PANEL. While a
panel is at work, the next is on its way from memory to registers:

    registers | fetch 1                    | fetch 2                   | …
    A  store 0 |B  row by row 0 |C  product 0 |A  store 1 |B  row by row 1 |C  product 1
               ^                ^                         ^                ^ barriers

A  Flux and error, fetched along the pixels, go to shared memory.
B  Each thread owns a row: it walks its pixels in order, so that sums over a row need no exchange between threads, and
   leaves flux − reference, zero for bad pixels, transposed for the product.
C  Thread (ty, tx) owns rows 4 ty … 4 ty + 3 and 64 + 4 ty … and columns 4 tx … 4 tx + 3 and 32 + 2 tx …: 8 + 6
   numbers from shared memory, in vectors, feed 48 multiply-adds. Line columns are zero but for short stretches: the
   owner of a row adds them up where they are not.

Sums over a row are float32 over a panel, added to float32 totals (flux²: float64), a rounding error of
10⁻⁷. Where flux² overflows, the panel is added up again in float64. With more than COLUMNS columns or LINES lines,
blocks along the second axis do the rest, and flux and error are read again, mostly from the L2 cache.

Why the mixture is a kernel of its own: its two noise levels are known only when the whole row has been read, and until
then the sums of σ²/D over cells, 2 kB per spectrum, must lie somewhere. They fit neither registers nor shared memory
for ROWS rows; multiplying them by all M · K columns on the way would take 72 more registers of each thread. So they go
through global memory, 1/16 of what is read.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda, float32, float64, int32, int64

from moefast.kernels.cuda.gram import ALIGNED
from moefast.kernels.cuda.registry import kernel
from moefast.kernels.quality import LARGEST32, LARGEST_ERROR32

__all__ = ["COLUMNS", "LINES", "PANEL", "ROWS", "THREADS", "multiply_pixel", "project_rows"]

ROWS = 128
"""Spectra of a block; a thread owns one."""
THREADS = ROWS
COLUMNS = 48
"""Columns of a block."""
LINES = 12
"""Line columns of a block."""
PANEL = 16
"""Pixels that are staged in shared memory at a time."""
PADDED = PANEL + 1
"""Owners of neighbouring rows then read different banks of shared memory."""
EACH_ROWS = 8
EACH_COLUMNS = 6
QUAD = 4
PAIR = 2
WIDE = 32
"""Columns that are read in vectors of four; the other 16 in vectors of two."""
LOADS = ROWS * PANEL // THREADS
STEP = THREADS // PANEL
"""Rows that all threads fetch at once."""
WEIGHT_LOADS = PANEL * COLUMNS // THREADS
SECTOR = 8
"""Cells that are written together: 32 bytes."""
BLOCKS_TOGETHER = 3
"""Blocks on one multiprocessor: while one waits for memory or walks its rows, others multiply."""
BAD_ERROR = np.int32(1 << 30)
"""Bit of a row's number of good pixels that says that there is a bad error: a register less."""
NOT_NEGATIVE = 0x7FFFFFFFFFFFFFFF
SMALL = 0xFF
"""A mask that says "not negative" of what is smaller than 256."""
NAN = np.float32(np.nan)


@cuda.jit(device=True)
def multiply_pixel(centred, weights, side, pixel, tx, ty, a, b, sums):  # type: ignore[no-untyped-def]
    """Add the products of one pixel to a thread's tile; `a` and `b` become registers."""
    for i in range(QUAD):
        a[i] = centred[pixel, QUAD * ty + i]
    for i in range(QUAD):
        a[QUAD + i] = centred[pixel, ROWS // 2 + QUAD * ty + i]
    for i in range(QUAD):
        b[i] = weights[side, pixel, QUAD * tx + i]
    for i in range(PAIR):
        b[QUAD + i] = weights[side, pixel, WIDE + PAIR * tx + i]
    for i in range(EACH_ROWS):
        for k in range(EACH_COLUMNS):
            sums[i, k] += a[i] * b[k]


@kernel(
    "void(float32[::1], float32[::1], boolean[::1], boolean, float32[::1], float32[::1], float32[:,::1], int64[::1],"
    " int64[::1], boolean[::1], int64, int64, float32[:,::1], float32[:,::1], float32[:,::1], float32[::1],"
    " float32[::1], float32[::1], float32[::1], int32[::1], uint32[::1])",
    threads=THREADS,
    blocks=BLOCKS_TOGETHER,
    serves=("score",),
)
def project_rows(  # type: ignore[no-untyped-def]
    flux, error, mask, clipped, pixels, matrix, lines, starts, stops, busy, p, cell,
    columns, windows, cells, log_level, energy, expected, snr_norm, n_good, flag,
):  # fmt: skip
    """Project spectra; see `moefast.kernels.Projection` for the arguments and `Projected` for the results.

    `flux`, `error` and `mask` are flat; `mask` is empty where there is none. `pixels` holds, panel by panel,
    reference, 1/D and residual of PANEL pixels; `matrix`, tile by tile and pixel by pixel, COLUMNS columns; both are
    filled up with zeros to whole panels. `busy` says of each panel whether a line column is not zero there; `cells`
    (n, p / cell) gets the sums of σ²/D over cells.

    Launch: (⌈n / ROWS⌉, max(⌈c / COLUMNS⌉, ⌈l / LINES⌉)) blocks of THREADS threads.
    """
    raw = cuda.shared.array((2, ROWS, PADDED), float32)
    centred = cuda.shared.array((PANEL, ROWS), float32, alignment=ALIGNED)
    weights = cuda.shared.array((2, PANEL, COLUMNS), float32, alignment=ALIGNED)
    shape = cuda.shared.array((3, PANEL), float32, alignment=ALIGNED)
    totals = cuda.shared.array((ROWS, PADDED), float32)
    in_lines = cuda.shared.array((LINES, ROWS), float32)
    so_far = cuda.shared.array((4, ROWS), float32)
    sums = cuda.local.array((EACH_ROWS, EACH_COLUMNS), float32)
    a = cuda.local.array(EACH_ROWS, float32)
    b = cuda.local.array(EACH_COLUMNS, float32)
    next_flux = cuda.local.array(LOADS, float32)
    next_error = cuda.local.array(LOADS, float32)
    next_weight = cuda.local.array(WEIGHT_LOADS, float32)

    # Masks instead of divisions tell the compiler that indices are not negative: it then reads vectors.
    thread = cuda.threadIdx.x & (THREADS - 1)
    tx = thread & 7
    ty = (thread >> 3) & 15
    lane = thread & (PANEL - 1)
    first = (thread >> 4) & 7

    n = columns.shape[0]
    c = columns.shape[1]
    masked = mask.shape[0] > 0
    top = cuda.blockIdx.x * ROWS
    tile = cuda.blockIdx.y
    left = tile * COLUMNS
    first_line = tile * LINES
    last_line = min(first_line + LINES, lines.shape[0])
    panels = busy.size

    for i in range(EACH_ROWS):
        for j in range(EACH_COLUMNS):
            sums[i, j] = float32(0)
    for line in range(LINES):
        in_lines[line, thread] = float32(0)
    # Numbers of a row that wait in shared memory leave registers to the product.
    for i in range(4):
        so_far[i, thread] = float32(0)
    signal = float64(0)
    good_pixels = int32(0)
    next_shape = float32(0)
    in_cell = float32(0)
    filled = int32(0)
    waiting = int32(0)
    written = int32(0)
    n_cells = cells.shape[1]
    of_cell = int32(cell)

    # One panel more than there are: the first round only fetches.
    for panel in range(-1, panels):
        start = panel * PANEL
        side = panel & 1
        if panel >= 0:
            for s in range(LOADS):
                raw[0, first + STEP * s, lane] = next_flux[s]
                raw[1, first + STEP * s, lane] = next_error[s]
            for s in range(WEIGHT_LOADS):
                here = thread + THREADS * s
                weights[side, here // COLUMNS, here % COLUMNS] = next_weight[s]
            if thread < 3 * PANEL:
                shape[thread >> 4, lane] = next_shape
        cuda.syncthreads()

        if panel >= 0:
            part_level = float32(0)
            part_power = float32(0)
            part_noise = float32(0)
            part_signal = float32(0)
            part_square = float32(0)
            for j in range(0, PANEL, 4):
                for i in range(4):
                    # The mask, and sums that stay in 32 bits, halve what is done beside the arithmetic.
                    here = (j & (PANEL - 4)) | i
                    f = raw[0, thread, here]
                    e = raw[1, thread, here]
                    # A comparison with NaN is false. Selections, so that no thread waits for its neighbours.
                    finite = abs(f) <= LARGEST32
                    sound = (e > float32(0)) & (e <= LARGEST_ERROR32)
                    good = finite & sound
                    f = f if good else float32(0)
                    e = e if good else float32(0)
                    x = (max(f, float32(0)) if clipped else f) - shape[0, here]
                    x = x if good else float32(0)
                    variance = e * e
                    ratio = variance * shape[1, here]
                    part_level += ratio
                    part_power += x * x * shape[1, here]
                    part_noise += variance * shape[2, here]
                    part_signal += f * f
                    part_square += variance
                    good_pixels = int32(good_pixels + (int32(1) if good else int32(0)))
                    good_pixels = int32(good_pixels | (int32(0) if good or not finite else BAD_ERROR))
                    centred[here, thread] = x
                    # Cells beyond the last pixel are empty, and are not written.
                    in_cell += ratio
                    filled = int32(filled + int32(1))
                    if filled == of_cell:
                        totals[thread, waiting & SMALL] = in_cell
                        in_cell = float32(0)
                        filled = int32(0)
                        waiting = int32(waiting + int32(1))
            so_far[0, thread] += part_level
            so_far[1, thread] += part_power
            so_far[2, thread] += part_noise
            so_far[3, thread] += part_square
            if part_signal <= LARGEST32:
                signal += float64(part_signal)
            else:
                for j in range(PANEL):
                    f = raw[0, thread, j]
                    e = raw[1, thread, j]
                    if abs(f) <= LARGEST32 and e > float32(0) and e <= LARGEST_ERROR32:
                        signal += float64(f) * float64(f)

        pixel = start + PANEL + lane
        # What is not there, or hidden, is a pixel without flux.
        limit = n - top - first if pixel < p else 0
        # Flat indices, and the mask that says "not negative", halve the address arithmetic.
        corner = (top + first) * p + pixel
        for s in range(LOADS):
            next_flux[s] = NAN
            next_error[s] = float32(1)
            if STEP * s < limit:
                here = (corner + STEP * s * p) & NOT_NEGATIVE
                next_flux[s] = flux[here]
                next_error[s] = error[here]
        if masked:
            for s in range(LOADS):
                if STEP * s < limit and mask[(corner + STEP * s * p) & NOT_NEGATIVE]:
                    next_flux[s] = NAN
        if panel + 1 < panels:
            corner = (tile * panels + panel + 1) * PANEL * COLUMNS + thread
            for s in range(WEIGHT_LOADS):
                next_weight[s] = matrix[(corner + THREADS * s) & NOT_NEGATIVE]
            if thread < 3 * PANEL:
                next_shape = pixels[((panel + 1) * 3 * PANEL + thread) & NOT_NEGATIVE]
        cuda.syncthreads()

        if panel >= 0:
            for j in range(0, PANEL, 4):
                # Another mask that says "not negative"; the loop written out keeps address arithmetic small.
                here = j & (PANEL - 4)
                multiply_pixel(centred, weights, side, here, tx, ty, a, b, sums)
                multiply_pixel(centred, weights, side, here | 1, tx, ty, a, b, sums)
                multiply_pixel(centred, weights, side, here | 2, tx, ty, a, b, sums)
                multiply_pixel(centred, weights, side, here | 3, tx, ty, a, b, sums)
            if busy[panel]:
                for line in range(first_line, last_line):
                    total = in_lines[line - first_line, thread]
                    for j in range(max(starts[line], start), min(stops[line], start + PANEL)):
                        total += centred[j - start, thread] * lines[line, j]
                    in_lines[line - first_line, thread] = total
            if waiting >= SECTOR or panel == panels - 1:
                # A row's cells that wait are no more than the pixels of a panel: as many threads write a row.
                if tile == 0 and lane < waiting and written + lane < n_cells:
                    for s in range(LOADS):
                        if STEP * s < n - top - first:
                            cells[top + first + STEP * s, written + lane] = totals[first + STEP * s, lane]
                written = int32(written + waiting)
                waiting = int32(0)

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
        if tile == 0:
            bits = int32(4) if good_pixels & BAD_ERROR else int32(0)
            good_pixels &= BAD_ERROR - int32(1)
            level = so_far[0, thread]
            log_level[row] = float32(0)
            if level > float32(0):
                log_level[row] = float32(0.5) * math.log(level / float32(good_pixels))
            energy[row] = so_far[1, thread]
            expected[row] = so_far[2, thread]
            snr_norm[row] = NAN
            if 2 * int64(good_pixels) < p:
                bits |= int32(2)
            if good_pixels == 0:
                bits |= int32(1)
            else:
                snr_norm[row] = math.sqrt(signal / float64(so_far[3, thread]))
            n_good[row] = good_pixels
            flag[row] = bits
