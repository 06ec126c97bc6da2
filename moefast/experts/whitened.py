"""A ridge on whitened spectra: every star's components over its own noise level.

    log g = b + wᵀ (z/s, 1/s),    min Σ (log g − ŷ)² + α n |w|², α by cross-validation,

with noise in z/s that is white and of unit variance at every level, and 1/s what the reference becomes over the noise.

Design: the published alternative to one ridge per noise level. It learns from noisy stars, and one vector w must do for
faint and bright ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moefast.core.random import fold_of_rows
from moefast.experts.protocol import Expert, ExpertValues, Inputs, expert
from moefast.ops.arithmetic import SolvingArithmetic

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Whitened"]

F32 = NDArray[np.float32]

ALPHAS = tuple(10.0 ** np.arange(-4.0, 3.0))
"""Penalties per star that are tried."""
N_FOLDS = 3


@expert
@dataclass(frozen=True)
class Whitened(Expert):
    """A linear expert of components over the noise level.

    Attributes
    ----------
    weights : array of shape (r + 1, 1), float32
        Of z/s, and of 1/s.
    intercept : array of shape (1,), float32

    Raises
    ------
    ValueError
        Shapes do not fit.
    """

    weights: F32
    intercept: F32

    family: ClassVar[str] = "whitened"

    def __post_init__(self) -> None:
        if self.weights.ndim != 2 or self.weights.shape[1] != 1 or self.intercept.shape != (1,):
            raise ValueError(
                f"weights (r + 1, 1) and intercept (1,) expected; found {self.weights.shape}, {self.intercept.shape}"
            )

    def check(self, n_experts: int, n_components: int, n_pixels: int) -> None:
        """See `Expert.check`."""
        if len(self.weights) != n_components + 1:
            raise ValueError(f"{n_components + 1} weights expected; found {len(self.weights)}")

    def describe(self, op: SolvingArithmetic, seen: Mapping[str, Any]) -> ExpertValues:
        """Two products; see `Expert`."""
        inverse = op.exp(op.multiply(seen["log_level"], op.constant(-1.0)))
        features = op.joined([op.multiply(seen["z"], inverse), inverse], 1)
        return ExpertValues(op.affine(features, op.number("weights"), op.number("intercept")))

    @classmethod
    def fit(cls, inputs: Inputs, y: NDArray, *, seed: int) -> Self:
        """A ridge whose penalty has the least cross-validated squared error; see `Expert.fit`."""
        inverse = np.exp(-inputs.log_level.astype(np.float64))[:, None]
        x = np.concatenate([inputs.z * inverse, inverse], axis=1)
        target = np.asarray(y, np.float64)
        folds = fold_of_rows(np.arange(len(x)), N_FOLDS, seed)
        loss = np.zeros(len(ALPHAS))
        for fold in range(N_FOLDS):
            held = folds == fold
            # Very few stars may all be of one fold.
            if not held.any() or held.all():
                continue
            for i, (weights, intercept) in enumerate(_path(x[~held], target[~held])):
                loss[i] += ((target[held] - x[held] @ weights - intercept) ** 2).sum()
        weights, intercept = _path(x, target)[int(loss.argmin())]
        return cls(weights[:, None].astype(np.float32), np.array([intercept], np.float32))


def _path(x: NDArray, y: NDArray) -> list[tuple[NDArray, float]]:
    """Weights and intercept at each of `ALPHAS`."""
    mean, mean_y = x.mean(0), float(y.mean())
    values, vectors = np.linalg.eigh((x - mean).T @ (x - mean))
    cross = vectors.T @ ((x - mean).T @ (y - mean_y))
    solutions = [vectors @ (cross / (np.maximum(values, 0) + alpha * len(x))) for alpha in ALPHAS]
    return [(weights, mean_y - float(mean @ weights)) for weights in solutions]
