"""Spectra that are in memory: read from arrays, quantities and objects of other packages, and put on a model's grid.

Design: objects of other packages are known by what they have, not by their types: a flux or data with a unit, an
uncertainty of a named type, a mask, a spectral axis. What becomes of a spectrum is what becomes of one in a file
(`moefast.spectra.prepared`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import InputError, WaveGridError
from moefast.spectra.blocks import Memory
from moefast.spectra.prepared import in_vacuum, prepare_rows
from moefast.spectra.resample import Pixels
from moefast.spectra.sampling import spread_rows
from moefast.spectra.telluric import Telluric, without_telluric
from moefast.spectra.units import LIGHT_SPEED, flux_factor, wave_factor
from moefast.spectra.wave import other_unit, same_wave

__all__ = ["GivenSpectra", "SpectraInMemory", "read_spectra"]

SCALE = (0.1, 10.0)
"""Median of flux without a unit that is taken for normalised."""
_TO_SIGMA: dict[Any, Callable[[NDArray], NDArray]] = {
    "std": lambda a: a,
    "var": np.sqrt,
    "ivar": lambda a: 1 / np.sqrt(a),
}
_POWER: dict[Any, int] = {"std": 1, "var": 2, "ivar": -2}


@dataclass(frozen=True)
class GivenSpectra:
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

    def lies_on(self, grid: NDArray[np.float64]) -> bool:
        """Whether the spectra lie on the model's grid, so that no pixel is rebinned."""
        return self.wave is None or (self.wave.ndim == 1 and same_wave(self.wave, grid))


def read_spectra(flux: Any, error: Any, wave: Any, mask: Any, unit: Any) -> list[GivenSpectra]:
    """What was given to `moefast.predict_arrays`: arrays, or one object or a list of them.

    Raises
    ------
    InputError
        Shapes do not fit, there is no error, or a unit or an uncertainty is of an unknown kind.
    """
    several = isinstance(flux, list | tuple) and len(flux) > 0 and _is_object(flux[0])
    if several and (error is not None or wave is not None or mask is not None):
        raise InputError("error, wave and mask: spectra that are objects have their own; leave these out")
    return [_read(each, error, wave, mask, unit) for each in (flux if several else [flux])]


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


def _read(flux: Any, error: Any, wave: Any, mask: Any, unit: Any) -> GivenSpectra:
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
    if not len(x):
        raise InputError(f"flux: one spectrum at least expected, found shape {x.shape}")
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
    if e_unit is not None and str(e_unit) and unit is None:
        raise InputError(f"error has the unit {e_unit}, flux none: give flux its unit, or say unit=…")
    if e_unit is not None and unit is not None and e_unit != unit:
        try:
            e = e * e_unit.to(unit)
        except Exception as problem:
            raise InputError(f"error has the unit {e_unit}, flux {unit}: {problem}") from problem
    return GivenSpectra(x, e, bad, _wavelengths(wave, x.shape), unit)


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
class SpectraInMemory:
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
        cls, given: GivenSpectra, grid: NDArray[np.float64], first_row: int, *, air: bool, telluric: Telluric
    ) -> SpectraInMemory:
        """What was given, in the units that models know."""
        x, e, wave = given.flux, given.error, given.wave
        if wave is None:
            if x.shape[1] != len(grid):
                raise InputError(
                    f"flux has {x.shape[1]} pixels, the model's grid {len(grid)} ({grid[0]:.2f} to {grid[-1]:.2f} Å); "
                    "give the wavelengths as wave"
                )
            if air:
                raise InputError(
                    "medium: air is what wave is in; without wave spectra lie on the model's grid, in vacuum"
                )
            wave = grid
        _require_overlap(wave, grid)
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


def _require_overlap(wave: NDArray[np.float64], grid: NDArray[np.float64]) -> None:
    """Raise WaveGridError if no spectrum reaches the model's grid; what is wrong with single ones is told later."""
    rows = np.atleast_2d(wave)
    with np.errstate(invalid="ignore"):
        elsewhere = (rows.max(1) < grid[0]) | (rows.min(1) > grid[-1])
    if len(rows) and elsewhere.all():
        hint = other_unit(rows[0], grid) or "give wavelengths in Å, or with a unit"
        raise WaveGridError(
            f"wave: {rows[0, 0]:g} to {rows[0, -1]:g} found, the model has {grid[0]:.1f} to {grid[-1]:.1f} Å: {hint}"
        )


def _check_scale(x: NDArray, e: NDArray, bad: NDArray[np.bool_]) -> None:
    # Some rows tell the scale; of a million, medians of all pixels would take longer than the predictions.
    rows = spread_rows(len(x))
    x, e, bad = x[rows], e[rows], bad[rows]
    with np.errstate(all="ignore"):
        good = np.isfinite(x) & (e > 0) & np.isfinite(e) & ~bad
    typical = float(np.median(x[good])) if good.any() else 1.0
    noise = float(np.median(e[good])) if good.any() else 1.0
    # Of a faint star the median may be anything that noise can make it.
    if not SCALE[0] < max(typical, noise) < SCALE[1]:
        raise InputError(
            f"flux has no unit and a median of {typical:.3g}, error one of {noise:.3g}: its scale cannot be told. Say "
            'unit=… (such as "nJy"), or divide flux and error (1σ) by the median flux'
        )
