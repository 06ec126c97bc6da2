"""``python -m moefast.simulate.figures FOLDER``: the simulator in three pictures.

    spectra.png          twelve spectra over the box of labels, noise-free and at a signal-to-noise ratio of 8
    noise.png            variance of sky and detector, with --etc against the exposure time calculator's
    emulator-error.png   error of the emulator on syntheses that it was not fitted to

Design: drawn on matplotlib's Agg canvas directly, so that no global state of the caller is touched and no
display is needed. Colours are those of all pictures (`moefast.pages.palette`).
"""

from __future__ import annotations

import moefast.core.pictures  # noqa: F401  # before matplotlib

# isort: split
import argparse
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from moefast.core.errors import MoefastError
from moefast.pages.palette import LIGHT

from .emulator import LABELS, Emulator
from .noise import Exposure, Instrument, NoiseModel, Sky

BLUE, ORANGE = LIGHT["own"], LIGHT["first"]
GREY = "#b5b5b5"
"""Of noise: without any hue, which makes the file a third smaller."""

# The sky of the calculator's file lies 13 pixels above the wavelengths of its airglow lines, and the positions
# of its pixels are those of their lower edges.
CALCULATOR_SHIFT = 13


@dataclass(frozen=True)
class Calculator:
    """Output of the exposure time calculator of PFS, on the wavelengths of its sky lines.

    Attributes
    ----------
    wave_edges : array of shape (p + 1,)
        Å in vacuum.
    variance : array of shape (p,)
        Sky, sky subtraction and detector of one exposure, electrons squared.
    sky : array of shape (p,)
        Electrons of the sky in one exposure.
    counts_per_f_nu : array of shape (p,)
        Electrons of the source in one exposure per erg / s / cm2 / Hz.
    """

    wave_edges: np.ndarray
    variance: np.ndarray
    sky: np.ndarray
    counts_per_f_nu: np.ndarray


def read_calculator(path: str | Path) -> Calculator:
    """Read the calculator's text output for the medium-resolution red arm.

    Parameters
    ----------
    path : str or Path
        4096 rows of 11 columns: arm, pixel, wavelength [nm], S/N, source counts, background variance, total
        variance, AB magnitude, counts per flux, sampling factor, sky counts.

    Raises
    ------
    MoefastError
        If the file cannot be read or has another shape.
    """
    try:
        table = np.loadtxt(path)
    except (OSError, ValueError) as problem:
        raise MoefastError(
            f"{path}: cannot read the exposure time calculator's output: {problem}"
        ) from problem
    if table.ndim != 2 or table.shape[0] <= CALCULATOR_SHIFT or table.shape[1] != 11:
        raise MoefastError(f"{path}: expected rows of 11 columns, found an array of shape {table.shape}")
    pixel = 1750.0 / 4096
    edges = 7100.0 + pixel * (np.arange(len(table) - CALCULATOR_SHIFT + 1) - 0.5)
    variance, counts, sky = table[CALCULATOR_SHIFT:, (5, 8, 10)].T
    return Calculator(edges, variance, sky, counts)


def calculator_model(wave_edges: np.ndarray) -> NoiseModel:
    """Our noise model for what the calculator's file describes: one of three exposures, at the field's edge."""
    return NoiseModel(
        wave_edges,
        instrument=Instrument(vignetting=0.71, fibre_diameter=1.02),
        # Its 1 % of the sky adds up over the three exposures.
        sky=Sky(residual=0.01 * 3**0.5),
        exposure=Exposure(seconds=1200.0, count=1),
    )


def spectra_figure(emulator: Emulator) -> Figure:
    """Twelve spectra over the box of labels, noise-free and at snr_median = 8."""
    t_eff = (4000.0, 4600.0, 5200.0, 5800.0)
    others = ((1.5, -2.0, 0.4, 0.0), (2.5, -0.5, 0.1, -0.2), (4.5, 0.3, 0.0, 0.0))
    labels = np.array([(t, *rest) for t in t_eff for rest in others])
    flux = emulator.flux(labels)
    error = _errors_at(NoiseModel(emulator.wave_edges), flux, 8.0)
    noisy = flux + error * np.random.default_rng(8).standard_normal(flux.shape)
    figure = _figure(14.0, 9.5)
    panels = figure.subplots(4, 3, sharex=True, sharey=True)
    for axes, star, clean, drawn in zip(panels.flat, labels, flux, noisy, strict=True):
        axes.plot(emulator.wave, drawn, color=GREY, linewidth=0.4)
        axes.plot(emulator.wave, clean, color=BLUE, linewidth=0.9)
        title = f"{star[0]:.0f} K   log g {star[1]:.1f}   [M/H] {star[2]:+.1f}"
        axes.set_title(title.replace("-", "\N{MINUS SIGN}"), fontsize=10)
        axes.set(xlim=(emulator.wave_edges[0], emulator.wave_edges[-1]), ylim=(0.2, 1.6))
        axes.tick_params(labelsize=9)
    for name, wave in (("TiO", 7160), ("K I", 7683), ("Na I", 8190), ("Ca II", 8544)):
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1}
        panels[0, 2].text(wave, 0.29, name, fontsize=9, ha="center", bbox=box)
    figure.supxlabel("wavelength in vacuum [Å]", fontsize=11)
    figure.supylabel("flux / median", fontsize=11)
    handles = [
        panels[0, 0].plot([], [], color=BLUE, label="noise-free")[0],
        panels[0, 0].plot([], [], color=GREY, label="one draw at a median signal-to-noise ratio of 8")[0],
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False, fontsize=11)
    return figure


def _errors_at(noise: NoiseModel, flux: np.ndarray, snr: float) -> np.ndarray:
    """Errors at the magnitudes that give this median signal-to-noise ratio in a seeing of 0.75 arcsec."""
    seeing = np.full(len(flux), 0.75)
    bright, faint = np.full(len(flux), 10.0), np.full(len(flux), 30.0)
    for _ in range(40):
        middle = 0.5 * (bright + faint)
        above = noise.error(flux, middle, seeing)[1] > snr
        bright, faint = np.where(above, middle, bright), np.where(above, faint, middle)
    return noise.error(flux, bright, seeing)[0]


def noise_figure(wave_edges: np.ndarray, calculator: Calculator | None = None) -> Figure:
    """Variance of sky and detector; with a calculator, its curve and the ratio to it below.

    Parameters
    ----------
    wave_edges : array of shape (p + 1,)
        Pixel edges, Å in vacuum; not used with a calculator, which brings its own.
    calculator : Calculator, optional
    """
    if calculator is None:
        model = NoiseModel(wave_edges)
        figure = _figure(14.0, 5.5)
        axes = figure.subplots()
        observation = f"{model.exposure.count} x {model.exposure.seconds:g} s"
        axes.semilogy(_centres(wave_edges), model.sky_variance, color=BLUE, linewidth=0.6)
        axes.set(title=f"sky and detector, {observation}", ylabel="variance [electrons²]")
    else:
        wave_edges = calculator.wave_edges
        wave = _centres(wave_edges)
        ours = calculator_model(wave_edges).sky_variance
        ratio = ours / calculator.variance
        low, high = np.percentile(ratio, [5, 95])
        figure = _figure(14.0, 9.0)
        top, closer, axes = figure.subplots(3, 1, gridspec_kw={"height_ratios": [3, 3, 2]})
        for panel in (top, closer):
            panel.semilogy(wave, calculator.variance, color=ORANGE, linewidth=2.2, label="calculator")
            panel.semilogy(wave, ours, color=BLUE, linewidth=0.9, label="simulator")
            panel.set_ylabel("variance [electrons²]")
        top.legend(loc="upper left", frameon=False, ncols=2)
        top.set_title("sky and detector, one exposure of 1200 s", fontsize=11)
        closer.set(xlim=(8250.0, 8500.0), ylim=(90.0, 2e5))
        closer.set_title("the OH 6-2 band, enlarged", fontsize=11)
        axes.semilogy(wave, ratio, color=BLUE, linewidth=0.5)
        axes.axhspan(0.85, 1.15, color=GREY, alpha=0.25, linewidth=0, label="±15 %")
        axes.axhline(1.0, color="black", linewidth=0.6)
        ticks = (0.5, 0.7, 0.85, 1.0, 1.15, 1.4, 2.0)
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set(ylim=(0.5, 2.0), ylabel="simulator / calculator")
        axes.set_title(f"ratio; nine pixels of ten lie between {low:.2f} and {high:.2f}", fontsize=11)
        axes.legend(loc="upper right", frameon=False)
        top.set_xlim(wave_edges[0], wave_edges[-1])
    axes.set(xlim=(wave_edges[0], wave_edges[-1]), xlabel="wavelength in vacuum [Å]")
    return figure


def emulator_figure(labels: np.ndarray, error: np.ndarray) -> Figure:
    """Map of the emulator's error over effective temperature, gravity and metallicity.

    Parameters
    ----------
    labels : array of shape (n, 5)
        Labels of the held-out syntheses, in the order of `LABELS`.
    error : array of shape (n, 3)
        Median, 99th percentile and largest of |emulated / synthesised - 1| over the pixels.
    """
    percent = 100.0 * np.maximum(np.asarray(error, dtype=float), 1e-7)
    figure = _figure(12.5, 8.5)
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    for column, name in enumerate(("median over the pixels", "99th percentile of the pixels")):
        # The worst are drawn last, over the others.
        order = np.argsort(percent[:, column])
        values, stars = percent[order, column], labels[order]
        scale = LogNorm(*np.percentile(values, [1, 99.5]))
        for axes, label, unit in (
            (panels[0, column], 1, "log g [dex]"),
            (panels[1, column], 2, "[M/H] [dex]"),
        ):
            points = axes.scatter(
                stars[:, 0], stars[:, label], c=values, s=52, cmap="cividis", norm=scale, linewidth=0
            )
            axes.set(ylabel=unit if column == 0 else "")
        panels[0, column].set_title(
            f"{name}: half of the spectra below {np.median(values):.2g} %, worst {values.max():.2g} %",
            fontsize=10,
        )
        panels[1, column].set_xlabel("T_eff [K]")
        colours = figure.colorbar(points, ax=panels[:, column], location="bottom", aspect=45)
        steps = np.outer(10.0 ** np.arange(-5, 3), (1.0, 2.0, 5.0)).ravel()
        colours.set_ticks([step for step in steps if scale.vmin <= step <= scale.vmax], minor=False)
        colours.ax.xaxis.set_major_formatter("{x:g}")
        colours.minorticks_off()
        colours.set_label("|emulated / synthesised \N{MINUS SIGN} 1| [%]")
    panels[0, 0].invert_yaxis()
    panels[0, 0].invert_xaxis()
    figure.suptitle(f"error of the emulator on {len(labels)} syntheses that it was not fitted to")
    return figure


def held_out_errors(path: str | Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n, 5) and errors (n, 3) of the held-out syntheses, from the emulator's data.

    Parameters
    ----------
    path : str or Path, optional
        Instead of the shipped ``emulator.npz``.

    Raises
    ------
    MoefastError
        If the data has no such arrays.
    """
    source = path or files("moefast.simulate").joinpath("data/emulator.npz")
    with np.load(str(source)) as data:
        missing = [name for name in ("held_out_labels", "held_out_error") if name not in data]
        if missing:
            raise MoefastError(
                f"{source}: {' and '.join(missing)} missing, so there is no error to draw; "
                "build the emulator again with python -m moefast.simulate.build"
            )
        labels, error = data["held_out_labels"], data["held_out_error"]
    if labels.shape != (len(labels), len(LABELS)) or error.shape != (len(labels), 3):
        raise MoefastError(
            f"{source}: expected held_out_labels (n, {len(LABELS)}) and held_out_error (n, 3), "
            f"found {labels.shape} and {error.shape}"
        )
    return labels, error


def _centres(edges: np.ndarray) -> np.ndarray:
    return 0.5 * (edges[1:] + edges[:-1])


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=80, metadata={"Software": None})
    print(path)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(
        prog="python -m moefast.simulate.figures", description="Draw the simulator in three pictures."
    )
    parser.add_argument("folder", type=Path, help="where the pictures go; made if it does not exist")
    parser.add_argument("--etc", type=Path, help="output of the exposure time calculator, medium resolution")
    chosen = parser.parse_args(arguments)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    calculator = read_calculator(chosen.etc) if chosen.etc else None
    emulator = Emulator.load()
    _save(spectra_figure(emulator), chosen.folder / "spectra.png")
    _save(noise_figure(emulator.wave_edges, calculator), chosen.folder / "noise.png")
    _save(emulator_figure(*held_out_errors()), chosen.folder / "emulator-error.png")


if __name__ == "__main__":
    try:
        main()
    except MoefastError as problem:
        raise SystemExit(f"error: {problem}") from None
