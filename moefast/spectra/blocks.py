"""What blocks are read with: memory that is used again, columns in long pieces, a thread that reads ahead."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import InputError
from moefast.core.threads import CORES
from moefast.spectra.shard import TABLE_ROWS, Shard
from moefast.spectra.source import Block

__all__ = ["BlockMemory", "Memory", "ParamsReader", "plain_memory", "read_ahead"]

_FREE_MEMORY = max(12, 4 * CORES)
"""Arrays kept to be used again: each of the threads that read and work has two or three."""


def plain_memory(size: int) -> NDArray[np.uint8]:
    """So many bytes of memory as the system gives it."""
    return np.empty(size, np.uint8)


class Memory(Protocol):
    """Where blocks are read to."""

    def array(self, name: str, shape: tuple[int, int]) -> np.ndarray:
        """Uninitialised C-contiguous array for flux, error or mask: float32, of the mask bool."""
        ...


class BlockMemory:
    """Memory for blocks, used again once no array refers to it; for several threads.

    Fresh memory costs a page fault per page, several times what it costs to read a file that the system has
    in its cache. The memory under an array goes back when the last view of it is gone, never earlier.

    Parameters
    ----------
    allocate : callable
        Number of bytes -> array of as many uint8.
    """

    def __init__(self, allocate: Callable[[int], NDArray[np.uint8]] = plain_memory) -> None:
        self._allocate = allocate
        self.free: list[memoryview] = []
        # An array may end, and its memory come back, anywhere in the thread that takes another one.
        self._lock = threading.RLock()

    def array(self, name: str, shape: tuple[int, int]) -> np.ndarray:
        """See `Memory`."""
        dtype = np.bool_ if name == "mask" else np.float32
        size = shape[0] * shape[1] * np.dtype(dtype).itemsize
        memory = self._taken(size)
        if memory is None:
            raw = self._allocate(size + 64)
            memory = raw[-raw.ctypes.data % 64 :].data
        # Views of an array on a memoryview keep that array as their base, so its end is the end of them all.
        owner = np.frombuffer(memory, np.uint8)
        weakref.finalize(owner, self._give_back, memory).atexit = False
        return owner[:size].view(dtype).reshape(shape)

    def _taken(self, size: int) -> memoryview | None:
        with self._lock:
            # What came back last may still lie in a cache.
            for place in reversed(range(len(self.free))):
                if size <= self.free[place].nbytes < 2 * size + 8192:
                    return self.free.pop(place)
        return None

    def _give_back(self, memory: memoryview) -> None:
        with self._lock:
            if len(self.free) < _FREE_MEMORY:
                self.free.append(memory)


class ParamsReader:
    """Columns of the params tables, read in longer pieces than blocks are: a call of HDF5 takes as long as a block."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.shard: Shard | None = None
        self.first = self.stop = 0
        self.held: dict[str, np.ndarray] = {}

    def rows(self, shard: Shard, start: int, stop: int) -> dict[str, np.ndarray]:
        """The columns in rows of a shard; later calls never ask for earlier rows."""
        if not self.names:
            return {}
        if shard is not self.shard or not self.first <= start <= stop <= self.stop:
            self.shard = None
            self.first, self.stop = start, min(max(stop, start + TABLE_ROWS), shard.n_rows)
            try:
                self.held = shard.params(self.names, self.first, self.stop)
            except InputError:
                # Damage further on must not cost the rows before it.
                self.stop = stop
                self.held = shard.params(self.names, start, stop)
            self.shard = shard
        here = slice(start - self.first, stop - self.first)
        return {name: values[here] for name, values in self.held.items()}


def read_ahead(source: Iterator[Block]) -> Iterator[Block]:
    """Pass blocks on from a thread that reads ahead of the consumer."""
    blocks: queue.Queue[tuple[Block | None, BaseException | None]] = queue.Queue(maxsize=1)
    stopped = threading.Event()

    def work() -> None:
        failure: BaseException | None = None
        try:
            for block in source:
                blocks.put((block, None))
                del block
                if stopped.is_set():
                    break
        except BaseException as error:
            failure = error
        finally:
            source.close()  # type: ignore[attr-defined]
            blocks.put((None, failure))

    thread = threading.Thread(target=work, name="moefast-reader", daemon=True)
    thread.start()
    try:
        while True:
            block, failure = blocks.get()
            if failure is not None:
                raise failure
            if block is None:
                return
            yield block
            # The consumer is done with it; keeping the name would keep a third block in memory.
            del block
    finally:
        stopped.set()
        while thread.is_alive():
            try:
                blocks.get(timeout=0.02)
            except queue.Empty:
                continue
        thread.join()
