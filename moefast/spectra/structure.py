"""What a spectrum file in the layout of the PFS simulator holds, and where its arrays lie.

Design: what can be wrong with a file as a whole is found here, when it is opened and before a row is read. Where an
array lies decides how its rows are read; see `moefast.spectra.rows`.

Layout::

    dataset/arrays/flux/value    (n, p) float   clean flux
    dataset/arrays/error/value   (n, p) float   1σ per pixel, same units
    dataset/arrays/mask/value    (n, p) int     optional, not 0 = bad
    dataset/arrays/noisy/value   (n, p) float   optional, flux with its noise
    spectrumdataset/wave         (p,)  float    Å
    dataset/params               optional table of labels and conditions, one row per spectrum
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from moefast.core.errors import InputError
from moefast.core.text import counted
from moefast.core.watched import interrupt_behind
from moefast.spectra.endless_texts import refuse_damaged_texts
from moefast.spectra.hdf5 import ARRAYS, contents_of, open_hdf5
from moefast.spectra.params import ParamColumn, index_column, owners_of_params, param_columns
from moefast.spectra.stored import (
    UnwrittenPlaces,
    find,
    gaps_of,
    lacking_filter,
    owned_by,
    refuse_misspelt,
)
from moefast.spectra.units import is_flux_per_wavelength, read_unit, wave_factor

__all__ = ["StoredArray", "Structure", "read_structure"]

SLAB_BYTES = 1 << 25
"""Of rows that are decoded at a time, as float32, if they must go through the HDF5 library."""
_OF_PYTABLES = {"CLASS", "TITLE", "VERSION", "PYTABLES_FORMAT_VERSION"}


@dataclass(frozen=True)
class StoredArray:
    """Where one (n, p) array lies.

    `access` is "offset" (rows follow each other from `offset` on), "chunks" (uncompressed, each chunk holds
    `chunk_rows` whole rows) or "library" (everything else, through HDF5 in slabs of `slab_rows`). `own_chunks` says
    that chunks are compressed and lie in this file; `gaps` are places that hold no values.
    """

    dataset: str
    dtype: np.dtype
    n_rows: int
    n_pixels: int
    layout: str
    access: str
    offset: int = 0
    chunk_rows: int = 0
    slab_rows: int = 0
    own_chunks: bool = False
    gaps: UnwrittenPlaces | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as stored."""
        return self.n_pixels * self.dtype.itemsize


@dataclass(frozen=True)
class Structure:
    """What a file holds.

    Attributes
    ----------
    size : int
        Bytes of the file.
    arrays : dict of str to StoredArray
        Those of flux, error, mask and noisy that it has, all of one shape.
    wave : array of shape (p,), float64
        Wavelength of the pixels in Å.
    columns : dict of str to ParamColumn
        Columns of its params table, those that cannot be read included.
    index : ParamColumn or None
        The index of the params table.
    attrs : dict
        Attributes of the file's root that are numbers or text.
    """

    size: int
    arrays: dict[str, StoredArray]
    wave: np.ndarray
    columns: dict[str, ParamColumn]
    index: ParamColumn | None
    attrs: dict[str, Any]


def read_structure(path: Path) -> Structure:
    """What a file holds.

    Raises
    ------
    InputError
        If it is missing, truncated, damaged, empty, or lacks what it must have.
    """
    file = open_hdf5(path)
    try:
        size = path.stat().st_size
        arrays = _find_arrays(file, path, size)
        _check_texts(file, arrays)
        _refuse_other_units(file, path, arrays)
        shape = next(iter(arrays.values()))
        return Structure(
            size,
            arrays,
            _find_wave(file, path, shape.n_pixels),
            _find_columns(file, path, shape.n_rows),
            index_column(file),
            _attributes(file),
        )
    except InputError:
        raise
    except Exception as error:
        if (interrupt := interrupt_behind(error)) is not None:
            raise interrupt from None
        # Damaged descriptions of types and shapes make h5py raise nearly anything.
        raise InputError(f"{path}: metadata cannot be read, damaged? {error}") from error
    finally:
        file.close()


def _refuse_other_units(file: h5py.File, path: Path, arrays: dict[str, StoredArray]) -> None:
    """Refuse arrays that say by an attribute `unit` or `units` that they are no f_λ, or no wavelengths in Å."""
    places = {stored.dataset: False for name, stored in arrays.items() if name != "mask"}
    for place, is_wave in {**places, "/spectrumdataset/wave": True}.items():
        node = find(file, place)
        said = next((node.attrs[key] for key in ("unit", "units") if key in node.attrs), "") if node else ""
        unit = said.decode("utf-8", "replace") if isinstance(said, bytes) else said
        if not isinstance(unit, str) or not unit.strip():
            continue
        try:
            known = read_unit(unit, place)
        except InputError:
            # A word such as "normalised".
            continue
        if is_wave and wave_factor(known, f"{path}: {place}") != 1:
            raise InputError(f"{path}: {place} is in {unit}, by its attribute; Å are expected")
        if not is_wave and not is_flux_per_wavelength(known, f"{path}: {place}"):
            raise InputError(
                f"{path}: {place} is in {unit}, by its attribute; f_λ is expected: multiply f_ν by c/λ², or give "
                f"arrays to moefast.predict_arrays with unit={unit!r}"
            )


def _find_arrays(file: h5py.File, path: Path, size: int) -> dict[str, StoredArray]:
    """Every array that is there, by its name; all have the shape of the flux."""
    refuse_misspelt(file, "/dataset", ("arrays", "params"))
    refuse_misspelt(file, "/dataset/arrays", ARRAYS)
    datasets = {}
    for name in ARRAYS:
        place = f"/dataset/arrays/{name}/value"
        node = find(file, place)
        if isinstance(node, h5py.Dataset):
            datasets[name] = node
        elif node is not None or find(file, f"/dataset/arrays/{name}") is not None:
            raise InputError(
                f"{path}: dataset {place[1:]} is missing; found {contents_of(file)}. Expected it, as there is "
                f"a group dataset/arrays/{name}"
            )
    flux = "flux" if "flux" in datasets else "noisy"
    for name in (flux if flux in datasets else "flux", "error"):
        if name not in datasets:
            raise InputError(
                f"{path}: dataset dataset/arrays/{name}/value is missing; found {contents_of(file)}. "
                "Expected a spectrum dataset with arrays flux (or noisy) and error"
            )
    shape = datasets[flux].shape
    names = {name: f"/dataset/arrays/{name}/value" for name in datasets}
    for name, dataset in datasets.items():
        if dataset.ndim != 2:
            raise InputError(f"{path}: {names[name]} has shape {dataset.shape}, expected (rows, pixels)")
        if dataset.shape != shape:
            raise InputError(f"{path}: {names[name]} has shape {dataset.shape}, {names[flux]} {shape}")
        if dataset.dtype.kind not in "fiub":
            raise InputError(f"{path}: {names[name]} has type {dataset.dtype}, expected numbers")
    if 0 in shape:
        raise InputError(f"{path}: holds no spectra ({names[flux]} has shape {shape})")
    return {name: _locate(dataset, names[name], file, path, size) for name, dataset in datasets.items()}


def _locate(dataset: h5py.Dataset, name: str, file: h5py.File, path: Path, size: int) -> StoredArray:
    """Where an array lies, called `name`; its rows are all there, as far as their places tell."""
    n_rows, n_pixels = dataset.shape
    if lacking := lacking_filter(dataset):
        raise InputError(f"{path}: {name} {lacking}")
    creation = dataset.id.get_create_plist()
    filtered = creation.get_nfilters() > 0
    gaps = gaps_of(dataset)
    if gaps is not None and gaps.everything:
        raise InputError(f"{path}: {name} was created and never written")
    common = (name, dataset.dtype, n_rows, n_pixels)
    # Only bytes of this very file are read past the library. HDF5 versions disagree on whether offsets count a
    # user block in.
    direct = file.userblock_size == 0 and not dataset.is_virtual and owned_by(dataset, file)
    if dataset.chunks is None:
        layout = "contiguous"
        if direct and creation.get_layout() == h5py.h5d.CONTIGUOUS and not dataset.external:
            offset = dataset.id.get_offset()
            row_bytes = n_pixels * dataset.dtype.itemsize
            if offset + n_rows * row_bytes > size:
                whole = max(0, (size - offset) // row_bytes)
                raise InputError(
                    f"{path}: truncated file: {name} ends in row {whole} of {n_rows}; "
                    "copy or produce it again"
                )
            return StoredArray(*common, layout, "offset", offset=offset)
        slab = max(1, SLAB_BYTES // (4 * n_pixels))
        return StoredArray(*common, layout, "library", slab_rows=min(slab, n_rows), gaps=gaps)
    chunk_rows = dataset.chunks[0]
    if direct and not filtered and dataset.chunks[1] == n_pixels:
        return StoredArray(*common, "chunked", "chunks", chunk_rows=chunk_rows, gaps=gaps)
    slab = max(1, SLAB_BYTES // (4 * n_pixels * chunk_rows)) * chunk_rows
    return StoredArray(
        *common,
        "chunked",
        "library",
        chunk_rows=chunk_rows,
        slab_rows=min(slab, n_rows),
        own_chunks=filtered and direct,
        gaps=gaps,
    )


def _check_texts(file: h5py.File, arrays: dict[str, StoredArray]) -> None:
    """Refuse a file whose texts of variable length would be read for ever."""
    params = owners_of_params(file)
    plain = [item for item in params if isinstance(item, h5py.Dataset) and not item.dtype.hasobject]
    refuse_damaged_texts([file, *params], [*(file[stored.dataset] for stored in arrays.values()), *plain])


def _find_wave(file: h5py.File, path: Path, n_pixels: int) -> np.ndarray:
    name = "/spectrumdataset/wave"
    node = find(file, name)
    if not isinstance(node, h5py.Dataset):
        raise InputError(f"{path}: dataset spectrumdataset/wave is missing; found {contents_of(file)}")
    if lacking := lacking_filter(node):
        raise InputError(f"{path}: {name} {lacking}")
    wave = np.asarray(node[()], dtype=np.float64)
    if wave.shape != (n_pixels,):
        raise InputError(f"{path}: {name} has shape {wave.shape}, but the spectra have {n_pixels} pixels")
    if not np.all(np.isfinite(wave)) or np.any(np.diff(wave) <= 0):
        where = ""
        if np.all(np.diff(wave) < 0):
            where = "; it decreases: reverse wave and the pixels of every array"
        elif np.all(np.isfinite(wave)):
            pixel = int(np.flatnonzero(np.diff(wave) <= 0)[0])
            where = f"; pixel {pixel} has {wave[pixel]:g}, the next one {wave[pixel + 1]:g}"
        raise InputError(f"{path}: {name} must be finite and increasing (Å){where}")
    if gaps_of(node) is not None:
        raise InputError(f"{path}: {name} was never written as a whole")
    return wave


def _find_columns(file: h5py.File, path: Path, n_rows: int) -> dict[str, ParamColumn]:
    columns = param_columns(file)
    for column in columns.values():
        if not column.problem and column.n_rows != n_rows:
            raise InputError(
                f"{path}: {column.dataset} has {counted(column.n_rows, 'row')} for {counted(n_rows, 'spectrum')}"
            )
    return columns


def _attributes(file: h5py.File) -> dict[str, Any]:
    return {
        name: value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        for name, value in file.attrs.items()
        if isinstance(value, bytes | str | np.number | np.bool_) and name not in _OF_PYTABLES
    }
