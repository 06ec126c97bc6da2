"""Random posteriors for the tests of every engine, and one fitted to simulated stars."""

from __future__ import annotations

import numpy as np
from made_correction import with_correction
from plans import layers

from moefast.core.grids import PHYSICAL_GRID
from moefast.experts.linear_form import LinearForm
from moefast.model import Model
from moefast.posterior import fit_clouds, slopes
from moefast.posterior.mixture import LABELS, SCALE_UNIT, PosteriorMixture

UNITS = np.array([1.0, 800.0, 0.7, 0.2, 0.2])
"""Spread of each label."""


def random_posterior(
    p=512,
    m=17,
    n=7,
    t=2,
    q=2,
    n_experts=3,
    n_foreign=1,
    blends=False,
    labels=5,
    hidden=6,
    seed=0,
    sky=1,
    calibrated=(0.0,),
    corrects=False,
):
    """Clouds in n coordinates of p pixels; log g of some stars is clipped."""
    rng = np.random.default_rng(seed)
    noise_shape = np.exp(rng.normal(-4, 0.5, p))
    reference = rng.uniform(0.5, 1.5, p)
    wave = np.linspace(7100.0, 8850.0, p)
    across = np.linalg.qr(rng.standard_normal((p, n - 1)))[0] * np.sqrt(noise_shape)[:, None]
    directions = np.column_stack(
        [across * np.linspace(4, 1, n - 1), SCALE_UNIT * reference, slopes(wave, reference, (0.05, 0.03)[:q])]
    )
    keys, tangents = 2 * rng.standard_normal((m, n)), rng.standard_normal((m, t, n))
    keys[:, -1] = tangents[:, :, -1] = 0
    root = 0.2 * UNITS[:labels, None] * rng.standard_normal((m, labels, labels))
    arrays = {
        "reference": reference,
        "noise_shape": noise_shape,
        "directions": directions,
        "keys": keys,
        "tangents": tangents,
        "gains": 0.3 * UNITS[:labels] * rng.standard_normal((m, t, labels)),
        "log_weights": np.log(rng.dirichlet(np.full(m, 5.0))),
        "labels": np.array([3.0, 5000, -1, 0.2, 0])[:labels]
        + UNITS[:labels] * rng.standard_normal((m, labels)),
        "scatter": root @ root.transpose(0, 2, 1),
        "label_factors": rng.uniform(0.8, 1.3, labels),
    }
    error_model = layers(rng, 5, hidden, 1, 0.3)
    # The fourth feature is a temperature.
    error_model[0][3] /= UNITS[1]
    cuts = np.sort(rng.choice(np.arange(1, m), n_experts + n_foreign - 1, replace=False))
    made = PosteriorMixture(
        wave=wave,
        **{name: value.astype(np.float32) for name, value in arrays.items()},
        first=np.concatenate([[0], cuts, [m]]),
        n_sky=min(q, sky),
        calibrated=calibrated,
        n_foreign=n_foreign,
        blends=blends,
        scale_width=0.3,
        label_range=(2.6, 3.4),
        error_model=error_model,
        label_names=LABELS[:labels],
    )
    return with_correction(made) if corrects else made


def posterior_of(stars, n_coordinates=12, n_clouds=40, n_tangents=3, widths=(0.05,)):
    """Clouds of the clean spectra of simulated stars; errors of log g are the posterior's own."""
    labels = np.column_stack([stars.params[name] for name in LABELS]).astype(np.float64)
    bins = PHYSICAL_GRID.assign(labels[:, 1], labels[:, 2]).astype(int)
    reference, shape = stars.flux.mean(0), (stars.error**2).mean(0)
    white = (stars.flux - reference) / np.sqrt(shape)
    vectors = np.linalg.svd(white, full_matrices=False)[2][:n_coordinates].T
    arrays = fit_clouds(
        (white @ vectors).astype(np.float32),
        labels,
        bins,
        9,
        basis=vectors / np.sqrt(shape)[:, None],
        reference=reference,
        noise_shape=shape,
        n_clouds=n_clouds,
        n_tangents=n_tangents,
    )
    across = slopes(stars.wave, reference, widths)
    arrays["directions"] = np.concatenate([arrays["directions"], across], axis=1).astype(np.float32)
    # 100 tanh(x / 100) is x, nearly: ln of the error is that of the standard deviation of the posterior.
    w1 = np.zeros((5, 1), np.float32)
    w1[1] = 0.01
    return PosteriorMixture(
        wave=stars.wave,
        reference=reference.astype(np.float32),
        noise_shape=shape.astype(np.float32),
        **arrays,
        scale_width=0.3,
        label_range=(1.0, 5.0),
        error_model=(w1, np.zeros(1, np.float32), np.full((1, 1), 100, np.float32), np.zeros(1, np.float32)),
        label_factors=np.ones(len(LABELS), np.float32),
    )


SUMMARY = {
    "chi2_limit": 1.3,
    "log_level": (-2.0, 2.0),
    "library": {"slope_widths": (0.05,), "sky_width": 0.0},
    "distance_limit": {"log_strength": [3.0, 6.0], "limit": [2.0, 4.0]},
    "strength_limit": 10.0,
}


def model_of(mixture, **summary):
    p, k = mixture.n_pixels, mixture.n_experts
    level = np.zeros(1, np.float32)
    flat = LinearForm(np.zeros((p, 1, 1), np.float32), np.full((1, 1), 3, np.float32), level)
    binned = LinearForm(np.zeros((p, k, 1), np.float32), np.arange(k, dtype=np.float32)[:, None], level)
    return Model.of_mixture(
        mixture,
        {"global-ridge": flat, "binned": binned},
        recipe="posterior",
        grid=PHYSICAL_GRID,
        training={"log_g_std": 1.2},
        summary=SUMMARY | summary,
    )
