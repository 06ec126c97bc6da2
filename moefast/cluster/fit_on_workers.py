"""Fits on the workers of a Dask cluster: both passes, to the bits of one process.

Design: a task of the first pass is a run of whole units, whose statistics it writes to a file and keeps a checkpoint
of; a worker that is lost costs what it did since. Statistics are gigabytes, so that tasks are few: two for each worker,
or one if there are few spectra.
Files are joined eight at a time by the workers, until eight are left for the client. Sums are exact, so that none of
this can be seen in the model. In the later stages a task is some stretches of rows, and what it needs of the stages
before it lies in a file that it checks by its hash; its results go to the client, who puts them in the order of rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from moefast.checkpoint import Checkpoint
from moefast.cluster.fit_parts import (
    FitPlan,
    TrainingSpectra,
    add_statistics,
    gather_to_file,
    is_whole,
    part_header,
    read_header,
    statistics_of,
    tell_if_inexact,
)
from moefast.cluster.folders import OWNER, digest_of, working_folder
from moefast.cluster.workers import ALONE, check_workers, gather_results, results_in_order, submit
from moefast.core.archives import write_hashed
from moefast.core.atomic import remove_quietly, write_atomically
from moefast.core.errors import InputError
from moefast.core.progress import StageProgress
from moefast.core.version import __version__
from moefast.fitting import Options, Passes
from moefast.fitting.first_pass import Gathered, complete
from moefast.fitting.statistics import Statistics, cut_at_multiples, n_units, rows_of_part
from moefast.fitting.training_set import BLOCK_ROWS, Rows, TrainingSet
from moefast.model import Model
from moefast.recipes import PreparedFit
from moefast.spectra.source import SpectrumSource
from moefast.spectra.spectrum_set import SpectrumSet

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["FAN_IN", "fit_on", "n_parts_of"]

FAN_IN = 8
"""Files of statistics that are joined to one at a time."""
TASKS_PER_WORKER = 2
UNITS_PER_TASK = 4
"""Units of a task of the first pass, if a worker has several: to write and read a file takes as long as half a unit."""
STRETCHES_PER_TASK = 4
"""Tasks of a later stage for each worker."""
TOPIC = "moefast rows"
Result = TypeVar("Result")


class Cluster:
    """What the tasks of a fit have in common: client, source of the spectra, folder, number of workers, and backend."""

    def __init__(
        self,
        client: Client,
        source: TrainingSpectra,
        folder: Path,
        n_workers: int,
        backend: Literal["cpu", "cuda"],
    ) -> None:
        self.client, self.source, self.folder = client, source, folder
        self.n_workers, self.backend = n_workers, backend

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """A task that is begun again if its worker is lost."""
        return submit(self.client, work, *arguments)


def fit_on(
    client: Client,
    plan: FitPlan,
    prepared: PreparedFit,
    out: str | Path,
    *,
    backend: Literal["cpu", "cuda"] = "cpu",
    n_parts: int | None = None,
    save: Callable[[Model], Model] | None = None,
    progress: StageProgress | None = None,
    tell: Callable[[str], None] | None = None,
) -> Model:
    """Fit on the workers of a cluster, to the model that one process would have fitted.

    Parameters
    ----------
    client : distributed.Client
    plan, prepared : FitPlan, PreparedFit
        The fit; `plan` is what workers prepare it by.
    out : path
        Where the model will be, on a disk that all workers see: parts lie in a hidden folder beside it until the fit is
        complete, and a fit that is repeated goes on with them.
    backend : "cpu" or "cuda"
        Where the workers gather the normal equations.
    n_parts : int, optional
        Tasks of the first pass.
    save : callable, optional
        Called with the model before the parts are removed, so that a fit that is killed meanwhile still has them; gives
        the model as it is saved.
    progress : callable, optional
        Called with the name of a stage, rows (or steps) done by all workers, and rows in all.
    tell : callable, optional
        Called with what the user should know.

    Returns
    -------
    Model
        What `save` gave; without it, a model that is not saved yet.

    Raises
    ------
    InputError
        A worker does not see a file, or has another version of moefast; the worker is named.
    OutputError
        Parts cannot be written.
    """
    out = Path(os.path.abspath(out))
    digest = _digest(prepared, backend)
    folder = working_folder(out, digest)
    files = [*plan.source.files, *(os.path.abspath(path) for path in plan.source.like), str(folder / OWNER)]
    workers = check_workers(client, files)
    cluster = Cluster(client, plan.source, folder, len(workers), backend)
    report = progress or (lambda *_: None)

    def first_pass(data: TrainingSet, _: Checkpoint | None, __: str) -> Gathered:
        own = dataclasses.replace(prepared, options=data.options)
        return _first_pass(cluster, plan, own, data, n_parts, tell)

    passes = Passes(functools.partial(SpreadTrainingSet, cluster), first_pass)
    model = prepared.fit(report, None, backend, passes)
    if save is not None:
        model = save(model)
    remove_quietly(folder)
    return model


def _digest(prepared: PreparedFit, backend: str) -> str:
    record = {
        "fingerprint": prepared.fingerprint, "options": dataclasses.asdict(prepared.options),
        "recipe": prepared.recipe, "version": __version__, "backend": backend,
    }  # fmt: skip
    return digest_of(record)


# -- first pass -----------------------------------------------------------------------------------------------------


def n_parts_of(n_rows: int, n_workers: int) -> int:
    """Parts of a first pass: a few for each worker, but one alone where these would be short."""
    units = n_units(n_rows)
    each = min(TASKS_PER_WORKER, max(1, units // (UNITS_PER_TASK * n_workers)))
    return min(units, each * n_workers)


def _first_pass(
    cluster: Cluster, plan: FitPlan, prepared: PreparedFit, data: TrainingSet, n_parts: int | None,
    tell: Callable[[str], None] | None,
) -> Gathered:  # fmt: skip
    """What the parts of all workers give."""
    n_rows, units = prepared.spectra.n_rows, n_units(prepared.spectra.n_rows)
    kept = cluster.folder / "parts.json"
    count = min(units, n_parts or n_parts_of(n_rows, cluster.n_workers))
    with contextlib.suppress(OSError, ValueError, KeyError):
        # A fit that goes on has the parts that it had.
        count = min(units, int(json.loads(kept.read_text())["parts"]))
    write_atomically(kept, json.dumps({"parts": count}).encode())
    done: dict[int, int] = {}
    # Two fits of the same spectra may have a first pass each.
    name = digest_of({"options": dataclasses.asdict(prepared.options)})[:8]
    paths = [cluster.folder / f"{name}-{index}-of-{count}.npz" for index in range(count)]

    def heard(event: tuple[float, Any]) -> None:
        of, index, rows = event[1]
        if of == name:
            done[index] = rows
            data.progress("normal equations", min(n_rows, sum(done.values())), n_rows)

    cluster.client.subscribe_topic(TOPIC, heard)
    try:
        tasks = [
            cluster.submit(
                _gather_part, plan, prepared.options, prepared.recipe, prepared.fingerprint, str(path),
                rows_of_part(n_rows, index, count), cluster.backend, (name, index),
            )
            for index, path in enumerate(paths)
        ]  # fmt: skip
        gather_results(cluster.client, tasks)
    finally:
        cluster.client.unsubscribe_topic(TOPIC)
    data.progress("normal equations", n_rows, n_rows)
    level = 0
    while len(paths) > FAN_IN:
        level += 1
        groups = [paths[start : start + FAN_IN] for start in range(0, len(paths), FAN_IN)]
        paths = [cluster.folder / f"{name}-level-{level}-{index}.npz" for index in range(len(groups))]
        tasks = [
            cluster.submit(_join, [str(part) for part in group], str(path))
            for group, path in zip(groups, paths, strict=True)
        ]
        gather_results(cluster.client, tasks)
    total = _sum(paths)
    tell_if_inexact(total, tell)
    return complete(data, total)


@functools.lru_cache(maxsize=1)
def _opened(source: TrainingSpectra) -> Any:
    return source.open()


def _gather_part(
    plan: FitPlan, options: Options, recipe: str, fingerprint: str, path: str, rows: tuple[int, int],
    backend: Literal["cpu", "cuda"], name: tuple[str, int],
) -> int:  # fmt: skip
    """Rows of a part, once its file is there."""
    with ALONE:
        prepared = PreparedFit(_opened(plan.source), options, recipe, fingerprint)
        if is_whole(path, part_header(plan, prepared, rows, backend)):
            _say(name, rows[1] - rows[0])
            return rows[1] - rows[0]
        last = 0.0

        def progress(stage: str, done: int, total: int) -> None:
            nonlocal last
            if stage == "normal equations" and time.monotonic() - last > 0.5:
                last = time.monotonic()
                _say(name, done)

        kept = Checkpoint(Path(path).with_suffix(".so-far"), tell=lambda _: None)
        gather_to_file(
            path, plan, prepared, rows, backend=backend, progress=progress, checkpoint=kept, durable=False
        )
        kept.remove()
        _say(name, rows[1] - rows[0])
        return rows[1] - rows[0]


def _say(name: tuple[str, int], rows: int) -> None:
    """Tell the client how many rows of a part are done."""
    from distributed import get_worker

    with contextlib.suppress(ValueError):
        get_worker().log_event(TOPIC, (*name, rows))


def _sum(paths: Sequence[str | Path]) -> Statistics:
    total = statistics_of(paths[0])
    for path in paths[1:]:
        add_statistics(total, path)
    return total


def _join(paths: list[str], out: str) -> None:
    """Write the sum of some files of statistics to one."""
    with ALONE:
        header = read_header(paths[0])
        last = read_header(paths[-1])
        header["rows"] = [header["rows"][0], last["rows"][1]]
        document = {key: value for key, value in header.items() if key not in _OF_ONE_FILE}
        if not is_whole(out, document):
            write_hashed(Path(out), document, _sum(paths).arrays(), durable=False)


_OF_ONE_FILE = ("sha256", "checksum")


# -- later stages ---------------------------------------------------------------------------------------------------


class SpreadTrainingSet(TrainingSet):
    """The rows of a fit, whose blocks are worked on by the workers of a cluster."""

    def __init__(self, cluster: Cluster, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._cluster = cluster

    def map_blocks(
        self, stage: str, rows: list[tuple[int, int]], work: Callable[..., Result], *arguments: Any
    ) -> Iterator[Result]:
        """See `TrainingSet.map_blocks`."""
        cluster = self._cluster
        state = (work, arguments, self.options, self.reference, self.largest_error, self.labelled)
        content = pickle.dumps(state, protocol=pickle.HIGHEST_PROTOCOL)
        digest = hashlib.sha256(content).hexdigest()
        path = cluster.folder / f"{digest[:16]}.stage"
        write_atomically(path, content)
        pieces = [piece for stretch in rows for piece in blocks_of(self.spectra, *stretch)]
        n_tasks = min(len(pieces), STRETCHES_PER_TASK * cluster.n_workers)
        groups = [
            pieces[len(pieces) * i // n_tasks : len(pieces) * (i + 1) // n_tasks] for i in range(n_tasks)
        ]
        tasks = [
            cluster.submit(_map_rows, cluster.source, str(path), digest, stage, group) for group in groups
        ]
        total, done = sum(b - a for a, b in pieces), 0
        try:
            with contextlib.closing(results_in_order(cluster.client, tasks)) as found:
                for group, results in zip(groups, found, strict=True):
                    done += sum(b - a for a, b in group)
                    self.progress(stage, done, total)
                    for first, stop, bins, result in results:
                        self.bins[first:stop] = bins
                        yield result
        finally:
            path.unlink(missing_ok=True)


def blocks_of(spectra: SpectrumSource, first: int, stop: int) -> list[tuple[int, int]]:
    """First row of each block that one process reads from `first` to `stop`, and the one after its last.

    Matrix products of other numbers of rows have other last bits: a task must not cut where one process does not, nor
    the other way round. Files are cut from their own first rows on.
    """
    edges = [0, spectra.n_rows]
    if isinstance(spectra, SpectrumSet):
        edges = spectra.first_rows.tolist()
    found = []
    for begin, end in pairwise(edges):
        a, b = max(first, begin), min(stop, end)
        if a < b:
            found += [(begin + x, begin + y) for x, y in cut_at_multiples(a - begin, b - begin, BLOCK_ROWS)]
    return found


@functools.lru_cache(maxsize=1)
def _stage(
    source: TrainingSpectra, path: str, digest: str
) -> tuple[TrainingSet, Callable[..., Any], tuple[Any, ...]]:
    """The training set of a worker, as the client has it in a stage, and what is to be done with its blocks."""
    content = Path(path).read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise InputError(f"{path}: is not what the client wrote; repeat the command")
    # Written by the client of this very task, who says its hash.
    work, arguments, options, reference, largest_error, labelled = pickle.loads(content)
    data = TrainingSet(_opened(source), options, lambda *_: None)
    data.reference, data.largest_error, data.labelled = reference, largest_error, labelled
    return data, work, arguments


def _map_rows(
    source: TrainingSpectra, path: str, digest: str, stage: str, rows: list[tuple[int, int]]
) -> list[tuple[int, int, np.ndarray, Any]]:
    """First row, last row, bins and results of each block of some stretches."""
    with ALONE:
        data, work, arguments = _stage(source, path, digest)

        def with_rows(data: TrainingSet, block: Rows) -> tuple[int, int, np.ndarray, Any]:
            here = block[0]
            return here.start, here.stop, data.bins[here].copy(), work(data, block, *arguments)

        return list(data.map_blocks(stage, rows, with_rows))
