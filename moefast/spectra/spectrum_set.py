"""Spectra of several files as one set, numbered through, and read block by block."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from moefast.core.errors import InputError, LabelError, WaveGridError
from moefast.core.labels import describe_implausible, plausible
from moefast.spectra.blocks import BlockMemory, ParamsReader, read_ahead
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
        return f"SpectrumSet({self.n_rows} spectra in {len(self.shards)} files, {describe_wave(self.wave)})"

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
        measured: bool = False,
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
        measured : bool
            Whether spectra that must be put on the grid are handed out as they were measured (`Block.measured`), so
            that whoever takes the block does that work, and not the reader, for whom others wait.

        Raises
        ------
        InputError
            If rows, an array or a column cannot be read.
        """
        asked = rows_of_request(self.n_rows, block_rows, array, rows, on_error)
        source = self._read_blocks(block_rows, array, asked, list(params), on_error, measured)
        return read_ahead(source) if prefetch else source

    def _read_blocks(
        self,
        block_rows: int,
        array: str,
        rows: tuple[int, int],
        names: list[str],
        on_error: OnError,
        measured: bool,
    ) -> Iterator[Block]:
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
                    try:
                        yield self._read_block(memory, table, index, which, (row, end), measured)
                    except InputError as error:
                        if on_error == "raise":
                            raise
                        self.failures.append(Failure(shard.path, (base + row, base + end), error))
            finally:
                shard.close()

    def _read_block(
        self,
        memory: BlockMemory,
        table: ParamsReader,
        index: int,
        array: str,
        rows: tuple[int, int],
        measured: bool,
    ) -> Block:
        shard, first_row = self.shards[index], int(self.first_rows[index]) + rows[0]
        shape = (rows[1] - rows[0], self.n_pixels)
        pixels = shard.measured(array, *rows) if measured else None
        if pixels is not None:
            empty = np.empty(shape, np.float32)
            return Block(first_row, index, empty, empty, None, table.rows(shard, *rows), pixels)
        flux = shard.read(array, *rows, out=memory.array(shape, np.float32))
        error = shard.read("error", *rows, out=memory.array(shape, np.float32))
        mask = None
        if "mask" in shard.arrays:
            mask = shard.read("mask", *rows, out=memory.array(shape, np.bool_))
            if not mask.any():
                mask = None
        params = table.rows(shard, *rows)
        return Block(first_row, index, flux, error, mask, params)


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
