"""Experts of the study C1 and what they see: from data to predictions for validation stars in their true bins.

Design: spectra are made once: clean ones in noise-white components (noise enters in closed form or drawn), line indices
of noisy ones, and noisy pixels for those who want them. All families see the same stars, and the validation stars with
the same stored noise.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefast.benchmarks.c0 import log_levels
from moefast.core.atomic import atomic_file
from moefast.core.grids import PHYSICAL_GRID, uniform
from moefast.core.line_features import LEAST_CONTINUUM, LINES
from moefast.core.random import add_noise, fold_of_rows
from moefast.experts.indices import MORE_LINES
from moefast.experts.normal_equations import NormalEquations
from moefast.experts.ridge import NoisePath, principal_subspace, ridge
from moefast.experts.template import choose_library, fit_library, library_mean
from moefast.kernels import Library, tangent_posterior
from moefast.mixture import hat_weights
from moefast.simulate import SimulatedSpectra

__all__ = ["BASE", "FAMILIES", "GRID", "SAMPLED", "SETS", "WANT_SPECTRA", "Data", "Plan", "prepare"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Ints = NDArray[np.int64]
Source = Callable[[str, str, tuple[int, int] | None], SimulatedSpectra]
"""Set, part, rows -> spectra."""
Predictions = dict[str, F64]

SETS = ("z0", "survey")
GRID = PHYSICAL_GRID
BLOCK_ROWS = 2048
N_FOLDS = 3
N_LEVELS = 8
MAX_RANK = 160
RANK_STEP = 16
RANK_LOSS = 3e-4
ALPHAS = (0.0, 1e-3, 1e-2, 0.1)
"""Penalties of experts in components, in units of the mean noise variance per star."""
PIXEL_ALPHAS = 10.0 ** np.arange(-4, 1.25, 0.5)
"""α/n of ridges on drawn noise in pixels, flux²; of flux over error in multiples of `WHITE`."""
WHITE = 1e3
MORE_ALPHAS = 10.0 ** np.arange(-3, -0.25, 0.5)
"""The same with many stars per bin, where a solution is a Cholesky decomposition."""
DRAW_SEED = 20261127
BASE = "linear, levels, all"
SAMPLED = "linear, sampled, all"


@dataclass(frozen=True)
class Plan:
    """Sizes of a run.

    Attributes
    ----------
    few, stars : int
        Training stars of the small and the large fits.
    pixels : int
        Training stars whose noisy pixels are kept, and at most how many of a bin the trees get.
    per_bin : int
    validation : int
    draws : int
        Noise draws per training star for experts that need noisy rows.
    cnn_stars : int
    cnn_seconds : float
    trees : int
        Trees of each bin.
    """

    few: int = 10_000
    stars: int = 100_000
    pixels: int = 60_000
    per_bin: int = 6_000
    validation: int = 20_000
    draws: int = 2
    cnn_stars: int = 20_000
    cnn_seconds: float = 240.0
    trees: int = 500


# --- what is seen of a spectrum ------------------------------------------------------------------------------

BANDS = (
    (7105.0, 7150.0), (7160.0, 7250.0), (7380.0, 7460.0), (7480.0, 7580.0), (7700.0, 7850.0), (7900.0, 8050.0),
    (8050.0, 8130.0), (8380.0, 8460.0), (8700.0, 8735.0), (8770.0, 8800.0),
)  # fmt: skip
"""Stretches whose mean flux ratios are slopes of the continuum and depths of TiO and CN bands."""


def index_columns(wave: F64) -> F64:
    """Columns that turn flux into mean of the window and continuum of each line, and the mean of each band.

    Parameters
    ----------
    wave : array of shape (p,), Å

    Returns
    -------
    array of shape (p, 2 × lines + bands), float64
    """
    lines = LINES + MORE_LINES
    columns = np.zeros((wave.size, 2 * len(lines) + len(BANDS)))

    def inside(bounds: tuple[float, float]) -> NDArray[np.bool_]:
        found = (wave >= bounds[0]) & (wave < bounds[1])
        if not found.any():
            raise ValueError(f"no pixel in {bounds[0]}-{bounds[1]} Å")
        return found

    for i, line in enumerate(lines):
        window, blue, red = inside(line.window), inside(line.blue), inside(line.red)
        columns[window, 2 * i] = 1 / window.sum()
        a, b = wave[blue].mean(), wave[red].mean()
        share = (line.centre - a) / (b - a)
        columns[blue, 2 * i + 1] += (1 - share) / blue.sum()
        columns[red, 2 * i + 1] += share / red.sum()
    for j, band in enumerate(BANDS):
        here = inside(band)
        columns[here, 2 * len(lines) + j] = 1 / here.sum()
    return columns


def indices(projected: NDArray) -> F32:
    """Mean depths 1 − window/continuum of all lines, and ln of the ratios of neighbouring bands."""
    n_lines = len(LINES + MORE_LINES)
    window, continuum = projected[:, 0 : 2 * n_lines : 2], projected[:, 1 : 2 * n_lines : 2]
    depths = 1 - window / np.maximum(continuum, LEAST_CONTINUUM)
    bands = np.log(np.maximum(projected[:, 2 * n_lines :], LEAST_CONTINUUM))
    return np.concatenate([depths, np.diff(bands, axis=1)], axis=1).astype(np.float32)


# --- data ----------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """What the families are fitted on and judged by; arrays of the training stars first, `v_` are validation stars.

    Attributes
    ----------
    folder : Path
    wave, reference, noise_shape : array of shape (p,)
    basis : array of shape (p, r), float32
    z : array of shape (n, r), float32
        Clean training spectra in noise-white components.
    noisy, index : array of shape (draws, n, r) and (draws, n, q), float32
        Components and line indices of noisy training spectra.
    level, t_eff, log_g, m_h : array of shape (n,)
    v_z, v_index, v_level, v_snr, v_t_eff, v_log_g, v_m_h : arrays of m rows
        The same of the validation stars with their stored noise; v_snr is snr_norm.
    """

    folder: Path
    wave: F64
    reference: F64
    noise_shape: F64
    basis: F32
    z: F32
    noisy: F32
    index: F32
    level: F64
    t_eff: F64
    log_g: F64
    m_h: F64
    v_z: F32
    v_index: F32
    v_level: F64
    v_snr: F64
    v_t_eff: F64
    v_log_g: F64
    v_m_h: F64

    @cached_property
    def bins(self) -> Ints:
        """True bin of each training star."""
        return GRID.assign(self.t_eff, self.m_h).astype(np.int64)

    @cached_property
    def v_bins(self) -> Ints:
        """True bin of each validation star."""
        return GRID.assign(self.v_t_eff, self.v_m_h).astype(np.int64)

    @cached_property
    def folds(self) -> Ints:
        """Fold of each training star."""
        return fold_of_rows(np.arange(len(self.log_g)), N_FOLDS)

    @cached_property
    def knots(self) -> F64:
        """Noise levels ln s of the experts that know the noise."""
        low, high = np.quantile(self.level, [0.001, 0.999])
        return np.linspace(low - math.log(2), high + math.log(2), N_LEVELS)

    @cached_property
    def shares(self) -> F64:
        """Share of the training stars whose noise is nearest to each knot."""
        nearest = np.abs(self.level[:, None] - self.knots).argmin(1)
        return np.bincount(nearest, minlength=N_LEVELS) / nearest.size

    def pixels(self, name: str) -> NDArray:
        """Pixels kept in a file of the folder: flux or error, v_flux or v_error; memory-mapped."""
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")

    def clip(self, predicted: NDArray) -> F64:
        """Predictions clipped to the range of the training labels, as the product does."""
        return np.clip(np.asarray(predicted, np.float64), self.log_g.min(), self.log_g.max())


ARRAYS = tuple(name for name in Data.__annotations__ if name != "folder")


def prepare(name: str, source: Source, plan: Plan, folder: Path, say: Callable[[str], None]) -> Data:
    """Make the data, or read them where they have been made before."""
    kept = folder / "data.npz"
    if not kept.exists():
        train = source(name, "train", (0, plan.stars))
        validation = source(name, "validation", (0, plan.validation))
        labels = train.labels(("T_eff", "log_g", "M_H"))
        reference, shape, basis = components(train, plan, labels)
        say(f"{basis.shape[1]} components")
        matrix = np.concatenate([basis, index_columns(train.wave)], axis=1).astype(np.float32)
        r = basis.shape[1]
        offset = reference @ matrix[:, r:]
        n, m, q = plan.stars, plan.validation, indices(np.ones((1, matrix.shape[1] - r))).shape[1]
        z, level = np.empty((n, r), np.float32), np.empty(n)
        noisy, index = np.empty((plan.draws, n, r), np.float32), np.empty((plan.draws, n, q), np.float32)
        few = {"flux": (plan.pixels, "flux"), "error": (plan.few, "error")}
        files = {
            key: _pixel_file(folder / f"{key}.npy", rows, reference.size) for key, (rows, _) in few.items()
        }
        for block in train.blocks(BLOCK_ROWS, array="flux"):
            rows = np.arange(block.first_row, block.first_row + len(block))
            z[rows] = (block.flux - reference.astype(np.float32)) @ matrix[:, :r]
            level[rows] = log_levels(block.error, shape)
            for d in range(plan.draws):
                x = add_noise(block.flux, block.error, DRAW_SEED + d, rows)
                seen = (x - reference.astype(np.float32)) @ matrix
                noisy[d, rows], index[d, rows] = seen[:, :r], indices(seen[:, r:] + offset)
                if d == 0:
                    files["flux"][rows[0] : rows[-1] + 1] = x[: max(0, plan.pixels - rows[0])]
            files["error"][rows[0] : rows[-1] + 1] = block.error[: max(0, plan.few - rows[0])]
        say("training spectra")
        stop = {key: _pixel_file(folder / f"v_{key}.npy", m, reference.size) for key in ("flux", "error")}
        v_z, v_index = np.empty((m, r), np.float32), np.empty((m, q), np.float32)
        v_level, v_snr = np.empty(m), np.empty(m)
        for block in validation.blocks(BLOCK_ROWS, array="noisy"):
            here = slice(block.first_row, block.first_row + len(block))
            stop["flux"][here], stop["error"][here] = block.flux, block.error
            seen = (block.flux - reference.astype(np.float32)) @ matrix
            v_z[here], v_index[here] = seen[:, :r], indices(seen[:, r:] + offset)
            v_level[here] = log_levels(block.error, shape)
            v_snr[here] = np.linalg.norm(block.flux, axis=1) / np.linalg.norm(block.error, axis=1)
        for array in (*files.values(), *stop.values()):
            array.flush()
        own = validation.labels(("T_eff", "log_g", "M_H"))
        data = Data(
            folder, train.wave, reference, shape, basis.astype(np.float32), z, noisy, index, level, labels["T_eff"],
            labels["log_g"], labels["M_H"], v_z, v_index, v_level, v_snr, own["T_eff"], own["log_g"], own["M_H"],
        )  # fmt: skip
        with atomic_file(kept) as partial, partial.open("wb") as opened:
            np.savez(opened, **{key: getattr(data, key) for key in ARRAYS})
        say("validation spectra")
    with np.load(kept) as file:
        return Data(folder, **{key: file[key] for key in ARRAYS})


def _pixel_file(path: Path, rows: int, p: int) -> np.memmap:
    return np.lib.format.open_memmap(path, "w+", np.float32, (rows, p))


def components(spectra: SimulatedSpectra, plan: Plan, labels: Mapping[str, F64]) -> tuple[F64, F64, F64]:
    """Reference, noise shape and noise-white components (p, r) of the first rows, r by cross-validation."""
    n = min(2 * plan.few, plan.stars)
    first = next(spectra.blocks(BLOCK_ROWS, array="flux", rows=(0, min(BLOCK_ROWS, n))))
    totals = NormalEquations(first.flux.mean(0, dtype=np.float64), GRID.n_bins, N_FOLDS)
    bins = GRID.assign(labels["T_eff"], labels["M_H"]).astype(np.int64)
    folds = fold_of_rows(np.arange(n), N_FOLDS)
    levels = []
    for block in spectra.blocks(BLOCK_ROWS, array="flux", rows=(0, n)):
        here = slice(block.first_row, block.first_row + len(block))
        totals.add(block.flux, labels["log_g"][here], block.error**2, bins[here], folds[here])
        levels.append(block.error)
    moments = totals.moments()
    space = principal_subspace(moments, moments.variance, max_rank=MAX_RANK)
    small = totals.transform(space.basis)
    found = np.concatenate([log_levels(error, moments.variance) for error in levels])
    marks = np.log(np.quantile(np.exp(found), [0.1, 0.3, 0.5, 0.7, 0.9]))

    def loss(rank: int) -> float:
        part = small.transform(np.eye(space.basis.shape[1], rank))
        return sum(held_out(part, k, np.exp(marks), np.full(5, 0.2), (0.0,))[0] for k in range(GRID.n_bins))

    ranks = [*range(RANK_STEP, space.basis.shape[1], RANK_STEP), space.basis.shape[1]]
    losses = {rank: loss(rank) for rank in ranks}
    enough = min(losses.values()) + RANK_LOSS * moments.sum_yy
    rank = next(rank for rank, value in losses.items() if value <= enough)
    return totals.reference, moments.variance, space.basis[:, :rank]


# --- linear experts ------------------------------------------------------------------------------------------


def held_out(
    small: NormalEquations, bin_: int, levels: F64, shares: F64, alphas: Sequence[float]
) -> list[float]:
    """Cross-validated squared error of a bin for each penalty, over the noise levels as they occur."""
    total = [0.0] * len(alphas)
    for f in range(small.n_folds):
        if small.count[bin_, f] == 0 or small.count[bin_].sum() - small.count[bin_, f] < 2:
            continue
        path, held = NoisePath(small.moments(bin_, without_fold=f)), small.moments(bin_, fold=f)
        for a, alpha in enumerate(alphas):
            for s, share in zip(levels, shares, strict=True):
                if share:
                    total[a] += share * held.sse(*path.solve(s, alpha), noise=s * s)
    return total


@dataclass(frozen=True)
class Levelled:
    """Experts w(s) = (G + n (s² + α) I)⁻¹ b: weights (K, M, r), intercepts (K, M), and those without each fold."""

    knots: F64
    weights: F64
    intercepts: F64
    without: tuple[tuple[F64, F64], ...]

    @classmethod
    def fit(cls, data: Data, n: int, cells: Ints, n_cells: int) -> Levelled:
        """From the first n clean stars; penalties by cross-validation."""
        small = totals_of(data.z[:n], data.log_g[:n], cells[:n], n_cells, data.folds[:n])
        levels = np.exp(data.knots)
        shape = (N_FOLDS + 1, n_cells, N_LEVELS)
        weights, intercepts = np.zeros((*shape, data.z.shape[1])), np.full(shape, data.log_g[:n].mean())
        for k in range(n_cells):
            if small.count[k].sum() < 2:
                continue
            alpha = ALPHAS[int(np.argmin(held_out(small, k, levels, data.shares, ALPHAS)))]
            for f in range(N_FOLDS + 1):
                left = f if f < N_FOLDS else None
                if small.count[k].sum() - (small.count[k, f] if f < N_FOLDS else 0) < 2:
                    continue
                path = NoisePath(small.moments(k, without_fold=left))
                for m, s in enumerate(levels):
                    weights[f, k, m], intercepts[f, k, m] = path.solve(s, alpha)
        return cls(
            data.knots, weights[-1], intercepts[-1],
            tuple(zip(weights[:-1], intercepts[:-1], strict=True)),
        )  # fmt: skip

    def predict(self, z: NDArray, level: F64, cells: Ints, fold: int | None = None) -> F64:
        """Log g of each star by the expert of its cell."""
        weights, intercepts = (self.weights, self.intercepts) if fold is None else self.without[fold]
        hat = hat_weights(np.clip(level, self.knots[0], self.knots[-1]), self.knots)
        out = np.empty(len(z))
        for k in np.unique(cells):
            here = cells == k
            out[here] = ((z[here] @ weights[k].T + intercepts[k]) * hat[here]).sum(1)
        return out

    def out_of_fold(self, data: Data, z: NDArray, n: int) -> F64:
        """Predictions of the first n training stars by experts that did not see them."""
        out = np.empty(n)
        for f in range(N_FOLDS):
            mine = data.folds[:n] == f
            out[mine] = self.predict(z[:n][mine], data.level[:n][mine], data.bins[:n][mine], f)
        return out


def totals_of(z: F32, y: F64, cells: Ints, n_cells: int, folds: Ints | None = None) -> NormalEquations:
    """Normal equations of rows in components."""
    n_folds = 1 if folds is None else N_FOLDS
    totals = NormalEquations(np.zeros(z.shape[1]), n_cells, n_folds)
    totals.add(z, y, None, cells, folds)
    return totals


def average(data: Data, n: int) -> F64:
    """Noise in closed form at the average level: one expert per bin for all stars."""
    small = totals_of(data.z[:n], data.log_g[:n], data.bins[:n], GRID.n_bins, data.folds[:n])
    out = np.empty(len(data.v_z))
    for k in range(GRID.n_bins):
        losses = held_out(small, k, np.exp(data.knots), data.shares, ALPHAS)
        w, c = NoisePath(small.moments(k)).solve(1.0, ALPHAS[int(np.argmin(losses))])
        here = data.v_bins == k
        out[here] = data.v_z[here] @ w + c
    return out


def linear(data: Data, plan: Plan, say: Callable[[str], None]) -> Predictions:
    """Noise in closed form: at the average level and per level, on grids of several sizes with true cells."""
    found = {}
    for what, n in (("few", plan.few), ("all", plan.stars)):
        found[f"linear, average, {what}"] = average(data, n)
        fit = Levelled.fit(data, n, data.bins, GRID.n_bins)
        found[f"linear, levels, {what}"] = fit.predict(data.v_z, data.v_level, data.v_bins)
        for size in (5, 7):
            grid = uniform(size, size)
            cells = grid.assign(data.t_eff, data.m_h).astype(np.int64)
            v_cells = grid.assign(data.v_t_eff, data.v_m_h).astype(np.int64)
            fit = Levelled.fit(data, n, cells, grid.n_bins)
            found[f"linear, {size} x {size}, {what}"] = fit.predict(data.v_z, data.v_level, v_cells)
        cells, v_cells, n_cells = adaptive(data, n)
        fit = Levelled.fit(data, n, cells, n_cells)
        found[f"linear, adaptive, {what}"] = fit.predict(data.v_z, data.v_level, v_cells)
        say(f"adaptive grid of {n:,} stars: {n_cells} cells")
    return found


LEAST_GAIN = 2e-4
"""R² of all stars that a split of a cell must gain."""
LEAST_CELL = 150
"""Stars of a cell."""


def adaptive(data: Data, n: int) -> tuple[Ints, Ints, int]:
    """Cells of training and validation stars: bins are halved along T_eff or [M/H] while cross-validation gains."""
    total = float(((data.log_g[:n] - data.log_g[:n].mean()) ** 2).sum())
    levels = np.exp(data.knots)
    train, held = (data.t_eff, data.m_h), (data.v_t_eff, data.v_m_h)
    cells, v_cells, n_cells = data.bins.copy(), data.v_bins.copy(), GRID.n_bins

    def losses(rows: NDArray, sides: Ints) -> float:
        small = totals_of(data.z[rows], data.log_g[rows], sides, 2, data.folds[rows])
        return sum(
            held_out(small, k, levels, data.shares, (0.0,))[0] for k in range(2) if small.count[k].sum()
        )

    waiting = list(range(n_cells))
    while waiting:
        cell = waiting.pop()
        rows = np.flatnonzero(cells[:n] == cell)
        if len(rows) < 2 * LEAST_CELL:
            continue
        whole, best = losses(rows, np.zeros(len(rows), np.int64)), (0.0, 0, 0.0)
        for axis in range(2):
            for edge in np.quantile(train[axis][rows], [0.33, 0.5, 0.67]):
                sides = (train[axis][rows] >= edge).astype(np.int64)
                if min(sides.sum(), (1 - sides).sum()) >= LEAST_CELL:
                    best = max(best, (whole - losses(rows, sides), axis, float(edge)))
        if best[0] > LEAST_GAIN * total:
            _, axis, edge = best
            cells[(cells == cell) & (train[axis] >= edge)] = n_cells
            v_cells[(v_cells == cell) & (held[axis] >= edge)] = n_cells
            waiting += [cell, n_cells]
            n_cells += 1
    return cells, v_cells, n_cells


def dual_path(x: F32, y: F64, alphas: F64, folds: Ints) -> tuple[F64, F64, float]:
    """Ridge for fewer rows than pixels: w = Xᵀ(XXᵀ + α n I)⁻¹ y, α by cross-validation.

    Returns
    -------
    tuple of mean spectrum (p,), weights (p,) and α/n; the intercept is the mean label.
    """
    loss = np.zeros(len(alphas))
    for f in range(N_FOLDS):
        held = folds == f
        if not held.any() or held.all():
            continue
        mean, c = x[~held].mean(0), y[~held].mean()
        seen, other = x[~held] - mean, x[held] - mean
        values, vectors = np.linalg.eigh((seen @ seen.T).astype(np.float64))
        cross = (other @ seen.T) @ vectors
        inner = vectors.T @ (y[~held] - c)
        for a, alpha in enumerate(alphas):
            loss[a] += ((y[held] - c - cross @ (inner / (values + alpha * len(seen)))) ** 2).sum()
    alpha = float(alphas[loss.argmin()])
    mean = x.mean(0)
    centred = x - mean
    kernel = (centred @ centred.T).astype(np.float64)
    kernel[np.diag_indices_from(kernel)] += alpha * len(x)
    return mean, centred.T @ np.linalg.solve(kernel, y - y.mean()), alpha


def drawn_few(data: Data, plan: Plan, say: Callable[[str], None]) -> Predictions:
    """One ridge per bin on one noise draw, few stars: flux, flux over s√D, flux over the star's own error."""
    v_flux, v_error = data.pixels("v_flux"), data.pixels("v_error")
    flux, error = data.pixels("flux")[: plan.few], data.pixels("error")[: plan.few]
    root = np.sqrt(data.noise_shape).astype(np.float32)
    found = {}
    views = {
        "linear, sampled, few": (lambda x, e, s: x, 1.0),
        "linear, whitened, few": (lambda x, e, s: x / (root * np.exp(s).astype(np.float32)[:, None]), WHITE),
        "linear, over own error, few": (lambda x, e, s: x / e, WHITE),
    }
    for name, (view, unit) in views.items():
        out, alphas = np.empty(len(v_flux)), []
        for k in range(GRID.n_bins):
            mine, here = np.flatnonzero(data.bins[: plan.few] == k), np.flatnonzero(data.v_bins == k)
            x = view(flux[mine], error[mine], data.level[mine])
            mean, w, alpha = dual_path(x, data.log_g[mine], unit * PIXEL_ALPHAS, data.folds[mine])
            own = view(v_flux[here], v_error[here], data.v_level[here])
            out[here] = (own - mean) @ w + data.log_g[mine].mean()
            alphas.append(alpha)
        found[name] = out
        say(f"{name}: α/n {min(alphas):.1g} to {max(alphas):.1g}")
    return found


def drawn_all(data: Data, plan: Plan, say: Callable[[str], None], train: SimulatedSpectra) -> Predictions:
    """One ridge per bin on one noise draw of all stars: flux in pixels, and noise-white components over s."""
    totals = NormalEquations(data.reference, GRID.n_bins, 2)
    for block in train.blocks(BLOCK_ROWS, array="flux"):
        rows = np.arange(block.first_row, block.first_row + len(block))
        x = add_noise(block.flux, block.error, DRAW_SEED, rows)
        totals.add(x, data.log_g[rows], None, data.bins[rows], np.minimum(fold_of_rows(rows, 5), 1))
    totals.finish()
    say("normal equations of drawn noise")
    reference = data.reference.astype(np.float32)
    v_flux, out, alphas = data.pixels("v_flux"), np.empty(len(data.v_z)), []
    for k in range(GRID.n_bins):
        seen, held = totals.moments(k, without_fold=0), totals.moments(k, fold=0)
        losses = [held.sse(*ridge(seen, alpha * seen.n)) for alpha in MORE_ALPHAS]
        alpha = MORE_ALPHAS[int(np.argmin(losses))]
        every = totals.moments(k)
        w, c = ridge(every, alpha * every.n)
        here = np.flatnonzero(data.v_bins == k)
        out[here] = (v_flux[here] - reference) @ w.astype(np.float32) + c
        alphas.append(alpha)
    say(f"sampled ridge: α/n {min(alphas):.1g} to {max(alphas):.1g}")
    scale = np.exp(-data.level)[:, None]
    white, v_white = data.noisy[0] * scale, data.v_z * np.exp(-data.v_level)[:, None]
    small = totals_of(white.astype(np.float32), data.log_g, data.bins, GRID.n_bins, data.folds)
    second = np.empty(len(data.v_z))
    for k in range(GRID.n_bins):
        # Noise is in the rows: penalties only, and nothing to add for it.
        penalties = tuple(10.0 ** np.arange(-3, 1.25, 0.5))
        loss = [
            sum(
                small.moments(k, fold=f).sse(*NoisePath(small.moments(k, without_fold=f)).solve(0.0, alpha))
                for f in range(N_FOLDS)
            )
            for alpha in penalties
        ]
        w, c = NoisePath(small.moments(k)).solve(0.0, penalties[int(np.argmin(loss))])
        here = data.v_bins == k
        second[here] = v_white[here] @ w + c
    return {SAMPLED: out, "linear, whitened, all": second}


def gated(data: Data, plan: Plan, say: Callable[[str], None], train: SimulatedSpectra) -> Predictions:
    """The default mixture as it is deployed: linear experts per level, mixed by the gate, bins unknown."""
    from moefast.fitting import Options, fit_mixture

    mixture = fit_mixture(train, Options(references=False)).mixture
    v_flux, v_error = data.pixels("v_flux"), data.pixels("v_error")
    parts = range(0, len(v_flux), BLOCK_ROWS)
    found = [mixture.predict(v_flux[a : a + BLOCK_ROWS], v_error[a : a + BLOCK_ROWS]).log_g for a in parts]
    return {"gate, linear, all": np.concatenate(found)}


# --- other families ------------------------------------------------------------------------------------------


def trees_on(x: NDArray, y: F64, v_x: NDArray, plan: Plan, *, max_bin: int = 255) -> F64:
    """LightGBM with the options of `moefast.experts.trees.fit_trees`, on one thread."""
    import lightgbm

    options = {
        "objective": "regression",
        "max_depth": 5,
        "num_leaves": 20,
        "learning_rate": 0.05,
        "feature_fraction": 0.3,
        "bagging_fraction": 0.7,
        "bagging_freq": 1,
        "min_child_samples": 50,
        "reg_alpha": 1.0,
        "reg_lambda": 1.0,
        "max_bin": max_bin,
        "deterministic": True,
        "force_col_wise": True,
        "num_threads": 1,
        "seed": 0,
        "verbosity": -1,
    }
    rows = lightgbm.Dataset(np.ascontiguousarray(x, np.float32), y, params=options)
    model = lightgbm.train(options, rows, num_boost_round=plan.trees)
    return np.asarray(model.predict(np.ascontiguousarray(v_x, np.float32), num_threads=1))


def trees_on_flux(data: Data, plan: Plan, say: Callable[[str], None]) -> Predictions:
    """LightGBM on noisy flux, as it is; 63 steps per pixel take half the time of 255 and are as good within 0.005."""
    flux, v_flux = data.pixels("flux"), data.pixels("v_flux")
    out = np.empty(len(data.v_z))
    for k in range(GRID.n_bins):
        mine = np.flatnonzero(data.bins[: plan.pixels] == k)[: plan.per_bin]
        here = np.flatnonzero(data.v_bins == k)
        out[here] = trees_on(flux[mine], data.log_g[mine], v_flux[here], plan, max_bin=63)
        say(f"trees on flux: bin {k}, {len(mine):,} stars")
    return {"trees, flux": out}


def stacked(data: Data, plan: Plan, say: Callable[[str], None]) -> Predictions:
    """LightGBM and ridge on components, line indices, noise level; and with the linear expert's answer beside them."""
    found: Predictions = {}
    for what, n in (("few", plan.few), ("all", plan.stars)):
        fit = Levelled.fit(data, n, data.bins, GRID.n_bins)
        own = [fit.out_of_fold(data, z, n) for z in data.noisy]
        v_own = fit.predict(data.v_z, data.v_level, data.v_bins)
        names = ("trees, stacked", "ridge, stacked") + (("trees, on linear",) if what == "all" else ())
        out = {name: np.empty(len(data.v_z)) for name in names}
        for k in range(GRID.n_bins):
            mine, here = np.flatnonzero(data.bins[:n] == k), data.v_bins == k
            rows = [
                np.column_stack([z[mine], i[mine], data.level[mine]])
                for z, i in zip(data.noisy, data.index, strict=True)
            ]
            x, y = np.concatenate(rows), np.tile(data.log_g[mine], len(rows))
            v_x = np.column_stack([data.v_z[here], data.v_index[here], data.v_level[here]])
            linear_ = np.concatenate([one[mine] for one in own])
            out["trees, stacked"][here] = trees_on(x, y, v_x, plan)
            if what == "all":
                rest = trees_on(
                    np.column_stack([x, linear_]), y - linear_, np.column_stack([v_x, v_own[here]]), plan
                )
                out["trees, on linear"][here] = v_own[here] + rest
            folds = np.tile(data.folds[mine], len(rows))
            out["ridge, stacked"][here] = ridge_on(
                stacked_columns(x, linear_), y, stacked_columns(v_x, v_own[here]), folds
            )
        found |= {f"{name}, {what}": values for name, values in out.items()}
        say(f"stacked, {n:,} stars")
    return found


def stacked_columns(x: NDArray, own: F64) -> F64:
    """Columns for a ridge: components, indices and level; all of them times the level; the linear expert's answer."""
    level = x[:, -1:]
    return np.column_stack([x, x * level, own, own * level[:, 0], own**2])


def ridge_on(x: F64, y: F64, v_x: F64, folds: Ints) -> F64:
    """Ridge on standardised columns, α by cross-validation."""
    mean, scale = x.mean(0), x.std(0) + 1e-12
    a, b = (x - mean) / scale, (v_x - mean) / scale
    alphas, c = 10.0 ** np.arange(-5, 0.25, 0.5), y.mean()

    def solve(rows: NDArray) -> Iterator[F64]:
        values, vectors = np.linalg.eigh(a[rows].T @ a[rows])
        inner = vectors.T @ (a[rows].T @ (y[rows] - c))
        for alpha in alphas:
            yield vectors @ (inner / (values + alpha * rows.sum()))

    loss = np.zeros(len(alphas))
    for f in range(N_FOLDS):
        held = folds == f
        loss += [((y[held] - c - a[held] @ w) ** 2).sum() for w in solve(~held)]
    w = list(solve(np.ones(len(y), bool)))[int(loss.argmin())]
    return b @ w + c


def template(data: Data, plan: Plan, say: Callable[[str], None]) -> Predictions:
    """Posterior mean over clouds of clean training spectra: of the true bin, and of the whole library."""
    found = {}
    labels = np.column_stack([data.t_eff, data.log_g, data.m_h])
    for what, n in (("few", plan.few), ("all", plan.stars)):
        fitted, held = slice(0, n - n // 10), slice(n - n // 10, n)

        def fit(m: int, t: int, rows: slice = fitted) -> Library:
            return fit_library(
                data.z[rows],
                labels[rows],
                data.log_g[rows],
                data.bins[rows],
                GRID.n_bins,
                n_clouds=m,
                n_tangents=t,
            )

        # The tenth that chooses the size is not added afterwards.
        library, tried = choose_library(
            fit,
            data.noisy[0, held],
            data.level[held].astype(np.float32),
            data.log_g[held],
            n_stars=n - n // 10,
        )
        level = data.v_level.astype(np.float32)
        posterior = tangent_posterior(data.v_z, level, library)
        found[f"template, {what}"] = posterior.mean[np.arange(len(level)), data.v_bins].astype(np.float64)
        found[f"template, no bins, {what}"] = library_mean(data.v_z, level, library)
        sizes = {size: round(float(value), 4) for size, value in tried.items()}
        say(f"template, {n:,} stars: {library.tangents.shape[:2]} chosen of {sizes}")
    return found


def cnn(data: Data, plan: Plan, say: Callable[[str], None], train: SimulatedSpectra) -> Predictions:
    """A 1D-CNN (32-64-32 channels) with one head per bin, trained with fresh noise for a given time."""
    import torch
    from torch import nn

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    root = np.sqrt(data.noise_shape).astype(np.float32)
    reference = data.reference.astype(np.float32)
    clean, noise = [], []
    for block in train.blocks(BLOCK_ROWS, array="flux", rows=(0, plan.cnn_stars)):
        clean.append(torch.from_numpy((block.flux - reference) / root).half())
        noise.append(torch.from_numpy(block.error / root).half())
    x, e = torch.cat(clean), torch.cat(noise)
    y = torch.from_numpy(((data.log_g - 3.0) / 1.15).astype(np.float32))
    bins, level = torch.from_numpy(data.bins), torch.from_numpy(data.level.astype(np.float32))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Sequential(
                nn.Conv1d(1, 32, 9, stride=4, padding=4), nn.SiLU(),
                nn.Conv1d(32, 64, 9, stride=4, padding=4), nn.SiLU(),
                nn.Conv1d(64, 32, 9, stride=4, padding=4), nn.SiLU(),
                nn.AdaptiveAvgPool1d(32), nn.Flatten(),
            )  # fmt: skip
            self.dense = nn.Sequential(nn.Linear(32 * 32 + 1, 128), nn.SiLU())
            self.heads = nn.Linear(128, GRID.n_bins)

        def forward(self, x: Any, level: Any, bins: Any) -> Any:
            hidden = self.trunk(0.3 * x[:, None])
            hidden = self.dense(torch.cat([hidden, level[:, None]], 1))
            return self.heads(hidden).gather(1, bins[:, None])[:, 0]

    network = Network()
    mean = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-3)
    begin, steps, size = time.process_time(), 0, 256
    while (done := (time.process_time() - begin) / plan.cnn_seconds) < 1:
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1.0, (steps + 1) / 100) * (0.5 * (1 + math.cos(math.pi * done)) + 1e-3)
        i = torch.randint(0, len(x), (size,))
        noisy = x[i].float() + torch.randn(size, x.shape[1]) * e[i].float()
        loss = ((network(noisy, level[i], bins[i]) - y[i]) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        mean.update_parameters(network)
        steps += 1
    v_flux, out = data.pixels("v_flux"), []
    v_level, v_bins = torch.from_numpy(data.v_level.astype(np.float32)), torch.from_numpy(data.v_bins)
    with torch.no_grad():
        for a in range(0, len(v_flux), 1000):
            here = slice(a, a + 1000)
            seen = torch.from_numpy((v_flux[here] - reference) / root)
            out.append(mean(seen, v_level[here], v_bins[here]).numpy())
    torch.set_num_threads(threads)
    say(f"cnn: {steps} steps of {size} of {plan.cnn_stars:,} stars in {plan.cnn_seconds:.0f} s")
    return {"cnn": 3.0 + 1.15 * np.concatenate(out).astype(np.float64)}


FAMILIES: dict[str, Callable[..., Predictions]] = {
    "linear": linear,
    "drawn-few": drawn_few,
    "drawn-all": drawn_all,
    "stacked": stacked,
    "template": template,
    "trees-on-flux": trees_on_flux,
    "cnn": cnn,
    "gated": gated,
}
"""Functions of (data, plan, say), and of the training spectra where pixels are wanted that are not kept."""
WANT_SPECTRA = {"drawn-all", "cnn", "gated"}
