"""Normal equations on the CPU: rows gathered by group, Σxxᵀ tile by tile, all other sums on the way.

Design: Σxxᵀ is float32 BLAS over a bounded number of rows, added to packed float64 totals; a tile per core at a time,
so that no bit depends on the number of cores. Functions here check and allocate; the loops are in
`moefast.kernels.cpu`, the contract in `moefast.kernels.reference`.
"""

from __future__ import annotations

import itertools
from collections import deque

import numpy as np
from numpy.typing import NDArray

from moefast.core.threads import CORES, in_threads, one_blas_thread
from moefast.kernels import cpu
from moefast.kernels.binning import sort_by_bin
from moefast.kernels.dispatch import on_cuda

__all__ = [
    "GRAM_ROWS",
    "add_gram",
    "all_within",
    "collect_rows",
    "normal_equations",
    "packed_size",
    "unpack_symmetric",
]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
GRAM_ROWS = cpu.GRAM_ROWS
MIRRORED = 128
"""Side of the blocks in which a triangle is mirrored."""


def packed_size(p: int) -> int:
    """Length of the packed upper triangle of a symmetric (p, p) matrix."""
    return p * (p + 1) // 2


def unpack_symmetric(packed: F64, p: int) -> F64:
    """The symmetric matrix of shape (p, p) whose upper triangle is stored row by row in `packed`."""
    if packed.shape != (packed_size(p),):
        raise ValueError(
            f"packed triangle of a ({p}, {p}) matrix has {packed_size(p)} numbers, found {packed.shape}"
        )
    square = np.empty((p, p))
    start = 0
    for i in range(p):
        row = packed[start : start + p - i]
        square[i, i:] = row
        start += p - i
    # Mirrored block by block: column by column, each number would come from a cache line of its own.
    for i in range(0, p, MIRRORED):
        for j in range(0, i + MIRRORED, MIRRORED):
            block = square[j : j + MIRRORED, i : i + MIRRORED]
            if j < i:
                square[i : i + MIRRORED, j : j + MIRRORED] = block.T
            else:
                lower = np.tril_indices(len(block), -1)
                block[lower] = block.T[lower]
    return square


def normal_equations(
    x: F32,
    y: F64,
    group: NDArray[np.integer],
    n_groups: int,
    *,
    out: tuple[NDArray[np.int64], F64, F64, F64, F64, F64] | None = None,
    backend: str = "cpu",
    method: str = "auto",
) -> tuple[NDArray[np.int64], F64, F64, F64, F64, F64]:
    """Sufficient statistics of linear regression, per group of rows.

    n, Σx, Σy, Σy², Σxy and Σxxᵀ (upper triangle, packed row by row), added to `out` where given.

    Parameters
    ----------
    x : array of shape (n, p), float32
        Rows, with a fixed reference subtracted: float32 products of numbers near 1 lose what matters.
    y : array of shape (n,), float64
    group : array of shape (n,), integer in 0 … n_groups−1
    n_groups : int
    out : tuple of arrays, optional
        Totals to add to: shapes (g,), (g, p), (g,), (g,), (g, p), (g, p(p+1)/2).
    backend : "cpu" or "cuda"
    method : "auto", "numba" or "cublas"
        How the GPU multiplies; see `moefast.kernels.cuda.products`. Blocks in a loop are better streamed through a
        `moefast.kernels.cuda.NormalEquationsAccumulator`, whose totals stay on the device.

    Returns
    -------
    tuple of arrays
        `out`, float64 but for n (int64).

    Raises
    ------
    ValueError
        Shapes that do not fit, or a group outside its range.
    BackendError
        The backend is unknown, or there is no usable CUDA device.
    """
    if backend != "cpu":
        return on_cuda("normal_equations", backend)(x, y, group, n_groups, out=out, method=method)
    if x.ndim != 2 or y.shape != (len(x),) or group.shape != (len(x),):
        raise ValueError(f"x (n, p), y (n,), group (n,) expected; found {x.shape}, {y.shape}, {group.shape}")
    n, p = x.shape
    if out is None:
        out = (
            np.zeros(n_groups, np.int64),
            np.zeros((n_groups, p)),
            np.zeros(n_groups),
            np.zeros(n_groups),
            np.zeros((n_groups, p)),
            np.zeros((n_groups, packed_size(p))),
        )
    order, offsets = sort_by_bin(group, n_groups)
    place = np.empty(n, np.int64)
    place[order] = np.arange(n)
    rows = np.empty((n, p), np.float32)
    no_noise, no_reference, no_total = np.zeros((0, p), np.float32), np.zeros(p, np.float32), np.zeros((0, p))
    _collect(x, y, no_noise, True, group, place, no_reference, -np.inf, rows, (*out[:5], no_total))
    for k, (a, b) in enumerate(itertools.pairwise(offsets)):
        add_gram(rows[a:b], out[5][k])
    return out


def add_gram(rows: F32, packed: F64, *, scales: F64 | None = None) -> None:
    """Add Σxxᵀ of rows x to the packed upper triangle `packed`.

    Products are float32 over `GRAM_ROWS` rows, one tile of the triangle at a time, and are added up in float64. The
    bits do not depend on the number of cores.

    Parameters
    ----------
    rows : array of shape (n, p), float32
    packed : array of shape (p(p+1)/2,), float64
        Changed in place.
    scales : array of shape (p,), powers of two, optional
        Round products to multiples of s_i s_j 2⁻⁵¹ before they are added; see `moefast.experts.exact_sums`.

    Raises
    ------
    ValueError
        Shapes that do not fit.
    """
    if rows.ndim != 2 or packed.shape != (packed_size(rows.shape[1]),):
        raise ValueError(f"rows (n, p) and packed (p(p+1)/2,) expected; found {rows.shape}, {packed.shape}")
    rows = np.ascontiguousarray(rows, np.float32)
    n, p = rows.shape
    # Adding and subtracting zero rounds nothing.
    scales = np.zeros(p) if scales is None else np.ascontiguousarray(scales, np.float64)
    if scales.shape != (p,):
        raise ValueError(f"{p} scales expected; found {scales.shape}")
    side, corners = min(p, cpu.GRAM_TILE), range(0, p, cpu.GRAM_TILE)
    # Large tiles first, those of the diagonal count half: so all cores end together.
    work_of = {
        (i, j): min(side, p - i) * min(side, p - j) * (1 if i == j else 2)
        for i in corners
        for j in corners
        if i <= j
    }
    tiles = deque(sorted(work_of, key=lambda tile: -work_of[tile]))
    workers = min(CORES, len(tiles))
    scratch = np.empty((workers, side, side), np.float32)

    def work(first: int, stop: int) -> None:
        for product in scratch[first:stop]:
            while True:
                try:
                    i, j = tiles.popleft()
                except IndexError:
                    return
                for start in range(0, n, cpu.GRAM_ROWS):
                    tile = cpu.multiply_tile(rows[start : start + cpu.GRAM_ROWS], i, j, product)
                    cpu.add_tile(tile, i, j, p, packed, scales)

    with one_blas_thread():
        in_threads(workers, work, least=1)


def collect_rows(
    x: F32,
    y: F64,
    group: NDArray[np.integer],
    first: int,
    reference: F32,
    buffers: F32,
    waiting: NDArray[np.int64],
    totals: tuple[NDArray[np.int64], F64, F64, F64, F64, F64],
    *,
    variance: F32 | None = None,
    error: F32 | None = None,
    floor: float = -np.inf,
) -> int:
    """Put rows x − reference into the buffers of their groups until one is full, adding up all but Σxxᵀ on the way.

    Rows are taken in order; sums of many calls are those of one call, to the last bit.

    Parameters
    ----------
    x : array of shape (n, p), float32
    y : array of shape (n,), float64
    group : array of shape (n,), integer in 0 … g−1
    first : int
        Row to begin with.
    reference : array of shape (p,), float32
    buffers : array of shape (g, b, p), float32
        Changed in place.
    waiting : array of shape (g,), int64, below b
        Rows in each buffer; changed in place.
    totals : tuple of arrays
        n, Σx, Σy, Σy², Σxy, Σσ² to add to: shapes (g,), (g, p), (g,), (g,), (g, p), (g, p).
    variance, error : array of shape (n, p), float32, optional
        σ², or σ. No noise if neither is given.
    floor : float
        Flux below it counts as this.

    Returns
    -------
    int
        The row to go on with: n, or less if a buffer is full.

    Raises
    ------
    ValueError
        Shapes that do not fit, a group outside its range, or a buffer that is full already.
    """
    if buffers.dtype != np.float32 or not buffers.flags.c_contiguous:
        raise ValueError(f"buffers: C-contiguous float32 expected, found {buffers.dtype} {buffers.strides}")
    n_groups, capacity, p = buffers.shape
    noise = variance if variance is not None else error
    if x.shape != (len(x), p) or {y.shape, group.shape} != {(len(x),)} or reference.shape != (p,):
        raise ValueError(
            f"x (n, {p}), y (n,), group (n,), reference ({p},) expected; found {x.shape}, {y.shape}, {group.shape}, "
            f"{reference.shape}"
        )
    if noise is not None and (noise.shape != x.shape or not (variance is None or error is None)):
        raise ValueError(f"one of variance and error expected, of shape {x.shape}; found {noise.shape}")
    if len(group) and not 0 <= group.min() <= group.max() < n_groups:
        raise ValueError(f"groups must lie in 0 … {n_groups - 1}; found {group.min()} … {group.max()}")
    if waiting.shape != (n_groups,) or not (waiting < capacity).all():
        raise ValueError(
            f"room in each of {n_groups} buffers of {capacity} rows expected; found {waiting} rows"
        )
    group = np.ascontiguousarray(group, np.int64)
    place = np.empty(len(x), np.int64)
    stop = cpu.find_places(group, first, waiting, capacity, place)
    here = slice(first, stop)
    noise = np.zeros((0, p), np.float32) if noise is None else noise[here]
    rows = buffers.reshape(-1, p)
    _collect(x[here], y[here], noise, error is None, group[here], place[here], reference, floor, rows, totals)
    return stop


def _collect(
    x: F32, y: F64, noise: F32, squared: bool, group: NDArray, place: NDArray[np.int64], reference: F32,
    floor: float, rows: F32, totals: tuple[NDArray[np.int64], F64, F64, F64, F64, F64],
) -> None:  # fmt: skip
    """Fill `rows` and add to the totals, some pixels per thread."""
    n, sum_x, sum_y, sum_yy, sum_xy, sum_v = totals
    np.add.at(n, group, 1)
    np.add.at(sum_y, group, y)
    np.add.at(sum_yy, group, y * y)
    p = x.shape[1]
    x, noise = np.ascontiguousarray(x, np.float32), np.ascontiguousarray(noise, np.float32)
    group, y, lowest = np.ascontiguousarray(group, np.int64), np.asarray(y, np.float64), np.float32(floor)
    in_threads(
        -(-p // cpu.PIXELS),
        lambda a, b: cpu.collect_rows(
            x, y, noise, squared, group, place, reference, lowest, rows, sum_x, sum_xy, sum_v,
            a * cpu.PIXELS, min(p, b * cpu.PIXELS),
        ),
        least=1,
    )  # fmt: skip


def all_within(values: NDArray, low: float, high: float) -> bool:
    """Whether low < value < high for every one of an array of shape (n, p), float32; NaN is not.

    Raises
    ------
    ValueError
        The array has not two axes.
    """
    if values.ndim != 2:
        raise ValueError(f"values (n, p) expected; found {values.shape}")
    values, inside = np.ascontiguousarray(values, np.float32), []
    limits = np.float32(low), np.float32(high)
    in_threads(len(values), lambda a, b: inside.append(cpu.within(values[a:b], *limits)))
    return all(inside)
