"""The scan over velocities, and the step towards the best one, on the device.

Contract: `moefast.kernels.velocity` and its equations. Data flow, for up to BLOCK_ROWS stars at a time, whose numbers
stay on the device; (…) is what is kept of a star:

    weigh_stars         flux, error  →  y without its continuum, a′ F L⁻ᵀ (6 k), a′ (k)
    multiply_lines      these · components of ℓ, and of ℓ², at every velocity  →  (6 n_v r), (n_v s)
    compare_velocities  products, templates in components  →  ln E(v) (n_v)

    read_spectra … multiply_rows   as of a posterior: the best point b, y − a′ B b, Bᵀ(y − a′ B b)
    multiply_rows       b · slopes  →  their part of d (p)
    weigh_slopes        d  →  a′ d (p), dᵀ(y − a′ B b) and dᵀ(a′ d)
    multiply_rows       a′ d · B  →  Bᵀ(a′ d) (w)
    step_stars          (M + P⁻¹), both vectors and both sums  →  h δ and h

Floor of the scan in multiply-adds of single precision per star, for n_v = 101 velocities, k = 4025 pixels, r = s = 19
components and m = 286 templates (`observed`): products 7 n_v r k = 54.1 M, templates n_v m (6 r + s) = 3.8 M, 2.3 µs at
50 TFLOP/s. Components are 62 MB, more than the second cache holds: tiles of rows that run together read them once from
memory, 17 tiles of TILE rows or 360 stars, 0.05 µs a star. What is written and read on the way, 0.17 MB, takes 0.1 µs.
The step needs 4 p w for u, u at the point, the point's slopes and Bᵀ(a′ d), p w for its spectrum, cells w (w + 1)/2 for
M and 2 w³/6 for roots: 3.1 M in double precision for w = 70 and 608 cells, 0.2 µs at 34 TFLOP/s.

Precision: that of the CPU. Rows of the scan are made in double precision and rounded; sums over pixels and templates
are single. A sum of k terms of one sign is rounded k times, by 0.4 u of itself on average (u = 2⁻²⁴), which leaves it
off by 0.4 u √(k/3), 9·10⁻⁷ of itself for 4025 pixels; ln E is as uncertain as that share of the energy of the lines, on
the CPU as well. The step is in double precision throughout, as the posterior is; points and slopes, which the CPU
rounds to single, are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import cuda, float32, float64
from numpy.typing import NDArray

from moefast.core.errors import BackendError
from moefast.kernels.clouds import Space
from moefast.kernels.cuda.blocks import BlockScorer, StepPlan, blocks_of_a_call, results_on_device
from moefast.kernels.cuda.gram import ALIGNED
from moefast.kernels.cuda.information import (
    NOT_NEGATIVE,
    READ_THREADS,
    SOLVE_THREADS,
    STEP,
    TINY,
    _at,
    _eliminate,
    _place_matrix,
    solve_launch,
    stride_of_matrix,
)
from moefast.kernels.cuda.lanes import GROUP, SCRATCH, most_of_warp, sum_of_block, sum_of_group, sum_of_warp
from moefast.kernels.cuda.registry import kernel
from moefast.kernels.cuda.space import DeviceSpace, Matrices, SpaceWork, on_device
from moefast.kernels.quality import LARGEST32, LARGEST_ERROR32
from moefast.kernels.velocity import (
    CUDA_CONTINUUM,
    Slopes,
    VelocityTemplates,
    scan_without_cuda,
    step_without_cuda,
    velocity_and_error,
)

__all__ = [
    "BLOCK_ROWS",
    "CudaVelocityScan",
    "CudaVelocityStep",
    "DeviceScan",
    "DeviceStep",
    "compare_velocities",
    "multiply_lines",
    "step_stars",
    "velocity_evidence",
    "velocity_step",
    "weigh_slopes",
    "weigh_stars",
]

BLOCK_ROWS = 1024
"""Most stars of a block, of 0.2 MB each."""
SLOTS = 4
"""Blocks on their way: one is computed, while others are filled and copied."""
COLUMNS = CUDA_CONTINUUM
"""Columns of the continuum; those that there are not are zero."""
EACH_STAR = COLUMNS + 1
"""Rows that components of lines are multiplied with."""
PAIRS = COLUMNS * (COLUMNS + 1) // 2
TOTALS = PAIRS + COLUMNS
"""Sums over all pixels of a star."""
TILE = 128
"""Rows and columns of the tile of products that a block of threads owns; a power of two."""
EACH = 8
"""Each thread owns EACH × EACH numbers of the tile, as four squares, half a tile apart."""
QUAD = EACH // 2
HALF = TILE // 2
PANEL = 8
"""Pixels that are staged in shared memory at a time; a power of two."""
PRODUCT_THREADS = (TILE // EACH) ** 2
WARP_ROWS, WARP_COLUMNS = 4, 8
WARPS_BESIDE = TILE // EACH // WARP_COLUMNS
"""How threads of a warp lie in the tile, and warps beside each other; powers of two."""
LOADS = PANEL * TILE // PRODUCT_THREADS
"""Numbers of either side that a thread fetches for a panel."""
PADDED = TILE + 4
"""Rows of neighbouring pixels then begin in other banks of shared memory, and vectors of four where they may."""
LANES = 32
"""Threads of a block of `compare_velocities`: one warp."""
VELOCITIES = 8
TEMPLATES = 4
"""Velocities, a multiple of four, and templates that a thread compares at a time."""
WHOLE = NOT_NEGATIVE - 3
"""A mask that tells the compiler that an index is not negative, and that a vector of four numbers may begin there."""
FAINTEST = -LARGEST32
ROUNDING = 1e-12
"""As in `moefast.kernels.cpu_velocity`."""
_NO_MASK = np.zeros(0, np.bool_)


@cuda.jit(device=True)
def _invert(a, inverse):  # type: ignore[no-untyped-def]
    """L of a = L Lᵀ in place of the lower triangle, and L⁻¹; by one thread."""
    for k in range(COLUMNS):
        for j in range(k):
            a[k, k] -= a[k, j] * a[k, j]
        a[k, k] = math.sqrt(max(a[k, k], TINY))
        for i in range(k + 1, COLUMNS):
            for j in range(k):
                a[i, k] -= a[i, j] * a[k, j]
            a[i, k] /= a[k, k]
    for k in range(COLUMNS):
        inverse[k, k] = float64(1) / a[k, k]
        for j in range(k):
            total = float64(0)
            for i in range(j, k):
                total += a[k, i] * inverse[i, j]
            inverse[k, j] = -total / a[k, k]


@cuda.jit(device=True)
def _solve(inverse, vector, out):  # type: ignore[no-untyped-def]
    """Out = a⁻¹ vector, of a = L Lᵀ with L⁻¹ = `inverse`; by one thread."""
    for i in range(COLUMNS):
        out[i] = float64(0)
    for i in range(COLUMNS):
        total = float64(0)
        for k in range(i + 1):
            total += inverse[i, k] * vector[k]
        for k in range(i + 1):
            out[k] += inverse[i, k] * total


@kernel(
    "void(float32[::1], float32[::1], boolean[::1], int64, int64, float64[:,::1], float64[::1], float32[:,::1],"
    " float32[:,::1])",
    threads=READ_THREADS,
    blocks=4,
    serves=("velocity_evidence",),
)
def weigh_stars(flux, error, mask, p, first, continuum, precision, rows, weights):  # type: ignore[no-untyped-def]
    """What components are multiplied with, as `cpu_velocity.read_star` makes it.

    `flux`, `error` and `mask` are flat, of p pixels a star; `mask` is empty where there is none. `continuum`
    (COLUMNS, k) begins with pixel `first`; columns that there are not are 0, and their `precision` is 1. Of a star,
    EACH_STAR rows of `rows` (·, k or more) become y without what the continuum explains, then a′ F L⁻ᵀ, and a row of
    `weights` a′; what is behind the k pixels becomes 0.

    Launch: a block of READ_THREADS threads for each star.
    """
    parts = cuda.shared.array((SCRATCH, TOTALS), float64)
    matrix = cuda.shared.array((COLUMNS, COLUMNS), float64)
    scaled = cuda.shared.array((COLUMNS, COLUMNS), float64)
    inverse = cuda.shared.array((COLUMNS, COLUMNS), float64)
    vector = cuda.shared.array(COLUMNS, float64)
    solution = cuda.shared.array(COLUMNS, float64)
    scales = cuda.shared.array(1, float64)
    products = cuda.local.array(PAIRS, float64)
    overlaps = cuda.local.array(COLUMNS, float64)
    column = cuda.local.array(COLUMNS, float64)
    thread = cuda.threadIdx.x
    threads = cuda.blockDim.x
    star = cuda.blockIdx.x
    begin = star * p + first
    k = continuum.shape[1]
    masked = mask.size > 0

    for i in range(PAIRS):
        products[i] = float64(0)
    for i in range(COLUMNS):
        overlaps[i] = float64(0)
    for j in range(thread, k, threads):
        f = flux[begin + j]
        e = error[begin + j]
        shown = True
        if masked:
            shown = not mask[begin + j]
        # A comparison with NaN is false.
        if abs(f) <= LARGEST32 and shown and float64(e) >= TINY and e <= LARGEST_ERROR32:
            x = float64(f)
            w = float64(1) / (float64(e) * float64(e))
            for i in range(COLUMNS):
                column[i] = continuum[i, j]
            place = 0
            for i in range(COLUMNS):
                one = w * column[i]
                overlaps[i] += one * x
                for c in range(COLUMNS):
                    if c <= i:
                        products[place + c] += one * column[c]
                place += i + 1
    # A number of each warp, then those of all warps: written out, so that sums stay in registers.
    group = thread // GROUP
    place = 0
    for i in range(COLUMNS):
        total = sum_of_group(overlaps[i])
        if thread % GROUP == 0:
            parts[group, PAIRS + i] = total
        for c in range(COLUMNS):
            if c <= i:
                total = sum_of_group(products[place + c])
                if thread % GROUP == 0:
                    parts[group, place + c] = total
        place += i + 1
    cuda.syncthreads()
    for i in range(thread, COLUMNS, threads):
        total = float64(0)
        for group in range(threads // GROUP):
            total += parts[group, PAIRS + i]
        vector[i] = total
        for c in range(i + 1):
            total = float64(0)
            for group in range(threads // GROUP):
                total += parts[group, (i * (i + 1) >> 1) + c]
            matrix[i, c] = total
    cuda.syncthreads()
    if thread == 0:
        curvature = matrix[0, 0]
        for i in range(COLUMNS):
            for c in range(i + 1):
                scaled[i, c] = matrix[i, c]
            # A star without good pixels has a scale, too, that means nothing.
            scaled[i, i] += ROUNDING * matrix[i, i] + TINY
        _invert(scaled, inverse)
        _solve(inverse, vector, solution)
        # At least one standard error: a spectrum of pure noise has no scale.
        scale = max(solution[0], float64(1) / math.sqrt(curvature + TINY))
        scales[0] = scale
        for i in range(COLUMNS):
            vector[i] = scale * (vector[i] - scale * matrix[i, 0])
            for c in range(i + 1):
                scaled[i, c] = scale * scale * matrix[i, c]
            scaled[i, i] += precision[i]
        _invert(scaled, inverse)
        _solve(inverse, vector, solution)
    cuda.syncthreads()

    scale = scales[0]
    square = scale * scale
    top = star * EACH_STAR
    for j in range(thread, rows.shape[1], threads):
        known = float64(0)
        left = float64(0)
        for i in range(COLUMNS):
            column[i] = float64(0)
        if j < k:
            f = flux[begin + j]
            e = error[begin + j]
            shown = True
            if masked:
                shown = not mask[begin + j]
            for i in range(COLUMNS):
                column[i] = continuum[i, j]
            if abs(f) <= LARGEST32 and shown and float64(e) >= TINY and e <= LARGEST_ERROR32:
                left = float64(f) / scale
                known = square * (float64(1) / (float64(e) * float64(e)))
            left -= column[0]
            for i in range(COLUMNS):
                left -= solution[i] * column[i]
        weights[star, j] = float32(known)
        rows[top, j] = float32(known * left)
        for i in range(COLUMNS):
            total = float64(0)
            for c in range(COLUMNS):
                if c <= i:
                    total += inverse[i, c] * column[c]
            rows[top + 1 + i, j] = float32(known * total)


@cuda.jit(device=True)
def _read_pixel(left, right, side, k, ty, tx, a, b):  # type: ignore[no-untyped-def]
    """Numbers of a thread's rows and columns at one pixel of a panel."""
    for i in range(QUAD):
        a[i] = left[side, k, QUAD * ty + i]
    for i in range(QUAD):
        a[QUAD + i] = left[side, k, HALF + QUAD * ty + i]
    for j in range(QUAD):
        b[j] = right[side, k, QUAD * tx + j]
    for j in range(QUAD):
        b[QUAD + j] = right[side, k, HALF + QUAD * tx + j]


@kernel(
    "void(float32[:,::1], float32[:,::1], int64, float32[:,::1])",
    threads=PRODUCT_THREADS,
    blocks=2,
    serves=("velocity_evidence",),
)
def multiply_lines(rows, components, n, out):  # type: ignore[no-untyped-def]
    """Products of the first n rows (·, k) with components (k, c), in the first n rows of `out` (·, c).

    k is a multiple of PANEL and c one of TILE. A number is the sum of its terms in their order, whatever stands in the
    other rows.

    Launch: (c / TILE, ⌈n / TILE⌉) blocks of PRODUCT_THREADS threads. While a panel of PANEL pixels, staged in shared
    memory, is multiplied, each thread fetches LOADS numbers of either side for the next one into registers:

        thread (ty, tx) owns rows    4 ty … 4 ty + 3  and  64 + 4 ty … 64 + 4 ty + 3   of the tile
                       and columns   4 tx … 4 tx + 3  and  64 + 4 tx … 64 + 4 tx + 3

    so that 8 + 8 numbers from shared memory, in vectors of four, feed 64 multiply-adds. Those of two pixels are
    read at a time. Threads of a warp lie WARP_ROWS × WARP_COLUMNS in the tile: it reads as few
    different vectors as can be.
    """
    left = cuda.shared.array((2, PANEL, PADDED), float32, alignment=ALIGNED)
    right = cuda.shared.array((2, PANEL, TILE), float32, alignment=ALIGNED)
    sums = cuda.local.array((EACH, EACH), float32)
    a = cuda.local.array(EACH, float32)
    b = cuda.local.array(EACH, float32)
    second_a = cuda.local.array(EACH, float32)
    second_b = cuda.local.array(EACH, float32)
    next_left = cuda.local.array(LOADS, float32)
    next_right = cuda.local.array(LOADS, float32)
    # Masks instead of divisions tell the compiler that indices are not negative: it then reads vectors of four.
    thread = cuda.threadIdx.x & (PRODUCT_THREADS - 1)
    warp = thread // (WARP_ROWS * WARP_COLUMNS)
    tx = (thread & (WARP_COLUMNS - 1)) + WARP_COLUMNS * (warp & (WARPS_BESIDE - 1))
    below = (warp // WARPS_BESIDE) & (TILE // EACH // WARP_ROWS - 1)
    ty = ((thread // WARP_COLUMNS) & (WARP_ROWS - 1)) + WARP_ROWS * below
    top = cuda.blockIdx.y * TILE
    edge = cuda.blockIdx.x * TILE
    depth = components.shape[0]

    for i in range(EACH):
        for j in range(EACH):
            sums[i, j] = float32(0)
    side = 0
    # One panel more than there are: the first round only fetches, the last only multiplies.
    for start in range(0, depth + PANEL, PANEL):
        if start < depth:
            for s in range(LOADS):
                # Of rows, threads fetch neighbouring pixels; rows behind the last are copies of it, and not kept.
                place = thread + s * PRODUCT_THREADS
                row = min(top + place // PANEL, n - 1)
                next_left[s] = rows[row, start + (place & (PANEL - 1))]
            for s in range(LOADS):
                place = thread + s * PRODUCT_THREADS
                next_right[s] = components[start + place // TILE, edge + (place & (TILE - 1))]
        if start > 0:
            for k in range(0, PANEL, 2):
                _read_pixel(left, right, side, k, ty, tx, a, b)
                _read_pixel(left, right, side, k + 1, ty, tx, second_a, second_b)
                for i in range(EACH):
                    for j in range(EACH):
                        sums[i, j] += a[i] * b[j]
                for i in range(EACH):
                    for j in range(EACH):
                        sums[i, j] += second_a[i] * second_b[j]
        side = (side + 1) & 1
        if start < depth:
            for s in range(LOADS):
                place = thread + s * PRODUCT_THREADS
                left[side, place & (PANEL - 1), place // PANEL] = next_left[s]
                right[side, place // TILE, place & (TILE - 1)] = next_right[s]
        cuda.syncthreads()
    for i in range(EACH):
        row = top + QUAD * ty + i + (HALF - QUAD) * (i // QUAD)
        if row < n:
            for j in range(EACH):
                out[row, edge + QUAD * tx + j + (HALF - QUAD) * (j // QUAD)] = sums[i, j]


@kernel(
    "void(float32[:,::1], float32[:,::1], int64, int64, float32[::1], float32[::1], float32[::1], float64[:,::1])",
    threads=LANES,
    blocks=16,
    serves=("velocity_evidence",),
)
def compare_velocities(  # type: ignore[no-untyped-def]
    of_rows, of_weights, n_lines, n_squares, of_lines, of_squares, log_weights, evidence
):
    """Ln Σ_j π_j exp(what template j gains over no lines), at every velocity.

    `of_rows` and `of_weights` are what `multiply_lines` gives, column v r + k of velocity v and component k.
    `of_lines` (r m), `of_squares` (s m) are templates in components, m a multiple of LANES · TEMPLATES; of those that
    there are not the `log_weights` are so low that they count nothing. `evidence` (stars, n_v).

    Launch: (⌈n_v / VELOCITIES⌉, stars) blocks of LANES threads, with 4 · VELOCITIES · (EACH_STAR r + s) bytes of
    dynamic shared memory. A thread owns TEMPLATES templates at VELOCITIES velocities at a time.
    """
    values = cuda.shared.array(0, float32, alignment=ALIGNED)
    scratch = cuda.shared.array(SCRATCH, float32)
    sums = cuda.local.array((TEMPLATES, VELOCITIES), float32)
    energy = cuda.local.array((TEMPLATES, VELOCITIES), float32)
    best = cuda.local.array(VELOCITIES, float32)
    total = cuda.local.array(VELOCITIES, float32)
    a = cuda.local.array(TEMPLATES, float32)
    b = cuda.local.array(VELOCITIES, float32)
    lane = cuda.threadIdx.x & (LANES - 1)
    star = cuda.blockIdx.y
    first = cuda.blockIdx.x * VELOCITIES
    n_v = evidence.shape[1]
    m = log_weights.size
    of_star = star * EACH_STAR
    squares = EACH_STAR * n_lines * VELOCITIES

    for place in range(lane, n_lines * VELOCITIES, LANES):
        v = place // n_lines
        k = place - v * n_lines
        for row in range(EACH_STAR):
            value = float32(0)
            if first + v < n_v:
                value = of_rows[of_star + row, first * n_lines + place]
            values[(row * n_lines + k) * VELOCITIES + v] = value
    for place in range(lane, n_squares * VELOCITIES, LANES):
        v = place // n_squares
        k = place - v * n_squares
        value = float32(0)
        if first + v < n_v:
            value = of_weights[star, first * n_squares + place]
        values[squares + k * VELOCITIES + v] = value
    cuda.syncthreads()

    for v in range(VELOCITIES):
        best[v] = FAINTEST
        total[v] = float32(0)
    for begin in range(0, m, LANES * TEMPLATES):
        for t in range(TEMPLATES):
            for v in range(VELOCITIES):
                energy[t, v] = float32(0)
        for k in range(n_squares):
            at = (k * m + begin + lane) & NOT_NEGATIVE
            for t in range(TEMPLATES):
                a[t] = of_squares[at + t * LANES]
            place = (squares + k * VELOCITIES) & WHOLE
            for v in range(VELOCITIES):
                b[v] = values[place + v]
            for t in range(TEMPLATES):
                for v in range(VELOCITIES):
                    energy[t, v] += a[t] * b[v]
        # Last y: what is left in the sums is then the gain.
        for row in range(EACH_STAR - 1, -1, -1):
            for t in range(TEMPLATES):
                for v in range(VELOCITIES):
                    sums[t, v] = float32(0)
            for k in range(n_lines):
                at = (k * m + begin + lane) & NOT_NEGATIVE
                for t in range(TEMPLATES):
                    a[t] = of_lines[at + t * LANES]
                place = ((row * n_lines + k) * VELOCITIES) & WHOLE
                for v in range(VELOCITIES):
                    b[v] = values[place + v]
                for t in range(TEMPLATES):
                    for v in range(VELOCITIES):
                        sums[t, v] += a[t] * b[v]
            if row > 0:
                for t in range(TEMPLATES):
                    for v in range(VELOCITIES):
                        energy[t, v] -= sums[t, v] * sums[t, v]
        for t in range(TEMPLATES):
            known = log_weights[begin + t * LANES + lane]
            for v in range(VELOCITIES):
                gain = known + sums[t, v] - float32(0.5) * energy[t, v]
                apart = math.exp(-abs(gain - best[v]))
                if gain > best[v]:
                    total[v] = total[v] * apart + float32(1)
                    best[v] = gain
                else:
                    total[v] += apart
    for v in range(VELOCITIES):
        most = most_of_warp(best[v], scratch)
        found = sum_of_warp(total[v] * math.exp(best[v] - most), scratch)
        if lane == 0 and first + v < n_v:
            evidence[star, first + v] = float64(most) + math.log(float64(found))


@kernel(
    "void(float64[:,::1], float64[:,::1], float64[:,::1], float32[::1], float64[:,::1])",
    threads=READ_THREADS,
    blocks=8,
    serves=("velocity_step",),
)
def weigh_slopes(y, information, slopes, of_reference, sums):  # type: ignore[no-untyped-def]
    """A′ d in the place of the directions' part of d, and dᵀ(y − a′ B b) and dᵀ(a′ d) of each star.

    Launch: a block of READ_THREADS threads for each star.
    """
    scratch = cuda.shared.array(SCRATCH, float64)
    star = cuda.blockIdx.x
    force = float64(0)
    curvature = float64(0)
    for j in range(cuda.threadIdx.x, y.shape[1], cuda.blockDim.x):
        d = slopes[star, j] + float64(of_reference[j])
        weighed = information[star, j] * d
        slopes[star, j] = weighed
        force += d * y[star, j]
        curvature += d * weighed
    force = sum_of_block(force, scratch)
    curvature = sum_of_block(curvature, scratch)
    if cuda.threadIdx.x == 0:
        sums[star, 0] = force
        sums[star, 1] = curvature


@kernel(
    "void(int64, float64[:,::1], float64[:,::1], float64[:,::1], float64[:,::1], float64[:,::1], float64[:,::1],"
    " float64[::1], float64[:,::1], float64[:,::1])",
    threads=SOLVE_THREADS,
    blocks=2,
    serves=("velocity_step",),
)
def step_stars(n_stars, packed, vectors, across, points, sums, precision, pull, scratch, found):  # type: ignore[no-untyped-def]
    """How far velocities of stars are off, and their curvature h, (·, 2), with everything else marginalised.

    `packed` is M, `vectors` Bᵀ(y − a′ B b), `across` Bᵀ(a′ d), `points` b and `sums` what `weigh_slopes` gives. The
    velocity is one column more behind M + P⁻¹: what the others do not explain of it is h, and h δ beside it. The matrix
    lies in shared memory if `scratch` (blocks, (w + 1) · `stride_of_matrix`) has fewer columns.

    Launch: as `expand_stars`, for one direction more.
    """
    shared = cuda.shared.array(0, float64)
    width = pull.size
    n = width + 1
    corner = STEP * n
    pivots = corner + STEP * STEP
    thread = cuda.threadIdx.x
    threads = cuda.blockDim.x
    stride = stride_of_matrix(n)
    if scratch.shape[1] < n * stride:  # noqa: SIM108
        a = shared[pivots + STEP : pivots + STEP + n * stride]
    else:
        a = scratch[cuda.blockIdx.x]
    for star in range(cuda.blockIdx.x, n_stars, cuda.gridDim.x):
        cuda.syncthreads()
        _place_matrix(packed, precision, star, width, stride, a)
        for i in range(thread, width, threads):
            value = vectors[star, i] + pull[i]
            for j in range(width):
                value -= precision[j, i] * points[star, j]
            a[_at(stride, i, n)] = across[star, i]
            a[_at(stride, i, n + 1)] = value
        if thread == 0:
            a[_at(stride, width, width)] = sums[star, 1]
            a[_at(stride, width, n)] = sums[star, 1]
            a[_at(stride, width, n + 1)] = sums[star, 0]
        _eliminate(a, stride, width, n, float64(0), False, shared, corner, pivots)
        if thread == 0:
            curvature = a[_at(stride, width, n)]
            found[star, 0] = a[_at(stride, width, n + 1)] / max(curvature, TINY)
            found[star, 1] = curvature


class Evidence(NamedTuple):
    """What the scan gives, one row per spectrum."""

    evidence: NDArray


class Steps(NamedTuple):
    """What the step gives, one row per spectrum: how far the velocity is off, and its curvature."""

    found: NDArray


class DeviceScan(StepPlan):
    """Templates on the device, laid out as the kernels read them.

    Parameters
    ----------
    templates : VelocityTemplates
    n_pixels : int
        Of a spectrum; templates have some of them.

    Raises
    ------
    BackendError
        They need more shared memory than a block has.
    """

    results: Callable[..., Any] = Evidence

    def __init__(self, templates: VelocityTemplates, n_pixels: int) -> None:
        if lack := scan_without_cuda(templates):
            raise BackendError(f"backend cuda: there are no kernels for {lack}; use backend cpu")
        (c, k), (m, self.n_lines) = templates.continuum.shape, templates.of_lines.shape
        self.n_pixels, self.first, self.n_velocities = n_pixels, templates.first, templates.n_velocities
        self.n_squares, self.depth = templates.of_squares.shape[1], -(-k // PANEL) * PANEL
        continuum, precision = np.zeros((COLUMNS, k)), np.ones(COLUMNS)
        continuum[:c], precision[:c] = templates.continuum, templates.precision
        self.continuum, self.precision = on_device(continuum, np.float64), on_device(precision, np.float64)

        def by_pixel(components: NDArray) -> Any:
            """Components (n_v, r, k) as (k, n_v r), both filled up with zeros."""
            n_v, r, _ = components.shape
            filled = np.zeros((self.depth, -(-n_v * r // TILE) * TILE), np.float32)
            filled[:k, : n_v * r] = components.reshape(n_v * r, k).T
            return on_device(filled, np.float32)

        self.lines, self.squares = by_pixel(templates.lines), by_pixel(templates.squares)
        columns = -(-m // (LANES * TEMPLATES)) * LANES * TEMPLATES

        def filled(values: NDArray, value: float) -> Any:
            out = np.full((*values.shape[:-1], columns), value, np.float32)
            out[..., :m] = values
            return on_device(out.reshape(-1), np.float32)

        self.templates = (
            filled(templates.of_lines.T, 0),
            filled(templates.of_squares.T, 0),
            filled(templates.log_weights, -1e30),
        )
        self.shared = 4 * VELOCITIES * (EACH_STAR * self.n_lines + self.n_squares)
        self.no_mask = cuda.to_device(_NO_MASK)

    def kinds(self, rows: int) -> list[tuple[tuple[int, ...], type]]:
        """Shape and dtype of each array of `Evidence`."""
        return [((rows, self.n_velocities), np.float64)]

    def bytes_per_row(self) -> int:
        """Device memory of a row, flux, error and mask included."""
        of_products = EACH_STAR * self.lines.shape[1] + self.squares.shape[1]
        return 9 * self.n_pixels + 4 * ((EACH_STAR + 1) * self.depth + of_products) + 8 * self.n_velocities

    def work(self, rows: int) -> ScanWork:
        """Device memory for so many stars."""
        return ScanWork(rows, self)

    def steps(
        self, flux: Any, error: Any, mask: Any, n: int, work: ScanWork, scores: Evidence, stream: Any
    ) -> list[tuple[str, Callable[[], None]]]:
        """What is done to n spectra, in its order: a name in words, and what starts it in `stream`; see `launch`."""
        hidden = self.no_mask if mask is None else mask

        def multiply(rows: Any, components: Any, count: int, out: Any) -> None:
            blocks = (components.shape[1] // TILE, -(-count // TILE))
            multiply_lines[blocks, PRODUCT_THREADS, stream](rows, components, count, out)

        groups = -(-self.n_velocities // VELOCITIES)
        return [
            (
                "read pixels, continuum",
                lambda: weigh_stars[n, READ_THREADS, stream](
                    flux, error, hidden, self.n_pixels, self.first, self.continuum, self.precision,
                    work.rows, work.weights,
                ),
            ),
            ("lines", lambda: multiply(work.rows, self.lines, n * EACH_STAR, work.of_rows)),
            ("squares of lines", lambda: multiply(work.weights, self.squares, n, work.of_weights)),
            (
                "templates",
                lambda: compare_velocities[(groups, n), LANES, stream, self.shared](
                    work.of_rows, work.of_weights, self.n_lines, self.n_squares, *self.templates,
                    scores.evidence,
                ),
            ),
        ]  # fmt: skip


class ScanWork:
    """Device memory of up to `rows` spectra between the kernels, and the results."""

    def __init__(self, rows: int, plan: DeviceScan) -> None:
        def singles(*shape: int) -> Any:
            return cuda.device_array(shape, np.float32)

        self.rows, self.weights = singles(rows * EACH_STAR, plan.depth), singles(rows, plan.depth)
        self.of_rows = singles(rows * EACH_STAR, plan.lines.shape[1])
        self.of_weights = singles(rows, plan.squares.shape[1])
        self.memory_of_scores, self.scores = results_on_device(plan, rows)


class DeviceStep(StepPlan):
    """A space and the change of spectra with velocity on the device.

    Raises
    ------
    BackendError
        They need more shared memory than a block has.
    """

    results: Callable[..., Any] = Steps

    def __init__(self, space: Space, slopes: Slopes) -> None:
        if lack := step_without_cuda(space):
            raise BackendError(f"backend cuda: there are no kernels for {lack}; use backend cpu")
        self.space = DeviceSpace(space)
        self.n_pixels = self.space.n_pixels
        q, width = self.space.n_nuisances, self.space.width
        self.slopes = on_device(np.roll(slopes.of_directions, q, axis=1).T, np.float64)
        self.of_reference = on_device(slopes.of_reference, np.float32)
        self.no_mask = cuda.to_device(_NO_MASK)
        self.solving = solve_launch(width), solve_launch(width + 1)
        self.matrices = Matrices(self.solving)

    def kinds(self, rows: int) -> list[tuple[tuple[int, ...], type]]:
        """Shape and dtype of each array of `Steps`."""
        return [((rows, 2), np.float64)]

    def bytes_per_row(self) -> int:
        """Device memory of a row, flux, error and mask included, and its share of a block's scratch."""
        doubles = self.space.doubles() + self.space.width + 4
        # With the 12 bytes of SNR, good pixels and flag.
        return 9 * self.n_pixels + 8 * doubles + 12 + -(-self.matrices.scratch_bytes // BLOCK_ROWS)

    def work(self, rows: int) -> StepWork:
        """Device memory for so many stars."""
        return StepWork(rows, self)

    def steps(
        self, flux: Any, error: Any, mask: Any, n: int, work: StepWork, scores: Steps, stream: Any
    ) -> list[tuple[str, Callable[[], None]]]:
        """What is done to n spectra, in its order: a name in words, and what starts it in `stream`; see `launch`."""
        space = self.space
        hidden = self.no_mask if mask is None else mask

        of_point, of_step = (self.matrices.launch(n, each, stream) for each in self.solving)

        def multiply(rows: Any, matrix: Any, out: Any) -> None:
            space.multiply(n, rows, matrix, out, work, stream)

        return [
            *space.to_point(flux, error, hidden, n, work, work.quality, of_point, stream),
            ("its slopes", lambda: multiply(work.points, self.slopes, work.spectra)),
            (
                "slopes times information",
                lambda: weigh_slopes[n, READ_THREADS, stream](
                    work.y, work.information, work.spectra, self.of_reference, work.sums
                ),
            ),
            ("slopes times directions", lambda: multiply(work.spectra, space.directions, work.across)),
            (
                "step",
                lambda: step_stars[of_step](
                    n, work.packed, work.u, work.across, work.points, work.sums, space.precision, space.pull,
                    work.scratch, scores.found,
                ),
            ),
        ]  # fmt: skip


class StepWork(SpaceWork):
    """Device memory of up to `rows` spectra between the kernels, and the results."""

    def __init__(self, rows: int, plan: DeviceStep) -> None:
        super().__init__(rows, plan.space, plan.matrices)

        def doubles(*shape: int) -> Any:
            return cuda.device_array(shape, np.float64)

        self.across, self.sums = doubles(rows, plan.space.width), doubles(rows, 2)
        self.memory_of_scores, self.scores = results_on_device(plan, rows)
        # What the reading kernel gives as well.
        kinds = (np.float32, np.int32, np.uint32)
        self.quality = tuple(cuda.device_array(rows, kind) for kind in kinds)


class CudaVelocityScan(BlockScorer):
    """Scans velocities on the device, block by block; several threads may call it.

    Parameters
    ----------
    templates : VelocityTemplates
    n_pixels : int
        Of a spectrum.
    block_rows : int
        Rows per block at most; fewer if FREE_SHARE of the free device memory does not hold all slots.
    slots : int
        Blocks on their way at most.

    Raises
    ------
    BackendError
        There is no usable device, or the templates are too large for the kernels.
    DeviceMemoryError, PinnedMemoryError
        Memory of the device, or pinned memory of the host, is too small for blocks of FLOOR_ROWS rows in all slots.
    """

    def __init__(
        self, templates: VelocityTemplates, n_pixels: int, *, block_rows: int = BLOCK_ROWS, slots: int = SLOTS
    ) -> None:
        super().__init__(lambda: DeviceScan(templates, n_pixels), block_rows, slots)

    def __call__(
        self, flux: NDArray, error: NDArray, mask: NDArray[np.bool_] | None = None
    ) -> NDArray[np.float64]:
        """Ln E(v) of spectra on the host; see `moefast.kernels.velocity_evidence`."""
        evidence: NDArray[np.float64] = self._scored(flux, error, mask).evidence
        return evidence


class CudaVelocityStep(BlockScorer):
    """Makes the step of velocities on the device, block by block; several threads may call it.

    Parameters
    ----------
    space : Space
    slopes : Slopes
    block_rows, slots
        As of `CudaVelocityScan`.

    Raises
    ------
    BackendError
        There is no usable device, or the space is too large for the kernels.
    DeviceMemoryError, PinnedMemoryError
        Memory of the device, or pinned memory of the host, is too small for blocks of FLOOR_ROWS rows in all slots.
    """

    def __init__(
        self, space: Space, slopes: Slopes, *, block_rows: int = BLOCK_ROWS, slots: int = SLOTS
    ) -> None:
        super().__init__(lambda: DeviceStep(space, slopes), block_rows, slots)

    def __call__(
        self, flux: NDArray, error: NDArray, mask: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The step of spectra on the host and its 1σ; see `moefast.kernels.velocity_step`."""
        return velocity_and_error(self._scored(flux, error, mask).found)


def velocity_evidence(
    flux: NDArray, error: NDArray, mask: NDArray[np.bool_] | None, templates: VelocityTemplates
) -> NDArray[np.float64]:
    """`moefast.kernels.velocity_evidence` on the device, which has checked the arguments.

    Blocks in a loop are better given to one `CudaVelocityScan`, which keeps the templates on the device.
    """
    blocks = blocks_of_a_call(len(flux), BLOCK_ROWS, SLOTS)
    return CudaVelocityScan(templates, flux.shape[1], **blocks)(flux, error, mask)


def velocity_step(
    flux: NDArray, error: NDArray, mask: NDArray[np.bool_] | None, space: Space, slopes: Slopes
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`moefast.kernels.velocity_step` on the device, which has checked the arguments.

    Blocks in a loop are better given to one `CudaVelocityStep`, which keeps the space on the device.
    """
    blocks = blocks_of_a_call(len(flux), BLOCK_ROWS, SLOTS)
    return CudaVelocityStep(space, slopes, **blocks)(flux, error, mask)
