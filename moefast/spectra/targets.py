"""Which rows: those of the targets on a list, by identifier."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import InputError
from moefast.core.regular import refuse_special
from moefast.core.text import counted
from moefast.spectra.layouts.fits_file import FitsFile
from moefast.spectra.spectrum_set import SpectrumSet
from moefast.spectra.velocities import (
    KEY_NAMES,
    columns_of_file,
    common_keys,
    identifiers_of,
    is_fits_name,
    is_table_name,
    matching_keys,
)

__all__ = ["rows_of_targets"]

_SINGLE = tuple(name for name in KEY_NAMES if name != "catId")
"""Identifiers that a bare list may hold, which does not say of what they are."""


def rows_of_targets(
    given: str | Path, spectra: SpectrumSet, notes: list[str] | None = None
) -> NDArray[np.bool_]:
    """Rows (n,) of a set whose targets are on a list.

    Parameters
    ----------
    given : path, or text
        A FITS, CSV, ECSV, Parquet or HDF5 table with identifiers that the spectra have, too (catId and objId, objId,
        TARGETID, id, …); any other file with an identifier in each line; or identifiers with commas between them.
    spectra : SpectrumSet
    notes : list of str, optional
        Gets a note where some of the targets are not among the spectra.

    Raises
    ------
    InputError
        The list cannot be read, has no identifier in common with the spectra, or none of its targets is among them.
    """
    path = Path(given)
    if not os.path.exists(path):
        texts = [text.strip() for text in str(given).split(",") if text.strip()]
        if any(os.sep in text or text.lower().endswith((".fits", ".csv", ".txt")) for text in texts):
            raise InputError(f"--targets {given}: no such file")
        return _rows_of_texts(texts, spectra, f"--targets {given}", notes)
    if is_fits_name(path):
        return _rows_of_columns(_ids_of_fits(path), spectra, str(path), notes)
    if is_table_name(path):
        return _rows_of_columns(columns_of_file(path), spectra, str(path), notes)
    refuse_special(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a list of targets: {error}") from error
    texts = [text for line in lines if (text := line.partition("#")[0].strip())]
    return _rows_of_texts(texts, spectra, str(path), notes)


def _ids_of_fits(path: Path) -> dict[str, NDArray]:
    """Columns of the first table of a FITS file that has identifiers."""
    file = FitsFile(path)
    try:
        for hdu in file.hdus:
            names = [name for name in hdu.columns if name in KEY_NAMES] if hdu.is_table else []
            if names:
                return file.table(hdu, names)
    finally:
        file.close()
    raise InputError(f"{path}: no table with a column {', '.join(sorted(KEY_NAMES))}")


def _rows_of_columns(
    told: dict[str, NDArray], spectra: SpectrumSet, where: str, notes: list[str] | None
) -> NDArray[np.bool_]:
    keys = common_keys(where, *identifiers_of(told), spectra)
    theirs, ours = matching_keys(told, spectra.params(keys), keys)
    wanted = set(theirs)
    return _some(
        np.array([key in wanted for key in ours], bool), wanted - set(ours), len(wanted), where, keys, notes
    )


def _rows_of_texts(
    texts: list[str], spectra: SpectrumSet, where: str, notes: list[str] | None
) -> NDArray[np.bool_]:
    keys = [name for name in _SINGLE if name in spectra.columns][:1]
    if not texts or not keys:
        what = "names no target" if not texts else "the spectra have no identifier such as objId or TARGETID"
        raise InputError(f"{where}: {what}")
    values = spectra.params(keys)[keys[0]]
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8", "replace")
    ours = values.astype(str)
    missing = {(text,) for text in set(texts) - set(ours.tolist())}
    return _some(np.isin(ours, texts), missing, len(set(texts)), where, tuple(keys), notes)


def _some(
    rows: NDArray[np.bool_],
    missing: set[tuple[Any, ...]],
    n_targets: int,
    where: str,
    keys: tuple[str, ...],
    notes: list[str] | None,
) -> NDArray[np.bool_]:
    if not rows.any():
        raise InputError(
            f"{where}: none of its {n_targets:,} targets is among the spectra (compared by {' and '.join(keys)})"
        )
    if missing and notes is not None:
        first = ", ".join(f"{name} {value}" for name, value in zip(keys, min(missing, key=str), strict=True))
        notes.append(
            f"{where}: {len(missing):,} of {counted(n_targets, 'target')} {'is' if len(missing) == 1 else 'are'} not "
            f"among the spectra, such as {first}"
        )
    return rows
