"""Fitted mixtures as ONNX: written, read back, verified, run."""

from moefast.export.graph import load, save
from moefast.export.kinds import build, read_mixture
from moefast.export.parity import export_model, verify
from moefast.export.session import on_the_cpu, open_session, session_inputs

__all__ = [
    "build",
    "export_model",
    "load",
    "on_the_cpu",
    "open_session",
    "read_mixture",
    "save",
    "session_inputs",
    "verify",
]
