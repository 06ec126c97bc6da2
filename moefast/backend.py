"""Where the numbers are made: the one place that chooses between CPU and GPU.

Design: "auto" takes a GPU only if it can be used, and says in one line what it chose and why; "cuda" without a usable
GPU is an error, never a silent CPU run. The driver is asked through ctypes, which needs no CUDA package. A process
works on one GPU, the first that CUDA_VISIBLE_DEVICES shows: the driver itself hides the others, so that no thread and
no library (Numba, torch, ONNX Runtime) can take another one. Several GPUs are used by a process each, with --shard.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import dataclass
from typing import Any

from moefast.core.errors import BackendError
from moefast.core.threads import CORES

__all__ = [
    "BACKENDS",
    "Backend",
    "cpu_count",
    "cpu_name",
    "cuda_devices",
    "physical_memory",
    "resolve_backend",
    "resolve_kernels",
    "use_device",
]

BACKENDS = ("auto", "cpu", "cuda")
VISIBLE = "CUDA_VISIBLE_DEVICES"
"""The driver's own variable: numbers or names of the GPUs that it shows to a process, with commas."""
_NO_DEVICE, _NOT_STARTED = 100, 3
"""CUDA_ERROR_NO_DEVICE and CUDA_ERROR_NOT_INITIALIZED."""


@dataclass(frozen=True)
class Backend:
    """The backend chosen: `name` ("cpu" or "cuda"), the `device` in words, and the `reason` for the choice."""

    name: str
    device: str
    reason: str


def _driver() -> tuple[Any, str]:
    """The driver's library, or None, and its file name."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(library), library
    except OSError:
        return None, library


def use_device(number: int) -> None:
    """Let this process, and those that it starts, work on one GPU: the one of this number among those shown so far.

    Sets CUDA_VISIBLE_DEVICES, which the driver reads when it starts; call it before anything uses a GPU.

    Parameters
    ----------
    number : int
        From 0, in the order of `moefast doctor` and of CUDA_VISIBLE_DEVICES, if that is set.

    Raises
    ------
    BackendError
        CUDA_VISIBLE_DEVICES shows fewer devices, or the driver has started in this process already.
    """
    shown = os.environ.get(VISIBLE)
    listed = [name.strip() for name in shown.split(",")] if shown else []
    if number < 0 or (shown is not None and number >= len(listed)):
        raise BackendError(
            f"--device {number}: devices count from 0, and {VISIBLE}={shown or ''} shows {len(listed)} of them; choose "
            "a lower number, or change the variable"
        )
    driver, _ = _driver()
    if driver is not None and driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int(0))) != _NOT_STARTED:
        raise BackendError(
            f"--device {number}: the NVIDIA driver has started in this process and shows the devices that it found "
            f"then; choose the device before anything uses a GPU, or set {VISIBLE} for the process"
        )
    os.environ[VISIBLE] = listed[number] if listed else str(number)


def cuda_devices() -> tuple[list[str], str]:
    """Names of the CUDA devices that the driver offers, and why there are none if the list is empty."""
    driver, library = _driver()
    if driver is None:
        return [], f"no NVIDIA driver ({library} not found)"
    shown = os.environ.get(VISIBLE)
    hint = "" if shown is None else f" with {VISIBLE}={shown}"
    if (status := driver.cuInit(0)) != 0:
        if status == _NO_DEVICE:
            return [], f"the NVIDIA driver offers no device{hint}"
        return [], f"the NVIDIA driver does not start (cuInit error {status})"
    count = ctypes.c_int(0)
    if driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return [], f"the NVIDIA driver offers no device{hint}"
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
    """Cores that this process may use, within the quota of its group and OMP_NUM_THREADS."""
    return CORES


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
