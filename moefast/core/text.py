"""Numbers, intervals and tables as plain text, for terminals and reports."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["bracket", "counted", "number", "percent", "table"]

_SEVERAL = {"spectrum": "spectra"}
"""Words whose plural is not made with an s."""


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """A number for people; a dash for None."""
    if value is None:
        return "–"
    return f"{value:{'+' if sign else ''}.{digits}f}"


def bracket(interval: Sequence[float | None] | None, digits: int = 3, sign: bool = False) -> str:
    """An interval in square brackets; nothing if there is none."""
    if interval is None or None in interval:
        return ""
    return f"[{number(interval[0], digits, sign)}, {number(interval[1], digits, sign)}]"


def counted(n: int, one: str, several: str | None = None) -> str:
    """A number of things in words: "1 star", "2,000 stars", "1 spectrum".

    Parameters
    ----------
    n : int
    one : str
        What a single one is called.
    several : str, optional
        What two are called, where that is not `one` with an s.
    """
    return f"{n:,} {one if n == 1 else several or _SEVERAL.get(one, one + 's')}"


def percent(value: float | None) -> str:
    """A share in percent; a dash for None."""
    return "–" if value is None else f"{100 * value:.1f} %"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Columns padded to their widest cell; the first `left` flush left, the others flush right."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
