"""The emulator: five labels to a noise-free spectrum, fast and differentiable.

    flux(labels) = mean + sum_k c_k(labels) basis_k,
    c(labels) = polynomial(x) W_p + matern52(|x - x_j| / scale) W_m,

with x seven coordinates made of the labels (`coordinates`), mapped to about [-1, 1]. Everything comes from
``data/emulator.npz``; `moefast.simulate.build` makes it.

Design: one Numba loop per row with a fixed order of operations, so that a row's bits do not depend on
which block it is computed in (a BLAS product would). Pixels go in tiles that keep the basis in cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import numpy as np
from numba import njit, prange

from moefast.errors import MoefastError

LABELS = ("T_eff", "log_g", "M_H", "a_M", "C_M")
ROWS_PER_GROUP = 8
PIXELS_PER_TILE = 512
SCHEMA = 2


def coordinates(labels: np.ndarray) -> np.ndarray:
    """What the regression sees of the labels, shape (n, 7); complex labels give complex coordinates.

    theta = 5040 K / T_eff, the other labels, and the logarithms of the shares of oxygen and carbon that CO
    leaves free in a typical layer (0.78 T_eff). Spectra of cool stars turn over within 0.1 dex where
    carbon begins to outnumber oxygen; in these two coordinates they are smooth.
    """
    t_eff, log_g, m_h, a_m, c_m = labels.T
    theta = 5040.0 / t_eff
    ten = math.log(10.0)
    carbon = np.exp(ten * (c_m - a_m - 0.26))  # per oxygen atom; solar ratio 10^-0.26
    # Dissociation constant of CO over the density of oxygen; gas pressure taken as 10^(3 + log g / 2).
    k = np.exp(ten * (26.9 - 11.09 * theta / 0.78 - (m_h + a_m - 3.31) - (15.3 + 0.5 * log_g)))
    difference = 1.0 - carbon - k
    root = np.sqrt(difference * difference + 4.0 * k)
    # Of the two equal forms of the root the one without cancellation.
    free_oxygen = np.where(difference.real > 0, 0.5 * (difference + root), 2.0 * k / (root - difference))
    free_carbon = k / (k + free_oxygen)
    return np.stack([theta, log_g, m_h, a_m, c_m, np.log(free_oxygen), np.log(free_carbon)], axis=1)


def polynomial_terms(powers: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Products of powers of the scaled labels, shape (n, n_terms)."""
    return np.prod(x[:, None, :] ** powers[None, :, :], axis=2)


def matern52(distance: np.ndarray) -> np.ndarray:
    """(1 + s + s^2/3) exp(-s), s = sqrt(5) distance."""
    s = math.sqrt(5.0) * distance
    return (1.0 + s + s * s / 3.0) * np.exp(-s)


@njit(cache=True, fastmath=True)
def _coefficients(
    x: np.ndarray,
    powers: np.ndarray,
    polynomial: np.ndarray,
    nodes: np.ndarray,
    weights: np.ndarray,
    out: np.ndarray,
) -> None:
    """Coefficients c of one row; `nodes` is (n_inputs, n_nodes), already divided by the length scales."""
    n_terms, n_components = polynomial.shape
    n_inputs = powers.shape[1]
    for k in range(n_components):
        out[k] = 0.0
    for t in range(n_terms):
        value = 1.0
        for i in range(n_inputs):
            for _ in range(powers[t, i]):
                value *= x[i]
        for k in range(n_components):
            out[k] += value * polynomial[t, k]
    # The second half of x is the first divided by the length scales.
    for j in range(nodes.shape[1]):
        r2 = 0.0
        for i in range(n_inputs):
            difference = x[n_inputs + i] - nodes[i, j]
            r2 += difference * difference
        s = math.sqrt(5.0 * r2)
        value = (1.0 + s + s * s / 3.0) * math.exp(-s)
        for k in range(n_components):
            out[k] += value * weights[j, k]


@njit(cache=True, fastmath=True)
def _mix_tile(c: np.ndarray, mean: np.ndarray, basis: np.ndarray, out: np.ndarray) -> None:
    """Fill out = mean + c @ basis; four components at a time, so that the compiler keeps `out` in registers."""
    out[:] = mean
    for k in range(0, basis.shape[0], 4):
        c0, c1, c2, c3 = np.float32(c[k]), np.float32(c[k + 1]), np.float32(c[k + 2]), np.float32(c[k + 3])
        b0, b1, b2, b3 = basis[k], basis[k + 1], basis[k + 2], basis[k + 3]
        for pixel in range(out.shape[0]):
            out[pixel] += c0 * b0[pixel] + c1 * b1[pixel] + c2 * b2[pixel] + c3 * b3[pixel]


@njit(cache=True, parallel=True, fastmath=True)
def _mix(
    x: np.ndarray,
    powers: np.ndarray,
    polynomial: np.ndarray,
    nodes: np.ndarray,
    weights: np.ndarray,
    mean: np.ndarray,
    basis: np.ndarray,
    flux: np.ndarray,
) -> None:
    """Fill flux (n, p) float32; rows in groups, pixels in tiles."""
    n, p = flux.shape
    n_components = basis.shape[0]
    for group in prange((n + ROWS_PER_GROUP - 1) // ROWS_PER_GROUP):
        first = group * ROWS_PER_GROUP
        last = min(n, first + ROWS_PER_GROUP)
        c = np.empty((ROWS_PER_GROUP, n_components))
        for row in range(first, last):
            _coefficients(x[row], powers, polynomial, nodes, weights, c[row - first])
        for start in range(0, p, PIXELS_PER_TILE):
            stop = min(p, start + PIXELS_PER_TILE)
            for row in range(first, last):
                _mix_tile(c[row - first], mean[start:stop], basis[:, start:stop], flux[row, start:stop])


@dataclass(frozen=True, eq=False)
class Emulator:
    """Spectra of the shipped grid; make one with `Emulator.load`.

    Attributes
    ----------
    wave, wave_edges : arrays of shape (4096,) and (4097,), float64
        Pixel centres and edges, Å in vacuum.
    provenance : dict of str
        Where the emulator comes from and its held-out error.
    """

    wave: np.ndarray
    wave_edges: np.ndarray
    provenance: Mapping[str, str]
    _mean: np.ndarray
    _basis: np.ndarray
    _centre: np.ndarray
    _half_range: np.ndarray
    _scales: np.ndarray
    _powers: np.ndarray
    _polynomial: np.ndarray
    _nodes: np.ndarray
    _weights: np.ndarray
    _low: np.ndarray
    _high: np.ndarray

    @classmethod
    def load(cls) -> Emulator:
        """The emulator shipped in the package (read once per process)."""
        return _load()

    @classmethod
    def from_arrays(cls, data: Mapping[str, np.ndarray]) -> Emulator:
        """Build from the arrays of ``emulator.npz``."""
        schema = int(data["schema"]) if "schema" in data else None
        if schema != SCHEMA:
            raise MoefastError(f"emulator file: expected schema {SCHEMA}, found {schema}; reinstall moefast")
        wave_edges = np.asarray(data["wave_edges"], dtype=float)
        scales = np.asarray(data["scales"], dtype=float)
        nodes = np.asarray(data["nodes"], dtype=float) / scales
        provenance = {k[5:]: str(data[k]) for k in data if k.startswith("info_")}
        return cls(
            wave=0.5 * (wave_edges[1:] + wave_edges[:-1]),
            wave_edges=wave_edges,
            provenance=provenance,
            _mean=np.ascontiguousarray(data["mean"], dtype=np.float32),
            _basis=np.ascontiguousarray(data["basis"], dtype=np.float32),
            _centre=np.asarray(data["centre"], dtype=float),
            _half_range=np.asarray(data["half_range"], dtype=float),
            _scales=scales,
            _powers=np.ascontiguousarray(data["powers"], dtype=np.int64),
            _polynomial=np.ascontiguousarray(data["polynomial"], dtype=float),
            _nodes=np.ascontiguousarray(nodes.T),
            _weights=np.ascontiguousarray(data["weights"], dtype=float),
            _low=np.asarray(data["low"], dtype=float),
            _high=np.asarray(data["high"], dtype=float),
        )

    @property
    def limits(self) -> dict[str, tuple[float, float]]:
        """Lowest and highest value of each label (K, dex) for which the emulator was trained."""
        bounds = zip(self._low.tolist(), self._high.tolist(), strict=True)
        return dict(zip(LABELS, bounds, strict=True))

    def flux(self, labels: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Noise-free spectra with median 1 over the pixels (to the emulator's accuracy).

        Parameters
        ----------
        labels : array of shape (n, 5)
            T_eff [K], log g, [M/H], [a/M], [C/M] [dex].
        out : array of shape (n, 4096), float32, optional
            Where to put the result.

        Returns
        -------
        array of shape (n, 4096), float32

        Raises
        ------
        MoefastError
            If labels have another shape, are not finite or lie outside `limits`.
        """
        x = self._scaled(labels)
        if out is None:
            out = np.empty((len(x), len(self.wave)), dtype=np.float32)
        elif out.shape != (len(x), len(self.wave)) or out.dtype != np.float32:
            raise MoefastError(
                f"out: expected float32 of shape {(len(x), len(self.wave))}, found {out.dtype} {out.shape}"
            )
        both = np.concatenate([x, x / self._scales], axis=1)
        _mix(
            both, self._powers, self._polynomial, self._nodes, self._weights, self._mean, self._basis, out
        )  # fmt: skip
        return out

    def derivatives(self, labels: np.ndarray) -> np.ndarray:
        """Analytic derivatives of the flux.

        Parameters
        ----------
        labels : array of shape (n, 5)
            T_eff [K], log g, [M/H], [a/M], [C/M] [dex].

        Returns
        -------
        array of shape (n, 5, 4096), float64
            d flux / d label, per K and per dex.
        """
        x = self._scaled(labels)
        labels = np.asarray(labels, dtype=float)
        result = np.empty((len(x), 5, len(self.wave)))
        basis = self._basis.astype(float)
        nodes = self._nodes.T
        # d coordinates / d labels by complex steps: exact to rounding.
        jacobian = np.empty((len(x), 5, x.shape[1]))
        for i in range(5):
            step = labels.astype(complex)
            step[:, i] += 1e-30j
            jacobian[:, i] = coordinates(step).imag / 1e-30 / self._half_range
        for row, point in enumerate(x):
            difference = point / self._scales - nodes
            s = math.sqrt(5.0) * np.sqrt((difference**2).sum(axis=1))
            # Twice the kernel's derivative by the squared distance: no division by the distance.
            slope = -(5.0 / 3.0) * (1.0 + s) * np.exp(-s)
            gradient = (slope[:, None] * difference / self._scales).T @ self._weights
            for i in range(x.shape[1]):
                lowered = self._powers.copy()
                lowered[:, i] = np.maximum(lowered[:, i] - 1, 0)
                terms = self._powers[:, i] * polynomial_terms(lowered, point[None, :])[0]
                gradient[i] += terms @ self._polynomial
            result[row] = (jacobian[row] @ gradient) @ basis
        return result

    def _scaled(self, labels: np.ndarray) -> np.ndarray:
        labels = np.asarray(labels, dtype=float)
        if labels.ndim != 2 or labels.shape[1] != 5:
            raise MoefastError(f"labels: expected an array of shape (n, 5) {LABELS}, found {labels.shape}")
        bad = ~((labels >= self._low) & (labels <= self._high))
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise MoefastError(
                f"labels: {LABELS[column]} of row {row} is {labels[row, column]:g}, expected "
                f"{self._low[column]:g} to {self._high[column]:g}"
            )
        return (coordinates(labels) - self._centre) / self._half_range


@lru_cache(maxsize=1)
def _load() -> Emulator:
    with (
        (files("moefast.simulate") / "data" / "emulator.npz").open("rb") as stream,
        np.load(stream, allow_pickle=False) as data,
    ):
        return Emulator.from_arrays({key: data[key] for key in data.files})
