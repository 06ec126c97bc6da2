"""Template posteriors as a CUDA kernel, simulated, against the float64 reference at block edges."""

import numpy as np
import pytest
from tolerances import assert_close

from moefast.kernels import template_posterior
from moefast.kernels.cuda import template
from moefast.kernels.reference_template import template_posterior_reference

NAMES = ("mean", "log_evidence", "effective")


def library(n, m, r, q, seed=0):
    rng = np.random.default_rng(seed + n)
    keys = rng.standard_normal((m, r)) * np.linspace(3, 0.3, r)
    level = rng.uniform(0.3, 3, n)
    z = keys[rng.integers(0, m, n)] + level[:, None] * rng.standard_normal((n, r))
    return tuple(a.astype(np.float32) for a in (z, level, keys, rng.uniform(1, 5, (m, q))))


@pytest.mark.parametrize("free_scale", [False, True])
@pytest.mark.parametrize(
    ("n", "m", "r", "q"), [(0, 3, 2, 1), (1, 1, 1, 1), (31, 63, 3, 2), (33, 65, 5, 3), (67, 130, 17, 9)]
)
def test_matches_the_reference_and_the_cpu(n, m, r, q, free_scale):
    rows = library(n, m, r, q)
    found = template_posterior(*rows, free_scale=free_scale, backend="cuda")
    twin = template_posterior(*rows, free_scale=free_scale)
    expected = template_posterior_reference(*rows, free_scale=free_scale)
    for name, reference in zip(NAMES, expected, strict=True):
        assert getattr(found, name).dtype == np.float32
        # An exponent of order 100 carries a rounding of 1e-5 into the exponential.
        assert_close(getattr(found, name), reference, factor=3)
        assert_close(getattr(found, name), getattr(twin, name), factor=3)


def test_bad_rows_keep_to_themselves_and_a_row_has_the_same_bits_alone():
    z, level, keys, values = library(33, 70, 5, 2)
    clean = template_posterior(z, level, keys, values, backend="cuda")
    spoiled, levels = z.copy(), level.copy()
    spoiled[3, 2], spoiled[7], levels[8], levels[9] = np.nan, np.inf, 0, -1
    found = template_posterior(spoiled, levels, keys, values, backend="cuda")
    alone = template_posterior(z[32:], level[32:], keys, values, backend="cuda")
    good = np.setdiff1d(np.arange(33), [3, 7, 8, 9])
    for name in NAMES:
        assert np.isnan(getattr(found, name)[[3, 7, 8, 9]]).all()
        np.testing.assert_array_equal(getattr(found, name)[good], getattr(clean, name)[good])
        np.testing.assert_array_equal(getattr(alone, name)[0], getattr(clean, name)[32])


@pytest.mark.parametrize("n", [2, 4, 5, 9])
def test_only_a_block_of_stars_is_on_the_device(n, monkeypatch):
    rows = library(n, 3, 6, 2)
    whole = template_posterior(*rows, backend="cuda")
    stars = []
    real = template.cuda.to_device

    def to_device(array, *rest, **options):
        stars.append(array.shape[1] if array.ndim == 2 and array.shape[0] > 2 else 0)
        return real(array, *rest, **options)

    monkeypatch.setattr(template, "BLOCK_ROWS", 4)
    monkeypatch.setattr(template.cuda, "to_device", to_device)
    found = template_posterior(*rows, backend="cuda")
    # The templates come first, once.
    assert [count for count in stars if count] == [3] + [4] * (n // 4) + [n % 4] * (n % 4 > 0)
    for name in NAMES:
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))


@pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning"
)  # NumPy's floats say it, a device's do not
def test_stars_that_no_template_explains():
    arguments = ([[1e30], [2.0]], [1.0, 1.0], [[0.0], [1.0]], [1.0, 2.0])
    found, twin = template_posterior(*arguments, backend="cuda"), template_posterior(*arguments)
    assert np.isnan(found.mean[0]).all()
    for name in NAMES:
        np.testing.assert_allclose(getattr(found, name), getattr(twin, name), rtol=1e-6)


def test_arguments_are_checked_like_on_the_cpu():
    with pytest.raises(ValueError, match="values of 0 templates"):
        template_posterior(np.ones((2, 3)), np.ones(2), np.ones((0, 3)), np.ones(0), backend="cuda")
