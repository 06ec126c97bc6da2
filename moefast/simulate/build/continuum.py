"""Continuous absorption at 7000-9000 Å: H-, neutral hydrogen, Rayleigh and electron scattering.

Scattering is treated as absorption. Sources: H- from John (1988, A&A 193, 189); hydrogen bound-free
with Kramers cross-sections (Gaunt factor 1), free-free likewise; Rayleigh scattering by H I from
Dalgarno (1962, in Kurucz 1970, SAO Special Report 309) and by H2 from Dalgarno & Williams (1962,
ApJ 136, 690). Left out: H2+, He-, H2- and metal bound-free, a few per cent here.
"""

from __future__ import annotations

import math

import numpy as np

from moefast.core.compiled import njit

from .constants import BOLTZMANN, EV_PER_KELVIN, RYDBERG_H

JOHN_FF = np.array(
    [
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [2483.3460, 285.8270, -2054.2910, 2827.7760, -1341.5370, 208.9520],
        [-3449.8890, -1158.3820, 8746.5230, -11485.6320, 5303.6090, -812.9390],
        [2200.0400, 2427.7190, -13651.1050, 16755.5240, -7510.4940, 1132.7380],
        [-696.2710, -1841.4000, 8624.9700, -10051.5300, 4400.0670, -655.0200],
        [88.2830, 444.5170, -1863.8640, 2095.2880, -901.7880, 132.9850],
    ]
)
JOHN_BF = np.array([152.519, 49.534, -118.858, 92.536, -34.194, 4.982])
PASCHEN_EDGE = 1e8 / (RYDBERG_H / 9.0)  # Å, vacuum
KRAMERS = 1.0449e-26  # cm2 Å^-3: bound-free cross-section of hydrogen = KRAMERS lambda^3 / n^5


@njit(cache=True)
def level_survival(n: float, ne: float) -> float:
    """Probability that level n of hydrogen is not dissolved by the electric field of its neighbours.

    A smooth step at the Inglis & Teller (1939, ApJ 90, 439) limit, log n_e = 23.26 - 7.5 log n.
    """
    return math.exp(-((n * (ne / 1.82e23) ** (1.0 / 7.5)) ** 7.5))


@njit(cache=True)
def hydrogen_minus(wave: float, temperature: float, ne: float, neutral: float) -> float:
    """Bound-free plus free-free absorption by H-, cm^-1, with stimulated emission."""
    micron = wave * 1e-4
    x = 1.0 / micron - 1.0 / 1.6419
    f = 0.0
    for n in range(6):
        f += JOHN_BF[n] * x ** (0.5 * n)
    cross_section = 1e-18 * micron**3 * x**1.5 * f
    stimulated = 1.0 - math.exp(-1.4388e4 / (micron * temperature))
    bound_free = (
        0.750 * temperature**-2.5 * math.exp(1.4388e4 / (1.6419 * temperature)) * stimulated * cross_section
    )
    theta = 5040.0 / temperature
    free_free = 0.0
    for n in range(6):
        j = JOHN_FF[n]
        series = micron**2 * j[0] + j[1] + j[2] / micron + j[3] / micron**2 + j[4] / micron**3
        free_free += theta ** (0.5 * (n + 2)) * (series + j[5] / micron**4)
    return neutral * ne * BOLTZMANN * temperature * (bound_free + 1e-29 * free_free)


@njit(cache=True)
def continuum(wave: float, temperature: float, ne: float, neutral: float, h2: float) -> float:
    """Absorption coefficient, cm^-1.

    Parameters
    ----------
    wave, temperature : float
        Å (vacuum), K.
    ne, neutral, h2 : float
        Electrons, H I, H2, cm^-3.
    """
    kt = EV_PER_KELVIN * temperature
    stimulated = 1.0 - math.exp(-1.4388e8 / (wave * temperature))
    total = hydrogen_minus(wave, temperature, ne, neutral)
    levels = 0.0
    for n in range(3, 9):
        edge = 911.76 * n * n
        share = KRAMERS * wave**3 / n**3 * math.exp(-13.598 * (1.0 - 1.0 / n**2) / kt)
        if wave < edge:
            levels += share
        elif n == 3 and wave < 9000.0:
            # Beyond the series limit the upper level would be m: what of it is dissolved absorbs.
            m = 1.0 / math.sqrt(max(1.0 / 9.0 - 911.76 / wave, 1e-6))
            levels += share * (1.0 - level_survival(m, ne))
    # Levels above 8 and free-free: the sum over n as an integral.
    levels += KRAMERS * wave**3 * kt / (2.0 * 13.598) * math.exp(-13.598 * (1.0 - 1.0 / 72.25) / kt)
    total += neutral * levels * stimulated
    total += neutral * 5.799e-13 / wave**4 * (1.0 + 2.452e6 / wave**2)
    return total + h2 * 8.14e-13 / wave**4 + ne * 6.6524e-25
