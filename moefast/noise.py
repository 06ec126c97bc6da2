"""Noise draws that belong to a row, not to a block.

Design: row i of stream `seed` is drawn by its own counter-based generator (Philox keyed by seed and row), so the
same star gets the same noise whatever the block, shard or number of threads.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

__all__ = ["fold_of_rows", "standard_normals"]


def standard_normals(seed: int, rows: NDArray[np.integer], n_pixels: int) -> NDArray[np.float32]:
    """Standard normal numbers of shape (len(rows), n_pixels), float32, one independent stream per row.

    Parameters
    ----------
    seed : int
        Stream, 0 ≤ seed < 2⁶⁴.
    rows : array of shape (n,), integer ≥ 0
        Index of each row in its set.
    n_pixels : int

    Raises
    ------
    ValueError
        The seed or a row is out of range.
    """
    if not 0 <= seed < 2**64 or (len(rows) and rows.min() < 0):
        raise ValueError(f"a seed in 0 … 2⁶⁴ − 1 and rows from 0 on are needed; found seed {seed}")
    out = np.empty((len(rows), n_pixels), np.float32)

    def fill(part: range) -> None:
        for i in part:
            generator = np.random.Generator(np.random.Philox(key=np.array([seed, rows[i]], np.uint64)))
            generator.standard_normal(out=out[i], dtype=np.float32)

    workers = min(os.cpu_count() or 1, max(1, len(rows) // 64))
    if workers == 1:
        fill(range(len(rows)))
    else:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(fill, [range(w, len(rows), workers) for w in range(workers)]))
    return out


def fold_of_rows(rows: NDArray[np.integer], n_folds: int, seed: int = 0) -> NDArray[np.int64]:
    """Fold 0 … n_folds−1 of each row, by a hash of its index: independent of blocks, shards and order.

    Source: the finaliser of SplitMix64, Steele, Lea & Flood 2014 (OOPSLA).
    """
    mixed = np.asarray(rows, np.uint64) + np.uint64(0x9E3779B97F4A7C15 * (seed + 1) % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return (mixed % np.uint64(n_folds)).astype(np.int64)
