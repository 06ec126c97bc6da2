"""Write spectrum files in the layout of the PFS simulator."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np

from moefast.core.atomic import partial_path, publish, remove_quietly
from moefast.core.errors import OutputError
from moefast.core.text import counted
from moefast.core.watched import WatchedFile, uninterrupted
from moefast.spectra.hdf5 import ARRAYS
from moefast.spectra.params import create_params_table

__all__ = ["SpectrumWriter"]


class SpectrumWriter:
    """Write a spectrum file in the layout that `open_spectra` and the simulator's own tools read.

    Arrays become contiguous float32 datasets (the mask uint8), params a table that ``pandas.read_hdf(path,
    "dataset/params")`` reads. The file has its final name only once it is complete.

    Parameters
    ----------
    path : str or Path
        Final name.
    n_rows : int
        Number of spectra.
    wave : array of shape (p,)
        Wavelength of the pixels in Å.
    wave_edges : array of shape (p + 1,)
        Edges of the pixels in Å.
    arrays : sequence of str
        Which of flux, error, mask, noisy will be written.
    params : mapping of str to dtype
        Columns of the params table, numbers, bool or byte strings ("S8").
    attrs : mapping, optional
        Attributes of the root: numbers and text; anything else is stored as JSON.
    overwrite : bool
        Whether an existing file may be replaced.

    Raises
    ------
    OutputError
        If the file exists, cannot be written, or rows are missing at the end.

    Examples
    --------
    ::

        with SpectrumWriter(path, n_rows=n, wave=wave, wave_edges=edges, params={"log_g": "f8"}) as writer:
            writer.write(0, params={"log_g": log_g}, flux=flux, error=error)
    """

    def __init__(
        self,
        path: str | Path,
        *,
        n_rows: int,
        wave: np.ndarray,
        wave_edges: np.ndarray,
        arrays: Sequence[str] = ("flux", "error"),
        params: Mapping[str, Any] | None = None,
        attrs: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        wave, wave_edges = np.asarray(wave, dtype=np.float64), np.asarray(wave_edges, dtype=np.float64)
        if n_rows < 1:
            raise ValueError(f"n_rows must be at least 1, found {n_rows}")
        if wave.ndim != 1 or wave_edges.shape != (len(wave) + 1,):
            raise ValueError(
                f"wave of shape (p,) and wave_edges (p + 1,), not {wave.shape}, {wave_edges.shape}"
            )
        if not set(arrays) <= set(ARRAYS) or not arrays:
            raise ValueError(f"arrays must be of {', '.join(ARRAYS)}, found {', '.join(arrays)}")
        columns = {name: np.dtype(dtype) for name, dtype in (params or {}).items()}
        for name, dtype in columns.items():
            if dtype.kind not in "biufS" or (dtype.kind == "S" and not dtype.itemsize):
                raise ValueError(f"params column {name!r} is {dtype}, expected a number, bool or 'S<length>'")
            if not name.isidentifier() or name == "index":
                raise ValueError(f"params column {name!r}: a name must be an identifier, and not 'index'")
        self.n_rows, self.n_pixels = int(n_rows), len(wave)
        self.arrays, self.columns = tuple(arrays), columns
        self._written = np.zeros(self.n_rows, bool)
        self._lock, self._overwrite = threading.Lock(), overwrite
        self._partial = partial_path(self.path, overwrite=overwrite)
        try:
            # HDF5 loses errors of what it writes late, or ends the process; this file remembers them.
            self._watched = WatchedFile(self._partial)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error}") from error
        try:
            self._create(wave, wave_edges, attrs or {})
            self._watched.check()
        except OSError as error:
            self.abort()
            raise OutputError(f"{self.path}: cannot be written: {error}") from error
        except BaseException:
            self.abort()
            raise

    @uninterrupted()
    def _create(self, wave: np.ndarray, wave_edges: np.ndarray, attrs: Mapping[str, Any]) -> None:
        # Data that start on a page can be mapped and read without an unaligned first piece. Since HDF5 1.10 all
        # structure has checksums.
        self._file = file = h5py.File(
            self._watched,
            "w",
            libver=("v110", "latest"),
            alignment_threshold=1 << 16,
            alignment_interval=4096,
        )
        for name, value in attrs.items():
            plain = isinstance(value, str | bool | int | float | np.number | np.bool_)
            file.attrs[name] = value if plain else json.dumps(value, default=str)
        # A group that h5py creates on the way holds the time, and the file would never be the same twice.
        grid = file.create_group("spectrumdataset")
        grid["wave"] = wave
        grid["wave_edges"] = wave_edges
        self._datasets = {
            name: file.create_dataset(
                f"dataset/arrays/{name}/value",
                (self.n_rows, self.n_pixels),
                np.uint8 if name == "mask" else np.float32,
            )
            for name in self.arrays
        }
        self._table = create_params_table(file, self.n_rows, self.columns) if self.columns else None

    def write(self, first_row: int, *, params: Mapping[str, Any] | None = None, **arrays: np.ndarray) -> None:
        """Write consecutive rows; calls may come in any order and from several threads.

        Parameters
        ----------
        first_row : int
            Row of the first spectrum.
        params : mapping of str to array of shape (n,)
            Every column of the table.
        **arrays : array of shape (n, p)
            Every array of the file.

        Raises
        ------
        OutputError
            If the rows were written before, or the disk refuses.
        """
        params = params or {}
        if set(arrays) != set(self.arrays):
            raise ValueError(f"arrays {', '.join(self.arrays)} expected, found {', '.join(arrays) or None}")
        if set(params) != set(self.columns):
            raise ValueError(f"params {', '.join(self.columns)} expected, found {', '.join(params) or None}")
        n = len(next(iter(arrays.values())))
        stop = first_row + n
        if not 0 <= first_row <= stop <= self.n_rows:
            raise ValueError(f"rows {first_row} to {stop} do not fit a file of {self.n_rows}")
        for name, array in arrays.items():
            if np.shape(array) != (n, self.n_pixels):
                raise ValueError(f"{name}: shape ({n}, {self.n_pixels}) expected, found {np.shape(array)}")
        if self._table is not None:
            rows = np.zeros(n, self._table.dtype)
            rows["index"] = np.arange(first_row, stop)
            for name, dtype in self.columns.items():
                values = np.asarray(params[name])
                if values.shape != (n,):
                    raise ValueError(f"params {name}: shape ({n},) expected, found {values.shape}")
                if values.dtype.kind == "U":
                    values = np.char.encode(values, "utf-8")
                if values.dtype.kind == "S" and values.dtype.itemsize > dtype.itemsize:
                    raise ValueError(f"params {name}: {dtype.itemsize} bytes do not hold {values.dtype}")
                rows[name] = values
        with self._lock:
            if self._written[first_row:stop].any():
                raise OutputError(f"{self.path}: rows {first_row} to {stop - 1} have been written before")
            try:
                with uninterrupted():
                    for name, array in arrays.items():
                        values = np.asarray(array)
                        dataset = self._datasets[name]
                        values = values != 0 if name == "mask" else values
                        dataset[first_row:stop] = values.astype(dataset.dtype, copy=False)
                    if self._table is not None:
                        self._table[first_row:stop] = rows
                self._watched.check()
            except OSError as error:
                raise OutputError(f"{self.path}: rows {first_row} to {stop - 1}: {error}") from error
            self._written[first_row:stop] = True

    def abort(self) -> None:
        """Give up: close and remove what has been written."""
        try:
            with self._watched.given_up():
                if hasattr(self, "_file"):
                    with uninterrupted():
                        self._file.close()
        finally:
            remove_quietly(self._partial)

    def close(self) -> None:
        """Complete the file and give it its final name.

        Raises
        ------
        OutputError
            If rows are missing; nothing is left then.
        """
        missing = np.flatnonzero(~self._written)
        if len(missing):
            self.abort()
            raise OutputError(
                f"{self.path}: {counted(len(missing), 'row')} not written, the first is {missing[0]}"
            )
        try:
            try:
                with uninterrupted():
                    self._file.close()
                self._watched.complete()
            except (OSError, RuntimeError) as error:
                raise OutputError(f"{self.path}: could not be completed: {error}") from error
            publish(self._partial, self.path, overwrite=self._overwrite)
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()
