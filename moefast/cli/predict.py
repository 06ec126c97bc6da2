"""The command `moefast predict`."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from moefast.cli.messages import detail, fail, tell_failures, tell_result, tell_written
from moefast.cli.options import (
    BACKEND,
    CONFIG,
    DEVICE,
    EXPERT,
    JSON,
    MEDIUM,
    MODEL,
    OF_TASK,
    OVERWRITE,
    TELLURIC,
    VELOCITY,
    VELOCITY_RANGE,
    names,
    rows,
    shard_of,
    talk,
)
from moefast.cli.spread import connected
from moefast.cli.swapped import swapped_told
from moefast.core.atomic import LONGEST_NAME, refuse_taken
from moefast.core.errors import InputError, OutputError
from moefast.core.progress import FILES, ProgressLine
from moefast.core.text import counted

if TYPE_CHECKING:
    from moefast.predicting.summary import Summary

__all__ = ["predict"]


@click.command(short_help="Predict log g: one row of a table per spectrum.")
@click.argument("files", nargs=-1, metavar="[FILE…]")
@click.option("--from-file", "listing", metavar="LIST",
              help="Text file that names a FILE on each line; - reads standard input.")  # fmt: skip
@MODEL
@click.option("-o", "--out", metavar="TABLE",
              help="Table to write: .h5, .parquet or .fits.  [default: <FILE>.log_g.h5 in this folder; with --shard "
              "<FILE>.log_g.i-of-N.h5]")  # fmt: skip
@click.option("--out-dir", "folder", metavar="FOLDER",
              help="Write a table for each input to this folder, instead of one for all; an input that fails does not "
              "end the run.")  # fmt: skip
@click.option("--format", "suffix", type=click.Choice(["h5", "parquet", "fits"]), default="h5", show_default=True,
              help="Format of the tables in --out-dir.")  # fmt: skip
@click.option("--skip-existing", is_flag=True,
              help="With --out-dir: leave out inputs whose table was made of this input, model and options; predict "
              "the others again.")  # fmt: skip
@click.option("--status", metavar="FILE",
              help="With --out-dir: CSV file with the state of each input, kept up to date.  [default: status.csv in "
              "the folder]")  # fmt: skip
@click.option("--array", type=click.Choice(["auto", "flux", "noisy"]), default="auto", show_default=True,
              help="Array to score; auto is noisy where a file has it.")  # fmt: skip
@BACKEND
@DEVICE
@click.option("--rows", callback=rows, metavar="FIRST:LAST", help="Score these rows only, LAST not included.")
@click.option("--limit", type=click.IntRange(1), metavar="N",
              help="Take the first N rows only; --select and --targets choose among them.")  # fmt: skip
@click.option("--shard", callback=shard_of, metavar="[i/N]", is_flag=False, flag_value=OF_TASK,
              help="Score part i (from 0) of N equal parts; without a value the part of this task of a SLURM job "
              "array. moefast merge joins the tables.")  # fmt: skip
@click.option("--scheduler", metavar="ADDRESS",
              help="Predict on a Dask cluster: the address of its scheduler, or local:N for N workers on this machine. "
              "The table is that of one machine, bit for bit.")  # fmt: skip
@VELOCITY
@VELOCITY_RANGE
@MEDIUM
@TELLURIC
@click.option(
    "--select", metavar="EXPRESSION", help='Rows to predict, such as "targetType == 1 and nVisit > 2".'
)
@click.option("--targets", metavar="LIST",
              help="Predict these targets alone: identifiers with commas between, a file with one in each line, or a "
              "table with catId and objId, objId, TARGETID or id.")  # fmt: skip
@click.option(
    "--keep", callback=names, metavar="A,B,…", help="Columns of the input to keep besides identifiers."
)
@click.option("--report", type=click.Path(dir_okay=False), metavar="PAGE",
              help="Also write a page on the run, one HTML file: flags, χ² and errors against SNR, stars to look at, "
              "as moefast inspect TABLE --report does.")  # fmt: skip
@EXPERT
@CONFIG
@OVERWRITE
@talk
@JSON
@swapped_told
def predict(
    files: tuple[str, ...], listing: str | None, model: str | None, out: str | None, folder: str | None, suffix: str,
    skip_existing: bool, status: str | None, array: str, backend: str,
    rows: tuple[int, int] | None, limit: int | None, shard: tuple[int, int] | None, scheduler: str | None,
    velocity: str | None, velocity_range: float, medium: str, telluric: str, select: str | None,
    targets: str | None,
    keep: tuple[str, ...], report: str | None, overwrite: bool, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Predict log g for every spectrum and write a table: one row per spectrum, in order.

    \b
        moefast predict spectra.h5 -o log_g.h5
        moefast predict night/*.fits --select "targetType == 1" -o night.fits
        moefast predict night/*.fits --out-dir tables/ --skip-existing

    FILE is an HDF5 file of the PFS simulator, a pfsCalibrated, pfsCoadd, pfsSingle, pfsObject or pfsStar, or a DESI
    coadd or spectra file, recognised by its content; a folder of them, or a pattern. Units, masks and grids are the
    file's (docs/formats.md). Velocities of stars in files of surveys are fitted, and log g is averaged over their
    posterior; spectra of the simulator are taken to be at rest. --velocity says otherwise (docs/velocities.md).

    Columns: row, identifiers of the input, log_g [dex], log_g_err (calibrated 1σ), log_g_err_raw (pixel noise
    alone), weight_k (gate), expert, snr_norm, snr_median, chi2, flag; of a posterior also T_eff [K], M_H, a_M, C_M
    [dex], each with _err and _corr (correlation with log_g), and scale; where velocities were given or fitted v_los and
    v_los_err [km/s]. Spectra without data get NaN and a flag,
    never a missing row. If the files have labels, R² is printed. What is odd about the spectra as a whole (slope, dead
    fibres, errors that do not fit the scatter, …) is said before the first is scored; no number is changed.
    """
    from moefast.predicting.files import predict as run

    if listing is not None:
        from moefast.cluster.nights import listed

        files = (*files, *listed(listing))
    if not files:
        raise click.UsageError("name a FILE, or a list of them with --from-file")
    if folder is None and (skip_existing or status):
        raise click.UsageError("--skip-existing and --status belong to --out-dir")
    source = click.get_current_context().get_parameter_source
    if folder is None and source("suffix") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--format belongs to --out-dir; of one table the suffix of -o says it")
    options: dict[str, Any] = {
        "array": array, "backend": backend, "velocity": velocity, "velocity_range": velocity_range,
        "medium": medium, "telluric": telluric, "select": select, "targets": targets, "keep": keep,
    }  # fmt: skip
    if folder is not None:
        if out is not None or shard is not None:
            raise click.UsageError("--out-dir writes a table for each input: leave out -o and --shard")
        if report:
            raise click.UsageError(
                "--report is for one table: moefast inspect TABLE --report writes the page of each"
            )
        _each(
            files, model, Path(folder), f".{suffix}", {**options, "rows": rows, "limit": limit},
            skip_existing=skip_existing, overwrite=overwrite, status=status, quiet=quiet, as_json=as_json,
        )  # fmt: skip
        return
    # Parts that run at the same time must not write to one name.
    part = f".{shard[0]}-of-{shard[1]}" if shard else ""
    # A pattern has no name to take over; a file may be called like one.
    is_pattern = glob.has_magic(files[0]) and not os.path.lexists(files[0])
    stem, ending = Path(os.path.abspath(files[0])).stem, f".log_g{part}.h5"
    if is_pattern or len(os.fsencode(stem + ending)) > LONGEST_NAME:
        stem = "spectra"
    target = Path(out) if out else Path(stem + ending)
    if overwrite and not out:
        _check_same_inputs(target, files)
    if report:
        refuse_taken(report, overwrite=overwrite)
    if scheduler is not None:
        if rows or limit or shard:
            raise click.UsageError("--scheduler predicts all rows: leave out --rows, --limit and --shard")
        _on_cluster(
            scheduler, files, model, target, options, report=report, overwrite=overwrite, quiet=quiet,
            as_json=as_json,
        )  # fmt: skip
        return
    with ProgressLine(quiet or as_json) as progress:
        progress.doing("predict: getting ready")
        summary = run(
            files, model, target, rows=rows, limit=limit, shard=shard, overwrite=overwrite, **options,
            progress=progress.rows("predict"), tell=progress.tell,
        )  # fmt: skip
    _tell_summary(target, summary, quiet, as_json)
    if report:
        _write_report(target, model, report, overwrite, quiet)
    tell_failures(summary.failures)


def _tell_summary(table: Path, summary: Summary, quiet: bool, as_json: bool) -> None:
    if as_json:
        facts = {
            "table": str(table), "rows": summary.n_rows, "seconds": summary.seconds,
            "spectra_per_second": summary.spectra_per_second, "r2": summary.r2, "array": summary.array,
            "model": summary.model, "backend": summary.backend, "device": summary.device, "reason": summary.reason,
            "flags": summary.flags, "oddities": summary.oddities, "notes": summary.notes,
            "failures": [str(failure.error) for failure in summary.failures],
        }  # fmt: skip
        click.echo(json.dumps(facts, indent=1))
        return
    say = partial(tell_result, quiet=quiet)
    say(f"{table}: {counted(summary.n_rows, 'spectrum')}, array {summary.array}, model {summary.model}")
    rate = summary.spectra_per_second
    speed = f"{rate:,.0f} spectra/s" if rate >= 10 else f"{rate:.2g} spectra/s"
    nothing = summary.flags.get("NO_DATA", 0) == summary.n_rows
    none = "nothing to measure R² on" if nothing else "no labels, so no R²"
    r2 = none if summary.r2 is None else f"R² {summary.r2:.3f}"
    say(f"  {speed} on {summary.backend} ({summary.device}), {r2}")
    say(f"  backend {summary.backend}: {summary.reason}")
    if summary.flags:
        say("  flags: " + ", ".join(f"{name} {count:,}" for name, count in summary.flags.items()))
    for note in summary.notes:
        say(f"  note: {note}")


def _write_report(table: Path, model: str | None, page: str, overwrite: bool, quiet: bool) -> None:
    from moefast.inspection.run import summarise_table
    from moefast.inspection.run_page import write_page
    from moefast.inspection.worst import spectra_of_worst

    with ProgressLine(quiet) as progress:
        progress.doing("predict: drawing the page")
        found = summarise_table(table)
        stars, reason = spectra_of_worst(found, model)
        write_page(found, page, stars, reason, overwrite=overwrite)
    tell_written(page, reason=reason)


def _each(
    files: tuple[str, ...], model: str | None, folder: Path, suffix: str, options: dict[str, Any], *,
    skip_existing: bool, overwrite: bool, status: str | None, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """A table for each input."""
    from moefast.cluster import nights
    from moefast.model import Model

    jobs = nights.plan(files, folder, suffix)
    chosen = Model.load(model)
    folder.mkdir(parents=True, exist_ok=True)
    with ProgressLine(quiet or as_json) as progress:
        _tell_repeated(files, progress)
        nights.run(
            jobs, chosen, options=options, skip_existing=skip_existing, overwrite=overwrite,
            status=status or folder / "status.csv", log=detail, progress=progress.rows(FILES),
        )  # fmt: skip
    counts = {state: sum(job.state == state for job in jobs) for state in ("done", "skipped", "failed")}
    if as_json:
        facts = [{**vars(job), "source": str(job.source), "table": str(job.table)} for job in jobs]
        click.echo(json.dumps({"folder": str(folder), **counts, "jobs": facts}, indent=1))
    else:
        n_rows = sum(job.rows for job in jobs)
        words = ", ".join(f"{count:,} {state}" for state, count in counts.items() if count)
        tell_result(
            f"{folder}: {counted(len(jobs), 'input')} ({words}), {counted(n_rows, 'spectrum')}, model {chosen.name}",
            quiet=quiet,
        )
    for job in jobs:
        if job.exit_code:
            fail(f"moefast: error: {job.message}")
    if any(job.exit_code for job in jobs):
        sys.exit(nights.worst(jobs))


def _on_cluster(
    scheduler: str, files: tuple[str, ...], model: str | None, target: Path, options: dict[str, Any], *,
    report: str | None, overwrite: bool, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """The same table by the workers of a cluster."""
    from moefast.cluster.predict_on_workers import predict_on

    begin = time.perf_counter()
    with ProgressLine(quiet or as_json) as progress, connected(scheduler, progress) as (client, workers):
        _tell_repeated(files, progress)
        merged = predict_on(
            client,
            files,
            model,
            target,
            options=options,
            overwrite=overwrite,
            progress=progress.rows("predict"),
        )
    seconds = time.perf_counter() - begin
    if report:
        _write_report(target, model, report, overwrite, quiet)
    if as_json:
        facts = {
            "table": str(target), "rows": merged.n_rows, "shards": merged.n_parts, "workers": workers,
            "seconds": seconds, "r2": merged.r2, "notes": list(merged.notes),
        }  # fmt: skip
        click.echo(json.dumps(facts, indent=1))
        return
    r2 = "no labels, so no R²" if merged.r2 is None else f"R² {merged.r2:.3f}"
    say = partial(tell_result, quiet=quiet)
    say(
        f"{target}: {counted(merged.n_rows, 'spectrum')}, {counted(merged.n_parts, 'shard')} by "
        f"{counted(workers, 'worker')} in {seconds:.0f} s, {r2}"
    )
    for note in merged.notes:
        say(f"  note: {note}")


def _tell_repeated(files: tuple[str, ...], progress: ProgressLine) -> None:
    """Note files that are named more than once, where the runs themselves are given each once."""
    from moefast.spectra.paths import find_files, words_on_repeated

    repeated: dict[Path, None] = {}
    find_files(files, repeated)
    for words in words_on_repeated(repeated):
        progress.tell(words)


def _check_same_inputs(target: Path, files: tuple[str, ...]) -> None:
    """Refuse to replace a table of other spectra under the default name: files of spectra are often called alike."""
    from moefast.spectra.paths import find_files
    from moefast.spectra.tables import read_layout

    if not target.is_file():
        return
    inputs = None
    with contextlib.suppress(InputError):
        inputs = read_layout(target)[1].get("inputs")
    if not isinstance(inputs, list) or not {os.path.realpath(p) for p in inputs} <= {
        os.path.realpath(p) for p in find_files(files)
    }:
        raise OutputError(f"{target}: is the table of other spectra; name another one with -o")
