"""The arithmetic of descriptions as nodes of an ONNX graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import ModelError
from moefast.ops.arithmetic import EPSILON, HEAD, is_half, is_matrix

__all__ = ["BOOL", "DOUBLE", "FLOAT", "HALF", "INT64", "OnnxArithmetic"]

FLOAT, INT64, BOOL, HALF, DOUBLE = 1, 7, 9, 10, 11
"""`onnx.TensorProto` types."""


class OnnxArithmetic:
    """As nodes of a graph; values are names.

    Parameters
    ----------
    graph : moefast.export graph
    numbers : mapping of str to array, float32
    stem : str
        What the names of nodes and initializers begin with.
    half : bool
        Products of matrices of a network are made in half precision; sums of tokens, norms and weights of attention
        stay in single precision.
    short : bool
        The numbers are those of a network: matrices that half precision holds exactly are stored in it.
    """

    def __init__(
        self, graph: Any, numbers: Mapping[str, NDArray], stem: str, half: bool = False, short: bool = False
    ) -> None:
        self._graph, self._numbers, self._stem, self._count = graph, numbers, stem, 0
        self.half, self._half, self._short = half, half and short, short
        self._stored: dict[str, str] = {}
        """What is stored in half precision, by the value that is made of it."""
        self._rounded: dict[str, str] = {}
        """What is in single precision already, by the value in double precision that is made of it."""

    def _add(self, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        self._count += 1
        name = f"{self._stem}/{self._count:03d}_{operator.lower()}"
        return str(self._graph.add(operator, inputs, name, **attributes))

    def _cast(self, value: str, to: int) -> str:
        return self._add("Cast", [value], to=to)

    def number(self, name: str) -> str:
        array = self._numbers[name]
        if not (self._half and is_matrix(name, array.ndim)) and not (self._short and is_half(name, array)):
            return str(self._graph.number(f"{self._stem}.{name}", array))
        stored = self._graph.number(f"{self._stem}.{name}", array.astype(np.float16))
        value = self._cast(stored, FLOAT)
        if self._half:
            self._stored[value] = stored
        return value

    def constant(self, value: float) -> str:
        return str(self._graph.scalar(f"{value!r}", value))

    def add(self, a: str, b: str) -> str:
        return self._add("Add", [a, b])

    def subtract(self, a: str, b: str) -> str:
        return self._add("Sub", [a, b])

    def multiply(self, a: str, b: str) -> str:
        return self._add("Mul", [a, b])

    def divide(self, a: str, b: str) -> str:
        return self._add("Div", [a, b])

    def product(self, a: str, b: str) -> str:
        if not self._half:
            return self._add("MatMul", [a, b])
        halves = [self._stored.get(value) or self._cast(value, HALF) for value in (a, b)]
        return self._cast(self._add("MatMul", halves), FLOAT)

    def total(self, a: str, axis: int) -> str:
        return self._add("ReduceSum", [a, self._graph.axis(axis)], keepdims=0)

    def exp(self, a: str) -> str:
        return self._add("Exp", [a])

    def root(self, a: str) -> str:
        return self._add("Sqrt", [a])

    def relu(self, a: str) -> str:
        return self._add("Relu", [a])

    def tanh(self, a: str) -> str:
        return self._add("Tanh", [a])

    def clip(self, a: str, low: str, high: str) -> str:
        return self._add("Min", [self._add("Max", [a, low]), high])

    def attention(self, queries: str, keys: str, values: str) -> str:
        scaled = self.multiply(queries, self.constant(HEAD**-0.5))
        weights = self._add("Softmax", [self.product(scaled, self.ordered(keys, (0, 1, 3, 2)))], axis=-1)
        return self.product(weights, values)

    def norm(self, a: str, scale: str, shift: str) -> str:
        return self._add("LayerNormalization", [a, scale, shift], axis=-1, epsilon=EPSILON)

    def convolve(self, a: str, weights: str, bias: str, stride: int) -> str:
        return self._add("Conv", [a, weights, bias], strides=[stride])

    def shaped(self, a: str, shape: Sequence[int]) -> str:
        words = "_".join(map(str, shape))
        return self._add("Reshape", [a, self._graph.shape(f"each_star_{words}", [0, *shape])])

    def ordered(self, a: str, axes: Sequence[int]) -> str:
        return self._add("Transpose", [a], perm=list(axes))

    def joined(self, parts: Sequence[str], axis: int) -> str:
        return self._add("Concat", list(parts), axis=axis)

    def part(self, a: str, axis: int, first: int, stop: int) -> str:
        ends = (
            self._graph.shape(f"place_{first}", [first]),
            self._graph.shape(f"place_{stop}", [stop]),
            self._graph.axis(axis),
        )
        return self._add("Slice", [a, *ends])

    def log(self, a: str) -> str:
        return self._add("Log", [a])

    def largest(self, a: str, axis: int) -> str:
        return self._add("ReduceMax", [a], axes=[axis], keepdims=1)

    def at_most(self, a: str, b: str) -> str:
        return self._add("LessOrEqual", [a, b])

    def both(self, a: str, b: str) -> str:
        return self._add("And", [a, b])

    def where(self, condition: str, a: str, b: str) -> str:
        return self._add("Where", [condition, a, b])

    def absolute(self, a: str) -> str:
        return self._add("Abs", [a])

    def picked(self, a: str, places: str, axis: int) -> str:
        return self._add("Gather", [a, self.reshaped(places, (-1,))], axis=axis)

    def reshaped(self, a: str, shape: Sequence[int]) -> str:
        return self._add("Reshape", [a, self._graph.shape("_".join(["shape", *map(str, shape)]), shape)])

    def precise(self, a: str) -> str:
        return self._cast(a, DOUBLE)

    def single(self, a: str) -> str:
        return self._rounded.get(a) or self._cast(a, FLOAT)

    def inverse(self, a: str, size: int) -> tuple[str, str]:
        # Gauss-Jordan steps in place, a - (column - e)(row + e)ᵀ / pivot: a positive definite matrix needs no exchange
        # of rows. Its diagonal is made one first: above one, a pivot would cancel the digits of its own inverse.
        unit = self._graph.number(f"constant.double_unit_{size}", np.eye(size))
        last, before = self._graph.axis(-1), self._graph.axis(-2)
        diagonal = self.multiply(a, unit)
        beside, below = (self._add("ReduceSum", [diagonal, axis], keepdims=1) for axis in (last, before))
        scales = self.multiply(self.root(beside), self.root(below))
        logs = [self.log(below)]
        a = self.divide(a, scales)
        for k in range(size):
            ends = self._graph.shape(f"place_{k}", [k]), self._graph.shape(f"place_{k + 1}", [k + 1])
            column = self._add("Slice", [a, *ends, last])
            row = self._add("Slice", [a, *ends, before])
            pivot = self._add("Slice", [column, *ends, before])
            logs.append(self.log(pivot))
            scaled = self.divide(self.add(row, self._add("Slice", [unit, *ends, before])), pivot)
            apart = self.subtract(column, self._add("Slice", [unit, *ends, last]))
            a = self.subtract(a, self.multiply(apart, scaled))
        every, axes = self._add("Concat", logs, axis=-1), self._graph.shape("matrix_axes", [-2, -1])
        return self.divide(a, scales), self._add("ReduceSum", [every, axes], keepdims=0)

    def within(self, stem: str, numbers: Mapping[str, NDArray], *, short: bool = False) -> OnnxArithmetic:
        return OnnxArithmetic(self._graph, numbers, stem, self.half, short)

    def affine(self, a: str, weights: str, bias: str) -> str:
        return self._add("Gemm", [a, weights, bias])

    def softmax(self, a: str) -> str:
        return self._add("Softmax", [a], axis=-1)

    def larger(self, a: str, b: str) -> str:
        return self._add("Max", [a, b])

    def smaller(self, a: str, b: str) -> str:
        return self._add("Min", [a, b])

    def double(self, value: float | Sequence[float]) -> str:
        words = "_".join(map(repr, np.ravel(value).tolist()))
        return str(self._graph.number(f"constant.double_{words}", np.array(value, np.float64)))

    def above(self, a: str, b: str) -> str:
        return self._add("Greater", [a, b])

    def as_number(self, condition: str) -> str:
        return self._cast(condition, FLOAT)

    def marks(self, chosen: Sequence[bool]) -> str:
        word = "".join("01"[mark] for mark in chosen)
        return str(self._graph.number(f"constant.marks_{word}", np.array(chosen, np.bool_)))

    def floor(self, a: str) -> str:
        return self._add("Floor", [a])

    def rounded(self, a: str) -> str:
        return self._add("Round", [a])

    def rounded_to_single(self, a: str) -> str:
        single = self._cast(a, FLOAT)
        double = self._cast(single, DOUBLE)
        self._rounded[double] = single
        return double

    def split(self, a: str, name: str, sizes: Sequence[int]) -> list[str]:
        self._count += 1
        node = f"{self._stem}/{self._count:03d}_split"
        names = [f"{node}_{i}" for i in range(len(sizes))]
        return [
            str(part) for part in self._graph.add_many("Split", [a, self.number(name)], node, names, axis=1)
        ]

    def ascending(self, a: str, size: int) -> str:
        self._count += 1
        names = [f"{self._stem}/{self._count:03d}_{name}" for name in ("ascending", "order")]
        inputs, name = [a, self._graph.shape(f"place_{size}", [size])], names[0]
        return str(self._graph.add_many("TopK", inputs, name, names, axis=-1, largest=0, sorted=1)[0])

    def taken(self, a: str, places: str) -> str:
        return self._add("GatherElements", [a, self._cast(places, INT64)], axis=-1)

    def step(
        self,
        values: Sequence[str],
        run: Callable[..., NDArray],
        write: Callable[[Any, Sequence[str], str], str] | None,
    ) -> str:
        if write is None:
            raise ModelError(
                f"a step of {self._stem} does not say how it is written as ONNX nodes, and a model folder keeps its "
                "experts in such a file; give `write` to `step`, or describe the expert by other steps"
            )
        return write(self._graph, values, self._stem)
