"""Flux and error to log g on the device, by the arrays of a mixture.

Design: three kernels read what the plans of `moefast.kernels.scoring` hold: `row_statistics` (each spectrum once, and
with the median of flux/error for those who ask for it), `project_columns` (flux again, with a bit for each good pixel)
and `mix_rows` (a few dozen numbers per star). Between the last two, `moefast.kernels.cuda.tangent` weighs the clouds of
a library, if there is one. Spectra whose pixels do not come in eights, or are more than `row_statistics` holds, go
through `project_rows` and `median_rows` instead of the first two: flux and error are read twice.
`CudaScorer` keeps the plans on the device and streams blocks through slots (`moefast.kernels.cuda.blocks`). Kernels
take 0.13 µs of a spectrum, the median included: it may stay where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from numba import cuda
from numpy.typing import NDArray

from moefast.kernels.cuda.blocks import (
    BLOCK_ROWS,
    SLOTS,
    BlockScorer,
    Slot,
    blocks_of_a_call,
    results_on_device,
)
from moefast.kernels.cuda.columns import project_columns
from moefast.kernels.cuda.device import MOST_SHARED
from moefast.kernels.cuda.median import THREADS, median_rows
from moefast.kernels.cuda.mix import LANES, mix_rows, shared_bytes
from moefast.kernels.cuda.project import COLUMNS, LINES, PANEL, ROWS, project_rows
from moefast.kernels.cuda.project import THREADS as PROJECT_THREADS
from moefast.kernels.cuda.statistics import EACH, MOST_PIXELS, row_statistics
from moefast.kernels.cuda.statistics import THREADS as STATISTICS_THREADS
from moefast.kernels.cuda.tangent import Clouds, DeviceLibrary
from moefast.kernels.scoring import Mixing, Projection
from moefast.kernels.tangent import Library

__all__ = ["CudaScorer", "DevicePlan", "Scores", "Work", "launch", "score"]

F32 = NDArray[np.float32]
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
