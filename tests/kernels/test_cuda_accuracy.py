"""How far float32 sums of PARTIAL_ROWS rows leave Σxxᵀ from float64: the kernel's operations, made on the CPU."""

import numpy as np
import pytest
from numba import njit

pytest.importorskip("numba_cuda")

from moefast.kernels.cuda.gram import PARTIAL_ROWS

PIXELS = 16
GOAL = 1e-6


@njit(fastmath={"contract"})
def gram_in_parts(x, total, part):
    """`add_gram` for one group: one fused multiply-add per row and number, float64 totals of float32 sums."""
    n, p = x.shape
    sums = np.zeros((p, p), np.float32)
    for row in range(n):
        for i in range(p):
            for j in range(p):
                sums[i, j] += x[row, i] * x[row, j]
        if (row + 1) % part == 0 or row == n - 1:
            for i in range(p):
                for j in range(p):
                    total[i, j] += np.float64(sums[i, j])
                    sums[i, j] = np.float32(0)


def spectra_like(n, seed=0):
    """Centred flux: a few strong shared components, noise, and a mean that is not quite zero."""
    rng = np.random.default_rng(seed)
    shapes = rng.standard_normal((3, PIXELS))
    strength = rng.standard_normal((n, 3)) * [0.1, 0.03, 0.01]
    return (0.02 + strength @ shapes + 0.1 * rng.standard_normal((n, PIXELS))).astype(np.float32)


def worst(n, part=PARTIAL_ROWS):
    """Largest error of a number G_ij in units of √(G_ii G_jj)."""
    x = spectra_like(n)
    total = np.zeros((PIXELS, PIXELS))
    gram_in_parts(x, total, part)
    exact = x.astype(np.float64).T @ x.astype(np.float64)
    scale = np.sqrt(np.diag(exact))
    return float((np.abs(total - exact) / np.outer(scale, scale)).max())


@pytest.mark.parametrize("n", [1, 511, 512, 513, 10_007, 1_000_000])
def test_the_goal_is_met_at_every_size(n):
    found = worst(n)
    print(f"{n} rows: {found:.1e}")
    assert found < GOAL


def test_one_sum_of_all_rows_would_miss_it():
    """The bound on the partial sums is what meets the goal."""
    assert worst(1_000_000, part=1_000_000) > 10 * GOAL
