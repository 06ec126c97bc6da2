"""Template libraries against the Gaussian whose answer is known, and the choice of their size."""

import numpy as np
import pytest

from moefast.experts import template
from moefast.experts.template import choose_library, fit_library, library_mean, with_fewer_tangents

RANK = 6


def gaussian(n, seed=0):
    """z and log g of one normal distribution, three tangents wide; labels are log g and noise."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((3, RANK))
    hidden = rng.standard_normal((n, 3))
    y = 3 + hidden @ [0.5, -0.3, 0.1]
    return (hidden @ mixing + 5).astype(np.float32), np.column_stack([y, rng.random(n)]), y


def curve(n, seed=0):
    """A bent line in z along which log g rises: no single plane fits it."""
    rng = np.random.default_rng(seed)
    t = rng.uniform(0, 1, n)
    z = np.zeros((n, RANK))
    z[:, 0], z[:, 1] = 30 * np.cos(3 * t), 30 * np.sin(3 * t)
    return z.astype(np.float32), t[:, None], 1 + 4 * t


def noisy(z, level, seed=1):
    draw = np.random.default_rng(seed).standard_normal(z.shape)
    return (z + level * draw).astype(np.float32), np.full(len(z), np.log(level), np.float32)


def no_bins(z):
    return np.zeros(len(z), np.int64)


@pytest.mark.parametrize("level", [0.1, 1.0, 5.0])
def test_one_cloud_is_linear_regression_with_noise_in_closed_form(level):
    z, labels, y = gaussian(4000)
    library = fit_library(z, labels, y, no_bins(z), 1, n_clouds=1, n_tangents=3)
    stars, levels = noisy(z[:50], level)
    apart = z - z.mean(0, dtype=np.float64)
    covariance = apart.T @ apart / len(z)
    weights = np.linalg.solve(covariance + level**2 * np.eye(RANK), apart.T @ (y - y.mean()) / len(z))
    expected = y.mean() + (stars - z.mean(0, dtype=np.float64)) @ weights
    np.testing.assert_allclose(library_mean(stars, levels, library), expected, atol=2e-4)
    assert np.std(expected) > 0.01


def test_clouds_follow_what_no_plane_can():
    z, labels, y = curve(6000)
    stars, levels = noisy(*(curve(500, seed=2)[0], 0.5))
    truth = curve(500, seed=2)[2]

    def error(n_clouds):
        library = fit_library(z, labels, y, no_bins(z), 1, n_clouds=n_clouds, n_tangents=1)
        return np.sqrt(np.mean((library_mean(stars, levels, library) - truth) ** 2))

    # Along the curve a noise of 0.5 is worth 4 · 0.5/90 dex.
    assert error(60) < 1.1 * 4 * 0.5 / 90
    assert error(1) > 5 * error(60)


def test_every_bin_has_clouds_in_proportion_to_its_stars():
    z, labels, y = gaussian(4000)
    bins = (np.arange(len(z)) % 4 == 0).astype(np.int64)
    library = fit_library(z, labels, y, bins, 2, n_clouds=40, n_tangents=2)
    assert library.first.tolist() == [0, 30, 40]
    shares = np.exp(library.log_weights.astype(np.float64))
    np.testing.assert_allclose([shares[:30].sum(), shares[30:].sum()], [0.75, 0.25], rtol=1e-6)
    assert library.tangents.shape == (40, 2, RANK)
    np.testing.assert_allclose(
        np.einsum("mtr,mur->mtu", library.tangents, library.tangents),
        np.tile(np.eye(2), (40, 1, 1)),
        atol=1e-5,
    )


def test_few_stars_make_few_clouds_and_few_tangents():
    z, labels, y = gaussian(2 * template.LEAST_STARS + 3)
    bins = no_bins(z)
    bins[:3] = 1
    library = fit_library(z, labels, y, bins, 2, n_clouds=50, n_tangents=5)
    assert library.first.tolist() == [0, 2, 3]
    # Three stars span two directions; the others count as those outside.
    assert (library.tangents[2, 2:] == 0).all()
    assert (library.variances[2, 2:] == library.rest[2]).all()
    assert np.isfinite(library_mean(*noisy(z, 1.0), library)).all()


def test_a_bin_without_stars_is_refused():
    z, labels, y = gaussian(100)
    with pytest.raises(ValueError, match="no star in bin 1"):
        fit_library(z, labels, y, no_bins(z), 2, n_clouds=2, n_tangents=1)


def test_the_same_seed_gives_the_same_library():
    z, labels, y = gaussian(3000)
    first, second, other = (
        fit_library(z, labels, y, no_bins(z), 1, n_clouds=20, n_tangents=2, seed=seed) for seed in (4, 4, 5)
    )
    assert first.keys.tobytes() == second.keys.tobytes()
    assert first.keys.tobytes() != other.keys.tobytes()


def test_the_cheapest_library_within_the_loss_is_chosen():
    z, labels, y = curve(6000)
    stars, levels = noisy(*(curve(1500, seed=2)[0], 1.0))
    truth, seen, calls = curve(1500, seed=2)[2], {}, []

    def fit(n_clouds, n_tangents):
        seen[n_clouds, n_tangents] = fit_library(
            z, labels, y, no_bins(z), 1, n_clouds=n_clouds, n_tangents=n_tangents
        )
        return seen[n_clouds, n_tangents]

    library, tried = choose_library(
        fit, stars, levels, truth, n_stars=len(z), sizes=(1, 30, 60, 1000), tangents=(1, 3, 20),
        progress=lambda *steps: calls.append(steps),
    )  # fmt: skip
    # A thousand clouds would have six stars each, and there are no twenty tangents in six components.
    assert set(tried) == {"30 x 1", "30 x 3", "1 x 1", "60 x 1"}
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    best = max(tried.values())
    assert tried["1 x 1"] < best - template.R2_LOSS <= tried["30 x 1"]
    assert set(seen) == {(30, 3), (1, 1), (60, 1)}
    fewer = with_fewer_tangents(seen[30, 3], 1)
    assert all(
        (getattr(library, name) == getattr(fewer, name)).all() for name in ("keys", "variances", "rest")
    )


def test_a_library_with_fewer_tangents_is_the_one_fitted_with_fewer():
    z, labels, y = gaussian(2 * template.LEAST_STARS + 3)
    bins = no_bins(z)
    # A bin of three stars has two tangents at most.
    bins[:3] = 1
    five, four, one = (
        fit_library(z, labels, y, bins, 2, n_clouds=3, n_tangents=n_tangents) for n_tangents in (5, 4, 1)
    )
    assert with_fewer_tangents(five, 5) is five
    for expected in (four, one):
        found = with_fewer_tangents(five, expected.variances.shape[1])
        for name in ("keys", "tangents", "gains", "log_weights", "log_g", "scatter"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
        for name in ("variances", "rest"):
            np.testing.assert_allclose(
                getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-7, err_msg=name
            )
