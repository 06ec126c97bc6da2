"""Scoring on the GPU: rate and R² beside the bandwidths of this machine, ONNX Runtime and torch, in one run.

`python -m moefast.benchmarks.gpu_scoring [-o FILE] [-m MODEL] [--part PART]… [--posterior MODEL]… [--rows N]…
[--samples N] [--small]`; exit code 7 without a GPU. The part `posteriors` times the posterior at each star's own noise
step by step, the part `velocities` the fit of velocities, and `predict` with it from a file to a table.

Three floors are measured, not looked up: a copy within device memory (read and written bytes both count), a copy from
pinned host memory, and the matrix products alone in torch without TF32. Scoring resident data is compared with the
first by the bytes of flux and error, scoring from host memory with the second. Engines are warmed up, every sample ends
with a synchronisation, samples are kept raw. All must give the log g of the CPU kernels to within TOLERANCE dex, and
the posterior means of float64; what fails is named with its error, the others go on, and the exit code is 1.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from moefast.backend import cuda_devices
from moefast.benchmarks.environment import describe
from moefast.benchmarks.gpu_scoring_text import failed_engines, show
from moefast.core.errors import BackendError
from moefast.core.metrics import r2
from moefast.kernels import Library
from moefast.mixture import Mixture
from moefast.model import Model
from moefast.posterior import PosteriorMixture
from moefast.posterior.velocities import DEFAULT_RANGE, VelocityFit

PARTS = ("scoring", "templates", "clouds", "posteriors", "velocities")
RESULTS = Path(__file__).parent / "results"
TOLERANCE = 1e-4
"""Largest difference of log g between engines, dex."""
GOAL = 0.8
"""Share of either bandwidth that scoring should reach."""
SEED = 20261128
STARS = 4096
"""Simulated stars, which all data consist of."""
FEW_STARS = 20_000
"""Stars that a model is fitted on where none is named: its speed is that of one of many."""
RESIDENT, HOST, SMALL_ROWS = 131_072, 65_536, 256
LIBRARY = {"n": 65_536, "m": 20_000, "r": 48, "q": 3}
SMALL_LIBRARY = {"n": 96, "m": 70, "r": 5, "q": 2}
CLOUDS = {
    "z0": {"n": 65_536, "m": 300, "r": 48, "t": 8},
    "survey": {"n": 65_536, "m": 1000, "r": 160, "t": 24},
}
"""Libraries of clouds of the size of those of the reference sets, shared by EXPERTS experts."""
SMALL_CLOUDS = {"small": {"n": 96, "m": 20, "r": 5, "t": 2}}
POSTERIORS = ("observed", "z0")
"""Models whose posteriors at a star's own noise are timed: those that are shipped."""
STARS_ON_CPU = 1024
SMALL_RANGE = 20.0
"""Largest velocity of a fit in a test, km/s."""
MOVING_STARS = 8192
"""Stars in the file that velocities are fitted from."""
OF_EVIDENCE, OF_SIGMA = 2e-5, 2e-3
"""Largest difference of ln E from that of the CPU, of its largest in a row and beyond 0.02, and of steps in their 1σ:
the tolerances of the tests."""
EXPERTS = 9
CHECKED = 64
"""Stars whose posterior is made in float64, too."""


def sampled(work: Callable[[], Any], samples: int) -> list[float]:
    """Seconds of each run but the first; `work` must wait for the device."""
    seconds = []
    for _ in range(samples + 1):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


def stars(model: Model, small: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noisy flux, error and log g of simulated stars on the model's wave grid."""
    from moefast.core.random import standard_normals
    from moefast.simulate import simulate_file
    from moefast.spectra.spectrum_set import open_spectra

    n = SMALL_ROWS if small else STARS
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stars.h5"
        simulate_file(path, n, seed=SEED)
        spectra = open_spectra(path)
        for shard in spectra.shards:
            model.check_wave(shard.wave, str(path))
        block = next(spectra.blocks(n))
        truth = np.asarray(spectra.labels(("log_g",))["log_g"], np.float64)
        noise = standard_normals(SEED, np.arange(n), block.flux.shape[1]).astype(np.float32)
        return block.flux + block.error * noise, np.array(block.error), truth


def bandwidths(n_bytes: int, samples: int) -> dict[str, Any]:
    """Bytes per second of copies within the device (read + written) and from pinned host memory."""
    from numba import cuda

    count = n_bytes // 4
    first, second = (cuda.device_array(count, np.float32) for _ in range(2))
    pinned = cuda.pinned_array(count, np.float32)
    pinned[:] = 1

    def within() -> None:
        second.copy_to_device(first)
        cuda.synchronize()

    def from_host() -> None:
        first.copy_to_device(pinned)
        cuda.synchronize()

    copies = {"device copy": (2 * n_bytes, within), "pinned host to device": (n_bytes, from_host)}
    return {
        name: {"seconds": (seconds := sampled(work, samples)), "gb_per_second": size / min(seconds) / 1e9}
        for name, (size, work) in copies.items()
    }


def resident(
    mixture: Mixture,
    flux: np.ndarray,
    error: np.ndarray,
    n: int,
    library: Library | None,
    from_library: Sequence[bool] = (),
) -> tuple[dict[str, Callable[[], None]], Callable[[], np.ndarray]]:
    """Ways to score n rows that are on the device, and log g of the last run."""
    from numba import cuda

    from moefast.kernels.cuda.scoring import DevicePlan, Work, launch

    plan, p = DevicePlan(mixture.projection, mixture.mixing, library, from_library), mixture.n_pixels
    device_flux, device_error = (cuda.device_array(n * p, np.float32) for _ in range(2))
    for target, rows in ((device_flux, flux), (device_error, error)):
        for start in range(0, n, len(rows)):
            part = np.ascontiguousarray(rows[: n - start]).reshape(-1)
            target[start * p : start * p + part.size].copy_to_device(part)
    work, stream = Work(n, plan), cuda.stream()

    def run(median: bool) -> None:
        launch(plan, device_flux, device_error, None, n, work, stream, median=median)
        stream.synchronize()

    def log_g() -> np.ndarray:
        there: Any = work.scores.log_g
        return there.copy_to_host()[: len(flux)]

    if library is not None:
        return {f"moefast, project, {len(library.keys)} clouds, mix": lambda: run(False)}, log_g
    return {
        "moefast, project and mix": lambda: run(False),
        "moefast, with snr_median": lambda: run(True),
    }, log_g


def with_clouds(
    mixture: Mixture, flux: np.ndarray, error: np.ndarray
) -> tuple[Library, tuple[bool, ...], np.ndarray]:
    """A library, the experts that it stands for, and log g of these stars by the CPU kernels with it.

    The model's own, if it has one. Clouds around some of these stars otherwise, as wide as the stars are scattered:
    between narrow ones, far from every star, a rounding of the projection would decide.
    """
    from moefast.kernels import Given, project, soft_mix, tangent_posterior

    own, marks = mixture.clouds
    if own is not None:
        return own, marks, mixture.predict(flux, error).log_g
    linear = project(flux, error, None, mixture.projection)
    z = linear.columns[:, : mixture.mixing.n_basis]
    shape = CLOUDS["z0"]
    library = random_clouds(
        z[: shape["m"]], min(shape["t"], z.shape[1]), mixture.n_experts, float(z.var(0).mean())
    )
    found = tangent_posterior(z, np.maximum(linear.log_level, mixture.mixing.knots[0]), library)
    logits = found.log_evidence - found.log_evidence.max(1, keepdims=True)
    return library, (), soft_mix(linear, mixture.mixing, Given(found.mean, found.sd, logits)).log_g


def torch_products(mixture: Mixture, flux: np.ndarray, error: np.ndarray, n: int) -> Callable[[], None]:
    """The matrix products of a projection alone, on resident data, in torch: no engine can do without them."""
    import torch

    if not torch.cuda.is_available():
        raise ImportError("torch sees no CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = False
    repeat = -(-n // len(flux))
    rows = [torch.from_numpy(a).cuda().repeat(repeat, 1)[:n] for a in (flux, error)]
    plan = mixture.projection
    reference, inverse, matrix, cells = (
        torch.from_numpy(a).cuda()
        for a in (plan.reference, plan.inverse_shape, np.hstack([plan.matrix, plan.lines]), plan.cell_matrix)
    )

    def run() -> None:
        (rows[0] - reference) @ matrix
        (rows[1] * rows[1] * inverse).reshape(n, len(cells), -1).mean(2) @ cells
        torch.cuda.synchronize()

    return run


def onnx_runtime(mixture: Mixture, flux: np.ndarray, error: np.ndarray) -> Callable[[], np.ndarray]:
    """The exported graph in ONNX Runtime's CUDA provider, from host memory."""
    from moefast.export import build, open_session

    session = open_session(build(mixture), backend="cuda")
    return lambda: session.run(["log_g"], {"flux": flux, "error": error})[0]


def posterior(samples: int, n: int, m: int, r: int, q: int) -> dict[str, Any]:
    """Template posteriors, copies included, beside a dense softmax in torch; difference from float64."""
    from moefast.kernels import template_posterior
    from moefast.kernels.reference_template import template_posterior_reference

    rng = np.random.default_rng(SEED)
    keys = (rng.standard_normal((m, r)) * np.linspace(10, 0.3, r)).astype(np.float32)
    level = rng.uniform(0.3, 3, n).astype(np.float32)
    z = (keys[rng.integers(0, m, n)] + level[:, None] * rng.standard_normal((n, r))).astype(np.float32)
    values = rng.uniform(1, 5, (m, q)).astype(np.float32)
    few = slice(0, min(n, CHECKED))
    exact = [
        template_posterior_reference(z[i : i + 1], level[i : i + 1], keys, values)[0][0]
        for i in range(few.stop)
    ]
    found: dict[str, Any] = {}

    def own(free_scale: bool) -> np.ndarray:
        return template_posterior(z, level, keys, values, free_scale=free_scale, backend="cuda").mean

    def torch_dense() -> np.ndarray:
        import torch

        if not torch.cuda.is_available():
            raise ImportError("torch sees no CUDA device")
        torch.backends.cuda.matmul.allow_tf32 = False
        a, s, b, v = (torch.from_numpy(x).cuda() for x in (z, level, keys, values))
        parts = []
        for start in range(0, n, 4096):
            rows = a[start : start + 4096]
            chi2 = torch.cdist(rows, b, compute_mode="donot_use_mm_for_euclid_dist") ** 2
            parts.append(torch.softmax(-0.5 * chi2 / s[start : start + 4096, None] ** 2, 1) @ v)
        return torch.cat(parts).cpu().numpy()

    for name, work in (
        ("moefast", lambda: own(False)),
        ("moefast, free scale", lambda: own(True)),
        ("torch, dense softmax", torch_dense),
    ):
        try:
            mean = work()
            seconds = sampled(work, samples)
        except Exception as error:  # the others are to be measured all the same
            found[name] = failure(error)
            continue
        found[name] = {"seconds": seconds, "pairs_per_second": n * m / min(seconds)}
        if name != "moefast, free scale":
            difference = float(np.abs(mean[few] - exact).max())
            found[name] |= {"difference": difference, "agrees": difference < TOLERANCE}
    return {"n": n, "m": m, "r": r, "q": q, "engines": found}


def random_clouds(keys: np.ndarray, t: int, n_experts: int, rest: float = 1e-3) -> Library:
    """A library of clouds around these means, in t random directions each, of variance `rest` in all others."""
    rng, (m, r) = np.random.default_rng(SEED), keys.shape
    variances = np.linspace(2, 0.1, t) ** 2 * np.ones((m, 1))
    gains = 0.1 * rng.standard_normal((m, t)) * np.sqrt(variances)

    def f32(values: Any) -> NDArray[np.float32]:
        return np.asarray(values, np.float32)

    return Library(
        keys=f32(keys),
        tangents=f32(np.linalg.qr(rng.standard_normal((m, r, t)))[0].transpose(0, 2, 1)),
        variances=f32(variances),
        gains=f32(gains),
        rest=f32(np.full(m, rest)),
        log_weights=f32(np.full(m, -np.log(m))),
        log_g=f32(rng.uniform(1, 5, m)),
        scatter=f32((gains**2 / variances).sum(1) + 0.01),
        first=np.linspace(0, m, n_experts + 1).astype(np.int64),
    )


def weighed_clouds(samples: int, n: int, m: int, r: int, t: int) -> dict[str, Any]:
    """Posteriors over clouds, copies included, on GPU and CPU; difference of the mean log g from float64."""
    from moefast.kernels import tangent_posterior
    from moefast.kernels.reference_tangent import tangent_posterior_reference

    rng = np.random.default_rng(SEED)
    library = random_clouds(rng.standard_normal((m, r)) * np.linspace(3, 0.1, r), t, EXPERTS)
    level = rng.uniform(0.3, 3, n)
    z = library.keys[rng.integers(0, m, n)] + level[:, None] * rng.standard_normal((n, r))
    z, log_level = z.astype(np.float32), np.log(level).astype(np.float32)
    few = slice(0, min(n, CHECKED))

    def mixed(mean: np.ndarray, log_evidence: np.ndarray) -> np.ndarray:
        weights = np.exp(log_evidence - log_evidence.max(1, keepdims=True))
        return (weights * mean).sum(1) / weights.sum(1)

    exact = tangent_posterior_reference(z[few], log_level[few], library)
    expected = mixed(exact[0], exact[2])
    found: dict[str, Any] = {}
    for name, backend, rows in (("moefast", "cuda", n), ("moefast, on the CPU", "cpu", min(n, 4096))):
        work = partial(tangent_posterior, z[:rows], log_level[:rows], library, backend=backend)
        try:
            answer = work()
            seconds = sampled(work, samples)
        except Exception as error:  # the other is to be measured all the same
            found[name] = failure(error)
            continue
        difference = float(np.abs(mixed(answer.mean, answer.log_evidence)[few] - expected).max())
        found[name] = {
            "rows": rows,
            "seconds": seconds,
            "rows_per_second": rows / min(seconds),
            "tflops": 2e-12 * m * r * (t + 1) * rows / min(seconds),
            "difference": difference,
            "agrees": difference < TOLERANCE,
        }
    return {"n": n, "m": m, "r": r, "t": t, "engines": found}


def stepwise(
    plan: Any, n: int, flux: np.ndarray, error: np.ndarray, samples: int
) -> tuple[list[float], dict[str, list[float]], tuple[np.ndarray, ...]]:
    """Seconds of all that a plan does to n stars on the device, and of each step of it; and what it gives."""
    from numba import cuda

    stream, work = cuda.stream(), plan.work(n)
    seen = [cuda.to_device(np.ascontiguousarray(a[:n]).reshape(-1)) for a in (flux, error)]
    found = plan.launch(*seen, None, n, work, stream)
    stream.synchronize()
    steps: dict[str, list[float]] = {}
    for _ in range(samples):
        for name, start in plan.steps(*seen, None, n, work, found, stream):
            begin = time.perf_counter()
            start()
            stream.synchronize()
            steps.setdefault(name, []).append(time.perf_counter() - begin)

    def resident() -> None:
        plan.launch(*seen, None, n, work, stream)
        stream.synchronize()

    seconds = sampled(resident, samples)
    return seconds, steps, tuple(array.copy_to_host() for array in found)


def own_noise(model: Model, samples: int, small: bool, block_rows: Sequence[int] = ()) -> dict[str, Any]:
    """Posteriors at each star's own noise: every step on resident data, the whole from host memory, and on the CPU.

    In blocks of the default number of stars, which `predict` uses, and in blocks of each of `block_rows`.
    """
    from moefast.kernels.cuda import CudaPosteriorScorer
    from moefast.kernels.cuda.clouds import BLOCK_ROWS, DevicePosterior
    from moefast.predicting.engines import CudaEngine

    mixture = model.mixture
    if not isinstance(mixture, PosteriorMixture):
        raise BackendError(f"the model {model.name} is no posterior; name one that is")
    flux, error, truth = stars(model, small)
    expected, found = mixture.predict(flux, error).log_g, dict[str, Any]()
    p = mixture.n_pixels
    few = slice(0, min(STARS_ON_CPU, len(flux)))

    def note(name: str, rows: int, seconds: list[float], log_g: np.ndarray) -> None:
        difference = float(np.abs(log_g - expected[: len(log_g)]).max())
        found[name] = {
            "rows": rows,
            "seconds": seconds,
            "rows_per_second": rows / min(seconds),
            "r2": r2(truth[: len(log_g)], log_g),
            "difference": difference,
            "agrees": difference < TOLERANCE,
        }

    def on_device(name: str, block: int) -> None:
        n = min(block, len(flux))
        seconds, steps, answers = stepwise(DevicePosterior(*mixture.kernel_arrays), n, flux, error, samples)
        note(name, n, seconds, answers[0])
        found[name]["steps"] = steps

    rows = SMALL_ROWS if small else HOST
    many_flux, many_error = (np.tile(a, (-(-rows // len(a)), 1))[:rows] for a in (flux, error))

    def from_host(name: str, block: int | None) -> None:
        score: Callable[[], Any]
        if block is None:
            score = partial(CudaEngine(mixture), many_flux, many_error, None, 0)
        else:
            scorer = CudaPosteriorScorer(*mixture.kernel_arrays, block_rows=block)
            score = lambda: mixture.of_kernels(scorer(many_flux, many_error))  # noqa: E731
        answer = score()[0].log_g[: len(truth)]
        note(name, rows, sampled(score, samples), answer)

    for block in (None, *block_rows):
        of_block = "" if block is None else f", blocks of {block}"
        ways = {
            f"moefast, resident{of_block}": partial(on_device, block=block or BLOCK_ROWS),
            f"moefast, from host memory{of_block}": partial(from_host, block=block),
        }
        for name, way in ways.items():
            try:
                way(name)
            except Exception as problem:  # the others are to be measured all the same
                found[name] = failure(problem)
    seconds = sampled(lambda: mixture.predict(flux[few], error[few]), samples)
    note("moefast, on the CPU", len(flux[few]), seconds, expected[few])
    return {"pixels": p, "coordinates": mixture.n_coordinates, "clouds": len(mixture.keys), "engines": found}


def moving(model: Model, samples: int, small: bool) -> dict[str, Any]:
    """Velocities: scan and step on resident data, from host memory and on the CPU; `predict` with them from a file."""
    from moefast.kernels import velocity_evidence, velocity_step
    from moefast.kernels.cuda import velocity
    from moefast.kernels.velocity import velocity_and_error

    mixture = model.mixture
    if not isinstance(mixture, PosteriorMixture):
        raise BackendError(f"the model {model.name} is no posterior; name one that is")
    fit = VelocityFit(mixture, SMALL_RANGE if small else DEFAULT_RANGE)
    fit.prepare()
    flux, error, _ = stars(model, small)
    p, n = mixture.n_pixels, min(velocity.BLOCK_ROWS, len(flux))
    few = slice(0, min(STARS_ON_CPU, len(flux)))
    rows = SMALL_ROWS if small else HOST // 4
    many_flux, many_error = (np.tile(a, (-(-rows // len(a)), 1))[:rows] for a in (flux, error))
    found: dict[str, Any] = {}

    def of_scan(answer: np.ndarray, expected: np.ndarray) -> float:
        largest = 0.02 + OF_EVIDENCE * np.abs(expected).max(1, keepdims=True)
        return float((np.abs(answer - expected) / largest).max())

    def of_step(answer: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...]) -> float:
        return float((np.abs(answer[0] - expected[0]) / (OF_SIGMA * expected[1])).max())

    scan, step = (fit.templates, p), (fit.space, fit.slopes)
    ways: tuple[tuple[str, Any, Any, Any, Any, Any], ...] = (
        (
            "scan", partial(velocity.DeviceScan, *scan), partial(velocity.CudaVelocityScan, *scan),
            partial(velocity_evidence, templates=fit.templates), lambda found: found[0], of_scan,
        ),
        (
            "step", partial(velocity.DeviceStep, *step), partial(velocity.CudaVelocityStep, *step),
            partial(velocity_step, space=fit.space, slopes=fit.slopes), lambda found: velocity_and_error(found[0]),
            of_step,
        ),
    )  # fmt: skip
    for what, plan, scorer, on_cpu, answer_of, difference in ways:
        expected = on_cpu(flux[few], error[few], None)

        def note(
            name: str, count: int, seconds: list[float], answer: Any, what: str = what, expected: Any = expected,
            difference: Any = difference,
        ) -> None:  # fmt: skip
            several = isinstance(expected, tuple)
            size = min(len(expected[0] if several else expected), count)
            cut = [tuple(a[:size] for a in each) if several else each[:size] for each in (answer, expected)]
            share = difference(*cut)
            found[f"{what}, {name}"] = {
                "rows": count, "seconds": seconds, "rows_per_second": count / min(seconds),
                "of_tolerance": share, "agrees": share < 1,
            }  # fmt: skip

        try:
            seconds, steps, answers = stepwise(plan(), n, flux, error, samples)
            note("resident", n, seconds, answer_of(answers))
            found[f"{what}, resident"]["steps"] = steps
        except Exception as problem:  # the others are to be measured all the same
            found[f"{what}, resident"] = failure(problem)
        try:
            there = scorer()
            answer = there(many_flux, many_error, None)
            seconds = sampled(partial(there, many_flux, many_error, None), samples)
            note("from host memory", rows, seconds, answer)
        except Exception as problem:
            found[f"{what}, from host memory"] = failure(problem)
        seconds = sampled(partial(on_cpu, flux[few], error[few], None), samples)
        note("on the CPU", len(flux[few]), seconds, expected)
    if not small:
        found |= from_file_to_table(model)
    return {
        "pixels": p, "velocities": len(fit.grid), "components": fit.templates.lines.shape[1],
        "templates": len(fit.templates.log_weights), "directions": mixture.directions.shape[1], "engines": found,
    }  # fmt: skip


def from_file_to_table(model: Model) -> dict[str, Any]:
    """Rates of `predict` with fitted velocities and at rest, on the GPU and on the CPU, and how far they differ."""
    from moefast.benchmarks.velocities import moving_stars
    from moefast.predicting.files import predict
    from moefast.spectra.quality import Flag
    from moefast.spectra.writer import SpectrumWriter

    made, tables = moving_stars(STARS), dict[str, Any]()
    wave, found = made["wave"], dict[str, Any]()
    step = wave[1] - wave[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "moving.h5"
        with SpectrumWriter(
            path, n_rows=MOVING_STARS, wave=wave, wave_edges=np.append(wave, wave[-1] + step) - step / 2,
            arrays=("flux", "error"), params={"log_g": "f8"},
        ) as writer:  # fmt: skip
            for start in range(0, MOVING_STARS, STARS):
                writer.write(start, flux=made["moved"], error=made["error"], params={"log_g": made["log_g"]})
        for what, velocity in (("fitted", "fit"), ("at rest", None)):
            for backend in ("cuda", "cpu"):
                name = f"predict, velocities {what}, {backend}"
                rows = (0, MOVING_STARS if backend == "cuda" else STARS)
                try:
                    # The second run finds the file in memory and the kernels compiled.
                    for _ in range(2):
                        done = predict(
                            path, model, backend=backend, velocity=velocity, rows=rows, progress=False
                        )
                    found[name] = {
                        "rows": rows[1], "seconds": [done.seconds], "rows_per_second": done.spectra_per_second,
                    }  # fmt: skip
                    tables[name] = done.columns
                except Exception as problem:  # the others are to be measured all the same
                    found[name] = failure(problem)
    names = [f"predict, velocities fitted, {backend}" for backend in ("cuda", "cpu")]
    if all(name in tables for name in names):
        on_gpu, on_cpu = (tables[name] for name in names)
        off = np.abs(on_gpu["v_los"][:STARS] - on_cpu["v_los"]) / on_cpu["v_los_err"]
        sure = on_cpu["flag"] & np.uint32(Flag.VELOCITY_UNCERTAIN) == 0
        alike = float((on_gpu["flag"][:STARS] == on_cpu["flag"]).mean())
        found[names[0]] |= {"off_in_errors": float(np.quantile(off[sure], 0.999)), "flags_alike": alike}
        found[names[0]]["agrees"] = alike > 0.999 and found[names[0]]["off_in_errors"] < 0.01
    return found


def failure(error: Exception) -> dict[str, Any]:
    """An engine that did not run: a missing package is no failure."""
    return {"error": f"{type(error).__name__}: {error}", "failed": not isinstance(error, ImportError)}


def of_few_stars() -> Model:
    """A model of the recipe `template`, whose experts the CUDA kernels know; no model that is shipped is one."""
    from moefast.recipes import fit
    from moefast.simulate.source import SimulatedSpectra

    return fit(SimulatedSpectra.of_set("z0", rows=(0, FEW_STARS)), recipe="template", references=False)


def measure(model: Model, samples: int, small: bool) -> dict[str, Any]:
    """All engines that score."""
    from moefast.kernels import project, soft_mix
    from moefast.predicting.engines import CudaEngine

    mixture = model.mixture
    if isinstance(mixture, PosteriorMixture):
        raise BackendError(f"the CUDA kernels do not know a {mixture.kind}; choose a model of linear experts")
    flux, error, truth = stars(model, small)
    n, p = (SMALL_ROWS if small else RESIDENT), mixture.n_pixels
    copies = bandwidths(8 * n * p // 2, samples)
    expected = mixture.predict(flux, error).log_g
    plain = soft_mix(project(flux, error, None, mixture.projection), mixture.mixing).log_g
    found: dict[str, Any] = {}

    def note(
        name: str, rows: int, seconds: list[float], log_g: np.ndarray | None, floor: str = "",
        expected: np.ndarray = expected,
    ) -> None:  # fmt: skip
        entry: dict[str, Any] = {"rows": rows, "seconds": seconds, "rows_per_second": rows / min(seconds)}
        if floor:
            entry["share"] = 8 * p * entry["rows_per_second"] / 1e9 / copies[floor]["gb_per_second"]
            entry["of"] = floor
        if log_g is not None:
            # The first rows are the stars; the rest repeats them.
            log_g = log_g[: len(truth)]
            entry["r2"] = r2(truth[: len(log_g)], log_g)
            entry["difference"] = float(np.abs(log_g - expected[: len(log_g)]).max())
            entry["agrees"] = entry["difference"] < TOLERANCE
        found[name] = entry

    # The model without its library, and with it; with clouds of the size of that of `z0` if it has none.
    for several in (False, True):
        try:
            library, own, right = with_clouds(mixture, flux, error) if several else (None, (), plain)
            ways, log_g = resident(mixture, flux, error, n, library, own)
            for name, work in ways.items():
                note(name, n, sampled(work, samples), log_g(), "device copy", right)
        except Exception as problem:  # the others are to be measured all the same
            found[f"moefast, resident{', with clouds' if several else ''}"] = failure(problem)
    rows = SMALL_ROWS if small else HOST
    many_flux, many_error = (np.tile(a, (-(-rows // len(a)), 1))[:rows] for a in (flux, error))
    try:
        engine = CudaEngine(mixture)
        result = engine(many_flux, many_error, None, 0)[0].log_g
        seconds = sampled(lambda: engine(many_flux, many_error, None, 0), samples)
        note("moefast, from host memory", rows, seconds, result, "pinned host to device")
    except Exception as problem:
        found["moefast, from host memory"] = failure(problem)
    try:
        run = onnx_runtime(mixture, flux, error)
        note("ONNX Runtime, CUDA, from host memory", len(flux), sampled(run, samples), run(),
             "pinned host to device")  # fmt: skip
    except Exception as problem:
        # A CPU-only ONNX Runtime is no failure of ours.
        found["ONNX Runtime, CUDA"] = failure(problem) | {"failed": not isinstance(problem, BackendError)}
    try:
        note("torch, the products alone", n, sampled(torch_products(mixture, flux, error, n), samples), None,
             "device copy")  # fmt: skip
    except Exception as problem:
        found["torch, the products alone"] = failure(problem)
    return {"pixels": p, "experts": mixture.n_experts, "copies": copies, "engines": found}


@click.command()
@click.option("-m", "--model", help="Model folder.  [default: a template model of a few stars, fitted first]")
@click.option("--samples", default=7, show_default=True, help="Timed runs of each engine.")
@click.option(
    "--posterior", "posteriors", multiple=True, default=POSTERIORS, show_default=True,
    help="Model of the parts `posteriors` and `velocities`.",
)  # fmt: skip
@click.option(
    "--rows", "block_rows", type=click.IntRange(1), multiple=True,
    help="Stars of a block, to be tried in the part `posteriors` beside the default.",
)  # fmt: skip
@click.option("--small", is_flag=True, help="Sizes of a test: seconds instead of minutes.")
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="By default all.")
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON file to write.")
def main(
    model: str | None,
    samples: int,
    posteriors: tuple[str, ...],
    block_rows: tuple[int, ...],
    small: bool,
    parts: tuple[str, ...],
    out: Path | None,
) -> None:
    """Measure, print, and write JSON (by default into benchmarks/results/)."""
    from moefast.kernels.cuda.device import require_device

    try:
        require_device()
    except BackendError as error:
        click.echo(f"not measured: {error}", err=True)
        sys.exit(error.exit_code)
    device = (cuda_devices()[0] or ["simulated"])[0]
    wanted = set(parts or PARTS)
    of_shipped = wanted <= {"posteriors", "velocities"}
    chosen = Model.load(model or posteriors[0]) if model or of_shipped else of_few_stars()
    report: dict[str, Any] = {
        "what": "scoring on the GPU",
        "device": device,
        "environment": describe(),
        "model_sha256": chosen.hash,
        "goal": GOAL,
        "scoring": {"pixels": chosen.mixture.n_pixels, "copies": {}, "engines": {}},
        "template_posterior": {"engines": {}},
        "tangent_posterior": {},
        "posteriors": {},
        "velocities": {},
    }
    if "scoring" in wanted:
        report["scoring"] = measure(chosen, samples, small)
    if "templates" in wanted:
        report["template_posterior"] = posterior(samples, **(SMALL_LIBRARY if small else LIBRARY))
    if "clouds" in wanted:
        for name, shape in (SMALL_CLOUDS if small else CLOUDS).items():
            report["tangent_posterior"][name] = weighed_clouds(samples, **shape)
    if "posteriors" in wanted:
        for name in posteriors:
            report["posteriors"][name] = own_noise(Model.load(name), samples, small, block_rows)
    if "velocities" in wanted:
        for name in posteriors:
            report["velocities"][name] = moving(Model.load(name), samples, small)
    show(report)
    path = out or RESULTS / f"{report['environment']['date']}-gpu-scoring.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    click.echo(f"wrote {path}")
    if failed := failed_engines(report):
        click.echo(f"failed, or off by more than {TOLERANCE:.0e}: {', '.join(sorted(failed))}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
