"""Equation of state: electrons, ionisation, and the molecules that matter between 7100 and 8850 Å.

Saha ionisation of 26 elements and H2 are solved together for the electron density. Oxygen is then shared
between atoms, CO, SiO, OH and H2O, nitrogen between atoms and N2; CN and TiO follow from what is free.
Left out: TiO2, polyatomic carbon molecules.

Dissociation energies and spectroscopic constants: Huber & Herzberg (1979, "Constants of Diatomic
Molecules"); vibrations and rotation of H2O: Herzberg (1966); D0(CN) 7.724 eV as in linemake (Placco et al. 2021,
RNAAS 5, 92); D0(TiO) 6.87 +- 0.07 eV from Loock et al. (1998, J. Chem. Phys. 109, 8980).
"""

from __future__ import annotations

import math

import numpy as np

from moefast.core.compiled import njit

from .constants import ATOMIC_MASS, BOLTZMANN, ELECTRON_MASS, ELECTRON_VOLT, EV_PER_KELVIN, LIGHT, PLANCK
from .elements import INDEX

H, C, N, SI, TI = (INDEX[name] for name in ("H", "C", "N", "Si", "Ti"))
OXYGEN = INDEX["O"]


@njit(cache=True)
def rigid_partition(
    temperature: float, b: float, omega: float, electronic_weight: float, symmetry: float
) -> float:
    """Rotation and vibration of a diatomic molecule: rigid rotor, harmonic oscillator; B, omega in cm^-1."""
    hc_kt = PLANCK * LIGHT / (BOLTZMANN * temperature)
    return electronic_weight / (symmetry * hc_kt * b) / (1.0 - math.exp(-hc_kt * omega))


@njit(cache=True)
def tio_partition(temperature: float) -> float:
    """Partition function of TiO: ground triplet X 3Delta with its spin splitting, and the a 1Delta state."""
    kt = EV_PER_KELVIN * temperature / 1.239842e-4
    spin = 2.0 * (1.0 + math.exp(-97.9 / kt) + math.exp(-197.4 / kt))
    return rigid_partition(temperature, 0.5339, 1009.0, spin + 2.0 * math.exp(-3448.0 / kt), 1.0)


@njit(cache=True)
def cn_partition(temperature: float) -> float:
    """Partition function of CN: X 2Sigma+ and the A 2Pi state at 9115 cm^-1."""
    kt = EV_PER_KELVIN * temperature / 1.239842e-4
    return rigid_partition(temperature, 1.891, 2062.0, 2.0 + 4.0 * math.exp(-9115.0 / kt), 1.0)


@njit(cache=True)
def dissociation(
    temperature: float, reduced_mass: float, u_a: float, u_b: float, q_ab: float, energy: float
) -> float:
    """n(A) n(B) / n(AB) in cm^-3 (Guldberg-Waage constant); reduced mass in u, energy in eV."""
    kt = BOLTZMANN * temperature
    translation = (2.0 * math.pi * reduced_mass * ATOMIC_MASS * kt / PLANCK**2) ** 1.5
    return translation * u_a * u_b / q_ab * math.exp(-energy * ELECTRON_VOLT / kt)


@njit(cache=True)
def water_dissociation(temperature: float, u_oxygen: float) -> float:
    """n(H)^2 n(O) / n(H2O) in cm^-6: rigid asymmetric rotor with three harmonic vibrations."""
    kt = BOLTZMANN * temperature
    hc_kt = PLANCK * LIGHT / kt
    rotation = math.sqrt(math.pi / (27.88 * 14.51 * 9.28)) / 2.0 / hc_kt**1.5
    vibration = 1.0
    for omega in (3657.0, 1595.0, 3756.0):
        vibration /= 1.0 - math.exp(-hc_kt * omega)
    unit = (2.0 * math.pi * ATOMIC_MASS * kt / PLANCK**2) ** 1.5
    masses = (1.008 * 1.008 * 15.999 / 18.015) ** 1.5
    return unit**2 * masses * 4.0 * u_oxygen / (rotation * vibration) * math.exp(-9.511 * ELECTRON_VOLT / kt)


@njit(cache=True)
def equation_of_state(
    temperature: np.ndarray,
    pg: np.ndarray,
    log_pe: np.ndarray,
    per_h: np.ndarray,
    u: np.ndarray,
    chi: np.ndarray,
    state: np.ndarray,
    saha: np.ndarray,
) -> None:
    """Fill `state` and `saha` for every depth.

    Parameters
    ----------
    temperature, pg, log_pe : arrays of shape (n_depths,)
        K, dyn/cm2, ln dyn/cm2 (a starting value only).
    per_h : array of shape (n_elements,)
        Atoms per hydrogen nucleus.
    u, chi : arrays of shape (n_depths, n_elements, 2) and (n_elements,)
        Partition functions and ionisation energies [eV].
    state : array of shape (n_depths, 6)
        Out, cm^-3: electrons, hydrogen nuclei, H I, H2, TiO, CN.
    saha : array of shape (n_depths, n_elements)
        Out: n_e n(II) / n(I), cm^-3.
    """
    total_per_h = per_h.sum()
    for d in range(len(temperature)):
        t = temperature[d]
        kt = BOLTZMANN * t
        particles = pg[d] / kt
        factor = 2.0 * (2.0 * math.pi * ELECTRON_MASS * kt / PLANCK**2) ** 1.5
        for i in range(len(per_h)):
            saha[d, i] = factor * u[d, i, 1] / u[d, i, 0] * math.exp(-chi[i] * ELECTRON_VOLT / kt)
        k_h2 = dissociation(t, 0.504, 2.0, 2.0, rigid_partition(t, 60.85, 4401.2, 1.0, 2.0), 4.478)
        ne = min(math.exp(log_pe[d]) / kt, 0.4 * particles)
        h2 = 0.0
        nuclei = particles / total_per_h
        neutral = nuclei
        for _ in range(200):
            nuclei = (particles - ne + h2) / total_per_h
            a = 2.0 / k_h2
            b = 1.0 + saha[d, H] / ne
            neutral = 2.0 * nuclei / (b + math.sqrt(b * b + 4.0 * a * nuclei))
            h2 = neutral * neutral / k_h2
            electrons = neutral * saha[d, H] / ne
            for i in range(1, len(per_h)):
                electrons += nuclei * per_h[i] * saha[d, i] / (ne + saha[d, i])
            converged = abs(electrons / ne - 1.0) < 1e-8
            ne = math.sqrt(ne * electrons)
            if converged:
                break
        state[d, 0], state[d, 1], state[d, 2], state[d, 3] = ne, nuclei, neutral, h2

        carbon, oxygen, nitrogen = nuclei * per_h[C], nuclei * per_h[OXYGEN], nuclei * per_h[N]
        silicon = nuclei * per_h[SI] / (1.0 + saha[d, SI] / ne)
        k_co = dissociation(
            t, 6.857, u[d, C, 0], u[d, OXYGEN, 0], rigid_partition(t, 1.9226, 2170.0, 1.0, 1.0), 11.09
        )
        k_sio = dissociation(
            t, 10.18, u[d, SI, 0], u[d, OXYGEN, 0], rigid_partition(t, 0.7242, 1241.6, 1.0, 1.0), 8.26
        )
        k_oh = dissociation(
            t, 0.948, 2.0, u[d, OXYGEN, 0], rigid_partition(t, 18.55, 3737.8, 4.0, 1.0), 4.392
        )
        # Oxygen not in CO, SiO, OH, H2O: the balance rises monotonically with free_o, so bisect its logarithm.
        held = 1.0 + neutral / k_oh + neutral**2 / water_dissociation(t, u[d, OXYGEN, 0])
        low, high = -60.0, 0.0
        for _ in range(60):
            middle = 0.5 * (low + high)
            free_o = oxygen * math.exp(middle)
            balance = free_o * (held + carbon / (k_co + free_o) + silicon / (k_sio + free_o))
            if balance > oxygen:
                high = middle
            else:
                low = middle
        free_o = oxygen * math.exp(0.5 * (low + high))
        free_c = carbon / (1.0 + free_o / k_co)
        k_n2 = dissociation(
            t, 7.002, u[d, N, 0], u[d, N, 0], rigid_partition(t, 1.998, 2358.6, 1.0, 2.0), 9.759
        )
        free_n = 2.0 * nitrogen / (1.0 + math.sqrt(1.0 + 8.0 * nitrogen / k_n2))
        k_tio = dissociation(t, 11.99, u[d, TI, 0], u[d, OXYGEN, 0], tio_partition(t), 6.87)
        k_cn = dissociation(t, 6.466, u[d, C, 0], u[d, N, 0], cn_partition(t), 7.724)
        neutral_ti = nuclei * per_h[TI] / (1.0 + saha[d, TI] / ne + free_o / k_tio)
        state[d, 4] = neutral_ti * free_o / k_tio
        state[d, 5] = free_c * free_n / k_cn


def new_state(n_depths: int, n_elements: int) -> tuple[np.ndarray, np.ndarray]:
    """Output arrays for `equation_of_state`."""
    return np.zeros((n_depths, 6)), np.zeros((n_depths, n_elements))
