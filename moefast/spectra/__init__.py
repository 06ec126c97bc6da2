"""Spectrum files in, prediction tables out: the only code that knows file layouts."""

from moefast.spectra.files import (
    Block,
    Failure,
    Shard,
    SpectrumSet,
    SpectrumWriter,
    find_files,
    open_spectra,
    same_wave,
)

__all__ = [
    "Block",
    "Failure",
    "Shard",
    "SpectrumSet",
    "SpectrumWriter",
    "find_files",
    "open_spectra",
    "same_wave",
]
