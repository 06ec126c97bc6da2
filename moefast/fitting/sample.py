"""What gate, residuals and error model are trained on: noise draws of stars, and what experts that never saw them say.

Design: every linear expert is at hand without each fold, so the value that is kept of a star is that of the experts
without the star's own fold. A draw of noise is a number by counter: of the same row, draw and seed it is always the
same. `draw_faint` lends the noise levels of the few faint stars to all others and draws in components, where noise is
white: a draw takes few random numbers, and a tower gains from every further one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moefast.core.random import add_noise
from moefast.experts.protocol import Inputs, on_flux
from moefast.fitting.linear_experts import LinearExperts
from moefast.fitting.options import WHOLE
from moefast.fitting.training_set import Rows, TrainingSet
from moefast.gating.tower import VIEWS
from moefast.kernels import Projected, perceptron, project, tangent_posterior
from moefast.kernels.reference import hat_weights, prepare_reference
from moefast.mixture import Mixture
from moefast.trunks.heads import Heads
from moefast.trunks.training import component_covariance

__all__ = ["Faint", "Sample", "draw_faint", "draw_sample", "flux_of_sample"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

NOISY_ROWS = 600_000
"""Noisy rows for gate and error model: a gate of fifty features gains until there are some hundred thousand."""
ROWS_WITH_FLUX = 60_000
"""The same where an expert sees pixels: a network takes a millisecond for each."""
TOWER_ROWS, TOWER_DRAWS = 1_200_000, 3
"""Noisy rows of a tower for faint stars, and draws of a star for each that the sample has: they cost little."""
LEAST_VARIANCE = 1e-9
"""Of the mean variance: added to a covariance, so that it has a Cholesky factor."""


class Sample(NamedTuple):
    """What gate and error model are trained on: n noise draws of stars.

    `features` (n, f) of the gate; `chi2` (n,); `rows` (n,) of the training set; `inputs` of experts not linear;
    by family, `values` (n, K) of experts that did not see the star, and their propagated `noise` (n, K); `logits`
    (n, K), the evidence of a library or what a network says, if there is one; `snr_norm` (n,); `seen` (n, f), what a
    second tower sees, empty if it sees `features` or there is none.
    """

    features: NDArray
    chi2: NDArray
    rows: NDArray[np.int64]
    inputs: Inputs
    values: dict[str, NDArray]
    noise: dict[str, NDArray]
    logits: NDArray | None
    snr_norm: NDArray
    seen: NDArray

    def of_families(self, families: list[str]) -> tuple[NDArray, NDArray]:
        """Values (n, K) of experts and their propagated noise (n, K), each expert of the family that it has."""
        values, noise = (
            np.column_stack([of_family[families[k]][:, k] for k in range(len(families))])
            for of_family in (self.values, self.noise)
        )
        return values, noise


class Faint(NamedTuple):
    """What a second tower is trained on: noise draws of `rows` (n,) of the training set.

    `seen` (n, f) by the tower, `values` (n, K) of the experts, `logits` (n, K) of the first tower.
    """

    rows: NDArray[np.int64]
    seen: NDArray
    values: NDArray
    logits: NDArray


class _Draw(NamedTuple):
    """Rows with one draw of noise: `projected`, `inputs` of experts not linear, gate `features` (n, f), `chi2` (n,).

    `values` (n, K) are of linear experts that did not see the rows, `noise` (n, K) is propagated through experts that
    saw all; `of_network`, if there is one, its values, 1σ and logits, each (n, K).
    """

    projected: Projected
    inputs: Inputs
    features: NDArray
    values: F64
    noise: NDArray
    chi2: NDArray
    of_network: tuple[F32, ...]


def draw_sample(
    data: TrainingSet, mixture: Mixture, experts: LinearExperts, backend: Literal["cpu", "cuda"] = "cpu"
) -> Sample:
    """Gate features and values of the sample rows by experts that did not see them, each with fresh noise.

    Parameters
    ----------
    data : TrainingSet
    mixture : Mixture
        With its library or network, which have not seen the sample.
    experts : LinearExperts
    backend : "cpu" or "cuda"
        Where posteriors of a library are computed.
    """
    stretches = data.sample_stretches()
    drawn = data.map_blocks("gate sample", stretches, _sample_of, mixture, experts, _draws(data))
    parts = [part for block in drawn for part in block]
    features, chi2, rows, values, noise, snr_norm, seen, z, level, lines, *of_network = (
        np.concatenate(columns) for columns in zip(*parts, strict=True)
    )
    inputs = Inputs(z, level, lines)
    sample = Sample(features, chi2, rows, inputs, {"linear": values}, {"linear": noise}, None, snr_norm, seen)
    if of_network:
        log_g, sd, logits = of_network
        sample.values["heads"], sample.noise["heads"] = log_g.astype(np.float64), sd
        sample = sample._replace(logits=logits.astype(np.float64))
    if (library := mixture.clouds[0]) is not None:
        posterior = tangent_posterior(sample.inputs.z, sample.inputs.log_level, library, backend=backend)
        sample.values["template"] = posterior.mean.astype(np.float64)
        sample.noise["template"] = posterior.sd
        evidence = posterior.log_evidence.astype(np.float64)
        sample = sample._replace(logits=evidence - evidence.max(1, keepdims=True))
    return sample


def _draws(data: TrainingSet) -> int:
    """Noise draws of each star of the sample."""
    options = data.options
    if options.noise == "observed":
        return 1
    n = sum(b - a for a, b in data.sample_stretches())
    bounded = any(on_flux(name) for name in options.all_families if name not in WHOLE)
    most = ROWS_WITH_FLUX if bounded else NOISY_ROWS
    return int(np.clip(most // n, 1, options.sample_draws))


def flux_of_sample(data: TrainingSet, stage: str) -> Iterator[tuple[slice, F32]]:
    """The noisy flux of the sample again, which is too large to be kept: places in it, and flux (n, p).

    Parameters
    ----------
    data : TrainingSet
    stage : str
        Name of the stage.
    """
    first, draws = 0, _draws(data)
    for here, flux, error, usable in data.blocks(stage, data.sample_stretches()):
        rows = np.arange(here.start, here.stop)[usable]
        clean, sigma = flux[usable], error[usable]
        for draw in range(draws):
            yield (
                slice(first, first + len(rows)),
                add_noise(clean, sigma, data.options.seed + 1 + draw, rows),
            )
            first += len(rows)


def _sample_of(
    data: TrainingSet, block: Rows, mixture: Mixture, experts: LinearExperts, draws: int
) -> list[tuple[NDArray, ...]]:
    """All draws of a block's stars."""
    here, flux, error, usable = block
    rows = np.arange(here.start, here.stop)[usable]
    flux, error = flux[usable], error[usable]
    view, seen = VIEWS.get(data.options.tower or ""), np.empty((len(rows), 0))
    if view is not None and view.of_errors:
        seen = view.of_stars(None, error, error > 0)
    parts = []
    for draw in range(draws):
        one = _draw(data, mixture, experts, rows, flux, error, draw)
        if view is not None and not view.of_errors:
            seen = view.of_stars(one.features, error, error > 0)
        of_star = (one.projected.snr_norm, seen, *one.inputs[:3])
        parts.append((one.features, one.chi2, rows, one.values, one.noise, *of_star, *one.of_network))
    return parts


def draw_faint(data: TrainingSet, mixture: Mixture, experts: LinearExperts) -> Faint:
    """The sample's stars with the noise levels of stars below the tower's limit, each that of another in every draw.

    There are few faint stars, and many draws of many stars are what a gate learns from. Experts must be in components.
    """
    options = data.options
    stretches = data.sample_stretches()
    n = sum(b - a for a, b in stretches)
    draws = int(np.clip(TOWER_ROWS // n, 1, TOWER_DRAWS * options.sample_draws))
    covariance = component_covariance(mixture.columns, mixture.line_columns, mixture.noise_shape)
    tiny = LEAST_VARIANCE * np.trace(covariance) / len(covariance)
    factor = np.linalg.cholesky(covariance + tiny * np.eye(len(covariance))).T.astype(np.float32)
    nothing = np.empty((0, options.grid.n_bins), np.float32)
    seen = np.empty((0, len(mixture.gate[0])), np.float32)
    parts = [Faint(np.empty(0, np.int64), seen, nothing, nothing)]
    for block in data.map_blocks("faint stars", stretches, _faint_of, mixture, experts, draws, factor):
        parts += block
    return Faint(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _faint_of(
    data: TrainingSet, block: Rows, mixture: Mixture, experts: LinearExperts, draws: int, factor: F32
) -> list[Faint]:
    """All draws of a block's stars; those of `factor` L, LLᵀ the noise of components and line windows at s = 1."""
    here, flux, error, usable = block
    rows = np.arange(here.start, here.stop)[usable]
    flux, error = flux[usable], error[usable]
    faint = np.flatnonzero(data.snr_norm(flux, error) <= data.options.tower_limit)
    if not faint.size:
        return []
    clean = project(flux, error, None, mixture.projection)
    rng, c = np.random.default_rng([data.options.seed, here.start]), mixture.columns.shape[1]
    parts = []
    for _ in range(draws):
        level = clean.log_level[rng.choice(faint, len(rows))]
        noise = rng.standard_normal((len(rows), len(factor)), np.float32) @ factor
        noise *= np.exp(level)[:, None]
        noisy = replace(
            clean, columns=clean.columns + noise[:, :c], windows=clean.windows + noise[:, c:], log_level=level
        )
        features = prepare_reference(noisy, mixture.mixing)[0]
        values = _unseen(data, mixture, experts, rows, noisy.columns, level).astype(np.float32)
        parts.append(Faint(rows, features, values, perceptron(features, mixture.gate)))
    return parts


def _draw(
    data: TrainingSet,
    mixture: Mixture,
    experts: LinearExperts,
    rows: NDArray[np.int64],
    flux: F32,
    error: F32,
    draw: int,
) -> _Draw:
    options = data.options
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
    values = _unseen(data, mixture, experts, rows, z, found.log_level)
    inputs = mixture.inputs(found)
    network = mixture.place(Heads)
    of_network = () if network is None else tuple(network.evaluate(inputs._replace(x=x)))
    return _Draw(found, inputs, features, values, noise, chi2, of_network)


def _unseen(
    data: TrainingSet,
    mixture: Mixture,
    experts: LinearExperts,
    rows: NDArray[np.int64],
    z: NDArray,
    level: NDArray,
) -> F64:
    """Values (n, K) of the linear experts without the fold of each row, from what they see (n, c) and ln s."""
    hat = hat_weights(np.clip(level, mixture.knots[0], mixture.knots[-1]), mixture.knots)
    values = np.empty((len(rows), data.options.grid.n_bins))
    for f in range(data.options.n_folds):
        mine = data.folds[rows] == f
        each = np.einsum("nc,kmc->nkm", z[mine], experts.fold_weights[f], optimize=True)
        each += experts.fold_intercepts[f]
        values[mine] = (each * hat[mine][:, None]).sum(2)
    return values
