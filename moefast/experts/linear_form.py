"""A linear predictor per bin and noise level: what simpler fits of the same training set are compared as."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["LinearForm"]

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class LinearForm:
    """A linear predictor per bin and noise level, for comparison: weights (p, K, M), intercepts (K, M).

    `levels` (M,) are the ln s of the levels; a single one is used for every star. `clipped` says that flux is set
    to zero where it is negative, as the published fit does.
    """

    weights: F32
    intercepts: F32
    levels: F32
    clipped: bool = False
