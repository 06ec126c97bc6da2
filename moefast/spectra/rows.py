"""Rows of the arrays of a spectrum file, read as they lie on the disk.

Design: arrays that lie uncompressed on the disk (contiguous, or in chunks as wide as a spectrum) are read past the HDF5
library, straight from their offset into the block that is handed out; reading instead of mapping, because a file that
shrinks under a map ends the process (SIGBUS) and one that shrinks under a read is an error with a name. Threads read
such arrays at the same time: one of them alone reaches a small part of what memory allows. Compressed chunks are
decoded once each, in slabs of whole chunks from which the blocks are cut, one thread at a time. Conversion to float32
happens in pieces that fit the cache.
"""

from __future__ import annotations

import os
import threading
import weakref
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np

from moefast.spectra.hdf5 import STAGING_BYTES, open_hdf5
from moefast.spectra.structure import StoredArray

__all__ = ["RowReader"]


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


class RowReader:
    """What reads rows of a file's arrays; usable from several threads.

    It opens the file when something is first read, and again after `close`.

    Attributes
    ----------
    lock : RLock
        To be held by whoever uses `hdf5`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.RLock()
        self._hdf5: h5py.File | None = None
        self._raw: _RawFile | None = None
        self._slabs: dict[tuple[str, str], tuple[int, np.ndarray]] = {}

    def hdf5(self) -> h5py.File:
        """The file as the HDF5 library has it."""
        if self._hdf5 is None:
            self._hdf5 = open_hdf5(self.path)
        return self._hdf5

    def close(self) -> None:
        """Release file handles and cached slabs; the reader stays usable."""
        with self.lock:
            self._slabs.clear()
            if self._hdf5 is not None:
                self._hdf5.close()
                self._hdf5 = None
            # Other threads may still read from it.
            self._raw = None

    def fill(self, view: memoryview, offset: int) -> None:
        """Read bytes from `offset` on; EOFError if the file has too few."""
        raw = self._raw
        if raw is None:
            with self.lock:
                raw = self._raw = self._raw or _RawFile(self.path)
        raw.fill(view, offset)

    def read(self, stored: StoredArray, start: int, out: np.ndarray) -> None:
        """Rows of an array from `start` on; whatever goes wrong is raised as it is.

        Parameters
        ----------
        stored : StoredArray
        start : int
        out : array of shape (n, p), float32 or bool, C-contiguous
            Filled. With bool, each value becomes "is not 0".
        """
        with np.errstate(all="ignore"):
            if stored.access == "offset":
                self._read_raw(stored, stored.offset + start * stored.row_bytes, out)
            elif stored.access == "chunks":
                self._read_chunks(stored, start, out)
            else:
                with self.lock:
                    self._read_slabs(stored, start, out)
            if stored.gaps is not None:
                stored.gaps.blank(out, start)

    def _read_raw(self, stored: StoredArray, offset: int, out: np.ndarray) -> None:
        if not out.size:
            return
        if stored.dtype == out.dtype and out.dtype != np.bool_:
            self.fill(out.view(np.uint8).data.cast("B"), offset)
            return
        step = max(1, STAGING_BYTES // stored.row_bytes)
        staging = np.empty((min(step, len(out)), stored.n_pixels), stored.dtype)
        for first in range(0, len(out), step):
            target = out[first : first + step]
            piece = staging[: len(target)]
            self.fill(piece.view(np.uint8).data.cast("B"), offset + first * stored.row_bytes)
            _convert(piece, target)

    def _read_chunks(self, stored: StoredArray, start: int, out: np.ndarray) -> None:
        stop = start + len(out)
        chunk_starts = range(start - start % stored.chunk_rows, stop, stored.chunk_rows)
        with self.lock:
            dataset = self.hdf5()[stored.dataset]
            offsets = [dataset.id.get_chunk_info_by_coord((first, 0)).byte_offset for first in chunk_starts]
        for first, offset in zip(chunk_starts, offsets, strict=True):
            row, end = max(start, first), min(stop, first + stored.chunk_rows)
            # A chunk that was never written is one of the gaps.
            if offset is not None:
                place = offset + (row - first) * stored.row_bytes
                self._read_raw(stored, place, out[row - start : end - start])

    def _read_slabs(self, stored: StoredArray, start: int, out: np.ndarray) -> None:
        row, stop = start, start + len(out)
        while row < stop:
            slab_start = row - row % stored.slab_rows
            end = min(stop, slab_start + stored.slab_rows)
            key = (stored.dataset, out.dtype.kind)
            held = self._slabs.get(key)
            if held is None or held[0] != slab_start:
                # The old slab goes first: with one chunk of 2 GB there is no room for two.
                self._slabs.pop(key, None)
                del held
                slab = np.empty(
                    (min(stored.slab_rows, stored.n_rows - slab_start), stored.n_pixels), out.dtype
                )
                dataset = self.hdf5()[stored.dataset]
                if out.dtype == np.bool_:
                    _convert(dataset[slab_start : slab_start + len(slab)], slab)
                else:
                    dataset.read_direct(slab, np.s_[slab_start : slab_start + len(slab)])
                held = self._slabs[key] = (slab_start, slab)
            out[row - start : end - start] = held[1][row - slab_start : end - slab_start]
            row = end


def _convert(source: np.ndarray, target: np.ndarray) -> None:
    if target.dtype == np.bool_:
        np.not_equal(source, 0, out=target)
    else:
        np.copyto(target, source, casting="unsafe")
