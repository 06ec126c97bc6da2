"""A second tower of the gate: logits of its own, from other features than the first, or for faint stars alone.

    l = share · (tanh(f W₁ + b₁) W₂ + b₂),    share = min(1, max(0, (limit − snr_norm)/(RAMP · limit))),

added to the logits of the first tower. f are the features of the first, or the logarithms of the ten
`moefast.spectra.quality.quality_features`. Without a limit, share = 1.

Design: a tower with a limit works on the few stars below it, so it may be wide. Its share falls to zero on the last
hundredths before the limit: log g is continuous in flux, and stars beyond are scored to the last bit as without it.
The quality features are the only view of the error vector that a gate may have, rounded, since exact ones give log g
away. Their logarithms are multiples of a step; the graph counts in double precision up to there, so that no star falls
on another step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moefast.kernels import perceptron
from moefast.kernels.reference import perceptron_reference
from moefast.spectra.quality import QUALITY_FEATURES, QUALITY_STEP, quality_features

__all__ = ["RAMP", "Sees", "Tower", "quality_logs"]

F32 = NDArray[np.float32]
Sees = Literal["features", "quality"]

RAMP = 0.02
"""Part of the limit over which the share of a tower falls from one to zero."""
LEAST_LOG = -140
"""Smallest logarithm, in steps of `QUALITY_STEP`: that of a standard deviation of zero."""
_LAYERS = ("w1", "b1", "w2", "b2")


def quality_logs(error: NDArray, good: NDArray[np.bool_] | None = None) -> F32:
    """Logarithms of the ten quality features; sign(v) ln(1 + |v|) of skewness and kurtosis; all multiples of 0.1.

    Parameters
    ----------
    error : array of shape (n, p), float32
    good : array of shape (n, p), bool, optional
        Pixels to use; None = all.

    Returns
    -------
    array of shape (n, 10), float32
        NaN without good pixels.
    """
    features = quality_features(error, good).astype(np.float64)
    sizes, shape = features[:, :-2], features[:, -2:]
    logs = np.log(np.maximum(sizes, math.exp(LEAST_LOG * QUALITY_STEP)))
    logs = np.concatenate([logs, np.copysign(np.log1p(np.abs(shape)), shape)], axis=1)
    return (np.round(logs / QUALITY_STEP) * QUALITY_STEP).astype(np.float32)


@dataclass(frozen=True)
class Tower:
    """A perceptron on a view of a star, for all stars or for those below a signal-to-noise ratio.

    Attributes
    ----------
    sees : "features" or "quality"
        The features of the first tower, (n, f), or `quality_logs`, (n, 10).
    layers : tuple of arrays W₁ (f, h), b₁ (h,), W₂ (h, K), b₂ (K,), float32
    limit : float
        Largest snr_norm of the stars that it speaks to; inf for all.

    Raises
    ------
    ValueError
        Unknown view, layers that do not fit together, or a limit that is not positive.
    """

    sees: Sees
    layers: tuple[F32, F32, F32, F32]
    limit: float = math.inf

    def __post_init__(self) -> None:
        if self.sees not in get_args(Sees):
            raise ValueError(f"a tower sees one of {get_args(Sees)}; found {self.sees!r}")
        w1, b1, w2, b2 = self.layers
        if w1.shape[1:] != b1.shape or w2.shape != (b1.size, b2.size):
            raise ValueError(f"the layers of a tower do not fit together: {[a.shape for a in self.layers]}")
        if self.sees == "quality" and len(w1) != len(QUALITY_FEATURES):
            raise ValueError(f"a quality tower takes {len(QUALITY_FEATURES)} features; found {len(w1)}")
        if not self.limit > 0:
            raise ValueError(f"the limit of a tower must be positive; found {self.limit}")
        # As a file keeps it.
        object.__setattr__(self, "limit", float(np.float32(self.limit)))

    @property
    def n_features(self) -> int:
        """Features that it takes."""
        return self.layers[0].shape[0]

    @property
    def n_experts(self) -> int:
        """Logits that it gives."""
        return self.layers[3].size

    def share(self, snr_norm: NDArray) -> NDArray:
        """How much of its logits counts, in the dtype of `snr_norm`; none where that is NaN.

        Parameters
        ----------
        snr_norm : array of shape (n,)
        """
        if math.isinf(self.limit):
            return np.where(np.isnan(snr_norm), 0, 1).astype(snr_norm.dtype)
        width, limit = snr_norm.dtype.type(RAMP * self.limit), snr_norm.dtype.type(self.limit)
        share = np.clip((limit - snr_norm) / width, 0, 1)
        return np.where(np.isnan(share), 0, share).astype(snr_norm.dtype)

    def logits(
        self,
        snr_norm: NDArray,
        view: Callable[[NDArray[np.intp]], NDArray],
        *,
        reference: bool = False,
    ) -> NDArray:
        """What is added to the gate's logits, (n, K), in the dtype of `snr_norm`.

        Parameters
        ----------
        snr_norm : array of shape (n,)
        view : callable
            Gives what the tower sees of some rows, by their numbers.
        reference : bool
            In float64, without compiled code.
        """
        share = self.share(snr_norm)
        out = np.zeros((len(share), self.n_experts), share.dtype)
        rows = np.flatnonzero(share)
        if rows.size:
            seen = view(rows)
            found = perceptron_reference(seen, *self.layers) if reference else perceptron(seen, self.layers)
            out[rows] = share[rows, None] * found
        return out

    def add_nodes(self, graph: Any, inputs: Mapping[str, str], n_pixels: int) -> str:
        """Write itself into an ONNX graph; its numbers are the initializers `tower.{sees}.{name}`.

        Parameters
        ----------
        graph : moefast.export graph
        inputs : dict of str to str
            Names of the values features (n, f), snr_norm (n, 1), error and good (n, p), of which it takes what it
            needs.
        n_pixels : int
            p.

        Returns
        -------
        str
            Name of a value (n, K).
        """
        seen = inputs["features"] if self.sees == "features" else _quality_nodes(graph, inputs, n_pixels)
        w1, b1, w2, b2 = (
            graph.number(f"tower.{self.sees}.{name}", value)
            for name, value in zip(_LAYERS, self.layers, strict=True)
        )
        hidden = graph.add("Tanh", [graph.add("Gemm", [seen, w1, b1], "tower/hidden_sum")], "tower/hidden")
        logits = graph.add("Gemm", [hidden, w2, b2], "tower/output")
        if math.isinf(self.limit):
            return logits
        limit = graph.number(f"tower.{self.sees}.limit", np.array([self.limit], np.float32))
        below = graph.add("Sub", [limit, inputs["snr_norm"]], "tower/below_limit")
        width = graph.add("Mul", [limit, graph.scalar("tower_ramp", RAMP)], "tower/ramp")
        share = graph.add("Div", [below, width], "tower/share_as_found")
        share = graph.add("Max", [share, graph.scalar("zero", 0.0)], "tower/share_from_zero")
        share = graph.add("Min", [share, graph.scalar("one", 1.0)], "tower/share")
        return graph.add("Mul", [share, logits], "tower/logits")


def _quality_nodes(graph: Any, inputs: Mapping[str, str], n_pixels: int) -> str:
    """`quality_logs` of the good pixels, (n, 10): zeros in a row without any."""
    from onnx import TensorProto

    def double(value: str, name: str) -> str:
        return graph.add("Cast", [value], f"quality/{name}", to=TensorProto.DOUBLE)

    def number(name: str, value: float) -> str:
        return graph.number(f"constant.double_{name}", np.array(value, np.float64))

    def total(value: str, name: str) -> str:
        return graph.total(value, 1, f"quality/{name}", keep=True)

    def at_least(value: str, least: str, name: str) -> str:
        return graph.add("Max", [value, least], f"quality/{name}")

    zero, one = number("zero", 0.0), number("one", 1.0)
    good, error = inputs["good"], inputs["error"]
    tiny = number("tiny", 1e-300)
    used = double(graph.add("Where", [good, error, graph.scalar("zero", 0.0)], "quality/good_error"), "used")
    n_good = total(double(good, "weight"), "n_good")
    n = at_least(n_good, one, "n_good_or_one")
    whole = total(used, "sum")
    mean = graph.add("Div", [whole, n], "quality/mean")
    apart = graph.add(
        "Where", [good, graph.add("Sub", [used, mean], "quality/minus_mean"), zero], "quality/apart"
    )
    square = graph.add("Mul", [apart, apart], "quality/square")
    powers = {
        "second": square,
        "third": graph.add("Mul", [square, apart], "quality/cube"),
        "fourth": graph.add("Mul", [square, square], "quality/fourth_power"),
    }
    second, third, fourth = (
        graph.add("Div", [total(value, f"{name}_sum"), n], f"quality/{name}")
        for name, value in powers.items()
    )
    sd = graph.add("Sqrt", [second], "quality/sd")

    # Bad pixels are put behind the good ones, where no quantile reaches.
    last = graph.scalar("largest", float(np.finfo(np.float32).max))
    kept = graph.add("Where", [good, error, last], "quality/bad_last")
    width = graph.shape("n_pixels", [n_pixels])
    ordered, _ = graph.add_many(
        "TopK",
        [kept, width],
        "quality/sort",
        ["quality/ordered", "quality/order"],
        axis=1,
        largest=0,
        sorted=1,
    )
    quantiles = graph.number("constant.quantiles", np.array([[0.0, 0.25, 0.5, 0.75, 1.0]]))
    position = graph.add(
        "Mul", [graph.add("Sub", [n, one], "quality/last_good"), quantiles], "quality/position"
    )
    below = graph.add("Floor", [position], "quality/below")
    share = graph.add("Sub", [position, below], "quality/share_above")
    above = graph.add(
        "Min",
        [graph.add("Add", [below, one], "quality/next"), graph.add("Sub", [n, one], "quality/last")],
        "quality/above",
    )

    def pick(places: str, name: str) -> str:
        index = graph.add("Cast", [places], f"quality/{name}_index", to=TensorProto.INT64)
        return double(graph.add("GatherElements", [ordered, index], f"quality/{name}_picked", axis=1), name)

    low, high = pick(below, "low"), pick(above, "high")
    step = graph.add("Mul", [share, graph.add("Sub", [high, low], "quality/gap")], "quality/step")
    found = graph.add("Add", [low, step], "quality/quantiles")

    def kept32(value: str, name: str) -> str:
        """Rounded to float32, as `quality_features` are before their logarithms are taken."""
        single = graph.add("Cast", [value], f"quality/{name}_32", to=TensorProto.FLOAT)
        return double(single, f"{name}_as_kept")

    names = ("min", "q25", "median", "q75", "max")
    parts = graph.add_many(
        "Split",
        [found, graph.shape("ones_of_quantiles", [1] * 5)],
        "quality/split",
        [f"quality/{q}" for q in names],
        axis=1,
    )
    by_name = dict(zip(names, parts, strict=True)) | {"mean": mean, "std": sd, "sum": whole}
    # Where all errors are equal, what is left of the powers is rounding.
    spread = graph.add("Greater", [by_name["max"], by_name["min"]], "quality/spread")
    by_name["std"] = graph.add("Where", [spread, sd, zero], "quality/std")
    sizes = graph.add("Concat", [by_name[name] for name in QUALITY_FEATURES[:-2]], "quality/sizes", axis=1)
    sizes = kept32(sizes, "sizes")
    floor = number("least_quality", math.exp(LEAST_LOG * QUALITY_STEP))
    size_logs = graph.add("Log", [at_least(sizes, floor, "sizes_or_floor")], "quality/size_logs")

    skew = graph.add(
        "Div",
        [third, at_least(graph.add("Mul", [second, sd], "quality/sd3"), tiny, "sd3_or_tiny")],
        "quality/skew",
    )
    flat = graph.add(
        "Div",
        [fourth, at_least(graph.add("Mul", [second, second], "quality/sd4"), tiny, "sd4_or_tiny")],
        "quality/flat",
    )
    kurtosis = graph.add("Sub", [flat, number("three", 3.0)], "quality/excess")
    shape = graph.add("Concat", [skew, kurtosis], "quality/shape_as_found", axis=1)
    shape = kept32(graph.add("Where", [spread, shape, zero], "quality/shape_or_zero"), "shape")
    shape_logs = graph.add(
        "Log",
        [graph.add("Add", [graph.add("Abs", [shape], "quality/shape_size"), one], "quality/one_more")],
        "quality/shape_logs",
    )
    positive = graph.add("Greater", [shape, zero], "quality/positive")
    mirrored = graph.add("Sub", [zero, shape_logs], "quality/mirrored")
    shape_logs = graph.add("Where", [positive, shape_logs, mirrored], "quality/signed_shape_logs")

    logs = graph.add("Concat", [size_logs, shape_logs], "quality/exact_logs", axis=1)
    grid = number("quality_step", QUALITY_STEP)
    steps = graph.add("Round", [graph.add("Div", [logs, grid], "quality/in_steps")], "quality/steps")
    return graph.add(
        "Cast",
        [graph.add("Mul", [steps, grid], "quality/rounded_logs")],
        "quality/logs",
        to=TensorProto.FLOAT,
    )
