"""Peers: the labels that made a spectrum are found again, with the errors that the physics gives."""

from __future__ import annotations

import numpy as np
import pytest

from moefast.core.errors import InputError
from moefast.peers.cannon import fit_quadratic
from moefast.peers.choose import PEERS, peer
from moefast.peers.full_spectrum import EmulatorModel
from moefast.peers.least_squares import fit_labels
from moefast.simulate.emulator import LABELS, Emulator

STAR = np.array([4600.0, 2.4, -0.8, 0.1, 0.05])


@pytest.fixture(scope="module")
def model():
    return EmulatorModel()


@pytest.fixture(scope="module")
def spectrum():
    return Emulator.load().flux(STAR[None])[0].astype(float)


@pytest.fixture(scope="module")
def error(spectrum):
    """An SNR of 40 with some structure."""
    return 0.025 * (1 + 0.5 * np.sin(np.arange(len(spectrum)) / 50))


def test_labels_of_a_spectrum_without_noise(model, spectrum, error):
    found = fit_labels(model, spectrum, error)
    # Within a small part of the errors: the fit ends where χ² no longer changes.
    assert (np.abs(found.labels - STAR) < 0.05 * found.errors).all()
    assert found.chi2 < 0.01


def test_errors_are_those_of_the_fisher_information(model, spectrum, error):
    slopes = Emulator.load().derivatives(STAR[None])[0]
    # The scale is free, too.
    jacobian = np.concatenate([spectrum[None], slopes]) / error
    expected = np.sqrt(np.diag(np.linalg.inv(jacobian @ jacobian.T)))[1:]
    assert (expected > 0).all()
    np.testing.assert_allclose(fit_labels(model, spectrum, error).errors, expected, rtol=0.02)


def test_chi2_is_that_of_all_good_pixels(model, spectrum, error):
    noisy = spectrum + error * np.random.default_rng(1).standard_normal(len(error))
    good = np.ones(len(error), bool)
    good[500:900] = False
    found = fit_labels(model, noisy, error, good)
    fitted = Emulator.load().flux(found.labels[None])[0][good].astype(float)
    weight = 1 / error[good] ** 2
    scale = (fitted * noisy[good] * weight).sum() / (fitted**2 * weight).sum()
    chi2 = (((noisy[good] - scale * fitted) ** 2) * weight).sum()
    assert found.chi2 == pytest.approx(chi2, abs=0.02)
    # No other labels nearby fit better.
    for step in np.diag(0.1 * found.errors):
        for sign in (-1, 1):
            other = Emulator.load().flux(found.labels[None] + sign * step)[0][good].astype(float)
            scale = (other * noisy[good] * weight).sum() / (other**2 * weight).sum()
            assert (((noisy[good] - scale * other) ** 2) * weight).sum() > chi2 - 1e-3


def test_a_scale_changes_nothing_and_bad_pixels_are_not_looked_at(model, spectrum, error):
    noisy = spectrum + error * np.random.default_rng(2).standard_normal(len(error))
    good = np.ones(len(error), bool)
    good[::7] = False
    first = fit_labels(model, noisy, error, good)
    spoilt, wide = noisy.copy(), error.copy()
    spoilt[~good], wide[~good] = np.nan, 0.0
    second = fit_labels(model, 7e-18 * spoilt, 7e-18 * wide, good)
    np.testing.assert_allclose(second.labels, first.labels, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(second.errors, first.errors, rtol=1e-2)


def test_a_star_without_data_has_no_labels(model, spectrum, error):
    none = fit_labels(model, spectrum, error, np.zeros(len(error), bool))
    assert np.isnan(none.labels).all()
    assert np.isnan(none.errors).all()
    one = np.zeros(len(error), bool)
    one[100] = True
    assert np.isnan(fit_labels(model, spectrum, error, one).errors).all()


def test_derivatives_of_coefficients_are_those_of_the_flux():
    emulator = Emulator.load()
    labels = np.stack([STAR, STAR + [900, 1.5, 0.9, 0.1, -0.1]])
    slopes = emulator.coefficient_derivatives(labels)
    basis = emulator.basis[:, emulator.margin : emulator.margin + len(emulator.wave)].astype(float)
    np.testing.assert_allclose(slopes @ basis, emulator.derivatives(labels), rtol=1e-9, atol=1e-12)
    assert emulator.coefficient_derivatives(np.empty((0, 5))).shape == (0, 5, len(emulator.basis))


# -- The Cannon's way ------------------------------------------------------------------------------------------

N_LABELLED, PIXELS, SCATTER = 600, 120, 0.02


@pytest.fixture(scope="module")
def labelled():
    """Labelled spectra that a quadratic model with scatter makes exactly, and its flux without noise."""
    draw = np.random.default_rng(3)
    low, high = np.array([4000.0, 1, -2, -0.2, -0.4]), np.array([6000.0, 5, 0.5, 0.4, 0.4])
    scaled = draw.uniform(-1, 1, (N_LABELLED, 5))
    theta = 0.1 * draw.standard_normal((21, PIXELS))
    # Most pixels are continuum, so that the median of a star is 1 whatever its labels.
    theta[:, 40:] = 0
    theta[0] = 1

    def flux(scaled):
        rows, columns = np.triu_indices(5)
        return np.column_stack([np.ones(len(scaled)), scaled, scaled[:, rows] * scaled[:, columns]]) @ theta

    labels = dict(zip(LABELS, (low + (scaled + 1) / 2 * (high - low)).T, strict=True))
    error = np.full((N_LABELLED, PIXELS), 0.01)
    noisy = flux(scaled) + np.hypot(error, SCATTER) * draw.standard_normal(error.shape)
    return labels, noisy, error, flux(scaled)


@pytest.fixture(scope="module")
def quadratic(labelled):
    labels, noisy, error, _ = labelled
    return fit_quadratic(np.linspace(7100, 8800, PIXELS), noisy, error, labels)


def test_a_quadratic_model_learns_a_quadratic_model(labelled, quadratic):
    labels, _, error, clean = labelled
    stars = np.column_stack([labels[name] for name in LABELS])
    predicted = np.array([quadratic.columns @ quadratic.coefficients(star) for star in stars])
    residuals = predicted - clean
    # Twenty-one terms from six hundred stars leave √(21/600) of the noise; noisy medians add a little.
    assert np.sqrt((residuals**2).mean()) < 0.3 * np.hypot(SCATTER, error[0, 0])
    # Steps of the grid of scatters are a factor of two.
    assert np.median(np.sqrt(quadratic.scatter2)) == pytest.approx(SCATTER, rel=0.42)


def test_derivatives_of_the_quadratic_terms(quadratic):
    step = np.array([1.0, 1e-3, 1e-3, 1e-3, 1e-3])
    slopes = quadratic.derivatives(STAR)
    for i, one in enumerate(np.diag(step)):
        finite = (quadratic.coefficients(STAR + one) - quadratic.coefficients(STAR - one)) / (2 * step[i])
        np.testing.assert_allclose(slopes[i], finite, rtol=1e-6, atol=1e-12)


def test_a_pixel_that_is_never_good_says_nothing(labelled, quadratic):
    labels, noisy, error, _ = labelled
    good = np.ones(noisy.shape, bool)
    good[:, 5] = False
    spoilt = noisy.copy()
    spoilt[:, 5] = np.nan
    model = fit_quadratic(quadratic.wave, spoilt, error, labels, good)
    star = noisy[0]
    odd = star.copy()
    odd[5] = 50.0
    np.testing.assert_allclose(
        fit_labels(model, odd, error[0]).labels,
        fit_labels(model, star, error[0]).labels,
        rtol=1e-3,
        atol=1e-3,
    )


def test_too_few_labelled_stars_are_refused(labelled, quadratic):
    labels, noisy, error, _ = labelled
    few = {name: values[:41] for name, values in labels.items()}
    with pytest.raises(InputError, match="42 labelled stars at least"):
        fit_quadratic(quadratic.wave, noisy[:41], error[:41], few)
    same = labels | {"a_M": np.zeros(N_LABELLED)}
    with pytest.raises(InputError, match="five labels that vary"):
        fit_quadratic(quadratic.wave, noisy, error, same)


def test_peers_have_names():
    assert [peer(name) for name in PEERS] == list(PEERS.values())
    with pytest.raises(InputError, match="choose one of chi2, cannon"):
        peer("chi3")
