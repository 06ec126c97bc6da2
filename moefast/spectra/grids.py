"""The wavelengths that spectra were measured at: one grid for all of a set, from the files themselves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import InputError, WaveGridError
from moefast.kernels.resample import pixel_edges
from moefast.spectra.opening import open_measured
from moefast.spectra.paths import find_files
from moefast.spectra.prepared import in_vacuum
from moefast.spectra.resample import Pixels

__all__ = ["MeasuredGrid", "measured_grid"]

F64 = NDArray[np.float64]

ROWS_LOOKED_AT = 16
"""First rows of a file, of which the one with the most pixels gives the grid."""
SAME_EDGE = 0.01
"""Part of a pixel by which arms may overlap and still lie side by side."""


@dataclass(frozen=True)
class MeasuredGrid:
    """Pixels of a file.

    Attributes
    ----------
    path : Path
    wave : array of shape (p,)
        Increasing pixel centres, Å in vacuum. Where arms overlap, those of the bluer arm.
    fwhm : array of shape (p,), or None
        FWHM [Å] of the line-spread function there, if the file has it.
    """

    path: Path
    wave: F64
    fwhm: F64 | None


def measured_grid(
    paths: str | Path | Iterable[str | Path],
    low: float,
    high: float,
    *,
    medium: Literal["auto", "vacuum", "air"] = "auto",
) -> MeasuredGrid:
    """The grid of the first file that can be read and has pixels between two wavelengths.

    Parameters
    ----------
    paths : path, folder, pattern, or several
        Files of any layout.
    low, high : float
        Å in vacuum; pixels outside are left out.
    medium : "auto", "vacuum" or "air"
        As `moefast.spectra.prepared.Preparation` has it.

    Raises
    ------
    WaveGridError
        If files can be read and none has pixels there.
    InputError
        If no file can be read.
    """
    problem: InputError | None = None
    for path in find_files(paths):
        try:
            return _of_file(path, low, high, medium)
        except WaveGridError as error:
            problem = error
        except InputError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _of_file(path: Path, low: float, high: float, medium: str) -> MeasuredGrid:
    file = open_measured(path)
    try:
        arms, _ = file.read(file.arrays[0], 0, min(file.n_rows, ROWS_LOOKED_AT))
        widths = [None] * len(arms) if file.line_spread is None else file.line_spread()
    finally:
        file.close()
    if (file.medium if medium == "auto" else medium) == "air":
        arms = [in_vacuum(arm) for arm in arms]
    pieces = [_inside(*_longest_row(arm, width), low, high) for arm, width in zip(arms, widths, strict=True)]
    pieces = sorted((piece for piece in pieces if len(piece[0]) > 1), key=lambda piece: float(piece[0][0]))
    if not pieces:
        every = np.concatenate([arm.wave[np.isfinite(arm.wave)] for arm in arms])
        found = f"{every.min():.1f} to {every.max():.1f} Å" if every.size else "no wavelengths"
        raise WaveGridError(f"{path}: has {found}, and no pixels between {low:.1f} and {high:.1f} Å")
    wave, fwhm = pieces[0]
    for more, more_fwhm in pieces[1:]:
        end, step = pixel_edges(wave)[-1], more[1] - more[0]
        beyond = pixel_edges(more)[:-1] >= end - SAME_EDGE * step
        wave, fwhm = np.concatenate([wave, more[beyond]]), np.concatenate([fwhm, more_fwhm[beyond]])
    return MeasuredGrid(path, wave, None if np.isnan(fwhm).all() else fwhm)


def _longest_row(arm: Pixels, width: F64 | None) -> tuple[F64, F64]:
    """Wavelengths of the row with the most pixels, and the FWHM there (NaN if unknown)."""
    wave = arm.wave
    if len(wave) == len(arm.flux) and arm.n_rows > 1:
        row = int(np.argmax(np.diff(arm.starts)))
        wave = wave[arm.starts[row] : arm.starts[row + 1]]
    return wave, np.full(len(wave), np.nan) if width is None else width


def _inside(wave: F64, width: F64, low: float, high: float) -> tuple[F64, F64]:
    """Pixels between two wavelengths, as far as they increase."""
    inside = np.isfinite(wave) & (wave >= low) & (wave <= high)
    wave, width = wave[inside], width[inside]
    if len(wave):
        rising = wave > np.concatenate([[-np.inf], np.maximum.accumulate(wave)[:-1]])
        wave, width = wave[rising], width[rising]
    return wave, width
