"""A space of spectra on the device, laid out as the kernels of `moefast.kernels.cuda.information` read it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda
from numpy.typing import NDArray

from moefast.kernels.clouds import Space

__all__ = ["DeviceSpace", "on_device"]


def on_device(array: NDArray, dtype: Any) -> Any:
    """A contiguous copy of an array on the device."""
    return cuda.to_device(np.ascontiguousarray(array, dtype))


class DeviceSpace:
    """A space on the device, nuisances first: to marginalise them is to begin with them.

    Attributes
    ----------
    n_pixels, n_nuisances, n_cells, width, packed : int
        Pixels, nuisances, cells, directions w, and numbers of a packed triangle w (w + 1)/2.
    pixels : tuple of device arrays
        What `read_spectra` takes: reference, noise shape, pixels of each cell, where these begin, and their shares.
    directions, transposed : device array of shape (p, w), (w, p), float64
    products : device array of shape (cells, w (w + 1)/2), float64
        What a cell's information is multiplied with to give M.
    precision, pull : device array of shape (w, w), (w,), float64
    """

    def __init__(self, space: Space) -> None:
        (p, width), q = space.directions.shape, space.n_nuisances
        self.n_pixels, self.n_nuisances, self.n_cells, self.width = p, q, len(space.cells), width
        self.packed = width * (width + 1) // 2
        directions = np.roll(space.directions.astype(np.float64), q, axis=1)
        upper, shape = np.triu_indices(width), space.noise_shape.astype(np.float64)
        products = np.empty((self.n_cells, self.packed))
        there = space.cell_shares > 0
        for row, cell, kept in zip(products, space.cells, there, strict=True):
            row[:] = ((directions[cell[kept]] / shape[cell[kept], None]).T @ directions[cell[kept]])[upper]
        # Pixels of a cell in their order, as on the CPU.
        order = [np.argsort(cell[kept], kind="stable") for cell, kept in zip(space.cells, there, strict=True)]
        pixels = [c[k][o] for c, k, o in zip(space.cells, there, order, strict=True)]
        shares = [s[k][o] for s, k, o in zip(space.cell_shares, there, order, strict=True)]
        self.pixels = (
            on_device(space.reference, np.float32),
            on_device(space.noise_shape, np.float32),
            on_device(np.concatenate(pixels), np.int64),
            on_device(np.concatenate([[0], np.cumsum(there.sum(1))]), np.int64),
            on_device(np.concatenate(shares), np.float64),
        )
        self.directions, self.transposed = (
            on_device(directions, np.float64),
            on_device(directions.T, np.float64),
        )
        self.products = on_device(products, np.float64)
        self.precision = on_device(np.roll(space.precision, (q, q), (0, 1)), np.float64)
        self.pull = on_device(np.roll(space.pull, q), np.float64)
