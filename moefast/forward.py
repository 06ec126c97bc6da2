"""The forward pass of a mixture from flux and error to log g and its error, described once on an arithmetic.

    pixels → projection → linear experts, and the experts that stand in for them → gate → mixture → error,

with the stages of `moefast.kernels.forward` and what each family of experts says of itself (`describe`). Of each star
the experts see the components z, the line features, its noise level and, if they ask for it, the flux; their evidence
is added to the logits of the gate, and so is what a second tower says (`moefast.gating.tower`).

Design: `Mixture.predict_reference` reads it in NumPy and float64, `moefast.export` in ONNX. `Mixture.predict` runs the
same on fused kernels and is judged by it. Signal-to-noise ratios and flags are no part of it: they are told of a
spectrum whatever the model (`moefast.spectra.quality`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from moefast.core.errors import ModelError
from moefast.experts.protocol import ExpertValues, Place
from moefast.gating.tower import Tower
from moefast.kernels import forward as stages
from moefast.kernels.forward import Sizes
from moefast.ops.arithmetic import SolvingArithmetic

__all__ = ["Described", "Pass", "expert_values", "forward"]


class Described(Protocol):
    """What the description needs to know of a mixture besides its numbers."""

    @property
    def sizes(self) -> Sizes:
        """Shapes."""
        ...

    @property
    def experts(self) -> tuple[Place, ...]:
        """Experts that are not linear, in the order in which they take their places."""
        ...

    @property
    def tower(self) -> Tower | None:
        """A second tower of the gate."""
        ...


class Pass(NamedTuple):
    """A forward pass of n stars: what a prediction holds, and the number of good pixels.

    `weights` and `expert_log_g` are (n, K), all others (n, 1); see `moefast.mixture.Prediction`.
    """

    log_g: Any
    log_g_err: Any
    log_g_err_raw: Any
    weights: Any
    expert_log_g: Any
    chi2: Any
    log_level: Any
    n_good: Any


class _Star(NamedTuple):
    """What experts and gate see of n stars: see `moefast.kernels.forward`. `hat` (n, M) weighs the noise levels."""

    light: stages.Light
    projected: stages.Star
    hat: Any
    features: Any
    seen: dict[str, Any]


def _star(op: SolvingArithmetic, sizes: Sizes, flux: Any, error: Any) -> _Star:
    light = stages.light(op, sizes, flux, error)
    projected = stages.project(op, sizes, light)
    level = light.log_level
    z = op.part(projected.columns, 1, 0, sizes.n_basis)
    lines = stages.lines_of(op, sizes, projected.windows)
    whole = op.larger(flux, op.number("least_flux")) if sizes.clipped else flux
    seen = {
        "z": z,
        "log_level": level,
        "lines": lines,
        "x": op.where(light.good, whole, op.number("reference")),
        "least_level": op.larger(level, op.part(op.number("knots"), 0, 0, 1)),
    }
    return _Star(
        light,
        projected,
        stages.hat(op, sizes.n_levels, stages.level_within(op, level, sizes.n_levels)),
        stages.gate_features(op, sizes, lines, z, level),
        seen,
    )


def _says(op: SolvingArithmetic, place: Place, seen: Mapping[str, Any]) -> ExpertValues:
    own = op.within(place.stem, place.expert.arrays(), short=place.expert.short)
    try:
        return place.expert.describe(own, seen)
    except ModelError as error:
        raise ModelError(f"{place.expert.words}: {error}") from error


def _values(
    op: SolvingArithmetic, mixture: Described, star: _Star, noise: Any, *, whole: bool
) -> tuple[Any, Any, Any]:
    """Values and noise (n, K) with every expert in its place, and the evidence of all of them (n, K), or None.

    Without `whole`, linear experts in whose place others stand everywhere are left out: a file of one expert does not
    need their numbers, a file of the whole mixture is the home of them.
    """
    sizes, k = mixture.sizes, mixture.sizes.n_experts
    linear = values = stages.linear_experts(op, sizes, star.projected.columns, star.hat)
    evidence = None

    def placed(place: Place, new: Any, old: Any) -> Any:
        if len(place.bins) == k and not whole:
            return new
        return op.where(op.marks([i in place.bins for i in range(k)]), new, old)

    for place in (one for one in mixture.experts if not one.added):
        found = _says(op, place, star.seen)
        values = placed(place, found.log_g, values)
        noise = noise if found.noise is None else placed(place, found.noise, noise)
        if found.evidence is not None:
            evidence = found.evidence if evidence is None else op.add(evidence, found.evidence)
    plain = values
    for place in (one for one in mixture.experts if one.added):
        (i,) = place.bins
        beside = {"value": op.part(plain, 1, i, i + 1), "linear": op.part(linear, 1, i, i + 1)}
        found = _says(op, place, star.seen | beside)
        mark = op.marks([j == i for j in range(k)])
        values = op.add(values, op.where(mark, found.log_g, op.constant(0.0)))
    return values, noise, evidence


def _logits(
    op: SolvingArithmetic, mixture: Described, star: _Star, evidence: Any, flux: Any, error: Any
) -> Any:
    added, tower = evidence, mixture.tower
    if tower is not None:
        snr_norm = stages.snr_norm(op, star.light, flux, error)
        own = op.within(tower.stem, tower.arrays())
        found = tower.describe(own, star.features, snr_norm, error, star.light.good, mixture.sizes.n_pixels)
        added = found if added is None else op.add(added, found)
    logits = stages.perceptron(op, star.features, "gate")
    return logits if added is None else op.add(logits, added)


def forward(op: SolvingArithmetic, mixture: Described, flux: Any, error: Any) -> Pass:
    """The whole pass.

    Parameters
    ----------
    op : SolvingArithmetic
        With the numbers of `Mixture.numbers`.
    mixture : Described
    flux, error : values of shape (n, p)
        A bad pixel has a flux that is not finite, or an error that is not positive, above 1e6 or NaN.
    """
    sizes = mixture.sizes
    star = _star(op, sizes, flux, error)
    noise = stages.linear_noise(op, sizes, star.projected.variances, star.hat)
    values, noise, evidence = _values(op, mixture, star, noise, whole=True)
    logits = _logits(op, mixture, star, evidence, flux, error)
    found = stages.mix(op, sizes, star.features, values, noise, logits)
    return Pass(
        found.log_g, found.log_g_err, found.log_g_err_raw, found.weights, values,
        stages.chi2(op, sizes, star.projected), star.light.log_level, star.light.n_good,
    )  # fmt: skip


def expert_values(op: SolvingArithmetic, mixture: Described, flux: Any, error: Any) -> tuple[Any, Any]:
    """What the experts say alone, (n, K), and the number of good pixels (n, 1); see `forward`."""
    star = _star(op, mixture.sizes, flux, error)
    return _values(op, mixture, star, op.constant(0.0), whole=False)[0], star.light.n_good
