"""One read of flux and error against its reference; bad pixels and neighbours; bits that depend on the row alone."""

import itertools

import numpy as np
import pytest
from tolerances import assert_close

from moefast.kernels import PROJECT_ROWS, Projected, Projection, project
from moefast.kernels.reference import centre_reference, project_reference

P, COLUMNS, SQUARES = 131, 17, 5
SIZES = [0, 1, 2, 31, 33, 509, 511, 512, 513, 1031]
FIELDS = ("values", "variances", "log_level", "energy", "expected")


@pytest.fixture(scope="module")
def plan():
    rng = np.random.default_rng(7)
    shape = np.exp(rng.normal(-4, 0.7, P))
    orthogonal, _ = np.linalg.qr(rng.standard_normal((P, 6)))
    return Projection(
        reference=rng.uniform(0.5, 1.5, P),
        noise_shape=shape,
        matrix=rng.standard_normal((P, COLUMNS)),
        variance_matrix=rng.uniform(0, 1, (P, SQUARES)),
        captured=(orthogonal**2).sum(1) / shape,
    )


def spectra(n, plan, seed=0):
    rng = np.random.default_rng(seed)
    error = np.sqrt(plan.noise_shape) * np.exp(rng.normal(0, 0.5, (n, 1))) * rng.uniform(0.8, 1.2, (n, P))
    flux = plan.reference + 0.2 * rng.standard_normal((n, 1)) + error * rng.standard_normal((n, P))
    return flux.astype(np.float32), error.astype(np.float32)


def expected_of(flux, error, good, plan):
    with np.errstate(invalid="ignore", over="ignore"):
        x, v, *scalars = centre_reference(
            flux,
            error,
            good,
            *(a.astype(np.float64) for a in (plan.reference, plan.noise_shape, plan.captured)),
        )
    return Projected(*project_reference(x, v, plan.matrix, plan.variance_matrix), *scalars)


def assert_same_bits(found, expected, rows=slice(None)):
    for name in FIELDS:
        a, b = getattr(found, name)[rows], getattr(expected, name)[rows]
        np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32), err_msg=name)


@pytest.mark.parametrize("n", SIZES)
def test_matches_the_reference(plan, n):
    flux, error = spectra(n, plan)
    found, expected = project(flux, error, None, plan), expected_of(flux, error, None, plan)
    for name in FIELDS:
        assert getattr(found, name).dtype == np.float32
        assert_close(getattr(found, name), getattr(expected, name))


def test_noise_level_and_energies_have_known_answers(plan):
    scale = 1.7
    error = np.tile(scale * np.sqrt(plan.noise_shape), (3, 1)).astype(np.float32)
    flux = np.tile(plan.reference, (3, 1))
    flux[1] += np.sqrt(plan.noise_shape)
    found = project(flux, error, None, plan)
    assert_close(found.log_level, np.full(3, np.log(scale)))
    assert_close(found.energy, [0, P, 0])
    # A basis of 6 orthonormal columns takes up 6 of the P units of white noise.
    assert_close(found.expected, np.full(3, scale**2 * (P - 6)))
    assert not found.values[0].any()


@pytest.mark.parametrize("first_row", [0, 1, 300, 511, 512, 5000])
def test_a_row_has_the_same_bits_alone_and_in_a_block(plan, first_row):
    flux, error = spectra(1031, plan)
    good = np.random.default_rng(1).random(flux.shape) > 0.001
    whole = project(flux, error, good, plan, first_row=first_row)
    for i in (0, 1, 211, 510, 511, 512, 1030):
        one = slice(i, i + 1)
        alone = project(flux[one], error[one], good[one], plan, first_row=first_row + i)
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(alone, name), getattr(whole, name)[one], err_msg=name)
    cuts = [0, 3, 100, 612, 613, 1031]
    for a, b in itertools.pairwise(cuts):
        part = project(flux[a:b], error[a:b], good[a:b], plan, first_row=first_row + a)
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[a:b], err_msg=name)


def test_bad_pixels_leave_every_other_row_alone_and_weigh_nothing(plan):
    n = PROJECT_ROWS + 77
    flux, error = spectra(n, plan)
    clean = project(flux, error, None, plan)
    good = np.ones(flux.shape, bool)
    broken = {0: "flux NaN", 5: "flux inf", 6: "error NaN", 7: "error 0", 300: "error < 0", 511: "masked"}
    for row, what in broken.items():
        good[row, [0, 64, P - 1]] = False
        if what != "masked":
            array = flux if what.startswith("flux") else error
            array[row, [0, 64, P - 1]] = {"NaN": np.nan, "inf": np.inf, "0": 0.0}.get(what.split()[-1], -1.0)
    good[512] = False
    flux[512], error[512] = np.nan, np.inf
    good[513] = False
    good[513, 9] = True
    changed = [*broken, 512, 513]
    found = project(flux, error, good, plan)
    others = np.setdiff1d(np.arange(n), changed)
    assert_same_bits(found, clean, others)
    expected = expected_of(flux, error, good, plan)
    for name in FIELDS:
        a, b = getattr(found, name)[changed], getattr(expected, name)[changed]
        assert np.isfinite(a).all(), name
        assert_close(a, b)
    assert found.log_level[512] == found.energy[512] == found.expected[512] == 0
    assert not found.values[512].any()


def test_unmarked_nan_stays_in_its_row(plan):
    flux, error = spectra(40, plan)
    clean = project(flux, error, None, plan)
    flux[11, 3] = np.nan
    found = project(flux, error, None, plan)
    assert np.isnan(found.values[11]).all()
    assert_same_bits(found, clean, np.delete(np.arange(40), 11))


def test_any_layout_and_precision_gives_the_same_bits(plan):
    flux, error = spectra(70, plan)
    expected = project(flux, error, None, plan)
    everywhere = np.ones(flux.shape, bool)
    assert_same_bits(project(flux, error, everywhere, plan), expected)
    assert_same_bits(project(np.asfortranarray(flux), np.asfortranarray(error), None, plan), expected)
    assert_same_bits(project(flux.astype(np.float64), error.astype(np.float64), None, plan), expected)
    assert_same_bits(
        project(flux[::-1], error[::-1], None, plan),
        project(flux[::-1].copy(), error[::-1].copy(), None, plan),
    )


def test_shapes_are_checked(plan):
    flux, error = spectra(3, plan)
    with pytest.raises(ValueError, match=r"shape \(n, 131\)"):
        project(flux[:, 1:], error[:, 1:], None, plan)
    with pytest.raises(ValueError, match="flux and error"):
        project(flux, error[:2], None, plan)
    with pytest.raises(ValueError, match="good must have shape"):
        project(flux, error, np.ones((3, 2), bool), plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captured": np.zeros(3)}, "captured must have shape"),
        ({"matrix": np.zeros((3, 2))}, "matrix must have 131 rows"),
        ({"variance_matrix": np.zeros(P)}, "variance_matrix must have 131 rows"),
        ({"noise_shape": np.zeros(P)}, "noise_shape must be positive"),
        ({"noise_shape": np.full(P, np.nan)}, "noise_shape must be positive"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan, change, message):
    arrays = {
        n: getattr(plan, n) for n in ("reference", "noise_shape", "matrix", "variance_matrix", "captured")
    }
    with pytest.raises(ValueError, match=message):
        Projection(**(arrays | change))
