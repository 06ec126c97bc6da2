"""The command `moefast ceiling`."""

from __future__ import annotations

import json

import click

from moefast.cli.messages import tell_written
from moefast.cli.options import FILES, JSON, OVERWRITE, SCHEDULER, talk
from moefast.cli.spread import spread_over
from moefast.cli.swapped import swapped_told
from moefast.core.atomic import refuse_taken
from moefast.core.progress import ProgressLine

__all__ = ["ceiling"]


@click.command(short_help="Compute what the physics allows.")
@FILES
@click.option(
    "-o",
    "--out",
    metavar="FILE",
    help="Write everything, each star's numbers included, as .json or .json.gz.",
)
@click.option("--picture", type=click.Path(dir_okay=False), help="Draw the ceilings to a PNG.")
@click.option(
    "--method",
    type=click.Choice(["auto", "both", "fisher", "bayes"]),
    default="auto",
    show_default=True,
    help="fisher: bound from derivatives and errors. bayes: posterior of every star under the prior and noise that "
    "made it. auto: both for files of moefast simulate, else fisher.",
)
@click.option("--stars", type=click.IntRange(2), metavar="N", help="Use the first N spectra only.")
@click.option("--name", help="Name of the test set in the report.")
@click.option(
    "--seed",
    type=click.IntRange(0),
    metavar="N",
    default=0,
    show_default=True,
    help="Seed of the posterior samples.",
)
@SCHEDULER
@OVERWRITE
@talk
@JSON
@swapped_told
def ceiling(
    files: tuple[str, ...], out: str | None, picture: str | None, method: str, stars: int | None, name: str | None,
    seed: int, scheduler: str | None, overwrite: bool, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """What the physics allows: R² ceilings of labelled spectra, by Fisher information and by Bayes.

    \b
        moefast simulate test.h5 --set wild --part test_1k
        moefast ceiling test.h5 -o ceiling.json.gz --picture ceiling.png
        moefast evaluate test.h5 --ceiling ceiling.json.gz

    The Bayes ceiling is the R² of the exact posterior mean: no method does better on these stars. It takes 40 to 130 ms
    per star on two cores. The ceilings of the reference sets come with moefast; evaluate finds them by itself.
    """
    from moefast.ceilings import ceiling as ceilings
    from moefast.protocol.ceiling_report import figure, format_text

    for path in (out, picture):
        if path:
            refuse_taken(path, overwrite=overwrite)
    with ProgressLine(quiet) as progress, spread_over(scheduler, "ceilings_on", progress) as spread:
        progress.doing("ceiling: reading")
        found = ceilings.compute(
            files, method=method, stars=stars, seed=seed, name=name, progress=progress.stage,  # type: ignore[arg-type]
            spread=spread,
        )  # fmt: skip
    click.echo(json.dumps(found.summary, indent=1) if as_json else format_text(found.summary))
    if out:
        ceilings.write(found, out, overwrite=overwrite)
        tell_written(out)
    if picture:
        figure(found.summary, picture, overwrite=overwrite)
        tell_written(picture)
