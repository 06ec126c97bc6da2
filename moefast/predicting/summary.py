"""What a prediction run did."""

from __future__ import annotations

from dataclasses import dataclass, field

from numpy.typing import NDArray

from moefast.spectra.source import Failure

__all__ = ["Summary"]


@dataclass
class Summary:
    """What a prediction run did.

    Attributes
    ----------
    n_rows : int
        Rows scored, bad ones included.
    seconds, spectra_per_second : float
        Wall time from the first read to the closed table.
    backend, device : str
        Really used.
    reason : str
        Why this backend.
    array : str
        Which array was scored.
    model : str
        Name of the model.
    r2 : float or None
        If labels are present; rows without a prediction count as the label mean.
    flags : dict of str to int
        Rows per flag.
    failures : list of Failure
        Files or rows that could not be read.
    oddities : list of str
        What is odd about the spectra as a whole, found before the first was scored: see `moefast.spectra.oddities`.
    notes : list of str
        What the user should know before using the numbers.
    columns : dict of arrays
        The table itself, if it was not written to a file.
    """

    n_rows: int = 0
    seconds: float = 0.0
    spectra_per_second: float = 0.0
    backend: str = ""
    device: str = ""
    reason: str = ""
    array: str = ""
    model: str = ""
    r2: float | None = None
    flags: dict[str, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    oddities: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    columns: dict[str, NDArray] = field(default_factory=dict)
