"""Scoring as CUDA kernels, simulated: reference and CPU twin at block edges, bad pixels, slots, memory, the engine."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
from numba import cuda
from numba.cuda.simulator import kernelapi
from plans import (
    awkward_rows,
    random_library,
    random_mixture,
    random_plans,
    random_tower,
    random_trees,
    spectra,
)
from tolerances import assert_close

from moefast.core.errors import BackendError
from moefast.experts.template import Templates
from moefast.kernels import Given, project, soft_mix, tangent_posterior
from moefast.kernels.cuda import CudaScorer, blocks, lanes, median, mix, score, scoring, statistics
from moefast.kernels.cuda.device import DeviceMemoryError, PinnedMemoryError
from moefast.kernels.reference import project_reference, soft_mix_reference
from moefast.kernels.reference_tangent import tangent_posterior_reference
from moefast.predicting.engines import CudaEngine

# Kernels compute with bad pixels, and leave out what comes of it. NumPy's floats say it, a device's do not.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(divide by zero|overflow|invalid value) encountered:RuntimeWarning"
)
OF_MIX = ("log_g", "log_g_err", "log_g_err_raw", "weights", "expert_log_g", "chi2")
OF_PROJECT = ("log_level", "snr_norm", "snr_median", "n_good", "flag")


def set_threads_of_statistics(monkeypatch, threads, lanes):
    """Threads of a block of `row_statistics`, and of what it takes for a warp."""
    few = {"THREADS": threads, "FEW": threads, "LANES": lanes, "WARPS": threads // lanes}
    for name, value in few.items():
        monkeypatch.setattr(statistics, name, value)
    monkeypatch.setattr(scoring, "STATISTICS_THREADS", threads)
    monkeypatch.setattr(scoring, "MOST_PIXELS", threads * statistics.KEYS)


@pytest.fixture(autouse=True)
def few_threads(monkeypatch):
    """A simulated thread takes a millisecond to start: small blocks, but for `project_rows`, whose block is a tile."""
    for module, name in ((scoring, "THREADS"), (scoring, "LANES"), (mix, "LANES")):
        monkeypatch.setattr(module, name, 2)
    set_threads_of_statistics(monkeypatch, 16, 4)
    # A default of arguments: the machine's cores must not matter.
    monkeypatch.setitem(CudaScorer.__init__.__kwdefaults__, "slots", 2)


def of_library(posterior, linear, mixing, library, taken):
    """What the mixture makes of a library's posterior."""
    level = np.maximum(linear.log_level, mixing.knots[0])
    mean, sd, log_evidence = posterior(linear.columns[:, : library.keys.shape[1]], level, library)[:3]
    there = np.where(taken, mean, np.nan)
    return Given(there, np.where(taken, sd, np.nan), log_evidence - log_evidence.max(1, keepdims=True))


def on_cpu(z, log_level, library):
    found = tangent_posterior(z, log_level, library)
    return found.mean, found.sd, found.log_evidence


def assert_scores(found, flux, error, mask, plans, rows=slice(None)):
    """Close to the float64 reference and to the CPU twin; counts, flags and medians the same."""
    linear = project_reference(flux, error, mask, plans[0])
    twin = project(flux, error, mask, plans[0])
    given = twin_given = None
    if len(plans) > 2:
        taken = np.array(plans[3]) if len(plans) > 3 else True
        given = of_library(tangent_posterior_reference, linear, *plans[1:3], taken)
        twin_given = of_library(on_cpu, twin, *plans[1:3], taken)
    expected = soft_mix_reference(linear, plans[1], given)
    twin_mixed = soft_mix(twin, plans[1], twin_given)
    for name, reference, cpu in (
        *((name, expected, twin_mixed) for name in OF_MIX),
        *((name, linear, twin) for name in OF_PROJECT),
    ):
        a, b, c = (getattr(source, name)[rows] for source in (found, reference, cpu))
        assert a.dtype == c.dtype
        if name in ("n_good", "flag", "snr_median"):
            np.testing.assert_array_equal(a, c, err_msg=name)
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b), err_msg=name)
        for other in (b, c):
            # Logits of order 10 carry a float32 rounding of 1e-6 each into the exponential.
            assert_close(np.nan_to_num(a), np.nan_to_num(other), made_in=np.float32, factor=3)


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 131])
def test_matches_reference_and_twin(n):
    plans = random_plans(p=31, c=5, w=1, n_experts=2, n_levels=2, hidden=3)
    flux, error = spectra(n, plans[0])
    found = score(flux, error, None, *plans)
    assert found.weights.shape == (n, 2)
    assert_scores(found, flux, error, None, plans)


@pytest.mark.parametrize(
    ("p", "changes"),
    [
        (1, {"c": 1, "w": 1, "n_experts": 1, "n_levels": 2, "hidden": 1}),
        (16, {"c": 48, "w": 4}),
        (17, {"c": 49, "w": 5}),
        (40, {"c": 47, "hidden": 33}),
        (75, {"c": 100, "w": 9, "n_experts": 5}),
        (96, {"n_experts": 33, "n_levels": 3}),
        (131, {"clipped": True}),
        (272, {"n_levels": 8}),
    ],
)
def test_any_sizes(p, changes):
    """Cells of 1 … 8 pixels, several tiles of columns and lines, more experts and hidden units than lanes."""
    plans = random_plans(p=p, **changes)
    flux, error = spectra(3, plans[0], seed=p)
    if changes.get("clipped"):
        flux -= 1
    assert_scores(score(flux, error, None, *plans), flux, error, None, plans)


def test_blocks_as_large_as_on_a_device(monkeypatch):
    monkeypatch.undo()
    assert (mix.LANES, scoring.THREADS) == (32, 128)
    plans = random_plans(p=37, n_experts=33, n_levels=3, hidden=65)
    flux, error = spectra(2, plans[0])
    assert_scores(score(flux, error, None, *plans), flux, error, None, plans)


def library_of(plans, n_experts, rank, t=2, clouds=2, seed=0):
    """A library whose clouds are as wide as the projections of `spectra`."""
    return random_library(n_experts, rank, min(t, rank), clouds, seed, spread=0.5)


@pytest.mark.parametrize(
    ("n", "p", "c", "n_experts", "taken"),
    [(1, 1, 1, 1, ()), (65, 24, 5, 3, ()), (5, 40, 19, 3, (True, False, True)), (3, 24, 6, 3, (False,) * 3)],
)
def test_with_a_library(n, p, c, n_experts, taken):
    plans = random_plans(p=p, c=c, w=1, n_experts=n_experts, n_levels=2, hidden=3)
    library = library_of(plans, n_experts, plans[1].n_basis)
    flux, error = spectra(n, plans[0])
    whole = (*plans, library, taken) if taken else (*plans, library)
    found = score(flux, error, None, *whole)
    assert_scores(found, flux, error, None, whole)
    plain = score(flux, error, None, *plans)
    for k in range(n_experts):
        same = np.array_equal(found.expert_log_g[:, k], plain.expert_log_g[:, k])
        assert same == (len(taken) > 0 and not taken[k])
    if n_experts > 1:
        assert not np.array_equal(found.weights, plain.weights)


def test_an_expert_without_clouds_is_silent_and_a_spectrum_without_data_has_the_clouds_of_the_reference():
    plans = random_plans(p=24, c=6, w=1, n_experts=3, n_levels=2, hidden=3)
    library = library_of(plans, 3, 3)
    first = library.first.copy()
    first[1] = 0
    whole = (*plans, dataclasses.replace(library, first=first))
    flux, error = spectra(4, plans[0])
    error[2] = -1
    found = score(flux, error, None, *whole)
    assert_scores(found, flux, error, None, whole)
    assert (found.weights[:, 0] == 0).all()
    assert found.flag[2] & 1


def test_a_library_that_does_not_fit_is_refused():
    plans = random_plans(p=16, c=5, w=1)
    for library, taken in (
        (random_library(2, 3), ()),
        (random_library(3, 4), ()),
        (random_library(3, 3), (True,)),
    ):
        with pytest.raises(
            ValueError, match="a library of 3 experts in at most 3 components and a mark for each"
        ):
            CudaScorer(*plans, library, taken)


def test_bad_pixels_weigh_nothing_and_keep_to_themselves():
    plans = random_plans(p=56)
    flux, error = spectra(14, plans[0])
    clean = score(flux, error, None, *plans)
    mask = np.zeros(flux.shape, bool)
    flux[0, [0, 40]], flux[1, 3], error[2, [7, 55]], error[3, 9] = np.nan, -np.inf, 0, np.nan
    error[4, 5], error[5, 6], flux[6] = -1, 2e6, np.inf
    error[7], mask[8], mask[9, 1:], mask[10, 30:] = 0, True, True, True
    # A hidden pixel says nothing, not even that its error is bad.
    mask[11, 4], error[11, 4], flux[11, 5], error[11, 5] = True, -1, np.nan, -1
    found = score(flux, error, mask, *plans)
    assert_scores(found, flux, error, mask, plans)
    assert list(found.flag) == [0, 0, 4, 4, 4, 4, 3, 7, 3, 2, 0, 0, 0, 0]
    for name in scoring.Scores._fields:
        np.testing.assert_array_equal(getattr(found, name)[12:], getattr(clean, name)[12:])
    nowhere = score(flux[12:], error[12:], np.zeros((2, 56), bool), *plans)
    for name in scoring.Scores._fields:
        np.testing.assert_array_equal(getattr(nowhere, name), getattr(clean, name)[12:])


def test_absurd_flux_stays_in_its_row():
    plans = random_plans(p=40)
    flux, error = spectra(3, plans[0])
    clean = score(flux, error, None, *plans)
    flux[1, 3] = 1e38
    found = score(flux, error, None, *plans)
    # Its square does not fit float32; the SNRs do not mind.
    expected = project_reference(flux, error, None, plans[0])
    np.testing.assert_allclose(found.snr_norm, expected.snr_norm, rtol=1e-6)
    np.testing.assert_allclose(found.snr_median, expected.snr_median, rtol=1e-6)
    assert found.flag[1] == 0
    for name in scoring.Scores._fields:
        np.testing.assert_array_equal(getattr(found, name)[::2], getattr(clean, name)[::2])


def test_a_row_has_the_same_bits_wherever_it_is_and_however_it_lies():
    plans = random_plans(p=24, c=6, w=1)
    flux, error = spectra(11, plans[0])
    whole = score(flux, error, None, *plans)
    wide = np.zeros((22, 72), np.float32)
    wide[::2, ::3] = flux
    for other in (np.asfortranarray(flux), wide[::2, ::3], flux.astype(np.float64)):
        again = score(other, np.asfortranarray(error), None, *plans)
        for name in scoring.Scores._fields:
            np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))
    for i in (0, 5, 10):
        alone = score(flux[i : i + 1], error[i : i + 1], None, *plans)
        for name in scoring.Scores._fields:
            np.testing.assert_array_equal(getattr(alone, name)[0], getattr(whole, name)[i])


@pytest.mark.parametrize("p", [1, 2, 7, 8, 33, 64, 131])
def test_medians_of_short_and_long_rows(p, monkeypatch):
    """Keys beyond those that registers hold, ties, both middle keys on either side of the last range."""
    monkeypatch.setattr(median, "KEYS", 8)
    monkeypatch.setattr(median, "FEW", 3)
    rng = np.random.default_rng(p)
    flux = rng.standard_normal((6, p)).astype(np.float32)
    flux[1] = np.round(2 * flux[1])
    flux[2] = 7
    flux[3, : p // 2] = -3e38
    flux[4] = np.where(rng.random(p) < 0.5, 0.0, -0.0)
    error = np.ones_like(flux)
    error[5] = rng.uniform(0.1, 2, p)
    flux[5, rng.random(p) < 0.3] = np.nan
    out = np.empty(6, np.float32)
    hidden = np.zeros(0, bool)
    median.median_rows[6, 4](flux.reshape(-1), error.reshape(-1), hidden, p, out)
    ratio = flux / error
    expected = [np.median(row[~np.isnan(row)]) if not np.isnan(row).all() else np.nan for row in ratio]
    np.testing.assert_array_equal(out, np.float32(expected))


def statistics_of(flux, error, mask, plan):
    """What `row_statistics` gives: log_level, energy, expected, snr_norm, snr_median, n_good, flag; cells; marks."""
    n, p = flux.shape
    pixels = np.stack([plan.reference, plan.inverse_shape, plan.residual])
    out = [np.full(n, -99, np.float32) for _ in range(5)]
    out += [np.full(n, -99, np.int32), np.full(n, 99, np.uint32)]
    cells, marks = np.full(n * p // 8, -99, np.float32), np.full(n * p // 8, 99, np.uint8)
    statistics.row_statistics[n, statistics.THREADS](
        flux.reshape(-1), error.reshape(-1), mask.reshape(-1), plan.clipped,
        np.ascontiguousarray(pixels.reshape(3, -1, 8).transpose(1, 0, 2)).reshape(-1), p, True, cells, marks, *out,
    )  # fmt: skip
    return out, cells.reshape(n, -1), marks


@pytest.mark.parametrize(("p", "threads", "lanes"), [(8, 16, 4), (232, 16, 4), (512, 16, 2), (4096, 128, 32)])
def test_statistics_of_rows_from_one_read(p, threads, lanes, monkeypatch):
    """Medians to the last bit, counts and flags; blocks as large as on a device for rows of 4096 pixels."""
    set_threads_of_statistics(monkeypatch, threads, lanes)
    plan = random_plans(p=p, clipped=p == 512)[0]
    flux, error, mask = awkward_rows(p)
    few = slice(None) if p < 4096 else [0, 8, 9, 11]
    flux, error, mask = flux[few], error[few], mask[few]
    found, cells, marks = statistics_of(flux, error, mask, plan)
    twin = project(flux, error, mask, plan)
    for name, values in zip(("snr_median", "n_good", "flag"), found[4:], strict=True):
        np.testing.assert_array_equal(values, getattr(twin, name), err_msg=name)
    good = np.isfinite(flux) & (error > 0) & ~mask
    np.testing.assert_array_equal(np.unpackbits(marks, bitorder="little").reshape(good.shape), good)
    for name, values in zip(("log_level", "energy", "expected", "snr_norm"), found, strict=False):
        expected = getattr(project_reference(flux, error, mask, plan), name)
        finite = np.isfinite(expected.astype(np.float32))
        assert_close(values[finite], expected[finite], made_in=np.float32, factor=3)
    ratio = np.where(good, error.astype(float) ** 2 * plan.inverse_shape, 0)
    assert_close(cells, ratio.reshape(len(flux), -1, 8).sum(2), made_in=np.float32)


def test_a_pivot_that_is_off_costs_time_alone(monkeypatch):
    """Rows whose first keys, of which the guesses are made, say nothing of the others."""
    set_threads_of_statistics(monkeypatch, 4, 2)
    plan = random_plans(p=128)[0]
    rng = np.random.default_rng(1)
    flux = rng.standard_normal((3, 128)).astype(np.float32)
    flux[0, ::8] += 100
    flux[1, ::8] -= 100
    flux[2] = np.exp(40 * flux[2])
    error = np.ones_like(flux)
    found = statistics_of(flux, error, np.zeros(0, bool), plan)[0]
    np.testing.assert_array_equal(found[4], project(flux, error, None, plan).snr_median)


def test_counts_that_just_reach_the_middle(monkeypatch):
    """Rows of few values, of all lengths, so that pivots fall on and beside the middle."""
    set_threads_of_statistics(monkeypatch, 4, 2)
    plan = random_plans(p=40)[0]
    rng = np.random.default_rng(2)
    flux = rng.integers(1, 12 + np.arange(48)[:, None], (48, 40)).astype(np.float32)
    error = np.where(np.arange(40) < 8 + np.arange(48)[:, None] % 32, 1, -1).astype(np.float32)
    found = statistics_of(flux, error, np.zeros(0, bool), plan)[0]
    np.testing.assert_array_equal(found[4], project(flux, error, None, plan).snr_median)


def test_a_quick_quotient_is_rounded_to_nearest(monkeypatch):
    """With multiply-adds that are rounded once, and reciprocals that are off by up to two units of the last place."""

    def fused(_, a, b, c):
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        found = np.float32(float(exact))
        # Rounded twice; the nearest one may be a neighbour.
        beside = [found, np.nextafter(found, np.float32(np.inf)), np.nextafter(found, np.float32(-np.inf))]
        return min(beside, key=lambda one: (abs(Fraction(float(one)) - exact), int(one.view(np.int32)) & 1))

    @cuda.jit
    def divide(dividend, divisor, reciprocal, out):
        i = cuda.grid(1)
        out[i] = lanes.refined_quotient(dividend[i], divisor[i], reciprocal[i])

    monkeypatch.setattr(kernelapi.FakeCUDAModule, "fma", fused)
    rng = np.random.default_rng(0)
    f = (rng.standard_normal(400) * 2.0 ** rng.integers(-85, 60, 400)).astype(np.float32)
    e = np.exp(rng.uniform(np.log(2.0**-62), np.log(1e6), 400)).astype(np.float32)
    e[:100] = rng.uniform(0.5, 2, 100)
    f[:50] = e[:50]
    # Of these sizes quotients lie as close to the middle between two numbers as they can.
    f[50:100] = 1 + np.arange(50) * np.float32(2.0**-23)
    f[100:102] = 0
    near = np.float32(1) / e
    for off in range(-2, 3):
        out = np.empty_like(f)
        divide[4, 100](f, e, (near.view(np.int32) + np.int32(off)).view(np.float32), out)
        np.testing.assert_array_equal(out, f / e)


def test_blocks_pass_through_the_slots(monkeypatch):
    plans = random_plans(p=16, c=3, w=1, n_experts=2, n_levels=2, hidden=2)
    flux, error = spectra(23, plans[0])
    mask = np.random.default_rng(0).random(flux.shape) < 0.1
    scorer = CudaScorer(*plans, block_rows=5)
    used = []
    real = blocks.Slot.start

    def start(slot):
        used.append(slot.n)
        return real(slot)

    with monkeypatch.context() as patch:
        patch.setattr(blocks.Slot, "start", start)
        found = scorer(flux, error, mask)
    assert sorted(used) == [3, 5, 5, 5, 5]
    assert_scores(found, flux, error, mask, plans)
    # A block without a mask after one with a mask.
    assert_scores(scorer(flux[:4], error[:4]), flux[:4], error[:4], None, plans)


def test_blocks_are_filled_side_by_side(monkeypatch):
    """What the slots are for: every fill waits until another is under way, too."""
    plans = random_plans(p=16, c=3, w=1, n_experts=2, n_levels=2, hidden=2)
    flux, error = spectra(8, plans[0])
    scorer = CudaScorer(*plans, block_rows=2)
    together = threading.Barrier(2, timeout=300)
    real = blocks.Slot.fill

    def fill(slot, *block):
        together.wait()
        real(slot, *block)

    with monkeypatch.context() as patch:
        patch.setattr(blocks.Slot, "fill", fill)
        assert_scores(scorer(flux, error), flux, error, None, plans)


def test_what_is_made_in_a_slot_is_not_copied():
    plans = random_plans(p=16, c=3, w=1, n_experts=2, n_levels=2, hidden=2)
    flux, error = spectra(5, plans[0])
    mask = np.random.default_rng(0).random(flux.shape) < 0.1
    scorer = CudaScorer(*plans, block_rows=5, slots=2)
    for n, hidden in ((5, mask), (3, None)):
        with scorer.slot() as slot:
            made = [slot.array(name, (n, 16)) for name in ("flux", "error", "mask")]
            for array, rows in zip(made, (flux, error, mask), strict=True):
                array[:] = rows[:n]
                slot.host["flux"].flags.writeable = slot.host["error"].flags.writeable = False
            found = scorer(made[0], made[1], None if hidden is None else made[2], slot)
            for array in slot.host.values():
                array.flags.writeable = True
            # Of others in the same slot, only what lies elsewhere is copied.
            turned = scorer(flux[:n][::-1], made[1], None, slot)
        assert_scores(found, flux[:n], error[:n], None if hidden is None else mask, plans)
        assert_scores(turned, flux[:n][::-1], error[:n], None, plans)
    # Both are free again.
    assert_scores(scorer(flux, error), flux, error, None, plans)


def test_callers_in_threads_share_the_slots():
    """More callers than slots, each with several blocks: all end, each with its own numbers."""
    plans = random_plans(p=16, c=3, w=1, n_experts=2, n_levels=2, hidden=2)
    flux, error = spectra(24, plans[0])
    scorer = CudaScorer(*plans, block_rows=2)
    expected = scorer(flux, error)
    parts = [slice(i, i + 6) for i in range(0, 24, 6)]
    ready = threading.Barrier(len(parts), timeout=300)

    def work(here):
        ready.wait()
        return scorer(flux[here], error[here])

    with ThreadPoolExecutor(len(parts)) as pool:
        for here, found in zip(parts, pool.map(work, parts), strict=True):
            for name in scoring.Scores._fields:
                np.testing.assert_array_equal(getattr(found, name), getattr(expected, name)[here])


def test_a_failing_block_gives_its_slots_back(monkeypatch):
    plans = random_plans(p=16, c=3, w=1, n_experts=2, n_levels=2, hidden=2)
    flux, error = spectra(6, plans[0])
    scorer = CudaScorer(*plans, block_rows=2)

    def broken(_):
        raise RuntimeError("launch failed")

    with monkeypatch.context() as patch:
        patch.setattr(blocks.Slot, "start", broken)
        with pytest.raises(RuntimeError, match="launch failed"):
            scorer(flux, error)
    assert_scores(scorer(flux, error), flux, error, None, plans)


class _Full(Exception):
    code = 2  # CUDA_ERROR_OUT_OF_MEMORY


def test_out_of_memory_halves_the_block(monkeypatch):
    plans = random_plans(p=16, c=3, w=1, n_experts=2, n_levels=2, hidden=2)
    monkeypatch.setattr(blocks, "FLOOR_ROWS", 4)
    real, largest = blocks.Slot, 7

    def slot(rows, *rest):
        if rows > largest:
            raise _Full
        return real(rows, *rest)

    monkeypatch.setattr(blocks, "Slot", slot)
    scorer = CudaScorer(*plans, block_rows=40)
    assert scorer.block_rows == 5
    flux, error = spectra(12, plans[0])
    assert_scores(scorer(flux, error), flux, error, None, plans)
    largest = 3
    with pytest.raises(
        DeviceMemoryError, match=r"2 blocks of 4 spectra are needed, .* are free; .*backend cpu"
    ):
        CudaScorer(*plans, block_rows=40)

    def broken(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(blocks, "Slot", broken)
    with pytest.raises(RuntimeError, match="something else"):
        CudaScorer(*plans)


def test_short_pinned_memory_is_not_called_device_memory(monkeypatch):
    plans = random_plans(p=16, c=3, w=1, n_experts=2, n_levels=2, hidden=2)
    monkeypatch.setattr(blocks, "FLOOR_ROWS", 4)
    real, largest = blocks.cuda.pinned_array, 7

    def pinned(shape, dtype):
        if np.atleast_1d(shape)[0] > largest:
            raise _Full
        return real(shape, dtype)

    monkeypatch.setattr(blocks.cuda, "pinned_array", pinned)
    assert CudaScorer(*plans, block_rows=40).block_rows == 5
    largest = 3
    with pytest.raises(
        PinnedMemoryError, match=r"pinned host memory: .* 2 blocks of 4 spectra .*ulimit -l"
    ) as caught:
        CudaScorer(*plans, block_rows=40, slots=2)
    assert "device memory" not in str(caught.value)
    slot = blocks.Slot(1, scoring.DevicePlan(*plans))
    assert slot.pinned_bytes_per_row(slot.plan) == sum(a.nbytes for a in (*slot.host.values(), *slot.results))


def test_every_thread_works_on_the_device_of_the_scorer(monkeypatch):
    plans = random_plans(p=16, c=3, w=1, n_experts=2, n_levels=2, hidden=2)
    flux, error = spectra(12, plans[0])
    entered, launched = [], []

    class Device:
        def __enter__(self):
            entered.append(threading.get_ident())

        def __exit__(self, *_):
            entered.remove(threading.get_ident())

    real = blocks.Slot.start

    def start(slot):
        launched.append(threading.get_ident())
        assert threading.get_ident() in entered
        real(slot)

    monkeypatch.setattr(blocks, "current_device", Device)
    monkeypatch.setattr(blocks.Slot, "start", start)
    scorer = CudaScorer(*plans, block_rows=4)
    assert_scores(scorer(flux, error), flux, error, None, plans)
    assert len(launched) == 3
    assert threading.get_ident() not in launched
    # A single block is scored by the caller's own thread.
    scorer(flux[:4], error[:4])
    assert launched[-1] == threading.get_ident()
    assert not entered


def test_the_block_is_what_a_share_of_the_free_memory_holds(monkeypatch):
    plans = random_plans(p=16, c=3, w=1, n_experts=2, n_levels=2, hidden=2)
    per_row = scoring.Work.bytes_per_row(scoring.DevicePlan(*plans))
    slot = blocks.Slot(1, scoring.DevicePlan(*plans))
    arrays = [*slot.device.values(), *slot.work.scores]
    names = ("columns", "windows", "cells", "marks", "energy", "expected")
    arrays += [getattr(slot.work, name) for name in names]
    assert per_row == sum(a.nbytes for a in arrays)
    # Stars that are turned for the library, and what it finds.
    with_library = scoring.DevicePlan(*plans, random_library(2, 1, 1))
    slot = blocks.Slot(1, with_library)
    clouds = slot.work.clouds
    more = sum(a.nbytes for a in (clouds.stars, clouds.noise, clouds.found))
    assert scoring.Work.bytes_per_row(with_library) == per_row + more
    monkeypatch.setattr(blocks, "FLOOR_ROWS", 2)

    class Context:
        @staticmethod
        def get_memory_info():
            return type("Info", (), {"free": 8 * 11 * per_row})

    monkeypatch.setattr(blocks.cuda, "current_context", Context)
    assert CudaScorer(*plans, block_rows=100).block_rows == 11


def test_arguments_are_checked():
    plans = random_plans(p=16, c=3, w=1)
    flux, error = spectra(3, plans[0])
    scorer = CudaScorer(*plans, block_rows=4)
    with pytest.raises(ValueError, match=r"flux and error must have shape \(n, 16\)"):
        scorer(flux[:, 1:], error[:, 1:])
    with pytest.raises(ValueError, match="flux and error"):
        scorer(flux, error[1:])
    with pytest.raises(ValueError, match="mask must be bool of shape"):
        scorer(flux, error, np.ones(flux.shape, int))
    with pytest.raises(ValueError, match="block_rows and slots must be at least 1"):
        CudaScorer(*plans, block_rows=0)
    with pytest.raises(ValueError, match="expected by the mixing"):
        CudaScorer(random_plans(p=16, c=4, w=1)[0], plans[1])
    with pytest.raises(ValueError, match="shared memory; a block has 49152: use backend cpu"):
        CudaScorer(*random_plans(p=16, c=3, w=1, hidden=13_000))


def test_the_engine_gives_predictions_and_quality():
    mixture = random_mixture()
    flux, error = spectra(4, mixture.projection)
    # Less noise than the training set has: a library sees it as the least of that.
    error[3] *= 0.01
    mask = np.zeros(flux.shape, bool)
    mask[2, 100:] = True
    engine = CudaEngine(mixture)
    assert engine.workers == blocks.SLOTS
    found, quality = engine(flux, error, mask, 0)
    expected, same = mixture.score(flux, error, mask)
    for name in (*OF_MIX, "log_level"):
        # Random experts on hundreds of pixels: sums of order 1000 before they cancel.
        assert_close(getattr(found, name), getattr(expected, name), factor=10)
    np.testing.assert_array_equal(quality.snr_median, same.snr_median)
    np.testing.assert_array_equal(quality.flag, same.flag)
    assert list(quality.flag) == [0, 0, 2, 0]


def test_an_engine_without_memory_is_a_backend_error(monkeypatch):
    def full(*_):
        raise _Full

    monkeypatch.setattr(blocks, "Slot", full)
    with pytest.raises(BackendError, match="device memory"):
        CudaEngine(random_mixture())


def test_the_engine_of_a_mixture_with_a_library():
    mixture = random_mixture()
    library = random_library(mixture.n_experts, mixture.n_basis)
    mixture = mixture.with_expert(Templates(library), 0, 2, 3, 4)
    flux, error = spectra(2, mixture.projection)
    found, _ = CudaEngine(mixture)(flux, error, None, 0)
    expected, _ = mixture.score(flux, error)
    for name in OF_MIX:
        # As above.
        assert_close(getattr(found, name), getattr(expected, name), factor=10)


def test_an_engine_refuses_experts_that_have_no_kernel():
    mixture = random_mixture(n_pixels=64).with_expert(random_trees(3), 1)
    with pytest.raises(BackendError, match="no kernels for experts of the family trees; use backend cpu"):
        CudaEngine(mixture)


def test_an_engine_refuses_a_second_tower():
    mixture = random_mixture(n_pixels=64)
    tower = random_tower(10, mixture.n_experts, "quality")
    with pytest.raises(BackendError, match="no kernels for the second tower"):
        CudaEngine(dataclasses.replace(mixture, tower=tower))
