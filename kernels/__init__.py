"""Arrays in, arrays out: the numerical kernels of moefast.

Design: a public function checks its arguments, allocates what it returns and calls one compiled kernel. The float64
contract of each is in `moefast.kernels.reference`. Nothing here knows files, models or the command line.
"""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from moefast.kernels import cpu
from moefast.kernels.binning import assign_bins, assign_snr_bins, sort_by_bin
from moefast.kernels.dispatch import on_cuda
from moefast.kernels.likelihood import gaussian_log_likelihood

__all__ = [
    "PROJECT_ROWS",
    "Projected",
    "Projection",
    "add_rows",
    "assign_bins",
    "assign_snr_bins",
    "gaussian_log_likelihood",
    "normal_equations",
    "packed_size",
    "perceptron",
    "project",
    "soft_mix",
    "sort_by_bin",
    "unpack_symmetric",
]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
PROJECT_ROWS = cpu.PROJECT_ROWS

_BLAS = ThreadpoolController()
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


@dataclass(frozen=True)
class Projection:
    """Everything that is linear in flux, or in variance, as two matrices.

    Attributes
    ----------
    reference : array of shape (p,), float32
        Subtracted from the flux first.
    noise_shape : array of shape (p,), float32
        D, the mean noise variance per pixel; a star's noise level s is s² = mean(σ²/D) over good pixels.
    matrix : array of shape (p, c), float32
        Columns that multiply the centred flux.
    variance_matrix : array of shape (p, v), float32
        Columns that multiply σ² (squared weights).
    captured : array of shape (p,), float32
        Σ_r T_jr² of the PCA basis T: the share of pixel j's noise that the basis takes up, in units of 1/D.
    """

    reference: F32
    noise_shape: F32
    matrix: F32
    variance_matrix: F32
    captured: F32
    inverse_shape: F32 = field(init=False)
    residual: F32 = field(init=False)

    def __post_init__(self) -> None:
        p = self.reference.shape[0]
        for name in ("noise_shape", "captured"):
            if getattr(self, name).shape != (p,):
                raise ValueError(f"{name} must have shape ({p},), found {getattr(self, name).shape}")
        for name in ("matrix", "variance_matrix"):
            if getattr(self, name).ndim != 2 or getattr(self, name).shape[0] != p:
                raise ValueError(f"{name} must have {p} rows, found {getattr(self, name).shape}")
        for name in ("reference", "noise_shape", "matrix", "variance_matrix", "captured"):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), np.float32))
        if not (self.noise_shape > 0).all():
            raise ValueError("noise_shape must be positive in every pixel")
        inverse = np.float32(1) / self.noise_shape
        object.__setattr__(self, "inverse_shape", inverse)
        object.__setattr__(self, "residual", inverse - self.captured)


@dataclass(frozen=True)
class Projected:
    """What `project` returns, one row per spectrum, float32.

    `values` (n, c) and `variances` (n, v) are the two products; `log_level` (n,) is ln s; `energy` (n,) is Σx²/D;
    `expected` (n,) is the expectation of `energy` minus the energy inside the basis, for a spectrum that is the
    basis plus noise.
    """

    values: F32
    variances: F32
    log_level: F32
    energy: F32
    expected: F32


def project(
    flux: F32, error: F32, good: NDArray[np.bool_] | None, plan: Projection, *, first_row: int = 0
) -> Projected:
    """One read of flux and error: (flux − reference) W, σ² W₂, noise level and residual energy.

    Bad pixels have zero weight. The numbers of a row depend, to the last bit, on that row and on its index modulo
    `PROJECT_ROWS` (BLAS rounds differently at the edges of its tiles), never on its neighbours or on the block.

    Parameters
    ----------
    flux, error : array of shape (n, p), float32
    good : array of shape (n, p), bool, or None
        None says that every pixel is good.
    plan : Projection
    first_row : int
        Index of the first row in its file.

    Raises
    ------
    ValueError
        Shapes that do not fit.
    """
    p = plan.reference.shape[0]
    if flux.ndim != 2 or flux.shape[1] != p or error.shape != flux.shape:
        raise ValueError(f"flux and error must have shape (n, {p}); found {flux.shape} and {error.shape}")
    if good is not None and good.shape != flux.shape:
        raise ValueError(f"good must have shape {flux.shape}, found {good.shape}")
    flux, error = np.ascontiguousarray(flux, np.float32), np.ascontiguousarray(error, np.float32)
    n, rows = len(flux), PROJECT_ROWS
    out = Projected(
        np.empty((n, plan.matrix.shape[1]), np.float32),
        np.empty((n, plan.variance_matrix.shape[1]), np.float32),
        np.empty(n, np.float32),
        np.empty(n, np.float32),
        np.empty(n, np.float32),
    )
    # Blocks end at multiples of PROJECT_ROWS in the file, so that a row is always at the same place in its product.
    cuts = [0, *range(rows - first_row % rows, n, rows), n] if n else [0]
    blocks = [slice(a, b) for a, b in itertools.pairwise(cuts)]

    def run(part: list[slice]) -> None:
        scratch = [
            np.empty((rows, width), np.float32)
            for width in (p, p, *out.values.shape[1:], *out.variances.shape[1:])
        ]
        for here in part:
            _project_block(flux, error, good, plan, here, (first_row + here.start) % rows, out, scratch)

    workers = min(_CORES, len(blocks))
    with _BLAS.limit(limits=1, user_api="blas"):
        if workers > 1:
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(run, [blocks[w::workers] for w in range(workers)]))
        else:
            run(blocks)
    return out


def _project_block(
    flux: F32,
    error: F32,
    good: NDArray[np.bool_] | None,
    plan: Projection,
    here: slice,
    top: int,
    out: Projected,
    scratch: list[F32],
) -> None:
    """Project the rows `here`, placed at row `top` of products of PROJECT_ROWS rows."""
    x, v, values, variances = scratch
    there = slice(top, top + here.stop - here.start)
    vectors = (plan.reference, plan.inverse_shape, plan.residual)
    scalars = (out.log_level[here], out.energy[here], out.expected[here])
    cpu.centre(flux[here], error[here], *vectors, x[there], v[there], *scalars)
    if good is not None:
        bad = np.flatnonzero(~good[here].all(1))
        if bad.size:
            cpu.mend_rows(bad, good[here], flux[here], error[here], *vectors, x[there], v[there], *scalars)
    for block in (x, v):
        block[: there.start] = 0
        block[there.stop :] = 0
    np.matmul(x, plan.matrix, out=values)
    np.matmul(v, plan.variance_matrix, out=variances)
    out.values[here] = values[there]
    out.variances[here] = variances[there]


def perceptron(features: F32, w1: F32, b1: F32, w2: F32, b2: F32) -> F32:
    """tanh(f W₁ + b₁) W₂ + b₂, row by row: a row's bits do not depend on how many rows there are.

    Parameters
    ----------
    features : array of shape (n, f), float32
    w1, b1, w2, b2 : arrays of shapes (f, h), (h,), (h, k), (k,), float32

    Returns
    -------
    array of shape (n, k), float32

    Raises
    ------
    ValueError
        Shapes that do not fit.
    """
    _check_layers(features, w1, b1, w2, b2)
    out = np.empty((len(features), w2.shape[1]), np.float32)
    cpu.perceptron(features, w1, b1, w2, b2, out)
    return out


def _check_layers(features: F32, w1: F32, b1: F32, w2: F32, b2: F32) -> None:
    shapes = (features.shape[1:], w1.shape, b1.shape, w2.shape, b2.shape)
    f, h, k = w1.shape[0], w1.shape[1], w2.shape[1]
    if shapes != ((f,), (f, h), (h,), (h, k), (k,)):
        raise ValueError(f"features (n, f), w1 (f, h), b1 (h,), w2 (h, k), b2 (k,) expected; found {shapes}")


def soft_mix(features: F32, values: F32, w1: F32, b1: F32, w2: F32, b2: F32) -> tuple[F32, F32]:
    """Gate weights softmax(tanh(f W₁ + b₁) W₂ + b₂) and the mixture of expert values they give.

    Parameters
    ----------
    features : array of shape (n, f), float32
    values : array of shape (n, k), float32
    w1, b1, w2, b2 : arrays of shapes (f, h), (h,), (h, k), (k,), float32

    Returns
    -------
    gate : array of shape (n, k), float32; rows sum to 1
    mixed : array of shape (n,), float32

    Raises
    ------
    ValueError
        Shapes that do not fit.
    """
    _check_layers(features, w1, b1, w2, b2)
    if values.shape != (len(features), w2.shape[1]):
        raise ValueError(f"values must have shape ({len(features)}, {w2.shape[1]}), found {values.shape}")
    gate = np.empty(values.shape, np.float32)
    mixed = np.empty(len(values), np.float32)
    cpu.soft_mix(features, values, w1, b1, w2, b2, gate, mixed)
    return gate, mixed
