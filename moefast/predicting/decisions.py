"""What a run has chosen and decided, in words: a line for each decision, which ``moefast predict -v`` shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from moefast.backend import Backend
from moefast.core.text import counted
from moefast.model import Model
from moefast.posterior.velocities import VelocityFit
from moefast.predicting.engines import Engine
from moefast.predicting.source import Source
from moefast.spectra.prepared import Preparation, PreparedShard
from moefast.spectra.shard import Shard
from moefast.spectra.telluric import words_of_ranges

__all__ = ["decisions_on_input", "decisions_on_model"]

_BYTES = 9
"""Of a pixel of a block: flux and error in single precision, and whether it is bad."""


def decisions_on_model(model: Model, engine: Engine, where: Backend) -> list[str]:
    """Which model predicts, where, and how many spectra at a time."""
    wave = model.mixture.wave
    memory = engine.block_rows * engine.workers * len(wave) * _BYTES / 2**20
    return [
        f"model: {model.name}, SHA-256 {model.hash[:12]}…, {len(wave)} pixels from {wave[0]:.1f} to {wave[-1]:.1f} Å",
        f"backend: {where.name} ({where.device}): {where.reason}"
        + (f"; {engine.checked}" if engine.checked else ""),
        f"blocks: {counted(engine.block_rows, 'spectrum')} at a time by each of {counted(engine.workers, 'thread')}, "
        f"{memory:,.0f} MiB of "
        "spectra in memory",
    ]


def decisions_on_input(source: Source, preparation: Preparation) -> list[str]:
    """What is read, and what is done to spectra before the model sees them."""
    shards = source.spectra.shards
    n_files = len(source.origins.paths)
    prepared = [shard for shard in shards if isinstance(shard, PreparedShard)]
    files = [file for shard in prepared for file in shard.files]
    as_they_are = len(shards) - len(prepared)
    n_masked = sum(preparation.masks(file) for file in files)
    media = [preparation.medium_of(file) for file in files]
    moved = "" if preparation.medium == "auto" else ", as --wave-medium says"
    return [
        f"input: {counted(n_files, 'file')}, rows {source.start:,}:{source.stop:,} of {source.spectra.n_rows:,}, of "
        "which "
        f"{source.n_wanted:,} are predicted",
        f"layout: {_counted(_layouts(shards))}",
        f"array: {source.arrays}"
        + (
            " (--array auto takes noisy where a file has it)"
            if source.array == "auto"
            else ", as --array says"
        ),
        f"wavelengths: {_counted([*media, *['vacuum'] * as_they_are])}{moved}",
        (
            f"resampling: spectra of {len(files):,} of {counted(n_files, 'file')} are put on the model's grid"
            if files
            else "resampling: none, spectra are on the model's grid"
        ),
        (
            f"telluric: pixels at {words_of_ranges()} Å count as bad in {n_masked:,} of {counted(n_files, 'file')}"
            if n_masked
            else "telluric: no pixels are masked"
        )
        + f" (--telluric {preparation.telluric})",
        f"velocity: {_velocity(source)}",
        f"columns of the input in the table: {', '.join(source.identifiers) or 'none'}",
    ]


def _velocity(source: Source) -> str:
    """What is done about velocities."""
    if source.velocity is None:
        return "spectra are taken to be at rest"
    if isinstance(source.velocity, VelocityFit):
        why = "as --velocity says" if source.asked else "spectra of surveys, and --velocity gives none"
        return f"{source.velocity_words} ({why})"
    weighed = ", weighed with what spectra say" if source.weighed_by is not None else ""
    return f"removed: {source.velocity_words}{weighed}"


def _layouts(shards: Iterable[Shard]) -> list[str]:
    """The layout of every file."""
    names: list[str] = []
    for shard in shards:
        if isinstance(shard, PreparedShard):
            names += shard.layouts
        else:
            names.append(f"HDF5 of the PFS simulator, {shard.layout['error']}")
    return names


def _counted(names: Iterable[str]) -> str:
    """Names with the number of files, if there are several."""
    counts = Counter(names)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} ({counted(count, 'file')})" for name, count in counts.items())
