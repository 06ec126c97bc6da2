"""What an expert may see of a star, and what an expert that is not linear must be able to do.

Design: linear experts and template libraries are arrays of the mixture, which the kernels know. Every other family is
one class with the protocol below: it predicts, it has a plain float64 twin, it writes itself as ONNX nodes and is read
back from these, so that the ONNX file stays the only home of a model's numbers. Where in the nodes they lie is the
family's own business: most operators take them as initializers, tree ensembles as attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import ModelError

if TYPE_CHECKING:
    from typing import Self

    from onnx import ModelProto

__all__ = ["Expert", "Inputs", "read_initializers"]

Own = TypeVar("Own")


class Inputs(NamedTuple):
    """What experts may see of n stars.

    Attributes
    ----------
    z : array of shape (n, r), float32
        Noise-white principal components.
    log_level : array of shape (n,), float32
        ln s, the noise level over that of the training set.
    lines : array of shape (n, 9), float32
        `moefast.gating.features.LINE_FEATURES`.
    x : array of shape (n, p), float32, or None
        Flux as it is, with the reference spectrum in the place of bad pixels; only for experts with `needs_flux`.
    value, linear : array of shape (n,), float32, dex, or None
        Log g of the expert beside which a residual stands, and of the linear expert of the same bin; only for residuals
        that say so.
    """

    z: NDArray
    log_level: NDArray
    lines: NDArray
    x: NDArray | None = None
    value: NDArray | None = None
    linear: NDArray | None = None


class Expert(Protocol):
    """An expert that is neither linear nor a template library; log g in dex."""

    family: ClassVar[str]

    @property
    def needs_flux(self) -> bool:
        """Whether `Inputs.x` must be given."""
        ...

    def predict(self, inputs: Inputs) -> NDArray:
        """Log g of each star, (n,), float32."""
        ...

    def predict_reference(self, inputs: Inputs) -> NDArray:
        """The same in plain NumPy and float64, (n,): the contract of `predict` and of the ONNX nodes."""
        ...

    def arrays(self) -> dict[str, NDArray]:
        """Everything that it is made of, float32 or int64, by name."""
        ...

    @classmethod
    def from_arrays(cls, read: Callable[[str], NDArray]) -> Self:
        """The inverse of `arrays`; ValueError where they do not fit together."""
        ...

    def add_nodes(self, graph: Any, inputs: Mapping[str, str], stem: str) -> str:
        """Write itself into an ONNX graph.

        Parameters
        ----------
        graph : moefast.export graph
        inputs : dict of str to str
            Names of the values z (n, r), log_level (n, 1), lines (n, 9), x (n, p), and value and linear (n, 1), as in
            `Inputs`.
        stem : str
            What the names of its nodes and initializers begin with.

        Returns
        -------
        str
            Name of a value (n, 1).
        """
        ...

    @classmethod
    def read_nodes(cls, model: ModelProto, stem: str) -> Self:
        """The inverse of `add_nodes`, to the last bit; ModelError where the nodes are not as it writes them."""
        ...


def read_initializers(
    make: Callable[[Callable[[str], NDArray]], Own], model: ModelProto, stem: str, what: str
) -> Own:
    """What `make(read)` makes of the initializers `{stem}.{name}`, `read(name)` giving an array.

    Parameters
    ----------
    make : callable
        Raises ValueError or TypeError where they do not fit together.
    model : ModelProto
    stem : str
    what : str
        What is read, for messages.

    Raises
    ------
    ModelError
        An initializer is missing, or they do not fit together.
    """
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}

    def read(name: str) -> NDArray:
        tensor = tensors.get(f"{stem}.{name}")
        if tensor is None:
            raise ModelError(
                f"the ONNX model lacks the initializer '{stem}.{name}'; write it again with this moefast"
            )
        return np.array(numpy_helper.to_array(tensor))

    try:
        return make(read)
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"the {what} {stem!r} of the ONNX model cannot be read: {error}; write it again"
        ) from error
