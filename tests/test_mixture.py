"""A fitted mixture: the kernels against its float64 contract, neighbours, bad pixels, shapes."""

import dataclasses

import numpy as np
import pytest
from tolerances import assert_close

from moefast.core.grids import uniform
from moefast.fitting import Options, fit_mixture
from moefast.mixture import Mixture, hat_weights
from moefast.spectra.spectrum_set import open_spectra


@pytest.fixture(scope="module")
def mixture(train_file):
    options = Options(grid=uniform(2, 2), n_levels=5, sample_draws=1, references=False)
    return fit_mixture(open_spectra(train_file), options).mixture


@pytest.fixture(scope="module")
def spectra(test_toy):
    return test_toy.noisy(), test_toy.error


def assert_parity(found, expected):
    # Tolerances in dex are what an astronomer would accept; the weights follow from them.
    np.testing.assert_allclose(found.log_g, expected.log_g, atol=1e-4)
    np.testing.assert_allclose(found.expert_log_g, expected.expert_log_g, atol=1e-4)
    np.testing.assert_allclose(found.weights, expected.weights, atol=2e-4)
    np.testing.assert_allclose(found.log_g_err, expected.log_g_err, rtol=2e-3)
    np.testing.assert_allclose(found.log_g_err_raw, expected.log_g_err_raw, rtol=1e-4)
    np.testing.assert_allclose(found.chi2, expected.chi2, rtol=1e-3)
    np.testing.assert_allclose(found.log_level, expected.log_level, atol=1e-5)


def test_predictions_are_those_of_the_reference(mixture, spectra):
    found, expected = mixture.predict(*spectra), mixture.predict_reference(*spectra)
    assert found.log_g.dtype == np.float32
    assert expected.log_g.dtype == np.float64
    assert_parity(found, expected)
    assert_close(found.weights.sum(1), np.ones(1000))
    assert found.weights.min() >= 0
    assert np.std(found.log_g) > 0.3


@pytest.mark.parametrize("scale", [1e-4, 0.005, 1e3])
def test_noise_far_outside_the_training_set_is_clamped_not_extrapolated(mixture, spectra, scale):
    flux, error = spectra
    found = mixture.predict(flux, error * np.float32(scale))
    assert_parity(found, mixture.predict_reference(flux, error * np.float32(scale)))
    edge = mixture.knots[0] if scale < 1 else mixture.knots[-1]
    beyond = (found.log_level < edge) if scale < 1 else (found.log_level > edge)
    knot = 0 if scale < 1 else -1
    x = (flux - mixture.reference).astype(np.float64)
    expected = (
        np.einsum("np,pk->nk", x, mixture.pixel_weights[:, :, knot]) + mixture.expert_intercepts[:, knot]
    )
    assert beyond.mean() > 0.9
    np.testing.assert_allclose(found.expert_log_g[beyond], expected[beyond], atol=1e-4)


def given(prediction):
    """Fields that a mixture of experts fills; the others are those of posteriors."""
    fields = [item for item in dataclasses.fields(prediction) if getattr(prediction, item.name) is not None]
    assert len(fields) == 7
    return fields


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 512])
def test_rows_do_not_depend_on_their_block(mixture, spectra, n):
    flux, error = (a[:n] for a in spectra)
    whole = mixture.predict(*spectra)
    part = mixture.predict(flux, error)
    for item in given(whole):
        np.testing.assert_array_equal(
            getattr(part, item.name), getattr(whole, item.name)[:n], err_msg=item.name
        )


def test_a_row_alone_has_its_bits(mixture, spectra):
    whole = mixture.predict(*spectra, first_row=1000)
    for i in (0, 23, 24, 999):
        alone = mixture.predict(*(a[i : i + 1] for a in spectra), first_row=1000 + i)
        for item in given(whole):
            np.testing.assert_array_equal(
                getattr(alone, item.name), getattr(whole, item.name)[i : i + 1], err_msg=item.name
            )


def test_bad_pixels_change_their_rows_only(mixture, spectra):
    flux, error = (a.copy() for a in spectra)
    clean = mixture.predict(flux, error)
    mask = np.zeros(flux.shape, bool)
    mask[800, 5] = True
    flux[3, ::7], error[600, 100], flux[700] = np.nan, 0, np.inf
    found = mixture.predict(flux, error, mask)
    others = np.delete(np.arange(1000), [3, 600, 700, 800])
    for item in given(clean):
        np.testing.assert_array_equal(getattr(found, item.name)[others], getattr(clean, item.name)[others])
        assert np.isfinite(getattr(found, item.name)).all()
    assert_parity(found, mixture.predict_reference(flux, error, mask))


def test_propagated_noise_is_that_of_repeated_draws(mixture, test_toy):
    rng = np.random.default_rng(0)
    flux = np.repeat(test_toy.flux[:1], 4000, 0)
    error = np.repeat(test_toy.error[:1], 4000, 0)
    noisy = flux + error * rng.standard_normal(flux.shape).astype(np.float32)
    prepared = mixture.prepare(noisy, error)
    # Between two knots the variance is interpolated, an upper bound by at most a few per cent.
    ratio = prepared.expert_noise[0] / prepared.expert_log_g.std(0)
    assert (ratio > 0.96).all()
    assert (ratio < 1.15).all()


def test_hat_weights_interpolate_linearly():
    knots = np.linspace(-1, 2, 4)
    level = np.array([-1, -0.75, 0, 0.5, 2])
    found = hat_weights(level, knots)
    assert_close(found.sum(1), np.ones(5))
    assert_close(found @ (3 * knots + 1), 3 * level + 1)
    assert_close(found[1], [0.75, 0.25, 0, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: {"wave": m.wave[1:]}, "do not fit together"),
        (lambda m: {"columns": m.columns[1:]}, "do not fit together"),
        (lambda m: {"n_basis": 3}, "principal components expected; found 3"),
        (lambda m: {"expert_intercepts": m.expert_intercepts[1:]}, "do not fit together"),
        (lambda m: {"knots": m.knots[1:]}, "two noise levels at least"),
        (lambda m: {"gate": (m.gate[0][1:], *m.gate[1:])}, r"the gate must take \d+ features"),
        (lambda m: {"gate": (*m.gate[:2], m.gate[2][:, 1:], m.gate[3])}, "give 4 weights"),
        (
            lambda m: {"error_model": (m.error_model[0][1:], *m.error_model[1:])},
            r"error model must take \d+ features",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(mixture, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(mixture, **change(mixture))


def test_sizes_are_those_of_the_arrays(mixture):
    assert isinstance(mixture, Mixture)
    assert (mixture.n_pixels, mixture.n_experts) == (640, 4)
