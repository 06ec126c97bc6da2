"""Where the numbers are made: the one place that chooses between CPU and GPU.

Design: "auto" takes a GPU only if it can be used, and says in one line what it chose and why; "cuda" without a usable
GPU is an error, never a silent CPU run. The driver is asked through ctypes, which needs no CUDA package.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import dataclass

from moefast.core.errors import BackendError

__all__ = [
    "BACKENDS",
    "Backend",
    "cpu_count",
    "cpu_name",
    "cuda_devices",
    "physical_memory",
    "resolve_backend",
    "resolve_kernels",
]

BACKENDS = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Backend:
    """The backend chosen: `name` ("cpu" or "cuda"), the `device` in words, and the `reason` for the choice."""

    name: str
    device: str
    reason: str


def cuda_devices() -> tuple[list[str], str]:
    """Names of the CUDA devices that the driver offers, and why there are none if the list is empty."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return [], f"no NVIDIA driver ({library} not found)"
    if (status := driver.cuInit(0)) != 0:
        return [], f"the NVIDIA driver does not start (cuInit error {status})"
    count = ctypes.c_int(0)
    if driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return [], "the NVIDIA driver offers no device"
    names = []
    for index in range(count.value):
        device, text = ctypes.c_int(0), ctypes.create_string_buffer(128)
        driver.cuDeviceGet(ctypes.byref(device), index)
        driver.cuDeviceGetName(text, 128, device)
        names.append(text.value.decode())
    return names, ""


def cpu_name() -> str:
    """The processor in words."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def physical_memory() -> int:
    """Memory of this machine in bytes; 0 where the system does not tell."""
    if not hasattr(os, "sysconf"):
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resolve_kernels(name: str = "auto") -> Backend:
    """Choose the backend of our own kernels: a GPU needs a CUDA device and the packages of the extra moefast[cuda].

    Parameters
    ----------
    name : "auto", "cpu" or "cuda"

    Raises
    ------
    BackendError
        "cuda" was asked for and cannot be used, or the name is unknown.
    """
    where = resolve_backend(name)
    if where.name == "cpu":
        return where
    from moefast.kernels.cuda.trial import require_kernels

    try:
        require_kernels()
    except BackendError as error:
        if name == "cuda":
            raise
        reason = f"{where.device} was found but cannot be used: {error}"
        return Backend("cpu", resolve_backend("cpu").device, reason)
    return where


def resolve_backend(name: str = "auto") -> Backend:
    """Choose the backend.

    Parameters
    ----------
    name : "auto", "cpu" or "cuda"

    Raises
    ------
    BackendError
        "cuda" was asked for and there is no CUDA device, or the name is unknown.
    """
    if name not in BACKENDS:
        raise BackendError(f"backend {name!r} is unknown; choose one of {', '.join(BACKENDS)}")
    cpu = f"{cpu_name()}, {cpu_count()} cores"
    if name == "cpu":
        return Backend("cpu", cpu, "as asked")
    devices, reason = cuda_devices()
    if devices:
        return Backend("cuda", devices[0], "as asked" if name == "cuda" else "a CUDA device was found")
    if name == "cuda":
        raise BackendError(f"--backend cuda: {reason}; use --backend cpu, or see `moefast doctor`")
    return Backend("cpu", cpu, reason)
