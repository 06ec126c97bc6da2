"""Paschen lines with Stark broadening in the quasi-static approximation.

The profile in units of the Holtsmark field, beta = |dlambda| / (K F0), is
S = c / (1 + (beta / b)^(5/2)): normalised, with the Holtsmark wing 1.496 beta^(-5/2) of ions and electrons
together. K = 5.5e-5 (n m)^4 / (m^2 - n^2) Å per e.s.u., F0 = 1.25e-9 n_e^(2/3) (Griem 1974, "Spectral
Line Broadening by Plasmas"). Upper levels dissolve at the Inglis-Teller limit; what dissolves goes to
the continuum.
"""

from __future__ import annotations

import math

import numpy as np

from moefast.core.compiled import njit

from .constants import BOLTZMANN, EV_PER_KELVIN, LINE_CONSTANT, RYDBERG_H
from .continuum import level_survival

SERIES = np.arange(9.0, 31.0)
WING_SCALE = 2.50  # b: c b^(5/2) = 1.496 with c = 1 / (2.6426 b)


@njit(cache=True)
def add_paschen_lines(
    opacity: np.ndarray, wave: np.ndarray, scale: np.ndarray, temperature: np.ndarray, state: np.ndarray
) -> None:
    """Add the lines Pa 9 to Pa 30 to `opacity`.

    Parameters
    ----------
    opacity : array of shape (n_wave, n_depths)
        In units of the reference continuum.
    wave : array of shape (n_wave,)
        Å, vacuum.
    scale : array of shape (n_depths,)
        One over the reference continuum, cm.
    temperature : array of shape (n_depths,)
        K.
    state : array of shape (n_depths, 6)
        See `chemistry.equation_of_state`.
    """
    n_depths = len(temperature)
    strength = np.empty(n_depths)
    width = np.empty(n_depths)
    for n in SERIES:
        line = 1e8 / (RYDBERG_H * (1.0 / 9.0 - 1.0 / n**2))
        f = 1.9603 / (243.0 * n**3) * (1.0 / 9.0 - 1.0 / n**2) ** -3
        stark = 5.5e-5 * (3.0 * n) ** 4 / (n * n - 9.0)
        for d in range(n_depths):
            t, ne, neutral = temperature[d], state[d, 0], state[d, 2]
            population = neutral * 9.0 * math.exp(-12.0875 / (EV_PER_KELVIN * t))
            population *= (1.0 - math.exp(-1.4388e8 / (line * t))) * level_survival(n, ne)
            doppler = line * math.sqrt(2.0 * BOLTZMANN * t / 1.6735e-24) / 2.99792458e10
            b = WING_SCALE * stark * 1.25e-9 * ne ** (2.0 / 3.0)
            width[d] = math.sqrt(b * b + doppler * doppler)
            # The cross-section per unit wavelength: LINE_CONSTANT f lambda^2 / c.
            strength[d] = LINE_CONSTANT * f * population * line * line * 1e-8 / 2.99792458e10
            strength[d] *= scale[d] / (2.6426 * width[d])
        if strength[n_depths - 12] < 1e-9:
            continue
        first = np.searchsorted(wave, line - 80.0)
        last = np.searchsorted(wave, line + 80.0)
        for i in range(first, last):
            x = abs(wave[i] - line)
            for d in range(n_depths):
                r = x / width[d]
                opacity[i, d] += strength[d] / (1.0 + r * r * math.sqrt(r))
