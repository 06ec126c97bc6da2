"""What an engine is: a name, what it needs, and a way to get to work.

Design: an adapter's `make` does everything that is not timed (load, convert, copy to a device, compile) and returns
`Work`, whose `run` is what is timed: from the data to the answer, synchronised. Heavy and optional packages are
imported inside `make`; what is not there is said in words, and is never an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

from moefast.backend import cuda_devices

__all__ = ["OWN_ENVIRONMENT", "TASKS", "Engine", "Work", "why_not"]

TASKS = ("score", "fit")
OWN_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}
"""What the `moefast` command sets for itself: Numba's threads must not wait actively while BLAS works."""


def _as_it_is(result: Any) -> Any:
    return result


@dataclass(frozen=True)
class Work:
    """An engine made ready.

    Attributes
    ----------
    run : callable
        What is timed; returns when the answer is there.
    answer : callable
        The answer from what `run` returned; not timed.
    before : callable, optional
        Called before each timed run; not timed.
    phases : dict of str to float
        Seconds of the parts of the latest run, where the engine tells them.
    facts : dict
        What else the row of this engine should say, JSON-ready.
    """

    run: Callable[[], Any]
    answer: Callable[[Any], Any] = _as_it_is
    before: Callable[[], None] | None = None
    phases: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Engine:
    """One way to do a task.

    Attributes
    ----------
    name : str
        As in `--engines`.
    title : str
        As in tables and pictures.
    task : "score" or "fit"
    make : callable
        Problem -> Work. Raises BackendError or ImportError where it cannot work after all.
    needs : tuple of str
        Modules that must be installed.
    device : "cpu" or "cuda"
    floor : str
        The measured floor that bounds it (see `moefast.benchmarks.floors`).
    same : bool
        Whether its answer must be that of the reference; False where it is a model of its own, with an R² of its own.
    in_memory : bool
        Whether it starts from arrays in memory; the others start from the file.
    is_floor : bool
        It gives no answer: it shows what any engine must spend.
    environment : mapping
        Environment variables of its process.
    most_rows : int or None
        Spectra that it is given at most, where it takes too long for more; None if as many as the others.
    """

    name: str
    title: str
    task: Literal["score", "fit"]
    make: Callable[[Any], Work]
    needs: tuple[str, ...] = ()
    device: Literal["cpu", "cuda"] = "cpu"
    floor: str = ""
    same: bool = True
    in_memory: bool = True
    is_floor: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    most_rows: int | None = None


def why_not(engine: Engine) -> str:
    """Why this engine cannot run here, as far as can be seen without starting it; empty if it can."""
    for module in engine.needs:
        try:
            found = find_spec(module) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            return f"{module} is not installed"
    if engine.device == "cuda":
        devices, reason = cuda_devices()
        if not devices:
            return reason
    return ""
