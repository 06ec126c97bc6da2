"""A disk that fails: one call of the file layer, all from one on, or everything beyond a size.

Design: what Python writes goes through functions of `os` and through `open`; both are replaced in the forked process of
a case. Libraries in C (Arrow) write past them: for those a limit on the size of files is a disk that
is full at that byte.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import stat
from collections.abc import Callable
from typing import Any

__all__ = ["CALLS", "ERRORS", "Failing", "full"]

CALLS = ("write", "fsync", "replace", "rename", "link", "close", "ftruncate", "mkdir")
ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class Failing:
    """Makes one call fail, or all from it on, in the process that calls it.

    Parameters
    ----------
    position : int
        Which call, from 1; 0 for none.
    number : int
        Error number.
    lasting : bool
        Whether all later calls fail as well.
    short : bool
        Whether a write that fails takes half of its bytes first.

    Attributes
    ----------
    made : int
        Calls so far.
    """

    def __init__(
        self, position: int, number: int = errno.EIO, *, lasting: bool = False, short: bool = False
    ) -> None:
        self.position, self.number, self.lasting, self.short = position, number, lasting, short
        self.made = 0

    def fails(self) -> bool:
        """Count a call; whether it fails."""
        self.made += 1
        return self.position > 0 and (
            self.made == self.position or (self.lasting and self.made > self.position)
        )

    def __call__(self) -> None:
        """Replace the file layer of this process."""
        _replace_layer(self.fails, self.number, self.short)


def _replace_layer(fails: Callable[[], bool], number: int, short: bool) -> None:
    def problem() -> OSError:
        return OSError(number, os.strerror(number))

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            # Closing a folder writes nothing that could be lost.
            of_folder = name == "close" and stat.S_ISDIR(os.fstat(arguments[0]).st_mode)
            if of_folder or not fails():
                return real(*arguments, **named)
            if name == "close":
                real(*arguments)
            elif name == "write" and short:
                half = memoryview(arguments[1])
                real(arguments[0], half[: len(half) // 2])
            raise problem()

        return call

    real_write = os.write
    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))

    class Raw(io.FileIO):
        """A file whose writes may fail."""

        def write(self, data: Any) -> int:
            if fails():
                if short:
                    view = memoryview(data).cast("B")
                    real_write(self.fileno(), view[: len(view) // 2])
                raise problem()
            return super().write(data)

    real_open = builtins.open

    def opened(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **named: Any) -> Any:
        if not set(mode) & set("wax+") or isinstance(file, int):
            return real_open(file, mode, buffering, *args, **named)
        raw = Raw(file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        binary = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return binary
        encoding, errors, newline = (*args, None, None, None)[:3]
        return io.TextIOWrapper(
            binary,
            named.get("encoding", encoding),
            named.get("errors", errors),
            named.get("newline", newline),
        )

    builtins.open = io.open = opened


def full(size: int) -> Callable[[], None]:
    """What makes every file end at a byte, in the process that calls it."""

    def arrange() -> None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return arrange
