"""Tables in FITS, with room for attributes at the head of the file."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from moefast.core.errors import OutputError
from moefast.spectra.layouts.fits_file import FitsFile
from moefast.spectra.tables.attributes import as_plain, from_text, to_json
from moefast.spectra.tables.column import GROUP, Column
from moefast.spectra.tables.fits_checksums import add_words, encode_checksum, refuse_wrong_checksums
from moefast.spectra.tables.writer import TableWriter

__all__ = ["FitsTable", "fits_layout", "read_fits"]

_HEADER_UNIT = 2880
_HEADER_ROOM = 5 * _HEADER_UNIT


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


class FitsTable(TableWriter):
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
            plain = as_plain(value)
            if isinstance(plain, float) and not math.isfinite(plain):
                plain = json.dumps(plain)
            text = plain if plain is not None else to_json(value)
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


@contextmanager
def _whole_file(path: Path) -> Iterator[Any]:
    """A file opened by astropy, once it is known to be whole: of truncated ones astropy only warns.

    Raises
    ------
    InputError
        It is truncated or damaged.
    """
    from astropy.io import fits

    FitsFile(path).close()
    with fits.open(path, memmap=False) as file:
        refuse_wrong_checksums(path, file)
        yield file


def read_fits(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Columns and attributes of a table."""
    with _whole_file(path) as file:
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
            value = json.loads(value) if value in {"NaN", "Infinity", "-Infinity"} else from_text(value)
        attrs[name.lower()] = value
    return attrs


def fits_layout(path: Path) -> tuple[list[Column], dict[str, Any], int]:
    """Columns, attributes and number of rows of a table."""
    types = {(code, offset): key for key, (code, _, offset) in _FITS_FORMATS.items()}
    with _whole_file(path) as file:
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
