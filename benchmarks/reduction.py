"""The reduction of a fit on many workers: how deep, how many bytes, how long, and what limits it first.

`python -m moefast.benchmarks.reduction [--workers 1000] [-n 1000000000] [-o FILE]`

Design: the tree is the one of `moefast.cluster.fit_on_workers`, gone through step by step: each worker writes its
parts, eight files become one until eight are left, the client reads these. A step takes as long as its slowest worker;
workers share the storage. Rates of one core (adding, hashing) are measured here; those of storage and of the first pass
are given, and are what a site should put in. The same tree is then run for real on small statistics of as many
workers, against a sum in one process: bits must agree.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from moefast.benchmarks.environment import describe
from moefast.cluster.fit_on_workers import FAN_IN, n_parts_of
from moefast.experts.exact_sums import Scales
from moefast.experts.normal_equations import NormalEquations
from moefast.fitting.statistics import n_units

__all__ = ["Site", "reduction", "same_bits"]

PIXELS, BINS, FOLDS = 4096, 9, 3
LABEL_BYTES = 3 * 8 + 8 + 8 + 1
"""Of a spectrum, in every process: three labels, bin and fold in 64 bits, and whether it has labels."""


@dataclass(frozen=True)
class Site:
    """What a cluster can do: bytes per second of the whole storage and of one node, and spectra per second of a worker.

    `adding` and `hashing` are bytes per second of one core.
    """

    storage: float
    node: float
    first_pass: float
    adding: float
    hashing: float


def measured() -> tuple[float, float]:
    """Bytes per second of computing that one core adds to totals, and hashes."""
    a, b = np.ones(1 << 23), np.ones(1 << 23)
    content = b.tobytes()
    times = []
    for work in (lambda: np.add(a, b, out=a), lambda: hashlib.sha256(content).digest()):
        each = []
        for _ in range(9):
            # Not on the clock: the machine may be busy with other work.
            begin = time.process_time()
            work()
            each.append(time.process_time() - begin)
        times.append(min(each))
    return b.nbytes / times[0], len(content) / times[1]


def reduction(n_rows: int, n_workers: int, site: Site) -> dict[str, Any]:
    """Sizes, bytes, depth and seconds of the first pass of a fit, and what takes longest."""
    file_bytes = 8 * (BINS * FOLDS + 1) * (PIXELS * (PIXELS + 1) // 2 + 3 * PIXELS + 3)
    row_bytes = 2 * 4 * PIXELS
    parts = n_parts_of(n_rows, n_workers)
    busy = min(n_workers, parts)
    share = min(site.node, site.storage / busy)
    # The worker with the most units is the last.
    most = math.ceil(parts / busy) * math.ceil(n_units(n_rows) / parts) * n_rows / n_units(n_rows)
    reading, adding_rows = most * row_bytes / share, most / site.first_pass
    gathering = max(reading, adding_rows)
    writing = math.ceil(parts / busy) * file_bytes * (1 / share + 1 / site.hashing)
    files, levels, joining, moved = parts, 0, 0.0, parts * file_bytes
    while files > FAN_IN:
        joins = math.ceil(files / FAN_IN)
        at_once = min(joins, n_workers)
        rate = min(site.node, site.storage / at_once)
        each = FAN_IN * file_bytes * (1 / rate + 1 / site.hashing + 1 / site.adding) + file_bytes * (
            1 / rate + 1 / site.hashing
        )
        joining += math.ceil(joins / at_once) * each
        moved += (files + joins) * file_bytes
        files, levels = joins, levels + 1
    last = files * file_bytes * (1 / min(site.node, site.storage) + 1 / site.hashing + 1 / site.adding)
    moved += files * file_bytes
    seconds = {
        "reading the spectra": reading, "adding their products": adding_rows, "writing the parts": writing,
        "joining them": joining, "the last join": last,
    }  # fmt: skip
    return {
        "n_rows": n_rows, "workers": n_workers, "parts": parts, "file_bytes": file_bytes, "levels": levels + 1,
        "bytes_of_spectra": n_rows * row_bytes, "bytes_of_statistics": moved,
        "label_bytes_of_each_process": n_rows * LABEL_BYTES, "seconds": seconds,
        "total_seconds": gathering + writing + joining + last,
        "reduction_share": (writing + joining + last) / (gathering + writing + joining + last),
        "first_limit": max(seconds, key=lambda name: seconds[name]),
    }  # fmt: skip


def same_bits(n_workers: int, n_pixels: int = 24, seed: int = 0) -> bool:
    """Whether the tree over as many workers gives the bits of one process, on small statistics."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((4, n_pixels))
    scales = Scales.of(64 * n_workers, np.full(n_pixels, 4.0), np.full(n_pixels, 1.0), 8.0)

    def empty() -> NormalEquations:
        return NormalEquations(np.zeros(n_pixels), 2, 2, scales=scales)

    whole = empty()
    files: list[NormalEquations] = []
    for worker in range(n_workers):
        x = (rng.standard_normal((64, 4)) @ mixing).astype(np.float32)
        y, bins, folds = rng.uniform(1, 5, 64), rng.integers(0, 2, 64), rng.integers(0, 2, 64)
        part = empty()
        for total in (whole, part):
            total.add(x, y, np.ones_like(x), bins, folds)
            total.end_unit()
        # Workers end in any order within their group: sums do not mind.
        files.insert(worker // FAN_IN * FAN_IN + int(rng.integers(0, worker % FAN_IN + 1)), part)
    while len(files) > 1:
        groups = [files[start : start + FAN_IN] for start in range(0, len(files), FAN_IN)]
        for group in groups:
            for other in group[1:]:
                group[0].include(other)
        files = [group[0] for group in groups]
    names = ("count", "sum_x", "sum_y", "sum_yy", "sum_xy", "gram", "sum_v")
    return files[0].is_exact and all(
        np.array_equal(getattr(files[0], name), getattr(whole, name)) for name in names
    )


@click.command()
@click.option("-n", "--number", type=int, default=10**9, show_default=True, help="Spectra.")
@click.option("--workers", type=int, default=1000, show_default=True)
@click.option("--storage", default=50.0, show_default=True, help="GB/s of the whole storage.")
@click.option("--node", default=2.0, show_default=True, help="GB/s of one node.")
@click.option("--first-pass", default=4000.0, show_default=True, help="Spectra per second of a worker.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Also write what was found as JSON.")
def main(number: int, workers: int, storage: float, node: float, first_pass: float, out: Path | None) -> None:
    """Sizes, bytes, depth and time of the reduction, for a tenth and a hundredth of the workers as well."""
    adding, hashing = measured()
    site = Site(storage * 1e9, node * 1e9, first_pass, adding, hashing)
    found = [
        reduction(n, w, site)
        for n in dict.fromkeys((number // 1000, number))
        for w in dict.fromkeys((max(1, workers // 100), max(1, workers // 10), workers))
    ]
    exact = same_bits(workers)
    click.echo(f"the tree over {workers} workers gives the bits of one process: {exact}")
    for one in found:
        click.echo(
            f"{one['n_rows']:,} spectra, {one['workers']} workers: {one['parts']} parts of "
            f"{one['file_bytes'] / 1e9:.2f} GB, {one['levels']} levels, {one['bytes_of_statistics'] / 1e12:.2f} TB of "
            f"statistics beside {one['bytes_of_spectra'] / 1e12:.2f} TB of spectra, {one['total_seconds']:,.0f} s, "
            f"{100 * one['reduction_share']:.0f} % of it the reduction; labels take "
            f"{one['label_bytes_of_each_process'] / 1e9:.1f} GB of each process"
        )
        for name, seconds in one["seconds"].items():
            click.echo(f"    {name}: {seconds:,.0f} s" + (" *" if name == one["first_limit"] else ""))
    if out is not None:
        document = {"environment": describe(), "site": asdict(site), "same_bits": exact, "reductions": found}
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
