"""Random libraries of Gaussian clouds, and stars out of them, for the tests of every kernel that weighs clouds."""

import numpy as np

from moefast.kernels import Library


def clouds(m, r, t, first=None, seed=0, spread=1.0):
    """Clouds whose tangents are orthonormal and explain a part of the scatter of log g."""
    rng = np.random.default_rng(seed + m + 31 * r + 7 * t)
    tangents = np.linalg.qr(rng.standard_normal((m, r, max(t, 1))))[0].transpose(0, 2, 1)[:, :t]
    variances = rng.uniform(0.1, 3, (m, t)) ** 2
    gains = 0.2 * rng.standard_normal((m, t)) * np.sqrt(variances)
    return Library(
        keys=spread * rng.standard_normal((m, r)) * np.linspace(3, 0.3, r),
        tangents=tangents,
        variances=variances,
        gains=gains,
        rest=rng.uniform(0, 0.2, m),
        log_weights=np.log(rng.dirichlet(np.full(m, 5.0))),
        log_g=rng.uniform(1, 5, m),
        scatter=(gains**2 / variances).sum(1) + rng.uniform(0, 0.1, m),
        first=np.array([0, m] if first is None else first),
    )


def stars_of(library, n, seed=0):
    """Stars out of the clouds, with noise of their level."""
    rng = np.random.default_rng(seed + n)
    m, r = library.keys.shape
    level, j = rng.uniform(0.3, 3, n), rng.integers(0, m, n)
    along = rng.standard_normal((n, library.tangents.shape[1])) * np.sqrt(library.variances[j])
    noise = np.sqrt(library.rest[j, None] + level[:, None] ** 2) * rng.standard_normal((n, r))
    z = library.keys[j] + np.einsum("nt,ntr->nr", along, library.tangents[j]) + noise
    return z.astype(np.float32), np.log(level).astype(np.float32)
