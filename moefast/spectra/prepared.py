"""Survey files as shards on a model's grid: what is behind this door knows no layout.

Design: a `PreparedShard` has the interface of `moefast.spectra.shard.Shard`. Its flux is f_λ at rest on the grid that
was asked for, divided by its median where the file's is not. A shard may be many files of one star each, so that they
are read and predicted in blocks of many rows (`opening.py` puts them together). What is wrong with a single row costs
that row alone: it is handed out without a good pixel, and the fault is kept in `faults`.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import InputError
from moefast.kernels.resample import normalise
from moefast.spectra.blocks import Memory
from moefast.spectra.layouts.registry import SurveyFile, damage
from moefast.spectra.resample import SAME, Pixels, faults_of_wavelengths, on_grid
from moefast.spectra.shard import Shard
from moefast.spectra.source import Block
from moefast.spectra.telluric import CHOICES, Telluric, without_telluric, words_of_ranges
from moefast.spectra.units import LIGHT_SPEED, air_to_vacuum
from moefast.spectra.wave import other_unit

__all__ = [
    "MEDIA",
    "Preparation",
    "PreparedShard",
    "in_vacuum",
    "prepare_rows",
]

MEDIA = ("auto", "vacuum", "air")
FINGERPRINT_FILES = 16
BESIDE_GRID = 0.01
"""Share of the wavelength by which more than the grid is read on either side."""


@dataclass(frozen=True)
class Preparation:
    """What is done to spectra before a model sees them.

    Attributes
    ----------
    wave : array of shape (p,), Å
        The grid that they are put on, vacuum.
    medium : "auto", "vacuum" or "air"
        What wavelengths are in; "auto" is what the file says, or what its survey uses.
    moving : bool
        Whether velocities will be given.
    telluric : "auto", "mask" or "keep"
        Whether pixels where the Earth's atmosphere absorbs are bad; "auto" says so of spectra that came through it.
    """

    wave: NDArray[np.float64]
    medium: Literal["auto", "vacuum", "air"] = "auto"
    moving: bool = False
    telluric: Telluric = "auto"

    def __post_init__(self) -> None:
        if self.telluric not in CHOICES:
            raise InputError(f"telluric must be one of {', '.join(CHOICES)}, found {self.telluric!r}")
        if self.medium not in MEDIA:
            raise InputError(f"medium must be one of {', '.join(MEDIA)}, found {self.medium!r}")

    def medium_of(self, file: SurveyFile) -> Literal["vacuum", "air"]:
        """What the wavelengths of a file are in."""
        return file.medium if self.medium == "auto" else self.medium

    def masks(self, file: SurveyFile) -> bool:
        """Whether the Earth's absorption counts as bad in a file."""
        return self.telluric == "mask" or (self.telluric == "auto" and file.through_atmosphere)


def in_vacuum(arm: Pixels) -> Pixels:
    """Spectra whose wavelengths are in air, in vacuum."""
    return replace(arm, wave=air_to_vacuum(arm.wave))


def prepare_rows(
    arms: Sequence[Pixels],
    factor: NDArray[np.float64],
    wave: NDArray[np.float64],
    *,
    scale: bool,
    memory: Memory | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], dict[int, str]]:
    """Flux, error and mask (n, p) of measured spectra on a grid, and what is wrong with single rows.

    Parameters
    ----------
    arms : sequence of Pixels
        Wavelengths in vacuum.
    factor : array of shape (n,)
        1 + v/c.
    wave : array of shape (p,), Å
    scale : bool
        Divide each spectrum by the median of its good pixels.
    memory : Memory, optional
        See `on_grid`.
    """
    found = on_grid(arms, factor, wave, memory)
    for row in found.faults:
        found.mask[row] = True
    if scale:
        normalise(found.flux, found.error, found.mask)
    return found.flux, found.error, found.mask, found.faults


class PreparedShard(Shard):
    """Spectra of one file, or of many files of one star each, on a model's grid.

    Attributes
    ----------
    paths : tuple of Path
        The files; `path` is the first.
    layouts : tuple of str
        Of each file.
    identifiers : tuple of str
        Columns that go into every table of predictions.
    notes : list of str
        What users must know of these files.
    faults : dict of int to InputError
        Rows that were handed out without a good pixel, as far as they were read.
    """

    def __init__(self, files: Sequence[SurveyFile], preparation: Preparation) -> None:
        self.files = tuple(files)
        self.preparation = preparation
        self.paths = tuple(file.path for file in files)
        self.path = self.paths[0]
        self.first_rows = np.cumsum([0, *(file.n_rows for file in files)], dtype=np.int64)
        self.n_rows = int(self.first_rows[-1])
        self.wave, self.n_pixels = preparation.wave, len(preparation.wave)
        self._ask_for(np.ones(1))
        self.arrays = (*files[0].arrays, "error", "mask")
        self.dtypes = {name: np.dtype(bool if name == "mask" else np.float32) for name in self.arrays}
        self.layout = dict.fromkeys(self.arrays, files[0].layout)
        self.layouts = tuple(file.layout for file in files)
        self.columns = tuple(name for name in files[0].columns if all(name in file.columns for file in files))
        self.identifiers = tuple(name for name in files[0].identifiers if name in self.columns)
        self.unreadable, self.attrs = {}, {}
        self.faults: dict[int, InputError] = {}
        self._velocity: NDArray[np.float64] | None = None
        self._lock = threading.RLock()
        self._held: tuple[tuple[str, int, int], dict[str, NDArray]] | None = None

    def __getstate__(self) -> dict[str, object]:
        raise TypeError("prepared spectra belong to one process")

    def set_velocity(self, velocity: NDArray[np.float64]) -> None:
        """Velocities (n_rows,) in km/s that will be removed."""
        if velocity.shape != (self.n_rows,):
            raise ValueError(f"{self.n_rows} velocities expected, found shape {velocity.shape}")
        with self._lock:
            self._velocity, self._held = velocity, None
        if len(velocity):
            self._ask_for(1 + velocity / LIGHT_SPEED)

    def _ask_for(self, factor: NDArray[np.float64]) -> None:
        """Tell the files which wavelengths are needed; `factor` are those of λ over λ at rest."""
        needed = float(self.wave[0] * factor.min()), float(self.wave[-1] * factor.max())
        for file in self.files:
            file.needed = needed[0] * (1 - BESIDE_GRID), needed[1] * (1 + BESIDE_GRID)

    @property
    def observed(self) -> bool:
        """Whether these are spectra of a survey, barycentric, and not of a simulator that leaves stars at rest."""
        return any(file.through_atmosphere for file in self.files)

    def in_any_order(self, *arrays: str) -> bool:
        """Never: files are read one after the other, and that of the spectra before may still be open."""
        return False

    def measured(self, array: str, start: int, stop: int) -> list[Pixels]:
        """Rows of an array as they were measured, arm by arm, wavelengths in vacuum; see `at_velocity` and `fill`."""
        with self._lock:
            return self._gathered(array, start, stop)

    def at_velocity(
        self, arms: Sequence[Pixels], velocity: NDArray[np.float64], rows: NDArray[np.intp]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
        """Flux, error and mask on the model's grid of some rows of `measured`, velocities [km/s] of each removed."""
        factor = 1 + velocity / LIGHT_SPEED
        taken = [arm.take(rows) for arm in arms]
        return prepare_rows(taken, factor, self.wave, scale=not self.files[0].normalised)[:3]

    def fill(self, block: Block, first_row: int) -> None:
        """Put the spectra of a block on the grid, in place; `first_row` is the row of the shard that it starts with."""
        if block.measured is not None:
            block.flux, block.error, block.mask = self._on_grid(block.measured, first_row)

    def wrong_rows(self, arms: Sequence[Pixels], first_row: int) -> NDArray[np.bool_]:
        """Rows of `measured` that have no good pixel at any velocity, because of a fault; it is kept in `faults`."""
        for arm in arms:
            for row, text in faults_of_wavelengths(
                arm, self._factor(first_row, arm.n_rows), self.wave
            ).items():
                self._fault(first_row + row, text)
        return np.array([row in self.faults for row in range(first_row, first_row + arms[0].n_rows)], bool)

    def _factor(self, first_row: int, n: int) -> NDArray[np.float64]:
        """λ over λ at rest, with the velocities that were given."""
        factor = np.ones(n)
        if self._velocity is not None:
            factor += self._velocity[first_row : first_row + n] / LIGHT_SPEED
        return factor

    @property
    def notes(self) -> list[str]:
        """What users must know of these files, each thing once."""
        notes = [file.wider for file in self.files if file.wider and not _made_for(self.wave, file.grid)]
        notes += [note for file in self.files for note in file.notes]
        notes += [_beside(file, self.wave) for file in self.files if _beside(file, self.wave)]
        if any(self.preparation.masks(file) for file in self.files):
            notes.append(
                f"pixels where the Earth's atmosphere absorbs ({words_of_ranges()} Å) count as bad; --telluric keep "
                "uses them"
            )
        return list(dict.fromkeys(notes))

    def close(self) -> None:
        """Release file handles and the block that is held."""
        with self._lock:
            self._held = None
            for file in self.files:
                file.close()

    def read(self, array: str, start: int, stop: int, out: NDArray | None = None) -> NDArray:
        """Rows of an array; see `Shard.read`."""
        if array not in self.arrays:
            raise InputError(f"{self.path}: has no array {array!r}; it has {', '.join(self.arrays)}")
        if not 0 <= start <= stop <= self.n_rows:
            raise ValueError(f"rows {start} to {stop} asked for, the shard has {self.n_rows}")
        with self._lock:
            held = self._held
            of_flux = array in {"error", "mask"}
            if held is None or held[0][1:] != (start, stop) or not (of_flux or held[0][0] == array):
                which = self.files[0].arrays[0] if of_flux else array
                made = self._on_grid(self._gathered(which, start, stop), start)
                held = self._held = (
                    (which, start, stop),
                    dict(zip(("flux", "error", "mask"), made, strict=True)),
                )
            values = held[1]["flux" if not of_flux else array]
        if out is None:
            return values.copy()
        np.copyto(out, values, casting="unsafe")
        return out

    def _gathered(self, array: str, start: int, stop: int) -> list[Pixels]:
        pieces = []
        row = start
        while row < stop:
            index = int(np.searchsorted(self.first_rows, row, side="right")) - 1
            end = min(stop, int(self.first_rows[index + 1]))
            pieces.append(self._measured(index, array, row, end))
            row = end
        return _stacked(pieces)

    def _on_grid(
        self, arms: Sequence[Pixels], start: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
        """Flux, error and mask of rows from `start` on, velocities removed."""
        n = arms[0].n_rows
        flux, error, mask, faults = prepare_rows(
            arms, self._factor(start, n), self.wave, scale=not self.files[0].normalised
        )
        for bad, text in faults.items():
            self._fault(start + bad, text)
        for row in range(n):
            if start + row in self.faults:
                mask[row] = True
        return flux, error, mask

    def _measured(self, index: int, array: str, row: int, end: int) -> list[Pixels]:
        file, base = self.files[index], int(self.first_rows[index])
        try:
            with damage(file.path, f"rows {row - base} to {end - base - 1}"):
                arms, faults = file.read(array, row - base, end - base)
        except InputError as error:
            if len(self.files) == 1:
                raise
            # Of many files one cannot be read: its row, and no other, is lost.
            self.faults.setdefault(row, error)
            return []
        finally:
            if len(self.files) > 1:
                file.close()
        for bad, text in faults.items():
            self._fault(row + bad, text)
        if self.preparation.medium_of(file) == "air":
            arms = [in_vacuum(arm) for arm in arms]
        return [without_telluric(arm) for arm in arms] if self.preparation.masks(file) else arms

    def _fault(self, row: int, text: str) -> None:
        index, own = self.origin(row)
        where = (
            f"{self.files[index].path}: row {own}"
            if self.files[index].n_rows > 1
            else str(self.files[index].path)
        )
        self.faults.setdefault(row, InputError(f"{where}: {text}"))

    def origin(self, row: int) -> tuple[int, int]:
        """Index of the file that a row comes from, and its row there."""
        index = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        return index, row - int(self.first_rows[index])

    def params(
        self, names: Iterable[str] | None = None, start: int = 0, stop: int | None = None
    ) -> dict[str, NDArray]:
        """Columns; see `Shard.params`."""
        stop = self.n_rows if stop is None else stop
        first, last = np.searchsorted(self.first_rows, [start, max(start, stop - 1)], side="right") - 1
        out = {}
        for name in self.columns if names is None else names:
            if name not in self.columns:
                raise InputError(f"{self.path}: has no column {name!r}; it has {', '.join(self.columns)}")
            pieces = [
                file.columns[name][max(start - base, 0) : max(stop - base, 0)]
                for file, base in zip(
                    self.files[first : last + 1], self.first_rows[first : last + 1].tolist(), strict=True
                )
            ]
            out[name] = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return out

    def order_problems(self) -> list[str]:
        """What an order of rows that may be wrong shows by; see `Shard.order_problems`."""
        return [
            text for file in self.files if file.order_problems is not None for text in file.order_problems()
        ]

    def fingerprint(self) -> str:
        """SHA-256, as hex digits, of all columns, and of sizes, headers and first data of up to 16 files."""
        digest = hashlib.sha256()
        for name in self.columns:
            digest.update(name.encode())
            for values in self.slices(name):
                digest.update(values.tobytes())
        # As of a large file, single values of many small ones are not seen.
        looked_at = np.unique(np.linspace(0, len(self.files) - 1, FINGERPRINT_FILES).astype(int))
        for file in (self.files[index] for index in looked_at):
            if file.fingerprint is not None:
                with damage(file.path, "headers and data"):
                    digest.update(file.fingerprint().encode())
                file.close()
        return digest.hexdigest()


def _beside(file: SurveyFile, wave: NDArray[np.float64]) -> str:
    """That the wavelengths of a file do not reach a grid, in words; empty if they do, or are those of each row."""
    grid = file.grid
    if grid is None or (grid[0] < wave[-1] and grid[-1] > wave[0]):
        return ""
    return (
        f"{file.path}: wavelengths from {grid[0]:g} to {grid[-1]:g} Å do not reach the model's, {wave[0]:.1f} to "
        f"{wave[-1]:.1f} Å: {other_unit(grid, wave) or 'another arm, or another unit?'}"
    )


def _made_for(wave: NDArray[np.float64], grid: NDArray[np.float64] | None) -> bool:
    """Whether the pixels of a model are pixels of a file."""
    if grid is None:
        return False
    at = np.clip(np.searchsorted(grid, wave), 1, len(grid) - 1)
    nearest = np.minimum(np.abs(grid[at] - wave), np.abs(grid[at - 1] - wave))
    return bool(np.all(nearest < SAME * np.abs(np.gradient(wave))))


def _stacked(pieces: Sequence[list[Pixels]]) -> list[Pixels]:
    """Rows of several files, arm by arm; a file that could not be read has no arms, and a row without pixels."""
    if len(pieces) == 1:
        return pieces[0]
    empty = np.empty(0)
    nothing = Pixels(empty, empty, empty, np.empty(0, bool), np.zeros(2, np.int64))
    n_arms = max(1, *(len(arms) for arms in pieces))
    return [
        _one_after_the_other([arms[k] if k < len(arms) else nothing for arms in pieces])
        for k in range(n_arms)
    ]


def _one_after_the_other(arms: Sequence[Pixels]) -> Pixels:
    """Rows of several files as rows of one, each with its own wavelengths."""
    waves = [arm.wave if len(arm.wave) == len(arm.flux) else np.tile(arm.wave, arm.n_rows) for arm in arms]
    lengths = np.concatenate([np.diff(arm.starts) for arm in arms])
    return Pixels(
        np.concatenate(waves),
        np.concatenate([arm.flux for arm in arms]),
        np.concatenate([arm.error for arm in arms]),
        np.concatenate([arm.bad for arm in arms]),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        next((arm.where for arm in arms if arm.where), ""),
    )
