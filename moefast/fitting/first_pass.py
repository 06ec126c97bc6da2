"""The first pass: normal equations of all rows, kept on disk now and then.

Design: one reading of the rows fills the totals of every bin and fold, and beside them those of the published-style
ridge, which sees clipped draws. What has been gathered so far is one state (`_Gathering`): that is what a checkpoint
holds, and a fit that goes on from it ends with the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moefast.backend import physical_memory
from moefast.checkpoint import Checkpoint
from moefast.core.errors import InputError
from moefast.core.random import add_noise
from moefast.core.threads import one_blas_thread
from moefast.experts.device import DeviceEquations
from moefast.experts.normal_equations import NormalEquations
from moefast.fitting.training_set import BLOCK_ROWS, TrainingSet
from moefast.kernels import all_within

__all__ = ["Gathered", "gather"]

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


@dataclass
class _Gathering:
    """What has been gathered from the first `rows` rows: all that the rest of the pass depends on.

    `times_good` (p,) counts the rows in which a pixel was good; `saved` are the rows that a checkpoint holds.
    """

    equations: NormalEquations | DeviceEquations
    published: NormalEquations | DeviceEquations | None
    times_good: F64
    largest_error: float
    left_out: int = 0
    rows: int = 0
    saved: int = 0

    def arrays(self) -> dict[str, NDArray]:
        """Everything but `rows` by name; views of what is here."""
        found = {"times_good": self.times_good, "rest": np.array([self.largest_error, self.left_out])}
        found |= {f"equations/{name}": array for name, array in self.equations.state().items()}
        if self.published is not None:
            found |= {f"published/{name}": array for name, array in self.published.state().items()}
        return found

    @classmethod
    def restored(
        cls,
        rows: int,
        read: Callable[[str], NDArray],
        apart: bool,
        on: Callable[[NormalEquations], NormalEquations | DeviceEquations],
    ) -> _Gathering:
        """From the names of `arrays`; raises KeyError or ValueError where one is not what it should be."""
        equations = on(NormalEquations.from_state(lambda name: read(f"equations/{name}")))
        published = on(NormalEquations.from_state(lambda name: read(f"published/{name}"))) if apart else None
        largest_error, left_out = read("rest").tolist()
        times_good = read("times_good")
        if times_good.shape != equations.reference.shape or equations.n_rows + left_out != rows:
            raise ValueError(f"{equations.n_rows} rows and {left_out:.0f} left out are not {rows}")
        return cls(equations, published, times_good, largest_error, int(left_out), rows, rows)


def gather(data: TrainingSet, checkpoint: Checkpoint | None, backend: Literal["cpu", "cuda"]) -> Gathered:
    """Normal equations of the experts and of the published-style ridge; sets reference and largest error of `data`.

    Raises
    ------
    InputError
        The totals do not fit in the memory, a bin has too few rows, or the checkpoint is of another fit.
    """
    options = data.options
    # Clipped draws are what the published-style ridge is fitted on, so the totals of the experts hold it.
    apart = options.references and not options.clipped
    needed = NormalEquations.memory(data.spectra.n_pixels, options.grid.n_bins, options.n_folds)
    if apart:
        needed += NormalEquations.memory(data.spectra.n_pixels, 1, 1)
    if 0 < physical_memory() < 1.3 * needed:
        raise InputError(
            f"{options.grid.n_bins} bins in {options.n_folds} folds need {needed / 1e9:.1f} GB for their normal "
            f"equations; this machine has {physical_memory() / 1e9:.1f} GB. Fit a coarser grid"
        )
    equations_of = DeviceEquations if backend == "cuda" else NormalEquations
    gathering = _resumed(data, checkpoint, backend, needed, apart)
    if gathering is None:
        data.find_reference()
        gathering = _Gathering(
            equations_of(data.reference, options.grid.n_bins, options.n_folds),
            equations_of(data.reference) if apart else None,
            np.zeros(data.reference.size),
            data.largest_error,
        )
    data.reference, data.largest_error = gathering.equations.reference, gathering.largest_error
    # Every pass over the rows below has a thread per core of its own; BLAS must not add its threads to them.
    with one_blas_thread():
        _add_rows(data, gathering, checkpoint)
    equations = gathering.equations.finish()
    published = None if gathering.published is None else gathering.published.finish()
    if checkpoint is not None and gathering.rows > gathering.saved:
        checkpoint.save(gathering.rows, gathering.arrays())
    empty = [n for n, c in zip(options.grid.names, equations.count, strict=True) if (c.sum() - c < 2).any()]
    if empty:
        raise InputError(
            f"too few rows to fit: bins {', '.join(empty)} hold fewer than two rows outside a fold; "
            "add training spectra there or fit a coarser grid"
        )
    used = {"used": equations.n_rows, "left_out": gathering.left_out}
    if unlabelled := int((~data.labelled).sum()):
        used["unlabelled"] = unlabelled
    return Gathered(equations, published, gathering.times_good, used)


def _resumed(
    data: TrainingSet,
    checkpoint: Checkpoint | None,
    backend: Literal["cpu", "cuda"],
    nbytes: int,
    apart: bool,
) -> _Gathering | None:
    """The first pass of a fit that was stopped, if there is a checkpoint of it."""
    if checkpoint is None:
        return None
    options = dataclasses.asdict(data.options)
    checkpoint.begin({"spectra": data.spectra.fingerprint(), "options": options, "backend": backend}, nbytes)
    on = DeviceEquations.of if backend == "cuda" else lambda found: found
    return checkpoint.load(lambda rows, read: _Gathering.restored(rows, read, apart, on))


def _add_rows(data: TrainingSet, gathering: _Gathering, checkpoint: Checkpoint | None) -> None:
    """Add all rows that the first pass lacks, saving its state now and then."""
    options, n = data.options, data.spectra.n_rows
    draws = options.noise == "sampled" or (options.noise != "observed" and gathering.published is not None)
    # Fresh memory for every block costs a page fault per page.
    memory = np.empty((BLOCK_ROWS if draws else 0, data.reference.size), np.float32)
    for here, flux, error, usable in data.blocks("normal equations", [(gathering.rows, n)], gathering.rows):
        rows = np.arange(here.start, here.stop)
        if not usable.all():
            gathering.left_out += int((~usable).sum())
            flux, error, rows = flux[usable], error[usable], rows[usable]
        noisy = flux
        if draws:
            noisy = add_noise(flux, error, options.seed, rows, out=memory[: len(rows)])
        x = noisy if options.noise == "sampled" else flux
        y, bins, folds = data.y[rows], data.bins[rows], data.folds[rows]
        gathering.times_good += len(rows) if all_within(error, 0, np.inf) else np.count_nonzero(error, axis=0)
        gathering.equations.add(x, y, None, bins, folds, error=error, clipped=options.clipped)
        if gathering.published is not None:
            gathering.published.add(noisy, y, clipped=True)
        gathering.rows = here.stop
        if checkpoint is not None and checkpoint.due:
            checkpoint.save(gathering.rows, gathering.arrays())
            gathering.saved = gathering.rows
