"""Prediction: one row out per row in, in order, whatever the blocks, parts, files and formats."""

from __future__ import annotations

import os
import queue
import re
import resource
import threading
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, pairwise, repeat
from pathlib import Path

import h5py
import numpy as np
import onnxruntime
import pytest
from made_network import with_heads
from on_cuda import pretend
from plans import random_mixture, random_trees, spectra
from sklearn.metrics import r2_score
from small import Stars, same_rows

import moefast
import moefast.export
from moefast.backend import Backend, cuda_devices
from moefast.core.errors import BackendError, InputError, LabelError, MoefastError, OutputError, WaveGridError
from moefast.core.metrics import r2
from moefast.export.parity import synthetic_spectra
from moefast.kernels.cuda import device
from moefast.mixture import Mixture
from moefast.model import Model
from moefast.predicting import engines, notes, run
from moefast.predicting.engines import CpuEngine, CudaEngine, OnnxEngine, Place, make_engine, open_engine
from moefast.predicting.files import predict
from moefast.predicting.source import choose_rows
from moefast.simulate import Emulator
from moefast.spectra import Flag, open_spectra, read_table
from moefast.spectra.shard import Shard

FORMATS = (".h5", ".parquet", ".fits")


# -- rows and columns ------------------------------------------------------------------------------------------


def test_one_row_out_per_row_in_and_the_gravities_are_right(whole, stars, model):
    columns = whole.columns
    assert whole.n_rows == len(stars)
    np.testing.assert_array_equal(columns["row"], np.arange(len(stars)))
    np.testing.assert_array_equal(columns["id"], stars.params["id"])
    assert {len(values) for values in columns.values()} == {len(stars)}
    weights = np.column_stack([columns[f"weight_{k}"] for k in range(model.mixture.n_experts)])
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
    np.testing.assert_array_equal(columns["expert"], weights.argmax(1))
    assert whole.r2 > 0.65
    assert not columns["flag"].astype(np.uint32).max() >> np.uint32(16)
    residual = np.abs(columns["log_g"] - stars.params["log_g"])
    assert 0.6 < np.mean(residual < columns["log_g_err"]) < 0.76


@pytest.mark.parametrize("suffix", FORMATS)
def test_formats_hold_the_same_columns_and_attributes(suffix, whole, stars_file, model, tmp_path):
    out = tmp_path / f"table{suffix}"
    summary = predict(stars_file, model, out)
    columns, attrs = read_table(out)
    assert list(columns) == list(whole.columns)
    same_rows(columns, whole.columns, but=())
    assert attrs["moefast_version"] == moefast.__version__
    assert attrs["model_sha256"] == model.hash
    assert len(model.hash) == 64
    assert attrs["inputs"] == [str(stars_file)]
    assert attrs["input_sha256"] == open_spectra(stars_file).fingerprint()
    assert (attrs["backend"], attrs["device"]) == (summary.backend, summary.device)
    assert attrs["backend_reason"] == summary.reason != ""
    assert attrs["array"] == "noisy"
    assert attrs["rows"] == "0:2600"
    assert attrs["spectra_per_second"] == pytest.approx(summary.n_rows / summary.seconds)
    assert attrs["r2"] == summary.r2 == whole.r2
    assert attrs["failures"] == []
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_no_r2_without_labels(stars, model, tmp_path):
    path = stars.take(slice(0, 20)).write(tmp_path / "x.h5", params=("id",))
    summary = predict(path, model, tmp_path / "t.h5")
    assert summary.r2 is None
    assert "r2" not in read_table(tmp_path / "t.h5")[1]
    bare = stars.take(slice(0, 20)).write(tmp_path / "y.h5", params=())
    assert "id" not in predict(bare, model).columns


@pytest.mark.parametrize("suffix", [None, *FORMATS])
def test_text_identifiers_are_joined_whole(suffix, stars, model, tmp_path):
    few = stars.take(slice(0, 600))
    names = np.array([f"star {i}" + "x" * (i % 29) for i in range(600)])
    assert len(names[0]) < len(names[28])
    few.params["obj_id"] = names
    path = few.write(tmp_path / "x.h5")
    summary = predict(path, model, suffix and tmp_path / f"t{suffix}")
    columns = read_table(tmp_path / f"t{suffix}")[0] if suffix else summary.columns
    np.testing.assert_array_equal(columns["obj_id"].astype(str), names)
    np.testing.assert_array_equal(columns["id"], few.params["id"])


def test_large_integer_identifiers_are_exact(stars, model, tmp_path):
    few = stars.take(slice(0, 3))
    few.params["obj_id"] = np.array([2**62 + 1, 2**53 + 1, -1])
    path = few.write(tmp_path / "x.h5")
    predict(path, model, tmp_path / "t.fits")
    np.testing.assert_array_equal(read_table(tmp_path / "t.fits")[0]["obj_id"], few.params["obj_id"])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"array": "flx"}, "array must be 'auto', 'flux' or 'noisy', found 'flx'"),
        ({"medium": "Air"}, "medium must be one of auto, vacuum, air, found 'Air'"),
        ({"velocity": np.zeros(3)}, "velocity: a number in km/s, .* expected, found ndarray"),
        ({"keep": "mga"}, "--keep mga: .* has no such column"),
    ],
)
def test_arguments_that_make_no_sense(change, match, stars_file, model):
    with pytest.raises(InputError, match=match):
        predict(stars_file, model, **change)


def test_flux_or_noisy(stars, stars_file, model, whole):
    clean = predict(stars_file, model, array="flux")
    assert clean.array == "flux"
    assert clean.r2 > whole.r2
    assert "noise-free" in " ".join(clean.oddities)
    assert not whole.notes
    assert not whole.oddities


def test_light_that_the_model_has_not_seen_is_told(stars, model, whole, tmp_path, monkeypatch):
    """A velocity of a third of a pixel: lost in the noise of each spectrum, told by all of them."""
    assert not whole.notes
    for shift, words in ((0.3, "brighter half of the spectra fits the model worse"), (0, None)):
        moved = stars.take(slice(None))
        moved.noisy[:] += np.float32(shift) * (np.roll(moved.flux, 1, axis=1) - moved.flux)
        found = predict(moved.write(tmp_path / f"{shift}.h5", arrays=("flux", "noisy", "error")), model)
        assert len(found.notes) == (words is not None)
        assert words is None or (words in found.notes[0] and "Fit a model" in found.notes[0])
        assert found.flags.get("UNLIKE_TRAINING", 0) < found.n_rows / 2
        if words is not None:
            monkeypatch.setattr(notes, "shipped_path", lambda: model.path)
            assert "Try -m survey" in predict(tmp_path / f"{shift}.h5", model).notes[0]


def test_errors_that_are_too_small_are_no_such_light():
    rng = np.random.default_rng(0)
    chi2, snr = rng.chisquare(4000, 20_000) / 4000, rng.uniform(1, 20, 20_000)
    assert notes.misfit(chi2, snr) is None
    assert notes.misfit(1.5 * chi2, snr) is None
    bright, faint = notes.misfit(chi2 + 0.0004 * snr**2, snr)
    assert faint == pytest.approx(np.median((chi2 + 0.0004 * snr**2)[snr <= np.median(snr)]))
    assert bright > faint + 0.05
    assert notes.misfit(chi2 + 0.00005 * snr**2, snr) is None, "beyond doubt, but too little to matter"
    little = chi2 + 0.0001 * snr**2
    assert notes.misfit(little, snr)
    assert notes.misfit(little[:40], snr[:40]) is None, "few spectra prove nothing"
    for n in (0, 1, 2, 4, 12, 59):
        # Quartiles of a handful can be as near as one likes.
        assert notes.misfit(np.r_[np.ones(n // 2), np.full(n - n // 2, 9.0)], np.arange(n)) is None
    assert notes.misfit(np.r_[np.ones(30), np.full(30, 9.0)], np.arange(60)) == (9, 1)


def test_noisy_asked_for_and_not_there(stars, model, tmp_path):
    path = stars.take(slice(0, 5)).write(tmp_path / "x.h5")
    with pytest.raises(InputError, match=r"x\.h5: .*noisy.* is missing"):
        predict(path, model, array="noisy")


# -- R² --------------------------------------------------------------------------------------------------------


def test_streamed_r2_is_that_of_scikit_learn(whole, stars):
    found = whole.columns["log_g"]
    assert np.isfinite(found).all()
    assert whole.r2 == pytest.approx(r2_score(stars.params["log_g"], found), abs=1e-12)


def test_r2_of_a_file_with_rows_without_data(stars, model, tmp_path):
    some = stars.take(slice(0, 300)).observed()
    some.flux[5] = np.nan
    some.error[200] = 0
    summary = predict(some.write(tmp_path / "x.h5"), model)
    assert np.flatnonzero(np.isnan(summary.columns["log_g"])).tolist() == [5, 200]
    assert summary.r2 == pytest.approx(r2(some.params["log_g"], summary.columns["log_g"]), abs=1e-12)


# -- parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_rows", [1, 512, 513, 2049, 10_000])
def test_blocks_change_nothing(block_rows, stars_file, model, whole, monkeypatch):
    monkeypatch.setattr(engines, "make_engine", lambda mixture, _: CpuEngine(mixture, block_rows))
    rows = (500, 560) if block_rows == 1 else None
    found = predict(stars_file, model, rows=rows)
    same_rows(found.columns, whole.columns, slice(None), other_rows=slice(*rows or (None,)))


@pytest.mark.parametrize("rows", [(0, 1), (511, 513), (700, 1213), (2599, 2600)])
def test_rows_change_nothing(rows, stars_file, model, whole):
    found = predict(stars_file, model, rows=rows)
    np.testing.assert_array_equal(found.columns["row"], np.arange(*rows))
    same_rows(found.columns, whole.columns, slice(None), other_rows=slice(*rows))


def test_limit_changes_nothing(stars_file, model, whole):
    same_rows(predict(stars_file, model, limit=777).columns, whole.columns, slice(0, 777))
    found = predict(stars_file, model, rows=(100, 300), limit=50)
    same_rows(found.columns, whole.columns, slice(None), other_rows=slice(100, 150))
    assert predict(stars_file, model, limit=10_000).n_rows == 2600


@pytest.mark.parametrize("count", [1, 3, 7])
def test_parts_joined_are_the_whole(count, stars_file, model, whole, tmp_path):
    parts = []
    for index in range(count):
        out = tmp_path / f"{index}.h5"
        predict(stars_file, model, out, shard=(index, count))
        parts.append(read_table(out)[0])
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    same_rows(joined, whole.columns, but=())


@pytest.mark.parametrize("suffix", FORMATS)
def test_more_parts_than_rows(suffix, stars, model, tmp_path):
    path = stars.take(slice(0, 2)).write(tmp_path / "x.h5")
    sizes = []
    for index in range(3):
        out = tmp_path / f"{index}{suffix}"
        predict(path, model, out, shard=(index, 3))
        sizes.append(len(read_table(out)[0]["log_g"]))
    assert sorted(sizes) == [0, 1, 1]


def test_parts_cover_every_row_once():
    for n, count in ((1, 3), (10, 3), (2600, 7), (5, 5)):
        edges = [choose_rows(n, shard=(i, count)) for i in range(count)]
        assert edges[0][0] == 0
        assert edges[-1][1] == n
        assert all(a[1] == b[0] for a, b in pairwise(edges))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"rows": (5, 5)}, "rows 5:5"),
        ({"rows": (0, 11)}, "0:11 asked for; the input has rows 0:10"),
        ({"rows": (-1, 3)}, "-1:3"),
        ({"shard": (3, 3)}, "3/3"),
        ({"limit": 0}, "limit 0"),
    ],
)
def test_rows_that_make_no_sense(wrong, match):
    with pytest.raises(InputError, match=match):
        choose_rows(10, **wrong)


def _wide_model(seed=0):
    """Random numbers on the survey's own 4096 pixels, nine experts at eight levels: the shapes of a real model."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    p, k, m = 4096, 9, 8
    mixture = Mixture(
        wave=Emulator.load().wave,
        reference=1 + normal(p, scale=0.1),
        noise_shape=np.exp(normal(p, scale=0.5)) / np.float32(100),
        knots=np.linspace(-1.5, 1.5, m, dtype=np.float32),
        columns=normal(p, 48, scale=0.1),
        n_basis=48,
        expert_weights=normal(k, m, 48, scale=0.2),
        expert_intercepts=3 + normal(k, m, scale=0.3),
        gate=(normal(14, 64, scale=0.1), normal(64), normal(64, k), normal(k)),
        error_model=(normal(17, 8, scale=0.1), normal(8), normal(8, 1, scale=0.3), normal(1)),
        label_range=(-1e6, 1e6),
    )
    limits = {"chi2": 2.0, "log_g_err": 1.0, "log_level": [-1.5, 1.5]}
    return Model(mixture, {"recipe": "random", "limits": limits}, {})


def test_4096_pixels_in_any_blocks_and_parts(tmp_path, monkeypatch):
    model = _wide_model()
    # Some of these rows have bad pixels of every kind, one good pixel, or none.
    flux, error = synthetic_spectra(model.mixture, 1100)
    stars = Stars(model.mixture.wave, flux, error, flux, {"id": np.arange(1100)})
    path = stars.write(tmp_path / "x.h5")
    every = predict(path, model).columns
    assert np.isnan(every["log_g"]).sum() == 1
    for block_rows, workers in ((300, 1), (511, 2), (1024, 3)):
        engine = CpuEngine(model.mixture, block_rows, workers)
        monkeypatch.setattr(engines, "make_engine", lambda *_, engine=engine: engine)
        same_rows(predict(path, model).columns, every, but=())
    for rows in ((0, 1), (510, 515), (1099, 1100)):
        same_rows(predict(path, model, rows=rows).columns, every, slice(None), other_rows=slice(*rows))
    parts = [predict(path, model, shard=(i, 3)).columns for i in range(3)]
    same_rows({n: np.concatenate([p[n] for p in parts]) for n in every}, every, but=())


# -- several files ---------------------------------------------------------------------------------------------


@pytest.fixture
def shards(stars, tmp_path):
    folder = tmp_path / "night"
    folder.mkdir()
    for k, rows in enumerate((slice(0, 700), slice(700, 701), slice(701, 2000))):
        stars.take(rows).observed().write(folder / f"part_{k}.h5")
    return folder


@pytest.mark.parametrize("how", ["list", "folder", "pattern"])
def test_several_files(how, shards, model, stars, tmp_path):
    paths = {
        "list": sorted(shards.iterdir()),
        "folder": shards,
        "pattern": str(shards / "part_*.h5"),
    }[how]
    out = tmp_path / "t.parquet"
    summary = predict(paths, model, out)
    columns, attrs = read_table(out)
    assert next(iter(columns)) == "file"
    np.testing.assert_array_equal(columns["file"], np.repeat([0, 1, 2], [700, 1, 1299]))
    np.testing.assert_array_equal(columns["row"], [*range(700), 0, *range(1299)])
    np.testing.assert_array_equal(columns["id"], stars.params["id"][:2000])
    assert attrs["inputs"] == [str(path) for path in sorted(shards.iterdir())]
    assert summary.r2 == pytest.approx(r2(stars.params["log_g"][:2000], columns["log_g"]), abs=1e-12)
    for k, path in enumerate(sorted(shards.iterdir())):
        alone = predict(path, model).columns
        same_rows(columns, alone, columns["file"] == k, other_rows=slice(None))


def test_parts_of_several_files_joined_are_the_whole(shards, model):
    every = predict(shards, model).columns
    parts = [predict(shards, model, shard=(i, 4)).columns for i in range(4)]
    same_rows({n: np.concatenate([p[n] for p in parts]) for n in every}, every, but=())


def test_a_file_that_is_named_twice_is_predicted_once_and_told(shards, model):
    words = "among the inputs more than once"
    files = sorted(shards.iterdir())[:2]
    once = predict(files, model)
    assert not any(words in note for note in once.notes)
    again = predict([*files, files[0]], model)
    assert again.n_rows == once.n_rows
    assert f"{files[0]} is {words}; its spectra are predicted once" in again.notes
    twice = predict([shards, *files], model)
    assert f"{files[0]} and 1 other file are {words}; their spectra are predicted once" in twice.notes


def test_one_file_has_no_file_column(stars_file, model):
    assert "file" not in predict([stars_file], model, limit=3).columns


@pytest.mark.parametrize("position", [0, 1])
def test_a_damaged_file_is_named_and_the_others_are_done(position, shards, model, tmp_path):
    files = sorted(shards.iterdir())
    expected = [predict(path, model).columns for path in (files[0], files[2])]
    broken = tmp_path / "broken.h5"
    broken.write_bytes(files[2].read_bytes()[:200_000])
    given = [files[0], files[2]]
    given.insert(position, broken)
    out = tmp_path / "t.h5"
    summary = predict(given, model, out)
    columns, attrs = read_table(out)
    for k in (0, 1):
        same_rows(columns, expected[k], columns["file"] == k, other_rows=slice(None))
    assert [failure.path for failure in summary.failures] == [broken]
    assert isinstance(summary.failures[0].error, InputError)
    assert str(broken) in attrs["failures"][0]
    assert attrs["inputs"] == [str(files[0]), str(files[2])]


@pytest.mark.parametrize("position", [0, 1])
def test_a_file_on_another_grid_is_left_out_wherever_it_stands(position, stars, model, tmp_path):
    few = stars.take(slice(0, 9))
    good = few.write(tmp_path / "good.h5")
    other = replace(few, wave=few.wave + 5000.0).write(tmp_path / "other.h5")
    given = [good]
    given.insert(position, other)
    summary = predict(given, model)
    assert summary.n_rows == 9
    assert isinstance(summary.failures[0].error, WaveGridError)
    assert summary.failures[0].path == other
    same_rows(summary.columns, predict(good, model).columns)


def test_rows_that_cannot_be_read_keep_their_place(stars, model, tmp_path, monkeypatch):
    """A chunk that does not decompress, in one of two files: NaN and NO_DATA there, everything else as it was."""
    monkeypatch.setattr(engines, "make_engine", lambda mixture, _: CpuEngine(mixture, 64))
    first = stars.take(slice(0, 64)).write(tmp_path / "a.h5")
    second = stars.take(slice(64, 264)).write(tmp_path / "b.h5", chunks=(8, 256), compression="gzip")
    clean = predict([first, second], model).columns
    with h5py.File(second, "r") as file:
        chunk = file["dataset/arrays/flux/value"].id.get_chunk_info_by_coord((104, 0))
    with open(second, "rb+") as file:
        file.seek(chunk.byte_offset)
        file.write(b"\xff" * chunk.size)
    # The slab that holds the damaged chunk is all of this small file.
    summary = predict([first, second], model, tmp_path / "t.h5")
    columns, attrs = read_table(tmp_path / "t.h5")
    lost = np.flatnonzero(np.isnan(columns["log_g"]))
    assert set(lost) <= set(range(64, 264))
    assert 64 + 104 in lost
    kept = np.setdiff1d(np.arange(264), lost)
    same_rows(columns, clean, kept)
    np.testing.assert_array_equal(columns["row"], clean["row"])
    np.testing.assert_array_equal(columns["file"], clean["file"])
    np.testing.assert_array_equal(columns["id"], clean["id"])
    assert (columns["flag"][lost] & np.uint32(Flag.NO_DATA)).all()
    assert (columns["expert"][lost] == -1).all()
    assert summary.flags["NO_DATA"] == len(lost)
    labels = stars.params["log_g"][:264]
    assert summary.r2 == pytest.approx(r2(labels, columns["log_g"]), abs=1e-12)
    assert "b.h5" in attrs["failures"][0]
    with pytest.raises(InputError, match=r"b\.h5"):
        predict(second, model, tmp_path / "alone.h5")
    assert not (tmp_path / "alone.h5").exists()
    assert not list(tmp_path.glob(".*partial*"))


class Faults:
    """Rows that workers cannot read; the first of them is found after the second."""

    def __init__(self, monkeypatch, *rows):
        self.rows, self.found = rows, []
        changed = threading.Condition()
        real = Shard.read

        def the_second_is_found():
            first, second = (self.found.count(one) for one in self.rows[:2])
            return second > first

        def read(shard, array, start, stop, out=None):
            working = threading.current_thread().name.startswith("moefast-worker")
            for path, row in self.rows if working else ():
                if array == "error" and shard.path == path and start <= row < stop:
                    with changed:
                        if (path, row) == self.rows[0]:
                            changed.wait_for(the_second_is_found, timeout=300)
                        self.found.append((path, row))
                        changed.notify_all()
                    raise InputError(f"{path.name}: row {row} is damaged")
            return real(shard, array, start, stop, out)

        monkeypatch.setattr(Shard, "read", read)


def test_failures_of_workers_keep_their_rows_and_their_order(stars, model, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "make_engine", lambda mixture, _: CpuEngine(mixture, 32, 3))
    first = stars.take(slice(0, 200)).observed().write(tmp_path / "a.h5")
    second = stars.take(slice(200, 400)).observed().write(tmp_path / "b.h5")
    clean = predict([first, second], model).columns
    faults = Faults(monkeypatch, (first, 64), (first, 96), (second, 40))
    summary = predict([first, second], model, tmp_path / "t.h5")
    assert faults.found[0] == (first, 96)
    columns = read_table(tmp_path / "t.h5")[0]
    lost = np.r_[64:128, 232:264]
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(columns["log_g"])), lost)
    same_rows(columns, clean, np.setdiff1d(np.arange(400), lost))
    np.testing.assert_array_equal(columns["row"], clean["row"])
    np.testing.assert_array_equal(columns["id"], clean["id"])
    assert [(f.path, f.rows, str(f.error)) for f in summary.failures] == [
        (first, (64, 96), "a.h5: row 64 is damaged"),
        (first, (96, 128), "a.h5: row 96 is damaged"),
        (second, (232, 264), "b.h5: row 40 is damaged"),
    ]
    # A single file ends the run, with its first row that is damaged.
    with pytest.raises(InputError, match=r"a\.h5: row 64 is damaged"):
        predict(first, model)
    # Where open files are listed, neither is among them.
    numbers = [str(path) for path in Path("/proc/self/fd").glob("*")]
    assert not [number for number in numbers if os.path.realpath(number) in (str(first), str(second))]


class Pinned(CpuEngine):
    """Has places as a GPU has: a few, each with arrays of its own, which a block is read into and scored in."""

    def __init__(self, mixture, block_rows, n, in_place):
        super().__init__(mixture, block_rows, n)
        self.__dict__.update(free=queue.SimpleQueue(), scored=[], in_place=in_place)
        for _ in range(n):
            shape = (block_rows, mixture.n_pixels)
            self.free.put(
                {
                    "flux": np.full(shape, 7, "f4"),
                    "error": np.full(shape, 7, "f4"),
                    "mask": np.ones(shape, bool),
                }
            )

    @contextmanager
    def place(self):
        arrays = self.free.get(timeout=300)

        def score(flux, error, mask, first_row):
            if not self.in_place:
                return self(flux, error, mask, first_row)
            assert np.shares_memory(flux, arrays["flux"])
            assert np.shares_memory(error, arrays["error"])
            assert mask is None or np.shares_memory(mask, arrays["mask"])
            self.scored.append((len(flux), mask is not None))
            return self(flux, error, mask, first_row)

        try:
            yield Place(lambda name, shape: arrays[name][: shape[0]], score)
        finally:
            self.free.put(arrays)


@pytest.mark.parametrize(
    "storage", [{}, {"dtype": "f8"}, {"chunks": (16, 1024)}, {"chunks": (16, 1024), "compression": "gzip"}]
)
def test_blocks_are_read_into_the_places_of_an_engine(storage, stars, model, tmp_path, monkeypatch):
    some = stars.take(slice(0, 300)).observed()
    mask = np.zeros(some.flux.shape, bool)
    mask[250, 3:9] = True
    path = some.write(tmp_path / "x.h5", **storage)
    with h5py.File(path, "r+") as file:
        file["dataset/arrays/mask/value"] = mask.astype("i2")
    expected = predict(path, model).columns
    in_place = "compression" not in storage
    engine = Pinned(model.mixture, 32, 3, in_place)
    monkeypatch.setattr(engines, "make_engine", lambda *_: engine)
    same_rows(predict(path, model).columns, expected, but=())
    if in_place:
        assert sorted(engine.scored) == sorted([(32, False)] * 8 + [(32, True), (12, False)])
    same_rows(
        predict(path, model, rows=(45, 290), select="id >= 0").columns,
        expected,
        slice(None),
        other_rows=slice(45, 290),
    )


def test_no_file_at_all(model, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        predict(tmp_path / "absent.h5", model)
    with pytest.raises(InputError, match=r"(?s)none of the files.*one\.h5.*two\.h5"):
        predict([tmp_path / "one.h5", tmp_path / "two.h5"], model)
    with pytest.raises(InputError, match="no files given"):
        predict([], model)


# -- the output ------------------------------------------------------------------------------------------------


@pytest.fixture
def no_scoring(monkeypatch):
    def refuse(*_, **__):
        pytest.fail("spectra were scored before the output was refused")

    monkeypatch.setattr(run, "score_block", refuse)


@pytest.mark.usefixtures("no_scoring")
def test_unknown_suffix_is_refused_before_any_work(stars_file, model, tmp_path):
    with pytest.raises(OutputError, match=r"unknown table format '\.csv'; use \.h5"):
        predict(stars_file, model, tmp_path / "t.csv")


@pytest.mark.usefixtures("no_scoring")
@pytest.mark.parametrize("suffix", FORMATS)
def test_an_existing_table_is_kept(suffix, stars_file, model, tmp_path):
    out = tmp_path / f"t{suffix}"
    out.write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists already"):
        predict(stars_file, model, out)
    assert out.read_bytes() == b"precious"


@pytest.mark.usefixtures("no_scoring")
def test_an_input_is_never_the_output(stars, model, tmp_path):
    path = stars.take(slice(0, 4)).write(tmp_path / "x.h5")
    before = path.read_bytes()
    (tmp_path / "y.h5").symlink_to(path)
    for out in (path, tmp_path / "y.h5"):
        with pytest.raises(OutputError, match="is one of the inputs"):
            predict(path, model, out, overwrite=True)
    assert path.read_bytes() == before


def test_replaced_only_when_complete(stars_file, model, tmp_path, monkeypatch):
    out = tmp_path / "t.h5"
    predict(stars_file, model, out, limit=5)
    before = out.read_bytes()
    calls = chain([run.score_block], repeat(None))

    def once(*args):
        work = next(calls)
        if work is None:
            raise MoefastError("midway")
        assert out.read_bytes() == before
        return work(*args)

    with monkeypatch.context() as patch:
        patch.setattr(run, "score_block", once)
        with pytest.raises(MoefastError, match="midway"):
            predict(stars_file, model, out, overwrite=True)
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["t.h5"]
    predict(stars_file, model, out, overwrite=True)
    assert len(read_table(out)[0]["log_g"]) == 2600
    assert [path.name for path in tmp_path.iterdir()] == ["t.h5"]


def test_progress_counts_every_row(stars_file, model):
    seen = []
    predict(stars_file, model, rows=(10, 2600), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (2590, 2590)
    assert {total for _, total in seen} == {2590}
    assert [done for done, _ in seen] == [0, *range(246, 2590, 256), 2590]


def test_fit_and_evaluate_need_labels(stars, model, tmp_path):
    few = stars.take(slice(0, 50))
    bare = few.write(tmp_path / "bare.h5", params=("id", "T_eff"))
    few.params["M_H"][:] = np.nan
    broken = few.write(tmp_path / "broken.h5")
    for work in (moefast.fit, lambda path: moefast.evaluate(path, model)):
        with pytest.raises(LabelError, match=r"bare\.h5: dataset/params lacks log_g, M_H"):
            work(bare)
        with pytest.raises(LabelError, match=r"M_H is not finite in 50 of 50 rows, the first of them 0, 1"):
            work(broken)
    assert LabelError.exit_code == 5


NOT_LABELS = (np.nan, -9999.0, 99.99, 1e200, np.inf)


def test_numbers_that_no_star_has_count_in_no_measure(stars, model, tmp_path):
    few = stars.take(slice(0, 300))
    known = few.take(slice(5, 300)).write(tmp_path / "known.h5")
    few.params["log_g"][:5] = NOT_LABELS
    marked = few.write(tmp_path / "marked.h5")
    summary, expected = predict(marked, model), predict(known, model)
    assert summary.n_rows == 300
    assert summary.r2 == pytest.approx(expected.r2, abs=1e-6)
    (note,) = [note for note in summary.notes if "log_g" in note]
    assert "in 5 of 300 rows, the first of them 0, 1, 2, 3, 4 (nan, -9999, 99.99, 1e+200, inf)" in note

    one, other = moefast.evaluate(marked, model), moefast.evaluate(known, model)
    assert one.report["data_set"]["n_unlabelled"] == 5
    assert one.report["overall"]["n"] == 295
    assert one.report["overall"]["r2"] == pytest.approx(other.report["overall"]["r2"], abs=0.05)
    assert one.stars["row"].tolist() == list(range(5, 300))
    assert "5 of 300 rows" in one.run["notes"][0]


def test_an_order_that_may_be_wrong_is_told(stars, model, tmp_path):
    few = stars.take(slice(0, 40))
    few.params["id"] = np.arange(40)[::-1].copy()
    path = few.write(tmp_path / "turned.h5")
    assert any("another order" in note for note in predict(path, model).notes)
    assert any("another order" in note for note in moefast.evaluate(path, model).run["notes"])


# --- identifiers --------------------------------------------------------------------------------------------------


def with_ids(path, stars, rows, ids):
    """Spectra whose identifiers are what h5py makes of them."""
    stars.take(rows).write(path, params=("log_g",))
    with h5py.File(path, "r+") as file:
        log_g = file["dataset/params"]["log_g"]
        del file["dataset/params"]
        file["dataset/params/log_g"] = log_g
        for name, values in ids.items():
            file[f"dataset/params/{name}"] = values
    return path


LARGE = 4_611_686_018_427_387_900
A, B = np.arange(10), np.arange(10, 20)
IDENTIFIERS = [
    (np.int64(LARGE) + A, np.uint64(LARGE) + B.astype("u8")),
    (-A.astype("i8"), np.uint64(LARGE) + B.astype("u8")),
    (A.astype("i8"), np.uint64(2**64 - 30) + B.astype("u8")),
    (-A.astype("i8") - 1, np.uint64(2**64 - 30) + B.astype("u8")),
    (np.int64(LARGE) + A, B.astype("f8")),
    (np.int64(LARGE) + A, [f"star {i}" for i in B]),
    ([f"a{i}" for i in A], [f"{'b' * i}" for i in B]),
    ([f"a{i}" for i in A], np.array([f"b{i}" for i in B], "S9")),
]


@pytest.mark.parametrize("suffix", [".h5", ".parquet", ".fits"])
@pytest.mark.parametrize(("first", "second"), IDENTIFIERS)
def test_identifiers_of_different_kinds_come_out_as_they_are(suffix, first, second, stars, model, tmp_path):
    files = [
        with_ids(tmp_path / "a.h5", stars, slice(0, 10), {"targetid": first}),
        with_ids(tmp_path / "b.h5", stars, slice(10, 20), {"targetid": second}),
    ]
    summary = predict(files, model, tmp_path / f"t{suffix}")
    columns, _ = read_table(tmp_path / f"t{suffix}")
    expected = [v.decode() if isinstance(v, bytes) else str(v) for v in [*first, *second]]
    found = [str(v) for v in columns["targetid"]]
    if getattr(second, "dtype", np.dtype("U1")).kind == "f":
        expected = [text.removesuffix(".0") for text in expected]
    assert found == expected
    assert not any("targetid" in note for note in summary.notes)


def test_identifiers_that_are_dropped_are_named(stars, model, tmp_path):
    files = [
        with_ids(tmp_path / "a.h5", stars, slice(0, 10), {"targetid": A, "cat_id": A}),
        with_ids(tmp_path / "b.h5", stars, slice(10, 20), {"cat_id": np.zeros((10, 2))}),
    ]
    summary = predict(files, model)
    assert "targetid" not in summary.columns
    assert any("'targetid' is left out" in note and "b.h5 has none" in note for note in summary.notes)
    assert any("'cat_id' is left out" in note and "b.h5" in note for note in summary.notes)


def test_files_with_identifiers_are_not_all_open_at_once(stars, model, tmp_path):
    files = [with_ids(tmp_path / f"{k}.h5", stars, slice(k, k + 1), {"obj_id": [f"s{k}"]}) for k in range(40)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 12, hard))
    try:
        summary = predict(files, model)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not summary.failures
    assert summary.columns["obj_id"].tolist() == [f"s{k}" for k in range(40)]


# --- what the CUDA kernels do not know --------------------------------------------------------------------------------


def test_the_graph_as_an_engine_gives_what_the_kernels_give():
    mixture = with_heads(random_mixture(), "pca-mlp")
    flux, error = spectra(40, mixture.projection)
    mask = np.random.default_rng(0).random(flux.shape) < 0.05
    flux[3], error[4, 7] = np.nan, -1
    found, quality = OnnxEngine(mixture, "cpu")(flux, error, mask, 0)
    expected, right = CpuEngine(mixture)(flux, error, mask, 0)
    np.testing.assert_array_equal(quality.flag, right.flag)
    there = np.arange(40) != 3
    for name in ("log_g", "log_g_err", "weights", "chi2"):
        np.testing.assert_allclose(
            getattr(found, name)[there], getattr(expected, name)[there], rtol=1e-3, atol=1e-4
        )


def graph_on_cuda(monkeypatch):
    """An engine that takes itself for one on a GPU; its graph runs here."""
    monkeypatch.setattr(
        "moefast.export.open_session", lambda graph, _, real=moefast.export.open_session: real(graph)
    )
    monkeypatch.setattr("moefast.export.on_the_cpu", lambda _: "")
    monkeypatch.setattr("moefast.export.session.INPUTS", "cpu")
    return OnnxEngine(with_heads(random_mixture(), "pca-mlp"), "cuda")


def scored_in_place(engine, flux, error):
    with engine.place() as place:
        arrays = [place.array(name, flux.shape) for name in ("flux", "error")]
        for array, values in zip(arrays, (flux, error), strict=True):
            array[...] = values
        return place(*arrays, None, 0)[0].log_g


def test_a_graph_on_a_gpu_reads_from_pinned_memory(monkeypatch):
    pinned, entered = [], []

    class Device:
        def __enter__(self):
            entered.append(True)

        def __exit__(self, *_):
            entered.append(False)

    def pinned_array(size, dtype):
        if size < 40 * 4 * random_mixture().n_pixels:
            # What the graph gives.
            return np.empty(size, dtype)
        if len(pinned) == 1:
            raise device.PinnedMemoryError("no more")
        pinned.append(np.empty(size, dtype))
        return pinned[-1]

    monkeypatch.setattr(device, "require_device", lambda: None)
    monkeypatch.setattr(device, "current_device", Device)
    monkeypatch.setattr(device, "pinned_array", pinned_array)
    engine = graph_on_cuda(monkeypatch)
    assert engine.note == ""
    flux, error = spectra(40, random_mixture().projection)
    expected = OnnxEngine(with_heads(random_mixture(), "pca-mlp"), "cpu")(flux, error, None, 0)[0].log_g
    # The first array is pinned; the second lies in plain memory, since the system refuses more.
    np.testing.assert_array_equal(scored_in_place(engine, flux, error), expected)
    assert len(pinned) == 1
    assert pinned[0].nbytes == flux.nbytes + 64
    assert entered == [True, False] * (len(entered) // 2)
    # Memory is used again, by each of those that take turns with the graph.
    for _ in range(engine.workers):
        np.testing.assert_array_equal(scored_in_place(engine, flux, error), expected)
    before = len(entered)
    np.testing.assert_array_equal(scored_in_place(engine, flux, error), expected)
    assert len(entered) == before


def test_a_graph_on_a_gpu_needs_no_pinned_memory(monkeypatch):
    def missing():
        raise BackendError("backend cuda: numba-cuda is not installed")

    monkeypatch.setattr(device, "require_device", missing)
    flux, error = spectra(40, random_mixture().projection)
    expected = OnnxEngine(with_heads(random_mixture(), "pca-mlp"), "cpu")(flux, error, None, 0)[0].log_g
    np.testing.assert_array_equal(scored_in_place(graph_on_cuda(monkeypatch), flux, error), expected)


def test_memory_that_cannot_be_used_again_is_said_aloud(monkeypatch):
    def refused(*_):
        raise RuntimeError("no such device")

    flux, error = spectra(40, random_mixture().projection)
    expected = OnnxEngine(with_heads(random_mixture(), "pca-mlp"), "cpu")(flux, error, None, 0)[0].log_g
    for what, why in ((refused, "no such device"), (lambda *_: [np.zeros(4)] * 5, "zip|Not equal|not equal")):
        with monkeypatch.context() as patch:
            patch.setattr("moefast.export.session.BoundSession.run", what)
            engine = graph_on_cuda(patch)
        assert re.match(f"memory of inputs is taken anew for every block .*({why})", engine.note)
        np.testing.assert_array_equal(scored_in_place(engine, flux, error), expected)


@pytest.mark.gpu
def test_blocks_of_a_graph_lie_in_pinned_memory_on_a_device():
    if not cuda_devices()[0]:
        pytest.skip("no CUDA device")
    pytest.importorskip("numba_cuda")
    from cuda.bindings import driver

    mixture = with_heads(random_mixture(), "pca-mlp")
    flux, error = spectra(40, mixture.projection)
    engine = OnnxEngine(mixture, "cuda")
    kind = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE
    with engine.place() as place:
        address = place.array("flux", flux.shape).ctypes.data
    assert driver.cuPointerGetAttribute(kind, address)[0] == driver.CUresult.CUDA_SUCCESS
    # The driver does not know plain memory.
    assert driver.cuPointerGetAttribute(kind, flux.ctypes.data)[0] != driver.CUresult.CUDA_SUCCESS
    expected = OnnxEngine(mixture, "cpu")(flux, error, None, 0)[0].log_g
    assert "taken anew" not in engine.note
    for n in (40, 7, 40, 39):
        np.testing.assert_allclose(scored_in_place(engine, flux[:n], error[:n]), expected[:n], rtol=1e-4)


def test_a_gpu_that_is_short_of_memory_gets_half_of_the_block(monkeypatch):
    mixture = with_heads(random_mixture(), "pca-mlp")
    flux, error = spectra(100, mixture.projection)
    engine = OnnxEngine(mixture, "cpu")
    expected = engine(flux, error, None, 0)[0].log_g
    run, sizes = engine._session.run, []

    class Short:
        def run(self, names, seen):
            sizes.append(len(seen["flux"]))
            if sizes[-1] > 30:
                raise RuntimeError("Failed to allocate memory for requested buffer of size 1")
            return run(names, seen)

    engine._session = Short()
    np.testing.assert_allclose(engine(flux, error, None, 0)[0].log_g, expected, rtol=1e-5)
    assert sizes[:3] == [100, 50, 25]
    with pytest.raises(BackendError, match="cannot score 31 spectra"):
        engine(flux[:31], error[:31], None, 0)


def test_a_gpu_scores_what_it_has_no_kernels_for_in_onnx_runtime(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "moefast.predicting.engines.OnnxEngine", lambda mixture, backend: asked.append(backend)
    )
    make_engine(with_heads(random_mixture(), "pca-mlp"), Backend("cuda", "a GPU", "as asked"))
    assert asked == ["cuda"]
    with pytest.raises(BackendError, match="no kernels for a pca-mlp with heads; use backend cpu"):
        CudaEngine(with_heads(random_mixture(), "pca-mlp"))


def test_what_a_gpu_leaves_to_the_cpu_is_part_of_the_reason(monkeypatch):
    monkeypatch.setattr("moefast.backend.cuda_devices", lambda: (["NVIDIA T0"], ""))
    mixture = random_mixture().with_expert(random_trees(3), 1)
    pretend(monkeypatch, {"TreeEnsembleRegressor"})
    for asked, why in (("auto", "a CUDA device was found"), ("cuda", "as asked")):
        engine, where = open_engine(mixture, asked)
        assert isinstance(engine, OnnxEngine)
        assert where.name == "cuda"
        assert where.reason.startswith(f"{why}; partly on the CPU: 1 of ")
    pretend(monkeypatch, set())
    assert open_engine(mixture, "cuda")[1].reason == "as asked"


def test_a_gpu_that_refuses_the_first_block_is_a_reason_for_the_cpu(monkeypatch):
    monkeypatch.setattr("moefast.backend.cuda_devices", lambda: (["NVIDIA T0"], ""))
    mixture = with_heads(random_mixture(), "pca-mlp")
    pretend(monkeypatch, set())

    def full(*_):
        raise RuntimeError("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED")

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", full)
    engine, where = open_engine(mixture, "auto")
    assert isinstance(engine, CpuEngine)
    assert where.name == "cpu"
    assert "NVIDIA T0 was found but cannot be used: ONNX Runtime cannot score 1 spectrum" in where.reason
    with pytest.raises(BackendError, match="CUBLAS_STATUS_ALLOC_FAILED"):
        open_engine(mixture, "cuda")


def test_oddities_are_told_before_the_first_row_is_scored(stars, model, tmp_path):
    few = stars.take(slice(0, 300)).observed()
    few.flux[7], few.flux[9] = 0, few.flux[8]
    few.error[:] *= 3
    path = few.write(tmp_path / "odd.h5")
    order = []
    found = predict(
        path, model, tmp_path / "t.h5", tell=order.append, progress=lambda done, total: order.append(done)
    )
    assert order[:3] == found.oddities
    for words, one in zip(("dead", "to the last bit", "errors are too large"), found.oddities, strict=True):
        assert words in one
    assert 300 in order[3:]
    assert read_table(tmp_path / "t.h5")[1]["oddities"] == found.oddities
