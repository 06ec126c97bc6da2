"""Spectrum files meant by names of files, folders and patterns."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import h5py

from moefast.core.errors import InputError
from moefast.core.text import counted

__all__ = ["content_of", "find_files", "words_on_repeated"]

_SUFFIXES = (".h5", ".hdf5", ".fits", ".fit", ".fits.gz", ".fits.fz")


def content_of(given: object) -> str | None:
    """SHA-256 of the content of the files that an option names: a file, folder or pattern; None if it names none.

    Raises
    ------
    InputError
        A file cannot be read.
    """
    if not isinstance(given, str | Path):
        return None
    if os.path.isdir(given) or (glob.has_magic(str(given)) and not os.path.exists(given)):
        files = find_files(given)
    elif os.path.isfile(given):
        files = [Path(given)]
    else:
        return None
    digest = hashlib.sha256()
    for file in files:
        try:
            with open(file, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {error}") from error
    return digest.hexdigest()


def find_files(
    paths: str | Path | Iterable[str | Path], repeated: dict[Path, None] | None = None
) -> list[Path]:
    """Spectrum files meant by files, folders and glob patterns.

    Folders, given or met by a pattern, are searched recursively for ``*.h5``, ``*.hdf5`` and ``*.fits`` (also gzipped).
    What one folder or pattern yields is in natural order (shard 2 before shard 10); the order of the arguments is kept
    and duplicates are dropped.
    Prediction tables of moefast that lie among the spectra are passed over, unless they are named themselves. What
    cannot be opened is among the files, links without a target for example: whoever opens it will say so.

    Parameters
    ----------
    paths : path, folder, pattern, or several
    repeated : dict of Path to None, optional
        Gets, in order, the files that are among the inputs more than once.

    Raises
    ------
    InputError
        If an argument names nothing.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    found: dict[str, Path] = {}
    for given in paths:
        try:
            matches = _matches(given)
        except (OSError, ValueError, RuntimeError) as error:
            # Loops of links, names that are too long, NUL bytes, folders that may not be read, homes that do not exist.
            raise InputError(f"{str(given)!r}: no file can be looked for under this name: {error}") from error
        for match in sorted(matches, key=_natural):
            first = found.setdefault(os.path.realpath(match), match)
            if first is not match and repeated is not None:
                repeated[first] = None
    if not found:
        raise InputError("no spectrum files given: name files, folders or patterns (train_*/dataset.h5)")
    return list(found.values())


def words_on_repeated(repeated: Mapping[Path, None]) -> list[str]:
    """A note on files that are among the inputs more than once; none if there are none."""
    if not repeated:
        return []
    first, *others = repeated
    if not others:
        return [f"{first} is among the inputs more than once; its spectra are predicted once"]
    return [
        f"{first} and {counted(len(others), 'other file')} are among the inputs more than once; their spectra are "
        "predicted once"
    ]


def _matches(given: str | Path) -> list[Path]:
    """What one argument means."""
    path = Path(given).expanduser()
    if path.is_dir():
        matches = [p for p in _below(path) if not _is_table(p)]
        if not matches:
            hint = (
                "; it is the folder of a model, which is named after -m"
                if (path / "manifest.json").exists()
                else ""
            )
            raise InputError(f"{given}: no file *.h5, *.hdf5 or *.fits in this folder or below it{hint}")
        return matches
    if os.path.lexists(path):
        return [path]
    if not glob.has_magic(str(path)):
        raise InputError(f"{given}: no such file or folder (working folder {Path.cwd()})")
    matches = []
    for match in map(Path, glob.glob(str(path), recursive=True)):
        matches += _below(match) if match.is_dir() else [] if _is_left_by_macos(match) else [match]
    matches = [p for p in matches if not _is_table(p)]
    if not matches:
        raise InputError(f"{given}: no file matches this pattern (working folder {Path.cwd()})")
    return matches


def _below(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """Spectrum files in a folder and below it, and what may be one and cannot be looked at.

    Links to folders are followed, but not into a folder that they lie in.
    """
    try:
        status = folder.stat()
        key = (status.st_dev, status.st_ino)
        names = sorted(folder.iterdir()) if key not in above else []
    except OSError:
        # Opening it will say why.
        yield folder
        return
    for path in names:
        suffix = path.suffix.lower()
        try:
            if path.is_dir():
                yield from _below(path, above | {key})
                continue
        except OSError:
            yield path
            continue
        # A link without its target may have been a folder of spectra.
        lost = path.is_symlink() and not path.exists() and not suffix
        if (path.name.lower().endswith(_SUFFIXES) or lost) and not _is_left_by_macos(path):
            yield path


def _natural(path: str | Path) -> list[tuple[int, int, str]]:
    pieces = re.split(r"(\d+)", str(path))
    return [(1, int(piece), "") if piece.isdigit() else (0, 0, piece) for piece in pieces]


def _is_table(path: Path) -> bool:
    """Whether a file is a prediction table; a file that cannot be opened is left to those who will say why."""
    try:
        # Opening a pipe would wait for somebody to write into it.
        if not path.is_file():
            return False
        if path.suffix.lower() not in {".h5", ".hdf5"}:
            with open(path, "rb") as plain:
                return b"MOEFAST_VERSION" in plain.read(1 << 15)
        with h5py.File(path, "r") as file:
            return "predictions" in file and "dataset" not in file
    except OSError:
        return False


def _is_left_by_macos(path: Path) -> bool:
    """Whether a file is the companion `._name` that macOS writes on foreign disks; it holds no spectra."""
    if not path.name.startswith("._"):
        return False
    try:
        with open(path, "rb") as file:
            return file.read(4) in {b"\x00\x05\x16\x07", b"\x00\x05\x16\x00"}
    except OSError:
        return False
