"""A file for libraries that lose errors: every failed write is remembered, and told when it is asked for.

Design: HDF5 writes when an object is freed or a cache overflows, and an error there is printed and forgotten, or ends
the process. So HDF5 is given this file instead of a name. A write that fails is remembered and reported to the library
as done, as are all that follow: the library stays in a state that it can close, and `check` raises what happened
before anybody takes the file for complete. An interrupt, too, must wait until the library has returned: raised in a
function that it calls, it would be taken for a failure of the file, and the process might end.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["WatchedFile", "interrupt_behind", "uninterrupted"]


def interrupt_behind(error: BaseException | None) -> BaseException | None:
    """The interrupt that a library took for an error of its own; None if there is none.

    Raised inside a function in C that has returned a result already, it comes out as the cause of a SystemError.
    """
    while error is not None and isinstance(error, Exception):
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off SIGINT and SIGTERM until the block has ended."""
    if threading.current_thread() is not threading.main_thread():
        # Python tells no other thread of signals.
        yield
        return
    handlers: dict[int, Any] = {}
    waiting: list[int] = []
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(handler := signal.getsignal(number)):
                handlers[number] = handler
                signal.signal(number, lambda number, _: waiting.append(number))
        yield
    finally:
        for caught, handler in handlers.items():
            signal.signal(caught, handler)
        for caught in waiting:
            signal.raise_signal(caught)


class WatchedFile:
    """A new file, open for writing and reading, that remembers its first failure.

    Parameters
    ----------
    path : Path
        Created; must not exist.

    Attributes
    ----------
    path : Path
        Its name.
    problem : BaseException or None
        What went wrong first. An interrupt inside a call of the library is kept here, too: libraries swallow it.

    Raises
    ------
    OSError
        The file cannot be created.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem: BaseException | None = None
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        self._handle: int | None = os.open(path, flags, 0o666)
        self._position = 0

    def __repr__(self) -> str:
        return f"WatchedFile({str(self.path)!r})"

    def check(self) -> None:
        """Raise what went wrong first, if anything did.

        Raises
        ------
        OSError
            As the operating system said it.
        """
        if self.problem is not None:
            raise self.problem

    def synchronise(self) -> None:
        """Flush the file to the disk.

        Raises
        ------
        OSError
            This or an earlier write failed.
        """
        self.check()
        if self._handle is not None:
            os.fsync(self._handle)

    def close(self) -> None:
        """Close the file; what this says is remembered as well."""
        handle, self._handle = self._handle, None
        if handle is not None:
            try:
                os.close(handle)
            except OSError as error:
                self.problem = self.problem or error

    def complete(self) -> None:
        """Flush the file to the disk and close it.

        Raises
        ------
        OSError
            What went wrong first.
        """
        self.synchronise()
        self.close()
        self.check()

    @contextmanager
    def given_up(self) -> Iterator[None]:
        """Close the file after the library has closed what it holds: what it still writes has nowhere to go."""
        # With a problem nothing is written any more, and closing cannot fail.
        self.problem = self.problem or OSError(f"{self.path}: given up")
        try:
            yield
        finally:
            self.close()

    @property
    def closed(self) -> bool:
        """Whether it is closed."""
        return self._handle is None

    # -- what a library calls ------------------------------------------------------------------------------

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a byte."""
        if whence == os.SEEK_SET:
            self._position = offset
        elif whence == os.SEEK_CUR:
            self._position += offset
        else:
            self._position = self._size() + offset
        return self._position

    def tell(self) -> int:
        """Where the next byte is read or written."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; beyond the end of the file with zeros, as HDF5 expects of space that it has reserved."""
        view = memoryview(buffer).cast("B")
        done = 0
        try:
            if self._handle is not None:
                os.lseek(self._handle, self._position, os.SEEK_SET)
                while piece := os.read(self._handle, len(view) - done):
                    view[done : done + len(piece)] = piece
                    done += len(piece)
        except BaseException as error:
            self.problem = self.problem or error
        view[done:] = bytes(len(view) - done)
        self._position += len(view)
        return len(view)

    def read(self, size: int = -1) -> bytes:
        """Bytes from here on."""
        data = bytearray(max(0, self._size() - self._position) if size < 0 else size)
        self.readinto(data)
        return bytes(data)

    def write(self, data: Any) -> int:
        """Write all bytes, or remember why they could not be written."""
        view = memoryview(data).cast("B")
        done = 0
        try:
            if self.problem is None and self._handle is not None:
                os.lseek(self._handle, self._position, os.SEEK_SET)
                while done < len(view):
                    done += os.write(self._handle, view[done:])
        except BaseException as error:
            self.problem = error
        self._position += len(view)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Cut or extend the file."""
        size = self._position if size is None else size
        try:
            if self.problem is None and self._handle is not None:
                os.ftruncate(self._handle, size)
        except BaseException as error:
            self.problem = error
        return size

    def flush(self) -> None:
        """Nothing is held back here."""

    def _size(self) -> int:
        return os.fstat(self._handle).st_size if self._handle is not None else 0
