"""Simulated surveys as files in the layout of the PFS simulator."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moefast.core.errors import MoefastError
from moefast.kernels.resample import pixel_edges
from moefast.spectra.writer import SpectrumWriter

from .emulator import Emulator
from .observed import OBSERVED_PARAMS, Observed, simulate_observed
from .rows import Settings, SimulatedBlock, columns_of, simulate_rows

__all__ = ["simulate_file"]

BLOCK_ROWS = 1024

Make = Callable[[int, int, np.ndarray | None], SimulatedBlock]
"""First row, the one after the last, memory for their flux -> block."""


def simulate_file(
    path: str | Path,
    n_rows: int,
    *,
    seed: int,
    settings: Settings | None = None,
    first_row: int = 0,
    noisy: bool = True,
    overwrite: bool = False,
    attrs: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
    observed: Observed | None = None,
) -> None:
    """Write `n_rows` rows of the survey with this seed in the layout of the PFS simulator.

    A block is written while the next one is made; memory does not grow with the number of rows.

    Parameters
    ----------
    path : str or Path
        The file appears under this name only when it is complete.
    n_rows : int
    seed : int
    settings : Settings, optional
    first_row : int
        Row of the survey that the file begins with: a shard holds the same rows as one large file.
    noisy : bool
        Whether to store the noisy flux beside flux and error.
    overwrite : bool
        Whether an existing file may be replaced.
    attrs : mapping, optional
        Further attributes of the file.
    progress : callable, optional
        Called with the number of rows done after each block.
    observed : Observed, optional
        Spectra of files that these should look like: their pixels, resolution, noise and gaps.

    Raises
    ------
    MoefastError
        If an argument is out of range or the file cannot be written.
    """
    if n_rows < 1:
        raise MoefastError(f"n_rows: expected at least 1, found {n_rows}")
    settings = settings or Settings()
    emulator = observed.spectrograph.emulator if observed else Emulator.load()

    def make(first: int, stop: int, out: np.ndarray | None) -> SimulatedBlock:
        if observed is not None:
            return simulate_observed(
                first, stop, seed=seed, settings=settings, observed=observed, noisy=noisy
            )
        return simulate_rows(first, stop, seed=seed, settings=settings, noisy=noisy, out=out)

    # What cannot be simulated must be known before the file is begun.
    make(first_row, first_row, None)
    about = {
        "simulator": "moefast.simulate",
        "seed": str(seed),
        "first_row": first_row,
        "settings": settings.to_json(),
        "emulator": json.dumps(dict(emulator.provenance), sort_keys=True),
        "emulator_sha256": emulator.sha256,
    }
    if observed is not None:
        about |= {"observed": observed.name, "observed_fingerprint": observed.fingerprint}
    masked = settings.visit is not None or observed is not None
    arrays = ("flux", "error", *(("noisy",) if noisy else ()), *(("mask",) if masked else ()))
    wave = observed.wave if observed else emulator.wave
    writer = SpectrumWriter(
        path,
        n_rows=n_rows,
        wave=wave,
        wave_edges=pixel_edges(wave) if observed else emulator.wave_edges,
        arrays=arrays,
        params=OBSERVED_PARAMS if observed else columns_of(settings),
        attrs=about | dict(attrs or {}),
        overwrite=overwrite,
    )
    _write_rows(writer, make, first_row, progress)


def _write_rows(
    writer: SpectrumWriter, make: Make, first_row: int, progress: Callable[[int], None] | None
) -> None:
    """Make and write all rows: one block is made while the other is written."""
    n_rows = writer.n_rows
    memory = np.empty((2, min(n_rows, BLOCK_ROWS), writer.n_pixels), dtype=np.float32)
    with writer, ThreadPoolExecutor(1) as behind:
        written: Future[None] | None = None
        for start in range(0, n_rows, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, n_rows)
            flux = memory[start // BLOCK_ROWS % 2, : stop - start]
            block = make(first_row + start, first_row + stop, flux)
            if written is not None:
                written.result()
                if progress is not None:
                    progress(start)
            values = {name: getattr(block, name) for name in writer.arrays}
            written = behind.submit(writer.write, start, params=block.params, **values)
            del block, values
        if written is not None:
            written.result()
        if progress is not None:
            progress(n_rows)
