"""Full-spectrum fitting with the simulator's emulator: what The Payne, FERRE and rvspecfit do with their own.

The model of a star is exact here, as no survey's is: the emulator made the test spectra. A test set with velocities or
reddening is fitted as if it had none.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moefast.simulate.emulator import Emulator
from moefast.simulate.rows import Settings

__all__ = ["EmulatorModel"]

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class EmulatorModel:
    """The emulator as a `moefast.peers.least_squares.SpectralModel`, within the label box of the reference sets.

    Attributes
    ----------
    emulator : Emulator
    columns : array of shape (p, q)
        The mean spectrum and the principal components.
    low, high : arrays of shape (5,)
    """

    emulator: Emulator = field(default_factory=Emulator.load)
    columns: F64 = field(init=False)
    scatter2: None = field(init=False, default=None)
    low: F64 = field(init=False)
    high: F64 = field(init=False)

    def __post_init__(self) -> None:
        inside = slice(self.emulator.margin, self.emulator.margin + len(self.emulator.wave))
        both = np.concatenate([self.emulator.mean[None], self.emulator.basis])[:, inside]
        object.__setattr__(self, "columns", np.ascontiguousarray(both.T, dtype=float))
        low, high = np.array(Settings().label_ranges, dtype=float).T
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)

    @property
    def wave(self) -> F64:
        """Wavelengths of the pixels [Å]."""
        return self.emulator.wave

    def coefficients(self, labels: F64) -> F64:
        """Of the columns at labels (5,)."""
        return np.append(1.0, self.emulator.coefficients(labels[None])[0])

    def derivatives(self, labels: F64) -> F64:
        """Of the coefficients by the labels, (5, q)."""
        slopes = self.emulator.coefficient_derivatives(labels[None])[0]
        return np.concatenate([np.zeros((len(slopes), 1)), slopes], axis=1)
