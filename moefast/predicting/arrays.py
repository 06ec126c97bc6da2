"""Predictions for spectra that are in memory: arrays, masked arrays, quantities, NDData and specutils objects.

Design: what becomes of a spectrum is what becomes of one in a file (`moefast.predicting.files`), so the numbers are the
command's. `spectra_in_memory.py` reads what is given and brings it to the model's grid.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import InputError, OddSpectraWarning
from moefast.core.progress import RowProgress, row_progress
from moefast.core.text import counted
from moefast.core.threads import map_in_order, one_blas_thread
from moefast.mixture import Prediction
from moefast.model import Model, predict_with
from moefast.posterior import PosteriorMixture
from moefast.posterior.moving import predict_moving
from moefast.posterior.velocities import DEFAULT_RANGE, VelocityFit
from moefast.predicting.columns import columns_of, table_columns
from moefast.predicting.engines import Engine, open_engine
from moefast.predicting.spectra_in_memory import GivenSpectra, SpectraInMemory, read_spectra
from moefast.predicting.velocities import FIT, cannot_fit, fit_on
from moefast.spectra.oddities import find_oddities
from moefast.spectra.quality import Flag, Quality
from moefast.spectra.sampling import SampledRows, spread_rows
from moefast.spectra.telluric import CHOICES, Telluric
from moefast.spectra.units import velocity_factor
from moefast.spectra.velocities import FASTEST, Velocities

if TYPE_CHECKING:
    from astropy.table import Table

__all__ = ["predict_arrays"]


def predict_arrays(
    flux: Any,
    error: Any = None,
    model: Model | str | Path | None = None,
    *,
    wave: Any = None,
    mask: Any = None,
    velocity: Any = None,
    velocity_range: float = DEFAULT_RANGE,
    unit: Any = None,
    medium: Literal["vacuum", "air"] = "vacuum",
    telluric: Telluric = "auto",
    backend: str = "auto",
    progress: RowProgress | Literal[False] | None = None,
) -> Table:
    """Predict log g for spectra in memory, with the numbers and columns of ``moefast predict``.

    Parameters
    ----------
    flux : array of shape (p,) or (n, p), quantity, masked array, NDData or specutils spectrum, or a list of spectra
        Flux of one star, or of n. With a unit it is converted to f_λ and divided by its median; without one it must be
        f_λ that is divided by it already, as training sets are.
    error : array of the same shape
        1σ. Not for objects that have an uncertainty of their own.
    model : Model, path of a model folder, or name of a shipped model, optional
        See `moefast.load`.
    wave : array of shape (p,) or (n, p), or quantity, optional
        Wavelengths, in Å if they have no unit; the model's grid if absent.
    mask : array of the same shape, optional
        True (not 0) where a pixel is bad.
    velocity : number, quantity, array of shape (n,) or "fit", optional
        Velocity that is removed, km/s. "fit": one is fitted to each spectrum, and predictions are averaged over its
        posterior; only by posteriors. Without it that is done to flux with a unit, which was observed, if the model
        can, and spectra are taken to be at rest otherwise.
    velocity_range : float
        Fitted velocities lie within so many km/s of 0, either way.
    unit : unit or text, optional
        Unit of flux and error, if they have none of their own.
    medium : "vacuum" or "air"
        What wavelengths are in.
    telluric : "auto", "mask" or "keep"
        Whether pixels where the Earth's atmosphere absorbs count as bad; "auto" says so of flux with a unit, which was
        observed, not of flux that is normalised already.
    backend : "auto", "cpu" or "cuda"
    progress : callable, optional
        Called with spectra done and those in all. Without it a line shows them in notebooks and interactive sessions;
        False leaves it out.

    Returns
    -------
    astropy.table.Table
        One row for each spectrum, in order, with units and descriptions; `meta` names the model and the backend.

    Warns
    -----
    OddSpectraWarning
        The spectra as a whole look wrong (slope, scatter, dead fibres, …), as ``moefast predict`` says it before the
        first is scored; the words are also in the table's ``meta["oddities"]``. No number is changed.

    Raises
    ------
    InputError
        Shapes do not fit, a unit is no flux density, wavelengths are not increasing, or flux without a unit is on a
        scale of its own.

    Examples
    --------
    ::

        table = moefast.predict_arrays(flux, error, wave=wave, velocity=-26.0)
        table["log_g", "log_g_err", "flag"]
    """
    from astropy import units
    from astropy.table import Column, Table

    if medium not in ("vacuum", "air"):
        raise InputError(f"medium: vacuum or air expected, found {medium!r}")
    if telluric not in CHOICES:
        raise InputError(f"telluric: one of {', '.join(CHOICES)} expected, found {telluric!r}")
    chosen = model if isinstance(model, Model) else Model.load(model)
    parts = read_spectra(flux, error, wave, mask, unit)
    fit = _fit_of(chosen, velocity, velocity_range, parts)
    n = sum(len(part.flux) for part in parts)
    moved = None if fit is not None else _velocities(velocity, n)
    velocities = np.zeros(n) if moved is None else moved.velocity
    ready, first_row = [], 0
    for part in parts:
        ready.append(
            SpectraInMemory.of(part, chosen.mixture.wave, first_row, air=medium == "air", telluric=telluric)
        )
        first_row += len(part.flux)
    resampled = bool(velocities.any()) or not all(part.lies_on(chosen.mixture.wave) for part in parts)
    oddities = _look(chosen, ready, velocities, resampled=resampled, at_rest=fit is None)
    for words in oddities:
        warnings.warn(words, OddSpectraWarning, stacklevel=2)
    engine, where = open_engine(chosen.mixture, backend)
    where = fit_on(engine, fit, where, backend)
    with row_progress(progress, "predict") as report:
        values = _predicted(chosen, engine, ready, velocities, fit, report)
    values["row"] = np.arange(n)
    if moved is not None:
        values["v_los"] = moved.velocity.astype(np.float32)
    layout = table_columns(chosen.mixture, {}, False, moved if fit is None else fit)
    return Table(
        [
            Column(values[c.name], c.name, unit=units.Unit(c.unit) if c.unit else None, description=c.description)
            for c in layout
        ],
        meta={
            "model": chosen.name, "model_sha256": chosen.hash, "backend": where.name, "device": where.device,
            "velocity": _words(moved, fit),
            "oddities": oddities,
        },
    )  # fmt: skip


def _fit_of(model: Model, velocity: Any, largest: float, parts: list[GivenSpectra]) -> VelocityFit | None:
    """What fits velocities; see `predict_arrays`."""
    asked = isinstance(velocity, str) and velocity == FIT
    if not (asked or (velocity is None and any(part.has_unit for part in parts))):
        return None
    if not isinstance(model.mixture, PosteriorMixture):
        if asked:
            raise InputError(cannot_fit(model))
        return None
    return VelocityFit(model.mixture, largest)


def _words(moved: Velocities | None, fit: VelocityFit | None) -> str:
    """What was done about velocities."""
    if fit is not None:
        return f"fitted within {fit.largest:g} km/s"
    return "as given" if moved is not None else "taken to be at rest"


def _predicted(
    model: Model,
    engine: Engine,
    ready: list[SpectraInMemory],
    velocities: NDArray,
    fit: VelocityFit | None,
    report: RowProgress,
) -> dict[str, NDArray]:
    """Columns of all rows, scored block by block."""
    blocks = (
        (part, np.arange(first, min(first + engine.block_rows, len(part))))
        for part in ready
        for first in range(0, len(part), engine.block_rows)
    )

    def columns_of_block(block: tuple[SpectraInMemory, NDArray[np.intp]]) -> tuple[int, dict[str, NDArray]]:
        part, rows = block
        columns = _of_block(model, engine, part, rows, velocities[part.first_row + rows], fit)
        return part.first_row + int(rows[-1]) + 1, columns

    pieces: dict[str, list[NDArray]] = {}
    for done, columns in map_in_order(columns_of_block, blocks, engine.workers):
        for name, column in columns.items():
            pieces.setdefault(name, []).append(column)
        report(done, len(velocities))
    return {name: np.concatenate(of_blocks) for name, of_blocks in pieces.items()}


def _of_block(
    model: Model,
    engine: Engine,
    ready: SpectraInMemory,
    rows: NDArray[np.intp],
    velocity: NDArray,
    fit: VelocityFit | None,
) -> dict[str, NDArray]:
    """Columns of some rows."""

    def predict(flux: NDArray, error: NDArray, bad: NDArray[np.bool_]) -> tuple[Prediction, Quality]:
        return engine(flux, error, bad if bad.any() else None, int(rows[0]))

    with one_blas_thread(), np.errstate(over="ignore", invalid="ignore"):
        if fit is None:
            # Spectra that need not be resampled are copied once: to where the engine, or its device, reads them.
            with engine.place() as place:
                flux, error, bad = ready.at_velocity(velocity, rows, place)
                return columns_of(model, *place(flux, error, bad if bad.any() else None, int(rows[0])))
        result, quality, found = predict_moving(
            fit, predict, len(rows), lambda v, some: ready.at_velocity(v, rows[some])
        )
        columns = columns_of(model, result, quality)
    nothing = columns["flag"] & np.uint32(Flag.NO_DATA) != 0
    for name, values in (("v_los", found.velocity), ("v_los_err", found.error)):
        columns[name] = np.where(nothing, np.nan, values).astype(np.float32)
    return columns


def _look(
    model: Model, ready: list[SpectraInMemory], velocity: NDArray, *, resampled: bool, at_rest: bool
) -> list[str]:
    """What is odd about spectra on the model's grid, as of the first array of a file."""
    rows = spread_rows(len(velocity))
    parts = []
    for part in ready:
        own = rows[(rows >= part.first_row) & (rows < part.first_row + len(part))]
        parts.append(part.at_velocity(velocity[own], own - part.first_row))
    flux, error, bad = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    sample = SampledRows.of(model.mixture.wave, flux, error, bad, rows=rows, resampled=resampled)
    free_scale = isinstance(model.mixture, PosteriorMixture)
    found = find_oddities(
        sample, model.mixture.reference, free_scale=free_scale, at_rest=at_rest, with_gaps=free_scale
    )
    return [odd.words for odd in found]


def _velocities(velocity: Any, n: int) -> Velocities | None:
    if velocity is None:
        return None
    unit, plain = getattr(velocity, "unit", None), getattr(velocity, "value", velocity)
    try:
        # What a mask hides is no velocity.
        values = np.ma.filled(np.ma.asarray(plain, np.float64), np.nan)
    except (TypeError, ValueError) as error:
        raise InputError(f"velocity: numbers in km/s, or {FIT!r}, expected; found {velocity!r}") from error
    if unit is not None:
        values = values * velocity_factor(unit, "velocity")
    if values.shape not in {(), (n,)}:
        raise InputError(
            f"velocity: one number, or one for each of {counted(n, 'spectrum')}, expected; found shape {values.shape}"
        )
    if not np.all(np.abs(values) < FASTEST):
        odd = np.atleast_1d(values)[~(np.abs(np.atleast_1d(values)) < FASTEST)][0]
        raise InputError(
            f"velocity: every spectrum needs one in km/s that a star may have, within {FASTEST:g}; found {odd:g}"
        )
    return Velocities(np.broadcast_to(values, (n,)).copy(), None, "velocity")


predict_with(predict_arrays)
