"""Residuals beside the experts, kept where they help beyond doubt and harm no region.

Design: what the mixture gets wrong in the sample is fitted once more, expert by expert, weighed by the gate. Seven
tenths of the stars train, two judge (`moefast.experts.residual_choice`), and the last tenth is left to measure the
outcome.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefast.core.grids import METAL_POOR, SNR_NORM_NAMES, assign_snr_bins
from moefast.experts.protocol import Expert, Inputs
from moefast.experts.residual import fit_linear_residual, fit_ridge_residual
from moefast.experts.residual_choice import choose_residuals, regions
from moefast.fitting.families import FIT_ROWS
from moefast.fitting.sample import Sample
from moefast.fitting.training_set import TrainingSet
from moefast.mixture import Mixture

__all__ = ["add_residuals"]

F64 = NDArray[np.float64]

TREES, LEAF = 100, 500
"""Trees of a residual, and rows in a leaf: a strong answer leaves little to find, and much noise to fall for."""
LEAST_WEIGHT = 0.02
"""Gate weight of an expert from which on a star counts in its residual's forest."""
LEAST_STARS = 200
"""Stars that a residual is fitted on at the least."""
PENALTY = 0.1
"""Of the ridge, as a share of each feature's variance."""
FAINT = 4.0
"""Largest snr_norm of the faint stars that residuals may be fitted for alone."""


def add_residuals(
    data: TrainingSet, mixture: Mixture, sample: Sample, values: NDArray, gate: F64
) -> tuple[Mixture, NDArray, dict[str, Any]]:
    """The mixture with the residuals that are kept, the sample's values of its experts with them, and what was kept."""
    options, rows = data.options, sample.rows
    part, y, strong = data.part_of(rows), data.y[rows], (gate * values).sum(1)
    wrong = y - strong
    if options.residual_focus:
        # Elsewhere a residual learns to be zero, and is judged there as well.
        weak = (data.labels["M_H"][rows] < METAL_POOR) | (sample.snr_norm <= FAINT)
        wrong = np.where(weak, wrong, 0.0)
    families = mixture.families

    def seen(k: int, some: NDArray | slice) -> Inputs:
        own = Inputs(*(a[some] for a in sample.inputs[:3]))
        return own._replace(value=values[some, k], linear=sample.values["linear"][some, k])

    fitted, judges = np.flatnonzero(part > 2), np.isin(part, (1, 2))
    experts: dict[str, dict[int, Expert]] = {name: {} for name in options.residuals}
    step = data.steps("residuals", len(experts) * options.grid.n_bins)
    for name, k in itertools.product(experts, range(options.grid.n_bins)):
        # Far from its bin an expert has next to no say; forests take all rows alike for the time that they take.
        near = fitted[gate[fitted, k] > LEAST_WEIGHT]
        enough = len(np.unique(rows[near])) > LEAST_STARS
        if enough and (name, families[k]) != ("linear", "linear"):
            experts[name][k] = _fit_residual(name, seen(k, near), wrong[near], gate[near, k], options.seed)
        step()
    kept = choose_residuals(
        y[judges], strong[judges], gate[judges],
        {name: {k: e.predict(seen(k, judges)) for k, e in each.items()} for name, each in experts.items()},
        rows[judges],
        regions(
            data.bins[rows[judges]], options.grid.names, data.labels["M_H"][rows[judges]],
            assign_snr_bins(sample.snr_norm[judges]), SNR_NORM_NAMES,
        ),
        mixture.label_range,
    )  # fmt: skip
    chosen = {k: experts[name][k] for k, name in sorted(kept.kept.items())}
    if chosen:
        values = values.copy()
    for k, expert in chosen.items():
        values[:, k] += expert.predict(seen(k, slice(None)))
        mixture = mixture.with_expert(expert, k, added=True)
    return mixture, values, kept.summary(options.grid.names)


def _fit_residual(name: str, seen: Inputs, wrong: F64, weight: F64, seed: int) -> Expert:
    """A residual of one kind."""
    if name == "linear":
        return fit_linear_residual(seen, wrong, weight)
    if name == "ridge":
        return fit_ridge_residual(seen, wrong, weight, PENALTY)
    from moefast.experts.trees import fit_trees, stacking

    few = slice(None, None, -(-len(wrong) // FIT_ROWS))
    features = stacking(Inputs(*(a[few] for a in seen[:3])))
    return fit_trees(
        features, wrong[few], weight[few], sees="stacking", seed=seed,
        n_trees=TREES, least_stars=LEAF,
    )  # fmt: skip
