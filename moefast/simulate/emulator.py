"""The emulator: five labels to a noise-free spectrum, fast and differentiable.

    flux(labels) = mean + sum_k c_k(labels) basis_k,
    c(labels) = polynomial(x) W_p + matern52(|x - x_j| / scale) W_m,

with x seven coordinates made of the labels (`coordinates`), mapped to about [-1, 1]. Everything comes from
``data/emulator.npz``; `moefast.simulate.build` makes it. Spectra reach `margin` pixels beyond the detector on either
side, so that they can be shifted; `flux` and `derivatives` are about the pixels of the detector.

Design: a spectrum costs 2 x 2168 x 80 operations in float64 for the coefficients (the Matern weights reach hundreds
and cancel: float32 would leave 2e-4 of flux), 2048 Matern functions, and 2 x 81 x 4160 in float32 for the pixels: about
1 MFLOP. Both products are BLAS, one tile of rows per Python thread with BLAS held to one thread. Tiles have one fixed
shape and end at multiples of `ROWS_PER_TILE` in the file: BLAS rounds differently at the edges of its own tiles, so
this is what makes the bits of a row independent of the block in which it is computed.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import numpy as np

from moefast.core.compiled import njit
from moefast.core.errors import MoefastError
from moefast.core.threads import in_threads, one_blas_thread

LABELS = ("T_eff", "log_g", "M_H", "a_M", "C_M")
ROWS_PER_TILE = 128
ROWS_PER_SLOPE_TILE = 32
NODES_PER_TILE = 256
SCHEMA = 3
HASHED = (
    "wave_edges", "margin", "mean", "basis", "centre", "half_range", "scales", "powers", "polynomial", "nodes",
    "weights", "low", "high",
)  # fmt: skip


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


# "contract" lets sums use fused multiply-adds; nothing may be reordered, or a row's bits could depend on its place.
_EXACT_ORDER = {"contract", "nsz"}


_SERIES = tuple((-1.0 / 256.0) ** k / math.factorial(k) for k in range(10))
LARGEST_DISTANCE = 100.0


@njit(inline="always")
def _exp_minus(s: Any) -> Any:
    """Approximate exp(-s) = (exp(-s/256))^256, the inner one by its series, in operations that become SIMD.

    Absolute error below 1e-13 for 0 <= s <= sqrt(5) `LARGEST_DISTANCE`; beyond s = 1000 the series runs away.
    """
    value = (((_SERIES[9] * s + _SERIES[8]) * s + _SERIES[7]) * s + _SERIES[6]) * s + _SERIES[5]
    value = ((((value * s + _SERIES[4]) * s + _SERIES[3]) * s + _SERIES[2]) * s + _SERIES[1]) * s + 1.0
    value *= value
    value *= value
    value *= value
    value *= value
    value *= value
    value *= value
    value *= value
    value *= value
    return value


@njit(cache=True, nogil=True)
def _polynomial(x: np.ndarray, powers: np.ndarray, out: np.ndarray) -> None:
    """Fill out (n, n_terms) with the products of powers of x (n, n_inputs)."""
    for row in range(x.shape[0]):
        for t in range(powers.shape[0]):
            value = 1.0
            for i in range(powers.shape[1]):
                for _ in range(powers[t, i]):
                    value *= x[row, i]
            out[row, t] = value


@njit(inline="always")
def _square_distances(x: np.ndarray, nodes: np.ndarray, first: int, out: np.ndarray) -> None:
    """Fill `out` with the squared distances of x (n_inputs,) to the nodes from `first` on."""
    last = min(first + len(out), nodes.shape[1])
    out[:] = 0.0
    for i in range(nodes.shape[0]):
        here, place = nodes[i, first:last], x[i]
        for j in range(last - first):
            difference = place - here[j]
            out[j] += difference * difference


@njit(cache=True, nogil=True, fastmath=_EXACT_ORDER, error_model="numpy")
def _matern(x: np.ndarray, nodes: np.ndarray, out: np.ndarray) -> None:
    """Fill out (n, n_nodes) with the kernel; x (n, n_inputs), nodes (n_inputs, n_nodes), in length scales."""
    squares = np.empty(NODES_PER_TILE)
    for row in range(x.shape[0]):
        for first in range(0, nodes.shape[1], NODES_PER_TILE):
            _square_distances(x[row], nodes, first, squares)
            target = out[row, first : first + NODES_PER_TILE]
            for j in range(len(target)):
                s = math.sqrt(5.0 * squares[j])
                target[j] = (1.0 + s + s * s * (1.0 / 3.0)) * _exp_minus(s)


@njit(cache=True, nogil=True, fastmath=_EXACT_ORDER, error_model="numpy")
def _matern_slopes(x: np.ndarray, nodes: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
    """Fill out (n, n_inputs, n_nodes) with the kernel's derivatives by the unscaled coordinates.

    The derivative by the squared distance needs no division by the distance: -(5/6) (1 + s) exp(-s).
    """
    n_inputs, n_nodes = nodes.shape
    squares = np.empty(NODES_PER_TILE)
    for row in range(x.shape[0]):
        for first in range(0, n_nodes, NODES_PER_TILE):
            last = min(first + NODES_PER_TILE, n_nodes)
            _square_distances(x[row], nodes, first, squares)
            for j in range(last - first):
                s = math.sqrt(5.0 * squares[j])
                squares[j] = (-5.0 / 3.0) * (1.0 + s) * _exp_minus(s)
            for i in range(n_inputs):
                here, place, target = nodes[i, first:last], x[row, i], out[row, i, first:last]
                inverse = 1.0 / scales[i]
                for j in range(last - first):
                    target[j] = squares[j] * (place - here[j]) * inverse


@njit(cache=True, nogil=True)
def _polynomial_slopes(x: np.ndarray, powers: np.ndarray, out: np.ndarray) -> None:
    """Fill out (n, n_inputs, n_terms) with the derivatives of the products of powers."""
    for row in range(x.shape[0]):
        for i in range(powers.shape[1]):
            for t in range(powers.shape[0]):
                value = float(powers[t, i])
                for other in range(powers.shape[1]):
                    for _ in range(powers[t, other] - (1 if other == i else 0)):
                        value *= x[row, other]
                out[row, i, t] = value


def _read_only(values: Any, dtype: type) -> np.ndarray:
    array: np.ndarray = np.array(values, dtype=dtype, order="C")
    array.flags.writeable = False
    return array


def _hash(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str.lstrip('<>|=')} {array.shape};".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Emulator:
    """Spectra of the shipped grid; make one with `Emulator.load`.

    Attributes
    ----------
    wave, wave_edges : arrays of shape (4096,) and (4097,), float64
        Pixel centres and edges, Å in vacuum.
    margin : int
        Pixels of the same width that `mean` and `basis` have beyond either edge.
    mean : array of shape (4096 + 2 margin,), float32, read-only
        Mean spectrum.
    basis : array of shape (n_components, 4096 + 2 margin), float32, read-only
        Principal components; with `coefficients` they give the spectra.
    provenance : dict of str
        Where the emulator comes from and its held-out error.
    sha256 : str
        Hash of the arrays that spectra are made of, the same on every machine.
    """

    wave: np.ndarray
    wave_edges: np.ndarray
    margin: int
    mean: np.ndarray
    basis: np.ndarray
    provenance: Mapping[str, str]
    sha256: str
    _components: np.ndarray
    _centre: np.ndarray
    _half_range: np.ndarray
    _scales: np.ndarray
    _powers: np.ndarray
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
        """Build from the arrays of ``emulator.npz``.

        Raises
        ------
        MoefastError
            If the arrays are of another schema or do not fit each other.
        """
        schema = int(data["schema"]) if "schema" in data else None
        if schema != SCHEMA:
            raise MoefastError(f"emulator file: expected schema {SCHEMA}, found {schema}; reinstall moefast")
        margin = int(data["margin"])
        padded_edges = np.asarray(data["wave_edges"], dtype=float)
        mean, basis = _read_only(data["mean"], np.float32), _read_only(data["basis"], np.float32)
        if padded_edges.shape != (len(mean) + 1,) or basis.shape[1:] != mean.shape:
            raise MoefastError(
                f"emulator file: wave_edges {padded_edges.shape}, mean {mean.shape} and basis {basis.shape} do not fit"
            )
        wave_edges = _read_only(padded_edges[margin : len(padded_edges) - margin], float)
        scales = np.asarray(data["scales"], dtype=float)
        nodes = np.asarray(data["nodes"], dtype=float) / scales
        if np.linalg.norm(2.0 / scales) > LARGEST_DISTANCE:
            raise MoefastError(
                f"emulator file: length scales {scales} are too short for coordinates in -1 … 1"
            )
        provenance = {k[5:]: str(data[k]) for k in data if k.startswith("info_")}
        return cls(
            wave=_read_only(0.5 * (wave_edges[1:] + wave_edges[:-1]), float),
            wave_edges=wave_edges,
            margin=margin,
            mean=mean,
            basis=basis,
            provenance=provenance,
            sha256=_hash({name: data[name] for name in HASHED}),
            # The mean is one more component, whose coefficient is always 1.
            _components=np.concatenate([mean[None], basis]),
            _centre=np.asarray(data["centre"], dtype=float),
            _half_range=np.asarray(data["half_range"], dtype=float),
            _scales=scales,
            _powers=np.ascontiguousarray(data["powers"], dtype=np.int64),
            _nodes=np.ascontiguousarray(nodes.T),
            _weights=np.concatenate(
                [np.asarray(data["polynomial"], float), np.asarray(data["weights"], float)]
            ),
            _low=np.asarray(data["low"], dtype=float),
            _high=np.asarray(data["high"], dtype=float),
        )

    @property
    def limits(self) -> dict[str, tuple[float, float]]:
        """Lowest and highest value of each label (K, dex) for which the emulator was trained."""
        bounds = zip(self._low.tolist(), self._high.tolist(), strict=True)
        return dict(zip(LABELS, bounds, strict=True))

    def flux(self, labels: np.ndarray, out: np.ndarray | None = None, *, first_row: int = 0) -> np.ndarray:
        """Noise-free spectra with median 1 over the pixels (to the emulator's accuracy).

        The bits of a spectrum depend on its labels and on its row number modulo `ROWS_PER_TILE` alone.

        Parameters
        ----------
        labels : array of shape (n, 5)
            T_eff [K], log g, [M/H], [a/M], [C/M] [dex].
        out : array of shape (n, 4096), float32, C-contiguous, optional
            Where to put the result.
        first_row : int
            Row number of the first spectrum.

        Returns
        -------
        array of shape (n, 4096), float32

        Raises
        ------
        MoefastError
            If labels have another shape, are not finite or lie outside `limits`.
        """
        return self._spectra(labels, out, first_row, slice(self.margin, self.margin + len(self.wave)))

    def padded_flux(
        self, labels: np.ndarray, out: np.ndarray | None = None, *, first_row: int = 0
    ) -> np.ndarray:
        """The same with `margin` pixels more on either side, shape (n, 4096 + 2 margin)."""
        return self._spectra(labels, out, first_row, slice(0, len(self.mean)))

    def coefficients(self, labels: np.ndarray) -> np.ndarray:
        """Coefficients of the principal components: the spectra are mean + coefficients @ basis.

        Runs on the thread of the caller; of several threads at once, each is better off with BLAS held to one thread.

        Parameters
        ----------
        labels : array of shape (n, 5)
            T_eff [K], log g, [M/H], [a/M], [C/M] [dex].

        Returns
        -------
        array of shape (n, n_components), float64

        Raises
        ------
        MoefastError
            If labels have another shape, are not finite or lie outside `limits`.
        """
        x = self._scaled(labels)
        out = np.empty((len(x), len(self.basis)))
        design = np.empty((min(len(x), ROWS_PER_TILE), len(self._weights)))
        for first in range(0, len(x), ROWS_PER_TILE):
            part = x[first : first + ROWS_PER_TILE]
            self._design(part, design[: len(part)])
            np.matmul(design[: len(part)], self._weights, out=out[first : first + len(part)])
        return out

    def derivatives(self, labels: np.ndarray, *, padded: bool = False) -> np.ndarray:
        """Analytic derivatives of the flux.

        Parameters
        ----------
        labels : array of shape (n, 5)
            T_eff [K], log g, [M/H], [a/M], [C/M] [dex].
        padded : bool
            Whether to include the `margin` pixels beyond either edge.

        Returns
        -------
        array of shape (n, 5, 4096), or (n, 5, 4096 + 2 margin) if padded, float64
            d flux / d label, per K and per dex.

        Raises
        ------
        MoefastError
            If labels have another shape, are not finite or lie outside `limits`.
        """
        x, jacobian = self._scaled(labels), self._jacobian(labels)
        n = len(x)
        margin = 0 if padded else self.margin
        basis = self.basis[:, margin : len(self.mean) - margin].astype(float)
        result = np.empty((n, len(LABELS), basis.shape[1]))
        tiles = [slice(a, min(a + ROWS_PER_SLOPE_TILE, n)) for a in range(0, n, ROWS_PER_SLOPE_TILE)]

        def work(first: int, last: int) -> None:
            for here in tiles[first:last]:
                slopes = self._slopes(x[here], jacobian[here])
                np.matmul(
                    slopes.reshape(-1, slopes.shape[2]), basis, out=result[here].reshape(-1, basis.shape[1])
                )

        with one_blas_thread():
            in_threads(len(tiles), work, least=1)
        return result

    def coefficient_derivatives(self, labels: np.ndarray) -> np.ndarray:
        """Analytic derivatives of `coefficients`, on the thread of the caller.

        Parameters
        ----------
        labels : array of shape (n, 5)
            T_eff [K], log g, [M/H], [a/M], [C/M] [dex].

        Returns
        -------
        array of shape (n, 5, n_components), float64
            Per K and per dex.

        Raises
        ------
        MoefastError
            If labels have another shape, are not finite or lie outside `limits`.
        """
        x, jacobian = self._scaled(labels), self._jacobian(labels)
        parts = [
            self._slopes(x[a : a + ROWS_PER_SLOPE_TILE], jacobian[a : a + ROWS_PER_SLOPE_TILE])
            for a in range(0, len(x), ROWS_PER_SLOPE_TILE)
        ]
        return np.concatenate([np.empty((0, len(LABELS), len(self.basis))), *parts])

    def _jacobian(self, labels: np.ndarray) -> np.ndarray:
        """Derivatives of the scaled coordinates by the labels, (n, 5, 7): complex steps, exact to rounding."""
        steps = np.repeat(np.asarray(labels, dtype=float)[:, None], len(LABELS), axis=1).astype(complex)
        steps += 1e-30j * np.eye(len(LABELS))
        slopes = coordinates(steps.reshape(-1, len(LABELS))).imag / 1e-30 / self._half_range
        return slopes.reshape(len(steps), len(LABELS), len(self._scales))

    def _slopes(self, x: np.ndarray, jacobian: np.ndarray) -> np.ndarray:
        """Derivatives of the coefficients, (n, 5, n_components), of at most one tile of rows."""
        size, n_inputs = x.shape
        n_terms = len(self._powers)
        design = np.empty((size, n_inputs, len(self._weights)))
        terms = np.empty((size, n_inputs, n_terms))
        kernel = np.empty((size, n_inputs, len(self._weights) - n_terms))
        _polynomial_slopes(x, self._powers, terms)
        _matern_slopes(x / self._scales, self._nodes, self._scales, kernel)
        design[..., :n_terms], design[..., n_terms:] = terms, kernel
        gradient = (design.reshape(size * n_inputs, -1) @ self._weights).reshape(size, n_inputs, -1)
        return np.matmul(jacobian, gradient)

    def _design(self, x: np.ndarray, out: np.ndarray) -> None:
        """Fill out (n, n_terms + n_nodes) with what multiplies the weights."""
        n_terms = len(self._powers)
        _polynomial(x, self._powers, out[:, :n_terms])
        _matern(x / self._scales, self._nodes, out[:, n_terms:])

    def _spectra(
        self, labels: np.ndarray, out: np.ndarray | None, first_row: int, pixels: slice
    ) -> np.ndarray:
        x = self._scaled(labels)
        n, width, rows = len(x), pixels.stop - pixels.start, ROWS_PER_TILE
        if out is None:
            out = np.empty((n, width), dtype=np.float32)
        elif out.shape != (n, width) or out.dtype != np.float32 or not out.flags.c_contiguous:
            raise MoefastError(
                f"out: expected C-contiguous float32 of shape {(n, width)}, found {out.dtype} {out.shape}"
            )
        result = out
        cuts = [0, *range(rows - first_row % rows, n, rows), n] if n else [0]
        tiles = [slice(a, b) for a, b in itertools.pairwise(cuts)]

        def work(first: int, last: int) -> None:
            design = np.zeros((rows, len(self._weights)))
            exact = np.empty((rows, len(self.basis)))
            c = np.ones((rows, len(self._components)), dtype=np.float32)
            edge = np.empty((0, width), dtype=np.float32)
            for here in tiles[first:last]:
                size = here.stop - here.start
                top = (first_row + here.start) % rows
                self._design(x[here], design[top : top + size])
                np.matmul(design, self._weights, out=exact)
                c[:, 1:] = exact
                if size == rows:
                    np.matmul(c, self._components[:, pixels], out=result[here])
                else:
                    if not len(edge):
                        edge = np.empty((rows, width), dtype=np.float32)
                    np.matmul(c, self._components[:, pixels], out=edge)
                    result[here] = edge[top : top + size]

        with one_blas_thread():
            in_threads(len(tiles), work, least=1)
        return out

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
