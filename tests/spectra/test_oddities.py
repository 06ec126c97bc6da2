"""The look at a file as a whole: silent on good spectra of any kind, and a line for each thing that is odd."""

import re
import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest

from moefast.simulate import simulate_rows
from moefast.simulate.gaps import GAPS
from moefast.simulate.sets import REFERENCE_SETS
from moefast.spectra.oddities import find_oddities, noisy_already
from moefast.spectra.prepared import prepare_rows
from moefast.spectra.resample import Pixels
from moefast.spectra.sampling import SampledRows, take_sample
from moefast.spectra.spectrum_set import open_spectra
from moefast.spectra.units import LIGHT_SPEED
from moefast.spectra.writer import SpectrumWriter

N = 128


@pytest.fixture(scope="module")
def wave():
    from moefast.simulate import Emulator

    return Emulator.load().wave


@pytest.fixture(scope="module")
def reference():
    """A typical spectrum, of stars that are in no sample."""
    return simulate_rows(0, 500, seed=77, noisy=False).flux.mean(0)


@pytest.fixture(scope="module")
def z0():
    return simulate_rows(0, N, seed=5)


def names(odd):
    return [one.name for one in odd]


def seen(wave, reference, flux, error, mask=None, *, free_scale=False, resampled=False):
    sample = SampledRows.of(wave, flux, error, mask, resampled=resampled)
    return names(find_oddities(sample, reference, free_scale=free_scale))


@pytest.mark.parametrize("name", REFERENCE_SETS)
@pytest.mark.parametrize(("n", "seeds"), [(1, 10), (7, 10), (40, 5), (256, 2)])
def test_silent_on_the_reference_sets(name, n, seeds, wave, reference):
    for seed in range(seeds):
        block = simulate_rows(0, n, seed=1000 + seed, settings=REFERENCE_SETS[name].settings)
        assert seen(wave, reference, block.noisy, block.error, block.mask) == [], seed


@pytest.mark.parametrize("gap", GAPS)
def test_silent_on_gaps(gap, wave, reference, z0):
    # A mask that leaves little of the spectrum is asked after.
    said = ["mask"] if gap == "Ca II alone" else []
    assert seen(wave, reference, z0.noisy, z0.error, GAPS[gap](wave, np.arange(N), 3)) == said


def test_silent_on_reddening_and_calibration(wave, reference):
    """All stars behind E(B-V) = 0.3, 5 % of calibration each, and a tilt of 5 % that they share."""
    settings = replace(REFERENCE_SETS["z0"].settings, reddening=(0.3, 0.3), calibration=0.05)
    tilt = 1 + 0.05 * np.linspace(-0.5, 0.5, len(wave))
    for seed in range(3):
        block = simulate_rows(0, N, seed=seed, settings=settings)
        for change in (tilt, 1 / tilt):
            assert seen(wave, reference, block.noisy * change, block.error * change) == []


@pytest.mark.parametrize("noise_level", [0.02, 0.1, 0.5, 3.0])
def test_silent_on_bright_and_faint_stars(noise_level, wave, reference):
    """Up to SNR 700, where lines are as sharp as the noise."""
    settings = replace(REFERENCE_SETS["z0"].settings, noise_level=noise_level)
    block = simulate_rows(0, 64, seed=6, settings=settings)
    assert seen(wave, reference, block.noisy, block.error) == []


@pytest.mark.parametrize("velocity", [4.0, 8.0, 100.0])
def test_silent_on_resampled_spectra(velocity, wave, reference, z0):
    arm = Pixels.of_rows(wave, z0.noisy, z0.error, np.zeros(z0.noisy.shape, bool))
    flux, error, mask, _ = prepare_rows([arm], np.full(N, 1 + velocity / LIGHT_SPEED), wave, scale=False)
    moved = ["shift"] if velocity > 50 else []
    assert seen(wave, reference, flux, error, mask, resampled=True) == moved
    coarse = Pixels.of_rows(
        wave[::2], z0.noisy[:, ::2], z0.error[:, ::2], np.zeros((N, len(wave[::2])), bool)
    )
    finer = prepare_rows([coarse], np.ones(N), wave, scale=False)[:3]
    assert seen(wave, reference, *finer, resampled=True) == []
    # It smooths so much that it would be odd in pixels that were not rebinned.
    assert seen(wave, reference, flux, error, mask) == ["errors too large", *moved]


def spoilt(wave, block):
    """Each oddity, and how it is made."""
    nu = (wave / 8000) ** 2
    u = np.linspace(-1, 1, len(wave))
    continuum = np.array([np.polyval(np.polyfit(u[::8], f[::8], 3), u) for f in block.flux])
    # As an observer fits it: to the noisy spectrum, sky lines and all.
    fitted = np.array([np.polyval(np.polyfit(u, f, 3), u) for f in block.noisy])
    bend = (1 + 0.4 * u**2) / 1.1
    dead, twin = block.noisy.copy(), block.noisy.copy()
    dead[3], dead[9], twin[17] = 0, 0.7, twin[4]
    x, e = block.noisy, block.error
    return {
        "slope": [(x * nu, e * nu), (x / nu, e / nu)],
        "bend": [(x * bend, e * bend), (x / bend, e / bend)],
        "continuum": [(x / continuum, e / continuum), (x / fitted, e / fitted)],
        "dead": [(dead, e)],
        "identical": [(twin, e)],
        "noise-free": [(block.flux, e)],
        "errors too large": [(x, 2 * e), (x, 1.4 * e)],
        "errors too small": [(x, 0.5 * e), (x, 0.7 * e)],
        "level": [(0.95 * x, 0.95 * e), (1.05 * x, 1.05 * e), (1e-17 * x, 1e-17 * e)],
    }


def test_every_oddity_is_told_and_nothing_else(wave, reference, z0):
    for name, cases in spoilt(wave, z0).items():
        for flux, error in cases:
            assert seen(wave, reference, flux, error) == [name]


def test_errors_of_one_value(wave, reference, z0):
    flat = np.repeat(np.median(z0.error, axis=1)[:, None], len(wave), axis=1)
    flux = z0.flux + flat * np.random.default_rng(1).standard_normal(flat.shape)
    assert seen(wave, reference, flux, flat) == ["one error"]
    # Of a few stars alone it is no matter of the file.
    few = z0.error.copy()
    few[:20] = flat[:20]
    noisy = np.where(np.arange(N)[:, None] < 20, flux, z0.noisy)
    assert seen(wave, reference, noisy, few) == []


def test_the_scale_of_posteriors_is_free(wave, reference, z0):
    for scale in (0.95, 1e-5, 1e5):
        assert seen(wave, reference, scale * z0.noisy, scale * z0.error, free_scale=True) == []


def test_lines_that_lie_elsewhere_are_told_as_what_they_are(wave, reference, z0):
    def words_of(factor, n=N, at_rest=True):
        arm = Pixels.of_rows(wave, z0.noisy[:n], z0.error[:n], np.zeros((n, len(wave)), bool))
        flux, error, mask, _ = prepare_rows([arm], np.full(n, factor), wave, scale=False)
        sample = SampledRows.of(wave, flux, error, mask, resampled=True)
        return [one.words for one in find_oddities(sample, reference, at_rest=at_rest)]

    # Lines at their places in air, read as vacuum.
    (air,) = words_of(1 + 82.4 / LIGHT_SPEED)
    assert re.match(r"lines lie -8[0-6] km/s from .*--wave-medium air", air)
    (fast,) = words_of(1 - 250 / LIGHT_SPEED)
    assert re.match(r"lines lie \+2[45]\d km/s from ", fast)
    assert "air" not in fast
    # Velocities that will be fitted are no matter; those of few stars are their own.
    assert words_of(1 - 250 / LIGHT_SPEED, at_rest=False) == []
    assert words_of(1 + 82.4 / LIGHT_SPEED, n=5) == []
    assert len(words_of(1 + 82.4 / LIGHT_SPEED, n=30)) == 1


def test_a_mask_that_means_good_pixels(wave, reference, z0):
    good = GAPS["telluric"](wave, np.arange(N), 3) == 0
    assert seen(wave, reference, z0.noisy, z0.error, ~good) == []
    assert seen(wave, reference, z0.noisy, z0.error, good) == ["mask"]
    # Pixels without numbers are rightly masked.
    assert seen(wave, reference, np.where(good, np.nan, z0.noisy), z0.error, good) == []


def test_gaps_count_for_models_that_take_spectra_to_be_whole(wave, reference, z0):
    def named(gap, with_gaps):
        sample = SampledRows.of(wave, z0.noisy, z0.error, GAPS[gap](wave, np.arange(N), 3))
        return names(find_oddities(sample, reference, with_gaps=with_gaps))

    assert named("telluric", False) == ["gaps"]
    assert named("telluric", True) == []
    assert named("random", False) == []


def test_numbers_that_are_no_numbers_of_flux_here(wave, reference, z0):
    for scale in (1e8, 1e12, 1e-24):
        flux, error = z0.noisy * np.float32(scale), z0.error * np.float32(scale)
        assert seen(wave, reference, flux, error, free_scale=True)[0] == "scale", scale
    # Errors that mark bad pixels are none of a large unit.
    marked = z0.error.copy()
    marked[:, ::5] = 1e10
    assert seen(wave, reference, z0.noisy, marked, free_scale=True) == []


def test_one_star_says_nothing_of_its_unit_and_twenty_do(wave, reference, z0):
    nu = (wave / 8000) ** 2
    assert seen(wave, reference, (z0.noisy * nu)[:1], (z0.error * nu)[:1]) == []
    assert seen(wave, reference, (z0.noisy * nu)[:20], (z0.error * nu)[:20]) == ["slope"]


def test_spectra_without_data_are_left_to_the_flags(wave, reference, z0):
    nothing = np.full((5, len(wave)), np.nan, np.float32)
    assert seen(wave, reference, nothing, nothing) == []
    assert seen(wave, reference, z0.noisy[:0], z0.error[:0]) == []
    assert names(
        find_oddities(SampledRows.of(wave, np.zeros((4, len(wave))), np.ones((4, len(wave)))), reference)
    ) == ["dead"]


def test_rows_are_named(wave, reference, z0):
    dead = z0.noisy.copy()
    dead[[3, 9]] = 0
    sample = SampledRows.of(wave, dead, z0.error, rows=1000 + np.arange(N))
    assert "rows 1003, 1009" in find_oddities(sample, reference)[0].words


def test_flux_that_is_noisy_already(wave, z0):
    assert names(noisy_already(SampledRows.of(wave, z0.noisy, z0.error), "use --noise none")) == [
        "noisy already"
    ]
    assert (
        "use --noise none"
        in noisy_already(SampledRows.of(wave, z0.noisy, z0.error), "use --noise none")[0].words
    )
    for level in (0.02, 0.1, 1.0):
        clean = SampledRows.of(wave, z0.flux, level * z0.error)
        assert noisy_already(clean, "") == [], level


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """1000 rows of 60 pixels, flux = number of the row."""
    path = tmp_path_factory.mktemp("oddities") / "a.h5"
    wave = np.linspace(7100, 8850, 60)
    with SpectrumWriter(
        path,
        n_rows=1000,
        wave=wave,
        wave_edges=np.linspace(7085, 8865, 61),
        arrays=("flux", "error"),
        params={},
    ) as writer:
        rows = np.repeat(np.arange(1000.0, dtype=np.float32)[:, None], 60, axis=1)
        writer.write(0, flux=rows, error=np.ones_like(rows))
    return path


def test_a_sample_is_spread_over_the_rows_that_are_wanted(file, tmp_path):
    sample = take_sample(open_spectra(file))
    assert len(sample.rows) == 256
    assert sample.rows.min() < 20
    assert sample.rows.max() > 980
    np.testing.assert_array_equal(sample.flux[:, 0], sample.rows)
    assert len(np.unique(sample.rows)) == 256
    part = take_sample(open_spectra(file), rows=(400, 450))
    np.testing.assert_array_equal(part.rows, np.arange(400, 450))
    wanted = np.zeros(1000, bool)
    wanted[[5, 300, 301, 999]] = True
    np.testing.assert_array_equal(take_sample(open_spectra(file), wanted=wanted).rows, [5, 300, 301, 999])
    other = shutil.copy(file, tmp_path / "b.h5")
    several = take_sample(open_spectra([file, other]))
    np.testing.assert_array_equal(several.flux[:, 0], several.rows % 1000)
    assert (several.rows < 1000).any()
    assert (several.rows >= 1000).any()


def test_rows_that_cannot_be_read_are_left_out(file, monkeypatch):
    from moefast.core.errors import InputError

    spectra = open_spectra(file)
    read = spectra.shards[0].read

    def broken(array, start, stop):
        if start < 500:
            raise InputError("damaged")
        return read(array, start, stop)

    monkeypatch.setattr(spectra.shards[0], "read", broken)
    sample = take_sample(spectra)
    assert sample.rows.min() >= 500
    assert not spectra.failures


def test_the_file_is_not_touched(file):
    before = file.read_bytes()
    take_sample(open_spectra(file))
    assert file.read_bytes() == before
    with h5py.File(file) as opened:
        assert opened["dataset/arrays/flux/value"].shape == (1000, 60)
