"""FITS files by their structure: where each HDU begins, its header, rows of its table or image.

Design: thousands of files of one star each are one job, and most of the time that a general reader needs for one of
them goes into objects for HDUs that nobody asks for. Headers are read as text; data are read at their offsets, a few
rows at a time, and only what is asked for. Every HDU must be as long as its header says, which is checked when the file
is opened: a truncated file is known before anything of it is used. Tile-compressed images are decoded by astropy.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import re
import threading
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import InputError
from moefast.core.regular import refuse_special

__all__ = ["FitsFile", "Hdu"]

BLOCK = 2880
CARD = 80
_TFORM = re.compile(r"(\d*)([LXBIJKAEDCMPQ])(.*)")
_CODES = {
    "L": "S1",
    "B": "u1",
    "I": ">i2",
    "J": ">i4",
    "K": ">i8",
    "E": ">f4",
    "D": ">f8",
    "C": ">c8",
    "M": ">c16",
}
_PIXELS = {8: "u1", 16: ">i2", 32: ">i4", 64: ">i8", -32: ">f4", -64: ">f8"}
_UNSIGNED = {1 << 15: np.uint16, 1 << 31: np.uint32, 1 << 63: np.uint64}
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class Hdu:
    """One header and where its data lie.

    Attributes
    ----------
    name : str
        EXTNAME in capitals; "PRIMARY" of the first.
    index : int
        Its place in the file.
    header : mapping
        Keywords in capitals to numbers, text or bool.
    offset, n_bytes : int
        Of the data, without what fills the last block.
    """

    name: str
    index: int
    header: Mapping[str, Any]
    offset: int
    n_bytes: int

    @property
    def n_rows(self) -> int:
        """Rows of a table; length of the last axis of an image, 1 for a single row of pixels."""
        if self.is_table:
            return int(self.header["NAXIS2"])
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def is_table(self) -> bool:
        """Whether it holds a table, not an image (which may be compressed)."""
        return self.header.get("XTENSION") == "BINTABLE" and not self.is_compressed

    @property
    def is_compressed(self) -> bool:
        """Whether it is an image in compressed tiles."""
        return bool(self.header.get("ZIMAGE", False))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an image in the order of NumPy; empty without data."""
        key = "ZNAXIS" if self.is_compressed else "NAXIS"
        return tuple(int(self.header[f"{key}{i}"]) for i in range(int(self.header.get(key, 0)), 0, -1))

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of a table."""
        return tuple(str(self.header.get(f"TTYPE{i}", f"col{i}")) for i in range(1, self._n_fields + 1))

    @property
    def _n_fields(self) -> int:
        return int(self.header.get("TFIELDS", 0)) if self.is_table else 0

    def unit(self, column: str | None = None) -> str:
        """Unit of a column, or of an image; empty if the file does not say."""
        key = "BUNIT" if column is None else f"TUNIT{self.columns.index(column) + 1}"
        return str(self.header.get(key, "")).strip()


class FitsFile:
    """A FITS file, plain or gzipped; open until `close`, and again when something is read.

    Attributes
    ----------
    path : Path
    hdus : list of Hdu

    Raises
    ------
    InputError
        If it is missing, no FITS file, truncated or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        refuse_special(self.path)
        self._lock = threading.RLock()
        self._file: Any = None
        self._astropy: Any = None
        try:
            self.n_bytes = self._open().seek(0, io.SEEK_END)
            self.hdus = self._walk()
        except (OSError, EOFError, zlib.error) as error:
            self.close()
            raise InputError(f"{self.path}: cannot be read as FITS: {error}") from error
        except BaseException:
            self.close()
            raise
        self._by_name = {hdu.name: hdu for hdu in reversed(self.hdus)}

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Hdu:
        try:
            return self._by_name[name]
        except KeyError:
            raise InputError(
                f"{self.path}: HDU {name} is missing; found {', '.join(hdu.name for hdu in self.hdus)}"
            ) from None

    def first_of(self, *names: str) -> Hdu | None:
        """The first HDU of these names that is there."""
        return next((self._by_name[name] for name in names if name in self._by_name), None)

    def has_columns(self, name: str, *columns: str) -> bool:
        """Whether there is a table of that name with these columns."""
        return name in self and self[name].is_table and set(columns) <= set(self[name].columns)

    # -- bytes -----------------------------------------------------------------------------------------------------

    def _open(self) -> Any:
        if self._file is not None:
            return self._file
        file = open(self.path, "rb")  # noqa: SIM115
        if file.read(2) == _GZIP:
            with file:
                file.seek(0)
                # Compressed files are read once, whole: there is no other way to their end.
                self._file = io.BytesIO(gzip.decompress(file.read()))
        else:
            self._file = file
        return self._file

    def close(self) -> None:
        """Release the file; it is opened again when it is needed."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None
            if self._astropy is not None:
                self._astropy.close()
                self._astropy = None

    def __del__(self) -> None:
        for name in ("_file", "_astropy"):
            file = getattr(self, name, None)
            if file is not None:
                file.close()

    def _bytes(self, offset: int, n: int, what: str) -> bytearray:
        data = bytearray(n)
        try:
            with self._lock:
                self._open()
                self._file.seek(offset)
                got = self._file.readinto(data)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{self.path}: {what} cannot be read: {error}") from error
        if got != n:
            raise InputError(
                f"{self.path}: {what}: the file ends {n - got} bytes too early; copy or produce it again"
            )
        return data

    def head(self, hdu: Hdu) -> bytearray:
        """The first 64 kB of the data of an HDU."""
        return self._bytes(hdu.offset, min(hdu.n_bytes, 1 << 16), f"HDU {hdu.name}")

    def _walk(self) -> list[Hdu]:
        hdus: list[Hdu] = []
        offset = 0
        while offset < self.n_bytes:
            self._file.seek(offset)
            text = self._file.read(2 * BLOCK)
            if not hdus and not text.startswith(b"SIMPLE  ="):
                raise InputError(f"{self.path}: not a FITS file (it starts with {bytes(text[:8])!r})")
            if hdus and not text.startswith(b"XTENSION"):
                if text.strip(b"\0 "):
                    raise InputError(
                        f"{self.path}: HDU {len(hdus)} is damaged: it begins with {bytes(text[:8])!r}, expected "
                        "XTENSION; copy or produce the file again"
                    )
                # Filled up with nothing.
                break
            while (end := _end_card(text)) < 0:
                more = self._file.read(4 * BLOCK)
                if not more:
                    raise InputError(
                        f"{self.path}: truncated file: the header of HDU {len(hdus)} has no end; copy or produce it "
                        "again"
                    )
                text += more
            header = _parse(text[:end])
            begin = offset + -(-(end + CARD) // BLOCK) * BLOCK
            size = _data_bytes(header)
            name = "PRIMARY" if not hdus else str(header.get("EXTNAME", "")).strip().upper()
            if begin + size > self.n_bytes:
                raise InputError(
                    f"{self.path}: truncated file: HDU {len(hdus)} ({name}) ends at byte {begin + size}, the file has "
                    f"{self.n_bytes}; copy or produce it again"
                )
            if header.get("ZTABLE"):
                raise InputError(
                    f"{self.path}: HDU {name} is a compressed table; unpack the file with funpack first"
                )
            hdus.append(Hdu(name, len(hdus), header, begin, size))
            offset = begin + -(-size // BLOCK) * BLOCK
        if not hdus:
            raise InputError(f"{self.path}: not a FITS file (it is empty)")
        if self.n_bytes % BLOCK:
            # HDUs may have followed that nothing else tells of.
            raise InputError(
                f"{self.path}: truncated file: {self.n_bytes} bytes, and FITS files come in blocks of {BLOCK}; copy or "
                "produce it again"
            )
        return hdus

    # -- tables ----------------------------------------------------------------------------------------------------

    def table(
        self, hdu: Hdu, names: list[str] | None = None, start: int = 0, stop: int | None = None
    ) -> dict[str, NDArray]:
        """Columns of a table, rows `start` to `stop`: numbers in native byte order, text; of several numbers (n, k).

        Columns of rows of varying length come as text if they hold characters; other ones by `ragged`.
        """
        stop = hdu.n_rows if stop is None else stop
        layout, fields = _row_layout(self.path, hdu)
        n = stop - start
        data = self._bytes(hdu.offset + start * layout.itemsize, n * layout.itemsize, f"HDU {hdu.name}")
        rows = np.frombuffer(data, layout, n)
        out: dict[str, NDArray] = {}
        for name in hdu.columns if names is None else names:
            if name not in fields:
                raise InputError(
                    f"{self.path}: HDU {hdu.name} has no column {name!r}; it has {', '.join(hdu.columns)}"
                )
            number, code = fields[name]
            values = rows[f"c{number}"]
            if code in "PQ":
                if f"{hdu.header[f'TFORM{number}']}".lstrip("01")[1:2] != "A":
                    continue
                out[name] = self._texts(hdu, values)
            elif code == "A":
                out[name] = (
                    np.char.strip(np.char.decode(values, "ascii", "replace")) if n else values.astype("U1")
                )
            elif code == "L":
                out[name] = values == b"T"
            elif code != "X":
                out[name] = _scaled(hdu.header, number, values)
        return out

    def _texts(self, hdu: Hdu, descriptors: NDArray) -> NDArray:
        heap = hdu.offset + int(hdu.header.get("THEAP", int(hdu.header["NAXIS1"]) * hdu.n_rows))
        if not len(descriptors):
            return np.empty(0, "U1")
        lengths, offsets = descriptors[:, 0].astype(np.int64), descriptors[:, 1].astype(np.int64)
        low, high = int(offsets.min()), int((offsets + lengths).max())
        data = bytes(self._bytes(heap + low, high - low, f"HDU {hdu.name}"))
        texts = [
            data[o - low : o - low + n].decode("ascii", "replace").rstrip("\0")
            for o, n in zip(offsets, lengths, strict=True)
        ]
        return np.array(texts) if any(texts) else np.full(len(texts), "", "U1")

    def ragged(
        self, hdu: Hdu, name: str, start: int, stop: int, rows: NDArray | None = None
    ) -> tuple[NDArray, NDArray[np.int64]]:
        """A column whose rows vary in length, or have several numbers: all values, and where the rows begin.

        `rows`, if given, are the rows wanted of those from `start` to `stop`, counted from `start`.
        """
        layout, fields = _row_layout(self.path, hdu)
        if name not in fields:
            raise InputError(
                f"{self.path}: HDU {hdu.name} has no column {name!r}; it has {', '.join(hdu.columns)}"
            )
        number, code = fields[name]
        data = self._bytes(
            hdu.offset + start * layout.itemsize, (stop - start) * layout.itemsize, f"HDU {hdu.name}"
        )
        cells = np.frombuffer(data, layout, stop - start)[f"c{number}"]
        if rows is not None:
            cells = cells[rows]
        if code not in "PQ":
            values = _scaled(hdu.header, number, cells.reshape(len(cells), -1))
            return values.ravel(), np.arange(len(cells) + 1, dtype=np.int64) * values.shape[1]
        kind = np.dtype(_CODES[str(hdu.header[f"TFORM{number}"]).lstrip("01")[1]])
        lengths, offsets = cells[:, 0].astype(np.int64), cells[:, 1].astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        ends = offsets + lengths * kind.itemsize
        heap = hdu.offset + int(hdu.header.get("THEAP", int(hdu.header["NAXIS1"]) * hdu.n_rows))
        if len(lengths) and (
            lengths.min() < 0 or offsets.min() < 0 or heap + ends.max() > hdu.offset + hdu.n_bytes
        ):
            raise InputError(
                f"{self.path}: HDU {hdu.name}: column {name!r} points beyond its data; the file is damaged"
            )
        total = int(starts[-1])
        if not total:
            return np.empty(0, kind.newbyteorder("=")), starts
        if np.array_equal(offsets[1:], ends[:-1]):
            raw = self._bytes(heap + int(offsets[0]), total * kind.itemsize, f"HDU {hdu.name}")
        else:
            raw = bytearray()
            for offset, length in zip(offsets, lengths, strict=True):
                raw += self._bytes(heap + int(offset), int(length) * kind.itemsize, f"HDU {hdu.name}")
        return _scaled(hdu.header, number, np.frombuffer(raw, kind)), starts

    # -- images ----------------------------------------------------------------------------------------------------

    def image(self, hdu: Hdu, start: int = 0, stop: int | None = None) -> NDArray:
        """Rows `start` to `stop` along the first axis of an image, all of it if it has one; in native byte order."""
        shape = hdu.shape
        if not shape or 0 in shape:
            raise InputError(f"{self.path}: HDU {hdu.name} holds no data")
        if hdu.is_compressed:
            return self._decoded(hdu, start, stop)
        kind = np.dtype(_PIXELS[int(hdu.header["BITPIX"])])
        rows = shape if len(shape) == 1 else (((shape[0] if stop is None else stop) - start), *shape[1:])
        size = kind.itemsize * int(np.prod(rows, dtype=np.int64))
        skip = 0 if len(shape) == 1 else start * kind.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        values = np.frombuffer(self._bytes(hdu.offset + skip, size, f"HDU {hdu.name}"), kind).reshape(rows)
        zero, scale = hdu.header.get("BZERO", 0), hdu.header.get("BSCALE", 1)
        values = values.astype(kind.newbyteorder("="))
        if zero in _UNSIGNED and scale == 1 and kind.kind == "i":
            return values.view(_UNSIGNED[zero]) ^ _UNSIGNED[zero](zero)
        return values if (zero, scale) == (0, 1) else values * scale + zero

    def _decoded(self, hdu: Hdu, start: int, stop: int | None) -> NDArray:
        from astropy.io import fits

        try:
            with self._lock:
                if self._astropy is None:
                    self._astropy = fits.open(self.path, memmap=False)
                found = self._astropy[hdu.index]
                whole = len(hdu.shape) == 1 or (start == 0 and stop in (None, hdu.shape[0]))
                values = (
                    found.data if whole else found.section[start : hdu.shape[0] if stop is None else stop]
                )
                return np.array(values, values.dtype.newbyteorder("="))
        except Exception as error:
            # Decoders raise what they like on damaged tiles.
            raise InputError(f"{self.path}: HDU {hdu.name} cannot be decoded: {error}") from error


def _end_card(text: bytes) -> int:
    """Offset of the END card, -1 if there is none."""
    at = text.find(b"END" + b" " * (CARD - 3))
    while at >= 0 and at % CARD:
        at = text.find(b"END" + b" " * (CARD - 3), at + 1)
    return at


@lru_cache(maxsize=512)
def _parse(text: bytes) -> Mapping[str, Any]:
    """Keywords and values; most headers of thousands of files of one kind are alike to the last byte, and kept."""
    header: dict[str, Any] = {}
    for at in range(0, len(text), CARD):
        card = text[at : at + CARD].decode("ascii", "replace")
        if card[8:10] == "= ":
            key, value = card[:8].rstrip(), card[10:]
        elif card.startswith("HIERARCH ") and "=" in card:
            key, _, value = card[9:].partition("=")
            key = key.strip().upper()
        else:
            continue
        header.setdefault(key, _value(value))
    return MappingProxyType(header)


def _value(text: str) -> Any:
    text = text.lstrip()
    if text[:1] == "'":
        end = 1
        while (end := text.find("'", end)) >= 0 and text[end + 1 : end + 2] == "'":
            end += 2
        return text[1 : end if end >= 0 else None].replace("''", "'").rstrip()
    text = text.partition("/")[0].strip()
    if text in {"T", "F"}:
        return text == "T"
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text.replace("D", "E"))
    except ValueError:
        return text


def _data_bytes(header: Mapping[str, Any]) -> int:
    n_axes = header.get("NAXIS", 0)
    if not n_axes:
        return 0
    cells = math.prod(int(header.get(f"NAXIS{i}", 0)) for i in range(1, int(n_axes) + 1))
    return (
        abs(int(header.get("BITPIX", 8)))
        // 8
        * int(header.get("GCOUNT", 1))
        * (int(header.get("PCOUNT", 0)) + cells)
    )


def _row_layout(path: os.PathLike[str], hdu: Hdu) -> tuple[np.dtype, Mapping[str, tuple[int, str]]]:
    """Type of a row, and of each column its number and code."""
    if not hdu.is_table:
        raise InputError(f"{path}: HDU {hdu.name} is an image, expected a table")
    forms = tuple(str(hdu.header.get(f"TFORM{i}", "")).strip() for i in range(1, len(hdu.columns) + 1))
    try:
        layout, fields = _layout_of(hdu.columns, forms)
    except InputError as error:
        raise InputError(f"{path}: HDU {hdu.name}: {error}") from error
    if layout.itemsize != int(hdu.header["NAXIS1"]):
        raise InputError(
            f"{path}: HDU {hdu.name}: rows of {layout.itemsize} bytes expected from its columns, the header says "
            f"{hdu.header['NAXIS1']}"
        )
    return layout, fields


@lru_cache(maxsize=256)
def _layout_of(
    names: tuple[str, ...], forms: tuple[str, ...]
) -> tuple[np.dtype, Mapping[str, tuple[int, str]]]:
    kinds: list[tuple[Any, ...]] = []
    fields: dict[str, tuple[int, str]] = {}
    for number, (name, form) in enumerate(zip(names, forms, strict=True), 1):
        match = _TFORM.fullmatch(form)
        if match is None:
            raise InputError(f"column {name!r} has the unknown format {form!r}")
        repeat, code = int(match[1] or 1), match[2]
        if code in "PQ":
            kinds.append((f"c{number}", ">i4" if code == "P" else ">i8", (2,)))
        elif code == "A":
            kinds.append((f"c{number}", f"S{repeat}" if repeat else "V0"))
        elif code == "X":
            kinds.append((f"c{number}", f"V{-(-repeat // 8)}"))
        else:
            kinds.append(
                (f"c{number}", _CODES[code], (repeat,)) if repeat != 1 else (f"c{number}", _CODES[code])
            )
        if not (code == "A" and not repeat):
            fields[name] = (number, code)
    return np.dtype(kinds), fields


def _scaled(header: Mapping[str, Any], number: int, values: NDArray) -> NDArray:
    zero, scale = header.get(f"TZERO{number}", 0), header.get(f"TSCAL{number}", 1)
    native = values.astype(values.dtype.newbyteorder("="))
    if (zero, scale) == (0, 1):
        return native
    if scale == 1 and zero in _UNSIGNED and native.dtype.kind == "i":
        unsigned = _UNSIGNED[zero]
        return native.view(unsigned) ^ unsigned(zero)
    return native * scale + zero
