"""Does a GPU give the numbers of the CPU? Asked with stars that the model knows, before the first prediction.

Design: kernels that are right on one device may be wrong on another one, through its compiler, its driver or its
memory, and then must not predict. A few dozen stars, made from the model's own numbers, are predicted by the CPU
kernels and by the device; where these differ by more than tests of the kernels allow, the device is refused. On these
stars the CPU kernels are within 5·10⁻⁶ dex of the equations in float64, a fortieth of what is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import DisagreementError
from moefast.mixture import Prediction
from moefast.posterior.library_stars import SNRS, library_stars, observed
from moefast.posterior.mixture import AnyMixture, PosteriorMixture
from moefast.spectra.quality import Quality

__all__ = ["N_STARS", "require_agreement", "stars_of"]

N_STARS = 64
"""Stars that are compared: four of each signal-to-noise ratio and kind of gap."""
_SLOPE, _DEPTH = 0.1, 0.5
"""Slopes and relative depths of lines that stars of models without a library get, either way."""

Score = Callable[[NDArray, NDArray, NDArray[np.bool_]], tuple[Prediction, Quality]]
Allowed = Callable[[NDArray], NDArray]


def _within(absolute: float, relative: float) -> Allowed:
    """So much, and so much of the number itself."""
    return lambda expected: absolute + relative * np.abs(expected)


def _of_sums(expected: NDArray) -> NDArray:
    """What single precision leaves of sums as large as the largest."""
    return 3e-5 * (np.abs(expected) + _largest(expected))


def _of_table(expected: NDArray) -> NDArray:
    """Relative to the numbers, and to their scatter among the stars."""
    finite = np.where(np.isfinite(expected), expected, np.nan)
    scatter = np.nanstd(finite, axis=0) if np.isfinite(finite).any() else 0.0
    return 1e-4 * np.abs(expected) + 1e-4 * scatter + 1e-6


def _largest(expected: NDArray) -> float:
    return float(np.abs(expected).max(initial=0.0, where=np.isfinite(expected)))


OF_QUALITY = {name: _within(0, 0) for name in ("n_good", "flag", "snr_median")} | {
    "snr_norm": _within(0, 1e-5)
}
OF_POSTERIORS = {"log_g": _within(2e-4, 0)} | OF_QUALITY
"""As tests of shipped models on a device have it; all others as `_of_table`."""
OF_MIXTURES = {
    "log_g": _within(1e-4, 0), "expert_log_g": _of_sums, "weights": _within(2e-4, 0), "log_g_err": _within(0, 2e-3),
    "log_g_err_raw": _of_sums, "chi2": _within(0, 1e-3), "log_level": _within(1e-5, 0),
} | OF_QUALITY  # fmt: skip
"""As tests of mixtures and of scoring on a device have it."""


def stars_of(mixture: AnyMixture) -> tuple[NDArray, NDArray, NDArray[np.bool_]]:
    """Flux, error and mask of `N_STARS` stars: from the clouds of a posterior, else like the mean of the training set.

    The latter have lines and slopes of their own, for a linear model has no library.
    """
    if isinstance(mixture, PosteriorMixture):
        return library_stars(mixture, N_STARS)
    draw = np.random.default_rng(0)
    reference, x = mixture.reference.astype(np.float64), np.linspace(-1, 1, mixture.n_pixels)
    level = np.median(reference)
    lines = (reference - level) * (1 + draw.uniform(-_DEPTH, _DEPTH, (N_STARS, 1)))
    slopes = 1 + draw.uniform(-_SLOPE, _SLOPE, (N_STARS, 1)) * x
    return observed((level + lines) * slopes, mixture.noise_shape, draw)


def require_agreement(mixture: AnyMixture, on_device: Score) -> str:
    """Compare what a device predicts with the CPU kernels; return in words what came of it.

    Parameters
    ----------
    mixture : Mixture or PosteriorMixture
    on_device : callable
        Prediction and quality of flux, error and mask by the device.

    Raises
    ------
    DisagreementError
        The device's numbers are others than the CPU's.
    """
    spectra = stars_of(mixture)
    with np.errstate(over="ignore", invalid="ignore"):
        expected, found = mixture.score(*spectra), on_device(*spectra)
    rules = OF_POSTERIORS if isinstance(mixture, PosteriorMixture) else OF_MIXTURES
    wrong, worst, most = np.zeros(N_STARS, bool), "", 1.0
    for name, of_device, of_cpu in _columns(found, expected):
        allowed = np.broadcast_to(rules.get(name, _of_table)(of_cpu), of_cpu.shape)
        with np.errstate(invalid="ignore"):
            off = np.abs(of_device - of_cpu)
        same = (of_device == of_cpu) | (np.isnan(of_device) & np.isnan(of_cpu))
        # Nothing is allowed where a number is missing on one side.
        excess = np.where(np.isfinite(off), off / np.maximum(allowed, 1e-300), np.inf)
        excess[same] = 0
        wrong |= (excess > 1).any(1)
        if excess.max() > most:
            most = float(excess.max())
            place = np.unravel_index(excess.argmax(), excess.shape)
            worst = (
                f"{name} of star {place[0]} (SNR {SNRS[place[0] % len(SNRS)]:.0f}) is {of_device[place]:.7g} there and "
                f"{of_cpu[place]:.7g} on the CPU, where {allowed[place]:.1g} is allowed"
            )
    if worst:
        raise DisagreementError(
            f"backend cuda: the GPU gives other numbers than the CPU for {wrong.sum()} of {N_STARS} stars made from "
            f"the model: {worst}; use --backend cpu, and please report this line with what moefast doctor prints"
        )
    off = np.abs(found[0].log_g.astype(np.float64) - expected[0].log_g)
    return (
        f"checked on {N_STARS} stars against the CPU: log g within {_rounded_up(float(np.nanmax(off)))} dex"
    )


def _columns(
    found: tuple[Prediction, Quality], expected: tuple[Prediction, Quality]
) -> Iterator[tuple[str, NDArray, NDArray]]:
    """Name, the device's and the CPU's numbers (n, k) of all that both give."""
    for of_device, of_cpu in ((found[0], expected[0]), (found[1], expected[1])):
        for one in fields(of_cpu):
            a, b = getattr(of_device, one.name), getattr(of_cpu, one.name)
            if b is not None:
                yield one.name, _as_columns(a), _as_columns(b)


def _as_columns(values: NDArray) -> NDArray[np.float64]:
    return np.asarray(values, np.float64).reshape(len(values), -1)


def _rounded_up(value: float) -> str:
    """One digit of a small number, never too low."""
    if value <= 0:
        return "0"
    power = int(np.floor(np.log10(value)))
    digit = int(np.ceil(value / 10.0**power))
    return f"1e{power + 1}" if digit == 10 else f"{digit}e{power}"
