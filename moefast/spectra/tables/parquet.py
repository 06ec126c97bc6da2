"""Tables in Parquet, in groups of rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moefast.core.watched import WatchedFile
from moefast.spectra.tables.attributes import CHECKSUM, compare_digest, digest_of, to_json
from moefast.spectra.tables.column import Column, decode
from moefast.spectra.tables.writer import TableWriter

__all__ = ["ParquetTable", "parquet_layout", "read_parquet"]

_FIELD_METADATA = ("unit", "description", "bytes")
_ROW_GROUP = 1 << 16
_TEXT_BYTES = 1024
"""Bytes of text in a Parquet column that does not say how many it keeps."""


class ParquetTable(TableWriter):
    """Row groups of at least 65536 rows but for the last; units in the fields' metadata, attributes in the file's."""

    def _begin(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._schema = pa.schema(
            [
                pa.field(
                    column.name,
                    pa.string() if column.text_bytes else pa.from_numpy_dtype(column.dtype),
                    nullable=False,
                    metadata={
                        "unit": column.unit,
                        "description": column.description,
                        **({"bytes": str(column.text_bytes)} if column.text_bytes else {}),
                    },
                )
                for column in self.columns
            ]
        )
        # Arrow takes a name for a URI, which not every name of a file is: so it gets an open file.
        self._watched = WatchedFile(self._partial)
        self._writer = pq.ParquetWriter(self._watched, self._schema, write_page_checksum=True)
        self._watched.check()
        self._waiting: list[dict[str, np.ndarray]] = []
        self._n_waiting = 0

    def _append(self, first_row: int, rows: dict[str, np.ndarray]) -> None:
        # Row groups are written later: the caller may use the memory of its arrays again.
        self._waiting.append({name: np.array(values) for name, values in rows.items()})
        self._n_waiting += len(next(iter(rows.values())))
        if self._n_waiting >= _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._n_waiting:
            return
        arrays = []
        for column, schema_field in zip(self.columns, self._schema, strict=True):
            values = np.concatenate([rows[column.name] for rows in self._waiting])
            arrays.append(pa.array(decode(values) if column.text_bytes else values, type=schema_field.type))
        self._writer.write_table(
            pa.Table.from_arrays(arrays, schema=self._schema), row_group_size=2 * _ROW_GROUP
        )
        self._watched.check()
        self._waiting, self._n_waiting = [], 0

    def _end(self) -> None:
        self._flush()
        stored = {name: to_json(value) for name, value in self.attrs.items()}
        stored[CHECKSUM] = _parquet_digest(self.n_rows, self._schema, stored)
        self._writer.add_key_value_metadata(stored)
        self._writer.close()
        self._watched.complete()

    def _abort(self) -> None:
        with self._watched.given_up():
            self._writer.close()


def read_parquet(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Columns and attributes of a table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open(path, "rb") as opened, pq.ParquetFile(opened, page_checksum_verification=True) as file:
        attrs = _parquet_attributes(path, file)
        table = file.read()
    columns = {}
    for name in table.column_names:
        column = table.column(name)
        values = column.to_numpy()
        columns[name] = values.astype(str) if pa.types.is_string(column.type) else values
    return columns, attrs


def _parquet_digest(n_rows: int, schema: Any, stored: Mapping[str, str]) -> str:
    columns = []
    for field in schema:
        said = {key.decode(): value.decode() for key, value in (field.metadata or {}).items()}
        columns.append((field.name, str(field.type), *(said.get(key, "") for key in _FIELD_METADATA)))
    return digest_of(n_rows, columns, stored)


def _parquet_attributes(path: Path, file: Any) -> dict[str, Any]:
    """Attributes of a table, compared with their checksum; whatever else Arrow or pandas keep there is left out."""
    stored = {
        key.decode(): value.decode()
        for key, value in (file.metadata.metadata or {}).items()
        if key not in {b"ARROW:schema", b"pandas"}
    }
    kept = stored.pop(CHECKSUM, None)
    schema = file.schema_arrow
    mine = len(schema) > 0 and all(b"description" in (field.metadata or {}) for field in schema)
    if kept is not None or mine:
        compare_digest(path, kept, _parquet_digest(file.metadata.num_rows, schema, stored))
    attrs = {}
    for name, text in stored.items():
        try:
            attrs[name] = json.loads(text)
        except ValueError:
            attrs[name] = text
    return attrs


def parquet_layout(path: Path) -> tuple[list[Column], dict[str, Any], int]:
    """Columns, attributes and number of rows of a table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open(path, "rb") as opened, pq.ParquetFile(opened) as file:
        columns = []
        for field in file.schema_arrow:
            said = {key.decode(): value.decode() for key, value in (field.metadata or {}).items()}
            text = pa.types.is_string(field.type)
            dtype = np.dtype(f"S{said.get('bytes', _TEXT_BYTES)}" if text else field.type.to_pandas_dtype())
            columns.append(Column(field.name, dtype, said.get("unit", ""), said.get("description", "")))
        return columns, _parquet_attributes(path, file), file.metadata.num_rows
