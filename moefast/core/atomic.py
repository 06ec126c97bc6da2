"""Files that are complete or absent under their final name.

Design: everything is written to `.<name>.<pid>.partial` in the folder of the final file, so that the last
step is a rename inside one file system. What a killed process leaves behind is recognised by its dead pid and
removed by the next writer of the same name.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moefast.core.errors import OutputError

__all__ = ["atomic_file", "partial_path", "publish", "write_atomically", "write_json"]


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
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; give the name of a file")
    if path.exists() and not overwrite:
        raise OutputError(f"{path}: exists already; choose another name, or replace it with --overwrite")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist; create it first")
    pattern = re.compile(re.escape(f".{path.name}.") + r"(\d+)\.partial(\.wide)?")
    for other in path.parent.iterdir():
        match = pattern.fullmatch(other.name)
        if match and (int(match[1]) == os.getpid() or not _alive(int(match[1]))):
            with contextlib.suppress(OSError):
                other.unlink()
    return path.parent / f".{path.name}.{os.getpid()}.partial"


def publish(partial: Path, path: Path) -> None:
    """Make a finished `partial` durable and give it its final name.

    Raises
    ------
    OutputError
        If the file cannot be synchronised or renamed.
    """
    try:
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        if os.name != "nt":
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise OutputError(f"{path}: could not be completed: {error}") from error


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
        publish(partial, target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


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
