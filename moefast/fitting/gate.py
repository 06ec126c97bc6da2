"""The gate: what it learns from the sample, and a second tower beside it.

Design: a gate starts from what is known without training, the evidence of a library, and what it learns is added to
that. A network brings its own gate. What is learnt beside evidence, and a second tower beside a first one, are kept
only where they are better beyond doubt on stars that decide when to stop. A gate that is to be fitted without evidence
starts from even weights, and the library keeps its means alone.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from moefast.experts.template import TemplateMeans, Templates
from moefast.fitting.linear_experts import LinearExperts
from moefast.fitting.sample import Faint, Sample, draw_faint
from moefast.fitting.training_set import TrainingSet
from moefast.gating.mlp import as_float32, fit_gate, softmax
from moefast.gating.tower import FEATURES, VIEWS, Tower
from moefast.mixture import Mixture
from moefast.trunks.heads import Heads

__all__ = ["train_gate", "without_evidence"]

F64 = NDArray[np.float64]

TOWER_HIDDEN = 128
"""Width of a tower that sees the features of the first."""
TOWER_STEPS = 10_000


def train_gate(
    data: TrainingSet, mixture: Mixture, experts: LinearExperts, sample: Sample, values: NDArray
) -> tuple[Mixture, NDArray]:
    """The mixture with its gate, and the logits of the sample.

    Parameters
    ----------
    data : TrainingSet
    mixture : Mixture
    experts : LinearExperts
    sample : Sample
    values : array of shape (n, K), dex
        Of the mixture's experts for the sample.
    """
    rows = sample.rows
    y, part = data.y[rows], data.part_of(rows)
    fitted = part != 0
    held = np.isin(part, (1, 2))[fitted]
    if not data.options.evidence:
        sample, mixture = sample._replace(logits=None), without_evidence(mixture)
    logits = np.zeros_like(values) if sample.logits is None else sample.logits
    if values.shape[1] > 1 and data.options.first_tower and mixture.place(Heads) is None:
        net = fit_gate(
            sample.features[fitted],
            values[fitted],
            y[fitted],
            held,
            given=None if sample.logits is None else sample.logits[fitted],
            seed=data.options.seed,
            progress=partial(data.progress, "gate"),
        )
        learnt = logits + net(sample.features)
        # Bayes' rule needs no training; what was learnt is added to it only where it is better beyond doubt.
        judges = np.flatnonzero(fitted)[held]
        if sample.logits is None or _is_better(softmax(learnt), softmax(logits), values, y, rows, judges):
            logits, mixture = learnt, replace(mixture, gate=as_float32(net.folded()))
    if values.shape[1] > 1 and data.options.tower is not None:
        mixture, logits = _add_tower(data, mixture, experts, sample, logits)
    return mixture, logits


def without_evidence(mixture: Mixture) -> Mixture:
    """The mixture with the means of its library, but without the evidence."""
    return replace(
        mixture,
        experts=tuple(
            replace(place, expert=TemplateMeans(place.expert.library))
            if isinstance(place.expert, Templates)
            else place
            for place in mixture.experts
            # A library that serves no bin was there for its evidence.
            if place.bins or not isinstance(place.expert, Templates)
        ),
    )


def _add_tower(
    data: TrainingSet, mixture: Mixture, experts: LinearExperts, sample: Sample, logits: NDArray
) -> tuple[Mixture, NDArray]:
    """The mixture with a second tower, and the logits of the sample with its own.

    It is trained on what the first tower leaves, and kept where it is better beyond doubt on stars that neither
    saw, or where there is no first one.
    """
    options, limit = data.options, data.options.tower_limit
    assert options.tower is not None
    near = np.flatnonzero(sample.snr_norm <= limit)
    values, hidden = sample.values["linear"], TOWER_HIDDEN
    seen = sample.features
    if options.tower != FEATURES:
        seen, hidden = sample.seen, VIEWS[options.tower].hidden
    stars = Faint(sample.rows[near], seen[near], values[near], logits[near])
    drawn = options.noise != "observed" and options.alpha is None
    if options.tower == FEATURES and limit < math.inf and drawn:
        stars = draw_faint(data, mixture, experts)
    part = data.part_of(stars.rows)
    fitted, held = part != 0, np.isin(part, (1, 2))
    if not held.any() or held[fitted].all():
        return mixture, logits
    net = fit_gate(
        stars.seen[fitted],
        stars.values[fitted],
        data.y[stars.rows[fitted]],
        held[fitted],
        given=stars.logits[fitted],
        hidden=hidden,
        steps=TOWER_STEPS,
        seed=options.seed,
        progress=partial(data.progress, "tower"),
    )
    tower = Tower(options.tower, as_float32(net.folded()), limit)
    added = logits + tower.logits(sample.snr_norm, lambda rows: seen[rows])
    judges = near[np.isin(data.part_of(sample.rows[near]), (1, 2))]
    y, gates = data.y[sample.rows], (softmax(added), softmax(logits))
    if options.first_tower and not (judges.size and _is_better(*gates, values, y, sample.rows, judges)):
        return mixture, logits
    return replace(mixture, tower=tower), added


def _is_better(gate: F64, other: F64, values: F64, y: F64, star: NDArray, judges: NDArray[np.intp]) -> bool:
    """Whether a gate's mixture is better than another's by more than a standard error over the stars of some rows."""
    wrong, base = ((((each * values).sum(1) - y)[judges]) ** 2 for each in (gate, other))
    # Draws of one star's noise are no stars of their own.
    _, which = np.unique(star[judges], return_inverse=True)
    gain = np.bincount(which, base - wrong) / np.bincount(which)
    return bool(gain.mean() > gain.std() / np.sqrt(len(gain)))
