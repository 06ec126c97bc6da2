"""The command `moefast inspect`."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import click

from moefast.cli.messages import tell_failures
from moefast.cli.options import FILES, JSON, MODEL

__all__ = ["inspect"]


@cache
def _mixture_of(model: str | None) -> Any:
    """What a model knows: its wavelengths, and a typical spectrum."""
    from moefast.model import Model

    return Model.load(model).mixture


@click.command(short_help="Show what is in a file, and what is odd about it.")
@FILES
@MODEL
@click.option(
    "--picture", type=click.Path(dir_okay=False), help="Draw a few spectra and the SNR histograms to a PNG."
)
@click.option("--limit", type=click.IntRange(1), help="Look at so many rows at most.")
@JSON
def inspect(
    files: tuple[str, ...], model: str | None, picture: str | None, limit: int | None, as_json: bool
) -> None:
    """Show what is in spectrum files: arrays, wave grid, labels, SNR percentiles, bad rows, and what is odd.

    Odd is what 256 rows, spread over the files, show: dead fibres, rows written twice, errors of one value or that do
    not fit the scatter of the flux, and, against what the model was fitted on, a slope that stars do not have.

    FITS files of surveys are shown as the model would see them, on its grid.
    """
    from moefast.spectra.files import same_wave
    from moefast.spectra.prepared import open_as_found
    from moefast.spectra.summary import format_text, summarise
    from moefast.spectra.summary import picture as draw

    # Files of surveys have no grid of their own that all rows share.
    spectra = open_as_found(files, lambda: _mixture_of(model).wave, on_error="skip")
    mixture = _mixture_of(model)
    reference = mixture.reference if same_wave(spectra.wave, mixture.wave) else None
    facts = summarise(spectra, max_rows=limit, reference=reference)
    click.echo(json.dumps(facts, indent=1) if as_json else format_text(facts))
    if picture:
        draw(spectra, picture)
        click.echo(f"picture: {picture}", err=True)
    tell_failures(spectra.failures)
