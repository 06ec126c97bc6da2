"""The report as pictures, each a function of the report alone: PNG files, and SVG for the HTML report.

Design: one drawing per figure for both formats. Colours are roles ("ink", "own"); for SVG each role is drawn in a
colour that nothing else has and replaced by a CSS variable afterwards, so that a page can be light or dark. Drawn with
canvases of matplotlib directly: no global backend or pyplot state of the caller is touched and no display is needed.
Axes have a fixed place, legends stand below the data, never over it.
"""

from __future__ import annotations

from moefast.core.pictures import literal

# isort: split
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from moefast.core.text import counted
from moefast.pages.drawing import LEFT, LIGHT, PAGE, Palette, embedded, single, styled, write
from moefast.protocol.captions import (
    as_text,
    has_calibration,
    has_error_by_snr,
    has_gate,
    has_giants,
    has_kiel,
    in_brackets,
    says_calibration,
    says_density,
    says_error_by_snr,
    says_error_size,
    says_gate,
    says_giants,
    says_groups,
    says_kiel,
    says_ladder,
    says_low_snr,
    says_metal_poor,
    says_residuals,
)
from moefast.protocol.drawings import (
    WIDTH,
    draw_against_snr,
    draw_calibration,
    draw_error_by_snr,
    draw_error_size,
    draw_gate,
    draw_giants,
    draw_kiel,
    draw_ladder,
    draw_line,
    draw_low_snr,
    draw_metal_poor,
    draw_over_grid,
    draw_predictions,
    draw_residuals,
    floats,
    r2_axis,
    snr_median_axis,
)
from moefast.protocol.report_parts import Report

__all__ = ["FIGURES", "ReportFigure", "compared", "overview", "png", "svg"]

_OVERVIEW = (
    "r2-against-snr",
    "r2-by-bin",
    "predicted-against-true",
    "metal-poor",
    "residuals-log_g",
    "error-calibration",
)


@dataclass(frozen=True)
class ReportFigure:
    """One figure.

    Attributes
    ----------
    title, caption : str
        What it shows, and how it is read.
    draw : callable
        Draws the report into axes with the colours of a palette.
    describe : callable
        The same in words, for those who cannot see it.
    exists : callable
        Whether the report has what it shows.
    lines : int
        Lines of the legend, below the axes.
    left : float
        Room for tick labels in inches.
    """

    title: str
    caption: str
    draw: Callable[[Axes, Report, Palette], None]
    describe: Callable[[Report], str]
    exists: Callable[[Report], bool] = lambda report: True
    lines: int = 1
    left: float = LEFT


def png(report: Report, name: str, path: str | os.PathLike[str]) -> None:
    """Draw one figure of `FIGURES` into a PNG file.

    Parameters
    ----------
    report : Report
        From `moefast.protocol.report.evaluate_predictions`, or read back from its JSON.
    name : str
    path : path
        Output; absent or complete.

    Raises
    ------
    OutputError
        The file could not be written.
    """
    with styled(LIGHT):
        write(_single(report, FIGURES[name], LIGHT), path)


def svg(report: Report, name: str) -> str:
    """One figure of `FIGURES` as an <svg> element whose colours are variables of the page that it stands in."""
    drawing = FIGURES[name]
    with styled(PAGE):
        canvas = _single(report, drawing, PAGE)
        return embedded(canvas, name, drawing.title, drawing.describe(report))


def overview(report: Report, path: str | os.PathLike[str]) -> None:
    """Draw the six figures that say most into one PNG file.

    Raises
    ------
    OutputError
        The file could not be written.
    """
    with styled(LIGHT):
        canvas = Figure(
            figsize=(15.6, 9.4), layout=ConstrainedLayoutEngine(wspace=0.05, hspace=0.06), facecolor="white"
        )
        for axes, name in zip(canvas.subplots(2, 3).flat, _OVERVIEW, strict=True):
            drawing = FIGURES[name]
            if drawing.exists(report):
                drawing.draw(axes, report, LIGHT)
                axes.set_title(drawing.title, fontsize=10.5)
            else:
                axes.set_axis_off()
        data, overall = report.data_set, report.overall
        name = report.model.get("name") or report.model.get("recipe") or "model"
        fingerprint = data.fingerprint.rpartition(":")[2][:12]
        canvas.suptitle(
            literal(f"{name} on {data.name}")
            + f": R² {as_text(overall.r2)}{in_brackets(overall.r2_interval)}, "
            f"{counted(data.n, 'star')}, file fingerprint {fingerprint}"
        )
        write(canvas, path, dpi=110)


def compared(reports: Mapping[str, Report], path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
    """Draw R² of several models against SNR, and how far each is below the Bayes ceiling, into a PNG file.

    Without a ceiling the second panel shows how far each is below the first model.

    Parameters
    ----------
    reports : mapping of str to Report
        Of the same stars, by the name in the legend.
    path : path
        Output; absent or complete.
    overwrite : bool
        Whether an existing file may be replaced.

    Raises
    ------
    OutputError
        The file could not be written.
    """
    palette = LIGHT
    with styled(palette):
        canvas = Figure(figsize=(2 * WIDTH, 4.1), layout="constrained", facecolor=palette["surface"])
        left, right = canvas.subplots(1, 2)
        groups = [report.snr_median.groups for report in reports.values()]
        of_reports = [floats(group.ceilings.get("bayes") for group in mine) for mine in groups]
        limits = next((found for found in of_reports if np.isfinite(found).any()), of_reports[0])
        known = bool(np.isfinite(limits).any())
        aim = limits if known else floats(group.r2 for group in groups[0])
        roles = ("own", "first", "second", "third", "muted", "ink")
        lowest: list[float] = []
        for i, (name, mine) in enumerate(zip(reports, groups, strict=True)):
            colour, marker = palette[roles[i % len(roles)]], "osDv^X"[(i + i // len(roles)) % 6]
            whole = reports[name].overall.r2
            label = f"{literal(name)}: {as_text(whole)}" + (" (95 %)" if i == 0 else "")
            lowest += draw_line(left, mine, colour, marker, label, width=1.4, band=i == 0)
            right.plot(
                floats(group.centre for group in mine), aim - floats(group.r2 for group in mine),
                f"{marker}-", color=colour, markersize=4, linewidth=1.4, label=label,
            )  # fmt: skip
        if known:
            centres = floats(group.centre for group in groups[0])
            left.plot(centres, limits, "--", color=palette["ceiling"], linewidth=1.5, label="Bayes ceiling")
        right.axhline(0, color=palette["ceiling"], linestyle="--", linewidth=1)
        right.grid(alpha=0.7, linewidth=0.6)
        right.set_ylabel(f"R² below that of {'the Bayes ceiling' if known else literal(next(iter(reports)))}")
        for axes in (left, right):
            snr_median_axis(axes)
        r2_axis(left, lowest)
        left.legend(loc="lower right", frameon=False)
        data = next(iter(reports.values())).data_set
        canvas.suptitle(f"{literal(data.name)}, {counted(data.n, 'star')}", fontsize=10.5)
        write(canvas, path, overwrite=overwrite)


def _single(report: Report, drawing: ReportFigure, palette: Palette) -> Figure:
    return single(
        lambda axes: drawing.draw(axes, report, palette), palette, lines=drawing.lines, left=drawing.left
    )


FIGURES: Mapping[str, ReportFigure] = {
    "r2-against-snr": ReportFigure(
        "R² against signal-to-noise",
        "Octiles of snr_median; the band is the bootstrap interval. Open symbols are published numbers of other data, "
        "which are not public: they are no marks for this set.",
        draw_against_snr,
        says_groups("R² by median snr_median of the octile", "snr_median"),
        lines=4,
    ),
    "what-helped": ReportFigure(
        "What helped",
        "Simpler fits on the same stars with their intervals, and what the physics allows.",
        draw_ladder,
        says_ladder,
        lambda report: bool(report.references or report.ceilings),
        lines=1,
        left=1.95,
    ),
    "r2-by-bin": ReportFigure(
        "R² per bin of T_eff and [M/H]",
        "R², half the width of its interval, number of stars; outer bins include the stars beyond the grid.",
        draw_over_grid,
        says_groups("R² per bin", "grid"),
        lines=0,
    ),
    "low-snr": ReportFigure(
        "R² per bin at low SNR",
        "The same for stars with snr_norm up to 4, the bins X and L.",
        draw_low_snr,
        says_low_snr,
        lines=0,
    ),
    "metal-poor": ReportFigure(
        "Metal-poor stars against the rest",
        "Octiles of snr_median; bands are bootstrap intervals, dashed lines the Bayes ceilings where they are known.",
        draw_metal_poor,
        says_metal_poor,
        lines=2,
    ),
    "giants-and-dwarfs": ReportFigure(
        "Giants against dwarfs",
        "Share of the true giants and dwarfs of each octile of snr_median that are predicted as such.",
        draw_giants,
        says_giants,
        has_giants,
        lines=2,
    ),
    "predicted-against-true": ReportFigure(
        "Predicted against true log g",
        "Predictions beyond the frame are drawn at its edge.",
        draw_predictions,
        says_density,
        lines=2,
    ),
    "kiel-bias": ReportFigure(
        "Bias over the Kiel diagram",
        "Mean of predicted − true log g [dex] of the stars of each cell of true T_eff and log g, five at least.",
        draw_kiel,
        says_kiel,
        has_kiel,
        lines=3,
    ),
    "residuals-log_g": ReportFigure(
        "Residuals along log g",
        "A slope is regression towards the mean: what a noisy spectrum cannot tell, the prior does.",
        draw_residuals("log_g", "true log g [dex]"),
        says_residuals("log_g"),
        lines=2,
    ),
    "residuals-T_eff": ReportFigure(
        "Residuals along T_eff",
        "Twelve steps of equal numbers of stars.",
        draw_residuals("T_eff", r"true $T_\mathrm{eff}$ [K]"),
        says_residuals("T_eff"),
        lines=2,
    ),
    "residuals-M_H": ReportFigure(
        "Residuals along [M/H]",
        "Twelve steps of equal numbers of stars.",
        draw_residuals("M_H", "true [M/H] [dex]"),
        says_residuals("M_H"),
        lines=2,
    ),
    "residuals-snr": ReportFigure(
        "Residuals along signal-to-noise",
        "Twelve steps of equal numbers of stars.",
        draw_residuals("snr_median", "snr_median"),
        says_residuals("snr_median"),
        lines=2,
    ),
    "error-calibration": ReportFigure(
        "Do the errors cover as they should?",
        "Above the line errors are too large, below it too small.",
        draw_calibration,
        says_calibration,
        has_calibration,
    ),
    "error-by-snr": ReportFigure(
        "Error of log g against signal-to-noise",
        "Errors that are claimed, and those that are made, in octiles of snr_median: the root mean squares should "
        "agree.",
        draw_error_by_snr,
        says_error_by_snr,
        has_error_by_snr,
        lines=2,
    ),
    "error-size": ReportFigure(
        "Claimed against real errors",
        "Stars in ten steps of their claimed error: the root mean square of the claims and of the residuals.",
        draw_error_size,
        says_error_size,
        has_calibration,
    ),
    "gate-by-bin": ReportFigure(
        "Gate weights by bin",
        "Mean weight of each expert (row) over the stars of each true bin (column).",
        draw_gate("grid"),
        says_gate("grid"),
        has_gate,
        lines=2,
        left=1.05,
    ),
    "gate-by-snr": ReportFigure(
        "Gate weights by signal-to-noise",
        "Mean weight of each expert (row) over the stars of each octile of snr_median (column).",
        draw_gate("snr_median"),
        says_gate("snr_median"),
        has_gate,
        lines=0,
        left=1.05,
    ),
}
"""All figures by name, in the order of the report."""
