"""C1, oracle uplift: which expert is best in which bin, what limits it? `python -m moefast.benchmarks.c1 -o FOLDER`.

Design: experts are fitted per bin of the 3 × 3 grid on rows of the part `train` and predict stars of the part
`validation` in their true bins, all with the same stored noise, so that every difference is a paired one. Each family
(`c1_experts`) keeps its predictions in a file of its own in the folder; a run that is started again does what is
missing. What they say is worked out in `c1_report`. Test stars are not looked at.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from moefast.benchmarks.c1_experts import F64, FAMILIES, SETS, WANT_SPECTRA, Data, Plan, Source, prepare
from moefast.benchmarks.c1_report import pictures, summarise, tables
from moefast.benchmarks.environment import describe
from moefast.core.atomic import atomic_file
from moefast.simulate import SimulatedSpectra

__all__ = ["measure"]

QUICK = Plan(1500, 6000, 3000, 300, 1500, 1, 1000, 3.0, 20)


def measure(
    name: str, source: Source, plan: Plan, folder: Path, say: Callable[[str], None], only: Sequence[str] = ()
) -> tuple[Data, dict[str, F64], dict[str, float]]:
    """Predictions for the validation stars by every family, and the CPU seconds that each function took.

    Parameters
    ----------
    name : str
        A reference set.
    source : callable
        Makes spectra of set, part and rows.
    plan : Plan
    folder : Path
        Where data and predictions are kept; what is there is not made again. Another plan is refused.
    say : callable
        Told what is being done.
    only : sequence of str
        Keys of `FAMILIES`; all if empty.

    Raises
    ------
    ValueError
        The folder holds a run of another plan.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mark, wanted = folder / "plan.json", json.dumps({"set": name, **asdict(plan)}, sort_keys=True)
    if mark.exists() and mark.read_text(encoding="utf-8") != wanted:
        raise ValueError(f"{folder} holds a run of another plan: {mark.read_text(encoding='utf-8')}")
    mark.write_text(wanted, encoding="utf-8")
    data = prepare(name, source, plan, folder, say)
    predictions: dict[str, F64] = {}
    seconds = {}
    for family, function in FAMILIES.items():
        kept = folder / f"{family}.npz"
        if not kept.exists():
            if only and family not in only:
                continue
            begin = time.process_time()
            spectra = (source(name, "train", (0, plan.stars)),) if family in WANT_SPECTRA else ()
            try:
                found = function(data, plan, say, *spectra)
            except ImportError as error:
                say(f"{family} left out: {error}")
                continue
            arrays: dict[str, Any] = {"seconds": time.process_time() - begin, **found}
            with atomic_file(kept) as partial, partial.open("wb") as opened:
                np.savez(opened, **arrays)
            say(f"{family} done")
        with np.load(kept) as file:
            seconds[family] = float(file["seconds"])
            predictions |= {key: data.clip(file[key]) for key in file.files if key != "seconds"}
    return data, predictions, seconds


@click.command()
@click.option("--set", "sets", multiple=True, type=click.Choice(SETS), help="Default: both.")
@click.option(
    "--only", multiple=True, type=click.Choice(tuple(FAMILIES)), help="Families to fit; the others as kept."
)
@click.option("--quick", is_flag=True, help="Small sizes, to see that it runs.")
@click.option("-o", "--out", required=True, type=click.Path(file_okay=False), help="Folder to write to.")
def main(sets: tuple[str, ...], only: tuple[str, ...], quick: bool, out: str) -> None:
    """Measure C1: c1.json, c1.md and the figures; data and predictions are kept in a folder per set."""
    begin, folder, plan = time.monotonic(), Path(out), QUICK if quick else Plan()

    def say(what: str) -> None:
        click.echo(f"{time.monotonic() - begin:6.0f} s  {what}", err=True)

    found = {}
    for name in sets or SETS:
        say(name)
        measured = measure(name, SimulatedSpectra.of_set, plan, folder / name, say, only)
        found[name] = summarise(name, *measured)
    result = {"what": "C1", "plan": asdict(plan), "environment": describe(), "sets": found}
    # Five digits are more than the stars can tell, and keep the file small.
    result = json.loads(json.dumps(result), parse_float=lambda text: round(float(text), 5))
    (folder / "c1.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    text = "\n\n".join(f"## {what}\n\n{table}" for what, table in tables(result).items())
    (folder / "c1.md").write_text(text + "\n", encoding="utf-8")
    pictures(result, folder)
    click.echo(text)


if __name__ == "__main__":
    main()
