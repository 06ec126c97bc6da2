"""From files of spectra to a fitted mixture in two passes.

Design: the first pass gathers normal equations per bin and fold. Everything linear follows from them: the noise-white
principal components, experts at every noise level, their penalties by cross-validation, the reference fits. The second
pass reads a bounded sample of rows, gives each a few noise draws and the predictions of experts that never saw it,
and trains gate and error model on those. Time grows linearly with rows, memory not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moefast.backend import physical_memory
from moefast.errors import InputError, LabelError
from moefast.experts.normal_equations import NormalEquations
from moefast.experts.ridge import NoisePath, Subspace, principal_subspace, ridge
from moefast.gating.mlp import fit_error_model, fit_gate, softmax
from moefast.mixture import N_GATE_COMPONENTS, N_GATE_FEATURES, Mixture, hat_weights
from moefast.noise import fold_of_rows, standard_normals
from moefast.protocol.bins import Grid
from moefast.protocol.metrics import r2
from moefast.spectra.files import SpectrumSet
from moefast.spectra.quality import good_pixels

__all__ = ["Fit", "LinearForm", "Noise", "Options", "fit_mixture"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Noise = Literal["closed-form", "sampled", "observed"]
Progress = Callable[[str, int, int], None]

BLOCK_ROWS = 2048
ALPHAS = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0)
"""Ridge penalties tried per bin, in units of the mean noise variance per star."""
PUBLISHED_ALPHA = 0.1
"""Ridge penalty per row of the published fit: 1e5 at one million stars."""
CHI2_QUANTILE = 0.999


@dataclass(frozen=True)
class Options:
    """How to fit.

    Attributes
    ----------
    grid : Grid
        One expert per bin of T_eff × [M/H]; a 1 × 1 grid is a global fit.
    noise : "closed-form", "sampled" or "observed"
        Clean flux with noise added to the normal equations in closed form; clean flux with one noise draw per row;
        or flux that is noisy already (`noisy` where a file has it).
    noise_level : float
        Factor on the errors of the files.
    n_levels : int
        Noise levels per expert.
    n_components : int
        Principal components kept for χ².
    n_folds : int
        Folds for cross-validation and cross-fitting.
    sample_rows, sample_draws : int
        Rows and noise draws (at most) for gate and error model.
    references : bool
        Also fit the published-style ridge that results are compared with; doubles the work of the first pass.
    seed : int
    """

    grid: Grid = field(default_factory=Grid)
    noise: Noise = "closed-form"
    noise_level: float = 1.0
    n_levels: int = 8
    n_components: int = 64
    n_folds: int = 3
    sample_rows: int = 60_000
    sample_draws: int = 4
    references: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.noise not in get_args(Noise):
            raise ValueError(f"noise must be one of {get_args(Noise)}, found {self.noise!r}")
        if not self.noise_level > 0:
            raise ValueError(f"noise_level must be positive, found {self.noise_level}")
        if self.n_folds < 2 or self.n_levels < 2:
            raise ValueError("at least two folds and two noise levels are needed")


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
class Fit:
    """A fitted mixture, the linear forms to compare it with, and what happened on the way."""

    mixture: Mixture
    references: dict[str, LinearForm]
    summary: dict[str, Any]


def fit_mixture(spectra: SpectrumSet, options: Options, progress: Progress | None = None) -> Fit:
    """Fit a mixture of linear experts, its gate and its error model.

    Parameters
    ----------
    spectra : SpectrumSet
        With labels T_eff [K], log_g [dex], M_H [dex].
    options : Options
    progress : callable, optional
        Called with the name of a stage, rows done and rows in all.

    Raises
    ------
    LabelError
        Labels are missing or not finite.
    InputError
        Too few usable rows.
    """
    return _Fitter(spectra, options, progress or (lambda *_: None)).run()


class _Fitter:
    """The stages of a fit, in order; each reads what the ones before it left."""

    def __init__(self, spectra: SpectrumSet, options: Options, progress: Progress) -> None:
        self.spectra, self.options, self.progress = spectra, options, progress
        self.labels = spectra.labels(("T_eff", "log_g", "M_H"))
        self.y: F64 = self.labels["log_g"]
        self.bins = options.grid.assign(self.labels["T_eff"], self.labels["M_H"]).astype(np.int64)
        self.folds = fold_of_rows(np.arange(spectra.n_rows), options.n_folds, options.seed)
        self.array: Literal["auto", "flux"] = "auto" if options.noise == "observed" else "flux"
        if np.ptp(self.y) == 0:
            raise LabelError("log_g is the same in every row; there is nothing to learn")

    def run(self) -> Fit:
        equations, published, used = self.gather()
        pooled = equations.pooled()
        moments = pooled.moments()
        noise_shape = moments.variance
        subspace = principal_subspace(moments, noise_shape, seed=self.options.seed)
        small = equations.transform(subspace.basis)
        del equations
        inside = 0.0 if self.options.noise == "closed-form" else 1.0
        knots = self.noise_levels(noise_shape)
        levels = np.exp(knots)
        paths = [NoisePath(small.moments(k), inside) for k in range(self.options.grid.n_bins)]
        alphas = self.choose_alphas(small, levels, inside)
        experts = [[path.solve(s, a) for s in levels] for path, a in zip(paths, alphas, strict=True)]
        mixture = self.assemble(pooled.reference, subspace, knots, experts)
        features, values, chi2, raw_noise, rows = self.sample(
            mixture, small, subspace, levels, alphas, inside
        )
        mixture, quality = self.train(mixture, features, values, raw_noise, rows)
        references = self.reference_forms(
            moments, published, small, subspace, mixture, levels, alphas, inside
        )
        summary = {
            "rows": used,
            "bins": {
                name: {
                    "n": path.moments.n,
                    "alpha": alpha,
                    "condition": path.condition(levels[0], alpha),
                }
                for name, path, alpha in zip(self.options.grid.names, paths, alphas, strict=True)
            },
            "solver": f"eigendecomposition in {subspace.basis.shape[1]} noise-white principal components",
            "discarded_variance": subspace.discarded,
            "noise_levels": levels.tolist(),
            "chi2_limit": float(1 + 2 * max(np.quantile(chi2, CHI2_QUANTILE) - 1, 0.1)),
            "cross_validation": quality,
        }
        return Fit(mixture, references, summary)

    # -- first pass ---------------------------------------------------------------------------------------------

    def blocks(
        self, stage: str, rows: list[tuple[int, int]] | None = None
    ) -> Iterator[tuple[slice, F32, F32, NDArray]]:
        """Rows with at least half of their pixels good; bad pixels hold the reference and no variance."""
        total = self.spectra.n_rows if rows is None else sum(b - a for a, b in rows)
        done = 0
        for part in [None] if rows is None else rows:
            for block in self.spectra.blocks(BLOCK_ROWS, array=self.array, rows=part):
                good = good_pixels(block.flux, block.error, block.mask)
                here = slice(block.first_row, block.first_row + len(block))
                usable = np.ones(len(block), bool)
                error = block.error
                if self.options.noise_level != 1.0:
                    error = error * np.float32(self.options.noise_level)
                if good is not None:
                    usable = good.mean(1) >= 0.5
                    np.copyto(block.flux, self.reference.astype(np.float32), where=~good)
                    np.copyto(error, np.float32(0), where=~good)
                yield here, block.flux, error, usable
                done += len(block)
                self.progress(stage, done, total)

    def find_reference(self) -> F64:
        """Mean flux of a few rows spread over the set: any spectrum near the mean will do, but it must be fixed."""
        self.reference = np.zeros(self.spectra.shards[0].n_pixels)
        total, weight = np.zeros_like(self.reference), 0
        starts = np.unique(np.linspace(0, max(0, self.spectra.n_rows - 64), 8).astype(int))
        for _, flux, _, usable in self.blocks(
            "reference", [(int(a), min(int(a) + 64, self.spectra.n_rows)) for a in starts]
        ):
            total += flux[usable].sum(0, dtype=np.float64)
            weight += int(usable.sum())
        if weight == 0:
            raise InputError(
                "no usable row among those looked at first: fewer than half of the pixels are good"
            )
        return total / weight

    def gather(self) -> tuple[NormalEquations, NormalEquations | None, dict[str, int]]:
        options = self.options
        self.reference = self.find_reference()
        needed = NormalEquations.memory(self.reference.size, options.grid.n_bins, options.n_folds)
        if 0 < physical_memory() < 1.3 * needed:
            raise InputError(
                f"{options.grid.n_bins} bins in {options.n_folds} folds need {needed / 1e9:.1f} GB for their normal "
                f"equations; this machine has {physical_memory() / 1e9:.1f} GB. Fit a coarser grid"
            )
        equations = NormalEquations(self.reference, options.grid.n_bins, options.n_folds)
        published = NormalEquations(self.reference) if options.references else None
        left_out = 0
        for here, flux, error, usable in self.blocks("normal equations"):
            rows = np.arange(here.start, here.stop)
            if not usable.all():
                left_out += int((~usable).sum())
                flux, error, rows = flux[usable], error[usable], rows[usable]
            noisy = flux
            if options.noise != "observed" and (options.references or options.noise == "sampled"):
                noisy = standard_normals(options.seed, rows, flux.shape[1])
                noisy *= error
                noisy += flux
            x = noisy if options.noise == "sampled" else flux
            equations.add(x, self.y[rows], error * error, self.bins[rows], self.folds[rows])
            if published is not None:
                published.add(np.maximum(noisy, 0), self.y[rows])
        equations.finish()
        if published is not None:
            published.finish()
        empty = [
            n for n, c in zip(options.grid.names, equations.count, strict=True) if (c.sum() - c < 2).any()
        ]
        if empty:
            raise InputError(
                f"too few rows to fit: bins {', '.join(empty)} hold fewer than two rows outside a fold; "
                "add training spectra there or fit a coarser grid"
            )
        return equations, published, {"used": equations.n_rows, "left_out": left_out}

    # -- linear experts -----------------------------------------------------------------------------------------

    def sample_rows(self) -> list[tuple[int, int]]:
        """Stretches of 512 rows spread evenly over the set: enough rows, read in long slices."""
        n, stretch = self.spectra.n_rows, 512
        if n <= self.options.sample_rows:
            return [(0, n)]
        starts = np.unique(np.linspace(0, n - stretch, self.options.sample_rows // stretch).astype(int))
        return [(int(a), int(a) + stretch) for a in starts]

    def noise_levels(self, noise_shape: F64) -> F64:
        """Evenly spaced ln s from half the 0.1 % quantile to twice the 99.9 % quantile of the training set."""
        shape = noise_shape.astype(np.float32)
        found = []
        for _, _, error, usable in self.blocks("noise levels", self.sample_rows()):
            with np.errstate(divide="ignore"):
                information = shape / error[usable] ** 2
            # Bad pixels were given zero error, hence infinite information; they do not count.
            finite = np.isfinite(information)
            found.append(-0.5 * np.log(np.where(finite, information, 0).sum(1) / finite.sum(1)))
        low, high = np.quantile(np.concatenate(found), [0.001, 0.999])
        margin = np.log(2.0)
        self.log_levels = np.concatenate(found)
        return np.linspace(low - margin, high + margin, self.options.n_levels)

    def choose_alphas(self, small: NormalEquations, levels: F64, inside: float) -> list[float]:
        """The penalty of each bin with the least cross-validated squared error at the noise levels that occur."""
        nearest = np.abs(self.log_levels[:, None] - np.log(levels)).argmin(1)
        share = np.bincount(nearest, minlength=levels.size) / nearest.size
        chosen = []
        for k in range(self.options.grid.n_bins):
            loss = np.zeros(len(ALPHAS))
            for f in range(self.options.n_folds):
                if small.count[k, f] == 0:
                    continue
                path = NoisePath(small.moments(k, without_fold=f), inside)
                held = small.moments(k, fold=f)
                for a, alpha in enumerate(ALPHAS):
                    for s, weight in zip(levels, share, strict=True):
                        if weight:
                            # Held-out rows already contain `inside` of the noise.
                            loss[a] += weight * held.sse(*path.solve(s, alpha), noise=s * s - inside)
            chosen.append(ALPHAS[int(loss.argmin())])
        return chosen

    def assemble(self, reference: F64, subspace: Subspace, knots: F64, experts: list) -> Mixture:
        """A mixture with its experts and an idle gate and error model."""
        k = len(experts)
        weights = np.array([[w for w, _ in path] for path in experts])
        intercepts = np.array([[c for _, c in path] for path in experts])
        keep = min(self.options.n_components, subspace.basis.shape[1])
        if keep < N_GATE_COMPONENTS:
            raise InputError(f"the spectra span only {keep} components; the gate needs {N_GATE_COMPONENTS}")
        return Mixture(
            wave=self.spectra.wave,
            reference=reference.astype(np.float32),
            noise_shape=subspace.noise_shape.astype(np.float32),
            knots=knots.astype(np.float32),
            expert_weights=np.einsum("pr,kmr->pkm", subspace.basis, weights, optimize=True).astype(
                np.float32
            ),
            expert_intercepts=intercepts.astype(np.float32),
            basis=subspace.basis[:, :keep].astype(np.float32),
            gate=_idle(N_GATE_FEATURES, k),
            error_model=_idle(N_GATE_FEATURES + 3, 1),
            label_range=(float(self.y.min()), float(self.y.max())),
        )

    # -- second pass --------------------------------------------------------------------------------------------

    def sample(self, mixture, small, subspace, levels, alphas, inside):  # type: ignore[no-untyped-def]
        """Gate features and cross-fitted expert values of the sample rows, each with fresh noise."""
        options = self.options
        weights = np.empty((options.n_folds, options.grid.n_bins, levels.size, subspace.basis.shape[1]))
        intercepts = np.empty(weights.shape[:3])
        for f, k in np.ndindex(*weights.shape[:2]):
            path = NoisePath(small.moments(k, without_fold=f), inside)
            for m, s in enumerate(levels):
                weights[f, k, m], intercepts[f, k, m] = path.solve(s, alphas[k])
        stretches = self.sample_rows()
        n = sum(b - a for a, b in stretches)
        draws = (
            1
            if options.noise == "observed"
            else int(np.clip(options.sample_rows // n, 1, options.sample_draws))
        )
        basis = subspace.basis.astype(np.float32)
        parts: list[tuple] = []
        for here, flux, error, usable in self.blocks("gate sample", stretches):
            rows = np.arange(here.start, here.stop)[usable]
            flux, error = flux[usable], error[usable]
            good = error > 0
            error = np.where(good, error, 1)
            for draw in range(draws):
                x = flux
                if options.noise != "observed":
                    x = standard_normals(options.seed + 1 + draw, rows, flux.shape[1]) * error + flux
                prepared = mixture.prepare(x, error, None if good.all() else good)
                z = np.where(good, x - mixture.reference, 0) @ basis
                level = np.clip(prepared.log_level, mixture.knots[0], mixture.knots[-1])
                hat = hat_weights(level, mixture.knots)
                values = np.empty((len(rows), options.grid.n_bins))
                for f in range(options.n_folds):
                    mine = self.folds[rows] == f
                    each = np.einsum("nr,kmr->nkm", z[mine], weights[f], optimize=True) + intercepts[f]
                    values[mine] = (each * hat[mine][:, None]).sum(2)
                parts.append((prepared.features, values, prepared.chi2, prepared.expert_noise, rows))
        return tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))

    def train(self, mixture, features, values, noise, rows):  # type: ignore[no-untyped-def]
        """Gate, then error model, then the factor that makes 1σ hold 68.27 % of the rows held back."""
        y = self.y[rows]
        held = fold_of_rows(rows, 5, self.options.seed + 1000) == 0
        features = features.astype(np.float64)
        if values.shape[1] == 1:
            gate = np.ones_like(values)
        else:
            net = fit_gate(features, values, y, held, seed=self.options.seed)
            gate = softmax(net(features))
            mixture = _replace(mixture, gate=_as_float32(net.folded()))
        mixed = (gate * values).sum(1)
        log_g = np.clip(mixed, *mixture.label_range)
        raw = (gate * noise).sum(1)
        spread = np.sqrt((gate * (values - mixed[:, None]) ** 2).sum(1))
        inputs = mixture.error_features(features, log_g, raw, spread)
        net = fit_error_model(inputs, y - log_g, held, seed=self.options.seed)
        sigma = np.exp(net(inputs)[:, 0])
        ratio = np.abs(y - log_g)[held] / sigma[held]
        factor = float(np.quantile(ratio, 0.6827))
        w1, b1, w2, b2 = net.folded()
        mixture = _replace(mixture, error_model=_as_float32((w1, b1, w2, b2 + np.log(factor))))
        true = self.bins[rows]
        quality = {
            "rows": int(held.sum()),
            "r2": r2(y[held], log_g[held]),
            "r2_true_bins": r2(y[held], values[np.arange(len(y)), true][held]),
            "coverage_68": float(np.mean(ratio <= factor)),
            "coverage_95": float(np.mean(ratio <= 1.959964 * factor)),
            "gate_accuracy": float(np.mean(gate.argmax(1)[held] == true[held])),
        }
        return mixture, quality

    # -- what to compare with -----------------------------------------------------------------------------------

    def reference_forms(self, moments, published, small, subspace, mixture, levels, alphas, inside):  # type: ignore[no-untyped-def]
        """The fits that show what each step of the method is worth."""
        forms: dict[str, LinearForm] = {}
        one = np.zeros(1, np.float32)

        def single(
            weights: F64, intercept: NDArray | float, levels: F32 = one, clipped: bool = False
        ) -> LinearForm:
            k = np.atleast_2d(intercept).shape
            return LinearForm(
                weights.reshape(-1, *k).astype(np.float32),
                np.reshape(intercept, k).astype(np.float32),
                levels,
                clipped,
            )

        if published is not None:
            seen = published.moments()
            forms["published-ridge"] = single(*ridge(seen, PUBLISHED_ALPHA * seen.n), clipped=True)
        pooled = NoisePath(small.moments(), inside)
        mean_level = 1.0
        w, c = pooled.solve(mean_level)
        forms["global-ridge, average noise"] = single(subspace.basis @ w, c)
        path = [pooled.solve(s) for s in levels]
        forms["global-ridge"] = single(
            np.stack([subspace.basis @ w for w, _ in path], 1),
            np.array([[c for _, c in path]]),
            mixture.knots,
        )
        fixed = [NoisePath(small.moments(k), inside).solve(mean_level, a) for k, a in enumerate(alphas)]
        forms["oracle-ridge, average noise"] = single(
            np.stack([subspace.basis @ w for w, _ in fixed], 1), np.array([[c] for _, c in fixed])
        )
        return forms


def _idle(n_in: int, n_out: int) -> tuple[F32, F32, F32, F32]:
    """Layers that give zero for everything: equal weights, ln σ = 0."""
    return (
        np.zeros((n_in, 1), np.float32),
        np.zeros(1, np.float32),
        np.zeros((1, n_out), np.float32),
        np.zeros(n_out, np.float32),
    )


def _as_float32(arrays: tuple[F64, ...]) -> tuple[F32, ...]:
    return tuple(np.ascontiguousarray(a, np.float32) for a in arrays)


def _replace(mixture: Mixture, **changes: Any) -> Mixture:
    from dataclasses import replace

    return replace(mixture, **changes)
