"""A trunk with heads, fitted on the stars that are not in the sample.

Design: stars are kept in memory without noise, each batch draws its own. A network of components needs a few dozen
numbers of each; one of pixels needs its flux and error, in units of the mean noise and in half precision. What it lacks
is known before the first pass, not hours later. torch is imported inside functions: other fits do not need it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moefast.backend import physical_memory
from moefast.checkpoint import Checkpoint
from moefast.core.errors import BackendError, InputError
from moefast.core.grids import Grid
from moefast.core.line_features import LEAST_CONTINUUM
from moefast.fitting.training_set import TrainingSet
from moefast.kernels import project
from moefast.mixture import Mixture
from moefast.trunks.heads import Heads
from moefast.trunks.networks import SEES_FLUX, NetworkPlan, start
from moefast.trunks.presets import PRESETS

__all__ = ["check_network", "train_heads"]

F32 = NDArray[np.float32]
HALF_MEMORY = 0.5
"""Share of the memory that the clean stars of a network may take."""
LARGEST_HALF = 6e4
"""Bound of numbers kept in half precision."""


def check_network(data: TrainingSet, checkpoint: Checkpoint | None, backend: Literal["cpu", "cuda"]) -> None:
    """Refuse a network that cannot be fitted here.

    Raises
    ------
    BackendError
        torch sees no GPU.
    InputError
        The stars do not fit in the memory.
    MoefastError
        torch is missing, or what writes its checkpoints.
    """
    from moefast.trunks.training import check_checkpoints, load_torch

    torch = load_torch()
    if backend == "cuda" and not torch.cuda.is_available():
        raise BackendError(
            f"backend cuda: this torch ({torch.__version__}) sees no GPU; install its build for CUDA, or use "
            "backend cpu"
        )
    if checkpoint is not None:
        check_checkpoints()
    n = sum(b - a for a, b in data.other_stretches(data.spectra.n_rows))
    needed = 4 * n * data.spectra.n_pixels if SEES_FLUX[data.options.trunk] else 0
    if 0 < HALF_MEMORY * physical_memory() < needed:
        raise InputError(
            f"a network that sees pixels keeps its {n} training stars in memory, {needed / 1e9:.1f} GB; this "
            f"machine has {physical_memory() / 1e9:.1f} GB. Fit it on fewer stars, or take the trunk pca-mlp"
        )


class _Stars(NamedTuple):
    """Stars without noise: `rows` (n,), `log_level` = ln s (n,), components `z` (n, r), line `windows` (n, 12).

    `flux` and `error` (n, p) are those of a network that sees pixels, in units of the mean noise and in half precision,
    and empty for others; components and windows are empty then.
    """

    rows: NDArray[np.int64]
    log_level: F32
    z: F32
    windows: F32
    flux: NDArray[np.float16]
    error: NDArray[np.float16]


def _clean_stars(data: TrainingSet, mixture: Mixture, pixels: bool) -> _Stars:
    """Stars that are not in the sample, for a network that sees pixels or not."""
    stretches = data.other_stretches(data.spectra.n_rows)
    n, p = sum(b - a for a, b in stretches), mixture.n_pixels
    inverse = 1 / np.sqrt(mixture.noise_shape)
    flux, error = (np.empty((n if pixels else 0, p), np.float16) for _ in range(2))
    parts, done = [], 0
    for here, x, sigma, usable in data.blocks("stars of the network", stretches):
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
    return _Stars(rows, level, z, windows, flux[:done], error[:done])


def train_heads(
    data: TrainingSet, mixture: Mixture, checkpoint: Checkpoint | None, backend: Literal["cpu", "cuda"]
) -> tuple[Heads, dict[str, Any]]:
    """A trunk with heads, fitted on the stars that are not in the sample, and how the fit went."""
    from moefast.trunks import training

    options, grid = data.options, data.options.grid
    # `Options` refuses networks on bins of snr_norm.
    assert isinstance(grid, Grid)
    torch = training.load_torch()
    preset = PRESETS[options.trunk, options.size]
    pixels = SEES_FLUX[options.trunk]
    plan = NetworkPlan(
        options.trunk, mixture.n_pixels if pixels else mixture.n_basis, grid.n_bins, **preset.plan
    )
    schedule = replace(preset.schedule, seed=options.seed, steps=options.steps or preset.schedule.steps)
    judges, of_judges = data.inputs(mixture, "held-out stars", data.held_stretches(), noisy=True, flux=pixels)
    rows, level, z, windows, flux, error = _clean_stars(data, mixture, pixels)
    inverse = (1 / np.sqrt(mixture.noise_shape.astype(np.float64))).astype(np.float32)
    scales = training.scales_of(data.y[rows], level, judges.lines, mixture.knots, grid.metal_poor)
    scales |= {"reference": mixture.reference, "inverse_noise": inverse} if pixels else {"variance": z.var(0)}
    begin = training.scaled(Heads(plan, start(plan, options.seed)), scales)
    stars: training.TrainingStars
    if pixels:
        stars = training.StarsInPixels(
            torch, backend, flux, error, level, mixture.reference, inverse, mixture.line_columns,
            mixture.line_widths, LEAST_CONTINUUM,
        )  # fmt: skip
    else:
        covariance = training.component_covariance(mixture.basis, mixture.line_columns, mixture.noise_shape)
        stars = training.StarsInComponents(
            torch, backend, z, windows, level, covariance, mixture.line_widths, LEAST_CONTINUUM
        )
    labels = training.Labels(
        data.y[rows], np.column_stack([data.labels["T_eff"], data.labels["M_H"]])[rows], data.bins[rows]
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
        training.Judges(seen, data.y[of_judges]),
        schedule,
        device=backend,
        checkpoint=None if checkpoint is None else checkpoint.folder,
        key=data.spectra.fingerprint(),
        progress=partial(data.progress, "network"),
    )
    return heads, {
        "trunk": options.trunk, "size": options.size, "stars": len(rows), "batch": schedule.batch,
        "numbers": sum(array.size for array in heads.numbers.values()),
        "kernels": kernels, "r2_held_out": max(entry["r2"] for entry in curve), "curve": curve,
    }  # fmt: skip
