"""The fitted mixture: arrays, and the way from a block of spectra to log g.

Design: everything linear in flux or in variance is one projection (`moefast.kernels.project`). Experts live in a few
dozen columns of it, the noise-white principal components: what follows works on these numbers alone
(`moefast.kernels.soft_mix`): interpolate each expert between its noise levels, form the gate's features, mix, and turn
the spread and the propagated noise into a calibrated error. `moefast.forward` describes it once: `Mixture.predict` runs
it in float32 on the kernels, `Mixture.predict_reference` reads the description in plain float64 NumPy, and
`moefast.export` in ONNX; tests hold the three together.

Experts of other families stand in for linear ones (`moefast.experts.protocol`): posterior means over a library of
templates, heads on one trunk, trees, networks, or a family of the user's own. Their values are handed to the kernels
from outside, and so are logits for the gate: the library's evidence, Bayes' rule for the bin, those of the trunk, and
those of a second tower (`moefast.gating.tower`). An expert of any kind may have a residual beside it
(`moefast.experts.residual`), which is added to its value.

The noise of an expert, Σ_j w_j² σ_j², is propagated in cells of a few pixels, as Σ_g r_g Σ_{j in g} w_j² D_j with r_g
the mean of σ²/D over cell g: exact for noise of the training set's shape D times anything smooth. On simulated spectra
it is within 0.2 % rms of the sum over pixels; on spectra of another sky, within 9 %.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from moefast.core.line_features import LEAST_CONTINUUM, LINE_FEATURES, LINES, line_columns
from moefast.experts.protocol import Expert, Inputs, Place
from moefast.experts.template import Templates
from moefast.forward import Pass, forward
from moefast.gating.tower import FEATURES, VIEWS, Tower
from moefast.kernels import Given, Library, Mixed, Mixing, Projected, Projection, cell_size, project, soft_mix
from moefast.kernels.forward import LAYERS, Sizes
from moefast.kernels.reference import (
    error_inputs,
    gate_features,
    hat_weights,
    in_place_of,
    prepare_reference,
    window_features,
)
from moefast.ops.on_numpy import NumPyArithmetic
from moefast.spectra.quality import Quality, good_pixels

__all__ = ["N_GATE_COMPONENTS", "Mixture", "Prediction", "Prepared", "hat_weights", "n_gate_features"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Own = TypeVar("Own", bound=Expert)

REFERENCE_ROWS = 256
"""Stars that the float64 reference sees at once."""
N_GATE_COMPONENTS = 4
"""Principal components among the features of the published gate."""
LEAST_SPREAD = 1e-4
"""Floor in dex of spread and propagated noise before their logarithms are taken."""


def n_gate_features(n_components: int) -> int:
    """Features of a gate that sees so many components: the lines, these, the noise level."""
    return len(LINE_FEATURES) + n_components + 1


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
    labels, label_errors, label_correlations : array of shape (n, l), or None
        Other labels than log g, their calibrated 1σ, and their correlation with log g; only of posteriors.
    scale, distance, strength : array of shape (n,), or None
        Flux over that of the training set; what the best point of the space of spectra gains over the library, per
        coordinate; the scale over its error. Only of posteriors.
    foreign : array of shape (n,), or None
        Probability that the spectrum is that of no star. Only of posteriors.
    blend : array of shape (n,), or None
        Probability that the spectrum is the light of two stars. With `weights` and `foreign` it adds up to 1. Only of
        posteriors that know blends.
    """

    log_g: NDArray
    log_g_err: NDArray
    log_g_err_raw: NDArray
    weights: NDArray
    expert_log_g: NDArray
    chi2: NDArray
    log_level: NDArray
    labels: NDArray | None = None
    label_errors: NDArray | None = None
    label_correlations: NDArray | None = None
    scale: NDArray | None = None
    distance: NDArray | None = None
    strength: NDArray | None = None
    foreign: NDArray | None = None
    blend: NDArray | None = None


@dataclass(frozen=True)
class Prepared:
    """A block of n stars on its way to the gate.

    `features` (n, f) of the gate; `expert_log_g` (n, K) and its propagated noise `expert_noise` (n, K) at each star's
    noise level; `linear_log_g` (n, K) of the linear experts alone; `chi2` and `log_level` as in `Prediction`.
    """

    features: NDArray
    expert_log_g: NDArray
    expert_noise: NDArray
    linear_log_g: NDArray
    chi2: NDArray
    log_level: NDArray


@dataclass(frozen=True)
class Mixture:
    """K experts, linear at M noise levels unless others stand in for them, a gate, an error model.

    Attributes
    ----------
    wave : array of shape (p,), float64, Å
    reference : array of shape (p,)
        Spectrum subtracted first.
    noise_shape : array of shape (p,)
        Mean noise variance D per pixel.
    knots : array of shape (M,)
        ln s of the noise levels, evenly spaced, M ≥ 2.
    columns : array of shape (p, c)
        What the experts see of a spectrum: noise-white principal components T first, other directions after them.
    n_basis : int
        How many of the columns are principal components.
    expert_weights : array of shape (K, M, c)
        In the columns; `pixel_weights` has them in pixels.
    expert_intercepts : array of shape (K, M), dex
    gate : tuple of arrays W₁, b₁, W₂, b₂
        Takes the raw gate features: 9 of lines, `n_gate` components, the noise level.
    error_model : tuple of arrays W₁, b₁, W₂, b₂
        Takes the gate features, log g, ln σ_raw and ln spread; gives ln σ.
    label_range : tuple of float
        Predictions are clipped to it, dex.
    clipped : bool
        Flux below zero counts as zero. `log_g_err_raw` is then an upper bound: it is the noise before the cut.
    n_gate : int
        Principal components among the features of the gate.
    experts : tuple of Place
        Experts of other families and residuals, in the order in which they take their places. The noise of those that
        have none of their own is that of the linear expert in whose place they stand; that of an expert with a residual
        stays its own.
    tower : Tower, optional
        A second tower of the gate, whose logits are added to those of `gate`.
    """

    kind: ClassVar[str] = "mixture"

    wave: F64
    reference: F32
    noise_shape: F32
    knots: F32
    columns: F32
    n_basis: int
    expert_weights: F32
    expert_intercepts: F32
    gate: tuple[F32, F32, F32, F32]
    error_model: tuple[F32, F32, F32, F32]
    label_range: tuple[float, float]
    clipped: bool = False
    n_gate: int = N_GATE_COMPONENTS
    experts: tuple[Place, ...] = ()
    tower: Tower | None = None

    def __post_init__(self) -> None:
        k, m, c = self.expert_weights.shape
        p = self.wave.size
        if self.columns.shape != (p, c) or self.expert_intercepts.shape != (k, m):
            raise ValueError(
                f"experts {self.expert_weights.shape}, intercepts {self.expert_intercepts.shape}, "
                f"columns {self.columns.shape} and wave {self.wave.shape} do not fit together"
            )
        if self.knots.shape != (m,) or m < 2:
            raise ValueError(
                f"two noise levels at least, and as many as the experts have; found {self.knots.shape}"
            )
        if not self.n_gate <= self.n_basis <= c:
            raise ValueError(f"{self.n_gate} to {c} principal components expected; found {self.n_basis}")
        features = n_gate_features(self.n_gate)
        if self.gate[0].shape[0] != features or self.gate[2].shape[1] != k:
            raise ValueError(f"the gate must take {features} features and give {k} weights")
        if self.error_model[0].shape[0] != features + 3:
            raise ValueError(f"the error model must take {features + 3} features")
        taken: set[int] = set()
        beside: set[int] = set()
        for place in self.experts:
            mine = beside if place.added else taken
            if not all(0 <= i < k for i in place.bins) or mine & set(place.bins):
                raise ValueError(
                    f"each of the experts 0 … {k - 1} can be replaced once, and have one residual; found "
                    f"{[(p.expert.family, p.bins) for p in self.experts]}"
                )
            mine.update(place.bins)
            place.expert.check(k, self.n_basis, p)
        stems = [place.stem for place in self.experts]
        if len(set(stems)) < len(stems):
            raise ValueError(f"a mixture has one library and one network at most; found {stems}")
        if (tower := self.tower) is not None and (
            tower.n_experts != k or (tower.sees == FEATURES and tower.n_features != features)
        ):
            raise ValueError(
                f"a tower of {features} features for {k} experts expected; "
                f"found {tower.n_features} and {tower.n_experts}"
            )

    @property
    def n_pixels(self) -> int:
        """Number of pixels p."""
        return self.wave.size

    @property
    def n_experts(self) -> int:
        """Number of experts K."""
        return self.expert_intercepts.shape[0]

    @property
    def is_linear(self) -> bool:
        """Whether all experts are linear."""
        return not self.experts

    @property
    def families(self) -> list[str]:
        """Family of the expert of each bin; residuals aside."""
        found = ["linear"] * self.n_experts
        for place in self.experts:
            for k in () if place.added else place.bins:
                found[k] = place.expert.family
        return found

    def place(self, family: type[Own]) -> Own | None:
        """The expert of a family of which a mixture has one at most; None if it has none."""
        return next((place.expert for place in self.experts if isinstance(place.expert, family)), None)

    @property
    def clouds(self) -> tuple[Library | None, tuple[bool, ...]]:
        """The library of templates, if there is one, and which experts are its posterior means."""
        for place in self.experts:
            if isinstance(place.expert, Templates):
                return place.expert.library, tuple(k in place.bins for k in range(self.n_experts))
        return None, ()

    def with_expert(self, expert: Expert, *bins: int, added: bool = False) -> Mixture:
        """The mixture with one more expert, in the place of those that stood there.

        Parameters
        ----------
        expert : Expert
        *bins : int
            All if none is named.
        added : bool
            It is a residual, and added to the expert that stands there.
        """
        mine, places = bins or tuple(range(self.n_experts)), []
        for place in self.experts:
            left = tuple(k for k in place.bins if place.added != added or k not in mine)
            # Evidence of all bins still counts where others have taken the last place.
            if left or (place.expert.stem and type(place.expert) is not type(expert)):
                places.append(replace(place, bins=left))
        return replace(self, experts=(*places, Place(expert, mine, added)))

    @cached_property
    def sizes(self) -> Sizes:
        """Shapes that the description of the forward pass needs."""
        k, m, c = self.expert_weights.shape
        return Sizes(
            n_pixels=self.n_pixels, cell=cell_size(self.n_pixels), n_experts=k, n_levels=m, n_columns=c,
            n_basis=self.n_basis, n_leading=self.n_gate, n_windows=3 * len(LINES), clipped=self.clipped,
            least_continuum=LEAST_CONTINUUM, least_spread=LEAST_SPREAD,
        )  # fmt: skip

    @cached_property
    def numbers(self) -> dict[str, NDArray]:
        """Every number that `moefast.forward` asks for, by name."""
        weights = self.expert_weights
        numbers: dict[str, NDArray] = {
            "reference": self.reference,
            "noise_shape": self.noise_shape,
            "projection": np.concatenate([self.columns, self.line_columns], axis=1),
            "cell_matrix": self.cell_matrix,
            "captured": self.captured,
            "knots": self.knots,
            "experts.weights": weights.transpose(2, 0, 1).reshape(weights.shape[2], -1),
            "experts.intercepts": self.expert_intercepts,
            "lines.offsets": self.line_offsets,
            "lines.widths": self.line_widths,
            "label_range": np.array(self.label_range),
            "least_flux": np.zeros(1, np.float32),
        }
        for name in ("gate", "error_model"):
            layers = zip(LAYERS, getattr(self, name), strict=True)
            numbers |= {f"{name}.{layer}": array for layer, array in layers}
        return numbers

    @property
    def basis(self) -> F32:
        """Noise-white principal components T, (p, r)."""
        return self.columns[:, : self.n_basis]

    @cached_property
    def pixel_weights(self) -> F64:
        """Weights of the experts in pixels, (p, K, M), float64."""
        return np.einsum(
            "pc,kmc->pkm", *(a.astype(np.float64) for a in (self.columns, self.expert_weights)), optimize=True
        )

    @cached_property
    def line_columns(self) -> F32:
        """Columns of the line features, (p, 12); zero for lines that are not on the grid.

        A fit whose gate sees the lines has made sure that they are.
        """
        return line_columns(self.wave, all_lines=False).astype(np.float32)

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
    def cell_matrix(self) -> F32:
        """Σ w² D of each expert and noise level over the pixels of a cell, (p / cell, M · K)."""
        noise = self.pixel_weights**2 * self.noise_shape[:, None, None]
        cells = noise.reshape(-1, cell_size(self.n_pixels), *noise.shape[1:]).sum(1)
        return cells.transpose(0, 2, 1).reshape(len(cells), -1).astype(np.float32)

    @cached_property
    def projection(self) -> Projection:
        """What is done to a spectrum: see `moefast.kernels.Projection`."""
        return Projection(
            self.reference, self.noise_shape, self.columns, self.line_columns, self.cell_matrix, self.captured,
            self.clipped,
        )  # fmt: skip

    @cached_property
    def mixing(self) -> Mixing:
        """What is done to its projection: see `moefast.kernels.Mixing`."""
        return Mixing(
            self.knots, self.expert_weights, self.expert_intercepts, self.n_basis, self.n_gate,
            self.line_offsets, self.line_widths, LEAST_CONTINUUM, LEAST_SPREAD, self.gate, self.error_model,
            self.label_range,
        )  # fmt: skip

    def predict(
        self, flux: F32, error: F32, mask: NDArray[np.bool_] | None = None, *, first_row: int = 0
    ) -> Prediction:
        """Predictions in float32 on the CPU kernels.

        Pixels whose flux is not finite, or whose error is not positive or above 1e6, have no weight.

        Parameters
        ----------
        flux, error : array of shape (n, p), float32
        mask : array of shape (n, p), bool, optional
            True where a pixel is bad whatever it holds. Rows without a good pixel get numbers that mean nothing.
        first_row : int
            Index of the first row in its file (see `moefast.kernels.project`).
        """
        return self.score(flux, error, mask, first_row=first_row)[0]

    def score(
        self, flux: F32, error: F32, mask: NDArray[np.bool_] | None = None, *, first_row: int = 0
    ) -> tuple[Prediction, Quality]:
        """Predictions, and the quality of the spectra that the same look at them gives; see `predict`."""
        linear = project(flux, error, mask, self.projection, first_row=first_row)
        quality = Quality(linear.snr_norm, linear.snr_median, linear.n_good, linear.flag)
        given = self.given(linear, flux, error, mask)
        return _prediction(soft_mix(linear, self.mixing, given), linear), quality

    def prepare(
        self, flux: F32, error: F32, mask: NDArray[np.bool_] | None = None, *, first_row: int = 0
    ) -> Prepared:
        """Everything up to the gate; see `predict` for the parameters."""
        linear = project(flux, error, mask, self.projection, first_row=first_row)
        given = self.given(linear, flux, error, mask)
        features, own, noise, chi2 = prepare_reference(linear, self.mixing)
        experts, noise = in_place_of(own, noise, given)
        return Prepared(features, experts, noise, own, chi2, linear.log_level)

    def by_evidence(self, flux: F32, error: F32, mask: NDArray[np.bool_] | None = None) -> NDArray | None:
        """Log g of the experts mixed by Bayes' rule, (n,): by the evidence of the library and by nothing else.

        None without a library. See `predict` for the parameters.
        """
        library = self.place(Templates)
        if library is None:
            return None
        linear = project(flux, error, mask, self.projection)
        evidence = library.posterior(self.inputs(linear)).evidence
        weights = np.exp(evidence.astype(np.float64))
        experts = self.prepare(flux, error, mask).expert_log_g
        return np.clip((weights * experts).sum(1) / weights.sum(1), *self.label_range)

    def predict_reference(
        self, flux: NDArray, error: NDArray, mask: NDArray[np.bool_] | None = None
    ) -> Prediction:
        """The same by the description of the forward pass, read in NumPy and float64: the contract of `predict`."""
        seen = error if mask is None else np.where(mask, np.nan, error)
        op, parts = NumPyArithmetic(self.numbers), []
        for a in range(0, max(1, len(flux)), REFERENCE_ROWS):
            here = slice(a, a + REFERENCE_ROWS)
            with np.errstate(invalid="ignore", over="ignore"):
                parts.append(forward(op, self, flux[here].astype(np.float64), seen[here].astype(np.float64)))
        found = Pass(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        return Prediction(
            found.log_g[:, 0], found.log_g_err[:, 0], found.log_g_err_raw[:, 0], found.weights, found.expert_log_g,
            found.chi2[:, 0], found.log_level[:, 0],
        )  # fmt: skip

    def given(
        self, linear: Projected, flux: NDArray, error: NDArray, mask: NDArray[np.bool_] | None
    ) -> Given | None:
        """What experts that are not linear say of projected stars, and what is added to the gate's logits.

        Parameters
        ----------
        linear : Projected
        flux, error, mask
            The spectra that it comes from.

        Returns
        -------
        Given or None
            None for a mixture of linear experts and a plain gate.
        """
        if self.is_linear and self.tower is None:
            return None
        shape = (len(linear.columns), self.n_experts)
        values, noise = (np.full(shape, np.nan, np.float32) for _ in range(2))
        logits = np.zeros(shape, np.float32)
        if self.experts:
            inputs = self._whole_inputs(linear, flux, error, mask)
            own_values, own_noise = self._linear(linear) if self._needs_linear else (values, noise)
        for place in (one for one in self.experts if not one.added):
            bins = list(place.bins)
            found = place.expert.evaluate(inputs)
            mine = found.noise if found.noise is not None else own_noise
            for all_bins, one in ((values, found.log_g), (noise, mine)):
                all_bins[:, bins] = one[:, bins] if one.shape[1] == self.n_experts else one
            if found.evidence is not None:
                logits = logits + found.evidence
        for place in (one for one in self.experts if one.added):
            (k,) = place.bins
            if self.families[k] == "linear":
                values[:, k], noise[:, k] = own_values[:, k], own_noise[:, k]
            seen = inputs._replace(value=values[:, k], linear=own_values[:, k])
            values[:, k] += place.expert.evaluate(seen).log_g[:, 0]
        if self.tower is not None:
            view = self._view(self.tower, linear, flux, error, mask)
            logits = logits + self.tower.logits(linear.snr_norm, view)
        return Given(values, noise, logits)

    @cached_property
    def _needs_linear(self) -> bool:
        """Whether anything stands on what linear experts say of a star: the noise of others, or a residual."""
        return any(place.added or not place.expert.has_noise for place in self.experts)

    def _linear(self, linear: Projected) -> tuple[NDArray, NDArray]:
        """Values and noise of the linear experts, (n, K)."""
        _, values, noise, _ = prepare_reference(linear, self.mixing)
        return values, noise

    def _whole_inputs(
        self, linear: Projected, flux: NDArray, error: NDArray, mask: NDArray[np.bool_] | None
    ) -> Inputs:
        """What experts see of stars, with the flux if one of them asks for it."""
        inputs = self.inputs(linear)
        if not any(place.expert.needs_flux for place in self.experts):
            return inputs
        good, x = good_pixels(flux, error, mask), np.maximum(flux, 0) if self.clipped else flux
        return inputs._replace(x=x if good is None else np.where(good, x, self.reference.astype(x.dtype)))

    def _view(
        self, tower: Tower, linear: Projected, flux: NDArray, error: NDArray, mask: NDArray[np.bool_] | None
    ) -> Callable[[NDArray[np.intp]], NDArray]:
        """What a tower sees of some rows."""

        def features(rows: NDArray[np.intp]) -> NDArray:
            leading = linear.columns[rows, : self.n_gate]
            return gate_features(linear.windows[rows], leading, linear.log_level[rows], self.mixing)

        if tower.sees == FEATURES:
            return features
        view = VIEWS[tower.sees]

        def seen(rows: NDArray[np.intp]) -> NDArray:
            good = good_pixels(flux[rows], error[rows], None if mask is None else mask[rows])
            return view.of_stars(None if view.of_errors else features(rows), error[rows], good)

        return seen

    def inputs(self, linear: Projected) -> Inputs:
        """What experts that are not linear see of projected stars, but for the flux."""
        z, lines = linear.columns[:, : self.n_basis], window_features(linear.windows, self.mixing)
        return Inputs(z, linear.log_level, lines, least_level=np.maximum(linear.log_level, self.knots[0]))

    def error_features(self, features: NDArray, log_g: NDArray, raw: NDArray, spread: NDArray) -> NDArray:
        """What the error model sees: gate features, log g, ln σ_raw, ln spread."""
        return error_inputs(features, log_g, raw, spread, LEAST_SPREAD)


def _prediction(mixed: Mixed, linear: Projected) -> Prediction:
    return Prediction(
        mixed.log_g, mixed.log_g_err, mixed.log_g_err_raw, mixed.weights, mixed.expert_log_g, mixed.chi2,
        linear.log_level,
    )  # fmt: skip
