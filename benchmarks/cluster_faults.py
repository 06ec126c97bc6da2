"""Random kills of workers, clients and shards during fit and predict: what survives, bit for bit.

`python -m moefast.benchmarks.cluster_faults --cases 200 --seed 1 --folder SCRATCH [-o FILE]`

Design: small spectra, so that a case takes seconds; units of a few rows, so that a fit has several parts. Each case
kills one process with SIGKILL at a random time of the job (workers while the client waits; a client, or one process of
`--shard`, whose command is then repeated) and compares what comes out with what one process made: columns of the table
with every row once, or arrays of the model. Nothing may be left beside the output.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from moefast.benchmarks.cluster import same_model, same_table
from moefast.benchmarks.environment import describe
from moefast.cluster.fit_on_workers import fit_on
from moefast.cluster.fit_parts import FitPlan, Source, fit_of_parts, gather_to_file
from moefast.cluster.merge import merge_tables
from moefast.cluster.workers import connect, predict_on
from moefast.experts import normal_equations
from moefast.fitting import error_model, gate, linear_experts, sample, statistics
from moefast.predicting.files import predict
from moefast.spectra.writer import SpectrumWriter

__all__ = ["FAULTS", "campaign"]

ROWS, PIXELS, UNIT, SHARDS = 1500, 640, 128, 3
FAULTS = (
    "worker, predict",
    "worker, fit",
    "client, predict",
    "client, fit",
    "shard, predict",
    "shard, fit",
)
ARGUMENTS = {"recipe": "global-ridge", "references": False}


def make_small() -> None:
    """Units of a few rows, small samples, short trainings: quality is not the question."""
    normal_equations.BUFFER_ROWS, statistics.UNIT_ROWS, sample.NOISY_ROWS = 64, UNIT, 3000
    linear_experts.RANK_STEP, linear_experts.ALPHAS = 200, (0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0)
    for room, name in ((gate, "fit_gate"), (error_model, "fit_error_model")):
        work = getattr(room, name)
        if not isinstance(work, functools.partial):
            setattr(room, name, functools.partial(work, steps=40))


def write_spectra(path: Path, seed: int) -> None:
    """Spectra of low rank with lines, and labels."""
    rng = np.random.default_rng(seed)
    t_eff, log_g, m_h = (rng.uniform(a, b, ROWS) for a, b in ((3750, 6000), (1, 5), (-2.5, 0.75)))
    wave = np.linspace(7100.2, 8849.8, PIXELS)
    terms = np.column_stack([(t_eff - 4875) / 1125, (log_g - 3) / 2, (m_h + 0.875) / 1.625])
    shapes = np.sin(2 * np.pi * np.outer(np.arange(2, 5), np.linspace(0, 1, PIXELS)))
    flux = (1 + 0.05 * terms @ shapes).astype(np.float32)
    error = (0.1 * np.exp(rng.normal(0, 0.4, (ROWS, 1))) * np.ones(PIXELS)).astype(np.float32)
    step = wave[1] - wave[0]
    with SpectrumWriter(
        path, n_rows=ROWS, wave=wave, wave_edges=np.append(wave, wave[-1] + step) - step / 2,
        arrays=("flux", "error"), params=dict.fromkeys(("T_eff", "log_g", "M_H"), "f8"),
    ) as writer:  # fmt: skip
        writer.write(0, params={"T_eff": t_eff, "log_g": log_g, "M_H": m_h}, flux=flux, error=error)


class Ground:
    """Spectra, a model, and what one process makes of them."""

    def __init__(self, folder: Path) -> None:
        self.spectra = folder / "spectra.h5"
        folder.mkdir(parents=True, exist_ok=True)
        if not self.spectra.exists():
            write_spectra(self.spectra, 1)
        self.whole = plan_of(folder).prepare().fit(False).save(folder / "model", overwrite=True)
        self.table = folder / "table.parquet"
        predict(self.spectra, folder / "model", self.table, overwrite=True)

    def is_whole(self, case: Path, what: str, result: Any) -> str:
        """What is wrong with the result of a case; empty if nothing is."""
        good = (
            same_model(result, self.whole) if what == "fit" else same_table(case / "out.parquet", self.table)
        )
        left = sorted(path.name for path in case.iterdir() if path.name.startswith("."))
        return "; ".join(filter(None, ("" if good else "other bits", f"left {left}" if left else "")))


def plan_of(folder: Path) -> FitPlan:
    """The fit of the spectra of a folder."""
    return FitPlan(Source.of_files([folder / "spectra.h5"]), ARGUMENTS)


def job(folder: Path, case: Path, what: str, client: Any) -> Any:
    """The job on a cluster."""
    if what == "fit":
        plan = plan_of(folder)
        return fit_on(client, plan, plan.prepare(), case / "out", n_parts=6)
    return predict_on(
        client, [folder / "spectra.h5"], folder / "model", case / "out.parquet", options={}, rows_per_task=100
    )


def one_shard(folder: Path, case: Path, what: str, index: int) -> None:
    """One part, as a task of a job array does it."""
    if what == "fit":
        plan = plan_of(folder)
        prepared = plan.prepare()
        rows = statistics.rows_of_part(ROWS, index, SHARDS)
        gather_to_file(case / f"part-{index}.npz", plan, prepared, rows, shard=(index, SHARDS))
    else:
        predict(
            folder / "spectra.h5", folder / "model", case / f"part-{index}.parquet", shard=(index, SHARDS),
            overwrite=True,
        )  # fmt: skip


def killed(arguments: list[str], after: float) -> bool:
    """Whether a process that was started with these arguments was still there to be killed after so long."""
    process = subprocess.Popen(
        [sys.executable, "-m", "moefast.benchmarks.cluster_faults", *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        process.wait(after)
        return False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True


def worker_case(folder: Path, case: Path, what: str, client: Any, after: float) -> tuple[Any, bool]:
    """Kill a worker while the job is done."""
    struck: list[int] = []

    def strike() -> None:
        pids = list(client.run(os.getpid, on_error="ignore").values())
        if pids:
            os.kill(pids[0], signal.SIGKILL)
            struck.append(pids[0])

    timer = threading.Timer(after, strike)
    timer.start()
    try:
        result = job(folder, case, what, client)
    finally:
        during = bool(struck)
        timer.cancel()
        timer.join()
    client.wait_for_workers(2, timeout=120)
    return result, during


def campaign(
    n_cases: int, seed: int, folder: Path, faults: tuple[str, ...] = FAULTS, tell: Callable[[str], None] = print
) -> list[dict[str, Any]]:  # fmt: skip
    """Cases one after the other: what was killed when, whether it was at work, and what was wrong afterwards."""
    from distributed import WorkerPlugin

    class Small(WorkerPlugin):
        def setup(self, worker: Any) -> None:
            make_small()

    make_small()
    ground, rng = Ground(folder), random.Random(seed)
    # How long a job and a process take here, to know when to strike.
    usual: dict[str, float] = {}
    found = []
    with connect("local:2") as client:
        client.register_plugin(Small())
        for what in ("predict", "fit"):
            case = folder / "usual"
            shutil.rmtree(case, ignore_errors=True)
            case.mkdir()
            job(folder, case, what, client)
            begin = time.monotonic()
            shutil.rmtree(case)
            case.mkdir()
            job(folder, case, what, client)
            usual[what] = time.monotonic() - begin
            shutil.rmtree(case)
        begin = time.monotonic()
        killed(["--nothing", "--folder", str(folder)], 600)
        start = time.monotonic() - begin
        for number in range(n_cases):
            fault = faults[number % len(faults)]
            who, what = fault.split(", ")
            case = folder / f"case-{number}"
            shutil.rmtree(case, ignore_errors=True)
            case.mkdir()
            share, begin = rng.random(), time.monotonic()
            after = share * usual[what] + (0 if who == "worker" else start)
            problem, result = "", None
            try:
                if who == "worker":
                    result, during = worker_case(folder, case, what, client, after)
                elif who == "client":
                    address = str(client.scheduler_info(n_workers=0)["address"])
                    during = killed(
                        ["--client", what, "--address", address, "--case", str(case), "--folder", str(folder)], after
                    )  # fmt: skip
                    if what == "fit" or not (case / "out.parquet").exists():
                        result = job(folder, case, what, client)
                else:
                    struck = rng.randrange(SHARDS)
                    during = killed(
                        ["--shard", str(struck), "--client", what, "--case", str(case), "--folder", str(folder)], after
                    )  # fmt: skip
                    for index in range(SHARDS):
                        name = f"part-{index}.{'npz' if what == 'fit' else 'parquet'}"
                        if not (case / name).exists():
                            one_shard(folder, case, what, index)
                    if what == "fit":
                        result = fit_of_parts(sorted(case.glob("part-*.npz")))
                    else:
                        merge_tables(sorted(case.glob("part-*.parquet")), case / "out.parquet")
                problem = ground.is_whole(case, what, result)
            except Exception as error:
                during, problem = True, f"{type(error).__name__}: {error}"
            found.append({
                "fault": fault, "share": share, "at_work": during, "problem": problem,
                "seconds": time.monotonic() - begin,
            })  # fmt: skip
            tell(f"{number + 1}/{n_cases} {fault} at {share:.2f}: {problem or 'the same bits'}")
            shutil.rmtree(case, ignore_errors=True)
    return found


def table_of(found: list[dict[str, Any]]) -> str:
    """Faults, how many were tried, in how many of these the process was at work, and how many were survived."""
    tried, at_work = (
        Counter(one["fault"] for one in found),
        Counter(one["fault"] for one in found if one["at_work"]),
    )
    survived = Counter(one["fault"] for one in found if not one["problem"])
    lines = [f"{'killed':<18}{'tried':>7}{'at work':>9}{'survived':>10}"]
    lines += [
        f"{fault:<18}{tried[fault]:>7}{at_work[fault]:>9}{survived[fault]:>10}"
        for fault in FAULTS
        if tried[fault]
    ]
    return "\n".join(lines)


@click.command()
@click.option("--cases", type=click.IntRange(1), default=12, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="For spectra and results.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Also write what was found as JSON.")
@click.option("--client", "what", hidden=True)
@click.option("--address", hidden=True)
@click.option("--case", type=click.Path(path_type=Path), hidden=True)
@click.option("--shard", type=int, hidden=True)
@click.option("--nothing", is_flag=True, hidden=True)
def main(
    cases: int, seed: int, folder: Path, out: Path | None, what: str | None, address: str | None, case: Path | None,
    shard: int | None, nothing: bool,
) -> None:  # fmt: skip
    """Kill processes at random and judge what comes out."""
    make_small()
    if nothing:
        return
    if shard is not None and case is not None and what is not None:
        one_shard(folder, case, what, shard)
        return
    if address is not None and case is not None and what is not None:
        _as_client(folder, case, what, address)
        return
    found = campaign(cases, seed, folder, tell=lambda words: click.echo(words, err=True))
    click.echo(table_of(found))
    if out is not None:
        out.write_text(
            json.dumps({"environment": describe(), "cases": found}, indent=1) + "\n", encoding="utf-8"
        )
    if any(one["problem"] for one in found):
        raise SystemExit(1)


def _as_client(folder: Path, case: Path, what: str, address: str) -> None:
    """The job, by a client of its own."""
    with connect(address) as client:
        job(folder, case, what, client)


if __name__ == "__main__":
    main()
