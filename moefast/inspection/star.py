"""One star as a model sees it: its spectrum, what the model says of it, and why it is flagged.

Design: the spectrum is read and prepared as `moefast predict` does it, and scored on the CPU kernels, so that the
numbers are those of the table. What is drawn besides (model spectrum, density of log g) is the posterior in float64,
which only models of the kind `posterior` have; of others it is said that there is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import InputError
from moefast.core.outputs import label_unit
from moefast.mixture import Prediction
from moefast.model import Model
from moefast.posterior.mixture import PosteriorMixture
from moefast.posterior.star import StarPosterior, star_posterior
from moefast.posterior.velocities import DEFAULT_RANGE
from moefast.predicting.columns import columns_of
from moefast.predicting.engines import CpuEngine, score_block
from moefast.predicting.flags import labels_at_the_edge, unlike_reasons
from moefast.predicting.identifiers import carried_columns
from moefast.predicting.velocities import (
    FIT,
    fit_beside,
    move,
    range_unused,
    score_moving,
    velocity_columns,
    velocity_fit,
)
from moefast.spectra.blocks import BlockMemory
from moefast.spectra.opening import Origins, open_prepared
from moefast.spectra.prepared import Preparation, PreparedShard
from moefast.spectra.quality import Flag, Quality, good_pixels
from moefast.spectra.source import Block
from moefast.spectra.spectrum_set import SpectrumSet
from moefast.spectra.telluric import Telluric
from moefast.spectra.velocities import Velocities

__all__ = ["Star", "describe", "find_row", "look_at"]

MOST_ROWS = 5
"""Rows that share an identifier and are named."""


@dataclass(frozen=True)
class Star:
    """One star.

    Attributes
    ----------
    file : str
    row : int
        Of the file, from 0.
    ids : dict of str to value
        Identifiers, as the file has them.
    labels : dict of str to float
        Labels that the file has: of simulated stars the truth.
    model : str
        Name of the model.
    wave : array of shape (p,), Å
    flux, error : array of shape (p,)
        On the model's grid, at rest.
    good : array of shape (p,), bool
    values : dict of str to number
        The row of the table that `moefast predict` writes.
    flags : list of (str, str)
        Name of each flag that is set, and the reason in words.
    posterior : StarPosterior or None
        None for a star without data, and for models that are no posterior.
    experts : array of shape (K, 2)
        Weight of each expert, and its log g [dex].
    velocity_fitted : bool
        Whether the velocity was found from the spectrum, and not given.
    notes : list of str
        What cannot be shown, and what must be known of the file.
    """

    file: str
    row: int
    ids: dict[str, Any]
    labels: dict[str, float]
    model: str
    wave: NDArray[np.float64]
    flux: NDArray[np.float64]
    error: NDArray[np.float64]
    good: NDArray[np.bool_]
    values: dict[str, float]
    flags: list[tuple[str, str]]
    posterior: StarPosterior | None
    experts: NDArray[np.float64]
    velocity_fitted: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """File, row and identifiers in one line."""
        ids = "".join(f", {name} {value}" for name, value in self.ids.items())
        return f"{Path(self.file).name}, row {self.row}{ids}"

    def to_dict(self) -> dict[str, Any]:
        """The numbers, for JSON: no pixels."""
        return {
            "file": self.file,
            "row": self.row,
            "ids": self.ids,
            "labels": self.labels,
            "model": self.model,
            "values": {name: None if np.isnan(value) else value for name, value in self.values.items()},
            "flags": [{"name": name, "reason": reason} for name, reason in self.flags],
            "good_pixels": int(self.good.sum()),
            "pixels": len(self.good),
            "notes": self.notes,
        }


def look_at(
    paths: str | Path | Iterable[str | Path],
    model: Model | str | Path | None = None,
    *,
    row: int | None = None,
    identifier: str | None = None,
    array: Literal["auto", "flux", "noisy"] = "auto",
    velocity: float | str | Path | None = None,
    velocity_range: float = DEFAULT_RANGE,
    medium: Literal["auto", "vacuum", "air"] = "auto",
    telluric: Telluric = "auto",
) -> Star:
    """One star of one or more files, of any layout that `moefast.predict` reads.

    Parameters
    ----------
    paths : path, folder, pattern, or several
    model : Model, path of a model folder, or name of a shipped model, optional
        See `moefast.load`.
    row : int, optional
        Row of the file, from 0; of several files, counted through them in order. The only one if absent.
    identifier : str, optional
        Value of an identifier column, or NAME=VALUE; instead of `row`.
    array, velocity, velocity_range, medium, telluric
        As in `moefast.predict`: of files of surveys the velocity is fitted where none is given.

    Raises
    ------
    InputError
        There is no such row, or no or more than one star of this identifier.

    Examples
    --------
    ::

        star = moefast.look_at("spectra.h5", row=12)
        star.values["log_g"], star.flags
    """
    chosen = model if isinstance(model, Model) else Model.load(model)
    preparation = Preparation(chosen.mixture.wave, medium, moving=velocity is not None, telluric=telluric)
    spectra = open_prepared(paths, preparation)
    at = find_row(spectra, row, identifier)
    needed = np.arange(spectra.n_rows) == at
    moved = None if velocity in {None, FIT} else move(spectra, velocity, needed)
    ids = carried_columns(spectra, ())
    names = [*ids, *(name for name in _labels(chosen) if name in spectra.columns)]
    block = next(spectra.unfilled(1, array=array, rows=(at, at + 1), params=names))
    if block.measured is None or block.problem is not None:
        spectra.fill(block, BlockMemory())
    origins = Origins(spectra)
    inside = at - int(spectra.first_rows[block.shard])
    file, own = origins.of(block.shard, inside, inside + 1)
    notes = [note for shard in spectra.shards if isinstance(shard, PreparedShard) for note in shard.notes]
    notes += [str(failure.error) for failure in origins.faults(at, at + 1)]
    star = _scored(chosen, spectra, block, velocity, velocity_range, moved)
    if moved is not None:
        given = velocity_columns(moved, at, np.ones(1, bool))
        star["values"] = {name: float(values[0]) for name, values in given.items()} | star["values"]
    return Star(
        file=str(origins.paths[int(file[0])]),
        row=int(own[0]),
        ids={name: _plain(block.params[name][0]) for name in ids},
        labels={name: float(block.params[name][0]) for name in _labels(chosen) if name in block.params},
        notes=list(dict.fromkeys([*notes, *star.pop("notes")])),
        **star,
    )


def find_row(spectra: SpectrumSet, row: int | None, identifier: str | None) -> int:
    """The row of a set that a number or an identifier means.

    Raises
    ------
    InputError
    """
    n, where = spectra.n_rows, spectra.shards[0].path
    if row is not None and identifier is not None:
        raise InputError("--row and --id: name the star by one of the two")
    if identifier is not None:
        return _row_of(spectra, identifier)
    if row is None:
        if n == 1:
            return 0
        raise InputError(f"{where}: the input holds {n:,} spectra; choose one with --row 0 … {n - 1} or --id")
    if not 0 <= row < n:
        raise InputError(f"{where}: --row {row}: the input has rows 0 to {n - 1}")
    return row


def _row_of(spectra: SpectrumSet, identifier: str) -> int:
    name, sign, value = identifier.partition("=")
    where = f"{spectra.shards[0].path}: --id {identifier}"
    known = carried_columns(spectra, ())
    if sign and name.strip() in spectra.columns:
        columns, value = [name.strip()], value.strip()
    else:
        columns, value = known, identifier.strip()
    if not columns:
        raise InputError(
            f"{where}: the input has no identifiers; its columns are "
            f"{', '.join(spectra.columns) or 'none'}. Choose a column with --id NAME=VALUE, or a row with --row"
        )
    for column in columns:
        rows = np.flatnonzero(_texts(spectra.params([column])[column]) == value)
        if len(rows) == 1:
            return int(rows[0])
        if len(rows):
            few = ", ".join(str(each) for each in rows[:MOST_ROWS]) + (" …" if len(rows) > MOST_ROWS else "")
            raise InputError(
                f"{where}: {len(rows)} spectra have {column} {value} (rows {few}); choose one with --row"
            )
    raise InputError(f"{where}: no spectrum has it in {', '.join(columns)}")


def _texts(values: NDArray) -> NDArray:
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8", "replace")
    return np.char.strip(values.astype(str))


def _labels(model: Model) -> tuple[str, ...]:
    mixture = model.mixture
    return mixture.label_names if isinstance(mixture, PosteriorMixture) else ("log_g", "T_eff", "M_H")


def _plain(value: Any) -> Any:
    value = value.decode(errors="replace") if isinstance(value, bytes) else value
    return value.item() if isinstance(value, np.generic) else value


def _scored(
    model: Model,
    spectra: SpectrumSet,
    block: Block,
    velocity: float | str | Path | None,
    velocity_range: float,
    given: Velocities | None,
) -> dict[str, Any]:
    """What a model says of the one spectrum of a block, and the spectrum at rest."""
    mixture, shard = model.mixture, spectra.shards[block.shard]
    engine, first = CpuEngine(mixture), block.first_row - int(spectra.first_rows[block.shard])
    fit = velocity_fit(model, spectra, velocity, velocity_range)
    if given is not None:
        fit = fit_beside(model, spectra, given, np.arange(spectra.n_rows) == block.first_row, velocity_range)
    fitted: dict[str, float] = {}
    notes, posterior = range_unused(fit, velocity_range), None
    if fit is not None and isinstance(shard, PreparedShard) and (velocity is not None or shard.observed):
        fit.prepare()
        result, quality, found = score_moving(engine, fit, shard, block, first, given)
        speed, speed_error = found.velocity, found.error
        if np.isfinite(speed[0]):
            fitted = {"v_los": float(np.float32(speed[0])), "v_los_err": float(np.float32(speed_error[0]))}
            shard.set_velocity(np.where(np.arange(shard.n_rows) == first, speed[0], 0.0))
            notes.append(
                "the velocity is fitted, and the numbers are averages over what it may be; the spectrum and the "
                "density of log g are those at the fitted one"
            )
        shard.fill(block, first)
    else:
        if isinstance(shard, PreparedShard):
            shard.fill(block, first)
        result, quality = score_block(engine, block, first)
    flux, error = block.flux, block.error
    good = good_pixels(flux, error, block.mask)
    seen = np.ones(flux.shape[1], bool) if good is None else good[0]
    columns = columns_of(model, result, quality)
    if fitted and given is None and not seen.any():
        # As in the table: where there are no data, nothing was fitted.
        fitted = dict.fromkeys(fitted, float("nan"))
        notes.clear()
    values = fitted | {name: float(column[0]) for name, column in columns.items()}
    if not isinstance(mixture, PosteriorMixture):
        notes.append(
            f"{model.name} is no posterior: it says what log g is, not what the spectrum without noise would be; so "
            "no model spectrum, no residuals and no density of log g are shown"
        )
    elif not seen.any():
        notes.append("the spectrum has not one good pixel: there is nothing to say of the star")
    else:
        posterior = star_posterior(mixture, flux[0], error[0], ~seen)
    return {
        "model": model.name,
        "wave": mixture.wave,
        "flux": flux[0].astype(np.float64),
        "error": error[0].astype(np.float64),
        "good": seen,
        "values": values,
        "flags": _flags(model, columns, result, quality),
        "posterior": posterior,
        "velocity_fitted": bool(fitted),
        "experts": np.column_stack([result.weights[0], result.expert_log_g[0]]).astype(np.float64),
        "notes": notes,
    }


# --- in words ------------------------------------------------------------------------------------------

_REASONS = {
    "chi2, largest": "chi2 {:.3g} is above {:.3g}: nothing that the model knows looks like this spectrum",
    "chi2, least": "chi2 {:.3g} is below {:.3g}: the errors are larger than the scatter of the flux",
    "foreign": "the probability that this is no star is {:.2g}, above {:.2g}",
    "strength": "the flux is {:.3g} of its standard errors above zero, fewer than {:.3g}: too faint to be a star",
    "distance": "far from every star of the library: {:.3g} where {:.3g} is the limit at this brightness",
}


def _flags(
    model: Model, columns: Mapping[str, NDArray], result: Prediction, quality: Quality
) -> list[tuple[str, str]]:
    """Flags of the one star, each with its reason."""
    flag, limits = Flag(int(columns["flag"][0])), model.manifest["limits"]
    found = []
    for one in Flag:
        if not flag & one:
            continue
        words = {
            Flag.NO_DATA: "not one pixel is good",
            Flag.FEW_GOOD_PIXELS: f"{int(quality.n_good[0])} of {model.mixture.n_pixels} pixels are good",
            Flag.BAD_ERROR: "a pixel with finite flux has an error that is not positive or above 1e6",
            Flag.OUT_OF_GRID: _edge(model, result, limits),
            Flag.LOW_CONFIDENCE: f"log_g_err {float(result.log_g_err[0]):.2f} is above {limits['log_g_err']:.2f}: the "
            "spectrum says next to nothing",
            Flag.UNLIKE_TRAINING: "; ".join(
                _REASONS[what].format(float(value[0]), float(limit[0]))
                for what, (value, limit, beyond) in unlike_reasons(result, limits, quality).items()
                if beyond[0]
            ),
            Flag.VELOCITY_UNCERTAIN: "other velocities fit about as well, or the best one is the last of the range",
        }[one]
        found.append((str(one.name), words))
    return found


def _edge(model: Model, result: Prediction, limits: Mapping[str, Any]) -> str:
    low, high = limits["log_level"]
    level = float(result.log_level[0])
    if not low <= level <= high:
        least, largest = np.exp(low), np.exp(high)
        return f"the noise is {np.exp(level):.2g} of the training set's, outside {least:.2g} to {largest:.2g}"
    names = [name for name, rows in labels_at_the_edge(model, result).items() if rows[0]] or ["log_g"]
    return f"{' and '.join(names)} at an end of the training labels: a star beyond would end there, too"


def describe(star: Star) -> str:
    """What is known of a star, as text for a terminal."""
    values = star.values
    lines = [star.name, f"  model            {star.model}"]

    def line(name: str, text: str) -> None:
        lines.append(f"  {name:<16} {text}")

    line("log g", f"{values['log_g']:.2f} ± {values['log_g_err']:.2f} dex" + _truth(star, "log_g", 2))
    for label in ("T_eff", "M_H", "a_M", "C_M"):
        if label in values:
            digits, unit = (0, " K") if label_unit(label) == "K" else (2, " dex")
            text = f"{values[label]:.{digits}f} ± {values[f'{label}_err']:.{digits}f}{unit}"
            line(label, text + _truth(star, label, digits))
    if "v_los" in values:
        error = f" ± {values['v_los_err']:.1f}" if "v_los_err" in values else ""
        line(
            "velocity",
            f"{values['v_los']:.1f}{error} km/s, {'fitted' if star.velocity_fitted else 'as given'}",
        )
    line(
        "signal to noise", f"{values['snr_median']:.1f} per pixel (median), snr_norm {values['snr_norm']:.2f}"
    )
    line("good pixels", f"{int(star.good.sum()):,} of {len(star.good):,}")
    beside = f", scale {values['scale']:.3g}" if "scale" in values else ""
    # A probability; what rounding leaves of 0 says nothing.
    if values.get("foreign", 0.0) > 1e-6:
        beside += f", no star with probability {values['foreign']:.2g}"
    if values.get("blend", 0.0) > 0.01:
        beside += f", two stars with probability {values['blend']:.2g}"
    line("chi2", f"{values['chi2']:.3f}{beside}")
    line("flags", "none" if not star.flags else "")
    lines += [f"    {name}: {reason}" for name, reason in star.flags]
    lines += [f"  note: {note}" for note in star.notes]
    return "\n".join(line.rstrip() for line in lines)


def _truth(star: Star, label: str, digits: int) -> str:
    known = star.labels.get(label, np.nan)
    return f"   (the file says {known:.{digits}f})" if np.isfinite(known) else ""
