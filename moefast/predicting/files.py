"""Streaming prediction: blocks of spectra in, rows of a table out, one for one and in order.

Design: on a CPU every core reads a small block and scores it while it lies in its cache; reading takes turns, so that
files are read in order. On a GPU large blocks follow one another through slots of pinned memory: one thread reads while
the others' blocks are copied and scored. What comes out, two hundred bytes a spectrum, is gathered, flagged and
appended to a table that gets its final name only when it is complete. Memory does not grow with the number of spectra.
A row's numbers depend on the row alone, so `--rows`, `--shard` and bad neighbours change nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import InputError, OutputError
from moefast.core.labels import plausible
from moefast.core.metrics import SquaredErrors
from moefast.core.outputs import HEADLINE, VELOCITY
from moefast.core.threads import map_in_order, one_blas_thread
from moefast.core.version import __version__
from moefast.mixture import Prediction
from moefast.model import Model
from moefast.posterior.mixture import PosteriorMixture
from moefast.posterior.velocities import DEFAULT_RANGE
from moefast.predicting.columns import columns_of, table_columns
from moefast.predicting.engines import joined, open_engine, score_block, warm_up
from moefast.predicting.identifiers import as_identifiers, carried_columns, identifier_dtype, present
from moefast.predicting.notes import notes_on_input, notes_on_params, notes_on_predictions
from moefast.predicting.summary import Summary
from moefast.predicting.table import LOST, Sink, fill_gap, lead_columns
from moefast.predicting.velocities import move, score_moving, velocity_columns, velocity_fit
from moefast.spectra import guard
from moefast.spectra.paths import find_files
from moefast.spectra.prepared import Origins, Preparation, PreparedShard, open_prepared
from moefast.spectra.quality import Flag, Quality
from moefast.spectra.selection import select as select_rows
from moefast.spectra.source import Block, Failure
from moefast.spectra.spectrum_set import SpectrumSet
from moefast.spectra.telluric import Telluric
from moefast.spectra.velocities import Velocities

__all__ = ["LOOKED_AT", "TABLE_ROWS", "choose_rows", "count_rows", "predict"]

TABLE_ROWS = 16384
"""Rows that are flagged and written to the table together: a few bytes each, many calls otherwise."""
LOOKED_AT = 50_000
"""Rows, about, whose χ² tells whether spectra as a whole are what the model knows."""


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


def predict(
    paths: str | Path | Iterable[str | Path],
    model: Model | str | Path | None = None,
    out: str | Path | None = None,
    *,
    array: Literal["auto", "flux", "noisy"] = "auto",
    backend: str = "auto",
    rows: tuple[int, int] | None = None,
    limit: int | None = None,
    shard: tuple[int, int] | None = None,
    overwrite: bool = False,
    velocity: float | str | Path | None = None,
    velocity_range: float = DEFAULT_RANGE,
    medium: Literal["auto", "vacuum", "air"] = "auto",
    telluric: Telluric = "auto",
    select: str | None = None,
    keep: Iterable[str] = (),
    record: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Summary:
    """Predict log g for every spectrum of one or more files.

    Parameters
    ----------
    paths : path, folder, pattern, or several
        Spectrum files of any layout in docs/formats.md. Spectra on another grid are resampled to the model's.
    model : Model, path of a model folder, or name of a shipped model, optional
        See `Model.load`; the first that is shipped if absent.
    out : path, optional
        Table to write: .h5, .parquet or .fits. Without it the table is returned in `Summary.columns`.
    array : "auto", "flux" or "noisy"
        Which array to score; "auto" is `noisy` where a file has it.
    backend : "auto", "cpu" or "cuda"
    rows : tuple of int, optional
        First row and the one after the last.
    limit : int, optional
        Score at most so many rows.
    shard : tuple of int, optional
        (i, N): score part i of N equal parts.
    overwrite : bool
        Replace an existing table.
    velocity : number, column, path or "fit", optional
        Velocities that are removed [km/s]: one for all, a column of the spectra, or a table that is joined by
        identifiers (see `moefast.spectra.velocities`). "fit": one is fitted to each spectrum, and predictions are
        averaged over its posterior; only by posteriors. Without it spectra of surveys are fitted if the model can, and
        all others, those of the simulator among them, are taken to be at rest.
    velocity_range : float
        Fitted velocities lie within so many km/s of 0, either way.
    medium : "auto", "vacuum" or "air"
        What wavelengths are in; "auto" is what the survey uses.
    telluric : "auto", "mask" or "keep"
        Whether pixels where the Earth's atmosphere absorbs count as bad; "auto" says so of spectra of surveys, not of
        the simulator's.
    select : str, optional
        Rows to predict, such as ``targetType == 1 and nVisit > 2``; the others get no row in the table.
    keep : iterable of str
        Columns of the input that go into the table besides identifiers.
    record : mapping, optional
        What the caller wants to find again in the table's attribute ``made_of``: numbers, text, lists and mappings.
    progress : callable, optional
        Called with rows done and rows in all.
    tell : callable, optional
        Called with each oddity before the first row is scored.

    Raises
    ------
    InputError, WaveGridError, ModelError, BackendError, OutputError
        With one file; with several, a file that cannot be read is left out and named in `Summary.failures`.
    """
    chosen = model if isinstance(model, Model) else Model.load(model)
    engine, where = open_engine(chosen.mixture, backend)
    keep = tuple(keep)
    preparation = Preparation(chosen.mixture.wave, medium, moving=velocity is not None, telluric=telluric)
    spectra, failures = _open(paths, preparation)
    origins = Origins(spectra)
    if out is not None and any(_same_file(out, path) for path in origins.paths):
        raise OutputError(f"{out}: is one of the inputs; choose another name for the table")
    several = len(origins.paths) > 1 or bool(failures)
    start, stop = choose_rows(spectra.n_rows, rows, limit, shard)
    scored = sorted({"noisy" if array != "flux" and "noisy" in s.arrays else "flux" for s in spectra.shards})
    if array == "noisy" and scored != ["noisy"]:
        lacking = next(s.path for s in spectra.shards if "noisy" not in s.arrays)
        raise InputError(f"{lacking}: dataset/arrays/noisy/value is missing; use --array flux or auto")
    wanted_rows = np.zeros(spectra.n_rows, bool)
    wanted_rows[start:stop] = True
    if select is not None:
        wanted_rows &= select_rows(select, lambda names: spectra.params(present(spectra, names, "--select")))
        if not wanted_rows.any():
            raise InputError(f"--select {select!r}: holds for none of the rows {start}:{stop}")
    n_out = int(wanted_rows.sum())
    fit = velocity_fit(chosen, spectra, velocity, velocity_range)
    moved = fit if fit is not None or velocity is None else move(spectra, velocity, wanted_rows)
    ids = {name: identifier_dtype(spectra, name) for name in carried_columns(spectra, keep)}
    labelled = spectra.has_labels((HEADLINE,))
    layout = table_columns(chosen.mixture, ids, several, moved)
    if len({column.name for column in layout}) < len(layout):
        ours = {column.name for column in table_columns(chosen.mixture, {}, several, moved)}
        raise InputError(
            f"--keep {', '.join(sorted(ours & set(ids)))}: the table has a column of this name of its own; name others"
        )
    about_params = notes_on_params(spectra, ids, labelled)
    attrs: dict[str, Any] = {
        "moefast_version": __version__,
        "model": chosen.name,
        "model_sha256": chosen.hash,
        "inputs": [str(path) for path in origins.paths],
        "input_sha256": spectra.fingerprint(),
        "array": "+".join(scored),
        "telluric": telluric,
        "rows": f"{start}:{stop}",
        "backend": where.name,
        "device": where.device,
        "backend_reason": where.reason,
    }
    attrs["options"] = {
        "limit": limit, "velocity": None if velocity is None else str(velocity), "medium": medium,
        "telluric": telluric, "select": select, "keep": list(keep),
    }  # fmt: skip
    if record is not None:
        attrs["made_of"] = dict(record)
    if shard is not None:
        attrs["shard"] = f"{shard[0]}/{shard[1]}"
    if select is not None:
        attrs["select"] = select
    if moved is not None:
        attrs["velocity"] = (
            moved.source if isinstance(moved, Velocities) else f"fitted within {moved.largest:g} km/s"
        )
    summary = Summary(
        backend=where.name,
        device=where.device,
        reason=where.reason,
        array="+".join(scored),
        model=chosen.name,
        failures=failures,
    )
    sample = guard.take(spectra, array=array, rows=(start, stop), wanted=wanted_rows)
    free_scale = isinstance(chosen.mixture, PosteriorMixture)
    for odd in guard.look(sample, chosen.mixture.reference, free_scale=free_scale, array=summary.array):
        summary.oddities.append(odd.words)
        if tell is not None:
            tell(odd.words)
    sink = Sink(out, n_out, layout, attrs, overwrite)
    r2, looked_at, unlike = SquaredErrors(), list[tuple[NDArray, NDArray]](), 0
    every = 1 + (stop - start) // LOOKED_AT
    wanted = [*ids, HEADLINE] if labelled else list(ids)

    def fill(first: int, last: int) -> None:
        """Account for rows that could not be read; of a single file they end the run instead."""
        if first == last or not several:
            return
        fill_gap(sink, spectra, origins, first, last, ids, wanted_rows, moved)
        lost = int(wanted_rows[first:last].sum())
        for f in LOST:
            summary.flags[str(f.name)] = summary.flags.get(str(f.name), 0) + lost
        if labelled:
            lost_labels = _labels_between(spectra, first, last, wanted_rows)
            r2.add(lost_labels, np.full(len(lost_labels), np.nan))

    def score(block: Block) -> _Scored:
        base = int(spectra.first_rows[block.shard])
        shard = spectra.shards[block.shard]
        if fit is not None and isinstance(shard, PreparedShard) and (velocity is not None or shard.observed):
            which = "noisy" if array != "flux" and "noisy" in shard.arrays else "flux"
            result, quality, fitted = score_moving(engine, fit, shard, which, block, block.first_row - base)
            moving = (fitted.velocity, fitted.error)
        else:
            result, quality = score_block(engine, block, block.first_row - base)
            moving = (np.zeros(len(block)), np.full(len(block), np.nan))
        return _Scored(block.first_row, block.shard, block.params, result, quality, *moving)

    def write(parts: list[_Scored]) -> None:
        """Flag rows of one file that follow each other, and write them."""
        nonlocal unlike
        if not parts:
            return
        first, shard = parts[0].first_row, parts[0].shard
        columns = columns_of(chosen, joined([p.result for p in parts]), joined([p.quality for p in parts]))
        params = {name: np.concatenate([p.params[name] for p in parts]) for name in wanted}
        n, begin = len(columns["log_g"]), first - int(spectra.first_rows[shard])
        chosen_rows = wanted_rows[first : first + n]
        if not chosen_rows.all():
            columns, params = ({k: v[chosen_rows] for k, v in each.items()} for each in (columns, params))
        lead = lead_columns(origins, shard, (begin, begin + n), chosen_rows, several)
        lead |= {name: as_identifiers(params[name], dtype) for name, dtype in ids.items()}
        lead |= velocity_columns(moved, first, chosen_rows)
        if fit is not None:
            nothing = (columns["flag"] & np.uint32(Flag.NO_DATA)) != 0
            for one, name in zip(VELOCITY, ("velocity", "velocity_error"), strict=True):
                values = np.concatenate([getattr(p, name) for p in parts])[chosen_rows]
                lead[one.name] = np.where(nothing, np.nan, values).astype(one.dtype)
        sink.write({**lead, **columns})
        if labelled:
            known = plausible(HEADLINE, params[HEADLINE])
            r2.add(
                np.asarray(params[HEADLINE], np.float64)[known], columns["log_g"][known].astype(np.float64)
            )
        looked_at.append((columns["chi2"][::every], columns["snr_norm"][::every]))
        unlike += int(np.count_nonzero(columns["flag"] & np.uint32(Flag.UNLIKE_TRAINING)))
        for f in Flag:
            count = int(np.count_nonzero(columns["flag"] & np.uint32(f)))
            if count:
                summary.flags[str(f.name)] = summary.flags.get(str(f.name), 0) + count
        parts.clear()

    warm_up(engine, chosen.mixture.n_pixels)
    if fit is not None:
        fit.prepare()
        for each in spectra.shards:
            if isinstance(each, PreparedShard):
                each.keep_measured()
    begin = time.perf_counter()
    with sink, one_blas_thread():
        position, waiting = start, list[_Scored]()
        blocks = spectra.blocks(
            engine.block_rows,
            array=array,
            rows=(start, stop),
            params=wanted,
            # Workers read for themselves; a single one reads ahead.
            prefetch=engine.workers == 1,
            on_error="skip" if several else "raise",
        )
        for part in map_in_order(score, blocks, engine.workers):
            n_waiting = position - waiting[0].first_row if waiting else 0
            if (
                part.first_row != position
                or n_waiting >= TABLE_ROWS
                or (waiting and waiting[0].shard != part.shard)
            ):
                write(waiting)
                fill(position, part.first_row)
            waiting.append(part)
            position = part.first_row + len(part.result.log_g)
            if progress is not None:
                progress(position - start, stop - start)
        write(waiting)
        summary.failures = [*spectra.failures, *origins.faults(start, stop)]
        fill(position, stop)
        summary.n_rows = n_out
        summary.seconds = time.perf_counter() - begin
        summary.spectra_per_second = summary.n_rows / summary.seconds
        summary.r2 = r2.r2() if labelled else None
        summary.notes = [
            *notes_on_input(spectra, moved, chosen, velocity),
            *notes_on_predictions(looked_at, unlike, summary, chosen),
            *about_params,
        ]
        sink.attrs.update(
            seconds=summary.seconds,
            spectra_per_second=summary.spectra_per_second,
            oddities=summary.oddities,
            notes=summary.notes,
            failures=[str(failure.error) for failure in summary.failures],
        )
        if labelled:
            sink.attrs["squared_errors"] = r2.numbers()
        if summary.r2 is not None:
            sink.attrs["r2"] = summary.r2
    summary.columns = sink.columns
    return summary


def count_rows(paths: str | Path | Iterable[str | Path], model: Model) -> int:
    """Rows that `predict` would find in the files.

    Raises
    ------
    InputError, WaveGridError
        As `predict`.
    """
    return _open(paths, Preparation(model.mixture.wave))[0].n_rows


def _open(
    paths: str | Path | Iterable[str | Path], preparation: Preparation
) -> tuple[SpectrumSet, list[Failure]]:
    """Open the files; with several, those that cannot be used are left out."""
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    try:
        alone = len(find_files(given)) == 1
    except InputError:
        alone = len(given) == 1
    spectra = open_prepared(given, preparation, on_error="raise" if alone else "skip")
    return spectra, list(spectra.failures)


def _same_file(first: str | Path, second: Path) -> bool:
    try:
        return Path(first).samefile(second)
    except OSError:
        return False


def _labels_between(spectra: SpectrumSet, first: int, last: int, wanted: NDArray[np.bool_]) -> NDArray:
    """Labels of rows that could not be read, as far as they are labels."""
    parts = []
    for index, base in enumerate(spectra.first_rows[:-1].tolist()):
        low, high = max(first, base), min(last, int(spectra.first_rows[index + 1]))
        if low < high:
            values = spectra.shards[index].params([HEADLINE], low - base, high - base)[HEADLINE][
                wanted[low:high]
            ]
            parts.append(np.asarray(values, np.float64)[plausible(HEADLINE, values)])
    return np.concatenate(parts) if parts else np.empty(0)


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
