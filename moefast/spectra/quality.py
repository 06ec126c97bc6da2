"""Good and bad pixels, good and bad rows, and the two signal-to-noise ratios.

Design: every number of a row comes from that row alone, in an order that does not depend on its place in a
block or on the number of threads; so a spectrum gets the same bits whatever it is read together with. Sums
run in float64; quantiles are found by counting, not by sorting.

Two ratios are in use and must not be confused: ``snr_norm = ‖flux‖₂ / ‖error‖₂`` (sky lines dominate it) and
``snr_median = median(flux / error)``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np

from moefast.kernels import quality as loops
from moefast.kernels.quality import LARGEST_ERROR

__all__ = [
    "LARGEST_ERROR",
    "QUALITY_FEATURES",
    "QUALITY_STEP",
    "Flag",
    "Quality",
    "assess",
    "good_pixels",
    "quality_features",
]


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
    VELOCITY_UNCERTAIN = 64
    """The velocity was fitted, and others fit about as well, or it lies at an end of the range."""


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
        if not loops.any_bad(flux, error):
            return None
        mask = np.zeros((0, flux.shape[1]), bool)
    else:
        mask = _pixels(mask, flux.shape, "mask")
    good = np.empty(flux.shape, bool)
    return good if loops.mark_good(flux, error, mask, good) else None


def assess(
    flux: np.ndarray, error: np.ndarray, good: np.ndarray | None, mask: np.ndarray | None = None
) -> Quality:
    """Signal-to-noise ratios, number of good pixels and flags of each row.

    Parameters
    ----------
    flux, error : array of shape (n, p), float32
        Flux and its 1σ.
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
    loops.assess(
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
    loops.error_statistics(error, nothing if good is None else _pixels(good, error.shape, "good"), out)
    return _rounded(out)


def _rounded(features: np.ndarray) -> np.ndarray:
    """Statistics on their logarithmic grid; 0 and NaN stay as they are."""
    # In float32 the logarithm of one number in ten thousand would fall on the other side of a step.
    features = features.astype(np.float64)
    size, shape = features[:, :-2], features[:, -2:]
    with np.errstate(divide="ignore"):
        size = np.exp(QUALITY_STEP * np.round(np.log(size) / QUALITY_STEP))
    shape = np.copysign(np.expm1(QUALITY_STEP * np.round(np.log1p(np.abs(shape)) / QUALITY_STEP)), shape)
    return np.concatenate([size, shape], axis=1, dtype=np.float32)
