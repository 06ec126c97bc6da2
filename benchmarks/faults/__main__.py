"""Run the campaigns and print what was tried and what survived."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click

from moefast.benchmarks.faults.campaigns import CAMPAIGNS, prepare
from moefast.benchmarks.faults.case import OUTCOMES, Case

__all__ = ["format_table", "main"]


def format_table(cases: list[Case]) -> str:
    """Tried, survived, and what became of the others, for each campaign."""
    rows: list[tuple[str, ...]] = [("campaign", "tried", "survived", *OUTCOMES)]
    kinds = [*dict.fromkeys(case.campaign for case in cases), "all"]
    for kind in kinds:
        mine = [case.outcome for case in cases if kind in (case.campaign, "all")]
        counts = [mine.count(outcome) for outcome in OUTCOMES]
        rows.append((kind, str(len(mine)), str(counts[0] + counts[1]), *map(str, counts)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


@click.command()
@click.option("--cases", type=click.IntRange(1), default=100, show_default=True, help="Of each campaign.")
@click.option(
    "--campaign", "chosen", multiple=True, type=click.Choice(list(CAMPAIGNS)), help="Only this one."
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "-o", "--out", type=click.Path(dir_okay=False), help="Write every case that did not survive as JSON."
)
def main(cases: int, chosen: tuple[str, ...], seed: int, out: str | None) -> None:
    """Disturb moefast in many ways; the exit code is 1 if anything did not survive."""
    done: list[Case] = []
    with tempfile.TemporaryDirectory() as folder:
        ground = prepare(Path(folder))
        for name in chosen or CAMPAIGNS:
            for case in CAMPAIGNS[name](ground, cases, seed):
                done.append(case)
                if case.outcome not in OUTCOMES[:2]:
                    click.echo(f"{case.campaign}: {case.name}: {case.outcome}\n{case.said}", err=True)
    click.echo(format_table(done))
    lost = [vars(case) for case in done if case.outcome not in OUTCOMES[:2]]
    if out:
        Path(out).write_text(json.dumps(lost, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(bool(lost))


if __name__ == "__main__":
    main()
