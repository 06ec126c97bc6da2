"""Prediction tables: every format gives back what was written, complete or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import warnings

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from astropy.io import fits

from moefast.core.errors import InputError, OutputError
from moefast.inspection.run import is_table
from moefast.spectra import Column, open_table, read_table
from moefast.spectra.tables import WRITERS, read_layout

SUFFIXES = list(WRITERS)
COLUMNS = [
    Column("row", np.dtype("i8"), "", "row of the input"),
    Column("id", np.dtype("U6"), "", "identifier"),
    Column("log_g", np.dtype("f4"), "dex", "surface gravity"),
    Column("T_eff", np.dtype("f8"), "K", "effective temperature"),
    Column("flag", np.dtype("u4"), "", "bits"),
    Column("expert", np.dtype("i2"), "", "expert with the largest weight"),
    Column("big", np.dtype("u8")),
    Column("covered", np.dtype("?")),
]
ATTRS = {"moefast_version": "0.1", "inputs": ["a.h5", "b'c.h5"], "backend": "cpu", "r2": None}


def rows(n, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "row": np.arange(n),
        "id": np.array([f"s{k % 1000}" for k in range(n)]),
        "log_g": np.where(rng.random(n) < 0.1, np.nan, rng.random(n)).astype("f4"),
        "T_eff": rng.random(n),
        "flag": rng.integers(0, 2**32, n, dtype="u4"),
        "expert": rng.integers(-1, 9, n).astype("i2"),
        "big": rng.integers(0, 2**64, n, dtype="u8"),
        "covered": rng.random(n) > 0.5,
    }


def write(path, data, block, attrs=None, **options):
    n = len(data["row"])
    with open_table(path, n, COLUMNS, ATTRS if attrs is None else attrs, **options) as table:
        for start in range(0, n, block):
            table.write(start, {name: values[start : start + block] for name, values in data.items()})
        table.attrs.update(r2=0.73, spectra_per_second=1.5e5)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("n", "block"), [(0, 1), (1, 1), (100, 7), (100, 100), (70_001, 20_000)])
def test_what_was_written_is_read(tmp_path, suffix, n, block):
    path, data = tmp_path / f"out{suffix}", rows(n)
    write(path, data, block)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    columns, attrs = read_table(path)
    assert list(columns) == [column.name for column in COLUMNS]
    for column in COLUMNS:
        np.testing.assert_array_equal(columns[column.name], data[column.name])
        assert columns[column.name].dtype == column.dtype or column.name == "id"
        assert columns[column.name].dtype.isnative
    assert attrs == ATTRS | {"r2": 0.73, "spectra_per_second": 1.5e5}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_attributes_of_every_kind_and_length(tmp_path, suffix):
    attrs = {
        "short": "x",
        "a_long_name_for_it": "y",
        "long": "it's " * 3000,
        "a_long_name_and_text": "z's " * 30_000,
        "number": np.int64(3),
        "real": np.float32(0.5),
        "nan": float("nan"),
        "infinite": float("inf"),
        "yes": True,
        "array": np.arange(3),
        "nested": {"a": [1, None, "ü"]},
        "unicode": "Å\nand more",
        "end": "an end",
        "comment": "a comment",
        "empty": "",
        "ampersand": "this & that &",
        "quoted": '"so"',
        "nul": "before\0after",
    }
    path = tmp_path / f"out{suffix}"
    write(path, rows(5), 5, attrs={})
    write(path, rows(5), 5, attrs=attrs, overwrite=True)
    columns, found = read_table(path)
    np.testing.assert_array_equal(columns["T_eff"], rows(5)["T_eff"])
    assert np.isnan(found.pop("nan"))
    expected = attrs | {"array": [0, 1, 2], "r2": 0.73, "spectra_per_second": 1.5e5}
    del expected["nan"]
    assert found == expected
    assert found["yes"] is True


@pytest.mark.parametrize("n_attrs", [0, 10, 50, 59, 60, 61, 200])
def test_fits_makes_room_for_late_attributes(tmp_path, n_attrs):
    path = tmp_path / "out.fits"
    with open_table(path, 3, COLUMNS) as table:
        table.write(0, rows(3))
        for k in range(n_attrs):
            table.attrs[f"failure_{k}"] = "it could not be read " * 30
    columns, attrs = read_table(path)
    assert len(attrs) == n_attrs
    np.testing.assert_array_equal(columns["flag"], rows(3)["flag"])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_others_read_units_and_descriptions(tmp_path):
    data = rows(20)
    for suffix in (".h5", ".parquet", ".fits"):
        write(tmp_path / f"out{suffix}", data, 6)
    with h5py.File(tmp_path / "out.h5") as file:
        assert file["predictions/T_eff"].attrs["unit"] == "K"
        assert file["predictions/log_g"].attrs["description"] == "surface gravity"
        assert file["predictions/id"].asstr()[3] == "s3"
        assert file.attrs["backend"] == "cpu"
    schema = pq.read_schema(tmp_path / "out.parquet")
    assert schema.field("T_eff").metadata[b"unit"] == b"K"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fits.open(tmp_path / "out.fits") as file:
            file.verify("exception")
            assert file["PREDICTIONS"].columns["T_eff"].unit == "K"
            assert file["PREDICTIONS"].header["TCOMM3"] == "[dex] surface gravity"
            assert file[0].header["BACKEND"] == "cpu"
            assert file[0].header["moefast_version"] == "0.1"
            np.testing.assert_array_equal(file["PREDICTIONS"].data["log_g"], data["log_g"])
    assert (tmp_path / "out.fits").stat().st_size % 2880 == 0


def test_parquet_has_few_row_groups(tmp_path):
    write(tmp_path / "out.parquet", rows(140_000), 1000)
    assert pq.ParquetFile(tmp_path / "out.parquet").num_row_groups <= 4


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_blocks_may_use_their_memory_again(tmp_path, suffix):
    data = rows(30)
    buffer = {name: values[:10].copy() for name, values in data.items()}
    with open_table(tmp_path / f"out{suffix}", 30, COLUMNS) as table:
        for start in (0, 10, 20):
            for name, values in data.items():
                buffer[name][...] = values[start : start + 10]
            table.write(start, buffer)
    columns, _ = read_table(tmp_path / f"out{suffix}")
    np.testing.assert_array_equal(columns["T_eff"], data["T_eff"])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_remains_after_an_exception(tmp_path, suffix):
    def fail():
        with open_table(tmp_path / f"out{suffix}", 10, COLUMNS) as table:
            table.write(0, rows(5))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_missing_rows(tmp_path, suffix):
    table = open_table(tmp_path / f"out{suffix}", 10, COLUMNS)
    table.write(0, rows(9))
    with pytest.raises(OutputError, match="9 of 10 rows"):
        table.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_existing_tables_are_kept_unless_told_otherwise(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    path.write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        open_table(path, 1, COLUMNS)
    assert path.read_text() == "precious"
    write(path, rows(3), 3, overwrite=True)
    assert len(read_table(path)[0]["row"]) == 3


def test_where_tables_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match=r"unknown table format '.csv'; use .h5"):
        open_table(tmp_path / "a.csv", 1, COLUMNS)
    with pytest.raises(OutputError, match="does not exist"):
        open_table(tmp_path / "absent" / "a.h5", 1, COLUMNS)
    (tmp_path / "x.h5").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        open_table(tmp_path / "x.h5", 1, COLUMNS)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_are_checked(tmp_path, suffix):
    with open_table(tmp_path / f"out{suffix}", 5, COLUMNS) as table:
        table.write(0, rows(2))
        with pytest.raises(ValueError, match="row 2 expected next, found 3"):
            table.write(3, rows(2))
        with pytest.raises(ValueError, match="do not fit"):
            table.write(2, rows(4))
        with pytest.raises(ValueError, match=r"missing \['flag'\]"):
            table.write(2, {k: v for k, v in rows(3).items() if k != "flag"})
        with pytest.raises(ValueError, match="column 'expert' is int16, found float64"):
            table.write(2, rows(3) | {"expert": np.ones(3)})
        with pytest.raises(ValueError, match=r"column 'T_eff': shape \(3,\)"):
            table.write(2, rows(3) | {"T_eff": np.ones(2)})
        with pytest.raises(OutputError, match="column 'id' keeps 24 bytes of text, found 40"):
            table.write(2, rows(3) | {"id": np.array(["x" * 40] * 3)})
        table.write(2, rows(3))
    assert list(read_table(tmp_path / f"out{suffix}")[0]["row"]) == [0, 1, 0, 1, 2]


def test_text_beyond_ascii(tmp_path):
    data = rows(2) | {"id": np.array(["Å", "b"])}
    for suffix in (".h5", ".parquet"):
        write(tmp_path / f"out{suffix}", data, 2)
        assert list(read_table(tmp_path / f"out{suffix}")[0]["id"]) == ["Å", "b"]
    with pytest.raises(OutputError, match="beyond ASCII"):
        write(tmp_path / "out.fits", data, 2)
    assert not (tmp_path / "out.fits").exists()


def test_bad_columns():
    with pytest.raises(ValueError, match="no table holds"):
        Column("a", np.dtype("c8"))
    with pytest.raises(ValueError, match="needs a name"):
        Column("", np.dtype("f4"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_unreadable_tables(tmp_path, suffix):
    with pytest.raises(InputError, match="absent"):
        read_table(tmp_path / f"absent{suffix}")
    (tmp_path / f"bad{suffix}").write_bytes(b"nothing of the kind" * 300)
    with pytest.raises(InputError, match="bad"):
        read_table(tmp_path / f"bad{suffix}")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.parametrize("suffix", [".h5", ".parquet", ".fits"])
def test_a_killed_process_leaves_no_final_name_and_the_next_one_tidies_up(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    script = textwrap.dedent(
        """
        import sys
        import numpy as np
        from moefast.spectra.tables import Column, open_table
        table = open_table(sys.argv[1], 100, [Column("row", np.dtype("i8"))])
        table.write(0, {"row": np.arange(50)})
        print("half", flush=True)
        sys.stdin.read()
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "half\n"
    # While the other process lives, its file is not touched.
    write(tmp_path / f"out2{suffix}", rows(2), 2)
    write(path, rows(2), 2)
    path.unlink()
    (partial,) = tmp_path.glob(f".out{suffix}.*-{process.pid}-*.partial")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not path.exists()
    assert partial.exists()
    write(path, rows(4), 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"out{suffix}", f"out2{suffix}"]
    assert len(read_table(path)[0]["row"]) == 4


# -- checksums ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_tables(tmp_path_factory):
    """A table of each format, its content, and what is in it."""
    folder = tmp_path_factory.mktemp("tables")
    found = {}
    for suffix in SUFFIXES:
        path = folder / f"t{suffix}"
        write(path, rows(50), 20)
        found[suffix] = path.read_bytes()
    return found


@pytest.mark.parametrize("suffix", [".h5", ".parquet", ".fits"])
def test_any_bit_that_changes_is_told_or_does_no_harm(tmp_path, suffix, small_tables):
    path, content = tmp_path / f"t{suffix}", small_tables[suffix]
    path.write_bytes(content)
    expected, attributes = read_table(path)
    rng, told = np.random.default_rng(3), 0
    places = rng.choice(len(content), 300, replace=False)
    for at in places:
        damaged = bytearray(content)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                columns, attrs = read_table(path)
        except InputError:
            told += 1
            continue
        assert attrs == attributes, at
        assert list(columns) == list(expected), at
        for name in expected:
            np.testing.assert_array_equal(columns[name], expected[name], err_msg=f"{name}, byte {at}")
    assert told > 30


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_fits_table_is_told_once(share, tmp_path, small_tables):
    path, content = tmp_path / "t.fits", small_tables[".fits"]
    path.write_bytes(content)
    assert is_table(path)
    path.write_bytes(content[: int(share * len(content))])
    # Warnings, which astropy gives of such files, are errors here.
    for read in (read_table, read_layout):
        with pytest.raises(InputError, match=r"t\.fits: truncated file"):
            read(path)
    assert not is_table(path)


def test_any_value_that_changes_is_told(tmp_path, small_tables):
    """Values are where no structure would notice: each of them is found by its bytes."""
    for suffix in (".h5", ".fits"):
        value = rows(50)["T_eff"][7:8].astype("<f8" if suffix == ".h5" else ">f8").tobytes()
        at = small_tables[suffix].find(value)
        assert at > 0
        damaged = bytearray(small_tables[suffix])
        damaged[at] ^= 1
        path = tmp_path / f"t{suffix}"
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"checksum|filter returned failure"):
            read_table(path)


def test_other_readers_check_the_checksums(tmp_path, small_tables):
    for suffix in (".h5", ".fits"):
        (tmp_path / f"t{suffix}").write_bytes(small_tables[suffix])
    with warnings.catch_warnings():
        # astropy warns of sums that do not fit.
        warnings.simplefilter("error")
        with fits.open(tmp_path / "t.fits", checksum=True) as file:
            assert [("CHECKSUM" in hdu.header, "DATASUM" in hdu.header) for hdu in file] == [(True, True)] * 2
            assert file[1].header["DATASUM"] != "0"
    with h5py.File(tmp_path / "t.h5") as file:
        assert all(dataset.fletcher32 for dataset in file["predictions"].values())


@pytest.mark.parametrize("n", [1, 65_536, 65_537, 200_001])
def test_chunks_waste_next_to_nothing(tmp_path, n):
    path = tmp_path / "t.h5"
    with open_table(path, n, [Column("x", np.dtype("f8"))]) as table:
        table.write(0, {"x": np.arange(n, dtype=float)})
    assert path.stat().st_size < 8 * n + 10_000
    np.testing.assert_array_equal(read_table(path)[0]["x"], np.arange(n))


def test_a_table_that_others_changed_is_told(tmp_path):
    write(tmp_path / "t.h5", rows(5), 5)
    with h5py.File(tmp_path / "t.h5", "r+") as file:
        file.attrs["backend"] = "abacus"
    with pytest.raises(InputError, match=r"t\.h5: attributes or columns are not those that were written"):
        read_table(tmp_path / "t.h5")
    with pytest.raises(InputError, match="not those that were written"):
        read_layout(tmp_path / "t.h5")


def test_a_heap_of_zeros_does_not_hang(tmp_path):
    """Texts of attributes lie in a heap without checksum, in which HDF5 goes on for ever at an object of no size."""
    path = tmp_path / "t.h5"
    write(path, rows(5), 5)
    content = path.read_bytes()
    at = content.find(b"GCOL")
    assert at > 0
    for first in range(at + 16, at + 80, 8):
        path.write_bytes(content[:first] + bytes(16) + content[first + 16 :])
        for read in (read_table, read_layout):
            with pytest.raises(InputError):
                read(path)
