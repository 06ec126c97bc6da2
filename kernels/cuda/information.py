"""From flux and error to a star's information (u, M), and its dense algebra, on the device.

The equations are those of `moefast.posterior.forward`, in the form of `moefast.kernels.clouds`. Data flow, for a few
hundred stars at a time, whose numbers stay on the device; (…) is what is kept of a star:

    read_spectra       flux, error   →  c₀, y = a′(x/c₀ − r), a′ (2 p), means of a′D over cells (g), SNR, flags
    multiply_rows      cells · products  →  M, packed (w (w + 1)/2);    y · B  →  u (w), summed by add_parts
    expand_stars       (P⁻¹ + M) b = P⁻¹b₀ + u  →  b (w)
    multiply_rows      b · Bᵀ  →  spectrum (p)
    subtract_spectra   y  →  y − a′ B b, and the energy that is left
    multiply_rows      (y − a′ B b) · B  →  Bᵀ(y − a′ B b) (w)
    isolate_slopes     u = Bᵀ(y − a′ B b) + M b and M, all but k slopes taken out, for each group  →  k (k + 1) each
    weigh_widths       evidence of both widths  →  probability that the slopes are narrow (1)
    marginalise_stars  u = Bᵀ(y − a′ B b) + M b, nuisances taken out  →  u (n), M (n (n + 1)/2)
    root_stars         M = UᵀU  →  U, U⁻ᵀu in their places
    whiten_stars       TTᵀ = I + UUᵀ  →  C' = T⁻¹U (n²), λ = T⁻¹U⁻ᵀu (n)
    moefast.kernels.cuda.clouds       C', λ and the clouds  →  evidence of every cloud  →  labels
    moefast.kernels.cuda.correction   b, labels, experts  →  log g, where a network corrects it

with w = n + q directions, nuisances first. Every product whose second factor all stars share is one matrix product of
all stars; what belongs to a star is done by a block of threads. Where slopes have one width, `isolate_slopes` and
`weigh_widths` are not launched.

Precision: everything here is in double precision, as on the CPU but for y and what is left of it, which the CPU rounds
to single: in single precision M has negative eigenvalues wherever gaps make it singular. Devices for computing have
half as many units for double as for single precision.

Floor in multiply-adds per star for p = 4096, g = 220, n = 130, q = 12: u and the expansion 3 p w = 1.7 M, M
g w (w + 1)/2 = 2.2 M, roots w³/6 + q w²/2 + 5 n³/6 = 2.4 M: 6.4 M, 0.4 µs at 34 TFLOP/s. The floor of bytes, 33 kB, is
0.01 µs; what is written and read on the way, 0.4 MB, 0.1 µs. G groups of slopes add G (w³/6 + w²), for w = 70 and
G = 4 another 0.25 M, 0.015 µs.

Roots: a block of threads owns a star. Matrices (n, n) lie in shared memory, or, where they are too large, in scratch
of the device's memory, of as many blocks as run at a time, which the second cache holds; rows are made STEP at a
time: what the panel's columns have of all rows above is staged in shared memory, and each thread owns a column of the
panel, STEP numbers in registers:

    column j     v_r = a_rj − Σ_k<top U_kr U_kj        of a number of the matrix and STEP that are staged
    column j     v ← corner⁻ᵀ v, with corner the panel's own STEP × STEP root

Row k of such a matrix holds column k of what lies above the diagonal and the diagonal in its first k + 1 places, and
U_kj from the diagonal on in place j + 1, so that sums along rows and along columns both read neighbours.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import cuda, float32, float64, int32, uint32

from moefast.kernels.cuda.gram import ALIGNED
from moefast.kernels.cuda.lanes import GROUP, SCRATCH, WRITTEN_OUT, sum_of_block
from moefast.kernels.cuda.registry import kernel
from moefast.kernels.quality import LARGEST32, LARGEST_ERROR32

__all__ = [
    "BAND",
    "READ_THREADS",
    "SOLVE_THREADS",
    "STEP",
    "WIDTH_THREADS",
    "add_parts",
    "expand_stars",
    "isolate_slopes",
    "marginalise_stars",
    "multiply_rows",
    "parts_of_product",
    "product_launch",
    "read_spectra",
    "root_stars",
    "size_of_root",
    "solve_launch",
    "stride_of_matrix",
    "subtract_spectra",
    "weigh_widths",
    "whiten_stars",
]

READ_THREADS = 128
SOLVE_THREADS = 128
"""Threads of a block of those that solve, at most: they take some 200 registers each, and two or three blocks should
fit a multiprocessor."""
WIDTH_THREADS = 32
"""Threads of a block of `weigh_widths`, each with a star: the blocks of a thousand stars lie on 32 multiprocessors."""
STEP = 8
"""Rows of a matrix whose root is found together."""
TILE_ROWS = 64
TILE_COLUMNS = 64
"""Sides of the tile of a product that a block of threads owns; powers of two."""
EACH_ROWS = 8
EACH_COLUMNS = 4
"""Numbers of a tile that a thread owns."""
PANEL = 8
"""Terms of a product that are staged in shared memory at a time."""
PRODUCT_THREADS = TILE_ROWS // EACH_ROWS * TILE_COLUMNS // EACH_COLUMNS
LEFT, RIGHT = PANEL * TILE_ROWS // PRODUCT_THREADS, PANEL * TILE_COLUMNS // PRODUCT_THREADS
"""Numbers of a panel that a thread fetches."""
BAND = 8
"""Rows of C' that lie together, column by column, so that some threads read some of them in vectors."""
PART_TERMS = 512
"""Terms that one block adds up, of products of few columns: their tiles alone are too few for all multiprocessors."""
MANY_COLUMNS = 512
"""From so many on, tiles are enough."""
PADDED = TILE_ROWS + 2
"""Rows of neighbouring terms then begin in different banks of shared memory."""
MOST_OF_BLOCK = 48 * 1024 - 8 * SCRATCH
"""Bytes of dynamic shared memory that a block has beside what sums of a block go through."""
TINY = 1e-30
LEAST_CURVATURE = 1e-8
LEAST_INFORMATION = 1e-13
ROUNDING = 1e-14
"""As in `moefast.kernels.cpu_information`."""
NOT_NEGATIVE = 0x7FFFFFFFFFFFFFFF
"""A mask that tells the compiler so: it then counts no index from the end, and needs fewer registers."""
SCALE, STRENGTH, ENERGY, LEVEL, N_USED, EXPLAINED, BEYOND, NARROW = range(8)
NUMBERS = 8
"""Places in the numbers of a star: scale c₀, strength, energy, Σ σ²/D, pixels that weigh, what nuisances and the best
point of the space explain, what the latter gains beyond |λ|², and the probability of narrow slopes."""
NAN = np.float32(np.nan)


def size_of_root(n: int) -> int:
    """Numbers of C' in bands: BAND rows from their first diagonal on, columns made up to fours."""
    columns = -(-n // 4) * 4
    return sum(BAND * (columns - first) for first in range(0, n, BAND))


def parts_of_product(depth: int, columns: int) -> tuple[int, int]:
    """Parts of the products with a matrix (depth, columns), and terms of each: whatever the number of rows."""
    if columns >= MANY_COLUMNS or depth <= PART_TERMS:
        return 1, depth
    return -(-depth // PART_TERMS), PART_TERMS


def product_launch(n: int, columns: int, n_parts: int) -> tuple[tuple[int, int, int], int]:
    """Blocks and threads of `multiply_rows` for n rows."""
    return (-(-columns // TILE_COLUMNS), -(-n // TILE_ROWS), n_parts), PRODUCT_THREADS


def _stride_of_matrix(width):  # type: ignore[no-untyped-def]
    """Numbers of a row of a matrix whose root is found: odd, so that columns lie in all banks of shared memory."""
    return (width + 2) | 1


stride_of_matrix = cuda.jit(device=True)(_stride_of_matrix)


class Solving(NamedTuple):
    """How the kernels that solve for so many directions are launched.

    Attributes
    ----------
    threads : int
        Threads of a block: each owns a column of a panel, the vector that goes along and the corner's included.
    staged : int
        Bytes of dynamic shared memory without the matrix.
    matrix : int
        Bytes of the matrix.
    """

    threads: int
    staged: int
    matrix: int

    @property
    def fits(self) -> bool:
        """Whether the matrix itself fits in shared memory."""
        return self.staged + self.matrix <= MOST_OF_BLOCK


def solve_launch(width: int, panels: int = 1) -> Solving:
    """The launch of kernels that stage so many panels of a matrix of `width` rows."""
    threads = min(SOLVE_THREADS, 32 * -(-(width + 1 + STEP) // 32))
    staged = panels * STEP * width + width + STEP * STEP + STEP
    return Solving(threads, 8 * staged, 8 * width * _stride_of_matrix(width))


@kernel(
    "void(float32[::1], float32[::1], boolean[::1], int64, float32[::1], float32[::1], int64[::1], int64[::1],"
    " float64[::1], float64[:,::1], float64[:,::1], float64[:,::1], float64[:,::1], float32[::1], int32[::1],"
    " uint32[::1])",
    threads=READ_THREADS,
    blocks=5,
    serves=("cloud_posterior",),
)
def read_spectra(  # type: ignore[no-untyped-def]
    flux, error, mask, p, reference, noise_shape, pixels, offsets, shares,
    y, information, cells, numbers, snr_norm, n_good, flag,
):  # fmt: skip
    """Scale, y, a′, means over cells, SNR and flags of each star, as `cpu_information.read_pixels`.

    `flux`, `error` and `mask` are flat; `mask` is empty where there is none. The pixels of cell c are
    pixels[offsets[c] : offsets[c + 1]], with `shares` in its mean. `numbers` (·, NUMBERS) has a place for the energy.

    Launch: a block of READ_THREADS threads for each star.
    """
    sums = cuda.shared.array(SCRATCH, float64)
    counts = cuda.shared.array(SCRATCH, int32)
    thread = cuda.threadIdx.x
    threads = cuda.blockDim.x
    star = cuda.blockIdx.x
    begin = star * p
    masked = mask.size > 0

    curvature = float64(0)
    overlap = float64(0)
    level = float64(0)
    signal = float64(0)
    noise = float64(0)
    n_used = int32(0)
    n_sound = int32(0)
    n_wrong = int32(0)
    for j in range(thread, p, threads):
        f = flux[begin + j]
        e = error[begin + j]
        shown = True
        if masked:
            shown = not mask[begin + j]
        # A comparison with NaN is false.
        finite = abs(f) <= LARGEST32 and shown
        sound = e > float32(0) and e <= LARGEST_ERROR32
        if finite and sound:
            x = float64(f)
            variance = float64(e) * float64(e)
            n_sound += int32(1)
            signal += x * x
            noise += variance
            if float64(e) >= TINY:
                n_used += int32(1)
                r = float64(reference[j])
                weighed = r / variance
                curvature += weighed * r
                overlap += weighed * x
                level += variance / float64(noise_shape[j])
        elif finite:
            n_wrong += int32(1)
    curvature = sum_of_block(curvature, sums) + TINY
    overlap = sum_of_block(overlap, sums)
    level = sum_of_block(level, sums)
    signal = sum_of_block(signal, sums)
    noise = sum_of_block(noise, sums)
    n_used = sum_of_block(n_used, counts)
    n_sound = sum_of_block(n_sound, counts)
    n_wrong = sum_of_block(n_wrong, counts)

    error_of_scale = math.sqrt(curvature)
    scale = (error_of_scale + max(overlap - error_of_scale, float64(0))) / curvature
    for j in range(thread, p, threads):
        f = flux[begin + j]
        e = error[begin + j]
        shown = True
        if masked:
            shown = not mask[begin + j]
        left = float64(0)
        weight = float64(0)
        if abs(f) <= LARGEST32 and shown and float64(e) >= TINY and e <= LARGEST_ERROR32:
            w = float64(1) / (float64(e) * float64(e))
            left = scale * (w * (float64(f) - scale * float64(reference[j])))
            weight = scale * w * scale
        y[star, j] = left
        information[star, j] = weight
    # Cells gather what other threads of the block have written.
    cuda.syncthreads()
    for c in range(thread, cells.shape[1], threads):
        total = float64(0)
        for place in range(offsets[c], offsets[c + 1]):
            j = pixels[place]
            total += shares[place] * (information[star, j] * float64(noise_shape[j]))
        cells[star, c] = total
    if thread == 0:
        numbers[star, SCALE] = scale
        numbers[star, STRENGTH] = overlap / error_of_scale
        numbers[star, LEVEL] = level
        numbers[star, N_USED] = float64(n_used)
        numbers[star, NARROW] = float64(0)
        bits = uint32(4) if n_wrong > 0 else uint32(0)
        if 2 * n_sound < p:
            bits |= uint32(2)
        snr_norm[star] = NAN
        if n_sound == 0:
            bits |= uint32(1)
        else:
            snr_norm[star] = float32(math.sqrt(signal / noise))
        n_good[star] = n_sound
        flag[star] = bits


@cuda.jit(device=True)
def _fetch(rows, matrix, top, edge, n, start, end, thread, left, right):  # type: ignore[no-untyped-def]
    """A thread's share of the terms [start, start + PANEL) of a tile; those from `end` on are 0 in `left`.

    Rows and columns beyond the last are those of the last, which nothing keeps: without branches, all reads are on
    their way together.
    """
    threads = TILE_ROWS // EACH_ROWS * (TILE_COLUMNS // EACH_COLUMNS)
    last = matrix.shape[1] - 1
    for i in range(LEFT):
        place = thread + i * threads
        term = start + (place & (PANEL - 1))
        row = min(top + place // PANEL, n - 1) & NOT_NEGATIVE
        value = rows[row, min(term, end - 1) & NOT_NEGATIVE]
        left[i] = value if term < end else float64(0)
    for i in range(RIGHT):
        place = thread + i * threads
        term = min(start + place // TILE_COLUMNS, end - 1) & NOT_NEGATIVE
        right[i] = matrix[term, min(edge + (place & (TILE_COLUMNS - 1)), last) & NOT_NEGATIVE]


@kernel(
    "void(float64[:,::1], float64[:,::1], int64, int64, int64, float64[:,::1])",
    threads=PRODUCT_THREADS,
    blocks=3,
    serves=("cloud_posterior",),
)
def multiply_rows(rows, matrix, n, terms, below, out):  # type: ignore[no-untyped-def]
    """Products of the first n rows (·, k) with a matrix (k, c), in parts of so many terms each.

    Rows z · `below` + (0 … n − 1) of `out` (·, c) get the sums over the terms of part z, in their order, whatever
    stands in the other rows; `add_parts` adds them up.

    Launch: `product_launch`. Thread (ty, tx) owns rows 8 ty … 8 ty + 7 of its tile, and columns 2 tx, 2 tx + 1 of
    either half: 8 + 4 numbers from shared memory, in vectors, feed 32 multiply-adds. While PANEL terms are multiplied,
    the next are on their way to registers.
    """
    left = cuda.shared.array((2, PANEL, PADDED), float64, alignment=ALIGNED)
    right = cuda.shared.array((2, PANEL, TILE_COLUMNS), float64, alignment=ALIGNED)
    sums = cuda.local.array((EACH_ROWS, EACH_COLUMNS), float64)
    a = cuda.local.array(EACH_ROWS, float64)
    b = cuda.local.array(EACH_COLUMNS, float64)
    next_left = cuda.local.array(LEFT, float64)
    next_right = cuda.local.array(RIGHT, float64)
    threads = TILE_ROWS // EACH_ROWS * (TILE_COLUMNS // EACH_COLUMNS)
    # Masks instead of divisions tell the compiler that indices are not negative: it then reads vectors.
    thread = cuda.threadIdx.x & (threads - 1)
    tx = thread & (TILE_COLUMNS // EACH_COLUMNS - 1)
    ty = (thread // (TILE_COLUMNS // EACH_COLUMNS)) & (TILE_ROWS // EACH_ROWS - 1)
    top = cuda.blockIdx.y * TILE_ROWS
    edge = cuda.blockIdx.x * TILE_COLUMNS
    part = cuda.blockIdx.z
    begin = part * terms
    end = min(begin + terms, matrix.shape[0])
    c = matrix.shape[1]
    for i in range(EACH_ROWS):
        for j in range(EACH_COLUMNS):
            sums[i, j] = float64(0)
    _fetch(rows, matrix, top, edge, n, begin, end, thread, next_left, next_right)
    side = 0
    for start in range(begin, end, PANEL):
        for i in range(LEFT):
            place = thread + i * threads
            left[side, place & (PANEL - 1), place // PANEL] = next_left[i]
        for i in range(RIGHT):
            place = thread + i * threads
            right[side, place // TILE_COLUMNS, place & (TILE_COLUMNS - 1)] = next_right[i]
        # Whoever still reads the other side has passed this barrier before it is written again.
        cuda.syncthreads()
        if start + PANEL < end:
            _fetch(rows, matrix, top, edge, n, start + PANEL, end, thread, next_left, next_right)
        for term in range(PANEL):
            for i in range(EACH_ROWS):
                a[i] = left[side, term, EACH_ROWS * ty + i]
            for j in range(EACH_COLUMNS):
                b[j] = right[side, term, 2 * tx + (j & 1) + (TILE_COLUMNS // 2) * (j >> 1)]
            for i in range(EACH_ROWS):
                for j in range(EACH_COLUMNS):
                    sums[i, j] += a[i] * b[j]
        side = 1 - side
    for i in range(EACH_ROWS):
        row = top + EACH_ROWS * ty + i
        if row < n:
            for j in range(EACH_COLUMNS):
                column = edge + 2 * tx + (j & 1) + (TILE_COLUMNS // 2) * (j >> 1)
                if column < c:
                    out[part * below + row, column] = sums[i, j]


@kernel(
    "void(float64[:,::1], int64, int64, int64, float64[:,::1])",
    threads=READ_THREADS,
    blocks=8,
    serves=("cloud_posterior",),
)
def add_parts(parts, n_parts, below, n, out):  # type: ignore[no-untyped-def]
    """Sums over the parts of n products, in their order, in the first n rows of `out` (·, c).

    Launch: as many threads as there are sums, at least.
    """
    place = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    c = out.shape[1]
    if place < n * c:
        row = place // c
        column = place - row * c
        total = parts[row, column]
        for part in range(1, n_parts):
            total += parts[part * below + row, column]
        out[row, column] = total


@kernel(
    "void(float64[:,::1], float64[:,::1], float64[:,::1], float64[:,::1])",
    threads=READ_THREADS,
    blocks=8,
    serves=("cloud_posterior",),
)
def subtract_spectra(y, information, spectra, numbers):  # type: ignore[no-untyped-def]
    """Y − a′ · spectrum in the place of y, and Σ of its squares over a′ as the energy of each star.

    Launch: a block of READ_THREADS threads for each star.
    """
    sums = cuda.shared.array(SCRATCH, float64)
    star = cuda.blockIdx.x
    total = float64(0)
    for j in range(cuda.threadIdx.x, y.shape[1], cuda.blockDim.x):
        weight = information[star, j]
        apart = y[star, j] - weight * spectra[star, j]
        y[star, j] = apart
        if weight > float64(0):
            total += apart * apart / weight
    total = sum_of_block(total, sums)
    if cuda.threadIdx.x == 0:
        numbers[star, ENERGY] = total


@cuda.jit(device=True)
def _packed(width, i, j):  # type: ignore[no-untyped-def]
    """Place of number (i, j ≥ i) in a packed upper triangle."""
    return (i * width - (i * (i - 1) >> 1) + j - i) & NOT_NEGATIVE


@cuda.jit(device=True)
def _at(stride, i, j):  # type: ignore[no-untyped-def]
    """Place of number (i, j) of a matrix of rows of so many numbers."""
    return (i * stride + j) & NOT_NEGATIVE


@cuda.jit(device=True)
def _level2(numbers, star):  # type: ignore[no-untyped-def]
    """Mean of σ²/(c₀² D): the square of the noise with which some nuisances grow."""
    scale = numbers[star, SCALE]
    return numbers[star, LEVEL] / (numbers[star, N_USED] + TINY) / (scale * scale)


@cuda.jit(device=True)
def _with_point(value, i, packed, points, star):  # type: ignore[no-untyped-def]
    """`value` and number i of M b."""
    width = points.shape[1]
    for j in range(width):
        value += packed[star, _packed(width, min(i, j), max(i, j))] * points[star, j]
    return value


@cuda.jit(device=True, **WRITTEN_OUT)
def _finish_row(k, shared, corner, pivots, height, a, stride, top, ridge, v):  # type: ignore[no-untyped-def]
    """Row k of a panel, and what it takes from those below; thread k has the column of its pivot."""
    thread = cuda.threadIdx.x
    if k < height:
        if thread == k:
            pivot = v[k]
            if ridge >= float64(0):
                least = ridge + TINY + ROUNDING * a[_at(stride, top + k, top + k)]
                pivot = max(pivot + least, least)
            root = math.sqrt(pivot)
            shared[corner + k * STEP + k] = root
            shared[pivots + k] = float64(1) / root
        cuda.syncthreads()
        v[k] *= shared[pivots + k]
        if k < thread < STEP:
            shared[corner + k * STEP + thread] = v[k]
        cuda.syncthreads()
        for r in range(STEP):
            if r > k:
                v[r] -= shared[corner + k * STEP + r] * v[k]


@cuda.jit(device=True, **WRITTEN_OUT)
def _finish_four(k, shared, corner, pivots, height, a, stride, top, ridge, v):  # type: ignore[no-untyped-def]
    """Four rows from k on."""
    _finish_row(k, shared, corner, pivots, height, a, stride, top, ridge, v)
    _finish_row(k + 1, shared, corner, pivots, height, a, stride, top, ridge, v)
    _finish_row(k + 2, shared, corner, pivots, height, a, stride, top, ridge, v)
    _finish_row(k + 3, shared, corner, pivots, height, a, stride, top, ridge, v)


@cuda.jit(device=True, **WRITTEN_OUT)
def _root_of_corner(shared, corner, pivots, height, a, stride, top, ridge, v):  # type: ignore[no-untyped-def]
    """Rows of a panel, of whose columns each thread has one in v, are finished, and the panel's corner is kept.

    The first STEP threads have the corner's columns, and each of them finds the root of one pivot. Pivots below the
    ridge, and below what rounding leaves of the diagonal, which a[k, k] holds, are rounding.
    """
    # Not in a loop, which the compiler does not write out if it is long: v would lie in memory.
    _finish_four(0, shared, corner, pivots, height, a, stride, top, ridge, v)
    if STEP > 4:
        _finish_four(4, shared, corner, pivots, height, a, stride, top, ridge, v)


@cuda.jit(device=True)
def _substitute(shared, corner, pivots, v):  # type: ignore[no-untyped-def]
    """V ← corner⁻ᵀ v for one column; numbers beyond the panel's height mean nothing."""
    # Loops of constant length are written out, and their numbers stay in registers.
    for s in range(STEP):
        v[s] *= shared[pivots + s]
        for r in range(STEP):
            if r > s:
                v[r] -= shared[corner + s * STEP + r] * v[s]


@cuda.jit(device=True)
def _eliminate(a, stride, stop, n, ridge, mirrored, shared, corner, pivots):  # type: ignore[no-untyped-def]
    """Rows up to `stop` of the upper U with UᵀU = a + ridge, in place; rows up to n become what they do not explain.

    `a` is laid out as the module says, with a vector behind the columns, in place n + 1, that goes along; a[k, k] holds
    the diagonal. Where `mirrored`, columns of U are kept below the diagonal. STEP · stop numbers of `shared` are
    scratch.
    """
    v = cuda.local.array(STEP, float64)
    thread = cuda.threadIdx.x
    threads = cuda.blockDim.x
    top = 0
    while top < n:
        # The last panel of what is eliminated may be lower than others; the next one begins behind it.
        end = stop if top < stop else n
        height = min(STEP, end - top)
        depth = min(top, stop)
        first = top & NOT_NEGATIVE
        cuda.syncthreads()
        for place in range(thread, depth * STEP, threads):
            k = place // STEP
            r = place & (STEP - 1)
            shared[place] = a[_at(stride, k, first + r + 1)] if r < height else float64(0)
        cuda.syncthreads()
        for begin in range(top, n + 1, threads):
            j = (begin + thread) & NOT_NEGATIVE
            for r in range(STEP):
                v[r] = float64(0)
            if j <= n:
                for r in range(STEP):
                    if r < height and j >= top + r:
                        v[r] = a[_at(stride, first + r, j + 1)]
                for k in range(depth):
                    value = a[_at(stride, k, j + 1)]
                    for r in range(STEP):
                        v[r] -= shared[k * STEP + r] * value
            if top < stop:
                if begin == top:
                    _root_of_corner(shared, corner, pivots, height, a, stride, first, ridge, v)
                else:
                    _substitute(shared, corner, pivots, v)
            if j <= n:
                for r in range(STEP):
                    if r < height and j >= top + r:
                        value = v[r]
                        if top < stop:
                            if j == top + r:
                                value = shared[corner + r * STEP + r]
                            if mirrored and j < n:
                                a[_at(stride, j, first + r)] = value
                        a[_at(stride, first + r, j + 1)] = value
        top += height
    cuda.syncthreads()


@cuda.jit(device=True)
def _place_matrix(packed, precision, star, width, stride, a):  # type: ignore[no-untyped-def]
    """M + P⁻¹ of a star where `_eliminate` takes it from: the diagonal twice, in the place of its root as well."""
    thread = cuda.threadIdx.x
    threads = cuda.blockDim.x
    lanes = min(32, threads)
    for i in range(thread // lanes, width, threads // lanes):
        for j in range(i + thread % lanes, width, lanes):
            value = packed[star, _packed(width, i, j)] + precision[i, j]
            a[_at(stride, i, j + 1)] = value
            if i == j:
                a[_at(stride, i, i)] = value


@cuda.jit(device=True)
def _in_bands(n, i, k):  # type: ignore[no-untyped-def]
    """Place of number (i, k ≥ i) of C' in its bands."""
    first = i & (-BAND)
    columns = (n + 3) & (-4)
    return (first * columns - (first * (first - BAND) >> 1) + (k - first) * BAND + (i - first)) & NOT_NEGATIVE


@cuda.jit(device=True)
def _shrink(root, t, stride, n, shared, corner, pivots, out):  # type: ignore[no-untyped-def]
    """U ← T⁻¹U in the upper part of `root`, and `out` in single precision; TTᵀ = I + UUᵀ, T upper triangular.

    `out` gets it in bands, as `_in_bands` has them.
    Both are laid out as the module says, the lower part of `root` being Uᵀ; `t` becomes the root of I + UUᵀ with rows
    and columns in reverse order, which is the transpose of T in reverse order. Its columns and those of U in reverse
    order, which go along, are one panel: T⁻¹U is what `_eliminate` makes of a vector. 2 · STEP · n numbers of `shared`
    are scratch.
    """
    v = cuda.local.array(STEP, float64)
    thread = cuda.threadIdx.x
    threads = cuda.blockDim.x
    other = STEP * n
    for top in range(0, n, STEP):
        height = min(STEP, n - top)
        bottom = (n - 1 - top) & NOT_NEGATIVE
        last = (bottom - height + 1) & NOT_NEGATIVE
        cuda.syncthreads()
        for place in range(thread, (n - last) * STEP, threads):
            k = last + place // STEP
            r = place & (STEP - 1)
            shared[place] = (
                root[_at(stride, k, (bottom - r) & NOT_NEGATIVE)]
                if r < height and k >= bottom - r
                else float64(0)
            )
        for place in range(thread, top * STEP, threads):
            r = place & (STEP - 1)
            shared[other + place] = t[_at(stride, place // STEP, top + r + 1)] if r < height else float64(0)
        cuda.syncthreads()
        # Columns of t from `top` on, then those of U from `last` on, the vector included.
        of_t = n - top
        count = of_t + n - last + 1
        for begin in range(0, count, threads):
            c = (begin + thread) & NOT_NEGATIVE
            column = (last + c - of_t) & NOT_NEGATIVE
            mirrored = (bottom - c) & NOT_NEGATIVE
            for r in range(STEP):
                v[r] = float64(0)
            if c < of_t:
                for r in range(STEP):
                    v[r] = float64(1) if r == c else float64(0)
                for k in range(last, n):
                    value = root[_at(stride, k, mirrored)]
                    for r in range(STEP):
                        v[r] += shared[(k - last) * STEP + r] * value
                for k in range(top):
                    value = t[_at(stride, k, top + c + 1)]
                    for r in range(STEP):
                        v[r] -= shared[other + k * STEP + r] * value
            elif c < count:
                for r in range(STEP):
                    if r < height and column >= bottom - r:
                        v[r] = root[_at(stride, (bottom - r) & NOT_NEGATIVE, column + 1)]
                # Rows of T⁻¹U begin at their diagonals.
                for k in range(max(0, n - 1 - column), top):
                    value = root[_at(stride, (n - 1 - k) & NOT_NEGATIVE, column + 1)]
                    for r in range(STEP):
                        v[r] -= shared[other + k * STEP + r] * value
            if begin == 0:
                _root_of_corner(shared, corner, pivots, height, root, stride, 0, float64(-1), v)
            else:
                _substitute(shared, corner, pivots, v)
            if c < of_t:
                for r in range(STEP):
                    if r < height and r <= c:
                        t[_at(stride, top + r, top + c + 1)] = v[r]
            elif c < count:
                for r in range(STEP):
                    if r < height and column >= bottom - r:
                        root[_at(stride, (bottom - r) & NOT_NEGATIVE, column + 1)] = v[r]
                        if column < n:
                            out[_in_bands(n, bottom - r, column)] = float32(v[r])
    cuda.syncthreads()


@kernel(
    "void(int64, float64[:,::1], float64[:,::1], float64[:,::1], float64[::1], float64[:,::1], float64[:,::1])",
    threads=SOLVE_THREADS,
    blocks=3,
    serves=("cloud_posterior",),
)
def expand_stars(n, packed, u, precision, pull, scratch, points):  # type: ignore[no-untyped-def]
    """The best point b of the space for each of n stars: (M + P⁻¹) b = u + P⁻¹b₀.

    `packed` (·, w (w + 1)/2) is M, `precision` (w, w) P⁻¹ and `pull` (w,) P⁻¹b₀. `scratch` holds the matrix of each
    block in a row, of w · `stride_of_matrix` numbers; if rows are shorter, shared memory does.

    Launch: as many blocks as `scratch` has, which share the stars; threads and shared memory as `solve_launch` says.
    """
    shared = cuda.shared.array(0, float64)
    width = pull.size
    vector = STEP * width
    corner = vector + width
    pivots = corner + STEP * STEP
    thread = cuda.threadIdx.x
    threads = cuda.blockDim.x
    stride = stride_of_matrix(width)
    begin = pivots + STEP
    end = begin + width * stride
    a = shared[begin:end] if scratch.shape[1] < width * stride else scratch[cuda.blockIdx.x]
    for star in range(cuda.blockIdx.x, n, cuda.gridDim.x):
        cuda.syncthreads()
        _place_matrix(packed, precision, star, width, stride, a)
        for i in range(thread, width, threads):
            a[_at(stride, i, width + 1)] = u[star, i] + pull[i]
        _eliminate(a, stride, width, width, float64(0), True, shared, corner, pivots)
        for i in range(thread, width, threads):
            shared[vector + i] = a[_at(stride, i, width + 1)]
        # U b = v from the last rows on, STEP at a time: row k below the diagonal holds column k of U.
        top = (width - 1) // STEP * STEP
        while top >= 0:
            height = min(STEP, width - top)
            cuda.syncthreads()
            if thread == 0:
                for k in range(top + height - 1, top - 1, -1):
                    value = shared[vector + k]
                    for j in range(k + 1, top + height):
                        value -= a[_at(stride, j, k)] * shared[vector + j]
                    shared[vector + k] = value / a[_at(stride, k, k)]
            cuda.syncthreads()
            for i in range(thread, top, threads):
                value = shared[vector + i]
                for k in range(top, top + height):
                    value -= a[_at(stride, k, i)] * shared[vector + k]
                shared[vector + i] = value
            top -= STEP
        cuda.syncthreads()
        for i in range(thread, width, threads):
            points[star, i] = shared[vector + i]


@kernel(
    "void(int64, float64[:,::1], float64[:,::1], float64[:,::1], int64, int64, float64[:,:,::1],"
    " float64[:,::1], float64[:,::1], float64[:,:,::1])",
    threads=SOLVE_THREADS,
    blocks=3,
    serves=("cloud_posterior",),
)
def isolate_slopes(  # type: ignore[no-untyped-def]
    n_stars, packed, vectors, points, n_sky, group, groups, scratch, numbers, systems
):
    """What is left of M and u of each star for the slopes alone, when all else is taken out, for one group.

    `vectors` is Bᵀ(y − a′ B b) and `points` b, which stay as they are, and `groups` (G, r + 1, r + 1) that of
    `moefast.kernels.cuda.space.DeviceSpace`. Row (`group`, star) of `systems` (G, ·, 2 k (k + 1) + 1) begins with the
    upper triangle of what is left of M, k rows of k + 1 numbers, of which the last are what is left of u; its last
    number becomes ln of the evidence without slopes. `scratch` is as in `expand_stars`.

    Launch: as `expand_stars`.
    """
    shared = cuda.shared.array(0, float64)
    sums = cuda.shared.array(SCRATCH, float64)
    width = points.shape[1]
    rest = groups.shape[1] - 1
    k = width - rest
    corner = STEP * width
    pivots = corner + STEP * STEP
    thread = cuda.threadIdx.x
    threads = cuda.blockDim.x
    lanes = min(32, threads)
    stride = stride_of_matrix(width)
    begin = pivots + STEP
    end = begin + width * stride
    a = shared[begin:end] if scratch.shape[1] < width * stride else scratch[cuda.blockIdx.x]
    star = cuda.blockIdx.x
    # A range would keep its length and its step in registers, which are short.
    while star < n_stars:
        # Slopes go last: what is left of their rows is what nothing else explains.
        for i in range(thread // lanes, width, threads // lanes):
            row = i + k if i < rest else i - rest
            for j in range(i + thread % lanes, width, lanes):
                column = j + k if j < rest else j - rest
                value = packed[star, _packed(width, min(row, column), max(row, column))]
                if j < rest:
                    value += groups[group, i, j]
                if i == j:
                    if i < n_sky:
                        value += float64(1) / (_level2(numbers, star) + TINY)
                    a[_at(stride, i, i)] = value
                a[_at(stride, i, j + 1)] = value
        for i in range(thread, width, threads):
            row = i + k if i < rest else i - rest
            value = _with_point(vectors[star, row], row, packed, points, star)
            if i < rest:
                value += groups[group, i, rest]
            a[_at(stride, i, width + 1)] = value
        _eliminate(a, stride, rest, width, float64(0), False, shared, corner, pivots)
        part = float64(0)
        for i in range(thread, rest, threads):
            along = a[_at(stride, i, width + 1)]
            part += float64(0.5) * along * along - math.log(a[_at(stride, i, i + 1)])
        for i in range(thread // GROUP, k, threads // GROUP):
            for j in range(i + thread % GROUP, k + 1, GROUP):
                systems[group, star, i * (k + 1) + j] = a[_at(stride, rest + i, rest + j + 1)]
        # Beyond its barriers, `a` may be filled anew.
        part = sum_of_block(part, sums)
        if thread == 0:
            systems[group, star, 2 * k * (k + 1)] = groups[group, rest, rest] + part
        star += cuda.gridDim.x


@cuda.jit(device=True)
def _gain_of_slopes(system, first, k):  # type: ignore[no-untyped-def]
    """What k slopes of prior widths w add to the log evidence: ½ (w r)'A⁻¹(w r) − ½ ln |A| with A = 1 + w R w.

    The system, k rows of A and w r from number `first` on, is solved in its place.
    """
    columns = k + 1
    gain = float64(0)
    determinant = float64(0)
    for i in range(k):
        row = first + i * columns
        pivot = max(system[row + i], TINY)
        determinant += math.log(pivot)
        gain += system[row + k] * system[row + k] / pivot
        for j in range(i + 1, k):
            ratio = system[row + j] / pivot
            for c in range(j, columns):
                system[first + j * columns + c] -= ratio * system[row + c]
    return float64(0.5) * (gain - determinant)


@kernel(
    "void(int64, int64, float64, float64[::1], float64[:,:,::1], float64[:,::1])",
    threads=WIDTH_THREADS,
    blocks=8,
    serves=("cloud_posterior",),
)
def weigh_widths(n_stars, k, share, narrow, systems, numbers):  # type: ignore[no-untyped-def]
    """Probability of narrow slopes of each star, as `cpu_information.chance_of_narrow`, in its place of `numbers`.

    `systems` is what `isolate_slopes` leaves of a star and its groups; `share` of the stars have k slopes of widths
    `narrow` (k,).

    Launch: as many threads as there are stars, at least.
    """
    star = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if star < n_stars:
        half = k * (k + 1)
        highest = float64(-np.inf)
        wide = float64(0)
        tight = float64(0)
        for group in range(systems.shape[0]):
            system = systems[group, star]
            known = system[2 * half]
            for i in range(k):
                for j in range(i, k + 1):
                    place = i * (k + 1) + j
                    value = system[place]
                    one = float64(1) if i == j else float64(0)
                    system[place] = one + value
                    other = narrow[j] if j < k else float64(1)
                    system[half + place] = one + narrow[i] * other * value
            of_wide = known + _gain_of_slopes(system, 0, k)
            of_narrow = known + _gain_of_slopes(system, half, k)
            # The successor of numba-cuda takes the larger of no more than two.
            better = max(of_wide, of_narrow)
            top = max(highest, better)
            before = math.exp(highest - top)
            wide = wide * before + (float64(1) - share) * math.exp(of_wide - top)
            tight = tight * before + share * math.exp(of_narrow - top)
            highest = top
        numbers[star, NARROW] = tight / (wide + tight)


@kernel(
    "void(int64, float64[:,::1], float64[:,::1], float64[:,::1], int64, int64, float64[::1], float64[:,::1],"
    " float64[:,::1])",
    threads=SOLVE_THREADS,
    blocks=3,
    serves=("cloud_posterior",),
)
def marginalise_stars(n_stars, packed, vectors, points, q, n_sky, narrow, scratch, numbers):  # type: ignore[no-untyped-def]
    """Take the q nuisances of each star out of M and u.

    `vectors` is Bᵀ(y − a′ B b) and `points` b. The first n (n + 1)/2 places of `packed` become M, and the first n of
    `vectors` u; the last `n_sky` nuisances grow with the noise, and the others are of width 1 or, with the
    probability in `numbers`, `narrow` (q,). `numbers` gets what nuisances explain, and its energy what the point has of
    it. `scratch` is as in `expand_stars`.

    Launch: as `expand_stars`.
    """
    shared = cuda.shared.array(0, float64)
    sums = cuda.shared.array(SCRATCH, float64)
    width = points.shape[1]
    n = width - q
    corner = STEP * width
    pivots = corner + STEP * STEP
    thread = cuda.threadIdx.x
    threads = cuda.blockDim.x
    lanes = min(32, threads)
    stride = stride_of_matrix(width)
    begin = pivots + STEP
    end = begin + width * stride
    a = shared[begin:end] if scratch.shape[1] < width * stride else scratch[cuda.blockIdx.x]
    for star in range(cuda.blockIdx.x, n_stars, cuda.gridDim.x):
        cuda.syncthreads()
        for i in range(thread // lanes, width, threads // lanes):
            for j in range(i + thread % lanes, width, lanes):
                value = packed[star, _packed(width, i, j)]
                if i == j:
                    if i < q:
                        if i < q - n_sky:
                            chance = numbers[star, NARROW]
                            value += float64(1) / (float64(1) - chance + chance * narrow[i] * narrow[i])
                        else:
                            value += float64(1) / (_level2(numbers, star) + TINY)
                    a[_at(stride, i, i)] = value
                a[_at(stride, i, j + 1)] = value
        part = float64(0)
        for i in range(thread, width, threads):
            value = vectors[star, i]
            part += points[star, i] * value
            value = _with_point(value, i, packed, points, star)
            a[_at(stride, i, width + 1)] = value
            part += points[star, i] * value
        # What the energy would be without the point, if the likelihood were what it is near it.
        energy = numbers[star, ENERGY] + sum_of_block(part, sums)
        _eliminate(a, stride, q, width, float64(0), False, shared, corner, pivots)
        part = float64(0)
        for i in range(thread, q, threads):
            part += a[_at(stride, i, width + 1)] * a[_at(stride, i, width + 1)]
        part = sum_of_block(part, sums)
        for i in range(thread // lanes, n, threads // lanes):
            for j in range(i + thread % lanes, n, lanes):
                packed[star, _packed(n, i, j)] = a[_at(stride, q + i, q + j + 1)]
        for i in range(thread, n, threads):
            vectors[star, i] = a[_at(stride, q + i, width + 1)]
        if thread == 0:
            numbers[star, ENERGY] = energy
            numbers[star, EXPLAINED] = part


@kernel(
    "void(int64, float64[:,::1], float64[:,::1], int64, float64[:,::1], float64[:,::1])",
    threads=SOLVE_THREADS,
    blocks=3,
    serves=("cloud_posterior",),
)
def root_stars(n_stars, packed, vectors, n, scratch, numbers):  # type: ignore[no-untyped-def]
    """The root U of each star's M = UᵀU, in its place, and U⁻ᵀu in that of u; both as `marginalise_stars` leaves them.

    `numbers` gets what the best point of the space explains, and what it gains beyond |λ|². `scratch` is
    as in `expand_stars`.

    Launch: as `expand_stars`.
    """
    shared = cuda.shared.array(0, float64)
    sums = cuda.shared.array(SCRATCH, float64)
    corner = STEP * n
    pivots = corner + STEP * STEP
    thread = cuda.threadIdx.x
    threads = cuda.blockDim.x
    lanes = min(32, threads)
    stride = stride_of_matrix(n)
    begin = pivots + STEP
    end = begin + n * stride
    a = shared[begin:end] if scratch.shape[1] < n * stride else scratch[cuda.blockIdx.x]
    for star in range(cuda.blockIdx.x, n_stars, cuda.gridDim.x):
        for step in range(2):
            cuda.syncthreads()
            for i in range(thread // lanes, n, threads // lanes):
                for j in range(i + thread % lanes, n, lanes):
                    value = packed[star, _packed(n, i, j)]
                    a[_at(stride, i, j + 1)] = value
                    if i == j:
                        a[_at(stride, i, i)] = value
            for i in range(thread, n, threads):
                a[_at(stride, i, n + 1)] = vectors[star, i]
            ridge = LEAST_CURVATURE if step == 0 else LEAST_INFORMATION
            _eliminate(a, stride, n, n, ridge, False, shared, corner, pivots)
            part = float64(0)
            for i in range(thread, n, threads):
                part += a[_at(stride, i, n + 1)] * a[_at(stride, i, n + 1)]
            part = sum_of_block(part, sums)
            # In memory at once: registers are short while the second root is found.
            if thread == 0:
                if step == 0:
                    numbers[star, EXPLAINED] += part
                    numbers[star, BEYOND] = part
                else:
                    numbers[star, BEYOND] -= part
        for i in range(thread // lanes, n, threads // lanes):
            for j in range(i + thread % lanes, n, lanes):
                packed[star, _packed(n, i, j)] = a[_at(stride, i, j + 1)]
        for i in range(thread, n, threads):
            vectors[star, i] = a[_at(stride, i, n + 1)]


@kernel(
    "void(int64, float64[:,::1], float64[:,::1], float64, float64[:,::1], float64[:,::1], float32[:,::1],"
    " float32[:,::1], float32[:,::1])",
    threads=SOLVE_THREADS,
    blocks=2,
    serves=("cloud_posterior",),
)
def whiten_stars(n_stars, packed, vectors, unit, scratch, second_scratch, roots, centre, spectrum):  # type: ignore[no-untyped-def]
    """C' of M₁ = C C' and λ of each star, from what `root_stars` leaves of it.

    `roots` gets C' on and above its diagonal, in bands as `_in_bands` has them, `centre` (·, n) λ, and `spectrum` λ and
    the last column of C' over `unit`: the whole of a star's spectrum.

    Launch: as `expand_stars`.
    """
    shared = cuda.shared.array(0, float64)
    n = centre.shape[1]
    corner = 2 * STEP * n
    pivots = corner + STEP * STEP
    thread = cuda.threadIdx.x
    threads = cuda.blockDim.x
    lanes = min(32, threads)
    stride = stride_of_matrix(n)
    begin = pivots + STEP
    end = begin + n * stride
    root = shared[begin:end] if scratch.shape[1] < n * stride else scratch[cuda.blockIdx.x]
    t = second_scratch[cuda.blockIdx.x]
    for star in range(cuda.blockIdx.x, n_stars, cuda.gridDim.x):
        cuda.syncthreads()
        for i in range(thread // lanes, n, threads // lanes):
            for j in range(i + thread % lanes, n, lanes):
                value = packed[star, _packed(n, i, j)]
                root[_at(stride, i, j + 1)] = value
                root[_at(stride, j, i)] = value
        for i in range(thread, n, threads):
            root[_at(stride, i, n + 1)] = vectors[star, i]
        _shrink(root, t, stride, n, shared, corner, pivots, roots[star])
        for i in range(thread, n, threads):
            value = root[_at(stride, i, n + 1)]
            centre[star, i] = float32(value)
            spectrum[star, i] = float32(value + root[_at(stride, i, n)] / unit)
