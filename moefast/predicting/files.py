"""Streaming prediction: blocks of spectra in, rows of a table out, one for one and in order.

Design: every worker takes the next block, reads it to where its engine wants it and scores it there: on a CPU each core
a small one that stays in its cache, on a GPU large ones in slots of pinned memory, from which the device copies them.
Workers read side by side where the file allows it; what must be decoded is read in turns, in order. What comes out, two
hundred bytes a spectrum, is gathered in the order of the rows, flagged and appended to a table that gets its final name
only when it is complete. Memory does not grow with the number of spectra. A row's numbers depend on the row alone, so
`--rows`, `--shard` and bad neighbours change nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from moefast.backend import Backend
from moefast.core.errors import InputError, OutputError
from moefast.core.progress import LOGGER, RowProgress, row_progress
from moefast.core.threads import one_blas_thread
from moefast.core.version import __version__
from moefast.model import Model
from moefast.posterior.mixture import PosteriorMixture
from moefast.posterior.velocities import DEFAULT_RANGE, VelocityFit
from moefast.predicting.columns import table_columns
from moefast.predicting.decisions import decisions_on_input, decisions_on_model
from moefast.predicting.engines import open_engine
from moefast.predicting.notes import notes_on_input, notes_on_params, notes_on_predictions
from moefast.predicting.run import PredictionRun
from moefast.predicting.source import Source, choose_rows, open_files, open_source
from moefast.predicting.summary import Summary
from moefast.predicting.table import Sink
from moefast.predicting.velocities import fit_on, range_unused
from moefast.spectra.oddities import find_oddities
from moefast.spectra.opening import Origins
from moefast.spectra.paths import content_of
from moefast.spectra.prepared import Preparation
from moefast.spectra.sampling import take_sample
from moefast.spectra.tables import Column, refuse_table
from moefast.spectra.telluric import Telluric

__all__ = ["count_rows", "predict"]


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
    targets: str | Path | None = None,
    keep: Iterable[str] = (),
    record: Mapping[str, Any] | None = None,
    progress: RowProgress | Literal[False] | None = None,
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
        identifiers (see `moefast.spectra.velocities`). Where they have errors above 5 km/s and the model is a
        posterior, each is weighed with what the spectrum says. "fit": one is fitted to each spectrum, and predictions
        are averaged over its posterior; only by posteriors. Without it spectra of surveys are fitted if the model can,
        and all others, those of the simulator among them, are taken to be at rest.
    velocity_range : float
        Fitted velocities lie within so many km/s of 0, either way.
    medium : "auto", "vacuum" or "air"
        What wavelengths are in; "auto" is what the survey uses.
    telluric : "auto", "mask" or "keep"
        Whether pixels where the Earth's atmosphere absorbs count as bad; "auto" says so of spectra of surveys, not of
        the simulator's.
    select : str, optional
        Rows to predict, such as ``targetType == 1 and nVisit > 2``; the others get no row in the table.
    targets : path or text, optional
        Rows to predict: those of the targets in a table with identifiers, in a file with one in each line, or named
        with commas between them; see `moefast.spectra.targets`.
    keep : iterable of str
        Columns of the input that go into the table besides identifiers.
    record : mapping, optional
        What the caller wants to find again in the table's attribute ``made_of``: numbers, text, lists and mappings.
    progress : callable, optional
        Called with rows done and rows in all. Without it a line shows them in notebooks and interactive sessions;
        False leaves it out.
    tell : callable, optional
        Called with each oddity before the first row is scored.

    Raises
    ------
    InputError, WaveGridError, ModelError, BackendError, OutputError
        With one file; with several, a file that cannot be read is left out and named in `Summary.failures`.
    """
    if not (velocity is None or isinstance(velocity, str | Path | Real)):
        raise InputError(
            "velocity: a number in km/s, the name of a column, a table or 'fit' expected, found "
            f"{type(velocity).__name__}"
        )
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    if out is not None:
        # Before anything is read.
        _refuse_input(out, given)
        refuse_table(out, overwrite=overwrite)
    chosen = model if isinstance(model, Model) else Model.load(model)
    engine, where = open_engine(chosen.mixture, backend)
    _tell(decisions_on_model(chosen, engine, where))
    keep = (keep,) if isinstance(keep, str) else tuple(keep)
    preparation = Preparation(chosen.mixture.wave, medium, moving=velocity is not None, telluric=telluric)
    spectra, failures, repeated = open_files(given, preparation)
    origins = Origins(spectra)
    if out is not None:
        _refuse_input(out, origins.paths)
    source = open_source(
        spectra,
        origins,
        chosen,
        several=len(origins.paths) > 1 or bool(failures),
        array=array,
        rows=choose_rows(spectra.n_rows, rows, limit, shard),
        velocity=velocity,
        velocity_range=velocity_range,
        select=select,
        targets=targets,
        keep=keep,
    )
    _tell(decisions_on_input(source, preparation))
    where = fit_on(engine, source.fit, where, backend)
    layout = _layout(chosen, source)
    about_params = notes_on_params(spectra, source.identifiers, source.labelled)
    options = {
        "limit": limit, "velocity": None if velocity is None else str(velocity), "medium": medium,
        "telluric": telluric, "select": select, "targets": None if targets is None else str(targets),
        "keep": list(keep), "velocity_range": None if source.fit is None else source.fit.largest,
        "velocity_sha256": content_of(velocity), "targets_sha256": content_of(targets),
    }  # fmt: skip
    attrs = _attributes(chosen, source, where, options, record, shard)
    summary = Summary(
        backend=where.name,
        device=where.device,
        reason=where.reason,
        array=source.arrays,
        model=chosen.name,
        failures=failures,
    )
    _look(chosen, source, summary, tell)
    sink = Sink(out, source.n_wanted, layout, attrs, overwrite)
    run = PredictionRun(chosen, engine, source, sink)
    run.prepare()
    begin = time.perf_counter()
    with sink, one_blas_thread():
        with row_progress(progress, "predict") as report:
            run.go(report)
        _count(summary, run, time.perf_counter() - begin)
        summary.notes = [
            *repeated,
            *source.notes,
            *notes_on_input(spectra, source.velocity, chosen, velocity, weighed=source.weighed_by),
            *range_unused(source.fit, velocity_range),
            *notes_on_predictions(run.counts, summary, chosen),
            *about_params,
        ]
        _conclude(sink, summary, run)
    summary.columns = sink.columns
    return summary


def _tell(decisions: Iterable[str]) -> None:
    for words in decisions:
        LOGGER.info(words)


def _layout(model: Model, source: Source) -> list[Column]:
    """Columns of the table."""
    layout = table_columns(model.mixture, source.identifiers, source.several, source.velocity)
    if len({column.name for column in layout}) < len(layout):
        ours = {column.name for column in table_columns(model.mixture, {}, source.several, source.velocity)}
        raise InputError(
            f"--keep {', '.join(sorted(ours & set(source.identifiers)))}: the table has a column of this name of its "
            "own; name others"
        )
    return layout


def _attributes(
    model: Model,
    source: Source,
    where: Backend,
    options: Mapping[str, Any],
    record: Mapping[str, Any] | None,
    shard: tuple[int, int] | None,
) -> dict[str, Any]:
    """What a table says of its model, its input, the backend and what was asked for."""
    attrs = {
        "moefast_version": __version__,
        "model": model.name,
        "model_sha256": model.hash,
        "inputs": [str(path) for path in source.origins.paths],
        "input_sha256": source.spectra.fingerprint(),
        "array": source.arrays,
        "telluric": options["telluric"],
        "rows": f"{source.start}:{source.stop}",
        "backend": where.name,
        "device": where.device,
        "backend_reason": where.reason,
        "options": options,
    }
    if record is not None:
        attrs["made_of"] = dict(record)
    if shard is not None:
        attrs["shard"] = f"{shard[0]}/{shard[1]}"
    attrs |= {name: options[name] for name in ("select", "targets") if options[name] is not None}
    if source.velocity is not None:
        attrs["velocity"] = source.velocity_words
    return attrs


def _look(model: Model, source: Source, summary: Summary, tell: Callable[[str], None] | None) -> None:
    """Find and tell what is odd about the spectra as a whole."""
    rows = (source.start, source.stop)
    sample = take_sample(source.spectra, array=source.array, rows=rows, wanted=source.wanted)
    free_scale = isinstance(model.mixture, PosteriorMixture)
    at_rest = not isinstance(source.velocity, VelocityFit)
    for odd in find_oddities(
        sample,
        model.mixture.reference,
        free_scale=free_scale,
        array=summary.array,
        at_rest=at_rest,
        with_gaps=free_scale,
    ):
        summary.oddities.append(odd.words)
        if tell is not None:
            tell(odd.words)


def _count(summary: Summary, run: PredictionRun, seconds: float) -> None:
    """What became of the rows."""
    source = run.source
    summary.failures = [*source.spectra.failures, *source.origins.faults(source.start, source.stop)]
    summary.n_rows = source.n_wanted
    summary.seconds = seconds
    summary.spectra_per_second = summary.n_rows / seconds
    summary.flags = run.counts.flags
    summary.r2 = run.counts.squared_errors.r2() if source.labelled else None


def _conclude(sink: Sink, summary: Summary, run: PredictionRun) -> None:
    """Attributes of the table that are known only at the end."""
    sink.attrs.update(
        seconds=summary.seconds,
        spectra_per_second=summary.spectra_per_second,
        oddities=summary.oddities,
        notes=summary.notes,
        failures=[str(failure.error) for failure in summary.failures],
    )
    if run.source.labelled:
        sink.attrs["squared_errors"] = run.counts.squared_errors.numbers()
    if summary.r2 is not None:
        sink.attrs["r2"] = summary.r2


def count_rows(paths: str | Path | Iterable[str | Path], model: Model) -> int:
    """Rows that `predict` would find in the files.

    Raises
    ------
    InputError, WaveGridError
        As `predict`.
    """
    return open_files(paths, Preparation(model.mixture.wave))[0].n_rows


def _refuse_input(out: str | Path, paths: Iterable[str | Path]) -> None:
    if any(_same_file(out, path) for path in paths):
        raise OutputError(f"{out}: is one of the inputs; choose another name for the table")


def _same_file(first: str | Path, second: str | Path) -> bool:
    try:
        return Path(first).samefile(second)
    except OSError:
        return False
