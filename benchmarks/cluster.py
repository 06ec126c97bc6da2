"""Fit and predict on a local cluster beside one process: seconds, what the cluster costs, and whether bits agree.

`python -m moefast.benchmarks.cluster -n 1000000 --copies 10 --workers 2 --folder SCRATCH [--recipe phys-moe] [-o FILE]`

Design: the same spectra, simulated to files once and kept in the folder, are fitted and predicted by one process with
all cores, and by workers that share these cores, one after the other in each round, so that what else the machine does
meets both. Beside the time on the clock there is that of the processors, of the client and all workers together, which
other work changes less. The start of the cluster is measured apart, as it does not grow with the number of spectra.
Models and tables must agree bit for bit. Where the disk has no room for all spectra, each file can have several names.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from moefast.benchmarks.environment import describe
from moefast.cluster.fit_on_workers import fit_on
from moefast.cluster.fit_parts import FitPlan, TrainingSpectra
from moefast.cluster.predict_on_workers import predict_on
from moefast.cluster.workers import connect
from moefast.core.errors import BenchmarkError
from moefast.model import Model
from moefast.predicting.files import predict
from moefast.simulate import simulate_set
from moefast.spectra.tables import read_table

__all__ = ["measure", "same_model", "same_table", "spectra_of"]

FILE_ROWS = 100_000
"""Spectra of a file."""


def same_table(one: Path, two: Path) -> bool:
    """Whether two tables have the same columns, bit for bit."""
    a, b = read_table(one)[0], read_table(two)[0]
    return list(a) == list(b) and all(a[name].tobytes() == b[name].tobytes() for name in a)


def same_model(one: Model, two: Model) -> bool:
    """Whether two models have the same arrays, bit for bit, and say the same of their fit."""
    if one.manifest["fit"] != two.manifest["fit"]:
        return False
    for name, value in vars(one.mixture).items():
        other = getattr(two.mixture, name)
        pairs = [(value, other)] if isinstance(value, np.ndarray) else []
        if isinstance(value, tuple):
            pairs = [(a, b) for a, b in zip(value, other, strict=True) if isinstance(a, np.ndarray)]
        if any(a.tobytes() != b.tobytes() for a, b in pairs):
            return False
    return True


def spectra_of(folder: Path, set_name: str, number: int, copies: int = 1) -> list[Path]:
    """Files with so many spectra, made if they are not there; of each spectrum there are so many copies, as hard links.

    Raises
    ------
    BenchmarkError
        The number is no multiple of the copies.
    """
    if number % copies:
        raise BenchmarkError(
            f"{number} spectra in {copies} copies each: the number is no multiple of {copies}"
        )
    data = folder / f"{set_name}-{number}-{copies}"
    data.mkdir(parents=True, exist_ok=True)
    for first in range(0, number // copies, FILE_ROWS):
        path = data / f"0-{first:010d}.h5"
        if not path.exists():
            click.echo(f"simulating {path}", err=True)
            simulate_set(path, set_name, "train", rows=(first, min(number // copies, first + FILE_ROWS)))
        for copy in range(1, copies):
            other = data / f"{copy}-{first:010d}.h5"
            other.unlink(missing_ok=True)
            os.link(path, other)
    return sorted(data.glob("*.h5"))


def measure(
    number: int, workers: int, folder: Path, recipe: str, set_name: str, rounds: int = 1, copies: int = 1
) -> dict[str, Any]:
    """Seconds of each step on the clock and of the processors, in each round, and whether results agree."""
    files = spectra_of(folder, set_name, number, copies)
    plan = FitPlan(TrainingSpectra.of_files(files), {"recipe": recipe})
    seconds: dict[str, list[float]] = {}
    processor: dict[str, list[float]] = {}
    begin = time.perf_counter()
    with connect(f"local:{workers}") as client:
        start = time.perf_counter() - begin

        def computed() -> float:
            return time.process_time() + sum(client.run(time.process_time).values())

        def timed(name: str, work: Callable[[], Any]) -> Any:
            begin, before = time.perf_counter(), computed()
            result = work()
            seconds.setdefault(name, []).append(time.perf_counter() - begin)
            processor.setdefault(name, []).append(computed() - before)
            click.echo(f"{name}: {seconds[name][-1]:.1f} s, computed {processor[name][-1]:.1f} s", err=True)
            return result

        for _ in range(rounds):
            alone = timed("fit, one process", lambda: plan.prepare().fit(False))
            spread = timed("fit, workers", lambda: fit_on(client, plan, plan.prepare(), folder / "spread"))
            alone = alone.save(folder / "model", overwrite=True)
            timed(
                "predict, one process",
                lambda: predict(files, folder / "model", folder / "alone.parquet", overwrite=True),
            )
            timed(
                "predict, workers",
                lambda: predict_on(
                    client, files, folder / "model", folder / "workers.parquet", options={}, overwrite=True
                ),
            )
    spread = spread.save(folder / "spread", overwrite=True)

    def overhead(of: dict[str, list[float]]) -> dict[str, float]:
        return {
            name: median(a / b for a, b in zip(of[f"{name}, workers"], of[f"{name}, one process"], strict=True)) - 1
            for name in ("fit", "predict")
        }  # fmt: skip

    return {
        "number": number, "copies": copies, "workers": workers, "recipe": recipe, "set": set_name, "rounds": rounds,
        "start_of_cluster": start, "seconds": seconds, "processor_seconds": processor,
        "overhead": overhead(seconds), "processor_overhead": overhead(processor),
        "same_bits": {
            "fit": same_model(alone, spread),
            "predict": same_table(folder / "alone.parquet", folder / "workers.parquet"),
        },
    }  # fmt: skip


@click.command()
@click.option("-n", "--number", type=click.IntRange(1), default=20_000, show_default=True, help="Spectra.")
@click.option(
    "--copies", type=click.IntRange(1), default=1, show_default=True, help="Copies of each spectrum."
)
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), required=True,
              help="Where spectra and results are kept: 33 kB for each but its copies, and 8 GB.")  # fmt: skip
@click.option("--recipe", default="phys-moe", show_default=True)
@click.option("--set", "set_name", default="z0", show_default=True)
@click.option(
    "--rounds", type=click.IntRange(1), default=1, show_default=True, help="How often; the median counts."
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Also write what was found as JSON.")
def main(
    number: int,
    copies: int,
    workers: int,
    folder: Path,
    recipe: str,
    set_name: str,
    rounds: int,
    out: Path | None,
) -> None:
    """Fit and predict on workers beside one process."""
    found = measure(number, workers, folder, recipe, set_name, rounds, copies)
    for name in ("fit", "predict"):
        alone, spread = (median(found["seconds"][f"{name}, {who}"]) for who in ("one process", "workers"))
        click.echo(
            f"{name}: {spread:.1f} s by {workers} workers, {alone:.1f} s by one process "
            f"({100 * found['overhead'][name]:+.0f} %; computing {100 * found['processor_overhead'][name]:+.0f} %), "
            f"{'the same bits' if found['same_bits'][name] else 'OTHER BITS'}"
        )
    if out is not None:
        out.write_text(json.dumps({"environment": describe(), **found}, indent=1) + "\n", encoding="utf-8")
    if not all(found["same_bits"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
