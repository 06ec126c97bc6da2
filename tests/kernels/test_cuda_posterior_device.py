"""The posterior at a star's own noise on a real device. Run by `pytest -m gpu` where there is one."""

import numpy as np
import pytest
from made_clouds import assert_expert_labels, mixture, stars
from made_correction import with_correction

from moefast.backend import cuda_devices
from moefast.core.errors import BackendError
from moefast.kernels import cloud_posterior
from moefast.model import Model
from moefast.predicting.engines import CudaEngine, open_engine
from moefast.predicting.files import predict
from moefast.simulate import simulate_file
from moefast.spectra.quality import assess, good_pixels


@pytest.fixture
def device():
    """Skip without a device; with one, everything must work."""
    names, reason = cuda_devices()
    if not names:
        pytest.skip(reason)
    pytest.importorskip("numba_cuda")
    return names[0]


def assert_as_described(made, flux, error, mask=None):
    """As close as tests/posterior/test_kernels.py asks of the CPU."""
    found = made.outputs(flux, error, mask, backend="cuda")
    seen = error if mask is None else np.where(mask, np.nan, error)
    expected = made.describe(flux, seen)
    tolerances = {
        "log_g": (1e-5, 0), "label": (1e-5, 1e-5), "label_sd": (0, 1e-4), "weights": (1e-5, 0),
        "log_g_err": (0, 1e-4), "chi2": (1e-6, 1e-3), "distance": (1e-5, 1e-3), "strength": (0, 1e-6),
        "scale": (0, 1e-6), "log_level": (0, 1e-6), "point": (1e-4, 1e-4),
    }  # fmt: skip
    for name, (absolute, relative) in tolerances.items():
        np.testing.assert_allclose(found[name], expected[name], atol=absolute, rtol=relative, err_msg=name)
    assert_expert_labels(made, flux, seen, found["expert_label"], expected["expert_label"])
    spread = expected["label_sd"][:, :1] * expected["label_sd"]
    assert (np.abs(found["label_cov"] - expected["label_cov"]) <= 1e-4 * spread).all()
    return found


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 257])
@pytest.mark.parametrize(
    "sizes",
    [
        {"p": 31, "m": 1, "n": 2, "q": 0, "t": 0, "experts": 1},
        {"p": 300, "m": 12, "n": 8, "q": 3, "t": 2, "n_sky": 1},
        {"p": 1031, "m": 71, "n": 33, "q": 5, "t": 5},
        {"p": 700, "m": 130, "n": 65, "q": 12, "t": 8, "n_sky": 8},
        {"p": 300, "m": 12, "n": 8, "q": 1, "calibrated": (0.9, 0.3)},
        {"p": 700, "m": 70, "n": 58, "q": 12, "t": 9, "n_sky": 8, "calibrated": (0.5, 0.1)},
        {"p": 700, "m": 30, "n": 90, "q": 4, "t": 2, "calibrated": (0.5, 0.1)},
    ],
)
def test_matches_the_description(n, sizes):
    made = mixture(**sizes)
    flux, error = stars(made, n)
    mask = np.random.default_rng(n).random(flux.shape) < 0.05
    found = (
        made.outputs(flux, error, mask, backend="cuda")
        if n == 0
        else assert_as_described(made, flux, error, mask)
    )
    assert found["label"].shape == (n, 4)


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("snr", [1, 30, 300])
def test_faint_and_bright_stars(snr):
    made = mixture(p=576, m=70, n=20, q=3)
    assert_as_described(made, *stars(made, 40, snr=snr))


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
def test_bad_pixels_keep_to_themselves_and_a_row_has_the_same_bits_anywhere():
    made = mixture(p=576, m=70, n=20, q=3)
    flux, error = stars(made, 300)
    clean = made.outputs(flux, error, backend="cuda")
    flux[0], error[1], flux[2, 3], error[3, 5], error[4, 7] = np.nan, np.inf, 3e38, -1, 0
    mask = np.zeros(flux.shape, bool)
    mask[5], mask[6, 1:] = True, True
    found = cloud_posterior(flux, error, mask, *made.kernel_arrays, backend="cuda")
    quality = assess(flux, error, good_pixels(flux, error, mask), mask)
    for name in ("n_good", "flag", "snr_median"):
        np.testing.assert_array_equal(getattr(found, name), getattr(quality, name))
    found = made.outputs(flux, error, mask, backend="cuda")
    alone = made.outputs(flux[200:201], error[200:201], backend="cuda")
    for name, array in clean.items():
        np.testing.assert_array_equal(found[name][7:], array[7:], err_msg=name)
        np.testing.assert_array_equal(alone[name][0], array[200], err_msg=name)


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("q", [0, 12])
@pytest.mark.parametrize("widths", [(1, 31, 33), (128, 128, 128), (64, 300, 1400)])
def test_correction_of_log_g(q, widths):
    """Stars for some blocks and a part of one; one star without an answer."""
    plain = mixture(p=700, m=70, n=58, q=q)
    made = with_correction(plain, widths)
    flux, error = stars(made, 201)
    clean, usual = assert_as_described(made, flux, error), plain.outputs(flux, error, backend="cuda")
    for name in set(clean) - {"log_g", "log_g_err", "error_features", "label"}:
        np.testing.assert_array_equal(clean[name], usual[name], err_msg=name)
    assert 0.1 < np.ptp((clean["label"] - usual["label"])[:, 0] / usual["label_sd"][:, 0]) <= 2
    flux[1] *= np.float32(-1e25)
    found = made.outputs(flux, error, backend="cuda")
    assert np.isnan(found["label"][1]).all()
    alone = made.outputs(flux[200:], error[200:], backend="cuda")
    for name, array in clean.items():
        np.testing.assert_array_equal(found[name][2:], array[2:], err_msg=name)
        np.testing.assert_array_equal(found[name][0], array[0], err_msg=name)
        np.testing.assert_array_equal(alone[name][0], array[200], err_msg=name)


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", ["observed", "z0"])
def test_shipped_models_from_file_to_table(name, device, tmp_path):
    """End to end: the same table from CPU and GPU, each star with its own noise, some with gaps."""
    path, n = tmp_path / "stars.h5", 1500
    simulate_file(path, n, seed=5)
    model = Model.load(name)
    engine, where = open_engine(model.mixture, "auto")
    assert isinstance(engine, CudaEngine)
    assert (where.name, where.device) == ("cuda", device)
    tables = {
        backend: predict(path, model, backend=backend, telluric="mask").columns for backend in ("cpu", "cuda")
    }
    for column, expected in tables["cpu"].items():
        found = tables["cuda"][column]
        if column in ("flag", "expert", "snr_median", "row"):
            assert (found == expected).mean() > 0.999, column
        elif expected.dtype.kind == "f":
            near = np.isclose(
                found, expected, rtol=1e-4, atol=1e-4 * np.nanstd(expected) + 1e-6, equal_nan=True
            )
            assert near.mean() > 0.999, column
    np.testing.assert_allclose(tables["cuda"]["log_g"], tables["cpu"]["log_g"], atol=2e-4)


def test_without_a_device_the_kernels_say_so():
    if cuda_devices()[0]:
        pytest.skip("there is a device")
    made = mixture(p=31, m=4, n=4, q=1)
    flux, error = stars(made, 2)
    reason = r"backend cuda: (no usable CUDA device|numba-cuda is not)"
    with pytest.raises(BackendError, match=reason):
        made.outputs(flux, error, backend="cuda")
    with pytest.raises(BackendError, match=reason):
        CudaEngine(made)
    with pytest.raises(BackendError, match="backend 'gpu' is unknown to the kernels"):
        made.outputs(flux, error, backend="gpu")
