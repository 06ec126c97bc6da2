"""The command `moefast predict`."""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path

import click

from moefast.cli.messages import Progress, tell_failures
from moefast.cli.options import BACKEND, DEVICE, FILES, JSON, MODEL, OVERWRITE, QUIET, names, rows
from moefast.core.errors import OutputError

__all__ = ["predict"]


def _shard(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    try:
        index, count = (int(part) for part in value.split("/"))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not i/N, for example 0/8") from None
    if not 0 <= index < count:
        raise click.BadParameter(f"{value!r}: i counts from 0 and must be less than N")
    return index, count


@click.command()
@FILES
@MODEL
@click.option("-o", "--out", metavar="TABLE",
              help="Table to write: .h5, .parquet or .fits.  [default: <FILE>.log_g.h5 in this folder; with --shard "
              "<FILE>.log_g.i-of-N.h5]")  # fmt: skip
@click.option("--array", type=click.Choice(["auto", "flux", "noisy"]), default="auto", show_default=True,
              help="Array to score; auto is noisy where a file has it.")  # fmt: skip
@BACKEND
@DEVICE
@click.option("--rows", callback=rows, metavar="FIRST:LAST", help="Score these rows only, LAST not included.")
@click.option("--limit", type=click.IntRange(1), help="Score at most so many rows.")
@click.option("--shard", callback=_shard, metavar="i/N", help="Score part i (from 0) of N equal parts.")
@click.option("--velocity", metavar="V",
              help="Velocities to remove: a number [km/s], a column of the spectra, a table that is joined by "
              "identifiers (pfsStarCatalog, pfsStar files, redrock, rvspecfit, or any with v_los), or fit: one is "
              "fitted to each spectrum.  [default: fit for files of surveys if the model is a posterior, "
              "else 0]")  # fmt: skip
@click.option("--velocity-range", type=click.FloatRange(min=0, min_open=True), default=500.0, show_default=True,
              metavar="KM/S", help="Fitted velocities lie within so many km/s of 0.")  # fmt: skip
@click.option("--wave-medium", "medium", type=click.Choice(["auto", "vacuum", "air"]), default="auto",
              show_default=True, help="What wavelengths are in; auto is what the survey uses.")  # fmt: skip
@click.option("--telluric", type=click.Choice(["auto", "mask", "keep"]), default="auto", show_default=True,
              help="Whether pixels where the Earth's atmosphere absorbs count as bad; auto says so of spectra of "
              "surveys, not of the simulator's.")  # fmt: skip
@click.option(
    "--select", metavar="EXPRESSION", help='Rows to predict, such as "targetType == 1 and nVisit > 2".'
)
@click.option(
    "--keep", callback=names, metavar="A,B,…", help="Columns of the input to keep besides identifiers."
)
@OVERWRITE
@QUIET
@JSON
def predict(
    files: tuple[str, ...], model: str | None, out: str | None, array: str, backend: str,
    rows: tuple[int, int] | None, limit: int | None, shard: tuple[int, int] | None,
    velocity: str | None, velocity_range: float, medium: str, telluric: str, select: str | None, keep: tuple[str, ...],
    overwrite: bool, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Predict log g for every spectrum and write a table: one row per spectrum, in order.

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
    from moefast.scoring import predict as run

    # Parts that run at the same time must not write to one name.
    part = f".{shard[0]}-of-{shard[1]}" if shard else ""
    # A pattern has no name to take over; a file may be called like one.
    is_pattern = glob.has_magic(files[0]) and not os.path.lexists(files[0])
    stem = "spectra" if is_pattern else Path(os.path.abspath(files[0])).stem
    target = Path(out) if out else Path(f"{stem}.log_g{part}.h5")
    if overwrite and not out:
        _check_same_inputs(target, files)
    progress = Progress(quiet or as_json)
    summary = run(
        files, model, target, array=array, backend=backend, rows=rows, limit=limit,  # type: ignore[arg-type]
        shard=shard, overwrite=overwrite, velocity=velocity, velocity_range=velocity_range,
        medium=medium, telluric=telluric, select=select, keep=keep,  # type: ignore[arg-type]
        progress=progress.rows("predict"), tell=lambda words: progress.note(f"note: {words}"),
    )  # fmt: skip
    progress.close()
    facts = {
        "table": str(target), "rows": summary.n_rows, "seconds": summary.seconds,
        "spectra_per_second": summary.spectra_per_second, "r2": summary.r2, "array": summary.array,
        "backend": summary.backend, "device": summary.device, "reason": summary.reason,
        "flags": summary.flags, "oddities": summary.oddities, "notes": summary.notes,
        "failures": [str(failure.error) for failure in summary.failures],
    }  # fmt: skip
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    else:
        click.echo(f"{target}: {summary.n_rows:,} spectra, array {summary.array}")
        speed = f"{summary.spectra_per_second:,.0f} spectra/s"
        nothing = summary.flags.get("NO_DATA", 0) == summary.n_rows
        none = "nothing to measure R² on" if nothing else "no labels, so no R²"
        r2 = none if summary.r2 is None else f"R² {summary.r2:.3f}"
        click.echo(f"  {speed} on {summary.backend} ({summary.device}), {r2}")
        click.echo(f"  backend {summary.backend}: {summary.reason}")
        if summary.flags:
            click.echo("  flags: " + ", ".join(f"{name} {count:,}" for name, count in summary.flags.items()))
        for note in summary.notes:
            click.echo(f"  note: {note}")
    tell_failures(summary.failures)


def _check_same_inputs(target: Path, files: tuple[str, ...]) -> None:
    """Refuse to replace a table of other spectra under the default name: files of spectra are often called alike."""
    from moefast.spectra.files import find_files
    from moefast.spectra.tables import read_attributes

    if not target.is_file():
        return
    inputs = read_attributes(target).get("inputs")
    if not isinstance(inputs, list) or not {os.path.realpath(p) for p in inputs} <= {
        os.path.realpath(p) for p in find_files(files)
    }:
        raise OutputError(f"{target}: is the table of other spectra; name another one with -o")
