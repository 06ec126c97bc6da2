"""Tables in HDF5: one dataset per column in a group, attributes on the root."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from moefast.core.errors import InputError
from moefast.core.watched import WatchedFile, uninterrupted
from moefast.spectra.endless_texts import refuse_endless_heaps
from moefast.spectra.tables.attributes import (
    CHECKSUM,
    as_kept,
    as_plain,
    compare_digest,
    digest_of,
    from_text,
)
from moefast.spectra.tables.column import GROUP, Column, decode
from moefast.spectra.tables.writer import TableWriter

__all__ = ["Hdf5Table", "hdf5_layout", "read_hdf5"]

_CHUNK_BYTES = 1 << 19
"""Bytes of values in HDF5 that have one checksum; the library keeps one such chunk of each column in memory."""


class Hdf5Table(TableWriter):
    """One dataset per column in the group `predictions`; attributes on the root."""

    @uninterrupted()
    def _begin(self) -> None:
        # HDF5 loses errors of what it writes late; this file remembers them.
        self._watched = WatchedFile(self._partial)
        # Since 1.10 all structure has checksums; attributes of more than 64 kB need the storage of HDF5 1.8.
        self._file = h5py.File(self._watched, "w", libver=("v110", "latest"))
        group = self._file.create_group(GROUP)
        # Open until the end: closing a dataset writes its last chunk, which more rows may fill.
        self._datasets = {}
        for column in self.columns:
            dtype = h5py.string_dtype("utf-8", column.text_bytes) if column.text_bytes else column.dtype
            n_chunks = -(-self.n_rows * column.dtype.itemsize // _CHUNK_BYTES)
            chunks = (-(-self.n_rows // n_chunks),) if n_chunks else None
            dataset = group.create_dataset(
                column.name, (self.n_rows,), dtype, chunks=chunks, fletcher32=bool(chunks)
            )
            dataset.attrs["unit"] = column.unit
            dataset.attrs["description"] = column.description
            self._datasets[column.name] = dataset
        group.attrs["columns"] = json.dumps([column.name for column in self.columns])
        self._watched.check()

    @uninterrupted()
    def _append(self, first_row: int, rows: dict[str, np.ndarray]) -> None:
        for name, values in rows.items():
            if len(values):
                dataset = self._datasets[name]
                # HDF5 does not convert text between character sets; the view carries the dataset's own.
                dataset[first_row : first_row + len(values)] = values.view(dataset.dtype)
        self._watched.check()

    @uninterrupted()
    def _end(self) -> None:
        stored = {name: as_kept(value) for name, value in self.attrs.items()}
        for name, kept in stored.items():
            self._file.attrs[name] = kept
        self._file.attrs[CHECKSUM] = _hdf5_digest(list(self._datasets.values()), stored)
        self._file.close()
        self._watched.complete()

    @uninterrupted()
    def _abort(self) -> None:
        with self._watched.given_up():
            self._file.close()


def _hdf5_digest(datasets: Sequence[h5py.Dataset], stored: Mapping[str, Any]) -> str:
    columns = [
        (dataset.name, dataset.dtype.str, str(dataset.attrs["unit"]), str(dataset.attrs["description"]))
        for dataset in datasets
    ]
    return digest_of(len(datasets[0]), columns, stored)


@contextlib.contextmanager
def _open_hdf5(path: Path) -> Iterator[tuple[list[h5py.Dataset], dict[str, Any]]]:
    """Columns, in order, and attributes of a table whose checksum of both has been compared."""
    with h5py.File(path, "r") as file:
        if GROUP not in file:
            raise InputError(f"{path}: no group {GROUP!r}: not a prediction table")
        group = file[GROUP]
        refuse_endless_heaps(file, [item for item in group.values() if isinstance(item, h5py.Dataset)])
        datasets = [group[name] for name in json.loads(group.attrs["columns"])]
        stored = {name: as_plain(value) for name, value in file.attrs.items()}
        if (kept := stored.pop(CHECKSUM, None)) is not None:
            compare_digest(path, kept, _hdf5_digest(datasets, stored))
        attributes = {
            name: from_text(value) if isinstance(value, str) else value for name, value in stored.items()
        }
        yield datasets, attributes


def read_hdf5(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Columns and attributes of a table."""
    with _open_hdf5(path) as (datasets, attributes):
        return {
            _name_of(dataset): dataset[()] if dataset.dtype.kind != "S" else decode(dataset[()])
            for dataset in datasets
        }, attributes


def _name_of(dataset: h5py.Dataset) -> str:
    return str(dataset.name).rpartition("/")[2]


def hdf5_layout(path: Path) -> tuple[list[Column], dict[str, Any], int]:
    """Columns, attributes and number of rows of a table."""
    with _open_hdf5(path) as (datasets, attributes):
        columns = [
            Column(
                _name_of(dataset),
                np.dtype(f"S{dataset.dtype.itemsize}") if dataset.dtype.kind == "S" else dataset.dtype,
                str(dataset.attrs["unit"]),
                str(dataset.attrs["description"]),
            )
            for dataset in datasets
        ]
        return columns, attributes, len(datasets[0])
