"""What is seen of a noisy spectrum: its smoothed flux, and the frame that this needs in a picture.

Design: pixels are weighed by their errors, so that sky lines neither show as spikes nor set the frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["FRAME", "frame", "smoothed"]

F64 = NDArray[np.float64]

FRAME = (2, 98)
"""Percentiles of the smoothed flux that set the frame."""
MARGIN, LEAST = 0.3, 0.05
"""Room beyond what sets the frame, in its range; and the least range, in its largest value."""


def frame(values: Sequence[float], below: float = 1) -> tuple[float, float]:
    """Lower and upper end of a picture that shows these values.

    Parameters
    ----------
    values : sequence of float
        At least one.
    below : float
        How much more room there is below than above.
    """
    low, high = float(np.min(values)), float(np.max(values))
    room = MARGIN * max(high - low, LEAST * abs(high), 1e-12)
    return low - below * room, high + room


def smoothed(values: F64, weights: F64, width: int) -> F64:
    """Weighted running mean over `width` pixels; NaN where no pixel has weight.

    Parameters
    ----------
    values, weights : array of shape (p,)
        A pixel of weight 0 counts for nothing, whatever its value.
    width : int
        Odd.
    """
    window = np.ones(width)
    used = np.where(weights > 0, values, 0.0) * weights
    total = np.convolve(weights, window, "same")
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, np.convolve(used, window, "same") / total, np.nan)
