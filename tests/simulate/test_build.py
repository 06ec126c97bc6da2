"""Parts of the synthesis with known answers; nothing here needs the model atmospheres."""

import numpy as np
import pytest

pytest.importorskip("moefast.simulate.build.elements", reason="the build package is not in this installation")

from moefast.simulate.build import chemistry, elements, instrument, lines, molecules
from moefast.simulate.build.continuum import continuum


def test_line_table_is_complete_and_sourced():
    table = lines.read_lines()
    assert 1000 < len(table.wave) < 3000
    triplet = (np.abs(table.wave - 8544.44) < 0.02) & (table.log_gf > -1)
    assert triplet.sum() == 1
    assert table.log_gf[triplet][0] == pytest.approx(-0.362)


def test_air_to_vacuum():
    assert lines.air_to_vacuum(np.array([8542.091]))[0] == pytest.approx(8544.438, abs=0.005)


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


def test_band_heads():
    heads = {"TiO gamma": 7089.0, "TiO epsilon": 8444.0, "CN red": 7874.0}  # vacuum, the strongest or bluest
    for system in molecules.SYSTEMS:
        if system.name not in heads:
            continue
        table = molecules.band_lines(system, 7000.0, 8900.0)
        assert np.abs(table[:, 0] - heads[system.name]).min() < 3.0
        q = molecules.franck_condon(system)
        np.testing.assert_allclose(q[:, :3].sum(axis=0), 1.0, atol=2e-3)


def test_line_spread_function_has_the_stated_width():
    from moefast.simulate.build.synthesis import wavelength_grid

    wave = wavelength_grid()
    line = np.exp(-0.5 * ((wave - 8000.0) / 0.02) ** 2)
    pixels = instrument.observe(wave, 1.0 - 0.5 * line)
    depth = 1.0 - pixels
    centre = 0.5 * (instrument.WAVE_EDGES[1:] + instrument.WAVE_EDGES[:-1])
    mean = np.sum(centre * depth) / depth.sum()
    width = np.sqrt(np.sum((centre - mean) ** 2 * depth) / depth.sum())
    assert mean == pytest.approx(8000.0, abs=0.02)
    assert width == pytest.approx(8000.0 / 5000.0 / 2.3548, rel=0.03)
