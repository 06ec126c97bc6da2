"""Sufficient statistics: merging, leaving out, blocks, moments against NumPy, files."""

import json
import math

import numpy as np
import pytest
from tolerances import assert_close

from moefast.core.errors import ModelError, OutputError
from moefast.experts import normal_equations as module
from moefast.experts.exact_sums import Scales
from moefast.experts.normal_equations import NormalEquations

P, BINS, FOLDS, N = 37, 3, 2, 700
TOTALS = ("count", "sum_x", "sum_y", "sum_yy", "sum_xy", "gram", "sum_v")


@pytest.fixture(autouse=True)
def _small_buffer(monkeypatch):
    monkeypatch.setattr(module, "BUFFER_ROWS", 128)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(11)
    mixing = rng.standard_normal((6, P)) * 0.2
    hidden = rng.standard_normal((N, 6))
    x = (1 + hidden @ mixing + 0.05 * rng.standard_normal((N, P))).astype(np.float32)
    y = 3 + hidden @ rng.standard_normal(6)
    v = rng.uniform(0.001, 0.01, (N, P)).astype(np.float32)
    return x, y, v, rng.integers(0, BINS, N), rng.integers(0, FOLDS, N)


@pytest.fixture(scope="module")
def reference():
    return np.linspace(0.9, 1.1, P)


def gathered(data, reference, rows=slice(None), blocks=(N,)):
    total = NormalEquations(reference, BINS, FOLDS)
    rows = np.arange(N)[rows]
    start = 0
    for size in blocks:
        part = rows[start : start + size]
        total.add(*(a[part] for a in data))
        start += size
    assert start >= rows.size
    return total.finish()


def assert_equal_totals(a, b, exact=True):
    for name in TOTALS:
        if exact:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
        else:
            assert_close(getattr(a, name), getattr(b, name), made_in=np.float32)


@pytest.mark.parametrize("blocks", [(1,) * 60 + (640,), (128,) * 6, (127, 1, 0, 129, 443), (699, 1)])
def test_totals_do_not_depend_on_the_blocks(data, reference, blocks):
    assert_equal_totals(gathered(data, reference, blocks=blocks), gathered(data, reference))


def test_shards_merge_with_plus(data, reference):
    parts = [gathered(data, reference, rows=slice(a, a + 100)) for a in range(0, N, 100)]
    merged = sum(parts[1:], parts[0])
    whole = gathered(data, reference)
    assert_equal_totals(merged, whole, exact=False)
    np.testing.assert_array_equal(merged.count, whole.count)
    assert merged.n_rows == N


def test_minus_leaves_a_fold_out(data, reference):
    whole = gathered(data, reference)
    keep = data[4] != 1
    without = whole.pooled() - whole.fold(1).pooled()
    direct = gathered(data, reference, rows=keep)
    assert 0 < keep.sum() < N
    assert_equal_totals(without, direct.pooled(), exact=False)
    for k in (None, 0, 2):
        found = whole.moments(k, without_fold=1)
        expected = direct.moments(k)
        assert found.n == expected.n
        assert_close(found.gram, expected.gram, made_in=np.float32)
        assert_close(found.cross, expected.cross, made_in=np.float32)
        assert_close(found.variance, expected.variance)


def test_a_fold_a_bin_and_the_pool_are_copies_of_their_rows(data, reference):
    whole = gathered(data, reference)
    before = gathered(data, reference)
    for part, rows in (
        (whole.fold(1), data[4] == 1),
        (whole.bin(2), data[3] == 2),
        (whole.pooled(), slice(None)),
    ):
        assert_equal_totals(part.pooled(), gathered(data, reference, rows=rows).pooled(), exact=False)
        n = part.n_rows
        part.add(data[0][:5], data[1][:5])
        assert part.finish().n_rows == n + 5
    assert_equal_totals(whole, before)


def test_what_does_not_belong_together_is_refused(data, reference):
    whole = gathered(data, reference)
    other = gathered(data, reference + 1e-12)
    with pytest.raises(ValueError, match="different reference"):
        _ = whole + other
    with pytest.raises(ValueError, match="bins and folds cannot be combined"):
        _ = whole + whole.pooled()
    with pytest.raises(ValueError, match="more rows than there are"):
        _ = whole.fold(0) - whole.fold(0) - whole.fold(0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e20])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_row_that_is_not_finite_is_refused_and_changes_nothing(data, reference, bad, which):
    total = gathered(data, reference)
    arrays = [a[:9].copy() for a in data]
    arrays[which][(4,) * arrays[which].ndim] = bad
    with pytest.raises(ValueError, match="NaN, infinite or absurdly large"):
        total.add(*arrays)
    assert_equal_totals(total.finish(), gathered(data, reference))


def test_largest_values_allowed_do_not_overflow(reference):
    x = np.full((module.BUFFER_ROWS, P), 0.99 * module.LARGEST, np.float32)
    total = NormalEquations(reference)
    total.add(x, np.ones(len(x)))
    assert np.isfinite(total.finish().gram).all()


def test_shapes_bins_and_folds_are_checked(data, reference):
    x, y, v, bins, folds = data
    total = NormalEquations(reference, BINS, FOLDS)
    with pytest.raises(ValueError, match="rows of 37 pixels expected"):
        total.add(x[:, 1:], y)
    with pytest.raises(ValueError, match="rows of 37 pixels expected"):
        total.add(x, y[1:])
    with pytest.raises(ValueError, match="rows of 37 pixels expected"):
        total.add(x, y, v[:, 1:])
    with pytest.raises(ValueError, match=r"bins must lie in 0…2 and folds in 0…1"):
        total.add(x, y, v, bins + 1, folds)
    with pytest.raises(ValueError, match=r"bins must lie in 0…2 and folds in 0…1"):
        total.add(x, y, v, bins, folds - 1)
    assert total.n_rows == 0


def test_rows_still_waiting_are_counted_and_used(data, reference):
    x, y, v, *_ = data
    total = NormalEquations(reference)
    total.add(x[:100], y[:100], v[:100])
    assert total.n_rows == 100
    assert not total.gram.any()
    assert total.moments().n == 100
    assert total.gram.any()
    total.finish()
    total.add(x[100:], y[100:], v[100:])
    assert total.moments().n == N


@pytest.mark.parametrize("k", [None, 1])
def test_moments_are_numpys(data, reference, k):
    x, y, v, bins, _ = data
    found = gathered(data, reference).moments(k)
    rows = slice(None) if k is None else bins == k
    raw = x[rows].astype(np.float64) - reference.astype(np.float32)
    n = len(raw)
    assert found.n == n
    assert_close(found.mean_x, raw.mean(0), made_in=np.float32)
    assert_close(found.mean_y, y[rows].mean())
    joint = np.cov(np.column_stack([raw, y[rows]]).T, bias=True) * n
    assert_close(found.gram, joint[:-1, :-1], made_in=np.float32)
    assert_close(found.cross, joint[:-1, -1], made_in=np.float32)
    assert_close(found.sum_yy, joint[-1, -1])
    assert_close(found.variance, v[rows].mean(0, dtype=np.float64))
    np.testing.assert_array_equal(found.gram, found.gram.T)


def test_moments_of_no_rows_are_refused(reference):
    with pytest.raises(ValueError, match="no rows, so no moments"):
        NormalEquations(reference, BINS).moments(1)


def test_sse_is_the_sum_over_rows(data, reference):
    x, y, *_ = data
    moments = gathered(data, reference).moments()
    raw = x.astype(np.float64) - reference.astype(np.float32)
    weights, *_ = np.linalg.lstsq(raw - raw.mean(0), y - y.mean(), rcond=None)
    for w, c in ((weights, 3.3), (0.3 * weights, 0.0), (np.zeros(P), 1.0)):
        explicit = np.sum((y - raw @ w - c) ** 2)
        assert explicit > 1
        assert_close(
            moments.sse(w, c), explicit, made_in=np.float32, factor=10
        )  # a difference of larger sums
        noise = np.linspace(0.001, 0.02, P)
        noisy = explicit + N * np.sum(noise * w**2)
        assert_close(moments.sse(w, c, noise=noise), noisy, made_in=np.float32, factor=10)
        assert_close(moments.sse(w, c, 0.3), explicit + N * 0.3 * w @ w, made_in=np.float32, factor=10)


def test_sse_with_noise_is_the_mean_over_draws(data, reference):
    x, y, *_ = data
    moments = gathered(data, reference).moments()
    rng = np.random.default_rng(0)
    raw = x.astype(np.float64) - reference.astype(np.float32)
    weights, sigma = 0.2 * rng.standard_normal(P), 0.3
    draws = [
        np.sum((y - (raw + sigma * rng.standard_normal(raw.shape)) @ weights - 3) ** 2) for _ in range(400)
    ]
    error = np.std(draws) / math.sqrt(len(draws))
    expected = moments.sse(weights, 3, sigma**2)
    assert error < 0.01 * expected
    assert abs(np.mean(draws) - expected) < 4 * error
    assert moments.sse(weights, 3) < expected - 10 * error


def test_transform_is_the_statistics_of_transformed_rows(data, reference):
    x, y, v, bins, folds = data
    basis = np.random.default_rng(2).standard_normal((P, 5))
    found = gathered(data, reference).transform(basis)
    z = (x.astype(np.float64) - reference.astype(np.float32)) @ basis
    direct = NormalEquations(np.zeros(5), BINS, FOLDS)
    direct.add(z.astype(np.float32), y, (v.astype(np.float64) @ basis**2).astype(np.float32), bins, folds)
    assert_equal_totals(found, direct.finish(), exact=False)
    for a, b in ((found.moments(1), direct.moments(1)),):
        assert_close(a.gram, b.gram, made_in=np.float32)
        assert_close(a.variance, b.variance, made_in=np.float32)


def test_transform_leaves_empty_cells_empty(data, reference):
    total = NormalEquations(reference, 2)
    total.add(data[0], data[1])
    small = total.transform(np.eye(P)[:, :4])
    assert small.count.tolist() == [[N], [0]]
    assert not small.gram[1].any()


def test_errors_are_squared_here_and_negative_flux_may_count_as_zero(data, reference):
    x, y, v, bins, folds = data
    error = np.sqrt(v)
    one, two = NormalEquations(reference, BINS, FOLDS), NormalEquations(reference, BINS, FOLDS)
    assert (x < 0.2).any()
    one.add(x - np.float32(0.2), y, bins=bins, folds=folds, error=error, clipped=True)
    two.add(np.maximum(x - np.float32(0.2), 0), y, error * error, bins, folds)
    assert_equal_totals(one.finish(), two.finish())
    with pytest.raises(ValueError, match="variance and error say the same"):
        one.add(x, y, v, bins, folds, error=error)
    with pytest.raises(ValueError, match="absurdly large error"):
        one.add(x, y, bins=bins, folds=folds, error=np.full_like(error, np.nan))
    assert_equal_totals(one, two)


@pytest.mark.parametrize("cores", [1, 5])
def test_totals_do_not_depend_on_the_number_of_cores(data, reference, monkeypatch, cores):
    expected = gathered(data, reference)
    monkeypatch.setattr("moefast.core.threads.CORES", cores)
    monkeypatch.setattr("moefast.kernels.gram.CORES", cores)
    assert_equal_totals(gathered(data, reference), expected)


def test_many_bins_share_the_memory_for_waiting_rows(data, reference, monkeypatch):
    monkeypatch.setattr(module, "BUFFER_BYTES", 4 * P * BINS * FOLDS * 20)
    total = NormalEquations(reference, BINS, FOLDS)
    total.add(*data)
    assert total._rows.nbytes == module.BUFFER_BYTES
    assert_equal_totals(total.finish(), gathered(data, reference, blocks=(13,) * 60), exact=True)
    monkeypatch.undo()
    assert_equal_totals(total, gathered(data, reference), exact=False)
    # However little there is, a row at a time can be multiplied.
    monkeypatch.setattr(module, "BUFFER_BYTES", 1)
    assert_equal_totals(gathered(data, reference), total, exact=False)


def test_a_million_rows_are_exact_to_a_millionth():
    """Against the float64 Gram matrix of the centred rows themselves, with a reference that is a little off."""
    p, n, part = 24, 1_000_000, 50_000
    rng = np.random.default_rng(5)
    mixing = rng.standard_normal((4, p)) * 0.1
    hidden, noise = rng.standard_normal((n, 4)), rng.standard_normal((n, p)) * 0.02
    x = (1 + hidden @ mixing + noise).astype(np.float32)
    reference = x[:512].mean(0, dtype=np.float64)
    total = NormalEquations(reference, 2, 2)
    rows = np.arange(n)
    for a in range(0, n, part):
        here = slice(a, a + part)
        total.add(x[here], hidden[here, 0], bins=rows[here] % 3 % 2, folds=rows[here] % 2)
    moments = total.finish().moments()
    centred = x.astype(np.float64) - x.mean(0, dtype=np.float64)
    gram = centred.T @ centred
    scale = np.sqrt(np.outer(np.diag(gram), np.diag(gram)))
    worst = np.abs((moments.gram - gram) / scale).max()
    cross = centred.T @ hidden[:, 0]
    worst_cross = np.abs((moments.cross - cross) / np.sqrt(np.diag(gram) * n)).max()
    print(
        f"relative error at {n:,} rows: {worst:.1e} of the Gram matrix, {worst_cross:.1e} of the products with y"
    )
    assert worst < 1e-7
    assert worst_cross < 1e-6


@pytest.mark.parametrize("shape", [(1, 1, 1), (37, 3, 2), (64, 9, 3)])
def test_memory_is_that_of_the_arrays(shape):
    p, bins, folds = shape
    total = NormalEquations(np.zeros(p), bins, folds)
    total.add(np.ones((1, p), np.float32), np.ones(1))
    assert NormalEquations.memory(p, bins, folds) == total.nbytes + total._rows.nbytes
    assert (total.n_pixels, total.n_bins, total.n_folds) == shape


# -- files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(data, reference, tmp_path):
    path = tmp_path / "statistics.npz"
    gathered(data, reference).save(path)
    return path


def test_files_hold_every_bit_and_can_be_added_to(data, reference, saved):
    read = NormalEquations.load(saved)
    whole = gathered(data, reference)
    assert_equal_totals(read, whole)
    np.testing.assert_array_equal(read.reference, reference)
    read.add(*data)
    whole.add(*data)
    assert_equal_totals(read.finish(), whole.finish())
    assert [item.name for item in saved.parent.iterdir()] == [saved.name]


def test_rows_still_waiting_are_saved(data, reference, tmp_path):
    total = NormalEquations(reference)
    total.add(data[0][:10], data[1][:10])
    total.save(tmp_path / "a.npz")
    assert NormalEquations.load(tmp_path / "a.npz").n_rows == 10


def test_a_failed_save_leaves_the_old_file(data, reference, saved, monkeypatch):
    before = saved.read_bytes()

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OutputError, match="disk full"):
        gathered(data, reference).save(saved)
    assert saved.read_bytes() == before
    assert [item.name for item in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("length", [0, 1, 100, 0.5, -1])
def test_a_truncated_file_is_a_model_error(saved, length):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(length * len(content)) if length == 0.5 else length])
    with pytest.raises(ModelError, match="not a complete file of normal equations"):
        NormalEquations.load(saved)


def test_a_damaged_file_is_a_model_error(saved):
    content = bytearray(saved.read_bytes())
    content[len(content) // 2] ^= 0xFF
    saved.write_bytes(content)
    with pytest.raises(ModelError, match=r"statistics\.npz: not a complete file"):
        NormalEquations.load(saved)


def test_any_damage_is_a_model_error_or_none(saved):
    """A flipped bit in the header of an array makes NumPy raise errors of its own tokenizer, among others."""
    content, expected = saved.read_bytes(), NormalEquations.load(saved)
    places = [at for at in range(len(content)) if b"NUMPY" in content[max(0, at - 100) : at + 5]]
    rng = np.random.default_rng(0)
    for at in rng.choice(places, 150, replace=False):
        damaged = bytearray(content)
        damaged[at] ^= 1 << int(rng.integers(8))
        saved.write_bytes(damaged)
        try:
            found = NormalEquations.load(saved)
        except ModelError:
            continue
        np.testing.assert_array_equal(found.gram, expected.gram)
        np.testing.assert_array_equal(found.count, expected.count)


def rewritten(path, header=None, **changes):
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    if header is not None:
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez(path, **{name: a for name, a in (arrays | changes).items() if a is not None})


@pytest.mark.parametrize("schema", [0, 2, None])
def test_another_schema_is_a_model_error(saved, schema):
    rewritten(saved, header={"schema": schema, "what": "moefast normal equations"})
    with pytest.raises(ModelError, match=f"schema {schema} found, 1 expected"):
        NormalEquations.load(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"header": {"schema": 1, "what": "recipes for soup"}},
        {"header": {"schema": 1}},
        {"header": [1, 2]},
        {"gram": None},
        {"gram": np.zeros((BINS, FOLDS, 7))},
        {"sum_v": np.zeros((BINS, FOLDS, P), np.float32)},
        {"count": np.zeros(3, np.int64)},
        {"count": np.zeros((BINS, FOLDS))},
        {"sum_y": np.array([["not", "numbers"]], object)},
    ],
)
def test_a_foreign_file_is_a_model_error(saved, change):
    rewritten(saved, **change)
    with pytest.raises(ModelError, match="not a complete file"):
        NormalEquations.load(saved)


def test_something_else_is_a_model_error(tmp_path):
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "text").write_text("hello")
    for name in ("one.npy", "text", "absent.npz"):
        with pytest.raises(ModelError, match="not a complete file"):
            NormalEquations.load(tmp_path / name)


# -- exact sums -------------------------------------------------------------------------------------------------

UNIT = 50


def scaled(data, reference, units, scales, blocks=17):
    total = NormalEquations(reference, BINS, FOLDS, scales=scales)
    for unit in units:
        rows = np.arange(unit * UNIT, (unit + 1) * UNIT)
        for start in range(0, UNIT, blocks):
            total.add(*(a[rows[start : start + blocks]] for a in data))
        total.end_unit()
    return total.finish()


@pytest.fixture(scope="module")
def scales(data, reference):
    x, y, v = data[0] - reference, data[1], data[2]
    few = slice(0, 40)
    return Scales.of(N, (x[few] ** 2).mean(0), v[few].mean(0), np.abs(y).max())


def test_totals_of_units_do_not_depend_on_their_order_nor_on_who_adds_them(data, reference, scales):
    units = np.arange(N // UNIT)
    whole = scaled(data, reference, units, scales)
    assert whole.is_exact
    assert_equal_totals(whole, gathered(data, reference), exact=False)
    rng = np.random.default_rng(5)
    assert_equal_totals(scaled(data, reference, rng.permutation(units), scales, blocks=50), whole)
    for count in (2, 3, 7):
        parts = [
            scaled(data, reference, part, scales) for part in np.array_split(rng.permutation(units), count)
        ]
        total = parts[0] + parts[1]
        for part in parts[2:]:
            total.include(part)
        assert_equal_totals(total, whole)
    # Without rounding the order can be seen: the test can fail.
    a, b, c = (scaled(data, reference, part, None) for part in np.array_split(units, 3))
    assert not np.array_equal(((a + b) + c).sum_xy, (a + (b + c)).sum_xy)


def test_units_end_where_they_are_told_to_also_after_a_checkpoint(data, reference, scales):
    total = NormalEquations(reference, BINS, FOLDS, scales=scales)
    total.add(*(a[:70] for a in data))
    total.end_unit()
    total.add(*(a[70:95] for a in data))
    state = {name: array.copy() for name, array in total.state().items()}
    again = NormalEquations.from_state(state.__getitem__, exact=True)
    for each in (total, again):
        each.add(*(a[95:] for a in data))
    assert_equal_totals(again.finish(), total.finish())


def test_rows_far_larger_than_those_looked_at_are_told(data, reference, scales):
    x, y, v, bins, folds = data
    total = NormalEquations(reference, BINS, FOLDS, scales=scales)
    total.add(1e4 * x[:50], y[:50], v[:50], bins[:50], folds[:50])
    assert not total.is_exact
    with pytest.raises(ValueError, match="different scales"):
        total + gathered(data, reference)
