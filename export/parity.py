"""ONNX Runtime against the float64 contract, before a model is kept.

Design: the inputs are drawn around the mixture's own reference spectrum and noise shape, inside and outside its
range of noise levels, with bad pixels, an empty row and a batch of one, so no data set is needed. What is compared is
the graph as other programs run it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from moefast.core.errors import ModelError
from moefast.core.outputs import ONNX, by_onnx
from moefast.export.graph import build, is_half, part_of, save
from moefast.export.session import open_session
from moefast.mixture import Mixture
from moefast.spectra.quality import good_pixels

__all__ = ["TOLERANCES", "expected_outputs", "export_model", "synthetic_spectra", "verify"]

TOLERANCES = {name: tolerance for name in ONNX if (tolerance := by_onnx(name).tolerance) is not None}
"""Largest difference from `Mixture.predict_reference`: of log g and the experts in dex, of weights and ln s as they
are, of errors and chi2 relative. An expert's beyond 1 dex is relative too: experts extrapolate far where their
weight is nil."""
HALF = 100.0
"""Factor on these for networks in half precision."""


def synthetic_spectra(
    mixture: Mixture, n: int, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Flux and error of `n` noisy spectra like those of the training set.

    x = D T a + s √D ε with a ~ N(0, 3²), or from the clouds of the mixture's library, and ln s from half a unit below
    to half a unit above the mixture's knots. Of five rows, the second has bad pixels of every kind and the third none
    but one good; the fourth of all has none.
    """
    rng = np.random.default_rng(seed)
    shape = mixture.noise_shape.astype(np.float64)
    level = rng.uniform(mixture.knots[0] - 0.5, mixture.knots[-1] + 0.5, (n, 1))
    error = np.exp(level) * np.sqrt(shape) * np.exp(0.1 * rng.standard_normal((n, mixture.n_pixels)))
    z = 3 * rng.standard_normal((n, mixture.basis.shape[1]))
    if (library := mixture.library) is not None:
        cloud = rng.integers(0, len(library.keys), n)
        along = np.sqrt(library.variances[cloud]) * rng.standard_normal((n, library.variances.shape[1]))
        z = library.keys[cloud] + np.einsum("nt,ntr->nr", along, library.tangents[cloud])
    stars = z @ mixture.basis.T.astype(np.float64) * shape
    flux = mixture.reference + stars + error * rng.standard_normal(error.shape)
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
    mixture: Mixture, flux: NDArray[np.float32], error: NDArray[np.float32], part: str = "mixture"
) -> dict[str, NDArray[np.float64]]:
    """What the graph of a part must give: `Mixture.predict_reference`, and NaN in rows without a good pixel."""
    good = good_pixels(flux, error)
    prediction = mixture.predict_reference(flux, error)
    values = {name: getattr(prediction, name).copy() for name in TOLERANCES}
    if good is not None:
        for value in values.values():
            value[~good.any(1)] = np.nan
    if part == "gate":
        return {"weights": values["weights"]}
    if part.startswith("expert-"):
        return {"log_g": values["expert_log_g"][:, int(part.removeprefix("expert-"))]}
    return values


def verify(
    model: ModelProto, mixture: Mixture, *, n: int = 64, seed: int = 0, tolerance: float = TOLERANCES["log_g"]
) -> dict[str, float]:
    """Compare an ONNX model, run by ONNX Runtime on the CPU, with `Mixture.predict_reference`.

    Parameters
    ----------
    model : ModelProto
        Made by `build`, any part.
    mixture : Mixture
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
    for rows in (slice(None), slice(0, 1)):
        found = session.run(names, {"flux": flux[rows], "error": error[rows]})
        for name, value in zip(names, found, strict=True):
            want = expected[name][rows]
            if value.shape != want.shape or (np.isnan(value) != np.isnan(want)).any():
                raise ModelError(
                    f"{name} of the ONNX model has another shape, or NaN in other rows, than the mixture"
                )
            differences[name] = max(differences[name], _difference(name, part, value, want))
    limits = TOLERANCES | {"log_g": tolerance}
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


def _difference(name: str, part: str, value: NDArray, want: NDArray) -> float:
    scale = np.ones_like(want)
    measure = "relative beyond 1" if part.startswith("expert-") else by_onnx(name).measure
    if measure == "relative":
        scale = np.maximum(np.abs(want), 1e-6)
    elif measure == "relative beyond 1":
        scale = np.maximum(np.abs(want), 1.0)
    apart = np.abs(value - want) / scale
    return float(np.nanmax(apart, initial=0.0))


def export_model(
    mixture: Mixture,
    path: str | Path,
    part: str = "mixture",
    metadata: dict[str, str] | None = None,
    *,
    half: bool = False,
) -> dict[str, float]:
    """Build a model, verify it against the mixture, and only then write it; see `build` and `verify`.

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
    save(model, path)
    return differences
