"""Which numbers can be labels of a star at all.

Design: catalogues mark "unknown" by NaN, −9999, 0, 99.99 or 1e20, and one such number among a thousand spoils a fit.
The ranges are wider than those of any star, so that they refuse marks and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moefast.core.text import counted

__all__ = ["RANGES", "describe_implausible", "plausible"]

RANGES = {
    "T_eff": (1000.0, 100000.0),
    "log_g": (-2.0, 8.0),
    "M_H": (-6.0, 2.0),
    "a_M": (-3.0, 3.0),
    "C_M": (-5.0, 6.0),
}
"""Least and largest T_eff [K], log g, [M/H], [a/M] and [C/M] [dex] that count as labels."""
_UNITS = {"T_eff": " K"}
_LARGEST = 1e30
"""Of columns without a range of their own."""
_SHOWN = 5


def plausible(name: str, values: ArrayLike) -> NDArray[np.bool_]:
    """Which values of a column can be labels.

    Parameters
    ----------
    name : str
        T_eff [K], log_g, M_H [dex]; any other column only needs finite numbers.
    values : array of shape (n,)
    """
    low, high = RANGES.get(name, (-_LARGEST, _LARGEST))
    with np.errstate(invalid="ignore"):
        numbers = np.asarray(values, np.float64)
        return (numbers >= low) & (numbers <= high)


def describe_implausible(name: str, pieces: Iterable[ArrayLike]) -> str:
    """How many values of a column are no labels, the first of them, and what was expected; "" if all are labels.

    Parameters
    ----------
    name : str
    pieces : iterable of arrays
        The column, piece by piece.
    """
    n, n_bad, any_number = 0, 0, False
    first: list[tuple[int, float]] = []
    for piece in pieces:
        numbers = np.asarray(piece, np.float64)
        bad = np.flatnonzero(~plausible(name, numbers))
        first += [(n + int(i), float(numbers[i])) for i in bad[: _SHOWN - len(first)]]
        n, n_bad = n + len(numbers), n_bad + len(bad)
        any_number |= bool(np.isfinite(numbers[bad]).any())
    if not n_bad:
        return ""
    if any_number:
        low, high = RANGES.get(name, (-_LARGEST, _LARGEST))
        what = f"is outside {low:g} to {high:g}{_UNITS.get(name, '')} or not finite"
    else:
        what = "is not finite"
    rows = ", ".join(f"{i}" for i, _ in first)
    found = ", ".join(f"{value:g}" for _, value in first)
    return f"{name} {what} in {n_bad} of {counted(n, 'row')}, the first of them {rows} ({found})"
