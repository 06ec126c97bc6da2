"""Strikes on processes at a share of their work, not at a time: on a busy machine seconds say nothing of what is done.

Design: a job is measured once, undisturbed: what its process computes, and how often it does something with files of a
folder (opens, renames or removes one, makes a folder). A strike is drawn as a share of one of these. By computing it
comes from outside, wherever the process is then; by operations on files the process ends itself before the one that was
drawn, so that every step of writing, merging and publishing is met. Processes are forked from one that has everything
loaded; a process says when its job begins and ends, and a strike counts if it came between the two.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moefast.core.errors import BenchmarkError

__all__ = ["Amount", "Outcome", "Strike", "computed", "count_operations", "operations", "run_struck"]

_OPERATIONS = frozenset({"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"})
"""Events of Python's about files."""
_STEP = 0.003
"""Seconds between looks at what a process has computed."""


class Amount(NamedTuple):
    """What a job takes undisturbed: `seconds` of computing, and `operations` on files of its folder."""

    seconds: float
    operations: int


_NOTHING = Amount(math.inf, 0)


class Strike(NamedTuple):
    """When to strike: at a share of what is computed ("computing"), or of the operations on files ("writing")."""

    by: Literal["computing", "writing"]
    share: float

    def second(self, usual: Amount) -> float:
        """After how many seconds of computing; inf if another measure is used."""
        return self.share * usual.seconds if self.by == "computing" else math.inf

    def operation(self, usual: Amount) -> int:
        """Before which operation, counted from 1; 0 if another measure is used."""
        return 1 + int(self.share * usual.operations) if self.by == "writing" else 0


class Outcome(NamedTuple):
    """What became of a process: whether it was killed in its job, what it did last, and what it took if it was not."""

    killed: bool
    where: str
    took: Amount | None


class _Counter:
    """Operations of this process on files of a folder."""

    folder, count, last, is_there = "", 0, 0, False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _OPERATIONS and self.folder and str(arguments[0]).startswith(self.folder):
            self.count += 1
            if self.count == self.last:
                os.kill(os.getpid(), signal.SIGKILL)


_counter = _Counter()


def count_operations(folder: str | Path, last: int = 0) -> None:
    """Count this process's operations on files of a folder from now on; it is killed before number `last`, if not 0."""
    _counter.folder, _counter.count, _counter.last = str(folder), 0, last
    if not _counter.is_there:
        # Such a function stays for good.
        sys.addaudithook(_counter)
        _counter.is_there = True


def operations() -> int:
    """Operations that were counted."""
    return _counter.count


def computed(pid: int | None) -> float:
    """Seconds that a process has computed; inf once it has ended."""
    try:
        # What follows the name in brackets: state, …, user and system time as the 12th and 13th.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return math.inf
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _job(
    pipe: Connection, work: Callable[..., None], arguments: tuple[Any, ...], folder: Path, last: int
) -> None:
    before = computed(os.getpid())
    pipe.send("begin")
    count_operations(folder, last)
    work(pipe.send, *arguments)
    pipe.send(Amount(computed(os.getpid()) - before, operations()))


def run_struck(
    context: ForkServerContext, work: Callable[..., None], *arguments: Any, folder: Path, strike: Strike | None = None,
    usual: Amount = _NOTHING,
) -> Outcome:  # fmt: skip
    """Do `work(say, *arguments)` in a process of its own, and kill that at its work.

    Parameters
    ----------
    context : ForkServerContext
    work : callable
        Function of a module; `say` takes words on what is done.
    folder : Path
        Whose files count.
    strike : Strike, optional
        Without it nothing is killed.
    usual : Amount
        What the work takes.

    Raises
    ------
    BenchmarkError
        The process failed.
    """
    last = 0 if strike is None else strike.operation(usual)
    due = math.inf if strike is None else strike.second(usual)
    reading, writing = context.Pipe(duplex=False)
    process = context.Process(target=_job, args=(writing, work, arguments, folder, last))
    process.start()
    writing.close()
    before, where, took = math.inf, "", None
    with reading:
        while True:
            if wait([reading], _STEP):
                try:
                    said = reading.recv()
                except EOFError:
                    break
                if said == "begin":
                    before = computed(process.pid)
                elif isinstance(said, Amount):
                    took = said
                else:
                    where = said
            if (
                took is None
                and due < math.inf
                and before < math.inf
                and computed(process.pid) - before >= due
            ):
                process.kill()
                due = math.inf
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise BenchmarkError(
            f"{work.__name__} ended with exit code {process.exitcode} after {where or 'nothing'}"
        )
    return Outcome(process.exitcode != 0 and took is None, where, took)
