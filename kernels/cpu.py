"""CPU kernels: BLAS where it is a matrix product, Numba where it is fusion.

Design: a row's numbers depend, to the last bit, on that row and its place in its file alone. Matrix products therefore
always have the same shape (`PROJECT_ROWS` rows, padded with zeros), and rows with bad pixels are first treated like
all others and then mended by a kernel of their own: a bad neighbour changes no instruction that a good row sees.
Kernels neither check nor allocate; `moefast.kernels` does both.

Threads: projection runs one block of rows per Python thread, with BLAS held to one thread each. A parallel kernel that
alternates with a parallel product costs twice as much: each library's threads wait actively for the other's.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange
from scipy.linalg.blas import ssyrk

__all__ = [
    "PROJECT_ROWS",
    "add_normal_equations",
    "add_rows",
    "centre",
    "mend_rows",
    "perceptron",
    "soft_mix",
]

PROJECT_ROWS = 512
"""Rows of one matrix product in `project`: centred flux and variance of a block stay in the last-level cache."""

_PIXELS = 512
"""Pixels of one task of `add_rows`: its totals, 4 kB per group, stay in the nearest cache."""

# NaN and infinity must keep their meaning, so "nnan" and "ninf" are left out.
_FAST = {"reassoc", "contract", "arcp", "nsz"}


@njit(parallel=True, cache=True)
def _add_packed_upper(square, packed):
    p = square.shape[0]
    for i in prange(p):
        start = i * p - (i * (i - 1)) // 2
        for j in range(i, p):
            packed[start + j - i] += square[i, j]


@njit(parallel=True, cache=True)
def add_rows(values, group, totals):
    """Add each row to the total of its group, in order: the sums do not depend on how rows come in blocks."""
    n, p = values.shape
    for part in prange((p + _PIXELS - 1) // _PIXELS):
        start = part * _PIXELS
        stop = min(p, start + _PIXELS)
        for i in range(n):
            total = totals[group[i]]
            for j in range(start, stop):
                total[j] += values[i, j]


def add_normal_equations(x, y, order, offsets, sums, gram, square):
    """Add the rows of `x`, grouped by `order` and `offsets`, to the totals of their groups.

    The product of one group is float32 BLAS `syrk`, the totals are float64. SciPy's call leaves the other triangle
    alone; NumPy's aᵀa would fill it too, which for a few hundred rows takes as long as the product. `square` is
    scratch of shape (p, p).
    """
    n, sum_x, sum_y, sum_yy, sum_xy = sums
    for k in range(len(offsets) - 1):
        rows = order[offsets[k] : offsets[k + 1]]
        if rows.size == 0:
            continue
        xk = x[rows]
        yk = y[rows]
        n[k] += rows.size
        sum_x[k] += xk.sum(0, dtype=np.float64)
        sum_y[k] += yk.sum()
        sum_yy[k] += yk @ yk
        sum_xy[k] += yk.astype(np.float32) @ xk
        # Column-major lower is row-major upper.
        ssyrk(1.0, xk.T, lower=1, c=square.T, overwrite_c=1)
        _add_packed_upper(square, gram[k])


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def centre(flux, error, reference, inverse_shape, residual, x, v, log_level, energy, expected):
    """X = flux − reference and v = error², with each row's noise level, energy Σx²/D and its expectation."""
    n, p = flux.shape
    for i in range(n):
        level = np.float32(0.0)
        power = np.float32(0.0)
        noise = np.float32(0.0)
        for j in range(p):
            d = flux[i, j] - reference[j]
            s = error[i, j] * error[i, j]
            x[i, j] = d
            v[i, j] = s
            level += s * inverse_shape[j]
            power += d * d * inverse_shape[j]
            noise += s * residual[j]
        log_level[i] = 0.5 * math.log(level / p)
        energy[i] = power
        expected[i] = noise


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def mend_rows(
    rows,
    good,
    flux,
    error,
    reference,
    inverse_shape,
    residual,
    x,
    v,
    log_level,
    energy,
    expected,
):
    """The same as `centre` for the given rows, with zero weight for their bad pixels."""
    p = flux.shape[1]
    for r in range(rows.size):
        i = rows[r]
        level = 0.0
        power = 0.0
        noise = 0.0
        n_good = 0
        for j in range(p):
            if good[i, j]:
                d = flux[i, j] - reference[j]
                s = error[i, j] * error[i, j]
                x[i, j] = d
                v[i, j] = s
                n_good += 1
                level += s * inverse_shape[j]
                power += d * d * inverse_shape[j]
                noise += s * residual[j]
            else:
                x[i, j] = 0.0
                v[i, j] = 0.0
        log_level[i] = 0.5 * math.log(level / n_good) if level > 0.0 else 0.0
        energy[i] = power
        expected[i] = noise


@njit(inline="always")
def _layers(features, i, w1, b1, w2, out):
    """Add tanh(f W₁ + b₁) W₂ of row i to `out`."""
    for h in range(w2.shape[0]):
        total = b1[h]
        for f in range(features.shape[1]):
            total += features[i, f] * w1[f, h]
        active = np.float32(math.tanh(total))
        for k in range(w2.shape[1]):
            out[k] += active * w2[h, k]


@njit(parallel=True, cache=True)
def perceptron(features, w1, b1, w2, b2, out):
    """tanh(f W₁ + b₁) W₂ + b₂; one row at a time."""
    for i in prange(features.shape[0]):
        out[i] = b2
        _layers(features, i, w1, b1, w2, out[i])


@njit(parallel=True, cache=True)
def soft_mix(features, values, w1, b1, w2, b2, gate, mixed):
    """softmax(tanh(f W₁ + b₁) W₂ + b₂), and the mixture of `values` it gives; one row at a time."""
    for i in prange(features.shape[0]):
        row = gate[i]
        row[:] = b2
        _layers(features, i, w1, b1, w2, row)
        top = row.max()
        norm = np.float32(0.0)
        for k in range(row.size):
            row[k] = np.float32(math.exp(row[k] - top))
            norm += row[k]
        total = np.float32(0.0)
        for k in range(row.size):
            row[k] /= norm
            total += row[k] * values[i, k]
        mixed[i] = total
