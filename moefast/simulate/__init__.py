"""Synthetic PFS medium-resolution spectra: labels -> flux -> noise -> file."""

from .emulator import LABELS, Emulator
from .noise import Exposure, Instrument, NoiseModel, Sky
from .rows import Settings, SimulatedBlock, simulate_file, simulate_params, simulate_rows
from .sets import FINGERPRINTS, REFERENCE_SETS, identify, simulate_set
from .source import SimulatedSpectra

__all__ = [
    "FINGERPRINTS",
    "LABELS",
    "REFERENCE_SETS",
    "Emulator",
    "Exposure",
    "Instrument",
    "NoiseModel",
    "Settings",
    "SimulatedBlock",
    "SimulatedSpectra",
    "Sky",
    "identify",
    "simulate_file",
    "simulate_params",
    "simulate_rows",
    "simulate_set",
]
