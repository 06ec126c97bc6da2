"""Runs over many inputs, one table for each: what is there already is trusted only if it is what would be written.

Design: every input is a job of its own with a table of its own. A table says what it was made of (content, size and
time of the input, model, options); a later run compares that with what it would make, and skips or replaces. The state
of every job is kept in a table that is replaced after each, so that a run which is killed can be read and repeated.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moefast.core.atomic import write_atomically
from moefast.core.errors import InputError, MoefastError
from moefast.core.text import counted
from moefast.core.version import __version__
from moefast.model import Model
from moefast.predicting.files import predict
from moefast.predicting.summary import Summary
from moefast.spectra.paths import content_of, find_files
from moefast.spectra.tables import WRITERS, read_layout, read_table

__all__ = ["STATES", "Job", "listed", "plan", "run", "signature", "worst"]

STATES = ("waiting", "running", "done", "skipped", "failed")
"""States of a job in the status file."""
STATUS_COLUMNS = ("input", "state", "table", "rows", "seconds", "exit_code", "message")

_PIECE, _PIECES = 1 << 16, 17
"""Bytes of a piece of a file, and how many pieces, spread evenly, stand for its content."""
_GRAVITY = (0, 3, 4, 5, 7, 6, 8, 1)
"""Exit codes from harmless to grave: of spectra, of labels, of the backend, of the model, of the output, unforeseen."""


@dataclass
class Job:
    """One input and its table.

    Attributes
    ----------
    source : Path
        File of spectra.
    table : Path
    state : str
        One of `STATES`.
    rows : int
    seconds : float
    exit_code : int
    message : str
        Why it was skipped or failed; notes of what was done.
    """

    source: Path
    table: Path
    state: str = "waiting"
    rows: int = 0
    seconds: float = 0.0
    exit_code: int = 0
    message: str = ""


def listed(path: str | Path) -> list[str]:
    """Inputs named in a text file, one on a line; empty lines and those that begin with # are left out.

    Relative names are relative to the folder of the list. ``-`` reads the list from standard input, relative to the
    current folder.

    Raises
    ------
    InputError
        The list cannot be read, or names nothing.
    """
    import sys

    try:
        if str(path) == "-":
            text, folder = sys.stdin.read(), Path()
        else:
            text, folder = Path(path).read_text(encoding="utf-8"), Path(path).parent
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the list of inputs cannot be read: {error}") from error
    names = [line.strip() for line in text.splitlines()]
    names = [name for name in names if name and not name.startswith("#")]
    if not names:
        raise InputError(f"{path}: names no input; expected a file name on each line")
    return [name if Path(name).is_absolute() else str(folder / name) for name in names]


def plan(paths: Iterable[str | Path], folder: str | Path, suffix: str = ".h5") -> list[Job]:
    """A job for every file; tables keep the folders that inputs of the same name lie in.

    Parameters
    ----------
    paths : iterable of path
        Files, folders or patterns.
    folder : path
        Where tables go.
    suffix : ".h5", ".parquet" or ".fits"
        Their format.

    Raises
    ------
    InputError
        A name matches nothing, or two inputs would write one table.
    """
    if suffix not in WRITERS:
        raise InputError(f"tables of format {suffix!r} are not known; expected {', '.join(WRITERS)}")
    files = [Path(path) for path in find_files(list(paths))]
    names = [f"{_stem(file)}.log_g{suffix}" for file in files]
    if len(set(names)) < len(names):
        common = Path(os.path.commonpath([os.path.abspath(file.parent) for file in files]))
        names = [
            str(Path(os.path.abspath(file.parent)).relative_to(common) / name)
            for file, name in zip(files, names, strict=True)
        ]
    first: dict[str, Path] = {}
    for file, name in zip(files, names, strict=True):
        if name in first:
            raise InputError(f"{file} and {first[name]} would both write {Path(folder) / name}; rename one")
        first[name] = file
    return [Job(file, Path(folder) / name) for file, name in zip(files, names, strict=True)]


def _stem(file: Path) -> str:
    name = file.name
    for ending in (
        ".gz",
        ".fz",
        file.suffix if file.suffix not in {".gz", ".fz"} else file.with_suffix("").suffix,
    ):
        name = name.removesuffix(ending)
    return name


def signature(file: str | Path) -> dict[str, Any]:
    """What identifies a file of any kind at the cost of a megabyte: its size, time, and pieces of its content.

    Raises
    ------
    InputError
        The file cannot be read.
    """
    try:
        with open(file, "rb") as stream:
            found = os.fstat(stream.fileno())
            digest = hashlib.sha256(str(found.st_size).encode())
            last = max(found.st_size - _PIECE, 0)
            for number in range(_PIECES):
                stream.seek(last * number // (_PIECES - 1))
                digest.update(stream.read(_PIECE))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error}") from error
    return {"bytes": found.st_size, "modified_ns": found.st_mtime_ns, "pieces_sha256": digest.hexdigest()}


def _record(job: Job, model: Model, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a table is made of, as it is kept in the table."""
    return {
        "input": signature(job.source),
        "model_sha256": model.hash,
        "moefast_version": __version__,
        "options": {
            name: value if isinstance(value, bool | int | float) else str(value)
            for name, value in options.items()
        },
        "velocity": content_of(options.get("velocity")),
        "targets": content_of(options.get("targets")),
    }


def _why_not(job: Job, record: Mapping[str, Any]) -> str:
    """Why the table that is there is not what this run would write; empty if it is."""
    try:
        kept = read_layout(job.table)[1].get("made_of")
        if not isinstance(kept, Mapping):
            return "the table that is there does not say what it was made of"
        if changed := [name for name in record if kept.get(name) != record[name]]:
            return f"made of another {', '.join(changed)}"
        # Every value: they have checksums, which are compared when they are read.
        read_table(job.table)
    except MoefastError as error:
        return f"the table that is there cannot be read: {error}"
    return ""


def run(
    jobs: Sequence[Job],
    model: Model,
    *,
    options: Mapping[str, Any],
    skip_existing: bool = False,
    overwrite: bool = False,
    status: str | Path | None = None,
    log: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Job]:
    """Predict every input into its table; one that fails does not end the run.

    Parameters
    ----------
    jobs : sequence of Job
        See `plan`; their states are changed.
    model : Model
    options : mapping
        Options of `moefast.predict`.
    skip_existing : bool
        Leave out inputs whose table is what this run would write; others are predicted again.
    overwrite : bool
        Replace tables that exist.
    status : path, optional
        CSV file with a row per input, replaced after each.
    log : callable, optional
        Called with a line whenever a job begins or ends.
    progress : callable, optional
        Called with inputs done and inputs in all.

    Returns
    -------
    list of Job
    """
    say = log or (lambda _: None)
    _keep(jobs, status)
    for number, job in enumerate(jobs):
        begin = time.perf_counter()
        try:
            record = _record(job, model, options)
            replace = overwrite
            if skip_existing and os.path.lexists(job.table):
                why = _why_not(job, record)
                if not why:
                    job.state, job.message = "skipped", "its table is up to date"
                    job.rows = read_layout(job.table)[2]
                    say(f"skipped {job.source}: {job.table} is up to date")
                    continue
                say(f"again {job.source}: {job.table}: {why}")
                replace = True
            job.state = "running"
            _keep(jobs, status)
            say(f"begins {job.source}")
            job.table.parent.mkdir(parents=True, exist_ok=True)
            summary = predict(job.source, model, job.table, overwrite=replace, record=record, **options)
            _tell(job, summary)
            say(f"done {job.source}: {counted(job.rows, 'row')}, {job.table}")
        except MoefastError as error:
            job.state, job.exit_code, job.message = "failed", error.exit_code, str(error)
            say(f"failed {job.source}: {error}")
        except BaseException as error:
            job.state, job.exit_code, job.message = "failed", 1, f"{type(error).__name__}: {error}"
            say(f"stopped at {job.source}: {job.message}")
            raise
        finally:
            job.seconds = time.perf_counter() - begin
            _keep(jobs, status)
            if progress is not None:
                progress(number + 1, len(jobs))
    return list(jobs)


def _tell(job: Job, summary: Summary) -> None:
    job.state, job.rows = "done", summary.n_rows
    failures = [str(failure.error) for failure in summary.failures]
    job.exit_code = summary.failures[0].error.exit_code if failures else 0
    job.message = "; ".join([*failures, *summary.oddities, *summary.notes])


def _keep(jobs: Sequence[Job], status: str | Path | None) -> None:
    if status is None:
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(STATUS_COLUMNS)
    for job in jobs:
        writer.writerow(
            [job.source, job.state, job.table, job.rows, f"{job.seconds:.3f}", job.exit_code, job.message]
        )
    write_atomically(status, text.getvalue().encode("utf-8", "replace"))


def worst(jobs: Iterable[Job]) -> int:
    """Exit code of a run: the gravest of its jobs."""
    return max(
        (job.exit_code for job in jobs),
        key=lambda code: _GRAVITY.index(code) if code in _GRAVITY else 99,
        default=0,
    )
