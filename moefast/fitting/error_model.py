"""The error model, its calibration, and what stars that decided nothing say of the fitted mixture.

Design: ln σ is a network's answer, trained by likelihood; one factor then makes intervals hold on stars that did not
train it. Of ten stars seven train, two stop and calibrate, one measures.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from moefast.core.metrics import r2
from moefast.fitting.sample import Sample
from moefast.fitting.training_set import TrainingSet
from moefast.gating.mlp import as_float32, fit_error_model
from moefast.mixture import Mixture

__all__ = ["balanced_factor", "train_error_model"]

F64 = NDArray[np.float64]

Z_95 = 1.959964


def train_error_model(
    data: TrainingSet, mixture: Mixture, sample: Sample, values: NDArray, noise: NDArray, gate: F64
) -> tuple[Mixture, dict[str, float]]:
    """The mixture with its error model and its factor; a tenth of the stars only measures the outcome.

    Seven tenths of the stars train, two decide when to stop and set the factor, one is seen by none of these. The
    experts saw none of them, but for the choice of α, of the library's size and of families.

    Parameters
    ----------
    data : TrainingSet
    mixture : Mixture
    sample : Sample
    values, noise : array of shape (n, K), dex
        Of the mixture's experts for the sample, residuals included, and their propagated noise.
    gate : array of shape (n, K)
        Weights of the experts.
    """
    features, rows = sample.features, sample.rows
    y, true = data.y[rows], data.bins[rows]
    part = data.part_of(rows)
    check = part == 0
    held, fitted = np.isin(part, (1, 2))[~check], ~check
    mixed = (gate * values).sum(1)
    log_g = np.clip(mixed, *mixture.label_range)
    raw = (gate * noise).sum(1)
    spread = np.sqrt((gate * (values - mixed[:, None]) ** 2).sum(1))
    inputs = mixture.error_features(features, log_g, raw, spread)
    net = fit_error_model(
        inputs[fitted],
        (y - log_g)[fitted],
        held,
        seed=data.options.seed,
        progress=partial(data.progress, "error model"),
    )
    ratio = np.abs(y - log_g) / np.exp(net(inputs)[:, 0])
    factor = balanced_factor(ratio[fitted][held])
    w1, b1, w2, b2 = net.folded()
    mixture = replace(mixture, error_model=as_float32((w1, b1, w2, b2 + np.log(factor))))
    quality = {
        "rows": int(check.sum()),
        "r2": r2(y[check], log_g[check]),
        "r2_true_bins": r2(y[check], values[np.arange(len(y)), true][check]),
        "coverage_68": float(np.mean(ratio[check] <= factor)),
        "coverage_95": float(np.mean(ratio[check] <= Z_95 * factor)),
        "gate_accuracy": float(np.mean(gate.argmax(1)[check] == true[check])),
        "gate_learnt": bool(np.any(mixture.gate[2])),
        "tower_learnt": mixture.tower is not None,
    }
    return mixture, quality


def balanced_factor(ratio: NDArray) -> float:
    """Factor on σ for which 1σ and 1.96σ hold as nearly 68.27 % and 95 % as one factor can make them.

    min over c of max(|P(r ≤ c) − 0.6827|/2, |P(r ≤ 1.96 c) − 0.95|): errors within the box of labels have lighter
    tails than a Gaussian, so one factor cannot make both exact.

    Parameters
    ----------
    ratio : array of shape (n,)
        |y − ŷ|/σ of rows that did not train the error model.
    """
    ordered = np.sort(ratio)
    trial = np.quantile(ordered, np.linspace(0.5, 0.9, 401))
    inner = np.searchsorted(ordered, trial, side="right") / ordered.size
    outer = np.searchsorted(ordered, Z_95 * trial, side="right") / ordered.size
    miss = np.maximum(np.abs(inner - 0.6827) / 2, np.abs(outer - 0.95))
    return float(trial[miss.argmin()])
