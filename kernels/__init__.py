"""Arrays in, arrays out: the numerical kernels of moefast.

Design: a public function checks its arguments, allocates what it returns and calls one compiled kernel. The float64
contract of each is in `moefast.kernels.reference`. Nothing here knows files, models or the command line.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moefast.kernels import cpu
from moefast.kernels.binning import assign_bins, assign_snr_bins, sort_by_bin
from moefast.kernels.dispatch import on_cuda
from moefast.kernels.likelihood import gaussian_log_likelihood
from moefast.kernels.scoring import (
    PROJECT_ROWS,
    Mixed,
    Mixing,
    Projected,
    Projection,
    cell_size,
    project,
    soft_mix,
)
from moefast.kernels.template import TemplatePosterior, template_posterior

__all__ = [
    "PROJECT_ROWS",
    "Mixed",
    "Mixing",
    "Projected",
    "Projection",
    "TemplatePosterior",
    "add_rows",
    "assign_bins",
    "assign_snr_bins",
    "cell_size",
    "gaussian_log_likelihood",
    "normal_equations",
    "packed_size",
    "project",
    "soft_mix",
    "sort_by_bin",
    "template_posterior",
    "unpack_symmetric",
]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


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
        square[i:, i] = row
        start += p - i
    return square


def normal_equations(
    x: F32,
    y: F64,
    group: NDArray[np.integer],
    n_groups: int,
    *,
    out: tuple[NDArray[np.int64], F64, F64, F64, F64, F64] | None = None,
    square: F32 | None = None,
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
    square : array of shape (p, p), float32, optional
        Scratch of the CPU, so that a caller with many blocks does not allocate it anew.
    backend : "cpu" or "cuda"
    method : "auto", "numba", "tensor" or "cublas"
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
    p = x.shape[1]
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
    if square is None:
        square = np.empty((p, p), np.float32)
    cpu.add_normal_equations(np.ascontiguousarray(x, np.float32), y, order, offsets, out[:5], out[5], square)
    return out


def add_rows(values: F32, group: NDArray[np.integer], totals: F64) -> None:
    """Add Σ values of each group to `totals`, row by row in their order.

    Sums of many calls are those of one call, to the last bit.

    Parameters
    ----------
    values : array of shape (n, p), float32
    group : array of shape (n,), integer in 0 … n_groups−1
    totals : array of shape (n_groups, p), float64
        Changed in place.

    Raises
    ------
    ValueError
        Shapes that do not fit, or a group outside its range.
    """
    if values.ndim != 2 or group.shape != (len(values),) or totals.shape[1:] != values.shape[1:]:
        raise ValueError(
            f"values (n, p), group (n,), totals (g, p) expected; found {values.shape}, {group.shape}, {totals.shape}"
        )
    if len(group) and not 0 <= group.min() <= group.max() < len(totals):
        raise ValueError(f"groups must lie in 0 … {len(totals) - 1}; found {group.min()} … {group.max()}")
    cpu.add_rows(np.ascontiguousarray(values, np.float32), np.ascontiguousarray(group, np.int64), totals)
