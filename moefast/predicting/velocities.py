"""Velocities of the spectra of a run: those that were given are removed, others are fitted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import InputError
from moefast.mixture import Prediction
from moefast.model import Model
from moefast.posterior.mixture import PosteriorMixture
from moefast.posterior.moving import predict_moving
from moefast.posterior.velocities import FittedVelocities, VelocityFit
from moefast.predicting.engines import Engine
from moefast.spectra.prepared import PreparedShard
from moefast.spectra.quality import Quality
from moefast.spectra.source import Block
from moefast.spectra.spectrum_set import SpectrumSet
from moefast.spectra.velocities import Velocities, find_velocities

__all__ = ["FIT", "cannot_fit", "move", "score_moving", "velocity_columns", "velocity_fit"]

FIT = "fit"
"""In the place of velocities: fit them."""


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


def cannot_fit(model: Model) -> str:
    """Why a model that is no posterior fits no velocities, and what to do."""
    return (
        f"velocity fit: the model {model.name} is no posterior and cannot tell how probable a velocity is; use one "
        "that is (-m observed, -m z0), or give velocities"
    )


def score_moving(
    engine: Engine, fit: VelocityFit, shard: PreparedShard, array: str, block: Block, first_row: int
) -> tuple[Prediction, Quality, FittedVelocities]:
    """What an engine gives for a block of stars whose velocities are fitted, and these."""
    arms = shard.measured(array, first_row, first_row + len(block))
    lost = np.zeros(len(block), np.bool_)
    if block.mask is not None:
        np.all(block.mask, axis=1, out=lost)

    def at_rest(velocity: NDArray, rows: NDArray[np.intp]) -> tuple[NDArray, NDArray, NDArray[np.bool_]]:
        flux, error, mask = shard.at_velocity(arms, velocity, rows)
        # What is wrong with a row is wrong with it at every velocity.
        mask[lost[rows]] = True
        return flux, error, mask

    def score(flux: NDArray, error: NDArray, mask: NDArray[np.bool_]) -> tuple[Prediction, Quality]:
        return engine(flux, error, mask, first_row)

    with np.errstate(over="ignore", invalid="ignore"):
        return predict_moving(fit, score, len(block), at_rest)


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
