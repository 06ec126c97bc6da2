"""Texts of variable length that HDF5 would read for ever, found before it begins.

Design: such texts, attributes for the most part, lie in collections that have no checksum. Where damage left an object
of no size, the library does not come to its end, and nothing can stop it; so the bytes of the file are followed here
first, those of large arrays left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import h5py

from moefast.core.errors import InputError
from moefast.spectra.stored import owned_by

__all__ = ["refuse_damaged_texts", "refuse_endless_heaps"]

_HEAP = b"GCOL\x01\0\0\0"
"""First bytes of a collection of values of variable length."""
_PIECE = 1 << 22


def refuse_damaged_texts(owners: Iterable[Any], values: Iterable[h5py.Dataset]) -> None:
    """Refuse files in which HDF5 would never come to the end of a text, if texts of variable length are in use at all.

    Parameters
    ----------
    owners : iterable of h5py.Group and h5py.Dataset
        What has attributes that will be read, or is such a text.
    values : iterable of h5py.Dataset
        Large datasets of numbers, see `refuse_endless_heaps`.
    """
    files = {owner.file.filename: owner.file for owner in owners if _has_texts(owner)}
    for file in files.values():
        refuse_endless_heaps(file, values)


def _has_texts(owner: Any) -> bool:
    """Whether an object, or an attribute of it, holds values of variable length."""
    if isinstance(owner, h5py.Dataset) and owner.dtype.hasobject:
        return True
    return any(owner.attrs.get_id(name).dtype.hasobject for name in owner.attrs)


def refuse_endless_heaps(file: h5py.File, datasets: Iterable[h5py.Dataset] = ()) -> None:
    """Refuse a file in which HDF5 would look for a text of variable length for ever.

    Parameters
    ----------
    file : h5py.File
    datasets : iterable of h5py.Dataset
        Whose values need not be looked through, because they are large and hold none of it.

    Raises
    ------
    InputError
        If a collection is damaged.

    Source: HDF5 File Format Specification 3.0, III.E "Disk Format: Level 1E - Global Heap".
    """
    _, length_size = file.id.get_create_plist().get_sizes()
    path = str(file.file.filename)
    values = sorted(place for dataset in datasets if owned_by(dataset, file) for place in _values_of(dataset))
    with open(path, "rb") as raw:
        end = raw.seek(0, os.SEEK_END)
        start = 0
        for first, stop in [*values, (end, end)]:
            for collection in _collections(raw, start, first):
                _follow(raw, collection, end, length_size, path)
            start = max(start, stop)


def _values_of(dataset: h5py.Dataset) -> list[tuple[int, int]]:
    """First byte, and the one after the last, of the places that hold the values of a dataset."""
    places: list[tuple[int, int]] = []
    if dataset.is_virtual or dataset.external:
        return places
    if dataset.chunks is None:
        if (offset := dataset.id.get_offset()) is not None:
            places.append((offset, offset + dataset.id.get_storage_size()))
    elif dataset.id.get_num_chunks():

        def note(chunk: Any) -> None:
            # Chunks mostly follow each other.
            first, stop = chunk.byte_offset, chunk.byte_offset + chunk.size
            if places and places[-1][1] == first:
                first = places.pop()[0]
            places.append((first, stop))

        dataset.id.chunk_iter(note)
    return places


def _collections(raw: BinaryIO, start: int, stop: int) -> Iterator[int]:
    """Places between two bytes of a file at which a collection begins."""
    while start < stop:
        raw.seek(start)
        # What begins in this piece may end in the next.
        piece = raw.read(min(_PIECE, stop - start) + len(_HEAP) - 1)
        at = piece.find(_HEAP)
        while 0 <= at < _PIECE:
            yield start + at
            at = piece.find(_HEAP, at + 1)
        start += _PIECE


def _follow(raw: BinaryIO, at: int, end: int, length_size: int, path: str) -> None:
    def number(first: int, size: int) -> int:
        return int.from_bytes(content[first : first + size], "little")

    raw.seek(at)
    content = raw.read(8 + length_size)
    size = number(8, length_size)
    if size > end - at:
        raise _damaged_heap(path, at)
    content += raw.read(size - len(content))
    head = -(-(8 + length_size) // 8) * 8
    position = head
    while position + head <= size:
        length = number(position + 8, length_size)
        # Object 0 is the room that is left, its own head included.
        needed = head + -(-length // 8) * 8 if number(position, 2) else length
        if not 0 < needed <= size - position:
            raise _damaged_heap(path, at)
        position += needed


def _damaged_heap(path: str, at: int) -> InputError:
    return InputError(
        f"{path}: texts of variable length, at byte {at}, are damaged; copy or produce the file again"
    )
