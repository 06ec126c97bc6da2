"""Contract of `moefast.kernels.tangent`: its description read in NumPy and float64, n × m numbers, no checks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moefast.kernels import forward_tangent
from moefast.kernels.tangent import Library
from moefast.ops.on_numpy import NumPyArithmetic

__all__ = ["tangent_posterior_reference"]

F64 = NDArray[np.float64]


class ReferencePosterior(NamedTuple):
    """Posterior mean, standard deviation, log evidence (n, K) and effective number of clouds (n,)."""

    mean: F64
    sd: F64
    log_evidence: F64
    effective: F64


def tangent_posterior_reference(z: NDArray, log_level: NDArray, library: Library) -> ReferencePosterior:
    """What `moefast.kernels.tangent_posterior` returns."""
    stars, level = np.array(z, np.float64), np.array(log_level, np.float64)
    bad = ~(np.isfinite(stars).all(1) & np.isfinite(level))
    stars[bad], level[bad] = 0.0, 0.0
    op = NumPyArithmetic({name: getattr(library, name) for name in forward_tangent.NUMBERS})
    sizes = np.diff(library.first).tolist()
    found = forward_tangent.tangent_posterior(op, library.tangents.shape, sizes, stars, level[:, None])
    shares = op.softmax(found.exponent)
    effective = 1.0 / (shares**2).sum(1)
    arrays = (*found[:3], effective)
    for array in arrays:
        array[bad] = np.nan
    return ReferencePosterior(*arrays)
