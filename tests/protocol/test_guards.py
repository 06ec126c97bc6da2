"""What would make every number of the protocol worthless: knowledge of the labels by the back door."""

from __future__ import annotations

import numpy as np
import pytest

from moefast.core.grids import uniform
from moefast.core.sketches import share_seen
from moefast.export import build, open_session
from moefast.model import SHIPPED, Model
from moefast.protocol.evaluate import evaluate
from moefast.protocol.report_text import format_text
from moefast.recipes import fit
from moefast.simulate.rows import simulate_params
from moefast.simulate.sets import REFERENCE_SETS


def test_models_of_permuted_labels_know_nothing(stars, tmp_path):
    """If labels leaked into the spectra's errors, or test stars into the fit, these R² would be above 0.

    A permutation of few stars may point the right way by chance, so the scatter between permutations is part of the
    interval; no single one may reach what counts as a leak.
    """
    n = 600
    test = stars.take(slice(n, 2 * n)).write(tmp_path / "test.h5", arrays=("flux", "error", "noisy"))
    found = []
    for seed in range(3):
        train = stars.take(slice(0, n))
        order = np.random.default_rng(seed).permutation(n)
        for name in ("T_eff", "log_g", "M_H"):
            train.params[name] = train.params[name][order]
        model = fit(train.write(tmp_path / f"train_{seed}.h5"), grid=uniform(2, 1), references=False)
        overall = evaluate(test, model).report["overall"]
        half_width = (overall["r2_interval"][1] - overall["r2_interval"][0]) / 2
        found.append((overall["r2"], half_width))
    r2, half_width = np.array(found).T
    scatter = 2 * r2.std(ddof=1) / np.sqrt(len(r2))
    assert r2.mean() - np.hypot(scatter, half_width.mean()) <= 0
    assert r2.max() < 0.05


@pytest.fixture(scope="module")
def block(stars):
    some = stars.take(slice(0, 200))
    return some.noisy.astype(np.float32), some.error.astype(np.float32)


def test_where_the_noise_is_reaches_no_feature(block, model):
    """Errors permuted among the pixels so that s² = mean(σ²/D) stays: gate features and log g stay, too."""
    flux, error = block
    mixture = model.mixture
    rng = np.random.default_rng(3)
    relative = error / np.sqrt(mixture.noise_shape) * np.exp(0.5 * rng.standard_normal(error.shape))
    error = np.sqrt(mixture.noise_shape) * relative.astype(np.float32)
    permuted = np.sqrt(mixture.noise_shape) * rng.permuted(relative, axis=1).astype(np.float32)
    assert (np.abs(permuted / error - 1) > 0.05).mean() > 0.9
    before, after = mixture.prepare(flux, error), mixture.prepare(flux, permuted)
    np.testing.assert_allclose(after.log_level, before.log_level, atol=1e-5)
    np.testing.assert_allclose(after.features, before.features, atol=1e-4)
    np.testing.assert_allclose(after.expert_log_g, before.expert_log_g, atol=1e-4)
    old, new = mixture.predict(flux, error), mixture.predict(flux, permuted)
    np.testing.assert_allclose(new.log_g, old.log_g, atol=1e-4)
    np.testing.assert_allclose(new.weights, old.weights, atol=1e-4)
    # The propagated noise Σ σ² w² may move: it is known variance, not a feature.
    assert np.abs(new.log_g_err_raw / old.log_g_err_raw - 1).max() > 1e-3
    session = open_session(build(mixture))
    names = ["log_g", "weights"]
    a = session.run(names, {"flux": flux, "error": error})
    b = session.run(names, {"flux": flux, "error": permuted})
    for one, two in zip(a, b, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4)


@pytest.mark.parametrize("pixel", [0, 300, 711, 1023])
def test_one_pixel_of_the_error_acts_through_the_noise_level_alone(pixel, block, model):
    """One error made five times larger does what scaling all errors to the same s does, wherever the pixel lies."""
    flux, error = block
    mixture = model.mixture
    one = error.copy()
    one[:, pixel] *= 5
    before, after = mixture.prepare(flux, error), mixture.prepare(flux, one)
    factor = np.exp(after.log_level.astype(np.float64) - before.log_level)[:, None]
    assert factor.min() > 1
    scaled = (error * factor).astype(np.float32)
    found, expected = mixture.predict(flux, one), mixture.predict(flux, scaled)
    np.testing.assert_allclose(found.log_g, expected.log_g, atol=1e-4)
    np.testing.assert_allclose(found.weights, expected.weights, atol=1e-4)
    np.testing.assert_allclose(found.expert_log_g, expected.expert_log_g, rtol=1e-3, atol=1e-3)


def test_evaluating_twice_gives_the_same_bytes(stars_file, model, tmp_path):
    from moefast.protocol.report_folder import write_report

    for name in ("first", "second"):
        write_report(evaluate(stars_file, model), tmp_path / name, pictures=False)
    for name in ("report.json", "predictions.h5"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def test_training_stars_among_the_test_stars_are_told(stars, tmp_path):
    """A copy of the training file under another name, half of it mixed with new stars, and new stars alone."""
    model = fit(stars.take(slice(0, 300)).write(tmp_path / "train.h5"), grid=uniform(1, 1), references=False)
    for first, stop, share in ((0, 300, 1.0), (150, 450, 0.5), (300, 600, 0.0)):
        test = stars.take(slice(first, stop)).write(
            tmp_path / f"new_{first}.h5", arrays=("flux", "error", "noisy")
        )
        found = evaluate(test, model)
        assert found.report["model"]["share_seen"] == pytest.approx(share)
        assert ("WARNING" in format_text(found.record)) == (share > 0)


@pytest.mark.parametrize("shipped", SHIPPED)
def test_no_test_star_of_a_reference_set_is_in_a_shipped_model(shipped):
    known = Model.load(shipped).manifest["training"]["row_sketch"]
    for reference in REFERENCE_SETS.values():
        for name, part in reference.parts.items():
            labels = simulate_params(0, part.n_rows or 1000, seed=part.seed, settings=reference.settings)
            assert share_seen(known, labels) in ({1.0, None} if name == "train" else {0.0, None})
