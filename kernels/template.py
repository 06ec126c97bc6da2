"""Posterior means over a library of templates: softmax attention, without ever holding n × m numbers.

    χ²_ij = ‖z_i − a_ij k_j‖²,    a_ij = 1, or z_iᵀk_j / ‖k_j‖², which makes χ²_ij smallest,
    w_ij = exp(−χ²_ij / 2 s_i²) / Σ_j exp(−χ²_ij / 2 s_i²),
    mean_i = Σ_j w_ij v_j,    log Z_i = log (1/m) Σ_j exp(−χ²_ij / 2 s_i²),    effective_i = 1 / Σ_j w_ij².

Design: the contract is `template_posterior_reference`. Templates come in tiles that stay in the nearest cache while the
rows of a block pass over them; each row keeps a running maximum of the exponents, and what was summed before a larger
one turned up is scaled down, as flash attention does.

χ² is summed as it is written, difference by difference, in float32: its rounding is 10⁻⁷ of χ² itself. The product form
‖z‖² + ‖k‖² − 2 zᵀk needs half the operations in BLAS, but in float32 it is off by 10⁻⁷ of ‖z‖², which for a star far
brighter than its noise is many units of the exponent. In float64 it takes as long as the differences do, and brings
the rounding at the edges of BLAS's tiles with it. (48 coordinates, one busy core, nanoseconds a pair, the best of
several: `dgemm` alone 2.5, differences 2.4, exponentials 0.4.)

A row's numbers depend on that row, the templates and their order alone. Floor: 2 r operations (4 r with a free scale)
and an exponential per star and template.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moefast.core.compiled import njit
from moefast.core.threads import in_threads
from moefast.kernels.cpu import FAST, exp32
from moefast.kernels.dispatch import on_cuda

__all__ = ["TemplatePosterior", "check_posterior", "template_posterior"]

F32 = NDArray[np.float32]
TILE = 256
"""Templates of a tile: with 48 coordinates they take 48 kB."""
STEP = 4
"""Coordinates that are looked at together; both sides are filled up with zeros to whole steps."""
BLOCK = 64
"""Rows that pass over a tile, one after the other."""


@dataclass(frozen=True)
class TemplatePosterior:
    """What `template_posterior` returns.

    Attributes
    ----------
    mean : array of shape (n, q), float32
        Posterior mean of each label, in the units of the values.
    log_evidence : array of shape (n,), float32
        log Z, without the constant of the normal distribution.
    effective : array of shape (n,), float32
        How many templates share the weight: from 1 to m. Few mean that the library is too coarse for this star.
    """

    mean: F32
    log_evidence: F32
    effective: F32


def template_posterior(
    z: ArrayLike,
    level: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    *,
    free_scale: bool = False,
    backend: str = "cpu",
) -> TemplatePosterior:
    """Posterior mean over templates, its evidence and its effective number of templates; see the module's equations.

    Parameters
    ----------
    z : array of shape (n, r)
        Stars in coordinates in which the noise is white: of variance s² in each.
    level : array of shape (n,)
        Noise level s of each star, in units of the coordinates.
    keys : array of shape (m, r)
        Templates in the same coordinates, m > 0.
    values : array of shape (m, q)
        Labels of the templates, or (m,) for one label.
    free_scale : bool
        Each template may be multiplied by the number that fits best, of either sign; templates of length zero have
        χ² = ‖z‖².
    backend : "cpu" or "cuda"

    Returns
    -------
    TemplatePosterior
        NaN for a star with a coordinate that is not finite, or a level that is not positive and finite.

    Raises
    ------
    ValueError
        Shapes that do not fit, no template, or a template or label that is not finite.
    BackendError
        The backend is unknown, or there is no usable CUDA device.
    """
    if backend != "cpu":
        return on_cuda("template_posterior", backend)(z, level, keys, values, free_scale=free_scale)
    stars, weight, templates, labels = check_posterior(z, level, keys, values, free_scale)
    n, q = len(stars), len(labels)
    out = TemplatePosterior(*(np.empty(s, np.float32) for s in ((n, q), n, n)))
    blocks = -(-n // BLOCK)

    def run(first: int, stop: int) -> None:
        here = slice(first * BLOCK, stop * BLOCK)
        _posterior(
            stars[here], weight[here], templates, labels, free_scale,
            out.mean[here], out.log_evidence[here], out.effective[here],
        )  # fmt: skip

    in_threads(blocks, run, least=1)
    return out


def check_posterior(
    z: ArrayLike, level: ArrayLike, keys: ArrayLike, values: ArrayLike, free_scale: bool
) -> tuple[F32, F32, F32, F32]:
    """Checked arguments in the layout of the kernels.

    Returns
    -------
    tuple of arrays, float32
        z (n, r); −1/(2 s²) (n,), NaN for rows without an answer; templates (r, m), of length 1 with `free_scale`;
        values (q, m).

    Raises
    ------
    ValueError
        See `template_posterior`.
    """
    stars, templates = np.asarray(z), np.asarray(keys)
    labels, levels = np.asarray(values, np.float32), np.asarray(level, np.float64)
    if stars.ndim != 2 or templates.ndim != 2 or stars.shape[1] != templates.shape[1]:
        raise ValueError(f"z (n, r) and keys (m, r) expected; found {stars.shape} and {templates.shape}")
    m = len(templates)
    if labels.ndim not in (1, 2) or len(labels) != m or m == 0:
        raise ValueError(f"values of {m} templates, at least one, expected; found {labels.shape}")
    if levels.shape != (len(stars),):
        raise ValueError(f"level of shape ({len(stars)},) expected; found {levels.shape}")
    for name, array in (("keys", templates), ("values", labels)):
        bad = ~np.isfinite(array).reshape(m, -1).all(1)
        if bad.any():
            raise ValueError(f"{name} must be finite; template {int(bad.argmax())} is not")
    if free_scale:
        length = np.sqrt((templates.astype(np.float64) ** 2).sum(1, keepdims=True))
        templates = templates / np.where(length > 0, length, 1.0)
    width = stars.shape[1] + -stars.shape[1] % STEP
    padded, across = np.zeros((len(stars), width), np.float32), np.zeros((width, m), np.float32)
    # What does not fit float32 gives no answer.
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        padded[:, : stars.shape[1]], across[: stars.shape[1]] = stars, templates.T
        weight = (-0.5 / levels**2).astype(np.float32)
    weight[~(np.isfinite(padded).all(1) & (levels > 0) & np.isfinite(weight) & (weight < 0))] = np.nan
    return padded, weight, across, np.ascontiguousarray(labels.reshape(m, -1).T)


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _add_differences(star, keys, first, scale, chi2):  # type: ignore[no-untyped-def]
    """chi2[j] = Σ_c (z_c − scale_j k_cj)² of the templates from `first` on."""
    size = chi2.size
    for j in range(size):
        chi2[j] = np.float32(0.0)
    # Four coordinates at a time: loads and stores of the sums would cost as much as the differences.
    for c in range(0, star.size, STEP):
        z0, z1, z2, z3 = star[c], star[c + 1], star[c + 2], star[c + 3]
        k0, k1 = keys[c, first : first + size], keys[c + 1, first : first + size]
        k2, k3 = keys[c + 2, first : first + size], keys[c + 3, first : first + size]
        for j in range(size):
            d0, d1 = z0 - scale[j] * k0[j], z1 - scale[j] * k1[j]
            d2, d3 = z2 - scale[j] * k2[j], z3 - scale[j] * k3[j]
            chi2[j] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _add_plain_differences(star, keys, first, chi2):  # type: ignore[no-untyped-def]
    """The same with a scale of 1, which saves half the multiplications."""
    size = chi2.size
    for j in range(size):
        chi2[j] = np.float32(0.0)
    for c in range(0, star.size, STEP):
        z0, z1, z2, z3 = star[c], star[c + 1], star[c + 2], star[c + 3]
        k0, k1 = keys[c, first : first + size], keys[c + 1, first : first + size]
        k2, k3 = keys[c + 2, first : first + size], keys[c + 3, first : first + size]
        for j in range(size):
            d0, d1, d2, d3 = z0 - k0[j], z1 - k1[j], z2 - k2[j], z3 - k3[j]
            chi2[j] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _best_scales(star, keys, first, scale):  # type: ignore[no-untyped-def]
    """scale[j] = zᵀk_j for templates of length 1."""
    size = scale.size
    for j in range(size):
        scale[j] = np.float32(0.0)
    for c in range(0, star.size, STEP):
        z0, z1, z2, z3 = star[c], star[c + 1], star[c + 2], star[c + 3]
        k0, k1 = keys[c, first : first + size], keys[c + 1, first : first + size]
        k2, k3 = keys[c + 2, first : first + size], keys[c + 3, first : first + size]
        for j in range(size):
            scale[j] += (z0 * k0[j] + z1 * k1[j]) + (z2 * k2[j] + z3 * k3[j])


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _largest(values):  # type: ignore[no-untyped-def]
    largest = values[0]
    for j in range(values.size):
        largest = max(largest, values[j])
    return largest


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _weigh(exponents, top):  # type: ignore[no-untyped-def]
    """Replace each exponent by its exponential above `top`; sum and sum of squares."""
    total, square = np.float32(0.0), np.float32(0.0)
    for j in range(exponents.size):
        share = exp32(exponents[j] - top)
        exponents[j] = share
        total += share
        square += share * share
    return total, square


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _product(a, b):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for j in range(a.size):
        total += a[j] * b[j]
    return total


@njit(nogil=True, cache=True, error_model="numpy")
def _posterior(z, weight, keys, values, free_scale, mean, log_evidence, effective):  # type: ignore[no-untyped-def]
    """Posterior of each row; `z` (n, r), `weight` (n,) = −1/(2 s²), `keys` (r, m), `values` (q, m)."""
    (n, _), (q, m) = z.shape, values.shape
    tile, scales = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    top, total, square = np.empty(BLOCK), np.empty(BLOCK), np.empty(BLOCK)
    sums = np.empty((BLOCK, q))
    for block in range(0, n, BLOCK):
        rows = min(BLOCK, n - block)
        top[:] = -np.inf
        total[:], square[:], sums[:] = 0.0, 0.0, 0.0
        for first in range(0, m, TILE):
            size = min(TILE, m - first)
            exponents, scale = tile[:size], scales[:size]
            for i in range(rows):
                one = weight[block + i]
                if math.isnan(one):
                    continue
                if free_scale:
                    _best_scales(z[block + i], keys, first, scale)
                    _add_differences(z[block + i], keys, first, scale, exponents)
                else:
                    _add_plain_differences(z[block + i], keys, first, exponents)
                for j in range(size):
                    exponents[j] *= one
                largest = max(top[i], np.float64(_largest(exponents)))
                # Exponents that overflowed weigh nothing.
                if largest == -np.inf:
                    continue
                shrink = math.exp(top[i] - largest)
                top[i] = largest
                share, of_squares = _weigh(exponents, np.float32(largest))
                total[i] = total[i] * shrink + share
                square[i] = square[i] * (shrink * shrink) + of_squares
                for k in range(q):
                    sums[i, k] = sums[i, k] * shrink + _product(exponents, values[k, first : first + size])
        for i in range(rows):
            if total[i] > 0.0:
                log_evidence[block + i] = top[i] + math.log(total[i] / m)
                effective[block + i] = total[i] * total[i] / square[i]
                for k in range(q):
                    mean[block + i, k] = sums[i, k] / total[i]
            else:
                log_evidence[block + i] = np.nan
                effective[block + i] = np.nan
                mean[block + i, :] = np.nan
