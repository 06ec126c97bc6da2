"""Spectra on a grid of their own, brought to a common grid.

Let F(x) = ∫ f dλ up to x, known at the edges of the pixels that were measured. An output pixel from x₁ to x₂ gets

    g = (F(x₂) − F(x₁)) / (x₂ − x₁),

F between the edges from six of them (Lagrange, fifth degree). So flux is conserved whatever the widths of the pixels.
g = Σ w_k f_k is linear in the spectrum, and the variance that is handed out with it is

    var = (Σ w_k² σ_k² Δ_k / Σ w_k²) / (Δ q),        sums over good pixels,

Δ_k and Δ the widths of input and output pixels and q the share of the output pixel that good pixels cover.

Design: the noise of neighbouring output pixels is correlated wherever a shift is no whole number of pixels. The
variance of g alone, Σ w² σ², would promise up to 1.4 times too much to everyone who takes pixels for independent. What
such a reader needs is the power of the noise where spectral lines have theirs, well below one cycle per two pixels:
σ_k² Δ_k is that power, and it is what the formula carries over. Six edges instead of two keep lines three pixels wide
to 0.7 % of their depth at any shift, and the noise nearly white: Σ w² is 0.71 to 1, with two
edges 0.5 to 1. A sum of squares over pixels, χ², is that much below its expectation; what is fitted to lines is not.

Pixels that are bad are filled by a straight line between the good ones beside them, so that they cannot reach their
neighbours, and output pixels of which they cover more than a quarter are lost. Where spectra have a hole (pixels that
are left out, the range between two arms), a bad pixel is put in.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moefast.core.threads import in_threads
from moefast.kernels.quality import quantile, quantile_scratch

__all__ = ["GOOD", "LEAST_COVERED", "NOT_FINITE", "NOT_INCREASING", "normalise", "pixel_edges", "resample"]

GOOD, NOT_FINITE, NOT_INCREASING = 0, 1, 2
"""What `resample` says of the wavelengths of a row."""
LEAST_COVERED = 0.75
"""Share of an output pixel that good pixels must cover."""
GAP = 1.5
"""Spacings larger than this times the smaller one beside them are holes."""
PAD = 3
"""Bad pixels put before the first and after the last one, and measured ones kept beyond the output grid."""
REACH = 2
"""Pixels on either side of the one that an edge falls into that have a part in F there."""


def pixel_edges(wave: NDArray[np.float64]) -> NDArray[np.float64]:
    """Edges (p + 1,) of pixels whose centres are given: halfway between them, the outer ones by symmetry."""
    middle = (wave[:-1] + wave[1:]) / 2
    return np.concatenate([[1.5 * wave[0] - 0.5 * wave[1]], middle, [1.5 * wave[-1] - 0.5 * wave[-2]]])


def resample(
    wave: NDArray[np.float64],
    flux: NDArray,
    error: NDArray,
    bad: NDArray[np.bool_],
    starts: NDArray[np.int64],
    factor: NDArray[np.float64],
    edges: NDArray[np.float64],
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], NDArray[np.int64]]:
    """Rows of any length on one output grid.

    Parameters
    ----------
    wave : array of shape (m,) or (k,), Å
        Centres of the pixels of all rows, one row after the other; or of one row, if all rows have the same ones.
    flux, error : array of shape (m,)
        Flux density and its 1σ.
    bad : array of shape (m,), bool
        Pixels that must not be used; neither are those that are not finite or whose error is not positive.
    starts : array of shape (n + 1,), int64
        Where the rows begin, and m.
    factor : array of shape (n,)
        λ of the file / λ of the output grid: 1 + v/c.
    edges : array of shape (p + 1,), Å
        Edges of the output pixels.

    Returns
    -------
    flux, error : array of shape (n, p), float32
        0 and infinite where nothing is known.
    mask : array of shape (n, p), bool
        True where nothing is known.
    status : array of shape (n, 2), int64
        `GOOD`, `NOT_FINITE` or `NOT_INCREASING`, and the pixel of the row that it is said of.
    """
    n, p = len(starts) - 1, len(edges) - 1
    shared = not (n == 1 and len(wave) == len(flux)) and len(wave) != len(flux)
    if len(flux) != len(error) or len(flux) != len(bad) or (starts[0], starts[-1]) != (0, len(flux)):
        raise ValueError(
            f"flux, error, bad and starts must fit together; found {len(flux)}, {len(error)}, {len(bad)} pixels, "
            f"rows from {starts[0]} to {starts[-1]}"
        )
    if factor.shape != (n,) or (shared and np.any(np.diff(starts) != len(wave))):
        raise ValueError(f"{n} rows of {len(wave)} wavelengths and a factor each expected")
    out = np.empty((n, p), np.float32), np.empty((n, p), np.float32), np.empty((n, p), np.bool_)
    status = np.zeros((n, 2), np.int64)

    def part(first: int, stop: int) -> None:
        rows = slice(first, stop)
        _rows(wave, shared, flux, error, bad, starts[first : stop + 1], factor[rows], edges,
              out[0][rows], out[1][rows], out[2][rows], status[rows])  # fmt: skip

    in_threads(n, part, least=8)
    return *out, status


@njit(cache=True, nogil=True, error_model="numpy")
def _partial(d, c):
    """Share of each of five pixels in F(e_i + d Δ_i) − F(e_i), from the six edges around: fifth degree, 0 ≤ d ≤ 1."""
    a, b, e, f, g = d + 2, d + 1, d - 1, d - 2, d - 3
    l0 = -b * d * e * f * g * (1 / 120)
    l1 = a * d * e * f * g * (1 / 24)
    l3 = a * b * d * f * g * (1 / 12)
    l4 = -a * b * d * e * g * (1 / 24)
    l5 = a * b * d * e * f * (1 / 120)
    c[0] = -l0
    c[1] = -l0 - l1
    c[2] = l3 + l4 + l5
    c[3] = l4 + l5
    c[4] = l5


@njit(cache=True, nogil=True, error_model="numpy")
def _lay_out(wave, first, last, at, flux, error, bad, edge, value, power, ok):
    """Good and bad pixels first … last without holes between them, padded; their number."""
    count = PAD
    n = last - first + 1
    any_good = False
    for i in range(n):
        w = wave[first + i]
        before = w - wave[first + i - 1] if i > 0 else wave[first + 1] - w
        after = wave[first + i + 1] - w if i < n - 1 else before
        left, right = before / 2, after / 2
        # A hole on one side: the pixel is as wide there as on the other.
        hole = False
        if i < n - 1:
            beyond = wave[first + i + 2] - wave[first + i + 1] if i < n - 2 else after
            hole = after > GAP * min(before, beyond)
        if before > GAP * after:
            left = after / 2
        if hole:
            right = min(before, after) / 2
        j = at + first + i
        f, s = np.float64(flux[j]), np.float64(error[j])
        good = (not bad[j]) and np.isfinite(f) and s > 0 and np.isfinite(s)
        if i == 0:
            edge[count] = w - left
        value[count], ok[count] = f, good
        power[count] = s * s if good else 0.0
        edge[count + 1] = w + right
        if good:
            any_good = True
        count += 1
        if hole:
            next_left = min(after, wave[first + i + 2] - wave[first + i + 1] if i < n - 2 else after) / 2
            edge[count + 1] = wave[first + i + 1] - next_left
            value[count], ok[count], power[count] = 0.0, False, 0.0
            if edge[count + 1] > edge[count]:
                count += 1
            else:
                edge[count] = 0.5 * (w + wave[first + i + 1])
    if not any_good:
        return 0
    width = edge[PAD + 1] - edge[PAD]
    for k in range(PAD):
        edge[k] = edge[PAD] - (PAD - k) * width
        value[k], ok[k], power[k] = 0.0, False, 0.0
    width = edge[count] - edge[count - 1]
    for _ in range(PAD):
        edge[count + 1] = edge[count] + width
        value[count], ok[count], power[count] = 0.0, False, 0.0
        count += 1
    # Bad pixels: a straight line between the good ones, flat beyond the outer ones.
    previous = -1
    for k in range(count):
        if ok[k]:
            if previous < 0:
                for q in range(k):
                    value[q] = value[k]
            elif k > previous + 1:
                x0 = edge[previous] + edge[previous + 1]
                slope = (value[k] - value[previous]) / (edge[k] + edge[k + 1] - x0)
                for q in range(previous + 1, k):
                    value[q] = value[previous] + slope * (edge[q] + edge[q + 1] - x0)
            previous = k
    for q in range(previous + 1, count):
        value[q] = value[previous]
    return count


@njit(cache=True, nogil=True, error_model="numpy")
def _locate(wave, low, high):
    """First and last pixel that the output needs, and what is wrong with the wavelengths: status and pixel."""
    first = last = -1
    for i in range(len(wave)):
        w = wave[i]
        if not np.isfinite(w):
            return -1, -1, NOT_FINITE, i
        if low <= w <= high:
            if first < 0:
                first = i
            last = i
    if first < 0:
        return -1, -1, GOOD, 0
    for i in range(first, last):
        if wave[i + 1] <= wave[i]:
            return -1, -1, NOT_INCREASING, i + 1
    for _ in range(PAD + 1):
        # What lies beyond may be another arm.
        if first > 0 and wave[first - 1] < wave[first]:
            first -= 1
        if last < len(wave) - 1 and wave[last + 1] > wave[last]:
            last += 1
    return first, last, GOOD, 0


@njit(cache=True, nogil=True, error_model="numpy")
def _shares(x, i, edge, width, c):
    """Weights of five pixels in F(x) − F(e_i), x in pixel i; how far into it x lies, as a share of it."""
    d = min(max((x - edge[i]) / width[i], 0.0), 1.0)
    _partial(d, c)
    # A constant spectrum stays constant however the widths change: it is taken out and put back exactly.
    whole = d * width[i]
    for k in range(5):
        if k != REACH:
            c[k] *= width[i + k - REACH]
            whole -= c[k]
    c[REACH] = whole
    return d


@njit(cache=True, nogil=True, error_model="numpy")
def _rows(wave, shared, flux, error, bad, starts, factor, edges, out_flux, out_error, out_mask, status):
    n, p = out_flux.shape
    longest = 0
    for r in range(n):
        longest = max(longest, starts[r + 1] - starts[r])
    size = 2 * longest + 2 * PAD + 2
    edge, value, power = np.empty(size), np.empty(size), np.empty(size)
    width, known = np.empty(size), np.empty(size)
    ok = np.empty(size, np.bool_)
    weight = np.empty(size)
    c1, c2 = np.empty(5), np.empty(5)
    for r in range(n):
        begin, stop = starts[r], starts[r + 1]
        lam = wave if shared else wave[begin:stop]
        out_flux[r], out_error[r], out_mask[r] = np.float32(0), np.float32(np.inf), True
        z = factor[r]
        first, last, status[r, 0], status[r, 1] = _locate(lam, edges[0] * z, edges[p] * z)
        if first < 0 or last == first:
            continue
        count = _lay_out(lam, first, last, begin, flux, error, bad, edge, value, power, ok)
        if count == 0:
            continue
        for k in range(count):
            width[k] = edge[k + 1] - edge[k]
            power[k] *= width[k]
            known[k] = 1.0 if ok[k] else 0.0
        i1 = REACH
        x1 = edges[0] * z
        while i1 < count - REACH - 1 and edge[i1 + 1] <= x1:
            i1 += 1
        d1 = _shares(x1, i1, edge, width, c1)
        for j in range(p):
            x2 = edges[j + 1] * z
            i2 = i1
            while i2 < count - REACH - 1 and edge[i2 + 1] <= x2:
                i2 += 1
            d2 = _shares(x2, i2, edge, width, c2)
            whole = i2 - i1
            for k in range(5):
                weight[k] = -c1[k]
            for k in range(5, whole + 5):
                weight[k] = 0.0
            covered = d2 * width[i2] * known[i2] - d1 * width[i1] * known[i1]
            for k in range(whole):
                weight[k + REACH] += width[i1 + k]
                covered += width[i1 + k] * known[i1 + k]
            for k in range(5):
                weight[whole + k] += c2[k]
            total = norm = noise = 0.0
            base = i1 - REACH
            for k in range(whole + 5):
                w = weight[k]
                w2 = w * w
                total += w * value[base + k]
                norm += w2 * known[base + k]
                noise += w2 * power[base + k]
            size_out = x2 - x1
            if covered >= LEAST_COVERED * size_out and norm > 0:
                out_flux[r, j] = total / size_out
                out_error[r, j] = np.sqrt(noise / (norm * min(covered, size_out)))
                out_mask[r, j] = False
            i1, d1, x1 = i2, d2, x2
            c1, c2 = c2, c1


def normalise(flux: NDArray[np.float32], error: NDArray[np.float32], mask: NDArray[np.bool_]) -> None:
    """Divide flux and error (n, p), in place, by the median flux of the pixels that are not masked.

    A tenth of the median error is the least that a row is divided by: spectra without a star keep their sign.
    """
    if flux.dtype != np.float32 or error.dtype != np.float32 or not flux.shape == error.shape == mask.shape:
        raise ValueError(
            f"float32 of one shape expected, found {flux.dtype} {flux.shape}, {error.dtype} {error.shape}"
        )
    in_threads(len(flux), lambda a, b: _normalise(flux[a:b], error[a:b], mask[a:b]))


@njit(cache=True, nogil=True)
def _normalise(flux, error, mask):
    n, p = flux.shape
    values, keys, scratch = np.empty(p, np.float32), np.empty(p + 1, np.int32), quantile_scratch()
    for r in range(n):
        count = 0
        for j in range(p):
            if not mask[r, j] and np.isfinite(flux[r, j]) and error[r, j] > 0:
                values[count] = flux[r, j]
                count += 1
        if count == 0:
            continue
        scale = quantile(values, count, 0.5, keys, scratch)
        count = 0
        for j in range(p):
            if not mask[r, j] and np.isfinite(flux[r, j]) and error[r, j] > 0:
                values[count] = error[r, j]
                count += 1
        scale = max(scale, 0.1 * quantile(values, count, 0.5, keys, scratch))
        for j in range(p):
            flux[r, j] /= np.float32(scale)
            error[r, j] /= np.float32(scale)
