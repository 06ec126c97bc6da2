"""Wave grids of spectra: whether two are the same, and what tells them apart, in words."""

from __future__ import annotations

import numpy as np

__all__ = ["describe_difference", "describe_wave", "other_unit", "same_wave"]

_UNITS = {
    "nanometres: multiply it by 10": lambda wave: 10 * wave,
    "micrometres: multiply it by 10,000": lambda wave: 1e4 * wave,
    "metres: multiply it by 1e10": lambda wave: 1e10 * wave,
    "log10 of Å: give 10**wave": lambda wave: 10.0 ** np.minimum(wave, 30),
    "ln of Å: give exp(wave)": lambda wave: np.exp(np.minimum(wave, 60)),
}
"""What wavelengths that are not in Å may be in, what to do, and the same in Å."""


def describe_wave(wave: np.ndarray) -> str:
    """A wave grid, array of shape (p,) in Å, in words."""
    step = (wave[-1] - wave[0]) / (len(wave) - 1) if len(wave) > 1 else float("nan")
    return f"{len(wave)} pixels, {wave[0]:.3f} to {wave[-1]:.3f} Å, mean step {step:.5f} Å"


def same_wave(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two wave grids, arrays of shape (p,) in Å, agree to 0.01 pixel everywhere."""
    if len(first) != len(second):
        return False
    step = np.abs(np.gradient(first)) if len(first) > 1 else np.ones(1)
    return bool(np.all(np.abs(first - second) < 0.01 * step))


def other_unit(found: np.ndarray, expected: np.ndarray) -> str:
    """What wavelengths look like that would meet those expected in another unit, in words; empty if in none."""
    low, high = expected[0], expected[-1]
    if found[0] < high and found[-1] > low:
        return ""
    for words, in_angstrom in _UNITS.items():
        wave = in_angstrom(found)
        # Half of what is expected, at least.
        if min(wave[-1], high) - max(wave[0], low) > 0.5 * (high - low):
            return f"wave looks like {words}"
    return ""


def describe_difference(found: np.ndarray, expected: np.ndarray) -> str:
    """Two wave grids, arrays of shape (p,) in Å, and where they differ most, so that no two words are alike."""
    text = f"{describe_wave(found)}; expected {describe_wave(expected)}"
    if unit := other_unit(found, expected):
        return f"{text}; {unit}"
    if len(found) == len(expected):
        most = int(np.argmax(np.abs(found - expected)))
        text += (
            f"; they differ most at pixel {most}, {found[most]:.5f} Å where {expected[most]:.5f} Å are expected "
            f"({found[most] - expected[most]:+.5f} Å)"
        )
    return text
