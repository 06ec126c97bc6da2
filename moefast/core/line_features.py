"""Line features of the gate: depths and equivalent widths of Ca II and Na I lines, linear in flux until the last step.

Design: a line needs three numbers that are linear in flux: the mean over its core, the integral over its window
and the continuum from two sidebands. They are columns of the same projection as everything else, so a spectrum is
read once. What is not linear (two divisions) works on a dozen numbers per star.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEAST_CONTINUUM", "LINES", "LINE_FEATURES", "Line", "line_columns"]


@dataclass(frozen=True)
class Line:
    """A spectral line: window and two continuum sidebands in Å (vacuum); the core is 3 Å around the centre."""

    name: str
    centre: float
    window: tuple[float, float]
    blue: tuple[float, float]
    red: tuple[float, float]


CORE_WIDTH = 3.0
LINES = (
    Line("CaII_8498", 8500.36, (8490.0, 8510.0), (8474.0, 8489.0), (8562.0, 8577.0)),
    Line("CaII_8542", 8544.44, (8530.0, 8555.0), (8474.0, 8489.0), (8562.0, 8577.0)),
    Line("CaII_8662", 8664.52, (8650.0, 8675.0), (8618.0, 8642.0), (8700.0, 8725.0)),
    Line("NaI_8190", 8197.08, (8180.0, 8200.0), (8140.0, 8175.0), (8203.0, 8230.0)),
)
"""Names as is usual, by wavelength in air; the survey's wave grid is in vacuum, and so are the numbers. Windows as
published; sidebands are stretches with few strong lines. The Na I core is that of the stronger line of the doublet.
"""

LINE_FEATURES = (
    "CaII_8498_depth",
    "CaII_8498_EW",
    "CaII_8542_depth",
    "CaII_8542_EW",
    "CaII_8662_depth",
    "CaII_8662_EW",
    "CaT_EW",
    "NaI_8190_depth",
    "NaI_8190_EW",
)

LEAST_CONTINUUM = 0.05
"""Continua (flux units) below this are noise; the bound keeps the division finite and is part of the model."""


def line_columns(wave: NDArray[np.float64], *, all_lines: bool = True) -> NDArray[np.float64]:
    """Columns that turn a spectrum into core, window and continuum of each line.

    Parameters
    ----------
    wave : array of shape (p,), Å
    all_lines : bool
        Whether a line that lies outside the grid is an error; if not, its columns are zero.

    Returns
    -------
    array of shape (p, 3 × 4), float64
        Per line: mean over the core; integral over the window in Å; continuum at the line's centre, the straight
        line through the mean fluxes of both sidebands.

    Raises
    ------
    ValueError
        A window or sideband lies outside the wave grid.
    """
    step = np.gradient(wave)
    columns = np.zeros((wave.size, 3 * len(LINES)))

    def inside(low: float, high: float, name: str) -> NDArray[np.bool_]:
        chosen = (wave >= low) & (wave < high)
        if not chosen.any():
            raise ValueError(
                f"{name}: no pixel in {low}-{high} Å; the wave grid covers {wave[0]:.1f}-{wave[-1]:.1f} Å"
            )
        return chosen

    for i, line in enumerate(LINES):
        windows = (line.window, line.blue, line.red)
        if not all_lines and not all(((wave >= low) & (wave < high)).any() for low, high in windows):
            continue
        core = inside(line.centre - CORE_WIDTH / 2, line.centre + CORE_WIDTH / 2, line.name)
        window = inside(*line.window, line.name)
        blue, red = inside(*line.blue, line.name), inside(*line.red, line.name)
        columns[core, 3 * i] = 1.0 / core.sum()
        columns[window, 3 * i + 1] = step[window]
        blue_centre, red_centre = wave[blue].mean(), wave[red].mean()
        share = (line.centre - blue_centre) / (red_centre - blue_centre)
        columns[blue, 3 * i + 2] += (1 - share) / blue.sum()
        columns[red, 3 * i + 2] += share / red.sum()
    return columns
