"""The fitted mixture: arrays, and the way from a block of spectra to log g.

Design: everything linear in flux or in variance is one projection (`moefast.kernels.project`). What follows works on a
few dozen numbers per star: interpolate each expert between its noise levels, form the gate's features, mix, and
turn the spread and the propagated noise into a calibrated error. `Mixture.predict` runs it in float32 on the
kernels, `Mixture.predict_reference` in plain float64 NumPy, and `moefast.export` writes the same steps as ONNX;
the three are held together by tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moefast.gating.features import LINE_FEATURES, line_columns, line_features
from moefast.kernels import Projected, Projection, perceptron, project, soft_mix
from moefast.kernels.reference import (
    centre_reference,
    perceptron_reference,
    project_reference,
    soft_mix_reference,
)

__all__ = ["N_GATE_COMPONENTS", "Mixture", "Prediction", "Prepared", "hat_weights"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

N_GATE_COMPONENTS = 4
"""Principal components among the gate's features."""
N_GATE_FEATURES = len(LINE_FEATURES) + N_GATE_COMPONENTS + 1
LEAST_SPREAD = 1e-4
"""Floor in dex of spread and propagated noise before their logarithms are taken."""


@dataclass(frozen=True)
class Prediction:
    """Predictions for a block of n stars, K experts.

    Attributes
    ----------
    log_g : array of shape (n,), dex
    log_g_err : array of shape (n,), dex
        Calibrated 1σ.
    log_g_err_raw : array of shape (n,), dex
        Noise propagated through the experts, as if they erred together (an upper bound for the mixture).
    weights : array of shape (n, K)
        Gate weights; rows sum to 1.
    expert_log_g : array of shape (n, K), dex
    chi2 : array of shape (n,)
        Energy outside the model's principal components over its expectation from the noise: 1 for a spectrum like
        those of the training set.
    log_level : array of shape (n,)
        ln s, the star's noise level relative to the mean of the training set.
    """

    log_g: NDArray
    log_g_err: NDArray
    log_g_err_raw: NDArray
    weights: NDArray
    expert_log_g: NDArray
    chi2: NDArray
    log_level: NDArray


@dataclass(frozen=True)
class Prepared:
    """A block of n stars on its way to the gate.

    `features` (n, 14) of the gate; `expert_log_g` (n, K) and its propagated noise `expert_noise` (n, K) at each star's
    noise level; `components` (n, r), the noise-white principal components; `chi2` and `log_level` as in `Prediction`.
    """

    features: NDArray
    expert_log_g: NDArray
    expert_noise: NDArray
    components: NDArray
    chi2: NDArray
    log_level: NDArray


def hat_weights(level: NDArray, knots: NDArray) -> NDArray:
    """Weights (n, M) of linear interpolation between evenly spaced knots; `level` lies between the outer ones."""
    step = (knots[-1] - knots[0]) / knots.dtype.type(knots.size - 1)
    return np.maximum(knots.dtype.type(0), knots.dtype.type(1) - np.abs(level[:, None] - knots) / step)


@dataclass(frozen=True)
class Mixture:
    """K linear experts at M noise levels, a gate, an error model.

    Attributes
    ----------
    wave : array of shape (p,), float64, Å
    reference : array of shape (p,)
        Spectrum subtracted first.
    noise_shape : array of shape (p,)
        Mean noise variance D per pixel.
    knots : array of shape (M,)
        ln s of the noise levels, evenly spaced, M ≥ 2.
    expert_weights : array of shape (p, K, M)
    expert_intercepts : array of shape (K, M), dex
    basis : array of shape (p, r)
        Noise-white principal components T.
    gate : tuple of arrays W₁, b₁, W₂, b₂
        Takes the 14 raw gate features.
    error_model : tuple of arrays W₁, b₁, W₂, b₂
        Takes the gate features, log g, ln σ_raw and ln spread; gives ln σ.
    label_range : tuple of float
        Predictions are clipped to it, dex.
    clipped : bool
        Flux below zero counts as zero. `log_g_err_raw` is then an upper bound: it is the noise before the cut.
    """

    wave: F64
    reference: F32
    noise_shape: F32
    knots: F32
    expert_weights: F32
    expert_intercepts: F32
    basis: F32
    gate: tuple[F32, F32, F32, F32]
    error_model: tuple[F32, F32, F32, F32]
    label_range: tuple[float, float]
    clipped: bool = False

    def __post_init__(self) -> None:
        p, k, m = self.expert_weights.shape
        if self.wave.shape != (p,) or self.basis.shape[0] != p or self.expert_intercepts.shape != (k, m):
            raise ValueError(
                f"experts {self.expert_weights.shape}, intercepts {self.expert_intercepts.shape}, "
                f"basis {self.basis.shape} and wave {self.wave.shape} do not fit together"
            )
        if self.knots.shape != (m,) or m < 2:
            raise ValueError(
                f"two noise levels at least, and as many as the experts have; found {self.knots.shape}"
            )
        if self.gate[0].shape[0] != N_GATE_FEATURES or self.gate[2].shape[1] != k:
            raise ValueError(f"the gate must take {N_GATE_FEATURES} features and give {k} weights")
        if self.error_model[0].shape[0] != N_GATE_FEATURES + 3:
            raise ValueError(f"the error model must take {N_GATE_FEATURES + 3} features")

    @property
    def n_pixels(self) -> int:
        """Number of pixels p."""
        return self.wave.size

    @property
    def n_experts(self) -> int:
        """Number of experts K."""
        return self.expert_intercepts.shape[0]

    @cached_property
    def line_columns(self) -> F32:
        """Columns of the line features, (p, 12)."""
        return line_columns(self.wave).astype(np.float32)

    @cached_property
    def line_offsets(self) -> F32:
        """What the line columns give for the reference spectrum, (12,)."""
        return (self.reference.astype(np.float64) @ self.line_columns.astype(np.float64)).astype(np.float32)

    @cached_property
    def line_widths(self) -> F32:
        """Width of each line window in Å, (4,)."""
        return self.line_columns[:, 1::3].sum(0, dtype=np.float64).astype(np.float32)

    @cached_property
    def captured(self) -> F32:
        """Share of each pixel's noise that the basis takes up, (p,)."""
        return (self.basis.astype(np.float64) ** 2).sum(1).astype(np.float32)

    @cached_property
    def projection(self) -> Projection:
        """All columns: experts × noise levels, principal components, lines; and the squared expert weights."""
        flat = self.expert_weights.reshape(self.n_pixels, -1)
        matrix = np.concatenate([flat, self.basis, self.line_columns], axis=1)
        return Projection(self.reference, self.noise_shape, matrix, flat * flat, self.captured)

    def predict(
        self, flux: F32, error: F32, good: NDArray[np.bool_] | None = None, *, first_row: int = 0
    ) -> Prediction:
        """Predictions in float32 on the CPU kernels.

        Parameters
        ----------
        flux, error : array of shape (n, p), float32
        good : array of shape (n, p), bool, optional
            Pixels to use; None says all. Rows without a good pixel get numbers that mean nothing.
        first_row : int
            Index of the first row in its file (see `moefast.kernels.project`).
        """
        return self.mix(self.prepare(flux, error, good, first_row=first_row))

    def seen(self, flux: NDArray) -> NDArray:
        """Flux as the experts see it; NaN stays NaN."""
        return np.maximum(flux, flux.dtype.type(0)) if self.clipped else flux

    def prepare(
        self, flux: F32, error: F32, good: NDArray[np.bool_] | None = None, *, first_row: int = 0
    ) -> Prepared:
        """Everything up to the gate; see `predict` for the parameters."""
        linear = project(self.seen(flux), error, good, self.projection, first_row=first_row)
        return self._prepare(linear, np.float32)

    def mix(self, prepared: Prepared) -> Prediction:
        """From the gate to the calibrated error."""
        return self._mix(prepared, soft_mix, perceptron, np.float32)

    def predict_reference(
        self, flux: NDArray, error: NDArray, good: NDArray[np.bool_] | None = None
    ) -> Prediction:
        """The same in plain NumPy and float64: the contract of `predict` and of the ONNX graph."""
        plan = self.projection
        x, v, log_level, energy, expected = centre_reference(
            self.seen(flux),
            error,
            good,
            *(a.astype(np.float64) for a in (plan.reference, plan.noise_shape, plan.captured)),
        )
        values, variances = project_reference(x, v, plan.matrix, plan.variance_matrix)
        linear = Projected(values, variances, log_level, energy, expected)  # type: ignore[arg-type]
        return self._mix(
            self._prepare(linear, np.float64), soft_mix_reference, perceptron_reference, np.float64
        )

    def _prepare(self, linear: Projected, dtype: type) -> Prepared:
        n, (k, m), r = len(linear.values), self.expert_intercepts.shape, self.basis.shape[1]
        level, hat = self._levels(linear.log_level, dtype)
        experts, z, lines = np.split(linear.values, [k * m, k * m + r], axis=1)
        z_energy = (z * z).sum(1)
        features = line_features(lines + self.line_offsets.astype(dtype), self.line_widths)
        return Prepared(
            features=np.concatenate([features, z[:, :N_GATE_COMPONENTS], level[:, None]], axis=1),
            expert_log_g=(
                (experts.reshape(n, k, m) + self.expert_intercepts.astype(dtype)) * hat[:, None]
            ).sum(2),
            expert_noise=np.sqrt((linear.variances.reshape(n, k, m) * hat[:, None]).sum(2)),
            components=z,
            chi2=(linear.energy - z_energy) / np.maximum(linear.expected, dtype(1e-30)),
            log_level=linear.log_level,
        )

    def _levels(self, log_level: NDArray, dtype: type) -> tuple[NDArray, NDArray]:
        knots: NDArray = self.knots.astype(dtype)
        level = np.clip(log_level, knots[0], knots[-1])
        return level, hat_weights(level, knots)

    def error_features(self, features: NDArray, log_g: NDArray, raw: NDArray, spread: NDArray) -> NDArray:
        """What the error model sees: gate features, log g, ln σ_raw, ln spread."""
        floor = features.dtype.type(LEAST_SPREAD)
        extra = [log_g, np.log(np.maximum(raw, floor)), np.log(np.maximum(spread, floor))]
        return np.column_stack([features, *extra])

    def _mix(self, prepared: Prepared, mix: Callable, layers: Callable, dtype: type) -> Prediction:
        experts = prepared.expert_log_g
        gate, mixed = mix(prepared.features, experts, *self.gate)
        log_g = np.clip(mixed, dtype(self.label_range[0]), dtype(self.label_range[1]))
        raw = (gate * prepared.expert_noise).sum(1)
        spread = np.sqrt((gate * (experts - mixed[:, None]) ** 2).sum(1))
        log_error = layers(self.error_features(prepared.features, log_g, raw, spread), *self.error_model)
        return Prediction(
            log_g, np.exp(log_error[:, 0]), raw, gate, experts, prepared.chi2, prepared.log_level
        )
