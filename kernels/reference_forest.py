"""Plain NumPy contract of `moefast.kernels.forest`: same results, float64, one tree after the other, no checks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from moefast.kernels.forest import Forest

__all__ = ["forest_leaves_reference", "forest_predict_reference"]


def forest_leaves_reference(x: NDArray, forest: Forest) -> NDArray[np.int64]:
    """Leaf that each row reaches in each tree, (n, t)."""
    out = np.empty((len(x), forest.n_trees), np.int64)
    first = 0
    for t, splits in enumerate(forest.n_leaves - 1):
        here = slice(first, first + splits)
        feature, threshold = forest.feature[here], forest.threshold[here]
        left, right = forest.left[here], forest.right[here]
        at = np.full(len(x), 0 if splits else -1)
        while (inside := np.flatnonzero(at >= 0)).size:
            k = at[inside]
            at[inside] = np.where(x[inside, feature[k]] <= threshold[k], left[k], right[k])
        out[:, t] = -1 - at
        first += splits
    return out


def forest_predict_reference(x: NDArray, forest: Forest) -> NDArray[np.float64]:
    """Base and the values of the leaves, summed tree by tree, (n,)."""
    first = np.cumsum(forest.n_leaves) - forest.n_leaves
    values = forest.value.astype(np.float64)[first + forest_leaves_reference(x, forest)]
    return float(forest.base[0]) + values.sum(1)
