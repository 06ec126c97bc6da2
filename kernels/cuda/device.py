"""Is there a GPU that can be used, and what happens when its memory runs out.

Design: every public CUDA function asks here first, so that a machine without driver, device or package gives one clear
error, and never a silent run on the CPU. A thread that has chosen no device gets the first one; whoever keeps arrays on
a device therefore keeps the device as well (`current_device`), and every thread that works on them enters it first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util
from typing import Any

import numpy as np

from moefast.core.errors import BackendError, MoefastError

__all__ = [
    "MOST_SHARED",
    "DeviceMemoryError",
    "PinnedMemoryError",
    "current_device",
    "first_launch",
    "out_of_memory",
    "pinned_array",
    "pinned_shortage",
    "require_device",
]

OUT_OF_MEMORY = 2
"""CUDA_ERROR_OUT_OF_MEMORY, the driver's number."""
OPERATING_SYSTEM = 304
"""CUDA_ERROR_OPERATING_SYSTEM: a call of the system failed, here the one that locks memory."""
MOST_SHARED = 48 * 1024
"""Dynamic shared memory that every device gives a block."""
_EXCLUSIVE = 46
"""CUDA_ERROR_DEVICE_UNAVAILABLE: another process has the device for itself, or it is in prohibited mode."""


class DeviceMemoryError(BackendError):
    """The GPU has too little free memory for the smallest useful block."""


class PinnedMemoryError(BackendError):
    """The system gives too little pinned memory, the host's own that a GPU copies from."""


def require_device() -> None:
    """Return if CUDA kernels can be launched.

    Raises
    ------
    BackendError
        A package, the driver or the device is missing.
    """
    if util.find_spec("numba_cuda") is None:
        raise BackendError(
            "backend cuda: numba-cuda is not installed; pip install 'moefast[cuda]', or use cpu"
        )
    from numba import cuda

    try:
        cuda.current_context()
    # The driver, Numba and cuda.core each have errors of their own for a device that is full, taken or too old.
    except Exception as error:
        raise BackendError(
            f"backend cuda: no usable CUDA device ({_in_a_line(error)}); {_remedy_of_context(error)}use backend cpu"
        ) from error


def current_device() -> Any:
    """The device that this thread works on, for ``with``: other threads that enter it work on the same one."""
    from numba import cuda

    cuda.current_context()
    return cuda.gpus.current


def pinned_array(shape: Any, dtype: Any) -> Any:
    """An array in pinned host memory.

    Raises
    ------
    PinnedMemoryError
        The system does not lock so much memory.
    """
    from numba import cuda

    try:
        return cuda.pinned_array(shape, dtype)
    except Exception as error:
        # The driver has one number for memory of the device and of the host.
        if not out_of_memory(error) and not _says(error, OPERATING_SYSTEM, "CUDA_ERROR_OPERATING_SYSTEM"):
            raise
        size = float(np.prod(shape, dtype=np.float64)) * np.dtype(dtype).itemsize
        raise PinnedMemoryError(
            f"pinned host memory: {size / 1e9:.3f} GB in one piece were refused"
        ) from error


@contextmanager
def first_launch() -> Iterator[None]:
    """Say in words what goes wrong when a kernel is first launched: compilers and drivers that do not fit show there.

    Raises
    ------
    BackendError
        Whatever is raised inside that is not one of our own errors.
    """
    try:
        yield
    except MoefastError:
        raise
    except Exception as error:
        reason = _in_a_line(error)
        raise BackendError(
            f"backend cuda: the kernels do not run here ({reason}); {_remedy(error)}, or use backend cpu"
        ) from error


def pinned_shortage(needed: int, blocks: str, refusal: PinnedMemoryError) -> PinnedMemoryError:
    """The error that says how many bytes of pinned memory `blocks` need, and what to do."""
    return PinnedMemoryError(
        f"{refusal}; {needed / 1e9:.3f} GB for {blocks} are needed: free memory of the host, raise what it may lock "
        "(ulimit -l, the limit of the container), or use backend cpu"
    )


def _in_a_line(error: Exception) -> str:
    """The error's type and text on one line, not too long."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _remedy_of_context(error: Exception) -> str:
    """What to do where a device does not let this process in; empty if nothing is known."""
    if out_of_memory(error):
        return "end other programs on the device, choose another one with --device, or "
    if _says(error, _EXCLUSIVE, "CUDA_ERROR_DEVICE_UNAVAILABLE"):
        return (
            "another process may have it for itself (exclusive mode): choose another one with --device, or "
        )
    return ""


def _remedy(error: Exception) -> str:
    """What to do about an error of the compilers or of the driver."""
    if isinstance(error, AttributeError | ImportError) and "numpy" in str(error):
        return f"numba-cuda does not fit numpy {np.__version__}: pip install 'numpy<2.5'"
    if out_of_memory(error):
        return "the device's memory is full: end other programs on it, choose another one with --device"
    return "update the NVIDIA driver or pip install --upgrade 'moefast[cuda]'"


def _says(error: Exception, number: int, name: str) -> bool:
    """True if an error of the driver has this number, or (in cuda.core) this name in its text."""
    return getattr(error, "code", None) == number or name in str(error)


def out_of_memory(error: Exception) -> bool:
    """True if an error of the driver says that memory ran out, be it the device's or pinned memory of the host."""
    return isinstance(error, PinnedMemoryError) or _says(error, OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY")
