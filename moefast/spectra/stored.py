"""What an HDF5 file really holds: objects behind links, and values that nobody ever wrote.

Design: HDF5 answers kindly. A link that leads nowhere looks like no link, and values that were never written, or whose
source file is gone, are read as zeros. Both are asked for here: what a file names and cannot give is an error, and
places without values are known as such.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import InputError

__all__ = [
    "UnwrittenPlaces",
    "find",
    "gaps_of",
    "lacking_filter",
    "owned_by",
    "refuse_misspelt",
]

_PLUGINS = "hdf5plugin"
_FILTERS = {
    305: "LZO", 307: "BZIP2", 32001: "Blosc", 32004: "LZ4", 32008: "Bitshuffle", 32013: "ZFP", 32015: "Zstandard",
    32017: "SZ", 32023: "FCIDECOMP", 32026: "Blosc2",
}  # fmt: skip
"""Compressions that HDF5 does not have by itself, as they are registered."""
_DEEPEST = 8
"""Virtual datasets made of virtual datasets that are followed."""

_Box = tuple[int, int, int, int]
"""First row, the one after the last, first pixel, the one after the last."""


def find(file: h5py.File | h5py.Group, path: str) -> Any:
    """The object at a path below a file or group; None only if a name on the way is not there.

    Raises
    ------
    InputError
        If a name is there and what it names cannot be opened: a link without its target, or damage.
    """
    node: Any = file
    done = ""
    for name in path.strip("/").split("/"):
        if not isinstance(node, h5py.Group):
            raise InputError(f"{_file_name(file)}: {done} is a dataset; expected a group that holds {path}")
        done = f"{done}/{name}".lstrip("/")
        try:
            if not node.id.links.exists(name.encode()):
                return None
            link = node.get(name, getlink=True)
        except (KeyError, OSError, RuntimeError, ValueError) as error:
            raise _cannot_give(file, done, f"it cannot be looked up ({error})") from error
        try:
            node = node[name]
        except (KeyError, OSError, RuntimeError, ValueError) as error:
            why = f"what it names cannot be opened ({error})"
            if isinstance(link, h5py.ExternalLink):
                why = f"it is a link to {link.path} in the file {link.filename}, which cannot be opened"
            elif isinstance(link, h5py.SoftLink):
                why = f"it is a link to {link.path}, which cannot be opened"
            raise _cannot_give(file, done, why) from error
    return node


def _file_name(file: h5py.File | h5py.Group) -> str:
    return str(file.file.filename)


def _cannot_give(file: h5py.File | h5py.Group, path: str, why: str) -> InputError:
    return InputError(
        f"{_file_name(file)}: {path} is named in the file, but {why}; copy the file again with all files that it "
        "links to"
    )


def owned_by(dataset: h5py.Dataset, file: h5py.File) -> bool:
    """Whether the bytes of a dataset lie in this very file, not in one that an external link leads to."""
    # The numbers are those of open files, so both must be open, as they are here.
    return bool(h5py.h5o.get_info(dataset.id).fileno == h5py.h5o.get_info(file.id).fileno)


def lacking_filter(dataset: h5py.Dataset) -> str:
    """Why the values of a dataset cannot be decoded, and what to do; "" if nothing is lacking."""
    creation = dataset.id.get_create_plist()
    codes = [creation.get_filter(i)[0] for i in range(creation.get_nfilters())]
    if all(h5py.h5z.filter_avail(code) for code in codes):
        return ""
    with contextlib.suppress(ImportError):
        # Where it is installed, importing it is all that it takes.
        importlib.import_module(_PLUGINS)
    if not dataset.id.get_num_chunks():
        return ""
    # A filter may have been left out where a chunk was written.
    left_out = dataset.id.get_chunk_info(0).filter_mask
    for i, code in enumerate(codes):
        if not h5py.h5z.filter_avail(code) and not left_out >> i & 1:
            name = _FILTERS.get(code, "an unknown filter")
            return (
                f"is compressed with {name} (HDF5 filter {code}), which is not installed here: "
                f"pip install {_PLUGINS}, or write the file anew with h5repack -f GZIP=1"
            )
    return ""


@dataclass(frozen=True)
class UnwrittenPlaces:
    """Places of an (n, p) dataset that hold no values.

    Attributes
    ----------
    edges : array of shape (n_segments + 1,)
        Pixels at which the segments of a row begin and end.
    absent : array of shape (n, n_segments), bool
        True where a segment of a row was never written.
    """

    edges: NDArray[np.int64]
    absent: NDArray[np.bool_]

    @property
    def everything(self) -> bool:
        """Whether there is no value at all."""
        return bool(self.absent.all())

    def blank(self, out: NDArray, first_row: int) -> None:
        """Set what was read of these places to NaN, of a mask to True (bad)."""
        absent = self.absent[first_row : first_row + len(out)]
        value = True if out.dtype == np.bool_ else np.nan
        for k in np.flatnonzero(absent.any(0)):
            out[absent[:, k], self.edges[k] : self.edges[k + 1]] = value


def gaps_of(dataset: h5py.Dataset) -> UnwrittenPlaces | None:
    """Places of a dataset that hold no values; None if there are none.

    A one-dimensional dataset counts as one with a single pixel.

    Raises
    ------
    InputError
        If the dataset lies in a way that cannot be followed, or a file with its bytes is missing or too short.
    """
    return _gaps(dataset, _DEEPEST)


def _gaps(dataset: h5py.Dataset, depth: int) -> UnwrittenPlaces | None:
    shape = (*dataset.shape, 1)[:2]
    if dataset.ndim not in (1, 2) or 0 in shape:
        return None
    if dataset.is_virtual:
        return _without(shape, _virtual_boxes(dataset, depth))
    if dataset.external:
        _check_external(dataset)
        return None
    if dataset.chunks is None:
        written = (
            dataset.id.get_create_plist().get_layout() == h5py.h5d.COMPACT or dataset.id.get_storage_size()
        )
        return None if written else _without(shape, [])
    return _missing_chunks(dataset, shape)


def _missing_chunks(dataset: h5py.Dataset, shape: tuple[int, int]) -> UnwrittenPlaces | None:
    """Gaps where chunks were never written.

    The number of chunks does not tell: one whose place is damaged is counted, and its values are read as zeros.
    """
    (n, p), (rows, pixels) = shape, (*dataset.chunks, 1)[:2]
    written = np.zeros((-(-n // rows), -(-p // pixels)), bool)
    astray: list[tuple[int, ...]] = []

    def note(chunk: Any) -> None:
        row, pixel = (*chunk.chunk_offset, 0)[:2]
        inside = 0 <= row < n and 0 <= pixel < p and row % rows == 0 and pixel % pixels == 0
        # A place that is taken already stands for another one, too.
        if inside and not written[row // rows, pixel // pixels]:
            written[row // rows, pixel // pixels] = True
        else:
            astray.append(chunk.chunk_offset)

    if dataset.id.get_num_chunks():
        dataset.id.chunk_iter(note)
    if astray:
        raise InputError(
            f"{dataset.file.filename}: {dataset.name}: a chunk lies at {astray[0]}, which is no place, or that of "
            f"another one, in a dataset of shape {dataset.shape} in chunks of {dataset.chunks}: damaged; copy or "
            "produce the file again"
        )
    if written.all():
        return None
    edges = np.append(np.arange(0, p, pixels), p).astype(np.int64)
    return UnwrittenPlaces(edges, np.repeat(~written, rows, axis=0)[:n])


def _without(shape: tuple[int, int], boxes: list[_Box]) -> UnwrittenPlaces | None:
    """Gaps of a dataset in which only these boxes hold values."""
    n, p = shape
    edges = np.unique([0, p, *(min(max(e, 0), p) for box in boxes for e in box[2:])]).astype(np.int64)
    absent = np.ones((n, len(edges) - 1), bool)
    for first, stop, low, high in boxes:
        begin, end = np.searchsorted(edges, (low, min(high, p)))
        absent[first:stop, begin:end] = False
    return UnwrittenPlaces(edges, absent) if absent.any() else None


def _virtual_boxes(dataset: h5py.Dataset, depth: int) -> list[_Box]:
    """The parts of a virtual dataset whose sources can be read."""
    if not depth:
        raise InputError(
            f"{dataset.file.filename}: {dataset.name}: virtual datasets of virtual datasets without end"
        )
    boxes: list[_Box] = []
    for source in dataset.virtual_sources():
        for k, target in enumerate(_boxes_of(source.vspace, dataset)):
            name, path = (_numbered(text, k) for text in (source.file_name, source.dset_name))
            if _is_readable(dataset, name, path, source, depth):
                boxes.append(target)
    return boxes


def _numbered(text: str, k: int) -> str:
    """The name of the k-th of a series of sources."""
    return text.replace("%%", "\0").replace("%b", str(k)).replace("\0", "%")


def _boxes_of(space: Any, dataset: h5py.Dataset) -> list[_Box]:
    """Boxes of a selection in a virtual dataset."""
    n, p = (*dataset.shape, 1)[:2]
    if space.get_select_type() == h5py.h5s.SEL_ALL:
        return [(0, n, 0, p)]
    unlimited = h5py.h5s.UNLIMITED
    if space.get_select_type() != h5py.h5s.SEL_HYPERSLABS or not space.is_regular_hyperslab():
        raise InputError(
            f"{dataset.file.filename}: {dataset.name}: a virtual dataset whose parts are no rectangles; write it as "
            "an ordinary dataset"
        )
    start, stride, count, block = ((*values, 1)[:2] for values in space.get_regular_hyperslab())
    if dataset.ndim == 1:
        start = (start[0], 0)

    def spans(axis: int, size: int) -> list[tuple[int, int]]:
        length = size if block[axis] == unlimited else block[axis]
        number = -(-(size - start[axis]) // stride[axis]) if count[axis] == unlimited else count[axis]
        firsts = [start[axis] + i * stride[axis] for i in range(number)]
        if count[axis] != unlimited and stride[axis] == block[axis]:
            # Blocks that follow each other are one.
            return [(start[axis], start[axis] + number * length)]
        return [(first, min(size, first + length)) for first in firsts]

    return [(a, b, c, d) for a, b in spans(0, n) for c, d in spans(1, p)]


def _is_readable(dataset: h5py.Dataset, name: str, path: str, source: Any, depth: int) -> bool:
    """Whether a source is there, is as large as the virtual dataset takes it to be, and was written."""
    if name == ".":
        return _is_written(dataset.file, path, source, depth)
    folder = Path(os.fsdecode(dataset.file.filename)).absolute().parent
    prefix = os.environ.get("HDF5_VDS_PREFIX", "").replace("${ORIGIN}", str(folder))
    for place in ([prefix] if prefix else []) + [str(folder), ""]:
        candidate = Path(place) / name
        if candidate.is_file():
            try:
                with h5py.File(candidate, "r") as file:
                    return _is_written(file, path, source, depth)
            except OSError:
                return False
    return False


def _is_written(file: h5py.File, path: str, source: Any, depth: int) -> bool:
    node = find(file, path)
    if not isinstance(node, h5py.Dataset):
        return False
    if source.src_space.get_select_type() != h5py.h5s.SEL_ALL:
        _, last = source.src_space.get_select_bounds()
        open_ended = any(value >= 2**62 for value in last)
        if not open_ended and any(b >= size for b, size in zip(last, node.shape, strict=False)):
            return False
    return _gaps(node, depth - 1) is None


def _check_external(dataset: h5py.Dataset) -> None:
    """Refuse a dataset whose bytes lie in files that are gone or too short: HDF5 reads zeros there."""
    folder = Path(os.fsdecode(dataset.file.filename)).absolute().parent
    prefix = os.environ.get("HDF5_EXTFILE_PREFIX", "").replace("${ORIGIN}", str(folder))
    left = dataset.size * dataset.dtype.itemsize
    for name, offset, size in dataset.external or ():
        path = Path(prefix) / os.fsdecode(name)
        needed = min(left, size) if size != h5py.h5f.UNLIMITED else left
        try:
            length = path.stat().st_size
        except OSError as error:
            raise InputError(
                f"{dataset.file.filename}: {dataset.name}: its values lie in the file {path}, which cannot be read "
                f"({error.strerror}); copy it, too"
            ) from error
        if length < offset + needed:
            raise InputError(
                f"{dataset.file.filename}: {dataset.name}: its values lie in the file {path}, which has {length} bytes "
                f"of {offset + needed}; copy it again"
            )
        left -= needed


def refuse_misspelt(file: h5py.File, path: str, known: Iterable[str]) -> None:
    """Refuse a group in which a name differs from a known one by a letter, or ends too early.

    Names have no checksum in older files; an array whose name is damaged would count as not there.

    Parameters
    ----------
    file : h5py.File
    path : str
        The group; nothing is said if there is none.
    known : iterable of str

    Raises
    ------
    InputError
    """
    group = find(file, path)
    if not isinstance(group, h5py.Group):
        return
    names = [name if isinstance(name, str) else repr(name) for name in group]
    for name in names:
        for right in known:
            apart = sum(a != b for a, b in zip(name, right, strict=False))
            if (
                name != right
                and right not in names
                and ((len(name) == len(right) and apart == 1) or right.startswith(name))
            ):
                raise InputError(
                    f"{_file_name(file)}: {path[1:]}/{name}: expected {right!r}, from which the name differs by "
                    f"{'a letter' if len(name) == len(right) else 'its end'}: damaged, or misspelt; copy the file "
                    "again, or give the group its name"
                )
