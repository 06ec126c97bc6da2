"""Tables of shards become the table of one run, or are refused by name."""

import numpy as np
import pytest
from click.testing import CliRunner

from moefast.cli import cli
from moefast.cluster.merge import merge_tables, tables_named
from moefast.core.errors import InputError, OutputError
from moefast.predicting.files import predict
from moefast.spectra.tables import read_layout, read_table

FORMATS = (".h5", ".parquet", ".fits")
ROWS = (0, 120)


@pytest.fixture(scope="module")
def source(stars, tmp_path_factory):
    some = stars.take(slice(*ROWS))
    some.params["obj_id"] = np.array([f"star {i}" for i in range(len(some))])
    some.flux[7] = np.nan
    return some.write(tmp_path_factory.mktemp("merge") / "x.h5")


@pytest.fixture(scope="module")
def parts(source, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    for index in range(3):
        predict(source, model, folder / f"part-{index}.parquet", shard=(index, 3))
    return [folder / f"part-{index}.parquet" for index in range(3)]


@pytest.fixture(scope="module")
def reference(source, model, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "whole.h5"
    predict(source, model, path)
    return read_table(path)


@pytest.mark.parametrize("suffix", FORMATS)
def test_parts_make_the_table_of_one_run(suffix, parts, reference, tmp_path):
    out = tmp_path / f"m{suffix}"
    merged = merge_tables([parts[2], parts[0], parts[1]], out)
    columns, attributes = read_table(out)
    expected, whole = reference
    assert list(columns) == list(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(columns[name], values, err_msg=name)
    assert (merged.n_rows, merged.n_parts, merged.rows) == (120, 3, ROWS)
    assert np.isnan(columns["log_g"][7])
    assert merged.r2 == pytest.approx(whole["r2"], abs=1e-12)
    assert attributes["r2"] == merged.r2
    assert attributes["rows"] == whole["rows"]
    assert attributes["inputs"] == whole["inputs"]
    assert attributes["merged_from"] == [str(path) for path in parts]
    assert "shard" not in attributes


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_layout_is_read_without_the_rows(suffix, source, model, tmp_path):
    out = tmp_path / f"t{suffix}"
    predict(source, model, out, limit=5)
    columns, attributes, n_rows = read_layout(out)
    values, whole = read_table(out)
    assert n_rows == 5
    assert attributes == whole
    assert [column.name for column in columns] == list(values)
    by_name = {column.name: column for column in columns}
    assert by_name["log_g"].unit == "dex"
    assert by_name["log_g"].dtype == np.float32
    assert by_name["flag"].dtype == np.uint32
    assert "surface gravity" in by_name["log_g"].description
    assert by_name["obj_id"].text_bytes >= len("star 119")


def test_parts_of_several_formats(source, model, reference, tmp_path):
    for index, suffix in enumerate(FORMATS):
        predict(source, model, tmp_path / f"p{index}{suffix}", shard=(index, 3))
    merge_tables(tables_named([tmp_path]), tmp_path / "m.fits")
    np.testing.assert_array_equal(read_table(tmp_path / "m.fits")[0]["log_g"], reference[0]["log_g"])


def test_ranges_of_rows_are_parts_too(source, model, reference, tmp_path):
    predict(source, model, tmp_path / "a.h5", rows=(0, 50))
    predict(source, model, tmp_path / "b.h5", rows=(50, 90))
    merged = merge_tables([tmp_path / "b.h5", tmp_path / "a.h5"], tmp_path / "m.h5")
    assert merged.rows == (0, 90)
    np.testing.assert_array_equal(read_table(tmp_path / "m.h5")[0]["log_g"], reference[0]["log_g"][:90])
    predict(source, model, tmp_path / "c.h5", rows=(100, 120))
    with pytest.raises(InputError, match=r"rows 50:100 are missing between .*a\.h5 and .*c\.h5"):
        merge_tables([tmp_path / "a.h5", tmp_path / "c.h5"], tmp_path / "n.h5")


def test_missing_and_doubled_parts_are_named(parts, tmp_path):
    out = tmp_path / "m.h5"
    with pytest.raises(InputError, match="shard 1/3 is missing"):
        merge_tables([parts[0], parts[2]], out)
    with pytest.raises(InputError, match=r"part-1\.parquet: rows 40:80 are in .*part-1\.parquet already"):
        merge_tables([*parts, parts[1]], out)
    assert not out.exists()


def test_what_does_not_belong_together_is_refused(parts, source, stars, model, tmp_path):
    out = tmp_path / "m.h5"
    predict(source, model, tmp_path / "option.parquet", shard=(1, 3), telluric="mask")
    with pytest.raises(InputError, match=r"option\.parquet: is of other options"):
        merge_tables([parts[0], tmp_path / "option.parquet", parts[2]], out)
    other = stars.take(slice(0, 120)).write(tmp_path / "other.h5")
    predict(other, model, tmp_path / "input.parquet", shard=(1, 3))
    with pytest.raises(InputError, match=r"input\.parquet: is of another input"):
        merge_tables([parts[0], tmp_path / "input.parquet", parts[2]], out)
    predict(source, model, tmp_path / "four.parquet", shard=(1, 4))
    with pytest.raises(InputError, match="different divisions"):
        merge_tables([parts[0], tmp_path / "four.parquet", parts[2]], out)
    predict(source, model, tmp_path / "kept.parquet", shard=(1, 3), array="flux")
    assert not out.exists()


def test_parts_with_other_velocities_under_the_same_name_are_refused(source, model, tmp_path):
    out, table = tmp_path / "m.h5", tmp_path / "v.csv"
    for index, velocity in enumerate((0, 3)):
        rows = "".join(f"star {i},{velocity}\n" for i in range(ROWS[1]))
        table.write_text("obj_id,v_los\n" + rows)
        predict(source, model, tmp_path / f"{index}.parquet", shard=(index, 2), velocity=table)
    with pytest.raises(InputError, match=r"1\.parquet: is of other options.*velocity_sha256"):
        merge_tables([tmp_path / "0.parquet", tmp_path / "1.parquet"], out)
    assert not out.exists()
    predict(source, model, tmp_path / "again.parquet", shard=(0, 2), velocity=table)
    merge_tables([tmp_path / "again.parquet", tmp_path / "1.parquet"], out)


def test_other_files_are_no_parts(parts, source, tmp_path):
    with pytest.raises(InputError, match=r"cannot be read as a table|no group"):
        merge_tables([source], tmp_path / "m.h5")
    with pytest.raises(InputError, match="no tables"):
        merge_tables([], tmp_path / "m.h5")
    with pytest.raises(InputError, match="no table"):
        tables_named([tmp_path / "none-*.h5"])
    merge_tables(parts, tmp_path / "m.h5")
    with pytest.raises(OutputError, match="exists"):
        merge_tables(parts, tmp_path / "m.h5")


def test_the_command(parts, tmp_path):
    out = tmp_path / "m.h5"
    result = CliRunner().invoke(cli, ["merge", str(parts[0].parent / "part-*.parquet"), "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert "120 spectra of 3 parts, rows 0:120, R²" in result.output
    result = CliRunner().invoke(cli, ["merge", str(parts[0]), "-o", str(tmp_path / "n.h5"), "-q"])
    assert result.exit_code == 3
    assert "shards 1/3, 2/3 are missing" in result.output
