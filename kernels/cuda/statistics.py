"""All that is known of a row by itself, from one read of flux and error on the device: sums, cells, the exact median.

Contract: `moefast.kernels.reference.project_reference`, but for what is a product with columns, which
`moefast.kernels.cuda.columns` makes; counts, flags and `snr_median` to the last bit those of the CPU.

Floor: a spectrum is 32 kB of flux and error, and 2.6 kB are left for the product and the mixture: 8 ns at 4.3 TB/s.

Design: a block of threads owns a row. A thread reads EACH neighbouring pixels at a time, in vectors of four numbers,
which are a whole cell; it adds up what sums need, leaves a bit for each good pixel, and keeps flux/error in registers,
as integers of the same order as the numbers. Pixels are taken to be good, of a usual size and not zero, first; where
the sums of a group and its least flux and error deny that, it is done again with a look at each pixel. Flux and errors
that are no spectrum's, which `quotient` does not divide, have the median of their row found in memory, slowly.

The median is found by counting, not by sorting, in three steps, none of which can make it wrong: what is counted
is counted exactly, and only where to count is guessed.

1. Each warp puts LANES keys, evenly spaced over the row, in order. From the ranks around the middle, averaged over
   the warps, come two pivots, between which the median lies in 98 rows of 100, with a fifth of all keys.
2. Both pivots are counted at once, two counts in one number. The keys between them are dense enough that the next two
   pivots can be interpolated: FEW keys or fewer lie between those, half of that mostly. Where guesses have failed
   TRIES times, halves of the range follow.
3. The keys that are left are ranked by comparing each with each.
"""

from __future__ import annotations

import math

import numpy as np
from numba import boolean, cuda, float32, float64, int32, int64, uint8, uint32

from moefast.kernels.cuda.gram import ALIGNED
from moefast.kernels.cuda.lanes import (
    GROUP,
    SCRATCH,
    WRITTEN_OUT,
    bits_float,
    float_bits,
    least_of_block,
    load_four,
    quotient,
    sum_of_group,
)
from moefast.kernels.cuda.median import NO_KEY, ordered
from moefast.kernels.cuda.registry import kernel
from moefast.kernels.quality import LARGEST32, LARGEST_ERROR32

__all__ = ["EACH", "MOST_PIXELS", "THREADS", "row_statistics"]

THREADS = 128
EACH = 8
"""Neighbouring pixels that a thread reads at a time; of rows of a multiple of as many, also the pixels of a cell."""
GROUPS = 4
"""Times that it does so at most, and keeps their keys in registers."""
KEYS = GROUPS * EACH
MOST_PIXELS = THREADS * KEYS
"""Pixels of a row, at most."""
BLOCKS_TOGETHER = 5
LEAST_FLUX, LARGEST_SIGNAL = np.float32(2.0**-90), np.float32(2.0**124)
LEAST_ERROR, LARGEST_SQUARE = np.float32(2.0**-62), np.float32(1e12)
"""Least flux and error, and largest sums of their squares over a group, of pixels that are good for certain, and whose
quotient is found quickly."""
LARGEST_FLUX = np.float32(2.0**62)
LANES = 32
"""Keys that are put in order to begin with, in each warp."""
WARPS = THREADS // LANES
ASIDE = 3.5
"""Ranks beside the middle of these where the first two pivots are."""
TRIES = 4
"""Pairs of pivots that are guessed, before the range is halved."""
FEW = THREADS
"""Keys that are ranked at last, each by a thread; a power of two."""
INFINITY = np.int32(0x7F800000)
"""The key of infinity, above those of all quotients that are found quickly."""
LEVEL, POWER, NOISE, SIGNAL, SQUARE = range(5)
SUMS = 5
"""Sums over a row in single precision: σ²/D, x²/D, what σ² lets x²/D be beyond the columns, flux² and σ²."""
BAD_ERROR, ABSURD = np.int32(1 << 14), np.int32(1 << 23)
"""What a thread adds to the number of good pixels that has seen flux with a bad error, and what is no spectrum."""
ALL_GOOD = np.int32((1 << EACH) - 1)
HALF_WORD = 16
LOW_HALF = np.int32(0xFFFF)
TWO_COUNTS = np.int32(1 << HALF_WORD)
"""One in the upper half of a number that holds two counts."""
NOT_NEGATIVE = 0x7FFFFFFFFFFFFFFF
NAN = np.float32(np.nan)


@cuda.jit(device=True, **WRITTEN_OUT)
def _read_eight(numbers, here, out):  # type: ignore[no-untyped-def]
    """Read EACH neighbours into registers."""
    out[0], out[1], out[2], out[3] = load_four(numbers, here)
    out[4], out[5], out[6], out[7] = load_four(numbers, here + 4)


@cuda.jit(device=True, **WRITTEN_OUT)
def _sums_of(f, e, reference, inverse, residual, lowest):  # type: ignore[no-untyped-def]
    """The sums of a group, in their order."""
    level = float32(0)
    power = float32(0)
    noise = float32(0)
    signal = float32(0)
    square = float32(0)
    for i in range(EACH):
        x = max(f[i], lowest) - reference[i]
        variance = e[i] * e[i]
        level += variance * inverse[i]
        power += x * x * inverse[i]
        noise += variance * residual[i]
        signal += f[i] * f[i]
        square += variance
    return level, power, noise, signal, square


@cuda.jit(device=True, **WRITTEN_OUT)
def _add_group(  # type: ignore[no-untyped-def]
    flux, error, mask, pixels, p, row, group, lowest, cells, marks, sums, keys, first
):
    """Add EACH pixels to the sums of a thread; leave their keys, the sum of their cell, and a bit for each good one.

    Returns
    -------
    int32
        The number of good pixels, with BAD_ERROR and ABSURD where there are such.
    """
    f = cuda.local.array(EACH, float32)
    e = cuda.local.array(EACH, float32)
    reference = cuda.local.array(EACH, float32)
    inverse = cuda.local.array(EACH, float32)
    residual = cuda.local.array(EACH, float32)
    hidden = cuda.local.array(EACH, boolean)
    pixel = int64(EACH) * group
    for i in range(EACH):
        keys[first + i] = NO_KEY
    if pixel >= p:
        return int32(0)
    here = row * p + pixel
    _read_eight(flux, here, f)
    _read_eight(error, here, e)
    if mask.size > 0:
        # What is hidden is a pixel without flux.
        hidden[0], hidden[1], hidden[2], hidden[3] = load_four(mask, here)
        hidden[4], hidden[5], hidden[6], hidden[7] = load_four(mask, here + 4)
        for i in range(EACH):
            f[i] = NAN if hidden[i] else f[i]
    _read_eight(pixels, 3 * pixel, reference)
    _read_eight(pixels, 3 * pixel + EACH, inverse)
    _read_eight(pixels, 3 * pixel + 2 * EACH, residual)
    least_flux = abs(f[0])
    least_error = e[0]
    for i in range(EACH):
        least_flux = min(least_flux, abs(f[i]))
        least_error = min(least_error, e[i])
        keys[first + i] = ordered(float_bits(quotient(f[i], e[i])))
    level, power, noise, signal, square = _sums_of(f, e, reference, inverse, residual, lowest)
    of_group = ALL_GOOD
    more = int32(0)
    # A comparison with NaN is false; a minimum leaves it out, a sum does not.
    usual = (least_flux >= LEAST_FLUX) & (least_error >= LEAST_ERROR)
    usual &= (signal <= LARGEST_SIGNAL) & (square <= LARGEST_SQUARE)
    if not usual:
        of_group = int32(0)
        for i in range(EACH):
            # Selections, so that no thread waits for its neighbours.
            finite = abs(f[i]) <= LARGEST32
            good = finite & (e[i] > float32(0)) & (e[i] <= LARGEST_ERROR32)
            divided = (abs(f[i]) >= LEAST_FLUX) | (f[i] == float32(0))
            divided &= (abs(f[i]) <= LARGEST_FLUX) & (e[i] >= LEAST_ERROR)
            of_group = int32(of_group | (int32(1 << i) if good else int32(0)))
            more = int32(more | (BAD_ERROR if finite and not good else int32(0)))
            more = int32(more | (ABSURD if good and not divided else int32(0)))
            keys[first + i] = keys[first + i] if good else NO_KEY
            # Without flux, error and reference a pixel adds nothing.
            f[i] = f[i] if good else float32(0)
            e[i] = e[i] if good else float32(0)
            reference[i] = reference[i] if good else float32(0)
        level, power, noise, signal, square = _sums_of(f, e, reference, inverse, residual, lowest)
    sums[LEVEL] += level
    sums[POWER] += power
    sums[NOISE] += noise
    sums[SIGNAL] += signal
    sums[SQUARE] += square
    place = (row * (p // EACH) + group) & NOT_NEGATIVE
    cells[place] = level
    marks[place] = uint8(of_group)
    return int32(cuda.popc(of_group) | more)


@cuda.jit(device=True)
def _sum_of_block(value, scratch):  # type: ignore[no-untyped-def]
    """`lanes.sum_of_block` of THREADS threads, which the compiler knows."""
    value = sum_of_group(value)
    cuda.syncthreads()
    if cuda.threadIdx.x % GROUP == 0:
        scratch[cuda.threadIdx.x // GROUP] = value
    cuda.syncthreads()
    total = scratch[0]
    for group in range(1, THREADS // GROUP):
        total += scratch[group]
    return total


@cuda.jit(device=True)
def _beside(low, high, aside):  # type: ignore[no-untyped-def]
    """`low` + `aside`, as far as that is not beyond `high` by more than a rounding."""
    most = float32(int64(high) - int64(low))
    # Two steps, neither of which overflows.
    half = int32(float32(0.5) * min(max(aside, float32(0)), most))
    return int32(int32(low + half) + half)


@cuda.jit(device=True)
def _conclude(  # type: ignore[no-untyped-def]
    parts, signal, counted, p, row, log_level, energy, expected, snr_norm, n_good, flag
):
    """Add the parts of a block's warps up, and write what they say of a row."""
    n = int32(counted & (BAD_ERROR - int32(1)))
    level = float32(0)
    power = float32(0)
    noise = float32(0)
    square = float32(0)
    for part in range(THREADS // GROUP):
        level += parts[LEVEL, part]
        power += parts[POWER, part]
        noise += parts[NOISE, part]
        square += parts[SQUARE, part]
    log_level[row] = float32(0)
    if level > float32(0):
        log_level[row] = float32(0.5) * math.log(level / float32(n))
    energy[row] = power
    expected[row] = noise
    n_good[row] = n
    bits = int32(4) if counted & (ABSURD - BAD_ERROR) else int32(0)
    if 2 * int64(n) < p:
        bits |= int32(2)
    if n == 0:
        bits |= int32(1)
        snr_norm[row] = NAN
    else:
        snr_norm[row] = math.sqrt(signal / float64(square))
    flag[row] = bits


@cuda.jit(device=True)
def _key_in_memory(flux, error, marks, p, row, pixel):  # type: ignore[no-untyped-def]
    """The key of a pixel, whatever it holds."""
    if marks[(row * (p // EACH) + pixel // EACH) & NOT_NEGATIVE] & (1 << (pixel % EACH)):
        here = (row * p + pixel) & NOT_NEGATIVE
        return ordered(float_bits(float32(flux[here] / error[here])))
    return NO_KEY


@cuda.jit(device=True)
def _signal_in_memory(flux, marks, p, row):  # type: ignore[no-untyped-def]
    """A thread's part of Σ flux², in double precision, in which all squares fit."""
    signal = float64(0)
    for pixel in range(cuda.threadIdx.x, p, THREADS):
        if marks[(row * (p // EACH) + pixel // EACH) & NOT_NEGATIVE] & (1 << (pixel % EACH)):
            value = float64(flux[(row * p + pixel) & NOT_NEGATIVE])
            signal += value * value
    return signal


@cuda.jit(device=True)
def _middle_in_memory(flux, error, marks, p, row, n, scratch, middle):  # type: ignore[no-untyped-def]
    """Write keys (n − 1) / 2 and the next of n in order, of a row with an absurd pixel, to `middle`.

    Every thread must call it; the first one may read `middle` without a barrier.
    """
    k = int32((n - int32(1)) >> int32(1))
    low = -int64(NO_KEY)
    high = int64(NO_KEY) - 1
    while low < high:
        pivot = int32((low + high) >> 1)
        mine = int32(0)
        for pixel in range(cuda.threadIdx.x, p, THREADS):
            key = _key_in_memory(flux, error, marks, p, row, pixel)
            mine = int32(mine + (int32(1) if key <= pivot else int32(0)))
        if _sum_of_block(mine, scratch) > k:
            high = int64(pivot)
        else:
            low = int64(pivot) + 1
    one = int32(low)
    upto = int32(0)
    above = NO_KEY
    for pixel in range(cuda.threadIdx.x, p, THREADS):
        key = _key_in_memory(flux, error, marks, p, row, pixel)
        if key <= one:
            upto = int32(upto + int32(1))
        else:
            above = min(above, key)
    upto = _sum_of_block(upto, scratch)
    above = least_of_block(above, scratch)
    if cuda.threadIdx.x == 0:
        middle[0] = one
        middle[1] = one if upto > k + 1 else above


@cuda.jit(device=True)
def _key_of_rank(in_order, rank):  # type: ignore[no-untyped-def]
    """The key of a rank, of keys that stand at the rank of the first of their equals, with NO_KEY between."""
    while in_order[rank & (THREADS - 1)] == NO_KEY:
        rank = int32(rank - int32(1))
    return in_order[rank & (THREADS - 1)]


@kernel(
    "void(float32[::1], float32[::1], boolean[::1], boolean, float32[::1], int64, boolean, float32[::1], uint8[::1],"
    " float32[::1], float32[::1], float32[::1], float32[::1], float32[::1], int32[::1], uint32[::1])",
    threads=THREADS,
    blocks=BLOCKS_TOGETHER,
    serves=("score",),
)
def row_statistics(  # type: ignore[no-untyped-def]
    flux, error, mask, clipped, pixels, p, with_median, cells, marks,
    log_level, energy, expected, snr_norm, snr_median, n_good, flag,
):  # fmt: skip
    """Sums, cells and median of each row; see `moefast.kernels.Projected`.

    `flux`, `error` and `mask` are flat, and begin at a multiple of 16 bytes; `mask` is empty where there is none. `p`
    is a multiple of EACH, and MOST_PIXELS at most. `pixels` holds reference, 1/D and residual of EACH pixels, then of
    the next ones. `cells` (n · p / EACH), flat, gets the sums of σ²/D over cells, `marks`, of the same size, a bit for
    each good pixel, and `snr_median` what it says, if asked for.

    Launch: n blocks of THREADS threads.
    """
    scratch = cuda.shared.array(SCRATCH, int32)
    parts = cuda.shared.array((SUMS, SCRATCH), float32)
    of_signal = cuda.shared.array(SCRATCH, float64)
    in_order = cuda.shared.array(THREADS, int32, alignment=ALIGNED)
    pivots = cuda.shared.array((2, WARPS), int32)
    of_thread = cuda.shared.array((KEYS, THREADS), int32)
    found = cuda.shared.array(FEW, int32, alignment=ALIGNED)
    count = cuda.shared.array(1, int32)
    middle = cuda.shared.array(2, int32)
    keys = cuda.local.array(KEYS, int32)
    sums = cuda.local.array(SUMS, float32)
    thread = int32(cuda.threadIdx.x & (THREADS - 1))
    row = int64(cuda.blockIdx.x) & NOT_NEGATIVE
    lowest = float32(0) if clipped else -LARGEST32

    for i in range(SUMS):
        sums[i] = float32(0)
    # Written out: a loop would keep the keys in memory.
    first_group = _add_group(flux, error, mask, pixels, p, row, thread, lowest, cells, marks, sums, keys, 0)
    second_group = _add_group(
        flux, error, mask, pixels, p, row, thread + THREADS, lowest, cells, marks, sums, keys, EACH
    )
    third_group = _add_group(
        flux, error, mask, pixels, p, row, thread + 2 * THREADS, lowest, cells, marks, sums, keys, 2 * EACH
    )
    fourth_group = _add_group(
        flux, error, mask, pixels, p, row, thread + 3 * THREADS, lowest, cells, marks, sums, keys, 3 * EACH
    )
    counted = int32((first_group | second_group | third_group | fourth_group) & (ABSURD | BAD_ERROR))
    for of_group in (first_group, second_group, third_group, fourth_group):
        counted = int32(counted + (of_group & (BAD_ERROR - int32(1))))

    for i in range(SUMS):
        total = sum_of_group(sums[i])
        if thread % GROUP == 0:
            parts[i, thread // GROUP] = total
    # Its barriers stand between the parts and whoever adds them up.
    counted = _sum_of_block(counted, scratch)
    n = int32(counted & (BAD_ERROR - int32(1)))
    if with_median and n > 0:
        if counted >= ABSURD:
            _middle_in_memory(flux, error, marks, p, row, n, scratch, middle)
        else:
            # Not a function of its own: numba-cuda's successor adds elsewhere then than in shared memory.
            k = int32((n - int32(1)) >> int32(1))

            # -- the first two pivots, from a few keys of each warp --------------------------------------------------
            lane = int32(thread & (LANES - 1))
            key = keys[0]
            for s in range(1, GROUPS):
                key = keys[EACH * s] if thread % GROUPS == s else key
            # Their last bits tell equal ones apart.
            key = int32((key & -LANES) | lane)
            in_order[thread] = key
            found[thread] = NO_KEY
            cuda.syncthreads()
            rank = int32(0)
            for other in range(0, LANES, 2):
                here = (thread & -LANES) | other
                one = int32(1) if in_order[here] < key else int32(0)
                two = int32(1) if in_order[here | 1] < key else int32(0)
                rank = int32(rank + one + two)
            # Bad pixels come last.
            half = quotient(float32(LANES // 2) * float32(n), float32(p))
            if rank == max(int32(half - ASIDE), int32(0)):
                pivots[0, thread // LANES] = key // WARPS
            if rank == min(int32(half + ASIDE), int32(LANES - 1)):
                pivots[1, thread // LANES] = key // WARPS
            cuda.syncthreads()
            first = int32(0)
            second = int32(0)
            for other in range(WARPS):
                first = int32(first + pivots[0, other])
                second = int32(second + pivots[1, other])
            first = int32((first & -LANES) - 1)
            second = int32(second | (LANES - 1))

            # -- keys below `low`: `below`; keys up to `high`: `upto`; below ≤ k < upto ------------------------------
            low = int32(-INFINITY)
            high = INFINITY
            below = int32(0)
            upto = n
            tries = int32(0)
            while low < high and upto - below > FEW:
                if tries > 0:
                    step = quotient(float32(int64(high) - int64(low)), float32(upto - below))
                    at = float32(k - below) + float32(0.5)
                    first = _beside(low, high, step * (at - float32(FEW // 4)))
                    second = _beside(low, high, step * (at + float32(FEW // 4)))
                if tries >= TRIES:
                    first = int32((low >> int32(1)) + (high >> int32(1)) + (low & high & int32(1)))
                    second = first
                first = min(max(first, low), int32(high - 1))
                second = min(max(second, first), int32(high - 1))
                mine = int32(0)
                for s in range(KEYS):
                    one = int32(1) if keys[s] <= first else int32(0)
                    two = TWO_COUNTS if keys[s] <= second else int32(0)
                    mine = int32(mine + one + two)
                mine = _sum_of_block(mine, scratch)
                to_first = int32(mine & LOW_HALF)
                to_second = int32((mine >> int32(HALF_WORD)) & LOW_HALF)
                if to_first > k:
                    high = first
                    upto = to_first
                elif to_second > k:
                    low = int32(first + 1)
                    below = to_first
                    high = second
                    upto = to_second
                else:
                    low = int32(second + 1)
                    below = to_second
                tries = int32(tries + int32(1))

            # -- the keys that are left ------------------------------------------------------------------------------
            above = low
            if k + 1 >= upto:
                # The second of two middle ones lies above the range.
                above = NO_KEY
                for s in range(KEYS):
                    above = min(above, keys[s] if keys[s] > high else NO_KEY)
                above = least_of_block(above, scratch)
            in_order[thread] = NO_KEY
            if thread == 0:
                middle[0] = low
                middle[1] = above
                count[0] = 0
            cuda.syncthreads()
            if low < high:
                # A bit for each; few threads have any, and find these again in shared memory.
                bits = uint32(0)
                for s in range(KEYS):
                    of_thread[s, thread] = keys[s]
                    bits = uint32(bits | (uint32(1 << s) if low <= keys[s] <= high else uint32(0)))
                if bits != uint32(0):
                    place = cuda.atomic.add(count, 0, int32(cuda.popc(bits)))
                    while bits != uint32(0):
                        without = uint32(bits & uint32(bits - uint32(1)))
                        s = int32(cuda.popc(uint32(uint32(bits ^ without) - uint32(1))))
                        found[place & (FEW - 1)] = of_thread[s & (KEYS - 1), thread]
                        place = int32(place + int32(1))
                        bits = without
                cuda.syncthreads()
                size = int32(upto - below)
                if thread < size:
                    key = found[thread]
                    less = int32(0)
                    start = int32(0)
                    while start < size:
                        # What is beyond the last one is NO_KEY.
                        here = start & (FEW - 4)
                        for i in range(0, 4, 2):
                            one = int32(1) if found[here | i] < key else int32(0)
                            two = int32(1) if found[here | i | 1] < key else int32(0)
                            less = int32(less + one + two)
                        start = int32(start + int32(4))
                    # Equal keys write the same to the same place.
                    in_order[less & (THREADS - 1)] = key
                cuda.syncthreads()
                if thread == 0:
                    middle[0] = _key_of_rank(in_order, int32(k - below))
                    if k + 1 < upto:
                        middle[1] = _key_of_rank(in_order, int32(k + 1 - below))
    # At last, when no register holds a key any longer.
    signal = float64(0)
    if counted >= ABSURD:
        signal = _sum_of_block(_signal_in_memory(flux, marks, p, row), of_signal)
    if thread == 0:
        if counted < ABSURD:
            for part in range(THREADS // GROUP):
                signal += float64(parts[SIGNAL, part])
        _conclude(parts, signal, counted, p, row, log_level, energy, expected, snr_norm, n_good, flag)
        if with_median:
            snr_median[row] = NAN
            if n > 0:
                lower = float64(bits_float(ordered(middle[0])))
                upper = float64(bits_float(ordered(middle[1])))
                snr_median[row] = lower if n & 1 else lower + 0.5 * (upper - lower)
