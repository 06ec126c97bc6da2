import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
from onnx import numpy_helper

from moefast.backend import cuda_devices
from moefast.core.errors import ModelError
from moefast.export import build, export_model, load, open_session, read_mixture, save, verify
from moefast.export.parity import TOLERANCES, expected_outputs, synthetic_spectra
from moefast.export.session import PROVIDERS

OUTPUTS = tuple(TOLERANCES)


@pytest.fixture(scope="module")
def session(mixture):
    return open_session(build(mixture))


@pytest.fixture(scope="module")
def spectra(mixture):
    return synthetic_spectra(mixture, 103, seed=3)


def run(session, flux, error):
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"flux": flux, "error": error}), strict=True))


def assert_close(found, expected):
    for name, value in found.items():
        want = expected[name]
        assert value.dtype == np.float32
        relative = TOLERANCES[name] if "err" in name or name == "chi2" else 0.0
        absolute = 1e-7 if relative else TOLERANCES[name]
        np.testing.assert_allclose(value, want, rtol=relative, atol=absolute, err_msg=name)


def test_the_synthetic_spectra_have_every_kind_of_row(mixture, spectra):
    flux, error = spectra
    good = np.isfinite(flux) & np.isfinite(error) & (np.nan_to_num(error) > 0)
    assert good[0].all()
    assert 0.5 < good[1].mean() < 0.99
    assert good[2].sum() == 1
    assert not good[3].any()
    for bad in (
        np.isnan(flux),
        np.isposinf(flux),
        np.isneginf(flux),
        np.isnan(error),
        error == 0,
        error == -1,
    ):
        assert bad[1::5].any()
    level = mixture.predict_reference(flux[::5], error[::5]).log_level
    assert level.min() < mixture.knots[0]
    assert level.max() > mixture.knots[-1]


def test_the_random_mixture_uses_what_it_has(mixture, spectra):
    flux, error = (a[::5] for a in spectra)
    prediction = mixture.predict_reference(flux, error)
    unclipped = (prediction.weights * prediction.expert_log_g).sum(1)
    assert {False, True} == set(unclipped != prediction.log_g)
    assert (prediction.weights.max(0) > 1.5 / mixture.n_experts).sum() > 1
    assert prediction.log_g_err.std() > 0.01 * prediction.log_g_err.mean()


@pytest.mark.parametrize("n", [0, 1, 2, 31, 32, 33, 103])
def test_graph_equals_the_float64_contract(mixture, session, spectra, n):
    flux, error = (a[:n] for a in spectra)
    found = run(session, flux, error)
    assert tuple(found) == OUTPUTS
    expected = expected_outputs(mixture, flux, error)
    assert all(found[name].shape == expected[name].shape for name in OUTPUTS)
    assert_close(found, expected)


def test_clipped_flux_is_clipped_alike_everywhere(mixture, spectra):
    clipped = replace(mixture, clipped=True)
    flux, error = (a.copy() for a in spectra)
    flux[::5, ::3] -= 2
    assert (flux[0] < 0).any()
    found = run(open_session(build(clipped)), flux, error)
    assert_close(found, expected_outputs(clipped, flux, error))
    np.testing.assert_allclose(
        clipped.predict(flux[::5], error[::5]).log_g, found["log_g"][::5], atol=TOLERANCES["log_g"]
    )
    as_is = expected_outputs(mixture, np.maximum(flux, 0), error)
    np.testing.assert_allclose(found["expert_log_g"][0], as_is["expert_log_g"][0], atol=1e-4)


def test_graph_equals_predict(mixture, session, spectra):
    flux, error = spectra
    good = np.isfinite(flux) & np.isfinite(error) & (np.nan_to_num(error) > 0)
    some = good.any(1)
    prediction = mixture.predict(flux[some], error[some])
    found = run(session, flux[some], error[some])
    assert_close(found, {name: getattr(prediction, name) for name in OUTPUTS})


def test_full_size(make_mixture):
    mixture = make_mixture(n_pixels=4096, n_experts=9, n_levels=8, n_components=30, hidden=64, seed=5)
    differences = verify(build(mixture), mixture)
    assert set(differences) == set(OUTPUTS)
    assert differences["log_g"] < 1e-4


@pytest.mark.parametrize("part", ["gate", *(f"expert-{k}" for k in range(5))])
def test_each_part_equals_its_share_of_the_whole(mixture, session, spectra, part):
    flux, error = spectra
    (found,) = run(open_session(build(mixture, part)), flux, error).values()
    whole = run(session, flux, error)
    expected = whole["weights"] if part == "gate" else whole["expert_log_g"][:, int(part[7:])]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert verify(build(mixture, part), mixture)


def test_a_row_without_a_good_pixel_is_nan_in_every_output(mixture, session):
    flux = np.ones((3, mixture.n_pixels), np.float32)
    error = np.full_like(flux, 0.1)
    error[1] = 0
    for value in run(session, flux, error).values():
        assert np.isnan(value[1]).all()
        assert np.isfinite(value[[0, 2]]).all()


def test_bad_pixels_and_rows_leave_their_neighbours_bit_identical(mixture, session, spectra):
    flux, error = (a[::5].copy() for a in spectra)
    before = run(session, flux, error)
    flux[4], error[7], flux[9, 5:400] = np.nan, -1, np.inf
    after = run(session, flux, error)
    others = np.setdiff1d(np.arange(len(flux)), [4, 7, 9])
    for name in OUTPUTS:
        assert before[name][others].tobytes() == after[name][others].tobytes()
    assert np.isfinite(after["log_g"][9])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_stands_in_a_bad_pixel_does_not_matter(session, spectra, value):
    flux, error = (a[:1].copy() for a in spectra)
    error[0, 100:200] = 0
    expected = run(session, flux, error)
    flux[0, 100:150], error[0, 120:200] = value, value
    found = run(session, flux, error)
    for name in OUTPUTS:
        assert expected[name].tobytes() == found[name].tobytes()


def test_the_mixture_read_back_predicts_the_same_bits(mixture, spectra):
    flux, error = (a[::5] for a in spectra)
    back = read_mixture(build(mixture), mixture.wave)
    for name in OUTPUTS:
        assert (
            getattr(mixture.predict(flux, error), name).tobytes()
            == getattr(back.predict(flux, error), name).tobytes()
        )


def test_plain_onnx_runtime_gives_the_same_numbers(mixture, spectra, tmp_path):
    flux, error = spectra
    save(build(mixture), tmp_path / "model.onnx")
    np.savez(tmp_path / "in.npz", flux=flux, error=error)
    script = """
import sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
names = [output.name for output in session.get_outputs()]
with np.load("in.npz") as file:
    values = session.run(names, {"flux": file["flux"], "error": file["error"]})
np.savez("out.npz", **dict(zip(names, values)))
assert not any(name.split(".")[0] == "moefast" for name in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    # Unused initializers, failed shape inference and the like would be told here.
    assert "moefast" not in done.stderr
    assert "initializer" not in done.stderr
    with np.load(tmp_path / "out.npz") as file:
        assert tuple(file.files) == OUTPUTS
        assert_close({name: file[name] for name in file.files}, expected_outputs(mixture, flux, error))


def test_verify_finds_one_wrong_number(mixture):
    model = build(mixture)
    weights = next(tensor for tensor in model.graph.initializer if tensor.name == "gate.b2")
    wrong = numpy_helper.to_array(weights) + np.array([0, 0.01, 0, 0, 0], np.float32)
    weights.CopyFrom(numpy_helper.from_array(wrong, "gate.b2"))
    with pytest.raises(ModelError, match="weights differs by"):
        verify(model, mixture)


def test_verify_holds_log_g_to_its_tolerance(mixture):
    with pytest.raises(ModelError, match="log_g differs by"):
        verify(build(mixture), mixture, tolerance=1e-12)


def test_verify_refuses_a_model_that_answers_for_empty_rows(mixture):
    model = build(mixture)
    nan = next(tensor for tensor in model.graph.initializer if tensor.name == "constant.nan")
    nan.CopyFrom(numpy_helper.from_array(np.array(3, np.float32), "constant.nan"))
    with pytest.raises(ModelError, match="NaN in other rows"):
        verify(model, mixture)


def test_verify_needs_every_kind_of_row(mixture):
    with pytest.raises(ValueError, match="5 at least"):
        verify(build(mixture), mixture, n=4)


def test_verify_refuses_a_model_with_other_outputs(mixture):
    model = build(mixture, "gate")
    model.graph.output[0].name = model.graph.node[-1].output[0] = "shares"
    with pytest.raises(ModelError, match="shares"):
        verify(model, mixture)


def test_export_model_writes_what_it_verified(mixture, tmp_path):
    differences = export_model(mixture, tmp_path / "model.onnx", metadata={"recipe": "test"})
    assert 0 <= differences["log_g"] <= 1e-4
    assert verify(load(tmp_path / "model.onnx"), mixture) == differences


def test_export_model_writes_nothing_that_fails(mixture, tmp_path, monkeypatch):
    other = replace(mixture, reference=mixture.reference + np.float32(0.1))
    monkeypatch.setattr("moefast.export.parity.build", lambda *_, **__: build(other))
    with pytest.raises(ModelError, match="does not give the numbers"):
        export_model(mixture, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_devices()[0], reason="this machine has no CUDA device")
@pytest.mark.skipif(
    PROVIDERS["cuda"] not in onnxruntime.get_available_providers(),
    reason=f"this ONNX Runtime {onnxruntime.__version__} has no {PROVIDERS['cuda']}",
)
def test_cuda_equals_the_float64_contract(mixture, spectra):
    flux, error = spectra
    found = run(open_session(build(mixture), "cuda"), flux, error)
    assert_close(found, expected_outputs(mixture, flux, error))
