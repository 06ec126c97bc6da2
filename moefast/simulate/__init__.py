"""Synthetic PFS medium-resolution spectra: labels -> flux -> noise -> file."""

from .emulator import LABELS, Emulator
from .noise import Exposure, Instrument, NoiseModel, Sky
from .observed import Observed
from .rows import Settings, SimulatedBlock, simulate_params, simulate_rows
from .sets import FINGERPRINTS, REFERENCE_SETS, identify, simulate_set
from .source import SimulatedSpectra
from .writing import simulate_file

__all__ = [
    "FINGERPRINTS",
    "LABELS",
    "REFERENCE_SETS",
    "Emulator",
    "Exposure",
    "Instrument",
    "NoiseModel",
    "Observed",
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
