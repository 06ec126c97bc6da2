"""What commands say on standard error and in a log: progress, notes, details, failures.

Design: results go to standard output; everything else is a record of the logger "moefast" or progress. The library logs
what it reads, chooses and decides as details (INFO) and what a user should know as notes (WARNING). A command shows
notes, with -v details as well, with -q neither; a log file (--log) gets all of it, with the time. Progress is one line
on a terminal, drawn anew at least twice a second, so that it never stands still; elsewhere a line now and then, often
at first and seldom later. The line has one time to go for all of a command: stages count by their expected shares.
Nothing has colours.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from types import TracebackType
from typing import Any

import click

from moefast.core.progress import Whole, unit_of

__all__ = [
    "LOGGER",
    "Progress",
    "detail",
    "fail",
    "start_talking",
    "tell_failures",
    "tell_result",
    "tell_written",
]

Shares = Mapping[str, float]

LOGGER = logging.getLogger("moefast")
"""Of the whole package."""
EVERY = 0.4
"""Seconds after which the line on a terminal is drawn again."""
PAUSES = ((30.0, 4.0), (300.0, 15.0), (math.inf, 60.0))
"""Elsewhere, until so many seconds after the start, seconds between two lines."""
PATIENCE = 2.0
"""Seconds without a report after which the line says how long the stage has taken."""
SURE = 0.02
"""Share of the work that must be done before the time to go is told."""


class _Screen:
    """Standard error: whole lines, and on a terminal one line that changes, at its end."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._shown = 0

    @property
    def changes(self) -> bool:
        """Whether a line can be drawn again."""
        return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def line(self, text: str) -> None:
        """A line that stays, above the one that changes."""
        with self._lock:
            self._clear()
            click.echo(text, err=True)

    def draw(self, text: str) -> None:
        """Draw the line that changes, cut to the width of the terminal."""
        with self._lock:
            text = text[: max(shutil.get_terminal_size().columns - 1, 20)]
            click.echo("\r" + text.ljust(self._shown), err=True, nl=False)
            self._shown = len(text)

    def keep(self) -> None:
        """Let the line that changes stay as it is."""
        with self._lock:
            if self._shown:
                click.echo("", err=True)
                self._shown = 0

    def _clear(self) -> None:
        if self._shown:
            click.echo("\r" + " " * self._shown + "\r", err=True, nl=False)
            self._shown = 0


_SCREEN = _Screen()


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
        _SCREEN.line(text)


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


class Progress:
    """How far a command is: one changing line on a terminal, a line now and then elsewhere.

    Parameters
    ----------
    quiet : bool
        Nothing is shown; stages are still logged.
    shares : mapping of str to float, or callable, optional
        Stages in their order with their expected shares of the time, if there are several; or what gives them for the
        total of the first stage that counts.
    """

    def __init__(self, quiet: bool = False, shares: Shares | Callable[[int], Shares] | None = None) -> None:
        self._quiet, self._changes = quiet, _SCREEN.changes
        self._lock = threading.RLock()
        self._begin = time.monotonic()
        self._whole: Whole | None = None
        self._stage, self._done, self._total = "", 0, 0
        self._stage_begin = self._first_time = self._reported = self._printed = self._begin
        self._first, self._said = 0, ""
        self._ended = threading.Event()
        self._ticker: threading.Thread | None = None
        self._shares = shares

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def stage(self, stage: str, done: int, total: int) -> None:
        """Report `done` of `total` rows, or steps, of a named stage; a total of 0 if nothing is counted."""
        now = time.monotonic()
        with self._lock:
            if stage != self._stage:
                self._end_stage(now)
                # The first report of a stage starts its clock: what came before it is not known here.
                self._stage, self._stage_begin, self._first_time, self._first = stage, now, now, done
                self._said = ""
            self._done, self._total, self._reported = done, total, now
            if self._whole is None and self._shares is not None and total:
                self._whole = Whole(self._shares(total) if callable(self._shares) else self._shares)
            if self._whole is not None:
                self._whole.report(stage, done, total)
            if self._quiet:
                return
            if self._ticker is None:
                self._ticker = threading.Thread(target=self._tick, daemon=True)
                self._ticker.start()
            self._show(now, ended=0 < total <= done)

    def expect(self, shares: Shares) -> None:
        """From now on stages come in this order, with these expected shares of the time."""
        with self._lock:
            self._whole = Whole(shares)

    def rows(self, stage: str) -> Callable[[int, int], None]:
        """A callback for work that has a single stage."""
        return lambda done, total: self.stage(stage, done, total)

    def doing(self, stage: str) -> None:
        """A stage in which nothing is counted begins."""
        self.stage(stage, 0, 0)

    def note(self, text: str) -> None:
        """Say what a user should know, now; with -q in the log alone."""
        LOGGER.warning(text)

    def close(self) -> None:
        """End the changing line."""
        with self._lock:
            self._end_stage(time.monotonic())
            self._stage = ""
        self._ended.set()
        if self._ticker is not None:
            self._ticker.join(timeout=1)
            self._ticker = None
        if self._changes and not self._quiet:
            _SCREEN.keep()

    def _tick(self) -> None:
        while not self._ended.wait(EVERY):
            with self._lock:
                if self._stage:
                    self._show(time.monotonic())

    def _end_stage(self, now: float) -> None:
        if self._stage:
            LOGGER.info("%s took %.2f s", self._stage, now - self._stage_begin)

    def _show(self, now: float, *, ended: bool = False) -> None:
        pauses = ((math.inf, EVERY / 2),) if self._changes else PAUSES
        pause = next(seconds for until, seconds in pauses if now - self._begin < until)
        if not ended and now - self._printed < pause:
            return
        text = self._words(now)
        if self._changes:
            _SCREEN.draw(text)
        elif text != self._said:
            _SCREEN.line(text)
        self._printed, self._said = now, text

    def _words(self, now: float) -> str:
        done, total, unit = self._done, self._total, unit_of(self._stage)
        text = self._stage
        if total:
            text += f": {done:,} of {total:,} {unit}"
            if self._whole is None:
                text += f" ({100 * done / total:.0f} %)"
        left = None
        elapsed = now - self._first_time
        if total and done > self._first and elapsed > 0:
            rate = (done - self._first) / (self._reported - self._first_time or elapsed)
            text += f", {rate:,.0f}/s" if unit == "spectra" else ""
            left = max((total - done) / rate - (now - self._reported), 0.0) if done < total else None
        if self._whole is not None:
            share = self._whole.share
            left = (now - self._begin) * (1 - share) / share if SURE < share < 1 else None
            text = (
                f"{100 * share:.0f} %"
                + (f", {_duration(left)} left" if left is not None else "")
                + f"; {text}"
            )
        elif left is not None:
            text += f", {_duration(left)} left"
        if now - self._reported > PATIENCE:
            text += f" ({_duration(now - self._stage_begin)})"
        return text


def _duration(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def detail(text: str) -> None:
    """Say what is read, chosen or decided, to those who asked for it with -v or --log."""
    LOGGER.info(text)


def fail(text: str) -> None:
    """Tell an error, always, and log it."""
    _SCREEN.keep()
    click.echo(text, err=True)
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
    for failure in failures:
        fail(f"moefast: error: {failure.error}")
    if failures:
        sys.exit(failures[0].error.exit_code)
