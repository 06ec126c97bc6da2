"""Resampling in plain NumPy and float64: the contract of `moefast.kernels.resample`, without its handling of holes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["resample_reference", "resampling_matrix"]

F64 = NDArray[np.float64]


def resampling_matrix(edges: F64, out_edges: F64) -> F64:
    """Weights (p, k) of k pixels in p output pixels that lie at least two pixels within them.

    Parameters
    ----------
    edges : array of shape (k + 1,), Å
    out_edges : array of shape (p + 1,), Å
    """
    width = np.diff(edges)
    k = len(width)
    cell = np.clip(np.searchsorted(edges, out_edges, side="right") - 1, 2, k - 3)
    d = (out_edges - edges[cell]) / width[cell]
    nodes = np.arange(-2, 4)
    # F at d from the values at the nodes.
    lagrange = np.stack(
        [np.prod([(d - m) / (node - m) for m in nodes if m != node], axis=0) for node in nodes], axis=1
    )
    integral = np.zeros((len(out_edges), k))
    for row, (i, x) in enumerate(zip(cell, out_edges, strict=True)):
        # Node m has F(m) − F(i) = the pixels between; a constant is taken out and put back exactly.
        for node, share in zip(nodes.tolist(), lagrange[row], strict=True):
            for pixel in range(min(0, node), max(0, node)):
                sign = 1 if node > 0 else -1
                integral[row, i + pixel] += sign * share * width[i + pixel]
        integral[row, i] += (x - edges[i]) - integral[row].sum()
        integral[row, :i] += width[:i]
    return np.diff(integral, axis=0) / np.diff(out_edges)[:, None]


def resample_reference(edges: F64, flux: F64, error: F64, out_edges: F64) -> tuple[F64, F64]:
    """Flux and error (p,) of good pixels (k,) on another grid; see `moefast.kernels.resample`."""
    weights = resampling_matrix(edges, out_edges)
    squares = weights**2
    variance = squares @ (error**2 * np.diff(edges)) / squares.sum(1) / np.diff(out_edges)
    return weights @ flux, np.sqrt(variance)
