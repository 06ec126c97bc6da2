"""The emulator: five labels to a noise-free spectrum, fast and differentiable.

    flux(labels) = mean + sum_k c_k(labels) basis_k,
    c(labels) = polynomial(x) W_p + matern52(|x - x_j| / scale) W_m,

with x the labels mapped to about [-1, 1] (T_eff as 5040 K / T_eff). Everything comes from
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
SCHEMA = 1


def scale_labels(labels: np.ndarray, centre: np.ndarray, half_range: np.ndarray) -> np.ndarray:
    """Map labels (n, 5) to about [-1, 1]; T_eff enters as theta = 5040 K / T_eff."""
    x = np.array(labels, dtype=float)
    x[:, 0] = 5040.0 / x[:, 0]
    return (x - centre) / half_range


def polynomial_terms(powers: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Products of powers of the scaled labels, shape (n, n_terms)."""
    return np.prod(x[:, None, :] ** powers[None, :, :], axis=2)


def matern52(distance: np.ndarray) -> np.ndarray:
    """(1 + s + s^2/3) exp(-s), s = sqrt(5) distance."""
    s = math.sqrt(5.0) * distance
    return (1.0 + s + s * s / 3.0) * np.exp(-s)


@njit(cache=True, fastmath=True)
def _coefficients(x, powers, polynomial, nodes, weights, out):
    """c of one row; `nodes` is (5, n_nodes) and, like x here, divided by the length scales."""
    n_terms, n_components = polynomial.shape
    for k in range(n_components):
        out[k] = 0.0
    for t in range(n_terms):
        value = 1.0
        for i in range(5):
            for _ in range(powers[t, i]):
                value *= x[i]
        for k in range(n_components):
            out[k] += value * polynomial[t, k]
    # x arrives with the length scales as x[5:].
    for j in range(nodes.shape[1]):
        r2 = 0.0
        for i in range(5):
            difference = x[5 + i] - nodes[i, j]
            r2 += difference * difference
        s = math.sqrt(5.0 * r2)
        value = (1.0 + s + s * s / 3.0) * math.exp(-s)
        for k in range(n_components):
            out[k] += value * weights[j, k]


@njit(cache=True, parallel=True, fastmath=True)
def _mix(x, powers, polynomial, nodes, weights, mean, basis, flux):
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
                for pixel in range(start, stop):
                    flux[row, pixel] = mean[pixel]
                for k in range(n_components):
                    value = np.float32(c[row - first, k])
                    for pixel in range(start, stop):
                        flux[row, pixel] += value * basis[k, pixel]


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
        result = np.empty((len(x), 5, len(self.wave)))
        basis = self._basis.astype(float)
        jacobian = np.full((len(x), 5), 1.0) / self._half_range
        jacobian[:, 0] *= -5040.0 / np.asarray(labels, dtype=float)[:, 0] ** 2
        nodes = self._nodes.T
        for row, point in enumerate(x):
            difference = point / self._scales - nodes
            distance = np.sqrt((difference**2).sum(axis=1))
            s = math.sqrt(5.0) * distance
            # d/dr^2 of the kernel is -(5/6) (1 + s) exp(-s): no division by the distance.
            slope = -(5.0 / 3.0) * (1.0 + s) * np.exp(-s)
            gradient = (slope[:, None] * difference / self._scales).T @ self._weights
            for i in range(5):
                lowered = self._powers.copy()
                lowered[:, i] = np.maximum(lowered[:, i] - 1, 0)
                terms = self._powers[:, i] * polynomial_terms(lowered, point[None, :])[0]
                gradient[i] += terms @ self._polynomial
            result[row] = (jacobian[row][:, None] * gradient) @ basis
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
        return scale_labels(labels, self._centre, self._half_range)


@lru_cache(maxsize=1)
def _load() -> Emulator:
    with (
        (files("moefast.simulate") / "data" / "emulator.npz").open("rb") as stream,
        np.load(stream, allow_pickle=False) as data,
    ):
        return Emulator.from_arrays({key: data[key] for key in data.files})
