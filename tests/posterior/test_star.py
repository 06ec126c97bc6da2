"""The posterior of one star against the normal densities of whole spectra, and against what predictions say."""

import numpy as np
import pytest
from made_clouds import mixture, stars

from moefast.core.errors import InputError
from moefast.posterior.mixture import SCALE_UNIT
from moefast.posterior.star import star_posterior


def spectrum_by_brute_force(mix, flux, error):
    """Mean and standard deviation of the flux without noise, from the p-dimensional normal density of every cloud."""
    good = np.isfinite(flux) & (error > 0)
    x, a = flux.astype(float), np.where(good, 1 / np.where(good, error, 1.0).astype(float) ** 2, 0)
    reference, directions = mix.reference.astype(float), mix.directions.astype(float)
    scale = (a * np.where(good, x, 0) * reference).sum() / (a * reference**2).sum()
    n = mix.n_coordinates
    coordinates, nuisances = directions[:, :n], directions[:, n:]
    level2 = np.mean(error[good].astype(float) ** 2 / mix.noise_shape[good]) / scale**2
    widths = np.where(np.arange(mix.n_nuisances) < mix.n_nuisances - mix.n_sky, 1.0, level2)
    noise = np.diag(error[good].astype(float) ** 2) / scale**2
    evidence, means, covariances = [], [], []
    for j in range(len(mix.keys)):
        along = mix.keys[j].astype(float)
        along[-1] = 1 / SCALE_UNIT
        tangents = np.concatenate([mix.tangents[j].astype(float), mix.scale_width * along[None]])
        spectra = coordinates @ np.column_stack([tangents.T, np.eye(n)])
        prior = spectra @ spectra.T + (nuisances * widths) @ nuisances.T
        mean = reference + coordinates @ mix.keys[j]
        seen = prior[np.ix_(good, good)] + noise
        apart = x[good] / scale - mean[good]
        gain = np.linalg.solve(seen, prior[good]).T
        evidence.append(
            mix.log_weights[j] - 0.5 * (apart @ np.linalg.solve(seen, apart) + np.linalg.slogdet(seen)[1])
        )
        means.append(mean + gain @ apart)
        covariances.append(np.diag(prior - gain @ prior[good]))
    weights = np.exp(np.array(evidence) - max(evidence))
    weights /= weights.sum()
    means = np.array(means)
    middle = weights @ means
    variance = weights @ (np.array(covariances) + (means - middle) ** 2)
    return weights, scale * middle, scale * np.sqrt(variance)


@pytest.mark.parametrize(("q", "n_sky"), [(0, 0), (3, 2)])
def test_the_spectrum_is_that_of_the_normal_density(q, n_sky):
    # 31 is prime: cells of one pixel, the exact form.
    mix = mixture(p=31, m=9, t=2, n=5, q=q, n_sky=n_sky)
    flux, error = stars(mix, 3)
    flux[1, 3:9], error[2, 20:] = np.nan, -1.0
    for x, e in zip(flux, error, strict=True):
        weights, model, sd = spectrum_by_brute_force(mix, x, e)
        found = star_posterior(mix, x, e)
        np.testing.assert_allclose(found.weights, weights, atol=1e-6)
        np.testing.assert_allclose(found.model, model, rtol=1e-6, atol=1e-6 * np.abs(model).max())
        np.testing.assert_allclose(found.model_sd, sd, rtol=1e-5)


def test_labels_are_those_of_predictions():
    mix = mixture(p=192, q=3, n_sky=2)
    flux, error = stars(mix, 5)
    said = mix.predict_reference(flux, error)
    for i in range(5):
        found = star_posterior(mix, flux[i], error[i])
        mean, sd = found.moments("log_g")
        assert np.clip(mean, *mix.label_range) == pytest.approx(said.log_g[i], abs=1e-9)
        assert sd == pytest.approx(said.log_g_err_raw[i], rel=1e-6)
        other, _ = found.moments("T_eff")
        assert other == pytest.approx(said.labels[i, 0], abs=1e-9)


def test_densities_add_up_to_one_and_have_the_moments():
    mix = mixture(p=192, q=3)
    flux, error = stars(mix, 1)
    found = star_posterior(mix, flux[0], error[0])
    at = np.linspace(-6, 12, 4001)
    density = found.density("log_g", at)
    mean, sd = found.moments("log_g")
    step = at[1] - at[0]
    assert density.sum() * step == pytest.approx(1, abs=1e-6)
    assert (density * at).sum() * step == pytest.approx(mean, abs=1e-6)
    assert (density * (at - mean) ** 2).sum() * step == pytest.approx(sd**2, rel=1e-4)
    wide = np.linspace(-6, 12, 901)
    joint = found.joint_density("T_eff", "log_g", wide, wide)
    assert joint.shape == (901, 901)
    np.testing.assert_allclose(joint.sum(1) * (wide[1] - wide[0]), found.density("log_g", wide), atol=1e-4)


def test_a_label_that_there_is_not():
    mix = mixture(p=192, q=3)
    flux, error = stars(mix, 1)
    star = star_posterior(mix, flux[0], error[0])
    with pytest.raises(InputError, match="label 'logg' is unknown; the posterior has log_g, T_eff"):
        star.density("logg", [4.0])


def test_masked_pixels_are_as_if_they_were_not_there():
    mix = mixture(p=192, q=3)
    flux, error = stars(mix, 1)
    mask = np.zeros(192, bool)
    mask[40:60] = True
    spoiled = np.where(mask, 1e5, flux[0])
    with_mask, without = (
        star_posterior(mix, spoiled, error[0], mask),
        star_posterior(mix, np.where(mask, np.nan, flux[0]), error[0]),
    )
    np.testing.assert_array_equal(with_mask.model, without.model)
    assert with_mask.model_sd[45] > star_posterior(mix, flux[0], error[0]).model_sd[45]


def test_no_pixel_is_no_star():
    mix = mixture(p=192)
    with pytest.raises(ValueError, match="good pixel"):
        star_posterior(mix, np.full(192, np.nan), np.ones(192))
