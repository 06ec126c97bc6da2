"""Faults of workers, clients and shards during fit and predict: what survives, bit for bit.

`python -m moefast.benchmarks.cluster_faults --cases 200 --seed 1 --folder SCRATCH [-o FILE]`

Design: small spectra, so that a case takes seconds; units of a few rows, so that a fit has several parts. Each case
disturbs processes at a random time of the job and compares what comes out with what one process made: columns of the
table with every row once, or arrays of the model. Nothing may be left beside the output. What is disturbed:

- a worker, a client, or one process of `--shard`, killed with SIGKILL; the command of the latter two is then repeated;
- a slow worker: stopped, and continued after up to three times what the job takes;
- a worker that hangs: stopped for good, until the scheduler misses it;
- a worker above the limit of its memory, which its nanny ends again and again;
- a worker whose allocations fail from some point on;
- all workers above their limit: the job must fail with one error of moefast's own, and succeed when they have memory.
"""

from __future__ import annotations

import functools
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import numpy as np

from moefast.benchmarks.cluster import same_model, same_table
from moefast.benchmarks.environment import describe
from moefast.cluster import workers
from moefast.cluster.fit_on_workers import fit_on
from moefast.cluster.fit_parts import FitPlan, TrainingSpectra, fit_of_parts, gather_to_file
from moefast.cluster.merge import merge_tables
from moefast.cluster.workers import connect, predict_on
from moefast.core.atomic import write_json
from moefast.core.errors import BackendError
from moefast.experts import normal_equations
from moefast.fitting import error_model, gate, linear_experts, sample, statistics
from moefast.predicting.files import predict
from moefast.spectra.writer import SpectrumWriter

__all__ = ["FAULTS", "campaign"]

ROWS, PIXELS, UNIT, SHARDS, WORKERS = 1500, 640, 128, 3, 2
KILLS = ("worker", "client", "shard")
TROUBLES = (
    "slow worker",
    "hanging worker",
    "worker above its memory",
    "failing allocations",
    "all above their memory",
)
JOBS = ("predict", "fit")
FAULTS = tuple(f"{who}, {what}" for who in (*KILLS, *TROUBLES) for what in JOBS)
PATIENT, IMPATIENT = 1800.0, 15.0
"""Seconds for which a worker may be silent, and the same in cases in which one hangs."""
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
    return FitPlan(TrainingSpectra.of_files([folder / "spectra.h5"]), ARGUMENTS)


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


def computed(pid: int) -> float:
    """Seconds that a process has computed; inf once it has ended."""
    try:
        # What follows the name in brackets: state, …, user and system time as the 12th and 13th.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return math.inf
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def killed(arguments: list[str], after: float) -> bool:
    """Whether a process with these arguments was still there to be killed when it had computed for some seconds.

    Not after a time on the clock: the machine may be busy with other work.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "moefast.benchmarks.cluster_faults", *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while computed(process.pid) < after:
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.01)
            return False
    process.send_signal(signal.SIGKILL)
    process.wait()
    return process.returncode == -signal.SIGKILL


@contextmanager
def at(seconds: float, strike: Callable[[], None]) -> Generator[list[bool], None, None]:
    """Strike after some time, if what is done has not ended before; whether it was struck."""
    struck: list[bool] = []

    def work() -> None:
        struck.append(True)
        strike()

    timer = threading.Timer(seconds, work)
    timer.start()
    try:
        yield struck
    finally:
        timer.cancel()
        timer.join()


def memory_of(pid: int, field: str) -> int:
    """Bytes of a process: VmRSS or VmSize."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


class Battlefield:
    """Workers of this machine, and how to disturb them."""

    def __init__(self, client: Any, rng: random.Random) -> None:
        self.client, self.rng = client, rng

    def pids(self) -> dict[str, int]:
        """Process of each worker, by its address."""
        found: dict[str, int] = self.client.run(os.getpid, on_error="ignore")
        return found

    def wait(self) -> None:
        """Until both workers are there and answer."""
        deadline = time.monotonic() + 600
        while len(self.pids()) < WORKERS and time.monotonic() < deadline:
            # Nannies whose workers died while they started are gone.
            self.client.cluster.scale(WORKERS)
            time.sleep(0.5)

    def limit(self, share: float | None, workers: list[str] | None = None) -> None:
        """Give workers a limit for their memory, as a share of what they take now; None for what they had at first."""
        taken = {worker: memory_of(pid, "VmRSS") for worker, pid in self.pids().items()} if share else {}

        def change(dask_worker: Any) -> None:
            manager = dask_worker.memory_manager
            manager.at_first = getattr(manager, "at_first", manager.memory_limit)
            now = taken.get(dask_worker.worker_address)
            manager.memory_limit = manager.at_first if now is None or share is None else int(share * now)

        self.client.run(change, nanny=True, workers=workers, on_error="ignore")

    def give_up_after(self, seconds: float) -> None:
        """How long the scheduler lets a worker be silent; it looks from time to time."""

        def change(dask_scheduler: Any) -> None:
            dask_scheduler.worker_ttl = seconds

        self.client.run_on_scheduler(change)

    @contextmanager
    def disturbed(self, who: str, after: float, usual: float) -> Generator[list[bool], None, None]:
        """Workers in trouble for as long as the job is done."""
        pids = self.pids()
        address = self.rng.choice(sorted(pids))
        pid = pids[address]
        if who == "worker":
            with at(after, functools.partial(os.kill, pid, signal.SIGKILL)) as struck:
                yield struck
        elif who == "slow worker":
            pause = self.rng.uniform(0, 3) * usual
            later = threading.Timer(after + pause, os.kill, (pid, signal.SIGCONT))
            with at(after, functools.partial(os.kill, pid, signal.SIGSTOP)) as struck:
                later.start()
                yield struck
            later.join()
        elif who == "hanging worker":
            self.give_up_after(IMPATIENT)
            with at(after, functools.partial(os.kill, pid, signal.SIGSTOP)) as struck:
                yield struck
            self.give_up_after(PATIENT)
            if struck:
                # It has been replaced, or nothing was asked of it.
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        elif who == "worker above its memory":
            with at(after, functools.partial(self.limit, 0.9, [address])) as struck:
                yield struck
            self.limit(None)
        else:
            margin = int(self.rng.uniform(0, 64) * 2**20)

            def fail() -> None:
                most = memory_of(pid, "VmSize") + margin
                resource.prlimit(pid, resource.RLIMIT_AS, (most, most))

            with at(after, fail) as struck:
                yield struck
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def worker_case(
    folder: Path, case: Path, who: str, what: str, field: Battlefield, after: float, usual: float
) -> tuple[Any, bool]:
    """The job with workers in trouble."""
    if who == "all above their memory":
        with at(after, functools.partial(field.limit, 0.9)) as struck:
            try:
                result = job(folder, case, what, field.client)
            except BackendError:
                result = None
        field.limit(None)
        field.wait()
        if result is None:
            result = job(folder, case, what, field.client)
        return result, bool(struck)
    with field.disturbed(who, after, usual) as struck:
        result = job(folder, case, what, field.client)
    field.wait()
    return result, bool(struck)


def client_case(folder: Path, case: Path, what: str, field: Battlefield, after: float) -> tuple[Any, bool]:
    """The job by a client of its own, which is killed; then once more."""
    address = str(field.client.scheduler_info(n_workers=0)["address"])
    during = killed(
        ["--client", what, "--address", address, "--case", str(case), "--folder", str(folder)], after
    )
    if what == "fit" or not (case / "out.parquet").exists():
        return job(folder, case, what, field.client), during
    return None, during


def shard_case(folder: Path, case: Path, what: str, rng: random.Random, after: float) -> tuple[Any, bool]:
    """One process of a job array, which is killed; then those whose files are not there."""
    struck = rng.randrange(SHARDS)
    during = killed(
        ["--shard", str(struck), "--client", what, "--case", str(case), "--folder", str(folder)], after
    )
    for index in range(SHARDS):
        name = f"part-{index}.{'npz' if what == 'fit' else 'parquet'}"
        if not (case / name).exists():
            one_shard(folder, case, what, index)
    if what == "fit":
        return fit_of_parts(sorted(case.glob("part-*.npz"))), during
    merge_tables(sorted(case.glob("part-*.parquet")), case / "out.parquet")
    return None, during


def seconds_of(folder: Path, client: Any) -> dict[str, tuple[float, float]]:
    """When each job begins and ends, undisturbed: on the clock for workers, by what they compute for processes."""
    case = folder / "usual"

    def timed(clock: Callable[[], float], work: Callable[[], Any]) -> float:
        shutil.rmtree(case, ignore_errors=True)
        case.mkdir()
        begin = clock()
        work()
        return clock() - begin

    def by_process(*arguments: str) -> float:
        whole = [*arguments, "--case", str(case), "--folder", str(folder)]
        return timed(children, functools.partial(killed, whole, math.inf))

    def children() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    address = str(client.scheduler_info(n_workers=0)["address"])
    start = by_process("--nothing")
    found = {}
    for what in JOBS:
        work = functools.partial(job, folder, case, what, client)
        # The first time something is compiled.
        timed(time.monotonic, work)
        found[f"worker, {what}"] = 0.0, timed(time.monotonic, work)
        found[f"client, {what}"] = start, by_process("--client", what, "--address", address)
        found[f"shard, {what}"] = start, by_process("--shard", "0", "--client", what)
    shutil.rmtree(case)
    return found


def campaign(
    n_cases: int, seed: int, folder: Path, faults: tuple[str, ...] = FAULTS, tell: Callable[[str], None] = print,
    keep: Callable[[list[dict[str, Any]]], None] = lambda found: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Cases one after the other: what was done when, whether the job was under way, and what was wrong afterwards."""
    from distributed import WorkerPlugin

    class Small(WorkerPlugin):
        def setup(self, worker: Any) -> None:
            make_small()

    make_small()
    ground, rng = Ground(folder), random.Random(seed)
    found = []
    # Also how often the scheduler looks.
    workers.WORKER_TTL = f"{IMPATIENT:g} s"
    with connect(f"local:{WORKERS}") as client:
        client.register_plugin(Small())
        field = Battlefield(client, rng)
        field.give_up_after(PATIENT)
        usual = seconds_of(folder, client)
        for number in range(n_cases):
            fault = faults[number % len(faults)]
            who, what = fault.split(", ")
            case = folder / f"case-{number}"
            shutil.rmtree(case, ignore_errors=True)
            case.mkdir()
            share, begin = rng.random(), time.monotonic()
            start, stop = usual[fault if who in KILLS else f"worker, {what}"]
            after = start + share * (stop - start)
            problem = ""
            try:
                if who == "client":
                    result, during = client_case(folder, case, what, field, after)
                elif who == "shard":
                    result, during = shard_case(folder, case, what, rng, after)
                else:
                    result, during = worker_case(folder, case, who, what, field, after, stop)
                problem = ground.is_whole(case, what, result)
            except Exception as error:
                during, problem = True, f"{type(error).__name__}: {error}"
                field.limit(None)
                field.wait()
            found.append({
                "fault": fault, "share": share, "at_work": during, "problem": problem,
                "seconds": time.monotonic() - begin,
            })  # fmt: skip
            tell(f"{number + 1}/{n_cases} {fault} at {share:.2f}: {problem or 'the same bits'}")
            keep(found)
            shutil.rmtree(case, ignore_errors=True)
    return found


def table_of(found: list[dict[str, Any]]) -> str:
    """Faults, how many were tried, in how many of these the process was at work, and how many were survived."""
    tried, at_work = (
        Counter(one["fault"] for one in found),
        Counter(one["fault"] for one in found if one["at_work"]),
    )
    survived = Counter(one["fault"] for one in found if not one["problem"])
    lines = [f"{'fault':<32}{'tried':>7}{'at work':>9}{'survived':>10}"]
    lines += [
        f"{fault:<32}{tried[fault]:>7}{at_work[fault]:>9}{survived[fault]:>10}"
        for fault in FAULTS
        if tried[fault]
    ]
    return "\n".join(lines)


@click.command()
@click.option("--cases", type=click.IntRange(1), default=12, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--fault", "faults", multiple=True, type=click.Choice(FAULTS), help="Only this one.")
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="For spectra and results.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Also write what was found as JSON.")
@click.option("--client", "what", hidden=True)
@click.option("--address", hidden=True)
@click.option("--case", type=click.Path(path_type=Path), hidden=True)
@click.option("--shard", type=int, hidden=True)
@click.option("--nothing", is_flag=True, hidden=True)
def main(
    cases: int, seed: int, faults: tuple[str, ...], folder: Path, out: Path | None, what: str | None,
    address: str | None, case: Path | None, shard: int | None, nothing: bool,
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

    def keep(found: list[dict[str, Any]]) -> None:
        if out is not None:
            write_json({"environment": describe(), "seed": seed, "cases": found}, out, overwrite=True)

    found = campaign(cases, seed, folder, faults or FAULTS, lambda words: click.echo(words, err=True), keep)
    click.echo(table_of(found))
    if any(one["problem"] for one in found):
        raise SystemExit(1)


def _as_client(folder: Path, case: Path, what: str, address: str) -> None:
    """The job, by a client of its own."""
    with connect(address) as client:
        job(folder, case, what, client)


if __name__ == "__main__":
    main()
