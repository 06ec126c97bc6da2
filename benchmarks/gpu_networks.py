"""Networks on a GPU: what a step of a fit takes, and how many spectra a second they score, beside plain products.

`python -m moefast.benchmarks.gpu_networks [-o FILE] [--size base] [--part PART]… [--steps N] [--samples N] [--small]`;
exit code 7 without a GPU.

Two floors are measured, not looked up: large matrix products in torch, in half and in single precision. A step is that
of `moefast fit` (draws of noise, loss, gradients, search), with kernels that torch has fused and without; its TFLOP/s
are those of the products alone, forward once and backward twice. Scoring is that of `moefast predict`: flux and error
in host memory, the exported graph in ONNX Runtime. Numbers of the networks are random: none of this depends on them.
Engines are warmed up, samples are kept raw. Scores must agree with float64 to within TOLERANCE dex (half precision:
HALF_TOLERANCE); what fails is named, the others go on, and the exit code is 1.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from moefast.backend import cuda_devices
from moefast.benchmarks.environment import describe
from moefast.core.errors import BackendError
from moefast.core.line_features import LEAST_CONTINUUM
from moefast.export import build, open_session
from moefast.mixture import Mixture
from moefast.model import Model
from moefast.ops.on_torch import TorchArithmetic
from moefast.trunks import training
from moefast.trunks.heads import Heads
from moefast.trunks.networks import KINDS, SEES_FLUX, Kind, NetworkPlan, answer, start
from moefast.trunks.presets import PRESETS, SIZES, Size

__all__ = ["measure_fit", "measure_scores", "products"]

PARTS = ("fit", "scores")
RESULTS = Path(__file__).parent / "results"
TOLERANCE, HALF_TOLERANCE = 1e-4, 1e-2
"""Largest difference of log g from float64, dex."""
SEED = 20261127
POOL, JUDGES, CHECKED = 8192, 16, 32
"""Stars that steps draw from, that judge, and whose score is made in float64."""
ROWS = 8192
WARM_UP = 20
"""Steps before the clock starts."""


def products(torch: Any, device: str, side: int, samples: int) -> dict[str, float]:
    """TFLOP/s of products of square matrices in half precision and in single precision."""
    found = {}
    for name in ("bfloat16", "float32"):
        a, b = (torch.randn(side, side, device=device, dtype=getattr(torch, name)) for _ in range(2))
        seconds = []
        for _ in range(samples + 1):
            begin = time.perf_counter()
            float((a @ b)[0, 0])
            seconds.append(time.perf_counter() - begin)
        found[name] = 2 * side**3 / min(seconds[1:]) / 1e12
    return found


def network_of(kind: Kind, size: Size, mixture: Mixture) -> Heads:
    """A network with random numbers on the inputs of a mixture."""
    pixels = SEES_FLUX[kind]
    n_inputs = mixture.n_pixels if pixels else mixture.n_basis
    plan = NetworkPlan(kind, n_inputs, mixture.n_experts, **PRESETS[kind, size].plan)
    scales: dict[str, NDArray] = {"log_g.scale": np.array([3.0, 1.0]), "level.limits": mixture.knots[[0, -1]]}
    if pixels:
        scales |= {"reference": mixture.reference, "inverse_noise": 1 / np.sqrt(mixture.noise_shape)}
    return training.scaled(Heads(plan, start(plan, SEED)), scales)


def flops(torch: Any, heads: Heads) -> float:
    """Of the products for one star, forward."""
    from torch.utils.flop_counter import FlopCounterMode

    name = "scaled" if heads.plan.sees_flux else "z"
    seen = {
        name: torch.zeros(2, heads.plan.n_inputs),
        "log_level": torch.zeros(2, 1),
        "lines": torch.zeros(2, 9),
    }
    numbers = {key: torch.from_numpy(np.array(value)) for key, value in heads.numbers.items()}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        answer(TorchArithmetic(torch, numbers), heads.plan, seen)
    return float(counter.get_total_flops()) / 2


def stars_of(torch: Any, device: str, heads: Heads, mixture: Mixture, n: int) -> training.TrainingStars:
    """Random stars to fit on."""
    rng = np.random.default_rng(SEED)
    low, high = mixture.knots[[0, -1]].tolist()
    level = rng.uniform(low, high, n).astype(np.float32)
    if heads.plan.sees_flux:
        shape = (n, mixture.n_pixels)
        flux, error = (rng.standard_normal(shape, np.float32).astype(np.float16) for _ in range(2))
        inverse = (1 / np.sqrt(mixture.noise_shape)).astype(np.float32)
        return training.StarsInPixels(
            torch, device, flux, abs(error), level, mixture.reference, inverse, mixture.line_columns,
            mixture.line_widths, LEAST_CONTINUUM,
        )  # fmt: skip
    z = rng.standard_normal((n, mixture.n_basis)).astype(np.float32)
    covariance = training.component_covariance(mixture.basis, mixture.line_columns, mixture.noise_shape)
    windows = np.ones((n, mixture.line_columns.shape[1]), np.float32)
    return training.StarsInComponents(
        torch, device, z, windows, level, covariance, mixture.line_widths, LEAST_CONTINUUM
    )


def measure_fit(
    mixture: Mixture, size: Size, steps: int, device: str = "cuda", batch: int | None = None
) -> dict[str, Any]:
    """Milliseconds of a step of every trunk, fused and plain."""
    torch = training.load_torch()
    rng = np.random.default_rng(SEED)
    found: dict[str, Any] = {}
    for kind in KINDS:
        heads = network_of(kind, size, mixture)
        stars = stars_of(torch, device, heads, mixture, POOL)
        labels = training.Labels(
            rng.normal(3, 1, POOL), rng.standard_normal((POOL, 2)), rng.integers(0, mixture.n_experts, POOL)
        )
        seen = {
            "x" if heads.plan.sees_flux else "z": np.ones((JUDGES, heads.plan.n_inputs), np.float32),
            "log_level": np.zeros((JUDGES, 1), np.float32), "lines": np.zeros((JUDGES, 9), np.float32),
        }  # fmt: skip
        judges = training.Judges(seen, np.linspace(1, 5, JUDGES))
        few = batch or PRESETS[kind, size].schedule.batch
        entry: dict[str, Any] = {"batch": few, "flop_per_star": 3 * flops(torch, heads)}
        for name, fused in (("fused", True), ("plain", False)):
            looks: list[tuple[int, float]] = []

            def note(step: int, total: int, looks: list[tuple[int, float]] = looks) -> None:
                looks.append((step, time.perf_counter()))

            # Looks wait for the device, so the time between two of them is that of the steps between them.
            schedule = training.Schedule(WARM_UP + steps, few, 1e-5, (WARM_UP + steps) // WARM_UP)
            fitted = training.fit_heads(
                heads, stars, labels, judges, schedule, device=device, fused=fused, progress=note
            )
            (first, begin), (last, end) = looks[0], looks[-1]
            seconds = (end - begin) / (last - first)
            entry[name] = {
                "kernels": fitted.kernels, "milliseconds": 1e3 * seconds,
                "tflops": entry["flop_per_star"] * few / seconds / 1e12,
            }  # fmt: skip
        found[kind] = entry
        click.echo(
            f"  {kind:<10} batch {few:>5}: {entry['fused']['milliseconds']:8.2f} ms fused "
            f"({entry['fused']['tflops']:.1f} TFLOP/s), {entry['plain']['milliseconds']:8.2f} ms plain"
            + ("" if entry["fused"]["kernels"] == "fused" else f"; {entry['fused']['kernels']}")
        )
    return found


def measure_scores(
    mixture: Mixture, size: Size, samples: int, backend: str = "cuda", rows: int = ROWS, block: int = 1024
) -> dict[str, Any]:
    """Spectra per second of every trunk in ONNX Runtime, in single and in half precision."""
    torch = training.load_torch()
    rng = np.random.default_rng(SEED)
    noise = np.sqrt(mixture.noise_shape)
    error = (noise * rng.uniform(0.5, 2, (rows, 1))).astype(np.float32)
    flux = (mixture.reference + error * rng.standard_normal((rows, mixture.n_pixels))).astype(np.float32)
    found: dict[str, Any] = {}
    for kind in KINDS:
        heads = network_of(kind, size, mixture)
        mine = replace(mixture, experts=()).with_expert(heads)
        expected = mine.predict_reference(flux[:CHECKED], error[:CHECKED]).log_g
        of_star = flops(torch, heads)
        for half in (False, True):
            name = f"{kind}, half precision" if half else kind
            entry: dict[str, Any] = {"rows": rows, "flop_per_star": of_star}
            try:
                session = open_session(build(mine, half=half), backend)

                def score(first: int, session: Any = session) -> NDArray:
                    some = slice(first, first + block)
                    return np.asarray(session.run(["log_g"], {"flux": flux[some], "error": error[some]})[0])

                entry["difference"] = float(np.abs(score(0)[:CHECKED] - expected).max())
                entry["agrees"] = entry["difference"] <= (HALF_TOLERANCE if half else TOLERANCE)
                entry["seconds"] = []
                for _ in range(samples):
                    begin = time.perf_counter()
                    for first in range(0, rows, block):
                        score(first)
                    entry["seconds"].append(time.perf_counter() - begin)
                entry["rows_per_second"] = rows / min(entry["seconds"])
                entry["tflops"] = of_star * entry["rows_per_second"] / 1e12
                text = (
                    f"{entry['rows_per_second']:>12,.0f} spectra/s, {entry['tflops']:.2f} TFLOP/s, off by "
                    f"{entry['difference']:.1e} dex"
                )
            except Exception as problem:
                entry["failed"] = entry["error"] = text = f"{type(problem).__name__}: {problem}"
            click.echo(f"  {name:<26}{text}")
            found[name] = entry
    return found


@click.command()
@click.option("--size", type=click.Choice(SIZES), default="base", show_default=True, help="Of the networks.")
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="By default all.")
@click.option(
    "--steps",
    type=click.IntRange(WARM_UP),
    default=100,
    show_default=True,
    help="Steps of each fit that are timed.",
)
@click.option("--samples", default=5, show_default=True, help="Timed runs of each engine.")
@click.option("--small", is_flag=True, help="Sizes of a test: seconds instead of minutes.")
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON file to write.")
def main(size: Size, parts: tuple[str, ...], steps: int, samples: int, small: bool, out: Path | None) -> None:
    """Measure, print a table, write the raw samples."""
    try:
        torch = training.load_torch()
        if not torch.cuda.is_available():
            raise BackendError(f"this torch ({torch.__version__}) sees no GPU")
    except BackendError as problem:
        click.echo(f"not measured: {problem}", err=True)
        sys.exit(problem.exit_code)
    if small:
        size, steps, samples = "small", WARM_UP, 1
    # Any mixture of experts will do: networks take the place of its own.
    mixture = Model.load("survey").mixture
    assert isinstance(mixture, Mixture)
    wanted = set(parts or PARTS)
    device = (cuda_devices()[0] or [torch.cuda.get_device_name()])[0]
    report: dict[str, Any] = {
        "what": "networks on a GPU", "device": device, "environment": describe(), "size": size,
        "products_tflops": products(torch, "cuda", 1024 if small else 8192, samples),
    }  # fmt: skip
    click.echo(f"{device}; products: {report['products_tflops']} TFLOP/s")
    if "fit" in wanted:
        report["fit"] = measure_fit(mixture, size, steps)
    if "scores" in wanted:
        report["scores"] = measure_scores(mixture, size, samples, rows=1024 if small else ROWS)
    path = out or RESULTS / f"{report['environment']['date']}-gpu-networks-speed.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    click.echo(f"wrote {path}")
    failed = [name for name, e in report.get("scores", {}).items() if "failed" in e or not e["agrees"]]
    if failed:
        click.echo(f"failed, or off by more than {TOLERANCE:.0e} dex: {', '.join(failed)}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
