"""NumPy archives (.npz) of unknown origin: judged by their table of contents before anything is unpacked.

Design: an archive of a few bytes can ask for any amount of memory, by compression or by a shape in a header. Ours are
stored without compression, so what an array may take is bounded by the size of the file.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["DamagedArchive", "read_archive"]

_ENCRYPTED = 1


class DamagedArchive(ValueError):
    """An archive that NumPy cannot read, or that is none of ours."""


@contextmanager
def _one_error() -> Iterator[None]:
    """Raise `DamagedArchive` for whatever NumPy and zipfile raise on damage, tokenize.TokenError for one."""
    try:
        yield
    except DamagedArchive:
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
            if member.flag_bits & _ENCRYPTED or member.compress_type != zipfile.ZIP_STORED:
                raise DamagedArchive(f"{member.filename!r} is encrypted or compressed; expected plain arrays")
            if not member.filename.endswith(".npy") or member.file_size > size:
                raise DamagedArchive(f"{member.filename!r} is no array of this archive")
            with archive.open(member) as stream:
                version = np.lib.format.read_magic(stream)
                read = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }
                shape, _, dtype = read[version](stream)
                if dtype.hasobject or math.prod(shape) * dtype.itemsize > member.file_size:
                    raise DamagedArchive(
                        f"{member.filename!r} has shape {shape} of {dtype}, more than is there"
                    )
            with archive.open(member) as stream:
                found[member.filename.removesuffix(".npy")] = np.lib.format.read_array(
                    stream, allow_pickle=False
                )
    return found
