"""The command `moefast evaluate`."""

from __future__ import annotations

import json

import click

from moefast.cli.messages import tell_written
from moefast.cli.options import (
    BACKEND,
    CONFIG,
    DEVICE,
    EXPERT,
    FILES,
    JSON,
    NOISE_LEVEL,
    OVERWRITE,
    SCHEDULER,
    talk,
)
from moefast.cli.spread import spread_over
from moefast.cli.swapped import swapped_told
from moefast.core.progress import ProgressLine

__all__ = ["evaluate"]


@click.command(short_help="Measure a model on labelled spectra.")
@FILES
@click.option(
    "-m", "--model", metavar="WHAT",
    help="What is measured: a model folder, an ONNX file (.onnx) with inputs flux and error and an output log_g, or a "
    "table of predictions (.csv, .fits, .parquet, or .h5 of moefast) with columns log_g and row, or the stars' "
    "identifiers; or a shipped model, observed (the default), z0 or survey.",
)  # fmt: skip
@click.option(
    "--peer", metavar="NAME",
    help="Measure what others fit labels with instead of a model, some 20 spectra a second: chi2, a full-spectrum fit "
    "of the simulator's emulator, or cannon, a quadratic model of 2000 labelled stars of the test set's reference set.",
)  # fmt: skip
@click.option(
    "-o", "--out", metavar="FOLDER",
    help="Write report.json, report.html with all figures, the figures as PNG, report.txt, predictions.h5 (every star) "
    "and run.json to this folder.",
)  # fmt: skip
@click.option(
    "--pictures/--no-pictures", default=True, show_default=True, help="Draw report.html and the PNG files."
)
@click.option(
    "--noise", type=click.Choice(["auto", "draw", "none"]), default="auto", show_default=True,
    help="auto: the array noisy where a file has it, else noise from the stored seed. draw: always a draw on flux. "
    "none: flux as it is, for observed spectra.",
)  # fmt: skip
@NOISE_LEVEL
@click.option(
    "--ceiling", metavar="FILE",
    help="Ceilings of this test set, written by moefast ceiling -o; those of the reference sets come with moefast.",
)  # fmt: skip
@click.option("--name", help="Name of the test set in the report.")
@click.option(
    "--milestones", is_flag=True,
    help="Also judge the marks of the project's roadmap that this evaluation bears on; moefast milestones judges all.",
)  # fmt: skip
@SCHEDULER
@BACKEND
@DEVICE
@EXPERT
@CONFIG
@OVERWRITE
@talk
@JSON
@swapped_told
def evaluate(
    files: tuple[str, ...], model: str | None, peer: str | None, out: str | None, pictures: bool, noise: str,
    noise_level: float, ceiling: str | None, name: str | None, milestones: bool, scheduler: str | None, backend: str,
    overwrite: bool, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measure a model on labelled spectra: R² with intervals, by SNR and bin, beside simpler fits.

    \b
        moefast evaluate test.h5 -o report/
        moefast evaluate test.h5 -m model/ -o report/ --name "my test set"
        moefast evaluate observed.h5 --noise none
        moefast evaluate test.h5 -m predictions-of-others.csv -o report/

    Models of others are measured by the same rules: as an ONNX file, or as a table with one prediction for each row of
    the test set. A table must have been made of the noise that is measured with: of the array noisy, which moefast
    simulate writes, or of observed flux with --noise none. A prediction that is NaN counts as the mean label.

    --peer measures a method that astronomers would use without a model of moefast.
    """
    from moefast.protocol.evaluate import evaluate as run
    from moefast.protocol.evaluate import expected_stages
    from moefast.protocol.milestones.judge import judge_alone
    from moefast.protocol.report_folder import check_report_folder, write_report
    from moefast.protocol.report_text import format_text

    if out:
        check_report_folder(out, overwrite)
    drawn = pictures and out is not None
    with ProgressLine(quiet, lambda n_rows: expected_stages(n_rows, pictures=drawn)) as progress:
        progress.doing("evaluate: loading the model")
        with spread_over(scheduler, "scores_on", progress) as spread:
            result = run(
                files, model, peer=peer, noise=noise, noise_level=noise_level, ceiling=ceiling, backend=backend,  # type: ignore[arg-type]
                name=name, progress=progress.stage, tell=progress.tell, spread=spread,
            )  # fmt: skip
        judged = judge_alone(result.record) if milestones else None
        # First what took long; a terminal may refuse the text.
        written = (
            write_report(
                result, out, pictures=pictures, overwrite=overwrite, judged=judged, progress=progress.stage
            )
            if out
            else []
        )
    text = json.dumps(result.report, indent=1) if as_json else format_text(result.record, result.run, judged)
    click.echo(text)
    if as_json and not quiet and result.run["spectra_per_second"]:
        click.echo(f"{result.run['spectra_per_second']:,.0f} spectra/s on {result.run['device']}", err=True)
    if out:
        tell_written(*written)
