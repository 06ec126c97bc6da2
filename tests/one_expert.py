"""One expert that is not linear as an ONNX model of its own, and stars for it to see."""

import numpy as np
from onnx import TensorProto, helper

from moefast.experts.cnn import ConvNet, n_places
from moefast.experts.protocol import Inputs
from moefast.export.graph import IR_VERSION, Graph, _opsets
from moefast.ops.on_onnx import OnnxArithmetic

N_COMPONENTS, N_PIXELS = 6, 64


def inputs(n, seed=0, p=N_PIXELS):
    draw = np.random.default_rng(seed)

    def normal(*shape):
        return draw.standard_normal(shape).astype(np.float32)

    flux = 1 + np.float32(0.3) * normal(n, p)
    return Inputs(normal(n, N_COMPONENTS), normal(n), normal(n, 9), flux)


def network(p=320, seed=0, kernels=(16, 8, 8), channels=(5, 7, 3), hidden=4):
    """A network with random weights."""
    draw = np.random.default_rng(seed)

    def normal(*shape):
        return (draw.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    arrays, before = {"reference": 1 + normal(p, 1)[:, 0] / 9, "scale": 2 + np.abs(normal(p, 1)[:, 0])}, 1
    for layer, (count, kernel) in enumerate(zip(channels, kernels, strict=True), 1):
        arrays |= {f"w{layer}": 2 * normal(count, before, kernel), f"b{layer}": normal(count)}
        before = count
    size = before * n_places(p, kernels) + 1
    arrays |= {"v1": normal(size, hidden), "c1": normal(hidden), "v2": normal(hidden, 1), "c2": normal(1) + 3}
    return ConvNet(**{name: value.astype(np.float32) for name, value in arrays.items()})


def feeds(seen):
    return {"z": seen.z, "log_level": seen.log_level[:, None], "lines": seen.lines, "x": seen.x}


def model_of(expert, stem="others.2", p=N_PIXELS):
    """Inputs as in `feeds`, output `log_g` (n, 1)."""
    graph = Graph()
    names = {"z": N_COMPONENTS, "log_level": 1, "lines": 9, "x": p}
    op = OnnxArithmetic(graph, expert.arrays(), stem)
    value = expert.describe(op, {name: name for name in names}).log_g
    used = {name for node in graph.nodes for name in node.input}
    nodes = [
        *graph.nodes,
        helper.make_node("Reshape", [value, graph.shape("column", [-1, 1])], ["log_g"], "end"),
    ]

    def info(name, width):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width])

    made = helper.make_graph(
        nodes,
        "one-expert",
        [info(name, width) for name, width in names.items() if name in used],
        [info("log_g", 1)],
        list(graph.initializers.values()),
    )
    opsets = [helper.make_opsetid(*opset) for opset in _opsets(nodes)]
    return helper.make_model(made, opset_imports=opsets, ir_version=IR_VERSION)


def run(session, seen):
    wanted = {value.name for value in session.get_inputs()}
    (found,) = session.run(["log_g"], {name: value for name, value in feeds(seen).items() if name in wanted})
    assert found.shape == (len(seen.z), 1)
    return found[:, 0]


def same_arrays(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype, name
        assert value.dtype in (np.float32, np.int64), name
        assert value.shape == b[name].shape, name
        assert value.tobytes() == b[name].tobytes(), name
