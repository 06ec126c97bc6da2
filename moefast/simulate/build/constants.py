"""Physical constants in cgs units (CODATA 2018), and two conversions."""

from __future__ import annotations

BOLTZMANN = 1.380649e-16  # erg / K
PLANCK = 6.62607015e-27  # erg s
LIGHT = 2.99792458e10  # cm / s
ELECTRON_VOLT = 1.602176634e-12  # erg
ELECTRON_MASS = 9.1093837e-28  # g
ATOMIC_MASS = 1.66053907e-24  # g
EV_PER_KELVIN = BOLTZMANN / ELECTRON_VOLT
EV_PER_WAVENUMBER = PLANCK * LIGHT / ELECTRON_VOLT  # eV cm
LINE_CONSTANT = 0.026540  # pi e^2 / (m_e c), cm^2 Hz
RYDBERG_H = 109677.58  # cm^-1
HARTREE_WAVENUMBER = 2.0 * 109737.31568  # cm^-1
