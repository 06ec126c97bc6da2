"""Clouds of spectra that the training set lacks: of stars hotter than all of it, and of the light of two stars."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moefast.experts.template import clouds_of_bins
from moefast.posterior.clouds import GROUPED_BY, Cloud, cloud_of

__all__ = [
    "BEYOND_LABEL",
    "BEYOND_SHARE",
    "BLEND_SHARE",
    "LIGHT_OF_OTHER",
    "blended",
    "clouds_beyond",
    "clouds_of_blends",
]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

BEYOND_SHARE = 0.05
"""Share of stars, before they are looked at, that are hotter than the training set."""
BEYOND_LABEL, BEYOND_SLAB = 1, 0.15
"""T_eff; and the part of its range, at its upper end, whose stars tell how spectra go on."""
BEYOND_STEPS = 3
"""How many times that part is moved on by its own width: 340 to 1010 K of a range of 2250 K."""
BEYOND_CLOUDS = 24
"""Clouds of each step."""
BLEND_SHARE = 0.05
"""Share of spectra, before they are looked at, that are the light of two stars."""
LIGHT_OF_OTHER = (0.1, 0.5)
"""Share of the light of a blend, least and most, that is of its fainter star."""
BLEND_STREAM = 5


def clouds_beyond(
    z: F32, labels: F64, bins: NDArray[np.integer], t: int, seed: int
) -> tuple[list[Cloud], NDArray[np.integer]]:
    """Clouds of stars beyond the upper end of `BEYOND_LABEL`, and the expert of each.

    Stars of the slab below that end are grouped in clouds, and the clouds are moved along the derivative of spectra by
    the label at the end, from a polynomial of second degree of all labels.
    """
    column = labels[:, BEYOND_LABEL]
    low, high = column.min(), column.max()
    slab = np.flatnonzero(column > high - BEYOND_SLAB * (high - low))
    spectra, y = z[slab].astype(np.float64), labels[slab]
    centre, spread = y.mean(0), y.std(0)
    i, j = np.triu_indices(y.shape[1])

    def terms(values: F64) -> F64:
        q = (values - centre) / np.where(spread > 0, spread, 1.0)
        return np.concatenate([np.ones((len(q), 1)), q, q[:, i] * q[:, j]], axis=1)

    coefficients = np.linalg.lstsq(terms(y), spectra, rcond=None)[0]
    clouds, _ = clouds_of_bins(
        z[slab], y[:, GROUPED_BY], np.zeros(len(slab), np.int64), 1, n_clouds=BEYOND_CLOUDS, seed=seed
    )
    parts, experts = [], []
    for cloud in clouds:
        here = cloud_of(spectra[cloud], y[cloud], t, len(slab))
        expert = int(np.bincount(bins[slab[cloud]]).argmax())
        # A difference over a small part of the slab is the derivative of a parabola, rounded.
        there, before = here.label[None].copy(), here.label[None].copy()
        there[:, BEYOND_LABEL] = high
        before[:, BEYOND_LABEL] = high - 0.01 * (high - low)
        slope = ((terms(there) - terms(before)) @ coefficients)[0] / 0.01
        for step in BEYOND_SLAB * np.arange(1, BEYOND_STEPS + 1):
            moved = here.label.copy()
            moved[BEYOND_LABEL] += step * (high - low)
            share = here.log_share + float(np.log(BEYOND_SHARE / BEYOND_STEPS))
            parts.append(here._replace(mean=here.mean + step * slope, log_share=share, label=moved))
            experts.append(expert)
    return parts, np.array(experts)


def clouds_of_blends(z: F32, labels: F64, t: int, n_blends: int, seed: int) -> list[Cloud]:
    """Clouds of the light of two stars each, with the labels of the brighter one."""
    draw = np.random.default_rng((seed, BLEND_STREAM))
    mixed = blended(z, draw.uniform(*LIGHT_OF_OTHER, len(z)), draw)
    clouds, _ = clouds_of_bins(
        mixed, labels[:, GROUPED_BY], np.zeros(len(z), np.int64), 1, n_clouds=n_blends, seed=seed
    )
    parts = [cloud_of(mixed[cloud].astype(np.float64), labels[cloud], t, len(z)) for cloud in clouds]
    share = float(np.log(BLEND_SHARE))
    return [part._replace(log_share=part.log_share + share) for part in parts]


def blended(stars: NDArray, share: NDArray, draw: np.random.Generator) -> NDArray[np.float32]:
    """Each star, (n, p), with the light of another of them added, drawn without replacement.

    Parameters
    ----------
    stars : array of shape (n, p)
        Spectra, or what is linear in them, of stars that are alike in flux.
    share : array of shape (n,)
        Share of the light of each blend that is the other star's; 0 for a star that stays as it is.
    draw : Generator
    """
    other = stars[draw.permutation(len(stars))]
    mixed: NDArray[np.float32] = (stars + share[:, None] * (other - stars)).astype(np.float32)
    return mixed
