"""Evidence of all clouds, and the posterior of labels, on the device; see `moefast.kernels.cuda.information`.

Contract: `moefast.posterior.forward`, in the form and the precision of `moefast.kernels.clouds`.

`compare_clouds`: a warp owns a star and a panel of CLOUDS clouds, and a block some stars and one panel, whose vectors,
means and tangents, it keeps in shared memory as far as they have coordinates (`reach`; beyond, there are the means
alone). PARTS neighbouring threads share a cloud. A thread makes EACH rows of the whitened vectors X = C' · (mean,
tangents) of its cloud at a time, in registers, where C', upper triangular, is staged BAND rows at a time, and adds up
their products in registers, too. Both threads of a cloud solve its small system, and the best point, combined from the
vectors, is whitened once more, for its residual is what the distance is summed from, as `moefast.kernels.cpu_clouds`
tells why. The kernel is written for a number of tangents, so that small matrices live in registers: `compare_kernel`
makes it.

`conclude_stars`: a block owns a star and goes through its clouds, 20 numbers each, in double precision. Where there is
a network that corrects log g, `moefast.kernels.cuda.correction` follows.

Floor in multiply-adds of single precision per star, for m = 393 clouds of t = 10 tangents, the scale's included, with
r = 45 of n = 58 coordinates: vectors m (n (n + 1) + (t − 1) r (r + 1))/2 = 4.3 M, products and residuals
m (n (n + 1) + r (t + 1) (t + 2) + 2 n t)/2 = 2.1 M: 0.26 µs at 50 TFLOP/s. C' goes from the second cache to shared
memory twice for each panel, 0.4 MB, and the vectors once for the stars of a block, 0.25 MB: 0.1 µs at 5.5 TB/s.

`CudaPosteriorScorer` streams blocks through slots as `moefast.kernels.cuda.blocks` does: a block of BLOCK_ROWS stars
keeps 0.4 MB of each on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import config, cuda, float32, float64
from numpy.typing import NDArray

from moefast.core.errors import BackendError
from moefast.core.threads import CORES
from moefast.kernels.clouds import CloudPosterior, Clouds, Space, rounded_up, without_cuda
from moefast.kernels.cuda.blocks import BlockScorer, Slot, StepPlan, blocks_of_a_call, results_on_device
from moefast.kernels.cuda.correction import STARS, answer_star, correct_stars, shared_bytes
from moefast.kernels.cuda.correction import THREADS as UNIT_THREADS
from moefast.kernels.cuda.device import MOST_SHARED
from moefast.kernels.cuda.gram import ALIGNED
from moefast.kernels.cuda.information import (
    BAND,
    BEYOND,
    ENERGY,
    EXPLAINED,
    LEVEL,
    N_USED,
    SCALE,
    STRENGTH,
    TINY,
    WIDTH_THREADS,
    isolate_slopes,
    marginalise_stars,
    root_stars,
    size_of_root,
    solve_launch,
    weigh_widths,
    whiten_stars,
)
from moefast.kernels.cuda.lanes import SCRATCH, WRITTEN_OUT, least_of_block, sum_of_block, sum_of_parts
from moefast.kernels.cuda.median import THREADS as MEDIAN_THREADS
from moefast.kernels.cuda.median import median_rows
from moefast.kernels.cuda.registry import HOPPER, kernel, launchable
from moefast.kernels.cuda.space import DeviceSpace, Matrices, SpaceWork, on_device

__all__ = [
    "BLOCK_ROWS",
    "CLOUDS",
    "CudaPosteriorScorer",
    "DevicePosterior",
    "cloud_posterior",
    "compare_kernel",
    "conclude_stars",
]

BLOCK_ROWS = 1024
"""Most stars of a block: some forty launches and copies, 0.4 ms of the interpreter, are less than the kernels take."""
SLOTS = max(4, min(8, CORES))
"""Blocks on their way: one or two are computed, while the others are read and copied."""
CLOUDS = 16
"""Clouds of a panel, whose vectors a block keeps in shared memory; a power of two."""
PARTS = 2
"""Threads that share a cloud and a star."""
EACH = BAND // PARTS
"""Rows of whitened vectors that a thread makes at a time, of all vectors of its cloud."""
MOST_STARS = 4
"""Stars of a block, at most, each with CLOUDS · PARTS threads."""
THREADS = MOST_STARS * CLOUDS * PARTS
BLOCKS_TOGETHER = 3
LEAST_DEPTH = 8
"""Coordinates that should be staged at a time beside two stars."""
STAGED = 8
"""Numbers that a thread copies at a time."""
QUAD = 4
"""Coordinates that a loop takes at a time; numbers of a vector in memory."""
PLACE, PLACE_OF_PAIR, PLACE_OF_QUAD = 0x7FFFFFFF, 0x7FFFFFFE, 0x7FFFFFFC
"""Masks that tell the compiler that an index is not negative, nor its sum with others, and that a vector of two or four
numbers may begin there."""
LANES = 128
"""Threads of a block of `conclude_stars`."""
USUAL_VECTORS = (6, 10)
"""Tangents of the clouds of models that are shipped, the scale's included."""
EARLY_BLOCKS = {10: 2}
"""Blocks together on devices before `HOPPER`, by the number of tangents, where more would leave too few registers."""
EVIDENCE, SQUARE, FIRST_LABEL = 0, 1, 2
"""Places in what `compare_clouds` finds: ln of the evidence, least distance squared, then means, variances and
covariances with the first of all labels."""
LEAST_EVIDENCE = np.float32(-1e30)
LEAST_SPREAD = 1e-4
"""As in `moefast.kernels.cpu_clouds`."""
NAN = np.float32(np.nan)
_NO_MASK = np.zeros(0, np.bool_)

F64 = NDArray[np.float64]


class Sizes(NamedTuple):
    """How a block of `compare_clouds` lies in shared memory, in numbers of single precision.

    Attributes
    ----------
    stars : int
        Stars of a block.
    depth : int
        Coordinates whose vectors are staged at a time; all that tangents have, if there is room.
    stride : int
        Numbers of the vectors of a panel in one coordinate.
    shared : int
        All.
    """

    stars: int
    depth: int
    stride: int
    shared: int


def stride_of(vectors: int) -> int:
    """Numbers of the vectors of a panel in a coordinate: quads of each cloud, then what is left, never three."""
    return CLOUDS * (vectors + (vectors % 4 == 3))


def sizes_of(n: int, reach: int, vectors: int, limit: int = MOST_SHARED // 4) -> Sizes:
    """As many stars as fit beside all vectors; else two, or one, beside some of them."""
    stride, rows = stride_of(vectors), BAND * -(-n // BAND)
    of_star = BAND * n + CLOUDS * n + 2 * rows
    free = limit - CLOUDS * (n - reach)
    stars = min(MOST_STARS, (free - reach * stride) // of_star)
    depth = reach
    if stars < 1:
        stars = 2 if free - 2 * of_star >= LEAST_DEPTH * stride else 1
        depth = (free - stars * of_star) // stride // QUAD * QUAD
    return Sizes(stars, depth, stride, CLOUDS * (n - reach) + stars * of_star + depth * stride)


SIGNATURE = (
    "void(int64, int64, int64, int64, float64[:,::1], float32[:,:,::1], float32[::1], float32[:,:,::1],"
    " float32[:,::1], float32[:,::1], float32[:,::1], float64[:,::1], float32[:,::1], float32[:,::1], float32,"
    " float32[:,:,::1])"
)


@cuda.jit(device=True)
def _stage(source, begin, count, group, groups, target, at):  # type: ignore[no-untyped-def]
    """Copy `count` numbers of `source` from `begin` on, shared by so many groups of CLOUDS · PARTS threads.

    STAGED reads of a thread are on their way together.
    """
    held = cuda.local.array(STAGED, float64)
    step = CLOUDS * PARTS
    first = group * (STAGED * step) + (cuda.threadIdx.x & (step - 1))
    for place in range(first, count, STAGED * step * groups):
        from_place = (begin + place) & PLACE
        to_place = (at + place) & PLACE
        for i in range(STAGED):
            if place + i * step < count:
                held[i] = source[from_place + i * step]
        for i in range(STAGED):
            if place + i * step < count:
                target[to_place + i * step] = held[i]


@cuda.jit(device=True, **WRITTEN_OUT)
def _read_vectors(numbers, whole, odd, quads, t, b):  # type: ignore[no-untyped-def]
    """The vectors of a cloud in one coordinate, of which the quads begin at `whole` and what is left at `odd`."""
    for d in range(4 * quads):
        b[d] = numbers[whole + (d >> 2) * (4 * CLOUDS) + (d & 3)]
    for d in range(4 * quads, t):
        b[d] = numbers[odd + d - 4 * quads]


@cuda.jit(device=True, **WRITTEN_OUT)
def _add_term(numbers, of_root, whole, odd, quads, t, b, row_of_root, sums):  # type: ignore[no-untyped-def]
    """A term of EACH rows of C' times the vectors of a cloud."""
    for i in range(EACH):
        row_of_root[i] = numbers[of_root + i]
    _read_vectors(numbers, whole, odd, quads, t, b)
    for d in range(t):
        for i in range(EACH):
            sums[d * EACH + i] += row_of_root[i] * b[d]


@cuda.jit(device=True, **WRITTEN_OUT)
def _add_products(begin, end, t, x, products):  # type: ignore[no-untyped-def]
    """Products of some vectors, counted without the mean, with all behind them, of one coordinate."""
    for j in range(begin, end):
        for k in range(t):
            if k >= j:
                products[t + j * t - j * (j - 1) // 2 + k - j] += x[j + 1] * x[k + 1]


@cuda.jit(device=True, **WRITTEN_OUT)
def _sum_products(begin, end, products, scratch):  # type: ignore[no-untyped-def]
    """Sums over the threads that share a cloud."""
    for k in range(begin, end):
        products[k] = sum_of_parts(products[k], PARTS, scratch)


@cuda.jit(device=True, **WRITTEN_OUT)
def _eliminate_column(k, t, lower, gamma, inverse):  # type: ignore[no-untyped-def]
    """Column k of the lower root of a symmetric matrix, packed by rows, and of a vector with it; ln of the pivot."""
    if k >= t:
        return float32(0)
    pivot = lower[k * (k + 1) // 2 + k]
    inverse[k] = float32(1) / math.sqrt(pivot)
    gamma[k] *= inverse[k]
    for i in range(t):
        if i > k:
            lower[i * (i + 1) // 2 + k] *= inverse[k]
    for i in range(t):
        if i > k:
            less = lower[i * (i + 1) // 2 + k]
            gamma[i] -= less * gamma[k]
            for j in range(t):
                if k < j <= i:
                    lower[i * (i + 1) // 2 + j] -= less * lower[j * (j + 1) // 2 + k]
    return math.log(pivot)


@cuda.jit(device=True, **WRITTEN_OUT)
def _eliminate_four(k, t, lower, gamma, inverse):  # type: ignore[no-untyped-def]
    """Four columns from k on, if there are so many."""
    determinant = _eliminate_column(k, t, lower, gamma, inverse)
    determinant += _eliminate_column(k + 1, t, lower, gamma, inverse)
    determinant += _eliminate_column(k + 2, t, lower, gamma, inverse)
    return determinant + _eliminate_column(k + 3, t, lower, gamma, inverse)


def _written_for(vectors: int) -> Callable[..., None]:
    """`compare_clouds` for clouds of so many tangents, the scale's included."""
    t = vectors
    stride = stride_of(t)
    quads = t // 4
    n_odd = stride // CLOUDS - 4 * quads
    place_of_odd = PLACE if n_odd == 1 else PLACE_OF_PAIR
    n_vectors = t + 1
    n_products = (t + 1) * (t + 2) // 2 - 1
    n_lower = t * (t + 1) // 2
    n_sums = t * EACH

    def compare_clouds(  # type: ignore[no-untyped-def]
        n_stars, n, reach, depth, columns, means, log_weights, gains, labels, scatter, scatter_with_first,
        roots, centre, spectrum, width, found,
    ):  # fmt: skip
        """Evidence of each cloud, and what it says of the labels of each star.

        `columns` (panels, …) holds pairs of numbers: of each of the first `reach` of n coordinates, which alone
        tangents have, the first four vectors of every cloud of the panel, the mean first, then the next four, and so
        on; `means` (panels, n − reach, CLOUDS) the means in the others. `gains` (l, t, m), `labels`, `scatter` and
        `scatter_with_first` (l, m) and `log_weights` are those of `moefast.kernels.Clouds`. `roots`, `centre` and
        `spectrum` are those of `whiten_stars`, `width` the prior width of the scale. `depth` is that of `sizes_of`.
        `found` (·, 2 + 3 l, m).

        Launch: (panels, groups of stars) blocks of CLOUDS · PARTS threads for each star of a group, with the shared
        memory of `sizes_of`.
        """
        numbers = cuda.shared.array(0, float32, alignment=ALIGNED)
        pairs = cuda.shared.array(0, float64, alignment=ALIGNED)
        scratch = cuda.shared.array(THREADS, float32)
        sums = cuda.local.array(n_sums, float32)
        row_of_root = cuda.local.array(EACH, float32)
        b = cuda.local.array(t, float32)
        x = cuda.local.array(n_vectors, float32)
        products = cuda.local.array(n_products, float32)
        lower = cuda.local.array(n_lower, float32)
        inverse = cuda.local.array(t, float32)
        gamma = cuda.local.array(t, float32)
        solved = cuda.local.array(t, float32)
        of_first = cuda.local.array(t, float32)
        thread = cuda.threadIdx.x & (THREADS - 1)
        threads = cuda.blockDim.x
        of_star = thread & (CLOUDS * PARTS - 1)
        part = thread & (PARTS - 1)
        lane = (thread // PARTS) & (CLOUDS - 1)
        panel = cuda.blockIdx.x
        place_of_star = thread // (CLOUDS * PARTS)
        together = threads // (CLOUDS * PARTS)
        star = cuda.blockIdx.y * together + place_of_star
        # Threads without a star or a cloud do what the last one does, and keep it to themselves.
        there = star < n_stars and panel * CLOUDS + lane < log_weights.size
        star = min(star, n_stars - 1) & PLACE
        cloud = min(panel * CLOUDS + lane, log_weights.size - 1) & PLACE

        # Where things begin in shared memory, all in whole vectors of four.
        n_given = centre.shape[1]
        n_beyond = n - reach
        rows = ((n + BAND - 1) // BAND * BAND) & PLACE_OF_QUAD
        at_star = (CLOUDS * n_beyond + place_of_star * ((BAND + CLOUDS) * n + 2 * rows)) & PLACE_OF_QUAD
        at_band = at_star
        at_point = (at_star + BAND * n) & PLACE_OF_QUAD
        at_centre = (at_point + CLOUDS * n) & PLACE_OF_QUAD
        at_spectrum = (at_centre + rows) & PLACE_OF_QUAD
        at_vectors = (CLOUDS * n_beyond + together * ((BAND + CLOUDS) * n + 2 * rows)) & PLACE_OF_QUAD
        at_once = depth >= reach

        for place in range(thread, CLOUDS * n_beyond, threads):
            numbers[place] = means[panel, place // CLOUDS, place & (CLOUDS - 1)]
        for c in range(of_star, rows, CLOUDS * PARTS):
            numbers[at_centre + c] = centre[star, c] if c < n_given else float32(0)
            numbers[at_spectrum + c] = spectrum[star, c] if c < n_given else float32(0)

        # -- whitened vectors, some rows at a time, and their products ---------------------------------------------
        for k in range(n_products):
            products[k] = float32(0)
        for first in range(0, n, BAND):
            for i in range(n_sums):
                sums[i] = float32(0)
            cuda.syncthreads()
            begin = (first * n - (first * (first - BAND) >> 1)) >> 1
            _stage(roots[star], begin, BAND * (n - first) >> 1, 0, 1, pairs, at_band >> 1)
            for low in range(first // depth * depth, reach, depth):
                high = min(low + depth, reach)
                if first == 0 or not at_once:
                    cuda.syncthreads()
                    begin, count = low * stride >> 1, (high - low) * stride >> 1
                    _stage(columns[panel], begin, count, place_of_star, together, pairs, at_vectors >> 1)
                cuda.syncthreads()
                for k in range(max(first, low), high, QUAD):
                    of_root = (at_band + BAND * (k - first) + EACH * part) & PLACE_OF_QUAD
                    whole = (at_vectors + stride * (k - low) + 4 * lane) & PLACE_OF_QUAD
                    odd = (at_vectors + stride * (k - low) + 4 * CLOUDS * quads + n_odd * lane) & place_of_odd
                    # Not in a loop, which the compiler does not write out if it is long.
                    _add_term(numbers, of_root, whole, odd, quads, t, b, row_of_root, sums)
                    of_root += BAND
                    whole += stride
                    odd += stride
                    _add_term(numbers, of_root, whole, odd, quads, t, b, row_of_root, sums)
                    of_root += BAND
                    whole += stride
                    odd += stride
                    _add_term(numbers, of_root, whole, odd, quads, t, b, row_of_root, sums)
                    of_root += BAND
                    whole += stride
                    odd += stride
                    _add_term(numbers, of_root, whole, odd, quads, t, b, row_of_root, sums)
            cuda.syncthreads()
            for k in range(max(first, reach), n, QUAD):
                of_root = (at_band + BAND * (k - first) + EACH * part) & PLACE_OF_QUAD
                of_mean = (CLOUDS * (k - reach) + lane) & PLACE
                for s in range(QUAD):
                    for i in range(EACH):
                        sums[i] += numbers[of_root + BAND * s + i] * numbers[of_mean + CLOUDS * s]
            for i in range(EACH):
                at = (first + EACH * part + i) & PLACE
                x[0] = sums[i] - numbers[at_centre + at]
                x[t] = width * (x[0] + numbers[at_spectrum + at])
                if first < reach:
                    for d in range(1, t):
                        x[d] = sums[d * EACH + i]
                    for k in range(1, t + 1):
                        products[k - 1] += x[0] * x[k]
                    _add_products(0, min(4, t), t, x, products)
                    _add_products(4, min(8, t), t, x, products)
                    _add_products(8, min(12, t), t, x, products)
                    _add_products(12, t, t, x, products)
                else:
                    products[t - 1] += x[0] * x[t]
                    products[n_products - 1] += x[t] * x[t]
        _sum_products(0, min(24, n_products), products, scratch)
        _sum_products(24, min(48, n_products), products, scratch)
        _sum_products(48, min(72, n_products), products, scratch)
        _sum_products(72, min(96, n_products), products, scratch)
        _sum_products(96, min(120, n_products), products, scratch)
        _sum_products(120, n_products, products, scratch)

        # -- the small system of each cloud ------------------------------------------------------------------------
        for i in range(t):
            gamma[i] = -products[i]
            for k in range(t):
                if k <= i:
                    # Product (k + 1, i + 1).
                    lower[i * (i + 1) // 2 + k] = products[t + k * t - k * (k - 1) // 2 + i - k]
            lower[i * (i + 1) // 2 + i] += float32(1)
        # Not in a loop, which the compiler does not write out if it is long: `lower` would lie in memory.
        determinant = _eliminate_four(0, t, lower, gamma, inverse) + _eliminate_four(
            4, t, lower, gamma, inverse
        )
        determinant += _eliminate_four(8, t, lower, gamma, inverse) + _eliminate_four(
            12, t, lower, gamma, inverse
        )
        for s in range(t):
            k = t - 1 - s
            for i in range(t):
                if i > k:
                    gamma[k] -= lower[i * (i + 1) // 2 + k] * gamma[i]
            gamma[k] *= inverse[k]

        # -- what is left at the best point, which is whitened once more -------------------------------------------
        more = gamma[t - 1] * width
        for low in range(0, reach, depth):
            high = min(low + depth, reach)
            if not at_once:
                cuda.syncthreads()
                begin, count = low * stride >> 1, (high - low) * stride >> 1
                _stage(columns[panel], begin, count, place_of_star, together, pairs, at_vectors >> 1)
                cuda.syncthreads()
            for k in range(low + part, high, PARTS):
                whole = (at_vectors + stride * (k - low) + 4 * lane) & PLACE_OF_QUAD
                odd = (at_vectors + stride * (k - low) + 4 * CLOUDS * quads + n_odd * lane) & place_of_odd
                _read_vectors(numbers, whole, odd, quads, t, b)
                value = b[0] + more * b[0]
                for d in range(1, t):
                    value += gamma[d - 1] * b[d]
                numbers[(at_point + CLOUDS * k + lane) & PLACE] = value
        for k in range(reach + part, n, PARTS):
            value = numbers[(CLOUDS * (k - reach) + lane) & PLACE]
            numbers[(at_point + CLOUDS * k + lane) & PLACE] = value + more * value
        square = float32(0)
        for first in range(0, n, BAND):
            for i in range(EACH):
                sums[i] = float32(0)
            cuda.syncthreads()
            begin = (first * n - (first * (first - BAND) >> 1)) >> 1
            _stage(roots[star], begin, BAND * (n - first) >> 1, 0, 1, pairs, at_band >> 1)
            cuda.syncthreads()
            for k in range(first, n, QUAD):
                of_root = (at_band + BAND * (k - first) + EACH * part) & PLACE_OF_QUAD
                of_point = (at_point + CLOUDS * k + lane) & PLACE
                for s in range(QUAD):
                    for i in range(EACH):
                        sums[i] += numbers[of_root + BAND * s + i] * numbers[of_point + CLOUDS * s]
            for i in range(EACH):
                at = (first + EACH * part + i) & PLACE
                middle = numbers[at_centre + at]
                residual = sums[i] - middle + more * (numbers[at_spectrum + at] - middle)
                square += residual * residual
        square = sum_of_parts(square, PARTS, scratch)
        for k in range(t):
            square += gamma[k] * gamma[k]
        if there and part == 0:
            found[star, EVIDENCE, cloud] = log_weights[cloud] - float32(0.5) * (square + determinant)
            found[star, SQUARE, cloud] = square

        # -- labels: L⁻¹g of the first and of the thread's own -------------------------------------------------------
        n_labels = labels.shape[0]
        for k in range(t):
            gain = gains[0, k, cloud]
            for i in range(t):
                if i < k:
                    gain -= lower[k * (k + 1) // 2 + i] * of_first[i]
            of_first[k] = gain * inverse[k]
        for label in range(part, n_labels, PARTS):
            mean = labels[label, cloud]
            variance = scatter[label, cloud]
            along = scatter_with_first[label, cloud]
            for k in range(t):
                gain = gains[label, k, cloud]
                mean += gamma[k] * gain
                for i in range(t):
                    if i < k:
                        gain -= lower[k * (k + 1) // 2 + i] * solved[i]
                solved[k] = gain * inverse[k]
                variance += solved[k] * solved[k]
                along += solved[k] * of_first[k]
            if there:
                found[star, FIRST_LABEL + label, cloud] = mean
                found[star, FIRST_LABEL + n_labels + label, cloud] = variance
                found[star, FIRST_LABEL + 2 * n_labels + label, cloud] = along

    compare_clouds.__name__ = f"compare_clouds_{t}"
    return compare_clouds


_USUAL = {
    vectors: kernel(
        SIGNATURE,
        threads=THREADS,
        blocks=BLOCKS_TOGETHER,
        early_blocks=EARLY_BLOCKS.get(vectors),
        serves=("cloud_posterior",),
    )(_written_for(vectors))
    for vectors in USUAL_VECTORS
}


@cache
def _made(vectors: int) -> Any:
    return launchable(_written_for(vectors), THREADS, EARLY_BLOCKS.get(vectors, 1))


def compare_kernel(vectors: int) -> Any:
    """The kernel `compare_clouds` for clouds of so many tangents, the scale's included."""
    # The simulator compiles nothing, and its tests change the sizes of tiles.
    if config.ENABLE_CUDASIM:  # type: ignore[attr-defined]
        return launchable(_written_for(vectors), THREADS)
    return usual(vectors, cuda.get_current_device().compute_capability) or _made(vectors)


def usual(vectors: int, target: tuple[int, int]) -> Any:
    """The kernel that is entered in the registry with the launch bounds of such devices; None if none is."""
    early = vectors in EARLY_BLOCKS and tuple(target) < HOPPER
    return None if early else _USUAL.get(vectors)


@kernel(
    "void(float32[:,:,::1], float64[:,::1], float64[:,::1], int64[::1], int64, float64, float64, float32[:,::1],"
    " float32[::1], float32[:,::1], float32[::1], float64[::1], float64[::1], float64[:,::1], float64[:,::1],"
    " float64[:,::1], float64[:,::1], float64[:,::1], float64[:,::1], float64[::1], float64[::1], float64[::1],"
    " float64[::1], float64[::1], float32[:,::1])",
    threads=LANES,
    blocks=4,
    serves=("cloud_posterior",),
)
def conclude_stars(  # type: ignore[no-untyped-def]
    found, numbers, points, first, n, lowest, highest, w1, b1, w2, b2,
    log_g, log_g_err, features, label, sd, covariance, weights, expert, chi2, distance, strength, scale, log_level,
    point,
):  # fmt: skip
    """From what clouds say to what is said of each star, as `cpu_clouds.posterior`; n is the number of coordinates.

    `found` is what `compare_clouds` leaves; shares take the place of evidences. `points` (·, w) has nuisances first.

    Launch: a block of LANES threads for each star.
    """
    scratch = cuda.shared.array(SCRATCH, float64)
    lane = cuda.threadIdx.x
    lanes = cuda.blockDim.x
    star = cuda.blockIdx.x
    m = found.shape[2]
    n_labels = label.shape[1]
    n_experts = first.size - 1

    top = float64(LEAST_EVIDENCE)
    nearest = float64(np.inf)
    for j in range(lane, m, lanes):
        # A comparison with NaN is false; max() and min() on a device may be either.
        evidence = float64(found[star, EVIDENCE, j])
        if evidence > top:  # noqa: PLR1730
            top = evidence
        square = float64(found[star, SQUARE, j])
        if square < nearest:  # noqa: PLR1730
            nearest = square
    top = -least_of_block(-top, scratch)
    nearest = least_of_block(nearest, scratch)

    total = float64(0)
    best = float64(0)
    for e in range(n_experts):
        most = float64(LEAST_EVIDENCE)
        for j in range(first[e] + lane, first[e + 1], lanes):
            evidence = float64(found[star, EVIDENCE, j])
            if evidence > most:  # noqa: PLR1730
                most = evidence
        most = -least_of_block(-most, scratch)
        norm = float64(0)
        mean = float64(0)
        for j in range(first[e] + lane, first[e + 1], lanes):
            evidence = float64(found[star, EVIDENCE, j])
            if evidence > float64(LEAST_EVIDENCE):
                share = math.exp(evidence - most)
                norm += share
                mean += share * float64(found[star, FIRST_LABEL, j])
        norm = sum_of_block(norm, scratch)
        mean = sum_of_block(mean, scratch)
        among = math.exp(most - top) if norm > float64(0) else float64(0)
        total += among * norm
        best += among * mean
        if lane == 0:
            weights[star, e] = among * norm
            expert[star, e] = mean / norm if norm > float64(0) else float64(NAN)
    # Beyond single precision, 1e15 times the noise away from any cloud, there is no answer.
    known = top > float64(LEAST_EVIDENCE)
    if not known:
        total = float64(1)
        best = float64(NAN)
    best /= total
    between = float64(0)
    kept = float64(0)
    for j in range(lane, m, lanes):
        evidence = float64(found[star, EVIDENCE, j])
        rounded = float32(0)
        if evidence > float64(LEAST_EVIDENCE):
            rounded = float32(math.exp(evidence - top) / total)
        found[star, EVIDENCE, j] = rounded
        if rounded > float32(0):
            apart = float64(found[star, FIRST_LABEL, j]) - best
            between += float64(rounded) * apart * apart
            kept += float64(rounded)
    between = sum_of_block(between, scratch)
    kept = sum_of_block(kept, scratch)
    if not known:
        kept = float64(NAN)
    between /= kept
    cuda.syncthreads()
    for e in range(lane, n_experts, lanes):
        weights[star, e] = weights[star, e] / total if known else float64(NAN)

    first_sd = float64(0)
    second = float64(0)
    third = float64(0)
    for place in range(n_labels):
        middle = float64(0)
        for j in range(lane, m, lanes):
            share = float64(found[star, EVIDENCE, j])
            if share > float64(0):
                middle += share * float64(found[star, FIRST_LABEL + place, j])
        middle = sum_of_block(middle, scratch) / kept
        if place == 0:
            middle = best
        variance = float64(0)
        along = float64(0)
        for j in range(lane, m, lanes):
            share = float64(found[star, EVIDENCE, j])
            if share > float64(0):
                apart = float64(found[star, FIRST_LABEL + place, j]) - middle
                of_first = float64(found[star, FIRST_LABEL, j]) - best
                variance += share * (float64(found[star, FIRST_LABEL + n_labels + place, j]) + apart * apart)
                along += share * (
                    float64(found[star, FIRST_LABEL + 2 * n_labels + place, j]) + apart * of_first
                )
        variance = sum_of_block(variance, scratch) / kept
        along = sum_of_block(along, scratch) / kept
        spread = float64(NAN)
        if known:
            spread = float64(math.sqrt(max(variance, float64(0)) + TINY))
        if place == 0:
            first_sd = spread
        if place == 1:
            second = middle
        if place == 2:
            third = middle
        if lane == 0:
            label[star, place] = middle
            sd[star, place] = spread
            covariance[star, place] = along

    width = point.shape[1]
    for k in range(lane, width, lanes):
        point[star, k] = points[star, k + width - n if k < n else k - n]
    of_width = math.log(first_sd + LEAST_SPREAD)
    of_spread = math.log(math.sqrt(between + TINY) + LEAST_SPREAD)
    answer_star(
        star, best, of_width, of_spread, second, third, lowest, highest, w1, b1, w2, b2, scratch,
        log_g, log_g_err, features,
    )  # fmt: skip
    if lane == 0:
        c0 = numbers[star, SCALE]
        level2 = numbers[star, LEVEL] / (numbers[star, N_USED] + TINY) / (c0 * c0)
        freedom = float64(1) + max(numbers[star, N_USED] - float64(n + 1), float64(0))
        chi2[star] = (numbers[star, ENERGY] - numbers[star, EXPLAINED]) / freedom
        distance[star] = (numbers[star, BEYOND] + nearest) / float64(n)
        strength[star] = numbers[star, STRENGTH]
        scale[star] = c0
        log_level[star] = float64(0.5) * math.log(level2 + TINY)


class Posteriors(NamedTuple):
    """What scoring gives, one row per spectrum: the fields of `moefast.kernels.CloudPosterior`."""

    log_g: NDArray
    log_g_err: NDArray
    error_features: NDArray
    label: NDArray
    label_sd: NDArray
    label_cov: NDArray
    weights: NDArray
    expert_label: NDArray
    chi2: NDArray
    distance: NDArray
    strength: NDArray
    scale: NDArray
    log_level: NDArray
    point: NDArray
    snr_norm: NDArray
    snr_median: NDArray
    n_good: NDArray
    flag: NDArray


class DevicePosterior(StepPlan):
    """A space and its clouds on the device, laid out as the kernels read them.

    Raises
    ------
    ValueError
        They do not fit each other.
    BackendError
        They need more shared memory than a block has.
    """

    results: Callable[..., Any] = Posteriors

    def __init__(self, space: Space, clouds: Clouds) -> None:
        p, width = space.directions.shape
        n, q = space.n_coordinates, space.n_nuisances
        (m, n_keys), vectors = clouds.keys.shape, clouds.tangents.shape[1] + 1
        if n_keys != n:
            raise ValueError(f"clouds in {n} coordinates expected; found {n_keys}")
        self.vectors = vectors
        self.solving = solve_launch(width), solve_launch(n), solve_launch(n, 2)
        if lack := without_cuda(space, clouds):
            raise BackendError(f"backend cuda: there are no kernels for {lack}; use backend cpu")
        self.space, self.n_pixels, self.n_sky = DeviceSpace(space), p, space.n_sky
        self.n_coordinates, self.n_nuisances, self.n_slopes = n, q, space.n_slopes
        self.n_clouds, self.n_labels, self.n_experts = m, clouds.labels.shape[1], clouds.n_experts
        self.unit = float(clouds.scale_unit)

        self.panels, self.padded = -(-m // CLOUDS), rounded_up(n, QUAD)
        seen = np.flatnonzero(clouds.tangents.any((0, 1)))
        reach = int(seen[-1]) + 1 if seen.size else 1
        self.reach = min(self.padded, rounded_up(reach, BAND))
        self.sizes = sizes_of(self.padded, self.reach, vectors)
        drawn = np.zeros((self.panels * CLOUDS, vectors, self.padded), np.float32)
        drawn[:m, 0, :n], drawn[:m, 1:, :n] = clouds.keys, clouds.tangents
        drawn = drawn.reshape(self.panels, CLOUDS, vectors, self.padded).transpose(0, 3, 1, 2)
        columns = np.zeros((self.panels, self.reach, self.sizes.stride), np.float32)
        quads = vectors // 4
        width_of_odd = self.sizes.stride // CLOUDS - 4 * quads
        for vector in range(vectors):
            quad, place = divmod(vector, 4)
            at = quad * 4 * CLOUDS + place + (4 if quad < quads else width_of_odd) * np.arange(CLOUDS)
            columns[:, :, at] = drawn[:, : self.reach, :, vector]
        # A kernel takes no empty array.
        means = np.zeros((self.panels, max(1, self.padded - self.reach), CLOUDS), np.float32)
        means[:, : self.padded - self.reach] = drawn[:, self.reach :, :, 0]
        columns = columns.reshape(self.panels, -1).view(np.float64)
        f32 = np.float32
        self.clouds = (
            on_device(columns, np.float64), on_device(means, f32), on_device(clouds.log_weights, f32),
            on_device(clouds.gains.transpose(2, 1, 0), f32), on_device(clouds.labels.T, f32),
            on_device(clouds.scatter.T, f32), on_device(clouds.scatter_with_first.T, f32),
        )  # fmt: skip
        self.width = np.float32(clouds.scale_width)
        self.first = on_device(clouds.first, np.int64)
        self.label_range = tuple(float(limit) for limit in clouds.label_range)
        self.error_model = tuple(on_device(part, f32) for part in clouds.error_model)
        self.correction = tuple(on_device(part.ravel(), f32) for part in clouds.correction)
        self.units = clouds.n_units
        self.no_mask = cuda.to_device(_NO_MASK)
        self.matrices = Matrices(self.solving[:2], self.solving[2])

    def kinds(self, rows: int) -> list[tuple[tuple[int, ...], type]]:
        """Shape and dtype of each array of `Posteriors`."""
        vector, of_labels, of_experts = (rows,), (rows, self.n_labels), (rows, self.n_experts)
        shapes = [vector, vector, (rows, 5), *[of_labels] * 3, *[of_experts] * 2, *[vector] * 5]
        kinds: list[type] = [np.float32, np.float32, np.int32, np.uint32]
        point = (rows, self.n_coordinates + self.n_nuisances), np.float32
        return [*((shape, np.float64) for shape in shapes), point, *((vector, kind) for kind in kinds)]

    def bytes_per_row(self) -> int:
        """Device memory of a row, flux, error and mask included, and its share of a block's scratch."""
        n = self.n_coordinates
        singles = size_of_root(n) + 2 * n + (FIRST_LABEL + 3 * self.n_labels) * self.n_clouds
        results = sum(np.dtype(kind).itemsize * int(np.prod(shape)) for shape, kind in self.kinds(1))
        floats = 8 * (self.space.doubles() + math.prod(self.shape_of_systems(1))) + 4 * singles
        return 9 * self.n_pixels + floats + results + -(-self.matrices.scratch_bytes // BLOCK_ROWS)

    def shape_of_systems(self, rows: int) -> tuple[int, int, int]:
        """Of what `isolate_slopes` leaves of so many stars; no groups where slopes have one width."""
        k = self.n_slopes
        return len(self.space.slopes[1]) if k else 0, rows, 2 * k * (k + 1) + 1

    def work(self, rows: int) -> Work:
        """Device memory for so many stars."""
        return Work(rows, self)

    def steps(
        self, flux: Any, error: Any, mask: Any, n: int, work: Work, scores: Posteriors, stream: Any
    ) -> Iterator[tuple[str, Callable[[], None]]]:
        """What is done to n spectra, in its order: a name in words, and what starts it in `stream`; see `launch`."""
        p, c, q = self.n_pixels, self.n_coordinates, self.n_nuisances
        hidden, sizes = self.no_mask if mask is None else mask, self.sizes
        of_all, of_coordinates = (self.matrices.launch(n, each, stream) for each in self.solving[:2])
        of_spread = self.matrices.launch(n, self.solving[2], stream, in_scratch=True)
        quality = scores.snr_norm, scores.n_good, scores.flag
        yield from self.space.to_point(flux, error, hidden, n, work, quality, of_all, stream)
        if k := self.n_slopes:
            share, groups = self.space.slopes

            def isolate() -> None:
                for group in range(len(groups)):
                    isolate_slopes[of_all](
                        n, work.packed, work.u, work.points, self.n_sky, group, groups, work.scratch, work.numbers,
                        work.systems,
                    )  # fmt: skip

            yield "slopes alone", isolate
            yield (
                "width of slopes",
                lambda: weigh_widths[-(-n // WIDTH_THREADS), WIDTH_THREADS, stream](
                    n, k, share, self.space.narrow, work.systems, work.numbers
                ),
            )
        yield (
            "nuisances",
            lambda: marginalise_stars[of_all](
                n,
                work.packed,
                work.u,
                work.points,
                q,
                self.n_sky,
                self.space.narrow,
                work.scratch,
                work.numbers,
            ),
        )
        yield (
            "root of M",
            lambda: root_stars[of_coordinates](n, work.packed, work.u, c, work.scratch, work.numbers),
        )
        yield (
            "spread within clouds",
            lambda: whiten_stars[of_spread](
                n, work.packed, work.u, self.unit, work.scratch, work.second_scratch,
                work.roots, work.centre, work.spectrum,
            ),
        )  # fmt: skip
        yield (
            "clouds",
            lambda: compare_kernel(self.vectors)[
                (self.panels, -(-n // sizes.stars)), CLOUDS * PARTS * sizes.stars, stream, 4 * sizes.shared
            ](
                n, self.padded, self.reach, sizes.depth, *self.clouds,
                work.pairs_of_roots, work.centre, work.spectrum, self.width, work.found,
            ),
        )  # fmt: skip
        yield (
            "labels",
            lambda: conclude_stars[n, LANES, stream](
                work.found,
                work.numbers,
                work.points,
                self.first,
                c,
                *self.label_range,
                *self.error_model,
                *scores[:14],
            ),
        )
        if self.correction:
            inputs = (
                scores.point, scores.label_sd, scores.label_cov, scores.weights, scores.expert_label, scores.log_level,
            )  # fmt: skip
            outputs = scores.label, scores.log_g, scores.log_g_err, scores.error_features
            yield (
                "correction of log g",
                lambda: correct_stars[-(-n // STARS), UNIT_THREADS, stream, shared_bytes(self.units)](
                    n, self.units, *self.label_range, *self.correction, *self.error_model, *inputs, *outputs
                ),
            )
        yield (
            "median SNR",
            lambda: median_rows[n, MEDIAN_THREADS, stream](flux, error, hidden, p, scores.snr_median),
        )


class Work(SpaceWork):
    """Device memory of up to `rows` spectra between the kernels, and the results."""

    def __init__(self, rows: int, plan: DevicePosterior) -> None:
        n, matrices = plan.n_coordinates, plan.matrices
        super().__init__(rows, plan.space, matrices)
        of_spread = min(rows, matrices.blocks), matrices.always_of_block
        self.second_scratch = cuda.device_array(of_spread, np.float64)
        # What lies below the diagonal in a band, and what is there to make it whole, is never written.
        self.roots = cuda.to_device(np.zeros((rows, size_of_root(n)), np.float32))
        self.pairs_of_roots = self.roots.view(np.float64)
        self.centre, self.spectrum = (cuda.device_array((rows, n), np.float32) for _ in range(2))
        self.found = cuda.device_array((rows, FIRST_LABEL + 3 * plan.n_labels, plan.n_clouds), np.float32)
        if plan.n_slopes:
            self.systems = cuda.device_array(plan.shape_of_systems(rows), np.float64)
        self.memory_of_scores, self.scores = results_on_device(plan, rows)


class CudaPosteriorScorer(BlockScorer):
    """Posteriors over clouds on the device, block by block; several threads may call it.

    Parameters
    ----------
    space : Space
    clouds : Clouds
    block_rows : int
        Rows per block at most; fewer if FREE_SHARE of the free device memory does not hold all slots.
    slots : int
        Blocks on their way at most.

    Raises
    ------
    ValueError
        Space and clouds do not fit each other.
    BackendError
        There is no usable device, or they are too large for the kernels.
    DeviceMemoryError, PinnedMemoryError
        Memory of the device, or pinned memory of the host, is too small for blocks of FLOOR_ROWS rows in all slots.
    """

    def __init__(
        self, space: Space, clouds: Clouds, *, block_rows: int = BLOCK_ROWS, slots: int = SLOTS
    ) -> None:
        super().__init__(lambda: DevicePosterior(space, clouds), block_rows, slots)

    def __call__(
        self,
        flux: NDArray,
        error: NDArray,
        mask: NDArray[np.bool_] | None = None,
        slot: Slot | None = None,
    ) -> CloudPosterior:
        """Posteriors of spectra on the host; see `moefast.kernels.cloud_posterior`, and `BlockScorer.slot`."""
        return CloudPosterior(*self._scored(flux, error, mask, slot))


def cloud_posterior(
    flux: NDArray, error: NDArray, mask: NDArray[np.bool_] | None, space: Space, clouds: Clouds
) -> CloudPosterior:
    """`moefast.kernels.cloud_posterior` on the device, which has checked the arguments.

    Blocks in a loop are better given to one `CudaPosteriorScorer`, which keeps space and clouds on the device.
    """
    blocks = blocks_of_a_call(len(flux), BLOCK_ROWS, SLOTS)
    return CudaPosteriorScorer(space, clouds, **blocks)(flux, error, mask)
