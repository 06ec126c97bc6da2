"""Where spectra come from, and what they come as: sources, blocks of rows, rows that could not be read.

Design: files (`moefast.spectra.spectrum_set.SpectrumSet`) and simulated surveys (`moefast.simulate.SimulatedSpectra`)
are read alike, so that a fit does not know which one it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from moefast.core.errors import InputError

__all__ = ["Block", "Failure", "OnError", "SourcePart", "SpectrumSource", "block_edges", "rows_of_request"]

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
    measured : list of moefast.spectra.resample.Pixels, or None
        The pixels as they were measured, if flux, error and mask hold nothing yet and are to be made of them.
    unread : str
        Array that becomes `flux`, if flux, error and mask hold nothing yet and are still to be read; empty otherwise.
    problem : InputError or None
        Why the rows, or their params, could not be read.

    Only blocks of `moefast.spectra.spectrum_set.SpectrumSet.unfilled` have the last three, until they are filled.
    """

    first_row: int
    shard: int
    flux: np.ndarray
    error: np.ndarray
    mask: np.ndarray | None = None
    params: dict[str, np.ndarray] = field(default_factory=dict)
    measured: list[Any] | None = None
    unread: str = ""
    problem: InputError | None = None

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


class SourcePart(Protocol):
    """A part of a source that has a name, such as a file, and which of flux, error, mask and noisy it has."""

    @property
    def path(self) -> Path:
        """Where it lies, or what it is."""
        ...

    @property
    def arrays(self) -> tuple[str, ...]:
        """Which of flux, error, mask and noisy it has."""
        ...


@runtime_checkable
class SpectrumSource(Protocol):
    """Spectra on one wave grid that are numbered through, and read block by block.

    Attributes
    ----------
    n_rows, n_pixels : int
    wave : array of shape (p,), float64
        Wavelength of the pixels in Å.
    failures : list of Failure
        What could not be read and was left out.
    """

    n_rows: int
    n_pixels: int
    wave: np.ndarray
    failures: list[Failure]

    @property
    def shards(self) -> Sequence[SourcePart]:
        """Its parts, in the order of their rows."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the params table."""
        ...

    def fingerprint(self) -> str:
        """SHA-256, as hex digits, that identifies the content."""
        ...

    def params(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Columns of the params table, each an array of shape (n_rows,)."""
        ...

    def labels(self, names: Sequence[str] = ..., *, partial: bool = False) -> dict[str, np.ndarray]:
        """Labels of every spectrum, float64; with `partial`, NaN where there is none."""
        ...

    def has_labels(self, names: Sequence[str] = ...) -> bool:
        """Whether there are columns with these labels."""
        ...

    def label_notes(self, names: Sequence[str] = ...) -> list[str]:
        """What to know about the labels, in words."""
        ...

    def blocks(
        self,
        block_rows: int,
        *,
        array: Literal["auto", "flux", "noisy"] = "auto",
        rows: tuple[int, int] | None = None,
        params: Sequence[str] = (),
        prefetch: bool = True,
        on_error: OnError = "raise",
    ) -> Iterator[Block]:
        """The spectra, block by block, in order."""
        ...

    def close(self) -> None:
        """Release what is held; the source stays usable."""
        ...


def rows_of_request(
    n_rows: int, block_rows: int, array: str, rows: tuple[int, int] | None, on_error: str
) -> tuple[int, int]:
    """First row and the one after the last that `SpectrumSource.blocks` is asked for.

    Raises
    ------
    ValueError
        No source can give that.
    """
    start, stop = (0, n_rows) if rows is None else rows
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1, found {block_rows}")
    if not 0 <= start <= stop <= n_rows:
        raise ValueError(f"rows {start} to {stop} asked for, the set has {n_rows}")
    if array not in {"auto", "flux", "noisy"}:
        raise InputError(f"array must be 'auto', 'flux' or 'noisy', found {array!r}")
    if on_error not in {"raise", "skip"}:
        raise ValueError(f"on_error must be 'raise' or 'skip', found {on_error!r}")
    return start, stop


def block_edges(start: int, stop: int, block_rows: int) -> Iterator[tuple[int, int]]:
    """First row and the one after the last of each block of start … stop; blocks end at multiples of `block_rows`."""
    while start < stop:
        end = min(stop, start - start % block_rows + block_rows)
        yield start, end
        start = end
