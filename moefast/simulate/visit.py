"""What differs from one visit of a survey to the next: sky, gaps, line-spread function, normalisation.

    x = [f * L(w) (1 + sum_k a_k P_k + t u/2) + sum_g r_g s_g S_g + sigma(s) epsilon] / median

f * L(w) is the star's spectrum with a line-spread function that is w times as wide; a_k P_k the smooth
calibration error of `moefast.simulate.nuisance`; t a tilt of the continuum from end to end, u from -1 to 1; S_g
the light of one group of airglow lines, s_g its brightness and r_g the share of it that sky subtraction has
left over, which the errors do not tell; sigma(s) the errors under that sky. The median is that of the star's
own noisy flux over the pixels that are not lost, as a survey would normalise it.

Design: every quantity of a star depends on the seed and its row alone. Numbers have streams of their own, so a star
keeps its labels, velocity and reddening when it is observed in this way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache

import numpy as np
from scipy.special import ndtri

from moefast.core.compiled import njit
from moefast.core.errors import MoefastError
from moefast.core.random import uniforms_of_rows
from moefast.core.threads import in_threads
from moefast.kernels.quality import quantile, quantile_scratch

from .gaps import Gaps
from .noise import SKY_GROUPS, SkyFactors

__all__ = ["VISIT_PARAMS", "Visit", "broaden"]

RESOLVING_POWER = 5000.0
"""Wavelength over FWHM of the emulator's line-spread function, a Gaussian."""
_REACH = 6
_ORDERS = 5
_LARGEST_SPREAD = 0.15
"""Relative change of width for which `broaden` is accurate."""

SKY_LINES = tuple(f"sky_lines_{k + 1}" for k in range(len(SKY_GROUPS)))
SKY_RESIDUALS = tuple(f"sky_residual_{k + 1}" for k in range(len(SKY_GROUPS)))
KINDS = ("telluric", "block", "edges", "calcium")
LOST = tuple(f"lost_{kind}" for kind in KINDS)
VISIT_PARAMS = dict.fromkeys(
    ("line_spread", "tilt", "sky_continuum", *SKY_LINES, *SKY_RESIDUALS, *LOST, "median"), "float64"
)
"""Further columns of the params table, each a float64.

line_spread (width of the line-spread function over its own), tilt (relative change of the continuum from end to end),
sky_continuum and sky_lines_1 … (factors on the sky's parts, in the order of `SKY_GROUPS`), sky_residual_1 … (share of
those lines that is left in the flux), lost_telluric … (1 where the star has that gap), median (what the spectrum was
divided by).
"""

_TILT_STREAM, _RESIDUAL_STREAM = 12, 13


@dataclass(frozen=True)
class Visit:
    """How much visits differ.

    Attributes
    ----------
    sky_continuum, sky_lines : float
        Scatter of the natural logarithm of the brightness of the sky's continuum, and of each group of its lines.
    sky_residual : float
        Standard deviation of the share of each group of lines that sky subtraction leaves in the flux.
    tilt : float
        Standard deviation of the relative change of the continuum from end to end.
    line_spread : float
        Largest relative change of the width of the line-spread function, uniform to either side; at most 0.15.
    own_median : bool
        Whether spectra are divided by the median of their own noisy flux.
    gaps : Gaps
        Which pixels are lost.
    """

    sky_continuum: float = 0.3
    sky_lines: float = 0.5
    sky_residual: float = 0.01
    tilt: float = 0.05
    line_spread: float = 0.1
    own_median: bool = True
    gaps: Gaps = field(default_factory=Gaps)

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
                raise MoefastError(f"{one.name}: expected a number of at least 0, found {value:g}")
        if self.line_spread > _LARGEST_SPREAD:
            raise MoefastError(
                f"line_spread: expected at most {_LARGEST_SPREAD:g}, found {self.line_spread:g}"
            )

    def params(self, rows: np.ndarray, *, seed: int) -> dict[str, np.ndarray]:
        """All of `VISIT_PARAMS` but median, each an array of shape (n,).

        Parameters
        ----------
        rows : array of shape (n,), integer ≥ 0
        seed : int
        """
        factors = SkyFactors.draw(rows, seed=seed, continuum=self.sky_continuum, lines=self.sky_lines)
        uniform = uniforms_of_rows(rows, 2, seed=seed, stream=_TILT_STREAM)
        normal = ndtri(uniforms_of_rows(rows, len(SKY_GROUPS), seed=seed, stream=_RESIDUAL_STREAM))
        kinds = self.gaps.kinds(rows, seed=seed)
        return (
            {
                "line_spread": 1.0 + self.line_spread * (2.0 * uniform[:, 0] - 1.0),
                "tilt": self.tilt * ndtri(uniform[:, 1]),
                "sky_continuum": factors.continuum,
            }
            | {name: factors.lines[:, k].copy() for k, name in enumerate(SKY_LINES)}
            | {name: self.sky_residual * normal[:, k] for k, name in enumerate(SKY_RESIDUALS)}
            | {name: kinds[kind].astype(float) for name, kind in zip(LOST, KINDS, strict=True)}
        )


def sky_of(params: Mapping[str, np.ndarray]) -> tuple[SkyFactors, np.ndarray]:
    """Brightness of the sky of each star, and the share of each group of lines that is left over, shape (n, groups)."""
    lines = np.stack([params[name] for name in SKY_LINES], axis=1)
    residuals = np.stack([params[name] for name in SKY_RESIDUALS], axis=1)
    return SkyFactors(np.asarray(params["sky_continuum"]), lines), residuals


def broaden(
    padded: np.ndarray, width: np.ndarray, wave: np.ndarray, out: np.ndarray | None = None
) -> np.ndarray:
    """Spectra as a line-spread function of another width would give them.

    In Fourier space out(f) = padded(f) exp[-2 pi^2 f^2 sigma^2 (width^2 - 1)], with sigma that of `RESOLVING_POWER`
    at each pixel; below width 1 this sharpens, which is possible because the pixels sample the lines well.

    Parameters
    ----------
    padded : array of shape (n, p), float32
        Spectra on equidistant pixels; the outermost `_REACH` of them stay what they are.
    width : array of shape (n,)
        Width over that of the emulator, 0.85 to 1.15.
    wave : array of shape (p,)
        Pixel centres, Å.
    out : array of shape (n, p), float32, optional
        Not `padded` itself.

    Returns
    -------
    array of shape (n, p), float32

    Raises
    ------
    MoefastError
        If shapes do not fit or a width is out of range.
    """
    wave, width = np.asarray(wave, dtype=float), np.asarray(width, dtype=float)
    if padded.ndim != 2 or padded.dtype != np.float32 or padded.shape != (len(width), len(wave)):
        raise MoefastError(
            f"padded: expected float32 of shape ({len(width)}, {len(wave)}), found {padded.dtype} {padded.shape}"
        )
    if not (np.abs(width - 1.0) <= _LARGEST_SPREAD + 1e-9).all():
        raise MoefastError(f"width: expected 0.85 to 1.15, found {width.min():g} to {width.max():g}")
    out = np.empty_like(padded) if out is None else out
    padded = np.ascontiguousarray(padded)
    step = (wave[-1] - wave[0]) / (len(wave) - 1)
    # Variance of the line-spread function in units of its largest in this arm, where _weights were fitted.
    variance = ((wave / wave.max()) ** 2).astype(np.float32)
    largest = (wave.max() / RESOLVING_POWER / 2.354820045 / step) ** 2
    change = (width**2 - 1.0).astype(np.float32)
    weights = _weights(float(largest)).astype(np.float32)
    in_threads(len(width), lambda a, b: _broaden(padded[a:b], change[a:b], variance, weights, out[a:b]))
    return out


@lru_cache(maxsize=4)
def _weights(largest: float) -> np.ndarray:
    """Polynomials of the weights with which 13 pixels give the middle one under another width.

    w(t) minimises the integral over frequency f and t of S(f)^2 |sum_i w_i(t) cos(2 pi f i) - exp(-2 pi^2 f^2 V t)|^2
    with V = `largest` [pixels^2] and S the transfer function of a line-spread function three quarters as wide and of
    the pixel; t covers what `_LARGEST_SPREAD` allows. A constant counts 30 times, so that the continuum stays.

    Returns
    -------
    array of shape (7, 5), float64
        Row i belongs to the pixels at ±i. Columns: coefficients of t^0 … t^4.
    """
    frequency = np.linspace(0.0, 0.5, 61)
    transfer = np.exp(-2.0 * (math.pi * frequency) ** 2 * largest * 0.55) * np.sinc(frequency)
    transfer[0] = 30.0
    reach = (1.0 + _LARGEST_SPREAD) ** 2 - 1.0
    f, t = (grid.ravel() for grid in np.meshgrid(frequency, np.linspace(-reach, reach, 41), indexing="ij"))
    count = np.repeat(transfer, 41)
    columns = [
        count * (np.cos(2.0 * math.pi * f * i) * (1.0 if i == 0 else 2.0)) * t**k
        for i in range(_REACH + 1)
        for k in range(_ORDERS)
    ]
    wanted = count * np.exp(-2.0 * (math.pi * f) ** 2 * largest * t)
    return np.linalg.lstsq(np.stack(columns, axis=1), wanted)[0].reshape(_REACH + 1, _ORDERS)


@njit(cache=True, nogil=True, fastmath={"contract", "nsz"}, error_model="numpy")
def _broaden(
    padded: np.ndarray, change: np.ndarray, variance: np.ndarray, weights: np.ndarray, out: np.ndarray
) -> None:
    """Fill out with the sum over i of w_i(change variance) (padded at ±i); see `_weights`."""
    n, p = padded.shape
    reach = len(weights) - 1
    for row in range(n):
        source, target = padded[row], out[row]
        if change[row] == 0.0:
            target[:] = source
            continue
        target[:reach], target[p - reach :] = source[:reach], source[p - reach :]
        middle = target[reach : p - reach]
        size = len(middle)
        middle[:] = np.float32(0.0)
        for i in range(reach + 1):
            blue, red = source[reach - i : reach - i + size], source[reach + i : reach + i + size]
            c0, c1, c2, c3, c4 = weights[i, 0], weights[i, 1], weights[i, 2], weights[i, 3], weights[i, 4]
            half = np.float32(0.5) if i == 0 else np.float32(1.0)
            for j in range(size):
                t = change[row] * variance[reach + j]
                weight = (((c4 * t + c3) * t + c2) * t + c1) * t + c0
                middle[j] += half * weight * (red[j] + blue[j])


def median_of_good(noisy: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """Median of each row over the pixels that are not lost, shape (n,), float64; 1 where it is not above zero."""
    median = np.ones(len(noisy))
    in_threads(len(noisy), lambda a, b: _medians(noisy[a:b], lost[a:b], median[a:b]))
    return median


@njit(cache=True, nogil=True)
def _medians(noisy: np.ndarray, lost: np.ndarray, out: np.ndarray) -> None:
    n, p = noisy.shape
    values, keys, scratch = np.empty(p + 1, np.float32), np.empty(p + 2, np.int32), quantile_scratch()
    for i in range(n):
        left = 0
        for j in range(p):
            if not lost[i, j]:
                values[left] = noisy[i, j]
                left += 1
        found = quantile(values, left, 0.5, keys, scratch) if left else 1.0
        out[i] = found if found > 0.0 else 1.0
