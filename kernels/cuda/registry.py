"""Every CUDA kernel of the house, with the types it is launched with.

Design: a dict that tests and tools iterate over, filled by one decorator where the kernel is written, so that a new
kernel is compiled for all targets the day it is added.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from numba import config, cuda

# A small file makes a small grid: nothing that whoever scores it could change.
with suppress(ImportError):  # the simulator has no settings of its own
    from numba.cuda.core import config as of_cuda

    of_cuda.CUDA_LOW_OCCUPANCY_WARNINGS = 0

__all__ = ["HOPPER", "KERNELS", "MODULES", "Kernel", "kernel", "launchable", "load"]

MODULES = (
    "moefast.kernels.cuda.binning",
    "moefast.kernels.cuda.gram",
    "moefast.kernels.cuda.draws",
    "moefast.kernels.cuda.project",
    "moefast.kernels.cuda.mix",
    "moefast.kernels.cuda.median",
    "moefast.kernels.cuda.statistics",
    "moefast.kernels.cuda.columns",
    "moefast.kernels.cuda.tangent",
    "moefast.kernels.cuda.template",
    "moefast.kernels.cuda.information",
    "moefast.kernels.cuda.correction",
    "moefast.kernels.cuda.clouds",
    "moefast.kernels.cuda.velocity",
)
"""Modules with kernels; importing them fills `KERNELS`."""
HOPPER = (9, 0)
"""Compute capability of H100 and H200. For earlier ones the compiler needs more registers for the same code."""


@dataclass(frozen=True)
class Kernel:
    """One kernel as the compiler sees it.

    Attributes
    ----------
    name : str
        Name of the function, without the leading underscore.
    function : callable
        The Python function.
    signature : str
        Types of its arguments, as Numba writes them.
    launch_bounds : (int, int)
        Threads per block, and blocks that must fit on one multiprocessor: they cap the registers of a thread.
    serves : tuple of str
        Public functions that launch it.
    early_bounds : (int, int), optional
        The launch bounds on devices before `HOPPER`, if they are others.
    """

    name: str
    function: Callable[..., None]
    signature: str
    launch_bounds: tuple[int, int]
    serves: tuple[str, ...]
    early_bounds: tuple[int, int] | None = None

    def bounds_on(self, target: tuple[int, int]) -> tuple[int, int]:
        """The launch bounds on devices of a compute capability."""
        return self.launch_bounds if self.early_bounds is None or target >= HOPPER else self.early_bounds


KERNELS: dict[str, Kernel] = {}


def kernel(
    signature: str, *, threads: int, serves: tuple[str, ...], blocks: int = 1, early_blocks: int | None = None
) -> Callable[[Callable[..., None]], Any]:
    """Compile a function as a kernel when it is first launched, and enter it in `KERNELS`.

    Machine code is kept on disk beside that of the CPU kernels: the largest three take seconds each to compile. As
    there, Numba looks at the kernel's own file only: after a change of a device function or of a constant in another
    file, empty `__pycache__`.

    Parameters
    ----------
    signature : str
        Types of the arguments as the public function passes them, for instance "void(float32[:,::1], int64)".
    threads : int
        Largest number of threads per block it is launched with.
    serves : tuple of str
        Public functions that launch it.
    blocks : int
        Blocks that must fit on one multiprocessor together.
    early_blocks : int, optional
        The same on devices before `HOPPER`, for which whoever launches the kernel then has another one compiled.
    """

    def register(function: Callable[..., None]) -> Any:
        name = function.__name__.lstrip("_")
        if name in KERNELS:
            raise ValueError(f"two kernels are called {name}: {KERNELS[name].function} and {function}")
        early = None if early_blocks is None else (threads, early_blocks)
        KERNELS[name] = Kernel(name, function, signature, (threads, blocks), serves, early)
        return launchable(function, threads, blocks)

    return register


def launchable(function: Callable[..., None], threads: int, blocks: int = 1) -> Any:
    """A function as a kernel that is compiled when it is first launched, not entered in `KERNELS`.

    For kernels of which one is made for each of many sizes; one of them is entered by `kernel`.
    """
    # The simulator knows no launch bounds.
    options: dict[str, Any] = {"launch_bounds": (threads, blocks), "cache": True}
    return cuda.jit(**({} if config.ENABLE_CUDASIM else options))(function)  # type: ignore[attr-defined]


def load() -> dict[str, Kernel]:
    """Import all `MODULES` and return the filled registry."""
    for module in MODULES:
        import_module(module)
    return KERNELS
