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

THRESHOLD = (
    0.1  # what is left out would change pixels by 0.04 % in the median and 0.5 % at most (see checks.py)
)
CORNERS = (
    (3800.0, 4.8, 0.5), (3800.0, 1.2, 0.5), (4300.0, 1.5, 0.0), (5000.0, 2.5, 0.5), (5000.0, 4.5, 0.5),
    (5900.0, 4.5, 0.5), (5900.0, 1.5, 0.5),
)  # fmt: skip
HEADER = """\
# Atomic lines, 7070-8880 Å, chosen by moefast.simulate.build.linelist from a linemake list.
# wave_air: Å in air. e_low: eV. log_vdw, log_rad: log full widths, per H atom at 10 000 K and by radiation, rad/s.
# source: first of wavelength, e_low and log_gf (components of a line added up), then of log_vdw:
#   linemake = Placco et al. (2021, RNAAS 5, 92) and the laboratory work collected there;
#   ABO = Anstee, Barklem & O'Mara, 2xUnsold = Unsold (1955) doubled (see lines.py).
"""


def read_linemake(linemake: Path) -> tuple[atomic.AtomicLines, list[str]]:
    """All lines of a linemake list with their broadening, and the source of each."""
    with linemake.open() as stream:
        rows = atomic.parse_linemake(stream)
    wave_air, element, stage, e_low, log_gf = (np.array(column) for column in zip(*rows, strict=True))
    vdw, radiation, source = [], [], []
    for wave, el, ion, low in zip(wave_air, element, stage, e_low, strict=True):
        name = atomic.species_name(el, ion)
        known = [v for (s, w), v in atomic.MEASURED_VDW.items() if s == name and abs(w - wave) < 0.02]
        vdw.append(known[0] if known else atomic.unsold_vdw(el, ion, low, wave))
        radiation.append(atomic.RADIATION.get(name, atomic.RADIATION_DEFAULT))
        source.append("linemake; ABO" if known else "linemake; 2xUnsold")
    table = atomic.AtomicLines(
        atomic.air_to_vacuum(wave_air), element, stage, e_low, log_gf, np.array(vdw), np.array(radiation)
    )
    return table, source


def build_table(linemake: Path, grid: np.ndarray, out: Path) -> int:
    """Write the table of selected lines; return their number."""
    table, source = read_linemake(linemake)
    synthesizer = Synthesizer.prepare(grid, table)
    strongest = np.max([synthesizer.synthesize(*corner)[1] for corner in CORNERS], axis=0)
    chosen = np.flatnonzero(strongest > THRESHOLD)
    with out.open("w", encoding="utf-8", newline="") as stream:
        stream.write(HEADER)
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(atomic.COLUMNS)
        for k in chosen:
            name = atomic.species_name(table.element[k], table.stage[k])
            numbers = (atomic.vacuum_to_air(table.wave[k]), table.e_low[k], table.log_gf[k])
            widths = (table.log_vdw[k], table.log_rad[k])
            writer.writerow(
                [f"{numbers[0]:.3f}", name, *(f"{v:.3f}" for v in numbers[1:]), *(f"{v:.2f}" for v in widths)]
                + [source[k]]
            )
    return len(chosen)
