"""What differs between two spectra of one star and is not noise, as directions of spectra and their prior widths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moefast.simulate.noise import SKY_GROUPS, Instrument, airglow_groups, airglow_lines

__all__ = ["sky_residuals", "slopes"]

F64 = NDArray[np.float64]

AIRGLOW = (7100.0, 8870.0)
"""Å: what the table of airglow lines covers."""
LEAST_LIGHT = 1e-6
"""Of the brightest line, where a pixel has any."""
SKY_BANDS = 10
"""Bands of wavelength in which residuals of sky lines are free apart, beyond that table."""
ENVELOPE = 41
"""Pixels, odd: the least noise within so many is that between sky lines."""


def slopes(wave: F64, reference: NDArray, widths: Sequence[float]) -> F64:
    """Legendre polynomials 1, 2, … of wavelength times the reference spectrum and their prior widths, (p, q)."""
    x = 2 * (wave - wave[0]) / (wave[-1] - wave[0]) - 1
    each = [
        width * reference * np.polynomial.legendre.Legendre.basis(k + 1)(x) for k, width in enumerate(widths)
    ]
    return np.stack(each, axis=1) if each else np.empty((wave.size, 0))


def sky_residuals(wave: F64, noise_shape: F64, width: float, n_bands: int = SKY_BANDS) -> F64:
    """What sky subtraction leaves of the lines of the night sky, (p, q), in units of the training set's flux.

    Where the table of airglow covers all wavelengths, the lines are its own, and groups that brighten together are free
    apart. Elsewhere they are what the noise variance has above its lower envelope, and bands of wavelength, each fading
    into the next, are free apart. The table is better: noise is not proportional to the light of a line.

    Parameters
    ----------
    wave : array of shape (p,), Å
    noise_shape : array of shape (p,)
        Mean noise variance of the training set.
    width : float
        Prior width in standard deviations of the noise, in the pixel where the lines are brightest.
    n_bands : int
    """
    if AIRGLOW[0] <= wave[0] and wave[-1] <= AIRGLOW[1]:
        parts = _airglow(wave).T
        lines = parts.sum(1)
    else:
        # Only now, as below: fits need it, predictions never.
        from scipy.ndimage import median_filter, minimum_filter1d

        envelope = median_filter(minimum_filter1d(noise_shape, ENVELOPE), 2 * ENVELOPE + 1)
        lines = np.maximum(noise_shape - envelope, 0)
        place = np.linspace(0, n_bands - 1, noise_shape.size)
        parts = lines[:, None] * np.maximum(1 - np.abs(place[:, None] - np.arange(n_bands)), 0)
    brightest = lines.argmax()
    if not width or lines[brightest] == 0:
        return np.empty((noise_shape.size, 0))
    shapes: F64 = width * np.sqrt(noise_shape[brightest]) / lines[brightest] * parts
    return shapes[:, shapes.any(0)]


def _airglow(wave: F64) -> F64:
    """Light of each group of airglow lines at each pixel, (g, p), in units that are the same for all."""
    places, intensities = airglow_lines()
    width = np.hypot(Instrument().lsf_sigma, np.gradient(wave) / np.sqrt(12))
    profiles = np.exp(-0.5 * ((wave - places[:, None]) / width) ** 2) / width
    groups = airglow_groups() == np.arange(len(SKY_GROUPS))[:, None]
    light: F64 = (groups * intensities) @ profiles
    # A line of the next pixel but ten is no light.
    return np.where(light > LEAST_LIGHT * light.max(), light, 0.0)
