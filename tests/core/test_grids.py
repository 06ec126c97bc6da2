"""The frozen grid: names, order, clamping, coverage, and its JSON form."""

import dataclasses
import json

import numpy as np
import pytest

from moefast.core import grids
from moefast.core.errors import InputError, LabelError, ModelError
from moefast.kernels import assign_bins, assign_snr_bins


def test_frozen_constants():
    assert grids.PHYSICAL_GRID.t_eff_edges == (3750.0, 4500.0, 5250.0, 6000.0)
    assert grids.PHYSICAL_GRID.m_h_edges == (-2.0, -1.0, 0.0, 0.5)
    assert grids.PHYSICAL_GRID.n_bins == 9
    assert grids.SNR_NORM_EDGES == (2.0, 4.0, 7.0)
    assert len(grids.SNR_NORM_NAMES) == len(grids.SNR_NORM_EDGES) + 1


def test_names_follow_the_bin_order():
    grid = grids.PHYSICAL_GRID
    assert grid.names[0] == "cool-poor"
    assert grid.names[2] == "cool-rich"
    assert grid.names[8] == "hot-rich"
    assert grid.names[grid.assign([5500.0], [-1.5])[0]] == "hot-poor"


def test_outside_stars_are_clamped_and_not_covered():
    grid = grids.PHYSICAL_GRID
    t_eff = np.array([3000.0, 3750.0, 6000.0, 6001.0, 5000.0, 5000.0])
    m_h = np.array([-1.5, -2.0, 0.5, 0.2, -2.01, 0.75])
    np.testing.assert_array_equal(grid.assign(t_eff, m_h), [0, 0, 8, 8, 3, 5])
    np.testing.assert_array_equal(grid.covered(t_eff, m_h), [False, True, True, False, False, False])


def test_uniform_labels_leave_the_stated_share_outside():
    m_h = np.linspace(-2.5, 0.75, 3251)
    covered = grids.PHYSICAL_GRID.covered(np.full(m_h.size, 5000.0), m_h)
    assert covered.mean() == pytest.approx(2.5 / 3.25, abs=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_labels_that_are_not_finite(bad):
    with pytest.raises(LabelError, match="row 1"):
        grids.PHYSICAL_GRID.assign([5000.0, bad], [0.0, 0.0])
    assert grids.PHYSICAL_GRID.covered([5000.0, bad], [0.0, 0.0]).tolist() == [True, False]


def test_uniform_grid():
    grid = grids.uniform(7, 7)
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
        grids.uniform(0, 3)


def test_grid_survives_json_and_is_a_value():
    grid = grids.uniform(7, 5)
    again = grids.Grid.from_dict(json.loads(json.dumps(grid.to_dict())))
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
        grids.Grid.from_dict(data)


@pytest.mark.parametrize("edges", [(1.0,), (1.0, 1.0), (0.0, np.inf)])
def test_unusable_edges(edges):
    with pytest.raises(ValueError, match="m_h_edges"):
        grids.Grid(m_h_edges=edges)


def test_too_many_bins():
    with pytest.raises(ValueError, match="at most 32767"):
        grids.uniform(200, 200)


def test_snr_bins():
    names = [grids.SNR_NORM_NAMES[k] for k in grids.assign_snr_bins([1.0, 2.0, 2.5, 4.0, 6.9, 7.0, 7.5])]
    assert "".join(names) == "XXLLMMH"
    with pytest.raises(InputError, match="row 0"):
        grids.assign_snr_bins([np.nan])


def test_a_grid_of_snr_norm_is_read_back_and_assigns_what_its_edges_say():
    grid = grids.SnrGrid()
    assert (grid.n_bins, grid.names) == (4, grids.SNR_NORM_NAMES)
    snr_norm = np.array([1, 2, 3, 7.5])
    np.testing.assert_array_equal(grid.assign(snr_norm), grids.assign_snr_bins(snr_norm))
    for one in (grid, grids.SnrGrid((1, 2, 3)), grids.PHYSICAL_GRID):
        assert grids.read_grid(one.to_dict()) == one


@pytest.mark.parametrize("edges", [(1.0, 2.0), (1.0, 2.0, 2.0), (1.0, 2.0, np.inf)])
def test_unusable_edges_of_snr_norm(edges):
    with pytest.raises(ValueError, match="3 finite, increasing edges"):
        grids.SnrGrid(edges)


@pytest.mark.parametrize("data", [{}, [], {"snr_norm_edges": [1, 2]}, {"snr_norm_edges": 4}])
def test_broken_dicts_of_either_grid_are_model_errors(data):
    with pytest.raises(ModelError, match="expected a grid"):
        grids.read_grid(data)


def test_metal_poor_bins_are_those_that_end_at_the_limit_or_below():
    assert grids.PHYSICAL_GRID.metal_poor.tolist() == [True, False, False] * 3
    found = grids.Grid((3750, 5000, 6000), (-2, -1.5, -0.9)).metal_poor
    assert found.tolist() == [True, False] * 2


def test_bins_are_those_of_the_kernels():
    """Plain NumPy and compiled loops give the same bins for every value, edges and their neighbours included."""
    rng = np.random.default_rng(11)
    for grid in (grids.PHYSICAL_GRID, grids.uniform(7, 5), grids.uniform(1, 1), grids.uniform(1, 4)):
        near_t = np.array(grid.t_eff_edges)
        near_m = np.array(grid.m_h_edges)
        t_eff = np.concatenate([rng.uniform(3000, 7000, 2000), near_t, np.nextafter(near_t, 0)])
        m_h = np.concatenate([rng.uniform(-3, 1, 2000), near_m, np.nextafter(near_m, 9)])
        n = min(t_eff.size, m_h.size)
        t_eff, m_h = t_eff[-n:], m_h[-n:]
        found = grid.assign(t_eff, m_h)
        assert found.dtype == np.int16
        np.testing.assert_array_equal(found, assign_bins(t_eff, m_h, grid.t_eff_edges, grid.m_h_edges))
    snr = np.concatenate([rng.uniform(0, 20, 2000), grids.SNR_NORM_EDGES]).astype(np.float32)
    found = grids.assign_snr_bins(snr)
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found, assign_snr_bins(snr, grids.SNR_NORM_EDGES))


def test_edges_that_do_not_increase_are_told():
    with pytest.raises(InputError, match="increasing"):
        grids.assign_snr_bins([1.0], (4.0, 2.0))
