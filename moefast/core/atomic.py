"""Files that are complete or absent under their final name.

Design: everything is written to `.<name>.<pid>.partial` in the folder of the final file, so that the last
step is a rename inside one file system; folders of several files likewise. What a killed process leaves behind is
recognised by its dead pid and removed by the next writer of the same name.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moefast.core.errors import OutputError

__all__ = [
    "atomic_file",
    "partial_folder",
    "partial_path",
    "publish",
    "publish_folder",
    "recover_folder",
    "remove_quietly",
    "synchronise_folder",
    "write_atomically",
    "write_json",
]

_LONGEST_NAME, _ENDING = 255, 32
"""Bytes of a file name on most file systems, and those kept for the ending of a partial file."""


def _alive(pid: int) -> bool:
    if os.name == "nt":
        # os.kill(pid, 0) ends the process on Windows.
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def partial_path(path: Path, *, overwrite: bool) -> Path:
    """Name to write to before `path` is complete; stale ones of ended processes are removed.

    Parameters
    ----------
    path : Path
        Final name.
    overwrite : bool
        Whether an existing final file may be replaced.

    Returns
    -------
    Path
        `.<name>.<pid>.partial` in the same folder.

    Raises
    ------
    OutputError
        If `path` exists and may not be replaced, is a folder, or its folder does not exist.
    """
    if "\0" in str(path):
        raise OutputError(f"{str(path)!r}: no name of a file holds a NUL byte; choose another one")
    try:
        if path.is_dir():
            raise OutputError(f"{path}: is a folder; give the name of a file")
        if not overwrite and os.path.lexists(path):
            raise _exists(path)
        if not path.parent.is_dir():
            raise OutputError(f"{path}: the folder {path.parent} does not exist; create it first")
        if len(os.fsencode(path.name)) > _LONGEST_NAME:
            raise OutputError(f"{path}: the name is longer than {_LONGEST_NAME} bytes; choose a shorter one")
        name = _short(path.name)
        pattern = re.compile(re.escape(f".{name}.") + r"(\d+)\.partial(\.wide)?")
        for other in path.parent.iterdir():
            match = pattern.fullmatch(other.name)
            if match and (int(match[1]) == os.getpid() or not _alive(int(match[1]))):
                with contextlib.suppress(OSError):
                    other.unlink()
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error
    return path.parent / f".{name}.{os.getpid()}.partial"


def _short(name: str) -> str:
    """The name, or what stands for it where there is no room for an ending."""
    if len(os.fsencode(name)) <= _LONGEST_NAME - _ENDING:
        return name
    return hashlib.sha256(os.fsencode(name)).hexdigest()


def _exists(path: Path) -> OutputError:
    return OutputError(f"{path}: exists already; choose another name, or replace it with --overwrite")


def publish(partial: Path, path: Path, *, overwrite: bool) -> None:
    """Make a finished `partial` durable and give it its final name.

    Parameters
    ----------
    partial : Path
        The finished file.
    path : Path
        Final name, in the same folder.
    overwrite : bool
        Whether a file that has come to be under that name meanwhile may be replaced.

    Raises
    ------
    OutputError
        If the file cannot be synchronised or renamed, or its name is taken.
    """
    try:
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        if overwrite:
            os.replace(partial, path)
        else:
            _rename_exclusively(partial, path)
    except FileExistsError as error:
        raise OutputError(
            f"{path}: was written by somebody else during this run and is left as it is; choose another name, or "
            "replace it with --overwrite"
        ) from error
    except OSError as error:
        raise OutputError(f"{path}: could not be completed: {error}") from error
    synchronise_folder(path.parent)


def _rename_exclusively(partial: Path, path: Path) -> None:
    """Rename unless the name is taken.

    Raises
    ------
    FileExistsError
        The name is taken.
    """
    if os.name == "nt":
        # There, renaming refuses by itself.
        os.rename(partial, path)
        return
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:
        # File systems without hard links (FAT, some network shares): take the name first, then replace what took it.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        try:
            os.replace(partial, path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    else:
        with contextlib.suppress(OSError):
            partial.unlink()


def synchronise_folder(folder: Path) -> None:
    """Flush new names in a folder to the disk, where the file system can.

    Network shares refuse it (CIFS: EINVAL). The files are complete and synchronised by then, so nothing is lost but the
    certainty that their names survive a power failure.
    """
    if os.name == "nt":
        return
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[Path]:
    """The name to write a file under; it gets its final name when the block ends, and is removed if the block fails.

    Parameters
    ----------
    path : path
        Final name.
    overwrite : bool
        Whether an existing final file may be replaced.

    Yields
    ------
    Path
        See `partial_path`.

    Raises
    ------
    OutputError
        The file exists and may not be replaced; the folder does not exist, is read-only or full.
    """
    target = Path(path)
    partial = partial_path(target, overwrite=overwrite)
    try:
        yield partial
        publish(partial, target, overwrite=overwrite)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        remove_quietly(partial)


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a whole file; one that exists is replaced.

    Raises
    ------
    OutputError
        The folder does not exist, is read-only or full; no partial file is left behind.
    """
    with atomic_file(path) as partial:
        partial.write_bytes(content)


def write_json(document: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a document as UTF-8 JSON; the final name is absent or complete.

    Raises
    ------
    OutputError
        The file could not be written.
    """
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def partial_folder(target: Path) -> Path:
    """An empty folder to fill before it becomes `target`; what ended processes left beside it is cleared first.

    Raises
    ------
    OutputError
        It cannot be made.
    """
    recover_folder(target)
    partial = target.with_name(f".{_short(target.name)}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error}") from error
    return partial


def recover_folder(target: Path) -> None:
    """Clear what ended processes left of a folder; one put aside for a successor that never came is put back."""
    pattern = re.compile(re.escape(f".{_short(target.name)}.") + r"(\d+)\.(partial|old)")
    with contextlib.suppress(OSError):
        for other in sorted(target.absolute().parent.iterdir()):
            match = pattern.fullmatch(other.name)
            if not match or (int(match[1]) != os.getpid() and _alive(int(match[1]))) or not other.is_dir():
                continue
            if match[2] == "old" and not os.path.lexists(target):
                other.rename(target)
            else:
                shutil.rmtree(other, ignore_errors=True)


def publish_folder(partial: Path, target: Path, *, overwrite: bool) -> None:
    """Give a finished folder its final name; one of that name is replaced, in one step where the system can.

    Raises
    ------
    OutputError
        A folder of that name has come to be and may not be replaced.
    OSError
        The folder cannot be synchronised or renamed; `target` is as it was.
    """
    for folder, _, names in os.walk(partial):
        for name in names:
            with open(os.path.join(folder, name), "rb+") as file:
                os.fsync(file.fileno())
        synchronise_folder(Path(folder))
    old = target.with_name(f".{_short(target.name)}.{os.getpid()}.old")
    if not target.exists():
        partial.rename(target)
    elif not overwrite:
        raise OutputError(f"{target}: was written by somebody else during this run and is left as it is")
    elif not _exchange(partial, target):
        target.rename(old)
        try:
            partial.rename(target)
        except BaseException:
            old.rename(target)
            raise
    synchronise_folder(target.absolute().parent)
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    here, exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0)


def remove_quietly(path: Path) -> None:
    """Remove a file that is not needed, if it is there and can be removed."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
