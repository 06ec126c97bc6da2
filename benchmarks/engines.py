"""The registry of engines. Tests and the command line iterate over it: a new engine is tested the day it is added."""

from __future__ import annotations

from collections.abc import Sequence

from moefast.benchmarks.adapter import TASKS, Engine
from moefast.benchmarks.fit import FIT
from moefast.benchmarks.score import SCORE
from moefast.core.errors import InputError

__all__ = ["ENGINES", "choose"]

ENGINES: dict[str, dict[str, Engine]] = {"score": SCORE, "fit": FIT}
"""Task -> name -> engine."""


def choose(tasks: Sequence[str], names: Sequence[str] = ()) -> list[Engine]:
    """Engines of the tasks, all or those named, in the order of the registry.

    Raises
    ------
    InputError
        A name that no task has.
    """
    known = {name for task in tasks for name in ENGINES[task]}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(
            f"engine {', '.join(unknown)} is unknown to {' and '.join(tasks)}; choose of {', '.join(sorted(known))}"
        )
    return [
        engine
        for task in TASKS
        if task in tasks
        for engine in ENGINES[task].values()
        if not names or engine.name in names
    ]
