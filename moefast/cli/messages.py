"""What commands say on standard error: progress, notes, failures."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import click

from moefast.core.progress import unit_of

__all__ = ["Progress", "tell_failures"]


class Progress:
    """Rows done with rate and time to go: one changing line on a terminal, a line now and then elsewhere."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet, self._live = quiet, sys.stderr.isatty()
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
        if self._live:
            click.echo("\r" + text.ljust(self._shown), err=True, nl=False)
            self._shown = len(text)
        else:
            click.echo(text, err=True)

    def rows(self, stage: str) -> Callable[[int, int], None]:
        """A callback for work that has a single stage."""
        return lambda done, total: self.stage(stage, done, total)

    def note(self, text: str) -> None:
        """Say something between two reports; with --quiet, too, for it is no progress."""
        self.close()
        click.echo(text, err=True)

    def close(self) -> None:
        """End the changing line."""
        if self._live and self._shown:
            click.echo("", err=True)
            self._shown = 0


def tell_failures(failures: Any) -> None:
    """Name what could not be read and leave with the exit code of the first failure."""
    for failure in failures:
        click.echo(f"moefast: error: {failure.error}", err=True)
    if failures:
        sys.exit(failures[0].error.exit_code)
