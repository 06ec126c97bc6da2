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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefast.core.atomic import atomic_file

__all__ = ["DamagedArchive", "Header", "open_hashed", "read_archive", "write_hashed"]

_ENCRYPTED = 1
_SUFFIX = ".npy"

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
    if member.flag_bits & _ENCRYPTED or member.compress_type != zipfile.ZIP_STORED:
        raise DamagedArchive(f"{member.filename!r} is encrypted or compressed; expected plain arrays")
    if not member.filename.endswith(_SUFFIX) or member.file_size > size:
        raise DamagedArchive(f"{member.filename!r} is no array of this archive")
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, _, dtype = read[version](stream)
        if dtype.hasobject:
            raise DamagedArchive(
                f"{member.filename!r} holds Python objects, which could run code; expected numbers"
            )
        if math.prod(shape) * dtype.itemsize > member.file_size:
            raise DamagedArchive(f"{member.filename!r} has shape {shape} of {dtype}, more than is there")
    with archive.open(member) as stream:
        array: NDArray = np.lib.format.read_array(stream, allow_pickle=False)
        return array


def write_hashed(path: Path, document: Mapping[str, Any], arrays: Mapping[str, NDArray]) -> None:
    """Write arrays with a header and hashes; the final name is absent or complete, one that exists is replaced.

    Parameters
    ----------
    path : Path
    document : mapping, JSON-ready
        With `what` the file is.
    arrays : mapping of str to array

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    header: Header = {**document, "sha256": {name: _digest(array) for name, array in arrays.items()}}
    text = json.dumps(header | {"checksum": _checksum(header)})
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.savez(file, header=np.frombuffer(text.encode(), np.uint8), **arrays)  # type: ignore[arg-type]  # names are not those of its options


@contextmanager
def open_hashed(
    path: Path, what: str, check: Callable[[Header], None]
) -> Iterator[tuple[Header, Callable[[str], NDArray]]]:
    """The header of what `write_hashed` wrote, and a function that reads the array of a name.

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

        def array_of(name: str) -> NDArray:
            return _read_member(archive, archive.getinfo(f"{name}{_SUFFIX}"), size)

        header = json.loads(array_of("header").tobytes())
        if header["what"] != what:
            raise ValueError(f"it holds {header['what']!r}")
        check(header)
        if header["checksum"] != _checksum(header):
            raise ValueError("its header was changed")

        def read(name: str) -> NDArray:
            array = array_of(name)
            if header["sha256"][name] != _digest(array):
                raise ValueError(f"{name} was changed")
            return array

        yield header, read


def _digest(array: NDArray) -> str:
    """SHA-256 of an array with its type and shape."""
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape} ".encode())
    digest.update(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
    return digest.hexdigest()


def _checksum(header: Mapping[str, Any]) -> str:
    """SHA-256 of all that a header says, but for this number itself."""
    said = {name: value for name, value in header.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
