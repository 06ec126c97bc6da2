"""The command `moefast scenarios`."""

from __future__ import annotations

import json

import click

from moefast.cli.messages import tell_written
from moefast.cli.options import BACKEND, DEVICE, EXPERT, JSON, OVERWRITE, talk
from moefast.cli.swapped import swapped_told
from moefast.core.atomic import refuse_taken, write_json
from moefast.core.errors import MoefastError
from moefast.core.progress import ProgressLine

__all__ = ["scenarios"]


@click.command(short_help="Say what a model makes of spectra that are wrong.")
@click.argument("model", required=False)
@click.option(
    "-n", "--number", type=click.IntRange(2, 10_000), default=1000, show_default=True, metavar="N",
    help="Stars of each scenario.",
)  # fmt: skip
@click.option(
    "--scenario",
    "names",
    multiple=True,
    metavar="NAME",
    help="Only this one; may be repeated.  [default: all]",
)
@click.option("-o", "--out", metavar="FILE", help="Write the results with all their numbers as JSON.")
@BACKEND
@DEVICE
@EXPERT
@OVERWRITE
@talk
@JSON
@swapped_told
def scenarios(
    model: str | None, number: int, names: tuple[str, ...], out: str | None, backend: str, overwrite: bool,
    quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """What a model says of spectra with which something is wrong, and how much of it is silently false.

    \b
        moefast scenarios
        moefast scenarios model/ -n 200 --scenario "tilt 10 %" -o scenarios.json

    MODEL is a model folder or a shipped model. A fixed table of scenarios is made from stored seeds: another scale, a
    tilt, F_nu, a velocity that nobody knows, every kind of gap, errors that are too small, no star at all, and more. Of
    each: R², coverage, the share of spectra with a flag, and silent failures, which carry no flag and lie beyond three
    claimed errors.
    """
    from moefast.model import Model
    from moefast.protocol.scenarios import choose_scenarios, format_text, run_scenarios

    try:
        chosen = choose_scenarios(names)
    except MoefastError as error:
        raise click.BadParameter(str(error), param_hint="--scenario") from error
    if out:
        refuse_taken(out, overwrite=overwrite)
    with ProgressLine(quiet) as progress:
        progress.doing("scenarios: loading model and simulator")
        found = run_scenarios(
            Model.load(model),
            n=number,
            names=chosen,
            backend=backend,
            progress=progress.rows("scenarios"),
        )
    click.echo(json.dumps(found, indent=1, ensure_ascii=False) if as_json else format_text(found))
    if out:
        write_json(found, out, overwrite=overwrite)
        tell_written(out)
