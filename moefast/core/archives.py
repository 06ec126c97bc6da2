"""NumPy archives (.npz) of unknown origin: judged by their table of contents before anything is unpacked.

Design: an archive of a few bytes can ask for any amount of memory, by compression or by a shape in a header. Ours are
stored without compression, so what an array may take is bounded by the size of the file. Those that are gone on from
have a header, JSON in an array of bytes, with the SHA-256 of every array and of itself. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from moefast.core.atomic import atomic_file

__all__ = ["DamagedArchive", "Header", "StoredArrays", "open_hashed", "read_archive", "write_hashed"]

_ENCRYPTED = 1
_SUFFIX, _HEADER = ".npy", "header"
_CHUNK_BYTES = 2**20

Header = dict[str, Any]


class DamagedArchive(ValueError):
    """An archive that NumPy cannot read, or that is none of ours."""


@contextmanager
def _one_error() -> Iterator[None]:
    """Raise `DamagedArchive` for whatever NumPy and zipfile raise on damage, tokenize.TokenError for one.

    Sizes are judged first, so that a lack of memory is no damage.
    """
    try:
        yield
    except (DamagedArchive, MemoryError):
        raise
    except Exception as error:
        raise DamagedArchive(f"{type(error).__name__}: {error}") from error


def read_archive(path: Path) -> dict[str, NDArray]:
    """All arrays of an archive without compression and without Python objects, by name.

    Raises
    ------
    DamagedArchive
        It is damaged, compressed, encrypted, or its arrays do not fit in it.
    """
    found: dict[str, NDArray] = {}
    with _one_error(), path.open("rb") as file, zipfile.ZipFile(file) as archive:
        size = path.stat().st_size
        for member in archive.infolist():
            found[member.filename.removesuffix(_SUFFIX)] = _read_member(archive, member, size)
    return found


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, size: int) -> NDArray:
    """An array of an archive of some bytes, once what it would take has been judged."""
    _judge_member(member, size)
    with archive.open(member) as stream:
        shape, _, dtype = _read_array_header(stream)
        if dtype.hasobject:
            raise DamagedArchive(
                f"{member.filename!r} holds Python objects, which could run code; expected numbers"
            )
        if math.prod(shape) * dtype.itemsize > member.file_size:
            raise DamagedArchive(f"{member.filename!r} has shape {shape} of {dtype}, more than is there")
    with archive.open(member) as stream:
        array: NDArray = np.lib.format.read_array(stream, allow_pickle=False)
        return array


def _judge_member(member: zipfile.ZipInfo, size: int) -> None:
    """Refuse what is no plain array of an archive of some bytes."""
    if member.flag_bits & _ENCRYPTED or member.compress_type != zipfile.ZIP_STORED:
        raise DamagedArchive(f"{member.filename!r} is encrypted or compressed; expected plain arrays")
    if not member.filename.endswith(_SUFFIX) or member.file_size > size:
        raise DamagedArchive(f"{member.filename!r} is no array of this archive")


def _read_array_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape of an array, whether it is stored by columns, and its type."""
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    found: tuple[tuple[int, ...], bool, np.dtype[Any]] = read[np.lib.format.read_magic(stream)](stream)
    return found


def write_hashed(
    path: Path, document: Mapping[str, Any], arrays: Mapping[str, NDArray], *, durable: bool = True
) -> None:
    """Write arrays with a header and hashes; the final name is absent or complete, one that exists is replaced.

    Parameters
    ----------
    path : Path
    document : mapping, JSON-ready
        With `what` the file is.
    arrays : mapping of str to array
    durable : bool
        See `moefast.core.atomic.publish`.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    with (
        atomic_file(path, durable=durable) as partial,
        partial.open("wb") as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        digests = {name: _write_member(archive, name, array) for name, array in arrays.items()}
        header: Header = {**document, "sha256": digests}
        text = json.dumps(header | {"checksum": _checksum(header)})
        _write_member(archive, _HEADER, np.frombuffer(text.encode(), np.uint8))


def _write_member(archive: zipfile.ZipFile, name: str, array: NDArray) -> str:
    """Write an array, and give its hash."""
    plain = np.asarray(array, order="C")
    digest = _begun(plain.shape, plain.dtype)
    with archive.open(f"{name}{_SUFFIX}", "w", force_zip64=True) as stream:
        np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(plain))
        for chunk in _chunks(plain):
            digest.update(chunk)
            stream.write(chunk)
    return digest.hexdigest()


class StoredArrays:
    """Arrays of an archive, each compared with its hash when it is read.

    Parameters
    ----------
    archive : ZipFile
    size : int
        Bytes of the archive.
    header : dict
    """

    def __init__(self, archive: zipfile.ZipFile, size: int, header: Header) -> None:
        self._archive, self._size, self._header = archive, size, header

    def __call__(self, name: str) -> NDArray:
        """The array of a name.

        Raises
        ------
        KeyError, ValueError
            There is none, or it is another one than was written.
        """
        array = _read_member(self._archive, self._archive.getinfo(f"{name}{_SUFFIX}"), self._size)
        self._compare(name, _digest(array))
        return array

    def add_to(self, name: str, total: NDArray) -> None:
        """Add the array of a name to one of its shape and type, in place and without the memory for it.

        `total` is of no use if this raises.

        Raises
        ------
        KeyError, ValueError
            There is none, or it is another one than was written, or has another shape or type than `total`.
        """
        member = self._archive.getinfo(f"{name}{_SUFFIX}")
        _judge_member(member, self._size)
        digest, added = _begun(total.shape, total.dtype), 0
        into = total.reshape(-1, copy=False)
        with self._archive.open(member) as stream:
            shape, in_columns, dtype = _read_array_header(stream)
            if shape != total.shape or dtype != total.dtype or in_columns:
                raise ValueError(
                    f"{name} has shape {shape} of {dtype}, expected {total.shape} of {total.dtype}"
                )
            while chunk := stream.read(_CHUNK_BYTES - _CHUNK_BYTES % total.itemsize):
                digest.update(chunk)
                values = np.frombuffer(chunk, total.dtype)
                into[added : added + values.size] += values
                added += values.size
        if added != total.size:
            raise ValueError(f"{name} has {added} numbers, expected {total.size}")
        self._compare(name, digest.hexdigest())

    def check(self) -> None:
        """Compare all arrays with their hashes, without the memory for them.

        Raises
        ------
        KeyError, ValueError
            One is missing, or another one than was written.
        """
        for name in self._header["sha256"]:
            member = self._archive.getinfo(f"{name}{_SUFFIX}")
            _judge_member(member, self._size)
            with self._archive.open(member) as stream:
                shape, _, dtype = _read_array_header(stream)
                digest = _begun(shape, dtype)
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
            self._compare(name, digest.hexdigest())

    def _compare(self, name: str, digest: str) -> None:
        if self._header["sha256"][name] != digest:
            raise ValueError(f"{name} was changed")


@contextmanager
def open_hashed(
    path: Path, what: str, check: Callable[[Header], None]
) -> Iterator[tuple[Header, StoredArrays]]:
    """The header of what `write_hashed` wrote, and its arrays.

    Parameters
    ----------
    path : Path
    what : str
        What the file must say that it is.
    check : callable
        Called with the header before its checksum is looked at; refuses by raising.

    Raises
    ------
    Exception
        The file is damaged or none of ours: NumPy raises nearly anything then, tokenize.TokenError for one. ValueError
        where a hash does not fit. MemoryError is no damage.
    """
    size = path.stat().st_size
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        text = _read_member(archive, archive.getinfo(f"{_HEADER}{_SUFFIX}"), size)
        header = json.loads(text.tobytes())
        if header["what"] != what:
            raise ValueError(f"it holds {header['what']!r}")
        check(header)
        if header["checksum"] != _checksum(header):
            raise ValueError("its header was changed")
        yield header, StoredArrays(archive, size, header)


def _digest(array: NDArray) -> str:
    """SHA-256 of an array with its type and shape."""
    digest = _begun(array.shape, array.dtype)
    for chunk in _chunks(np.asarray(array, order="C")):
        digest.update(chunk)
    return digest.hexdigest()


def _begun(shape: tuple[int, ...], dtype: np.dtype[Any]) -> hashlib._Hash:
    """SHA-256 of the type and shape of an array."""
    return hashlib.sha256(f"{dtype.str} {shape} ".encode())


def _chunks(array: NDArray) -> Iterator[memoryview]:
    """The bytes of a contiguous array, some at a time, without copying them: fresh memory costs more than a hash."""
    if array.size:
        content = array.reshape(-1).data.cast("B")
        for first in range(0, len(content), _CHUNK_BYTES):
            yield content[first : first + _CHUNK_BYTES]


def _checksum(header: Mapping[str, Any]) -> str:
    """SHA-256 of all that a header says, but for this number itself."""
    said = {name: value for name, value in header.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
