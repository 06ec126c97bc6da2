"""Each CPU kernel, networks, graphs and whole predictions against NumPy that gives the same result.

    OMP_WAIT_POLICY=passive pytest tests/micro/bench_kernels.py --benchmark-json=result.json
    python tests/microbenchmarks.py append result.json

Plain `pytest` does not collect this file. A sample of the kernel follows a sample of its baseline, and what is judged
is the median of their ratios. Both work on one thread, and what counts is the time that the process has of a core:
however many others want the cores, it is nearly the same, while wall time is not. Nearly: a case whose ratio is beyond
`ALLOWED` times that which is written down for it in `ratios.json` is measured again, and fails if it is beyond that
three times. A kernel that is slow is slow each time. What the history gets is the first ratio, whatever came after it;
`tests/microbenchmarks.py` tells how, and sees drifts.
"""

import atexit
import functools
import math
import shutil
import tempfile
import time
from pathlib import Path

import numba
import numpy as np
import pytest
from made_clouds import mixture as posterior
from made_forest import forest
from microbenchmarks import ALLOWED, TRIES, allowed, measured
from threadpoolctl import threadpool_limits

import moefast
import moefast.kernels
from moefast import kernels
from moefast.benchmarks.run import prepare
from moefast.benchmarks.score import ScoreProblem
from moefast.core.metrics import r2
from moefast.export import build, open_session
from moefast.kernels.reference import perceptron_reference, soft_mix_reference
from moefast.kernels.reference_forest import forest_predict_reference
from moefast.kernels.reference_resample import resampling_matrix
from moefast.kernels.resample import pixel_edges, resample
from moefast.mixture import Mixture
from moefast.model import Model
from moefast.spectra.quality import assess, good_pixels
from moefast.spectra.tables import read_table

SAMPLE = 0.03
"""Seconds of a core that a sample lasts at least."""
ROUNDS = 9
P = 4096


def rng():
    return np.random.default_rng(20260204)


def spectra(n):
    draw = rng()
    error = draw.uniform(0.05, 0.3, (n, P)).astype(np.float32)
    return (1 + error * draw.standard_normal((n, P))).astype(np.float32), error


# --- cases: (kernel, baseline), and how good the kernel's answer is, where that means something ------------------


def normal_equations():
    n, p, groups = 4096, 1024, 9
    draw = rng()
    x, y = draw.standard_normal((n, p), dtype=np.float32), draw.standard_normal(n)
    group = draw.integers(0, groups, n)
    upper = np.triu_indices(p)

    def baseline():
        out = [np.zeros(groups, np.int64), np.zeros((groups, p)), np.zeros(groups), np.zeros(groups)]
        cross, gram = np.zeros((groups, p)), np.zeros((groups, upper[0].size))
        for k in range(groups):
            rows, labels = x[group == k], y[group == k]
            out[0][k], out[1][k] = len(rows), rows.sum(0, dtype=np.float64)
            out[2][k], out[3][k] = labels.sum(), labels @ labels
            cross[k] = labels.astype(np.float32) @ rows
            gram[k] = (rows.T @ rows)[upper]
        return [*out, cross, gram]

    return lambda: kernels.normal_equations(x, y, group, groups), baseline


def collect_rows():
    n, groups = 2048, 9
    draw = rng()
    x, group = draw.standard_normal((n, P), dtype=np.float32), draw.integers(0, groups, n)
    y, error, reference = draw.standard_normal(n), np.abs(x), np.ones(P, np.float32)
    buffers = np.empty((groups, n, P), np.float32)

    def kernel():
        totals = (
            np.zeros(groups, np.int64), np.zeros((groups, P)), np.zeros(groups), np.zeros(groups),
            np.zeros((groups, P)), np.zeros((groups, P)),
        )  # fmt: skip
        waiting = np.zeros(groups, np.int64)
        kernels.collect_rows(x, y, group, 0, reference, buffers, waiting, totals, error=error)
        return [totals[1], totals[4], totals[5]]

    def baseline():
        out = [np.empty((groups, P)) for _ in range(3)]
        for k in range(groups):
            rows = buffers[k, : np.count_nonzero(group == k)]
            np.subtract(x[group == k], reference, out=rows)
            out[0][k], out[1][k] = rows.sum(0, dtype=np.float64), y[group == k] @ rows
            out[2][k] = (error[group == k] ** 2).sum(0, dtype=np.float64)
        return out

    return kernel, baseline


def add_gram():
    n, p = 4096, 1536
    rows, upper = rng().standard_normal((n, p), dtype=np.float32), np.triu_indices(p)

    def kernel():
        packed = np.zeros(p * (p + 1) // 2)
        kernels.add_gram(rows, packed)
        return packed

    return kernel, lambda: (rows.T @ rows)[upper]


def all_within():
    values = rng().standard_normal((2048, P), dtype=np.float32)
    return (
        lambda: np.array(kernels.all_within(values, -1e15, 1e15)),
        lambda: np.array(((values > -1e15) & (values < 1e15)).all()),
    )


def random_mixture():
    """A mixture of the size of the shipped one."""
    draw = rng()

    def normal(*shape, scale=1.0):
        return (scale * draw.standard_normal(shape)).astype(np.float32)

    k, m, c = 9, 8, 48
    return Mixture(
        wave=np.linspace(7100.2, 8849.8, P),
        reference=1 + normal(P, scale=0.1),
        noise_shape=draw.uniform(0.01, 0.05, P).astype(np.float32),
        knots=np.linspace(-1.5, 1.5, m, dtype=np.float32),
        columns=normal(P, c, scale=0.1),
        n_basis=c,
        expert_weights=normal(k, m, c, scale=0.1),
        expert_intercepts=3 + normal(k, m, scale=0.3),
        gate=(normal(14, 64, scale=0.1), normal(64), normal(64, k), normal(k)),
        error_model=(normal(17, 32, scale=0.1), normal(32), normal(32, 1, scale=0.1), normal(1)),
        label_range=(1.0, 5.0),
    )


def project():
    flux, error = spectra(2048)
    plan = random_mixture().projection

    def baseline():
        x, ratio = flux - plan.reference, error * error * plan.inverse_shape
        level = np.float32(0.5) * np.log(ratio.mean(1))
        energy, expected = (x * x) @ plan.inverse_shape, (error * error) @ plan.residual
        cells = ratio.reshape(len(x), -1, plan.cell).mean(2)
        norm = np.sqrt((flux * flux).sum(1) / (error * error).sum(1))
        median = np.median(flux / error, axis=1)
        products = [x @ plan.matrix, x @ plan.lines, cells @ plan.cell_matrix]
        return [*products, level, energy, expected, norm, median]

    def kernel():
        out = kernels.project(flux, error, None, plan)
        return [
            out.columns, out.windows, out.variances, out.log_level, out.energy, out.expected, out.snr_norm,
            out.snr_median,
        ]  # fmt: skip

    return kernel, baseline


def soft_mix():
    mixture, (flux, error) = random_mixture(), spectra(8192)
    rows = kernels.project(flux, error, None, mixture.projection)

    def outputs(mixed):
        return [
            mixed.log_g,
            mixed.log_g_err,
            mixed.log_g_err_raw,
            mixed.weights,
            mixed.expert_log_g,
            mixed.chi2,
        ]

    return (
        lambda: outputs(kernels.soft_mix(rows, mixture.mixing)),
        lambda: outputs(soft_mix_reference(rows, mixture.mixing)),
    )


def perceptron():
    draw = rng()
    shapes = ((58, 256), (256,), (256, 9), (9,))
    net = tuple(draw.normal(0, 0.2, shape).astype(np.float32) for shape in shapes)
    features = draw.standard_normal((8192, 58), dtype=np.float32)
    return lambda: kernels.perceptron(features, net), lambda: perceptron_reference(features, *net)


def assign_bins():
    draw = rng()
    t_eff, m_h = draw.uniform(3500, 6500, 500_000), draw.uniform(-2.5, 0.75, 500_000)
    t_edges, m_edges = (3750.0, 4500.0, 5250.0, 6000.0), (-2.0, -1.0, 0.0, 0.5)

    def baseline():
        i = np.clip(np.searchsorted(t_edges, t_eff, "right") - 1, 0, 2)
        k = np.clip(np.searchsorted(m_edges, m_h, "right") - 1, 0, 2)
        return (3 * i + k).astype(np.int16)

    return lambda: kernels.assign_bins(t_eff, m_h, t_edges, m_edges), baseline


def assign_snr_bins():
    snr, edges = rng().uniform(1, 9, 500_000), (2.0, 4.0, 7.0)
    return (
        lambda: kernels.assign_snr_bins(snr, edges),
        lambda: np.searchsorted(edges, snr, "left").astype(np.int16),
    )


def sort_by_bin():
    bins = rng().integers(0, 49, 500_000).astype(np.int16)

    def baseline():
        offsets = np.concatenate([[0], np.cumsum(np.bincount(bins, minlength=49))])
        return [np.argsort(bins, kind="stable"), offsets]

    return lambda: kernels.sort_by_bin(bins, 49), baseline


def template_posterior():
    draw = rng()
    keys, values = draw.standard_normal((4000, 48), dtype=np.float32), draw.standard_normal((4000, 2))
    z, level = keys[:512] + 0.5 * draw.standard_normal((512, 48), dtype=np.float32), np.full(512, 0.5)

    def baseline():
        a, b = z.astype(np.float64), keys.astype(np.float64)
        square = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T
        logs = -square / (2 * level[:, None] ** 2)
        weights = np.exp(logs - logs.max(1, keepdims=True))
        return weights @ values / weights.sum(1, keepdims=True)

    return lambda: kernels.template_posterior(z, level, keys, values).mean, baseline


def tangent_posterior():
    draw = rng()
    m, r, t, k, n = 300, 48, 8, 9, 1024
    keys, gains = draw.standard_normal((m, r)), 0.1 * draw.standard_normal((m, t))
    tangents = np.linalg.qr(draw.standard_normal((m, r, t)))[0].transpose(0, 2, 1)
    first = np.linspace(0, m, k + 1).astype(np.int64)
    library = kernels.Library(
        keys, tangents, draw.uniform(1, 9, (m, t)), gains, draw.uniform(0, 0.1, m), np.full(m, -np.log(m)),
        draw.uniform(1, 5, m), np.full(m, 0.3), first,
    )  # fmt: skip
    z = (keys[draw.integers(0, m, n)] + 2 * draw.standard_normal((n, r))).astype(np.float32)
    level = np.log(draw.uniform(1, 3, n)).astype(np.float32)

    def baseline():
        noise = np.exp(2 * level)[:, None]
        v, w = library.variances + noise[:, :, None], library.rest + noise
        # In float32 the product form is good enough for stars of this brightness.
        inside = (z @ library.tangents.reshape(m * t, r).T).reshape(n, m, t)
        u = inside - np.einsum("mtr,mr->mt", library.tangents, library.keys)
        square = (z * z).sum(1)[:, None] + (library.keys**2).sum(1) - 2 * z @ library.keys.T
        chi2 = (square - (u * u).sum(2)) / w + (u * u / v).sum(2)
        e = library.log_weights - 0.5 * (chi2 + (r - t) * np.log(w) + np.log(v).sum(2))
        means = library.log_g + (library.gains * u / v).sum(2)
        variances = library.scatter - (library.gains**2 / v).sum(2)
        out = np.empty((3, n, k), np.float32)
        for i in range(k):
            here = slice(first[i], first[i + 1])
            top = e[:, here].max(1, keepdims=True)
            weights = np.exp(e[:, here] - top)
            total = weights.sum(1)
            weights /= total[:, None]
            out[0, :, i] = (weights * means[:, here]).sum(1)
            apart = means[:, here] - out[0, :, i, None]
            out[1, :, i] = np.sqrt((weights * (variances[:, here] + apart * apart)).sum(1))
            out[2, :, i] = top[:, 0] + np.log(total)
        return list(out)

    def kernel():
        found = kernels.tangent_posterior(z, level, library)
        return [found.mean, found.sd, found.log_evidence]

    return kernel, baseline


def forest_predict():
    trees, x = forest([20] * 100, P), rng().standard_normal((1024, P), dtype=np.float32)
    return lambda: kernels.forest_predict(x, trees), lambda: forest_predict_reference(x, trees)


def gaussian_log_likelihood():
    flux, error = spectra(512)
    data, constant = flux[0].astype(np.float64), (error[0].astype(np.float64)) ** 2
    weight, logs = (1 / constant).astype(np.float32), np.log(constant).sum()
    observed = data.astype(np.float32)

    def baseline():
        x = observed - flux
        return -0.5 * ((x * x) @ weight + logs)

    return lambda: kernels.gaussian_log_likelihood(flux, data, constant=constant), baseline


def good_pixels_all_good():
    flux, error = spectra(2048)

    def baseline():
        good = np.isfinite(flux) & (error > 0) & (error <= np.float32(1e6))
        return None if good.all() else good

    return lambda: good_pixels(flux, error), baseline


def good_pixels_masked():
    flux, error = spectra(2048)
    mask = (rng().random(flux.shape) < 0.01).astype(np.uint8)

    def baseline():
        good = np.isfinite(flux) & (error > 0) & (error <= np.float32(1e6)) & (mask == 0)
        return None if good.all() else good

    return lambda: good_pixels(flux, error, mask), baseline


def assess_all_good():
    flux, error = spectra(512)

    def baseline():
        norm = np.sqrt((flux * flux).sum(1) / (error * error).sum(1))
        return [norm, np.median(flux / error, axis=1)]

    def kernel():
        quality = assess(flux, error, None)
        return [quality.snr_norm, quality.snr_median]

    return kernel, baseline


def resample_rows():
    """Against the product with the matrix of the same weights: flux, and squares for the variance."""
    flux, error = spectra(256)
    wave = np.linspace(7100, 8850, P)
    edges, out = pixel_edges(wave), pixel_edges(wave[8:-8] + 0.3)
    weights = resampling_matrix(edges, out).T
    squares, width = (weights**2).astype(np.float32), np.diff(edges).astype(np.float32)
    shares, weights = (squares.sum(0) * np.diff(out)).astype(np.float32), weights.astype(np.float32)
    bad, starts = np.zeros(flux.size, bool), np.arange(len(flux) + 1) * P

    def kernel():
        return list(resample(wave, flux.ravel(), error.ravel(), bad, starts, np.ones(len(flux)), out)[:2])

    return kernel, lambda: [flux @ weights, np.sqrt((error**2 * width) @ squares / shares)]


def cloud_posterior():
    """The floor of a star with a noise of its own: u, M, and the product of C' with the vectors of all clouds."""
    mixture = posterior(p=P, m=448, n=49, t=5, q=3, labels=5)
    flux, error = spectra(128)
    space, clouds = mixture._space, mixture._clouds
    draw = rng()
    y, cells = flux, draw.uniform(0, 1, (len(flux), len(space.cells)))
    products = draw.standard_normal((len(space.cells), 52 * 53 // 2))
    root, vectors = (
        draw.standard_normal((2, 49, 49), dtype=np.float32)[0],
        draw.standard_normal((49, 448 * 6)),
    )
    vectors = vectors.astype(np.float32)

    def baseline():
        _ = y.astype(np.float64) @ mixture.directions.astype(np.float64), cells @ products
        for _ in flux:
            root @ vectors

    def kernel():
        kernels.cloud_posterior(flux, error, None, space, clouds)

    return kernel, baseline


def velocity_evidence():
    """The floor: weights and weighed flux of all stars times the lines, and their squares, at all velocities."""
    draw, n_v, r, r2, m, k, n = rng(), 41, 20, 20, 300, P - 64, 128
    lines, squares = (0.1 * draw.standard_normal((n_v, size, k), dtype=np.float32) for size in (r, r2))
    templates = kernels.VelocityTemplates(
        first=32, continuum=np.stack([np.linspace(-1, 1, k) ** i for i in range(5)]), precision=np.ones(5),
        lines=lines, squares=squares, of_lines=draw.standard_normal((m, r), dtype=np.float32),
        of_squares=draw.standard_normal((m, r2), dtype=np.float32),
        log_weights=np.full(m, -np.log(m), np.float32),
    )  # fmt: skip
    flux, error = spectra(n)
    columns = [np.ascontiguousarray(rows.reshape(-1, k).T) for rows in (lines, squares)]

    def baseline():
        weight = (1 / error[:, 32:-32] ** 2).astype(np.float32)
        for power in range(5):
            _ = (weight * templates.continuum[power].astype(np.float32)) @ columns[0]
        _ = (weight * flux[:, 32:-32]) @ columns[0], weight @ columns[1]

    def kernel():
        kernels.velocity_evidence(flux, error, None, templates)

    return kernel, baseline


def velocity_step():
    """The floor: u, M and the root of M of every star."""
    mixture = posterior(p=P, m=40, n=49, t=5, q=3, labels=5)
    flux, error = spectra(128)
    space, width = mixture._space, mixture.directions.shape[1]
    slopes = kernels.Slopes(mixture.reference, mixture.directions, mixture.n_nuisances)
    draw = rng()
    cells = draw.uniform(0, 1, (len(flux), len(space.cells)))
    products = draw.standard_normal((len(space.cells), width * (width + 1) // 2))
    matrix = np.eye(width) + 0.01

    def baseline():
        _ = flux.astype(np.float64) @ mixture.directions.astype(np.float64), cells @ products
        for _ in flux:
            np.linalg.cholesky(matrix)

    def kernel():
        kernels.velocity_step(flux, error, None, space, slopes)

    return kernel, baseline


def velocity_conclusion():
    """The floor: a cubic between neighbours, and its exponential."""
    draw, n, n_v = rng(), 512, 101
    grid = np.linspace(-500.0, 500.0, n_v)
    velocity, sigma = draw.uniform(-300, 300, n), draw.uniform(1, 8, n)
    evidence = -0.5 * ((grid - velocity[:, None]) / np.maximum(sigma, 8)[:, None]) ** 2
    shares = draw.dirichlet(np.ones(4), 10)

    def baseline():
        for share in shares:
            np.exp(sum(part * evidence[:, i : i + n_v - 3] for i, part in enumerate(share)))

    def kernel():
        kernels.velocity_conclusion(
            grid, evidence, velocity, sigma, shares, near=30.0, near_sigmas=4.0, wider=1.2
        )

    return kernel, baseline


# --- cases: from spectra to predictions ----------------------------------------------------------------------------


@functools.cache
def stars(n=1024):
    """Simulated stars of `z0` in a file and in memory, for the shipped model of that name."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    prepare(folder, n, ["score"], Model.load("z0"), lambda _: None)
    problem = ScoreProblem(folder / "spectra.h5", folder, "z0", n)
    problem.load()
    return problem


def predict_posterior():
    """`moefast.predict` from file to table, against its kernels on spectra in memory."""
    problem = stars()
    out = problem.folder / "predictions.h5"

    def kernel():
        moefast.predict(problem.path, problem.model, out, array="flux", backend="cpu", overwrite=True)
        return read_table(out)[0]["log_g"]

    return kernel, lambda: problem.mixture.predict(problem.flux, problem.error).log_g, problem.r2


def network():
    """The network of the shipped model `survey`, against its description in NumPy and float64."""
    problem, mixture = stars(), Model.load("survey").mixture
    flux, error = problem.flux[:256], problem.error[:256]
    return (
        lambda: mixture.predict(flux, error).log_g,
        lambda: mixture.predict_reference(flux, error).log_g,
        lambda log_g: r2(problem.log_g[: len(flux)], log_g),
    )


def onnx_linear():
    """The graph of linear experts in ONNX Runtime, against their description in NumPy and float64."""
    mixture, (flux, error) = random_mixture(), spectra(512)
    session = open_session(build(mixture))
    outputs = ["log_g", "log_g_err", "chi2"]

    def baseline():
        mixed = mixture.predict_reference(flux, error)
        return [getattr(mixed, name) for name in outputs]

    return lambda: session.run(outputs, {"flux": flux, "error": error}), baseline


CASES = (
    normal_equations, collect_rows, add_gram, all_within, project, soft_mix, perceptron, assign_bins, assign_snr_bins,
    sort_by_bin, gaussian_log_likelihood, template_posterior, tangent_posterior, forest_predict, good_pixels_all_good,
    good_pixels_masked, assess_all_good, resample_rows, cloud_posterior, velocity_evidence, velocity_step,
    velocity_conclusion, predict_posterior, network, onnx_linear,
)  # fmt: skip

NO_KERNELS = {
    "CloudPosterior", "Clouds", "GRAM_ROWS", "Groups", "PROJECT_ROWS", "Forest", "Given", "Library", "Mixed", "Mixing",
    "Projected", "Projection", "Slopes", "Space", "TangentPosterior", "TemplatePosterior", "VelocityTemplates",
    "cell_size", "packed_size", "unpack_symmetric", "without_cuda",
}  # fmt: skip


# --- the measurement ---------------------------------------------------------------------------------------------


def repeated(work):
    """A function that gives the seconds of a core that `work` takes, from as many calls as a sample needs."""
    work()
    begin = time.process_time()
    work()
    count = max(1, math.ceil(SAMPLE / max(time.process_time() - begin, 1e-9)))

    def sample():
        begin = time.process_time()
        for _ in range(count):
            work()
        return (time.process_time() - begin) / count

    return sample


def by_turns(sample, setup, rounds, iterations):
    """What `benchmark.pedantic` does, which can be had once in a test."""
    assert iterations == 1
    for _ in range(rounds):
        setup()
        sample()


def ratios_of(benchmark, kernel, baseline, bound):
    """Time of the kernel over that of the baseline, as often as `measured` asks for it.

    A ratio is the median of those of samples that follow each other.
    """
    measurements = []

    def measure():
        seconds, seconds_baseline = [], []
        sample, sample_baseline = repeated(kernel), repeated(baseline)
        (by_turns if measurements else benchmark.pedantic)(
            lambda: seconds.append(sample()),
            setup=lambda: seconds_baseline.append(sample_baseline()),
            rounds=ROUNDS,
            iterations=1,
        )
        measurements.append((seconds, seconds_baseline))
        return float(np.median(np.divide(seconds, seconds_baseline)))

    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        with threadpool_limits(1):
            ratios = measured(measure, bound)
    finally:
        numba.set_num_threads(threads)
    seconds, seconds_baseline = measurements[0]
    benchmark.extra_info.update(
        ratio=ratios[0], measured_again=ratios[1:], kernel_seconds=seconds, baseline_seconds=seconds_baseline
    )
    return ratios


def assert_same(found, expected):
    if expected is None:
        assert found is None
        return
    several = isinstance(expected, list)
    for mine, theirs in zip(found if several else [found], expected if several else [expected], strict=True):
        largest = float(np.abs(np.asarray(theirs, np.float64)).max())
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4 * largest)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_kernel_is_not_slower_than_it_was(benchmark, case):
    kernel, baseline, *goodness = case()
    answer = kernel()
    assert_same(answer, baseline())
    quality = goodness[0](answer) if goodness else None
    bound = allowed(case.__name__)
    ratios = ratios_of(benchmark, kernel, baseline, bound)
    benchmark.extra_info.update(case=case.__name__, bound=bound, r2=quality)
    told = ", then ".join(f"{ratio:.3g}" for ratio in ratios)
    print(f"{case.__name__}: {told} of the baseline's time, {bound:.3g} allowed, R² {quality}")
    assert ratios[-1] <= bound, f"{told} of the baseline's time, each beyond the {bound:.3g} that are allowed"
    # What is fast and wrong is no good.
    assert quality is None or quality > 0.6


def test_a_kernel_that_became_slow_is_seen(benchmark):
    """Three times the work, by construction: beyond what is allowed each time that it is measured."""
    kernel, _ = sort_by_bin()
    ratios = ratios_of(benchmark, lambda: [kernel() for _ in range(3)], kernel, ALLOWED)
    assert len(ratios) == TRIES
    assert min(ratios) > ALLOWED


def test_every_case_has_a_ratio():
    missing = [case.__name__ for case in CASES if not math.isfinite(allowed(case.__name__))]
    assert not missing, f"write down ten results: python tests/microbenchmarks.py renew {' '.join(missing)}"


def test_every_kernel_has_a_case():
    assert set(moefast.kernels.__all__) - NO_KERNELS <= {case.__name__ for case in CASES}
