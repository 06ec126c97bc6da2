"""Random numbers by counter: row i of seed s has its own stream, whatever else is drawn.

Philox4x32-10 (Salmon et al. 2011, SC '11): four 32-bit words are a pure function of a 64-bit key (the
seed) and a 128-bit counter (block within the stream, stream, row).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, prange, uint32, uint64

LABEL_STREAM = 0
NOISE_STREAM = 1


@njit(inline="always")
def _philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Any, Any, Any, Any]:
    """Ten rounds; all words are uint64 holding 32 bits (mixing widths would promote to float64)."""
    mask = uint64(0xFFFFFFFF)
    for _ in range(10):
        p0 = uint64(0xD2511F53) * c0
        p1 = uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            ((p1 >> uint64(32)) ^ c1 ^ k0) & mask,
            p1 & mask,
            ((p0 >> uint64(32)) ^ c3 ^ k1) & mask,
            p0 & mask,
        )
        k0 = (k0 + uint64(0x9E3779B9)) & mask
        k1 = (k1 + uint64(0xBB67AE85)) & mask
    return c0, c1, c2, c3


@njit(cache=True)
def philox_words(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Any, Any, Any, Any]:
    """The four words of one counter and key, for checks against published vectors."""
    words = _philox(uint64(c0), uint64(c1), uint64(c2), uint64(c3), uint64(k0), uint64(k1))
    return uint32(words[0]), uint32(words[1]), uint32(words[2]), uint32(words[3])


@njit(cache=True)
def _fill_uniforms(first: Any, seed: Any, stream: Any, out: np.ndarray) -> None:
    mask = uint64(0xFFFFFFFF)
    k0, k1 = uint64(seed) & mask, uint64(seed) >> uint64(32)
    for i in range(out.shape[0]):
        row = uint64(first + i)
        for block in range((out.shape[1] + 3) // 4):
            words = _philox(uint64(block), uint64(stream), row & mask, row >> uint64(32), k0, k1)
            for j in range(4):
                if 4 * block + j < out.shape[1]:
                    out[i, 4 * block + j] = (float(words[j]) + 0.5) * 2.3283064365386963e-10


def row_uniforms(first: int, stop: int, count: int, *, seed: int, stream: int = LABEL_STREAM) -> np.ndarray:
    """Uniform numbers in (0, 1), shape (stop - first, count), float64; row r depends on (seed, r) only."""
    out = np.empty((stop - first, count))
    _fill_uniforms(first, np.uint64(seed), np.uint64(stream), out)
    return out


@njit(cache=True, parallel=True)
def add_noise(first: Any, seed: Any, flux: np.ndarray, error: np.ndarray, noisy: np.ndarray) -> None:
    """Fill noisy = flux + error * normal, arrays of shape (n, p) float32; Box-Muller on Philox words."""
    mask = uint64(0xFFFFFFFF)
    k0, k1 = uint64(seed) & mask, uint64(seed) >> uint64(32)
    n_pixels = flux.shape[1]
    for i in prange(flux.shape[0]):
        row = uint64(first + i)
        for block in range((n_pixels + 3) // 4):
            words = _philox(uint64(block), uint64(1), row & mask, row >> uint64(32), k0, k1)
            for half in range(2):
                u1 = words[0] if half == 0 else words[2]
                u2 = words[1] if half == 0 else words[3]
                radius = math.sqrt(-2.0 * math.log((float(u1) + 0.5) * 2.3283064365386963e-10))
                angle = 6.283185307179586 * 2.3283064365386963e-10 * float(u2)
                pixel = 4 * block + 2 * half
                if pixel < n_pixels:
                    noisy[i, pixel] = flux[i, pixel] + error[i, pixel] * np.float32(radius * math.cos(angle))
                if pixel + 1 < n_pixels:
                    noisy[i, pixel + 1] = flux[i, pixel + 1] + error[i, pixel + 1] * np.float32(
                        radius * math.sin(angle)
                    )
