"""The CUDA kernels on a real device, against the float64 reference. Run by `pytest -m gpu` where there is one."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tolerances import assert_close

from moefast.backend import cuda_devices
from moefast.core.errors import BackendError
from moefast.kernels import assign_bins, assign_snr_bins, normal_equations, sort_by_bin, unpack_symmetric
from moefast.kernels import reference_binning as reference
from moefast.kernels.reference import normal_equations_reference

T_EDGES = (3750.0, 4500.0, 5250.0, 6000.0)
M_EDGES = (-2.0, -1.0, 0.0, 0.5)
SNR_EDGES = (2.0, 4.0, 7.0)
METHODS = ["auto", "numba", "cublas"]
GOAL = 1e-6


@pytest.fixture
def device():
    """Skip without a device; with one, everything must work."""
    names, reason = cuda_devices()
    if not names:
        pytest.skip(reason)
    pytest.importorskip("numba_cuda")
    return names[0]


def usable(method):
    from moefast.kernels.cuda.products import METHODS as classes

    if method in classes and (lack := classes[method].missing()):
        pytest.skip(f"{method}: {lack}")
    return method


def rows(n, p, n_groups, seed=0):
    rng = np.random.default_rng(seed + n)
    strength = rng.standard_normal((n, 3), np.float32) * np.float32([0.1, 0.03, 0.01])
    x = strength @ rng.standard_normal((3, p), np.float32)
    x += np.float32(0.1) * rng.standard_normal((n, p), np.float32)
    return x, 3 + rng.standard_normal(n), rng.integers(0, n_groups, n)


def worst(found, expected, p):
    """Largest error of a number G_ij in units of √(G_ii G_jj), over the groups."""
    largest = 0.0
    for a, b in zip(found, expected, strict=True):
        if b.any():
            exact = unpack_symmetric(b, p)
            scale = np.sqrt(np.diag(exact))
            largest = max(
                largest, float((np.abs(unpack_symmetric(a, p) - exact) / np.outer(scale, scale)).max())
            )
    return largest


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 127, 1009, 1_000_003])
def test_bins_and_sort(n):
    rng = np.random.default_rng(n)
    teff, mh, snr = rng.uniform(3000, 7000, n), rng.uniform(-3, 1, n), rng.uniform(0, 10, n)
    bins = assign_bins(teff, mh, T_EDGES, M_EDGES, backend="cuda")
    np.testing.assert_array_equal(bins, reference.assign_bins(teff, mh, T_EDGES, M_EDGES))
    found = assign_snr_bins(snr, SNR_EDGES, backend="cuda")
    np.testing.assert_array_equal(found, reference.assign_snr_bins(snr, SNR_EDGES))
    for n_bins in (9, 1000):
        wide = rng.integers(0, n_bins, n)
        for a, b in zip(
            sort_by_bin(wide, n_bins, backend="cuda"), reference.sort_by_bin(wide, n_bins), strict=True
        ):
            np.testing.assert_array_equal(a, b)


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n", "p"), [(0, 3), (1, 1), (31, 127), (33, 128), (1009, 129), (20_011, 300)])
def test_normal_equations(method, n, p):
    x, y, group = rows(n, p, 5)
    group[group == 2] = 3
    found = normal_equations(x, y, group, 5, backend="cuda", method=usable(method))
    expected = normal_equations_reference(x, y, group, 5)
    for a, b in zip(found[:5], expected[:5], strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b, made_in=np.float64)
    assert worst(found[5], expected[5], p) < GOAL
    again = normal_equations(x, y, group, 5, backend="cuda", method=method)
    for a, b in zip(again, found, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("method", METHODS[1:])
def test_the_goal_of_accuracy_at_a_million(method):
    from moefast.kernels.cuda import NormalEquationsAccumulator

    p, block = 64, 100_000
    accumulator = NormalEquationsAccumulator(p, 1, method=usable(method))
    exact = np.zeros((p, p))
    for part in range(10):
        x, y, group = rows(block, p, 1, seed=part)
        accumulator.add_block(x, y, group)
        exact += x.astype(np.float64).T @ x.astype(np.float64)
    found = accumulator.fetch()
    assert found.count.sum() == 1_000_000
    assert worst(found.gram, exact[None][:, *np.triu_indices(p)], p) < GOAL


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
def test_layouts_and_variances():
    from moefast.kernels.cuda import NormalEquationsAccumulator

    x, y, group = rows(257, 65, 4)
    wide = np.zeros((514, 195), np.float32)
    wide[::2, ::3] = x
    expected = normal_equations(x, y, group, 4, backend="cuda", method="numba")
    for same in (np.asfortranarray(x), wide[::2, ::3], x.astype(np.float64)):
        for a, b in zip(
            normal_equations(same, y, group, 4, backend="cuda", method="numba"), expected, strict=True
        ):
            np.testing.assert_array_equal(a, b)
    accumulator = NormalEquationsAccumulator(65, 4, method="numba", with_variance=True, block_rows=50)
    accumulator.add_block(x, y, group, np.square(x))
    sums = np.array([np.square(x, dtype=np.float64)[group == k].sum(0) for k in range(4)])
    assert_close(accumulator.fetch().sum_v, sums, made_in=np.float32)  # x² was rounded to float32


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
def test_memory_that_no_device_has():
    from moefast.kernels.cuda import NormalEquationsAccumulator

    with pytest.raises(BackendError, match=r"device memory: .* GB for the totals"):
        NormalEquationsAccumulator(4096, 60_000, method="numba")


def test_without_a_device_the_kernels_say_so():
    """On the machines of most people: one clear error, never a silent run on the CPU."""
    if cuda_devices()[0]:
        pytest.skip("there is a device")
    x, y, group = rows(8, 4, 2)
    for call in (
        lambda: normal_equations(x, y, group, 2, backend="cuda"),
        lambda: sort_by_bin(group, 2, backend="cuda"),
        lambda: assign_snr_bins(y, SNR_EDGES, backend="cuda"),
        lambda: assign_bins(y, y, T_EDGES, M_EDGES, backend="cuda"),
    ):
        with pytest.raises(BackendError, match=r"backend cuda: (no usable CUDA device|numba-cuda is not)"):
            call()
    for call in (
        lambda: normal_equations(x, y, group, 2, backend="gpu"),
        lambda: sort_by_bin(group, 2, backend="gpu"),
    ):
        with pytest.raises(BackendError, match="'gpu' is unknown to the kernels; choose one of cpu, cuda"):
            call()


def test_the_benchmark_without_a_device(tmp_path):
    if cuda_devices()[0]:
        pytest.skip("there is a device")
    script = Path(__file__).parents[2] / "benchmarks" / "gpu_normal_equations.py"
    command = [sys.executable, str(script), "-o", str(tmp_path / "x.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 7
    assert "not measured: backend cuda: no" in done.stderr
    assert not (tmp_path / "x.json").exists()


def test_without_the_package_the_remedy_is_named(monkeypatch):
    from moefast.kernels.cuda import device

    monkeypatch.setattr(device.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"numba-cuda is not installed; pip install 'moefast\[cuda\]'"):
        sort_by_bin([0], 1, backend="cuda")
