"""The description against the density of whole spectra, from SciPy."""

from dataclasses import replace

import numpy as np
import pytest
from made_clouds import mixture, stars
from made_correction import with_correction
from scipy.stats import multivariate_normal

from moefast.ops.on_numpy import NumPyArithmetic
from moefast.posterior import mixture as mixture_module
from moefast.posterior.cells import alike_pixels
from moefast.posterior.forward import LEAST_CURVATURE, cloud_values
from moefast.posterior.mixture import SCALE_UNIT


def as_one_gaussian(mix, mine, weights):
    """Mean and covariance of coordinates of some clouds."""
    own = weights[mine] / weights[mine].sum()
    keys = mix.keys[mine].astype(float)
    along = keys.copy()
    along[:, -1] = 1 / SCALE_UNIT
    tangents = np.concatenate([mix.tangents[mine].astype(float), mix.scale_width * along[:, None]], axis=1)
    covariance = np.cov(keys.T, aweights=own, ddof=0) + np.einsum("j,jta,jtb->ab", own, tangents, tangents)
    return own @ keys, covariance + np.eye(mix.n_coordinates)


def slope_variance(mix, x, noise, coordinates, nuisances, is_slope, level2):
    """Of the slopes, from the densities of three groups of stars and blends in T_eff, and of no star, with both widths.

    Beyond the coordinates in which groups are their own, they scatter about the straight line of the whole library.
    """
    share, *narrow = mix.calibrated
    if not share:
        return 1.0
    weights = np.exp(mix.log_weights.astype(float))
    n_stars, n = mix.first[mix.n_experts + mix.blends], mix.n_coordinates
    order = np.argsort(mix.labels[:n_stars, 1])
    middles = (np.cumsum(weights[order]) - weights[order] / 2) / weights[:n_stars].sum()
    groups = [order[(middles >= third / 3) & (middles < (third + 1) / 3)] for third in range(3)]
    groups += [np.arange(n_stars, len(weights))] if mix.n_foreign > mix.blends else []
    n_apart = min(mixture_module.N_APART, n)
    apart = np.r_[: n_apart - 2, n - 2 : n]
    others = np.setdiff1d(np.arange(n), apart)
    of_all, spread = as_one_gaussian(mix, np.arange(len(weights)), weights)
    line = spread[np.ix_(others, apart)] @ np.linalg.inv(spread[np.ix_(apart, apart)])
    about = spread[np.ix_(others, others)] - line @ spread[np.ix_(apart, others)]
    evidence = np.zeros(2)
    for mine in groups:
        mean, covariance = as_one_gaussian(mix, mine, weights)
        mean[others] = of_all[others] + line @ (mean[apart] - of_all[apart])
        own = covariance[np.ix_(apart, apart)]
        covariance[np.ix_(others, apart)], covariance[np.ix_(apart, others)] = line @ own, own @ line.T
        covariance[np.ix_(others, others)] = about + line @ own @ line.T
        spectra = noise + coordinates @ covariance @ coordinates.T
        for place, variances in enumerate((np.ones(len(narrow)), np.square(narrow))):
            widths = np.concatenate([variances, np.full((~is_slope).sum(), level2)])
            density = multivariate_normal(coordinates @ mean, spectra + (nuisances * widths) @ nuisances.T)
            evidence[place] += weights[mine].sum() * np.exp(density.logpdf(x) - 100)
    evidence *= 1 - share, share
    return (evidence[0] + evidence[1] * np.square(narrow)) / evidence.sum()


def by_brute_force(mix, flux, error):
    """Weights, means and covariances of labels from the p-dimensional normal density of every cloud."""
    good = np.isfinite(flux) & (error > 0)
    x, a = flux[good].astype(float), 1 / error[good].astype(float) ** 2
    r, directions = mix.reference[good].astype(float), mix.directions[good].astype(float)
    c0 = (a * x * r).sum() / (a * r * r).sum()
    x = x / c0 - r
    n = mix.n_coordinates
    coordinates, nuisances = directions[:, :n], directions[:, n:]
    noise = np.diag(1 / a) / c0**2
    level2 = np.mean(error[good].astype(float) ** 2 / mix.noise_shape[good]) / c0**2
    is_slope = np.arange(mix.n_nuisances) < mix.n_nuisances - mix.n_sky
    slopes = slope_variance(mix, x, noise, coordinates, nuisances, is_slope, level2)
    widths = np.where(is_slope, 1.0, level2)
    widths[is_slope] = slopes
    common = noise + coordinates @ coordinates.T + (nuisances * widths) @ nuisances.T
    evidence, means, covariances = [], [], []
    for j in range(len(mix.keys)):
        along = mix.keys[j].astype(float)
        along[-1] = 1 / SCALE_UNIT
        tangents = np.concatenate([mix.tangents[j].astype(float), mix.scale_width * along[None]])
        gains = np.zeros((len(tangents), mix.gains.shape[2] + 1))
        gains[:-1, :-1], gains[-1, -1] = mix.gains[j], mix.scale_width
        spectra = coordinates @ tangents.T
        covariance = common + spectra @ spectra.T
        apart = x - coordinates @ mix.keys[j]
        evidence.append(mix.log_weights[j] + multivariate_normal(np.zeros(len(x)), covariance).logpdf(apart))
        # Labels and spectrum of a cloud are one normal distribution.
        solved = np.linalg.solve(covariance, np.column_stack([apart, spectra]))
        means.append(np.append(mix.labels[j], 1.0) + gains.T @ (spectra.T @ solved[:, 0]))
        left = np.zeros((gains.shape[1],) * 2)
        left[:-1, :-1] = mix.scatter[j]
        covariances.append(left + gains.T @ (np.eye(len(tangents)) - spectra.T @ solved[:, 1:]) @ gains)
    share = np.exp(np.array(evidence) - max(evidence))
    share /= share.sum()
    means = np.array(means)
    mean = share @ means
    covariance = np.einsum("j,jab->ab", share, covariances) + np.einsum(
        "j,ja,jb->ab", share, means - mean, means - mean
    )
    return share, means, mean, covariance


NARROW = (0.6, 0.1)


@pytest.mark.parametrize(
    ("q", "n_sky", "calibrated", "n_foreign", "blends", "n_apart"),
    [
        (0, 0, (0,), 0, False, 24),
        (3, 0, (0,), 0, False, 24),
        (3, 2, (0,), 0, False, 24),
        (3, 0, NARROW, 0, False, 24),
        (3, 2, NARROW, 0, False, 24),
        (3, 1, NARROW, 1, False, 24),
        (3, 1, NARROW, 1, True, 24),
        (3, 1, NARROW, 2, True, 24),
        (3, 1, NARROW, 1, False, 3),
        (3, 2, NARROW, 0, False, 2),
    ],
)
def test_weights_and_labels_are_those_of_the_density_of_the_spectrum(
    q, n_sky, calibrated, n_foreign, blends, n_apart, monkeypatch
):
    monkeypatch.setattr(mixture_module, "N_APART", n_apart)
    # 31 is prime: cells of one pixel, the exact form.
    mix = mixture(p=31, m=9, t=2, n=5, q=q, n_sky=n_sky, calibrated=calibrated)
    mix = replace(mix, n_foreign=n_foreign, blends=blends)
    assert mix.sizes.cell == 1
    flux, error = stars(mix, 4)
    flux[1, 3:9], error[2, 20:] = np.nan, -1.0
    found = mix.describe(flux, error)
    several = 0
    for i in range(4):
        share, means, mean, covariance = by_brute_force(mix, flux[i], error[i])
        several += (share > 0.05).sum() > 1
        np.testing.assert_allclose(
            found["weights"][i], np.add.reduceat(share, mix.first[:-1]), rtol=1e-6, atol=1e-12
        )
        np.testing.assert_allclose(found["label"][i], mean, rtol=1e-7)
        np.testing.assert_allclose(found["label_sd"][i], np.sqrt(np.diag(covariance)), rtol=1e-6)
        np.testing.assert_allclose(found["label_cov"][i], covariance[0], rtol=1e-5, atol=1e-8)
        for k in range(mix.n_experts):
            own = slice(mix.first[k], mix.first[k + 1])
            np.testing.assert_allclose(
                found["expert_label"][i, k], share[own] @ means[own, 0] / share[own].sum(), rtol=1e-6
            )
    assert several, "a posterior of one cloud would tell nothing of weights"


def test_slopes_are_as_wide_as_the_star_says():
    mix = mixture(q=4, calibrated=(0.5, 0.1))
    flux, error = stars(mix, 40, snr=30)
    steep = flux * (1 + 0.15 * np.linspace(-1, 1, mix.n_pixels, dtype=np.float32))
    faint = 1000 * error

    def variance(flux, error):
        numbers = NumPyArithmetic(mix.numbers)
        return 1 / cloud_values(numbers, mix.sizes, flux.astype(float), error.astype(float)).prior[:, 0, 0]

    assert np.median(variance(flux, error)) < 0.1
    assert np.median(variance(steep, error)) > 0.9
    # Who says nothing of slopes has what is known beforehand.
    np.testing.assert_allclose(variance(flux, faint), 0.5 + 0.5 * 0.1**2, rtol=0.02)
    assert np.isfinite(mix.describe(flux, np.full_like(flux, np.nan))["log_g"]).all()
    # Narrow slopes leave more of log g.
    wide = replace(mix, calibrated=(0.0,))
    usual, alike = mix.describe(flux, error)["label_sd"][:, 0], wide.describe(flux, error)["label_sd"][:, 0]
    assert np.mean(usual < alike) > 0.8


def test_energy_and_distance_are_those_of_least_squares():
    mix = mixture(p=31, m=9, t=2, n=5, q=2)
    flux, error = stars(mix, 3, snr=30)
    found = mix.describe(flux, error)
    n = mix.n_coordinates
    for i in range(3):
        c0 = found["scale"][i, 0]
        sigma = error[i].astype(float) / c0
        # Nuisances are held by their prior, coordinates by next to nothing.
        ridge = np.diag(np.sqrt(np.r_[np.full(n, LEAST_CURVATURE), np.ones(mix.n_nuisances)]))
        design = np.concatenate([mix.directions.astype(float) / sigma[:, None], ridge])
        target = np.r_[(flux[i] / c0 - mix.reference) / sigma, np.zeros(len(ridge))]
        energy = np.linalg.lstsq(design, target, rcond=None)[1][0]
        np.testing.assert_allclose(found["chi2"][i, 0], energy / (1 + max(0, 31 - (n + 1))), rtol=1e-6)
        assert found["distance"][i, 0] > 0


def bright(mix, n, snr):
    """Stars whose noise has another shape than the training set's, and gaps."""
    flux, _ = stars(mix, n, snr=1e6)
    rng = np.random.default_rng(3)
    error = (flux.mean(1, keepdims=True) / snr * np.ones_like(flux)).astype(np.float32)
    flux = (flux + error * rng.standard_normal(flux.shape)).astype(np.float32)
    error[rng.random(error.shape) < 0.1] = np.nan
    return flux, error


@pytest.mark.parametrize("snr", [10, 50])
def test_cells_cost_a_small_part_of_the_error(snr):
    """An M off by per cents must not be multiplied by the distance of the star from the reference."""
    exact_mixture = mixture(p=384, m=40, t=2, n=7, q=2)
    assert exact_mixture.sizes.cell == 1
    cells, shares = alike_pixels(
        exact_mixture.directions, exact_mixture.noise_shape, exact_mixture.numbers["library_precision"], 96
    )
    mix = replace(exact_mixture, cells=cells, cell_shares=shares)
    assert mix.sizes.n_cells <= 110
    flux, error = bright(mix, 60, snr)
    by_cells, exact = mix.describe(flux, error), exact_mixture.describe(flux, error)
    apart = np.abs(by_cells["label"] - exact["label"]) / exact["label_sd"]
    assert np.median(apart) < 0.05
    assert np.percentile(apart, 99) < 0.5


def test_the_point_is_the_best_one_under_the_library_as_one_gaussian():
    mix = mixture(p=129, q=2)
    flux, error = stars(mix, 6)
    error[2, 40:90] = np.nan
    # One pixel a cell: then M is exact.
    assert mix.sizes.cell == 1
    found, b = mix.describe(flux, error)["point"], mix.directions.astype(np.float64)
    for i in range(6):
        good = np.isfinite(error[i])
        a, r = 1 / error[i, good].astype(np.float64) ** 2, mix.reference[good].astype(np.float64)
        x = flux[i, good].astype(np.float64)
        scale = (a * x * r).sum() / (a * r * r).sum()
        left = b[good].T @ (a[:, None] * b[good]) * scale**2 + mix.numbers["library_precision"]
        right = b[good].T @ (a * scale**2 * (x / scale - r)) + mix.numbers["library_pull"][:, 0]
        np.testing.assert_allclose(found[i], np.linalg.solve(left, right), rtol=1e-6, atol=1e-6)


def by_hand(mix, found, row):
    """Corrected mean of log g of one star from what the description gives without a correction."""
    n_labels, (mean, inverse_spread, *layers) = len(mix.label_names), mix.correction
    label, sd = found["label"][row, :n_labels], found["label_sd"][row, :n_labels]
    weights, expert = found["weights"][row], found["expert_label"][row]
    seen = np.concatenate([
        found["point"][row], label, np.log(sd), found["label_cov"][row, 1:n_labels] / (sd[0] * sd[1:]),
        np.log(weights + 1e-6), weights / (weights + 1e-6) * (expert - label[0]), [found["error_features"][row, 2]],
        found["log_level"][row],
    ])  # fmt: skip
    active = np.clip((seen - mean) * inverse_spread, -5, 5)
    for w, b in zip(layers[:-2:2], layers[1:-2:2], strict=True):
        active = np.maximum(active @ w + b, 0)
    return label[0] + sd[0] * np.tanh(active @ layers[-2] + layers[-1])[0]


@pytest.mark.parametrize("q", [0, 3])
def test_a_correction_by_hand(q):
    plain = mixture(q=q)
    mix = with_correction(plain)
    flux, error = stars(mix, 20)
    found, usual = mix.describe(flux, error), plain.describe(flux, error)
    expected = np.array([by_hand(mix, usual, row) for row in range(20)])
    np.testing.assert_allclose(found["label"][:, 0], expected, rtol=1e-9)
    np.testing.assert_allclose(found["log_g"][:, 0], np.clip(expected, *mix.label_range), rtol=1e-9)
    assert np.abs(expected - usual["label"][:, 0]).max() > 0.1
