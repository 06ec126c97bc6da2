"""A small perceptron with one hidden layer, fitted by L-BFGS: the regression gate and the error model.

Design: a few thousand parameters and a few tens of thousands of rows are a smooth, full-batch problem. L-BFGS solves
it in seconds, deterministically, without a deep-learning library; rows held back decide when to stop. Rows pass in
float32 and in pieces that stay in the cache, on one thread: these products are too small to share, and threads that
wait for each other on a busy machine cost more than they bring. Parameters and gradients are float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.optimize
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

__all__ = ["Layers", "Perceptron", "fit_error_model", "fit_gate", "penalised_loss", "softmax"]

F64 = NDArray[np.float64]
F32 = NDArray[np.float32]
Loss = Callable[[F32, NDArray[np.intp]], tuple[float, F32]]
"""Outputs (n, k) and row indices -> sum of the losses of these rows, and its slope for each output (n, k)."""

Progress = Callable[[int, int], None]
"""Called with the steps done and the steps there may be; the last call says that they are all done."""

PIECE_ROWS = 2048
LEAST_VARIATION = 1e-4
"""A feature that varies by less than this fraction of its mean is a constant: float32 cannot tell its values apart."""


def softmax(logits: NDArray) -> NDArray:
    """exp(l_k) / Σ exp(l_k) per row, without overflow."""
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


@dataclass(frozen=True)
class Perceptron:
    """f -> tanh(((f − mean)/scale) W₁ + b₁) W₂ + b₂.

    Attributes
    ----------
    mean, scale : arrays of shape (f,)
        Standardisation of the features.
    w1, b1, w2, b2 : arrays of shapes (f, h), (h,), (h, k), (k,)
    """

    mean: F64
    scale: F64
    w1: F64
    b1: F64
    w2: F64
    b2: F64

    def __call__(self, features: NDArray) -> F64:
        """Outputs of shape (n, k), float64."""
        standard = (np.asarray(features, np.float64) - self.mean) / self.scale
        return np.tanh(standard @ self.w1 + self.b1) @ self.w2 + self.b2

    def folded(self) -> tuple[F64, F64, F64, F64]:
        """W₁, b₁, W₂, b₂ that take raw features: the standardisation folded into the first layer."""
        w1 = self.w1 / self.scale[:, None]
        return w1, self.b1 - self.mean @ w1, self.w2, self.b2


def _gate_loss(values: F64, y: F64) -> Loss:
    """Mean (Σ_k g_k v_k − y)² of a softmax gate g, and its slope in the logits."""
    experts, target = values.astype(np.float32), y.astype(np.float32)

    def loss(logits: F32, rows: NDArray[np.intp]) -> tuple[float, F32]:
        gate = softmax(logits)
        each = experts[rows]
        mixed = (gate * each).sum(1)
        wrong = mixed - target[rows]
        slope = 2 * wrong[:, None] * gate * (each - mixed[:, None])
        return float(np.sum(wrong**2, dtype=np.float64)), slope

    return loss


def _error_loss(residual: F64) -> Loss:
    """Mean (ln σ + r²/2σ²), and its slope in ln σ."""
    wrong = residual.astype(np.float32)

    def loss(log_sigma: F32, rows: NDArray[np.intp]) -> tuple[float, F32]:
        # Within bounds no likely residual reaches, so that a bad step of the search cannot overflow.
        bounded = np.clip(log_sigma[:, 0], -7, 3)
        squared = wrong[rows] ** 2 * np.exp(-2 * bounded)
        slope = np.where(bounded == log_sigma[:, 0], 1 - squared, np.float32(0))
        return float(np.sum(bounded + 0.5 * squared, dtype=np.float64)), slope[:, None]

    return loss


def _fit(
    features: F64,
    n_out: int,
    loss: Loss,
    held_back: NDArray[np.bool_],
    *,
    hidden: int,
    bias: F64 | None,
    decay: float,
    seed: int,
    max_iterations: int,
    progress: Progress | None,
) -> Perceptron:
    """Minimise mean loss + decay·‖W‖²/2 on the rows not held back; keep the iterate that is best on those that are."""
    mean = features.mean(0)
    scale = features.std(0)
    # The deviation of equal numbers is rounding, not zero: dividing by it would make weights of 1e15.
    constant = scale <= LEAST_VARIATION * np.abs(mean)
    scale[constant] = 1.0
    standard = np.where(constant, 0, (features - mean) / scale).astype(np.float32)
    train, check = np.flatnonzero(~held_back), np.flatnonzero(held_back)
    if train.size == 0 or check.size == 0:
        raise ValueError(f"rows to fit and rows held back are needed; found {train.size} and {check.size}")
    rng = np.random.default_rng(seed)
    layers = Layers(features.shape[1], hidden, n_out)
    w1 = rng.standard_normal((layers.n_in, hidden)) / np.sqrt(layers.n_in)
    # Untrained weights of a constant feature would speak up when it varies later.
    w1[constant] = 0
    start = layers.pack(
        w1,
        np.zeros(hidden),
        0.1 * rng.standard_normal((hidden, n_out)) / np.sqrt(hidden),
        np.zeros(n_out) if bias is None else bias,
    )
    best, steps = (np.inf, start), 0

    def objective(theta: F64) -> tuple[float, F64]:
        return penalised_loss(theta, layers, standard, train, loss, decay)

    def watch(intermediate_result: scipy.optimize.OptimizeResult) -> None:
        nonlocal best, steps
        theta = intermediate_result.x
        steps += 1
        if progress is not None and steps < max_iterations:
            progress(steps, max_iterations)
        value, _ = penalised_loss(theta, layers, standard, check, loss, 0.0, gradient=False)
        if value < best[0]:
            best = (value, theta.copy())

    with threadpool_limits(1):
        scipy.optimize.minimize(
            objective,
            start,
            jac=True,
            method="L-BFGS-B",
            callback=watch,
            options={"maxiter": max_iterations, "maxcor": 20},
        )
    if progress is not None:
        progress(max_iterations, max_iterations)
    return Perceptron(mean, scale, *layers.unpack(best[1]))


@dataclass(frozen=True)
class Layers:
    """Sizes of a perceptron, and its parameters as one vector."""

    n_in: int
    hidden: int
    n_out: int

    def pack(self, w1: NDArray, b1: NDArray, w2: NDArray, b2: NDArray) -> F64:
        """W₁, b₁, W₂, b₂ as one vector."""
        return np.concatenate([w1.ravel(), b1, w2.ravel(), b2]).astype(np.float64)

    def unpack(self, theta: F64) -> tuple[F64, F64, F64, F64]:
        """The arrays in a vector made by `pack`."""
        f, h, k = self.n_in, self.hidden, self.n_out
        w1, b1, w2, b2 = np.split(theta, np.cumsum([f * h, h, h * k]))
        return w1.reshape(f, h), b1, w2.reshape(h, k), b2


def penalised_loss(
    theta: F64,
    layers: Layers,
    standard: F32,
    rows: NDArray[np.intp],
    loss: Loss,
    decay: float,
    *,
    gradient: bool = True,
) -> tuple[float, F64]:
    """Mean loss over `rows` + decay·‖W‖²/2, and its gradient (zeros if not asked for)."""
    exact = layers.unpack(theta)
    w1, b1, w2, b2 = (a.astype(np.float32) for a in exact)
    total = 0.0
    g_w1, g_b1, g_w2, g_b2 = (np.zeros_like(a) for a in exact)
    for first in range(0, rows.size, PIECE_ROWS):
        piece = rows[first : first + PIECE_ROWS]
        x = standard[piece]
        active = np.tanh(x @ w1 + b1)
        value, slope = loss(active @ w2 + b2, piece)
        total += value
        if gradient:
            back = (slope @ w2.T) * (1 - active * active)
            g_w1 += x.T @ back
            g_b1 += back.sum(0)
            g_w2 += active.T @ slope
            g_b2 += slope.sum(0)
    n = max(rows.size, 1)
    penalty = 0.5 * decay * float(np.sum(exact[0] ** 2) + np.sum(exact[2] ** 2))
    slope_of_all = layers.pack(g_w1 / n + decay * exact[0], g_b1 / n, g_w2 / n + decay * exact[2], g_b2 / n)
    return total / n + penalty, slope_of_all


def fit_gate(
    features: F64,
    values: F64,
    y: F64,
    held_back: NDArray[np.bool_],
    *,
    hidden: int = 64,
    decay: float = 1e-5,
    seed: int = 0,
    max_iterations: int = 400,
    progress: Progress | None = None,
) -> Perceptron:
    """Gate whose softmax mixes expert values with the least squared error: min mean (Σ_k g_k v_k − y)².

    Parameters
    ----------
    features : array of shape (n, f)
    values : array of shape (n, k)
        Predictions of experts that did not see these rows.
    y : array of shape (n,)
    held_back : array of shape (n,), bool
        Rows that decide when to stop.
    progress : callable, optional
        Called after every step.

    Raises
    ------
    ValueError
        No row is held back, or every row is.
    """
    return _fit(
        features, values.shape[1], _gate_loss(values, y), held_back,
        hidden=hidden, bias=None, decay=decay, seed=seed, max_iterations=max_iterations,
        progress=progress,
    )  # fmt: skip


def fit_error_model(
    features: F64,
    residual: F64,
    held_back: NDArray[np.bool_],
    *,
    hidden: int = 32,
    decay: float = 1e-5,
    seed: int = 0,
    max_iterations: int = 300,
    progress: Progress | None = None,
) -> Perceptron:
    """Ln σ(f) of a Gaussian with the greatest likelihood of the residuals: min mean (ln σ + r²/2σ²).

    Parameters
    ----------
    features : array of shape (n, f)
    residual : array of shape (n,), dex
        y − ŷ on rows that the predictor did not see.
    held_back : array of shape (n,), bool
        Rows that decide when to stop.
    progress : callable, optional
        Called after every step.

    Raises
    ------
    ValueError
        No row is held back, or every row is.
    """
    bias = np.array([0.5 * np.log(np.mean(residual**2) + 1e-12)])
    return _fit(
        features, 1, _error_loss(residual), held_back,
        hidden=hidden, bias=bias, decay=decay, seed=seed, max_iterations=max_iterations,
        progress=progress,
    )  # fmt: skip
