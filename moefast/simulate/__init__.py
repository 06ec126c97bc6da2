"""Synthetic PFS medium-resolution spectra: labels -> flux -> noise -> file."""

from .emulator import LABELS, Emulator
from .noise import Exposure, Instrument, NoiseModel, Sky
from .rows import Settings, SimulatedBlock, simulate_file, simulate_params, simulate_rows

__all__ = [
    "LABELS",
    "Emulator",
    "Exposure",
    "Instrument",
    "NoiseModel",
    "Settings",
    "SimulatedBlock",
    "Sky",
    "simulate_file",
    "simulate_params",
    "simulate_rows",
]
