"""What a benchmark ran on."""

from __future__ import annotations

import datetime
import os
import platform
from importlib import metadata
from typing import Any

from threadpoolctl import threadpool_info

from moefast.backend import cpu_count, cpu_name, cuda_devices, physical_memory
from moefast.core.version import __version__

__all__ = ["describe"]

PACKAGES = (
    "numpy",
    "scipy",
    "numba",
    "numba-cuda",
    "h5py",
    "onnxruntime-gpu",
    "onnxruntime",
    "scikit-learn",
    "himalaya",
    "lightgbm",
    "torch",
)


def describe() -> dict[str, Any]:
    """Machine, versions, BLAS with its threads, load and date, JSON-ready."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    # NumPy and SciPy bring a BLAS each; both must be in memory to be seen.
    import scipy.linalg  # noqa: F401

    blas = [
        {key: library.get(key) for key in ("internal_api", "version", "architecture", "num_threads")}
        for library in threadpool_info()
        if library["user_api"] == "blas"
    ]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "moefast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": cpu_count(),
        "memory_bytes": physical_memory(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "cuda_devices": cuda_devices()[0],
        "blas": blas,
        "packages": versions,
    }
