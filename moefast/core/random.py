"""Random numbers that belong to a row, not to a block.

Design: one generator for all of moefast. Philox4x32-10 turns a key (the seed) and a counter (place in the row, stream,
row) into four 32-bit words; nothing else enters, so a row gets the same numbers whatever the block, shard or thread.
Streams keep labels, nuisances and noise apart. Normal numbers are made of the words by Box and Muller's transform in
float32, 64 counters at a time so that compilers find SIMD: per pixel 2.5 multiplications of 32 bits to 64, a quarter of
a logarithm and of a square root, half a sine and cosine.

Sources: Salmon et al. 2011 (SC '11); Box & Muller 1958 (Ann. Math. Stat. 29, 610).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import float32, int32, uint32, uint64
from numpy.typing import NDArray

from moefast.core.compiled import njit
from moefast.core.threads import in_threads

__all__ = [
    "DRAW_STREAM",
    "LABEL_STREAM",
    "NOISE_SEED",
    "NOISE_STREAM",
    "add_noise",
    "fold_of_rows",
    "philox_words",
    "row_uniforms",
    "standard_normals",
    "uniforms_of_rows",
]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

LABEL_STREAM = 0
NOISE_STREAM = 1
"""Noise that is stored with simulated spectra. Streams 2 to 15 are left to the simulator's nuisances."""
DRAW_STREAM = 16
"""Noise that is drawn when spectra are used. With the seed of a file it is still independent of what the file holds."""
NOISE_SEED = 20250102
"""Seed of the noise that is drawn on test spectra without any, so that all models meet the same noisy stars."""

COUNTERS_PER_TILE = 64
"""Word w of counter c of a tile becomes pixel 256 tile + 64 w + c."""
_TILE = 4 * COUNTERS_PER_TILE


# --- words -------------------------------------------------------------------------------------------------


@njit(inline="always")
def _round(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Any, Any, Any, Any]:
    """One round; words are uint64 holding 32 bits (mixing widths would promote to float64)."""
    mask = uint64(0xFFFFFFFF)
    p0 = uint64(0xD2511F53) * (c0 & mask)
    p1 = uint64(0xCD9E8D57) * (c2 & mask)
    return (p1 >> uint64(32)) ^ c1 ^ k0, p1 & mask, (p0 >> uint64(32)) ^ c3 ^ k1, p0 & mask


@njit(inline="always")
def _philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Any, Any, Any, Any]:
    """Ten rounds, written out: a loop would keep the loop over counters from becoming SIMD."""
    mask, w0, w1 = uint64(0xFFFFFFFF), uint64(0x9E3779B9), uint64(0xBB67AE85)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + w0) & mask, (k1 + w1) & mask
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + w0) & mask, (k1 + w1) & mask
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + w0) & mask, (k1 + w1) & mask
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + w0) & mask, (k1 + w1) & mask
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + w0) & mask, (k1 + w1) & mask
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + w0) & mask, (k1 + w1) & mask
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + w0) & mask, (k1 + w1) & mask
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + w0) & mask, (k1 + w1) & mask
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + w0) & mask, (k1 + w1) & mask
    return _round(c0, c1, c2, c3, k0, k1)


@njit(cache=True)
def philox_words(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Any, Any, Any, Any]:
    """The four words of one counter and key, for checks against published vectors."""
    words = _philox(uint64(c0), uint64(c1), uint64(c2), uint64(c3), uint64(k0), uint64(k1))
    return uint32(words[0]), uint32(words[1]), uint32(words[2]), uint32(words[3])


# --- uniform numbers ---------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def _fill_uniforms(rows: np.ndarray, seed: Any, stream: Any, out: np.ndarray) -> None:
    mask = uint64(0xFFFFFFFF)
    k0, k1 = uint64(seed) & mask, uint64(seed) >> uint64(32)
    for i in range(out.shape[0]):
        row = uint64(rows[i])
        for block in range((out.shape[1] + 3) // 4):
            words = _philox(uint64(block), uint64(stream), row & mask, row >> uint64(32), k0, k1)
            for j in range(4):
                if 4 * block + j < out.shape[1]:
                    out[i, 4 * block + j] = (float(words[j]) + 0.5) * 2.3283064365386963e-10


def row_uniforms(first: int, stop: int, count: int, *, seed: int, stream: int = LABEL_STREAM) -> F64:
    """Uniform numbers in (0, 1), shape (stop - first, count), float64; row r depends on (seed, stream, r) only."""
    return uniforms_of_rows(np.arange(first, stop), count, seed=seed, stream=stream)


def uniforms_of_rows(rows: NDArray[np.integer], count: int, *, seed: int, stream: int = LABEL_STREAM) -> F64:
    """Uniform numbers in (0, 1) of shape (len(rows), count), float64; they are those of `row_uniforms`.

    Parameters
    ----------
    rows : array of shape (n,), integer ≥ 0
        Index of each row in its set.
    count : int
    seed : int
        0 ≤ seed < 2⁶⁴.
    stream : int
        Numbers of different streams are independent.

    Raises
    ------
    ValueError
        The seed or a row is out of range.
    """
    rows = _check(seed, rows)
    out = np.empty((len(rows), count))
    key, number = np.uint64(seed), np.uint64(stream)
    in_threads(len(rows), lambda a, b: _fill_uniforms(rows[a:b], key, number, out[a:b]))
    return out


# --- normal numbers ----------------------------------------------------------------------------------------


@njit(inline="always")
def _radius(word: Any) -> Any:
    """Square root of -2 ln u with u = (word + 1/2) / 2^32, in float32.

    The logarithm is that of the mantissa in sqrt(1/2) … sqrt(2) by its series in (m - 1) / (m + 1).
    """
    bits = np.float32(float32(word) + float32(0.5)).view(np.int32)
    # Adding the bits of 1 / sqrt(2) carries mantissas above sqrt(2) into the exponent. Numba adds int32 as int64.
    shifted = int32(bits + int32(0x3F800000 - 0x3F3504F3))
    exponent = int32(int32(shifted >> int32(23)) - int32(127 + 32))
    mantissa = np.int32(int32(shifted & int32(0x007FFFFF)) + int32(0x3F3504F3)).view(np.float32)
    s = (mantissa - float32(1.0)) / (mantissa + float32(1.0))
    z = s * s
    series = ((float32(2.0 / 9.0) * z + float32(2.0 / 7.0)) * z + float32(2.0 / 5.0)) * z + float32(2.0 / 3.0)
    logarithm = float32(exponent) * float32(math.log(2.0)) + (s * z * series + float32(2.0) * s)
    return math.sqrt(float32(-2.0) * min(logarithm, float32(0.0)))


@njit(cache=True, nogil=True, fastmath={"contract", "nsz"}, error_model="numpy")
def _fill_normals(
    row: Any, k0: Any, k1: Any, stream: Any, tile: Any, words: np.ndarray, out: np.ndarray
) -> None:
    """Fill out (256,) float32 with the normals of one tile of a row; `words` (4, 64) uint32 is scratch."""
    mask = uint64(0xFFFFFFFF)
    low, high = row & mask, row >> uint64(32)
    w0, w1, w2, w3 = words[0], words[1], words[2], words[3]
    start = uint64(tile * COUNTERS_PER_TILE)
    for c in range(COUNTERS_PER_TILE):
        a, b, d, e = _philox(start + uint64(c), stream, low, high, k0, k1)
        w0[c], w1[c], w2[c], w3[c] = uint32(a), uint32(b), uint32(d), uint32(e)
    for pair in range(2):
        length, turn = words[2 * pair], words[2 * pair + 1]
        first = out[2 * pair * COUNTERS_PER_TILE : (2 * pair + 1) * COUNTERS_PER_TILE]
        second = out[(2 * pair + 1) * COUNTERS_PER_TILE : (2 * pair + 2) * COUNTERS_PER_TILE]
        for c in range(COUNTERS_PER_TILE):
            radius = _radius(length[c])
            # The upper two bits are a quarter turn, the others an angle in -pi/4 … pi/4.
            quarter = int32(turn[c] >> uint32(30))
            rest = int32(int32(turn[c] & uint32(0x3FFFFFFF)) - int32(0x20000000))
            x = float32(rest) * float32(0.5 * math.pi / 2.0**30)
            z = x * x
            sine = ((float32(-1.0 / 5040.0) * z + float32(1.0 / 120.0)) * z - float32(1.0 / 6.0)) * z * x + x
            cosine = (
                ((float32(1.0 / 40320.0) * z - float32(1.0 / 720.0)) * z + float32(1.0 / 24.0)) * z
                - float32(0.5)
            ) * z + float32(1.0)
            odd = (quarter & int32(1)) != 0
            one, other = (sine, cosine) if odd else (cosine, sine)
            first[c] = -radius * one if (quarter + 1) & 2 else radius * one
            second[c] = -radius * other if quarter >= 2 else radius * other


@njit(cache=True, nogil=True)
def _normals(rows: np.ndarray, seed: Any, stream: Any, out: np.ndarray) -> None:
    mask = uint64(0xFFFFFFFF)
    k0, k1 = uint64(seed) & mask, uint64(seed) >> uint64(32)
    words, tile = np.empty((4, COUNTERS_PER_TILE), np.uint32), np.empty(_TILE, np.float32)
    n_pixels = out.shape[1]
    for i in range(out.shape[0]):
        for t in range((n_pixels + _TILE - 1) // _TILE):
            _fill_normals(uint64(rows[i]), k0, k1, uint64(stream), t, words, tile)
            target = out[i, t * _TILE : (t + 1) * _TILE]
            target[:] = tile[: len(target)]


@njit(cache=True, nogil=True, fastmath={"contract"})
def _add_normals(
    rows: np.ndarray, seed: Any, stream: Any, flux: np.ndarray, error: np.ndarray, out: np.ndarray
) -> None:
    mask = uint64(0xFFFFFFFF)
    k0, k1 = uint64(seed) & mask, uint64(seed) >> uint64(32)
    words, tile = np.empty((4, COUNTERS_PER_TILE), np.uint32), np.empty(_TILE, np.float32)
    n_pixels = out.shape[1]
    for i in range(out.shape[0]):
        for t in range((n_pixels + _TILE - 1) // _TILE):
            _fill_normals(uint64(rows[i]), k0, k1, uint64(stream), t, words, tile)
            here = slice(t * _TILE, (t + 1) * _TILE)
            f, e, target = flux[i, here], error[i, here], out[i, here]
            for j in range(len(target)):
                target[j] = f[j] + e[j] * tile[j]


def standard_normals(
    seed: int, rows: NDArray[np.integer], n_pixels: int, *, stream: int = DRAW_STREAM
) -> F32:
    """Standard normal numbers of shape (len(rows), n_pixels), float32, one independent sequence per row.

    Pixel j of a row is the same for any number of pixels.

    Parameters
    ----------
    seed : int
        0 ≤ seed < 2⁶⁴.
    rows : array of shape (n,), integer ≥ 0
        Index of each row in its set.
    n_pixels : int
    stream : int
        Numbers of different streams are independent.

    Raises
    ------
    ValueError
        The seed or a row is out of range.
    """
    rows = _check(seed, rows)
    out = np.empty((len(rows), n_pixels), np.float32)
    in_threads(len(rows), lambda a, b: _normals(rows[a:b], np.uint64(seed), np.uint64(stream), out[a:b]))
    return out


def add_noise(
    flux: F32,
    error: F32,
    seed: int,
    rows: NDArray[np.integer],
    *,
    stream: int = DRAW_STREAM,
    out: F32 | None = None,
) -> F32:
    """Noisy spectra flux + error · ε, with ε of `standard_normals`: one pass over the arrays instead of three.

    Parameters
    ----------
    flux, error : array of shape (n, p), float32
    seed, rows, stream
        See `standard_normals`.
    out : array of shape (n, p), float32, optional
        May be `flux` itself.

    Raises
    ------
    ValueError
        Shapes do not fit, or the seed or a row is out of range.
    """
    rows = _check(seed, rows)
    if flux.ndim != 2 or len(flux) != len(rows) or error.shape != flux.shape:
        raise ValueError(
            f"flux and error: expected shape ({len(rows)}, p), found {flux.shape}, {error.shape}"
        )
    out = _output(out, flux.shape)
    flux, error = np.ascontiguousarray(flux, np.float32), np.ascontiguousarray(error, np.float32)
    key, number = np.uint64(seed), np.uint64(stream)
    in_threads(len(rows), lambda a, b: _add_normals(rows[a:b], key, number, flux[a:b], error[a:b], out[a:b]))
    return out


def _check(seed: int, rows: NDArray[np.integer]) -> NDArray[np.int64]:
    if not 0 <= seed < 2**64 or (len(rows) and rows.min() < 0):
        raise ValueError(f"a seed in 0 … 2⁶⁴ − 1 and rows from 0 on are needed; found seed {seed}")
    return np.ascontiguousarray(rows, np.int64)


def _output(out: F32 | None, shape: tuple[int, ...]) -> F32:
    if out is None:
        return np.empty(shape, np.float32)
    if out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError(
            f"out: expected C-contiguous float32 of shape {shape}, found {out.dtype} {out.shape}"
        )
    return out


# --- folds -------------------------------------------------------------------------------------------------


def fold_of_rows(rows: NDArray[np.integer], n_folds: int, seed: int = 0) -> NDArray[np.int64]:
    """Fold 0 … n_folds−1 of each row, by a hash of its index: independent of blocks, shards and order.

    Source: the finaliser of SplitMix64, Steele, Lea & Flood 2014 (OOPSLA).
    """
    mixed = np.asarray(rows, np.uint64) + np.uint64(0x9E3779B97F4A7C15 * (seed + 1) % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return (mixed % np.uint64(n_folds)).astype(np.int64)
