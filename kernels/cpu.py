"""CPU kernels: BLAS where it is a matrix product, Numba where it is fusion.

Design: a row's numbers depend, to the last bit, on that row and its place in its file alone. Matrix products therefore
always have the same shape (`PROJECT_ROWS` rows, padded with zeros), and rows with bad pixels are first treated like
all others and then mended by a kernel of their own: a bad neighbour changes no instruction that a good row sees.
Kernels neither check nor allocate; `moefast.kernels` does both.

Threads: projection runs one block of rows per Python thread, Σxxᵀ one tile, with BLAS held to one thread each. A
parallel kernel that alternates with a parallel product costs twice as much: each library's threads wait actively for
the other's.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

__all__ = [
    "GRAM_ROWS",
    "GRAM_TILE",
    "PIXELS",
    "PROJECT_ROWS",
    "add_tile",
    "centre",
    "collect_rows",
    "find_places",
    "mend_rows",
    "multiply_tile",
    "perceptron",
    "soft_mix",
    "within",
]

PROJECT_ROWS = 512
"""Rows of one matrix product in `project`: centred flux and variance of a block stay in the last-level cache."""

PIXELS = 512
"""Pixels that are worth a thread in `collect_rows`; a thread's pixels are neighbours, which memory likes best."""

GRAM_ROWS = 4096
"""Rows of one float32 product in Σxxᵀ at most: the totals of a million rows are still exact to 1e-8."""

GRAM_TILE = 1152
"""Columns of one tile of Σxxᵀ. BLAS packs the rows of every tile anew: with 512 columns that costs a fifth of the time,
with 1152 a thirtieth, and the product, 5 MB, is still in the last cache when it is added to the totals."""

# NaN and infinity must keep their meaning, so "nnan" and "ninf" are left out.
_FAST = {"reassoc", "contract", "arcp", "nsz"}


@njit(nogil=True, cache=True)
def within(values, low, high):
    """Whether low < value < high for every one; NaN is not."""
    for i in range(values.shape[0]):
        beyond = np.int32(0)
        for j in range(values.shape[1]):
            # Bits instead of `and` keep the loop free of branches.
            beyond += np.int32(not ((values[i, j] > low) & (values[i, j] < high)))
        if beyond:
            return False
    return True


@njit(nogil=True, cache=True)
def find_places(group, first, waiting, capacity, place):
    """Give rows from `first` on a place at the end of their group's buffer, until one of the buffers is full.

    `waiting` (g,) counts the rows in each buffer, `place` (n,) becomes a row of all buffers, one behind the other.
    Returns the row after the last that has a place.
    """
    for i in range(first, group.shape[0]):
        k = group[i]
        place[i] = k * capacity + waiting[k]
        waiting[k] += 1
        if waiting[k] == capacity:
            return i + 1
    return group.shape[0]


@njit(nogil=True, cache=True)
def collect_rows(
    x, y, noise, squared, group, place, reference, floor, rows, sum_x, sum_xy, sum_v, first, stop
):
    """Put x − reference of pixels `first` to `stop` into `rows`, and add them, y times them and σ² to the totals.

    Totals are added to row by row in order: they do not depend on how rows come in blocks. `noise` is σ² or, if not
    `squared`, σ; it may have no rows. Flux below `floor` counts as `floor`.
    """
    centre = reference[first:stop]
    for i in range(x.shape[0]):
        flux, target, label = x[i, first:stop], rows[place[i], first:stop], y[i]
        total, cross = sum_x[group[i], first:stop], sum_xy[group[i], first:stop]
        # One loop over both sums and one over the noise: compilers find SIMD in these, not in a single one.
        for j in range(stop - first):
            value = max(flux[j], floor) - centre[j]
            target[j] = value
            wide = np.float64(value)
            total[j] += wide
            cross[j] += label * wide
        if noise.shape[0]:
            sigma, total = noise[i, first:stop], sum_v[group[i], first:stop]
            if squared:
                for j in range(stop - first):
                    total[j] += np.float64(sigma[j])
            else:
                for j in range(stop - first):
                    total[j] += np.float64(sigma[j] * sigma[j])


def multiply_tile(rows, i, j, product):
    """Product (T, T) of the columns of a tile whose upper left corner is (i, j): XᵢᵀXⱼ in float32."""
    a, b = rows[:, i : i + len(product)], rows[:, j : j + len(product)]
    # NumPy takes syrk for the tiles of the diagonal.
    return np.matmul(a.T, b, out=product[: a.shape[1], : b.shape[1]])


@njit(nogil=True, cache=True)
def add_tile(tile, i, j, p, packed):
    """Add a tile of a (p, p) matrix to its upper triangle, packed row by row."""
    for a in range(tile.shape[0]):
        row = i + a
        start = row * p - (row * (row - 1)) // 2 - row + j
        for b in range(max(0, row - j), tile.shape[1]):
            packed[start + b] += tile[a, b]


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
