"""Predictions for spectra that are in memory: arrays, masked arrays, quantities, NDData and specutils objects.

Design: what becomes of a spectrum is what becomes of one in a file (`moefast.spectra.prepared`,
`moefast.predicting.files`), so the numbers are the command's. Objects of other packages are known by what they have,
not by their types: a flux or data with a unit, an uncertainty of a named type, a mask, a spectral axis.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import InputError, OddSpectraWarning
from moefast.core.progress import RowProgress, row_progress
from moefast.core.threads import map_in_order, one_blas_thread
from moefast.mixture import Prediction
from moefast.model import Model, predict_with
from moefast.posterior import PosteriorMixture
from moefast.posterior.moving import predict_moving
from moefast.posterior.velocities import DEFAULT_RANGE, VelocityFit
from moefast.predicting.columns import columns_of, table_columns
from moefast.predicting.engines import Engine, open_engine
from moefast.predicting.velocities import FIT, cannot_fit, fit_on
from moefast.spectra import guard
from moefast.spectra.blocks import Memory
from moefast.spectra.prepared import in_vacuum, prepare_rows
from moefast.spectra.quality import Flag, Quality
from moefast.spectra.resample import Pixels
from moefast.spectra.telluric import CHOICES, Telluric, without_telluric
from moefast.spectra.units import LIGHT_SPEED, flux_factor, wave_factor
from moefast.spectra.velocities import FASTEST, Velocities
from moefast.spectra.wave import same_wave

if TYPE_CHECKING:
    from astropy.table import Table

__all__ = ["predict_arrays"]

SCALE = (0.1, 10.0)
"""Median of flux without a unit that is taken for normalised."""
_TO_SIGMA: dict[Any, Callable[[NDArray], NDArray]] = {
    "std": lambda a: a,
    "var": np.sqrt,
    "ivar": lambda a: 1 / np.sqrt(a),
}
_POWER: dict[Any, int] = {"std": 1, "var": 2, "ivar": -2}


@dataclass(frozen=True)
class _Given:
    """Spectra (n, k), 1σ, bad pixels, wavelengths in Å ((k,) or (n, k); None: the model's) and unit of flux."""

    flux: NDArray
    error: NDArray
    bad: NDArray[np.bool_]
    wave: NDArray[np.float64] | None
    unit: Any

    @property
    def has_unit(self) -> bool:
        """Whether flux has a unit, and so was observed."""
        return self.unit is not None and str(self.unit) != ""


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

    if telluric not in CHOICES:
        raise InputError(f"telluric: one of {', '.join(CHOICES)} expected, found {telluric!r}")
    chosen = model if isinstance(model, Model) else Model.load(model)
    several = isinstance(flux, list | tuple) and len(flux) > 0 and _is_object(flux[0])
    if several and (error is not None or wave is not None or mask is not None):
        raise InputError("error, wave and mask: spectra that are objects have their own; leave these out")
    parts = [_read(each, error, wave, mask, unit) for each in (flux if several else [flux])]
    fit = _fit_of(chosen, velocity, velocity_range, parts)
    n = sum(len(part.flux) for part in parts)
    moved = None if fit is not None else _velocities(velocity, n)
    velocities = np.zeros(n) if moved is None else moved.velocity
    ready = _all_ready(parts, chosen.mixture.wave, air=medium == "air", telluric=telluric)
    resampled = bool(velocities.any()) or any(not _on_grid(part.wave, chosen.mixture.wave) for part in parts)
    oddities = _look(chosen, ready, velocities, resampled=resampled, at_rest=fit is None)
    for words in oddities:
        warnings.warn(words, OddSpectraWarning, stacklevel=2)
    engine, where = open_engine(chosen.mixture, backend)
    where = fit_on(engine, fit, where, backend)
    pieces: dict[str, list[NDArray]] = {}
    blocks = (
        (part, np.arange(first, min(first + engine.block_rows, len(part))))
        for part in ready
        for first in range(0, len(part), engine.block_rows)
    )

    def predicted(block: tuple[_Ready, NDArray[np.intp]]) -> tuple[int, dict[str, NDArray]]:
        part, rows = block
        found = _of_block(chosen, engine, part, rows, velocities[part.first_row + rows], fit)
        return part.first_row + int(rows[-1]) + 1, found

    with row_progress(progress, "predict") as report:
        for done, found in map_in_order(predicted, blocks, engine.workers):
            for name, column in found.items():
                pieces.setdefault(name, []).append(column)
            report(done, n)
    values = {name: np.concatenate(parts_of) for name, parts_of in pieces.items()}
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


def _fit_of(model: Model, velocity: Any, largest: float, parts: list[_Given]) -> VelocityFit | None:
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


def _of_block(
    model: Model,
    engine: Engine,
    ready: _Ready,
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


def _on_grid(wave: NDArray[np.float64] | None, grid: NDArray[np.float64]) -> bool:
    """Whether spectra lie on the model's grid, so that no pixel is rebinned."""
    return wave is None or (wave.ndim == 1 and same_wave(wave, grid))


def _look(
    model: Model, ready: list[_Ready], velocity: NDArray, *, resampled: bool, at_rest: bool
) -> list[str]:
    """What is odd about spectra on the model's grid, as of the first array of a file."""
    rows = guard.spread_rows(len(velocity))
    parts = []
    for part in ready:
        own = rows[(rows >= part.first_row) & (rows < part.first_row + len(part))]
        parts.append(part.at_velocity(velocity[own], own - part.first_row))
    flux, error, bad = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    sample = guard.SampledRows.of(model.mixture.wave, flux, error, bad, rows=rows, resampled=resampled)
    free_scale = isinstance(model.mixture, PosteriorMixture)
    found = guard.look(sample, model.mixture.reference, free_scale=free_scale, at_rest=at_rest)
    return [odd.words for odd in found]


def _all_ready(
    parts: list[_Given], grid: NDArray[np.float64], *, air: bool, telluric: Telluric
) -> list[_Ready]:
    """Spectra that need only be put on the model's grid."""
    out, row = [], 0
    for part in parts:
        out.append(_Ready.of(part, grid, row, air=air, telluric=telluric))
        row += len(part.flux)
    return out


def _velocities(velocity: Any, n: int) -> Velocities | None:
    if velocity is None:
        return None
    if hasattr(velocity, "unit"):
        from astropy import units

        velocity = velocity.to_value(units.km / units.s)
    values = np.asarray(velocity, np.float64)
    if values.shape not in {(), (n,)}:
        raise InputError(
            f"velocity: one number, or one for each of {n} spectra, expected; found shape {values.shape}"
        )
    if not np.all(np.abs(values) < FASTEST):
        odd = np.atleast_1d(values)[~(np.abs(np.atleast_1d(values)) < FASTEST)][0]
        raise InputError(
            f"velocity: every spectrum needs one in km/s that a star may have, within {FASTEST:g}; found {odd:g}"
        )
    return Velocities(np.broadcast_to(values, (n,)).copy(), None, "velocity")


def _is_object(thing: Any) -> bool:
    """Whether it is a spectrum of another package, not an array."""
    return not isinstance(thing, np.ndarray) and (
        hasattr(thing, "uncertainty") or hasattr(thing, "spectral_axis")
    )


def _plain(thing: Any) -> tuple[NDArray, Any, NDArray[np.bool_] | None]:
    """Numbers, their unit (None if they have none), and the mask that they carry."""
    unit = getattr(thing, "unit", None)
    hidden = np.ma.getmaskarray(thing) if isinstance(thing, np.ma.MaskedArray) else None
    if hasattr(thing, "unmasked"):
        # A masked quantity of astropy.
        hidden, thing = np.asarray(thing.mask), thing.unmasked
    return np.ma.getdata(getattr(thing, "value", thing)), unit, hidden


def _read(flux: Any, error: Any, wave: Any, mask: Any, unit: Any) -> _Given:
    if _is_object(flux):
        flux, error, wave, mask = _unpacked(flux, error, wave, mask)
    if error is None:
        raise InputError("error: every spectrum needs its 1σ; without the noise there is no log g")
    x, x_unit, hidden = _plain(flux)
    e, e_unit, e_hidden = _plain(error)
    x, e = np.atleast_2d(x), np.atleast_2d(e)
    if x.ndim != 2 or x.dtype.kind not in "fiu" or x.shape[1] < 2:
        raise InputError(
            f"flux: numbers of shape (p,) or (n, p) expected, found {x.dtype} of shape {x.shape}"
        )
    if e.shape != x.shape:
        raise InputError(f"error has shape {e.shape}, flux {x.shape}")
    bad = np.zeros(x.shape, bool)
    for part in (mask, hidden, e_hidden):
        if part is not None:
            part = np.atleast_2d(np.asarray(part)) != 0
            if part.shape not in {x.shape, (1, x.shape[1])}:
                raise InputError(f"mask has shape {part.shape}, flux {x.shape}")
            bad |= part
    if x_unit is not None and unit is not None:
        raise InputError(f"unit: flux has the unit {x_unit} already; leave unit out")
    unit = x_unit if x_unit is not None else unit
    if e_unit is not None and unit is not None and e_unit != unit:
        try:
            e = e * e_unit.to(unit)
        except Exception as problem:
            raise InputError(f"error has the unit {e_unit}, flux {unit}: {problem}") from problem
    return _Given(x, e, bad, _wavelengths(wave, x.shape), unit)


def _wavelengths(wave: Any, shape: tuple[int, ...]) -> NDArray[np.float64] | None:
    if wave is None:
        return None
    w, unit, _ = _plain(wave)
    w = np.asarray(w, np.float64)
    if unit is not None:
        w = w * wave_factor(unit, "wave")
    if w.shape not in {shape, (shape[1],)}:
        raise InputError(f"wave has shape {w.shape}; ({shape[1]},) or {shape} expected, as flux has")
    return w


def _unpacked(thing: Any, error: Any, wave: Any, mask: Any) -> tuple[Any, Any, Any, Any]:
    """Flux, error, wavelengths and mask of an object of another package; what is given beside it has precedence."""
    flux = getattr(thing, "flux", None)
    if flux is None:
        flux = thing.data if getattr(thing, "unit", None) is None else thing.data * thing.unit
    uncertainty = getattr(thing, "uncertainty", None)
    if error is None and uncertainty is not None:
        kind = getattr(uncertainty, "uncertainty_type", None)
        if kind not in _TO_SIGMA:
            raise InputError(
                f"uncertainty of type {kind!r} found, expected {', '.join(_TO_SIGMA)}: give the 1σ as error"
            )
        scale = 1.0
        unit, own = getattr(uncertainty, "unit", None), getattr(flux, "unit", None)
        if unit is not None and own is not None:
            scale = float(unit.to(own ** _POWER[kind]))
        with np.errstate(all="ignore"):
            error = _TO_SIGMA[kind](np.asarray(uncertainty.array, np.float64) * scale)
    if wave is None:
        wave = getattr(thing, "spectral_axis", None)
    if mask is None:
        mask = getattr(thing, "mask", None)
    return flux, error, wave, mask


@dataclass(frozen=True)
class _Ready:
    """Spectra in f_λ and in vacuum, bad pixels marked, that need only be put on the model's grid.

    Attributes
    ----------
    arm : Pixels
    grid : array of shape (p,), Å
    scale : bool
        Whether each is divided by its median.
    first_row : int
        For messages.
    """

    arm: Pixels
    grid: NDArray[np.float64]
    scale: bool
    first_row: int

    def __len__(self) -> int:
        return self.arm.n_rows

    @classmethod
    def of(
        cls, given: _Given, grid: NDArray[np.float64], first_row: int, *, air: bool, telluric: Telluric
    ) -> _Ready:
        """What was given, in the units that models know."""
        x, e, wave = given.flux, given.error, given.wave
        if wave is None:
            if x.shape[1] != len(grid):
                raise InputError(
                    f"flux has {x.shape[1]} pixels, the model's grid {len(grid)} ({grid[0]:.2f} to {grid[-1]:.2f} Å); "
                    "give the wavelengths as wave"
                )
            wave = grid
        if given.has_unit:
            factors = flux_factor(given.unit, wave.ravel(), "flux").reshape(wave.shape)
            factors = np.broadcast_to(factors, x.shape)
            with np.errstate(all="ignore"):
                x, e = x * factors, e * factors
        else:
            _check_scale(x, e, given.bad)
        arm = Pixels.of_rows(wave, x, e, given.bad, "wave")
        arm = in_vacuum(arm) if air else arm
        if telluric == "mask" or (telluric == "auto" and given.has_unit):
            arm = without_telluric(arm)
        return cls(arm, grid, given.has_unit, first_row)

    def at_velocity(
        self, velocity: NDArray, rows: NDArray[np.intp], memory: Memory | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
        """Flux, error and mask of some rows on the grid, with a velocity [km/s] of each removed; see `prepare_rows`."""
        factor = 1 + velocity / LIGHT_SPEED
        x, e, lost, faults = prepare_rows(
            [self.arm.take(rows)], factor, self.grid, scale=self.scale, memory=memory
        )
        if faults:
            row, text = min(faults.items())
            raise InputError(f"spectrum {self.first_row + int(rows[row])}: {text}")
        return x, e, lost


def _check_scale(x: NDArray, e: NDArray, bad: NDArray[np.bool_]) -> None:
    # Some rows tell the scale; of a million, medians of all pixels would take longer than the predictions.
    rows = guard.spread_rows(len(x))
    x, e, bad = x[rows], e[rows], bad[rows]
    with np.errstate(all="ignore"):
        good = np.isfinite(x) & (e > 0) & np.isfinite(e) & ~bad
    typical = float(np.median(x[good])) if good.any() else 1.0
    noise = float(np.median(e[good])) if good.any() else 1.0
    # Of a faint star the median may be anything that noise can make it.
    if not SCALE[0] < max(typical, noise) < SCALE[1]:
        raise InputError(
            f'flux has no unit and a median of {typical:.3g}: its scale cannot be told. Say unit=… (such as "nJy"), or '
            "divide flux and error by the median flux"
        )


predict_with(predict_arrays)
