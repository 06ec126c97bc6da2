"""The fitted mixture as an ONNX graph, and back.

Design: the graph is written by reading `moefast.forward` with an arithmetic whose values are names of nodes; nothing of
the forward pass is said here. Every number of the mixture is one named initializer, stored once and exactly: what
follows from others (squared expert weights in cells, the share of the noise that the basis leaves over) is computed in
the graph, where runtimes fold it into constants. So the file is at once the program that others run and the place from
which moefast reads its model. Which expert stands where is told by the metadata.
Bad pixels are found in the graph: whoever runs it feeds flux and error as they are.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from moefast.core.atomic import write_atomically
from moefast.core.errors import ModelError
from moefast.core.outputs import ONNX, by_onnx, words
from moefast.core.version import __version__
from moefast.experts.protocol import Place, family
from moefast.experts.template import Templates
from moefast.forward import expert_values, forward
from moefast.gating.features import LINE_FEATURES, LINES
from moefast.gating.tower import Sees, Tower
from moefast.mixture import Mixture, n_gate_features
from moefast.ops.arithmetic import OnnxArithmetic
from moefast.trunks.heads import STEM, Heads
from moefast.trunks.networks import KINDS

__all__ = [
    "IR_VERSION", "OPSET", "Graph", "Initializers", "assemble", "build_experts", "check", "is_half", "kind_of", "load",
    "number_of_part", "part_of", "read_experts", "said", "save",
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
    "Abs", "Add", "And", "Cast", "Concat", "Conv", "Div", "Exp", "Floor", "GatherElements", "Gemm", "Greater",
    "LayerNormalization",
    "LessOrEqual", "Log", "MatMul", "Max", "Min", "Mul", "Pad", "ReduceMax", "ReduceSum", "Relu",
    "Reshape", "Round", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "TopK", "Transpose", "Where",
])
# fmt: on
_FORMER_OPERATORS = frozenset(["ReduceMin", "Unsqueeze"])
"""Operators of files that were written when the graph still had a description of its own."""
_OPERATORS_OF = {"": _OPERATORS | _FORMER_OPERATORS, TREES_DOMAIN: frozenset(["TreeEnsembleRegressor"])}
PLACES = "experts"
"""Entry of the metadata that tells which expert stands where, as JSON."""
_LAYERS = ("w1", "b1", "w2", "b2")
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


class _Steps(OnnxArithmetic):
    """The forward pass as nodes; what is not stored is derived from stored numbers when it is first asked for."""

    def __init__(self, graph: Graph, mixture: Mixture, half: bool) -> None:
        super().__init__(graph, {}, Mixture.kind, half)
        self.graph, self.mixture = graph, mixture
        weights, names = mixture.numbers["experts.weights"], ("projection", "cell_matrix", "captured")
        self._arrays = {name: value for name, value in mixture.numbers.items() if name not in names}
        self._arrays |= {
            "basis": mixture.basis,
            "directions": mixture.columns[:, mixture.n_basis :],
            "lines.columns": mixture.line_columns,
            "experts.weights": weights,
        }
        for name, array in self._arrays.items():
            if array.dtype != np.float32 and name != "label_range":
                raise ModelError(
                    f"{name} of the mixture is {array.dtype}, float32 expected; cast it before the export"
                )
        self._derived: Mapping[str, Callable[[], str]] = {
            "columns": cache(self._columns),
            "projection": cache(
                lambda: self.joined([self.number("columns"), self.number("lines.columns")], 1)
            ),
            "cell_matrix": cache(self._cell_matrix),
            "captured": cache(self._captured),
            "label_range": cache(lambda: self.single(self._stored_number("label_range"))),
        }

    def _stored_number(self, name: str) -> str:
        return self.graph.number(name, self._arrays[name])

    def number(self, name: str) -> str:
        """See `Mixture.numbers`."""
        return self._derived[name]() if name in self._derived else self._stored_number(name)

    def _columns(self) -> str:
        basis = self.number("basis")
        if self._arrays["directions"].shape[1] == 0:
            return basis
        return self.joined([basis, self.number("directions")], 1)

    def _captured(self) -> str:
        return self.total(self.multiply(self.number("basis"), self.number("basis")), 1)

    def _cell_matrix(self) -> str:
        """Σ w² D of each noise level and expert over the pixels of a cell, (p / cell, M · K)."""
        s = self.mixture.sizes
        p, k, m = s.n_pixels, s.n_experts, s.n_levels
        weights = self.product(self.number("columns"), self.number("experts.weights"))
        shape = self.reshaped(self.number("noise_shape"), (p, 1))
        white = self.multiply(self.multiply(weights, weights), shape)
        cells = self.total(self.reshaped(white, (p // s.cell, s.cell, k * m)), 1)
        by_level = self.ordered(self.reshaped(cells, (p // s.cell, k, m)), (0, 2, 1))
        return self.reshaped(by_level, (p // s.cell, m * k))

    def deliver(self, value: str, n_good: str, output: str, *, columns: bool) -> None:
        """Name an output: the value, and NaN in rows without a good pixel."""
        g = self.graph
        has_data, nothing = self.above(n_good, self.constant(0.0)), g.scalar("nan", float("nan"))
        if columns:
            g.add_many("Where", [has_data, value, nothing], f"deliver/{output}", [output])
            return
        column = g.add("Where", [has_data, value, nothing], f"deliver/{output}_column")
        g.add_many("Squeeze", [column, g.axis(1)], f"deliver/{output}", [output])


def build_experts(mixture: Mixture, part: str, metadata: dict[str, str], *, half: bool) -> ModelProto:
    """Write a mixture of experts, its gate or one of its experts as an ONNX model; see `moefast.export.build`."""
    if half and mixture.place(Heads) is None:
        raise ModelError(
            "half precision is for networks, and this mixture has none; export it in single precision"
        )
    if mixture.error_model[2].shape[1] != 1:
        raise ModelError(f"the error model must give one number, it gives {mixture.error_model[2].shape[1]}")
    k = 0
    if part not in ("mixture", "gate"):
        mixture, k = _only_expert(mixture, part)
    steps = _Steps(Graph(), mixture, half)
    if part not in ("mixture", "gate"):
        values, n_good = expert_values(steps, mixture, "flux", "error")
        outputs = {"log_g": steps.part(values, 1, k, k + 1)}
    else:
        found = forward(steps, mixture, "flux", "error")
        n_good, outputs = found.n_good, {name: getattr(found, name) for name in ONNX}
        if part == "gate":
            outputs = {"weights": found.weights}
    for name, value in outputs.items():
        steps.deliver(value, n_good, name, columns=by_onnx(name).per == "expert")
    steps.graph.drop_unused(list(outputs))
    return _model(steps, part, list(outputs), metadata)


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


def _only_expert(mixture: Mixture, part: str) -> tuple[Mixture, int]:
    """The mixture without what an expert does not need, and the number that it has there."""
    k = number_of_part(mixture.n_experts, part)
    mine = [place for place in mixture.experts if k in place.bins]
    alone = [(place, place.expert.of_bin(k)) for place in mine]
    if any(expert is None for _, expert in alone):
        # Of what has no parts, all are left but what is added to others.
        return replace(mixture, experts=tuple(p for p in mixture.experts if not p.added or k in p.bins)), k
    w1, b1, w2, b2 = mixture.gate
    only = replace(
        mixture,
        expert_weights=mixture.expert_weights[k : k + 1],
        expert_intercepts=mixture.expert_intercepts[k : k + 1],
        gate=(w1, b1, w2[:, k : k + 1], b2[k : k + 1]),
        experts=tuple(Place(expert, (0,), place.added) for place, expert in alone if expert is not None),
        tower=None,
    )
    return only, 0


def _model(steps: _Steps, part: str, outputs: Sequence[str], metadata: dict[str, str]) -> ModelProto:
    mixture = steps.mixture
    k = mixture.n_experts
    places = [
        {"family": p.expert.family, "stem": p.stem, "bins": list(p.bins), "added": p.added}
        for p in mixture.experts
    ]
    return assemble(
        steps.graph,
        mixture.wave,
        part,
        {name: (k if by_onnx(name).per == "expert" else None, words(by_onnx(name))) for name in outputs},
        own={
            "precision": "half" if steps.half else "single",
            "flux_unit": "that of the training set: median near 1",
            PLACES: json.dumps(places),
        },
        metadata=metadata,
        about=f"Gate features: {', '.join(LINE_FEATURES)}, {mixture.n_gate} components, ln noise level.",
        what="a mixture of " + str(k) + " linear experts" if part == "mixture" else part,
    )


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


def read_experts(model: ModelProto, wave: NDArray[np.float64]) -> Mixture:
    """Read a mixture of experts from its ONNX model; see `moefast.export.read_mixture`."""
    read = Initializers(model)
    tensors = read.tensors

    def layers(
        name: str, n_features: int | None, n_outputs: int
    ) -> tuple[NDArray, NDArray, NDArray, NDArray]:
        w1 = read(f"{name}.w1", n_features, None)
        hidden = w1.shape[1]
        return (
            w1,
            read(f"{name}.b1", hidden),
            read(f"{name}.w2", hidden, n_outputs),
            read(f"{name}.b2", n_outputs),
        )

    def tower(sees: Sees) -> Tower:
        limited = f"tower.{sees}.limit" in tensors
        limit = float(read(f"tower.{sees}.limit", 1)[0]) if limited else math.inf
        return Tower(sees, layers(f"tower.{sees}", None, k), limit)

    wave = np.ascontiguousarray(wave, np.float64)
    p = wave.size
    intercepts = read("experts.intercepts", None, None)
    k, m = intercepts.shape
    noise_shape = read("noise_shape", p)
    if not (noise_shape > 0).all():
        raise ModelError(
            "initializer 'noise_shape' of the ONNX model must be positive; do not use this model"
        )
    limits = read("label_range", 2, dtype=np.float64)
    basis = read("basis", p, None)
    columns = (
        np.concatenate([basis, read("directions", p, None)], axis=1) if "directions" in tensors else basis
    )
    c = columns.shape[1]
    weights = read("experts.weights", c, k * m)
    gate = layers("gate", None, k)
    clipped = "least_flux" in tensors
    if clipped and read("least_flux", 1) != 0:
        raise ModelError(
            "initializer 'least_flux' of the ONNX model must be 0; write the model again with this moefast"
        )
    try:
        mixture = Mixture(
            wave=wave,
            reference=read("reference", p),
            noise_shape=noise_shape,
            knots=read("knots", m),
            columns=columns,
            n_basis=basis.shape[1],
            expert_weights=np.ascontiguousarray(weights.reshape(c, k, m).transpose(1, 2, 0)),
            expert_intercepts=intercepts,
            gate=gate,
            error_model=layers("error_model", None, 1),
            label_range=(float(limits[0]), float(limits[1])),
            clipped=clipped,
            n_gate=gate[0].shape[0] - n_gate_features(0),
            experts=_read_places(model, k),
            tower=next((tower(name) for name in get_args(Sees) if f"tower.{name}.w1" in tensors), None),
        )
        lines = mixture.line_columns
    except ValueError as error:
        raise ModelError(f"the ONNX model and this moefast do not fit together: {error}") from error
    # Equal up to rounding: sums over a window may be added in another order on another machine.
    if not np.allclose(read("lines.columns", p, 3 * len(LINES)), lines, rtol=1e-4, atol=1e-6):
        raise ModelError(
            "the line windows of the ONNX model do not lie on this wave grid "
            f"({p} pixels, {wave[0]:.2f}-{wave[-1]:.2f} Å); use the grid that the model was fitted on"
        )
    return mixture


def _read_places(model: ModelProto, n_experts: int) -> tuple[Place, ...]:
    """The experts that are not linear, from what the metadata say of them.

    Raises
    ------
    ModelError
        The metadata make no sense, a family is unknown, or its numbers do not fit together.
    """
    text = said(model, PLACES)
    try:
        entries = json.loads(text) if text else _former_places(model, n_experts)
        told = [
            (str(e["family"]), str(e["stem"]), tuple(int(k) for k in e["bins"]), bool(e["added"]))
            for e in entries
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"the metadata of the ONNX model do not tell where experts stand ({error}); write it again"
        ) from error
    return tuple(Place(family(name).read_nodes(model, stem), bins, added) for name, stem, bins, added in told)


def _former_places(model: ModelProto, n_experts: int) -> list[dict[str, Any]]:
    """The same for files without that entry, in which only names of initializers tell."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    found: list[dict[str, Any]] = []
    if "library.keys" in tensors:
        marks = Initializers(model)("experts.from_library", n_experts, dtype=np.bool_)
        bins = np.flatnonzero(marks).tolist()
        found.append({"family": Templates.family, "stem": "library", "bins": bins, "added": False})
    for kind in KINDS:
        if any(name.startswith(f"{STEM}.{kind}.") for name in tensors):
            bins = list(range(n_experts))
            found.append({"family": Heads.family, "stem": f"{STEM}.{kind}", "bins": bins, "added": False})
    for name in tensors:
        if mark := re.fullmatch(r"(experts|residuals)\.(\d+)\.(cnn|trees|ridge|linear)", name):
            kind, bin_, own = mark.groups()
            own += " residual" if own in ("ridge", "linear") else ""
            entry = {"family": own, "stem": f"{kind}.{bin_}", "bins": [bin_], "added": kind == "residuals"}
            found.append(entry)
    return found


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


def save(model: ModelProto, path: str | Path) -> None:
    """Write a model; the file is complete or absent.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    write_atomically(path, model.SerializeToString(deterministic=True))
