"""Made-up posterior mixtures: smooth spectra with lines, clouds along a curve, sky lines in the noise."""

from __future__ import annotations

import numpy as np

from moefast.posterior.mixture import SCALE_UNIT, PosteriorMixture


def mixture(p=192, m=70, t=2, n=7, q=3, experts=3, labels=3, seed=0, n_sky=0):
    """A mixture of m clouds in n coordinates, the scale among them, with q nuisances."""
    rng = np.random.default_rng(seed)
    x = np.linspace(-1, 1, p)
    depths, places, widths = rng.uniform((0.1, -1, 0.01), (0.5, 1, 0.05), (9, 3)).T
    lines = (depths * np.exp(-0.5 * ((x[:, None] - places) / widths) ** 2)).sum(1)
    reference = (1 + 0.2 * x) * (1 - np.clip(lines, 0, 0.8))
    profile = np.exp(-0.5 * (np.arange(-6, 7) / 1.5) ** 2)
    sky = np.convolve(rng.exponential(20, p) * (rng.random(p) < 0.05), profile, "same")
    shape = 0.01 * (1 + sky)
    centres, widths = rng.uniform(-1, 1, n - 1), rng.uniform(0.02, 0.3, n - 1)
    # Orthogonal, as components are: what many lines of one form share would be known to no digit.
    basis = 0.02 * np.sqrt(p) * np.linalg.qr(np.exp(-0.5 * ((x[:, None] - centres) / widths) ** 2))[0]
    slopes = np.stack([0.05 * reference * x ** (k + 1) for k in range(q)], 1) if q else np.empty((p, 0))
    directions = np.concatenate([basis, SCALE_UNIT * reference[:, None], slopes], 1)
    keys = rng.normal(0, 5, (m, n))
    tangents = rng.normal(0, 1.5, (m, t, n))
    keys[:, -1], tangents[:, :, -1] = 0, 0
    root = rng.normal(0, 0.1, (m, labels, labels))
    counts = rng.multinomial(m - experts, np.full(experts, 1 / experts)) + 1
    share = rng.dirichlet(np.full(m, 3))
    arrays = {
        "reference": reference, "noise_shape": shape, "directions": directions, "keys": keys, "tangents": tangents,
        "gains": rng.normal(0, 0.3, (m, t, labels)), "log_weights": np.log(share),
        "labels": 2.5 + rng.normal(0, 0.7, (m, labels)), "scatter": root @ root.transpose(0, 2, 1),
        "label_factors": rng.uniform(0.9, 1.1, labels),
    }  # fmt: skip
    error_model = (
        rng.normal(0, 0.3, (5, 4)),
        rng.normal(0, 0.3, 4),
        rng.normal(0, 0.3, (4, 1)),
        np.array([-1.0]),
    )
    return PosteriorMixture(
        wave=np.linspace(7100.0, 8850.0, p),
        **{name: array.astype(np.float32) for name, array in arrays.items()},
        first=np.concatenate([[0], np.cumsum(counts)]),
        scale_width=0.3,
        label_range=(1.0, 5.0),
        error_model=tuple(part.astype(np.float32) for part in error_model),
        label_names=("log_g", "T_eff", "M_H", "a_M", "C_M")[:labels],
        n_sky=n_sky,
    )


def stars(mixture, n, snr=10.0, seed=1):
    """Flux and error of n stars of a mixture's own clouds, at scales between 0.5 and 2."""
    rng = np.random.default_rng(seed)
    m, t, n_coordinates = mixture.tangents.shape
    cloud = rng.integers(0, m, n)
    z = mixture.keys[cloud] + rng.standard_normal((n, n_coordinates))
    z += np.einsum("it,itn->in", rng.standard_normal((n, t)), mixture.tangents[cloud])
    z[:, -1] = 0
    scale = rng.uniform(0.5, 2, (n, 1))
    clean = scale * (mixture.reference + z @ mixture.directions[:, :n_coordinates].T)
    error = (
        scale
        * np.sqrt(mixture.noise_shape / mixture.noise_shape.mean())
        * rng.uniform(0.7, 1.4, clean.shape)
        / snr
    )
    return (clean + error * rng.standard_normal(clean.shape)).astype(np.float32), error.astype(np.float32)
