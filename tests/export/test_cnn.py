"""A convolutional network in ONNX: the reference's numbers in ONNX Runtime, read back to the last bit."""

import numpy as np
import onnx
import pytest
from one_expert import inputs, model_of, network, run, same_arrays
from onnx import numpy_helper
from tolerances import assert_close

from moefast.core.errors import ModelError
from moefast.experts.cnn import ConvNet
from moefast.export.graph import check
from moefast.export.session import open_session

STEM, P = "others.2", 320


@pytest.mark.parametrize("n", [0, 1, 131])
@pytest.mark.parametrize("p", [296, P, 333])
def test_onnx_runtime_gives_the_reference(n, p):
    net, seen = network(p), inputs(n, p=p)
    model = model_of(net, p=p)
    onnx.checker.check_model(model, full_check=True)
    check(model, "network")
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    assert_close(run(open_session(model), seen), net.predict_reference(seen), made_in=np.float32)


def test_read_back_is_exact():
    net = network()
    model = onnx.ModelProto.FromString(model_of(net, p=P).SerializeToString())
    back = ConvNet.read_nodes(model, STEM)
    same_arrays(back.arrays(), net.arrays())
    assert back.w1.flags.writeable


def test_what_does_not_fit_is_refused():
    model = model_of(network(), p=P)
    with pytest.raises(ModelError, match=r"lacks the initializer 'others\.3\.reference'"):
        ConvNet.read_nodes(model, "others.3")
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == f"{STEM}.w2")
    for value in (
        np.zeros((7, 4, 8), np.float32),
        np.zeros((7, 5, 8)),
        np.full((7, 5, 8), np.nan, np.float32),
    ):
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
        with pytest.raises(
            ModelError, match=r"'others\.2' of the ONNX model cannot be read: .*; write it again"
        ):
            ConvNet.read_nodes(model, STEM)
