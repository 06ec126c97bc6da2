"""Posteriors with a made-up network that corrects log g."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moefast.posterior.correction import n_features


def with_correction(made, widths=(12, 9, 7), seed=5):
    """The same posterior with a network that moves log g by up to one standard deviation, at random."""
    rng = np.random.default_rng(seed)
    labels, directions = len(made.label_names), made.directions.shape[1]
    size = n_features(directions, labels, made.first.size - 1)
    mean, inverse_spread = rng.normal(0, 0.3, size), rng.uniform(0.3, 1, size)
    # The labels that a library has: some are thousands of kelvins.
    own = slice(directions, directions + labels)
    mean[own], inverse_spread[own] = made.labels.mean(0), 1 / made.labels.std(0)
    parts = [mean, inverse_spread]
    for width in (*widths, 1):
        parts += [1.5 * rng.standard_normal((size, width)) / np.sqrt(size), rng.normal(0, 0.3, width)]
        size = width
    return replace(made, correction=tuple(part.astype(np.float32) for part in parts))
