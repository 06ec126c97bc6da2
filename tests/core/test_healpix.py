"""HEALPix pixels: the corners of the sphere, equal areas, and pixels within pixels."""

import numpy as np
import pytest

from moefast.core.healpix import nested_pixels


def sphere(n, seed=3):
    rng = np.random.default_rng(seed)
    return rng.uniform(-360, 720, n), np.degrees(np.arcsin(rng.uniform(-1, 1, n)))


def test_base_pixels_are_those_of_the_figure():
    # Centres of the twelve base pixels (Górski et al. 2005, figure 3): four at ±41.8°, four on the equator.
    quarters = np.arange(4) * 90.0
    polar = np.degrees(np.arcsin(2 / 3))
    np.testing.assert_array_equal(nested_pixels(quarters + 45, np.full(4, polar), 0), [0, 1, 2, 3])
    np.testing.assert_array_equal(nested_pixels(quarters, np.zeros(4), 0), [4, 5, 6, 7])
    np.testing.assert_array_equal(nested_pixels(quarters + 45, np.full(4, -polar), 0), [8, 9, 10, 11])
    np.testing.assert_array_equal(nested_pixels([0, 89.9, 359.9], [90, 90, -90], 0), [0, 0, 11])


def test_pixels_have_equal_areas_and_lie_in_each_other():
    ra, dec = sphere(120_000)
    fine = nested_pixels(ra, dec, 29)
    for order in (0, 1, 3, 11):
        np.testing.assert_array_equal(nested_pixels(ra, dec, order), fine >> 2 * (29 - order))
    counts = np.bincount(nested_pixels(ra, dec, 1), minlength=48)
    assert counts.size == 48
    # 2500 each; the largest of 48 deviations is below 4.5 standard deviations.
    assert np.abs(counts - 2500).max() < 4.5 * 50


def test_neighbours_are_near():
    ra, dec = sphere(20_000)
    pixels = nested_pixels(ra, dec, 4)
    x, y, z = (
        np.cos(np.radians(dec)) * np.cos(np.radians(ra)),
        np.cos(np.radians(dec)) * np.sin(np.radians(ra)),
        np.sin(np.radians(dec)),
    )
    points = np.column_stack([x, y, z])
    for pixel in np.unique(pixels):
        mine = points[pixels == pixel]
        # Pixels of order 4 are 3.7° wide, and 7° from corner to corner at the most.
        assert np.degrees(np.arccos(np.clip(mine @ mine[0], -1, 1))).max() < 7.5


def test_what_is_no_position_is_refused():
    with pytest.raises(ValueError, match="finite"):
        nested_pixels([np.nan], [0], 3)
    with pytest.raises(ValueError, match="90"):
        nested_pixels([0], [91], 3)
    with pytest.raises(ValueError, match="orders"):
        nested_pixels([0], [0], 30)
