"""Visits that differ: each effect is as large as it is said to be, and a star is the same in any block and file."""

import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest
from scipy.special import erf

import moefast
from moefast.core.errors import MoefastError
from moefast.core.random import NOISE_STREAM, standard_normals
from moefast.simulate import Emulator, Settings, SimulatedSpectra, simulate_rows, simulate_set
from moefast.simulate.gaps import Gaps
from moefast.simulate.noise import SKY_GROUPS
from moefast.simulate.rows import noise_model
from moefast.simulate.sets import REFERENCE_SETS, identify
from moefast.simulate.visit import SKY_LINES, SKY_RESIDUALS, VISIT_PARAMS, Visit, broaden
from moefast.spectra import open_spectra
from moefast.spectra.telluric import telluric_pixels

SEED = REFERENCE_SETS["wild"].parts["validation"].seed
WILD = REFERENCE_SETS["wild"].settings
WAVE = Emulator.load().wave
NOTHING = Visit(
    sky_continuum=0.0, sky_lines=0.0, sky_residual=0.0, tilt=0.0, line_spread=0.0, own_median=False,
    gaps=Gaps(telluric=0.0, random=(0.0, 0.0), block=0.0, edges=0.0),
)  # fmt: skip


@pytest.fixture(scope="module")
def block():
    return simulate_rows(0, 400, seed=SEED, settings=WILD)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("wild") / "wild.h5"
    simulate_set(path, "wild", "validation", rows=(20, 60), noisy=True)
    return path


# --- line-spread function ----------------------------------------------------------------------------------


@pytest.mark.parametrize("intrinsic", [0.0, 0.3])
@pytest.mark.parametrize("width", [0.85, 0.9, 1.05, 1.1, 1.15])
def test_lines_become_wider_as_a_wider_instrument_would_make_them(width, intrinsic):
    step = WAVE[1] - WAVE[0]
    edges = np.append(WAVE - step / 2, WAVE[-1] + step / 2)

    def spectrum(factor):
        flux = np.ones(len(WAVE))
        for centre in np.linspace(7150, 8800, 40):
            sigma = np.hypot(centre / 5000 / 2.354820045 * factor, intrinsic)
            flux -= 0.45 * np.diff(erf((edges - centre) / sigma / np.sqrt(2))) / step
        return flux.astype(np.float32)

    found = broaden(spectrum(1.0)[None], np.array([width]), WAVE)[0]
    changed = np.abs(spectrum(width) - spectrum(1.0)).max()
    assert changed > 0.015
    assert np.abs(found - spectrum(width))[8:-8].max() < 0.01 * changed


def test_a_continuum_stays_and_a_width_of_one_changes_nothing():
    flat = np.full((2, len(WAVE)), 0.7, np.float32)
    np.testing.assert_allclose(broaden(flat, np.array([0.9, 1.1]), WAVE), 0.7, atol=2e-6)
    rng = np.random.default_rng(0)
    rough = rng.uniform(0, 1, (1, len(WAVE))).astype(np.float32)
    np.testing.assert_array_equal(broaden(rough, np.array([1.0]), WAVE), rough)


def test_widths_and_shapes_that_do_not_fit_are_refused():
    flat = np.ones((1, len(WAVE)), np.float32)
    with pytest.raises(MoefastError, match=r"expected 0\.85 to 1\.15, found 1\.3"):
        broaden(flat, np.array([1.3]), WAVE)
    with pytest.raises(MoefastError, match=r"shape \(2, 4096\)"):
        broaden(flat, np.array([1.0, 1.0]), WAVE)
    with pytest.raises(MoefastError, match=r"line_spread: expected at most 0\.15"):
        Visit(line_spread=0.3)
    with pytest.raises(MoefastError, match="tilt: expected a number of at least 0"):
        Visit(tilt=-1.0)


# --- one effect at a time ----------------------------------------------------------------------------------


def made(**changes):
    return simulate_rows(0, 40, seed=3, settings=Settings(visit=replace(NOTHING, **changes)))


@pytest.fixture(scope="module")
def plain():
    return simulate_rows(0, 40, seed=3)


def test_visits_that_do_not_differ_are_none(plain):
    same = made()
    np.testing.assert_allclose(same.flux, plain.flux, atol=2e-6)
    np.testing.assert_allclose(same.error, plain.error, rtol=1e-5)
    assert not same.mask.any()
    assert (same.params["median"] == 1).all()


def test_tilt_is_from_end_to_end(plain):
    tilted = made(tilt=0.05)
    ratio = tilted.flux / plain.flux
    np.testing.assert_allclose(ratio[:, -1] - ratio[:, 0], tilted.params["tilt"], rtol=2e-3, atol=2e-5)
    np.testing.assert_allclose(ratio[:, 2048], 1.0, atol=1e-4)
    assert 0.03 < tilted.params["tilt"].std() < 0.07
    np.testing.assert_allclose(tilted.error, plain.error, rtol=1e-5)


def test_sky_residuals_are_shares_of_the_lines_that_errors_do_not_tell(plain):
    left = made(sky_residual=0.01, sky_lines=0.5)
    factors = np.stack([left.params[name] for name in SKY_LINES], axis=1)
    shares = np.stack([left.params[name] for name in SKY_RESIDUALS], axis=1)
    assert 0.008 < shares.std() < 0.012
    noise = noise_model(Emulator.load(), Settings())
    # The star's own electrons per unit flux, from the formula of the noise model.
    scale = noise.electrons_per_flux(plain.params["mag"], plain.params["seeing"])
    per_flux = scale[:, None] * noise.response / (plain.flux @ noise.band_weight)[:, None]
    expected = (shares * factors) @ noise.line_electrons / per_flux
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(left.flux - plain.flux, expected, atol=1e-5, rtol=2e-3)
    dimmer = made(sky_lines=0.5)
    np.testing.assert_array_equal(left.error, dimmer.error)


def test_the_sky_is_in_errors_and_noise_alike(plain):
    sky = made(sky_lines=0.5, sky_continuum=0.3)
    ratio = sky.error / plain.error
    assert np.abs(np.log(np.median(ratio, axis=1))).max() > 0.1
    normal = standard_normals(3, np.arange(40), 4096, stream=NOISE_STREAM)
    np.testing.assert_allclose((sky.noisy - sky.flux) / sky.error, normal, atol=2e-3)
    lines = np.stack([sky.params[name] for name in SKY_LINES], axis=1)
    brightest = np.array(
        [noise_model(Emulator.load(), Settings()).line_electrons[k].argmax() for k in range(len(SKY_GROUPS))]
    )
    assert np.corrcoef(np.log(lines[:, 3]), np.log(ratio[:, brightest[3]]))[0, 1] > 0.95


def test_spectra_are_divided_by_their_own_noisy_median(plain):
    gaps = replace(NOTHING.gaps, telluric=1.0)
    own = made(own_median=True, gaps=gaps)
    left = ~telluric_pixels(WAVE)
    np.testing.assert_allclose(np.median(own.noisy[:, left], axis=1), 1.0, atol=1e-5)
    median = np.median(plain.noisy[:, left], axis=1)
    np.testing.assert_allclose(own.params["median"], median, rtol=1e-4)
    np.testing.assert_allclose(own.error * own.params["median"][:, None], plain.error, rtol=1e-4)


def test_lost_pixels_stand_in_the_mask_alone(block):
    without = simulate_rows(
        0, 400, seed=SEED, settings=replace(WILD, visit=replace(WILD.visit, gaps=NOTHING.gaps))
    )
    assert not without.mask.any()
    scale = (without.params["median"] / block.params["median"])[:, None]
    np.testing.assert_allclose(block.flux, without.flux * scale, rtol=1e-4)
    assert np.isfinite(block.error).all()
    assert (block.error > 0).all()


def test_the_mask_is_what_the_table_says(block):
    for name, pixels in (("telluric", telluric_pixels(WAVE)),):
        told = block.params[f"lost_{name}"] == 1
        np.testing.assert_array_equal(block.mask[:, pixels].all(axis=1), told)
        assert 0.6 < told.mean() < 0.75
    assert block.params["lost_calcium"].max() == 0
    share = block.mask.mean(axis=1)
    nothing_else = (
        block.params["lost_telluric"] + block.params["lost_block"] + block.params["lost_edges"]
    ) == 0
    assert ((share[nothing_else] > 0.002) & (share[nothing_else] < 0.06)).all()


# --- the set -----------------------------------------------------------------------------------------------


def test_rows_are_the_same_in_any_block(block):
    for first, stop in ((0, 1), (250, 281), (399, 400)):
        part = simulate_rows(first, stop, seed=SEED, settings=WILD)
        clean = simulate_rows(first, stop, seed=SEED, settings=WILD, noisy=False)
        for name in ("flux", "error", "noisy", "mask"):
            np.testing.assert_array_equal(getattr(part, name), getattr(block, name)[first:stop])
        np.testing.assert_array_equal(clean.flux, part.flux)
        assert clean.noisy is None
        for name, values in part.params.items():
            np.testing.assert_array_equal(values, block.params[name][first:stop])


def test_noise_is_that_of_the_errors(block):
    normal = (block.noisy - block.flux) / block.error
    assert normal.std() == pytest.approx(1.0, abs=0.005)
    assert abs(normal.mean()) < 0.005


def test_a_file_holds_mask_and_parameters_and_is_recognised(file, block, tmp_path):
    assert identify(file)[:2] == ("wild", "validation")
    spectra = open_spectra(file)
    assert set(spectra.shards[0].arrays) == {"flux", "error", "noisy", "mask"}
    read = next(spectra.blocks(40, params=tuple(VISIT_PARAMS)))
    np.testing.assert_array_equal(read.mask, block.mask[20:60])
    np.testing.assert_array_equal(read.flux, block.noisy[20:60])
    for name in VISIT_PARAMS:
        np.testing.assert_array_equal(read.params[name], block.params[name][20:60])
    for dataset, change in (
        ("dataset/arrays/mask/value", lambda row: 1 - row),
        ("dataset/arrays/noisy/value", lambda row: row * 1.01),
    ):
        shutil.copy(file, tmp_path / "copy.h5")
        with h5py.File(tmp_path / "copy.h5", "r+") as copy:
            copy[dataset][0] = change(copy[dataset][0])
        assert identify(tmp_path / "copy.h5") is None
    with h5py.File(tmp_path / "copy.h5", "r+") as copy:
        table = copy["dataset/params/table"]
        row = table[3]
        row["sky_lines_2"] *= 1.01
        table[3] = row
    assert identify(tmp_path / "copy.h5") is None


def test_settings_travel_as_text():
    assert Settings.from_json(WILD.to_json()) == WILD
    assert "visit" not in Settings().to_json()
    with pytest.raises(MoefastError, match=r"settings\.visit"):
        Settings.from_json(WILD.to_json().replace('"tilt"', '"slant"'))


@pytest.mark.parametrize("array", ["auto", "flux"])
def test_the_generator_reads_like_the_file(file, array):
    source = SimulatedSpectra.of_set("wild", "validation", rows=(20, 60))
    spectra = open_spectra(file)
    assert set(source.arrays) == set(spectra.shards[0].arrays)
    assert source.columns == spectra.columns
    for mine, theirs in zip(
        source.blocks(16, array=array, params=("median", "tilt")),
        spectra.blocks(16, array=array, params=("median", "tilt")),
        strict=True,
    ):
        for name in ("flux", "error", "mask"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
        np.testing.assert_array_equal(mine.params["median"], theirs.params["median"])
    assert source.has_labels()
    assert not source.has_labels(("median",))


def test_a_model_is_fitted_on_wild_stars(tmp_path):
    source = SimulatedSpectra.of_set("wild", rows=(0, 600))
    model = moefast.fit(source, recipe="global-ridge", references=False)
    model.save(tmp_path / "model")
    assert model.manifest["training"]["n_spectra"] == 600
