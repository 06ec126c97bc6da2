"""Networks as experts: NumPy in two precisions, ONNX and torch give the same numbers, and the file gives them back."""

import dataclasses

import numpy as np
import pytest
from made_network import KINDS, network, with_heads
from plans import random_mixture, spectra
from tolerances import assert_close

from moefast.core.errors import ModelError
from moefast.experts.protocol import Inputs
from moefast.export import build, open_session, read_mixture
from moefast.ops.arithmetic import is_half, is_matrix
from moefast.ops.on_numpy import NumPyArithmetic
from moefast.ops.on_torch import TorchArithmetic
from moefast.trunks.heads import Heads
from moefast.trunks.networks import NetworkPlan, answer, shapes, start


@pytest.fixture(params=KINDS)
def mixture(request):
    return with_heads(random_mixture(), request.param)


def test_predictions_are_those_of_the_contract(mixture):
    flux, error = spectra(131, mixture.projection)
    found, expected = mixture.predict(flux, error), mixture.predict_reference(flux, error)
    for name in ("log_g", "log_g_err", "log_g_err_raw", "weights", "expert_log_g"):
        # Logits of order 10 carry a float32 rounding of 1e-6 each into the exponential.
        assert_close(getattr(found, name), getattr(expected, name), made_in=np.float32, factor=3)


@pytest.mark.parametrize("n", [0, 1, 7, 63, 64, 65])
def test_a_star_does_not_depend_on_its_neighbours(mixture, n):
    flux, error = spectra(130, mixture.projection)
    every = mixture.predict(flux, error)
    few = mixture.predict(flux[:n], error[:n])
    np.testing.assert_array_equal(few.log_g, every.log_g[:n])
    spoilt = flux.copy()
    spoilt[::3] = np.nan
    left = np.setdiff1d(np.arange(130), np.arange(0, 130, 3))
    np.testing.assert_array_equal(mixture.predict(spoilt, error).log_g[left], every.log_g[left])


def test_the_graph_gives_the_same_for_any_number_of_stars(mixture):
    session = open_session(build(mixture))
    flux, error = spectra(37, mixture.projection)
    expected = mixture.predict_reference(flux, error)
    for n in (0, 1, 37):
        log_g, weights = session.run(["log_g", "weights"], {"flux": flux[:n], "error": error[:n]})
        assert_close(log_g, expected.log_g[:n], made_in=np.float32, factor=3)
        assert_close(weights, expected.weights[:n], made_in=np.float32, factor=3)


def test_single_experts_and_the_gate_leave_the_graph_alone(mixture):
    flux, error = spectra(20, mixture.projection)
    expected = mixture.predict_reference(flux, error)
    for k in (0, mixture.n_experts - 1):
        (found,) = open_session(build(mixture, f"expert-{k}")).run(None, {"flux": flux, "error": error})
        assert_close(found, expected.expert_log_g[:, k], made_in=np.float32, factor=3)
    (found,) = open_session(build(mixture, "gate")).run(None, {"flux": flux, "error": error})
    assert_close(found, expected.weights, made_in=np.float32, factor=3)
    with pytest.raises(ModelError, match="expert-4"):
        build(mixture, "expert-5")


def test_a_file_gives_the_network_back_to_the_last_bit(mixture):
    again = read_mixture(build(mixture), mixture.wave).place(Heads)
    assert again.plan == mixture.place(Heads).plan
    for name, array in mixture.place(Heads).numbers.items():
        np.testing.assert_array_equal(again.numbers[name], array, err_msg=name)


def test_a_tampered_network_is_refused(mixture):
    from onnx import numpy_helper

    proto = build(mixture)
    name = f"heads.{mixture.place(Heads).plan.kind}.gate.in.w"
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    whole = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(whole[:-1]), name))
    with pytest.raises(ModelError, match=r"cannot be read: gate\.in\.w"):
        read_mixture(proto, mixture.wave)
    tensor.CopyFrom(numpy_helper.from_array(np.full_like(whole, np.nan), name))
    with pytest.raises(ModelError, match="not finite"):
        read_mixture(proto, mixture.wave)


@pytest.mark.torch
def test_torch_gives_the_same(mixture):
    import torch

    heads = mixture.place(Heads)
    rng = np.random.default_rng(3)
    seen = {
        "log_level": rng.uniform(-1, 1, (9, 1)), "lines": rng.standard_normal((9, 9)),
        "x" if heads.needs_flux else "z": rng.standard_normal((9, heads.plan.n_inputs)),
    }  # fmt: skip
    expected = answer(NumPyArithmetic(heads.numbers), heads.plan, seen)
    tensors = {name: torch.from_numpy(a.astype(np.float64)) for name, a in heads.numbers.items()}
    found = answer(
        TorchArithmetic(torch, tensors), heads.plan, {k: torch.from_numpy(v) for k, v in seen.items()}
    )
    for a, b in zip(found, expected, strict=True):
        assert_close(a.numpy(), b)


def test_the_metal_poor_head_speaks_in_metal_poor_bins_alone():
    mixture = random_mixture()
    heads = network(mixture, "pca-mlp")
    poor = np.flatnonzero(heads.numbers["metal_poor"][:, 0])
    assert 0 < poor.size < heads.n_experts
    other = dict(heads.numbers)
    other["heads.b"] = other["heads.b"].copy()
    other["heads.b"][-1] += 0.1
    inputs = Inputs(
        np.zeros((5, heads.plan.n_inputs), np.float32), np.zeros(5, np.float32), np.zeros((5, 9), np.float32)
    )
    before, after = heads.evaluate(inputs)[0], Heads(heads.plan, other).evaluate(inputs)[0]
    spread = heads.numbers["log_g.scale"][1]
    expected = np.where(np.isin(np.arange(heads.n_experts), poor), 0.1 * spread, 0)
    np.testing.assert_allclose(after - before, np.broadcast_to(expected, before.shape), atol=1e-6)


@pytest.mark.parametrize("level", [-50.0, 50.0])
def test_noise_beyond_the_training_set_counts_as_the_last_that_was_seen(mixture, level):
    heads = mixture.place(Heads)
    limits = heads.numbers["level.limits"]
    rng = np.random.default_rng(0)
    spectrum = rng.standard_normal((4, heads.plan.n_inputs)).astype(np.float32)
    lines = np.zeros((4, 9), np.float32)

    def at(value):
        seen = np.full(4, value, np.float32)
        z, x = (None, spectrum) if heads.needs_flux else (spectrum, None)
        return heads.evaluate(Inputs(z, seen, lines, x))[0]

    np.testing.assert_array_equal(at(level), at(limits[0] if level < 0 else limits[1]))


def test_answers_are_bounded_whatever_is_seen(mixture):
    heads = mixture.place(Heads)
    mean, spread = heads.numbers["log_g.scale"]
    huge = np.full((3, heads.plan.n_inputs), 1e20, np.float32)
    z, x = (None, huge) if heads.needs_flux else (huge, None)
    log_g, sd, _ = heads.evaluate(Inputs(z, np.zeros(3, np.float32), np.full((3, 9), 1e20, np.float32), x))
    finite = np.isfinite(log_g)
    assert (np.abs(log_g[finite] - mean) <= 3 * spread * (1 + 1e-5)).all()
    assert (sd[np.isfinite(sd)] <= spread * np.e * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kind": "rnn"}, "one of pca-mlp, cnn, vit"),
        ({"width": 0}, "positive"),
        ({"kind": "vit", "n_inputs": 500}, "whole patches"),
        ({"kind": "vit", "width": 40}, "whole heads"),
        ({"kind": "cnn", "n_inputs": 60}, "too few"),
    ],
)
def test_plans_that_cannot_be_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        NetworkPlan(**{"kind": "pca-mlp", "n_inputs": 640, "n_experts": 9, "width": 64, **changes})


def test_numbers_that_do_not_fit_are_refused():
    plan = NetworkPlan("pca-mlp", 12, 5, width=32)
    numbers = start(plan, 0)
    assert {name: a.shape for name, a in numbers.items()} == shapes(plan)
    with pytest.raises(ValueError, match=r"other numbers: in\.w"):
        Heads(plan, {name: a for name, a in numbers.items() if name != "in.w"})
    for wrong in (
        numbers["in.w"][1:],
        numbers["in.w"].astype(np.float64),
        np.full_like(numbers["in.w"], np.inf),
    ):
        with pytest.raises(ValueError, match=r"in\.w of a pca-mlp must be finite"):
            Heads(plan, {**numbers, "in.w": wrong})


def test_a_mixture_refuses_a_network_of_another_shape():
    mixture = random_mixture()
    for changes in ({"n_experts": 4}, {"n_components": 11}):
        other = with_heads(random_mixture(**changes), "pca-mlp").place(Heads)
        with pytest.raises(ValueError, match="a trunk for 12 components with 5 heads"):
            mixture.with_expert(other)
    heads = network(mixture, "pca-mlp")
    with pytest.raises(ValueError, match=r"a pca-mlp sees z of shape \(n, 12\)"):
        heads.evaluate(Inputs(np.zeros((2, 3)), np.zeros(2), np.zeros((2, 9))))


def test_half_precision_costs_little_and_halves_the_file(mixture, tmp_path):
    from moefast.export import export_model

    found = {}
    for half in (False, True):
        export_model(mixture, tmp_path / f"{half}.onnx", half=half)
        found[half] = (tmp_path / f"{half}.onnx").stat().st_size
    matrices = sum(a.size for name, a in mixture.place(Heads).numbers.items() if a.ndim > 1)
    assert found[False] - found[True] > 1.5 * matrices
    flux, error = spectra(50, mixture.projection)
    (log_g,) = open_session(tmp_path / "True.onnx").run(["log_g"], {"flux": flux, "error": error})
    apart = np.abs(log_g - mixture.predict_reference(flux, error).log_g)
    assert 0 < apart.max() < 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_that_half_precision_holds_take_half_the_bytes_and_lose_nothing(kind, mixture):
    exact = network(mixture, kind)
    short = mixture.with_expert(exact.rounded())
    matrices = sum(a.size for name, a in exact.numbers.items() if is_matrix(name, a.ndim))
    sizes = [build(mixture.with_expert(h)).ByteSize() for h in (exact, short.place(Heads))]
    assert sizes[0] - sizes[1] == pytest.approx(2 * matrices, rel=0.1)
    again = read_mixture(build(short), mixture.wave)
    for name, array in short.place(Heads).numbers.items():
        np.testing.assert_array_equal(again.place(Heads).numbers[name], array, err_msg=name)
        assert is_half(name, array) == is_matrix(name, array.ndim)
    flux, error = spectra(50, mixture.projection)
    (log_g,) = open_session(build(short)).run(["log_g"], {"flux": flux, "error": error})
    np.testing.assert_allclose(log_g, short.predict_reference(flux, error).log_g, atol=1e-4)


def test_matrices_beyond_half_precision_stay_as_they_are(mixture):
    heads = network(mixture, "pca-mlp")
    large = dataclasses.replace(heads, numbers={**heads.numbers, "in.w": 1e6 * heads.numbers["in.w"]})
    np.testing.assert_array_equal(large.rounded().numbers["in.w"], large.numbers["in.w"])
    assert not is_half("in.w", large.numbers["in.w"])


def test_a_model_in_half_precision_is_no_model_folder(mixture):
    with pytest.raises(ModelError, match="half precision, from which a mixture cannot be read"):
        read_mixture(build(mixture, half=True), mixture.wave)
    with pytest.raises(ModelError, match="half precision is for networks"):
        build(random_mixture(), half=True)
