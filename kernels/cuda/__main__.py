"""`python -m moefast.kernels.cuda`: compile the CUDA kernels and print what each takes. No GPU is needed."""

from __future__ import annotations

import click

from moefast.kernels.cuda.assembly import TARGETS, assemble, format_table
from moefast.kernels.cuda.registry import load

NAMES = {f"sm_{major}{minor}": (major, minor) for major, minor in TARGETS}


@click.command()
@click.option("--tensor", is_flag=True, help="The tensor-core kernel instead of all others; takes minutes.")
@click.option("--target", "targets", type=click.Choice(list(NAMES)), multiple=True, help="By default all.")
def main(tensor: bool, targets: tuple[str, ...]) -> None:
    """Print registers, shared memory, stack and spills; the exit code is 1 if a kernel spills."""
    chosen = [NAMES[name] for name in targets or NAMES]
    if tensor:
        from moefast.kernels.cuda.driverless import assemble_tensor

        rows = [assemble_tensor(target) for target in chosen]
    else:
        rows = [assemble(kernel, target) for kernel in load().values() for target in chosen]
    click.echo(format_table(rows))
    if any(row.spill_stores or row.spill_loads for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
