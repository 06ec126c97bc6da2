"""What clouds leave out between them, learnt: a network that corrects the posterior mean of log g.

A cloud is flat, and the spectra of stars are not: where velocities, reddening and labels bend them, a mixture of clouds
is a little wrong on average in a way that a network can learn from noisy stars. It sees the star at its own noise, as
the clouds do:

    f = (b, y, ln s, c, ln(w_k + ε), (w_k / (w_k + ε)) (y_k − y_0), ln b_s, ln d),

the point b near the star, around which its likelihood is expanded (its Wiener coordinates (P⁻¹ + M)⁻¹ (P⁻¹b₀ + u), and
nuisances); the posterior means y of the labels, log g first, their standard deviations s and the correlations c of the
errors with that of log g; the probability w_k of each expert and its own mean y_k of log g, which fades out where the
expert has no say; the scatter b_s of log g between clouds; and the noise level d. Each is taken relative to its mean
and spread in the training draws, and cut off at `FARTHEST` of these. Three layers of rectified linear units give t, and

    y_0 ← y_0 + s_0 tanh t:

no correction is larger than one standard deviation of the posterior. What the network is given of the noise cannot tell
log g, because every draw that it learns from has the errors and lost pixels of another star.

Source of the idea of learning what a strong answer gets wrong: boosting, Friedman 2001, Annals of Statistics 29, 1189.
"""

from __future__ import annotations

from typing import Any

from moefast.ops.arithmetic import SolvingArithmetic

__all__ = ["CORRECTION", "FARTHEST", "LEAST_WEIGHT", "N_LAYERS", "corrected", "features", "n_features"]

FARTHEST = 5.0
"""Standard deviations of the training draws at which a feature is cut off."""
LEAST_WEIGHT = 1e-6
"""ε: experts far below it have no say in the features."""
LEAST_SPREAD = 1e-4
"""Added in dex to the scatter between clouds before its logarithm is taken."""
N_LAYERS = 3
"""Hidden layers."""
CORRECTION = (
    "correction.mean",
    "correction.inverse_spread",
    *(f"correction.{part}{layer}" for layer in range(1, N_LAYERS + 2) for part in "wb"),
)
"""What is stored of a correction: mean and 1/spread of the features (f,), and W_i, b_i of each layer."""


def n_features(n_directions: int, n_labels: int, n_experts: int) -> int:
    """Number of features f of n + q directions, labels without the scale, and experts."""
    return n_directions + 3 * n_labels - 1 + 2 * n_experts + 2


def features(op: SolvingArithmetic, n_labels: int, found: dict[str, Any]) -> Any:
    """What the network sees of n stars, (n, f), from outputs of `moefast.posterior.forward`; labels without the scale.

    `found` has `point`, `label`, `label_sd`, `label_cov`, `weights`, `expert_label`, `spread` and `log_level`.
    """
    least = op.precise(op.constant(LEAST_WEIGHT))
    first, weights = op.part(found["label"], 1, 0, 1), found["weights"]
    sd = op.part(found["label_sd"], 1, 0, n_labels)
    weighed = op.add(weights, least)
    parts = [found["point"], op.part(found["label"], 1, 0, n_labels), op.log(sd)]
    if n_labels > 1:
        product = op.multiply(op.part(sd, 1, 0, 1), op.part(sd, 1, 1, n_labels))
        parts.append(op.divide(op.part(found["label_cov"], 1, 1, n_labels), product))
    apart = op.multiply(op.divide(weights, weighed), op.subtract(found["expert_label"], first))
    spread = op.add(found["spread"], op.precise(op.constant(LEAST_SPREAD)))
    return op.joined([*parts, op.log(weighed), apart, op.log(spread), found["log_level"]], 1)


def corrected(op: SolvingArithmetic, n_labels: int, found: dict[str, Any]) -> Any:
    """Posterior mean of log g with what is learnt added to it, (n, 1); see the module."""

    def number(name: str) -> Any:
        return op.precise(op.number(f"correction.{name}"))

    seen = op.multiply(op.subtract(features(op, n_labels, found), number("mean")), number("inverse_spread"))
    farthest = (op.precise(op.constant(value)) for value in (-FARTHEST, FARTHEST))
    active = op.clip(seen, *farthest)
    for layer in range(1, N_LAYERS + 1):
        active = op.relu(op.add(op.product(active, number(f"w{layer}")), number(f"b{layer}")))
    last = N_LAYERS + 1
    shift = op.tanh(op.add(op.product(active, number(f"w{last}")), number(f"b{last}")))
    first = op.part(found["label"], 1, 0, 1)
    return op.add(first, op.multiply(op.part(found["label_sd"], 1, 0, 1), shift))
