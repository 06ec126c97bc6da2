"""Σxxᵀ on the GPU: accuracy and speed of every method beside cuBLAS, in one run.

`python -m moefast.benchmarks.gpu_normal_equations [-o FILE] [--part PART]… [--samples N] [--small]`; exit code 7
without a usable GPU.

Accuracy is the largest error of G_ij in units of √(G_ii G_jj) against float64 on the CPU; the goal is 1e-6. Speed
counts n p (p + 1) operations, those of a symmetric product, whatever an engine really makes. Data are on the device for
the products, on the host for the streamed blocks. Every engine is warmed up, every sample ends with a synchronisation,
samples are kept raw, and every product is compared with that of the first engine. A method or an engine that fails is
named with its error, the others go on, and the exit code is 1.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from moefast.backend import cuda_devices
from moefast.benchmarks.environment import describe
from moefast.core.errors import BackendError
from moefast.fitting import Options
from moefast.fitting.first_pass import gather_part
from moefast.fitting.training_set import TrainingSet
from moefast.kernels import unpack_symmetric
from moefast.spectra.source import Block, Failure

PARTS = ("accuracy", "speed", "streamed", "first-pass")
RESULTS = Path(__file__).parent / "results"
GOAL = 1e-6
SEED = 20261127
ACCURACY = ((1_000_000, 256, 1), (1_000_000, 256, 9), (20_000, 4096, 1), (20_000, 4096, 9))
SPEED = (
    (16_384, 4096, 1), (16_384, 4096, 9), (16_384, 4096, 27), (2048, 4096, 27), (65_536, 1024, 9), (131_072, 256, 1),
)  # fmt: skip
"""27 groups are nine bins in three folds, 16 384 rows a stage of the first pass and 2048 a block of what is read."""
STREAMED = (163_840, 4096, 9)
FIRST_PASS, FIRST_PASS_ON_CPU, PIXELS = 196_608, 16_384, 4096
"""Rows of the first pass on the device and on the CPU: whole stages, and enough for a rate."""
SMALL_ACCURACY = ((3000, 96, 3),)
SMALL_SPEED = ((2048, 160, 3),)
SMALL_STREAMED = (4096, 160, 3)
SMALL_FIRST_PASS, SMALL_PIXELS = 4096, 640
MADE = 8192
"""Rows that are made; more are these again, with other numbers and other noise."""
ACCURACY_BLOCK = 50_000
AGREE = 5e-6
"""Largest difference between engines: the goal for each, and room for libraries that sum all rows in float32."""


def rows(n: int, p: int, n_groups: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows like centred spectra (shared components and noise), labels and groups."""
    rng = np.random.default_rng(seed)
    strength = rng.standard_normal((n, 3), np.float32) * np.array([0.1, 0.03, 0.01], np.float32)
    x = strength @ np.random.default_rng(SEED).standard_normal((3, p), np.float32)
    x += np.float32(0.1) * rng.standard_normal((n, p), np.float32)
    return x, 3 + rng.standard_normal(n), rng.integers(0, n_groups, n)


def worst_error(packed: np.ndarray, exact: np.ndarray) -> float:
    """Largest |G_ij − exact_ij| / √(exact_ii exact_jj) of one packed triangle."""
    scale = np.sqrt(np.diag(exact))
    upper = np.triu_indices(len(exact))
    return float((np.abs(packed - exact[upper]) / (scale[upper[0]] * scale[upper[1]])).max())


def usable_methods() -> tuple[list[str], dict[str, str], dict[str, str]]:
    """The methods that can be used here, what the others lack, and the errors of those that fail in a small trial."""
    from moefast.kernels import normal_equations
    from moefast.kernels.cuda.products import METHODS

    missing = {name: lack for name, method in METHODS.items() if (lack := method.missing())}
    broken = {}
    for name in METHODS:
        if name not in missing:
            try:
                normal_equations(*rows(5, 3, 2, SEED), 2, backend="cuda", method=name)
            except Exception as error:  # the others are to be measured all the same
                # The first line: loaders go on with listings of folders.
                broken[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return [name for name in METHODS if name not in missing and name not in broken], missing, broken


def accuracy(methods: list[str], n: int, p: int, n_groups: int) -> dict[str, Any]:
    """Errors of all methods on the same rows, which are made, and multiplied in float64, block by block."""
    from moefast.kernels.cuda import NormalEquationsAccumulator

    totals = {name: NormalEquationsAccumulator(p, n_groups, method=name) for name in methods}
    exact = np.zeros((n_groups, p, p))
    for part, start in enumerate(range(0, n, ACCURACY_BLOCK)):
        x, y, group = rows(min(ACCURACY_BLOCK, n - start), p, n_groups, SEED + part)
        for accumulator in totals.values():
            accumulator.add_block(x, y, group)
        for k in range(n_groups):
            wide = x[group == k].astype(np.float64)
            exact[k] += wide.T @ wide
    errors = {}
    for name, accumulator in totals.items():
        found = accumulator.fetch().gram
        errors[name] = max(worst_error(a, b) for a, b in zip(found, exact, strict=True))
    return {"n": n, "p": p, "groups": n_groups, "goal": GOAL, "worst_error": errors}


def own_engine(
    name: str, x: np.ndarray, group: np.ndarray, n_groups: int
) -> tuple[Callable[[], None], Callable[[], np.ndarray]]:
    """A product by one of our methods on device arrays, and the total of all groups of the last product."""
    from numba import cuda

    from moefast.kernels import sort_by_bin
    from moefast.kernels.cuda.gram import set_zero
    from moefast.kernels.cuda.products import METHODS

    n, p = x.shape
    order, bounds = sort_by_bin(group, n_groups)
    products = METHODS[name](n, p, n_groups)
    rows, places, offsets = (cuda.to_device(a) for a in (x, order, bounds))
    totals = cuda.device_array((n_groups, p * (p + 1) // 2), np.float64)
    stream = cuda.stream()

    def multiply() -> None:
        products.add(rows, places, offsets, bounds, totals, stream)
        stream.synchronize()

    def result() -> np.ndarray:
        set_zero(totals, stream)
        multiply()
        return totals.copy_to_host().sum(0)

    return multiply, result


def torch_engine(x: np.ndarray, upper_only: bool) -> tuple[Callable[[], None], Callable[[], np.ndarray]]:
    """SGEMM of torch on all rows at once, without TF32: the whole square, or block rows of the upper triangle."""
    import torch

    from moefast.kernels.cuda.products import multiply_upper

    if not torch.cuda.is_available():
        raise ImportError("torch sees no CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = False
    values = torch.from_numpy(x).cuda()
    square = torch.empty((x.shape[1], x.shape[1]), device="cuda")

    def multiply() -> None:
        if upper_only:
            multiply_upper(torch, values[None], square[None])
        else:
            torch.mm(values.T, values, out=square)
        torch.cuda.synchronize()

    def result() -> np.ndarray:
        multiply()
        return square.cpu().numpy().astype(np.float64)[np.triu_indices(x.shape[1])]

    return multiply, result


def cupy_engine(x: np.ndarray) -> tuple[Callable[[], None], Callable[[], np.ndarray]]:
    """SSYRK of cuBLAS, called through CuPy, on all rows at once."""
    import cupy
    from cupy import cublas

    # Row-major rows are the column-major transpose: SYRK without transposition makes xᵀx.
    values = cupy.asfortranarray(cupy.asarray(x).T)
    square = cupy.zeros((x.shape[1], x.shape[1]), np.float32, order="F")

    def multiply() -> None:
        cublas.syrk("N", values, out=square, alpha=1.0, beta=0.0, lower=False)
        cupy.cuda.Device().synchronize()

    def result() -> np.ndarray:
        multiply()
        return cupy.asnumpy(square).astype(np.float64)[np.triu_indices(x.shape[1])]

    return multiply, result


def speed(methods: list[str], n: int, p: int, n_groups: int, samples: int) -> dict[str, Any]:
    """Seconds of every engine on the same rows on the device; an engine that fails is named with its error."""
    x, _, group = rows(n, p, n_groups, SEED)
    engines: dict[str, Callable[[], Any]] = {
        name: lambda name=name: own_engine(name, x, group, n_groups)  # type: ignore[misc]
        for name in methods
    }
    engines["torch sgemm, square"] = lambda: torch_engine(x, upper_only=False)
    engines["torch sgemm, upper block rows"] = lambda: torch_engine(x, upper_only=True)
    engines["cublas ssyrk, through cupy"] = lambda: cupy_engine(x)
    found: dict[str, Any] = {}
    expected = scale = None
    for name, make in engines.items():
        try:
            multiply, result = make()
            total = result()
            if expected is None or scale is None:
                expected = total
                upper = np.triu_indices(p)
                diagonal = np.sqrt(total[upper[0] == upper[1]])
                scale = diagonal[upper[0]] * diagonal[upper[1]]
            difference = float((np.abs(total - expected) / scale).max())
            seconds = []
            for _ in range(samples):
                begin = time.perf_counter()
                multiply()
                seconds.append(time.perf_counter() - begin)
        except Exception as error:  # the others are to be measured all the same
            found[name] = {
                "error": f"{type(error).__name__}: {error}",
                "failed": not isinstance(error, ImportError),
            }
            continue
        found[name] = {
            "seconds": seconds,
            "tflops": n * p * (p + 1) / min(seconds) / 1e12,
            "difference": difference,
            "agrees": difference < AGREE,
        }
        del multiply, result
    return {"n": n, "p": p, "groups": n_groups, "engines": found}


def streamed(methods: list[str], n: int, p: int, n_groups: int, samples: int) -> dict[str, Any]:
    """Rows per second from pageable host memory to totals on the device, all totals included."""
    from moefast.kernels.cuda import NormalEquationsAccumulator

    block = 16_384
    x, y, group = rows(min(block, n), p, n_groups, SEED)
    rates: dict[str, list[float]] = {}
    for name in methods:
        accumulator = NormalEquationsAccumulator(p, n_groups, method=name)
        rates[name] = []
        for _ in range(samples + 1):
            begin = time.perf_counter()
            done = 0
            while done < n:
                accumulator.add_block(x, y, group)
                done += len(x)
            for slot in accumulator._slots:
                slot.stream.synchronize()
            rates[name].append(done / (time.perf_counter() - begin))
        del rates[name][0]
    return {"n": n, "p": p, "groups": n_groups, "rows_per_second": rates}


class RowsInMemory:
    """A `moefast.spectra.source.SpectrumSource` of random rows that lie in memory; blocks are views of it."""

    columns = ("T_eff", "log_g", "M_H")

    def __init__(self, n: int, p: int) -> None:
        rng = np.random.default_rng(SEED)
        self.n_rows, self.n_pixels, self.wave = n, p, np.linspace(7100.2, 8849.8, p)
        self.flux = 1 + rows(min(n, MADE), p, 1, SEED)[0]
        self.error = rng.uniform(0.1, 0.3, self.flux.shape).astype(np.float32)
        values = rng.uniform([3750, 1, -2], [6000, 5, 0.5], (n, 3)).T
        self._labels = dict(zip(self.columns, values, strict=True))
        self.path, self.arrays = Path("rows in memory"), ("flux", "error")
        self.failures: list[Failure] = []
        self.shards = (self,)

    def fingerprint(self) -> str:
        """Not asked for without a checkpoint."""
        raise NotImplementedError

    def labels(self, names: tuple[str, ...], *, partial: bool = False) -> dict[str, np.ndarray]:
        """Of all rows."""
        return {name: self._labels[name] for name in names}

    def blocks(self, block_rows: int, *, array: str, rows: tuple[int, int] | None = None) -> Iterator[Block]:
        """Views: no row is copied on the way."""
        first, stop = rows or (0, self.n_rows)
        while first < stop:
            place = first % len(self.flux)
            here = slice(place, min(place + block_rows, len(self.flux), place + stop - first))
            yield Block(first, 0, self.flux[here], self.error[here])
            first += here.stop - here.start


def first_pass(
    n: int, n_on_cpu: int, p: int, samples: int, n_compared: int = 4096, options: Options | None = None
) -> dict[str, Any]:
    """Rows per second of the first pass of a fit from memory, noise, bins and both ridges included, on either backend.

    `difference` is the largest one of the pooled totals of `n_compared` rows, in units of √(G_ii G_jj); infinite if
    rows are in other bins.
    """
    source = RowsInMemory(max(n, n_on_cpu, n_compared), p)
    data = TrainingSet(source, options or Options(), lambda *_: None)  # type: ignore[arg-type]

    def run(rows: int, backend: Any) -> tuple[float, Any]:
        begin = time.perf_counter()
        found = gather_part(data, (0, rows), None, backend)
        return time.perf_counter() - begin, found

    rates: dict[str, list[float]] = {"cuda": [], "cpu": []}
    compared = {backend: run(n_compared, backend) for backend in rates}
    difference = 0.0
    for name in ("equations", "published"):
        found, expected = (getattr(compared[backend][1], name) for backend in rates)
        same = bool((found.count == expected.count).all())
        pooled = [totals.gram.reshape(-1, totals.gram.shape[-1]).sum(0) for totals in (found, expected)]
        error = worst_error(pooled[0], unpack_symmetric(pooled[1], p)) if same else float("inf")
        difference = max(difference, error)
    seconds_alone = {backend: seconds for backend, (seconds, _) in compared.items()}
    del compared
    for _ in range(samples):
        for backend, count in (("cuda", n), ("cpu", n_on_cpu)):
            rates[backend].append(run(count, backend)[0])
    return {
        "p": p, "rows": {"cuda": n, "cpu": n_on_cpu}, "seconds": rates, "seconds_compared": seconds_alone,
        "difference": difference,
    }  # fmt: skip


@click.command()
@click.option("--samples", default=7, show_default=True, help="Timed runs of each engine.")
@click.option("--small", is_flag=True, help="Sizes of a test: seconds instead of minutes.")
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="By default all.")
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON file to write.")
def main(samples: int, small: bool, parts: tuple[str, ...], out: Path | None) -> None:
    """Measure, print, and write JSON (by default into benchmarks/results/)."""
    from moefast.kernels.cuda.device import require_device

    try:
        require_device()
    except BackendError as error:
        click.echo(f"not measured: {error}", err=True)
        sys.exit(error.exit_code)
    from moefast.kernels.cuda.products import choose

    device = (cuda_devices()[0] or ["simulated"])[0]
    methods, missing, broken = usable_methods()
    click.echo(f"{device}: methods {', '.join(methods)}")
    for name, lack in missing.items():
        click.echo(f"  not {name}: {lack}")
    for name, reason in broken.items():
        click.echo(f"  {name} FAILS: {reason}")
    report: dict[str, Any] = {
        "what": "normal equations on the GPU",
        "device": device,
        "environment": describe(),
        "methods_missing": missing,
        "methods_broken": broken,
        "accuracy": [],
        "speed": [],
    }
    wanted = set(parts or PARTS)
    for n, p, n_groups in (SMALL_ACCURACY if small else ACCURACY) if "accuracy" in wanted else ():
        report["accuracy"].append(accuracy(methods, n, p, n_groups))
        errors = report["accuracy"][-1]["worst_error"]
        text = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        click.echo(f"worst error, {n} rows of {p} pixels, {n_groups} groups: {text} (goal {GOAL:.0e})")
    for n, p, n_groups in (SMALL_SPEED if small else SPEED) if "speed" in wanted else ():
        report["speed"].append(speed(methods, n, p, n_groups, samples))
        report["speed"][-1]["auto"] = choose("auto", p).__dict__
        click.echo(f"{n} rows of {p} pixels, {n_groups} groups; auto: {report['speed'][-1]['auto']}")
        for name, entry in report["speed"][-1]["engines"].items():
            text = entry.get("error", "")
            if "seconds" in entry:
                text = f"{1e3 * min(entry['seconds']):9.2f} ms {entry['tflops']:7.1f} TFLOP/s"
                text += f", off by {entry['difference']:.1e}"
            click.echo(f"  {name:<32}{text}")
    if "streamed" in wanted:
        report["streamed"] = streamed(methods, *(SMALL_STREAMED if small else STREAMED), samples=samples)
        for name, rates in report["streamed"]["rows_per_second"].items():
            click.echo(f"streamed from the host, {name}: {max(rates):,.0f} rows/s")
    if "first-pass" in wanted:
        sizes = (
            (SMALL_FIRST_PASS, SMALL_FIRST_PASS, SMALL_PIXELS)
            if small
            else (FIRST_PASS, FIRST_PASS_ON_CPU, PIXELS)
        )
        report["first_pass"] = entry = first_pass(*sizes, samples=min(samples, 2))
        for backend, seconds in entry["seconds"].items():
            rate = entry["rows"][backend] / min(seconds)
            click.echo(f"first pass from memory, {backend}: {rate:,.0f} rows/s, totals to the host included")
        click.echo(
            f"  the first rows: {entry['seconds_compared']} s; totals off by {entry['difference']:.1e}"
        )
    path = out or RESULTS / f"{report['environment']['date']}-gpu-normal-equations.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    click.echo(f"wrote {path}")
    failed = [*broken]
    for entry in report["accuracy"]:
        failed += [name for name, error in entry["worst_error"].items() if not error < GOAL]
    for entry in report["speed"]:
        failed += [
            name
            for name, engine in entry["engines"].items()
            if engine.get("failed") or not engine.get("agrees", True)
        ]
    if failed:
        click.echo(
            f"failed, or off by more than the goal of {GOAL:.0e}: {', '.join(sorted(set(failed)))}", err=True
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
