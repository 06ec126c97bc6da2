"""Clouds of stars beyond the training set, and clouds that are small in what stars are grouped by."""

import numpy as np
import pytest

from moefast.posterior import fit_clouds, sky_residuals
from moefast.posterior.further_clouds import (
    BEYOND_SHARE,
    BEYOND_SLAB,
    BEYOND_STEPS,
    BLEND_SHARE,
    LIGHT_OF_OTHER,
    blended,
)
from moefast.posterior.library import FAST_SHARE, LEAST_OF_A_KIND, LEAST_SCATTER, SLOW
from moefast.simulate import Emulator, Settings
from moefast.simulate.rows import noise_model

P, R, N = 30, 6, 4000


def toy(gravity=2.0, fastest=40):
    """Basis of components, labels and components of stars.

    The second component is `gravity` times log g, and the fourth is up to `fastest` and no label.
    """
    rng = np.random.default_rng(0)
    labels = np.column_stack([rng.uniform(1, 5, N), rng.uniform(4000, 6000, N), rng.uniform(-2, 0, N)])
    u = (labels[:, 1] - 6000) / 2000
    z = np.zeros((N, R))
    z[:, 0], z[:, 1], z[:, 2] = 8 * u + 3 * u**2, gravity * labels[:, 0], labels[:, 2]
    z[:, 3] = np.linspace(-fastest, fastest, N)
    return np.linalg.qr(rng.standard_normal((P, R)))[0], labels, z


def clouds(gravity=2.0, fastest=40, n_tangents=2, **options):
    """Stars whose spectra are a parabola in T_eff and linear in the other labels."""
    basis, labels, z = toy(gravity, fastest)
    reference = np.linspace(1, 2, P)
    arrays = fit_clouds(
        z.astype(np.float32), labels, (labels[:, 1] > 5000).astype(int), 2, basis=basis, reference=reference,
        noise_shape=np.ones(P), n_clouds=40, n_tangents=n_tangents, **options,
    )  # fmt: skip
    # Coordinates to components: the columns of the directions are basis times F.
    forth = basis.T @ arrays["directions"][:, :R].astype(float)
    return arrays, arrays["keys"][:, :R].astype(float) @ forth.T, z


def test_stars_beyond_go_on_as_their_neighbours_do():
    plain, _, _ = clouds()
    arrays, z, _ = clouds(beyond=True)
    further = arrays["labels"][:-1, 1] > 6000
    assert further.sum() > 0
    assert further.sum() % BEYOND_STEPS == 0
    assert np.exp(arrays["log_weights"][:-1])[further].sum() == pytest.approx(BEYOND_SHARE, rel=1e-4)
    # They belong to the expert of the hot end, and all clouds stay sorted by expert.
    first = arrays["first"]
    assert (np.flatnonzero(further) >= first[1]).all()
    assert first[-1] == len(arrays["keys"]) == len(plain["keys"]) + further.sum()
    # Their spectra: those of the mean T_eff of the cloud that is moved, and the slope at the end, 8 per 2000 K.
    moved = (arrays["labels"][:-1, 1][further].astype(float) - 6000) / 2000
    start = (moved % BEYOND_SLAB) - BEYOND_SLAB
    expected = 8 * start + 3 * start**2 + 8 * (moved - start)
    np.testing.assert_allclose(z[:-1][further][:, 0], expected, atol=0.15)


def test_clouds_of_stars_that_move_are_apart_and_small_in_velocity():
    """The fourth component is the velocity: without the option each cloud holds all of it."""
    velocity = np.linspace(-40, 40, N)
    scatter = []
    for options in ({}, {"velocity": velocity}, {"velocity": velocity, "beyond": True}):
        arrays, z, whole = clouds(**options)
        stars = arrays["labels"][:-1, 1] < 6000
        share = np.exp(arrays["log_weights"][:-1][stars].astype(float))
        scatter.append(np.sqrt(np.average(z[:-1, 3][stars] ** 2, weights=share)) / np.std(whole[:, 3]))
        first, n_fast = arrays["first"], np.array(arrays["n_fast"] or (0, 0))
        assert n_fast.shape == (2,)
        for k, n in enumerate(n_fast):
            of_expert = np.arange(first[k], first[k + 1])
            own, moves = z[of_expert, 3], of_expert >= first[k + 1] - n
            assert (np.abs(own[moves]) > SLOW).all()
            assert (np.abs(own[~moves & stars[of_expert]]) < SLOW).all() or not options
    assert n_fast.sum() == round(FAST_SHARE * 40)
    assert scatter[1] > scatter[0]
    assert scatter[1] > 0.75


def test_light_is_added_and_none_is_lost():
    stars = np.random.default_rng(0).normal(5, 1, (200, 4))
    draw = np.random.default_rng(1)
    np.testing.assert_array_equal(blended(stars, np.zeros(200), draw), stars.astype(np.float32))
    mixed = blended(stars, np.full(200, 0.3), draw).astype(float)
    np.testing.assert_allclose(mixed.sum(0), stars.sum(0), rtol=1e-6)
    others = (mixed - 0.7 * stars) / 0.3
    np.testing.assert_allclose(others[others[:, 0].argsort()], stars[stars[:, 0].argsort()], atol=1e-5)
    assert np.mean(np.abs(others - stars).max(1) < 1e-5) < 0.05


def test_clouds_of_blends_are_a_group_of_their_own_with_the_labels_of_the_brighter_star():
    plain, z_plain, whole = clouds(n_tangents=R)
    arrays, z, _ = clouds(n_tangents=R, n_blends=20)
    first = arrays["first"]
    assert (arrays["blends"], arrays["n_foreign"], plain["blends"], plain["n_foreign"]) == (True, 2, False, 1)
    assert len(first) == len(plain["first"]) + 1
    np.testing.assert_array_equal(first[:3], plain["first"][:3])
    np.testing.assert_allclose(z[: first[2]], z_plain[: first[2]], atol=1e-3)
    mine = slice(first[2], first[3])
    share = np.exp(arrays["log_weights"][mine].astype(float))
    assert share.sum() == pytest.approx(BLEND_SHARE, rel=1e-5)
    share /= share.sum()
    _, labels, _ = toy()
    mean = share @ arrays["labels"][mine]
    np.testing.assert_allclose(mean, labels.mean(0), rtol=1e-4)
    # The third component is [M/H]: of a blend it changes with that of the brighter star as its light does.
    apart = arrays["labels"][mine, 2] - mean[2]
    forth = np.linalg.lstsq(arrays["keys"][:, :R].astype(float), z, rcond=None)[0]
    along = arrays["tangents"][mine, :, :R].astype(float) @ forth
    covariance = share @ (apart * z[mine, 2]) + share @ (along[:, :, 2] * arrays["gains"][mine, :, 2]).sum(1)
    assert covariance / labels[:, 2].var() == pytest.approx(1 - np.mean(LIGHT_OF_OTHER), abs=0.03)
    # And light of many kinds varies less than that of one.
    spread = share @ (z[mine, 0] - share @ z[mine, 0]) ** 2 + share @ (along[:, :, 0] ** 2).sum(1)
    assert spread < 0.8 * whole[:, 0].var()


def test_keys_and_tangents_and_what_they_leave_out_are_all_scatter_of_the_stars():
    arrays, _, z = clouds()
    keys, tangents = (arrays[name][:-1, ..., :R].astype(float) for name in ("keys", "tangents"))
    share = np.exp(arrays["log_weights"][:-1].astype(float))
    moments = np.einsum("m,ma,mb->ab", share, keys, keys) + np.einsum(
        "m,mta,mtb->ab", share, tangents, tangents
    )
    # Noise is one in all pixels, and components are orthogonal: spectra have the moments of components.
    spectra = arrays["directions"][:, :R].astype(float)
    found = np.linalg.eigvalsh(spectra @ (moments + np.eye(R)) @ spectra.T)[-R:]
    expected = np.linalg.eigvalsh(z.T @ z / N + LEAST_SCATTER * np.eye(R))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_few_coordinates_hold_the_change_with_log_g():
    """Of the six components three vary, and that with log g varies least."""
    n = 2
    arrays, _, z = clouds(gravity=0.3, fastest=0, n_coordinates=n)
    assert np.argsort(z.var(0))[::-1].tolist()[:3] == [0, 2, 1]
    assert arrays["keys"].shape[1] == arrays["directions"].shape[1] == n + 2
    keys, log_g = arrays["keys"][:-1, :n].astype(float), arrays["labels"][:-1, 0].astype(float)
    terms = np.column_stack([np.ones(len(keys)), keys])
    left = log_g - terms @ np.linalg.lstsq(terms, log_g, rcond=None)[0]
    # In the two strongest components there is nothing of it.
    assert left.var() < 0.05 * log_g.var()


def test_without_enough_stars_of_a_kind_nothing_is_apart():
    velocity = np.zeros(N)
    velocity[:LEAST_OF_A_KIND] = 100
    arrays, _, _ = clouds(velocity=velocity)
    assert arrays["n_fast"] == ()
    assert len(arrays["keys"]) == len(clouds()[0]["keys"])


def test_residuals_of_sky_lines_are_groups_of_airglow():
    """Against what the simulator leaves of a group: the same shape, pixel by pixel."""
    wave = Emulator.load().wave
    noise = noise_model(Emulator.load(), Settings())
    shape = (noise.sky_variance / noise.response**2).astype(float)
    found = sky_residuals(wave, shape, 4.0)
    lit = noise.line_electrons.any(axis=1)
    assert found.shape == (len(wave), lit.sum())
    for mine, light in zip(found.T, noise.line_electrons[lit] / noise.response, strict=True):
        # Response and absorption by air, which differ along the arm, are no matter of the prior.
        assert np.corrcoef(mine, light)[0, 1] > 0.9
    brightest = found.sum(1).argmax()
    assert found[brightest].sum() == pytest.approx(4 * np.sqrt(shape[brightest]))
    assert sky_residuals(wave, shape, 0.0).shape == (len(wave), 0)


def test_residuals_of_sky_lines_beyond_the_table_follow_the_noise():
    wave = np.linspace(9000, 9500, 400)
    shape = np.ones(400)
    shape[[50, 200]] = 5, 9
    found = sky_residuals(wave, shape, 3.0)
    assert (found[[50, 200]].sum(1) > 0).all()
    assert found[200].sum() == pytest.approx(3 * 3)
    assert found[100:150].sum() == 0
