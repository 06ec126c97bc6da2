"""Residuals beside a strong answer: what it gets wrong on average, learnt expert by expert and kept where it helps.

    y = y_strong + Σ_k w_k r_k(f),    y_strong = Σ_k w_k v_k    ⇒    y = Σ_k w_k (v_k + r_k)

with w_k the gate's weights, v_k the experts' values, and f what experts may see of a star: line features, principal
components, noise level. As the weights add up to one, a residual is an addition to the value of its expert, whatever
family that is of, and a mixture with residuals remains a mixture.

Design: r_k is fitted on e = y − y_strong of stars that the strong answer did not see, each counted w_k times: then
Σ_k w_k r_k estimates E[e | f] however the weights overlap, and still does for the experts that keep theirs if others
lose theirs. A good answer leaves little to find, and a fit to what is nearly noise does harm: which of them are kept is
chosen by `moefast.experts.residual_choice`.

Three kinds are tried. The simplest leans on the linear expert of the bin, ℓ_k, which was fitted on all stars with noise
in closed form: r_k = b + a (ℓ_k − v_k), two numbers. Forests are those of `moefast.experts.trees`. The ridge sees
features relative to their means and shrunk by what noise leaves of them,

    φ_j(s) = (f_j − m_j) / (1 + c_j s²),    c_j = noise variance at s = 1 over the variance of the stars themselves,

as the best linear estimate of a clean feature from a noisy one is: one weight per feature then serves every noise
level. Its answer is held within the range that it took on the stars of the fit: features of damaged spectra know none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from moefast.experts.protocol import Expert, ExpertValues, Inputs, expert
from moefast.ops.arithmetic import SolvingArithmetic

__all__ = ["LinearResidual", "RidgeResidual", "fit_linear_residual", "fit_ridge_residual"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

LEAST_SHARE = 1e-3
"""Of a feature's variance that is due to the stars, at the least: noise that was measured too high must not hide it."""
LEAST_VARIATION = 1e-10
"""Share of a feature's mean square that must be variance: less is rounding."""
BLOCK = 16_384


@expert
@dataclass(frozen=True)
class RidgeResidual(Expert):
    """r(f, s) = min(max(b + Σ_j β_j (f_j − m_j)/(1 + c_j s²) + β_s ln s, lowest), highest).

    f are the 9 line features and the r principal components; ln s is held within the levels of the fit.

    Attributes
    ----------
    mean, noise : arrays of shape (9 + r,), float32
        m and c ≥ 0.
    weights : array of shape (9 + r + 1, 1), float32
        β, and β_s last.
    intercept : array of shape (1,), float32, dex
    levels : array of shape (2,), float32
        Least and largest ln s.
    limits : array of shape (2,), float32, dex
        Lowest and highest value.

    Raises
    ------
    ValueError
        Shapes do not fit, a number is not finite, or c is negative.
    """

    mean: F32
    noise: F32
    weights: F32
    intercept: F32
    levels: F32
    limits: F32

    family: ClassVar[str] = "ridge residual"

    def __post_init__(self) -> None:
        m = self.mean.size
        shapes = {
            "mean": (m,),
            "noise": (m,),
            "weights": (m + 1, 1),
            "intercept": (1,),
            "levels": (2,),
            "limits": (2,),
        }
        _check_arrays(self, shapes)
        if (self.noise < 0).any():
            raise ValueError(f"noise over signal must not be negative; found {self.noise.min()}")

    def describe(self, op: SolvingArithmetic, seen: Mapping[str, Any]) -> ExpertValues:
        """A matrix product of shrunk features, and the noise level; see `moefast.experts.protocol.Expert`."""
        m, weights = self.mean.size, op.number("weights")
        level = _between(op, seen["log_level"], "levels")
        variance = op.exp(op.multiply(op.constant(2.0), level))
        share = op.add(op.constant(1.0), op.multiply(op.number("noise"), variance))
        features = op.subtract(op.joined([seen["lines"], seen["z"]], 1), op.number("mean"))
        value = op.product(op.divide(features, share), op.part(weights, 0, 0, m))
        value = op.add(value, op.multiply(op.part(weights, 0, m, m + 1), level))
        return ExpertValues(_between(op, op.add(value, op.number("intercept")), "limits"))


@expert
@dataclass(frozen=True)
class LinearResidual(Expert):
    """r = min(max(b + a (ℓ − v), lowest), highest): the expert's value v leans on that of the linear expert, ℓ.

    Attributes
    ----------
    share : array of shape (1,), float32
        a.
    intercept : array of shape (1,), float32, dex
        b.
    limits : array of shape (2,), float32, dex
        Lowest and highest value.

    Raises
    ------
    ValueError
        Shapes do not fit, or a number is not finite.
    """

    share: F32
    intercept: F32
    limits: F32

    family: ClassVar[str] = "linear residual"

    def __post_init__(self) -> None:
        _check_arrays(self, {"share": (1,), "intercept": (1,), "limits": (2,)})

    def describe(self, op: SolvingArithmetic, seen: Mapping[str, Any]) -> ExpertValues:
        """A product and a sum; see `moefast.experts.protocol.Expert`."""
        if "value" not in seen or "linear" not in seen:
            raise ValueError(
                "this residual sees its expert's value and the linear expert's; give value and linear"
            )
        apart = op.multiply(op.number("share"), op.subtract(seen["linear"], seen["value"]))
        return ExpertValues(_between(op, op.add(op.number("intercept"), apart), "limits"))


def _check_arrays(residual: RidgeResidual | LinearResidual, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        value = getattr(residual, name)
        if value.shape != shape or value.dtype != np.float32 or not np.isfinite(value).all():
            raise ValueError(f"{name}: finite float32 {shape} expected; found {value.dtype} {value.shape}")


def _between(op: SolvingArithmetic, value: Any, bounds: str) -> Any:
    """A value within the two numbers of a name."""
    ends = op.number(bounds)
    return op.clip(value, op.part(ends, 0, 0, 1), op.part(ends, 0, 1, 2))


# --- fitting ---------------------------------------------------------------------------------------------------


def fit_ridge_residual(inputs: Inputs, residual: F64, weight: F64, penalty: float) -> RidgeResidual:
    """The ridge of one expert: min Σ_i w_i (e_i − b − φ_i·β)² + penalty · Σ_i w_i · Σ_j β_j² Var(φ_j).

    Parameters
    ----------
    inputs : Inputs
        Of n noisy stars that the strong answer did not see.
    residual : array of shape (n,), dex
        e = y − y_strong.
    weight : array of shape (n,)
        Of each star; the gate's weight of the expert. Not all zero.
    penalty : float
        Positive: a share of each feature's own variance, so that units do not matter.

    Raises
    ------
    ValueError
        Shapes differ, a number is not finite, weights are negative or all zero, or the penalty is not positive.
    """
    n = len(inputs.z)
    _check_sample(n, residual, weight)
    if not penalty > 0:
        raise ValueError(f"a positive penalty expected; found {penalty}")
    level = np.asarray(inputs.log_level, np.float64)
    levels = np.array([level.min(), level.max()], np.float32)
    mean, noise = _signal(inputs, level, weight)
    width = mean.size + 1
    total, sum_x, sum_e = 0.0, np.zeros(width), 0.0
    gram, moment = np.zeros((width, width)), np.zeros(width)
    for a in range(0, n, BLOCK):
        here = slice(a, a + BLOCK)
        x = _design(_rows(inputs, here), mean, noise, levels)
        weighed = x * weight[here, None]
        total += float(weight[here].sum())
        sum_x += weighed.sum(0)
        sum_e += float(weight[here] @ residual[here])
        gram += weighed.T @ x
        moment += weighed.T @ residual[here]
    squares = np.diag(gram) / total
    gram = gram / total - np.outer(sum_x, sum_x) / total**2
    moment = moment / total - sum_x * sum_e / total**2
    # A feature that does not vary, but for rounding, has no weight.
    varies = np.diag(gram) > LEAST_VARIATION * squares
    scale = np.sqrt(np.where(varies, np.diag(gram), np.inf))
    correlation = gram / np.outer(scale, scale) + penalty * np.eye(width)
    beta = scipy.linalg.solve(correlation, moment / scale, assume_a="pos") / scale
    free = RidgeResidual(
        mean.astype(np.float32),
        noise.astype(np.float32),
        beta.astype(np.float32)[:, None],
        np.array([(sum_e - sum_x @ beta) / total], np.float32),
        levels,
        np.array([-1, 1], np.float32) * np.finfo(np.float32).max,
    )
    # Of the stars that count: those of other bins may lie far outside.
    own = np.flatnonzero(weight > 0.5 * weight.max())
    found = free.predict(_rows(inputs, own))
    limits = np.array([found.min(), found.max()], np.float32)
    return RidgeResidual(**{**free.arrays(), "limits": limits})


def fit_linear_residual(inputs: Inputs, residual: F64, weight: F64) -> LinearResidual:
    """The lean of one expert: min Σ_i w_i (e_i − b − a (ℓ_i − v_i))² with 0 ≤ a ≤ 1.

    Parameters
    ----------
    inputs : Inputs
        With `value` and `linear`, of n noisy stars that neither of the two experts saw.
    residual, weight : array of shape (n,)
        As for `fit_ridge_residual`.

    Raises
    ------
    ValueError
        Values are missing, shapes differ, a number is not finite, or weights are negative or all zero.
    """
    if inputs.value is None or inputs.linear is None:
        raise ValueError("the expert's value and the linear expert's are needed; give value and linear")
    _check_sample(len(inputs.value), residual, weight)
    apart = inputs.linear.astype(np.float64) - inputs.value
    total = weight.sum()
    centre, level = weight @ apart / total, weight @ residual / total
    off = weight * (apart - centre)
    square = float(off @ apart)
    varies = square > LEAST_VARIATION * float(weight @ apart**2)
    a = float(np.clip(off @ residual / square, 0, 1)) if varies else 0.0
    own = apart[weight > 0.5 * weight.max()]
    ends = level + a * (np.array([own.min(), own.max()]) - centre)
    numbers = [a], [level - a * centre], ends
    return LinearResidual(*(np.array(number, np.float32) for number in numbers))


def _check_sample(n: int, residual: F64, weight: F64) -> None:
    if residual.shape != (n,) or weight.shape != (n,):
        raise ValueError(f"{n} residuals and weights expected; found {residual.shape} and {weight.shape}")
    if not np.isfinite(residual).all() or not np.isfinite(weight).all():
        raise ValueError("residuals and weights must be finite")
    if (weight < 0).any() or not weight.any():
        raise ValueError("weights that are not negative, and not all zero, expected")


def _rows(inputs: Inputs, rows: slice | NDArray) -> Inputs:
    return Inputs(inputs.z[rows], inputs.log_level[rows], inputs.lines[rows])


def _design(inputs: Inputs, mean: F64, noise: F64, levels: F32) -> F64:
    level = np.clip(np.asarray(inputs.log_level, np.float64), *levels)
    return np.column_stack([_shrunk(inputs, level, mean, noise), level])


def _shrunk(inputs: Inputs, level: NDArray, mean: NDArray, noise: NDArray) -> NDArray:
    """φ of n stars, (n, 9 + r)."""
    features = np.concatenate([inputs.lines, inputs.z], axis=1).astype(mean.dtype)
    return (features - mean) / (1 + noise * np.exp(2 * level)[:, None])


def _signal(inputs: Inputs, level: F64, weight: F64) -> tuple[F64, F64]:
    """Mean of each feature, and its noise variance at s = 1 over that of the stars: Var(f | s) = a + b s², c = b/a."""
    variance = np.exp(2 * level)
    features = np.concatenate([inputs.lines, inputs.z], axis=1)
    total = weight.sum()
    mean = weight @ features / total
    at = weight @ variance / total
    spread, slope, squares = np.zeros(mean.size), np.zeros(mean.size), 0.0
    for a in range(0, len(features), BLOCK):
        here = slice(a, a + BLOCK)
        off = (features[here] - mean) ** 2
        spread += weight[here] @ off
        slope += (weight[here] * (variance[here] - at)) @ off
        squares += weight[here] @ (variance[here] - at) ** 2
    spread /= total
    b = np.maximum(slope / squares, 0) if squares > 0 else np.zeros_like(slope)
    a_ = np.maximum(spread - b * at, LEAST_SHARE * spread)
    return mean, np.divide(b, a_, out=np.zeros_like(b), where=a_ > 0)
