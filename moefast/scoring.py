"""Streaming prediction: blocks of spectra in, rows of a table out, one for one and in order.

Design: on a CPU every core reads a small block and scores it while it lies in its cache; reading takes turns, so that
files are read in order. On a GPU large blocks follow one another through slots of pinned memory: one thread reads while
the others' blocks are copied and scored. What comes out, two hundred bytes a spectrum, is gathered, flagged and
appended to a table that gets its final name only when it is complete. Memory does not grow with the number of spectra.
A row's numbers depend on the row alone, so `--rows`, `--shard` and bad neighbours change nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from moefast.backend import Backend, resolve_backend
from moefast.core.errors import BackendError, InputError, MoefastError, OutputError
from moefast.core.labels import plausible
from moefast.core.metrics import SquaredErrors
from moefast.core.outputs import INPUTS, ROW, VELOCITY, prediction_columns
from moefast.core.threads import CORES, map_in_order, one_blas_thread
from moefast.core.version import __version__
from moefast.kernels import PROJECT_ROWS, without_cuda
from moefast.mixture import Prediction
from moefast.model import Model, shipped_path
from moefast.posterior.mixture import AnyMixture, PosteriorMixture
from moefast.posterior.moving import predict_moving
from moefast.posterior.velocities import DEFAULT_RANGE, FittedVelocities, VelocityFit
from moefast.spectra import guard
from moefast.spectra.files import Block, Failure, SpectrumSet, find_files
from moefast.spectra.layouts.pfsspec import IDENTIFIER, identifiers
from moefast.spectra.prepared import Origins, Preparation, PreparedShard, open_prepared
from moefast.spectra.quality import Flag, Quality, assess, good_pixels
from moefast.spectra.selection import select as select_rows
from moefast.spectra.tables import Column, open_table
from moefast.spectra.telluric import Telluric
from moefast.spectra.velocities import Velocities, find_velocities

__all__ = [
    "FIT",
    "Summary",
    "cannot_fit",
    "choose_rows",
    "columns_of",
    "count_rows",
    "labels_at_the_edge",
    "make_engine",
    "move",
    "open_engine",
    "predict",
    "score_block",
    "score_moving",
    "unlike_reasons",
    "velocity_fit",
]

BLOCK_ROWS = 2048
"""Rows of a block for those who look at spectra one block after the other."""
TABLE_ROWS = 16384
"""Rows that are flagged and written to the table together: a few bytes each, many calls otherwise."""
LOOKED_AT = 50_000
"""Rows, about, whose χ² tells whether spectra as a whole are what the model knows."""
LEAST_MISFIT, SURE, LEAST_HALF = 0.01, 5.0, 30
"""How much larger χ² of the brighter half must be, by how many standard errors, and of how many spectra, to be told."""
ONNX_ROWS, ONNX_BYTES = 1024, 2**27
"""Rows of a block for ONNX Runtime at most, and bytes of the largest value that it makes of a block."""
LEAST_ROWS = 16
"""Spectra that a GPU must have room for: with less, halving a block does not help."""
FIT = "fit"
"""In the place of velocities: fit them."""
ON_CPU = "spectra are read, moved and fitted for their velocities on the CPU, predictions at these on the GPU"
"""What belongs to the reason for a GPU where velocities are fitted."""
_LABEL = "log_g"
_LOST = (Flag.NO_DATA, Flag.FEW_GOOD_PIXELS)


class Engine(Protocol):
    """Scores a block: flux, error (n, p) float32, mask (n, p) bool (True = bad) or None, index of its first row.

    Attributes
    ----------
    block_rows : int
        Rows that it likes best at a time.
    workers : int
        Threads that may call it at the same time.
    note : str
        What belongs to the reason for the backend, such as work that runs elsewhere; mostly empty.
    """

    @property
    def block_rows(self) -> int:
        """See above."""
        ...

    @property
    def workers(self) -> int:
        """See above."""
        ...

    @property
    def note(self) -> str:
        """See above."""
        ...

    def __call__(
        self, flux: NDArray, error: NDArray, mask: NDArray[np.bool_] | None, first_row: int
    ) -> tuple[Prediction, Quality]:
        """What becomes of a block."""
        ...


@dataclass(frozen=True)
class CpuEngine:
    """The CPU kernels."""

    mixture: AnyMixture
    block_rows: int = PROJECT_ROWS
    workers: int = CORES
    note: str = ""

    def __call__(
        self, flux: NDArray, error: NDArray, mask: NDArray[np.bool_] | None, first_row: int
    ) -> tuple[Prediction, Quality]:
        """See `Engine`."""
        return self.mixture.score(flux, error, mask, first_row=first_row)


class CudaEngine:
    """The CUDA kernels on the current device: see `moefast.kernels.cuda.CudaScorer` and `CudaPosteriorScorer`.

    Raises
    ------
    BackendError
        The kernels do not run here, or the mixture has experts that they do not know.
    """

    note = ""

    def __init__(self, mixture: AnyMixture) -> None:
        lack = without_kernels(mixture)
        if lack:
            raise BackendError(f"backend cuda: there are no kernels for {lack}; use backend cpu")
        from moefast.kernels.cuda.device import first_launch, require_device

        require_device()
        # Only now: the CUDA packages are optional.
        from moefast.kernels.cuda import CudaPosteriorScorer, CudaScorer

        self._mixture = mixture
        ones = np.ones((1, mixture.n_pixels), np.float32)
        with first_launch():
            if isinstance(mixture, PosteriorMixture):
                self._scorer: Any = CudaPosteriorScorer(*mixture.kernel_arrays)
            else:
                self._scorer = CudaScorer(mixture.projection, mixture.mixing, *mixture.clouds)
            self._scorer(ones, ones)
        self.block_rows = self._scorer.block_rows
        # One reads a file, while the others have a slot each; more would only wait for their turn to read.
        self.workers = min(self._scorer.slots, 4) + 1

    def __call__(
        self, flux: NDArray, error: NDArray, mask: NDArray[np.bool_] | None, first_row: int
    ) -> tuple[Prediction, Quality]:
        """See `Engine`; no row's numbers depend on where it lies."""
        found = self._scorer(flux, error, mask)
        if isinstance(self._mixture, PosteriorMixture):
            return self._mixture.of_kernels(found)
        return (
            Prediction(
                found.log_g, found.log_g_err, found.log_g_err_raw, found.weights, found.expert_log_g, found.chi2,
                found.log_level,
            ),
            Quality(found.snr_norm, found.snr_median, found.n_good, found.flag),
        )  # fmt: skip


class OnnxEngine:
    """The exported graph in ONNX Runtime, for what the CUDA kernels do not know; quality by the CPU kernels.

    Parameters
    ----------
    mixture : Mixture or PosteriorMixture
    backend : "cpu" or "cuda"
        Where ONNX Runtime runs it.

    Raises
    ------
    BackendError
        ONNX Runtime does not run there.
    """

    # ONNX Runtime has threads of its own; one caller reads while another one waits for the device.
    workers = 2

    def __init__(self, mixture: AnyMixture, backend: str) -> None:
        from moefast.export import build, on_the_cpu, open_session

        self._session = open_session(build(mixture), backend)
        self._names = [output.name for output in self._session.get_outputs()]
        self.block_rows = ONNX_ROWS
        if isinstance(mixture, PosteriorMixture):
            # The tangents of every cloud, seen by every star, in double precision.
            sizes = mixture.sizes
            each = 8 * sizes.n_clouds * sizes.n_tangents * sizes.n_coordinates
            self.block_rows = min(ONNX_ROWS, max(LEAST_ROWS, ONNX_BYTES // each))
        self.note = on_the_cpu(self._session) if backend == "cuda" else ""
        # A device that is full lets a session start, and refuses its first block.
        ones = np.ones((1, mixture.n_pixels), np.float32)
        self._run(ones, ones)

    def __call__(
        self, flux: NDArray, error: NDArray, mask: NDArray[np.bool_] | None, first_row: int
    ) -> tuple[Prediction, Quality]:
        """See `Engine`."""
        quality = assess(flux, error, good_pixels(flux, error, mask), mask)
        seen = error if mask is None else np.where(mask, np.float32(np.nan), error)
        return self._run(flux, seen), quality

    def _run(self, flux: NDArray, error: NDArray) -> Prediction:
        try:
            found = self._session.run(self._names, {"flux": flux, "error": error})
        except Exception as problem:
            # ONNX Runtime has no type of its own for memory that is short.
            half = len(flux) // 2
            if half < LEAST_ROWS or "allocate" not in str(problem):
                raise BackendError(f"ONNX Runtime cannot score {len(flux)} spectra: {problem}") from problem
            return _joined([self._run(flux[:half], error[:half]), self._run(flux[half:], error[half:])])
        return Prediction(**dict(zip(self._names, found, strict=True)))


def without_kernels(mixture: AnyMixture) -> str:
    """What of a mixture the CUDA kernels do not know, in words; empty if they know it all."""
    if isinstance(mixture, PosteriorMixture):
        return without_cuda(*mixture.kernel_arrays)
    if unknown := sorted({p.expert.words for p in mixture.experts if not (p.added or p.expert.on_cuda)}):
        return " or ".join(unknown)
    if any(place.added for place in mixture.experts):
        return "residuals of experts"
    return "" if mixture.tower is None else "the second tower of a gate"


@dataclass
class Summary:
    """What a prediction run did.

    Attributes
    ----------
    n_rows : int
        Rows scored, bad ones included.
    seconds, spectra_per_second : float
        Wall time from the first read to the closed table.
    backend, device : str
        Really used.
    reason : str
        Why this backend.
    array : str
        Which array was scored.
    model : str
        Name of the model.
    r2 : float or None
        If labels are present; rows without a prediction count as the label mean.
    flags : dict of str to int
        Rows per flag.
    failures : list of Failure
        Files or rows that could not be read.
    oddities : list of str
        What is odd about the spectra as a whole, found before the first was scored: see `moefast.spectra.guard`.
    notes : list of str
        What the user should know before using the numbers.
    columns : dict of arrays
        The table itself, if it was not written to a file.
    """

    n_rows: int = 0
    seconds: float = 0.0
    spectra_per_second: float = 0.0
    backend: str = ""
    device: str = ""
    reason: str = ""
    array: str = ""
    model: str = ""
    r2: float | None = None
    flags: dict[str, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    oddities: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    columns: dict[str, NDArray] = field(default_factory=dict)


def make_engine(mixture: AnyMixture, backend: Backend) -> Engine:
    """Score on the CPU kernels or on the CUDA kernels; what these do not know, in ONNX Runtime on the GPU.

    Raises
    ------
    BackendError
        The GPU cannot be used after all.
    """
    if backend.name == "cpu":
        return CpuEngine(mixture)
    return OnnxEngine(mixture, "cuda") if without_kernels(mixture) else CudaEngine(mixture)


def open_engine(mixture: AnyMixture, backend: str = "auto") -> tuple[Engine, Backend]:
    """The engine for a backend asked for, and the backend it really runs on; "auto" falls back to the CPU.

    Raises
    ------
    BackendError
        "cuda" was asked for and cannot be used.
    """
    where = resolve_backend(backend)
    try:
        engine = make_engine(mixture, where)
        return engine, replace(where, reason="; ".join(filter(None, (where.reason, engine.note))))
    except BackendError as error:
        if backend != "auto":
            raise
        reason = f"{where.device} was found but cannot be used: {error}"
        where = Backend("cpu", resolve_backend("cpu").device, reason)
        return make_engine(mixture, where), where


def warm_up(engine: Engine, n_pixels: int) -> None:
    """Load compiled code before the clock starts: it is no part of the throughput."""
    ones = np.ones((1, n_pixels), np.float32)
    engine(ones, ones, None, 0)


def score_block(engine: Engine, block: Block, first_row: int) -> tuple[Prediction, Quality]:
    """What an engine gives for a block.

    Parameters
    ----------
    engine : Engine
    block : Block
    first_row : int
        Index of the block's first row in its file.
    """
    # Pixels near the end of float32 overflow in their own row, which the flags tell.
    with np.errstate(over="ignore", invalid="ignore"):
        return engine(block.flux, block.error, block.mask, first_row)


def columns_of(model: Model, result: Prediction, quality: Quality) -> dict[str, NDArray]:
    """Table columns of scored rows, flags included.

    Parameters
    ----------
    model : Model
    result : Prediction
    quality : Quality
    """
    limits = model.manifest["limits"]
    flag = quality.flag.copy()
    empty = (flag & np.uint32(Flag.NO_DATA)) != 0
    low, high = model.mixture.label_range
    # Numbers that overflowed to NaN compare false with everything: the flags say "not within", never "beyond".
    outside = ~((result.log_g > low) & (result.log_g < high))
    outside |= ~((result.log_level >= limits["log_level"][0]) & (result.log_level <= limits["log_level"][1]))
    outside |= _at_the_edge(model, result)
    expert = result.weights.argmax(1).astype(np.int16)
    for bit, rows in (
        (Flag.OUT_OF_GRID, outside),
        (Flag.LOW_CONFIDENCE, ~(result.log_g_err <= limits["log_g_err"])),
        (Flag.UNLIKE_TRAINING, _unlike(result, limits, quality)),
    ):
        flag[rows & ~empty] |= np.uint32(bit)
    others = {
        "expert": expert,
        "snr_norm": quality.snr_norm,
        "snr_median": quality.snr_median,
        "flag": flag,
    }
    columns: dict[str, NDArray] = {}
    for name, output, number in prediction_columns(model.mixture.n_experts, _labels_of(model.mixture)):
        values = getattr(result, output.onnx) if output.onnx else others[name]
        columns[name] = values if output.per == "star" else values[:, number]
    if empty.any():
        for name, column in columns.items():
            if column.dtype.kind == "f":
                columns[name] = np.where(empty, np.float32(np.nan), column)
        columns["expert"] = np.where(empty, np.int16(-1), expert)
    return columns


def _unlike(result: Prediction, limits: Mapping[str, Any], quality: Quality) -> NDArray[np.bool_]:
    """Rows whose spectra lie beyond what the model was fitted on."""
    reasons = unlike_reasons(result, limits, quality)
    return np.any([beyond for _, _, beyond in reasons.values()], axis=0)


def unlike_reasons(
    result: Prediction, limits: Mapping[str, Any], quality: Quality
) -> dict[str, tuple[NDArray, NDArray, NDArray[np.bool_]]]:
    """Why spectra lie beyond what the model was fitted on.

    Returns
    -------
    dict of str to (array, array, array of bool)
        What is compared ("chi2, largest", "chi2, least", "foreign", "strength", "distance", as far as the model has a
        limit): the number of each row, the limit of each row, and whether the number lies beyond it.
    """
    n = len(result.chi2)
    least, largest = np.full(n, -np.inf), np.full(n, limits["chi2"])
    if "least_chi2" in limits:
        # χ² of few pixels scatters more, and of a handful says nothing.
        spread = SURE * np.sqrt(2.0 / np.maximum(quality.n_good, 1))
        least, largest = np.minimum(limits["least_chi2"], 1 - spread), np.maximum(largest, 1 + spread)
    # Numbers that overflowed to NaN compare false with everything: "not within", never "beyond".
    reasons = {
        "chi2, largest": (result.chi2, largest, ~(result.chi2 <= largest)),
        "chi2, least": (result.chi2, least, result.chi2 < least),
    }
    if result.foreign is not None and "foreign" in limits:
        limit = np.full(n, limits["foreign"])
        reasons["foreign"] = (result.foreign, limit, ~(result.foreign <= limit))
    strength, distance = result.strength, result.distance
    if strength is not None and "strength" in limits:
        limit = np.full(n, limits["strength"])
        reasons["strength"] = (strength, limit, ~(strength >= limit))
    if strength is not None and distance is not None and "distance" in limits:
        table = limits["distance"]
        place = np.log(np.maximum(strength, _LEAST_STRENGTH))
        limit = np.interp(place, table["log_strength"], table["limit"])
        reasons["distance"] = (distance, limit, ~(distance <= limit))
    return reasons


def _at_the_edge(model: Model, result: Prediction) -> NDArray[np.bool_]:
    """Rows with a label at an end of the training set's: a star beyond ends there."""
    rows = list(labels_at_the_edge(model, result).values())
    return np.any(rows, axis=0) if rows else np.zeros(len(result.log_g), bool)


def labels_at_the_edge(model: Model, result: Prediction) -> dict[str, NDArray[np.bool_]]:
    """Rows in which each label lies within `EDGE` of its error of an end of the training set; empty for models of log g
    alone.
    """  # noqa: D205
    if (
        not isinstance(model.mixture, PosteriorMixture)
        or result.labels is None
        or result.label_errors is None
    ):
        return {}
    ranges = model.manifest["training"].get("labels", {})
    values = np.column_stack([result.log_g, result.labels])
    errors = np.column_stack([result.log_g_err, result.label_errors])
    found = {}
    for i, name in enumerate(model.mixture.label_names):
        if name in _EDGES and name in ranges:
            low, high = ranges[name]
            found[name] = ~(np.minimum(values[:, i] - low, high - values[:, i]) >= EDGE * errors[:, i])
    return found


EDGE = 0.5
"""Stars within the training set's labels are not pulled nearer to an end than this, in their errors."""
_EDGES = ("log_g", "T_eff", "M_H")
"""Labels that every training set has, well enough known for that."""
_LEAST_STRENGTH = 1e-6


def _labels_of(mixture: AnyMixture) -> tuple[str, ...] | None:
    """Labels of a posterior; None for mixtures of log g alone."""
    return mixture.label_names if isinstance(mixture, PosteriorMixture) else None


def _joined(parts: list[Any]) -> Any:
    """One dataclass of arrays for several; what the first does not have, none has."""
    found = {item.name: [getattr(part, item.name) for part in parts] for item in fields(parts[0])}
    return type(parts[0])(**{k: None if v[0] is None else np.concatenate(v) for k, v in found.items()})


KNOWN = {
    "catId": ("", "catalogue of the target"), "objId": ("", "object in its catalogue"),
    "tract": ("", "part of the sky"),
    "patch": ("", "part of the tract"), "ra": ("deg", "right ascension, ICRS"), "dec": ("deg", "declination, ICRS"),
    "targetType": ("", "1 science, 2 sky, 3 flux standard"), "fiberId": ("", "fibre of the (first) exposure"),
    "visit": ("", "exposure"), "nVisit": ("", "exposures that were coadded"),
    "pfsVisitHash": ("", "hash of these exposures, as in names of files"), "TARGETID": ("", "DESI target"),
    "OBJTYPE": ("", "DESI kind of target: TGT, SKY or none"),
}  # fmt: skip
"""Unit and meaning of columns that surveys give."""


def table_columns(
    mixture: AnyMixture,
    ids: Mapping[str, np.dtype],
    several: bool,
    velocity: Velocities | VelocityFit | None = None,
) -> list[Column]:
    """Columns of a prediction table, in order; with `velocity` those that tell what was removed."""
    columns = [Column.of(one) for one in (INPUTS if several else (ROW,))]
    columns += [
        Column(name, dtype, *KNOWN.get(name, ("", "carried along from the input")))
        for name, dtype in ids.items()
    ]
    if velocity is not None:
        known = isinstance(velocity, VelocityFit) or velocity.error is not None
        columns += [Column.of(one) for one in (VELOCITY if known else VELOCITY[:1])]
    bits = ", ".join(f"{flag.value} {flag.name}" for flag in Flag)
    meanings = {"flag": f"sum of {bits}; 0 is what you want"}
    return columns + [
        Column.of(output, name, meanings.get(name, ""))
        for name, output, _ in prediction_columns(mixture.n_experts, _labels_of(mixture))
    ]


def choose_rows(
    n_rows: int,
    rows: tuple[int, int] | None = None,
    limit: int | None = None,
    shard: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """First row and the one after the last, of `rows`, cut to `limit`, or of part i of N.

    Raises
    ------
    InputError
        The rows lie outside the set or the parts make no sense.
    """
    start, stop = rows or (0, n_rows)
    if not 0 <= start < stop <= n_rows:
        raise InputError(f"rows {start}:{stop} asked for; the input has rows 0:{n_rows}")
    if shard is not None:
        index, count = shard
        if not 0 <= index < count:
            raise InputError(f"--shard {index}/{count}: the part must lie in 0…{count - 1}")
        size = stop - start
        start, stop = start + size * index // count, start + size * (index + 1) // count
    if limit is not None:
        if limit < 1:
            raise InputError(f"--limit {limit}: at least one row must be asked for")
        stop = min(stop, start + limit)
    return start, stop


def predict(
    paths: str | Path | Iterable[str | Path],
    model: Model | str | Path | None = None,
    out: str | Path | None = None,
    *,
    array: Literal["auto", "flux", "noisy"] = "auto",
    backend: str = "auto",
    rows: tuple[int, int] | None = None,
    limit: int | None = None,
    shard: tuple[int, int] | None = None,
    overwrite: bool = False,
    velocity: float | str | Path | None = None,
    velocity_range: float = DEFAULT_RANGE,
    medium: Literal["auto", "vacuum", "air"] = "auto",
    telluric: Telluric = "auto",
    select: str | None = None,
    keep: Iterable[str] = (),
    record: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Summary:
    """Predict log g for every spectrum of one or more files.

    Parameters
    ----------
    paths : path, folder, pattern, or several
        Spectrum files of any layout in docs/formats.md. Spectra on another grid are resampled to the model's.
    model : Model, path of a model folder, or name of a shipped model, optional
        See `Model.load`; the first that is shipped if absent.
    out : path, optional
        Table to write: .h5, .parquet or .fits. Without it the table is returned in `Summary.columns`.
    array : "auto", "flux" or "noisy"
        Which array to score; "auto" is `noisy` where a file has it.
    backend : "auto", "cpu" or "cuda"
    rows : tuple of int, optional
        First row and the one after the last.
    limit : int, optional
        Score at most so many rows.
    shard : tuple of int, optional
        (i, N): score part i of N equal parts.
    overwrite : bool
        Replace an existing table.
    velocity : number, column, path or "fit", optional
        Velocities that are removed [km/s]: one for all, a column of the spectra, or a table that is joined by
        identifiers (see `moefast.spectra.velocities`). "fit": one is fitted to each spectrum, and predictions are
        averaged over its posterior; only by posteriors. Without it spectra of surveys are fitted if the model can, and
        all others, those of the simulator among them, are taken to be at rest.
    velocity_range : float
        Fitted velocities lie within so many km/s of 0, either way.
    medium : "auto", "vacuum" or "air"
        What wavelengths are in; "auto" is what the survey uses.
    telluric : "auto", "mask" or "keep"
        Whether pixels where the Earth's atmosphere absorbs count as bad; "auto" says so of spectra of surveys, not of
        the simulator's.
    select : str, optional
        Rows to predict, such as ``targetType == 1 and nVisit > 2``; the others get no row in the table.
    keep : iterable of str
        Columns of the input that go into the table besides identifiers.
    record : mapping, optional
        What the caller wants to find again in the table's attribute ``made_of``: numbers, text, lists and mappings.
    progress : callable, optional
        Called with rows done and rows in all.
    tell : callable, optional
        Called with each oddity before the first row is scored.

    Raises
    ------
    InputError, WaveGridError, ModelError, BackendError, OutputError
        With one file; with several, a file that cannot be read is left out and named in `Summary.failures`.
    """
    chosen = model if isinstance(model, Model) else Model.load(model)
    engine, where = open_engine(chosen.mixture, backend)
    keep = tuple(keep)
    preparation = Preparation(chosen.mixture.wave, medium, moving=velocity is not None, telluric=telluric)
    spectra, failures = _open(paths, preparation)
    origins = Origins(spectra)
    if out is not None and any(_same_file(out, path) for path in origins.paths):
        raise OutputError(f"{out}: is one of the inputs; choose another name for the table")
    several = len(origins.paths) > 1 or bool(failures)
    start, stop = choose_rows(spectra.n_rows, rows, limit, shard)
    scored = sorted({"noisy" if array != "flux" and "noisy" in s.arrays else "flux" for s in spectra.shards})
    if array == "noisy" and scored != ["noisy"]:
        lacking = next(s.path for s in spectra.shards if "noisy" not in s.arrays)
        raise InputError(f"{lacking}: dataset/arrays/noisy/value is missing; use --array flux or auto")
    wanted_rows = np.zeros(spectra.n_rows, bool)
    wanted_rows[start:stop] = True
    if select is not None:
        wanted_rows &= select_rows(select, lambda names: spectra.params(_present(spectra, names, "--select")))
        if not wanted_rows.any():
            raise InputError(f"--select {select!r}: holds for none of the rows {start}:{stop}")
    n_out = int(wanted_rows.sum())
    fit = velocity_fit(chosen, spectra, velocity, velocity_range)
    if fit is not None and where.name == "cuda":
        where = replace(where, reason=f"{where.reason}; {ON_CPU}")
    moved = fit if fit is not None or velocity is None else move(spectra, velocity, wanted_rows)
    ids = {name: _id_dtype(spectra, name) for name in _carried(spectra, keep)}
    labelled = spectra.has_labels((_LABEL,))
    layout = table_columns(chosen.mixture, ids, several, moved)
    if len({column.name for column in layout}) < len(layout):
        ours = {column.name for column in table_columns(chosen.mixture, {}, several, moved)}
        raise InputError(
            f"--keep {', '.join(sorted(ours & set(ids)))}: the table has a column of this name of its own; name others"
        )
    about_params = _params_notes(spectra, ids, labelled)
    attrs: dict[str, Any] = {
        "moefast_version": __version__,
        "model": chosen.name,
        "model_sha256": chosen.hash,
        "inputs": [str(path) for path in origins.paths],
        "input_sha256": spectra.fingerprint(),
        "array": "+".join(scored),
        "telluric": telluric,
        "rows": f"{start}:{stop}",
        "backend": where.name,
        "device": where.device,
        "backend_reason": where.reason,
    }
    attrs["options"] = {
        "limit": limit, "velocity": None if velocity is None else str(velocity), "medium": medium,
        "telluric": telluric, "select": select, "keep": list(keep),
    }  # fmt: skip
    if record is not None:
        attrs["made_of"] = dict(record)
    if shard is not None:
        attrs["shard"] = f"{shard[0]}/{shard[1]}"
    if select is not None:
        attrs["select"] = select
    if moved is not None:
        attrs["velocity"] = (
            moved.source if isinstance(moved, Velocities) else f"fitted within {moved.largest:g} km/s"
        )
    summary = Summary(
        backend=where.name,
        device=where.device,
        reason=where.reason,
        array="+".join(scored),
        model=chosen.name,
        failures=failures,
    )
    sample = guard.take(spectra, array=array, rows=(start, stop), wanted=wanted_rows)
    free_scale = isinstance(chosen.mixture, PosteriorMixture)
    for odd in guard.look(sample, chosen.mixture.reference, free_scale=free_scale, array=summary.array):
        summary.oddities.append(odd.words)
        if tell is not None:
            tell(odd.words)
    sink = _Sink(out, n_out, layout, attrs, overwrite)
    r2, looked_at, unlike = SquaredErrors(), list[tuple[NDArray, NDArray]](), 0
    every = 1 + (stop - start) // LOOKED_AT
    wanted = [*ids, _LABEL] if labelled else list(ids)

    def fill(first: int, last: int) -> None:
        """Account for rows that could not be read; of a single file they end the run instead."""
        if first == last or not several:
            return
        _fill_gap(sink, spectra, origins, first, last, ids, wanted_rows, moved)
        lost = int(wanted_rows[first:last].sum())
        for f in _LOST:
            summary.flags[str(f.name)] = summary.flags.get(str(f.name), 0) + lost
        if labelled:
            lost_labels = _labels_between(spectra, first, last, wanted_rows)
            r2.add(lost_labels, np.full(len(lost_labels), np.nan))

    def score(block: Block) -> _Scored:
        base = int(spectra.first_rows[block.shard])
        shard = spectra.shards[block.shard]
        if fit is not None and isinstance(shard, PreparedShard) and (velocity is not None or shard.observed):
            which = "noisy" if array != "flux" and "noisy" in shard.arrays else "flux"
            result, quality, fitted = score_moving(engine, fit, shard, which, block, block.first_row - base)
            moving = (fitted.velocity, fitted.error)
        else:
            result, quality = score_block(engine, block, block.first_row - base)
            moving = (np.zeros(len(block)), np.full(len(block), np.nan))
        return _Scored(block.first_row, block.shard, block.params, result, quality, *moving)

    def write(parts: list[_Scored]) -> None:
        """Flag rows of one file that follow each other, and write them."""
        nonlocal unlike
        if not parts:
            return
        first, shard = parts[0].first_row, parts[0].shard
        columns = columns_of(chosen, _joined([p.result for p in parts]), _joined([p.quality for p in parts]))
        params = {name: np.concatenate([p.params[name] for p in parts]) for name in wanted}
        n, begin = len(columns["log_g"]), first - int(spectra.first_rows[shard])
        chosen_rows = wanted_rows[first : first + n]
        if not chosen_rows.all():
            columns, params = ({k: v[chosen_rows] for k, v in each.items()} for each in (columns, params))
        lead = _lead(origins, shard, (begin, begin + n), chosen_rows, several)
        lead |= {name: _identifiers(params[name], dtype) for name, dtype in ids.items()}
        lead |= _velocity_columns(moved, first, chosen_rows)
        if fit is not None:
            nothing = (columns["flag"] & np.uint32(Flag.NO_DATA)) != 0
            for one, name in zip(VELOCITY, ("velocity", "velocity_error"), strict=True):
                values = np.concatenate([getattr(p, name) for p in parts])[chosen_rows]
                lead[one.name] = np.where(nothing, np.nan, values).astype(one.dtype)
        sink.write({**lead, **columns})
        if labelled:
            known = plausible(_LABEL, params[_LABEL])
            r2.add(np.asarray(params[_LABEL], np.float64)[known], columns["log_g"][known].astype(np.float64))
        looked_at.append((columns["chi2"][::every], columns["snr_norm"][::every]))
        unlike += int(np.count_nonzero(columns["flag"] & np.uint32(Flag.UNLIKE_TRAINING)))
        for f in Flag:
            count = int(np.count_nonzero(columns["flag"] & np.uint32(f)))
            if count:
                summary.flags[str(f.name)] = summary.flags.get(str(f.name), 0) + count
        parts.clear()

    warm_up(engine, chosen.mixture.n_pixels)
    if fit is not None:
        fit.prepare()
        for each in spectra.shards:
            if isinstance(each, PreparedShard):
                each.keep_measured()
    begin = time.perf_counter()
    with sink, one_blas_thread():
        position, waiting = start, list[_Scored]()
        blocks = spectra.blocks(
            engine.block_rows,
            array=array,
            rows=(start, stop),
            params=wanted,
            # Workers read for themselves; a single one reads ahead.
            prefetch=engine.workers == 1,
            on_error="skip" if several else "raise",
        )
        for part in map_in_order(score, blocks, engine.workers):
            n_waiting = position - waiting[0].first_row if waiting else 0
            if (
                part.first_row != position
                or n_waiting >= TABLE_ROWS
                or (waiting and waiting[0].shard != part.shard)
            ):
                write(waiting)
                fill(position, part.first_row)
            waiting.append(part)
            position = part.first_row + len(part.result.log_g)
            if progress is not None:
                progress(position - start, stop - start)
        write(waiting)
        summary.failures = [*spectra.failures, *origins.faults(start, stop)]
        fill(position, stop)
        summary.n_rows = n_out
        summary.seconds = time.perf_counter() - begin
        summary.spectra_per_second = summary.n_rows / summary.seconds
        summary.r2 = r2.r2() if labelled else None
        summary.notes = [
            *_told(spectra, moved, chosen, velocity),
            *_notes(looked_at, unlike, summary, chosen),
            *about_params,
        ]
        sink.attrs.update(
            seconds=summary.seconds,
            spectra_per_second=summary.spectra_per_second,
            oddities=summary.oddities,
            notes=summary.notes,
            failures=[str(failure.error) for failure in summary.failures],
        )
        if labelled:
            sink.attrs["squared_errors"] = r2.numbers()
        if summary.r2 is not None:
            sink.attrs["r2"] = summary.r2
    summary.columns = sink.columns
    return summary


def count_rows(paths: str | Path | Iterable[str | Path], model: Model) -> int:
    """Rows that `predict` would find in the files.

    Raises
    ------
    InputError, WaveGridError
        As `predict`.
    """
    return _open(paths, Preparation(model.mixture.wave))[0].n_rows


def _open(
    paths: str | Path | Iterable[str | Path], preparation: Preparation
) -> tuple[SpectrumSet, list[Failure]]:
    """Open the files; with several, those that cannot be used are left out."""
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    try:
        alone = len(find_files(given)) == 1
    except InputError:
        alone = len(given) == 1
    spectra = open_prepared(given, preparation, on_error="raise" if alone else "skip")
    return spectra, list(spectra.failures)


def _present(spectra: SpectrumSet, names: Iterable[str], option: str) -> list[str]:
    """The names, if every file has such columns."""
    names = list(names)
    for shard in spectra.shards:
        for name in names:
            if name not in shard.columns:
                raise InputError(
                    f"{option} {name}: {shard.path} has no such column; it has {', '.join(shard.columns) or 'none'}"
                )
    return names


def _carried(spectra: SpectrumSet, keep: Iterable[str]) -> list[str]:
    """Columns that go from the input to the table: identifiers that all files have, and what is to be kept."""
    names: dict[str, None] = {}
    for shard in spectra.shards:
        own = shard.identifiers if isinstance(shard, PreparedShard) else identifiers(shard)
        names |= dict.fromkeys(name for name in own if name in spectra.columns)
    return list(names | dict.fromkeys(_present(spectra, keep, "--keep")))


def move(spectra: SpectrumSet, velocity: float | str | Path, needed: NDArray[np.bool_]) -> Velocities:
    """Find the velocities of spectra, and have them removed when they are read."""
    found = find_velocities(velocity, spectra, needed)
    for shard, first in zip(spectra.shards, spectra.first_rows, strict=False):
        if isinstance(shard, PreparedShard):
            shard.set_velocity(found.velocity[first : first + shard.n_rows])
    return found


def _lead(
    origins: Origins, shard: int, rows: tuple[int, int], wanted: NDArray[np.bool_], several: bool
) -> dict[str, NDArray]:
    file, row = origins.of(shard, *rows)
    lead: dict[str, NDArray] = {"row": row[wanted]}
    if several:
        lead["file"] = file[wanted]
    return lead


def _velocity_columns(
    moved: Velocities | VelocityFit | None, first: int, wanted: NDArray[np.bool_]
) -> dict[str, NDArray]:
    """Velocities that were given; what is fitted comes with each block."""
    if not isinstance(moved, Velocities):
        return {}
    here = slice(first, first + len(wanted))
    out = {"v_los": moved.velocity[here][wanted].astype(np.float32)}
    if moved.error is not None:
        out["v_los_err"] = moved.error[here][wanted].astype(np.float32)
    return out


def velocity_fit(
    model: Model, spectra: SpectrumSet, velocity: float | str | Path | None, largest: float
) -> VelocityFit | None:
    """What fits velocities, if that is asked for or, of spectra of surveys, nothing is; see `predict`."""
    if velocity is not None and velocity != FIT:
        return None
    shards = [s for s in spectra.shards if isinstance(s, PreparedShard) and (velocity == FIT or s.observed)]
    if not isinstance(model.mixture, PosteriorMixture):
        if velocity == FIT:
            raise InputError(cannot_fit(model))
        return None
    if not shards:
        return None
    return VelocityFit(model.mixture, largest)


def cannot_fit(model: Model) -> str:
    """Why a model that is no posterior fits no velocities, and what to do."""
    return (
        f"velocity fit: the model {model.name} is no posterior and cannot tell how probable a velocity is; use one "
        "that is (-m observed, -m z0), or give velocities"
    )


def score_moving(
    engine: Engine, fit: VelocityFit, shard: PreparedShard, array: str, block: Block, first_row: int
) -> tuple[Prediction, Quality, FittedVelocities]:
    """What an engine gives for a block of stars whose velocities are fitted, and these."""
    arms = shard.measured(array, first_row, first_row + len(block))
    lost = np.zeros(len(block), np.bool_)
    if block.mask is not None:
        np.all(block.mask, axis=1, out=lost)

    def at_rest(velocity: NDArray, rows: NDArray[np.intp]) -> tuple[NDArray, NDArray, NDArray[np.bool_]]:
        flux, error, mask = shard.at_velocity(arms, velocity, rows)
        # What is wrong with a row is wrong with it at every velocity.
        mask[lost[rows]] = True
        return flux, error, mask

    def score(flux: NDArray, error: NDArray, mask: NDArray[np.bool_]) -> tuple[Prediction, Quality]:
        return engine(flux, error, mask, first_row)

    with np.errstate(over="ignore", invalid="ignore"):
        return predict_moving(fit, score, len(block), at_rest)


def _told(
    spectra: SpectrumSet,
    moved: Velocities | VelocityFit | None,
    model: Model,
    velocity: float | str | Path | None,
) -> list[str]:
    """What the files, and the velocities, have users know."""
    notes = [note for shard in spectra.shards if isinstance(shard, PreparedShard) for note in shard.notes]
    if isinstance(moved, VelocityFit):
        why = "" if velocity is not None else "none were given, so "
        how = (
            ""
            if velocity is not None
            else "; --velocity TABLE gives them, --velocity 0 takes spectra to be at rest"
        )
        notes.append(
            f"velocities: {why}one was fitted to each star within {moved.largest:g} km/s (v_los, v_los_err){how}"
        )
    elif moved is not None:
        notes += moved.notes
    elif any(isinstance(shard, PreparedShard) and shard.observed for shard in spectra.shards):
        notes.append(
            "velocities: none were given, and this model fits none: spectra are taken to be at rest, which those of "
            "surveys are not; use --velocity, or a model that fits them (-m observed)"
        )
    elif isinstance(model.mixture, PosteriorMixture):
        notes.append(
            "velocities: spectra of the simulator are taken to be at rest; --velocity fit fits one to each"
        )
    return list(dict.fromkeys(notes))


def _same_file(first: str | Path, second: Path) -> bool:
    try:
        return Path(first).samefile(second)
    except OSError:
        return False


def _id_dtype(spectra: SpectrumSet, name: str) -> np.dtype:
    """Type that holds the identifiers of all files."""
    dtypes = []
    for shard in spectra.shards:
        dtype = shard.params([name], 0, 1)[name].dtype
        if dtype.kind == "U":
            # Text comes as long as the longest of the rows read: one row says nothing about the others.
            dtype = max((values.dtype for values in shard.slices(name)), key=lambda kind: kind.itemsize)
        dtypes.append(dtype)
        # Thousands of files must not be open at once.
        shard.close()

    def slices() -> Iterator[NDArray]:
        for shard in spectra.shards:
            yield from shard.slices(name)
            shard.close()

    return _exactly(dtypes, slices)


def _exactly(dtypes: list[np.dtype], slices: Callable[[], Iterator[NDArray]]) -> np.dtype:
    """Type that holds all identifiers as they are: integers stay integers, whatever NumPy makes of two kinds.

    Parameters
    ----------
    dtypes : list of dtype
        Of each file.
    slices : callable
        Goes through all values.
    """
    kinds = {dtype.kind for dtype in dtypes}
    if kinds <= {"S", "U"} or len(set(dtypes)) == 1:
        return np.result_type(*dtypes)
    if kinds <= set("biuf"):
        found = np.result_type(*dtypes)
        if found.kind in "biu":
            return found
        if "f" not in kinds:
            # int64 and uint64 have no common integer, but these numbers may.
            low, high = 0, 0
            for values in slices():
                low, high = min(low, int(values.min(initial=0))), max(high, int(values.max(initial=0)))
            for candidate in (np.int64, np.uint64):
                if np.iinfo(candidate).min <= low and high <= np.iinfo(candidate).max:
                    return np.dtype(candidate)
    # No type of numbers holds them all.
    longest = max((len(text) for values in slices() for text in _as_text(values)), default=1)
    return np.dtype(f"U{max(1, longest)}")


def _as_text(values: NDArray) -> NDArray:
    """Identifiers as text; whole numbers without a decimal point."""
    if values.dtype.kind == "f":
        return np.array([f"{v:.0f}" if v == np.floor(v) else repr(float(v)) for v in values], dtype=str)
    return values.astype(str)


def _identifiers(values: NDArray, dtype: np.dtype) -> NDArray:
    """Identifiers in the type of their column, which holds them exactly."""
    return (_as_text(values) if dtype.kind == "U" else values).astype(dtype)


def _params_notes(spectra: SpectrumSet, ids: Mapping[str, np.dtype], labelled: bool) -> list[str]:
    """What of the params tables is not used, and why; and what to know about the rest."""
    notes = []
    names = [
        name
        for shard in spectra.shards
        if not isinstance(shard, PreparedShard)
        for name in (*shard.columns, *shard.unreadable)
    ]
    for name in dict.fromkeys(names):
        wanted = IDENTIFIER.fullmatch(name) or name == _LABEL
        if not wanted or name in ids or (name == _LABEL and labelled):
            continue
        for shard in spectra.shards:
            if name in shard.unreadable:
                notes.append(f"column {name!r} is left out: in {shard.path} it {shard.unreadable[name]}")
                break
            if name not in shard.columns:
                notes.append(f"column {name!r} is left out: {shard.path} has none")
                break
        else:
            notes.append(f"column {name!r} is left out: it holds text where numbers are expected")
    if labelled:
        notes += spectra.label_notes((_LABEL,))
    return notes


def _labels_between(spectra: SpectrumSet, first: int, last: int, wanted: NDArray[np.bool_]) -> NDArray:
    """Labels of rows that could not be read, as far as they are labels."""
    parts = []
    for index, base in enumerate(spectra.first_rows[:-1].tolist()):
        low, high = max(first, base), min(last, int(spectra.first_rows[index + 1]))
        if low < high:
            values = spectra.shards[index].params([_LABEL], low - base, high - base)[_LABEL][wanted[low:high]]
            parts.append(np.asarray(values, np.float64)[plausible(_LABEL, values)])
    return np.concatenate(parts) if parts else np.empty(0)


def _fill_gap(sink, spectra, origins, first, stop, ids, wanted_rows, moved):  # type: ignore[no-untyped-def]
    """Write rows that could not be read: NaN and NO_DATA, so that no row is lost."""
    for index, base in enumerate(spectra.first_rows[:-1]):
        low, high = max(first, int(base)), min(stop, int(spectra.first_rows[index + 1]))
        if low >= high:
            continue
        wanted = wanted_rows[low:high]
        n = int(wanted.sum())
        row: dict[str, NDArray] = {}
        for column in sink.layout:
            kind = column.dtype.kind
            row[column.name] = np.full(n, np.nan, column.dtype) if kind == "f" else np.zeros(n, column.dtype)
        row |= _lead(origins, index, (low - base, high - base), wanted, "file" in row)
        row |= _velocity_columns(moved, low, wanted)
        row["expert"][:] = -1
        row["flag"][:] = np.uint32(sum(_LOST))
        for name in ids:
            try:
                values = spectra.shards[index].params([name], low - base, high - base)[name][wanted]
                row[name] = _identifiers(values, ids[name])
            except MoefastError:
                continue
        sink.write(row)


def _notes(
    looked_at: list[tuple[NDArray, NDArray]], unlike: int, summary: Summary, model: Model
) -> list[str]:
    notes = []
    lost = summary.flags.get(str(Flag.NO_DATA.name), 0)
    if lost:
        counted = "; each counts as the label mean in R²" if summary.r2 is not None else ""
        notes.append(f"{lost} of {summary.n_rows} spectra have no good pixel and got no prediction{counted}")
    chi2, snr = (
        (np.concatenate(column) for column in zip(*looked_at, strict=True))
        if looked_at
        else 2 * [np.empty(0)]
    )
    chi2, snr = chi2[np.isfinite(chi2)], snr[np.isfinite(chi2)]
    if summary.n_rows and unlike > summary.n_rows / 2:
        notes.append(
            f"{unlike} of {summary.n_rows} spectra are flagged UNLIKE_TRAINING: check that flux is "
            + ("" if isinstance(model.mixture, PosteriorMixture) else "normalised to a median near 1 and ")
            + "in the units of its error, or fit a model on spectra like these"
        )
    elif (found := _misfit(chi2, snr)) is not None:
        notes.append(
            f"the brighter half of the spectra fits the model worse than the fainter one (median chi2 {found[0]:.3f}, "
            f"{found[1]:.3f}), so they hold what it has not seen: velocities, reddening or calibration errors? "
            + (
                "Try -m survey, or fit"
                if model.path and model.path.parent == shipped_path().parent
                else "Fit"
            )
            + " a model on spectra like these"
        )
    return notes


def _misfit(chi2: NDArray, snr: NDArray) -> tuple[float, float] | None:
    """Median χ² of the brighter and of the fainter half, if the first is larger beyond doubt.

    Errors that are wrong by a factor raise both alike; light that the components cannot give counts by the square of
    the SNR. It is lost in the noise of one spectrum, not in that of thousands.
    """
    bright = snr > np.median(snr) if snr.size else np.empty(0, bool)
    halves = chi2[bright], chi2[~bright]
    if min(half.size for half in halves) < LEAST_HALF:
        return None
    a, b = (float(np.median(half)) for half in halves)
    # Of a median, 1.2533 times that of a mean; spreads from quartiles, which no odd spectrum moves.
    spread = [np.subtract(*np.quantile(half, (0.75, 0.25))) / 1.349 / np.sqrt(half.size) for half in halves]
    return (a, b) if a - b > max(LEAST_MISFIT, SURE * 1.2533 * float(np.hypot(*spread))) else None


@dataclass(frozen=True)
class _Scored:
    """A scored block: its first row in the set, its shard, params, what the engine gave, and velocities if fitted."""

    first_row: int
    shard: int
    params: dict[str, NDArray]
    result: Prediction
    quality: Quality
    velocity: NDArray
    velocity_error: NDArray


class _Sink:
    """A table file, or columns in memory when no file is wanted."""

    def __init__(
        self,
        path: str | Path | None,
        n_rows: int,
        layout: list[Column],
        attrs: dict[str, Any],
        overwrite: bool,
    ) -> None:
        self.layout, self.columns, self._done = layout, {}, 0
        self._table = None
        if path is None:
            self.attrs = dict(attrs)
            self.columns = {c.name: np.empty(n_rows, c.dtype) for c in layout}
        else:
            self._table = open_table(path, n_rows, layout, attrs, overwrite=overwrite)
            self.attrs = self._table.attrs

    def __enter__(self) -> _Sink:
        if self._table is not None:
            self._table.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._table is not None:
            self._table.__exit__(*exception)

    def write(self, columns: dict[str, NDArray]) -> None:
        n = len(columns["row"])
        if self._table is not None:
            self._table.write(self._done, columns)
        else:
            for name, values in columns.items():
                self.columns[name][self._done : self._done + n] = values
        self._done += n
