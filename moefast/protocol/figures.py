"""The report as pictures, each a function of the report alone: PNG files, and SVG for the HTML report.

Design: one drawing per figure for both formats. Colours are roles ("ink", "own"); for SVG each role is drawn in a
colour that nothing else has and replaced by a CSS variable afterwards, so that a page can be light or dark. Drawn with
canvases of matplotlib directly: no global backend or pyplot state of the caller is touched and no display is needed.
Axes have a fixed place, legends stand below the data, never over it.
"""

from __future__ import annotations

from moefast.core.pictures import literal

# isort: split
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from moefast.pages.drawing import (
    AXES,
    LEFT,
    LIGHT,
    PAGE,
    Palette,
    embedded,
    legend_below,
    single,
    snr_axis,
    styled,
    write,
)
from moefast.pages.drawing import cells as cells_of
from moefast.protocol.report import Report

__all__ = [
    "FIGURES",
    "PUBLISHED_RIDGE_OCTILES",
    "PUBLISHED_VIT_OCTILES",
    "Drawing",
    "compared",
    "overview",
    "png",
    "svg",
]

PUBLISHED_RIDGE_OCTILES = (
    (3.8, 0.195),
    (4.8, 0.386),
    (5.9, 0.466),
    (7.4, 0.518),
    (9.1, 0.556),
    (11.3, 0.592),
    (13.9, 0.611),
    (16.8, 0.647),
)
"""(snr_median, R²) of one ridge per octile, as published for a test set that is not public."""

PUBLISHED_VIT_OCTILES = tuple(
    zip(
        np.geomspace(3.2, 14.6, 8).round(1).tolist(),
        (0.46, 0.52, 0.60, 0.68, 0.75, 0.82, 0.87, 0.90),
        strict=True,
    )
)
"""(snr_median, R²) of a vision transformer per octile, as published; the SNRs between the first and the last, which
alone are given, are spaced evenly in the logarithm."""

_WIDTH = 4.7
"""Inches."""
_OVERVIEW = (
    "r2-against-snr",
    "r2-by-bin",
    "predicted-against-true",
    "metal-poor",
    "residuals-log_g",
    "error-calibration",
)
_SHADES = 10


@dataclass(frozen=True)
class Drawing:
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
    report : mapping
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
        data, overall = report["data_set"], report["overall"]
        name = report["model"].get("name") or report["model"].get("recipe") or "model"
        fingerprint = data["fingerprint"].rpartition(":")[2][:12]
        canvas.suptitle(
            literal(f"{name} on {data['name']}")
            + f": R² {_text(overall['r2'])}{_bracket(overall['r2_interval'])}, "
            f"{data['n']:,} stars, fingerprint {fingerprint}"
        )
        write(canvas, path, dpi=110)


def compared(reports: Mapping[str, Report], path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
    """Draw R² of several models against SNR, and what each lacks to the Bayes ceiling, into a PNG file.

    Without a ceiling the second panel shows what each lacks to the first model.

    Parameters
    ----------
    reports : mapping of str to mapping
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
        canvas = Figure(figsize=(2 * _WIDTH, 4.1), layout="constrained", facecolor=palette["surface"])
        left, right = canvas.subplots(1, 2)
        groups = [report["snr_median"]["groups"] for report in reports.values()]
        of_reports = [_floats(group.get("ceilings", {}).get("bayes") for group in mine) for mine in groups]
        limits = next((found for found in of_reports if np.isfinite(found).any()), of_reports[0])
        known = bool(np.isfinite(limits).any())
        aim = limits if known else _floats(group["r2"] for group in groups[0])
        roles = ("own", "first", "second", "third", "muted", "ink")
        lowest: list[float] = []
        for i, (name, mine) in enumerate(zip(reports, groups, strict=True)):
            colour, marker = palette[roles[i % len(roles)]], "osDv^X"[(i + i // len(roles)) % 6]
            whole = reports[name]["overall"]["r2"]
            label = f"{literal(name)}: {_text(whole)}"
            lowest += _line(left, mine, colour, marker, label, width=1.4, band=i == 0)
            right.plot(
                _floats(group["centre"] for group in mine), aim - _floats(group["r2"] for group in mine),
                f"{marker}-", color=colour, markersize=4, linewidth=1.4, label=label,
            )  # fmt: skip
        if known:
            centres = _floats(group["centre"] for group in groups[0])
            left.plot(centres, limits, "--", color=palette["ceiling"], linewidth=1.5, label="Bayes ceiling")
        right.axhline(0, color=palette["ceiling"], linestyle="--", linewidth=1)
        right.grid(alpha=0.7, linewidth=0.6)
        right.set_ylabel(
            "R² lacking to the Bayes ceiling" if known else f"R² lacking to {literal(next(iter(reports)))}"
        )
        for axes in (left, right):
            _snr_axis(axes)
        _r2_axis(left, lowest)
        left.legend(loc="lower right", frameon=False)
        data = next(iter(reports.values()))["data_set"]
        canvas.suptitle(f"{literal(data['name'])}, {data['n']:,} stars", fontsize=10.5)
        write(canvas, path, overwrite=overwrite)


def _single(report: Report, drawing: Drawing, palette: Palette) -> Figure:
    return single(
        lambda axes: drawing.draw(axes, report, palette), palette, lines=drawing.lines, left=drawing.left
    )


# --- drawings ------------------------------------------------------------------------------------------


def _against_snr(axes: Axes, report: Report, palette: Palette) -> None:
    groups = report["snr_median"]["groups"]
    centres = _floats(group["centre"] for group in groups)
    lowest = [*_own_line(axes, groups, palette, _level(report)), PUBLISHED_RIDGE_OCTILES[0][1]]
    # Variants have a comma in their name; they are in the table.
    shown = [name for name in report["references"] if "," not in name][:3]
    for name, role, marker in zip(shown, ("first", "second", "third"), "sDv", strict=False):
        values = _floats(report["references"][name]["r2_snr_median"])
        axes.plot(
            centres, values, f"{marker}-", color=palette[role], label=name, markersize=3.5, linewidth=1.2
        )
        lowest += [*values]
    for name, style in (("bayes", "--"), ("fisher median", ":")):
        values = _floats(group["ceilings"].get(name) for group in groups)
        label = f"{'Bayes' if name == 'bayes' else 'Fisher'} ceiling{', median' if 'median' in name else ''}"
        if np.isfinite(values).any():
            axes.plot(centres, values, style, color=palette["ceiling"], linewidth=1.5, label=label)
        elif report["ceilings"].get(name, {}).get("r2") is not None:
            value = report["ceilings"][name]["r2"]
            axes.axhline(value, linestyle=style, color=palette["ceiling"], label=f"{label} (all stars)")
    # Points of other data are apart: open, grey, behind, never joined by a line.
    for points, marker, name in (
        (PUBLISHED_RIDGE_OCTILES, "s", "ridge, published for other data"),
        (PUBLISHED_VIT_OCTILES, "^", "ViT, published for other data"),
    ):
        axes.plot(
            *np.array(points).T, marker, color=palette["muted"], markersize=4, markerfacecolor="none",
            markeredgewidth=0.8, alpha=0.8, linestyle="none", label=name, zorder=1,
        )  # fmt: skip
    _snr_axis(axes)
    _r2_axis(axes, lowest)
    legend_below(axes)


def _metal_poor(axes: Axes, report: Report, palette: Palette) -> None:
    lowest: list[float] = []
    parts = report["metallicity"]["by_snr_median"]
    for part, role, marker, label in zip(
        parts, ("first", "own"), "sD", ("metal-poor, [M/H] < −1", "the rest, [M/H] ≥ −1"), strict=True
    ):
        lowest += _line(axes, part["groups"], palette[role], marker, label)
    for overall, role in zip(report["metallicity"]["groups"], ("first", "own"), strict=True):
        if overall["ceilings"].get("bayes") is not None:
            axes.axhline(
                overall["ceilings"]["bayes"], color=palette[role], linestyle="--", linewidth=1,
                label=f"Bayes ceiling, all SNRs: {overall['ceilings']['bayes']:.3f}",
            )  # fmt: skip
    _snr_axis(axes)
    _r2_axis(axes, lowest)
    legend_below(axes)


def _over_grid(axes: Axes, report: Report, palette: Palette) -> None:
    _grid_map(axes, report, report["grid"]["groups"])


def _low_snr(axes: Axes, report: Report, palette: Palette) -> None:
    _grid_map(axes, report, report["low_snr"]["grid"])


def _predictions(axes: Axes, report: Report, palette: Palette) -> None:
    edges = _floats(report["density"]["edges"])
    cells = np.array(report["density"]["cells"], dtype=int).reshape(-1, 3)
    if not cells.size:
        return
    shade = np.log1p(cells[:, 2]) / np.log1p(cells[:, 2].max())
    step = np.ceil(shade * _SHADES).astype(int)
    for k in range(1, _SHADES + 1):
        members = cells[step == k]
        if not members.size:
            continue
        size = edges[1] - edges[0]
        patch = cells_of(axes, edges[members[:, 0]], edges[members[:, 1]], size, size, palette["own"])
        patch.set_alpha(0.08 + 0.92 * (k / _SHADES) ** 1.4)
    limits = (edges[0], edges[-1])
    axes.plot(limits, limits, color=palette["ink"], linewidth=1, linestyle="--", label="equal")
    axes.set(xlim=limits, ylim=limits, xlabel="true log g [dex]", ylabel="predicted log g [dex]")
    overall = report["overall"]
    notes = [
        f"R² {_text(overall['r2'])}{_bracket(overall['r2_interval'])}; RMSE {_text(overall['rmse'])}, "
        f"MAE {_text(overall['mae'])}, bias {_text(overall['bias'])} dex",
        f"shade: 1 to {cells[:, 2].max():,} stars per cell, logarithmic",
    ]
    if overall["n_nan"]:
        notes[1] += f"; {overall['n_nan']:,} without prediction, at the mean label"
    for k, note in enumerate(notes):
        axes.annotate(
            note,
            (0, 0),
            (-36, -46 - 13.5 * k),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=8,
        )


def _residuals(label: str, unit: str) -> Callable[[Axes, Report, Palette], None]:
    def draw(axes: Axes, report: Report, palette: Palette) -> None:
        rows = report["residuals"][label]
        x = [row["centre"] for row in rows]
        p16, median, p84, mean = (
            _floats(row[key] for row in rows) for key in ("p16", "median", "p84", "mean")
        )
        axes.axhline(0, color=palette["ink"], linewidth=0.9, linestyle="--")
        axes.fill_between(
            x, p16, p84, color=palette["own"], alpha=0.2, linewidth=0, label="16 to 84 % of stars"
        )
        axes.plot(x, median, "o-", color=palette["own"], markersize=4, linewidth=1.8, label="median")
        axes.plot(x, mean, "s", color=palette["first"], markersize=4, label="mean (bias)")
        axes.set(xlabel=unit, ylabel="predicted − true log g [dex]")
        if label == "snr_median":
            _snr_axis(axes)
        # The same scale in all of them: twice the largest half-width, never less than 0.2 dex.
        every = [
            abs(row[key]) for other in report["residuals"].values() for row in other for key in ("p16", "p84")
        ]
        limit = max(0.2, 1.15 * max(every, default=0.2))
        axes.set_ylim(-limit, limit)
        axes.grid(alpha=0.7, linewidth=0.6)
        legend_below(axes)

    return draw


def _calibration(axes: Axes, report: Report, palette: Palette) -> None:
    levels = report["calibration"]["levels"]
    axes.plot([0, 1], [0, 1], color=palette["ink"], linewidth=1, linestyle="--", label="as claimed")
    expected = [0.0, *(row["expected"] for row in levels), 1.0]
    found = [0.0, *(row["fraction"] for row in levels), 1.0]
    axes.plot(expected, found, "o-", color=palette["own"], markersize=3.5, linewidth=1.8, label="found")
    axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel="expected share of stars within z·σ", ylabel="found share")
    axes.grid(alpha=0.7, linewidth=0.6)
    legend_below(axes)


def _error_size(axes: Axes, report: Report, palette: Palette) -> None:
    rows = report["calibration"]["by_error"]
    claimed, made = _floats(row["err"] for row in rows), _floats(row["rmse"] for row in rows)
    high = 1.08 * float(max(claimed.max(), made.max()))
    axes.plot([0, high], [0, high], color=palette["ink"], linewidth=1, linestyle="--", label="as claimed")
    axes.plot(
        claimed, made, "o-", color=palette["own"], markersize=4, linewidth=1.8, label="tenths of the stars"
    )
    axes.set(xlim=(0, high), ylim=(0, high), xlabel="claimed σ, root mean square [dex]", ylabel="RMSE [dex]")
    axes.grid(alpha=0.7, linewidth=0.6)
    legend_below(axes)


def _gate(kind: str) -> Callable[[Axes, Report, Palette], None]:
    def draw(axes: Axes, report: Report, palette: Palette) -> None:
        routing = report["routing"]
        groups = routing["by_group"][kind]
        names = [group["name"] for group in groups]
        if kind == "snr_median":
            names = [_short(group["centre"]) for group in report["snr_median"]["groups"]]
        values = np.array(
            [
                [np.nan] * routing["n_experts"] if g["mean_weight"] is None else g["mean_weight"]
                for g in groups
            ],
            dtype=np.float64,
        )
        top = 1.0 if np.isnan(values).all() else max(0.2, float(np.nanmax(values)))
        _cells(axes, values.T, 0.0, top, text=routing["n_experts"] <= 12, digits=2, least=0.005)
        axes.set_xticks(
            np.arange(len(names)), names, rotation=0 if kind == "snr_median" else 40,
            ha="center" if kind == "snr_median" else "right", rotation_mode="anchor",
        )  # fmt: skip
        if routing["n_experts"] <= 12:
            axes.set_yticks(np.arange(routing["n_experts"]), routing["names"])
        axes.set_xlabel("snr_median" if kind == "snr_median" else "true bin")
        axes.set_ylabel("expert" if routing["n_experts"] > 12 else "")

    return draw


def _ladder(axes: Axes, report: Report, palette: Palette) -> None:
    overall = report["overall"]
    rows = [
        (name, entry["r2"], entry["r2_interval"], "muted") for name, entry in report["references"].items()
    ]
    rows.append(("this model", overall["r2"], overall["r2_interval"], "own"))
    rows = sorted((row for row in rows if row[1] is not None), key=lambda row: row[1])
    # Ceilings stand above all models. The mean Fisher bound, which single stars without information drag far below the
    # models, is none of the whole set and stays in the table.
    limits = [
        (name, report["ceilings"][key]["r2"], [None, None], "ceiling")
        for key, name in (("bayes", "Bayes ceiling"), ("fisher median", "Fisher ceiling, median"))
        if report["ceilings"].get(key, {}).get("r2") is not None
    ]
    rows += sorted(limits, key=lambda row: row[1])
    for k, (_, value, interval, role) in enumerate(rows):
        if None not in interval:
            axes.plot(interval, [k, k], color=palette[role], linewidth=3, alpha=0.45, solid_capstyle="butt")
        marker = {"own": "o", "ceiling": "d"}.get(role, "s")
        axes.plot([value], [k], marker, color=palette[role], markersize=6 if role == "own" else 5)
        right = max([value, *(v for v in interval if v is not None)])
        axes.annotate(
            f"{value:.3f}".replace("-", "−"), (right, k), (6, 0), textcoords="offset points", va="center",
            fontsize=8.5, color=palette["ink"], fontweight="bold" if role == "own" else "normal",
        )  # fmt: skip
    if limits and len(rows) > len(limits):
        axes.axhline(len(rows) - len(limits) - 0.5, color=palette["muted"], linewidth=0.8, linestyle=":")
    values = [row[1] for row in rows]
    span = max(values) - min(values)
    axes.set_xlim(min(values) - max(0.04, 0.08 * span), max(values) + max(0.12, 0.3 * span))
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_yticks(np.arange(len(rows)), [row[0] for row in rows])
    axes.set_xlabel("R², all stars")
    axes.grid(axis="x", alpha=0.7, linewidth=0.6)
    for role, marker, name in (
        ("own", "o", "this model"),
        ("muted", "s", "simpler fits"),
        ("ceiling", "d", "ceilings"),
    ):
        if any(row[3] == role for row in rows):
            axes.plot([], [], marker, color=palette[role], linestyle="none", label=name)
    legend_below(axes, columns=3)


LEAST_IN_CELL = 5
"""Stars that a cell of the Kiel diagram needs, to have a bias."""
BIAS_STEPS = (-0.4, -0.2, -0.1, 0.1, 0.2, 0.4)
"""dex between which the Kiel diagram changes its colour."""


def _kiel(axes: Axes, report: Report, palette: Palette) -> None:
    kiel = report["kiel"]
    t_eff, log_g = _floats(kiel["t_eff"]), _floats(kiel["log_g"])
    found = np.array(kiel["cells"], np.float64).reshape(-1, 5)
    if not found.size:
        return
    found = found[found[:, 2] >= LEAST_IN_CELL]
    step = np.searchsorted(BIAS_STEPS, found[:, 3])
    colours = mpl.colormaps["PuOr"](np.linspace(0.04, 0.96, len(BIAS_STEPS) + 1))
    signs = [f"{value:+g}".replace("-", "−") for value in BIAS_STEPS]
    names = [
        f"below {signs[0]}",
        *(f"{a} to {b}" for a, b in itertools.pairwise(signs)),
        f"above {signs[-1]}",
    ]
    for k, (colour, name) in enumerate(zip(colours, names, strict=True)):
        i, j = found[step == k, 0].astype(int), found[step == k, 1].astype(int)
        cells_of(axes, t_eff[i], log_g[j], t_eff[1] - t_eff[0], log_g[1] - log_g[0], tuple(colour), name)
    axes.set(xlabel=AXES["T_eff"], ylabel=f"true {AXES['log_g']}")
    axes.set_xlim(t_eff[-1], t_eff[0])
    axes.set_ylim(log_g[-1], log_g[0])
    legend_below(axes, columns=3)


def _giants(axes: Axes, report: Report, palette: Palette) -> None:
    below = report["giants"]["below"]
    for part, role, marker, sign in zip(
        report["giants"]["parts"], ("first", "own"), "sD", ("<", "≥"), strict=True
    ):
        x, y = (_floats(group[key] for group in part["groups"]) for key in ("centre", "right"))
        label = f"{part['name']}, log g {sign} {below:g}"
        axes.plot(x, 100 * y, f"{marker}-", color=palette[role], markersize=4, linewidth=1.8, label=label)
    axes.axhline(50, color=palette["ink"], linewidth=0.9, linestyle="--", label="even odds")
    _snr_axis(axes)
    axes.set(ylabel="predicted on their side [%]", ylim=(0, 102))
    axes.grid(alpha=0.7, linewidth=0.6)
    legend_below(axes)


def _error_by_snr(axes: Axes, report: Report, palette: Palette) -> None:
    rows = report["errors_by_snr"]
    x = _floats(row["centre"] for row in rows)
    rmse, p16, rms, p84 = (_floats(row[key] for row in rows) for key in ("rmse", "p16", "rms", "p84"))
    if np.isfinite(rms).any():
        axes.fill_between(
            x, p16, p84, color=palette["own"], alpha=0.2, linewidth=0, label="claimed, 16 to 84 % of stars"
        )
        axes.plot(x, rms, "o-", color=palette["own"], markersize=4, linewidth=1.8, label="claimed, RMS")
    axes.plot(x, rmse, "s--", color=palette["first"], markersize=4, linewidth=1.4, label="made, RMSE")
    _snr_axis(axes)
    axes.set_ylabel("σ(log g) [dex]")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.7, linewidth=0.6)
    legend_below(axes)


# --- parts of drawings ---------------------------------------------------------------------------------


def _own_line(axes: Axes, groups: Sequence[Report], palette: Palette, level: float) -> list[float]:
    return _line(axes, groups, palette["own"], "o", f"this model ({level:g} %)", width=2.2)


def _line(
    axes: Axes, groups: Sequence[Report], colour: str, marker: str, label: str, width: float = 1.8, band: bool = True
) -> list[float]:  # fmt: skip
    x = _floats(group["centre"] for group in groups)
    y = _floats(group["r2"] for group in groups)
    low, high = (_floats(group["r2_interval"][i] for group in groups) for i in (0, 1))
    if band:
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(x, y, f"{marker}-", color=colour, markersize=4.5, linewidth=width, label=label, zorder=3)
    return [*y]


def _snr_axis(axes: Axes) -> None:
    snr_axis(axes, "snr_median (median of the octile)")


def _r2_axis(axes: Axes, lowest: Iterable[float]) -> None:
    known = [value for value in lowest if np.isfinite(value)]
    bottom = np.floor(10 * min(known, default=0.0)) / 10
    # One hopeless octile (R² far below zero) must not flatten all the others.
    axes.set_ylim(max(-1.0, min(0.0, bottom)), 1.0)
    axes.set_ylabel("R² within the octile")
    axes.grid(alpha=0.7, linewidth=0.6)


def _grid_map(axes: Axes, report: Report, groups: Sequence[Report]) -> None:
    grid = report["protocol"]["grid"]
    t_eff, m_h = grid["t_eff_edges"], grid["m_h_edges"]
    shape = (len(t_eff) - 1, len(m_h) - 1)
    values = _floats(group["r2"] for group in groups).reshape(shape)
    below = []
    for group in groups:
        limit = group.get("ceilings", {}).get("bayes")
        line = f"n = {group['n']:,}"
        if None not in group["r2_interval"]:
            half = 0.5 * (group["r2_interval"][1] - group["r2_interval"][0])
            line = f"± {half:.3f}, {line}"
        below.append(line + ("" if limit is None else f"\nBayes {limit:.3f}"))
    _cells(axes, values.T, 0.0, 1.0, digits=3, below=np.array(below, object).reshape(shape).T)
    axes.set_xticks(np.arange(len(t_eff)) - 0.5, [f"{edge:.0f}" for edge in t_eff])
    axes.set_yticks(np.arange(len(m_h)) - 0.5, [f"{edge:g}".replace("-", "−") for edge in m_h])
    axes.set(xlabel=r"$T_\mathrm{eff}$ [K]", ylabel="[M/H] [dex]")


def _cells(
    axes: Axes,
    values: NDArray[np.float64],
    bottom: float,
    top: float,
    *,
    text: bool = True,
    digits: int = 3,
    least: float = -np.inf,
    below: NDArray[Any] | None = None,
) -> None:
    """A map of cells, values[row, column], with their numbers; vectors, so that it stays sharp."""
    colours = mpl.colormaps["cividis"]
    small = 9.5 if values.size <= 9 else 7.0
    for (row, column), value in np.ndenumerate(values):
        known = bool(np.isfinite(value))
        share = float(np.clip((value - bottom) / (top - bottom), 0, 1)) if known else 0.5
        colour = np.array(colours(share)[:3] if known else (0.55, 0.56, 0.58))
        axes.add_patch(
            Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=colour, edgecolor=colour, linewidth=0.4)
        )
        if not text or (known and value < least):
            continue
        tone = "#000000" if colour @ (0.299, 0.587, 0.114) > 0.45 else "#ffffff"
        words = f"{value:.{digits}f}".replace("-", "−") if known else "–"
        shift = 0.0 if below is None else 0.12
        axes.text(column, row + shift, words, ha="center", va="center", color=tone, fontsize=small)
        if below is not None:
            axes.text(
                column, row - 0.05, str(below[row, column]), ha="center", va="top", color=tone, fontsize=7.3
            )
    axes.set(xlim=(-0.5, values.shape[1] - 0.5), ylim=(-0.5, values.shape[0] - 0.5))
    axes.tick_params(length=0, pad=5)
    for side in axes.spines.values():
        side.set_visible(False)


def _floats(items: Iterable[float | None]) -> NDArray[np.float64]:
    return np.array([np.nan if item is None else item for item in items], dtype=np.float64)


def _level(report: Report) -> float:
    return float(100 * report["protocol"]["level"])


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}".replace("-", "−")


def _bracket(interval: Sequence[float | None]) -> str:
    return "" if None in interval else f" [{_text(interval[0])}, {_text(interval[1])}]"


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


# --- in words ------------------------------------------------------------------------------------------


def _says_kiel(report: Report) -> str:
    cells = [cell for cell in report["kiel"]["cells"] if cell[2] >= LEAST_IN_CELL]
    if not cells:
        return "No cell of T_eff and log g holds enough stars for a bias."
    worst = max(cells, key=lambda cell: abs(cell[3]))
    place = [
        0.5 * (edges[k] + edges[k + 1])
        for edges, k in zip((report["kiel"]["t_eff"], report["kiel"]["log_g"]), worst[:2], strict=True)
    ]
    return (
        f"Bias of log g in {len(cells)} cells of T_eff and log g; the largest, {_text(worst[3])} dex, at "
        f"{place[0]:.0f} K and log g {place[1]:.2f}."
    )


def _says_giants(report: Report) -> str:
    return "Share on their side of log g 3.5 by snr_median: " + "; ".join(
        f"{part['name']} " + ", ".join(f"{_short(g['centre'])}: {_text(g['right'])}" for g in part["groups"])
        for part in report["giants"]["parts"]
    )


def _says_error_by_snr(report: Report) -> str:
    return "Claimed and made error of log g in dex by snr_median: " + ", ".join(
        f"{_short(row['centre'])}: {_text(row['rms'])}, {_text(row['rmse'])}"
        for row in report["errors_by_snr"]
    )


def _says_groups(what: str, kind: str) -> Callable[[Report], str]:
    def describe(report: Report) -> str:
        label = (lambda g: f"{_short(g['centre'])}") if kind == "snr_median" else (lambda g: g["name"])
        return f"{what}: " + ", ".join(f"{label(g)}: {_text(g['r2'])}" for g in report[kind]["groups"]) + "."

    return describe


def _says_residuals(label: str) -> Callable[[Report], str]:
    def describe(report: Report) -> str:
        rows = report["residuals"][label]
        return f"Median of predicted minus true log g along {label}: " + ", ".join(
            f"{row['centre']:.4g}: {_text(row['median'])} dex" for row in rows
        )

    return describe


def _says_metal_poor(report: Report) -> str:
    return "; ".join(
        f"{part['name']}: " + ", ".join(f"{_short(g['centre'])}: {_text(g['r2'])}" for g in part["groups"])
        for part in report["metallicity"]["by_snr_median"]
    )


def _says_low_snr(report: Report) -> str:
    return "R² of stars with snr_norm up to 4: " + ", ".join(
        f"{g['name']} {_text(g['r2'])}" for g in report["low_snr"]["grid"]
    )


def _says_density(report: Report) -> str:
    overall = report["overall"]
    return f"Density of predicted against true log g; R² {_text(overall['r2'])}, bias {_text(overall['bias'])} dex."


def _says_calibration(report: Report) -> str:
    return "Expected and found share of stars: " + ", ".join(
        f"{row['expected']:.2f}: {row['fraction']:.3f}" for row in report["calibration"]["levels"][1::4]
    )


def _says_error_size(report: Report) -> str:
    return "Claimed error and RMSE in dex: " + ", ".join(
        f"{row['err']:.3f}: {row['rmse']:.3f}" for row in report["calibration"]["by_error"]
    )


def _says_gate(kind: str) -> Callable[[Report], str]:
    def describe(report: Report) -> str:
        routing = report["routing"]
        parts = []
        for group in routing["by_group"][kind]:
            if group["mean_weight"] is not None:
                k = int(np.argmax(group["mean_weight"]))
                parts.append(f"{group['name']}: most to {routing['names'][k]}, {group['mean_weight'][k]:.2f}")
        return "Mean weights: " + "; ".join(parts)

    return describe


def _says_ladder(report: Report) -> str:
    rows = [f"{name} {_text(entry['r2'])}" for name, entry in report["references"].items()]
    rows.append(f"this model {_text(report['overall']['r2'])}")
    rows += [f"{name} ceiling {_text(entry['r2'])}" for name, entry in report["ceilings"].items()]
    return "R² on all stars: " + ", ".join(rows)


def _has_calibration(report: Report) -> bool:
    return report["calibration"] is not None


def _has(key: str) -> Callable[[Report], bool]:
    """Whether a report has an entry; those of earlier versions lack the newest."""
    return lambda report: bool(report.get(key))


def _has_gate(report: Report) -> bool:
    return report["routing"] is not None


FIGURES: Mapping[str, Drawing] = {
    "r2-against-snr": Drawing(
        "R² against signal-to-noise",
        "Octiles of snr_median; the band is the bootstrap interval. Open symbols are published numbers of other data, "
        "which are not public: they are no marks for this set.",
        _against_snr,
        _says_groups("R² by median snr_median of the octile", "snr_median"),
        lines=4,
    ),
    "what-helped": Drawing(
        "What helped",
        "Simpler fits on the same stars with their intervals, and what the physics allows.",
        _ladder,
        _says_ladder,
        lambda report: bool(report["references"] or report["ceilings"]),
        lines=1,
        left=1.95,
    ),
    "r2-by-bin": Drawing(
        "R² per bin of T_eff and [M/H]",
        "R², half the width of its interval, number of stars; outer bins include the stars beyond the grid.",
        _over_grid,
        _says_groups("R² per bin", "grid"),
        lines=0,
    ),
    "low-snr": Drawing(
        "R² per bin at low SNR",
        "The same for stars with snr_norm up to 4, the bins X and L.",
        _low_snr,
        _says_low_snr,
        lines=0,
    ),
    "metal-poor": Drawing(
        "Metal-poor stars against the rest",
        "Octiles of snr_median; bands are bootstrap intervals, dashed lines the Bayes ceilings where they are known.",
        _metal_poor,
        _says_metal_poor,
        lines=2,
    ),
    "giants-and-dwarfs": Drawing(
        "Giants against dwarfs",
        "Share of the true giants and dwarfs of each octile of snr_median that are predicted as such.",
        _giants,
        _says_giants,
        _has("giants"),
        lines=2,
    ),
    "predicted-against-true": Drawing(
        "Predicted against true log g",
        "Predictions beyond the frame are drawn at its edge.",
        _predictions,
        _says_density,
        lines=2,
    ),
    "kiel-bias": Drawing(
        "Bias over the Kiel diagram",
        "Mean of predicted − true log g [dex] of the stars of each cell of true T_eff and log g, five at least.",
        _kiel,
        _says_kiel,
        _has("kiel"),
        lines=3,
    ),
    "residuals-log_g": Drawing(
        "Residuals along log g",
        "A slope is regression towards the mean: what a noisy spectrum cannot tell, the prior does.",
        _residuals("log_g", "true log g [dex]"),
        _says_residuals("log_g"),
        lines=2,
    ),
    "residuals-T_eff": Drawing(
        "Residuals along T_eff",
        "Twelve steps of equal numbers of stars.",
        _residuals("T_eff", r"true $T_\mathrm{eff}$ [K]"),
        _says_residuals("T_eff"),
        lines=2,
    ),
    "residuals-M_H": Drawing(
        "Residuals along [M/H]",
        "Twelve steps of equal numbers of stars.",
        _residuals("M_H", "true [M/H] [dex]"),
        _says_residuals("M_H"),
        lines=2,
    ),
    "residuals-snr": Drawing(
        "Residuals along signal-to-noise",
        "Twelve steps of equal numbers of stars.",
        _residuals("snr_median", "snr_median"),
        _says_residuals("snr_median"),
        lines=2,
    ),
    "error-calibration": Drawing(
        "Do the errors cover as they should?",
        "Above the line errors are too large, below it too small.",
        _calibration,
        _says_calibration,
        _has_calibration,
    ),
    "error-by-snr": Drawing(
        "Error of log g against signal-to-noise",
        "Errors that are claimed, and those that are made, in octiles of snr_median: the root mean squares should "
        "agree.",
        _error_by_snr,
        _says_error_by_snr,
        _has("errors_by_snr"),
        lines=2,
    ),
    "error-size": Drawing(
        "Claimed against real errors",
        "Stars in ten steps of their claimed error: the root mean square of the claims and of the residuals.",
        _error_size,
        _says_error_size,
        _has_calibration,
    ),
    "gate-by-bin": Drawing(
        "Gate weights by bin",
        "Mean weight of each expert (row) over the stars of each true bin (column).",
        _gate("grid"),
        _says_gate("grid"),
        _has_gate,
        lines=2,
        left=1.05,
    ),
    "gate-by-snr": Drawing(
        "Gate weights by signal-to-noise",
        "Mean weight of each expert (row) over the stars of each octile of snr_median (column).",
        _gate("snr_median"),
        _says_gate("snr_median"),
        _has_gate,
        lines=0,
        left=1.05,
    ),
}
"""All figures by name, in the order of the report."""
