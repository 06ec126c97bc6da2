"""Pixels of the sky: HEALPix in its nested order, by which catalogues are divided.

Source: K. M. Górski et al., "HEALPix: a framework for high-resolution discretization and fast analysis of data
distributed on the sphere", ApJ 622, 759, 2005.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["LARGEST_ORDER", "nested_pixels"]

LARGEST_ORDER = 29
"""Of pixels that 64 bits can number: 0.4 milliarcseconds wide."""


def nested_pixels(ra: ArrayLike, dec: ArrayLike, order: int) -> NDArray[np.int64]:
    """Pixel of each position, from 0 to 12 · 4^order − 1.

    Parameters
    ----------
    ra, dec : array of shape (n,), degrees
        Finite.
    order : int
        0 … 29.

    Raises
    ------
    ValueError
        The order is none, a position is not finite, or a declination beyond ±90.
    """
    ra, dec = np.asarray(ra, np.float64), np.asarray(dec, np.float64)
    if not 0 <= order <= LARGEST_ORDER:
        raise ValueError(f"orders are 0 to {LARGEST_ORDER}, found {order}")
    if not (np.isfinite(ra).all() and np.isfinite(dec).all() and (np.abs(dec) <= 90).all()):
        raise ValueError("positions must be finite, and declinations within ±90 degrees")
    side = 1 << order
    z = np.sin(np.radians(dec))
    quarter = np.mod(ra, 360.0) / 90.0
    # Rounding may give 4 for a hair less than 360 degrees.
    quarter = np.where(quarter >= 4, 0.0, quarter)
    # The equatorial belt: lines of constant pixel row rise and fall linearly in z.
    middle, height = side * (0.5 + quarter), side * z * 0.75
    rising, falling = (np.floor(middle + sign * height).astype(np.int64) for sign in (-1, 1))
    up, down = rising // side, falling // side
    face = np.where(up == down, (up & 3) + 4, np.where(up < down, up & 3, (down & 3) + 8))
    x, y = falling & (side - 1), side - (rising & (side - 1)) - 1
    # The caps: each quarter of a turn is a triangle, √(3 (1 − |z|)) high; without cancellation near the pole.
    cap = np.abs(z) > 2 / 3
    corner = np.floor(quarter).astype(np.int64)
    along = quarter - corner
    distance = side * np.sqrt(6.0) * np.sin(np.radians(90 - np.abs(dec)) / 2)
    a, b = (np.minimum(np.floor(part * distance).astype(np.int64), side - 1) for part in (along, 1 - along))
    north = z > 0
    face = np.where(cap, np.where(north, corner, corner + 8), face)
    x = np.where(cap, np.where(north, side - b - 1, a), x)
    y = np.where(cap, np.where(north, side - a - 1, b), y)
    return (face << (2 * order)) + _spread(x) + (_spread(y) << 1)


def _spread(bits: NDArray[np.int64]) -> NDArray[np.int64]:
    """Put a zero between the bits of numbers of 32 bits."""
    spread = bits.copy()
    for shift, mask in (
        (16, 0x0000FFFF0000FFFF), (8, 0x00FF00FF00FF00FF), (4, 0x0F0F0F0F0F0F0F0F), (2, 0x3333333333333333),
        (1, 0x5555555555555555),
    ):  # fmt: skip
        spread = (spread | (spread << shift)) & mask
    return spread
