"""Normal equations gathered on a device: the same totals, the same fit, wherever they come from."""

import numpy as np
import pytest
from tolerances import assert_close

from moefast.backend import Backend, resolve_kernels
from moefast.core.errors import BackendError
from moefast.experts.device import DeviceEquations
from moefast.experts.normal_equations import NormalEquations
from moefast.kernels.reference import normal_equations_reference

P = 20
TOTALS = ("count", "sum_x", "sum_y", "sum_yy", "sum_xy", "gram", "sum_v")


class Accumulator:
    """What a GPU does, in NumPy: the interface of `moefast.kernels.cuda.NormalEquationsAccumulator`."""

    made = 0

    def __init__(self, n_pixels, n_groups, *, with_variance=False):
        type(self).made += 1
        self.with_variance, self.n_groups = with_variance, n_groups
        self.blocks = []

    def add_block(self, x, y, group, variance=None):
        assert (variance is not None) == self.with_variance
        assert x.dtype == np.float32
        self.blocks.append((x, y, group, np.zeros_like(x) if variance is None else variance))

    def fetch(self):
        from moefast.kernels.cuda.accumulator import Totals

        x, y, group, variance = (np.concatenate(parts) for parts in zip(*self.blocks, strict=True))
        sums = normal_equations_reference(x, y, group, self.n_groups)
        noise = np.stack([variance[group == g].sum(0, dtype=np.float64) for g in range(self.n_groups)])
        return Totals(*sums, noise)


@pytest.fixture
def device(monkeypatch):
    cuda = pytest.importorskip("moefast.kernels.cuda", exc_type=ImportError)
    pytest.importorskip("numba_cuda")
    monkeypatch.setattr(cuda, "NormalEquationsAccumulator", Accumulator, raising=False)
    Accumulator.made = 0
    return Accumulator


def rows(n=300, seed=0):
    rng = np.random.default_rng(seed)
    x = (1 + 0.1 * rng.standard_normal((n, P))).astype(np.float32)
    error = rng.uniform(0.1, 0.2, (n, P)).astype(np.float32)
    return x, rng.uniform(1, 5, n), error, rng.integers(0, 3, n), rng.integers(0, 2, n)


def gather(equations, parts=((0, 100), (100, 300)), **how):
    x, y, error, bins, folds = rows()
    for a, b in parts:
        here = slice(a, b)
        equations.add(x[here], y[here], None, bins[here], folds[here], error=error[here], **how)
    return equations


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("clipped", [False, True])
def test_the_totals_are_those_of_the_cpu(clipped):
    reference = np.full(P, 1.05)
    found = gather(DeviceEquations(reference, 3, 2), clipped=clipped)
    assert found.n_rows == 300
    found, expected = found.finish(), gather(NormalEquations(reference, 3, 2), clipped=clipped).finish()
    for name in TOTALS:
        assert_close(getattr(found, name), getattr(expected, name), made_in=np.float32)


@pytest.mark.usefixtures("device")
def test_it_goes_on_from_what_was_gathered_before():
    reference = np.ones(P)
    half = gather(DeviceEquations(reference, 3, 2), parts=((0, 120),))
    state = half.state()
    again = DeviceEquations.of(NormalEquations.from_state(state.__getitem__))
    assert again.n_rows == 120
    found = gather(again, parts=((120, 300),)).finish()
    expected = gather(NormalEquations(reference, 3, 2)).finish()
    for name in TOTALS:
        assert_close(getattr(found, name), getattr(expected, name), made_in=np.float32)


def test_nothing_is_asked_of_the_device_before_rows_come(device):
    equations = DeviceEquations(np.ones(P), 3, 2)
    assert equations.finish().n_rows == 0
    x, y, *_ = rows(4)
    x[2, 3] = np.nan
    with pytest.raises(ValueError, match="NaN, infinite or absurdly large flux"):
        equations.add(x, y)
    assert device.made == 0


@pytest.mark.usefixtures("device")
def test_a_fit_on_the_device_is_the_fit(train_file):
    from moefast.core.grids import uniform
    from moefast.fitting import Options, fit_mixture
    from moefast.spectra.spectrum_set import open_spectra

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
