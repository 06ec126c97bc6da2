"""The command `moefast merge`."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from moefast.cli.messages import tell_result
from moefast.cli.options import JSON, OVERWRITE, talk
from moefast.cli.swapped import swapped_told
from moefast.core.progress import ProgressLine
from moefast.core.text import counted

__all__ = ["merge"]


@click.command(short_help="Join the tables, or the statistics of a fit, of shards.")
@click.argument("parts", nargs=-1, required=True, metavar="PART…")
@click.option("-o", "--out", required=True, metavar="OUT",
              help="Table to write: .h5, .parquet or .fits; of statistics the model folder.")  # fmt: skip
@click.option("--hats", is_flag=True,
              help="Write a catalogue, a folder of Parquet files divided on the sky that LSDB opens; the tables need "
              "columns ra and dec (predict --keep ra,dec).")  # fmt: skip
@OVERWRITE
@talk
@JSON
@swapped_told
def merge(parts: tuple[str, ...], out: str, hats: bool, overwrite: bool, quiet: bool, as_json: bool) -> None:
    """Join the tables that moefast predict wrote with --shard, or with --rows, into one; or finish a fit.

    \b
        moefast predict night/ --shard 0/2 -o part-0.parquet
        moefast predict night/ --shard 1/2 -o part-1.parquet
        moefast merge part-*.parquet -o night.parquet

    The columns are those of one run over all rows, bit for bit. Tables of another model, input or options, and parts
    that are missing or given twice, are refused and named; the order in which they are named does not matter. PART may
    be a pattern.

    \b
        moefast fit train/ --shard 0/2 -o part-0.npz
        moefast fit train/ --shard 1/2 -o part-1.npz
        moefast merge part-*.npz -o model/

    Files of statistics (.npz) give the model of one fit over all rows, bit for bit. What follows the first pass reads
    some spectra again, under the names that the parts were written with.
    """
    from moefast.cluster.fit_parts import is_part
    from moefast.cluster.merge import files_named, merge_tables, tables_named

    if is_part(parts[0]):
        _finish_fit(files_named(parts), out, overwrite=overwrite, quiet=quiet, as_json=as_json)
        return
    if hats:
        _catalogue(tables_named(parts), out, overwrite=overwrite, quiet=quiet, as_json=as_json)
        return
    with ProgressLine(quiet or as_json) as progress:
        progress.doing("merge: reading")
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
        f"{out}: {counted(merged.n_rows, 'spectrum')} of {counted(merged.n_parts, 'part')}, rows {first}:{last}{r2}",
        quiet=quiet,
    )
    for note in merged.notes:
        tell_result(f"  note: {note}", quiet=quiet)


def _catalogue(tables: list[Path], out: str, *, overwrite: bool, quiet: bool, as_json: bool) -> None:
    """Tables as a catalogue that is divided on the sky."""
    from moefast.cluster.catalogue import write_catalogue
    from moefast.core.progress import FILES

    with ProgressLine(quiet or as_json) as progress:
        progress.doing("merge: reading")
        found = write_catalogue(tables, out, overwrite=overwrite, progress=progress.rows(FILES))
    if as_json:
        facts = {
            "catalogue": out, "rows": found.n_rows, "files": found.n_files, "left_out": found.n_without_position,
        }  # fmt: skip
        click.echo(json.dumps(facts, indent=1))
        return
    tell_result(f"{out}: {counted(found.n_rows, 'star')} in {counted(found.n_files, 'file')}", quiet=quiet)
    if found.n_without_position:
        tell_result(
            f"  left out: {counted(found.n_without_position, 'star')} without a position", quiet=quiet
        )


def _finish_fit(parts: list[Path], out: str, *, overwrite: bool, quiet: bool, as_json: bool) -> None:
    """The model that the statistics of all parts give."""
    from moefast.cli.fit import tell_model
    from moefast.cluster.fit_parts import fit_of_parts
    from moefast.model import check_target

    check_target(Path(out), overwrite)
    begin = time.monotonic()
    with ProgressLine(quiet or as_json) as progress:
        progress.doing("merge: reading")
        model = fit_of_parts(parts, progress=progress.stage, tell=progress.tell).save(
            out, overwrite=overwrite
        )
    facts = {
        "model": out, "parts": len(parts), "seconds": time.monotonic() - begin,
        "backend": model.manifest["training"]["backend"], **model.manifest["fit"],
    }  # fmt: skip
    tell_model(facts, model, out, quiet=quiet, as_json=as_json)
