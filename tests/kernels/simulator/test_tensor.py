"""Splitting, padding and scaling for tensor cores, simulated, with NumPy in the place of the tensor cores."""

import numpy as np
import pytest
from tolerances import assert_close

from moefast.core.errors import BackendError
from moefast.kernels.cuda import NormalEquationsAccumulator, binning, gram, products, tensor
from moefast.kernels.reference import normal_equations_reference


@pytest.fixture(autouse=True)
def few_threads(monkeypatch):
    """A simulated thread takes a millisecond to start."""
    for module, name, value in (
        (gram, "SUM_THREADS", 8),
        (gram, "COLUMNS", 4),
        (gram, "LANES", 2),
        (binning, "THREADS", 8),
        (binning, "SCAN_THREADS", 8),
        (tensor, "SUM_THREADS", 8),
        (tensor, "ROW_BLOCKS", 2),
        (tensor, "TILE", 8),
        (tensor, "STEP_ROWS", 4),
    ):
        monkeypatch.setattr(module, name, value)


def multiply(self, totals, stream):
    """What the tensor cores are asked for, group by group, from the same arrays."""
    high, low = (self.high._ary.astype(np.float64), self.low._ary.astype(np.float64))
    inverse, padded, p = self.inverse._ary.astype(np.float64), self.padded._ary, self.inverse._ary.size
    for group in range(len(totals)):
        assert padded[group] % tensor.STEP_ROWS == 0
        h, l = (part[padded[group] : padded[group + 1]] for part in (high, low))  # noqa: E741
        assert np.isfinite(h).all()
        assert np.abs(h).max(initial=0) < 2.0**tensor.TOP
        assert not h[:, p:].any()
        square = (h.T @ h + h.T @ l + l.T @ h)[:p, :p] * inverse * inverse[:, None]
        totals._ary[group] += square[np.triu_indices(p)]


@pytest.fixture
def numpy_for_tensor_cores(monkeypatch):
    monkeypatch.setattr(tensor.TensorProducts, "_multiply", multiply)
    monkeypatch.setattr(tensor.TensorProducts, "missing", staticmethod(lambda: ""))


@pytest.mark.usefixtures("numpy_for_tensor_cores")
@pytest.mark.parametrize(("n", "p"), [(0, 3), (1, 1), (31, 8), (33, 11)])
def test_totals_match_the_reference(n, p):
    rng = np.random.default_rng(n)
    # Columns of very different size, one of them zero, and an outlier.
    x = (rng.standard_normal((n, p)) * 10.0 ** rng.integers(-6, 7, p)).astype(np.float32)
    x[:, p // 2] = 0
    x[: n // 30, 0] *= 1e3
    y, group = rng.standard_normal(n), rng.integers(0, 3, n)
    group[group == 1] = 2
    totals = NormalEquationsAccumulator(p, 3, method="tensor", block_rows=20)
    totals.add_block(x, y, group)
    found, expected = totals.fetch(), normal_equations_reference(x, y, group, 3)
    size = np.sqrt(np.square(x, dtype=np.float64).sum(0))
    size[size == 0] = 1
    scale = np.outer(size, size)[np.triu_indices(p)]
    # Two float16 numbers hold 22 bits: below 1e-6 of √(G_ii G_jj), column by column.
    assert (np.abs(found.gram - expected[5]) / scale).max(initial=0) < 1e-6
    for a, b in zip(found[:5], expected[:5], strict=True):
        assert_close(a, b, made_in=np.float64)


def test_extreme_columns_have_normal_scales():
    from numba import cuda

    largest = np.array([0, 1e-45, 1e-30, 1, 1.5, 2, 1e15, 3e38], np.float32)
    arrays = [cuda.to_device(a) for a in (largest, np.empty_like(largest), np.empty_like(largest))]
    tensor.make_scales[1, 8](*arrays)
    rest, scale, inverse = (a.copy_to_host() for a in arrays)
    assert not rest.any()
    np.testing.assert_array_equal(scale * inverse, 1)
    assert (largest * scale < 2.0**tensor.TOP).all()
    assert (largest * scale)[2:7].min() >= 2.0 ** (tensor.TOP - 1)


def test_without_nvmath_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(tensor.util, "find_spec", lambda name: None)
    with pytest.raises(
        BackendError, match=r"'tensor' cannot be used: nvmath is not installed.*moefast\[tensor\]"
    ):
        products.choose("tensor", 8)
