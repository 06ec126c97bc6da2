"""One engine, in a process of its own: check its answer, time it, see its memory.

Design: a process per engine, so that peak memory is that of the engine, and no library's threads, caches or settings
touch another's. The first answer is compared with the reference before anything is timed; an engine that differs is
reported with the difference and is not timed. `python -m moefast.benchmarks.measure SPEC OUT` reads and writes JSON.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moefast.benchmarks.adapter import Engine, Work, why_not
from moefast.benchmarks.engines import ENGINES
from moefast.benchmarks.fit import TOLERANCE as FIT_TOLERANCE
from moefast.benchmarks.fit import FitProblem, compare, reference_answer
from moefast.benchmarks.floors import forget_peak, measure_floors, memory_in_use, peak_memory
from moefast.benchmarks.score import TOLERANCE as SCORE_TOLERANCE
from moefast.benchmarks.score import ScoreProblem
from moefast.core.errors import BackendError

__all__ = ["Spec", "measure", "measure_engine"]


@dataclass(frozen=True)
class Spec:
    """What to measure.

    Attributes
    ----------
    task, engine : str
        The task "floors" has no engine.
    folder : str
        Where the data lie (see `moefast.benchmarks.run.prepare`).
    n : int
        Spectra.
    samples : int
        Timed runs.
    budget : float
        Seconds after which no further run is begun; one is always made.
    model_path : str or None
    """

    task: str
    engine: str
    folder: str
    n: int
    samples: int
    budget: float
    model_path: str | None = None


def measure(spec: Spec) -> dict[str, Any]:
    """Measure an engine of the registry, or the floors."""
    folder = Path(spec.folder)
    if spec.task == "floors":
        path = folder / "spectra.h5"
        return measure_floors(path if path.exists() else None, spec.n, spec.samples)
    return measure_engine(ENGINES[spec.task][spec.engine], spec)


def measure_engine(engine: Engine, spec: Spec) -> dict[str, Any]:
    """One row of the result.

    Returns
    -------
    dict
        `engine`, `title`, `task`, `n`, and either `unavailable` (a reason), or `wrong` (how its answer differs), or
        `seconds` (raw samples), `r2` and peak memory.
    """
    row: dict[str, Any] = {"task": spec.task, "engine": engine.name, "title": engine.title, "n": spec.n}
    if reason := why_not(engine):
        return row | {"unavailable": reason}
    try:
        if spec.task == "score":
            return row | _score(engine, spec)
        return row | _fit(engine, spec)
    except (BackendError, ImportError) as error:
        return row | {"unavailable": str(error)}


def _score(engine: Engine, spec: Spec) -> dict[str, Any]:
    folder = Path(spec.folder)
    problem = ScoreProblem(folder / "spectra.h5", folder, spec.model_path, spec.n)
    data = problem.load() if engine.in_memory else 0
    base = memory_in_use()
    forget_peak()
    work = engine.make(problem)
    if work.before is not None:
        work.before()
    answer = work.answer(work.run())
    row: dict[str, Any] = {"r2": None}
    if not engine.is_floor:
        if answer.shape != (spec.n,):
            return {"wrong": f"{spec.n} values of log g expected, found an array of shape {answer.shape}"}
        row["r2"] = problem.r2(answer)
        if engine.same:
            expected = np.load(folder / "expected.npy")[: spec.n]
            difference = np.abs(answer[: len(expected)] - expected)
            worst = float(np.where(np.isnan(difference), np.inf, difference).max())
            if worst > SCORE_TOLERANCE:
                return {
                    "wrong": f"log g differs by {worst:.1e} dex from the reference; {SCORE_TOLERANCE:g} is allowed"
                }
            row |= {"difference": worst, "checked_rows": len(expected)}
    seconds, _ = _samples(work, spec)
    return row | _row(work, seconds, data, base)


def _fit(engine: Engine, spec: Spec) -> dict[str, Any]:
    folder = Path(spec.folder)
    stored = np.load(folder / "labels.npz")
    problem = FitProblem.of(folder / "x.npy", spec.n, stored["log_g"], stored["bins"])
    data = problem.load()
    reduced = problem.reduced()
    found = engine.make(reduced)
    worst = compare(reduced, found.answer(found.run()), reference_answer(reduced))
    if worst > FIT_TOLERANCE:
        return {
            "wrong": f"the answer of the reduced problem differs by {worst:.1e} from the reference (hold-out R², or "
            f"predictions in units of the scatter of log g); {FIT_TOLERANCE:g} is allowed"
        }
    base = memory_in_use()
    forget_peak()
    work = engine.make(problem)
    seconds, result = _samples(work, spec)
    answer = work.answer(result)
    return _row(work, seconds, data, base) | {
        "r2": problem.r2(answer),
        "difference": worst,
        "checked_rows": reduced.n,
        "penalties": [problem.penalties[a] for a in answer.chosen],
    }


def _samples(work: Work, spec: Spec) -> tuple[list[float], Any]:
    seconds: list[float] = []
    while True:
        if work.before is not None:
            work.before()
        begin = time.perf_counter()
        result = work.run()
        seconds.append(time.perf_counter() - begin)
        if len(seconds) >= spec.samples or sum(seconds) + min(seconds) > spec.budget:
            return seconds, result
        del result


def _row(work: Work, seconds: list[float], data: int, base: int) -> dict[str, Any]:
    peak = peak_memory()
    row: dict[str, Any] = {
        "seconds": seconds,
        "data_bytes": data,
        "base_bytes": base,
        "peak_bytes": peak,
        "working_bytes": max(0, peak - base),
    }
    if work.phases:
        row["phases"] = dict(work.phases)
    return row | ({"facts": work.facts} if work.facts else {})


def main(spec_path: str, out: str) -> None:
    """Measure what a file says and write the row."""
    spec = Spec(**json.loads(Path(spec_path).read_text(encoding="utf-8")))
    Path(out).write_text(json.dumps(measure(spec)), encoding="utf-8")


def as_json(spec: Spec) -> str:
    """The spec for `main`."""
    return json.dumps(asdict(spec))


if __name__ == "__main__":
    main(*sys.argv[1:])
