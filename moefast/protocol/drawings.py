"""What the figures of a report show, drawn into axes with the colours of a palette."""

from __future__ import annotations

# Before matplotlib, whatever the environment asks of it.
import moefast.core.pictures  # noqa: F401

# isort: split
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from moefast.pages.drawing import AXES, Palette, legend_below, snr_axis
from moefast.pages.drawing import cells as cells_of
from moefast.protocol.captions import LEAST_IN_CELL, as_text, in_brackets, shortly
from moefast.protocol.report_parts import (
    BinScores,
    Interval,
    NamedScores,
    OctileScores,
    PartOctileScores,
    Report,
    Scores,
)

__all__ = [
    "BIAS_STEPS",
    "PUBLISHED_RIDGE_OCTILES",
    "PUBLISHED_VIT_OCTILES",
    "WIDTH",
    "draw_against_snr",
    "draw_calibration",
    "draw_error_by_snr",
    "draw_error_size",
    "draw_gate",
    "draw_giants",
    "draw_kiel",
    "draw_ladder",
    "draw_line",
    "draw_low_snr",
    "draw_metal_poor",
    "draw_over_grid",
    "draw_predictions",
    "draw_residuals",
    "floats",
    "r2_axis",
    "snr_median_axis",
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

WIDTH = 4.7
"""Inches."""
_SHADES = 10


def draw_against_snr(axes: Axes, report: Report, palette: Palette) -> None:
    """R² per octile of snr_median, with references, ceilings and published points."""
    groups = report.snr_median.groups
    centres = floats(group.centre for group in groups)
    lowest = [*_own_line(axes, groups, palette, _level(report)), PUBLISHED_RIDGE_OCTILES[0][1]]
    # Variants have a comma in their name; they are in the table.
    shown = [name for name in report.references if "," not in name][:3]
    for name, role, marker in zip(shown, ("first", "second", "third"), "sDv", strict=False):
        values = floats(report.references[name].r2_snr_median)
        axes.plot(
            centres, values, f"{marker}-", color=palette[role], label=name, markersize=3.5, linewidth=1.2
        )
        lowest += [*values]
    for name, style in (("bayes", "--"), ("fisher median", ":")):
        values = floats(group.ceilings.get(name) for group in groups)
        label = f"{'Bayes' if name == 'bayes' else 'Fisher'} ceiling{', median' if 'median' in name else ''}"
        if np.isfinite(values).any():
            axes.plot(centres, values, style, color=palette["ceiling"], linewidth=1.5, label=label)
        elif (value := _ceiling(report, name)) is not None:
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
    snr_median_axis(axes)
    r2_axis(axes, lowest)
    legend_below(axes)


def draw_metal_poor(axes: Axes, report: Report, palette: Palette) -> None:
    """The same for metal-poor stars and the rest."""
    lowest: list[float] = []
    parts = report.metallicity.by_snr_median
    for part, role, marker, label in zip(
        parts, ("first", "own"), "sD", ("metal-poor, [M/H] < −1", "the rest, [M/H] ≥ −1"), strict=True
    ):
        lowest += draw_line(axes, part.groups, palette[role], marker, label)
    for overall, role in zip(report.metallicity.groups, ("first", "own"), strict=True):
        if (limit := overall.ceilings.get("bayes")) is not None:
            axes.axhline(
                limit, color=palette[role], linestyle="--", linewidth=1,
                label=f"Bayes ceiling, all SNRs: {limit:.3f}",
            )  # fmt: skip
    snr_median_axis(axes)
    r2_axis(axes, lowest)
    legend_below(axes)


def draw_over_grid(axes: Axes, report: Report, palette: Palette) -> None:
    """R² per bin of T_eff and [M/H]."""
    _grid_map(axes, report, report.grid.groups)


def draw_low_snr(axes: Axes, report: Report, palette: Palette) -> None:
    """The same for faint stars."""
    _grid_map(axes, report, report.low_snr.grid)


def draw_predictions(axes: Axes, report: Report, palette: Palette) -> None:
    """Density of predicted against true log g."""
    edges = floats(report.density.edges)
    cells = np.array(report.density.cells, dtype=int).reshape(-1, 3)
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
    overall = report.overall
    notes = [
        f"R² {as_text(overall.r2)}{in_brackets(overall.r2_interval)}; RMSE {as_text(overall.rmse)}, "
        f"MAE {as_text(overall.mae)}, bias {as_text(overall.bias)} dex",
        f"shade: 1 to {cells[:, 2].max():,} stars per cell, logarithmic",
    ]
    if overall.n_nan:
        notes[1] += f"; {overall.n_nan:,} without prediction, at the mean label"
    for k, note in enumerate(notes):
        axes.annotate(
            note,
            (0, 0),
            (-36, -46 - 13.5 * k),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=8,
        )


def draw_residuals(label: str, unit: str) -> Callable[[Axes, Report, Palette], None]:
    """Residuals of log g along a label."""

    def draw(axes: Axes, report: Report, palette: Palette) -> None:
        rows = report.residuals[label]
        x = [row.centre for row in rows]
        p16, p84 = floats(row.p16 for row in rows), floats(row.p84 for row in rows)
        median, mean = floats(row.median for row in rows), floats(row.mean for row in rows)
        axes.axhline(0, color=palette["ink"], linewidth=0.9, linestyle="--")
        axes.fill_between(
            x, p16, p84, color=palette["own"], alpha=0.2, linewidth=0, label="16 to 84 % of stars"
        )
        axes.plot(x, median, "o-", color=palette["own"], markersize=4, linewidth=1.8, label="median")
        axes.plot(x, mean, "s", color=palette["first"], markersize=4, label="mean (bias)")
        axes.set(xlabel=unit, ylabel="predicted − true log g [dex]")
        if label == "snr_median":
            snr_median_axis(axes)
        # The same scale in all of them: twice the largest half-width, never less than 0.2 dex.
        every = [abs(p) for other in report.residuals.values() for row in other for p in (row.p16, row.p84)]
        limit = max(0.2, 1.15 * max(every, default=0.2))
        axes.set_ylim(-limit, limit)
        axes.grid(alpha=0.7, linewidth=0.6)
        legend_below(axes)

    return draw


def draw_calibration(axes: Axes, report: Report, palette: Palette) -> None:
    """Share of stars within their errors against the share that should be."""
    if report.calibration is None:
        return
    levels = report.calibration.levels
    axes.plot([0, 1], [0, 1], color=palette["ink"], linewidth=1, linestyle="--", label="as claimed")
    expected = [0.0, *(row.expected for row in levels), 1.0]
    found = [0.0, *floats(row.fraction for row in levels), 1.0]
    axes.plot(expected, found, "o-", color=palette["own"], markersize=3.5, linewidth=1.8, label="found")
    axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel="expected share of stars within z·σ", ylabel="found share")
    axes.grid(alpha=0.7, linewidth=0.6)
    legend_below(axes)


def draw_error_size(axes: Axes, report: Report, palette: Palette) -> None:
    """RMSE against the claimed error."""
    if report.calibration is None:
        return
    rows = report.calibration.by_error
    claimed, made = floats(row.err for row in rows), floats(row.rmse for row in rows)
    high = 1.08 * float(max(claimed.max(), made.max()))
    axes.plot([0, high], [0, high], color=palette["ink"], linewidth=1, linestyle="--", label="as claimed")
    axes.plot(
        claimed, made, "o-", color=palette["own"], markersize=4, linewidth=1.8, label="tenths of the stars"
    )
    axes.set(xlim=(0, high), ylim=(0, high), xlabel="claimed σ, root mean square [dex]", ylabel="RMSE [dex]")
    axes.grid(alpha=0.7, linewidth=0.6)
    legend_below(axes)


def draw_gate(kind: Literal["grid", "snr_median"]) -> Callable[[Axes, Report, Palette], None]:
    """Mean weights of experts per group."""

    def draw(axes: Axes, report: Report, palette: Palette) -> None:
        routing = report.routing
        if routing is None:
            return
        groups = routing.by_group[kind]
        names = [group.name for group in groups]
        if kind == "snr_median":
            names = [shortly(group.centre) for group in report.snr_median.groups]
        values = np.array(
            [[np.nan] * routing.n_experts if g.mean_weight is None else g.mean_weight for g in groups],
            dtype=np.float64,
        )
        top = 1.0 if np.isnan(values).all() else max(0.2, float(np.nanmax(values)))
        _cells(axes, values.T, 0.0, top, text=routing.n_experts <= 12, digits=2, least=0.005)
        axes.set_xticks(
            np.arange(len(names)), names, rotation=0 if kind == "snr_median" else 40,
            ha="center" if kind == "snr_median" else "right", rotation_mode="anchor",
        )  # fmt: skip
        if routing.n_experts <= 12:
            axes.set_yticks(np.arange(routing.n_experts), routing.names)
        axes.set_xlabel("snr_median" if kind == "snr_median" else "true bin")
        axes.set_ylabel("expert" if routing.n_experts > 12 else "")

    return draw


def draw_ladder(axes: Axes, report: Report, palette: Palette) -> None:
    """References, this model and ceilings, one above the other."""
    scored: list[tuple[str, Scores, str]] = [
        *((name, entry, "muted") for name, entry in report.references.items()),
        ("this model", report.overall, "own"),
    ]
    rows: list[tuple[str, float, Interval, str]] = [
        (name, scores.r2, scores.r2_interval, role) for name, scores, role in scored if scores.r2 is not None
    ]
    rows.sort(key=lambda row: row[1])
    # Ceilings stand above all models. The mean Fisher bound, which single stars without information drag far below the
    # models, is none of the whole set and stays in the table.
    limits: list[tuple[str, float, Interval, str]] = [
        (name, value, (None, None), "ceiling")
        for key, name in (("bayes", "Bayes ceiling"), ("fisher median", "Fisher ceiling, median"))
        if (value := _ceiling(report, key)) is not None
    ]
    rows += sorted(limits, key=lambda row: row[1])
    for k, (_, value, interval, role) in enumerate(rows):
        if None not in interval:
            axes.plot(
                floats(interval), [k, k], color=palette[role], linewidth=3, alpha=0.45, solid_capstyle="butt"
            )
        marker = {"own": "o", "ceiling": "d"}.get(role, "s")
        axes.plot([value], [k], marker, color=palette[role], markersize=6 if role == "own" else 5)
        right = max([value, *(v for v in interval if v is not None)])
        axes.annotate(
            f"{value:.3f}".replace("-", "−"), (right, k), (6, 0), textcoords="offset points", va="center",
            fontsize=8.5, color=palette["ink"], fontweight="bold" if role == "own" else "normal",
        )  # fmt: skip
    if limits and len(rows) > len(limits):
        axes.axhline(len(rows) - len(limits) - 0.5, color=palette["muted"], linewidth=0.8, linestyle=":")
    # Of intervals, too: beside the largest of them stands its number.
    ends = [value for _, r2, interval, _ in rows for value in (r2, *interval) if value is not None]
    span = max(ends) - min(ends)
    axes.set_xlim(min(ends) - max(0.04, 0.08 * span), max(ends) + max(0.12, 0.3 * span))
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


BIAS_STEPS = (-0.4, -0.2, -0.1, 0.1, 0.2, 0.4)
"""dex between which the Kiel diagram changes its colour."""


def draw_kiel(axes: Axes, report: Report, palette: Palette) -> None:
    """Bias in cells of T_eff and log g."""
    kiel = report.kiel
    if kiel is None:
        return
    t_eff, log_g = floats(kiel.t_eff), floats(kiel.log_g)
    found = np.array(kiel.cells, np.float64).reshape(-1, 5)
    if not found.size:
        return
    found = found[found[:, 2] >= LEAST_IN_CELL]
    step = np.searchsorted(BIAS_STEPS, found[:, 3])
    colours = mpl.colormaps["PuOr"](np.linspace(0.04, 0.96, len(BIAS_STEPS) + 1))
    signs = [f"{value:+g}".replace("-", "−") for value in BIAS_STEPS]
    names = [
        f"bias below {signs[0]} dex",
        *(f"{a} to {b}" for a, b in itertools.pairwise(signs)),
        f"bias above {signs[-1]} dex",
    ]
    for k, (colour, name) in enumerate(zip(colours, names, strict=True)):
        i, j = found[step == k, 0].astype(int), found[step == k, 1].astype(int)
        cells_of(axes, t_eff[i], log_g[j], t_eff[1] - t_eff[0], log_g[1] - log_g[0], tuple(colour), name)
    axes.set(xlabel=AXES["T_eff"], ylabel=f"true {AXES['log_g']}")
    axes.set_xlim(t_eff[-1], t_eff[0])
    axes.set_ylim(log_g[-1], log_g[0])
    legend_below(axes, columns=3)


def draw_giants(axes: Axes, report: Report, palette: Palette) -> None:
    """Shares of giants and dwarfs on their side of log g 3.5."""
    if report.giants is None:
        return
    below = report.giants.below
    for part, role, marker, sign in zip(report.giants.parts, ("first", "own"), "sD", ("<", "≥"), strict=True):
        x, y = floats(group.centre for group in part.groups), floats(group.right for group in part.groups)
        label = f"{part.name}, log g {sign} {below:g}"
        axes.plot(x, 100 * y, f"{marker}-", color=palette[role], markersize=4, linewidth=1.8, label=label)
    axes.axhline(50, color=palette["ink"], linewidth=0.9, linestyle="--", label="even odds")
    snr_median_axis(axes)
    axes.set(ylabel="predicted on their side [%]", ylim=(0, 102))
    axes.grid(alpha=0.7, linewidth=0.6)
    legend_below(axes)


def draw_error_by_snr(axes: Axes, report: Report, palette: Palette) -> None:
    """Errors claimed and made, per octile of snr_median."""
    rows = report.errors_by_snr
    x = floats(row.centre for row in rows)
    rmse, rms = floats(row.rmse for row in rows), floats(row.rms for row in rows)
    p16, p84 = floats(row.p16 for row in rows), floats(row.p84 for row in rows)
    if np.isfinite(rms).any():
        axes.fill_between(
            x, p16, p84, color=palette["own"], alpha=0.2, linewidth=0, label="claimed, 16 to 84 % of stars"
        )
        axes.plot(x, rms, "o-", color=palette["own"], markersize=4, linewidth=1.8, label="claimed, RMS")
    axes.plot(x, rmse, "s--", color=palette["first"], markersize=4, linewidth=1.4, label="made, RMSE")
    snr_median_axis(axes)
    axes.set_ylabel("σ(log g) [dex]")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.7, linewidth=0.6)
    legend_below(axes)


def _own_line(axes: Axes, groups: Sequence[OctileScores], palette: Palette, level: float) -> list[float]:
    return draw_line(axes, groups, palette["own"], "o", f"this model ({level:g} %)", width=2.2)


def draw_line(
    axes: Axes, groups: Sequence[OctileScores] | Sequence[PartOctileScores], colour: str, marker: str, label: str,
    width: float = 1.8, band: bool = True,
) -> list[float]:  # fmt: skip
    """R² of groups as a line with its band; gives the values."""
    x = floats(group.centre for group in groups)
    y = floats(group.r2 for group in groups)
    low, high = (floats(group.r2_interval[i] for group in groups) for i in (0, 1))
    if band:
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(x, y, f"{marker}-", color=colour, markersize=4.5, linewidth=width, label=label, zorder=3)
    return [*y]


def snr_median_axis(axes: Axes) -> None:
    """The axis of snr_median."""
    snr_axis(axes, "snr_median (median of the octile)")


def r2_axis(axes: Axes, lowest: Iterable[float]) -> None:
    """The axis of R², down to the least value, but not to a hopeless one."""
    known = [value for value in lowest if np.isfinite(value)]
    bottom = np.floor(10 * min(known, default=0.0)) / 10
    # One hopeless octile (R² far below zero) must not flatten all the others.
    axes.set_ylim(max(-1.0, min(0.0, bottom)), 1.0)
    axes.set_ylabel("R² within the octile")
    axes.grid(alpha=0.7, linewidth=0.6)


def _grid_map(axes: Axes, report: Report, groups: Sequence[BinScores] | Sequence[NamedScores]) -> None:
    grid = report.protocol.grid
    t_eff, m_h = grid.t_eff_edges, grid.m_h_edges
    shape = (len(t_eff) - 1, len(m_h) - 1)
    values = floats(group.r2 for group in groups).reshape(shape)
    below = []
    for group in groups:
        limit = group.ceilings.get("bayes") if isinstance(group, BinScores) else None
        line = f"n = {group.n:,}"
        low, high = group.r2_interval
        if low is not None and high is not None:
            half = 0.5 * (high - low)
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


def floats(items: Iterable[float | None]) -> NDArray[np.float64]:
    """Numbers as an array; NaN where there is none."""
    return np.array([np.nan if item is None else item for item in items], dtype=np.float64)


def _level(report: Report) -> float:
    return 100 * report.protocol.level


def _ceiling(report: Report, name: str) -> float | None:
    """A ceiling of all stars."""
    return report.ceilings[name].r2 if name in report.ceilings else None
