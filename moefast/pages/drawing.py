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
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from moefast.core.atomic import write_atomically
from moefast.core.errors import OutputError

__all__ = [
    "DARK",
    "LIGHT",
    "PAGE",
    "SUFFIXES",
    "Palette",
    "check_suffix",
    "embedded",
    "literal",
    "styled",
    "write",
]

Palette = Mapping[str, str]

# After Okabe & Ito: told apart by every kind of colour vision. Never the only difference: markers differ, too.
LIGHT: Palette = {
    "ink": "#1c2127",
    "muted": "#5b6570",
    "grid": "#d5dae0",
    "surface": "#ffffff",
    "own": "#0b5ea8",
    "first": "#b35309",
    "second": "#0a7d5a",
    "third": "#a3397a",
    "ceiling": "#1c2127",
}
DARK: Palette = {
    "ink": "#e7eaee",
    "muted": "#a3adb8",
    "grid": "#3a434d",
    "surface": "#171b20",
    "own": "#6ab4f5",
    "first": "#f0a35c",
    "second": "#4fc79f",
    "third": "#e58abf",
    "ceiling": "#e7eaee",
}
PAGE: Palette = {role: f"#0102{number:02x}" for number, role in enumerate(LIGHT, 0xA0)}
"""Colours that stand for the roles until `embedded` turns them into variables of the page."""

SUFFIXES = (".png", ".svg", ".pdf")
"""Formats of pictures, by the end of the name."""

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


def check_suffix(path: str | os.PathLike[str]) -> None:
    """Refuse a name that says no format of pictures.

    Raises
    ------
    OutputError
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise OutputError(f"{path}: the name of a picture ends with {', '.join(SUFFIXES)}")


def write(canvas: Figure, path: str | os.PathLike[str], dpi: int = 150) -> None:
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
    write_atomically(path, stream.getvalue())


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
