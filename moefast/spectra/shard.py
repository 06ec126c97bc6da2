"""Spectrum files in the layout of the PFS simulator, read as they are.

Design: one shard is one HDF5 file. `structure.py` says what it holds, when it is opened; `rows.py` reads rows of its
arrays. A block never spans two shards, so everything made from blocks is a pure function of a shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from moefast.core.errors import InputError
from moefast.core.watched import interrupt_behind
from moefast.spectra.params import ParamColumn, read_columns
from moefast.spectra.rows import RowReader
from moefast.spectra.source import Block
from moefast.spectra.structure import StoredArray, read_structure

__all__ = ["TABLE_ROWS", "Shard"]

TABLE_ROWS = 16384
_FINGERPRINT_ROWS = 16
_FINGERPRINT_CHUNK_BYTES = 1 << 16


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
        structure = read_structure(self.path)
        self._size, self._stored, self._columns = structure.size, structure.arrays, structure.columns
        self._index = structure.index
        self._reader = RowReader(self.path)
        self.wave, self.attrs = structure.wave, structure.attrs
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

    def close(self) -> None:
        """Release file handles and cached slabs; the shard stays usable."""
        self._reader.close()

    def _stored_array(self, array: str) -> StoredArray:
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
        with self._damage_named(stored.dataset, start, stop):
            self._reader.read(stored, start, out)
        return out

    @contextmanager
    def _damage_named(self, dataset: str, start: int, stop: int) -> Generator[None, None, None]:
        """Whatever goes wrong while rows are read is damage, and says where it is."""
        try:
            yield
        except MemoryError:
            # Not taken for damage: its rows would count as lost.
            raise
        except Exception as error:
            if (interrupt := interrupt_behind(error)) is not None:
                raise interrupt from None
            raise InputError(
                f"{self.path}: {dataset}: rows {start} to {stop - 1} cannot be read, the file is truncated or "
                f"damaged: {error}"
            ) from error

    def in_any_order(self, *arrays: str) -> bool:
        """Whether several threads may read rows of these arrays at the same time and in any order, at no extra cost."""
        return all(self._stored[name].access != "library" for name in arrays if name in self._stored)

    def measured(self, array: str, start: int, stop: int) -> list[Any] | None:
        """Rows of an array as they were measured; None, as they lie on the grid already."""
        return None

    def fill(self, block: Block, first_row: int) -> None:
        """Put spectra as they were measured on the grid; nothing, as they lie there already."""

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
        columns = {name: self._columns[name] for name in wanted}
        with self._damage_named("dataset/params", start, stop), self._reader.lock:
            return read_columns(self._reader.hdf5(), columns, start, stop)

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
                with self._reader.lock:
                    stop = min(start + TABLE_ROWS, self.n_rows)
                    yield start, read_columns(self._reader.hdf5(), {"": column}, start, stop)[""]

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

    def _hash_chunks(self, stored: StoredArray, digest: Any) -> None:
        with self._reader.lock:
            try:
                dataset = self._reader.hdf5()[stored.dataset]
                n_chunks = dataset.id.get_num_chunks()
                for index in np.unique(np.linspace(0, n_chunks - 1, _FINGERPRINT_ROWS).astype(np.int64)):
                    chunk = dataset.id.get_chunk_info(int(index))
                    piece = bytearray(min(chunk.size, _FINGERPRINT_CHUNK_BYTES))
                    self._reader.fill(memoryview(piece), chunk.byte_offset)
                    digest.update(piece)
            except (OSError, RuntimeError, EOFError) as error:
                raise InputError(f"{self.path}: {stored.dataset} cannot be read: {error}") from error
