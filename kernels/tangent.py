"""Posterior of log g over a mixture of Gaussian clouds of clean spectra, each with a regression of log g of its own.

Cloud j has a mean k_j, orthonormal tangents q_jt with variances d_jt² and ε_j² in all other directions; a star z with
white noise of level s therefore has, with δ = z − k_j, u_t = q_jtᵀδ, v_t = d_jt² + s², w = ε_j² + s²,

    e_j    = ln π_j − ½ [(‖δ‖² − Σ_t u_t²)/w + Σ_t u_t²/v_t + (r − t) ln w + Σ_t ln v_t],
    mean_j = y_j + Σ_t g_jt u_t / v_t,    var_j = max(τ_j² − Σ_t g_jt² / v_t, 0),

and expert k, to which clouds j ∈ k belong, weighs them by ω_j = exp(e_j − log Z_k),

    log Z_k = ln Σ_{j∈k} exp e_j,    mean_k = Σ ω_j mean_j,    sd_k² = Σ ω_j [var_j + (mean_j − mean_k)²].

Design: the contract is `tangent_posterior_reference`. `BLOCK` stars lie side by side, a coordinate of all of them in a
row of memory, and meet one cloud after the other, whose numbers are factors that stand in registers while the stars
pass. All loops run over stars, so the SIMD lanes are stars, and a star's numbers depend on that star and the library
alone: a block is filled up with zeros. Clouds that are far from a star cannot be left out: on simulated spectra a third
of an expert's clouds have a say in it, and half have to be multiplied before that is known.

δ is formed before it is multiplied, in float32: the product form q·z − q·k loses the digits that ‖z‖ has above ‖δ‖,
many units of the exponent for a star far brighter than its noise. The logarithm of all v_t/w is that of the product of
their mantissas, plus the sum of their binary exponents, which cannot overflow. What is left is the rounding of
‖δ‖² − Σ u_t², 1e-7 of ‖δ‖²: an exponent is off by 0.01 where the star lies a hundred noise levels along a tangent.
Floor: r (t + 1) multiply-adds per star and cloud.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moefast.core.compiled import njit
from moefast.core.threads import in_threads
from moefast.kernels.cpu import FAST, exp32, log32
from moefast.kernels.dispatch import on_cuda

__all__ = ["Library", "TangentPosterior", "check_stars", "tangent_posterior"]

F32 = NDArray[np.float32]
BLOCK = 128
"""Stars side by side."""
STEP = 4
"""Coordinates, and tangents, that are looked at together; both are filled up with zeros to whole steps."""
PANEL = 64
"""Coordinates that stay in the nearest cache while all tangents of a cloud pass over them."""
LARGEST = np.float32(1e15)
"""Coordinates beyond this have squares that do not fit float32; such stars have no answer."""
HOPELESS = np.float32(-1e30)
"""Exponents below this overflowed on the way, and so may the mean have done."""
LEAST_VARIANCE = np.float32(1e-18)
"""Noise variances below this have products that do not fit float32; such stars have no answer."""
MOST_TANGENTS = 120
"""A product of as many mantissas fits float32."""
ZERO32 = np.float32(0.0)


@dataclass(frozen=True)
class Library:
    """m Gaussian clouds of clean spectra in r noise-white coordinates, sorted by expert.

    Attributes
    ----------
    keys : array of shape (m, r), float32
        Means k_j.
    tangents : array of shape (m, t, r), float32
        Orthonormal rows q_jt. Where a cloud has fewer than t, rows of zeros; give these the variance `rest`.
    variances : array of shape (m, t), float32
        d_jt², variance of the cloud along each tangent.
    gains : array of shape (m, t), float32
        g_jt, covariance of the coordinate along each tangent with log g.
    rest : array of shape (m,), float32
        ε_j², mean variance in the directions outside of the tangents.
    log_weights : array of shape (m,), float32
        ln π_j, π_j the cloud's share of the training stars.
    log_g : array of shape (m,), float32
        y_j, mean log g of the cloud, dex.
    scatter : array of shape (m,), float32
        τ_j², variance of log g in the cloud, dex².
    first : array of shape (K + 1,), int64
        Clouds first[k] to first[k + 1] belong to expert k, which may have none.
    """

    keys: F32
    tangents: F32
    variances: F32
    gains: F32
    rest: F32
    log_weights: F32
    log_g: F32
    scatter: F32
    first: NDArray[np.int64]
    arrays: tuple = field(init=False, repr=False)

    def __post_init__(self) -> None:
        names = ("keys", "tangents", "variances", "gains", "rest", "log_weights", "log_g", "scatter")
        for name in names:
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), np.float32))
        object.__setattr__(self, "first", np.ascontiguousarray(self.first, np.int64))
        if self.keys.ndim != 2 or self.tangents.ndim != 3 or self.keys.size == 0:
            raise ValueError(
                "keys (m, r) of at least one cloud and tangents (m, t, r) expected; "
                f"found {self.keys.shape} and {self.tangents.shape}"
            )
        (m, r), t = self.keys.shape, self.tangents.shape[1]
        shapes = ((m, r), (m, t, r), (m, t), (m, t), (m,), (m,), (m,), (m,))
        for name, shape in zip(names, shapes, strict=True):
            array = getattr(self, name)
            if array.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, found {array.shape}")
            bad = ~(np.abs(array.reshape(m, -1)) < LARGEST).all(1)
            if bad.any():
                raise ValueError(
                    f"{name} must be finite, below {LARGEST:g}; cloud {int(bad.argmax())} is not"
                )
        for name in ("variances", "rest", "scatter"):
            if (getattr(self, name) < 0).any():
                raise ValueError(f"{name} must not be negative")
        if t > MOST_TANGENTS:
            raise ValueError(f"{MOST_TANGENTS} tangents at most expected, found {t}")
        first = self.first
        if first.ndim != 1 or len(first) < 2 or first[0] != 0 or first[-1] != m or (np.diff(first) < 0).any():
            raise ValueError(f"first must rise from 0 to {m}, found {first.tolist()}")
        object.__setattr__(self, "arrays", self._laid_out())

    def _laid_out(self) -> tuple:
        """The numbers as the kernel takes them: whole steps of coordinates and of tangents."""
        (m, r), t = self.keys.shape, self.tangents.shape[1]
        wide, filled = r + -r % STEP, t + -t % STEP
        keys, tangents = np.zeros((m, wide), np.float32), np.zeros((m, filled, wide), np.float32)
        gains = np.zeros((m, filled), np.float32)
        keys[:, :r], tangents[:, :t, :r], gains[:, :t] = self.keys, self.tangents, self.gains
        # A tangent that is not there has v_t/w = 1.
        variances = np.repeat(self.rest[:, None], filled, axis=1)
        variances[:, :t] = self.variances
        return (
            keys, tangents, variances, gains, self.rest, self.log_weights, self.log_g, self.scatter, self.first,
            np.float32(r),
        )  # fmt: skip

    @property
    def n_experts(self) -> int:
        """Number of experts K."""
        return len(self.first) - 1


@dataclass(frozen=True)
class TangentPosterior:
    """What `tangent_posterior` returns.

    Attributes
    ----------
    mean, sd : array of shape (n, K), float32, dex
        Posterior mean and standard deviation of log g by each expert; NaN for an expert without clouds.
    log_evidence : array of shape (n, K), float32
        log Z_k, without the constant of the normal distribution; −∞ for an expert without clouds.
    effective : array of shape (n,), float32
        How many clouds of all experts share the weight, 1/Σω², with ω normalised over all: from 1 to m.
    """

    mean: F32
    sd: F32
    log_evidence: F32
    effective: F32


def tangent_posterior(
    z: ArrayLike, log_level: ArrayLike, library: Library, *, backend: str = "cpu"
) -> TangentPosterior:
    """Posterior of log g by each expert of a library of clouds, and its evidence; see the module's equations.

    Parameters
    ----------
    z : array of shape (n, r)
        Stars in coordinates in which the noise is white: of variance s² in each.
    log_level : array of shape (n,)
        ln s of each star.
    library : Library
    backend : "cpu" or "cuda"

    Returns
    -------
    TangentPosterior
        NaN for a star with a coordinate that is not finite, or beyond 1e15, or a level s that is not finite, or s² not
        between 1e-18 and 1e15. An expert all of whose clouds are so far away that the exponent does not fit float32
        has no evidence (−∞) and no mean.

    Raises
    ------
    ValueError
        Shapes that do not fit.
    BackendError
        The backend is unknown, or there is no usable CUDA device.
    """
    if backend != "cpu":
        return on_cuda("tangent_posterior", backend)(z, log_level, library)
    stars, square = check_stars(z, log_level, library)
    n, k = len(stars), library.n_experts
    out = TangentPosterior(*(np.empty(shape, np.float32) for shape in ((n, k), (n, k), (n, k), n)))

    def run(first: int, stop: int) -> None:
        here = slice(first * BLOCK, stop * BLOCK)
        rows = (stars[here], square[here])
        found = (out.mean[here], out.sd[here], out.log_evidence[here], out.effective[here])
        _posterior(*(*rows, *library.arrays, *found))

    in_threads(-(-n // BLOCK), run, least=1)
    return out


def check_stars(z: ArrayLike, log_level: ArrayLike, library: Library) -> tuple[F32, F32]:
    """Checked z (n, r) and noise variances s² (n,), NaN for stars without an answer; both contiguous float32.

    Raises
    ------
    ValueError
        See `tangent_posterior`.
    """
    stars, level = np.asarray(z), np.asarray(log_level, np.float64)
    r = library.keys.shape[1]
    if stars.ndim != 2 or stars.shape[1] != r:
        raise ValueError(f"z of shape (n, {r}) expected; found {stars.shape}")
    if level.shape != (len(stars),):
        raise ValueError(f"log_level of shape ({len(stars)},) expected; found {level.shape}")
    # What does not fit float32 gives no answer.
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        stars = np.ascontiguousarray(stars, np.float32)
        square = np.exp(2 * level).astype(np.float32)
        good = (np.abs(stars) < LARGEST).all(1) & (square >= LEAST_VARIANCE) & (square < LARGEST)
    square[~good] = np.nan
    return stars, square


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _add_squares(stars, key, square):  # type: ignore[no-untyped-def]
    """Add Σ_c (z_c − k_c)² of all stars of a block; `stars` (r, BLOCK)."""
    # Four coordinates at a time: loads and stores of the sums would cost as much as the differences.
    for c in range(0, key.size, STEP):
        k0, k1, k2, k3 = key[c], key[c + 1], key[c + 2], key[c + 3]
        z0, z1, z2, z3 = stars[c], stars[c + 1], stars[c + 2], stars[c + 3]
        for i in range(BLOCK):
            x0, x1, x2, x3 = z0[i] - k0, z1[i] - k1, z2[i] - k2, z3[i] - k3
            square[i] += (x0 * x0 + x1 * x1) + (x2 * x2 + x3 * x3)


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _add_products(stars, key, q0, q1, q2, q3, along):  # type: ignore[no-untyped-def]
    """along[t] += Σ_c q_tc (z_c − k_c) of all stars of a block, for four tangents."""
    u0, u1, u2, u3 = along[0], along[1], along[2], along[3]
    # Sixteen factors stand in registers while the stars pass: twelve loads and stores for sixteen multiply-adds.
    # Differences made anew for each four tangents cost less than stores and loads of them.
    for c in range(0, key.size, STEP):
        a0, a1, a2, a3 = q0[c], q0[c + 1], q0[c + 2], q0[c + 3]
        b0, b1, b2, b3 = q1[c], q1[c + 1], q1[c + 2], q1[c + 3]
        e0, e1, e2, e3 = q2[c], q2[c + 1], q2[c + 2], q2[c + 3]
        f0, f1, f2, f3 = q3[c], q3[c + 1], q3[c + 2], q3[c + 3]
        k0, k1, k2, k3 = key[c], key[c + 1], key[c + 2], key[c + 3]
        z0, z1, z2, z3 = stars[c], stars[c + 1], stars[c + 2], stars[c + 3]
        for i in range(BLOCK):
            x0, x1, x2, x3 = z0[i] - k0, z1[i] - k1, z2[i] - k2, z3[i] - k3
            u0[i] += (a0 * x0 + a1 * x1) + (a2 * x2 + a3 * x3)
            u1[i] += (b0 * x0 + b1 * x1) + (b2 * x2 + b3 * x3)
            u2[i] += (e0 * x0 + e1 * x1) + (e2 * x2 + e3 * x3)
            u3[i] += (f0 * x0 + f1 * x1) + (f2 * x2 + f3 * x3)


@njit(cache=True, inline="always")
def _mantissa(bits):  # type: ignore[no-untyped-def]
    """Mantissa of a positive number, from 1 to 2."""
    return np.int32((bits & np.int32(0x007FFFFF)) | np.int32(0x3F800000)).view(np.float32)


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _add_tangents(  # type: ignore[no-untyped-def]
    along, d, g, noise, inverse, square, chi2, mean, known, mantissa, exponent
):
    """What four tangents add to χ², the mean, the variance of log g that is explained, and ln Π v_t/w."""
    u0, u1, u2, u3 = along[0], along[1], along[2], along[3]
    d0, d1, d2, d3 = d[0], d[1], d[2], d[3]
    g0, g1, g2, g3 = g[0], g[1], g[2], g[3]
    h0, h1, h2, h3 = g0 * g0, g1 * g1, g2 * g2, g3 * g3
    for i in range(BLOCK):
        v0, v1, v2, v3 = d0 + noise[i], d1 + noise[i], d2 + noise[i], d3 + noise[i]
        # One division for two.
        first, last = np.float32(1.0) / (v0 * v1), np.float32(1.0) / (v2 * v3)
        i0, i1, i2, i3 = first * v1, first * v0, last * v3, last * v2
        x0, x1, x2, x3 = u0[i], u1[i], u2[i], u3[i]
        p0, p1, p2, p3 = x0 * i0, x1 * i1, x2 * i2, x3 * i3
        square[i] -= (x0 * x0 + x1 * x1) + (x2 * x2 + x3 * x3)
        chi2[i] += (x0 * p0 + x1 * p1) + (x2 * p2 + x3 * p3)
        mean[i] += (g0 * p0 + g1 * p1) + (g2 * p2 + g3 * p3)
        known[i] += (h0 * i0 + h1 * i1) + (h2 * i2 + h3 * i3)
        one = inverse[i]
        b0, b1 = np.float32(v0 * one).view(np.int32), np.float32(v1 * one).view(np.int32)
        b2, b3 = np.float32(v2 * one).view(np.int32), np.float32(v3 * one).view(np.int32)
        mantissa[i] *= (_mantissa(b0) * _mantissa(b1)) * (_mantissa(b2) * _mantissa(b3))
        more = np.int32(np.int32(b0 >> np.int32(23)) + np.int32(b1 >> np.int32(23)))
        more = np.int32(more + np.int32(np.int32(b2 >> np.int32(23)) + np.int32(b3 >> np.int32(23))))
        exponent[i] = np.int32(exponent[i] + more)


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _begin(noise, rest, inverse, chi2, mean, known, mantissa, exponent):  # type: ignore[no-untyped-def]
    """Fill inverse = 1/w, and empty all sums."""
    for i in range(BLOCK):
        inverse[i] = np.float32(1.0) / (rest + noise[i])
        chi2[i] = np.float32(0.0)
        mean[i] = np.float32(0.0)
        known[i] = np.float32(0.0)
        mantissa[i] = np.float32(1.0)
        exponent[i] = np.int32(0)


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _conclude(  # type: ignore[no-untyped-def]
    noise, rest, inverse, square, chi2, mantissa, exponent, bias, r, log_weight, scatter, known, log_g, mean, variance,
    e, top,
):  # fmt: skip
    """Exponent of a cloud without −r/2 ln s², its mean and variance, and the largest exponent so far."""
    for i in range(BLOCK):
        whole = chi2[i] + max(square[i], np.float32(0.0)) * inverse[i]
        spread = r * log32(np.float32(1.0) + rest / noise[i])
        spread += log32(mantissa[i]) + np.float32(0.6931471805599453) * np.float32(
            np.int32(exponent[i] - bias)
        )
        found = log_weight - np.float32(0.5) * (whole + spread)
        sound = found > HOPELESS
        e[i] = found if sound else np.float32(-np.inf)
        mean[i] = log_g + mean[i] if sound else log_g
        variance[i] = max(scatter - known[i], np.float32(0.0))
        top[i] = max(top[i], e[i])


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _weigh(e, top, mean, total, squares, first):  # type: ignore[no-untyped-def]
    """Replace exponents by their exponentials above the largest; Σω, Σω² and Σω mean."""
    for i in range(BLOCK):
        share = exp32(e[i] - top[i])
        share = share if e[i] > HOPELESS else np.float32(0.0)
        e[i] = share
        total[i] += share
        squares[i] += share * share
        first[i] += share * mean[i]


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _scatter(share, mean, variance, centre, second):  # type: ignore[no-untyped-def]
    """Add ω [var + (mean − centre)²]."""
    for i in range(BLOCK):
        apart = mean[i] - centre[i]
        second[i] += share[i] * (variance[i] + apart * apart)


@njit(nogil=True, cache=True, error_model="numpy")
def _posterior(  # type: ignore[no-untyped-def]
    z, noise, keys, tangents, variances, gains, rest, log_weights, log_g, scatter, first, r,
    mean, sd, log_evidence, effective,
):  # fmt: skip
    """Posterior of each row; `z` (n, r), `noise` (n,) = s² or NaN; the rest as `Library` lays it out."""
    n, filled, wide, k = len(z), tangents.shape[1], keys.shape[1], len(first) - 1
    bias = np.int32(127 * filled)
    largest = 0
    for j in range(k):
        largest = max(largest, first[j + 1] - first[j])
    stars, along = np.zeros((wide, BLOCK), np.float32), np.empty((filled, BLOCK), np.float32)
    es, means = np.empty((largest, BLOCK), np.float32), np.empty((largest, BLOCK), np.float32)
    spreads = np.empty((largest, BLOCK), np.float32)
    scratch = np.empty((10, BLOCK), np.float32)
    s2, square, inverse, chi2, known = scratch[0], scratch[1], scratch[2], scratch[3], scratch[4]
    mantissa, total, squares, centre, second = scratch[5], scratch[6], scratch[7], scratch[8], scratch[9]
    exponent = np.empty(BLOCK, np.int32)
    tops, totals, of_squares = np.empty((k, BLOCK), np.float32), np.empty((k, BLOCK)), np.empty((k, BLOCK))
    for block in range(0, n, BLOCK):
        rows = min(BLOCK, n - block)
        for i in range(BLOCK):
            there = i < rows and not math.isnan(noise[block + i])
            s2[i] = noise[block + i] if there else np.float32(1.0)
            for c in range(z.shape[1]):
                stars[c, i] = z[block + i, c] if there else np.float32(0.0)
        for expert in range(k):
            begin, stop = first[expert], first[expert + 1]
            top = tops[expert]
            top[:] = -np.inf
            for j in range(begin, stop):
                place = j - begin
                one = means[place]
                _begin(s2, rest[j], inverse, chi2, one, known, mantissa, exponent)
                square[:] = ZERO32
                along[:] = ZERO32
                for c in range(0, wide, PANEL):
                    panel, key = stars[c : c + PANEL], keys[j, c : c + PANEL]
                    _add_squares(panel, key, square)
                    for t in range(0, filled, STEP):
                        q = tangents[j, t : t + STEP, c : c + PANEL]
                        _add_products(panel, key, q[0], q[1], q[2], q[3], along[t : t + STEP])
                for t in range(0, filled, STEP):
                    _add_tangents(
                        along[t : t + STEP], variances[j, t : t + STEP], gains[j, t : t + STEP], s2, inverse,
                        square, chi2, one, known, mantissa, exponent,
                    )  # fmt: skip
                _conclude(
                    s2, rest[j], inverse, square, chi2, mantissa, exponent, bias, r, log_weights[j], scatter[j], known,
                    log_g[j], one, spreads[place], es[place], top,
                )  # fmt: skip
            total[:], squares[:], centre[:], second[:] = ZERO32, ZERO32, ZERO32, ZERO32
            for place in range(stop - begin):
                _weigh(es[place], top, means[place], total, squares, centre)
            for i in range(BLOCK):
                centre[i] /= total[i]
            for place in range(stop - begin):
                _scatter(es[place], means[place], spreads[place], centre, second)
            for i in range(BLOCK):
                totals[expert, i], of_squares[expert, i] = total[i], squares[i]
            for i in range(rows):
                if math.isnan(noise[block + i]):
                    mean[block + i, expert], sd[block + i, expert] = np.nan, np.nan
                    log_evidence[block + i, expert] = np.nan
                elif top[i] == -np.inf:
                    mean[block + i, expert], sd[block + i, expert] = np.nan, np.nan
                    log_evidence[block + i, expert] = -np.inf
                else:
                    mean[block + i, expert] = centre[i]
                    sd[block + i, expert] = math.sqrt(second[i] / total[i])
                    level = 0.5 * np.float64(r) * math.log(np.float64(s2[i]))
                    log_evidence[block + i, expert] = top[i] + math.log(totals[expert, i]) - level
        for i in range(rows):
            highest = -np.inf
            for expert in range(k):
                highest = max(highest, np.float64(tops[expert, i]))
            if math.isnan(noise[block + i]) or highest == -np.inf:
                effective[block + i] = np.nan
                continue
            whole, whole_square = 0.0, 0.0
            for expert in range(k):
                share = math.exp(tops[expert, i] - highest)
                whole += share * totals[expert, i]
                whole_square += share * share * of_squares[expert, i]
            effective[block + i] = whole * whole / whole_square
