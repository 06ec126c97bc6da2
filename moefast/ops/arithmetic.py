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
from numpy.typing import NDArray

__all__ = ["EPSILON", "FIXED", "HEAD", "Arithmetic", "SolvingArithmetic", "is_half", "is_matrix"]

EPSILON = 1e-5
"""Added to the variance in `norm`."""
FIXED = (
    "level.limits", "level.scale", "lines.scale", "log_g.scale", "metal_poor", "variance", "reference", "inverse_noise",
)  # fmt: skip
"""Numbers that are set, not fitted: scales of what goes in and comes out."""
HEAD = 32
"""Width of an attention head, d."""


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
