"""The command `moefast milestones`."""

from __future__ import annotations

import json

import click

from moefast.cli.messages import tell_written
from moefast.cli.options import JSON, OVERWRITE, talk
from moefast.cli.swapped import swapped_told
from moefast.core.atomic import refuse_taken, write_json

__all__ = ["milestones"]


@click.command(short_help="Judge evaluations by the marks of the roadmap.")
@click.argument("reports", nargs=-1, metavar="[REPORT…]")
@click.option("-o", "--out", metavar="FILE", help="Write the verdicts with all their numbers as JSON.")
@OVERWRITE
@talk
@JSON
@swapped_told
def milestones(
    reports: tuple[str, ...], out: str | None, overwrite: bool, quiet: bool, as_json: bool
) -> None:
    """Judge the milestones C0 to C4 by evaluations: published mark, our number, pass, fail or not run.

    \b
        moefast milestones
        moefast milestones reports/ -o verdicts.json

    REPORT is a folder that moefast evaluate -o wrote, its report.json, or a folder of such folders. Test sets are kept
    apart. What no evaluation holds is not run, never passed; without any REPORT the marks and the commands are shown.
    """
    from moefast.core.records import as_entries
    from moefast.protocol.milestones.evaluations import read_reports
    from moefast.protocol.milestones.judge import judge
    from moefast.protocol.milestones.text import format_text

    if out:
        refuse_taken(out, overwrite=overwrite)
    found = judge(read_reports(reports))
    click.echo(json.dumps(as_entries(found), indent=1, ensure_ascii=False) if as_json else format_text(found))
    if out:
        write_json(as_entries(found), out, overwrite=overwrite)
        tell_written(out)
