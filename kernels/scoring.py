"""From flux and error to log g: one projection, then a mixture of a few dozen numbers per star.

Design: `Projection` and `Mixing` are the fitted numbers in the form in which the kernels want them; `project` reads
every spectrum once, `soft_mix` never looks back at it. Both check and allocate; the loops are in `moefast.kernels.cpu`,
the float64 contract in `moefast.kernels.reference`.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moefast.core.threads import in_threads, one_blas_thread
from moefast.kernels import cpu

__all__ = [
    "LARGEST_CELL",
    "PROJECT_ROWS",
    "Given",
    "Mixed",
    "Mixing",
    "Projected",
    "Projection",
    "cell_size",
    "check_given",
    "perceptron",
    "project",
    "soft_mix",
]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Layers = tuple[F32, F32, F32, F32]
PROJECT_ROWS = cpu.PROJECT_ROWS

LARGEST_CELL = 8
"""Pixels over which σ²/D is averaged at most before the noise of experts is propagated."""
_NO_MASK = np.zeros((0, 0), np.bool_)
_local = threading.local()


def cell_size(n_pixels: int) -> int:
    """Pixels of a cell: the largest divisor of `n_pixels` up to `LARGEST_CELL`."""
    return next(size for size in range(LARGEST_CELL, 0, -1) if n_pixels % size == 0)


@dataclass(frozen=True)
class Projection:
    """Everything that is linear in flux, or in variance.

    Attributes
    ----------
    reference : array of shape (p,), float32
        Subtracted from the flux first.
    noise_shape : array of shape (p,), float32
        D, the mean noise variance per pixel; a star's noise level s is s² = mean(σ²/D) over good pixels.
    matrix : array of shape (p, c), float32
        Columns that multiply the centred flux.
    lines : array of shape (p, l), float32
        Columns that are zero but for short stretches; they multiply the centred flux, too.
    cell_matrix : array of shape (p / cell, v), float32
        Columns that multiply the means of σ²/D over cells of `cell_size(p)` neighbouring pixels.
    captured : array of shape (p,), float32
        Σ_r T_jr² of the PCA basis T: the share of pixel j's noise that the basis takes up, in units of 1/D.
    clipped : bool
        Flux below zero counts as zero.
    """

    reference: F32
    noise_shape: F32
    matrix: F32
    lines: F32
    cell_matrix: F32
    captured: F32
    clipped: bool = False
    inverse_shape: F32 = field(init=False)
    residual: F32 = field(init=False)
    windows: F32 = field(init=False)
    starts: NDArray[np.int64] = field(init=False)
    stops: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        p = self.reference.shape[0]
        for name in ("noise_shape", "captured"):
            if getattr(self, name).shape != (p,):
                raise ValueError(f"{name} must have shape ({p},), found {getattr(self, name).shape}")
        for name, rows in (("matrix", p), ("lines", p), ("cell_matrix", p // self.cell)):
            if getattr(self, name).ndim != 2 or getattr(self, name).shape[0] != rows:
                raise ValueError(f"{name} must have {rows} rows, found {getattr(self, name).shape}")
        for name in ("reference", "noise_shape", "matrix", "lines", "cell_matrix", "captured"):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), np.float32))
        if not (self.noise_shape > 0).all():
            raise ValueError("noise_shape must be positive in every pixel")
        inverse = np.float32(1) / self.noise_shape
        used = self.lines != 0
        made = {
            "inverse_shape": inverse,
            "residual": inverse - self.captured,
            "windows": np.ascontiguousarray(self.lines.T),
            "starts": used.argmax(0),
            "stops": np.where(used.any(0), p - used[::-1].argmax(0), 0),
        }
        for name, value in made.items():
            object.__setattr__(self, name, value)

    @property
    def cell(self) -> int:
        """Pixels per cell."""
        return cell_size(self.reference.shape[0])


@dataclass(frozen=True)
class Projected:
    """What `project` returns, one row per spectrum.

    `columns` (n, c), `windows` (n, l) and `variances` (n, v) are the products with `Projection.matrix`, `lines` and
    `cell_matrix`; `log_level` (n,) is ln s; `energy` (n,) is Σx²/D; `expected` (n,) is the expectation of `energy` less
    the energy inside the basis, for a spectrum that is the basis plus noise. `snr_norm`, `snr_median`, `n_good` (int32)
    and `flag` (uint32) are those of `moefast.spectra.quality.assess`. All but the last two are float32.
    """

    columns: NDArray
    windows: NDArray
    variances: NDArray
    log_level: NDArray
    energy: NDArray
    expected: NDArray
    snr_norm: NDArray
    snr_median: NDArray
    n_good: NDArray[np.int32]
    flag: NDArray[np.uint32]


@dataclass(frozen=True)
class Mixing:
    """What turns a projected spectrum into an answer: K experts at M noise levels, gate, error model.

    Attributes
    ----------
    knots : array of shape (M,), float32
        ln s of the noise levels, evenly spaced, M ≥ 2.
    expert_weights : array of shape (K, M, c), float32
        Weights of the columns.
    intercepts : array of shape (K, M), float32, dex
    n_basis : int
        The first columns, which are noise-white principal components.
    n_leading : int
        The first of these, which the gate sees.
    line_offsets : array of shape (3 w,), float32
        Core, integral and continuum of each line window for the reference spectrum.
    line_widths : array of shape (w,), float32, Å
        Equivalent widths of all lines but the last are added up as one more feature.
    least_continuum, least_spread : float
        Floors of continua, and in dex of the noise and the spread whose logarithms the error model sees.
    gate, error_model : tuple of arrays W₁ (f, h), b₁ (h,), W₂ (h, k), b₂ (k,), float32
        Gate on the 2w + 1 line features, leading columns and noise level; error model on these, log g, ln noise and ln
        spread.
    label_range : tuple of float
        Predictions are clipped to it, dex.
    """

    knots: F32
    expert_weights: F32
    intercepts: F32
    n_basis: int
    n_leading: int
    line_offsets: F32
    line_widths: F32
    least_continuum: float
    least_spread: float
    gate: Layers
    error_model: Layers
    label_range: tuple[float, float]
    numbers: tuple[cpu.Experts, cpu.Features, cpu.Network, cpu.Network, cpu.Limits] = field(
        init=False, repr=False
    )

    def __post_init__(self) -> None:
        k, m, c = self.expert_weights.shape
        w = self.line_widths.shape[0]
        features = 2 * w + 1 + self.n_leading + 1
        if self.knots.shape != (m,) or m < 2 or self.intercepts.shape != (k, m):
            raise ValueError(
                f"two noise levels at least, knots ({m},) and intercepts ({k}, {m}) expected; "
                f"found {self.knots.shape} and {self.intercepts.shape}"
            )
        if not 0 < self.n_leading <= self.n_basis <= c or self.line_offsets.shape != (3 * w,):
            raise ValueError(
                f"leading components ≤ basis ≤ {c} columns and {3 * w} offsets expected; found {self.n_leading}, "
                f"{self.n_basis} and {self.line_offsets.shape}"
            )
        for name, layers, f, out in (
            ("gate", self.gate, features, k), ("error model", self.error_model, features + 3, 1),
        ):  # fmt: skip
            h = layers[0].shape[-1]
            if tuple(a.shape for a in layers) != ((f, h), (h,), (h, out), (out,)):
                raise ValueError(
                    f"the {name} must take {f} features and give {out} numbers; found {[a.shape for a in layers]}"
                )

        def plain(array: NDArray) -> F32:
            return np.ascontiguousarray(array, np.float32)

        (w1, b1, w2, b2), (v1, c1, v2, c2) = self.gate, self.error_model
        f32 = np.float32
        # Neighbours in memory are summed over.
        numbers = (
            cpu.Experts(
                plain(self.knots), plain(self.expert_weights.transpose(1, 0, 2)), plain(self.intercepts.T)
            ),
            cpu.Features(
                self.n_basis,
                self.n_leading,
                plain(self.line_offsets),
                plain(self.line_widths),
                f32(self.least_continuum),
            ),
            cpu.Network(plain(w1), plain(b1), plain(w2.T), plain(b2)),
            cpu.Network(plain(v1), plain(c1), plain(v2.T), plain(c2)),
            cpu.Limits(f32(self.least_spread), f32(self.label_range[0]), f32(self.label_range[1])),
        )
        object.__setattr__(self, "numbers", numbers)

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The same numbers one after the other, as CUDA kernels take them."""
        experts, seen, gate, error_model, limits = self.numbers
        return (*seen[:2], *experts, *seen[2:], *gate, *error_model, *limits)

    @property
    def n_experts(self) -> int:
        """Number of experts K."""
        return self.intercepts.shape[0]


class Given(NamedTuple):
    """What other experts say, beside or instead of the linear ones of a `Mixing`.

    Attributes
    ----------
    values : array of shape (n, K), float32, dex
        Log g instead of the linear expert's; NaN leaves the linear expert's.
    noise : array of shape (n, K), float32, dex
        Pixel noise propagated through that expert, 1σ, where `values` is not NaN.
    logits : array of shape (n, K), float32
        Added to the gate's logits before the softmax. −∞ silences an expert; one per row must be finite.
    """

    values: F32
    noise: F32
    logits: F32


class Mixed(NamedTuple):
    """What `soft_mix` returns: `log_g`, `log_g_err`, `log_g_err_raw`, `chi2` (n,), `weights`, `expert_log_g` (n, K)."""

    log_g: NDArray
    log_g_err: NDArray
    log_g_err_raw: NDArray
    weights: NDArray
    expert_log_g: NDArray
    chi2: NDArray


def project(
    flux: F32, error: F32, mask: NDArray[np.bool_] | None, plan: Projection, *, first_row: int = 0
) -> Projected:
    """One read of flux and error: (flux − reference) W, noise propagation, noise level, energies, SNRs, flags.

    Bad pixels (masked, flux not finite, error not positive or above 1e6) have zero weight. The numbers of a row depend,
    to the last bit, on that row and on its index modulo `PROJECT_ROWS` (BLAS rounds differently at the edges of its
    tiles), never on its neighbours or on the block.

    Parameters
    ----------
    flux, error : array of shape (n, p), float32
    mask : array of shape (n, p), bool, or None
        True where a pixel is bad whatever it holds.
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
    if mask is not None and (mask.shape != flux.shape or mask.dtype != np.bool_):
        raise ValueError(f"mask must be bool of shape {flux.shape}, found {mask.dtype} {mask.shape}")
    flux, error = np.ascontiguousarray(flux, np.float32), np.ascontiguousarray(error, np.float32)
    hidden = _NO_MASK if mask is None else np.ascontiguousarray(mask)
    n, rows = len(flux), PROJECT_ROWS
    out = Projected(
        columns=np.empty((n, plan.matrix.shape[1]), np.float32),
        windows=np.empty((n, plan.lines.shape[1]), np.float32),
        variances=np.empty((n, plan.cell_matrix.shape[1]), np.float32),
        log_level=np.empty(n, np.float32),
        energy=np.empty(n, np.float32),
        expected=np.empty(n, np.float32),
        snr_norm=np.empty(n, np.float32),
        snr_median=np.empty(n, np.float32),
        n_good=np.empty(n, np.int32),
        flag=np.empty(n, np.uint32),
    )
    # Blocks end at multiples of PROJECT_ROWS in the file, so that a row is always at the same place in its product.
    cuts = [0, *range(rows - first_row % rows, n, rows), n] if n else [0]
    blocks = [slice(a, b) for a, b in itertools.pairwise(cuts)]

    def run(first: int, stop: int) -> None:
        for here in blocks[first:stop]:
            _project_block(flux, error, hidden, plan, here, (first_row + here.start) % rows, out)

    with one_blas_thread():
        in_threads(len(blocks), run, least=1)
    return out


def _scratch(p: int, c: int, v: int) -> tuple[F32, F32, F32, F32]:
    """Memory of one thread for the products of a block, kept as long as the thread lives.

    Fresh pages cost as much as reading a file.
    """
    key = (p, c, v)
    if getattr(_local, "key", None) != key:
        widths = (p, p // cell_size(p), c, v)
        _local.key, _local.arrays = key, tuple(np.empty((PROJECT_ROWS, w), np.float32) for w in widths)
    return _local.arrays


def _project_block(
    flux: F32, error: F32, mask: NDArray[np.bool_], plan: Projection, here: slice, top: int, out: Projected
) -> None:
    """Project the rows `here`, placed at row `top` of products of PROJECT_ROWS rows."""
    x, cells, columns, variances = _scratch(
        plan.reference.size, plan.matrix.shape[1], plan.cell_matrix.shape[1]
    )
    there = slice(top, top + here.stop - here.start)
    cpu.centre(
        flux[here], error[here], mask[here], plan.clipped, plan.reference, plan.inverse_shape, plan.residual,
        plan.cell, plan.windows, plan.starts, plan.stops, x[there], cells[there], out.windows[here],
        out.log_level[here], out.energy[here], out.expected[here], out.snr_norm[here], out.snr_median[here],
        out.n_good[here], out.flag[here],
    )  # fmt: skip
    for block in (x, cells):
        block[: there.start] = 0
        block[there.stop :] = 0
    # Flux near the end of float32 overflows in its own row.
    with np.errstate(over="ignore", invalid="ignore"):
        np.matmul(x, plan.matrix, out=columns)
        np.matmul(cells, plan.cell_matrix, out=variances)
    out.columns[here] = columns[there]
    out.variances[here] = variances[there]


def check_given(given: Given | None, n: int, k: int) -> Given | None:
    """Contiguous float32 arrays, or None where nothing is given.

    Raises
    ------
    ValueError
        Shapes other than (n, k).
    """
    if given is None:
        return None
    found = tuple(np.shape(a) for a in given)
    if found != ((n, k),) * 3:
        raise ValueError(f"given values, noise and logits of shape ({n}, {k}) expected; found {found}")
    return Given(*(np.ascontiguousarray(a, np.float32) for a in given))


def perceptron(features: F32, layers: Layers) -> F32:
    """tanh(f W₁ + b₁) W₂ + b₂; the numbers of a row depend on that row alone.

    Parameters
    ----------
    features : array of shape (n, f), float32
    layers : tuple of arrays of shapes (f, h), (h,), (h, k), (k,), float32

    Returns
    -------
    array of shape (n, k), float32

    Raises
    ------
    ValueError
        Shapes that do not fit.
    """
    w1, b1, w2, b2 = (np.ascontiguousarray(a, np.float32) for a in layers)
    h, k = b1.size, b2.size
    if features.ndim != 2 or w1.shape != (features.shape[1], h) or w2.shape != (h, k):
        raise ValueError(
            f"layers {[np.shape(a) for a in layers]} do not fit together, or features {features.shape}"
        )
    x, network = (
        np.ascontiguousarray(features, np.float32),
        cpu.Network(w1, b1, np.ascontiguousarray(w2.T), b2),
    )
    out = np.empty((len(x), k), np.float32)

    def run(a: int, b: int) -> None:
        cpu.perceptron(x[a:b], network, out[a:b])

    in_threads(len(x), run, least=2 * PROJECT_ROWS)
    return out


def soft_mix(projected: Projected, plan: Mixing, given: Given | None = None) -> Mixed:
    """ŷ = Σ_k g_k (w_k(s)ᵀz + c_k(s)): experts at the star's noise level, gate, mixture, calibrated error.

    g = softmax(tanh(f W₁ + b₁) W₂ + b₂) of the features f; the numbers of a row depend on that row alone.

    Parameters
    ----------
    projected : Projected
        With float32 arrays, as `project` gives them.
    plan : Mixing
    given : Given, optional
        Experts that are not linear: where `given.values` is not NaN it takes the place of w_kᵀz + c_k, and
        `given.noise` that of its propagated noise; `given.logits` are added to the gate's. A row of logits without a
        finite one has no answer.

    Raises
    ------
    ValueError
        Shapes that do not fit.
    """
    n, (k, m, c) = len(projected.columns), plan.expert_weights.shape
    inputs = (
        projected.columns, projected.windows, projected.variances,
        projected.log_level, projected.energy, projected.expected,
    )  # fmt: skip
    expected = ((n, c), (n, plan.line_offsets.size), (n, k * m), (n,), (n,), (n,))
    found = tuple(a.shape for a in inputs)
    if found != expected:
        raise ValueError(
            f"columns, windows, variances, levels and energies of shapes {expected} expected; found {found}"
        )
    rows = cpu.ProjectedRows(*(np.ascontiguousarray(a, np.float32) for a in inputs))
    others = check_given(given, n, k)
    out = Mixed(
        log_g=np.empty(n, np.float32),
        log_g_err=np.empty(n, np.float32),
        log_g_err_raw=np.empty(n, np.float32),
        weights=np.empty((n, k), np.float32),
        expert_log_g=np.empty((n, k), np.float32),
        chi2=np.empty(n, np.float32),
    )

    def run(a: int, b: int) -> None:
        here = None if others is None else Given(*(v[a:b] for v in others))
        cpu.soft_mix(
            cpu.ProjectedRows(*(v[a:b] for v in rows)), *plan.numbers, here, Mixed(*(v[a:b] for v in out))
        )

    # Two microseconds a row: fewer are not worth starting threads.
    in_threads(n, run, least=2 * PROJECT_ROWS)
    return out
