"""Normal equations and sums per group against plain NumPy, at the sizes where blocks end."""

import numpy as np
import pytest
from tolerances import assert_close

from moefast.kernels import (
    GRAM_ROWS,
    add_gram,
    all_within,
    collect_rows,
    normal_equations,
    packed_size,
    unpack_symmetric,
)
from moefast.kernels.cpu import GRAM_TILE, PIXELS
from moefast.kernels.reference import normal_equations_reference

SIZES = [0, 1, 2, 31, 32, 33, 509, 1023, 1024, 1025]


def rows(n, p, n_groups, seed=0):
    rng = np.random.default_rng(seed + n)
    x = (0.3 * rng.standard_normal((n, p))).astype(np.float32)
    y = 3 + rng.standard_normal(n)
    return x, y, rng.integers(0, n_groups, n)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("p", [1, 31, 64, 67])
def test_totals_match_the_reference(n, p):
    x, y, group = rows(n, p, 5)
    group[group == 2] = 3  # an empty group in the middle
    found = normal_equations(x, y, group, 5)
    expected = normal_equations_reference(x, y, group, 5)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b, made_in=np.float32)
    np.testing.assert_array_equal(found[0], np.bincount(group, minlength=5))
    assert all(not a[2].any() for a in found)


def test_the_reference_is_numpys_covariance():
    x, y, _ = rows(97, 13, 1)
    n, sum_x, sum_y, sum_yy, sum_xy, gram = normal_equations_reference(x, y, np.zeros(97, int), 1)
    joint = np.cov(np.column_stack([x.astype(np.float64), y]).T, bias=True)
    second = unpack_symmetric(gram[0], 13) / n[0]
    mean_x, mean_y = sum_x[0] / n[0], sum_y[0] / n[0]
    assert_close(second - np.outer(mean_x, mean_x), joint[:-1, :-1])
    assert_close(sum_xy[0] / n[0] - mean_x * mean_y, joint[:-1, -1])
    assert_close(sum_yy[0] / n[0] - mean_y**2, joint[-1, -1])


def test_totals_are_added_to_what_is_there():
    x, y, group = rows(701, 33, 3)
    total = normal_equations(x[:400], y[:400], group[:400], 3)
    again = normal_equations(x[400:], y[400:], group[400:], 3, out=total)
    assert all(a is b for a, b in zip(again, total, strict=True))
    for a, b in zip(total, normal_equations_reference(x, y, group, 3), strict=True):
        assert_close(a, b, made_in=np.float32)


def test_any_layout_and_precision_of_rows_gives_the_same_totals():
    x, y, group = rows(257, 65, 4)
    expected = normal_equations(x, y, group, 4)
    wide = np.zeros((2 * 257, 3 * 65), np.float32)
    wide[::2, ::3] = x
    for same in (np.asfortranarray(x), wide[::2, ::3], x.astype(np.float64)):
        for a, b in zip(normal_equations(same, y, group, 4), expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_packed_triangle_is_the_upper_one_row_by_row():
    packed = np.arange(1.0, 7.0)
    assert packed_size(3) == packed.size
    expected = [[1, 2, 3], [2, 4, 5], [3, 5, 6]]
    np.testing.assert_array_equal(unpack_symmetric(packed, 3), expected)
    x = np.array([[1, 2, 4]], np.float32)
    found = normal_equations(x, np.ones(1), np.zeros(1, int), 1)[5][0]
    np.testing.assert_array_equal(found, [1, 2, 4, 4, 8, 16])
    with pytest.raises(ValueError, match=r"\(4, 4\) matrix has 10 numbers"):
        unpack_symmetric(packed, 4)


def test_shapes_and_groups_are_checked():
    x, y, group = rows(8, 4, 2)
    with pytest.raises(ValueError, match="expected; found"):
        normal_equations(x, y[:-1], group, 2)
    with pytest.raises(ValueError, match="expected; found"):
        normal_equations(x[0], y, group, 2)
    with pytest.raises(ValueError, match="bins must lie"):
        normal_equations(x, y, group + 1, 2)


def collected(x, y, group, calls, capacity=4000, n_groups=3, **noise):
    p = x.shape[1]
    totals = tuple(np.zeros(s, d) for s, d in zip(
        [(n_groups,), (n_groups, p), (n_groups,), (n_groups,), (n_groups, p), (n_groups, p)], [np.int64] + 5 * [float],
        strict=True,
    ))  # fmt: skip
    buffers, waiting = np.full((n_groups, capacity, p), np.nan, np.float32), np.zeros(n_groups, np.int64)
    reference = np.linspace(0, 1, p, dtype=np.float32)
    for start in range(0, len(x), calls):
        here = slice(start, start + calls)
        part = {name: a if name == "floor" else a[here] for name, a in noise.items()}
        m = len(x[here])
        assert m == collect_rows(
            x[here], y[here], group[here], 0, reference, buffers, waiting, totals, **part
        )
    return totals, buffers, waiting, reference


@pytest.mark.parametrize("n", [1, 33, 1025])
@pytest.mark.parametrize("p", [1, PIXELS - 1, PIXELS, PIXELS + 1])
@pytest.mark.parametrize("cores", [1, 3])
def test_rows_are_collected_in_order_whatever_the_calls(n, p, cores, monkeypatch):
    monkeypatch.setattr("moefast.core.threads.CORES", cores)
    x, y, group = rows(n, p, 3)
    error = np.random.default_rng(n + p).uniform(0, 1, (n, p)).astype(np.float32)
    once = collected(x, y, group, n, error=error, floor=0.0)
    parts = collected(x, y, group, 7, variance=error * error, floor=0.0)
    for a, b in zip((*once[0], *once[1:]), (*parts[0], *parts[1:]), strict=True):
        np.testing.assert_array_equal(a, b)
    (count, sum_x, sum_y, sum_yy, sum_xy, sum_v), buffers, waiting, reference = once
    np.testing.assert_array_equal(count, waiting)
    for k in range(3):
        mine = group == k
        kept = np.maximum(x[mine], 0) - reference
        np.testing.assert_array_equal(buffers[k, : waiting[k]], kept)
        assert np.isnan(buffers[k, waiting[k] :]).all()
        assert_close(sum_x[k], kept.sum(0, dtype=np.float64))
        assert_close(sum_xy[k], kept.astype(np.float64).T @ y[mine])
        assert_close(sum_v[k], (error[mine] * error[mine]).sum(0, dtype=np.float64))
        assert_close([sum_y[k], sum_yy[k]], [y[mine].sum(), y[mine] @ y[mine]])


def test_collecting_stops_where_a_buffer_is_full():
    x, y, group = rows(40, 5, 2)
    buffers, waiting = np.zeros((2, 3, 5), np.float32), np.zeros(2, np.int64)
    totals = (
        np.zeros(2, np.int64),
        np.zeros((2, 5)),
        np.zeros(2),
        np.zeros(2),
        np.zeros((2, 5)),
        np.zeros((2, 5)),
    )
    reference = np.zeros(5, np.float32)
    stop = collect_rows(x, y, group, 0, reference, buffers, waiting, totals)
    assert waiting.max() == 3
    assert stop == waiting.sum() == totals[0].sum() < 40
    full = waiting.argmax()
    assert group[stop - 1] == full
    np.testing.assert_array_equal(buffers[full], x[:stop][group[:stop] == full])
    assert_close(totals[1].sum(0), x[:stop].sum(0, dtype=np.float64))
    with pytest.raises(ValueError, match="room in each of 2 buffers of 3 rows"):
        collect_rows(x, y, group, stop, reference, buffers, waiting, totals)
    waiting[full] = 0
    assert collect_rows(x, y, group, stop, reference, buffers, waiting, totals) > stop


def test_what_cannot_be_collected_is_refused():
    x, y, group = np.ones((4, 3), np.float32), np.ones(4), np.array([0, 1, 1, 0])
    totals = (
        np.zeros(2, np.int64),
        np.zeros((2, 3)),
        np.zeros(2),
        np.zeros(2),
        np.zeros((2, 3)),
        np.zeros((2, 3)),
    )
    rest = (0, np.zeros(3, np.float32), np.zeros((2, 9, 3), np.float32), np.zeros(2, np.int64), totals)
    with pytest.raises(ValueError, match="expected; found"):
        collect_rows(x[:, 1:], y, group, *rest)
    with pytest.raises(ValueError, match="expected; found"):
        collect_rows(x, y[1:], group, *rest)
    with pytest.raises(ValueError, match=r"0 … 1; found 1 … 2"):
        collect_rows(x, y, group * 0 + [1, 2, 2, 1], *rest)
    with pytest.raises(ValueError, match=r"0 … 1; found -1"):
        collect_rows(x, y, group - 1, *rest)
    with pytest.raises(ValueError, match="one of variance and error"):
        collect_rows(x, y, group, *rest, variance=x[:, 1:])
    with pytest.raises(ValueError, match="one of variance and error"):
        collect_rows(x, y, group, *rest, variance=x, error=x)
    assert not any(total.any() for total in totals)


@pytest.mark.parametrize("p", [1, GRAM_TILE - 1, GRAM_TILE, GRAM_TILE + 1, 2 * GRAM_TILE + 3])
@pytest.mark.parametrize("n", [0, 1, 37, GRAM_ROWS, GRAM_ROWS + 5])
def test_products_have_the_same_bits_on_any_number_of_cores(n, p, monkeypatch):
    x, _, _ = rows(n, p, 1)
    found = []
    for cores in (1, 2, 5):
        monkeypatch.setattr("moefast.core.threads.CORES", cores)
        monkeypatch.setattr("moefast.kernels.gram.CORES", cores)
        found.append(np.ones(packed_size(p)))
        add_gram(x, found[-1])
        np.testing.assert_array_equal(found[-1], found[0])
    exact = x.astype(np.float64)
    assert_close(found[0] - 1, (exact.T @ exact)[np.triu_indices(p)], made_in=np.float32)


def test_a_packed_triangle_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"expected; found \(4, 3\), \(7,\)"):
        add_gram(np.ones((4, 3), np.float32), np.zeros(7))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.0, -1.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (70, 67)])
def test_one_value_beyond_the_limits_is_seen(bad, shape):
    values = np.random.default_rng(0).uniform(-0.9, 1.9, shape).astype(np.float32)
    assert all_within(values, -1.0, 2.0)
    assert all_within(values[:0], -1.0, 2.0)
    for place in (0, values.size // 2, values.size - 1):
        spoilt = values.copy()
        spoilt.flat[place] = bad
        assert not all_within(spoilt, -1.0, 2.0)
    with pytest.raises(ValueError, match=r"\(n, p\) expected"):
        all_within(values[0], -1.0, 2.0)
