"""What a benchmark ran on."""

from __future__ import annotations

import datetime
import platform
from importlib import metadata
from typing import Any

import moefast
from moefast.backend import cpu_count, cpu_name, cuda_devices

PACKAGES = ("numpy", "scipy", "numba", "h5py", "onnxruntime-gpu", "onnxruntime", "scikit-learn")


def describe() -> dict[str, Any]:
    """Machine, versions and date, JSON-ready."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "moefast": moefast.__version__,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": cpu_count(),
        "cuda_devices": cuda_devices()[0],
        "packages": versions,
    }
