"""Fits in parts: partial statistics of the first pass in files, and the fit that is finished from them.

Design: a part is the first pass over whole units of rows (`moefast.fitting.statistics`). Its file says which spectra,
options and version it is of, and which rows; parts are read one after the other, so that memory is that of two. What
follows the first pass reads a bounded sample of rows again, at the places where the parts found them.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from moefast.checkpoint import Checkpoint, flat
from moefast.core.archives import Header, StoredArrays, open_hashed, write_hashed
from moefast.core.errors import InputError, MoefastError
from moefast.core.grids import Grid
from moefast.core.progress import StageProgress
from moefast.core.version import __version__
from moefast.experts.normal_equations import NormalEquations
from moefast.fitting import Passes
from moefast.fitting.first_pass import complete, gather_part
from moefast.fitting.statistics import Statistics
from moefast.fitting.training_set import TrainingSet
from moefast.model import Model
from moefast.recipes import PreparedFit, prepare
from moefast.simulate import Observed, SimulatedSpectra
from moefast.spectra.paths import find_files
from moefast.spectra.source import SpectrumSource
from moefast.spectra.spectrum_set import open_spectra

__all__ = [
    "FitPlan", "TrainingSpectra", "add_statistics", "fit_of_parts", "gather_to_file", "is_part", "is_whole",
    "only_one_first_pass", "part_header", "read_header", "statistics_of", "tell_if_inexact",
]  # fmt: skip

WHAT = "moefast statistics of a part of a fit"
SCHEMA = 2
SAME = {
    "version": "another version of moefast",
    "fingerprint": "another input",
    "recipe": "another recipe",
    "options": "other options",
    "backend": "another backend",
}
"""What parts of one fit have in common, and what is said where they have not."""


@dataclass(frozen=True)
class TrainingSpectra:
    """Where the spectra of a fit come from, as another process can find them.

    Attributes
    ----------
    files : tuple of str
        Whole names.
    simulate : int, optional
        Number of spectra to simulate instead.
    name : str, optional
        Reference set to simulate.
    like : tuple of str
        Files that they should look like.
    resolution : str, optional
    whole : bool
        See `SimulatedSpectra`.
    """

    files: tuple[str, ...] = ()
    simulate: int | None = None
    name: str | None = None
    like: tuple[str, ...] = ()
    resolution: str | None = None
    whole: bool = False

    @classmethod
    def of_files(cls, names: Sequence[str | Path]) -> TrainingSpectra:
        """Files, folders or patterns, under the names by which other processes find them."""
        return cls(tuple(os.path.abspath(path) for path in find_files(list(names))))

    def observed(self) -> Observed | None:
        """What the files that simulated spectra should look like say."""
        return Observed.of_files(self.like, resolution=self.resolution) if self.like else None

    def open(self, observed: Observed | None = None) -> SpectrumSource:
        """The spectra; `observed` if it was read already.

        Raises
        ------
        MoefastError
            They cannot be read, or not be simulated.
        """
        if not self.simulate:
            return open_spectra(list(self.files))
        if self.like:
            return SimulatedSpectra.like(
                observed or self.observed(), self.simulate, name=self.name or "library", whole=self.whole  # type: ignore[arg-type]  # there are files
            )  # fmt: skip
        return SimulatedSpectra.of_set(self.name or "z0", rows=(0, self.simulate))


@dataclass(frozen=True)
class FitPlan:
    """A fit that other processes can prepare: its spectra, and the arguments of `moefast.recipes.prepare`."""

    source: TrainingSpectra
    arguments: dict[str, Any]

    def prepare(
        self, spectra: SpectrumSource | None = None, tell: Callable[[str], None] | None = None
    ) -> PreparedFit:
        """The fit itself; `spectra` if they are open already."""
        return prepare(spectra or self.source.open(), **self.arguments, tell=tell)

    def document(self) -> dict[str, Any]:
        """Ready for JSON."""
        arguments = dict(self.arguments)
        if (grid := arguments.get("grid")) is not None:
            arguments["grid"] = [grid.t_eff_edges, grid.m_h_edges]
        document: dict[str, Any] = json.loads(
            json.dumps({"source": dataclasses.asdict(self.source), "arguments": arguments})
        )
        return document

    @classmethod
    def of_document(cls, document: dict[str, Any]) -> FitPlan:
        """From what `document` gave."""
        source: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in document["source"].items()
        }
        arguments = dict(document["arguments"])
        if arguments.get("grid") is not None:
            arguments["grid"] = Grid(*(tuple(edges) for edges in arguments["grid"]))
        return cls(TrainingSpectra(**source), arguments)


def only_one_first_pass(prepared: PreparedFit) -> None:
    """Refuse a fit whose comparison needs a first pass of its own.

    Raises
    ------
    InputError
    """
    if prepared.options.has_sampled_oracle:
        raise InputError(
            f"{prepared.recipe} is compared with a fit that needs another first pass, which has no parts; leave it out "
            "with --no-references"
        )


def gather_to_file(
    path: str | Path,
    plan: FitPlan,
    prepared: PreparedFit,
    rows: tuple[int, int],
    *,
    shard: tuple[int, int] | None = None,
    backend: Literal["cpu", "cuda"] = "cpu",
    progress: StageProgress | None = None,
    checkpoint: Checkpoint | None = None,
    durable: bool = True,
) -> Statistics:
    """Write the statistics of some rows, whole units, to a file.

    Raises
    ------
    InputError, LabelError
        As for a fit.
    OutputError
        The file cannot be written.
    """
    data = TrainingSet(prepared.spectra, prepared.options, progress or (lambda *_: None))
    statistics = gather_part(data, rows, checkpoint, backend)
    header = part_header(plan, prepared, rows, backend, shard)
    write_hashed(Path(path), header, statistics.arrays(), durable=durable)
    return statistics


def part_header(
    plan: FitPlan,
    prepared: PreparedFit,
    rows: tuple[int, int],
    backend: str,
    shard: tuple[int, int] | None = None,
) -> Header:
    """What a file of statistics says of itself."""
    document = {
        "schema": SCHEMA, "what": WHAT, "version": __version__, "fingerprint": prepared.fingerprint,
        "recipe": prepared.recipe, "options": dataclasses.asdict(prepared.options), "backend": backend,
        "plan": plan.document(), "n_rows": prepared.spectra.n_rows, "rows": list(rows),
        "shard": None if shard is None else list(shard), "published": prepared.options.has_published,
    }  # fmt: skip
    header: Header = json.loads(json.dumps(document))
    return header


def is_part(path: str | Path) -> bool:
    """Whether a file is meant to be one of statistics."""
    return Path(path).suffix == ".npz"


def read_header(path: str | Path) -> Header:
    """What a file of statistics says of itself.

    Raises
    ------
    InputError
        It is damaged, or none of ours.
    """
    try:
        with open_hashed(Path(path), WHAT, _check_schema) as (header, _):
            return header
    except MemoryError:
        raise
    except Exception as error:
        raise _damaged(path, error) from error


def is_whole(path: str | Path, expected: Header) -> bool:
    """Whether there is a file of statistics that says all of this of itself, and whose arrays are those written."""
    try:
        with open_hashed(Path(path), WHAT, _check_schema) as (header, arrays):
            if {name: header[name] for name in expected} != expected:
                return False
            arrays.check()
    except MemoryError:
        raise
    except Exception:
        # Damaged archives make zipfile and NumPy raise nearly anything.
        return False
    return True


def statistics_of(path: str | Path, header: Header | None = None) -> Statistics:
    """The statistics of a file, if it is still the one with this header.

    Raises
    ------
    InputError
        It is damaged, or another one meanwhile.
    """
    with _opened(path, header) as (rows, arrays, kinds):
        return Statistics.restored(rows, arrays, **kinds)


def add_statistics(total: Statistics, path: str | Path, header: Header | None = None) -> None:
    """Add the statistics of a file, if it is still the one with this header, to those of the rows before.

    Raises
    ------
    InputError
        It is damaged, or another one meanwhile; `total` is of no use then.
    """
    with _opened(path, header) as (rows, arrays, kinds):
        total.add_stored(rows, arrays, arrays.add_to, **kinds)


@contextmanager
def _opened(
    path: str | Path, header: Header | None
) -> Iterator[tuple[tuple[int, int], StoredArrays, dict[str, bool]]]:
    """Rows, arrays and kinds of a file of statistics; whatever goes wrong with these is damage."""
    try:
        with open_hashed(Path(path), WHAT, _check_schema) as (found, arrays):
            if header is not None and found != header:
                raise ValueError("it was replaced meanwhile")
            first, stop = found["rows"]
            yield (first, stop), arrays, {"apart": found["published"], "exact": found["backend"] == "cpu"}
    except MemoryError:
        raise
    except Exception as error:
        raise _damaged(path, error) from error


def _check_schema(header: Header) -> None:
    if header["schema"] != SCHEMA:
        raise ValueError(f"schema {header['schema']!r} found, {SCHEMA} expected")


def _damaged(path: str | Path, error: Exception) -> MoefastError:
    if isinstance(error, MoefastError):
        return error
    return InputError(
        f"{path}: not a complete file of statistics of moefast fit --shard ({error}); write it again"
    )


def fit_of_parts(
    paths: Sequence[str | Path],
    *,
    backend: str = "cpu",
    progress: StageProgress | None = None,
    tell: Callable[[str], None] | None = None,
) -> Model:
    """The model that one process would have fitted, from the statistics of all parts.

    Parameters
    ----------
    paths : sequence of path
        Files of ``moefast fit --shard``, in any order.
    backend : str
        Of what follows the first pass; see `moefast.recipes.fit`.
    progress : callable, optional
        See `moefast.recipes.fit`.
    tell : callable, optional
        Called with what the user should know.

    Returns
    -------
    Model
        Not saved yet.

    Raises
    ------
    InputError
        Parts are damaged, missing or there twice, or of another input, recipe, options or version.
    """
    headers = sorted(((Path(path), read_header(path)) for path in paths), key=lambda one: one[1]["rows"])
    if not headers:
        raise InputError("no statistics to merge")
    for path, header in headers[1:]:
        _check_alike(headers[0], (path, header))
    _check_complete(headers)
    first = headers[0][1]
    prepared = FitPlan.of_document(first["plan"]).prepare(tell=tell)
    if prepared.fingerprint != first["fingerprint"]:
        raise InputError(
            f"{prepared.spectra.shards[0].path}: the input has changed since {headers[0][0]} was written; write the "
            "parts again"
        )
    report = progress or (lambda *_: None)

    def first_pass(data: TrainingSet, *_: Any) -> Any:
        total = statistics_of(*headers[0])
        report("statistics", total.rows, data.spectra.n_rows)
        for one in headers[1:]:
            add_statistics(total, *one)
            report("statistics", total.rows, data.spectra.n_rows)
        tell_if_inexact(total, tell)
        return complete(data, total)

    return prepared.fit(report, None, backend, Passes(TrainingSet, first_pass))


def tell_if_inexact(total: Statistics, tell: Callable[[str], None] | None) -> None:
    """Say so where another division of the rows may give other bits."""
    if tell is not None and not (isinstance(total.equations, NormalEquations) and total.equations.is_exact):
        tell(
            "the last bits of this model depend on the division into parts: "
            + (
                "some spectra are far larger than those looked at first"
                if isinstance(total.equations, NormalEquations) and total.equations.scales is not None
                else "they were gathered on a GPU"
            )
        )


def _check_alike(first: tuple[Path, Header], other: tuple[Path, Header]) -> None:
    for name, words in SAME.items():
        expected, found = first[1][name], other[1][name]
        if expected != found:
            if isinstance(expected, dict):
                a, b = flat(expected), flat(found)
                differ = "; ".join(
                    f"{key} {b.get(key)!r}, expected {a.get(key)!r}"
                    for key in sorted({*a, *b})
                    if a.get(key) != b.get(key)
                )
            else:
                differ = f"{found}, expected {expected}"
            raise InputError(f"{other[0]}: is of {words} than {first[0]} ({name}: {differ})")


def _check_complete(headers: Sequence[tuple[Path, Header]]) -> None:
    n_rows = headers[0][1]["n_rows"]
    for (path, before), (after_path, after) in pairwise(headers):
        if after["rows"][0] < before["rows"][1]:
            raise InputError(
                f"{after_path}: rows {_range(after)} are in {path} already (rows {_range(before)})"
            )
        if after["rows"][0] > before["rows"][1]:
            raise InputError(
                f"rows {before['rows'][1]}:{after['rows'][0]} are missing between {path} and {after_path}"
                f"{_missing(headers)}"
            )
    (first_path, first), (last_path, last) = headers[0], headers[-1]
    if first["rows"][0] != 0:
        raise InputError(f"rows 0:{first['rows'][0]} are missing before {first_path}{_missing(headers)}")
    if last["rows"][1] != n_rows:
        raise InputError(f"rows {last['rows'][1]}:{n_rows} are missing after {last_path}{_missing(headers)}")


def _range(header: Header) -> str:
    return ":".join(str(row) for row in header["rows"])


def _missing(headers: Sequence[tuple[Path, Header]]) -> str:
    shards = [header["shard"] for _, header in headers]
    counts = {shard[1] for shard in shards if shard is not None}
    if None in shards or len(counts) != 1:
        return ""
    (count,) = counts
    missing = sorted(set(range(count)) - {shard[0] for shard in shards})
    names = ", ".join(f"{index}/{count}" for index in missing[:10])
    more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
    what = f"shard {names}; fit it" if len(missing) == 1 else f"shards {names}{more}; fit them"
    return f": {what}, then merge again"
