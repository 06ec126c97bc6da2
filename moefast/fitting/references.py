"""Simpler fits to compare with: what each step of the method is worth.

Design: most are solved from the totals of the experts. The published-style ridge has totals of its own, gathered in the
same first pass; linear experts on one noise draw per star, instead of noise in closed form, need another first pass.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moefast.experts.linear_form import LinearForm
from moefast.experts.normal_equations import NormalEquations
from moefast.experts.ridge import NoisePath, ridge
from moefast.fitting.first_pass import Gathered
from moefast.fitting.linear_experts import Solved, solve
from moefast.fitting.training_set import TrainingSet

__all__ = ["PUBLISHED_ALPHA", "reference_forms", "sampled_oracle"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

PUBLISHED_ALPHA = 0.1
"""Ridge penalty per row of the published fit: 1e5 at one million stars."""


def reference_forms(
    data: TrainingSet, published: NormalEquations | None, solved: Solved
) -> dict[str, LinearForm]:
    """The fits that show what each step of the method is worth.

    Parameters
    ----------
    data : TrainingSet
    published : NormalEquations, optional
        Of the published-style ridge, where they are not those of the experts.
    solved : Solved
    """
    options = data.options
    subspace, small, inside = solved.subspace, solved.small, options.noise_inside
    forms: dict[str, LinearForm] = {}
    one = np.zeros(1, np.float32)
    conditional = options.alpha is None
    if not options.n_simpler_fits:
        return forms
    step = data.steps("simpler fits", options.n_simpler_fits)

    def single(
        weights: F64,
        intercept: NDArray | float,
        levels: F32 = one,
        clipped: bool = options.clipped,
    ) -> LinearForm:
        k = np.atleast_2d(intercept).shape
        return LinearForm(
            weights.reshape(-1, *k).astype(np.float32),
            np.reshape(intercept, k).astype(np.float32),
            levels,
            clipped,
        )

    if options.references:
        seen = solved.moments if published is None else published.moments()
        forms["published-ridge"] = single(*ridge(seen, PUBLISHED_ALPHA * seen.n), clipped=True)
        step()
    if not conditional:
        return forms
    pooled = NoisePath(small.moments(), inside)
    mean_level = 1.0
    w, c = pooled.solve(mean_level)
    forms["global-ridge, average noise"] = single(subspace.basis @ w, c)
    step()
    path = [pooled.solve(s) for s in solved.levels.s]
    forms["global-ridge"] = single(
        np.stack([subspace.basis @ w for w, _ in path], 1),
        np.array([[c for _, c in path]]),
        solved.levels.knots.astype(np.float32),
    )
    step()
    by_snr = [pooled.solve(s) for s in solved.levels.of_snr]
    forms["snr-oracle, average noise"] = single(
        np.stack([subspace.basis @ w for w, _ in by_snr], 1), np.array([[c] for _, c in by_snr])
    )
    step()
    fixed = [
        NoisePath(small.moments(k), inside).solve(mean_level, a) for k, a in enumerate(solved.experts.alphas)
    ]
    forms["oracle-ridge, average noise"] = single(
        np.stack([subspace.basis @ w for w, _ in fixed], 1), np.array([[c] for _, c in fixed])
    )
    step()
    return forms


def sampled_oracle(data: TrainingSet, gathered: Gathered) -> LinearForm:
    """The linear experts of a training set alone, with no second pass."""
    solved = solve(data, gathered.equations, gathered.times_good)
    weights = np.einsum("pc,kmc->pkm", solved.experts.columns, solved.experts.weights, optimize=True)
    knots = solved.levels.knots.astype(np.float32)
    return LinearForm(weights.astype(np.float32), solved.experts.intercepts.astype(np.float32), knots)
