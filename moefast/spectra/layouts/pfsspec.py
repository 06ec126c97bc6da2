"""HDF5 files of the PFS simulator that must be shifted or resampled; `moefast.spectra.structure` tells their layout."""

from __future__ import annotations

import re

import numpy as np

from moefast.spectra.layouts.registry import StoredColumn, SurveyFile
from moefast.spectra.resample import Pixels
from moefast.spectra.shard import Shard

__all__ = ["IDENTIFIER", "identifiers", "survey_file"]

IDENTIFIER = re.compile(r"id|\w+_id|(obj|cat|source|star|target|fiber|fibre)id", re.IGNORECASE)


def identifiers(shard: Shard) -> tuple[str, ...]:
    """Columns of the params table that identify spectra, by their names."""
    return tuple(name for name in shard.columns if IDENTIFIER.fullmatch(name))


def survey_file(shard: Shard) -> SurveyFile:
    """The spectra of a shard; flux is normalised already, and columns are read when they are asked for."""
    arrays = tuple(name for name in shard.arrays if name in {"flux", "noisy"})

    def read(array: str, start: int, stop: int) -> tuple[list[Pixels], dict[int, str]]:
        flux, error = (shard.read(name, start, stop) for name in (array, "error"))
        bad = shard.read("mask", start, stop) if "mask" in shard.arrays else np.zeros(flux.shape, bool)
        return [Pixels.of_rows(shard.wave, flux, error, bad, f"dataset/arrays/{array}/value")], {}

    def column(name: str) -> StoredColumn:
        return StoredColumn(shard.n_rows, lambda start, stop: shard.params([name], start, stop)[name])

    columns = {name: column(name) for name in shard.columns}
    # Thousands of files must not be open at the same time; reading opens it again.
    shard.close()
    return SurveyFile(
        shard.path, "pfsspec", shard.n_rows, columns, identifiers(shard), read, shard.close, arrays,
        normalised=True, through_atmosphere=False, fingerprint=shard.fingerprint,
        order_problems=shard.order_problems,
    )  # fmt: skip
