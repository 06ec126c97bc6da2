"""One description of a computation, several readers: NumPy runs it, torch fits it, ONNX carries it elsewhere.

Design: a network (`moefast.trunks.networks`) or a forward pass (`moefast.posterior.forward`) is a plain function of an
`Arithmetic` and of what it sees. The function never touches a number itself: it asks the arithmetic for products, norms
and shapes. NumPy does them at once, torch keeps what their gradients need, ONNX writes them down as nodes. So the
readers cannot drift apart. Values have the star as their first axis; shapes are given without it.

`SolvingArithmetic` adds what whole forward passes need: comparisons, logarithms, order statistics, and the elimination
of small symmetric positive definite matrices, which ONNX does not have and gets as unrolled steps. NumPy and ONNX read
it; torch does not need it. A step that is none of these, such as a forest, brings a function for each reader
(`SolvingArithmetic.step`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from moefast.core.errors import ModelError

__all__ = [
    "FIXED",
    "HEAD",
    "Arithmetic",
    "NumPyArithmetic",
    "OnnxArithmetic",
    "SolvingArithmetic",
    "TorchArithmetic",
    "is_half",
    "is_matrix",
]

EPSILON = 1e-5
"""Added to the variance in `norm`."""
FIXED = (
    "level.limits", "level.scale", "lines.scale", "log_g.scale", "metal_poor", "variance", "reference", "inverse_noise",
)  # fmt: skip
"""Numbers that are set, not fitted: scales of what goes in and comes out."""
HEAD = 32
"""Width of an attention head, d."""
FLOAT, INT64, BOOL, HALF, DOUBLE = 1, 7, 9, 10, 11
"""`onnx.TensorProto` types."""


def is_matrix(name: str, ndim: int) -> bool:
    """Whether a number of a network is one of its large ones: no bias, no scale."""
    return ndim > 1 and not name.endswith(".b") and name not in FIXED


def is_half(name: str, array: NDArray) -> bool:
    """Whether it is one that half precision holds exactly."""
    if not is_matrix(name, array.ndim):
        return False
    with np.errstate(over="ignore"):
        return np.array_equal(array.astype(np.float16).astype(np.float32), array)


class Arithmetic(Protocol):
    """What a network may do with values (n, …) and its own numbers."""

    def number(self, name: str) -> Any:
        """An array of the network."""
        ...

    def constant(self, value: float) -> Any:
        """A scalar."""
        ...

    def add(self, a: Any, b: Any) -> Any:
        """A + b, broadcast."""
        ...

    def subtract(self, a: Any, b: Any) -> Any:
        """A − b, broadcast."""
        ...

    def multiply(self, a: Any, b: Any) -> Any:
        """A · b, broadcast."""
        ...

    def divide(self, a: Any, b: Any) -> Any:
        """A / b, broadcast."""
        ...

    def product(self, a: Any, b: Any) -> Any:
        """Matrix product of the last two axes."""
        ...

    def total(self, a: Any, axis: int) -> Any:
        """Sum over an axis, which is gone then."""
        ...

    def exp(self, a: Any) -> Any:
        """Exponential."""
        ...

    def root(self, a: Any) -> Any:
        """Square root."""
        ...

    def relu(self, a: Any) -> Any:
        """max(0, a)."""
        ...

    def tanh(self, a: Any) -> Any:
        """Hyperbolic tangent."""
        ...

    def clip(self, a: Any, low: Any, high: Any) -> Any:
        """Between two numbers, given as `number` or `constant`."""
        ...

    def attention(self, queries: Any, keys: Any, values: Any) -> Any:
        """softmax(q kᵀ/√d) v of each head, all (n, heads, tokens, d)."""
        ...

    def norm(self, a: Any, scale: Any, shift: Any) -> Any:
        """Scale · (a − mean)/√(variance + EPSILON) + shift over the last axis."""
        ...

    def convolve(self, a: Any, weights: Any, bias: Any, stride: int) -> Any:
        """Of (n, c, length) with (c′, c, kernel), no padding."""
        ...

    def shaped(self, a: Any, shape: Sequence[int]) -> Any:
        """Another shape for each star."""
        ...

    def ordered(self, a: Any, axes: Sequence[int]) -> Any:
        """Axes in another order, the star's among them."""
        ...

    def joined(self, parts: Sequence[Any], axis: int) -> Any:
        """One after the other along an axis."""
        ...

    def part(self, a: Any, axis: int, first: int, stop: int) -> Any:
        """Some places of an axis."""
        ...


class SolvingArithmetic(Arithmetic, Protocol):
    """What a whole forward pass may do besides."""

    def within(self, stem: str, numbers: Mapping[str, NDArray], *, short: bool = False) -> SolvingArithmetic:
        """The same arithmetic with the numbers of a part of the model, whose names begin with `stem` in a file.

        `short`: matrices that half precision holds exactly are stored in it, and multiplied in it where that is asked
        for.
        """
        ...

    def affine(self, a: Any, weights: Any, bias: Any) -> Any:
        """A W + b of values (n, f)."""
        ...

    def softmax(self, a: Any) -> Any:
        """Exp(a) over its sum along the last axis."""
        ...

    def larger(self, a: Any, b: Any) -> Any:
        """The larger of a and b, broadcast."""
        ...

    def smaller(self, a: Any, b: Any) -> Any:
        """The smaller of a and b, broadcast."""
        ...

    def double(self, value: float | Sequence[float]) -> Any:
        """A scalar or a vector in double precision."""
        ...

    def above(self, a: Any, b: Any) -> Any:
        """Where a > b, broadcast; never where one is NaN."""
        ...

    def as_number(self, condition: Any) -> Any:
        """One where it holds, zero elsewhere."""
        ...

    def marks(self, chosen: Sequence[bool]) -> Any:
        """A vector of truth values."""
        ...

    def floor(self, a: Any) -> Any:
        """The next whole number below."""
        ...

    def rounded(self, a: Any) -> Any:
        """The nearest whole number, the even one of two."""
        ...

    def rounded_to_single(self, a: Any) -> Any:
        """Double precision rounded to the digits of single precision."""
        ...

    def split(self, a: Any, name: str, sizes: Sequence[int]) -> list[Any]:
        """Consecutive parts of values (n, …) along their second axis; their `sizes` are the number of that name."""
        ...

    def ascending(self, a: Any, size: int) -> Any:
        """Values (n, size) in ascending order along the last axis."""
        ...

    def taken(self, a: Any, places: Any) -> Any:
        """Values (n, …) at places (n, k) of the last axis, which are whole numbers."""
        ...

    def step(
        self,
        values: Sequence[Any],
        run: Callable[..., NDArray],
        write: Callable[[Any, Sequence[str], str], str] | None,
    ) -> Any:
        """A step of its own kind: `run(*values)` in NumPy, `write(graph, names, stem)` in ONNX.

        Parameters
        ----------
        values : sequence of values
        run : callable
            Takes arrays.
        write : callable, optional
            Adds nodes to a graph and returns the name of the result. Without it the step cannot be exported.

        Raises
        ------
        ModelError
            The step cannot be exported.
        """
        ...

    def log(self, a: Any) -> Any:
        """Natural logarithm."""
        ...

    def largest(self, a: Any, axis: int) -> Any:
        """Maximum over an axis, which is kept with length 1."""
        ...

    def at_most(self, a: Any, b: Any) -> Any:
        """Where a ≤ b, broadcast; never where one is NaN."""
        ...

    def both(self, a: Any, b: Any) -> Any:
        """Where both hold."""
        ...

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        """A where the condition holds, else b."""
        ...

    def absolute(self, a: Any) -> Any:
        """Absolute value."""
        ...

    def picked(self, a: Any, places: Any, axis: int) -> Any:
        """The entries at such places of an axis, places (…) of whole numbers read row by row."""
        ...

    def reshaped(self, a: Any, shape: Sequence[int]) -> Any:
        """Another shape for a number, which has no axis of stars."""
        ...

    def precise(self, a: Any) -> Any:
        """In double precision from here on."""
        ...

    def single(self, a: Any) -> Any:
        """In single precision from here on."""
        ...

    def inverse(self, a: Any, size: int) -> tuple[Any, Any]:
        """A⁻¹ and ln det A of symmetric positive definite matrices (…, size, size); ln det is (…,)."""
        ...


class NumPyArithmetic:
    """In NumPy, in the precision of `dtype`.

    Parameters
    ----------
    numbers : mapping of str to array
    dtype : float32 or float64
    """

    def __init__(self, numbers: Mapping[str, NDArray], dtype: Any = np.float64) -> None:
        self.dtype = np.dtype(dtype)
        self._numbers = {name: np.asarray(array, self.dtype) for name, array in numbers.items()}

    def number(self, name: str) -> NDArray:
        return self._numbers[name]

    def constant(self, value: float) -> Any:
        return self.dtype.type(value)

    def add(self, a: NDArray, b: NDArray) -> NDArray:
        return a + b

    def subtract(self, a: NDArray, b: NDArray) -> NDArray:
        return a - b

    def multiply(self, a: NDArray, b: NDArray) -> NDArray:
        return a * b

    def divide(self, a: NDArray, b: NDArray) -> NDArray:
        return a / b

    def product(self, a: NDArray, b: NDArray) -> NDArray:
        return np.matmul(a, b)

    def total(self, a: NDArray, axis: int) -> NDArray:
        return np.asarray(a.sum(axis))

    def exp(self, a: NDArray) -> NDArray:
        return np.exp(a)

    def root(self, a: NDArray) -> NDArray:
        return np.sqrt(a)

    def relu(self, a: NDArray) -> NDArray:
        return np.maximum(a, self.dtype.type(0))

    def tanh(self, a: NDArray) -> NDArray:
        return np.tanh(a)

    def clip(self, a: NDArray, low: Any, high: Any) -> NDArray:
        return np.minimum(np.maximum(a, low), high)

    def attention(self, queries: NDArray, keys: NDArray, values: NDArray) -> NDArray:
        weights = np.matmul(queries * self.dtype.type(keys.shape[-1] ** -0.5), np.swapaxes(keys, 2, 3))
        weights -= weights.max(-1, keepdims=True)
        np.exp(weights, out=weights)
        weights /= weights.sum(-1, keepdims=True)
        return np.matmul(weights, values)

    def norm(self, a: NDArray, scale: NDArray, shift: NDArray) -> NDArray:
        apart = a - a.mean(-1, keepdims=True)
        variance = np.einsum("...i,...i->...", apart, apart)[..., None] / self.dtype.type(a.shape[-1])
        apart /= np.sqrt(variance + self.dtype.type(EPSILON))
        apart *= scale
        apart += shift
        return apart

    def convolve(self, a: NDArray, weights: NDArray, bias: NDArray, stride: int) -> NDArray:
        c, before, kernel = weights.shape
        windows = sliding_window_view(a, kernel, axis=2)[:, :, ::stride]
        places = windows.transpose(0, 2, 1, 3).reshape(len(a), windows.shape[2], before * kernel)
        return np.swapaxes(np.matmul(places, weights.reshape(c, -1).T) + bias, 1, 2)

    def shaped(self, a: NDArray, shape: Sequence[int]) -> NDArray:
        return a.reshape(len(a), *shape)

    def ordered(self, a: NDArray, axes: Sequence[int]) -> NDArray:
        return a.transpose(axes)

    def joined(self, parts: Sequence[NDArray], axis: int) -> NDArray:
        return np.concatenate(parts, axis)

    def part(self, a: NDArray, axis: int, first: int, stop: int) -> NDArray:
        return a[(slice(None),) * axis + (slice(first, stop),)]

    def log(self, a: NDArray) -> NDArray:
        return np.log(a)

    def largest(self, a: NDArray, axis: int) -> NDArray:
        return a.max(axis, keepdims=True)

    def at_most(self, a: NDArray, b: NDArray) -> NDArray:
        return np.less_equal(a, b)

    def both(self, a: NDArray, b: NDArray) -> NDArray:
        return np.logical_and(a, b)

    def where(self, condition: NDArray, a: NDArray, b: NDArray) -> NDArray:
        return np.where(condition, a, b)

    def absolute(self, a: NDArray) -> NDArray:
        return np.abs(a)

    def picked(self, a: NDArray, places: NDArray, axis: int) -> NDArray:
        return np.take(a, places.astype(np.intp).reshape(-1), axis)

    def reshaped(self, a: NDArray, shape: Sequence[int]) -> NDArray:
        return a.reshape(shape)

    def precise(self, a: NDArray) -> NDArray:
        return np.asarray(a, np.float64)

    def single(self, a: NDArray) -> NDArray:
        return np.asarray(a, np.float32 if self.dtype == np.float32 else np.float64)

    def inverse(self, a: NDArray, size: int) -> tuple[NDArray, NDArray]:
        return np.linalg.inv(a), np.linalg.slogdet(a)[1]

    def within(self, stem: str, numbers: Mapping[str, NDArray], *, short: bool = False) -> NumPyArithmetic:
        return NumPyArithmetic(numbers, self.dtype)

    def affine(self, a: NDArray, weights: NDArray, bias: NDArray) -> NDArray:
        return a @ weights + bias

    def softmax(self, a: NDArray) -> NDArray:
        weights = np.exp(a - a.max(-1, keepdims=True))
        return np.asarray(weights / weights.sum(-1, keepdims=True))

    def larger(self, a: NDArray, b: NDArray) -> NDArray:
        return np.maximum(a, b)

    def smaller(self, a: NDArray, b: NDArray) -> NDArray:
        return np.minimum(a, b)

    def double(self, value: float | Sequence[float]) -> Any:
        return np.array(value, np.float64)

    def above(self, a: NDArray, b: NDArray) -> NDArray:
        return np.greater(a, b)

    def as_number(self, condition: NDArray) -> NDArray:
        return condition.astype(self.dtype)

    def marks(self, chosen: Sequence[bool]) -> NDArray:
        return np.array(chosen, np.bool_)

    def floor(self, a: NDArray) -> NDArray:
        return np.floor(a)

    def rounded(self, a: NDArray) -> NDArray:
        return np.round(a)

    def rounded_to_single(self, a: NDArray) -> NDArray:
        return a.astype(np.float32).astype(np.float64)

    def split(self, a: NDArray, name: str, sizes: Sequence[int]) -> list[NDArray]:
        return np.split(a, np.cumsum(sizes)[:-1], axis=1)

    def ascending(self, a: NDArray, size: int) -> NDArray:
        return np.sort(a, axis=-1)

    def taken(self, a: NDArray, places: NDArray) -> NDArray:
        return np.take_along_axis(a, places.astype(np.int64), axis=-1)

    def step(
        self,
        values: Sequence[NDArray],
        run: Callable[..., NDArray],
        write: Callable[[Any, Sequence[str], str], str] | None,
    ) -> NDArray:
        return np.asarray(run(*values), self.dtype)


class TorchArithmetic:
    """In torch, on the device of its tensors; under autocast, matrix products are in its precision.

    Parameters
    ----------
    torch : module
    numbers : mapping of str to tensor
    """

    def __init__(self, torch: Any, numbers: Mapping[str, Any]) -> None:
        self._torch, self._numbers = torch, numbers

    def number(self, name: str) -> Any:
        return self._numbers[name]

    def constant(self, value: float) -> float:
        return value

    def add(self, a: Any, b: Any) -> Any:
        return a + b

    def subtract(self, a: Any, b: Any) -> Any:
        return a - b

    def multiply(self, a: Any, b: Any) -> Any:
        return a * b

    def divide(self, a: Any, b: Any) -> Any:
        return a / b

    def product(self, a: Any, b: Any) -> Any:
        return a @ b

    def total(self, a: Any, axis: int) -> Any:
        return a.sum(axis)

    def exp(self, a: Any) -> Any:
        return a.exp()

    def root(self, a: Any) -> Any:
        return a.sqrt()

    def relu(self, a: Any) -> Any:
        return a.relu()

    def tanh(self, a: Any) -> Any:
        return a.tanh()

    def clip(self, a: Any, low: Any, high: Any) -> Any:
        return a.clamp(low, high)

    def attention(self, queries: Any, keys: Any, values: Any) -> Any:
        # Fused: the weights, a number for every pair of tokens, never go through memory.
        return self._torch.nn.functional.scaled_dot_product_attention(queries, keys, values)

    def norm(self, a: Any, scale: Any, shift: Any) -> Any:
        return self._torch.nn.functional.layer_norm(a, a.shape[-1:], scale, shift, EPSILON)

    def convolve(self, a: Any, weights: Any, bias: Any, stride: int) -> Any:
        return self._torch.nn.functional.conv1d(a, weights, bias, stride=stride)

    def shaped(self, a: Any, shape: Sequence[int]) -> Any:
        return a.reshape(a.shape[0], *shape)

    def ordered(self, a: Any, axes: Sequence[int]) -> Any:
        return a.permute(*axes)

    def joined(self, parts: Sequence[Any], axis: int) -> Any:
        return self._torch.cat(list(parts), axis)

    def part(self, a: Any, axis: int, first: int, stop: int) -> Any:
        return a.narrow(axis, first, stop - first)


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
