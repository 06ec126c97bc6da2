"""Plain NumPy contract of `moefast.kernels.tangent`: same results, float64, n × m numbers, no checks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moefast.kernels.tangent import Library

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
    (m, r), t, k = library.keys.shape, library.tangents.shape[1], library.n_experts
    square = np.exp(2 * level)
    exponents, means, variances = (np.empty((len(stars), m)) for _ in range(3))
    for j in range(m):
        d, g = library.variances[j].astype(np.float64), library.gains[j].astype(np.float64)
        delta = stars - library.keys[j]
        u = delta @ library.tangents[j].astype(np.float64).T
        along, beyond = d + square[:, None], library.rest[j] + square
        rest = np.maximum((delta**2).sum(1) - (u**2).sum(1), 0.0)
        chi2 = rest / beyond + (u**2 / along).sum(1)
        exponents[:, j] = library.log_weights[j] - 0.5 * (
            chi2 + (r - t) * np.log(beyond) + np.log(along).sum(1)
        )
        means[:, j] = library.log_g[j] + (g * u / along).sum(1)
        variances[:, j] = np.maximum(library.scatter[j] - (g**2 / along).sum(1), 0.0)
    found = [np.full((len(stars), k), value) for value in (np.nan, np.nan, -np.inf)]
    for expert in range(k):
        here = slice(library.first[expert], library.first[expert + 1])
        if here.start == here.stop:
            continue
        top = exponents[:, here].max(1, keepdims=True)
        weights = np.exp(exponents[:, here] - top)
        total = weights.sum(1, keepdims=True)
        weights /= total
        mean = (weights * means[:, here]).sum(1, keepdims=True)
        found[0][:, expert] = mean[:, 0]
        found[1][:, expert] = np.sqrt((weights * (variances[:, here] + (means[:, here] - mean) ** 2)).sum(1))
        found[2][:, expert] = (top + np.log(total))[:, 0]
    shares = np.exp(exponents - exponents.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    effective = 1.0 / (shares**2).sum(1)
    for array in (*found, effective):
        array[bad] = np.nan
    mean, sd, evidence = found
    return ReferencePosterior(mean, sd, evidence, effective)
