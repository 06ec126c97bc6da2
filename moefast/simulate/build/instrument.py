"""From the high-resolution spectrum to the pixels of the medium-resolution red arm."""

from __future__ import annotations

import numpy as np

from .synthesis import STEPS_PER_E_FOLD

RESOLVING_POWER = 5000.0  # lambda / FWHM of the Gaussian line-spread function
N_PIXELS = 4096
PIXEL = 1750.0 / N_PIXELS  # Å; the pfsspec grid covers 7100-8850 Å in vacuum
MARGIN = 32  # pixels beyond either edge: a star that moves brings them onto the detector
WAVE_EDGES = 7100.0 + PIXEL * np.arange(-MARGIN, N_PIXELS + MARGIN + 1)  # Å, vacuum
DETECTOR = slice(MARGIN, MARGIN + N_PIXELS)  # the pixels that exist


def observe(wave: np.ndarray, flux: np.ndarray) -> np.ndarray:
    """Convolve with the line-spread function, integrate over pixels, divide by the median of the detector's.

    Parameters
    ----------
    wave, flux : arrays of shape (n_wave,)
        Logarithmic grid of `synthesis.wavelength_grid` [Å] and flux density.

    Returns
    -------
    array of shape (4096 + 2 MARGIN,)
        Mean flux density in each pixel; the median over `DETECTOR` is 1.
    """
    sigma = STEPS_PER_E_FOLD / RESOLVING_POWER / 2.354820045
    reach = int(5.0 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    smooth = np.convolve(np.pad(flux, reach, mode="edge"), kernel / kernel.sum(), mode="valid")
    integral = np.concatenate([[0.0], np.cumsum(0.5 * (smooth[1:] + smooth[:-1]) * np.diff(wave))])
    pixels = np.diff(np.interp(WAVE_EDGES, wave, integral)) / np.diff(WAVE_EDGES)
    return pixels / np.median(pixels[DETECTOR])
