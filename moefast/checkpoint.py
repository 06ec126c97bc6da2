"""What the first pass of a fit has gathered so far, kept on disk: a fit that is killed goes on where it stood.

Design: one file with every total, the rows still waiting to be multiplied and the number of rows done, so that a fit
that goes on gives the bits of one that was never stopped. It is written under another name, flushed to the disk and
renamed: the file before it stays until the new one is complete. Its header says which spectra, options and version it
is of, and the SHA-256 of every array and of itself: a fit of anything else refuses it, and numbers that were changed
since are not gone on from. No pickle.

At 4096 pixels a bin and fold takes 67 MB of totals, and waiting rows take at most 1 GiB together: 1.9 to 3 GB for nine
bins in three folds, and while it is replaced twice that.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from moefast.core.archives import Header, open_hashed, write_hashed
from moefast.core.errors import InputError, OutputError
from moefast.core.regular import refuse_special
from moefast.core.text import counted
from moefast.core.version import __version__

__all__ = ["NETWORK_FILE", "Checkpoint", "flat"]

SCHEMA = 4
WHAT = "moefast checkpoint of a fit"
FILE = "first-pass.npz"
NETWORK_FILE = "heads.safetensors"
"""State of the fit of a network, which `moefast.trunks.training` writes."""
SECONDS = 120.0
"""Time between checkpoints."""
SHARE = 0.05
"""Share of the time that checkpoints may take: where disks are slow they are written less often."""

Arrays = Mapping[str, NDArray]


class Checkpoint:
    """The folder that holds the checkpoint of a fit.

    Parameters
    ----------
    folder : path
        Made if it is not there; not to be shared by fits that run at the same time.
    tell : callable, optional
        Called with a sentence when a fit goes on from a checkpoint, or when one cannot be read or written. By default
        it is logged as a warning.

    Raises
    ------
    OutputError
        The folder cannot be made.
    """

    def __init__(self, folder: str | Path, *, tell: Callable[[str], None] | None = None) -> None:
        self.folder = Path(folder)
        self.path = self.folder / FILE
        self.tell = tell or logging.getLogger(__name__).warning
        self._key: dict[str, Any] = {}
        self._last, self._pause = time.monotonic(), SECONDS
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{self.folder}: the folder for checkpoints cannot be made ({error})"
            ) from error

    def begin(self, key: Mapping[str, Any], nbytes: int) -> None:
        """Say what is fitted, before anything is done.

        Parameters
        ----------
        key : mapping, JSON-ready
            What the statistics depend on: spectra and options. The version of moefast is added.
        nbytes : int
            Size of a checkpoint at most.

        Raises
        ------
        OutputError
            The disk has no room for two of them.
        """
        self._key = json.loads(json.dumps({**key, "version": __version__}))
        held = self.path.stat().st_size if self.path.exists() else 0
        free = shutil.disk_usage(self.folder).free
        if free + held < 2 * nbytes:
            raise OutputError(
                f"{self.folder}: checkpoints of this fit need {2 * nbytes / 1e9:.1f} GB, one being kept until the next "
                f"is complete; {(free + held) / 1e9:.1f} GB are free. Name a folder on another disk, or fit without"
            )
        self._last = time.monotonic()

    # -- reading ------------------------------------------------------------------------------------------------

    def load(self, build: Callable[[int, Callable[[str], NDArray]], Any]) -> Any:
        """What `build(rows done, read)` makes of the checkpoint, `read(name)` giving an array; None without one.

        A checkpoint that is damaged is told and ignored. So is what `build` cannot use: it raises ValueError then.

        Raises
        ------
        InputError
            The checkpoint is of other spectra, options or another version.
        """
        if not self.path.exists():
            return None
        refuse_special(self.path)
        try:
            with open_hashed(self.path, WHAT, self._compare) as (header, read):
                built = build(int(header["rows"]), read)
        except (InputError, MemoryError):
            raise
        except Exception as error:
            # Damaged archives make NumPy raise nearly anything, tokenize.TokenError for one.
            self.tell(f"{self.path}: not a complete checkpoint ({error}); the fit starts from the beginning")
            return None
        self.tell(f"{self.path}: {counted(header['rows'], 'spectrum')} done; the fit goes on from there")
        return built

    def _compare(self, header: Header) -> None:
        schema, key = header["schema"], header["key"]
        other = [
            f"{name} was {flat(key).get(name)!r}, is {value!r}"
            for name, value in flat(self._key).items()
            if flat(key).get(name) != value
        ]
        if schema != SCHEMA:
            other = [f"schema was {schema!r}, is {SCHEMA!r}"]
        if other:
            raise InputError(
                f"{self.path}: the checkpoint is of another fit ({'; '.join(other)}). Repeat that fit to go on with "
                "it, or name another folder, or remove it to start anew"
            )

    # -- writing ------------------------------------------------------------------------------------------------

    @property
    def due(self) -> bool:
        """Whether it is time for the next one."""
        return time.monotonic() - self._last >= self._pause

    def save(self, rows: int, arrays: Arrays) -> None:
        """Write the state after so many rows; a disk that does not take it is told, and the fit goes on without."""
        begin = time.monotonic()
        document = {"schema": SCHEMA, "what": WHAT, "key": self._key, "rows": rows}
        try:
            # What another process left behind, on this machine or another, would take the room of two checkpoints.
            self._remove_partial()
            write_hashed(self.path, document, arrays)
        except (OSError, OutputError) as error:
            self.tell(
                f"{self.path}: the checkpoint after {counted(rows, 'spectrum')} could not be written "
                f"({error.__cause__ or error})"
            )
        self._last = time.monotonic()
        self._pause = max(SECONDS, (self._last - begin) / SHARE)

    def remove(self) -> None:
        """Remove the checkpoint, and that of a network; and the folder if that leaves it empty."""
        for path in (self.path, self.folder / NETWORK_FILE):
            path.unlink(missing_ok=True)
        self._remove_partial()
        if self.folder.exists() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _remove_partial(self) -> None:
        for left in self.folder.glob(f".{FILE}.*.partial"):
            left.unlink(missing_ok=True)


def flat(key: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested names joined by dots."""
    found: dict[str, Any] = {}
    for name, value in key.items():
        found |= flat(value, f"{above}{name}.") if isinstance(value, dict) else {above + name: value}
    return found
