"""A session of ONNX Runtime that says of itself what one on CUDA would, and computes on the CPU."""

from types import SimpleNamespace

import onnxruntime

from moefast.export import session
from moefast.export.session import PROVIDERS

REAL = onnxruntime.InferenceSession


def session_class(cpu_kinds):
    """A stand-in for `onnxruntime.InferenceSession` whose nodes of these kinds (None: all) are on the CPU."""

    class Session(REAL):
        def __init__(self, data, options, **_):
            super().__init__(data, options, providers=[PROVIDERS["cpu"]])

        def get_providers(self):
            return [PROVIDERS["cuda"], PROVIDERS["cpu"]]

        def get_provider_graph_assignment_info(self):
            # Raises unless the session was told to record.
            for part in super().get_provider_graph_assignment_info():
                for node in part.get_nodes():
                    on_cpu = cpu_kinds is None or node.op_type in cpu_kinds
                    yield SimpleNamespace(
                        ep_name=PROVIDERS["cpu" if on_cpu else "cuda"], get_nodes=lambda node=node: [node]
                    )

    return Session


def pretend(monkeypatch, cpu_kinds):
    """Let CUDA sessions open here, with nodes of these kinds on the CPU."""
    monkeypatch.setattr(onnxruntime, "InferenceSession", session_class(cpu_kinds))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(PROVIDERS.values()))
    monkeypatch.setattr(session, "INPUTS", "cpu")
