"""Noisy draws of clean training stars as a posterior may meet them: nuisances, gaps and blends.

Design: every draw depends on the number of its row, the draw and the seed alone, whatever block or machine makes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from moefast.core.random import add_noise, fold_of_rows, uniforms_of_rows
from moefast.fitting.training_set import TrainingSet
from moefast.posterior import PosteriorMixture
from moefast.posterior.further_clouds import BLEND_SHARE, LIGHT_OF_OTHER, blended
from moefast.simulate.gaps import GAPS, GapKind

__all__ = [
    "GAP_KINDS",
    "NoisyStars",
    "gaps_of_draws",
    "noisy_stars",
    "with_errors_of_others",
    "with_nuisances",
]

GAP_KINDS = (
    "none",
    "telluric",
    "random",
    "random 28 %",
    "block",
    "edges",
    "bluest 15 %",
    "reddest 10 %",
    "Ca II alone",
)
"""Kinds of `moefast.simulate.gaps.GAPS` that draws have; three times as many have the first, all of their pixels."""
NUISANCE_STREAM, BLEND_STREAM, ERROR_STREAM = 20, 21, 22


class NoisyStars(NamedTuple):
    """Flux, its error (NaN where there is none) and lost pixels (n, p); kind of gap and whether it is a blend (n,)."""

    flux: NDArray
    error: NDArray
    lost: NDArray[np.bool_]
    kind: NDArray[np.intp]
    is_blend: NDArray[np.bool_]


def noisy_stars(
    data: TrainingSet,
    mixture: PosteriorMixture,
    rows: NDArray[np.int64],
    clean: NDArray,
    error: NDArray,
    draw: int,
) -> NoisyStars:
    """One draw of stars: their clean flux and its error (n, p), 0 where a pixel is bad, and their rows (n,)."""
    gaps, seed = gaps_of_draws(data), data.options.seed
    names = tuple(gaps)
    stars, is_blend = _with_blends(mixture, clean, rows, seed + draw)
    x = add_noise(with_nuisances(mixture, stars, error, rows, draw), error, seed + 1 + draw, rows)
    kind = _kind_of(rows, len(gaps), seed + 2000 + draw)
    lost = np.zeros(x.shape, bool)
    for k in np.unique(kind):
        mine = kind == k
        lost[mine] = gaps[names[k]](mixture.wave, rows[mine], seed + draw)
    return NoisyStars(x, np.where(error > 0, error, np.nan), lost, kind, is_blend)


def with_errors_of_others(
    mixture: PosteriorMixture, clean: NDArray, error: NDArray, rows: NDArray[np.int64], seed: int
) -> NDArray:
    """Errors (n, p) of other stars of the block, at the flux of these; 0 where either of them has a bad pixel."""
    if len(rows) < 2:
        return error
    shift = np.random.default_rng((seed, ERROR_STREAM, int(rows[0]))).integers(1, len(rows))
    other = np.roll(np.arange(len(rows)), shift)
    level = np.abs(clean.astype(np.float64) @ mixture.reference.astype(np.float64))
    relative = np.divide(level, level[other], out=np.ones(len(rows)), where=level[other] > 0)
    return np.where(error > 0, error[other] * relative[:, None].astype(np.float32), np.float32(0))


def _with_blends(
    mixture: PosteriorMixture, clean: NDArray, rows: NDArray[np.int64], seed: int
) -> tuple[NDArray, NDArray[np.bool_]]:
    """Clean spectra of these rows, as many of them blends with another row as the library expects, and which."""
    if not mixture.blends or len(rows) < 2:
        return clean, np.zeros(len(rows), bool)
    chosen, light = uniforms_of_rows(rows, 2, seed=seed, stream=BLEND_STREAM).T
    is_blend = chosen < BLEND_SHARE
    least, most = LIGHT_OF_OTHER
    share = np.where(is_blend, least + (most - least) * light, 0.0)
    return blended(clean, share, np.random.default_rng((seed, BLEND_STREAM, int(rows[0])))), is_blend


def with_nuisances(
    mixture: PosteriorMixture, flux: NDArray, error: NDArray, rows: NDArray[np.int64], draw: int
) -> NDArray:
    """Flux of these rows with nuisances, each as large as its prior width has it."""
    n, q, sky = mixture.n_coordinates, mixture.n_nuisances, mixture.n_sky
    if not q:
        return flux
    share, *narrow = mixture.calibrated
    uniform = uniforms_of_rows(rows, q + (share > 0), seed=draw, stream=NUISANCE_STREAM)
    size = ndtri(uniform[:, :q])
    if share:
        size[:, : q - sky] *= np.where(uniform[:, q:] < share, np.array(narrow), 1.0)
    good = error > 0
    level = (np.where(good, error, 0.0) ** 2 / mixture.noise_shape).sum(1) / np.maximum(good.sum(1), 1)
    size[:, q - sky :] *= np.sqrt(level)[:, None]
    return flux + (size @ mixture.directions[:, n:].T.astype(np.float64)).astype(np.float32)


def gaps_of_draws(data: TrainingSet) -> Mapping[str, GapKind]:
    """Kinds of gaps that draws have: those of the files that training stars look like, or `GAP_KINDS`."""
    gaps = getattr(data.spectra, "gaps", None)
    return gaps if gaps is not None else {name: GAPS[name] for name in GAP_KINDS}


def _kind_of(rows: NDArray[np.integer], n_kinds: int, seed: int) -> NDArray[np.intp]:
    """Kind of gap of each row, at random: each of the kinds alike, but the first three times as often."""
    turn = fold_of_rows(rows, n_kinds + 2, seed)
    return np.maximum(turn - 2, 0).astype(np.intp)
