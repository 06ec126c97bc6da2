"""Prediction tables: one row per input row, in HDF5, Parquet or FITS."""

from moefast.spectra.tables.column import GROUP, Column
from moefast.spectra.tables.formats import (
    READERS,
    WRITERS,
    open_table,
    read_layout,
    read_table,
    refuse_table,
)
from moefast.spectra.tables.writer import TableWriter

__all__ = [
    "GROUP",
    "READERS",
    "WRITERS",
    "Column",
    "TableWriter",
    "open_table",
    "read_layout",
    "read_table",
    "refuse_table",
]
