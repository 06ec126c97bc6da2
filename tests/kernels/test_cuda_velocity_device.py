"""Velocities fitted on a real device. Run by `pytest -m gpu` where there is one."""

import made_velocities
import numpy as np
import pytest
from made_clouds import mixture, stars
from made_velocities import expected_evidence, expected_step, space_of, stars_of

from moefast.backend import cuda_devices
from moefast.benchmarks.velocities import moving_stars
from moefast.core.errors import BackendError
from moefast.kernels import velocity_evidence, velocity_step
from moefast.model import Model
from moefast.posterior.velocities import VelocityFit
from moefast.predicting.files import predict
from moefast.predicting.velocities import MOVED_ON_CPU
from moefast.spectra.quality import Flag
from moefast.spectra.writer import SpectrumWriter


@pytest.fixture
def device():
    """Skip without a device; with one, everything must work."""
    names, reason = cuda_devices()
    if not names:
        pytest.skip(reason)
    pytest.importorskip("numba_cuda")
    return names[0]


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("n", [0, 1, 21, 22, 128, 131])
@pytest.mark.parametrize(
    "sizes",
    [
        {"n_v": 1, "r": 1, "m": 1, "c": 1, "k": 8},
        {"n_v": 23, "r": 3, "m": 40, "c": 3, "k": 641},
        {"n_v": 40, "r": 5, "m": 130, "c": 5, "k": 600},
    ],
)
def test_the_scan_is_its_equations(n, sizes):
    templates = made_velocities.templates(**sizes)
    flux, error = stars_of(templates, n, which_velocity=sizes["n_v"] // 2)
    mask = np.random.default_rng(3).random(flux.shape) < 0.1
    if n:
        flux[0, 50], error[-1, 60] = np.nan, -1.0
    found = velocity_evidence(flux, error, mask, templates, backend="cuda")
    assert found.shape == (n, sizes["n_v"])
    few = slice(0, 25)
    if n:
        # As tests/kernels/test_velocity.py has it for the CPU.
        expected = expected_evidence(templates, flux[few], error[few], mask[few])
        np.testing.assert_allclose(found[few], expected, rtol=2e-5, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("n", [1, 32, 257])
@pytest.mark.parametrize("sizes", [{"p": 192, "q": 0}, {"p": 300, "q": 3}, {"p": 700, "n": 65, "q": 12}])
def test_the_step_is_one_gaussian_over_everything(n, sizes):
    mix = mixture(**sizes)
    space, slopes = space_of(mix, 1)
    flux, error = stars(mix, n)
    mask = np.random.default_rng(5).random(flux.shape) < 0.2
    step, sigma = velocity_step(flux, error, mask, space, slopes, backend="cuda")
    for i in range(0, n, 32):
        want = expected_step(mix, space, slopes, flux[i], error[i], mask[i])
        assert sigma[i] == pytest.approx(want[1], rel=1e-6)
        assert abs(step[i] - want[0]) < 1e-5 * want[1]


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
def test_bad_pixels_keep_to_themselves_and_a_row_has_the_same_bits_anywhere():
    templates = made_velocities.templates(n_v=23, m=40)
    flux, error = stars_of(templates, 300)
    whole = velocity_evidence(flux, error, None, templates, backend="cuda")
    mix = mixture(p=300, n=20, q=3)
    arrays = space_of(mix, 2)
    seen = stars(mix, 300)
    steps = velocity_step(*seen, None, *arrays, backend="cuda")
    alone = slice(200, 201)
    found = velocity_evidence(flux[alone], error[alone], None, templates, backend="cuda")
    np.testing.assert_array_equal(found, whole[alone])
    found = velocity_step(*(a[alone] for a in seen), None, *arrays, backend="cuda")
    np.testing.assert_array_equal(found, tuple(a[alone] for a in steps))
    flux[:150:2], error[1:150:3] = np.nan, np.inf
    found = velocity_evidence(flux, error, None, templates, backend="cuda")
    np.testing.assert_array_equal(found[150:], whole[150:])
    seen[0][:150:2] = np.nan
    found = velocity_step(*seen, None, *arrays, backend="cuda")
    np.testing.assert_array_equal([a[150:] for a in found], [a[150:] for a in steps])


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", ["observed", "z0"])
def test_shipped_models_fit_what_they_fit_on_the_cpu(name, tmp_path):
    """End to end: stars that move by up to 300 km/s, from file to table."""
    n = 1500
    made, model, path = moving_stars(n, seed=11), Model.load(name), tmp_path / "moving.h5"
    wave = made["wave"]
    step = wave[1] - wave[0]
    with SpectrumWriter(
        path, n_rows=n, wave=wave, wave_edges=np.append(wave, wave[-1] + step) - step / 2, arrays=("flux", "error"),
        params={"log_g": "f8"},
    ) as writer:  # fmt: skip
        writer.write(0, flux=made["moved"], error=made["error"], params={"log_g": made["log_g"]})
    done = {backend: predict(path, model, backend=backend, velocity="fit") for backend in ("cpu", "cuda")}
    assert MOVED_ON_CPU in done["cuda"].reason
    expected, found = done["cpu"].columns, done["cuda"].columns
    off = np.abs(found["v_los"] - expected["v_los"]) / expected["v_los_err"]
    sure = expected["flag"] & np.uint32(Flag.VELOCITY_UNCERTAIN) == 0
    assert sure.mean() > 0.9
    assert (off[sure] < 0.01).mean() > 0.999
    assert (found["flag"] == expected["flag"]).mean() > 0.999
    assert np.isclose(found["v_los_err"], expected["v_los_err"], rtol=0.01)[sure].mean() > 0.999
    near = np.abs(found["log_g"] - expected["log_g"]) < 0.01 * expected["log_g_err"]
    assert near[sure].mean() > 0.999


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
def test_the_shipped_scan_and_step_are_those_of_the_cpu():
    fit = VelocityFit(Model.load("observed").mixture)
    made = moving_stars(300, seed=12)
    seen = made["at_rest"], made["error"], None
    expected = velocity_evidence(*seen, fit.templates)
    found = velocity_evidence(*seen, fit.templates, backend="cuda")
    largest = np.abs(expected).max(1, keepdims=True)
    assert (np.abs(found - expected) / (0.02 + 2e-5 * largest)).max() < 1
    step, sigma = velocity_step(*seen, fit.space, fit.slopes)
    found_step, found_sigma = velocity_step(*seen, fit.space, fit.slopes, backend="cuda")
    np.testing.assert_allclose(found_sigma, sigma, rtol=1e-4)
    assert (np.abs(found_step - step) < 2e-3 * sigma).all()


def test_without_a_device_the_kernels_say_so():
    if cuda_devices()[0]:
        pytest.skip("there is a device")
    templates = made_velocities.templates()
    reason = r"backend cuda: (no usable CUDA device|numba-cuda is not)"
    with pytest.raises(BackendError, match=reason):
        velocity_evidence(*stars_of(templates, 2), None, templates, backend="cuda")
    mix = mixture(p=31, m=4, n=4, q=1)
    with pytest.raises(BackendError, match=reason):
        velocity_step(*stars(mix, 2), None, *space_of(mix, 1), backend="cuda")
    fit = VelocityFit(mix, 30.0)
    with pytest.raises(BackendError, match=reason):
        fit.use_device()
    assert fit.backend == "cpu"
    with pytest.raises(BackendError, match="backend 'gpu' is unknown to the kernels"):
        velocity_evidence(*stars_of(templates, 2), None, templates, backend="gpu")
