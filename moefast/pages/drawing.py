"""Figures for files and for pages: one palette, one style, one way to write.

Design: colours are roles ("ink", "own"). For a page each role is drawn in a colour that nothing else has, and becomes a
CSS variable when the SVG is put into the page: its elements are walked through as a tree, and nothing is searched for
in its text. Drawn with canvases of matplotlib directly: no global backend or pyplot state of the caller is touched and
no display is needed.
"""

from __future__ import annotations

from moefast.core.pictures import literal

# isort: split
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray

from moefast.core.atomic import write_atomically
from moefast.core.errors import OutputError
from moefast.pages.palette import DARK, LIGHT, PAGE, Palette

__all__ = [
    "DARK",
    "LEFT",
    "LIGHT",
    "PAGE",
    "SUFFIXES",
    "Palette",
    "cells",
    "check_suffix",
    "embedded",
    "legend_below",
    "literal",
    "single",
    "snr_axis",
    "styled",
    "write",
]

SUFFIXES = (".png", ".svg", ".pdf")
"""Formats of pictures, by the end of the name."""

AXES = {
    "log_g": "log g [dex]",
    "T_eff": r"$T_\mathrm{eff}$ [K]",
    "M_H": "[M/H] [dex]",
    "snr_median": "snr_median, median of flux / error",
}
"""What stands at an axis of a label, or of another column."""

_STYLE = {
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "axes.linewidth": 0.8,
    "axes.unicode_minus": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "moefast",
}
# Inches: width of a figure; left, right and upper margin, height of the axes, room below them, a line of the legend.
_WIDTH, _RIGHT, _TOP, _HEIGHT, _BELOW, _LINE = 4.7, 0.2, 0.1, 2.75, 0.52, 0.19
LEFT = 0.64
"""Room for tick labels in inches."""
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_NUMBERS = {"d", "x", "y", "width", "height"}
"""Attributes of nothing but numbers, and of letters between them."""


def styled(palette: Palette) -> Any:
    """Context in which figures are made and written: the style of all figures in the colours of a palette."""
    ink, muted = palette["ink"], palette["muted"]
    colours = {
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": muted,
        "axes.facecolor": "none",
        "xtick.color": muted,
        "ytick.color": muted,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "grid.color": palette["grid"],
        "legend.labelcolor": ink,
    }
    return mpl.rc_context(_STYLE | colours)  # type: ignore[arg-type]


def single(draw: Callable[[Axes], None], palette: Palette, *, lines: int = 1, left: float = LEFT) -> Figure:
    """A figure of one pair of axes, in a fixed place; the legend stands below the data, never over it.

    Parameters
    ----------
    draw : callable
        Draws into axes.
    palette : mapping
    lines : int
        Lines of the legend.
    left : float
        Room for tick labels in inches.
    """
    below = _BELOW + _LINE * lines
    height = _TOP + _HEIGHT + below
    canvas = Figure(figsize=(_WIDTH, height), facecolor="none" if palette is PAGE else palette["surface"])
    width = _WIDTH - left - _RIGHT
    draw(canvas.add_axes((left / _WIDTH, below / height, width / _WIDTH, _HEIGHT / height)))
    return canvas


def legend_below(axes: Axes, columns: int = 2) -> None:
    """A legend in points below the axes, so that their height does not matter."""
    place = axes.transAxes + ScaledTranslation(-36 / 72, -33 / 72, axes.figure.dpi_scale_trans)
    axes.legend(
        loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=place, ncols=columns, frameon=False,
        borderaxespad=0.2, columnspacing=1.4, handlelength=1.9,
    )  # fmt: skip


def snr_axis(axes: Axes, label: str) -> None:
    """A logarithmic axis of signal-to-noise ratios with ticks that are read as they stand."""
    axes.set_xscale("log")
    ticks = [1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100, 200, 500]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(label)


def cells(
    axes: Axes, x: NDArray, y: NDArray, width: float, height: float, colour: Any, label: str | None = None
) -> PathPatch:
    """Rectangles of one colour, by their lower left corners (k,), as one outline: a few paths instead of a thousand."""
    corners = np.stack(
        [np.column_stack([x + a * width, y + b * height]) for a, b in ((0, 0), (1, 0), (1, 1), (0, 1))],
        axis=1,
    )
    closed = np.concatenate([corners, corners[:, :1]], axis=1).reshape(-1, 2)
    codes = np.tile(
        [Outline.MOVETO, Outline.LINETO, Outline.LINETO, Outline.LINETO, Outline.CLOSEPOLY], len(x)
    )
    patch = PathPatch(Outline(closed, codes), facecolor=colour, edgecolor="none", label=label)
    axes.add_patch(patch)
    return patch


def check_suffix(path: str | os.PathLike[str]) -> None:
    """Refuse a name that says no format of pictures.

    Raises
    ------
    OutputError
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise OutputError(f"{path}: the name of a picture ends with {', '.join(SUFFIXES)}")


def write(canvas: Figure, path: str | os.PathLike[str], dpi: int = 150, *, overwrite: bool = True) -> None:
    """Write a figure as PNG, SVG or PDF, by the end of the name: whole or not at all, and the same bytes every time.

    Call it within the style that the figure was made in.

    Raises
    ------
    OutputError
        The name has another end, or the file cannot be written.
    """
    check_suffix(path)
    kind = Path(path).suffix.lower()
    stream = io.BytesIO()
    if kind == ".png":
        FigureCanvasAgg(canvas)
        canvas.savefig(stream, format="png", dpi=dpi, metadata={"Software": None})
    elif kind == ".svg":
        FigureCanvasSVG(canvas)
        canvas.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    else:
        FigureCanvasPdf(canvas)
        canvas.savefig(
            stream, format="pdf", dpi=dpi, metadata={"CreationDate": None, "Producer": None, "Creator": None}
        )
    write_atomically(path, stream.getvalue(), overwrite=overwrite)


def embedded(canvas: Figure, name: str, title: str, words: str) -> str:
    """A figure in the colours of `PAGE` as an <svg> element whose colours are variables of the page.

    Parameters
    ----------
    canvas : Figure
        Made within `styled(PAGE)`, as this is called.
    name : str
        Names in the SVG begin with it, so that they clash with no other figure of the page.
    title, words : str
        What the figure is, and what it shows, for those who cannot see it.
    """
    stream = io.StringIO()
    FigureCanvasSVG(canvas)
    canvas.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(stream.getvalue())
    box = root.get("viewBox", "")
    for parent in list(root.iter()):
        for child in list(parent):
            # The style of all elements stands in the page, not once per figure.
            if child.tag in {f"{_SVG}metadata", f"{_SVG}style"}:
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        element.attrib = {
            key.removeprefix(_XLINK): _value(key.removeprefix(_XLINK), value, name)
            for key, value in element.attrib.items()
        }
        if element.text is not None and not element.text.strip():
            element.text = None
        element.tail = None
    root.attrib = {"viewBox": box, "role": "img", "aria-labelledby": f"{name}-title {name}-words"}
    for place, (tag, text) in enumerate((("title", title), ("desc", words))):
        element = ElementTree.Element(tag, {"id": f"{name}-{'title' if tag == 'title' else 'words'}"})
        element.text = text
        root.insert(place, element)
    return ElementTree.tostring(root, encoding="unicode")


def _value(key: str, value: str, name: str) -> str:
    """An attribute in its page."""
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return f"#{name}-{value.removeprefix('#')}"
    if key in _NUMBERS:
        return " ".join(_short(part) for part in value.split())
    if key == "style":
        return "; ".join(_declaration(part) for part in value.split(";") if part.strip())
    return _coloured(value).replace("url(#", f"url(#{name}-")


def _declaration(text: str) -> str:
    prop, _, value = (part.strip() for part in text.partition(":"))
    if prop == "font":
        # The page chooses the typeface; size and weight stay.
        words = value.partition("'")[0].split()
        size = next(word for word in words if word.endswith("px"))
        weight = next((word for word in words if word.isdigit() or word == "bold"), None)
        return f"font-size: {size}" + (f"; font-weight: {weight}" if weight else "")
    return "font-family: inherit" if prop == "font-family" else f"{prop}: {_coloured(value)}"


def _coloured(value: str) -> str:
    for role, colour in PAGE.items():
        value = value.replace(colour, f"var(--{role})")
    return value


def _short(number: str) -> str:
    """Two decimals of a point are finer than any screen."""
    try:
        return f"{float(number):.2f}".rstrip("0").rstrip(".")
    except ValueError:
        return number
