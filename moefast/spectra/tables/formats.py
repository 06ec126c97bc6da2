"""The formats of tables, by the suffixes of files: open one to write, read one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moefast.core.atomic import refuse_taken
from moefast.core.errors import InputError, OutputError
from moefast.core.watched import interrupt_behind
from moefast.spectra.tables.column import Column
from moefast.spectra.tables.fits import FitsTable, fits_layout, read_fits
from moefast.spectra.tables.hdf5 import Hdf5Table, hdf5_layout, read_hdf5
from moefast.spectra.tables.parquet import ParquetTable, parquet_layout, read_parquet
from moefast.spectra.tables.writer import TableWriter

__all__ = ["READERS", "WRITERS", "open_table", "read_layout", "read_table", "refuse_table"]


WRITERS: dict[str, type[TableWriter]] = {
    ".h5": Hdf5Table,
    ".hdf5": Hdf5Table,
    ".parquet": ParquetTable,
    ".fits": FitsTable,
}
_LAYOUTS = {".h5": hdf5_layout, ".hdf5": hdf5_layout, ".parquet": parquet_layout, ".fits": fits_layout}
READERS = {".h5": read_hdf5, ".hdf5": read_hdf5, ".parquet": read_parquet, ".fits": read_fits}


def refuse_table(path: str | Path, *, overwrite: bool) -> None:
    """Refuse a name that no table can be written under: known before the input is read, not after.

    Raises
    ------
    OutputError
        If the suffix is unknown, the file exists and may not be replaced, or its folder does not exist.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in WRITERS:
        raise OutputError(f"{path}: unknown table format {suffix!r}; use {', '.join(WRITERS)}")
    refuse_taken(path, overwrite=overwrite)


def open_table(
    path: str | Path,
    n_rows: int,
    columns: Sequence[Column],
    attrs: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> TableWriter:
    """Start a table whose format follows from its suffix: .h5, .hdf5, .parquet or .fits.

    Parameters
    ----------
    path : str or Path
        Final name; it exists only once the table is complete.
    n_rows : int
        Rows that will be written.
    columns : sequence of Column
        The columns, in order.
    attrs : mapping, optional
        Attributes; more may be set on the result until it is closed.
    overwrite : bool
        Whether an existing file may be replaced.

    Raises
    ------
    OutputError
        If the suffix is unknown, the file exists, or its folder does not.
    """
    refuse_table(path, overwrite=overwrite)
    return WRITERS[Path(path).suffix.lower()](path, n_rows, columns, attrs, overwrite=overwrite)


def read_layout(path: str | Path) -> tuple[tuple[Column, ...], dict[str, Any], int]:
    """Columns, attributes and number of rows of a table that `open_table` wrote, without reading its rows.

    Types that a format has not come back as the wider ones that it keeps.

    Raises
    ------
    InputError
        If the file is missing, damaged, or not such a table.
    """
    columns, attributes, n_rows = _read(path, _LAYOUTS)
    return tuple(columns), attributes, n_rows


def read_table(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Columns, each an array of shape (n_rows,), and attributes of a table that `open_table` wrote.

    Raises
    ------
    InputError
        If the file is missing, damaged, or not such a table.
    """
    return _read(path, READERS)


def _read(path: str | Path, readers: Mapping[str, Callable[[Path], Any]]) -> Any:
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise InputError(f"{path}: unknown table format {suffix!r}; expected {', '.join(readers)}")
    try:
        return readers[suffix](path)
    except InputError:
        raise
    except Exception as error:
        if (interrupt := interrupt_behind(error)) is not None:
            raise interrupt from None
        # Damaged headers make the libraries raise nearly anything.
        raise InputError(f"{path}: cannot be read as a table: {error}") from error
