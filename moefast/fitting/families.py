"""Experts of other families: a library of templates, forests, and the choice for each bin.

Design: both are made of stars that are not in the sample, so that the sample can judge them. A bin keeps its linear
expert unless another is better beyond doubt (`moefast.experts.choice`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from moefast.experts.choice import choose
from moefast.experts.inputs import Inputs
from moefast.experts.template import choose_library, fit_library
from moefast.fitting.sample import Sample
from moefast.fitting.training_set import TrainingSet
from moefast.kernels import Library
from moefast.mixture import Mixture

if TYPE_CHECKING:
    from moefast.experts.trees import Trees

__all__ = ["FOREST_ROWS", "LIBRARY_ROWS", "choose_families", "families_of", "make_library"]

LIBRARY_ROWS = 200_000
"""Stars that a library is made of at most: a thousand clouds of two hundred."""
FOREST_ROWS = 100_000
"""Stars that the forests of all bins are grown on at most."""


def make_library(data: TrainingSet, mixture: Mixture) -> tuple[Library, dict[str, float]]:
    """A library of stars that are not in the sample, and the R² of what was tried on noisy stars of the sample."""
    stars, rows = data.inputs(mixture, "templates", data.other_stretches(LIBRARY_ROWS), noisy=False)
    labels = np.column_stack([data.labels[name][rows] for name in ("T_eff", "log_g", "M_H")])

    def fit(n_clouds: int, n_tangents: int) -> Library:
        return fit_library(
            stars.z, labels, data.y[rows], data.bins[rows], data.options.grid.n_bins,
            n_clouds=n_clouds, n_tangents=n_tangents, seed=data.options.seed,
        )  # fmt: skip

    judges, of_judges = data.inputs(mixture, "held-out stars", data.held_stretches(), noisy=True)
    return choose_library(
        fit, judges.z, judges.log_level, data.y[of_judges],
        n_stars=len(rows), progress=partial(data.progress, "library"),
    )  # fmt: skip


def families_of(mixture: Mixture) -> list[str]:
    """Family of each expert of a mixture."""
    if mixture.heads is not None:
        return ["heads"] * mixture.n_experts
    marks = mixture.from_library or (False,) * mixture.n_experts
    found = ["template" if mark else "linear" for mark in marks]
    for k, expert in mixture.others.items():
        found[k] = expert.family
    return found


def choose_families(data: TrainingSet, mixture: Mixture, sample: Sample) -> tuple[Mixture, dict[str, Any]]:
    """The family of each bin that is best, beyond doubt, on stars of the sample that do not measure the outcome.

    Forests are grown on the library's stars, with one draw of noise.
    """
    options, names = data.options, data.options.grid.names
    forests: dict[int, Trees] = {}
    if "trees" in options.families:
        from moefast.experts.trees import fit_trees, stacking

        inputs, rows = data.inputs(mixture, "forest stars", data.other_stretches(FOREST_ROWS), noisy=True)
        step = data.steps("forests", options.grid.n_bins)
        sample.values["trees"] = np.empty_like(sample.values["linear"])
        sample.noise["trees"] = sample.noise["linear"]
        for k in range(options.grid.n_bins):
            here = data.bins[rows] == k
            mine = stacking(Inputs(*(a[here] for a in inputs[:3])))
            forests[k] = fit_trees(mine, data.y[rows[here]], sees="stacking", seed=options.seed)
            sample.values["trees"][:, k] = forests[k].predict(sample.inputs)
            step()
    seen = data.part_of(sample.rows) != 0
    bins = data.bins[sample.rows[seen]]
    own = np.arange(len(sample.rows)), data.bins[sample.rows]
    candidates = {name: sample.values[name][own][seen] for name in options.families}
    choice = choose(data.y[sample.rows[seen]], candidates, bins, "linear", n_bins=options.grid.n_bins)
    mixture = replace(
        mixture,
        from_library=tuple(name == "template" for name in choice.families),
        others={k: forests[k] for k, name in enumerate(choice.families) if name == "trees"},
    )
    table = {
        names[k]: {
            "family": choice.families[k],
            "n": int(choice.n[k]),
            "gain": dict(zip(choice.names, choice.gain[k].tolist(), strict=True)),
            "standard_error": dict(zip(choice.names, choice.standard_error[k].tolist(), strict=True)),
        }
        for k in range(options.grid.n_bins)
    }
    return mixture, table
