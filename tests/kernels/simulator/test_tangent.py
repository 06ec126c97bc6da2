"""Posteriors over clouds as CUDA kernels, simulated: the float64 reference and the CPU at block edges, bad stars."""

import numpy as np
import pytest
from clouds import clouds, stars_of
from tolerances import assert_close

from moefast.kernels import tangent_posterior
from moefast.kernels.cuda import tangent
from moefast.kernels.cuda.tangent import CLOUDS, PANEL, ROWS, TANGENTS
from moefast.kernels.reference_tangent import tangent_posterior_reference

NAMES = ("mean", "sd", "log_evidence", "effective")


def assert_same(found, expected):
    for name, b in zip(NAMES, expected, strict=True):
        a = getattr(found, name)
        assert a.dtype == np.float32
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b), err_msg=name)
        np.testing.assert_array_equal(a == -np.inf, b == -np.inf, err_msg=name)
        finite = np.isfinite(b)
        # An exponent of order 100 carries a rounding of 1e-5 into the exponential.
        assert_close(a[finite], b[finite], made_in=np.float32, factor=4)


@pytest.mark.parametrize(
    ("n", "m", "r", "t", "first"),
    [
        (0, 3, 2, 1, None),
        (1, 1, 1, 1, None),
        (3, 5, 4, 0, [0, 2, 5]),
        (ROWS - 1, CLOUDS - 1, 3, 2, [0, 0, CLOUDS - 1]),
        (ROWS, CLOUDS, PANEL - 1, TANGENTS, None),
        (ROWS + 1, 2 * CLOUDS + 1, PANEL, TANGENTS - 1, [0, CLOUDS + 1, 2 * CLOUDS + 1, 2 * CLOUDS + 1]),
        (5, CLOUDS + 3, PANEL + 1, TANGENTS + 1, None),
    ],
)
def test_matches_the_reference_and_the_cpu(n, m, r, t, first):
    library = clouds(m, r, t, first)
    z, level = stars_of(library, n)
    found = tangent_posterior(z, level, library, backend="cuda")
    assert_same(found, tangent_posterior_reference(z, level, library))
    twin = tangent_posterior(z, level, library)
    assert_same(found, [getattr(twin, name) for name in NAMES])


def test_bad_rows_keep_to_themselves_and_a_row_has_the_same_bits_alone():
    library = clouds(10, 5, 2, [0, 4, 4, 10])
    z, level = stars_of(library, ROWS + 2)
    clean = tangent_posterior(z, level, library, backend="cuda")
    spoiled, levels = z.copy(), level.copy()
    spoiled[3, 2], spoiled[7], spoiled[11, 1] = np.nan, np.inf, 1e30
    levels[8], levels[9], levels[10], levels[12] = np.nan, np.inf, -25, 20
    found = tangent_posterior(spoiled, levels, library, backend="cuda")
    alone = tangent_posterior(z[-1:], level[-1:], library, backend="cuda")
    bad = [3, 7, 8, 9, 10, 11, 12]
    good = np.setdiff1d(np.arange(ROWS + 2), bad)
    for name in NAMES:
        assert np.isnan(getattr(found, name)[bad]).all()
        np.testing.assert_array_equal(getattr(found, name)[good], getattr(clean, name)[good])
        np.testing.assert_array_equal(getattr(alone, name)[0], getattr(clean, name)[-1])


@pytest.mark.parametrize("n", [2, 4, 5, 9])
def test_only_a_block_of_stars_is_on_the_device(n, monkeypatch):
    library = clouds(9, 5, 2, [0, 2, 9])
    z, level = stars_of(library, n)
    whole = tangent_posterior(z, level, library, backend="cuda")
    rows = []
    real = tangent.cuda.to_device

    def to_device(array, *rest, **options):
        rows.append(len(array) if array.shape[1:] == (5,) else 0)
        return real(array, *rest, **options)

    monkeypatch.setattr(tangent, "BLOCK_ROWS", 4)
    monkeypatch.setattr(tangent.cuda, "to_device", to_device)
    found = tangent_posterior(z, level, library, backend="cuda")
    assert [count for count in rows if count] == [4] * (n // 4) + [n % 4] * (n % 4 > 0)
    for name in NAMES:
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))


@pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning"
)  # NumPy's floats say it, a device's do not
def test_stars_far_from_all_clouds():
    library = clouds(9, 5, 0, [0, 2, 9])
    z, level = np.full((2, 5), 1e4, np.float32), np.array([-1.0, -20.0], np.float32)
    z[1] = 1e14
    found, twin = tangent_posterior(z, level, library, backend="cuda"), tangent_posterior(z, level, library)
    np.testing.assert_allclose(found.log_evidence, twin.log_evidence, rtol=1e-5)
    assert np.isfinite(found.mean[0]).all()


def test_arguments_are_checked_like_on_the_cpu():
    with pytest.raises(ValueError, match=r"z of shape \(n, 3\) expected"):
        tangent_posterior(np.ones((2, 4)), np.ones(2), clouds(2, 3, 1), backend="cuda")
