"""What commands say on standard error and in a log: notes, details, failures.

Design: results go to standard output; everything else is progress (`moefast.core.progress`) or a record of the logger
"moefast". The library logs what it reads, chooses and decides as details (INFO) and what a user should know as notes
(WARNING). A command shows notes, with -v details as well, with -q neither; a log file (--log) gets all of it, with the
time.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from datetime import datetime
from typing import Any

import click

from moefast.core.progress import LOGGER, SCREEN

__all__ = [
    "detail",
    "fail",
    "start_talking",
    "tell_failures",
    "tell_result",
    "tell_written",
]

MOST = 50
"""Lines at most: of a file that is wrong throughout, every row is a failure."""


class _OnScreen(logging.Handler):
    """Notes as they are, details with the seconds since the start; errors are told where the command ends."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._begin = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record."""
        if record.levelno >= logging.ERROR:
            return
        text = record.getMessage()
        if record.levelno < logging.WARNING:
            text = f"[{time.monotonic() - self._begin:7.2f} s] {text}"
        SCREEN.line(text)


class _InFile(logging.Handler):
    """A line with the time for each record, at once on the disk."""

    def __init__(self, path: str) -> None:
        super().__init__(logging.INFO)
        self._stream = open(path, "a", encoding="utf-8", errors="replace")  # noqa: SIM115

    def emit(self, record: logging.LogRecord) -> None:
        """Append a record."""
        now = datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="seconds")
        words = " ".join(record.getMessage().split())
        with self.lock or threading.RLock():
            self._stream.write(f"{now} {words}\n")
            self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
        super().close()


def start_talking(context: click.Context, *, quiet: bool, verbose: bool, log: str | None) -> None:
    """Show and keep what the package logs until the command line has ended.

    Raises
    ------
    OSError
        The log cannot be opened.
    """
    # Also with -q: without any handler, Python prints warnings itself.
    handlers: list[logging.Handler] = [
        _OnScreen(logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING)
    ]
    if log is not None:
        handlers.append(_InFile(log))
    before = LOGGER.level
    LOGGER.setLevel(min(handler.level for handler in handlers))
    for handler in handlers:
        LOGGER.addHandler(handler)

    def stop() -> None:
        LOGGER.setLevel(before)
        for handler in handlers:
            LOGGER.removeHandler(handler)
            handler.close()

    context.find_root().call_on_close(stop)


def detail(text: str) -> None:
    """Say what is read, chosen or decided, to those who asked for it with -v or --log."""
    LOGGER.info(text)


def fail(text: str) -> None:
    """Tell an error, always, and log it."""
    SCREEN.keep()
    click.echo(text, err=True)
    # Before a command begins to talk and after it has ended, Python would print what is logged once more.
    if LOGGER.hasHandlers():
        LOGGER.error(text.strip())


def tell_result(text: str, *, quiet: bool) -> None:
    """Say on standard output what was written; with -q only the log says it."""
    if not quiet:
        click.echo(text)
    LOGGER.info(text)


def tell_written(*paths: Any, reason: str = "") -> None:
    """Name the files that were written beside the result; with -q only the log does."""
    LOGGER.warning(f"written: {', '.join(map(str, paths))}" + (f". {reason}" if reason else ""))


def tell_failures(failures: Any) -> None:
    """Name what could not be read and leave with the exit code of the first failure."""
    for failure in failures[:MOST]:
        fail(f"moefast: error: {failure.error}")
    if len(failures) > MOST:
        fail(
            f"moefast: error: {len(failures) - MOST:,} more; --json and the table's attribute failures name all"
        )
    if failures:
        sys.exit(failures[0].error.exit_code)
