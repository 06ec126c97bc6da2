"""Choose the lines that matter and write ``lines.csv``.

A line is kept if its opacity at the line centre reaches `THRESHOLD` of the continuum somewhere in the
line-forming layers of one of the `CORNERS` of the label space.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from . import lines as atomic
from .synthesis import Synthesizer

THRESHOLD = 0.5
CORNERS = (
    (3800.0, 4.8, 0.5), (3800.0, 1.2, 0.5), (4300.0, 1.5, 0.0), (5000.0, 2.5, 0.5), (5000.0, 4.5, 0.5),
    (5900.0, 4.5, 0.5), (5900.0, 1.5, 0.5),
)  # fmt: skip
LINEMAKE = "linemake (Placco et al. 2021 RNAAS 5 92)"


def build_table(linemake: Path, grid: np.ndarray, out: Path) -> int:
    """Write the table of selected lines; return their number."""
    with linemake.open() as stream:
        rows = atomic.parse_linemake(stream)
    wave_air, element, stage, e_low, log_gf = (np.array(column) for column in zip(*rows, strict=True))
    vdw, radiation, source = [], [], []
    for wave, el, ion, low in zip(wave_air, element, stage, e_low, strict=True):
        name = atomic.species_name(el, ion)
        known = [v for (s, w), v in atomic.MEASURED_VDW.items() if s == name and abs(w - wave) < 1.0]
        vdw.append(known[0] if known else atomic.unsold_vdw(el, ion, low, wave))
        radiation.append(atomic.RADIATION.get(name, atomic.RADIATION_DEFAULT))
        source.append(LINEMAKE + ("; vdW ABO" if known else "; vdW 2x Unsold"))
    table = atomic.AtomicLines(
        atomic.air_to_vacuum(wave_air), element, stage, e_low, log_gf, np.array(vdw), np.array(radiation)
    )
    synthesizer = Synthesizer.prepare(grid, table)
    strongest = np.max([synthesizer.synthesize(*corner)[1] for corner in CORNERS], axis=0)
    chosen = np.flatnonzero(strongest > THRESHOLD)
    with out.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(atomic.COLUMNS)
        for k in chosen:
            name = atomic.species_name(element[k], stage[k])
            writer.writerow(
                [f"{wave_air[k]:.3f}", name, f"{e_low[k]:.3f}", f"{log_gf[k]:.3f}", f"{vdw[k]:.2f}"]
                + [f"{radiation[k]:.2f}", source[k]]
            )
    return len(chosen)
