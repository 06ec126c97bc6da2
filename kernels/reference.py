"""The contract: every kernel in plain NumPy and float64.

Design: no blocking, no threads, no cleverness. The compiled versions are tested against these functions, and
these functions against outside judges (scikit-learn, SciPy, ONNX Runtime).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "centre_reference",
    "normal_equations_reference",
    "perceptron_reference",
    "project_reference",
    "soft_mix_reference",
]

F64 = NDArray[np.float64]


def normal_equations_reference(
    x: NDArray, y: NDArray, group: NDArray, n_groups: int
) -> tuple[NDArray[np.int64], F64, F64, F64, F64, F64]:
    """n, Σx, Σy, Σy², Σxy and the packed upper triangle of Σxxᵀ, each per group, in float64."""
    p = x.shape[1]
    upper = np.triu_indices(p)
    n = np.zeros(n_groups, np.int64)
    sum_x = np.zeros((n_groups, p))
    sum_y = np.zeros(n_groups)
    sum_yy = np.zeros(n_groups)
    sum_xy = np.zeros((n_groups, p))
    gram = np.zeros((n_groups, upper[0].size))
    for k in range(n_groups):
        xk = np.asarray(x[group == k], np.float64)
        yk = np.asarray(y[group == k], np.float64)
        n[k] = len(yk)
        sum_x[k] = xk.sum(0)
        sum_y[k] = yk.sum()
        sum_yy[k] = yk @ yk
        sum_xy[k] = xk.T @ yk
        gram[k] = (xk.T @ xk)[upper]
    return n, sum_x, sum_y, sum_yy, sum_xy, gram


def centre_reference(
    flux: NDArray,
    error: NDArray,
    good: NDArray[np.bool_] | None,
    reference: F64,
    noise_shape: F64,
    captured: F64,
) -> tuple[F64, F64, F64, F64, F64]:
    """Centred flux, variance, log noise level, Σx²/D and its expectation; bad pixels weigh nothing."""
    keep = np.ones(flux.shape, bool) if good is None else good
    x = np.where(keep, np.asarray(flux, np.float64) - reference, 0.0)
    v = np.where(keep, np.asarray(error, np.float64) ** 2, 0.0)
    n_good = np.maximum(keep.sum(1), 1)
    level = (v / noise_shape).sum(1) / n_good
    log_level = np.where(level > 0, 0.5 * np.log(np.where(level > 0, level, 1.0)), 0.0)
    energy = (x * x / noise_shape).sum(1)
    expected = (v * (1.0 / noise_shape - captured)).sum(1)
    return x, v, log_level, energy, expected


def project_reference(x: NDArray, v: NDArray, matrix: NDArray, variance_matrix: NDArray) -> tuple[F64, F64]:
    """X W and v W₂: the linear part of every prediction, and of every propagated variance."""
    return np.asarray(x, np.float64) @ matrix, np.asarray(v, np.float64) @ variance_matrix


def perceptron_reference(features: NDArray, w1: NDArray, b1: NDArray, w2: NDArray, b2: NDArray) -> F64:
    """tanh(f W₁ + b₁) W₂ + b₂."""
    return np.tanh(np.asarray(features, np.float64) @ w1 + b1) @ w2 + b2


def soft_mix_reference(
    features: NDArray, values: NDArray, w1: NDArray, b1: NDArray, w2: NDArray, b2: NDArray
) -> tuple[F64, F64]:
    """softmax(tanh(f W₁ + b₁) W₂ + b₂) and the mixture Σ_k g_k y_k it gives."""
    logits = perceptron_reference(features, w1, b1, w2, b2)
    logits -= logits.max(1, keepdims=True)
    gate = np.exp(logits)
    gate /= gate.sum(1, keepdims=True)
    return gate, (gate * values).sum(1)
