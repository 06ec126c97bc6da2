"""Velocities as a number, a column or a table; rows by a selection; units."""

from __future__ import annotations

import numpy as np
import pytest
from astropy import units
from astropy.io import fits
from astropy.table import Table
from survey_files import LIGHT_SPEED, write_desi, write_pfs_many, write_pfs_one

from moefast.core.errors import InputError
from moefast.spectra.opening import open_prepared
from moefast.spectra.prepared import Preparation
from moefast.spectra.resample import Pixels
from moefast.spectra.selection import parse_selection, select
from moefast.spectra.spectrum_set import SpectrumSet, open_spectra
from moefast.spectra.tables import Column, open_table
from moefast.spectra.targets import rows_of_targets
from moefast.spectra.units import air_to_vacuum, flux_factor, read_unit, wave_factor
from moefast.spectra.velocities import find_velocities, read_velocity_table

WAVE = 8000 + 0.5 * np.arange(60)
ECSV = (
    "# %ECSV 1.0\n# ---\n# delimiter: ','\n# datatype:\n# - {name: objId, datatype: int64}\n"
    "# - {name: v_los, datatype: float64}\n"
)
FLUX, ERROR = np.ones((4, 60)), np.full((4, 60), 0.1)


@pytest.fixture
def pfs(tmp_path):
    path = write_pfs_many(tmp_path / "spectra.fits", WAVE, FLUX, ERROR, obj_id=[11, 12, 13, 14])
    return open_prepared(path, Preparation(WAVE, moving=True))


def catalogue(path, obj_id, v_los, cat_id=10092):
    columns = [
        fits.Column("catId", "J", array=np.full(len(obj_id), cat_id)), fits.Column("objId", "K", array=obj_id),
        fits.Column("v_los", "E", array=v_los), fits.Column("v_losErr", "E", array=np.full(len(obj_id), 2.0)),
    ]  # fmt: skip
    fits.HDUList([fits.PrimaryHDU(), fits.BinTableHDU.from_columns(columns, name="STARCATALOG")]).writeto(
        path
    )
    return path


@pytest.mark.parametrize("given", [-26, "-26", -26.0, "-2.6e1"])
def test_a_number(given, pfs):
    found = find_velocities(given, pfs)
    np.testing.assert_array_equal(found.velocity, np.full(4, -26.0))
    assert found.error is None
    assert found.source == "-26 km/s"


def test_a_catalogue_is_joined_whatever_its_order(pfs, tmp_path):
    path = catalogue(tmp_path / "c.fits", [13, 99, 11, 14, 12], [3.0, 9, 1, 4, 2])
    found = find_velocities(str(path), pfs)
    np.testing.assert_array_equal(found.velocity, [1, 2, 3, 4])
    np.testing.assert_array_equal(found.error, np.full(4, 2.0))
    assert "joined by catId and objId" in found.source


def test_missing_and_repeated_identifiers(pfs, tmp_path):
    path = catalogue(tmp_path / "c.fits", [11, 14, 12], [1.0, 4, np.nan])
    with pytest.raises(
        InputError, match=r"c\.fits: HDU STARCATALOG: no velocity for 2 of 4 spectra.* row 1 of .*objId 12;"
    ):
        find_velocities(path, pfs)
    needed = np.array([True, False, False, True])
    np.testing.assert_array_equal(find_velocities(path, pfs, needed).velocity, [1, 0, 0, 4])
    twice = catalogue(tmp_path / "d.fits", [11, 12, 13, 14, 12], [1.0, 2, 3, 4, 5])
    with pytest.raises(
        InputError, match=r"catId 10092, objId 12 occurs more than once \(5 rows, 4 different"
    ):
        find_velocities(twice, pfs)
    other = catalogue(tmp_path / "e.fits", [11, 12, 13, 14], [1.0, 2, 3, 4], cat_id=1)
    with pytest.raises(InputError, match="no velocity for 4 of 4"):
        find_velocities(other, pfs)


def test_stars_of_the_pipeline(pfs, tmp_path):
    for i in range(4):
        write_pfs_one(tmp_path / f"pfsStar-{i}.fits", WAVE, FLUX[0], ERROR[0], obj_id=14 - i, v_los=10.0 * i)
    found = find_velocities(str(tmp_path / "pfsStar-*.fits"), pfs)
    np.testing.assert_array_equal(found.velocity, [30, 20, 10, 0])
    own = open_prepared(tmp_path / "pfsStar-2.fits", Preparation(WAVE, moving=True))
    column = find_velocities("v_los", own)
    assert (column.velocity[0], column.error[0]) == (20, 2)


@pytest.mark.parametrize("table", ["redrock", "rvspecfit"])
def test_desi_tables(table, tmp_path):
    path = write_desi(tmp_path / "x.fits", {"Z": (WAVE, FLUX, ERROR)}, target_id=[5, 6, 5, -7])
    spectra = open_prepared(path, Preparation(WAVE, moving=True))
    ids, velocity = np.array([-7, 5, 6]), np.array([100.0, -30, 7])
    names = {
        "redrock": ("REDSHIFTS", "Z", "ZERR", "ZWARN"),
        "rvspecfit": ("RVTAB", "VRAD", "VRAD_ERR", "RVS_WARN"),
    }[table]
    scale = LIGHT_SPEED if table == "redrock" else 1
    columns = [
        fits.Column("TARGETID", "K", array=ids), fits.Column(names[1], "D", array=velocity / scale),
        fits.Column(names[2], "D", array=np.full(3, 3 / scale)), fits.Column(names[3], "K", array=[0, 4, 0]),
    ]  # fmt: skip
    file = tmp_path / "v.fits"
    fits.HDUList([fits.PrimaryHDU(), fits.BinTableHDU.from_columns(columns, name=names[0])]).writeto(file)
    found = find_velocities(file, spectra)
    np.testing.assert_allclose(found.velocity, [-30, 7, -30, 100])
    np.testing.assert_allclose(found.error, np.full(4, 3.0))
    assert f"1 of 3 velocities carries a warning ({names[3]})" in found.notes[0]
    assert len(found.notes) == 1
    columns[1] = fits.Column(names[1], "D", array=np.array([100.0, 30000, 7]) / scale)
    galaxy = tmp_path / "galaxy.fits"
    fits.HDUList([fits.PrimaryHDU(), fits.BinTableHDU.from_columns(columns, name=names[0])]).writeto(galaxy)
    if table == "redrock":
        assert (
            "2 of 4 spectra recede by 3000 km/s and more: galaxies"
            in find_velocities(galaxy, spectra).notes[1]
        )
    else:
        with pytest.raises(InputError, match="30000 km/s, which no star has"):
            find_velocities(galaxy, spectra)


@pytest.mark.parametrize("suffix", [".csv", ".ecsv"])
def test_tables_of_text(suffix, pfs, tmp_path):
    path = tmp_path / f"v{suffix}"
    Table({"objId": [14, 13, 12, 11], "v_los": [4.0, 3, 2, 1]}).write(path, format=f"ascii.{suffix[1:]}")
    np.testing.assert_array_equal(find_velocities(path, pfs).velocity, [1, 2, 3, 4])


def test_what_is_no_table_of_velocities(pfs, tmp_path):
    with pytest.raises(
        InputError, match=r"--velocity v_sin_i: no such file, and .*spectra\.fits has no such column; it has"
    ):
        find_velocities("v_sin_i", pfs)
    Table({"objId": [1], "RA": [2.0]}).write(tmp_path / "a.csv", format="ascii.csv")
    with pytest.raises(
        InputError, match=r"a\.csv: no column of velocities \(v_los, VRAD, RV, rv\); it has objId, RA"
    ):
        read_velocity_table(tmp_path / "a.csv")
    Table({"name": ["x"], "v_los": [2.0]}).write(tmp_path / "b.csv", format="ascii.csv")
    with pytest.raises(InputError, match="no identifier in common with the spectra; the table has name"):
        find_velocities(tmp_path / "b.csv", pfs)
    (tmp_path / "c.dat").write_text("1 2")
    with pytest.raises(InputError, match=r"c\.dat: unknown kind of table"):
        read_velocity_table(tmp_path / "c.dat")
    with pytest.raises(InputError, match="no table of velocities"):
        read_velocity_table(write_desi(tmp_path / "d.fits", {"Z": (WAVE, FLUX, ERROR)}))
    with pytest.raises(InputError, match="expected a velocity in km/s"):
        find_velocities("nan", pfs)


@pytest.mark.parametrize("name", ["v.ecsv", "v.fits"])
def test_units_of_columns_count(name, pfs, tmp_path):
    velocity, error = np.array([-26.0, 170, 0.5, 46]), np.full(4, 2.0)
    table = Table({"objId": [11, 12, 13, 14], "v_los": 1000 * velocity, "v_los_err": error})
    table["v_los"].unit, table["v_los_err"].unit = "m/s", "km/s"
    table.write(tmp_path / name)
    found = find_velocities(tmp_path / name, pfs)
    np.testing.assert_allclose(found.velocity, velocity)
    np.testing.assert_allclose(found.error, error)
    table["v_los"].unit = "Angstrom"
    table.write(tmp_path / name, overwrite=True)
    with pytest.raises(InputError, match="column v_los: found Angstrom, expected a velocity such as km/s"):
        find_velocities(tmp_path / name, pfs)


@pytest.mark.parametrize("mark", [-9999.0, 1e20, -999.0, 25769842441.0])
@pytest.mark.parametrize("unit", ["km/s", "m/s"])
def test_marks_of_unknown_velocities_are_none(mark, unit, pfs, tmp_path):
    table = Table({"objId": [11, 12, 13, 14], "v_los": [1.0, 2, mark, 4]})
    table["v_los"].unit = unit
    table.write(tmp_path / "v.fits")
    with pytest.raises(InputError, match=r"no velocity for 1 of 4.*objId 13 \(.* which no star has"):
        find_velocities(tmp_path / "v.fits", pfs)
    needed = np.array([True, True, False, True])
    assert find_velocities(tmp_path / "v.fits", pfs, needed).velocity[2] == 0
    with pytest.raises(InputError, match="within 3000"):
        find_velocities(1e4, pfs)
    with pytest.raises(InputError, match="column catId: no velocity for 4 of 4"):
        find_velocities("catId", pfs)


def test_marks_of_unknown_errors_are_none(pfs, tmp_path):
    errors = [2.0, -9999, np.nan, 0]
    Table({"objId": [11, 12, 13, 14], "v_los": np.zeros(4), "v_los_err": errors}).write(tmp_path / "v.fits")
    np.testing.assert_array_equal(find_velocities(tmp_path / "v.fits", pfs).error, [2, np.nan, np.nan, 0])


def test_a_redshift_is_no_velocity_in_km_s(tmp_path):
    path = write_pfs_one(tmp_path / "pfsStar.fits", WAVE, FLUX[0], ERROR[0], obj_id=14, v_los=10.0)
    spectra = open_prepared(path, Preparation(WAVE, moving=True))
    spectra.shards[0].files[0].columns["redshift"] = np.array([1e-4])
    spectra.shards[0].columns += ("redshift",)
    spectra = SpectrumSet(spectra.shards)
    found = find_velocities("redshift", spectra)
    np.testing.assert_allclose(found.velocity, 1e-4 * LIGHT_SPEED)
    assert found.source == "column redshift, times c"


def test_identifiers_that_are_text_on_one_side_are_the_same(pfs, tmp_path):
    table = Table({"catId": ["10092"] * 4, "objId": ["14", "13", " 12", "0011"], "v_los": [4.0, 3, 2, 1]})
    table.write(tmp_path / "v.fits")
    np.testing.assert_array_equal(find_velocities(tmp_path / "v.fits", pfs).velocity, [1, 2, 3, 4])
    np.testing.assert_array_equal(rows_of_targets(tmp_path / "v.fits", pfs), np.ones(4, bool))


# -- selection -----------------------------------------------------------------------------------------------------

TABLE = {
    "targetType": np.array([1, 2, 3, 1]),
    "snr": np.array([5.0, 1, np.nan, 20]),
    "OBJTYPE": np.array(["TGT", "SKY", "", "TGT"]),
}


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("targetType == 1", [0, 3]), ("targetType != 1", [1, 2]), ("targetType==1 and snr>10", [3]),
        ("snr < 10", [0, 1]), ("snr >= 5", [0, 3]), ("snr <= 1e0", [1]), ("OBJTYPE == TGT", [0, 3]),
        ("OBJTYPE == 'SKY'", [1]), ('OBJTYPE == "" and targetType > 2', [2]), ("targetType == -1", []),
    ],
)  # fmt: skip
def test_selections(text, rows):
    got = select(text, lambda names: {name: TABLE[name] for name in names})
    np.testing.assert_array_equal(np.flatnonzero(got), rows)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "targetType",
        "targetType = 1",
        "__import__('os') == 1",
        "a == 1 or b == 2",
        "1 == 1 and",
        "a == b c",
        "f(x) > 1",
    ],
)
def test_what_is_no_selection(text):
    with pytest.raises(InputError, match="is not a comparison such as"):
        parse_selection(text)


def test_a_selection_does_not_compare_numbers_with_text():
    with pytest.raises(InputError, match="OBJTYPE holds text, and is compared with 1"):
        select("OBJTYPE == 1", lambda names: TABLE)
    with pytest.raises(InputError, match=r"targetType holds numbers \(int64\), and is compared with 'TGT'"):
        select("targetType == TGT", lambda names: TABLE)


# -- units ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "unit",
    ["nJy", "Jy", "erg / (s cm2 Hz)", "10**-17 erg/(s cm2 Angstrom)", "W m-2 um-1", "ph / (s cm2 Angstrom)"],
)
def test_flux_units_are_those_of_astropy(unit):
    wave = np.array([7100.0, 8000, 8850])
    wanted = (np.ones(3) * units.Unit(unit)).to(
        "1e-17 erg / (s cm2 Angstrom)", equivalencies=units.spectral_density(wave * units.AA)
    )
    np.testing.assert_allclose(flux_factor(unit, wave, "x"), wanted.value, rtol=1e-12)


def test_units_that_cannot_be_used():
    np.testing.assert_array_equal(flux_factor("", WAVE, "x"), np.ones(60))
    assert wave_factor("nm", "x") == 10
    assert wave_factor(units.um, "x") == 1e4
    for unit in ("electron", "ct", "mag", "erg/s"):
        with pytest.raises(InputError, match="must be flux-calibrated first"):
            flux_factor(unit, WAVE, "file: HDU FLUX")
    with pytest.raises(InputError, match="file: HDU FLUX: 'flux units' is no unit"):
        read_unit("flux units", "file: HDU FLUX")
    with pytest.raises(InputError, match="expected a length"):
        wave_factor("km / s", "x")


def test_air():
    """Ca II 8542.09 Å in air lies at 8544.44 Å in vacuum, Hα 6562.79 at 6564.61."""
    np.testing.assert_allclose(air_to_vacuum(np.array([8542.09, 6562.79])), [8544.44, 6564.60], atol=0.01)


@pytest.mark.parametrize(("name", "head"), [("v.csv", ""), ("v.ecsv", ECSV)])
def test_empty_fields_are_no_velocities(name, head, tmp_path):
    """astropy keeps zeros in them."""
    path, gap = tmp_path / name, '""' if head else ""
    path.write_text(f"{head}objId,v_los\n1,{gap}\n2,5\n3,7\n")
    found = read_velocity_table(path)
    np.testing.assert_array_equal(found.velocity, [np.nan, 5, 7])
    np.testing.assert_array_equal(found.ids["objId"], [1, 2, 3])
    path.write_text(f"{head}objId,v_los\n1,-9\n{gap},5\n3,7\n")
    found = read_velocity_table(path)
    assert not found.ids
    assert found.unusable == ["objId"]


def test_a_table_whose_identifiers_are_not_all_there_is_refused(stars, tmp_path):
    spectra = open_spectra(stars.take(slice(0, 3)).write(tmp_path / "s.h5"))
    path = tmp_path / "v.csv"
    path.write_text("id,TARGETID,v_los\n0,7,1\n1,8,2\n2,9,3\n")
    np.testing.assert_array_equal(find_velocities(path, spectra).velocity, [1, 2, 3])
    path.write_text("id,TARGETID,v_los\n0,7,1\n,8,2\n2,9,3\n")
    with pytest.raises(InputError, match=r"v\.csv: column id has empty fields"):
        find_velocities(path, spectra)
    path.write_text("id,v_los\n0,1\n1,fast\n2,3\n")
    with pytest.raises(InputError, match="v_los must hold a number in each row"):
        find_velocities(path, spectra)


def test_identifiers_of_several_tables_keep_their_digits(stars, tmp_path):
    """Signed and unsigned whole numbers together would become real ones in NumPy, and neighbours the same star."""
    some = stars.take(slice(0, 4))
    ids = np.array([2**63 - 3, 2**63 - 2, 39633345008634465, 39633345008634466], np.int64)
    some.params["id"] = ids
    spectra = open_spectra(some.write(tmp_path / "s.h5"))
    folder = tmp_path / "velocities"
    folder.mkdir()
    for k, kind in enumerate(("i8", "u8")):
        part = slice(2 * k, 2 * k + 2)
        columns = [Column("id", kind), Column("v_los", "f8")]
        with open_table(folder / f"v{k}.parquet", 2, columns) as table:
            table.write(0, {"id": ids[part].astype(kind), "v_los": np.arange(4.0)[part]})
    found = find_velocities(f"{folder}/v*.parquet", spectra)
    np.testing.assert_array_equal(found.velocity, np.arange(4.0))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("lengths", [[5] * 7, [5, 4, 5, 6, 1, 5, 5]])
def test_some_rows_of_what_was_measured(shared, lengths):
    starts = np.concatenate([[0], np.cumsum(lengths)])
    flux = np.arange(starts[-1], dtype=np.float32)
    shared = shared and len(set(lengths)) == 1
    wave = np.arange(5.0) if shared else 7000.0 + flux
    pixels = Pixels(wave, flux, flux + 0.5, flux % 2 > 0, starts, "arm")
    for rows in ([3, 1, 5], [2], list(range(7)), [], [4, 4]):
        some = pixels.take(np.array(rows, int))
        at = np.concatenate([np.arange(starts[r], starts[r + 1]) for r in rows] or [[]]).astype(int)
        for name, expected in (("flux", flux[at]), ("error", flux[at] + 0.5), ("bad", flux[at] % 2 > 0)):
            np.testing.assert_array_equal(getattr(some, name), expected)
        np.testing.assert_array_equal(
            np.resize(some.wave, len(at)), np.tile(wave, len(rows)) if shared else wave[at]
        )
        assert (some.n_rows, some.starts[-1], some.where) == (len(rows), len(at), "arm")
