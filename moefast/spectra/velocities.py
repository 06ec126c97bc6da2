"""Velocities of stars: one for all, a column of the spectra, or a table that is joined by identifiers.

Tables that are known by their content: STELLARPARAM of pfsStar files, pfsStarCatalog (v_los), redrock (Z; v = c Z) and
rvspecfit (VRAD); and any FITS, CSV, ECSV or Parquet table, or HDF5 table of moefast, with identifiers and a column
v_los, VRAD or RV. Columns of FITS and ECSV tables say their unit; without one it is km/s.

Catalogues mark "unknown" by -9999, -999 or 1e20: numbers that no star has are no velocities.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import InputError
from moefast.core.regular import refuse_special
from moefast.core.text import counted
from moefast.spectra.layouts.fits_file import FitsFile
from moefast.spectra.opening import Origins
from moefast.spectra.paths import find_files
from moefast.spectra.spectrum_set import SpectrumSet
from moefast.spectra.tables import READERS, read_table
from moefast.spectra.units import LIGHT_SPEED, velocity_factor

__all__ = [
    "FASTEST",
    "KEY_NAMES",
    "Velocities",
    "VelocityTable",
    "columns_of_file",
    "common_keys",
    "find_velocities",
    "identifiers_of",
    "is_fits_name",
    "is_table_name",
    "matching_keys",
    "read_velocity_table",
]

KEYS: tuple[tuple[str, ...], ...] = (("catId", "objId"), ("objId",), ("TARGETID",), ("targetId",), ("id",))
"""Identifiers that tables are joined by: the first of these that both sides have, else any of the same name."""
KEY_NAMES = tuple(dict.fromkeys(name for keys in KEYS for name in keys))
"""All of them."""
COLUMNS = {
    "v_los": ("v_los_err", "v_losErr"),
    "VRAD": ("VRAD_ERR",),
    "RV": ("RV_ERR", "RV_err"),
    "rv": ("rv_err",),
}
"""Columns of velocities in km/s, and of their errors."""
FASTEST = 3000.0
"""km/s that no star of the Local Group moves by; what lies beyond is a mark, another unit, or no star."""
MARKS = (-999.0, -999.9, -999.99, 999.0, 999.9, 999.99, -9999.0, 9999.0, -99999.0, 99999.0)
"""Numbers that catalogues write where they have no velocity, whatever the unit."""
REDSHIFTS = ("redshift", "z")
"""Names, in small letters, of columns of spectra that hold v/c."""
_TEXT = {".csv": "ascii.csv", ".ecsv": "ascii.ecsv"}
_WHOLE = re.compile(r"\s*[+-]?\d+\s*")


@dataclass(frozen=True)
class VelocityTable:
    """Velocities by identifier.

    Attributes
    ----------
    where : str
        File and HDU.
    ids : dict of str to array of shape (n,)
    velocity : array of shape (n,)
        km/s; NaN where it is not known.
    error : array of shape (n,), or None
    notes : list of str
    unusable : list of str
        Columns called like identifiers that name no star everywhere: fields are empty, or numbers not whole.
    of_galaxies : bool
        Whether galaxies and quasars are in it, too, which move at any speed.
    """

    where: str
    ids: dict[str, NDArray]
    velocity: NDArray[np.float64]
    error: NDArray[np.float64] | None
    notes: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    of_galaxies: bool = False


@dataclass(frozen=True)
class Velocities:
    """Velocities of all rows of a set.

    Attributes
    ----------
    velocity : array of shape (n,)
        km/s; 0 for rows that do not need one and have none.
    error : array of shape (n,), or None
    source : str
        Where they are from.
    notes : list of str
    """

    velocity: NDArray[np.float64]
    error: NDArray[np.float64] | None
    source: str
    notes: list[str] = field(default_factory=list)


def find_velocities(
    given: float | str | Path, spectra: SpectrumSet, needed: NDArray[np.bool_] | None = None
) -> Velocities:
    """Velocities for spectra.

    Parameters
    ----------
    given : number, name of a column, or path, folder or pattern of tables
        km/s. Text that is a number is one; text that names a file is a table; other text is a column.
    spectra : SpectrumSet
    needed : array of shape (n,), bool, optional
        Rows that must have one; all if absent.

    Raises
    ------
    InputError
        If a velocity that is needed is missing or not finite, or an identifier occurs twice in a table.
    """
    n = spectra.n_rows
    needed = np.ones(n, bool) if needed is None else needed
    number = _number(given)
    if number is not None:
        if not abs(number) < FASTEST:
            raise InputError(
                f"--velocity {given}: expected a velocity in km/s that a star may have, within {FASTEST:g}"
            )
        return Velocities(np.full(n, number), None, f"{number:g} km/s")
    if os.path.exists(str(given)) or glob.has_magic(str(given)):
        return _joined(read_velocity_table(str(given)), spectra, needed)
    name = str(given)
    for shard in spectra.shards:
        if name not in shard.columns:
            raise InputError(
                f"--velocity {name}: no such file, and {shard.path} has no such column; it has "
                f"{', '.join(shard.columns) or 'none'}"
            )
    told = spectra.params([name])[name]
    if told.dtype.kind not in "iuf":
        raise InputError(f"--velocity {name}: the column must hold a number in each row; found {told.dtype}")
    scale, words = (LIGHT_SPEED, ", times c") if name.lower() in REDSHIFTS else (1.0, "")
    velocity, odd = _of_stars(scale * told.astype(np.float64))
    _refuse_missing(velocity, needed, spectra, f"column {name}{words}", odd)
    beside = [each for each in COLUMNS.get(name, ()) if each in spectra.columns]
    error = _of_errors(spectra.params(beside[:1])[beside[0]]) if beside else None
    return Velocities(np.where(np.isfinite(velocity), velocity, 0.0), error, f"column {name}{words}")


def _number(given: float | str | Path) -> float | None:
    try:
        return None if isinstance(given, Path) else float(given)
    except ValueError:
        return None


def _of_stars(velocity: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Velocities, NaN where a number is none that a star has; and all as they were."""
    with np.errstate(invalid="ignore"):
        star = (np.abs(velocity) < FASTEST) & ~np.isin(velocity, MARKS)
    return np.where(star, velocity, np.nan), velocity


def _of_errors(values: NDArray) -> NDArray[np.float64]:
    """Errors of velocities, NaN where a number is none."""
    error = np.asarray(values, np.float64)
    with np.errstate(invalid="ignore"):
        return np.where(error >= 0, error, np.nan)


def _refuse_missing(
    velocity: NDArray[np.float64],
    needed: NDArray[np.bool_],
    spectra: SpectrumSet,
    where: str,
    told: NDArray[np.float64] | None = None,
) -> None:
    """Raise InputError if a velocity that is needed is missing; `told` are the numbers as they stand in the table."""
    missing = np.flatnonzero(needed & ~np.isfinite(velocity))
    if not len(missing):
        return
    shard = int(np.searchsorted(spectra.first_rows, missing[0], side="right")) - 1
    origins = Origins(spectra)
    base = int(spectra.first_rows[shard])
    file, row = origins.of(shard, int(missing[0]) - base, int(missing[0]) - base + 1)
    names = [name for keys in KEYS for name in keys if name in spectra.shards[shard].columns]
    ids = spectra.shards[shard].params(names[:2], int(missing[0]) - base, int(missing[0]) - base + 1)
    words = "".join(f", {name} {values[0]}" for name, values in ids.items())
    if told is not None and np.isfinite(told[missing[0]]):
        words += f" ({told[missing[0]]:g} km/s, which no star has: a mark, or another unit?)"
    raise InputError(
        f"{where}: no velocity for {len(missing)} of {counted(int(needed.sum()), 'spectrum')}, the first of them row "
        f"{int(row[0])} "
        f"of {origins.paths[int(file[0])]}{words}; complete the table, or leave such spectra out with --select"
    )


def _joined(table: VelocityTable, spectra: SpectrumSet, needed: NDArray[np.bool_]) -> Velocities:
    keys = common_keys(table.where, table.ids, table.unusable, spectra)
    theirs, ours = matching_keys(table.ids, spectra.params(keys), keys)
    places = {key: row for row, key in enumerate(theirs)}
    if len(places) < len(theirs):
        seen: set[tuple] = set()
        twice = next(key for key in theirs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        words = ", ".join(f"{name} {value}" for name, value in zip(keys, twice, strict=True))
        raise InputError(
            f"{table.where}: {words} occurs more than once ({counted(len(theirs), 'row')}, "
            f"{counted(len(places), 'different identifier')}); "
            "keep one velocity of each star"
        )
    at = np.array([places.get(key, -1) for key in ours], np.int64)
    told = np.where(at >= 0, table.velocity[at] if len(table.velocity) else np.nan, np.nan)
    velocity = told if table.of_galaxies else _of_stars(told)[0]
    _refuse_missing(velocity, needed, spectra, table.where, told)
    error = None if table.error is None else np.where(at >= 0, table.error[at], np.nan)
    source = f"{table.where}, joined by {' and '.join(keys)}"
    notes = list(table.notes)
    with np.errstate(invalid="ignore"):
        n_fast = int(np.count_nonzero(needed & (np.abs(velocity) >= FASTEST)))
    if n_fast:
        notes.append(
            f"{table.where}: {n_fast} of {counted(int(needed.sum()), 'spectrum')} "
            f"{'recedes' if n_fast == 1 else 'recede'} by {FASTEST:g} km/s and more: galaxies or "
            "quasars, whose log g means nothing"
        )
    return Velocities(np.where(np.isfinite(velocity), velocity, 0.0), error, source, notes)


def identifiers_of(told: Mapping[str, NDArray], but: str = "") -> tuple[dict[str, NDArray], list[str]]:
    """Columns of a table that may name stars, `but` one; and those called like identifiers that do not everywhere."""
    ids = {
        key: values
        for key, values in told.items()
        if values.ndim == 1 and values.dtype.kind in "iuUS" and key != but
    }
    return ids, [key for key in KEY_NAMES if key in told and key not in ids]


def common_keys(
    where: str, ids: Mapping[str, NDArray], unusable: Sequence[str], spectra: SpectrumSet
) -> tuple[str, ...]:
    """Columns by which a table is joined with spectra, of what `identifiers_of` gave.

    Raises
    ------
    InputError
        There is none, or rows of the table lack their identifier.
    """
    for keys in KEYS:
        named = [name for name in keys if name in spectra.columns and name in [*ids, *unusable]]
        if len(named) < len(keys):
            continue
        if lost := [name for name in keys if name in unusable]:
            raise InputError(
                f"{where}: column {lost[0]} has empty fields or numbers that are not whole; every row needs its "
                "identifier, to the last digit"
            )
        return keys
    alike = [name for name in ids if name in spectra.columns and name.lower().endswith("id")]
    if alike:
        return (alike[0],)
    raise InputError(
        f"{where}: no identifier in common with the spectra; the table has {', '.join(ids) or 'none'}, the "
        f"spectra {', '.join(spectra.columns) or 'none'}"
    )


def matching_keys(
    theirs: Mapping[str, NDArray], ours: Mapping[str, NDArray], keys: Sequence[str]
) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """The identifier of each row of two tables; texts that are whole numbers count as such beside numbers."""
    columns = {name: (theirs[name].tolist(), ours[name].tolist()) for name in keys}
    for name, sides in columns.items():
        texts = [any(isinstance(value, str | bytes) for value in side) for side in sides]
        if texts[0] != texts[1]:
            columns[name] = (
                [_number_of(value) for value in sides[0]],
                [_number_of(value) for value in sides[1]],
            )
    one, other = (list(zip(*(columns[name][side] for name in keys), strict=True)) for side in (0, 1))
    return one, other


def _number_of(value: Any) -> Any:
    """The whole number that a text stands for; anything else as it is."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return int(text) if isinstance(text, str) and _WHOLE.fullmatch(text) else value


# -- tables --------------------------------------------------------------------------------------------------------


def read_velocity_table(given: str | Path) -> VelocityTable:
    """Velocities of one table, or of several that are named by a folder or pattern.

    Raises
    ------
    InputError
        A file cannot be read, or has no velocities or no identifiers.
    """
    path = Path(given)
    paths = find_files(given) if os.path.isdir(path) or glob.has_magic(str(given)) else [path]
    tables = [_read_one(each) for each in paths]
    if len(tables) == 1:
        return tables[0]
    names = [name for name in tables[0].ids if all(name in table.ids for table in tables)]
    error = None
    if all(table.error is not None for table in tables):
        error = np.concatenate([table.error for table in tables if table.error is not None])
    return VelocityTable(
        f"{given} ({len(tables)} files)",
        # As objects: signed and unsigned numbers would become real ones together, and lose digits.
        {name: np.concatenate([table.ids[name].astype(object) for table in tables]) for name in names},
        np.concatenate([table.velocity for table in tables]),
        error,
        list(dict.fromkeys(note for table in tables for note in table.notes)),
        list(dict.fromkeys(name for table in tables for name in table.unusable)),
        of_galaxies=any(table.of_galaxies for table in tables),
    )


def _read_one(path: Path) -> VelocityTable:
    if is_fits_name(path):
        return _of_fits(FitsFile(path))
    units: dict[str, str] = {}
    return _of_columns(str(path), columns_of_file(path, units), units)


def is_fits_name(path: Path) -> bool:
    """Whether a table is FITS, by its name."""
    return path.name.lower().endswith((".fits", ".fit", ".fits.gz", ".fits.fz"))


def is_table_name(path: Path) -> bool:
    """Whether `columns_of_file` reads it, by its name."""
    return path.suffix in _TEXT or path.suffix in READERS


def columns_of_file(path: Path, units: dict[str, str] | None = None) -> dict[str, NDArray]:
    """Columns of a table of text, Parquet or HDF5.

    Parameters
    ----------
    path : Path
    units : dict of str to str, optional
        Gets the units of the columns that say theirs.

    Raises
    ------
    InputError
        It cannot be read.
    """
    refuse_special(path)
    if path.suffix in _TEXT:
        from astropy.table import Table

        try:
            read = Table.read(path, format=_TEXT[path.suffix])
        except Exception as error:
            # Readers of text raise many kinds.
            raise InputError(f"{path}: cannot be read as a table: {error}") from error
        if units is not None:
            units.update(
                {name: str(read[name].unit) for name in read.colnames if read[name].unit is not None}
            )
        return {column: _filled(read[column]) for column in read.colnames}
    if path.suffix in READERS:
        return read_table(path)[0]
    raise InputError(f"{path}: unknown kind of table; expected .fits, .csv, .ecsv, {', '.join(READERS)}")


def _filled(column: Any) -> NDArray:
    """A column with NaN in its empty fields, where astropy keeps a number that nobody wrote; text becomes objects."""
    values, empty = np.asarray(column), np.ma.getmaskarray(column)
    if not empty.any():
        return values
    if values.dtype.kind not in "iuf":
        objects = values.astype(object)
        objects[empty] = None
        return objects
    return np.where(empty, np.nan, values.astype(np.float64))


def _of_fits(file: FitsFile) -> VelocityTable:
    if "STELLARPARAM" in file:
        header = file["TARGET"].header
        told = file.table(file["STELLARPARAM"])
        at = np.flatnonzero(told["param"] == "v_los")
        if not len(at):
            raise InputError(f"{file.path}: HDU STELLARPARAM has no v_los")
        ids = {"catId": np.array([header["CATID"]]), "objId": np.array([header["OBJID"]])}
        return VelocityTable(
            f"{file.path}: HDU STELLARPARAM", ids, told["value"][at[:1]].astype(np.float64),
            _of_errors(told["valueErr"][at[:1]]),
        )  # fmt: skip
    if "REDSHIFTS" in file:
        told = file.table(file["REDSHIFTS"])
        where = f"{file.path}: HDU REDSHIFTS"
        return VelocityTable(
            where, {"TARGETID": told["TARGETID"]}, LIGHT_SPEED * told["Z"],
            _of_errors(LIGHT_SPEED * told["ZERR"]) if "ZERR" in told else None, _warned(where, told, "ZWARN"),
            of_galaxies=True,
        )  # fmt: skip
    hdu = file.first_of("STARCATALOG", "RVTAB", "PREDICTIONS")
    if hdu is None:
        tables = [each for each in file.hdus if each.is_table and set(each.columns) & set(COLUMNS)]
        if not tables:
            raise InputError(
                f"{file.path}: no table of velocities: no HDU STELLARPARAM, STARCATALOG, REDSHIFTS or RVTAB, and no "
                f"column {', '.join(COLUMNS)}"
            )
        hdu = tables[0]
    told = file.table(hdu)
    where = f"{file.path}: HDU {hdu.name or hdu.index}"
    found = _of_columns(where, told, {name: hdu.unit(name) for name in hdu.columns})
    found.notes.extend(_warned(where, told, "RVS_WARN"))
    return found


def _warned(where: str, told: dict[str, NDArray], column: str) -> list[str]:
    count = int(np.count_nonzero(told[column])) if column in told else 0
    if not count:
        return []
    of = counted(len(told[column]), "velocity", "velocities")
    return [f"{where}: {count} of {of} {'carries' if count == 1 else 'carry'} a warning ({column})"]


def _of_columns(where: str, told: dict[str, NDArray], units: Mapping[str, str]) -> VelocityTable:
    name = next((name for name in COLUMNS if name in told), None)
    if name is None:
        raise InputError(f"{where}: no column of velocities ({', '.join(COLUMNS)}); it has {', '.join(told)}")
    beside = next((each for each in COLUMNS[name] if each in told), None)
    ids, unusable = identifiers_of(told, name)
    return VelocityTable(
        where, ids, _in_km_s(where, name, told, units),
        None if beside is None else _of_errors(_in_km_s(where, beside, told, units)), unusable=unusable,
    )  # fmt: skip


def _in_km_s(
    where: str, name: str, told: Mapping[str, NDArray], units: Mapping[str, str]
) -> NDArray[np.float64]:
    """A column of velocities; marks of unknown ones stay as they are."""
    values, unit = _numbers(where, name, told[name]), units.get(name, "")
    factor = velocity_factor(unit, f"{where}: column {name}") if unit else 1.0
    return np.where(np.isin(values, MARKS), values, factor * values)


def _numbers(where: str, name: str, values: NDArray) -> NDArray[np.float64]:
    if values.dtype.kind not in "iuf" or values.ndim != 1:
        raise InputError(f"{where}: column {name} must hold a number in each row; found {values.dtype}")
    return values.astype(np.float64)
