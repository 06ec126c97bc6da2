"""ONNX Runtime sessions that do what was asked for, or say why not.

Design: ONNX Runtime falls back to the CPU without an error when a provider does not start. Here the first provider
of the finished session must be the one asked for. What that provider does not know runs on the CPU all the same, node
by node: a CUDA session records where its nodes went, and `on_the_cpu` says it.
"""

from __future__ import annotations

import contextlib
import io
import math
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import ArrayLike, NDArray
from onnx import ModelProto

from moefast.backend import cpu_count
from moefast.core.errors import BackendError, InputError, ModelError
from moefast.export.graph import check, load

__all__ = [
    "PROVIDERS",
    "BoundSession",
    "on_the_cpu",
    "open_session",
    "run_within",
    "session_inputs",
    "start_session",
]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_ERRORS_ONLY = 3
_RECORD_NODES = "session.record_ep_graph_assignment_info"
_NAMED = 4
"""Kinds of nodes that are named, the most frequent ones."""
_DTYPES = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(int64)": np.int64}
INPUTS = "cuda"
"""Where inputs of a bound session lie."""
_SIZES = 2
"""Sizes of blocks whose inputs keep their memory."""
_ALIGNED = 64
_CUDA_OPTIONS = {
    # TF32 keeps 10 bits of a float32: not enough for a difference of 1e-4 dex.
    "use_tf32": "0",
    # The exhaustive search tries every algorithm on the first batch of each size.
    "cudnn_conv_algo_search": "HEURISTIC",
}


def open_session(model: ModelProto | str | Path, backend: str = "cpu") -> onnxruntime.InferenceSession:
    """Open an ONNX Runtime session on the backend asked for.

    Parameters
    ----------
    model : ModelProto or path
        Checked before it is run (see `moefast.export.load`).
    backend : "cpu" or "cuda"

    Raises
    ------
    BackendError
        Unknown backend, or ONNX Runtime does not run on it here.
    ModelError
        The model is refused.
    """
    if backend not in PROVIDERS:
        raise BackendError(f"backend {backend!r} is unknown to ONNX sessions; choose cpu or cuda")
    if isinstance(model, ModelProto):
        check(model, "the ONNX model")
        return start_session(model, backend)
    return start_session(load(model), backend)


def session_inputs(
    flux: ArrayLike, error: ArrayLike, mask: ArrayLike | None = None
) -> dict[str, NDArray[np.float32]]:
    """Inputs of an exported graph in the one type and byte order that ONNX Runtime reads right.

    ONNX Runtime takes arrays of another byte order, as FITS has them, without a word and for other numbers.

    Parameters
    ----------
    flux, error : array of shape (n, p)
        Of any type and byte order.
    mask : array of shape (n, p), optional
        Not 0 where a pixel is bad.

    Returns
    -------
    dict of str to array of shape (n, p), float32, in the machine's byte order
        "flux" and "error", which is NaN in bad pixels.

    Raises
    ------
    InputError
        The shapes differ, or are not (n, p).
    """
    arrays = {"flux": np.array(flux, np.float32, ndmin=2), "error": np.array(error, np.float32, ndmin=2)}
    bad = None if mask is None else np.asarray(mask) != 0
    shapes = [array.shape for array in arrays.values()] + ([] if bad is None else [np.atleast_2d(bad).shape])
    if len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise InputError(f"flux, error and mask must have one shape (n, pixels); found {shapes}")
    if bad is not None:
        arrays["error"][np.atleast_2d(bad)] = np.nan
    return arrays


def start_session(checked: ModelProto, backend: str) -> onnxruntime.InferenceSession:
    """Start a session of a model that was checked before; see `open_session`."""
    provider = PROVIDERS[backend]
    offered = onnxruntime.get_available_providers()
    if provider not in offered:
        raise BackendError(
            f"this ONNX Runtime {onnxruntime.__version__} has no {provider} (it has {', '.join(offered)}); "
            "install onnxruntime-gpu, or use the CPU"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    # Left to itself, ONNX Runtime pins threads to all cores of the machine, also those this process may not use.
    options.intra_op_num_threads = cpu_count()
    chosen: list[Any] = [provider]
    if backend == "cuda":
        _preload_cuda()
        # Releases that do not know the entry leave it alone.
        options.add_session_config_entry(_RECORD_NODES, "1")
        chosen = [(provider, _CUDA_OPTIONS), PROVIDERS["cpu"]]
    try:
        session = onnxruntime.InferenceSession(
            checked.SerializeToString(), options, providers=chosen, enable_fallback=0
        )
    except Exception as error:
        if backend == "cuda":
            raise BackendError(_refusal(provider, f"it does not start ({_first_line(error)})")) from error
        raise ModelError(f"ONNX Runtime refuses the model ({_first_line(error)}); write it again") from error
    if (found := session.get_providers()[0]) != provider:
        raise BackendError(_refusal(provider, f"the session came up on {found}"))
    session.disable_fallback()
    if backend == "cuda" and set(nodes := _nodes(session) or {}) == {PROVIDERS["cpu"]}:
        raise BackendError(
            _refusal(provider, f"it takes none of the {nodes[PROVIDERS['cpu']].total()} nodes")
        )
    return session


def _nodes(session: onnxruntime.InferenceSession) -> dict[str, Counter[str]] | None:
    """How many nodes of each kind each provider runs; None if this ONNX Runtime does not tell."""
    try:
        parts = session.get_provider_graph_assignment_info()
    # Releases before 1.24 have no such method; a session that did not record raises.
    except Exception:
        return None
    found: dict[str, Counter[str]] = {}
    for part in parts:
        found.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
    return found


def on_the_cpu(session: onnxruntime.InferenceSession) -> str:
    """Which nodes of a session on CUDA run on the CPU, in words; empty if none does.

    Kinds of nodes are counted, not work: of a graph that is on the GPU as a whole, ONNX Runtime still puts a few nodes
    that compute shapes on the CPU.
    """
    nodes = _nodes(session)
    if nodes is None:
        return f"ONNX Runtime {onnxruntime.__version__} does not tell which nodes run on the CPU; a newer one does"
    on_cpu = nodes.get(PROVIDERS["cpu"], Counter())
    if not on_cpu:
        return ""
    named = on_cpu.most_common(_NAMED)
    kinds = [f"{count} {kind}" for kind, count in named]
    if more := on_cpu.total() - sum(count for _, count in named):
        kinds.append(f"{more} others")
    whole = sum(counter.total() for counter in nodes.values())
    return f"partly on the CPU: {on_cpu.total()} of {whole} nodes ({', '.join(kinds)})"


def run_within(
    seconds: float, session: onnxruntime.InferenceSession, outputs: list[str], inputs: dict[str, NDArray]
) -> list[NDArray]:
    """What a session gives; a graph may hold loops, and need not come to an end.

    Raises
    ------
    TimeoutError
        It has not come to an end within so many seconds.
    """
    options = onnxruntime.RunOptions()
    late = threading.Event()

    def stop() -> None:
        late.set()
        options.terminate = True

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        found: list[NDArray] = session.run(outputs, inputs, options)
    except Exception as error:
        if late.is_set():
            raise TimeoutError(f"{seconds:g} s are over") from error
        raise
    finally:
        timer.cancel()
    return found


class BoundSession:
    """Runs a session again and again in the same memory, of its device for inputs and of the host for outputs.

    Left to itself, ONNX Runtime takes memory on the device for the inputs of every run, and on the host for its
    outputs, of a kind from which and to which copies are slow. One caller at a time.

    Parameters
    ----------
    session : onnxruntime.InferenceSession
        Inputs and outputs are arrays whose first axis alone is left open.
    allocate : callable
        Number of bytes -> array of as many uint8, to which outputs are copied: pinned memory, if there is a device.
    device : "cuda" or "cpu", optional
        Where inputs lie; INPUTS if absent.

    Raises
    ------
    ModelError
        An output's shape or type is not known beforehand.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        allocate: Callable[[int], NDArray[np.uint8]],
        device: str | None = None,
    ) -> None:
        self._session, self._device, self._allocate = session, device or INPUTS, allocate
        self._binding = session.io_binding()
        self._inputs: dict[tuple[str, tuple[int, ...]], Any] = {}
        self._memory = np.empty(0, np.uint8)
        self._outputs = []
        for output in session.get_outputs():
            _, *shape = output.shape
            if output.type not in _DTYPES or not all(isinstance(size, int) for size in shape):
                raise ModelError(
                    f"output {output.name} is {output.type} of shape {output.shape}, not known beforehand"
                )
            self._outputs.append((output.name, tuple(shape), np.dtype(_DTYPES[output.type])))

    def run(self, inputs: dict[str, NDArray]) -> list[NDArray]:
        """All outputs of the session, as its own `run` gives them; the arrays are the caller's."""
        n = len(next(iter(inputs.values())))
        for name, values in inputs.items():
            place = self._inputs.get((name, values.shape))
            if place is None:
                # Blocks have one size, and the last one another.
                if len(self._inputs) >= _SIZES * len(inputs):
                    self._binding.clear_binding_inputs()
                    self._inputs.clear()
                place = self._inputs[name, values.shape] = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                    values.shape, values.dtype.type, self._device, 0
                )
            place.update_inplace(values)
            self._binding.bind_ortvalue_input(name, place)
        found = self._host_arrays(n)
        for (name, _, dtype), array in zip(self._outputs, found, strict=True):
            self._binding.bind_output(name, "cpu", 0, dtype.type, array.shape, array.ctypes.data)
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()
        return [array.copy() for array in found]

    def _host_arrays(self, n: int) -> list[NDArray]:
        """Arrays for the outputs of n rows, one after the other in memory that is used again."""
        sizes = [
            -(-n * math.prod(shape) * dtype.itemsize // _ALIGNED) * _ALIGNED
            for _, shape, dtype in self._outputs
        ]
        if sum(sizes) > self._memory.nbytes:
            self._memory = self._allocate(sum(sizes))
        begins = np.cumsum([0, *sizes])
        return [
            self._memory[begin : begin + n * math.prod(shape) * dtype.itemsize].view(dtype).reshape(n, *shape)
            for begin, (_, shape, dtype) in zip(begins.tolist(), self._outputs, strict=False)
        ]


def _preload_cuda() -> None:
    """Load the CUDA libraries of the nvidia-* wheels, which no search path leads to."""
    # What it prints about missing ones would spoil output meant for machines; the session tells anyway.
    with contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()


def _refusal(provider: str, reason: str) -> str:
    return (
        f"ONNX Runtime {onnxruntime.__version__} was asked for {provider}, but {reason}; check the NVIDIA driver, CUDA "
        "and cuDNN (see `moefast doctor`), or use the CPU"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
