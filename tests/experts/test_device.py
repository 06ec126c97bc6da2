"""Normal equations gathered on a device: the same totals, the same fit, wherever they come from."""

import numpy as np
import pytest
from tolerances import assert_close

from moefast.backend import Backend, resolve_kernels
from moefast.core.errors import BackendError
from moefast.core.grids import Grid, uniform
from moefast.core.random import add_noise
from moefast.experts.device import DeviceRows
from moefast.experts.normal_equations import NormalEquations
from moefast.fitting import Options, first_pass, fit_mixture
from moefast.fitting.training_set import TrainingSet
from moefast.kernels.reference import normal_equations_reference
from moefast.spectra.spectrum_set import open_spectra

P = 20
TOTALS = ("count", "sum_x", "sum_y", "sum_yy", "sum_xy", "gram", "sum_v")
GRID = Grid((4000.0, 5000.0, 6000.0), (-2.0, 0.0))


class Pass:
    """What a GPU does, in NumPy: the interface of `moefast.kernels.cuda.FirstPass`."""

    made = 0

    def __init__(self, reference, grid, n_folds, seen, other=None, *, seed=0, noise_inside=False):
        type(self).made += 1
        self.reference, self.grid, self.n_folds = np.float32(reference), grid, n_folds
        self.seen, self.other, self.seed = seen, other, seed
        self.blocks = []

    def add(self, flux, error, y, t_eff, m_h, folds, rows):
        # Copies: callers may use their memory again.
        self.blocks.append([np.array(a) for a in (flux, error, y, t_eff, m_h, folds, rows)])

    def fetch(self, other=False):
        from moefast.kernels.cuda.accumulator import Totals

        flux, error, y, t_eff, m_h, folds, rows = (
            np.concatenate(parts) for parts in zip(*self.blocks, strict=True)
        )
        seen = self.other if other else self.seen
        x = add_noise(flux, error, self.seed, rows) if seen.drawn else flux
        x = np.maximum(x, np.float32(seen.floor)) - self.reference
        n_groups = 1 if other else self.grid.n_bins * self.n_folds
        group = (
            np.zeros(len(x), int)
            if other
            else self.grid.assign(t_eff, m_h).astype(int) * self.n_folds + folds
        )
        sums = normal_equations_reference(x, y, group, n_groups)
        noise = np.stack([(error[group == g] ** 2).sum(0, dtype=np.float64) for g in range(n_groups)])
        return Totals(*sums, 0 * noise if other else noise)


@pytest.fixture
def device(monkeypatch):
    cuda = pytest.importorskip("moefast.kernels.cuda", exc_type=ImportError)
    pytest.importorskip("numba_cuda")
    monkeypatch.setattr(cuda, "FirstPass", Pass, raising=False)
    Pass.made = 0
    return Pass


def stars(n=300, seed=0):
    rng = np.random.default_rng(seed)
    flux = (1 + 0.1 * rng.standard_normal((n, P))).astype(np.float32)
    error = rng.uniform(0.1, 0.9, (n, P)).astype(np.float32)
    t_eff, m_h = rng.uniform(3500, 6500, n), rng.uniform(-2, 0, n)
    return flux, error, rng.uniform(1, 5, n), t_eff, m_h, rng.integers(0, 2, n), np.arange(n)


def rows_for(equations, published=None):
    return DeviceRows(
        equations,
        published,
        GRID,
        drawn=False,
        published_drawn=True,
        clipped=False,
        noise_inside=False,
        seed=3,
    )


def add(target, parts):
    for a, b in parts:
        target.add(*(array[a:b] for array in stars()))
    return target


def on_host(reference):
    flux, error, y, t_eff, m_h, folds, rows = stars()
    equations, published = NormalEquations(reference, 2, 2), NormalEquations(reference)
    equations.add(flux, y, None, GRID.assign(t_eff, m_h).astype(int), folds, error=error)
    published.add(add_noise(flux, error, 3, rows), y, clipped=True)
    return equations.finish(), published.finish()


@pytest.mark.usefixtures("device")
def test_the_totals_of_both_fits_are_those_of_the_cpu():
    reference = np.full(P, 1.05)
    device = add(
        rows_for(NormalEquations(reference, 2, 2), NormalEquations(reference)), ((0, 100), (100, 300))
    )
    assert device.equations.n_rows == device.published.n_rows == 300
    for found, expected in zip((device.equations, device.published), on_host(reference), strict=True):
        for name in TOTALS:
            assert_close(getattr(found.finish(), name), getattr(expected, name), made_in=np.float32)


@pytest.mark.usefixtures("device")
def test_it_goes_on_from_what_was_gathered_before():
    reference = np.ones(P)
    half = add(rows_for(NormalEquations(reference, 2, 2)), ((0, 120),))
    assert half.published is None
    state = half.equations.state()
    again = rows_for(NormalEquations.from_state(state.__getitem__))
    assert again.equations.n_rows == 120
    found = add(again, ((120, 300),)).equations.finish()
    for name in TOTALS:
        assert_close(getattr(found, name), getattr(on_host(reference)[0], name), made_in=np.float32)


def test_nothing_is_asked_of_the_device_before_rows_come(device):
    equations = rows_for(NormalEquations(np.ones(P), 2, 2)).equations
    assert equations.finish().n_rows == 0
    assert device.made == 0


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("noise", "clipped"), [("closed-form", False), ("sampled", False), ("sampled", True), ("observed", False)]
)
def test_the_first_pass_on_the_device_is_that_of_the_cpu(train_file, noise, clipped):
    options = Options(grid=uniform(2, 1), n_folds=2, noise=noise, clipped=clipped, seed=5)
    found, expected = (
        first_pass.gather(TrainingSet(open_spectra(train_file), options, lambda *_: None), None, backend)
        for backend in ("cuda", "cpu")
    )
    assert (found.published is None) == (expected.published is None) == clipped
    for pair in zip(found[:2], expected[:2], strict=True):
        for name in TOTALS if pair[0] is not None else ():
            assert_close(getattr(pair[0], name), getattr(pair[1], name), made_in=np.float32)
    np.testing.assert_array_equal(found.times_good, expected.times_good)
    assert found.rows == expected.rows


@pytest.mark.usefixtures("device")
def test_a_fit_on_the_device_is_the_fit(train_file):
    options = Options(grid=uniform(2, 1), n_levels=3, sample_draws=1, references=True)
    found = fit_mixture(open_spectra(train_file), options, backend="cuda")
    expected = fit_mixture(open_spectra(train_file), options)
    for name in ("reference", "noise_shape", "knots"):
        np.testing.assert_allclose(getattr(found.mixture, name), getattr(expected.mixture, name), rtol=1e-5)
    scale = np.abs(expected.mixture.pixel_weights).max()
    np.testing.assert_allclose(found.mixture.pixel_weights, expected.mixture.pixel_weights, atol=1e-3 * scale)
    assert found.references.keys() == expected.references.keys()


def test_without_a_gpu_auto_is_the_cpu_and_cuda_an_error(monkeypatch):
    monkeypatch.setattr("moefast.backend.cuda_devices", lambda: ([], "no NVIDIA driver"))
    assert resolve_kernels("auto").name == "cpu"
    with pytest.raises(BackendError, match="no NVIDIA driver"):
        resolve_kernels("cuda")


def test_a_gpu_that_cannot_be_used_is_told(monkeypatch):
    def refuse():
        raise BackendError("numba-cuda is not installed")

    monkeypatch.setattr("moefast.backend.cuda_devices", lambda: (["NVIDIA T0"], ""))
    monkeypatch.setattr("moefast.kernels.cuda.trial.require_kernels", refuse)
    found = resolve_kernels("auto")
    assert isinstance(found, Backend)
    assert found.name == "cpu"
    assert found.reason == "NVIDIA T0 was found but cannot be used: numba-cuda is not installed"
    with pytest.raises(BackendError, match="not installed"):
        resolve_kernels("cuda")
