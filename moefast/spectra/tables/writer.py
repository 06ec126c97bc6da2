"""Prediction tables: one row per input row, in HDF5, Parquet or FITS.

Design: one writer per format, chosen by the suffix; all share the checks, the order of rows and the way a file
comes to its final name (see `moefast.core.atomic`). Rows are appended block by block, so memory does not
grow with the table. Attributes may change until the table is closed, because throughput and R² are known only
then; FITS keeps room for them at the head of the file.

Numbers and text are attributes as they are; lists, mappings and None are stored as JSON text and come back as
what they were. FITS knows no lower case: there the names of attributes come back in lower case.

Every byte that matters is covered by a checksum, and checked when a table is read. Where the format has its own, other
readers check it, too: Fletcher's for the values in HDF5 and for all of its structure since version 1.10, one for each
page in Parquet, DATASUM and CHECKSUM in FITS. Attributes, and names, types and units of columns have none in HDF5 and
Parquet: for those there is the attribute `attributes_sha256`. A table without any, from elsewhere, is read as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from moefast.core.atomic import partial_path, publish, remove_quietly
from moefast.core.errors import OutputError
from moefast.core.text import counted
from moefast.spectra.tables.column import Column

__all__ = ["TableWriter"]


class TableWriter:
    """A table being written; use it as a context manager, see `open_table`.

    Attributes
    ----------
    path : Path
        Final name.
    n_rows : int
        Rows that the table will have.
    columns : tuple of Column
        Its columns.
    attrs : dict
        Attributes; may be changed until the table is closed.
    """

    def __init__(
        self,
        path: str | Path,
        n_rows: int,
        columns: Sequence[Column],
        attrs: Mapping[str, Any] | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        names = [column.name for column in columns]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"columns need names that differ, found {names}")
        if n_rows < 0:
            raise ValueError(f"n_rows must not be negative, found {n_rows}")
        self.path = Path(path)
        self.n_rows, self.columns, self.attrs = int(n_rows), tuple(columns), dict(attrs or {})
        self._done, self._overwrite = 0, overwrite
        self._partial = partial_path(self.path, overwrite=overwrite)
        try:
            self._begin()
        except OSError as error:
            self._give_up()
            raise OutputError(f"{self.path}: cannot be written: {error}") from error
        except BaseException:
            self._give_up()
            raise

    def write(self, first_row: int, columns: Mapping[str, Any]) -> None:
        """Append rows.

        Parameters
        ----------
        first_row : int
            Row of the first of them: the number of rows written so far.
        columns : mapping of str to array of shape (n,)
            Every column.

        Raises
        ------
        OutputError
            If the rows cannot be written, or text does not fit its column.
        """
        if first_row != self._done:
            raise ValueError(f"rows come in order: row {self._done} expected next, found {first_row}")
        if set(columns) != {column.name for column in self.columns}:
            names = [column.name for column in self.columns]
            missing, extra = sorted(set(names) - set(columns)), sorted(set(columns) - set(names))
            raise ValueError(f"columns of the table expected; missing {missing}, unknown {extra}")
        rows: dict[str, np.ndarray] = {}
        n = len(next(iter(columns.values())))
        if first_row + n > self.n_rows:
            raise ValueError(f"rows {first_row} to {first_row + n} do not fit a table of {self.n_rows}")
        for column in self.columns:
            values = np.asarray(columns[column.name])
            if values.shape != (n,):
                raise ValueError(f"column {column.name!r}: shape ({n},) expected, found {values.shape}")
            rows[column.name] = self._text(column, values) if column.text_bytes else _cast(column, values)
        try:
            self._append(first_row, rows)
        except OSError as error:
            raise OutputError(f"{self.path}: rows {first_row} to {first_row + n - 1}: {error}") from error
        self._done += n

    def _text(self, column: Column, values: np.ndarray) -> np.ndarray:
        if values.dtype.kind != "S":
            values = np.char.encode(values.astype(str), "utf-8")
        if values.dtype.itemsize > column.text_bytes:
            longest = int(np.char.str_len(values).max(initial=0))
            if longest > column.text_bytes:
                raise OutputError(
                    f"{self.path}: column {column.name!r} keeps {column.text_bytes} bytes of text, found {longest}"
                )
        return values.astype(f"S{column.text_bytes}")

    def close(self) -> None:
        """Complete the table and give it its final name.

        Raises
        ------
        OutputError
            If rows are missing or the disk refuses; nothing is left then.
        """
        try:
            if self._done != self.n_rows:
                raise OutputError(f"{self.path}: {self._done} of {counted(self.n_rows, 'row')} written")
            try:
                self._end()
            except OSError as error:
                raise OutputError(f"{self.path}: could not be completed: {error}") from error
            publish(self._partial, self.path, overwrite=self._overwrite)
        except BaseException:
            self._give_up()
            raise

    def _give_up(self) -> None:
        with contextlib.suppress(Exception):
            self._abort()
        remove_quietly(self._partial)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._give_up()

    def _begin(self) -> None:
        """Create the partial file."""
        raise NotImplementedError

    def _append(self, first_row: int, rows: dict[str, np.ndarray]) -> None:
        """Write checked rows; text comes as UTF-8 bytes."""
        raise NotImplementedError

    def _end(self) -> None:
        """Write the attributes and close the partial file."""
        raise NotImplementedError

    def _abort(self) -> None:
        """Close the partial file, whatever its state."""
        raise NotImplementedError


def _cast(column: Column, values: np.ndarray) -> np.ndarray:
    if values.dtype == column.dtype:
        return values
    try:
        return values.astype(column.dtype, casting="same_kind")
    except TypeError as error:
        raise ValueError(f"column {column.name!r} is {column.dtype}, found {values.dtype}") from error
