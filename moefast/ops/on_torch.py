"""The arithmetic of descriptions in torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moefast.ops.arithmetic import EPSILON

__all__ = ["TorchArithmetic"]


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
