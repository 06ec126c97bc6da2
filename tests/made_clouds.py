"""Made-up posterior mixtures: smooth spectra with lines, clouds along a curve, sky lines in the noise."""

from __future__ import annotations

import numpy as np

from moefast.ops.on_numpy import NumPyArithmetic
from moefast.posterior.forward import cloud_values
from moefast.posterior.mixture import SCALE_UNIT, PosteriorMixture

LABEL_TOLERANCE = 1e-5
"""How close means of labels are, absolutely and relative to them, in dex."""
ROUNDING = 0.42 * 2.0**-24
"""Standard deviation of a rounding to single precision, relative: 2⁻²⁴/√3 for leading digits of 1, half for those of
2, and 0.42 · 2⁻²⁴ in the mean over digits that are uniform in the logarithm."""
SIGMAS = 4
"""Of the errors of evidences, which one of 16 000 exceeds."""


def mixture(p=192, m=70, t=2, n=7, q=3, experts=3, labels=3, seed=0, n_sky=0, calibrated=(0.0,)):
    """A mixture of m clouds in n coordinates, the scale among them, with q nuisances.

    `calibrated`: a share of stars, and how narrow the first slope is in these; others are narrower still.
    """
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
        calibrated=(calibrated[0], *(calibrated[1] / (1 + i) for i in range(q - n_sky) if calibrated[0])),
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


def expert_label_bound(mixture, flux, error):
    """How far single precision may put the mean log g of each expert's clouds from the description's, (n, K), dex.

    ln of a cloud's evidence is −½S and terms of order one, with S = Σ r_i² + Σ γ_k² a sum of N squares, all positive,
    in single precision. With ε = `ROUNDING` for each rounding, independent of each other,

        sums on the way, i S/N after i terms:      ε S √(N/3),
        residuals r_i, sums of terms of which the whitened mean and star, of squares Q in all, are the largest, and
        whose own sums of n terms are off by ε √(n/3) of them:     2 ε √(S Q/3),
        ½S as it is kept:      2 ε (S/2),

    the standard error of ln E is half the root of the sum of their squares,

        σ = ½ ε S √(N/3 + 1 + 4 Q/(3 S)).

    Far from a star, S = 5000 and N = 74, that is 3·10⁻⁴, and no order of a sum avoids it. What it does to the mean
    μ = Σ w_j μ_j of an expert, with w_j the weights of its clouds, is Σ w_j (μ_j − μ) δ ln E_j: at most the largest
    error times the mean absolute deviation of its clouds' labels. Two clouds of like weight that differ by 1 dex, both
    far from the star, give 10⁻⁴ dex; an expert near the star, or with one cloud that counts, nearly nothing.
    """
    numbers = mixture.numbers
    with np.errstate(invalid="ignore", over="ignore"):
        seen = cloud_values(
            NumPyArithmetic(numbers), mixture.sizes, flux.astype(np.float64), error.astype(np.float64)
        )
    information = np.eye(mixture.n_coordinates) - seen.smoothing
    root = np.linalg.cholesky(information)
    star = np.linalg.solve(root, seen.smoothed)[..., 0]
    of_star = (star**2).sum(1)[:, None]
    means = np.einsum("iab,ma->imb", root, numbers["keys_transposed"].T.astype(np.float64))
    terms = of_star + (means**2).sum(2)
    log_determinant = -np.linalg.slogdet(seen.inverse)[1]
    # Of |star|² the evidence lacks half, which is the same for all clouds.
    square = of_star - 2 * (seen.evidence - numbers["log_weights"] + 0.5 * log_determinant)
    labels = numbers["labels"][:, 0] + np.einsum("nmtx,mt->nm", seen.coefficients, numbers["gains"][:, :, 0])
    count = mixture.n_coordinates + seen.inverse.shape[-1]
    sigma = 0.5 * ROUNDING * np.sqrt(square**2 * (count / 3 + 1) + 4 / 3 * square * terms)
    bound = np.empty((len(flux), mixture.first.size - 1))
    for k in range(bound.shape[1]):
        clouds = slice(mixture.first[k], mixture.first[k + 1])
        evidence = seen.evidence[:, clouds]
        best = evidence.argmax(1)[:, None]
        share = np.exp(evidence - np.take_along_axis(evidence, best, 1))
        share /= share.sum(1, keepdims=True)
        mean = (share * labels[:, clouds]).sum(1, keepdims=True)
        spread = (share * np.abs(labels[:, clouds] - mean)).sum(1)
        largest = np.take_along_axis(sigma[:, clouds], best, 1)[:, 0]
        bound[:, k] = LABEL_TOLERANCE * (1 + np.abs(mean[:, 0])) + SIGMAS * largest * spread
    return bound


def assert_expert_labels(mixture, flux, error, found, expected):
    """Means of experts by any kernels, (n, K), are those of the description as far as single precision holds them."""
    assert found.shape == expected.shape
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    off = np.abs(found - expected)
    # Few rows need more than what all labels keep.
    rows = np.flatnonzero((off > LABEL_TOLERANCE * (1 + np.abs(expected))).any(1))
    for a in range(0, len(rows), 32):
        some = rows[a : a + 32]
        bound = expert_label_bound(mixture, flux[some], error[some])
        excess = off[some] / bound
        worst = np.unravel_index(excess.argmax(), excess.shape)
        assert excess.max() <= 1, (
            f"expert_label: row {some[worst[0]]}, expert {worst[1]}: off by {off[some][worst]:.2g}, "
            f"{bound[worst]:.2g} allowed"
        )
