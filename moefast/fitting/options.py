"""How to fit: the options, a group for each stage with the rules that hold in it, and which of them go together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from moefast.core.errors import InputError
from moefast.core.grids import METAL_POOR, Grid, SnrGrid
from moefast.experts.protocol import fitted_in_bins
from moefast.gating.tower import known_views
from moefast.trunks.networks import KINDS, Kind
from moefast.trunks.presets import SIZES, Size

__all__ = [
    "RESIDUALS",
    "STRETCH",
    "WHOLE",
    "GateOptions",
    "LinearOptions",
    "NetworkOptions",
    "Noise",
    "NoiseOptions",
    "Options",
    "PosteriorOptions",
    "SampleOptions",
]

Noise = Literal["closed-form", "sampled", "observed"]
WHOLE = ("linear", "template", "heads", "posterior")
"""Families that are fitted on the stars of all bins together, and stand alone or bring evidence."""
RESIDUALS = ("linear", "ridge", "trees")
STRETCH = 512
"""Rows of one stretch of the sample."""


@dataclass(frozen=True)
class NoiseOptions:
    """The noise of the training spectra.

    Attributes
    ----------
    noise : "closed-form", "sampled" or "observed"
        Clean flux with noise added to the normal equations in closed form; clean flux with one noise draw per row;
        or flux that is noisy already (`noisy` where a file has it).
    noise_level : float
        Factor on the errors of the files.
    clipped : bool
        Flux is set to zero where it is negative, by the fit and by the model, as published. Noise in closed form is
        that of flux as it is: clipped flux must be sampled or observed.
    """

    noise: Noise = "closed-form"
    noise_level: float = 1.0
    clipped: bool = False

    @property
    def noise_inside(self) -> float:
        """Mean squared noise level that the totals contain: those of noisy rows hold the noise already."""
        return 0.0 if self.noise == "closed-form" else 1.0

    def check_noise(self) -> None:
        """Raise `InputError` unless these options go together."""
        if self.noise not in get_args(Noise):
            raise InputError(f"noise must be one of {get_args(Noise)}, found {self.noise!r}")
        if not self.noise_level > 0:
            raise InputError(f"the noise level must be positive, found {self.noise_level}")
        if self.noise == "observed" and self.noise_level != 1:
            raise InputError("observed spectra have the noise they have; leave the noise level at 1")
        if self.clipped and self.noise == "closed-form":
            raise InputError("noise in closed form is that of flux as it is; clip sampled or observed flux")


@dataclass(frozen=True)
class LinearOptions:
    """Linear experts.

    Attributes
    ----------
    alpha : float, optional
        Ridge penalty per row, in flux² (scikit-learn's alpha over n), of experts in pixel space that are the same at
        every noise level. If None, the penalty of each bin is chosen by cross-validation and its expert is solved
        for each noise level.
    n_levels : int
        Noise levels per expert.
    n_components : int, optional
        Principal components of a spectrum that experts see at most. If None, as many as their cross-validated R² needs.
    n_folds : int
        Folds for cross-validation and cross-fitting.
    """

    alpha: float | None = None
    n_levels: int = 8
    n_components: int | None = None
    n_folds: int = 3

    def check_linear(self) -> None:
        """Raise `InputError` unless these options make sense."""
        if self.alpha is not None and not self.alpha > 0:
            raise InputError(f"alpha must be positive, or None to have it chosen; found {self.alpha}")
        if self.n_folds < 2 or self.n_levels < 2:
            raise InputError("at least two folds and two noise levels are needed")
        if self.n_components is not None and self.n_components < 1:
            raise InputError(f"at least one component is needed; found {self.n_components}")


@dataclass(frozen=True)
class PosteriorOptions:
    """A "posterior".

    Attributes
    ----------
    n_clouds, n_tangents : int
        Clouds, and tangents of each.
    n_coordinates : int, optional
        Coordinates in which clouds are told, those that say most of log g; as many as components by default. Time grows
        with their square.
    n_gravity_bins : int
        The number of bins of log g, in each bin of the grid, whose stars are one cloud each. If 0, clouds are found by
        k-means instead, and their number is `n_clouds`.
    slope_widths : tuple of float
        Prior widths of Legendre polynomials 1, 2, … of wavelength times the mean spectrum, by which calibration, slope
        and reddening may change a spectrum. Empty where the calibration can be trusted.
    calibrated : tuple of float
        Share of spectra, at least 0 and below 1, whose flux is calibrated better than that, and behind it how wide each
        slope is in these, relative to `slope_widths`. Which spectra they are, their own evidence tells.
    sky_width : float
        Prior width of residuals of the sky's lines, in standard deviations of the noise where the lines are brightest;
        0 where sky subtraction is perfect, as in simulations.
    beyond : bool
        Whether it also holds clouds of stars that are hotter than the training set.
    n_blends : int
        Clouds besides of blends, the light of two stars; 0 where no spectrum is one.
    correction_draws : int
        Noisy draws, at most, of which a network learns what clouds leave out of log g; 0 for none. Of few training
        spectra none is learnt, and one that does not help is not kept.
    """

    n_clouds: int = 440
    n_tangents: int = 5
    n_coordinates: int | None = None
    n_gravity_bins: int = 0
    slope_widths: tuple[float, ...] = ()
    calibrated: tuple[float, ...] = (0.0,)
    sky_width: float = 0.0
    beyond: bool = False
    n_blends: int = 0
    correction_draws: int = 0

    def check_posterior(self) -> None:
        """Raise `InputError` unless these options make sense."""
        share, *narrow = self.calibrated
        if not (0 <= share < 1 and all(0 < width <= 1 for width in narrow)) or len(narrow) != (
            len(self.slope_widths) if share else 0
        ):
            raise InputError(
                "calibrated: a share of spectra below 1 and, if it is not 0, a relative width of at most 1 for each of "
                f"slope_widths expected; found {self.calibrated} and {self.slope_widths}"
            )
        if (
            self.n_clouds < 1
            or self.n_tangents < 0
            or (self.n_coordinates is not None and self.n_coordinates < 1)
            or self.n_gravity_bins < 0
            or self.n_blends < 0
            or self.correction_draws < 0
            or not all(0 < width < math.inf for width in self.slope_widths)
        ):
            raise InputError(
                "clouds, tangents, coordinates, bins of log g, clouds of blends, draws of a correction and positive "
                f"widths of slopes expected; found {self.n_clouds}, {self.n_tangents}, {self.n_coordinates}, "
                f"{self.n_gravity_bins}, {self.n_blends}, {self.correction_draws}, {self.slope_widths}"
            )


@dataclass(frozen=True)
class NetworkOptions:
    """The network of "heads".

    Attributes
    ----------
    trunk : "pca-mlp", "cnn" or "vit"
        What it is; see `moefast.trunks.networks`.
    size : "small" or "base"
        For a laptop or for a GPU.
    steps : int, optional
        Number of training steps; the default depends on `size`.
    """

    trunk: Kind = "pca-mlp"
    size: Size = "small"
    steps: int | None = None

    def check_network(self) -> None:
        """Raise `InputError` unless these options make sense."""
        if self.trunk not in KINDS or self.size not in SIZES or (self.steps is not None and self.steps < 1):
            raise InputError(
                f"a trunk is one of {', '.join(KINDS)}, its size one of {', '.join(SIZES)}, its steps positive; found "
                f"{self.trunk!r}, {self.size!r}, {self.steps}"
            )


@dataclass(frozen=True)
class GateOptions:
    """The gate.

    Attributes
    ----------
    n_gate : int
        Principal components among the features of the gate, at most.
    first_tower : bool
        Whether the gate learns from lines and components. If not, it is the second tower alone.
    tower : str, optional
        What a second tower of the gate sees, if there is to be one: "features" or one of `moefast.gating.tower.VIEWS`.
    tower_limit : float
        Largest snr_norm of the stars that the second tower is applied to.
    evidence : bool
        Whether the evidence of a library counts. If not, the gate is fitted without it: the weights are those with the
        least squared error of the mixture.
    """

    n_gate: int = 48
    first_tower: bool = True
    tower: str | None = None
    tower_limit: float = math.inf
    evidence: bool = True

    def check_gate(self) -> None:
        """Raise `InputError` unless these options go together."""
        if self.n_gate < 1:
            raise InputError(f"at least one component, also for the gate, is needed; found {self.n_gate}")
        if self.tower not in (None, *known_views()) or not self.tower_limit > 0:
            raise InputError(
                f"a second tower sees one of {known_views()} up to a positive snr_norm; "
                f"found {self.tower!r} and {self.tower_limit}"
            )
        if not self.first_tower and (self.tower is None or self.tower_limit < math.inf):
            raise InputError("a gate without its first tower needs a second one without a limit")
        if not self.evidence and not self.first_tower:
            raise InputError("a gate without evidence needs its first tower, which is fitted instead")


@dataclass(frozen=True)
class SampleOptions:
    """The sample of the second pass, for gate and error model.

    Attributes
    ----------
    sample_rows, sample_draws : int
        Rows, and noise draws of each, at most; of few rows more draws are taken.
    """

    sample_rows: int = 120_000
    sample_draws: int = 24

    def check_sample(self) -> None:
        """Raise `InputError` unless there is a sample."""
        if self.sample_rows < STRETCH or self.sample_draws < 1:
            raise InputError(
                f"at least {STRETCH} sample rows and one draw are needed; found {self.sample_rows}, {self.sample_draws}"
            )


@dataclass(frozen=True)
class Options(NoiseOptions, LinearOptions, PosteriorOptions, NetworkOptions, GateOptions, SampleOptions):
    """How to fit: the options of all stages, and what is to be fitted.

    Attributes
    ----------
    grid : Grid or SnrGrid
        One expert per bin of T_eff × [M/H], or of snr_norm; a 1 × 1 grid is a global fit.
    families : tuple of str
        Kinds of experts: "linear", "template" (posterior means over a library of templates, stars of the training set,
        whose evidence is the gate), or, alone, "heads" on one trunk, a network with its own gate, or "posterior",
        clouds of templates at each star's own noise and gaps. Beside "linear" also any family that is fitted bin by
        bin, such as "trees" (`moefast.experts.protocol`). Of several, each bin gets the best.
    metal_poor_families : tuple of str
        Families, fitted bin by bin, that bins of metal-poor stars choose from besides.
    residuals : tuple of str
        Kinds of residuals that are tried beside each expert, of "linear", "ridge" and "trees"; see
        `moefast.experts.residual`.
    residual_focus : bool
        Whether residuals learn from metal-poor and from faint stars alone, and to be zero elsewhere.
    references : bool
        Also fit the published-style ridge that results are compared with; doubles the work of the first pass.
    seed : int
    """

    grid: Grid | SnrGrid = field(default_factory=Grid)
    families: tuple[str, ...] = ("linear",)
    metal_poor_families: tuple[str, ...] = ()
    residuals: tuple[str, ...] = ()
    residual_focus: bool = False
    references: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        self.check_noise()
        self.check_linear()
        self._check_families()
        self.check_network()
        self.check_posterior()
        self.check_gate()
        self.check_sample()
        self._check_together()

    @property
    def all_families(self) -> tuple[str, ...]:
        """Families of all bins, and those of metal-poor bins besides."""
        return (*self.families, *self.metal_poor_families)

    @property
    def needs_clean(self) -> bool:
        """Whether training spectra must be without noise: those of all families but linear experts."""
        return self.all_families != ("linear",)

    @property
    def metal_poor_bins(self) -> tuple[int, ...]:
        """Bins whose stars are all metal-poor, but for those beyond the grid."""
        poor = self.grid.metal_poor if isinstance(self.grid, Grid) else np.zeros(0, np.bool_)
        return tuple(np.flatnonzero(poor).tolist())

    @property
    def n_simpler_fits(self) -> int:
        """How many simpler fits are made beside: the published-style ridge, and four of the experts' totals."""
        return int(self.references) + (4 if self.alpha is None else 0)

    @property
    def has_published(self) -> bool:
        """Whether the published-style ridge has totals of its own: clipped draws are what it is fitted on."""
        return self.references and not self.clipped

    @property
    def has_sampled_oracle(self) -> bool:
        """Whether the choice of families is compared with a fit of drawn noise, which has a first pass of its own."""
        return len(self.all_families) > 1 and self.references and self.noise == "closed-form"

    def _check_families(self) -> None:
        named, own = set(self.families), fitted_in_bins()
        in_bins = named - set(WHOLE)
        apart = {"heads", "posterior"} & named or "linear" not in named
        if not named or not in_bins <= own or ((len(named) > 1 or in_bins) and apart):
            raise InputError(
                f"families: expected linear, alone or with any of {', '.join(sorted(own | {'template'}))}, or one of "
                f"template, heads, posterior alone; found {', '.join(self.families) or 'none'}"
            )
        further = set(self.metal_poor_families)
        if further and (further - own or further & named or apart or not self.metal_poor_bins):
            raise InputError(
                f"families of metal-poor bins must be of {', '.join(sorted(own))}, beside linear and not among those "
                f"of all bins, and the grid needs a bin that ends at [M/H] = {METAL_POOR:g} or below; found "
                f"{self.metal_poor_families} beside {self.families}"
            )
        if set(self.residuals) - set(RESIDUALS):
            raise InputError(f"residuals must be of {', '.join(RESIDUALS)}; found {self.residuals}")
        if self.residual_focus and not self.residuals:
            raise InputError(
                "residuals can learn from some stars alone only where there are residuals; name them"
            )

    def _check_together(self) -> None:
        """What the families ask of the other groups."""
        if not self.needs_clean:
            return
        if self.alpha is not None or self.noise != "closed-form":
            raise InputError(
                "posteriors, templates, trees and networks need clean training spectra, with noise in closed form, and "
                "experts in principal components; for other spectra fit phys-moe"
            )
        if isinstance(self.grid, SnrGrid) or self.tower is not None:
            raise InputError(
                "experts by snr_norm and gates of two towers are for linear experts; choose one or the other"
            )
        if not self.evidence and {"heads", "posterior"} & set(self.families):
            raise InputError(
                f"the gate of {self.families[0]} is its own; a gate without evidence is for families fitted bin by bin "
                "and templates"
            )
