"""ONNX Runtime sessions that do what was asked for, or say why not.

Design: ONNX Runtime falls back to the CPU without an error when a provider does not start. Here the first provider
of the finished session must be the one asked for.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import onnxruntime
from onnx import ModelProto

from moefast.backend import cpu_count
from moefast.core.errors import BackendError, ModelError
from moefast.export.graph import check, load

__all__ = ["PROVIDERS", "open_session", "start_session"]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_ERRORS_ONLY = 3
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
    return session


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
