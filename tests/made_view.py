"""A view of a tower of one's own: what a test, or anyone, needs to say of one."""

import numpy as np

from moefast.gating.tower import View

N = 3


def _of_stars(features, error, good):
    lost = np.zeros(len(error)) if good is None else (~good).sum(1)
    return np.concatenate([features[:, :2], lost[:, None] / 100], 1).astype(np.float32)


def _described(op, features, error, good, n_pixels):
    used = op.where(good, op.double(1.0), op.double(0.0))
    lost = op.subtract(op.double(float(n_pixels)), op.shaped(op.total(used, 1), (1,)))
    share = op.single(op.divide(lost, op.double(100.0)))
    return op.joined([op.part(features, 1, 0, 2), share], 1)


SHARE_OF_LOST_PIXELS = View(n_features=N, hidden=4, of_errors=False, of_stars=_of_stars, describe=_described)
"""Two features of the first tower, and how many pixels are lost: other noise, another view."""
