"""A SLURM job array without SLURM: fit and predict by as many processes as tasks, merged, compared with one process.

`python -m moefast.benchmarks.faults.job_array --tasks 16 --folder SCRATCH [-o FILE]`

Design: every task is a process of its own in which the command of docs/howto/cluster.md runs, `moefast predict --shard`
or `moefast fit --shard`, with the variables that SLURM sets. Tasks end in any order, as they do there; some are killed
with SIGKILL while they work, and the array is started again, which does what is not there. Spectra are small and the
units of a fit are few rows, so that sixteen tasks have a unit each. Processes are forked from one that has everything
loaded. Tables and models must be those of one process, bit for bit.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import click

from moefast.benchmarks.cluster import same_model, same_table
from moefast.benchmarks.cluster_faults import make_small, write_spectra
from moefast.benchmarks.environment import describe
from moefast.benchmarks.faults.case import command, run
from moefast.core.atomic import write_json
from moefast.core.errors import BenchmarkError
from moefast.fitting import statistics
from moefast.model import Model

__all__ = ["run_array", "variables"]

FIRST, STEP = 1, 2
"""The array is 1, 3, 5, …: SLURM counts from any number in steps of any size."""
UNIT_ROWS = 64
FIT = ("fit", "--recipe", "global-ridge", "--no-references", "--backend", "cpu", "-q")
PREDICT = ("predict", "--backend", "cpu", "-q")


def variables(index: int, count: int) -> dict[str, str]:
    """What SLURM tells the task of a part."""
    return {
        "SLURM_ARRAY_TASK_ID": str(FIRST + STEP * index), "SLURM_ARRAY_TASK_COUNT": str(count),
        "SLURM_ARRAY_TASK_MIN": str(FIRST), "SLURM_ARRAY_TASK_MAX": str(FIRST + STEP * (count - 1)),
    }  # fmt: skip


def moefast(log: Path, *arguments: str | Path, kill: float | None = None, **environment: str) -> int | None:
    """Exit code of a command in a process with some variables; None if it was killed after some seconds.

    Raises
    ------
    BenchmarkError
        It failed.
    """
    ended = run(
        command(*arguments), log, first=functools.partial(os.environ.update, environment),
        kill=None if kill is None else (kill, signal.SIGKILL),
    )  # fmt: skip
    if ended.code == -signal.SIGKILL:
        return None
    if ended.code != 0:
        words = " ".join(map(str, arguments))
        raise BenchmarkError(f"moefast {words}: exit code {ended.code}: {ended.said}")
    return ended.code


def run_array(folder: Path, n_tasks: int, seed: int, n_kills: int = 4) -> dict[str, Any]:
    """Fit and predict in one process and in an array.

    Parameters
    ----------
    folder : Path
        For spectra and results.
    n_tasks : int
    seed : int
        Of the order of the tasks, and of who is killed when.
    n_kills : int
        How many tasks of each array are killed at a random time of their work.

    Returns
    -------
    dict
        For "fit" and "predict": tasks, those killed while at work, processes started, and whether bits are the same.

    Raises
    ------
    BenchmarkError
        A command failed.
    """
    make_small()
    statistics.UNIT_ROWS = UNIT_ROWS
    folder.mkdir(parents=True, exist_ok=True)
    spectra, log, rng = folder / "spectra.h5", folder / "log", random.Random(seed)
    if not spectra.exists():
        write_spectra(spectra, 1)
    moefast(log, *FIT, spectra, "-o", folder / "model", "--overwrite")
    begin = time.monotonic()
    whole = (*PREDICT, spectra, "-m", folder / "model")
    moefast(log, *whole, "-o", folder / "whole.parquet", "--overwrite")
    usual = time.monotonic() - begin
    found: dict[str, Any] = {}
    for what, arguments, suffix in (("fit", (*FIT, spectra), ".npz"), ("predict", whole, ".parquet")):
        place = folder / f"parts-{what}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        parts = [place / f"part-{index}{suffix}" for index in range(n_tasks)]
        struck = dict.fromkeys(rng.sample(range(n_tasks), min(n_kills, n_tasks)))
        started = killed = 0
        for attempt in range(2):
            for index in rng.sample(range(n_tasks), n_tasks):
                # As the job script says it: what is there is complete.
                if parts[index].exists():
                    continue
                kill = rng.uniform(0, usual) if attempt == 0 and index in struck else None
                code = moefast(
                    log, *arguments, "--shard", "-o", parts[index], kill=kill, **variables(index, n_tasks)
                )
                # Who has written its part when it is killed has nothing left to do.
                started, killed = started + 1, killed + (code is None and not parts[index].exists())
        out = folder / f"merged-{what}{'' if what == 'fit' else suffix}"
        moefast(log, "merge", *rng.sample(parts, n_tasks), "-o", out, "--overwrite", "-q")
        same = (
            same_model(Model.load(out), Model.load(folder / "model"))
            if what == "fit"
            else same_table(out, folder / "whole.parquet")
        )
        left = sorted(path.name for path in place.iterdir() if path not in parts)
        found[what] = {
            "tasks": n_tasks, "killed": killed, "processes": started, "same_bits": same, "left_behind": left,
        }  # fmt: skip
    return found


@click.command()
@click.option("--tasks", type=click.IntRange(1, 23), default=16, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="For spectra and results.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Also write what was found as JSON.")
def main(tasks: int, seed: int, folder: Path, out: Path | None) -> None:
    """Run a job array without SLURM and compare it with one process."""
    found = run_array(folder, tasks, seed)
    for what, one in found.items():
        click.echo(
            f"{what}: {one['tasks']} tasks, {one['killed']} of them killed and started again, "
            f"{'the same bits as one process' if one['same_bits'] else 'OTHER BITS'}"
            + (f", left behind: {', '.join(one['left_behind'])}" if one["left_behind"] else "")
        )
    if out is not None:
        write_json({"environment": describe(), "seed": seed, **found}, out)
    if not all(one["same_bits"] and not one["left_behind"] for one in found.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
