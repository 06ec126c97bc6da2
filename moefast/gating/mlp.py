"""Small perceptrons, fitted by Adam on shuffled pieces: the regression gate, the error model, corrections of log g.

Design: a few thousand parameters, and as many noisy rows as one wants to draw, up to a million. Steps on shuffled
pieces of a thousand rows reach in a few passes what a full-batch method needs hundreds for; beyond a few ten thousand
rows their number, and with it the time, does not depend on the number of rows. Their length falls along a cosine; rows
held back choose among the nets passed on the way. Everything runs in float32 on one thread: these products are too
small to share, and threads that wait for each other on a busy machine cost more than they bring.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from moefast.core.progress import RowProgress

__all__ = [
    "Layers",
    "Loss",
    "Perceptron",
    "as_float32",
    "descend",
    "fit_error_model",
    "fit_gate",
    "fit_layers",
    "fit_perceptron",
    "outputs_of",
    "softmax",
]

F64 = NDArray[np.float64]
F32 = NDArray[np.float32]
Layers = Sequence[NDArray]
"""W₁ (f, h), b₁ (h,), W₂ (h, k), b₂ (k,), and so on where there are more layers."""

Loss = Callable[[NDArray, NDArray[np.intp]], tuple[float, NDArray]]
"""Outputs (n, k) and row indices -> sum of the losses of these rows, and its slope for each output (n, k)."""


class Activation(NamedTuple):
    """What a hidden layer does to its sums, and the slope of that where it gave a."""

    of: Callable[[NDArray], NDArray]
    slope: Callable[[NDArray], NDArray]


TANH = Activation(np.tanh, lambda a: 1 - a * a)
RECTIFIED = Activation(lambda sums: np.maximum(sums, 0), lambda a: (a > 0).astype(a.dtype))
PIECE_ROWS = 1024
STEPS = (1000, 8000)
"""At least and at most."""
PASSES = 200
"""Over the rows, where that is less than the most steps."""
STEP = 1e-2
"""Length of the first steps, in units in which features and outputs are of order one."""
DECAY = 0.1
"""Share of the step length by which weights shrink in every step: against too few noise draws."""
WARM_UP = 100
"""Steps until the length is reached, a twentieth of all steps at most."""
MOMENTS = (0.9, 0.999)
LEAST_SLOPE = 1e-8
"""Keeps Adam's division finite."""
N_CHECKS = 20
MOST_CHECKED = 65_536
"""Rows held back that are looked at in each check, at most."""
LEAST_VARIATION = 1e-4
"""A feature that varies by less than this fraction of its mean is a constant: float32 cannot tell its values apart."""


def as_float32(layers: tuple[F64, F64, F64, F64]) -> tuple[F32, F32, F32, F32]:
    """W₁, b₁, W₂, b₂ as a mixture keeps them."""
    w1, b1, w2, b2 = (np.ascontiguousarray(a, np.float32) for a in layers)
    return w1, b1, w2, b2


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


def _gate_loss(values: NDArray, y: NDArray, given: NDArray | None = None) -> Loss:
    """Mean (Σ_k g_k v_k − y)² of a softmax gate g, and its slope in the logits; `given` logits are added to them."""
    experts, target = values.astype(np.float32), y.astype(np.float32)
    added = None if given is None else given.astype(np.float32)

    def loss(logits: NDArray, rows: NDArray[np.intp]) -> tuple[float, NDArray]:
        gate = softmax(logits if added is None else logits + added[rows])
        each = experts[rows]
        mixed = (gate * each).sum(1)
        wrong = mixed - target[rows]
        slope = 2 * wrong[:, None] * gate * (each - mixed[:, None])
        return float(np.sum(wrong**2, dtype=np.float64)), slope

    return loss


def _error_loss(residual: NDArray) -> Loss:
    """Mean (ln σ + r²/2σ²), and its slope in ln σ."""
    wrong = residual.astype(np.float32)

    def loss(log_sigma: NDArray, rows: NDArray[np.intp]) -> tuple[float, NDArray]:
        # Within bounds no likely residual reaches, so that a bad step of the search cannot overflow.
        bounded = np.clip(log_sigma[:, 0], -7, 3)
        squared = wrong[rows] ** 2 * np.exp(-2 * bounded)
        slope = np.where(bounded == log_sigma[:, 0], 1 - squared, np.float32(0))
        return float(np.sum(bounded + 0.5 * squared, dtype=np.float64)), slope[:, None]

    return loss


def _forward(layers: Layers, x: NDArray, activation: Activation) -> list[NDArray]:
    """What each hidden layer gives, x before them, and the outputs behind."""
    passed = [x]
    for w, b in zip(layers[:-2:2], layers[1:-2:2], strict=True):
        passed.append(activation.of(passed[-1] @ w + b))
    passed.append(passed[-1] @ layers[-2] + layers[-1])
    return passed


def outputs_of(layers: Layers, x: NDArray, activation: Activation = TANH) -> NDArray:
    """Outputs (m, k) of layers for standardised features x (m, f), in the precision of both."""
    return _forward(layers, x, activation)[-1]


def descend(
    layers: Layers, x: NDArray, loss: Loss, rows: NDArray[np.intp], activation: Activation = TANH
) -> tuple[float, list[NDArray]]:
    """Sum of the losses of the rows, and its slope for each array of the layers.

    Parameters
    ----------
    layers : tuple of arrays W₁, b₁, W₂, b₂, …
    x : array of shape (m, f)
        Standardised features of the rows.
    loss : callable
    rows : array of shape (m,), int
        Their numbers, for the loss.
    activation : Activation
        Of hidden layers.
    """
    *passed, outputs = _forward(layers, x, activation)
    value, back = loss(outputs, rows)
    slopes: list[NDArray] = []
    for i in range(len(passed) - 1, -1, -1):
        slopes[:0] = [passed[i].T @ back, back.sum(0)]
        if i:
            back = (back @ layers[2 * i].T) * activation.slope(passed[i])
    return value, slopes


def fit_perceptron(
    features: NDArray,
    n_out: int,
    loss: Loss,
    held_back: NDArray[np.bool_],
    *,
    hidden: int,
    bias: NDArray | None = None,
    decay: float = DECAY,
    seed: int = 0,
    steps: int | None = None,
    progress: RowProgress | None = None,
) -> Perceptron:
    """Perceptron with the least mean loss on rows that are not held back.

    Of the nets passed in `N_CHECKS` places of the way, the one that is best on the rows held back.

    Parameters
    ----------
    features : array of shape (n, f)
    n_out : int
        Numbers that the net gives, k.
    loss : callable
        Of the outputs of some rows.
    held_back : array of shape (n,), bool
    hidden : int
        Units of the hidden layer.
    bias : array of shape (k,), optional
        First guess of b₂.
    decay : float
        The weights shrink by this share of the step length in every step.
    seed : int
        Of first weights and order of the rows.
    steps : int, optional
        If None, `PASSES` over the rows, within the bounds of `STEPS`.
    progress : callable, optional

    Raises
    ------
    ValueError
        No row is held back, or every row is.
    """
    train, check = np.flatnonzero(~held_back), np.flatnonzero(held_back)
    if train.size == 0 or check.size == 0:
        raise ValueError(f"rows to fit and rows held back are needed; found {train.size} and {check.size}")
    check = check[:: -(-check.size // MOST_CHECKED)]
    if steps is None:
        steps = min(max(PASSES * train.size // PIECE_ROWS, STEPS[0]), STEPS[1])
    mean, scale, standard = _standardised(features)
    rng = np.random.default_rng(seed)
    w1 = rng.standard_normal((mean.size, hidden)) / np.sqrt(mean.size)
    # Untrained weights of a constant feature would speak up when it varies later.
    w1[~standard.any(0)] = 0
    w2 = 0.1 * rng.standard_normal((hidden, n_out)) / np.sqrt(hidden)
    start = [w1, np.zeros(hidden), w2, np.zeros(n_out) if bias is None else bias]
    layers = fit_layers(start, standard, loss, train, check, rng, steps=steps, decay=decay, progress=progress)
    return Perceptron(mean, scale, *layers)


def fit_layers(
    start: Layers,
    standard: NDArray,
    loss: Loss,
    train: NDArray[np.intp],
    check: NDArray[np.intp],
    rng: np.random.Generator,
    *,
    steps: int,
    decay: float,
    length: float = STEP,
    activation: Activation = TANH,
    progress: RowProgress | None = None,
) -> list[F64]:
    """Layers with the least mean loss; of those passed in `N_CHECKS` places of the way, the best on rows held back.

    Parameters
    ----------
    start : sequence of arrays W₁, b₁, W₂, b₂, …
        First guess.
    standard : array of shape (n, f), float32
        Features of order one.
    loss : callable
        Of the outputs of some rows.
    train, check : arrays of int
        Rows that are fitted, and rows that choose.
    rng : numpy Generator
        Of the order of the rows.
    steps : int
    decay : float
        The weights shrink by this share of the step length in every step.
    length : float
        Of the longest steps.
    activation : Activation
        Of hidden layers.
    progress : callable, optional
    """
    layers = [a.astype(np.float32) for a in start]
    first, second = ([np.zeros_like(a) for a in layers] for _ in range(2))
    checks = set(np.linspace(0, steps, N_CHECKS + 1).astype(int)[1:].tolist())
    best = (np.inf, [np.asarray(a, np.float64) for a in start])
    pieces = _shuffled(train, rng)
    with threadpool_limits(1):
        for step in range(1, steps + 1):
            rows = next(pieces)
            _, slopes = descend(layers, standard[rows], loss, rows, activation)
            now = np.float32(_step_length(step, steps, length))
            fades = [np.float32(1 - moment**step) for moment in MOMENTS]
            for array, slope, m, v in zip(layers, slopes, first, second, strict=True):
                slope /= rows.size
                m += (1 - MOMENTS[0]) * (slope - m)
                v += (1 - MOMENTS[1]) * (slope * slope - v)
                if array.ndim == 2:
                    array *= 1 - now * np.float32(decay)
                array -= now * (m / fades[0]) / (np.sqrt(v / fades[1]) + LEAST_SLOPE)
            if step in checks:
                value = _mean_loss(layers, standard, loss, check, activation)
                if value < best[0]:
                    best = (value, [a.astype(np.float64) for a in layers])
            if progress is not None:
                progress(step, steps)
    return best[1]


def _standardised(features: NDArray) -> tuple[F64, F64, F32]:
    """Mean and scale of each feature, and (f − mean)/scale in float32, 0 where a feature is constant.

    In pieces: a copy of the features in float64 would be larger than all else that a fit holds by then.
    """
    n, pieces = len(features), range(0, len(features), MOST_CHECKED)
    mean = features.mean(0, dtype=np.float64)
    squares = sum(((features[a : a + MOST_CHECKED] - mean) ** 2).sum(0) for a in pieces)
    scale = np.sqrt(squares / n)
    # The deviation of equal numbers is rounding, not zero: dividing by it would make weights of 1e15.
    constant = scale <= LEAST_VARIATION * np.abs(mean)
    scale[constant] = 1.0
    standard = np.empty(features.shape, np.float32)
    for a in pieces:
        standard[a : a + MOST_CHECKED] = (features[a : a + MOST_CHECKED] - mean) / scale
    standard[:, constant] = 0
    return mean, scale, standard


def _shuffled(rows: NDArray[np.intp], rng: np.random.Generator) -> Iterator[NDArray[np.intp]]:
    """Pieces of the rows in a new order on every pass, without end; the last rows of a pass that fill none wait."""
    size = min(PIECE_ROWS, rows.size)
    while True:
        order = rng.permutation(rows)
        for a in range(0, rows.size - size + 1, size):
            yield order[a : a + size]


def _step_length(step: int, steps: int, most: float) -> float:
    """From 0 to the longest in the first steps, and down to 0 again along a cosine."""
    rise = min(1.0, step / min(WARM_UP, 1 + steps // 20))
    return most * rise * 0.5 * (1 + math.cos(math.pi * step / (steps + 1)))


def _mean_loss(
    layers: Layers, standard: NDArray, loss: Loss, rows: NDArray[np.intp], activation: Activation
) -> float:
    """Mean loss of the rows, in pieces that stay in the cache."""
    total = 0.0
    for a in range(0, rows.size, PIECE_ROWS):
        piece = rows[a : a + PIECE_ROWS]
        total += loss(outputs_of(layers, standard[piece], activation), piece)[0]
    return total / rows.size


def fit_gate(
    features: NDArray,
    values: NDArray,
    y: NDArray,
    held_back: NDArray[np.bool_],
    *,
    given: NDArray | None = None,
    hidden: int = 64,
    decay: float = DECAY,
    seed: int = 0,
    steps: int | None = None,
    progress: RowProgress | None = None,
) -> Perceptron:
    """Gate whose softmax mixes expert values with the least squared error: min mean (Σ_k g_k v_k − y)².

    Parameters
    ----------
    features : array of shape (n, f)
    values : array of shape (n, k)
        Predictions of experts that did not see these rows.
    y : array of shape (n,)
    held_back : array of shape (n,), bool
        Rows that choose among the nets passed on the way.
    given : array of shape (n, k), optional
        Logits from elsewhere, to which those of this gate are added.
    hidden, decay, seed, steps, progress
        As in `fit_perceptron`.

    Raises
    ------
    ValueError
        No row is held back, or every row is.
    """
    return fit_perceptron(
        features, values.shape[1], _gate_loss(values, y, given), held_back,
        hidden=hidden, decay=decay, seed=seed, steps=steps, progress=progress,
    )  # fmt: skip


def fit_error_model(
    features: NDArray,
    residual: NDArray,
    held_back: NDArray[np.bool_],
    *,
    hidden: int = 32,
    decay: float = DECAY,
    seed: int = 0,
    steps: int | None = None,
    progress: RowProgress | None = None,
) -> Perceptron:
    """Ln σ(f) of a Gaussian with the greatest likelihood of the residuals: min mean (ln σ + r²/2σ²).

    Parameters
    ----------
    features : array of shape (n, f)
    residual : array of shape (n,), dex
        y − ŷ on rows that the predictor did not see.
    held_back : array of shape (n,), bool
        Rows that choose among the nets passed on the way.
    hidden, decay, seed, steps, progress
        As in `fit_perceptron`.

    Raises
    ------
    ValueError
        No row is held back, or every row is.
    """
    bias = np.array([0.5 * np.log(np.mean(residual**2, dtype=np.float64) + 1e-12)])
    return fit_perceptron(
        features, 1, _error_loss(residual), held_back,
        hidden=hidden, bias=bias, decay=decay, seed=seed, steps=steps, progress=progress,
    )  # fmt: skip
