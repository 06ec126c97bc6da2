"""`python -m moefast.kernels.cuda`: compile the CUDA kernels and print what each takes. No GPU is needed."""

from __future__ import annotations

import json

import click

from moefast.kernels.cuda.assembly import TARGETS, assemble, format_table
from moefast.kernels.cuda.compiled import PATH, differences, read, renewed
from moefast.kernels.cuda.registry import load

NAMES = {f"sm_{major}{minor}": (major, minor) for major, minor in TARGETS}


@click.command()
@click.option("--target", "targets", type=click.Choice(list(NAMES)), multiple=True, help="By default all.")
@click.option("--renew", is_flag=True, help=f"Write the numbers to {PATH.name}, to compare with from now on.")
def main(targets: tuple[str, ...], renew: bool) -> None:
    """Print registers, shared memory, stack, spills and instructions of every kernel.

    The exit code is 1 if a kernel spills, or has become larger or smaller than is written down.
    """
    chosen = [NAMES[name] for name in targets or NAMES]
    rows = [assemble(kernel, target) for kernel in load().values() for target in chosen]
    click.echo(format_table(rows))
    table = read()
    if renew:
        table = renewed(table, rows)
        PATH.write_text(json.dumps(table, indent=1) + "\n")
    if found := differences(table, rows):
        click.echo("\n".join(found), err=True)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
