"""Adaptive importance sampling against posteriors that are known in closed form."""

import numpy as np
import pytest
from scipy.stats import kstest

from moefast.protocol.posterior import effective_sample_size, sample_posterior

N_DATA = 30


def linear_problem(d, noise, seed):
    """x = A z + noise ε with z ~ N(0, I): the posterior is normal with the precision I + AᵀA/noise²."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((N_DATA, d))
    # Two directions that the data hardly tell apart.
    matrix[:, 1] = 0.9 * matrix[:, 0] + 0.1 * matrix[:, 1]
    truth = rng.standard_normal(d)
    data = matrix @ truth + noise * rng.standard_normal(N_DATA)
    covariance = np.linalg.inv(np.eye(d) + matrix.T @ matrix / noise**2)
    mean = covariance @ matrix.T @ data / noise**2

    def log_likelihood(z):
        return -0.5 * ((data - z @ matrix.T) ** 2).sum(axis=1) / noise**2

    return truth, mean, covariance, log_likelihood


LIBRARY = {d: np.random.default_rng(d).standard_normal((16384, d)) for d in (2, 5, 7)}


@pytest.mark.parametrize("d", [2, 5, 7])
@pytest.mark.parametrize("noise", [30.0, 3.0, 0.3])
def test_normal_posterior(d, noise):
    _, mean, covariance, log_likelihood = linear_problem(d, noise, seed=d)
    found = sample_posterior(
        log_likelihood, LIBRARY[d], log_likelihood(LIBRARY[d]), np.random.default_rng(1), target_ess=2000
    )
    assert found.ess >= 2000
    assert found.weights.sum() == pytest.approx(1.0)
    for i in range(d):
        values = found.z[:, i]
        # Four standard errors of each; those of a variance are √(2/ESS) of it.
        assert abs(found.mean(values) - mean[i]) < 4 * found.monte_carlo_error(values)
        assert found.variance(values) == pytest.approx(covariance[i, i], rel=4 * np.sqrt(2 / found.ess))
        assert found.monte_carlo_error(values) < 2 * np.sqrt(covariance[i, i] / found.ess)


def test_ranks_of_the_truth_are_uniform_and_errors_are_as_stated():
    ranks, pulls = [], []
    for seed in range(150):
        truth, mean, _, log_likelihood = linear_problem(5, 2.0, seed)
        found = sample_posterior(
            log_likelihood, LIBRARY[5], log_likelihood(LIBRARY[5]), np.random.default_rng(seed)
        )
        values = found.z[:, 0]
        ranks.append(found.rank(values, truth[0]))
        pulls.append((found.mean(values) - mean[0]) / found.monte_carlo_error(values))
    assert kstest(ranks, "uniform").pvalue > 0.01
    assert 0.8 < np.std(pulls) < 1.25


def test_two_modes_are_both_found():
    """|z_0| is measured, its sign is not."""

    def log_likelihood(z):
        return -0.5 * ((np.abs(z[:, 0]) - 1.5) ** 2 / 0.05**2 + z[:, 1:].sum(axis=1) ** 2 / 0.1**2)

    found = sample_posterior(
        log_likelihood, LIBRARY[5], log_likelihood(LIBRARY[5]), np.random.default_rng(3), target_ess=1000
    )
    assert found.mean((found.z[:, 0] > 0).astype(float)) == pytest.approx(0.5, abs=0.07)
    assert found.mean(np.abs(found.z[:, 0])) == pytest.approx(1.5, abs=0.02)


def test_a_curved_sheet():
    """z_1 = z_0² up to 0.05: one normal kernel for all would waste nearly every draw."""

    def log_likelihood(z):
        return -0.5 * (z[:, 1] - z[:, 0] ** 2) ** 2 / 0.05**2

    start = LIBRARY[2]
    found = sample_posterior(
        log_likelihood, start, log_likelihood(start), np.random.default_rng(4), target_ess=1000
    )
    grid = np.linspace(-4, 4, 4001)
    density = np.exp(-0.5 * grid**2 - 0.5 * grid**4 / (1 + 0.05**2))
    expected = (grid**2 * density).sum() / density.sum()
    assert found.mean(found.z[:, 0] ** 2) == pytest.approx(expected, rel=0.06)


def test_poor_start_costs_draws_not_truth():
    _, mean, covariance, log_likelihood = linear_problem(5, 3.0, seed=9)
    misled = -0.5 * ((LIBRARY[5] - mean - 1.0) ** 2).sum(axis=1) / 0.3**2
    found = sample_posterior(log_likelihood, LIBRARY[5], misled, np.random.default_rng(5), target_ess=1000)
    np.testing.assert_allclose(
        found.weights @ found.z, mean, atol=5 * np.sqrt(np.diag(covariance) / 1000).max()
    )


def test_giving_up_shows_in_the_effective_sample_size():
    _, _, _, log_likelihood = linear_problem(7, 1e-4, seed=2)
    found = sample_posterior(
        log_likelihood, LIBRARY[7], log_likelihood(LIBRARY[7]), np.random.default_rng(6), max_batches=2
    )
    assert found.ess < 200
    assert found.n_likelihoods == 1024


def test_effective_sample_size():
    assert effective_sample_size(np.zeros(10)) == pytest.approx(10)
    assert effective_sample_size(np.array([0.0, -1e9, -np.inf])) == pytest.approx(1)
    assert effective_sample_size(np.full(3, -np.inf)) == 0
    assert effective_sample_size(np.empty(0)) == 0
