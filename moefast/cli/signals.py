"""Signals that end a command: what was begun is cleared up on the way out."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["Terminated", "not_lost", "terminate"]


class Terminated(BaseException):
    """Somebody sent SIGTERM; everything is cleared up on the way out."""


def terminate(*_: Any) -> None:
    """End as an interrupt does, by an exception that clears up."""
    # A second one ends at once.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise Terminated


def not_lost(what: Any, told: Callable[[Any], Any] = sys.unraisablehook) -> None:
    """Repeat an interrupt that came while an object was freed, where Python prints and forgets it."""
    if issubclass(what.exc_type, KeyboardInterrupt | Terminated):
        number = signal.SIGINT if issubclass(what.exc_type, KeyboardInterrupt) else signal.SIGTERM
        if number == signal.SIGTERM:
            signal.signal(number, terminate)
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
    else:
        told(what)
