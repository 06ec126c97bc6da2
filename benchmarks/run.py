"""Throughput next to R²: read, score in memory, predict end to end. `python benchmarks/run.py [-n ROWS] [-o FILE]`.

Every engine meets the same spectra and must give the same log g; samples are kept raw; ratios are within one run.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

import moefast
from moefast.protocol.metrics import r2
from moefast.scoring import BLOCK_ROWS
from moefast.simulate import simulate_file
from moefast.spectra.files import open_spectra

sys.path.append(str(Path(__file__).parent))
from engines import ENGINES, FLOORS
from environment import describe

TOLERANCE = 1e-4
SEED = 20260202


def timed(work: Callable[[], Any], rows: int, samples: int) -> tuple[Any, list[float]]:
    """The result of a warm-up run, and rows per second of each of the runs after it."""
    result = work()
    rates = []
    for _ in range(samples):
        begin = time.perf_counter()
        work()
        rates.append(rows / (time.perf_counter() - begin))
    return result, rates


def row(name: str, rates: list[float], score: float | None) -> dict[str, Any]:
    """One line of the table."""
    return {"engine": name, "spectra_per_second": max(rates), "samples": rates, "r2": score}


@click.command()
@click.option("-n", "--number", default=20_000, show_default=True, help="Spectra in the file.")
@click.option("--samples", default=5, show_default=True, help="Timed runs of each engine.")
@click.option("-o", "--out", type=click.Path(dir_okay=False), help="JSON file to write.")
def main(number: int, samples: int, out: str | None) -> None:
    """Run the benchmark with the shipped model on simulated spectra."""
    model = moefast.load()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spectra.h5"
        simulate_file(path, number, seed=SEED)
        spectra = open_spectra(path)

        def read() -> float:
            return sum(float(block.flux[0, 0] + block.error[-1, -1]) for block in spectra.blocks(BLOCK_ROWS))

        _, rates = timed(read, number, samples)
        found.append(row("reading flux and error", rates, None))
        summary, rates = timed(
            lambda: moefast.predict(path, model, Path(folder) / "log_g.h5", overwrite=True), number, samples
        )
        found.append(row("moefast predict, file to table", rates, summary.r2))
        block = next(spectra.blocks(4 * BLOCK_ROWS))
        truth = spectra.labels(("log_g",))["log_g"][: len(block)]
        expected = None
        for name, make in ENGINES.items():
            engine = make(model.mixture)
            log_g, rates = timed(lambda engine=engine: engine(block.flux, block.error), len(block), samples)  # type: ignore[misc]
            if name in FLOORS:
                found.append(row(name, rates, None))
                continue
            expected = log_g if expected is None else expected
            worst = float(np.abs(log_g - expected).max())
            if worst > TOLERANCE:
                raise SystemExit(f"{name}: log g differs by {worst:.1e} dex from the first engine")
            found.append(row(f"{name}, in memory", rates, r2(truth, log_g)))
    width = max(len(entry["engine"]) for entry in found)
    for entry in found:
        score = "" if entry["r2"] is None else f"R² {entry['r2']:.3f}"
        click.echo(f"{entry['engine']:<{width}}  {entry['spectra_per_second']:>10,.0f} spectra/s  {score}")
    if out:
        facts = {
            "what": "scoring",
            "rows": number,
            "seed": SEED,
            "model_sha256": model.hash,
            "environment": describe(),
        }
        Path(out).write_text(json.dumps({**facts, "results": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
