"""Good and bad pixels, good and bad rows, signal-to-noise ratios: the loops behind `moefast.spectra.quality`.

Design: every number of a row comes from that row alone, in an order that does not depend on its place in a block or
on the number of threads. Quantiles are found by counting, not by sorting: a dozen counts of a row, each without a
branch, are several times faster than partitioning it. Rows are shared out to threads of Python: Numba's own end the
process when two threads call them, or after a fork.
"""

from __future__ import annotations

import math

import numpy as np

from moefast.core.compiled import njit
from moefast.core.threads import in_threads

__all__ = [
    "LARGEST_ERROR",
    "any_bad",
    "assess",
    "error_statistics",
    "mark_good",
    "quantile",
    "quantile_scratch",
]

LARGEST_ERROR = 1e6
"""Errors above this, where flux is about 1, are a way to say "no information": the pixel is bad."""
LARGEST32 = np.float32(np.finfo(np.float32).max)
LARGEST_ERROR32 = np.float32(LARGEST_ERROR)
ZERO32 = np.float32(0)
FEW = 6
"""Values that are put in order one by one: narrowing further would take longer."""
STRIP = 128
"""Values of a row that are looked at together for one that lies within a range."""
GUESS_SPREAD = 250_000
"""Of the bits of a float32 on either side of a guess: 1.5 to 3 %."""


def any_bad(flux, error):
    """Whether any pixel is not finite in flux, or has an error that is not positive or above `LARGEST_ERROR`."""
    found = []
    in_threads(len(flux), lambda a, b: found.append(_any_bad(flux[a:b], error[a:b])))
    return any(found)


@njit(cache=True, nogil=True)
def _any_bad(flux, error):
    """See `any_bad`."""
    n, p = flux.shape
    n_bad = 0
    for i in range(n):
        bad = np.int32(0)
        for j in range(p):
            f, e = flux[i, j], error[i, j]
            # A comparison with NaN is false. Bits instead of `and` keep the loop free of branches.
            ok = (abs(f) <= LARGEST32) & (e > ZERO32) & (e <= LARGEST_ERROR32)
            bad += np.int32(not ok)
        n_bad += int(bad > 0)
    return n_bad > 0


def mark_good(flux, error, mask, good):
    """Fill `good` (n, p); `mask` has no rows where there is none. Return whether any pixel is bad."""
    found = []
    in_threads(len(flux), lambda a, b: found.append(_mark_good(flux[a:b], error[a:b], mask[a:b], good[a:b])))
    return any(found)


@njit(cache=True, nogil=True)
def _mark_good(flux, error, mask, good):
    """See `mark_good`."""
    n, p = flux.shape
    masked = mask.shape[0] > 0
    n_bad = 0
    for i in range(n):
        bad = np.int32(0)
        if masked:
            for j in range(p):
                f, e = flux[i, j], error[i, j]
                ok = (abs(f) <= LARGEST32) & (e > ZERO32) & (e <= LARGEST_ERROR32) & (not mask[i, j])
                good[i, j] = ok
                bad += np.int32(not ok)
        else:
            for j in range(p):
                f, e = flux[i, j], error[i, j]
                ok = (abs(f) <= LARGEST32) & (e > ZERO32) & (e <= LARGEST_ERROR32)
                good[i, j] = ok
                bad += np.int32(not ok)
        n_bad += int(bad > 0)
    return n_bad > 0


@njit(cache=True, inline="always")
def _ordered(bits):
    """Map the bits of a float32 to an int32 of the same order; its own inverse."""
    # Every step is narrowed by hand: Numba widens to int64, which halves the speed of all that follows.
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@njit(cache=True)
def _count_to(keys, n, pivot):
    """Return how many of keys[:n] are at most `pivot`."""
    # Numba widens sums of int32: unless it is narrowed at every step, the count runs at half speed.
    count = np.int32(0)
    for j in range(np.uint32(n)):
        count = np.int32(count + np.int32(keys[j] <= pivot))
    return count


@njit(cache=True)
def _narrow(keys, n, k, low, below, high, upto):
    """Narrow low … high around the k-th smallest of keys[:n] until at most `FEW` keys lie between.

    `below` keys are less than `low`, `upto` keys are at most `high`, and below ≤ k < upto. The range is cut where the
    counts so far let the k-th be expected, a little to the side on which more keys lie, so that these are cut off; or
    in the middle, where that was misleading.
    """
    halve = False
    while low < high and upto - below > FEW:
        width = upto - below
        share = (k + 0.5 - below) / width
        aside = min(0.4 * FEW, 0.5 * width) / width
        share = 0.5 if halve else share + (aside if share < 0.5 else -aside)
        pivot = np.int32(np.int64(low) + np.int64(share * (np.int64(high) - np.int64(low) - 1)))
        count = _count_to(keys, n, pivot)
        if count > k:
            high, upto = pivot, count
        else:
            low, below = np.int32(pivot + 1), count
        halve = 2 * (upto - below) > width and not halve
    return low, below, high, upto


@njit(cache=True)
def _insert(keys, start, stop, low, high, found, m):
    """Put the keys[start:stop] within low … high into their places in found[:m]; return the new m."""
    for j in range(start, stop):
        key = keys[j]
        if low <= key <= high:
            i = m
            while i > 0 and found[i - 1] > key:
                found[i] = found[i - 1]
                i -= 1
            found[i] = key
            m += 1
    return m


@njit(cache=True)
def _few_between(keys, n, low, high, found):
    """Put the keys within low … high, `found.size` at most, into `found` in order."""
    m = 0
    strips = n // STRIP
    for strip in range(strips):
        part = keys[strip * STRIP : (strip + 1) * STRIP]
        inside = np.int32(0)
        for j in range(STRIP):
            inside = np.int32(inside + np.int32((part[j] >= low) & (part[j] <= high)))
        if inside > 0:
            m = _insert(part, 0, STRIP, low, high, found, m)
    _insert(keys, strips * STRIP, n, low, high, found, m)


@njit(cache=True)
def _pick(keys, n, k, low, below, high, upto, found):
    """Return the k-th smallest of keys[:n], counted from 0, which lies within low … high; see `_narrow`."""
    low, below, high, _ = _narrow(keys, n, k, low, below, high, upto)
    if low == high:
        return np.int32(low)
    _few_between(keys, n, np.int32(low), np.int32(high), found)
    return found[k - below]


@njit(cache=True)
def _next_above(keys, n, first):
    """Return the smallest of keys[:n] above `first`; there must be one."""
    # Counted from `first` on, without a sign, lower keys come last. A condition would keep the compiler from vectors.
    least = np.uint32(0xFFFFFFFF)
    for j in range(np.uint32(n)):
        apart = np.uint32(np.uint32(keys[j]) - np.uint32(first) - np.uint32(1))
        least = np.uint32(min(least, apart))
    return np.int32(np.uint32(least + np.uint32(first) + np.uint32(1)))


@njit(cache=True, inline="always")
def quantile_scratch():
    """Return scratch for `quantile`, whatever the number of values."""
    return np.empty(FEW, np.int32)


@njit(cache=True, inline="never")
def quantile(values, n, q, keys, scratch):
    """Return quantile q of values[:n] (float32 without NaN, n > 0), interpolated linearly.

    `keys` is int32 scratch of n + 1 numbers at least, `scratch` that of `quantile_scratch`. Counts of the row, each
    without a branch, narrow the range down to a few values, which are put in order.
    """
    position = q * (n - 1)
    k = int(position)
    fraction = position - k
    bits = values.view(np.int32)
    low, high = np.int32(0x7FFFFFFF), np.int32(-0x7FFFFFFF)
    for j in range(np.uint32(n)):
        key = _ordered(bits[j])
        keys[j] = key
        low = min(low, key)
        high = max(high, key)
    first = second = _pick(keys, n, k, low, 0, high, n, scratch)
    if fraction > 0.0 and _count_to(keys, n, first) <= k + 1:
        second = _next_above(keys, n, first)
    keys[0] = _ordered(first)
    keys[1] = _ordered(second)
    pair = keys.view(np.float32)
    start, end = np.float64(pair[0]), np.float64(pair[1])
    return start + fraction * (end - start)


@njit(cache=True, inline="never")
def median_near(values, n, guess, keys, scratch):
    """Return the median of values[:n], the number that `quantile` gives, faster if positive and near `guess`."""
    # Positive floats are in the order of their bits, and negative ones below them all: nothing needs to be mapped.
    bits = values.view(np.int32)
    k, odd = (n - 1) // 2, n % 2 == 1
    keys.view(np.float32)[0] = guess
    middle = np.int64(keys[0])
    if middle <= GUESS_SPREAD or middle >= 0x7F000000:
        return quantile(values, n, 0.5, keys, scratch)
    low, high = np.int32(middle - GUESS_SPREAD), np.int32(middle + GUESS_SPREAD)
    below, upto = _count_to(bits, n, np.int32(low - 1)), _count_to(bits, n, high)
    if not below <= k < upto:
        return quantile(values, n, 0.5, keys, scratch)
    first = second = _pick(bits, n, k, low, below, high, upto, scratch)
    if not odd and _count_to(bits, n, first) <= k + 1:
        second = _next_above(bits, n, first)
    keys[0], keys[1] = first, second
    pair = keys.view(np.float32)
    start, end = np.float64(pair[0]), np.float64(pair[1])
    return start + 0.5 * (end - start) if not odd else start


def assess(flux, error, good, mask, snr_norm, snr_median, n_good, flag):
    """SNRs, number of good pixels and flag bits of each row; `good` and `mask` may have no rows."""
    arrays = flux, error, good, mask, snr_norm, snr_median, n_good, flag
    in_threads(len(flux), lambda a, b: _assess(*(array[a:b] for array in arrays)))


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc"})
def _assess(flux, error, good, mask, snr_norm, snr_median, n_good, flag):
    """See `assess`."""
    n, p = flux.shape
    all_good = good.shape[0] == 0
    masked = mask.shape[0] > 0
    for i in range(n):
        ratio = np.empty(p + 1, np.float32)
        keys, scratch = np.empty(p + 2, np.int32), quantile_scratch()
        signal, noise = 0.0, 0.0
        bits = np.uint32(0)
        m = p
        if all_good:
            for j in range(p):
                f, e = np.float64(flux[i, j]), np.float64(error[i, j])
                signal += f * f
                noise += e * e
                ratio[j] = flux[i, j] / error[i, j]
        else:
            m = 0
            for j in range(p):
                f, e = flux[i, j], error[i, j]
                if good[i, j]:
                    signal += np.float64(f) * np.float64(f)
                    noise += np.float64(e) * np.float64(e)
                    ratio[m] = f / e
                    m += 1
                elif (
                    abs(f) <= LARGEST32
                    and not (e > ZERO32 and e <= LARGEST_ERROR32)
                    and not (masked and mask[i, j])
                ):
                    bits |= np.uint32(4)
        if 2 * m < p:
            bits |= np.uint32(2)
        if m == 0:
            bits |= np.uint32(1)
            snr_norm[i] = np.nan
            snr_median[i] = np.nan
        else:
            snr_norm[i] = math.sqrt(signal / noise)
            snr_median[i] = quantile(ratio, m, 0.5, keys, scratch)
        n_good[i] = m
        flag[i] = bits


def error_statistics(error, good, out):
    """Ten statistics of each row of `error`, exact: see `moefast.spectra.quality.quality_features`."""
    in_threads(len(error), lambda a, b: _error_statistics(error[a:b], good[a:b], out[a:b]))


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc"})
def _error_statistics(error, good, out):
    """See `error_statistics`."""
    n, p = error.shape
    all_good = good.shape[0] == 0
    for i in range(n):
        values = np.empty(p + 1, np.float32)
        keys, scratch = np.empty(p + 2, np.int32), quantile_scratch()
        m = 0
        total = 0.0
        smallest, largest = np.float32(np.inf), np.float32(-np.inf)
        for j in range(p):
            if all_good or good[i, j]:
                value = error[i, j]
                values[m] = value
                m += 1
                total += np.float64(value)
                smallest = min(smallest, value)
                largest = max(largest, value)
        if m == 0:
            out[i, :] = np.nan
            continue
        mean = total / m
        second, third, fourth = 0.0, 0.0, 0.0
        for j in range(m):
            x = np.float64(values[j]) - mean
            second += x * x
            third += x * x * x
            fourth += x * x * x * x
        second /= m
        spread = smallest < largest
        out[i, 0] = mean
        out[i, 1] = math.sqrt(second) if spread else 0.0
        out[i, 2] = smallest
        out[i, 3] = largest
        out[i, 4] = quantile(values, m, 0.5, keys, scratch)
        out[i, 5] = total
        out[i, 6] = quantile(values, m, 0.25, keys, scratch)
        out[i, 7] = quantile(values, m, 0.75, keys, scratch)
        out[i, 8] = third / m / (second * math.sqrt(second)) if spread else 0.0
        out[i, 9] = fourth / m / (second * second) - 3.0 if spread else 0.0
