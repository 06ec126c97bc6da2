"""Flux and error to log g on the device: one call, arrays that are there already, or blocks streamed from the host.

Design: three kernels read what the plans of `moefast.kernels.scoring` hold: `row_statistics` (each spectrum once, and
with the median of flux/error for those who ask for it), `project_columns` (flux again, with a bit for each good pixel)
and `mix_rows` (a few dozen numbers per star). Between the last two, `moefast.kernels.cuda.tangent` weighs the clouds of
a library, if there is one. Spectra whose pixels do not come in eights, or are more than `row_statistics` holds, go
through `project_rows` and `median_rows` instead of the first two: flux and error are read twice.
`CudaScorer` keeps the plans on the device and streams blocks through slots, each with a stream, pinned host buffers and
their device twins, and a thread of the host that fills it, starts it, and takes the answers:

    slot 0   fill              | copy in | kernels | out |  fill              | copy in | …
    slot 1       fill              | copy in | kernels | out |  fill              | copy in | …
    slot 2           fill              | copy in | kernels | out |  fill   …

Whoever reads a file enters a slot (`BlockScorer.slot`) and reads straight into its buffers; arrays that lie elsewhere
are copied there.

Floor, from host memory: 32 kB a spectrum, 0.6 µs over a bus of 55 GB/s. One core that reads a cached file to pinned
memory and copies it on moves 6.7 GB/s, 4 cores 19, 8 cores 28, 12 cores 35 and 16 cores 36 (one H200, 2026-11-29), so
that a dozen must read at a time; one that copies arrays by itself moved 6.3. Kernels take 0.13 µs, the median included:
it may stay where it is. Results lie in one piece, so that one copy, and not one for each of them, keeps the interpreter
from starting the next block.

A slot belongs to one block at a time; callers may be threads. All of them enter the device that was current when the
scorer was made. Memory is plain device memory and pinned host memory,
never managed memory. The block is what a fraction of the free memory holds in all slots; if memory is short all the
same, it is halved down to FLOOR_ROWS rows; below that it is an error.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from numba import cuda
from numpy.typing import NDArray

from moefast.core.errors import BackendError
from moefast.core.threads import CORES
from moefast.kernels.cuda.columns import project_columns
from moefast.kernels.cuda.device import (
    DeviceMemoryError,
    PinnedMemoryError,
    current_device,
    out_of_memory,
    pinned_array,
    pinned_shortage,
    require_device,
)
from moefast.kernels.cuda.median import THREADS, median_rows
from moefast.kernels.cuda.mix import LANES, mix_rows, shared_bytes
from moefast.kernels.cuda.project import COLUMNS, LINES, PANEL, ROWS, project_rows
from moefast.kernels.cuda.project import THREADS as PROJECT_THREADS
from moefast.kernels.cuda.statistics import EACH, MOST_PIXELS, row_statistics
from moefast.kernels.cuda.statistics import THREADS as STATISTICS_THREADS
from moefast.kernels.cuda.tangent import Clouds, DeviceLibrary
from moefast.kernels.scoring import Mixing, Projection
from moefast.kernels.tangent import Library

__all__ = [
    "BLOCK_ROWS",
    "FLOOR_ROWS",
    "FREE_SHARE",
    "SLOTS",
    "BlockPlan",
    "BlockScorer",
    "CudaScorer",
    "DevicePlan",
    "Scores",
    "Slot",
    "StepPlan",
    "Work",
    "blocks_of_a_call",
    "launch",
    "results_on_device",
    "score",
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
MOST_SHARED = 48 * 1024
"""Dynamic shared memory that every device gives a block."""
_NO_MASK = np.zeros(0, np.bool_)
_NOTHING_GIVEN = np.zeros((1, 1, 1), np.float32)


class Scores(NamedTuple):
    """What scoring gives, one row per spectrum.

    `log_g`, `log_g_err`, `log_g_err_raw`, `chi2` (n,), `weights` and `expert_log_g` (n, K) are those of
    `moefast.kernels.Mixed`; `log_level`, `snr_norm`, `snr_median`, `n_good` (int32) and `flag` (uint32) (n,) those of
    `moefast.kernels.Projected`. All but the last two are float32.
    """

    log_g: NDArray
    log_g_err: NDArray
    log_g_err_raw: NDArray
    weights: NDArray
    expert_log_g: NDArray
    chi2: NDArray
    log_level: NDArray
    snr_norm: NDArray
    snr_median: NDArray
    n_good: NDArray
    flag: NDArray


def _kinds(rows: int, n_experts: int) -> list[tuple[tuple[int, ...], type]]:
    """Shape and dtype of each array of `Scores`."""
    vector, matrix = ((rows,), np.float32), ((rows, n_experts), np.float32)
    return [vector, vector, vector, matrix, matrix, *[vector] * 4, ((rows,), np.int32), ((rows,), np.uint32)]


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


class DevicePlan:
    """A projection, a mixing and maybe a library on the device, laid out as the kernels read them.

    Raises
    ------
    ValueError
        They do not fit each other, or the mixing needs more shared memory than a block has.
    """

    def __init__(
        self,
        projection: Projection,
        mixing: Mixing,
        library: Library | None = None,
        from_library: Sequence[bool] = (),
    ) -> None:
        p, c = projection.matrix.shape
        k, m, columns = mixing.expert_weights.shape
        shapes = (columns, mixing.line_offsets.size, k * m)
        found = (c, projection.lines.shape[1], projection.cell_matrix.shape[1])
        if found != shapes:
            raise ValueError(
                f"columns, line columns and squares {shapes} expected by the mixing; found {found}"
            )
        features = 2 * mixing.line_widths.size + 1 + mixing.n_leading + 1
        self.shared = shared_bytes(features, k, max(mixing.gate[1].size, mixing.error_model[1].size))
        if self.shared > MOST_SHARED:
            raise ValueError(
                f"a mixing of {k} experts, {features} features and its hidden layers needs {self.shared} bytes of "
                f"shared memory; a block has {MOST_SHARED}: use backend cpu"
            )
        self.n_pixels, self.n_columns, self.n_lines, self.n_experts = p, c, projection.lines.shape[1], k
        self.n_cells, self.cell, self.clipped = p // projection.cell, projection.cell, projection.clipped
        # A cell is then what a thread of `row_statistics` reads at a time.
        self.read_once = p % EACH == 0 and p <= MOST_PIXELS
        self.bytes_of_marks = p // EACH if self.read_once else 0
        panels = -(-p // PANEL)
        self.tiles = max(1, -(-c // COLUMNS), -(-self.n_lines // LINES))
        matrix = np.zeros((panels * PANEL, self.tiles * COLUMNS), np.float32)
        matrix[:p, :c] = projection.matrix
        pixels = np.zeros((3, panels * PANEL), np.float32)
        pixels[:, :p] = projection.reference, projection.inverse_shape, projection.residual
        used = np.zeros(panels * PANEL, bool)
        used[:p] = (projection.lines != 0).any(1)
        side_by_side = EACH if self.read_once else PANEL
        self.pixels = cuda.to_device(
            np.ascontiguousarray(pixels.reshape(3, -1, side_by_side).transpose(1, 0, 2)).reshape(-1)
        )
        self.reference = cuda.to_device(pixels[0])
        self.projection = tuple(
            cuda.to_device(np.ascontiguousarray(a))
            for a in (
                matrix.reshape(-1, self.tiles, COLUMNS).transpose(1, 0, 2).reshape(-1),
                projection.windows.reshape(self.n_lines, p),
                projection.starts.astype(np.int64),
                projection.stops.astype(np.int64),
                used.reshape(panels, PANEL).any(1),
            )
        )
        # The kernel leaves sums over cells, not means.
        self.cell_matrix = cuda.to_device(
            np.ascontiguousarray(projection.cell_matrix.T / np.float32(projection.cell))
        )
        arrays = [
            a.reshape(m * k, c) if isinstance(a, np.ndarray) and a.ndim == 3 else a for a in mixing.arrays
        ]
        self.mixing = tuple(cuda.to_device(a) if isinstance(a, np.ndarray) else a for a in arrays)
        self.no_mask = cuda.to_device(_NO_MASK)
        self.library, taken = None, np.zeros(0, np.bool_)
        self.least_level = float(mixing.knots[0])
        if library is not None:
            r = library.keys.shape[1]
            taken = np.array(from_library, np.bool_) if len(from_library) else np.ones(k, np.bool_)
            if library.n_experts != k or r > mixing.n_basis or taken.size != k:
                raise ValueError(
                    f"a library of {k} experts in at most {mixing.n_basis} components and a mark for each expert "
                    f"expected; found {library.n_experts} in {r}, and {taken.size} marks"
                )
            self.library = DeviceLibrary(library)
        self.taken, self.nothing_given = cuda.to_device(taken), cuda.to_device(_NOTHING_GIVEN)

    results: Callable[..., Any] = Scores

    def kinds(self, rows: int) -> list[tuple[tuple[int, ...], type]]:
        """See `BlockPlan`."""
        return _kinds(rows, self.n_experts)

    def bytes_per_row(self) -> int:
        """See `BlockPlan`."""
        return Work.bytes_per_row(self)

    def work(self, rows: int) -> Work:
        """See `BlockPlan`."""
        return Work(rows, self)

    def launch(self, flux: Any, error: Any, mask: Any, n: int, work: Work, stream: Any) -> Any:
        """See `BlockPlan`."""
        return launch(self, flux, error, mask, n, work, stream)


class Work:
    """Device memory of up to `rows` spectra between the kernels, and the results."""

    def __init__(self, rows: int, plan: DevicePlan) -> None:
        self.columns = cuda.device_array((rows, plan.n_columns), np.float32)
        self.windows = cuda.device_array((rows, plan.n_lines), np.float32)
        self.flat_cells = cuda.device_array(rows * plan.n_cells, np.float32)
        self.cells = self.flat_cells.reshape(rows, plan.n_cells)
        self.marks = cuda.device_array(rows * plan.bytes_of_marks, np.uint8)
        self.energy = cuda.device_array(rows, np.float32)
        self.expected = cuda.device_array(rows, np.float32)
        self.memory_of_scores, self.scores = results_on_device(plan, rows)
        self.clouds = None if plan.library is None else Clouds(rows, plan.library)

    @staticmethod
    def bytes_per_row(plan: DevicePlan) -> int:
        """Device memory of a row, flux, error and mask included."""
        of_clouds = 0 if plan.library is None else Clouds.bytes_per_row(plan.library)
        numbers = (
            2 * plan.n_pixels + plan.n_columns + plan.n_lines + plan.n_cells + 2 + 9 + 2 * plan.n_experts
        )
        return 4 * numbers + plan.n_pixels + plan.bytes_of_marks + of_clouds


def launch(
    plan: DevicePlan,
    flux: Any,
    error: Any,
    mask: Any,
    n: int,
    work: Work,
    stream: Any,
    *,
    median: bool = True,
) -> Any:
    """Score n > 0 spectra that are on the device, in `stream`, without waiting; nothing is checked.

    Parameters
    ----------
    plan : DevicePlan
    flux, error : device array of shape (n · p,) or longer, float32
    mask : device array of shape (n · p,) or longer, bool, or None
    n : int
    work : Work
        For n rows at least.
    stream : Numba stream
    median : bool
        Make `snr_median`.

    Returns
    -------
    Scores
        Device arrays, cut to n rows.
    """
    hidden = plan.no_mask if mask is None else mask
    of_project = (work.columns, work.windows, work.cells, work.energy, work.expected)
    scores = work.scores
    # A slice of a device array keeps the interpreter busy: none for whole blocks.
    if n < len(work.energy):
        scores, of_project = Scores(*(a[:n] for a in scores)), tuple(a[:n] for a in of_project)
    columns, windows, cells, energy, expected = of_project
    tiles = -(-n // ROWS), plan.tiles
    if plan.read_once:
        row_statistics[n, STATISTICS_THREADS, stream](
            flux, error, hidden, plan.clipped, plan.pixels, plan.n_pixels, median, work.flat_cells, work.marks,
            scores.log_level, energy, expected, scores.snr_norm, scores.snr_median, scores.n_good, scores.flag,
        )  # fmt: skip
        project_columns[tiles, PROJECT_THREADS, stream](
            flux, work.marks, plan.clipped, plan.reference, *plan.projection, plan.n_pixels, columns, windows
        )
    else:
        project_rows[tiles, PROJECT_THREADS, stream](
            flux, error, hidden, plan.clipped, plan.pixels, *plan.projection, plan.n_pixels, plan.cell,
            columns, windows, cells, scores.log_level, energy, expected, scores.snr_norm, scores.n_good, scores.flag,
        )  # fmt: skip
    given = plan.nothing_given
    if plan.library is not None and work.clouds is not None:
        # The first columns are the components in which the noise is white.
        given = work.clouds.launch(plan.library, columns, scores.log_level, n, stream, least=plan.least_level)
    mix_rows[n, LANES, stream, plan.shared](
        columns, windows, cells, scores.log_level, energy, expected, plan.cell_matrix, *plan.mixing,
        given, plan.taken,
        scores.log_g, scores.log_g_err, scores.log_g_err_raw, scores.weights, scores.expert_log_g, scores.chi2,
    )  # fmt: skip
    if median and not plan.read_once:
        median_rows[n, THREADS, stream](flux, error, hidden, plan.n_pixels, scores.snr_median)
    return scores


def score(
    flux: F32,
    error: F32,
    mask: NDArray[np.bool_] | None,
    projection: Projection,
    mixing: Mixing,
    library: Library | None = None,
    from_library: Sequence[bool] = (),
) -> Scores:
    """Log g and all that belongs to it of spectra on the host: `project` and `soft_mix` of the CPU in one.

    Blocks in a loop are better given to one `CudaScorer`, which keeps the plans on the device.

    Parameters
    ----------
    flux, error : array of shape (n, p), float32
    mask : array of shape (n, p), bool, or None
        True where a pixel is bad whatever it holds.
    projection, mixing, library, from_library
        See `CudaScorer`.

    Raises
    ------
    ValueError
        Shapes that do not fit.
    BackendError
        There is no usable device, or its memory is too small.
    """
    blocks = blocks_of_a_call(len(flux), BLOCK_ROWS, SLOTS)
    return CudaScorer(projection, mixing, library, from_library, **blocks)(flux, error, mask)


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


class CudaScorer(BlockScorer):
    """Scores spectra on the device, block by block; several threads may call it.

    Parameters
    ----------
    projection : Projection
    mixing : Mixing
    library : Library, optional
        Clouds in the first columns of the projection. The log evidence of each expert, less that of the best, is added
        to the gate's logits.
    from_library : sequence of bool
        Experts whose log g and noise are the posterior's mean and standard deviation; all of them if it is empty.
        Experts without clouds keep the linear one's, with a weight of zero.
    block_rows : int
        Rows per block at most; fewer if FREE_SHARE of the free device memory does not hold all slots.
    slots : int
        Blocks on their way at most.

    Attributes
    ----------
    block_rows : int
        The rows per block that memory allows.

    Raises
    ------
    ValueError
        The plans do not fit each other.
    BackendError
        There is no usable device.
    DeviceMemoryError, PinnedMemoryError
        Memory of the device, or pinned memory of the host, is too small for blocks of FLOOR_ROWS rows in all slots.

    Examples
    --------
    >>> scorer = CudaScorer(mixture.projection, mixture.mixing)     # doctest: +SKIP
    >>> for flux, error in blocks:                                  # doctest: +SKIP
    ...     scores = scorer(flux, error)
    """

    def __init__(
        self,
        projection: Projection,
        mixing: Mixing,
        library: Library | None = None,
        from_library: Sequence[bool] = (),
        *,
        block_rows: int = BLOCK_ROWS,
        slots: int = SLOTS,
    ) -> None:
        super().__init__(lambda: DevicePlan(projection, mixing, library, from_library), block_rows, slots)

    def __call__(
        self,
        flux: F32,
        error: F32,
        mask: NDArray[np.bool_] | None = None,
        slot: Slot | None = None,
    ) -> Scores:
        """Score spectra on the host; any n, any layout.

        Parameters
        ----------
        flux, error : array of shape (n, p), float32
        mask : array of shape (n, p), bool, or None
            True where a pixel is bad whatever it holds.
        slot : Slot, optional
            One that the caller has entered (see `BlockScorer.slot`); any that is free if absent.

        Raises
        ------
        ValueError
            Shapes that do not fit.
        """
        return cast(Scores, self._scored(flux, error, mask, slot))


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
