"""The frozen grid: names, order, clamping, coverage, and its JSON form."""

import dataclasses
import json

import numpy as np
import pytest

from moefast.core.errors import InputError, LabelError, ModelError
from moefast.protocol import bins


def test_frozen_constants():
    assert bins.PHYSICAL_GRID.t_eff_edges == (3750.0, 4500.0, 5250.0, 6000.0)
    assert bins.PHYSICAL_GRID.m_h_edges == (-2.0, -1.0, 0.0, 0.5)
    assert bins.PHYSICAL_GRID.n_bins == 9
    assert bins.SNR_NORM_EDGES == (2.0, 4.0, 7.0)
    assert len(bins.SNR_NORM_NAMES) == len(bins.SNR_NORM_EDGES) + 1


def test_names_follow_the_bin_order():
    grid = bins.PHYSICAL_GRID
    assert grid.names[0] == "cool-poor"
    assert grid.names[2] == "cool-rich"
    assert grid.names[8] == "hot-rich"
    assert grid.names[grid.assign([5500.0], [-1.5])[0]] == "hot-poor"


def test_outside_stars_are_clamped_and_not_covered():
    grid = bins.PHYSICAL_GRID
    t_eff = np.array([3000.0, 3750.0, 6000.0, 6001.0, 5000.0, 5000.0])
    m_h = np.array([-1.5, -2.0, 0.5, 0.2, -2.01, 0.75])
    np.testing.assert_array_equal(grid.assign(t_eff, m_h), [0, 0, 8, 8, 3, 5])
    np.testing.assert_array_equal(grid.covered(t_eff, m_h), [False, True, True, False, False, False])


def test_uniform_labels_leave_the_stated_share_outside():
    m_h = np.linspace(-2.5, 0.75, 3251)
    covered = bins.PHYSICAL_GRID.covered(np.full(m_h.size, 5000.0), m_h)
    assert covered.mean() == pytest.approx(2.5 / 3.25, abs=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_labels_that_are_not_finite(bad):
    with pytest.raises(LabelError, match="row 1"):
        bins.PHYSICAL_GRID.assign([5000.0, bad], [0.0, 0.0])
    assert bins.PHYSICAL_GRID.covered([5000.0, bad], [0.0, 0.0]).tolist() == [True, False]


def test_uniform_grid():
    grid = bins.uniform(7, 7)
    assert grid.n_bins == 49
    assert len(set(grid.names)) == 49
    assert grid.t_eff_edges[0] == 3750.0
    assert grid.t_eff_edges[-1] == 6000.0
    assert grid.m_h_edges[-1] == 0.5
    assert grid.names[0] == "3750-4071K/-2.00..-1.64"
    assert set(grid.assign(*np.random.default_rng(0).uniform([3750, -2], [6000, 0.5], (9999, 2)).T)) == set(
        range(49)
    )
    with pytest.raises(ValueError, match="0 × 3"):
        bins.uniform(0, 3)


def test_grid_survives_json_and_is_a_value():
    grid = bins.uniform(7, 5)
    again = bins.Grid.from_dict(json.loads(json.dumps(grid.to_dict())))
    assert again == grid
    assert hash(again) == hash(grid)
    with pytest.raises(dataclasses.FrozenInstanceError):
        grid.t_eff_edges = (1.0, 2.0)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"t_eff_edges": [1, 2]},
        {"t_eff_edges": [2, 1], "m_h_edges": [0, 1]},
        {"t_eff_edges": 3, "m_h_edges": 4},
    ],
)
def test_broken_grid_dicts_are_model_errors(data):
    with pytest.raises(ModelError, match="expected a grid"):
        bins.Grid.from_dict(data)


@pytest.mark.parametrize("edges", [(1.0,), (1.0, 1.0), (0.0, np.inf)])
def test_unusable_edges(edges):
    with pytest.raises(ValueError, match="m_h_edges"):
        bins.Grid(m_h_edges=edges)


def test_too_many_bins():
    with pytest.raises(ValueError, match="at most 32767"):
        bins.uniform(200, 200)


def test_snr_bins():
    names = [bins.SNR_NORM_NAMES[k] for k in bins.assign_snr_bins([1.0, 2.0, 2.5, 4.0, 6.9, 7.0, 7.5])]
    assert "".join(names) == "XXLLMMH"
    with pytest.raises(InputError, match="row 0"):
        bins.assign_snr_bins([np.nan])


def test_a_grid_of_snr_norm_is_read_back_and_assigns_what_its_edges_say():
    grid = bins.SnrGrid()
    assert (grid.n_bins, grid.names) == (4, bins.SNR_NORM_NAMES)
    snr_norm = np.array([1, 2, 3, 7.5])
    np.testing.assert_array_equal(grid.assign(snr_norm), bins.assign_snr_bins(snr_norm))
    for one in (grid, bins.SnrGrid((1, 2, 3)), bins.PHYSICAL_GRID):
        assert bins.read_grid(one.to_dict()) == one


@pytest.mark.parametrize("edges", [(1.0, 2.0), (1.0, 2.0, 2.0), (1.0, 2.0, np.inf)])
def test_unusable_edges_of_snr_norm(edges):
    with pytest.raises(ValueError, match="3 finite, increasing edges"):
        bins.SnrGrid(edges)


@pytest.mark.parametrize("data", [{}, [], {"snr_norm_edges": [1, 2]}, {"snr_norm_edges": 4}])
def test_broken_dicts_of_either_grid_are_model_errors(data):
    with pytest.raises(ModelError, match="expected a grid"):
        bins.read_grid(data)


def test_metal_poor_bins_are_those_that_end_at_the_limit_or_below():
    assert bins.PHYSICAL_GRID.metal_poor.tolist() == [True, False, False] * 3
    found = bins.Grid((3750, 5000, 6000), (-2, -1.5, -0.9)).metal_poor
    assert found.tolist() == [True, False] * 2
