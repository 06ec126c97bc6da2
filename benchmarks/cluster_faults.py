"""Faults of workers, clients, shards and merges during fit and predict: what survives, bit for bit.

`python -m moefast.benchmarks.cluster_faults --kills 208 --troubles 20 --seed 1 --folder SCRATCH [-o FILE]`

Design: small spectra, so that a case takes seconds; units of a few rows, so that a fit has several parts, which are
joined. Each case disturbs processes at a random moment of their work, a share of what they compute or of what they do
with files (`moefast.benchmarks.strikes`), and compares what comes out with what one process made: columns of the
table with every row once, or arrays of the model. A strike that misses, because the job has ended before or the worker
has no task then, does not count: the case is done again at another moment. Nothing may be left beside the output. What
is disturbed:

- a worker with a task, a client, one process of `--shard`, or one that merges their files, killed with SIGKILL; all but
  the first are then repeated;
- a slow worker: stopped in a task, and continued after up to three times what the job takes;
- a worker that hangs: stopped for good, until the scheduler misses it;
- a worker above the limit of its memory, which its nanny ends again and again;
- a worker whose allocations fail from some point on;
- all workers above their limit: the job must fail with one error of moefast's own, and succeed when they have memory.

Processes, workers too, are forked from one that has everything loaded.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click
import numpy as np

from moefast.benchmarks.cluster import same_model, same_table
from moefast.benchmarks.environment import describe
from moefast.benchmarks.strikes import (
    Amount,
    Strike,
    computed,
    count_operations,
    operations,
    run_struck,
)
from moefast.cluster import workers
from moefast.cluster.fit_on_workers import fit_on
from moefast.cluster.fit_parts import FitPlan, TrainingSpectra, fit_of_parts, gather_to_file
from moefast.cluster.merge import merge_tables
from moefast.cluster.predict_on_workers import predict_on
from moefast.cluster.workers import connect, work_of
from moefast.core.atomic import write_json
from moefast.core.errors import BackendError, BenchmarkError
from moefast.experts import normal_equations
from moefast.fitting import error_model, gate, linear_experts, sample, statistics
from moefast.model import Model
from moefast.predicting.files import predict
from moefast.spectra.writer import SpectrumWriter

__all__ = ["FAULTS", "KILLS", "TROUBLES", "campaign", "make_small", "table_of", "write_spectra"]

ROWS, PIXELS, UNIT, SHARDS, PARTS, WORKERS = 1500, 640, 128, 3, 10, 2
"""More parts than are joined at a time."""
JOBS = ("predict", "fit")
KILLS = tuple(f"{who}, {what}" for who in ("worker", "client", "shard", "merge") for what in JOBS)
TROUBLES = tuple(
    f"{who}, {what}"
    for who in (
        "slow worker",
        "hanging worker",
        "worker above its memory",
        "failing allocations",
        "all above their memory",
    )
    for what in JOBS
)
FAULTS = (*KILLS, *TROUBLES)
PATIENT, IMPATIENT = 1800.0, 30.0
"""Seconds for which a worker may be silent, and the same in cases in which one hangs."""
ATTEMPTS = 20
"""How often a case is done again because its strike missed."""
ARGUMENTS = {"recipe": "global-ridge", "references": False}
Say = Callable[[str], None]


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
    """Spectra, a model, parts of it and of a table, and what one process makes of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.spectra, self.table = folder, folder / "spectra.h5", folder / "table.parquet"
        folder.mkdir(parents=True, exist_ok=True)
        if not self.spectra.exists():
            write_spectra(self.spectra, 1)
        self.whole = plan_of(folder).prepare().fit(False).save(folder / "model", overwrite=True)
        predict(self.spectra, folder / "model", self.table, overwrite=True)
        for what in JOBS:
            for index in range(SHARDS):
                one_shard(_silent, folder, folder, what, index)

    def problem(self, case: Path, what: str) -> str:
        """What is wrong with the result of a case; empty if nothing is."""
        try:
            good = (
                same_model(Model.load(case / "out"), self.whole)
                if what == "fit"
                else same_table(case / "out.parquet", self.table)
            )
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        left = sorted(path.name for path in case.iterdir() if path.name.startswith("."))
        return "; ".join(filter(None, ("" if good else "other bits", f"left {left}" if left else "")))


def _silent(_: str) -> None:
    """Nobody is told."""


def plan_of(folder: Path) -> FitPlan:
    """The fit of the spectra of a folder."""
    return FitPlan(TrainingSpectra.of_files([folder / "spectra.h5"]), ARGUMENTS)


# -- jobs -----------------------------------------------------------------------------------------------------------


def job(say: Say, folder: Path, case: Path, what: str, client: Any) -> None:
    """The job on a cluster, as its command does it."""
    if what == "predict":
        options: dict[str, Any] = {}
        say("tables of the workers")
        predict_on(
            client, [folder / "spectra.h5"], folder / "model", case / "out.parquet", options=options,
            overwrite=True, rows_per_task=100,
            progress=lambda done, total: say("merging") if done == total else None,
        )  # fmt: skip
        return
    plan = plan_of(folder)
    say("first pass")

    def progress(stage: str, done: int, total: int) -> None:
        if stage != "normal equations":
            say("second pass")
        elif done == total:
            say("between the passes")

    def save(model: Model) -> Model:
        say("publishing")
        saved = model.save(case / "out", overwrite=True)
        say("published")
        return saved

    fit_on(client, plan, plan.prepare(), case / "out", n_parts=PARTS, save=save, progress=progress)


def as_client(say: Say, address: str, folder: Path, case: Path, what: str) -> None:
    """The job, by a client of its own."""
    make_small()
    with connect(address) as client:
        job(say, folder, case, what, client)


def name_of(what: str, index: int) -> str:
    """Name of the file of a shard."""
    return f"part-{index}.{'npz' if what == 'fit' else 'parquet'}"


def one_shard(say: Say, folder: Path, case: Path, what: str, index: int) -> None:
    """One part, as a task of a job array does it."""
    make_small()
    say("a part")
    out = case / name_of(what, index)
    if what == "fit":
        plan = plan_of(folder)
        prepared = plan.prepare()
        gather_to_file(
            out, plan, prepared, statistics.rows_of_part(ROWS, index, SHARDS), shard=(index, SHARDS)
        )
    else:
        predict(folder / "spectra.h5", folder / "model", out, shard=(index, SHARDS), overwrite=True)


def merge(say: Say, parts: list[Path], case: Path, what: str) -> None:
    """Join the parts of all shards."""
    make_small()
    say("merging")
    if what == "fit":
        model = fit_of_parts(
            parts, progress=lambda stage, *_: say("merging" if stage == "statistics" else "second pass")
        )
        say("publishing")
        model.save(case / "out", overwrite=True)
    else:
        merge_tables(parts, case / "out.parquet", overwrite=True)


# -- workers --------------------------------------------------------------------------------------------------------


def memory_of(pid: int, field: str) -> int:
    """Bytes of a process: VmRSS or VmSize."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


class Blow(NamedTuple):
    """A worker that was struck, and the kind of task that it had."""

    address: str
    pid: int
    task: str


class Battlefield:
    """Workers of this machine, and how to disturb them."""

    def __init__(self, client: Any, rng: random.Random) -> None:
        self.client, self.rng = client, rng

    def pids(self) -> dict[str, int]:
        """Process of each worker, by its address."""
        found: dict[str, int] = self.client.run(os.getpid, on_error="ignore")
        return found

    def wait(self) -> dict[str, int]:
        """The processes of both workers, once these are there and answer."""
        deadline = time.monotonic() + 600
        while len(found := self.pids()) < WORKERS:
            if time.monotonic() > deadline:
                raise BenchmarkError(f"{WORKERS - len(found)} of {WORKERS} workers have not come back")
            # Nannies whose workers died while they started are gone.
            self.client.cluster.scale(WORKERS)
            time.sleep(0.2)
        return found

    def busy(self) -> dict[str, str]:
        """The kind of task that workers have, by their addresses."""
        with suppress(RuntimeError):
            # The scheduler is in this process; it may change what is read here.
            return {
                worker.address: work_of(task.key)
                for worker in list(self.client.cluster.scheduler.workers.values())
                for task in list(worker.processing)[:1]
            }
        return {}

    def lost(self, address: str) -> list[str]:
        """Kinds of the tasks with which the scheduler lost a worker."""
        return [
            work_of(key)
            for _, event in self.client.get_events("all")
            if event.get("action") == "remove-worker" and event["worker"] == address
            for key in event["processing-tasks"]
        ]

    def limit(self, share: float | None, addresses: list[str] | None = None) -> None:
        """Give workers a limit for their memory, as a share of what they take now; None for what they had at first."""
        taken = {worker: memory_of(pid, "VmRSS") for worker, pid in self.pids().items()} if share else {}

        def change(dask_worker: Any) -> None:
            manager = dask_worker.memory_manager
            manager.at_first = getattr(manager, "at_first", manager.memory_limit)
            now = taken.get(dask_worker.worker_address)
            manager.memory_limit = manager.at_first if now is None or share is None else int(share * now)

        self.client.run(change, nanny=True, workers=addresses, on_error="ignore")

    def give_up_after(self, seconds: float) -> None:
        """How long the scheduler lets a worker be silent; it looks from time to time."""

        def change(dask_scheduler: Any) -> None:
            dask_scheduler.worker_ttl = seconds

        self.client.run_on_scheduler(change)

    @contextmanager
    def struck(
        self, pids: dict[str, int], seconds: float, blow: Callable[[Blow], None]
    ) -> Generator[list[Blow], None, None]:
        """Strike a worker with a task once workers have computed some seconds of a job; who was struck, if one was."""
        ended, blows = threading.Event(), []
        before = sum(map(computed, pids.values()))

        def watch() -> None:
            while not ended.wait(0.003):
                if sum(map(computed, pids.values())) - before < seconds:
                    continue
                busy = {address: task for address, task in self.busy().items() if address in pids}
                if busy:
                    address = self.rng.choice(sorted(busy))
                    found = Blow(address, pids[address], busy[address])
                    blow(found)
                    blows.append(found)
                    return

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield blows
        finally:
            ended.set()
            thread.join()

    def disturb(self, who: str, work: Callable[[], None], seconds: float, usual: float) -> str:
        """Do a job with a worker in trouble; the task that it had, empty if it had none or the job ended before."""
        pids = self.wait()
        continued: list[threading.Timer] = []
        margin, pause = int(self.rng.uniform(0, 64) * 2**20), self.rng.uniform(0, 3) * usual

        def stop(blow: Blow) -> None:
            os.kill(blow.pid, signal.SIGSTOP)
            if who == "slow worker":
                continued.append(threading.Timer(pause, os.kill, (blow.pid, signal.SIGCONT)))
                continued[0].start()

        def fail(blow: Blow) -> None:
            most = memory_of(blow.pid, "VmSize") + margin
            resource.prlimit(blow.pid, resource.RLIMIT_AS, (most, most))

        strike: dict[str, Callable[[Blow], None]] = {
            "worker": lambda blow: os.kill(blow.pid, signal.SIGKILL),
            "slow worker": stop,
            "hanging worker": stop,
            "worker above its memory": lambda blow: self.limit(0.9, [blow.address]),
            "failing allocations": fail,
            "all above their memory": lambda _: self.limit(0.9),
        }
        if who == "hanging worker":
            self.give_up_after(IMPATIENT)
        try:
            with self.struck(pids, seconds, strike[who]) as blows:
                work()
        finally:
            for timer in continued:
                timer.join()
            if who == "hanging worker":
                self.give_up_after(PATIENT)
            if "memory" in who:
                self.limit(None)
            if blows and who in ("hanging worker", "failing allocations"):
                # It has been replaced, or nothing was asked of it any more.
                with suppress(ProcessLookupError):
                    os.kill(blows[0].pid, signal.SIGKILL)
        if not blows:
            return ""
        if who == "worker":
            # It may have ended its task just before.
            self.wait()
            return (self.lost(blows[0].address) or [""])[0]
        return blows[0].task


# -- cases ----------------------------------------------------------------------------------------------------------


class Campaign:
    """Everything that cases need."""

    def __init__(self, ground: Ground, client: Any, rng: random.Random) -> None:
        self.ground, self.client, self.rng = ground, client, rng
        self.field = Battlefield(client, rng)
        self.field.give_up_after(PATIENT)
        self.context = multiprocessing.get_context("forkserver")
        self.address = str(client.scheduler_info(n_workers=0)["address"])
        self.seconds: dict[str, float] = {}
        self.usual = {fault: self._usual(*fault.split(", ")) for fault in KILLS}

    def _case(self, name: str) -> Path:
        case = self.ground.folder / name
        shutil.rmtree(case, ignore_errors=True)
        case.mkdir()
        return case

    def _usual(self, who: str, what: str) -> Amount:
        """What a job takes undisturbed: of the second time, as things are compiled the first time."""
        for _ in range(2):
            case = self._case("usual")
            if who == "worker":
                pids = self.field.wait()
                self.client.run(count_operations, str(case))
                before, begin = sum(map(computed, pids.values())), time.monotonic()
                job(_silent, self.ground.folder, case, what, self.client)
                self.seconds[what] = time.monotonic() - begin
                seconds = sum(map(computed, pids.values())) - before
                found = Amount(seconds, min(self.client.run(operations).values()))
                self.client.run(count_operations, "")
            else:
                took = run_struck(self.context, *self._process(who, what, case), folder=case).took
                if took is None:
                    raise BenchmarkError(f"{who}, {what} was killed undisturbed")
                found = took
            if problem := self.ground.problem(case, what) if who != "shard" else "":
                raise BenchmarkError(f"{who}, {what}, undisturbed: {problem}")
        shutil.rmtree(case)
        return found

    def _process(self, who: str, what: str, case: Path) -> tuple[Any, ...]:
        """Work of a process, and its arguments."""
        folder = self.ground.folder
        if who == "client":
            return as_client, self.address, folder, case, what
        if who == "shard":
            return one_shard, folder, case, what, self.rng.randrange(SHARDS)
        return merge, [folder / name_of(what, index) for index in range(SHARDS)], case, what

    def one(self, fault: str, name: str) -> dict[str, Any]:
        """A case, done again until its strike hits; what it was, and what was wrong."""
        who, what = fault.split(", ")
        begin = time.monotonic()
        missed = -1
        while missed < ATTEMPTS:
            missed += 1
            by: Literal["computing", "writing"] = (
                "writing" if fault in KILLS and self.rng.random() < 0.5 else "computing"
            )
            strike = Strike(by, self.rng.random())
            case = self._case(name)
            problem = where = ""
            try:
                where = self._strike(who, what, case, strike)
                problem = self.ground.problem(case, what)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
                self.field.limit(None)
                self.field.wait()
            if where or problem:
                break
        shutil.rmtree(case, ignore_errors=True)
        return {
            "fault": fault, "by": strike.by, "share": strike.share, "where": where, "missed": missed,
            "at_work": bool(where), "problem": problem, "seconds": time.monotonic() - begin,
        }  # fmt: skip

    def _strike(self, who: str, what: str, case: Path, strike: Strike) -> str:
        """Do a job, disturb it, and complete it; where it was struck, empty if the strike missed."""
        folder, usual = self.ground.folder, self.usual.get(f"{who}, {what}", self.usual[f"worker, {what}"])
        work = functools.partial(job, _silent, folder, case, what, self.client)
        if who == "worker" and strike.by == "writing":
            pids = self.field.wait()
            address = self.rng.choice(sorted(pids))
            self.client.run(count_operations, str(case), strike.operation(usual), workers=[address])
            work()
            found = self.field.wait()
            if pids[address] in found.values():
                self.client.run(count_operations, "", workers=[address])
                return ""
            return (self.field.lost(address) or [""])[0]
        if who in ("client", "shard", "merge"):
            struck = run_struck(
                self.context, *self._process(who, what, case), folder=case, strike=strike, usual=usual
            )
            if struck.killed or who == "shard":
                self._complete(who, what, case, work)
            return struck.where if struck.killed else ""
        if who != "all above their memory":
            return self.field.disturb(who, work, strike.second(usual), self.seconds[what])
        failed: list[BackendError] = []

        def in_vain() -> None:
            try:
                work()
            except BackendError as error:
                failed.append(error)

        where = self.field.disturb(who, in_vain, strike.second(usual), self.seconds[what])
        self.field.wait()
        if failed:
            work()
        return where

    def _complete(self, who: str, what: str, case: Path, work: Callable[[], None]) -> None:
        """Repeat what was killed: the same command, with --overwrite."""
        folder = self.ground.folder
        if who == "client":
            work()
            return
        parts = [folder / name_of(what, index) for index in range(SHARDS)]
        if who == "shard":
            parts = [case / name_of(what, index) for index in range(SHARDS)]
            for index, path in enumerate(parts):
                # As the job script says it: what is there is complete.
                if not path.exists():
                    one_shard(_silent, folder, case, what, index)
        merge(_silent, parts, case, what)


def campaign(
    faults: list[str], seed: int, folder: Path, tell: Callable[[str], None] = print,
    keep: Callable[[list[dict[str, Any]]], None] = lambda found: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Cases one after the other: what was struck where, and what was wrong afterwards."""
    import dask
    from distributed import WorkerPlugin
    from distributed.utils import get_mp_context

    class Small(WorkerPlugin):
        def setup(self, worker: Any) -> None:
            make_small()

    make_small()
    folder = folder.absolute()
    ground, rng, found = Ground(folder), random.Random(seed), []
    # Also how often the scheduler looks.
    workers.WORKER_TTL = f"{IMPATIENT:g} s"
    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        get_mp_context()
        multiprocessing.get_context("forkserver").set_forkserver_preload(["distributed", __name__])
        with connect(f"local:{WORKERS}") as client:
            client.register_plugin(Small())
            here = Campaign(ground, client, rng)
            for number, fault in enumerate(faults):
                one = here.one(fault, f"case-{number}")
                found.append(one)
                tell(
                    f"{number + 1}/{len(faults)} {fault} at {one['where'] or 'nothing'}, {one['by']} "
                    f"{one['share']:.2f}, {one['seconds']:.0f} s: {one['problem'] or 'the same bits'}"
                )
                keep(found)
    return found


def table_of(found: list[dict[str, Any]]) -> str:
    """Faults, how many cases were struck at work, where, and how many were survived."""
    lines = [f"{'fault':<32}{'struck':>7}{'survived':>10}  where"]
    for fault in FAULTS:
        cases = [one for one in found if one["fault"] == fault]
        where = Counter(one["where"] for one in cases if one["at_work"])
        if cases:
            lines.append(
                f"{fault:<32}{sum(where.values()):>7}{sum(not one['problem'] for one in cases):>10}  "
                + ", ".join(f"{place} {count}" for place, count in sorted(where.items()))
            )
    return "\n".join(lines)


def _chosen(number: int, faults: tuple[str, ...]) -> list[str]:
    """So many cases, of each fault in turn."""
    return [faults[index % len(faults)] for index in range(number)]


@click.command()
@click.option("--kills", type=click.IntRange(0), default=8, show_default=True)
@click.option(
    "--troubles", type=click.IntRange(0), default=10, show_default=True, help="Slow, out of memory, …"
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--fault", "only", multiple=True, type=click.Choice(FAULTS), help="Only this one.")
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="For spectra and results.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Also write what was found as JSON.")
def main(kills: int, troubles: int, seed: int, only: tuple[str, ...], folder: Path, out: Path | None) -> None:
    """Kill processes at random moments of their work and judge what comes out."""
    # Functions of __main__ are not found by other processes.
    from moefast.benchmarks import cluster_faults

    environment = describe()
    faults = _chosen(kills, tuple(one for one in KILLS if not only or one in only) or ("",))
    faults += _chosen(troubles, tuple(one for one in TROUBLES if not only or one in only) or ("",))

    def keep(found: list[dict[str, Any]]) -> None:
        if out is not None:
            write_json({"environment": environment, "seed": seed, "cases": found}, out, overwrite=True)

    found = cluster_faults.campaign(
        [one for one in faults if one], seed, folder, lambda words: click.echo(words, err=True), keep
    )
    click.echo(table_of(found))
    if any(one["problem"] or not one["at_work"] for one in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
