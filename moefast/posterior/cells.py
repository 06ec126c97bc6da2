"""Cells of alike pixels: what M is summed over instead of single pixels.

M = Σ_p ω_p B_p B_pᵀ/D_p with ω = a′D, over p pixels. Where ω is the same in all pixels of a cell, or B_p B_pᵀ is,
nothing is lost if each pixel takes the weighted mean of its cell; and M stays positive, since means of weights are
weights. Pixels of a cell need not be neighbours: pixels of continuum are alike, those at the edge of a sky line are
not.

Design: k-means. Pixels are alike if they hold the same combination of coordinates (the direction of B_p, in units of
what a star of the training set's noise does not know), have the same noise in the training set (the sky changes them
together), and lie close to one another (gaps take them together). A cell's mean weighs its pixels by what they hold.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["alike_pixels", "neighbouring_pixels"]

OPERATIONS = 1_500_000
"""Multiply-adds that the sums over cells may cost a star: fewer directions have more cells."""
LARGEST = 32
"""Pixels of a cell, at the most."""
OF_NOISE = 1.0
"""What a factor of e in the noise variance counts for, relative to the length of a direction."""
OF_DISTANCE = 10.0
"""What the whole length of the spectrum counts for."""
STEPS = 12

F64 = NDArray[np.float64]


def alike_pixels(
    directions: NDArray, noise_shape: NDArray, precision: F64, n_cells: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Cells of pixels that are alike; see the module.

    Parameters
    ----------
    directions : array of shape (p, n + q)
    noise_shape : array of shape (p,)
        D.
    precision : array of shape (n + q, n + q)
        Of the library and the nuisances as one Gaussian.
    n_cells : int, optional
        As many as `OPERATIONS` allow by default. As many as pixels, or more, give each pixel a cell of its own. Cells
        of more than `LARGEST` pixels are cut into several.

    Returns
    -------
    cells : array of shape (k, s), int64
        Pixels of each cell; places that are left over hold pixel 0.
    shares : array of shape (k, s), float32
        Weight of each in the mean of its cell, 0 in places that are left over.
    """
    width = directions.shape[1]
    n_cells = n_cells or OPERATIONS // (width * (width + 1) // 2)
    white = directions.astype(np.float64) / np.sqrt(noise_shape.astype(np.float64))[:, None]
    variances, vectors = np.linalg.eigh(precision + white.T @ white)
    white = white @ (vectors / np.sqrt(variances))
    held = np.einsum("pa,pa->p", white, white) + 1e-12
    p = len(held)
    if p <= n_cells:
        return np.arange(p, dtype=np.int64)[:, None], np.ones((p, 1), np.float32)
    unit = white / np.sqrt(held)[:, None]
    # B_p and −B_p are alike.
    unit *= np.where(unit[:, [np.abs(unit).mean(0).argmax()]] < 0, -1.0, 1.0)
    place = OF_DISTANCE * np.linspace(0, 1, p)
    features = np.column_stack([unit, OF_NOISE * np.log(noise_shape.astype(np.float64)), place])
    cell = _k_means(features, held, n_cells)
    order = np.lexsort((np.arange(p), cell))
    parts = [
        part[a : a + LARGEST]
        for part in np.split(order, np.flatnonzero(np.diff(cell[order])) + 1)
        for a in range(0, len(part), LARGEST)
    ]
    cells = np.zeros((len(parts), max(map(len, parts))), np.int64)
    shares = np.zeros(cells.shape, np.float32)
    for row, share, part in zip(cells, shares, parts, strict=True):
        row[: len(part)] = part
        share[: len(part)] = held[part] / held[part].sum()
    return cells, shares


def neighbouring_pixels(n_pixels: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Cells of `size` neighbours, which divides the number of pixels."""
    cells = np.arange(n_pixels, dtype=np.int64).reshape(-1, size)
    return cells, np.full(cells.shape, 1 / size, np.float32)


def _k_means(features: F64, weights: F64, k: int) -> NDArray[np.intp]:
    """Cell of each pixel. The first centres are as far from each other as they can be: nothing is left to chance."""
    far = np.full(len(features), np.inf)
    centres = np.empty((k, features.shape[1]))
    nearest = int(weights.argmax())
    for c in range(k):
        centres[c] = features[nearest]
        far = np.minimum(far, ((features - centres[c]) ** 2).sum(1))
        nearest = int((weights * far).argmax())
    squares = (features**2).sum(1)[:, None]
    for _ in range(STEPS):
        cell = (squares - 2 * features @ centres.T + (centres**2).sum(1)).argmin(1)
        total = np.bincount(cell, weights, minlength=k)
        for column, centre in zip(features.T, centres.T, strict=True):
            sums = np.bincount(cell, weights * column, minlength=k)
            centre[:] = np.where(total > 0, sums / np.maximum(total, 1e-300), centre)
    return cell
