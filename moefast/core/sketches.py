"""Guard against measuring a model on stars that it was fitted on, whatever their files are called.

    sketch = the k smallest of h(row),    h(row) = hash of the row's labels

Design: a bottom-k sketch (Broder 1997) of the training rows travels with the model. It is a random sample of them, and
any row that is among them is recognised again: the test rows whose hash is below the largest of the sketch were in the
training set if and only if they are in the sketch. Labels of simulated stars are continuous, so equal ones mean the
same star; on a grid of labels every star is met again, and the report says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["SKETCH_SIZE", "row_hashes", "share_seen", "sketch"]

LABELS = ("T_eff", "log_g", "M_H")
RESOLUTION = (1e-3, 1e-6, 1e-6)
"""K, dex and dex: far below any two stars' difference, far above what storing a label as another type changes."""
SKETCH_SIZE = 1024


def row_hashes(labels: Mapping[str, NDArray]) -> NDArray[np.uint64]:
    """Hash of each row's T_eff, log g and [M/H], shape (n,).

    Source: the finaliser of SplitMix64, Steele, Lea & Flood 2014 (OOPSLA).
    """
    mixed = np.zeros(len(labels[LABELS[0]]), np.uint64)
    for name, unit in zip(LABELS, RESOLUTION, strict=True):
        mixed ^= np.rint(np.asarray(labels[name], np.float64) / unit).astype(np.int64).view(np.uint64)
        mixed += np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed


def sketch(labels: Mapping[str, NDArray], size: int = SKETCH_SIZE) -> list[str]:
    """The `size` smallest hashes of the rows in rising order, as hex digits for a manifest."""
    return [f"{value:016x}" for value in np.unique(row_hashes(labels))[:size].tolist()]


def share_seen(
    training: Sequence[str], labels: Mapping[str, NDArray], size: int = SKETCH_SIZE
) -> float | None:
    """Estimated share of rows that are in the training set.

    Parameters
    ----------
    training : sequence of str
        `sketch` of the training rows.
    labels : mapping of str to array of shape (n,)
        T_eff [K], log_g and M_H [dex] of the rows in question.
    size : int
        That of the sketch: a shorter one holds all training rows.

    Returns
    -------
    float or None
        None if no row can be judged.
    """
    known = np.array([int(value, 16) for value in training], np.uint64)
    hashes = row_hashes(labels)
    if len(known) >= size:
        hashes = hashes[hashes <= known.max()]
    if not len(hashes) or not len(known):
        return None
    return float(np.isin(hashes, known).mean())
