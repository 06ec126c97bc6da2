"""Predictions on the workers of a Dask cluster: the same parts, the same tables, whoever computes them.

Design: a task is one shard, a pure function of files, model, options and its number, which writes its table under its
own name. A task that is lost with its worker is done again by another; a table that is there and was made of the same
is not made again, so that a client that was killed goes on where it stood. Tables are merged in the order of their
shards, not in that of finishing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moefast.cluster.folders import digest_of, working_folder
from moefast.cluster.merge import Merged, merge_tables
from moefast.cluster.nights import signature
from moefast.cluster.workers import ALONE, check_workers, gather_results, shared_name, submit
from moefast.core.atomic import remove_quietly
from moefast.core.errors import MoefastError
from moefast.core.version import __version__
from moefast.model import Model
from moefast.predicting.files import count_rows, predict
from moefast.spectra.paths import content_of, find_files
from moefast.spectra.tables import read_layout, read_table, refuse_table

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["predict_on"]

ROWS_PER_TASK = 50_000
"""Rows of a task, about: seconds of work, so that little is lost with a worker."""
LARGEST_COUNT = 10_000
"""Tasks at most: the scheduler takes a millisecond for each."""


def predict_on(
    client: Client,
    paths: Iterable[str | Path],
    model: str | Path | None,
    out: str | Path,
    *,
    options: Mapping[str, Any],
    overwrite: bool = False,
    rows_per_task: int = ROWS_PER_TASK,
    progress: Callable[[int, int], None] | None = None,
) -> Merged:
    """Predict on the workers of a cluster, one shard after the other, and merge their tables.

    The columns are those of `moefast.predict` on one machine, bit for bit, however many workers there are and in
    whatever order they finish. Tables of shards lie in a folder beside `out` until they are merged; what is there and
    was made of the same input, model and options is not made again.

    Parameters
    ----------
    client : distributed.Client
    paths : iterable of path
        Files, folders or patterns that all workers see under the same names.
    model : path or name of a shipped model, optional
    out : path
        Table to write, on a disk that all workers see.
    options : mapping
        Options of `moefast.predict`.
    overwrite : bool
    rows_per_task : int
    progress : callable, optional
        Called with rows done and rows in all.

    Raises
    ------
    InputError, ModelError
        A worker does not see a file, or has another model or version; the worker is named.
    OutputError
        The table exists, or cannot be written.
    """
    out = Path(os.path.abspath(out))
    refuse_table(out, overwrite=overwrite)
    files = [os.path.abspath(path) for path in find_files(list(paths))]
    name = None if model is None else shared_name(model)
    chosen = Model.load(name)
    n_rows = count_rows(files, chosen)
    workers = check_workers(client, files, name, chosen.hash)
    count = max(1, min(LARGEST_COUNT, n_rows, max(-(-n_rows // rows_per_task), len(workers))))
    record = {
        "inputs": [[path, signature(path)] for path in files],
        "model_sha256": chosen.hash, "moefast_version": __version__, "shards": count,
        "options": json.loads(json.dumps(options, default=str)),
        # Tables under the same name may hold other velocities or targets by now.
        "velocity": content_of(options.get("velocity")), "targets": content_of(options.get("targets")),
    }  # fmt: skip
    digest = digest_of(record)
    folder = working_folder(out, digest)
    tables = [folder / f"{index}-of-{count}.parquet" for index in range(count)]
    tasks = [
        submit(client, _predict_shard, files, name, str(table), (index, count), dict(options), digest)
        for index, table in enumerate(tables)
    ]
    gather_results(client, tasks, n_rows, progress)
    merged = merge_tables(tables, out, overwrite=overwrite)
    remove_quietly(folder)
    return merged


def _predict_shard(
    files: Sequence[str],
    model: str | None,
    table: str,
    shard: tuple[int, int],
    options: dict[str, Any],
    digest: str,
) -> int:
    """Rows of a shard, once its table is there."""
    with suppress(MoefastError):
        _, attributes, n_rows = read_layout(table)
        if attributes.get("made_of") == {"digest": digest}:
            # Every value: they have checksums, which are compared when they are read.
            read_table(table)
            return n_rows
    with ALONE:
        summary = predict(
            files, model, table, shard=shard, overwrite=True, record={"digest": digest}, **options
        )
    return summary.n_rows
