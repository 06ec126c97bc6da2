"""Races between simulated CUDA threads: what two threads do to one place of memory without a barrier between them.

Design: the simulator runs one block after the other, and threads in turns, from barrier to barrier, so that a missing
barrier may change no result. Here every access to shared and to device memory is written down with the block, the
thread and the number of barriers before it. Two accesses to one place, one of them a write, that no barrier of a block
orders are an error, whatever their order was this time. So are threads that stand at different barriers, or that end
while others stand at one, and indices below zero. Shared memory begins as NaN in each block, as nothing says what it
holds. Two threads of a block that write the same value are no error.

In the simulator a warp has one thread: what a device orders by shuffles, the simulator orders by barriers. Streams are
not watched: there every launch and every copy is done when it is started.
"""

from __future__ import annotations

import collections
import math
import sys
from pathlib import Path

import numpy as np
from numba.core import types
from numba.cuda.simulator import kernel, kernelapi
from numba.np.numpy_support import as_dtype
from simulated_threads import TurnThread, current_thread

__all__ = ["RaceError", "find_races"]

GRAIN = 4
"""Bytes that are one place, where numbers are not smaller."""
SEVERAL = "several"
SIMULATOR = str(Path(kernel.__file__).parent)
"""Folder of the simulator's own files, which are no part of a kernel."""


class RaceError(AssertionError):
    """Two threads use one place of memory, or wait at barriers, in no order."""


class Place:
    """Who used a place of memory: in the block and between the barriers that did so last, and blocks before."""

    __slots__ = ("block", "epoch", "last_value", "readers", "reading_block", "writer", "writing_block")

    def __init__(self) -> None:
        self.block = self.epoch = self.writer = self.reading_block = self.writing_block = None
        self.readers: set[int] = set()


class Watched:
    """An array whose numbers are read and written under the eyes of a `Log`; parts of it are watched, too."""

    def __init__(self, array: np.ndarray, places: dict[int, Place], log: Log) -> None:
        self.array, self.places, self.log = array, places, log
        self.begin = array.__array_interface__["data"][0]
        self.shape, self.size, self.ndim, self.strides = array.shape, array.size, array.ndim, array.strides
        self.itemsize = array.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        value = self.array[index]
        if isinstance(value, np.ndarray) and value.ndim:
            return Watched(value, self.places, self.log)
        self.log.access(self, index, None)
        return value

    def __setitem__(self, index, value):  # type: ignore[no-untyped-def]
        self.array[index] = value
        self.log.access(self, index, self.array[index])


class Log:
    """Accesses of a launch."""

    def __init__(self) -> None:
        self.shared: dict[int, Place] = {}
        self.device: dict[int, Place] = {}
        self.n_accesses = 0
        self.begin_block()

    def begin_block(self) -> None:
        """Shared memory is that of another block."""
        self.shared.clear()
        self.epochs: collections.Counter[int] = collections.Counter()
        self.barriers: list[tuple[tuple[str, int], ...]] = []

    def reach_barrier(self, thread: TurnThread) -> None:
        """Note where a thread waits: where all others that have come so far do."""
        frame, where = sys._getframe(2), []
        while frame is not None:
            if not frame.f_code.co_filename.startswith(SIMULATOR):
                where.append((frame.f_code.co_name, frame.f_lineno))
            frame = frame.f_back
        epoch, here = self.epochs[thread.thread_id], tuple(where)
        if epoch == len(self.barriers):
            self.barriers.append(here)
        if self.barriers[epoch] != here:
            raise RaceError(f"threads stand at different barriers: {here} and {self.barriers[epoch]}")
        self.epochs[thread.thread_id] = epoch + 1

    def end_block(self, n_threads: int) -> None:
        """All threads have passed as many barriers."""
        passed = {self.epochs[thread] for thread in range(n_threads)}
        if len(passed) > 1:
            raise RaceError(
                f"threads of a block stand at different barriers, or have ended: {passed} were passed"
            )

    def access(self, array: Watched, index, written) -> None:  # type: ignore[no-untyped-def]
        indices = index if isinstance(index, tuple) else (index,)
        if len(indices) != array.ndim or min(indices) < 0:
            raise RaceError(f"one number of an array of shape {array.shape} expected; found index {indices}")
        thread = current_thread()
        block, number = tuple(thread.blockIdx), thread.thread_id
        epoch = self.epochs[number]
        first = array.begin + sum(int(i) * stride for i, stride in zip(indices, array.strides, strict=True))
        self.n_accesses += 1
        for address in range(first, first + array.itemsize, GRAIN):
            place = array.places.get(address)
            if place is None:
                place = array.places[address] = Place()
            if (place.block, place.epoch) != (block, epoch):
                place.block, place.epoch, place.writer, place.readers = block, epoch, None, set()
            others = place.readers - {number} if written is not None else set()
            by_another = place.writer not in (None, number)
            if by_another and written is not None:
                by_another = not np.array_equal(place.last_value, written, equal_nan=True)
            in_another_block = place.writing_block not in (None, block) or (
                written is not None and place.reading_block not in (None, block)
            )
            if others or by_another or in_another_block:
                what = "write" if written is not None else "read"
                raise RaceError(
                    f"{what} of {indices} in an array of shape {array.shape} by thread {number} of block {block} after "
                    f"{epoch} barriers: written by thread {place.writer}, read by {sorted(place.readers)} without a "
                    f"barrier between; blocks that wrote and read it before: {place.writing_block}, "
                    f"{place.reading_block}"
                )
            if written is None:
                place.readers.add(number)
                place.reading_block = block if place.reading_block in (None, block) else SEVERAL
            else:
                place.writer, place.writing_block, place.last_value = number, block, written


def find_races(monkeypatch) -> Log:  # type: ignore[no-untyped-def]
    """Look for races in all kernels launched from now on; `n_accesses` of the log is how often memory was used."""
    log = Log()
    run, syncthreads = kernel.BlockManager.run, TurnThread.syncthreads

    def run_block(self, point, *arguments):  # type: ignore[no-untyped-def]
        log.begin_block()
        module = kernel._get_kernel_context()
        for array in [*module.shared._allocations.values(), module.shared._dynshared]:
            array.view(np.uint8)[...] = 0xFF
        run(self, point, *arguments)
        log.end_block(math.prod(self._block_dim))

    def wait_for_all(self):  # type: ignore[no-untyped-def]
        log.reach_barrier(self)
        syncthreads(self)

    def shared(self, shape, dtype, alignment=None):  # type: ignore[no-untyped-def]
        dtype = as_dtype(dtype) if isinstance(dtype, types.Type) else np.dtype(dtype)
        if shape == 0:
            count = self._dynshared_size // dtype.itemsize
            return Watched(self._dynshared[: count * dtype.itemsize].view(dtype), log.shared, log)
        caller = sys._getframe(1)
        place = caller.f_code.co_filename, caller.f_lineno
        if place not in self._allocations:
            self._allocations[place] = np.empty(shape, dtype)
            self._allocations[place].view(np.uint8)[...] = 0xFF
        return Watched(self._allocations[place], log.shared, log)

    def of_device(item):  # type: ignore[no-untyped-def]
        return Watched(item._ary, log.device, log)

    def add(self, array, index, value):  # type: ignore[no-untyped-def]
        # Atomic: in some order, whatever it is.
        before = array.array[index]
        array.array[index] += value
        return before

    plain = kernel.FakeCUDAKernel.__call__

    def call(self, *arguments):  # type: ignore[no-untyped-def]
        if not (self._device or kernel._kernel_context):
            log.device.clear()
        return plain(self, *arguments)

    monkeypatch.setattr(kernel.FakeCUDAKernel, "__call__", call)
    monkeypatch.setattr(kernel.BlockManager, "run", run_block)
    monkeypatch.setattr(TurnThread, "syncthreads", wait_for_all)
    monkeypatch.setattr(kernel, "FakeWithinKernelCUDAArray", of_device)
    monkeypatch.setattr(kernelapi.FakeCUDAShared, "array", shared)
    monkeypatch.setattr(kernelapi.FakeCUDAAtomic, "add", add)
    return log
