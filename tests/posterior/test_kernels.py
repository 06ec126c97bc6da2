"""The compiled posterior against its description; gaps, scales, neighbours."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from made_clouds import assert_expert_labels, expert_label_bound, mixture, stars
from made_correction import with_correction

from moefast.kernels import cloud_posterior
from moefast.posterior.cells import alike_pixels
from moefast.posterior.mixture import N_APART
from moefast.spectra.quality import assess, good_pixels

LABELS = 4


@pytest.fixture(scope="module")
def mix():
    return mixture()


def assert_as_described(mix, flux, error, mask=None, rows=slice(None), expected=None):
    found = mix.outputs(flux, error, mask)
    seen = error if mask is None else np.where(mask, np.nan, error)
    expected = mix.describe(flux, seen) if expected is None else expected

    def close(name, absolute, relative=0.0):
        np.testing.assert_allclose(
            found[name][rows], expected[name][rows], rtol=relative, atol=absolute, err_msg=name
        )

    close("log_g", 1e-5)
    close("label", 1e-5, 1e-5)
    assert_expert_labels(
        mix, flux[rows], seen[rows], found["expert_label"][rows], expected["expert_label"][rows]
    )
    close("label_sd", 0, 1e-4)
    spread = expected["label_sd"][rows][:, :1] * expected["label_sd"][rows]
    assert (np.abs(found["label_cov"][rows] - expected["label_cov"][rows]) <= 1e-4 * spread).all()
    close("weights", 1e-5)
    # Logarithms of widths down to 1e-4 dex, where a millionth of a dex is a per cent.
    widths = np.exp(found["error_features"][rows][:, 1:3]), np.exp(expected["error_features"][rows][:, 1:3])
    np.testing.assert_allclose(*widths, rtol=1e-4, atol=1e-5)
    close("log_g_err", 0, 1e-4)
    close("chi2", 1e-6, 1e-3)
    close("distance", 1e-5, 1e-3)
    for name in ("strength", "scale", "log_level"):
        close(name, 0, 1e-6)
    # Of a point as far as it goes: that is what a user's labels are corrected by.
    close("point", 1e-4, 1e-4)
    return found


def assert_same_bits(found, expected, rows, of=slice(None)):
    for name, array in found.items():
        np.testing.assert_array_equal(array[rows], expected[name][of], err_msg=name)


@pytest.mark.parametrize("n", [0, 1, 31, 33])
def test_any_number_of_rows(mix, n):
    flux, error = stars(mix, n)
    found = assert_as_described(mix, flux, error) if n else mix.outputs(flux, error)
    assert found["label"].shape == (n, LABELS)


@pytest.mark.parametrize(("q", "n_sky", "p"), [(1, 0, 192), (3, 0, 192), (4, 1, 193), (12, 8, 192)])
@pytest.mark.parametrize("calibrated", [(0.5, 0.1), (0.9, 0.3)])
def test_slopes_of_two_widths(q, n_sky, p, calibrated):
    made = mixture(p=p, q=q, n_sky=n_sky, calibrated=calibrated)
    flux, error = stars(made, 70)
    flux[35:] *= 1 + 0.2 * np.linspace(-1, 1, p, dtype=np.float32)
    error[::3, : p // 2] = np.nan
    found = assert_as_described(made, flux, error)
    # They do what they are for: most answers are others than those of slopes of one width.
    usual = mixture(p=p, q=q, n_sky=n_sky).outputs(flux, error)
    assert np.median(np.abs(found["label_sd"][:35] / usual["label_sd"][:35] - 1)) > 1e-3
    alone = made.outputs(flux[40:41], error[40:41])
    assert_same_bits(alone, found, slice(None), slice(40, 41))


@pytest.mark.parametrize(
    ("q", "labels", "widths"), [(0, 3, (5, 9, 7)), (3, 5, (64, 32, 33)), (3, 4, (16, 9, 10))]
)
def test_correction_of_log_g(q, labels, widths):
    plain = mixture(q=q, labels=labels)
    made = with_correction(plain, widths)
    flux, error = stars(made, 70)
    error[::3, :50] = np.nan
    found, usual = assert_as_described(made, flux, error), plain.outputs(flux, error)
    # log g moves by up to one standard deviation of the posterior, and nothing else but what is made of it.
    moved = (found["label"][:, 0] - usual["label"][:, 0]) / usual["label_sd"][:, 0]
    assert np.abs(moved).max() <= 1
    assert np.ptp(moved) > 0.3
    for name in set(found) - {"log_g", "log_g_err", "error_features", "label"}:
        np.testing.assert_array_equal(found[name], usual[name], err_msg=name)
    np.testing.assert_array_equal(found["label"][:, 1:], usual["label"][:, 1:])
    np.testing.assert_array_equal(found["log_g"][:, 0], np.clip(found["label"][:, 0], *made.label_range))
    alone = made.outputs(flux[40:41], error[40:41])
    assert_same_bits(alone, found, slice(None), slice(40, 41))


def test_correction_without_a_star():
    made = with_correction(mixture())
    flux, error = stars(made, 3)
    flux[1], error[1] = np.inf, np.nan
    flux[2] = 1e30
    found = made.outputs(flux, error)
    assert np.isfinite(found["log_g"][0])
    alone = made.outputs(flux[:1], error[:1])
    assert_same_bits(alone, found, slice(None), slice(0, 1))


@pytest.mark.parametrize("n", [26, 40])
def test_slopes_where_groups_of_stars_differ_in_some_coordinates(n):
    made = mixture(p=576, m=90, n=n, q=12, n_sky=8, calibrated=(0.5, 0.3))
    precision = made._space.groups.precision
    assert (precision != precision[0]).any((0, 1)).sum() == N_APART
    flux, error = stars(made, 20)
    flux[10:] *= 1 + 0.05 * np.linspace(-1, 1, 576, dtype=np.float32)
    assert_as_described(made, flux, error)


@pytest.fixture(scope="module")
def far_apart():
    """Stars 4000 σ² from all clouds of most experts, whose evidences single precision holds to 10⁻³."""
    made = mixture(p=700, m=130, n=65, q=12, t=8, n_sky=8)
    flux, error = stars(made, 257)
    mask = np.random.default_rng(257).random(flux.shape) < 0.05
    return made, flux, np.where(mask, np.nan, error), made.describe(flux, np.where(mask, np.nan, error))


def test_experts_far_from_a_star_are_as_close_as_single_precision_allows(far_apart):
    made, flux, error, expected = far_apart
    found = assert_as_described(made, flux, error, expected=expected)["expert_label"]
    # There are stars that need the bound, and they use some of it.
    off = np.abs(found - expected["expert_label"])
    rows = np.flatnonzero(off.max(1) > 5e-5)
    assert len(rows)
    assert (off[rows] / expert_label_bound(made, flux[rows], error[rows])).max() > 0.1


def swapped(made):
    """Two clouds of an expert in each other's place."""
    order = np.arange(len(made.keys))
    order[[1, 2]] = [2, 1]
    return replace(made, keys=made.keys[order])


def one_mean_off(made):
    labels = made.labels.copy()
    labels[40, 0] += 1e-3
    return replace(made, labels=labels)


def all_means_off(made):
    return replace(made, labels=made.labels + np.float32(1e-4))


def one_tangent_lost(made):
    tangents = made.tangents.copy()
    tangents[90, 3] = 0
    return replace(made, tangents=tangents)


@pytest.mark.parametrize("planted", [swapped, one_mean_off, all_means_off, one_tangent_lost])
def test_the_bound_of_experts_sees_a_kernel_that_is_wrong(far_apart, planted):
    made, flux, error, expected = far_apart
    found = planted(made).outputs(flux, error)["expert_label"]
    with pytest.raises(AssertionError, match="expert_label: row"):
        assert_expert_labels(made, flux, error, found, expected["expert_label"])


@pytest.mark.parametrize("t", [0, 1, 4, 6])
def test_any_number_of_tangents(t):
    made = mixture(t=t, n=9)
    assert_as_described(made, *stars(made, 9))


@pytest.mark.parametrize("m", [1, 2, 63, 64, 65, 130])
def test_any_number_of_clouds(m):
    made = mixture(m=m, experts=min(m, 2))
    assert_as_described(made, *stars(made, 9))


@pytest.mark.parametrize(
    ("p", "n", "q", "labels"), [(96, 2, 0, 2), (97, 9, 3, 5), (1031, 40, 1, 3), (576, 62, 13, 3)]
)
def test_any_size_of_the_space(p, n, q, labels):
    made = mixture(p=p, n=n, q=q, labels=labels)
    assert_as_described(made, *stars(made, 6))


GAPS = {
    "none": lambda pixel, draw: pixel < 0,
    "at random": lambda pixel, draw: draw.random(pixel.size) < 0.28,
    "a block": lambda pixel, draw: (pixel > 150) & (pixel < 260),
    # Beyond 400, two coordinates of this space are seen together only, and the best point of the space loses digits.
    "an edge": lambda pixel, draw: pixel > 480,
    "all but a few": lambda pixel, draw: (pixel < 300) | (pixel > 330),
}


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("noise", ["of the training set", "flat", "of every pixel"])
def test_cells_of_several_pixels(gap, noise):
    made = mixture(p=576, m=70, n=9, q=2)
    cells, shares = alike_pixels(
        made.directions, made.noise_shape, made.numbers["library_precision"], n_cells=60
    )
    made = replace(made, cells=cells, cell_shares=shares)
    flux, error = stars(made, 9, snr=20)
    draw = np.random.default_rng(4)
    if noise == "flat":
        error = np.full_like(error, 0.03)
    elif noise == "of every pixel":
        error = (error * np.exp(draw.normal(0, 0.5, error.shape))).astype(np.float32)
    lost = np.stack([GAPS[gap](np.arange(576), draw) for _ in flux])
    assert_as_described(made, flux, error, lost)


@pytest.mark.parametrize("reach", [0, 1, 5, 8])
def test_last_coordinates_without_tangents(reach):
    made = mixture(n=12)
    tangents = made.tangents.copy()
    tangents[:, :, reach:] = 0
    assert_as_described(replace(made, tangents=tangents), *stars(made, 9))


def test_nuisances_that_grow_with_the_noise():
    made = mixture(q=3, n_sky=2)
    found = assert_as_described(made, *stars(made, 9))
    assert np.abs(found["label"] - mixture(q=3).outputs(*stars(made, 9))["label"]).max() > 1e-4


@pytest.mark.parametrize("snr", [1, 30, 100, 300])
def test_faint_and_bright_stars(mix, snr):
    assert_as_described(mix, *stars(mix, 40, snr=snr))


def test_a_star_unlike_any_cloud(mix):
    flux, error = stars(mix, 20)
    assert_as_described(mix, flux + 3 * error, error)
    assert_as_described(mix, np.ones_like(flux), error)
    assert_as_described(mix, np.zeros_like(flux), error)


def test_bad_pixels_weigh_nothing(mix):
    flux, error = stars(mix, 40)
    mask = np.zeros(flux.shape, bool)
    flux[0, 3], flux[1, 5], error[2, 7], error[3, 9], error[4, 11], error[5, 13] = (
        np.nan,
        np.inf,
        np.nan,
        -1,
        0,
        2e6,
    )
    mask[6, :71] = True
    mask[7:20] = np.random.default_rng(2).random((13, flux.shape[1])) < 0.28
    mask[20] = True
    mask[20, 100] = False
    mask[21] = True
    flux[22], error[23] = np.nan, np.inf
    found = assert_as_described(mix, flux, error, mask)
    changed = np.where(mask | ~np.isfinite(flux) | ~(error > 0) | ~(error <= 1e6))
    flux[changed], error[changed] = 7.0, np.nan
    again = mix.outputs(flux, error)
    for name in set(found) - {"flag"}:
        np.testing.assert_array_equal(found[name], again[name], err_msg=name)


def test_quality_is_that_of_assess(mix):
    flux, error = stars(mix, 70)
    mask = np.random.default_rng(2).random(flux.shape) < 0.002
    flux[4, 7], error[9, 3], error[20], flux[21], mask[30] = np.nan, -1.0, 0.0, np.inf, True
    flux[31] *= -1
    _, quality = mix.score(flux, error, mask)
    expected = assess(flux, error, good_pixels(flux, error, mask), mask)
    np.testing.assert_array_equal(quality.n_good, expected.n_good)
    np.testing.assert_array_equal(quality.flag, expected.flag)
    assert set(quality.flag) == {0, 3, 4, 7}
    np.testing.assert_array_equal(quality.snr_median, expected.snr_median)
    np.testing.assert_allclose(quality.snr_norm, expected.snr_norm, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e5])
def test_the_unit_of_flux_does_not_matter(mix, scale):
    flux, error = stars(mix, 20)
    expected = mix.outputs(flux, error)
    scaled = (scale * flux).astype(np.float32), (scale * error).astype(np.float32)
    found = assert_as_described(mix, *scaled)
    np.testing.assert_allclose(found["log_g"], expected["log_g"], atol=1e-5)
    np.testing.assert_allclose(found["scale"], scale * expected["scale"], rtol=1e-6)


def test_beyond_all_numbers_there_is_no_answer_and_no_harm(mix):
    flux, error = stars(mix, 40)
    clean = mix.outputs(flux, error)
    flux[3] *= np.float32(1e25)
    found = mix.outputs(flux, error)
    assert np.isnan(found["log_g"][3])
    assert np.isnan(found["log_g_err"][3])
    assert_same_bits(found, clean, *(2 * (np.delete(np.arange(40), 3),)))


def test_a_row_has_the_same_bits_alone_in_any_block_and_with_any_number_of_threads(mix, monkeypatch):
    flux, error = stars(mix, 150)
    error[::7, :50] = np.nan
    whole = mix.outputs(flux, error)
    for a, b in itertools.pairwise([0, 1, 2, 5, 37, 70, 133, 150]):
        assert_same_bits(mix.outputs(flux[a:b], error[a:b]), whole, slice(None), slice(a, b))
    order = np.random.default_rng(0).permutation(150)
    assert_same_bits(mix.outputs(flux[order], error[order]), whole, slice(None), order)
    for cores in (1, 3):
        monkeypatch.setattr("moefast.core.threads.CORES", cores)
        assert_same_bits(mix.outputs(flux, error), whole, slice(None))


def test_bad_neighbours_change_no_bit(mix):
    flux, error = stars(mix, 40)
    clean = mix.outputs(flux, error)
    flux[[0, 9, 17]], error[[1, 10]], flux[20, 3] = np.nan, np.inf, 3e38
    kept = np.setdiff1d(np.arange(40), [0, 1, 9, 10, 17, 20])
    assert_same_bits(mix.outputs(flux, error), clean, kept, kept)


def test_any_layout_and_precision_gives_the_same_bits(mix):
    flux, error = stars(mix, 33)
    expected = mix.outputs(flux, error)
    assert_same_bits(mix.outputs(np.asfortranarray(flux), error.astype(np.float64)), expected, slice(None))
    assert_same_bits(mix.outputs(flux, error, np.zeros(flux.shape, bool)), expected, slice(None))


def test_shapes_are_checked(mix):
    flux, error = stars(mix, 3)
    with pytest.raises(ValueError, match=r"shape \(n, 192\)"):
        mix.outputs(flux[:, 1:], error[:, 1:])
    with pytest.raises(ValueError, match="flux and error"):
        mix.outputs(flux, error[:2])
    with pytest.raises(ValueError, match="mask must be bool of shape"):
        mix.outputs(flux, error, np.ones((3, 2), bool))
    with pytest.raises(ValueError, match="clouds in 7 coordinates"):
        cloud_posterior(flux, error, None, mix._space, mixture(n=6)._clouds)


def test_a_device_is_given_the_library_once(monkeypatch):
    """Threads that score blocks at the same time share one scorer, which keeps the library on the device."""
    made, mix = [], mixture()
    flux, error = stars(mix, 12)

    class Scorer:
        def __init__(self, *arrays):
            made.append(arrays)

        def __call__(self, flux, error, mask):
            return cloud_posterior(flux, error, mask, *made[-1])

    monkeypatch.setattr(
        "moefast.posterior.mixture.on_cuda", lambda name, backend: {"CudaPosteriorScorer": Scorer}[name]
    )
    with ThreadPoolExecutor(4) as pool:
        parts = list(
            pool.map(
                lambda a: mix.outputs(flux[a : a + 3], error[a : a + 3], backend="cuda"), range(0, 12, 3)
            )
        )
    assert len(made) == 1
    for name, values in mix.outputs(flux, error).items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), values)
