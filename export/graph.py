"""ONNX models of moefast as files: nodes on their way there, what a file says of itself, and what is refused.

Design: what a model computes is not said here (`moefast.export.mixture_graph` and `posterior_graph` read it from its
description). A file is refused before anything runs it unless moefast could have written it as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from moefast.core.atomic import write_atomically
from moefast.core.errors import ModelError
from moefast.core.version import __version__
from moefast.mixture import Mixture

__all__ = [
    "IR_VERSION", "OPSET", "Graph", "Initializers", "assemble", "check", "is_half", "kind_of", "load",
    "number_of_part", "part_of", "said", "save",
]  # fmt: skip

OPSET = 17
"""The newest opset of ONNX 1.12 (2022): ONNX Runtime 1.12, TensorRT 8.5, OpenVINO 2022.3 and all later ones run it.

Nothing here needs a newer one; from 18 on reductions are written in another way, which older runtimes refuse."""
IR_VERSION = 8
"""The file format of ONNX 1.12. Writers put their own newest version unless told, which older runtimes refuse."""
TREES_DOMAIN = "ai.onnx.ml"
TREES_OPSET = 3
"""The version of ONNX 1.12 as well. Only models with trees import this domain."""
LARGEST_FILE = 2**31 - 1
"""Bytes; the bound of protobuf."""

# fmt: off
_OPERATORS = frozenset([
    "Abs", "Add", "And", "Cast", "Concat", "Conv", "Div", "Exp", "Floor", "Gather", "GatherElements", "Gemm", "Greater",
    "LayerNormalization",
    "LessOrEqual", "Log", "MatMul", "Max", "Min", "Mul", "Pad", "ReduceMax", "ReduceSum", "Relu",
    "Reshape", "Round", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "TopK", "Transpose", "Where",
])
# fmt: on
_FORMER_OPERATORS = frozenset(["ReduceMin", "Unsqueeze"])
"""Operators of files that were written when the graph still had a description of its own."""
_OPERATORS_OF = {"": _OPERATORS | _FORMER_OPERATORS, TREES_DOMAIN: frozenset(["TreeEnsembleRegressor"])}
_INPUTS = {
    "flux": "flux per pixel, in the unit of the training set (median near 1)",
    "error": "1 sigma per pixel in the unit of flux; pixels that are not finite or have error <= 0 get zero weight",
}


class Graph:
    """Nodes and initializers on their way to a model; an initializer is stored when a step first asks for it."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}

    def drop_unused(self, outputs: Sequence[str]) -> None:
        """Keep what leads to these values alone."""
        needed, kept = set(outputs), []
        for node in reversed(self.nodes):
            if needed & set(node.output):
                kept.append(node)
                needed |= set(node.input)
        self.nodes = kept[::-1]
        self.initializers = {name: value for name, value in self.initializers.items() if name in needed}

    def number(self, name: str, value: NDArray) -> str:
        """Name of an initializer with this value."""
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def scalar(self, name: str, value: float) -> str:
        """Name of a float32 scalar."""
        return self.number(f"constant.{name}", np.array(value, np.float32))

    def shape(self, name: str, values: Sequence[int]) -> str:
        """Name of an int64 vector: a shape, a list of sizes or of axes."""
        return self.number(f"constant.{name}", np.array(values, np.int64))

    def axis(self, index: int) -> str:
        """Name of the vector that holds one axis."""
        return self.shape(f"axis_{index}", [index])

    def add(self, operator: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """Add a node with one output, which bears the node's name."""
        return self.add_many(operator, inputs, name, [name], **attributes)[0]

    def add_many(
        self, operator: str, inputs: Sequence[str], name: str, outputs: Sequence[str], **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs."""
        self.nodes.append(helper.make_node(operator, inputs, outputs, name=name, **attributes))
        return list(outputs)


def number_of_part(n_experts: int, part: str) -> int:
    """Number of the expert that a part is.

    Raises
    ------
    ModelError
        There is no such part.
    """
    known = {f"expert-{k}": k for k in range(n_experts)}
    if part not in known:
        raise ModelError(
            f"part {part!r} is unknown; choose mixture, gate, or expert-0 … expert-{n_experts - 1}"
        )
    return known[part]


def assemble(
    made: Graph,
    wave: NDArray[np.float64],
    part: str,
    outputs: Mapping[str, tuple[int | None, str]],
    *,
    own: dict[str, str],
    metadata: dict[str, str],
    about: str,
    what: str,
) -> ModelProto:
    """A model of a graph that takes flux and error.

    Parameters
    ----------
    made : Graph
    wave : array of shape (p,), Å
    part : str
        What of a mixture it is.
    outputs : dict of str to tuple
        Columns of each output, None where it is a vector, and what it means.
    own : dict of str to str
        What moefast writes into the metadata besides the version, the part, and the wave grid.
    metadata : dict of str to str
        Added by the caller.
    about, what : str
        Description of the graph, and the model in a few words.

    Raises
    ------
    ModelError
        A name in `metadata` is one that moefast sets itself.
    """
    own = {
        "moefast_version": __version__,
        "part": part,
        "wave_first": repr(float(wave[0])),
        "wave_last": repr(float(wave[-1])),
        "wave_pixels": str(wave.size),
        "wave_unit": "Angstrom",
        "log_g_unit": "dex (cgs)",
        **own,
    }
    if taken := sorted(own.keys() & metadata.keys()):
        raise ModelError(f"metadata {', '.join(taken)} are set by moefast itself; choose other names")
    p = wave.size
    graph = helper.make_graph(
        made.nodes,
        f"moefast-{part}",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", p], text)
            for name, text in _INPUTS.items()
        ],
        [
            helper.make_tensor_value_info(
                name, TensorProto.FLOAT, ["n"] if columns is None else ["n", columns], text
            )
            for name, (columns, text) in outputs.items()
        ],
        list(made.initializers.values()),
        doc_string=about,
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(*opset) for opset in _opsets(made.nodes)],
        ir_version=IR_VERSION,
        producer_name="moefast",
        producer_version=__version__,
        doc_string=(
            f"Surface gravity of stars from spectra of {p} pixels, {wave[0]:.2f}-{wave[-1]:.2f} Angstrom: {what}."
        ),
    )
    helper.set_model_props(model, {**own, **metadata})
    return model


def _opsets(nodes: Iterable[NodeProto]) -> list[tuple[str, int]]:
    """Domains, with versions, that a graph of these nodes imports."""
    own = [("", OPSET)]
    return [*own, (TREES_DOMAIN, TREES_OPSET)] if any(node.domain == TREES_DOMAIN for node in nodes) else own


def part_of(model: ModelProto) -> str:
    """Which part of a mixture the model holds, as its metadata say; empty if they do not."""
    return said(model, "part")


def is_half(model: ModelProto) -> bool:
    """Whether matrices of the model are in half precision."""
    return said(model, "precision") == "half"


def kind_of(model: ModelProto) -> str:
    """Which kind of mixture the model holds; files before there were several kinds do not say."""
    return said(model, "kind") or Mixture.kind


def said(model: ModelProto, key: str) -> str:
    """An entry of the metadata; empty if there is none."""
    return next((entry.value for entry in model.metadata_props if entry.key == key), "")


class Initializers:
    """The initializers of a model, read with the shape and type that they must have."""

    def __init__(self, model: ModelProto) -> None:
        self.tensors = {tensor.name: tensor for tensor in model.graph.initializer}

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __call__(self, name: str, *shape: int | None, dtype: type = np.float32) -> NDArray:
        """One of them; None in the shape stands for any size.

        Raises
        ------
        ModelError
            It is missing, has another shape or type, or is not finite.
        """
        words = f"({', '.join('any' if size is None else str(size) for size in shape)})"
        if name not in self.tensors:
            raise ModelError(
                f"the ONNX model lacks the initializer {name!r}; write it again with this moefast"
            )
        tensor = self.tensors[name]
        # The sizes are compared before the numbers are read: a tampered shape is never allocated.
        dims = tuple(tensor.dims)
        fits = len(dims) == len(shape) and all(
            want in (None, size) for want, size in zip(shape, dims, strict=True)
        )
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        if not fits or tensor.data_type != kind:
            found = TensorProto.DataType.Name(tensor.data_type)
            raise ModelError(
                f"initializer {name!r} of the ONNX model is {found} {dims}, {TensorProto.DataType.Name(kind)} "
                f"{words} expected; write the model again with this moefast"
            )
        try:
            value = numpy_helper.to_array(tensor)
        except (ValueError, TypeError) as error:
            raise ModelError(f"initializer {name!r} of the ONNX model cannot be read: {error}") from error
        if not np.isfinite(value).all():
            raise ModelError(f"initializer {name!r} of the ONNX model is not finite; do not use this model")
        return value.copy()


def check(model: ModelProto, where: str) -> None:
    """Refuse a model that moefast did not write as it is, before anything runs it.

    Raises
    ------
    ModelError
        Another opset, IR version or operator domain; external data; functions, subgraphs or sparse tensors; operators
        that moefast does not use; a graph that breaks the rules of ONNX.
    """
    remedy = "write the model again with this moefast"
    opsets = [(entry.domain, entry.version) for entry in model.opset_import]
    if any(domain not in ("", "ai.onnx", TREES_DOMAIN) for domain, _ in opsets):
        raise ModelError(
            f"{where}: custom operator domains {opsets}; moefast runs standard operators only: {remedy}"
        )
    if opsets != (expected := _opsets(model.graph.node)):
        raise ModelError(f"{where}: opset {opsets} found, {expected} expected; {remedy}")
    if model.ir_version != IR_VERSION:
        raise ModelError(f"{where}: IR version {model.ir_version} found, {IR_VERSION} expected; {remedy}")
    graph = model.graph
    if model.functions or model.training_info or graph.sparse_initializer:
        raise ModelError(f"{where}: functions, training graphs and sparse tensors are not allowed; {remedy}")
    tensors = list(graph.initializer)
    for node in graph.node:
        if node.op_type not in _OPERATORS_OF.get(node.domain, ()):
            raise ModelError(
                f"{where}: operator {node.domain}:{node.op_type} ({node.name}) is not one of ours; {remedy}"
            )
        for attribute in node.attribute:
            if attribute.type in _UNSAFE_ATTRIBUTES:
                raise ModelError(f"{where}: node {node.name} holds a graph or a tensor; {remedy}")
    for tensor in tensors:
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            raise ModelError(
                f"{where}: the initializer {tensor.name!r} lies in an external file, which is refused; "
                "embed all weights in the one file (onnx.save_model without save_as_external_data)"
            )
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise ModelError(
            f"{where}: not a valid ONNX model ({str(error).splitlines()[0]}); {remedy}"
        ) from error


_UNSAFE_ATTRIBUTES = (
    onnx.AttributeProto.TENSOR,
    onnx.AttributeProto.TENSORS,
    onnx.AttributeProto.SPARSE_TENSOR,
    onnx.AttributeProto.SPARSE_TENSORS,
    onnx.AttributeProto.GRAPH,
    onnx.AttributeProto.GRAPHS,
)


def load(path: str | Path) -> ModelProto:
    """Read an ONNX file of moefast; see `check` for what is refused.

    Raises
    ------
    ModelError
        The file is missing, too large, truncated, corrupt, or refused by `check`.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise ModelError(
                f"{path}: {size} bytes; an ONNX file with embedded weights has {LARGEST_FILE} at most"
            )
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({error.strerror}); name an ONNX file of moefast"
        ) from error
    try:
        model = ModelProto.FromString(data)
    except DecodeError as error:
        raise ModelError(f"{path}: truncated, or not an ONNX file; copy it again") from error
    check(model, str(path))
    return model


def save(model: ModelProto, path: str | Path, *, overwrite: bool = True) -> None:
    """Write a model; the file is complete or absent.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    write_atomically(path, model.SerializeToString(deterministic=True), overwrite=overwrite)
