"""Tables of predictions: those of others, to be measured, and those an evaluation keeps, to be compared.

Design: a prediction belongs to a row of the test set, by its number or by the star's identifiers, and every row has
exactly one. A table that lacks rows, repeats
them or has more is refused with the rows named, never patched: a subset would be measured on easier stars. A prediction
that is not finite stays what it is; the protocol counts it as the mean label.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import InputError
from moefast.core.outputs import kept_columns
from moefast.core.text import counted
from moefast.spectra.layouts.fits_file import FitsFile
from moefast.spectra.spectrum_set import SpectrumSet
from moefast.spectra.tables import READERS, Column, open_table, read_table
from moefast.spectra.velocities import KEYS

__all__ = ["SUFFIXES", "PredictionTable", "read_predictions", "write_kept"]

SUFFIXES = (".csv", *READERS)
"""Endings of a table of predictions."""

_IDENTIFIERS = frozenset(name for keys in KEYS for name in keys)
_SHOWN = 10
_LARGEST = 90.0
"""Predictions beyond are marks for "none"; those of a bad model must be measured."""
_WEIGHT = re.compile(r"weight_[0-9]+")


@dataclass(frozen=True)
class PredictionTable:
    """Predictions for every row of a test set, in its order.

    Attributes
    ----------
    columns : dict of str to array of shape (n,)
        log_g; log_g_err and weight_0 … weight_{K-1} where the table has them.
    attrs : dict
        What the table says about itself; empty for CSV.
    n_experts : int
        K; 0 without weights.
    sha256 : str
        Of the file.
    """

    columns: dict[str, NDArray]
    attrs: dict[str, Any]
    n_experts: int
    sha256: str


def read_predictions(path: str | Path, spectra: SpectrumSet) -> PredictionTable:
    """Read a table of predictions and bring it into the order of the test set.

    Parameters
    ----------
    path : path
        .h5, .parquet or .fits as `moefast predict` writes them, any FITS table, or .csv with a line of names.
        Columns: `row` (row of the spectrum, from 0; within its file where there is a column `file`, else of the whole
        set) or, without it, identifiers that the test set has, too (catId and objId, objId, TARGETID, targetId or id);
        `log_g` [dex], and optionally `log_g_err` [dex] and `weight_0`, `weight_1`, …; all others are ignored.
    spectra : SpectrumSet

    Raises
    ------
    InputError
        The table cannot be read, lacks a column, was made of other spectra, or its rows are not those of the test set.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; name a table of predictions ({', '.join(SUFFIXES)})")
    found, attrs = _read(path)
    if "log_g" not in found:
        raise InputError(f"{path}: column log_g is missing; found {', '.join(found) or 'none'}")
    made_of = attrs.get("input_sha256")
    if made_of is not None and made_of != spectra.fingerprint():
        raise InputError(
            f"{path}: these are predictions for other spectra (fingerprint {str(made_of)[:12]}, the test set has "
            f"{spectra.fingerprint()[:12]}); predict the test set itself"
        )
    order = _order(path, found, spectra) if "row" in found else _order_by_identifier(path, found, spectra)
    weights = sorted(
        (name for name in found if _WEIGHT.fullmatch(name)),
        key=lambda name: int(name[7:]),
    )
    if weights != [f"weight_{k}" for k in range(len(weights))]:
        raise InputError(
            f"{path}: weight_0 to weight_{len(weights) - 1} expected; found {', '.join(weights)}"
        )
    columns = {}
    for name in ("log_g", "log_g_err", *weights):
        if name not in found:
            continue
        values = np.asarray(found[name])
        if values.dtype.kind not in "fiu":
            raise InputError(f"{path}: column {name} must hold numbers; found {values.dtype}")
        _refuse_marks(path, name, values)
        columns[name] = values[order] if values.dtype.kind == "f" else values[order].astype(np.float64)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return PredictionTable(columns, attrs, len(weights), digest)


def _read(path: Path) -> tuple[dict[str, NDArray], dict[str, Any]]:
    """Columns of a table, and what it says about itself."""
    if path.suffix.lower() == ".csv":
        return _read_csv(path)
    if path.suffix.lower() == ".fits":
        file = FitsFile(path)
        try:
            if "PREDICTIONS" not in file:
                # A table of others.
                named = [hdu for hdu in file.hdus if hdu.is_table and "log_g" in hdu.columns]
                if not named:
                    raise InputError(f"{path}: no table with a column log_g")
                return file.table(named[0]), {}
        finally:
            file.close()
    return read_table(path)


def _refuse_marks(path: Path, name: str, values: NDArray) -> None:
    """Refuse numbers that stand for "none", such as -9999 and 1e20, one of which would decide what is measured."""
    if name not in {"log_g", "log_g_err"}:
        return
    low, high = 0.0 if name == "log_g_err" else -_LARGEST, _LARGEST
    with np.errstate(invalid="ignore"):
        wrong = np.flatnonzero(np.isfinite(values) & ((values < low) | (values > high)))
    if len(wrong):
        raise InputError(
            f"{path}: column {name} holds {values[wrong[0]]:g} as number {wrong[0]} of the column (from 0), and "
            f"{len(wrong)} of {counted(len(values), 'number')} outside {low:g} to {high:g}, which no {name} is; give "
            "a row "
            "without a prediction as NaN: it counts as the mean label"
        )


def _read_csv(path: Path) -> tuple[dict[str, NDArray], dict[str, Any]]:
    """Columns that matter, as numbers; an empty field is NaN, lines that begin with # are comments."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = [(i, line) for i, line in enumerate(file, 1) if line.strip() and not line.startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as CSV: {error}") from error
    if not lines:
        raise InputError(f"{path}: empty; a line of names and a line per spectrum expected")
    try:
        records = list(csv.reader((line for _, line in lines), strict=True))
    except csv.Error as error:
        raise InputError(f"{path}: cannot be read as CSV: {error}") from error
    if len(records) != len(lines):
        raise InputError(f"{path}: a quoted field goes over several lines; one line per spectrum expected")
    names = [name.strip() for name in records[0]]
    if len(set(names)) < len(names):
        raise InputError(f"{path}: line {lines[0][0]}: column names must differ; found {', '.join(names)}")
    if len(names) == 1:
        raise InputError(
            f"{path}: line {lines[0][0]}: names separated by commas expected; found {names[0]!r}"
        )
    wanted = {
        name: i
        for i, name in enumerate(names)
        if name in {"row", "file", "log_g", "log_g_err", *_IDENTIFIERS} or name.startswith("weight_")
    }
    if "log_g" not in wanted:
        raise InputError(f"{path}: column log_g is missing; found {', '.join(names)}")
    if not wanted.keys() & {"row", *_IDENTIFIERS}:
        raise InputError(f"{path}: column row, or an identifier, is missing; found {', '.join(names)}")
    out: dict[str, NDArray] = {}
    for name, i in wanted.items():
        values: list[float] = []
        texts: list[str] = []
        for (number, _), record in zip(lines[1:], records[1:], strict=True):
            if len(record) != len(names):
                raise InputError(f"{path}: line {number}: {len(names)} fields expected; found {len(record)}")
            text = record[i].strip()
            if name in _IDENTIFIERS:
                texts.append(text)
                continue
            try:
                values.append(float(text) if text else np.nan)
            except ValueError:
                raise InputError(f"{path}: line {number}: {name} must be a number; found {text!r}") from None
        out[name] = _whole_numbers(texts) if name in _IDENTIFIERS else np.array(values, np.float64)
    return out, {}


def _whole_numbers(texts: list[str]) -> NDArray:
    """Identifiers as whole numbers, to the last digit, if all are; else as text."""
    try:
        return np.array([int(text) for text in texts], np.int64)
    except (ValueError, OverflowError):
        return np.array(texts, str)


def _order_by_identifier(path: Path, found: Mapping[str, NDArray], spectra: SpectrumSet) -> NDArray[np.int64]:
    """Which row of the table belongs to each row of the test set, by what names the stars."""
    keys = next((k for k in KEYS if all(name in found and name in spectra.columns for name in k)), None)
    if keys is None:
        raise InputError(
            f"{path}: column row, or an identifier of the test set, is missing; found {', '.join(found) or 'none'}, "
            f"the test set has {', '.join(spectra.columns) or 'none'}"
        )
    ours, theirs = spectra.params(keys), {name: np.asarray(found[name]) for name in keys}
    for name in keys:
        if (ours[name].dtype.kind in "iu") != (theirs[name].dtype.kind in "iu"):
            raise InputError(
                f"{path}: column {name} holds {theirs[name].dtype}, that of the test set {ours[name].dtype}; "
                "identifiers must be whole numbers in both, or text in both"
            )
    stars = [tuple(map(_plain, one)) for one in zip(*(ours[name].tolist() for name in keys), strict=True)]
    given = [tuple(map(_plain, one)) for one in zip(*(theirs[name].tolist() for name in keys), strict=True)]
    words = " and ".join(keys)

    def told(what: str, which: list[tuple]) -> list[str]:
        names = [" ".join(map(str, key)) for key in dict.fromkeys(which)]
        return [f"{what}: {_named(names)}"] if names else []

    place: dict[tuple, int] = {}
    repeated = [key for row, key in enumerate(given) if place.setdefault(key, row) != row]
    seen: set[tuple] = set()
    doubled = [key for key in stars if key in seen or seen.add(key)]  # type: ignore[func-returns-value]
    if doubled:
        raise InputError(
            f"{path}: stars cannot be told apart by {words}: {told('the test set repeats', doubled)[0]}; "
            "give the column row"
        )
    wrong = [
        *told("missing", [key for key in stars if key not in place]),
        *told("given more than once", repeated),
        *told("not in the test set", [key for key in given if key not in seen]),
    ]
    if wrong:
        raise InputError(
            f"{path}: one prediction for each {words} of the test set expected; {'; '.join(wrong)}. "
            "Give a star without a prediction as NaN: it counts as the mean label"
        )
    return np.array([place[key] for key in stars], np.int64)


def _plain(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _order(path: Path, found: Mapping[str, NDArray], spectra: SpectrumSet) -> NDArray[np.int64]:
    """Which row of the table belongs to each row of the test set."""
    row, n = np.asarray(found["row"]), spectra.n_rows
    if row.dtype.kind not in "iuf" or row.ndim != 1:
        raise InputError(f"{path}: column row must hold whole numbers; found {row.dtype}")
    number = row.astype(np.float64)
    whole = np.isfinite(number) & (number == np.floor(number))
    if not whole.all():
        first = int(np.argmin(whole))
        raise InputError(
            f"{path}: column row must hold whole numbers; found {number[first]:g} as number {first} of the column "
            f"(from 0), {int((~whole).sum())} of the kind"
        )
    index = number.astype(np.int64)
    by_file = "file" in found
    if by_file:
        file = np.nan_to_num(np.asarray(found["file"]).astype(np.float64), nan=-1.0)
        known = np.isin(file, np.arange(len(spectra.shards)))
        shard = np.where(known, file, 0).astype(np.int64)
        extra = ~known | (index < 0) | (index >= np.diff(spectra.first_rows)[shard])
        given = [f"{f:g}:{i}" for f, i in zip(file[extra], index[extra], strict=True)]
        index = spectra.first_rows[shard] + index
    else:
        extra = (index < 0) | (index >= n)
        given = [str(i) for i in index[extra]]
    counts = np.bincount(index[~extra], minlength=n)
    wrong = []
    if (missing := np.flatnonzero(counts == 0)).size:
        wrong.append(f"missing rows: {_named(_row_names(missing, spectra, by_file))}")
    if (repeated := np.flatnonzero(counts > 1)).size:
        wrong.append(f"rows given more than once: {_named(_row_names(repeated, spectra, by_file))}")
    if given:
        wrong.append(f"rows that the test set has not: {_named(given)}")
    if wrong:
        raise InputError(
            f"{path}: one prediction for each of the {counted(n, 'row')} of the test set expected; {'; '.join(wrong)}. "
            "Give a row without a prediction as NaN: it counts as the mean label"
        )
    order = np.empty(n, np.int64)
    order[index] = np.arange(n)
    return order


def _row_names(rows: NDArray[np.int64], spectra: SpectrumSet, by_file: bool) -> list[str]:
    if not by_file:
        return [str(row) for row in rows]
    shard = np.searchsorted(spectra.first_rows, rows, side="right") - 1
    return [f"{s}:{row - spectra.first_rows[s]}" for s, row in zip(shard, rows, strict=True)]


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown}, … ({len(names)} in all)"


# --- what an evaluation keeps --------------------------------------------------------------------------


def write_kept(path: str | Path, columns: Mapping[str, NDArray], attrs: Mapping[str, Any]) -> None:
    """Write the per-star table of an evaluation (see `moefast.core.outputs.kept_columns`).

    Raises
    ------
    OutputError
    """
    n_experts = sum(name.startswith("weight_") for name in columns)
    outputs = kept_columns(n_experts, with_error="log_g_err" in columns)
    layout = [Column.of(output, name) for name, output, _ in outputs]
    with open_table(path, len(columns["row"]), layout, attrs) as table:
        table.write(0, {column.name: columns[column.name] for column in layout})
