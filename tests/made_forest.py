"""Random trees of any shape, whose thresholds are often met exactly."""

import numpy as np

from moefast.kernels import Forest


def forest(n_leaves, n_features=5, seed=0):
    """Trees of so many leaves, each split put on a leaf drawn at random."""
    draw = np.random.default_rng(seed)
    left, right = [], []
    for leaves in n_leaves:
        sides = [np.full(leaves - 1, -1), np.full(leaves - 1, -1)]
        ends = {0: None}
        for split in range(leaves - 1):
            number = int(draw.choice(sorted(ends)))
            if ends[number] is not None:
                side, parent = ends[number]
                sides[side][parent] = split
            # The old number stays on a side drawn at random: leaves are not numbered from left to right.
            same = int(draw.integers(0, 2))
            ends[number], ends[split + 1] = (same, split), (1 - same, split)
        for number, end in ends.items():
            if end is not None:
                sides[end[0]][end[1]] = -1 - number
        left.append(sides[0])
        right.append(sides[1])
    splits = sum(n_leaves) - len(n_leaves)
    return Forest(
        base=np.array([3.0], np.float32),
        n_leaves=np.array(n_leaves, np.int64),
        feature=draw.integers(0, n_features, splits),
        threshold=(draw.integers(-4, 5, splits) / 4).astype(np.float32),
        left=np.concatenate([np.zeros(0, np.int64), *left]),
        right=np.concatenate([np.zeros(0, np.int64), *right]),
        value=draw.standard_normal(sum(n_leaves)).astype(np.float32),
    )


def features(n, n_features=5, seed=0):
    """Quarters, so that half of them lie on thresholds; some NaN and infinite."""
    draw = np.random.default_rng(seed)
    x = (draw.integers(-8, 9, (n, n_features)) / 8).astype(np.float32)
    kind = draw.integers(0, 40, x.shape)
    for number, value in enumerate((np.nan, np.inf, -np.inf)):
        x[kind == number] = value
    return x
