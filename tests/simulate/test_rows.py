"""Rows, noise and files."""

import math
from dataclasses import replace

import h5py
import numpy as np
import pytest
import scipy.stats

from moefast.core.errors import MoefastError
from moefast.core.random import philox_words, row_uniforms
from moefast.simulate import Emulator, Exposure, Settings, simulate_file, simulate_params, simulate_rows
from moefast.simulate.emulator import LABELS
from moefast.simulate.nuisance import LIGHT_SPEED, calibration_basis, doppler, extinction
from moefast.simulate.rows import CALIBRATION, noise_model


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
    assert not any(block.params[name].any() for name in ("redshift", "velocity", "ebv", *CALIBRATION))


def test_noise_is_gaussian_with_the_stated_error(block):
    z = (block.noisy - block.flux) / block.error
    assert abs(z.mean()) < 4 / math.sqrt(z.size)
    assert abs(z.std() - 1) < 1e-3
    assert abs(np.corrcoef(z[:-1].ravel()[:500000], z[1:].ravel()[:500000])[0, 1]) < 0.01
    assert 4.5 < np.abs(z).max() < 6.9


def test_noise_level_scales_the_error(block):
    doubled = simulate_rows(0, 20, seed=5, settings=Settings(noise_level=2.0))
    np.testing.assert_allclose(doubled.error, 2 * block.error[:20], rtol=1e-6)
    silent = simulate_rows(0, 3, seed=5, settings=Settings(noise_level=0.0))
    np.testing.assert_array_equal(silent.noisy, silent.flux)
    np.testing.assert_array_equal(silent.error, 0)


SWITCHES = {
    "velocity": {"velocity_scatter": 30.0},
    "redshift": {"redshift": (-2e-4, 3e-4)},
    "ebv": {"reddening": (0.0, 0.3)},
    "calibration": {"calibration": 0.03},
}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_nuisance_moves_no_other_number(name):
    plain = simulate_rows(0, 200, seed=5)
    block = simulate_rows(0, 200, seed=5, settings=Settings(**SWITCHES[name]))
    everything = {key: value for change in SWITCHES.values() for key, value in change.items()}
    full = simulate_rows(0, 200, seed=5, settings=Settings(**everything))
    own = CALIBRATION if name == "calibration" else (name,)
    for column, values in block.params.items():
        if column in own:
            assert values.std() > 0
            np.testing.assert_array_equal(values, full.params[column])
        elif column != "snr":
            np.testing.assert_array_equal(values, plain.params[column])
    assert np.abs(block.flux - plain.flux).max() > 1e-3
    # The draws are the same: the noise that was added, in units of its error.
    draws = [((b.noisy - b.flux) / b.error)[:, ::50] for b in (plain, block)]
    np.testing.assert_allclose(*draws, atol=1e-4)


def test_nuisances_have_their_distributions():
    settings = Settings(velocity_scatter=30.0, redshift=(1e-4, 3e-4), reddening=(0.1, 0.3), calibration=0.03)
    params = simulate_params(0, 20000, seed=8, settings=settings)
    assert scipy.stats.kstest(params["velocity"] / 30, "norm").pvalue > 1e-3
    assert scipy.stats.kstest((params["redshift"] - 1e-4) / 2e-4, "uniform").pvalue > 1e-3
    assert scipy.stats.kstest((params["ebv"] - 0.1) / 0.2, "uniform").pvalue > 1e-3
    for name in CALIBRATION:
        assert scipy.stats.kstest(params[name], "norm").pvalue > 1e-3
    columns = np.stack([v for name, v in params.items() if name != "id"])
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlation).max() < 5 / math.sqrt(20000)


def test_nuisances_do_what_they_say():
    settings = Settings(velocity_scatter=30.0, redshift=(1e-4, 1e-4), reddening=(0.0, 0.3), calibration=0.03)
    emulator = Emulator.load()
    block = simulate_rows(40, 90, seed=2, settings=settings)
    labels = np.stack([block.params[name] for name in LABELS], axis=1)
    velocity = LIGHT_SPEED * (1.0001 * (1 + block.params["velocity"] / LIGHT_SPEED) - 1)
    flux = doppler(emulator.padded_flux(labels, first_row=40), velocity)
    seen = flux * 10.0 ** (-0.4 * np.outer(block.params["ebv"], extinction(emulator.wave)))
    bend = 0.03 * np.stack([block.params[name] for name in CALIBRATION], 1) @ calibration_basis(emulator.wave)
    np.testing.assert_allclose(block.flux, seen * (1 + bend), rtol=2e-6)
    # The error is that of the light that arrives, whatever the calibration makes of it.
    error, snr = noise_model(emulator, settings).error(
        seen.astype(np.float32), block.params["mag"], block.params["seeing"]
    )
    np.testing.assert_allclose(block.error, error, rtol=1e-5)
    np.testing.assert_allclose(block.params["snr"], snr, rtol=1e-4)


def test_bits_of_a_row_do_not_depend_on_the_block_with_nuisances():
    settings = Settings(velocity_scatter=30.0, redshift=(0, 1e-4), reddening=(0.0, 0.3), calibration=0.03)
    whole = simulate_rows(0, 300, seed=2, settings=settings)
    for first, stop in ((0, 1), (100, 291), (250, 300), (299, 300)):
        part = simulate_rows(first, stop, seed=2, settings=settings)
        for name in ("flux", "error", "noisy"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[first:stop])
        for name, values in part.params.items():
            np.testing.assert_array_equal(values, whole.params[name][first:stop])


def test_velocities_beyond_the_emulator_are_refused_before_anything_is_made(tmp_path):
    with pytest.raises(MoefastError, match=r"up to 384 km/s .* 32 pixels .* allow 37\d km/s"):
        simulate_rows(0, 0, seed=1, settings=Settings(velocity_scatter=60.0))
    with pytest.raises(MoefastError, match=r"redshift 0 to 0\.01"):
        simulate_file(tmp_path / "x.h5", 5, seed=1, settings=Settings(redshift=(0.0, 0.01)))
    assert not list(tmp_path.iterdir())


def test_settings_survive_json():
    settings = Settings(
        mag=(18.0, 19.5),
        velocity_scatter=30.0,
        calibration=0.03,
        exposure=Exposure(600.0, 4),
        reddening=(0.0, 0.25),
    )
    text = settings.to_json()
    assert Settings.from_json(text) == settings
    assert Settings.from_json(text).to_json() == text
    assert Settings.from_json(Settings().to_json()) == Settings()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (None, "{", "not JSON"),
        (None, "[]", "expected schema 1, found None"),
        (None, '{"schema": 99}', "expected schema 1, found 99"),
        (None, '{"schema": 1}', "expected the entries .*noise_level"),
        ('"mag": [20.5, 22.5]', '"mag": [20.5]', "mag: expected a list of 2"),
        ('"mag": [20.5, 22.5]', '"mag": [20.5, true]', r"mag\[1\]: expected float"),
        ('"count": 12', '"count": "many"', "exposure.count: expected int"),
        ('"noise_level": 1.0', '"noise_level": -1.0', "noise_level"),
        ('"noise_level"', '"noise_levels"', "expected the entries"),
    ],
)
def test_settings_refuse_other_json(old, new, message):
    text = Settings().to_json()
    assert old is None or old in text
    with pytest.raises(MoefastError, match=message):
        Settings.from_json(new if old is None else text.replace(old, new))


def test_shards_hold_the_rows_of_one_file(tmp_path):
    simulate_file(tmp_path / "shard.h5", 9, seed=9, first_row=2046)
    block = simulate_rows(2046, 2055, seed=9)
    with h5py.File(tmp_path / "shard.h5") as file:
        for name in ("flux", "error", "noisy"):
            np.testing.assert_array_equal(file[f"dataset/arrays/{name}/value"][:], getattr(block, name))
        assert file.attrs["first_row"] == 2046
        assert file.attrs["emulator_sha256"] == Emulator.load().sha256
        assert Settings.from_json(file.attrs["settings"]) == Settings()


def test_files_hold_no_time_of_writing(tmp_path):
    simulate_file(tmp_path / "stars.h5", 3, seed=3)
    times = {}

    def note_times(name, item):
        about = h5py.h5o.get_info(item.id)
        times[name] = (about.atime, about.mtime, about.ctime, about.btime)

    with h5py.File(tmp_path / "stars.h5") as file:
        note_times("/", file)
        file.visititems(note_times)
    assert len(times) > 10
    assert {name for name, found in times.items() if any(found)} == set()


def test_blocks_are_written_in_order(tmp_path, monkeypatch):
    simulate_file(tmp_path / "one.h5", 41, seed=3)
    monkeypatch.setattr("moefast.simulate.writing.BLOCK_ROWS", 8)
    done = []
    simulate_file(tmp_path / "many.h5", 41, seed=3, progress=done.append)
    assert done == [8, 16, 24, 32, 40, 41]
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "many.h5").read_bytes()


@pytest.mark.parametrize("settings", [Settings(), Settings(velocity_scatter=30.0)])
def test_flux_goes_where_it_is_wanted(settings):
    out = np.empty((40, 4096), np.float32)
    block = simulate_rows(3, 43, seed=5, settings=settings, out=out)
    assert block.flux is out
    np.testing.assert_array_equal(out, simulate_rows(3, 43, seed=5, settings=settings).flux)
    for refused in (out[1:], out.astype(float), np.empty((4096, 40), np.float32).T):
        with pytest.raises(MoefastError, match="out"):
            simulate_rows(3, 43, seed=5, settings=settings, out=refused)


def test_without_noise_everything_else_is_the_same(block):
    quiet = simulate_rows(0, 100, seed=5, noisy=False)
    assert quiet.noisy is None
    np.testing.assert_array_equal(quiet.flux, block.flux[:100])
    np.testing.assert_array_equal(quiet.error, block.error[:100])


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
        ({"velocity_scatter": -3.0}, "velocity_scatter"),
        ({"calibration": float("inf")}, "calibration"),
        ({"redshift": (0.1, 0.0)}, "redshift"),
        ({"reddening": (0.0, float("nan"))}, "reddening"),
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


def test_some_stars_are_fast():
    """A share of them has another scatter; the text of settings without speaks of none, as it always did."""
    settings = Settings(velocity_scatter=5.0, fast_share=0.3, fast_scatter=40.0)
    fast = simulate_params(0, 20_000, seed=1, settings=settings)["velocity"]
    slow = simulate_params(0, 20_000, seed=1, settings=replace(settings, fast_share=0.0))["velocity"]
    changed = fast != slow
    assert changed.mean() == pytest.approx(0.3, abs=0.015)
    np.testing.assert_allclose(fast[changed], 8 * slow[changed])
    assert settings.largest_velocity > 6 * 40
    assert Settings.from_json(settings.to_json()) == settings
    assert "fast" not in replace(settings, fast_share=0.0, fast_scatter=0.0).to_json()
    with pytest.raises(MoefastError, match="fast_share"):
        Settings(fast_share=1.5)
