"""The page of a run without labels: figures and tables of `moefast.inspection.run`, and pictures of the worst stars.

Design: a function of the run and of the stars that could be read; the words stand in templates
(`moefast/pages/templates/run`).
"""

from __future__ import annotations

from moefast.pages.drawing import (
    AXES,
    PAGE,
    Palette,
    cells,
    embedded,
    legend_below,
    single,
    snr_axis,
    styled,
)

# isort: split
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from moefast.core.atomic import write_atomically
from moefast.core.text import counted, percent
from moefast.inspection.run import ERROR_STEPS, RunSummary, WorstStar
from moefast.inspection.star import Star
from moefast.inspection.star_picture import small_picture
from moefast.pages.page import Figure, Table, Words, number, render, tile

__all__ = ["FIGURES", "page", "write_page"]

_MARKERS = "sDv^Xo"
_ROLES = ("own", "first", "second", "third", "muted", "ink")


@dataclass(frozen=True)
class RunFigure:
    """One figure of a run: title, caption, how it is drawn and said, whether the run has it, lines of its legend."""

    title: str
    caption: str
    draw: Callable[[Axes, RunSummary, Palette], None]
    describe: Callable[[RunSummary], str]
    exists: Callable[[RunSummary], bool] = lambda run: bool(run.by_snr)
    lines: int = 1


def page(
    run: RunSummary, stars: Mapping[tuple[int, int], Star] | None = None, why_no_pictures: str = ""
) -> str:
    """A run as an HTML document: one file, nothing from anywhere else.

    Parameters
    ----------
    run : RunSummary
    stars : mapping of (file, row) to Star, optional
        Stars among `run.worst` whose spectra could be read.
    why_no_pictures : str
        Said where there are none.

    Returns
    -------
    str
        The same for the same arguments.
    """
    stars = stars or {}
    sections = [
        ("flags", "Flags"),
        ("spectra", "Are the spectra fitted?"),
        ("results", "Results"),
        ("worst", "Stars to look at"),
        ("about", "About this run"),
    ]
    shown = {name: _drawn(run, figures) for name, figures in _SECTIONS.items()}
    return render(
        "run.html.j2",
        parts="run",
        sections=sections,
        title=os.path.basename(run.path) or "predictions",
        run=run,
        attributes=_attributes(run),
        tiles=_tiles(run),
        notes=[*(run.attributes.get("oddities") or []), *(run.attributes.get("notes") or [])],
        figures=shown,
        tables={"flags": _flags(run), "steps": _steps(run), "worst": _worst(run)},
        pictures=[
            _picture(star, stars[star.file, star.row]) for star in run.worst if (star.file, star.row) in stars
        ],
        why_no_pictures=why_no_pictures,
        terms=_terms(run),
    )


def write_page(
    run: RunSummary,
    path: str | os.PathLike[str],
    stars: Mapping[tuple[int, int], Star] | None = None,
    why_no_pictures: str = "",
    *,
    overwrite: bool = True,
) -> None:
    """Write `page` to a file, which is replaced if it may be.

    Raises
    ------
    OutputError
    """
    write_atomically(path, page(run, stars, why_no_pictures).encode(), overwrite=overwrite)


def _drawn(run: RunSummary, names: Sequence[str]) -> list[Figure]:
    out = []
    for name in names:
        drawing = FIGURES[name]
        if drawing.exists(run):
            with styled(PAGE):
                canvas = single(lambda axes, d=drawing: d.draw(axes, run, PAGE), PAGE, lines=drawing.lines)  # type: ignore[misc]
                svg = embedded(canvas, name, drawing.title, drawing.describe(run))
            out.append(Figure(name, drawing.title, drawing.caption, Markup(svg)))
    return out


def _picture(worst: WorstStar, star: Star) -> Figure:
    """A small picture of the spectrum of one of the worst stars."""
    name = f"star-{worst.file}-{worst.row}"
    title = f"row {worst.row}" + "".join(f", {key} {value}" for key, value in worst.ids.items())
    with styled(PAGE):
        svg = embedded(small_picture(star, PAGE), name, title, f"Spectrum of {title}: {worst.reason}")
    # The star itself tells more than its row of the table does.
    reasons = "; ".join(f"{flag}: {reason}" for flag, reason in star.flags) or worst.reason
    return Figure(name, title, reasons, Markup(svg))


# --- tiles and tables ----------------------------------------------------------------------------------


def _attributes(run: RunSummary) -> dict[str, Any]:
    known = dict.fromkeys(("model", "model_sha256", "moefast_version", "backend", "device", "array", "r2"))
    return known | {"inputs": []} | run.attributes


def _tiles(run: RunSummary) -> list[dict[str, Any]]:
    tiles = [
        tile("Stars", f"{run.n:,}", "one row each", main=True),
        tile(
            "Without a flag",
            percent(1 - run.n_flagged / max(run.n, 1)),
            counted(run.n - run.n_flagged, "star"),
        ),
    ]
    for name, label, digits, unit in (
        ("snr_median", "Signal to noise, median", 1, "snr_median"),
        ("log_g_err", "σ(log g), median [dex]", 2, "calibrated"),
        ("chi2", "χ², median", 3, "about 1 for spectra like the training set"),
    ):
        values = run.percentiles[name]
        if values is not None:
            spread = f"{number(values[0], digits)} to {number(values[4], digits)} in 90 %; {unit}"
            tiles.append(tile(label, number(values[2], digits), spread))
    if run.attributes.get("r2") is not None:
        tiles.append(tile("R² of log g", number(run.attributes["r2"]), "against the labels of the files"))
    rate = run.attributes.get("spectra_per_second")
    if rate:
        tiles.append(tile("Spectra per second", f"{rate:,.0f}", str(run.attributes.get("device") or "")))
    return tiles


def _flags(run: RunSummary) -> Table | None:
    if not run.flags:
        return None
    rows = [(name, [f"{count:,}", percent(count / max(run.n, 1))]) for name, count in run.flags.items()]
    rows.append(("any", [f"{run.n_flagged:,}", percent(run.n_flagged / max(run.n, 1))]))
    return Table("Stars with each flag; a star may have several", ("flag", "stars", "share"), rows, own="any")


def _steps(run: RunSummary) -> Table | None:
    if not run.by_snr:
        return None
    rows = [
        (
            f"{step.range[0]:.3g} – {step.range[1]:.3g}",
            [
                f"{step.n:,}",
                percent(step.flagged["any"]),
                *(number(value) for value in step.chi2),
                *(number(value) for value in step.log_g_err),
            ],
        )
        for step in run.by_snr
    ]
    header = (
        "snr_median", "n", "flagged", "χ² 16 %", "χ² 50 %", "χ² 84 %", "σ 16 %", "σ 50 %", "σ 84 %",
    )  # fmt: skip
    return Table(
        "Steps of equal numbers of stars along the signal-to-noise ratio; σ is log_g_err in dex", header, rows
    )


def _worst(run: RunSummary) -> Table | None:
    if not run.worst:
        return None
    several = len(run.attributes.get("inputs") or []) > 1
    rows = []
    for star in run.worst:
        values = star.values
        ids = ", ".join(f"{name} {value}" for name, value in star.ids.items())
        cells_ = [
            Words(ids or "–"),
            number(values["log_g"], 2),
            number(values["log_g_err"], 2),
            number(values["snr_median"], 1),
            number(values["chi2"], 3),
            Words(star.reason),
            Words(", ".join(star.flags)),
        ]
        rows.append((f"{star.file}: {star.row}" if several else f"{star.row}", cells_))
    first = "file: row" if several else "row"
    header = (first, Words("identifiers"), "log g", "σ", "snr_median", "χ²", Words("reason"), Words("flags"))
    return Table("Up to four stars for each flag, the surest evidence first", header, rows)


def _terms(run: RunSummary) -> list[tuple[str, str]]:
    attributes = _attributes(run)
    inputs = attributes["inputs"]
    files = ", ".join(str(each) for each in inputs[:5]) + (
        f" and {len(inputs) - 5} more" if len(inputs) > 5 else ""
    )
    terms = [
        ("Table", run.path),
        (
            "Model",
            f"{attributes['model'] or 'not named'}, SHA-256 {attributes['model_sha256'] or 'not told'}",
        ),
        ("Spectra", f"{files or 'not named'}; array {attributes['array'] or 'not told'}"),
        ("Computed", f"on {attributes['device'] or attributes['backend'] or 'a machine that is not named'}"),
    ]
    for name, words in (("velocity", "Velocities"), ("select", "Selection"), ("telluric", "Telluric pixels")):
        if attributes.get(name):
            terms.append((words, str(attributes[name])))
    return terms


# --- figures -------------------------------------------------------------------------------------------


def _centres(run: RunSummary) -> list[float]:
    return [step.centre for step in run.by_snr]


def _draw_flags(axes: Axes, run: RunSummary, palette: Palette) -> None:
    names = ["any", *(name for name in run.by_snr[0].flagged if name != "any")]
    for k, name in enumerate(names):
        role = _ROLES[k % len(_ROLES)]
        axes.plot(
            _centres(run), [100 * step.flagged[name] for step in run.by_snr], f"{_MARKERS[k % len(_MARKERS)]}-",
            color=palette[role], markersize=4, linewidth=2.0 if name == "any" else 1.2, label=name,
        )  # fmt: skip
    axes.set_ylabel("stars with the flag [%]")
    axes.set_ylim(bottom=0)
    _finish(axes)


def _finish(axes: Axes) -> None:
    snr_axis(axes, AXES["snr_median"])
    axes.grid(alpha=0.7, linewidth=0.6)
    legend_below(axes)


def _scattered(name: str, label: str, logarithmic: bool) -> Callable[[Axes, RunSummary, Palette], None]:
    """Stars as points, those with a flag apart, with their median and its spread."""

    def draw(axes: Axes, run: RunSummary, palette: Palette) -> None:
        x, y = np.array(run.points["snr_median"]), np.array(run.points[name])
        flagged = np.array(run.points["flagged"], bool)
        for chosen, role, marker, words in (
            (~flagged, "muted", ".", "star without a flag"), (flagged, "first", "x", "star with a flag"),
        ):  # fmt: skip
            axes.plot(
                x[chosen], y[chosen], marker, color=palette[role], markersize=2.4, alpha=0.45, label=words
            )
        low, middle, high = np.array([getattr(step, name) for step in run.by_snr]).T
        axes.fill_between(
            _centres(run), low, high, color=palette["own"], alpha=0.2, linewidth=0, label="16 to 84 %"
        )
        axes.plot(
            _centres(run), middle, "o-", color=palette["own"], markersize=4, linewidth=1.8, label="median"
        )
        if logarithmic:
            axes.set_yscale("log")
        shown = y[np.isfinite(y)]
        if name == "chi2" and shown.size:
            bottom, top = np.percentile(shown, (0.2, 99.8))
            axes.set_ylim(min(0.8, bottom), max(1.25, 1.03 * top))
            axes.axhline(1, color=palette["ink"], linewidth=0.9, linestyle="--")
        elif shown.size:
            axes.set_ylim(0, 1.08 * shown.max())
        axes.set_ylabel(label)
        _finish(axes)

    return draw


def _draw_foreign(axes: Axes, run: RunSummary, palette: Palette) -> None:
    values = np.array([step.foreign for step in run.by_snr], np.float64)
    for k, (words, role) in enumerate((("median", "own"), ("95 %", "second"), ("99 %", "first"))):
        axes.plot(
            _centres(run), np.maximum(values[:, k], 1e-12), f"{_MARKERS[k]}-", color=palette[role], markersize=4,
            linewidth=1.5, label=words,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylim(1e-12, 2)
    axes.set_ylabel("probability of no star")
    _finish(axes)


def _draw_kiel(axes: Axes, run: RunSummary, palette: Palette) -> None:
    kiel = run.kiel
    assert kiel is not None
    t_eff, log_g = np.array(kiel["t_eff"]), np.array(kiel["log_g"])
    found = np.array(kiel["cells"], np.float64)
    step = np.searchsorted(ERROR_STEPS, found[:, 3])
    colours = mpl.colormaps["cividis"](np.linspace(0, 1, len(ERROR_STEPS) + 1))
    names = [
        f"σ < {ERROR_STEPS[0]:g}",
        *(f"{a:g} – {b:g}" for a, b in itertools.pairwise(ERROR_STEPS)),
    ]
    names.append(f"σ > {ERROR_STEPS[-1]:g}")
    for k, (colour, name) in enumerate(zip(colours, names, strict=True)):
        i, j = found[step == k, 0].astype(int), found[step == k, 1].astype(int)
        size = t_eff[1] - t_eff[0], log_g[1] - log_g[0]
        cells(axes, t_eff[i], log_g[j], *size, tuple(colour), label=name)
    axes.set(
        xlim=(t_eff[-1], t_eff[0]), ylim=(log_g[-1], log_g[0]), xlabel=AXES["T_eff"], ylabel=AXES["log_g"]
    )
    legend_below(axes, columns=3)


def _draw_log_g(axes: Axes, run: RunSummary, palette: Palette) -> None:
    edges = run.log_g["edges"]
    axes.stairs(run.log_g["all"], edges, fill=True, color=palette["grid"], label="all stars")
    axes.stairs(run.log_g["without_flag"], edges, color=palette["own"], linewidth=1.8, label="without a flag")
    axes.set(xlabel=AXES["log_g"], ylabel="stars", xlim=(edges[0], edges[-1]))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.7, linewidth=0.6)
    legend_below(axes)


def _says(name: str, what: str) -> Callable[[RunSummary], str]:
    return lambda run: (
        f"Median {what} by snr_median: "
        + ", ".join(f"{step.centre:.3g}: {getattr(step, name)[1]:.3g}" for step in run.by_snr)
    )


FIGURES: Mapping[str, RunFigure] = {
    "flags": RunFigure(
        "Flags against signal-to-noise",
        "Share of the stars of each step that carry a flag. A flag that grows towards bright stars is about the "
        "spectra, one that grows towards faint ones about the noise.",
        _draw_flags,
        lambda run: "Share with any flag: "
        + ", ".join(f"{step.centre:.3g}: {percent(step.flagged['any'])}" for step in run.by_snr),
        lines=3,
    ),
    "chi2": RunFigure(
        "χ² against signal-to-noise",
        "It should lie at 1 for all. Where it rises with brightness the model does not know these spectra; "
        "where it is off for all stars the errors are.",
        _scattered("chi2", "χ² per degree of freedom", False),
        _says("chi2", "χ²"),
        lines=2,
    ),
    "foreign": RunFigure(
        "Evidence that a spectrum is that of no star",
        "Probability of a continuum without lines, under the model's library: percentiles of each step.",
        _draw_foreign,
        lambda run: "99th percentile: "
        + ", ".join(f"{step.centre:.3g}: {step.foreign[2]:.2g}" for step in run.by_snr if step.foreign),
        lambda run: bool(run.by_snr) and run.by_snr[0].foreign is not None,
        lines=2,
    ),
    "error": RunFigure(
        "Error of log g against signal-to-noise",
        "The calibrated 1σ of each star.",
        _scattered("log_g_err", "σ(log g) [dex]", False),
        _says("log_g_err", "error of log g in dex"),
        lines=2,
    ),
    "kiel": RunFigure(
        "Kiel diagram, coloured by error",
        "Median error of log g of the stars of each cell, in dex.",
        _draw_kiel,
        lambda run: f"{len(run.kiel['cells']) if run.kiel else 0} cells of T_eff and log g hold stars.",
        lambda run: run.kiel is not None,
        lines=2,
    ),
    "log_g": RunFigure(
        "Distribution of log g",
        "A pile at an end are stars that the model cannot place.",
        _draw_log_g,
        lambda run: f"log g from {run.log_g['edges'][0]:.2g} to {run.log_g['edges'][-1]:.2g} dex.",
    ),
}  # fmt: skip
"""All figures by name."""

_SECTIONS = {"flags": ("flags",), "spectra": ("chi2", "foreign"), "results": ("kiel", "error", "log_g")}
