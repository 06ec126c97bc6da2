"""Cells of alike pixels: means of weights that cost M next to nothing."""

from dataclasses import replace

import numpy as np
import pytest
from made_clouds import mixture

from moefast.posterior.cells import LARGEST, alike_pixels, neighbouring_pixels


@pytest.fixture(scope="module")
def exact():
    return mixture(p=576, m=40, t=2, n=9, q=2)


def cells_of(mix, n_cells):
    return alike_pixels(mix.directions, mix.noise_shape, mix.numbers["library_precision"], n_cells)


def information(mix, weight, cells, shares):
    """M of a star whose weights relative to the noise of the training set are `weight`."""
    there = shares > 0
    relative = np.empty(len(weight))
    mean = (shares * weight[cells]).sum(1)
    relative[cells[there]] = np.broadcast_to(mean[:, None], cells.shape)[there]
    b = mix.directions.astype(float)
    return (b * (relative / mix.noise_shape)[:, None]).T @ b


@pytest.mark.parametrize("n_cells", [1, 7, 64, 575])
def test_each_pixel_is_in_one_cell_with_its_share(exact, n_cells):
    cells, shares = cells_of(exact, n_cells)
    np.testing.assert_array_equal(np.sort(cells[shares > 0]), np.arange(576))
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-6)
    assert cells.shape[1] <= LARGEST
    assert n_cells <= len(cells) <= n_cells + 576 // LARGEST + 1 or n_cells > 500


def test_as_many_cells_as_pixels_are_exact(exact):
    cells, shares = cells_of(exact, 576)
    np.testing.assert_array_equal(cells[:, 0], np.arange(576))
    assert (shares == 1).all()
    assert exact.sizes.cell == 1


def test_the_noise_of_the_training_set_costs_nothing_whatever_its_level(exact):
    cells, shares = cells_of(exact, 40)
    weight = np.full(576, 7.0)
    expected = information(exact, weight, *cells_of(exact, 576))
    np.testing.assert_allclose(information(exact, weight, cells, shares), expected, rtol=1e-5, atol=1e-6)


def test_flat_noise_costs_less_in_cells_of_alike_pixels_than_in_twice_as_many_of_neighbours(exact):
    weight = exact.noise_shape.astype(float) / exact.noise_shape.mean()
    truth = information(exact, weight, *cells_of(exact, 576))
    root = np.linalg.inv(np.linalg.cholesky(truth))

    def apart(cells):
        return np.abs(np.linalg.eigvalsh(root @ (information(exact, weight, *cells) - truth) @ root.T)).max()

    alike, neighbours = apart(cells_of(exact, 96)), apart(neighbouring_pixels(576, 3))
    assert alike < 0.5 * neighbours
    assert alike < 0.05


def test_cells_must_hold_every_pixel_once(exact):
    cells, shares = neighbouring_pixels(576, 2)
    twice = cells.copy()
    twice[0, 0] = 9
    with pytest.raises(ValueError, match="each of 576 pixels once"):
        replace(exact, cells=twice, cell_shares=shares)
    with pytest.raises(ValueError, match="cell_shares of shape"):
        replace(exact, cells=cells, cell_shares=shares[:-1])
