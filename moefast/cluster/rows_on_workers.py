"""Rows on the workers of a Dask cluster: evaluations, ceilings and simulations in parts, to the bits of one process.

Design: a task is a run of rows that begins where a block begins, a pure function of the job and its rows. What it finds
goes to the client, who puts it in the order of rows; simulated spectra go to files, one for each task, which are
complete or absent. What several tasks of a worker need is opened once.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moefast.ceilings.star_bounds import BLOCK_ROWS as CEILING_ROWS
from moefast.ceilings.star_bounds import BlockBounds, StarBounds
from moefast.cluster.workers import (
    ALONE,
    check_workers,
    gather_results,
    results_in_order,
    shared_name,
    submit,
)
from moefast.core.errors import InputError, MoefastError, OutputError
from moefast.core.progress import RowProgress
from moefast.core.version import __version__
from moefast.model import Model
from moefast.protocol.scorer import Scored, Scorer
from moefast.simulate import Observed, Settings, simulate_file, simulate_set
from moefast.spectra.paths import find_files
from moefast.spectra.shard import Shard

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["ROWS_PER_FILE", "ceilings_on", "scores_on", "simulate_on"]

TASKS_PER_WORKER = 8
ROWS_PER_FILE = 50_000
"""Spectra of a simulated file, at the most."""


def _nothing(*_: Any) -> None:
    """No progress."""


def _spans(n_rows: int, block_rows: int, n_workers: int) -> list[tuple[int, int]]:
    """Runs of whole blocks, some for each worker."""
    blocks = -(-n_rows // block_rows)
    count = max(1, min(blocks, TASKS_PER_WORKER * n_workers))
    cuts = [min(n_rows, blocks * index // count * block_rows) for index in range(count + 1)]
    return [(a, b) for a, b in itertools.pairwise(cuts) if a < b]


def _in_order(
    client: Client, work: Callable[..., Any], job: dict[str, Any], spans: Sequence[tuple[int, int]], report: RowProgress
) -> Iterator[Any]:  # fmt: skip
    """What the tasks of all spans give, in their order."""
    content = pickle.dumps(job)
    tasks = [submit(client, work, content, span) for span in spans]
    with contextlib.closing(results_in_order(client, tasks)) as found:
        for (_, stop), results in zip(spans, found, strict=True):
            report(stop, spans[-1][1])
            yield from results


@functools.lru_cache(maxsize=1)
def _scorer(content: bytes) -> Scorer:
    # Of the client of this very task, within what Dask itself pickles.
    return Scorer(**pickle.loads(content))


def _score(content: bytes, span: tuple[int, int]) -> list[Scored]:
    with ALONE:
        return list(_scorer(content).score(span, _nothing))


def scores_on(client: Client, scorer: Scorer, report: RowProgress) -> Iterator[Scored]:
    """The `spread` of `moefast.protocol.evaluate.evaluate`, with a client before its arguments.

    Raises
    ------
    InputError, ModelError
        A worker does not see a file, or has another model or version; the worker is named.
    """
    arguments: dict[str, Any] = dict(scorer.arguments)
    files = [os.path.abspath(path) for path in find_files(arguments["paths"])]
    model = arguments["model"]
    if isinstance(model, Model):
        raise InputError("workers of a cluster read the model from its folder; give the folder")
    name = None if model is None else shared_name(model)
    is_model = name is None or not Path(name).is_file()
    other = [] if is_model else [str(name)]
    expected = Model.load(name).hash if is_model else None
    workers = check_workers(client, [*files, *other], name if is_model else None, expected)
    job = {**arguments, "paths": files, "model": name}
    yield from _in_order(
        client, _score, job, _spans(scorer.spectra.n_rows, scorer.block_rows, len(workers)), report
    )


@functools.lru_cache(maxsize=1)
def _star_bounds(content: bytes) -> StarBounds:
    # As above.
    return StarBounds(**pickle.loads(content))


def _bounds(content: bytes, span: tuple[int, int]) -> list[BlockBounds]:
    with ALONE:
        return list(_star_bounds(content).blocks(span, _nothing))


def ceilings_on(
    client: Client, arguments: dict[str, Any], n_rows: int, report: RowProgress
) -> Iterator[BlockBounds]:
    """The `spread` of `moefast.ceilings.ceiling.compute`, with a client before its arguments.

    Raises
    ------
    InputError
        A worker does not see a file, or has another version; the worker is named.
    """
    files = [os.path.abspath(path) for path in find_files(arguments["paths"])]
    workers = check_workers(client, files)
    job = {**arguments, "paths": files}
    yield from _in_order(client, _bounds, job, _spans(n_rows, CEILING_ROWS, len(workers)), report)


# -- simulations ----------------------------------------------------------------------------------------------------


def simulate_on(
    client: Client,
    folder: str | Path,
    rows: tuple[int, int],
    *,
    name: str | None = None,
    part: str | None = None,
    seed: int | None = None,
    settings: Settings | None = None,
    like: Sequence[str] = (),
    resolution: str | None = None,
    noisy: bool | None = None,
    overwrite: bool = False,
    rows_per_file: int = ROWS_PER_FILE,
    progress: RowProgress | None = None,
) -> list[Path]:
    """Simulate rows into the files of a folder, one for each task; the rows are those of one large file.

    Files that are there and hold what they would hold are not made again.

    Parameters
    ----------
    client : distributed.Client
    folder : path
        On a disk that all workers see.
    rows : tuple of int
        First row and the one after the last.
    name, part : str, optional
        A reference set and its part, of any size; instead of `seed` and `settings`.
    seed : int, optional
    settings : Settings, optional
    like : sequence of str
        Files that the spectra should look like.
    resolution : str, optional
        With `like`.
    noisy : bool, optional
        Whether to store noisy flux.
    overwrite : bool
        Replace files that hold something else.
    rows_per_file : int
    progress : callable, optional
        Called with rows done by all workers and rows in all.

    Returns
    -------
    list of Path

    Raises
    ------
    OutputError
        A file of another content is there, or cannot be written.
    InputError
        A worker does not see the folder, or has another version; the worker is named.
    """
    folder = Path(os.path.abspath(folder))
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: the folder cannot be made ({error})") from error
    files = [os.path.abspath(path) for path in find_files(list(like))] if like else []
    workers = check_workers(client, [str(folder), *files])
    first, stop = rows
    count = max(-(-(stop - first) // rows_per_file), min(len(workers), -(-(stop - first) // 1024)))
    cuts = [first + (stop - first) * index // count for index in range(count + 1)]
    job = {
        "name": name, "part": part, "seed": seed, "settings": None if settings is None else settings.to_json(),
        "like": files, "resolution": resolution, "noisy": noisy,
    }  # fmt: skip
    digits = len(str(stop))
    paths = [folder / f"rows-{a:0{digits}d}-{b:0{digits}d}.h5" for a, b in itertools.pairwise(cuts)]
    tasks = [
        submit(client, _simulate, job, str(path), (a, b), overwrite)
        for path, a, b in zip(paths, cuts[:-1], cuts[1:], strict=True)
    ]
    gather_results(client, tasks, stop - first, progress)
    return paths


def _simulate(job: dict[str, Any], path: str, rows: tuple[int, int], overwrite: bool) -> int:
    """Rows of a file, once it is there."""
    made_of = json.dumps({**job, "rows": rows, "version": __version__}, sort_keys=True)
    n_rows = rows[1] - rows[0]
    with suppress(MoefastError):
        if str(Shard(path).attrs.get("made_of")) == made_of:
            return n_rows
    about = {"made_of": made_of}
    with ALONE:
        if job["name"] is not None:
            simulate_set(
                path, job["name"], job["part"], rows=rows, noisy=job["noisy"], overwrite=overwrite, attrs=about
            )  # fmt: skip
        else:
            observed = Observed.of_files(job["like"], resolution=job["resolution"]) if job["like"] else None
            simulate_file(
                path, n_rows, seed=job["seed"], settings=Settings.from_json(job["settings"]), first_row=rows[0],
                noisy=job["noisy"] is None or job["noisy"], overwrite=overwrite, observed=observed, attrs=about,
            )  # fmt: skip
    return n_rows
