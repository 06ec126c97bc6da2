"""Loops for the posterior of a star's velocity; see `moefast.kernels.velocity`.

Design: products of pixels and templates by `moefast.kernels.vectors.add_tile`, which sums in one fixed order whatever
stands in the other rows, in single precision; what a row is divided and solved by is in double precision.
"""

from __future__ import annotations

import math

import numpy as np

from moefast.core.compiled import njit
from moefast.kernels.cpu import FAST
from moefast.kernels.cpu_information import CHUNK, SPECTRUM, STEP, TINY, factor, filled, unpack
from moefast.kernels.quality import LARGEST32, LARGEST_ERROR32, ZERO32
from moefast.kernels.vectors import VECTORS, add_tile, set_tile, width_of

__all__ = ["LANES", "conclude", "gains", "multiply", "read_star", "slopes_of", "step"]

LANES = VECTORS * width_of(32)
"""Numbers in single precision that lie side by side."""
ROUNDING = 1e-12
"""Of a diagonal, what is added to it where only the scale is asked for."""
FAINT = np.float32(-30.0)
"""Templates whose logarithm of the evidence is so far below that of the best one are not counted."""
NEVER = 60.0
"""Velocities whose logarithm of the probability is so far below that of the best one are not counted."""


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _cholesky(a, inverse):
    """L of a = L Lᵀ in place of the lower triangle, and L⁻¹."""
    n = a.shape[0]
    for k in range(n):
        for j in range(k):
            a[k, k] -= a[k, j] * a[k, j]
        a[k, k] = math.sqrt(max(a[k, k], TINY))
        for i in range(k + 1, n):
            for j in range(k):
                a[i, k] -= a[i, j] * a[k, j]
            a[i, k] /= a[k, k]
    for k in range(n):
        for j in range(n):
            inverse[k, j] = 0.0
        inverse[k, k] = 1.0 / a[k, k]
        for j in range(k):
            total = 0.0
            for i in range(j, k):
                total += a[k, i] * inverse[i, j]
            inverse[k, j] = -total / a[k, k]


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _pixel(flux, error, shown):
    """Flux and 1/σ² of a pixel, both 0 if it is bad."""
    good = (abs(flux) <= LARGEST32) & shown & (error > ZERO32) & (error <= LARGEST_ERROR32)
    sigma = np.float64(error) if good else 1.0
    known = good & (sigma >= TINY)
    return np.float64(flux) if known else 0.0, 1.0 / (sigma * sigma) if known else 0.0


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _inverse_times(inverse, vector, out):
    """Out = a⁻¹ vector, of a = L Lᵀ with L⁻¹ = `inverse`."""
    n = vector.size
    out[:] = 0.0
    for i in range(n):
        total = 0.0
        for k in range(i + 1):
            total += inverse[i, k] * vector[k]
        for k in range(i + 1):
            out[k] += inverse[i, k] * total


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def read_star(flux, error, mask, masked, continuum, precision, rows, weights):
    """What templates are multiplied with: row 0 of `rows` y without what the continuum explains, then a′ F L⁻ᵀ; and a′.

    `continuum` (c, p) is F, its first row a spectrum without slope; `precision` (c,) its prior, of the first one for
    changes of the scale. Rows and `weights` may be longer than p.
    """
    c, p = continuum.shape
    matrix, inverse = np.zeros((c, c)), np.empty((c, c))
    vector, solution = np.zeros(c), np.empty(c)
    for j in range(p):
        x, w = _pixel(flux[j], error[j], not mask[j] if masked else True)
        for i in range(c):
            one = w * continuum[i, j]
            vector[i] += one * x
            for k in range(i + 1):
                matrix[i, k] += one * continuum[k, j]
    curvature = matrix[0, 0]
    scaled = np.zeros((c, c))
    for i in range(c):
        for k in range(i + 1):
            scaled[i, k] = matrix[i, k]
        # A star without good pixels has a scale, too, that means nothing.
        scaled[i, i] += ROUNDING * matrix[i, i] + TINY
    _cholesky(scaled, inverse)
    _inverse_times(inverse, vector, solution)
    # At least one standard error: a spectrum of pure noise has no scale.
    scale = max(solution[0], 1.0 / math.sqrt(curvature + TINY))
    square = scale * scale
    for i in range(c):
        vector[i] = scale * (vector[i] - scale * matrix[i, 0])
        for k in range(i + 1):
            scaled[i, k] = square * matrix[i, k]
        scaled[i, i] += precision[i]
    _cholesky(scaled, inverse)
    _inverse_times(inverse, vector, solution)
    for j in range(p):
        x, w = _pixel(flux[j], error[j], not mask[j] if masked else True)
        left = x / scale - continuum[0, j]
        for i in range(c):
            left -= solution[i] * continuum[i, j]
        known = square * w
        weights[j] = np.float32(known)
        rows[0, j] = np.float32(known * left)
        for i in range(c):
            total = 0.0
            for k in range(i + 1):
                total += inverse[i, k] * continuum[k, j]
            rows[1 + i, j] = np.float32(known * total)


@njit(nogil=True, cache=True, error_model="numpy")
def multiply(values, rows, templates, out):
    """Sums of values times templates: values (·, p), templates (blocks, p, `LANES`), out (blocks, ·, `LANES`)."""
    blocks, p, _ = templates.shape
    out[:] = ZERO32
    for c in range(0, p, CHUNK):
        for block in range(blocks):
            for r in range(0, rows, STEP):
                start, place = (block * p + c) * LANES, (block * out.shape[1] + r) * LANES
                add_tile(
                    values,
                    r * values.shape[1] + c,
                    values.shape[1],
                    templates,
                    start,
                    LANES,
                    min(CHUNK, p - c),
                    out,
                    place,
                    LANES,
                    LANES // VECTORS,
                    VECTORS,
                )


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def gains(lines, squares, first, star, c, of_lines, of_squares, log_weights, evidence):
    """Ln Σ_j π_j exp(what template j gains over no lines), at every velocity (v,), of one star of a block.

    `lines` and `squares` are what `multiply` gives: rows `first` to `first` + c of the former and row `star` of the
    latter. `of_lines` (r, m), `of_squares` (s, m): templates in terms of the components; lane v r + k of all blocks is
    velocity v, component k.
    """
    n_lines, m = of_lines.shape
    n_squares = of_squares.shape[0]
    gain, energy, across = np.empty(m, np.float32), np.empty(m, np.float32), np.empty(m, np.float32)
    for v in range(evidence.size):
        gain[:] = log_weights
        energy[:] = ZERO32
        for k in range(n_lines):
            lane = v * n_lines + k
            value = lines[lane // LANES, first, lane % LANES]
            for j in range(m):
                gain[j] += value * of_lines[k, j]
        for k in range(n_squares):
            lane = v * n_squares + k
            value = squares[lane // LANES, star, lane % LANES]
            for j in range(m):
                energy[j] += value * of_squares[k, j]
        for i in range(1, c):
            across[:] = ZERO32
            for k in range(n_lines):
                lane = v * n_lines + k
                value = lines[lane // LANES, first + i, lane % LANES]
                for j in range(m):
                    across[j] += value * of_lines[k, j]
            for j in range(m):
                energy[j] -= across[j] * across[j]
        best = np.float32(-np.inf)
        for j in range(m):
            gain[j] -= np.float32(0.5) * energy[j]
            best = max(best, gain[j])
        total = 0.0
        for j in range(m):
            if gain[j] > best + FAINT:
                total += math.exp(np.float64(gain[j] - best))
        evidence[v] = np.float64(best) + math.log(total)


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _sums(y, information, spectrum, slope, reference_slope, weighed):
    """dᵀ(y − a′ s) and dᵀ(a′ d) of `SPECTRUM` pixels, with d = `reference_slope` + `slope`; a′ d goes to `weighed`."""
    force, curvature = 0.0, 0.0
    for j in range(SPECTRUM):
        d = slope[j] + reference_slope[j]
        w = information[j] * d
        weighed[j] = w
        force += np.float64(d) * np.float64(y[j] - information[j] * spectrum[j])
        curvature += np.float64(d) * np.float64(w)
    return force, curvature


@njit(nogil=True, cache=True, error_model="numpy")
def slopes_of(y, information, rows, points, spectra, slopes, reference_slope, weighed, sums):
    """Sums (·, 2) of `_sums` over all pixels of the first rows, and a′ d (·, p)."""
    p = y.shape[1]
    width = spectra.shape[1]
    spectrum, slope = np.empty((STEP, SPECTRUM), np.float32), np.empty((STEP, SPECTRUM), np.float32)
    sums[:] = 0.0
    for r in range(0, rows, STEP):
        for j in range(0, p, SPECTRUM):
            start = j // SPECTRUM * width * SPECTRUM
            for terms, sums_of_terms in ((spectra, spectrum), (slopes, slope)):
                set_tile(
                    points, r * points.shape[1], points.shape[1], terms, start, SPECTRUM, width, sums_of_terms, 0,
                    SPECTRUM, SPECTRUM // VECTORS, VECTORS,
                )  # fmt: skip
            here = slice(j, j + SPECTRUM)
            for i in range(STEP):
                force, curvature = _sums(
                    y[r + i, here], information[r + i, here], spectrum[i], slope[i], reference_slope[here],
                    weighed[r + i, here],
                )  # fmt: skip
                sums[r + i, 0] += force
                sums[r + i, 1] += curvature


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def step(rows, points, packed, precision, pull, u, across, sums, found):
    """How far velocities of the first rows are off, and their curvature, (·, 2), with everything else marginalised.

    Points and u are what `refine` of `moefast.kernels.cpu_information` leaves; `across` (·, columns) is Bᵀa′d.
    """
    width = len(pull)
    a, left = np.zeros((-(-width // STEP) * STEP, filled(width + 2))), np.empty(width)
    for i in range(rows):
        unpack(packed, i, a, width)
        for k in range(width):
            left[k] = u[i, k] + pull[k]
        for k in range(width):
            for j in range(k, width):
                a[k, j] += precision[k, j]
            left[k] -= a[k, k] * points[i, k]
            for j in range(k + 1, width):
                left[k] -= a[k, j] * points[i, j]
                left[j] -= a[k, j] * points[i, k]
        for k in range(width):
            a[k, width], a[k, width + 1] = across[i, k], left[k]
        # With UᵀU = M + P⁻¹ these columns become U⁻ᵀ times what they were.
        factor(a, width, width, 0.0)
        force, curvature = sums[i, 0], sums[i, 1]
        for k in range(width):
            force -= a[k, width] * a[k, width + 1]
            curvature -= a[k, width] * a[k, width]
        found[i, 0] = force / max(curvature, TINY)
        found[i, 1] = curvature


@njit(nogil=True, cache=True, error_model="numpy")
def conclude(grid, evidence, shares, near, near_sigmas, wider, velocity, sigma, other):
    """Velocities and their 1σ, in place, and the probability of all other velocities; see `velocity_conclusion`.

    `shares` (f, 4) are the weights of four neighbours at each of f places between two velocities.
    """
    n, n_v = evidence.shape
    between = len(shares)
    n_fine = (n_v - 1) * between + 1
    width = (grid[-1] - grid[0]) / (n_fine - 1)
    log_p, p = np.empty(n_fine), np.empty(n_fine)
    for i in range(n):
        best = -np.inf
        for g in range(n_v):
            here = evidence[i, g]
            last = g == n_v - 1
            before = evidence[i, g - 1] if g > 0 else 2 * evidence[i, 0] - evidence[i, 1]
            after = here if last else evidence[i, g + 1]
            beyond = evidence[i, g + 2] if g < n_v - 2 else 2 * evidence[i, n_v - 1] - evidence[i, n_v - 2]
            for k in range(1 if last else between):
                # At a velocity of the grid its own weight is 1.
                value = (
                    shares[k, 0] * before + shares[k, 1] * here + shares[k, 2] * after + shares[k, 3] * beyond
                )
                log_p[g * between + k] = value
                best = max(best, value)
        total = 0.0
        for j in range(n_fine):
            p[j] = 0.0 if log_p[j] < best - NEVER else math.exp(log_p[j] - best)
            total += p[j]
        reach = max(near, near_sigmas * sigma[i])
        part, mean = 0.0, 0.0
        for j in range(n_fine):
            fine = grid[0] + j * width
            if abs(fine - velocity[i]) < reach:
                part += p[j]
                mean += p[j] * fine
        mean /= max(part, 1e-300)
        square = 0.0
        for j in range(n_fine):
            fine = grid[0] + j * width
            if abs(fine - velocity[i]) < reach:
                square += p[j] * (fine - mean) ** 2
        spread = math.sqrt(square / max(part, 1e-300))
        if spread > wider * sigma[i]:
            velocity[i], sigma[i] = mean, spread
        reach = max(near, near_sigmas * sigma[i])
        left = 0.0
        for j in range(n_fine):
            if not abs(grid[0] + j * width - velocity[i]) < reach:
                left += p[j]
        other[i] = left / total
