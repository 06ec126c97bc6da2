"""The simulator seen as a likelihood agrees with the simulator as a generator."""

from dataclasses import replace

import numpy as np
import pytest

from moefast.kernels import gaussian_log_likelihood
from moefast.simulate import Settings, simulate_rows
from moefast.simulate.emulator import LABELS
from moefast.simulate.forward import SCALE_WIDTH, ForwardModel
from moefast.simulate.noise import SkyFactors
from moefast.simulate.nuisance import calibrate, calibration_basis
from moefast.simulate.rows import simulate_params
from moefast.simulate.sets import REFERENCE_SETS
from moefast.simulate.visit import sky_of

Z0 = Settings()
SURVEY = replace(Z0, velocity_scatter=30.0, reddening=(0.0, 0.3), calibration=0.03)
SETTINGS = {"z0": Z0, "survey": SURVEY, "redshifted": replace(Z0, redshift=(-0.0005, 0.0005))}


def truth(block):
    names = (*LABELS, "redshift", "ebv", "velocity")
    zero = np.zeros(len(block.flux))
    return {name: block.params.get(name, zero) for name in names}


@pytest.mark.parametrize("name", SETTINGS)
def test_flux_and_errors_of_a_row(name):
    settings = SETTINGS[name]
    forward = ForwardModel(settings)
    block = simulate_rows(0, 8, seed=3, settings=settings)
    flux = forward.flux(truth(block))
    expected = flux
    if settings.calibration:
        amplitudes = np.column_stack([block.params[f"calibration_{k + 1}"] for k in range(4)])
        # The file gives them in units of flux, the shapes of the likelihood have unit variance.
        expected = calibrate(flux, amplitudes, forward.calibration_shapes)
    np.testing.assert_allclose(block.flux, expected, atol=3e-6)
    for i in range(8):
        terms = forward.variance_terms(block.params["mag"][i], block.params["seeing"][i])
        level = flux[i] @ terms["band_weight"]
        variance = terms["constant"] + level * terms["linear"] * flux[i] + level**2 * terms["quadratic"]
        np.testing.assert_allclose(np.sqrt(variance), block.error[i], rtol=2e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_coordinates_have_the_prior_of_the_rows(name):
    settings = SETTINGS[name]
    forward = ForwardModel(settings)
    z = np.random.default_rng(0).standard_normal((4000, len(forward.names)))
    drawn = forward.parameters(z)
    block = simulate_rows(0, 4000, seed=1, settings=settings)
    assert forward.names[:5] == LABELS
    for key in forward.names:
        here, there = drawn[key], block.params[key]
        assert here.mean() == pytest.approx(there.mean(), abs=5 * there.std() / np.sqrt(2000))
        assert here.std() == pytest.approx(there.std(), rel=0.06)


@pytest.mark.parametrize("name", SETTINGS)
def test_derivatives_match_finite_differences(name):
    settings = SETTINGS[name]
    forward = ForwardModel(settings)
    z = 0.5 * np.random.default_rng(1).standard_normal((4, len(forward.names)))
    parameters = forward.parameters(z)
    names, slopes = forward.derivatives(parameters)
    assert set(names) == set(forward.names)
    steps = dict(zip(LABELS, (4.0, 0.02, 0.02, 0.02, 0.02), strict=True))
    steps |= {"redshift": 1e-5, "ebv": 0.02, "velocity": 3.0}
    for i, key in enumerate(names):
        step = steps[key]
        higher = forward.flux(parameters | {key: parameters[key] + step}).astype(float)
        lower = forward.flux(parameters | {key: parameters[key] - step}).astype(float)
        expected = (higher - lower) / (2 * step)
        # float32 flux: the difference is good to 1e-7 / step; the curvature over a step to a few per mil.
        limit = 1e-2 * np.abs(expected).max() + 2e-7 / step
        np.testing.assert_allclose(slopes[:, i], expected, atol=limit)


@pytest.mark.parametrize("settings", [Z0, SURVEY], ids=["z0", "survey"])
def test_the_truth_is_the_likeliest_of_many(settings):
    """With a fifth of the noise no other star of twenty comes near."""
    settings = replace(settings, noise_level=0.2)
    forward = ForwardModel(settings)
    block = simulate_rows(0, 20, seed=7, settings=settings)
    flux = forward.flux(truth(block))
    for i in range(20):
        terms = forward.variance_terms(block.params["mag"][i], block.params["seeing"][i])
        found = gaussian_log_likelihood(flux, block.noisy[i], basis=forward.calibration_shapes, **terms)
        assert found.argmax() == i


def test_fixed_labels_have_no_coordinate():
    forward = ForwardModel(replace(Z0, a_m=(0.1, 0.1)))
    assert "a_M" not in forward.names
    assert (forward.parameters(np.zeros((3, 4)))["a_M"] == 0.1).all()


def test_far_draws_count_as_the_limit():
    forward = ForwardModel(SURVEY)
    z = np.zeros((2, len(forward.names)))
    z[:, -1] = [20.0, 40.0]
    flux = forward.flux(forward.parameters(z))
    assert np.isfinite(flux).all()
    np.testing.assert_array_equal(flux[0], flux[1])


def test_wild_rows_are_what_the_likelihood_supposes():
    """Flux, errors and sky residuals of rows whose visits differ, from their parameters."""
    settings = REFERENCE_SETS["wild"].settings
    forward = ForwardModel(settings)
    block = simulate_rows(0, 6, seed=5, settings=settings)
    params = block.params
    assert {"line_spread", "ebv", "velocity"} < set(forward.names)
    flux = forward.flux(
        {name: params[name] for name in (*LABELS, "redshift", "ebv", "velocity", "line_spread")}
    )
    basis = calibration_basis(forward.emulator.wave)
    amplitudes = settings.calibration * np.column_stack([params[f"calibration_{k + 1}"] for k in range(4)])
    amplitudes[:, 0] += params["tilt"] * 0.5 / basis[0, -1]
    sky, left = sky_of(params)
    for i in range(6):
        own = SkyFactors(sky.continuum[i : i + 1], sky.lines[i : i + 1])
        terms = forward.variance_terms(params["mag"][i], params["seeing"][i], own)
        level = flux[i] @ terms["band_weight"]
        shapes = forward.sky_shapes(params["mag"][i], params["seeing"][i], own)
        lit = forward.noise.line_electrons.any(axis=1)
        residual = level * (left[i, lit] / settings.visit.sky_residual) @ shapes
        expected = flux[i] * (1 + amplitudes[i] @ basis) + residual
        np.testing.assert_allclose(block.flux[i] * params["median"][i], expected, atol=1e-5)
        variance = terms["constant"] + level * terms["linear"] * flux[i] + level**2 * terms["quadratic"]
        np.testing.assert_allclose(block.error[i] * params["median"][i], np.sqrt(variance), rtol=5e-5)


def test_prior_widths_of_what_multiplies_wild():
    """Tilt and calibration error add up in the first shape; the scale is the last one and free."""
    settings = REFERENCE_SETS["wild"].settings
    params = simulate_params(0, 2000, seed=5, settings=settings)
    basis = calibration_basis(ForwardModel(settings).emulator.wave)
    first = settings.calibration * params["calibration_1"] + params["tilt"] * 0.5 / basis[0, -1]
    shapes = ForwardModel(settings).calibration_shapes
    assert len(shapes) == 5
    assert shapes[0, -1] / basis[0, -1] == pytest.approx(first.std(), rel=0.06)
    assert (shapes[-1] == SCALE_WIDTH).all()
