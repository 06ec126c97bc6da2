"""Joining the tables of shards: one table, as one process would have written it.

Design: a table says of what it is a part (rows, input, model, options). Parts are put in the order of their rows and
must tile them; columns are copied, one part at a time, so that memory is that of the largest part. Anything that
does not belong together is refused with both names, before the first row is written.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from moefast.core.errors import InputError
from moefast.core.metrics import SquaredErrors
from moefast.spectra.tables import WRITERS, Column, open_table, read_layout, read_table, refuse_table

__all__ = ["Merged", "files_named", "merge_tables", "tables_named"]

SAME = {
    "model_sha256": "another model",
    "options": "other options",
    "input_sha256": "another input",
    "array": "another array",
    "moefast_version": "another version of moefast",
}
"""Attributes in which all parts agree, and what is said if they do not."""
OF_ONE_RUN = ("backend", "device", "backend_reason")
"""Attributes that may differ from part to part; told of all."""


@dataclass(frozen=True)
class Merged:
    """What was joined.

    Attributes
    ----------
    n_rows, n_parts : int
    rows : tuple of int
        First row of the input and the one after the last.
    r2 : float or None
        Of all rows, where the input has labels.
    notes : tuple of str
        What the user should know.
    """

    n_rows: int
    n_parts: int
    rows: tuple[int, int]
    r2: float | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Part:
    path: Path
    attributes: dict[str, Any]
    columns: tuple[Column, ...]
    n_rows: int
    rows: tuple[int, int]
    shard: tuple[int, int] | None


def _numbers(text: Any, separator: str) -> tuple[int, int] | None:
    try:
        first, second = (int(part) for part in str(text).split(separator))
    except ValueError:
        return None
    return first, second


def _part(path: Path) -> _Part:
    columns, attributes, n_rows = read_layout(path)
    rows = _numbers(attributes.get("rows"), ":")
    if rows is None or any(name not in attributes for name in SAME):
        raise InputError(
            f"{path}: does not say of what it is a part; expected a table that moefast predict wrote"
        )
    shard = _numbers(attributes["shard"], "/") if "shard" in attributes else None
    return _Part(path, attributes, columns, n_rows, rows, shard)


def _check_alike(first: _Part, other: _Part) -> None:
    for name, words in SAME.items():
        expected, found = first.attributes[name], other.attributes[name]
        if expected != found:
            raise InputError(
                f"{other.path}: is of {words} than {first.path} ({name}: {found}, expected {expected})"
            )
    if first.columns != other.columns:
        names = [{column.name for column in part.columns} for part in (first, other)]
        which = ", ".join(sorted(names[0] ^ names[1])) or "their types"
        raise InputError(f"{other.path}: has other columns than {first.path}: {which}")
    if (first.shard is None) != (other.shard is None) or (
        first.shard is not None and other.shard is not None and first.shard[1] != other.shard[1]
    ):
        raise InputError(
            f"{other.path}: is part {other.attributes.get('shard', 'without a number')}, "
            f"{first.path} part {first.attributes.get('shard', 'without a number')}: of different divisions"
        )


def _check_complete(parts: list[_Part]) -> None:
    count = 0 if parts[0].shard is None else parts[0].shard[1]
    if count:
        missing = sorted(set(range(count)) - {part.shard[0] for part in parts if part.shard is not None})
        if missing:
            names = ", ".join(f"{index}/{count}" for index in missing[:10])
            more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
            what = f"shard {names} is" if len(missing) == 1 else f"shards {names}{more} are"
            raise InputError(f"{what} missing; predict what is missing, then merge again")
    for before, after in pairwise(parts):
        if after.rows[0] < before.rows[1]:
            raise InputError(
                f"{after.path}: rows {after.attributes['rows']} are in {before.path} already "
                f"(rows {before.attributes['rows']})"
            )
        if after.rows[0] > before.rows[1]:
            raise InputError(
                f"rows {before.rows[1]}:{after.rows[0]} are missing between {before.path} and {after.path}"
            )


def tables_named(names: Iterable[str | Path]) -> list[Path]:
    """Tables meant by files, folders and patterns; the same one is listed once for each time that it is named.

    Raises
    ------
    InputError
        A name matches nothing.
    """
    return files_named(names, tuple(WRITERS))


def files_named(names: Iterable[str | Path], suffixes: tuple[str, ...] = (".npz",)) -> list[Path]:
    """The same for files with these endings.

    Raises
    ------
    InputError
        A name matches nothing.
    """
    found: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            matches = sorted(
                one for one in path.iterdir() if one.suffix in suffixes and not one.name.startswith(".")
            )
        elif os.path.lexists(path) or not glob.has_magic(str(path)):
            matches = [path]
        else:
            matches = sorted(map(Path, glob.glob(str(path), recursive=True)))
        if not matches:
            raise InputError(f"{name}: no table {', '.join(suffixes)} is named by this")
        found += matches
    return found


def merge_tables(
    paths: Iterable[str | Path],
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Merged:
    """Join the tables of shards, or of ranges of rows, into one.

    Parameters
    ----------
    paths : iterable of path
        Tables of `moefast predict` with ``--shard`` or ``--rows``, in any order and format.
    out : path
        Table to write: .h5, .parquet or .fits.
    overwrite : bool
        Replace an existing table.
    progress : callable, optional
        Called with rows done and rows in all.

    Raises
    ------
    InputError
        A table is missing, damaged, of another model, input or options, or its rows are missing or doubled.
    OutputError
        The table cannot be written.
    """
    refuse_table(out, overwrite=overwrite)
    parts = sorted((_part(Path(path)) for path in paths), key=lambda part: (part.rows, str(part.path)))
    if not parts:
        raise InputError("no tables to merge")
    for part in parts[1:]:
        _check_alike(parts[0], part)
    _check_complete(parts)
    n_rows = sum(part.n_rows for part in parts)
    rows = (parts[0].rows[0], parts[-1].rows[1])
    attributes, r2 = _attributes(parts, rows, n_rows)
    with open_table(out, n_rows, parts[0].columns, attributes, overwrite=overwrite) as table:
        done = 0
        for part in parts:
            columns = read_table(part.path)[0]
            table.write(done, columns)
            done += part.n_rows
            if progress is not None:
                progress(done, n_rows)
    return Merged(n_rows, len(parts), rows, r2, tuple(attributes["notes"]))


def _attributes(
    parts: list[_Part], rows: tuple[int, int], n_rows: int
) -> tuple[dict[str, Any], float | None]:
    """Attributes of the whole: what all parts say, sums, and R² from the parts' sums."""
    first = parts[0].attributes
    merged: dict[str, Any] = {
        name: value
        for name, value in first.items()
        if all(part.attributes.get(name) == value for part in parts)
    }
    for name in ("shard", "squared_errors", "r2"):
        merged.pop(name, None)
    merged["rows"] = f"{rows[0]}:{rows[1]}"
    merged["merged_from"] = [str(part.path) for part in parts]
    for name in OF_ONE_RUN:
        values = dict.fromkeys(str(part.attributes.get(name, "")) for part in parts)
        merged[name] = "; ".join(values)
    for name in ("oddities", "notes", "failures"):
        lists = [part.attributes.get(name) or [] for part in parts]
        merged[name] = list(dict.fromkeys(item for one in lists for item in one))
    seconds = float(np.sum([float(part.attributes.get("seconds", np.nan)) for part in parts]))
    merged["seconds"], merged["spectra_per_second"] = seconds, n_rows / seconds if seconds > 0 else 0.0
    sums = [part.attributes.get("squared_errors") for part in parts]
    r2 = None
    if all(isinstance(one, Mapping) for one in sums):
        total = sum((SquaredErrors.from_numbers(one) for one in sums if one is not None), SquaredErrors())
        r2 = total.r2()
        merged["squared_errors"] = total.numbers()
        if r2 is not None:
            merged["r2"] = r2
    return merged, r2
