"""Normal equations as CUDA kernels, simulated, against the float64 reference at block edges."""

import numpy as np
import pytest
from tolerances import assert_close

from moefast.core.errors import BackendError
from moefast.experts.normal_equations import NormalEquations
from moefast.kernels import normal_equations
from moefast.kernels.cuda import NormalEquationsAccumulator, accumulator, binning, gram, products
from moefast.kernels.cuda.device import DeviceMemoryError, PinnedMemoryError
from moefast.kernels.reference import normal_equations_reference


@pytest.fixture(autouse=True)
def few_threads(monkeypatch):
    """A simulated thread takes a millisecond to start: small blocks, but for `add_gram`, whose block is its tile."""
    monkeypatch.setattr(gram, "SUM_THREADS", 8)
    monkeypatch.setattr(gram, "COLUMNS", 4)
    monkeypatch.setattr(gram, "LANES", 3)
    monkeypatch.setattr(products, "ENOUGH_BLOCKS", 1)
    monkeypatch.setattr(binning, "THREADS", 8)
    monkeypatch.setattr(binning, "SCAN_THREADS", 8)


def rows(n, p, n_groups, seed=0):
    rng = np.random.default_rng(seed + n)
    x = (0.3 * rng.standard_normal((n, p))).astype(np.float32)
    return x, 3 + rng.standard_normal(n), rng.integers(0, n_groups, n)


def assert_totals(found, x, y, group, n_groups):
    for a, b in zip(found[:6], normal_equations_reference(x, y, group, n_groups), strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b, made_in=np.float32)
    for a, b in zip(found[:5], normal_equations_reference(x, y, group, n_groups), strict=False):
        assert_close(a, b, made_in=np.float64)  # all but Σxxᵀ are summed in float64


@pytest.mark.parametrize(("n", "p"), [(0, 3), (1, 1), (7, 128), (8, 31), (31, 33), (33, 131)])
def test_totals_match_the_reference(n, p):
    x, y, group = rows(n, p, 3)
    group[group == 1] = 2  # an empty group in the middle
    found = normal_equations(x, y, group, 3, backend="cuda")
    assert_totals(found, x, y, group, 3)
    np.testing.assert_array_equal(found[0], np.bincount(group, minlength=3))


def test_three_tiles_a_side():
    x, y, group = rows(3, 257, 1)
    assert gram.tile_pairs(257) == 6
    assert_totals(normal_equations(x, y, group, 1, backend="cuda"), x, y, group, 1)


def test_partial_sums_end_anywhere(monkeypatch):
    monkeypatch.setattr(gram, "PARTIAL_ROWS", 12)  # not a multiple of PANEL
    x, y, group = rows(53, 9, 2)
    assert_totals(normal_equations(x, y, group, 2, backend="cuda"), x, y, group, 2)


@pytest.mark.parametrize(("n", "n_groups"), [(1, 1), (53, 2), (24, 1)])
def test_rows_of_few_pixels_are_shared_out(n, n_groups, monkeypatch):
    """Several blocks of threads share the rows of a tile; some get none."""
    monkeypatch.setattr(products, "ENOUGH_BLOCKS", 5 * n_groups)
    monkeypatch.setattr(gram, "PARTIAL_ROWS", 12)
    x, y, group = rows(n, 9, n_groups)
    assert products.NumbaProducts(53, 9, n_groups).shares == 5
    assert_totals(normal_equations(x, y, group, n_groups, backend="cuda"), x, y, group, n_groups)


def test_any_layout_of_rows_gives_the_same_totals():
    x, y, group = rows(19, 7, 2)
    expected = normal_equations(x, y, group, 2, backend="cuda")
    wide = np.zeros((38, 21), np.float32)
    wide[::2, ::3] = x
    for same in (np.asfortranarray(x), wide[::2, ::3], x.astype(np.float64)):
        found = normal_equations(same, y, group.astype(np.int16), 2, backend="cuda")
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_totals_are_added_to_what_is_there():
    x, y, group = rows(30, 5, 2)
    total = normal_equations(x[:11], y[:11], group[:11], 2)
    again = normal_equations(x[11:], y[11:], group[11:], 2, out=total, backend="cuda")
    assert all(a is b for a, b in zip(again, total, strict=True))
    for a, b in zip(total, normal_equations_reference(x, y, group, 2), strict=True):
        assert_close(a, b, made_in=np.float32)


@pytest.mark.parametrize("block_rows", [10, 64])
def test_streamed_blocks_give_what_the_fit_holds(block_rows):
    """The totals, folded to bins and folds, are those that `NormalEquations` gathers on the CPU."""
    n, p = 23, 6
    x, y, _ = rows(n, p, 1)
    rng = np.random.default_rng(1)
    bins, folds = rng.integers(0, 2, n), rng.integers(0, 2, n)
    expected = NormalEquations(np.zeros(p), 2, 2)
    expected.add(x, y, None, bins, folds)
    expected.finish()
    totals = NormalEquationsAccumulator(p, 4, block_rows=block_rows)
    for here in (slice(0, 9), slice(9, 9), slice(9, n)):
        totals.add_block(x[here], y[here], (bins * 2 + folds)[here])
    found = totals.fetch()
    for name in found._fields:
        total = getattr(expected, name)
        assert_close(getattr(found, name).reshape(total.shape), total, made_in=np.float32)
    assert totals.fetch().count.sum() == n


def test_blocks_are_checked_and_nothing_is_added():
    x, y, group = rows(8, 4, 2)
    totals = NormalEquationsAccumulator(4, 2)
    with pytest.raises(ValueError, match=r"x \(n, 4\).*expected; found"):
        totals.add_block(x[:, :3], y, group)
    with pytest.raises(ValueError, match="expected; found"):
        totals.add_block(x, y[:-1], group)
    with pytest.raises(ValueError, match="bins must lie in 0 … 1; found"):
        totals.add_block(x, y, group + 1)
    with pytest.raises(ValueError, match="at least 1"):
        NormalEquationsAccumulator(0, 2)
    with pytest.raises(ValueError, match=r"x \(n, p\) expected"):
        normal_equations(x[0], y, group, 2, backend="cuda")
    assert totals.fetch().count.sum() == 0


class _Full(Exception):
    code = 2  # CUDA_ERROR_OUT_OF_MEMORY


def test_out_of_memory_halves_the_block(monkeypatch):
    monkeypatch.setattr(accumulator, "FLOOR_ROWS", 4)
    real, largest = accumulator._Slot, 7

    def slot(rows, *rest):
        if rows > largest:
            raise _Full
        return real(rows, *rest)

    monkeypatch.setattr(accumulator, "_Slot", slot)
    totals = NormalEquationsAccumulator(3, 2, block_rows=40)
    assert totals.block_rows == 5
    x, y, group = rows(12, 3, 2)
    totals.add_block(x, y, group)
    assert_totals(totals.fetch(), x, y, group, 2)
    largest = 3
    with pytest.raises(
        DeviceMemoryError, match=r"two blocks of 4 rows are needed, .* are free; .*backend cpu"
    ):
        NormalEquationsAccumulator(3, 2, block_rows=40)

    def broken(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(accumulator, "_Slot", broken)
    with pytest.raises(RuntimeError, match="something else"):
        NormalEquationsAccumulator(3, 2)


def test_short_pinned_memory_is_not_called_device_memory(monkeypatch):
    monkeypatch.setattr(accumulator, "FLOOR_ROWS", 4)
    real, largest = accumulator.cuda.pinned_array, 7

    def pinned(shape, dtype):
        if shape[0] > largest:
            raise _Full
        return real(shape, dtype)

    monkeypatch.setattr(accumulator.cuda, "pinned_array", pinned)
    assert NormalEquationsAccumulator(3, 2, block_rows=40).block_rows == 5
    largest = 3
    with pytest.raises(
        PinnedMemoryError, match=r"pinned host memory: .* two blocks of 4 rows .*ulimit -l"
    ) as caught:
        NormalEquationsAccumulator(3, 2, block_rows=40)
    assert "device memory" not in str(caught.value)


class _NumpyAsTorch:
    @staticmethod
    def bmm(a, b, out):
        np.matmul(a, b, out=out)


@pytest.fixture
def numpy_for_cublas(monkeypatch):
    def multiply(self, start, parts, height, stream):
        rows = self.sorted._ary[start : start + parts * height].reshape(parts, height, -1)
        assert height <= gram.PARTIAL_ROWS
        products.multiply_upper(_NumpyAsTorch, rows, self.squares._ary[:parts])

    monkeypatch.setattr(products, "UPPER_SIDE", 8)
    monkeypatch.setattr(products.CublasProducts, "_matrices", lambda self: None)
    monkeypatch.setattr(products.CublasProducts, "_multiply", multiply)
    monkeypatch.setattr(products.CublasProducts, "missing", staticmethod(lambda: ""))


@pytest.mark.usefixtures("numpy_for_cublas")
@pytest.mark.parametrize(("n", "p"), [(0, 3), (1, 1), (31, 19), (40, 16)])
def test_a_library_gives_the_same_totals(n, p, monkeypatch):
    """Gathering, padding, batches of parts, block rows and packing, with NumPy in the place of cuBLAS."""
    monkeypatch.setattr(gram, "PARTIAL_ROWS", 3)
    monkeypatch.setattr(products, "SQUARES_BYTES", 2 * 4 * p * p)
    x, y, group = rows(n, p, 3)
    totals = NormalEquationsAccumulator(p, 3, method="cublas", block_rows=23)
    assert totals.choice.method == "cublas"
    totals.add_block(x, y, group)
    assert_totals(totals.fetch(), x, y, group, 3)


@pytest.mark.usefixtures("numpy_for_cublas")
def test_auto_takes_the_faster_and_says_so(monkeypatch):
    seconds = {"numba": 2e-3, "cublas": 1e-3}
    monkeypatch.setattr(products, "_MEASURED", {})
    monkeypatch.setattr(products, "_trial", lambda method, p: seconds[method.name])
    choice = products.choose("auto", 4096)
    assert choice.method == "cublas"
    assert "numba 2.00 ms, cublas 1.00 ms for 4096 rows of 4096 pixels" in choice.reason
    seconds["numba"] = 0.5e-3
    assert products.choose("auto", 4096) is choice  # measured once
    assert products.choose("auto", 64).method == "numba"


@pytest.mark.usefixtures("numpy_for_cublas")
def test_the_trial_multiplies(monkeypatch):
    monkeypatch.setattr(products, "TRIAL_ROWS", 9)
    for method in (products.NumbaProducts, products.CublasProducts):
        assert products._trial(method, 3) > 0


def test_methods_that_cannot_be_used_are_refused():
    assert products.choose("auto", 8).method == "numba"
    assert "torch" in products.choose("auto", 8).reason
    with pytest.raises(BackendError, match="'cublas' cannot be used: torch"):
        products.choose("cublas", 8)
    with pytest.raises(BackendError, match="'magic' is unknown; choose one of auto, numba"):
        products.choose("magic", 8)
