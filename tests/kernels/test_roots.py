"""Roots of matrices in double precision, in the place of the matrix, against NumPy."""

import numpy as np
import pytest

from moefast.kernels.cpu_information import factor, filled, shrink

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 58]


def matrix_and_vector(n, seed=0):
    """Of a star that sees every direction, and the matrix with the vector behind it as the loops read it."""
    draw = np.random.default_rng(seed)
    rows = draw.standard_normal((n, 3 * n + 1))
    matrix, vector = rows @ rows.T, draw.standard_normal(n)
    a = np.zeros((filled(n), filled(n + 1)))
    a[:n, :n], a[:n, n] = np.triu(matrix), vector
    return matrix, vector, a


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("stop", [1, 4, 6, 12, None])
def test_rows_become_a_root_and_what_it_leaves(n, stop):
    stop = n if stop is None else min(stop, n)
    matrix, vector, a = matrix_and_vector(n)
    factor(a, stop, n, 0.0)
    whole = np.column_stack([matrix, vector])
    root = np.linalg.solve(np.linalg.cholesky(matrix[:stop, :stop]), whole[:stop])
    np.testing.assert_allclose(np.triu(a[:stop, : n + 1]), np.triu(root), rtol=1e-10, atol=1e-12)
    left = whole[stop:, stop:] - root[:, stop:n].T @ root[:, stop:]
    np.testing.assert_allclose(np.triu(a[stop:n, stop : n + 1]), np.triu(left), rtol=1e-9, atol=1e-9)


def test_pivots_below_the_ridge_are_rounding():
    a = np.zeros((8, 8))
    a[0, :3] = 4.0, 2.0, 2.0
    a[1, 1:3] = 1.0 - 1e-17, 1.0
    a[2, 2] = 1.0
    factor(a, 3, 3, 1e-8)
    np.testing.assert_allclose(a[0, :3], [2.0, 1.0, 1.0], rtol=1e-8)
    np.testing.assert_allclose(np.diag(a)[1:3], 1e-4, rtol=0.5)


@pytest.mark.parametrize("n", SIZES)
def test_a_root_shrinks_to_that_of_what_is_seen_within_a_cloud(n):
    matrix, vector, a = matrix_and_vector(n)
    factor(a, n, n, 0.0)
    columns, t = np.zeros_like(a), np.zeros_like(a)
    shrink(a, columns, t, n)
    root = np.triu(a[:n, :n])
    np.testing.assert_allclose(root.T @ root, np.linalg.solve(np.eye(n) + matrix, matrix), atol=1e-12)
    expected = np.linalg.solve(np.eye(n) + matrix, vector)
    np.testing.assert_allclose(root.T @ a[:n, n], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n", [5, 58])
def test_rows_that_are_not_there_have_no_say(n):
    _, _, a = matrix_and_vector(n)
    factor(a, n, n, 0.0)
    left_behind = a.copy()
    left_behind[n:] = np.nan
    for one in (a, left_behind):
        shrink(one, np.zeros_like(a), np.zeros_like(a), n)
    np.testing.assert_array_equal(np.triu(a[:n, : n + 1]), np.triu(left_behind[:n, : n + 1]))


def test_small_information_keeps_its_digits():
    matrix, _, _ = matrix_and_vector(9)
    a = np.zeros((filled(9), filled(10)))
    a[:9, :9] = np.triu(1e-12 * matrix)
    factor(a, 9, 9, 0.0)
    shrink(a, np.zeros_like(a), np.zeros_like(a), 9)
    root = np.triu(a[:9, :9])
    np.testing.assert_allclose(root.T @ root, 1e-12 * matrix, rtol=1e-9, atol=1e-21)
