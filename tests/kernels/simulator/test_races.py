"""Kernels for posteriors, velocities and the first pass of a fit: no two simulated threads use memory in no order."""

from dataclasses import replace

import numpy as np
import pytest
from made_clouds import mixture, stars
from made_correction import with_correction
from made_velocities import space_of, stars_of, templates
from numba import cuda, float32, float64
from numba.cuda.simulator import kernel
from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray
from plans import random_plans, spectra
from simulated_races import RaceError, find_races

from moefast.core.grids import Grid, SnrGrid
from moefast.kernels import sort_by_bin, velocity_evidence, velocity_step
from moefast.kernels.cuda import (
    CudaPosteriorScorer,
    CudaVelocityScan,
    CudaVelocityStep,
    FirstPass,
    RowsSeen,
    binning,
    clouds,
    draws,
    gram,
    information,
    lanes,
    mix,
    score,
    scoring,
    statistics,
)
from moefast.posterior.cells import alike_pixels


@pytest.fixture
def log(monkeypatch):
    return find_races(monkeypatch)


@pytest.fixture
def small(small_tiles, monkeypatch):
    """Small tiles, but more threads than a panel has rows, so that not all of them own a column of its corner."""
    monkeypatch.setattr(information, "SOLVE_THREADS", 6)


# -- the checker, checked -------------------------------------------------------------------------------------------


@cuda.jit
def shifted(values, ordered, out):
    shared = cuda.shared.array(8, float32)
    thread = cuda.threadIdx.x
    for start in range(0, values.size, 8):
        shared[thread] = values[start + thread]
        cuda.syncthreads()
        out[start + thread] = shared[thread ^ 1]
        if ordered:
            cuda.syncthreads()


@cuda.jit
def aliased(out):
    pairs = cuda.shared.array(0, float64)
    numbers = cuda.shared.array(0, float32)
    thread = cuda.threadIdx.x
    pairs[thread] = float64(1)
    out[thread] = numbers[2 * (thread ^ 1)]


@cuda.jit
def early(out):
    if cuda.threadIdx.x < 3:
        cuda.syncthreads()
    out[cuda.threadIdx.x] = 1


@cuda.jit
def apart(out):
    if cuda.threadIdx.x < 2:
        cuda.syncthreads()
    else:
        cuda.syncthreads()
    out[cuda.threadIdx.x] = 1


@cuda.jit
def everywhere(out, same):
    out[0] = 1 if same else cuda.threadIdx.x


@cuda.jit
def across_blocks(out):
    out[cuda.blockIdx.x + cuda.threadIdx.x] += 1


def test_a_barrier_that_is_missing_is_found(log):
    values, out = np.arange(16, dtype=np.float32), np.empty(16, np.float32)
    shifted[1, 8](values, True, out)
    np.testing.assert_array_equal(out, values.reshape(-1, 2)[:, ::-1].reshape(-1))
    with pytest.raises(RaceError, match="without a barrier"):
        shifted[1, 8](values, False, out)


def test_both_kinds_of_numbers_in_dynamic_shared_memory_are_the_same_place(log):
    with pytest.raises(RaceError, match="without a barrier"):
        aliased[1, 4, 0, 32](np.empty(4, np.float32))


def test_threads_at_different_barriers_are_found(log):
    for function in (early, apart):
        with pytest.raises(RaceError, match="different barriers"):
            function[1, 4](np.empty(4))


def test_writes_of_several_threads_are_found_unless_all_write_the_same(log):
    everywhere[1, 4](np.empty(1), True)
    with pytest.raises(RaceError, match="without a barrier"):
        everywhere[1, 4](np.empty(1), False)


def test_blocks_that_use_the_same_place_are_found(log):
    with pytest.raises(RaceError, match="blocks that wrote"):
        across_blocks[2, 2](np.zeros(4))


# -- kernels ---------------------------------------------------------------------------------------------------------


def test_sums_over_a_block(log):
    @cuda.jit
    def sums(out):
        scratch = cuda.shared.array(lanes.SCRATCH, float64)
        thread = cuda.threadIdx.x
        for _ in range(3):
            total = lanes.sum_of_block(float64(thread), scratch)
            out[thread] = total + lanes.least_of_block(float64(thread + 1), scratch)

    out = np.empty(7)
    sums[1, 7](out)
    np.testing.assert_array_equal(out, 22)


@pytest.mark.parametrize(
    ("in_shared", "at_once", "calibrated"), [(True, True, (0.5, 0.1)), (False, False, (0.0,))]
)
def test_the_posterior(small, in_shared, at_once, calibrated, monkeypatch, log):
    """Five stars: blocks of two stars, one of which is there once, and several stars for each block of roots.

    The second time, log g is corrected, in blocks of four stars.
    """
    if not in_shared:
        monkeypatch.setattr(information, "MOST_OF_BLOCK", 0)
    made = mixture(p=60, m=6, t=4, n=17, q=3, n_sky=1, calibrated=calibrated)
    # The last nine coordinates have means alone, so that their bands are staged without tangents between.
    made.tangents[:, :, 8:] = 0
    precision = made.numbers["library_precision"]
    cells, shares = alike_pixels(made.directions, made.noise_shape, precision, n_cells=17)
    made = replace(made, cells=cells, cell_shares=shares)
    if not at_once:
        made = with_correction(made, (4, 5, 3))
        plain = clouds.sizes_of(20, 8, 5)
        assert plain.depth == 8
        monkeypatch.setattr(
            clouds, "sizes_of", lambda n, reach, vectors: clouds.Sizes(2, 4, plain.stride, plain.shared)
        )
    flux, error = stars(made, 5)
    expected = made.outputs(flux, error)
    found = made.outputs(flux, error, backend="cuda")
    np.testing.assert_allclose(found["log_g"], expected["log_g"], atol=1e-4)
    assert log.n_accesses > 100_000


@pytest.mark.parametrize("p", [40, 44])
@pytest.mark.filterwarnings("ignore:.*(divide by zero|overflow|invalid value) encountered:RuntimeWarning")
def test_scoring(p, monkeypatch, log):
    """Of pixels in eights, and of others: both ways through the kernels, and rows with bad and with absurd pixels."""
    for module, name, value in (
        (scoring, "LANES", 2), (mix, "LANES", 2), (scoring, "THREADS", 2), (scoring, "STATISTICS_THREADS", 4),
        (scoring, "MOST_PIXELS", 128), (statistics, "THREADS", 4), (statistics, "FEW", 4), (statistics, "LANES", 2),
        (statistics, "WARPS", 2),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    plans = random_plans(p=p, n_experts=2, n_levels=2, hidden=3)
    flux, error = spectra(4, plans[0])
    flux[1, 3], error[1, 9], error[2, 5] = np.nan, 0, 1e-40
    score(flux, error, None, *plans)
    assert log.n_accesses > 10_000


def test_the_scan_over_velocities(small, log):
    made = templates(n_v=5, r=2, m=9, c=3, k=21, first=3)
    flux, error = stars_of(made, 3, 30)
    found = velocity_evidence(flux, error, None, made, backend="cuda")
    np.testing.assert_allclose(found, velocity_evidence(flux, error, None, made), rtol=1e-5, atol=1e-3)
    assert log.n_accesses > 10_000


@pytest.mark.parametrize("in_shared", [True, False])
def test_the_step_of_velocities(small, in_shared, monkeypatch, log):
    if not in_shared:
        monkeypatch.setattr(information, "MOST_OF_BLOCK", 0)
    made = mixture(p=30, m=5, n=8, q=2)
    space, slopes = space_of(made, 1)
    flux, error = stars(made, 4)
    found = velocity_step(flux, error, None, space, slopes, backend="cuda")
    expected = velocity_step(flux, error, None, space, slopes)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4)
    assert log.n_accesses > 10_000


GRIDS = [Grid((4000.0, 5000.0, 6000.0), (-2.0, 0.0, 1.0)), SnrGrid((1.5, 1.8, 2.0))]


@pytest.fixture
def few_threads(monkeypatch):
    for name, value in {"SUM_THREADS": 8, "COLUMNS": 4, "LANES": 3}.items():
        monkeypatch.setattr(gram, name, value)
    for name, value in {"THREADS": 8, "SCAN_THREADS": 8, "CHUNK_ROWS": 2}.items():
        monkeypatch.setattr(binning, name, value)
    monkeypatch.setattr(draws, "THREADS", 4)


def rows_of_a_fit(n, p):
    rng = np.random.default_rng(0)
    flux, error = rng.normal(1, 0.3, (n, p)), rng.uniform(0.1, 0.9, (n, p))
    labels = rng.uniform(3, 5, n), rng.uniform(3000, 7000, n), rng.uniform(-3, 2, n)
    return flux.astype(np.float32), error.astype(np.float32), *labels, np.arange(n) % 2, np.arange(n)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_first_pass(grid, few_threads, log, request):
    if isinstance(grid, SnrGrid):
        # The 256 threads of a tile of products once.
        request.getfixturevalue("numpy_products")
    how = {"stage_rows": 6, "piece_rows": 4, "slots": 2}
    rows = FirstPass(np.ones(5), grid, 2, RowsSeen(True, 0.0), RowsSeen(True, 0.0), **how)
    rows.add(*rows_of_a_fit(9, 5))
    assert rows.fetch().count.sum() == rows.fetch(True).count.sum() == 9
    assert log.n_accesses > 2_000


def test_sorting(few_threads, log):
    bins = np.random.default_rng(0).integers(0, 5, 61)
    order, _ = sort_by_bin(bins, 5, backend="cuda")
    np.testing.assert_array_equal(order, np.argsort(bins, kind="stable"))


# -- streams ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def streams(monkeypatch):
    """The stream of each launch and copy from now on; the default stream is 0."""
    used = []
    launch = kernel.FakeCUDAKernel.__getitem__
    copies = {name: getattr(FakeCUDAArray, name) for name in ("copy_to_device", "copy_to_host")}

    def configured(self, configuration):
        used.append(configuration[2] if len(configuration) > 2 else 0)
        return launch(self, configuration)

    def copy(name):
        def copied(self, ary=None, stream=0):
            used.append(stream)
            return copies[name](self, ary, stream)

        return copied

    monkeypatch.setattr(kernel.FakeCUDAKernel, "__getitem__", configured)
    for name in copies:
        monkeypatch.setattr(FakeCUDAArray, name, copy(name))
    return used


@pytest.mark.parametrize("what", ["posterior", "scan", "step"])
def test_all_of_a_block_goes_through_the_stream_of_its_slot(what, small, streams):
    made = with_correction(mixture(p=30, m=4, n=4, q=1), (2, 3, 2))
    flux, error = stars(made, 3)
    if what == "posterior":
        scorer = CudaPosteriorScorer(*made.kernel_arrays, block_rows=2, slots=1)
    elif what == "scan":
        lines = templates(n_v=3, r=2, m=4, c=2, k=21, first=3)
        scorer = CudaVelocityScan(lines, 30, block_rows=2, slots=1)
    else:
        scorer = CudaVelocityStep(*space_of(made, 1), block_rows=2, slots=1)
    streams.clear()
    scorer(flux, error, np.zeros(flux.shape, bool))
    with scorer.slot() as slot:
        assert len(streams) >= 2 * (3 + 4 + 1)
        assert all(stream is slot.stream for stream in streams)


@pytest.mark.usefixtures("numpy_products")
@pytest.mark.parametrize("grid", GRIDS)
def test_nothing_of_the_first_pass_goes_through_the_default_stream(grid, few_threads, streams):
    """Pieces go through their slots' streams, bins through the stage's, and products through one of all stages."""
    how = {"stage_rows": 4, "piece_rows": 3, "slots": 1}
    rows = FirstPass(np.ones(5), grid, 2, RowsSeen(True), RowsSeen(True, 0.0), **how)
    streams.clear()
    rows.add(*rows_of_a_fit(8, 5))
    for stage in rows._stages:
        stage.wait()
    known = [slot.stream for slot in rows._slots] + [stage.stream for stage in rows._stages] + [rows._compute]
    assert all(any(stream is one for one in known) for stream in streams)
    assert all(any(stream is one for stream in streams) for one in known)
