"""Spectrum files in the layout of the PFS simulator, read as they are: shards in, blocks of rows out.

Design: one shard is one HDF5 file. Arrays that lie uncompressed on the disk (contiguous, or in chunks as wide
as a spectrum) are read past the HDF5 library, straight from their offset into the block that is handed out;
reading instead of mapping, because a file that shrinks under a map ends the process (SIGBUS) and one that
shrinks under a read is an error with a name. Compressed chunks are decoded once each, in slabs of whole
chunks from which the blocks are cut. Conversion to float32 happens in pieces that fit the cache. A block
never spans two shards, so everything made from blocks is a pure function of a shard.

Layout::

    dataset/arrays/flux/value    (n, p) float   clean flux
    dataset/arrays/error/value   (n, p) float   1σ per pixel, same units
    dataset/arrays/mask/value    (n, p) int     optional, not 0 = bad
    dataset/arrays/noisy/value   (n, p) float   optional, flux with its noise
    spectrumdataset/wave         (p,)  float    Å
    dataset/params               optional table of labels and conditions, one row per spectrum
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import queue
import re
import stat
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import h5py
import numpy as np

from moefast.core.atomic import partial_path, publish, remove_quietly
from moefast.core.errors import InputError, LabelError, OutputError, WaveGridError
from moefast.core.labels import describe_implausible, plausible
from moefast.core.threads import CORES
from moefast.core.watched import WatchedFile
from moefast.spectra.params import ParamColumn, create_params_table, index_column, param_columns, read_columns
from moefast.spectra.stored import Gaps, find, gaps_of, lacking_filter, owned_by

__all__ = [
    "Block",
    "Failure",
    "Shard",
    "SpectrumSet",
    "SpectrumWriter",
    "block_edges",
    "describe_difference",
    "find_files",
    "open_spectra",
    "same_wave",
]

ARRAYS = ("flux", "error", "mask", "noisy")
_SUFFIXES = (".h5", ".hdf5", ".fits", ".fit", ".fits.gz", ".fits.fz")
_STAGING_BYTES = 1 << 20
_SLAB_BYTES = 1 << 25
_FREE_MEMORY = max(12, 4 * CORES)
"""Arrays kept to be used again: each of the threads that read and work has two or three."""
_TABLE_ROWS = 16384
_FINGERPRINT_ROWS = 16
_FINGERPRINT_CHUNK_BYTES = 1 << 16
OnError = Literal["raise", "skip"]


def _natural(path: str | Path) -> list[tuple[int, int, str]]:
    pieces = re.split(r"(\d+)", str(path))
    return [(1, int(piece), "") if piece.isdigit() else (0, 0, piece) for piece in pieces]


def _is_table(path: Path) -> bool:
    """Whether a file is a prediction table; a file that cannot be opened is left to those who will say why."""
    try:
        # Opening a pipe would wait for somebody to write into it.
        if not path.is_file():
            return False
        if path.suffix.lower() not in {".h5", ".hdf5"}:
            with open(path, "rb") as plain:
                return b"MOEFAST_VERSION" in plain.read(1 << 15)
        with h5py.File(path, "r") as file:
            return "predictions" in file and "dataset" not in file
    except OSError:
        return False


def _is_left_by_macos(path: Path) -> bool:
    """Whether a file is the companion `._name` that macOS writes on foreign disks; it holds no spectra."""
    if not path.name.startswith("._"):
        return False
    try:
        with open(path, "rb") as file:
            return file.read(4) in {b"\x00\x05\x16\x07", b"\x00\x05\x16\x00"}
    except OSError:
        return False


def _below(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """Spectrum files in a folder and below it, and what may be one and cannot be looked at.

    Links to folders are followed, but not into a folder that they lie in.
    """
    try:
        status = folder.stat()
        key = (status.st_dev, status.st_ino)
        names = sorted(folder.iterdir()) if key not in above else []
    except OSError:
        # Opening it will say why.
        yield folder
        return
    for path in names:
        suffix = path.suffix.lower()
        try:
            if path.is_dir():
                yield from _below(path, above | {key})
                continue
        except OSError:
            yield path
            continue
        # A link without its target may have been a folder of spectra.
        lost = path.is_symlink() and not path.exists() and not suffix
        if (path.name.lower().endswith(_SUFFIXES) or lost) and not _is_left_by_macos(path):
            yield path


def find_files(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """Spectrum files meant by files, folders and glob patterns.

    Folders, given or met by a pattern, are searched recursively for ``*.h5``, ``*.hdf5`` and ``*.fits`` (also gzipped).
    What one folder or pattern yields is in natural order (shard 2 before shard 10); the order of the arguments is kept
    and duplicates are dropped.
    Prediction tables of moefast that lie among the spectra are passed over, unless they are named themselves. What
    cannot be opened is among the files, links without a target for example: whoever opens it will say so.

    Raises
    ------
    InputError
        If an argument names nothing.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    found: dict[str, Path] = {}
    for given in paths:
        try:
            matches = _matches(given)
        except (OSError, ValueError, RuntimeError) as error:
            # Loops of links, names that are too long, NUL bytes, folders that may not be read, homes that do not exist.
            raise InputError(f"{str(given)!r}: no file can be looked for under this name: {error}") from error
        for match in sorted(matches, key=_natural):
            found.setdefault(os.path.realpath(match), match)
    if not found:
        raise InputError("no spectrum files given: name files, folders or patterns (train_*/dataset.h5)")
    return list(found.values())


def _matches(given: str | Path) -> list[Path]:
    """What one argument means."""
    path = Path(given).expanduser()
    if path.is_dir():
        matches = [p for p in _below(path) if not _is_table(p)]
        if not matches:
            hint = (
                "; it is the folder of a model, which is named after -m"
                if (path / "manifest.json").exists()
                else ""
            )
            raise InputError(f"{given}: no file *.h5, *.hdf5 or *.fits in this folder or below it{hint}")
        return matches
    if os.path.lexists(path):
        return [path]
    if not glob.has_magic(str(path)):
        raise InputError(f"{given}: no such file or folder (working folder {Path.cwd()})")
    matches = []
    for match in map(Path, glob.glob(str(path), recursive=True)):
        matches += _below(match) if match.is_dir() else [] if _is_left_by_macos(match) else [match]
    matches = [p for p in matches if not _is_table(p)]
    if not matches:
        raise InputError(f"{given}: no file matches this pattern (working folder {Path.cwd()})")
    return matches


def _describe_wave(wave: np.ndarray) -> str:
    step = (wave[-1] - wave[0]) / (len(wave) - 1) if len(wave) > 1 else float("nan")
    return f"{len(wave)} pixels, {wave[0]:.3f} to {wave[-1]:.3f} Å, mean step {step:.5f} Å"


def same_wave(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two wave grids, arrays of shape (p,) in Å, agree to 0.01 pixel everywhere."""
    if len(first) != len(second):
        return False
    step = np.abs(np.gradient(first)) if len(first) > 1 else np.ones(1)
    return bool(np.all(np.abs(first - second) < 0.01 * step))


def describe_difference(found: np.ndarray, expected: np.ndarray) -> str:
    """Two wave grids, arrays of shape (p,) in Å, and where they differ most, so that no two words are alike."""
    text = f"{_describe_wave(found)}; expected {_describe_wave(expected)}"
    if len(found) == len(expected):
        most = int(np.argmax(np.abs(found - expected)))
        text += (
            f"; they differ most at pixel {most}, {found[most]:.5f} Å where {expected[most]:.5f} Å are expected "
            f"({found[most] - expected[most]:+.5f} Å)"
        )
    return text


@dataclass(frozen=True)
class _Stored:
    """Where one (n, p) array lies.

    `access` is "offset" (rows follow each other from `offset` on), "chunks" (uncompressed, each chunk holds
    `chunk_rows` whole rows) or "library" (everything else, through HDF5 in slabs of `slab_rows`). `own_chunks` says
    that chunks are compressed and lie in this file; `gaps` are places that hold no values.
    """

    dataset: str
    dtype: np.dtype
    n_rows: int
    n_pixels: int
    layout: str
    access: str
    offset: int = 0
    chunk_rows: int = 0
    slab_rows: int = 0
    own_chunks: bool = False
    gaps: Gaps | None = None

    @property
    def row_bytes(self) -> int:
        return self.n_pixels * self.dtype.itemsize


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


def _lost_rows(path: Path, length: int, expected: int) -> str:
    """Say what a file cut off at `length` bytes has lost, as far as its metadata survive."""

    class Padded:
        """The file with zeros where it ends too early: HDF5 refuses to open it otherwise."""

        def __init__(self) -> None:
            self.file = open(path, "rb")  # noqa: SIM115
            self.position = 0

        def seek(self, offset: int, whence: int = 0) -> int:
            self.position = offset + (0, self.position, expected)[whence]
            return self.position

        def tell(self) -> int:
            return self.position

        def readinto(self, buffer: Any) -> int:
            self.file.seek(self.position)
            view = memoryview(buffer).cast("B")
            n = self.file.readinto(view)
            view[n:] = bytes(len(view) - n)
            self.position += len(view)
            return len(view)

        def read(self, size: int = -1) -> bytes:
            data = bytearray(size)
            self.readinto(data)
            return bytes(data)

    lost = []
    padded = Padded()
    try:
        with h5py.File(padded, "r") as file:
            for name in ARRAYS:
                dataset = file.get(f"dataset/arrays/{name}/value")
                if not isinstance(dataset, h5py.Dataset) or dataset.ndim != 2 or not dataset.size:
                    continue
                offset = dataset.id.get_offset() if dataset.chunks is None else None
                if offset is None:
                    continue
                row_bytes = dataset.dtype.itemsize * dataset.shape[1]
                whole = max(0, min(dataset.shape[0], (length - offset) // row_bytes))
                if whole < dataset.shape[0]:
                    lost.append(f"{dataset.name} ends in row {whole} of {dataset.shape[0]}")
    except Exception:
        # Zeros in place of metadata make HDF5 raise nearly anything; the length alone is then the answer.
        return ""
    finally:
        padded.file.close()
    return ": " + "; ".join(lost) if lost else ""


def _open_hdf5(path: Path) -> h5py.File:
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise InputError(_why_not_opened(path, error)) from error
    if stat.S_ISDIR(status.st_mode):
        raise InputError(f"{path}: is a folder, expected an HDF5 file")
    if not stat.S_ISREG(status.st_mode):
        raise InputError(
            f"{path}: is a pipe or device; HDF5 files are read at several places, so write it to a disk"
        )
    try:
        return h5py.File(path, "r", rdcc_nbytes=_STAGING_BYTES, locking="best-effort")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(_why_not_opened(path, error)) from error


def _why_not_opened(path: Path, error: OSError | ValueError) -> str:
    """Why a file cannot be opened, and what to do."""
    text, number = str(error), getattr(error, "errno", None)
    said = re.search(r"errno = (\d+)", text)
    number = int(said[1]) if number is None and said else number
    if number in (errno.EMFILE, errno.ENFILE):
        return f"{path}: too many files are open already; raise the limit (ulimit -n) or close other files"
    if number == errno.ENOENT:
        if path.is_symlink():
            return f"{path}: is a link to {os.readlink(path)}, which does not exist"
        return f"{path}: no such file"
    if number in (errno.EACCES, errno.EPERM):
        return f"{path}: may not be read by this user ({os.strerror(number)})"
    if number == errno.ELOOP:
        return f"{path}: links lead in a circle"
    if "unable to lock file" in text or "already open for write" in text or "SWMR" in text:
        return (
            f"{path}: another program has it open for writing ({text}); wait until it has finished. If nothing writes, "
            "the file system has no locks or kept an old one: set HDF5_USE_FILE_LOCKING=FALSE"
        )
    cut = re.search(r"truncated file: eof = (\d+).*stored_eof = (\d+)", text)
    if cut:
        length, expected = int(cut[1]), int(cut[2])
        return (
            f"{path}: truncated file: {length} bytes of {expected}{_lost_rows(path, length, expected)}; "
            "copy or produce it again"
        )
    try:
        with open(path, "rb") as file:
            head = file.read(8)
    except (OSError, ValueError) as problem:
        return f"{str(path)!r}: cannot be read: {problem}"
    if head == b"SIMPLE  ":
        return f"{path}: a FITS file; only predict and inspect read those, on the grid of a model"
    if head != b"\x89HDF\r\n\x1a\n":
        return f"{path}: not an HDF5 file (it starts with {head!r})"
    return f"{path}: cannot be opened as HDF5, it may be damaged: {error}"


def _contents(file: h5py.File) -> str:
    found: list[str] = []

    def visit(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and "/_i_table/" not in name and len(found) < 12:
            found.append(f"{name} {node.shape}")

    file.visititems(visit)
    return ", ".join(found) or "nothing"


class _Memory:
    """Memory for blocks, used again once no array refers to it.

    Fresh memory costs a page fault per page, several times what it costs to read a file that the system has
    in its cache. The memory under an array goes back when the last view of it is gone, never earlier.
    """

    def __init__(self) -> None:
        self.free: list[memoryview] = []

    def array(self, shape: tuple[int, int], dtype: type) -> np.ndarray:
        """Uninitialised C-contiguous array."""
        size = shape[0] * shape[1] * np.dtype(dtype).itemsize
        memory = next((held for held in self.free if size <= held.nbytes < 2 * size + 8192), None)
        if memory is None:
            raw = np.empty(size + 64, np.uint8)
            memory = raw[-raw.ctypes.data % 64 :].data
        else:
            self.free.remove(memory)
        # Views of an array on a memoryview keep that array as their base, so its end is the end of them all.
        owner = np.frombuffer(memory, np.uint8)
        weakref.finalize(owner, self._give_back, memory).atexit = False
        return owner[:size].view(dtype).reshape(shape)

    def _give_back(self, memory: memoryview) -> None:
        if len(self.free) < _FREE_MEMORY:
            self.free.append(memory)


class _Table:
    """Columns of the params tables, read in longer pieces than blocks are: a call of HDF5 takes as long as a block."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.shard: Shard | None = None
        self.first = self.stop = 0
        self.held: dict[str, np.ndarray] = {}

    def rows(self, shard: Shard, start: int, stop: int) -> dict[str, np.ndarray]:
        """The columns in rows of a shard; later calls never ask for earlier rows."""
        if not self.names:
            return {}
        if shard is not self.shard or not self.first <= start <= stop <= self.stop:
            self.shard = None
            self.first, self.stop = start, min(max(stop, start + _TABLE_ROWS), shard.n_rows)
            try:
                self.held = shard.params(self.names, self.first, self.stop)
            except InputError:
                # Damage further on must not cost the rows before it.
                self.stop = stop
                self.held = shard.params(self.names, start, stop)
            self.shard = shard
        here = slice(start - self.first, stop - self.first)
        return {name: values[here] for name, values in self.held.items()}


class Shard:
    """One spectrum file.

    Metadata are read at once; data on demand. Usable from several threads.

    Attributes
    ----------
    path : Path
        The file.
    n_rows, n_pixels : int
        Shape of its arrays.
    wave : array of shape (p,), float64
        Wavelength of the pixels in Å.
    arrays : tuple of str
        Which of flux, error, mask, noisy it has.
    dtypes : dict of str to dtype
        As stored.
    layout : dict of str to str
        "contiguous" or "chunked".
    columns : tuple of str
        Readable columns of its params table.
    unreadable : dict of str to str
        Columns that are there and cannot be read, with the reason.
    attrs : dict
        Attributes of the file's root that are numbers or text.

    Raises
    ------
    InputError
        If the file is missing, truncated, damaged, empty, or lacks what it must have.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.RLock()
        self._hdf5: h5py.File | None = None
        self._raw: Any = None
        self._slabs: dict[tuple[str, str], tuple[int, np.ndarray]] = {}
        file = _open_hdf5(self.path)
        try:
            self._size = self.path.stat().st_size
            self._stored = self._find_arrays(file)
            self.wave = self._find_wave(file)
            self._columns = self._find_columns(file)
            self._index = index_column(file)
            self.attrs = {
                name: value.decode("utf-8", "replace") if isinstance(value, bytes) else value
                for name, value in file.attrs.items()
                if isinstance(value, bytes | str | np.number | np.bool_)
                and name not in {"CLASS", "TITLE", "VERSION", "PYTABLES_FORMAT_VERSION"}
            }
        except InputError:
            raise
        except Exception as error:
            # Damaged descriptions of types and shapes make h5py raise nearly anything.
            raise InputError(f"{self.path}: metadata cannot be read, damaged? {error}") from error
        finally:
            file.close()
        first = next(iter(self._stored.values()))
        self.n_rows, self.n_pixels = first.n_rows, first.n_pixels
        self.arrays = tuple(self._stored)
        self.dtypes = {name: stored.dtype for name, stored in self._stored.items()}
        self.layout = {name: stored.layout for name, stored in self._stored.items()}
        self.columns = tuple(name for name, column in self._columns.items() if not column.problem)
        self.unreadable = {name: column.problem for name, column in self._columns.items() if column.problem}

    def __repr__(self) -> str:
        return (
            f"Shard({str(self.path)!r}, n_rows={self.n_rows}, n_pixels={self.n_pixels}, arrays={self.arrays})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    # -- what is in the file -------------------------------------------------------------------------------

    def _find_arrays(self, file: h5py.File) -> dict[str, _Stored]:
        datasets = {}
        for name in ARRAYS:
            path = f"/dataset/arrays/{name}/value"
            node = find(file, path)
            if isinstance(node, h5py.Dataset):
                datasets[name] = node
            elif node is not None or find(file, f"/dataset/arrays/{name}") is not None:
                raise InputError(
                    f"{self.path}: dataset {path[1:]} is missing; found {_contents(file)}. Expected it, as there is "
                    f"a group dataset/arrays/{name}"
                )
        flux = "flux" if "flux" in datasets else "noisy"
        for name in (flux if flux in datasets else "flux", "error"):
            if name not in datasets:
                raise InputError(
                    f"{self.path}: dataset dataset/arrays/{name}/value is missing; found {_contents(file)}. "
                    "Expected a spectrum dataset with arrays flux (or noisy) and error"
                )
        shape = datasets[flux].shape
        names = {name: f"/dataset/arrays/{name}/value" for name in datasets}
        for name, dataset in datasets.items():
            if dataset.ndim != 2:
                raise InputError(
                    f"{self.path}: {names[name]} has shape {dataset.shape}, expected (rows, pixels)"
                )
            if dataset.shape != shape:
                raise InputError(
                    f"{self.path}: {names[name]} has shape {dataset.shape}, {names[flux]} {shape}"
                )
            if dataset.dtype.kind not in "fiub":
                raise InputError(f"{self.path}: {names[name]} has type {dataset.dtype}, expected numbers")
        if 0 in shape:
            raise InputError(f"{self.path}: holds no spectra ({names[flux]} has shape {shape})")
        return {name: self._locate(dataset, names[name], file) for name, dataset in datasets.items()}

    def _locate(self, dataset: h5py.Dataset, path: str, file: h5py.File) -> _Stored:
        n_rows, n_pixels = dataset.shape
        if lacking := lacking_filter(dataset):
            raise InputError(f"{self.path}: {path} {lacking}")
        creation = dataset.id.get_create_plist()
        filtered = creation.get_nfilters() > 0
        gaps = gaps_of(dataset)
        if gaps is not None and gaps.everything:
            raise InputError(f"{self.path}: {path} was created and never written")
        common = (path, dataset.dtype, n_rows, n_pixels)
        # Only bytes of this very file are read past the library. HDF5 versions disagree on whether offsets count a
        # user block in.
        direct = file.userblock_size == 0 and not dataset.is_virtual and owned_by(dataset, file)
        if dataset.chunks is None:
            layout = "contiguous"
            if direct and creation.get_layout() == h5py.h5d.CONTIGUOUS and not dataset.external:
                offset = dataset.id.get_offset()
                row_bytes = n_pixels * dataset.dtype.itemsize
                if offset + n_rows * row_bytes > self._size:
                    whole = max(0, (self._size - offset) // row_bytes)
                    raise InputError(
                        f"{self.path}: truncated file: {path} ends in row {whole} of {n_rows}; "
                        "copy or produce it again"
                    )
                return _Stored(*common, layout, "offset", offset=offset)
            slab = max(1, _SLAB_BYTES // (4 * n_pixels))
            return _Stored(*common, layout, "library", slab_rows=min(slab, n_rows), gaps=gaps)
        chunk_rows = dataset.chunks[0]
        if direct and not filtered and dataset.chunks[1] == n_pixels:
            return _Stored(*common, "chunked", "chunks", chunk_rows=chunk_rows, gaps=gaps)
        slab = max(1, _SLAB_BYTES // (4 * n_pixels * chunk_rows)) * chunk_rows
        return _Stored(
            *common,
            "chunked",
            "library",
            chunk_rows=chunk_rows,
            slab_rows=min(slab, n_rows),
            own_chunks=filtered and direct,
            gaps=gaps,
        )

    def _find_wave(self, file: h5py.File) -> np.ndarray:
        path = "/spectrumdataset/wave"
        node = find(file, path)
        if not isinstance(node, h5py.Dataset):
            raise InputError(f"{self.path}: dataset spectrumdataset/wave is missing; found {_contents(file)}")
        if lacking := lacking_filter(node):
            raise InputError(f"{self.path}: {path} {lacking}")
        n_pixels = next(iter(self._stored.values())).n_pixels
        wave = np.asarray(node[()], dtype=np.float64)
        if wave.shape != (n_pixels,):
            raise InputError(
                f"{self.path}: {path} has shape {wave.shape}, but the spectra have {n_pixels} pixels"
            )
        if not np.all(np.isfinite(wave)) or np.any(np.diff(wave) <= 0):
            raise InputError(f"{self.path}: {path} must be finite and increasing (Å)")
        if gaps_of(node) is not None:
            raise InputError(f"{self.path}: {path} was never written as a whole")
        return wave

    def _find_columns(self, file: h5py.File) -> dict[str, ParamColumn]:
        columns = param_columns(file)
        n_rows = next(iter(self._stored.values())).n_rows
        for column in columns.values():
            if not column.problem and column.n_rows != n_rows:
                raise InputError(
                    f"{self.path}: {column.dataset} has {column.n_rows} rows, but there are {n_rows} spectra"
                )
        return columns

    # -- data ----------------------------------------------------------------------------------------------

    def _file(self) -> h5py.File:
        if self._hdf5 is None:
            self._hdf5 = _open_hdf5(self.path)
        return self._hdf5

    def close(self) -> None:
        """Release file handles and cached slabs; the shard stays usable."""
        with self._lock:
            self._slabs.clear()
            if self._hdf5 is not None:
                self._hdf5.close()
                self._hdf5 = None
            if self._raw is not None:
                self._raw.close()
                self._raw = None

    def __del__(self) -> None:
        raw = getattr(self, "_raw", None)
        if raw is not None:
            raw.close()

    def _stored_array(self, array: str) -> _Stored:
        try:
            return self._stored[array]
        except KeyError:
            raise InputError(
                f"{self.path}: has no array {array!r}; it has {', '.join(self._stored)}"
            ) from None

    def read(self, array: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows `start` to `stop` of an array.

        Parameters
        ----------
        array : {"flux", "error", "noisy", "mask"}
            Which one.
        start, stop : int
            Rows of this shard.
        out : array of shape (stop - start, p), float32 or bool, C-contiguous, optional
            Filled and returned. With bool, each value becomes "is not 0".

        Returns
        -------
        array of shape (stop - start, p)
            float32; bool for the mask (True = bad).

        Raises
        ------
        InputError
            If the rows cannot be read.
        """
        stored = self._stored_array(array)
        if not 0 <= start <= stop <= self.n_rows:
            raise ValueError(f"rows {start} to {stop} asked for, the shard has {self.n_rows}")
        if out is None:
            out = np.empty((stop - start, self.n_pixels), bool if array == "mask" else np.float32)
        elif (
            out.shape != (stop - start, self.n_pixels)
            or out.dtype not in (np.float32, np.bool_)
            or not out.flags.c_contiguous
        ):
            raise ValueError(
                f"out must be C-contiguous float32 or bool of shape ({stop - start}, {self.n_pixels}), "
                f"found {out.dtype} {out.shape}"
            )
        try:
            with self._lock, np.errstate(all="ignore"):
                if stored.access == "offset":
                    self._read_raw(stored, stored.offset + start * stored.row_bytes, out)
                elif stored.access == "chunks":
                    self._read_chunks(stored, start, out)
                else:
                    self._read_slabs(array, stored, start, out)
                if stored.gaps is not None:
                    stored.gaps.blank(out, start)
        except Exception as error:
            raise InputError(
                f"{self.path}: {stored.dataset}: rows {start} to {stop - 1} cannot be read, the file is "
                f"truncated or damaged: {error}"
            ) from error
        return out

    def _fill(self, view: memoryview, offset: int) -> None:
        if self._raw is None:
            self._raw = open(self.path, "rb", buffering=0)  # noqa: SIM115
        self._raw.seek(offset)
        done = 0
        while done < len(view):
            n = self._raw.readinto(view[done:])
            if not n:
                raise EOFError(f"file ends at byte {offset + done}")
            done += n

    def _read_raw(self, stored: _Stored, offset: int, out: np.ndarray) -> None:
        if not out.size:
            return
        if stored.dtype == out.dtype and out.dtype != np.bool_:
            self._fill(out.view(np.uint8).data.cast("B"), offset)
            return
        step = max(1, _STAGING_BYTES // stored.row_bytes)
        staging = np.empty((min(step, len(out)), stored.n_pixels), stored.dtype)
        for first in range(0, len(out), step):
            target = out[first : first + step]
            piece = staging[: len(target)]
            self._fill(piece.view(np.uint8).data.cast("B"), offset + first * stored.row_bytes)
            _convert(piece, target)

    def _read_chunks(self, stored: _Stored, start: int, out: np.ndarray) -> None:
        dataset = self._file()[stored.dataset]
        row, stop = start, start + len(out)
        while row < stop:
            chunk_start = row - row % stored.chunk_rows
            end = min(stop, chunk_start + stored.chunk_rows)
            target = out[row - start : end - start]
            offset = dataset.id.get_chunk_info_by_coord((chunk_start, 0)).byte_offset
            # A chunk that was never written is one of the gaps.
            if offset is not None:
                self._read_raw(stored, offset + (row - chunk_start) * stored.row_bytes, target)
            row = end

    def _read_slabs(self, array: str, stored: _Stored, start: int, out: np.ndarray) -> None:
        row, stop = start, start + len(out)
        while row < stop:
            slab_start = row - row % stored.slab_rows
            end = min(stop, slab_start + stored.slab_rows)
            key = (array, out.dtype.kind)
            held = self._slabs.get(key)
            if held is None or held[0] != slab_start:
                # The old slab goes first: with one chunk of 2 GB there is no room for two.
                self._slabs.pop(key, None)
                del held
                slab = np.empty((min(stored.slab_rows, self.n_rows - slab_start), self.n_pixels), out.dtype)
                dataset = self._file()[stored.dataset]
                if out.dtype == np.bool_:
                    _convert(dataset[slab_start : slab_start + len(slab)], slab)
                else:
                    dataset.read_direct(slab, np.s_[slab_start : slab_start + len(slab)])
                held = self._slabs[key] = (slab_start, slab)
            out[row - start : end - start] = held[1][row - slab_start : end - slab_start]
            row = end

    def params(
        self, names: Iterable[str] | None = None, start: int = 0, stop: int | None = None
    ) -> dict[str, np.ndarray]:
        """Columns of the params table.

        Parameters
        ----------
        names : iterable of str, optional
            Which; all readable ones if None.
        start, stop : int
            Rows of this shard.

        Returns
        -------
        dict of str to array of shape (stop - start,)
            Numbers as stored, in native byte order; strings as text.

        Raises
        ------
        InputError
            If a column is absent or cannot be read.
        """
        wanted = list(self.columns if names is None else names)
        for name in wanted:
            if name in self.unreadable:
                raise InputError(f"{self.path}: dataset/params: column {name!r} {self.unreadable[name]}")
            if name not in self._columns:
                raise InputError(
                    f"{self.path}: dataset/params has no column {name!r}; it has "
                    f"{', '.join(self.columns) or 'no readable column'}"
                )
        stop = self.n_rows if stop is None else stop
        if not 0 <= start <= stop <= self.n_rows:
            raise ValueError(f"rows {start} to {stop} asked for, the shard has {self.n_rows}")
        if not wanted:
            return {}
        try:
            with self._lock:
                return read_columns(self._file(), {name: self._columns[name] for name in wanted}, start, stop)
        except Exception as error:
            raise InputError(
                f"{self.path}: dataset/params: rows {start} to {stop - 1} cannot be read, the file is "
                f"truncated or damaged: {error}"
            ) from error

    def slices(self, name: str) -> Iterator[np.ndarray]:
        """A column of the params table in pieces: whole columns of text fill the memory."""
        for start in range(0, self.n_rows, _TABLE_ROWS):
            yield self.params([name], start, min(start + _TABLE_ROWS, self.n_rows))[name]

    def order_problems(self) -> list[str]:
        """Columns that number the rows, but in another order than they lie in; one sentence for each.

        The order of a table can only be told from one of its columns: the index of a pandas table, or a column `id` or
        `row` that counts the spectra.
        """
        problems = []
        indices = {"the index": self._index} if self._index is not None else {}
        columns = {f"column {name!r}": self._columns[name] for name in ("id", "row") if name in self.columns}
        for name, column in (indices | columns).items():
            if (found := self._other_order(column)) is not None:
                row, number = found
                problems.append(
                    f"{name} of dataset/params numbers the spectra in another order than they lie in (row {row} "
                    f"has {number}): rows of params are taken to belong to the spectra of the same row; if "
                    "they do not, labels and identifiers are those of other stars"
                )
        return problems

    def _other_order(self, column: ParamColumn) -> tuple[int, int] | None:
        """The first row whose number is not the next one, and the number, if the column holds every number once."""

        def pieces() -> Iterator[tuple[int, np.ndarray]]:
            for start in range(0, self.n_rows, _TABLE_ROWS):
                with self._lock:
                    stop = min(start + _TABLE_ROWS, self.n_rows)
                    yield start, read_columns(self._file(), {"": column}, start, stop)[""]

        ends = []
        for _, values in pieces():
            if values.dtype.kind not in "iu" or self.n_rows < 2:
                return None
            ends += [int(values.min()), int(values.max())]
        least = min(ends)
        if max(ends) - least + 1 != self.n_rows:
            return None
        first = None
        there = np.zeros(self.n_rows, bool)
        for start, values in pieces():
            offset = (values - values.dtype.type(least)).astype(np.int64)
            there[offset] = True
            differs = np.flatnonzero(offset != np.arange(start, start + len(offset)))
            if first is None and len(differs):
                first = start + int(differs[0]), int(values[differs[0]])
        return first if there.all() else None

    def fingerprint(self) -> str:
        """SHA-256, as hex digits, that identifies the content at the cost of reading a few rows.

        It covers names, shapes and types of the arrays, the wave grid, the size of the file, and the values
        of up to 16 rows spread evenly from the first to the last, of every array and of the numeric params.
        Of a compressed array it takes the first 64 kB of up to 16 chunks as stored. A change of single
        values elsewhere is not seen. Name and time of the file do not matter.
        """
        digest = hashlib.sha256()
        header = {
            "size": self._size,
            "arrays": {name: [s.n_rows, s.n_pixels, s.dtype.str] for name, s in self._stored.items()},
            "columns": sorted(self.columns),
        }
        digest.update(json.dumps(header, sort_keys=True).encode())
        digest.update(self.wave.astype("<f8").tobytes())
        rows = np.unique(np.linspace(0, self.n_rows - 1, _FINGERPRINT_ROWS).astype(np.int64))
        for name, stored in self._stored.items():
            if stored.own_chunks:
                self._hash_chunks(stored, digest)
                continue
            for row in rows:
                digest.update(self.read(name, int(row), int(row) + 1).tobytes())
        # Row by row: whole columns of millions of rows would fill the memory.
        few = [self.params(None, int(row), int(row) + 1) for row in rows]
        for name in sorted(self.columns):
            if few[0][name].dtype.kind in "biuf":
                digest.update(np.concatenate([row[name] for row in few]).tobytes())
        return digest.hexdigest()

    def _hash_chunks(self, stored: _Stored, digest: Any) -> None:
        with self._lock:
            try:
                dataset = self._file()[stored.dataset]
                n_chunks = dataset.id.get_num_chunks()
                for index in np.unique(np.linspace(0, n_chunks - 1, _FINGERPRINT_ROWS).astype(np.int64)):
                    chunk = dataset.id.get_chunk_info(int(index))
                    piece = bytearray(min(chunk.size, _FINGERPRINT_CHUNK_BYTES))
                    self._fill(memoryview(piece), chunk.byte_offset)
                    digest.update(piece)
            except (OSError, RuntimeError, EOFError) as error:
                raise InputError(f"{self.path}: {stored.dataset} cannot be read: {error}") from error


def _convert(source: np.ndarray, target: np.ndarray) -> None:
    if target.dtype == np.bool_:
        np.not_equal(source, 0, out=target)
    else:
        np.copyto(target, source, casting="unsafe")


class SpectrumSet:
    """Spectra of one or more shards on one wave grid, numbered through in the order of the shards.

    Attributes
    ----------
    shards : tuple of Shard
        The files.
    n_rows, n_pixels : int
        Spectra in all shards, and pixels of each.
    wave : array of shape (p,), float64
        Wavelength of the pixels in Å.
    first_rows : array of shape (len(shards) + 1,), int64
        First row of each shard, and the number of rows at the end.
    failures : list of Failure
        Files left out when the set was opened, and blocks left out by `blocks`, with ``on_error="skip"``.

    Raises
    ------
    WaveGridError
        If the shards lie on different wave grids.
    """

    def __init__(self, shards: Sequence[Shard], failures: Sequence[Failure] = ()) -> None:
        if not shards:
            raise InputError("a set of spectra needs at least one file")
        for shard in shards[1:]:
            _check_wave(shard, shards[0])
        self.shards = tuple(shards)
        self.wave = shards[0].wave
        self.n_pixels = shards[0].n_pixels
        self.first_rows = np.cumsum([0, *(shard.n_rows for shard in shards)], dtype=np.int64)
        self.n_rows = int(self.first_rows[-1])
        self.failures: list[Failure] = list(failures)

    def __len__(self) -> int:
        return self.n_rows

    def __repr__(self) -> str:
        return f"SpectrumSet({self.n_rows} spectra in {len(self.shards)} files, {_describe_wave(self.wave)})"

    def close(self) -> None:
        """Release file handles and caches; the set stays usable."""
        for shard in self.shards:
            shard.close()

    def fingerprint(self) -> str:
        """SHA-256, as hex digits, of the fingerprints of the shards in their order."""
        digest = hashlib.sha256()
        for shard in self._closing():
            digest.update(shard.fingerprint().encode())
        return digest.hexdigest()

    @property
    def columns(self) -> tuple[str, ...]:
        """Params columns that every shard has."""
        return tuple(
            name for name in self.shards[0].columns if all(name in shard.columns for shard in self.shards)
        )

    def params(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Params columns of all shards, each an array of shape (n_rows,)."""
        names = list(names)
        pieces = [shard.params(names) for shard in self._closing()]
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in names}

    def labels(
        self, names: Sequence[str] = ("T_eff", "log_g", "M_H"), *, partial: bool = False
    ) -> dict[str, np.ndarray]:
        """Labels of every spectrum.

        Parameters
        ----------
        names : sequence of str
            Columns of the params table: T_eff in K, log_g and M_H in dex, …
        partial : bool
            Whether values that can be no labels (see `moefast.core.labels`) are given as NaN, or are an error.

        Returns
        -------
        dict of str to array of shape (n_rows,), float64

        Raises
        ------
        LabelError
            If a file lacks a column, a value can be no label, or, with `partial`, no spectrum has all labels.
        """
        out = {name: np.empty(self.n_rows) for name in names}
        problems = []
        for shard, first in zip(self.shards, self.first_rows, strict=False):
            missing = [name for name in names if name not in shard.columns]
            if missing:
                reasons = "".join(f"; {n!r} {shard.unreadable[n]}" for n in missing if n in shard.unreadable)
                raise LabelError(
                    f"{shard.path}: dataset/params lacks {', '.join(missing)}{reasons}; it has "
                    f"{', '.join(shard.columns) or 'no readable column'}. Labels are needed here"
                )
            values_of = shard.params(names)
            shard.close()
            for name, values in values_of.items():
                if values.dtype.kind not in "biuf":
                    raise LabelError(
                        f"{shard.path}: dataset/params: label {name} is {values.dtype}, not a number"
                    )
                if problem := describe_implausible(name, [values]):
                    problems.append(f"{shard.path}: dataset/params: {problem}")
                out[name][first : first + len(values)] = np.where(plausible(name, values), values, np.nan)
        if problems and not (partial and np.isfinite(np.sum([*out.values()], axis=0)).any()):
            raise LabelError("\n".join(problems))
        return out

    def has_labels(self, names: Sequence[str] = ("T_eff", "log_g", "M_H")) -> bool:
        """Whether every file has these columns, as numbers; some of them may be no labels."""
        return all(
            name in shard.columns and shard.params([name], 0, 1)[name].dtype.kind in "biuf"
            for shard in self._closing()
            for name in names
        )

    def label_notes(self, names: Sequence[str] = ("T_eff", "log_g", "M_H")) -> list[str]:
        """What to know about the labels: which are none, and whether their order may be another one."""
        notes = []
        for shard in self._closing():
            for name in names:
                if problem := describe_implausible(name, shard.slices(name)):
                    notes.append(f"{shard.path}: {problem}: these rows count as unlabelled")
            notes += [f"{shard.path}: {problem}" for problem in shard.order_problems()]
        return notes

    def _closing(self) -> Iterator[Shard]:
        """The shards, each closed before the next: thousands of them must not hold thousands of open files."""
        for shard in self.shards:
            yield shard
            shard.close()

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
        """Iterate over the spectra, block by block, in order.

        Parameters
        ----------
        block_rows : int
            Rows per block. Blocks end at multiples of it in their shard; the first and the last may be shorter.
        array : {"auto", "flux", "noisy"}
            What becomes `Block.flux`; "auto" is noisy where a file has it and flux elsewhere.
        rows : tuple of int, optional
            First row and the one after the last, rows of the set; all if None.
        params : sequence of str
            Columns to hand out with each block.
        prefetch : bool
            Whether a thread reads up to two blocks ahead.
        on_error : {"raise", "skip"}
            Whether unreadable rows end the iteration, or are left out and noted in `failures`; the other
            blocks keep their row numbers.

        Raises
        ------
        InputError
            If rows, an array or a column cannot be read.
        """
        start, stop = (0, self.n_rows) if rows is None else rows
        if block_rows < 1:
            raise ValueError(f"block_rows must be at least 1, found {block_rows}")
        if not 0 <= start <= stop <= self.n_rows:
            raise ValueError(f"rows {start} to {stop} asked for, the set has {self.n_rows}")
        if array not in {"auto", "flux", "noisy"}:
            raise ValueError(f"array must be 'auto', 'flux' or 'noisy', found {array!r}")
        if on_error not in {"raise", "skip"}:
            raise ValueError(f"on_error must be 'raise' or 'skip', found {on_error!r}")
        source = self._read_blocks(block_rows, array, (start, stop), list(params), on_error)
        return _ahead(source) if prefetch else source

    def _read_blocks(
        self, block_rows: int, array: str, rows: tuple[int, int], names: list[str], on_error: OnError
    ) -> Iterator[Block]:
        start, stop = rows
        memory, table = _Memory(), _Table(names)
        for index, shard in enumerate(self.shards):
            base = int(self.first_rows[index])
            first, last = max(start - base, 0), min(stop - base, shard.n_rows)
            if first >= last:
                continue
            which = array if array != "auto" else ("noisy" if "noisy" in shard.arrays else "flux")
            try:
                for row, end in block_edges(first, last, block_rows):
                    try:
                        yield self._read_block(memory, table, index, which, (row, end))
                    except InputError as error:
                        if on_error == "raise":
                            raise
                        self.failures.append(Failure(shard.path, (base + row, base + end), error))
            finally:
                shard.close()

    def _read_block(
        self, memory: _Memory, table: _Table, index: int, array: str, rows: tuple[int, int]
    ) -> Block:
        shard = self.shards[index]
        shape = (rows[1] - rows[0], self.n_pixels)
        flux = shard.read(array, *rows, out=memory.array(shape, np.float32))
        error = shard.read("error", *rows, out=memory.array(shape, np.float32))
        mask = None
        if "mask" in shard.arrays:
            mask = shard.read("mask", *rows, out=memory.array(shape, np.bool_))
            if not mask.any():
                mask = None
        params = table.rows(shard, *rows)
        return Block(int(self.first_rows[index]) + rows[0], index, flux, error, mask, params)


def block_edges(start: int, stop: int, block_rows: int) -> Iterator[tuple[int, int]]:
    """First row and the one after the last of each block of start … stop; blocks end at multiples of `block_rows`."""
    while start < stop:
        end = min(stop, start - start % block_rows + block_rows)
        yield start, end
        start = end


def _ahead(source: Iterator[Block]) -> Iterator[Block]:
    """Pass blocks on from a thread that reads ahead of the consumer."""
    blocks: queue.Queue[tuple[Block | None, BaseException | None]] = queue.Queue(maxsize=1)
    stopped = threading.Event()

    def work() -> None:
        failure: BaseException | None = None
        try:
            for block in source:
                blocks.put((block, None))
                del block
                if stopped.is_set():
                    break
        except BaseException as error:
            failure = error
        finally:
            source.close()  # type: ignore[attr-defined]
            blocks.put((None, failure))

    thread = threading.Thread(target=work, name="moefast-reader", daemon=True)
    thread.start()
    try:
        while True:
            block, failure = blocks.get()
            if failure is not None:
                raise failure
            if block is None:
                return
            yield block
            # The consumer is done with it; keeping the name would keep a third block in memory.
            del block
    finally:
        stopped.set()
        while thread.is_alive():
            try:
                blocks.get(timeout=0.02)
            except queue.Empty:
                continue
        thread.join()


def _check_wave(shard: Shard, first: Shard) -> None:
    if not same_wave(first.wave, shard.wave):
        raise WaveGridError(
            f"{shard.path}: another wave grid than {first.path}: {describe_difference(shard.wave, first.wave)}. "
            "Spectra of one run must share a grid"
        )


def open_spectra(
    paths: str | Path | Iterable[str | Path],
    *,
    on_error: OnError = "raise",
    check: Callable[[Shard], None] | None = None,
    open_shard: Callable[[Path], Shard] | None = None,
) -> SpectrumSet:
    """Open spectrum files as one set.

    Parameters
    ----------
    paths : str, Path or iterable of them
        Files, folders and patterns, see `find_files`.
    on_error : {"raise", "skip"}
        Whether a file that cannot be used is an error, or is left out and noted in `SpectrumSet.failures`.
    check : callable, optional
        Called with each shard; an `InputError` from it says that the file cannot be used.
    open_shard : callable, optional
        Opens a file; `Shard`, for HDF5 files as they are, if absent.

    Raises
    ------
    InputError
        If a file (with "skip": every file) cannot be used; of the kind that all files have in common.
    WaveGridError
        If the files lie on different wave grids.
    """
    if on_error not in {"raise", "skip"}:
        raise ValueError(f"on_error must be 'raise' or 'skip', found {on_error!r}")
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    check = check or (lambda shard: None)
    open_shard = open_shard or Shard
    if on_error == "raise":
        found = [open_shard(path) for path in find_files(given)]
        for shard in found:
            check(shard)
        return SpectrumSet(found)
    failures: list[Failure] = []
    shards: list[Shard] = []
    files: list[Path] = []
    for path in given:
        try:
            files.extend(find_files([path]))
        except InputError as error:
            failures.append(Failure(Path(path), None, error))
    for file in find_files(files) if files else []:
        try:
            shard = open_shard(file)
            check(shard)
            if shards:
                _check_wave(shard, shards[0])
            shards.append(shard)
        except InputError as error:
            failures.append(Failure(file, None, error))
    if not shards:
        if not failures:
            raise InputError("no files given")
        kinds = {type(failure.error) for failure in failures}
        kind = kinds.pop() if len(kinds) == 1 else InputError
        raise kind("\n".join(["none of the files can be used:", *(f"  {f.error}" for f in failures)]))
    return SpectrumSet(shards, failures)


class SpectrumWriter:
    """Write a spectrum file in the layout that `open_spectra` and the simulator's own tools read.

    Arrays become contiguous float32 datasets (the mask uint8), params a table that ``pandas.read_hdf(path,
    "dataset/params")`` reads. The file has its final name only once it is complete.

    Parameters
    ----------
    path : str or Path
        Final name.
    n_rows : int
        Number of spectra.
    wave : array of shape (p,)
        Wavelength of the pixels in Å.
    wave_edges : array of shape (p + 1,)
        Edges of the pixels in Å.
    arrays : sequence of str
        Which of flux, error, mask, noisy will be written.
    params : mapping of str to dtype
        Columns of the params table, numbers, bool or byte strings ("S8").
    attrs : mapping, optional
        Attributes of the root: numbers and text; anything else is stored as JSON.
    overwrite : bool
        Whether an existing file may be replaced.

    Raises
    ------
    OutputError
        If the file exists, cannot be written, or rows are missing at the end.

    Examples
    --------
    ::

        with SpectrumWriter(path, n_rows=n, wave=wave, wave_edges=edges, params={"log_g": "f8"}) as writer:
            writer.write(0, params={"log_g": log_g}, flux=flux, error=error)
    """

    def __init__(
        self,
        path: str | Path,
        *,
        n_rows: int,
        wave: np.ndarray,
        wave_edges: np.ndarray,
        arrays: Sequence[str] = ("flux", "error"),
        params: Mapping[str, Any] | None = None,
        attrs: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        wave, wave_edges = np.asarray(wave, dtype=np.float64), np.asarray(wave_edges, dtype=np.float64)
        if n_rows < 1:
            raise ValueError(f"n_rows must be at least 1, found {n_rows}")
        if wave.ndim != 1 or wave_edges.shape != (len(wave) + 1,):
            raise ValueError(
                f"wave of shape (p,) and wave_edges (p + 1,), not {wave.shape}, {wave_edges.shape}"
            )
        if not set(arrays) <= set(ARRAYS) or not arrays:
            raise ValueError(f"arrays must be of {', '.join(ARRAYS)}, found {', '.join(arrays)}")
        columns = {name: np.dtype(dtype) for name, dtype in (params or {}).items()}
        for name, dtype in columns.items():
            if dtype.kind not in "biufS" or (dtype.kind == "S" and not dtype.itemsize):
                raise ValueError(f"params column {name!r} is {dtype}, expected a number, bool or 'S<length>'")
            if not name.isidentifier() or name == "index":
                raise ValueError(f"params column {name!r}: a name must be an identifier, and not 'index'")
        self.n_rows, self.n_pixels = int(n_rows), len(wave)
        self.arrays, self.columns = tuple(arrays), columns
        self._written = np.zeros(self.n_rows, bool)
        self._lock, self._overwrite = threading.Lock(), overwrite
        self._partial = partial_path(self.path, overwrite=overwrite)
        try:
            # HDF5 loses errors of what it writes late, or ends the process; this file remembers them.
            self._watched = WatchedFile(self._partial)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error}") from error
        try:
            # Data that start on a page can be mapped and read without an unaligned first piece.
            self._file = h5py.File(
                self._watched,
                "w",
                libver=("earliest", "v110"),
                alignment_threshold=1 << 16,
                alignment_interval=4096,
            )
            self._create(wave, wave_edges, attrs or {})
            self._watched.check()
        except OSError as error:
            self.abort()
            raise OutputError(f"{self.path}: cannot be written: {error}") from error
        except BaseException:
            self.abort()
            raise

    def _create(self, wave: np.ndarray, wave_edges: np.ndarray, attrs: Mapping[str, Any]) -> None:
        file = self._file
        for name, value in attrs.items():
            plain = isinstance(value, str | bool | int | float | np.number | np.bool_)
            file.attrs[name] = value if plain else json.dumps(value, default=str)
        file["spectrumdataset/wave"] = wave
        file["spectrumdataset/wave_edges"] = wave_edges
        self._datasets = {
            name: file.create_dataset(
                f"dataset/arrays/{name}/value",
                (self.n_rows, self.n_pixels),
                np.uint8 if name == "mask" else np.float32,
            )
            for name in self.arrays
        }
        self._table = create_params_table(file, self.n_rows, self.columns) if self.columns else None

    def write(self, first_row: int, *, params: Mapping[str, Any] | None = None, **arrays: np.ndarray) -> None:
        """Write consecutive rows; calls may come in any order and from several threads.

        Parameters
        ----------
        first_row : int
            Row of the first spectrum.
        params : mapping of str to array of shape (n,)
            Every column of the table.
        **arrays : array of shape (n, p)
            Every array of the file.

        Raises
        ------
        OutputError
            If the rows were written before, or the disk refuses.
        """
        params = params or {}
        if set(arrays) != set(self.arrays):
            raise ValueError(f"arrays {', '.join(self.arrays)} expected, found {', '.join(arrays) or None}")
        if set(params) != set(self.columns):
            raise ValueError(f"params {', '.join(self.columns)} expected, found {', '.join(params) or None}")
        n = len(next(iter(arrays.values())))
        stop = first_row + n
        if not 0 <= first_row <= stop <= self.n_rows:
            raise ValueError(f"rows {first_row} to {stop} do not fit a file of {self.n_rows}")
        for name, array in arrays.items():
            if np.shape(array) != (n, self.n_pixels):
                raise ValueError(f"{name}: shape ({n}, {self.n_pixels}) expected, found {np.shape(array)}")
        if self._table is not None:
            rows = np.zeros(n, self._table.dtype)
            rows["index"] = np.arange(first_row, stop)
            for name, dtype in self.columns.items():
                values = np.asarray(params[name])
                if values.shape != (n,):
                    raise ValueError(f"params {name}: shape ({n},) expected, found {values.shape}")
                if values.dtype.kind == "U":
                    values = np.char.encode(values, "utf-8")
                if values.dtype.kind == "S" and values.dtype.itemsize > dtype.itemsize:
                    raise ValueError(f"params {name}: {dtype.itemsize} bytes do not hold {values.dtype}")
                rows[name] = values
        with self._lock:
            if self._written[first_row:stop].any():
                raise OutputError(f"{self.path}: rows {first_row} to {stop - 1} have been written before")
            try:
                for name, array in arrays.items():
                    values = np.asarray(array)
                    dataset = self._datasets[name]
                    values = values != 0 if name == "mask" else values
                    dataset[first_row:stop] = values.astype(dataset.dtype, copy=False)
                if self._table is not None:
                    self._table[first_row:stop] = rows
                self._watched.check()
            except OSError as error:
                raise OutputError(f"{self.path}: rows {first_row} to {stop - 1}: {error}") from error
            self._written[first_row:stop] = True

    def abort(self) -> None:
        """Give up: close and remove what has been written."""
        # What is still to be written has nowhere to go: closing must not fail.
        self._watched.problem = self._watched.problem or OutputError(f"{self.path}: given up")
        try:
            if hasattr(self, "_file"):
                self._file.close()
        finally:
            self._watched.close()
            remove_quietly(self._partial)

    def close(self) -> None:
        """Complete the file and give it its final name.

        Raises
        ------
        OutputError
            If rows are missing; nothing is left then.
        """
        missing = np.flatnonzero(~self._written)
        if len(missing):
            self.abort()
            raise OutputError(f"{self.path}: {len(missing)} rows were not written, the first is {missing[0]}")
        try:
            try:
                self._file.close()
                self._watched.synchronise()
                self._watched.close()
                self._watched.check()
            except (OSError, RuntimeError) as error:
                raise OutputError(f"{self.path}: could not be completed: {error}") from error
            publish(self._partial, self.path, overwrite=self._overwrite)
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()
