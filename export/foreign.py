"""ONNX files that moefast did not write: what is refused before anything runs them.

Design: moefast's own models are held to its own operators (`moefast.export.graph.check`). A foreign model may use every
standard operator, but nothing that reaches outside the one file: no external data, no operators of other domains.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from moefast.core.errors import ModelError
from moefast.core.regular import refuse_special
from moefast.export.graph import LARGEST_FILE

__all__ = ["DOMAINS", "load_foreign"]

DOMAINS = ("", "ai.onnx", "ai.onnx.ml")
"""Operator domains of the ONNX standard; trees are in the last."""


def load_foreign(path: str | Path) -> ModelProto:
    """Read an ONNX file of any origin.

    Raises
    ------
    ModelError
        The file is missing, too large, truncated or invalid, keeps tensors elsewhere, or needs operators that are not
        part of the ONNX standard.
    """
    path = Path(path)
    refuse_special(path)
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise ModelError(
                f"{path}: {size} bytes; an ONNX file with embedded weights has {LARGEST_FILE} at most"
            )
        model = ModelProto.FromString(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); name an ONNX file") from error
    except DecodeError as error:
        raise ModelError(f"{path}: truncated, or not an ONNX file; copy it again") from error
    nodes = list(_nodes(model.graph.node))
    for function in model.functions:
        nodes += _nodes(function.node)
    defined = {(function.domain, function.name) for function in model.functions}
    for node in nodes:
        if node.domain not in DOMAINS and (node.domain, node.op_type) not in defined:
            raise ModelError(
                f"{path}: operator {node.domain}:{node.op_type} ({node.name}) is not part of the ONNX standard; "
                "export the model with standard operators only"
            )
    for tensor in _tensors(model, nodes):
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            raise ModelError(
                f"{path}: the tensor {tensor.name!r} lies in an external file, which is refused; "
                "embed all weights in the one file (onnx.save_model without save_as_external_data)"
            )
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise ModelError(f"{path}: not a valid ONNX model ({str(error).splitlines()[0]})") from error
    return model


def _graphs(attribute: AttributeProto) -> Iterator[GraphProto]:
    if attribute.type == AttributeProto.GRAPH:
        yield attribute.g
    yield from attribute.graphs


def _nodes(nodes: Iterator[NodeProto]) -> Iterator[NodeProto]:
    """Nodes, and those of the graphs inside them (branches of If, bodies of Loop)."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in _graphs(attribute):
                yield from _nodes(graph.node)


def _tensors(model: ModelProto, nodes: list[NodeProto]) -> Iterator[TensorProto]:
    graphs = [model.graph]
    graphs += [g for node in nodes for attribute in node.attribute for g in _graphs(attribute)]
    for graph in graphs:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            yield from attribute.tensors
            sparse_tensors = list(attribute.sparse_tensors)
            if attribute.type == AttributeProto.SPARSE_TENSOR:
                sparse_tensors.append(attribute.sparse_tensor)
            for sparse in sparse_tensors:
                yield from (sparse.values, sparse.indices)
