"""Every kind of mixture, written and read by the code of its kind: the one place that tells them apart."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from moefast.core.errors import ModelError
from moefast.export.graph import check, is_half, kind_of, part_of
from moefast.export.mixture_graph import build_experts, read_experts
from moefast.export.posterior_graph import build_posterior, read_posterior
from moefast.mixture import Mixture
from moefast.posterior.mixture import AnyMixture, PosteriorMixture

__all__ = ["build", "read_mixture"]

READERS: dict[str, Callable[[ModelProto, NDArray[np.float64]], AnyMixture]] = {
    Mixture.kind: read_experts,
    PosteriorMixture.kind: read_posterior,
}
"""By what the metadata say of the kind."""


def build(
    mixture: AnyMixture, part: str = "mixture", metadata: dict[str, str] | None = None, *, half: bool = False
) -> ModelProto:
    """Write a mixture, its gate or one of its experts as an ONNX model.

    Inputs are `flux` and `error`, float32 of shape (n, p) with any n, for a posterior 1 at least. Pixels that are not
    finite or whose error is not positive get zero weight; rows without a good pixel get NaN in every output.

    Parameters
    ----------
    mixture : Mixture or PosteriorMixture
    part : "mixture", "gate" or "expert-k"
        The mixture gives `log_g`, `log_g_err`, `weights`, `expert_log_g`, `log_g_err_raw`, `chi2` and `log_level`
        (see `moefast.mixture.Prediction`), and a posterior what it tells besides; the gate `weights`, expert
        k = 0 … K − 1 its `log_g` (not clipped unless it is a posterior's).
    metadata : dict of str to str, optional
        Added to the model's metadata.
    half : bool
        Products of the network in half precision, for other programs and where that is fast; its matrices as well,
        which a fitted network has rounded to it already. moefast does not read a mixture back from it.

    Raises
    ------
    ModelError
        Unknown part, a name in `metadata` that moefast sets itself, arrays that do not fit, or half precision for a
        mixture without a network.
    """
    if isinstance(mixture, PosteriorMixture):
        if half:
            raise ModelError("half precision is for networks, and a posterior has none; export it as it is")
        return build_posterior(mixture, part, metadata or {})
    return build_experts(mixture, part, metadata or {}, half=half)


def read_mixture(model: ModelProto, wave: NDArray[np.float64]) -> AnyMixture:
    """Read a mixture from the initializers of its ONNX model: the inverse of `build`, to the last bit.

    Parameters
    ----------
    model : ModelProto
        Made by `build` with part "mixture".
    wave : array of shape (p,), Å
        The wave grid that the mixture was fitted on.

    Raises
    ------
    ModelError
        An initializer is missing, has another shape or type, or is not finite; the wave grid is another one; the model
        holds a part of a mixture alone, or a mixture of an unknown kind.
    """
    check(model, "the ONNX model")
    part = part_of(model)
    if part != "mixture":
        raise ModelError(
            f"the ONNX model holds {part or 'something unknown'}, a whole mixture is needed; export that"
        )
    if is_half(model):
        raise ModelError(
            "the ONNX model is in half precision, from which a mixture cannot be read; use the folder"
        )
    if (kind := kind_of(model)) not in READERS:
        raise ModelError(
            f"the ONNX model holds a mixture of the kind {kind!r}, {' or '.join(READERS)} expected; install the "
            "moefast that wrote it"
        )
    return READERS[kind](model, wave)
