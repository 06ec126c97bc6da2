"""A small perceptron with one hidden layer, fitted by L-BFGS: the regression gate and the error model.

Design: a few thousand parameters and a few tens of thousands of rows are a smooth, full-batch problem. L-BFGS in
float64 solves it in seconds, deterministically, without a deep-learning library; rows held back decide when to stop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.optimize
from numpy.typing import NDArray

__all__ = ["Perceptron", "fit_error_model", "fit_gate", "softmax"]

F64 = NDArray[np.float64]
Loss = Callable[[F64, NDArray[np.intp]], tuple[float, F64]]


def softmax(logits: F64) -> F64:
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
) -> Perceptron:
    """Minimise mean loss + decay·‖W‖²/2 on the rows not held back; keep the iterate that is best on those that are."""
    mean = features.mean(0)
    scale = features.std(0)
    scale[scale == 0] = 1.0
    standard = (features - mean) / scale
    train, check = np.flatnonzero(~held_back), np.flatnonzero(held_back)
    rng = np.random.default_rng(seed)
    n_in = features.shape[1]
    shapes = [(n_in, hidden), (hidden,), (hidden, n_out), (n_out,)]
    sizes = [int(np.prod(shape)) for shape in shapes]
    cuts = np.cumsum(sizes)[:-1]
    start = np.concatenate(
        [
            rng.standard_normal(sizes[0]) / np.sqrt(n_in),
            np.zeros(sizes[1]),
            0.1 * rng.standard_normal(sizes[2]) / np.sqrt(hidden),
            np.zeros(sizes[3]) if bias is None else bias,
        ]
    )
    x_train, x_check = standard[train], standard[check]

    def unpack(theta: F64) -> list[F64]:
        return [part.reshape(shape) for part, shape in zip(np.split(theta, cuts), shapes, strict=True)]

    def objective(theta: F64) -> tuple[float, F64]:
        w1, b1, w2, b2 = unpack(theta)
        active = np.tanh(x_train @ w1 + b1)
        value, slope = loss(active @ w2 + b2, train)
        back = (slope @ w2.T) * (1 - active**2)
        gradient = np.concatenate(
            [
                (x_train.T @ back + decay * w1).ravel(),
                back.sum(0),
                (active.T @ slope + decay * w2).ravel(),
                slope.sum(0),
            ]
        )
        return value + 0.5 * decay * (np.sum(w1**2) + np.sum(w2**2)), gradient

    best = (np.inf, start)

    def watch(intermediate_result: scipy.optimize.OptimizeResult) -> None:
        nonlocal best
        w1, b1, w2, b2 = unpack(intermediate_result.x)
        value, _ = loss(np.tanh(x_check @ w1 + b1) @ w2 + b2, check)
        if value < best[0]:
            best = (value, intermediate_result.x.copy())

    scipy.optimize.minimize(
        objective,
        start,
        jac=True,
        method="L-BFGS-B",
        callback=watch,
        options={"maxiter": max_iterations, "maxcor": 20},
    )
    return Perceptron(mean, scale, *unpack(best[1]))


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
    """

    def loss(logits: F64, rows: NDArray[np.intp]) -> tuple[float, F64]:
        gate = softmax(logits)
        mixed = (gate * values[rows]).sum(1)
        wrong = mixed - y[rows]
        slope = (2.0 / rows.size) * wrong[:, None] * gate * (values[rows] - mixed[:, None])
        return float(np.mean(wrong**2)), slope

    return _fit(
        features, values.shape[1], loss, held_back,
        hidden=hidden, bias=None, decay=decay, seed=seed, max_iterations=max_iterations,
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
) -> Perceptron:
    """Ln σ(f) of a Gaussian with the greatest likelihood of the residuals: min mean (ln σ + r²/2σ²).

    Parameters
    ----------
    features : array of shape (n, f)
    residual : array of shape (n,), dex
        y − ŷ on rows that the predictor did not see.
    held_back : array of shape (n,), bool
        Rows that decide when to stop.
    """

    def loss(log_sigma: F64, rows: NDArray[np.intp]) -> tuple[float, F64]:
        bounded = np.clip(log_sigma[:, 0], -7.0, 3.0)
        squared = residual[rows] ** 2 * np.exp(-2 * bounded)
        slope = np.where(bounded == log_sigma[:, 0], 1 - squared, 0.0) / rows.size
        return float(np.mean(bounded + 0.5 * squared)), slope[:, None]

    bias = np.array([0.5 * np.log(np.mean(residual**2) + 1e-12)])
    return _fit(
        features, 1, loss, held_back,
        hidden=hidden, bias=bias, decay=decay, seed=seed, max_iterations=max_iterations,
    )  # fmt: skip
