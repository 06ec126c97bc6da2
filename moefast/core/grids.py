"""The frozen bins: T_eff × [M/H] on the Hertzsprung-Russell side, snr_norm on the noise side.

Design: a grid is a value (frozen, comparable, JSON-ready) and is part of every model. Bins are assigned in plain NumPy
and in float64; `moefast.kernels.binning` gives the same bins on either backend. Stars outside the grid are
edge-clamped to the nearest bin for training, routing and full-coverage scores; `Grid.covered` tells which stars needed
no clamping.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moefast.core.errors import InputError, LabelError, ModelError

__all__ = [
    "MAX_BINS",
    "METAL_POOR",
    "M_H_EDGES",
    "PHYSICAL_GRID",
    "SNR_NORM_EDGES",
    "SNR_NORM_NAMES",
    "T_EFF_EDGES",
    "Grid",
    "SnrGrid",
    "assign_snr_bins",
    "finite_rows",
    "increasing_edges",
    "read_grid",
    "uniform",
]

T_EFF_EDGES = (3750.0, 4500.0, 5250.0, 6000.0)
"""Edges in effective temperature [K]."""

M_H_EDGES = (-2.0, -1.0, 0.0, 0.5)
"""Edges in metallicity [M/H] [dex]."""

METAL_POOR = -1.0
"""A star is metal-poor where [M/H] < −1 dex."""

SNR_NORM_EDGES = (2.0, 4.0, 7.0)
"""Edges in snr_norm = ‖flux‖₂/‖error‖₂ (not snr_median); each bin includes its upper edge."""

SNR_NORM_NAMES = ("X", "L", "M", "H")
"""X: snr_norm ≤ 2, L: (2, 4], M: (4, 7], H: > 7."""

MAX_BINS = np.iinfo(np.int16).max
"""Bins are counted in 16 bits."""

_T_EFF_NAMES = ("cool", "warm", "hot")
_M_H_NAMES = ("poor", "mid", "rich")


@dataclass(frozen=True)
class Grid:
    """A rectangular grid of bins, row-major in T_eff: bin = n_MH · i_Teff + i_MH.

    Intervals are half-open, [a, b); the last edge belongs to the last interval.

    Parameters
    ----------
    t_eff_edges : tuple of float
        Strictly increasing edges in effective temperature [K], at least two.
    m_h_edges : tuple of float
        Strictly increasing edges in [M/H] [dex], at least two.

    Raises
    ------
    ValueError
        The edges are too few, not finite or not increasing, or there would be more than 32 767 bins.
    """

    t_eff_edges: tuple[float, ...] = T_EFF_EDGES
    m_h_edges: tuple[float, ...] = M_H_EDGES

    def __post_init__(self) -> None:
        for name in ("t_eff_edges", "m_h_edges"):
            edges = tuple(float(edge) for edge in getattr(self, name))
            if len(edges) < 2 or not np.isfinite(edges).all() or (np.diff(edges) <= 0).any():
                raise ValueError(
                    f"{name} must be two or more finite, strictly increasing edges; found {edges}"
                )
            object.__setattr__(self, name, edges)
        if self.n_bins > MAX_BINS:
            raise ValueError(f"a grid may have at most {MAX_BINS} bins; found {self.n_bins}")

    @property
    def shape(self) -> tuple[int, int]:
        """Number of intervals in (T_eff, [M/H])."""
        return len(self.t_eff_edges) - 1, len(self.m_h_edges) - 1

    @property
    def n_bins(self) -> int:
        """Number of bins."""
        n_t_eff, n_m_h = self.shape
        return n_t_eff * n_m_h

    @property
    def metal_poor(self) -> NDArray[np.bool_]:
        """Whether all of a bin is metal-poor, (n_bins,)."""
        return np.tile(self.m_h_edges[1:], self.shape[0]) <= METAL_POOR

    @property
    def names(self) -> tuple[str, ...]:
        """One name per bin: "cool-poor" … "hot-rich" on a 3 × 3 grid, else the ranges themselves."""
        if self.shape == (3, 3):
            return tuple(f"{t}-{m}" for t in _T_EFF_NAMES for m in _M_H_NAMES)
        t_eff = [f"{a:.0f}-{b:.0f}K" for a, b in zip(self.t_eff_edges, self.t_eff_edges[1:], strict=False)]
        m_h = [f"{a:+.2f}..{b:+.2f}" for a, b in zip(self.m_h_edges, self.m_h_edges[1:], strict=False)]
        return tuple(f"{t}/{m}" for t in t_eff for m in m_h)

    def assign(self, t_eff: ArrayLike, m_h: ArrayLike) -> NDArray[np.int16]:
        """Bin of each star, edge-clamped: a star outside the grid gets the nearest bin.

        Parameters
        ----------
        t_eff : array of shape (n,)
            Effective temperature [K].
        m_h : array of shape (n,)
            [M/H] [dex].

        Returns
        -------
        array of shape (n,), int16

        Raises
        ------
        LabelError
            A label is not finite or the lengths differ.
        """
        try:
            t, m = finite_rows("teff", t_eff), finite_rows("mh", m_h)
            if t.shape != m.shape:
                raise ValueError(f"teff and mh must have equal length; found {t.size} and {m.size}")
        except ValueError as error:
            raise LabelError(f"cannot place stars on the T_eff (teff) × M_H (mh) grid: {error}") from error
        # Only inner edges are compared: that alone clamps stars outside and includes the last edge.
        i = np.searchsorted(self.t_eff_edges[1:-1], t, side="right")
        k = np.searchsorted(self.m_h_edges[1:-1], m, side="right")
        return (self.shape[1] * i + k).astype(np.int16)

    def covered(self, t_eff: ArrayLike, m_h: ArrayLike) -> NDArray[np.bool_]:
        """Whether each star lies on the grid, outer edges included; a NaN label is not covered.

        Parameters
        ----------
        t_eff : array of shape (n,)
            Effective temperature [K].
        m_h : array of shape (n,)
            [M/H] [dex].

        Returns
        -------
        array of shape (n,), bool
        """
        t = np.asarray(t_eff, dtype=np.float64)
        m = np.asarray(m_h, dtype=np.float64)
        inside_t = (t >= self.t_eff_edges[0]) & (t <= self.t_eff_edges[-1])
        inside_m = (m >= self.m_h_edges[0]) & (m <= self.m_h_edges[-1])
        return inside_t & inside_m

    def to_dict(self) -> dict[str, list[float]]:
        """JSON-ready form: edges in K and dex."""
        return {"t_eff_edges": list(self.t_eff_edges), "m_h_edges": list(self.m_h_edges)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Grid:
        """Inverse of `to_dict`; raises ModelError if the content is not a grid."""
        try:
            return cls(tuple(data["t_eff_edges"]), tuple(data["m_h_edges"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"expected a grid with t_eff_edges and m_h_edges, two or more increasing numbers each; "
                f"found {reprlib.repr(data)} ({error})"
            ) from error


@dataclass(frozen=True)
class SnrGrid:
    """Bins of snr_norm, X, L, M and H: what the experts of `snr-moe` are made for. Stars need no labels for it.

    Parameters
    ----------
    edges : tuple of float
        Upper edges of all bins but the last.

    Raises
    ------
    ValueError
        There are not three edges, or they are not finite and increasing.
    """

    edges: tuple[float, ...] = SNR_NORM_EDGES

    def __post_init__(self) -> None:
        edges = tuple(float(edge) for edge in self.edges)
        if len(edges) != len(SNR_NORM_EDGES) or not np.isfinite(edges).all() or (np.diff(edges) <= 0).any():
            raise ValueError(f"{len(SNR_NORM_EDGES)} finite, increasing edges expected; found {edges}")
        object.__setattr__(self, "edges", edges)

    @property
    def n_bins(self) -> int:
        """Number of bins."""
        return len(self.edges) + 1

    @property
    def names(self) -> tuple[str, ...]:
        """One name per bin."""
        return SNR_NORM_NAMES

    def assign(self, snr_norm: ArrayLike) -> NDArray[np.int16]:
        """Bin of each spectrum, (n,), int16; see `assign_snr_bins`."""
        return assign_snr_bins(snr_norm, self.edges)

    def to_dict(self) -> dict[str, list[float]]:
        """JSON-ready form."""
        return {"snr_norm_edges": list(self.edges)}


def read_grid(data: Mapping[str, Any]) -> Grid | SnrGrid:
    """Inverse of `Grid.to_dict` and `SnrGrid.to_dict`; raises ModelError if the content is neither."""
    if not isinstance(data, Mapping) or "snr_norm_edges" not in data:
        return Grid.from_dict(data)
    try:
        return SnrGrid(tuple(data["snr_norm_edges"]))
    except (TypeError, ValueError) as error:
        raise ModelError(f"expected a grid of snr_norm; found {reprlib.repr(data)} ({error})") from error


PHYSICAL_GRID = Grid()
"""The nine bins of the frozen protocol, 0 cool-poor … 8 hot-rich."""


def uniform(n_t_eff: int, n_m_h: int) -> Grid:
    """Grid of n_t_eff × n_m_h equal cells over the protocol's box, 3750-6000 K × −2…0.5 dex."""
    if n_t_eff < 1 or n_m_h < 1:
        raise ValueError(f"a grid needs at least one interval each way; found {n_t_eff} × {n_m_h}")
    return Grid(
        tuple(np.linspace(T_EFF_EDGES[0], T_EFF_EDGES[-1], n_t_eff + 1).tolist()),
        tuple(np.linspace(M_H_EDGES[0], M_H_EDGES[-1], n_m_h + 1).tolist()),
    )


def assign_snr_bins(snr_norm: ArrayLike, edges: tuple[float, ...] = SNR_NORM_EDGES) -> NDArray[np.int16]:
    """Bin of each spectrum by snr_norm: 0 X (≤ 2), 1 L (2, 4], 2 M (4, 7], 3 H (> 7).

    Parameters
    ----------
    snr_norm : array of shape (n,)
        ‖flux‖₂/‖error‖₂ per spectrum.
    edges : tuple of float
        Upper edges of all bins but the last.

    Returns
    -------
    array of shape (n,), int16

    Raises
    ------
    InputError
        An SNR is not finite (spectra without data have none: leave them out first).
    """
    try:
        rows, cuts = finite_rows("snr", snr_norm), increasing_edges("edges", edges, 1)
    except ValueError as error:
        raise InputError(f"cannot bin spectra by snr_norm: {error}") from error
    return np.searchsorted(cuts, rows, side="left").astype(np.int16)


def finite_rows(name: str, values: ArrayLike) -> NDArray[np.float64]:
    """The values as a float64 vector; a ValueError that names the first row which is not finite."""
    rows: NDArray[Any] = np.asarray(values, dtype=np.float64)
    if rows.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional; found shape {rows.shape}")
    bad = ~np.isfinite(rows)
    if bad.any():
        row = int(np.argmax(bad))
        raise ValueError(
            f"{name} must be finite; found {rows[row]} in row {row} ({int(bad.sum())} such rows)"
        )
    return rows


def increasing_edges(name: str, values: Sequence[float], at_least: int) -> NDArray[np.float64]:
    """The edges as a float64 vector; a ValueError if they are too few, not finite or not increasing."""
    edges = np.asarray(values, dtype=np.float64)
    if edges.ndim != 1 or edges.size < at_least:
        raise ValueError(f"{name} must hold at least {at_least} edge(s); found shape {edges.shape}")
    if not np.isfinite(edges).all() or (np.diff(edges) <= 0).any():
        raise ValueError(f"{name} must be finite and strictly increasing; found {edges.tolist()}")
    return edges
