"""The command on files of the surveys: rows, identifiers, velocities, selections, formats, bad neighbours."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import warnings

import h5py
import numpy as np
import pandas
import pyarrow.parquet
import pytest
from astropy.io import fits
from astropy.table import Table
from click.testing import CliRunner
from small import same_rows
from survey_files import LIGHT_SPEED, write_desi, write_pfs_many, write_pfs_one

from moefast.cli import cli
from moefast.core.errors import InputError
from moefast.predicting.arrays import predict_arrays
from moefast.predicting.files import predict
from moefast.spectra import open_spectra, read_table
from moefast.spectra.telluric import telluric_pixels

N = 12


@pytest.fixture(scope="module")
def few(stars):
    return stars.take(slice(0, N)).observed()


@pytest.fixture(scope="module")
def want(few, model):
    """What spectra give that are divided by their median."""
    scale = np.median(few.flux.astype(float), 1, keepdims=True)
    return predict_arrays(few.flux / scale, few.error / scale, model)


@pytest.fixture(scope="module")
def coadd(few, tmp_path_factory):
    return write_pfs_many(
        tmp_path_factory.mktemp("pfs") / "night.fits", few.wave, few.flux.astype(float), few.error.astype(float),
        target_type=[1, 1, 2, 3] * 3, visits=3,
    )  # fmt: skip


def test_a_pfs_file_gives_what_its_spectra_give(coadd, want, model):
    found = predict(coadd, model, telluric="keep")
    np.testing.assert_allclose(found.columns["log_g"], want["log_g"], atol=1e-3)
    np.testing.assert_array_equal(found.columns["objId"], 1000 + np.arange(N))
    np.testing.assert_array_equal(found.columns["targetType"], [1, 1, 2, 3] * 3)
    assert {"catId", "ra", "dec", "fiberId", "nVisit"} <= set(found.columns)
    assert found.r2 is None


def test_what_is_done_to_spectra_is_logged(coadd, stars_file, model, caplog):
    with caplog.at_level("INFO", logger="moefast"):
        predict([coadd, stars_file], model, limit=20, velocity=20, medium="air", array="flux")
    said = caplog.messages
    assert "input: 2 files, rows 0:20 of 2,612, of which 20 are predicted" in said
    assert "layout: pfsCoadd (1 file), pfsspec (1 file)" in said
    assert "array: flux, as --array says" in said
    assert "wavelengths: air, as --wave-medium says" in said
    assert "resampling: spectra of 2 of 2 files are put on the model's grid" in said
    assert (
        "telluric: pixels at 7150-7400, 7590-7715, 8100-8380 Å count as bad in 1 of 2 files (--telluric auto)"
        in said
    )
    assert "velocity: removed: 20 km/s" in said


def test_files_of_one_star_are_one_table(few, coadd, model, tmp_path):
    for i in range(N):
        write_pfs_one(
            tmp_path / f"pfsObject-{i:02d}.fits", few.wave, few.flux[i].astype(float), few.error[i].astype(float),
            obj_id=1000 + i,
        )  # fmt: skip
    found = predict(tmp_path, model, tmp_path / "table.h5")
    columns, attrs = read_table(tmp_path / "table.h5")
    whole = predict(coadd, model).columns
    for name in ("log_g", "log_g_err", "chi2", "objId", "snr_median"):
        np.testing.assert_array_equal(columns[name], whole[name])
    np.testing.assert_array_equal(columns["file"], np.arange(N))
    assert not columns["row"].any()
    assert [name.rpartition("/")[2] for name in attrs["inputs"]] == [
        f"pfsObject-{i:02d}.fits" for i in range(N)
    ]
    assert not found.failures


def test_rows_that_are_selected_are_those_of_the_whole(coadd, model, tmp_path):
    whole = predict(coadd, model).columns
    part = predict(
        coadd, model, tmp_path / "t.fits", select="targetType == 1 and objId > 1001", keep=["tract"]
    )
    columns, attrs = read_table(tmp_path / "t.fits")
    rows = [4, 5, 8, 9]
    np.testing.assert_array_equal(columns["row"], rows)
    same_rows(columns, whole, slice(None), other_rows=np.array(rows), but=("patch",))
    assert attrs["select"] == "targetType == 1 and objId > 1001"
    assert part.n_rows == 4
    with pytest.raises(InputError, match="holds for none of the rows 0:12"):
        predict(coadd, model, select="targetType == 9")
    with pytest.raises(InputError, match=r"--select snr: .*night\.fits has no such column; it has catId"):
        predict(coadd, model, select="snr > 3")
    with pytest.raises(InputError, match=r"--keep nothing: .*has no such column"):
        predict(coadd, model, keep=["nothing"])


@pytest.mark.parametrize("kind", ["commas", "lines", "csv", "fits", "several"])
def test_targets_on_a_list_are_those_of_the_whole(kind, coadd, model, tmp_path):
    whole = predict(coadd, model).columns
    ids = {"catId": [10092, 10092, 7], "objId": [1007, 1002, 1003]}
    rows, given = [2, 7], tmp_path / f"list.{kind}"
    if kind == "commas":
        given, rows = "1007, 1002,99", [2, 7]
    elif kind == "lines":
        given.write_text("# mine\n1007\n1002  # the second\n\n")
    elif kind == "several":
        given, rows = "1001,1002,1003", [1]
    else:
        Table(ids).write(given)
    found = predict(coadd, model, targets=given, select="targetType == 1" if kind == "several" else None)
    same_rows(found.columns, whole, slice(None), other_rows=rows)
    said = {
        "commas": "1 of 3 targets is not among the spectra, such as objId 99",
        "csv": "1 of 3 targets is not among the spectra, such as catId 7, objId 1003",
    }
    told = [note for note in found.notes if "targets is not among" in note]
    assert len(told) == (kind in ("commas", "csv", "fits"))
    assert said.get(kind, "") in "".join(told)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ("4711,4712", "none of its 2 targets is among the spectra .compared by objId"),
        (",", "names no target"), ("nowhere.csv", "no such file"), ("empty.txt", "names no target"),
        ("other.csv", "no identifier in common with the spectra; the table has name"),
        # A field left out would make real numbers of the others, and large ones that of a neighbour.
        ("gap.csv", "gap.csv: column objId has empty fields or numbers that are not whole"),
    ],
)  # fmt: skip
def test_lists_that_name_no_target(given, match, coadd, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "other.csv").write_text("name\nSun\n")
    (tmp_path / "gap.csv").write_text("catId,objId\n10092,9007199254740993\n10092,\n")
    with pytest.raises(InputError, match=match):
        predict(coadd, model, targets=given)


def test_simulated_files_can_be_selected_and_keep_columns(stars_file, model, whole):
    found = predict(stars_file, model, select="T_eff > 5000", keep=["T_eff", "mag"], limit=500)
    rows = found.columns["row"]
    assert 50 < len(rows) < 450
    assert rows.max() < 500
    assert np.all(found.columns["T_eff"] > 5000)
    np.testing.assert_array_equal(found.columns["log_g"], whole.columns["log_g"][rows])
    with pytest.raises(InputError, match="--keep log_g: the table has a column of this name"):
        predict(stars_file, model, keep=["log_g"])


def test_parts_are_the_whole(coadd, model):
    whole = predict(coadd, model).columns
    for rows in ((0, 5), (5, 6), (6, 12)):
        same_rows(
            predict(coadd, model, rows=rows).columns, whole, slice(None), other_rows=slice(*rows), but=()
        )


def test_velocities_are_removed_and_told(few, want, model, tmp_path):
    velocity = np.linspace(-200, 200, N)
    waves = [few.wave * (1 + v / LIGHT_SPEED) for v in velocity]
    path = write_pfs_many(tmp_path / "a.fits", waves, few.flux.astype(float), few.error.astype(float))
    Table({"objId": 1000 + np.arange(N), "v_los": velocity, "v_los_err": np.full(N, 3.0)}).write(
        tmp_path / "v.csv"
    )
    found = predict(path, model, tmp_path / "t.parquet", velocity=tmp_path / "v.csv", telluric="keep")
    columns, attrs = read_table(tmp_path / "t.parquet")
    np.testing.assert_allclose(columns["log_g"], want["log_g"], atol=3e-3)
    np.testing.assert_allclose(columns["v_los"], velocity, rtol=1e-6)
    np.testing.assert_array_equal(columns["v_los_err"], np.full(N, 3, "f4"))
    assert "joined by objId" in attrs["velocity"]
    assert not found.failures
    assert np.abs(predict(path, model, telluric="keep").columns["log_g"] - want["log_g"]).max() > 0.05


def test_at_rest_nothing_changes_a_bit(stars_file, whole, model):
    found = predict(stars_file, model, velocity=0, limit=300).columns
    assert not found.pop("v_los").any()
    same_rows(found, whole.columns, slice(0, 300))


def test_bad_rows_and_files_cost_themselves_alone(few, coadd, model, tmp_path):
    waves = [few.wave.copy() for _ in range(N)]
    waves[4][100] = np.nan
    bad = write_pfs_many(tmp_path / "bad.fits", waves, few.flux.astype(float), few.error.astype(float))
    whole = bad.read_bytes()
    (tmp_path / "cut.fits").write_bytes(whole[: len(whole) // 2])
    found = predict([coadd, bad, tmp_path / "cut.fits"], model)
    good = predict(coadd, model).columns
    rows = np.delete(np.arange(N), 4)
    for name in ("log_g", "log_g_err", "flag"):
        np.testing.assert_array_equal(found.columns[name][:N], good[name])
        np.testing.assert_array_equal(found.columns[name][N + rows], good[name][rows])
    assert np.isnan(found.columns["log_g"][N + 4])
    assert found.columns["flag"][N + 4] & 1
    texts = [str(failure.error) for failure in found.failures]
    assert "cut.fits: truncated file" in texts[0]
    assert "bad.fits: row 4: HDU FLUXTABLE: wavelength of pixel 100 is not finite" in texts[1]


def _bad_files(folder, few):
    """Files each of which is wrong in its own way, and what must be said of each."""
    wave, flux, error = few.wave, few.flux.astype(float), few.error.astype(float)

    def desi(name, wave=wave, rows=N):
        return write_desi(folder / name, {"R": (wave, flux[:rows], error[:rows])})

    nan, twice = wave.copy(), wave.copy()
    nan[7], twice[9] = np.nan, twice[8]
    whole = desi("cut.fits").read_bytes()
    (folder / "cut.fits").write_bytes(whole[: len(whole) // 2])
    (folder / "packed.fits.gz").write_bytes(gzip.compress(whole)[:1000])
    with fits.open(desi("incomplete.fits"), mode="update") as file:
        del file["R_IVAR"]
    (
        desi("nan.fits", nan),
        desi("backwards.fits", wave[::-1]),
        desi("twice.fits", twice),
        desi("empty.fits", rows=0),
    )
    with fits.open(desi("unit.fits"), mode="update", output_verify="ignore") as file:
        file["R_FLUX"].header["BUNIT"] = "sausages"
    with fits.open(desi("counts.fits"), mode="update") as file:
        file["R_FLUX"].header["BUNIT"] = "electron"
    write_pfs_many(folder / "nothing.fits", wave, flux[:0], error[:0])
    star = write_pfs_one(folder / "column.fits", wave, flux[0], error[0])
    with fits.open(star, mode="update") as file:
        file["FLUX_TABLE"].columns.change_name("error", "sigma")
    table = fits.BinTableHDU.from_columns([fits.Column("TARGETID", "K", array=[1])], name="REDSHIFTS")
    fits.HDUList([fits.PrimaryHDU(), table]).writeto(folder / "redrock.fits")
    return {
        "cut": r"truncated file: HDU \d \(\w+\) ends at byte", "packed": "cannot be read as FITS",
        "incomplete": "HDU R_IVAR is missing; found PRIMARY, FIBERMAP",
        "nan": "HDU R_WAVELENGTH: wavelength of pixel 7 is not finite",
        "backwards": "HDU R_WAVELENGTH: wavelength of pixel 1 is not above the one before it",
        "twice": "HDU R_WAVELENGTH: wavelength of pixel 9 is not above the one before it",
        "empty": "no spectra in this file", "unit": "HDU R_FLUX: 'sausages' is no unit that astropy knows",
        "counts": "HDU R_FLUX: flux in electron found, expected a flux density",
        "nothing": "HDU TARGET has no rows", "column": "HDU FLUX_TABLE has no column 'error'",
        "redrock": "name this table with --velocity",
    }  # fmt: skip


def test_a_folder_full_of_bad_files_costs_these_files(few, coadd, model, model_folder, tmp_path):
    folder = tmp_path / "night"
    folder.mkdir()
    shutil.copy(coadd, folder / "a_good.fits")
    said = _bad_files(folder, few)
    shutil.copy(coadd, folder / "z_good.fits")
    out = tmp_path / "t.h5"
    done = CliRunner().invoke(cli, ["predict", str(folder), "-m", str(model_folder), "-o", str(out)])
    assert done.exit_code == 3, done.output
    for name, words in said.items():
        assert re.search(rf"error: \S*{name}\.fits\S*: .*{words}", done.stderr), name
    assert done.stderr.count("moefast: error:") == len(said)
    columns, attrs = read_table(out)
    good = predict(coadd, model).columns
    for name in ("log_g", "log_g_err", "flag"):
        np.testing.assert_array_equal(columns[name], np.tile(good[name], 2))
    assert len(attrs["failures"]) == len(said)


def test_desi_is_read_with_a_warning(few, model, tmp_path):
    scale = {"R": few.wave < 7620, "Z": few.wave > 7520}
    arms = {
        arm: (few.wave[k] + 0.05, few.flux[:, k].astype(float), few.error[:, k].astype(float))
        for arm, k in scale.items()
    }
    path = write_desi(tmp_path / "x.fits", arms)
    found = predict(path, model)
    assert any("line-spread function" in note for note in found.notes)
    assert np.array_equal(found.columns["TARGETID"], 39633345008634465 + np.arange(N))
    assert np.isfinite(found.columns["log_g"]).all()


def test_fits_tables_are_read_without_a_warning(coadd, model, tmp_path):
    predict(coadd, model, tmp_path / "t.fits", velocity=5.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = Table.read(tmp_path / "t.fits")
    assert str(table["ra"].unit) == "deg"
    assert str(table["v_los"].unit) == "km / s"
    assert table["objId"].dtype == np.dtype(">i8")


def test_tables_open_elsewhere_as_documented(coadd, model, tmp_path):
    """FITS is verified by astropy, HDF5 becomes a table in one line, Parquet has units and descriptions."""
    found = predict(coadd, model, velocity=5.0).columns
    for suffix in ("fits", "h5", "parquet"):
        predict(coadd, model, tmp_path / f"t.{suffix}", velocity=5.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fits.open(tmp_path / "t.fits") as file:
            file.verify("exception")
            assert file[1].header["TCOMM1"]
            assert [hdu.name for hdu in file] == ["PRIMARY", "PREDICTIONS"]
        with h5py.File(tmp_path / "t.h5") as file:
            table = Table({name: column[:] for name, column in file["predictions"].items()})
        frame = pandas.read_parquet(tmp_path / "t.parquet")
    assert set(table.colnames) == set(frame.columns) == set(found)
    for name in ("objId", "pfsVisitHash", "log_g", "flag"):
        np.testing.assert_array_equal(table[name], found[name])
        np.testing.assert_array_equal(frame[name], found[name])
    with pyarrow.parquet.ParquetFile(tmp_path / "t.parquet") as file:
        field = file.schema_arrow.field("ra")
        assert field.metadata[b"unit"] == b"deg"
        assert b"model" in file.metadata.metadata


def test_the_command(coadd, model_folder, tmp_path):
    out = tmp_path / "t.fits"
    arguments = ["predict", str(coadd), "-m", str(model_folder), "-o", str(out), "--velocity", "-26", "--keep", "tract",
                 "--select", "targetType == 1", "--wave-medium", "vacuum", "--json"]  # fmt: skip
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rows"] == 6
    columns, _ = read_table(out)
    assert "tract" in columns
    np.testing.assert_array_equal(columns["v_los"], np.full(6, -26, "f4"))
    bad = CliRunner().invoke(cli, [*arguments[:-7], "--velocity", "nowhere.fits", "--overwrite"])
    assert bad.exit_code == 3
    assert "--velocity nowhere.fits: no such file" in bad.stderr


def test_tables_among_the_spectra_are_passed_over(coadd, model, tmp_path):
    shutil.copy(coadd, tmp_path / "night.fits")
    predict(tmp_path, model, tmp_path / "table.fits")
    again = predict(tmp_path, model, tmp_path / "other.fits")
    assert again.n_rows == N
    assert not again.failures


def test_what_cannot_be_done_with_files_of_surveys_is_said(coadd):
    with pytest.raises(InputError, match=r"night\.fits: a FITS file; only predict and inspect read those"):
        open_spectra(coadd)


def test_inspect_shows_them_as_a_model_would_see_them(coadd, model_folder):
    result = CliRunner().invoke(cli, ["inspect", str(coadd), "-m", str(model_folder), "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["files"][0]["arrays"]["flux"]["layout"] == "pfsCoadd"
    assert "objId" in facts["files"][0]["columns"]


@pytest.mark.filterwarnings("ignore:.*pixels are lost:moefast.core.errors.OddSpectraWarning")
def test_the_earths_absorption_is_masked_where_light_came_through_it(few, coadd, stars_file, model):
    scale = np.median(few.flux.astype(float)[:, ~telluric_pixels(few.wave)], 1, keepdims=True)
    mask = np.repeat(telluric_pixels(few.wave)[None], N, axis=0)
    want = predict_arrays(few.flux / scale, few.error / scale, model, mask=mask)
    found = predict(coadd, model)
    np.testing.assert_allclose(found.columns["log_g"], want["log_g"], atol=1e-3)
    assert sum("atmosphere absorbs" in note for note in found.notes) == 1
    kept, masked = (predict(stars_file, model, limit=N, telluric=word) for word in ("keep", "mask"))
    same_rows(predict(stars_file, model, limit=N).columns, kept.columns)
    assert np.abs(masked.columns["log_g"] - kept.columns["log_g"]).max() > 0.05
    in_memory = predict_arrays(few.flux, few.error, model, telluric="mask")
    np.testing.assert_array_equal(in_memory["log_g"], masked.columns["log_g"])
    with pytest.raises(InputError, match="one of auto, mask, keep expected, found 'no'"):
        predict_arrays(few.flux, few.error, model, telluric="no")
