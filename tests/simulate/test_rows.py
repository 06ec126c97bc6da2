"""Rows, noise and files."""

import math
from pathlib import Path

import h5py
import numpy as np
import pytest

from moefast.errors import MoefastError
from moefast.simulate import Emulator, Exposure, Settings, simulate_file, simulate_rows
from moefast.simulate.noise import Instrument, NoiseModel, Sky, oh_lines
from moefast.simulate.streams import philox_words, row_uniforms

ETC = Path(__file__).resolve().parents[3] / "shared" / "data" / "pfs_mr_etc.txt"
PUBLISHED_SNR = [3.71, 5.29, 8.21, 12.53, 17.22]


@pytest.fixture(scope="module")
def block():
    return simulate_rows(0, 3000, seed=5)


def test_philox_known_answers():
    # Random123 distribution, kat_vectors, philox4x32 10 rounds.
    assert [int(w) for w in philox_words(0, 0, 0, 0, 0, 0)] == [
        0x6627E8D5,
        0xE169C58D,
        0xBC57AC4C,
        0x9B00DBD8,
    ]
    ones = 0xFFFFFFFF
    assert [int(w) for w in philox_words(ones, ones, ones, ones, ones, ones)] == [
        0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD,
    ]  # fmt: skip


def test_uniforms_are_uniform_and_uncorrelated():
    u = row_uniforms(0, 20000, 7, seed=3)
    assert u.min() > 0
    assert u.max() < 1
    assert np.abs(u.mean(axis=0) - 0.5).max() < 4 / math.sqrt(12 * 20000)
    correlation = np.corrcoef(u.T) - np.eye(7)
    assert np.abs(correlation).max() < 0.03


def test_rows_are_the_same_in_any_block(block):
    for first, stop in ((0, 1), (700, 731), (2999, 3000)):
        part = simulate_rows(first, stop, seed=5)
        for name in ("flux", "error", "noisy"):
            np.testing.assert_array_equal(getattr(part, name), getattr(block, name)[first:stop])
        for name, values in part.params.items():
            np.testing.assert_array_equal(values, block.params[name][first:stop])
    assert simulate_rows(4, 4, seed=5).flux.shape == (0, 4096)
    far = simulate_rows(2**33, 2**33 + 1, seed=5)
    assert not np.array_equal(far.noisy[0], block.noisy[0])


def test_seeds_differ(block):
    other = simulate_rows(0, 5, seed=6)
    assert not np.isclose(other.params["T_eff"], block.params["T_eff"][:5]).any()


def test_labels_fill_their_ranges(block):
    settings = Settings()
    names = ("T_eff", "log_g", "M_H", "a_M", "C_M", "mag")
    for name, (low, high) in zip(names, (*settings.label_ranges, settings.mag), strict=True):
        unit = (block.params[name] - low) / (high - low)
        assert unit.min() >= 0
        assert unit.max() <= 1
        np.testing.assert_allclose(np.quantile(unit, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.04)
    assert np.all((block.params["seeing"] >= 0.5) & (block.params["seeing"] <= 1.5))
    assert abs(np.median(block.params["seeing"]) - 0.75) < 0.02
    np.testing.assert_array_equal(block.params["id"], np.arange(3000))
    assert not block.params["redshift"].any()


def test_noise_is_gaussian_with_the_stated_error(block):
    z = (block.noisy - block.flux) / block.error
    assert abs(z.mean()) < 4 / math.sqrt(z.size)
    assert abs(z.std() - 1) < 1e-3
    assert abs(np.corrcoef(z[:-1].ravel()[:500000], z[1:].ravel()[:500000])[0, 1]) < 0.01
    assert 4.5 < np.abs(z).max() < 6.9


def test_signal_to_noise_is_the_published_one(block):
    np.testing.assert_allclose(
        np.percentile(block.params["snr"], [5, 25, 50, 75, 95]), PUBLISHED_SNR, rtol=0.1
    )
    np.testing.assert_allclose(block.params["snr"], np.median(block.flux / block.error, axis=1), rtol=1e-5)
    snr_norm = np.linalg.norm(block.flux, axis=1) / np.linalg.norm(block.error, axis=1)
    assert 2.6 < np.median(snr_norm) < 3.2
    assert 0.6 < snr_norm.min() < 1.4
    assert 8 < snr_norm.max() < 11


def test_noise_level_scales_the_error(block):
    doubled = simulate_rows(0, 20, seed=5, settings=Settings(noise_level=2.0))
    np.testing.assert_allclose(doubled.error, 2 * block.error[:20], rtol=1e-6)
    silent = simulate_rows(0, 3, seed=5, settings=Settings(noise_level=0.0))
    np.testing.assert_array_equal(silent.noisy, silent.flux)
    np.testing.assert_array_equal(silent.error, 0)


def test_bright_stars_have_photon_noise():
    emulator = Emulator.load()
    model = NoiseModel(emulator.wave_edges, sky=Sky(residual=0.0))
    flux = emulator.flux(np.array([[5000.0, 3.0, -1.0, 0.0, 0.0]]))
    _, snr = model.error(np.repeat(flux, 2, 0), np.array([12.0, 13.0]), np.array([0.8, 0.8]))
    assert snr[0] / snr[1] == pytest.approx(10**0.2, rel=0.01)
    longer = NoiseModel(emulator.wave_edges, sky=Sky(residual=0.0), exposure=Exposure(900.0, 48))
    assert longer.error(flux, np.array([22.0]), np.array([0.8]))[1] == pytest.approx(
        2 * model.error(flux, np.array([22.0]), np.array([0.8]))[1], rel=1e-3
    )


def test_fibre_takes_less_in_bad_seeing():
    fraction = Instrument().fibre_fraction(np.array([0.01, 0.5, 0.75, 1.5]))
    assert np.all(np.diff(fraction) < 0)
    assert fraction[0] > 0.999


def test_oh_lines_are_where_they_are_observed():
    wave, intensity = oh_lines()
    air = wave / 1.0002745
    # Osterbrock et al. (1996, PASP 108, 277), Å in air; the P1(2) lines are anchors, these are not.
    for observed in (
        7276.405,
        7340.885,
        7750.640,
        7821.503,
        7913.708,
        7993.332,
        8344.602,
        8430.174,
        8827.096,
    ):
        assert np.abs(air - observed).min() < 0.3
    assert intensity.min() >= 0


def test_sky_and_detector_resemble_the_exposure_time_calculator():
    if not ETC.exists():
        pytest.skip("the exposure time calculator's output is not in shared/data")
    wave, variance = np.loadtxt(ETC, usecols=(2, 5)).T
    emulator = Emulator.load()
    # One exposure of 1200 s; the file's 1 % residual is coherent over its three exposures.
    model = NoiseModel(
        emulator.wave_edges, sky=Sky(residual=0.01 * math.sqrt(3.0)), exposure=Exposure(1200.0, 1)
    )
    # The file's wavelengths lie 5.5 Å above vacuum wavelengths of the OH lines.
    theirs = np.interp(emulator.wave, wave * 10.0 - 5.5, np.log(variance))
    ours = np.log(model.sky_variance)
    assert np.corrcoef(theirs, ours)[0, 1] > 0.75
    ratio = np.percentile(model.sky_variance, [10, 50, 90]) / np.percentile(variance, [10, 50, 90])
    assert np.all((ratio > 0.6) & (ratio < 1.7))


def test_file_round_trip(tmp_path):
    path = tmp_path / "survey.h5"
    done = []
    simulate_file(path, 7, seed=9, progress=done.append)
    block = simulate_rows(0, 7, seed=9)
    with h5py.File(path) as file:
        for name in ("flux", "error", "noisy"):
            np.testing.assert_array_equal(file[f"dataset/arrays/{name}/value"][:], getattr(block, name))
        np.testing.assert_array_equal(file["spectrumdataset/wave_edges"][:], Emulator.load().wave_edges)
        assert file.attrs["seed"] == "9"
    pandas = pytest.importorskip("pandas")
    table = pandas.read_hdf(path, "dataset/params")
    for name, values in block.params.items():
        np.testing.assert_array_equal(table[name], values)
    assert done == [7]
    with pytest.raises(MoefastError):
        simulate_file(path, 7, seed=9)
    simulate_file(path, 3, seed=9, noisy=False, overwrite=True)
    with h5py.File(path) as file:
        assert "noisy" not in file["dataset/arrays"]
        assert file["dataset/arrays/flux/value"].shape == (3, 4096)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mag": (22.0, 20.0)}, "mag"),
        ({"seeing": (0.0, 1.0)}, "seeing"),
        ({"noise_level": -1.0}, "noise_level"),
        ({"log_g": (1.0, float("nan"))}, "log_g"),
    ],
)
def test_settings_refuse_nonsense(change, message):
    with pytest.raises(MoefastError, match=message):
        Settings(**change)


def test_arguments_are_checked(tmp_path):
    with pytest.raises(MoefastError, match="rows"):
        simulate_rows(3, 2, seed=1)
    with pytest.raises(MoefastError, match="seed"):
        simulate_rows(0, 2, seed=-1)
    with pytest.raises(MoefastError, match="n_rows"):
        simulate_file(tmp_path / "x.h5", 0, seed=1)
    with pytest.raises(MoefastError, match="exposure"):
        Exposure(0.0, 1)
    with pytest.raises(MoefastError, match="T_eff"):
        simulate_rows(0, 2, seed=1, settings=Settings(t_eff=(7000.0, 8000.0)))
