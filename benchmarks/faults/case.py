"""One case: a command of moefast in a process of its own, and what became of it.

Design: the process is forked from one that has everything loaded, so that a case takes as long as the work itself. A
case survives if its result is right, or if it is refused with a message of moefast's own and nothing is left under the
name.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["OUTCOMES", "Case", "Ended", "judge", "run_command"]

OUTCOMES = ("right", "refused", "wrong", "traceback", "crash", "hang")
"""The first two are survivals."""


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes
    ----------
    code : int or None
        Exit code; None if it had to be stopped, minus the number of a signal that ended it.
    said : str
        Standard output and standard error together.
    """

    code: int | None
    said: str


@dataclass(frozen=True)
class Case:
    """One case and its outcome, one of `OUTCOMES`, with what was said if it did not survive."""

    campaign: str
    name: str
    outcome: str
    said: str = ""


def run_command(
    arguments: list[str],
    log: Path,
    *,
    limit: float = 120.0,
    first: Callable[[], None] = lambda: None,
    kill: tuple[float, int] | None = None,
) -> Ended:
    """Run `moefast` with these arguments in a forked process.

    Parameters
    ----------
    arguments : list of str
    log : Path
        File for what it says.
    limit : float
        Seconds after which it counts as hanging.
    first : callable
        Done in the new process before anything else.
    kill : (float, int), optional
        Seconds after which it gets a signal, and which.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _in_child(arguments, log, first)
    begin, killed = time.monotonic(), False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return Ended(code, log.read_text(errors="replace"))
        now = time.monotonic() - begin
        if kill is not None and not killed and now > kill[0]:
            os.kill(child, kill[1])
            killed = True
        if now > limit:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Ended(None, log.read_text(errors="replace"))
        time.sleep(0.002)


def _in_child(arguments: list[str], log: Path, first: Callable[[], None]) -> None:
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.argv = ["moefast", *arguments]
        from moefast.cli import main

        first()
        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1 if error.code else 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def judge(
    campaign: str, name: str, ended: Ended, is_there: Callable[[], bool], is_right: Callable[[], bool]
) -> Case:
    """Judge how a command ended.

    Parameters
    ----------
    campaign, name : str
    ended : Ended
    is_there, is_right : callable
        Whether there is a result under its final name, and whether it is what it should be.
    """
    if ended.code is None:
        outcome = "hang"
    elif "Traceback (most recent" in ended.said or "Exception ignored" in ended.said:
        outcome = "traceback"
    elif ended.code < 0 and -ended.code not in (signal.SIGKILL, signal.SIGTERM):
        outcome = "crash"
    elif is_there():
        outcome = "right" if is_right() else "wrong"
    else:
        outcome = "wrong" if ended.code == 0 else "refused"
    return Case(campaign, name, outcome, "" if outcome in OUTCOMES[:2] else ended.said[-2000:])
