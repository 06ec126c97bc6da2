"""Noisy spectra of stars that a model knows, made from its own numbers: always the same, and no file is needed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moefast.posterior.mixture import PosteriorMixture

__all__ = ["SNRS", "library_stars", "observed"]

SNRS = (3.0, 10.0, 30.0, 100.0)
"""Ratios of the median of a spectrum to the error of a pixel of median noise, by turns."""
_SHARE_LOST, _BLOCK_LOST = 0.28, 0.3
"""Of the pixels that some stars lack: at random, and in one piece."""

F32 = NDArray[np.float32]


def library_stars(mixture: PosteriorMixture, n: int) -> tuple[F32, F32, NDArray[np.bool_]]:
    """Flux, error and mask (n, p) of stars from clouds all over the library, at rest; see `observed`."""
    draw = np.random.default_rng(0)
    cloud = np.linspace(0, len(mixture.keys) - 1, n).round().astype(np.intp)
    z = mixture.keys[cloud] + draw.standard_normal((n, mixture.n_coordinates))
    t = mixture.tangents.shape[1]
    z += np.einsum("it,itk->ik", draw.standard_normal((n, t)), mixture.tangents[cloud])
    # The scale is drawn by `observed`.
    z[:, -1] = 0
    directions = mixture.directions[:, : mixture.n_coordinates].astype(np.float64)
    return observed(mixture.reference + z @ directions.T, mixture.noise_shape, draw)


def observed(
    clean: NDArray, noise_shape: NDArray, draw: np.random.Generator
) -> tuple[F32, F32, NDArray[np.bool_]]:
    """Flux, error and mask of clean spectra (n, p) with noise of this shape, each with its own SNR, scale and gaps.

    A fourth of the stars has no gaps; the others lack pixels at random, or a piece, or have single bad pixels. Every
    combination of `SNRS` and gaps is there among sixteen stars in a row.
    """
    n, p = clean.shape
    scale = draw.uniform(0.5, 2, (n, 1))
    shape = np.sqrt(noise_shape / np.median(noise_shape)) * np.median(np.abs(clean), axis=1, keepdims=True)
    error = scale * shape * draw.uniform(0.7, 1.4, (n, p)) / np.resize(SNRS, (n, 1))
    flux = (scale * clean + error * draw.standard_normal((n, p))).astype(np.float32)
    error, mask = error.astype(np.float32), np.zeros((n, p), bool)
    for i in range(n):
        gap = i // len(SNRS) % 4
        if gap == 1:
            mask[i] = draw.random(p) < _SHARE_LOST
        elif gap == 2:
            length = int(_BLOCK_LOST * p)
            first = draw.integers(0, p - length + 1)
            mask[i, first : first + length] = True
        elif gap == 3:
            flux[i, draw.integers(0, p)] = np.nan
            error[i, draw.integers(0, p)] = -1
    return flux, error, mask
