"""CPU kernels: BLAS where it is a matrix product, Numba where it is fusion.

Design: a row's numbers depend, to the last bit, on that row and its place in its file alone. Matrix products therefore
always have the same shape (`PROJECT_ROWS` rows, padded with zeros), and a row with bad pixels is first treated like
all others and then mended by a function of its own: a bad neighbour changes no instruction that a good row sees, and
the search for bad pixels costs nothing where there are none. All that a row gives besides the product (noise level,
energies, SNRs, noise by cells, line windows) is made in one pass while it lies in the nearest cache.
Kernels check nothing and allocate nothing but scratch for a row; `moefast.kernels` does both.

Threads: projection runs one block of rows per Python thread, Σxxᵀ one tile, with BLAS held to one thread each. A
parallel kernel that alternates with a parallel product costs twice as much: each library's threads wait actively for
the other's.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moefast.core.compiled import njit
from moefast.kernels.quality import (
    LARGEST32,
    LARGEST_ERROR32,
    ZERO32,
    median_near,
    quantile,
    quantile_scratch,
)

__all__ = [
    "FAST",
    "GRAM_ROWS",
    "GRAM_TILE",
    "PIXELS",
    "PROJECT_ROWS",
    "Experts",
    "Features",
    "Limits",
    "Network",
    "ProjectedRows",
    "add_tile",
    "centre",
    "collect_rows",
    "exp32",
    "find_places",
    "log32",
    "multiply_tile",
    "soft_mix",
    "within",
]

PROJECT_ROWS = 256
"""Rows of one matrix product in `project`: flux, error and centred flux of a block stay in the last-level cache."""

PIXELS = 512
"""Pixels that are worth a thread in `collect_rows`; a thread's pixels are neighbours, which memory likes best."""

GRAM_ROWS = 4096
"""Rows of one float32 product in Σxxᵀ at most: the totals of a million rows are still within 1e-8."""

GRAM_TILE = 1152
"""Columns of one tile of Σxxᵀ. BLAS packs the rows of every tile anew: with 512 columns that costs a fifth of the time,
with 1152 a thirtieth, and the product, 5 MB, is still in the last cache when it is added to the totals."""

LEAST_SUM = np.float32(1e-30)
"""Sums of squares below this have lost digits to underflow."""

# NaN and infinity must keep their meaning, so "nnan" and "ninf" are left out.
FAST = {"reassoc", "contract", "arcp", "nsz"}


F32 = NDArray[np.float32]


class ProjectedRows(NamedTuple):
    """What `soft_mix` reads of each spectrum: arrays of `moefast.kernels.Projected`."""

    columns: F32
    windows: F32
    variances: F32
    log_level: F32
    energy: F32
    expected: F32


class Experts(NamedTuple):
    """Linear experts: M noise levels, weights (M, K, c) and intercepts (M, K)."""

    knots: F32
    weights: F32
    intercepts: F32


class Features(NamedTuple):
    """What the gate sees: leading ones of the basis columns, and lines; see `moefast.kernels.Mixing`."""

    n_basis: int
    n_leading: int
    offsets: F32
    widths: F32
    least_continuum: np.float32


class Network(NamedTuple):
    """Layers W₁ (f, h), b₁ (h,), W₂ᵀ (k, h), b₂ (k,)."""

    w1: F32
    b1: F32
    w2t: F32
    b2: F32


class Limits(NamedTuple):
    """The least noise and spread whose logarithms the error model sees, and the range of answers, dex."""

    least_spread: np.float32
    low: np.float32
    high: np.float32


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
def add_tile(tile, i, j, p, packed, scales):
    """Add a tile of a (p, p) matrix to its upper triangle, packed row by row; scales as in `gram.add_gram`."""
    for a in range(tile.shape[0]):
        row = i + a
        start = row * p - (row * (row - 1)) // 2 - row + j
        for b in range(max(0, row - j), tile.shape[1]):
            large = 3.0 * scales[row] * scales[j + b]
            packed[start + b] += (tile[a, b] + large) - large


@njit(cache=True, inline="always")
def _add_cells(ratio, cell, cells):
    """Mean of each `cell` neighbours of `ratio`."""
    share = np.float32(1.0 / cell)
    if cell == 8:
        # In pairs, pairs of pairs, …, in place: each loop becomes SIMD, one over eight neighbours would not.
        n = ratio.size
        while n > cells.size:
            n //= 2
            for g in range(n):
                ratio[g] = ratio[2 * g] + ratio[2 * g + 1]
        for g in range(n):
            cells[g] = share * ratio[g]
    else:
        for g in range(cells.size):
            total = np.float32(0.0)
            for j in range(g * cell, (g + 1) * cell):
                total += ratio[j]
            cells[g] = share * total


@njit(nogil=True, cache=True, error_model="numpy")
def _mend_row(
    flux, error, mask, masked, clipped, reference, inverse_shape, residual, x, ratio, quotient, keys, scratch
):
    """Do the same as `centre` for a row with bad pixels, which get zero weight; sums are float64.

    Returns noise level, energy and its expectation, snr_norm, snr_median, number of good pixels, flag bits.
    """
    p = flux.size
    level, power, noise, signal, square = 0.0, 0.0, 0.0, 0.0, 0.0
    n_good = 0
    bits = np.uint32(0)
    for j in range(p):
        f, e = flux[j], error[j]
        shown = not (masked and mask[j])
        finite = abs(f) <= LARGEST32
        sound = (e > ZERO32) and (e <= LARGEST_ERROR32)
        x[j] = ZERO32
        ratio[j] = ZERO32
        if finite and sound and shown:
            d = (max(f, ZERO32) if clipped else f) - reference[j]
            s = e * e
            x[j] = d
            ratio[j] = s * inverse_shape[j]
            level += np.float64(e) * np.float64(e) * inverse_shape[j]
            power += np.float64(d) * np.float64(d) * inverse_shape[j]
            noise += np.float64(e) * np.float64(e) * residual[j]
            signal += np.float64(f) * np.float64(f)
            square += np.float64(e) * np.float64(e)
            quotient[n_good] = f / e
            n_good += 1
        elif finite and shown and not sound:
            bits |= np.uint32(4)
    if 2 * n_good < p:
        bits |= np.uint32(2)
    if n_good == 0:
        return 0.0, 0.0, 0.0, np.nan, np.nan, 0, bits | np.uint32(1)
    median = quantile(quotient, n_good, 0.5, keys, scratch)
    log_level = 0.5 * math.log(level / n_good) if level > 0.0 else 0.0
    return log_level, power, noise, math.sqrt(signal / square), median, n_good, bits


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def centre(
    flux, error, mask, clipped, reference, inverse_shape, residual, cell, lines, starts, stops,
    x, cells, windows, log_level, energy, expected, snr_norm, snr_median, n_good, flag,
):  # fmt: skip
    """X = flux − reference, and all else that one look at flux and error gives, row by row.

    Noise level ln s, energy Σx²/D and its expectation, σ²/D in cells, line windows, both SNRs, flags.
    """
    n, p = flux.shape
    masked = mask.shape[0] > 0
    ratio, quotient = np.empty(p, np.float32), np.empty(p + 1, np.float32)
    keys, scratch = np.empty(p + 2, np.int32), quantile_scratch()
    # Median of flux/error over mean flux by mean error differs by a per cent between stars: it tells where to look.
    usual = np.float32(1.0)
    for i in range(n):
        level, power, noise, signal, square = ZERO32, ZERO32, ZERO32, ZERO32, ZERO32
        light, dark = ZERO32, ZERO32
        bad = np.int32(0)
        row, one_sigma, centred = flux[i], error[i], x[i]
        for j in range(p):
            f, e = row[j], one_sigma[j]
            # A comparison with NaN is false. Bits instead of `and` keep the loop free of branches.
            good = (abs(f) <= LARGEST32) & (e > ZERO32) & (e <= LARGEST_ERROR32)
            bad = np.int32(bad + np.int32(not good))
            d = (max(f, ZERO32) if clipped else f) - reference[j]
            s = e * e
            r = s * inverse_shape[j]
            centred[j] = d
            ratio[j] = r
            quotient[j] = f / e
            level += r
            power += d * d * inverse_shape[j]
            noise += s * residual[j]
            signal += f * f
            square += s
            light += f
            dark += e
        if masked:
            hidden = np.int32(0)
            for j in range(p):
                hidden = np.int32(hidden + np.int32(mask[i, j]))
            bad += hidden
        # Squares of absurdly large or small numbers do not fit float32; the other way of adding does not mind.
        if bad > 0 or not (signal <= LARGEST32) or not (signal >= LEAST_SUM) or not (square >= LEAST_SUM):
            found = _mend_row(
                row, one_sigma, mask[i] if masked else mask.reshape(-1), masked, clipped,
                reference, inverse_shape, residual, centred, ratio, quotient, keys, scratch,
            )  # fmt: skip
            log_level[i], energy[i], expected[i] = found[0], found[1], found[2]
            snr_norm[i], snr_median[i], n_good[i], flag[i] = found[3], found[4], found[5], found[6]
        else:
            log_level[i] = 0.5 * math.log(level / p)
            energy[i] = power
            expected[i] = noise
            snr_norm[i] = math.sqrt(signal / square)
            ratio_of_means = light / dark
            median = np.float32(median_near(quotient, p, usual * ratio_of_means, keys, scratch))
            snr_median[i] = median
            if ratio_of_means > ZERO32 and median > ZERO32:
                usual += np.float32(0.1) * (median / ratio_of_means - usual)
            n_good[i] = p
            flag[i] = 0
        _add_cells(ratio, cell, cells[i])
        for w in range(lines.shape[0]):
            total = ZERO32
            for j in range(starts[w], stops[w]):
                total += centred[j] * lines[w, j]
            windows[i, w] = total


@njit(cache=True, inline="always")
def exp32(x):
    """Exponential in float32 to 2 units of the last place, in SIMD: 2^k e^r with |r| ≤ ln 2 / 2, a series in r."""
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    k = np.int32(math.floor(x * np.float32(1.4426950408889634) + np.float32(0.5)))
    # ln 2 in two parts, of which the first has few digits: the difference is exact.
    r = x - np.float32(k) * np.float32(0.693359375)
    r -= np.float32(k) * np.float32(-2.12194440e-4)
    series = np.float32(1.0 / 5040.0)
    series = series * r + np.float32(1.0 / 720.0)
    series = series * r + np.float32(1.0 / 120.0)
    series = series * r + np.float32(1.0 / 24.0)
    series = series * r + np.float32(1.0 / 6.0)
    series = series * r + np.float32(0.5)
    series = series * r + np.float32(1.0)
    series = series * r + np.float32(1.0)
    return series * np.int32(np.int32(k + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(cache=True, inline="always")
def log32(x):
    """Logarithm of positive normal numbers in float32, in SIMD: x = 2^k m, ln m = 2 artanh f with f = (m − 1)/(m + 1).

    With m between √½ and √2 the series in f² breaks off at 3e-9.
    """
    bits = np.float32(x).view(np.int32)
    # Counted from √½: a mantissa above √2 belongs to the next power of two.
    k = np.int32(np.int32(bits - np.int32(0x3F3504F3)) >> np.int32(23))
    m = np.int32(bits - np.int32(k << np.int32(23))).view(np.float32)
    f = (m - np.float32(1.0)) / (m + np.float32(1.0))
    square = f * f
    series = np.float32(2.0 / 9.0)
    series = series * square + np.float32(2.0 / 7.0)
    series = series * square + np.float32(2.0 / 5.0)
    series = series * square + np.float32(2.0 / 3.0)
    # ln 2 in two parts, as in `exp32`.
    small = f * square * series + np.float32(k) * np.float32(-2.12194440e-4)
    return np.float32(k) * np.float32(0.693359375) + (np.float32(2.0) * f + small)


@njit(cache=True, inline="always")
def _hidden(features, network, active):
    """Active = tanh(f W₁ + b₁)."""
    w1, b1 = network.w1, network.b1
    for h in range(active.size):
        active[h] = b1[h]
    for f in range(features.size):
        feature = features[f]
        for h in range(active.size):
            active[h] += feature * w1[f, h]
    for h in range(active.size):
        # The exponential is bounded, so NaN must be kept by hand.
        a = active[h]
        power = exp32(np.float32(2.0) * a)
        t = (power - np.float32(1.0)) / (power + np.float32(1.0))
        active[h] = a if math.isnan(a) else t


@njit(cache=True, inline="always")
def _dot(a, b):
    total = ZERO32
    for j in range(a.size):
        total += a[j] * b[j]
    return total


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def perceptron(features, network, out):
    """Out = tanh(f W₁ + b₁) W₂ + b₂, row by row."""
    active = np.empty(network.b1.size, np.float32)
    w2t, b2 = network.w2t, network.b2
    for i in range(len(features)):
        _hidden(features[i], network, active)
        for k in range(b2.size):
            out[i, k] = b2[k] + _dot(active, w2t[k])


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def soft_mix(rows, experts, seen, gate_network, error_network, limits, others, out):
    """From projected spectra to the mixture's answer, row by row: levels, features, gate, mix, error.

    Parameters
    ----------
    rows : ProjectedRows
    experts : Experts
    seen : Features
    gate_network, error_network : Network
    limits : Limits
    others : moefast.kernels.Given or None
        None is compiled on its own: as if there could be no others.
    out : moefast.kernels.Mixed
    """
    columns, windows, variances, log_level, energy, expected = rows
    knots, expert_weights, intercepts = experts
    n_basis, n_leading, offsets, widths, least_continuum = seen
    floor, low, high = limits
    log_g, log_g_err, log_g_err_raw, weights, expert_log_g, chi2 = out
    n, (n_levels, n_experts) = len(columns), intercepts.shape
    first = knots[0]
    step = (knots[n_levels - 1] - first) / np.float32(n_levels - 1)
    n_lines = widths.size
    n_features = 2 * n_lines + 1 + n_leading + 1
    features = np.empty(n_features + 3, np.float32)
    of_gate = features[:n_features]
    active = np.empty(gate_network.b1.size, np.float32)
    active_of_error = np.empty(error_network.b1.size, np.float32)
    for i in range(n):
        # Noise level, and its place between two knots.
        level = log_level[i]
        level = first if math.isnan(level) else min(max(level, first), knots[n_levels - 1])
        m = min(int((level - first) / step), n_levels - 2)
        upper = min(max((level - first) / step - np.float32(m), np.float32(0.0)), np.float32(1.0))
        lower = np.float32(1.0) - upper

        z = columns[i]
        inside = ZERO32
        for c in range(n_basis):
            inside += z[c] * z[c]
        chi2[i] = (energy[i] - inside) / max(expected[i], np.float32(1e-30))

        # Depths and equivalent widths; the sum of all widths but the last line's stands before the last line.
        triplet = ZERO32
        for w in range(n_lines):
            core = windows[i, 3 * w] + offsets[3 * w]
            integral = windows[i, 3 * w + 1] + offsets[3 * w + 1]
            continuum = max(windows[i, 3 * w + 2] + offsets[3 * w + 2], least_continuum)
            width = widths[w] - integral / continuum
            place = 2 * w if w < n_lines - 1 else 2 * w + 1
            features[place] = np.float32(1.0) - core / continuum
            features[place + 1] = width
            if w < n_lines - 1:
                triplet += width
        features[2 * n_lines - 2] = triplet
        for c in range(n_leading):
            features[2 * n_lines + 1 + c] = z[c]
        features[n_features - 1] = level

        _hidden(of_gate, gate_network, active)
        gate, each = weights[i], expert_log_g[i]
        top = np.float32(-np.inf)
        for k in range(n_experts):
            gate[k] = gate_network.b2[k] + _dot(active, gate_network.w2t[k])
            if others is not None:
                gate[k] += others.logits[i, k]
            top = max(top, gate[k])
        norm = ZERO32
        for k in range(n_experts):
            power = exp32(gate[k] - top)
            if others is not None:
                # The exponential is bounded from below.
                power = ZERO32 if gate[k] == np.float32(-np.inf) else power
            gate[k] = gate[k] if math.isnan(gate[k]) else power
            norm += gate[k]
        mixed, raw = ZERO32, ZERO32
        for k in range(n_experts):
            gate[k] /= norm
            below = _dot(z, expert_weights[m, k]) + intercepts[m, k]
            above = _dot(z, expert_weights[m + 1, k]) + intercepts[m + 1, k]
            each[k] = lower * below + upper * above
            variance = lower * variances[i, m * n_experts + k] + upper * variances[i, (m + 1) * n_experts + k]
            sigma = math.sqrt(variance)
            # Numba leaves a branch out of the compiled code only if nothing but None is asked for.
            if others is not None:  # noqa: SIM102
                if not math.isnan(others.values[i, k]):
                    each[k] = others.values[i, k]
                    sigma = others.noise[i, k]
            mixed += gate[k] * each[k]
            raw += gate[k] * sigma
        spread = ZERO32
        for k in range(n_experts):
            apart = each[k] - mixed
            spread += gate[k] * apart * apart

        answer = mixed if math.isnan(mixed) else min(max(mixed, low), high)
        log_g[i] = answer
        log_g_err_raw[i] = raw
        features[n_features] = answer
        features[n_features + 1] = math.log(max(raw, floor))
        features[n_features + 2] = math.log(max(math.sqrt(spread), floor))
        _hidden(features, error_network, active_of_error)
        log_error = error_network.b2[0] + _dot(active_of_error, error_network.w2t[0])
        log_g_err[i] = math.exp(log_error)
