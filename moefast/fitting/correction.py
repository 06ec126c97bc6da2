"""The network that corrects log g of a posterior (`moefast.posterior.correction`), and whether it is worth having.

Design: what a posterior over clouds gets wrong on average is a hundredth of the scatter that is left, so millions of
noisy draws teach it, of all stars of which no cloud is made: many stars teach more than many draws of few. Each has
the errors and the bad pixels of another star, so that the noise tells nothing of log g; nuisances, gaps and blends are
as in the draws of the error model. Of ten stars seven train, two stop and decide, one measures. A correction is kept
where it gains more than two of its standard errors on the stars that decide.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moefast.experts.residual_choice import Judge
from moefast.fitting.families import LIBRARY_ROWS
from moefast.fitting.noisy_stars import noisy_stars, with_errors_of_others
from moefast.fitting.training_set import Rows, TrainingSet
from moefast.gating.mlp import MOST_CHECKED, PIECE_ROWS, RECTIFIED, Layers, fit_layers, outputs_of
from moefast.ops.on_numpy import NumPyArithmetic
from moefast.posterior import PosteriorMixture
from moefast.posterior.correction import FARTHEST, LEAST_SPREAD, N_LAYERS, features, n_features

__all__ = ["fit_correction", "planned_draws"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

MOST_DRAWS = 30
"""Of one star."""
LEAST_ROWS = 450_000
"""Fewer draws, those of some 50 000 training spectra, teach little, and quick fits should stay quick."""
FIRST_DRAW = 1000
"""Draws of the error model are before it."""
WIDTH, STEP, DECAY, PASSES = 128, 1e-3, 0.01, 4
STANDARD_ERRORS = 2.0


def planned_draws(wanted: int, n_stars: int) -> int:
    """Noisy draws of each of so many stars, about `wanted` in all; 0 where they would be too few to learn from."""
    draws = min(MOST_DRAWS, wanted // max(1, n_stars))
    return draws if draws * n_stars >= LEAST_ROWS else 0


def fit_correction(
    data: TrainingSet, mixture: PosteriorMixture, values: F64, backend: Literal["cpu", "cuda"] = "cpu"
) -> tuple[PosteriorMixture, dict[str, Any]]:
    """The mixture with a correction, if one is worth having, and what the fit says of it.

    Parameters
    ----------
    data : TrainingSet
        With clean flux.
    mixture : PosteriorMixture
        Without a correction.
    values : array of shape (rows, l)
        Labels of all rows, log g first.
    backend : "cpu" or "cuda"
        Where posteriors are computed.
    """
    stretches = data.apart_from(data.other_stretches(LIBRARY_ROWS))
    total = sum(b - a for a, b in stretches)
    draws = planned_draws(data.options.correction_draws, total)
    if not draws:
        return mixture, {}
    seen, log_g, sd, rows = _gathered(data, mixture, stretches, draws, backend)
    wrong = (values[rows, 0] - log_g).astype(np.float32)
    part = data.part_of(rows)
    fitted, deciding, measuring = np.flatnonzero(part > 2), np.isin(part, (1, 2)), part == 0
    mean, inverse_spread = _standardise(seen, fitted)
    held = np.flatnonzero(deciding)
    layers = fit_layers(
        _first_guess(seen.shape[1], data.options.seed), seen, _loss(sd, wrong), fitted,
        held[:: -(-held.size // MOST_CHECKED)], np.random.default_rng(data.options.seed),
        steps=max(1000, PASSES * fitted.size // PIECE_ROWS), decay=DECAY, length=STEP, activation=RECTIFIED,
        progress=partial(data.progress, "correction"),
    )  # fmt: skip
    network = tuple(np.ascontiguousarray(a, np.float32) for a in (mean, inverse_spread, *layers))
    y = values[rows, 0]
    judge = Judge(y, log_g, rows, mixture.label_range)
    after = _corrected(network[2:], seen, log_g, sd)
    decided, measured = (judge.gain(log_g, after, mine) for mine in (deciding, measuring))
    variance = float(y.var())
    kept = decided.better(STANDARD_ERRORS)
    summary = {
        "draws": len(rows),
        "stars": len(np.unique(rows)),
        "kept": bool(kept),
        "gain_r2": decided.gain / variance,
        "gain_r2_error": decided.standard_error / variance,
        "measured_gain_r2": measured.gain / variance,
        "measured_gain_r2_error": measured.standard_error / variance,
    }
    return (replace(mixture, correction=network) if kept else mixture), {"correction": summary}


def _gathered(
    data: TrainingSet,
    mixture: PosteriorMixture,
    stretches: list[tuple[int, int]],
    draws: int,
    backend: Literal["cpu", "cuda"],
) -> tuple[F32, F64, F32, NDArray[np.int64]]:
    """Features (n, f), log g and its standard deviation by the posterior, and the row of each draw."""
    size = draws * sum(b - a for a, b in stretches)
    f = n_features(mixture.directions.shape[1], len(mixture.label_names), mixture.first.size - 1)
    # One array from the start: parts that are put together at the end need twice the memory.
    seen, log_g = np.empty((size, f), np.float32), np.empty(size)
    sd, rows, n = np.empty(size, np.float32), np.empty(size, np.int64), 0
    for parts in data.map_blocks("noisy stars", stretches, _seen_of, mixture, draws, backend):
        for part in parts:
            here = slice(n, n + len(part[0]))
            seen[here], log_g[here], sd[here], rows[here] = part
            n = here.stop
    return seen[:n], log_g[:n], sd[:n], rows[:n]


def _seen_of(
    data: TrainingSet, block: Rows, mixture: PosteriorMixture, draws: int, backend: Literal["cpu", "cuda"]
) -> list[tuple[F32, F64, F64, NDArray[np.int64]]]:
    """What the network sees of all draws of a block's stars, log g and its standard deviation, and their rows."""
    here, flux, error, usable = block
    rows = np.arange(here.start, here.stop)[usable]
    clean, sigma = flux[usable], error[usable]
    if not len(rows):
        return []
    parts = []
    for draw in range(FIRST_DRAW, FIRST_DRAW + draws):
        others = with_errors_of_others(mixture, clean, sigma, rows, data.options.seed + draw)
        stars = noisy_stars(data, mixture, rows, clean, others, draw)
        found = mixture.outputs(stars.flux, stars.error, stars.lost, backend=backend)
        # A star that has lost all of its pixels teaches nothing.
        known = np.isfinite(found["label"][:, 0]) & (np.where(stars.lost, np.nan, stars.error) > 0).any(1)
        found = {name: array[known] for name, array in found.items()}
        parts.append((_features(mixture, found), found["label"][:, 0], found["label_sd"][:, 0], rows[known]))
    return parts


def _features(mixture: PosteriorMixture, found: dict[str, NDArray]) -> F32:
    """What the network sees, from the outputs of the kernels."""
    seen = found | {"spread": np.exp(found["error_features"][:, 2:3]) - LEAST_SPREAD}
    return np.asarray(features(NumPyArithmetic({}), len(mixture.label_names), seen), np.float32)


def _standardise(seen: F32, fitted: NDArray[np.intp]) -> tuple[F64, F64]:
    """Mean and 1/spread of the features over the rows that are fitted; the features become relative, in place."""
    some = seen[fitted[:: -(-fitted.size // MOST_CHECKED)]].astype(np.float64)
    mean, spread = some.mean(0), some.std(0)
    # A feature that is the same in all draws says nothing, and must not later.
    inverse = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 1e-6 * np.abs(mean) + 1e-12)
    for a in range(0, len(seen), MOST_CHECKED):
        here = seen[a : a + MOST_CHECKED]
        here[:] = np.clip((here - mean) * inverse, -FARTHEST, FARTHEST)
    return mean, inverse


def _first_guess(n_features: int, seed: int) -> Layers:
    """Random layers, the last of which give nothing."""
    rng = np.random.default_rng((seed, n_features))
    layers: list[NDArray] = []
    size = n_features
    for _ in range(N_LAYERS):
        layers += [rng.standard_normal((size, WIDTH)) * np.sqrt(2 / size), np.zeros(WIDTH)]
        size = WIDTH
    return [*layers, np.zeros((size, 1)), np.zeros(1)]


def _loss(sd: F32, wrong: F32) -> Any:
    """Σ (s tanh t − (y − m))², and its slope in t."""

    def loss(outputs: NDArray, rows: NDArray[np.intp]) -> tuple[float, NDArray]:
        bent = np.tanh(outputs[:, 0])
        left = sd[rows] * bent - wrong[rows]
        return float(np.sum(left**2, dtype=np.float64)), (2 * sd[rows] * left * (1 - bent * bent))[:, None]

    return loss


def _corrected(layers: Layers, standard: F32, log_g: F64, sd: F32) -> F64:
    """Log g of each draw with what is learnt added to it."""
    out = np.empty(len(log_g))
    for a in range(0, len(log_g), MOST_CHECKED):
        here = slice(a, a + MOST_CHECKED)
        out[here] = log_g[here] + sd[here] * np.tanh(outputs_of(layers, standard[here], RECTIFIED)[:, 0])
    return out
