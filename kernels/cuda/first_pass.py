"""The first pass of a fit on the device: flux and errors of the host to the totals of one fit, or of two.

Design: only what was read crosses the bus, flux, σ, labels and row numbers, 32 kB a row of 4096 pixels. All else is
made on the device: bins by label or by SNR, groups, noise by counter, clipping, centring, σ², sorting and products; and
rows that two fits see (with noise in closed form, and clipped draws of it) cross it once.

Pieces of PIECE_ROWS rows are copied to pinned slots by a thread each, and from there to their place in a stage, a block
of rows on the device. A full stage is worked on by one thread after the other stage, while pieces fill that one:

    slot 0    fill | copy |  fill | copy |                pieces, by several threads
    slot 1       fill | copy |  fill | copy |
    stage 0   · · · · · · · | bins, sort | prepare | multiply, multiply again |
    stage 1                   · · · · · · · · · · · · · · · | bins, sort |     | prepare | multiply …

Places are given in the order of rows, and stages are multiplied in their order: the result depends on the rows and
their order alone. A stage is larger than a piece because every product ends with a pass over the float64 totals of its
group: for 27 groups of 4096 pixels 7 GB a stage, 2 ms, whatever the number of its rows.

Floor: 0.6 µs a row on a bus of 55 GB/s, and 0.55 µs for each fit at 30 TFLOP/s. Memory is plain device memory and
pinned host memory. If it is short, stages are halved down to FLOOR_ROWS rows; below that it is an error.
"""

from __future__ import annotations

import queue
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numba import cuda
from numpy.typing import NDArray

from moefast.core.errors import BackendError
from moefast.core.grids import Grid, SnrGrid
from moefast.core.random import DRAW_STREAM
from moefast.core.threads import CORES
from moefast.kernels.cuda import binning, draws
from moefast.kernels.cuda.accumulator import GroupTotals, Totals, fitting_rows, shortage
from moefast.kernels.cuda.device import PinnedMemoryError, current_device, pinned_array, require_device
from moefast.kernels.cuda.products import choose

__all__ = ["PIECE_ROWS", "SLOTS", "STAGE_ROWS", "FirstPass", "RowsSeen"]

F32 = NDArray[np.float32]

STAGE_ROWS = 16384
"""Rows of a stage: 0.54 GB of flux and error for 4096 pixels, in each of two."""
PIECE_ROWS = 2048
"""Most rows of a piece: 67 MB, 1.2 ms on the bus."""
SLOTS = max(2, min(8, CORES))
"""Pieces on their way, and threads that fill them: one core fills pinned memory at a tenth of the rate of the bus."""
STAGES = 2
_SMALL = {"y": np.float64, "t_eff": np.float64, "m_h": np.float64, "fold": np.int64, "row": np.int64}
"""Numbers of a row beside its pixels."""


class RowsSeen(NamedTuple):
    """What a fit sees of rows: with a draw of noise or without, and with flux below `floor` as this."""

    drawn: bool
    floor: float = -np.inf


class FirstPass:
    """Totals on the device, to which rows as they are read are added.

    Parameters
    ----------
    reference : array of shape (p,)
        Fixed spectrum subtracted from every row.
    grid : Grid or SnrGrid
        Bins of the fit.
    n_folds : int
    seen : RowsSeen
        What the fit sees.
    other : RowsSeen, optional
        What another fit sees of the same rows, all in one group, without their σ².
    seed : int
        Of the draws: row r gets the noise that `moefast.core.random.add_noise` gives it.
    noise_inside : bool
        Whether flux holds its noise, which SNRs would otherwise add.
    method : "auto", "numba" or "cublas"
        See `moefast.kernels.cuda.products`.
    stage_rows, piece_rows, slots : int
        At most.

    Attributes
    ----------
    choice : Choice
    stage_rows : int
        The rows per stage that memory allows.

    Raises
    ------
    BackendError
        There is no usable device or the method cannot be used.
    DeviceMemoryError, PinnedMemoryError
        Memory of the device, or pinned memory of the host, is too small.
    """

    def __init__(
        self,
        reference: NDArray,
        grid: Grid | SnrGrid,
        n_folds: int,
        seen: RowsSeen,
        other: RowsSeen | None = None,
        *,
        seed: int = 0,
        noise_inside: bool = False,
        method: str = "auto",
        stage_rows: int = STAGE_ROWS,
        piece_rows: int = PIECE_ROWS,
        slots: int = SLOTS,
    ) -> None:
        if n_folds < 1 or min(stage_rows, piece_rows, slots) < 1 or not 0 <= seed < 2**64:
            raise ValueError(
                "n_folds, stage_rows, piece_rows and slots of at least 1 and a seed in 0 … 2⁶⁴ − 1 expected; found "
                f"{n_folds}, {stage_rows}, {piece_rows}, {slots} and {seed}"
            )
        require_device()
        self._device = current_device()
        self.n_pixels, self.n_folds, self.n_groups = len(reference), n_folds, grid.n_bins * n_folds
        self.seen, self.other = seen, other
        self._seed, self._added = np.uint64(seed), 0.0 if noise_inside else 1.0
        self.choice = choose(method, self.n_pixels)
        self._reference = cuda.to_device(np.ascontiguousarray(reference, np.float32))
        self._edges: Any = (
            binning.inner_edges(grid.t_eff_edges, grid.m_h_edges)
            if isinstance(grid, Grid)
            else cuda.to_device(np.array(grid.edges, np.float64))
        )
        self._by_label = isinstance(grid, Grid)
        self._piece_rows, self._n_slots = piece_rows, slots
        self._totals: Any = None
        self.stage_rows = fitting_rows(self._allocate, self._release, stage_rows, self._shortage)
        # As in `moefast.kernels.cuda.blocks`: what was copied is there before other streams read it.
        cuda.synchronize()
        self._compute = cuda.stream()
        self._turn = 0
        self._fillers = ThreadPoolExecutor(slots, thread_name_prefix="moefast-slot")
        # One thread: stages are multiplied in their order.
        self._launcher = ThreadPoolExecutor(1, thread_name_prefix="moefast-stage")

    # -- memory ------------------------------------------------------------------------------------------------

    def _allocate(self, rows: int) -> None:
        p, g = self.n_pixels, self.n_groups
        piece = min(self._piece_rows, rows)
        self._totals = GroupTotals(rows, p, g, self.choice)
        self._stages = [_Stage(rows, p, g) for _ in range(STAGES)]
        self._slots = [_Slot(piece, p) for _ in range(self._n_slots)]
        self._free: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        for slot in self._slots:
            self._free.put(slot)
        self._bad = cuda.to_device(np.zeros(1, np.int32))
        self._nothing = cuda.device_array((1, p), np.float32)
        if self.other is not None:
            self._others = GroupTotals(rows, p, 1, self.choice)
            self._drawn = cuda.device_array((rows, p), np.float32)
            self._in_order = cuda.to_device(np.arange(rows))
            self._all_rows = cuda.device_array(2, np.int64)

    def _release(self) -> None:
        self._totals = self._stages = self._slots = self._free = None  # type: ignore[assignment]
        self._others = self._drawn = None  # type: ignore[assignment]

    def _shortage(self, error: Exception, rows: int) -> BackendError:
        g, p = self.n_groups + (self.other is not None), self.n_pixels
        pinned = 8 * p * self._n_slots * min(self._piece_rows, rows)
        blocks = 4 * p * rows * (2 * STAGES + (self.other is not None))
        return shortage(
            error, GroupTotals.nbytes(p, g), pinned if isinstance(error, PinnedMemoryError) else blocks,
            f"{STAGES} blocks of {rows} rows", f"{g} groups of {p}",
        )  # fmt: skip

    # -- rows in -----------------------------------------------------------------------------------------------

    def add(
        self, flux: F32, error: F32, y: NDArray, t_eff: NDArray, m_h: NDArray, folds: NDArray, rows: NDArray
    ) -> None:
        """Add rows; the arrays must stay as they are until `fetch`, or until others have been let go.

        Parameters
        ----------
        flux, error : array of shape (n, p), float32
            Flux and its σ, which is 0 in bad pixels; any n, any layout.
        y, t_eff, m_h : array of shape (n,)
            log g, and the labels of bins.
        folds : array of shape (n,), integer in 0 … n_folds−1
        rows : array of shape (n,), integer ≥ 0
            Number of each row in its set.

        Raises
        ------
        ValueError
            Shapes that do not fit, labels that are not finite, or folds out of range; nothing has been added then.
        """
        n = len(flux)
        small = dict(zip(_SMALL, (y, t_eff, m_h, folds, rows), strict=True))
        if (
            flux.shape != (n, self.n_pixels)
            or error.shape != flux.shape
            or any(a.shape != (n,) for a in small.values())
        ):
            raise ValueError(
                f"flux and error (n, {self.n_pixels}) and five numbers of each row expected; found {flux.shape}, "
                f"{error.shape}, {[a.shape for a in small.values()]}"
            )
        if n and not (0 <= folds.min() <= folds.max() < self.n_folds and rows.min() >= 0):
            raise ValueError(
                f"folds in 0…{self.n_folds - 1} and rows from 0 on expected; found folds {folds.min()} … {folds.max()}"
            )
        if not all(np.isfinite(a).all() for a in (y, t_eff, m_h)):
            raise ValueError("a row with a label that is not finite cannot be added")
        done = 0
        while done < n:
            stage = self._stages[self._turn]
            if stage.rows == 0:
                # What was in it before is multiplied.
                with self._device:
                    stage.wait()
            count = min(n - done, self.stage_rows - stage.rows, self._slots[0].rows)
            here, place = slice(done, done + count), stage.rows
            slot = self._free.get()
            arrays = {"flux": flux[here], "error": error[here]} | {k: a[here] for k, a in small.items()}
            stage.pieces.append(self._fillers.submit(self._load, slot, stage, place, arrays))
            stage.rows += count
            done += count
            if stage.rows == self.stage_rows:
                self._close()

    def _load(self, slot: _Slot, stage: _Stage, place: int, arrays: dict[str, NDArray]) -> None:
        """Bring a piece to its place in a stage; returns when it is there."""
        try:
            # A thread's own device is the first one unless it says otherwise.
            with self._device:
                slot.load(stage, place, arrays)
        finally:
            self._free.put(slot)

    def _close(self) -> None:
        """Let the stage be worked on, and go on with the other."""
        stage = self._stages[self._turn]
        pieces, count = stage.pieces, stage.rows
        stage.pieces, stage.rows = [], 0
        stage.task = self._launcher.submit(self._work, stage, pieces, count)
        self._turn = (self._turn + 1) % STAGES

    def _work(self, stage: _Stage, pieces: list[Future[None]], count: int) -> None:
        """Start all that is done to a stage's rows, and wait for bins and sorting alone."""
        for piece in pieces:
            piece.result()
        with self._device:
            arrays = {name: array[:count] for name, array in stage.arrays.items()}
            group, order = arrays["group"], arrays["order"]
            if self._by_label:
                binning.groups_by_labels(
                    arrays["t_eff"], arrays["m_h"], self._edges, arrays["fold"], self.n_folds, arrays["bin"], group,
                    stage.stream,
                )  # fmt: skip
            else:
                draws.row_snr[count, draws.THREADS, stage.stream](
                    arrays["flux"], arrays["error"], self._added, arrays["snr"]
                )
                binning.groups_by_snr(
                    arrays["snr"],
                    self._edges,
                    arrays["fold"],
                    self.n_folds,
                    arrays["bin"],
                    group,
                    stage.stream,
                )
            binning.sort_on_device(group, self.n_groups, stage.counts, stage.offsets, order, stage.stream)
            stage.offsets.copy_to_host(stage.bounds, stream=stage.stream)
            stage.stream.synchronize()
            self._multiply(arrays, stage, count)
            stage.done.record(self._compute)

    def _multiply(self, arrays: dict[str, Any], stage: _Stage, count: int) -> None:
        """Noise, clipping, centring and products of sorted rows, started in the stream of all stages."""
        stream, other = self._compute, self.other
        drawn = self._nothing if other is None else self._drawn[:count]
        theirs = RowsSeen(False) if other is None else other
        # In place: nobody needs flux any longer.
        x = arrays["flux"]
        draws.prepare_rows[count, draws.THREADS, stream](
            x, arrays["error"], arrays["row"], self._reference, self._seed, np.uint32(DRAW_STREAM), self.seen.drawn,
            theirs.drawn, np.float32(self.seen.floor), np.float32(theirs.floor), x, drawn, other is not None, self._bad,
        )  # fmt: skip
        self._totals.add(
            x, arrays["y"], arrays["order"], stage.offsets, stage.bounds.copy(), stream, arrays["error"]
        )
        if other is not None:
            bounds = np.array([0, count])
            self._all_rows.copy_to_device(bounds, stream=stream)
            self._others.add(drawn, arrays["y"], self._in_order[:count], self._all_rows, bounds, stream)

    # -- totals out --------------------------------------------------------------------------------------------

    def fetch(self, other: bool = False) -> Totals:
        """Wait for the rows added so far and copy their totals, or those of the other fit, to the host.

        More rows may be added later.

        Raises
        ------
        ValueError
            A row was not finite or absurdly large; the totals hold it.
        """
        if self._stages[self._turn].rows:
            self._close()
        with self._device:
            for stage in self._stages:
                stage.wait()
            self._compute.synchronize()
            if self._bad.copy_to_host()[0]:
                raise ValueError("a row with NaN, infinite or absurdly large flux or error cannot be added")
            return (self._others if other else self._totals).fetch()


class _Stage:
    """A block of rows on the device, and what is made of it."""

    def __init__(self, rows: int, p: int, g: int) -> None:
        kinds: dict[str, tuple[Any, Any]] = {name: (rows, kind) for name, kind in _SMALL.items()}
        kinds |= {"flux": ((rows, p), np.float32), "error": ((rows, p), np.float32)}
        kinds |= {"snr": (rows, np.float64), "bin": (rows, np.int16)}
        kinds |= {"group": (rows, np.int64), "order": (rows, np.int64)}
        self.arrays = {name: cuda.device_array(*kind) for name, kind in kinds.items()}
        self.counts = cuda.device_array(binning.table_size(rows, g), np.int64)
        self.offsets = cuda.device_array(g + 1, np.int64)
        self.bounds = pinned_array(g + 1, np.int64)
        self.stream, self.done = cuda.stream(), cuda.event()
        self.rows = 0
        self.pieces: list[Future[None]] = []
        self.task: Future[None] | None = None

    def wait(self) -> None:
        """Until its rows are multiplied; an error of what was done to them is raised here."""
        if self.task is not None:
            self.task.result()
            self.done.synchronize()


class _Slot:
    """One of the places that pieces pass through: pinned buffers and a stream."""

    def __init__(self, rows: int, p: int) -> None:
        self.rows = rows
        kinds: dict[str, tuple[Any, Any]] = {name: (rows, kind) for name, kind in _SMALL.items()}
        kinds |= {"flux": ((rows, p), np.float32), "error": ((rows, p), np.float32)}
        self.host = {name: pinned_array(*kind) for name, kind in kinds.items()}
        self.stream = cuda.stream()

    def load(self, stage: _Stage, place: int, arrays: dict[str, NDArray]) -> None:
        """Copy rows to the pinned buffers and from there to a stage; returns when they are there."""
        try:
            for name, values in arrays.items():
                n = len(values)
                self.host[name][:n] = values
                stage.arrays[name][place : place + n].copy_to_device(self.host[name][:n], stream=self.stream)
        finally:
            # What was started before a failure still reads the buffers.
            self.stream.synchronize()
