"""Parts of the synthesis with known answers; nothing here needs the model atmospheres."""

import math

import numpy as np
import pytest

pytest.importorskip("moefast.simulate.build.elements", reason="the build package is not in this installation")

from moefast.simulate.build import chemistry, elements, instrument, lines, molecules, synthesis
from moefast.simulate.build.continuum import continuum


def test_line_table_is_complete_and_sourced():
    table = lines.read_lines()
    assert 3000 < len(table.wave) < 4000
    assert table.wave.min() < instrument.WAVE_EDGES[0]
    assert table.wave.max() > instrument.WAVE_EDGES[-1]
    triplet = (np.abs(table.wave - 8544.44) < 0.02) & (table.log_gf > -1)
    assert triplet.sum() == 1
    assert table.log_gf[triplet][0] == pytest.approx(-0.362)


def test_air_to_vacuum():
    vacuum = lines.air_to_vacuum(np.array([8542.091]))[0]
    assert vacuum == pytest.approx(8544.438, abs=0.005)
    assert lines.vacuum_to_air(vacuum) == pytest.approx(8542.091, abs=1e-6)


def test_broadening_of_calcium_is_the_published_cross_section():
    """291 a_0^2 at 10 km/s, exponent 0.275 (Barklem & O'Mara 1998): full width per H atom at 10 000 K."""
    sigma, alpha = 291 * 2.80028e-17, 0.275
    reduced = 1.66054e-24 / (1 / 1.008 + 1 / 40.078)
    v = math.sqrt(8 * 1.380649e-16 * 1e4 / math.pi / reduced)
    width = (
        2 * (4 / math.pi) ** (alpha / 2) * math.gamma(2 - alpha / 2) * 1e6 * sigma * (v / 1e6) ** (1 - alpha)
    )
    table = lines.read_lines()
    for wave in (8500.36, 8544.44, 8664.52):
        found = table.log_vdw[np.abs(table.wave - wave) < 0.02]
        assert found[0] == pytest.approx(math.log10(width), abs=0.01)


def test_broadening_without_a_table_lies_near_the_tables():
    table = lines.read_lines()
    for (species, wave), log_vdw in lines.MEASURED_VDW.items():
        name, stage = species.split()
        if stage == "I":
            near = np.abs(lines.air_to_vacuum(np.array(wave)) - table.wave) < 0.02
            line = np.flatnonzero(near & (table.element == elements.INDEX[name]))[0]
            assert table.log_vdw[line] == log_vdw
            estimate = lines.unsold_vdw(elements.INDEX[name], 0, table.e_low[line], wave)
            assert estimate == pytest.approx(log_vdw, abs=0.2)


def test_partition_functions():
    u = elements.partition_functions(np.array([5040.0]))[0]
    assert u[elements.INDEX["H"], 0] == pytest.approx(2.0, rel=0.01)
    assert u[elements.INDEX["Fe"], 0] == pytest.approx(27.9, rel=0.02)


def test_equation_of_state_of_the_solar_photosphere():
    per_h = elements.abundances(0.0, 0.0, 0.0)
    # Near optical depth one: T 6400 K, P_gas 1.2e5; electron pressure there is about 50 (Gray 2005, table 9.2).
    temperature, pressure = np.array([6400.0]), np.array([1.2e5])
    state, saha = chemistry.new_state(1, len(per_h))
    u = elements.partition_functions(temperature)
    chemistry.equation_of_state(
        temperature, pressure, np.log(np.array([10.0])), per_h, u, elements.IONISATION_EV, state, saha
    )
    assert state[0, 0] * 1.380649e-16 * 6400.0 == pytest.approx(55.0, rel=0.25)
    # Charge is conserved.
    electrons = state[0, 2] * saha[0, 0] / state[0, 0] + np.sum(
        state[0, 1] * per_h[1:] * saha[0, 1:] / (state[0, 0] + saha[0, 1:])
    )
    assert electrons == pytest.approx(state[0, 0], rel=1e-6)


def test_h_minus_opacity_peaks_near_8500():
    opacity = [continuum(wave, 5040.0, 1e13, 1e17, 0.0) for wave in (6000.0, 8500.0, 12000.0)]
    assert opacity[1] > opacity[0]
    assert opacity[1] > opacity[2]


@pytest.mark.parametrize("system", molecules.SYSTEMS, ids=lambda system: system.name)
def test_band_strengths_add_up(system):
    """Sum over v' of f / nu is the mean square moment of the lower level: its vibration is complete in the grid."""
    n = 24
    f = molecules.oscillator_strengths(system, n)[:, 0]
    v = np.arange(n)
    energy = (system.upper.vibration(v) - system.lower.vibration(0)) / 219474.63
    r = np.arange(0.8, 3.0, 0.012)
    ground = molecules._morse_states(system.lower, system.reduced_mass, r, 1)[:, 0]
    assert (ground**2).sum() == pytest.approx(1.0)
    expected = 4.0 / 3.0 * ((ground * system.moment(r)) ** 2).sum()
    assert (f / energy).sum() == pytest.approx(expected, rel=2e-3)


def test_lines_beyond_the_grid_reach_it_with_their_wings():
    """A strong line 2 Å outside the synthesis darkens its edge as much as one 2 Å from an inner wavelength."""
    n_depths = 50
    temperature, state = np.full(n_depths, 5000.0), np.tile([1e13, 1e17, 1e17, 0.0, 0.0, 0.0], (n_depths, 1))
    per_h = elements.abundances(0.0, 0.0, 0.0)
    u = elements.partition_functions(temperature)
    saha = np.full((n_depths, len(per_h)), 1e13)
    wave = 8000.0 * np.exp(np.arange(600) / synthesis.STEPS_PER_E_FOLD)
    results = []
    for centre in (wave[0] - 2.0, wave[-1] + 2.0, wave[300]):
        opacity = np.zeros((len(wave), n_depths))
        line = np.array([[centre, 1.7, 0.5, 2e-8, 1e8]])
        synthesis._add_atomic_lines(
            wave, synthesis.STEPS_PER_E_FOLD, line, np.array([elements.INDEX["Ca"]]), np.array([1]), elements.MASSES,
            per_h, u, saha, temperature, state, np.full(n_depths, 1e8), 1e5, opacity,
        )  # fmt: skip
        results.append(opacity[:, 0])
    inside = np.interp(wave[300] + 2.0, wave, results[2])
    assert inside > 1e-3
    np.testing.assert_allclose(results[0][0], inside, rtol=0.01)
    np.testing.assert_allclose(results[1][-1], inside, rtol=0.01)


def test_line_spread_function_has_the_stated_width():
    from moefast.simulate.build.synthesis import wavelength_grid

    wave = wavelength_grid()
    line = np.exp(-0.5 * ((wave - 8000.0) / 0.02) ** 2)
    pixels = instrument.observe(wave, 1.0 - 0.5 * line)
    depth = 1.0 - pixels
    assert pixels.shape == (4096 + 2 * instrument.MARGIN,)
    assert np.median(pixels[instrument.DETECTOR]) == 1.0
    centre = 0.5 * (instrument.WAVE_EDGES[1:] + instrument.WAVE_EDGES[:-1])
    mean = np.sum(centre * depth) / depth.sum()
    width = np.sqrt(np.sum((centre - mean) ** 2 * depth) / depth.sum())
    assert mean == pytest.approx(8000.0, abs=0.02)
    assert width == pytest.approx(8000.0 / 5000.0 / 2.3548, rel=0.03)
