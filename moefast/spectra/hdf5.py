"""Opening HDF5 files, and why one cannot be opened, in words."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path
from typing import Any

import h5py

from moefast.core.errors import InputError

__all__ = ["ARRAYS", "STAGING_BYTES", "contents_of", "open_hdf5"]

ARRAYS = ("flux", "error", "mask", "noisy")
STAGING_BYTES = 1 << 20


def open_hdf5(path: Path) -> h5py.File:
    """Open an HDF5 file for reading.

    Raises
    ------
    InputError
        If it is absent, no regular file, no HDF5 file, locked or damaged.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise InputError(_why_not_opened(path, error)) from error
    if stat.S_ISDIR(status.st_mode):
        raise InputError(f"{path}: is a folder, expected an HDF5 file")
    if not stat.S_ISREG(status.st_mode):
        raise InputError(
            f"{path}: is a pipe or device; HDF5 files are read at several places, so write it to a disk"
        )
    try:
        return h5py.File(path, "r", rdcc_nbytes=STAGING_BYTES, locking="best-effort")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(_why_not_opened(path, error)) from error


def _why_not_opened(path: Path, error: OSError | ValueError) -> str:
    """Why a file cannot be opened, and what to do."""
    text, number = str(error), getattr(error, "errno", None)
    said = re.search(r"errno = (\d+)", text)
    number = int(said[1]) if number is None and said else number
    if number in (errno.EMFILE, errno.ENFILE):
        return f"{path}: too many files are open already; raise the limit (ulimit -n) or close other files"
    if number == errno.ENOENT:
        if path.is_symlink():
            return f"{path}: is a link to {os.readlink(path)}, which does not exist"
        return f"{path}: no such file"
    if number in (errno.EACCES, errno.EPERM):
        return f"{path}: may not be read by this user ({os.strerror(number)})"
    if number == errno.ELOOP:
        return f"{path}: links lead in a circle"
    if "unable to lock file" in text or "already open for write" in text or "SWMR" in text:
        return (
            f"{path}: another program has it open for writing ({text}); wait until it has finished. If nothing writes, "
            "the file system has no locks or kept an old one: set HDF5_USE_FILE_LOCKING=FALSE"
        )
    cut = re.search(r"truncated file: eof = (\d+).*stored_eof = (\d+)", text)
    if cut:
        length, expected = int(cut[1]), int(cut[2])
        return (
            f"{path}: truncated file: {length} bytes of {expected}{_lost_rows(path, length, expected)}; "
            "copy or produce it again"
        )
    try:
        with open(path, "rb") as file:
            head = file.read(8)
    except (OSError, ValueError) as problem:
        return f"{str(path)!r}: cannot be read: {problem}"
    if head == b"SIMPLE  ":
        return f"{path}: a FITS file; only predict and inspect read those, on the grid of a model"
    if head != b"\x89HDF\r\n\x1a\n":
        return f"{path}: not an HDF5 file (it starts with {head!r})"
    return f"{path}: cannot be opened as HDF5, it may be damaged: {error}"


def _lost_rows(path: Path, length: int, expected: int) -> str:
    """Say what a file cut off at `length` bytes has lost, as far as its metadata survive."""

    class Padded:
        """The file with zeros where it ends too early: HDF5 refuses to open it otherwise."""

        def __init__(self) -> None:
            self.file = open(path, "rb")  # noqa: SIM115
            self.position = 0

        def seek(self, offset: int, whence: int = 0) -> int:
            self.position = offset + (0, self.position, expected)[whence]
            return self.position

        def tell(self) -> int:
            return self.position

        def readinto(self, buffer: Any) -> int:
            self.file.seek(self.position)
            view = memoryview(buffer).cast("B")
            n = self.file.readinto(view)
            view[n:] = bytes(len(view) - n)
            self.position += len(view)
            return len(view)

        def read(self, size: int = -1) -> bytes:
            data = bytearray(size)
            self.readinto(data)
            return bytes(data)

    lost = []
    padded = Padded()
    try:
        with h5py.File(padded, "r") as file:
            for name in ARRAYS:
                dataset = file.get(f"dataset/arrays/{name}/value")
                if not isinstance(dataset, h5py.Dataset) or dataset.ndim != 2 or not dataset.size:
                    continue
                offset = dataset.id.get_offset() if dataset.chunks is None else None
                if offset is None:
                    continue
                row_bytes = dataset.dtype.itemsize * dataset.shape[1]
                whole = max(0, min(dataset.shape[0], (length - offset) // row_bytes))
                if whole < dataset.shape[0]:
                    lost.append(f"{dataset.name} ends in row {whole} of {dataset.shape[0]}")
    except Exception:
        # Zeros in place of metadata make HDF5 raise nearly anything; the length alone is then the answer.
        return ""
    finally:
        padded.file.close()
    return ": " + "; ".join(lost) if lost else ""


def contents_of(file: h5py.File) -> str:
    """Datasets of a file and their shapes, a dozen of them, in words."""
    found: list[str] = []

    def visit(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and "/_i_table/" not in name and len(found) < 12:
            found.append(f"{name} {node.shape}")

    file.visititems(visit)
    return ", ".join(found) or "nothing"
