"""The way from a CPU function to its CUDA twin, without importing CUDA before it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from moefast.core.errors import BackendError

__all__ = ["BACKENDS", "on_cuda"]

BACKENDS = ("cpu", "cuda")


def on_cuda(name: str, backend: str) -> Any:
    """The CUDA twin of the function `name`, if `backend` is "cuda" and a device can be used.

    Raises
    ------
    BackendError
        The backend is unknown, or CUDA cannot be used here.
    """
    if backend != "cuda":
        raise BackendError(
            f"backend {backend!r} is unknown to the kernels; choose one of {', '.join(BACKENDS)}"
        )
    import_module("moefast.kernels.cuda.device").require_device()
    return getattr(import_module("moefast.kernels.cuda"), name)
