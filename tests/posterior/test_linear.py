"""Linear experts at a star's own noise: the mixture of Gaussians that a textbook writes pixel by pixel."""

import numpy as np
import pytest

from moefast.posterior.library import fit_clouds
from moefast.posterior.linear import LEAST_STARS, gravity_bins
from moefast.posterior.mixture import PosteriorMixture

P, R, N = 61, 4, 600
WIDTH = 0.3


@pytest.fixture(scope="module")
def made():
    """Stars of two experts whose spectra bend with log g, and their posterior; an odd P has cells of one pixel."""
    rng = np.random.default_rng(3)
    log_g = rng.uniform(1, 5, N)
    bins = rng.integers(0, 2, N)
    reference, shape = rng.uniform(0.5, 1.5, P), rng.uniform(0.5, 2, P) * 1e-4
    basis = np.linalg.qr(rng.standard_normal((P, R)))[0] / np.sqrt(shape)[:, None]
    z = 5 * rng.standard_normal((N, R))
    z[:, 0] += 8 * np.sin(log_g) + 6 * bins
    z[:, 1] += 8 * (log_g - 3)
    z = z.astype(np.float32)
    labels = np.column_stack([log_g, 4500 + 300 * bins + 50 * z[:, 2], -1 + 0.1 * z[:, 3]])
    arrays = fit_clouds(
        z, labels, bins, 2, basis=basis, reference=reference, noise_shape=shape, n_clouds=1, n_tangents=R,
        n_gravity_bins=3,
    )  # fmt: skip
    # ln of the error is that of the standard deviation, nearly.
    w1 = np.zeros((5, 1), np.float32)
    w1[1] = 0.01
    mixture = PosteriorMixture(
        wave=np.linspace(7100, 8850, P), reference=reference.astype(np.float32),
        noise_shape=shape.astype(np.float32), **arrays, scale_width=WIDTH, label_range=(1.0, 5.0),
        error_model=(w1, np.zeros(1, np.float32), np.full((1, 1), 100, np.float32), np.zeros(1, np.float32)),
        label_factors=np.ones(3, np.float32), label_names=("log_g", "T_eff", "M_H"),
    )  # fmt: skip
    spectra = reference + z @ (shape[:, None] * basis).T
    return mixture, spectra, labels, bins


def test_bins_of_log_g_are_alike_in_number_and_in_order(made):
    _, _, labels, bins = made
    groups, first = gravity_bins(labels[:, 0], bins, 2, 3)
    assert first.tolist() == [0, 3, 6]
    assert np.sort(np.concatenate(groups)).tolist() == list(range(N))
    for k in range(2):
        own = groups[first[k] : first[k + 1]]
        assert all((bins[rows] == k).all() for rows in own)
        assert np.ptp([len(rows) for rows in own]) <= 1
        assert labels[own[0], 0].max() <= labels[own[1], 0].min()


def test_few_stars_make_few_bins():
    rng = np.random.default_rng(0)
    bins = np.repeat([0, 1], [3 * LEAST_STARS - 1, 5])
    _, first = gravity_bins(rng.uniform(1, 5, bins.size), bins, 2, 8)
    assert first.tolist() == [0, 2, 3]


def test_an_empty_bin_is_refused():
    with pytest.raises(ValueError, match="no star in bin 1"):
        gravity_bins(np.linspace(1, 5, 100), np.zeros(100, int), 2, 3)


@pytest.mark.parametrize("engine", ["describe", "outputs"])
@pytest.mark.parametrize("lost", [False, True], ids=["whole", "gaps"])
def test_it_is_the_mixture_of_gaussians_of_pixels(made, engine, lost):
    """Means, covariances and covariances with labels of each group, in pixels, and a star's own noise added."""
    mixture, spectra, labels, bins = made
    rng = np.random.default_rng(4)
    n = 40
    error = (
        np.sqrt(mixture.noise_shape) * rng.uniform(0.5, 4, (n, 1)) * rng.uniform(0.7, 1.4, (n, P))
    ).astype(np.float32)
    flux = (1.3 * (spectra[:n] + error * rng.standard_normal((n, P)))).astype(np.float32)
    error *= np.float32(1.3)
    if lost:
        error[:, 20:45] = np.nan
    found = getattr(mixture, engine)(flux, error)

    groups, first = gravity_bins(labels[:, 0], bins, 2, 3)
    reference = mixture.reference.astype(np.float64)
    blur = mixture.directions.astype(np.float64) @ mixture.directions.T.astype(np.float64)
    for i in range(n):
        good = np.isfinite(error[i])
        weight = 1 / error[i, good].astype(np.float64) ** 2
        x, r = flux[i, good].astype(np.float64), reference[good]
        scale = (weight * x * r).sum() / (weight * r * r).sum()
        evidence, means = np.empty(len(groups)), np.empty(len(groups))
        for j, rows in enumerate(groups):
            own = spectra[rows][:, good]
            mean, apart = own.mean(0), own - own.mean(0)
            covariance = apart.T @ apart / len(rows) + blur[np.ix_(good, good)]
            covariance += WIDTH**2 * np.outer(mean, mean) + np.diag(1 / weight) / scale**2
            solved = np.linalg.solve(covariance, x / scale - mean)
            with_label = apart.T @ (labels[rows, 0] - labels[rows, 0].mean()) / len(rows)
            means[j] = labels[rows, 0].mean() + with_label @ solved
            evidence[j] = np.log(len(rows)) - 0.5 * (x / scale - mean) @ solved
            evidence[j] -= 0.5 * np.linalg.slogdet(covariance)[1]
        share = np.exp(evidence - evidence.max())
        for k in range(2):
            own = slice(first[k], first[k + 1])
            expected = (share[own] * means[own]).sum() / share[own].sum()
            assert found["expert_label"][i, k] == pytest.approx(expected, abs=2e-3)
        of_experts = np.add.reduceat(share, first[:-1]) / share.sum()
        stars = found["weights"][i, :2]
        np.testing.assert_allclose(stars / stars.sum(), of_experts, atol=2e-3)
