"""The contract: every kernel in plain NumPy and float64.

Design: no blocking, no threads, no cleverness. The compiled versions are tested against these functions, and
these functions against outside judges (scikit-learn, SciPy, ONNX Runtime). What `project` and `soft_mix` compute is
described in `moefast.kernels.forward`, which is read here in NumPy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike, NDArray

from moefast.kernels import forward
from moefast.kernels.scoring import Given, Mixed, Mixing, Projected, Projection
from moefast.ops.on_numpy import NumPyArithmetic

__all__ = [
    "error_inputs",
    "gate_features",
    "hat_weights",
    "in_place_of",
    "line_features",
    "normal_equations_reference",
    "perceptron_reference",
    "prepare_reference",
    "project_reference",
    "soft_mix_reference",
    "window_features",
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


def _sizes(plan: Mixing) -> forward.Sizes:
    k, m, c = plan.expert_weights.shape
    return forward.Sizes(
        n_pixels=0, cell=1, n_experts=k, n_levels=m, n_columns=c, n_basis=plan.n_basis, n_leading=plan.n_leading,
        n_windows=plan.line_offsets.size, clipped=False, least_continuum=plan.least_continuum,
        least_spread=plan.least_spread,
    )  # fmt: skip


def _mixing(plan: Mixing, dtype: DTypeLike) -> NumPyArithmetic:
    """The arithmetic of `soft_mix`, with its numbers under the names of the description."""
    weights = plan.expert_weights
    numbers = {
        "knots": plan.knots,
        "experts.weights": weights.transpose(2, 0, 1).reshape(weights.shape[2], -1),
        "experts.intercepts": plan.intercepts,
        "lines.offsets": plan.line_offsets,
        "lines.widths": plan.line_widths,
        "label_range": np.array(plan.label_range),
    }
    for name in ("gate", "error_model"):
        layers = zip(forward.LAYERS, getattr(plan, name), strict=True)
        numbers |= {f"{name}.{layer}": array for layer, array in layers}
    return NumPyArithmetic(numbers, dtype)


def project_reference(
    flux: NDArray, error: NDArray, mask: NDArray[np.bool_] | None, plan: Projection
) -> Projected:
    """All that `moefast.kernels.project` gives; bad pixels weigh nothing."""
    p = plan.reference.size
    sizes = forward.Sizes(
        n_pixels=p, cell=plan.cell, n_experts=0, n_levels=0, n_columns=plan.matrix.shape[1], n_basis=0, n_leading=0,
        n_windows=plan.lines.shape[1], clipped=plan.clipped, least_continuum=0.0, least_spread=0.0,
    )  # fmt: skip
    op = NumPyArithmetic(
        {
            "reference": plan.reference,
            "noise_shape": plan.noise_shape,
            "projection": np.concatenate([plan.matrix, plan.lines], axis=1),
            "cell_matrix": plan.cell_matrix,
            "captured": plan.captured,
            "least_flux": np.zeros(1),
        }
    )
    flux, error = np.asarray(flux, np.float64), np.asarray(error, np.float64)
    seen = error if mask is None else np.where(mask, np.nan, error)
    light = forward.light(op, sizes, flux, seen)
    star = forward.project(op, sizes, light)
    snr_norm = forward.snr_norm(op, light, flux, seen)[:, 0]
    # What tables say of the quality of a spectrum is no part of the forward pass.
    good, n_good = light.good, light.good.sum(1)
    snr_median = np.array(
        [np.median(a[g] / b[g]) if g.any() else np.nan for a, b, g in zip(flux, error, good, strict=True)]
    )
    finite = np.isfinite(flux) & (True if mask is None else ~mask)
    flag = 1 * (n_good == 0) + 2 * (2 * n_good < p) + 4 * (finite & ~good).any(1)
    return Projected(
        star.columns,
        star.windows,
        star.variances,
        star.log_level[:, 0],
        star.energy[:, 0],
        star.expected[:, 0],
        np.where(n_good == 0, np.nan, snr_norm),
        snr_median,
        n_good.astype(np.int32),
        flag.astype(np.uint32),
    )


def hat_weights(level: NDArray, knots: NDArray) -> NDArray:
    """Weights (n, M) of linear interpolation between evenly spaced knots; `level` lies between the outer ones."""
    return np.asarray(forward.hat(NumPyArithmetic({"knots": knots}, knots.dtype), knots.size, level[:, None]))


def line_features(projected: NDArray, widths: NDArray, least_continuum: float) -> NDArray:
    """Depths and equivalent widths of lines (n, 2w + 1), in the dtype of `projected` (n, 3w); see `kernels.forward`."""
    op = NumPyArithmetic({"lines.widths": widths}, projected.dtype)
    return np.asarray(forward.line_features(op, np.size(widths), least_continuum, projected))


def window_features(windows: NDArray, plan: Mixing) -> NDArray:
    """Line features of windows as `project` gives them, those of a spectrum less the reference."""
    return np.asarray(forward.lines_of(_mixing(plan, windows.dtype), _sizes(plan), windows))


def gate_features(windows: NDArray, z: NDArray, log_level: NDArray, plan: Mixing) -> NDArray:
    """Gate features (n, f): those of the lines, leading columns, noise level between the outer knots."""
    op, sizes = _mixing(plan, log_level.dtype), _sizes(plan)
    lines = forward.lines_of(op, sizes, windows)
    return np.asarray(forward.gate_features(op, sizes, lines, z, log_level[:, None]))


def prepare_reference(
    projected: Projected, plan: Mixing, given: Given | None = None
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Gate features (n, f), expert values and their noise (n, K), χ² (n,), in the dtype of `projected`.

    Values that are `given` take the place of the linear experts'.
    """
    op, sizes, seen = _mixing(plan, projected.columns.dtype), _sizes(plan), projected.columns
    level, energy, expected = (
        value[:, None] for value in (projected.log_level, projected.energy, projected.expected)
    )
    star = forward.Star(seen, projected.windows, projected.variances, level, energy, expected)
    lines = forward.lines_of(op, sizes, star.windows)
    features = forward.gate_features(op, sizes, lines, seen, level)
    weights = forward.hat(op, sizes.n_levels, forward.level_within(op, level, sizes.n_levels))
    experts = forward.linear_experts(op, sizes, seen, weights)
    noise = forward.linear_noise(op, sizes, star.variances, weights)
    experts, noise = in_place_of(experts, noise, given)
    return features, experts, noise, forward.chi2(op, sizes, star)[:, 0]


def in_place_of(experts: NDArray, noise: NDArray, given: Given | None) -> tuple[NDArray, NDArray]:
    """Expert values and their noise (n, K), with what is `given` in the place of the linear experts'."""
    if given is None:
        return experts, noise
    there = ~np.isnan(given.values)
    return (
        np.where(there, given.values, experts).astype(experts.dtype),
        np.where(there, given.noise, noise).astype(noise.dtype),
    )


def perceptron_reference(features: NDArray, w1: NDArray, b1: NDArray, w2: NDArray, b2: NDArray) -> F64:
    """tanh(f W₁ + b₁) W₂ + b₂."""
    op = NumPyArithmetic(dict(zip(forward.LAYERS, (w1, b1, w2, b2), strict=True)))
    return np.asarray(forward.perceptron(op, np.asarray(features, np.float64), ""))


def error_inputs(features: NDArray, log_g: NDArray, raw: NDArray, spread: NDArray, floor: float) -> NDArray:
    """What the error model sees: gate features, log g, ln σ_raw, ln spread."""
    op = NumPyArithmetic({}, features.dtype)
    log_g, raw, spread = (value[:, None] for value in (log_g, raw, spread))
    return np.asarray(forward.error_features(op, features, log_g, raw, spread, floor))


def soft_mix_reference(projected: Projected, plan: Mixing, given: Given | None = None) -> Mixed:
    """ŷ = Σ_k g_k y_k with its propagated noise Σ_k g_k σ_k, spread and calibrated error."""
    op, sizes = _mixing(plan, np.float64), _sizes(plan)
    features, experts, noise, chi2 = prepare_reference(projected, plan, given)
    logits = forward.perceptron(op, features, "gate")
    if given is not None:
        logits = logits + given.logits
    found = forward.mix(op, sizes, features, experts, noise, logits)
    return Mixed(
        found.log_g[:, 0], found.log_g_err[:, 0], found.log_g_err_raw[:, 0], found.weights, experts, chi2
    )
