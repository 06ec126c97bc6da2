"""The picture of files of spectra: a few spectra with their smoothed flux, and both signal-to-noise ratios."""

from __future__ import annotations

from moefast.core.text import counted
from moefast.pages.drawing import LIGHT, literal, styled, write

# isort: split
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from moefast.core.errors import InputError
from moefast.inspection.files import BLOCK_ROWS, spread_runs
from moefast.inspection.smoothing import FRAME, frame, smoothed
from moefast.spectra.quality import assess, good_pixels
from moefast.spectra.spectrum_set import SpectrumSet

__all__ = ["draw_files"]

_SMOOTHING = 9
"""Pixels, odd, that the smoothed flux is a mean of."""
MOST_ROWS = 20_000
"""Rows that the histograms are made of at most, spread evenly over the set."""


def draw_files(spectra: SpectrumSet, path: str | Path, *, overwrite: bool = True) -> Path:
    """Draw a few spectra with their smoothed flux, and the histograms of both signal-to-noise ratios.

    Parameters
    ----------
    spectra : SpectrumSet
        The spectra.
    path : str or Path
        PNG, SVG or PDF file to write.
    overwrite : bool
        Whether an existing file may be replaced.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    path = Path(path)
    snr_norm, snr_median = _signal_to_noise(spectra)
    chosen = np.unique(np.linspace(0, spectra.n_rows - 1, 4).astype(int))
    with styled(LIGHT):
        figure = Figure(figsize=(11, 2.1 * len(chosen) + 3.4), layout="constrained")
        grid = figure.add_gridspec(len(chosen) + 1, 2, height_ratios=[*[1.0] * len(chosen), 1.35])
        titled: list[str] = [name for name in ("T_eff", "log_g", "M_H") if name in spectra.columns]
        axes: list[Axes] = []
        for k, row in enumerate(chosen):
            axis = figure.add_subplot(grid[k, :], sharex=axes[0] if axes else None)
            axes.append(axis)
            _draw_spectrum(axis, spectra, int(row), titled)
            axis.set_ylabel("flux")
            axis.tick_params(labelbottom=k == len(chosen) - 1)
        axes[0].legend(loc="lower left", ncols=2, frameon=False, fontsize=8, borderaxespad=0.2)
        axes[-1].set_xlabel("wavelength [Å]")
        _draw_histogram(figure.add_subplot(grid[-1, 0]), snr_norm, "snr_norm = ‖flux‖₂ / ‖error‖₂")
        _draw_histogram(figure.add_subplot(grid[-1, 1]), snr_median, "snr_median = median(flux / error)")
        files = f"{len(spectra.shards)} files" if len(spectra.shards) > 1 else spectra.shards[0].path.name
        figure.suptitle(
            f"{literal(files)}: {counted(spectra.n_rows, 'spectrum')}, {spectra.n_pixels} pixels", fontsize=11
        )
        write(figure, path, dpi=120, overwrite=overwrite)
    return path


def _signal_to_noise(spectra: SpectrumSet) -> tuple[NDArray, NDArray]:
    """Both signal-to-noise ratios of some rows."""
    norms, medians = [np.empty(0, np.float32)], [np.empty(0, np.float32)]
    for run in spread_runs(spectra.n_rows, MOST_ROWS):
        for block in spectra.blocks(BLOCK_ROWS, rows=run, on_error="skip"):
            good = good_pixels(block.flux, block.error, block.mask)
            quality = assess(block.flux, block.error, good, block.mask)
            norms.append(quality.snr_norm)
            medians.append(quality.snr_median)
    return np.concatenate(norms), np.concatenate(medians)


def _draw_histogram(axis: Axes, values: NDArray, name: str) -> None:
    finite = values[np.isfinite(values)]
    if len(finite):
        low, high = np.percentile(finite, [0, 99.5])
        n_bins = int(np.clip(2 * np.sqrt(len(finite)), 8, 40))
        edges = np.linspace(low, max(high, low + 1e-3), n_bins + 1).tolist()
        axis.hist(
            np.clip(finite, edges[0], edges[-1]),
            edges,
            color=LIGHT["own"],
            edgecolor=LIGHT["surface"],
            lw=0.4,
        )
        middle = float(np.median(finite))
        axis.axvline(middle, color=LIGHT["first"], lw=1.2, label=f"median {middle:.2f}")
        axis.legend(frameon=False, fontsize=8)
    axis.set_xlabel(f"{name}  [no unit]")
    axis.set_ylabel("spectra")
    axis.spines[["top", "right"]].set_visible(False)


def _draw_spectrum(axis: Axes, spectra: SpectrumSet, row: int, titled: list[str]) -> None:
    try:
        block = next(iter(spectra.blocks(1, rows=(row, row + 1), params=titled, prefetch=False)))
    except InputError:
        axis.set_title(f"row {row} cannot be read", fontsize=9, loc="left")
        return
    good = good_pixels(block.flux, block.error, block.mask)
    flux, error = block.flux[0].astype(float), block.error[0].astype(float)
    if good is not None:
        flux[~good[0]] = np.nan
        error[~good[0]] = np.nan
    usable = np.isfinite(flux) & np.isfinite(error)
    weights = np.where(usable, 1 / np.where(usable, error, 1.0) ** 2, 0.0)
    mean = smoothed(flux, weights, _SMOOTHING)
    axis.plot(spectra.wave, flux, color=LIGHT["muted"], lw=0.5, alpha=0.55, label="flux, good pixels")
    axis.plot(spectra.wave, mean, color=LIGHT["ink"], lw=0.9, label=f"mean of {_SMOOTHING} pixels")
    if np.isfinite(mean).any():
        axis.set_ylim(*frame([*np.nanpercentile(mean, FRAME)], below=2))
    labels = ", ".join(
        f"{name} {float(block.params[name][0]):.4g}{' K' if name == 'T_eff' else ''}"
        for name in titled
        if np.isfinite(block.params[name][0])
    )
    axis.set_title(f"row {row}" + (f":  {labels}" if labels else ""), fontsize=9, loc="left")
    axis.set_xlim(spectra.wave[0], spectra.wave[-1])
    axis.spines[["top", "right"]].set_visible(False)
