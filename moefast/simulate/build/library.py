"""The library of syntheses the emulator learns from: Sobol points in five labels, resumable on disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.stats import qmc

from .instrument import observe
from .synthesis import Synthesizer

LOW = np.array([3750.0, 1.0, -2.5, -0.3, -0.5])
HIGH = np.array([6000.0, 5.0, 0.75, 0.5, 0.5])
# Training points cover a little more than the box: regression is worst where it has neighbours on one side.
MARGIN = 0.03
CHUNK = 64
SETS = {"train": 20261, "held-out": 20262}  # scrambling seeds of the two Sobol sequences


def points(name: str, n: int) -> np.ndarray:
    """Labels of the first `n` points of a set, shape (n, 5); a longer set begins with the shorter one."""
    sobol = qmc.Sobol(5, scramble=True, rng=SETS[name])
    unit = sobol.random(1 << int(np.ceil(np.log2(max(n, 2)))))[:n]
    if name == "train":
        # The exponent puts more points at the cool end, where spectra change fastest.
        unit = unit * (1 + 2 * MARGIN) - MARGIN
        unit[:, 0] = np.where(unit[:, 0] > 0, np.abs(unit[:, 0]) ** 1.15, unit[:, 0])
    labels = LOW + (HIGH - LOW) * unit
    # The grid of atmospheres ends at log g 0.5 and 5.5, [M/H] -2.75 and 1.
    labels[:, 2] = np.clip(labels[:, 2], -2.6, 0.85)
    return labels


def synthesize_library(
    synthesizer: Synthesizer, name: str, n: int, folder: Path, report: Callable[[str], None] = print
) -> None:
    """Write chunk files ``{name}-{k}.npy`` of float32 pixel fluxes, skipping those that exist."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = points(name, n)
    start = time.perf_counter()
    for k in range(0, n, CHUNK):
        path = folder / f"{name}-{k:05d}.npy"
        if path.exists():
            continue
        block = [observe(synthesizer.wave, synthesizer.synthesize(*row)[0]) for row in labels[k : k + CHUNK]]
        temporary = path.with_suffix(".part")
        with temporary.open("wb") as stream:
            np.save(stream, np.array(block, dtype=np.float32))
        temporary.rename(path)
        report(f"{name}: {min(k + CHUNK, n)} of {n}, {time.perf_counter() - start:.0f} s")


def load_library(name: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n, 5) and fluxes (n, 4096) of the chunks present, up to the first gap."""
    blocks: list[np.ndarray] = []
    while (path := folder / f"{name}-{len(blocks) * CHUNK:05d}.npy").exists():
        blocks.append(np.load(path))
    flux = np.concatenate(blocks).astype(float)
    return points(name, len(flux)), flux
