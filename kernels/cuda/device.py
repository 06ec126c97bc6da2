"""Is there a GPU that can be used, and what happens when its memory runs out.

Design: every public CUDA function asks here first, so that a machine without driver, device or package gives one clear
error, and never a silent run on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util

import numpy as np

from moefast.core.errors import BackendError, MoefastError

__all__ = ["DeviceMemoryError", "first_launch", "out_of_memory", "require_device"]

OUT_OF_MEMORY = 2
"""CUDA_ERROR_OUT_OF_MEMORY, the driver's number."""


class DeviceMemoryError(BackendError):
    """The GPU has too little free memory for the smallest useful block."""


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
    from numba.cuda.cudadrv.error import CudaSupportError

    try:
        cuda.current_context()
    except CudaSupportError as error:
        reason = " ".join(str(error).split())
        raise BackendError(f"backend cuda: no usable CUDA device ({reason}); use backend cpu") from error


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
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise BackendError(
            f"backend cuda: the kernels do not run here ({reason}); {_remedy(error)}, or use backend cpu"
        ) from error


def _remedy(error: Exception) -> str:
    """What to do about an error of the compilers or of the driver."""
    if isinstance(error, AttributeError | ImportError) and "numpy" in str(error):
        return f"numba-cuda does not fit numpy {np.__version__}: pip install 'numpy<2.5'"
    return "update the NVIDIA driver or pip install --upgrade 'moefast[cuda]'"


def out_of_memory(error: Exception) -> bool:
    """True if an error of the driver says that device memory ran out."""
    return getattr(error, "code", None) == OUT_OF_MEMORY
