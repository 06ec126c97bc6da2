"""Boosted regression trees: sums of leaf values, all trees of a forest in one pass over the features.

    ŷ_i = base + Σ_t value_t[leaf_t(x_i)],    where a split sends a row to the left if x_if ≤ threshold, else right.

Design: the contract is `forest_predict_reference`. Nothing walks down a tree. A split that sends a row to the right
rules out the leaves on its left, one bit each; of the leaves that no split has ruled out, the leftmost is the one that
the row reaches. So splits may be taken in any order, here by feature: the features of a block of rows are transposed,
and each split is one comparison of neighbours in memory with one number, without a branch. (500 trees of 20 leaves that
use 2800 of 4096 pixels, one core of two busy ones, nanoseconds a star: 1800 for the transposition, 800 for the splits,
400 for the leaves. Walking down the trees takes 30 000, merely reading the pixels 600 to 1200.)

A comparison with NaN is false, so a missing feature sends a row to the right. Values are added in the order of the
trees in float64: a row's number depends on the row alone.

Source: Lucchese et al. 2015, "QuickScorer" (SIGIR '15), and its version for SIMD, 2016 (SIGIR '16).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moefast.core.compiled import njit
from moefast.core.threads import in_threads

__all__ = ["MOST_LEAVES", "Forest", "forest_predict"]

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

MOST_LEAVES = 32
"""Leaves that a tree may have: one bit of a word each."""
LANES = 128
"""Rows of a block. A loop over fewer costs more to start than to run."""
PAD = 16
"""Unused columns of a transposed block, which keep its rows from falling on the same set of the cache."""
PANEL, TILE = 8, 32
"""Rows and features that are transposed at once: processors read ahead in so many rows at a time, and not in more."""


class Layout(NamedTuple):
    """A forest as the kernel takes it: splits sorted by feature.

    `used` (u,) are the features in use, `first` (u + 1,) the first split of each; `tree`, `threshold` and `mask` (s,)
    belong to the splits, a mask having the leaves left of the split; `table` (t, 32) are the leaf values from left
    to right.
    """

    used: NDArray[np.uint64]
    first: NDArray[np.uint64]
    tree: NDArray[np.uint64]
    threshold: F32
    mask: NDArray[np.uint32]
    table: F32


@dataclass(frozen=True)
class Forest:
    """Regression trees, splits and leaves of one tree behind those of the other.

    Attributes
    ----------
    base : array of shape (1,), float32
        What is added to the sum of the trees.
    n_leaves : array of shape (t,), int64
        Leaves of each tree, 1 to 32; a tree has one split less.
    feature : array of shape (s,), int64
        Feature of each split.
    threshold : array of shape (s,), float32
        A row goes to the left if its feature is ≤ this.
    left, right : array of shape (s,), int64
        Where to: split k of the same tree as k, which must be above the split's own number; leaf k as −1 − k.
    value : array of shape (l,), float32
        Values of the leaves.

    Raises
    ------
    ValueError
        The arrays do not fit together, or are not trees.
    """

    base: F32
    n_leaves: I64
    feature: I64
    threshold: F32
    left: I64
    right: I64
    value: F32

    def __post_init__(self) -> None:
        for name, dtype in _DTYPES.items():
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype != dtype:
                raise ValueError(f"{name} of a forest must be a vector of {np.dtype(dtype).name}")
        if self.base.size != 1 or not np.isfinite(self.base).all() or not np.isfinite(self.value).all():
            raise ValueError("a forest needs one base value, and all values must be finite")
        if ((self.n_leaves < 1) | (self.n_leaves > MOST_LEAVES)).any():
            raise ValueError(f"trees of 1 to {MOST_LEAVES} leaves expected; found {self.n_leaves.max()}")
        splits, leaves = int((self.n_leaves - 1).sum()), int(self.n_leaves.sum())
        sizes = [getattr(self, name).size for name in _DTYPES][2:]
        if sizes != [splits] * 4 + [leaves]:
            raise ValueError(f"{splits} splits and {leaves} leaves expected; found arrays of {sizes}")
        if (self.feature < 0).any() or np.isnan(self.threshold).any():
            raise ValueError("features must not be negative and thresholds not NaN")
        self._check_trees()

    def _check_trees(self) -> None:
        tree, own, first = self._places()
        for child in (self.left, self.right):
            is_leaf = -1 - child < self.n_leaves[tree]
            is_later = (child > own) & (child < self.n_leaves[tree] - 1)
            if not np.where(child < 0, is_leaf, is_later).all():
                raise ValueError("a split must lead to a later split or to a leaf of its own tree")
        children = np.concatenate([self.left, self.right])
        of = np.concatenate([tree, tree])
        inner = children >= 0
        reached = [(first[of] + children)[inner], (first[of] + of - 1 - children)[~inner]]
        roots = np.zeros(self.feature.size, np.int64)
        roots[first[self.n_leaves > 1]] = 1
        alone = np.repeat(self.n_leaves == 1, self.n_leaves)
        if (np.bincount(reached[0], minlength=roots.size) + roots != 1).any() or (
            np.bincount(reached[1], minlength=alone.size) + alone != 1
        ).any():
            raise ValueError("every split but the first and every leaf of a tree must be reached in one way")

    def _places(self) -> tuple[I64, I64, I64]:
        """Tree (s,) of each split, its number (s,) in the tree, and the first split (t,) of each tree."""
        n_splits = self.n_leaves - 1
        first = np.cumsum(n_splits) - n_splits
        tree = np.repeat(np.arange(self.n_trees), n_splits)
        return tree, np.arange(self.feature.size) - first[tree], first

    @property
    def n_trees(self) -> int:
        """Number of trees t."""
        return self.n_leaves.size

    @cached_property
    def layout(self) -> Layout:
        """The forest as the kernel takes it."""
        tree, own, _ = self._places()
        most = int(self.n_leaves.max(initial=1))
        # Nodes of a tree: splits from 0 on, leaves from `most` on.
        count = np.ones((self.n_trees, 2 * most), np.int64)
        start = np.zeros_like(count)
        left, right = (np.where(child < 0, most - 1 - child, child) for child in (self.left, self.right))
        by_number = [np.flatnonzero(own == j) for j in range(most - 1)]
        for j, k in reversed(list(enumerate(by_number))):
            count[tree[k], j] = count[tree[k], left[k]] + count[tree[k], right[k]]
        for j, k in enumerate(by_number):
            start[tree[k], left[k]] = start[tree[k], j]
            start[tree[k], right[k]] = start[tree[k], j] + count[tree[k], left[k]]
        on_left, since = count[tree, left].astype(np.uint64), start[tree, own].astype(np.uint64)
        one = np.uint64(1)
        mask = (((one << on_left) - one) << since).astype(np.uint32)
        of_leaf = np.repeat(np.arange(self.n_trees), self.n_leaves)
        leaf = np.arange(self.value.size) - np.repeat(np.cumsum(self.n_leaves) - self.n_leaves, self.n_leaves)
        table = np.zeros((self.n_trees, MOST_LEAVES), np.float32)
        table[of_leaf, start[of_leaf, most + leaf]] = self.value
        order = np.lexsort((tree, self.feature))
        used, begin = np.unique(self.feature[order], return_index=True)
        # Unsigned: a signed index costs a comparison, because it might be negative.
        return Layout(
            used.astype(np.uint64), np.append(begin, order.size).astype(np.uint64),
            tree[order].astype(np.uint64), self.threshold[order], mask[order], table,
        )  # fmt: skip


_DTYPES = {
    "base": np.float32, "n_leaves": np.int64, "feature": np.int64, "threshold": np.float32,
    "left": np.int64, "right": np.int64, "value": np.float32,
}  # fmt: skip


def forest_predict(x: ArrayLike, forest: Forest) -> F32:
    """Sums of leaf values; see the module's equation.

    Parameters
    ----------
    x : array of shape (n, f)
        Features, rounded to float32 if they are not. A NaN goes to the right at every split.
    forest : Forest

    Returns
    -------
    array of shape (n,), float32

    Raises
    ------
    ValueError
        `x` is no matrix, or has fewer features than the forest uses.
    """
    rows = np.ascontiguousarray(x, np.float32)
    needed = int(forest.feature.max(initial=-1)) + 1
    if rows.ndim != 2 or rows.shape[1] < needed:
        raise ValueError(f"x (n, f) with {needed} features at least expected; found {rows.shape}")
    out = np.empty(len(rows), np.float32)
    layout, base = forest.layout, np.float64(forest.base[0])

    def run(first: int, stop: int) -> None:
        here = slice(first * LANES, stop * LANES)
        _predict(rows[here], *layout, base, out[here])

    in_threads(-(-len(rows) // LANES), run, least=1)
    return out


@njit(nogil=True, cache=True)
def _transpose(x, used, out):  # type: ignore[no-untyped-def]
    """out[c, i] = x[i, used[c]]."""
    for panel in range(0, x.shape[0], PANEL):
        for first in range(0, used.size, TILE):
            features, tile = used[first : first + TILE], out[first : first + TILE]
            for i in range(panel, min(panel + PANEL, x.shape[0])):
                row = x[i]
                for c in range(features.size):
                    tile[c, i] = row[features[c]]


@njit(nogil=True, cache=True, error_model="numpy")
def _rule_out(values, threshold, mask, out):  # type: ignore[no-untyped-def]
    """Rule out the leaves of a mask in the rows that go to the right."""
    # All lanes, also where there are fewer rows: a loop of fixed length needs no remainder.
    for i in range(LANES):
        # Not `>`: a comparison with NaN must send to the right.
        out[i] = out[i] | (np.uint32(0) if values[i] <= threshold else mask)


@njit(nogil=True, cache=True, error_model="numpy")
def _add_leaves(ruled_out, table, total):  # type: ignore[no-untyped-def]
    """Add the value of the leftmost leaf that is left, in each row."""
    for i in range(LANES):
        leftmost = ~ruled_out[i] & np.uint32(ruled_out[i] + np.uint32(1))
        # A power of two is exact in float32, and its exponent says which; -2^31 has the exponent of 2^31.
        exponent = np.float32(np.int32(leftmost)).view(np.int32) >> np.int32(23)
        total[i] += table[np.uint32(exponent + 1) & np.uint32(31)]


@njit(nogil=True, cache=True, error_model="numpy")
def _predict(x, used, first, tree, threshold, mask, table, base, out):  # type: ignore[no-untyped-def]
    """See `Layout` for the arguments; `x` (n, f) float32, `out` (n,) float32."""
    values = np.zeros((used.size, LANES + PAD), np.float32)
    ruled_out = np.empty((table.shape[0], LANES + PAD), np.uint32)
    total = np.empty(LANES)
    for block in range(0, x.shape[0], LANES):
        rows = min(LANES, x.shape[0] - block)
        _transpose(x[block : block + rows], used, values)
        ruled_out[:] = np.uint32(0)
        for c in range(used.size):
            for k in range(first[c], first[c + 1]):
                _rule_out(values[c], threshold[k], mask[k], ruled_out[tree[k]])
        total[:] = base
        for t in range(table.shape[0]):
            _add_leaves(ruled_out[t], table[t], total)
        for i in range(rows):
            out[block + i] = total[i]
