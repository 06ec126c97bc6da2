"""The contract: every kernel in plain NumPy and float64.

Design: no blocking, no threads, no cleverness. The compiled versions are tested against these functions, and
these functions against outside judges (scikit-learn, SciPy, ONNX Runtime).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moefast.kernels.quality import LARGEST_ERROR
from moefast.kernels.scoring import Given, Mixed, Mixing, Projected, Projection

__all__ = [
    "error_inputs",
    "gate_features",
    "gate_reference",
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


def project_reference(
    flux: NDArray, error: NDArray, mask: NDArray[np.bool_] | None, plan: Projection
) -> Projected:
    """All that `moefast.kernels.project` gives; bad pixels weigh nothing."""
    flux, error = np.asarray(flux, np.float64), np.asarray(error, np.float64)
    sound = (error > 0) & (error <= LARGEST_ERROR)
    finite = np.isfinite(flux) & (True if mask is None else ~mask)
    good = finite & sound
    f, e = np.where(good, flux, 0.0), np.where(good, error, 0.0)
    shape, p = plan.noise_shape.astype(np.float64), plan.reference.size
    x = np.where(good, (np.maximum(f, 0) if plan.clipped else f) - plan.reference, 0.0)
    ratio = e * e / shape
    n_good = good.sum(1)
    level = ratio.sum(1) / np.maximum(n_good, 1)
    log_level = np.where(level > 0, 0.5 * np.log(np.where(level > 0, level, 1.0)), 0.0)
    empty = n_good == 0
    with np.errstate(invalid="ignore", divide="ignore"):
        snr_norm = np.where(empty, np.nan, np.sqrt((f * f).sum(1) / (e * e).sum(1)))
    snr_median = np.array(
        [np.median(a[g] / b[g]) if g.any() else np.nan for a, b, g in zip(f, e, good, strict=True)]
    )
    flag = 1 * empty + 2 * (2 * n_good < p) + 4 * (finite & ~sound).any(1)
    cells = ratio.reshape(len(x), p // plan.cell, plan.cell).mean(2)
    return Projected(
        x @ plan.matrix,
        x @ plan.lines,
        cells @ plan.cell_matrix,
        log_level,
        (x * x / shape).sum(1),
        (e * e * (1.0 / shape - plan.captured)).sum(1),
        snr_norm,
        snr_median,
        n_good.astype(np.int32),
        flag.astype(np.uint32),
    )


def hat_weights(level: NDArray, knots: NDArray) -> NDArray:
    """Weights (n, M) of linear interpolation between evenly spaced knots; `level` lies between the outer ones."""
    step = (knots[-1] - knots[0]) / knots.dtype.type(knots.size - 1)
    return np.maximum(knots.dtype.type(0), knots.dtype.type(1) - np.abs(level[:, None] - knots) / step)


def line_features(projected: NDArray, widths: NDArray, least_continuum: float) -> NDArray:
    """Depths 1 − core/continuum and equivalent widths (width − integral/continuum), and the sum of the first widths.

    `projected` (n, 3w) holds core, integral and continuum of each line. The sum of all widths but the last line's
    stands before the last line: (n, 2w + 1), in the dtype of `projected`.
    """
    core, integral, continuum = projected[:, 0::3], projected[:, 1::3], projected[:, 2::3]
    continuum = np.maximum(continuum, projected.dtype.type(least_continuum))
    depth = 1 - core / continuum
    width = np.asarray(widths, projected.dtype) - integral / continuum
    w = depth.shape[1]
    out = np.empty((len(projected), 2 * w + 1), projected.dtype)
    out[:, 0 : 2 * w - 2 : 2], out[:, 1 : 2 * w - 2 : 2] = depth[:, :-1], width[:, :-1]
    out[:, 2 * w - 2] = width[:, :-1].sum(1)
    out[:, 2 * w - 1], out[:, 2 * w] = depth[:, -1], width[:, -1]
    return out


def window_features(windows: NDArray, plan: Mixing) -> NDArray:
    """Line features of windows as `project` gives them, those of a spectrum less the reference."""
    return line_features(
        windows + plan.line_offsets.astype(windows.dtype), plan.line_widths, plan.least_continuum
    )


def gate_features(windows: NDArray, z: NDArray, log_level: NDArray, plan: Mixing) -> NDArray:
    """Gate features (n, f): those of the lines, leading columns, noise level between the outer knots."""
    knots = plan.knots.astype(log_level.dtype)
    level = np.clip(log_level, knots[0], knots[-1])
    return np.concatenate([window_features(windows, plan), z[:, : plan.n_leading], level[:, None]], axis=1)


def prepare_reference(
    projected: Projected, plan: Mixing, given: Given | None = None
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Gate features (n, f), expert values and their noise (n, K), χ² (n,), in the dtype of `projected`.

    Values that are `given` take the place of the linear experts'.
    """
    z, (k, m, _) = projected.columns, plan.expert_weights.shape
    n, dtype = len(z), z.dtype
    features = gate_features(projected.windows, z, projected.log_level, plan)
    # The last of them is the noise level.
    hat = hat_weights(features[:, -1], plan.knots.astype(dtype))[:, :, None]
    weights, intercepts = plan.expert_weights.astype(dtype), plan.intercepts.astype(dtype)
    at_knots = np.einsum("nc,kmc->nmk", z, weights, optimize=True) + intercepts.T
    inside = (z[:, : plan.n_basis] ** 2).sum(1)
    experts = (at_knots * hat).sum(1)
    noise = np.sqrt((projected.variances.reshape(n, m, k) * hat).sum(1))
    experts, noise = in_place_of(experts, noise, given)
    return (
        features,
        experts,
        noise,
        (projected.energy - inside) / np.maximum(projected.expected, dtype.type(1e-30)),
    )


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
    return np.tanh(np.asarray(features, np.float64) @ w1 + b1) @ w2 + b2


def gate_reference(features: NDArray, layers: tuple[NDArray, ...], added: NDArray | None = None) -> F64:
    """softmax(tanh(f W₁ + b₁) W₂ + b₂ + added logits)."""
    logits = perceptron_reference(features, *layers)
    if added is not None:
        logits += added
    logits -= logits.max(1, keepdims=True)
    gate = np.exp(logits)
    return gate / gate.sum(1, keepdims=True)


def error_inputs(features: NDArray, log_g: NDArray, raw: NDArray, spread: NDArray, floor: float) -> NDArray:
    """What the error model sees: gate features, log g, ln σ_raw, ln spread."""
    least = features.dtype.type(floor)
    extra = [log_g, np.log(np.maximum(raw, least)), np.log(np.maximum(spread, least))]
    return np.column_stack([features, *extra])


def soft_mix_reference(projected: Projected, plan: Mixing, given: Given | None = None) -> Mixed:
    """ŷ = Σ_k g_k y_k with its propagated noise Σ_k g_k σ_k, spread and calibrated error."""
    features, experts, noise, chi2 = prepare_reference(projected, plan, given)
    gate = gate_reference(features, plan.gate, None if given is None else given.logits)
    mixed = (gate * experts).sum(1)
    log_g = np.clip(mixed, *plan.label_range)
    raw = (gate * noise).sum(1)
    spread = np.sqrt((gate * (experts - mixed[:, None]) ** 2).sum(1))
    inputs = error_inputs(features, log_g, raw, spread, plan.least_spread)
    log_error = perceptron_reference(inputs, *plan.error_model)[:, 0]
    return Mixed(log_g, np.exp(log_error), raw, gate, experts, chi2)
