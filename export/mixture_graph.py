"""A fitted mixture of experts as an ONNX graph, and back.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from moefast.core.errors import ModelError
from moefast.core.line_features import LINE_FEATURES, LINES
from moefast.core.outputs import ONNX, by_onnx, words
from moefast.experts.protocol import Place, family
from moefast.experts.template import Templates
from moefast.export.graph import Graph, Initializers, assemble, number_of_part, said
from moefast.forward import expert_values, forward
from moefast.gating.tower import Tower, known_views
from moefast.kernels.forward import LAYERS
from moefast.mixture import Mixture, n_gate_features
from moefast.ops.on_onnx import OnnxArithmetic
from moefast.trunks.heads import STEM, Heads
from moefast.trunks.networks import KINDS

__all__ = ["PLACES", "build_experts", "read_experts"]

PLACES = "experts"
"""Entry of the metadata that tells which expert stands where, as JSON."""


class _Steps(OnnxArithmetic):
    """The forward pass as nodes; what is not stored is derived from stored numbers when it is first asked for."""

    def __init__(self, graph: Graph, mixture: Mixture, half: bool) -> None:
        super().__init__(graph, {}, Mixture.kind, half)
        self.graph, self.mixture = graph, mixture
        names = ("projection", "cell_matrix", "captured")
        self._arrays = {name: value for name, value in mixture.numbers.items() if name not in names}
        self._arrays |= {
            "basis": mixture.basis,
            "directions": mixture.columns[:, mixture.n_basis :],
            "lines.columns": mixture.line_columns,
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


def read_experts(model: ModelProto, wave: NDArray[np.float64]) -> Mixture:
    """Read a mixture of experts from its ONNX model; see `moefast.export.read_mixture`."""
    read = Initializers(model)
    tensors = read.tensors

    def layers(
        name: str, n_features: int | None, n_outputs: int
    ) -> tuple[NDArray, NDArray, NDArray, NDArray]:
        w1 = read(f"{name}.w1", n_features, None)
        hidden = w1.shape[1]
        shapes = ((hidden,), (hidden, n_outputs), (n_outputs,))
        b1, w2, b2 = (
            read(f"{name}.{layer}", *shape) for layer, shape in zip(LAYERS[1:], shapes, strict=True)
        )
        return w1, b1, w2, b2

    def tower(sees: str) -> Tower:
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
            tower=next((tower(name) for name in known_views() if f"tower.{name}.w1" in tensors), None),
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
