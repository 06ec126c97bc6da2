"""Reference sets: what every result is measured on, made anew on any machine from stored seeds.

A set is a configuration and a seed per part. Sets share their seeds: star i of `survey` is star i of `z0` with a
velocity, reddening and calibration error on top, and star i of `wild` is that star again as a real visit shows it.

Design: the identity of a part is its fingerprint, a hash of everything that decides its content: settings, seed, rows,
the emulator's data, the noise model's curves and the parameters of every row. Numbers that pass through a mathematical
library are rounded first, so that the last bits of another machine do not change it. A file is not believed: `identify`
computes the fingerprint again from the parameters in the file and makes a few of its spectra anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moefast.core.errors import InputError, MoefastError
from moefast.spectra.shard import Shard
from moefast.spectra.spectrum_set import SpectrumSet

from .emulator import Emulator
from .gaps import Gaps
from .rows import MEASURED, Settings, columns_of, noise_model, simulate_params, simulate_rows
from .visit import Visit
from .writing import simulate_file

__all__ = [
    "FINGERPRINTS",
    "REFERENCE_SETS",
    "Identity",
    "Part",
    "ReferenceSet",
    "fingerprint",
    "format_sets",
    "identify",
    "identify_spectra",
    "name_of_set",
    "part_rows",
    "simulate_set",
]

SCHEMA = 1
ROWS_AT_ONCE = 65536
ROWS_COMPARED = 5
ROWS_OF_GAPS = 64
"""First rows whose lost pixels count in a fingerprint."""
LARGEST_DIFFERENCE = 1e-4
"""Relative to flux or error: far above what float32 does on another machine, far below any change of the simulator."""

RESOLUTION = {"T_eff": 1e-3, "velocity": 1e-4}
"""Units to which parameters are rounded (K, km/s); 1e-7 for the others."""


def _hashed(settings: Settings) -> tuple[str, ...]:
    """Columns of the params table that count in a fingerprint."""
    return tuple(name for name in columns_of(settings) if name not in {"id", *MEASURED})


@dataclass(frozen=True)
class Part:
    """Rows of a set that belong together: their seed, and how many there are (None: as many as one wants)."""

    seed: int
    n_rows: int | None = None


@dataclass(frozen=True)
class ReferenceSet:
    """A configuration under a name.

    Attributes
    ----------
    what : str
        What it is, in one line.
    settings : Settings
    parts : dict of str to Part
    """

    what: str
    settings: Settings
    parts: dict[str, Part]


class Identity(NamedTuple):
    """Which part of which reference set a file holds."""

    reference_set: str
    part: str
    fingerprint: str


PARTS = {
    "train": Part(71_001),
    "validation": Part(71_002),
    "test_10k": Part(71_003, 10_000),
    "test_1k": Part(71_004, 1_000),
}
_Z0 = Settings()
REFERENCE_SETS: dict[str, ReferenceSet] = {
    "z0": ReferenceSet("the published configuration, no nuisance", _Z0, PARTS),
    "survey": ReferenceSet(
        "the same stars with velocities of 30 km/s, E(B-V) 0 to 0.3 and 3 % calibration errors",
        replace(_Z0, velocity_scatter=30.0, reddening=(0.0, 0.3), calibration=0.03),
        PARTS,
    ),
    "wild": ReferenceSet(
        "the stars of survey as real visits show them: a sky of their own, gaps, sky residuals, 5 km/s",
        replace(_Z0, velocity_scatter=5.0, reddening=(0.0, 0.3), calibration=0.03, visit=Visit()),
        PARTS,
    ),
}

TRAINING_SETS: dict[str, ReferenceSet] = {
    "library": ReferenceSet(
        "the stars of z0 with line-spread functions of ±10 %, 5 km/s, a third of them 40 km/s, for posteriors",
        replace(
            _Z0,
            velocity_scatter=5.0,
            fast_share=0.35,
            fast_scatter=40.0,
            visit=Visit(
                sky_continuum=0.0, sky_lines=0.0, sky_residual=0.0, tilt=0.0, line_spread=0.1, own_median=False,
                gaps=Gaps(telluric=0.0, random=(0.0, 0.0), block=0.0, edges=0.0, calcium=0.0),
            ),
        ),
        {part: PARTS[part] for part in ("train", "validation")},
    ),
}  # fmt: skip
"""Sets to fit on, on which nothing is measured: what differs from visit to visit a recipe marginalises by itself."""

FINGERPRINTS: dict[tuple[str, str], str] = {
    ("z0", "test_10k"): "cfbcdc084504308cbec1e163089f6dbed6d5866da3c19ffb4a175bd36761d4fa",
    ("z0", "test_1k"): "f8591ad61dd071ad4ba9f03f2c8b4d342ac6278bab0b9f6ba54365b2ad3b6f3c",
    ("survey", "test_10k"): "40faa33495e45a1c0fdd2efdb749d987b247ba5da7cd094884a6864849c6cdf4",
    ("survey", "test_1k"): "88bd8667314a30dd1c02436b650a6e7e3c0a7956ec9050f8b5f4c3500b2835a9",
    ("wild", "test_10k"): "ca55f61dd5a0ea65f48d83a0c1c97fd4032ee0f7cda99aff596ef29b506d3408",
    ("wild", "test_1k"): "1956bd3a14340aaf0970e951f8e6851fc27c7fd2aad50fbb7d9618c9ea2baff9",
}
"""Of the parts that have a fixed number of rows, as they were when the sets were frozen."""


def _part(name: str, part: str) -> tuple[ReferenceSet, Part]:
    known = REFERENCE_SETS | TRAINING_SETS
    if name not in known:
        raise MoefastError(f"reference set {name!r} is unknown; choose one of {', '.join(known)}")
    chosen = known[name]
    if part not in chosen.parts:
        raise MoefastError(f"{name} has no part {part!r}; it has {', '.join(chosen.parts)}")
    return chosen, chosen.parts[part]


def part_rows(
    name: str, part: str, rows: tuple[int, int] | None = None
) -> tuple[ReferenceSet, Part, tuple[int, int]]:
    """A set, one of its parts, and the rows that are meant.

    Parameters
    ----------
    name, part : str
    rows : tuple of int, optional
        First row and the one after the last, for parts without a fixed size.

    Raises
    ------
    MoefastError
        The set, part or rows do not exist.
    """
    chosen, its_part = _part(name, part)
    if its_part.n_rows is None:
        if rows is None or not 0 <= rows[0] < rows[1]:
            raise MoefastError(
                f"{name} {part} has any number of rows: say which, 0 <= first < stop; found {rows}"
            )
        return chosen, its_part, rows
    whole = (0, its_part.n_rows)
    if rows not in {None, whole}:
        raise MoefastError(
            f"{name} {part} has {its_part.n_rows} rows and is made as a whole; found rows {rows}"
        )
    return chosen, its_part, whole


def fingerprint(name: str, part: str, rows: tuple[int, int] | None = None) -> str:
    """Hash of what decides the content of rows of a reference set.

    Parameters
    ----------
    name : str
        In `REFERENCE_SETS`.
    part : str
        One of its parts.
    rows : tuple of int, optional
        First row and the one after the last, for parts without a fixed size.

    Returns
    -------
    str
        SHA-256 as hex digits.

    Raises
    ------
    MoefastError
        The set, part or rows do not exist.
    """
    chosen, its_part, (first, stop) = part_rows(name, part, rows)

    def blocks() -> Iterator[dict[str, np.ndarray]]:
        for start in range(first, stop, ROWS_AT_ONCE):
            end = min(start + ROWS_AT_ONCE, stop)
            yield simulate_params(start, end, seed=its_part.seed, settings=chosen.settings)

    return _fingerprint(name, part, (first, stop), blocks())


def _fingerprint(name: str, part: str, rows: tuple[int, int], blocks: Iterator[dict[str, np.ndarray]]) -> str:
    chosen, its_part = _part(name, part)
    emulator = Emulator.load()
    noise = noise_model(emulator, chosen.settings)
    hashed = _hashed(chosen.settings)
    header = {
        "schema": SCHEMA,
        "set": name,
        "part": part,
        "rows": list(rows),
        "seed": its_part.seed,
        "settings": chosen.settings.to_json(),
        "emulator": emulator.sha256,
        "columns": list(hashed),
    }
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    curves = [noise.response, noise.sky_variance]
    if chosen.settings.visit is not None:
        # Groups of lines have pixels without any light.
        curves += [noise.continuum_electrons, *(noise.line_electrons + 1.0)]
        some = np.arange(rows[0], min(rows[1], rows[0] + ROWS_OF_GAPS))
        lost = chosen.settings.visit.gaps.lost_pixels(emulator.wave, some, seed=its_part.seed)
        digest.update(np.packbits(lost).tobytes())
    for curve in curves:
        digest.update(np.rint(np.log(curve) * 1e5).astype("<i8").tobytes())
    for params in blocks:
        columns = [np.rint(params[key] / RESOLUTION.get(key, 1e-7)) for key in hashed]
        digest.update(np.stack(columns, axis=1).astype("<i8").tobytes())
    return digest.hexdigest()


def format_sets() -> str:
    """The reference sets as text for a terminal."""
    lines = []
    for name, chosen in REFERENCE_SETS.items():
        lines.append(f"{name}: {chosen.what}")
        for part, its_part in chosen.parts.items():
            size = f"{its_part.n_rows:,} spectra" if its_part.n_rows else "any number of spectra"
            lines.append(f"  {part:<10}  {size:<21}  {FINGERPRINTS.get((name, part), '')}".rstrip())
    return "\n".join(lines)


def simulate_set(
    path: str | Path,
    name: str,
    part: str,
    *,
    rows: tuple[int, int] | None = None,
    noisy: bool | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
    attrs: Mapping[str, str] | None = None,
) -> Identity:
    """Write a part of a reference set, with the attributes `reference_set`, `part` and `fingerprint`.

    Parameters
    ----------
    path : str or Path
    name, part : str
    rows : tuple of int, optional
        First row and the one after the last, for parts without a fixed size.
    noisy : bool, optional
        Whether to store noisy flux; parts of a fixed size do if this is absent.
    overwrite : bool
    progress : callable, optional
        Called with the number of rows done.
    attrs : mapping, optional
        Further attributes of the file.

    Raises
    ------
    MoefastError
        The set, part or rows do not exist, or the file cannot be written.
    """
    chosen, its_part, (first, stop) = part_rows(name, part, rows)
    identity = Identity(name, part, fingerprint(name, part, (first, stop)))
    simulate_file(
        path,
        stop - first,
        seed=its_part.seed,
        settings=chosen.settings,
        first_row=first,
        noisy=its_part.n_rows is not None if noisy is None else noisy,
        overwrite=overwrite,
        attrs={**(attrs or {}), **identity._asdict()},
        progress=progress,
    )
    return identity


def identify(path: str | Path | Shard) -> Identity | None:
    """Which part of which reference set a file holds, by its content.

    The attributes say what the file claims to be. They count only if the parameters in the file give that fingerprint,
    if it is the frozen one where there is one, and if a few spectra made anew are those of the file.

    Parameters
    ----------
    path : str, Path or Shard

    Returns
    -------
    Identity or None
        None for any other file, damaged ones included.
    """
    try:
        shard = path if isinstance(path, Shard) else Shard(path)
        claim = Identity(*(str(shard.attrs[name]) for name in Identity._fields))
        first = int(shard.attrs["first_row"])
        *_, rows = part_rows(claim.reference_set, claim.part, (first, first + shard.n_rows))
        found = _fingerprint(claim.reference_set, claim.part, rows, _stored(shard, claim))
        frozen = FINGERPRINTS.get((claim.reference_set, claim.part), found)
        if not claim.fingerprint == found == frozen or not _same_spectra(shard, claim, first):
            return None
    except (MoefastError, KeyError, ValueError):
        return None
    return claim


def identify_spectra(spectra: SpectrumSet) -> Identity | None:
    """The part of a reference set that one file holds, by its content; None for several files."""
    return identify(spectra.shards[0]) if len(spectra.shards) == 1 else None


def name_of_set(spectra: SpectrumSet, identity: Identity | None) -> str:
    """Name of what was measured: that of the reference set and its part, or those of the first files."""
    if identity is not None:
        return f"{identity.reference_set} {identity.part}"
    return " + ".join(shard.path.name for shard in spectra.shards[:3])


def _stored(shard: Shard, claim: Identity) -> Iterator[dict[str, np.ndarray]]:
    hashed = _hashed(_part(claim.reference_set, claim.part)[0].settings)
    for start in range(0, shard.n_rows, ROWS_AT_ONCE):
        yield shard.params(hashed, start, min(start + ROWS_AT_ONCE, shard.n_rows))


def _same_spectra(shard: Shard, claim: Identity, first: int) -> bool:
    chosen, its_part = _part(claim.reference_set, claim.part)
    if len(shard.wave) != len(Emulator.load().wave) or not np.allclose(
        shard.wave, Emulator.load().wave, rtol=0, atol=1e-6
    ):
        raise InputError(f"{shard.path}: another wave grid")
    for row in np.unique(np.linspace(0, shard.n_rows - 1, ROWS_COMPARED).astype(int)).tolist():
        block = simulate_rows(first + row, first + row + 1, seed=its_part.seed, settings=chosen.settings)
        for name, unit in (("flux", block.flux), ("error", block.error), ("noisy", block.error)):
            if name in shard.arrays:
                difference = np.abs(shard.read(name, row, row + 1) - getattr(block, name))
                if not (difference <= LARGEST_DIFFERENCE * np.maximum(unit, 1e-2)).all():
                    return False
        lost = np.zeros(block.flux.shape, bool) if block.mask is None else block.mask
        stored = shard.read("mask", row, row + 1) if "mask" in shard.arrays else np.zeros_like(lost)
        if not np.array_equal(stored, lost):
            return False
    return True
