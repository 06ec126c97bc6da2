"""Scoring and template posteriors on a real device. Run by `pytest -m gpu` where there is one."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from clouds import clouds, stars_of
from plans import awkward_rows, random_library, random_mixture, random_plans, spectra
from tolerances import assert_close

from moefast.backend import cuda_devices
from moefast.core.errors import BackendError
from moefast.experts.template import Templates
from moefast.kernels import project, soft_mix, tangent_posterior, template_posterior
from moefast.kernels.reference import project_reference, soft_mix_reference
from moefast.kernels.reference_tangent import tangent_posterior_reference
from moefast.kernels.reference_template import template_posterior_reference

OF_MIX = ("log_g", "log_g_err", "log_g_err_raw", "weights", "expert_log_g", "chi2")
OF_PROJECT = ("log_level", "snr_norm", "snr_median", "n_good", "flag")


@pytest.fixture
def device():
    """Skip without a device; with one, everything must work."""
    names, reason = cuda_devices()
    if not names:
        pytest.skip(reason)
    pytest.importorskip("numba_cuda")
    return names[0]


def assert_scores(found, flux, error, mask, plans):
    linear = project_reference(flux, error, mask, plans[0])
    expected = soft_mix_reference(linear, plans[1])
    twin = project(flux, error, mask, plans[0])
    mixed = soft_mix(twin, plans[1])
    for name in (*OF_MIX, *OF_PROJECT):
        a = getattr(found, name)
        b = getattr(expected if name in OF_MIX else linear, name)
        c = getattr(mixed if name in OF_MIX else twin, name)
        assert a.dtype == c.dtype
        if name in ("n_good", "flag", "snr_median"):
            np.testing.assert_array_equal(a, c, err_msg=name)
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b), err_msg=name)
        for other in (b, c):
            # Logits of order 10 carry a float32 rounding of 1e-6 each into the exponential.
            assert_close(np.nan_to_num(a), np.nan_to_num(other), made_in=np.float32, factor=3)


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("n", [0, 1, 31, 127, 128, 129, 1009])
@pytest.mark.parametrize(
    ("p", "changes"),
    [
        (1, {"c": 1, "w": 1, "n_experts": 1, "n_levels": 2, "hidden": 1}),
        (17, {"c": 49, "w": 5}),
        (131, {"c": 100, "w": 9, "n_experts": 49}),
        (4096, {"c": 48, "w": 4, "n_experts": 9, "n_levels": 8, "hidden": 64}),
        (5000, {}),
    ],
)
def test_scores(n, p, changes):
    from moefast.kernels.cuda import score

    plans = random_plans(p=p, **changes)
    flux, error = spectra(n, plans[0])
    rng = np.random.default_rng(n)
    mask = rng.random(flux.shape) < 0.01
    flux[rng.random(flux.shape) < 0.003] = np.nan
    error[rng.random(flux.shape) < 0.003] = -1
    assert_scores(score(flux, error, mask, *plans), flux, error, mask, plans)


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("p", [8, 264, 4088, 4096, 4100])
def test_medians_counts_and_flags_of_awkward_rows(p):
    """Ties, zeros, wrong guesses, absurd numbers: to the last bit, with rows of pixels in eights and others."""
    from moefast.kernels.cuda import score

    plans = random_plans(p=p, c=48, w=4)
    flux, error, mask = (np.repeat(a, 20, axis=0) for a in awkward_rows(p))
    found = score(flux, error, mask, *plans)
    twin = project(flux, error, mask, plans[0])
    for name in ("snr_median", "n_good", "flag"):
        np.testing.assert_array_equal(getattr(found, name), getattr(twin, name), err_msg=name)


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
def test_medians_of_many_random_rows():
    """Of all the ways in which counts can meet the middle, many."""
    from moefast.kernels.cuda import score

    plans = random_plans(p=1024, c=48, w=4)
    rng = np.random.default_rng(3)
    n = 20_000
    flux = (rng.standard_normal((n, 1024)) * rng.uniform(0, 3, (n, 1)) + rng.uniform(-1, 5, (n, 1))).astype(
        np.float32
    )
    flux[::3] = np.round(flux[::3] * rng.uniform(1, 50, (len(flux[::3]), 1)))
    error = rng.uniform(0.5, 1.5, flux.shape).astype(np.float32)
    error[::3] = 1
    error[rng.random(flux.shape) < rng.uniform(0, 0.9, (n, 1)) ** 3] = -1
    found = score(flux, error, None, *plans)
    np.testing.assert_array_equal(found.snr_median, project(flux, error, None, plans[0]).snr_median)


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
def test_blocks_threads_and_layouts_change_no_bit():
    from moefast.kernels.cuda import CudaScorer

    plans = random_plans(p=512, c=48, w=4, n_experts=9, n_levels=8, hidden=64)
    flux, error = spectra(5003, plans[0])
    expected = CudaScorer(*plans)(flux, error)
    scorer = CudaScorer(*plans, block_rows=300)
    cuts = list(range(0, 5003, 611))
    with ThreadPoolExecutor(5) as pool:
        parts = pool.map(lambda i: scorer(np.asfortranarray(flux[i : i + 611]), error[i : i + 611]), cuts)
        for i, part in zip(cuts, parts, strict=True):
            for name in part._fields:
                np.testing.assert_array_equal(getattr(part, name), getattr(expected, name)[i : i + 611])


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
def test_a_bad_row_leaves_its_neighbours_alone():
    from moefast.kernels.cuda import score

    plans = random_plans(p=264)
    flux, error = spectra(300, plans[0])
    clean = score(flux, error, None, *plans)
    flux[7], error[8], flux[9, 3] = np.nan, np.inf, 3e38
    found = score(flux, error, None, *plans)
    good = np.setdiff1d(np.arange(300), [7, 8, 9])
    for name in found._fields:
        np.testing.assert_array_equal(getattr(found, name)[good], getattr(clean, name)[good])


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
def test_the_engine():
    from moefast.predicting.engines import CudaEngine

    mixture = random_mixture(n_pixels=4096)
    flux, error = spectra(700, mixture.projection)
    found, quality = CudaEngine(mixture)(flux, error, None, 0)
    expected, same = mixture.score(flux, error)
    assert np.abs(found.log_g - expected.log_g).max() < 1e-4
    np.testing.assert_array_equal(quality.snr_median, same.snr_median)


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("marks", [(True,) * 9, (True, False, True) * 3])
def test_the_engine_of_a_mixture_with_a_library(marks):
    from moefast.predicting.engines import CudaEngine

    plain = random_mixture(n_pixels=4096, n_experts=9)
    library = random_library(9, plain.n_basis, n_tangents=9, clouds=20)
    mixture = plain.with_expert(Templates(library), *np.flatnonzero(marks).tolist())
    flux, error = spectra(700, mixture.projection)
    found, _ = CudaEngine(mixture)(flux, error, None, 0)
    expected, _ = mixture.score(flux, error)
    assert np.abs(found.log_g - expected.log_g).max() < 1e-4
    assert np.abs(found.log_g - CudaEngine(plain)(flux, error, None, 0)[0].log_g).max() > 1e-2


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("n", "m", "r", "t", "first"),
    [
        (0, 3, 2, 1, None),
        (1, 1, 1, 0, None),
        (63, 7, 15, 8, [0, 0, 7]),
        (65, 17, 17, 9, [0, 9, 17, 17]),
        (1009, 300, 48, 8, [0, 30, 70, 100, 130, 170, 200, 230, 270, 300]),
        (257, 501, 160, 24, [0, 200, 501]),
    ],
)
def test_tangent_posterior(n, m, r, t, first):
    library = clouds(m, r, t, first)
    z, level = stars_of(library, n)
    found = tangent_posterior(z, level, library, backend="cuda")
    twin = tangent_posterior(z, level, library)
    expected = tangent_posterior_reference(z[:50], level[:50], library)
    # An exponent of order 100 carries a rounding of 1e-5 into the exponential, one of order 600 six times that. Those
    # of an expert are of the order of its evidence; those that count for all, of that of the best.
    order = np.maximum(np.nan_to_num(np.abs(twin.log_evidence), posinf=0) / 100, 1)
    for name, reference in zip(("mean", "sd", "log_evidence", "effective"), expected, strict=True):
        a, b = getattr(found, name), getattr(twin, name)
        np.testing.assert_array_equal(np.isfinite(a), np.isfinite(b))
        scale = {"log_evidence": np.ones_like(order), "effective": order.min(1)}.get(name, order)
        here = np.isfinite(a)
        assert_close((a / scale)[here], (b / scale)[here], made_in=np.float32, factor=4)
        here = np.isfinite(reference)
        assert_close((a / scale)[:50][here], (reference / scale[:50])[here], made_in=np.float32, factor=4)


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("free_scale", [False, True])
@pytest.mark.parametrize(
    ("n", "m", "r", "q"), [(0, 3, 2, 1), (1, 1, 1, 1), (63, 65, 17, 9), (1009, 5003, 48, 3)]
)
def test_template_posterior(n, m, r, q, free_scale):
    rng = np.random.default_rng(n)
    keys = rng.standard_normal((m, r)) * np.linspace(3, 0.3, r)
    level = rng.uniform(0.3, 3, n)
    z = keys[rng.integers(0, m, n)] + level[:, None] * rng.standard_normal((n, r))
    rows = tuple(a.astype(np.float32) for a in (z, level, keys, rng.uniform(1, 5, (m, q))))
    found = template_posterior(*rows, free_scale=free_scale, backend="cuda")
    twin = template_posterior(*rows, free_scale=free_scale)
    few = slice(0, 50)
    expected = template_posterior_reference(rows[0][few], rows[1][few], *rows[2:], free_scale=free_scale)
    for name, reference in zip(("mean", "log_evidence", "effective"), expected, strict=True):
        # An exponent of order 100 carries a rounding of 1e-5 into the exponential.
        assert_close(getattr(found, name), getattr(twin, name), factor=3)
        assert_close(getattr(found, name)[few], reference, made_in=np.float32, factor=3)


def test_without_a_device_the_kernels_say_so():
    if cuda_devices()[0]:
        pytest.skip("there is a device")
    from moefast.kernels.cuda import CudaScorer, score

    plans = random_plans(p=16, c=3, w=1)
    ones = np.ones((2, 16), np.float32)
    for call in (
        lambda: score(ones, ones, None, *plans),
        lambda: CudaScorer(*plans),
        lambda: template_posterior(ones, np.ones(2), ones, np.ones(2), backend="cuda"),
        lambda: tangent_posterior(np.ones((2, 3)), np.ones(2), clouds(2, 3, 1), backend="cuda"),
    ):
        with pytest.raises(BackendError, match=r"backend cuda: (no usable CUDA device|numba-cuda is not)"):
            call()


def test_the_benchmark_without_a_device(tmp_path):
    if cuda_devices()[0]:
        pytest.skip("there is a device")
    script = Path(__file__).parents[2] / "benchmarks" / "gpu_scoring.py"
    command = [sys.executable, str(script), "-o", str(tmp_path / "x.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 7
    assert "not measured: backend cuda: no" in done.stderr
    assert not (tmp_path / "x.json").exists()
