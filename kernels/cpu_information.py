"""Loops from flux and error to a star's information (u, M), and its dense algebra; see `moefast.kernels.clouds`.

Design: one look at the row for its scale, a second one for y and the cells; then u and M of `ROWS` stars by
`moefast.kernels.vectors.add_tile`, which sums in one fixed order whatever stands in the other rows: a star's bits do
not depend on its neighbours.

Precision: sums over pixels, u, M and all that is solved with M are in double precision. In single precision M has
negative eigenvalues wherever gaps make it singular.
"""

from __future__ import annotations

import math

import numpy as np

from moefast.core.compiled import njit
from moefast.kernels.cpu import FAST
from moefast.kernels.quality import LARGEST32, LARGEST_ERROR32, ZERO32, median_near, quantile_scratch
from moefast.kernels.vectors import ROWS as STEP
from moefast.kernels.vectors import VECTORS, add_tile, subtract_row, width_of

__all__ = [
    "CHUNK",
    "GROUP",
    "LANES",
    "ROWS",
    "SPECTRUM",
    "STEP",
    "TINY",
    "multiply_cells",
    "multiply_pixels",
    "read_pixels",
    "refine",
    "solve",
    "substitute",
    "unpack",
]

GROUP = width_of(64)
"""Numbers in double precision that are handled together; rows of matrices are filled up to whole groups."""
LANES = VECTORS * GROUP
"""Columns of u and of packed M that lie side by side."""
ROWS = 32
"""Stars whose pixels are read before their products are formed: y and the cells of all stay in the second cache."""
SPECTRUM = VECTORS * width_of(32)
"""Pixels of a spectrum that lie side by side."""
CHUNK = 512
"""Pixels whose directions stay in the second cache while all stars of a block pass over them."""
TINY = 1e-30
LEAST_CURVATURE = 1e-8
"""Added to M where the best point of the whole space is asked for, as in `moefast.posterior.forward`."""
LEAST_INFORMATION = 1e-13
"""Added to M before its root is taken: what a star does not see at all must not become negative by rounding."""
ROUNDING = 1e-14
"""Of a diagonal, what its pivot is not known to: n units of the last place."""
# A sum has one order only, but a product and a sum may become one instruction.
EXACT = {"contract"}


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _first_look(flux, error, mask, masked, reference, noise_shape, weight, ratio):
    """Weights 1/σ², flux/error, and all sums of a row that do not need its scale; bad pixels weigh nothing."""
    curvature, overlap, level = 0.0, 0.0, 0.0
    signal, noise, light, dark = 0.0, 0.0, 0.0, 0.0
    n_good, n_sound, n_wrong = np.int32(0), np.int32(0), np.int32(0)
    for j in range(flux.size):
        f, e = flux[j], error[j]
        shown = not mask[j] if masked else True
        # A comparison with NaN is false. Bits instead of `and` keep the loop free of branches.
        finite = (abs(f) <= LARGEST32) & shown
        sound = (e > ZERO32) & (e <= LARGEST_ERROR32)
        good = finite & sound
        one_sigma = np.float64(e)
        used = good & (one_sigma >= TINY)
        x = np.float64(f) if good else 0.0
        s = one_sigma if good else 0.0
        r = np.float64(reference[j])
        variance = s * s
        w = 1.0 / (one_sigma * one_sigma) if used else 0.0
        weight[j] = w
        curvature += w * r * r
        overlap += w * r * x
        level += variance / np.float64(noise_shape[j]) if used else 0.0
        signal += x * x
        noise += variance
        light += x
        dark += s
        ratio[j] = f / e if good else np.float32(np.inf)
        n_good = np.int32(n_good + np.int32(used))
        n_sound = np.int32(n_sound + np.int32(good))
        n_wrong = np.int32(n_wrong + np.int32(finite & (not sound)))
    return curvature, overlap, level, signal, noise, light, dark, n_good, n_sound, n_wrong


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _second_look(flux, reference, noise_shape, scale, cell, weight, y, information):
    """Fill y, a′, and a′D/cell in place of the weights; return the energy Σ a (x − c₀ r)²."""
    energy = 0.0
    share = scale * scale / cell
    for j in range(flux.size):
        w = weight[j]
        apart = (np.float64(flux[j]) if w > 0.0 else 0.0) - scale * np.float64(reference[j])
        weighed = w * apart
        energy += weighed * apart
        y[j] = np.float32(scale * weighed)
        information[j] = np.float32(scale * w * scale)
        weight[j] = w * np.float64(noise_shape[j]) * share
    return energy


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _add_cells(weight, cell, cells):
    """Sums of `weight` over cells; `weight` is scratch afterwards."""
    n = weight.size
    if cell == 8:
        # In pairs, pairs of pairs, …, in place: each loop becomes SIMD, one over eight neighbours would not.
        while n > 2 * (weight.size // 8):
            n //= 2
            for g in range(n):
                weight[g] = weight[2 * g] + weight[2 * g + 1]
        for g in range(n // 2):
            cells[g] = weight[2 * g] + weight[2 * g + 1]
    else:
        for g in range(n // cell):
            total = 0.0
            for j in range(g * cell, (g + 1) * cell):
                total += weight[j]
            cells[g] = total


@njit(nogil=True, cache=True)
def _keep_finite(ratio):
    """Move what is not infinite to the front; return how many."""
    m = 0
    for j in range(ratio.size):
        value = ratio[j]
        ratio[m] = value
        # No branch: in a spectrum with bad pixels here and there it would be foretold wrongly.
        m += int(value < np.float32(np.inf))
    return m


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def read_pixels(
    flux, error, mask, reference, noise_shape, cell,
    y, information, cells, numbers, snr_norm, snr_median, n_good, flag,
):  # fmt: skip
    """Row by row: y and a′ (n, p), means of a′D over cells (n, p / cell), and `numbers` of the row.

    `numbers` (n, 5): scale c₀, strength, energy, Σ σ²/D, number of good pixels. SNRs and flags as in
    `moefast.spectra.quality.assess`.
    """
    n, p = flux.shape
    masked = mask.shape[0] > 0
    weight, ratio = np.empty(p), np.empty(p + 1, np.float32)
    keys, scratch = np.empty(p + 2, np.int32), quantile_scratch()
    # Median of flux/error over mean flux by mean error differs by a per cent between stars: it tells where to look.
    usual = np.float32(1.0)
    for i in range(n):
        shown = mask[i] if masked else mask.reshape(-1)
        curvature, overlap, level, signal, noise, light, dark, n_used, n_sound, n_wrong = _first_look(
            flux[i], error[i], shown, masked, reference, noise_shape, weight, ratio
        )
        curvature += TINY
        error_of_scale = math.sqrt(curvature)
        scale = (error_of_scale + max(overlap - error_of_scale, 0.0)) / curvature
        numbers[i, 0], numbers[i, 1] = scale, overlap / error_of_scale
        numbers[i, 2] = _second_look(
            flux[i], reference, noise_shape, scale, cell, weight, y[i], information[i]
        )
        numbers[i, 3], numbers[i, 4] = level, n_used
        _add_cells(weight, cell, cells[i])
        n_good[i] = n_sound
        flag[i] = np.uint32(4 * (n_wrong > 0) + 2 * (2 * n_sound < p) + (n_sound == 0))
        snr_norm[i], snr_median[i] = np.nan, np.nan
        if n_sound == 0:
            continue
        snr_norm[i] = math.sqrt(signal / noise)
        m = p
        if n_sound < p:
            m = _keep_finite(ratio[:p])
            # An infinite flux/error of a good pixel, 1e38 over 1e-38, went with the bad ones.
            ratio[m:n_sound] = np.float32(np.inf)
            m = n_sound
        ratio_of_means = np.float32(light / dark)
        median = np.float32(median_near(ratio, m, usual * ratio_of_means, keys, scratch))
        snr_median[i] = median
        if ratio_of_means > ZERO32 and median > ZERO32:
            usual += np.float32(0.1) * (median / ratio_of_means - usual)


@njit(nogil=True, cache=True, error_model="numpy")
def multiply_pixels(y, rows, directions, u):
    """U = y · directions of the first rows: y (·, p), directions (blocks, p, `LANES`), u (blocks, ·, `LANES`)."""
    blocks, p, _ = directions.shape
    u[:] = 0.0
    for block in range(blocks):
        for c in range(0, p, CHUNK):
            for r in range(0, rows, STEP):
                start, place = (block * p + c) * LANES, (block * u.shape[1] + r) * LANES
                add_tile(y, r * y.shape[1] + c, y.shape[1], directions, start, min(CHUNK, p - c), u, place)


@njit(nogil=True, cache=True, error_model="numpy")
def multiply_cells(cells, rows, products, packed):
    """Packed M of the first rows: cells (·, g), products (blocks, g, `LANES`), packed (blocks, ·, `LANES`)."""
    blocks, g, _ = products.shape
    packed[:] = 0.0
    for block in range(blocks):
        for c in range(0, g, CHUNK):
            for r in range(0, rows, STEP):
                start, place = (block * g + c) * LANES, (block * packed.shape[1] + r) * LANES
                add_tile(cells, r * g + c, g, products, start, min(CHUNK, g - c), packed, place)


@njit(nogil=True, cache=True, fastmath=EXACT, error_model="numpy")
def factor(a, start, stop, n, ridge):
    """Rows `start` to `stop` of U, with UᵀU = a + ridge, in place; rows up to n become what they do not explain.

    Only columns from the diagonal on are read and right; columns from n on go along. Pivots below the ridge, and below
    what rounding leaves of the diagonal, are rounding.
    """
    stride = a.shape[1]
    diagonal = np.empty(n)
    for k in range(start, stop):
        diagonal[k] = a[k, k]
    for k in range(start, stop):
        row = a[k]
        least = ridge + ROUNDING * diagonal[k] + TINY
        root = math.sqrt(max(row[k] + least, least))
        inverse = 1.0 / root
        for j in range(k, stride):
            row[j] *= inverse
        row[k] = root
        for i in range(k + 1, n):
            begin = i // GROUP * GROUP
            subtract_row(a, i * stride + begin, a, k * stride + begin, row[i], (stride - begin) // GROUP)


@njit(nogil=True, cache=True, fastmath=EXACT, error_model="numpy")
def shrink(a, columns, t, n):
    """U ← T⁻¹U in place, with T upper triangular and TTᵀ = I + UUᵀ; columns from n on go along.

    Then UᵀU is (I + M)⁻¹M of what was M = UᵀU: nothing is subtracted from 1, and small information keeps its digits.
    `columns` and `t` (n, ·) are scratch.
    """
    stride, wide = a.shape[1], t.shape[1]
    for k in range(n):
        for j in range(n):
            columns[k, j] = a[j, k] if j <= k else 0.0
            t[k, j] = 0.0
        t[k, k] = 1.0
    for k in range(n):
        for i in range(k + 1):
            subtract_row(t, i * wide, columns, k * wide, -columns[k, i], i // GROUP + 1)
    # Row k of t becomes column k of T.
    for k in range(n - 1, -1, -1):
        row = t[k]
        root = math.sqrt(row[k])
        inverse = 1.0 / root
        for j in range(k):
            row[j] *= inverse
        row[k] = root
        for i in range(k):
            subtract_row(t, i * wide, t, k * wide, row[i], i // GROUP + 1)
    for k in range(n - 1, -1, -1):
        row, inverse = a[k], 1.0 / t[k, k]
        for j in range(k, stride):
            row[j] *= inverse
        begin = k // GROUP * GROUP
        # Left of the diagonal stands what was there before.
        for j in range(begin, k):
            row[j] = 0.0
        for i in range(k):
            subtract_row(a, i * stride + begin, a, k * stride + begin, t[k, i], (stride - begin) // GROUP)


@njit(nogil=True, cache=True)
def unpack(packed, row, line, a):
    """Upper triangle of M of one row of a block; `line` is scratch."""
    width = a.shape[0]
    for block in range(packed.shape[0]):
        line[block * LANES : (block + 1) * LANES] = packed[block, row]
    start = 0
    for i in range(width):
        a[i, i:width] = line[start : start + width - i]
        start += width - i


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def substitute(a, n, vector):
    """Solve UᵀU x = vector in place, with the rows of U in `a`."""
    for k in range(n):
        row = a[k]
        value = vector[k] / row[k]
        vector[k] = value
        for j in range(k + 1, n):
            vector[j] -= row[j] * value
    for k in range(n - 1, -1, -1):
        row = a[k]
        value = vector[k]
        for j in range(k + 1, n):
            value -= row[j] * vector[j]
        vector[k] = value / row[k]


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _multiply_upper(a, n, x, out):
    """Add to `out` the symmetric matrix whose upper triangle is in `a`, times x."""
    for i in range(n):
        row, one = a[i], x[i]
        total = row[i] * one
        for j in range(i + 1, n):
            total += row[j] * x[j]
            out[j] += row[j] * one
        out[i] += total


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _what_is_left(y, information, spectrum, left):
    """Y − a′ · spectrum of `SPECTRUM` pixels."""
    for j in range(SPECTRUM):
        left[j] = y[j] - information[j] * spectrum[j]


@njit(nogil=True, cache=True, error_model="numpy")
def _gradient(y, information, rows, points, spectra, directions, tile, left, u):
    """U = Bᵀ(y − a′ B b) of the first rows; `spectra` (p / `SPECTRUM`, n + q, `SPECTRUM`) is B."""
    blocks, p, _ = directions.shape
    width = spectra.shape[1]
    u[:] = 0.0
    for c in range(0, p, CHUNK):
        size = min(CHUNK, p - c)
        for r in range(0, rows, STEP):
            for j in range(0, size, SPECTRUM):
                tile[:] = ZERO32
                start = (c + j) // SPECTRUM * width * SPECTRUM
                add_tile(points, r * points.shape[1], points.shape[1], spectra, start, width, tile, 0)
                here = slice(c + j, c + j + SPECTRUM)
                for i in range(STEP):
                    _what_is_left(
                        y[r + i, here], information[r + i, here], tile[i], left[i, j : j + SPECTRUM]
                    )
            for block in range(blocks):
                start, place = (block * p + c) * LANES, (block * u.shape[1] + r) * LANES
                add_tile(left, 0, CHUNK, directions, start, size, u, place)


@njit(nogil=True, cache=True, error_model="numpy")
def refine(
    y,
    information,
    rows,
    packed,
    spectra,
    directions,
    precision,
    pull,
    refinements,
    numbers,
    points,
    factors,
    u,
):
    """Expand the likelihood around a point near the star, `refinements` times: u and the energy are what is changed.

    `points` (·, n + q) is float32 scratch, and so is `factors` (·, n + q, ·), one matrix for each row.
    """
    width = len(pull)
    line, vector = np.empty(packed.shape[0] * LANES), np.empty(width)
    matrix, before = np.zeros((width, width)), np.empty((rows, width))
    tile, left = np.empty((STEP, SPECTRUM), np.float32), np.zeros((STEP, CHUNK), np.float32)
    points[:] = ZERO32
    for i in range(rows):
        a = factors[i]
        unpack(packed, i, line, a)
        for k in range(width):
            for j in range(k, width):
                a[k, j] += precision[k, j]
            before[i, k] = u[k // LANES, i, k % LANES]
        factor(a, 0, width, width, 0.0)
    for _ in range(refinements):
        for i in range(rows):
            for k in range(width):
                vector[k] = u[k // LANES, i, k % LANES] + pull[k]
            substitute(factors[i], width, vector)
            for k in range(width):
                points[i, k] = np.float32(vector[k])
        _gradient(y, information, rows, points, spectra, directions, tile, left, u)
        for i in range(rows):
            for k in range(width):
                vector[k] = u[k // LANES, i, k % LANES]
            unpack(packed, i, line, matrix)
            _multiply_upper(matrix, width, points[i], vector)
            for k in range(width):
                u[k // LANES, i, k % LANES] = vector[k]
    for i in range(rows):
        for k in range(width):
            numbers[i, 2] += points[i, k] * (u[k // LANES, i, k % LANES] - before[i, k])


@njit(nogil=True, cache=True, fastmath=EXACT, error_model="numpy")
def solve(a, q, n_sky, level2, whole, columns, root):
    """Marginalise q nuisances, then the scatter within clouds: `root` (n, ·) becomes C' of M₁ = C C', and λ behind it.

    `a` (q + n, ·) is the upper triangle of M, nuisances first, and u behind it; `whole` and `columns` are scratch like
    `root`. The last `n_sky` nuisances grow with the noise of the star, of mean square `level2`.
    Returns what nuisances and the best point of the space explain, and what the latter gains beyond |λ|² under M₁.
    """
    n = root.shape[0]
    for i in range(q):
        a[i, i] += 1.0 if i < q - n_sky else 1.0 / (level2 + TINY)
    factor(a, 0, q, q + n, 0.0)
    explained = 0.0
    for i in range(q):
        explained += a[i, q + n] * a[i, q + n]
    for i in range(n):
        for j in range(i, n + 1):
            whole[i, j] = a[q + i, q + j]
            root[i, j] = a[q + i, q + j]
    factor(whole, 0, n, n, LEAST_CURVATURE)
    factor(root, 0, n, n, LEAST_INFORMATION)
    gain, beyond = 0.0, 0.0
    for i in range(n):
        gain += whole[i, n] * whole[i, n]
        # |λ|² = uᵀM⁻¹u − uᵀ(I + M)⁻¹u, and the best point gains the same with the least curvature in M⁻¹ alone.
        beyond -= root[i, n] * root[i, n]
    shrink(root, columns, whole, n)
    return explained + gain, gain + beyond
