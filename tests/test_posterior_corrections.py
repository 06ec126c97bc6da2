"""The study of corrections beside a posterior: it finds what is there, and nothing where there is nothing."""

import numpy as np
import pytest
from click.testing import CliRunner
from made_posterior import random_posterior

from moefast.benchmarks.studies import posterior_corrections as study
from moefast.ops.on_numpy import NumPyArithmetic
from moefast.posterior.forward import cell_products
from moefast.spectra.source import Block

N = 4000


class Stars:
    """Stars of one posterior's pixels, with any errors, in the place of simulated ones."""

    def __init__(self, mixture, error, log_g):
        self.flux = np.repeat(mixture.reference[None], len(error), axis=0)
        self.error, self.log_g = error, log_g

    def blocks(self, n, *, array):
        assert array == "flux"
        for a in range(0, len(self.log_g), n):
            here = slice(a, a + n)
            yield Block(a, 0, self.flux[here], self.error[here], None, {})

    def labels(self, names):
        return {name: self.log_g for name in names}


def draws(wrong, seed):
    """Posterior means that are off by `wrong(features)` standard deviations on average."""
    rng = np.random.default_rng(seed)
    features, sd = rng.standard_normal((N, 5)), rng.uniform(0.1, 0.3, N)
    log_g = rng.uniform(2, 4, N)
    truth = log_g + sd * (wrong(features) + 0.5 * rng.standard_normal(N))
    return study.Draws(features, log_g, sd, truth)


@pytest.fixture(scope="module")
def mixture():
    return random_posterior(p=129, m=9, n=5, t=2, q=2)


@pytest.mark.parametrize("name", study.CORRECTIONS)
def test_a_bias_is_found_and_noise_is_not(name):
    if name == "trees":
        pytest.importorskip("lightgbm")

    def linear(features):
        return 2 * features[:, 0]

    judged = draws(linear, 2)
    correction = study.CORRECTIONS[name](draws(linear, 1))
    possible = np.mean((judged.sd * linear(judged.features)) ** 2) / judged.truth.var()
    gain, error = study.gains(correction, judged, (-9.0, 9.0))
    assert 0.6 * possible < gain < possible + 3 * error
    nothing = study.CORRECTIONS[name](draws(lambda f: 0 * f[:, 0], 1))
    gain, error = study.gains(nothing, draws(lambda f: 0 * f[:, 0], 2), (-9.0, 9.0))
    assert abs(gain) < 0.01 * possible + 3 * error


def test_wiener_coordinates_are_the_best_point_under_the_library(mixture):
    rng = np.random.default_rng(5)
    error = np.sqrt(mixture.noise_shape) * rng.uniform(0.5, 2, (6, 129)).astype(np.float32)
    flux = (mixture.reference + error * rng.standard_normal((6, 129))).astype(np.float32)
    error[2, 40:90] = np.nan
    assert mixture.sizes.cell == 1
    products = cell_products(NumPyArithmetic(mixture.numbers), mixture.sizes)
    found = study.seen(mixture, products, flux, error)[0]
    b = mixture.directions.astype(np.float64)
    for i in range(6):
        good = np.isfinite(error[i])
        a, r = 1 / error[i, good].astype(np.float64) ** 2, mixture.reference[good].astype(np.float64)
        x = flux[i, good].astype(np.float64)
        scale = (a * x * r).sum() / (a * r * r).sum()
        left, right = (
            b[good].T @ (a[:, None] * b[good]) * scale**2,
            b[good].T @ (a * scale**2 * (x / scale - r)),
        )
        point = np.linalg.solve(
            left + mixture.numbers["library_precision"], right + mixture.numbers["library_pull"][:, 0]
        )
        np.testing.assert_allclose(
            found[i, : mixture.n_coordinates], point[: mixture.n_coordinates], atol=1e-4
        )


def test_training_draws_have_the_errors_of_other_stars(mixture):
    rng = np.random.default_rng(6)
    error = np.repeat(rng.uniform(0.05, 0.5, (100, 1)), 129, axis=1).astype(np.float32)
    block = Block(0, 0, np.repeat(mixture.reference[None], 100, axis=0), error, None, {})
    lost = np.zeros(error.shape, bool)
    flux, other, gaps = study._for_training(mixture, block, lost, np.arange(100), rng, 1)
    np.testing.assert_array_equal(flux, block.flux)
    np.testing.assert_array_equal(np.sort(other[:, 0]), np.sort(error[:, 0]))
    assert (other[:, 0] != error[:, 0]).all()
    assert 0.2 < gaps.any(1).mean() < 0.7
    changed = study._with_nuisances(mixture, flux, other, rng)
    assert (changed != flux).any(1).all()
    # What is added lies in the space of the nuisances.
    across = mixture.directions[:, mixture.n_coordinates :].astype(np.float64)
    added = (changed - flux).astype(np.float64).T
    left = added - across @ np.linalg.lstsq(across, added, rcond=None)[0]
    assert np.abs(left).max() < 1e-6


@pytest.mark.parametrize("told", [False, True])
def test_errors_that_tell_log_g_are_noticed(mixture, told):
    rng = np.random.default_rng(7)
    log_g = rng.uniform(1, 5, N)
    level = log_g if told else rng.permutation(log_g)
    error = np.exp(level)[:, None] * np.sqrt(mixture.noise_shape)[None] / 10
    known = study.from_errors_alone(mixture, Stars(mixture, error.astype(np.float32), log_g))
    assert known > 0.5 if told else known < 0.05


def test_the_command_needs_a_posterior():
    result = CliRunner().invoke(study.main, ["survey"])
    assert result.exit_code == 2
    assert "survey is no posterior" in result.output
