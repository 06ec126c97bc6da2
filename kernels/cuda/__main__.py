"""`python -m moefast.kernels.cuda`: compile the CUDA kernels and print what each takes. No GPU is needed."""

from __future__ import annotations

import json
from pathlib import Path

import click

from moefast.kernels.cuda.assembly import TARGETS, assemble, format_table
from moefast.kernels.cuda.registry import load

NAMES = {f"sm_{major}{minor}": (major, minor) for major, minor in TARGETS}


@click.command()
@click.option("--target", "targets", type=click.Choice(list(NAMES)), multiple=True, help="By default all.")
@click.option(
    "--json", "path", type=click.Path(dir_okay=False), help="Also write registers and instructions here."
)
def main(targets: tuple[str, ...], path: str | None) -> None:
    """Print registers, shared memory, stack, spills and instructions; the exit code is 1 if a kernel spills."""
    chosen = [NAMES[name] for name in targets or NAMES]
    rows = [assemble(kernel, target) for kernel in load().values() for target in chosen]
    click.echo(format_table(rows))
    if path:
        counts: dict[str, dict[str, dict[str, int]]] = {}
        for row in rows:
            of_target = counts.setdefault(f"sm_{row.target[0]}{row.target[1]}", {})
            of_target[row.kernel] = {"registers": row.registers, "instructions": row.instructions}
        Path(path).write_text(json.dumps(counts, indent=1) + "\n")
    if any(row.spill_stores or row.spill_loads for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
