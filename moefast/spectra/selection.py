"""Which rows: a small expression of columns, `targetType == 1 and FIBERSTATUS == 0`.

Comparisons of a column with a number or a text, joined by `and`; nothing is evaluated as code.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import InputError

__all__ = ["Comparison", "parse_selection", "select"]

OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq, "!=": operator.ne, "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt,
}  # fmt: skip
_COMPARISON = re.compile(r"\s*(\w+)\s*(==|!=|<=|>=|<|>)\s*('[^']*'|\"[^\"]*\"|[^\s'\"=<>!]+)\s*")
_AND = re.compile(r"\s+and\s+(?=\w+\s*(?:==|!=|<=|>=|<|>))")


@dataclass(frozen=True)
class Comparison:
    """column operator value; the value is a number, or text."""

    column: str
    sign: str
    value: float | int | str

    def __call__(self, values: NDArray) -> NDArray[np.bool_]:
        """Rows for which it holds.

        Raises
        ------
        InputError
            A number is compared with text.
        """
        if (values.dtype.kind in "US") != isinstance(self.value, str):
            kind = "text" if values.dtype.kind in "US" else f"numbers ({values.dtype})"
            raise InputError(
                f"--select: {self.column} holds {kind}, and is compared with {self.value!r}; "
                + ("put the value in quotes" if kind == "text" else "give a number")
            )
        return np.asarray(OPERATORS[self.sign](values, self.value), bool)


def parse_selection(text: str) -> list[Comparison]:
    """Comparisons that must all hold.

    Raises
    ------
    InputError
        The text is not of the form `column operator value [and …]`.
    """
    out = []
    for part in _AND.split(text):
        match = _COMPARISON.fullmatch(part)
        if match is None:
            raise InputError(
                f"--select {text!r}: {part.strip()!r} is not a comparison such as targetType == 1 or OBJTYPE == 'TGT'; "
                f"join several with and. Known are {' '.join(OPERATORS)}"
            )
        name, sign, value = match.groups()
        out.append(Comparison(name, sign, _value(value)))
    return out


def _value(text: str) -> float | int | str:
    if text[0] in "'\"":
        return text[1:-1]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def select(text: str, columns: Callable[[list[str]], dict[str, NDArray]]) -> NDArray[np.bool_]:
    """Rows for which a selection holds; `columns` gives columns by their names."""
    comparisons = parse_selection(text)
    values = columns(list(dict.fromkeys(comparison.column for comparison in comparisons)))
    return np.logical_and.reduce([comparison(values[comparison.column]) for comparison in comparisons])
