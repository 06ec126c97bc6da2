"""What `project` and `soft_mix` compute, described once on an arithmetic; see `moefast.ops.arithmetic`.

With flux x, reference spectrum r, error σ, noise shape D and p' good pixels,

    z = Cᵀ(x − r),    s² = Σ σ²/D / p',    σ_k²(s) = Σ_g r_g Σ_{j in g} w_kj(s)² D_j,
    y_k(s) = w_k(s)ᵀ z + c_k(s),           χ² = (Σ (x − r)²/D − |z'|²) / Σ σ² (1/D − Σ_r T_r²),

where bad pixels count nothing, r_g is the mean of σ²/D over a cell of pixels, z' are the components among z, and w, c
are interpolated linearly in ln s between evenly spaced levels. Then, with f the features of the gate,

    g = softmax(gate(f) + evidence),   ŷ = Σ_k g_k y_k,   ln σ̂ = e(f, ŷ, ln Σ_k g_k σ_k, ln spread),   e a network.

Design: the stages are functions, because an expert of another family may stand in for a linear one between them
(`moefast.forward` puts the whole pass together). Read in NumPy and float64 they are the contract of the kernels
(`moefast.kernels.reference`), in float32 the way in which a fit sees a star, in ONNX the exported graph. Values of a
star that are one number are columns, (n, 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from moefast.kernels.quality import LARGEST_ERROR
from moefast.ops.arithmetic import SolvingArithmetic

__all__ = [
    "LARGEST_FLUX",
    "Answer",
    "Light",
    "Sizes",
    "Star",
    "chi2",
    "error_features",
    "gate_features",
    "hat",
    "light",
    "line_features",
    "linear_experts",
    "linear_noise",
    "mix",
    "perceptron",
    "project",
    "snr_norm",
]

LARGEST_FLUX = 3.4028234663852886e38
"""Of float32: infinite flux is no flux."""
TINY = 1e-30
LAYERS = ("w1", "b1", "w2", "b2")


@dataclass(frozen=True)
class Sizes:
    """The shapes that the description needs, and its bounds.

    Attributes
    ----------
    n_pixels, cell : int
        p, and pixels over which σ²/D is averaged for the noise of experts; `cell` divides p.
    n_experts, n_levels : int
        K, M.
    n_columns, n_basis, n_leading, n_windows : int
        c; columns that are principal components; those of them that the gate sees; 3 w, of w lines.
    clipped : bool
        Flux below zero counts as zero.
    least_continuum, least_spread : float
        Floors of continua, and in dex of what logarithms are taken of for the error model.
    """

    n_pixels: int
    cell: int
    n_experts: int
    n_levels: int
    n_columns: int
    n_basis: int
    n_leading: int
    n_windows: int
    clipped: bool
    least_continuum: float
    least_spread: float


class Light(NamedTuple):
    """Pixels of n stars: which are `good` (n, p), their flux less the reference `x`, `variance` and σ²/D `ratio`.

    All are zero where a pixel is bad. `n_good` and `log_level` = ln s are (n, 1).
    """

    good: Any
    x: Any
    variance: Any
    ratio: Any
    n_good: Any
    log_level: Any


class Star(NamedTuple):
    """What the projection of n stars gives: `columns` (n, c), `windows` (n, 3 w), `variances` (n, M · K).

    `log_level`, `energy` inside and outside of the components, and its expectation outside, `expected`, are (n, 1).
    """

    columns: Any
    windows: Any
    variances: Any
    log_level: Any
    energy: Any
    expected: Any


class Answer(NamedTuple):
    """Of n stars: `log_g`, its calibrated error and the noise propagated into it (n, 1), `weights` (n, K)."""

    log_g: Any
    log_g_err: Any
    log_g_err_raw: Any
    weights: Any


def light(op: SolvingArithmetic, sizes: Sizes, flux: Any, error: Any) -> Light:
    """Good pixels, centred flux, noise level.

    Parameters
    ----------
    op : SolvingArithmetic
        With the numbers `reference` and `noise_shape` (p,).
    sizes : Sizes
    flux, error : values of shape (n, p)
        A bad pixel has a flux that is not finite, or an error that is not positive, above 1e6 or NaN.
    """
    zero, one = op.constant(0.0), op.constant(1.0)
    # NaN fails every comparison, so these three leave finite numbers only, on every runtime.
    finite = op.at_most(op.absolute(flux), op.constant(LARGEST_FLUX))
    known = op.at_most(error, op.constant(LARGEST_ERROR))
    good = op.both(op.both(finite, known), op.above(error, zero))
    n_good = op.shaped(op.total(op.as_number(good), 1), (1,))
    # The presence of this number tells a reader of a file that flux is clipped.
    seen = op.larger(flux, op.number("least_flux")) if sizes.clipped else flux
    x = op.where(good, op.subtract(seen, op.number("reference")), zero)
    squared = op.multiply(error, error)
    ratio = op.where(good, op.divide(squared, op.number("noise_shape")), zero)
    mean = op.divide(op.shaped(op.total(ratio, 1), (1,)), op.larger(n_good, one))
    safe = op.where(op.above(mean, zero), mean, one)
    log_level = op.multiply(op.log(safe), op.constant(0.5))
    return Light(good, x, op.where(good, squared, zero), ratio, n_good, log_level)


def project(op: SolvingArithmetic, sizes: Sizes, found: Light) -> Star:
    """All that is linear in flux or in variance.

    `op` has the numbers `projection` (p, c + 3 w), the columns and those of the lines, `cell_matrix` (p / cell, M · K)
    and `captured` (p,), the share of a pixel's noise that the components take up, in units of 1/D.
    """
    cells = op.total(op.shaped(found.ratio, (sizes.n_pixels // sizes.cell, sizes.cell)), 2)
    cells = op.multiply(cells, op.constant(1 / sizes.cell))
    inverse = op.divide(op.constant(1.0), op.number("noise_shape"))
    left = op.subtract(inverse, op.number("captured"))
    tall, c = (sizes.n_pixels, 1), sizes.n_columns
    both = op.product(found.x, op.number("projection"))
    return Star(
        op.part(both, 1, 0, c),
        op.part(both, 1, c, c + sizes.n_windows),
        op.product(cells, op.number("cell_matrix")),
        found.log_level,
        # Products with columns, not with vectors: ONNX Runtime cannot multiply an empty batch with a vector.
        op.product(op.multiply(found.x, found.x), op.reshaped(inverse, tall)),
        op.product(found.variance, op.reshaped(left, tall)),
    )


def snr_norm(op: SolvingArithmetic, found: Light, flux: Any, error: Any) -> Any:
    """‖flux‖/‖error‖ over the good pixels, (n, 1); sums in double precision, as the kernels have them."""
    zero, sums = op.constant(0.0), []
    for value in (flux, error):
        kept = op.precise(op.where(found.good, value, zero))
        sums.append(op.shaped(op.total(op.multiply(kept, kept), 1), (1,)))
    # Only a star without a good pixel has no noise.
    noise = op.where(op.above(sums[1], op.double(0.0)), sums[1], op.double(1.0))
    return op.single(op.root(op.divide(sums[0], noise)))


def line_features(op: SolvingArithmetic, n_lines: int, least_continuum: float, whole: Any) -> Any:
    """Depths 1 − core/continuum and equivalent widths (width − integral/continuum), (n, 2 w + 1).

    `whole` (n, 3 w) holds core, integral and continuum of each line. The sum of all widths but the last line's stands
    before the last line. `op` has the number `lines.widths` (w,).
    """
    w, one = n_lines, op.constant(1.0)
    cube = op.shaped(whole, (w, 3))
    core, integral, continuum = (op.part(cube, 2, i, i + 1) for i in range(3))
    continuum = op.larger(continuum, op.constant(least_continuum))
    depth = op.subtract(one, op.divide(core, continuum))
    width = op.reshaped(op.number("lines.widths"), (w, 1))
    width = op.subtract(width, op.divide(integral, continuum))
    row = op.shaped(op.joined([depth, width], 2), (2 * w,))
    together = op.total(op.part(width, 1, 0, w - 1), 1)
    last = 2 * w - 2
    return op.joined([op.part(row, 1, 0, last), together, op.part(row, 1, last, 2 * w)], 1)


def lines_of(op: SolvingArithmetic, sizes: Sizes, windows: Any) -> Any:
    """Line features of windows as `project` gives them, those of a spectrum less the reference."""
    whole = op.add(windows, op.number("lines.offsets"))
    return line_features(op, sizes.n_windows // 3, sizes.least_continuum, whole)


def level_within(op: SolvingArithmetic, log_level: Any, n_levels: int) -> Any:
    """The noise level between the outer knots, (n, 1)."""
    knots = op.number("knots")
    return op.clip(log_level, op.part(knots, 0, 0, 1), op.part(knots, 0, n_levels - 1, n_levels))


def gate_features(op: SolvingArithmetic, sizes: Sizes, lines: Any, leading: Any, log_level: Any) -> Any:
    """Features of the gate, (n, f): those of the lines, the first components, the noise level between the knots."""
    return op.joined(
        [lines, op.part(leading, 1, 0, sizes.n_leading), level_within(op, log_level, sizes.n_levels)], 1
    )


def hat(op: SolvingArithmetic, n_levels: int, level: Any) -> Any:
    """Weights (n, M) of linear interpolation between evenly spaced knots; `level` (n, 1) lies between them."""
    knots = op.number("knots")
    first, last = op.part(knots, 0, 0, 1), op.part(knots, 0, n_levels - 1, n_levels)
    step = op.divide(op.subtract(last, first), op.constant(float(n_levels - 1)))
    away = op.absolute(op.subtract(level, knots))
    share = op.subtract(op.constant(1.0), op.divide(away, step))
    return op.larger(share, op.constant(0.0))


def linear_experts(op: SolvingArithmetic, sizes: Sizes, seen: Any, weights: Any) -> Any:
    """Values of the linear experts, (n, K).

    `op` has the numbers `experts.weights` (c, K · M) and `experts.intercepts` (K, M); `seen` (n, c) are the columns,
    `weights` those of `hat`.
    """
    flat = op.product(seen, op.number("experts.weights"))
    cube = op.shaped(flat, (sizes.n_experts, sizes.n_levels))
    cube = op.add(cube, op.number("experts.intercepts"))
    return op.total(op.multiply(cube, op.shaped(weights, (1, sizes.n_levels))), 2)


def linear_noise(op: SolvingArithmetic, sizes: Sizes, variances: Any, weights: Any) -> Any:
    """Noise of the linear experts, 1σ, (n, K), from their variances (n, M · K) at all levels."""
    cube = op.shaped(variances, (sizes.n_levels, sizes.n_experts))
    return op.root(op.total(op.multiply(cube, op.shaped(weights, (sizes.n_levels, 1))), 1))


def chi2(op: SolvingArithmetic, sizes: Sizes, star: Star) -> Any:
    """Energy outside the components over its expectation, (n, 1)."""
    inside = op.part(star.columns, 1, 0, sizes.n_basis)
    inside = op.shaped(op.total(op.multiply(inside, inside), 1), (1,))
    return op.divide(op.subtract(star.energy, inside), op.larger(star.expected, op.constant(TINY)))


def perceptron(op: SolvingArithmetic, features: Any, name: str) -> Any:
    """tanh(f W₁ + b₁) W₂ + b₂ of the network whose numbers are `{name}.w1` …, or `w1` … if it has no name."""
    w1, b1, w2, b2 = (op.number(f"{name}.{layer}" if name else layer) for layer in LAYERS)
    return op.affine(op.tanh(op.affine(features, w1, b1)), w2, b2)


def error_features(
    op: SolvingArithmetic, features: Any, log_g: Any, raw: Any, spread: Any, least: float
) -> Any:
    """What the error model sees: features of the gate, log g, ln σ_raw, ln spread, each (n, 1)."""
    floor = op.constant(least)
    return op.joined([features, log_g, op.log(op.larger(raw, floor)), op.log(op.larger(spread, floor))], 1)


def mix(op: SolvingArithmetic, sizes: Sizes, features: Any, values: Any, noise: Any, logits: Any) -> Answer:
    """The mixture of experts that say `values` (n, K) with `noise` (n, K), by `logits` (n, K)."""

    def tall(value: Any) -> Any:
        return op.shaped(value, (1,))

    gate = op.softmax(logits)
    mixed = tall(op.total(op.multiply(gate, values), 1))
    limits = op.number("label_range")
    log_g = op.clip(mixed, op.part(limits, 0, 0, 1), op.part(limits, 0, 1, 2))
    raw = tall(op.total(op.multiply(gate, noise), 1))
    apart = op.subtract(values, mixed)
    spread = op.root(tall(op.total(op.multiply(gate, op.multiply(apart, apart)), 1)))
    seen = error_features(op, features, log_g, raw, spread, sizes.least_spread)
    return Answer(log_g, op.exp(perceptron(op, seen, "error_model")), raw, gate)
