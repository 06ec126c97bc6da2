"""The command `moefast roadmap`."""

from __future__ import annotations

import json

import click

from moefast.cli.options import BACKEND, CONFIG, DEVICE, EXPERT, FAMILIES, JSON, STRONG, talk
from moefast.core.progress import ProgressLine

__all__ = ["roadmap"]


@click.command(short_help="Run the roadmap C0 to C4 and decide after each stage.")
@click.option(
    "-o", "--out", required=True, metavar="FOLDER",
    help="Keeps test spectra, models, reports, and the table as text, JSON and an HTML page.",
)  # fmt: skip
@click.option("--set", "name", type=click.Choice(["z0", "survey", "wild"]), default="z0", show_default=True,
              help="Reference set.")  # fmt: skip
@click.option("--train", type=click.IntRange(1000), metavar="N", default=20_000, show_default=True,
              help="Training spectra of each fit.")  # fmt: skip
@click.option("--part", type=click.Choice(["test_10k", "test_1k"]), default="test_10k", show_default=True,
              help="Test spectra; marks for any set are judged on test_10k alone.")  # fmt: skip
@click.option("--size", type=click.Choice(["small", "base"]), default="small", show_default=True,
              help="Size of networks: small for a laptop, base for a GPU.")  # fmt: skip
@click.option(
    "--steps",
    type=click.IntRange(1),
    metavar="N",
    help="Number of training steps of networks; the default depends on --size.",
)
@click.option("--seeds", type=click.IntRange(2), metavar="N", default=5, show_default=True,
              help="Number of training sets, and of draws of noise, in C0.")  # fmt: skip
@FAMILIES
@STRONG
@EXPERT
@click.option("--all", "everything", is_flag=True, help="Run every stage, whatever the decisions say.")
@click.option("--resume", is_flag=True, help="Go on with what is in the folder.")
@BACKEND
@DEVICE
@CONFIG
@talk
@JSON
def roadmap(
    out: str, name: str, train: int, part: str, size: str, steps: int | None, seeds: int,
    families: tuple[str, ...] | None, strong: str | None, everything: bool, resume: bool, backend: str, quiet: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Run the roadmap: one ridge as published (C0), experts (C1), a gate (C2), a trunk with heads (C3), residuals (C4).

    \b
        moefast roadmap -o roadmap/
        moefast roadmap -o survey/ --set survey --train 200000 --all

    After each stage its milestones are judged, and the number says which stage follows: an oracle hybrid of 0.70 leads
    to the gates, else to the trunk; ρ of the hybrid behind the better of two gates of 0.85 leads to residuals, below
    0.70 back to the experts. C3 and C4 fit networks and need torch. The experts of the hybrids are chosen from
    --families, the residuals of C4 stand on --strong. A roadmap that was stopped goes on with --resume. Twenty thousand
    training spectra take about half an hour on two cores.
    """
    from moefast.core.records import as_entries
    from moefast.protocol.roadmap import Plan, roadmap_text
    from moefast.protocol.roadmap import roadmap as run

    with ProgressLine(quiet or as_json) as progress:
        result = run(
            out, Plan(name, train, part, size, steps, seeds, families, strong or "heads"),  # type: ignore[arg-type]
            everything=everything, resume=resume, backend=backend, say=progress.note, progress=progress.stage,
        )  # fmt: skip
    click.echo(
        json.dumps(as_entries(result), indent=1, ensure_ascii=False) if as_json else roadmap_text(result)
    )
