"""The Bayes ceiling: the posterior of log g of every star under the prior and the noise that made it.

    R²max = 1 − E[Var(log g | x)] / Var(log g).

The posterior mean is the best prediction there is; no estimator has a lower mean squared error on stars drawn from that
prior. What the observer knows: the noisy spectrum, the magnitude, the seeing, and how stars and noise are distributed.

Design: one library of prior draws for all stars, seen in a whitened principal-component subspace, starts an adaptive
importance sampler per star (`posterior`); the likelihood is the full one over all pixels (`kernels`), with the variance
of the star supposed. Stars are independent and have generators of their own, so results do not depend on the number of
threads. One Python thread per core, BLAS on one: nearly all work releases the GIL.
Cost: 3000 likelihoods and 0.15 s of a core per star without nuisances, 5800 and 0.47 s with those of `survey`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri
from scipy.stats import qmc

from moefast.ceilings.likelihood import VisitLikelihood
from moefast.ceilings.posterior import sample_posterior
from moefast.core.threads import CORES, one_blas_thread
from moefast.kernels import gaussian_log_likelihood
from moefast.simulate.emulator import LABELS
from moefast.simulate.forward import ForwardModel
from moefast.simulate.noise import SkyFactors
from moefast.simulate.rows import SEEING_MEDIAN

__all__ = ["StarPosteriors", "TemplateLibrary", "posteriors"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

LIBRARY_SIZE = 1 << 16
LIBRARY_SEED = 20250103
COMPONENTS = 64
POWER_ITERATIONS = 4
"""Of the search for the leading components: what they leave out is then that of the best to some thousandths."""
ROWS_AT_A_TIME = 512
TARGET_ESS = 250.0


@dataclass(frozen=True)
class TemplateLibrary:
    """Prior draws with their spectra as coordinates in a whitened subspace.

    Attributes
    ----------
    z : array of shape (m, d)
    keys : array of shape (m, k), float32
        (f − mean)/σ₀ on the leading principal components.
    """

    z: F64
    keys: F32
    _norms: F32
    _mean: F32
    _whitener: F32
    _directions: F32
    _away: F32

    @classmethod
    def draw(cls, forward: ForwardModel, *, size: int = LIBRARY_SIZE) -> TemplateLibrary:
        """Draw from the prior; whiten for the noise of the middle magnitude and the usual seeing.

        It depends on the settings alone, never on the stars that it will serve.
        """
        from sklearn.utils.extmath import randomized_svd

        sobol = qmc.Sobol(len(forward.names), scramble=True, rng=LIBRARY_SEED)
        z = ndtri(sobol.random(size))
        sample = forward.flux(forward.parameters(z[: min(size, 4096)]))
        mean = sample.mean(axis=0)
        terms = forward.variance_terms(sum(forward.settings.mag) / 2, SEEING_MEDIAN)
        level = mean @ terms["band_weight"]
        variance = terms["constant"] + level * terms["linear"] * mean + level**2 * terms["quadratic"]
        whitener = (1.0 / np.sqrt(variance)).astype(np.float32)
        white = (sample - mean) * whitener
        shapes = forward.calibration_shapes
        away = np.zeros((len(mean), 0), np.float32)
        if shapes is not None:
            # Directions in which calibration errors move a spectrum tell nothing here.
            away, _ = np.linalg.qr((shapes * mean * whitener).T)
            away = away.astype(np.float32)
            white -= (white @ away) @ away.T
        # A tenth of the time of all eigenvectors; the seed is a constant.
        _, _, leading = randomized_svd(white, COMPONENTS, n_iter=POWER_ITERATIONS, random_state=0)
        directions = np.ascontiguousarray(leading.T, dtype=np.float32)
        keys = np.empty((size, directions.shape[1]), dtype=np.float32)

        def fill(first: int) -> None:
            rows = slice(first, first + ROWS_AT_A_TIME)
            flux = forward.flux(forward.parameters(z[rows]))
            flux -= mean
            flux *= whitener
            keys[rows] = flux @ directions

        with one_blas_thread(), ThreadPoolExecutor(CORES) as pool:
            list(pool.map(fill, range(0, size, ROWS_AT_A_TIME)))
        return cls(z, keys, (keys**2).sum(axis=1), mean, whitener, directions, away)

    def log_likelihood(self, data: F64, error: F64, good: NDArray[np.bool_] | None) -> F64:
        """Approximate log-likelihood of every draw, shape (m,): white noise of one level in the subspace.

        Of a star that has lost pixels the others count as they are, with the calibration free; lost pixels taken as
        the mean spectrum would draw the start towards it.
        """
        use = np.ones(len(self._mean), bool) if good is None else good
        apart = np.where(use, data - self._mean, 0.0).astype(np.float32) * self._whitener
        level = float(np.median((error * self._whitener)[use] ** 2))
        if use.all():
            key = apart @ self._directions
            return -0.5 * (self._norms - 2.0 * (self.keys @ key)).astype(float) / level
        seen = np.concatenate([self._directions, self._away], axis=1) * use[:, None].astype(np.float32)
        matrix, vector = (seen.T @ seen).astype(float), (seen.T @ apart).astype(float)
        k = self.keys.shape[1]
        free = np.linalg.solve(
            matrix[k:, k:] + 1e-6 * np.eye(len(matrix) - k), np.column_stack([matrix[k:, :k], vector[k:]])
        )
        vector = vector[:k] - matrix[:k, k:] @ free[:, -1]
        matrix = matrix[:k, :k] - matrix[:k, k:] @ free[:, :-1]
        curved = self.keys @ matrix.astype(np.float32)
        gain = self.keys @ vector.astype(np.float32) - 0.5 * np.einsum("mk,mk->m", curved, self.keys)
        return gain.astype(float) / level


@dataclass(frozen=True)
class StarPosteriors:
    """What is kept of the posterior of each star.

    Attributes
    ----------
    mean, sd, monte_carlo_error : arrays of shape (n,)
        Posterior mean and standard deviation of log g [dex], and the standard error of the mean.
    ess : array of shape (n,)
        Effective sample size.
    n_likelihoods : array of shape (n,), int64
    rank : array of shape (n, 5)
        Posterior probability that each label lies below its true value, in the order of `LABELS`; NaN where a label
        is not varied or unknown.
    """

    mean: F64
    sd: F64
    monte_carlo_error: F64
    ess: F64
    n_likelihoods: NDArray[np.int64]
    rank: F64


def posteriors(
    forward: ForwardModel,
    library: TemplateLibrary,
    rows: NDArray[np.integer],
    data: NDArray[np.floating],
    error: NDArray[np.floating],
    mag: F64,
    seeing: F64,
    truth: dict[str, F64],
    *,
    good: NDArray[np.bool_] | None = None,
    sky: SkyFactors | None = None,
    target_ess: float = TARGET_ESS,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> StarPosteriors:
    """Posterior of each star of a block.

    Parameters
    ----------
    forward : ForwardModel
    library : TemplateLibrary
    rows : array of shape (n,)
        Row of each star in its set: its random numbers belong to it, whatever the block.
    data, error : arrays of shape (n, p)
        Noisy flux and 1σ; the errors serve for the start only.
    mag, seeing : arrays of shape (n,)
    truth : dict of str to array of shape (n,)
        True labels, for the ranks.
    good : array of shape (n, p), bool, optional
    sky : SkyFactors, optional
        Brightness of each star's sky, where visits differ.
    target_ess : float
    seed : int
    threads : int, optional
        As many as there are cores if absent.
    progress : callable
        Called with the number of stars done, after each.
    """
    varied = [name in forward.uniform for name in LABELS]
    shapes = forward.calibration_shapes

    def one(i: int) -> list[float]:
        x = np.asarray(data[i], dtype=float)
        use = None if good is None else good[i]
        log_likelihood: Callable[[F64], F64]
        if sky is None:
            terms = forward.variance_terms(float(mag[i]), float(seeing[i]))

            def log_likelihood(z: F64) -> F64:
                flux = forward.flux(forward.parameters(z))
                return gaussian_log_likelihood(flux, x, basis=shapes, good=use, **terms)
        else:
            own = SkyFactors(sky.continuum[i : i + 1], sky.lines[i : i + 1])
            likelihood = VisitLikelihood(
                x, use, shapes, forward.sky_shapes(float(mag[i]), float(seeing[i]), own),
                **forward.variance_terms(float(mag[i]), float(seeing[i]), own),
            )  # fmt: skip

            def log_likelihood(z: F64) -> F64:
                return likelihood(forward.flux(forward.parameters(z)))

        found = sample_posterior(
            log_likelihood,
            library.z,
            library.log_likelihood(x, np.asarray(error[i], dtype=float), use),
            np.random.default_rng((seed, int(rows[i]))),
            target_ess=target_ess,
        )
        values = forward.parameters(found.z)
        log_g = values["log_g"]
        numbers = [found.mean(log_g), found.variance(log_g) ** 0.5, found.monte_carlo_error(log_g)]
        ranks = [
            found.rank(values[name], truth[name][i]) if vary and name in truth else np.nan
            for name, vary in zip(LABELS, varied, strict=True)
        ]
        return [*numbers, found.ess, found.n_likelihoods, *ranks]

    with one_blas_thread(), ThreadPoolExecutor(threads or CORES) as pool:
        numbers: list[list[float]] = []
        for row in pool.map(one, range(len(rows))):
            numbers.append(row)
            progress(len(numbers))
        table = np.array(numbers).reshape(len(rows), 10)
    return StarPosteriors(
        table[:, 0], table[:, 1], table[:, 2], table[:, 3], table[:, 4].astype(np.int64), table[:, 5:]
    )
