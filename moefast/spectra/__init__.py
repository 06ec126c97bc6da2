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
)
from moefast.spectra.summary import picture, summarise
from moefast.spectra.tables import Column, TableWriter, open_table, read_table

__all__ = [
    "QUALITY_FEATURES",
    "Block",
    "Column",
    "Failure",
    "Flag",
    "Quality",
    "Shard",
    "SpectrumSet",
    "SpectrumWriter",
    "TableWriter",
    "assess",
    "find_files",
    "good_pixels",
    "open_spectra",
    "open_table",
    "picture",
    "quality_features",
    "read_table",
    "same_wave",
    "summarise",
]
