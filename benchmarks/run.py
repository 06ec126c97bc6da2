"""The benchmark: the same data for every engine, floors, throughput next to R², growth.

Design: data are simulated from a stored seed into one folder, which every engine's process reads. Rows are plain dicts,
raw samples included, and everything derived from them (rates, shares of floors, exponents) is computed here, once. What
is not measured is said with its reason: not installed, no device, too slow, too large; a time that follows from the
fitted growth instead of a clock is marked `extrapolated`.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moefast.backend import physical_memory
from moefast.benchmarks.adapter import Engine, why_not
from moefast.benchmarks.engines import choose
from moefast.benchmarks.environment import describe
from moefast.benchmarks.floors import per_spectrum
from moefast.benchmarks.measure import Spec, as_json
from moefast.core.errors import BenchmarkError, InputError, WaveGridError
from moefast.core.grids import Grid
from moefast.model import Model
from moefast.simulate import SimulatedSpectra
from moefast.spectra.writer import SpectrumWriter

__all__ = ["SCHEMA", "SEED", "benchmark", "growth_exponent", "in_own_process", "prepare", "wrong_answers"]

SCHEMA = 1
SEED = 20260202
BLOCK_ROWS = 2048
CHECKED_ROWS = 20_000
"""Rows whose log g is compared with the float64 reference."""
N_PIXELS = 4096
LARGEST_SHARE = 0.6
"""Data may take this share of the machine's memory, and of what is free on the disk; engines need room of their own."""

Measure = Callable[[Engine, Spec, float], dict[str, Any]]
Say = Callable[[str], None]


def prepare(folder: Path, n: int, tasks: Sequence[str], model: Model, doing: Say) -> dict[str, Any]:
    """Simulate `n` spectra and write what the tasks need: spectra.h5, expected.npy; x.npy, labels.npz.

    Returns
    -------
    dict
        What the data are, JSON-ready.

    Raises
    ------
    WaveGridError
        The model is for another wave grid.
    """
    spectra = SimulatedSpectra(n, seed=SEED)
    labels = spectra.labels()
    facts = {f"{task}_sha256": spectra.fingerprint() for task in tasks}
    if "score" in tasks:
        if not np.array_equal(model.mixture.wave, spectra.wave):
            raise WaveGridError(
                f"the model has {model.mixture.n_pixels} pixels, {model.mixture.wave[0]:.1f}-"
                f"{model.mixture.wave[-1]:.1f} Å; the benchmark simulates {spectra.n_pixels} pixels, "
                f"{spectra.wave[0]:.1f}-{spectra.wave[-1]:.1f} Å; name a model for that grid"
            )
        doing(f"bench: simulating {n:,} noisy spectra")
        expected = []
        step = float(spectra.wave[1] - spectra.wave[0])
        with SpectrumWriter(
            folder / "spectra.h5",
            n_rows=n,
            wave=spectra.wave,
            wave_edges=np.append(spectra.wave, spectra.wave[-1] + step) - step / 2,
            arrays=("flux", "error"),
            params={"log_g": "f8"},
        ) as writer:
            for block in spectra.blocks(BLOCK_ROWS, array="noisy"):
                here = slice(block.first_row, block.first_row + len(block))
                # As an observed file has it: the noise is in the flux.
                writer.write(
                    block.first_row,
                    params={"log_g": labels["log_g"][here]},
                    flux=block.flux,
                    error=block.error,
                )
                if block.first_row < CHECKED_ROWS:
                    expected.append(model.mixture.predict_reference(block.flux, block.error).log_g)
        np.save(folder / "expected.npy", np.concatenate(expected))
    if "fit" in tasks:
        doing(f"bench: simulating {n:,} clean spectra")
        x = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float32, (n, spectra.n_pixels))
        reference = scale = None
        for block in spectra.blocks(BLOCK_ROWS, array="flux"):
            if reference is None or scale is None:
                reference = block.flux.mean(0)
                scale = 1 / np.sqrt((block.error**2).mean(0))
            x[block.first_row : block.first_row + len(block)] = (block.flux - reference) * scale
        x.flush()
        del x
        bins = Grid().assign(labels["T_eff"], labels["M_H"])
        np.savez(folder / "labels.npz", log_g=labels["log_g"], bins=bins)
    return facts


def in_own_process(engine: Engine, spec: Spec, limit: float) -> dict[str, Any]:
    """Measure in a new process, for `limit` seconds at most."""
    row = {"task": spec.task, "engine": engine.name, "title": engine.title, "n": spec.n}
    if reason := why_not(engine):
        return row | {"unavailable": reason}
    result = _child(spec, engine.environment, limit)
    return result if isinstance(result, dict) else row | {"unavailable": result}


def _child(spec: Spec, environment: Any, limit: float) -> dict[str, Any] | str:
    """What `moefast.benchmarks.measure` writes, or why it wrote nothing."""
    own = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"} | dict(environment)
    with tempfile.TemporaryDirectory(dir=spec.folder) as folder:
        given, out = Path(folder) / "spec.json", Path(folder) / "row.json"
        given.write_text(as_json(spec), encoding="utf-8")
        command = [sys.executable, "-m", "moefast.benchmarks.measure", str(given), str(out)]
        try:
            done = subprocess.run(
                command, env=own, capture_output=True, text=True, timeout=limit, check=False, cwd=folder
            )
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s at n = {spec.n:,}"
        if done.returncode < 0:
            return f"killed by signal {-done.returncode} at n = {spec.n:,}; out of memory?"
        if done.returncode != 0 or not out.exists():
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            return f"failed: {lines[-1]}"
        result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return result


def benchmark(
    *,
    tasks: Sequence[str] = ("score",),
    engines: Sequence[str] = (),
    n: int = 20_000,
    samples: int = 5,
    growth: Sequence[int] = (),
    model_path: str | None = None,
    budget: float = 30.0,
    limit: float = 300.0,
    scratch: str | None = None,
    say: Say = lambda _: None,
    doing: Say = lambda _: None,
    measure: Measure = in_own_process,
) -> dict[str, Any]:
    """Run the benchmark.

    Parameters
    ----------
    tasks : sequence of "score" and "fit"
    engines : sequence of str
        Names; all if empty.
    n : int
        Spectra.
    samples : int
        Timed runs of each engine.
    growth : sequence of int
        Sizes for growth curves.
    model_path : str, optional
        Model folder; the shipped model if absent.
    budget : float
        Seconds after which no further run of an engine is begun.
    limit : float
        Seconds after which an engine is given up.
    scratch : str, optional
        Folder for the simulated spectra, 33 kB each for `score`, 16 kB for `fit`; the system's temporary folder if
        absent.
    say : callable
        Told the outcome of each engine.
    doing : callable
        Told what is being done.
    measure : callable
        How one engine is measured.

    Returns
    -------
    dict
        JSON-ready; see `moefast.benchmarks.report`.

    Raises
    ------
    InputError
        An engine is unknown, or a size is too small.
    WaveGridError, ModelError
        The model cannot be used.
    """
    chosen = choose(tasks, engines)
    sizes = sorted(set(growth))
    least = 200
    if min([n, *sizes]) < least:
        raise InputError(
            f"{min([n, *sizes])} spectra asked for; {least} at least, so that every bin has some"
        )
    model = Model.load(model_path)
    environment = describe()
    where = scratch or tempfile.gettempdir()
    # Decided once, before anything is written: writing changes what is free.
    too_large = {
        (engine.task, engine.name, size): _too_large(size, engine, where)
        for engine in chosen
        for size in {n, *sizes, *([] if engine.most_rows is None else [engine.most_rows])}
    }
    with tempfile.TemporaryDirectory(prefix="moefast-bench-", dir=where) as name:
        folder = Path(name)
        data: dict[str, Any] = {"seed": SEED, "n_pixels": N_PIXELS}
        for task in tasks:
            fitting = [key[2] for key, reason in too_large.items() if key[0] == task and not reason]
            if n not in fitting:
                raise InputError(
                    f"-n {n:,}: too many spectra for this machine and {where}; take fewer, or another --scratch"
                )
            data |= prepare(folder, max(fitting), [task], model, doing)

        def one(engine: Engine, size: int, count: int) -> dict[str, Any]:
            size = size if engine.most_rows is None else min(size, engine.most_rows)
            if reason := too_large[engine.task, engine.name, size]:
                about = {"task": engine.task, "engine": engine.name, "title": engine.title, "n": size}
                return about | {"unavailable": reason}
            spec = Spec(engine.task, engine.name, name, size, count, budget, model_path)
            doing(f"bench: {engine.task} {engine.name}, n = {size:,}")
            row = finish(measure(engine, spec, limit))
            say(f"{engine.task} {engine.name}, n = {size:,}: {_outcome(row)}")
            return row

        doing("bench: measuring the floors of this machine")
        floors = _child(Spec("floors", "", name, data["n_pixels"], samples, budget), {}, limit)
        if isinstance(floors, str):
            raise BenchmarkError(f"the floors could not be measured ({floors})")
        rows = [one(engine, n, samples) for engine in chosen]
        curves = {}
        for engine in chosen if sizes else []:
            if engine.most_rows is not None:
                # Star by star: its time is linear in n.
                continue
            first = next(row for row in rows if (row["task"], row["engine"]) == (engine.task, engine.name))
            if "seconds" in first or first.get("unavailable", "").startswith(("stopped", "killed")):
                curves[f"{engine.task} {engine.name}"] = _grow(
                    sizes,
                    first,
                    limit,
                    {size: too_large[engine.task, engine.name, size] for size in sizes},
                    lambda size, engine=engine: one(engine, size, min(samples, 3)),  # type: ignore[misc]
                )
    _share_of_floors(rows, floors, chosen, data["n_pixels"])
    _compare_fits(rows)
    return {
        "what": "moefast benchmark",
        "schema": SCHEMA,
        "environment": environment,
        "data": data,
        "model_sha256": model.hash,
        "n": n,
        "tolerances": _tolerances(),
        "floors": floors,
        "results": rows,
        "growth": curves,
    }


def finish(row: dict[str, Any]) -> dict[str, Any]:
    """Add what follows from the raw samples."""
    if "seconds" in row:
        rates = [row["n"] / second for second in row["seconds"]]
        row["spectra_per_second"] = max(rates)
        row["spectra_per_second_median"] = statistics.median(rates)
    return row


def _outcome(row: dict[str, Any]) -> str:
    if "unavailable" in row:
        return f"not measured: {row['unavailable']}"
    if "wrong" in row:
        return f"WRONG ANSWER: {row['wrong']}"
    return f"{row['spectra_per_second']:,.0f} spectra/s"


def _tolerances() -> dict[str, float]:
    from moefast.benchmarks import fit, score

    return {"score": score.TOLERANCE, "fit": fit.TOLERANCE}


def _too_large(n: int, engine: Engine, scratch: str) -> str:
    """Why data of this size are not made for this engine; empty if they are."""
    needed = n * N_PIXELS * (8 if engine.task == "score" else 4)
    memory, disk = physical_memory(), shutil.disk_usage(scratch).free
    if needed > LARGEST_SHARE * disk:
        return f"the data take {needed / 2**30:.0f} GiB, {scratch} has {disk / 2**30:.0f} GiB free"
    if engine.in_memory and memory and needed > LARGEST_SHARE * memory:
        return f"the data take {needed / 2**30:.0f} GiB, this machine has {memory / 2**30:.0f} GiB of memory"
    return ""


def _grow(
    sizes: Sequence[int],
    first: dict[str, Any],
    limit: float,
    barred: Mapping[int, str],
    one: Callable[[int], dict[str, Any]],
) -> dict[str, Any]:
    """Measure sizes from small to large while they fit; the others follow from the exponent and are marked."""
    rows: list[dict[str, Any]] = []
    skipped: dict[int, str] = {}
    for size in sizes:
        if reason := barred.get(size):
            skipped[size] = reason
            continue
        if size != first["n"] and rows and min(rows[-1]["seconds"]) * size / rows[-1]["n"] > limit / 2:
            # A check and a timed run must both fit.
            skipped[size] = f"more than the limit of {limit:.0f} s is expected"
            continue
        row = first if size == first["n"] else one(size)
        if "seconds" in row:
            rows.append(row)
        else:
            skipped[size] = row.get("unavailable") or row["wrong"]
    exponent = growth_exponent([row["n"] for row in rows], [min(row["seconds"]) for row in rows])
    curve: dict[str, Any] = {
        "rows": rows,
        "time_exponent": exponent,
        "memory_exponent": growth_exponent(
            [row["n"] for row in rows], [max(row["working_bytes"], 1 << 20) for row in rows]
        ),
        "not_measured": {str(size): reason for size, reason in skipped.items()},
        "extrapolated": [],
    }
    if rows:
        last = rows[-1]
        # What costs the same at any size makes an exponent too small to be carried on: nothing is faster than linear.
        steep = max(1.0, exponent or 1.0)
        curve["extrapolated"] = [
            {"n": size, "seconds": min(last["seconds"]) * (size / last["n"]) ** steep, "exponent": steep}
            for size in skipped
            if size > last["n"]
        ]
    return curve


def growth_exponent(sizes: Sequence[int], values: Sequence[float]) -> float | None:
    """Slope a of ln value ~ a ln n by least squares; None for fewer than two sizes."""
    if len(sizes) < 2:
        return None
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def _share_of_floors(
    rows: list[dict[str, Any]], floors: dict[str, Any], engines: Sequence[Engine], n_pixels: int
) -> None:
    """Add `floor` and `fraction_of_floor` to the rows whose floor was measured."""
    rates = {row["engine"]: row.get("spectra_per_second") for row in rows if row["task"] == "score"}
    wanted = {(engine.task, engine.name): engine.floor for engine in engines}
    for row in rows:
        floor = wanted[row["task"], row["engine"]]
        if "spectra_per_second" not in row or not floor:
            continue
        if floor in floors:
            rate = floors[floor].get("rate")
            rate = rate and rate / per_spectrum(floor, n_pixels)
        else:
            rate = rates.get(floor)
        if rate:
            row["floor"], row["fraction_of_floor"] = floor, row["spectra_per_second"] / rate


def _compare_fits(rows: list[dict[str, Any]]) -> None:
    """At full size, hold-out R² of every fit must be that of the first."""
    from moefast.benchmarks.fit import TOLERANCE

    fits = [row for row in rows if row["task"] == "fit" and "seconds" in row]
    for row in fits[1:]:
        difference = abs(row["r2"] - fits[0]["r2"])
        if not difference <= TOLERANCE:
            row["wrong"] = (
                f"hold-out R² {row['r2']:.5f}, where {fits[0]['title']} finds {fits[0]['r2']:.5f}; "
                f"{TOLERANCE:g} is allowed"
            )


def wrong_answers(result: dict[str, Any]) -> list[str]:
    """One sentence for each engine whose answer is not the reference's."""
    rows = [*result["results"], *(row for curve in result["growth"].values() for row in curve["rows"])]
    return [f"{row['task']} {row['engine']}: {row['wrong']}" for row in rows if "wrong" in row]
