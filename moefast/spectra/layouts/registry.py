"""What kinds of spectrum files there are, and which one a file is.

Design: a layout registers itself at the end of its own file; `LAYOUTS` is what tests, messages and documents iterate
over. A layout knows its survey: HDUs, names, mask bits, units. What it gives, a `SurveyFile`, knows no survey any more:
spectra as they were measured, in f_λ at wavelengths in Å, and columns with one value for each of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import InputError, MoefastError
from moefast.spectra.layouts.fits_file import FitsFile, Hdu
from moefast.spectra.resample import Pixels
from moefast.spectra.units import flux_factor, wave_factor

__all__ = [
    "LAYOUTS",
    "Layout",
    "Reader",
    "StoredColumn",
    "SurveyFile",
    "check_units",
    "check_wavelengths",
    "damage",
    "fingerprint_of",
    "known_layouts",
    "noting",
    "open_survey_file",
    "register",
    "stored_columns",
]

Medium = Literal["vacuum", "air"]


class Reader(Protocol):
    """Gives rows of a file."""

    def __call__(self, array: str, start: int, stop: int) -> tuple[list[Pixels], dict[int, str]]:
        """Rows `start` to `stop` of an array, arm by arm, and what is wrong with single ones (counted from `start`)."""


@dataclass(frozen=True)
class StoredColumn:
    """A column that is read when rows of it are asked for: of millions of rows, all columns do not fit into memory.

    Attributes
    ----------
    n_rows : int
    read : callable
        Gives rows `start` to `stop`.
    """

    n_rows: int
    read: Callable[[int, int], NDArray]

    @property
    def shape(self) -> tuple[int]:
        """As an array's."""
        return (self.n_rows,)

    def __getitem__(self, rows: slice) -> NDArray:
        start, stop, _ = rows.indices(self.n_rows)
        return self.read(start, stop)


def stored_columns(file: FitsFile, table: Hdu) -> dict[str, StoredColumn]:
    """Columns of a FITS table with one value in a row, to be read later."""
    few = file.table(table, stop=min(1, table.n_rows))

    def column(name: str) -> StoredColumn:
        return StoredColumn(table.n_rows, lambda start, stop: file.table(table, [name], start, stop)[name])

    return {name: column(name) for name, values in few.items() if values.ndim == 1}


@dataclass
class SurveyFile:
    """Spectra of one file, whatever its layout.

    Attributes
    ----------
    path : Path
    layout : str
        Name of the layout.
    n_rows : int
    columns : dict of str to array of shape (n_rows,), or StoredColumn
        Identifiers, conditions and labels.
    identifiers : tuple of str
        Columns that go into every table of predictions.
    read : callable
        See `Reader`.
    close : callable
        Releases what `read` holds.
    arrays : tuple of str
        Which arrays can be read: flux, and noisy where a simulator keeps both.
    medium : "vacuum" or "air"
        What the wavelengths are in.
    normalised : bool
        Whether flux is divided by its median already, as training sets are.
    through_atmosphere : bool
        Whether the Earth's absorption is in the spectra: in all but those of a simulator that leaves it out.
    notes : list of str
        What users must know: another line-spread function, values that were taken for bad.
    wider : str
        What users of a model on another grid must know, because it was fitted for another line-spread function.
    grid : array of shape (k,), Å, or None
        Pixels that all rows share, in increasing order; those of a model that was made for such files are among them.
    line_spread : callable, optional
        Gives the FWHM [Å] of the line-spread function at each pixel of each arm, in the order of `read`, or None for an
        arm of which it is not known; for files whose rows share their wavelengths.
    needed : (float, float)
        Wavelengths [Å] that are needed; arms that lie outside may be left out.
    fingerprint, order_problems : callable, optional
        As of `moefast.spectra.shard.Shard`.
    """

    path: Path
    layout: str
    n_rows: int
    columns: Mapping[str, NDArray | StoredColumn]
    identifiers: tuple[str, ...]
    read: Reader
    close: Callable[[], None]
    arrays: tuple[str, ...] = ("flux",)
    medium: Medium = "vacuum"
    normalised: bool = False
    through_atmosphere: bool = True
    notes: list[str] = field(default_factory=list)
    wider: str = ""
    grid: NDArray[np.float64] | None = None
    line_spread: Callable[[], list[NDArray[np.float64] | None]] | None = None
    needed: tuple[float, float] = (0.0, np.inf)
    fingerprint: Callable[[], str] | None = None
    order_problems: Callable[[], list[str]] | None = None

    def __post_init__(self) -> None:
        for name, values in self.columns.items():
            if values.shape != (self.n_rows,):
                raise InputError(
                    f"{self.path}: column {name}: {self.n_rows} values expected, found shape {values.shape}"
                )


@dataclass(frozen=True)
class Layout:
    """A kind of FITS file.

    Attributes
    ----------
    name : str
        What the survey calls it.
    recognises : callable
        Whether a file is of this kind.
    open : callable
        Gives its spectra, or raises `InputError` if such files are refused, saying what to use instead.
    """

    name: str
    recognises: Callable[[FitsFile], bool]
    open: Callable[[FitsFile], SurveyFile]


LAYOUTS: dict[str, Layout] = {}
"""By name, in the order in which files are compared with them."""
_SURVEYS = ("pfs", "desi")


def register(layout: Layout) -> Layout:
    """Add a layout."""
    if layout.name in LAYOUTS:
        raise ValueError(f"there is a layout {layout.name} already")
    LAYOUTS[layout.name] = layout
    return layout


def known_layouts() -> dict[str, Layout]:
    """All layouts; imports the files that hold them."""
    for survey in _SURVEYS:
        import_module(f"moefast.spectra.layouts.{survey}")
    return LAYOUTS


@contextmanager
def damage(path: str | Path, what: str) -> Iterator[None]:
    """Raise InputError, with the file's name, for whatever damaged headers, types and shapes make others raise."""
    try:
        yield
    except MoefastError as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error
    except Exception as error:
        raise InputError(
            f"{path}: {what} cannot be read, the file is damaged ({type(error).__name__}: {error}); copy or produce it "
            "again"
        ) from error


def open_survey_file(path: str | Path) -> SurveyFile:
    """Open a FITS file of any layout.

    Raises
    ------
    InputError
        If it cannot be read, is of no known layout, or of one that is refused.
    """
    with damage(path, "headers and tables"):
        file = FitsFile(path)
        try:
            for layout in known_layouts().values():
                if layout.recognises(file):
                    return layout.open(file)
        finally:
            # Thousands of files must not be open at the same time.
            file.close()
    raise InputError(
        f"{path}: no known layout of spectra: it has HDUs {', '.join(hdu.name or '(no name)' for hdu in file.hdus)}. "
        f"Known are {', '.join(LAYOUTS)}, and the HDF5 files of the PFS simulator"
    )


def check_wavelengths(file: FitsFile, hdu: Hdu, wave: NDArray[np.float64]) -> None:
    """Refuse a file whose rows share wavelengths that are not finite or not increasing."""
    wrong = np.flatnonzero(~np.isfinite(wave))
    if len(wrong):
        raise InputError(f"{file.path}: HDU {hdu.name}: wavelength of pixel {wrong[0]} is not finite")
    wrong = np.flatnonzero(np.diff(wave) <= 0)
    if len(wrong):
        raise InputError(
            f"{file.path}: HDU {hdu.name}: wavelength of pixel {wrong[0] + 1} is not above the one before it"
        )


def check_units(file: FitsFile, hdu: Hdu, wave: str, flux: str) -> None:
    """Refuse a file whose units are none of a length and of a flux density."""
    where = f"HDU {hdu.name}"
    with damage(file.path, where):
        wave_factor(wave, where)
        flux_factor(flux, np.ones(1), where)


def noting(notes: list[str]) -> Callable[[str], None]:
    """Something that adds to notes what they do not say yet."""

    def note(text: str) -> None:
        if text not in notes:
            notes.append(text)

    return note


def fingerprint_of(file: FitsFile) -> str:
    """SHA-256 of the size of a file, its HDUs, and the first 64 kB of each one's data."""
    digest = hashlib.sha256(str(file.n_bytes).encode())
    for hdu in file.hdus:
        digest.update(f"{hdu.name} {hdu.n_bytes} {sorted(map(str, hdu.header.items()))}".encode())
        digest.update(bytes(file.head(hdu)))
    return digest.hexdigest()
