"""The network that corrects log g of one star; see `moefast.posterior.correction`, whose features these are.

Design: a few ten thousand multiply-adds per star, some hundredths of what its clouds take, so one star at a time, over
hidden units in SIMD lanes, with four inputs for each time that the sums are read and written.
"""

from __future__ import annotations

import math

import numpy as np

from moefast.core.compiled import njit
from moefast.kernels.cpu import FAST

__all__ = ["NONE", "correct"]

FARTHEST, LEAST_WEIGHT, LEAST_SPREAD = 5.0, 1e-6, 1e-4
"""As in `moefast.posterior.correction`."""
ZERO32 = np.float32(0.0)
NONE = tuple(np.zeros((0,) * ndim, np.float32) for ndim in (1, 1, *(2, 1) * 4))
"""In the place of a correction where there is none."""


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _layer(x, weights, bias, out):
    """Out = x W + b."""
    n_in, n_out = weights.shape
    for h in range(n_out):
        out[h] = bias[h]
    whole = n_in - n_in % 4
    for k in range(0, whole, 4):
        a, b, c, d = x[k], x[k + 1], x[k + 2], x[k + 3]
        for h in range(n_out):
            out[h] += (
                a * weights[k, h] + b * weights[k + 1, h] + c * weights[k + 2, h] + d * weights[k + 3, h]
            )
    for k in range(whole, n_in):
        for h in range(n_out):
            out[h] += x[k] * weights[k, h]


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _rectify(x, size):
    for h in range(size):
        x[h] = x[h] if x[h] > ZERO32 else ZERO32


@njit(nogil=True, cache=True, error_model="numpy")
def _see(place, value, mean, scale, seen):
    """A feature in its place, relative to those of the training draws; return the next place."""
    relative = (value - np.float64(mean[place])) * np.float64(scale[place])
    seen[place] = np.float32(min(max(relative, -FARTHEST), FARTHEST))
    return place + 1


@njit(nogil=True, cache=True, error_model="numpy")
def correct(point, label, sd, covariance, weights, expert, spread, log_level, network, seen, first, second):
    """Posterior mean of log g with what is learnt added to it.

    `label`, `sd` and `covariance` (l + 1,) have the scale as their last; `network` is as `CORRECTION` has it. `seen`
    (f,), `first` and `second` (as wide as the widest layer) are scratch.
    """
    mean, scale, w1, b1, w2, b2, w3, b3, w4, b4 = network
    count, place = label.size - 1, 0
    for k in range(point.size):
        place = _see(place, np.float64(point[k]), mean, scale, seen)
    for x in range(count):
        place = _see(place, label[x], mean, scale, seen)
    for x in range(count):
        place = _see(place, math.log(sd[x]), mean, scale, seen)
    for x in range(1, count):
        place = _see(place, covariance[x] / (sd[0] * sd[x]), mean, scale, seen)
    for e in range(weights.size):
        place = _see(place, math.log(weights[e] + LEAST_WEIGHT), mean, scale, seen)
    for e in range(weights.size):
        apart = weights[e] / (weights[e] + LEAST_WEIGHT) * (expert[e] - label[0])
        place = _see(place, apart, mean, scale, seen)
    place = _see(place, math.log(spread + LEAST_SPREAD), mean, scale, seen)
    _see(place, log_level, mean, scale, seen)
    _layer(seen, w1, b1, first)
    _rectify(first, b1.size)
    _layer(first, w2, b2, second)
    _rectify(second, b2.size)
    _layer(second, w3, b3, first)
    _rectify(first, b3.size)
    _layer(first, w4, b4, second)
    return label[0] + sd[0] * math.tanh(np.float64(second[0]))
