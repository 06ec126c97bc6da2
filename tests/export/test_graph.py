import os
from dataclasses import fields, replace

import numpy as np
import onnx
import pytest
from made_network import with_heads
from made_posterior import random_posterior
from one_expert import model_of, network
from onnx import TensorProto, helper, numpy_helper
from plans import random_mixture, random_templates, random_tower

import moefast
from moefast.core.errors import ModelError, OutputError
from moefast.export import build, load, read_mixture, save
from moefast.export.graph import _OPERATORS, IR_VERSION, OPSET, check, part_of
from moefast.export.mixture_graph import PLACES
from moefast.trunks.heads import Heads

CLOUDS = ("keys", "tangents", "variances", "gains", "rest", "log_weights", "log_g", "scatter")
PARTS = ("mixture", "gate", "expert-0", "expert-4")


@pytest.fixture
def model(mixture):
    return build(mixture)


def metadata_of(model):
    return {entry.key: entry.value for entry in model.metadata_props}


def initializer(model, name):
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_a_valid_model_of_the_stated_versions(mixture, part):
    model = build(mixture, part)
    onnx.checker.check_model(model, full_check=True)
    trees = [("ai.onnx.ml", 3)] if any(node.domain for node in model.graph.node) else []
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17), *trees]
    assert OPSET == 17
    assert model.ir_version == IR_VERSION == 8
    assert [value.name for value in model.graph.input] == ["flux", "error"]
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT
        assert (dims[0].dim_param, dims[1].dim_value) == ("n", 512)
    assert part_of(model) == part


@pytest.mark.parametrize("part", PARTS)
def test_nothing_in_the_graph_is_unused_unnamed_or_stored_twice(mixture, part):
    model = build(mixture, part)
    used = {name for node in model.graph.node for name in node.input} | {v.name for v in model.graph.output}
    made = [name for node in model.graph.node for name in node.output]
    names = [tensor.name for tensor in model.graph.initializer]
    assert set(names) <= used
    # TopK gives the order whether it is wanted or not.
    assert {name for name in made if not name.endswith("_order")} <= used
    assert len(set(names)) == len(names)
    assert all(node.name for node in model.graph.node)
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)


def test_the_list_of_allowed_operators_is_the_list_of_those_in_use():
    plain = random_mixture()
    tower = random_tower(10, 5, "quality")
    mixtures = plain, plain.with_expert(random_templates()), replace(plain, tower=tower)
    models = [build(mixture, part) for mixture in mixtures for part in PARTS]
    models += [model_of(network(), p=320), build(with_heads(plain, "pca-mlp")), build(random_posterior())]
    assert {node.op_type for model in models for node in model.graph.node} == _OPERATORS


def test_outputs_of_each_part(mixture):
    assert [value.name for value in build(mixture).graph.output] == [
        *("log_g", "log_g_err", "weights", "expert_log_g", "log_g_err_raw", "chi2", "log_level")
    ]
    assert [value.name for value in build(mixture, "gate").graph.output] == ["weights"]
    assert [value.name for value in build(mixture, "expert-1").graph.output] == ["log_g"]


def test_the_file_holds_the_expert_weights_once(mixture):
    size = build(mixture).ByteSize()
    pixels = mixture.columns.nbytes + mixture.line_columns.nbytes + 2 * mixture.reference.nbytes
    experts = [place.expert for place in mixture.experts]
    library, heads = mixture.clouds[0], mixture.place(Heads)
    clouds = 0 if library is None else sum(getattr(library, name).nbytes for name in CLOUDS)
    # Nodes of the library are a page or two, and it has tens of them for every expert; a node of a tree takes 50 bytes.
    nodes = (
        30_000
        + (30_000 if clouds else 0)
        + 50 * sum(39 * e.forest.n_trees for e in experts if e.family == "trees")
    )
    numbers = 0
    if heads is not None:
        numbers = sum(array.nbytes for array in heads.numbers.values()) + 20_000
    assert size < pixels + mixture.expert_weights.nbytes + clouds + nodes + numbers


def test_metadata_say_where_the_model_comes_from(mixture):
    found = metadata_of(build(mixture, metadata={"recipe": "phys-moe"}))
    assert found["recipe"] == "phys-moe"
    assert found["moefast_version"] == moefast.__version__
    assert float(found["wave_first"]) == mixture.wave[0]
    assert float(found["wave_last"]) == mixture.wave[-1]
    assert found["wave_pixels"] == "512"
    assert found["wave_unit"] == "Angstrom"
    with pytest.raises(ModelError, match="wave_unit"):
        build(mixture, metadata={"wave_unit": "nm"})


@pytest.mark.parametrize("part", ["expert-5", "expert", "expert--1", "expert-1x", "trunk", ""])
def test_unknown_parts_are_refused(mixture, part):
    with pytest.raises(ModelError, match="expert-0 … expert-4"):
        build(mixture, part)


def test_other_types_are_refused_rather_than_rounded(mixture):
    wide = {field.name: getattr(mixture, field.name) for field in fields(mixture)}
    wide["columns"] = wide["columns"].astype(np.float64)
    with pytest.raises(ModelError, match="basis of the mixture is float64"):
        build(type(mixture)(**wide))


@pytest.mark.parametrize("clipped", [False, True])
def test_round_trip_is_exact(mixture, tmp_path, clipped):
    mixture = replace(mixture, clipped=clipped)
    model = build(mixture)
    save(model, tmp_path / "model.onnx")
    back = read_mixture(load(tmp_path / "model.onnx"), mixture.wave)
    for field in fields(mixture):
        a, b = getattr(mixture, field.name), getattr(back, field.name)
        if field.name in {"label_range", "clipped", "n_basis", "n_gate"}:
            assert a == b
        elif field.name == "experts":
            assert [(place.bins, place.added) for place in a] == [(place.bins, place.added) for place in b]
            for mine, theirs in ((x.expert, y.expert) for x, y in zip(a, b, strict=True)):
                assert (type(mine), mine.needs_flux) == (type(theirs), theirs.needs_flux)
                assert mine.arrays().keys() == theirs.arrays().keys()
                assert all(same_bits(mine.arrays()[key], value) for key, value in theirs.arrays().items())
                assert getattr(mine, "plan", None) == getattr(theirs, "plan", None)
        elif field.name == "tower":
            assert (a is None) == (b is None)
            if a is not None:
                assert (a.sees, a.limit) == (b.sees, b.limit)
                assert all(same_bits(x, y) for x, y in zip(a.layers, b.layers, strict=True))
        elif isinstance(a, tuple):
            assert all(same_bits(x, y) for x, y in zip(a, b, strict=True)), field.name
        else:
            assert same_bits(a, b), field.name
    again = build(back)
    assert again.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


def test_files_that_tell_by_names_where_experts_stand_are_read(mixture):
    """As they were written before the metadata told it."""
    model = build(mixture)
    entry = next(entry for entry in model.metadata_props if entry.key == PLACES)
    model.metadata_props.remove(entry)
    for place in mixture.experts:
        if place.expert.family == "template":
            name, marks = "experts.from_library", [k in place.bins for k in range(mixture.n_experts)]
        else:
            name, marks = f"{place.stem}.{place.expert.family.removesuffix(' residual')}", [True]
        model.graph.initializer.append(numpy_helper.from_array(np.array(marks), name))
    back = read_mixture(model, mixture.wave)
    by_stem = {place.stem: (place.expert.family, place.bins, place.added) for place in mixture.experts}
    assert {p.stem: (p.expert.family, p.bins, p.added) for p in back.experts} == by_stem
    flux = np.ones((3, mixture.n_pixels), np.float32)
    found, expected = (m.predict(flux, np.full_like(flux, 0.1)) for m in (back, mixture))
    np.testing.assert_array_equal(found.log_g, expected.log_g)


@pytest.mark.parametrize(
    "text",
    ["[", "[1]", '[{"family": "trees"}]', '[{"family": "trees", "stem": "s", "bins": "x", "added": 0}]'],
)
def test_metadata_that_do_not_tell_where_experts_stand_are_refused(mixture, text):
    model = build(mixture)
    next(entry for entry in model.metadata_props if entry.key == PLACES).value = text
    with pytest.raises(ModelError, match="do not tell where experts stand"):
        read_mixture(model, mixture.wave)


def test_flux_is_clipped_at_zero_and_nowhere_else(mixture):
    model = build(replace(mixture, clipped=True))
    assert numpy_helper.to_array(initializer(model, "least_flux")) == 0
    initializer(model, "least_flux").CopyFrom(
        numpy_helper.from_array(np.full(1, 0.5, np.float32), "least_flux")
    )
    with pytest.raises(ModelError, match="'least_flux' of the ONNX model must be 0"):
        read_mixture(model, mixture.wave)


def test_arrays_read_from_a_file_are_free_of_it(mixture, model):
    back = read_mixture(model, mixture.wave)
    assert back.expert_weights.flags.writeable


@pytest.mark.parametrize("part", ["gate", "expert-0"])
def test_a_part_is_not_read_as_a_mixture(mixture, part):
    with pytest.raises(ModelError, match=f"holds {part}"):
        read_mixture(build(mixture, part), mixture.wave)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reference", np.zeros(511, np.float32)),
        ("noise_shape", np.zeros((512, 1), np.float32)),
        ("knots", np.zeros(5, np.float32)),
        ("experts.weights", np.zeros((512, 19), np.float32)),
        ("experts.weights", np.zeros((512, 20), np.float64)),
        ("experts.intercepts", np.zeros((20, 1), np.float32)),
        ("basis", np.zeros((12, 512), np.float32)),
        ("gate.w1", np.zeros((13, 16), np.float32)),
        ("gate.b1", np.zeros(15, np.float32)),
        ("gate.w2", np.zeros((16, 4), np.float32)),
        ("error_model.w2", np.zeros((8, 2), np.float32)),
        ("label_range", np.zeros(3, np.float64)),
        ("lines.columns", np.zeros((512, 11), np.float32)),
    ],
)
def test_a_tampered_shape_or_type_is_refused(mixture, model, name, value):
    initializer(model, name).CopyFrom(numpy_helper.from_array(value, name))
    with pytest.raises(ModelError, match=r"expected|fit together"):
        read_mixture(model, mixture.wave)


def test_dimensions_that_do_not_match_the_bytes_are_refused(mixture, model):
    initializer(model, "basis").dims[1] += 1
    with pytest.raises(ModelError, match="not a valid ONNX model"):
        read_mixture(model, mixture.wave)


def test_a_missing_initializer_is_named(mixture, model):
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == "gate.b2":
                node.input[i] = "another"
    initializer(model, "gate.b2").name = "another"
    with pytest.raises(ModelError, match=r"lacks the initializer 'gate\.b2'"):
        read_mixture(model, mixture.wave)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("experts.weights", np.nan, "not finite"), ("noise_shape", -1.0, "must be positive")],
)
def test_numbers_that_mean_nothing_are_refused(mixture, model, name, value, message):
    array = numpy_helper.to_array(initializer(model, name)).copy()
    array.flat[7] = value
    initializer(model, name).CopyFrom(numpy_helper.from_array(array, name))
    with pytest.raises(ModelError, match=message):
        read_mixture(model, mixture.wave)


def test_another_wave_grid_is_refused(mixture, model):
    # The second grid holds none of the lines, which a model of it would do without.
    for shift in (0.4, -3000.0):
        with pytest.raises(ModelError, match="do not lie on this wave grid"):
            read_mixture(model, mixture.wave + shift)
    with pytest.raises(ModelError, match="expected"):
        read_mixture(model, mixture.wave[:-1])


def spoil_opset(model):
    model.opset_import[0].version = OPSET + 1


def spoil_opset_missing(model):
    del model.opset_import[:]


def spoil_ir(model):
    model.ir_version = IR_VERSION + 1


def spoil_domain(model):
    model.opset_import.append(helper.make_opsetid("com.example", 1))


def spoil_operator(model):
    model.graph.node[0].op_type = "Loop"


def spoil_operator_domain(model):
    model.graph.node[0].domain = "com.example"


def spoil_attribute(model):
    model.graph.node[0].attribute.append(helper.make_attribute("body", helper.make_graph([], "body", [], [])))


def spoil_location(model):
    initializer(model, "basis").data_location = TensorProto.EXTERNAL


def spoil_external_entry(model):
    entry = initializer(model, "basis").external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"


def spoil_function(model):
    model.functions.add().name = "f"


def spoil_sparse(model):
    model.graph.sparse_initializer.add()


def spoil_order(model):
    del model.graph.node[3]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_opset, "opset"),
        (spoil_opset_missing, "opset"),
        (spoil_ir, "IR version"),
        (spoil_domain, "custom operator domains"),
        (spoil_operator, "not one of ours"),
        (spoil_operator_domain, "not one of ours"),
        (spoil_attribute, "holds a graph"),
        (spoil_location, "external file"),
        (spoil_external_entry, "external file"),
        (spoil_function, "not allowed"),
        (spoil_sparse, "not allowed"),
        (spoil_order, "not a valid ONNX model"),
    ],
)
def test_what_moefast_never_writes_is_refused_on_load(model, tmp_path, spoil, message):
    path = tmp_path / "spoilt.onnx"
    spoil(model)
    path.write_bytes(model.SerializePartialToString())
    with pytest.raises(ModelError, match=message) as caught:
        load(path)
    assert "spoilt.onnx" in str(caught.value)


def test_a_file_written_with_external_data_is_refused(model, tmp_path):
    onnx.save_model(model, tmp_path / "model.onnx", save_as_external_data=True, location="weights.bin")
    assert (tmp_path / "weights.bin").exists()
    with pytest.raises(ModelError, match="embed all weights"):
        load(tmp_path / "model.onnx")


def test_truncated_files_are_refused_wherever_they_end(mixture, model, tmp_path):
    data = model.SerializeToString(deterministic=True)
    path = tmp_path / "model.onnx"
    # The last kilobyte holds the metadata, whose loss at a boundary of two entries leaves a valid file.
    for end in [0, 1, 2, 100, len(data) // 2, *range(len(data) - 2000, len(data) - 1000, 37)]:
        path.write_bytes(data[:end])
        with pytest.raises(ModelError, match=r"model\.onnx"):
            load(path)


def test_files_that_are_no_onnx_are_refused(tmp_path):
    path = tmp_path / "model.onnx"
    for data in (b"\x89HDF\r\n\x1a\n", b"PK\x03\x04" * 100, os.urandom(0), b"\xff" * 64):
        path.write_bytes(data)
        with pytest.raises(ModelError, match=r"model\.onnx"):
            load(path)
    with pytest.raises(ModelError, match="cannot be read"):
        load(tmp_path / "absent.onnx")
    with pytest.raises(ModelError, match="cannot be read"):
        load(tmp_path)


def test_a_file_beyond_the_bound_of_protobuf_is_refused_unread(tmp_path):
    path = tmp_path / "model.onnx"
    with path.open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(ModelError, match="2147483648 bytes"):
        load(path)


def test_save_replaces_whole_files_and_leaves_nothing_else(model, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    save(model, path)
    check(load(path), "reloaded")
    assert [item.name for item in tmp_path.iterdir()] == ["model.onnx"]


def test_a_failed_save_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        save(model, path)
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["model.onnx"]


def test_saving_into_no_folder_is_an_output_error(model, tmp_path):
    with pytest.raises(OutputError, match="absent does not exist; create it first"):
        save(model, tmp_path / "absent" / "model.onnx")


def test_sizes_at_the_small_end(make_mixture):
    mixture = make_mixture(n_experts=1, n_levels=2, n_components=4, hidden=1)
    check(build(mixture), "small")
    assert read_mixture(build(mixture), mixture.wave).n_experts == 1
