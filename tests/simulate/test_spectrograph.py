"""A line seen by another spectrograph is the line that an integral over its pixels gives."""

import numpy as np
import pytest
from scipy.special import erf

from moefast.core.errors import MoefastError, WaveGridError
from moefast.kernels.resample import pixel_edges
from moefast.simulate import Emulator
from moefast.simulate.spectrograph import BEYOND, Spectrograph, emulated_fwhm, read_resolution

FWHM_OF_SIGMA = 2.0 * np.sqrt(2.0 * np.log(2.0))


def gaussian(wave, centre, fwhm):
    """Mean over each pixel of a Gaussian line of unit area."""
    edges = pixel_edges(wave)
    inside = 0.5 * np.diff(erf((edges - centre) * FWHM_OF_SIGMA / fwhm / np.sqrt(2)))
    return inside / np.diff(edges)


GRIDS = {
    "R 4000, 0.8 Å": (np.arange(7110, 8840, 0.8), 4000),
    "R 1500, 3 Å": (np.arange(7130, 8800, 3.0), 1500),
    "R 4800, logarithmic": (np.exp(np.arange(np.log(7110), np.log(8830), 1e-4)), 4800),
    "the emulator's resolution, 0.2 Å": (np.arange(7200, 8000, 0.2), 5000),
    "two arms": (np.concatenate([np.arange(7150, 7500, 0.8), np.arange(7600, 8200, 0.6)]), 4500),
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("centre", [7300.13, 7700.4, 7950.77])
def test_a_line_has_the_width_that_was_asked_for(grid, centre):
    wave, power = GRIDS[grid]
    spectrograph = Spectrograph(Emulator.load(), wave, wave / power)
    fine = gaussian(spectrograph.fine_wave, centre, centre / 5000).astype("f4")
    seen = spectrograph.observe(np.stack([fine, np.ones_like(fine)]))
    # Widths of neighbouring pixels differ where arms meet, and no line is there.
    expected = gaussian(wave, centre, centre / power)
    np.testing.assert_allclose(seen[0], expected, atol=5e-4 * gaussian(wave, centre, centre / power).max())
    np.testing.assert_allclose(seen[1], 1, atol=1e-6)
    # The width is also that of the second moment, pixels taken off.
    near = np.abs(wave - centre) < 8 * centre / power
    step = np.gradient(wave)
    area = (seen[0] * step)[near].sum()
    mean = (seen[0] * step * wave)[near].sum() / area
    variance = (seen[0] * step * (wave - mean) ** 2)[near].sum() / area - step[near].mean() ** 2 / 12
    assert FWHM_OF_SIGMA * np.sqrt(variance) == pytest.approx(centre / power, rel=0.01)
    assert mean == pytest.approx(centre, abs=0.01)


def test_its_own_pixels_pass_as_they_are_and_rows_do_not_depend_on_each_other():
    emulator = Emulator.load()
    own = Spectrograph(emulator, emulator.wave)
    fine = np.random.default_rng(1).random((9, len(own.fine_wave)), dtype=np.float32)
    np.testing.assert_array_equal(own.observe(fine), fine[:, BEYOND:-BEYOND])
    other = Spectrograph(emulator, np.arange(7200, 8000, 1.0))
    np.testing.assert_array_equal(other.observe(fine)[4:5], other.observe(fine[4:5]))


def test_what_cannot_be_made_is_refused():
    emulator = Emulator.load()
    with pytest.raises(WaveGridError, match=r"6900.0 to .* the emulator covers 7100.0 to 8850.0"):
        Spectrograph(emulator, np.arange(6900, 8000, 1.0))
    with pytest.raises(WaveGridError, match="at least 100 increasing"):
        Spectrograph(emulator, np.arange(8000, 7200, -1.0))
    wave = np.arange(7200, 8000, 1.0)
    with pytest.raises(MoefastError, match=r"resolving power 6000\).* is asked for; the emulator's is"):
        read_resolution("6000", wave)
    with pytest.raises(MoefastError, match=r"FWHM of 1.5 Å at 7999 Å"):
        read_resolution("1.5 Å", wave)
    for nonsense in ("wide", "2", "-4000", "4000 km/s"):
        with pytest.raises(MoefastError, match="a resolving power such as 4500"):
            read_resolution(nonsense, wave)
    np.testing.assert_allclose(read_resolution("R4000", wave), wave / 4000)
    np.testing.assert_allclose(read_resolution("2.5A", wave), 2.5)
    np.testing.assert_allclose(read_resolution("5000", wave), emulated_fwhm(wave))
