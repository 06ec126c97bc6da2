"""The scan over velocities and the step towards the best one, against their equations in float64."""

from __future__ import annotations

from dataclasses import replace

import made_velocities
import numpy as np
import pytest
from made_clouds import mixture, stars
from made_velocities import expected_evidence, expected_step, space_of, stars_of

from moefast.kernels import Slopes, velocity_conclusion, velocity_evidence, velocity_step
from moefast.kernels.reference_velocity import velocity_conclusion_reference
from moefast.posterior.velocities import BETWEEN, FINER, _finer

P = 700


@pytest.mark.parametrize(("n", "n_v", "c"), [(1, 3, 1), (33, 5, 3), (64, 23, 2)])
def test_the_scan_is_its_equations(n, n_v, c):
    templates = made_velocities.templates(n_v=n_v, c=c)
    flux, error = stars_of(templates, n)
    mask = np.random.default_rng(3).random(flux.shape) < 0.1
    flux[0, 50], error[-1, 60] = np.nan, -1.0
    found = velocity_evidence(flux, error, mask, templates)
    np.testing.assert_allclose(found, expected_evidence(templates, flux, error, mask), rtol=2e-5, atol=2e-2)
    assert (found.argmax(1) == 2).mean() > 0.9


def test_no_row_of_the_scan_depends_on_its_neighbours():
    templates = made_velocities.templates()
    flux, error = stars_of(templates, 70)
    whole = velocity_evidence(flux, error, None, templates)
    np.testing.assert_array_equal(velocity_evidence(flux[33:37], error[33:37], None, templates), whole[33:37])
    flux[:33] = np.nan
    np.testing.assert_array_equal(velocity_evidence(flux, error, None, templates)[33:], whole[33:])


def test_a_star_without_pixels_says_nothing():
    templates = made_velocities.templates()
    flux, error = stars_of(templates, 2)
    found = velocity_evidence(flux, error, np.array([[True], [False]]) & np.ones((2, P), bool), templates)
    np.testing.assert_allclose(found[0], 0.0, atol=1e-3)
    assert velocity_evidence(flux[:0], error[:0], None, templates).shape == (0, 5)


def test_scan_of_other_shapes_is_refused():
    templates = made_velocities.templates()
    with pytest.raises(ValueError, match="flux and error of shape"):
        velocity_evidence(np.ones((2, 100)), np.ones((2, 100)), None, templates)
    with pytest.raises(ValueError, match="mask must be bool"):
        velocity_evidence(np.ones((2, P)), np.ones((2, P)), np.zeros((2, P)), templates)


@pytest.mark.parametrize("q", [0, 3])
def test_the_step_is_one_gaussian_over_everything(q):
    mix = mixture(q=q)
    space, slopes = space_of(mix, cell=1)
    flux, error = stars(mix, 37)
    mask = np.random.default_rng(5).random(flux.shape) < 0.2
    step, sigma = velocity_step(flux, error, mask, space, slopes)
    for i in (0, 5, 36):
        want = expected_step(mix, space, slopes, flux[i], error[i], mask[i])
        assert sigma[i] == pytest.approx(want[1], rel=1e-4)
        assert abs(step[i] - want[0]) < 2e-3 * want[1]
    np.testing.assert_array_equal(
        velocity_step(flux[5:6], error[5:6], mask[5:6], space, slopes)[0], step[5:6]
    )


def test_the_step_finds_how_far_a_star_is_off():
    mix = mixture(p=1024)
    space, slopes = space_of(mix, cell=2)
    # Less scatter than the made-up clouds have, whose spectra are far from linear in their scale.
    space = replace(space, precision=25 * space.precision, pull=25 * space.pull)
    rng = np.random.default_rng(1)
    truth = rng.uniform(-0.3, 0.3, 400)
    # Stars and nuisances as the prior has them.
    covariance = np.linalg.inv(space.precision)
    points = rng.multivariate_normal(covariance @ space.pull, covariance, 400)
    clean = mix.reference + points @ mix.directions.T
    change = slopes.of_reference + points @ slopes.of_directions.T
    error = np.broadcast_to(np.sqrt(mix.noise_shape) / 5, clean.shape)
    noise = np.random.default_rng(3).standard_normal(clean.shape)
    step, sigma = velocity_step(clean + truth[:, None] * change + error * noise, error, None, space, slopes)
    pulls = (step - truth) / sigma
    assert np.std(pulls) == pytest.approx(1.0, abs=0.1)
    assert np.mean(pulls) == pytest.approx(0.0, abs=0.15)
    # Far less than what the velocities are: the test could not pass without them.
    assert np.median(sigma) < 0.12


def test_slopes_of_another_space_are_refused():
    mix = mixture()
    space, slopes = space_of(mix, cell=1)
    other = Slopes(slopes.of_reference, slopes.of_directions[:, 1:], mix.n_nuisances)
    with pytest.raises(ValueError, match="slopes of"):
        velocity_step(np.ones((1, 192)), np.ones((1, 192)), None, space, other)


LIMITS = {"near": 30.0, "near_sigmas": 4.0, "wider": 1.2}


@pytest.mark.parametrize("n_v", [3, 4, 101])
def test_the_conclusion_is_its_reference(n_v):
    rng = np.random.default_rng(6)
    n, grid = 70, np.linspace(-200.0, 200.0, n_v)
    velocity, sigma = rng.uniform(-190, 190, n), rng.uniform(0.5, 60, n)
    # Peaks that are narrower and wider than the step says, and some of two.
    width = sigma * rng.choice([0.5, 1.0, 3.0], n)
    evidence = 300 - 0.5 * ((grid - velocity[:, None]) / width[:, None]) ** 2
    second = 300 - 0.5 * ((grid + velocity[:, None]) / width[:, None]) ** 2 - rng.uniform(0, 6, (n, 1))
    evidence = np.where(rng.random((n, 1)) < 0.5, np.logaddexp(evidence, second), evidence)
    fine, log_p = _finer(grid, evidence)
    assert len(fine) == (n_v - 1) * FINER + 1
    found = velocity_conclusion(grid, evidence, velocity, sigma, BETWEEN, **LIMITS)
    expected = [
        velocity_conclusion_reference(fine, *row, *LIMITS.values())
        for row in zip(log_p, velocity, sigma, strict=True)
    ]
    np.testing.assert_allclose(np.array(found).T, expected, rtol=1e-9, atol=1e-9)
    if n_v == 101:
        assert 0.1 < (found[0] != velocity).mean() < 0.9
        assert 0.1 < (found[2] > 0.05).mean() < 0.9
    alone = velocity_conclusion(grid, evidence[40:41], velocity[40:41], sigma[40:41], BETWEEN, **LIMITS)
    np.testing.assert_array_equal(alone, [a[40:41] for a in found])


def test_nothing_is_concluded_from_nothing():
    grid = np.linspace(-50.0, 50.0, 11)
    evidence = np.full((2, 11), np.nan)
    evidence[1] = 0
    found = velocity_conclusion(grid, evidence, np.zeros(2), np.full(2, 3.0), BETWEEN, **LIMITS)
    assert np.isnan(found[2][0])
    # As wide as all velocities that are near: a uniform distribution.
    assert found[1][1] == pytest.approx(60 / np.sqrt(12), rel=0.05)
    with pytest.raises(ValueError, match=r"evidence of shape \(n, 11\)"):
        velocity_conclusion(grid, evidence[:, 1:], np.zeros(2), np.ones(2), BETWEEN, **LIMITS)
