"""The command `moefast merge`."""

from __future__ import annotations

import json

import click

from moefast.cli.messages import tell_result
from moefast.cli.options import JSON, OVERWRITE, talk
from moefast.core.progress import ProgressLine

__all__ = ["merge"]


@click.command(short_help="Join the tables of shards into one.")
@click.argument("parts", nargs=-1, required=True, metavar="TABLE…")
@click.option("-o", "--out", required=True, metavar="TABLE", help="Table to write: .h5, .parquet or .fits.")
@OVERWRITE
@talk
@JSON
def merge(parts: tuple[str, ...], out: str, overwrite: bool, quiet: bool, as_json: bool) -> None:
    """Join the tables that moefast predict wrote with --shard, or with --rows, into one.

    \b
        moefast predict night/ --shard 0/2 -o part-0.parquet
        moefast predict night/ --shard 1/2 -o part-1.parquet
        moefast merge part-*.parquet -o night.parquet

    The columns are those of one run over all rows, bit for bit. Tables of another model, input or options, and parts
    that are missing or given twice, are refused and named; the order in which they are named does not matter. TABLE may
    be a pattern.
    """
    from moefast.cluster.merge import merge_tables, tables_named

    with ProgressLine(quiet or as_json) as progress:
        merged = merge_tables(tables_named(parts), out, overwrite=overwrite, progress=progress.rows("merge"))
    if as_json:
        facts = {
            "table": out, "rows": merged.n_rows, "parts": merged.n_parts, "of_rows": list(merged.rows), "r2": merged.r2,
            "notes": list(merged.notes),
        }  # fmt: skip
        click.echo(json.dumps(facts, indent=1))
        return
    r2 = "" if merged.r2 is None else f", R² {merged.r2:.3f}"
    first, last = merged.rows
    tell_result(
        f"{out}: {merged.n_rows:,} spectra of {merged.n_parts} parts, rows {first}:{last}{r2}", quiet=quiet
    )
    for note in merged.notes:
        tell_result(f"  note: {note}", quiet=quiet)
