"""Line features of spectra whose lines are known."""

import numpy as np
import pytest
from tolerances import assert_close

from moefast.core.line_features import LEAST_CONTINUUM, LINE_FEATURES, LINES, line_columns
from moefast.kernels.reference import line_features

WAVE = np.linspace(7100.2, 8849.8, 4096)


def measured(flux, wave=WAVE, dtype=np.float64):
    columns = line_columns(wave)
    found = line_features(
        (np.atleast_2d(flux) @ columns).astype(dtype), columns[:, 1::3].sum(0), LEAST_CONTINUUM
    )
    return {name: found[:, i] for i, name in enumerate(LINE_FEATURES)}


def test_a_flat_spectrum_has_no_lines():
    found = measured(np.array([[0.3], [1.0], [7.0]]) * np.ones(WAVE.size))
    for name in LINE_FEATURES:
        assert_close(found[name] + 1, np.ones(3))


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.name)
@pytest.mark.parametrize("slope", [0.0, 2e-4, -2e-4])
def test_a_gaussian_line_on_a_sloped_continuum_is_measured(line, slope):
    depth, sigma = 0.5, 0.8
    continuum = 1.2 * (1 + slope * (WAVE - line.centre))
    profile = depth * np.exp(-0.5 * ((WAVE - line.centre) / sigma) ** 2)
    width = depth * sigma * np.sqrt(2 * np.pi)
    # All of the line lies inside its window and none in the sidebands.
    assert min(line.centre - line.window[0], line.window[1] - line.centre) > 3.5 * sigma
    found = measured(continuum * (1 - profile))

    def slope_error(this):
        # The continuum is that at the line's centre: a window around another centre sees the slope.
        low, high = this.window
        return abs(slope * (high - low) * ((low + high) / 2 - this.centre)) + 0.002

    assert found[f"{line.name}_EW"][0] == pytest.approx(width, abs=slope_error(line))
    inner = np.abs(WAVE - line.centre) < 1.5
    assert found[f"{line.name}_depth"][0] == pytest.approx(profile[inner].mean(), abs=0.005)
    for other in LINES:
        if other is not line:
            assert abs(found[f"{other.name}_EW"][0]) < 1.2 * slope_error(other)
    expected = width if line.name.startswith("Ca") else 0.0
    triplet = [other for other in LINES if other.name.startswith("Ca")]
    assert found["CaT_EW"][0] == pytest.approx(expected, abs=1.2 * sum(map(slope_error, triplet)))


def test_the_triplet_is_the_sum_of_its_lines():
    flux = 1 + 0.1 * np.random.default_rng(0).standard_normal((5, WAVE.size))
    found = measured(flux)
    total = sum(found[f"CaII_{name}_EW"] for name in ("8498", "8542", "8662"))
    assert_close(found["CaT_EW"], total)


def test_features_do_not_depend_on_the_scale_of_the_flux():
    flux = 1 + 0.1 * np.random.default_rng(1).standard_normal((5, WAVE.size))
    once, thrice = measured(flux), measured(3 * flux)
    for name in LINE_FEATURES:
        assert_close(once[name], thrice[name])


@pytest.mark.parametrize("level", [0.0, 1e-6, -2.0])
def test_a_low_continuum_stays_finite(level):
    flux = np.full(WAVE.size, level)
    found = measured(flux)
    widths = line_columns(WAVE)[:, 1::3].sum(0)
    for i, line in enumerate(LINES):
        assert_close(found[f"{line.name}_depth"], [1 - level / LEAST_CONTINUUM])
        assert_close(found[f"{line.name}_EW"], [widths[i] * (1 - level / LEAST_CONTINUUM)])


def test_the_precision_is_that_of_the_input():
    columns = line_columns(WAVE)
    projected = (np.ones((2, WAVE.size)) @ columns).astype(np.float32)
    assert line_features(projected, columns[:, 1::3].sum(0), LEAST_CONTINUUM).dtype == np.float32
    assert line_features(projected[:0], columns[:, 1::3].sum(0), LEAST_CONTINUUM).shape == (
        0,
        len(LINE_FEATURES),
    )


@pytest.mark.parametrize(("low", "high"), [(7100, 8100), (8300, 8850), (8100, 8690), (3800, 6500)])
def test_a_grid_without_the_lines_is_refused(low, high):
    with pytest.raises(ValueError, match=f"the wave grid covers {low}.0-{high}.0 Å"):
        line_columns(np.linspace(low, high, 2000))


def test_a_grid_too_coarse_for_a_core_is_refused():
    with pytest.raises(ValueError, match="no pixel in"):
        line_columns(np.arange(7100.0, 8850.0, 12.0))
