"""What readers of spectra hand out, whatever they read: blocks of rows, and rows that could not be read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from moefast.core.errors import InputError

__all__ = ["Block", "Failure", "OnError", "block_edges"]

OnError = Literal["raise", "skip"]


@dataclass
class Block:
    """Consecutive rows of one shard.

    Attributes
    ----------
    first_row : int
        Row of the set (not of the shard) that the block starts with.
    shard : int
        Index of the shard.
    flux, error : array of shape (n, p), float32, C-contiguous
        Flux and its 1σ. Freely writable by the consumer.
    mask : array of shape (n, p), bool, or None
        True where a pixel is bad. None if no pixel of the block is masked.
    params : dict of str to array of shape (n,)
        The columns asked for.
    """

    first_row: int
    shard: int
    flux: np.ndarray
    error: np.ndarray
    mask: np.ndarray | None = None
    params: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.flux)

    @property
    def rows(self) -> slice:
        """The rows of the set that the block holds."""
        return slice(self.first_row, self.first_row + len(self.flux))


@dataclass(frozen=True)
class Failure:
    """Rows that could not be read.

    Attributes
    ----------
    path : Path
        The file.
    rows : tuple of int, or None
        First row and the one after the last, rows of the set; None if the file was left out as a whole and
        its rows are not counted.
    error : InputError
        Why.
    """

    path: Path
    rows: tuple[int, int] | None
    error: InputError


def block_edges(start: int, stop: int, block_rows: int) -> Iterator[tuple[int, int]]:
    """First row and the one after the last of each block of start … stop; blocks end at multiples of `block_rows`."""
    while start < stop:
        end = min(stop, start - start % block_rows + block_rows)
        yield start, end
        start = end
