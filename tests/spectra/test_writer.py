"""Spectrum files out: what others read of them, and that they are complete or absent."""

from __future__ import annotations

import h5py
import numpy as np
import pandas as pd
import pytest
import tables

from moefast.core.errors import OutputError
from moefast.spectra import SpectrumWriter, open_spectra

P = 16
WAVE = np.linspace(7100, 7200, P)
EDGES = np.linspace(7097, 7203, P + 1)
PARAMS = {"T_eff": "f8", "log_g": "f4", "id": "i8", "seed": "u4", "clear": "?", "name": "S6"}


def rows(n, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "params": {
            "T_eff": rng.uniform(3750, 6000, n),
            "log_g": rng.uniform(1, 5, n).astype("f4"),
            "id": np.arange(n),
            "seed": rng.integers(0, 2**32, n, dtype="u4"),
            "clear": rng.random(n) > 0.5,
            "name": np.array([f"s{k}" for k in range(n)]),
        },
        "flux": rng.random((n, P)),
        "error": rng.random((n, P)).astype("f4"),
        "mask": rng.random((n, P)) > 0.9,
    }


def part(data, start, stop):
    cut = {name: values[start:stop] for name, values in data.items() if name != "params"}
    return cut | {"params": {name: values[start:stop] for name, values in data["params"].items()}}


def writer(path, n=10, **options):
    options = {"arrays": ("flux", "error", "mask"), "params": PARAMS} | options
    return SpectrumWriter(path, n_rows=n, wave=WAVE, wave_edges=EDGES, **options)


@pytest.mark.parametrize("n", [1, 10, 40_000])
def test_written_files_are_read_by_us_by_pandas_and_by_pytables(tmp_path, n):
    path = tmp_path / "a.h5"
    data = rows(n)
    with writer(path, n, attrs={"generator": "test", "seed": 3, "config": {"a": [1, 2]}}) as file:
        assert not path.exists()
        for start in reversed(range(0, n, 3333)):
            file.write(start, **part(data, start, min(start + 3333, n)))
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]
    spectra = open_spectra(path)
    shard = spectra.shards[0]
    assert shard.layout == {"flux": "contiguous", "error": "contiguous", "mask": "contiguous"}
    assert shard.dtypes["flux"] == np.float32
    assert shard.attrs == {"generator": "test", "seed": 3, "config": '{"a": [1, 2]}'}
    np.testing.assert_array_equal(spectra.wave, WAVE)
    np.testing.assert_array_equal(shard.read("flux", 0, n), data["flux"].astype("f4"))
    np.testing.assert_array_equal(shard.read("error", 0, n), data["error"])
    np.testing.assert_array_equal(shard.read("mask", 0, n), data["mask"])
    frame = pd.read_hdf(path, "dataset/params")
    assert list(frame.columns) == list(PARAMS)
    assert list(frame.index) == list(range(n))
    for name, values in data["params"].items():
        np.testing.assert_array_equal(shard.params([name])[name], values)
        np.testing.assert_array_equal(frame[name].to_numpy(), values)
        if name != "name":
            assert frame[name].dtype == PARAMS[name]
    with tables.open_file(path) as file:
        assert file.root.dataset.params.table.nrows == n
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["spectrumdataset/wave_edges"], EDGES)


def test_without_params(tmp_path):
    with writer(tmp_path / "a.h5", 2, arrays=("flux", "error"), params=None) as file:
        file.write(0, flux=np.ones((2, P)), error=np.ones((2, P)))
    assert open_spectra(tmp_path / "a.h5").columns == ()


def test_nothing_remains_after_an_exception(tmp_path):
    def fail():
        with writer(tmp_path / "a.h5") as file:
            file.write(0, **rows(10))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert not list(tmp_path.iterdir())


def test_all_rows_must_be_written_once(tmp_path):
    file = writer(tmp_path / "a.h5")
    file.write(2, **rows(3))
    with pytest.raises(OutputError, match="rows 4 to 5 have been written before"):
        file.write(4, **rows(2))
    with pytest.raises(OutputError, match="7 rows not written, the first is 0"):
        file.close()
    assert not list(tmp_path.iterdir())


def test_existing_files_are_kept_unless_told_otherwise(tmp_path):
    path = tmp_path / "a.h5"
    path.write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        writer(path)
    assert path.read_text() == "precious"
    with writer(path, 2, overwrite=True) as file:
        file.write(0, **rows(2))
        assert path.read_text() == "precious"
    assert open_spectra(path).n_rows == 2
    with pytest.raises(OutputError, match="folder"):
        writer(tmp_path / "absent" / "a.h5")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flux": None}, "arrays flux, error, mask expected"),
        ({"noisy": np.ones((3, P))}, "arrays flux, error, mask expected"),
        ({"flux": np.ones((3, P + 1))}, r"flux: shape \(3, 16\) expected"),
        ({"params": {"T_eff": np.ones(3)}}, "params T_eff, log_g"),
        ({"params": rows(2)["params"]}, r"shape \(3,\) expected"),
        ({"params": rows(3)["params"] | {"name": ["far too long"] * 3}}, "6 bytes do not hold"),
    ],
)
def test_rows_are_checked(tmp_path, change, message):
    file = writer(tmp_path / "a.h5")
    data = {name: values for name, values in (rows(3) | change).items() if values is not None}
    with pytest.raises(ValueError, match=message):
        file.write(0, **data)
    with pytest.raises(ValueError, match="do not fit"):
        file.write(8, **rows(3))
    file.abort()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        {"n": 0},
        {"arrays": ("flux", "colour")},
        {"params": {"index": "f8"}},
        {"params": {"a b": "f8"}},
        {"params": {"a": "U5"}},
        {"params": {"a": "S"}},
    ],
)
def test_impossible_files_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match=r"must|type|is |name|expected"):
        writer(tmp_path / "a.h5", **options)
    assert not list(tmp_path.iterdir())
