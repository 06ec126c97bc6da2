"""Where the Earth's atmosphere absorbs: wavelengths that a star's light does not reach us at.

Design: ranges in the observed frame, in vacuum. A spectrum that is shifted to rest takes its absorption along, so
pixels are marked before the shift.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moefast.spectra.resample import Pixels

__all__ = ["CHOICES", "TELLURIC", "Telluric", "telluric_pixels", "without_telluric", "words_of_ranges"]

Telluric = Literal["auto", "mask", "keep"]
CHOICES: tuple[Telluric, ...] = ("auto", "mask", "keep")
"""What can be done with pixels in these ranges."""

TELLURIC = ((7150.0, 7400.0), (7590.0, 7715.0), (8100.0, 8380.0))
"""Å: what the Galactic-archaeology pipeline of PFS masks of the Earth's absorption in this arm."""


def telluric_pixels(wave: NDArray) -> NDArray[np.bool_]:
    """Whether each pixel centre [Å, vacuum] lies in one of the `TELLURIC` ranges, shape (p,)."""
    wave = np.asarray(wave, dtype=float)
    lost = np.zeros(wave.shape, dtype=bool)
    for first, last in TELLURIC:
        lost |= (wave >= first) & (wave <= last)
    return lost


def without_telluric(arm: Pixels) -> Pixels:
    """Measured spectra, in vacuum and not yet shifted, whose pixels in the `TELLURIC` ranges are bad."""
    lost = telluric_pixels(arm.wave)
    if len(lost) != len(arm.bad):
        # One grid for all rows.
        lost = np.tile(lost, arm.n_rows)
    return replace(arm, bad=arm.bad | lost)


def words_of_ranges() -> str:
    """The ranges in words: "7150-7400, …"."""
    return ", ".join(f"{first:.0f}-{last:.0f}" for first, last in TELLURIC)
