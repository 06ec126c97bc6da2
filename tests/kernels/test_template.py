"""Posterior means over templates: the tiled kernel against its reference, SciPy and scikit-learn; edges; neighbours."""

import numpy as np
import pytest
from scipy.special import logsumexp, softmax
from sklearn.metrics.pairwise import rbf_kernel
from tolerances import assert_close

from moefast.core.errors import BackendError
from moefast.kernels import template_posterior
from moefast.kernels.reference_template import template_posterior_reference

NAMES = ("mean", "log_evidence", "effective")


def library(n, m, r, q=2, seed=0):
    """Stars near templates, with noise of their level."""
    rng = np.random.default_rng(seed + n + 7 * m)
    keys = rng.standard_normal((m, r)) * np.linspace(3, 0.3, r)
    level = rng.uniform(0.3, 3, n)
    z = keys[rng.integers(0, m, n)] + level[:, None] * rng.standard_normal((n, r))
    values = np.column_stack([rng.uniform(1, 5, m), rng.uniform(3750, 6000, m), rng.normal(0, 1, m)])[:, :q]
    return tuple(a.astype(np.float32) for a in (z, level, keys, values))


def assert_posterior(found, expected, factor=1):
    for name, b in zip(NAMES, expected, strict=True):
        a = getattr(found, name)
        assert a.dtype == np.float32
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b), err_msg=name)
        assert_close(np.nan_to_num(a), np.nan_to_num(b), factor=factor)


@pytest.mark.parametrize("free_scale", [False, True])
@pytest.mark.parametrize(
    ("n", "m", "r"), [(0, 5, 3), (1, 1, 1), (31, 255, 4), (64, 256, 5), (65, 257, 48), (131, 1009, 13)]
)
def test_matches_the_reference(n, m, r, free_scale):
    rows = library(n, m, r, q=3)
    found = template_posterior(*rows, free_scale=free_scale)
    assert found.mean.shape == (n, 3)
    # An exponent of order 100 carries a rounding of 1e-5 into the exponential.
    assert_posterior(found, template_posterior_reference(*rows, free_scale=free_scale), factor=3)


def test_scipy_and_scikit_learn_judge_the_reference():
    z, level, keys, values = (a.astype(np.float64) for a in library(40, 300, 6))
    mean, log_evidence, effective = template_posterior_reference(z, level, keys, values)
    exponents = np.array(
        [[-((a - b) ** 2).sum() / (2 * s * s) for b in keys] for a, s in zip(z, level, strict=True)]
    )
    weights = softmax(exponents, axis=1)
    assert_close(mean, weights @ values)
    assert_close(log_evidence, logsumexp(exponents, axis=1) - np.log(len(keys)))
    assert_close(effective, 1 / (weights**2).sum(1))
    # The Nadaraya-Watson estimate with a Gaussian kernel is this posterior mean at one noise level.
    share = rbf_kernel(z, keys, gamma=1 / (2 * 0.9**2))
    estimate = share @ values / share.sum(1, keepdims=True)
    assert_close(template_posterior_reference(z, np.full(40, 0.9), keys, values)[0], estimate)


def test_a_free_scale_is_the_least_squares_fit():
    z, level, keys, values = (a.astype(np.float64) for a in library(5, 40, 6))
    chi2 = np.array([[np.linalg.lstsq(b[:, None], a, rcond=None)[1][0] for b in keys] for a in z])
    weights = softmax(-chi2 / (2 * level[:, None] ** 2), axis=1)
    assert_close(template_posterior_reference(z, level, keys, values, free_scale=True)[0], weights @ values)
    # A template's length says nothing then.
    longer = keys * np.random.default_rng(0).uniform(0.1, 9, (40, 1))
    again = template_posterior(z, level, longer, values, free_scale=True)
    assert_close(again.mean, weights @ values, factor=3)


def test_known_answers():
    keys = np.array([[0.0, 0], [10, 0], [0, 10], [0, 0]])
    found = template_posterior([[0.0, 0], [10, 0]], [0.1, 0.1], keys, [1.0, 2, 3, 4])
    assert_close(found.mean, [[2.5], [2.0]])
    assert_close(found.effective, [2.0, 1.0])
    assert_close(found.log_evidence, np.log([0.5, 0.25]))
    # A template of length zero has χ² = ‖z‖².
    free = template_posterior([[3.0, 4]], [5.0], [[0.0, 0], [0, 0]], [1.0, 3], free_scale=True)
    assert_close(free.mean, [[2.0]])
    assert_close(free.log_evidence, [-0.5])


@pytest.mark.parametrize("free_scale", [False, True])
def test_bright_stars_keep_their_exponents(free_scale):
    """Stars a thousand times their noise: a float32 product would be off by more than one unit of the exponent."""
    rng = np.random.default_rng(5)
    keys = (1000 * rng.standard_normal((1, 12)) + 0.5 * rng.standard_normal((500, 12))).astype(np.float32)
    z = (keys[:60] + 0.5 * rng.standard_normal((60, 12))).astype(np.float32)
    level, values = np.full(60, 0.5, np.float32), rng.uniform(1, 5, 500).astype(np.float32)
    expected = template_posterior_reference(z, level, keys, values, free_scale=free_scale)
    product = (z**2).sum(1)[:, None] + (keys**2).sum(1) - 2 * z @ keys.T
    exact = ((z[:, None].astype(np.float64) - keys) ** 2).sum(2)
    assert np.abs(product - exact).max() / (2 * 0.5**2) > 1
    found = template_posterior(z, level, keys, values, free_scale=free_scale)
    if not free_scale:
        assert_posterior(found, expected, factor=3)
    else:
        # Scaled templates of length 1 are rounded to float32, 6e-8 of 1000 noise levels.
        np.testing.assert_allclose(found.mean, expected[0], rtol=2e-3)


@pytest.mark.parametrize("free_scale", [False, True])
def test_a_row_has_the_same_bits_alone_and_bad_rows_keep_to_themselves(free_scale):
    z, level, keys, values = library(200, 700, 7)
    clean = template_posterior(z, level, keys, values, free_scale=free_scale)
    spoiled, levels = z.copy(), level.copy()
    spoiled[3, 2], spoiled[70], levels[71], levels[72], levels[73] = np.nan, np.inf, 0, -1, np.nan
    found = template_posterior(spoiled, levels, keys, values, free_scale=free_scale)
    bad = [3, 70, 71, 72, 73]
    for name in NAMES:
        assert np.isnan(getattr(found, name)[bad]).all()
        good = np.setdiff1d(np.arange(200), bad)
        np.testing.assert_array_equal(getattr(found, name)[good], getattr(clean, name)[good])
    for i in (0, 63, 64, 129, 199):
        alone = template_posterior(z[i : i + 1], level[i : i + 1], keys, values, free_scale=free_scale)
        for name in NAMES:
            np.testing.assert_array_equal(getattr(alone, name)[0], getattr(clean, name)[i])


def test_any_layout_gives_the_same_bits():
    z, level, keys, values = library(30, 90, 6)
    expected = template_posterior(z, level, keys, values)
    wide = np.zeros((60, 18), np.float32)
    wide[::2, ::3] = z
    for same in (np.asfortranarray(z), wide[::2, ::3], z.astype(np.float64)):
        found = template_posterior(same, level, np.asfortranarray(keys), values[::1])
        for name in NAMES:
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    one = template_posterior(z, level, keys, values[:, 0])
    np.testing.assert_array_equal(one.mean[:, 0], expected.mean[:, 0])


def test_stars_far_from_all_templates_have_an_answer_or_none():
    far = template_posterior([[1e5]], [1.0], [[0.0], [1.0]], [1.0, 2.0])
    assert_posterior(far, template_posterior_reference([[1e5]], [1.0], [[0.0], [1.0]], [1.0, 2.0]))
    beyond = template_posterior([[1e30]], [1.0], [[0.0], [1.0]], [1.0, 2.0])  # χ² does not fit float32
    assert np.isnan(beyond.mean).all()
    assert np.isnan(beyond.log_evidence).all()
    for z, level in ((1e300, 1.0), (1.0, 1e-30), (1.0, 1e300)):
        assert np.isnan(template_posterior([[z]], [level], [[0.0], [1.0]], [1.0, 2.0]).mean).all()


def test_arguments_are_checked():
    z, level, keys, values = library(4, 9, 3)
    with pytest.raises(ValueError, match=r"z \(n, r\) and keys \(m, r\) expected"):
        template_posterior(z[:, 1:], level, keys, values)
    with pytest.raises(ValueError, match="values of 9 templates, at least one, expected"):
        template_posterior(z, level, keys, values[1:])
    with pytest.raises(ValueError, match="values of 0 templates"):
        template_posterior(z, level, keys[:0], values[:0])
    with pytest.raises(ValueError, match=r"level of shape \(4,\) expected"):
        template_posterior(z, level[1:], keys, values)
    keys[5, 1] = np.nan
    with pytest.raises(ValueError, match="keys must be finite; template 5 is not"):
        template_posterior(z, level, keys, values)
    with pytest.raises(BackendError, match="'gpu' is unknown to the kernels"):
        template_posterior(z, level, keys, values, backend="gpu")
