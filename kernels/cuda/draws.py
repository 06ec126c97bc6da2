"""Normal numbers by counter on the device, and rows made ready to be multiplied: noise, clipping, centring, SNR.

Contract: `moefast.core.random.standard_normals`. The words of Philox4x32-10 are integers and the same to the last bit.
The transform of Box and Muller is that of the CPU, term by term, in float32; compilers differ in where they fuse a
multiplication and an addition, so that a number is off the CPU's by 10⁻⁶, or 10⁻⁶ of itself, at most: some units of its
last place.

Floor: a row of 4096 pixels is 32 kB of flux and error that are read and 16 kB that are written, 32 kB where two fits
see it: 64 kB, 0.02 µs at 3.3 TB/s. A pixel of noise takes 5 wide multiplications and some 45 other instructions, 0.2 M
a row: 0.01 µs on 132 multiprocessors. Drawn on the host, it would take 0.3 µs on the bus, and 6 µs of a core.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda, float32, float64, int32, uint32, uint64

from moefast.core.random import COUNTERS_PER_TILE
from moefast.kernels.cuda.lanes import SCRATCH, bits_float, float_bits, sum_of_block
from moefast.kernels.cuda.registry import kernel

__all__ = ["THREADS", "normal_pair", "philox", "prepare_rows", "row_snr"]

THREADS = 128
"""Threads of a block, which share a row."""
WORD = 0xFFFFFFFF
"""The bits of a word."""
ROUNDS = 10
FIRST_FACTOR, SECOND_FACTOR = 0xD2511F53, 0xCD9E8D57
FIRST_STEP, SECOND_STEP = 0x9E3779B9, 0xBB67AE85
"""Factors of a round, and what is added to the key from one round to the next."""
TILE = 4 * COUNTERS_PER_TILE
LN_2 = np.float32(math.log(2.0))
"""Written in the function, the compiler would have every thread find it, in double precision."""
LARGEST = 1e15
"""Flux and errors from here on have squares that overflow float32 sums."""


@cuda.jit(device=True)
def philox(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """The four words of a counter and a key, all uint32."""
    for _ in range(ROUNDS):
        first = uint64(c0) * uint64(FIRST_FACTOR)
        second = uint64(c2) * uint64(SECOND_FACTOR)
        c0 = uint32(uint32(second >> uint64(32)) ^ c1 ^ k0)
        c1 = uint32(second & uint64(WORD))
        c2 = uint32(uint32(first >> uint64(32)) ^ c3 ^ k1)
        c3 = uint32(first & uint64(WORD))
        k0 = uint32((uint64(k0) + uint64(FIRST_STEP)) & uint64(WORD))
        k1 = uint32((uint64(k1) + uint64(SECOND_STEP)) & uint64(WORD))
    return c0, c1, c2, c3


@cuda.jit(device=True)
def normal_pair(length, turn):  # type: ignore[no-untyped-def]
    """Two independent standard normal numbers, float32, of two words; see `moefast.core.random`."""
    # -- the radius, √(−2 ln u) --------------------------------------------------------------------------------
    bits = float_bits(float32(length) + float32(0.5))
    shifted = int32(bits + int32(0x3F800000 - 0x3F3504F3))
    exponent = int32(int32(shifted >> int32(23)) - int32(127 + 32))
    mantissa = bits_float(int32(int32(shifted & int32(0x007FFFFF)) + int32(0x3F3504F3)))
    s = (mantissa - float32(1.0)) / (mantissa + float32(1.0))
    z = s * s
    series = ((float32(2.0 / 9.0) * z + float32(2.0 / 7.0)) * z + float32(2.0 / 5.0)) * z + float32(2.0 / 3.0)
    logarithm = float32(exponent) * LN_2 + (s * z * series + float32(2.0) * s)
    radius = float32(math.sqrt(float32(-2.0) * min(logarithm, float32(0.0))))
    # -- the angle: two bits are a quarter turn, the others an angle in −π/4 … π/4 -----------------------------
    quarter = int32(turn >> uint32(30))
    rest = int32(int32(turn & uint32(0x3FFFFFFF)) - int32(0x20000000))
    x = float32(rest) * float32(0.5 * math.pi / 2.0**30)
    z = x * x
    sine = ((float32(-1.0 / 5040.0) * z + float32(1.0 / 120.0)) * z - float32(1.0 / 6.0)) * z * x + x
    cosine = (
        ((float32(1.0 / 40320.0) * z - float32(1.0 / 720.0)) * z + float32(1.0 / 24.0)) * z - float32(0.5)
    ) * z + float32(1.0)
    one = cosine
    other = sine
    if (quarter & 1) != 0:
        one = sine
        other = cosine
    if ((quarter + 1) & 2) != 0:
        one = -one
    if quarter >= 2:
        other = -other
    return radius * one, radius * other


@kernel(
    "void(float32[:,::1], float32[:,::1], int64[::1], float32[::1], uint64, uint32, boolean, boolean, float32, float32,"
    " float32[:,::1], float32[:,::1], boolean, int32[::1])",
    threads=THREADS,
    serves=("normal_equations",),
)
def prepare_rows(  # type: ignore[no-untyped-def]
    flux, error, rows, reference, seed, stream, drawn, other_drawn, floor, other_floor, out, other, twice, bad
):
    """max(flux + σ ε, floor) − reference, with noise or without, for one fit and maybe for another.

    Parameters
    ----------
    rows : array of shape (n,)
        Number of each row in its set, by which its noise is drawn, from `stream` of `seed`.
    drawn, other_drawn : bool
        Whether noise is added.
    floor, other_floor : float
        Less is counted as this; −∞ leaves all as it is.
    out : array of shape (n, p)
        May be `flux` itself.
    other : array of shape (n, p)
        Left as it is unless `twice`.
    bad : array of shape (1,)
        Set to 1 if there is a value that is not finite, or beyond LARGEST.

    Launch: n blocks of THREADS threads. A thread makes the four normal numbers of a counter at a time, for pixels that
    are COUNTERS_PER_TILE apart, as on the CPU, so that neighbours in a warp are neighbours in memory.
    """
    row = cuda.blockIdx.x
    p = flux.shape[1]
    number = uint64(rows[row])
    low = uint32(number & uint64(WORD))
    high = uint32(number >> uint64(32))
    k0 = uint32(seed & uint64(WORD))
    k1 = uint32(seed >> uint64(32))
    noisy = drawn or other_drawn
    counters = (p + TILE - 1) // TILE * COUNTERS_PER_TILE
    for counter in range(cuda.threadIdx.x, counters, cuda.blockDim.x):
        first = float32(0)
        second = float32(0)
        third = float32(0)
        fourth = float32(0)
        if noisy:
            a, b, c, d = philox(uint32(counter), stream, low, high, k0, k1)
            first, second = normal_pair(a, b)
            third, fourth = normal_pair(c, d)
        # Four tiles' lengths of counters before this one's tile, and its place in the tile.
        pixel = counter + 3 * (counter & -COUNTERS_PER_TILE)
        for word in range(4):
            normal = first
            if word == 1:
                normal = second
            if word == 2:
                normal = third
            if word == 3:
                normal = fourth
            if pixel < p:
                value = flux[row, pixel]
                sigma = error[row, pixel]
                # Not true of NaN.
                if not (abs(value) < float32(LARGEST) and abs(sigma) < float32(LARGEST)):
                    bad[0] = int32(1)
                with_noise = value + sigma * normal
                mine = with_noise if drawn else value
                out[row, pixel] = max(mine, floor) - reference[pixel]
                if twice:
                    theirs = with_noise if other_drawn else value
                    other[row, pixel] = max(theirs, other_floor) - reference[pixel]
            pixel += COUNTERS_PER_TILE


@kernel(
    "void(float32[:,::1], float32[:,::1], float64, float64[::1])",
    threads=THREADS,
    serves=("normal_equations",),
)
def row_snr(flux, error, added, snr):  # type: ignore[no-untyped-def]
    """‖flux‖/‖σ‖ over good pixels, those with σ > 0, of each row; 0 where there is none.

    `added` is what noise that the flux does not hold adds to the square: 1, or 0 if it holds it.

    Launch: n blocks of THREADS threads.
    """
    scratch = cuda.shared.array(SCRATCH, float64)
    row = cuda.blockIdx.x
    signal = float64(0)
    noise = float64(0)
    for pixel in range(cuda.threadIdx.x, flux.shape[1], cuda.blockDim.x):
        sigma = float64(error[row, pixel])
        value = float64(flux[row, pixel])
        noise += sigma * sigma
        if sigma > float64(0):
            signal += value * value
    signal = sum_of_block(signal, scratch)
    noise = sum_of_block(noise, scratch)
    if cuda.threadIdx.x == 0:
        ratio = float64(0)
        if noise > float64(0):
            ratio = signal / noise
        snr[row] = math.sqrt(ratio + added)
