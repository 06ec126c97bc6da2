"""TiO and CN cross-sections computed from spectroscopic constants.

Levels are T_e + G(v) + F(J) from the constants below; Franck-Condon factors come from numerical
wavefunctions in Morse potentials; the rotational intensities are those of an unresolved P, Q, R
structure (Hund's case a without Lambda doubling). That gives band heads to a few Å and the right
shape at R = 5000; it is no line list for high resolution. Only 48Ti16O and 12C14N.

Sources: constants from Huber & Herzberg (1979); spin-orbit components of the TiO gamma system placed
at the (0,0) heads 7054, 7088, 7126 Å (Phillips 1973, ApJS 26, 313), T_e of the gamma and epsilon systems
shifted to match the observed heads; electronic oscillator strengths of TiO from Jørgensen (1994, A&A
284, 179) as collected by Alvarez & Plez (1998, A&A 330, 1109); CN red-system strength from the (0,0)
band, f = 2.4e-3 (Bauschlicher, Langhoff & Taylor 1988, ApJ 332, 531).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from .chemistry import cn_partition, tio_partition
from .constants import BOLTZMANN, EV_PER_WAVENUMBER, LIGHT, LINE_CONSTANT

TEMPERATURES = np.linspace(1900.0, 9100.0, 37)  # K, of the tabulated cross-sections
BROADENING = 1.5e5  # cm/s, microturbulence of the tables


@dataclass(frozen=True)
class State:
    """Constants of one electronic state: T_e, omega_e, omega_e x_e, B_e, alpha_e, D_e [cm^-1]."""

    te: float
    omega: float
    anharmonic: float
    b: float
    alpha: float
    d: float = 0.0

    def vibration(self, v: int) -> float:
        """Term value T_e + G(v), cm^-1."""
        return self.te + self.omega * (v + 0.5) - self.anharmonic * (v + 0.5) ** 2

    def rotation(self, v: int, j: np.ndarray) -> np.ndarray:
        """Rotational term F(J) = B_v N - D N^2 with N = J(J+1), cm^-1."""
        n = j * (j + 1.0)
        return (self.b - self.alpha * (v + 0.5)) * n - self.d * n * n


@dataclass(frozen=True)
class System:
    """One electronic band system.

    `offsets` are wavenumber shifts of the multiplet components, `weights` the statistical weight of
    the lower level of each component (spin times Lambda), `strength` the electronic oscillator strength
    of an absorbing molecule, `q_share` the share of the Q branch.
    """

    name: str
    molecule: str
    upper: State
    lower: State
    reduced_mass: float
    offsets: tuple[tuple[float, float], ...]  # (transition shift, lower-state energy shift), cm^-1
    strength: float
    q_share: float
    weight: float = 2.0


TIO_X = State(0.0, 1009.02, 4.498, 0.53541, 0.00301, 6.0e-7)
TIO_A1 = State(3443.28, 1018.27, 4.52, 0.53760, 0.00298, 6.0e-7)
CN_X = State(0.0, 2068.59, 13.087, 1.8997, 0.01736, 6.4e-6)
CN_A = State(9245.28, 1812.56, 12.609, 1.7151, 0.01708, 6.1e-6)

SYSTEMS = (
    # Components 3Phi2-3Delta1, 3Phi3-3Delta2, 3Phi4-3Delta3; heads 7126, 7088, 7054 Å (air).
    System(
        "TiO gamma", "TiO", State(14232.4, 867.78, 3.942, 0.50739, 0.00315, 6.9e-7), TIO_X, 11.99,
        ((-141.5, 0.0), (-66.0, 97.9), (0.0, 197.4)), 0.0786, 1.0 / 3.0,
    ),
    System(
        "TiO epsilon", "TiO", State(11882.6, 924.2, 5.1, 0.5173, 0.0033, 6.0e-7), TIO_X, 11.99,
        ((0.0, 0.0), (-13.0, 97.9), (-27.0, 197.4)), 0.0023, 1.0 / 3.0,
    ),
    System(
        "TiO delta", "TiO", State(14767.0, 919.76, 4.28, 0.51337, 0.00286, 6.0e-7), TIO_A1, 11.99,
        ((0.0, 0.0),), 0.048, 1.0 / 2.0,
    ),
    System(
        "CN red", "CN", CN_A, CN_X, 6.4622, ((26.3, 0.0), (-26.3, 0.0)), 4.7e-3, 0.5, 1.0,
    ),
)  # fmt: skip


def _morse_states(state: State, mass: float, r: np.ndarray, n_states: int) -> np.ndarray:
    """Vibrational wavefunctions on the grid r [Å], columns, by finite differences."""
    constant = 16.857629  # hbar^2/2 in u Å^2 cm^-1
    depth = state.omega**2 / (4.0 * state.anharmonic)
    r_e = np.sqrt(constant / (mass * state.b))
    beta = np.sqrt(state.anharmonic * mass / constant)
    potential = depth * (1.0 - np.exp(-beta * (r - r_e))) ** 2
    h = r[1] - r[0]
    kinetic = constant / mass / h**2
    # Sinc-function (Colbert-Miller) kinetic energy: exact for band-limited functions.
    k = np.arange(len(r))
    difference = k[:, None] - k[None, :]
    with np.errstate(divide="ignore"):
        t = kinetic * (-1.0) ** difference * 2.0 / difference.astype(float) ** 2
    np.fill_diagonal(t, kinetic * np.pi**2 / 3.0)
    _, vectors = np.linalg.eigh(t + np.diag(potential))
    return vectors[:, :n_states]


def franck_condon(system: System, n_states: int = 12) -> np.ndarray:
    """Franck-Condon factors q(v', v''), shape (n_states, n_states)."""
    r = np.arange(0.8, 3.0, 0.012)
    upper = _morse_states(system.upper, system.reduced_mass, r, n_states)
    lower = _morse_states(system.lower, system.reduced_mass, r, n_states)
    return (upper.T @ lower) ** 2


def band_lines(system: System, low: float, high: float) -> np.ndarray:
    """Lines between two vacuum wavelengths [Å]: columns wavelength, E_low [eV], g f."""
    q = franck_condon(system)
    j = np.arange(1.0, 161.0)
    centre = system.upper.vibration(0) - system.lower.vibration(0)
    lines = []
    for v_up in range(q.shape[0]):
        for v_low in range(q.shape[1]):
            origin = system.upper.vibration(v_up) - system.lower.vibration(v_low)
            if not 1e8 / (high + 300.0) < origin < 1e8 / (low - 300.0):
                continue
            # The electronic moment, not f, is taken as constant: f scales with wavenumber.
            f = system.strength * q[v_up, v_low] * origin / centre
            lower = system.lower.rotation(v_low, j)
            for shift, spin_energy in system.offsets:
                energy = system.lower.vibration(v_low) - system.lower.vibration(0) + lower
                energy = (energy + system.lower.te + spin_energy) * EV_PER_WAVENUMBER
                for step, share in (
                    (1, 0.5 * (1 - system.q_share)), (0, system.q_share), (-1, 0.5 * (1 - system.q_share))
                ):  # fmt: skip
                    wave = 1e8 / (origin + shift + system.upper.rotation(v_up, j + step) - lower)
                    gf = system.weight * (2 * j + 1) * f * share
                    lines.append(np.stack([wave, energy, gf], axis=1))
    table = np.concatenate(lines)
    return table[(table[:, 0] > low) & (table[:, 0] < high)]


@njit(cache=True)
def _add_lines(
    lines: np.ndarray,
    log_wave0: float,
    step: float,
    temperature: float,
    mass: float,
    partition: float,
    table: np.ndarray,
) -> None:
    """Sum of Doppler profiles on the logarithmic wavelength grid, cm2 per molecule."""
    kt = 8.617333262e-5 * temperature
    velocity = np.sqrt(2.0 * BOLTZMANN * temperature / (mass * 1.66053907e-24) + BROADENING**2) / LIGHT
    reach = int(4.0 * velocity / step) + 1
    for line in range(lines.shape[0]):
        wave = lines[line, 0]
        strength = lines[line, 2] * np.exp(-lines[line, 1] / kt) / partition
        strength *= 1.0 - np.exp(-1.4388e8 / (wave * temperature))
        strength *= LINE_CONSTANT * wave * 1e-8 / (1.7724539 * velocity * LIGHT)
        position = (np.log(wave) - log_wave0) / step
        centre = int(position)
        for i in range(max(0, centre - reach), min(len(table), centre + reach + 1)):
            u = (i - position) * step / velocity
            table[i] += strength * np.exp(-u * u)


def cross_sections(wave: np.ndarray) -> np.ndarray:
    """Cross-sections of TiO and CN, shape (2, n_temperatures, n_wave), cm2 per molecule.

    Parameters
    ----------
    wave : array of shape (n_wave,)
        Vacuum wavelengths [Å] on a logarithmic grid.
    """
    step = float(np.log(wave[1] / wave[0]))
    result = np.zeros((2, len(TEMPERATURES), len(wave)))
    for m, (molecule, mass, partition) in enumerate(
        (("TiO", 63.94, tio_partition), ("CN", 26.0, cn_partition))
    ):
        lines = np.concatenate([band_lines(s, wave[0], wave[-1]) for s in SYSTEMS if s.molecule == molecule])
        for k, temperature in enumerate(TEMPERATURES):
            _add_lines(
                lines, float(np.log(wave[0])), step, temperature, mass, partition(temperature), result[m, k]
            )
    return result
