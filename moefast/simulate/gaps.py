"""Pixels that a real spectrum has lost: the Earth's absorption, random pixels, a block, the edges.

Design: a gap is an array of bool, True where a pixel is lost, and nothing else; flux and error stay what they are.
Which pixels a star loses depends on the seed and on the number of its row, not on the block that the row is made in.
Each kind of gap has a stream of random numbers of its own, so one more kind moves nothing of the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import MoefastError
from moefast.core.random import uniforms_of_rows
from moefast.spectra.telluric import telluric_pixels

__all__ = [
    "CALCIUM",
    "GAPS",
    "GapKind",
    "Gaps",
    "lost_block",
    "lost_edges",
    "outside_calcium",
    "random_pixels",
]

Mask = NDArray[np.bool_]
Rows = NDArray[np.integer]
Range = tuple[float, float]
GapKind = Callable[[np.ndarray, Rows, int], Mask]
"""Lost pixels (n, p) of the stars `rows` on a wave grid [Å], with a seed."""

CALCIUM = (8400.0, 8850.0)
"""Å: the region of the Ca II triplet, which many surveys observe alone."""

# Streams of `moefast.core.random`; 2 to 5 are those of `moefast.simulate.rows`.
_PIXEL_STREAM, _SHARE_STREAM, _BLOCK_STREAM, _EDGE_STREAM, _CHOICE_STREAM = 6, 7, 8, 9, 10


def _range(value: float | Range, name: str) -> Range:
    low, high = value if isinstance(value, tuple) else (value, value)
    if not (math.isfinite(low) and math.isfinite(high) and 0.0 <= low <= high <= 1.0):
        raise MoefastError(f"{name}: expected numbers from 0 to 1 in rising order, found {value}")
    return float(low), float(high)


def _between(limits: Range, uniform: np.ndarray) -> np.ndarray:
    return limits[0] + (limits[1] - limits[0]) * uniform


def outside_calcium(wave: np.ndarray) -> Mask:
    """Whether each pixel centre [Å] lies outside `CALCIUM`, shape (p,)."""
    wave = np.asarray(wave, dtype=float)
    return (wave < CALCIUM[0]) | (wave > CALCIUM[1])


def random_pixels(rows: Rows, n_pixels: int, *, seed: int, share: float | Range = (0.005, 0.05)) -> Mask:
    """Pixels lost independently of each other.

    Parameters
    ----------
    rows : array of shape (n,), integer ≥ 0
        Index of each star in its set.
    n_pixels : int
    seed : int
    share : float or (float, float)
        Probability of a pixel to be lost; of a range every star draws its own.

    Returns
    -------
    array of shape (n, n_pixels), bool
        True where a pixel is lost.

    Raises
    ------
    MoefastError
        A share is not in 0 … 1.
    """
    probability = _between(_range(share, "share"), uniforms_of_rows(rows, 1, seed=seed, stream=_SHARE_STREAM))
    return uniforms_of_rows(rows, n_pixels, seed=seed, stream=_PIXEL_STREAM) < probability


def lost_block(rows: Rows, n_pixels: int, *, seed: int, share: float | Range = (0.05, 0.2)) -> Mask:
    """One run of neighbouring pixels per star, `share` of all of them, anywhere in the spectrum.

    Parameters, result and errors are those of `random_pixels`.
    """
    limits = _range(share, "share")
    uniform = uniforms_of_rows(rows, 2, seed=seed, stream=_BLOCK_STREAM)
    size = np.rint(_between(limits, uniform[:, :1]) * n_pixels)
    first = np.floor(uniform[:, 1:] * (n_pixels - size + 1))
    pixel = np.arange(n_pixels)
    return (pixel >= first) & (pixel < first + size)


def lost_edges(rows: Rows, n_pixels: int, *, seed: int, share: float | Range = (0.02, 0.15)) -> Mask:
    """The bluest or the reddest pixels of each star, one side or the other with equal probability.

    Parameters, result and errors are those of `random_pixels`.
    """
    limits = _range(share, "share")
    uniform = uniforms_of_rows(rows, 2, seed=seed, stream=_EDGE_STREAM)
    size = np.rint(_between(limits, uniform[:, :1]) * n_pixels)
    pixel = np.arange(n_pixels)
    return np.where(uniform[:, 1:] < 0.5, pixel < size, pixel >= n_pixels - size)


@dataclass(frozen=True)
class Gaps:
    """What the stars of a set lose; each star draws for itself.

    Attributes
    ----------
    telluric, block, edges, calcium : float
        Probability that a star loses the telluric ranges, a block, an edge, all but `CALCIUM`.
    random : (float, float)
        Range of the share of pixels lost at random, in every star.
    block_share, edge_share : (float, float)
        Range of the share of the pixels that a block or an edge holds.
    """

    telluric: float = 2.0 / 3.0
    random: Range = (0.005, 0.05)
    block: float = 0.1
    block_share: Range = (0.05, 0.2)
    edges: float = 0.2
    edge_share: Range = (0.02, 0.15)
    calcium: float = 0.0

    def __post_init__(self) -> None:
        for name in ("telluric", "block", "edges", "calcium", "random", "block_share", "edge_share"):
            _range(getattr(self, name), name)

    def kinds(self, rows: Rows, *, seed: int) -> dict[str, Mask]:
        """Which stars lose what: telluric, block, edges, calcium, each of shape (n,), bool."""
        uniform = uniforms_of_rows(rows, 4, seed=seed, stream=_CHOICE_STREAM)
        names = ("telluric", "block", "edges", "calcium")
        return {name: uniform[:, k] < getattr(self, name) for k, name in enumerate(names)}

    def lost_pixels(self, wave: np.ndarray, rows: Rows, *, seed: int) -> Mask:
        """Lost pixels of the stars `rows`, shape (n, p), bool, True where a pixel is lost.

        Parameters
        ----------
        wave : array of shape (p,)
            Pixel centres, Å in vacuum.
        rows : array of shape (n,), integer ≥ 0
        seed : int
        """
        rows = np.asarray(rows)
        p = len(wave)
        lost = (
            random_pixels(rows, p, seed=seed, share=self.random)
            if any(self.random)
            else np.zeros((len(rows), p), dtype=bool)
        )
        kinds = self.kinds(rows, seed=seed)
        lost[kinds["telluric"]] |= telluric_pixels(wave)
        lost[kinds["calcium"]] |= outside_calcium(wave)
        for name, make, share in (
            ("block", lost_block, self.block_share),
            ("edges", lost_edges, self.edge_share),
        ):
            chosen = np.flatnonzero(kinds[name])
            lost[chosen] |= make(rows[chosen], p, seed=seed, share=share)
        return lost


_NO_GAPS = Gaps(telluric=0.0, random=(0.0, 0.0), block=0.0, edges=0.0)


def _drawn(gaps: Gaps) -> GapKind:
    return lambda wave, rows, seed: gaps.lost_pixels(wave, rows, seed=seed)


def _fixed(first: float, stop: float) -> GapKind:
    """The pixels from `first` to `stop`, as shares of the spectrum, in every star."""

    def lost(wave: np.ndarray, rows: Rows, seed: int) -> Mask:
        pixel = np.arange(len(wave))
        one = (pixel >= round(first * len(wave))) & (pixel < round(stop * len(wave)))
        return np.repeat(one[None], len(rows), axis=0)

    return lost


GAPS: dict[str, GapKind] = {
    "none": _drawn(_NO_GAPS),
    "telluric": _drawn(replace(_NO_GAPS, telluric=1.0)),
    "random": _drawn(replace(_NO_GAPS, random=(0.005, 0.05))),
    "random 28 %": _drawn(replace(_NO_GAPS, random=(0.28, 0.28))),
    "block": _drawn(replace(_NO_GAPS, block=1.0)),
    "edges": _drawn(replace(_NO_GAPS, edges=1.0)),
    "bluest 15 %": _fixed(0.0, 0.15),
    "reddest 10 %": _fixed(0.9, 1.0),
    "Ca II alone": _drawn(replace(_NO_GAPS, calcium=1.0)),
}
"""Each kind of gap by itself, in every star: functions of (wave, rows, seed) that return lost pixels (n, p)."""
