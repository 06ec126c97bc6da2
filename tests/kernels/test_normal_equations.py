"""Normal equations and sums per group against plain NumPy, at the sizes where blocks end."""

import numpy as np
import pytest
from tolerances import assert_close

from moefast.kernels import add_rows, normal_equations, packed_size, unpack_symmetric
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
    scratch = np.empty((33, 33), np.float32)
    again = normal_equations(x[400:], y[400:], group[400:], 3, out=total, square=scratch)
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


@pytest.mark.parametrize("n", [0, 1, 33, 1025])
@pytest.mark.parametrize("p", [1, 511, 512, 513])
def test_sums_of_rows_do_not_depend_on_the_calls(n, p):
    rng = np.random.default_rng(n + p)
    values = rng.uniform(0, 1, (n, p)).astype(np.float32)
    group = rng.integers(0, 3, n)
    once, parts = np.zeros((3, p)), np.zeros((3, p))
    add_rows(values, group, once)
    for start in range(0, n, 7):
        add_rows(values[start : start + 7], group[start : start + 7], parts)
    np.testing.assert_array_equal(parts, once)
    assert_close(once, np.array([values[group == k].sum(0, dtype=np.float64) for k in range(3)]))


def test_sums_of_rows_check_shapes_and_groups():
    values, group = np.ones((4, 3), np.float32), np.array([0, 1, 1, 0])
    with pytest.raises(ValueError, match="expected; found"):
        add_rows(values, group, np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"0 … 0; found 0 … 1"):
        add_rows(values, group, np.zeros((1, 3)))
    with pytest.raises(ValueError, match=r"0 … 1; found -1"):
        add_rows(values, group - 1, np.zeros((2, 3)))
