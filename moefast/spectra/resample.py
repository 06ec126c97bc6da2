"""Spectra of any grid, on the grid of a model: shifted to rest, rebinned, arms joined.

Design: see `moefast.kernels.resample` for how flux and error are carried over and why diagonal errors stay calibrated.
Rows that lie on the grid already, at rest, are copied bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moefast.kernels.resample import (
    NOT_FINITE,
    NOT_INCREASING,
    join,
    pixel_edges,
    resample,
    wrong_wavelengths,
)
from moefast.spectra.blocks import Memory

__all__ = ["OnGrid", "Pixels", "faults_of_wavelengths", "on_grid"]

_WORDS = {NOT_FINITE: "is not finite", NOT_INCREASING: "is not above the one before it"}
SAME = 0.01
"""Pixels by which grids may differ that count as the same."""


@dataclass(frozen=True)
class Pixels:
    """Spectra as they were measured, rows one after the other, of one arm.

    Attributes
    ----------
    wave : array of shape (m,), or (k,) if all rows have the same
        Å.
    flux, error : array of shape (m,)
        f_λ and its 1σ.
    bad : array of shape (m,), bool
    starts : array of shape (n + 1,), int64
        Where the rows begin, and m.
    where : str
        The HDU or dataset, for messages.
    """

    wave: NDArray[np.float64]
    flux: NDArray
    error: NDArray
    bad: NDArray[np.bool_]
    starts: NDArray[np.int64]
    where: str = ""

    @classmethod
    def of_rows(cls, wave: NDArray, flux: NDArray, error: NDArray, bad: NDArray, where: str = "") -> Pixels:
        """Rows (n, k) on one grid, or on one each."""
        n, k = flux.shape
        return cls(
            np.ascontiguousarray(wave, np.float64).ravel(),
            np.ascontiguousarray(flux).ravel(),
            np.ascontiguousarray(error).ravel(),
            np.ascontiguousarray(bad, bool).ravel(),
            np.arange(n + 1, dtype=np.int64) * k,
            where,
        )

    @property
    def n_rows(self) -> int:
        """Number of spectra."""
        return len(self.starts) - 1

    def take(self, rows: NDArray[np.intp]) -> Pixels:
        """Some of the rows, in the order in which they are named; neighbours in a row are not copied."""
        if len(rows) == self.n_rows and (rows == np.arange(self.n_rows)).all():
            return self
        lengths = np.diff(self.starts)
        if len(rows) > 1 and (lengths == lengths[0]).all():
            # Whole rows are copied four times as fast as numbers one by one.
            shape = (self.n_rows, -1)
            follow = (np.diff(rows) == 1).all()
            some = slice(int(rows[0]), int(rows[-1]) + 1) if follow else rows
            wave, flux, error, bad = (
                each.reshape(shape)[some] if len(each) == len(self.flux) else each
                for each in (self.wave, self.flux, self.error, self.bad)
            )
            return Pixels.of_rows(wave, flux, error, bad, self.where)
        lengths = lengths[rows]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        at = np.repeat(self.starts[rows] - starts[:-1], lengths) + np.arange(starts[-1])
        shared = len(self.wave) != len(self.flux)
        # Rows that share their wavelengths say so by having fewer of them than pixels.
        wave = (
            self.wave
            if shared and len(rows) > 1
            else np.tile(self.wave, len(rows))
            if shared
            else self.wave[at]
        )
        return Pixels(wave, self.flux[at], self.error[at], self.bad[at], starts, self.where)


@dataclass(frozen=True)
class OnGrid:
    """Spectra on a common grid.

    Attributes
    ----------
    flux, error : array of shape (n, p), float32
        0 and infinite where a pixel was lost.
    mask : array of shape (n, p), bool
        True where a pixel is bad or was lost.
    faults : dict of int to str
        What is wrong with the wavelengths of a row; all its pixels are lost.
    """

    flux: NDArray[np.float32]
    error: NDArray[np.float32]
    mask: NDArray[np.bool_]
    faults: dict[int, str]


def on_grid(
    arms: Sequence[Pixels],
    factor: NDArray[np.float64],
    wave: NDArray[np.float64],
    memory: Memory | None = None,
) -> OnGrid:
    """Spectra of one or more arms on a grid, arms joined where they overlap, weighed by their variances.

    Parameters
    ----------
    arms : sequence of Pixels
        The same n rows in each.
    factor : array of shape (n,)
        λ / λ at rest = 1 + v/c.
    wave : array of shape (p,), Å
        Pixel centres of the grid.
    memory : Memory, optional
        Where spectra are copied that lie on the grid as they are; new arrays if absent. Others get arrays of their own.
    """
    first, *others = [_arm(arm, factor, wave, memory if arm is arms[0] else None) for arm in arms]
    faults = dict(first.faults)
    for other in others:
        join(first.flux, first.error, first.mask, (other.flux, other.error, other.mask))
        faults = {**other.faults, **faults}
    return OnGrid(first.flux, first.error, first.mask, faults)


def _arm(
    arm: Pixels, factor: NDArray[np.float64], wave: NDArray[np.float64], memory: Memory | None
) -> OnGrid:
    there = _there_already(arm, factor, wave)
    p = len(wave)
    if there.all():
        shape = (arm.n_rows, p)
        array = _new_array if memory is None else memory.array
        flux, error, mask = (array(name, shape) for name in ("flux", "error", "mask"))
        with np.errstate(over="ignore"):
            for made, given in ((flux, arm.flux), (error, arm.error), (mask, arm.bad)):
                np.copyto(made, given.reshape(shape), casting="unsafe")
        return OnGrid(flux, error, mask, {})
    edges = pixel_edges(wave)
    flux, error, mask, status = resample(
        arm.wave, arm.flux, arm.error, arm.bad, arm.starts, np.ascontiguousarray(factor, np.float64), edges
    )
    for row in np.flatnonzero(there):
        own = slice(arm.starts[row], arm.starts[row + 1])
        with np.errstate(over="ignore"):
            flux[row], error[row], mask[row] = arm.flux[own], arm.error[own], arm.bad[own]
    return OnGrid(flux, error, mask, _in_words(arm, status))


def _new_array(name: str, shape: tuple[int, int]) -> NDArray:
    return np.empty(shape, np.bool_ if name == "mask" else np.float32)


def faults_of_wavelengths(
    arm: Pixels, factor: NDArray[np.float64], wave: NDArray[np.float64]
) -> dict[int, str]:
    """What is wrong with the wavelengths of each row, as `on_grid` would find it."""
    edges = pixel_edges(wave)
    return _in_words(
        arm, wrong_wavelengths(arm.wave, arm.starts, np.ascontiguousarray(factor, np.float64), edges)
    )


def _in_words(arm: Pixels, status: NDArray[np.int64]) -> dict[int, str]:
    return {
        int(row): f"{arm.where}: wavelength of pixel {status[row, 1]} {_WORDS[int(status[row, 0])]}"
        for row in np.flatnonzero(status[:, 0])
    }


def _there_already(arm: Pixels, factor: NDArray[np.float64], wave: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Rows that are at rest and on the grid."""
    lengths = np.diff(arm.starts)
    there = (lengths == len(wave)) & (factor == 1)
    if not there.any():
        return there
    shared = len(arm.wave) != len(arm.flux) or arm.n_rows == 1
    step = SAME * np.abs(np.gradient(wave))
    if shared:
        return there & bool(len(arm.wave) == len(wave) and np.all(np.abs(arm.wave - wave) < step))
    for row in np.flatnonzero(there):
        there[row] = np.all(np.abs(arm.wave[arm.starts[row] : arm.starts[row + 1]] - wave) < step)
    return there
