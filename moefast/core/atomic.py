"""Files that are complete or absent under their final name.

Design: everything is written to `.<name>.<writer>.partial` in the folder of the final file, so that the last step is
a rename inside one file system; folders of several files likewise. The writer is a machine, its boot, a process, the
time it began, and a number: numbers of processes are used again, and several machines share a file system. What a
killed process leaves behind is recognised by that and removed by the next writer of the same name; what a process on
another machine left is, once nobody has touched it for a week. An interrupt can come before anybody is there to clear
up, so names in use are remembered, and a command removes what is left of them at its end.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moefast.core.errors import OutputError

__all__ = [
    "LONGEST_NAME",
    "atomic_file",
    "owner_has_ended",
    "owner_token",
    "partial_folder",
    "partial_path",
    "publish",
    "publish_folder",
    "recover_folder",
    "refuse_impossible",
    "refuse_taken",
    "remove_quietly",
    "remove_unfinished",
    "synchronise_folder",
    "write_atomically",
    "write_json",
]

LONGEST_NAME, _ENDING = 255, 80
"""Bytes of a file name on most file systems, and those kept for the ending of a partial file."""
_ABANDONED = 7 * 86400.0
"""Seconds after which what another machine left untouched counts as abandoned."""
_WRITER = r"([0-9a-f]{8})-([0-9a-f]{8})-(\d+)-(\d+)-\d+"

_numbers = itertools.count()
_in_use: dict[Path, int] = {}
"""Names of unfinished files and folders, and the processes that write them."""


@functools.cache
def _machine() -> tuple[str, str]:
    """Tokens for the machine, with the numbering of processes that is seen here, and for its boot."""
    numbering = ""
    with contextlib.suppress(OSError):
        # Containers count processes for themselves.
        numbering = os.readlink("/proc/self/ns/pid")
    boot = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    return tuple(
        hashlib.sha256(text.encode()).hexdigest()[:8] for text in (socket.gethostname() + numbering, boot)
    )  # type: ignore[return-value]


def _began(pid: int) -> int | None:
    """When a process began, in ticks since the boot; 0 where that cannot be told, None if there is no such process."""
    if os.name == "nt":
        # os.kill(pid, 0) ends the process on Windows.
        return 0
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        # The name of the program, in parentheses, may hold anything.
        return int(status.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def owner_token() -> str:
    """What says that something belongs to this process, with a number that was not given before."""
    machine, boot = _machine()
    return f"{machine}-{boot}-{os.getpid()}-{_began(os.getpid()) or 0}-{next(_numbers)}"


def _has_ended(match: re.Match[str], path: Path) -> bool:
    """Whether the writer of an unfinished file or folder is gone."""
    if path in _in_use:
        return _in_use[path] != os.getpid()
    machine, boot = _machine()
    if match[1] != machine:
        return time.time() - path.lstat().st_mtime > _ABANDONED
    began = _began(int(match[3]))
    return match[2] != boot or began is None or (began != int(match[4]) and 0 not in (began, int(match[4])))


def owner_has_ended(token: str, path: Path) -> bool:
    """Whether the process that gave a token for a file or folder is gone; of none of ours, yes."""
    match = re.fullmatch(_WRITER, token)
    return match is None or _has_ended(match, path)


def remove_unfinished() -> None:
    """Remove all files and folders that this process has begun and neither finished nor removed."""
    for path, pid in list(_in_use.items()):
        if pid == os.getpid():
            _in_use.pop(path, None)
            _remove(path)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def refuse_impossible(path: Path) -> None:
    """Refuse a name that no file or folder can have.

    Raises
    ------
    OutputError
    """
    if "\0" in str(path):
        raise OutputError(f"{str(path)!r}: no name of a file holds a NUL byte; choose another one")
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise OutputError(f"{path}: the name is longer than {LONGEST_NAME} bytes; choose a shorter one")


def refuse_taken(path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Refuse a name that no file can be written under: known before hours of work, not after.

    Raises
    ------
    OutputError
        It exists and may not be replaced, is a folder, is no possible name, or its folder does not exist.
    """
    path = Path(path)
    refuse_impossible(path)
    try:
        if path.is_dir():
            raise OutputError(f"{path}: is a folder; give the name of a file")
        if not overwrite and os.path.lexists(path):
            raise _exists(path)
        if not path.parent.is_dir():
            raise OutputError(f"{path}: the folder {path.parent} does not exist; create it first")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error


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
        `.<name>.<writer>.partial` in the same folder.

    Raises
    ------
    OutputError
        If `path` exists and may not be replaced, is a folder, or its folder does not exist.
    """
    refuse_taken(path, overwrite=overwrite)
    try:
        name = _short(path.name)
        pattern = re.compile(re.escape(f".{name}.") + _WRITER + r"\.partial(\.wide)?")
        for other in path.parent.iterdir():
            match = pattern.fullmatch(other.name)
            if match:
                with contextlib.suppress(OSError):
                    if _has_ended(match, other):
                        other.unlink()
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error
    return _begun(path.parent / f".{name}.{owner_token()}.partial")


def _begun(partial: Path) -> Path:
    _in_use[partial] = os.getpid()
    return partial


def _short(name: str) -> str:
    """The name, or what stands for it where there is no room for an ending."""
    if len(os.fsencode(name)) <= LONGEST_NAME - _ENDING:
        return name
    return hashlib.sha256(os.fsencode(name)).hexdigest()


def _exists(path: Path) -> OutputError:
    return OutputError(f"{path}: exists already; choose another name, or replace it with --overwrite")


def publish(partial: Path, path: Path, *, overwrite: bool, durable: bool = True) -> None:
    """Make a finished `partial` durable and give it its final name.

    Parameters
    ----------
    partial : Path
        The finished file.
    path : Path
        Final name, in the same folder.
    overwrite : bool
        Whether a file that has come to be under that name meanwhile may be replaced.
    durable : bool
        Whether it must survive a power failure: not if who reads it later would notice, and it can be made again.

    Raises
    ------
    OutputError
        If the file cannot be synchronised or renamed, or its name is taken.
    """
    try:
        if durable:
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
    _in_use.pop(partial, None)
    if durable:
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
        taken = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.close(taken)
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
def atomic_file(
    path: str | os.PathLike[str], *, overwrite: bool = True, durable: bool = True
) -> Iterator[Path]:
    """The name to write a file under; it gets its final name when the block ends, and is removed if the block fails.

    Parameters
    ----------
    path : path
        Final name.
    overwrite : bool
        Whether an existing final file may be replaced.
    durable : bool
        See `publish`.

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
        publish(partial, target, overwrite=overwrite, durable=durable)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        remove_quietly(partial)


def write_atomically(path: str | os.PathLike[str], content: bytes, *, overwrite: bool = True) -> None:
    """Write a whole file; one that exists, or has come to be meanwhile, is replaced if it may be.

    Raises
    ------
    OutputError
        The folder does not exist, is read-only or full; no partial file is left behind.
    """
    with atomic_file(path, overwrite=overwrite) as partial:
        partial.write_bytes(content)


def write_json(document: Mapping[str, Any], path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
    """Write a document as UTF-8 JSON; the final name is absent or complete.

    Raises
    ------
    OutputError
        The file could not be written.
    """
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, (text + "\n").encode(), overwrite=overwrite)


def partial_folder(target: Path) -> Path:
    """An empty folder to fill before it becomes `target`; what ended processes left beside it is cleared first.

    Raises
    ------
    OutputError
        It cannot be made.
    """
    recover_folder(target)
    partial = _begun(target.with_name(f".{_short(target.name)}.{owner_token()}.partial"))
    try:
        partial.mkdir()
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error}") from error
    return partial


def recover_folder(target: Path) -> None:
    """Clear what ended processes left of a folder; one put aside for a successor that never came is put back."""
    pattern = re.compile(re.escape(f".{_short(target.name)}.") + _WRITER + r"\.(partial|old)")
    with contextlib.suppress(OSError):
        for other in sorted(target.absolute().parent.iterdir()):
            match = pattern.fullmatch(other.name)
            if not match or not other.is_dir() or not _has_ended(match, other):
                continue
            if match[5] == "old" and not os.path.lexists(target):
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
    old = target.with_name(f".{_short(target.name)}.{owner_token()}.old")
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
    _in_use.pop(partial, None)


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
    """Remove a file or folder that is not needed, if it is there and can be removed."""
    _in_use.pop(path, None)
    _remove(path)
