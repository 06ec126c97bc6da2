"""Spectrum files in, prediction tables out: the only code that knows file layouts."""

from moefast.spectra.paths import find_files
from moefast.spectra.quality import (
    QUALITY_FEATURES,
    Flag,
    Quality,
    assess,
    good_pixels,
    quality_features,
)
from moefast.spectra.shard import Shard
from moefast.spectra.source import Block, Failure
from moefast.spectra.spectrum_set import SpectrumSet, open_spectra
from moefast.spectra.tables import Column, TableWriter, open_table, read_table
from moefast.spectra.wave import same_wave
from moefast.spectra.writer import SpectrumWriter

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
    "quality_features",
    "read_table",
    "same_wave",
]
