"""The Bayes ceiling of a linear-Gaussian problem is known in closed form."""

import numpy as np
import pytest

from moefast.ceilings import bayes
from moefast.ceilings.summary import rank_statistics
from moefast.simulate import Settings
from moefast.simulate.emulator import LABELS

P, SIGMA, STARS = 80, 1.5, 120


class LinearModel:
    """x = 1 + A z + σ ε with z ~ N(0, I₅) and log g = 3 + z₁: the posterior of every star is normal."""

    names = LABELS
    uniform = dict.fromkeys(LABELS, (0.0, 1.0))

    settings = Settings(mag=(-1.0, 1.0))

    def __init__(self, shapes=None):
        rng = np.random.default_rng(0)
        self.matrix = 0.1 * rng.standard_normal((5, P))
        self.matrix[1] += self.matrix[0]
        self.calibration_shapes = shapes

    def parameters(self, z):
        values = {name: z[:, i] for i, name in enumerate(LABELS)}
        return values | {"log_g": 3 + z[:, 1]}

    def flux(self, parameters):
        z = np.column_stack([parameters[name] for name in LABELS])
        z[:, 1] -= 3
        return (1 + z @ self.matrix).astype(np.float32)

    def variance_terms(self, mag, seeing):
        zero = np.zeros(P)
        constant = np.full(P, 10 ** (0.4 * mag) * SIGMA**2)
        return {"constant": constant, "linear": zero, "quadratic": zero, "band_weight": np.full(P, 1 / P)}


@pytest.fixture(scope="module")
def toy():
    """Stars of the toy with their posteriors, found and in closed form."""
    model = LinearModel()
    rng = np.random.default_rng(1)
    z = rng.standard_normal((STARS, 5))
    mag = rng.uniform(-2, 1, STARS)
    sigma = SIGMA * 10 ** (0.2 * mag)
    truth = model.parameters(z)
    data = model.flux(truth) + sigma[:, None] * rng.standard_normal((STARS, P))
    error = np.repeat(sigma[:, None], P, axis=1)
    covariance = np.stack([np.linalg.inv(np.eye(5) + model.matrix @ model.matrix.T / s**2) for s in sigma])
    mean = np.einsum("nij,nj->ni", covariance, (data - 1) @ model.matrix.T / sigma[:, None] ** 2)
    library = bayes.TemplateLibrary.draw(model, size=8192)

    def run(rows, **options):
        chosen = {name: values[rows] for name, values in truth.items()}
        return bayes.posteriors(
            model, library, rows, data[rows], error[rows], mag[rows], np.ones(len(rows)), chosen, **options
        )

    return run, run(np.arange(STARS)), 3 + mean[:, 1], np.sqrt(covariance[:, 1, 1]), truth


def test_means_and_deviations_of_every_star(toy):
    _, found, mean, sd, _ = toy
    assert (found.ess >= bayes.TARGET_ESS).all()
    pulls = (found.mean - mean) / found.monte_carlo_error
    assert np.abs(pulls).max() < 4.5
    assert 0.8 < pulls.std() < 1.25
    # A standard deviation from 300 effective draws is good to 1/√600 = 4 %.
    np.testing.assert_allclose(found.sd, sd, rtol=0.2)
    assert np.mean(found.sd / sd) == pytest.approx(1, abs=0.015)


def test_ceiling_equals_its_closed_form(toy):
    _, found, _, sd, _ = toy
    # Prior variance of log g is 1: R² = 1 − E[Var].
    assert 0.2 < (sd**2).mean() < 0.8
    assert (found.sd**2).mean() == pytest.approx((sd**2).mean(), rel=0.02)


def test_ranks_of_the_truth_are_uniform(toy):
    _, found, _, _, _ = toy
    for i in range(5):
        assert rank_statistics(found.rank[:, i])["ks_p"] > 0.005


def test_a_wrong_likelihood_shows_in_the_ranks(toy):
    """The test can fail: with noise supposed three times too small the truth lies in the tails."""
    _, _, mean, sd, truth = toy
    rng = np.random.default_rng(0)
    draws = mean + sd / 3 * rng.standard_normal((500, STARS))
    ranks = (draws < truth["log_g"]).mean(axis=0)
    assert rank_statistics(ranks)["chi2_p"] < 1e-6


def test_a_star_does_not_depend_on_its_block_or_the_threads(toy):
    run, found, _, _, _ = toy
    rows = np.array([17, 3, 55])
    alone = run(rows, threads=1)
    np.testing.assert_array_equal(alone.mean, found.mean[rows])
    np.testing.assert_array_equal(alone.ess, found.ess[rows])


def test_bad_pixels_count_for_nothing(toy):
    """Half of the pixels lost: the posterior widens as if they were not there."""
    model = LinearModel()
    rng = np.random.default_rng(5)
    z = rng.standard_normal((4, 5))
    truth = model.parameters(z)
    data = model.flux(truth) + SIGMA * rng.standard_normal((4, P))
    good = np.ones((4, P), bool)
    good[:, ::2] = False
    data[:, ::2] = np.nan
    library = bayes.TemplateLibrary.draw(model, size=8192)
    zero = np.zeros(4)
    found = bayes.posteriors(
        model, library, np.arange(4), data, np.full((4, P), SIGMA), zero, zero + 1, truth, good=good
    )
    half = model.matrix[:, 1::2]
    covariance = np.linalg.inv(np.eye(5) + half @ half.T / SIGMA**2)
    mean = 3 + ((data[:, 1::2] - 1) @ half.T / SIGMA**2 @ covariance)[:, 1]
    np.testing.assert_allclose(found.sd, np.sqrt(covariance[1, 1]), rtol=0.2)
    assert (np.abs(found.mean - mean) < 5 * found.monte_carlo_error).all()
