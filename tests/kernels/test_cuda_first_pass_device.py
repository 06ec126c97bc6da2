"""The first pass of a fit on a real device. Run by `pytest -m gpu` where there is one."""

from types import SimpleNamespace

import numpy as np
import pytest
from made_clouds import mixture
from made_clouds import stars as clouded_stars
from tolerances import assert_close

from moefast.backend import cuda_devices
from moefast.core.grids import PHYSICAL_GRID, SnrGrid
from moefast.core.random import DRAW_STREAM, standard_normals
from moefast.experts.device import DeviceRows
from moefast.experts.normal_equations import NormalEquations
from moefast.kernels import cloud_posterior, unpack_symmetric

SUMS = ("sum_x", "sum_y", "sum_yy", "sum_xy", "sum_v")
SEED = 2**40 + 7


@pytest.fixture
def device():
    """Skip without a device; with one, everything must work."""
    names, reason = cuda_devices()
    if not names:
        pytest.skip(reason)
    pytest.importorskip("numba_cuda")
    return names[0]


def stars(n, p, seed=0):
    rng = np.random.default_rng(seed + n)
    flux = (1 + 0.3 * rng.standard_normal((n, p))).astype(np.float32)
    error = rng.uniform(0.1, 0.9, (n, p)).astype(np.float32)
    error[:, 1] = 0
    t_eff, m_h = rng.uniform(3000, 7000, n), rng.uniform(-3, 2, n)
    return flux, error, 3 + rng.standard_normal(n), t_eff, m_h, rng.integers(0, 3, n), np.arange(n)


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("p", [1, 255, 257, 4096])
def test_noise_is_that_of_the_cpu(p):
    from numba import cuda

    from moefast.kernels.cuda import draws

    rows = np.concatenate([np.arange(300), 2**33 + np.arange(300)])
    flux, error = np.zeros((600, p), np.float32), np.ones((600, p), np.float32)
    out, bad = (cuda.to_device(a) for a in (np.full((600, p), np.nan, np.float32), np.zeros(1, np.int32)))
    arrays = [cuda.to_device(a) for a in (flux, error, rows, np.zeros(p, np.float32))]
    draws.prepare_rows[600, draws.THREADS](
        *arrays, np.uint64(SEED), np.uint32(DRAW_STREAM), True, False, np.float32(-np.inf), np.float32(0), out, out,
        False, bad,
    )  # fmt: skip
    expected = standard_normals(SEED, rows, p)
    found = out.copy_to_host()
    print(f"largest difference of {found.size} normal numbers: {np.abs(found - expected).max():.1e}")
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert bad.copy_to_host()[0] == 0


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("n", [1, 1009, 20_011])
@pytest.mark.parametrize("grid", [PHYSICAL_GRID, SnrGrid((1.9, 2.0, 2.1))], ids=["labels", "snr"])
def test_totals_of_both_fits_are_those_of_the_cpu(grid, n):
    p, reference = 300, np.full(300, 0.9)
    data = stars(n, p)
    flux, error, y, t_eff, m_h, folds, rows = data
    device = DeviceRows(
        NormalEquations(reference, grid.n_bins, 3), NormalEquations(reference), grid, drawn=False,
        published_drawn=True, clipped=False, noise_inside=False, seed=SEED,
    )  # fmt: skip
    for start in range(0, n, 3001):
        device.add(*(a[start : start + 3001] for a in data))
    if isinstance(grid, SnrGrid):
        signal, noise = (np.where(error > 0, a.astype(np.float64), 0) ** 2 for a in (flux, error))
        bins = grid.assign(np.sqrt(signal.sum(1) / noise.sum(1) + 1))
    else:
        bins = grid.assign(t_eff, m_h)
    noisy = flux + error * standard_normals(SEED, rows, p)
    equations, published = NormalEquations(reference, grid.n_bins, 3), NormalEquations(reference)
    equations.add(flux, y, None, bins.astype(int), folds, error=error)
    published.add(noisy, y, clipped=True)
    for found, expected in (
        (device.equations.finish(), equations.finish()),
        (device.published.finish(), published.finish()),
    ):
        np.testing.assert_array_equal(found.count, expected.count)
        for name in SUMS:
            assert_close(getattr(found, name), getattr(expected, name), made_in=np.float32)
        for a, b in zip(
            found.gram.reshape(-1, found.gram.shape[-1]),
            expected.gram.reshape(-1, found.gram.shape[-1]),
            strict=True,
        ):
            if b.any():
                exact = unpack_symmetric(b, p)
                scale = np.sqrt(np.diag(exact))
                # Both round: 10⁻⁶ each.
                assert (np.abs(unpack_symmetric(a, p) - exact) <= 2e-6 * np.outer(scale, scale)).all()
    again = device.equations.finish()
    np.testing.assert_array_equal(again.gram, device.equations.finish().gram)


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
def test_the_first_pass_of_a_fit_is_that_of_the_cpu(train_file):
    from moefast.core.grids import uniform
    from moefast.fitting import Options
    from moefast.fitting.first_pass import gather
    from moefast.fitting.training_set import TrainingSet
    from moefast.spectra.spectrum_set import open_spectra

    options = Options(grid=uniform(2, 1), n_folds=2, seed=5)
    found, expected = (
        gather(TrainingSet(open_spectra(train_file), options, lambda *_: None), None, backend)
        for backend in ("cuda", "cpu")
    )
    for a, b in zip(found[:2], expected[:2], strict=True):
        for name in (*SUMS, "gram"):
            assert_close(getattr(a, name), getattr(b, name), made_in=np.float32)


def calibration_draws(backend):
    """What a made-up posterior says of two draws of some stars with gaps, as the calibration of a fit asks for it."""
    from moefast.fitting import Options
    from moefast.fitting.posterior import _draws_of

    mix = mixture(p=300)
    flux, error = clouded_stars(mix, 40)
    data = SimpleNamespace(
        options=Options(families=("posterior",)), bins=np.zeros(40, int), spectra=SimpleNamespace(gaps=None)
    )
    usable = np.arange(40) % 7 != 3
    with np.errstate(invalid="ignore"):
        flux, error = np.nan_to_num(flux), np.where(np.isfinite(error) & (error > 0), error, 0)
    parts = _draws_of(data, (slice(0, 40), flux, error, usable), mix, 2, 1, backend)
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def test_the_calibration_asks_the_backend_that_it_is_given(monkeypatch):
    expected, asked = calibration_draws("cpu"), []

    class Scorer:
        def __init__(self, *arrays):
            self.arrays = arrays

        def __call__(self, flux, error, mask):
            asked.append(len(flux))
            return cloud_posterior(flux, error, mask, *self.arrays)

    monkeypatch.setattr(
        "moefast.posterior.mixture.on_cuda", lambda name, backend: {"CudaPosteriorScorer": Scorer}[name]
    )
    for found, values in zip(calibration_draws("cuda"), expected, strict=True):
        np.testing.assert_array_equal(found, values)
    assert asked == [34, 34]


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
def test_the_calibration_on_the_device_is_that_of_the_cpu():
    names = (
        "rows",
        "kind",
        "features",
        "label",
        "sd",
        "chi2",
        "distance",
        "strength",
        "level",
        "foreign",
        "own",
    )
    tolerances = {"features": (1e-3, 1e-4), "label": (1e-4, 1e-4), "own": (1e-3, 1e-4)}
    for name, found, expected in zip(names, calibration_draws("cuda"), calibration_draws("cpu"), strict=True):
        absolute, relative = tolerances.get(name, (1e-5, 1e-3))
        np.testing.assert_allclose(found, expected, atol=absolute, rtol=relative, err_msg=name)
