"""Spectrum files in the layout of the PFS simulator, read as they are.

Design: one shard is one HDF5 file. Arrays that lie uncompressed on the disk (contiguous, or in chunks as wide
as a spectrum) are read past the HDF5 library, straight from their offset into the block that is handed out;
reading instead of mapping, because a file that shrinks under a map ends the process (SIGBUS) and one that
shrinks under a read is an error with a name. Threads read such arrays at the same time: one of them alone reaches
a small part of what memory allows. Compressed chunks are decoded once each, in slabs of whole
chunks from which the blocks are cut, one thread at a time. Conversion to float32 happens in pieces that fit the cache.
A block never spans two shards, so everything made from blocks is a pure function of a shard.

Layout::

    dataset/arrays/flux/value    (n, p) float   clean flux
    dataset/arrays/error/value   (n, p) float   1σ per pixel, same units
    dataset/arrays/mask/value    (n, p) int     optional, not 0 = bad
    dataset/arrays/noisy/value   (n, p) float   optional, flux with its noise
    spectrumdataset/wave         (p,)  float    Å
    dataset/params               optional table of labels and conditions, one row per spectrum
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from moefast.core.errors import InputError
from moefast.core.watched import interrupt_behind
from moefast.spectra.hdf5 import ARRAYS, STAGING_BYTES, contents_of, open_hdf5
from moefast.spectra.params import ParamColumn, index_column, owners_of_params, param_columns, read_columns
from moefast.spectra.source import Block
from moefast.spectra.stored import (
    UnwrittenPlaces,
    find,
    gaps_of,
    lacking_filter,
    owned_by,
    refuse_damaged_texts,
    refuse_misspelt,
)

__all__ = ["TABLE_ROWS", "Shard"]

_SLAB_BYTES = 1 << 25
TABLE_ROWS = 16384
_FINGERPRINT_ROWS = 16
_FINGERPRINT_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class _Stored:
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
        return self.n_pixels * self.dtype.itemsize


def _close(descriptor: int) -> None:
    """Close a file that was only read: nothing is lost if a shared disk that is gone says no."""
    with suppress(OSError):
        os.close(descriptor)


class _RawFile:
    """The bytes of a file, for several threads; it is closed when none of them, and nothing else, refers to it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, _close, self._descriptor).atexit = False

    def fill(self, view: memoryview, offset: int) -> None:
        """Read bytes from `offset` on; EOFError if the file has too few."""
        done = 0
        while done < len(view):
            n = os.preadv(self._descriptor, [view[done:]], offset + done)
            if not n:
                raise EOFError(f"file ends at byte {offset + done}")
            done += n


class Shard:
    """One spectrum file.

    Metadata are read at once; data on demand. Usable from several threads.

    Attributes
    ----------
    path : Path
        The file.
    n_rows, n_pixels : int
        Shape of its arrays.
    wave : array of shape (p,), float64
        Wavelength of the pixels in Å.
    arrays : tuple of str
        Which of flux, error, mask, noisy it has.
    dtypes : dict of str to dtype
        As stored.
    layout : dict of str to str
        "contiguous" or "chunked".
    columns : tuple of str
        Readable columns of its params table.
    unreadable : dict of str to str
        Columns that are there and cannot be read, with the reason.
    attrs : dict
        Attributes of the file's root that are numbers or text.

    Raises
    ------
    InputError
        If the file is missing, truncated, damaged, empty, or lacks what it must have.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.RLock()
        self._hdf5: h5py.File | None = None
        self._raw: _RawFile | None = None
        self._slabs: dict[tuple[str, str], tuple[int, np.ndarray]] = {}
        file = open_hdf5(self.path)
        try:
            self._size = self.path.stat().st_size
            self._stored = self._find_arrays(file)
            self._check_texts(file)
            self.wave = self._find_wave(file)
            self._columns = self._find_columns(file)
            self._index = index_column(file)
            self.attrs = {
                name: value.decode("utf-8", "replace") if isinstance(value, bytes) else value
                for name, value in file.attrs.items()
                if isinstance(value, bytes | str | np.number | np.bool_)
                and name not in {"CLASS", "TITLE", "VERSION", "PYTABLES_FORMAT_VERSION"}
            }
        except InputError:
            raise
        except Exception as error:
            if (interrupt := interrupt_behind(error)) is not None:
                raise interrupt from None
            # Damaged descriptions of types and shapes make h5py raise nearly anything.
            raise InputError(f"{self.path}: metadata cannot be read, damaged? {error}") from error
        finally:
            file.close()
        first = next(iter(self._stored.values()))
        self.n_rows, self.n_pixels = first.n_rows, first.n_pixels
        self.arrays = tuple(self._stored)
        self.dtypes = {name: stored.dtype for name, stored in self._stored.items()}
        self.layout = {name: stored.layout for name, stored in self._stored.items()}
        self.columns = tuple(name for name, column in self._columns.items() if not column.problem)
        self.unreadable = {name: column.problem for name, column in self._columns.items() if column.problem}

    def __repr__(self) -> str:
        return (
            f"Shard({str(self.path)!r}, n_rows={self.n_rows}, n_pixels={self.n_pixels}, arrays={self.arrays})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    # -- what is in the file -------------------------------------------------------------------------------

    def _find_arrays(self, file: h5py.File) -> dict[str, _Stored]:
        refuse_misspelt(file, "/dataset", ("arrays", "params"))
        refuse_misspelt(file, "/dataset/arrays", ARRAYS)
        datasets = {}
        for name in ARRAYS:
            path = f"/dataset/arrays/{name}/value"
            node = find(file, path)
            if isinstance(node, h5py.Dataset):
                datasets[name] = node
            elif node is not None or find(file, f"/dataset/arrays/{name}") is not None:
                raise InputError(
                    f"{self.path}: dataset {path[1:]} is missing; found {contents_of(file)}. Expected it, as there is "
                    f"a group dataset/arrays/{name}"
                )
        flux = "flux" if "flux" in datasets else "noisy"
        for name in (flux if flux in datasets else "flux", "error"):
            if name not in datasets:
                raise InputError(
                    f"{self.path}: dataset dataset/arrays/{name}/value is missing; found {contents_of(file)}. "
                    "Expected a spectrum dataset with arrays flux (or noisy) and error"
                )
        shape = datasets[flux].shape
        names = {name: f"/dataset/arrays/{name}/value" for name in datasets}
        for name, dataset in datasets.items():
            if dataset.ndim != 2:
                raise InputError(
                    f"{self.path}: {names[name]} has shape {dataset.shape}, expected (rows, pixels)"
                )
            if dataset.shape != shape:
                raise InputError(
                    f"{self.path}: {names[name]} has shape {dataset.shape}, {names[flux]} {shape}"
                )
            if dataset.dtype.kind not in "fiub":
                raise InputError(f"{self.path}: {names[name]} has type {dataset.dtype}, expected numbers")
        if 0 in shape:
            raise InputError(f"{self.path}: holds no spectra ({names[flux]} has shape {shape})")
        return {name: self._locate(dataset, names[name], file) for name, dataset in datasets.items()}

    def _locate(self, dataset: h5py.Dataset, path: str, file: h5py.File) -> _Stored:
        n_rows, n_pixels = dataset.shape
        if lacking := lacking_filter(dataset):
            raise InputError(f"{self.path}: {path} {lacking}")
        creation = dataset.id.get_create_plist()
        filtered = creation.get_nfilters() > 0
        gaps = gaps_of(dataset)
        if gaps is not None and gaps.everything:
            raise InputError(f"{self.path}: {path} was created and never written")
        common = (path, dataset.dtype, n_rows, n_pixels)
        # Only bytes of this very file are read past the library. HDF5 versions disagree on whether offsets count a
        # user block in.
        direct = file.userblock_size == 0 and not dataset.is_virtual and owned_by(dataset, file)
        if dataset.chunks is None:
            layout = "contiguous"
            if direct and creation.get_layout() == h5py.h5d.CONTIGUOUS and not dataset.external:
                offset = dataset.id.get_offset()
                row_bytes = n_pixels * dataset.dtype.itemsize
                if offset + n_rows * row_bytes > self._size:
                    whole = max(0, (self._size - offset) // row_bytes)
                    raise InputError(
                        f"{self.path}: truncated file: {path} ends in row {whole} of {n_rows}; "
                        "copy or produce it again"
                    )
                return _Stored(*common, layout, "offset", offset=offset)
            slab = max(1, _SLAB_BYTES // (4 * n_pixels))
            return _Stored(*common, layout, "library", slab_rows=min(slab, n_rows), gaps=gaps)
        chunk_rows = dataset.chunks[0]
        if direct and not filtered and dataset.chunks[1] == n_pixels:
            return _Stored(*common, "chunked", "chunks", chunk_rows=chunk_rows, gaps=gaps)
        slab = max(1, _SLAB_BYTES // (4 * n_pixels * chunk_rows)) * chunk_rows
        return _Stored(
            *common,
            "chunked",
            "library",
            chunk_rows=chunk_rows,
            slab_rows=min(slab, n_rows),
            own_chunks=filtered and direct,
            gaps=gaps,
        )

    def _check_texts(self, file: h5py.File) -> None:
        params = owners_of_params(file)
        plain = [item for item in params if isinstance(item, h5py.Dataset) and not item.dtype.hasobject]
        refuse_damaged_texts(
            [file, *params], [*(file[stored.dataset] for stored in self._stored.values()), *plain]
        )

    def _find_wave(self, file: h5py.File) -> np.ndarray:
        path = "/spectrumdataset/wave"
        node = find(file, path)
        if not isinstance(node, h5py.Dataset):
            raise InputError(
                f"{self.path}: dataset spectrumdataset/wave is missing; found {contents_of(file)}"
            )
        if lacking := lacking_filter(node):
            raise InputError(f"{self.path}: {path} {lacking}")
        n_pixels = next(iter(self._stored.values())).n_pixels
        wave = np.asarray(node[()], dtype=np.float64)
        if wave.shape != (n_pixels,):
            raise InputError(
                f"{self.path}: {path} has shape {wave.shape}, but the spectra have {n_pixels} pixels"
            )
        if not np.all(np.isfinite(wave)) or np.any(np.diff(wave) <= 0):
            raise InputError(f"{self.path}: {path} must be finite and increasing (Å)")
        if gaps_of(node) is not None:
            raise InputError(f"{self.path}: {path} was never written as a whole")
        return wave

    def _find_columns(self, file: h5py.File) -> dict[str, ParamColumn]:
        columns = param_columns(file)
        n_rows = next(iter(self._stored.values())).n_rows
        for column in columns.values():
            if not column.problem and column.n_rows != n_rows:
                raise InputError(
                    f"{self.path}: {column.dataset} has {column.n_rows} rows, but there are {n_rows} spectra"
                )
        return columns

    # -- data ----------------------------------------------------------------------------------------------

    def _file(self) -> h5py.File:
        if self._hdf5 is None:
            self._hdf5 = open_hdf5(self.path)
        return self._hdf5

    def close(self) -> None:
        """Release file handles and cached slabs; the shard stays usable."""
        with self._lock:
            self._slabs.clear()
            if self._hdf5 is not None:
                self._hdf5.close()
                self._hdf5 = None
            # Other threads may still read from it.
            self._raw = None

    def _stored_array(self, array: str) -> _Stored:
        try:
            return self._stored[array]
        except KeyError:
            raise InputError(
                f"{self.path}: has no array {array!r}; it has {', '.join(self._stored)}"
            ) from None

    def read(self, array: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows `start` to `stop` of an array.

        Parameters
        ----------
        array : {"flux", "error", "noisy", "mask"}
            Which one.
        start, stop : int
            Rows of this shard.
        out : array of shape (stop - start, p), float32 or bool, C-contiguous, optional
            Filled and returned. With bool, each value becomes "is not 0".

        Returns
        -------
        array of shape (stop - start, p)
            float32; bool for the mask (True = bad).

        Raises
        ------
        InputError
            If the rows cannot be read.
        """
        stored = self._stored_array(array)
        if not 0 <= start <= stop <= self.n_rows:
            raise ValueError(f"rows {start} to {stop} asked for, the shard has {self.n_rows}")
        if out is None:
            out = np.empty((stop - start, self.n_pixels), bool if array == "mask" else np.float32)
        elif (
            out.shape != (stop - start, self.n_pixels)
            or out.dtype not in (np.float32, np.bool_)
            or not out.flags.c_contiguous
        ):
            raise ValueError(
                f"out must be C-contiguous float32 or bool of shape ({stop - start}, {self.n_pixels}), "
                f"found {out.dtype} {out.shape}"
            )
        try:
            with np.errstate(all="ignore"):
                if stored.access == "offset":
                    self._read_raw(stored, stored.offset + start * stored.row_bytes, out)
                elif stored.access == "chunks":
                    self._read_chunks(stored, start, out)
                else:
                    with self._lock:
                        self._read_slabs(array, stored, start, out)
                if stored.gaps is not None:
                    stored.gaps.blank(out, start)
        except MemoryError:
            # Not taken for damage: its rows would count as lost.
            raise
        except Exception as error:
            if (interrupt := interrupt_behind(error)) is not None:
                raise interrupt from None
            raise InputError(
                f"{self.path}: {stored.dataset}: rows {start} to {stop - 1} cannot be read, the file is "
                f"truncated or damaged: {error}"
            ) from error
        return out

    def in_any_order(self, *arrays: str) -> bool:
        """Whether several threads may read rows of these arrays at the same time and in any order, at no extra cost."""
        return all(self._stored[name].access != "library" for name in arrays if name in self._stored)

    def measured(self, array: str, start: int, stop: int) -> list[Any] | None:
        """Rows of an array as they were measured; None, as they lie on the grid already."""
        return None

    def fill(self, block: Block, first_row: int) -> None:
        """Put spectra as they were measured on the grid; nothing, as they lie there already."""

    def _fill(self, view: memoryview, offset: int) -> None:
        raw = self._raw
        if raw is None:
            with self._lock:
                raw = self._raw = self._raw or _RawFile(self.path)
        raw.fill(view, offset)

    def _read_raw(self, stored: _Stored, offset: int, out: np.ndarray) -> None:
        if not out.size:
            return
        if stored.dtype == out.dtype and out.dtype != np.bool_:
            self._fill(out.view(np.uint8).data.cast("B"), offset)
            return
        step = max(1, STAGING_BYTES // stored.row_bytes)
        staging = np.empty((min(step, len(out)), stored.n_pixels), stored.dtype)
        for first in range(0, len(out), step):
            target = out[first : first + step]
            piece = staging[: len(target)]
            self._fill(piece.view(np.uint8).data.cast("B"), offset + first * stored.row_bytes)
            _convert(piece, target)

    def _read_chunks(self, stored: _Stored, start: int, out: np.ndarray) -> None:
        stop = start + len(out)
        chunk_starts = range(start - start % stored.chunk_rows, stop, stored.chunk_rows)
        with self._lock:
            dataset = self._file()[stored.dataset]
            offsets = [dataset.id.get_chunk_info_by_coord((first, 0)).byte_offset for first in chunk_starts]
        for first, offset in zip(chunk_starts, offsets, strict=True):
            row, end = max(start, first), min(stop, first + stored.chunk_rows)
            # A chunk that was never written is one of the gaps.
            if offset is not None:
                place = offset + (row - first) * stored.row_bytes
                self._read_raw(stored, place, out[row - start : end - start])

    def _read_slabs(self, array: str, stored: _Stored, start: int, out: np.ndarray) -> None:
        row, stop = start, start + len(out)
        while row < stop:
            slab_start = row - row % stored.slab_rows
            end = min(stop, slab_start + stored.slab_rows)
            key = (array, out.dtype.kind)
            held = self._slabs.get(key)
            if held is None or held[0] != slab_start:
                # The old slab goes first: with one chunk of 2 GB there is no room for two.
                self._slabs.pop(key, None)
                del held
                slab = np.empty((min(stored.slab_rows, self.n_rows - slab_start), self.n_pixels), out.dtype)
                dataset = self._file()[stored.dataset]
                if out.dtype == np.bool_:
                    _convert(dataset[slab_start : slab_start + len(slab)], slab)
                else:
                    dataset.read_direct(slab, np.s_[slab_start : slab_start + len(slab)])
                held = self._slabs[key] = (slab_start, slab)
            out[row - start : end - start] = held[1][row - slab_start : end - slab_start]
            row = end

    def params(
        self, names: Iterable[str] | None = None, start: int = 0, stop: int | None = None
    ) -> dict[str, np.ndarray]:
        """Columns of the params table.

        Parameters
        ----------
        names : iterable of str, optional
            Which; all readable ones if None.
        start, stop : int
            Rows of this shard.

        Returns
        -------
        dict of str to array of shape (stop - start,)
            Numbers as stored, in native byte order; strings as text.

        Raises
        ------
        InputError
            If a column is absent or cannot be read.
        """
        wanted = list(self.columns if names is None else names)
        for name in wanted:
            if name in self.unreadable:
                raise InputError(f"{self.path}: dataset/params: column {name!r} {self.unreadable[name]}")
            if name not in self._columns:
                raise InputError(
                    f"{self.path}: dataset/params has no column {name!r}; it has "
                    f"{', '.join(self.columns) or 'no readable column'}"
                )
        stop = self.n_rows if stop is None else stop
        if not 0 <= start <= stop <= self.n_rows:
            raise ValueError(f"rows {start} to {stop} asked for, the shard has {self.n_rows}")
        if not wanted:
            return {}
        try:
            with self._lock:
                return read_columns(self._file(), {name: self._columns[name] for name in wanted}, start, stop)
        except MemoryError:
            # Not taken for damage: its rows would count as lost.
            raise
        except Exception as error:
            if (interrupt := interrupt_behind(error)) is not None:
                raise interrupt from None
            raise InputError(
                f"{self.path}: dataset/params: rows {start} to {stop - 1} cannot be read, the file is "
                f"truncated or damaged: {error}"
            ) from error

    def slices(self, name: str) -> Iterator[np.ndarray]:
        """A column of the params table in pieces: whole columns of text fill the memory."""
        for start in range(0, self.n_rows, TABLE_ROWS):
            yield self.params([name], start, min(start + TABLE_ROWS, self.n_rows))[name]

    def order_problems(self) -> list[str]:
        """Columns that number the rows, but in another order than they lie in; one sentence for each.

        The order of a table can only be told from one of its columns: the index of a pandas table, or a column `id` or
        `row` that counts the spectra.
        """
        problems = []
        indices = {"the index": self._index} if self._index is not None else {}
        columns = {f"column {name!r}": self._columns[name] for name in ("id", "row") if name in self.columns}
        for name, column in (indices | columns).items():
            if (found := self._other_order(column)) is not None:
                row, number = found
                problems.append(
                    f"{name} of dataset/params numbers the spectra in another order than they lie in (row {row} "
                    f"has {number}): rows of params are taken to belong to the spectra of the same row; if "
                    "they do not, labels and identifiers are those of other stars"
                )
        return problems

    def _other_order(self, column: ParamColumn) -> tuple[int, int] | None:
        """The first row whose number is not the next one, and the number, if the column holds every number once."""

        def pieces() -> Iterator[tuple[int, np.ndarray]]:
            for start in range(0, self.n_rows, TABLE_ROWS):
                with self._lock:
                    stop = min(start + TABLE_ROWS, self.n_rows)
                    yield start, read_columns(self._file(), {"": column}, start, stop)[""]

        ends = []
        for _, values in pieces():
            if values.dtype.kind not in "iu" or self.n_rows < 2:
                return None
            ends += [int(values.min()), int(values.max())]
        least = min(ends)
        if max(ends) - least + 1 != self.n_rows:
            return None
        first = None
        there = np.zeros(self.n_rows, bool)
        for start, values in pieces():
            offset = (values - values.dtype.type(least)).astype(np.int64)
            there[offset] = True
            differs = np.flatnonzero(offset != np.arange(start, start + len(offset)))
            if first is None and len(differs):
                first = start + int(differs[0]), int(values[differs[0]])
        return first if there.all() else None

    def fingerprint(self) -> str:
        """SHA-256, as hex digits, that identifies the content at the cost of reading a few rows.

        It covers names, shapes and types of the arrays, the wave grid, the size of the file, and the values
        of up to 16 rows spread evenly from the first to the last, of every array and of the numeric params.
        Of a compressed array it takes the first 64 kB of up to 16 chunks as stored. A change of single
        values elsewhere is not seen. Name and time of the file do not matter.
        """
        digest = hashlib.sha256()
        header = {
            "size": self._size,
            "arrays": {name: [s.n_rows, s.n_pixels, s.dtype.str] for name, s in self._stored.items()},
            "columns": sorted(self.columns),
        }
        digest.update(json.dumps(header, sort_keys=True).encode())
        digest.update(self.wave.astype("<f8").tobytes())
        rows = np.unique(np.linspace(0, self.n_rows - 1, _FINGERPRINT_ROWS).astype(np.int64))
        for name, stored in self._stored.items():
            if stored.own_chunks:
                self._hash_chunks(stored, digest)
                continue
            for row in rows:
                digest.update(self.read(name, int(row), int(row) + 1).tobytes())
        # Row by row: whole columns of millions of rows would fill the memory.
        few = [self.params(None, int(row), int(row) + 1) for row in rows]
        for name in sorted(self.columns):
            if few[0][name].dtype.kind in "biuf":
                digest.update(np.concatenate([row[name] for row in few]).tobytes())
        return digest.hexdigest()

    def _hash_chunks(self, stored: _Stored, digest: Any) -> None:
        with self._lock:
            try:
                dataset = self._file()[stored.dataset]
                n_chunks = dataset.id.get_num_chunks()
                for index in np.unique(np.linspace(0, n_chunks - 1, _FINGERPRINT_ROWS).astype(np.int64)):
                    chunk = dataset.id.get_chunk_info(int(index))
                    piece = bytearray(min(chunk.size, _FINGERPRINT_CHUNK_BYTES))
                    self._fill(memoryview(piece), chunk.byte_offset)
                    digest.update(piece)
            except (OSError, RuntimeError, EOFError) as error:
                raise InputError(f"{self.path}: {stored.dataset} cannot be read: {error}") from error


def _convert(source: np.ndarray, target: np.ndarray) -> None:
    if target.dtype == np.bool_:
        np.not_equal(source, 0, out=target)
    else:
        np.copyto(target, source, casting="unsafe")
