"""The fitted mixture as an ONNX graph, and back.

Design: the graph repeats `Mixture.predict_reference` step by step in float32, with standard operators only. Every
number of the mixture is one named initializer, stored once and exactly: what follows from others (squared expert
weights in cells, the share of the noise that the basis leaves over) is computed in the graph, where runtimes fold it
into constants. So the file is at once the program that others run and the place from which moefast reads its model.
Bad pixels are found in the graph: whoever runs it feeds flux and error as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
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
from moefast.experts.cnn import ConvNet
from moefast.experts.inputs import Expert
from moefast.experts.residual import RESIDUALS, LinearResidual
from moefast.experts.trees import Trees
from moefast.gating.features import LEAST_CONTINUUM, LINE_FEATURES, LINES
from moefast.gating.tower import Sees, Tower
from moefast.kernels import Library, cell_size
from moefast.mixture import LEAST_SPREAD, Mixture, n_gate_features
from moefast.ops.arithmetic import is_matrix
from moefast.spectra.quality import LARGEST_ERROR
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
    "Abs", "Add", "And", "Cast", "Concat", "Conv", "Div", "Exp", "Floor", "Gather", "GatherElements", "Gemm", "Greater",
    "LayerNormalization",
    "LessOrEqual", "Log", "MatMul", "Max", "Min", "Mul", "Pad", "ReduceMax", "ReduceMin", "ReduceSum", "Relu",
    "Reshape", "Round", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "TopK", "Transpose",
    "Unsqueeze", "Where",
])
# fmt: on
_OPERATORS_OF = {"": _OPERATORS, TREES_DOMAIN: frozenset(["TreeEnsembleRegressor"])}
LEAST_FLUX = "least_flux"
OTHERS: dict[str, type[Expert]] = {cls.family: cls for cls in (ConvNet, Trees, *RESIDUALS)}
"""Families that write themselves into a graph."""
_OTHER = re.compile(rf"experts\.(\d+)\.({'|'.join(OTHERS)})")
_HEADS = re.compile(rf"{STEM}\.({'|'.join(KINDS)})\.(.+)")
_RESIDUAL = re.compile(rf"residuals\.(\d+)\.({'|'.join(OTHERS)})")


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

    def total(self, value: str, axis: int, name: str, *, keep: bool = False) -> str:
        """Σ along one axis."""
        return self.add("ReduceSum", [value, self.axis(axis)], name, keepdims=int(keep))

    def column(self, value: str, name: str) -> str:
        """(n,) as (n, 1)."""
        return self.add("Unsqueeze", [value, self.axis(1)], name)


class _Steps:
    """The steps of `Mixture.predict_reference` on `flux` and `error`; each returns names of values in the graph."""

    def __init__(self, mixture: Mixture, half: bool = False) -> None:
        self.mixture, self.half = mixture, half
        self.graph = Graph()
        self._lines: str | None = None
        self._pixels()

    def _weight(self, name: str, value: NDArray) -> str:
        if value.dtype != np.float32:
            raise ModelError(
                f"{name} of the mixture is {value.dtype}, float32 expected; cast it before the export"
            )
        return self.graph.number(name, value)

    def _pixels(self) -> None:
        """Good pixels, centred flux x, noise level."""
        g = self.graph
        zero, one = g.scalar("zero", 0.0), g.scalar("one", 1.0)
        # NaN fails every comparison, so these three leave finite numbers only, on every runtime.
        largest = g.scalar("largest", float(np.finfo(np.float32).max))
        size = g.add("Abs", ["flux"], "pixels/flux_size")
        finite_flux = g.add("LessOrEqual", [size, largest], "pixels/flux_is_finite")
        finite_error = g.add(
            "LessOrEqual", ["error", g.scalar("largest_error", LARGEST_ERROR)], "pixels/error_says_something"
        )
        positive_error = g.add("Greater", ["error", zero], "pixels/error_is_positive")
        finite = g.add("And", [finite_flux, finite_error], "pixels/both_are_finite")
        self.good = g.add("And", [finite, positive_error], "pixels/good")
        n_good = g.total(
            g.add("Cast", [self.good], "pixels/weight", to=TensorProto.FLOAT), 1, "pixels/n_good"
        )
        self.has_data = g.add("Greater", [n_good, zero], "pixels/has_data")

        flux = "flux"
        if self.mixture.clipped:
            # In the graph of such mixtures alone: its presence tells a reader that flux is clipped.
            least = g.number(LEAST_FLUX, np.zeros(1, np.float32))
            flux = g.add("Max", ["flux", least], "flux/clipped")
        difference = g.add(
            "Sub", [flux, self._weight("reference", self.mixture.reference)], "flux/difference"
        )
        self.x = g.add("Where", [self.good, difference, zero], "flux/centred")

        self.noise_shape = self._weight("noise_shape", self.mixture.noise_shape)
        self.variance = g.add("Mul", ["error", "error"], "noise/variance_of_all_pixels")
        ratio = g.add("Div", [self.variance, self.noise_shape], "noise/ratio_of_all_pixels")
        self.ratio = g.add("Where", [self.good, ratio, zero], "noise/ratio")
        total = g.total(self.ratio, 1, "noise/ratio_sum")
        mean = g.add("Div", [total, g.add("Max", [n_good, one], "noise/n_good_or_one")], "noise/ratio_mean")
        noisy = g.add("Greater", [mean, zero], "noise/is_noisy")
        safe = g.add("Where", [noisy, mean, one], "noise/ratio_or_one")
        log_ratio = g.add("Log", [safe], "noise/log_ratio")
        self.log_level = g.add("Mul", [log_ratio, g.scalar("half", 0.5)], "noise/log_level")

    @cached_property
    def knots(self) -> tuple[str, str]:
        """The first and the last noise level, ln s."""
        knots = self._weight("knots", self.mixture.knots)
        first = self.graph.add("ReduceMin", [knots], "level/first_knot", keepdims=0)
        return first, self.graph.add("ReduceMax", [knots], "level/last_knot", keepdims=0)

    @cached_property
    def level(self) -> str:
        """The noise level ln s within the knots, (n, 1)."""
        last = self.knots[1]
        within = self.graph.add("Min", [self.level_at_least_first, last], "level/within_knots")
        return self.graph.column(within, "level/column")

    @cached_property
    def level_at_least_first(self) -> str:
        """The noise level, not below the first knot, (n,)."""
        return self.graph.add("Max", [self.log_level, self.knots[0]], "level/at_least_first")

    def hat(self) -> str:
        """Weights (n, 1, M) of the noise levels."""
        g, (first, last) = self.graph, self.knots
        span = g.add("Sub", [last, first], "level/knot_span")
        step = g.add("Div", [span, g.scalar("n_intervals", self.mixture.knots.size - 1)], "level/knot_step")
        away = g.add("Abs", [g.add("Sub", [self.level, "knots"], "level/minus_knots")], "level/distance")
        steps = g.add("Div", [away, step], "level/distance_in_steps")
        share = g.add("Sub", [g.scalar("one", 1.0), steps], "level/share")
        hat = g.add("Max", [share, g.scalar("zero", 0.0)], "level/hat")
        return g.add("Unsqueeze", [hat, g.axis(1)], "level/hat_of_every_expert")

    def columns(self) -> str:
        """What the experts see of a spectrum, (p, c)."""
        g, mixture = self.graph, self.mixture
        basis = self._weight("basis", mixture.basis)
        others = mixture.columns[:, mixture.n_basis :]
        if others.shape[1] == 0:
            return basis
        return g.add("Concat", [basis, self._weight("directions", others)], "project/columns", axis=1)

    def project(self, lines: bool) -> list[str]:
        """Product of x with the columns (n, c) and, if asked for, the lines (n, 12)."""
        g, mixture = self.graph, self.mixture
        self.matrix = self.columns()
        if not lines:
            return [g.add("MatMul", [self.x, self.matrix], "project/values")]
        own = self._weight("lines.columns", mixture.line_columns)
        matrix = g.add("Concat", [self.matrix, own], "project/matrix", axis=1)
        values = g.add("MatMul", [self.x, matrix], "project/values")
        sizes = g.shape("project_sizes", [mixture.columns.shape[1], 3 * len(LINES)])
        return g.add_many(
            "Split", [values, sizes], "project/split", ["project/columns_of_x", "project/lines_of_x"], axis=1
        )

    def components(self, columns: str) -> str:
        """The first columns, which are principal components."""
        g, r = self.graph, self.mixture.n_basis
        if r == self.mixture.columns.shape[1]:
            return columns
        ends = [g.shape("first", [0]), g.shape("n_basis", [r]), g.axis(1)]
        return g.add("Slice", [columns, *ends], "project/components")

    def weights(self) -> str:
        """Weights of the experts, (c, K·M)."""
        weights = self.mixture.expert_weights
        return self._weight("experts.weights", weights.transpose(2, 0, 1).reshape(weights.shape[2], -1))

    def propagate(self) -> tuple[str, str]:
        """Noise of the experts, cell by cell, (n, K·M), and what the basis leaves of the noise (n,)."""
        g, p = self.graph, self.mixture.n_pixels
        cell = cell_size(p)
        by_cell = g.add("Reshape", [self.ratio, g.shape("by_cell", [0, p // cell, cell])], "noise/by_cell")
        share = g.scalar("share_of_cell", 1 / cell)
        cells = g.add("Mul", [g.total(by_cell, 2, "noise/cell_sums"), share], "noise/cells")
        in_pixels = g.add("MatMul", [self.matrix, self.weights()], "propagate/pixel_weights")
        squared = g.add("Mul", [in_pixels, in_pixels], "propagate/squared_weights")
        shape = g.column(self.noise_shape, "noise/shape_column")
        white = g.add("Mul", [squared, shape], "propagate/white")
        sizes = g.shape("weights_by_cell", [p // cell, cell, self.mixture.expert_intercepts.size])
        matrix = g.total(g.add("Reshape", [white, sizes], "propagate/by_cell"), 1, "propagate/matrix")
        flat = g.add("MatMul", [cells, matrix], "propagate/experts")

        good_variance = g.add("Where", [self.good, self.variance, g.scalar("zero", 0.0)], "noise/variance")
        self.inverse_shape = g.add("Div", [g.scalar("one", 1.0), self.noise_shape], "noise/inverse_shape")
        captured = g.total(g.add("Mul", ["basis", "basis"], "noise/basis_squared"), 1, "noise/captured")
        left = g.column(g.add("Sub", [self.inverse_shape, captured], "noise/left"), "noise/left_column")
        expected = g.add("MatMul", [good_variance, left], "propagate/expected_column")
        return flat, g.add("Squeeze", [expected, g.axis(1)], "propagate/expected")

    def at_level(self, flat: str, hat: str, stem: str, intercepts: NDArray | None = None) -> str:
        """Interpolate (n, K·M) between the noise levels, after the intercepts if any: (n, K)."""
        g = self.graph
        shape = g.shape("experts_by_levels", [0, *self.mixture.expert_intercepts.shape])
        cube = g.add("Reshape", [flat, shape], f"{stem}/by_level")
        if intercepts is not None:
            cube = g.add(
                "Add", [cube, self._weight("experts.intercepts", intercepts)], f"{stem}/with_intercepts"
            )
        return g.total(g.add("Mul", [cube, hat], f"{stem}/shares"), 2, f"{stem}/at_level")

    def expert_log_g(self, columns: str, hat: str) -> str:
        """Predictions of the experts, (n, K)."""
        flat = self.graph.add("MatMul", [columns, self.weights()], "experts/at_knots")
        return self.at_level(flat, hat, "experts", self.mixture.expert_intercepts)

    def chi2(self, components: str, expected: str) -> str:
        """Energy outside the components over its expectation, (n,)."""
        g = self.graph
        squared = g.add("Mul", [self.x, self.x], "chi2/flux_squared")
        # A column, not a vector: ONNX Runtime cannot multiply an empty batch with a vector.
        inverse = g.column(self.inverse_shape, "noise/inverse_shape_column")
        energy = g.add("MatMul", [squared, inverse], "chi2/energy_column")
        energy = g.add("Squeeze", [energy, g.axis(1)], "chi2/energy")
        inside = g.total(
            g.add("Mul", [components, components], "chi2/components_squared"), 1, "chi2/energy_inside"
        )
        outside = g.add("Sub", [energy, inside], "chi2/energy_outside")
        bound = g.add("Max", [expected, g.scalar("tiny", 1e-30)], "chi2/expected")
        return g.add("Div", [outside, bound], "chi2/ratio")

    def line_features(self, lines: str) -> str:
        """Depths and equivalent widths, (n, 9)."""
        g, mixture, n_lines = self.graph, self.mixture, len(LINES)
        whole = g.add(
            "Add", [lines, self._weight("lines.offsets", mixture.line_offsets)], "lines/of_whole_flux"
        )
        cube = g.add("Reshape", [whole, g.shape("lines_by_kind", [0, n_lines, 3])], "lines/by_kind")
        ones = g.shape("lines_kinds", [1, 1, 1])
        kinds = ["lines/core", "lines/integral", "lines/continuum_as_found"]
        core, integral, continuum = g.add_many("Split", [cube, ones], "lines/split", kinds, axis=2)
        continuum = g.add("Max", [continuum, g.scalar("least_continuum", LEAST_CONTINUUM)], "lines/continuum")
        one = g.scalar("one", 1.0)
        depth = g.add("Sub", [one, g.add("Div", [core, continuum], "lines/core_ratio")], "lines/depth")
        widths = self._weight("lines.widths", mixture.line_widths[:, None])
        missing = g.add("Div", [integral, continuum], "lines/integral_ratio")
        width = g.add("Sub", [widths, missing], "lines/equivalent_width")
        pairs = g.add("Concat", [depth, width], "lines/pairs", axis=2)
        row = g.add("Reshape", [pairs, g.shape("lines_in_a_row", [0, 2 * n_lines])], "lines/in_a_row")
        # LINE_FEATURES puts the sum of the three calcium widths between calcium and sodium.
        calcium, sodium = g.add_many(
            "Split",
            [row, g.shape("lines_of_elements", [6, 2])],
            "lines/elements",
            ["lines/Ca", "lines/Na"],
            axis=1,
        )
        three = [g.shape("first", [0]), g.shape("three", [3]), g.axis(1)]
        triplet = g.total(g.add("Slice", [width, *three], "lines/CaT_widths"), 1, "lines/CaT_EW")
        return g.add("Concat", [calcium, triplet, sodium], "lines/features", axis=1)

    def features(self, components: str, lines: str) -> str:
        """Features of the gate, (n, f): lines, the first components, noise level."""
        g = self.graph
        first = [g.shape("first", [0]), g.shape("n_components", [self.mixture.n_gate]), g.axis(1)]
        leading = g.add("Slice", [components, *first], "gate/first_components")
        return g.add("Concat", [lines, leading, self.level], "gate/features", axis=1)

    def perceptron(self, features: str, layers: Sequence[NDArray], name: str) -> str:
        """tanh(f W₁ + b₁) W₂ + b₂."""
        g = self.graph
        w1, b1, w2, b2 = (
            self._weight(f"{name}.{layer}", value) for layer, value in zip(_LAYERS, layers, strict=True)
        )
        hidden = g.add("Tanh", [g.add("Gemm", [features, w1, b1], f"{name}/hidden_sum")], f"{name}/hidden")
        return g.add("Gemm", [hidden, w2, b2], f"{name}/output")

    def gate(self, features: str, evidence: str | None) -> str:
        """Weights of the experts, (n, K)."""
        logits = self.perceptron(features, self.mixture.gate, "gate")
        if self.mixture.tower is not None:
            inputs = _OnDemand(
                features=lambda: features,
                snr_norm=lambda: self.snr_norm,
                error=lambda: "error",
                good=lambda: self.good,
            )
            own = self.mixture.tower.add_nodes(self.graph, inputs, self.mixture.n_pixels)
            logits = self.graph.add("Add", [logits, own], "gate/with_tower")
        if evidence is not None:
            logits = self.graph.add("Add", [logits, evidence], "gate/with_evidence")
        return self.graph.add("Softmax", [logits], "gate/softmax", axis=1)

    def posterior(self, components: str, wanted: Sequence[str]) -> list[str]:
        """Of each expert of the library, (n, K): "mean", its "sd", and "evidence", its logarithm less the largest.

        In double precision until the exponentials: distances are differences of large numbers here.
        """
        g, library = self.graph, self.mixture.library
        assert library is not None
        m, t, r = library.tangents.shape

        def double(value: str, name: str) -> str:
            return g.add("Cast", [value], f"library/{name}", to=TensorProto.DOUBLE)

        def own(name: str) -> str:
            return double(self._weight(f"library.{name}", getattr(library, name)), name)

        def number(name: str, value: float) -> str:
            return g.number(f"constant.double_{name}", np.array(value, np.float64))

        def last(name: str, value: str) -> str:
            """(…, a) as (…, 1, a): one more axis before the last."""
            return g.add("Unsqueeze", [value, g.shape("before_last", [-2])], f"library/{name}")

        z, keys, tangents = double(components, "z"), own("keys"), own("tangents")
        # u = q (z − k), and what of |z − k|² lies outside of the tangents.
        flat = g.add("Reshape", [tangents, g.shape("tangents_in_a_row", [m * t, r])], "library/flat")
        matrix = g.add("Transpose", [flat], "library/matrix", perm=[1, 0])
        offset = g.total(
            g.add("Mul", [tangents, last("keys_row", keys)], "library/key_shares"), 2, "library/offset"
        )
        along = g.add("MatMul", [z, matrix], "library/z_along")
        along = g.add("Reshape", [along, g.shape("by_cloud", [0, m, t])], "library/z_by_cloud")
        along = g.add("Sub", [along, offset], "library/along")
        along2 = g.add("Mul", [along, along], "library/along_squared")
        length = g.total(g.add("Mul", [z, z], "library/z_squared"), 1, "library/z_length", keep=True)
        reach = g.total(g.add("Mul", [keys, keys], "library/keys_squared"), 1, "library/key_length")
        across = g.add("Transpose", [keys], "library/keys_across", perm=[1, 0])
        cross = g.add("MatMul", [z, across], "library/cross")
        cross = g.add("Mul", [cross, number("two", 2.0)], "library/twice_cross")
        apart = g.add("Sub", [g.add("Add", [length, reach], "library/lengths"), cross], "library/apart")
        outside = g.add("Sub", [apart, g.total(along2, 2, "library/inside")], "library/outside_as_found")
        outside = g.add("Max", [outside, number("zero", 0.0)], "library/outside")

        twice = g.add("Mul", [self.level_at_least_first, g.scalar("two", 2.0)], "library/twice_log_level")
        noise = double(g.add("Exp", [g.column(twice, "library/level_column")], "library/noise32"), "noise")
        rest = g.add("Add", [noise, own("rest")], "library/outside_variance")
        variance = g.add("Add", [last("noise_cube", noise), own("variances")], "library/along_variance")
        chi2 = g.add(
            "Add",
            [
                g.add("Div", [outside, rest], "library/outside_chi2"),
                g.total(g.add("Div", [along2, variance], "library/along_chi2s"), 2, "library/along_chi2"),
            ],
            "library/chi2",
        )
        volume = g.add(
            "Add",
            [
                g.add(
                    "Mul",
                    [g.add("Log", [rest], "library/log_rest"), number("n_outside", r - t)],
                    "library/volume_outside",
                ),
                g.total(g.add("Log", [variance], "library/log_variances"), 2, "library/volume_along"),
            ],
            "library/volume",
        )
        half = g.add(
            "Mul",
            [g.add("Add", [chi2, volume], "library/twice_exponent"), number("minus_half", -0.5)],
            "library/half",
        )
        exponent = g.add("Add", [half, own("log_weights")], "library/exponent")
        sizes = g.number("library.sizes", np.diff(library.first))
        k = self.mixture.n_experts

        def by_expert(value: str, name: str) -> list[str]:
            outputs = [f"library/{name}_{i}" for i in range(k)]
            return g.add_many("Split", [value, sizes], f"library/{name}_split", outputs, axis=1)

        found: dict[str, list[str]] = {name: [] for name in wanted}
        gains = own("gains") if {"mean", "sd"} & set(wanted) else ""
        means, left = [""] * k, [""] * k
        if gains:
            slope = g.add("Div", [gains, variance], "library/slope")
            shift = g.total(g.add("Mul", [slope, along], "library/shifts"), 2, "library/shift")
            means = by_expert(g.add("Add", [shift, own("log_g")], "library/means"), "mean")
        if "sd" in wanted:
            known = g.total(g.add("Mul", [slope, gains], "library/known_shares"), 2, "library/known")
            unknown = g.add("Sub", [own("scatter"), known], "library/left_as_found")
            left = by_expert(g.add("Max", [unknown, number("zero", 0.0)], "library/left"), "left")
        exponents = by_expert(exponent, "exponent")
        for i in range(k):
            stem = f"library/expert_{i}"
            top = g.add("ReduceMax", [exponents[i]], f"{stem}_top", axes=[1], keepdims=1)
            weight = g.add("Exp", [g.add("Sub", [exponents[i], top], f"{stem}_below_top")], f"{stem}_weight")
            total = g.total(weight, 1, f"{stem}_total", keep=True)
            if "evidence" in wanted:
                log_total = g.add("Log", [total], f"{stem}_log_total")
                found["evidence"].append(g.add("Add", [log_total, top], f"{stem}_evidence"))
            if gains:
                share = g.add("Div", [weight, total], f"{stem}_share")
                mean = g.total(
                    g.add("Mul", [share, means[i]], f"{stem}_shares"), 1, f"{stem}_mean", keep=True
                )
                found["mean"].append(mean)
            if "sd" in wanted:
                off = g.add("Sub", [means[i], mean], f"{stem}_off")
                square = g.add("Add", [g.add("Mul", [off, off], f"{stem}_off2"), left[i]], f"{stem}_square")
                squares = g.add("Mul", [share, square], f"{stem}_squares")
                found["sd"].append(
                    g.add("Sqrt", [g.total(squares, 1, f"{stem}_variance", keep=True)], f"{stem}_sd")
                )
        out = []
        for name in wanted:
            value = g.add("Concat", found[name], f"library/{name}", axis=1)
            if name == "evidence":
                best = g.add("ReduceMax", [value], "library/best_evidence", axes=[1], keepdims=1)
                value = g.add("Sub", [value, best], "library/relative_evidence")
            out.append(g.add("Cast", [value], f"library/{name}32", to=TensorProto.FLOAT))
        return out

    def instead(self, values: str, others: str, name: str) -> str:
        """(n, K) with another column where an expert is the library's, or the trunk's."""
        if self.mixture.heads is not None:
            # All of them; the linear experts stay in the graph, since the file is the home of their numbers.
            marks = self.graph.number("experts.from_heads", np.ones(self.mixture.n_experts, np.bool_))
        else:
            marks = self.graph.number("experts.from_library", np.array(self.mixture.from_library))
        return self.graph.add("Where", [marks, others, values], name)

    def mix(self, features: str, weights: str, experts: str, noise: str) -> tuple[str, str, str]:
        """The mixture's log g, its calibrated error, and the noise propagated into it, each (n,)."""
        g = self.graph
        mixed = g.total(g.add("Mul", [weights, experts], "mix/shares"), 1, "mix/unclipped")
        limits = g.number("label_range", np.array(self.mixture.label_range, np.float64))
        limits = g.add("Cast", [limits], "mix/limits", to=TensorProto.FLOAT)
        low = g.add("ReduceMin", [limits], "mix/lowest", keepdims=0)
        high = g.add("ReduceMax", [limits], "mix/highest", keepdims=0)
        log_g = g.add("Min", [g.add("Max", [mixed, low], "mix/at_least_lowest"), high], "mix/log_g")

        raw = g.total(g.add("Mul", [weights, noise], "error/noise_shares"), 1, "error/raw")
        apart = g.add("Sub", [experts, g.column(mixed, "error/mixed_column")], "error/apart")
        squares = g.add("Mul", [apart, apart], "error/apart_squared")
        spread2 = g.total(g.add("Mul", [weights, squares], "error/spread_shares"), 1, "error/spread_squared")
        spread = g.add("Sqrt", [spread2], "error/spread")
        floor = g.scalar("least_spread", LEAST_SPREAD)
        extra = [
            log_g,
            g.add("Log", [g.add("Max", [raw, floor], "error/raw_or_floor")], "error/log_raw"),
            g.add("Log", [g.add("Max", [spread, floor], "error/spread_or_floor")], "error/log_spread"),
        ]
        columns = [g.column(value, f"{value}_column") for value in extra]
        inputs = g.add("Concat", [features, *columns], "error/features", axis=1)
        log_error = self.perceptron(inputs, self.mixture.error_model, "error_model")
        return (
            log_g,
            g.add("Exp", [g.add("Squeeze", [log_error, g.axis(1)], "error/log")], "error/calibrated"),
            raw,
        )

    def seen(self, components: str, lines: str, **own: Callable[[], str]) -> _OnDemand:
        """What experts that are not linear see, from components and the products of the line columns."""
        return _OnDemand(
            **own,
            z=lambda: components,
            lines=lambda: self.of_lines(lines),
            log_level=lambda: self.level_column,
            x=lambda: self.whole_flux,
        )

    def other(self, k: int, components: str, lines: str) -> str:
        """Log g of an expert of another family, (n, 1)."""
        return self.mixture.others[k].add_nodes(self.graph, self.seen(components, lines), f"experts.{k}")

    def heads(self, components: str, lines: str) -> tuple[str, str, str]:
        """Log g of each head, its 1σ and the logits of their gate, each (n, K)."""
        assert self.mixture.heads is not None
        return self.mixture.heads.add_nodes(self.graph, self.seen(components, lines), half=self.half)

    def with_residuals(self, values: str, components: str, lines: str, linear: Callable[[], str]) -> str:
        """(n, K) with the residuals of experts added to their columns; `linear` makes those of the linear experts."""
        g, zero, plain = self.graph, self.graph.scalar("zero", 0.0), values

        def column(of: str, k: int, name: str) -> str:
            ends = [g.shape(f"expert_{i}", [i]) for i in (k, k + 1)]
            return g.add("Slice", [of, *ends, g.axis(1)], f"residuals.{k}/{name}")

        def of_linear(k: int) -> str:
            return column(linear(), k, "linear")

        for k, expert in self.mixture.residuals.items():
            # As for experts of other families, the name of this mark tells a reader of which family it is.
            mark = g.number(f"residuals.{k}.{expert.family}", np.arange(self.mixture.n_experts) == k)
            inputs = self.seen(
                components,
                lines,
                value=partial(column, plain, k, "value"),
                linear=partial(of_linear, k),
            )
            own = expert.add_nodes(g, inputs, f"residuals.{k}")
            share = g.add("Where", [mark, own, zero], f"residuals.{k}/in_place")
            values = g.add("Add", [values, share], f"residuals.{k}/added")
        return values

    def with_others(self, values: str, components: str, lines: str) -> str:
        """(n, K) with the columns of experts of other families."""
        g = self.graph
        for k, expert in self.mixture.others.items():
            # Its name tells a reader of which family it is.
            mark = g.number(f"experts.{k}.{expert.family}", np.arange(self.mixture.n_experts) == k)
            values = g.add("Where", [mark, self.other(k, components, lines), values], f"experts.{k}/in_place")
        return values

    @cached_property
    def snr_norm(self) -> str:
        """‖flux‖/‖error‖ over the good pixels, (n, 1); sums in double precision, as the kernels have them."""
        g, zero, sums = self.graph, self.graph.scalar("zero", 0.0), []
        for name in ("flux", "error"):
            good = g.add("Where", [self.good, name, zero], f"snr/{name}")
            double = g.add("Cast", [good], f"snr/{name}_double", to=TensorProto.DOUBLE)
            squared = g.add("Mul", [double, double], f"snr/{name}_squared")
            sums.append(g.total(squared, 1, f"snr/{name}_sum", keep=True))
        tiny = g.number("constant.double_tiny", np.array(1e-300))
        ratio = g.add("Div", [sums[0], g.add("Max", [sums[1], tiny], "snr/noise")], "snr/squared")
        return g.add("Cast", [g.add("Sqrt", [ratio], "snr/double")], "snr/snr_norm", to=TensorProto.FLOAT)

    @cached_property
    def level_column(self) -> str:
        """The noise level ln s as it is, (n, 1)."""
        return self.graph.column(self.log_level, "level/of_others")

    @cached_property
    def whole_flux(self) -> str:
        """Flux with the reference in the place of bad pixels, (n, p)."""
        flux = "flux/clipped" if self.mixture.clipped else "flux"
        return self.graph.add("Where", [self.good, flux, "reference"], "flux/whole")

    def of_lines(self, lines: str) -> str:
        """Depths and equivalent widths, (n, 9)."""
        if self._lines is None:
            self._lines = self.line_features(lines)
        return self._lines

    def deliver(self, value: str, output: str, *, columns: bool = False) -> None:
        """Name an output: the value, and NaN in rows without a good pixel."""
        g = self.graph
        has_data = self.has_data
        if columns:
            has_data = "pixels/has_data_column"
            if all(node.name != has_data for node in g.nodes):
                g.column(self.has_data, has_data)
        nothing = g.scalar("nan", float("nan"))
        g.add_many("Where", [has_data, value, nothing], f"deliver/{output}", [output])


class _OnDemand(Mapping[str, str]):
    """Values by name, whose nodes are made when they are first asked for."""

    def __init__(self, **makers: Callable[[], str]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> str:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


_LAYERS = ("w1", "b1", "w2", "b2")
_OF_CLOUDS = ("variances", "gains", "rest", "log_weights", "log_g", "scatter")
_INPUTS = {
    "flux": "flux per pixel, in the unit of the training set (median near 1)",
    "error": "1 sigma per pixel in the unit of flux; pixels that are not finite or have error <= 0 get zero weight",
}


def build_experts(mixture: Mixture, part: str, metadata: dict[str, str], *, half: bool) -> ModelProto:
    """Write a mixture of experts, its gate or one of its experts as an ONNX model; see `moefast.export.build`."""
    if half and mixture.heads is None:
        raise ModelError(
            "half precision is for networks, and this mixture has none; export it in single precision"
        )
    if part not in ("mixture", "gate"):
        mixture = _only_expert(mixture, part)
    if mixture.error_model[2].shape[1] != 1:
        raise ModelError(f"the error model must give one number, it gives {mixture.error_model[2].shape[1]}")
    steps = _Steps(mixture, half)
    if part == "gate":
        columns, lines = steps.project(lines=True)
        components = steps.components(columns)
        outputs = ["weights"]
        evidence = None if mixture.library is None else steps.posterior(components, ["evidence"])[0]
        if mixture.heads is not None:
            evidence = steps.heads(components, lines)[2]
        features = steps.features(components, steps.of_lines(lines))
        steps.deliver(steps.gate(features, evidence), "weights", columns=True)
    elif part != "mixture":
        seers = [*mixture.others.values(), *mixture.residuals.values()]
        projected, lines = (*steps.project(lines=any(sees_lines(expert) for expert in seers)), "")[:2]
        components = steps.components(projected)

        @cache
        def linear() -> str:
            return steps.expert_log_g(projected, steps.hat())

        if mixture.heads is not None:
            # A trunk has no parts: all of its heads but one are left out again, and what its gate makes of the lines.
            every = steps.with_residuals(steps.heads(components, lines)[0], components, lines, linear)
            g, k = steps.graph, number_of_part(mixture.n_experts, part)
            ends = [g.shape(f"place_{k}", [k]), g.shape(f"place_{k + 1}", [k + 1]), g.axis(1)]
            column = g.add("Slice", [every, *ends], "experts/only_column")
        elif mixture.others:
            column = steps.other(0, components, lines)
        elif mixture.library is not None and mixture.from_library[0]:
            (column,) = steps.posterior(components, ["mean"])
        else:
            column = linear()
        if mixture.heads is None:
            column = steps.with_residuals(column, components, lines, linear)
        outputs = ["log_g"]
        steps.deliver(steps.graph.add("Squeeze", [column, steps.graph.axis(1)], "experts/only"), "log_g")
    else:
        columns, lines = steps.project(lines=True)
        components = steps.components(columns)
        flat_noise, expected = steps.propagate()
        hat = steps.hat()
        linear_experts = experts = steps.expert_log_g(columns, hat)
        noise = steps.graph.add("Sqrt", [steps.at_level(flat_noise, hat, "propagate")], "propagate/noise")
        evidence = None
        if mixture.library is not None:
            means, deviations, evidence = steps.posterior(components, ["mean", "sd", "evidence"])
            experts = steps.instead(experts, means, "experts/of_all_kinds")
            noise = steps.instead(noise, deviations, "propagate/noise_of_all_kinds")
        if mixture.heads is not None:
            means, deviations, evidence = steps.heads(components, lines)
            experts = steps.instead(experts, means, "experts/of_all_kinds")
            noise = steps.instead(noise, deviations, "propagate/noise_of_all_kinds")
        experts = steps.with_others(experts, components, lines)
        experts = steps.with_residuals(experts, components, lines, lambda: linear_experts)
        features = steps.features(components, steps.of_lines(lines))
        weights = steps.gate(features, evidence)
        log_g, log_g_err, raw = steps.mix(features, weights, experts, noise)
        values = (log_g, log_g_err, weights, experts, raw, steps.chi2(components, expected), steps.log_level)
        outputs = list(ONNX)
        for output, value in zip(outputs, values, strict=True):
            steps.deliver(value, output, columns=by_onnx(output).per == "expert")
    steps.graph.drop_unused(outputs)
    return _model(steps, part, outputs, metadata)


def sees_lines(expert: Expert) -> bool:
    """Whether an expert needs the line features."""
    return not (expert.needs_flux or isinstance(expert, LinearResidual))


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


def _only_expert(mixture: Mixture, part: str) -> Mixture:
    k = number_of_part(mixture.n_experts, part)
    if mixture.heads is not None:
        return replace(mixture, residuals={i: e for i, e in mixture.residuals.items() if i == k})
    w1, b1, w2, b2 = mixture.gate
    return replace(
        mixture,
        expert_weights=mixture.expert_weights[k : k + 1],
        expert_intercepts=mixture.expert_intercepts[k : k + 1],
        gate=(w1, b1, w2[:, k : k + 1], b2[k : k + 1]),
        library=None if mixture.library is None else _clouds_of(mixture.library, k),
        from_library=mixture.from_library[k : k + 1],
        others={0: mixture.others[k]} if k in mixture.others else {},
        residuals={0: mixture.residuals[k]} if k in mixture.residuals else {},
        tower=None,
    )


def _clouds_of(library: Library, k: int) -> Library:
    """The library of one expert."""
    here = slice(library.first[k], library.first[k + 1])
    numbers = {name: getattr(library, name)[here] for name in ("keys", "tangents", *_OF_CLOUDS)}
    return Library(**numbers, first=np.array([0, here.stop - here.start]))


def _model(steps: _Steps, part: str, outputs: Sequence[str], metadata: dict[str, str]) -> ModelProto:
    mixture = steps.mixture
    k = mixture.n_experts
    return assemble(
        steps.graph,
        mixture.wave,
        part,
        {name: (k if by_onnx(name).per == "expert" else None, words(by_onnx(name))) for name in outputs},
        own={
            "precision": "half" if steps.half else "single",
            "flux_unit": "that of the training set: median near 1",
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
    library, from_library = None, ()
    if "library.keys" in tensors:
        keys = read("library.keys", None, basis.shape[1])
        clouds, r = keys.shape
        tangents = read("library.tangents", clouds, None, r)
        shapes = {"variances": tangents.shape[:2], "gains": tangents.shape[:2]}
        rest = {name: read(f"library.{name}", *shapes.get(name, (clouds,))) for name in _OF_CLOUDS}
        sizes = read("library.sizes", k, dtype=np.int64)
        try:
            library = Library(keys, tangents, **rest, first=np.concatenate([[0], np.cumsum(sizes)]))
        except ValueError as error:
            raise ModelError(f"the library of the ONNX model does not fit together: {error}") from error
        from_library = tuple(read("experts.from_library", k, dtype=np.bool_).tolist())
    others, residuals = (
        {
            int(found[1]): OTHERS[found[2]].read_nodes(model, f"{kind}.{found[1]}")
            for found in map(pattern.fullmatch, tensors)
            if found
        }
        for kind, pattern in (("experts", _OTHER), ("residuals", _RESIDUAL))
    )
    of_heads = {
        found[2]: (found[1], name) for name, found in ((n, _HEADS.fullmatch(n)) for n in tensors) if found
    }
    heads = None
    if of_heads:
        kind = next(iter(of_heads.values()))[0]
        dims = {short: tuple(tensors[name].dims) for short, (_, name) in of_heads.items()}

        def number_of_network(short: str) -> NDArray:
            name = of_heads[short][1]
            half = is_matrix(short, len(dims[short])) and tensors[name].data_type == TensorProto.FLOAT16
            return read(name, *dims[short], dtype=np.float16 if half else np.float32).astype(np.float32)

        try:
            heads = Heads.read(kind, dims, number_of_network)  # type: ignore[arg-type]
        except (ValueError, KeyError) as error:
            raise ModelError(f"the network of the ONNX model does not fit together: {error}") from error
    clipped = LEAST_FLUX in tensors
    if clipped and read(LEAST_FLUX, 1) != 0:
        raise ModelError(
            f"initializer {LEAST_FLUX!r} of the ONNX model must be 0; write the model again with this moefast"
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
            library=library,
            from_library=from_library,
            others=others,
            residuals=residuals,
            tower=next((tower(name) for name in get_args(Sees) if f"tower.{name}.w1" in tensors), None),
            heads=heads,
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
