"""The graph of a posterior gives its numbers, and gives the posterior back."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from made_posterior import random_posterior
from onnx import TensorProto, helper, numpy_helper

from moefast.core.errors import ModelError
from moefast.export import build, export_model, load, open_session, read_mixture, verify
from moefast.export import parity as module
from moefast.export.graph import IR_VERSION, OPSET, Graph, kind_of, part_of
from moefast.export.parity import POSTERIOR_TOLERANCES, TOLERANCES, expected_outputs, synthetic_spectra
from moefast.export.session import start_session
from moefast.ops.on_onnx import OnnxArithmetic
from moefast.spectra.quality import good_pixels

OUTPUTS = (*TOLERANCES, *POSTERIOR_TOLERANCES)
SHAPES = {
    "usual": {},
    "no nuisances": {"q": 0},
    "sky alone": {"q": 1},
    "one pixel a cell": {"p": 509},
    "one expert": {"n_experts": 1, "m": 5},
    "one tangent": {"t": 1},
    "slopes of two widths": {"calibrated": (0.4, 0.2)},
    "the same without sky": {"q": 2, "sky": 0, "calibrated": (0.4, 0.3, 0.1)},
    "stars alone": {"n_foreign": 0},
    "blends": {"n_foreign": 2, "blends": True},
    "blends and slopes of two widths": {"n_foreign": 2, "blends": True, "calibrated": (0.4, 0.2)},
    "two labels": {"labels": 2},
    "corrected": {"corrects": True},
    "corrected, without nuisances": {"q": 0, "labels": 3, "n_foreign": 2, "blends": True, "corrects": True},
}


@pytest.fixture(scope="module", params=SHAPES)
def posterior(request):
    return random_posterior(**SHAPES[request.param])


@pytest.fixture(scope="module")
def model(posterior):
    return build(posterior)


@pytest.fixture(scope="module")
def usual():
    return random_posterior()


def outputs_of(posterior):
    return [name for name in OUTPUTS if name != "blend" or posterior.blends]


def run(model, flux, error):
    session = open_session(model)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"flux": flux, "error": error}), strict=True))


def test_the_model_is_valid_and_of_the_stated_versions(model, posterior):
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    assert (model.ir_version, kind_of(model), part_of(model)) == (IR_VERSION, "posterior", "mixture")
    assert [output.name for output in model.graph.output] == outputs_of(posterior)
    assert {output.type.tensor_type.elem_type for output in model.graph.output} == {TensorProto.FLOAT}
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert said["label_names"].split(",") == list(posterior.label_names)


def test_initializers_are_what_is_stored_and_small_constants(model, posterior):
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    stored = {
        name.removeprefix("posterior."): a for name, a in arrays.items() if name.startswith("posterior.")
    }
    expected = posterior.stored()
    if not posterior.n_nuisances:
        assert expected.pop("n_sky") == 0
    if not posterior.calibrated[0]:
        assert expected.pop("calibrated").tolist() == [0]
    assert stored.keys() == expected.keys()
    for name, array in expected.items():
        assert (stored[name].dtype, stored[name].tobytes()) == (array.dtype, array.tobytes()), name
    assert sum(a.nbytes for name, a in arrays.items() if not name.startswith("posterior.")) < 10_000
    used = {name for node in model.graph.node for name in node.input}
    assert arrays.keys() <= used
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)


def test_round_trip_is_exact(model, posterior, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    again = read_mixture(load(path), posterior.wave)
    assert (again.label_names, again.n_sky) == (posterior.label_names, posterior.n_sky)
    assert (again.n_foreign, again.blends) == (posterior.n_foreign, posterior.blends)
    assert (again.scale_width, again.label_range) == (posterior.scale_width, posterior.label_range)
    for name, array in posterior.stored().items():
        assert array.tobytes() == again.stored()[name].tobytes(), name
    assert build(again).SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


def test_numbers_derived_in_the_graph_are_those_of_the_mixture_to_the_last_bit(usual):
    from moefast.export.posterior_graph import _Steps

    steps = _Steps(Graph(), usual)
    numbers = usual.numbers
    values = {name: steps.number(name) for name in numbers}
    derived = {name: value for name, value in values.items() if value not in steps.graph.initializers}
    assert {"tangents", "gains", "scatter", "members", "others", "labels", "follows_noise"} <= derived.keys()
    graph = helper.make_graph(
        steps.graph.nodes,
        "derived",
        [],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, None) for value in derived.values()],
        list(steps.graph.initializers.values()),
    )
    own = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    found = start_session(own, "cpu").run(list(derived.values()), {})
    for name, value in zip(derived, found, strict=True):
        want = np.atleast_1d(numbers[name])
        assert value.shape == want.shape, name
        np.testing.assert_array_equal(value, want, err_msg=name)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_graph_gives_the_numbers_of_the_description(model, posterior, seed):
    differences = verify(model, posterior, n=80, seed=seed)
    assert list(differences) == outputs_of(posterior)
    assert differences["log_g"] < 1e-5


def test_the_synthetic_spectra_have_every_kind_of_row(usual):
    flux, error = synthetic_spectra(usual, 80)
    good = good_pixels(flux, error)
    share = good.mean(1)
    huge = np.nan_to_num(error, nan=0, posinf=0).max(1) > 1e8
    assert huge.any()
    assert not share[huge].any()
    assert (share[~huge][:1] == 1).all()
    ordinary = share[:5]
    assert ordinary[0] == 1
    assert 0.8 < ordinary[1] < 1
    assert good[2].sum() == 1
    assert ordinary[3] == 0
    assert 0.7 < ordinary[4] < 0.8
    scale = usual.predict_reference(flux, error).scale
    assert ((scale > 1e-18) & (scale < 1e-16))[good.all(1)].any()
    assert (scale[good.all(1)] > 1e3).any()
    found = usual.predict_reference(flux, error)
    inside = (found.log_g > usual.label_range[0]) & (found.log_g < usual.label_range[1])
    assert set(inside[good.any(1)]) == {True, False}
    assert found.log_g_err[good.any(1)].std() > 0.01 * found.log_g_err[good.any(1)].mean()


@pytest.mark.parametrize("n", [1, 2, 7])
def test_small_batches(model, posterior, n):
    flux, error = (a[:n] for a in synthetic_spectra(posterior, 10))
    found, expected = run(model, flux, error), expected_outputs(posterior, flux, error)
    assert all(found[name].shape == expected[name].shape for name in expected)
    np.testing.assert_allclose(found["log_g"], expected["log_g"], atol=1e-4)


@pytest.mark.parametrize("factor", [1e-17, 1e-12, 1e5])
def test_the_unit_of_the_flux_changes_the_scale_alone(model, posterior, factor):
    """Single precision squares an error of 1e-18 to nearly nothing: flux and error are brought to one unit first."""
    flux, error = (a[:1] for a in synthetic_spectra(posterior, 5))
    plain = run(model, flux, error)
    found = run(model, flux * np.float32(factor), error * np.float32(factor))
    np.testing.assert_allclose(found.pop("scale"), factor * plain.pop("scale"), rtol=1e-4)
    for name, value in found.items():
        np.testing.assert_allclose(value, plain[name], rtol=2e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("part", ["gate", "expert-0", "expert-2"])
def test_each_part_equals_its_share_of_the_whole(usual, part, tmp_path):
    differences = export_model(usual, tmp_path / "part.onnx", part)
    assert list(differences) == (["weights"] if part == "gate" else ["log_g"])
    with pytest.raises(ModelError, match="whole mixture"):
        read_mixture(load(tmp_path / "part.onnx"), usual.wave)


def test_a_file_of_the_full_size_is_small():
    full = random_posterior(p=4096, m=450, n=49, t=5, q=3, n_experts=9)
    assert build(full).ByteSize() < 3e6


@pytest.mark.parametrize("name", ["keys", "gains", "scatter", "noise_shape", "error.b2", "label_factors"])
def test_another_posterior_is_not_taken_for_this_one(usual, name):
    arrays = usual.stored()
    arrays[name] = (arrays[name] * np.float32(1.5)).astype(np.float32)
    other = type(usual).from_stored(usual.wave, arrays, usual.label_names, n_foreign=usual.n_foreign)
    with pytest.raises(ModelError, match="does not give the numbers"):
        verify(build(other), usual, n=10)


def test_nothing_is_written_that_does_not_agree(usual, tmp_path, monkeypatch):
    other = replace(usual, labels=usual.labels + np.float32(0.1))
    monkeypatch.setattr(module, "build", lambda mixture, *_, **__: build(other))
    with pytest.raises(ModelError, match="not written"):
        export_model(usual, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def _changed(model, name, array):
    changed = type(model).FromString(model.SerializeToString())
    tensor = next(t for t in changed.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    return changed


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("keys", np.zeros((3, 7), np.float32), "fit together"),
        ("keys", np.full((17, 7), np.nan, np.float32), "not finite"),
        ("keys", np.zeros((17, 7), np.float64), "FLOAT"),
        ("first", np.array([0, 5, 17], np.int64), "fit together|experts"),
        ("first", np.array([], np.int64), "fit together"),
        ("n_sky", np.array([3], np.int64), "fit together"),
        ("label_range", np.array([1.0], np.float32), "fit together"),
        ("noise_shape", np.zeros(512, np.float32), "positive"),
        ("error.w1", np.zeros((4, 6), np.float32), "error model"),
    ],
)
def test_altered_initializers_are_refused(usual, name, array, words):
    if name == "first" and array.size:
        # Other bounds of the same clouds are another posterior, and a valid one.
        assert read_mixture(_changed(build(usual), "posterior.first", array), usual.wave).n_experts == 1
        return
    with pytest.raises(ModelError, match=words):
        read_mixture(_changed(build(usual), f"posterior.{name}", array), usual.wave)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("mean", np.zeros(3, np.float32)),
        ("w2", np.zeros((12, 8), np.float32)),
        ("b4", np.zeros(2, np.float32)),
    ],
)
def test_altered_corrections_are_refused(name, array):
    made = random_posterior(corrects=True)
    with pytest.raises(ModelError, match="fit together: finite correction"):
        read_mixture(_changed(build(made), f"posterior.correction.{name}", array), made.wave)


def test_a_missing_initializer_and_an_unknown_kind_are_named(usual):
    model = build(usual)
    kind = next(entry for entry in model.metadata_props if entry.key == "kind")
    kind.value = "oracle"
    with pytest.raises(ModelError, match="kind 'oracle', mixture or posterior expected"):
        read_mixture(model, usual.wave)
    kind.value = "mixture"
    with pytest.raises(ModelError, match="lacks the initializer"):
        read_mixture(model, usual.wave)


def test_half_precision_and_other_types_are_refused(usual):
    with pytest.raises(ModelError, match="half precision"):
        build(usual, half=True)
    with pytest.raises(ModelError, match="keys of the mixture is float64"):
        build(replace(usual, keys=usual.keys.astype(np.float64)))
    with pytest.raises(ModelError, match="expert-0 … expert-2"):
        build(usual, "expert-3")
    with pytest.raises(ModelError, match="kind"):
        build(usual, metadata={"kind": "mine"})


# -- elimination -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 6, 31])
@pytest.mark.parametrize("largest", [1.0, 1e8])
def test_unrolled_elimination_inverts(size, largest):
    """A = Q diag(λ) Qᵀ with λ from 1 to `largest` (known inverse and determinant), with rows in other units besides."""
    rng = np.random.default_rng(size)
    values = np.geomspace(1, largest, size)
    q = np.linalg.qr(rng.standard_normal((5, size, size)))[0]
    units = np.geomspace(1e-3, 1e3, size)[rng.permutation(size)]
    a = units[:, None] * (q * values) @ q.transpose(0, 2, 1) * units
    inverse = (q / values) @ q.transpose(0, 2, 1) / np.outer(units, units)
    graph = Graph()
    names = OnnxArithmetic(graph, {}, "test").inverse("a", size)
    made = helper.make_graph(
        graph.nodes,
        "inverse",
        [helper.make_tensor_value_info("a", TensorProto.DOUBLE, ["n", size, size])],
        [helper.make_tensor_value_info(name, TensorProto.DOUBLE, None) for name in names],
        list(graph.initializers.values()),
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    found, log_determinant = start_session(model, "cpu").run(list(names), {"a": a})
    scaled = found * np.outer(units, units)
    np.testing.assert_allclose(scaled, inverse * np.outer(units, units), rtol=0, atol=1e-14 * largest)
    np.testing.assert_allclose(
        log_determinant, np.log(values).sum() + 2 * np.log(units).sum(), rtol=0, atol=1e-13 * largest
    )
