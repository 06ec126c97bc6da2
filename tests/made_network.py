"""Networks of random numbers for the mixtures of `plans`."""

import numpy as np

from moefast.trunks.heads import Heads
from moefast.trunks.networks import KINDS, NetworkPlan, start

__all__ = ["KINDS", "network", "with_heads"]


def network(mixture, kind, seed=1):
    """A network whose answers react to every input, and whose first, fourth, … bin is metal-poor."""
    rng, k = np.random.default_rng(seed), mixture.n_experts
    n_inputs = mixture.n_basis if kind == "pca-mlp" else mixture.n_pixels
    plan = NetworkPlan(kind, n_inputs, k, width=32, depth=8 if kind == "cnn" else 2, patch=32, head=5, gate=7)
    numbers = {
        name: a if name.endswith("scale") else a + (0.1 * rng.standard_normal(a.shape)).astype(np.float32)
        for name, a in start(plan, seed).items()
    }
    numbers |= {
        "level.limits": mixture.knots[[0, -1]],
        "level.scale": np.float32([0.1, 0.8]),
        "log_g.scale": np.float32([3, 0.3]),
        "metal_poor": (np.arange(k) % 3 == 0)[:, None].astype(np.float32),
    }
    # Some stars beyond the range of labels, whatever the kind.
    numbers["heads.w"] = 4 * numbers["heads.w"]
    if kind != "pca-mlp":
        numbers |= {"reference": mixture.reference, "inverse_noise": 1 / np.sqrt(mixture.noise_shape)}
    else:
        numbers["variance"] = np.ones(n_inputs, np.float32)
    return Heads(plan, numbers)


def with_heads(mixture, kind):
    """The mixture with such a network in the place of its linear experts."""
    return mixture.with_expert(network(mixture, kind))
