"""TiO and CN cross-sections computed from spectroscopic constants.

    f(v', v'') = 2/3 nu 2 <v'| mu(r) |v''>^2,    nu in Hartree, mu = <upper| x |lower> in e a_0.

Levels are T_e + G(v) + F(J) from the constants below; <v'| mu |v''> comes from numerical wavefunctions in
Morse potentials; the rotational intensities are those of an unresolved P, Q, R structure (Hund's case a
without Lambda doubling). That gives band heads to a few Å and the right shape at R = 5000; it is no line
list for high resolution. Only 48Ti16O and 12C14N.

Sources. Constants: Huber & Herzberg (1979); those of TiO agree with the potential curves of McKemmish et al.
(2019, MNRAS 488, 2836). Spin-orbit components of the TiO gamma system are placed at the (0,0) heads 7054, 7088,
7126 Å (Phillips 1973, ApJS 26, 313), T_e of the gamma and epsilon systems shifted to match the observed heads.
Transition moments of TiO: the curves of McKemmish et al. (2019), published as the input file "Toto" of the
program Duo. CN: a moment linear in r that gives the oscillator strengths of the (1,0), (2,0), (3,0) and (2,1)
bands in the list of Brooke et al. (2014, ApJS 210, 23), read from the copy of it in linemake, to 3 %.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moefast.core.compiled import njit

from .chemistry import cn_partition, tio_partition
from .constants import BOLTZMANN, EV_PER_WAVENUMBER, HARTREE_WAVENUMBER, LIGHT, LINE_CONSTANT

TEMPERATURES = np.linspace(1900.0, 9100.0, 37)  # K, of the tabulated cross-sections
BROADENING = 1.5e5  # cm/s, microturbulence of the tables
DEBYE = 1.0 / 2.541746  # e a_0


@dataclass(frozen=True)
class State:
    """Constants of one electronic state: T_e, omega_e, omega_e x_e, B_e, alpha_e, D_e [cm^-1]."""

    te: float
    omega: float
    anharmonic: float
    b: float
    alpha: float
    d: float = 0.0

    def vibration(self, v: Any) -> Any:
        """Term value T_e + G(v), cm^-1."""
        return self.te + self.omega * (v + 0.5) - self.anharmonic * (v + 0.5) ** 2

    def rotation(self, v: int, j: np.ndarray) -> np.ndarray:
        """Rotational term F(J) = B_v N - D N^2 with N = J(J+1), cm^-1."""
        n = j * (j + 1.0)
        return (self.b - self.alpha * (v + 0.5)) * n - self.d * n * n


def step_moment(height: float, centre: float, steepness: float) -> Callable[[np.ndarray], np.ndarray]:
    """mu(r) = height (1/2 - arctan(steepness (r - centre)) / pi); Debye, Å, 1/Å; the result in e a_0."""
    return lambda r: height * DEBYE * (0.5 - np.arctan(steepness * (r - centre)) / np.pi)


def linear_moment(value: float, centre: float, slope: float) -> Callable[[np.ndarray], np.ndarray]:
    """mu(r) = value (1 + slope (r - centre)); e a_0, Å, 1/Å."""
    return lambda r: value * (1.0 + slope * (r - centre))


@dataclass(frozen=True)
class System:
    """One electronic band system.

    `moment` is <upper| x |lower> as a function of r [Å], in e a_0, between real wavefunctions; `offsets` are
    wavenumber shifts of the multiplet components, `weight` is the statistical weight of the lower level of each
    component (Lambda doubling), `q_share` the share of the Q branch.
    """

    name: str
    molecule: str
    upper: State
    lower: State
    reduced_mass: float
    offsets: tuple[tuple[float, float], ...]  # (transition shift, lower-state energy shift), cm^-1
    moment: Callable[[np.ndarray], np.ndarray]
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
        ((-141.5, 0.0), (-66.0, 97.9), (0.0, 197.4)), step_moment(4.495, 1.687, 3.312), 1.0 / 3.0,
    ),
    System(
        "TiO epsilon", "TiO", State(11882.6, 924.2, 5.1, 0.5173, 0.0033, 6.0e-7), TIO_X, 11.99,
        ((0.0, 0.0), (-13.0, 97.9), (-27.0, 197.4)), step_moment(1.608, 1.4848, 3.907), 1.0 / 3.0,
    ),
    System(
        "TiO delta", "TiO", State(14767.0, 919.76, 4.28, 0.51337, 0.00286, 6.0e-7), TIO_A1, 11.99,
        ((0.0, 0.0),), step_moment(3.996, 1.953, 3.334), 1.0 / 2.0,
    ),
    System(
        "CN red", "CN", CN_A, CN_X, 6.4622, ((26.3, 0.0), (-26.3, 0.0)), linear_moment(0.288, 1.2, -0.7), 0.5, 1.0,
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


def oscillator_strengths(system: System, n_states: int = 12) -> np.ndarray:
    """f(v', v'') of an absorbing molecule, summed over the branches, shape (n_states, n_states)."""
    r = np.arange(0.8, 3.0, 0.012)
    upper = _morse_states(system.upper, system.reduced_mass, r, n_states)
    lower = _morse_states(system.lower, system.reduced_mass, r, n_states)
    moments = (upper * system.moment(r)[:, None]).T @ lower
    v = np.arange(n_states)
    energy = system.upper.vibration(v)[:, None] - system.lower.vibration(v)
    return 4.0 / 3.0 * np.maximum(energy, 0.0) / HARTREE_WAVENUMBER * moments**2


def band_lines(system: System, low: float, high: float) -> np.ndarray:
    """Lines between two vacuum wavelengths [Å]: columns wavelength, E_low [eV], g f."""
    strengths = oscillator_strengths(system)
    j = np.arange(1.0, 161.0)
    lines = []
    for v_up in range(strengths.shape[0]):
        for v_low in range(strengths.shape[1]):
            origin = system.upper.vibration(v_up) - system.lower.vibration(v_low)
            if not 1e8 / (high + 300.0) < origin < 1e8 / (low - 300.0):
                continue
            lower = system.lower.rotation(v_low, j)
            for shift, spin_energy in system.offsets:
                energy = system.lower.vibration(v_low) - system.lower.vibration(0) + lower
                energy = (energy + system.lower.te + spin_energy) * EV_PER_WAVENUMBER
                for step, share in (
                    (1, 0.5 * (1 - system.q_share)), (0, system.q_share), (-1, 0.5 * (1 - system.q_share))
                ):  # fmt: skip
                    wave = 1e8 / (origin + shift + system.upper.rotation(v_up, j + step) - lower)
                    gf = system.weight * (2 * j + 1) * strengths[v_up, v_low] * share
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
