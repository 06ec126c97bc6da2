"""Template libraries: posterior means over clouds of clean training spectra.

Design: a library of single templates has to be dense where spectra are bright, and labels and nuisances have five
dimensions and more. Here a template is a cloud of training stars in the noise-white components z: its mean, the few
directions in which it extends (tangents of the manifold of spectra), and the regression of log g on them. With the
noise s² of a star its likelihood is a normal density of covariance C + s² I, its posterior mean a linear function of z,
and a few hundred clouds do the work of very many points. As the clouds' sizes shrink, this becomes the posterior mean
over single templates. In the language of statistics: a mixture of factor analysers on spectrum and label.

Clouds are found by k-means among the stars of an expert's bin, where labels count beside components: a cloud should be
small in what is asked for. Components count relative to √(their variance + noise), so that none drowns the others and
those below the noise hardly count.

Sources: Ghahramani & Hinton 1996 (mixtures of factor analysers); Cleveland 1979 (local linear regression).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moefast.experts.protocol import Expert, ExpertValues, Inputs, expert
from moefast.kernels import Library, forward_tangent, tangent_posterior
from moefast.ops.arithmetic import SolvingArithmetic

if TYPE_CHECKING:
    from typing import Self

__all__ = [
    "TemplateMeans",
    "Templates",
    "choose_library",
    "clouds_of_bins",
    "fit_library",
    "library_mean",
    "with_fewer_tangents",
]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

SIZES = (150, 300, 600, 1200)
"""Clouds of a library that are tried."""
TANGENTS = (4, 8, 16, 24)
"""Tangents of a cloud that are tried."""
R2_LOSS = 2e-3
"""R² that may be lost to a smaller library, which takes less time."""
LEAST_STARS = 40
"""Stars per cloud, at the least on average: a tangent is an average over them."""
LABEL_WEIGHT = 4.0
"""What a standard deviation of a label counts in k-means beside that of a component."""
ROUNDS = 15
"""Of k-means; it need not converge, any partition into small clouds will do."""
BLOCK = 8192


@expert
@dataclass(frozen=True)
class Templates(Expert):
    """Posterior means over the clouds of each bin, and their evidence, which is a gate by itself.

    Attributes
    ----------
    library : Library
        In the principal components of the mixture.
    """

    library: Library

    family: ClassVar[str] = "template"
    on_cuda: ClassVar[bool] = True
    has_noise: ClassVar[bool] = True

    @property
    def stem(self) -> str:
        """A mixture has one library."""
        return "library"

    def check(self, n_experts: int, n_components: int, n_pixels: int) -> None:
        """See `Expert.check`."""
        library = self.library
        if library.n_experts != n_experts or library.keys.shape[1] != n_components:
            raise ValueError(
                f"a library of {n_experts} experts in {n_components} components expected; found "
                f"{library.n_experts} in {library.keys.shape[1]}"
            )

    def describe(self, op: SolvingArithmetic, seen: Mapping[str, Any]) -> ExpertValues:
        """See `moefast.kernels.forward_tangent`."""
        library = self.library
        shape, sizes = library.tangents.shape, np.diff(library.first).tolist()
        found = forward_tangent.tangent_posterior(op, shape, sizes, seen["z"], seen["least_level"])
        # Relative to the best: in single precision, large ones would lose the digits that matter.
        evidence = op.subtract(found.evidence, op.largest(found.evidence, 1))
        return ExpertValues(op.single(found.mean), op.single(found.sd), op.single(evidence))

    def evaluate(self, inputs: Inputs) -> ExpertValues:
        """The same by the compiled kernel."""
        return self.posterior(inputs)

    def posterior(self, inputs: Inputs) -> ExpertValues:
        """Means, their standard deviations and the evidence of all bins, by the compiled kernel."""
        level = inputs.log_level if inputs.least_level is None else inputs.least_level
        found = tangent_posterior(inputs.z, level, self.library)
        evidence = found.log_evidence - found.log_evidence.max(1, keepdims=True)
        return ExpertValues(found.mean, found.sd, evidence)

    def arrays(self) -> dict[str, NDArray]:
        """Arrays of the library, and the number of clouds of each expert, `sizes`."""
        own = {name: getattr(self.library, name) for name in forward_tangent.NUMBERS}
        return own | {"sizes": np.diff(self.library.first)}

    @classmethod
    def from_arrays(cls, read: Callable[[str], NDArray]) -> Self:
        """The inverse of `arrays`.

        Raises
        ------
        ValueError
            They do not fit together.
        """
        first = np.concatenate([[0], np.cumsum(read("sizes"))])
        return cls(Library(**{name: read(name) for name in forward_tangent.NUMBERS}, first=first))

    def of_bin(self, k: int) -> Templates:
        """The clouds of one bin as a library of one expert."""
        here = slice(self.library.first[k], self.library.first[k + 1])
        own = {name: getattr(self.library, name)[here] for name in forward_tangent.NUMBERS}
        return Templates(Library(**own, first=np.array([0, here.stop - here.start])))


@expert
@dataclass(frozen=True)
class TemplateMeans(Templates):
    """The same posterior means for a gate that was fitted without evidence, which does not count."""

    family: ClassVar[str] = "template-means"
    on_cuda: ClassVar[bool] = False

    def describe(self, op: SolvingArithmetic, seen: Mapping[str, Any]) -> ExpertValues:
        """See `Templates.describe`."""
        return super().describe(op, seen)._replace(evidence=None)

    def evaluate(self, inputs: Inputs) -> ExpertValues:
        """The same by the compiled kernel."""
        return self.posterior(inputs)._replace(evidence=None)


def fit_library(
    z: F32,
    labels: F64,
    log_g: F64,
    bins: NDArray[np.integer],
    n_experts: int,
    *,
    n_clouds: int,
    n_tangents: int,
    seed: int = 0,
) -> Library:
    """Clouds of the stars of each bin, as many as its share of the stars.

    Parameters
    ----------
    z : array of shape (n, r), float32
        Stars in noise-white components, without noise. (Clouds of noisy stars would be noise in most directions.)
    labels : array of shape (n, l)
        What a cloud should be small in; any scale.
    log_g : array of shape (n,), dex
    bins : array of shape (n,), int
        0 … n_experts − 1.
    n_experts : int
    n_clouds, n_tangents : int
        Clouds in all, and tangents of each.
    seed : int

    Returns
    -------
    Library

    Raises
    ------
    ValueError
        A bin is empty.
    """
    clouds, first = clouds_of_bins(z, labels, bins, n_experts, n_clouds=n_clouds, seed=seed)
    parts = [_cloud(z[cloud], log_g[cloud], n_tangents, len(bins)) for cloud in clouds]
    names = ("keys", "tangents", "variances", "gains", "rest", "log_weights", "log_g", "scatter")
    columns = zip(*parts, strict=True)
    arrays = {name: np.array(column, np.float32) for name, column in zip(names, columns, strict=True)}
    return Library(**arrays, first=first)


def clouds_of_bins(
    z: F32, labels: F64, bins: NDArray[np.integer], n_experts: int, *, n_clouds: int, seed: int = 0
) -> tuple[list[NDArray[np.intp]], NDArray[np.int64]]:
    """Stars of each cloud, sorted by bin, and the first cloud of each bin, (n_experts + 1,); see `fit_library`.

    Raises
    ------
    ValueError
        A bin is empty.
    """
    counts = np.bincount(bins, minlength=n_experts)
    if (counts == 0).any():
        raise ValueError(f"no star in bin {int(counts.argmin())}; a library needs some in each")
    rng = np.random.default_rng(seed)
    spread = labels.std(0)
    scaled = LABEL_WEIGHT * (labels - labels.mean(0)) / np.where(spread > 0, spread, 1.0)
    points = np.concatenate([z / np.sqrt(z.var(0, dtype=np.float64) + 1.0), scaled], axis=1).astype(
        np.float32
    )
    clouds: list[NDArray[np.intp]] = []
    first = [0]
    for k in range(n_experts):
        rows = np.flatnonzero(bins == k)
        share = max(1, min(round(n_clouds * len(rows) / len(bins)), len(rows) // LEAST_STARS))
        nearest = _k_means(points[rows], share, rng)
        order = np.argsort(nearest, kind="stable")
        cuts = np.searchsorted(nearest[order], np.arange(share + 1))
        clouds += [rows[order[a:b]] for a, b in itertools.pairwise(cuts) if b > a]
        first.append(len(clouds))
    return clouds, np.array(first, np.int64)


def _cloud(z: F32, y: F64, n_tangents: int, n_all: int) -> tuple:
    """Mean, tangents, their variances and gains, the other variance, ln share, mean and variance of log g."""
    n, r = z.shape
    t = min(n_tangents, r)
    tangents, variances, gains = np.zeros((t, r)), np.zeros(t), np.zeros(t)
    mean = z.mean(0, dtype=np.float64)
    apart, dy = z - mean, y - y.mean()
    covariance = apart.T @ apart / n
    found, vectors = np.linalg.eigh(covariance)
    # Fewer stars than tangents span fewer.
    kept = min(t, n - 1)
    tangents[:kept] = vectors.T[::-1][:kept]
    variances[:kept] = np.maximum(found[::-1][:kept], 0)
    gains[:kept] = tangents[:kept] @ (apart.T @ dy / n)
    rest = float(np.maximum(found[: r - kept], 0).mean()) if r > kept else 0.0
    variances[kept:] = rest
    return mean, tangents, variances, gains, rest, np.log(n / n_all), y.mean(), dy @ dy / n


def _k_means(points: F32, m: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """The nearest of m centres of each point (n, d); some centres may end up without any."""
    n = len(points)
    nearest = np.zeros(n, np.intp)
    if m == 1:
        return nearest
    centres = points[np.sort(rng.choice(n, m, replace=False))]
    for _ in range(ROUNDS):
        half = 0.5 * (centres * centres).sum(1)
        for a in range(0, n, BLOCK):
            nearest[a : a + BLOCK] = (points[a : a + BLOCK] @ centres.T - half).argmax(1)
        order = np.argsort(nearest, kind="stable")
        count = np.bincount(nearest, minlength=m)
        there = count > 0
        sums = np.add.reduceat(points[order], (np.cumsum(count) - count)[there], axis=0, dtype=np.float64)
        centres[there] = sums / count[there, None]
        # A centre without points starts again at one of them.
        centres[~there] = points[rng.choice(n, int((~there).sum()), replace=False)]
    return nearest


def with_fewer_tangents(library: Library, n_tangents: int) -> Library:
    """The library whose clouds keep their first tangents; the variance along the others joins the rest.

    Parameters
    ----------
    library : Library
        As `fit_library` makes it: tangents of descending variance.
    n_tangents : int
        Not more than it has.
    """
    r, t = library.keys.shape[1], library.variances.shape[1]
    if n_tangents == t:
        return library
    left = library.variances[:, n_tangents:].sum(1, dtype=np.float64) + library.rest * (r - t)
    # Tangents that are not there count as the rest of the cloud.
    rest = (left / (r - n_tangents)).astype(np.float32)
    missing = (library.tangents[:, :n_tangents] == 0).all(2)
    return replace(
        library,
        tangents=library.tangents[:, :n_tangents],
        variances=np.where(missing, rest[:, None], library.variances[:, :n_tangents]),
        gains=library.gains[:, :n_tangents],
        rest=rest,
    )


def library_mean(z: F32, log_level: F32, library: Library) -> F64:
    """Posterior mean of log g over the whole library, (n,), dex: experts mixed by their evidence."""
    found = tangent_posterior(z, log_level, library)
    weight = np.exp(found.log_evidence - found.log_evidence.max(1, keepdims=True), dtype=np.float64)
    return (weight * found.mean).sum(1) / weight.sum(1)


def choose_library(
    fit: Callable[[int, int], Library],
    z: F32,
    log_level: F32,
    log_g: F64,
    *,
    n_stars: int,
    sizes: tuple[int, ...] = SIZES,
    tangents: tuple[int, ...] = TANGENTS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Library, dict[str, float]]:
    """The cheapest library whose R² on held-out noisy stars is within `R2_LOSS` of the best.

    First the number of tangents, with a library of middle size, then the number of clouds.

    Parameters
    ----------
    fit : callable
        (n_clouds, n_tangents) -> Library, of stars that are not among those below.
    z : array of shape (n, r), float32
        Held-out stars with noise.
    log_level : array of shape (n,), float32
    log_g : array of shape (n,), dex
    n_stars : int
        Stars that `fit` has; limits the size.
    sizes, tangents : tuple of int
        What is tried, ascending.
    progress : callable
        Called with the trials done and the trials there are.

    Returns
    -------
    tuple of Library and dict
        The library, and the R² of every trial by "clouds x tangents".
    """
    possible = [m for m in sizes if m * LEAST_STARS <= n_stars] or [sizes[0]]
    ranks = [t for t in tangents if t <= z.shape[1]] or [tangents[0]]
    # The best of the first round is part of the second.
    total = len(ranks) + len(possible) - 1
    tried: dict[tuple[int, int], tuple[float, Library]] = {}
    whole: dict[int, Library] = {}

    def score(m: int, t: int) -> float:
        if m not in whole:
            # What is chosen later needs no more tangents than were chosen first.
            whole[m] = fit(m, t if tried else ranks[-1])
        if (m, t) not in tried:
            library = with_fewer_tangents(whole[m], t)
            apart = log_g - library_mean(z, log_level, library)
            tried[m, t] = 1 - float(apart @ apart) / (len(log_g) * log_g.var()), library
            progress(len(tried), total)
        return tried[m, t][0]

    def least(scores: dict[int, float]) -> int:
        best = max(scores.values())
        return min(n for n, found in scores.items() if found >= best - R2_LOSS)

    middle = possible[len(possible) // 2]
    t = least({t: score(middle, t) for t in ranks})
    m = least({m: score(m, t) for m in possible})
    return tried[m, t][1], {f"{m} x {t}": found for (m, t), (found, _) in tried.items()}
