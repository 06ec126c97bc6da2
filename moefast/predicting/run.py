"""The rows of a run: block by block they are predicted, flagged, written and counted."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import InputError
from moefast.core.labels import plausible
from moefast.core.metrics import SquaredErrors
from moefast.core.outputs import HEADLINE, VELOCITY
from moefast.core.progress import RowProgress
from moefast.core.threads import map_in_order
from moefast.mixture import Prediction
from moefast.model import Model
from moefast.predicting.columns import columns_of
from moefast.predicting.engines import Engine, joined, score_block, warm_up
from moefast.predicting.identifiers import as_identifiers
from moefast.predicting.source import Source
from moefast.predicting.table import LOST, Sink, fill_gap, lead_columns
from moefast.predicting.velocities import score_moving, velocity_columns
from moefast.spectra.prepared import PreparedShard
from moefast.spectra.quality import Flag, Quality
from moefast.spectra.source import Block, Failure

__all__ = ["LOOKED_AT", "TABLE_ROWS", "Counts", "PredictionRun"]

TABLE_ROWS = 16384
"""Rows that are flagged and written to the table together: a few bytes each, many calls otherwise."""
LOOKED_AT = 50_000
"""Rows, about, whose χ² tells whether spectra as a whole are what the model knows."""


@dataclass(frozen=True)
class _Scored:
    """A scored block: its first row in the set, its shard, params, what the engine gave, and velocities if fitted."""

    first_row: int
    shard: int
    params: dict[str, NDArray]
    result: Prediction
    quality: Quality
    velocity: NDArray
    velocity_error: NDArray


@dataclass
class Counts:
    """What is counted while rows are written.

    Attributes
    ----------
    flags : dict of str to int
        Rows per flag.
    squared_errors : SquaredErrors
        Of the rows with a label.
    chi2, snr : list of array
        Of some of the rows.
    """

    flags: dict[str, int] = field(default_factory=dict)
    squared_errors: SquaredErrors = field(default_factory=SquaredErrors)
    chi2: list[NDArray] = field(default_factory=list)
    snr: list[NDArray] = field(default_factory=list)

    def add_flag(self, flag: Flag, n: int) -> None:
        """Count rows with a flag."""
        if n:
            self.flags[str(flag.name)] = self.flags.get(str(flag.name), 0) + n

    @property
    def unlike(self) -> int:
        """Rows that are unlike the training set."""
        return self.flags.get(str(Flag.UNLIKE_TRAINING.name), 0)


class PredictionRun:
    """Rows of a source on their way through an engine into a table.

    Attributes
    ----------
    counts : Counts
    """

    def __init__(self, model: Model, engine: Engine, source: Source, sink: Sink) -> None:
        self.model, self.engine, self.source, self.sink = model, engine, source, sink
        self.counts = Counts()
        self._every = 1 + (source.stop - source.start) // LOOKED_AT
        self._params = [*source.identifiers, HEADLINE] if source.labelled else list(source.identifiers)

    def prepare(self) -> None:
        """Load and compute what all rows share, before the clock starts."""
        warm_up(self.engine, self.model.mixture.n_pixels)
        if self.source.fit is not None:
            self.source.fit.prepare()

    def go(self, progress: RowProgress) -> None:
        """Predict, flag and write all rows, those that cannot be read among them."""
        source, spectra = self.source, self.source.spectra
        blocks = spectra.unfilled(
            self.engine.block_rows,
            array=source.array,
            rows=(source.start, source.stop),
            params=self._params,
        )
        position, waiting, last = source.start, list[_Scored](), 0
        # The clock of the rate starts here.
        progress(0, source.stop - source.start)
        # Two workers at least: one waits for the disk while the other computes.
        with closing(spectra):
            for shard, part in map_in_order(self._score, blocks, max(2, self.engine.workers)):
                if shard != last:
                    # Those who filled blocks after the last one was taken have left it open.
                    spectra.shards[last].close()
                    last = shard
                if isinstance(part, Failure):
                    if not source.several:
                        raise part.error
                    spectra.failures.append(part)
                    continue
                n_waiting = position - waiting[0].first_row if waiting else 0
                if (
                    part.first_row != position
                    or n_waiting >= TABLE_ROWS
                    or (waiting and waiting[0].shard != part.shard)
                ):
                    self._write(waiting)
                    self._fill(position, part.first_row)
                waiting.append(part)
                position = part.first_row + len(part.result.log_g)
                progress(position - source.start, source.stop - source.start)
        self._write(waiting)
        self._fill(position, source.stop)

    def _score(self, block: Block) -> tuple[int, _Scored | Failure]:
        """Index of the shard of a block, and what becomes of the block."""
        source, spectra = self.source, self.source.spectra
        shard, first_row = spectra.shards[block.shard], block.first_row - int(spectra.first_rows[block.shard])
        velocity, velocity_error = np.zeros(len(block)), np.full(len(block), np.nan)
        if (
            source.fit is not None
            and isinstance(shard, PreparedShard)
            and source.is_fitted(shard)
            and block.problem is None
        ):
            result, quality, fitted = score_moving(
                self.engine, source.fit, shard, block, first_row, source.given
            )
            velocity, velocity_error = fitted.velocity, fitted.error
        else:
            with self.engine.place() as place:
                try:
                    spectra.fill(block, place)
                except InputError as error:
                    return block.shard, spectra.lost(block, error)
                result, quality = score_block(place, block, first_row)
        return block.shard, _Scored(
            block.first_row, block.shard, block.params, result, quality, velocity, velocity_error
        )

    def _write(self, parts: list[_Scored]) -> None:
        """Flag rows of one file that follow each other, and write them; none of them waits any longer."""
        if not parts:
            return
        source, first, shard = self.source, parts[0].first_row, parts[0].shard
        columns = columns_of(
            self.model, joined([p.result for p in parts]), joined([p.quality for p in parts])
        )
        params = {name: np.concatenate([p.params[name] for p in parts]) for name in self._params}
        n, begin = len(columns["log_g"]), first - int(source.spectra.first_rows[shard])
        chosen = source.wanted[first : first + n]
        if not chosen.all():
            columns, params = ({k: v[chosen] for k, v in each.items()} for each in (columns, params))
        lead = lead_columns(source.origins, shard, (begin, begin + n), chosen, source.several)
        lead |= {name: as_identifiers(params[name], dtype) for name, dtype in source.identifiers.items()}
        lead |= velocity_columns(source.velocity, first, chosen)
        if source.fit is not None:
            nothing = (columns["flag"] & np.uint32(Flag.NO_DATA)) != 0
            for one, name in zip(VELOCITY, ("velocity", "velocity_error"), strict=True):
                values = np.concatenate([getattr(p, name) for p in parts])[chosen]
                # What was given is known of stars without data, too.
                lead[one.name] = np.where(nothing & (source.given is None), np.nan, values).astype(one.dtype)
        self.sink.write({**lead, **columns})
        self._count(columns, params)
        parts.clear()

    def _count(self, columns: dict[str, NDArray], params: dict[str, NDArray]) -> None:
        if self.source.labelled:
            known = plausible(HEADLINE, params[HEADLINE])
            self.counts.squared_errors.add(
                np.asarray(params[HEADLINE], np.float64)[known], columns["log_g"][known].astype(np.float64)
            )
        self.counts.chi2.append(columns["chi2"][:: self._every])
        self.counts.snr.append(columns["snr_norm"][:: self._every])
        for flag in Flag:
            self.counts.add_flag(flag, int(np.count_nonzero(columns["flag"] & np.uint32(flag))))

    def _fill(self, first: int, stop: int) -> None:
        """Account for rows that could not be read; of a single file they end the run instead."""
        source = self.source
        if first == stop or not source.several:
            return
        fill_gap(self.sink, source, first, stop)
        for flag in LOST:
            self.counts.add_flag(flag, int(source.wanted[first:stop].sum()))
        if source.labelled:
            labels = source.labels_between(first, stop)
            self.counts.squared_errors.add(labels, np.full(len(labels), np.nan))
