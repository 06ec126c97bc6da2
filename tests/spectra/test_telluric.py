"""Pixels where the Earth's atmosphere absorbs: bad where the light came through it, in the frame of the observer."""

import numpy as np
import pytest
from survey_files import LIGHT_SPEED, write_pfs_many

from moefast.core.errors import InputError
from moefast.spectra.opening import open_prepared
from moefast.spectra.prepared import Preparation
from moefast.spectra.resample import Pixels
from moefast.spectra.telluric import TELLURIC, telluric_pixels, without_telluric, words_of_ranges
from moefast.spectra.writer import SpectrumWriter

WAVE = np.arange(7100.0, 8850.0, 0.8)
N = 4


def absorbed(wave, factor=1.0):
    """The ranges, written out apart from the code, for light whose wavelengths were divided by a factor."""
    ends = [(7150, 7400), (7590, 7715), (8100, 8380)]
    return np.any([(wave * factor >= a) & (wave * factor <= b) for a, b in ends], axis=0)


@pytest.fixture(scope="module")
def flux():
    return 1 + 0.1 * np.sin(np.arange(N)[:, None] + WAVE / 30)


@pytest.fixture(scope="module")
def survey(flux, tmp_path_factory):
    return write_pfs_many(tmp_path_factory.mktemp("pfs") / "a.fits", WAVE, flux, np.full(flux.shape, 0.1))


@pytest.fixture(scope="module")
def simulated(flux, tmp_path_factory):
    path = tmp_path_factory.mktemp("h5") / "a.h5"
    edges = np.append(WAVE - 0.4, WAVE[-1] + 0.4)
    with SpectrumWriter(
        path, n_rows=N, wave=WAVE, wave_edges=edges, arrays=("flux", "error"), params={}
    ) as writer:
        writer.write(0, flux=flux, error=np.full(flux.shape, 0.1))
    return path


def read(path, **options):
    spectra = open_prepared(path, Preparation(WAVE, **options))
    return spectra.shards[0], next(spectra.blocks(N, prefetch=False))


def test_the_ranges():
    np.testing.assert_array_equal(telluric_pixels(WAVE), absorbed(WAVE))
    assert len(TELLURIC) == 3
    assert words_of_ranges() == "7150-7400, 7590-7715, 8100-8380"


def test_spectra_of_surveys_lose_them_and_it_is_told(survey):
    shard, block = read(survey)
    np.testing.assert_array_equal(block.mask, np.repeat(absorbed(WAVE)[None], N, axis=0))
    assert sum("atmosphere absorbs" in note for note in shard.notes) == 1
    assert "--telluric keep" in shard.notes[-1]
    shard, block = read(survey, telluric="keep")
    assert block.mask is None
    assert not any("atmosphere" in note for note in shard.notes)


def test_the_ranges_stay_where_the_observer_is(survey):
    """In the frame of a star that recedes they lie further to the blue."""
    spectra = open_prepared(survey, Preparation(WAVE, moving=True))
    velocity = np.array([0.0, 300.0, -300.0, 50.0])
    spectra.shards[0].set_velocity(velocity)
    block = next(spectra.blocks(N, prefetch=False))
    inside = (WAVE > 7120) & (WAVE < 8800)
    for row, v in enumerate(velocity):
        expected = absorbed(WAVE, 1 + v / LIGHT_SPEED)
        wrong = (block.mask[row] != expected) & inside
        # Pixels that a range ends in.
        assert wrong.sum() <= 6
        assert block.mask[row, inside].sum() == pytest.approx(expected[inside].sum(), abs=6)
    assert (block.mask[1] != block.mask[2])[inside].sum() > 60


def test_the_simulators_files_keep_them(simulated):
    shard, block = read(simulated)
    assert block.mask is None
    assert type(shard).__name__ == "Shard"
    masked, seen = read(simulated, telluric="mask")
    np.testing.assert_array_equal(seen.mask, np.repeat(absorbed(WAVE)[None], N, axis=0))
    assert seen.flux.tobytes() == block.flux.tobytes()
    assert any("atmosphere absorbs" in note for note in masked.notes)


def test_rows_on_one_grid_and_on_one_each():
    two = np.array([[7100.0, 7200.0, 7500.0], [7399.0, 7401.0, 8850.0]])
    ones, good = np.ones((2, 3)), np.zeros((2, 3), bool)
    own = without_telluric(Pixels.of_rows(two, ones, ones, good))
    np.testing.assert_array_equal(own.bad, [False, True, False, True, False, False])
    shared = without_telluric(Pixels.of_rows(two[0], ones, ones, good))
    np.testing.assert_array_equal(shared.bad, [False, True, False] * 2)
    assert not good.any()


def test_other_words_are_refused():
    with pytest.raises(InputError, match="telluric must be one of auto, mask, keep, found 'both'"):
        Preparation(WAVE, telluric="both")
