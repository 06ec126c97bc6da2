"""The second tower of the gate: its share, its views, and the mixture with and without it."""

import dataclasses
import math

import numpy as np
import pytest
from made_view import SHARE_OF_LOST_PIXELS
from plans import layers, random_mixture, random_tower
from tolerances import assert_close

from moefast.export import build, read_mixture, verify
from moefast.gating.tower import FEATURES, RAMP, VIEWS, Tower, known_views, quality_logs
from moefast.kernels import perceptron
from moefast.kernels.reference import perceptron_reference
from moefast.ops.on_numpy import NumPyArithmetic
from moefast.spectra.quality import QUALITY_FEATURES, quality_features


def stars(mixture, n=40, seed=0):
    """Noisy spectra with snr_norm from 1 to 6, some pixels of which are bad."""
    rng = np.random.default_rng(seed)
    level = np.geomspace(0.15, 1.2, n)[:, None]
    error = level * np.exp(0.3 * rng.standard_normal((n, mixture.n_pixels)))
    flux = mixture.reference + error * rng.standard_normal(error.shape)
    flux[::3, 5] = np.nan
    error[1::3, 7:9] = [0, np.inf]
    return flux.astype(np.float32), error.astype(np.float32)


def n_seen(sees):
    return 14 if sees == FEATURES else VIEWS[sees].n_features


@pytest.mark.parametrize("n", [0, 1, 7, 600])
def test_the_perceptron_is_its_reference(n):
    rng = np.random.default_rng(n)
    net = layers(rng, 13, 37, 5)
    features = rng.standard_normal((2 * n, 13)).astype(np.float32)[::2]
    found = perceptron(features, net)
    assert found.dtype == np.float32
    assert_close(found, perceptron_reference(features, *net), made_in=np.float32)
    for i in range(0, n, 97):
        np.testing.assert_array_equal(perceptron(features[i : i + 1], net)[0], found[i])


def test_a_perceptron_spoils_no_neighbour_and_refuses_what_does_not_fit():
    rng = np.random.default_rng(0)
    net = layers(rng, 4, 3, 2)
    features = rng.standard_normal((5, 4)).astype(np.float32)
    features[2, 1] = np.nan
    found = perceptron(features, net)
    assert np.isnan(found[2]).all()
    assert np.isfinite(np.delete(found, 2, 0)).all()
    with pytest.raises(ValueError, match="do not fit together"):
        perceptron(features[:, :3], net)
    with pytest.raises(ValueError, match="do not fit together"):
        perceptron(features, (*net[:2], net[2].T, net[3]))


def test_the_share_falls_to_zero_at_the_limit():
    tower = random_tower(10, 3, limit=2.0)
    snr = np.array([0, 1, 2 - 2 * RAMP, 2 - RAMP, 2, np.nextafter(2, 3), 9, np.inf, np.nan])
    assert_close(tower.share(snr), [1, 1, 1, 0.5, 0, 0, 0, 0, 0])
    assert tower.share(snr.astype(np.float32)).dtype == np.float32
    everywhere = dataclasses.replace(tower, limit=math.inf)
    np.testing.assert_array_equal(everywhere.share(snr), [1] * 8 + [0])


def test_logits_are_the_share_times_the_perceptron_and_rows_without_share_are_not_looked_at():
    tower = random_tower(10, 3, limit=2.0)
    rng = np.random.default_rng(1)
    seen = rng.standard_normal((6, 10)).astype(np.float32)
    snr = np.array([1, 3, 1.98, np.nan, 1.5, 2], np.float32)

    def view(rows):
        np.testing.assert_array_equal(rows, [0, 2, 4])
        return seen[rows]

    expected = tower.share(snr)[:, None] * perceptron_reference(seen, *tower.layers)
    assert_close(tower.logits(snr, view), expected, made_in=np.float32)
    # The description sees every row.
    op, wide = NumPyArithmetic(tower.arrays()), snr.astype(np.float64)
    exact = tower.describe(op, seen.astype(np.float64), np.nan_to_num(wide, nan=3)[:, None], None, None, 0)
    assert exact.dtype == np.float64
    assert_close(
        exact, tower.share(snr.astype(np.float64))[:, None] * perceptron_reference(seen, *tower.layers)
    )
    nobody = tower.logits(snr[[1, 3]], lambda _: pytest.fail("nobody is below the limit"))
    np.testing.assert_array_equal(nobody, np.zeros((2, 3)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sees": "error"}, "sees one of"),
        ({"limit": 0.0}, "limit of a tower must be positive"),
        ({"limit": math.nan}, "limit of a tower must be positive"),
        ({"layers": layers(np.random.default_rng(0), 9, 4, 3)}, "takes 10 features; found 9"),
    ],
)
def test_a_tower_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(random_tower(10, 3, sees="quality"), **changes)


def test_layers_that_do_not_fit_are_refused():
    w1, b1, w2, b2 = layers(np.random.default_rng(0), 10, 4, 3)
    for wrong in ((w1, b1[1:], w2, b2), (w1, b1, w2.T, b2), (w1, b1, w2, b2[1:])):
        with pytest.raises(ValueError, match="do not fit together"):
            Tower("quality", wrong)


def test_quality_logs_are_the_steps_of_the_quality_features():
    rng = np.random.default_rng(3)
    error = (np.exp(rng.normal(-2, 1, (30, 200))) * np.exp(rng.normal(0, 1, (30, 1)))).astype(np.float32)
    error[4] = 0.25
    good = rng.random(error.shape) < 0.9
    good[7] = False
    found, features = quality_logs(error, good), quality_features(error, good)
    assert found.shape == (30, len(QUALITY_FEATURES))
    assert np.isnan(found[7]).all()
    rows = np.setdiff1d(np.arange(30), [7])
    steps = found[rows] / 0.1
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
    # A spectrum whose errors are all the same has no deviation, and no shape.
    assert found[4, 1] == np.float32(-14)
    np.testing.assert_array_equal(found[4, 8:], 0)
    others = np.setdiff1d(rows, [4])
    np.testing.assert_allclose(np.exp(found[others, :8]), features[others, :8], rtol=1e-5)
    shape = features[others, 8:]
    np.testing.assert_allclose(found[others, 8:], np.sign(shape) * np.log1p(np.abs(shape)), atol=1e-5)


@pytest.mark.parametrize("sees", [*known_views(), "own"])
@pytest.mark.parametrize("limit", [2.0, math.inf])
def test_a_mixture_adds_the_logits_of_its_tower(sees, limit, monkeypatch):
    monkeypatch.setitem(VIEWS, "own", SHARE_OF_LOST_PIXELS)
    plain = random_mixture()
    flux, error = stars(plain)
    mask = np.zeros(flux.shape, bool)
    mask[2::5, 100:300] = True
    mixture = dataclasses.replace(plain, tower=random_tower(n_seen(sees), 5, sees, limit))
    found, expected = mixture.predict(flux, error, mask), mixture.predict_reference(flux, error, mask)
    without, quality = plain.score(flux, error, mask)
    for name in ("log_g", "log_g_err", "weights"):
        assert_close(getattr(found, name), getattr(expected, name), made_in=np.float32, factor=20)
    beyond = quality.snr_norm >= limit
    changed = np.abs(found.weights - without.weights).max(1)
    assert (changed[quality.snr_norm < 1.9] > 1e-5).all()
    if limit == 2:
        assert 5 < beyond.sum() < 35
        np.testing.assert_array_equal(found.log_g[beyond], without.log_g[beyond])
        np.testing.assert_array_equal(found.weights[beyond], without.weights[beyond])


@pytest.mark.parametrize("sees", [*known_views(), "own"])
def test_rows_of_a_mixture_with_a_tower_do_not_know_their_neighbours(sees, monkeypatch):
    monkeypatch.setitem(VIEWS, "own", SHARE_OF_LOST_PIXELS)
    mixture = dataclasses.replace(random_mixture(), tower=random_tower(n_seen(sees), 5, sees, 2.0))
    flux, error = stars(mixture)
    flux[9] = np.nan
    found = mixture.predict(flux, error)
    for rows in (slice(0, 1), slice(3, 20), slice(30, 40)):
        alone = mixture.predict(flux[rows], error[rows], first_row=rows.start)
        np.testing.assert_array_equal(alone.log_g, found.log_g[rows])
        np.testing.assert_array_equal(alone.weights, found.weights[rows])


def test_a_tower_must_fit_the_mixture():
    mixture = random_mixture()
    for tower in (random_tower(14, 4), random_tower(13, 5)):
        with pytest.raises(ValueError, match="tower of 14 features for 5 experts"):
            dataclasses.replace(mixture, tower=tower)


def test_a_view_of_ones_own_is_exported_and_read_back(monkeypatch):
    monkeypatch.setitem(VIEWS, "own", SHARE_OF_LOST_PIXELS)
    mixture = dataclasses.replace(random_mixture(), tower=random_tower(n_seen("own"), 5, "own", 2.0))
    model = build(mixture)
    assert verify(model, mixture)
    assert read_mixture(model, mixture.wave).tower.sees == "own"
    monkeypatch.delitem(VIEWS, "own")
    with pytest.raises(ValueError, match=r"sees one of .*'quality'.*; found 'own'"):
        dataclasses.replace(mixture.tower)
