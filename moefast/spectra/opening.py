"""Files of any layout opened as one set of spectra on a model's grid, and where each of its rows comes from.

Design: a file says by its content what it is. Files of one star each are put together, many in a shard; which file a
row came from, `Origins` tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import WaveGridError
from moefast.core.regular import refuse_special
from moefast.spectra.layouts.pfsspec import survey_file
from moefast.spectra.layouts.registry import SurveyFile, open_survey_file
from moefast.spectra.prepared import Preparation, PreparedShard
from moefast.spectra.shard import Shard
from moefast.spectra.source import Failure, OnError
from moefast.spectra.spectrum_set import SpectrumSet, open_spectra
from moefast.spectra.wave import describe_difference, same_wave

__all__ = ["Origins", "open_as_found", "open_measured", "open_prepared"]

TOGETHER = 4096
"""Files of one star each that become one shard."""
LEAST_OVERLAP = 0.5
"""Share of the model's grid that an HDF5 file on another grid must cover."""
_HDF5 = b"\x89HDF\r\n\x1a\n"


def open_prepared(
    paths: str | Path | Iterable[str | Path],
    preparation: Preparation,
    *,
    on_error: OnError = "raise",
) -> SpectrumSet:
    """Open spectrum files of any layout as one set on the grid of `preparation`; see `moefast.spectra.open_spectra`.

    HDF5 files of the simulator that lie on the grid and are not to be shifted are read as they are.
    """
    spectra = open_spectra(paths, on_error=on_error, open_shard=lambda path: _open(path, preparation))
    return SpectrumSet(_put_together(spectra.shards, preparation), spectra.failures)


def open_as_found(
    paths: str | Path | Iterable[str | Path],
    grid: Callable[[], NDArray[np.float64]],
    *,
    on_error: OnError = "raise",
) -> SpectrumSet:
    """Open spectrum files to look at: HDF5 files on the grid that they have, others on `grid`, asked for if needed."""

    def open_shard(path: Path) -> Shard:
        return PreparedShard([open_survey_file(path)], Preparation(grid())) if _is_fits(path) else Shard(path)

    return open_spectra(paths, on_error=on_error, open_shard=open_shard)


def _is_fits(path: Path) -> bool:
    """Whether a file is FITS, or calls itself so; one that cannot be opened is left to those who will say why."""
    refuse_special(path)
    try:
        with open(path, "rb") as file:
            head = file.read(len(_HDF5))
    except OSError:
        return False
    return head != _HDF5 and (head.startswith((b"SIMPLE  ", b"\x1f\x8b")) or ".fit" in path.name.lower())


def open_measured(path: Path) -> SurveyFile:
    """Open a spectrum file of any layout, to read its spectra as they were measured."""
    return open_survey_file(path) if _is_fits(path) else survey_file(Shard(path))


def _open(path: Path, preparation: Preparation) -> Shard:
    if _is_fits(path):
        return PreparedShard([open_survey_file(path)], preparation)
    shard = Shard(path)
    elsewhere = not same_wave(shard.wave, preparation.wave)
    as_it_is = not preparation.moving and preparation.medium != "air" and preparation.telluric != "mask"
    if not elsewhere and as_it_is:
        return shard
    found = survey_file(shard)
    if elsewhere:
        low, high = preparation.wave[0], preparation.wave[-1]
        covered = (min(high, shard.wave[-1]) - max(low, shard.wave[0])) / (high - low)
        if covered < LEAST_OVERLAP:
            raise WaveGridError(
                f"{path}: spectrumdataset/wave covers {max(0.0, covered):.0%} of the model's, {LEAST_OVERLAP:.0%} at "
                f"least are needed: {describe_difference(shard.wave, preparation.wave)}. Choose another model with -m, "
                "or fit one on spectra of this grid"
            )
        found.notes.append(
            "spectra on another grid than the model's are resampled: "
            f"{describe_difference(shard.wave, preparation.wave)}; log g is right only if they were taken with the "
            "same line-spread function"
        )
    return PreparedShard([found], preparation)


def _put_together(shards: Sequence[Shard], preparation: Preparation) -> list[Shard]:
    """Neighbours that hold one star each become one shard."""
    out: list[Shard] = []
    group: list[SurveyFile] = []

    def finish() -> None:
        if group:
            out.append(PreparedShard(group, preparation))
            group.clear()

    for shard in shards:
        alone = isinstance(shard, PreparedShard) and shard.n_rows == 1 and len(shard.files[0].arrays) == 1
        if not alone or len(group) == TOGETHER or (group and group[0].layout != shard.layout["flux"]):
            finish()
        if alone:
            group.append(shard.files[0])  # type: ignore[attr-defined]
        else:
            out.append(shard)
    finish()
    return out


class Origins:
    """Which file, and which row there, every row of a set comes from.

    Attributes
    ----------
    paths : list of Path
        All files, in order.
    """

    def __init__(self, spectra: SpectrumSet) -> None:
        self._spectra = spectra
        self.paths: list[Path] = []
        self._first_file: list[int] = []
        for shard in spectra.shards:
            self._first_file.append(len(self.paths))
            self.paths += shard.paths if isinstance(shard, PreparedShard) else (shard.path,)

    def of(self, shard: int, start: int, stop: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Index of the file and row there, of rows `start` to `stop` of a shard."""
        one = self._spectra.shards[shard]
        rows = np.arange(start, stop, dtype=np.int64)
        first = self._first_file[shard]
        if not isinstance(one, PreparedShard) or len(one.files) == 1:
            return np.full(stop - start, first, np.int32), rows
        index = np.searchsorted(one.first_rows, rows, side="right") - 1
        return (first + index).astype(np.int32), rows - one.first_rows[index]

    def faults(self, start: int, stop: int) -> list[Failure]:
        """Rows of the set that were handed out without a good pixel because of a fault."""
        out = []
        for shard, base in zip(self._spectra.shards, self._spectra.first_rows, strict=False):
            if isinstance(shard, PreparedShard):
                for row, error in sorted(shard.faults.items()):
                    at = int(base) + row
                    if start <= at < stop:
                        out.append(Failure(shard.paths[shard.origin(row)[0]], (at, at + 1), error))
        return out
