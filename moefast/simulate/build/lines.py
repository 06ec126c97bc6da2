"""Atomic lines: the table ``lines.csv``, vacuum wavelengths, collisional broadening."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from moefast.spectra.units import air_to_vacuum

from .constants import ATOMIC_MASS, BOLTZMANN
from .elements import ATOMIC_NUMBERS, INDEX, IONISATION_EV, MASSES

COLUMNS = ("wave_air", "species", "e_low", "log_gf", "log_vdw", "log_rad", "source")

# log of the full width gamma / N_H at 10 000 K, rad cm3 / s, of lines strong enough for their wings to be seen. Ca II:
# cross-section 291 a_0^2, velocity exponent 0.275 (Barklem & O'Mara 1998, MNRAS 300, 863). The others: interpolated
# in the tables of Anstee & O'Mara (1995, MNRAS 276, 859; s-p) and Barklem & O'Mara (1997, MNRAS 290, 102; p-d), at
# the effective quantum numbers of the levels below the ionisation limit.
MEASURED_VDW = {
    ("Ca II", 8498.02): -7.68,
    ("Ca II", 8542.09): -7.68,
    ("Ca II", 8662.14): -7.68,
    ("Na I", 8183.26): -7.23,
    ("Na I", 8194.82): -7.23,
    ("Mg I", 8806.76): -7.41,
    ("K I", 7664.91): -7.44,
    ("K I", 7698.97): -7.44,
    ("Fe I", 8327.06): -7.67,
    ("Fe I", 8387.77): -7.67,
    ("Fe I", 8468.41): -7.68,
    ("Fe I", 8514.07): -7.68,
    ("Fe I", 8661.90): -7.67,
    ("Fe I", 8688.62): -7.68,
    ("Fe I", 8824.22): -7.68,
}  # air wavelengths
# Radiation damping, log of the full width in rad/s, where it decides: the upper level of the Ca II
# triplet decays through H and K at 1.5e8 /s, which makes the wings of giants (lifetimes: NIST).
RADIATION = {"Ca II": 8.19, "Na I": 8.05, "K I": 7.58}
RADIATION_DEFAULT = 8.0  # typical of the iron-peak lines in the VALD database


@dataclass(frozen=True)
class AtomicLines:
    """Atomic lines as parallel arrays: vacuum wavelength [Å], element index, stage, eV, log gf, log vdW, log rad."""

    wave: np.ndarray
    element: np.ndarray
    stage: np.ndarray
    e_low: np.ndarray
    log_gf: np.ndarray
    log_vdw: np.ndarray
    log_rad: np.ndarray


def vacuum_to_air(wave: float) -> float:
    """Wavelength in air [Å]: the inverse of `air_to_vacuum`, by iteration."""
    air = wave
    for _ in range(4):  # each one gains four digits
        air += wave - float(air_to_vacuum(np.array(air)))
    return air


def unsold_vdw(element: int, stage: int, e_low: float, wave: float) -> float:
    """Log gamma / N_H at 10 000 K from Unsöld's C6, doubled.

    gamma = 17 v^(3/5) C6^(2/5) N, C6 = 0.3e-30 [z^2/(I-E_up)^2 - z^2/(I-E_low)^2] (Unsöld 1955; Gray
    2005). Twice as wide: so doubled, it lies within 0.2 dex of the tables named at `MEASURED_VDW`.
    """
    limit = IONISATION_EV[element] if stage == 0 else 2.2 * IONISATION_EV[element]
    z2 = (stage + 1) ** 2
    upper = max(limit - e_low - 12398.42 / wave, 0.5)
    lower = max(limit - e_low, 0.6)
    c6 = 0.3e-30 * z2 * max(1.0 / upper**2 - 1.0 / lower**2, 1e-3)
    velocity2 = 8.0 * BOLTZMANN * 1e4 / (math.pi * ATOMIC_MASS) * (1.0 / MASSES[element] + 1.0 / 1.008)
    return math.log10(2.0 * 17.0 * velocity2**0.3 * c6**0.4)


def species_name(element: int, stage: int) -> str:
    """'Ca II' for (index of Ca, 1)."""
    return f"{list(INDEX)[element]} {'I' * (stage + 1)}"


def read_lines() -> AtomicLines:
    """The packaged table of lines."""
    with (files("moefast.simulate") / "data" / "lines.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(line for line in stream if not line.startswith("#")))
    names = [row["species"].split() for row in rows]
    return AtomicLines(
        wave=air_to_vacuum(np.array([float(row["wave_air"]) for row in rows])),
        element=np.array([INDEX[name] for name, _ in names]),
        stage=np.array([len(numeral) - 1 for _, numeral in names]),
        e_low=np.array([float(row["e_low"]) for row in rows]),
        log_gf=np.array([float(row["log_gf"]) for row in rows]),
        log_vdw=np.array([float(row["log_vdw"]) for row in rows]),
        log_rad=np.array([float(row["log_rad"]) for row in rows]),
    )


def parse_linemake(text: Iterable[str], low: float = 7070.0, high: float = 8880.0) -> list[list]:
    """Lines of the elements we carry, hyperfine and isotopic components added up.

    Parameters
    ----------
    text : iterable of str
        Rows "air wavelength [Å], species (26.1 = Fe II), E_low [eV], log gf" as linemake writes them
        (Placco et al. 2021, RNAAS 5, 92).

    Returns
    -------
    list of [wave_air, element, stage, e_low, log_gf]
    """
    by_number = {number: INDEX[name] for name, number in ATOMIC_NUMBERS.items() if name != "H"}
    lines: list[list] = []
    open_lines: dict[tuple[int, int, int], int] = {}
    for row in text:
        fields = row.split()
        wave, species, e_low, log_gf = (float(v) for v in fields[:4])
        number, stage = int(species), round(10 * (species - int(species)))
        if number not in by_number or stage > 1 or not low < wave < high:
            continue
        key = (number, stage, round(e_low * 100))
        last = open_lines.get(key)
        if last is not None and wave - lines[last][0] < 0.2:
            a, b = 10 ** lines[last][4], 10**log_gf
            lines[last][0] = (lines[last][0] * a + wave * b) / (a + b)
            lines[last][4] = math.log10(a + b)
            continue
        open_lines[key] = len(lines)
        lines.append([wave, by_number[number], stage, e_low, log_gf])
    return lines
