"""The arithmetic of descriptions in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from moefast.ops.arithmetic import EPSILON

__all__ = ["NumPyArithmetic"]


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
