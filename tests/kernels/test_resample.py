"""Resampling: flux is conserved, lines keep their shape, errors stay what a fit of lines needs."""

from __future__ import annotations

import numpy as np
import pytest

from moefast.kernels.reference_resample import resample_reference, resampling_matrix
from moefast.kernels.resample import GOOD, NOT_FINITE, NOT_INCREASING, join, normalise, pixel_edges, resample

STEP = 0.4272
WAVE = 8000 + STEP * np.arange(400)


def one(flux, error=None, bad=None, *, wave=WAVE, to=WAVE, factor=1.0):
    flux = np.atleast_2d(flux)
    n, k = flux.shape
    error = np.ones((n, k)) if error is None else np.broadcast_to(error, (n, k))
    bad = np.zeros((n, k), bool) if bad is None else np.broadcast_to(bad, (n, k))
    starts = np.arange(n + 1, dtype=np.int64) * k
    return resample(
        wave,
        flux.ravel(),
        error.ravel().copy(),
        bad.ravel().copy(),
        starts,
        np.full(n, factor),
        pixel_edges(to),
    )


def inner(to, wave=WAVE, factor=1.0):
    return (to * factor > wave[6]) & (to * factor < wave[-7])


@pytest.mark.parametrize("step", [0.05, 0.2, 0.4272, 0.45, 0.8, 1.3])
def test_kernel_is_the_reference(step):
    rng = np.random.default_rng(1)
    wave = 8000 + np.cumsum(step * (1 + 0.02 * np.sin(np.arange(300) / 20)))
    flux, error = 1 + 0.1 * rng.standard_normal(300), np.exp(0.3 * rng.standard_normal(300))
    to = np.arange(wave[8], wave[-9], STEP)
    got_flux, got_error, mask, status = one(flux, error, wave=wave, to=to)
    want_flux, want_error = resample_reference(pixel_edges(wave), flux, error, pixel_edges(to))
    assert not mask.any()
    assert status[0, 0] == GOOD
    np.testing.assert_allclose(got_flux[0], want_flux, rtol=3e-7)
    np.testing.assert_allclose(got_error[0], want_error, rtol=3e-7)


def test_flux_is_conserved():
    """What is in the pixels is in the pixels of any other grid: a spectrum that ends in zeros, whole."""
    rng = np.random.default_rng(2)
    flux = np.where(np.abs(np.arange(400) - 200) < 100, rng.random(400), 0)
    for to in (8010 + 0.31 * np.arange(500), 8010 + 0.77 * np.arange(200), 8010.13 + STEP * np.arange(350)):
        assert to[0] < WAVE[95]
        assert to[-1] > WAVE[305]
        got = one(flux, to=to)[0][0]
        assert got.astype(float).sum() * (to[1] - to[0]) == pytest.approx(flux.sum() * STEP, rel=1e-6)


def test_a_constant_stays_constant_whatever_the_widths():
    rng = np.random.default_rng(3)
    wave = 8000 + np.cumsum(rng.uniform(0.3, 0.43, 400))
    to = np.arange(wave[5], wave[-6], 0.5)
    flux, _, mask, _ = one(np.full(400, 2.5), wave=wave, to=to)
    assert not mask.any()
    np.testing.assert_allclose(flux, 2.5, rtol=1e-6)


def test_the_grid_itself_comes_back():
    rng = np.random.default_rng(4)
    flux, error = rng.random(400), rng.uniform(0.5, 2, 400)
    got_flux, got_error, mask, _ = one(flux, error)
    assert not mask.any()
    np.testing.assert_allclose(got_flux[0], flux, rtol=1e-6)
    np.testing.assert_allclose(got_error[0], error, rtol=1e-6)


@pytest.mark.parametrize("velocity", [1.0, 4.0, 8.0, 100.0, -300.0, 300.0])
def test_lines_move_and_keep_their_shape(velocity):
    """Lines of FWHM 1.37 Å, in motion, come out at rest to 0.7 % of their depth."""
    sigma = 1.37 / 2.3548
    factor = 1 + velocity / 299_792.458

    def star(wave):
        return (
            1
            - 0.6 * np.exp(-0.5 * ((wave - 8080) / sigma) ** 2)
            - 0.3 * np.exp(-0.5 * ((wave - 8082) / sigma) ** 2)
        )

    flux, _, mask, _ = one(star(WAVE / factor), factor=factor)
    keep = ~mask[0]
    assert keep.sum() > 370
    assert np.abs(flux[0] - star(WAVE))[keep].max() < 0.007 * 0.6


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("step", [0.4272, 0.8, 0.2])
def test_errors_are_calibrated_for_lines(fraction, step):
    """The strength of a line, fitted with the errors that come out, scatters as those errors say."""
    rng = np.random.default_rng(5)
    k = int(170 / step)
    wave = 8000 + step * np.arange(k)
    to = 8012 + STEP * (fraction + np.arange(300))
    sigma = 0.05 * np.exp(0.5 * np.sin(wave))
    noise = sigma * rng.standard_normal((4000, k))
    flux, error, mask, _ = one(noise, sigma, wave=wave, to=to)
    assert not mask.any()
    line = np.exp(-0.5 * ((to - 8075) / 0.582) ** 2)
    weights = line / error.astype(float) ** 2
    pulls = (weights * flux).sum(1) / np.sqrt((weights * line).sum(1))
    # Of 4000 draws the scatter is known to 1.1 %.
    assert np.std(pulls) == pytest.approx(1, abs=0.04)
    assert np.mean(np.abs(pulls) < 1) == pytest.approx(0.683, abs=0.03)


def test_bad_pixels_cost_their_own_place_only():
    bad = np.zeros(400, bool)
    bad[[150, 200, 201, 202]] = True
    flux = 1 + 0.1 * np.sin(np.arange(400) / 5)
    spoilt = np.where(bad, 1e9, flux)
    clean = one(flux, factor=1 + 0.5 * STEP / 8080)[0][0]
    got, error, mask, _ = (a[0] for a in one(spoilt, bad=bad, factor=1 + 0.5 * STEP / 8080))
    lost = np.flatnonzero(mask & inner(WAVE))
    # Half a pixel further: each bad pixel covers half of two, two neighbours three quarters and more.
    assert set(lost) <= {149, 150, 199, 200, 201, 202}
    assert {149, 150, 200, 201} <= set(lost)
    assert np.abs(got - clean)[~mask].max() < 0.01
    assert np.all(np.isinf(error[mask]))
    assert not got[mask].any()


def test_pixels_that_are_left_out_are_lost_not_bridged():
    keep = np.ones(400, bool)
    keep[100:140] = False
    keep[300] = False
    wave, flux = WAVE[keep], np.ones(keep.sum())
    _, _, mask, _ = one(flux, wave=wave)
    np.testing.assert_array_equal(np.flatnonzero(mask[0]), [*range(100, 140), 300])


def test_what_is_not_covered_is_lost():
    to = 7990 + STEP * np.arange(450)
    _, error, mask, _ = one(np.ones(400), to=to)
    covered = (to > WAVE[0] - 0.25 * STEP) & (to < WAVE[-1] + 0.25 * STEP)
    np.testing.assert_array_equal(~mask[0], covered)
    assert np.isinf(error[0][mask[0]]).all()
    assert one(np.ones(400), to=to + 5000)[2].all()


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda w: np.where(np.arange(400) == 77, np.nan, w), (NOT_FINITE, 77)),
        (lambda w: np.where(np.arange(400) == 77, w[76], w), (NOT_INCREASING, 77)),
        (lambda w: w[::-1], (NOT_INCREASING, 1)),
    ],
)
def test_wavelengths_that_make_no_sense(change, status):
    flux, _, mask, found = one(np.ones(400), wave=change(WAVE))
    assert tuple(found[0]) == status
    assert mask.all()
    assert not flux.any()


def test_rows_of_different_lengths_are_alone():
    rng = np.random.default_rng(6)
    lengths = [400, 1, 37, 0, 250]
    waves = [WAVE[:n] for n in lengths]
    fluxes = [rng.random(n) for n in lengths]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    edges = pixel_edges(WAVE)
    together = resample(
        np.concatenate(waves), np.concatenate(fluxes), np.ones(starts[-1]), np.zeros(starts[-1], bool), starts,
        np.linspace(1, 1.0002, 5), edges,
    )  # fmt: skip
    assert together[2][[1, 3]].all()
    for row in (0, 2, 4):
        alone = resample(
            waves[row], fluxes[row], np.ones(lengths[row]), np.zeros(lengths[row], bool), np.array([0, lengths[row]]),
            np.linspace(1, 1.0002, 5)[row : row + 1], edges,
        )  # fmt: skip
        for a, b in zip(together[:3], alone[:3], strict=True):
            assert a[row].tobytes() == b[0].tobytes()


def test_rows_on_one_grid_have_the_bits_that_they_have_alone():
    """Weights are kept from one row to the next as long as wavelengths and velocity are the same."""
    rng = np.random.default_rng(8)
    factor = np.array([1, 1, 1.0002, 1.0002, 1, 0.9997, 1.00021])
    n = len(factor)
    flux, error, bad = rng.random((n, 400)), rng.uniform(0.5, 2, (n, 400)), rng.random((n, 400)) < 0.05
    wave = np.delete(np.append(WAVE, WAVE[-1] + STEP), 200)
    edges = pixel_edges(WAVE[20:-20] + 0.1)
    together = resample(wave, flux.ravel(), error.ravel(), bad.ravel(), np.arange(n + 1) * 400, factor, edges)
    assert 0.05 < together[2].mean() < 0.3
    for row in range(n):
        alone = resample(
            wave, flux[row], error[row], bad[row], np.array([0, 400]), factor[row : row + 1], edges
        )
        for a, b in zip(together, alone, strict=True):
            assert a[row].tobytes() == b[0].tobytes()


def test_arms_are_joined_by_their_variances():
    flux, error = np.array([[1, 2, 3, 9]], "f4"), np.array([[1, 1, np.inf, np.inf]], "f4")
    mask = np.array([[False, False, True, True]])
    beside = (
        np.array([[5, 9, 7, 9]], "f4"),
        np.array([[2, 1, 3, 1]], "f4"),
        np.array([[False, True, False, True]]),
    )
    join(flux, error, mask, beside)
    np.testing.assert_allclose(flux[0], [(1 * 4 + 5 * 1) / 5, 2, 7, 9])
    np.testing.assert_allclose(error[0, :3], [np.sqrt(4 / 5), 1, 3], rtol=1e-6)
    np.testing.assert_array_equal(mask[0], [False, False, False, True])
    with pytest.raises(ValueError, match="of one shape"):
        join(flux, error, mask[:, :3], beside)


def test_nothing_is_checked_in_vain():
    with pytest.raises(ValueError, match="must fit together"):
        resample(
            WAVE,
            np.ones(400),
            np.ones(399),
            np.zeros(400, bool),
            np.array([0, 400]),
            np.ones(1),
            pixel_edges(WAVE),
        )
    with pytest.raises(ValueError, match="a factor each"):
        resample(
            WAVE,
            np.ones(400),
            np.ones(400),
            np.zeros(400, bool),
            np.array([0, 400]),
            np.ones(2),
            pixel_edges(WAVE),
        )


def test_weights_of_a_shift_by_whole_pixels_are_one():
    weights = resampling_matrix(pixel_edges(WAVE), pixel_edges(WAVE[20:30]))
    np.testing.assert_allclose(weights[:, 20:30], np.eye(10), atol=1e-9)


def test_normalise_divides_by_the_median_of_good_pixels():
    rng = np.random.default_rng(7)
    flux = (5 + rng.random((3, 101))).astype("f4")
    error = np.full((3, 101), 0.5, "f4")
    mask = rng.random((3, 101)) < 0.2
    mask[2] = True
    median = [np.median(flux[i][~mask[i]]) for i in range(2)]
    want = flux.copy()
    normalise(flux, error, mask)
    for i in range(2):
        np.testing.assert_allclose(flux[i], want[i] / median[i], rtol=1e-6)
        np.testing.assert_allclose(error[i], 0.5 / median[i], rtol=1e-6)
    np.testing.assert_array_equal(flux[2], want[2])
    sky = rng.normal(0, 1, (1, 101)).astype("f4") - 1
    before = sky.copy()
    normalise(sky, np.ones((1, 101), "f4"), np.zeros((1, 101), bool))
    np.testing.assert_allclose(sky, before / 0.1, rtol=1e-6)
