"""Posterior samples of one star by adaptive importance sampling, with an effective sample size that is checked.

    weight_i ∝ N(z_i; 0, I) L(z_i) / q(z_i),    ESS = (Σ w)² / Σ w².

Coordinates z are chosen so that the prior is a standard normal in all of them: a uniform label becomes Φ⁻¹ of its
quantile, which also turns the walls of the box into tails.

Design: adaptive multiple importance sampling (Cornuet et al. 2012, Scand. J. Stat. 39, 798) with tempering. Proposals
are kernel estimates, Student t kernels on centres resampled from the draws so far, the first from a library of prior
draws with approximate likelihoods. For the choice of centres the likelihood enters with an exponent that is as high as
the draws can bear. Draws are weighted by the mixture of all proposals: a bad one costs draws, not truth, and what an
early, wide one found is not lost when later ones are narrow.
The draws that shaped the proposals do not count: a draw that became a centre lies on the peak of its own kernel, which
takes weight from it, and stopping once they look sufficient favours those that have not met a wing. Counted are
independent draws from the mixture as it then stands, as many as its efficiency asks for. If they fall short of the
effective sample size, they shape proposals in their turn and others are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

__all__ = ["Posterior", "effective_sample_size", "sample_posterior"]

F64 = NDArray[np.float64]

CENTRES = 96
WIDE_SHARE = 0.3
WIDE_FACTOR = 2.5
"""Three tenths of the draws use kernels two and a half times as wide: they find what the centres have missed."""
RESERVE = 1.25
"""Draws that count, in units of what the efficiency of the way there promises to suffice."""
FIRST_POPULATION = 4096
WINDOW = 1.0
"""Width of the window that sees a centre's neighbours, in standard deviations of the population."""
LOWEST_ESS = 64.0
"""The exponent rises no faster than leaves this effective sample size."""
EXPONENTS = np.geomspace(1.0, 1e-3, 49)


@dataclass(frozen=True)
class Posterior:
    """Weighted draws from a posterior.

    Attributes
    ----------
    z : array of shape (n, d)
        Coordinates with a standard normal prior.
    weights : array of shape (n,)
        Normalised to 1.
    ess : float
        Effective sample size.
    n_likelihoods : int
        Likelihoods computed, those of the way there included.
    """

    z: F64
    weights: F64
    ess: float
    n_likelihoods: int

    def mean(self, values: F64) -> float:
        """Posterior mean of `values` (n,), one per draw."""
        return float(self.weights @ values)

    def variance(self, values: F64) -> float:
        """Posterior variance of `values`, with the factor ESS/(ESS − 1) against the bias of a finite sample."""
        return float(self.weights @ (values - self.mean(values)) ** 2) * self.ess / max(self.ess - 1.0, 1e-9)

    def monte_carlo_error(self, values: F64) -> float:
        """Standard error of `mean`: √Σ w² (v − mean)²."""
        return math.sqrt(float(self.weights**2 @ (values - self.mean(values)) ** 2))

    def rank(self, values: F64, truth: float) -> float:
        """Posterior probability that the value lies below `truth`: uniform on (0, 1) if the posterior is right."""
        return float(self.weights @ (values < truth))


def effective_sample_size(log_weights: F64) -> float:
    """(Σ w)² / Σ w² of weights given by their logarithms; 0 if none is finite."""
    if not log_weights.size or not np.isfinite(largest := log_weights.max()):
        return 0.0
    weights = np.exp(log_weights - largest)
    return float(weights.sum() ** 2 / (weights**2).sum())


def sample_posterior(
    log_likelihood: Callable[[F64], F64],
    start: F64,
    start_log_likelihood: F64,
    rng: np.random.Generator,
    *,
    target_ess: float = 300.0,
    batch: int = 512,
    max_batches: int = 80,
) -> Posterior:
    """Draw from the posterior of z ~ N(0, I) given a likelihood until the effective sample size is reached.

    Parameters
    ----------
    log_likelihood : callable
        Takes z of shape (n, d), returns (n,).
    start : array of shape (m, d)
        Draws from the prior.
    start_log_likelihood : array of shape (m,)
        Their log-likelihoods, approximate ones will do.
    rng : Generator
    target_ess : float
        Effective sample size that is wanted.
    batch : int
        Likelihoods per call.
    max_batches : int
        Where to give up, at least 2; the effective sample size then tells. Up to half of them shape the proposals.

    Returns
    -------
    Posterior
    """
    best = np.argpartition(start_log_likelihood, -min(FIRST_POPULATION, len(start)))
    best = best[-min(FIRST_POPULATION, len(start)) :]
    exponent = _highest_exponent(np.zeros(len(best)), start_log_likelihood[best])
    proposals = [_Kernels.around(start[best], exponent * start_log_likelihood[best], rng)]
    z = np.empty((0, start.shape[1]))
    log_likelihoods, mixture = np.empty(0), np.empty(0)
    left = max_batches
    while True:
        while True:
            new = proposals[-1].draw(batch, rng)
            # Density of all draws under all proposals: the newest at the old draws, all at the new.
            mixture = np.concatenate([mixture + proposals[-1].density(z), _sum_of_densities(proposals, new)])
            z = np.concatenate([z, new])
            log_likelihoods = np.concatenate([log_likelihoods, log_likelihood(new)])
            left -= 1
            base = -0.5 * (z**2).sum(axis=1) - np.log(mixture)
            reached = effective_sample_size(base + log_likelihoods)
            if reached >= target_ess or left <= max_batches // 2:
                break
            exponent = _highest_exponent(base, log_likelihoods)
            proposals.append(_Kernels.around(z, base + exponent * log_likelihoods, rng))
        wanted = math.ceil(RESERVE * target_ess * len(z) / max(reached, 1.0) / batch)
        n_batches = max(1, min(wanted, left))
        # Equal shares, so that the density of the draws is the mean of the proposals' exactly.
        share = math.ceil(n_batches * batch / len(proposals))
        new = np.concatenate([each.draw(share, rng) for each in proposals])
        new_mixture = _sum_of_densities(proposals, new)
        parts = np.array_split(new, math.ceil(len(new) / batch))
        new_log_likelihoods = np.concatenate([log_likelihood(part) for part in parts])
        left -= n_batches
        log_weights = -0.5 * (new**2).sum(axis=1) - np.log(new_mixture) + new_log_likelihoods
        reached = effective_sample_size(log_weights)
        z = np.concatenate([z, new])
        if reached >= target_ess or left <= n_batches:
            break
        mixture = np.concatenate([mixture, new_mixture])
        log_likelihoods = np.concatenate([log_likelihoods, new_log_likelihoods])
        base = -0.5 * (z**2).sum(axis=1) - np.log(mixture)
        exponent = _highest_exponent(base, log_likelihoods)
        proposals.append(_Kernels.around(z, base + exponent * log_likelihoods, rng))
    weights = np.exp(log_weights - log_weights.max())
    return Posterior(new, weights / weights.sum(), reached, len(z))


def _sum_of_densities(proposals: list[_Kernels], z: F64) -> F64:
    return np.sum([each.density(z) for each in proposals], axis=0)


def _highest_exponent(base: F64, log_likelihoods: F64) -> float:
    """Largest exponent on a grid up to 1 that leaves `LOWEST_ESS`; if none does, the one that leaves most."""
    most, best = -1.0, 1.0
    for exponent in EXPONENTS:
        ess = effective_sample_size(base + exponent * log_likelihoods)
        if ess >= LOWEST_ESS:
            return float(exponent)
        if ess > most:
            most, best = ess, float(exponent)
    return best


@dataclass(frozen=True)
class _Kernels:
    """(1 − ε) mean_c t(z; c, h²S_c) + ε mean_c t(z; c, (2.5 h)²S_c): kernels on centres c, each of its own shape."""

    centres: F64  # (m, d)
    factors: F64  # (m, d, d), Cholesky factors of h²S_c

    @classmethod
    def around(cls, z: F64, log_weights: F64, rng: np.random.Generator) -> _Kernels:
        """Centres resampled from a weighted population; shapes from their neighbours; Silverman's width.

        Posteriors of cool stars are curved sheets: one shape for all would waste most draws. A shape is the
        covariance of the population seen through a Gaussian window, divided by what such a window leaves of a normal
        distribution, and drawn towards the covariance of all where the window holds few.
        """
        d = z.shape[1]
        weights = np.exp(log_weights - log_weights.max())
        members = weights > 1e-6
        z, weights = z[members], weights[members]
        weights /= weights.sum()
        places = (rng.random() + np.arange(CENTRES)) / CENTRES
        chosen, repeats = np.unique(
            np.minimum(np.searchsorted(np.cumsum(weights), places), len(z) - 1), return_counts=True
        )
        centres = z[chosen]
        apart = z - weights @ z
        covariance = (weights * apart.T) @ apart
        covariance[np.diag_indices(d)] += 1e-8
        inverse = np.linalg.inv(np.linalg.cholesky(covariance)).T
        seen = weights * np.exp(-0.5 * _squared_distances(centres @ inverse, z @ inverse) / WINDOW**2)
        held = seen.sum(axis=1) ** 2 / (seen**2).sum(axis=1)
        seen /= seen.sum(axis=1, keepdims=True)
        products = (apart[:, :, None] * apart[:, None, :]).reshape(len(z), d * d)
        means = seen @ apart
        local = (seen @ products).reshape(-1, d, d) - means[:, :, None] * means[:, None, :]
        local *= (1.0 + WINDOW**2) / WINDOW**2
        share = (2.0 * d / (2.0 * d + held))[:, None, None]
        shapes = (1.0 - share) * local + share * covariance
        shapes[:, np.arange(d), np.arange(d)] += 1e-10
        width = (4.0 / (d + 2.0)) ** (1.0 / (d + 4.0)) * CENTRES ** (-1.0 / (d + 4.0))
        factors = width * np.linalg.cholesky(shapes)
        return cls(np.repeat(centres, repeats, axis=0), np.repeat(factors, repeats, axis=0))

    def draw(self, n: int, rng: np.random.Generator) -> F64:
        """Draw n points, shape (n, d): every centre gets its share."""
        d = self.centres.shape[1]
        chosen = rng.permutation(n) % len(self.centres)
        wide = np.where(np.arange(n) < round(WIDE_SHARE * n), WIDE_FACTOR, 1.0)
        nu = _degrees_of_freedom(d)
        scale = wide * np.sqrt(nu / rng.chisquare(nu, n))
        steps = scale[:, None] * rng.standard_normal((n, d))
        return self.centres[chosen] + np.einsum("nij,nj->ni", self.factors[chosen], steps)

    def density(self, z: F64) -> F64:
        """Density at each point, shape (n,)."""
        m, d = self.centres.shape
        nu = _degrees_of_freedom(d)
        inverses = np.linalg.inv(self.factors)
        # |F⁻¹(z − c)|² for all pairs, by one product.
        moved = (inverses.reshape(m * d, d) @ z.T).reshape(m, d, -1)
        moved -= inverses @ self.centres[:, :, None]
        squared = np.einsum("mdn,mdn->mn", moved, moved)
        constant = gammaln(0.5 * (nu + d)) - gammaln(0.5 * nu) - 0.5 * d * math.log(nu * math.pi)
        scale = np.exp(constant - np.log(np.diagonal(self.factors, axis1=1, axis2=2)).sum(axis=1)) / m
        density = np.zeros(len(z))
        for share, width in ((1 - WIDE_SHARE, 1.0), (WIDE_SHARE, WIDE_FACTOR)):
            kernel = _power(1.0 / (1.0 + squared / (nu * width**2)), (nu + d) // 2)
            density += share * (scale @ kernel) / width**d
        return density


def _degrees_of_freedom(d: int) -> int:
    """Of the kernels: 7 or 8, whichever makes the power in their density a whole one, which is five times as fast."""
    return 7 + (d + 1) % 2


def _power(x: F64, n: int) -> F64:
    """Integer power x^n, n ≥ 1, by squaring."""
    result = None
    while True:
        if n & 1:
            result = x if result is None else result * x
        n >>= 1
        if not n:
            return result  # type: ignore[return-value]
        x = x * x


def _squared_distances(a: F64, b: F64) -> F64:
    return np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1)[None, :] - 2.0 * (a @ b.T), 0.0)
