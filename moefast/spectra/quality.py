"""Good and bad pixels, good and bad rows, and the two signal-to-noise ratios.

Design: every number of a row comes from that row alone, in an order that does not depend on its place in a
block or on the number of threads; so a spectrum gets the same bits whatever it is read together with. Sums
run in float64; quantiles are found by counting, not by sorting.

Two ratios are in use and must not be confused: ``snr_norm = ‖flux‖₂ / ‖error‖₂`` (sky lines dominate it) and
``snr_median = median(flux / error)``.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import numba
import numpy as np

__all__ = [
    "LARGEST_ERROR",
    "QUALITY_FEATURES",
    "QUALITY_STEP",
    "Flag",
    "Quality",
    "assess",
    "good_pixels",
    "quality_features",
    "repair",
]

_LARGEST = np.float32(np.finfo(np.float32).max)
LARGEST_ERROR = 1e6
"""Errors above this, where flux is about 1, are a way to say "no information": the pixel is bad."""
_LARGEST_ERROR = np.float32(LARGEST_ERROR)
_ZERO = np.float32(0)


class Flag(enum.IntFlag):
    """What is wrong with a row, as bits of an uint32. Bits 16-31 are left to others."""

    NO_DATA = 1
    """Not one good pixel; all results of the row are NaN."""
    FEW_GOOD_PIXELS = 2
    """Fewer than half of the pixels are good (true of NO_DATA rows, too)."""
    BAD_ERROR = 4
    """At least one pixel has a finite flux and no mask, but an error that is not positive or above 1e6."""
    OUT_OF_GRID = 8
    """log g lies at the edge of the labels that the model was fitted on, or the noise level outside its range."""
    LOW_CONFIDENCE = 16
    """log_g_err is above 0.8 of the scatter of log g in the training set: the spectrum says next to nothing."""
    UNLIKE_TRAINING = 32
    """chi2 is above the limit of the model: no combination of its principal components gives this spectrum."""


QUALITY_FEATURES = ("mean", "std", "min", "max", "median", "sum", "q25", "q75", "skewness", "kurtosis")
"""Names of the columns of `quality_features`."""

QUALITY_STEP = 0.1
"""Step, in the natural logarithm, to which `quality_features` are rounded."""


@dataclass
class Quality:
    """What `assess` finds.

    Attributes
    ----------
    snr_norm : array of shape (n,), float32
        ‖flux‖₂ / ‖error‖₂ over the good pixels; NaN without any.
    snr_median : array of shape (n,), float32
        median(flux / error) over the good pixels; NaN without any.
    n_good : array of shape (n,), int32
        Number of good pixels.
    flag : array of shape (n,), uint32
        Bits of `Flag`: NO_DATA, FEW_GOOD_PIXELS, BAD_ERROR.
    """

    snr_norm: np.ndarray
    snr_median: np.ndarray
    n_good: np.ndarray
    flag: np.ndarray


def _spectra(flux: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    flux = np.ascontiguousarray(flux, dtype=np.float32)
    error = np.ascontiguousarray(error, dtype=np.float32)
    if flux.ndim != 2 or flux.shape != error.shape:
        raise ValueError(f"flux and error must share a shape (n, p), found {flux.shape} and {error.shape}")
    return flux, error


def _pixels(pixels: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    pixels = np.ascontiguousarray(pixels)
    if pixels.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, found {pixels.shape}")
    return pixels if pixels.dtype == np.bool_ else pixels != 0


def good_pixels(flux: np.ndarray, error: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray | None:
    """Pixels that carry information: flux finite, error positive and at most 1e6, not masked.

    Parameters
    ----------
    flux, error : array of shape (n, p), float32
        Flux and its 1σ.
    mask : array of shape (n, p), optional
        Not 0 (True) = bad.

    Returns
    -------
    array of shape (n, p), bool, or None
        None if every pixel is good, which costs one read of the data and no memory.
    """
    flux, error = _spectra(flux, error)
    if mask is None:
        if not _any_bad(flux, error):
            return None
        mask = np.zeros((0, flux.shape[1]), bool)
    else:
        mask = _pixels(mask, flux.shape, "mask")
    good = np.empty(flux.shape, bool)
    return good if _mark_good(flux, error, mask, good) else None


def assess(
    flux: np.ndarray, error: np.ndarray, good: np.ndarray | None, mask: np.ndarray | None = None
) -> Quality:
    """Signal-to-noise ratios, number of good pixels and flags of each row.

    Parameters
    ----------
    flux, error : array of shape (n, p), float32
        Flux and its 1σ, before any `repair`.
    good : array of shape (n, p), bool, or None
        From `good_pixels`; None = all good.
    mask : array of shape (n, p), optional
        The mask that `good` was made with: a masked pixel may have any error without BAD_ERROR.
    """
    flux, error = _spectra(flux, error)
    n = len(flux)
    quality = Quality(
        np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.int32), np.empty(n, np.uint32)
    )
    nothing = np.zeros((0, flux.shape[1]), bool)
    _assess(
        flux,
        error,
        nothing if good is None else _pixels(good, flux.shape, "good"),
        nothing if mask is None or good is None else _pixels(mask, flux.shape, "mask"),
        quality.snr_norm,
        quality.snr_median,
        quality.n_good,
        quality.flag,
    )
    return quality


def quality_features(error: np.ndarray, good: np.ndarray | None = None) -> np.ndarray:
    """Ten statistics of the error vector that do not depend on the order of its pixels.

    The error vector pixel by pixel gives the labels away (it contains the star's own photon noise); these
    ten numbers are all that a gate may see of it. They are rounded, v → exp(0.1 round(ln(v) / 0.1)): errors carry no
    noise of their own, and ten exact statistics still predict log g with R² 0.3; to a tenth they say how noisy a
    spectrum is and no more (R² below 0.02). Skewness and kurtosis, which may be negative, as 1 + |v|.

    Parameters
    ----------
    error : array of shape (n, p), float32
        1σ per pixel.
    good : array of shape (n, p), bool, optional
        Pixels to use; None = all.

    Returns
    -------
    array of shape (n, 10), float32
        Columns as in `QUALITY_FEATURES`: standard deviation with divisor n, quantiles interpolated linearly,
        skewness and excess kurtosis from central moments (0 if all values are equal). NaN without good
        pixels.
    """
    error = np.ascontiguousarray(error, dtype=np.float32)
    if error.ndim != 2:
        raise ValueError(f"error must have shape (n, p), found {error.shape}")
    out = np.empty((len(error), len(QUALITY_FEATURES)), np.float32)
    nothing = np.zeros((0, error.shape[1]), bool)
    _features(error, nothing if good is None else _pixels(good, error.shape, "good"), out)
    return _rounded(out)


def _rounded(features: np.ndarray) -> np.ndarray:
    """Statistics on their logarithmic grid; 0 and NaN stay as they are."""
    size, shape = features[:, :-2], features[:, -2:]
    with np.errstate(divide="ignore"):
        size = np.exp(QUALITY_STEP * np.round(np.log(size) / QUALITY_STEP))
    shape = np.copysign(np.expm1(QUALITY_STEP * np.round(np.log1p(np.abs(shape)) / QUALITY_STEP)), shape)
    return np.concatenate([size, shape], axis=1, dtype=np.float32)


def repair(flux: np.ndarray, error: np.ndarray, good: np.ndarray, reference: np.ndarray) -> None:
    """Replace bad pixels in place, so that arithmetic stays finite: flux by a reference, error by 1.

    The weight of these pixels must be set to 0 elsewhere.

    Parameters
    ----------
    flux, error : array of shape (n, p), float32, C-contiguous
        Changed in place.
    good : array of shape (n, p), bool
        From `good_pixels`.
    reference : array of shape (p,)
        Finite flux to put in.
    """
    for name, array in (("flux", flux), ("error", error)):
        if array.dtype != np.float32 or array.ndim != 2 or not array.flags.c_contiguous:
            raise ValueError(f"{name} must be C-contiguous float32 of shape (n, p), found {array.dtype}")
    if flux.shape != error.shape:
        raise ValueError(f"flux and error must share a shape, found {flux.shape} and {error.shape}")
    reference = np.ascontiguousarray(reference, dtype=np.float32)
    if reference.shape != flux.shape[1:]:
        raise ValueError(f"reference must have shape {flux.shape[1:]}, found {reference.shape}")
    _repair(flux, error, _pixels(good, flux.shape, "good"), reference)


@numba.njit(cache=True, parallel=True)
def _any_bad(flux, error):  # type: ignore[no-untyped-def]  # pragma: no cover
    n, p = flux.shape
    n_bad = 0
    for i in numba.prange(n):
        bad = np.int32(0)
        for j in range(p):
            f, e = flux[i, j], error[i, j]
            # A comparison with NaN is false. Bits instead of `and` keep the loop free of branches.
            ok = (abs(f) <= _LARGEST) & (e > _ZERO) & (e <= _LARGEST_ERROR)
            bad += np.int32(not ok)
        n_bad += int(bad > 0)
    return n_bad > 0


@numba.njit(cache=True, parallel=True)
def _mark_good(flux, error, mask, good):  # type: ignore[no-untyped-def]  # pragma: no cover
    n, p = flux.shape
    masked = mask.shape[0] > 0
    n_bad = 0
    for i in numba.prange(n):
        bad = np.int32(0)
        if masked:
            for j in range(p):
                f, e = flux[i, j], error[i, j]
                ok = (abs(f) <= _LARGEST) & (e > _ZERO) & (e <= _LARGEST_ERROR) & (not mask[i, j])
                good[i, j] = ok
                bad += np.int32(not ok)
        else:
            for j in range(p):
                f, e = flux[i, j], error[i, j]
                ok = (abs(f) <= _LARGEST) & (e > _ZERO) & (e <= _LARGEST_ERROR)
                good[i, j] = ok
                bad += np.int32(not ok)
        n_bad += int(bad > 0)
    return n_bad > 0


@numba.njit(cache=True, parallel=True)
def _repair(flux, error, good, reference):  # type: ignore[no-untyped-def]  # pragma: no cover
    n, p = flux.shape
    for i in numba.prange(n):
        for j in range(p):
            if not good[i, j]:
                flux[i, j] = reference[j]
                error[i, j] = np.float32(1)


@numba.njit(cache=True, inline="always")
def _ordered(bits):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Map the bits of a float32 to an int32 of the same order; its own inverse."""
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))


@numba.njit(cache=True, inline="never")
def _quantile(values, n, q, keys):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Return quantile q of values[:n] (float32 without NaN, n > 0), interpolated linearly.

    The k-th smallest is found by halving the range of the values' bits: some thirty counts of the row, each
    without a branch, are several times faster than partitioning it, and take the same time for any row.
    """
    position = q * (n - 1)
    k = int(position)
    fraction = position - k
    bits = values.view(np.int32)
    low, high = np.int32(0x7FFFFFFF), np.int32(-0x7FFFFFFF)
    for j in range(n):
        key = _ordered(bits[j])
        keys[j] = key
        low = min(low, key)
        high = max(high, key)
    while low < high:
        # The sum of two int32 may overflow.
        middle = np.int32((np.int64(low) + np.int64(high)) >> 1)
        # Numba widens sums of int32: unless it is narrowed at every step, the count runs at half speed.
        count = np.int32(0)
        for j in range(np.uint32(n)):
            count = np.int32(count + np.int32(keys[j] <= middle))
        if count > k:
            high = middle
        else:
            low = np.int32(middle + 1)
    first = second = low
    if fraction > 0.0:
        # The next in rank: the same value if it occurs often enough, else the smallest above it.
        count = np.int32(0)
        above = np.int32(0x7FFFFFFF)
        for j in range(np.uint32(n)):
            count = np.int32(count + np.int32(keys[j] <= first))
            above = min(above, keys[j] if keys[j] > first else np.int32(0x7FFFFFFF))
        if count <= k + 1:
            second = above
    keys[0] = _ordered(first)
    keys[1] = _ordered(second)
    found = keys.view(np.float32)
    start, end = np.float64(found[0]), np.float64(found[1])
    return start + fraction * (end - start)


@numba.njit(cache=True, parallel=True, error_model="numpy", fastmath={"reassoc"})
def _assess(  # type: ignore[no-untyped-def]  # pragma: no cover
    flux, error, good, mask, snr_norm, snr_median, n_good, flag
):
    n, p = flux.shape
    all_good = good.shape[0] == 0
    masked = mask.shape[0] > 0
    for i in numba.prange(n):
        ratio = np.empty(p + 1, np.float32)
        keys = np.empty(p + 2, np.int32)
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
                    abs(f) <= _LARGEST
                    and not (e > _ZERO and e <= _LARGEST_ERROR)
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
            snr_median[i] = _quantile(ratio, m, 0.5, keys)
        n_good[i] = m
        flag[i] = bits


@numba.njit(cache=True, parallel=True, error_model="numpy", fastmath={"reassoc"})
def _features(error, good, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    n, p = error.shape
    all_good = good.shape[0] == 0
    for i in numba.prange(n):
        values = np.empty(p + 1, np.float32)
        keys = np.empty(p + 2, np.int32)
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
        out[i, 4] = _quantile(values, m, 0.5, keys)
        out[i, 5] = total
        out[i, 6] = _quantile(values, m, 0.25, keys)
        out[i, 7] = _quantile(values, m, 0.75, keys)
        out[i, 8] = third / m / (second * math.sqrt(second)) if spread else 0.0
        out[i, 9] = fourth / m / (second * second) - 3.0 if spread else 0.0
