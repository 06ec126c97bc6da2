"""Progress of long work: the callbacks that are told of it, what stages count, and a line that shows it.

Design: Python functions take a callback, or show a line of their own where somebody looks on: in a notebook, where one
output is updated in place, and in an interactive interpreter on a terminal. Scripts see nothing that they did not ask
for; commands bring a `ProgressLine`. On a terminal it is drawn anew at least twice a second, so that it never stands
still; elsewhere a line comes now and then, often at first and seldom later. It has one time to go for all stages of a
command, which count by their expected shares. Nothing has colours.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal

from moefast.core.text import counted

__all__ = [
    "FILES", "LOGGER", "SAMPLED", "SCREEN", "STEP_STAGES", "ProgressLine", "RowProgress", "StageProgress", "Whole",
    "row_progress", "stage_progress", "unit_of",
]  # fmt: skip

LOGGER = logging.getLogger("moefast")
"""Of the whole package: what is read, chosen and decided (INFO), and what a user should know (WARNING)."""

Shares = Mapping[str, float]
"""Stages in their order, with what each is expected to take in any unit of time."""

RowProgress = Callable[[int, int], None]
"""Called with rows (or steps) done and those in all."""

StageProgress = Callable[[str, int, int], None]
"""Called with the name of a stage, rows (or steps) done and those in all."""

STEP_STAGES = frozenset(
    {
        "components",
        "clouds",
        "correction",
        "experts",
        "gate",
        "tower",
        "error model",
        "simpler fits",
        "library",
        "families",
        "residuals",
        "network",
    }
)
"""Stages of a fit that go through steps, not through spectra."""

OTHER_STEPS = frozenset({"intervals", "pictures"})
"""The same of other commands."""

SAMPLED = ", sampled"
"""Ending of the stages of a fit that is repeated with drawn noise."""


FILES = "files"
"""Stage of a run that goes through files."""
_ONE = {FILES: "file", "steps": "step", "spectra": "spectrum"}


def unit_of(stage: str) -> str:
    """What a stage counts: "files", "steps" or "spectra"."""
    if stage == FILES:
        return FILES
    return "steps" if stage.removesuffix(SAMPLED) in STEP_STAGES | OTHER_STEPS else "spectra"


EVERY = 0.4
"""Seconds after which the line on a terminal is drawn again."""
PAUSES = ((30.0, 4.0), (300.0, 15.0), (math.inf, 60.0))
"""Elsewhere, until so many seconds after the start, seconds between two lines."""
PATIENCE = 2.0
"""Seconds without a report after which the line says how long the stage has taken."""
SURE = 0.02
"""Share of the work that must be done before the time to go is told."""


class Whole:
    """How much is done of work that has several stages: a share that never falls.

    Parameters
    ----------
    shares : mapping of str to float
        Stages in their order, with what each is expected to take in any unit of time. Stages that are reported and not
        expected count nothing; one that never comes is done as soon as a later one begins.
    """

    def __init__(self, shares: Mapping[str, float]) -> None:
        total = sum(shares.values())
        self._first: dict[str, float] = {}
        self._size: dict[str, float] = {}
        first = 0.0
        for stage, share in shares.items():
            self._first[stage], self._size[stage] = first / total, share / total
            first += share
        self.share = 0.0

    def report(self, stage: str, done: int, total: int) -> None:
        """A stage has done so much; a total of 0 if it counts nothing."""
        if stage in self._first:
            within = min(done / total, 1.0) if total else 0.0
            self.share = max(self.share, self._first[stage] + within * self._size[stage])


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
            self._write(text + "\n")

    def draw(self, text: str) -> None:
        """Draw the line that changes, cut to the width of the terminal."""
        with self._lock:
            text = text[: max(shutil.get_terminal_size().columns - 1, 20)]
            self._write("\r" + text.ljust(self._shown))
            self._shown = len(text)

    def keep(self) -> None:
        """Let the line that changes stay as it is."""
        with self._lock:
            if self._shown:
                self._write("\n")
                self._shown = 0

    def _clear(self) -> None:
        if self._shown:
            self._write("\r" + " " * self._shown + "\r")
            self._shown = 0

    @staticmethod
    def _write(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


SCREEN = _Screen()


class ProgressLine:
    """How far work is: one changing line in a notebook or on a terminal, a line now and then elsewhere.

    Parameters
    ----------
    quiet : bool
        Nothing is shown; stages are still logged.
    shares : mapping of str to float, or callable, optional
        Stages in their order with their expected shares of the time, if there are several; or what gives them for the
        total of the first stage that counts.
    """

    def __init__(self, quiet: bool = False, shares: Shares | Callable[[int], Shares] | None = None) -> None:
        self._quiet, self._changes = quiet, SCREEN.changes
        self._display = _notebook_display()
        self._lock = threading.RLock()
        self._begin = time.monotonic()
        self._whole: Whole | None = None
        self._stage, self._done, self._total = "", 0, 0
        self._stage_begin = self._first_time = self._reported = self._printed = self._begin
        self._first, self._said = 0, ""
        self._ended = threading.Event()
        self._ticker: threading.Thread | None = None
        self._shares = shares

    def __enter__(self) -> ProgressLine:
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
                self._begin_line()
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
            # The output of a notebook's cell is that of the thread that runs it.
            if self._ticker is None and self._display is None:
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

    def tell(self, words: str) -> None:
        """A note on the work itself, in words that were not written for the screen."""
        self.note(f"note: {words}")

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
            SCREEN.keep()

    def _tick(self) -> None:
        while not self._ended.wait(EVERY):
            with self._lock:
                if self._stage:
                    self._show(time.monotonic())

    def _begin_line(self) -> None:
        """A line of its own for a stage, where there is none for the whole."""
        if self._whole is None and self._total:
            if self._display is not None:
                self._display = _notebook_display()
            elif self._changes and not self._quiet:
                SCREEN.keep()
        if self._changes or self._display is not None:
            # It is seen at once.
            self._printed = -math.inf

    def _end_stage(self, now: float) -> None:
        if self._stage:
            LOGGER.info("%s took %.2f s", self._stage, now - self._stage_begin)

    def _show(self, now: float, *, ended: bool = False) -> None:
        pauses = ((math.inf, EVERY / 2),) if self._changes or self._display else PAUSES
        pause = next(seconds for until, seconds in pauses if now - self._begin < until)
        if not ended and now - self._printed < pause:
            return
        text = self._words(now)
        if self._display is not None:
            self._display(text)
        elif self._changes:
            SCREEN.draw(text)
        elif text != self._said:
            SCREEN.line(text)
        self._printed, self._said = now, text

    def _words(self, now: float) -> str:
        done, total, unit = self._done, self._total, unit_of(self._stage)
        text = self._stage
        if total:
            text += f": {done:,} of {counted(total, _ONE[unit], unit)}"
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
            text += f" ({_elapsed(now - self._stage_begin)})"
        return text


def _duration(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def _elapsed(seconds: float) -> str:
    """Time since something began, to the second: a text that stands still for a minute would look like silence."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{seconds:.0f} s" if seconds < 99.5 else f"{minutes} min {rest} s"


def _notebook_display() -> Callable[..., None] | None:
    """What shows a line in the notebook that this is run in, and changes it from then on; None elsewhere."""
    # Whoever is in a notebook has imported IPython already; nobody else need have it.
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if getattr(shell, "kernel", None) is None:
        return None
    handles: list[Any] = []

    def show(text: str) -> None:
        from IPython.display import display

        line = {"text/plain": text}
        if not handles:
            handles.append(display(line, raw=True, display_id=True))
        else:
            handles[-1].update(line, raw=True)

    return show


def _somebody_looks_on() -> bool:
    """Whether this is a notebook, or an interactive interpreter on a terminal."""
    return _notebook_display() is not None or (hasattr(sys, "ps1") and sys.stderr.isatty())


@contextmanager
def stage_progress(
    progress: StageProgress | Literal[False] | None, shares: Shares | Callable[[int], Shares] | None = None
) -> Iterator[StageProgress]:
    """The callback that is given; if none is, a line where somebody looks on; with False nothing.

    `shares` are those of `ProgressLine`.
    """
    if progress is None and _somebody_looks_on():
        with ProgressLine(shares=shares) as line:
            yield line.stage
    else:
        yield progress or (lambda stage, done, total: None)


@contextmanager
def row_progress(progress: RowProgress | Literal[False] | None, stage: str) -> Iterator[RowProgress]:
    """As `stage_progress`, for work of one stage."""
    if progress:
        yield progress
    else:
        with stage_progress(progress) as report:
            yield lambda done, total: report(stage, done, total)
