"""Velocities of the spectra of a run: those that were given are removed, others are fitted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moefast.backend import Backend
from moefast.core.errors import BackendError, InputError
from moefast.mixture import Prediction
from moefast.model import Model
from moefast.posterior.mixture import PosteriorMixture
from moefast.posterior.moving import predict_moving
from moefast.posterior.velocities import DEFAULT_RANGE, KNOWN, FittedVelocities, VelocityFit
from moefast.predicting.engines import CudaEngine, Engine
from moefast.spectra.prepared import PreparedShard
from moefast.spectra.quality import Quality
from moefast.spectra.source import Block
from moefast.spectra.spectrum_set import SpectrumSet
from moefast.spectra.velocities import Velocities, find_velocities

__all__ = [
    "FIT",
    "FITTED_ON_CPU",
    "MOVED_ON_CPU",
    "cannot_fit",
    "fit_beside",
    "fit_on",
    "move",
    "range_unused",
    "score_moving",
    "velocity_columns",
    "velocity_fit",
]

FIT = "fit"
"""In the place of velocities: fit them."""
FITTED_ON_CPU = (
    "spectra are moved and their velocities fitted on the CPU, predictions at these made on the GPU"
)
MOVED_ON_CPU = "spectra are moved on the CPU, their velocities fitted and predictions made on the GPU"
"""What belongs to the reason for a GPU where velocities are fitted: one of the two."""


def move(spectra: SpectrumSet, velocity: float | str | Path, needed: NDArray[np.bool_]) -> Velocities:
    """Find the velocities of spectra, and have them removed when they are read."""
    found = find_velocities(velocity, spectra, needed)
    for shard, first in zip(spectra.shards, spectra.first_rows, strict=False):
        if isinstance(shard, PreparedShard):
            shard.set_velocity(found.velocity[first : first + shard.n_rows])
    return found


def velocity_fit(
    model: Model, spectra: SpectrumSet, velocity: float | str | Path | None, largest: float
) -> VelocityFit | None:
    """What fits velocities, if that is asked for or, of spectra of surveys, nothing is; see `predict`."""
    if velocity is not None and velocity != FIT:
        return None
    shards = [s for s in spectra.shards if isinstance(s, PreparedShard) and (velocity == FIT or s.observed)]
    if not isinstance(model.mixture, PosteriorMixture):
        if velocity == FIT:
            raise InputError(cannot_fit(model))
        return None
    if not shards:
        return None
    return VelocityFit(model.mixture, largest)


def fit_beside(
    model: Model, spectra: SpectrumSet, given: Velocities, needed: NDArray[np.bool_], largest: float
) -> VelocityFit | None:
    """What weighs velocities that were given with what spectra say, if errors are so large that it matters."""
    if given.error is None or not isinstance(model.mixture, PosteriorMixture):
        return None
    here = [np.full(s.n_rows, isinstance(s, PreparedShard)) for s in spectra.shards]
    rows = needed & np.concatenate(here)
    with np.errstate(invalid="ignore"):
        return VelocityFit(model.mixture, largest) if np.any(given.error[rows] > KNOWN) else None


def range_unused(fit: VelocityFit | None, largest: float) -> list[str]:
    """A note where a range of velocities was asked for and there is nothing that it is the range of."""
    if fit is not None or largest == DEFAULT_RANGE:
        return []
    return [
        f"--velocity-range {largest:g} changes nothing: no velocities are fitted, and none are given with errors above "
        f"{KNOWN:g} km/s"
    ]


def fit_on(engine: Engine, fit: VelocityFit | None, where: Backend, asked: str) -> Backend:
    """Fit velocities on the GPU if predictions are made by its kernels; the backend, with what is done where.

    Parameters
    ----------
    engine : Engine
    fit : VelocityFit, optional
    where : Backend
        Of the engine.
    asked : str
        What was asked for; with "auto", velocities are fitted on the CPU where the GPU cannot do it.

    Raises
    ------
    BackendError
        "cuda" was asked for, and the GPU has not the memory, or no kernels for such velocities.
    """
    if fit is None or where.name != "cuda":
        return where
    words = FITTED_ON_CPU
    if isinstance(engine, CudaEngine):
        try:
            fit.use_device()
            words = MOVED_ON_CPU
        except BackendError as error:
            if asked != "auto":
                raise
            words = f"{FITTED_ON_CPU}: {error}"
    return replace(where, reason=f"{where.reason}; {words}")


def cannot_fit(model: Model) -> str:
    """Why a model that is no posterior fits no velocities, and what to do."""
    return (
        f"velocity fit: the model {model.name} is no posterior and cannot tell how probable a velocity is; use one "
        "that is (-m observed, -m z0), or give velocities"
    )


def score_moving(
    engine: Engine,
    fit: VelocityFit,
    shard: PreparedShard,
    block: Block,
    first_row: int,
    given: Velocities | None,
) -> tuple[Prediction, Quality, FittedVelocities]:
    """What an engine gives for a block of stars whose velocities are fitted, and these.

    Parameters
    ----------
    engine : Engine
    fit : VelocityFit
    shard : PreparedShard
    block : Block
        As it was measured.
    first_row : int
        Row of the shard that it starts with.
    given : Velocities, optional
        What is known of the velocities beforehand, with errors.
    """
    arms = block.measured
    if arms is None:
        raise ValueError("spectra as they were measured expected")
    lost = shard.wrong_rows(arms, first_row)
    known = None
    if given is not None and given.error is not None:
        known = given.velocity[block.rows], given.error[block.rows]

    def at_rest(velocity: NDArray, rows: NDArray[np.intp]) -> tuple[NDArray, NDArray, NDArray[np.bool_]]:
        flux, error, mask = shard.at_velocity(arms, velocity, rows)
        # What is wrong with a row is wrong with it at every velocity.
        mask[lost[rows]] = True
        return flux, error, mask

    def score(flux: NDArray, error: NDArray, mask: NDArray[np.bool_]) -> tuple[Prediction, Quality]:
        return engine(flux, error, mask, first_row)

    with np.errstate(over="ignore", invalid="ignore"):
        return predict_moving(fit, score, len(block), at_rest, known)


def velocity_columns(
    moved: Velocities | VelocityFit | None, first: int, wanted: NDArray[np.bool_]
) -> dict[str, NDArray]:
    """Velocities that were given; what is fitted comes with each block."""
    if not isinstance(moved, Velocities):
        return {}
    here = slice(first, first + len(wanted))
    out = {"v_los": moved.velocity[here][wanted].astype(np.float32)}
    if moved.error is not None:
        out["v_los_err"] = moved.error[here][wanted].astype(np.float32)
    return out
