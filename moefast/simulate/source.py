"""Simulated spectra that never touch a disk: generated block by block for whoever reads them.

Design: a `moefast.spectra.source.SpectrumSource` with the simulator in the place of the files. Rows are pure functions
of seed and number, so a second pass generates them again instead of keeping them: memory does not grow with their
number. Nothing is read ahead: generation keeps all cores busy by itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moefast.core.errors import InputError, LabelError, MoefastError
from moefast.spectra.source import Block, Failure, OnError, block_edges, rows_of_request

from .emulator import Emulator
from .observed import OBSERVED_PARAMS, Observed, simulate_observed
from .rows import (
    MEASURED,
    Settings,
    SimulatedBlock,
    columns_of,
    noise_model,
    simulate_params,
    simulate_rows,
)
from .sets import Identity, fingerprint, part_rows

__all__ = ["SimulatedSpectra"]


class SimulatedSpectra:
    """Rows of a simulated survey, to be read like a `SpectrumSet`.

    Parameters
    ----------
    n_rows : int
        How many.
    seed : int
        0 to 2^64 - 1.
    settings : Settings, optional
    first_row : int
        Row of the survey that is row 0 here.
    emulator : Emulator, optional
        To be used instead of the shipped one.
    observed : Observed, optional
        Spectra of files that these should look like: their pixels, resolution, noise and gaps.
    whole : bool
        Whether spectra are handed out without the gaps of `observed`, for fits that look for them in `gaps`.

    Attributes
    ----------
    n_rows, n_pixels : int
        Spectra, and pixels of each.
    wave : array of shape (p,), float64
        Wavelength of the pixels in Å.
    arrays : tuple of str
        flux, error, noisy; mask where the settings lose pixels.
    columns : tuple of str
        Columns of the params table.
    identity : Identity or None
        Which reference set it is.
    path : Path
        A name for messages and records; there is no such file.
    shards : tuple
        Itself: one shard, which is the whole.
    first_rows : array of shape (2,), int64
        0 and n_rows.
    failures : list
        Empty.
    gaps : dict of str to callable, or None
        Kinds of gaps that the spectra would have, as `moefast.simulate.gaps.GAPS`; None where `observed` is not given.

    Raises
    ------
    MoefastError
        If an argument is out of range or the settings cannot be simulated.

    Examples
    --------
    ::

        model = moefast.fit(SimulatedSpectra.of_set("z0", rows=(0, 200_000)))
    """

    def __init__(
        self,
        n_rows: int,
        *,
        seed: int,
        settings: Settings | None = None,
        first_row: int = 0,
        emulator: Emulator | None = None,
        observed: Observed | None = None,
        whole: bool = False,
    ) -> None:
        if n_rows < 1:
            raise MoefastError(f"n_rows: expected at least 1, found {n_rows}")
        self.settings = settings or Settings()
        self.seed, self.first_row, self.n_rows = int(seed), int(first_row), int(n_rows)
        self._observed, self._whole = observed, whole
        self._emulator = observed.spectrograph.emulator if observed else emulator or Emulator.load()
        self._noise = noise_model(self._emulator, self.settings)
        # What cannot be simulated must be known before a long run.
        self._simulate(0, 0)
        self.wave = observed.wave if observed else self._emulator.wave
        self.n_pixels = len(self.wave)
        self.columns = tuple(OBSERVED_PARAMS if observed else columns_of(self.settings))
        masked = not whole if observed else self.settings.visit is not None
        self.arrays = ("flux", "error", "noisy") + (("mask",) if masked else ())
        self.gaps = observed.gaps(self.first_row, seed=self.seed) if observed else None
        self.identity: Identity | None = None
        like = f" like {observed.name}" if observed else ""
        self.path = Path(
            f"simulated{like}, seed {seed}, rows {first_row}:{first_row + n_rows}".replace("/", " ")
        )
        self.shards = (self,)
        self.first_rows = np.array([0, n_rows], dtype=np.int64)
        self.failures: list[Failure] = []

    @classmethod
    def of_set(cls, name: str, part: str = "train", rows: tuple[int, int] | None = None) -> SimulatedSpectra:
        """Rows of a part of a reference set.

        Parameters
        ----------
        name, part : str
            See `moefast.simulate.sets.REFERENCE_SETS`.
        rows : tuple of int, optional
            First row and the one after the last, for parts without a fixed size.

        Raises
        ------
        MoefastError
            The set, part or rows do not exist.
        """
        chosen, its_part, (first, stop) = part_rows(name, part, rows)
        spectra = cls(stop - first, seed=its_part.seed, settings=chosen.settings, first_row=first)
        spectra.identity = Identity(name, part, fingerprint(name, part, (first, stop)))
        spectra.path = Path(f"{name} {part}, rows {first}:{stop}")
        return spectra

    @classmethod
    def like(
        cls,
        observed: Observed,
        n_rows: int,
        *,
        name: str = "library",
        whole: bool = False,
    ) -> SimulatedSpectra:
        """The stars of a reference set, observed like the spectra of files.

        Parameters
        ----------
        observed : Observed
        n_rows : int
        name : str
            See `moefast.simulate.sets`; the stars are those of its part "train". What the set says of noise, sky and
            gaps is replaced by what the files say.
        whole : bool
            See `SimulatedSpectra`.

        Raises
        ------
        MoefastError
            The set does not exist, or its velocities are beyond the emulator's margin.
        """
        chosen, its_part, (first, stop) = part_rows(name, "train", (0, n_rows))
        return cls(
            stop - first,
            seed=its_part.seed,
            settings=chosen.settings,
            first_row=first,
            observed=observed,
            whole=whole,
        )

    def __len__(self) -> int:
        return self.n_rows

    def __repr__(self) -> str:
        return f"SimulatedSpectra({str(self.path)!r})"

    def close(self) -> None:
        """Nothing is held open."""

    def fingerprint(self) -> str:
        """SHA-256, as hex digits, of what decides the content; that of the reference set if it is one."""
        if self.identity is not None:
            return self.identity.fingerprint
        header: dict[str, Any] = {
            "settings": self.settings.to_json(),
            "seed": self.seed,
            "rows": [self.first_row, self.first_row + self.n_rows],
            "emulator": self._emulator.sha256,
        }
        if self._observed is not None:
            header["observed"] = self._observed.fingerprint
        return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()

    def params(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Columns of the params table, each an array of shape (n_rows,).

        Raises
        ------
        InputError
            If there is no such column, or it is one of `MEASURED`, which are only known block by block.
        """
        wanted = list(names)
        found = simulate_params(
            self.first_row, self.first_row + self.n_rows, seed=self.seed, settings=self.settings
        )
        found = {name: values for name, values in found.items() if name in self.columns}
        for name in wanted:
            if name not in found:
                raise InputError(f"{self.path}: has no column {name!r}; it has {', '.join(found)}")
        return {name: found[name] for name in wanted}

    def labels(
        self, names: Sequence[str] = ("T_eff", "log_g", "M_H"), *, partial: bool = False
    ) -> dict[str, np.ndarray]:
        """Labels of every spectrum, each an array of shape (n_rows,), float64; `partial` changes nothing.

        Raises
        ------
        LabelError
            If there is no such column.
        """
        try:
            return {name: values.astype(np.float64) for name, values in self.params(names).items()}
        except InputError as error:
            raise LabelError(str(error)) from error

    def label_notes(self, names: Sequence[str] = ("T_eff", "log_g", "M_H")) -> list[str]:
        """What users should know of the files that spectra look like: labels are complete and in order."""
        return [] if self._observed is None else list(self._observed.notes)

    def has_labels(self, names: Sequence[str] = ("T_eff", "log_g", "M_H")) -> bool:
        """Whether `labels` would succeed."""
        return set(names) <= set(self.columns) - set(MEASURED)

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
            Rows per block. Blocks end at multiples of it; the first and the last may be shorter.
        array : {"auto", "flux", "noisy"}
            What becomes `Block.flux`; "auto" is noisy.
        rows : tuple of int, optional
            First row and the one after the last; all if None.
        params : sequence of str
            Columns to hand out with each block.
        prefetch, on_error
            As for files, where they matter.
        """
        start, stop = rows_of_request(self.n_rows, block_rows, array, rows, on_error)
        if unknown := [name for name in params if name not in self.columns]:
            raise InputError(f"{self.path}: has no column {unknown[0]!r}; it has {', '.join(self.columns)}")
        return self._blocks(block_rows, array != "flux", start, stop, list(params))

    def _blocks(
        self, block_rows: int, noisy: bool, start: int, stop: int, names: list[str]
    ) -> Iterator[Block]:
        for first, last in block_edges(start, stop, block_rows):
            made = self._simulate(first, last, noisy=noisy)
            flux = made.noisy if made.noisy is not None else made.flux
            mask = made.mask if made.mask is not None and made.mask.any() else None
            yield Block(first, 0, flux, made.error, mask, {name: made.params[name] for name in names})

    def _simulate(self, first: int, stop: int, *, noisy: bool = False) -> SimulatedBlock:
        first, stop = self.first_row + first, self.first_row + stop
        if self._observed is not None:
            block = simulate_observed(
                first, stop, seed=self.seed, settings=self.settings, observed=self._observed, noisy=noisy
            )
            return replace(block, mask=None) if self._whole else block
        return simulate_rows(
            first,
            stop,
            seed=self.seed,
            settings=self.settings,
            emulator=self._emulator,
            noise=self._noise,
            noisy=noisy,
        )
