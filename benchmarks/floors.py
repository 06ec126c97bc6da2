"""What any engine must spend: memory bandwidth, BLAS, disk and device, measured on this machine in the same run.

Design: a floor is a rate of the machine (bytes or operations per second) and what one spectrum needs of it, so that it
becomes spectra per second; the share of it that an engine reaches says what is left to win. Copies and reads use all
cores: one does not fill the memory's bandwidth everywhere.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moefast.core.errors import BackendError
from moefast.core.threads import in_threads

__all__ = ["FLOORS", "measure_floors", "per_spectrum"]

BYTES = 256 << 20
"""Size of the arrays that are copied and read: larger than any cache."""
DISK_BLOCK = 8 << 20
GEMM_ROWS = 2048

FLOORS = {
    "memory copy": "B/s",
    "memory read": "B/s",
    "sgemm": "FLOP/s",
    "ssyrk": "FLOP/s",
    "disk read": "B/s",
    "host to device": "B/s",
    "device copy": "B/s",
    "sgemm, GPU": "FLOP/s",
}
"""Rates that are measured, and their unit. A copy counts what is read and what is written."""


def per_spectrum(floor: str, n_pixels: int) -> float:
    """Bytes or operations that one spectrum costs at least: flux and error once, or its part of Σxxᵀ."""
    if FLOORS[floor] == "B/s":
        return 8.0 * n_pixels
    # A general product does not know that Σxxᵀ is symmetric; half of it would be enough.
    return float(n_pixels * (n_pixels + 1))


def measure_floors(path: Path | None, n_pixels: int, samples: int) -> dict[str, dict[str, Any]]:
    """Measure all floors.

    Parameters
    ----------
    path : Path or None
        A large file to read from the disk.
    n_pixels : int
        Side of the matrices multiplied.
    samples : int

    Returns
    -------
    dict
        Per floor: `unit`, `rate` (the best), `samples` (all rates); or `unit` and `unavailable`, the reason.
    """
    found: dict[str, dict[str, Any]] = {}

    def note(
        name: str, work: Callable[[], Any], amount: float, before: Callable[[], None] | None = None
    ) -> None:
        if before is None:
            work()
        rates = []
        for _ in range(samples):
            if before is not None:
                before()
            begin = time.perf_counter()
            work()
            rates.append(amount / (time.perf_counter() - begin))
        found[name] = {"unit": FLOORS[name], "rate": max(rates), "samples": rates}

    def missing(name: str, reason: object) -> None:
        found[name] = {"unit": FLOORS[name], "unavailable": str(reason)}

    _memory(note)
    _blas(note, n_pixels)
    if path is None:
        missing("disk read", "no file was made")
    else:
        try:
            _disk(note, path)
        except BackendError as error:
            missing("disk read", error)
    try:
        _device(note, n_pixels)
    except (ImportError, BackendError) as error:
        for name in ("host to device", "device copy", "sgemm, GPU"):
            missing(name, error)
    return found


def _memory(note: Callable[..., None]) -> None:
    source = np.ones(BYTES // 4, np.float32)
    target = np.empty_like(source)

    def copy(first: int, stop: int) -> None:
        target[first:stop] = source[first:stop]

    def read(first: int, stop: int) -> None:
        source[first:stop].max()

    note("memory copy", lambda: in_threads(source.size, copy), 2.0 * BYTES)
    note("memory read", lambda: in_threads(source.size, read), float(BYTES))


def _blas(note: Callable[..., None], p: int) -> None:
    from scipy.linalg.blas import ssyrk

    x = np.random.default_rng(0).standard_normal((GEMM_ROWS, p), dtype=np.float32)
    w = np.ones((p, 1024), np.float32)
    square = np.zeros((p, p), np.float32)
    note("sgemm", lambda: x @ w, 2.0 * GEMM_ROWS * p * 1024)
    note("ssyrk", lambda: ssyrk(1.0, x.T, lower=1, c=square.T, overwrite_c=1), GEMM_ROWS * p * (p + 1.0))


def _disk(note: Callable[..., None], path: Path) -> None:
    from moefast.benchmarks.score import drop_cache

    size = min(path.stat().st_size, 4 << 30)
    buffer = bytearray(DISK_BLOCK)

    def read() -> None:
        with open(path, "rb", buffering=0) as file:
            left = size
            while left > 0:
                left -= file.readinto(memoryview(buffer)[: min(left, DISK_BLOCK)]) or left

    note("disk read", read, float(size), lambda: drop_cache(path))


def _device(note: Callable[..., None], p: int) -> None:
    import torch

    if not torch.cuda.is_available():
        raise BackendError(f"torch {torch.__version__} finds no CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = False

    def synchronised(work: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            work()
            torch.cuda.synchronize()

        return run

    host = torch.ones(BYTES, dtype=torch.float32).pin_memory()
    there, other = torch.empty_like(host, device="cuda"), torch.empty_like(host, device="cuda")
    note("host to device", synchronised(lambda: there.copy_(host, non_blocking=True)), 4.0 * BYTES)
    note("device copy", synchronised(lambda: other.copy_(there)), 8.0 * BYTES)
    x = torch.ones((4 * GEMM_ROWS, p), device="cuda")
    note("sgemm, GPU", synchronised(lambda: x.T @ x), 2.0 * len(x) * p * p)


def memory_in_use() -> int:
    """Resident memory of this process in bytes; 0 where the system does not tell."""
    return _status("VmRSS")


def forget_peak() -> None:
    """Begin the peak of resident memory anew, where the system allows it."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return


def peak_memory() -> int:
    """Peak of resident memory of this process in bytes.

    Not `ru_maxrss` where it can be helped: a child inherits that of its parent.
    """
    peak = _status("VmHWM")
    if peak or os.name == "nt":
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if os.uname().sysname == "Darwin" else 1024
    )


def _status(name: str) -> int:
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith(name + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
