"""Spectra of several files as one set, numbered through, and read block by block."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from moefast.core.errors import InputError, LabelError, WaveGridError
from moefast.core.labels import describe_implausible, plausible
from moefast.core.text import counted
from moefast.spectra.blocks import BlockMemory, Memory, ParamsReader, read_ahead
from moefast.spectra.paths import find_files
from moefast.spectra.shard import Shard
from moefast.spectra.source import Block, Failure, OnError, block_edges, rows_of_request
from moefast.spectra.wave import describe_difference, describe_wave, same_wave

__all__ = ["SpectrumSet", "open_spectra"]


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
        return (
            f"SpectrumSet({counted(self.n_rows, 'spectrum')} in {counted(len(self.shards), 'file')}, "
            f"{describe_wave(self.wave)})"
        )

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
        asked = rows_of_request(self.n_rows, block_rows, array, rows, on_error)
        source = self._filled(self._unfilled(block_rows, array, asked, list(params)), on_error)
        return read_ahead(source) if prefetch else source

    def unfilled(
        self,
        block_rows: int,
        *,
        array: Literal["auto", "flux", "noisy"] = "auto",
        rows: tuple[int, int] | None = None,
        params: Sequence[str] = (),
    ) -> Iterator[Block]:
        """Blocks as those of `blocks`, whose spectra are for `fill` to read, or to put on the grid.

        What only one thread can read, in order, is read already. No error of reading is raised here.
        """
        asked = rows_of_request(self.n_rows, block_rows, array, rows, "raise")
        return self._unfilled(block_rows, array, asked, list(params))

    def fill(self, block: Block, memory: Memory) -> None:
        """Put the spectra of a block of `unfilled` into `memory`; several threads may, each with a block of its own.

        Blocks of a shard that are filled after later ones were taken leave its file open: close it then.

        Raises
        ------
        InputError
            If rows, an array or a column cannot be read; `lost` tells which rows these are.
        """
        shard = self.shards[block.shard]
        first_row = block.first_row - int(self.first_rows[block.shard])
        if block.unread:
            self._read(block, first_row, memory)
        if block.problem is not None:
            raise block.problem
        if block.measured is not None:
            shard.fill(block, first_row)
        if block.mask is not None and not block.mask.any():
            block.mask = None

    def lost(self, block: Block, error: InputError) -> Failure:
        """The rows of a block that cannot be read."""
        rows = block.rows
        return Failure(self.shards[block.shard].path, (rows.start, rows.stop), error)

    def _filled(self, source: Generator[Block, None, None], on_error: OnError) -> Iterator[Block]:
        memory = BlockMemory()
        # Closed at once where this ends early, and with it the file.
        with contextlib.closing(source):
            for block in source:
                try:
                    self.fill(block, memory)
                except InputError as error:
                    if on_error == "raise":
                        raise
                    self.failures.append(self.lost(block, error))
                    continue
                yield block
                # Whoever took it is done with it; keeping the name would keep another block in memory.
                del block

    def _unfilled(
        self, block_rows: int, array: str, rows: tuple[int, int], names: list[str]
    ) -> Generator[Block, None, None]:
        start, stop = rows
        memory, table = BlockMemory(), ParamsReader(names)
        for index, shard in enumerate(self.shards):
            base = int(self.first_rows[index])
            first, last = max(start - base, 0), min(stop - base, shard.n_rows)
            if first >= last:
                continue
            which = array if array != "auto" else ("noisy" if "noisy" in shard.arrays else "flux")
            try:
                for row, end in block_edges(first, last, block_rows):
                    nothing = np.broadcast_to(np.float32(np.nan), (end - row, self.n_pixels))
                    block = Block(base + row, index, nothing, nothing, unread=which)
                    try:
                        if not shard.in_any_order(which, "error", "mask"):
                            self._read(block, row, memory)
                        block.params = table.rows(shard, row, end)
                    except InputError as error:
                        block.problem = error
                    yield block
                    del block
            finally:
                shard.close()

    def _read(self, block: Block, first_row: int, memory: Memory) -> None:
        shard, shape = self.shards[block.shard], block.flux.shape
        rows = first_row, first_row + len(block)
        array, block.unread = block.unread, ""
        block.measured = shard.measured(array, *rows)
        if block.measured is None:
            block.flux = shard.read(array, *rows, out=memory.array("flux", shape))
            block.error = shard.read("error", *rows, out=memory.array("error", shape))
            if "mask" in shard.arrays:
                block.mask = shard.read("mask", *rows, out=memory.array("mask", shape))


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
    open_shard: Callable[[Path], Shard] | None = None,
) -> SpectrumSet:
    """Open spectrum files as one set.

    Parameters
    ----------
    paths : str, Path or iterable of them
        Files, folders and patterns, see `find_files`.
    on_error : {"raise", "skip"}
        Whether a file that cannot be used is an error, or is left out and noted in `SpectrumSet.failures`.
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
    open_shard = open_shard or Shard
    if on_error == "raise":
        return SpectrumSet([open_shard(path) for path in find_files(given)])
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
