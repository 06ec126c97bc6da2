"""The command `moefast bench`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from moefast.cli.options import DEVICE, JSON, MODEL, OVERWRITE, names, positive, talk
from moefast.cli.swapped import swapped_told
from moefast.core.progress import ProgressLine

__all__ = ["bench"]


def _sizes(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in (value or "").replace("_", "").split(",") if part.strip())
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers, for example 10000,100000") from None
    if any(size < 1 for size in sizes):
        raise click.BadParameter(f"{value!r}: every size must be positive")
    return sizes


@click.command(short_help="Measure throughput, with R² beside it.")
@click.option(
    "--task", type=click.Choice(["score", "fit", "all"]), default="score", show_default=True,
    help="score: flux and error to log g. fit: nine ridges, a path of penalties, hold-out errors; takes minutes.",
)  # fmt: skip
@click.option("--engines", callback=names, metavar="A,B,…", help="Engines by name; all if absent.")
@click.option(
    "--list", "as_list", is_flag=True, help="List the engines, and why one cannot be used; then stop."
)
@click.option(
    "-n", "--number", type=click.IntRange(1), metavar="N", default=20_000, show_default=True, help="Spectra."
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    metavar="N",
    default=5,
    show_default=True,
    help="Timed runs of each engine.",
)
@click.option(
    "--growth", callback=_sizes, metavar="N,N,…",
    help="Sizes for growth curves, such as 10000,100000,1000000; those that do not fit are extrapolated and say so.",
)  # fmt: skip
@MODEL
@click.option("-o", "--out", type=click.Path(dir_okay=False), help="JSON to write, raw samples included.")
@click.option("--picture", type=click.Path(dir_okay=False), help="PNG to draw.")
@click.option(
    "--limit", type=float, callback=positive, default=300.0, show_default=True, metavar="SECONDS",
    help="Give an engine up after so long.",
)  # fmt: skip
@click.option(
    "--scratch", type=click.Path(file_okay=False, exists=True), metavar="FOLDER",
    help="Folder for the simulated spectra, 33 kB each; choose the disk whose speed matters.",
)  # fmt: skip
@DEVICE
@OVERWRITE
@talk
@JSON
@swapped_told
def bench(
    task: str, engines: tuple[str, ...], as_list: bool, number: int, samples: int, growth: tuple[int, ...],
    model: str | None, out: str | None, picture: str | None, limit: float, scratch: str | None, overwrite: bool,
    quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measure throughput next to R²: our engines and other people's, on the same spectra, giving the same answer.

    Spectra are simulated. Each engine has a process of its own and is compared with a float64 reference before it is
    timed; one that differs is reported and the exit code is 9. Shares are those of floors measured in the same run:
    memory bandwidth, BLAS, reading the file. An engine whose package or device is missing is listed with the reason.

    \b
        moefast bench
        moefast bench --task fit -n 20000 --engines moefast,sklearn,himalaya
        moefast bench --growth 1000,10000,100000 -o result.json --picture bench.png
    """
    from moefast.benchmarks.adapter import TASKS, why_not
    from moefast.benchmarks.engines import choose
    from moefast.benchmarks.report import format_text
    from moefast.benchmarks.report import picture as draw
    from moefast.benchmarks.run import benchmark, wrong_answers
    from moefast.core.atomic import partial_path, write_atomically
    from moefast.core.errors import BenchmarkError

    tasks = TASKS if task == "all" else (task,)
    chosen = choose(tasks, engines)
    if as_list:
        facts = [
            {"task": e.task, "engine": e.name, "title": e.title, "unavailable": why_not(e)} for e in chosen
        ]
        if as_json:
            click.echo(json.dumps(facts, indent=1, ensure_ascii=False))
            return
        for e in facts:
            click.echo(f"{e['task']:<6} {e['engine']:<20} {e['title']:<36} {e['unavailable']}".rstrip())
        return
    for path in (out, picture):
        if path:
            # Known before minutes of work, not after.
            partial_path(Path(path), overwrite=overwrite)
    with ProgressLine(quiet) as progress:
        result = benchmark(
            tasks=tasks, engines=engines, n=number, samples=samples, growth=growth, model_path=model, limit=limit,
            scratch=scratch, say=progress.note, doing=progress.doing,
        )  # fmt: skip
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    if out:
        write_atomically(out, (text + "\n").encode(), overwrite=overwrite)
    if picture:
        write_atomically(picture, draw(result), overwrite=overwrite)
    click.echo(text if as_json else format_text(result))
    if wrong := wrong_answers(result):
        raise BenchmarkError("; ".join(wrong))
