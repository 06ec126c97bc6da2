"""Evaluations of made-up predictions of fake stars, with whatever R² a test asks for."""

import json
from functools import lru_cache

import numpy as np
from made_up import evaluated

from moefast.core import metrics
from moefast.core.records import as_entries
from moefast.simulate.sets import FINGERPRINTS

N = 400
Z0 = {"reference_set": "z0", "part": "test_10k", "fingerprint": FINGERPRINTS["z0", "test_10k"]}


@lru_cache
def stars():
    rng = np.random.default_rng(8)
    return {
        "log_g": rng.uniform(1, 5, N),
        "t_eff": rng.uniform(3750, 6000, N),
        "m_h": rng.uniform(-2.5, 0.75, N),
        "snr_norm": rng.uniform(1, 9, N),
        "noise": rng.normal(0, 1, N),
    }


def predictions(scatter):
    """Predictions with R² = 1 − scatter² nearly everywhere; `scatter` is a number or one per star."""
    data = stars()
    return data["log_g"] + np.std(data["log_g"]) * scatter * data["noise"]


@lru_cache
def evaluation(recipe, r2, *, references=(), data_set="z0 test_10k", fingerprint="f" * 64, bayes=0.95,
               reference_set=True, noise_seed=None, noise_level=1.0, training=(), n=10_000):  # fmt: skip
    """JSON of an evaluation; `references` are (name, R²) pairs. `n` is claimed: the numbers come from 400 stars."""
    data = stars()
    report = evaluated(
        data["log_g"],
        predictions(np.sqrt(1 - np.asarray(r2))),
        None,
        t_eff=data["t_eff"],
        m_h=data["m_h"],
        snr_norm=data["snr_norm"],
        snr_median=3 * data["snr_norm"],
        data_set=data_set,
        fingerprint=fingerprint,
        references={name: predictions(np.sqrt(1 - np.asarray(value))) for name, value in references},
        ceilings={} if bayes is None else {"bayes": bayes},
        noise_level=noise_level,
        noise_seed=noise_seed,
        model={"name": recipe, "sha256": "0" * 64, "training": dict(training)},
        n_resamples=50,
    )
    # Fifty resamples are as good as a thousand to test with, and much quicker.
    content = as_entries(report)
    content["protocol"]["n_resamples"] = metrics.N_RESAMPLES
    content["data_set"] |= {"n": n, "reference_set": Z0 if reference_set else None}
    return json.dumps(content)
