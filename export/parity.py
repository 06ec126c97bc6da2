"""ONNX Runtime against the float64 contract, before a model is kept.

Design: the inputs are drawn around the mixture's own reference spectrum and noise shape, inside and outside its
range of noise levels, with bad pixels, an empty row and a batch of one, so no data set is needed. What is compared is
the graph as other programs run it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from moefast.core.errors import ModelError
from moefast.core.outputs import ONNX, POSTERIOR_ONNX, by_onnx
from moefast.export.graph import is_half, part_of, save
from moefast.export.kinds import build
from moefast.export.session import open_session
from moefast.mixture import Mixture
from moefast.posterior.mixture import AnyMixture, PosteriorMixture
from moefast.spectra.quality import good_pixels

__all__ = [
    "POSTERIOR_TOLERANCES",
    "TOLERANCES",
    "expected_outputs",
    "export_model",
    "synthetic_spectra",
    "verify",
]


def _tolerances(names: Sequence[str]) -> dict[str, float]:
    return {name: tolerance for name in names if (tolerance := by_onnx(name).tolerance) is not None}


TOLERANCES = _tolerances(ONNX)
"""Largest difference from `Mixture.predict_reference`: of log g and the experts in dex, of weights and ln s as they
are, of errors and chi2 relative. An expert's beyond 1 dex is relative too: experts extrapolate far where their
weight is nil."""
POSTERIOR_TOLERANCES = _tolerances(POSTERIOR_ONNX)
"""The same for what posteriors give besides: labels in units of their errors, correlations as they are, others
relative; a distance below 1 as it is."""
HALF = 100.0
"""Factor on these for networks in half precision."""
LEVELS = (-2.5, 1.5)
"""ln of the noise of synthetic spectra over that of the training set, for a posterior, which has no knots."""
UNITS = (1.0, 1e-17, 1e4, 1e10)
"""Units of flux that synthetic spectra for a posterior have in turn; in the last one, errors are too large."""
GAP = 0.25
"""Share of the pixels in the gap of every fifth of these spectra."""


def synthetic_spectra(
    mixture: AnyMixture, n: int, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Flux and error of `n` noisy spectra like those of the training set.

    Of five rows, the second has bad pixels of every kind and the third none but one good; the fourth of all has none.

    Parameters
    ----------
    mixture : Mixture or PosteriorMixture
    n : int
    seed : int
    """
    rng = np.random.default_rng(seed)
    of_kind = _around_clouds if isinstance(mixture, PosteriorMixture) else _like_training
    return _with_bad_pixels(*of_kind(mixture, n, rng), rng)  # type: ignore[arg-type]


def _around_clouds(
    mixture: PosteriorMixture, n: int, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Stars out of the clouds, c (r + G ζ + N η), at many noise levels, scales and units; every fifth has a gap."""
    p, n_coordinates = mixture.n_pixels, mixture.n_coordinates
    shape = mixture.noise_shape.astype(np.float64)
    cloud = rng.integers(0, len(mixture.keys), n)
    along = rng.standard_normal((n, mixture.tangents.shape[1]))
    point = np.zeros((n, mixture.directions.shape[1]))
    point[:, :n_coordinates] = mixture.keys[cloud] + np.einsum("nt,ntr->nr", along, mixture.tangents[cloud])
    point[:, : n_coordinates - 1] += rng.standard_normal((n, n_coordinates - 1))
    point[:, n_coordinates:] = rng.standard_normal((n, mixture.n_nuisances))
    stars = mixture.reference + point @ mixture.directions.T.astype(np.float64)
    error = np.exp(rng.uniform(*LEVELS, (n, 1))) * np.sqrt(shape)
    error = error * np.exp(0.3 * np.linspace(-1, 1, p) * rng.standard_normal((n, 1)))
    error *= np.exp(0.1 * rng.standard_normal(error.shape))
    flux = stars + error * rng.standard_normal(error.shape)
    start = rng.integers(0, max(1, round((1 - GAP) * p)), n)
    for row in range(4, n, 5):
        error[row, start[row] : start[row] + round(GAP * p)] = np.inf
    # Not in step with the kinds of rows: every kind has every unit.
    unit = np.resize(np.repeat(UNITS, 5), n) * np.exp(mixture.scale_width * rng.standard_normal(n))
    return flux * unit[:, None], error * unit[:, None]


def _like_training(
    mixture: Mixture, n: int, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Stars of the training set's kind at noise levels within and around the mixture's knots.

    x = D T a + s √D ε with a ~ N(0, 3²), or from the clouds of the mixture's library, and ln s from half a unit below
    to half a unit above the mixture's knots.
    """
    shape = mixture.noise_shape.astype(np.float64)
    level = rng.uniform(mixture.knots[0] - 0.5, mixture.knots[-1] + 0.5, (n, 1))
    error = np.exp(level) * np.sqrt(shape) * np.exp(0.1 * rng.standard_normal((n, mixture.n_pixels)))
    z = 3 * rng.standard_normal((n, mixture.basis.shape[1]))
    if (library := mixture.clouds[0]) is not None:
        cloud = rng.integers(0, len(library.keys), n)
        along = np.sqrt(library.variances[cloud]) * rng.standard_normal((n, library.variances.shape[1]))
        z = library.keys[cloud] + np.einsum("nt,ntr->nr", along, library.tangents[cloud])
    stars = z @ mixture.basis.T.astype(np.float64) * shape
    return mixture.reference + stars + error * rng.standard_normal(error.shape), error


def _with_bad_pixels(
    flux: NDArray[np.float64], error: NDArray[np.float64], rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """See `synthetic_spectra`."""
    n = len(flux)
    flux32, error32 = flux.astype(np.float32), error.astype(np.float32)
    bad = rng.random(flux.shape) < 0.1
    bad[[row for row in range(n) if row % 5 != 1]] = False
    kind = rng.integers(0, 6, flux.shape)
    for i, value in enumerate((np.nan, np.inf, -np.inf)):
        flux32[bad & (kind == i)] = value
    for i, value in enumerate((np.nan, 0.0, -1.0)):
        error32[bad & (kind == i + 3)] = value
    error32[2::5, 1:] = np.inf
    flux32[3:4] = np.nan
    return flux32, error32


def expected_outputs(
    mixture: AnyMixture, flux: NDArray[np.float32], error: NDArray[np.float32], part: str = "mixture"
) -> dict[str, NDArray[np.float64]]:
    """What the graph of a part must give: `predict_reference`, and NaN in rows without a good pixel."""
    good = good_pixels(flux, error)
    prediction = mixture.predict_reference(flux, error)
    found = {name: getattr(prediction, name) for name in TOLERANCES | POSTERIOR_TOLERANCES}
    values = {name: value.copy() for name, value in found.items() if value is not None}
    if good is not None:
        for value in values.values():
            value[~good.any(1)] = np.nan
    if part == "gate":
        return {"weights": values["weights"]}
    if part.startswith("expert-"):
        return {"log_g": values["expert_log_g"][:, int(part.removeprefix("expert-"))]}
    return values


def verify(
    model: ModelProto,
    mixture: AnyMixture,
    *,
    n: int = 64,
    seed: int = 0,
    tolerance: float = TOLERANCES["log_g"],
) -> dict[str, float]:
    """Compare an ONNX model, run by ONNX Runtime on the CPU, with the mixture's `predict_reference`.

    Parameters
    ----------
    model : ModelProto
        Made by `build`, any part.
    mixture : Mixture or PosteriorMixture
    n : int
        Spectra to compare, 5 at least; the first is scored once more alone.
    seed : int
        Of the synthetic spectra.
    tolerance : float, dex
        Of log g; those of the other outputs are `TOLERANCES`.

    Returns
    -------
    dict of str to float
        The largest difference of each output, in the measure of `TOLERANCES`.

    Raises
    ------
    ModelError
        An output differs by more than its tolerance, or is NaN in other rows.
    """
    if n < 5:
        raise ValueError(f"n must be 5 at least, to include every kind of row; found {n}")
    flux, error = synthetic_spectra(mixture, n, seed)
    part = part_of(model)
    expected = expected_outputs(mixture, flux, error, part)
    session = open_session(model, "cpu")
    names = [output.name for output in session.get_outputs()]
    if names != list(expected):
        raise ModelError(f"the ONNX model ({part}) gives {names}, {list(expected)} expected; write it again")
    differences = dict.fromkeys(names, 0.0)
    posterior = isinstance(mixture, PosteriorMixture)
    for rows in (slice(None), slice(0, 1)):
        found = session.run(names, {"flux": flux[rows], "error": error[rows]})
        for name, value in zip(names, found, strict=True):
            want = expected[name][rows]
            if value.shape != want.shape or (np.isnan(value) != np.isnan(want)).any():
                raise ModelError(
                    f"{name} of the ONNX model has another shape, or NaN in other rows, than the mixture"
                )
            unit = expected["label_errors"][rows] if name == "labels" else None
            apart = _difference(name, part, value, want, unit, posterior)
            differences[name] = max(differences[name], apart)
    limits = TOLERANCES | POSTERIOR_TOLERANCES | {"log_g": tolerance}
    if is_half(model):
        # What half precision costs is told, not judged, but for what no rounding explains.
        limits = {name: HALF * limit for name, limit in limits.items()}
    if worse := [name for name in names if not differences[name] <= limits[name]]:
        raise ModelError(
            "the ONNX model does not give the numbers of the mixture: "
            + ", ".join(
                f"{name} differs by {differences[name]:.2g} ({limits[name]:.0e} allowed)" for name in worse
            )
            + "; it is not written"
        )
    return differences


def _difference(
    name: str, part: str, value: NDArray, want: NDArray, unit: NDArray | None, posterior: bool
) -> float:
    least = 1.0 if part.startswith("expert-") else by_onnx(name).relative_to
    if posterior and name == "chi2":
        # That of a single pixel is a difference of nearly equal numbers.
        least = 1.0
    scale = np.ones_like(want) if unit is None else unit
    if least is not None:
        scale = np.maximum(np.abs(want), least)
    apart = np.abs(value - want) / scale
    return float(np.nanmax(apart, initial=0.0))


def export_model(
    mixture: AnyMixture,
    path: str | Path,
    part: str = "mixture",
    metadata: dict[str, str] | None = None,
    *,
    half: bool = False,
    overwrite: bool = True,
) -> dict[str, float]:
    """Build a model, verify it against the mixture, and only then write it; see `build`, `verify` and `save`.

    Returns
    -------
    dict of str to float
        The differences found by `verify`.

    Raises
    ------
    ModelError
        The model does not give the numbers of the mixture; nothing is written.
    OutputError
        The file cannot be written.
    """
    model = build(mixture, part, metadata, half=half)
    differences = verify(model, mixture)
    save(model, path, overwrite=overwrite)
    return differences
