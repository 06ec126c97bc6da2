"""One adapter per way to score spectra: each is made from a mixture and turns flux and error into log g."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from moefast.backend import cpu_count
from moefast.export import build, open_session
from moefast.mixture import Mixture

Score = Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray]


def kernels(mixture: Mixture) -> Score:
    """Our CPU kernels, as `moefast predict` uses them."""
    return lambda flux, error: mixture.predict(flux, error).log_g


def onnxruntime_cpu(mixture: Mixture) -> Score:
    """The exported graph in ONNX Runtime on the CPU."""
    session = open_session(build(mixture), backend="cpu")
    return lambda flux, error: session.run(["log_g"], {"flux": flux, "error": error})[0]


def numpy_products(mixture: Mixture) -> Score:
    """The two matrix products alone, in NumPy with all threads: the floor of any scoring on this CPU."""
    plan = mixture.projection

    def score(flux: NDArray[np.float32], error: NDArray[np.float32]) -> NDArray:
        return (flux @ plan.matrix)[:, 0] + (error @ plan.variance_matrix)[:, 0]

    return score


ENGINES: dict[str, Callable[[Mixture], Score]] = {
    f"moefast kernels ({cpu_count()} cores)": kernels,
    "ONNX Runtime, CPU": onnxruntime_cpu,
    "NumPy, the products alone": numpy_products,
}
FLOORS = {"NumPy, the products alone"}
"""Engines that give no log g."""
