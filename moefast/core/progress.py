"""Progress of long work: the callbacks that are told of it, what the stages of a fit count, and a line that shows it.

Design: Python functions take a callback, or show a line of their own where somebody looks on: in a notebook, where one
output is updated in place, and in an interactive interpreter on a terminal. Scripts and commands see nothing that they
did not ask for; commands bring a `ProgressLine`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

__all__ = [
    "FILES", "SAMPLED", "STEP_STAGES", "ProgressLine", "RowProgress", "StageProgress", "row_progress", "stage_progress",
    "unit_of",
]  # fmt: skip

RowProgress = Callable[[int, int], None]
"""Called with rows (or steps) done and those in all."""

StageProgress = Callable[[str, int, int], None]
"""Called with the name of a stage, rows (or steps) done and those in all."""

STEP_STAGES = frozenset(
    {"experts", "gate", "tower", "error model", "simpler fits", "library", "families", "residuals", "network"}
)
"""Stages of a fit that go through steps, not through spectra."""

SAMPLED = ", sampled"
"""Ending of the stages of a fit that is repeated with drawn noise."""


FILES = "files"
"""Stage of a run that goes through files."""


def unit_of(stage: str) -> str:
    """What a stage counts: "files", "steps" or "spectra"."""
    if stage == FILES:
        return FILES
    return "steps" if stage.removesuffix(SAMPLED) in STEP_STAGES else "spectra"


class ProgressLine:
    """Rows done with rate and time to go: one changing line in a notebook or on a terminal, else a line now and then.

    Parameters
    ----------
    quiet : bool
        Show no progress at all.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet, self._display = quiet, _notebook_display()
        self._live = sys.stderr.isatty() or self._display is not None
        self._stage, self._begin, self._first, self._last, self._shown = "", 0.0, 0, 0.0, 0

    def stage(self, stage: str, done: int, total: int) -> None:
        """Report `done` of `total` rows, or steps, of a named stage."""
        if self._quiet:
            return
        now = time.monotonic()
        if stage != self._stage:
            self.close()
            # The first report of a stage starts its clock: what came before it is not known here.
            self._stage, self._begin, self._first, self._last = stage, now, done, 0.0
        every = 0.2 if self._live else 10.0
        if now - self._last < every and done < total:
            return
        self._last = now
        unit = unit_of(stage)
        text = f"{stage}: {done:,} of {total:,} {unit} ({100 * done / max(total, 1):.0f} %)"
        if done > self._first and now > self._begin:
            rate = (done - self._first) / (now - self._begin)
            text += f", {rate:,.0f}/s" if unit == "spectra" else ""
            text += f", {(total - done) / rate:.0f} s left" if done < total else ""
        self._show(text)

    def rows(self, stage: str) -> RowProgress:
        """A callback for work that has a single stage."""
        return lambda done, total: self.stage(stage, done, total)

    def note(self, text: str) -> None:
        """Say something between two reports; if quiet, too, for it is no progress."""
        self.close()
        self._write(text + "\n")

    def close(self) -> None:
        """End the changing line."""
        if self._live and self._shown and self._display is None:
            self._write("\n")
        self._shown = 0

    def _show(self, text: str) -> None:
        if self._display is not None:
            self._display(text, new=not self._shown)
        elif self._live:
            self._write("\r" + text.ljust(self._shown))
        else:
            self._write(text + "\n")
        self._shown = len(text)

    @staticmethod
    def _write(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


def _notebook_display() -> Callable[..., None] | None:
    """What shows a line in the notebook that this is run in, and changes it if it is not `new`; None elsewhere."""
    # Whoever is in a notebook has imported IPython already; nobody else need have it.
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if getattr(shell, "kernel", None) is None:
        return None
    handles: list[Any] = []

    def show(text: str, *, new: bool) -> None:
        from IPython.display import display

        line = {"text/plain": text}
        if new:
            handles.append(display(line, raw=True, display_id=True))
        else:
            handles[-1].update(line, raw=True)

    return show


def _somebody_looks_on() -> bool:
    """Whether this is a notebook, or an interactive interpreter on a terminal."""
    return _notebook_display() is not None or (hasattr(sys, "ps1") and sys.stderr.isatty())


@contextmanager
def stage_progress(progress: StageProgress | Literal[False] | None) -> Iterator[StageProgress]:
    """The callback that is given; if none is, a line where somebody looks on; with False nothing."""
    if progress is None and _somebody_looks_on():
        line = ProgressLine()
        try:
            yield line.stage
        finally:
            line.close()
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
