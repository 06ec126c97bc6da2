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
from moefast.spectra.quality import (
    QUALITY_FEATURES,
    Flag,
    Quality,
    assess,
    good_pixels,
    quality_features,
    repair,
)

__all__ = [
    "QUALITY_FEATURES",
    "Block",
    "Failure",
    "Flag",
    "Quality",
    "Shard",
    "SpectrumSet",
    "SpectrumWriter",
    "assess",
    "find_files",
    "good_pixels",
    "open_spectra",
    "quality_features",
    "repair",
    "same_wave",
]
