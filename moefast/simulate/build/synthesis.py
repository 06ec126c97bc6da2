"""Emergent spectrum of one star: LTE, plane-parallel, pure absorption.

Design: everything is opacity divided by the continuum opacity at one wavelength, on a grid
(wavelength, depth) with equal steps in ln lambda. Lines walk outwards from their centre until they are
negligible at every depth. Molecules come from tabulated cross-sections. Flux by three-point Gauss
quadrature in mu with the source function linear in optical depth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from moefast.core.compiled import njit

from . import chemistry, elements, marcs
from .constants import ATOMIC_MASS, BOLTZMANN, EV_PER_KELVIN, LIGHT, LINE_CONSTANT
from .continuum import PASCHEN_EDGE, continuum
from .hydrogen import add_paschen_lines
from .lines import AtomicLines, read_lines
from .molecules import TEMPERATURES, cross_sections

STEPS_PER_E_FOLD = 200_000.0  # samples per unit of ln lambda: 1.5 km/s, below every Doppler width
FIRST_WAVE, LAST_WAVE = 7080.0, 8870.0  # Å, vacuum: the padded pixels and 5 sigma of the line-spread function
REFERENCE = 8000.0  # Å, where the reference continuum is taken
NEGLIGIBLE = 1.0e-3  # line opacity over continuum opacity where a wing is cut off
DEEPEST_FOR_CUT = 44  # lg tau_Rosseland = 0.3


def wavelength_grid() -> np.ndarray:
    """Vacuum wavelengths [Å], equidistant in the logarithm."""
    n = int(math.log(LAST_WAVE / FIRST_WAVE) * STEPS_PER_E_FOLD)
    return FIRST_WAVE * np.exp(np.arange(n) / STEPS_PER_E_FOLD)


@njit(cache=True, fastmath=True)
def _voigt(a: float, u: float) -> float:
    """H(a, u) after Humlicek (1982, JQSRT 27, 437), relative error < 1e-4."""
    s = u + a
    t = complex(a, -u)
    if s >= 15.0:
        return (t * 0.5641896 / (0.5 + t * t)).real
    if s >= 5.5:
        z = t * t
        return (t * (1.410474 + z * 0.5641896) / (0.75 + z * (3.0 + z))).real
    if a >= 0.195 * u - 0.176:
        top = 16.4955 + t * (20.20933 + t * (11.96482 + t * (3.778987 + t * 0.5642236)))
        bottom = 16.4955 + t * (38.82363 + t * (39.27121 + t * (21.69274 + t * (6.699398 + t))))
        return (top / bottom).real
    z = t * t
    top = 36183.31 - z * (
        3321.9905 - z * (1540.787 - z * (219.0313 - z * (35.76683 - z * (1.320522 - z * 0.56419))))
    )
    bottom = 32066.6 - z * (
        24322.84 - z * (9022.228 - z * (2186.181 - z * (364.2191 - z * (61.57037 - z * (1.841439 - z)))))
    )
    return math.exp(-(u * u - a * a)) * math.cos(2.0 * u * a) - (t * top / bottom).real


@njit(cache=True)
def _continuum_opacity(
    wave: np.ndarray, temperature: np.ndarray, state: np.ndarray, scale: np.ndarray, opacity: np.ndarray
) -> None:
    """Continuum in units of the reference, linear in wavelength between nodes on both sides of the edge."""
    edge = PASCHEN_EDGE
    nodes = np.empty(36)
    for j in range(36):
        nodes[j] = wave[0] + (edge - 0.5 - wave[0]) * j / 11.0 if j < 12 else edge + 0.5
        if j >= 12:
            nodes[j] = edge + 0.5 + (wave[-1] - edge - 0.5) * ((j - 12) / 23.0) ** 1.5
    values = np.empty((36, len(temperature)))
    for j in range(36):
        for d in range(len(temperature)):
            values[j, d] = (
                continuum(nodes[j], temperature[d], state[d, 0], state[d, 2], state[d, 3]) * scale[d]
            )
    j = 0
    for i in range(len(wave)):
        while j < 34 and wave[i] > nodes[j + 1]:
            j += 1
        x = (wave[i] - nodes[j]) / (nodes[j + 1] - nodes[j])
        for d in range(len(temperature)):
            opacity[i, d] = values[j, d] * (1.0 - x) + values[j + 1, d] * x


@njit(cache=True, fastmath=True)
def _add_atomic_lines(
    wave: np.ndarray,
    steps: float,
    lines: np.ndarray,
    element: np.ndarray,
    stage: np.ndarray,
    mass: np.ndarray,
    per_h: np.ndarray,
    u: np.ndarray,
    saha: np.ndarray,
    temperature: np.ndarray,
    state: np.ndarray,
    scale: np.ndarray,
    microturbulence: float,
    opacity: np.ndarray,
) -> np.ndarray:
    """Add Voigt profiles of all lines.

    Columns of `lines`: wavelength, E_low, gf, vdW width at 10 000 K per H I, radiation damping.
    Returns the largest line-centre strength of each line at depths above `DEEPEST_FOR_CUT`.
    """
    n_depths = len(temperature)
    amplitude = np.empty(n_depths)
    damping = np.empty(n_depths)
    doppler = np.empty(n_depths)
    strongest = np.zeros(lines.shape[0])
    log0 = math.log(wave[0])
    for k in range(lines.shape[0]):
        line, e_low, gf, vdw, rad = lines[k, 0], lines[k, 1], lines[k, 2], lines[k, 3], lines[k, 4]
        el = element[k]
        for d in range(n_depths):
            t = temperature[d]
            ratio = saha[d, el] / state[d, 0]
            share = ratio / (1.0 + ratio) if stage[k] == 1 else 1.0 / (1.0 + ratio)
            n = state[d, 1] * per_h[el] * share / u[d, el, stage[k]]
            n *= gf * math.exp(-e_low / (EV_PER_KELVIN * t)) * (1.0 - math.exp(-1.4388e8 / (line * t)))
            velocity = math.sqrt(2.0 * BOLTZMANN * t / (mass[el] * ATOMIC_MASS) + microturbulence**2)
            width = velocity / (line * 1e-8)
            # Helium and H2 perturbers relative to H I: polarisability and speed (Gray 2005).
            partners = state[d, 2] + 0.42 * 0.085 * state[d, 1] + 0.85 * state[d, 3]
            gamma = rad + vdw * (t / 1e4) ** 0.3 * partners
            damping[d] = gamma / (12.566370614 * width)
            amplitude[d] = LINE_CONSTANT * n / (1.7724539 * width) * scale[d]
            doppler[d] = velocity / LIGHT
            if 4 < d < DEEPEST_FOR_CUT and amplitude[d] > strongest[k]:
                strongest[k] = amplitude[d]
        if strongest[k] < NEGLIGIBLE:
            continue
        centre = int((math.log(line) - log0) * steps)
        for direction in (-1, 1):
            # A line beyond the end of the grid still reaches it with its wing.
            i = min(centre, len(wave) - 1) if direction == -1 else max(centre + 1, 0)
            while 0 <= i < len(wave):
                distance = abs(wave[i] / line - 1.0)
                largest = 0.0
                for d in range(n_depths):
                    value = amplitude[d] * _voigt(damping[d], distance / doppler[d])
                    opacity[i, d] += value
                    if d < DEEPEST_FOR_CUT and value > largest:
                        largest = value
                if largest < NEGLIGIBLE:
                    break
                i += direction
    return strongest


@njit(cache=True)
def _add_molecules(
    tables: np.ndarray,
    first_temperature: float,
    temperature_step: float,
    temperature: np.ndarray,
    state: np.ndarray,
    scale: np.ndarray,
    opacity: np.ndarray,
) -> None:
    """Add TiO and CN: cross-sections linear between the tabulated temperatures."""
    for m in range(2):
        for d in range(len(temperature)):
            density = state[d, 4 + m] * scale[d]
            if density * 1e-15 < 1e-5:
                continue
            place = (temperature[d] - first_temperature) / temperature_step
            j = min(max(int(place), 0), tables.shape[1] - 2)
            x = min(max(place - j, 0.0), 1.0)
            for i in range(opacity.shape[0]):
                opacity[i, d] += density * (tables[m, j, i] * (1.0 - x) + tables[m, j + 1, i] * x)


@njit(cache=True, fastmath=True)
def _flux(
    wave: np.ndarray,
    temperature: np.ndarray,
    mass_scale: np.ndarray,
    log_column: np.ndarray,
    opacity: np.ndarray,
    mu: np.ndarray,
    weight: np.ndarray,
    flux: np.ndarray,
) -> None:
    """Sum of weight x intensity over the angles, arbitrary scale; d tau = opacity mass_scale d ln(column)."""
    n_depths = len(temperature)
    tau = np.empty(n_depths)
    source = np.empty(n_depths)
    for i in range(len(wave)):
        x = 1.4387769e8 / wave[i]
        for d in range(n_depths):
            source[d] = 1e3 / (math.exp(x / temperature[d]) - 1.0)
        previous = opacity[i, 0] * mass_scale[0]
        tau[0] = previous  # opacity per gram is taken as constant above the first depth
        bottom = n_depths
        for d in range(1, n_depths):
            current = opacity[i, d] * mass_scale[d]
            tau[d] = tau[d - 1] + 0.5 * (log_column[d] - log_column[d - 1]) * (previous + current)
            previous = current
            if tau[d] > 25.0:
                bottom = d + 1
                break
        total = 0.0
        for m in range(len(mu)):
            transmitted = math.exp(-tau[0] / mu[m])
            intensity = source[0] * (1.0 - transmitted)
            for d in range(1, bottom):
                step = (tau[d] - tau[d - 1]) / mu[m]
                if step > 1e-3:
                    passed = math.exp(-step)
                    a = 1.0 - passed
                    b = a / step - passed
                else:
                    a = step - 0.5 * step * step
                    b = 0.5 * step - step * step / 3.0
                    passed = 1.0 - a
                intensity += transmitted * (source[d - 1] * a + (source[d] - source[d - 1]) * b)
                transmitted *= passed
                if transmitted < 1e-7:
                    break
            intensity += transmitted * source[bottom - 1]
            total += weight[m] * intensity
        flux[i] = 2e20 * total / wave[i] ** 5


def microturbulence(log_g: float) -> float:
    """Microturbulent velocity, cm/s: 2.478 - 0.325 log g km/s (Holtzman et al. 2015, AJ 150, 148)."""
    return (2.478 - 0.325 * log_g) * 1e5


# Cosine of the angle to the normal, and weight of its intensity in what is returned.
FLUX = (
    np.array([0.1127016654, 0.5, 0.8872983346]),
    np.array([0.1127016654, 0.5, 0.8872983346]) * np.array([0.2777777778, 0.4444444444, 0.2777777778]),
)
DISK_CENTRE = (np.ones(1), np.ones(1))


@dataclass
class Synthesizer:
    """Spectra on the high-resolution grid for any labels inside the MARCS grid.

    Attributes
    ----------
    grid : array
        From `marcs.read_grid`.
    wave : array of shape (n_wave,)
        Å, vacuum.
    lines : AtomicLines
    molecules : array of shape (2, n_temperatures, n_wave)
    """

    grid: np.ndarray
    wave: np.ndarray
    lines: AtomicLines
    molecules: np.ndarray

    @classmethod
    def prepare(cls, grid: np.ndarray, lines: AtomicLines | None = None) -> Synthesizer:
        """Tabulate the molecules and read the line table."""
        wave = wavelength_grid()
        return cls(grid, wave, read_lines() if lines is None else lines, cross_sections(wave))

    def synthesize(
        self,
        t_eff: float,
        log_g: float,
        m_h: float,
        a_m: float = 0.0,
        c_m: float = 0.0,
        *,
        angles: tuple[np.ndarray, np.ndarray] = FLUX,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Flux, shape (n_wave,), and central strength of each line, shape (n_lines,).

        `angles` may be `DISK_CENTRE`, for the intensity there.

        The atmosphere's structure depends on T_eff, log g and [M/H] only; [a/M] and [C/M] change
        electrons, molecules and lines in it.
        """
        temperature, log_pg, log_pe, log_column = marcs.interpolate(self.grid, t_eff, log_g, m_h)
        per_h = elements.abundances(m_h, a_m, c_m)
        u = elements.partition_functions(temperature)
        state, saha = chemistry.new_state(len(temperature), len(per_h))
        chemistry.equation_of_state(
            temperature, np.exp(log_pg), log_pe, per_h, u, elements.IONISATION_EV, state, saha
        )
        reference = np.array(
            [continuum(REFERENCE, t, s[0], s[2], s[3]) for t, s in zip(temperature, state, strict=True)]
        )
        scale = 1.0 / reference
        density = state[:, 1] * (per_h @ elements.MASSES) * ATOMIC_MASS
        mass_scale = reference / density * np.exp(log_column)
        opacity = np.empty((len(self.wave), len(temperature)))
        _continuum_opacity(self.wave, temperature, state, scale, opacity)
        lines = self.lines
        damping = 10.0**lines.log_vdw, 10.0**lines.log_rad
        table = np.stack([lines.wave, lines.e_low, 10.0**lines.log_gf, *damping], axis=1)
        strongest = _add_atomic_lines(
            self.wave, STEPS_PER_E_FOLD, table, lines.element, lines.stage, elements.MASSES, per_h, u, saha,
            temperature, state, scale, microturbulence(log_g), opacity,
        )  # fmt: skip
        add_paschen_lines(opacity, self.wave, scale, temperature, state)
        _add_molecules(
            self.molecules,
            TEMPERATURES[0],
            TEMPERATURES[1] - TEMPERATURES[0],
            temperature,
            state,
            scale,
            opacity,
        )
        flux = np.empty(len(self.wave))
        _flux(self.wave, temperature, mass_scale, log_column, opacity, *angles, flux)
        return flux, strongest
