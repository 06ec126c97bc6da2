"""Linear experts from the normal equations: noise-white components, noise levels, penalties, and a first mixture.

Design: what reads rows again is one small sample, for the noise levels. All else is algebra on the totals: they are
taken into the leading principal components once, and each choice (how many of these, which penalty) is made there by
cross-validation over the folds, at the noise levels as they occur. The same experts without each fold are kept: they
speak for the rows of that fold in the second pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.sparse.linalg
from numpy.typing import NDArray

from moefast.core.grids import SNR_NORM_NAMES, assign_snr_bins
from moefast.experts.normal_equations import Moments, NormalEquations
from moefast.experts.ridge import NoisePath, Subspace, principal_subspace, ridge
from moefast.fitting.options import Options
from moefast.fitting.training_set import Rows, TrainingSet
from moefast.mixture import Mixture, n_gate_features

__all__ = [
    "Levels",
    "LinearExperts",
    "Solved",
    "choose_rank",
    "find_levels",
    "held_out",
    "mixture_of",
    "solve",
]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

ALPHAS = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0)
"""Ridge penalties tried per bin, in units of the mean noise variance per star."""
RANK_STEP = 16
RANK_LOSS = 3e-4
"""R² that may be lost by leaving out the last principal components."""
N_COMPONENTS = 48
"""Principal components for gate and χ² of a fit in pixel space."""
LEVEL_ROWS = 30_000
"""Rows that say which noise levels there are."""


class Levels(NamedTuple):
    """M noise levels: `knots` = ln s (M,), evenly spaced, and `shares` (M,) of the sampled stars nearest to each.

    `of_snr` (4,) is the root mean square of s in each bin of snr_norm, 1 where the sample has no star.
    """

    knots: F64
    shares: F64
    of_snr: F64

    @property
    def s(self) -> F64:
        """Noise relative to the mean of the training set, (M,)."""
        return np.exp(self.knots)


@dataclass(frozen=True)
class LinearExperts:
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


class Solved(NamedTuple):
    """What the normal equations give: `moments` of all rows in pixels, `small` in the components."""

    reference: F64
    moments: Moments
    subspace: Subspace
    levels: Levels
    small: NormalEquations
    experts: LinearExperts


def solve(data: TrainingSet, equations: NormalEquations, times_good: F64) -> Solved:
    """Principal components, noise levels, and the experts in them.

    Parameters
    ----------
    data : TrainingSet
    equations : NormalEquations
        Of all rows, in pixels.
    times_good : array of shape (p,)
        Rows in which a pixel was good.
    """
    options = data.options
    step = data.steps("components", 2)
    pooled = equations.pooled()
    moments = pooled.moments()
    step()
    # Σv holds nothing for bad pixels: divide by the rows in which a pixel was good.
    seen = times_good > 0
    noise_shape = np.divide(moments.variance * moments.n, times_good, where=seen, out=np.zeros(seen.size))
    noise_shape[~seen] = np.median(noise_shape[seen])
    subspace = principal_subspace(moments, noise_shape, seed=options.seed)
    step()
    levels = find_levels(data, noise_shape)
    n_bins, ranks = options.grid.n_bins, _ranks(options, len(subspace.variance))
    step = data.steps("experts", 1 + (len(ranks) + 2 * n_bins if options.alpha is None else n_bins))
    small = equations.transform(subspace.basis)
    step()
    if options.alpha is None:
        rank = choose_rank(options, small, levels, step)
        leading = small.transform(np.eye(len(subspace.variance), rank))
        experts = _in_components(options, leading, subspace, levels, step)
    else:
        experts = _in_pixels(options, equations, options.alpha, step)
    return Solved(pooled.reference, moments, subspace, levels, small, experts)


def find_levels(data: TrainingSet, noise_shape: F64) -> Levels:
    """Evenly spaced ln s from half the 0.1 % quantile to twice the 99.9 % quantile of the training set."""
    sample = data.sample_stretches()
    some = sample[:: max(1, sum(b - a for a, b in sample) // LEVEL_ROWS)]
    parts = data.map_blocks("noise levels", some, _levels_and_snr, noise_shape.astype(np.float32))
    log_levels, snr = (np.concatenate(column) for column in zip(*parts, strict=True))
    low, high = np.quantile(log_levels, [0.001, 0.999])
    margin = np.log(2.0)
    knots = np.linspace(low - margin, high + margin, data.options.n_levels)
    nearest = np.abs(log_levels[:, None] - knots).argmin(1)
    return Levels(knots, np.bincount(nearest, minlength=knots.size) / nearest.size, _of_snr(log_levels, snr))


def _of_snr(log_levels: NDArray, snr: NDArray) -> F64:
    """Root mean square of s in each bin of snr_norm, 1 where there is no star."""
    bins, n_bins = assign_snr_bins(snr), len(SNR_NORM_NAMES)
    counts = np.bincount(bins, minlength=n_bins)
    squares = np.bincount(bins, np.exp(2 * log_levels.astype(np.float64)), n_bins)
    return np.sqrt(np.divide(squares, counts, where=counts > 0, out=np.ones(n_bins)))


def _levels_and_snr(data: TrainingSet, block: Rows, shape: F32) -> tuple[NDArray, NDArray]:
    """Ln s and snr_norm of a block's stars."""
    _, flux, error, usable = block
    chosen = error[usable]
    # Bad pixels were given zero error; they do not count.
    n_good = np.count_nonzero(chosen, axis=1)
    levels: NDArray = 0.5 * np.log((chosen * chosen / shape).sum(1) / n_good)
    return levels, data.snr_norm(flux[usable], chosen)


def held_out(
    options: Options, small: NormalEquations, bin_: int, levels: Levels, alphas: tuple[float, ...]
) -> F64:
    """Cross-validated squared error of a bin for each penalty, over the noise levels as they occur."""
    inside, loss = options.noise_inside, np.zeros(len(alphas))
    for f in range(options.n_folds):
        if small.count[bin_, f] == 0:
            continue
        path = NoisePath(small.moments(bin_, without_fold=f), inside)
        held = small.moments(bin_, fold=f)
        for a, alpha in enumerate(alphas):
            for s, share in zip(levels.s, levels.shares, strict=True):
                if share:
                    # Held-out rows already contain `inside` of the noise.
                    loss[a] += share * held.sse(*path.solve(s, alpha), noise=s * s - inside)
    return loss


def _ranks(options: Options, full: int) -> list[int]:
    """Numbers of leading components to choose from."""
    if options.n_components is not None:
        return [min(options.n_components, full)]
    return [*range(RANK_STEP, full, RANK_STEP), full]


def choose_rank(
    options: Options, small: NormalEquations, levels: Levels, step: Callable[[], None] = lambda: None
) -> int:
    """The least number of leading components, in steps of `RANK_STEP`, within `RANK_LOSS` of the best R².

    Scoring takes time in proportion to them, and the last of many carry next to nothing.
    """
    full = small.n_pixels
    ranks = _ranks(options, full)
    if len(ranks) == 1:
        step()
        return ranks[0]

    def loss(rank: int) -> float:
        step()
        leading = small.transform(np.eye(full, rank))
        return float(sum(held_out(options, leading, k, levels, (0.0,))[0] for k in range(small.n_bins)))

    losses = {rank: loss(rank) for rank in ranks}
    # The best, not the full number: with few noisy rows the last components do harm.
    allowed = min(losses.values()) + RANK_LOSS * small.moments().sum_yy
    return next(rank for rank, found in losses.items() if found <= allowed)


def _choose_alphas(
    options: Options, small: NormalEquations, levels: Levels, step: Callable[[], None]
) -> list[float]:
    """The penalty of each bin with the least cross-validated squared error at the noise levels that occur."""
    chosen = []
    for k in range(options.grid.n_bins):
        chosen.append(ALPHAS[int(held_out(options, small, k, levels, ALPHAS).argmin())])
        step()
    return chosen


def _in_components(
    options: Options, small: NormalEquations, subspace: Subspace, levels: Levels, step: Callable[[], None]
) -> LinearExperts:
    """Experts solved for every noise level in the leading principal components, those of `small`."""
    alphas, rank = _choose_alphas(options, small, levels, step), small.n_pixels
    shape = (options.n_folds + 1, options.grid.n_bins, levels.knots.size)
    weights, intercepts = np.empty((*shape, rank)), np.empty(shape)
    conditions = []
    for k, alpha in enumerate(alphas):
        for f in range(shape[0]):
            # The last of them leaves no fold out.
            path = NoisePath(
                small.moments(k, without_fold=f if f < options.n_folds else None), options.noise_inside
            )
            for m, s in enumerate(levels.s):
                weights[f, k, m], intercepts[f, k, m] = path.solve(s, alpha)
        conditions.append(path.condition(levels.s[0], alpha))
        step()
    return LinearExperts(
        subspace.basis[:, :rank], weights[-1], intercepts[-1], weights[:-1], intercepts[:-1], alphas, conditions,
        f"eigendecomposition in {rank} noise-white principal components",
    )  # fmt: skip


def _in_pixels(
    options: Options, equations: NormalEquations, alpha: float, step: Callable[[], None]
) -> LinearExperts:
    """Experts in pixel space with a given penalty per row, the same at every noise level."""
    closed = options.noise == "closed-form"
    n_bins, n_solves = options.grid.n_bins, options.n_folds + 1
    columns = np.empty((equations.n_pixels, n_bins, n_solves))
    intercepts = np.empty((n_solves, n_bins))
    conditions = []
    for k in range(n_bins):
        for f in range(n_solves):
            moments = equations.moments(k, without_fold=f if f < options.n_folds else None)
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
    weights = np.repeat(picks[:, :, None], options.n_levels, axis=2)
    spread = np.repeat(intercepts[:, :, None], options.n_levels, axis=2)
    return LinearExperts(
        columns.reshape(len(columns), -1), weights[-1], spread[-1], weights[:-1], spread[:-1],
        n_bins * [alpha], conditions, f"Cholesky decomposition in {len(columns)} pixels",
    )  # fmt: skip


def mixture_of(data: TrainingSet, solved: Solved) -> Mixture:
    """A mixture with its linear experts and an idle gate and error model."""
    options, subspace, experts = data.options, solved.subspace, solved.experts
    k, columns, weights = len(experts.weights), experts.columns, experts.weights
    keep = columns.shape[1]
    if options.alpha is not None:
        # Experts in pixel space see one direction each; the components stand before these, for gate and χ².
        keep = min(options.n_components or N_COMPONENTS, subspace.basis.shape[1])
        own = columns.reshape(len(columns), k, -1)[:, :, -1]
        columns = np.concatenate([subspace.basis[:, :keep], own], axis=1)
        picks = np.eye(k, k + keep, keep)
        weights = np.repeat(picks[:, None], weights.shape[1], axis=1)
    n_gate = min(options.n_gate, keep)
    return Mixture(
        wave=data.spectra.wave,
        reference=solved.reference.astype(np.float32),
        noise_shape=subspace.noise_shape.astype(np.float32),
        knots=solved.levels.knots.astype(np.float32),
        columns=columns.astype(np.float32),
        n_basis=keep,
        expert_weights=weights.astype(np.float32),
        expert_intercepts=experts.intercepts.astype(np.float32),
        gate=_idle(n_gate_features(n_gate), k),
        error_model=_idle(n_gate_features(n_gate) + 3, 1),
        label_range=(float(data.y.min()), float(data.y.max())),
        clipped=options.clipped,
        n_gate=n_gate,
    )


def _idle(n_in: int, n_out: int) -> tuple[F32, F32, F32, F32]:
    """Layers that give zero for everything: equal weights, ln σ = 0."""
    return (
        np.zeros((n_in, 1), np.float32),
        np.zeros(1, np.float32),
        np.zeros((1, n_out), np.float32),
        np.zeros(n_out, np.float32),
    )
