"""A fitted trunk with its heads and gate: log g of every expert, its error, and how much each counts.

Design: the mixture takes from it what it takes from a template library: values and errors in the place of the linear
experts' and logits for the gate. Stars are scored in tiles of a fixed number of rows, the last one filled up, so that
every product has the same shape: a star's number depends on that star alone. torch is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moefast.core.threads import in_threads, one_blas_thread
from moefast.experts.inputs import Inputs
from moefast.ops.arithmetic import NumPyArithmetic, OnnxArithmetic, is_matrix
from moefast.trunks.networks import KINDS, SEES_FLUX, Kind, Plan, answer, shapes

if TYPE_CHECKING:
    from typing import Self

__all__ = ["STEM", "Heads"]

F32 = NDArray[np.float32]
STEM = "heads"
TILE = {"pca-mlp": 64, "cnn": 16, "vit": 8}
"""Stars that are scored at once: their hidden values stay in the second cache."""


@dataclass(frozen=True)
class Heads:
    """A network by its plan and its numbers.

    Attributes
    ----------
    plan : Plan
    numbers : dict of str to array, float32
        See `moefast.trunks.networks.shapes`.

    Raises
    ------
    ValueError
        A number is missing, has another shape or type, or is not finite.
    """

    plan: Plan
    numbers: Mapping[str, F32]

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

    @cached_property
    def _single(self) -> NumPyArithmetic:
        return NumPyArithmetic(self.numbers, np.float32)

    def predict(self, inputs: Inputs) -> tuple[F32, F32, F32]:
        """Log g (n, K), its 1σ (n, K), dex, and logits (n, K), float32."""
        seen = self._seen(inputs, np.float32)
        n, k, tile = len(seen["log_level"]), self.n_experts, TILE[self.plan.kind]
        out = np.empty((3, n, k), np.float32)
        arithmetic = self._single

        # BLAS rounds differently at the edges of its own tiles: a star must be at the same place of a product however
        # the rows are shared out to threads.
        def run(first: int, stop: int) -> None:
            for begin in range(first * tile, stop * tile, tile):
                rows = slice(begin, min(begin + tile, n))
                few = rows.stop - begin
                block = {name: value[rows] for name, value in seen.items()}
                if few < tile:
                    block = {
                        name: np.concatenate([v, np.repeat(v[-1:], tile - few, 0)])
                        for name, v in block.items()
                    }
                # What a bad spectrum overflows stays in its own row.
                with np.errstate(over="ignore", invalid="ignore"):
                    found = answer(arithmetic, self.plan, block)
                for i in range(3):
                    out[i, rows] = found[i][:few]

        with one_blas_thread():
            in_threads(-(-n // tile), run, least=1)
        return out[0], out[1], out[2]

    def predict_reference(self, inputs: Inputs) -> tuple[NDArray, NDArray, NDArray]:
        """The same in plain NumPy and float64: the contract of `predict` and of the ONNX nodes."""
        return answer(NumPyArithmetic(self.numbers), self.plan, self._seen(inputs, np.float64))[:3]

    def _seen(self, inputs: Inputs, dtype: Any) -> dict[str, NDArray]:
        name = "x" if self.needs_flux else "z"
        spectrum = inputs.x if self.needs_flux else inputs.z
        if spectrum is None or spectrum.ndim != 2 or spectrum.shape[1] != self.plan.n_inputs:
            raise ValueError(
                f"a {self.plan.kind} sees {name} of shape (n, {self.plan.n_inputs}); "
                f"found {None if spectrum is None else spectrum.shape}"
            )
        seen = {name: spectrum, "log_level": inputs.log_level[:, None], "lines": inputs.lines}
        return {name: np.ascontiguousarray(value, dtype) for name, value in seen.items()}

    def add_nodes(self, graph: Any, inputs: Mapping[str, str], *, half: bool = False) -> tuple[str, str, str]:
        """Write itself into an ONNX graph; its numbers are the initializers `heads.{kind}.{name}`.

        Parameters
        ----------
        graph : moefast.export graph
        inputs : dict of str to str
            Names of the values z (n, r), log_level (n, 1), lines (n, 9) and x (n, p), of which it takes what it needs.
        half : bool
            Matrices in half precision; what is written cannot be read back then.

        Returns
        -------
        tuple of str
            Names of values (n, K): log g, 1σ, logits.
        """
        arithmetic = OnnxArithmetic(graph, self.numbers, f"{STEM}.{self.plan.kind}", half)
        return answer(arithmetic, self.plan, inputs)[:3]

    def rounded(self) -> Heads:
        """The network with matrices that half precision holds exactly: a model folder stores them in half the bytes."""

        def short(name: str, array: F32) -> F32:
            if not is_matrix(name, array.ndim) or np.abs(array).max() > np.finfo(np.float16).max:
                return array
            return array.astype(np.float16).astype(np.float32)

        return replace(self, numbers={name: short(name, array) for name, array in self.numbers.items()})

    @classmethod
    def read(cls, kind: Kind, names: Mapping[str, tuple[int, ...]], read: Callable[[str], F32]) -> Self:
        """From the shapes of numbers by name, and a function that gives them.

        Raises
        ------
        ValueError
            They do not fit together.
        """
        try:
            plan = _plan_of(kind, names)
        except (KeyError, IndexError, ZeroDivisionError) as error:
            raise ValueError(f"these are not the numbers of a {kind}: {error} is missing") from error
        return cls(plan, {name: read(name) for name in shapes(plan)})


def _plan_of(kind: Kind, names: Mapping[str, tuple[int, ...]]) -> Plan:
    """The plan whose network has numbers of these shapes."""
    if kind not in KINDS:
        raise ValueError(f"a trunk is one of {', '.join(KINDS)}; found {kind!r}")
    (experts, head, _), width = names["heads.w"], names["heads.in.w"][0]
    layers = sum(name.endswith(".up.w") for name in names)
    return Plan(
        kind,
        names["reference" if SEES_FLUX[kind] else "variance"][0],
        experts - 1,
        width=width,
        depth=names["0.b"][0] if kind == "cnn" else layers,
        patch=names["patch.w"][0] if kind == "vit" else Plan.patch,
        head=head,
        gate=names["gate.out.w"][0],
    )
