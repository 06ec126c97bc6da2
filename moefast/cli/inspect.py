"""The command `moefast inspect`."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import click
from click.core import ParameterSource

from moefast.cli.messages import tell_failures, tell_written
from moefast.cli.options import (
    EXPERT,
    FILES,
    JSON,
    MEDIUM,
    MODEL,
    OVERWRITE,
    TELLURIC,
    VELOCITY,
    VELOCITY_RANGE,
    talk,
)
from moefast.cli.swapped import swapped_told
from moefast.core.atomic import refuse_taken
from moefast.core.errors import InputError
from moefast.core.progress import ProgressLine

__all__ = ["inspect"]


@cache
def _mixture_of(model: str | None) -> Any:
    """What a model knows: its wavelengths, and a typical spectrum."""
    from moefast.model import Model

    return Model.load(model).mixture


_OF_ONE_STAR = {
    "velocity": "--velocity",
    "velocity_range": "--velocity-range",
    "medium": "--wave-medium",
    "telluric": "--telluric",
}


def _refuse_unused(one_star: bool) -> None:
    """Refuse options that would change nothing."""
    source = click.get_current_context().get_parameter_source
    for name, option in _OF_ONE_STAR.items():
        if not one_star and source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"{option} is for one star (--row or --id); files as a whole are shown as they are"
            )
    if one_star and source("limit") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--limit is for files as a whole, and not for one star (--row or --id)")


@click.command(short_help="Show what is in a file, and what is odd about it.")
@FILES
@MODEL
@click.option("--row", type=click.IntRange(0), metavar="N",
              help="Show the star of this row, from 0; of several files, counted through them.")  # fmt: skip
@click.option("--id", "identifier", metavar="ID",
              help="Show the star with this identifier, or with NAME=VALUE in a column.")  # fmt: skip
@click.option(
    "--picture", type=click.Path(dir_okay=False),
    help="Draw to a file, .png, .svg or .pdf: the star of --row or --id, else a few spectra and the SNR histograms.",
)  # fmt: skip
@click.option("--report", type=click.Path(dir_okay=False), metavar="PAGE",
              help="With a table of predictions: write a page about it, one HTML file.")  # fmt: skip
@click.option(
    "--spectra", multiple=True, metavar="FILE",
    help="With a table of predictions: the spectra that it was made of, if they have been moved.",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Look at N rows at most.")
@VELOCITY
@VELOCITY_RANGE
@MEDIUM
@TELLURIC
@EXPERT
@OVERWRITE
@talk
@JSON
@swapped_told
def inspect(
    files: tuple[str, ...], model: str | None, row: int | None, identifier: str | None, picture: str | None,
    report: str | None, spectra: tuple[str, ...], limit: int | None, velocity: str | None,
    velocity_range: float, medium: str, telluric: str, overwrite: bool, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Look into files of spectra, at one star, or at a table of predictions.

    \b
        moefast inspect spectra.h5
        moefast inspect spectra.h5 --row 12 --picture star.png
        moefast inspect log_g.h5 --report night.html

    Files of spectra: arrays, wave grid, labels, SNR percentiles, bad rows, and what is odd. Odd is what 256 rows,
    spread over the files, show: dead fibres, rows written twice, errors of one value or that do not fit the scatter of
    the flux, and, against what the model was fitted on, a slope that stars do not have. FITS files of surveys are shown
    as the model would see them, on its grid.

    One star (--row or --id): what the model says of it and why it is flagged. Its picture shows flux, the model's
    spectrum with its 1σ, residuals, lines by name, pixels that do not count, and the posterior of log g. Models that
    are no posterior have no spectrum of their own; the rest is drawn.

    A table that moefast predict wrote: flags, χ² and errors against the signal-to-noise ratio, and the stars that
    should be looked at; no true labels are needed. The page (--report) has figures, and pictures of these stars if
    their spectra are at hand.
    """
    from moefast.inspection.run import is_table

    if picture:
        refuse_taken(picture, overwrite=overwrite)
    one_star = row is not None or identifier is not None
    _refuse_unused(one_star)
    if len(files) == 1 and is_table(files[0]):
        if row is not None or identifier is not None or picture:
            raise InputError(
                f"{files[0]}: is a table of predictions, which has no spectra; name the file of spectra for --row, "
                "--id and --picture"
            )
        with ProgressLine(quiet) as progress:
            progress.doing("inspect: reading the table")
            _table(files[0], model, report, spectra, overwrite, as_json, progress)
        return
    if report or spectra:
        raise InputError(
            f"{files[0]}: --report and --spectra are for one table that moefast predict wrote (.h5, .parquet or .fits)"
        )
    if one_star:
        with ProgressLine(quiet) as progress:
            progress.doing("inspect: looking at the star")
            _star(files, model, picture, overwrite, as_json, progress, row=row, identifier=identifier,
                  velocity=velocity, velocity_range=velocity_range, medium=medium, telluric=telluric)  # fmt: skip
        return
    from moefast.inspection.files import format_text, summarise
    from moefast.spectra.opening import open_as_found
    from moefast.spectra.wave import same_wave

    # Files of surveys have no grid of their own that all rows share.
    with ProgressLine(quiet) as progress:
        progress.doing("inspect: reading")
        found = open_as_found(files, lambda: _mixture_of(model).wave, on_error="skip")
        mixture = _mixture_of(model)
        reference = mixture.reference if same_wave(found.wave, mixture.wave) else None
        facts = summarise(found, max_rows=limit, reference=reference)
        if picture:
            from moefast.inspection.files_picture import draw_files

            progress.doing("inspect: drawing")
            draw_files(found, picture, overwrite=overwrite)
    click.echo(json.dumps(facts, indent=1) if as_json else format_text(facts))
    if picture:
        tell_written(picture)
    tell_failures(found.failures)


def _star(
    files: tuple[str, ...],
    model: str | None,
    picture: str | None,
    overwrite: bool,
    as_json: bool,
    progress: ProgressLine,
    **which: Any,
) -> None:
    from moefast.inspection.star import describe, look_at
    from moefast.inspection.star_picture import draw_star
    from moefast.pages.drawing import check_suffix

    if picture:
        check_suffix(picture)
    star = look_at(files, model, **which)
    if picture:
        progress.doing("inspect: drawing")
        draw_star(star, picture, overwrite=overwrite)
    progress.close()
    click.echo(json.dumps(star.to_dict(), indent=1) if as_json else describe(star))
    if picture:
        tell_written(picture)


def _table(
    path: str,
    model: str | None,
    report: str | None,
    spectra: tuple[str, ...],
    overwrite: bool,
    as_json: bool,
    progress: ProgressLine,
) -> None:
    from moefast.inspection.run import format_text, summarise_table
    from moefast.inspection.run_page import write_page
    from moefast.inspection.worst import spectra_of_worst

    if report:
        refuse_taken(report, overwrite=overwrite)
    run = summarise_table(path)
    reason = ""
    if report:
        progress.doing("inspect: drawing the page")
        stars, reason = spectra_of_worst(run, model, spectra)
        write_page(run, report, stars, reason, overwrite=overwrite)
    progress.close()
    click.echo(json.dumps(run.to_dict(), indent=1) if as_json else format_text(run))
    if report:
        tell_written(report, reason=reason)
