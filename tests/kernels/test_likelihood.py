"""Log-likelihood kernel against the dense Gaussian density, and that against SciPy."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from moefast.kernels import gaussian_log_likelihood
from moefast.kernels import reference_likelihood as reference


def problem(n, p, seed=0, n_shapes=0):
    rng = np.random.default_rng(seed)
    flux = (1 + 0.3 * rng.standard_normal((n, p))).astype(np.float32)
    terms = {
        "constant": 0.01 + 0.01 * rng.random(p),
        "linear": 0.02 * rng.random(p),
        "quadratic": 0.05 * rng.random(p),
        "band_weight": rng.dirichlet(np.ones(p)),
    }
    if n_shapes:
        terms["basis"] = 0.05 * rng.standard_normal((n_shapes, p))
    data = flux[0] + 0.2 * rng.standard_normal(p)
    return flux, data, terms


def test_reference_is_the_normal_density():
    flux, data, terms = problem(3, 20, n_shapes=2)
    found = reference.gaussian_log_likelihood(flux, data, **terms)
    for i, f in enumerate(flux.astype(float)):
        mean = f @ terms["band_weight"]
        variance = (
            terms["constant"] + mean * terms["linear"] * np.maximum(f, 0) + mean**2 * terms["quadratic"]
        )
        shaped = terms["basis"] * f
        law = multivariate_normal(f, np.diag(variance) + shaped.T @ shaped)
        assert found[i] == pytest.approx(law.logpdf(data) + 10 * np.log(2 * np.pi), rel=1e-10)


@pytest.mark.parametrize("p", [1, 15, 16, 17, 255, 256, 257, 509])
@pytest.mark.parametrize("n_shapes", [0, 1, 4])
def test_kernel_agrees_with_the_reference(p, n_shapes):
    flux, data, terms = problem(5, p, seed=p, n_shapes=n_shapes)
    expected = reference.gaussian_log_likelihood(flux, data, **terms)
    found = gaussian_log_likelihood(flux, data, **terms)
    # float32 pixels: each term of chi² is good to 1e-6 of itself.
    np.testing.assert_allclose(
        found, expected, rtol=3e-6, atol=3e-6 * (p + (data - flux).std() ** 2 * p / 0.01)
    )


def test_terms_may_be_absent():
    flux, data, terms = problem(4, 100)
    for keep in (("constant",), ("constant", "linear"), ("constant", "quadratic", "band_weight")):
        some = {name: terms[name] for name in keep}
        np.testing.assert_allclose(
            gaussian_log_likelihood(flux, data, **some),
            reference.gaussian_log_likelihood(flux, data, **some),
            rtol=1e-5,
        )


def test_bad_pixels_count_for_nothing():
    flux, data, terms = problem(6, 300, n_shapes=3)
    good = np.random.default_rng(3).random(300) > 0.3
    spoilt, broken = data.copy(), {key: np.array(value) for key, value in terms.items()}
    spoilt[~good] = np.nan
    broken["constant"][~good] = np.inf
    expected = reference.gaussian_log_likelihood(flux, data, good=good, **terms)
    np.testing.assert_allclose(
        gaussian_log_likelihood(flux, spoilt, good=good, **broken), expected, rtol=1e-5
    )


def test_a_row_does_not_depend_on_its_neighbours():
    flux, data, terms = problem(33, 500, n_shapes=2)
    together = gaussian_log_likelihood(flux, data, **terms)
    alone = [gaussian_log_likelihood(flux[i : i + 1], data, **terms)[0] for i in range(33)]
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(gaussian_log_likelihood(flux[::3], data, **terms), together[::3])


def test_no_rows():
    flux, data, terms = problem(2, 50)
    assert gaussian_log_likelihood(flux[:0], data, **terms).shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": np.zeros(3)}, r"data: expected shape \(50,\)"),
        ({"constant": np.full(50, -1.0)}, "pixel 0 has"),
        ({"basis": np.zeros((2, 3))}, r"basis: expected shape \(k, 50\)"),
        ({"out": np.zeros(2, np.float32)}, "out: expected float64"),
        ({"data": np.full(50, np.nan)}, "pixel 0 is not finite"),
    ],
)
def test_bad_arguments_are_named(change, message):
    flux, data, terms = problem(2, 50)
    with pytest.raises(ValueError, match=message):
        gaussian_log_likelihood(**{"flux": flux, "data": data, **terms, **change})


def test_flux_must_be_float32():
    flux, data, terms = problem(2, 50)
    with pytest.raises(ValueError, match="float32"):
        gaussian_log_likelihood(flux.astype(float), data, **terms)
