"""What the first pass gathers from a range of rows: the partial statistics of a fit, which add.

Design: an input is divided into as few units of at most `UNIT_ROWS` rows as can be, of equal length, so that processes
have equal shares. Totals of units are exact sums (`moefast.experts.exact_sums`), so that a fit has the same bits
however its units are divided among processes, and in whatever order these are done. A part is a run of whole units.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import InputError
from moefast.core.text import counted
from moefast.experts.device import DeviceEquations
from moefast.experts.normal_equations import NormalEquations

__all__ = ["UNIT_ROWS", "Statistics", "cut_at_multiples", "n_units", "rows_of_part", "units_of"]

F64 = NDArray[np.float64]

UNIT_ROWS = 65_536
"""Rows of a unit at most: in nine bins and three folds, as many as are multiplied at once in each."""
_GRAM = "equations/gram"


def n_units(n_rows: int) -> int:
    """Units of an input."""
    return -(-n_rows // UNIT_ROWS)


def _edges(n_rows: int) -> list[int]:
    """First row of each unit, and the number of rows."""
    count = max(1, n_units(n_rows))
    return [n_rows * index // count for index in range(count + 1)]


def rows_of_part(n_rows: int, index: int, count: int) -> tuple[int, int]:
    """First row of a part of an input, and the one after the last: whole units, as equal in number as can be.

    Raises
    ------
    InputError
        There are more parts than units.
    """
    units = n_units(n_rows)
    if count > units:
        raise InputError(
            f"{counted(n_rows, 'spectrum')} in {counted(count, 'part')}: statistics are as large as {UNIT_ROWS:,} "
            "spectra; divide them "
            f"into {counted(units, 'part')} at most"
        )
    edges = _edges(n_rows)
    return edges[index * units // count], edges[(index + 1) * units // count]


def cut_at_multiples(first: int, stop: int, length: int) -> list[tuple[int, int]]:
    """Rows `first` to `stop`, cut at the multiples of a length."""
    cuts = [first, *range((first // length + 1) * length, stop, length), stop]
    return [(a, b) for a, b in itertools.pairwise(cuts) if a < b]


def units_of(n_rows: int, first: int, stop: int) -> list[tuple[int, int]]:
    """First row of each unit, or of what is left of it, and the one after its last, from row `first` to `stop`."""
    cuts = [first, *(edge for edge in _edges(n_rows) if first < edge < stop), stop]
    return [(a, b) for a, b in itertools.pairwise(cuts) if a < b]


@dataclass
class Statistics:
    """What has been gathered from rows `first` to `rows`: all that the rest of the pass depends on.

    `times_good` (p,) counts the rows in which a pixel was good; `saved` are the rows that a checkpoint holds.
    """

    equations: NormalEquations | DeviceEquations
    published: NormalEquations | DeviceEquations | None
    times_good: F64
    largest_error: float
    left_out: int = 0
    first: int = 0
    rows: int = 0
    saved: int = 0

    def finish(self) -> Statistics:
        """The same on the host, with nothing waiting."""
        self.equations = self.equations.finish()
        self.published = None if self.published is None else self.published.finish()
        return self

    def add(self, other: Statistics, add_gram: Callable[[F64], None] | None = None) -> None:
        """Add the statistics of the rows that follow, both finished.

        Parameters
        ----------
        other : Statistics
        add_gram : callable, optional
            See `NormalEquations.include`.

        Raises
        ------
        ValueError
            They do not follow, or are of another fit.
        """
        if self.rows != other.first or self.largest_error != other.largest_error:
            raise ValueError(f"rows from {self.rows} on are expected, found {other.first}")
        if (self.published is None) != (other.published is None):
            raise ValueError("one of two parts has no published-style ridge")
        assert isinstance(self.equations, NormalEquations)
        assert isinstance(other.equations, NormalEquations)
        self.equations.include(other.equations, add_gram)
        if self.published is not None:
            assert isinstance(self.published, NormalEquations)
            assert isinstance(other.published, NormalEquations)
            self.published.include(other.published)
        self.times_good = self.times_good + other.times_good
        self.left_out += other.left_out
        self.rows = other.rows

    def add_stored(
        self,
        rows: tuple[int, int],
        read: Callable[[str], NDArray],
        add_to: Callable[[str, F64], None],
        *,
        apart: bool,
        exact: bool,
    ) -> None:
        """Add what `restored` would give, without the memory for it; `add_to(name, total)` adds the array of a name.

        What has been added is of no use if this raises.
        """
        assert isinstance(self.equations, NormalEquations)
        # Zeros take no memory before they are touched.
        blank = np.zeros(self.equations.gram.shape)
        other = Statistics.restored(
            rows, lambda name: blank if name == _GRAM else read(name), apart=apart, exact=exact
        )
        self.add(other, lambda total: add_to(_GRAM, total))

    def arrays(self) -> dict[str, NDArray]:
        """Everything but `first` and `rows` by name; views of what is here."""
        arrays = {"times_good": self.times_good, "rest": np.array([self.largest_error, self.left_out])}
        arrays |= {f"equations/{name}": array for name, array in self.equations.state().items()}
        if self.published is not None:
            arrays |= {f"published/{name}": array for name, array in self.published.state().items()}
        return arrays

    @classmethod
    def restored(
        cls,
        rows: tuple[int, int],
        read: Callable[[str], NDArray],
        *,
        apart: bool,
        exact: bool,
    ) -> Statistics:
        """From the names of `arrays`; raises KeyError or ValueError where one is not what it should be.

        `apart` says that there is a published-style ridge, `exact` that sums do not depend on the order of units.
        """
        equations = NormalEquations.from_state(lambda name: read(f"equations/{name}"), exact=exact)
        published = None
        if apart:
            published = NormalEquations.from_state(lambda name: read(f"published/{name}"), exact=exact)
        largest_error, left_out = read("rest").tolist()
        times_good = read("times_good")
        first, stop = rows
        if times_good.shape != equations.reference.shape or equations.n_rows + left_out != stop - first:
            raise ValueError(f"{equations.n_rows} rows and {left_out:.0f} left out are not {stop - first}")
        return cls(equations, published, times_good, largest_error, int(left_out), first, stop, stop)
