"""Tables of predictions as a catalogue that is divided on the sky."""

import json

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from moefast.cli import cli
from moefast.cluster.catalogue import write_catalogue
from moefast.core.errors import InputError, OutputError
from moefast.core.healpix import nested_pixels
from moefast.spectra.tables import Column, open_table

N = 300


@pytest.fixture
def tables(tmp_path):
    """Two tables of stars all over the sky, as moefast predict --keep ra,dec writes them."""
    rng = np.random.default_rng(1)
    columns = {
        "row": np.arange(N), "ra": rng.uniform(0, 360, N), "dec": np.degrees(np.arcsin(rng.uniform(-1, 1, N))),
        "log_g": rng.uniform(1, 5, N).astype(np.float32),
    }  # fmt: skip
    columns["ra"][7] = np.nan
    kinds = [Column(name, values.dtype, "", name) for name, values in columns.items()]
    paths = []
    for index, part in enumerate(np.array_split(np.arange(N), 2)):
        paths.append(tmp_path / f"part-{index}.parquet")
        with open_table(paths[-1], len(part), kinds, {}) as table:
            table.write(0, {name: values[part] for name, values in columns.items()})
    return paths, columns


def test_a_catalogue_is_read_by_others(tables, tmp_path):
    paths, columns = tables
    found = write_catalogue(paths, tmp_path / "stars", order=1)
    assert (found.n_rows, found.n_without_position) == (N - 1, 1)
    whole = ds.dataset(tmp_path / "stars" / "dataset", format="parquet", partitioning="hive")
    assert whole.count_rows() == N - 1
    table = whole.to_table().sort_by("row")
    there = np.arange(N) != 7
    for name, values in columns.items():
        np.testing.assert_array_equal(table[name].to_numpy(), values[there], err_msg=name)
    pixels = nested_pixels(columns["ra"][there], columns["dec"][there], 1)
    np.testing.assert_array_equal(table["_healpix_29"].to_numpy() >> 56, pixels)
    assert set(table["Norder"].to_pylist()) == {1}
    # A region is a range of the index.
    first = int(pixels[0])
    here = (ds.field("_healpix_29") >= first << 56) & (ds.field("_healpix_29") < (first + 1) << 56)
    few = whole.to_table(filter=here & (ds.field("log_g") > 3))
    assert few.num_rows == ((pixels == first) & (columns["log_g"][there] > 3)).sum()
    for file in (tmp_path / "stars" / "dataset").rglob("Npix=*.parquet"):
        index = pq.read_table(file)["_healpix_29"].to_numpy()
        assert (np.diff(index) >= 0).all()
        assert set(index >> 56) == {int(file.stem.removeprefix("Npix="))}
    lines = (tmp_path / "stars" / "partition_info.csv").read_text().splitlines()
    assert lines[0] == "Norder,Npix"
    assert len(lines) - 1 == found.n_files == len(np.unique(pixels))
    said = dict(
        line.split("=", 1) for line in (tmp_path / "stars" / "hats.properties").read_text().splitlines()[1:]
    )
    assert (said["hats_nrows"], said["hats_col_ra"], said["hats_col_dec"]) == (str(N - 1), "ra", "dec")


def test_what_cannot_be_a_catalogue_is_refused(tables, tmp_path):
    paths, _ = tables
    bare = tmp_path / "bare.parquet"
    with open_table(bare, 1, [Column("row", np.dtype(np.int64), "", "row")], {}) as table:
        table.write(0, {"row": np.zeros(1, np.int64)})
    with pytest.raises(InputError, match=r"bare\.parquet: has no column ra; predict with --keep ra,dec"):
        write_catalogue([bare], tmp_path / "stars")
    assert not list(tmp_path.glob(".stars*"))
    write_catalogue(paths, tmp_path / "stars")
    with pytest.raises(OutputError, match="exists already"):
        write_catalogue(paths, tmp_path / "stars")
    write_catalogue(paths[:1], tmp_path / "stars", overwrite=True)
    assert ds.dataset(tmp_path / "stars" / "dataset").count_rows() == N // 2 - 1


def test_the_command(tables, tmp_path):
    paths, _ = tables
    done = CliRunner().invoke(
        cli, ["merge", *map(str, paths), "--hats", "-o", str(tmp_path / "stars"), "-q", "--json"]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rows"] == N - 1
