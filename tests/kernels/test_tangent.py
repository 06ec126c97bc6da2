"""Posteriors over Gaussian clouds: the kernel against its reference, SciPy and conditional Gaussians; edges."""

from dataclasses import replace

import numpy as np
import pytest
from clouds import clouds, stars_of
from scipy.special import logsumexp, softmax
from scipy.stats import multivariate_normal
from tolerances import assert_close

from moefast.core.errors import BackendError
from moefast.kernels import Library, tangent_posterior, template_posterior
from moefast.kernels.reference_tangent import tangent_posterior_reference
from moefast.kernels.tangent import BLOCK, STEP

NAMES = ("mean", "sd", "log_evidence", "effective")


def assert_posterior(found, expected, factor=1):
    for name, b in zip(NAMES, expected, strict=True):
        a = getattr(found, name)
        assert a.dtype == np.float32
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b), err_msg=name)
        np.testing.assert_array_equal(a == -np.inf, b == -np.inf, err_msg=name)
        finite = np.isfinite(b)
        assert_close(a[finite], b[finite], factor=factor)


@pytest.mark.parametrize(
    ("n", "m", "r", "t", "first"),
    [
        (0, 5, 3, 1, None),
        (1, 1, 1, 1, None),
        (BLOCK - 1, 7, STEP - 1, 2, [0, 3, 7]),
        (BLOCK, 16, STEP, 3, [0, 0, 16]),
        (BLOCK + 1, 17, STEP + 1, STEP, [0, 16, 17, 17]),
        (2 * BLOCK, 31, 13, STEP + 1, [0, 1, 2, 31]),
        (131, 101, 48, 8, [0, 0, 20, 47, 47, 101]),
        (37, 40, 61, 0, [0, 11, 40]),
    ],
)
def test_matches_the_reference(n, m, r, t, first):
    library = clouds(m, r, t, first)
    z, level = stars_of(library, n)
    found = tangent_posterior(z, level, library)
    assert found.mean.shape == (n, library.n_experts)
    # An exponent of order 100 carries a rounding of 1e-5 into the exponential.
    assert_posterior(found, tangent_posterior_reference(z, level, library), factor=4)


def test_scipy_and_the_conditional_gaussian_judge_the_reference():
    library = clouds(12, 6, 2, [0, 4, 4, 12])
    z, log_level = stars_of(library, 30)
    exponents, means, variances = np.empty((3, 30, 12))
    for j in range(12):
        q = library.tangents[j].astype(np.float64)
        # The tangents are orthonormal to float32 only.
        q = np.linalg.svd(q, full_matrices=False)
        q = q[0] @ q[2]
        beyond = np.eye(6) - q.T @ q
        covariance = (q.T * library.variances[j]) @ q + library.rest[j] * beyond
        cross = q.T @ library.gains[j]
        for i in range(30):
            whole = covariance + np.exp(2 * np.float64(log_level[i])) * np.eye(6)
            exponents[i, j] = (
                library.log_weights[j]
                + multivariate_normal.logpdf(z[i], library.keys[j], whole)
                + 3 * np.log(2 * np.pi)
            )
            means[i, j] = library.log_g[j] + cross @ np.linalg.solve(whole, z[i] - library.keys[j])
            variances[i, j] = library.scatter[j] - cross @ np.linalg.solve(whole, cross)
    assert (variances > 0).all()
    mean, sd, log_evidence, effective = tangent_posterior_reference(z, log_level, library)
    for expert, here in ((0, slice(0, 4)), (2, slice(4, 12))):
        weights = softmax(exponents[:, here], axis=1)
        expected = (weights * means[:, here]).sum(1)
        square = (weights * (variances[:, here] + means[:, here] ** 2)).sum(1)
        # The tangents above are those of the library up to their float32 rounding.
        assert_close(mean[:, expert], expected, made_in=np.float32)
        assert_close(sd[:, expert], np.sqrt(square - expected**2), made_in=np.float32)
        assert_close(log_evidence[:, expert], logsumexp(exponents[:, here], axis=1), made_in=np.float32)
    assert_close(effective, 1 / (softmax(exponents, axis=1) ** 2).sum(1), made_in=np.float32)
    assert np.isnan(mean[:, 1]).all()
    assert (log_evidence[:, 1] == -np.inf).all()


@pytest.mark.parametrize("t", [0, 3])
def test_clouds_without_extent_are_templates(t):
    plain = clouds(50, 10, t)
    library = replace(
        plain, variances=0 * plain.variances, gains=0 * plain.gains, rest=0 * plain.rest,
        log_weights=np.full(50, -np.log(50)),
    )  # fmt: skip
    z, level = stars_of(library, 70)
    expected = template_posterior(z, np.exp(level), library.keys, library.log_g)
    found = tangent_posterior(z, level, library)
    assert_close(found.mean, expected.mean, factor=3)
    assert_close(found.log_evidence[:, 0], expected.log_evidence - 10 * level, factor=3)
    assert_close(found.effective, expected.effective, factor=3)


def test_known_answers():
    # One cloud along x, of variance 3, seen with noise of variance 1: the regression of log g shrinks by 3/4.
    library = Library(
        keys=[[1.0, 0]], tangents=[[[1.0, 0]]], variances=[[3.0]], gains=[[0.6]], rest=[0.0], log_weights=[0.0],
        log_g=[2.0], scatter=[0.2], first=[0, 1],
    )  # fmt: skip
    found = tangent_posterior([[3.0, 1.0]], [0.0], library)
    assert_close(found.mean, [[2.0 + 0.6 * 2 / 4]])
    assert_close(found.sd, [[np.sqrt(0.2 - 0.36 / 4)]])
    assert_close(found.log_evidence, [[-0.5 * (1 + 4 / 4 + np.log(4.0))]])
    assert_close(found.effective, [1.0])
    # Of two equal clouds the mean is between, and their distance is part of the scatter.
    two = Library(
        keys=np.zeros((2, 1)), tangents=np.zeros((2, 1, 1)), variances=np.ones((2, 1)), gains=np.zeros((2, 1)),
        rest=np.ones(2), log_weights=np.log([0.5, 0.5]), log_g=[1.0, 5.0], scatter=[0.0, 0.0], first=[0, 2],
    )  # fmt: skip
    found = tangent_posterior([[0.0]], [0.0], two)
    assert_close([found.mean[0, 0], found.sd[0, 0], found.effective[0]], [3.0, 2.0, 2.0], made_in=np.float32)
    assert_close(found.log_evidence, [[-0.5 * np.log(2.0)]])
    # Tangents that are not there, with the variance of the rest, change nothing.
    assert_posterior(found, tangent_posterior_reference([[0.0]], [0.0], replace(
        two, tangents=np.zeros((2, 0, 1)), variances=np.zeros((2, 0)), gains=np.zeros((2, 0)))))  # fmt: skip


def test_bright_stars_keep_their_exponents():
    """Stars a thousand times their noise: a float32 product would be off by more than one unit of the exponent."""
    library = clouds(60, 12, 2, [0, 30, 60], spread=0.3)
    rng = np.random.default_rng(1)
    far = replace(library, keys=library.keys + 300 * rng.standard_normal(12).astype(np.float32))
    z, _ = stars_of(far, 80)
    level = np.full(80, np.log(0.27), np.float32)
    product = (z**2).sum(1)[:, None] + (far.keys**2).sum(1) - 2 * z @ far.keys.T
    exact = ((z[:, None].astype(np.float64) - far.keys) ** 2).sum(2)
    assert np.abs(product - exact).max() / (2 * 0.27**2) > 1
    assert_posterior(tangent_posterior(z, level, far), tangent_posterior_reference(z, level, far), factor=4)


def test_a_narrow_posterior_far_from_all_means_keeps_its_width():
    """sd² is 1e-6 of (mean − log g of the clouds)²: the difference of two moments would lose it."""
    library = replace(clouds(8, 5, 2), gains=np.full((8, 2), 30.0), scatter=np.full(8, 1e3))
    z, _ = stars_of(library, 40)
    level = np.full(40, -4.0, np.float32)
    expected = tangent_posterior_reference(z, level, library)
    assert (expected[1] < np.abs(expected[0] - library.log_g.mean()))[:, 0].any()
    assert_posterior(tangent_posterior(z, level, library), expected, factor=4)


def test_a_row_has_the_same_bits_alone_and_bad_rows_keep_to_themselves():
    library = clouds(90, 7, 3, [0, 40, 40, 90])
    z, level = stars_of(library, 300)
    clean = tangent_posterior(z, level, library)
    spoiled, levels = z.copy(), level.copy()
    spoiled[3, 2], spoiled[70], spoiled[74, 0] = np.nan, np.inf, 1e30
    levels[71], levels[72], levels[73] = np.nan, np.inf, -np.inf
    found = tangent_posterior(spoiled, levels, library)
    bad = [3, 70, 71, 72, 73, 74]
    for name in NAMES:
        assert np.isnan(getattr(found, name)[bad]).all()
        good = np.setdiff1d(np.arange(300), bad)
        np.testing.assert_array_equal(getattr(found, name)[good], getattr(clean, name)[good])
    for i in (0, BLOCK - 1, BLOCK, 129, 299):
        alone = tangent_posterior(z[i : i + 1], level[i : i + 1], library)
        for name in NAMES:
            np.testing.assert_array_equal(getattr(alone, name)[0], getattr(clean, name)[i])


def test_any_layout_gives_the_same_bits():
    library = clouds(20, 6, 2)
    z, level = stars_of(library, 30)
    expected = tangent_posterior(z, level, library)
    wide = np.zeros((60, 18), np.float32)
    wide[::2, ::3] = z
    turned = replace(
        library, keys=np.asfortranarray(library.keys), tangents=np.asfortranarray(library.tangents)
    )
    for same in (np.asfortranarray(z), wide[::2, ::3], z.astype(np.float64)):
        found = tangent_posterior(same, level, turned)
        for name in NAMES:
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_stars_far_from_all_clouds_have_an_answer_or_no_evidence():
    library = clouds(30, 5, 2, [0, 10, 30])
    z, level = np.full((1, 5), 1e4, np.float32), np.array([-1.0], np.float32)
    found, expected = tangent_posterior(z, level, library), tangent_posterior_reference(z, level, library)
    assert_close(found.log_evidence, expected[2], factor=4)
    assert np.isfinite(found.mean).all()
    # χ² does not fit float32.
    library = replace(
        library, variances=0 * library.variances, gains=0 * library.gains, rest=0 * library.rest
    )
    beyond = tangent_posterior([[1e14] * 5], [-20.0], library)
    assert (beyond.log_evidence == -np.inf).all()
    assert np.isnan(beyond.mean).all()
    assert np.isnan(beyond.effective).all()
    # Levels whose square does not fit.
    for extreme in (-25.0, 20.0, 300.0):
        assert np.isnan(tangent_posterior([[0.0] * 5], [extreme], library).log_evidence).all()
    # Far clouds of one expert leave the other alone.
    near = replace(library, keys=np.where(np.arange(30)[:, None] < 10, library.keys, np.float32(9e14)))
    found = tangent_posterior(library.keys[:1], [-15.0], near)
    assert np.isfinite(found.mean[0, 0])
    assert found.log_evidence[0, 1] == -np.inf


def test_wide_ranges_of_variances_neither_overflow_nor_vanish():
    library = clouds(6, 30, 24)
    wild = replace(library, variances=np.logspace(-12, 12, 6 * 24).reshape(6, 24), rest=np.zeros(6))
    z, _ = stars_of(library, 5)
    for log_level in (-9.0, 0.0, 9.0):
        level = np.full(5, log_level, np.float32)
        found, expected = tangent_posterior(z, level, wild), tangent_posterior_reference(z, level, wild)
        assert_close(found.log_evidence, expected[2], factor=4)


def test_arguments_are_checked():
    library = clouds(9, 3, 2)
    z, level = stars_of(library, 4)
    with pytest.raises(ValueError, match=r"z of shape \(n, 3\) expected"):
        tangent_posterior(z[:, 1:], level, library)
    with pytest.raises(ValueError, match=r"log_level of shape \(4,\) expected"):
        tangent_posterior(z, level[1:], library)
    with pytest.raises(BackendError, match="'gpu' is unknown to the kernels"):
        tangent_posterior(z, level, library, backend="gpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": np.zeros((0, 3))}, "at least one cloud"),
        ({"tangents": np.zeros((9, 2, 4))}, r"tangents must have shape \(9, 2, 3\)"),
        ({"gains": np.zeros((9, 3))}, r"gains must have shape \(9, 2\)"),
        ({"rest": np.zeros(8)}, r"rest must have shape \(9,\)"),
        ({"rest": np.r_[np.zeros(8), np.nan]}, "rest must be finite, below 1e.15; cloud 8 is not"),
        ({"log_g": np.r_[np.inf, np.zeros(8)]}, "log_g must be finite, below 1e.15; cloud 0 is not"),
        ({"variances": -np.ones((9, 2))}, "variances must not be negative"),
        ({"scatter": -np.ones(9)}, "scatter must not be negative"),
        ({"first": [0, 8]}, r"first must rise from 0 to 9, found \[0, 8\]"),
        ({"first": [0, 5, 4, 9]}, "first must rise from 0 to 9"),
        ({"first": [0]}, "first must rise from 0 to 9"),
        (
            {"tangents": np.zeros((9, 121, 3)), "variances": np.zeros((9, 121)), "gains": np.zeros((9, 121))},
            "120 tangents at most expected, found 121",
        ),
    ],
)
def test_a_library_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(clouds(9, 3, 2), **change)
