"""Adaptive importance sampling against posteriors that are known in closed form."""

import numpy as np
import pytest
from scipy.stats import kstest

from moefast.ceilings.posterior import effective_sample_size, sample_posterior

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


def bent_problem(noise, bend, seed):
    """A linear problem in u, seen through z_1 = u_1 + b (u_0² − 1), z_3 = u_3 + b u_2²: moments of u are known."""
    _, _, covariance, straight = linear_problem(7, noise, seed)

    def unbent(z):
        u = z.copy()
        u[:, 1] -= bend * (z[:, 0] ** 2 - 1)
        u[:, 3] -= bend * z[:, 2] ** 2
        return u

    def log_likelihood(z):
        # The prior of the sampler is that of z, the one of the problem that of u.
        u = unbent(z)
        return straight(u) + 0.5 * (z**2 - u**2).sum(axis=1)

    return covariance, unbent, log_likelihood


def variance_ratios(noise, bend, seeds):
    """Variances found over true ones, shape (seeds, 7)."""
    ratios = []
    for seed in range(seeds):
        covariance, unbent, log_likelihood = bent_problem(noise, bend, seed)
        found = sample_posterior(
            log_likelihood,
            LIBRARY[7],
            log_likelihood(LIBRARY[7]),
            np.random.default_rng(seed),
            target_ess=250,
        )
        u = unbent(found.z)
        ratios.append([found.variance(u[:, i]) / covariance[i, i] for i in range(7)])
    return np.array(ratios)


def test_variances_are_right_on_average():
    """Draws that shape the proposals lie on the peaks of their own kernels: with them variances are 1.8 % too large."""
    ratios = variance_ratios(noise=10.0, bend=0.0, seeds=60)
    error = ratios.mean(axis=1).std() / np.sqrt(60)
    assert error < 0.004
    assert ratios.mean() == pytest.approx(1, abs=0.009)


def test_wings_of_a_bent_sheet_are_not_lost():
    """Stopped at the first sufficient effective sample size, the variance along the bend was 0.83 of the true one."""
    ratios = variance_ratios(noise=1.0, bend=0.5, seeds=16)
    assert ratios[:, :2].mean() > 0.89
    assert ratios[:, 2:].mean() == pytest.approx(1, abs=0.05)


def test_counted_draws_are_independent_of_those_that_shaped_the_proposals():
    seen = []
    _, _, _, likelihood = linear_problem(5, 3.0, seed=1)

    def log_likelihood(z):
        seen.append(z)
        return likelihood(z)

    found = sample_posterior(
        log_likelihood, LIBRARY[5], likelihood(LIBRARY[5]), np.random.default_rng(0), batch=200
    )
    assert max(map(len, seen)) <= 200
    everything = np.concatenate(seen)
    assert found.n_likelihoods == len(everything) > len(found.z)
    # The last ones drawn, whose likelihoods take part in no proposal.
    np.testing.assert_array_equal(found.z, everything[-len(found.z) :])


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
