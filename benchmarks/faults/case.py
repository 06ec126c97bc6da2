"""One case: work of moefast in a forked process, and what became of it.

Design: the process is forked from one that has everything loaded, so that a case takes as long as the work itself. A
case survives if its result is right, or if it is refused with a message of moefast's own and the exit code that belongs
to it, and nothing is left under the name or beside it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from moefast.core.errors import MoefastError

__all__ = ["OUTCOMES", "SURVIVED", "Case", "Ended", "command", "judge", "run"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SURVIVED = 2
OUTCOMES = ("right", "refused", "wrong", "misleading", "left behind", "traceback", "crash", "hang")
"""The first two are survivals. Wrong: other numbers under the final name, or none with exit code 0; misleading: refused
without a message or with an exit code of another cause; left behind: right or refused, but something lies beside it."""


@dataclass(frozen=True)
class Ended:
    """How work ended.

    Attributes
    ----------
    code : int or None
        Exit code; None if it had to be stopped, minus the number of a signal that ended it.
    said : str
        Standard output and standard error together.
    seconds : float
        How long it took.
    """

    code: int | None
    said: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Case:
    """One case and its outcome, one of `OUTCOMES`, with what was said if it did not survive."""

    campaign: str
    name: str
    outcome: str
    said: str = ""

    @property
    def survived(self) -> bool:
        """Whether the result was right, or was refused as it should be."""
        return self.outcome in OUTCOMES[:SURVIVED]


def command(*arguments: str | Path) -> Callable[[], None]:
    """The work of the command `moefast` with these arguments."""

    def work() -> None:
        from moefast.cli import main

        sys.argv = ["moefast", *map(str, arguments)]
        main()

    return work


def run(
    work: Callable[[], object],
    log: Path,
    *,
    limit: float = 600.0,
    cpu_limit: int = 600,
    first: Callable[[], None] = lambda: None,
    kill: tuple[float, int] | None = None,
) -> Ended:
    """Do some work in a forked process; an error of moefast ends it as it ends a command.

    Parameters
    ----------
    work : callable
    log : Path
        File for what it says.
    limit : float
        Seconds after which it counts as hanging.
    cpu_limit : int
        Seconds of computing after which it does: the machine may be busy with other work, and may have all kernels to
        compile first.
    first : callable
        Done in the new process before the work.
    kill : (float, int), optional
        Seconds after which it gets a signal, and which.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    # What comes before or after the work is no part of it.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    child = os.fork()
    if child == 0:
        _in_child(work, log, first, cpu_limit)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    begin = time.monotonic()
    # Waiting costs nothing, unlike asking again and again.
    handle = os.pidfd_open(child)
    try:
        if kill is not None and not select.select([handle], [], [], kill[0])[0]:
            os.kill(child, kill[1])
        hangs = not select.select([handle], [], [], limit)[0]
    finally:
        os.close(handle)
    if hangs:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    out_of_time = hangs or code == -signal.SIGXCPU
    return Ended(None if out_of_time else code, log.read_text(errors="replace"), time.monotonic() - begin)


def _in_child(work: Callable[[], object], log: Path, first: Callable[[], None], cpu_limit: int) -> None:
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_limit, resource.RLIM_INFINITY))
        # What a shell starts in the background is told to ignore interrupts.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        # The streams must not close the log: a failing layer would count that call.
        sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
        faulthandler.enable()
        first()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        try:
            work()
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1 if error.code else 0
    except MoefastError as error:
        print(f"moefast: error: {error}", file=sys.stderr)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        # Whatever happens, this process must not go on as the one that it was forked from.
        try:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
        finally:
            os._exit(code)


def judge(
    campaign: str,
    name: str,
    ended: Ended,
    is_there: Callable[[], bool],
    is_right: Callable[[], bool],
    *,
    codes: Collection[int] = range(1, 256),
    leftovers: Callable[[], list[str]] = list,
) -> Case:
    """Judge how work ended.

    Parameters
    ----------
    campaign, name : str
    ended : Ended
    is_there, is_right : callable
        Whether there is a result under its final name, and whether it is what it should be.
    codes : collection of int
        Exit codes with which it may be refused.
    leftovers : callable
        What lies beside the result and should not.
    """
    said = ended.said
    killed = ended.code is not None and ended.code < 0
    if ended.code is None:
        outcome = "hang"
    elif "Traceback (most recent" in said or "Exception ignored" in said:
        outcome = "traceback"
    elif killed and -ended.code not in (signal.SIGKILL, signal.SIGTERM):
        outcome, said = "crash", f"ended by signal {-(ended.code or 0)}: {said}"
    elif is_there():
        outcome = "right" if is_right() else "wrong"
    elif ended.code == 0:
        outcome = "wrong"
    elif not killed and (ended.code not in codes or "moefast: " not in said):
        outcome, said = "misleading", f"exit code {ended.code}: {said}"
    else:
        outcome = "refused"
    if outcome in OUTCOMES[:SURVIVED] and not killed and (left := leftovers()):
        outcome, said = "left behind", f"{left}: {said}"
    return Case(campaign, name, outcome, "" if outcome in OUTCOMES[:SURVIVED] else said[-2000:])
