"""Velocity, reddening and flux calibration against closed forms."""

import math

import numpy as np
import pytest
from scipy.special import erf

from moefast.core.errors import MoefastError
from moefast.simulate import Emulator
from moefast.simulate.nuisance import (
    LIGHT_SPEED,
    calibrate,
    calibration_basis,
    doppler,
    extinction,
    redden,
    relative_extinction,
    velocity_limit,
)

MARGIN = 32
STEP = 1750.0 / 4096.0
EDGES = 7100.0 + STEP * np.arange(-MARGIN, 4097 + MARGIN)
WAVE = 0.5 * (EDGES[1:] + EDGES[:-1])[MARGIN:-MARGIN]


def lines(centres, depths, stretch=1.0):
    """Absorption lines as wide as a resolving power of 5000 makes them, integrated over the padded pixels.

    `stretch` multiplies wavelengths: the pixels of a stretched spectrum hold what those of the spectrum at rest did.
    """
    edges = EDGES[None, :] / stretch
    flux = np.ones((1, len(EDGES) - 1))
    for centre, depth in zip(centres, depths, strict=True):
        sigma = centre / 5000.0 / 2.354820045
        cumulative = 0.5 * erf((edges - centre) / (math.sqrt(2.0) * sigma))
        area = depth * sigma * math.sqrt(2.0 * math.pi)
        flux -= area * np.diff(cumulative, axis=1) / np.diff(edges, axis=1)
    return flux


@pytest.fixture(scope="module")
def crowded():
    rng = np.random.default_rng(3)
    return np.sort(rng.uniform(7050.0, 8900.0, 150)), rng.uniform(0.05, 0.6, 150)


@pytest.mark.parametrize("velocity", [-370.0, -300.0, -31.4, -0.2, 0.0, 7.7, 30.0, 123.4, 300.0, 370.0])
def test_a_shift_is_that_of_the_lines_themselves(crowded, velocity):
    rest = lines(*crowded).astype(np.float32)
    expected = lines(*crowded, stretch=1.0 + velocity / LIGHT_SPEED)[:, MARGIN:-MARGIN]
    assert np.ptp(rest) > 0.5
    found = doppler(rest, np.array([velocity]), WAVE)
    assert found.dtype == np.float32
    # Lines 0.6 deep at the blue end are the worst case; spectra are shallower there.
    assert np.abs(found - expected).max() < 1e-4


def test_receding_stars_are_redder_and_rest_changes_nothing():
    rest = lines([8000.0], [0.5]).astype(np.float32)
    near = np.abs(WAVE - 8000.0) < 20.0
    for velocity in (200.0, -200.0):
        depth = 1.0 - doppler(rest, np.array([velocity]), WAVE)[0, near].astype(float)
        centre = (depth * WAVE[near]).sum() / depth.sum()
        assert centre == pytest.approx(8000.0 * (1.0 + velocity / LIGHT_SPEED), abs=1e-3)
    np.testing.assert_array_equal(doppler(rest, np.zeros(1), WAVE), rest[:, MARGIN:-MARGIN])


def test_bits_of_a_row_do_not_depend_on_its_block(crowded):
    rng = np.random.default_rng(1)
    rest = (lines(*crowded) + 0.01 * rng.standard_normal((300, 1))).astype(np.float32)
    velocity, ebv, a = rng.normal(0, 80, 300), rng.uniform(0, 2.5, 300), rng.standard_normal((300, 4))
    shapes = 0.03 * calibration_basis(WAVE)

    def observe(rows):
        flux = doppler(rest[rows], velocity[rows], WAVE)
        redden(flux, ebv[rows], WAVE, out=flux)
        return calibrate(flux, a[rows], shapes)

    whole = observe(slice(None))
    for rows in (slice(0, 1), slice(7, 131), slice(299, 300), slice(5, 5)):
        np.testing.assert_array_equal(observe(rows), whole[rows])


def test_velocities_beyond_the_margin_are_refused():
    rest = lines([8000.0], [0.5]).astype(np.float32)
    with pytest.raises(MoefastError, match=r"row 1 is 400 km/s; .* 32 pixels .* up to 376 km/s"):
        doppler(np.repeat(rest, 2, 0), np.array([0.0, 400.0]), WAVE)
    for bad in (np.nan, -np.inf, -LIGHT_SPEED, -2 * LIGHT_SPEED):
        with pytest.raises(MoefastError, match="velocity of row 0"):
            doppler(rest, np.array([bad]), WAVE)
    with pytest.raises(MoefastError, match="up to 0 km/s"):
        doppler(rest[:, MARGIN:-MARGIN], np.array([1.0]), WAVE)
    narrow = rest[:, MARGIN - 2 : 2 - MARGIN]
    np.testing.assert_array_equal(doppler(narrow, np.zeros(1), WAVE), rest[:, MARGIN:-MARGIN])


def test_the_limit_of_the_emulator_is_the_one_that_is_refused():
    emulator = Emulator.load()
    limit = velocity_limit(emulator)
    assert limit > 300
    padded = emulator.padded_flux(np.array([[5000.0, 3.0, 0.0, 0.0, 0.0]]))
    for sign in (-1.0, 1.0):
        assert np.isfinite(doppler(padded, np.array([sign * limit]))).all()
        with pytest.raises(MoefastError, match="velocity"):
            doppler(padded, np.array([sign * 1.01 * limit]))


def test_extinction_law_has_its_published_values():
    # What other people's code gives for R_V = 3.1 at 4000 and 5000 Å (DustExtinction.jl, ccm89).
    np.testing.assert_allclose(
        relative_extinction(np.array([4000.0, 5000.0])), [1.4645557, 1.1222468], rtol=1e-7
    )
    k = extinction(WAVE)
    assert extinction(np.array([7975.0])) == pytest.approx(0.0, abs=1e-12)
    assert np.all(np.diff(k) < 0)
    with pytest.raises(MoefastError, match="3030 to 9090"):
        extinction(np.array([9500.0]))


def test_reddening_dims_by_magnitudes():
    ebv = np.array([0.0, 0.1, 0.3, -0.2, 3.0, 20.0])
    flux = np.linspace(0.2, 1.5, len(ebv) * len(WAVE), dtype=np.float32).reshape(len(ebv), -1)
    expected = flux * 10.0 ** (-0.4 * np.outer(ebv, extinction(WAVE)))
    found = redden(flux, ebv, WAVE)
    np.testing.assert_allclose(found[:4], expected[:4], rtol=3e-7)
    np.testing.assert_allclose(found, expected, rtol=5e-6)
    np.testing.assert_array_equal(found[0], flux[0])
    np.testing.assert_allclose(found.mean(1)[:3], flux.mean(1)[:3], rtol=0.01)


def test_calibration_errors_have_rms_one_in_equal_parts():
    shapes = calibration_basis(WAVE)
    np.testing.assert_allclose((shapes**2).mean(axis=1), 0.25, rtol=1e-12)
    gram = shapes @ shapes.T / len(WAVE)
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-3)
    a = np.random.default_rng(0).standard_normal((20000, 4))
    assert (a @ shapes).std() == pytest.approx(1.0, abs=0.01)
    flux = np.full((3, len(WAVE)), 0.7, np.float32)
    expected = 0.7 * (1 + 0.03 * a[:3] @ shapes)
    np.testing.assert_allclose(calibrate(flux, a[:3], 0.03 * shapes), expected, rtol=3e-7)
    np.testing.assert_array_equal(calibrate(flux, np.zeros((3, 4)), shapes), flux)


def test_shapes_and_types_are_checked():
    flux = np.ones((2, len(WAVE)), np.float32)
    for refused in (
        lambda: doppler(flux.astype(float), np.zeros(2), WAVE),
        lambda: doppler(flux[:, :-1], np.zeros(2), WAVE),
        lambda: doppler(flux, np.zeros(3), WAVE),
        lambda: doppler(flux, np.zeros(2), WAVE, out=np.empty((2, 5), np.float32)),
        lambda: redden(flux, np.zeros(1), WAVE),
        lambda: redden(flux.astype(float), np.zeros(2), WAVE),
        lambda: calibrate(flux, np.zeros((2, 3)), calibration_basis(WAVE)),
        lambda: calibrate(flux[:, 1:], np.zeros((2, 4)), calibration_basis(WAVE)),
        lambda: calibrate(
            flux, np.zeros((2, 4)), calibration_basis(WAVE), out=np.empty_like(flux).T.copy().T
        ),
    ):
        with pytest.raises(MoefastError, match="expected"):
            refused()
