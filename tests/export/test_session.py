import numpy as np
import onnxruntime
import pytest

from moefast.backend import cuda_devices
from moefast.core.errors import BackendError, ModelError
from moefast.export import build, open_session, save
from moefast.export.session import PROVIDERS


def test_a_session_opens_from_a_model_and_from_a_file(mixture, tmp_path):
    model = build(mixture)
    save(model, tmp_path / "model.onnx")
    for source in (model, tmp_path / "model.onnx", str(tmp_path / "model.onnx")):
        session = open_session(source)
        assert session.get_providers() == ["CPUExecutionProvider"]


def test_opening_is_quiet(mixture, capfd):
    open_session(build(mixture))
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(bool(cuda_devices()[0]), reason="this machine has a CUDA device")
def test_cuda_without_a_device_is_an_error(mixture):
    with pytest.raises(BackendError, match="CUDAExecutionProvider"):
        open_session(build(mixture), "cuda")


def test_a_silent_fallback_is_an_error(mixture, monkeypatch):
    real = onnxruntime.InferenceSession

    def fall_back(data, options, **_):
        return real(data, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", fall_back)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(PROVIDERS.values()))
    with pytest.raises(BackendError, match="came up on CPUExecutionProvider"):
        open_session(build(mixture), "cuda")


def test_a_runtime_built_without_cuda_is_an_error(mixture, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match="install onnxruntime-gpu"):
        open_session(build(mixture), "cuda")


def test_cuda_is_asked_for_without_tf32_and_exhaustive_searches(mixture, monkeypatch):
    asked = {}

    def refuse(data, options, *, providers, enable_fallback):
        asked.update(providers=providers, enable_fallback=enable_fallback)
        raise RuntimeError("no device\nand more")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(PROVIDERS.values()))
    with pytest.raises(BackendError, match=r"does not start \(no device\)"):
        open_session(build(mixture), "cuda")
    name, options = asked["providers"][0]
    assert name == "CUDAExecutionProvider"
    assert options == {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    assert asked["enable_fallback"] == 0


def test_unknown_backends_and_spoilt_models_are_refused(mixture, tmp_path):
    with pytest.raises(BackendError, match="tpu"):
        open_session(build(mixture), "tpu")
    model = build(mixture)
    model.ir_version += 1
    with pytest.raises(ModelError, match="IR version"):
        open_session(model)
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"model\.onnx"):
        open_session(tmp_path / "model.onnx")


def test_what_onnx_runtime_refuses_is_a_model_error(mixture):
    model = build(mixture)
    # Valid by the rules of ONNX, which do not compare the widths of layers.
    tensor = next(t for t in model.graph.initializer if t.name == "constant.project_sizes")
    tensor.CopyFrom(type(tensor).FromString(tensor.SerializeToString()))
    tensor.raw_data = np.full(2, 3, np.int64).tobytes()
    with pytest.raises(ModelError, match="ONNX Runtime refuses the model"):
        open_session(model)
