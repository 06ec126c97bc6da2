"""Loops of one star over all clouds; see `moefast.kernels.clouds`.

Design: `LANES` clouds lie side by side in a panel, so that SIMD goes over clouds whatever the number of tangents, and a
few stars pass over a panel while it is near. C', upper triangular, multiplies the means and tangents of a panel, these
as far as they have coordinates; then each vector of clouds is solved in registers, and
what is left of a cloud's distance at its best point is summed from its residual: the product form |δ|² − ρᵀA⁻¹ρ loses
the digits that a star far from a cloud's mean, along a tangent of it, has above the rest.
"""

from __future__ import annotations

import math

import numpy as np

from moefast.core.compiled import njit
from moefast.kernels.cpu import FAST, exp32, log32
from moefast.kernels.cpu_correction import LEAST_SPREAD, correct
from moefast.kernels.cpu_information import STEP, TINY, chance_of_narrow, filled, solve, unpack
from moefast.kernels.vectors import VECTORS, cloud_group, label_group, set_upper_tile, width_of

__all__ = ["posterior"]

WIDTH = width_of(32)
LANES = VECTORS * WIDTH
"""Clouds of a panel."""
TOGETHER = 4
"""Stars that pass over a panel while it is in the second cache."""
SOLVED = 16
"""Stars whose roots are found one after the other, while what is added to M of each is in the second cache."""
LEAST_SHARE = np.float32(1e-9)
"""Of the best cloud's weight: clouds below have no say in labels but the first."""
LEAST_EVIDENCE = np.float32(-1e30)
"""Below, a sum of squares has overflowed."""
ZERO32 = np.float32(0.0)
HALF32 = np.float32(0.5)


@njit(nogil=True, cache=True, error_model="numpy")
def _whiten(columns, panel, groups, n, reach, root, star, vectors):
    """Vectors of the first groups of a panel times C' of a star; means have n coordinates, all others `reach`.

    `vectors` (groups, vectors of a cloud and one more, coordinates, `WIDTH`) holds those of `WIDTH` clouds in one
    piece, which the first cache keeps.
    """
    _, drawn, size, _ = columns.shape
    hop = (drawn + 1) * size * WIDTH
    for v in range(drawn):
        length = n if v == 0 else reach
        for r in range(0, length, STEP):
            start, place = ((panel * drawn + v) * size + r) * LANES, (v * size + r) * WIDTH
            set_upper_tile(
                root, (star * size + r) * size + r, size, columns, start, LANES, length - r, vectors, place, WIDTH,
                hop, groups,
            )  # fmt: skip


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _conclude(panel, place, log_weight, square, pivots, labels, gains, coefficients, evidence, means):
    """Evidence and mean first label of the clouds of a panel, in the place of a star and panel."""
    for i in range(LANES):
        evidence[place, i] = log_weight[panel, i] - HALF32 * square[place, i]
        means[place, i] = labels[panel, 0, i]
    for k in range(len(pivots)):
        for i in range(LANES):
            evidence[place, i] -= HALF32 * log32(pivots[k, i])
            means[place, i] += coefficients[place, k, i] * gains[panel, 0, k, i]


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


# Views of arrays are counted, which costs more than what follows does: places are handed on as numbers.
@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _within(panel, x, share, means, scatter, scatter_with_first, variance, along):
    """Mean of a label, its variance within clouds, and such a covariance with the first label, times shares."""
    total, square, product, start = 0.0, 0.0, 0.0, panel * LANES
    for i in range(LANES):
        w = np.float64(share[start + i])
        total += w * np.float64(means[panel, x, i])
        square += w * np.float64(scatter[panel, x, i] + variance[i])
        product += w * np.float64(scatter_with_first[panel, x, i] + along[i])
    return total, square, product


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _between(panel, x, share, means, middle, middle_of_first):
    """Variance of a label between clouds, and such a covariance with the first label, times shares."""
    square, product, start = 0.0, 0.0, panel * LANES
    for i in range(LANES):
        apart = np.float64(means[panel, x, i]) - middle
        weighed = np.float64(share[start + i]) * apart
        square += weighed * apart
        product += weighed * (np.float64(means[panel, 0, i]) - middle_of_first)
    return square, product


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _is_empty(share, start, size):
    total = ZERO32
    for i in range(start, start + size):
        total += share[i]
    return total == ZERO32


@njit(nogil=True, cache=True, error_model="numpy")
def _leave_out(panel, lane, means, variance, along):
    """Zeros for `WIDTH` clouds of no weight, in the place of whatever a star before has left."""
    for i in range(lane, lane + WIDTH):
        variance[i], along[i] = ZERO32, ZERO32
    for x in range(means.shape[1]):
        for i in range(lane, lane + WIDTH):
            means[panel, x, i] = ZERO32


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _moments(
    evidence, n_tangents, base, lower, inverse_root, coefficients, gains, labels, scatter, scatter_with_first, first,
    means_of_first, share, variance, along, solved, means, label, sd, covariance, weights, expert,
):  # fmt: skip
    """From evidences to labels, as `moefast.posterior.forward` has it; returns the scatter of log g between clouds.

    `lower`, `inverse_root` and `coefficients` of the star begin at panel `base`. `share` (panels · `LANES`) is 0 behind
    the last cloud; `variance`, `along` (`LANES`), `solved` (t, `LANES`) and `means` (panels, l, `LANES`) are scratch.
    """
    panels, n_labels = means.shape[:2]
    m, k = evidence.size, first.size - 1
    empty = np.empty(VECTORS, np.bool_)
    top = np.float32(-np.inf)
    for j in range(m):
        top = max(top, evidence[j])
    if not top > LEAST_EVIDENCE:
        # Beyond single precision, 1e15 times the noise away from any cloud, there is no answer.
        label[:], sd[:], covariance[:], weights[:], expert[:] = np.nan, np.nan, np.nan, np.nan, np.nan
        return np.nan
    total, best = 0.0, 0.0
    flat = means_of_first.reshape(-1)
    for e in range(k):
        start, stop = first[e], first[e + 1]
        highest = np.float32(-np.inf)
        for j in range(start, stop):
            highest = max(highest, evidence[j])
        norm = _shares(evidence, start, stop, highest, share)
        mean = 0.0
        for j in range(start, stop):
            mean += np.float64(share[j]) * np.float64(flat[j])
        expert[e] = mean / norm
        among = math.exp(np.float64(highest) - np.float64(top))
        weights[e] = among * norm
        total += among * norm
        best += among * mean
        for j in range(start, stop):
            share[j] *= np.float32(among)
    for e in range(k):
        weights[e] /= total
    best /= total
    between, kept = 0.0, 0.0
    for j in range(m):
        apart = np.float64(flat[j]) - best
        between += np.float64(share[j]) * apart * apart
        share[j] = share[j] if share[j] >= LEAST_SHARE else ZERO32
        kept += np.float64(share[j])
    between /= total
    label[:], sd[:], covariance[:] = 0.0, 0.0, 0.0
    for panel in range(panels):
        if _is_empty(share, panel * LANES, LANES):
            continue
        for lane in range(0, LANES, WIDTH):
            empty[lane // WIDTH] = _is_empty(share, panel * LANES + lane, WIDTH)
            if empty[lane // WIDTH]:
                _leave_out(panel, lane, means, variance, along)
        for x in range(n_labels):
            place = panel * n_labels + x
            for lane in range(0, LANES, WIDTH):
                if empty[lane // WIDTH]:
                    continue
                label_group(
                    lane, LANES, n_tangents, base + panel, lower, inverse_root, coefficients, place, gains, labels,
                    means, x == 0, solved, variance, along,
                )  # fmt: skip
            middle, square, product = _within(
                panel, x, share, means, scatter, scatter_with_first, variance, along
            )
            label[x] += middle / kept
            sd[x] += square / kept
            covariance[x] += product / kept
    label[0] = best
    for panel in range(panels):
        if _is_empty(share, panel * LANES, LANES):
            continue
        for x in range(n_labels):
            square, product = _between(panel, x, share, means, label[x], label[0])
            sd[x] += square / kept
            covariance[x] += product / kept
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
    numbers, u, packed, q, n_sky, n, points,
    calibrated, narrow, order, places, precision, pull, of_groups, constants,
    drawn, reach, columns, log_weights, gains, labels, scatter, scatter_with_first, first,
    unit, width, lowest, highest, w1, b1, w2, b2, network,
    log_g, log_g_err, features, label, sd, covariance, weights, expert, chi2, distance, strength, scale, log_level,
    point,
):  # fmt: skip
    """Posterior of each star of a block; arrays of clouds as `moefast.kernels.clouds.Clouds` lays them out."""
    panels, _, coordinates, _ = columns.shape
    n_labels, t, m = gains.shape[1], gains.shape[2], first[-1]
    # A vector of the last row may reach into one more.
    a, exact = np.zeros((filled(q + n) + 1, filled(q + n + 1))), np.zeros((filled(n), filled(n + 1)))
    size = of_groups.shape[1]
    part = np.zeros((filled(size), filled(size + 1)))
    of_root, scratch = np.zeros_like(exact), np.zeros_like(exact)
    left, evidences = np.empty((narrow.size, narrow.size + 1)), np.empty((2, len(constants)))
    root = np.zeros((SOLVED, coordinates, coordinates), np.float32)
    vectors = np.empty((VECTORS, t + 1, coordinates, WIDTH), np.float32)
    centre, spectrum = (
        np.zeros((SOLVED, coordinates), np.float32),
        np.zeros((SOLVED, coordinates), np.float32),
    )
    stars_and_panels = TOGETHER * panels
    # The last panel has lanes without clouds, which nothing is written to.
    lower = np.zeros((stars_and_panels, t * (t + 1) // 2, LANES), np.float32)
    inverse_root = np.zeros((stars_and_panels, t, LANES), np.float32)
    coefficients = np.zeros((stars_and_panels, t, LANES), np.float32)
    square = np.zeros((stars_and_panels, LANES), np.float32)
    means_of_first = np.empty((stars_and_panels, LANES), np.float32)
    evidence, pivots = np.empty((stars_and_panels, LANES), np.float32), np.ones((t, LANES), np.float32)
    share, solved = np.zeros(panels * LANES, np.float32), np.empty((t, LANES), np.float32)
    variance, along = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    means, explained, beyond = (
        np.empty((panels, n_labels, LANES), np.float32),
        np.empty(SOLVED),
        np.empty(SOLVED),
    )
    widest = max(network[3].size, network[5].size, network[7].size, 1)
    seen, ahead, behind = (
        np.empty(network[0].size, np.float32),
        np.empty(widest, np.float32),
        np.empty(widest, np.float32),
    )
    for begin in range(0, len(numbers), SOLVED):
        stop = min(begin + SOLVED, len(numbers))
        for i in range(begin, stop):
            star = i - begin
            level2 = numbers[i, 3] / (numbers[i, 4] + TINY) / (numbers[i, 0] * numbers[i, 0])
            log_level[i] = 0.5 * math.log(level2 + TINY)
            chance = chance_of_narrow(
                packed, u, i, n_sky, level2, calibrated, narrow, order, places, precision, pull, of_groups, constants,
                a, part, left, evidences,
            )  # fmt: skip
            unpack(packed, i, a, q + n)
            for k in range(q + n):
                a[k, q + n] = u[i, k]
            explained[star], beyond[star] = solve(
                a, q, n, n_sky, chance, narrow, level2, scratch, of_root, exact
            )
            for r in range(n):
                for c in range(r, n):
                    root[star, r, c] = np.float32(exact[r, c])
                centre[star, r] = np.float32(exact[r, n])
                spectrum[star, r] = np.float32(exact[r, n] + exact[r, n - 1] / unit)
        for passing in range(0, stop - begin, TOGETHER):
            count = min(TOGETHER, stop - begin - passing)
            for panel in range(panels):
                groups = min(VECTORS, -(-(m - panel * LANES) // WIDTH))
                for star in range(count):
                    place = star * panels + panel
                    _whiten(columns, panel, groups, n, reach, root, passing + star, vectors)
                    for lane in range(0, groups * WIDTH, WIDTH):
                        cloud_group(
                            vectors, lane, LANES, coordinates, n, reach, drawn, passing + star, centre, spectrum,
                            width, place, lower, inverse_root, coefficients, square, pivots,
                        )  # fmt: skip
                    _conclude(
                        panel, place, log_weights, square, pivots, labels, gains, coefficients, evidence,
                        means_of_first,
                    )  # fmt: skip
            for star in range(count):
                i, base = begin + passing + star, star * panels
                between = _moments(
                    evidence[base : base + panels].reshape(-1)[:m], drawn, base, lower, inverse_root, coefficients,
                    gains, labels, scatter, scatter_with_first, first, means_of_first[base : base + panels], share,
                    variance, along, solved, means, label[i], sd[i], covariance[i], weights[i], expert[i],
                )  # fmt: skip
                nearest = np.float64(square[base : base + panels].reshape(-1)[:m].min())
                chi2[i] = (numbers[i, 2] - explained[passing + star]) / (
                    1.0 + max(numbers[i, 4] - (n + 1), 0.0)
                )
                distance[i] = (beyond[passing + star] + nearest) / n
                strength[i], scale[i] = numbers[i, 1], numbers[i, 0]
                for k in range(n):
                    point[i, k] = points[i, q + k]
                for k in range(q):
                    point[i, n + k] = points[i, k]
                spread = math.sqrt(between + TINY)
                if seen.size:
                    label[i, 0] = correct(
                        point[i], label[i], sd[i], covariance[i], weights[i], expert[i], spread, log_level[i], network,
                        seen, ahead, behind,
                    )  # fmt: skip
                answer = label[i, 0]
                log_g[i] = answer if math.isnan(answer) else min(max(answer, lowest), highest)
                features[i, 0] = log_g[i]
                features[i, 1] = math.log(sd[i, 0] + LEAST_SPREAD)
                features[i, 2] = math.log(spread + LEAST_SPREAD)
                features[i, 3], features[i, 4] = label[i, 1], label[i, 2]
                log_g_err[i] = math.exp(_perceptron(features[i], w1, b1, w2, b2))
