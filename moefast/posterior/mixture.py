"""A fitted posterior: the arrays of `moefast.posterior.forward`, and the way from a block of spectra to labels.

Design: a library of clouds of clean spectra, grouped in bins of T_eff × [M/H] like the experts of `moefast.mixture`;
the gate is Bayes' rule. `PosteriorMixture.predict_reference` is the description read in NumPy and float64,
`PosteriorMixture.predict` the compiled kernels in float32, and `moefast.export` writes the description as ONNX; tests
hold the three together. Stored are the numbers that cannot be derived from others.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moefast.core.threads import one_blas_thread
from moefast.kernels import CloudPosterior, Clouds, Groups, Space, cloud_posterior
from moefast.kernels.dispatch import on_cuda
from moefast.mixture import Mixture, Prediction
from moefast.ops.on_numpy import NumPyArithmetic
from moefast.posterior.cells import alike_pixels
from moefast.posterior.correction import CORRECTION, N_LAYERS, n_features
from moefast.posterior.forward import Sizes, forward
from moefast.spectra.quality import Quality

__all__ = ["LABELS", "ORDER", "SCALE_UNIT", "AnyMixture", "PosteriorMixture"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

LABELS = ("log_g", "T_eff", "M_H", "a_M", "C_M")
"""Labels of a library, those that the training set has; log g is the headline and comes first."""
SCALE_UNIT = 1e-3
"""The coordinate of the scale counts parts in a thousand of the reference spectrum."""
REFERENCE_ROWS = 32
"""Stars that the description sees at a time: it holds a matrix for each star and cloud."""
_MAKING = threading.Lock()
ORDER = (
    "reference", "noise_shape", "directions", "keys", "tangents", "gains", "log_weights", "labels", "scatter",
    "first", "n_sky", "calibrated", "cells", "cell_shares", "scale_width", "label_range", "error.w1", "error.b1",
    "error.w2", "error.b2", "label_factors",
)  # fmt: skip
"""What is stored of a mixture, and behind it `CORRECTION` where it has one."""
N_GROUPS = 3
"""Gaussians, of stars alike in T_eff, by which a star's own evidence tells how wide its slopes are."""
N_APART = 24
"""Coordinates in which these Gaussians are their own; given these, the others are those of the whole library."""


@dataclass(frozen=True)
class PosteriorMixture:
    """Clouds of clean spectra in n coordinates, with q nuisances and an error model.

    Attributes
    ----------
    wave : array of shape (p,), float64, Å
    reference : array of shape (p,)
        The spectrum r that all others are told apart from.
    noise_shape : array of shape (p,)
        D, mean noise variance of the training set per pixel.
    directions : array of shape (p, n + q)
        G and N of `moefast.posterior.forward`; column n − 1 is `SCALE_UNIT` times the reference.
    keys : array of shape (m, n)
        Means of the clouds, sorted by expert.
    tangents : array of shape (m, t, n)
        Directions along which the spectra of a cloud scatter by one.
    gains : array of shape (m, t, l)
        Covariance of the coordinate along each tangent with each label.
    log_weights : array of shape (m,)
        ln of the cloud's share of the training stars.
    labels : array of shape (m, l)
        Mean labels, as `label_names` has them, in their units.
    scatter : array of shape (m, l, l)
        Covariance of the labels within the cloud that the tangents do not explain.
    first : array of shape (K + f + 1,), int64
        Clouds first[k] to first[k + 1] belong to expert k; the last f groups are of spectra that are no stars.
    scale_width : float
        Prior width of the scale, relative to the scale that the reference spectrum suggests.
    label_range : tuple of float
        log g is clipped to it, dex.
    error_model : tuple of arrays W₁ (5, h), b₁, W₂ (h, 1), b₂
        From `error_features` to ln of the error of log g.
    label_factors : array of shape (l,)
        What the posterior's own standard deviation of each label is multiplied with; that of log g is not used.
    label_names : tuple of str
        Of `LABELS`, the first l.
    n_sky : int
        The last so many nuisances grow with the noise of the star.
    calibrated : tuple of float
        Share of spectra whose flux is calibrated better than the slopes, which are the first nuisances, allow for, and
        behind it how wide each slope is in these, relative to the others. The share alone, 0, where all are alike.
    n_foreign : int
        f, groups of clouds of spectra that are not those of one star, the last ones.
    blends : bool
        Whether the first of these are blends, the light of two stars; all others are no stars.
    n_fast : tuple of int
        How many clouds, the last ones of each expert, are of stars that move; empty if none are told apart.
    correction : tuple of arrays
        The network that corrects log g, as `CORRECTION` names its parts; empty if there is none.
    cells, cell_shares : array of shape (k, s), int64 and float32
        Cells of pixels; see `moefast.posterior.cells.alike_pixels`, which finds them where they are empty.
    """

    kind: ClassVar[str] = "posterior"

    wave: F64
    reference: F32
    noise_shape: F32
    directions: F32
    keys: F32
    tangents: F32
    gains: F32
    log_weights: F32
    labels: F32
    scatter: F32
    first: NDArray[np.int64]
    scale_width: float
    label_range: tuple[float, float]
    error_model: tuple[F32, F32, F32, F32]
    label_factors: F32
    label_names: tuple[str, ...] = LABELS
    n_sky: int = 0
    calibrated: tuple[float, ...] = (0.0,)
    n_foreign: int = 0
    blends: bool = False
    n_fast: tuple[int, ...] = ()
    correction: tuple[F32, ...] = ()
    cells: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 0), np.int64))
    cell_shares: F32 = field(default_factory=lambda: np.empty((0, 0), np.float32))

    def __post_init__(self) -> None:
        # What is stored in single precision must be what was used before it was stored.
        object.__setattr__(self, "scale_width", float(np.float32(self.scale_width)))
        low, high = (float(np.float32(limit)) for limit in self.label_range)
        object.__setattr__(self, "label_range", (low, high))
        share, *narrow = (float(np.float32(value)) for value in self.calibrated)
        object.__setattr__(self, "calibrated", (share, *narrow))
        p, (m, n), labels = self.wave.size, self.keys.shape, len(self.label_names)
        t = self.tangents.shape[1]
        expected = {
            "reference": (p,),
            "noise_shape": (p,),
            "tangents": (m, t, n),
            "gains": (m, t, labels),
            "log_weights": (m,),
            "labels": (m, labels),
            "scatter": (m, labels, labels),
            "label_factors": (labels,),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} of shape {shape} expected; found {getattr(self, name).shape}")
        if self.directions.ndim != 2 or self.directions.shape[0] != p or self.directions.shape[1] < n:
            raise ValueError(
                f"directions of shape ({p}, {n} or more) expected; found {self.directions.shape}"
            )
        first = self.first
        if first.ndim != 1 or first[0] != 0 or first[-1] != m or (np.diff(first) < 1).any():
            raise ValueError(f"every expert needs clouds, {m} in all; found boundaries {first.tolist()}")
        if not 0 <= self.n_foreign < first.size - 1:
            raise ValueError(
                f"0 to {first.size - 2} groups that are not single stars; found {self.n_foreign}"
            )
        if self.blends and not self.n_foreign:
            raise ValueError("blends are a group that is not of single stars; found none")
        if self.n_fast and (
            len(self.n_fast) != self.n_experts
            or not all(0 <= n < size for n, size in zip(self.n_fast, np.diff(first), strict=False))
        ):
            raise ValueError(f"fast clouds of each expert, fewer than it has, expected; found {self.n_fast}")
        if not 0 <= self.n_sky <= self.n_nuisances:
            raise ValueError(
                f"0 to {self.n_nuisances} nuisances that grow with the noise; found {self.n_sky}"
            )
        if not (0 <= share < 1 and all(0 < width <= 1 for width in narrow)) or len(narrow) != (
            self.n_slopes if share else 0
        ):
            raise ValueError(
                "calibrated: a share of spectra from 0 to below 1 and, if it is not 0, a relative width above 0 "
                f"and at most 1 of each slope expected; found {self.calibrated} and {self.n_slopes} slopes"
            )
        if self.error_model[0].shape[0] != 5 or self.error_model[2].shape[1] != 1:
            raise ValueError("an error model of five features and one answer expected")
        self._check_correction()
        if not (self.noise_shape > 0).all():
            raise ValueError("noise_shape must be positive in every pixel")
        for name in (
            "reference",
            "noise_shape",
            "directions",
            "keys",
            "tangents",
            "gains",
            "labels",
            "scatter",
        ):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name} must be finite")
        if self.cells.size == 0:
            precision, _ = self._library_as_one_cloud(self._all_tangents())
            cells, shares = alike_pixels(self.directions, self.noise_shape, precision)
            object.__setattr__(self, "cells", cells)
            object.__setattr__(self, "cell_shares", shares)
        if self.cells.shape != self.cell_shares.shape or self.cells.ndim != 2:
            raise ValueError(
                f"cell_shares of shape {self.cells.shape} expected; found {self.cell_shares.shape}"
            )
        # Places of a cell without a pixel hold one all the same, of no weight.
        if not 0 <= self.cells.min() <= self.cells.max() < p:
            raise ValueError(f"pixels 0 to {p - 1} in cells expected")
        held = np.bincount(self.cells[self.cell_shares > 0], minlength=p)
        if len(held) != p or (held != 1).any():
            raise ValueError(f"cells that hold each of {p} pixels once expected")

    def _check_correction(self) -> None:
        """Raise ValueError unless the parts of the correction fit each other and what it sees."""
        if not self.correction:
            return
        if len(self.correction) != len(CORRECTION):
            raise ValueError(
                f"a correction of {len(CORRECTION)} parts expected; found {len(self.correction)}"
            )
        parts = dict(zip(CORRECTION, self.correction, strict=True))
        f = n_features(self.directions.shape[1], len(self.label_names), self.first.size - 1)
        widths = [f, *(parts[f"correction.b{layer}"].size for layer in range(1, N_LAYERS + 1)), 1]
        expected: dict[str, tuple[int, ...]] = {"correction.mean": (f,), "correction.inverse_spread": (f,)}
        for layer in range(1, N_LAYERS + 2):
            expected[f"correction.w{layer}"] = (widths[layer - 1], widths[layer])
            expected[f"correction.b{layer}"] = (widths[layer],)
        for name, shape in expected.items():
            if parts[name].shape != shape or not np.isfinite(parts[name]).all():
                raise ValueError(f"finite {name} of shape {shape} expected; found {parts[name].shape}")

    # -- what others ask of a mixture --------------------------------------------------------------------------

    @property
    def n_pixels(self) -> int:
        """Number of pixels p."""
        return self.wave.size

    @property
    def n_experts(self) -> int:
        """Number of experts K."""
        return self.first.size - 1 - self.n_foreign

    @property
    def n_coordinates(self) -> int:
        """Coordinates of a spectrum, the scale among them."""
        return self.keys.shape[1]

    @property
    def n_nuisances(self) -> int:
        """Linear nuisances."""
        return self.directions.shape[1] - self.n_coordinates

    @property
    def n_slopes(self) -> int:
        """Nuisances with a prior width of their own, which come first: slopes of the flux."""
        return self.n_nuisances - self.n_sky

    @property
    def is_linear(self) -> bool:
        """Whether all experts are linear: those of a posterior never are."""
        return False

    @cached_property
    def sizes(self) -> Sizes:
        """Shapes of the forward pass."""
        (m, t), (n_cells, cell) = self.gains.shape[:2], self.cells.shape
        return Sizes(
            self.n_pixels, n_cells, cell, self.n_coordinates, self.n_nuisances, m, t + 1,
            len(self.label_names) + 1, self.first.size - 1, self.n_slopes, len(self._groups.constant),
            bool(self.correction),
        )  # fmt: skip

    def stored(self) -> dict[str, NDArray]:
        """Every array of the mixture but its wave grid, by the names in `ORDER`."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name in ORDER}
        own |= dict(zip(("error.w1", "error.b1", "error.w2", "error.b2"), self.error_model, strict=True))
        own["n_sky"] = np.array([self.n_sky], np.int64)
        own["calibrated"] = np.array(self.calibrated, np.float32)
        own["scale_width"] = np.array([self.scale_width], np.float32)
        own["label_range"] = np.array(self.label_range, np.float32)
        return {name: own[name] for name in ORDER} | self._of_correction

    @property
    def _of_correction(self) -> dict[str, F32]:
        """Parts of the correction by their names; none if there is none."""
        return dict(zip(CORRECTION, self.correction, strict=False))

    @classmethod
    def from_stored(
        cls,
        wave: F64,
        arrays: dict[str, NDArray],
        label_names: tuple[str, ...],
        *,
        n_foreign: int = 0,
        blends: bool = False,
        n_fast: tuple[int, ...] = (),
    ) -> PosteriorMixture:
        """The inverse of `stored`; ValueError where the arrays do not fit together."""
        arrays = dict(arrays)
        w1, b1, w2, b2 = (arrays.pop(f"error.{name}") for name in ("w1", "b1", "w2", "b2"))
        low, high = (float(v) for v in arrays.pop("label_range"))
        width = float(arrays.pop("scale_width")[0])
        n_sky = int(arrays.pop("n_sky")[0])
        calibrated = tuple(float(value) for value in arrays.pop("calibrated"))
        correction = tuple(arrays.pop(name) for name in CORRECTION if name in arrays)
        return cls(
            wave=wave, **arrays, correction=correction, n_sky=n_sky, calibrated=calibrated, n_foreign=n_foreign,
            blends=blends, n_fast=n_fast, scale_width=width, label_range=(low, high), error_model=(w1, b1, w2, b2),
            label_names=label_names,
        )  # fmt: skip

    @cached_property
    def numbers(self) -> dict[str, NDArray]:
        """What the description asks for, derived from what is stored."""
        m, n = self.keys.shape
        t, labels = self.gains.shape[1:]
        tangents = self._all_tangents()
        # The scale itself is the last label.
        gains = np.zeros((m, t + 1, labels + 1), np.float32)
        gains[:, :t, :labels] = self.gains
        gains[:, t, labels] = self.scale_width
        scatter = np.concatenate([np.einsum("mll->ml", self.scatter), np.zeros((m, 1), np.float32)], axis=1)
        with_first = np.concatenate([self.scatter[:, 0], np.zeros((m, 1), np.float32)], axis=1)
        means = np.concatenate([self.labels, np.ones((m, 1), np.float32)], axis=1)
        experts = np.arange(self.first.size - 1)
        members = (np.repeat(experts, np.diff(self.first))[:, None] == experts).astype(np.float32)
        w1, b1, w2, b2 = self.error_model
        n_slopes, q, groups = self.n_slopes, self.n_nuisances, self._groups
        narrow = np.array(self.calibrated[1:], np.float64)
        # Sums that several threads share out depend on their number: the bits of a prediction must not.
        with one_blas_thread():
            precision, pull = self._library_as_one_cloud(tangents)
        return {
            "reference": self.reference,
            "noise_shape": self.noise_shape,
            "cells": self.cells,
            "cell_shares": self.cell_shares,
            "directions": self.directions,
            "library_precision": precision,
            "library_pull": pull,
            "keys_transposed": np.ascontiguousarray(self.keys.T),
            "tangents": tangents.astype(np.float32),
            "tangents_transposed": np.ascontiguousarray(tangents.transpose(0, 2, 1), np.float32),
            "gains": gains,
            "log_weights": self.log_weights,
            "labels": means,
            "scatter": scatter,
            "scatter_with_first": with_first,
            "members": members,
            "others": np.where(members.T > 0, np.float32(0), np.float32(-1e30)),
            "lowest": np.float32(self.label_range[0]),
            "highest": np.float32(self.label_range[1]),
            "follows_noise": (np.arange(q) >= q - self.n_sky).astype(np.float32),
            "calibrated": np.array(self.calibrated, np.float32),
            "narrow_slopes": np.diag(narrow),
            "narrow_variance": np.concatenate([narrow**2, np.ones(q - len(narrow))]),
            "group_precision": groups.precision,
            "group_pull": groups.pull,
            "group_constant": groups.constant,
            "behind_coordinates": np.eye(q, n + q, n, dtype=np.float32),
            "slopes_last": np.concatenate(
                [np.arange(n), np.arange(n + n_slopes, n + q), n + np.arange(n_slopes)]
            ),
            "unit_directions": np.eye(n + q, dtype=np.float32),
            "unit_nuisances": np.eye(q, dtype=np.float32),
            "unit_slopes": np.eye(n_slopes, dtype=np.float32),
            "unit_coordinates": np.eye(n, dtype=np.float32),
            "unit_tangents": np.eye(t + 1, dtype=np.float32),
            "error.w1": w1,
            "error.b1": b1,
            "error.w2": w2,
            "error.b2": b2,
            **self._of_correction,
        }

    def _all_tangents(self) -> NDArray:
        """Those of the clouds, and the change of a cloud's mean spectrum with the scale."""
        along = self.keys.copy()
        along[:, -1] = 1 / SCALE_UNIT
        return np.concatenate([self.tangents, self.scale_width * along[:, None]], axis=1)

    @cached_property
    def slow_clouds(self) -> NDArray[np.bool_]:
        """Which clouds are of stars, and not of stars that move, (m,)."""
        slow = np.zeros(len(self.keys), bool)
        for k, n_fast in enumerate(self.n_fast or (0,) * self.n_experts):
            slow[self.first[k] : self.first[k + 1] - n_fast] = True
        return slow

    def library_at_rest(self) -> tuple[F64, F64]:
        """As the numbers `library_precision` and `library_pull`, of the clouds of stars that hardly move."""
        if not any(self.n_fast):
            return self.numbers["library_precision"], self.numbers["library_pull"]
        with one_blas_thread():
            return self._library_as_one_cloud(self._all_tangents(), self.slow_clouds)

    def _library_as_one_cloud(
        self, tangents: NDArray, which: NDArray[np.bool_] | None = None
    ) -> tuple[F64, F64]:
        """P⁻¹ (n + q, n + q) and P⁻¹b₀ (n + q, 1) of the mean and covariance of all clouds, nuisances behind."""
        n, q = self.n_coordinates, self.n_nuisances
        share = np.exp(self.log_weights.astype(np.float64))
        if which is not None:
            share = np.where(which, share, 0.0)
        mean, covariance = self._as_one_cloud(tangents, share / share.sum())
        precision = np.eye(n + q)
        precision[:n, :n] = np.linalg.inv(covariance)
        return precision, precision @ np.concatenate([mean, np.zeros(q)])[:, None]

    def _as_one_cloud(self, tangents: NDArray, share: F64) -> tuple[F64, F64]:
        """Mean and covariance of spectra, in coordinates, of clouds of such shares."""
        keys, tangents = self.keys.astype(np.float64), tangents.astype(np.float64)
        mean = share @ keys
        apart = keys - mean
        covariance = (share * apart.T) @ apart + np.einsum(
            "m,mta,mtb->ab", share, tangents, tangents, optimize=True
        )
        return mean, covariance + np.eye(self.n_coordinates)

    @cached_property
    def _groups(self) -> Groups:
        """Stars and blends alike in T_eff, or in log g where the library lacks it, and no stars, as Gaussians."""
        n, rest = self.n_coordinates, self.n_coordinates + self.n_sky
        if not self.calibrated[0]:
            return Groups(np.empty((0, rest, rest)), np.empty((0, rest)), np.empty(0))
        n_stellar = self.n_experts + self.blends
        stars = np.arange(self.first[n_stellar])
        share = np.exp(self.log_weights.astype(np.float64))
        label = self.label_names.index("T_eff") if "T_eff" in self.label_names else 0
        order = stars[np.argsort(self.labels[stars, label], kind="stable")]
        below = np.cumsum(share[order]) - share[order] / 2
        group = np.minimum((N_GROUPS * below / share[stars].sum()).astype(int), N_GROUPS - 1)
        kinds = [order[group == g] for g in np.unique(group)]
        kinds += [np.arange(*self.first[k : k + 2]) for k in range(n_stellar, self.first.size - 1)]
        parts: list[tuple[F64, F64, float]] = []
        # The first coordinates, in which clouds differ most, the direction of what is no star, and the scale.
        last = min(2, n)
        apart = np.unique(np.concatenate([np.arange(min(N_APART, n) - last), np.arange(n - last, n)]))
        block = np.ix_(apart, apart)
        tangents = self._all_tangents()
        # Sums that several threads share out depend on their number.
        with one_blas_thread():
            mean, covariance = self._as_one_cloud(tangents, share / share.sum())
            whole, of_apart = np.linalg.inv(covariance), np.linalg.inv(covariance[block])
            whole_pull, pull_of_apart = whole @ mean, of_apart @ mean[apart]
            for kind in kinds:
                mine = np.zeros(len(share))
                mine[kind] = share[kind]
                mean, covariance = self._as_one_cloud(tangents, mine / mine.sum())
                own = np.linalg.inv(covariance[block])
                precision, pull = np.zeros((rest, rest)), np.zeros(rest)
                precision[:n, :n], pull[:n] = whole, whole_pull
                precision[block] += own - of_apart
                pull[apart] += own @ mean[apart] - pull_of_apart
                inside = precision[:n, :n]
                constant = 0.5 * (np.linalg.slogdet(inside)[1] - pull[:n] @ np.linalg.solve(inside, pull[:n]))
                parts.append((precision, pull, float(np.log(mine.sum()) + constant)))
        precisions, pulls, constants = zip(*parts, strict=True)
        return Groups(np.array(precisions), np.array(pulls), np.array(constants))

    # -- scoring -----------------------------------------------------------------------------------------------

    def describe(self, flux: NDArray, error: NDArray) -> dict[str, F64]:
        """Every output of the forward pass in NumPy and float64: the contract of the kernels and of ONNX."""
        numbers, parts = NumPyArithmetic(self.numbers), []
        for a in range(0, max(1, len(flux)), REFERENCE_ROWS):
            here = slice(a, a + REFERENCE_ROWS)
            with np.errstate(invalid="ignore", over="ignore"):
                x, sigma = flux[here].astype(np.float64), error[here].astype(np.float64)
                parts.append(forward(numbers, self.sizes, x, sigma))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def predict_reference(
        self, flux: NDArray, error: NDArray, mask: NDArray[np.bool_] | None = None
    ) -> Prediction:
        """Predictions by the description; see `predict`."""
        seen = error if mask is None else np.where(mask, np.nan, error)
        return self.prediction(self.describe(flux, seen))

    def prediction(self, found: dict[str, NDArray]) -> Prediction:
        """Predictions for users from the outputs of the forward pass."""
        names = self.label_names
        factors = self.label_factors.astype(np.float64)
        label, sd, cov = found["label"], found["label_sd"], found["label_cov"]
        count, k = len(names), self.n_experts
        correlation = cov[:, 1:count] / np.maximum(sd[:, :1] * sd[:, 1:count], 1e-12)
        errors = sd[:, :count] * factors
        errors[:, 0] = found["log_g_err"][:, 0]
        return Prediction(
            log_g=found["log_g"][:, 0],
            log_g_err=found["log_g_err"][:, 0],
            log_g_err_raw=sd[:, 0],
            weights=found["weights"][:, :k],
            expert_log_g=np.clip(found["expert_label"][:, :k], *self.label_range),
            chi2=found["chi2"][:, 0],
            log_level=found["log_level"][:, 0],
            labels=label[:, 1:count],
            label_errors=errors[:, 1:],
            label_correlations=np.clip(correlation, -1, 1),
            scale=found["scale"][:, 0] * label[:, count],
            distance=found["distance"][:, 0],
            strength=found["strength"][:, 0],
            foreign=np.maximum(1 - found["weights"][:, : k + self.blends].sum(1), 0),
            blend=found["weights"][:, k] if self.blends else None,
        )

    def predict(
        self, flux: F32, error: F32, mask: NDArray[np.bool_] | None = None, *, first_row: int = 0
    ) -> Prediction:
        """Predictions in float32 on the CPU kernels.

        Parameters
        ----------
        flux, error : array of shape (n, p), float32
            In any unit: the scale is free.
        mask : array of shape (n, p), bool, optional
            True where a pixel is bad whatever it holds. Rows without a good pixel get numbers that mean nothing.
        first_row : int
            Index of the first row in its file.
        """
        return self.score(flux, error, mask, first_row=first_row)[0]

    def score(
        self, flux: F32, error: F32, mask: NDArray[np.bool_] | None = None, *, first_row: int = 0
    ) -> tuple[Prediction, Quality]:
        """Predictions, and the quality of the spectra; see `predict`."""
        return self.of_kernels(cloud_posterior(flux, error, mask, *self.kernel_arrays))

    def of_kernels(self, found: CloudPosterior) -> tuple[Prediction, Quality]:
        """Predictions for users, and the quality of the spectra, from what the kernels of any backend give."""
        quality = Quality(found.snr_norm, found.snr_median, found.n_good, found.flag)
        return self.prediction(_as_described(found)), quality

    def outputs(
        self, flux: F32, error: F32, mask: NDArray[np.bool_] | None = None, *, backend: str = "cpu"
    ) -> dict[str, NDArray]:
        """Every output of the forward pass by the kernels; see `predict` and `moefast.posterior.forward`."""
        if backend == "cuda":
            # Once: threads would each make their own.
            with _MAKING:
                scorer = self._on_device
            return _as_described(scorer(flux, error, mask))
        return _as_described(cloud_posterior(flux, error, mask, *self.kernel_arrays, backend=backend))

    @cached_property
    def _on_device(self) -> Any:
        """Space and clouds on the device, as long as the mixture is kept."""
        return on_cuda("CudaPosteriorScorer", "cuda")(*self.kernel_arrays)

    @property
    def kernel_arrays(self) -> tuple[Space, Clouds]:
        """What the kernels read."""
        return self._space, self._clouds

    @cached_property
    def _space(self) -> Space:
        numbers = self.numbers
        return Space(
            reference=self.reference,
            noise_shape=self.noise_shape,
            directions=self.directions,
            n_nuisances=self.n_nuisances,
            cells=self.cells,
            cell_shares=self.cell_shares,
            precision=numbers["library_precision"],
            pull=numbers["library_pull"][:, 0],
            n_sky=self.n_sky,
            calibrated=self.calibrated,
            groups=self._groups,
        )

    @cached_property
    def _clouds(self) -> Clouds:
        numbers = self.numbers
        return Clouds(
            keys=self.keys,
            tangents=self.tangents,
            gains=numbers["gains"],
            log_weights=self.log_weights,
            labels=numbers["labels"],
            scatter=numbers["scatter"],
            scatter_with_first=numbers["scatter_with_first"],
            first=self.first,
            scale_unit=SCALE_UNIT,
            scale_width=self.scale_width,
            label_range=self.label_range,
            error_model=self.error_model,
            correction=self.correction,
        )


def _as_described(found: CloudPosterior) -> dict[str, NDArray]:
    """Outputs of the kernels in the shapes of the description's."""
    arrays = {one.name: getattr(found, one.name) for one in fields(found)}
    return {name: a[:, None] if a.ndim == 1 else a for name, a in arrays.items()}


AnyMixture = Mixture | PosteriorMixture
"""What a model may hold."""
