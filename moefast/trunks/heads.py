"""A fitted trunk with its heads and gate: log g of every expert, its error, and how much each counts.

Design: the mixture takes from it what it takes from a template library: values and errors in the place of the linear
experts' and logits for the gate. Stars are scored in tiles of a fixed number of rows, the last one filled up, so that
every product has the same shape: a star's number depends on that star alone. torch is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moefast.experts.protocol import Expert, ExpertValues, Inputs, expert, in_tiles, read_initializers
from moefast.ops.arithmetic import SolvingArithmetic, is_matrix
from moefast.ops.on_numpy import NumPyArithmetic
from moefast.trunks.networks import KINDS, SEES_FLUX, Kind, NetworkPlan, answer, shapes

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["STEM", "Heads"]

F32 = NDArray[np.float32]
STEM = "heads"
TILE = {"pca-mlp": 64, "cnn": 16, "vit": 8}
"""Stars that are scored at once: their hidden values stay in the second cache."""


@expert
@dataclass(frozen=True)
class Heads(Expert):
    """A network by its plan and its numbers.

    Attributes
    ----------
    plan : NetworkPlan
    numbers : dict of str to array, float32
        See `moefast.trunks.networks.shapes`.

    Raises
    ------
    ValueError
        A number is missing, has another shape or type, or is not finite.
    """

    plan: NetworkPlan
    numbers: Mapping[str, F32]

    family: ClassVar[str] = "heads"
    short: ClassVar[bool] = True
    has_noise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        expected = shapes(self.plan)
        if expected.keys() != self.numbers.keys():
            other = sorted(expected.keys() ^ self.numbers.keys())
            raise ValueError(f"a {self.plan.kind} of {self.plan} has other numbers: {', '.join(other)}")
        for name, shape in expected.items():
            found = self.numbers[name]
            if found.shape != shape or found.dtype != np.float32 or not np.isfinite(found).all():
                raise ValueError(
                    f"{name} of a {self.plan.kind} must be finite, float32 and of shape {shape}; "
                    f"found {found.dtype} {found.shape}"
                )

    @property
    def n_experts(self) -> int:
        """Number of experts K."""
        return self.plan.n_experts

    @property
    def needs_flux(self) -> bool:
        """Whether `Inputs.x` must be given."""
        return self.plan.sees_flux

    @property
    def stem(self) -> str:
        """A mixture has one network; its kind is part of the name."""
        return f"{STEM}.{self.plan.kind}"

    @property
    def words(self) -> str:
        """The kind of network, for messages."""
        return f"a {self.plan.kind} with heads"

    def check(self, n_experts: int, n_components: int, n_pixels: int) -> None:
        """See `Expert.check`."""
        size = n_pixels if self.needs_flux else n_components
        if self.n_experts != n_experts or self.plan.n_inputs != size:
            raise ValueError(
                f"a trunk for {size} {'pixels' if self.needs_flux else 'components'} with {n_experts} heads expected; "
                f"found {self.plan.n_inputs} and {self.n_experts}"
            )

    def describe(self, op: SolvingArithmetic, seen: Mapping[str, Any]) -> ExpertValues:
        """Log g, its 1σ, dex, and logits of the gate, each (n, K); see `moefast.trunks.networks.answer`."""
        return ExpertValues(*answer(op, self.plan, seen)[:3])

    @cached_property
    def _single(self) -> NumPyArithmetic:
        return NumPyArithmetic(self.numbers, np.float32)

    def evaluate(self, inputs: Inputs) -> ExpertValues:
        """See `Expert.evaluate`."""
        seen, single = self._seen(inputs).columns(np.float32), self._single
        return in_tiles(lambda block: self.describe(single, block), seen, TILE[self.plan.kind])

    def evaluate_reference(self, inputs: Inputs) -> ExpertValues:
        """See `Expert.evaluate_reference`."""
        return super().evaluate_reference(self._seen(inputs))

    def _seen(self, inputs: Inputs) -> Inputs:
        name = "x" if self.needs_flux else "z"
        spectrum = inputs.x if self.needs_flux else inputs.z
        if spectrum is None or spectrum.ndim != 2 or spectrum.shape[1] != self.plan.n_inputs:
            raise ValueError(
                f"a {self.plan.kind} sees {name} of shape (n, {self.plan.n_inputs}); "
                f"found {None if spectrum is None else spectrum.shape}"
            )
        return inputs

    def of_bin(self, k: int) -> None:
        """A trunk has no parts."""

    def arrays(self) -> dict[str, NDArray]:
        """All numbers by name."""
        return dict(self.numbers)

    def rounded(self) -> Heads:
        """The network with matrices that half precision holds exactly: a model folder stores them in half the bytes."""

        def short(name: str, array: F32) -> F32:
            if not is_matrix(name, array.ndim) or np.abs(array).max() > np.finfo(np.float16).max:
                return array
            return array.astype(np.float16).astype(np.float32)

        return replace(self, numbers={name: short(name, array) for name, array in self.numbers.items()})

    @classmethod
    def read_nodes(cls, model: ModelProto, stem: str) -> Heads:
        """From an ONNX model, to the last bit.

        Raises
        ------
        ModelError
            Numbers are missing, or do not fit together.
        """
        kind, sizes = stem.removeprefix(f"{STEM}."), {}
        for tensor in model.graph.initializer:
            if tensor.name.startswith(f"{stem}."):
                sizes[tensor.name.removeprefix(f"{stem}.")] = tuple(tensor.dims)

        def make(read: Callable[[str], NDArray]) -> Heads:
            try:
                plan = _plan_of(kind, sizes)  # type: ignore[arg-type]
            except (KeyError, IndexError, ZeroDivisionError) as error:
                raise ValueError(f"these are not the numbers of a {kind}: {error} is missing") from error
            numbers = {}
            for name, shape in shapes(plan).items():
                value = read(name)
                halved = is_matrix(name, value.ndim) and value.dtype == np.float16
                if value.shape != shape or not (halved or value.dtype == np.float32):
                    raise ValueError(f"{name} is {value.dtype} {value.shape}, float32 {shape} expected")
                numbers[name] = value.astype(np.float32)
            return cls(plan, numbers)

        return read_initializers(make, model, stem, "network")


def _plan_of(kind: Kind, names: Mapping[str, tuple[int, ...]]) -> NetworkPlan:
    """The plan whose network has numbers of these shapes."""
    if kind not in KINDS:
        raise ValueError(f"a trunk is one of {', '.join(KINDS)}; found {kind!r}")
    (experts, head, _), width = names["heads.w"], names["heads.in.w"][0]
    layers = sum(name.endswith(".up.w") for name in names)
    return NetworkPlan(
        kind,
        names["reference" if SEES_FLUX[kind] else "variance"][0],
        experts - 1,
        width=width,
        depth=names["0.b"][0] if kind == "cnn" else layers,
        patch=names["patch.w"][0] if kind == "vit" else NetworkPlan.patch,
        head=head,
        gate=names["gate.out.w"][0],
    )
