"""The first pass: normal equations of all rows, or of a part of them, kept on disk now and then.

Design: one reading of the rows fills the totals of every bin and fold, and beside them those of the published-style
ridge, which sees clipped draws. What has been gathered so far is one state (`moefast.fitting.statistics`): that is what
a checkpoint holds, and what a part of a fit gives; a fit that goes on from it ends with the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moefast.backend import physical_memory
from moefast.checkpoint import Checkpoint
from moefast.core.errors import InputError
from moefast.core.random import add_noise
from moefast.core.threads import one_blas_thread
from moefast.experts.device import DeviceEquations, DeviceRows
from moefast.experts.normal_equations import NormalEquations
from moefast.fitting.statistics import Statistics, units_of
from moefast.fitting.training_set import BLOCK_ROWS, TrainingSet
from moefast.kernels import all_within

__all__ = ["Gathered", "complete", "gather", "gather_part"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


class Gathered(NamedTuple):
    """What the first pass gives.

    `equations` of the experts, and `published` those of the published-style ridge where they are others; `times_good`
    (p,), the rows in which a pixel was good; `rows`, how many were used and left out.
    """

    equations: NormalEquations
    published: NormalEquations | None
    times_good: F64
    rows: dict[str, int]


def gather(data: TrainingSet, checkpoint: Checkpoint | None, backend: Literal["cpu", "cuda"]) -> Gathered:
    """Normal equations of the experts and of the published-style ridge; sets reference and largest error of `data`.

    Raises
    ------
    InputError
        The totals do not fit in the memory, a bin has too few rows, or the checkpoint is of another fit.
    """
    found = gather_part(data, (0, data.spectra.n_rows), checkpoint, backend)
    if checkpoint is not None and found.rows > found.saved:
        # What follows may be stopped as well.
        checkpoint.save(found.rows, found.arrays())
    return complete(data, found)


def gather_part(
    data: TrainingSet, rows: tuple[int, int], checkpoint: Checkpoint | None, backend: Literal["cpu", "cuda"]
) -> Statistics:
    """The statistics of some rows, whole units; sets reference and largest error of `data`.

    Raises
    ------
    InputError
        The totals do not fit in the memory, or the checkpoint is of another fit.
    """
    options, apart = data.options, data.options.has_published
    needed = NormalEquations.memory(data.spectra.n_pixels, options.grid.n_bins, options.n_folds)
    if apart:
        needed += NormalEquations.memory(data.spectra.n_pixels, 1, 1)
    if 0 < physical_memory() < 1.3 * needed:
        raise InputError(
            f"{options.grid.n_bins} bins in {options.n_folds} folds need {needed / 1e9:.1f} GB for their normal "
            f"equations; this machine has {physical_memory() / 1e9:.1f} GB. Fit a coarser grid"
        )
    found = _resumed(data, rows, checkpoint, backend, needed)
    if found is None:
        data.find_reference()
        # Totals on a device are no exact sums.
        scales = data.scales if backend == "cpu" else None
        found = Statistics(
            NormalEquations(data.reference, options.grid.n_bins, options.n_folds, scales=scales),
            NormalEquations(data.reference, 1, 1, scales=scales) if apart else None,
            np.zeros(data.reference.size),
            data.largest_error,
            first=rows[0],
            rows=rows[0],
        )
    data.reference, data.largest_error = found.equations.reference, found.largest_error
    device = _on_device(data, found) if backend == "cuda" else None
    # Every pass over the rows below has a thread per core of its own; BLAS must not add its threads to them.
    with one_blas_thread():
        _add_rows(data, found, rows[1], checkpoint, device)
    return found.finish()


def complete(data: TrainingSet, found: Statistics) -> Gathered:
    """What the statistics of all rows give; sets reference and largest error of `data`.

    Raises
    ------
    InputError
        A bin has too few rows.
    """
    data.reference, data.largest_error = found.equations.reference, found.largest_error
    equations, published = found.equations, found.published
    assert isinstance(equations, NormalEquations)
    assert not isinstance(published, DeviceEquations)
    empty = [
        n for n, c in zip(data.options.grid.names, equations.count, strict=True) if (c.sum() - c < 2).any()
    ]
    if empty:
        raise InputError(
            f"too few rows to fit: bins {', '.join(empty)} hold fewer than two rows outside a fold; "
            "add training spectra there or fit a coarser grid"
        )
    used = {"used": equations.n_rows, "left_out": found.left_out}
    if unlabelled := int((~data.labelled).sum()):
        used["unlabelled"] = unlabelled
    return Gathered(equations, published, found.times_good, used)


def _resumed(
    data: TrainingSet,
    rows: tuple[int, int],
    checkpoint: Checkpoint | None,
    backend: Literal["cpu", "cuda"],
    nbytes: int,
) -> Statistics | None:
    """The first pass of a fit that was stopped, if there is a checkpoint of it."""
    if checkpoint is None:
        return None
    options = dataclasses.asdict(data.options)
    key = {"spectra": data.spectra.fingerprint(), "options": options, "backend": backend, "rows": list(rows)}
    checkpoint.begin(key, nbytes)
    apart, exact = data.options.has_published, backend == "cpu"
    return checkpoint.load(
        lambda stop, read: Statistics.restored((rows[0], stop), read, apart=apart, exact=exact)
    )


def _on_device(data: TrainingSet, found: Statistics) -> DeviceRows:
    """What takes rows to a device from here on; its totals take the place of those in `found` and go on from them."""
    options, equations, published = data.options, found.equations, found.published
    assert isinstance(equations, NormalEquations)
    assert not isinstance(published, DeviceEquations)
    device = DeviceRows(
        equations, published, options.grid, drawn=options.noise == "sampled",
        published_drawn=options.noise != "observed", clipped=options.clipped,
        noise_inside=options.noise == "observed", seed=options.seed,
    )  # fmt: skip
    found.equations, found.published = device.equations, device.published
    return device


def _add_rows(
    data: TrainingSet, found: Statistics, stop: int, checkpoint: Checkpoint | None, device: DeviceRows | None
) -> None:
    """Add all rows up to `stop` that the statistics lack, saving them now and then."""
    add = _add_to_host(data, found) if device is None else partial(_add_to_device, data, device)
    units = units_of(data.spectra.n_rows, found.rows, stop)
    ends = {end for _, end in units}
    blocks = data.blocks("normal equations", units, found.rows - found.first, with_bins=device is None)
    for here, flux, error, usable in blocks:
        rows = np.arange(here.start, here.stop)
        if not usable.all():
            found.left_out += int((~usable).sum())
            flux, error, rows = flux[usable], error[usable], rows[usable]
        found.times_good += len(rows) if all_within(error, 0, np.inf) else np.count_nonzero(error, axis=0)
        add(flux, error, rows)
        found.rows = here.stop
        if found.rows in ends:
            found.equations.end_unit()
            if found.published is not None:
                found.published.end_unit()
        if checkpoint is not None and checkpoint.due:
            checkpoint.save(found.rows, found.arrays())
            found.saved = found.rows


def _add_to_device(
    data: TrainingSet, device: DeviceRows, flux: F32, error: F32, rows: NDArray[np.int64]
) -> None:
    """Rows as they were read: noise, bins and all else are made on the device."""
    labels = data.labels
    device.add(flux, error, data.y[rows], labels["T_eff"][rows], labels["M_H"][rows], data.folds[rows], rows)


def _add_to_host(data: TrainingSet, found: Statistics) -> Callable[[F32, F32, NDArray[np.int64]], None]:
    """Adds rows to the totals on the host, with noise if it is drawn."""
    options, equations, published = data.options, found.equations, found.published
    assert isinstance(equations, NormalEquations)
    assert not isinstance(published, DeviceEquations)
    draws = options.noise == "sampled" or (options.noise != "observed" and published is not None)
    # Fresh memory for every block costs a page fault per page.
    memory = np.empty((BLOCK_ROWS if draws else 0, data.reference.size), np.float32)

    def add(flux: F32, error: F32, rows: NDArray[np.int64]) -> None:
        noisy = flux
        if draws:
            noisy = add_noise(flux, error, options.seed, rows, out=memory[: len(rows)])
        x = noisy if options.noise == "sampled" else flux
        y, bins, folds = data.y[rows], data.bins[rows], data.folds[rows]
        equations.add(x, y, None, bins, folds, error=error, clipped=options.clipped)
        if published is not None:
            published.add(noisy, y, clipped=True)

    return add
