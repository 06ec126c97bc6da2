"""HTML by templates: one file that asks nobody, in which what others wrote is text.

Design: Jinja2 escapes every value that a template shows; what is marked as safe are the figures and the style, which we
make. No script, and nothing from anywhere else (a content policy says so). Light or dark as the reader's system asks,
from the width of a phone to that of a screen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moefast.core import text
from moefast.core.text import percent
from moefast.pages.drawing import DARK, LIGHT

__all__ = ["Cell", "Figure", "Table", "Words", "bracket", "number", "percent", "render", "signs", "tile"]


class Words(str):
    """A cell of words: flush left, and broken where it must be."""

    __slots__ = ()


Cell = str


@dataclass(frozen=True)
class Figure:
    """A figure in a page: `svg` is an <svg> element."""

    name: str
    title: str
    caption: str
    svg: Markup


@dataclass(frozen=True)
class Table:
    """A table in a page.

    Attributes
    ----------
    caption : str
    header : sequence of str
        The first one is that of the names of the rows.
    rows : sequence of (str, sequence of Cell)
    own : str or None
        Name of the row that stands out.
    """

    caption: str
    header: Sequence[Cell]
    rows: Sequence[tuple[str, Sequence[Any]]]
    own: str | None = None


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """`moefast.core.text.number` with a true minus."""
    return text.number(value, digits, sign).replace("-", "−")


def bracket(interval: Sequence[float | None] | None, digits: int = 3, sign: bool = False) -> str:
    """`moefast.core.text.bracket` with a true minus."""
    return text.bracket(interval, digits, sign).replace("-", "−")


def signs(name: str) -> str:
    """Names with the signs of mathematics."""
    return name.replace(">=", "≥").replace("-", "−")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("moefast.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": number, "bracket": bracket, "percent": percent, "signs": signs}
    environment.tests["words"] = lambda value: isinstance(value, Words)
    environment.globals |= {"light": _variables(LIGHT), "dark": _variables(DARK)}
    return environment


def _variables(palette: Mapping[str, str]) -> Markup:
    return Markup(" ".join(f"--{role}: {colour};" for role, colour in palette.items()))


def render(template: str, **values: Any) -> str:
    """A page: the same text for the same values.

    Parameters
    ----------
    template : str
        Name of a file in `moefast/pages/templates`.
    """
    return _environment().get_template(template).render(**values)


def tile(label: str, value: str, detail: str = "", main: bool = False) -> dict[str, Any]:
    """A number of the head of a page."""
    return {"label": label, "value": value, "detail": detail, "main": main}
