"""What a fit reads: spectra and labels row by row, and which rows are for what.

Design: every stage reads rows through `TrainingSet.blocks`, so that a bad pixel means the same to all of them. Rows are
given their parts by number alone: folds for cross-fitting, stretches of the sample for gate and error model, and all
others for what is fitted beside the linear experts and judged on the sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import InputError, LabelError, WaveGridError
from moefast.core.grids import Grid, SnrGrid
from moefast.core.line_features import line_columns
from moefast.core.progress import StageProgress
from moefast.core.random import add_noise, fold_of_rows
from moefast.core.threads import CORES, map_in_order, one_blas_thread
from moefast.experts.exact_sums import Scales
from moefast.experts.protocol import CleanStars, Inputs
from moefast.fitting.options import STRETCH, Options
from moefast.kernels import all_within, project
from moefast.mixture import Mixture
from moefast.spectra.quality import good_pixels
from moefast.spectra.source import SpectrumSource

__all__ = ["BLOCK_ROWS", "Rows", "TrainingSet"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Rows = tuple[slice, F32, F32, NDArray]
"""A block: which rows, flux, error, and which of them are usable."""
Result = TypeVar("Result")

BLOCK_ROWS = 2048
MOST_BLOCKS = 8
"""Blocks that are worked on at the same time at most: each takes some hundred megabytes."""
CHOICE_ROWS = 8_000
"""Noisy stars on which the size of a library is chosen, and a network judged."""
LARGEST_RATIO = 1e3
"""Pixels with more than this times the usual error, or this times the usual flux (1), are bad pixels to the fit."""


class TrainingSet:
    """The rows of a fit.

    Parameters
    ----------
    spectra : SpectrumSource
        With labels T_eff [K], log_g [dex], M_H [dex].
    options : Options
    progress : callable
        Called with the name of a stage, rows (or steps) done and rows in all.

    Attributes
    ----------
    labels : dict of str to array of shape (n,)
        Medians where a row has none.
    labelled : array of shape (n,), bool
        Whether a row has all labels; the others are used for nothing.
    y : array of shape (n,), dex
        log g.
    bins : array of shape (n,)
        Bin of each row; those of snr_norm are found when a row is read.
    folds : array of shape (n,)
    reference : array of shape (p,), float64
        What stands in bad pixels, and is subtracted from spectra.
    largest_error : float
        That still counts. The first pass sets it and the reference; nothing can be read before.
    scales : Scales
        Of exact sums over all rows; set with the reference.

    Raises
    ------
    LabelError
        Labels are missing in all rows, or all the same.
    InputError
        Some files have noisy spectra, others not.
    WaveGridError
        The lines that the gate sees are not on the grid.
    """

    reference: F64
    largest_error: float
    scales: Scales

    def __init__(self, spectra: SpectrumSource, options: Options, progress: StageProgress) -> None:
        self.spectra, self.options, self.progress = spectra, options, progress
        labels = spectra.labels(("T_eff", "log_g", "M_H"), partial=True)
        self.labelled: NDArray[np.bool_] = np.isfinite(np.sum([*labels.values()], axis=0))
        self.labels = {
            name: np.where(self.labelled, values, np.median(values[self.labelled]))
            for name, values in labels.items()
        }
        self.y: F64 = self.labels["log_g"]
        self.bins: NDArray[np.int64] = (
            options.grid.assign(self.labels["T_eff"], self.labels["M_H"]).astype(np.int64)
            if isinstance(options.grid, Grid)
            else np.zeros(spectra.n_rows, np.int64)
        )
        self.folds = fold_of_rows(np.arange(spectra.n_rows), options.n_folds, options.seed)
        self.array: Literal["flux", "noisy"] = "flux"
        if options.noise == "observed":
            noisy = ["noisy" in shard.arrays for shard in spectra.shards]
            if any(noisy) and not all(noisy):
                lacking = spectra.shards[noisy.index(False)].path
                raise InputError(
                    f"{lacking}: dataset/arrays/noisy/value is missing, other files have it; fit them apart"
                )
            self.array = "noisy" if all(noisy) else "flux"
        try:
            # A posterior looks at no line apart.
            line_columns(spectra.wave, all_lines=options.families != ("posterior",))
        except ValueError as error:
            raise WaveGridError(
                f"{spectra.shards[0].path}: spectrumdataset/wave: {error}. This recipe measures that line; posterior, "
                "posterior-calibrated and posterior-linear need none"
            ) from error
        if np.ptp(self.y) == 0:
            raise LabelError("log_g is the same in every row; there is nothing to learn")

    def steps(self, stage: str, total: int) -> Callable[[], None]:
        """Reports the next of so many steps of a stage each time it is called."""
        done = itertools.count(1)
        self.progress(stage, 0, total)
        return lambda: self.progress(stage, next(done), total)

    # -- reading ------------------------------------------------------------------------------------------------

    def blocks(
        self, stage: str, rows: list[tuple[int, int]] | None = None, done: int = 0, *, with_bins: bool = True
    ) -> Iterator[Rows]:
        """Rows with labels and at least half of their pixels good; bad pixels hold the reference and no variance.

        `done` rows of the stage were done before. Bins of snr_norm are found unless the caller does that, who then
        leaves `bins` of these rows as they were.
        """
        total = self.spectra.n_rows if rows is None else done + sum(b - a for a, b in rows)
        self.progress(stage, done, total)
        for part in [None] if rows is None else rows:
            for block in self.spectra.blocks(BLOCK_ROWS, array=self.array, rows=part):
                here = slice(block.first_row, block.first_row + len(block))
                usable = self.labelled[here].copy()
                error = block.error
                if self.options.noise_level != 1.0:
                    error = error * np.float32(self.options.noise_level)
                if not (
                    # Most blocks have nothing wrong, and two reads of them tell so.
                    block.mask is None
                    and self.largest_error < np.inf
                    and all_within(error, 0, self.largest_error)
                    and all_within(block.flux, -LARGEST_RATIO, LARGEST_RATIO)
                ):
                    good = good_pixels(block.flux, block.error, block.mask)
                    sound = (error <= self.largest_error) & (np.abs(block.flux) <= LARGEST_RATIO)
                    good = sound if good is None else good & sound
                    usable &= good.mean(1) >= 0.5
                    np.copyto(block.flux, self.reference.astype(np.float32), where=~good)
                    np.copyto(error, np.float32(0), where=~good)
                if with_bins and isinstance(self.options.grid, SnrGrid):
                    self.bins[here] = self.options.grid.assign(self.snr_norm(block.flux, error))
                yield here, block.flux, error, usable
                done += len(block)
                self.progress(stage, done, total)

    def map_blocks(
        self, stage: str, rows: list[tuple[int, int]], work: Callable[..., Result], *arguments: Any
    ) -> Iterator[Result]:
        """What `work(self, block, *arguments)` gives for the blocks of `blocks`, in order, some blocks at a time.

        `work` is a function of a module, which depends on nothing else: others may do it elsewhere. BLAS has one thread
        for each block, so that no bit depends on the number of cores.
        """
        with one_blas_thread():
            yield from map_in_order(
                lambda block: work(self, block, *arguments), self.blocks(stage, rows), min(CORES, MOST_BLOCKS)
            )

    def snr_norm(self, flux: F32, error: F32) -> F64:
        """‖flux‖/‖error‖ over good pixels; of clean flux, as it is expected with noise. 0 without good pixels."""
        signal = np.einsum("np,np->n", np.where(error > 0, flux, 0), flux, dtype=np.float64)
        noise = np.einsum("np,np->n", error, error, dtype=np.float64)
        added = 0.0 if self.options.noise == "observed" else 1.0
        return np.sqrt(np.divide(signal, noise, out=np.zeros_like(noise), where=noise > 0) + added)

    def find_reference(self) -> None:
        """Set reference and largest error: the mean flux of a few rows spread over the set, and a multiple of theirs.

        Any spectrum near the mean will do as reference, but it must be fixed. Errors above a thousand times the usual
        one say "no information" in many surveys; one of them would swamp the mean noise of a pixel.
        """
        n, p = self.spectra.n_rows, self.spectra.n_pixels
        self.reference, self.largest_error = np.zeros(p), np.inf
        total, square, variance, count = np.zeros(p), np.zeros(p), np.zeros(p), np.zeros(p)
        errors = []
        starts = np.unique(np.linspace(0, max(0, n - 64), 8).astype(int))
        for _, flux, error, usable in self.blocks(
            "mean spectrum", [(int(a), min(int(a) + 64, n)) for a in starts]
        ):
            good = error[usable] > 0
            shown = np.where(good, flux[usable], 0)
            total += shown.sum(0, dtype=np.float64)
            square += (shown.astype(np.float64) ** 2).sum(0)
            variance += (error[usable].astype(np.float64) ** 2).sum(0)
            count += good.sum(0)
            errors.append(error[usable][good])
        if not count.any():
            raise InputError(
                "no usable row among those looked at first: fewer than half of the pixels are good"
            )
        mean = np.divide(total, count, where=count > 0, out=np.full(p, np.nan))
        self.reference = np.where(count > 0, mean, np.nanmedian(mean))
        self.largest_error = float(LARGEST_RATIO * np.median(np.concatenate(errors)))
        often = np.maximum(count, 1)
        square, variance = np.maximum(square / often - (total / often) ** 2, 0), variance / often
        self.scales = Scales.of(n, square + variance, variance, float(np.abs(self.y).max()))

    def inputs(
        self,
        mixture: Mixture,
        stage: str,
        stretches: list[tuple[int, int]],
        *,
        noisy: bool,
        flux: bool = False,
        bin_: int | None = None,
    ) -> tuple[Inputs, NDArray[np.int64]]:
        """What experts that are not linear see of stars, and their rows; `noisy` with the noise of their first draw.

        Of one bin alone if `bin_` is given.
        """
        parts = self.map_blocks(stage, stretches, _inputs_of, mixture, noisy, flux, bin_)
        z, level, lines, whole, rows = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Inputs(z, level, lines, whole if flux else None), rows

    def clean_stars(
        self, mixture: Mixture, stage: str, stretches: list[tuple[int, int]], bin_: int
    ) -> tuple[CleanStars, NDArray[np.int64]]:
        """Flux without noise and errors of the stars of one bin that are whole, and their rows."""
        parts = []
        for here, x, sigma, usable in self.blocks(stage, stretches):
            # A pixel without variance is a bad one, and a network that draws noise would learn its value.
            usable &= (self.bins[here] == bin_) & (sigma > 0).all(1)
            parts.append((x[usable], sigma[usable], np.arange(here.start, here.stop)[usable]))
        flux, error, rows = (np.concatenate(column) for column in zip(*parts, strict=True))
        if len(rows) < 2:
            raise InputError(
                f"{self.spectra.shards[0].path}: a family that draws noise itself needs stars without bad pixels; "
                f"found {len(rows)} in bin {bin_}; leave that family out, or fit spectra without gaps"
            )
        return CleanStars(flux, error, mixture.reference, mixture.noise_shape), rows

    # -- which rows are for what --------------------------------------------------------------------------------

    def sample_stretches(self) -> list[tuple[int, int]]:
        """Stretches of rows spread evenly over the set: enough rows, read in long slices.

        What a library of templates is made of must not be among them: it leaves a third of the rows at most.
        """
        n = self.spectra.n_rows
        most, length = self.options.sample_rows, STRETCH
        if self.options.all_families != ("linear",):
            most, length = min(most, n // 3), min(length, max(1, n // 30))
        if n <= most:
            return [(0, n)]
        starts = np.unique(np.linspace(0, n - length, max(1, most // length)).astype(int))
        return [(int(a), int(a) + length) for a in starts]

    def other_stretches(self, most: int) -> list[tuple[int, int]]:
        """Stretches of rows that are not in the sample, about `most` of them."""
        rest = self.apart_from(self.sample_stretches())
        count = len(rest) * most // max(1, sum(b - a for a, b in rest))
        if count < len(rest):
            mixed = np.random.default_rng(self.options.seed).permutation(len(rest))
            rest = [rest[i] for i in np.sort(mixed[: max(1, count)])]
        return rest

    def apart_from(self, stretches: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """All rows that are in none of these stretches, which come in the order of their rows."""
        ends = [0, *(b for _, b in stretches)], [*(a for a, _ in stretches), self.spectra.n_rows]
        return [(a, b) for a, b in zip(*ends, strict=True) if b > a]

    def held_stretches(self) -> list[tuple[int, int]]:
        """Some stretches of the sample, `CHOICE_ROWS` rows in all."""
        sample = self.sample_stretches()
        return sample[:: max(1, sum(b - a for a, b in sample) // CHOICE_ROWS)]

    def part_of(self, rows: NDArray[np.int64]) -> NDArray[np.integer]:
        """Tenth of the stars that a row belongs to: 0 only measures, 1 and 2 decide when to stop, the others train."""
        return fold_of_rows(rows, 10, self.options.seed + 1000)


def _inputs_of(
    data: TrainingSet, block: Rows, mixture: Mixture, noisy: bool, flux: bool, bin_: int | None
) -> tuple[NDArray, ...]:
    """Inputs of a block's stars, or of those of one bin, their flux if asked for, and their rows."""
    here, x, sigma, usable = block
    if bin_ is not None:
        usable = usable & (data.bins[here] == bin_)
    rows = np.arange(here.start, here.stop)[usable]
    x, sigma = x[usable], sigma[usable]
    if noisy:
        x = add_noise(x, sigma, data.options.seed + 1, rows)
    found = mixture.inputs(project(x, sigma, None, mixture.projection))
    return (*found[:3], x if flux else x[:, :0], rows)
