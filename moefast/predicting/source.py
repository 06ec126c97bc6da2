"""What a run predicts: the spectra, the rows that are wanted, their velocities and what is carried along."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import InputError
from moefast.core.labels import plausible
from moefast.core.outputs import HEADLINE
from moefast.model import Model
from moefast.posterior.velocities import VelocityFit
from moefast.predicting.identifiers import carried_columns, identifier_dtypes, present
from moefast.predicting.velocities import fit_beside, move, velocity_fit
from moefast.spectra.opening import Origins, open_prepared
from moefast.spectra.paths import find_files, words_on_repeated
from moefast.spectra.prepared import Preparation, PreparedShard
from moefast.spectra.selection import select as select_rows
from moefast.spectra.shard import Shard
from moefast.spectra.source import Failure
from moefast.spectra.spectrum_set import SpectrumSet
from moefast.spectra.targets import rows_of_targets
from moefast.spectra.velocities import Velocities

__all__ = ["Source", "choose_rows", "open_files", "open_source"]


@dataclass(frozen=True)
class Source:
    """What a run predicts.

    Attributes
    ----------
    spectra : SpectrumSet
    origins : Origins
        Where its rows came from.
    several : bool
        Whether there is more than one file; then what cannot be read is left out, and does not end the run.
    array : "auto", "flux" or "noisy"
        Which array is predicted.
    start, stop : int
        First row and the one after the last.
    wanted : array of shape (n,), bool
        Rows of the set that get a row in the table.
    velocity : Velocities, VelocityFit or None
        Velocities that were given, or what fits them.
    weighed_by : VelocityFit or None
        What weighs given velocities with what the spectra say, if errors are so large that it matters.
    asked : bool
        Whether something was said about velocities: if not, those of spectra of surveys alone are fitted.
    identifiers : dict of str to dtype
        Columns of the input that go into the table.
    labelled : bool
        Whether all files have labels.
    notes : list of str
        What users must know of the choice of rows.
    """

    spectra: SpectrumSet
    origins: Origins
    several: bool
    array: Literal["auto", "flux", "noisy"]
    start: int
    stop: int
    wanted: NDArray[np.bool_]
    velocity: Velocities | VelocityFit | None
    weighed_by: VelocityFit | None
    asked: bool
    identifiers: dict[str, np.dtype]
    labelled: bool
    notes: list[str]

    @property
    def n_wanted(self) -> int:
        """Rows of the table."""
        return int(self.wanted.sum())

    @property
    def fit(self) -> VelocityFit | None:
        """What fits velocities, if that is done."""
        return self.velocity if isinstance(self.velocity, VelocityFit) else self.weighed_by

    @property
    def given(self) -> Velocities | None:
        """Velocities that were given."""
        return self.velocity if isinstance(self.velocity, Velocities) else None

    @property
    def velocity_words(self) -> str:
        """Where velocities come from, in words; empty if there are none."""
        if isinstance(self.velocity, VelocityFit):
            return f"fitted within {self.velocity.largest:g} km/s"
        return "" if self.velocity is None else self.velocity.source

    def is_fitted(self, shard: PreparedShard) -> bool:
        """Whether velocities of the stars of a file are fitted, where any are."""
        return self.asked or shard.observed

    @property
    def arrays(self) -> str:
        """Names of the arrays that are predicted, joined by +."""
        return "+".join(sorted({_array_of(self.array, shard) for shard in self.spectra.shards}))

    def labels_between(self, first: int, last: int) -> NDArray:
        """Labels of wanted rows that could not be read, as far as they are labels."""
        parts = []
        for index, base in enumerate(self.spectra.first_rows[:-1].tolist()):
            low, high = max(first, base), min(last, int(self.spectra.first_rows[index + 1]))
            if low < high:
                values = self.spectra.shards[index].params([HEADLINE], low - base, high - base)[HEADLINE]
                values = values[self.wanted[low:high]]
                parts.append(np.asarray(values, np.float64)[plausible(HEADLINE, values)])
        return np.concatenate(parts) if parts else np.empty(0)


def _array_of(array: str, shard: Shard) -> str:
    return "noisy" if array != "flux" and "noisy" in shard.arrays else "flux"


def choose_rows(
    n_rows: int,
    rows: tuple[int, int] | None = None,
    limit: int | None = None,
    shard: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """First row and the one after the last, of `rows`, cut to `limit`, or of part i of N.

    Raises
    ------
    InputError
        The rows lie outside the set or the parts make no sense.
    """
    start, stop = rows or (0, n_rows)
    if not 0 <= start < stop <= n_rows:
        raise InputError(f"rows {start}:{stop} asked for; the input has rows 0:{n_rows}")
    if shard is not None:
        index, count = shard
        if not 0 <= index < count:
            raise InputError(f"--shard {index}/{count}: the part must lie in 0…{count - 1}")
        size = stop - start
        start, stop = start + size * index // count, start + size * (index + 1) // count
    if limit is not None:
        if limit < 1:
            raise InputError(f"--limit {limit}: at least one row must be asked for")
        stop = min(stop, start + limit)
    return start, stop


def open_files(
    paths: str | Path | Iterable[str | Path], preparation: Preparation
) -> tuple[SpectrumSet, list[Failure], list[str]]:
    """Open the files; with several, those that cannot be used are left out. Also notes on how they were named."""
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    repeated: dict[Path, None] = {}
    try:
        alone = len(find_files(given, repeated)) == 1
    except InputError:
        alone = len(given) == 1
    spectra = open_prepared(given, preparation, on_error="raise" if alone else "skip")
    return spectra, list(spectra.failures), words_on_repeated(repeated)


def open_source(
    spectra: SpectrumSet,
    origins: Origins,
    model: Model,
    *,
    several: bool,
    array: Literal["auto", "flux", "noisy"],
    rows: tuple[int, int],
    velocity: float | str | Path | None,
    velocity_range: float,
    select: str | None,
    targets: str | Path | None,
    keep: Iterable[str],
) -> Source:
    """What is asked for of opened spectra; for the parameters see `moefast.predicting.files.predict`.

    Raises
    ------
    InputError
        The files do not have what is asked for.
    """
    start, stop = rows
    notes: list[str] = []
    lacking = [shard for shard in spectra.shards if array == "noisy" and "noisy" not in shard.arrays]
    if lacking:
        raise InputError(
            f"{lacking[0].path}: dataset/arrays/noisy/value is missing; use --array flux or auto"
        )
    wanted = np.zeros(spectra.n_rows, bool)
    wanted[start:stop] = True
    if select is not None:
        wanted &= select_rows(select, lambda names: spectra.params(present(spectra, names, "--select")))
        if not wanted.any():
            raise InputError(f"--select {select!r}: holds for none of the rows {start}:{stop}")
    if targets is not None:
        wanted &= rows_of_targets(targets, spectra, notes)
        if not wanted.any():
            raise InputError(f"--targets {targets}: none of them is among the rows that are left to predict")
    fit = velocity_fit(model, spectra, velocity, velocity_range)
    given = None if fit is not None or velocity is None else move(spectra, velocity, wanted)
    return Source(
        spectra=spectra,
        origins=origins,
        several=several,
        array=array,
        start=start,
        stop=stop,
        wanted=wanted,
        velocity=fit if given is None else given,
        weighed_by=None if given is None else fit_beside(model, spectra, given, wanted, velocity_range),
        asked=velocity is not None,
        identifiers=identifier_dtypes(spectra, carried_columns(spectra, keep)),
        labelled=spectra.has_labels((HEADLINE,)),
        notes=notes,
    )
