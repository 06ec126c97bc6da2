"""Loops of one star over all clouds; see `moefast.kernels.clouds`.

Design: `LANES` clouds lie side by side in a panel, so that every loop over them is SIMD whatever the number of tangents.
A vector (the mean of each cloud, or one of its tangents) is kept as blocks of four coordinates × `LANES` clouds; C', upper
triangular, multiplies it block by block in the nearest cache. What is left of a cloud's distance when its best point is
taken is summed from its residual: the product form |δ|² − ρᵀA⁻¹ρ loses the digits that a star far from a cloud's mean,
along a tangent of it, has above the rest.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from moefast.kernels.cpu import FAST, exp32, log32
from moefast.kernels.cpu_information import LANES, LEAST_CURVATURE, STEP, TINY, add_product, solve, unpack

__all__ = ["posterior"]

BLOCK = STEP * LANES
"""Numbers of four coordinates of a panel."""
LEAST_SHARE = np.float32(1e-9)
"""Of the best cloud's weight: clouds below have no say in moments of labels."""
LEAST_SPREAD = 1e-4
"""Added in dex to standard deviations whose logarithms the error model sees, as in `moefast.posterior.forward`."""
ZERO32 = np.float32(0.0)
ONE32 = np.float32(1.0)
HALF32 = np.float32(0.5)


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _shift(x, c, centre):
    """Subtract four coordinates of `centre` from a block."""
    a0, a1, a2, a3 = centre[c], centre[c + 1], centre[c + 2], centre[c + 3]
    for i in range(np.uint64(LANES)):
        j, k, m = i + np.uint64(LANES), i + np.uint64(2 * LANES), i + np.uint64(3 * LANES)
        x[i] -= a0
        x[j] -= a1
        x[k] -= a2
        x[m] -= a3


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _scale_tangent(x, c, spectrum, width, out):
    """Out = width (x + spectrum): change of a cloud's mean with the scale."""
    a0, a1, a2, a3 = spectrum[c], spectrum[c + 1], spectrum[c + 2], spectrum[c + 3]
    for i in range(np.uint64(LANES)):
        j, k, m = i + np.uint64(LANES), i + np.uint64(2 * LANES), i + np.uint64(3 * LANES)
        out[i] = width * (x[i] + a0)
        out[j] = width * (x[j] + a1)
        out[k] = width * (x[k] + a2)
        out[m] = width * (x[m] + a3)


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _add_gram(x0, x1, y0, y1, out):
    """Add what four coordinates give to x₀·y₀, x₀·y₁, x₁·y₀, x₁·y₁, which stand one behind the other in `out`."""
    for i in range(np.uint64(LANES)):
        j, k, m = i + np.uint64(LANES), i + np.uint64(2 * LANES), i + np.uint64(3 * LANES)
        p0, p1, p2, p3 = x0[i], x0[j], x0[k], x0[m]
        q0, q1, q2, q3 = x1[i], x1[j], x1[k], x1[m]
        r0, r1, r2, r3 = y0[i], y0[j], y0[k], y0[m]
        s0, s1, s2, s3 = y1[i], y1[j], y1[k], y1[m]
        out[i] += (p0 * r0 + p1 * r1) + (p2 * r2 + p3 * r3)
        out[j] += (p0 * s0 + p1 * s1) + (p2 * s2 + p3 * s3)
        out[k] += (q0 * r0 + q1 * r1) + (q2 * r2 + q3 * r3)
        out[m] += (q0 * s0 + q1 * s1) + (q2 * s2 + q3 * s3)


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _add_along(x, coefficient, residual):
    """Add coefficient · x to four coordinates of a residual."""
    for i in range(np.uint64(LANES)):
        j, k, m = i + np.uint64(LANES), i + np.uint64(2 * LANES), i + np.uint64(3 * LANES)
        g = coefficient[i]
        residual[i] += g * x[i]
        residual[j] += g * x[j]
        residual[k] += g * x[k]
        residual[m] += g * x[m]


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _add_squares(x, out):
    for i in range(np.uint64(LANES)):
        j, k, m = i + np.uint64(LANES), i + np.uint64(2 * LANES), i + np.uint64(3 * LANES)
        out[i] += (x[i] * x[i] + x[j] * x[j]) + (x[k] * x[k] + x[m] * x[m])


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _pivot(diagonal, inverse_root, log_determinant):
    for i in range(LANES):
        pivot = max(diagonal[i], ONE32)
        log_determinant[i] += log32(pivot)
        inverse_root[i] = ONE32 / np.float32(math.sqrt(pivot))


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _times(x, a, out):
    for i in range(LANES):
        out[i] = x[i] * a[i]


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _less(out, a, b):
    for i in range(LANES):
        out[i] -= a[i] * b[i]


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _plus(out, a, b):
    for i in range(LANES):
        out[i] += a[i] * b[i]


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _evidence(log_weight, square, log_determinant, out):
    for i in range(LANES):
        out[i] = log_weight[i] - HALF32 * (square[i] + log_determinant[i])


@njit(nogil=True, cache=True, error_model="numpy")
def _panel(columns, root, centre, spectrum, width, vectors, gram):
    """δ, tangents and scale tangent of a panel in whitened coordinates, and all their products with each other."""
    drawn, blocks = columns.shape[0], columns.shape[1]
    last = drawn
    for v in range(drawn):
        for r in range(blocks):
            out = vectors[v, r]
            out[:] = ZERO32
            for c in range(r, blocks):
                add_product(root, STEP * r, STEP * c, columns[v, c], out)
    for r in range(blocks):
        _shift(vectors[0, r], STEP * r, centre)
        _scale_tangent(vectors[0, r], STEP * r, spectrum, width, vectors[last, r])
    for a in range(gram.shape[0]):
        for b in range(a, gram.shape[0]):
            out = gram[a, b]
            out[:] = ZERO32
            for r in range(blocks):
                _add_gram(
                    vectors[2 * a, r], vectors[2 * a + 1, r], vectors[2 * b, r], vectors[2 * b + 1, r], out
                )


@njit(nogil=True, cache=True, inline="always")
def _product_of(gram, a, b):
    """Products of vectors a ≤ b of all clouds."""
    start = (2 * (a % 2) + b % 2) * LANES
    return gram[a // 2, b // 2, start : start + LANES]


@njit(nogil=True, cache=True, error_model="numpy")
def _best_points(vectors, gram, lower, inverse_root, coefficients, residual, square, log_determinant):
    """L Lᵀ = A, γ = A⁻¹ρ, ln det A, and |δ + Tᵀγ|² + |γ|² of all clouds of a panel."""
    t = coefficients.shape[0]
    for a in range(t):
        for b in range(a, t):
            lower[b, a] = _product_of(gram, a + 1, b + 1)
        for i in range(LANES):
            lower[a, a, i] += ONE32
        product = _product_of(gram, 0, a + 1)
        for i in range(LANES):
            coefficients[a, i] = -product[i]
    log_determinant[:] = ZERO32
    for k in range(t):
        _pivot(lower[k, k], inverse_root[k], log_determinant)
        _times(coefficients[k], inverse_root[k], coefficients[k])
        for i in range(k + 1, t):
            _times(lower[i, k], inverse_root[k], lower[i, k])
            _less(coefficients[i], lower[i, k], coefficients[k])
        for i in range(k + 1, t):
            for j in range(i, t):
                _less(lower[j, i], lower[j, k], lower[i, k])
    for k in range(t - 1, -1, -1):
        for i in range(k + 1, t):
            _less(coefficients[k], lower[i, k], coefficients[i])
        _times(coefficients[k], inverse_root[k], coefficients[k])
    square[:] = ZERO32
    for r in range(vectors.shape[1]):
        residual[:] = vectors[0, r]
        for a in range(t):
            _add_along(vectors[a + 1, r], coefficients[a], residual)
        _add_squares(residual, square)
    for a in range(t):
        _plus(square, coefficients[a], coefficients[a])


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _shares(evidence, start, stop, top, share):
    """Exponentials above `top`; return their sum."""
    total = 0.0
    for j in range(start, stop):
        value = exp32(evidence[j] - top)
        value = value if evidence[j] - top > np.float32(-87.0) else ZERO32
        share[j] = value
        total += np.float64(value)
    return total


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _labels_of(j, lower, inverse_root, coefficients, gains, labels, solved, mean):
    """Mean labels of cloud j, and L⁻¹ g, whose squares are the variances that its tangents leave; eight labels a row."""
    panel, lane = j // LANES, j % LANES
    t = gains.shape[1]
    mean[:] = labels[j]
    for a in range(t):
        gamma = coefficients[panel, a, lane]
        gain = gains[j, a]
        for x in range(gain.size):
            mean[x] += gamma * gain[x]
            solved[a, x] = gain[x]
    for k in range(t):
        inverse = inverse_root[panel, k, lane]
        row = solved[k]
        for x in range(row.size):
            row[x] *= inverse
        for i in range(k + 1, t):
            along = lower[panel, i, k, lane]
            other = solved[i]
            for x in range(row.size):
                other[x] -= along * row[x]


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _moments(
    evidence, lower, inverse_root, coefficients, gains, labels, scatter, scatter_with_first, first, means_of_first,
    share, chosen, means, variances, covariances, solved, label, sd, covariance, weights, expert,
):  # fmt: skip
    """From evidences to labels, as `moefast.posterior.forward` has it; returns the scatter of log g between clouds."""
    m, k, n_labels = evidence.size, first.size - 1, label.size
    top = np.float32(-np.inf)
    for j in range(m):
        top = max(top, evidence[j])
    total = 0.0
    for e in range(k):
        highest = np.float32(-np.inf)
        for j in range(first[e], first[e + 1]):
            highest = max(highest, evidence[j])
        norm = _shares(evidence, first[e], first[e + 1], highest, share)
        mean = 0.0
        for j in range(first[e], first[e + 1]):
            panel, lane = j // LANES, j % LANES
            mean += np.float64(share[j]) * np.float64(means_of_first[panel, lane])
        expert[e] = mean / norm
        among = math.exp(np.float64(highest) - np.float64(top))
        weights[e] = among * norm
        total += among * norm
        for j in range(first[e], first[e + 1]):
            share[j] *= np.float32(among)
    for e in range(k):
        weights[e] /= total
    n_chosen, kept = 0, 0.0
    for j in range(m):
        if share[j] >= LEAST_SHARE:
            chosen[n_chosen] = j
            n_chosen += 1
            kept += np.float64(share[j])
    label[:] = 0.0
    for c in range(n_chosen):
        j = chosen[c]
        _labels_of(j, lower, inverse_root, coefficients, gains, labels, solved, means[c])
        w = np.float64(share[j]) / kept
        variance, along = variances[c], covariances[c]
        variance[:] = scatter[j]
        along[:] = scatter_with_first[j]
        for a in range(solved.shape[0]):
            row = solved[a]
            one = row[0]
            for x in range(row.size):
                variance[x] += row[x] * row[x]
                along[x] += one * row[x]
        for x in range(n_labels):
            label[x] += w * np.float64(means[c, x])
    sd[:], covariance[:] = 0.0, 0.0
    between = 0.0
    for c in range(n_chosen):
        w = np.float64(share[chosen[c]]) / kept
        of_first = np.float64(means[c, 0]) - label[0]
        between += w * of_first * of_first
        for x in range(n_labels):
            apart = np.float64(means[c, x]) - label[x]
            sd[x] += w * (np.float64(variances[c, x]) + apart * apart)
            covariance[x] += w * (np.float64(covariances[c, x]) + of_first * apart)
    for x in range(n_labels):
        sd[x] = math.sqrt(max(sd[x], 0.0) + TINY)
    return between


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _perceptron(features, w1, b1, w2, b2):
    value = np.float64(b2[0])
    for h in range(b1.size):
        active = np.float64(b1[h])
        for f in range(features.size):
            active += features[f] * np.float64(w1[f, h])
        value += math.tanh(active) * np.float64(w2[h, 0])
    return value


@njit(nogil=True, cache=True, error_model="numpy")
def posterior(
    numbers, u, packed, q, n,
    columns, log_weights, gains, labels, scatter, scatter_with_first, gains_of_first, labels_of_first, first,
    unit, width, lowest, highest, w1, b1, w2, b2,
    log_g, log_g_err, features, label, sd, covariance, weights, expert, chi2, distance, strength, scale, log_level,
):  # fmt: skip
    """Posterior of each star of a block; arrays of clouds as `moefast.kernels.clouds.Clouds` lays them out."""
    panels, drawn, blocks, _ = columns.shape
    t, m, wide = drawn, first[-1], gains.shape[2]
    stride = -(-(q + n + 1) // 32) * 32
    a, whole, exact = np.zeros((q + n, stride)), np.zeros((n, stride)), np.zeros((n, stride))
    line = np.empty(packed.shape[0] * LANES)
    root = np.zeros((STEP * blocks, STEP * blocks), np.float32)
    centre, spectrum = np.zeros(STEP * blocks, np.float32), np.zeros(STEP * blocks, np.float32)
    half = (drawn + 2) // 2
    vectors = np.zeros((2 * half, blocks, BLOCK), np.float32)
    gram, residual = np.empty((half, half, BLOCK), np.float32), np.empty(BLOCK, np.float32)
    lower, inverse_root = np.empty((panels, t, t, LANES), np.float32), np.empty((panels, t, LANES), np.float32)
    coefficients = np.empty((panels, t, LANES), np.float32)
    evidence, square = np.empty(panels * LANES, np.float32), np.empty(panels * LANES, np.float32)
    log_determinant, means_of_first = np.empty(LANES, np.float32), np.empty((panels, LANES), np.float32)
    share, chosen = np.empty(m, np.float32), np.empty(m, np.int64)
    means, variances, covariances = (
        np.empty((m, wide), np.float32), np.empty((m, wide), np.float32), np.empty((m, wide), np.float32),
    )  # fmt: skip
    solved = np.empty((t, wide), np.float32)
    for i in range(len(numbers)):
        unpack(packed, u, i, line, a)
        explained, beyond = solve(a, q, whole, exact)
        for r in range(n):
            for c in range(r, n):
                root[r, c] = np.float32(exact[r, c])
            centre[r] = np.float32(exact[r, n])
            spectrum[r] = np.float32(exact[r, n] + exact[r, n - 1] / unit) if r < n else ZERO32
        for panel in range(panels):
            _panel(columns[panel], root, centre, spectrum, width, vectors, gram)
            here = slice(panel * LANES, (panel + 1) * LANES)
            _best_points(
                vectors, gram, lower[panel], inverse_root[panel], coefficients[panel], residual, square[here],
                log_determinant,
            )  # fmt: skip
            _evidence(log_weights[here], square[here], log_determinant, evidence[here])
            means_of_first[panel] = labels_of_first[panel]
            for k in range(t):
                _plus(means_of_first[panel], coefficients[panel, k], gains_of_first[panel, k])
        between = _moments(
            evidence[:m], lower, inverse_root, coefficients, gains, labels, scatter, scatter_with_first, first,
            means_of_first, share, chosen, means, variances, covariances, solved,
            label[i], sd[i], covariance[i], weights[i], expert[i],
        )  # fmt: skip
        nearest = np.float64(square[:m].min())
        c0, level, n_good = numbers[i, 0], numbers[i, 3], numbers[i, 4]
        chi2[i] = (numbers[i, 2] - explained) / (1.0 + max(n_good - (n + 1), 0.0))
        distance[i] = (beyond + nearest) / n
        strength[i], scale[i] = numbers[i, 1], c0
        log_level[i] = 0.5 * math.log(level / (n_good + TINY) / (c0 * c0) + TINY)
        log_g[i] = min(max(label[i, 0], lowest), highest)
        features[i, 0] = log_g[i]
        features[i, 1] = math.log(sd[i, 0] + LEAST_SPREAD)
        features[i, 2] = math.log(math.sqrt(between + TINY) + LEAST_SPREAD)
        features[i, 3], features[i, 4] = label[i, 1], label[i, 2]
        log_g_err[i] = math.exp(_perceptron(features[i], w1, b1, w2, b2))
