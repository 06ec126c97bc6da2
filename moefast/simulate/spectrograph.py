"""Emulated spectra as another spectrograph records them: a wider line-spread function, other pixels.

    out_j = sum_i w_ji fine_(first_j + i)

with `fine` the emulated spectrum, `w_j` a blur by what the line-spread function of pixel j has beyond the emulator's,
and the mean over pixel j.

Design: the weights of a pixel are those of least error for what the emulator's own line-spread function lets through,
as in `moefast.simulate.nuisance.interpolation_weights`. Their matrix is the same for all pixels, only what is wanted
differs, so one pseudo-inverse serves for the whole grid. A pixel's sum has one order: its bits do not depend on the
block that it is made in.
"""

from __future__ import annotations

import math
import re

import numpy as np
from numpy.typing import NDArray

from moefast.core.compiled import njit
from moefast.core.errors import InputError, MoefastError, WaveGridError
from moefast.core.threads import in_threads
from moefast.kernels.resample import pixel_edges
from moefast.spectra.wave import same_wave

from .emulator import Emulator
from .nuisance import LINE_SPREAD, STENCIL
from .visit import RESOLVING_POWER

__all__ = ["BEYOND", "Spectrograph", "emulated_fwhm", "reachable", "read_resolution"]

F64 = NDArray[np.float64]

BEYOND = 8
"""Pixels beyond either edge of the emulator's detector that spectra are made for; the rest of its margin is for
velocities."""
LEAST_PIXELS = 100
"""Pixels that a grid must have within the emulator's range."""
SHARPER = 1e-3
"""Share by which a line-spread function may be narrower than the emulator's and count as the same."""
_SIGMA = 2.0 * math.sqrt(2.0 * math.log(2.0))
_POWER = re.compile(r"R?\s*(\d+(?:\.\d*)?)", re.IGNORECASE)
_WIDTH = re.compile(r"(\d*\.?\d+)\s*(?:Å|AA?|Angstrom)", re.IGNORECASE)
_LEAST_POWER = 100.0


def emulated_fwhm(wave: F64) -> F64:
    """FWHM [Å] of the emulator's line-spread function, a Gaussian, at each wavelength [Å]."""
    return np.asarray(wave, dtype=float) / RESOLVING_POWER


def read_resolution(text: str, wave: F64) -> F64:
    """FWHM [Å] at each wavelength that a resolving power ("4500") or a width ("1.8A") means.

    Raises
    ------
    InputError
        If the text is neither, or sharper than the emulator's anywhere.
    """
    if (match := _WIDTH.fullmatch(text.strip())) is not None:
        fwhm = np.full(len(wave), float(match[1]))
    elif (match := _POWER.fullmatch(text.strip())) is not None and float(match[1]) >= _LEAST_POWER:
        fwhm = np.asarray(wave, dtype=float) / float(match[1])
    else:
        raise InputError(
            f"resolution {text!r}: a resolving power such as 4500 (at least {_LEAST_POWER:g}) or a FWHM in Å such as "
            "1.8A expected"
        )
    _refuse_sharper(wave, fwhm)
    return fwhm


def _refuse_sharper(wave: F64, fwhm: F64) -> None:
    there = emulated_fwhm(wave)
    sharper = np.flatnonzero(~(fwhm >= there * (1.0 - SHARPER)))
    if len(sharper):
        j = int(sharper[np.argmin(fwhm[sharper] / there[sharper])])
        raise InputError(
            f"resolution: a FWHM of {fwhm[j]:.3g} Å at {wave[j]:.0f} Å (resolving power {wave[j] / fwhm[j]:.0f}) is "
            f"asked for; the emulator's is {there[j]:.3g} Å (resolving power {RESOLVING_POWER:g}), and lines cannot be "
            f"made sharper: ask for {RESOLVING_POWER:g} at most, or for {there.max():.3g} Å or more"
        )


def reachable(emulator: Emulator, wave: F64, fwhm: F64) -> NDArray[np.bool_]:
    """Which pixels of a grid the emulator covers with all that their line-spread function gathers, shape (p,)."""
    place, width, spread = _in_pixels(emulator, wave, fwhm)
    reach = _reach(width, spread)
    middle = np.rint(place)
    return (middle - reach >= 0) & (middle + reach < len(emulator.wave) + 2 * BEYOND)


def _in_pixels(emulator: Emulator, wave: F64, fwhm: F64) -> tuple[F64, F64, F64]:
    """Centre, width and additional σ of each pixel, in pixels of the emulator, from the first that is made."""
    step = (emulator.wave[-1] - emulator.wave[0]) / (len(emulator.wave) - 1)
    place = (wave - emulator.wave[0]) / step + BEYOND
    width = np.diff(pixel_edges(wave)) / step
    more = np.maximum(fwhm**2 - emulated_fwhm(wave) ** 2, 0.0)
    return place, width, np.sqrt(more) / _SIGMA / step


def _reach(width: F64, spread: F64) -> F64:
    """Pixels to either side that have a weight."""
    return STENCIL + np.ceil(0.5 * (width - 1.0) + 4.0 * spread)


class Spectrograph:
    """Pixels and line-spread function of a spectrograph.

    Parameters
    ----------
    emulator : Emulator
    wave : array of shape (p,)
        Increasing pixel centres, Å in vacuum.
    fwhm : array of shape (p,), optional
        FWHM of the line-spread function at each pixel, Å; the emulator's own if absent.

    Attributes
    ----------
    emulator : Emulator
    wave, fwhm : array of shape (p,), float64
    fine_wave : array of shape (q,), float64
        Pixels of the emulated spectra that `observe` takes.

    Raises
    ------
    WaveGridError
        If the grid does not increase, has fewer than `LEAST_PIXELS` pixels, or reaches beyond the emulator.
    MoefastError
        If a line-spread function is narrower than the emulator's.
    """

    def __init__(self, emulator: Emulator, wave: F64, fwhm: F64 | None = None) -> None:
        wave = np.array(wave, dtype=float)
        fwhm = emulated_fwhm(wave) if fwhm is None else np.array(fwhm, dtype=float)
        if wave.ndim != 1 or len(wave) < LEAST_PIXELS or not np.all(np.diff(wave) > 0):
            raise WaveGridError(
                f"wave: at least {LEAST_PIXELS} increasing wavelengths expected, found shape {wave.shape}"
            )
        if fwhm.shape != wave.shape:
            raise WaveGridError(f"fwhm has shape {fwhm.shape}, wave {wave.shape}")
        _refuse_sharper(wave, fwhm)
        if not reachable(emulator, wave, fwhm).all():
            low, high = emulator.wave_edges[[0, -1]]
            raise WaveGridError(
                f"wave: {wave[0]:.1f} to {wave[-1]:.1f} Å asked for; the emulator covers {low:.1f} to {high:.1f} Å"
            )
        self.emulator, self.wave, self.fwhm = emulator, wave, fwhm
        step = (emulator.wave[-1] - emulator.wave[0]) / (len(emulator.wave) - 1)
        count = len(emulator.wave) + 2 * BEYOND
        self.fine_wave = emulator.wave[0] + step * (np.arange(count) - BEYOND)
        if same_wave(wave, emulator.wave) and np.allclose(fwhm, emulated_fwhm(wave), rtol=SHARPER):
            # The emulator's own pixels pass as they are.
            first, weights = np.arange(len(wave)) + BEYOND, np.ones((len(wave), 1))
        else:
            place, width, spread = _in_pixels(emulator, wave, fwhm)
            reach = int(_reach(width, spread).max())
            middle = np.rint(place).astype(np.int64)
            weights = _pixel_weights(place - middle, width, spread, reach)
            # Where the widest pixel of the grid would reach too far, weights are nearly zero: the window moves inwards.
            first = np.clip(middle - reach, 0, count - weights.shape[1])
            for j in np.flatnonzero(first != middle - reach):
                weights[j] = _moved(weights[j], int(middle[j] - reach - first[j]))
        self._first = first.astype(np.int64)
        self._weights = np.ascontiguousarray(weights, np.float32)

    def observe(self, fine: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the spectrograph makes of emulated spectra (n, q) on `fine_wave`: shape (n, p), float32."""
        if fine.ndim != 2 or fine.shape[1] != len(self.fine_wave) or fine.dtype != np.float32:
            raise MoefastError(
                f"fine: float32 of shape (n, {len(self.fine_wave)}) expected, found {fine.dtype} {fine.shape}"
            )
        fine, out = np.ascontiguousarray(fine), np.empty((len(fine), len(self.wave)), np.float32)
        in_threads(len(fine), lambda a, b: _observe(fine[a:b], self._first, self._weights, out[a:b]))
        return out


def _moved(weights: F64, by: int) -> F64:
    """Weights for a window that begins `by` pixels further to the blue (negative: to the red)."""
    out = np.zeros_like(weights)
    if by < 0:
        out[: len(weights) + by] = weights[-by:]
    else:
        out[by:] = weights[: len(weights) - by]
    return out


def _pixel_weights(offset: F64, width: F64, spread: F64, reach: int) -> F64:
    """Weights (p, 2 reach + 1) of the emulated pixels around, for pixels at `offset` from the middle one.

    w minimises the sum over frequencies f of S(f)^2 |sum_i w_i sinc(f) exp(2 pi i f x_i) - exp(-2 (pi f spread)^2)
    sinc(f width) exp(2 pi i f offset)|^2, with S the transfer function of the emulator's narrowest line-spread
    function; a constant counts 30 times, so that the continuum stays.
    """
    frequency = np.linspace(0.0, 0.5, 16 * (2 * reach + 1))
    let_through = np.exp(-2.0 * (math.pi * LINE_SPREAD * frequency) ** 2)
    let_through[0] = 30.0
    phase = 2.0 * math.pi * np.outer(frequency, np.arange(-reach, reach + 1))
    emulated = (let_through * np.sinc(frequency))[:, None]
    inverse = np.linalg.pinv(np.concatenate([emulated * np.cos(phase), emulated * np.sin(phase)]), rcond=1e-9)
    transfer = np.exp(-2.0 * (math.pi * np.outer(spread, frequency)) ** 2) * np.sinc(
        np.outer(width, frequency)
    )
    wanted = 2.0 * math.pi * np.outer(offset, frequency)
    transfer *= let_through
    return np.concatenate([transfer * np.cos(wanted), transfer * np.sin(wanted)], axis=1) @ inverse.T


@njit(cache=True, nogil=True, fastmath={"contract", "nsz"}, error_model="numpy")
def _observe(fine: np.ndarray, first: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    n, p = out.shape
    for i in range(n):
        for j in range(p):
            total = np.float32(0.0)
            for k in range(weights.shape[1]):
                total += weights[j, k] * fine[i, first[j] + k]
            out[i, j] = total
