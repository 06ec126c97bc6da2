"""The likelihood of imperfect sky subtraction against dense covariances and against the kernel without it."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from moefast.ceilings.likelihood import VisitLikelihood
from moefast.kernels import gaussian_log_likelihood

P = 60


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    flux = rng.uniform(0.5, 1.5, (7, P)).astype(np.float32)
    weight = rng.uniform(0, 1, P)
    terms = {
        "constant": rng.uniform(0.01, 0.02, P),
        "linear": rng.uniform(0.01, 0.02, P),
        "quadratic": rng.uniform(0.01, 0.02, P),
        "band_weight": weight / weight.sum(),
    }
    return flux, flux[2] + 0.2 * rng.standard_normal(P), 0.3 * rng.standard_normal((3, P)), rng, terms


@pytest.mark.parametrize("lost", [False, True])
def test_equals_the_dense_normal_distribution(problem, lost):
    flux, data, times, rng, terms = problem
    plus = 0.2 * rng.standard_normal((2, P))
    good = np.ones(P, bool)
    if lost:
        good[rng.choice(P, 25, replace=False)] = False
        data[~good] = np.nan
    found = VisitLikelihood(data, good, times, plus, **terms)(flux)
    for f, value in zip(flux.astype(float), found, strict=True):
        m = f @ terms["band_weight"]
        variance = terms["constant"] + m * terms["linear"] * f + m**2 * terms["quadratic"]
        shapes = np.concatenate([f * times, m * plus])
        covariance = (np.diag(variance) + shapes.T @ shapes)[np.ix_(good, good)]
        expected = multivariate_normal(f[good], covariance).logpdf(data[good])
        assert value - 0.5 * good.sum() * np.log(2 * np.pi) == pytest.approx(expected, abs=2e-3)


def test_without_sky_residuals_it_is_the_kernel(problem):
    flux, data, times, rng, terms = problem
    good = rng.random(P) < 0.7
    found = VisitLikelihood(data, good, times, None, **terms)(flux)
    expected = gaussian_log_likelihood(flux, data, basis=times, good=good, **terms)
    np.testing.assert_allclose(found, expected, atol=2e-3)
