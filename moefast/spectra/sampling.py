"""A sample of the spectra of a set: a few runs of neighbouring rows, spread over it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import MoefastError
from moefast.spectra.prepared import PreparedShard
from moefast.spectra.quality import good_pixels
from moefast.spectra.spectrum_set import SpectrumSet

__all__ = ["SampledRows", "spread_rows", "take_sample"]

F64 = NDArray[np.float64]

MOST_ROWS, RUNS = 256, 16
"""Rows of a sample, and runs of neighbouring rows that they are read in."""
MOST_READS = 32
"""Reads of a sample: of rows that lie apart, or of files of one star each."""


@dataclass(frozen=True)
class SampledRows:
    """Rows of a set.

    Attributes
    ----------
    wave : array of shape (p,), Å
    flux, error : array of shape (n, p)
    good : array of shape (n, p), bool
    masked : array of shape (n, p), bool, or None
        Pixels that the file's mask says are bad, if there is one.
    rows : array of shape (n,), int64
        Which rows of the set they are.
    resampled : bool
        Whether pixels may have been rebinned, so that neighbours share their noise.
    """

    wave: F64
    flux: NDArray
    error: NDArray
    good: NDArray[np.bool_]
    rows: NDArray[np.int64]
    resampled: bool = False
    masked: NDArray[np.bool_] | None = None

    @classmethod
    def of(
        cls,
        wave: NDArray,
        flux: NDArray,
        error: NDArray,
        mask: NDArray[np.bool_] | None = None,
        *,
        rows: NDArray | None = None,
        resampled: bool = False,
    ) -> SampledRows:
        """A sample of spectra in memory; `mask` is True where a pixel is bad."""
        flux, error = np.ascontiguousarray(flux, np.float32), np.ascontiguousarray(error, np.float32)
        good = good_pixels(flux, error, mask)
        return cls(
            np.asarray(wave, np.float64),
            flux,
            error,
            np.ones(flux.shape, bool) if good is None else good,
            np.arange(len(flux)) if rows is None else np.asarray(rows, np.int64),
            resampled,
            None if mask is None else np.asarray(mask) != 0,
        )


def take_sample(
    spectra: SpectrumSet,
    *,
    array: str = "auto",
    rows: tuple[int, int] | None = None,
    wanted: NDArray[np.bool_] | None = None,
) -> SampledRows:
    """Rows spread over a set; those that cannot be read are left to whoever reads all.

    Parameters
    ----------
    spectra : SpectrumSet
    array : "auto", "flux" or "noisy"
        As `SpectrumSet.blocks` has it.
    rows : tuple of int, optional
        First row and the one after the last.
    wanted : array of shape (n_rows,), bool, optional
        Rows that count.
    """
    start, stop = rows or (0, spectra.n_rows)
    parts: list[tuple[NDArray, NDArray, NDArray, NDArray]] = []
    resampled = False
    for index, first, last in _runs(spectra, start, stop, wanted):
        shard, base = spectra.shards[index], int(spectra.first_rows[index])
        which = "noisy" if array != "flux" and "noisy" in shard.arrays else "flux"
        here = np.arange(base + first, base + last)
        try:
            flux, error = (shard.read(name, first, last) for name in (which, "error"))
            mask = shard.read("mask", first, last) if "mask" in shard.arrays else np.zeros(flux.shape, bool)
        except MoefastError:
            continue
        finally:
            shard.close()
        resampled |= isinstance(shard, PreparedShard)
        parts.append((flux, error, mask, here))
    if not parts:
        empty = np.empty((0, spectra.n_pixels), np.float32)
        return SampledRows.of(spectra.wave, empty, empty)
    flux, error, mask, found = (np.concatenate(each) for each in zip(*parts, strict=True))
    return SampledRows.of(spectra.wave, flux, error, mask, rows=found, resampled=resampled)


def spread_rows(n: int, each: int = MOST_ROWS // RUNS) -> NDArray[np.int64]:
    """Rows of a sample of `n`: `RUNS` runs of `each` neighbours, spread evenly."""
    firsts = np.linspace(0, max(n - each, 0), min(RUNS, -(-n // each))).astype(np.int64)
    return np.unique(firsts[:, None] + np.arange(min(each, n)))


def _runs(
    spectra: SpectrumSet, start: int, stop: int, wanted: NDArray[np.bool_] | None
) -> Iterator[tuple[int, int, int]]:
    """Shard, first row and the one after the last there, of runs that do not overlap."""
    places = None
    if wanted is not None and not wanted[start:stop].all():
        places = start + np.flatnonzero(wanted[start:stop])
    n = stop - start if places is None else len(places)
    each = MOST_ROWS // RUNS
    if any(isinstance(shard, PreparedShard) and len(shard.files) > 1 for shard in spectra.shards):
        each = MOST_READS // RUNS
    chosen = spread_rows(n, each)
    rows = start + chosen if places is None else places[chosen]
    if not rows.size:
        return
    shards = np.searchsorted(spectra.first_rows, rows, side="right") - 1
    runs = np.split(np.arange(len(rows)), 1 + np.flatnonzero((np.diff(rows) != 1) | (np.diff(shards) != 0)))
    for k in np.unique(np.linspace(0, len(runs) - 1, min(len(runs), MOST_READS)).astype(int)):
        index = int(shards[runs[k][0]])
        base = int(spectra.first_rows[index])
        yield index, int(rows[runs[k][0]]) - base, int(rows[runs[k][-1]]) + 1 - base
