"""Rows of a run on their way into its table, in memory or in a file; rows that could not be read among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import MoefastError
from moefast.predicting.identifiers import as_identifiers
from moefast.predicting.source import Source
from moefast.predicting.velocities import velocity_columns
from moefast.spectra.opening import Origins
from moefast.spectra.quality import Flag
from moefast.spectra.tables import Column, open_table

__all__ = ["LOST", "Sink", "fill_gap", "lead_columns"]

LOST = (Flag.NO_DATA, Flag.FEW_GOOD_PIXELS)


class Sink:
    """A table file, or columns in memory when no file is wanted."""

    def __init__(
        self,
        path: str | Path | None,
        n_rows: int,
        layout: list[Column],
        attrs: dict[str, Any],
        overwrite: bool,
    ) -> None:
        self.layout, self.columns, self._done = layout, {}, 0
        self._table = None
        if path is None:
            self.attrs = dict(attrs)
            self.columns = {c.name: np.empty(n_rows, c.dtype) for c in layout}
        else:
            self._table = open_table(path, n_rows, layout, attrs, overwrite=overwrite)
            self.attrs = self._table.attrs

    def __enter__(self) -> Sink:
        if self._table is not None:
            self._table.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._table is not None:
            self._table.__exit__(*exception)

    def write(self, columns: dict[str, NDArray]) -> None:
        """Append rows."""
        n = len(columns["row"])
        if self._table is not None:
            self._table.write(self._done, columns)
        else:
            for name, values in columns.items():
                self.columns[name][self._done : self._done + n] = values
        self._done += n


def lead_columns(
    origins: Origins, shard: int, rows: tuple[int, int], wanted: NDArray[np.bool_], several: bool
) -> dict[str, NDArray]:
    """Columns that say where wanted rows came from: the row and, with several files, the file."""
    file, row = origins.of(shard, *rows)
    lead: dict[str, NDArray] = {"row": row[wanted]}
    if several:
        lead["file"] = file[wanted]
    return lead


def fill_gap(sink: Sink, source: Source, first: int, stop: int) -> None:
    """Write rows that could not be read: NaN and NO_DATA, so that no row is lost."""
    first_rows = source.spectra.first_rows.tolist()
    for index, base in enumerate(first_rows[:-1]):
        low, high = max(first, base), min(stop, first_rows[index + 1])
        if low >= high:
            continue
        wanted = source.wanted[low:high]
        n = int(wanted.sum())
        row: dict[str, NDArray] = {}
        for column in sink.layout:
            kind = column.dtype.kind
            row[column.name] = np.full(n, np.nan, column.dtype) if kind == "f" else np.zeros(n, column.dtype)
        row |= lead_columns(source.origins, index, (low - base, high - base), wanted, "file" in row)
        row |= velocity_columns(source.velocity, low, wanted)
        row["expert"][:] = -1
        row["flag"][:] = np.uint32(sum(LOST))
        for name, dtype in source.identifiers.items():
            try:
                values = source.spectra.shards[index].params([name], low - base, high - base)[name][wanted]
                row[name] = as_identifiers(values, dtype)
            except MoefastError:
                continue
        sink.write(row)
