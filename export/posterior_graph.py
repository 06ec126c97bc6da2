"""A fitted posterior as an ONNX graph, and back.

Design: the graph is written by reading `moefast.posterior.forward` with an arithmetic whose values are names of nodes;
nothing of the forward pass is said here. Initializers are what `PosteriorMixture.stored` has, under the same names
after "posterior.", since an output is called labels as well. What the description asks for besides
(`PosteriorMixture.numbers`) is derived from them in the graph, in single precision and with the same rounding; runtimes
fold it into constants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from moefast.core.errors import ModelError
from moefast.core.outputs import by_onnx, words
from moefast.export.graph import Graph, Initializers, assemble, number_of_part, said
from moefast.ops.on_onnx import OnnxArithmetic
from moefast.posterior.cells import neighbouring_pixels
from moefast.posterior.correction import CORRECTION
from moefast.posterior.forward import Sizes, forward
from moefast.posterior.mixture import ORDER, SCALE_UNIT, PosteriorMixture

__all__ = ["build_posterior", "read_posterior"]

_WHOLE = ("first", "n_sky", "cells")
"""What is stored as whole numbers."""
_GIVEN = (
    "library_precision", "library_pull", "group_precision", "group_pull", "group_constant", "narrow_slopes",
    "narrow_variance", "behind_coordinates", "slopes_last",
)  # fmt: skip
"""What is derived from stored arrays before the export: matrices of the whole library, and where directions stand."""
_UNUSED: dict[str, NDArray] = {"n_sky": np.zeros(1, np.int64), "calibrated": np.zeros(1, np.float32)}
"""What graphs lack that have no use for it."""


class _Steps(OnnxArithmetic):
    """The forward pass as nodes; its numbers are derived from stored ones when they are first asked for."""

    def __init__(self, graph: Graph, mixture: PosteriorMixture) -> None:
        super().__init__(graph, {}, PosteriorMixture.kind)
        self.graph, self.mixture, self.sizes = graph, mixture, mixture.sizes
        stored = mixture.stored()
        for name, array in stored.items():
            expected = np.int64 if name in _WHOLE else np.float32
            if array.dtype != expected:
                raise ModelError(
                    f"{name} of the mixture is {array.dtype}, {np.dtype(expected)} expected; cast it before the export"
                )
        self._arrays = stored
        given = {name: partial(self._given, name) for name in _GIVEN}
        self._derived: Mapping[str, Callable[[], str]] = {
            "keys_transposed": cache(lambda: self.ordered(self.stored("keys"), (1, 0))),
            "tangents": cache(self._tangents),
            "tangents_transposed": cache(lambda: self.ordered(self.number("tangents"), (0, 2, 1))),
            "gains": cache(self._gains),
            "labels": cache(lambda: self._padded(self.stored("labels"), (0, 0, 0, 1), 1.0)),
            "scatter": cache(self._variances),
            "scatter_with_first": cache(self._covariances),
            "members": cache(lambda: self.single(self._is_member())),
            "others": cache(self._others),
            "lowest": cache(lambda: self.part(self.stored("label_range"), 0, 0, 1)),
            "highest": cache(lambda: self.part(self.stored("label_range"), 0, 1, 2)),
            "follows_noise": cache(self._follows_noise),
            "unit_nuisances": lambda: self._unit(self.sizes.n_nuisances),
            "unit_directions": lambda: self._unit(self.sizes.n_coordinates + self.sizes.n_nuisances),
            "unit_slopes": lambda: self._unit(self.sizes.n_slopes),
            "unit_coordinates": lambda: self._unit(self.sizes.n_coordinates),
            "unit_tangents": lambda: self._unit(self.sizes.n_tangents),
            **given,
        }

    def stored(self, name: str) -> str:
        """An initializer of the file."""
        return self.graph.number(f"{PosteriorMixture.kind}.{name}", self._arrays[name])

    def number(self, name: str) -> str:
        """See `PosteriorMixture.numbers`."""
        return self._derived[name]() if name in self._derived else self.stored(name)

    def _given(self, name: str) -> str:
        """What only decides where the likelihood is expanded, or how wide slopes are, and where they stand."""
        return self.graph.number(f"constant.{name}", self.mixture.numbers[name])

    def _padded(self, value: str, pads: tuple[int, ...], by: float = 0.0) -> str:
        name = "_".join(map(str, pads))
        return self._add("Pad", [value, self.graph.shape(f"pads_{name}", pads), self.constant(by)])

    def _unit(self, size: int) -> str:
        return self.graph.number(f"constant.unit_{size}", np.eye(size, dtype=np.float32))

    def _tangents(self) -> str:
        """Those of the clouds, and the change of a cloud's mean spectrum with the scale."""
        m, n = self.sizes.n_clouds, self.sizes.n_coordinates
        scale = np.zeros(n, np.float32)
        scale[-1] = 1 / SCALE_UNIT
        others = self.graph.number("constant.all_but_the_scale", (scale == 0).astype(np.float32))
        along = self.multiply(self.stored("keys"), others)
        along = self.add(along, self.graph.number("constant.scale", scale))
        along = self.multiply(self.stored("scale_width"), along)
        return self.joined([self.stored("tangents"), self.reshaped(along, (m, 1, n))], 1)

    def _gains(self) -> str:
        """Those of the clouds, and of the scale along its direction."""
        t, labels = self.sizes.n_tangents, self.sizes.n_labels
        own = self._padded(self.stored("gains"), (0, 0, 0, 0, 1, 1))
        width = self.reshaped(self.stored("scale_width"), (1, 1, 1))
        return self.add(own, self._padded(width, (0, t - 1, labels - 1, 0, 0, 0)))

    def _variances(self) -> str:
        own = self.multiply(self.stored("scatter"), self._unit(self.sizes.n_labels - 1))
        return self._padded(self.total(own, 2), (0, 0, 0, 1))

    def _covariances(self) -> str:
        m, labels = self.sizes.n_clouds, self.sizes.n_labels
        first = self.reshaped(self.part(self.stored("scatter"), 1, 0, 1), (m, labels - 1))
        return self._padded(first, (0, 0, 0, 1))

    def _is_member(self) -> str:
        """Which clouds (m, 1) lie between the bounds (K) of which expert."""
        g, k = self.graph, self.sizes.n_experts
        cloud = np.arange(self.sizes.n_clouds, dtype=np.int64)[:, None]
        first, stop = self.part(self.stored("first"), 0, 0, k), self.part(self.stored("first"), 0, 1, k + 1)
        after = self.at_most(first, g.number("constant.cloud", cloud))
        return self.both(after, self.at_most(g.number("constant.next_cloud", cloud + 1), stop))

    def _follows_noise(self) -> str:
        """1 for the last `n_sky` nuisances, (q,)."""
        g, q = self.graph, self.sizes.n_nuisances
        shifted = self.add(g.number("constant.nuisance", np.arange(q, dtype=np.int64)), self.stored("n_sky"))
        return self.single(self.at_most(g.shape("n_nuisances", [q]), shifted))

    def _others(self) -> str:
        mine = self.ordered(self._is_member(), (1, 0))
        return self.where(mine, self.constant(0.0), self.constant(-1e30))

    def prediction(self, found: Mapping[str, str]) -> dict[str, str]:
        """`PosteriorMixture.prediction` as nodes."""
        count, k = self.sizes.n_labels - 1, self.mixture.n_experts
        limits = self.precise(self.number("lowest")), self.precise(self.number("highest"))
        label, sd = found["label"], found["label_sd"]
        others = {name: self.part(found[name], 1, 1, count) for name in ("label", "label_sd", "label_cov")}
        first = self.part(sd, 1, 0, 1)
        factors = self.part(self.precise(self.stored("label_factors")), 0, 1, count)
        least = self.graph.number("constant.double_least_product", np.array(1e-12))
        ends = [self.graph.number(f"constant.double_{v}", np.array(v, np.float64)) for v in (-1, 1)]
        product = self._add("Max", [self.multiply(first, others["label_sd"]), least])
        correlation = self.clip(self.divide(others["label_cov"], product), *ends)
        scale = self.multiply(found["scale"], self.part(label, 1, count, count + 1))
        values = {
            "log_g": found["log_g"],
            "log_g_err": found["log_g_err"],
            "weights": self.part(found["weights"], 1, 0, k),
            "expert_log_g": self.clip(self.part(found["expert_label"], 1, 0, k), *limits),
            "log_g_err_raw": first,
            "chi2": found["chi2"],
            "log_level": found["log_level"],
            "distance": found["distance"],
            "strength": found["strength"],
            "scale": scale,
        }
        one = self.graph.number("constant.double_1", np.array(1.0))
        stellar = self.part(found["weights"], 1, 0, k + self.mixture.blends)
        known = self.shaped(self.total(stellar, 1), (1,))
        values["foreign"] = self.relu(self.subtract(one, known))
        if self.mixture.blends:
            values["blend"] = self.part(found["weights"], 1, k, k + 1)
        if count > 1:
            values["labels"] = others["label"]
            values["label_errors"] = self.multiply(others["label_sd"], factors)
            values["label_correlations"] = correlation
        return values

    def deliver(self, value: str, has_data: str, output: str, *, columns: bool) -> None:
        """Name an output in single precision; NaN in rows without a good pixel."""
        g = self.graph
        value = self.single(value)
        nothing = g.scalar("nan", float("nan"))
        if columns:
            g.add_many("Where", [has_data, value, nothing], f"deliver/{output}", [output])
            return
        column = g.add("Where", [has_data, value, nothing], f"deliver/{output}_column")
        g.add_many("Squeeze", [column, g.axis(1)], f"deliver/{output}", [output])


def build_posterior(mixture: PosteriorMixture, part: str, metadata: dict[str, str]) -> ModelProto:
    """Write a posterior, its gate or one of its experts as an ONNX model; see `moefast.export.build`."""
    steps = _Steps(Graph(), mixture)
    g, k = steps.graph, mixture.n_experts
    found = forward(steps, mixture.sizes, "flux", "error")
    values = steps.prediction(found)
    widths: dict[str, int | None] = dict.fromkeys(values)
    widths |= dict.fromkeys(("weights", "expert_log_g"), k)
    widths |= {name: len(mixture.label_names) - 1 for name in values if name.startswith("label")}
    if part == "gate":
        values = {"weights": values["weights"]}
    elif part != "mixture":
        number = number_of_part(k, part)
        values, widths = {"log_g": steps.part(values["expert_log_g"], 1, number, number + 1)}, {"log_g": None}
    has_data = steps.at_most(steps.precise(steps.constant(1.0)), found["n_good"])
    for name, value in values.items():
        steps.deliver(value, has_data, name, columns=widths[name] is not None)
    g.drop_unused(list(values))
    own: dict[str, Any] = {
        "kind": PosteriorMixture.kind,
        "label_names": ",".join(mixture.label_names),
        "n_foreign": str(mixture.n_foreign),
        **({"blends": "true"} if mixture.blends else {}),
        **({"n_fast": ",".join(map(str, mixture.n_fast))} if mixture.n_fast else {}),
        "flux_unit": "any; the scale is a nuisance",
    }
    return assemble(
        g,
        mixture.wave,
        part,
        {name: (widths[name], words(by_onnx(name))) for name in values},
        own=own,
        metadata=metadata,
        about=f"Labels: {', '.join(mixture.label_names)}; {_sizes_in_words(mixture.sizes)}.",
        what=f"the posterior over {mixture.sizes.n_clouds} clouds of spectra" if part == "mixture" else part,
    )


def _sizes_in_words(sizes: Sizes) -> str:
    return (
        f"{sizes.n_clouds} clouds of {sizes.n_experts} experts, {sizes.n_tangents} tangents each, in "
        f"{sizes.n_coordinates} coordinates, {sizes.n_nuisances} nuisances"
    )


def read_posterior(model: ModelProto, wave: NDArray[np.float64]) -> PosteriorMixture:
    """Read a posterior from its ONNX model; see `moefast.export.read_mixture`."""
    read = Initializers(model)
    names = tuple(said(model, "label_names").split(","))
    wave = np.ascontiguousarray(wave, np.float64)
    # The other shapes follow from these, and the mixture compares them.
    arrays: dict[str, NDArray] = {}
    corrects = f"{PosteriorMixture.kind}.{CORRECTION[0]}" in read
    for name in (*ORDER, *(CORRECTION if corrects else ())):
        if name in _UNUSED and f"{PosteriorMixture.kind}.{name}" not in read:
            arrays[name] = _UNUSED[name]
            continue
        if name in ("cells", "cell_shares") and f"{PosteriorMixture.kind}.{name}" not in read:
            # Graphs of before have cells of two neighbours.
            pairs = neighbouring_pixels(wave.size, 1 if wave.size % 2 else 2)
            arrays[name] = pairs[name == "cell_shares"]
            continue
        tensor = read.tensors.get(f"{PosteriorMixture.kind}.{name}")
        any_size = (None,) * (0 if tensor is None else len(tensor.dims))
        arrays[name] = read(
            f"{PosteriorMixture.kind}.{name}", *any_size, dtype=np.int64 if name in _WHOLE else np.float32
        )
    try:
        fast = tuple(int(n) for n in said(model, "n_fast").split(",") if n)
        return PosteriorMixture.from_stored(
            wave, arrays, names, n_foreign=int(said(model, "n_foreign")), blends=said(model, "blends") == "true",
            n_fast=fast,
        )  # fmt: skip
    except (ValueError, IndexError) as error:
        raise ModelError(f"the posterior of the ONNX model does not fit together: {error}") from error
