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

Weights depend on wavelengths and velocity alone. They are kept from one row to the next as long as both are the same,
which saves half of the work; that a row came after another changes no bit of it. Sums run over eight weights at a time,
in pairs, so that they do not wait for each other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moefast.core.compiled import njit
from moefast.core.threads import in_threads
from moefast.kernels.quality import quantile, quantile_scratch

__all__ = [
    "GOOD",
    "LEAST_COVERED",
    "NOT_FINITE",
    "NOT_INCREASING",
    "join",
    "normalise",
    "pixel_edges",
    "resample",
    "wrong_wavelengths",
]

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
U = np.uintp
"""Of indices that cannot be negative: compiled code need not look whether they count from the end."""


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


def wrong_wavelengths(
    wave: NDArray[np.float64],
    starts: NDArray[np.int64],
    factor: NDArray[np.float64],
    edges: NDArray[np.float64],
) -> NDArray[np.int64]:
    """The status (n, 2) that `resample` gives of rows, without resampling them; parameters as there."""
    n = len(starts) - 1
    status = np.zeros((n, 2), np.int64)
    shared = n > 1 and len(wave) != starts[-1]
    if factor.shape != (n,) or (shared and np.any(np.diff(starts) != len(wave))):
        raise ValueError(f"{n} rows of {len(wave)} wavelengths and a factor each expected")
    _wrong(wave, shared, starts, factor, edges, status)
    return status


@njit(cache=True, nogil=True, error_model="numpy")
def _wrong(wave, shared, starts, factor, edges, status):
    for r in range(len(status)):
        if shared and r > 0 and factor[r] == factor[r - 1]:
            status[r] = status[r - 1]
        else:
            lam = wave if shared else wave[starts[r] : starts[r + 1]]
            _, _, status[r, 0], status[r, 1] = _locate(lam, edges[0] * factor[r], edges[-1] * factor[r])


@njit(cache=True, nogil=True, error_model="numpy")
def _locate(wave, low, high):
    """First and last pixel that the output needs, and what is wrong with the wavelengths: status and pixel."""
    n = len(wave)
    first, last, n_wrong = n, -1, 0
    for i in range(n):
        w = wave[i]
        inside = (w >= low) & (w <= high)
        first = min(first, i if inside else n)
        last = max(last, i if inside else -1)
        n_wrong += not np.isfinite(w)
    if n_wrong:
        for i in range(n):
            if not np.isfinite(wave[i]):
                return -1, -1, NOT_FINITE, i
    if last < 0:
        return -1, -1, GOOD, 0
    for i in range(first, last):
        n_wrong += wave[i + 1] <= wave[i]
    if n_wrong:
        for i in range(first, last):
            if wave[i + 1] <= wave[i]:
                return -1, -1, NOT_INCREASING, i + 1
    for _ in range(PAD + 1):
        # What lies beyond may be another arm.
        if first > 0 and wave[first - 1] < wave[first]:
            first -= 1
        if last < n - 1 and wave[last + 1] > wave[last]:
            last += 1
    return first, last, GOOD, 0


@njit(cache=True, nogil=True, error_model="numpy")
def _lay_out(wave, first, last, edge, source):
    """Edges of pixels first … last, of holes between them and of what pads them; their number.

    `source` is the pixel of the file that each is, -1 if it is none.
    """
    count = PAD
    n = last - first + 1
    for i in range(n):
        w = wave[first + i]
        before = w - wave[first + i - 1] if i > 0 else wave[first + 1] - w
        after = wave[first + i + 1] - w if i < n - 1 else before
        # A hole on one side: the pixel is as wide there as on the other.
        hole = False
        if i < n - 1:
            beyond = wave[first + i + 2] - wave[first + i + 1] if i < n - 2 else after
            hole = after > GAP * min(before, beyond)
        left = after / 2 if before > GAP * after else before / 2
        right = min(before, after) / 2 if hole else after / 2
        if i == 0:
            edge[count] = w - left
        source[count] = first + i
        edge[count + 1] = w + right
        count += 1
        if hole:
            next_left = min(after, wave[first + i + 2] - wave[first + i + 1] if i < n - 2 else after) / 2
            edge[count + 1] = wave[first + i + 1] - next_left
            source[count] = -1
            if edge[count + 1] > edge[count]:
                count += 1
            else:
                edge[count] = 0.5 * (w + wave[first + i + 1])
    width = edge[PAD + 1] - edge[PAD]
    for k in range(PAD):
        edge[k] = edge[PAD] - (PAD - k) * width
        source[k] = -1
    width = edge[count] - edge[count - 1]
    for _ in range(PAD):
        edge[count + 1] = edge[count] + width
        source[count] = -1
        count += 1
    return count


@njit(cache=True, nogil=True, error_model="numpy")
def _shares(edge, width, count, edges, z, low, high, cell, share, part):
    """Pixel that each output edge from `low` to `high` falls into, and weights of five pixels in F(x) − F(e_i) there.

    Fifth degree in d, how far into its pixel x lies as a share of it: from the six edges around.
    """
    i = REACH
    for j in range(low, high + 1):
        x = edges[U(j)] * z
        while i < count - REACH - 1 and edge[U(i + 1)] <= x:
            i += 1
        cell[U(j)] = i
        share[U(j)] = min(max((x - edge[U(i)]) / width[U(i)], 0.0), 1.0)
    n = high + 1 - low
    shares = share[low : high + 1]
    p0, p1, p2 = part[0, low : high + 1], part[1, low : high + 1], part[2, low : high + 1]
    p3, p4 = part[3, low : high + 1], part[4, low : high + 1]
    for j in range(n):
        d = shares[j]
        a, b, e, f, g = d + 2, d + 1, d - 1, d - 2, d - 3
        l0 = -b * d * e * f * g * (1 / 120)
        l1 = a * d * e * f * g * (1 / 24)
        l4 = -a * b * d * e * g * (1 / 24)
        l5 = a * b * d * e * f * (1 / 120)
        p0[j] = -l0
        p1[j] = -l0 - l1
        p2[j] = d
        p3[j] = l4 + l5
        p4[j] = l5


@njit(cache=True, nogil=True, error_model="numpy")
def _most_whole(cell, low, high):
    """Largest number of pixel edges that an output pixel has inside."""
    most = 0
    for j in range(low, high):
        most = max(most, cell[U(j + 1)] - cell[U(j)])
    return most


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _in_widths(part, width, i, j):
    """Weights of five pixels in F(x) − F(e_i) at output edge j, in pixel i."""
    w2 = width[U(i)]
    c0, c1 = part[0, U(j)] * width[U(i - 2)], part[1, U(j)] * width[U(i - 1)]
    c3, c4 = part[3, U(j)] * width[U(i + 1)], part[4, U(j)] * width[U(i + 2)]
    # A constant spectrum stays constant however the widths change: it is taken out and put back exactly.
    return c0, c1, part[2, U(j)] * w2 - c0 - c1 - c3 - c4, c3, c4


@njit(cache=True, nogil=True, error_model="numpy")
def _weigh(width, cell, part, low, high, weight, norm):
    """Weights of each output pixel from `low` to `high` − 1, from the pixel two before its first edge's on; Σ w²."""
    stride = weight.shape[1]
    i = cell[U(low)]
    a0, a1, a2, a3, a4 = _in_widths(part, width, i, low)
    for j in range(low, high):
        i, beyond = cell[U(j)], cell[U(j + 1)]
        b0, b1, b2, b3, b4 = _in_widths(part, width, beyond, j + 1)
        row = weight[U(j)]
        if stride == 8 and beyond == i:
            row[0], row[1], row[2], row[3], row[4] = b0 - a0, b1 - a1, b2 - a2, b3 - a3, b4 - a4
            row[5] = row[6] = row[7] = 0.0
        elif stride == 8 and beyond == i + 1:
            row[0], row[1], row[2], row[3] = -a0, b0 - a1, width[U(i)] - a2 + b1, b2 - a3
            row[4], row[5] = b3 - a4, b4
            row[6] = row[7] = 0.0
        else:
            for k in range(stride):
                row[k] = 0.0
            row[0], row[1], row[2], row[3], row[4] = -a0, -a1, -a2, -a3, -a4
            for k in range(beyond - i):
                row[U(k + REACH)] += width[U(i + k)]
            k = beyond - i
            row[U(k)] += b0
            row[U(k + 1)] += b1
            row[U(k + 2)] += b2
            row[U(k + 3)] += b3
            row[U(k + 4)] += b4
        squares = 0.0
        for k in range(0, stride, 8):
            w0, w1, w2, w3 = row[U(k)], row[U(k + 1)], row[U(k + 2)], row[U(k + 3)]
            w4, w5, w6, w7 = row[U(k + 4)], row[U(k + 5)], row[U(k + 6)], row[U(k + 7)]
            squares += (w0 * w0 + w4 * w4 + (w2 * w2 + w6 * w6)) + (w1 * w1 + w5 * w5 + (w3 * w3 + w7 * w7))
        norm[U(j)] = squares
        a0, a1, a2, a3, a4 = b0, b1, b2, b3, b4


@njit(cache=True, nogil=True, error_model="numpy")
def _fill(source, width, count, contiguous, at, flux, error, bad, value, power, n_bad):
    """Flux and σ² Δ of a row's pixels as they were laid out, and how many bad ones there are before each of them."""
    for k in range(PAD):
        value[k] = value[count - 1 - k] = power[k] = power[count - 1 - k] = 0.0
        n_bad[k + 1] = n_bad[count - k] = 1
    n = count - 2 * PAD
    values, powers, widths = value[PAD : PAD + n], power[PAD : PAD + n], width[PAD : PAD + n]
    wrong = n_bad[PAD + 1 : PAD + 1 + n]
    if contiguous:
        start = at + source[PAD]
        fluxes, errors, bads = flux[start : start + n], error[start : start + n], bad[start : start + n]
        for k in range(n):
            f, s = np.float64(fluxes[k]), np.float64(errors[k])
            good = (not bads[k]) & (abs(f) < np.inf) & (s > 0) & (s < np.inf)
            values[k] = f if good else 0.0
            powers[k] = s * s * widths[k] if good else 0.0
            wrong[k] = 0 if good else 1
    else:
        for k in range(n):
            i = at + max(source[PAD + k], 0)
            f, s = np.float64(flux[i]), np.float64(error[i])
            good = (source[PAD + k] >= 0) & (not bad[i]) & (abs(f) < np.inf) & (s > 0) & (s < np.inf)
            values[k] = f if good else 0.0
            powers[k] = s * s * widths[k] if good else 0.0
            wrong[k] = 0 if good else 1
    n_bad[0] = total = 0
    for k in range(count):
        total += n_bad[k + 1]
        n_bad[k + 1] = total


@njit(cache=True, nogil=True, error_model="numpy")
def _bridge(edge, count, value, n_bad):
    """Values of bad pixels: a straight line between the good ones beside them, flat beyond the outer ones."""
    previous = -1
    for k in range(count):
        if n_bad[k + 1] == n_bad[k]:
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


@njit(cache=True, nogil=True, error_model="numpy")
def _known(weight, cell, share, width, n_bad, j):
    """Of output pixel j: what good pixels cover of it, and Σ w² over them."""
    i1, i2 = cell[j], cell[j + 1]
    covered = squares = 0.0
    for i in range(i1, i2 + 1):
        if n_bad[i + 1] == n_bad[i]:
            covered += ((share[j + 1] if i == i2 else 1.0) - (share[j] if i == i1 else 0.0)) * width[i]
    for i in range(i1 - REACH, i2 + REACH + 1):
        if n_bad[i + 1] == n_bad[i]:
            squares += weight[j, i - i1 + REACH] ** 2
    return covered, squares


@njit(cache=True, nogil=True, error_model="numpy")
def _apply(weight, norm, cell, share, width, edges, z, low, high, value, power, n_bad, flux, variance, mask):
    """Flux and variance of one row's output pixels from `low` to `high` − 1."""
    stride = weight.shape[1]
    for j in range(low, high):
        base, stop = cell[U(j)] - REACH, cell[U(j + 1)] + REACH + 1
        size = edges[U(j + 1)] * z - edges[U(j)] * z
        covered, squares = size, norm[U(j)]
        if n_bad[U(stop)] != n_bad[U(base)]:
            covered, squares = _known(weight, cell, share, width, n_bad, j)
            if not (covered >= LEAST_COVERED * size and squares > 0):
                continue
        total = noise = 0.0
        for k in range(0, stride, 8):
            row = weight[U(j)]
            w0, w1, w2, w3 = row[U(k)], row[U(k + 1)], row[U(k + 2)], row[U(k + 3)]
            w4, w5, w6, w7 = row[U(k + 4)], row[U(k + 5)], row[U(k + 6)], row[U(k + 7)]
            i = base + k
            v0, v1, v2, v3 = value[U(i)], value[U(i + 1)], value[U(i + 2)], value[U(i + 3)]
            v4, v5, v6, v7 = value[U(i + 4)], value[U(i + 5)], value[U(i + 6)], value[U(i + 7)]
            total += (w0 * v0 + w4 * v4 + (w2 * v2 + w6 * v6)) + (w1 * v1 + w5 * v5 + (w3 * v3 + w7 * v7))
            w0, w1, w2, w3 = w0 * w0, w1 * w1, w2 * w2, w3 * w3
            w4, w5, w6, w7 = w4 * w4, w5 * w5, w6 * w6, w7 * w7
            v0, v1, v2, v3 = power[U(i)], power[U(i + 1)], power[U(i + 2)], power[U(i + 3)]
            v4, v5, v6, v7 = power[U(i + 4)], power[U(i + 5)], power[U(i + 6)], power[U(i + 7)]
            noise += (w0 * v0 + w4 * v4 + (w2 * v2 + w6 * v6)) + (w1 * v1 + w5 * v5 + (w3 * v3 + w7 * v7))
        flux[U(j)] = total / size
        variance[U(j)] = noise / (squares * min(covered, size))
        mask[U(j)] = False


@njit(cache=True, nogil=True, error_model="numpy")
def _rows(wave, shared, flux, error, bad, starts, factor, edges, out_flux, out_error, out_mask, status):
    n, p = out_flux.shape
    longest = 0
    for r in range(n):
        longest = max(longest, starts[r + 1] - starts[r])
    size = 2 * longest + 2 * PAD + 2
    edge, width, source = np.empty(size), np.empty(size), np.empty(size, np.int64)
    value, power, n_bad = np.empty(size), np.empty(size), np.empty(size, np.int32)
    cell, share, part = np.empty(p + 1, np.int64), np.empty(p + 1), np.empty((5, p + 1))
    weight, norm, variance = np.empty((p, 8)), np.empty(p), np.empty(p)
    first = last = count = low = high = 0
    what, where = GOOD, 0
    for r in range(n):
        z = factor[r]
        if not shared or r == 0 or z != factor[r - 1]:
            lam = wave if shared else wave[starts[r] : starts[r + 1]]
            first, last, what, where = _locate(lam, edges[0] * z, edges[p] * z)
            if first >= 0 and last > first:
                count = _lay_out(lam, first, last, edge, source)
                for k in range(count):
                    width[k] = edge[k + 1] - edge[k]
                low, high = 0, p
                while low < high and edges[low + 1] * z <= edge[PAD]:
                    low += 1
                while high > low and edges[high - 1] * z >= edge[count - PAD]:
                    high -= 1
                _shares(edge, width, count, edges, z, low, high, cell, share, part)
                taps = _most_whole(cell, low, high) + 5
                if taps > weight.shape[1]:
                    # Eight at a time.
                    weight = np.empty((p, (taps + 7) // 8 * 8))
                if count + weight.shape[1] > len(value):
                    value, power = np.empty(count + weight.shape[1]), np.empty(count + weight.shape[1])
                _weigh(width, cell, part, low, high, weight, norm)
        status[r, 0], status[r, 1] = what, where
        for j in range(p):
            out_flux[r, j], variance[j], out_mask[r, j] = np.float32(0), np.inf, True
        if first >= 0 and last > first:
            contiguous = count == last - first + 1 + 2 * PAD
            _fill(source, width, count, contiguous, starts[r], flux, error, bad, value, power, n_bad)
            if n_bad[count] < count:
                _bridge(edge, count, value, n_bad)
                for k in range(count, count + weight.shape[1]):
                    value[k] = power[k] = 0.0
                _apply(weight, norm, cell, share, width, edges, z, low, high, value, power, n_bad,
                       out_flux[r], variance, out_mask[r])  # fmt: skip
        for j in range(p):
            out_error[r, j] = np.sqrt(variance[j])


def join(
    flux: NDArray[np.float32], error: NDArray[np.float32], mask: NDArray[np.bool_],
    beside: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]],
) -> None:  # fmt: skip
    """Spectra (n, p) of an arm, in place, joined with those of another on the same grid: `beside`, in the same order.

    Where both have a pixel, the mean weighed by variances, (f₁ σ₂² + f₂ σ₁²) / (σ₁² + σ₂²); where one has, that one.
    """
    arrays = (flux, error, mask, *beside)
    if any(array.shape != flux.shape for array in arrays):
        raise ValueError(f"arms of one shape expected, found {[array.shape for array in arrays]}")
    in_threads(len(flux), lambda a, b: _join(*(array[a:b] for array in arrays)))


@njit(cache=True, nogil=True, error_model="numpy")
def _join(flux, error, mask, flux2, error2, mask2):
    n, p = flux.shape
    for r in range(n):
        for j in range(p):
            if mask2[r, j]:
                continue
            if mask[r, j]:
                flux[r, j], error[r, j], mask[r, j] = flux2[r, j], error2[r, j], False
                continue
            v1, v2 = np.float64(error[r, j]) ** 2, np.float64(error2[r, j]) ** 2
            flux[r, j] = (flux[r, j] * v2 + flux2[r, j] * v1) / (v1 + v2)
            error[r, j] = np.sqrt(v1 * v2 / (v1 + v2))


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
