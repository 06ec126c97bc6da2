"""From spectra, in files or simulated, to a fitted mixture in two passes.

Design: the first pass gathers normal equations per bin and fold. Everything linear follows from them: the noise-white
principal components, experts at every noise level, their penalties by cross-validation, the reference fits. The second
pass reads a bounded sample of rows, gives each a few noise draws and the predictions of experts that never saw it,
and trains gate and error model on those. Time grows linearly with rows, memory not at all. The first pass, which takes
nearly all of the time of a large fit, can be kept in a checkpoint.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import scipy.sparse.linalg
from numpy.typing import NDArray

from moefast.backend import physical_memory
from moefast.checkpoint import Checkpoint
from moefast.errors import BackendError, InputError, LabelError, WaveGridError
from moefast.experts.choice import choose
from moefast.experts.device import DeviceEquations
from moefast.experts.inputs import Expert, Inputs
from moefast.experts.normal_equations import Moments, NormalEquations
from moefast.experts.residual import choose_residuals, fit_linear_residual, fit_ridge_residual, regions
from moefast.experts.ridge import NoisePath, Subspace, principal_subspace, ridge
from moefast.experts.template import choose_library, fit_library
from moefast.gating.features import LEAST_CONTINUUM, line_columns
from moefast.gating.mlp import fit_error_model, fit_gate, softmax
from moefast.gating.tower import Sees, Tower, quality_logs
from moefast.kernels import Library, Projected, all_within, perceptron, project, tangent_posterior
from moefast.kernels.reference import prepare_reference
from moefast.mixture import Mixture, hat_weights, n_gate_features
from moefast.noise import add_noise, fold_of_rows
from moefast.protocol.bins import METAL_POOR, SNR_NORM_NAMES, Grid, SnrGrid, assign_snr_bins
from moefast.protocol.metrics import r2
from moefast.spectra.files import SpectrumSet
from moefast.spectra.quality import good_pixels
from moefast.threads import one_blas_thread
from moefast.trunks.heads import Heads
from moefast.trunks.networks import KINDS, SEES_FLUX, Kind, Plan, start
from moefast.trunks.presets import PRESETS, SIZES, Size

if TYPE_CHECKING:
    from moefast.experts.trees import Trees
    from moefast.simulate.source import SimulatedSpectra

__all__ = ["Fit", "LinearForm", "Noise", "Options", "fit_mixture"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Noise = Literal["closed-form", "sampled", "observed"]
FAMILIES = ("linear", "template", "trees", "heads")
RESIDUALS = ("linear", "ridge", "trees")
Progress = Callable[[str, int, int], None]

BLOCK_ROWS = 2048
STRETCH = 512
"""Rows of one stretch of the sample."""
ALPHAS = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0)
"""Ridge penalties tried per bin, in units of the mean noise variance per star."""
RANK_STEP = 16
RANK_LOSS = 3e-4
"""R² that may be lost by leaving out the last principal components."""
N_COMPONENTS = 48
"""Principal components for gate and χ² of a fit in pixel space."""
PUBLISHED_ALPHA = 0.1
"""Ridge penalty per row of the published fit: 1e5 at one million stars."""
LEVEL_ROWS = 30_000
"""Rows that say which noise levels there are."""
NOISY_ROWS = 600_000
"""Noisy rows for gate and error model: a gate of fifty features gains until there are some hundred thousand."""
TOWER_ROWS = 800_000
"""Noisy rows of a tower for faint stars."""
TOWER_HIDDEN = {"features": 128, "quality": 32}
TOWER_STEPS = 10_000
LIBRARY_ROWS = 200_000
"""Stars that a library is made of at most: a thousand clouds of two hundred."""
FOREST_ROWS = 100_000
"""Stars that the forests of all bins are grown on at most."""
RESIDUAL_TREES, RESIDUAL_LEAF = 100, 500
"""Trees of a residual, and rows in a leaf: a strong answer leaves little to find, and much noise to fall for."""
LEAST_WEIGHT = 0.02
"""Gate weight of an expert from which on a star counts in its residual's forest."""
LEAST_RESIDUAL_STARS = 200
"""Stars that a residual is fitted on at the least."""
RESIDUAL_PENALTY = 0.1
"""Of the ridge, as a share of each feature's variance."""
CHOICE_ROWS = 8_000
"""Noisy stars on which its size is chosen, and a network judged."""
HALF_MEMORY = 0.5
"""Share of the memory that the clean stars of a network may take."""
LARGEST_HALF = 6e4
"""Bound of numbers kept in half precision."""
CHI2_QUANTILE = 0.999
LARGEST_RATIO = 1e3
"""Pixels with more than this times the usual error, or this times the usual flux (1), are bad pixels to the fit."""
Z_95 = 1.959964


@dataclass(frozen=True)
class Options:
    """How to fit.

    Attributes
    ----------
    grid : Grid or SnrGrid
        One expert per bin of T_eff × [M/H], or of snr_norm; a 1 × 1 grid is a global fit.
    noise : "closed-form", "sampled" or "observed"
        Clean flux with noise added to the normal equations in closed form; clean flux with one noise draw per row;
        or flux that is noisy already (`noisy` where a file has it).
    noise_level : float
        Factor on the errors of the files.
    clipped : bool
        Flux is set to zero where it is negative, by the fit and by the model, as published. Noise in closed form is
        that of flux as it is: clipped flux must be sampled or observed.
    alpha : float, optional
        Ridge penalty per row, in flux² (scikit-learn's alpha over n), of experts in pixel space that are the same at
        every noise level. If None, the penalty of each bin is chosen by cross-validation and its expert is solved
        for each noise level.
    n_levels : int
        Noise levels per expert.
    n_components : int, optional
        Principal components of a spectrum that experts see at most. If None, as many as their cross-validated R² needs.
    families : tuple of str
        Kinds of experts: "linear", "template" (posterior means over a library of templates, stars of the training set,
        whose evidence is the gate), "trees", or "heads" on one trunk, a network with its own gate, which stands alone.
        Of several, "linear" among them, each bin gets the best.
    trunk : "pca-mlp", "cnn" or "vit"
        What the network of "heads" is; see `moefast.trunks.networks`.
    size : "small" or "base"
        Of that network: for a laptop or for a GPU.
    steps : int, optional
        Of its fit; what belongs to the size if None.
    residuals : tuple of str
        Kinds of residuals that are tried beside each expert, of "linear", "ridge" and "trees"; see
        `moefast.experts.residual`.
    n_gate : int
        Principal components among the features of the gate, at most.
    first_tower : bool
        Whether the gate learns from lines and components. If not, it is the second tower alone.
    tower : "features" or "quality", optional
        What a second tower of the gate sees, if there is to be one; see `moefast.gating.tower`.
    tower_limit : float
        Largest snr_norm of the stars that the second tower speaks to.
    n_folds : int
        Folds for cross-validation and cross-fitting.
    sample_rows, sample_draws : int
        Rows, and noise draws of each, for gate and error model, at most; of few rows more draws are taken.
    references : bool
        Also fit the published-style ridge that results are compared with; doubles the work of the first pass.
    seed : int
    """

    grid: Grid | SnrGrid = field(default_factory=Grid)
    noise: Noise = "closed-form"
    noise_level: float = 1.0
    clipped: bool = False
    alpha: float | None = None
    n_levels: int = 8
    n_components: int | None = None
    families: tuple[str, ...] = ("linear",)
    trunk: Kind = "pca-mlp"
    size: Size = "small"
    steps: int | None = None
    residuals: tuple[str, ...] = ()
    n_gate: int = 48
    first_tower: bool = True
    tower: Sees | None = None
    tower_limit: float = math.inf
    n_folds: int = 3
    sample_rows: int = 120_000
    sample_draws: int = 24
    references: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.noise not in get_args(Noise):
            raise InputError(f"noise must be one of {get_args(Noise)}, found {self.noise!r}")
        if not self.noise_level > 0:
            raise InputError(f"the noise level must be positive, found {self.noise_level}")
        if self.noise == "observed" and self.noise_level != 1:
            raise InputError("observed spectra have the noise they have; leave the noise level at 1")
        if self.clipped and self.noise == "closed-form":
            raise InputError("noise in closed form is that of flux as it is; clip sampled or observed flux")
        if self.alpha is not None and not self.alpha > 0:
            raise InputError(f"alpha must be positive, or None to have it chosen; found {self.alpha}")
        if self.n_folds < 2 or self.n_levels < 2:
            raise InputError("at least two folds and two noise levels are needed")
        unknown, several = set(self.families) - set(FAMILIES), len(self.families) > 1
        apart = several and ("linear" not in self.families or "heads" in self.families)
        if unknown or not self.families or apart:
            raise InputError(
                f"families must be of {', '.join(FAMILIES)}, linear among them if several, heads alone; "
                f"found {self.families}"
            )
        if self.trunk not in KINDS or self.size not in SIZES or (self.steps is not None and self.steps < 1):
            raise InputError(
                f"a trunk is one of {', '.join(KINDS)}, its size one of {', '.join(SIZES)}, its steps positive; found "
                f"{self.trunk!r}, {self.size!r}, {self.steps}"
            )
        if self.families != ("linear",) and (self.alpha is not None or self.noise != "closed-form"):
            raise InputError(
                "templates, trees and networks need clean training spectra, with noise in closed form, and experts in "
                "principal components; for other spectra fit phys-moe"
            )
        if set(self.residuals) - set(RESIDUALS):
            raise InputError(f"residuals must be of {', '.join(RESIDUALS)}; found {self.residuals}")
        if self.tower not in (None, *get_args(Sees)) or not self.tower_limit > 0:
            raise InputError(
                f"a second tower sees one of {get_args(Sees)} up to a positive snr_norm; "
                f"found {self.tower!r} and {self.tower_limit}"
            )
        if not self.first_tower and (self.tower is None or self.tower_limit < math.inf):
            raise InputError("a gate without its first tower needs a second one without a limit")
        if (isinstance(self.grid, SnrGrid) or self.tower is not None) and self.families != ("linear",):
            raise InputError(
                "experts by snr_norm and gates of two towers are for linear experts; choose one or the other"
            )
        few = self.n_components is not None and self.n_components < 1
        if few or self.n_gate < 1 or self.sample_rows < STRETCH or self.sample_draws < 1:
            raise InputError(
                f"at least one component, also for the gate, {STRETCH} sample rows and one draw are needed; found "
                f"{self.n_components}, {self.n_gate}, {self.sample_rows}, {self.sample_draws}"
            )


@dataclass(frozen=True)
class LinearForm:
    """A linear predictor per bin and noise level, for comparison: weights (p, K, M), intercepts (K, M).

    `levels` (M,) are the ln s of the levels; a single one is used for every star. `clipped` says that flux is set
    to zero where it is negative, as the published fit does.
    """

    weights: F32
    intercepts: F32
    levels: F32
    clipped: bool = False


@dataclass(frozen=True)
class _Experts:
    """K linear experts at M noise levels in z = Cᵀ(x − reference), and the same fitted without each of F folds.

    `columns` C (p, c) are principal components, or weights in pixel space; `weights` (K, M, c), `intercepts` (K, M),
    `fold_weights` (F, K, M, c), `fold_intercepts` (F, K, M). `alphas` and `conditions` (K,) and `solver` say how.
    """

    columns: F64
    weights: F64
    intercepts: F64
    fold_weights: F64
    fold_intercepts: F64
    alphas: list[float]
    conditions: list[float]
    solver: str


class _Solved(NamedTuple):
    """What the normal equations give: `moments` of all rows in pixels, `small` in the components, `knots` = ln s."""

    reference: F64
    moments: Moments
    subspace: Subspace
    knots: F64
    small: NormalEquations
    experts: _Experts


class _Sample(NamedTuple):
    """What gate and error model are trained on: n noise draws of stars.

    `features` (n, f) of the gate; `chi2` (n,); `rows` (n,) of the training set; `inputs` of experts not linear;
    by family, `values` (n, K) of experts that did not see the star, and their propagated `noise` (n, K); `logits`
    (n, K), the library's evidence, if there is a library; `snr_norm` (n,); `quality` (n, 10), the logarithms of the
    quality features, empty unless a tower sees them.
    """

    features: NDArray
    chi2: NDArray
    rows: NDArray[np.int64]
    inputs: Inputs
    values: dict[str, NDArray]
    noise: dict[str, NDArray]
    logits: NDArray | None
    snr_norm: NDArray
    quality: NDArray


class _Faint(NamedTuple):
    """What a second tower is trained on: noise draws of `rows` (n,) of the training set.

    `seen` (n, f) by the tower, `values` (n, K) of the experts, `logits` (n, K) of the first tower.
    """

    rows: NDArray[np.int64]
    seen: NDArray
    values: NDArray
    logits: NDArray


@dataclass(frozen=True)
class Fit:
    """A fitted mixture, the linear forms to compare it with, and what happened on the way."""

    mixture: Mixture
    references: dict[str, LinearForm]
    summary: dict[str, Any]


def fit_mixture(
    spectra: SpectrumSet | SimulatedSpectra,
    options: Options,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
    backend: Literal["cpu", "cuda"] = "cpu",
) -> Fit:
    """Fit a mixture of linear experts, its gate and its error model.

    Parameters
    ----------
    spectra : SpectrumSet or SimulatedSpectra
        With labels T_eff [K], log_g [dex], M_H [dex].
    options : Options
    progress : callable, optional
        Called with the name of a stage, rows (or steps) done and rows in all.
    checkpoint : Checkpoint, optional
        Where the first pass is kept; goes on from what is there, on a CPU with the same bits. The caller removes it.
    backend : "cpu" or "cuda"
        Where the normal equations are gathered.

    Raises
    ------
    LabelError
        Labels are missing or not finite.
    InputError
        Too few usable rows, or the checkpoint is of another fit.
    OutputError
        There is no room for checkpoints.
    BackendError
        There is no usable GPU, or its memory is too small.
    """
    report = progress or (lambda *_: None)
    found = _Fitter(spectra, options, report, checkpoint, backend).run()
    if len(options.families) > 1 and options.references and options.noise == "closed-form":
        # What the choice of families is compared with: one noise draw per star, as published.
        sampled = replace(options, noise="sampled", families=("linear",), references=False)
        again = _Fitter(
            spectra, sampled, lambda stage, *steps: report(f"{stage}, sampled", *steps), None, backend
        )
        found.references["oracle-ridge, sampled"] = again.sampled_oracle()
    return found


@dataclass
class _FirstPass:
    """What the first pass has gathered from the first `rows` rows: all that its rest depends on.

    `times_good` (p,) counts the rows in which a pixel was good; `saved` are the rows that a checkpoint holds.
    """

    equations: NormalEquations | DeviceEquations
    published: NormalEquations | DeviceEquations | None
    times_good: F64
    largest_error: float
    left_out: int = 0
    rows: int = 0
    saved: int = 0

    def arrays(self) -> dict[str, NDArray]:
        """Everything but `rows` by name; views of what is here."""
        found = {"times_good": self.times_good, "rest": np.array([self.largest_error, self.left_out])}
        found |= {f"equations/{name}": array for name, array in self.equations.state().items()}
        if self.published is not None:
            found |= {f"published/{name}": array for name, array in self.published.state().items()}
        return found

    @classmethod
    def restored(
        cls,
        rows: int,
        read: Callable[[str], NDArray],
        apart: bool,
        on: Callable[[NormalEquations], NormalEquations | DeviceEquations],
    ) -> _FirstPass:
        """From the names of `arrays`; raises KeyError or ValueError where one is not what it should be."""
        equations = on(NormalEquations.from_state(lambda name: read(f"equations/{name}")))
        published = on(NormalEquations.from_state(lambda name: read(f"published/{name}"))) if apart else None
        largest_error, left_out = read("rest").tolist()
        times_good = read("times_good")
        if times_good.shape != equations.reference.shape or equations.n_rows + left_out != rows:
            raise ValueError(f"{equations.n_rows} rows and {left_out:.0f} left out are not {rows}")
        return cls(equations, published, times_good, largest_error, int(left_out), rows, rows)


class _Fitter:
    """The stages of a fit, in order; each reads what the ones before it left."""

    def __init__(
        self,
        spectra: SpectrumSet | SimulatedSpectra,
        options: Options,
        progress: Progress,
        checkpoint: Checkpoint | None = None,
        backend: Literal["cpu", "cuda"] = "cpu",
    ) -> None:
        self.device = backend == "cuda"
        self.spectra, self.options, self.progress, self.checkpoint = spectra, options, progress, checkpoint
        self.labels = spectra.labels(("T_eff", "log_g", "M_H"))
        self.y: F64 = self.labels["log_g"]
        # Those of snr_norm are found when a row is read.
        self.bins: NDArray[np.int64] = (
            options.grid.assign(self.labels["T_eff"], self.labels["M_H"]).astype(np.int64)
            if isinstance(options.grid, Grid)
            else np.zeros(spectra.n_rows, np.int64)
        )
        self.folds = fold_of_rows(np.arange(spectra.n_rows), options.n_folds, options.seed)
        self.array: Literal["flux", "noisy"] = "flux"
        if options.noise == "observed":
            noisy = ["noisy" in shard.arrays for shard in spectra.shards]
            if any(noisy) and not all(noisy):
                lacking = spectra.shards[noisy.index(False)].path
                raise InputError(
                    f"{lacking}: dataset/arrays/noisy/value is missing, other files have it; fit them apart"
                )
            self.array = "noisy" if all(noisy) else "flux"
        try:
            line_columns(spectra.wave)
        except ValueError as error:
            raise WaveGridError(f"{spectra.shards[0].path}: spectrumdataset/wave: {error}") from error
        if np.ptp(self.y) == 0:
            raise LabelError("log_g is the same in every row; there is nothing to learn")

    def run(self) -> Fit:
        if "heads" in self.options.families:
            # What a network lacks must be known before the first pass, not after.
            self.check_network()
        equations, published, used = self.gather()
        solved = self.solve(equations)
        del equations
        small, experts = solved.small, solved.experts
        mixture = self.assemble(solved)
        tried: dict[str, float] = {}
        chosen: dict[str, Any] = {}
        if "template" in self.options.families:
            library, tried = self.templates(mixture)
            mixture = replace(mixture, library=library)
        of_network: dict[str, Any] = {}
        if "heads" in self.options.families:
            heads, of_network = self.train_heads(mixture)
            mixture = replace(mixture, heads=heads)
        sample = self.sample(mixture, experts)
        if len(self.options.families) > 1:
            mixture, chosen = self.choose_families(mixture, sample)
        mixture, quality = self.train(mixture, experts, sample)
        references = self.reference_forms(published, solved, mixture)
        bins = zip(
            self.options.grid.names, small.count.sum(1), experts.alphas, experts.conditions, strict=True
        )
        summary = {
            "rows": used,
            "bins": {name: {"n": int(n), "alpha": a, "condition": c} for name, n, a, c in bins},
            "solver": experts.solver,
            "clipped": self.options.clipped,
            "discarded_variance": solved.subspace.discarded,
            "noise_levels": np.exp(solved.knots).tolist(),
            "chi2_limit": float(1 + 2 * max(np.quantile(sample.chi2, CHI2_QUANTILE) - 1, 0.1)),
            "cross_validation": quality,
        }
        if mixture.library is not None:
            summary["library"] = {
                "clouds": len(mixture.library.keys),
                "tangents": mixture.library.variances.shape[1],
                "r2_held_out": tried,
            }
        if of_network:
            summary["heads"] = of_network
        if chosen:
            summary["families"] = chosen
        if self.options.residuals:
            summary["residuals"] = self.of_residuals
        return Fit(mixture, references, summary)

    def steps(self, stage: str, total: int) -> Callable[[], None]:
        """Reports the next of so many steps of a stage each time it is called."""
        done = itertools.count(1)
        return lambda: self.progress(stage, next(done), total)

    def sampled_oracle(self) -> LinearForm:
        """The experts of the first pass alone, as a reference fit."""
        solved = self.solve(self.gather()[0])
        weights = np.einsum("pc,kmc->pkm", solved.experts.columns, solved.experts.weights, optimize=True)
        knots = solved.knots.astype(np.float32)
        return LinearForm(weights.astype(np.float32), solved.experts.intercepts.astype(np.float32), knots)

    # -- first pass ---------------------------------------------------------------------------------------------

    def blocks(
        self, stage: str, rows: list[tuple[int, int]] | None = None, done: int = 0
    ) -> Iterator[tuple[slice, F32, F32, NDArray]]:
        """Rows with at least half of their pixels good; bad pixels hold the reference and no variance.

        `done` rows of the stage were done before.
        """
        total = self.spectra.n_rows if rows is None else done + sum(b - a for a, b in rows)
        for part in [None] if rows is None else rows:
            for block in self.spectra.blocks(BLOCK_ROWS, array=self.array, rows=part):
                here = slice(block.first_row, block.first_row + len(block))
                usable = np.ones(len(block), bool)
                error = block.error
                if self.options.noise_level != 1.0:
                    error = error * np.float32(self.options.noise_level)
                if not (
                    # Most blocks have nothing wrong, and two reads of them tell so.
                    block.mask is None
                    and self.largest_error < np.inf
                    and all_within(error, 0, self.largest_error)
                    and all_within(block.flux, -LARGEST_RATIO, LARGEST_RATIO)
                ):
                    good = good_pixels(block.flux, block.error, block.mask)
                    sound = (error <= self.largest_error) & (np.abs(block.flux) <= LARGEST_RATIO)
                    good = sound if good is None else good & sound
                    usable = good.mean(1) >= 0.5
                    np.copyto(block.flux, self.reference.astype(np.float32), where=~good)
                    np.copyto(error, np.float32(0), where=~good)
                if isinstance(self.options.grid, SnrGrid):
                    self.bins[here] = self.options.grid.assign(self.snr_norm(block.flux, error))
                yield here, block.flux, error, usable
                done += len(block)
                self.progress(stage, done, total)

    def snr_norm(self, flux: F32, error: F32) -> F64:
        """‖flux‖/‖error‖ over good pixels; of clean flux, as it is expected with noise. 0 without good pixels."""
        signal = np.einsum("np,np->n", np.where(error > 0, flux, 0), flux, dtype=np.float64)
        noise = np.einsum("np,np->n", error, error, dtype=np.float64)
        added = 0.0 if self.options.noise == "observed" else 1.0
        return np.sqrt(np.divide(signal, noise, out=np.zeros_like(noise), where=noise > 0) + added)

    def find_reference(self) -> tuple[F64, float]:
        """Mean flux of a few rows spread over the set, and the largest error that still counts.

        Any spectrum near the mean will do as reference, but it must be fixed. Errors above a thousand times the usual
        one say "no information" in many surveys; one of them would swamp the mean noise of a pixel.
        """
        n, p = self.spectra.n_rows, self.spectra.n_pixels
        self.reference, self.largest_error = np.zeros(p), np.inf
        total, count, errors = np.zeros(p), np.zeros(p), []
        starts = np.unique(np.linspace(0, max(0, n - 64), 8).astype(int))
        for _, flux, error, usable in self.blocks(
            "mean spectrum", [(int(a), min(int(a) + 64, n)) for a in starts]
        ):
            good = error[usable] > 0
            total += np.where(good, flux[usable], 0).sum(0, dtype=np.float64)
            count += good.sum(0)
            errors.append(error[usable][good])
        if not count.any():
            raise InputError(
                "no usable row among those looked at first: fewer than half of the pixels are good"
            )
        mean = np.divide(total, count, where=count > 0, out=np.full(p, np.nan))
        return np.where(count > 0, mean, np.nanmedian(mean)), float(
            LARGEST_RATIO * np.median(np.concatenate(errors))
        )

    def gather(self) -> tuple[NormalEquations, NormalEquations | None, dict[str, int]]:
        """Normal equations of the experts and of the published-style ridge, and how many rows they hold."""
        options = self.options
        # Clipped draws are what the published-style ridge is fitted on, so the totals of the experts hold it.
        apart = options.references and not options.clipped
        needed = NormalEquations.memory(self.spectra.n_pixels, options.grid.n_bins, options.n_folds)
        if apart:
            needed += NormalEquations.memory(self.spectra.n_pixels, 1, 1)
        if 0 < physical_memory() < 1.3 * needed:
            raise InputError(
                f"{options.grid.n_bins} bins in {options.n_folds} folds need {needed / 1e9:.1f} GB for their normal "
                f"equations; this machine has {physical_memory() / 1e9:.1f} GB. Fit a coarser grid"
            )
        equations_of = DeviceEquations if self.device else NormalEquations
        pass_ = self.resume(needed, apart)
        if pass_ is None:
            self.reference, self.largest_error = self.find_reference()
            pass_ = _FirstPass(
                equations_of(self.reference, options.grid.n_bins, options.n_folds),
                equations_of(self.reference) if apart else None,
                np.zeros(self.reference.size),
                self.largest_error,
            )
        self.reference, self.largest_error = pass_.equations.reference, pass_.largest_error
        # Every pass over the rows below has a thread per core of its own; BLAS must not add its threads to them.
        with one_blas_thread():
            self.add_rows(pass_)
        self.times_good = pass_.times_good
        equations = pass_.equations.finish()
        published = None if pass_.published is None else pass_.published.finish()
        if self.checkpoint is not None and pass_.rows > pass_.saved:
            self.checkpoint.save(pass_.rows, pass_.arrays())
        empty = [
            n for n, c in zip(options.grid.names, equations.count, strict=True) if (c.sum() - c < 2).any()
        ]
        if empty:
            raise InputError(
                f"too few rows to fit: bins {', '.join(empty)} hold fewer than two rows outside a fold; "
                "add training spectra there or fit a coarser grid"
            )
        return equations, published, {"used": equations.n_rows, "left_out": pass_.left_out}

    def resume(self, nbytes: int, apart: bool) -> _FirstPass | None:
        """The first pass of a fit that was stopped, if there is a checkpoint of it."""
        if self.checkpoint is None:
            return None
        options = dataclasses.asdict(self.options)
        where = "cuda" if self.device else "cpu"
        self.checkpoint.begin(
            {"spectra": self.spectra.fingerprint(), "options": options, "backend": where}, nbytes
        )
        on = DeviceEquations.of if self.device else lambda found: found
        return self.checkpoint.load(lambda rows, read: _FirstPass.restored(rows, read, apart, on))

    def add_rows(self, pass_: _FirstPass) -> None:
        """Add all rows that the first pass lacks, saving its state now and then."""
        options, n = self.options, self.spectra.n_rows
        draws = options.noise == "sampled" or (options.noise != "observed" and pass_.published is not None)
        # Fresh memory for every block costs a page fault per page.
        memory = np.empty((BLOCK_ROWS if draws else 0, self.reference.size), np.float32)
        for here, flux, error, usable in self.blocks("normal equations", [(pass_.rows, n)], pass_.rows):
            rows = np.arange(here.start, here.stop)
            if not usable.all():
                pass_.left_out += int((~usable).sum())
                flux, error, rows = flux[usable], error[usable], rows[usable]
            noisy = flux
            if draws:
                noisy = add_noise(flux, error, options.seed, rows, out=memory[: len(rows)])
            x = noisy if options.noise == "sampled" else flux
            y, bins, folds = self.y[rows], self.bins[rows], self.folds[rows]
            pass_.times_good += len(rows) if all_within(error, 0, np.inf) else np.count_nonzero(error, axis=0)
            pass_.equations.add(x, y, None, bins, folds, error=error, clipped=options.clipped)
            if pass_.published is not None:
                pass_.published.add(noisy, y, clipped=True)
            pass_.rows = here.stop
            if self.checkpoint is not None and self.checkpoint.due:
                self.checkpoint.save(pass_.rows, pass_.arrays())
                pass_.saved = pass_.rows

    # -- linear experts -----------------------------------------------------------------------------------------

    def solve(self, equations: NormalEquations) -> _Solved:
        """Principal components, noise levels, and the experts in them."""
        pooled = equations.pooled()
        moments = pooled.moments()
        # Σv holds nothing for bad pixels: divide by the rows in which a pixel was good.
        seen = self.times_good > 0
        noise_shape = np.divide(
            moments.variance * moments.n, self.times_good, where=seen, out=np.zeros(seen.size)
        )
        noise_shape[~seen] = np.median(noise_shape[seen])
        subspace = principal_subspace(moments, noise_shape, seed=self.options.seed)
        expert_step = self.steps(
            "experts", 2 + self.options.grid.n_bins * (2 if self.options.alpha is None else 1)
        )
        expert_step()
        knots = self.noise_levels(noise_shape)
        levels = np.exp(knots)
        small = equations.transform(subspace.basis)
        expert_step()
        if self.options.alpha is None:
            rank = self.choose_rank(small, levels)
            leading = small.transform(np.eye(len(subspace.variance), rank))
            experts = self.noise_conditional(leading, subspace, levels, expert_step)
        else:
            experts = self.fixed(equations, levels.size, self.options.alpha, expert_step)
        return _Solved(pooled.reference, moments, subspace, knots, small, experts)

    def sample_rows(self) -> list[tuple[int, int]]:
        """Stretches of rows spread evenly over the set: enough rows, read in long slices.

        What a library of templates is made of must not be among them: it leaves a third of the rows at most.
        """
        n = self.spectra.n_rows
        most, length = self.options.sample_rows, STRETCH
        if self.options.families != ("linear",):
            most, length = min(most, n // 3), min(length, max(1, n // 30))
        if n <= most:
            return [(0, n)]
        starts = np.unique(np.linspace(0, n - length, max(1, most // length)).astype(int))
        return [(int(a), int(a) + length) for a in starts]

    def noise_levels(self, noise_shape: F64) -> F64:
        """Evenly spaced ln s from half the 0.1 % quantile to twice the 99.9 % quantile of the training set."""
        shape = noise_shape.astype(np.float32)
        found = []
        sample = self.sample_rows()
        some = sample[:: max(1, sum(b - a for a, b in sample) // LEVEL_ROWS)]
        for _, _, error, usable in self.blocks("noise levels", some):
            chosen = error[usable]
            # Bad pixels were given zero error; they do not count.
            n_good = np.count_nonzero(chosen, axis=1)
            found.append(0.5 * np.log((chosen * chosen / shape).sum(1) / n_good))
        low, high = np.quantile(np.concatenate(found), [0.001, 0.999])
        margin = np.log(2.0)
        self.log_levels = np.concatenate(found)
        return np.linspace(low - margin, high + margin, self.options.n_levels)

    def level_shares(self, levels: F64) -> F64:
        """Share of the sampled stars whose noise is nearest to each level."""
        nearest = np.abs(self.log_levels[:, None] - np.log(levels)).argmin(1)
        return np.bincount(nearest, minlength=levels.size) / nearest.size

    @property
    def inside(self) -> float:
        """Mean squared noise level that the totals contain: those of noisy rows hold the noise already."""
        return 0.0 if self.options.noise == "closed-form" else 1.0

    def held_out(self, small: NormalEquations, bin_: int, levels: F64, alphas: tuple[float, ...]) -> F64:
        """Cross-validated squared error of a bin for each penalty, over the noise levels as they occur."""
        shares, loss = self.level_shares(levels), np.zeros(len(alphas))
        for f in range(self.options.n_folds):
            if small.count[bin_, f] == 0:
                continue
            path = NoisePath(small.moments(bin_, without_fold=f), self.inside)
            held = small.moments(bin_, fold=f)
            for a, alpha in enumerate(alphas):
                for s, share in zip(levels, shares, strict=True):
                    if share:
                        # Held-out rows already contain `inside` of the noise.
                        loss[a] += share * held.sse(*path.solve(s, alpha), noise=s * s - self.inside)
        return loss

    def choose_rank(self, small: NormalEquations, levels: F64) -> int:
        """The least number of leading components, in steps of `RANK_STEP`, within `RANK_LOSS` of the best R².

        Scoring takes time in proportion to them, and the last of many carry next to nothing.
        """
        full = small.n_pixels
        if self.options.n_components is not None:
            return min(self.options.n_components, full)

        def loss(rank: int) -> float:
            leading = small.transform(np.eye(full, rank))
            return float(sum(self.held_out(leading, k, levels, (0.0,))[0] for k in range(small.n_bins)))

        losses = {rank: loss(rank) for rank in (*range(RANK_STEP, full, RANK_STEP), full)}
        # The best, not the full number: with few noisy rows the last components do harm.
        allowed = min(losses.values()) + RANK_LOSS * small.moments().sum_yy
        return next(rank for rank, found in losses.items() if found <= allowed)

    def choose_alphas(self, small: NormalEquations, levels: F64, step: Callable[[], None]) -> list[float]:
        """The penalty of each bin with the least cross-validated squared error at the noise levels that occur."""
        chosen = []
        for k in range(self.options.grid.n_bins):
            chosen.append(ALPHAS[int(self.held_out(small, k, levels, ALPHAS).argmin())])
            step()
        return chosen

    def noise_conditional(
        self, small: NormalEquations, subspace: Subspace, levels: F64, step: Callable[[], None]
    ) -> _Experts:
        """Experts solved for every noise level in the leading principal components, those of `small`."""
        alphas, rank = self.choose_alphas(small, levels, step), small.n_pixels
        shape = (self.options.n_folds + 1, self.options.grid.n_bins, levels.size)
        weights, intercepts = np.empty((*shape, rank)), np.empty(shape)
        conditions = []
        for k, alpha in enumerate(alphas):
            for f in range(shape[0]):
                # The last of them leaves no fold out.
                path = NoisePath(
                    small.moments(k, without_fold=f if f < self.options.n_folds else None), self.inside
                )
                for m, s in enumerate(levels):
                    weights[f, k, m], intercepts[f, k, m] = path.solve(s, alpha)
            conditions.append(path.condition(levels[0], alpha))
            step()
        return _Experts(
            subspace.basis[:, :rank], weights[-1], intercepts[-1], weights[:-1], intercepts[:-1], alphas, conditions,
            f"eigendecomposition in {rank} noise-white principal components",
        )  # fmt: skip

    def fixed(
        self, equations: NormalEquations, n_levels: int, alpha: float, step: Callable[[], None]
    ) -> _Experts:
        """Experts in pixel space with a given penalty per row, the same at every noise level."""
        closed = self.options.noise == "closed-form"
        n_bins, n_solves = self.options.grid.n_bins, self.options.n_folds + 1
        columns = np.empty((self.reference.size, n_bins, n_solves))
        intercepts = np.empty((n_solves, n_bins))
        conditions = []
        for k in range(n_bins):
            for f in range(n_solves):
                moments = equations.moments(k, without_fold=f if f < self.options.n_folds else None)
                noise = moments.variance if closed else 0.0
                columns[:, k, f], intercepts[f, k] = ridge(moments, alpha * moments.n, noise)
            # A bound: the penalty stands for the smallest eigenvalue.
            largest = scipy.sparse.linalg.eigsh(
                moments.gram, k=1, v0=np.ones(len(columns)), return_eigenvectors=False
            )[0]
            conditions.append(float(1 + (largest / moments.n + np.max(noise)) / alpha))
            step()
        # Each weight vector is a column: an expert picks its own.
        picks = np.eye(n_bins * n_solves).reshape(n_bins, n_solves, -1).swapaxes(0, 1)
        weights = np.repeat(picks[:, :, None], n_levels, axis=2)
        spread = np.repeat(intercepts[:, :, None], n_levels, axis=2)
        return _Experts(
            columns.reshape(len(columns), -1), weights[-1], spread[-1], weights[:-1], spread[:-1],
            n_bins * [alpha], conditions, f"Cholesky decomposition in {self.reference.size} pixels",
        )  # fmt: skip

    def assemble(self, solved: _Solved) -> Mixture:
        """A mixture with its linear experts and an idle gate and error model."""
        subspace, experts = solved.subspace, solved.experts
        k, columns, weights = len(experts.weights), experts.columns, experts.weights
        keep = columns.shape[1]
        if self.options.alpha is not None:
            # Experts in pixel space see one direction each; the components stand before these, for gate and χ².
            keep = min(self.options.n_components or N_COMPONENTS, subspace.basis.shape[1])
            own = columns.reshape(len(columns), k, -1)[:, :, -1]
            columns = np.concatenate([subspace.basis[:, :keep], own], axis=1)
            picks = np.eye(k, k + keep, keep)
            weights = np.repeat(picks[:, None], weights.shape[1], axis=1)
        n_gate = min(self.options.n_gate, keep)
        return Mixture(
            wave=self.spectra.wave,
            reference=solved.reference.astype(np.float32),
            noise_shape=subspace.noise_shape.astype(np.float32),
            knots=solved.knots.astype(np.float32),
            columns=columns.astype(np.float32),
            n_basis=keep,
            expert_weights=weights.astype(np.float32),
            expert_intercepts=experts.intercepts.astype(np.float32),
            gate=_idle(n_gate_features(n_gate), k),
            error_model=_idle(n_gate_features(n_gate) + 3, 1),
            label_range=(float(self.y.min()), float(self.y.max())),
            clipped=self.options.clipped,
            n_gate=n_gate,
        )

    # -- second pass --------------------------------------------------------------------------------------------

    def other_rows(self, most: int) -> list[tuple[int, int]]:
        """Stretches of rows that are not in the sample, about `most` of them."""
        sample, n = self.sample_rows(), self.spectra.n_rows
        ends = [0, *(b for _, b in sample)], [*(a for a, _ in sample), n]
        rest = [(a, b) for a, b in zip(*ends, strict=True) if b > a]
        count = len(rest) * most // max(1, sum(b - a for a, b in rest))
        if count < len(rest):
            mixed = np.random.default_rng(self.options.seed).permutation(len(rest))
            rest = [rest[i] for i in np.sort(mixed[: max(1, count)])]
        return rest

    def inputs(
        self,
        mixture: Mixture,
        stage: str,
        stretches: list[tuple[int, int]],
        *,
        noisy: bool,
        flux: bool = False,
    ) -> tuple[Inputs, NDArray[np.int64]]:
        """What experts that are not linear see of stars, and their rows; `noisy` with the noise of their first draw."""
        parts = []
        for here, x, sigma, usable in self.blocks(stage, stretches):
            rows = np.arange(here.start, here.stop)[usable]
            x, sigma = x[usable], sigma[usable]
            if noisy:
                x = add_noise(x, sigma, self.options.seed + 1, rows)
            found = mixture.inputs(project(x, sigma, None, mixture.projection))
            parts.append((*found[:3], x if flux else x[:, :0], rows))
        z, level, lines, whole, rows = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Inputs(z, level, lines, whole if flux else None), rows

    def templates(self, mixture: Mixture) -> tuple[Library, dict[str, float]]:
        """A library of stars that are not in the sample, and the R² of what was tried on noisy stars of the sample."""
        stars, rows = self.inputs(mixture, "templates", self.other_rows(LIBRARY_ROWS), noisy=False)
        labels = np.column_stack([self.labels[name][rows] for name in ("T_eff", "log_g", "M_H")])

        def fit(n_clouds: int, n_tangents: int) -> Library:
            return fit_library(
                stars.z, labels, self.y[rows], self.bins[rows], self.options.grid.n_bins,
                n_clouds=n_clouds, n_tangents=n_tangents, seed=self.options.seed,
            )  # fmt: skip

        judges, of_judges = self.inputs(mixture, "held-out stars", self.held_stretches(), noisy=True)
        return choose_library(
            fit, judges.z, judges.log_level, self.y[of_judges],
            n_stars=len(rows), progress=partial(self.progress, "library"),
        )  # fmt: skip

    def train_heads(self, mixture: Mixture) -> tuple[Heads, dict[str, Any]]:
        """A trunk with heads, fitted on the stars that are not in the sample, and how the fit went."""
        from moefast.trunks import training

        options, grid = self.options, self.options.grid
        torch = training.load_torch()
        device = "cuda" if self.device else "cpu"
        preset = PRESETS[options.trunk, options.size]
        pixels = SEES_FLUX[options.trunk]
        plan = Plan(
            options.trunk, mixture.n_pixels if pixels else mixture.n_basis, grid.n_bins, **preset.plan
        )
        schedule = replace(preset.schedule, seed=options.seed, steps=options.steps or preset.schedule.steps)
        judges, of_judges = self.inputs(
            mixture, "held-out stars", self.held_stretches(), noisy=True, flux=pixels
        )
        rows, level, z, windows, flux, error = self.clean_stars(mixture, pixels)
        inverse = (1 / np.sqrt(mixture.noise_shape.astype(np.float64))).astype(np.float32)
        poor = (
            np.tile(grid.m_h_edges[1:], grid.shape[0]) <= METAL_POOR
            if isinstance(grid, Grid)
            else np.zeros(grid.n_bins, bool)
        )
        scales = training.scales_of(self.y[rows], level, judges.lines, mixture.knots, poor)
        scales |= (
            {"reference": mixture.reference, "inverse_noise": inverse} if pixels else {"variance": z.var(0)}
        )
        begin = training.scaled(Heads(plan, start(plan, options.seed)), scales)
        stars: training.Stars
        if pixels:
            stars = training.Pixels(
                torch, device, flux, error, level, mixture.reference, inverse, mixture.line_columns,
                mixture.line_widths, LEAST_CONTINUUM,
            )  # fmt: skip
        else:
            covariance = training.component_covariance(
                mixture.basis, mixture.line_columns, mixture.noise_shape
            )
            stars = training.Components(
                torch, device, z, windows, level, covariance, mixture.line_widths, LEAST_CONTINUUM
            )
        labels = training.Labels(
            self.y[rows], np.column_stack([self.labels["T_eff"], self.labels["M_H"]])[rows], self.bins[rows]
        )
        seen = {"lines": judges.lines, "log_level": judges.log_level[:, None]}
        if judges.x is None:
            seen["z"] = judges.z
        else:
            seen["x"] = judges.x
        heads, curve, kernels = training.fit_heads(
            begin,
            stars,
            labels,
            training.Judges(seen, self.y[of_judges]),
            schedule,
            device=device,
            checkpoint=None if self.checkpoint is None else self.checkpoint.folder,
            key=self.spectra.fingerprint(),
            progress=partial(self.progress, "network"),
        )
        return heads, {
            "trunk": options.trunk, "size": options.size, "stars": len(rows), "batch": schedule.batch,
            "numbers": sum(array.size for array in heads.numbers.values()),
            "kernels": kernels, "r2_held_out": max(entry["r2"] for entry in curve), "curve": curve,
        }  # fmt: skip

    def check_network(self) -> None:
        """Refuse a network that cannot be fitted here."""
        from moefast.trunks.training import check_checkpoints, load_torch

        torch = load_torch()
        if self.device and not torch.cuda.is_available():
            raise BackendError(
                f"backend cuda: this torch ({torch.__version__}) sees no GPU; install its build for CUDA, or use "
                "backend cpu"
            )
        if self.checkpoint is not None:
            check_checkpoints()
        n = sum(b - a for a, b in self.other_rows(self.spectra.n_rows))
        needed = 4 * n * self.spectra.n_pixels if SEES_FLUX[self.options.trunk] else 0
        if 0 < HALF_MEMORY * physical_memory() < needed:
            raise InputError(
                f"a network that sees pixels keeps its {n} training stars in memory, {needed / 1e9:.1f} GB; this "
                f"machine has {physical_memory() / 1e9:.1f} GB. Fit it on fewer stars, or take the trunk pca-mlp"
            )

    def held_stretches(self) -> list[tuple[int, int]]:
        """Some stretches of the sample, `CHOICE_ROWS` rows in all."""
        sample = self.sample_rows()
        return sample[:: max(1, sum(b - a for a, b in sample) // CHOICE_ROWS)]

    def clean_stars(
        self, mixture: Mixture, pixels: bool
    ) -> tuple[NDArray[np.int64], F32, F32, F32, NDArray[np.float16], NDArray[np.float16]]:
        """Stars that are not in the sample, without noise: rows, ln s, components, line windows, flux and error.

        Flux and error are those of a network that sees pixels, in units of the mean noise and in half precision, and
        empty for others; components and windows are empty then.
        """
        stretches = self.other_rows(self.spectra.n_rows)
        n, p = sum(b - a for a, b in stretches), mixture.n_pixels
        inverse = 1 / np.sqrt(mixture.noise_shape)
        flux, error = (np.empty((n if pixels else 0, p), np.float16) for _ in range(2))
        parts, done = [], 0
        for here, x, sigma, usable in self.blocks("stars of the network", stretches):
            x, sigma = x[usable], sigma[usable]
            found = project(x, sigma, None, mixture.projection)
            z, windows = found.columns[:, : mixture.n_basis], found.windows + mixture.line_offsets
            rows = np.arange(here.start, here.stop)[usable]
            if pixels:
                mine = slice(done, done + len(x))
                flux[mine] = np.clip((x - mixture.reference) * inverse, -LARGEST_HALF, LARGEST_HALF)
                error[mine] = np.minimum(sigma * inverse, LARGEST_HALF)
                z, windows = z[:0], windows[:0]
            done += len(x)
            parts.append((rows, found.log_level, z, windows))
        rows, level, z, windows = (np.concatenate(column) for column in zip(*parts, strict=True))
        return rows, level, z, windows, flux[:done], error[:done]

    def sample(self, mixture: Mixture, experts: _Experts) -> _Sample:
        """Gate features and values of the sample rows by experts that did not see them, each with fresh noise."""
        options = self.options
        stretches = self.sample_rows()
        n = sum(b - a for a, b in stretches)
        draws = 1 if options.noise == "observed" else int(np.clip(NOISY_ROWS // n, 1, options.sample_draws))
        parts: list[tuple] = []
        for here, flux, error, usable in self.blocks("gate sample", stretches):
            rows = np.arange(here.start, here.stop)[usable]
            flux, error = flux[usable], error[usable]
            quality = (
                quality_logs(error, error > 0) if options.tower == "quality" else np.empty((len(rows), 0))
            )
            for draw in range(draws):
                found, features, values, noise, chi2, given = self.draw(
                    mixture, experts, rows, flux, error, draw
                )
                seen = (found.snr_norm, quality, *mixture.inputs(found)[:3])
                parts.append((features, chi2, rows, values, noise, *seen, *given))
        features, chi2, rows, values, noise, snr_norm, quality, z, level, lines, *of_network = (
            np.concatenate(columns) for columns in zip(*parts, strict=True)
        )
        inputs = Inputs(z, level, lines)
        sample = _Sample(
            features, chi2, rows, inputs, {"linear": values}, {"linear": noise}, None, snr_norm, quality
        )
        if of_network:
            log_g, sd, logits = of_network
            sample.values["heads"], sample.noise["heads"] = log_g.astype(np.float64), sd
            sample = sample._replace(logits=logits.astype(np.float64))
        if mixture.library is not None:
            posterior = tangent_posterior(sample.inputs.z, sample.inputs.log_level, mixture.library)
            sample.values["template"] = posterior.mean.astype(np.float64)
            sample.noise["template"] = posterior.sd
            evidence = posterior.log_evidence.astype(np.float64)
            sample = sample._replace(logits=evidence - evidence.max(1, keepdims=True))
        return sample

    def draw(
        self, mixture: Mixture, experts: _Experts, rows: NDArray[np.int64], flux: F32, error: F32, draw: int
    ) -> tuple[Projected, NDArray, F64, NDArray, NDArray, tuple[F32, ...]]:
        """Rows with one draw of noise: projection, gate features, and values of experts that did not see them.

        After these, propagated noise of the experts, χ², and what a network says: values, 1σ and logits.
        """
        options = self.options
        x = flux
        if options.noise != "observed":
            x = add_noise(flux, error, options.seed + 1 + draw, rows)
        found = project(x, error, None, mixture.projection)
        features, _, noise, chi2 = prepare_reference(found, mixture.mixing)
        z = found.columns
        if options.alpha is not None:
            # Experts in pixel space have columns of their own for every fold.
            seen = np.maximum(x, 0) if mixture.clipped else x
            z = np.where(error > 0, seen - mixture.reference, 0) @ experts.columns.astype(np.float32)
        level = np.clip(found.log_level, mixture.knots[0], mixture.knots[-1])
        hat = hat_weights(level, mixture.knots)
        values = np.empty((len(rows), options.grid.n_bins))
        for f in range(options.n_folds):
            mine = self.folds[rows] == f
            each = np.einsum("nc,kmc->nkm", z[mine], experts.fold_weights[f], optimize=True)
            each += experts.fold_intercepts[f]
            values[mine] = (each * hat[mine][:, None]).sum(2)
        given: tuple[F32, ...] = ()
        if mixture.heads is not None:
            given = mixture.heads.predict(mixture.inputs(found)._replace(x=x))
        return found, features, values, noise, chi2, given

    def train(self, mixture: Mixture, experts: _Experts, sample: _Sample) -> tuple[Mixture, dict[str, float]]:
        """Gate, error model and its factor; a tenth of the stars only measures the outcome.

        Seven tenths of the stars train, two decide when to stop and set the factor, one is seen by none of these. The
        experts saw none of them, but for the choice of α, of the library's size and of families.
        """
        features, rows = sample.features, sample.rows
        y, true = self.y[rows], self.bins[rows]
        part = self.part_of(rows)
        check = part == 0
        held, fitted = np.isin(part, (1, 2))[~check], ~check
        families = self.families_of(mixture)
        values, noise = (
            np.column_stack([of_family[families[k]][:, k] for k in range(len(families))])
            for of_family in (sample.values, sample.noise)
        )
        logits = np.zeros_like(values) if sample.logits is None else sample.logits
        if values.shape[1] > 1 and self.options.first_tower and mixture.heads is None:
            net = fit_gate(
                features[fitted],
                values[fitted],
                y[fitted],
                held,
                given=None if sample.logits is None else sample.logits[fitted],
                seed=self.options.seed,
                progress=partial(self.progress, "gate"),
            )
            learnt = logits + net(features)
            # Bayes' rule needs no training; what was learnt is added to it only where it is better beyond doubt.
            judges = np.flatnonzero(fitted)[held]
            if sample.logits is None or _is_better(softmax(learnt), softmax(logits), values, y, rows, judges):
                logits, mixture = learnt, replace(mixture, gate=_as_float32(net.folded()))
        if values.shape[1] > 1 and self.options.tower is not None:
            mixture, logits = self.add_tower(mixture, experts, sample, logits)
        gate = softmax(logits)
        if self.options.residuals:
            mixture, values = self.add_residuals(mixture, sample, values, gate)
        mixed = (gate * values).sum(1)
        log_g = np.clip(mixed, *mixture.label_range)
        raw = (gate * noise).sum(1)
        spread = np.sqrt((gate * (values - mixed[:, None]) ** 2).sum(1))
        inputs = mixture.error_features(features, log_g, raw, spread)
        net = fit_error_model(
            inputs[fitted],
            (y - log_g)[fitted],
            held,
            seed=self.options.seed,
            progress=partial(self.progress, "error model"),
        )
        ratio = np.abs(y - log_g) / np.exp(net(inputs)[:, 0])
        factor = balanced_factor(ratio[fitted][held])
        w1, b1, w2, b2 = net.folded()
        mixture = replace(mixture, error_model=_as_float32((w1, b1, w2, b2 + np.log(factor))))
        quality = {
            "rows": int(check.sum()),
            "r2": r2(y[check], log_g[check]),
            "r2_true_bins": r2(y[check], values[np.arange(len(y)), true][check]),
            "coverage_68": float(np.mean(ratio[check] <= factor)),
            "coverage_95": float(np.mean(ratio[check] <= Z_95 * factor)),
            "gate_accuracy": float(np.mean(gate.argmax(1)[check] == true[check])),
            "gate_learnt": bool(np.any(mixture.gate[2])),
            "tower_learnt": mixture.tower is not None,
        }
        return mixture, quality

    def add_residuals(
        self, mixture: Mixture, sample: _Sample, values: NDArray, gate: F64
    ) -> tuple[Mixture, NDArray]:
        """The mixture with the residuals that are kept, and the sample's values of its experts with them."""
        options, rows = self.options, sample.rows
        part, y, strong = self.part_of(rows), self.y[rows], (gate * values).sum(1)
        families = self.families_of(mixture)

        def seen(k: int, some: NDArray | slice) -> Inputs:
            own = Inputs(*(a[some] for a in sample.inputs[:3]))
            return own._replace(value=values[some, k], linear=sample.values["linear"][some, k])

        fitted, judges = np.flatnonzero(part > 2), np.isin(part, (1, 2))
        experts: dict[str, dict[int, Expert]] = {name: {} for name in options.residuals}
        step = self.steps("residuals", len(experts) * options.grid.n_bins)
        for name, k in itertools.product(experts, range(options.grid.n_bins)):
            # Far from its bin an expert has next to no say; forests take all rows alike for the time that they take.
            near = fitted[gate[fitted, k] > LEAST_WEIGHT]
            enough = len(np.unique(rows[near])) > LEAST_RESIDUAL_STARS
            if enough and (name, families[k]) != ("linear", "linear"):
                experts[name][k] = self.fit_residual(name, seen(k, near), (y - strong)[near], gate[near, k])
            step()
        kept = choose_residuals(
            y[judges], strong[judges], gate[judges],
            {name: {k: e.predict(seen(k, judges)) for k, e in each.items()} for name, each in experts.items()},
            rows[judges],
            regions(
                self.bins[rows[judges]], options.grid.names, self.labels["M_H"][rows[judges]],
                assign_snr_bins(sample.snr_norm[judges]), SNR_NORM_NAMES,
            ),
            mixture.label_range,
        )  # fmt: skip
        self.of_residuals = kept.summary(options.grid.names)
        chosen = {k: experts[name][k] for k, name in sorted(kept.kept.items())}
        if chosen:
            values = values.copy()
        for k, expert in chosen.items():
            values[:, k] += expert.predict(seen(k, slice(None)))
        return replace(mixture, residuals=chosen), values

    def fit_residual(self, name: str, seen: Inputs, wrong: F64, weight: F64) -> Expert:
        """A residual of one kind."""
        if name == "linear":
            return fit_linear_residual(seen, wrong, weight)
        if name == "ridge":
            return fit_ridge_residual(seen, wrong, weight, RESIDUAL_PENALTY)
        from moefast.experts.trees import fit_trees, stacking

        few = slice(None, None, -(-len(wrong) // FOREST_ROWS))
        features = stacking(Inputs(*(a[few] for a in seen[:3])))
        return fit_trees(
            features, wrong[few], weight[few], sees="stacking", seed=self.options.seed,
            n_trees=RESIDUAL_TREES, least_stars=RESIDUAL_LEAF,
        )  # fmt: skip

    def part_of(self, rows: NDArray[np.int64]) -> NDArray[np.integer]:
        """Tenth of the stars that a row belongs to: 0 only measures, 1 and 2 decide when to stop, the others train."""
        return fold_of_rows(rows, 10, self.options.seed + 1000)

    def add_tower(
        self, mixture: Mixture, experts: _Experts, sample: _Sample, logits: NDArray
    ) -> tuple[Mixture, NDArray]:
        """The mixture with a second tower, and the logits of the sample with its own.

        It is trained on what the first tower leaves, and kept where it is better beyond doubt on stars that neither
        saw, or where there is no first one.
        """
        options, limit = self.options, self.options.tower_limit
        assert options.tower is not None
        near = np.flatnonzero(sample.snr_norm <= limit)
        values, seen = sample.values["linear"], {"features": sample.features, "quality": sample.quality}
        stars = _Faint(sample.rows[near], seen[options.tower][near], values[near], logits[near])
        if options.tower == "features" and limit < math.inf and options.noise != "observed":
            stars = self.faint_sample(mixture, experts)
        part = self.part_of(stars.rows)
        fitted, held = part != 0, np.isin(part, (1, 2))
        if not held.any() or held[fitted].all():
            return mixture, logits
        net = fit_gate(
            stars.seen[fitted],
            stars.values[fitted],
            self.y[stars.rows[fitted]],
            held[fitted],
            given=stars.logits[fitted],
            hidden=TOWER_HIDDEN[options.tower],
            steps=TOWER_STEPS,
            seed=options.seed,
            progress=partial(self.progress, "tower"),
        )
        tower = Tower(options.tower, _as_float32(net.folded()), limit)
        added = logits + tower.logits(sample.snr_norm, lambda rows: seen[tower.sees][rows])
        judges = near[np.isin(self.part_of(sample.rows[near]), (1, 2))]
        y, gates = self.y[sample.rows], (softmax(added), softmax(logits))
        if options.first_tower and not (judges.size and _is_better(*gates, values, y, sample.rows, judges)):
            return mixture, logits
        return replace(mixture, tower=tower), added

    def faint_sample(self, mixture: Mixture, experts: _Experts) -> _Faint:
        """The sample's stars with the errors of stars below the tower's limit, each that of another in every draw.

        There are few faint stars, and many draws of many stars are what a gate learns from.
        """
        options = self.options
        stretches = self.sample_rows()
        draws = int(np.clip(TOWER_ROWS // sum(b - a for a, b in stretches), 1, options.sample_draws))
        nothing = np.empty((0, options.grid.n_bins), np.float32)
        seen = np.empty((0, len(mixture.gate[0])), np.float32)
        parts = [_Faint(np.empty(0, np.int64), seen, nothing, nothing)]
        for here, flux, error, usable in self.blocks("faint stars", stretches):
            rows = np.arange(here.start, here.stop)[usable]
            faint = np.flatnonzero(usable & (self.snr_norm(flux, error) <= options.tower_limit))
            if not faint.size:
                continue
            rng = np.random.default_rng([options.seed, here.start])
            for draw in range(draws):
                lent = error[rng.choice(faint, len(rows))]
                x = np.where(lent > 0, flux[usable], self.reference.astype(np.float32))
                found, features, values, *_ = self.draw(
                    mixture, experts, rows, x, lent, options.sample_draws + draw
                )
                below = found.snr_norm <= options.tower_limit
                logits = perceptron(features[below], mixture.gate)
                parts.append(_Faint(rows[below], features[below], values[below].astype(np.float32), logits))
        return _Faint(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def families_of(self, mixture: Mixture) -> list[str]:
        """Family of each expert of a mixture."""
        if mixture.heads is not None:
            return ["heads"] * mixture.n_experts
        marks = mixture.from_library or (False,) * mixture.n_experts
        found = ["template" if mark else "linear" for mark in marks]
        for k, expert in mixture.others.items():
            found[k] = expert.family
        return found

    def choose_families(self, mixture: Mixture, sample: _Sample) -> tuple[Mixture, dict[str, Any]]:
        """The family of each bin that is best, beyond doubt, on stars of the sample that do not measure the outcome.

        Forests are grown on the library's stars, with one draw of noise.
        """
        options, names = self.options, self.options.grid.names
        forests: dict[int, Trees] = {}
        if "trees" in options.families:
            from moefast.experts.trees import fit_trees, stacking

            inputs, rows = self.inputs(mixture, "forest stars", self.other_rows(FOREST_ROWS), noisy=True)
            step = self.steps("forests", options.grid.n_bins)
            sample.values["trees"] = np.empty_like(sample.values["linear"])
            sample.noise["trees"] = sample.noise["linear"]
            for k in range(options.grid.n_bins):
                here = self.bins[rows] == k
                mine = stacking(Inputs(*(a[here] for a in inputs[:3])))
                forests[k] = fit_trees(mine, self.y[rows[here]], sees="stacking", seed=options.seed)
                sample.values["trees"][:, k] = forests[k].predict(sample.inputs)
                step()
        seen = self.part_of(sample.rows) != 0
        bins = self.bins[sample.rows[seen]]
        own = np.arange(len(sample.rows)), self.bins[sample.rows]
        candidates = {name: sample.values[name][own][seen] for name in options.families}
        choice = choose(self.y[sample.rows[seen]], candidates, bins, "linear", n_bins=options.grid.n_bins)
        mixture = replace(
            mixture,
            from_library=tuple(name == "template" for name in choice.families),
            others={k: forests[k] for k, name in enumerate(choice.families) if name == "trees"},
        )
        table = {
            names[k]: {
                "family": choice.families[k],
                "n": int(choice.n[k]),
                "gain": dict(zip(choice.names, choice.gain[k].tolist(), strict=True)),
                "standard_error": dict(zip(choice.names, choice.standard_error[k].tolist(), strict=True)),
            }
            for k in range(options.grid.n_bins)
        }
        return mixture, table

    # -- what to compare with -----------------------------------------------------------------------------------

    def reference_forms(
        self, published: NormalEquations | None, solved: _Solved, mixture: Mixture
    ) -> dict[str, LinearForm]:
        """The fits that show what each step of the method is worth."""
        _, moments, subspace, knots, small, experts = solved
        forms: dict[str, LinearForm] = {}
        one = np.zeros(1, np.float32)
        conditional = self.options.alpha is None
        step = self.steps("simpler fits", int(self.options.references) + (3 if conditional else 0))

        def single(
            weights: F64,
            intercept: NDArray | float,
            levels: F32 = one,
            clipped: bool = self.options.clipped,
        ) -> LinearForm:
            k = np.atleast_2d(intercept).shape
            return LinearForm(
                weights.reshape(-1, *k).astype(np.float32),
                np.reshape(intercept, k).astype(np.float32),
                levels,
                clipped,
            )

        if self.options.references:
            seen = moments if published is None else published.moments()
            forms["published-ridge"] = single(*ridge(seen, PUBLISHED_ALPHA * seen.n), clipped=True)
            step()
        if not conditional:
            return forms
        pooled = NoisePath(small.moments(), self.inside)
        mean_level = 1.0
        w, c = pooled.solve(mean_level)
        forms["global-ridge, average noise"] = single(subspace.basis @ w, c)
        step()
        path = [pooled.solve(s) for s in np.exp(knots)]
        forms["global-ridge"] = single(
            np.stack([subspace.basis @ w for w, _ in path], 1),
            np.array([[c for _, c in path]]),
            mixture.knots,
        )
        step()
        fixed = [
            NoisePath(small.moments(k), self.inside).solve(mean_level, a)
            for k, a in enumerate(experts.alphas)
        ]
        forms["oracle-ridge, average noise"] = single(
            np.stack([subspace.basis @ w for w, _ in fixed], 1), np.array([[c] for _, c in fixed])
        )
        step()
        return forms


def _is_better(gate: F64, other: F64, values: F64, y: F64, star: NDArray, judges: NDArray[np.intp]) -> bool:
    """Whether a gate's mixture is better than another's by more than a standard error over the stars of some rows."""
    wrong, base = ((((each * values).sum(1) - y)[judges]) ** 2 for each in (gate, other))
    # Draws of one star's noise are no stars of their own.
    _, which = np.unique(star[judges], return_inverse=True)
    gain = np.bincount(which, base - wrong) / np.bincount(which)
    return bool(gain.mean() > gain.std() / np.sqrt(len(gain)))


def balanced_factor(ratio: NDArray) -> float:
    """Factor on σ for which 1σ and 1.96σ hold as nearly 68.27 % and 95 % as one factor can make them.

    min over c of max(|P(r ≤ c) − 0.6827|/2, |P(r ≤ 1.96 c) − 0.95|): errors within the box of labels have lighter
    tails than a Gaussian, so one factor cannot make both exact.

    Parameters
    ----------
    ratio : array of shape (n,)
        |y − ŷ|/σ of rows that did not train the error model.
    """
    ordered = np.sort(ratio)
    trial = np.quantile(ordered, np.linspace(0.5, 0.9, 401))
    inner = np.searchsorted(ordered, trial, side="right") / ordered.size
    outer = np.searchsorted(ordered, Z_95 * trial, side="right") / ordered.size
    miss = np.maximum(np.abs(inner - 0.6827) / 2, np.abs(outer - 0.95))
    return float(trial[miss.argmin()])


def _idle(n_in: int, n_out: int) -> tuple[F32, F32, F32, F32]:
    """Layers that give zero for everything: equal weights, ln σ = 0."""
    return (
        np.zeros((n_in, 1), np.float32),
        np.zeros(1, np.float32),
        np.zeros((1, n_out), np.float32),
        np.zeros(n_out, np.float32),
    )


def _as_float32(layers: tuple[F64, F64, F64, F64]) -> tuple[F32, F32, F32, F32]:
    w1, b1, w2, b2 = (np.ascontiguousarray(a, np.float32) for a in layers)
    return w1, b1, w2, b2
