"""The posterior at a star's own noise as CUDA kernels, simulated: the description at block edges, bad pixels, slots."""

from dataclasses import replace

import numpy as np
import pytest
from made_clouds import assert_expert_labels, mixture, stars
from made_correction import with_correction
from numba import cuda

from moefast.core.errors import BackendError
from moefast.kernels import cloud_posterior
from moefast.kernels import clouds as of_clouds
from moefast.kernels.cuda import CudaPosteriorScorer, clouds, correction, information
from moefast.kernels.cuda.device import MOST_SHARED
from moefast.ops.on_numpy import NumPyArithmetic
from moefast.posterior.cells import alike_pixels
from moefast.posterior.forward import cloud_values
from moefast.predicting.engines import CudaEngine, without_kernels
from moefast.spectra.quality import assess, good_pixels

pytestmark = pytest.mark.usefixtures("small_tiles")


@pytest.fixture(scope="module")
def mix():
    return mixture(p=48, m=7, n=6, q=3, n_sky=1)


def assert_as_described(made, flux, error, mask=None):
    found = made.outputs(flux, error, mask, backend="cuda")
    seen = error if mask is None else np.where(mask, np.nan, error)
    expected = made.describe(flux, seen)

    def close(name, absolute, relative=0.0):
        np.testing.assert_allclose(found[name], expected[name], rtol=relative, atol=absolute, err_msg=name)

    # As tests/posterior/test_kernels.py has it for the CPU.
    close("log_g", 1e-5)
    close("label", 1e-5, 1e-5)
    assert_expert_labels(made, flux, seen, found["expert_label"], expected["expert_label"])
    close("label_sd", 0, 1e-4)
    spread = expected["label_sd"][:, :1] * expected["label_sd"]
    assert (np.abs(found["label_cov"] - expected["label_cov"]) <= 1e-4 * spread).all()
    close("weights", 1e-5)
    widths = (np.exp(each["error_features"][:, 1:3]) for each in (found, expected))
    np.testing.assert_allclose(*widths, rtol=1e-4, atol=1e-5)
    close("log_g_err", 0, 1e-4)
    close("chi2", 1e-6, 1e-3)
    close("distance", 1e-5, 1e-3)
    for name in ("strength", "scale", "log_level"):
        close(name, 0, 1e-6)
    close("point", 1e-4, 1e-4)
    return found


def assert_same_bits(found, expected, rows=slice(None), of=slice(None)):
    for name, array in found.items():
        np.testing.assert_array_equal(array[rows], expected[name][of], err_msg=name)


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33])
def test_any_number_of_rows(n):
    made = mixture(p=31, m=4, n=4, q=1)
    flux, error = stars(made, n)
    found = assert_as_described(made, flux, error) if n else made.outputs(flux, error, backend="cuda")
    twin = made.outputs(flux, error)
    assert {name: (a.shape, a.dtype) for name, a in found.items()} == {
        name: (a.shape, a.dtype) for name, a in twin.items()
    }


@pytest.mark.parametrize("t", [0, 1, 4, 5])
def test_any_number_of_tangents(t):
    made = mixture(p=48, m=7, t=t, n=9)
    assert_as_described(made, *stars(made, 3))


@pytest.mark.parametrize("m", [1, 3, 4, 5, 13])
def test_any_number_of_clouds(m):
    made = mixture(p=48, m=m, experts=min(m, 2))
    assert_as_described(made, *stars(made, 3))


@pytest.mark.parametrize(
    ("p", "n", "q", "labels"),
    [(31, 2, 0, 2), (33, 7, 1, 5), (67, 8, 8, 3), (97, 9, 3, 3), (131, 17, 12, 2), (300, 8, 2, 3)],
)
def test_any_size_of_the_space(p, n, q, labels):
    made = mixture(p=p, m=6, n=n, q=q, labels=labels)
    assert_as_described(made, *stars(made, 2))


@pytest.mark.parametrize(
    ("q", "labels", "widths"), [(0, 3, (4, 2, 33)), (3, 5, (33, 4, 7)), (1, 2, (12, 9, 1))]
)
def test_correction_of_log_g(q, labels, widths):
    """Six stars for two blocks, one of whose spectra is missing by half, by three threads."""
    plain = mixture(p=48, m=7, n=6, q=q, labels=labels)
    made = with_correction(plain, widths)
    flux, error = stars(made, 6)
    error[2, :24] = np.nan
    found, usual = assert_as_described(made, flux, error), plain.outputs(flux, error, backend="cuda")
    moved = (found["label"][:, 0] - usual["label"][:, 0]) / usual["label_sd"][:, 0]
    assert np.abs(moved).max() <= 1
    assert np.ptp(moved) > 0.1
    changed = {"log_g", "log_g_err", "error_features", "label"}
    assert_same_bits({name: a for name, a in found.items() if name not in changed}, usual)
    np.testing.assert_array_equal(found["label"][:, 1:], usual["label"][:, 1:])
    np.testing.assert_array_equal(found["error_features"][:, 1:], usual["error_features"][:, 1:])
    np.testing.assert_array_equal(found["log_g"][:, 0], np.clip(found["label"][:, 0], *made.label_range))
    assert_same_bits(made.outputs(flux[5:], error[5:], backend="cuda"), found, of=slice(5, 6))
    on_cpu = made.outputs(flux, error)
    np.testing.assert_allclose(found["log_g"], on_cpu["log_g"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["log_g_err"], on_cpu["log_g_err"], rtol=1e-4)


def test_a_correction_of_nothing_changes_no_bit(mix):
    flux, error = stars(mix, 5)
    parts = with_correction(mix).correction
    idle = replace(mix, correction=(*parts[:-2], 0 * parts[-2], 0 * parts[-1]))
    assert_same_bits(idle.outputs(flux, error, backend="cuda"), mix.outputs(flux, error, backend="cuda"))


def test_without_a_correction_there_is_no_such_step(mix):
    def steps(made):
        plan = clouds.DevicePosterior(*made.kernel_arrays)
        work = plan.work(2)
        flux = cuda.device_array(2 * plan.n_pixels, np.float32)
        return [name for name, _ in plan.steps(flux, flux, None, 2, work, work.scores, 0)]

    usual, more = steps(mix), steps(with_correction(mix))
    assert "correction of log g" not in usual
    assert [name for name in more if name != "correction of log g"] == usual
    assert more[more.index("labels") + 1] == "correction of log g"


@pytest.mark.filterwarnings("ignore:.*(overflow|invalid value) encountered:RuntimeWarning")
def test_no_answer_is_corrected_to_none_and_neighbours_stay_as_they_are(mix):
    made = with_correction(mix)
    flux, error = stars(made, 6)
    clean = made.outputs(flux, error, backend="cuda")
    flux[1] *= np.float32(-1e25)
    found = made.outputs(flux, error, backend="cuda")
    for name in ("log_g", "log_g_err", "label"):
        assert np.isnan(found[name][1]).all(), name
    others = [0, 2, 3, 4, 5]
    assert_same_bits({name: a[others] for name, a in found.items()}, clean, of=others)
    on_cpu = made.outputs(flux, error)
    np.testing.assert_array_equal(np.isnan(on_cpu["label"]), np.isnan(found["label"]))


def test_a_star_without_good_pixels_has_the_correction_of_the_library(mix):
    made = with_correction(mix)
    flux, error = stars(made, 5)
    error[1] = np.nan
    expected = made.outputs(flux, error)
    assert np.isfinite(expected["label"][1]).all()
    found = made.outputs(flux, error, backend="cuda")
    np.testing.assert_allclose(found["label"], expected["label"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("in_shared", [True, False])
@pytest.mark.parametrize(("q", "n_sky", "n"), [(1, 0, 6), (2, 1, 5), (4, 0, 9), (6, 2, 6)])
def test_slopes_of_two_widths(q, n_sky, n, in_shared, monkeypatch):
    """Five stars for three blocks; one whose flux is bent, one of whose spectrum half is missing."""
    if not in_shared:
        monkeypatch.setattr(information, "MOST_OF_BLOCK", 0)
    made = mixture(p=64, m=6, n=n, q=q, n_sky=n_sky, calibrated=(0.5, 0.1))
    flux, error = stars(made, 5)
    flux[1] *= 1 + 0.2 * np.linspace(-1, 1, 64, dtype=np.float32)
    error[2, :32] = np.nan
    found = assert_as_described(made, flux, error)
    assert_same_bits(made.outputs(flux[4:], error[4:], backend="cuda"), found, of=slice(4, 5))
    plan = clouds.DevicePosterior(*made.kernel_arrays)
    assert plan.matrices.in_shared == in_shared
    work = plan.work(5)
    plan.launch(cuda.to_device(flux.ravel()), cuda.to_device(error.ravel()), None, 5, work, 0)
    # Of the probability itself more digits are seen than of labels.
    prior = cloud_values(NumPyArithmetic(made.numbers), made.sizes, flux, error).prior[:, 0, 0]
    chance = work.numbers.copy_to_host()[:, information.NARROW]
    np.testing.assert_allclose(1 / (1 - chance + chance * made.calibrated[1] ** 2), prior, rtol=1e-8)
    assert np.ptp(np.log(prior)) > 0.5


def test_bad_pixels_with_slopes_of_two_widths():
    made = mixture(p=48, m=7, n=6, q=3, n_sky=1, calibrated=(0.9, 0.3))
    flux, error, mask = spoilt(made)
    assert_as_described(made, flux, error, mask)


@pytest.mark.parametrize("reach", [0, 1, 4, 5, 8, 11])
def test_last_coordinates_without_tangents(reach):
    made = mixture(p=64, m=5, n=12)
    tangents = made.tangents.copy()
    tangents[:, :, reach:] = 0
    assert_as_described(replace(made, tangents=tangents), *stars(made, 3))


def test_cells_of_several_pixels():
    made = mixture(p=150, m=6, n=6, q=2)
    precision = made.numbers["library_precision"]
    cells, shares = alike_pixels(made.directions, made.noise_shape, precision, n_cells=37)
    made = replace(made, cells=cells, cell_shares=shares)
    flux, error = stars(made, 3, snr=20)
    error *= np.exp(np.random.default_rng(4).normal(0, 0.5, error.shape)).astype(np.float32)
    lost = np.zeros(flux.shape, bool)
    lost[1, 30:70], lost[2, ::3] = True, True
    assert_as_described(made, flux, error, lost)


@pytest.mark.parametrize("snr", [1, 30, 300])
def test_faint_and_bright_stars(mix, snr):
    assert_as_described(mix, *stars(mix, 5, snr=snr))


@pytest.mark.parametrize("scale", [1e-20, 1e5])
def test_the_unit_of_flux_does_not_matter(mix, scale):
    flux, error = stars(mix, 2)
    expected = mix.outputs(flux, error, backend="cuda")
    found = assert_as_described(mix, (scale * flux).astype(np.float32), (scale * error).astype(np.float32))
    np.testing.assert_allclose(found["log_g"], expected["log_g"], atol=1e-5)
    np.testing.assert_allclose(found["scale"], scale * expected["scale"], rtol=1e-6)


def test_a_star_unlike_any_cloud(mix):
    flux, error = stars(mix, 3)
    flux[0] += 3 * error[0]
    flux[1], flux[2] = 1, 0
    assert_as_described(mix, flux, error)


def spoilt(mix):
    """Stars with bad pixels of every kind, and a mask."""
    flux, error = stars(mix, 12)
    mask = np.zeros(flux.shape, bool)
    flux[0, 3], flux[1, 5], error[2, 7], error[3, 9], error[4, 11], error[5, 13] = (
        np.nan, np.inf, np.nan, -1, 0, 2e6,
    )  # fmt: skip
    mask[6, :21] = True
    mask[7], mask[8] = True, True
    mask[8, 40] = False
    flux[9], error[10] = np.nan, np.inf
    return flux, error, mask


def test_bad_pixels_weigh_nothing(mix):
    flux, error, mask = spoilt(mix)
    found = assert_as_described(mix, flux, error, mask)
    changed = np.where(mask | ~np.isfinite(flux) | ~(error > 0) | ~(error <= 1e6))
    flux[changed], error[changed] = 7.0, np.nan
    again = mix.outputs(flux, error, backend="cuda")
    assert_same_bits({name: a for name, a in found.items() if name != "flag"}, again)


def test_bad_neighbours_change_no_bit_and_a_row_has_the_same_bits_alone(mix):
    flux, error = stars(mix, 12)
    clean = mix.outputs(flux, error, backend="cuda")
    bad_flux, bad_error, mask = spoilt(mix)
    found = mix.outputs(bad_flux, bad_error, mask, backend="cuda")
    assert_same_bits({name: a[11:] for name, a in found.items()}, clean, of=slice(11, None))
    alone = mix.outputs(flux[4:5], error[4:5], backend="cuda")
    assert_same_bits(alone, clean, of=slice(4, 5))
    turned = mix.outputs(np.asfortranarray(flux[::-1]), error[::-1].astype(np.float64), backend="cuda")
    assert_same_bits(turned, clean, of=slice(None, None, -1))


def test_quality_is_that_of_assess(mix):
    flux, error, mask = spoilt(mix)
    _, quality = mix.of_kernels(cloud_posterior(flux, error, mask, *mix.kernel_arrays, backend="cuda"))
    expected = assess(flux, error, good_pixels(flux, error, mask), mask)
    for name in ("n_good", "flag", "snr_median"):
        np.testing.assert_array_equal(getattr(quality, name), getattr(expected, name))
    assert set(quality.flag) == {0, 2, 3, 4, 7}
    np.testing.assert_allclose(quality.snr_norm, expected.snr_norm, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.*overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings(
    "ignore:.*invalid value encountered:RuntimeWarning"
)  # NumPy's floats say it, a device's do not
def test_beyond_all_numbers_there_is_no_answer_and_no_harm(mix):
    flux, error = stars(mix, 3)
    clean = mix.outputs(flux, error, backend="cuda")
    # In double precision, signal-to-noise ratios of 1e26 are no trouble; the scale of a negative star is its error.
    bright = flux.copy()
    bright[1] *= np.float32(1e25)
    assert_same_bits(
        {name: a[::2] for name, a in mix.outputs(bright, error, backend="cuda").items()},
        clean,
        of=slice(None, None, 2),
    )
    flux[1] *= np.float32(-1e25)
    found = mix.outputs(flux, error, backend="cuda")
    for name in ("log_g", "log_g_err", "label", "label_sd", "weights", "expert_label"):
        assert np.isnan(found[name][1]).all(), name
    assert_same_bits({name: a[::2] for name, a in found.items()}, clean, of=slice(None, None, 2))


@pytest.mark.parametrize("calibrated", [(0.0,), (0.5, 0.3, 0.1)])
def test_blocks_pass_through_the_slots_and_memory_is_that_of_a_block(mix, calibrated):
    mix = replace(mix, calibrated=calibrated)
    flux, error = stars(mix, 7)
    scorer = CudaPosteriorScorer(*mix.kernel_arrays, block_rows=3, slots=2)
    found = scorer(flux, error)
    expected = mix.outputs(flux, error, backend="cuda")
    for name, array in expected.items():
        np.testing.assert_array_equal(getattr(found, name).reshape(array.shape), array, err_msg=name)
    plan = scorer.plan
    work, inputs = plan.work(3), 3 * 9 * plan.n_pixels
    scratch = work.scratch.nbytes + work.second_scratch.nbytes
    assert scratch == plan.matrices.scratch_bytes
    others = ("rows", "scores", "memory_of_scores", "scratch", "second_scratch", "parts", "pairs_of_roots")
    arrays = [a for name, a in vars(work).items() if name not in others]
    arrays += [*work.scores, *work.parts.values()]
    share = -(-scratch // clouds.BLOCK_ROWS)
    assert 3 * (plan.bytes_per_row() - share) == inputs + sum(a.nbytes for a in arrays)


def test_the_engine_gives_what_the_cpu_gives(mix):
    flux, error, mask = spoilt(mix)
    assert without_kernels(mix) == ""
    engine = CudaEngine(mix)
    assert engine.workers == clouds.SLOTS
    found, quality = engine(flux, error, mask, 0)
    expected, same = mix.score(flux, error, mask)
    rows = same.n_good > 1
    for name in (
        "log_g",
        "log_g_err",
        "labels",
        "label_errors",
        "label_correlations",
        "weights",
        "foreign",
        "scale",
    ):
        np.testing.assert_allclose(
            getattr(found, name)[rows], getattr(expected, name)[rows], rtol=1e-4, atol=1e-4, err_msg=name
        )
    np.testing.assert_array_equal(quality.flag, same.flag)


def test_what_is_too_large_is_refused_in_words(mix, monkeypatch):
    monkeypatch.setattr(of_clouds, "CUDA_COORDINATES", 5)
    assert without_kernels(mix).startswith("a posterior in 6 coordinates with 3 nuisances and 2 tangents")
    with pytest.raises(BackendError, match=r"no kernels for a posterior in 6 coordinates.*; use backend cpu"):
        CudaEngine(mix)
    with pytest.raises(BackendError, match="no kernels for a posterior in 6 coordinates"):
        CudaPosteriorScorer(*mix.kernel_arrays)
    monkeypatch.undo()
    monkeypatch.setattr(of_clouds, "CUDA_UNITS", 39)
    wide = with_correction(mix, (12, 40, 7))
    assert without_kernels(wide) == "a correction with 40 features or units of a layer (at most 39)"
    assert without_kernels(with_correction(mix, (12, 39, 7))) == without_kernels(mix) == ""


def test_the_largest_fits_in_shared_memory(monkeypatch):
    monkeypatch.undo()
    n, vectors = of_clouds.CUDA_COORDINATES, of_clouds.CUDA_TANGENTS + 1
    for reach in (8, n // 2 // 8 * 8, n):
        sizes = clouds.sizes_of(n, reach, vectors)
        assert 4 * sizes.shared <= MOST_SHARED
        assert 1 <= sizes.stars <= clouds.MOST_STARS
        assert sizes.depth % clouds.QUAD == 0 < sizes.depth <= reach
    # Sums of a block go through a number of each of at most 32 warps.
    largest = (information.solve_launch(of_clouds.CUDA_DIRECTIONS), information.solve_launch(n, 2))
    assert max(each.staged for each in largest) + 8 * 32 <= MOST_SHARED
    assert correction.shared_bytes(of_clouds.CUDA_UNITS) + 8 * 32 <= MOST_SHARED


def test_vectors_that_do_not_fit_are_staged_in_turns(monkeypatch):
    """With as little shared memory as leaves a star four coordinates at a time."""
    made = mixture(p=48, m=7, t=4, n=14)
    flux, error = stars(made, 3)
    expected = made.outputs(flux, error, backend="cuda")
    plain = clouds.sizes_of(16, 16, 5)
    assert plain.depth == 16
    monkeypatch.setattr(
        clouds, "sizes_of", lambda n, reach, vectors: clouds.Sizes(1, 4, plain.stride, plain.shared)
    )
    assert_same_bits(made.outputs(flux, error, backend="cuda"), expected)


def test_tiles_as_large_as_on_a_device(monkeypatch):
    monkeypatch.undo()
    assert (clouds.THREADS, information.PRODUCT_THREADS, information.SOLVE_THREADS) == (128, 128, 128)
    made = with_correction(mixture(p=33, m=17, n=34, q=1, calibrated=(0.5, 0.1)), (12, 140, 7))
    assert_as_described(made, *stars(made, 1))
