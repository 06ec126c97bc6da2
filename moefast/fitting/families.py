"""Experts of other families: a library of templates, those that are fitted bin by bin, and the choice for each bin.

Design: both are made of stars that are not in the sample, so that the sample can judge them. A bin keeps its linear
expert unless another is better beyond doubt (`moefast.experts.choice`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from moefast.experts.choice import choose
from moefast.experts.protocol import Expert, Inputs, family
from moefast.experts.template import choose_library, fit_library
from moefast.fitting.options import WHOLE
from moefast.fitting.sample import Sample
from moefast.fitting.training_set import TrainingSet
from moefast.kernels import Library
from moefast.mixture import Mixture

__all__ = ["FIT_ROWS", "LIBRARY_ROWS", "choose_families", "make_library"]

LIBRARY_ROWS = 200_000
"""Stars that a library is made of at most: a thousand clouds of two hundred."""
FIT_ROWS = 100_000
"""Stars that the experts of all bins of another family are fitted on at most."""


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


def choose_families(data: TrainingSet, mixture: Mixture, sample: Sample) -> tuple[Mixture, dict[str, Any]]:
    """The family of each bin that is best, beyond doubt, on stars of the sample that do not measure the outcome.

    Families that are fitted bin by bin see the library's stars, with one draw of noise.
    """
    options, names = data.options, data.options.grid.names
    fitted = {name: _fit_bins(data, mixture, sample, name) for name in options.families if name not in WHOLE}
    seen = data.part_of(sample.rows) != 0
    bins = data.bins[sample.rows[seen]]
    own = np.arange(len(sample.rows)), data.bins[sample.rows]
    candidates = {name: sample.values[name][own][seen] for name in options.families}
    choice = choose(data.y[sample.rows[seen]], candidates, bins, "linear", n_bins=options.grid.n_bins)
    # Its evidence counts for every bin, whether or not one of them takes its mean.
    mixture = replace(
        mixture,
        experts=tuple(
            replace(
                place,
                bins=tuple(k for k, name in enumerate(choice.families) if name == place.expert.family),
            )
            for place in mixture.experts
        ),
    )
    for k, name in enumerate(choice.families):
        if name in fitted:
            mixture = mixture.with_expert(fitted[name][k], k)
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


def _fit_bins(data: TrainingSet, mixture: Mixture, sample: Sample, name: str) -> list[Expert]:
    """An expert of a family for each bin; what they say of the sample is added to it."""
    own, n_bins = family(name), data.options.grid.n_bins
    inputs, rows = data.inputs(mixture, "stars of the bins", data.other_stretches(FIT_ROWS), noisy=True)
    step = data.steps("families", n_bins)
    sample.values[name] = np.empty_like(sample.values["linear"])
    sample.noise[name] = sample.noise["linear"]
    fitted = []
    for k in range(n_bins):
        here = data.bins[rows] == k
        mine = Inputs(*(a[here] for a in inputs[:3]))
        fitted.append(own.fit(mine, data.y[rows[here]], seed=data.options.seed))
        sample.values[name][:, k] = fitted[k].predict(sample.inputs)
        step()
    return fitted
