"""What predicts a block of spectra, on which device: the CPU kernels, the CUDA kernels, or the exported graph."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moefast.backend import Backend, resolve_backend
from moefast.core.errors import BackendError, ModelError
from moefast.core.text import counted
from moefast.core.threads import CORES
from moefast.kernels import PROJECT_ROWS, without_cuda
from moefast.mixture import Prediction
from moefast.posterior.mixture import AnyMixture, PosteriorMixture
from moefast.predicting.agreement import require_agreement, stars_of
from moefast.spectra.blocks import BlockMemory, plain_memory
from moefast.spectra.quality import Quality, assess, good_pixels
from moefast.spectra.source import Block

if TYPE_CHECKING:
    from moefast.export.session import BoundSession

__all__ = [
    "LEAST_ROWS",
    "ONNX_BYTES",
    "ONNX_ROWS",
    "CpuEngine",
    "CudaEngine",
    "Engine",
    "OnnxEngine",
    "Place",
    "joined",
    "make_engine",
    "open_engine",
    "score_block",
    "warm_up",
    "without_kernels",
]

LEAST_ROWS = 16
"""Spectra that a GPU must have room for: with less, halving a block does not help."""
N_BOUND = 4
"""Stars that are predicted in memory of both kinds, before that which is used again is trusted."""
_WORDS = 200
"""Characters of another package's error that are passed on."""
ONNX_ROWS, ONNX_BYTES = 1024, 2**27
"""Rows of a block for ONNX Runtime at most, and bytes of the largest value that it makes of a block."""


@dataclass(frozen=True)
class Place:
    """Where one block is read to and scored, without being copied in between; called as an engine is.

    Attributes
    ----------
    array : callable
        See `moefast.spectra.blocks.Memory`.
    score : callable
        An engine, or the part of one that knows these arrays.
    """

    array: Callable[[str, tuple[int, int]], NDArray]
    score: Callable[[NDArray, NDArray, NDArray[np.bool_] | None, int], tuple[Prediction, Quality]]

    def __call__(
        self, flux: NDArray, error: NDArray, mask: NDArray[np.bool_] | None, first_row: int
    ) -> tuple[Prediction, Quality]:
        """See `Engine`; the arrays may also be others."""
        return self.score(flux, error, mask, first_row)


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
    checked : str
        What a comparison with the CPU kernels has shown, in words; empty where there was none.
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

    @property
    def checked(self) -> str:
        """See above."""
        ...

    def __call__(
        self, flux: NDArray, error: NDArray, mask: NDArray[np.bool_] | None, first_row: int
    ) -> tuple[Prediction, Quality]:
        """What becomes of a block."""
        ...

    def place(self) -> AbstractContextManager[Place]:
        """A place for a block of up to `block_rows` rows; each of the `workers` may have one at a time."""
        ...


@dataclass(frozen=True)
class CpuEngine:
    """The CPU kernels."""

    mixture: AnyMixture
    block_rows: int = PROJECT_ROWS
    workers: int = CORES
    note: str = ""
    checked: str = ""
    memory: BlockMemory = field(default_factory=BlockMemory, repr=False, compare=False)

    def __call__(
        self, flux: NDArray, error: NDArray, mask: NDArray[np.bool_] | None, first_row: int
    ) -> tuple[Prediction, Quality]:
        """See `Engine`."""
        return self.mixture.score(flux, error, mask, first_row=first_row)

    @contextmanager
    def place(self) -> Iterator[Place]:
        """See `Engine`."""
        yield Place(self.memory.array, self)


class CudaEngine:
    """The CUDA kernels on the current device: see `moefast.kernels.cuda.CudaScorer` and `CudaPosteriorScorer`.

    Raises
    ------
    BackendError
        The kernels do not run here, or the mixture has experts that they do not know.
    DisagreementError
        Their numbers are not those of the CPU kernels.
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
            self.checked = require_agreement(mixture, partial(self._score, None, first_row=0))
        self.block_rows, self.workers = self._scorer.block_rows, self._scorer.slots

    def __call__(
        self, flux: NDArray, error: NDArray, mask: NDArray[np.bool_] | None, first_row: int
    ) -> tuple[Prediction, Quality]:
        """See `Engine`; no row's numbers depend on where it lies."""
        return self._score(None, flux, error, mask, first_row)

    @contextmanager
    def place(self) -> Iterator[Place]:
        """See `Engine`: pinned memory, which the device copies from."""
        with self._scorer.slot() as slot:
            yield Place(slot.array, partial(self._score, slot))

    def _score(
        self, slot: Any, flux: NDArray, error: NDArray, mask: NDArray[np.bool_] | None, first_row: int
    ) -> tuple[Prediction, Quality]:
        found = self._scorer(flux, error, mask, slot)
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

    # ONNX Runtime has threads of its own; two callers read while a third one waits for the device.
    workers = 3
    checked = ""

    def __init__(self, mixture: AnyMixture, backend: str) -> None:
        from moefast.export import build, on_the_cpu, open_session

        self._session = open_session(build(mixture), backend)
        allocate = _pinned_memory() if backend == "cuda" else plain_memory
        self._memory = BlockMemory(allocate)
        self._names = [output.name for output in self._session.get_outputs()]
        self.block_rows = ONNX_ROWS
        if isinstance(mixture, PosteriorMixture):
            # The tangents of every cloud, seen by every star, in double precision.
            sizes = mixture.sizes
            each = 8 * sizes.n_clouds * sizes.n_tangents * sizes.n_coordinates
            self.block_rows = min(ONNX_ROWS, max(LEAST_ROWS, ONNX_BYTES // each))
        self.note = on_the_cpu(self._session) if backend == "cuda" else ""
        self._bound: queue.SimpleQueue[BoundSession] | None = None
        # A device that is full lets a session start, and refuses its first block.
        ones = np.ones((1, mixture.n_pixels), np.float32)
        self._run(ones, ones)
        if backend == "cuda":
            self.note = "; ".join(filter(None, (self.note, self._bind(mixture, allocate))))

    def __call__(
        self, flux: NDArray, error: NDArray, mask: NDArray[np.bool_] | None, first_row: int
    ) -> tuple[Prediction, Quality]:
        """See `Engine`."""
        quality = assess(flux, error, good_pixels(flux, error, mask), mask)
        seen = error if mask is None else np.where(mask, np.float32(np.nan), error)
        return self._run(flux, seen), quality

    @contextmanager
    def place(self) -> Iterator[Place]:
        """See `Engine`."""
        yield Place(self._memory.array, self)

    def _bind(self, mixture: AnyMixture, allocate: Callable[[int], NDArray[np.uint8]]) -> str:
        """Give each worker memory that is used again, if that changes no number; else say in words why not."""
        from moefast.export.session import BoundSession

        flux, error, _ = stars_of(mixture)
        few = {"flux": flux[:N_BOUND], "error": error[:N_BOUND]}
        expected = self._session.run(self._names, few)
        try:
            bound = [BoundSession(self._session, allocate) for _ in range(self.workers)]
            for one in bound:
                for values, before in zip(one.run(few), expected, strict=True):
                    np.testing.assert_allclose(values, before, rtol=1e-4, atol=1e-5)
        # Whatever it is, the session has just run without.
        except Exception as problem:
            return (
                f"memory of inputs is taken anew for every block ({' '.join(str(problem).split())[:_WORDS]})"
            )
        self._bound = queue.SimpleQueue()
        for one in bound:
            self._bound.put(one)
        return ""

    def _outputs(self, inputs: dict[str, NDArray]) -> list[NDArray]:
        if self._bound is None:
            found: list[NDArray] = self._session.run(self._names, inputs)
            return found
        bound = self._bound.get()
        try:
            return bound.run(inputs)
        finally:
            self._bound.put(bound)

    def _run(self, flux: NDArray, error: NDArray) -> Prediction:
        try:
            found = self._outputs({"flux": flux, "error": error})
        except Exception as problem:
            # ONNX Runtime has no type of its own for memory that is short.
            half = len(flux) // 2
            if half < LEAST_ROWS or "allocate" not in str(problem):
                raise BackendError(
                    f"ONNX Runtime cannot score {counted(len(flux), 'spectrum')}: {problem}"
                ) from problem
            return joined([self._run(flux[:half], error[:half]), self._run(flux[half:], error[half:])])
        return Prediction(**dict(zip(self._names, found, strict=True)))


def _pinned_memory() -> Callable[[int], NDArray[np.uint8]]:
    """How to allocate memory that the current GPU copies from at the rate of the bus.

    Where numba-cuda does not run, which ONNX Runtime does not need, or the system refuses to lock memory, it is plain
    memory, from which a copy takes longer.
    """
    from moefast.kernels.cuda.device import PinnedMemoryError, current_device, pinned_array, require_device

    try:
        require_device()
    except BackendError:
        return plain_memory
    # Threads that read and have chosen no device would lock memory for the first one.
    device = current_device()

    def allocate(size: int) -> NDArray[np.uint8]:
        with device:
            try:
                memory: NDArray[np.uint8] = pinned_array(size, np.uint8)
            except PinnedMemoryError:
                return plain_memory(size)
            return memory

    return allocate


def without_kernels(mixture: AnyMixture) -> str:
    """What of a mixture the CUDA kernels do not know, in words; empty if they know it all."""
    if isinstance(mixture, PosteriorMixture):
        return without_cuda(*mixture.kernel_arrays)
    if unknown := sorted({p.expert.words for p in mixture.experts if not (p.added or p.expert.on_cuda)}):
        return " or ".join(unknown)
    if any(place.added for place in mixture.experts):
        return "residuals of experts"
    return "" if mixture.tower is None else "the second tower of a gate"


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
    """Load compiled code before the clock starts: it is no part of the throughput.

    Raises
    ------
    ModelError
        If not even this spectrum can be computed: arrays of the model do not fit together.
    """
    ones = np.ones((1, n_pixels), np.float32)
    try:
        engine(ones, ones, None, 0)
    except (ValueError, IndexError, ArithmeticError) as error:
        raise ModelError(
            f"the model cannot be computed ({type(error).__name__}: {error}): it was changed; fit or copy it again"
        ) from error


def score_block(engine: Engine | Place, block: Block, first_row: int) -> tuple[Prediction, Quality]:
    """What an engine gives for a block.

    Parameters
    ----------
    engine : Engine or Place
    block : Block
    first_row : int
        Index of the block's first row in its file.
    """
    # Pixels near the end of float32 overflow in their own row, which the flags tell.
    with np.errstate(over="ignore", invalid="ignore"):
        return engine(block.flux, block.error, block.mask, first_row)


def joined(parts: list[Any]) -> Any:
    """One dataclass of arrays for several; what the first does not have, none has."""
    found = {item.name: [getattr(part, item.name) for part in parts] for item in fields(parts[0])}
    return type(parts[0])(**{k: None if v[0] is None else np.concatenate(v) for k, v in found.items()})
