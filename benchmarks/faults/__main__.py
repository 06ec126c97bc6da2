"""Run the campaigns and print what was tried and what survived."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from typing import Any

import click

from moefast.benchmarks.environment import describe
from moefast.benchmarks.faults.campaigns import CAMPAIGNS
from moefast.benchmarks.faults.case import OUTCOMES, SURVIVED, Case
from moefast.benchmarks.faults.ground import prepare
from moefast.core.atomic import write_json

__all__ = ["format_table", "main"]

_ROUND = 100


def format_table(cases: list[Case]) -> str:
    """Tried, survived, and what became of the others, for each campaign."""
    rows: list[tuple[str, ...]] = [("campaign", "tried", "survived", *OUTCOMES)]
    kinds = [*dict.fromkeys(case.campaign for case in cases), "all"]
    for kind in kinds:
        mine = [case.outcome for case in cases if kind in (case.campaign, "all")]
        counts = [mine.count(outcome) for outcome in OUTCOMES]
        rows.append((kind, str(len(mine)), str(sum(counts[:SURVIVED])), *map(str, counts)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


@click.command()
@click.option("--cases", type=click.IntRange(1), default=200, show_default=True, help="Of all campaigns.")
@click.option(
    "--campaign", "chosen", multiple=True, type=click.Choice(list(CAMPAIGNS)), help="Only this one."
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False),
    help="Write counts, and every case that did not survive, as JSON.",
)
def main(cases: int, chosen: tuple[str, ...], seed: int, out: str | None) -> None:
    """Disturb moefast in many ways; the exit code is 1 if anything did not survive."""
    names = chosen or tuple(CAMPAIGNS)
    total = sum(CAMPAIGNS[name][1] for name in names)
    done: list[Case] = []
    with tempfile.TemporaryDirectory() as folder:
        ground = prepare(Path(folder))
        # What the processes of the cases share need not be looked at by their garbage collectors.
        gc.collect()
        gc.freeze()
        # In rounds, so that what was done says something about every campaign whenever it ends.
        for number, first in enumerate(range(0, cases, _ROUND)):
            for name in names:
                campaign, share = CAMPAIGNS[name]
                n = max(1, round(min(_ROUND, cases - first) * share / total))
                for case in campaign(ground, n, seed * 1_000_000 + number):
                    done.append(case)
                    if not case.survived:
                        click.echo(f"{case.campaign}: {case.name}: {case.outcome}\n{case.said}", err=True)
            if out:
                write_json(_results(done, seed), out)
    click.echo(format_table(done))
    raise SystemExit(not all(case.survived for case in done))


def _results(done: list[Case], seed: int) -> dict[str, Any]:
    counts = {
        name: {
            outcome: sum(c.campaign == name and c.outcome == outcome for c in done) for outcome in OUTCOMES
        }
        for name in dict.fromkeys(case.campaign for case in done)
    }
    lost = [vars(case) for case in done if not case.survived]
    return {
        "environment": describe(),
        "seed": seed,
        "cases": len(done),
        "counts": counts,
        "not_survived": lost,
    }


if __name__ == "__main__":
    main()
