"""Files in: what is found, what is read, what is refused and how it is said."""

from __future__ import annotations

import dataclasses
import gc
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest

from moefast.core.errors import InputError, LabelError, WaveGridError
from moefast.spectra import Failure, Shard, find_files, open_spectra, same_wave, structure
from moefast.spectra import rows as rows_module
from moefast.spectra.blocks import BlockMemory
from moefast.spectra.wave import describe_difference, other_unit


def gather(blocks):
    blocks = list(blocks)
    return (
        np.concatenate([b.flux for b in blocks]),
        np.concatenate([b.error for b in blocks]),
        [b.first_row for b in blocks],
    )


def reader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "moefast-reader"]


# -- finding ---------------------------------------------------------------------------------------------------


def test_shards_are_found_in_natural_order_and_once(tmp_path):
    for k in (10, 2, 1):
        path = tmp_path / f"train_200k_{k}" / "dataset.h5"
        path.parent.mkdir()
        path.touch()
    (tmp_path / "notes.txt").touch()
    found = find_files([tmp_path, tmp_path / "train_200k_2" / "dataset.h5"])
    assert [path.parent.name for path in found] == ["train_200k_1", "train_200k_2", "train_200k_10"]
    assert find_files([str(tmp_path / "train_*" / "*.h5")]) == found
    assert find_files(tmp_path / "train_200k_10") == found[2:]
    other_order = find_files([tmp_path / "train_200k_10", tmp_path])
    assert [path.parent.name for path in other_order] == ["train_200k_10", "train_200k_1", "train_200k_2"]


@pytest.mark.parametrize("name", ["absent.h5", "absent_*.h5", "empty"])
def test_nothing_found_says_what_was_looked_for(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=name.replace("*", r"\*")):
        find_files([tmp_path / name])


def test_no_arguments():
    with pytest.raises(InputError, match="no spectrum files given"):
        find_files([])


# -- reading ---------------------------------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": {},
    "chunks": {"chunks": (4, 32)},
    "one chunk": {"chunks": (11, 32)},
    "chunk larger than the data": {"chunks": (16, 32), "maxshape": (None, 32)},
    "narrow chunks": {"chunks": (3, 5)},
    "compressed": {"chunks": (4, 32), "compression": "gzip", "shuffle": True},
    "one compressed chunk": {"chunks": (11, 32), "compression": "gzip"},
    "narrow compressed": {"chunks": (5, 7), "compression": "gzip"},
    "checksums": {"chunks": (4, 32), "fletcher32": True},
}


@pytest.mark.parametrize("dtype", ["f8", "f4", ">f8", ">f4", "f2", "i4"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_type_is_read(make_file, layout, dtype):
    path, values = make_file(dtype=dtype, arrays=("flux", "error", "mask"), **LAYOUTS[layout])
    spectra = open_spectra(path)
    assert spectra.shards[0].layout["flux"] == ("contiguous" if layout == "contiguous" else "chunked")
    for block_rows in (1, 3, 4, 11, 50):
        for prefetch in (True, False):
            flux, error, first = gather(spectra.blocks(block_rows, prefetch=prefetch))
            np.testing.assert_array_equal(flux, values["flux"])
            np.testing.assert_array_equal(error, values["error"])
            assert first == list(range(0, 11, block_rows))
    for block in spectra.blocks(4):
        assert block.flux.dtype == block.error.dtype == np.float32
        assert block.flux.flags.c_contiguous
        assert block.mask.dtype == bool
        np.testing.assert_array_equal(block.mask, values["mask"][block.rows])


@pytest.mark.parametrize("rows", [(0, 11), (3, 9), (4, 8), (10, 11), (5, 5)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_range_of_rows(make_file, layout, rows):
    path, values = make_file(**LAYOUTS[layout])
    shard = Shard(path)
    np.testing.assert_array_equal(shard.read("flux", *rows), values["flux"][slice(*rows)])
    out = np.full((rows[1] - rows[0], 32), -1, np.float32)
    assert shard.read("error", *rows, out=out) is out
    np.testing.assert_array_equal(out, values["error"][slice(*rows)])
    with pytest.raises(ValueError, match="rows"):
        shard.read("flux", 0, 12)
    with pytest.raises(ValueError, match="out must"):
        shard.read("flux", 0, 2, out=np.empty((2, 31), np.float32))


def test_conversion_in_several_pieces(make_file, monkeypatch):
    monkeypatch.setattr(rows_module, "STAGING_BYTES", 3 * 32 * 8)
    path, values = make_file(arrays=("flux", "error", "mask"))
    shard = Shard(path)
    np.testing.assert_array_equal(shard.read("flux", 1, 11), values["flux"][1:])
    np.testing.assert_array_equal(shard.read("mask", 0, 11), values["mask"])


def test_compressed_chunks_are_decoded_once(make_file, monkeypatch):
    path, _ = make_file(n=64, chunks=(16, 32), compression="gzip")
    monkeypatch.setattr(structure, "SLAB_BYTES", 16 * 32 * 4)
    calls = []
    original = h5py.Dataset.read_direct

    def counted(self, dest, source_sel=None, dest_sel=None):
        calls.append((self.name, source_sel.start, source_sel.stop))
        return original(self, dest, source_sel, dest_sel)

    monkeypatch.setattr(h5py.Dataset, "read_direct", counted)
    list(open_spectra(path).blocks(5))
    assert len(calls) == len(set(calls)) == 2 * 4
    assert {start for _, start, _ in calls} == {0, 16, 32, 48}


def test_values_beyond_float32_become_infinite_without_a_warning(make_file):
    path, _ = make_file()
    with h5py.File(path, "r+") as file:
        file["dataset/arrays/flux/value"][2, 3] = 1e300
    assert np.isinf(Shard(path).read("flux", 0, 11)[2, 3])


def test_blocks_never_span_shards(make_file):
    first, a = make_file("a.h5", n=7, seed=1)
    second, b = make_file("b.h5", n=1, seed=2)
    third, c = make_file("c.h5", n=5, seed=3)
    spectra = open_spectra([first, second, third])
    blocks = list(spectra.blocks(4, params=["log_g"]))
    assert [(x.shard, x.first_row, len(x)) for x in blocks] == [
        (0, 0, 4),
        (0, 4, 3),
        (1, 7, 1),
        (2, 8, 4),
        (2, 12, 1),
    ]
    np.testing.assert_array_equal(
        np.concatenate([x.flux for x in blocks]), np.concatenate([a["flux"], b["flux"], c["flux"]])
    )
    log_g = np.concatenate([a["log_g"], b["log_g"], c["log_g"]])
    np.testing.assert_array_equal(np.concatenate([x.params["log_g"] for x in blocks]), log_g)
    np.testing.assert_array_equal(spectra.labels(["log_g"])["log_g"], log_g)
    np.testing.assert_array_equal(spectra.params(["log_g"])["log_g"], log_g)
    part = list(spectra.blocks(4, rows=(5, 10)))
    assert [(x.shard, x.first_row, len(x)) for x in part] == [(0, 5, 2), (1, 7, 1), (2, 8, 2)]
    assert not list(spectra.blocks(4, rows=(6, 6)))


def test_noisy_flux_is_preferred_unless_told_otherwise(make_file):
    path, values = make_file("noisy.h5", arrays=("flux", "error", "noisy"))
    clean, clean_values = make_file("clean.h5", seed=5)
    spectra = open_spectra([path, clean])
    auto, _, _ = gather(spectra.blocks(20))
    np.testing.assert_array_equal(auto, np.concatenate([values["noisy"], clean_values["flux"]]))
    flux, _, _ = gather(spectra.blocks(20, array="flux"))
    np.testing.assert_array_equal(flux, np.concatenate([values["flux"], clean_values["flux"]]))
    with pytest.raises(InputError, match=r"clean\.h5: has no array 'noisy'"):
        list(spectra.blocks(20, array="noisy"))


def test_mask_is_none_where_nothing_is_masked(make_file):
    path, _ = make_file(arrays=("flux", "error", "mask"))
    with h5py.File(path, "r+") as file:
        file["dataset/arrays/mask/value"][...] = 0
        file["dataset/arrays/mask/value"][9, 1] = -1
    masks = [block.mask for block in open_spectra(path).blocks(4)]
    assert masks[0] is None
    assert masks[1] is None
    assert masks[2].sum() == 1
    assert masks[2][1, 1]


def test_blocks_keep_their_values_while_others_are_read(make_file):
    path, values = make_file(n=200)
    kept = [block.flux[1:] for block in open_spectra(path).blocks(5)]
    gc.collect()
    for k, flux in enumerate(kept):
        np.testing.assert_array_equal(flux, values["flux"][5 * k + 1 : 5 * k + 5])


def test_memory_is_used_again(make_file):
    path, _ = make_file(n=400)
    starts = {block.flux.ctypes.data for block in open_spectra(path).blocks(5, prefetch=False)}
    assert len(starts) <= 8


@pytest.mark.parametrize("n_taken", [0, 1, 2])
def test_stopping_early_leaves_no_thread(make_file, n_taken):
    path, _ = make_file(n=100)
    blocks = open_spectra(path).blocks(2)
    for _ in range(n_taken):
        next(blocks)
    blocks.close()
    assert not reader_threads()
    for block in open_spectra(path).blocks(2):
        assert len(block) == 2
        break
    gc.collect()
    assert not reader_threads()


def test_an_error_of_the_consumer_leaves_no_thread(make_file):
    path, _ = make_file(n=100)

    def consume():
        for _ in open_spectra(path).blocks(2):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        consume()
    gc.collect()
    assert not reader_threads()


def test_arguments_are_checked_before_reading(make_file):
    spectra = open_spectra(make_file()[0])
    with pytest.raises(ValueError, match="block_rows"):
        spectra.blocks(0)
    with pytest.raises(ValueError, match="rows 0 to 12"):
        spectra.blocks(1, rows=(0, 12))
    with pytest.raises(InputError, match="array must be"):
        spectra.blocks(1, array="error")
    with pytest.raises(ValueError, match="on_error"):
        spectra.blocks(1, on_error="ignore")


def test_shards_travel_between_processes(make_file):
    path, values = make_file()
    shard = Shard(path)
    shard.read("flux", 0, 1)
    again = pickle.loads(pickle.dumps(shard))
    np.testing.assert_array_equal(again.read("flux", 0, 11), values["flux"])


def test_both_producer_files_read_alike(producer_files):
    first, second = (open_spectra(path) for path in producer_files)
    assert first.n_rows == second.n_rows == 64
    assert same_wave(first.wave, second.wave)
    columns = first.columns
    assert columns == second.columns
    assert {"T_eff", "log_g", "M_H", "a_M", "C_M", "mag", "redshift", "snr", "id"} <= set(columns)
    for a, b in zip(first.blocks(10, params=columns), second.blocks(7, params=columns), strict=False):
        n = min(len(a), len(b))
        if a.first_row == b.first_row:
            np.testing.assert_array_equal(a.flux[:n], b.flux[:n])
    for array in ("flux", "error", "mask"):
        a, b = (spectra.shards[0].read(array, 0, 64) for spectra in (first, second))
        np.testing.assert_array_equal(a, b)
        with h5py.File(producer_files[0]) as file:
            expected = file[f"dataset/arrays/{array}/value"][()]
        np.testing.assert_array_equal(a, expected != 0 if array == "mask" else expected.astype("f4"))
    for name, values in first.params(columns).items():
        np.testing.assert_array_equal(values, second.params([name])[name])
    with h5py.File(producer_files[0]) as file:
        table = file["dataset/params/table"][()]
    np.testing.assert_array_equal(first.labels()["T_eff"], table["values_block_1"][:, 0])
    assert first.labels()["log_g"].min() > 0.9
    assert first.labels()["log_g"].max() < 5.1


# -- refusing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["flux", "error"])
def test_a_missing_dataset_is_named(make_file, missing):
    path, _ = make_file()
    with h5py.File(path, "r+") as file:
        del file[f"dataset/arrays/{missing}"]
    with pytest.raises(
        InputError, match=f"dataset.h5: dataset dataset/arrays/{missing}/value is missing"
    ) as info:
        open_spectra(path)
    assert "spectrumdataset/wave (32,)" in str(info.value)


def test_missing_wave(make_file):
    path, _ = make_file()
    with h5py.File(path, "r+") as file:
        del file["spectrumdataset/wave"]
    with pytest.raises(InputError, match="spectrumdataset/wave is missing"):
        open_spectra(path)


@pytest.mark.parametrize(
    "wave", [np.linspace(7100, 8850, 31), np.linspace(8850, 7100, 32), np.full(32, np.nan)]
)
def test_impossible_wave(make_file, wave):
    path, _ = make_file(wave=wave)
    with pytest.raises(InputError, match="spectrumdataset/wave"):
        open_spectra(path)


def test_wave_grids_must_agree(make_file):
    grid = np.linspace(7100, 8850, 32)
    step = grid[1] - grid[0]
    first, _ = make_file("a.h5", wave=grid)
    near, _ = make_file("b.h5", wave=grid + 0.009 * step)
    far, _ = make_file("c.h5", wave=grid + 0.02 * step)
    short, _ = make_file("d.h5", p=31)
    assert open_spectra([first, near]).n_rows == 22
    with pytest.raises(
        WaveGridError, match=r"c\.h5.*than .*a\.h5: 32 pixels, 7101\.129 to.*expected 32 pixels, 7100\.000 to"
    ):
        open_spectra([first, far])
    with pytest.raises(WaveGridError, match="31 pixels"):
        open_spectra([first, short])
    spectra = open_spectra([first, far, near], on_error="skip")
    assert spectra.n_rows == 22
    assert [failure.path.name for failure in spectra.failures] == ["c.h5"]


def test_shapes_must_agree(make_file):
    path, _ = make_file()
    with h5py.File(path, "r+") as file:
        del file["dataset/arrays/error/value"]
        file["dataset/arrays/error/value"] = np.ones((10, 32))
    with pytest.raises(InputError, match=r"error/value has shape \(10, 32\)"):
        open_spectra(path)


def test_params_must_have_a_row_per_spectrum(make_file):
    path, _ = make_file()
    with h5py.File(path, "r+") as file:
        table = file["dataset/params"][:5]
        del file["dataset/params"]
        file["dataset/params"] = table
    with pytest.raises(InputError, match="has 5 rows for 11 spectra"):
        open_spectra(path)


@pytest.mark.parametrize("shape", [(0, 32), (11,), (11, 2, 16)])
def test_empty_and_misshapen_files(tmp_path, shape):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for array in ("flux", "error"):
            file[f"dataset/arrays/{array}/value"] = np.ones(shape)
        file["spectrumdataset/wave"] = np.arange(32.0)
    with pytest.raises(InputError, match="holds no spectra" if 0 in shape else "has shape"):
        open_spectra(tmp_path / "a.h5")


def test_datasets_of_text_are_refused(make_file):
    path, _ = make_file()
    with h5py.File(path, "r+") as file:
        del file["dataset/arrays/error/value"]
        file["dataset/arrays/error/value"] = np.full((11, 32), b"x")
    with pytest.raises(InputError, match="expected numbers"):
        open_spectra(path)


def test_one_row(make_file):
    path, values = make_file(n=1)
    flux, _, first = gather(open_spectra(path).blocks(100))
    np.testing.assert_array_equal(flux, values["flux"])
    assert first == [0]
    assert len(open_spectra(path).fingerprint()) == 64


def test_an_array_that_was_never_written(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for array in ("flux", "error"):
            file.create_dataset(f"dataset/arrays/{array}/value", (3, 4), "f4")
        file["spectrumdataset/wave"] = np.arange(4.0)
    with pytest.raises(InputError, match="never written"):
        open_spectra(tmp_path / "a.h5")


def test_chunks_that_were_never_written_read_as_the_fill_value(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for array in ("flux", "error"):
            data = file.create_dataset(
                f"dataset/arrays/{array}/value", (6, 4), "f4", chunks=(2, 4), fillvalue=np.nan
            )
            data[:2] = 1
        file["spectrumdataset/wave"] = np.arange(4.0)
    flux = Shard(tmp_path / "a.h5").read("flux", 0, 6)
    assert np.all(flux[:2] == 1)
    assert np.all(np.isnan(flux[2:]))


@pytest.mark.parametrize("content", [b"", b"no HDF5", bytes(5000)])
def test_other_files_are_recognised(tmp_path, content):
    (tmp_path / "a.h5").write_bytes(content)
    with pytest.raises(InputError, match="not an HDF5 file"):
        open_spectra(tmp_path / "a.h5")


def test_a_truncated_file_is_named_with_dataset_and_row(make_file):
    path, _ = make_file(n=1000)
    with h5py.File(path) as file:
        offset = file["dataset/arrays/error/value"].id.get_offset()
    with open(path, "rb+") as file:
        file.truncate(offset + 100 * 32 * 8 + 17)
    with pytest.raises(InputError, match=r"truncated.*error/value ends in row 100 of 1000"):
        open_spectra(path)


@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("layout", ["contiguous", "chunks", "compressed"])
def test_truncation_anywhere_is_an_input_error(make_file, layout, fraction):
    path, _ = make_file(n=300, **LAYOUTS[layout])
    size = path.stat().st_size
    with open(path, "rb+") as file:
        file.truncate(int(size * fraction))
    with pytest.raises(InputError, match=r"dataset\.h5"):
        list(open_spectra(path).blocks(7))


def test_a_file_that_shrinks_after_opening(make_file):
    path, values = make_file(n=100)
    spectra = open_spectra(path)
    with h5py.File(path) as file:
        offset = file["dataset/arrays/error/value"].id.get_offset()
    with open(path, "rb+") as file:
        file.truncate(offset + 50 * 32 * 8)
    blocks = spectra.blocks(20)
    np.testing.assert_array_equal(next(blocks).flux, values["flux"][:20])
    with pytest.raises(InputError, match=r"error/value: rows 40 to 59 cannot be read"):
        list(blocks)
    kept = list(spectra.blocks(20, on_error="skip"))
    assert [block.first_row for block in kept] == [0, 20]
    assert [failure.rows for failure in spectra.failures] == [(40, 60), (60, 80), (80, 100)]
    assert not reader_threads()


def test_a_damaged_chunk_spoils_its_rows_only(make_file):
    path, values = make_file(n=40, chunks=(10, 32), fletcher32=True)
    with h5py.File(path) as file:
        chunk = file["dataset/arrays/flux/value"].id.get_chunk_info_by_coord((20, 0))
    with open(path, "rb+") as file:
        file.seek(chunk.byte_offset + 100)
        file.write(b"\xff" * 16)
    spectra = open_spectra(path)
    # One slab would hold the whole file.
    spectra.shards[0]._stored["flux"] = dataclasses.replace(spectra.shards[0]._stored["flux"], slab_rows=10)
    kept = list(spectra.blocks(10, on_error="skip"))
    assert [block.first_row for block in kept] == [0, 10, 30]
    np.testing.assert_array_equal(kept[2].flux, values["flux"][30:])
    assert spectra.failures[0].rows == (20, 30)
    with pytest.raises(InputError, match="flux/value: rows 20 to 29"):
        list(spectra.blocks(10))


def test_the_others_go_on(make_file, tmp_path):
    good, values = make_file("good.h5")
    broken = tmp_path / "broken.h5"
    broken.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"broken\.h5"):
        open_spectra([good, broken])
    spectra = open_spectra([broken, good, tmp_path / "absent.h5"], on_error="skip")
    assert [failure.path.name for failure in spectra.failures] == ["absent.h5", "broken.h5"]
    np.testing.assert_array_equal(gather(spectra.blocks(5))[0], values["flux"])
    with pytest.raises(InputError, match="none of the files can be used"):
        open_spectra([broken], on_error="skip")


# -- by several threads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_are_filled_in_any_order(make_file, layout):
    path, values = make_file(dtype="f4", arrays=("flux", "error", "mask"), **LAYOUTS[layout])
    spectra = open_spectra([path, make_file("other.h5", n=6, seed=3)[0]])
    blocks = list(spectra.unfilled(4, params=["log_g"]))
    memory = BlockMemory()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda block: spectra.fill(block, memory), reversed(blocks)))
    assert [(block.shard, block.first_row, len(block)) for block in blocks] == [
        (0, 0, 4), (0, 4, 4), (0, 8, 3), (1, 11, 4), (1, 15, 2),
    ]  # fmt: skip
    for block, same in zip(blocks, spectra.blocks(4, params=["log_g"]), strict=True):
        np.testing.assert_array_equal(block.flux, same.flux)
        np.testing.assert_array_equal(block.error, same.error)
        np.testing.assert_array_equal(block.params["log_g"], same.params["log_g"])
        assert (block.mask is None) == (same.mask is None)
    np.testing.assert_array_equal(np.concatenate([block.flux for block in blocks[:3]]), values["flux"])
    np.testing.assert_array_equal(np.concatenate([block.mask for block in blocks[:3]]), values["mask"])


@pytest.mark.parametrize(("layout", "together"), [("contiguous", 2), ("chunks", 2), ("compressed", 1)])
def test_arrays_that_lie_as_they_are_are_read_side_by_side(make_file, layout, together, monkeypatch):
    """Every read waits until another one is under way, too."""
    path, values = make_file(n=8, dtype="f4", **LAYOUTS[layout])
    spectra = open_spectra(path)
    barrier = threading.Barrier(together, timeout=300)
    real = rows_module._RawFile.fill

    def fill(file, view, offset):
        barrier.wait()
        real(file, view, offset)

    monkeypatch.setattr(rows_module._RawFile, "fill", fill)
    blocks = list(spectra.unfilled(4))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda block: spectra.fill(block, BlockMemory()), blocks))
    np.testing.assert_array_equal(np.concatenate([block.flux for block in blocks]), values["flux"])


def test_a_file_that_is_closed_while_it_is_read(make_file, monkeypatch):
    """Others may be opened under the number of a file that was closed: it must be no other's before the read ends."""
    path, values = make_file(dtype="f4")
    shard, opened = Shard(path), []
    real = rows_module._RawFile.fill

    def fill(file, view, offset):
        shard.close()
        opened.extend(os.open("/dev/zero", os.O_RDONLY) for _ in range(5))
        real(file, view, offset)

    monkeypatch.setattr(rows_module._RawFile, "fill", fill)
    np.testing.assert_array_equal(shard.read("flux", 0, 11), values["flux"])
    np.testing.assert_array_equal(shard.read("error", 2, 9), values["error"][2:9])
    for number in opened:
        os.close(number)


def open_files(folder):
    numbers = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return [
        os.readlink(number)
        for number in numbers
        if os.path.exists(number) and str(folder) in os.readlink(number)
    ]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are listed on Linux")
def test_no_file_stays_open(make_file, tmp_path):
    spectra = open_spectra([make_file("a.h5")[0], make_file("b.h5", chunks=(4, 32))[0]])
    list(spectra.blocks(4, params=["log_g"]))
    assert open_files(tmp_path) == []
    blocks = spectra.blocks(4, prefetch=False)
    next(blocks)
    assert open_files(tmp_path)
    blocks.close()
    assert open_files(tmp_path) == []
    late = list(spectra.unfilled(4))
    for block in late:
        spectra.fill(block, BlockMemory())
    assert open_files(tmp_path)
    spectra.close()
    assert open_files(tmp_path) == []


def test_what_cannot_be_read_is_said_when_it_is_filled(make_file, monkeypatch):
    path, values = make_file(n=12, dtype="f4")
    with h5py.File(path) as file:
        offset = file["dataset/arrays/error/value"].id.get_offset()
    spectra = open_spectra(path)

    def params(_, names, start, stop):
        if stop > 4:
            raise InputError("params are damaged")
        return {name: np.zeros(stop - start) for name in names}

    monkeypatch.setattr(Shard, "params", params)
    with open(path, "rb+") as file:
        file.truncate(offset + 8 * 32 * 4)
    blocks = list(spectra.unfilled(4, params=["log_g"]))
    spectra.fill(blocks[0], BlockMemory())
    np.testing.assert_array_equal(blocks[0].error, values["error"][:4])
    with pytest.raises(InputError, match="params are damaged") as caught:
        spectra.fill(blocks[1], BlockMemory())
    assert spectra.lost(blocks[1], caught.value) == Failure(path, (4, 8), caught.value)
    # What was said of rows before is said of them now: spectra first, then params.
    with pytest.raises(InputError, match=r"error/value: rows 8 to 11 cannot be read.*file ends at byte"):
        spectra.fill(blocks[2], BlockMemory())


def test_memory_of_several_threads_belongs_to_one_each():
    memory, rows = BlockMemory(), np.arange(50)

    def work(k):
        arrays = [memory.array(name, (8, 100)) for name in ("flux", "error", "mask") for _ in range(2)]
        for array in arrays:
            array[:] = k % 2 if array.dtype == bool else k
        return all((array == (k % 2 if array.dtype == bool else k)).all() for array in arrays)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, rows))


# -- labels ----------------------------------------------------------------------------------------------------


def test_labels(make_file):
    path, values = make_file()
    spectra = open_spectra(path)
    assert spectra.has_labels()
    labels = spectra.labels()
    assert list(labels) == ["T_eff", "log_g", "M_H"]
    for name, value in labels.items():
        assert value.dtype == np.float64
        np.testing.assert_array_equal(value, values[name])


def test_missing_labels_are_named(make_file):
    first, _ = make_file("a.h5")
    second, _ = make_file("b.h5", labels=("T_eff",))
    third, _ = make_file("c.h5", labels=None)
    spectra = open_spectra([first, second])
    assert spectra.columns == ("T_eff",)
    assert not spectra.has_labels()
    assert spectra.has_labels(["T_eff"])
    with pytest.raises(LabelError, match=r"b\.h5: dataset/params lacks log_g, M_H; it has T_eff"):
        spectra.labels()
    assert open_spectra(third).columns == ()
    with pytest.raises(LabelError, match="no readable column"):
        open_spectra(third).labels()
    with pytest.raises(InputError, match="no column 'log_g'"):
        list(open_spectra(third).blocks(5, params=["log_g"]))


def test_labels_that_are_not_finite_are_named(make_file):
    path, _ = make_file()
    with h5py.File(path, "r+") as file:
        table = file["dataset/params"][()]
        table["log_g"][[3, 7]] = np.nan, np.inf
        file["dataset/params"][...] = table
    spectra = open_spectra(path)
    with pytest.raises(LabelError, match=r"log_g is not finite in 2 of 11 rows, the first of them 3, 7"):
        spectra.labels()
    kept = spectra.labels(partial=True)
    assert np.flatnonzero(np.isnan(kept["log_g"])).tolist() == [3, 7]
    assert np.isfinite(kept["T_eff"]).all()
    (note,) = spectra.label_notes()
    assert "log_g is not finite in 2 of 11 rows, the first of them 3, 7 (nan, inf)" in note


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("T_eff", -9999.0),
        ("T_eff", 0.0),
        ("T_eff", 1e200),
        ("log_g", 99.99),
        ("log_g", -9999.0),
        ("M_H", -99.0),
    ],
)
def test_numbers_that_no_star_has_are_no_labels(name, value, make_file):
    path, _ = make_file()
    with h5py.File(path, "r+") as file:
        table = file["dataset/params"][()]
        table[name][4] = value
        file["dataset/params"][...] = table
    spectra = open_spectra(path)
    with pytest.raises(LabelError, match=rf"{name} is outside .* in 1 of 11 rows, the first of them 4 "):
        spectra.labels()
    assert np.flatnonzero(np.isnan(spectra.labels(partial=True)[name])).tolist() == [4]


def test_no_label_at_all_is_an_error(make_file):
    path, _ = make_file()
    with h5py.File(path, "r+") as file:
        table = file["dataset/params"][()]
        table["M_H"] = -9999
        file["dataset/params"][...] = table
    with pytest.raises(LabelError, match="M_H is outside -6 to 2 or not finite in 11 of 11 rows"):
        open_spectra(path).labels(partial=True)


# -- order -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["id", "row"])
@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        (np.arange(11), False),
        (np.arange(100, 111), False),
        (np.arange(0, 22, 2), False),
        (np.arange(11) * 7919 % 104729, False),
        (np.arange(11)[::-1], True),
        (100 + np.roll(np.arange(11), 3), True),
    ],
)
def test_rows_numbered_in_another_order_are_told(name, numbers, told, make_file):
    path, _ = make_file(labels=None)
    with h5py.File(path, "r+") as file:
        file[f"dataset/params/{name}"] = numbers
    problems = open_spectra(path).shards[0].order_problems()
    assert len(problems) == told
    assert all(f"column '{name}'" in problem and "another order" in problem for problem in problems)


def test_the_index_of_pandas_counts_too(make_file):
    path, _ = make_file(labels=None)
    table = np.zeros(11, [("index", "i8"), ("log_g", "f8")])
    table["index"] = np.roll(np.arange(11), 2)
    with h5py.File(path, "r+") as file:
        file["dataset/params/table"] = table
        file["dataset/params"].attrs["pandas_type"] = "frame_table"
    (problem,) = open_spectra(path).shards[0].order_problems()
    assert "the index" in problem


# -- fingerprints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fingerprint_follows_the_content_not_the_name(make_file, tmp_path, layout):
    path, _ = make_file(**LAYOUTS[layout])
    copy = tmp_path / "elsewhere.h5"
    shutil.copy(path, copy)
    assert Shard(path).fingerprint() == Shard(copy).fingerprint()
    assert open_spectra(path).fingerprint() == open_spectra(copy).fingerprint()
    other, _ = make_file("other.h5", seed=9, **LAYOUTS[layout])
    assert Shard(other).fingerprint() != Shard(path).fingerprint()
    with h5py.File(copy, "r+") as file:
        file["spectrumdataset/wave"][0] += 1e-6
    assert Shard(copy).fingerprint() != Shard(path).fingerprint()


def test_same_wave():
    grid = np.geomspace(7000, 9000, 100)
    assert same_wave(grid, grid + 1e-6)
    assert not same_wave(grid, grid[:-1])
    assert not same_wave(grid, grid / 10)
    assert same_wave(grid[:1], grid[:1])


# -- what a folder or a pattern names ----------------------------------------------------------------------------------


def test_what_a_folder_names_and_cannot_be_read_is_told(make_file, tmp_path):
    first, _ = make_file("night/a.h5")
    folder = first.parent
    (folder / "b.h5").symlink_to("gone.h5")
    (folder / "c").symlink_to("gone")
    (folder / "loop.h5").symlink_to("loop.h5")
    (folder / "notes.txt").symlink_to("gone.txt")
    os.mkfifo(folder / "d.h5")
    for given in (folder, f"{folder}/*"):
        spectra = open_spectra(given, on_error="skip")
        assert [shard.path.name for shard in spectra.shards] == ["a.h5"]
        names = {failure.path.name for failure in spectra.failures} - {"notes.txt"}
        assert names == {"b.h5", "c", "d.h5", "loop.h5"}
        with pytest.raises(InputError):
            open_spectra(given)


def test_a_folder_below_that_may_not_be_read_is_told(make_file, monkeypatch):
    first, _ = make_file("night/a.h5")
    closed = first.parent / "closed"
    closed.mkdir()
    real = Path.iterdir

    def refuse(path):
        if path == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    spectra = open_spectra(first.parent, on_error="skip")
    assert [failure.path for failure in spectra.failures] == [closed]


def test_links_to_folders_are_followed_once(make_file, tmp_path):
    first, _ = make_file("disk/part/a.h5")
    second, _ = make_file("other/b.h5")
    (first.parent / "back").symlink_to(first.parents[1])
    (first.parents[1] / "other").symlink_to(second.parent)
    found = {path.resolve() for path in find_files(first.parents[1])}
    assert found == {first, second}


def test_companions_of_macos_are_no_spectra(make_file):
    first, _ = make_file("night/x.h5")
    (first.parent / "._x.h5").write_bytes(b"\x00\x05\x16\x07" + bytes(100))
    assert find_files(first.parent) == [first]
    with pytest.raises(InputError, match="no file matches"):
        find_files(f"{first.parent}/._*")


def test_folders_that_a_pattern_meets_are_searched(make_file):
    first, _ = make_file("run1/a.h5")
    second, _ = make_file("run2.h5")
    assert find_files(f"{second.parent}/run*") == [first, second]


@pytest.mark.parametrize("name", ["x" * 300 + ".h5", "nul\0.h5", "~nobody-of-this-name/x.h5"])
def test_impossible_names_are_an_error(name):
    with pytest.raises(InputError):
        open_spectra(name)
    with pytest.raises(InputError):
        Shard(name)


def test_the_cause_is_told(make_file, tmp_path):
    path, _ = make_file()
    os.mkfifo(tmp_path / "pipe.h5")
    with pytest.raises(InputError, match="is a pipe"):
        Shard(tmp_path / "pipe.h5")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(InputError, match="too many files are open"):
            Shard(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        (
            "Unable to synchronously open file (unable to lock file, errno = 11)",
            "HDF5_USE_FILE_LOCKING=FALSE",
        ),
        ("Unable to synchronously open file (file is already open for write)", "wait until it has finished"),
        ("Unable to open file (unable to open file: errno = 24)", "ulimit -n"),
        ("Unable to open file (unable to open file: errno = 13)", "may not be read"),
    ],
)
def test_damage_is_not_blamed_for_what_others_do(said, remedy, make_file, monkeypatch):
    path, _ = make_file()

    def refuse(*_, **__):
        raise OSError(said)

    monkeypatch.setattr(h5py, "File", refuse)
    with pytest.raises(InputError, match=remedy) as caught:
        Shard(path)
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("off", [0.02, -0.02])
def test_grids_that_differ_a_little_are_told_apart(off, make_file):
    """A fiftieth of an Å inside the grid: both ends, and the mean step, are the same."""
    wave = 7100 + 0.4 * np.arange(32)
    bent = wave + off * (np.arange(32) == 3)
    first, _ = make_file("a.h5", wave=wave)
    second, _ = make_file("b.h5", wave=bent)
    with pytest.raises(WaveGridError) as caught:
        open_spectra([first, second])
    assert f"pixel 3, {bent[3]:.5f} Å where {wave[3]:.5f} Å are expected ({off:+.5f} Å)" in str(caught.value)


@pytest.mark.parametrize(
    ("code", "name"), [(32001, "Blosc"), (32015, "Zstandard"), (40000, "unknown filter")]
)
@pytest.mark.parametrize("array", ["flux", "params"])
def test_a_compression_that_is_not_installed_is_named(code, name, array, make_file):
    if h5py.h5z.filter_avail(code):
        pytest.skip(f"{name} is installed")
    path, _ = make_file(labels=None)
    with h5py.File(path, "r+") as file:
        place = {"flux": "dataset/arrays/flux/value", "params": "dataset/params/id"}[array]
        if array == "flux":
            values = file[place][()]
            del file[place]
        else:
            values = np.arange(len(file["dataset/arrays/flux/value"]))
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_chunk(values.shape)
        creation.set_filter(code, h5py.h5z.FLAG_OPTIONAL)
        file.require_group(place.rpartition("/")[0])
        space, kind = h5py.h5s.create_simple(values.shape), h5py.h5t.py_create(values.dtype)
        made = h5py.h5d.create(file.id, place.encode(), kind, space, dcpl=creation)
        # As if it had been compressed by somebody who has the filter.
        made.write_direct_chunk((0,) * values.ndim, values.tobytes(), filter_mask=0)
    if array == "flux":
        with pytest.raises(
            InputError, match=rf"flux/value is compressed with .*{name}.*hdf5plugin"
        ) as caught:
            Shard(path)
        assert "damaged" not in str(caught.value)
        assert "truncated" not in str(caught.value)
    else:
        assert "hdf5plugin" in Shard(path).unreadable["id"]


def test_a_writer_at_work_is_told(make_file):
    path, _ = make_file()
    script = "import h5py, sys; f = h5py.File(sys.argv[1], 'r+'); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "open\n"
        with pytest.raises(InputError, match=r"another program has it open for writing.*LOCKING=FALSE"):
            Shard(path)
    Shard(path)


# -- memory --------------------------------------------------------------------------------------------------------


def _many(path, n):
    """Spectra of four pixels with identifiers of both kinds."""
    with h5py.File(path, "w") as file:
        for name in ("flux", "error"):
            # Real files hold as many bytes of spectra as one likes: these are about the params.
            file.create_dataset(f"dataset/arrays/{name}/value", data=np.ones((n, 4), np.float32))
        file["spectrumdataset/wave"] = np.arange(7000.0, 7004.0)
        table = np.zeros(n, [("id", "i8"), ("name", "S24"), ("T_eff", "f8"), ("log_g", "f8"), ("M_H", "f8")])
        # The last one is the first: the order must be told, which asks for all of them.
        table["id"] = np.roll(np.arange(n), 1)
        table["name"] = np.char.add("star ", np.arange(n).astype(str))
        table["T_eff"] = 5000
        table["log_g"][-1] = -9999
        file["dataset/params"] = table
    return path


def test_memory_does_not_grow_with_the_rows(tmp_path):
    from moefast.predicting.identifiers import identifier_dtypes

    peaks = {}
    for n in (50_000, 800_000):
        spectra = open_spectra(_many(tmp_path / f"{n}.h5", n))
        tracemalloc.start()
        notes = spectra.label_notes()
        assert identifier_dtypes(spectra, ["name"])["name"] == np.dtype(f"U{len(f'star {n - 1}')}")
        assert spectra.has_labels()
        spectra.fingerprint()
        rows = sum(len(block) for block in spectra.blocks(2048, params=["id", "name"], prefetch=False))
        peaks[n] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert rows == n
        assert f"in 1 of {n:,} rows, the first of them {n - 1} (-9999)" in notes[0]
        assert "row 0 has" in notes[1]
        spectra.close()
    # One byte a row says which numbers have been met.
    assert peaks[800_000] < 1.1 * peaks[50_000] + 800_000, peaks


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w / 10, "nanometres: multiply it by 10$"), (lambda w: w / 1e4, "micrometres"),
        (lambda w: w / 1e10, "metres: multiply it by 1e10"), (np.log10, "log10 of"), (np.log, "ln of"),
    ],
)  # fmt: skip
def test_wavelengths_in_another_unit_are_named(change, words):
    wave = np.linspace(7100, 8850, 50)
    assert re.search(words, describe_difference(change(wave), wave))
    assert "looks like" not in describe_difference(wave[5:], wave)
    assert other_unit(np.linspace(4000, 5000, 50), wave) == ""


def test_wavelengths_that_decrease_are_told_what_to_do(make_file):
    path, _ = make_file("a.h5")
    with h5py.File(path, "r+") as file:
        wave = file["spectrumdataset/wave"][:]
        file["spectrumdataset/wave"][:] = wave[::-1]
    with pytest.raises(InputError, match="it decreases: reverse wave and the pixels of every array"):
        Shard(path)
    with h5py.File(path, "r+") as file:
        wave[7] = wave[5]
        file["spectrumdataset/wave"][:] = wave
    with pytest.raises(InputError, match="; pixel 6 has "):
        Shard(path)


def test_units_that_arrays_say_by_attributes_count(make_file):
    path, _ = make_file("a.h5")
    wave, flux = "spectrumdataset/wave", "dataset/arrays/flux/value"

    def say(place, text, name="units"):
        with h5py.File(path, "r+") as file:
            file[place].attrs[name] = text

    for place, text in (
        (wave, "Angstrom"),
        (flux, "1e-17 erg / (s cm2 Angstrom)"),
        (flux, "normalised"),
        (flux, ""),
    ):
        say(place, text)
        assert Shard(path).n_rows == 11
    say(wave, "nm")
    with pytest.raises(InputError, match=r"/spectrumdataset/wave is in nm, by its attribute; Å are expected"):
        Shard(path)
    say(wave, "Angstrom")
    say(flux, "nJy")
    with pytest.raises(
        InputError, match=r"flux/value is in nJy, by its attribute; f_λ is expected: multiply"
    ):
        Shard(path)
    say(flux, "electron")
    with pytest.raises(InputError, match="must be flux-calibrated first"):
        Shard(path)
