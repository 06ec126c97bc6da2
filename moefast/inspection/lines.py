"""Lines of cool stars that are worth a name in a picture of a red-arm spectrum.

Wavelengths stand in air, as lines are named by them, and are converted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moefast.spectra.units import air_to_vacuum

__all__ = ["CALCIUM", "LINES", "lines_within"]

LINES: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("Ca II", (8498.0, 8542.1, 8662.1)),
    ("Na I", (8183.3, 8194.8)),
    ("Mg I", (7657.6, 8806.8)),
    ("K I", (7699.0,)),
    ("Fe I", (7445.7, 7495.1, 7511.0, 8387.8, 8468.4, 8514.1, 8688.6)),
    ("Pa 17", (8467.3,)),
    ("Pa 16", (8502.5,)),
    ("Pa 15", (8545.4,)),
    ("Pa 14", (8598.4,)),
    ("Pa 13", (8665.0,)),
    ("Pa 12", (8750.5,)),
)
"""Name, and wavelengths in air [Å], of lines that change with log g, temperature or metallicity; Pa are
those of the Paschen series of hydrogen, by the upper level."""

CALCIUM = (8440.0, 8740.0)
"""Å, vacuum: around the Ca II triplet, where most of what a red spectrum says of log g stands."""


def lines_within(first: float, last: float) -> list[tuple[str, NDArray[np.float64]]]:
    """Names and vacuum wavelengths [Å] of the lines from `first` to `last`; names without a line there are left out."""
    found = []
    for name, air in LINES:
        wave = air_to_vacuum(np.array(air))
        wave = wave[(wave >= first) & (wave <= last)]
        if wave.size:
            found.append((name, wave))
    return found
