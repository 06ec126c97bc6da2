"""One read of flux and error against its reference; bad pixels and neighbours; bits that depend on the row alone."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from tolerances import assert_close

from moefast.kernels import PROJECT_ROWS, Projection, cell_size, project
from moefast.kernels.reference import project_reference
from moefast.spectra.quality import assess, good_pixels

P, COLUMNS, SQUARES = 132, 17, 5
SIZES = [0, 1, 2, 31, 33, 253, 255, 256, 257, 1031]
FIELDS = ("columns", "windows", "variances", "log_level", "energy", "expected", "snr_norm", "snr_median")
COUNTS = ("n_good", "flag")


@pytest.fixture(scope="module")
def plan():
    rng = np.random.default_rng(7)
    shape = np.exp(rng.normal(-4, 0.7, P))
    orthogonal, _ = np.linalg.qr(rng.standard_normal((P, 6)))
    lines = np.zeros((P, 4))
    for column, (start, stop) in enumerate(((0, 9), (60, 61), (P - 20, P))):
        lines[start:stop, column] = rng.standard_normal(stop - start)
    return Projection(
        reference=rng.uniform(0.5, 1.5, P),
        noise_shape=shape,
        matrix=rng.standard_normal((P, COLUMNS)),
        lines=lines,
        cell_matrix=rng.uniform(0, 1, (P // cell_size(P), SQUARES)),
        captured=(orthogonal**2).sum(1) / shape,
    )


def spectra(n, plan, seed=0):
    rng = np.random.default_rng(seed)
    error = np.sqrt(plan.noise_shape) * np.exp(rng.normal(0, 0.5, (n, 1))) * rng.uniform(0.8, 1.2, (n, P))
    flux = plan.reference + 0.2 * rng.standard_normal((n, 1)) + error * rng.standard_normal((n, P))
    return flux.astype(np.float32), error.astype(np.float32)


def assert_same_bits(found, expected, rows=slice(None)):
    for name in FIELDS:
        a, b = getattr(found, name)[rows], getattr(expected, name)[rows]
        np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32), err_msg=name)
    for name in COUNTS:
        np.testing.assert_array_equal(getattr(found, name)[rows], getattr(expected, name)[rows], err_msg=name)


@pytest.mark.parametrize("n", SIZES)
def test_matches_the_reference(plan, n):
    flux, error = spectra(n, plan)
    found, expected = project(flux, error, None, plan), project_reference(flux, error, None, plan)
    for name in FIELDS:
        assert getattr(found, name).dtype == np.float32
        assert_close(getattr(found, name), getattr(expected, name))
    for name in COUNTS:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_the_second_look_is_that_of_assess(plan):
    flux, error = spectra(300, plan)
    mask = np.random.default_rng(2).random(flux.shape) < 0.002
    flux[4, 7], error[9, 3], error[200], flux[201] = np.nan, -1.0, 0.0, np.inf
    found, expected = (
        project(flux, error, mask, plan),
        assess(flux, error, good_pixels(flux, error, mask), mask),
    )
    np.testing.assert_array_equal(found.n_good, expected.n_good)
    np.testing.assert_array_equal(found.flag, expected.flag)
    assert set(found.flag) == {0, 3, 4, 7}
    np.testing.assert_array_equal(found.snr_median, expected.snr_median)
    np.testing.assert_allclose(found.snr_norm, expected.snr_norm, rtol=1e-6)


def test_the_order_of_rows_does_not_show_in_a_median(plan):
    """Where a median is looked for first depends on the row before; what is found does not."""
    flux, error = spectra(64, plan)
    flux[::2] *= 10
    expected = np.median(flux / error, axis=1)
    np.testing.assert_array_equal(project(flux, error, None, plan).snr_median, expected.astype(np.float32))
    again = project(flux[::-1], error[::-1], None, plan).snr_median
    np.testing.assert_array_equal(again[::-1], expected.astype(np.float32))


def test_clipped_flux_is_clipped_for_the_experts_alone(plan):
    flux, error = spectra(40, plan)
    flux -= 1
    clipped = replace(plan, clipped=True)
    found, expected = project(flux, error, None, clipped), project(np.maximum(flux, 0), error, None, plan)
    np.testing.assert_array_equal(found.columns, expected.columns)
    np.testing.assert_array_equal(found.snr_median, project(flux, error, None, plan).snr_median)
    assert_close(found.columns, project_reference(flux, error, None, clipped).columns)


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
    assert not found.columns[0].any()


@pytest.mark.parametrize("first_row", [0, 1, 300, 511, 512, 5000])
def test_a_row_has_the_same_bits_alone_and_in_a_block(plan, first_row):
    flux, error = spectra(1031, plan)
    mask = np.random.default_rng(1).random(flux.shape) < 0.001
    whole = project(flux, error, mask, plan, first_row=first_row)
    for i in (0, 1, 211, 510, 511, 512, 1030):
        one = slice(i, i + 1)
        alone = project(flux[one], error[one], mask[one], plan, first_row=first_row + i)
        for name in (*FIELDS, *COUNTS):
            np.testing.assert_array_equal(getattr(alone, name), getattr(whole, name)[one], err_msg=name)
    cuts = [0, 3, 100, 612, 613, 1031]
    for a, b in itertools.pairwise(cuts):
        part = project(flux[a:b], error[a:b], mask[a:b], plan, first_row=first_row + a)
        for name in (*FIELDS, *COUNTS):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[a:b], err_msg=name)


def test_bad_pixels_leave_every_other_row_alone_and_weigh_nothing(plan):
    n = 2 * PROJECT_ROWS + 77
    flux, error = spectra(n, plan)
    clean = project(flux, error, None, plan)
    mask = np.zeros(flux.shape, bool)
    broken = {
        0: "flux NaN",
        5: "flux inf",
        6: "error NaN",
        7: "error 0",
        300: "error -1",
        511: "masked",
        9: "error 2e6",
    }
    for row, what in broken.items():
        if what == "masked":
            mask[row, [0, 64, P - 1]] = True
        else:
            name, value = what.split()
            (flux if name == "flux" else error)[row, [0, 64, P - 1]] = float(value)
    flux[512], error[512] = np.nan, np.inf
    mask[513] = True
    mask[513, 9] = False
    changed = [*broken, 512, 513]
    found = project(flux, error, mask, plan)
    assert_same_bits(found, clean, np.setdiff1d(np.arange(n), changed))
    expected = project_reference(flux, error, mask, plan)
    for name in FIELDS:
        a, b = getattr(found, name)[changed], getattr(expected, name)[changed]
        assert np.isfinite(a[:-2]).all(), name
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        assert_close(np.nan_to_num(a), np.nan_to_num(b))
    for name in COUNTS:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.log_level[512] == found.energy[512] == found.expected[512] == 0
    assert not found.columns[512].any()


def test_absurd_flux_stays_in_its_row(plan):
    flux, error = spectra(40, plan)
    clean = project(flux, error, None, plan)
    flux[11, 3] = 3e38
    found = project(flux, error, None, plan)
    assert_same_bits(found, clean, np.delete(np.arange(40), 11))
    # Its square does not fit float32; the SNRs do not mind.
    expected = project_reference(flux, error, None, plan)
    np.testing.assert_allclose(found.snr_norm[11], expected.snr_norm[11], rtol=1e-6)
    assert found.flag[11] == 0


def test_flux_in_tiny_units_is_as_noisy_as_it_is(plan):
    flux, error = spectra(5, plan)
    flux[2], error[2] = np.float32(1e-23) * flux[2], np.float32(1e-23) * error[2]
    flux[3] = 0
    found, expected = project(flux, error, None, plan), project_reference(flux, error, None, plan)
    for name in ("snr_norm", "snr_median", "log_level"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-5)
    assert found.log_level[2] < -40


def test_any_layout_and_precision_gives_the_same_bits(plan):
    flux, error = spectra(70, plan)
    expected = project(flux, error, None, plan)
    nowhere = np.zeros(flux.shape, bool)
    assert_same_bits(project(flux, error, nowhere, plan), expected)
    assert_same_bits(project(np.asfortranarray(flux), np.asfortranarray(error), None, plan), expected)
    assert_same_bits(project(flux.astype(np.float64), error.astype(np.float64), None, plan), expected)
    assert_same_bits(
        project(flux[::-1], error[::-1], None, plan),
        project(flux[::-1].copy(), error[::-1].copy(), None, plan),
    )


def test_shapes_are_checked(plan):
    flux, error = spectra(3, plan)
    with pytest.raises(ValueError, match=r"shape \(n, 132\)"):
        project(flux[:, 1:], error[:, 1:], None, plan)
    with pytest.raises(ValueError, match="flux and error"):
        project(flux, error[:2], None, plan)
    with pytest.raises(ValueError, match="mask must be bool of shape"):
        project(flux, error, np.ones((3, 2), bool), plan)
    with pytest.raises(ValueError, match="mask must be bool of shape"):
        project(flux, error, np.ones(flux.shape, int), plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captured": np.zeros(3)}, "captured must have shape"),
        ({"matrix": np.zeros((3, 2))}, "matrix must have 132 rows"),
        ({"lines": np.zeros((P - 1, 2))}, "lines must have 132 rows"),
        ({"cell_matrix": np.zeros((P, 2))}, "cell_matrix must have 22 rows"),
        ({"noise_shape": np.zeros(P)}, "noise_shape must be positive"),
        ({"noise_shape": np.full(P, np.nan)}, "noise_shape must be positive"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan, change, message):
    with pytest.raises(ValueError, match=message):
        replace(plan, **change)


def test_cells_divide_the_pixels():
    assert [cell_size(p) for p in (4096, 132, 131, 7, 1, 9)] == [8, 6, 1, 7, 1, 3]
