"""Trees as an operator of ai.onnx.ml: the same leaves in ONNX Runtime, read back to the last bit; nothing else."""

import numpy as np
import onnx
import pytest
from made_forest import features, forest
from one_expert import N_COMPONENTS, N_PIXELS, inputs, model_of, run, same_arrays
from onnx import helper

from moefast.core.errors import ModelError
from moefast.experts.trees import Trees
from moefast.export.graph import TREES_DOMAIN, check
from moefast.export.session import open_session
from moefast.kernels import forest_predict

STEM = "others.2"
WIDTH = {"flux": N_PIXELS, "stacking": 9 + N_COMPONENTS + 1}


def trees(sees="flux", n_leaves=(20, 1, 32, 2, 7, 20), seed=0):
    return Trees(forest(list(n_leaves), WIDTH[sees], seed), sees)


def node_of(model):
    return next(node for node in model.graph.node if node.domain)


def attribute(model, name):
    return next(a for a in node_of(model).attribute if a.name == name)


@pytest.mark.parametrize("sees", WIDTH)
def test_is_a_valid_model_that_the_check_lets_pass(sees):
    model = model_of(trees(sees))
    onnx.checker.check_model(model, full_check=True)
    check(model, "trees")
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17), ("ai.onnx.ml", 3)]
    assert all(tensor.name.startswith("constant.") for tensor in model.graph.initializer)


@pytest.mark.parametrize("sees", WIDTH)
@pytest.mark.parametrize("n", [0, 1, 131])
def test_onnx_runtime_gives_the_reference(sees, n):
    expert, seen = trees(sees), inputs(n)
    found, expected = run(open_session(model_of(expert)), seen), expert.predict_reference(seen)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_onnx_runtime_reaches_the_same_leaves_on_thresholds_and_without_a_number():
    """A tree at a time whose values are the numbers of its leaves."""
    for seed in range(20):
        leaves = 2 + seed % 31
        expert = Trees(forest([leaves], N_PIXELS, seed), "flux")
        expert.forest.value[:] = np.arange(leaves)
        expert.forest.base[:] = 0
        x = features(300, N_PIXELS, seed)
        found = run(open_session(model_of(expert)), inputs(300)._replace(x=x))
        np.testing.assert_array_equal(found, forest_predict(x, expert.forest))


def test_five_hundred_trees_stay_within_a_hundred_thousandth_of_a_dex():
    expert = trees(n_leaves=[20] * 500)
    # As large as trees of a boosted forest are after the first few.
    expert.forest.value[:] *= np.float32(0.02)
    seen = inputs(400)
    found, expected = run(open_session(model_of(expert)), seen), expert.predict_reference(seen)
    assert expected.std() > 0.2
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sees", WIDTH)
@pytest.mark.parametrize("n_leaves", [[1], [2], [20, 1, 32, 2]])
def test_read_back_is_exact(sees, n_leaves):
    expert = trees(sees, n_leaves)
    model = onnx.ModelProto.FromString(model_of(expert).SerializeToString())
    back = Trees.read_nodes(model, STEM)
    same_arrays(back.arrays(), expert.arrays())
    assert back.sees == sees


def spoil_child(model):
    attribute(model, "nodes_truenodeids").ints[0] = 0


def spoil_tree(model):
    attribute(model, "nodes_treeids").ints[0] = 10**12


def spoil_mode(model):
    attribute(model, "nodes_modes").strings[0] = b"BRANCH_GT"


def spoil_weight(model):
    attribute(model, "target_weights").floats[3] = np.inf


def spoil_target(model):
    attribute(model, "target_ids").ints[0] = 1


def spoil_size(model):
    del attribute(model, "nodes_values").floats[5:]


def spoil_transform(model):
    attribute(model, "post_transform").s = b"PROBIT"


def spoil_missing(model):
    many = len(attribute(model, "nodes_modes").strings)
    node_of(model).attribute.append(helper.make_attribute("nodes_missing_value_tracks_true", [1] * many))


def spoil_base(model):
    node_of(model).attribute.remove(attribute(model, "base_values"))


def spoil_type(model):
    attribute(model, "nodes_featureids").CopyFrom(helper.make_attribute("nodes_featureids", "all"))


def spoil_feature(model):
    attribute(model, "nodes_featureids").ints[0] = -1


def spoil_order(model):
    numbers = attribute(model, "target_nodeids").ints
    numbers[0], numbers[1] = numbers[1], numbers[0]


SPOIL = [
    spoil_child, spoil_tree, spoil_mode, spoil_weight, spoil_target, spoil_size, spoil_transform, spoil_missing,
    spoil_base, spoil_type, spoil_feature, spoil_order,
]  # fmt: skip


@pytest.mark.parametrize("spoil", SPOIL, ids=lambda spoil: spoil.__name__)
def test_trees_that_moefast_never_writes_are_refused(spoil):
    model = model_of(trees())
    spoil(model)
    with pytest.raises(ModelError, match=r"others\.2/trees.*(cannot be read|not as moefast writes)"):
        Trees.read_nodes(model, STEM)


def test_missing_trees_are_named():
    model = model_of(trees())
    with pytest.raises(ModelError, match=r"lacks the trees 'others\.3/trees'"):
        Trees.read_nodes(model, "others.3")


def test_other_operators_versions_and_idle_imports_of_the_domain_are_refused():
    model = model_of(trees())
    node_of(model).op_type = "TreeEnsembleClassifier"
    with pytest.raises(ModelError, match=r"ai\.onnx\.ml:TreeEnsembleClassifier .* not one of ours"):
        check(model, "trees")
    model = model_of(trees())
    node_of(model).domain = ""
    with pytest.raises(ModelError, match="opset"):
        check(model, "trees")
    del model.opset_import[1]
    with pytest.raises(ModelError, match="not one of ours"):
        check(model, "trees")
    for version in (1, 2, 4):
        model = model_of(trees())
        model.opset_import[1].version = version
        with pytest.raises(ModelError, match="opset"):
            check(model, "trees")
    model = model_of(trees())
    del model.opset_import[1]
    with pytest.raises(ModelError, match="opset"):
        check(model, "trees")
    model.opset_import.append(helper.make_opsetid(TREES_DOMAIN, 3))
    check(model, "trees")
