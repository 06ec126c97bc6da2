"""The command `moefast compare`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from moefast.cli.messages import tell_written
from moefast.cli.options import JSON, OVERWRITE, talk
from moefast.cli.swapped import swapped_told
from moefast.core.atomic import refuse_taken, write_json
from moefast.core.errors import OutputError

__all__ = ["compare"]


@click.command(short_help="Say whether one model is better than another.")
@click.argument("reports", nargs=-1, required=True, metavar="REPORT…")
@click.option("-o", "--out", metavar="FILE", help="Write all numbers as JSON.")
@click.option(
    "--picture",
    metavar="FILE",
    help="Draw R² of all of them against SNR, beside the Bayes ceiling, to a PNG.",
)
@OVERWRITE
@talk
@JSON
@swapped_told
def compare(
    reports: tuple[str, ...],
    out: str | None,
    picture: str | None,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Is one model better than another? Paired differences of two or more evaluations on the same stars.

    \b
        moefast evaluate test.h5 -m z0 -o reports/z0
        moefast evaluate test.h5 -m mine/ -o reports/mine
        moefast compare reports/z0 reports/mine --picture compared.png

    REPORT is a folder that moefast evaluate -o wrote; the first is what the others are compared with. Per group of
    stars: the difference of R² with its interval, and better, worse or no difference. Evaluations of other stars or
    other noise are refused.
    """
    from moefast.protocol.compare import compare as run
    from moefast.protocol.compare import format_text, read_evaluation

    if picture and (Path(picture).suffix.lower() != ".png" or (out and Path(out) == Path(picture))):
        raise OutputError(f"{picture}: the picture is a PNG; give it a name of its own that ends in .png")
    for target in (out, picture):
        if target:
            refuse_taken(target, overwrite=overwrite)
    kept = [read_evaluation(folder) for folder in reports]
    found = run(kept)
    click.echo(json.dumps(found, indent=1) if as_json else format_text(found))
    if out:
        write_json(found, out, overwrite=overwrite)
        tell_written(out)
    if picture:
        # Only now: drawing takes a second to import.
        from moefast.protocol.figures import compared

        names = [item.path.resolve().name for item in kept]
        if len(set(names)) < len(names):
            # Letters, as in the text, tell folders of the same name apart.
            names = [f"{chr(ord('A') + i)} {name}" for i, name in enumerate(names)]
        reports_by_name = {name: item.report for name, item in zip(names, kept, strict=True)}
        compared(reports_by_name, picture, overwrite=overwrite)
        tell_written(picture)
