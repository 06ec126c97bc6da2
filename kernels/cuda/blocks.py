"""Blocks of spectra streamed through the device: slots that copy in, score and copy out side by side.

Design: a plan holds what kernels read, on the device, and launches them; `BlockScorer` streams blocks through slots,
each with a stream, pinned host buffers and their device twins, and a thread of the host that fills it, starts it, and
takes the answers:

    slot 0   fill              | copy in | kernels | out |  fill              | copy in | …
    slot 1       fill              | copy in | kernels | out |  fill              | copy in | …
    slot 2           fill              | copy in | kernels | out |  fill   …

Whoever reads a file enters a slot (`BlockScorer.slot`) and reads straight into its buffers; arrays that lie elsewhere
are copied there.

Floor, from host memory: 32 kB a spectrum, 0.6 µs over a bus of 55 GB/s. One core that reads a cached file to pinned
memory and copies it on moves 6.7 GB/s, 4 cores 19, 8 cores 28, 12 cores 35 and 16 cores 36 (one H200, 2026-11-29), so
that a dozen must read at a time; one that copies arrays by itself moved 6.3. Results lie in one piece, so that one
copy, and not one for each of them, keeps the interpreter from starting the next block.

A slot belongs to one block at a time; callers may be threads. All of them enter the device that was current when the
scorer was made. Memory is plain device memory and pinned host memory, never managed memory. The block is what a
fraction of the free memory holds in all slots; if memory is short all the same, it is halved down to FLOOR_ROWS rows;
below that it is an error.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
from numba import cuda
from numpy.typing import NDArray

from moefast.core.errors import BackendError
from moefast.core.threads import CORES
from moefast.kernels.cuda.device import (
    DeviceMemoryError,
    PinnedMemoryError,
    current_device,
    out_of_memory,
    pinned_array,
    pinned_shortage,
    require_device,
)

__all__ = [
    "BLOCK_ROWS",
    "FLOOR_ROWS",
    "FREE_SHARE",
    "SLOTS",
    "BlockPlan",
    "BlockScorer",
    "Slot",
    "StepPlan",
    "blocks_of_a_call",
    "results_on_device",
]

F32 = NDArray[np.float32]
BLOCK_ROWS = 2048
"""Most rows of a block: 67 MB of flux and error for 4096 pixels, 1.2 ms on the bus. The interpreter makes the twenty or
more launches and copies of one block after those of another, and must be done with them by then."""
FLOOR_ROWS = 256
"""Smallest block: below it, launches would take longer than copies."""
FREE_SHARE = 0.25
"""Share of the free device memory that all slots may take: others may need the rest."""
SLOTS = max(2, min(16, CORES))
"""Blocks on their way, and threads that fill them: three or four more than fill at a time."""


class BlockPlan(Protocol):
    """What a `BlockScorer` streams blocks through: numbers on the device, and kernels that read them.

    Attributes
    ----------
    n_pixels : int
    results : callable
        Makes one value of all results.
    """

    n_pixels: int
    results: Callable[..., Any]

    def kinds(self, rows: int) -> list[tuple[tuple[int, ...], type]]:
        """Shape and dtype of each result of so many rows."""
        ...

    def bytes_per_row(self) -> int:
        """Device memory of a row, flux, error and mask included."""
        ...

    def work(self, rows: int) -> Any:
        """Device memory between the kernels for so many rows, and `memory_of_scores` of `results_on_device`."""
        ...

    def launch(self, flux: Any, error: Any, mask: Any, n: int, work: Any, stream: Any) -> Any:
        """Score n rows that are on the device, in `stream`, without waiting; device arrays, cut to n rows."""
        ...


class StepPlan:
    """A `BlockPlan` that says what it launches step by step, so that each step can be timed.

    Its `work` holds the device arrays of all results in `scores`.
    """

    results: Callable[..., Any]

    def steps(
        self, flux: Any, error: Any, mask: Any, n: int, work: Any, scores: Any, stream: Any
    ) -> Iterable[tuple[str, Callable[[], None]]]:
        """What is done to n spectra, in its order: a name in words, and what starts it in `stream`; see `launch`."""
        raise NotImplementedError

    def launch(self, flux: Any, error: Any, mask: Any, n: int, work: Any, stream: Any) -> Any:
        """Score n > 0 spectra that are on the device, in `stream`, without waiting; nothing is checked.

        Parameters
        ----------
        flux, error : device array of shape (n · p,) or longer, float32
        mask : device array of shape (n · p,) or longer, bool, or None
        n : int
        work
            What `work` gives for n rows at least.
        stream : Numba stream

        Returns
        -------
        results
            Device arrays, cut to n rows.
        """
        scores = work.scores if n == len(work.scores[0]) else self.results(*(a[:n] for a in work.scores))
        for _, start in self.steps(flux, error, mask, n, work, scores, stream):
            start()
        return scores


def _one_after_the_other(memory: Any, kinds: list[tuple[tuple[int, ...], type]]) -> Iterator[Any]:
    """Arrays in one piece of memory; those of larger numbers come first, so that each begins where it may."""
    start = 0
    for shape, dtype in kinds:
        stop = start + int(np.prod(shape)) * np.dtype(dtype).itemsize
        yield memory[start:stop].view(dtype).reshape(shape)
        start = stop


def results_on_device(plan: BlockPlan, rows: int) -> tuple[Any, Any]:
    """Device memory for the results of so many rows, which one copy brings to the host, and the arrays in it."""
    memory = cuda.device_array(rows * _bytes_of_results(plan), np.uint8)
    return memory, plan.results(*_one_after_the_other(memory, plan.kinds(rows)))


def _bytes_of_results(plan: BlockPlan) -> int:
    return sum(np.dtype(dtype).itemsize * int(np.prod(shape)) for shape, dtype in plan.kinds(1))


def blocks_of_a_call(n: int, block_rows: int, slots: int) -> dict[str, int]:
    """`block_rows` and `slots` of a scorer that is made for one call with n spectra: no more than they fill."""
    rows = min(block_rows, max(n, 1))
    return {"block_rows": rows, "slots": min(slots, -(-max(n, 1) // rows))}


class BlockScorer:
    """Streams blocks of spectra through the kernels of a plan; several threads may call it.

    Parameters
    ----------
    plan : callable
        Makes the `BlockPlan`, when there is known to be a device.
    block_rows, slots : int
        Rows per block, and blocks on their way, at most.

    Attributes
    ----------
    block_rows : int
        The rows per block that memory allows.

    Raises
    ------
    BackendError
        There is no usable device.
    DeviceMemoryError, PinnedMemoryError
        Memory of the device, or pinned memory of the host, is too small for blocks of FLOOR_ROWS rows in all slots.
    """

    def __init__(self, plan: Callable[[], BlockPlan], block_rows: int, slots: int) -> None:
        if block_rows < 1 or slots < 1:
            raise ValueError(f"block_rows and slots must be at least 1; found {block_rows} and {slots}")
        require_device()
        self._device = current_device()
        self.plan = plan()
        floor = min(FLOOR_ROWS, block_rows)
        free = cuda.current_context().get_memory_info().free
        self.slots = slots
        fitting = FREE_SHARE * free / (slots * self.plan.bytes_per_row())
        self.block_rows = max(floor, int(min(block_rows, fitting)))
        places: list[Slot] = []
        while True:
            try:
                places = [Slot(self.block_rows, self.plan) for _ in range(slots)]
                break
            except Exception as error:
                if not out_of_memory(error):
                    raise
                if self.block_rows == floor:
                    raise self._shortage(error) from error
            # Outside the handler, whose traceback keeps the arrays that were allocated alive.
            self.block_rows = max(floor, self.block_rows // 2)
        # The plan is on the device before the stream of a slot reads it: streams wait for the default stream, in which
        # it was copied, only where that is not one of each thread.
        cuda.synchronize()
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for place in places:
            self._free.put(place)
        self._pool = ThreadPoolExecutor(slots, thread_name_prefix="moefast-slot")
        # Launches of different threads take turns.
        self._launching = threading.Lock()

    def _shortage(self, error: Exception) -> BackendError:
        blocks = f"{self.slots} blocks of {self.block_rows} spectra"
        if isinstance(error, PinnedMemoryError):
            pinned = self.slots * self.block_rows * Slot.pinned_bytes_per_row(self.plan)
            return pinned_shortage(pinned, blocks, error)
        needed = self.slots * self.block_rows * self.plan.bytes_per_row()
        free = cuda.current_context().get_memory_info().free
        return DeviceMemoryError(
            f"device memory: {needed / 1e9:.3f} GB for {blocks} are needed, {free / 1e9:.3f} GB are free; end other "
            "programs on the device, or use backend cpu"
        )

    @contextmanager
    def slot(self) -> Iterator[Slot]:
        """A slot that is the caller's until it leaves: spectra that are made in its arrays are not copied there."""
        slot = self._free.get()
        try:
            # A thread's own device is the first one unless it says otherwise.
            with self._device:
                try:
                    yield slot
                finally:
                    # What was started before a failure still reads and writes the buffers.
                    slot.stream.synchronize()
        finally:
            self._free.put(slot)

    def _scored(
        self, flux: NDArray, error: NDArray, mask: NDArray[np.bool_] | None, entered: Slot | None = None
    ) -> Any:
        """Score spectra on the host; any n, any layout. ValueError if shapes do not fit."""
        p = self.plan.n_pixels
        if flux.ndim != 2 or flux.shape[1] != p or error.shape != flux.shape:
            raise ValueError(f"flux and error must have shape (n, {p}); found {flux.shape} and {error.shape}")
        if mask is not None and (mask.shape != flux.shape or mask.dtype != np.bool_):
            raise ValueError(f"mask must be bool of shape {flux.shape}, found {mask.dtype} {mask.shape}")
        n = len(flux)
        out = self.plan.results(*(np.empty(*kind) for kind in self.plan.kinds(n)))

        def through(slot: Slot, start: int) -> None:
            here = slice(start, min(start + self.block_rows, n))
            slot.fill(flux[here], error[here], None if mask is None else mask[here])
            with self._launching:
                slot.start()
            slot.collect(out, here)

        def one(start: int) -> None:
            # Each block takes one slot and waits for nothing else: callers cannot wait for each other forever.
            with self.slot() as slot:
                through(slot, start)

        starts = range(0, n, self.block_rows)
        if entered is not None:
            for start in starts:
                through(entered, start)
        elif len(starts) > 1:
            tasks = [self._pool.submit(one, start) for start in starts]
            # After a failure, too: none may read the caller's arrays any longer.
            wait(tasks)
            for task in tasks:
                task.result()
        else:
            for start in starts:
                one(start)
        return out


class Slot:
    """One of the places that blocks pass through: pinned buffers, device buffers and a stream."""

    def __init__(self, rows: int, plan: BlockPlan) -> None:
        self.plan, self.rows, p = plan, rows, plan.n_pixels
        kinds = {"flux": np.float32, "error": np.float32, "mask": np.bool_}
        self.device = {name: cuda.device_array(rows * p, dtype) for name, dtype in kinds.items()}
        self.work = plan.work(rows)
        self.host = {name: pinned_array((rows, p), dtype) for name, dtype in kinds.items()}
        self.memory_of_results = pinned_array((rows, _bytes_of_results(plan)), np.uint8).reshape(-1)
        self.results = plan.results(*_one_after_the_other(self.memory_of_results, plan.kinds(rows)))
        self.stream = cuda.stream()
        self.n, self.masked = 0, False

    @staticmethod
    def pinned_bytes_per_row(plan: BlockPlan) -> int:
        """Pinned host memory of a row: flux, error, mask and results."""
        return 9 * plan.n_pixels + _bytes_of_results(plan)

    def array(self, name: str, shape: tuple[int, int]) -> NDArray:
        """The pinned flux, error or mask of the first rows."""
        return self.host[name][: shape[0]]

    def fill(self, flux: F32, error: F32, mask: NDArray[np.bool_] | None) -> None:
        """Copy a block to the pinned buffers, as far as it does not lie there."""
        self.n, self.masked = len(flux), mask is not None
        for name, rows in (("flux", flux), ("error", error), ("mask", mask)):
            if rows is not None and not _lies_in(rows, there := self.array(name, rows.shape)):
                there[:] = rows

    def start(self) -> None:
        """Start copy, kernels and the copy back of what `fill` left, without waiting."""
        count = self.n * self.plan.n_pixels
        for name in ("flux", "error", *(["mask"] if self.masked else [])):
            there, rows = self.device[name], self.host[name].reshape(-1)
            # A slice of a device array keeps the interpreter busy: none for whole blocks.
            if self.n < self.rows:
                there, rows = there[:count], rows[:count]
            there.copy_to_device(rows, stream=self.stream)
        hidden = self.device["mask"] if self.masked else None
        self.plan.launch(self.device["flux"], self.device["error"], hidden, self.n, self.work, self.stream)
        self.work.memory_of_scores.copy_to_host(self.memory_of_results, stream=self.stream)

    def collect(self, out: Any, here: slice) -> None:
        """Wait for the block and copy its results to its rows of `out`."""
        self.stream.synchronize()
        for target, found in zip(out, self.results, strict=True):
            target[here] = found[: self.n]


def _lies_in(rows: NDArray, there: NDArray) -> bool:
    """Whether two arrays of the same shape are the same memory, read in the same way."""
    place = rows.__array_interface__["data"][0] == there.__array_interface__["data"][0]
    return place and rows.dtype == there.dtype and rows.strides == there.strides
