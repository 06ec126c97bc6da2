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
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np

from moefast.core.atomic import partial_path, publish, remove_quietly
from moefast.core.errors import InputError, OutputError
from moefast.core.outputs import Output
from moefast.core.watched import WatchedFile
from moefast.spectra.fits_checksums import add_words, encode_checksum, refuse_wrong_checksums
from moefast.spectra.stored import refuse_endless_heaps

__all__ = [
    "GROUP",
    "READERS",
    "WRITERS",
    "Column",
    "TableWriter",
    "open_table",
    "read_attributes",
    "read_layout",
    "read_table",
]

GROUP = "predictions"
"""HDF5 group, and FITS extension, that holds the columns."""

_CHECKSUM = "attributes_sha256"
_ROW_GROUP = 1 << 16
_CHUNK_BYTES = 1 << 19
"""Bytes of values in HDF5 that have one checksum; the library keeps one such chunk of each column in memory."""
_FIELD_METADATA = ("unit", "description", "bytes")
_TEXT_BYTES = 1024
"""Bytes of text in a Parquet column that does not say how many it keeps."""
_HEADER_UNIT = 2880
_HEADER_ROOM = 5 * _HEADER_UNIT


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes
    ----------
    name : str
        Its name.
    dtype : dtype
        Numbers, bool, or text of a fixed length ("U8", "S8").
    unit : str
        Unit in FITS notation, "" if there is none.
    description : str
        What it is, in one line.
    """

    name: str
    dtype: np.dtype
    unit: str = ""
    description: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", np.dtype(self.dtype))
        if self.dtype.kind not in "biufSU" or not self.dtype.itemsize:
            raise ValueError(f"column {self.name!r}: no table holds type {self.dtype}")
        if not self.name:
            raise ValueError("a column needs a name")

    @classmethod
    def of(cls, output: Output, name: str = "", description: str = "") -> Self:
        """The column of an output, under its own name and with its own meaning unless others are given."""
        return cls(name or output.name, np.dtype(output.dtype), output.unit, description or output.meaning)

    @property
    def text_bytes(self) -> int:
        """Bytes kept for text; 0 for numbers."""
        return self.dtype.itemsize if self.dtype.kind in "SU" else 0


def _plain(value: Any) -> str | bool | int | float | None:
    """The value, if it is a number or text; None if it must become JSON."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return value if isinstance(value, str | bool | int | float) else None


def _to_json(value: Any) -> str:
    def other(item: Any) -> Any:
        if isinstance(item, np.generic):
            return item.item()
        return item.tolist() if isinstance(item, np.ndarray) else str(item)

    return json.dumps(value, default=other)


def _from_text(text: str) -> Any:
    if text[:1] in {"[", "{"} or text == "null":
        with contextlib.suppress(ValueError):
            return json.loads(text)
    return text


def _digest(n_rows: int, columns: Sequence[Sequence[str]], attributes: Mapping[str, Any]) -> str:
    """SHA-256 of what a table says of itself: rows, columns with types, units and meanings, attributes as stored."""
    said = json.dumps([n_rows, [list(column) for column in columns], sorted(attributes.items())])
    return hashlib.sha256(said.encode()).hexdigest()


def _compare_digest(path: Path, kept: Any, found: str) -> None:
    if kept != found:
        raise InputError(
            f"{path}: attributes or columns are not those that were written ({_CHECKSUM} is {kept}, expected {found} by "
            "what the file says): damaged, or changed by another program; copy or produce it again"
        )


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
                raise OutputError(f"{self.path}: {self._done} of {self.n_rows} rows were written")
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


class _Hdf5Table(TableWriter):
    """One dataset per column in the group `predictions`; attributes on the root."""

    def _begin(self) -> None:
        # HDF5 loses errors of what it writes late; this file remembers them.
        self._watched = WatchedFile(self._partial)
        # Since 1.10 all structure has checksums; attributes of more than 64 kB need the storage of HDF5 1.8.
        self._file = h5py.File(self._watched, "w", libver=("v110", "latest"))
        group = self._file.create_group(GROUP)
        # Open until the end: closing a dataset writes its last chunk, which more rows may fill.
        self._datasets = {}
        for column in self.columns:
            dtype = h5py.string_dtype("utf-8", column.text_bytes) if column.text_bytes else column.dtype
            n_chunks = -(-self.n_rows * column.dtype.itemsize // _CHUNK_BYTES)
            chunks = (-(-self.n_rows // n_chunks),) if n_chunks else None
            dataset = group.create_dataset(
                column.name, (self.n_rows,), dtype, chunks=chunks, fletcher32=bool(chunks)
            )
            dataset.attrs["unit"] = column.unit
            dataset.attrs["description"] = column.description
            self._datasets[column.name] = dataset
        group.attrs["columns"] = json.dumps([column.name for column in self.columns])
        self._watched.check()

    def _append(self, first_row: int, rows: dict[str, np.ndarray]) -> None:
        for name, values in rows.items():
            if len(values):
                dataset = self._datasets[name]
                # HDF5 does not convert text between character sets; the view carries the dataset's own.
                dataset[first_row : first_row + len(values)] = values.view(dataset.dtype)
        self._watched.check()

    def _end(self) -> None:
        stored = {}
        for name, value in self.attrs.items():
            plain = _plain(value)
            stored[name] = _to_json(value) if plain is None else plain
            self._file.attrs[name] = stored[name]
        self._file.attrs[_CHECKSUM] = _hdf5_digest(list(self._datasets.values()), stored)
        self._file.close()
        self._watched.synchronise()
        self._watched.close()
        self._watched.check()

    def _abort(self) -> None:
        # What is still to be written has nowhere to go: closing must not fail.
        self._watched.problem = self._watched.problem or OutputError(f"{self.path}: given up")
        try:
            self._file.close()
        finally:
            self._watched.close()


def read_attributes(path: str | Path) -> dict[str, Any]:
    """Attributes of a table in HDF5; empty for any other file."""
    try:
        return _hdf5_layout(Path(path))[1]
    except (InputError, OSError, RuntimeError, ValueError, KeyError):
        return {}


def _hdf5_digest(datasets: Sequence[h5py.Dataset], stored: Mapping[str, Any]) -> str:
    columns = [
        (dataset.name, dataset.dtype.str, str(dataset.attrs["unit"]), str(dataset.attrs["description"]))
        for dataset in datasets
    ]
    return _digest(len(datasets[0]), columns, stored)


@contextlib.contextmanager
def _open_hdf5(path: Path) -> Iterator[tuple[list[h5py.Dataset], dict[str, Any]]]:
    """Columns, in order, and attributes of a table whose checksum of both has been compared."""
    with h5py.File(path, "r") as file:
        if GROUP not in file:
            raise InputError(f"{path}: no group {GROUP!r}: not a prediction table")
        group = file[GROUP]
        refuse_endless_heaps(file, [item for item in group.values() if isinstance(item, h5py.Dataset)])
        datasets = [group[name] for name in json.loads(group.attrs["columns"])]
        stored = {name: _plain(value) for name, value in file.attrs.items()}
        if (kept := stored.pop(_CHECKSUM, None)) is not None:
            _compare_digest(path, kept, _hdf5_digest(datasets, stored))
        attributes = {
            name: _from_text(value) if isinstance(value, str) else value for name, value in stored.items()
        }
        yield datasets, attributes


def _read_hdf5(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with _open_hdf5(path) as (datasets, attributes):
        return {
            _name_of(dataset): dataset[()] if dataset.dtype.kind != "S" else _decode(dataset[()])
            for dataset in datasets
        }, attributes


def _name_of(dataset: h5py.Dataset) -> str:
    return str(dataset.name).rpartition("/")[2]


def _hdf5_layout(path: Path) -> tuple[list[Column], dict[str, Any], int]:
    with _open_hdf5(path) as (datasets, attributes):
        columns = [
            Column(
                _name_of(dataset),
                np.dtype(f"S{dataset.dtype.itemsize}") if dataset.dtype.kind == "S" else dataset.dtype,
                str(dataset.attrs["unit"]),
                str(dataset.attrs["description"]),
            )
            for dataset in datasets
        ]
        return columns, attributes, len(datasets[0])


def _decode(values: np.ndarray) -> np.ndarray:
    return np.char.decode(values.astype("S"), "utf-8") if values.size else values.astype("U1")


class _ParquetTable(TableWriter):
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
            arrays.append(pa.array(_decode(values) if column.text_bytes else values, type=schema_field.type))
        self._writer.write_table(
            pa.Table.from_arrays(arrays, schema=self._schema), row_group_size=2 * _ROW_GROUP
        )
        self._watched.check()
        self._waiting, self._n_waiting = [], 0

    def _end(self) -> None:
        self._flush()
        stored = {name: _to_json(value) for name, value in self.attrs.items()}
        stored[_CHECKSUM] = _parquet_digest(self.n_rows, self._schema, stored)
        self._writer.add_key_value_metadata(stored)
        self._writer.close()
        self._watched.synchronise()
        self._watched.close()
        self._watched.check()

    def _abort(self) -> None:
        # What is still to be written has nowhere to go: closing must not fail.
        self._watched.problem = self._watched.problem or OutputError(f"{self.path}: given up")
        try:
            self._writer.close()
        finally:
            self._watched.close()


def _read_parquet(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
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
    return _digest(n_rows, columns, stored)


def _parquet_attributes(path: Path, file: Any) -> dict[str, Any]:
    """Attributes of a table, compared with their checksum; whatever else Arrow or pandas keep there is left out."""
    stored = {
        key.decode(): value.decode()
        for key, value in (file.metadata.metadata or {}).items()
        if key not in {b"ARROW:schema", b"pandas"}
    }
    kept = stored.pop(_CHECKSUM, None)
    schema = file.schema_arrow
    mine = len(schema) > 0 and all(b"description" in (field.metadata or {}) for field in schema)
    if kept is not None or mine:
        _compare_digest(path, kept, _parquet_digest(file.metadata.num_rows, schema, stored))
    attrs = {}
    for name, text in stored.items():
        try:
            attrs[name] = json.loads(text)
        except ValueError:
            attrs[name] = text
    return attrs


def _parquet_layout(path: Path) -> tuple[list[Column], dict[str, Any], int]:
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


_FITS_FORMATS: dict[str, tuple[str, str, int]] = {
    # kind and size: code, stored type, offset that FITS adds for types it has not
    "b1": ("L", "S1", 0),
    "i1": ("I", ">i2", 0),
    "u1": ("B", ">u1", 0),
    "i2": ("I", ">i2", 0),
    "u2": ("I", ">i2", 1 << 15),
    "i4": ("J", ">i4", 0),
    "u4": ("J", ">i4", 1 << 31),
    "i8": ("K", ">i8", 0),
    "u8": ("K", ">i8", 1 << 63),
    "f2": ("E", ">f4", 0),
    "f4": ("E", ">f4", 0),
    "f8": ("D", ">f8", 0),
}


_NO_FITS_UNITS = {"dex"}
"""Units that the FITS standard does not have: said in the column's description, where no reader stumbles over them."""


class _FitsTable(TableWriter):
    """A binary table extension; attributes in the primary header, which has room kept for them."""

    def _begin(self) -> None:
        from astropy.io import fits

        self._file: Any = None
        row = []
        header = fits.Header()
        header["XTENSION"] = ("BINTABLE", "binary table extension")
        header["BITPIX"] = 8
        header["NAXIS"] = 2
        header["NAXIS1"] = (0, "bytes per row")
        header["NAXIS2"] = (self.n_rows, "rows")
        header["PCOUNT"] = 0
        header["GCOUNT"] = 1
        header["TFIELDS"] = len(self.columns)
        header["EXTNAME"] = GROUP.upper()
        for number, column in enumerate(self.columns, 1):
            if not (column.name.isascii() and column.name.isprintable()):
                raise OutputError(
                    f"{self.path}: column {column.name!r} has a name beyond ASCII, which FITS cannot keep; write .h5 "
                    "or .parquet"
                )
            if column.text_bytes:
                code, stored, offset = f"{column.text_bytes}A", f"S{column.text_bytes}", 0
            else:
                key = f"{column.dtype.kind}{column.dtype.itemsize}"
                if key not in _FITS_FORMATS:
                    raise ValueError(f"column {column.name!r}: FITS has no type for {column.dtype}")
                code, stored, offset = _FITS_FORMATS[key]
            row.append((f"c{number}", stored))
            header[f"TTYPE{number}"] = column.name
            header[f"TFORM{number}"] = code
            if column.unit and column.unit not in _NO_FITS_UNITS:
                header[f"TUNIT{number}"] = column.unit
            if offset:
                header[f"TSCAL{number}"] = 1
                header[f"TZERO{number}"] = offset
            text = (
                f"[{column.unit}] {column.description}"
                if column.unit in _NO_FITS_UNITS
                else column.description
            )
            if text:
                header[f"TCOMM{number}"] = _fits_text(text)
        self._row = np.dtype(row)
        header["NAXIS1"] = self._row.itemsize
        self._sum = 0
        self._header = header
        self._room = _padded(len(self._primary().tostring(padding=False)) + _HEADER_ROOM)
        self._file = open(self._partial, "wb+")  # noqa: SIM115
        self._file.write(b" " * self._room + _with_checksums(header, 0))

    def _append(self, first_row: int, rows: dict[str, np.ndarray]) -> None:
        out = np.zeros(len(next(iter(rows.values()))), self._row)
        for number, column in enumerate(self.columns, 1):
            values, target = rows[column.name], out[f"c{number}"]
            if column.text_bytes:
                if any(max(text, default=0) > 126 for text in values.tolist()):
                    raise OutputError(
                        f"{self.path}: column {column.name!r} holds text beyond ASCII, which FITS cannot keep; "
                        "write .h5 or .parquet"
                    )
                target[...] = values
            elif column.dtype.kind == "b":
                target[...] = np.where(values, b"T", b"F")
            elif column.dtype.kind == "u" and column.dtype.itemsize > 1:
                # Flipping the highest bit is the subtraction of TZERO.
                top = column.dtype.type(1 << (8 * column.dtype.itemsize - 1))
                target[...] = (values ^ top).view(f"i{column.dtype.itemsize}")
            else:
                target[...] = values
        data = out.tobytes()
        self._sum = add_words(self._sum, data, first_row * self._row.itemsize)
        self._file.write(data)

    def _primary(self) -> Any:
        from astropy.io import fits

        header = fits.Header()
        header["SIMPLE"] = True
        header["BITPIX"] = 8
        header["NAXIS"] = 0
        header["EXTEND"] = True
        for name, value in self.attrs.items():
            plain = _plain(value)
            if isinstance(plain, float) and not math.isfinite(plain):
                plain = json.dumps(plain)
            text = plain if plain is not None else _to_json(value)
            _set_card(header, name, _fits_text(text) if isinstance(text, str) else text)
        return header

    def _end(self) -> None:
        size = self.n_rows * self._row.itemsize
        self._file.write(bytes(_padded(size) - size))
        primary = self._primary()
        needed = len(_with_checksums(primary, 0))
        if needed > self._room:
            self._make_room(needed)
        self._file.seek(0)
        self._file.write(_with_checksums(primary, 0, self._room))
        self._file.write(_with_checksums(self._header, self._sum))
        self._file.close()

    def _make_room(self, room: int) -> None:
        wider = self._partial.with_name(self._partial.name + ".wide")
        try:
            with open(wider, "wb") as out:
                out.write(b" " * room)
                self._file.seek(self._room)
                shutil.copyfileobj(self._file, out, 1 << 22)
            self._file.close()
            os.replace(wider, self._partial)
        finally:
            wider.unlink(missing_ok=True)
        self._file = open(self._partial, "rb+")  # noqa: SIM115
        self._room = room

    def _abort(self) -> None:
        if self._file is not None:
            self._file.close()


_SUMS = ("CHECKSUM", "DATASUM")
_RESERVED = {
    "SIMPLE", "BITPIX", "NAXIS", "EXTEND", "END", "COMMENT", "HISTORY", "CONTINUE", "HIERARCH", *_SUMS,
}  # fmt: skip


def _padded(size: int) -> int:
    return -(-size // _HEADER_UNIT) * _HEADER_UNIT


def _with_checksums(header: Any, data_sum: int, size: int = 0) -> bytes:
    """A header of at least so many bytes, its END at the end, with the checksums of itself and its data.

    Source: FITS standard 4.0, section 4.4.2.7 and appendix J: all words of an HDU add up to -0.
    """
    cards = header.tostring(endcard=False, padding=False).encode("ascii")
    sums = f"CHECKSUM= '{'0' * 16}'".ljust(80) + f"DATASUM = '{data_sum}'".ljust(80)
    size = max(size, _padded(len(cards) + len(sums) + 80))
    blank = (cards + sums.encode()).ljust(size - 80) + b"END".ljust(80)
    total = add_words(add_words(0, blank), data_sum.to_bytes(4, "big"))
    at = len(cards) + 11
    return blank[:at] + encode_checksum(total ^ 0xFFFFFFFF) + blank[at + 16 :]


def _fits_text(text: str) -> str:
    """Text as FITS headers may hold it, as JSON where plain text would come back changed.

    They hold printable ASCII, lose blanks at the end and take an ampersand there for a continuation.
    """
    plain = text.isascii() and text.isprintable() and not text.endswith((" ", "&")) and text[:1] != '"'
    return text if plain else json.dumps(text)


def _set_card(header: Any, name: str, value: Any) -> None:
    reserved = name.upper() in _RESERVED
    if (
        not reserved
        and len(name) <= 8
        and name.isascii()
        and name.replace("_", "").replace("-", "").isalnum()
    ):
        header[name.upper()] = value
        return
    text_room = 80 - len(f"HIERARCH {name} = ''")
    if not reserved and (not isinstance(value, str) or len(value.replace("'", "''")) <= text_room):
        header[f"HIERARCH {name.upper()}"] = value
        return
    # Long text continues over several cards under a standard keyword only.
    number = 1 + sum(1 for keyword in header if keyword.startswith("LONG"))
    header[f"LONG{number}"] = f"{name}={value}"


def _read_fits(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    from astropy.io import fits

    with fits.open(path, memmap=False) as file:
        refuse_wrong_checksums(path, file)
        table = file[GROUP.upper()]
        columns = {}
        for name in table.columns.names:
            values = np.asarray(table.data[name])
            if values.dtype.kind in "SU":
                columns[name] = values.astype(str)
            else:
                columns[name] = values.astype(values.dtype.newbyteorder("="))
        return columns, _fits_attributes(file[0].header)


def _fits_attributes(header: Any) -> dict[str, Any]:
    attrs = {}
    for card in header.cards:
        name, value = card.keyword, card.value
        if name in _RESERVED or not name:
            continue
        if name.startswith("LONG") and name[4:].isdigit():
            name, _, value = value.partition("=")
        if isinstance(value, str):
            if value[:1] == '"' or value in {"NaN", "Infinity", "-Infinity"}:
                with contextlib.suppress(ValueError):
                    value = json.loads(value)
            value = _from_text(value) if isinstance(value, str) else value
        attrs[name.lower()] = value
    return attrs


def _fits_layout(path: Path) -> tuple[list[Column], dict[str, Any], int]:
    from astropy.io import fits

    types = {(code, offset): key for key, (code, _, offset) in _FITS_FORMATS.items()}
    with fits.open(path, memmap=False) as file:
        refuse_wrong_checksums(path, file)
        header = file[GROUP.upper()].header
        columns = []
        for number in range(1, header["TFIELDS"] + 1):
            code, offset = header[f"TFORM{number}"], header.get(f"TZERO{number}", 0)
            dtype = f"S{code[:-1]}" if code.endswith("A") else types[code, int(offset)]
            unit, text = header.get(f"TUNIT{number}", ""), header.get(f"TCOMM{number}", "")
            if text[:1] == '"':
                text = json.loads(text)
            for said in _NO_FITS_UNITS:
                if text.startswith(f"[{said}] "):
                    unit, text = said, text.removeprefix(f"[{said}] ")
            columns.append(Column(header[f"TTYPE{number}"], np.dtype(dtype), unit, text))
        return columns, _fits_attributes(file[0].header), header["NAXIS2"]


WRITERS: dict[str, type[TableWriter]] = {
    ".h5": _Hdf5Table,
    ".hdf5": _Hdf5Table,
    ".parquet": _ParquetTable,
    ".fits": _FitsTable,
}
_LAYOUTS = {".h5": _hdf5_layout, ".hdf5": _hdf5_layout, ".parquet": _parquet_layout, ".fits": _fits_layout}
READERS = {".h5": _read_hdf5, ".hdf5": _read_hdf5, ".parquet": _read_parquet, ".fits": _read_fits}


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
    suffix = Path(path).suffix.lower()
    if suffix not in WRITERS:
        raise OutputError(f"{path}: unknown table format {suffix!r}; use {', '.join(WRITERS)}")
    return WRITERS[suffix](path, n_rows, columns, attrs, overwrite=overwrite)


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
        # Damaged headers make the libraries raise nearly anything.
        raise InputError(f"{path}: cannot be read as a table: {error}") from error
