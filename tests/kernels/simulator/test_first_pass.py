"""The first pass as CUDA kernels, simulated: noise by counter, bins, groups and totals as on the CPU."""

import itertools

import numpy as np
import pytest
from tolerances import assert_close

from moefast.core.grids import Grid, SnrGrid
from moefast.core.random import DRAW_STREAM, philox_words, standard_normals
from moefast.experts.device import DeviceRows
from moefast.experts.normal_equations import NormalEquations
from moefast.kernels.cuda import FirstPass, RowsSeen, accumulator, binning, draws, first_pass, gram, products
from moefast.kernels.cuda.device import DeviceMemoryError, PinnedMemoryError

TOTALS = ("count", "sum_x", "sum_y", "sum_yy", "sum_xy", "gram", "sum_v")
GRID = Grid((4000.0, 5000.0, 6000.0), (-2.0, 0.0, 1.0))
SEED = 2**40 + 7


@pytest.fixture(autouse=True)
def few_threads(monkeypatch):
    """A simulated thread takes a millisecond to start."""
    for name, value in {"SUM_THREADS": 8, "COLUMNS": 4, "LANES": 3}.items():
        monkeypatch.setattr(gram, name, value)
    monkeypatch.setattr(products, "ENOUGH_BLOCKS", 1)
    monkeypatch.setattr(binning, "THREADS", 8)
    monkeypatch.setattr(binning, "SCAN_THREADS", 8)
    monkeypatch.setattr(draws, "THREADS", 4)


def stars(n, p, seed=0):
    rng = np.random.default_rng(seed + n)
    flux = (1 + 0.3 * rng.standard_normal((n, p))).astype(np.float32)
    error = rng.uniform(0.1, 0.9, (n, p)).astype(np.float32)
    error[:, 1] = 0
    t_eff, m_h = rng.uniform(3000, 7000, n), rng.uniform(-3, 2, n)
    return flux, error, 3 + rng.standard_normal(n), t_eff, m_h, rng.integers(0, 2, n), 2**33 + np.arange(n)


def prepared(flux, error, rows, seen, other=None, seed=SEED):
    """What `prepare_rows` makes of rows, around a reference of 1, and whether it found a bad one."""
    reference, bad = np.ones(flux.shape[1], np.float32), np.zeros(1, np.int32)
    out, drawn = np.full_like(flux, np.nan), np.full_like(flux, np.nan)
    theirs = other or RowsSeen(False)
    draws.prepare_rows[len(flux), draws.THREADS](
        flux, error, rows, reference, np.uint64(seed), np.uint32(DRAW_STREAM), seen.drawn, theirs.drawn,
        np.float32(seen.floor), np.float32(theirs.floor), out, drawn, other is not None, bad,
    )  # fmt: skip
    return out, drawn, bad[0]


def test_words_are_those_of_the_cpu_to_the_last_bit():
    rng = np.random.default_rng(3)
    for counter in (
        np.zeros(6, np.uint32),
        np.full(6, 0xFFFFFFFF, np.uint32),
        *rng.integers(0, 2**32, (20, 6), np.uint32),
    ):
        assert draws.philox(*counter) == philox_words(*counter)


@pytest.mark.parametrize("p", [1, 63, 64, 255, 257, 300])
def test_noise_is_that_of_the_cpu(p):
    """Zero flux and errors of one leave the normal numbers themselves."""
    rows = np.array([0, 5, 2**32 + 1])
    flux, error = np.ones((3, p), np.float32), np.ones((3, p), np.float32)
    out, drawn, bad = prepared(flux, error, rows, RowsSeen(True), RowsSeen(True))
    expected = (flux + standard_normals(SEED, rows, p)) - 1
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(drawn, out)
    assert not bad


def test_normal_numbers_at_the_ends_of_the_words():
    """The smallest and largest radius, and angles at the ends of quarters, by the formula in double precision."""
    words = np.array([0, 1, 2**30 - 1, 2**30, 2**31, 3 * 2**30, 2**32 - 2, 2**32 - 1], np.uint32)
    for length in words:
        # A word is rounded to single precision first.
        uniform = float(np.float32(length) + np.float32(0.5)) / 2**32
        radius = np.sqrt(-2 * np.log(uniform))
        for turn in words:
            quarter, rest = int(turn) >> 30, (int(turn) & (2**30 - 1)) - 2**29
            angle = np.pi / 2 * (rest / 2**30 + quarter)
            found = draws.normal_pair(length, turn)
            np.testing.assert_allclose(found, (radius * np.cos(angle), radius * np.sin(angle)), atol=3e-6)


def test_fits_see_what_they_ask_for():
    flux, error, *_, rows = stars(3, 70)
    noisy = flux + error * standard_normals(SEED, rows, 70)
    assert (noisy < 0).any()
    out, drawn, _ = prepared(flux, error, rows, RowsSeen(False), RowsSeen(True, 0.0))
    np.testing.assert_array_equal(out, flux - 1)
    np.testing.assert_allclose(drawn, np.maximum(noisy, 0) - 1, atol=1e-6)
    out, drawn, _ = prepared(flux, error, rows, RowsSeen(True, 0.0))
    np.testing.assert_allclose(out, np.maximum(noisy, 0) - 1, atol=1e-6)
    assert np.isnan(drawn).all()
    again, *_ = prepared(flux, error, rows, RowsSeen(True, 0.0), seed=SEED + 1)
    assert np.abs(again - out).max() > 0.1


@pytest.mark.parametrize(
    ("name", "value"), [("flux", np.nan), ("flux", -np.inf), ("error", np.nan), ("error", 1e15)]
)
def test_a_value_that_would_spoil_all_totals_is_noticed(name, value):
    flux, error, *_, rows = stars(3, 70)
    assert not prepared(flux, error, rows, RowsSeen(False))[2]
    {"flux": flux, "error": error}[name][2, 69] = value
    assert prepared(flux, error, rows, RowsSeen(False))[2]


@pytest.mark.parametrize("added", [0.0, 1.0])
def test_snr_of_rows(added):
    flux, error, *_ = stars(5, 33)
    error[3] = 0
    snr = np.empty(5)
    draws.row_snr[5, draws.THREADS](flux, error, added, snr)
    good = error > 0
    signal, noise = (np.where(good, a.astype(np.float64), 0) for a in (flux, error))
    ratio = np.divide((signal**2).sum(1), (noise**2).sum(1), out=np.zeros(5), where=good.any(1))
    np.testing.assert_allclose(snr, np.sqrt(ratio + added), rtol=1e-14)
    assert snr[3] == np.sqrt(added)


def on_host(reference, grid, data, *, seed, drawn, published_drawn, clipped, noise_inside):
    """What the CPU makes of the same rows."""
    flux, error, y, t_eff, m_h, folds, rows = data
    bins = grid.assign(t_eff, m_h) if isinstance(grid, Grid) else None
    if bins is None:
        signal, noise = (
            (np.where(error > 0, flux, 0).astype(np.float64) ** 2).sum(1),
            (error.astype(float) ** 2).sum(1),
        )
        bins = grid.assign(np.sqrt(signal / noise + (not noise_inside)))
    noisy = flux + error * standard_normals(seed, rows, flux.shape[1])
    equations, published = NormalEquations(reference, grid.n_bins, 2), NormalEquations(reference)
    x = noisy if drawn else flux
    equations.add(x, y, None, bins.astype(int), folds, error=error, clipped=clipped)
    published.add(noisy if published_drawn else flux, y, clipped=True)
    return equations.finish(), published.finish()


@pytest.mark.usefixtures("numpy_products")
@pytest.mark.parametrize(
    ("grid", "how"),
    [
        (GRID, {"drawn": False, "published_drawn": True, "clipped": False, "noise_inside": False}),
        (
            SnrGrid((1.5, 1.8, 2.0)),
            {"drawn": True, "published_drawn": True, "clipped": True, "noise_inside": False},
        ),
        (
            SnrGrid((1.5, 1.8, 2.0)),
            {"drawn": False, "published_drawn": False, "clipped": False, "noise_inside": True},
        ),
    ],
)
def test_totals_of_both_fits_are_those_of_the_cpu(grid, how, monkeypatch):
    """Rows come in blocks that are no multiples of pieces and stages, and more of them after totals were asked for."""
    monkeypatch.setattr(first_pass.FirstPass.__init__, "__kwdefaults__", {
        **first_pass.FirstPass.__init__.__kwdefaults__, "stage_rows": 7, "piece_rows": 3, "slots": 2,
    })  # fmt: skip
    data = stars(25, 21)
    reference = np.full(21, 0.9)
    device = DeviceRows(
        NormalEquations(reference, grid.n_bins, 2), NormalEquations(reference), grid, seed=SEED, **how
    )
    assert device.equations.finish().n_rows == 0
    for a, b in ((0, 10), (10, 10), (10, 16)):
        device.add(*(array[a:b] for array in data))
    assert device.equations.finish().n_rows == device.published.finish().n_rows == 16
    device.add(*(array[16:] for array in data))
    assert device.equations.n_rows == 25
    expected = on_host(reference, grid, data, seed=SEED, **how)
    assert (expected[0].count.sum(1) > 0).sum() > 1
    for found, totals in zip((device.equations.finish(), device.published.finish()), expected, strict=True):
        for name in TOTALS:
            assert_close(getattr(found, name), getattr(totals, name), made_in=np.float32)
    np.testing.assert_array_equal(device.equations.finish().count, expected[0].count)


def test_products_are_those_of_the_kernels():
    data, grid = stars(6, 5), Grid((4000.0, 6000.0), (-2.0, 0.0, 1.0))
    how = {"drawn": False, "published_drawn": True, "clipped": False, "noise_inside": False}
    rows = FirstPass(
        np.ones(5), grid, 2, RowsSeen(False), RowsSeen(True, 0.0), seed=1, stage_rows=6, piece_rows=4, slots=2
    )
    rows.add(*data)
    expected = on_host(np.ones(5), grid, data, seed=1, **how)
    for other in (False, True):
        found = rows.fetch(other)
        for name in TOTALS:
            total = getattr(expected[other], name)
            assert_close(getattr(found, name).reshape(total.shape), total, made_in=np.float32)


@pytest.mark.usefixtures("numpy_products")
def test_results_depend_on_the_rows_and_their_order_alone():
    data = stars(23, 9)

    def totals(cuts, piece_rows):
        rows = FirstPass(
            np.ones(9), GRID, 2, RowsSeen(True), seed=1, stage_rows=8, piece_rows=piece_rows, slots=3
        )
        for a, b in itertools.pairwise(cuts):
            rows.add(*(array[a:b] for array in data))
        return rows.fetch()

    expected = totals([0, 23], 8)
    for cuts, piece_rows in (([0, 1, 20, 23], 3), ([0, 8, 9, 10, 23], 50)):
        for a, b in zip(totals(cuts, piece_rows), expected, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("numpy_products")
def test_rows_are_checked_and_nothing_is_added():
    data = stars(4, 9)
    rows = FirstPass(np.ones(9), GRID, 2, RowsSeen(False), stage_rows=8, piece_rows=4, slots=2)

    def changed(place, array):
        return [array if k == place else a for k, a in enumerate(data)]

    for place, array, match in (
        (0, data[0][:, :5], r"\(n, 9\) and five numbers of each row expected; found \(4, 5\)"),
        (1, data[1][:3], "expected; found"),
        (2, data[2][:3], "expected; found"),
        (3, np.full(4, np.nan), "a label that is not finite"),
        (5, np.full(4, 2), r"folds in 0…1 and rows from 0 on expected; found folds 2 … 2"),
        (6, np.full(4, -1), "rows from 0 on"),
    ):
        with pytest.raises(ValueError, match=match):
            rows.add(*changed(place, array))
    with pytest.raises(ValueError, match="at least 1 and a seed"):
        FirstPass(np.ones(9), GRID, 0, RowsSeen(False))
    assert rows.fetch().count.sum() == 0
    data[0][1, 2] = np.nan
    rows.add(*data)
    with pytest.raises(ValueError, match="NaN, infinite or absurdly large flux or error"):
        rows.fetch()


def test_an_error_of_a_thread_is_raised(monkeypatch):
    def broken(*_):
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(first_pass._Slot, "load", broken)
    rows = FirstPass(np.ones(9), GRID, 2, RowsSeen(False), stage_rows=8, piece_rows=4, slots=2)
    rows.add(*stars(4, 9))
    with pytest.raises(RuntimeError, match="the driver is gone"):
        rows.fetch()


class _Full(Exception):
    code = 2  # CUDA_ERROR_OUT_OF_MEMORY


@pytest.mark.usefixtures("numpy_products")
def test_out_of_memory_halves_the_stage(monkeypatch):
    monkeypatch.setattr(accumulator, "FLOOR_ROWS", 4)
    real, largest = first_pass._Stage, 7

    def stage(rows, *rest):
        if rows > largest:
            raise _Full
        return real(rows, *rest)

    def make():
        return FirstPass(np.ones(3), GRID, 2, RowsSeen(False), RowsSeen(True), stage_rows=40, slots=2)

    monkeypatch.setattr(first_pass, "_Stage", stage)
    rows = make()
    assert rows.stage_rows == 5
    rows.add(*stars(12, 3))
    assert rows.fetch().count.sum() == rows.fetch(other=True).count.sum() == 12
    largest = 3
    with pytest.raises(DeviceMemoryError, match=r"9 groups of 3 pixels .* 2 blocks of 4 rows .*backend cpu"):
        make()
    largest, real_pinned = 40, first_pass.pinned_array

    def pinned(shape, dtype):
        if not np.isscalar(shape) and shape[0] > 3:
            raise PinnedMemoryError("pinned host memory: refused")
        return real_pinned(shape, dtype)

    monkeypatch.setattr(first_pass, "pinned_array", pinned)
    with pytest.raises(PinnedMemoryError, match=r"2 blocks of 4 rows .*ulimit -l"):
        make()
