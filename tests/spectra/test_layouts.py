"""Files of the surveys, generated in their layouts: what comes out is what went in, and what is wrong is named."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from survey_files import BITS, LIGHT_SPEED, write_desi, write_pfs_many, write_pfs_one

from moefast.core.errors import InputError, WaveGridError
from moefast.spectra.layouts.fits_file import FitsFile
from moefast.spectra.layouts.pfs import visit_hash
from moefast.spectra.layouts.registry import known_layouts, open_survey_file
from moefast.spectra.opening import Origins, open_prepared
from moefast.spectra.prepared import Preparation, PreparedShard
from moefast.spectra.quality import good_pixels
from moefast.spectra.shard import Shard

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
WAVE = 8000 + 0.5 * np.arange(200)


def star(wave, i=0):
    """A smooth continuum with a line, different for each i; median near 3 + i."""
    return (3 + i) * (1 - 0.4 * np.exp(-0.5 * ((wave - 8050 - 3 * i) / 1.2) ** 2))


@pytest.fixture
def spectra():
    flux = np.array([star(WAVE, i) for i in range(5)])
    return flux, 0.05 * (1 + np.arange(5))[:, None] * np.ones(200)


def blocks(path, wave=WAVE, **options):
    found = open_prepared(path, Preparation(wave, **options), on_error="raise")
    return found, next(found.blocks(1000, prefetch=False))


def normalised(flux, error):
    scale = np.median(flux, axis=1, keepdims=True)
    return flux / scale, error / scale


# -- what is read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("visits", [1, 4])
def test_pfs_calibrated_and_coadd(visits, spectra, tmp_path):
    path = write_pfs_many(
        tmp_path / "any-name.bin.fits", WAVE, *spectra, visits=visits, target_type=[1, 2, 3, 1, 1]
    )
    found, block = blocks(path)
    flux, error = normalised(*spectra)
    np.testing.assert_allclose(block.flux, flux, rtol=2e-6)
    np.testing.assert_allclose(block.error, error, rtol=2e-6)
    assert block.mask is None
    shard = found.shards[0]
    assert shard.layouts == ("pfsCalibrated" if visits == 1 else "pfsCoadd",)
    params = shard.params(shard.identifiers)
    np.testing.assert_array_equal(params["objId"], 1000 + np.arange(5))
    np.testing.assert_array_equal(params["targetType"], [1, 2, 3, 1, 1])
    np.testing.assert_array_equal(params["fiberId"], 7 + np.arange(5))
    np.testing.assert_array_equal(params["nVisit"], np.full(5, visits))
    assert list(params["patch"]) == ["1,1"] * 5
    assert ("visit" in params) == (visits == 1)


def test_the_hash_of_exposures_is_that_of_the_names_of_given_files(spectra, tmp_path):
    """pfsObject-…-011-0x4a52… is of exposures 123064 to 123074, pfsStar-…-001-0x6054… of the first alone."""
    assert visit_hash(np.arange(123064, 123075)[::-1]) == 0x4A525D3199161F3A
    assert visit_hash(np.array([123064])) == 0x6054AAA5945ECC2D
    path = write_pfs_many(tmp_path / "a.fits", WAVE, *spectra, visits=11)
    np.testing.assert_array_equal(
        open_survey_file(path).columns["pfsVisitHash"], np.full(5, 0x4A525D3199161F3A)
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pfsCalibrated_PFS_123064_test", {"visit": 123064, "nVisit": 1, "pfsVisitHash": 0x6054AAA5945ECC2D}),
        ("pfsCoadd_PFS_test_10092_0_test", {"nVisit": 11, "pfsVisitHash": 0x4A525D3199161F3A}),
        (
            "pfsObject-10092-00001-1,1-0000000600009709-011-0x4a525d3199161f3a",
            {"objId": 0x0000000600009709, "nVisit": 11, "pfsVisitHash": 0x4A525D3199161F3A},
        ),
        (
            "pfsStar-10092-00001-1,1-0000000600009709-001-0x6054aaa5945ecc2d",
            {"objId": 0x0000000600009709, "visit": 123064, "pfsVisitHash": 0x6054AAA5945ECC2D},
        ),
    ],
)
def test_identifiers_of_given_pfs_files_have_the_names_of_the_catalogue(name, expected):
    path = _given("pfs") / f"{name}.fits"
    file = open_survey_file(path)
    for column, value in ({"catId": 10092, "tract": 1, "patch": "1,1", "targetType": 1} | expected).items():
        assert column in file.identifiers
        assert file.columns[column][:1][0] == value
    assert {"ra", "dec", "objId", "fiberId", "nVisit"} <= set(file.identifiers)
    assert ("visit" in file.identifiers) == ("visit" in expected)


def test_rows_of_flux_table_are_matched_by_target(spectra, tmp_path):
    path = write_pfs_many(tmp_path / "a.fits", WAVE, *spectra, order=np.array([3, 0, 4, 2, 1]))
    block = blocks(path)[1]
    np.testing.assert_allclose(block.flux, normalised(*spectra)[0], rtol=2e-6)


def test_images_are_read_where_there_is_no_flux_table(spectra, tmp_path):
    """Variance 0.6, covariances 0.15 and 0.05: together the variance of independent pixels."""
    many = write_pfs_many(tmp_path / "a.fits", WAVE, *spectra, table=False)
    _found, block = blocks(many)
    flux, error = normalised(*spectra)
    np.testing.assert_allclose(block.flux, flux, rtol=2e-6)
    np.testing.assert_allclose(block.error, error, rtol=2e-5)
    one = write_pfs_one(tmp_path / "b.fits", WAVE, spectra[0][2], spectra[1][2], table=False)
    block = blocks(one)[1]
    np.testing.assert_allclose(block.flux[0], flux[2], rtol=2e-6)
    np.testing.assert_allclose(block.error[0], error[2], rtol=2e-5)


@pytest.mark.parametrize(
    ("options", "layout"),
    [({"visits": 1}, "pfsSingle"), ({"visits": 3}, "pfsObject"), ({"visits": 3, "v_los": -26.0}, "pfsStar")],
)
def test_files_of_one_star(options, layout, spectra, tmp_path):
    path = write_pfs_one(tmp_path / "a.fits", WAVE, spectra[0][1], spectra[1][1], **options)
    found, block = blocks(path)
    shard = found.shards[0]
    assert shard.layouts == (layout,)
    np.testing.assert_allclose(block.flux[0], normalised(*spectra)[0][1], rtol=2e-6)
    assert shard.params(["objId"])["objId"][0] == 1000
    if "v_los" in options:
        assert shard.params(["v_los"])["v_los"][0] == -26
        assert "log_g" not in shard.columns


def test_files_of_one_star_are_blocks_of_many_rows(tmp_path):
    for i in range(7):
        write_pfs_one(tmp_path / f"pfsObject-{i}.fits", WAVE, star(WAVE, i), np.full(200, 0.1), obj_id=50 + i)
    found = open_prepared(tmp_path, Preparation(WAVE))
    got = list(found.blocks(4, params=["objId"], prefetch=False))
    assert [len(block.flux) for block in got] == [4, 3]
    np.testing.assert_array_equal(np.concatenate([b.params["objId"] for b in got]), 50 + np.arange(7))
    flux = np.concatenate([block.flux for block in got])
    for i in range(7):
        np.testing.assert_allclose(flux[i], star(WAVE, i) / np.median(star(WAVE, i)), rtol=2e-6)
    origins = Origins(found)
    assert [path.name for path in origins.paths] == [f"pfsObject-{i}.fits" for i in range(7)]
    file, row = origins.of(0, 2, 7)
    np.testing.assert_array_equal(file, [2, 3, 4, 5, 6])
    assert not row.any()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("coadd", [False, True])
def test_desi_arms_are_joined(compressed, coadd, tmp_path):
    """Two arms that overlap: the mean there, weighed by the variances."""
    blue, red = np.arange(8000, 8061, 0.5), np.arange(8040, 8100, 0.5)
    flux = {"R": np.array([star(blue), star(blue, 1)]), "Z": np.array([star(red), star(red, 1)]) + 0.2}
    path = write_desi(
        tmp_path / "x.fits",
        {"R": (blue, flux["R"], np.full((2, len(blue)), 0.1)), "Z": (red, flux["Z"], np.full((2, len(red)), 0.2))},
        coadd=coadd, compressed=compressed, objtype=["TGT", "SKY"],
    )  # fmt: skip
    found, block = blocks(path)
    shard = found.shards[0]
    assert shard.layouts == ("DESI coadd" if coadd else "DESI spectra",)
    np.testing.assert_array_equal(shard.params(["targetType"])["targetType"], [1, 2])
    assert {"TARGETID", "ra", "dec", "fiberId", "OBJTYPE"} <= set(shard.identifiers)
    # Overlap: weights 100 and 25.
    overlap = (WAVE >= 8041) & (WAVE <= 8059)
    scale = block.flux[0][WAVE < 8039] / star(WAVE[WAVE < 8039])
    assert np.ptp(scale) < 1e-5
    np.testing.assert_allclose(block.flux[0][overlap] / scale[0], star(WAVE)[overlap] + 0.2 * 0.2, rtol=1e-5)
    np.testing.assert_allclose(block.error[0][overlap] / scale[0], np.sqrt(1 / 125), rtol=1e-5)


def test_arms_beyond_the_grid_are_left_out_and_change_nothing(spectra, tmp_path):
    """An arm that only a fast star would bring there is read for that star."""
    far = WAVE + 400
    arm = {"Z": (WAVE, *spectra)}
    alone = blocks(write_desi(tmp_path / "a.fits", arm))[1]
    path = write_desi(tmp_path / "b.fits", {"R": (WAVE - 4000, *spectra), **arm})
    both = blocks(path)
    np.testing.assert_array_equal(both[1].flux, alone.flux)
    assert [a.where for a in both[0].shards[0].files[0].read("flux", 0, 2)[0]] == ["HDU Z_FLUX"]
    elsewhere = write_desi(tmp_path / "c.fits", {"R": (WAVE - 4000, *spectra), "Z": (far, *spectra)})
    found, block = blocks(elsewhere)
    assert block.mask.all()
    assert block.mask.shape == (5, 200)
    found.shards[0].set_velocity(np.full(5, LIGHT_SPEED * 400 / 8050))
    assert not next(found.blocks(9, prefetch=False)).mask.all()


def test_a_velocity_is_removed_and_a_star_at_rest_on_the_grid_keeps_its_bits(spectra, tmp_path):
    flux, error = spectra
    velocity = np.array([0.0, 150.0, -300.0, 7.0, 0.0])
    wide = np.arange(7980, 8120, 0.5)
    moved = [star(wide / (1 + v / LIGHT_SPEED), i) for i, v in enumerate(velocity)]
    path = write_pfs_many(tmp_path / "a.fits", wide, moved, [np.full(len(wide), 0.1)] * 5)
    found = open_prepared(path, Preparation(WAVE, moving=True, telluric="keep"))
    found.shards[0].set_velocity(velocity)
    block = next(found.blocks(10, prefetch=False))
    np.testing.assert_allclose(block.flux, normalised(flux, error)[0], atol=0.002)
    rest = write_pfs_many(tmp_path / "b.fits", WAVE, flux, error)
    still = open_prepared(rest, Preparation(WAVE, moving=True))
    still.shards[0].set_velocity(np.zeros(5))
    same = next(still.blocks(10, prefetch=False))
    assert same.flux.tobytes() == blocks(rest)[1].flux.tobytes()


def test_hdf5_on_its_grid_is_read_as_it_is_and_elsewhere_resampled(make_file):
    path, _values = make_file(wave=WAVE, p=200, arrays=("flux", "error", "mask"))
    found = open_prepared(path, Preparation(WAVE))
    assert not isinstance(found.shards[0], PreparedShard)
    still = open_prepared(path, Preparation(WAVE, moving=True))
    still.shards[0].set_velocity(np.zeros(11))
    for a, b in zip(found.blocks(4, prefetch=False), still.blocks(4, prefetch=False), strict=True):
        assert a.flux.tobytes() == b.flux.tobytes()
        assert a.error.tobytes() == b.error.tobytes()
        np.testing.assert_array_equal(a.mask, b.mask)
    other = open_prepared(path, Preparation(WAVE + 20.25))
    assert "resampled" in other.shards[0].notes[0]
    block = next(other.blocks(20, prefetch=False))
    assert block.mask[:, -40:].all()
    with pytest.raises(WaveGridError, match="covers 0% of the model"):
        open_prepared(path, Preparation(WAVE + 500))


def test_wavelengths_that_do_not_reach_the_grid_are_told(tmp_path):
    values = np.ones((2, len(WAVE)))
    said = "do not reach the model's, "
    for name, wave, words in (
        ("nm", WAVE / 10, "wave looks like nanometres: multiply it by 10"), ("b", WAVE - 4000, "another arm"),
    ):  # fmt: skip
        found = open_prepared(write_desi(tmp_path / name, {"Z": (wave, values, values)}), Preparation(WAVE))
        (note,) = [note for note in found.shards[0].notes if said in note]
        assert words in note
    found = open_prepared(write_desi(tmp_path / "z", {"Z": (WAVE, values, values)}), Preparation(WAVE))
    assert not any(said in note for note in found.shards[0].notes)


def test_air_and_vacuum(spectra, tmp_path):
    """In air lines lie 2.2 Å to the blue here; told so, they come out where they are."""
    from moefast.spectra.units import air_to_vacuum

    air = np.arange(7995, 8105, 0.5)
    path = write_pfs_one(tmp_path / "a.fits", air, star(air_to_vacuum(air)), np.full(len(air), 0.1))
    right, wrong = blocks(path, medium="air")[1], blocks(path)[1]
    np.testing.assert_allclose(right.flux[0], star(WAVE) / np.median(star(WAVE)), atol=0.002)
    assert WAVE[wrong.flux[0].argmin()] == pytest.approx(8050 - 2.2, abs=0.3)


# -- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("many", [True, False])
def test_mask_bits_go_by_their_names(many, spectra, tmp_path):
    mask = np.zeros((5, 200), int)
    for pixel, name in enumerate(BITS):
        mask[1, 10 + 5 * pixel] = 1 << BITS[name]
    if many:
        block = blocks(write_pfs_many(tmp_path / "a.fits", WAVE, *spectra, mask=mask))[1]
        assert not block.mask[[0, 2, 3, 4]].any()
        got = block.mask[1]
    else:
        path = write_pfs_one(tmp_path / "a.fits", WAVE, spectra[0][1], spectra[1][1], mask=mask[1])
        got = blocks(path)[1].mask[0]
    # BAD, SAT, CR, NO_DATA; neither FIBERTRACE nor REFLINE.
    np.testing.assert_array_equal(np.flatnonzero(got), [10, 15, 20, 25])


def test_mask_bits_without_a_name(spectra, tmp_path):
    mask = np.zeros((5, 200), int)
    mask[2, 30] = 1 << 20
    found, block = blocks(write_pfs_many(tmp_path / "a.fits", WAVE, *spectra, mask=mask))
    np.testing.assert_array_equal(np.argwhere(block.mask), [[2, 30]])
    assert "mask bits 20 have no name" in found.shards[0].notes[0]
    nameless = write_pfs_many(tmp_path / "b.fits", WAVE, *spectra, mask=mask, bits=False)
    found, block = blocks(nameless)
    np.testing.assert_array_equal(block.mask.all(1), [False, False, True, False, False])
    failure = Origins(found).faults(0, 5)[0]
    assert failure.rows == (2, 3)
    assert "b.fits: row 2: HDU FLUXTABLE: mask bits 20 are set, and no MP_ keyword" in str(failure.error)


def test_desi_pixels_without_information_are_bad(tmp_path):
    flux = np.array([star(WAVE), star(WAVE, 1)])
    ivar, mask = np.full((2, 200), 100.0), np.zeros((2, 200), int)
    ivar[0, 40], ivar[1, 60], mask[0, 80] = 0, -1, 4
    path = write_desi(tmp_path / "x.fits", {"Z": (WAVE, flux, flux)}, ivar={"Z": ivar}, mask={"Z": mask})
    found, block = blocks(path)
    np.testing.assert_array_equal(np.argwhere(block.mask), [[0, 40], [0, 80], [1, 60]])
    # The model's pixels are the file's: it was made for such spectra, and nothing is said of their resolution.
    assert "HDU Z_IVAR: negative from row 1 on" in found.shards[0].notes[0]
    assert not any("line-spread" in note for note in found.shards[0].notes)
    assert any("line-spread" in note for note in blocks(path, WAVE + 0.2)[0].shards[0].notes)


def test_pixels_that_are_not_finite_are_lost(spectra, tmp_path):
    flux, error = (a.copy() for a in spectra)
    flux[0, 50], error[1, 60] = np.nan, np.inf
    wide = WAVE + 0.25
    block = blocks(write_pfs_many(tmp_path / "a.fits", wide, flux, error), WAVE)[1]
    assert {49, 50, 51} & set(np.flatnonzero(block.mask[0])) >= {50}
    assert 60 in np.flatnonzero(block.mask[1])
    assert np.isfinite(block.flux).all()


# -- what is refused -----------------------------------------------------------------------------------------------


def test_without_the_medium_resolution_arm(spectra, tmp_path):
    path = write_pfs_many(tmp_path / "a.fits", WAVE, *spectra, arms="brn")
    with pytest.raises(InputError, match=r"a\.fits: has no medium-resolution red arm \(arms 'brn'"):
        open_survey_file(path)
    one = write_pfs_one(tmp_path / "b.fits", WAVE, spectra[0][0], spectra[1][0], arms="brn")
    with pytest.raises(InputError, match="no medium-resolution red arm"):
        open_survey_file(one)
    mixed = write_pfs_many(tmp_path / "c.fits", WAVE, *spectra, arms=["bmn", "brn", "bmn", "m", "m"])
    found, block = blocks(mixed)
    np.testing.assert_array_equal(block.mask.all(1), [False, True, False, False, False])
    assert "c.fits: row 1: has no medium-resolution red arm" in str(Origins(found).faults(0, 5)[0].error)


def test_wavelengths_that_make_no_sense_cost_their_row(spectra, tmp_path):
    nan, twice = WAVE.copy(), WAVE.copy()
    nan[7], twice[9] = np.nan, twice[8]
    waves = [WAVE, nan, WAVE[::-1].copy(), twice, WAVE]
    found, block = blocks(write_pfs_many(tmp_path / "a.fits", waves, *spectra))
    clean = blocks(write_pfs_many(tmp_path / "b.fits", WAVE, *spectra))[1]
    np.testing.assert_array_equal(block.mask.all(1), [False, True, True, True, False])
    for row in (0, 4):
        assert block.flux[row].tobytes() == clean.flux[row].tobytes()
    texts = [str(failure.error) for failure in Origins(found).faults(0, 5)]
    assert texts[0].endswith("a.fits: row 1: HDU FLUXTABLE: wavelength of pixel 7 is not finite")
    assert texts[1].endswith("row 2: HDU FLUXTABLE: wavelength of pixel 1 is not above the one before it")
    assert texts[2].endswith("row 3: HDU FLUXTABLE: wavelength of pixel 9 is not above the one before it")


def test_rows_that_do_not_fit_cost_their_row(spectra, tmp_path):
    mask = [np.zeros(n, int) for n in (200, 200, 150, 200, 200)]
    path = write_pfs_many(tmp_path / "a.fits", WAVE, *spectra, mask=mask)
    found, block = blocks(path)
    np.testing.assert_array_equal(block.mask.all(1), [False, False, True, False, False])
    text = str(Origins(found).faults(0, 5)[0].error)
    assert text.endswith("row 2: HDU FLUXTABLE: 150 values of mask, 200 wavelengths")
    clean = blocks(write_pfs_many(tmp_path / "b.fits", WAVE, *spectra))[1]
    assert block.flux[4].tobytes() == clean.flux[4].tobytes()


def test_rows_that_vary_in_length_are_read(spectra, tmp_path):
    waves = [WAVE, WAVE[:150], WAVE[20:], WAVE, WAVE[::2]]
    flux = [star(w, i) for i, w in enumerate(waves)]
    error = [np.full(len(w), 0.1) for w in waves]
    block = blocks(write_pfs_many(tmp_path / "a.fits", waves, flux, error))[1]
    np.testing.assert_array_equal(block.mask.sum(1)[:4], [0, 50, 20, 0])
    np.testing.assert_allclose(block.flux[3], star(WAVE, 3) / np.median(star(WAVE, 3)), rtol=2e-6)


def test_one_bad_file_of_many_costs_its_row(tmp_path):
    for i in range(4):
        wave = WAVE.copy()
        if i == 2:
            wave[5] = np.nan
        write_pfs_one(tmp_path / f"{i}.fits", wave, star(WAVE, i), np.full(200, 0.1))
    found = open_prepared(tmp_path, Preparation(WAVE))
    (tmp_path / "1.fits").unlink()
    block = next(found.blocks(10, prefetch=False))
    np.testing.assert_array_equal(block.mask.all(1), [False, True, True, False])
    failures = Origins(found).faults(0, 4)
    assert [failure.path.name for failure in failures] == ["1.fits", "2.fits"]
    assert "wavelength of pixel 5 is not finite" in str(failures[1].error)


def test_damaged_files_are_named(spectra, tmp_path):
    path = write_pfs_many(tmp_path / "a.fits", WAVE, *spectra)
    whole = path.read_bytes()
    cut = tmp_path / "cut.fits"
    for share, match in (
        (0.5, r"cut\.fits: truncated file: HDU \d \(\w+\) ends at byte \d+"),
        (0.1, "truncated file"),
    ):
        cut.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(InputError, match=match):
            open_survey_file(cut)
    cut.write_bytes(b"")
    with pytest.raises(InputError, match="not a FITS file"):
        open_survey_file(cut)
    cut.write_bytes(b"\x1f\x8b" + b"nonsense")
    with pytest.raises(InputError, match=r"cut\.fits: cannot be read as FITS"):
        open_survey_file(cut)
    with pytest.raises(InputError, match=r"none\.fits: cannot be read as FITS: .*No such file"):
        open_survey_file(tmp_path / "none.fits")


@pytest.mark.parametrize(("name", "share"), [("x.fits.gz", 0.6), ("x.fits.fz", 0.6), ("x.fits.fz", 0.97)])
def test_truncated_files_that_are_compressed_are_named(name, share, spectra, tmp_path):
    path = write_desi(tmp_path / "a.fits", {"Z": (WAVE, *spectra)}, compressed=True)
    whole = path.read_bytes()
    whole = gzip.compress(whole) if name.endswith("gz") else whole
    (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match=rf"{name}: (truncated|cannot be read|HDU)"):
        blocks(tmp_path / name)


def test_pixels_with_negative_variances_are_bad_and_told(spectra, tmp_path):
    """COVAR of a pfsObject without FLUX_TABLE; a negative error in FLUXTABLE."""
    one = write_pfs_one(tmp_path / "a.fits", WAVE, spectra[0][0], spectra[1][0], table=False)
    with fits.open(one, mode="update") as file:
        file["COVAR"].data[0, 50] *= -1
    found, block = blocks(one)
    good = good_pixels(block.flux, block.error, block.mask)
    assert good is not None
    np.testing.assert_array_equal(np.argwhere(~good), [[0, 50]])
    assert any("negative variances" in note for note in found.shards[0].notes)
    error = spectra[1].copy()
    error[3, 70] *= -1
    block = blocks(write_pfs_many(tmp_path / "c.fits", WAVE, spectra[0], error))[1]
    good = good_pixels(block.flux, block.error, block.mask)
    assert good is not None
    np.testing.assert_array_equal(np.argwhere(~good), [[3, 70]])


def test_a_missing_hdu_is_named(spectra, tmp_path):
    path = write_desi(tmp_path / "a.fits", {"Z": (WAVE, *spectra)})
    with fits.open(path) as file:
        del file["Z_IVAR"]
        file.writeto(tmp_path / "b.fits")
    with pytest.raises(
        InputError, match=r"b\.fits: HDU Z_IVAR is missing; found PRIMARY, FIBERMAP, Z_WAVELENGTH"
    ):
        open_survey_file(tmp_path / "b.fits")
    images = write_pfs_many(tmp_path / "c.fits", WAVE, *spectra, table=False)
    with fits.open(images) as file:
        del file["COVAR"]
        file.writeto(tmp_path / "d.fits")
    with pytest.raises(InputError, match="HDU COVAR is missing"):
        blocks(tmp_path / "d.fits")


def test_empty_files_and_unknown_ones(tmp_path):
    empty = write_desi(tmp_path / "a.fits", {"Z": (WAVE, np.empty((0, 200)), np.empty((0, 200)))})
    with pytest.raises(InputError, match=r"a\.fits: no spectra in this file"):
        open_survey_file(empty)
    nothing = write_pfs_many(tmp_path / "b.fits", WAVE, np.empty((0, 200)), np.empty((0, 200)))
    with pytest.raises(InputError, match="HDU TARGET has no rows"):
        open_survey_file(nothing)
    image = tmp_path / "c.fits"
    fits.PrimaryHDU(np.ones((4, 4))).writeto(image)
    with pytest.raises(InputError, match=r"c\.fits: no known layout of spectra: it has HDUs PRIMARY"):
        open_survey_file(image)


def test_a_unit_that_is_no_flux_density(spectra, tmp_path):
    path = write_pfs_one(tmp_path / "a.fits", WAVE, spectra[0][0], spectra[1][0])
    for unit, match in (
        ("electron/nm", "electron / nm.*must be flux-calibrated"),
        ("sausages", "no unit that astropy"),
    ):
        with fits.open(path) as file:
            file["FLUX_TABLE"].header["TUNIT2"] = unit
            file.writeto(tmp_path / "b.fits", overwrite=True, output_verify="ignore")
        with pytest.raises(InputError, match=match):
            blocks(tmp_path / "b.fits")


def test_gzipped_and_tile_compressed_files(spectra, tmp_path):
    flux = normalised(*spectra)[0]
    path = write_pfs_many(tmp_path / "a.fits", WAVE, *spectra)
    with open(path, "rb") as source, gzip.open(tmp_path / "b.fits.gz", "wb") as target:
        shutil.copyfileobj(source, target)
    np.testing.assert_allclose(blocks(tmp_path / "b.fits.gz")[1].flux, flux, rtol=2e-6)
    desi = write_desi(tmp_path / "c.fits", {"Z": (WAVE, *spectra)})
    with fits.open(desi) as file:
        hdus = [fits.PrimaryHDU(), file["FIBERMAP"].copy()]
        for name in ("Z_WAVELENGTH", "Z_FLUX", "Z_IVAR", "Z_MASK"):
            packed = fits.CompImageHDU(
                file[name].data, name=name, compression_type="GZIP_2", quantize_level=0
            )
            hdus.append(packed)
        fits.HDUList(hdus).writeto(tmp_path / "d.fits.fz")
    np.testing.assert_allclose(blocks(tmp_path / "d.fits.fz")[1].flux, flux, rtol=2e-6)


def test_a_folder_that_mixes_layouts(spectra, tmp_path, make_file):
    write_pfs_many(tmp_path / "a.fits", WAVE, *spectra)
    write_desi(tmp_path / "b.fits", {"Z": (WAVE, *spectra)})
    make_file("c.h5", wave=WAVE, p=200)
    fits.PrimaryHDU(np.ones((4, 4))).writeto(tmp_path / "d.fits")
    (tmp_path / "notes.txt").write_text("not a spectrum")
    found = open_prepared(tmp_path, Preparation(WAVE), on_error="skip")
    assert [shard.n_rows for shard in found.shards] == [5, 5, 11]
    assert [failure.path.name for failure in found.failures] == ["d.fits"]
    assert len(list(found.blocks(100, prefetch=False))) == 3


def test_columns_are_read_when_rows_of_them_are_asked_for(spectra, tmp_path, make_file, monkeypatch):
    """Tables of a million rows do not fit into memory."""
    n = 5000
    flux = np.ones((n, 8), "f4")
    path = write_desi(tmp_path / "many.fits", {"Z": (WAVE[:8], flux, flux)})
    asked, read = [], FitsFile._bytes
    monkeypatch.setattr(FitsFile, "_bytes", lambda *given: asked.append(given[2]) or read(*given))
    found = PreparedShard([open_survey_file(path)], Preparation(WAVE[:8]))
    whole = found.files[0].columns["TARGETID"].n_rows * 40
    assert {"targetType", "ra", "OBJTYPE"} <= set(found.columns)
    values = found.params(["TARGETID", "ra", "targetType"], 4000, 4010)
    np.testing.assert_array_equal(values["TARGETID"], 39633345008634465 + np.arange(4000, 4010))
    np.testing.assert_array_equal(values["targetType"], np.ones(10))
    assert max(asked) < whole / 10
    path = tmp_path / "c.h5"
    make_file("c.h5", wave=WAVE + 0.2, p=200)
    params = Shard.params
    rows = []
    monkeypatch.setattr(
        Shard,
        "params",
        lambda self, names, start, stop: rows.append(stop - start) or params(self, names, start, stop),
    )
    resampled = open_prepared(path, Preparation(WAVE)).shards[0]
    assert not rows
    assert len(resampled.params(["log_g"], 3, 5)["log_g"]) == 2
    assert rows == [2]


# -- the reader of FITS --------------------------------------------------------------------------------------------


def test_our_reader_reads_what_astropy_wrote(tmp_path):
    rng = np.random.default_rng(0)
    columns = [
        fits.Column("i2", "I", array=rng.integers(-9, 9, 4)),
        fits.Column("u2", "I", bzero=1 << 15, array=np.arange(4, dtype="u2")),
        fits.Column("i8", "K", array=rng.integers(-9, 9, 4)), fits.Column("f4", "E", array=rng.random(4)),
        fits.Column("f8", "D", array=rng.random(4)), fits.Column("text", "5A", array=["ab", "", "c d", "12345"]),
        fits.Column("yes", "L", array=[True, False, True, True]), fits.Column("pair", "2D", array=rng.random((4, 2))),
        fits.Column("byte", "B", array=np.arange(4, dtype="u1")),
    ]  # fmt: skip
    table = fits.BinTableHDU.from_columns(columns, name="some")
    table.header["HIERARCH a long keyword"] = 3
    table.header["QUOTE"] = "it's / here"
    image = rng.integers(0, 1 << 31, (6, 5)).astype("u4")
    fits.HDUList([fits.PrimaryHDU(), table, fits.ImageHDU(image, name="im")]).writeto(tmp_path / "x.fits")
    file = FitsFile(tmp_path / "x.fits")
    assert file["SOME"].header["A LONG KEYWORD"] == 3
    assert file["SOME"].header["QUOTE"] == "it's / here"
    got = file.table(file["SOME"], None, 1, 4)
    with fits.open(tmp_path / "x.fits") as theirs:
        for column in columns:
            want = np.asarray(theirs["SOME"].data[column.name])[1:4]
            np.testing.assert_array_equal(got[column.name], want)
            assert got[column.name].dtype.isnative
    np.testing.assert_array_equal(file.image(file["IM"], 2, 5), image[2:5])
    with pytest.raises(InputError, match="HDU SOME has no column 'x'; it has i2"):
        file.table(file["SOME"], ["x"])


@pytest.mark.parametrize("name", ["REDSHIFTS", "RVTAB"])
def test_a_table_of_velocities_among_the_spectra_is_told_where_it_belongs(name, tmp_path):
    table = fits.BinTableHDU.from_columns(
        [fits.Column("TARGETID", "K", array=[1]), fits.Column("Z", "D", array=[0.0])]
    )
    table.name = name
    path = tmp_path / "redrock.fits"
    fits.HDUList([fits.PrimaryHDU(), table]).writeto(path)
    with pytest.raises(
        InputError, match=r"redrock\.fits: a table of velocities .* name this table with --velocity"
    ):
        open_survey_file(path)


def test_every_layout_is_registered():
    names = ", ".join(known_layouts())
    for name in (
        "pfsCalibrated",
        "pfsCoadd",
        "pfsSingle",
        "pfsObject",
        "pfsStar",
        "pfsMerged",
        "DESI coadd",
        "DESI spectra",
        "redrock",
    ):
        assert name in names


# -- files that the surveys' own code wrote ------------------------------------------------------------------------


def _given(folder):
    if not (SHARED / folder).is_dir():
        pytest.skip(f"the files of the surveys are not in {SHARED}")
    return SHARED / folder


def test_given_pfs_files_hold_the_same_stars():
    folder = _given("pfs")
    wave = np.linspace(7100.2, 8849.8, 4096)
    found = open_prepared(folder, Preparation(wave), on_error="skip")
    layouts = [layout for shard in found.shards for layout in shard.layouts]
    assert layouts == ["pfsCalibrated", "pfsCoadd", "pfsObject", "pfsSingle", "pfsStar"]
    assert sorted(failure.path.name[:10] for failure in found.failures) == ["pfsMerged-", "pfsStarCat"]
    rows = np.concatenate([block.flux for block in found.blocks(10, prefetch=False)])
    np.testing.assert_array_equal(rows[:4], rows[4:8])
    for row in rows[8:]:
        np.testing.assert_array_equal(row, rows[0])


def test_given_desi_files_agree_with_astropy():
    path = _given("desi") / "coadd-4-80613-thru20210324.fits"
    shard = PreparedShard([open_survey_file(path)], Preparation(np.arange(7700, 9700, 0.8)))
    with fits.open(path) as file:
        wave, flux, ivar = (file[f"Z_{name}"].data for name in ("WAVELENGTH", "FLUX", "IVAR"))
        target = file["FIBERMAP"].data["TARGETID"][0]
    assert shard.params(["TARGETID"])["TARGETID"][0] == target
    grid = wave[300:2800].astype(float)
    own = PreparedShard([open_survey_file(path)], Preparation(grid, telluric="keep"))
    got, error = own.read("flux", 0, 1)[0], own.read("error", 0, 1)[0]
    scale = np.median(flux[0, 300:2800])
    np.testing.assert_allclose(got, flux[0, 300:2800] / scale, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(error, ivar[0, 300:2800] ** -0.5 / scale, rtol=1e-4)


# -- damaged headers ---------------------------------------------------------------------------------------------------


def two_arms(path, spectra):
    left, right = slice(0, 120), slice(80, None)
    return write_desi(
        path, {arm: (WAVE[part], *(array[:, part] for array in spectra)) for arm, part in (("R", left), ("Z", right))}
    )  # fmt: skip


@pytest.mark.parametrize("name", ["Z_FLUX", "Z_WAVELENGTH", "R_IVAR", "R_MASK", "R_FLUX"])
def test_an_arm_without_a_part_is_not_left_out(name, spectra, tmp_path):
    path = two_arms(tmp_path / "a.fits", spectra)
    assert blocks(path)[1].flux.shape == (5, 200)
    content = path.read_bytes()
    path.write_bytes(content.replace(f"EXTNAME = '{name}".encode(), f"EXTNAME = '{name[:-1]}_".encode()))
    with pytest.raises(InputError, match=f"HDU {name} is missing"):
        open_survey_file(path)


@pytest.mark.parametrize("hdu", range(2, 10))
def test_a_file_does_not_end_where_an_hdu_is_damaged(hdu, spectra, tmp_path):
    path = two_arms(tmp_path / "a.fits", spectra)
    content = bytearray(path.read_bytes())
    with fits.open(path) as file:
        at = file[hdu - 1]._data_offset + -(-file[hdu - 1]._data_size // 2880) * 2880
    assert content[at : at + 8] == b"XTENSION"
    content[at] ^= 4
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.fits: HDU {hdu} is damaged.*XTENSION"):
        FitsFile(path)


def test_what_fills_a_file_up_is_no_hdu(spectra, tmp_path):
    path = two_arms(tmp_path / "a.fits", spectra)
    path.write_bytes(path.read_bytes() + bytes(5760))
    assert len(FitsFile(path).hdus) == 10


@pytest.mark.parametrize("card", [b'NAXIS   = "                  2', b"NAXIS2  =                  five"])
def test_headers_that_make_no_sense_are_an_error(card, spectra, tmp_path):
    path = two_arms(tmp_path / "a.fits", spectra)
    content = bytearray(path.read_bytes())
    at = content.rindex(card[:10])
    content[at : at + 30] = card.ljust(30)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.fits: "):
        open_survey_file(path)


@pytest.mark.parametrize("lost", [1, 400])
def test_a_file_that_ends_in_what_fills_an_hdu_up_is_truncated(lost, spectra, tmp_path):
    """The second arm was cut off, and the first one is whole: half of the pixels would be taken for all."""
    path = two_arms(tmp_path / "a.fits", spectra)
    with fits.open(path) as file:
        end = file["R_MASK"]._data_offset + -(-file["R_MASK"]._data_size // 2880) * 2880
        assert file["R_MASK"]._data_size % 2880 < 2880 - lost
    path.write_bytes(path.read_bytes()[: end - lost])
    with pytest.raises(InputError, match=r"a\.fits: truncated file: \d+ bytes, .* blocks of 2880"):
        open_survey_file(path)
