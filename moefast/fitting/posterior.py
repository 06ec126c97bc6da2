"""The posterior at a star's own noise: its library, its error model, and the limits of what is usual.

Design: the library is made of clean stars that are not in the sample. The sample then gets nuisances and noise of its
own in every draw, and in most of them gaps of one kind or another, so that errors and limits hold whatever a star has
lost. Where the library knows blends, as many of the draws are blends as it expects. Of ten stars seven train the error
model, two stop and calibrate it and set the limits, one measures the outcome.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moefast.core.metrics import r2
from moefast.fitting.correction import fit_correction
from moefast.fitting.error_model import Z_95, balanced_factor
from moefast.fitting.families import LIBRARY_ROWS
from moefast.fitting.noisy_stars import gaps_of_draws, noisy_stars
from moefast.fitting.training_set import Rows, TrainingSet
from moefast.gating.mlp import as_float32, fit_error_model
from moefast.kernels import without_cuda
from moefast.mixture import Mixture
from moefast.posterior import LABELS, PosteriorMixture, fit_clouds, sky_residuals, slopes

__all__ = ["fit_posterior"]

F64 = NDArray[np.float64]

SCALE_WIDTH = 0.3
"""Prior width of the scale, relative to the scale that the mean spectrum suggests: as good as free."""
CALIBRATION_ROWS, CALIBRATION_DRAWS = 200_000, 9
"""Noisy draws for the error model and the limits, and of one star, at most: of fewer, the factor on the errors would by
chance be off by half a per cent of the stars."""
DISTANCE_QUANTILE, CHI2_QUANTILE = 0.997, 0.999
"""Share of stars of the training set that the limits let pass."""
DISTANCE_KNOTS = 6
LEAST_CHI2_MARGIN = 0.1
LEAST_CHI2 = 0.5
"""Below it the errors are no errors of these pixels: of noise-free spectra, or far too large."""
FOREIGN_QUANTILE = 0.995
"""The same as above of the probability of being no star."""
STRENGTH_LIMIT = 12.0
"""Standard errors that the scale of a spectrum must be away from zero, at the least, for it to be a star."""


def fit_posterior(
    data: TrainingSet, mixture: Mixture, backend: Literal["cpu", "cuda"] = "cpu"
) -> tuple[PosteriorMixture, dict[str, Any]]:
    """A posterior from clean training stars, and what the fit says of itself.

    Parameters
    ----------
    data : TrainingSet
        With clean flux.
    mixture : Mixture
        Whose noise-white principal components and reference spectrum are used.
    backend : "cpu" or "cuda"
        Where the posteriors of the sample are computed; what the CUDA kernels cannot hold is computed on the CPU, and
        the summary says so.
    """
    options = data.options
    names = tuple(name for name in LABELS if name in data.spectra.columns)
    labels = data.spectra.labels(names, partial=True)
    values = np.column_stack([labels[name] for name in names])
    # Stars that lack any of these labels are used for nothing from here on.
    data.labelled = data.labelled & np.isfinite(values).all(1)
    stars, rows = data.inputs(mixture, "templates", data.other_stretches(LIBRARY_ROWS), noisy=False)
    velocity = None
    if "velocity" in data.spectra.columns:
        found_velocity = data.spectra.params(("velocity",))["velocity"][rows].astype(np.float64)
        velocity = found_velocity if np.isfinite(found_velocity).all() else None
    reference = mixture.reference.astype(np.float64)
    noise_shape = mixture.noise_shape.astype(np.float64)
    step = data.steps("clouds", 1)
    arrays = fit_clouds(
        stars.z, values[rows], data.bins[rows], options.grid.n_bins, basis=mixture.basis.astype(np.float64),
        reference=reference, noise_shape=noise_shape, n_clouds=options.n_clouds, n_tangents=options.n_tangents,
        n_coordinates=options.n_coordinates, n_gravity_bins=options.n_gravity_bins, velocity=velocity,
        beyond=options.beyond, n_blends=options.n_blends, seed=options.seed,
    )  # fmt: skip
    step()
    sky = sky_residuals(mixture.wave, noise_shape, options.sky_width)
    nuisances = [slopes(mixture.wave, reference, options.slope_widths), sky]
    arrays["directions"] = np.concatenate([arrays["directions"], *nuisances], axis=1).astype(np.float32)
    found = PosteriorMixture(
        wave=mixture.wave, reference=mixture.reference, noise_shape=mixture.noise_shape, **arrays,
        n_sky=sky.shape[1], calibrated=options.calibrated, scale_width=SCALE_WIDTH,
        label_range=mixture.label_range, error_model=_idle(), label_factors=np.ones(len(names), np.float32),
        label_names=names,
    )  # fmt: skip
    lack = without_cuda(*found.kernel_arrays) if backend == "cuda" else ""
    where = "cpu" if lack else backend
    found, learnt = fit_correction(data, found, values, where)
    found, summary = _calibrate(data, found, values, where)
    library = {
        "clouds": len(found.keys),
        "clouds_of_blends": int(np.diff(found.first)[found.n_experts]) if found.blends else 0,
        "tangents": found.tangents.shape[1],
        "coordinates": found.n_coordinates,
        "slope_widths": list(options.slope_widths),
        "calibrated": list(found.calibrated),
        "sky_width": options.sky_width,
        "scale_width": SCALE_WIDTH,
    }
    if lack:
        summary["calibrated_on_cpu"] = f"there are no CUDA kernels for {lack}"
    return found, summary | {"library": library} | learnt


def _idle() -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """An error model that says nothing yet."""
    f32 = np.float32
    return np.zeros((5, 1), f32), np.zeros(1, f32), np.zeros((1, 1), f32), np.zeros(1, f32)


def _calibrate(
    data: TrainingSet, mixture: PosteriorMixture, values: F64, backend: Literal["cpu", "cuda"]
) -> tuple[PosteriorMixture, dict[str, Any]]:
    """The error model, the factors of the other labels, and the limits of stars like the training set."""
    names = tuple(gaps_of_draws(data))
    stretches = data.sample_stretches()
    total = sum(b - a for a, b in stretches)
    draws = max(1, min(CALIBRATION_ROWS // total, CALIBRATION_DRAWS, data.options.sample_draws))
    thin = max(1, total * draws // CALIBRATION_ROWS)
    drawn = data.map_blocks("calibration", stretches, _draws_of, mixture, draws, thin, backend)
    parts = [part for block in drawn for part in block]
    seen = Draws(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    label, kind, single = seen.label, seen.kind, ~seen.is_blend
    y = values[seen.rows]
    log_g = np.clip(label[:, 0], *mixture.label_range)
    part = data.part_of(seen.rows)
    check = part == 0
    held, fitted = np.isin(part, (1, 2)), ~check
    net = fit_error_model(
        seen.features[fitted], (y[:, 0] - log_g)[fitted], held[fitted], seed=data.options.seed,
        hidden=16, progress=partial(data.progress, "error model"),
    )  # fmt: skip
    ratio = np.abs(y[:, 0] - log_g) / np.exp(net(seen.features)[:, 0])
    # How errors depend on what is seen, blends tell as well; how large they are, and what is usual, single stars do.
    held, check = held & single, check & single
    factor = balanced_factor(ratio[held])
    w1, b1, w2, b2 = net.folded()
    spread = np.abs(y - label[:, : y.shape[1]]) / seen.label_sd[:, : y.shape[1]]
    factors = np.array([balanced_factor(spread[held, i]) for i in range(y.shape[1])])
    mixture = replace(
        mixture,
        error_model=as_float32((w1, b1, w2, b2 + np.log(factor))),
        label_factors=factors.astype(np.float32),
    )
    within = {
        name: [float(np.mean(ratio[mine] <= factor)), float(np.mean(ratio[mine] <= Z_95 * factor))]
        for k, name in enumerate(names)
        if (mine := check & (kind == k)).any()
    }
    whole = check & (kind == 0)
    judged = whole if whole.any() else check
    summary = {
        "chi2_limit": float(
            1 + 2 * max(np.quantile(seen.chi2[single], CHI2_QUANTILE) - 1, LEAST_CHI2_MARGIN)
        ),
        "distance_limit": _distance_limit(seen.distance[single], seen.strength[single]),
        "strength_limit": STRENGTH_LIMIT,
        "least_chi2_limit": LEAST_CHI2,
        "foreign_limit": float(np.quantile(seen.foreign[single], FOREIGN_QUANTILE)),
        "log_level": [float(seen.log_level.min()), float(seen.log_level.max())],
        "cross_validation": {
            "rows": int(check.sum()),
            "r2": r2(y[judged, 0], log_g[judged]),
            "r2_true_bins": r2(y[judged, 0], seen.by_true_expert[judged]),
            "coverage_68": float(np.mean(ratio[judged] <= factor)),
            "coverage_95": float(np.mean(ratio[judged] <= Z_95 * factor)),
            "coverage_by_gap": within,
            "r2_by_gap": {
                name: r2(y[mine, 0], log_g[mine])
                for k, name in enumerate(names)
                if (mine := check & (kind == k)).sum() > 1
            },
            "label_r2": {
                name: r2(y[judged, i], label[judged, i]) for i, name in enumerate(mixture.label_names)
            },
            "label_factors": factors.tolist(),
        },
    }
    return mixture, summary


class Draws(NamedTuple):
    """What a mixture says of n noisy draws, and what they are of."""

    rows: NDArray[np.int64]
    kind: NDArray[np.intp]
    is_blend: NDArray[np.bool_]
    features: F64
    label: F64
    label_sd: F64
    chi2: F64
    distance: F64
    strength: F64
    log_level: F64
    foreign: F64
    by_true_expert: F64


def _draws_of(
    data: TrainingSet,
    block: Rows,
    mixture: PosteriorMixture,
    draws: int,
    thin: int,
    backend: Literal["cpu", "cuda"],
) -> list[Draws]:
    """What the mixture says of all draws of a block's stars."""
    here, flux, error, usable = block
    rows = np.arange(here.start, here.stop)
    chosen = usable & (rows % thin == 0)
    rows, clean, sigma = rows[chosen], flux[chosen], error[chosen]
    parts: list[Draws] = []
    for draw in range(draws):
        x, seen, lost, kind, is_blend = noisy_stars(data, mixture, rows, clean, sigma, draw)
        found = mixture.outputs(x, seen, lost, backend=backend)
        stellar = mixture.n_experts + mixture.blends
        parts.append(Draws(
            rows, kind, is_blend, found["error_features"], found["label"], found["label_sd"], found["chi2"][:, 0],
            found["distance"][:, 0], found["strength"][:, 0], found["log_level"][:, 0],
            foreign=found["weights"][:, stellar:].sum(1),
            by_true_expert=found["expert_label"][np.arange(len(rows)), data.bins[rows]],
        ))  # fmt: skip
    return parts


def _distance_limit(distance: NDArray, strength: NDArray) -> dict[str, list[float]]:
    """Quantile of the distance to the library against ln of the strength: bright stars show what clouds leave out."""
    log_strength = np.log(np.maximum(strength, 1.0))
    edges = np.quantile(log_strength, np.linspace(0, 1, DISTANCE_KNOTS + 1))
    knots, limits = [], []
    for low, high in itertools.pairwise(edges):
        mine = (log_strength >= low) & (log_strength <= high)
        knots.append(float(np.median(log_strength[mine])))
        limits.append(float(np.quantile(distance[mine], DISTANCE_QUANTILE)))
    return {"log_strength": knots, "limit": limits}
