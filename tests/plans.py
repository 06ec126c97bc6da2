"""Random mixtures, random plans of small ones, and spectra for them, for the tests of every engine that scores."""

import dataclasses

import numpy as np
from made_forest import forest

from moefast.experts.residual import LinearResidual, RidgeResidual
from moefast.experts.template import Templates
from moefast.experts.trees import Trees
from moefast.gating.tower import Tower
from moefast.kernels import Library, Mixing, Projection, cell_size
from moefast.mixture import Mixture


def layers(rng, n_in, hidden, n_out, scale=0.3):
    shapes = ((n_in, hidden), (hidden,), (hidden, n_out), (n_out,))
    return tuple((scale * rng.standard_normal(shape)).astype(np.float32) for shape in shapes)


def random_plans(p=132, c=17, w=2, n_experts=3, n_levels=4, hidden=7, clipped=False, seed=0):
    """A projection and a mixing that fit each other: c columns, w lines."""
    rng = np.random.default_rng(seed)
    shape = np.exp(rng.normal(-4, 0.7, p))
    n_basis = max(1, c - 2)
    basis = np.linalg.qr(rng.standard_normal((p, min(n_basis, p))))[0]
    # A little short, so that something is left even of a single pixel.
    basis = 0.9 * np.resize(basis, (p, n_basis)) / np.sqrt(shape)[:, None]
    lines = np.zeros((p, 3 * w))
    for column in range(3 * w):
        start = rng.integers(0, p)
        stop = min(p, start + 1 + int(rng.integers(0, 30)))
        lines[start:stop, column] = rng.standard_normal(stop - start)
    matrix = np.concatenate([basis, rng.standard_normal((p, c - n_basis))], axis=1)
    projection = Projection(
        reference=rng.uniform(0.5, 1.5, p),
        noise_shape=shape,
        matrix=matrix,
        lines=lines,
        cell_matrix=rng.uniform(0, 1, (p // cell_size(p), n_levels * n_experts)),
        captured=(basis**2).sum(1) / max(1, n_basis / p),
        clipped=clipped,
    )
    leading = min(4, n_basis)
    features = 2 * w + 1 + leading + 1
    mixing = Mixing(
        knots=np.linspace(-1.5, 1.5, n_levels).astype(np.float32),
        expert_weights=rng.normal(0, 0.3 / p**0.5, (n_experts, n_levels, c)).astype(np.float32),
        intercepts=rng.normal(3, 0.3, (n_experts, n_levels)).astype(np.float32),
        n_basis=n_basis,
        n_leading=leading,
        line_offsets=rng.uniform(2, 3, 3 * w).astype(np.float32),
        line_widths=rng.uniform(10, 20, w).astype(np.float32),
        least_continuum=0.05,
        least_spread=1e-4,
        gate=layers(rng, features, hidden, n_experts, 0.1),
        error_model=layers(rng, features + 3, 5, 1, 0.05),
        label_range=(2.6, 3.4),
    )
    return projection, mixing


def spectra(n, plan, seed=0):
    """Flux and error of stars at many noise levels."""
    rng = np.random.default_rng(seed)
    p = plan.reference.size
    error = np.sqrt(plan.noise_shape) * np.exp(rng.normal(0, 0.8, (n, 1))) * rng.uniform(0.8, 1.2, (n, p))
    flux = plan.reference + 0.05 * rng.standard_normal((n, 1)) + error * rng.standard_normal((n, p))
    return flux.astype(np.float32), error.astype(np.float32)


def random_mixture(n_pixels=512, n_experts=5, n_levels=4, n_components=12, n_others=0, hidden=16, seed=0):
    """A mixture of random numbers whose predictions are of order one and react to every input."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    noise_shape = (0.01 * np.exp(0.5 * rng.standard_normal(n_pixels))).astype(np.float32)
    orthogonal, _ = np.linalg.qr(rng.standard_normal((n_pixels, n_components)))
    return Mixture(
        wave=np.linspace(7100.2, 8849.8, n_pixels),
        reference=np.float32(1) + normal(n_pixels, scale=0.1),
        noise_shape=noise_shape,
        knots=np.linspace(-1.5, 1.5, n_levels).astype(np.float32),
        columns=np.concatenate(
            [orthogonal / np.sqrt(noise_shape)[:, None], normal(n_pixels, n_others)], axis=1
        ).astype(np.float32),
        n_basis=n_components,
        expert_weights=normal(n_experts, n_levels, n_components + n_others, scale=n_pixels**-0.5),
        expert_intercepts=3 + normal(n_experts, n_levels, scale=0.3),
        gate=(normal(14, hidden, scale=0.1), normal(hidden), normal(hidden, n_experts), normal(n_experts)),
        error_model=(normal(17, 8, scale=0.1), normal(8), normal(8, 1, scale=0.3), normal(1, scale=0.3)),
        # Not numbers that float32 holds: the file must keep them exactly all the same.
        label_range=(2.6180339, 3.1415926),
    )


def random_library(n_experts=5, rank=12, n_tangents=3, clouds=4, seed=0, spread=3.0):
    """Clouds of random numbers, `clouds` and one more for every further expert: their evidence decides between them."""
    rng = np.random.default_rng(seed)
    sizes = clouds + np.arange(n_experts)
    m = int(sizes.sum())
    tangents = np.linalg.qr(rng.standard_normal((m, rank, n_tangents)))[0].transpose(0, 2, 1)
    return Library(
        keys=(spread * rng.standard_normal((m, rank))).astype(np.float32),
        tangents=np.ascontiguousarray(tangents, np.float32),
        variances=rng.uniform(0.5, 4, (m, n_tangents)).astype(np.float32),
        gains=(0.2 * rng.standard_normal((m, n_tangents))).astype(np.float32),
        rest=rng.uniform(0.01, 0.2, m).astype(np.float32),
        log_weights=np.log(rng.dirichlet(np.ones(m))).astype(np.float32),
        log_g=rng.normal(3, 0.3, m).astype(np.float32),
        scatter=rng.uniform(0.3, 0.5, m).astype(np.float32),
        first=np.concatenate([[0], np.cumsum(sizes)]),
    )


def random_templates(*args, **kwargs):
    """Such a library as a family of experts."""
    return Templates(random_library(*args, **kwargs))


def random_trees(n_features, sees="stacking", n_trees=20, seed=0):
    """Trees of twenty leaves whose splits lie where features are; each leaf is worth about a hundredth of a dex."""
    made = forest([20] * n_trees, n_features, seed)
    threshold = made.threshold + (1 if sees == "flux" else 0)
    value = (0.01 * np.random.default_rng(seed).standard_normal(made.value.shape)).astype(np.float32)
    return Trees(dataclasses.replace(made, threshold=threshold.astype(np.float32), value=value), sees)


def random_ridge(n_features, seed=0):
    """A ridge residual of a few tenths of a dex that sees so many lines and components, and meets its limits."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    numbers = {"levels": [-1, 1], "limits": [-0.3, 0.4], "intercept": [0.05]}
    return RidgeResidual(
        mean=normal(n_features, scale=0.2),
        noise=np.abs(normal(n_features)),
        weights=normal(n_features + 1, 1, scale=0.1),
        **{name: np.array(value, np.float32) for name, value in numbers.items()},
    )


def random_lean():
    """A residual that leans on the linear expert, and meets its limits."""
    numbers = {"share": [0.2], "intercept": [-0.03], "limits": [-0.1, 0.2]}
    return LinearResidual(**{name: np.array(value, np.float32) for name, value in numbers.items()})


def random_tower(n_features, n_experts, sees="features", limit=np.inf, seed=0):
    """A tower whose logits are of order one."""
    scale = 1 / np.sqrt(n_features)
    w1, b1, w2, b2 = layers(np.random.default_rng(seed), n_features, 12, n_experts, 1.0)
    return Tower(sees, (np.float32(scale) * w1, b1, np.float32(0.5) * w2, b2), limit)


def awkward_rows(p, seed=0):
    """Flux, error and mask of rows whose medians are hard to find, or of an unusual size."""
    rng = np.random.default_rng(seed)
    n = 14
    flux = (rng.standard_normal((n, p)) + 3).astype(np.float32)
    error = rng.uniform(0.1, 2, (n, p)).astype(np.float32)
    mask = np.zeros((n, p), bool)
    flux[1] = np.round(2 * flux[1])
    error[1:4] = 1
    flux[2] = 7
    flux[3, : p // 2] = -3e38
    # Zeros of both signs, of which the median is one.
    flux[4] = np.where(rng.random(p) < 0.5, 0.0, -0.0)
    flux[5, rng.random(p) < 0.3] = np.nan
    error[6, rng.random(p) < 0.5] = -1
    mask[7] = rng.random(p) < 0.6
    # Sorted, and in two heaps: the first guesses are wrong.
    flux[8].sort()
    error[8] = 1
    flux[9, p // 3 :] *= np.float32(1e12)
    # What is divided slowly: tiny and huge flux, tiny errors, quotients below and beyond those of float32.
    flux[10] *= np.float32(1e-38)
    flux[11, ::7], error[11] = 1e37, np.float32(1e-10)
    error[12, ::3] = np.float32(1e-40)
    flux[13] = np.nan
    return flux, error, mask
