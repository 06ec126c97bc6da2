"""The order of the stages, and what a fit says of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from moefast.checkpoint import Checkpoint
from moefast.core.progress import SAMPLED, StageProgress
from moefast.experts.linear_form import LinearForm
from moefast.experts.template import Templates
from moefast.fitting.error_model import train_error_model
from moefast.fitting.families import check_installed, choose_families, make_library
from moefast.fitting.first_pass import Gathered, gather
from moefast.fitting.gate import train_gate
from moefast.fitting.linear_experts import mixture_of, solve
from moefast.fitting.network import check_network, train_heads
from moefast.fitting.options import Options
from moefast.fitting.posterior import fit_posterior
from moefast.fitting.references import reference_forms, sampled_oracle
from moefast.fitting.residuals import add_residuals
from moefast.fitting.sample import draw_sample
from moefast.fitting.training_set import TrainingSet
from moefast.gating.mlp import softmax
from moefast.mixture import Mixture
from moefast.posterior import PosteriorMixture
from moefast.spectra.source import SpectrumSource

__all__ = ["HERE", "Fit", "Passes", "fit_mixture"]

CHI2_QUANTILE = 0.999


@dataclass(frozen=True)
class Passes:
    """Who reads the rows: this process, unless others do.

    `training_set` makes the rows of a fit, `first_pass` gives what its first pass gathers from them; arguments and
    results are those of `TrainingSet` and `moefast.fitting.first_pass.gather`.
    """

    training_set: Callable[..., TrainingSet] = TrainingSet
    first_pass: Callable[..., Gathered] = gather


HERE = Passes()


@dataclass(frozen=True)
class Fit:
    """A fitted mixture, the linear forms to compare it with, and what happened on the way."""

    mixture: Mixture | PosteriorMixture
    references: dict[str, LinearForm]
    summary: dict[str, Any]


def fit_mixture(
    spectra: SpectrumSource,
    options: Options,
    progress: StageProgress | None = None,
    checkpoint: Checkpoint | None = None,
    backend: Literal["cpu", "cuda"] = "cpu",
    passes: Passes = HERE,
) -> Fit:
    """Fit a mixture of linear experts, its gate and its error model.

    Parameters
    ----------
    spectra : SpectrumSource
        With labels T_eff [K], log_g [dex], M_H [dex].
    options : Options
    progress : callable, optional
        Called with the name of a stage, rows (or steps) done and rows in all.
    checkpoint : Checkpoint, optional
        Where the first pass is kept; goes on from what is there, on a CPU with the same bits. The caller removes it.
    backend : "cpu" or "cuda"
        Where the normal equations are gathered, and posteriors of the sample computed.
    passes : Passes
        Who reads the rows.

    Raises
    ------
    LabelError
        Labels are missing or not finite.
    InputError
        Too few usable rows, or the checkpoint is of another fit.
    OutputError
        There is no room for checkpoints.
    BackendError
        There is no usable GPU, or its memory is too small.
    """
    report = progress or (lambda *_: None)
    found = _both_passes(passes.training_set(spectra, options, report), passes, checkpoint, backend)
    if options.has_sampled_oracle:
        # What the choice of families is compared with: one noise draw per star, as published.
        sampled = replace(
            options, noise="sampled", families=("linear",), metal_poor_families=(), references=False
        )
        again = passes.training_set(
            spectra, sampled, lambda stage, *steps: report(f"{stage}{SAMPLED}", *steps)
        )
        gathered = passes.first_pass(again, None, backend)
        found.references["oracle-ridge, sampled"] = sampled_oracle(again, gathered)
    return found


def _both_passes(
    data: TrainingSet, passes: Passes, checkpoint: Checkpoint | None, backend: Literal["cpu", "cuda"]
) -> Fit:
    """The stages in order. What they hold is freed when it returns."""
    options = data.options
    check_installed(options.all_families)
    if "heads" in options.families:
        # What a network lacks must be known before the first pass, not after.
        check_network(data, checkpoint, backend)
    equations, published, times_good, used = passes.first_pass(data, checkpoint, backend)
    solved = solve(data, equations, times_good)
    # Gigabytes that nothing below needs.
    del equations
    small, experts = solved.small, solved.experts
    mixture = mixture_of(data, solved)
    bins = zip(options.grid.names, small.count.sum(1), experts.alphas, experts.conditions, strict=True)
    summary: dict[str, Any] = {
        "rows": used,
        "bins": {name: {"n": int(n), "alpha": a, "condition": c} for name, n, a, c in bins},
        "solver": experts.solver,
        "clipped": options.clipped,
        "discarded_variance": solved.subspace.discarded,
        "noise_levels": solved.levels.s.tolist(),
    }
    if "posterior" in options.families:
        posterior, of_posterior = fit_posterior(data, mixture, backend)
        return Fit(posterior, reference_forms(data, published, solved), summary | of_posterior)
    stages: dict[str, Any] = {}
    if "template" in options.families:
        library, tried = make_library(data, mixture)
        mixture = mixture.with_expert(Templates(library))
        stages["library"] = {
            "clouds": len(library.keys),
            "tangents": library.variances.shape[1],
            "r2_held_out": tried,
        }
    if "heads" in options.families:
        heads, stages["heads"] = train_heads(data, mixture, checkpoint, backend)
        mixture = mixture.with_expert(heads)
    sample = draw_sample(data, mixture, experts, backend)
    if len(options.all_families) > 1:
        mixture, stages["families"] = choose_families(data, mixture, sample)
    values, noise = sample.of_families(mixture.families)
    mixture, logits = train_gate(data, mixture, experts, sample, values)
    gate = softmax(logits)
    if options.residuals:
        mixture, values, stages["residuals"] = add_residuals(data, mixture, sample, values, gate)
    mixture, quality = train_error_model(data, mixture, sample, values, noise, gate)
    references = reference_forms(data, published, solved)
    summary |= {
        "log_level": [float(v) for v in mixture.knots[[0, -1]]],
        "chi2_limit": float(1 + 2 * max(np.quantile(sample.chi2, CHI2_QUANTILE) - 1, 0.1)),
        "cross_validation": quality,
    }
    return Fit(mixture, references, summary | stages)
