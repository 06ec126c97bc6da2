"""Bins of rows and rows grouped by bin, on the device; contract `moefast.kernels.reference_binning`.

Design: a stable counting sort in three launches, without atomics, so that its result depends on the input alone. Each
thread owns a chunk of consecutive rows and one column of the table of counts: stability follows from the order of the
columns.

                    chunk 0  chunk 1  chunk 2            chunk 0  chunk 1  chunk 2
    count   bin 0      2        0        1      scan        0        2        2
            bin 1      1        3        0     ----->       3        4        7      (row by row)
            bin 2      0        1        2                  7        7        8

then each thread walks its chunk again and puts row r at the place that its cell names, and moves the cell on by one.
Bins are 8 bytes beside a spectrum of 16 kB: reading them uncoalesced costs nothing that could be measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import cuda, int64
from numpy.typing import ArrayLike, NDArray

from moefast.kernels import binning as twin
from moefast.kernels.cuda.device import require_device
from moefast.kernels.cuda.registry import kernel

__all__ = [
    "assign_bins",
    "assign_snr_bins",
    "groups_by_labels",
    "groups_by_snr",
    "inner_edges",
    "sort_by_bin",
    "sort_on_device",
    "table_size",
]

THREADS = 128
"""Threads per block of all kernels here but the scan."""
SCAN_THREADS = 256
"""Threads of the one block that scans the counts."""
CHUNK_ROWS = 64
"""Fewest rows that one thread sorts."""
LARGEST_TABLE = 1 << 22
"""Most cells of the table of counts; with many bins, chunks grow instead."""


def assign_bins(
    teff: ArrayLike, mh: ArrayLike, teff_edges: Sequence[float], mh_edges: Sequence[float]
) -> NDArray[np.int16]:
    """Bin index of each row on a rectangular T_eff × [M/H] grid; see `moefast.kernels.binning.assign_bins`.

    Launch: one thread per row, ⌈n / THREADS⌉ blocks.

    Raises
    ------
    ValueError
        As the CPU twin.
    BackendError
        There is no usable device.
    """
    t_eff, m_h, inner_t, inner_m = twin.check_grid(teff, mh, teff_edges, mh_edges)
    require_device()
    if t_eff.size == 0:
        return np.empty(0, np.int16)
    out = cuda.device_array(t_eff.size, np.int16)
    arrays = [_to_device(values) for values in (t_eff, m_h, inner_t, inner_m)]
    _assign_bins[_blocks(t_eff.size), THREADS](*arrays, inner_t.size, inner_m.size, out)
    return out.copy_to_host()


def assign_snr_bins(snr: ArrayLike, edges: Sequence[float]) -> NDArray[np.int16]:
    """Bin index of each row by its SNR; see `moefast.kernels.binning.assign_snr_bins`.

    Launch: one thread per row, ⌈n / THREADS⌉ blocks.

    Raises
    ------
    ValueError
        As the CPU twin.
    BackendError
        There is no usable device.
    """
    rows, cuts = twin.check_snr(snr, edges)
    require_device()
    if rows.size == 0:
        return np.empty(0, np.int16)
    out = cuda.device_array(rows.size, np.int16)
    _assign_right_closed[_blocks(rows.size), THREADS](_to_device(rows), _to_device(cuts), out)
    return out.copy_to_host()


def sort_by_bin(bins: ArrayLike, n_bins: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Group rows by bin with a stable counting sort; see `moefast.kernels.binning.sort_by_bin`.

    Launch: see `sort_on_device`.

    Raises
    ------
    ValueError
        As the CPU twin.
    BackendError
        There is no usable device.
    """
    rows = twin.check_bins(bins, n_bins)
    require_device()
    if rows.size == 0:
        return np.empty(0, np.int64), np.zeros(n_bins + 1, np.int64)
    order = cuda.device_array(rows.size, np.int64)
    offsets = cuda.device_array(n_bins + 1, np.int64)
    counts = cuda.device_array(table_size(rows.size, n_bins), np.int64)
    sort_on_device(_to_device(rows), n_bins, counts, offsets, order, cuda.default_stream())
    return order.copy_to_host(), offsets.copy_to_host()


def groups_by_labels(
    t_eff: Any,
    m_h: Any,
    edges: tuple[Any, Any, int, int],
    folds: Any,
    n_folds: int,
    bins: Any,
    group: Any,
    stream: Any,
) -> None:
    """Fill `group` with bin · n_folds + fold of each row on the device, in `stream`; nothing is checked.

    Launch: one thread per row, twice.

    Parameters
    ----------
    t_eff, m_h : device array of shape (n,), float64, n ≥ 1
    edges : inner edges of both, as device arrays, and how many they are
        See `inner_edges`.
    folds : device array of shape (n,), int64
    n_folds : int
    bins, group : device array of shape (n,), int16 and int64
    """
    grid = (_blocks(group.size), THREADS, stream)
    _assign_bins[grid](t_eff, m_h, *edges, bins)
    _make_groups[grid](bins, folds, n_folds, group)


def groups_by_snr(snr: Any, edges: Any, folds: Any, n_folds: int, bins: Any, group: Any, stream: Any) -> None:
    """The same by the SNR of each row: `snr` (n,) and `edges`, float64 on the device."""
    grid = (_blocks(group.size), THREADS, stream)
    _assign_right_closed[grid](snr, edges, bins)
    _make_groups[grid](bins, folds, n_folds, group)


def inner_edges(t_eff_edges: Sequence[float], m_h_edges: Sequence[float]) -> tuple[Any, Any, int, int]:
    """What `groups_by_labels` asks for of a grid."""
    inner_t, inner_m = (np.asarray(edges[1:-1], np.float64) for edges in (t_eff_edges, m_h_edges))
    return _to_device(inner_t), _to_device(inner_m), inner_t.size, inner_m.size


def table_size(n_rows: int, n_bins: int) -> int:
    """Cells of the table of counts that `sort_on_device` needs for `n_rows` rows, or for fewer."""
    # Chunks are whole rows, so that somewhat fewer rows can be cut in more of them.
    return n_bins * min(-(-n_rows // CHUNK_ROWS), -(-LARGEST_TABLE // n_bins))


def _chunk_rows(n_rows: int, n_bins: int) -> int:
    return max(CHUNK_ROWS, -(-n_rows * n_bins // LARGEST_TABLE))


def sort_on_device(bins: Any, n_bins: int, counts: Any, offsets: Any, order: Any, stream: Any) -> None:
    """Fill `order` and `offsets` on the device, in `stream`, without waiting; nothing is checked.

    Launch: `_count_bins` and `_scatter_rows` with one thread per chunk of at least CHUNK_ROWS rows; between them
    `_scan_counts`, one block of SCAN_THREADS threads.

    Parameters
    ----------
    bins : device array of shape (n,), int64, n ≥ 1
    n_bins : int
    counts : device array with `table_size(n, n_bins)` cells or more, int64; scratch
    offsets : device array of shape (n_bins + 1,), int64
    order : device array of shape (n,), int64
    """
    rows = _chunk_rows(bins.size, n_bins)
    chunks = -(-bins.size // rows)
    grid = (_blocks(chunks), THREADS, stream)
    _count_bins[grid](bins, rows, chunks, n_bins, counts)
    _scan_counts[1, SCAN_THREADS, stream](chunks, n_bins, counts, offsets)
    _scatter_rows[grid](bins, rows, chunks, counts, order)


def _blocks(threads: int) -> int:
    return -(-threads // THREADS)


def _to_device(values: NDArray) -> Any:
    # One cell at least: a device array of no bytes has no address.
    return cuda.to_device(np.ascontiguousarray(values) if values.size else np.zeros(1, values.dtype))


# Only inner edges are compared: that alone clamps outside rows and includes the last edge.
@kernel(
    "void(float64[::1], float64[::1], float64[::1], float64[::1], int64, int64, int16[::1])",
    threads=THREADS,
    serves=("assign_bins", "normal_equations"),
)
def _assign_bins(t_eff, m_h, inner_t, inner_m, n_t, n_m, out):  # type: ignore[no-untyped-def]
    row = cuda.grid(1)
    if row < t_eff.size:
        i = 0
        for j in range(n_t):
            if t_eff[row] >= inner_t[j]:
                i += 1
        k = 0
        for j in range(n_m):
            if m_h[row] >= inner_m[j]:
                k += 1
        out[row] = i * (n_m + 1) + k


@kernel(
    "void(float64[::1], float64[::1], int16[::1])",
    threads=THREADS,
    serves=("assign_snr_bins", "normal_equations"),
)
def _assign_right_closed(snr, cuts, out):  # type: ignore[no-untyped-def]
    row = cuda.grid(1)
    if row < snr.size:
        k = 0
        for j in range(cuts.size):
            if snr[row] > cuts[j]:
                k += 1
        out[row] = k


@kernel(
    "void(int16[::1], int64[::1], int64, int64[::1])",
    threads=THREADS,
    serves=("normal_equations",),
)
def _make_groups(bins, folds, n_folds, group):  # type: ignore[no-untyped-def]
    row = cuda.grid(1)
    if row < group.size:
        group[row] = bins[row] * n_folds + folds[row]


@kernel(
    "void(int64[::1], int64, int64, int64, int64[::1])",
    threads=THREADS,
    serves=("sort_by_bin", "normal_equations"),
)
def _count_bins(bins, rows, chunks, n_bins, counts):  # type: ignore[no-untyped-def]
    """Count the rows of each bin in each chunk: counts[bin · chunks + chunk]."""
    chunk = cuda.grid(1)
    if chunk < chunks:
        for k in range(n_bins):
            counts[k * chunks + chunk] = 0
        for row in range(chunk * rows, min((chunk + 1) * rows, bins.size)):
            counts[bins[row] * chunks + chunk] += 1


@kernel(
    "void(int64, int64, int64[::1], int64[::1])",
    threads=SCAN_THREADS,
    serves=("sort_by_bin", "normal_equations"),
)
def _scan_counts(chunks, n_bins, counts, offsets):  # type: ignore[no-untyped-def]
    """Exclusive scan of the table, in place; the first cell of each bin is the bin's offset.

    Each thread adds up a slice, the slices' sums are scanned in shared memory, and each thread scans its slice.
    """
    sums = cuda.shared.array(SCAN_THREADS, int64)
    cells = chunks * n_bins
    thread = cuda.threadIdx.x
    width = (cells + SCAN_THREADS - 1) // SCAN_THREADS
    start = min(cells, thread * width)
    stop = min(cells, start + width)
    total = int64(0)
    for cell in range(start, stop):
        total += counts[cell]
    sums[thread] = total
    cuda.syncthreads()
    step = 1
    while step < SCAN_THREADS:
        before = int64(0)
        if thread >= step:
            before = sums[thread - step]
        cuda.syncthreads()
        sums[thread] += before
        cuda.syncthreads()
        step *= 2
    running = sums[thread] - total
    for cell in range(start, stop):
        here = counts[cell]
        counts[cell] = running
        running += here
    cuda.syncthreads()
    for k in range(thread, n_bins, SCAN_THREADS):
        offsets[k] = counts[k * chunks]
    if thread == 0:
        offsets[n_bins] = sums[SCAN_THREADS - 1]


@kernel(
    "void(int64[::1], int64, int64, int64[::1], int64[::1])",
    threads=THREADS,
    serves=("sort_by_bin", "normal_equations"),
)
def _scatter_rows(bins, rows, chunks, counts, order):  # type: ignore[no-untyped-def]
    """Put the rows of each chunk, in their order, where the scanned counts say."""
    chunk = cuda.grid(1)
    if chunk < chunks:
        for row in range(chunk * rows, min((chunk + 1) * rows, bins.size)):
            cell = bins[row] * chunks + chunk
            order[counts[cell]] = row
            counts[cell] += 1
