"""A column of a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from moefast.core.outputs import Output

__all__ = ["GROUP", "Column", "decode"]

GROUP = "predictions"
"""HDF5 group, and FITS extension, that holds the columns."""


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes
    ----------
    name : str
        Its name.
    dtype : dtype
        Numbers, bool, or text of a fixed length ("U8", "S8").
    unit : str
        Unit in FITS notation, "" if there is none.
    description : str
        What it is, in one line.
    """

    name: str
    dtype: np.dtype
    unit: str = ""
    description: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", np.dtype(self.dtype))
        if self.dtype.kind not in "biufSU" or not self.dtype.itemsize:
            raise ValueError(f"column {self.name!r}: no table holds type {self.dtype}")
        if not self.name:
            raise ValueError("a column needs a name")

    @classmethod
    def of(cls, output: Output, name: str = "", description: str = "") -> Self:
        """The column of an output, under its own name and with its own meaning unless others are given."""
        return cls(name or output.name, np.dtype(output.dtype), output.unit, description or output.meaning)

    @property
    def text_bytes(self) -> int:
        """Bytes kept for text; 0 for numbers."""
        return self.dtype.itemsize if self.dtype.kind in "SU" else 0


def decode(values: np.ndarray) -> np.ndarray:
    """Bytes in UTF-8 as text."""
    return np.char.decode(values.astype("S"), "utf-8") if values.size else values.astype("U1")
