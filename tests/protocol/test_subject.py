"""ONNX files as subjects: moefast's own give its numbers, those of others are measured by the same rules."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from moefast.core.errors import InputError, ModelError, WaveGridError
from moefast.export import export_model
from moefast.protocol.evaluate import evaluate
from moefast.protocol.subject import open_subject
from moefast.spectra import open_spectra

N, PIXELS = 300, 1024
NOISE = {"noise": "stored", "noise_level": 1.0, "noise_seed": None}


@pytest.fixture(scope="module")
def noisy_file(stars, tmp_path_factory):
    return stars.take(slice(0, N)).write(
        tmp_path_factory.mktemp("noisy") / "noisy.h5", arrays=("flux", "error", "noisy")
    )


def foreign(path, *, pixels=PIXELS, batch="n", inputs=("flux", "error"), output="log_g", kind=TensorProto.FLOAT,
            domain="", keep=True):  # fmt: skip
    """log g = 2 + mean of the flux, as somebody's graph: standard operators that moefast itself does not use."""
    nodes = [
        helper.make_node("ReduceMean", [inputs[0]], ["mean"], axes=[1], keepdims=int(keep)),
        helper.make_node("Add", ["mean", "two"], [output], domain=domain),
    ]
    shape = [batch, 1] if keep else [batch]
    graph = helper.make_graph(
        nodes,
        "somebody's",
        [helper.make_tensor_value_info(name, kind, [batch, pixels]) for name in inputs],
        [helper.make_tensor_value_info(output, kind, shape)],
        [numpy_helper.from_array(np.array(2, helper.tensor_dtype_to_np_dtype(kind)), "two")],
    )
    opsets = [helper.make_opsetid("", 17)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.save(model, path)
    return path


def test_an_exported_model_gives_its_own_report(noisy_file, model, tmp_path):
    export_model(model.mixture, tmp_path / "mine.onnx")
    found, own = evaluate(noisy_file, tmp_path / "mine.onnx"), evaluate(noisy_file, model)
    np.testing.assert_allclose(found.predicted, own.predicted, atol=1e-4)
    np.testing.assert_allclose(found.stars["log_g_err"], own.stars["log_g_err"], rtol=1e-3)
    np.testing.assert_allclose(found.stars["weight_8"], own.stars["weight_8"], atol=1e-4)
    assert found.report["overall"]["r2"] == pytest.approx(own.report["overall"]["r2"], abs=1e-4)
    assert found.report["model"]["kind"] == "onnx"
    assert found.report["model"]["wave_checked"]
    assert found.run["spectra_per_second"] > 0
    assert found.run["command"].endswith("mine.onnx")


def test_an_exported_expert(noisy_file, model, tmp_path):
    export_model(model.mixture, tmp_path / "expert.onnx", "expert-4")
    found = evaluate(noisy_file, tmp_path / "expert.onnx").report
    assert found["overall"]["r2"] < evaluate(noisy_file, model).report["overall"]["r2"]
    assert found["calibration"] is None
    assert found["routing"] is None


@pytest.mark.parametrize("keep", [True, False])
def test_the_model_of_somebody_else(keep, noisy_file, tmp_path):
    found = evaluate(noisy_file, foreign(tmp_path / "other.onnx", keep=keep))
    flux = next(iter(open_spectra(noisy_file).blocks(1000, array="noisy"))).flux
    np.testing.assert_allclose(found.predicted, 2 + flux.mean(1), rtol=1e-5)
    assert not found.report["model"]["wave_checked"]


def test_bad_pixels_reach_a_graph_as_errors_that_are_nan(stars, model, tmp_path):
    some = stars.take(slice(0, 20))
    some.noisy[3] = np.nan
    some.error[5, :40] = -1.0
    path = some.write(tmp_path / "x.h5", arrays=("flux", "error", "noisy"))
    export_model(model.mixture, tmp_path / "mine.onnx")
    found = evaluate(path, tmp_path / "mine.onnx")
    assert np.flatnonzero(np.isnan(found.predicted)).tolist() == [3]
    np.testing.assert_allclose(found.predicted, evaluate(path, model).predicted, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"inputs": ("flux", "sigma")}, ModelError, "inputs flux and error"),
        ({"kind": TensorProto.DOUBLE}, ModelError, "inputs flux and error, both"),
        ({"output": "teff"}, ModelError, "an output log_g is expected; found teff"),
        ({"batch": 1}, ModelError, "any number of spectra"),
        ({"pixels": 4096}, WaveGridError, "takes spectra of 4096 pixels; the test set has 1024"),
        ({"domain": "com.somebody"}, ModelError, "com.somebody:Add .* not part of the ONNX standard"),
    ],
)
def test_graphs_that_cannot_be_measured(changes, error, words, noisy_file, tmp_path):
    path = foreign(tmp_path / "other.onnx", **changes)
    with pytest.raises(error, match=words):
        evaluate(noisy_file, path)


def test_a_graph_for_another_wave_grid(stars, model, tmp_path):
    from dataclasses import replace

    some = stars.take(slice(0, 5))
    path = replace(some, wave=some.wave + 5).write(tmp_path / "x.h5", arrays=("flux", "error", "noisy"))
    export_model(model.mixture, tmp_path / "mine.onnx")
    with pytest.raises(WaveGridError, match="was made for"):
        evaluate(path, tmp_path / "mine.onnx")


def test_files_that_are_no_graphs(noisy_file, tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"x\.onnx"):
        evaluate(noisy_file, tmp_path / "x.onnx")
    with pytest.raises(ModelError, match="cannot be read"):
        evaluate(noisy_file, tmp_path / "absent.onnx")
    with pytest.raises(InputError, match="no such file"):
        evaluate(noisy_file, tmp_path / "absent.csv")
    with pytest.raises(ModelError, match=r"no manifest\.json"):
        evaluate(noisy_file, tmp_path / "absent")


def test_external_data_is_refused(noisy_file, tmp_path):
    foreign(tmp_path / "other.onnx")
    model = onnx.load(tmp_path / "other.onnx")
    onnx.save_model(
        model, tmp_path / "outside.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    with pytest.raises(ModelError, match="lies in an external file"):
        evaluate(noisy_file, tmp_path / "outside.onnx")


def test_shipped_by_name(noisy_file, model, monkeypatch):
    monkeypatch.setattr("moefast.model.shipped_path", lambda name: model.path if name == "survey" else None)
    subject = open_subject("survey", open_spectra(noisy_file), backend="cpu", noise=NOISE)
    assert subject.about["sha256"] == model.hash
