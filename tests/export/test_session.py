import os
import re
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
from on_cuda import pretend
from onnx import TensorProto, helper
from plans import random_mixture, random_trees, spectra

from moefast.backend import cuda_devices
from moefast.core.errors import BackendError, InputError, ModelError
from moefast.export import build, open_session, save
from moefast.export.session import (
    PROVIDERS,
    BoundSession,
    on_the_cpu,
    run_within,
    session_inputs,
    start_session,
)


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


def test_nodes_on_the_cpu_are_told(monkeypatch):
    mixture = random_mixture()
    trees = mixture.with_expert(random_trees(3), 1)
    pretend(monkeypatch, {"TreeEnsembleRegressor"})
    said = on_the_cpu(open_session(build(trees), "cuda"))
    assert re.fullmatch(r"partly on the CPU: 1 of \d+ nodes \(1 TreeEnsembleRegressor\)", said)
    assert on_the_cpu(open_session(build(mixture), "cuda")) == ""
    many = {"Add", "Mul", "Sub", "Div", "Where", "MatMul", "Gemm"}
    pretend(monkeypatch, many)
    said = on_the_cpu(open_session(build(mixture), "cuda"))
    counts = [int(number) for number in re.findall(r"(\d+) ", said)]
    # All of them, of how many nodes, four kinds and the others.
    assert len(counts) == 7
    assert counts[0] == sum(counts[2:]) < counts[1]
    assert said.endswith(" others)")


def test_a_session_with_nothing_on_the_gpu_is_an_error(monkeypatch):
    pretend(monkeypatch, None)
    with pytest.raises(BackendError, match=r"takes none of the \d+ nodes; .*or use the CPU"):
        open_session(build(random_mixture()), "cuda")


def test_a_runtime_that_does_not_tell_is_said_to():
    # Nothing was recorded while this graph was loaded; older releases have no such method either.
    assert "does not tell which nodes run on the CPU" in on_the_cpu(open_session(build(random_mixture())))
    assert "does not tell which nodes run on the CPU" in on_the_cpu(object())


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


def test_a_bound_session_gives_what_the_session_gives_from_memory_that_it_uses_again(mixture):
    session = open_session(build(mixture))
    names = [output.name for output in session.get_outputs()]
    taken = []

    def allocate(size):
        taken.append(np.full(size, 255, np.uint8))
        return taken[-1]

    bound = BoundSession(session, allocate, "cpu")
    flux, error = spectra(20, mixture.projection)
    flux[3], error[4, 5] = np.nan, -1
    kept = []
    for n in (20, 7, 20, 3, 1, 20):
        seen = {"flux": flux[:n] * n, "error": error[:n]}
        found, expected = bound.run(seen), session.run(names, seen)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert not any(np.shares_memory(a, memory) for memory in taken)
        kept.append((found, expected))
    # What was given before is not written over; the largest block made the only memory.
    for found, expected in kept:
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)
    assert len(taken) == 1
    # Arrays that are not in one piece.
    wide = {"flux": np.repeat(flux, 2, axis=1)[:, ::2], "error": np.asfortranarray(error)}
    for a, b in zip(bound.run(wide), session.run(names, {"flux": flux, "error": error}), strict=True):
        np.testing.assert_array_equal(a, b)


def test_outputs_whose_size_is_not_known_beforehand_are_not_bound():
    values = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    counts = helper.make_tensor_value_info("y", TensorProto.INT64, [2, "found"])
    graph = helper.make_graph([helper.make_node("NonZero", ["x"], ["y"])], "g", [values], [counts])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(ModelError, match=r"output y is tensor\(int64\) of shape .*, not known beforehand"):
        BoundSession(start_session(model, "cpu"), lambda size: np.empty(size, np.uint8))


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
    node = next(node for node in model.graph.node if "gate.w1" in node.input)
    node.input[1] = "gate.w2"
    with pytest.raises(ModelError, match="ONNX Runtime refuses the model"):
        open_session(model)


def test_arrays_of_any_byte_order_become_what_onnx_runtime_reads():
    rng = np.random.default_rng(3)
    flux, error = rng.normal(1, 0.1, (5, 7)), rng.uniform(0.1, 0.2, (5, 7))
    mask = rng.random((5, 7)) < 0.3
    expected = session_inputs(flux.astype("f4"), error.astype("f4"), mask)
    for kind in (">f4", "<f4", ">f8"):
        found = session_inputs(flux.astype(kind), error.astype(kind), mask.astype(">i8"))
        for name, values in found.items():
            assert values.dtype.isnative
            assert values.dtype == np.float32
            np.testing.assert_array_equal(values, expected[name])
    np.testing.assert_array_equal(np.isnan(expected["error"]), mask)
    with pytest.raises(InputError, match="one shape"):
        session_inputs(flux, error[:4])


def test_a_graph_without_end_is_stopped():
    loop = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["still"]),
            helper.make_node("Identity", ["x"], ["y"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"]),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"]),
        ],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["", "yes", "x0"], ["out"], body=loop)],
        "endless",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor("yes", TensorProto.BOOL, [], [True])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = start_session(model, "cpu")
    with pytest.raises(TimeoutError, match=r"0\.5 s are over"):
        run_within(0.5, session, ["out"], {"x0": np.ones(3, np.float32)})


def test_nothing_is_written_to_the_home_of_the_user(tmp_path):
    """ONNX Runtime keeps an identifier of the machine there, and sends what it is used for, unless told not to."""
    kept = {
        name: text
        for name, text in os.environ.items()
        if name in {"PATH", "NUMBA_CACHE_DIR", "LD_LIBRARY_PATH"}
    }
    code = (
        "import moefast.export.session as session, onnxruntime, os; print(os.environ['ORT_DISABLE_TELEMETRY']); "
        "onnxruntime.SessionOptions()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=kept | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "1\n"
    assert not list(tmp_path.rglob("*Microsoft*"))
