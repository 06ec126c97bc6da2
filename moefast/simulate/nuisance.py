"""What stands between a star and its spectrum besides noise: velocity, reddening, flux calibration.

    flux_observed(wave) = flux(wave / (1 + v/c)) 10^(-0.4 E(B-V) k(wave)) (1 + sum_j a_j P_j(wave))

They act on a spectrum that was normalised before and keep its level by construction: k is zero in the middle of the
range and the P_j have no constant term. Nothing is normalised again.

Design: a shift is a local interpolation. Pixels are equidistant in wavelength, so a velocity moves a line by a number
of pixels that grows along the spectrum (16.6 to 20.7 at 300 km/s). A row is cut into runs in which the whole part of
the shift is constant; inside a run the weights of the twelve pixels around are polynomials in the fraction, evaluated
in float32 SIMD. They are the weights of least error for what the spectrograph lets through (`interpolation_weights`);
Lagrange's with eight pixels were off by up to 1e-3 of flux. Floor per pixel: 105 operations for the shift, 12 for the
reddening, 9 for the calibration. Every row is computed by itself, in one order, so its bits do not depend on the block.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from moefast.core.compiled import njit
from moefast.core.errors import MoefastError
from moefast.core.threads import in_threads

from .emulator import Emulator

__all__ = [
    "LIGHT_SPEED",
    "calibrate",
    "calibration_basis",
    "doppler",
    "extinction",
    "redden",
    "relative_extinction",
    "velocity_limit",
]

LIGHT_SPEED = 299792.458  # km/s
R_V = 3.1
ANCHOR = 7975.0  # Å; the middle of the red arm
N_CALIBRATION = 4
LINE_SPREAD = (
    7100.0 / 5000.0 / 2.354820045 / (1750.0 / 4096.0)
)  # standard deviation in pixels, where it is narrowest
STENCIL = 6  # pixels that the interpolation reaches to either side

# "contract" lets sums use fused multiply-adds; nothing may be reordered.
_EXACT_ORDER = {"contract", "nsz"}


# --- velocity ----------------------------------------------------------------------------------------------


def velocity_limit(emulator: Emulator, beyond: int = 0) -> float:
    """Largest velocity, either way, for which the emulator's margin holds what moves in [km/s].

    The reddest pixel needs the spectrum wave v/c to its blue, and the interpolation `STENCIL` pixels more. `beyond` of
    the margin's pixels may be asked for themselves.
    """
    step = emulator.wave[1] - emulator.wave[0]
    reach = max(0, emulator.margin - beyond - STENCIL) * step / emulator.wave[-1]
    return float(LIGHT_SPEED * reach / (1.0 + reach))


def doppler(
    padded: np.ndarray, velocity: np.ndarray, wave: np.ndarray | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """Spectra of receding stars: out(wave) = padded(wave / (1 + v/c)).

    The formula is the one that wavelengths of surveys are corrected with; at 300 km/s the relativistic one moves a line
    by 0.01 pixel more. Redshift and velocity go together as (1 + z)(1 + v/c) - 1.

    Parameters
    ----------
    padded : array of shape (n, p + 2 margin), float32
        Spectra at rest, with `margin` pixels beyond either edge (`Emulator.padded_flux`).
    velocity : array of shape (n,)
        v [km/s]; positive moves lines to the red.
    wave : array of shape (p,), optional
        Equidistant pixel centres [Å] of the result; those of the shipped emulator if absent.
    out : array of shape (n, p), float32, C-contiguous, optional

    Returns
    -------
    array of shape (n, p), float32
        Lines as narrow as the spectrograph makes them are off by at most 1.2e-4 of their depth.

    Raises
    ------
    MoefastError
        If shapes do not fit, or a velocity moves in more than the margin holds.
    """
    wave = Emulator.load().wave if wave is None else np.asarray(wave, dtype=float)
    velocity = np.asarray(velocity, dtype=float)
    n, p = len(padded), len(wave)
    if padded.ndim != 2 or padded.dtype != np.float32 or padded.shape[1] < p or (padded.shape[1] - p) % 2:
        raise MoefastError(
            f"padded: expected float32 of shape (n, {p} + 2 margin), found {padded.dtype} {padded.shape}"
        )
    if velocity.shape != (n,):
        raise MoefastError(f"velocity: expected shape ({n},), found {velocity.shape}")
    out = _output(out, n, p)
    margin = (padded.shape[1] - p) // 2
    step = (wave[-1] - wave[0]) / (p - 1)
    shift = velocity / LIGHT_SPEED
    with np.errstate(divide="ignore", invalid="ignore"):
        # Pixels by which pixel j of the result lies to the red of its source: (wave_0 / step + j) rate.
        rate = shift / (1.0 + shift)
        reach = np.abs(rate) * wave[-1] / step
    bad = ~((reach <= max(0, margin - STENCIL)) & (shift > -1.0)) & (velocity != 0)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        limit = LIGHT_SPEED * max(0, margin - STENCIL) / (wave[-1] / step + max(0, margin - STENCIL))
        raise MoefastError(
            f"velocity of row {row} is {velocity[row]:g} km/s; spectra that reach {margin} pixels beyond the detector "
            f"can be shifted by up to {limit:.0f} km/s"
        )
    if margin < STENCIL:
        np.copyto(out, padded[:, margin : margin + p])
        return out
    padded = np.ascontiguousarray(padded)
    weights = interpolation_weights().astype(np.float32)
    in_threads(n, lambda a, b: _shift(padded[a:b], rate[a:b], wave[0] / step, margin, weights, out[a:b]))
    return out


@lru_cache(maxsize=1)
def interpolation_weights() -> np.ndarray:
    """Polynomials of the weights with which twelve pixels give the flux between the middle two.

    w(u) minimises the integral over frequency f and u in -1/2 … 1/2 of S(f)^2 |sum_i w_i(u) exp(2 pi i f x_i) -
    exp(2 pi i f u)|^2, x_i = -11/2 … 11/2. S is the transfer function of the narrowest line-spread function (R = 5000
    at 7100 Å, 1.41 pixels) and of the pixel itself; a constant counts 30 times, so that the continuum stays.

    Returns
    -------
    array of shape (6, 6), float64
        Row i belongs to the pixels at ±(i + 1/2). Columns: coefficients of u^0, u^2, u^4 for the sum of the two
        pixels, then of u^1, u^3, u^5 for their difference, red minus blue.
    """
    frequency = np.linspace(0.0, 1.0, 81)  # per pixel; what lies above 1/2 is aliased and cannot be restored
    transfer = np.exp(-2.0 * (math.pi * LINE_SPREAD * frequency) ** 2) * np.sinc(frequency)
    transfer[0] = 30.0
    f, u = (
        grid.ravel() for grid in np.meshgrid(frequency, (np.arange(40) + 0.5) / 40.0 - 0.5, indexing="ij")
    )
    count = np.repeat(transfer, 40)
    place = np.arange(STENCIL) + 0.5
    even = [2.0 * count * np.cos(2.0 * math.pi * f * x) * u**k for x in place for k in (0, 2, 4)]
    odd = [2.0 * count * np.sin(2.0 * math.pi * f * x) * u**k for x in place for k in (1, 3, 5)]
    wanted = 2.0 * math.pi * f * u
    symmetric = np.linalg.lstsq(np.stack(even, axis=1), count * np.cos(wanted))[0]
    antisymmetric = np.linalg.lstsq(np.stack(odd, axis=1), count * np.sin(wanted))[0]
    return np.concatenate([symmetric.reshape(STENCIL, 3), antisymmetric.reshape(STENCIL, 3)], axis=1)


@njit(cache=True, nogil=True, fastmath=_EXACT_ORDER, error_model="numpy")
def _shift(
    padded: np.ndarray, rate: np.ndarray, start: Any, margin: Any, weights: np.ndarray, out: np.ndarray
) -> None:
    """Fill out (n, p) with padded interpolated at pixel j - (start + j) rate."""
    n, p = out.shape
    for row in range(n):
        slope = rate[row]
        if slope == 0.0:
            out[row] = padded[row, margin : margin + p]
            continue
        first = 0
        while first < p:
            offset = -(start + first) * slope
            whole = math.floor(offset)
            # The run ends before the pixel whose shift has another whole part; rounding may be off by one pixel.
            edge = whole if slope > 0.0 else whole + 1
            last = max(first + 1, min(math.ceil(-edge / slope - start) + 1, p))
            while last > first + 1 and math.floor(-(start + last - 1) * slope) != whole:
                last -= 1
            fraction, change = np.float32(offset - whole - 0.5), np.float32(-slope)
            left = margin + first + int(whole)
            size = last - first
            target = out[row, first:last]
            target[:] = np.float32(0.0)
            # Two pairs of pixels at a time: fewer passes over the result, and registers for all coefficients.
            for i in range(0, STENCIL, 2):
                blue = padded[row, left - i : left - i + size]
                red = padded[row, left + 1 + i : left + 1 + i + size]
                bluer = padded[row, left - i - 1 : left - i - 1 + size]
                redder = padded[row, left + 2 + i : left + 2 + i + size]
                e0, e2, e4 = weights[i, 0], weights[i, 1], weights[i, 2]
                o1, o3, o5 = weights[i, 3], weights[i, 4], weights[i, 5]
                f0, f2, f4 = weights[i + 1, 0], weights[i + 1, 1], weights[i + 1, 2]
                p1, p3, p5 = weights[i + 1, 3], weights[i + 1, 4], weights[i + 1, 5]
                for j in range(size):
                    u = fraction + np.float32(j) * change
                    square = u * u
                    near = ((e4 * square + e2) * square + e0) * (red[j] + blue[j])
                    near += ((o5 * square + o3) * square + o1) * u * (red[j] - blue[j])
                    far = ((f4 * square + f2) * square + f0) * (redder[j] + bluer[j])
                    far += ((p5 * square + p3) * square + p1) * u * (redder[j] - bluer[j])
                    target[j] += near + far
            first = last


# --- reddening ---------------------------------------------------------------------------------------------


def relative_extinction(wave: np.ndarray) -> np.ndarray:
    """A(wave) / A(V) = a(x) + b(x) / R_V, x = 1 / wave, in the optical and near infrared (1.1 to 3.3 per micron).

    Source: Cardelli, Clayton & Mathis (1989, ApJ 345, 245), equations 3a and 3b, with R_V = 3.1.

    Parameters
    ----------
    wave : array of shape (p,)
        Å, 3030 to 9090.

    Raises
    ------
    MoefastError
        If a wavelength lies outside.
    """
    x = 1e4 / np.asarray(wave, dtype=float)
    if not ((x >= 1.1) & (x <= 3.3)).all():
        raise MoefastError(
            f"wave: the extinction law holds for 3030 to 9090 Å, found {1e4 / x.max():g} to {1e4 / x.min():g}"
        )
    y = x - 1.82
    a = np.polyval([0.32999, -0.77530, 0.01979, 0.72085, -0.02427, -0.50447, 0.17699, 1.0], y)
    b = np.polyval([-2.09002, 5.30260, -0.62251, -5.38434, 1.07233, 2.28305, 1.41338, 0.0], y)
    return a + b / R_V


def extinction(wave: np.ndarray) -> np.ndarray:
    """The curve k = [A(wave) - A(7975 Å)] / E(B-V), shape (p,), in magnitudes; it leaves the level alone.

    Parameters
    ----------
    wave : array of shape (p,)
        Å.
    """
    return R_V * (relative_extinction(wave) - relative_extinction(np.array([ANCHOR])))


def redden(flux: np.ndarray, ebv: np.ndarray, wave: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Reddened spectra: flux 10^(-0.4 E(B-V) k(wave)), with k of `extinction`.

    Parameters
    ----------
    flux : array of shape (n, p), float32
    ebv : array of shape (n,)
        E(B-V) [mag].
    wave : array of shape (p,)
        Å.
    out : array of shape (n, p), float32, C-contiguous, optional
        May be `flux` itself.

    Raises
    ------
    MoefastError
        If shapes do not fit.
    """
    ebv = np.asarray(ebv, dtype=float)
    n, p = len(flux), len(wave)
    _check_flux(flux, p)
    if ebv.shape != (n,):
        raise MoefastError(f"ebv: expected shape ({n},), found {ebv.shape}")
    out = _output(out, n, p)
    exponent = (-0.4 * math.log(10.0)) * extinction(wave)
    # The series of exp is exact to float32 for arguments below 1/4; larger ones are halved and the result squared.
    largest = np.abs(ebv) * np.abs(exponent).max()
    halvings = np.ceil(np.log2(np.maximum(largest * 4.0, 1.0))).astype(np.int64)
    scale = (ebv / 2.0**halvings).astype(np.float32)
    shape = exponent.astype(np.float32)
    flux = np.ascontiguousarray(flux)
    in_threads(n, lambda a, b: _dim(flux[a:b], scale[a:b], halvings[a:b], shape, out[a:b]))
    return out


@njit(cache=True, nogil=True, fastmath=_EXACT_ORDER)
def _dim(
    flux: np.ndarray, scale: np.ndarray, halvings: np.ndarray, shape: np.ndarray, out: np.ndarray
) -> None:
    """Fill out = flux exp(scale shape)^(2^halvings)."""
    n, p = flux.shape
    one = np.float32(1.0)
    for row in range(n):
        s, source, target = scale[row], flux[row], out[row]
        if halvings[row] == 0:
            for j in range(p):
                x = s * shape[j]
                value = one + x * np.float32(1.0 / 6.0)
                value = one + x * np.float32(1.0 / 5.0) * value
                value = one + x * np.float32(1.0 / 4.0) * value
                value = one + x * np.float32(1.0 / 3.0) * value
                value = one + x * np.float32(1.0 / 2.0) * value
                target[j] = source[j] * (one + x * value)
        else:
            for j in range(p):
                x = s * shape[j]
                value = one + x * np.float32(1.0 / 6.0)
                value = one + x * np.float32(1.0 / 5.0) * value
                value = one + x * np.float32(1.0 / 4.0) * value
                value = one + x * np.float32(1.0 / 3.0) * value
                value = one + x * np.float32(1.0 / 2.0) * value
                value = one + x * value
                for _ in range(halvings[row]):
                    value *= value
                target[j] = source[j] * value


# --- flux calibration --------------------------------------------------------------------------------------


def calibration_basis(wave: np.ndarray) -> np.ndarray:
    """Shapes P_j of a smooth calibration error: Legendre polynomials of order 1 to 4, each of rms 1/2.

    With independent a_j ~ N(0, 1) the sum over a_j P_j has rms 1 over pixels and draws, a quarter of its variance
    from each order.

    Parameters
    ----------
    wave : array of shape (p,)
        Å.

    Returns
    -------
    array of shape (4, p), float64
    """
    wave = np.asarray(wave, dtype=float)
    u = (2.0 * wave - wave[0] - wave[-1]) / (wave[-1] - wave[0])
    shapes = np.polynomial.legendre.legvander(u, N_CALIBRATION).T[1:]
    return shapes / np.sqrt(N_CALIBRATION * (shapes**2).mean(axis=1, keepdims=True))


def calibrate(
    flux: np.ndarray, amplitudes: np.ndarray, shapes: np.ndarray, out: np.ndarray | None = None
) -> np.ndarray:
    """Spectra with a calibration error: flux (1 + sum_j a_j P_j).

    Parameters
    ----------
    flux : array of shape (n, p), float32
    amplitudes : array of shape (n, 4)
        a_j, in units of the shapes.
    shapes : array of shape (4, p)
        P_j, for example 0.03 `calibration_basis`.
    out : array of shape (n, p), float32, C-contiguous, optional
        May be `flux` itself.

    Raises
    ------
    MoefastError
        If shapes do not fit.
    """
    amplitudes, shapes = np.asarray(amplitudes, dtype=np.float32), np.asarray(shapes, dtype=np.float32)
    n, p = len(flux), shapes.shape[1]
    _check_flux(flux, p)
    if shapes.shape[0] != N_CALIBRATION or amplitudes.shape != (n, N_CALIBRATION):
        raise MoefastError(
            f"amplitudes ({n}, {N_CALIBRATION}) and shapes ({N_CALIBRATION}, p) expected, found {amplitudes.shape}, "
            f"{shapes.shape}"
        )
    out = _output(out, n, p)
    flux = np.ascontiguousarray(flux)
    in_threads(n, lambda a, b: _bend(flux[a:b], amplitudes[a:b], shapes, out[a:b]))
    return out


@njit(cache=True, nogil=True, fastmath=_EXACT_ORDER)
def _bend(flux: np.ndarray, amplitudes: np.ndarray, shapes: np.ndarray, out: np.ndarray) -> None:
    n, p = flux.shape
    p0, p1, p2, p3 = shapes[0], shapes[1], shapes[2], shapes[3]
    for row in range(n):
        a0, a1, a2, a3 = amplitudes[row, 0], amplitudes[row, 1], amplitudes[row, 2], amplitudes[row, 3]
        source, target = flux[row], out[row]
        for j in range(p):
            factor = np.float32(1.0) + a0 * p0[j] + a1 * p1[j] + a2 * p2[j] + a3 * p3[j]
            target[j] = source[j] * factor


# --- what they share ---------------------------------------------------------------------------------------


def _check_flux(flux: np.ndarray, p: int) -> None:
    if flux.ndim != 2 or flux.shape[1] != p or flux.dtype != np.float32:
        raise MoefastError(f"flux: expected float32 of shape (n, {p}), found {flux.dtype} {flux.shape}")


def _output(out: np.ndarray | None, n: int, p: int) -> np.ndarray:
    if out is None:
        return np.empty((n, p), dtype=np.float32)
    if out.shape != (n, p) or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise MoefastError(
            f"out: expected C-contiguous float32 of shape {(n, p)}, found {out.dtype} {out.shape}"
        )
    return out
