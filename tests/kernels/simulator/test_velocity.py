"""The scan over velocities and the step as CUDA kernels, simulated: the equations at block edges, bad pixels, slots."""

import made_velocities
import numpy as np
import pytest
from made_clouds import mixture, stars
from made_velocities import expected_evidence, expected_step, space_of, stars_of

from moefast.core.errors import BackendError
from moefast.kernels import velocity as of_velocity
from moefast.kernels import velocity_evidence, velocity_step
from moefast.kernels.cuda import CudaVelocityScan, CudaVelocityStep, information, velocity
from moefast.kernels.cuda.device import MOST_SHARED
from moefast.posterior.velocities import VelocityFit

pytestmark = pytest.mark.usefixtures("small_tiles")

P = 50


@pytest.fixture(scope="module")
def few():
    return made_velocities.templates(n_v=5, r=2, m=5, c=2, k=41, first=3)


def assert_as_described(templates, flux, error, mask=None):
    found = velocity_evidence(flux, error, mask, templates, backend="cuda")
    hidden = np.zeros(flux.shape, bool) if mask is None else mask
    # As tests/kernels/test_velocity.py has it for the CPU.
    np.testing.assert_allclose(found, expected_evidence(templates, flux, error, hidden), rtol=2e-5, atol=2e-2)
    return found


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_any_number_of_stars(few, n):
    flux, error = stars_of(few, n, P)
    mask = np.random.default_rng(3).random(flux.shape) < 0.1
    flux[0, 10], error[-1, 20] = np.nan, -1.0
    found = assert_as_described(few, flux, error, mask)
    np.testing.assert_allclose(found, velocity_evidence(flux, error, mask, few), rtol=1e-5, atol=1e-3)
    assert velocity_evidence(flux[:0], error[:0], None, few, backend="cuda").shape == (0, 5)


@pytest.mark.parametrize(
    ("n_v", "r", "m", "c", "k"), [(1, 1, 1, 1, 8), (4, 2, 4, 5, 31), (3, 3, 9, 3, 33), (9, 2, 17, 4, 16)]
)
def test_any_size_of_the_templates(n_v, r, m, c, k):
    templates = made_velocities.templates(n_v=n_v, r=r, m=m, c=c, k=k, first=2)
    assert_as_described(templates, *stars_of(templates, 3, P, which_velocity=n_v - 1))


def test_stars_that_differ_from_all_templates(few):
    flux, error = stars_of(few, 3, P)
    flux[0] *= -1
    flux[1], flux[2] = 0, 1
    assert_as_described(few, flux, error)


def test_a_star_without_pixels_says_nothing(few):
    flux, error = stars_of(few, 2, P)
    mask = np.array([[True], [False]]) & np.ones((2, P), bool)
    found = velocity_evidence(flux, error, mask, few, backend="cuda")
    np.testing.assert_allclose(found[0], 0.0, atol=1e-3)


def test_no_row_of_the_scan_depends_on_its_neighbours(few):
    flux, error = stars_of(few, 7, P)
    whole = velocity_evidence(flux, error, None, few, backend="cuda")
    alone = velocity_evidence(flux[4:6], error[4:6], None, few, backend="cuda")
    np.testing.assert_array_equal(alone, whole[4:6])
    flux[:4] = np.nan
    found = velocity_evidence(flux, error, None, few, backend="cuda")
    np.testing.assert_array_equal(found[4:], whole[4:])


def test_blocks_of_the_scan_pass_through_the_slots_and_memory_is_that_of_a_block(few):
    flux, error = stars_of(few, 5, P)
    scan = CudaVelocityScan(few, P, block_rows=2, slots=2)
    expected = velocity_evidence(flux, error, None, few, backend="cuda")
    np.testing.assert_array_equal(scan(flux, error), expected)
    work = scan.plan.work(3)
    # Results are arrays in one piece of memory, which counts once.
    arrays = [array for name, array in vars(work).items() if name not in ("memory_of_scores", "scores")]
    held = sum(array.nbytes for array in [*arrays, *work.scores])
    assert 3 * scan.plan.bytes_per_row() == 3 * 9 * P + held


@pytest.mark.parametrize("q", [0, 3])
def test_the_step_is_one_gaussian_over_everything(q):
    mix = mixture(p=40, m=5, n=6, q=q)
    space, slopes = space_of(mix, 1)
    flux, error = stars(mix, 5)
    mask = np.random.default_rng(5).random(flux.shape) < 0.2
    flux[1, 3], error[2, 5] = np.nan, -1
    mask[1, 3] = True
    step, sigma = velocity_step(flux, error, mask, space, slopes, backend="cuda")
    for i in range(5):
        want = expected_step(mix, space, slopes, flux[i], error[i], mask[i])
        # In double precision throughout: closer than tests/kernels/test_velocity.py asks of the CPU.
        assert sigma[i] == pytest.approx(want[1], rel=1e-6)
        assert abs(step[i] - want[0]) < 1e-5 * want[1]
    alone = velocity_step(flux[3:4], error[3:4], mask[3:4], space, slopes, backend="cuda")
    np.testing.assert_array_equal(alone, (step[3:4], sigma[3:4]))


@pytest.mark.parametrize("in_shared", [True, False])
def test_the_step_in_cells_of_several_pixels_is_that_of_the_cpu(in_shared, monkeypatch):
    if not in_shared:
        monkeypatch.setattr(information, "MOST_OF_BLOCK", 0)
    mix = mixture(p=64, m=5, n=7, q=2)
    space, slopes = space_of(mix, 2)
    flux, error = stars(mix, 4)
    step, sigma = velocity_step(flux, error, None, space, slopes, backend="cuda")
    expected, expected_sigma = velocity_step(flux, error, None, space, slopes)
    np.testing.assert_allclose(sigma, expected_sigma, rtol=1e-4)
    assert (np.abs(step - expected) < 2e-3 * sigma).all()


def test_blocks_of_the_step_pass_through_the_slots_and_memory_is_that_of_a_block():
    mix = mixture(p=32, m=4, n=4, q=1)
    space, slopes = space_of(mix, 1)
    flux, error = stars(mix, 5)
    scorer = CudaVelocityStep(space, slopes, block_rows=2, slots=2)
    expected = velocity_step(flux, error, None, space, slopes, backend="cuda")
    np.testing.assert_array_equal(scorer(flux, error), expected)
    plan = scorer.plan
    work = plan.work(3)
    assert work.scratch.nbytes == plan.matrices.scratch_bytes
    others = ("rows", "memory_of_scores", "scores", "scratch", "parts", "quality")
    arrays = [array for name, array in vars(work).items() if name not in others]
    held = sum(array.nbytes for array in [*arrays, *work.scores, *work.parts.values(), *work.quality])
    share = -(-plan.matrices.scratch_bytes // velocity.BLOCK_ROWS)
    assert 3 * (plan.bytes_per_row() - share) == 3 * 9 * 32 + held


def test_a_fit_on_the_device_gives_what_the_cpu_gives():
    mix = mixture(p=32, m=4, n=4, q=1)
    fits = [VelocityFit(mix, 30.0) for _ in range(2)]
    fits[1].use_device()
    assert [fit.backend for fit in fits] == ["cpu", "cuda"]
    flux, error = stars(mix, 3)
    mask = np.zeros(flux.shape, bool)
    mask[0, 7] = True
    expected, found = (fit.fit(3, lambda v, rows: (flux[rows], error[rows], mask[rows])) for fit in fits)
    np.testing.assert_allclose(found.error, expected.error, rtol=1e-3)
    assert (np.abs(found.velocity - expected.velocity) < 5e-3 * expected.error).all()
    np.testing.assert_array_equal(found.uncertain, expected.uncertain)


def test_what_is_too_large_is_refused_in_words(few, monkeypatch):
    monkeypatch.setattr(of_velocity, "CUDA_VALUES", 10)
    monkeypatch.setattr(of_velocity, "CUDA_DIRECTIONS", 5)
    with pytest.raises(
        BackendError, match=r"no kernels for velocities by 2 components of lines.*; use backend cpu"
    ):
        CudaVelocityScan(few, P)
    mix = mixture(p=32, m=4, n=4, q=1)
    with pytest.raises(
        BackendError, match=r"no kernels for velocities in a space of 5 directions \(at most 4\)"
    ):
        CudaVelocityStep(*space_of(mix, 1))


def test_the_largest_fits_in_shared_memory(monkeypatch):
    monkeypatch.undo()
    assert 4 * (velocity.VELOCITIES * of_velocity.CUDA_VALUES) <= MOST_SHARED
    assert velocity.solve_launch(of_velocity.CUDA_DIRECTIONS).staged <= information.MOST_OF_BLOCK
    assert (velocity.TILE * velocity.TILE, velocity.LOADS) == (
        velocity.EACH**2 * velocity.PRODUCT_THREADS,
        velocity.PANEL * velocity.TILE // velocity.PRODUCT_THREADS,
    )
