"""Tables as a catalogue that is divided on the sky: Parquet in the layout of HATS, which LSDB opens.

Design: a file per HEALPix pixel of one order, its rows in the order of their finest pixel; beside the columns of the
tables there is `_healpix_29`. Tables are read one at a time, and their rows appended to a file of each pixel's; these
are put in order one after the other, so that memory is that of the largest table or pixel. The folder is complete or
absent.

Source: S. Wyatt et al., "HATS: hierarchical adaptive tiling scheme", IVOA note, https://www.ivoa.net/documents/Notes/HATS/
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from moefast.core.atomic import partial_folder, publish_folder, remove_quietly
from moefast.core.errors import InputError, OutputError
from moefast.core.healpix import LARGEST_ORDER, nested_pixels
from moefast.core.version import __version__
from moefast.spectra.tables import read_table

__all__ = ["ORDER", "Catalogue", "write_catalogue"]

ORDER = 3
"""Of the files: 768 pixels of 7 degrees."""
INDEX = f"_healpix_{LARGEST_ORDER}"


@dataclass(frozen=True)
class Catalogue:
    """What was written: rows, files, and rows that have no position and were left out."""

    n_rows: int
    n_files: int
    n_without_position: int


def write_catalogue(
    paths: Iterable[str | Path],
    folder: str | Path,
    *,
    order: int = ORDER,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Catalogue:
    """Write tables as a catalogue.

    Parameters
    ----------
    paths : sequence of path
        Tables with columns ra and dec [degrees], as ``moefast predict --keep ra,dec`` writes them.
    folder : path
    order : int
        HEALPix order of the files.
    overwrite : bool
        Replace an existing folder.
    progress : callable, optional
        Called with tables done and tables in all.

    Raises
    ------
    InputError
        A table has no positions, or other columns than the first.
    OutputError
        The folder exists, or cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    target, tables = Path(folder), list(paths)
    if target.exists() and not overwrite:
        raise OutputError(f"{target}: exists already; choose another name, or replace it with --overwrite")
    n_rows = n_without = 0
    schema: Any = None
    pieces: dict[int, list[Path]] = {}
    with _whole(target, overwrite) as partial:
        waiting = partial / "waiting"
        waiting.mkdir()
        for number, path in enumerate(tables):
            columns, _ = read_table(path)
            for name in ("ra", "dec"):
                if name not in columns:
                    raise InputError(f"{path}: has no column {name}; predict with --keep ra,dec")
            there = np.isfinite(columns["ra"]) & (np.abs(columns["dec"]) <= 90)
            n_without += int((~there).sum())
            finest = nested_pixels(columns["ra"][there], columns["dec"][there], LARGEST_ORDER)
            table = pa.table({INDEX: finest, **{name: values[there] for name, values in columns.items()}})
            schema = schema or table.schema
            if table.schema != schema:
                raise InputError(f"{path}: has other columns than {tables[0]}")
            pixels = finest >> 2 * (LARGEST_ORDER - order)
            for pixel in np.unique(pixels).tolist():
                piece = waiting / f"{pixel}-{number}.parquet"
                pq.write_table(table.filter(pa.array(pixels == pixel)), piece)
                pieces.setdefault(pixel, []).append(piece)
            n_rows += len(finest)
            if progress is not None:
                progress(number + 1, len(tables))
        for pixel, parts in sorted(pieces.items()):
            whole = pa.concat_tables([pq.read_table(part) for part in parts]).sort_by(INDEX)
            file = (
                partial
                / "dataset"
                / f"Norder={order}"
                / f"Dir={pixel // 10000 * 10000}"
                / f"Npix={pixel}.parquet"
            )
            file.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(whole, file)
            for part in parts:
                part.unlink()
        waiting.rmdir()
        if schema is None or not pieces:
            raise InputError("no row of the tables has a position; nothing to write")
        pq.write_metadata(schema, partial / "dataset" / "_common_metadata")
        (partial / "partition_info.csv").write_text(_partitions(order, sorted(pieces)), encoding="ascii")
        size = sum(path.stat().st_size for path in partial.rglob("*.parquet"))
        (partial / "hats.properties").write_text(
            _properties(target.name, order, n_rows, len(pieces), size), encoding="utf-8"
        )
    return Catalogue(n_rows, len(pieces), n_without)


@contextmanager
def _whole(target: Path, overwrite: bool) -> Iterator[Path]:
    """A folder that gets its name when the block ends, and is removed if the block fails."""
    partial = partial_folder(target)
    try:
        yield partial
        publish_folder(partial, target, overwrite=overwrite)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        remove_quietly(partial)


def _partitions(order: int, pixels: list[int]) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("Norder", "Npix"))
    rows.writerows((order, pixel) for pixel in pixels)
    return text.getvalue()


def _properties(name: str, order: int, n_rows: int, n_files: int, size: int) -> str:
    said = {
        "obs_collection": name, "dataproduct_type": "object", "hats_nrows": n_rows, "hats_col_ra": "ra",
        "hats_col_dec": "dec", "hats_col_healpix": INDEX, "hats_col_healpix_order": LARGEST_ORDER,
        "hats_npix_suffix": ".parquet", "hats_order": order, "hats_max_rows": n_rows,
        "moc_sky_fraction": f"{n_files / (12 * 4**order):.5f}",
        "hats_builder": f"moefast {__version__}", "hats_version": "v0.1", "hats_estsize": size // 1024,
        "hats_creation_date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MUTC"),
    }  # fmt: skip
    return "#HATS catalog\n" + "".join(f"{key}={value}\n" for key, value in said.items())
