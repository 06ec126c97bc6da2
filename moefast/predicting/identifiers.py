"""Columns of the input that a prediction table carries along, in types that hold all values exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import InputError
from moefast.spectra.layouts.pfsspec import identifiers
from moefast.spectra.prepared import PreparedShard
from moefast.spectra.spectrum_set import SpectrumSet

__all__ = ["as_identifiers", "carried_columns", "identifier_dtypes", "present"]


def present(spectra: SpectrumSet, names: Iterable[str], option: str) -> list[str]:
    """The names, if every file has such columns."""
    names = list(names)
    for shard in spectra.shards:
        for name in names:
            if name not in shard.columns:
                raise InputError(
                    f"{option} {name}: {shard.path} has no such column; it has {', '.join(shard.columns) or 'none'}"
                )
    return names


def carried_columns(spectra: SpectrumSet, keep: Iterable[str]) -> list[str]:
    """Columns that go from the input to the table: identifiers that all files have, and what is to be kept."""
    # What all files have is asked of all of them.
    shared, names = set(spectra.columns), dict[str, None]()
    for shard in spectra.shards:
        own = shard.identifiers if isinstance(shard, PreparedShard) else identifiers(shard)
        names |= dict.fromkeys(name for name in own if name in shared)
    return list(names | dict.fromkeys(present(spectra, keep, "--keep")))


def identifier_dtypes(spectra: SpectrumSet, names: Sequence[str]) -> dict[str, np.dtype]:
    """Types that hold the identifiers of all files, by column."""
    dtypes: dict[str, list[np.dtype]] = {name: [] for name in names}
    for shard in spectra.shards if names else ():
        for name, values in shard.params(names, 0, 1).items():
            dtype = values.dtype
            if dtype.kind == "U":
                # Text comes as long as the longest of the rows read: one row says nothing about the others.
                dtype = max((part.dtype for part in shard.slices(name)), key=lambda kind: kind.itemsize)
            dtypes[name].append(dtype)
        # Thousands of files must not be open at once.
        shard.close()

    def slices(name: str) -> Iterator[NDArray]:
        for shard in spectra.shards:
            yield from shard.slices(name)
            shard.close()

    return {name: _exactly(found, partial(slices, name)) for name, found in dtypes.items()}


def _exactly(dtypes: list[np.dtype], slices: Callable[[], Iterator[NDArray]]) -> np.dtype:
    """Type that holds all identifiers as they are: integers stay integers, whatever NumPy makes of two kinds.

    Parameters
    ----------
    dtypes : list of dtype
        Of each file.
    slices : callable
        Goes through all values.
    """
    kinds = {dtype.kind for dtype in dtypes}
    if kinds <= {"S", "U"} or len(set(dtypes)) == 1:
        return np.result_type(*dtypes)
    if kinds <= set("biuf"):
        found = np.result_type(*dtypes)
        if found.kind in "biu":
            return found
        if "f" not in kinds:
            # int64 and uint64 have no common integer, but these numbers may.
            low, high = 0, 0
            for values in slices():
                low, high = min(low, int(values.min(initial=0))), max(high, int(values.max(initial=0)))
            for candidate in (np.int64, np.uint64):
                if np.iinfo(candidate).min <= low and high <= np.iinfo(candidate).max:
                    return np.dtype(candidate)
    # No type of numbers holds them all.
    longest = max((len(text) for values in slices() for text in _as_text(values)), default=1)
    return np.dtype(f"U{max(1, longest)}")


def _as_text(values: NDArray) -> NDArray:
    """Identifiers as text; whole numbers without a decimal point."""
    if values.dtype.kind == "f":
        return np.array([f"{v:.0f}" if v == np.floor(v) else repr(float(v)) for v in values], dtype=str)
    return values.astype(str)


def as_identifiers(values: NDArray, dtype: np.dtype) -> NDArray:
    """Identifiers in the type of their column, which holds them exactly."""
    return (_as_text(values) if dtype.kind == "U" else values).astype(dtype)
