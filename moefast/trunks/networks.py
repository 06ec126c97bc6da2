"""Trunks, and the heads and the gate on them: what is computed, and what numbers it takes.

A trunk turns what it sees of a star into an embedding e; from this

    head k:   (m_k, ln σ_k) = V_k max(0, W_k e + b_k) + c_k,     log g of expert k = mean + spread · m_k,
    gate:     logits = B tanh(A (e, lines, ln s) + a) + b,

for the K bins of the grid. One more head speaks in all metal-poor bins at once: (m, ln σ) is added to theirs, since
what these bins hold is too little to learn the same thing three times.

    pca-mlp   noise-white components, u = z/√(v + s²) with v their variance over stars: pre-norm residual layers
    cnn       flux in units of its mean noise: convolutions without padding, stride of half a kernel, one dense layer
    vit       the same flux in patches: tokens with learned positions and one more whose start is a function of ln s;
              pre-norm attention of heads of 32 and residual layers; e is what that token has become

The noise of a star enters as the one number s; σ is never seen pixel by pixel.

Design: functions of an `Arithmetic`, see there. `shapes` says which numbers a network has, and is what a file is
checked against; `start` draws them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moefast.ops.arithmetic import HEAD, Arithmetic

__all__ = ["KINDS", "SEES_FLUX", "Kind", "NetworkPlan", "answer", "embed", "shapes", "start"]

F32 = NDArray[np.float32]
Kind = Literal["pca-mlp", "cnn", "vit"]
KINDS = get_args(Kind)
SEES_FLUX: Mapping[Kind, bool] = {"pca-mlp": False, "cnn": True, "vit": True}
"""Whether a trunk sees pixels rather than components."""

KERNELS = (16, 8, 8)
LARGEST_MEAN, LARGEST_LOG_SD, LEAST_LOG_SD = 3.0, 1.0, -6.0
"""Bounds of a head's answers, in units of the spread of log g: networks extrapolate without limit."""
LARGEST_LINE = 5.0
"""Bound of a standardised line feature: noise can make a continuum nearly zero."""
N_LINES = 9
POSITION = 2.0
"""Spread of the first positions of tokens, whose noise is √2: what a token says depends on where it lies. A small
transformer of 800 steps on 20 000 stars has R² 0.38, 0.43 and 0.45 with 0.02, as for images, 0.7 and 2."""


@dataclass(frozen=True)
class NetworkPlan:
    """Kind and sizes of a network.

    Attributes
    ----------
    kind : "pca-mlp", "cnn" or "vit"
    n_inputs : int
        Components r, or pixels p.
    n_experts : int
        K.
    width, depth : int
        Of the embedding; residual layers (of the cnn: channels of a convolution; it has three).
    patch : int
        Pixels of a token.
    head, gate : int
        Hidden units of a head and of the gate.
    """

    kind: Kind
    n_inputs: int
    n_experts: int
    width: int = 256
    depth: int = 2
    patch: int = 32
    head: int = 32
    gate: int = 64

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a trunk is one of {', '.join(KINDS)}; found {self.kind!r}")
        sizes = (self.n_inputs, self.n_experts, self.width, self.depth, self.patch, self.head, self.gate)
        if min(sizes) < 1:
            raise ValueError(f"all sizes of a network are positive; found {self}")
        if self.kind == "vit" and (self.n_inputs % self.patch or self.width % HEAD):
            raise ValueError(
                f"a vit takes whole patches and a width of whole heads of {HEAD}; found {self.n_inputs} pixels in "
                f"patches of {self.patch}, width {self.width}"
            )
        if self.kind == "cnn" and self.places < 1:
            raise ValueError(f"{self.n_inputs} pixels are too few for kernels of {KERNELS}")

    @property
    def sees_flux(self) -> bool:
        """Whether it sees pixels rather than components."""
        return SEES_FLUX[self.kind]

    @property
    def places(self) -> int:
        """Places that the last convolution gives."""
        n = self.n_inputs
        for kernel in KERNELS:
            n = n // (kernel // 2) - 1
        return n


def shapes(plan: NetworkPlan) -> dict[str, tuple[int, ...]]:
    """Shape of every number of a network, by name; the scales of inputs and outputs among them."""
    w, k, r = plan.width, plan.n_experts, plan.n_inputs
    found: dict[str, tuple[int, ...]] = {
        "level.limits": (2,), "level.scale": (2,), "lines.scale": (2, N_LINES), "log_g.scale": (2,),
        "metal_poor": (k, 1),
    }  # fmt: skip

    def dense(name: str, n_in: int, n_out: int) -> None:
        found.update({f"{name}.w": (n_in, n_out), f"{name}.b": (n_out,)})

    def norm(name: str) -> None:
        found.update({f"{name}.scale": (w,), f"{name}.shift": (w,)})

    if plan.kind == "pca-mlp":
        found["variance"] = (r,)
        dense("in", r + 1, w)
        for i in range(plan.depth):
            norm(f"{i}.norm")
            dense(f"{i}.up", w, w)
            dense(f"{i}.down", w, w)
        norm("out")
    else:
        found |= {"reference": (r,), "inverse_noise": (r,)}
    if plan.kind == "cnn":
        before = 1
        for i, kernel in enumerate(KERNELS):
            c = plan.depth * (2 if i == 1 else 1)
            found |= {f"{i}.w": (c, before, kernel), f"{i}.b": (c,)}
            before = c
        dense("in", before * plan.places + 1, w)
    if plan.kind == "vit":
        dense("patch", plan.patch, w)
        found["positions"] = (r // plan.patch, w)
        dense("first", 1, w)
        for i in range(plan.depth):
            norm(f"{i}.attention")
            dense(f"{i}.queries", w, w)
            dense(f"{i}.keys", w, w)
            dense(f"{i}.values", w, w)
            dense(f"{i}.back", w, w)
            norm(f"{i}.norm")
            dense(f"{i}.up", w, 2 * w)
            dense(f"{i}.down", 2 * w, w)
        norm("out")
    dense("gate.in", w + N_LINES + 1, plan.gate)
    dense("gate.out", plan.gate, k)
    dense("heads.in", w, (k + 1) * plan.head)
    found |= {"heads.w": (k + 1, plan.head, 2), "heads.b": (k + 1, 2)}
    return found


def start(plan: NetworkPlan, seed: int) -> dict[str, F32]:
    """Numbers before the fit: normal, of a size that keeps the variance from layer to layer; scales 1, shifts 0.

    The scales of inputs and outputs are those that leave them as they are; whoever fits puts its own.
    """
    rng = np.random.default_rng([seed, 3])
    found: dict[str, F32] = {}
    for name, shape in shapes(plan).items():
        if name.endswith(".w"):
            fan = int(np.prod(shape[1:])) if len(shape) == 3 and name != "heads.w" else shape[-2]
            # What is added to the residual stream, or is an answer, begins near zero.
            size = 0.1 if name.endswith((".down.w", ".back.w", "gate.out.w", "heads.w")) else np.sqrt(2)
            value = size / np.sqrt(fan) * rng.standard_normal(shape)
        elif name == "positions":
            value = POSITION * rng.standard_normal(shape)
        elif name.endswith((".scale", "variance", "inverse_noise")):
            value = np.ones(shape)
        else:
            value = np.zeros(shape)
        found[name] = value.astype(np.float32)
    for name in ("level.scale", "lines.scale", "log_g.scale"):
        found[name][0] = 0
    found["level.limits"][:] = -10, 10
    return found


def _dense(a: Arithmetic, x: Any, name: str) -> Any:
    return a.add(a.product(x, a.number(f"{name}.w")), a.number(f"{name}.b"))


def _norm(a: Arithmetic, x: Any, name: str) -> Any:
    return a.norm(x, a.number(f"{name}.scale"), a.number(f"{name}.shift"))


def _residual(a: Arithmetic, x: Any, i: int) -> Any:
    """X + W₂ max(0, W₁ norm(x) + b₁) + b₂."""
    inner = a.relu(_dense(a, _norm(a, x, f"{i}.norm"), f"{i}.up"))
    return a.add(x, _dense(a, inner, f"{i}.down"))


def _standardised(a: Arithmetic, x: Any, name: str) -> Any:
    """(x − mean)/spread, which `name` has in two rows."""
    scale = a.number(name)
    return a.divide(a.subtract(x, a.part(scale, 0, 0, 1)), a.part(scale, 0, 1, 2))


def embed(a: Arithmetic, plan: NetworkPlan, seen: Mapping[str, Any]) -> tuple[Any, Any]:
    """Embedding (n, width) and standardised noise level (n, 1).

    Parameters
    ----------
    a : Arithmetic
    plan : NetworkPlan
    seen : mapping
        `log_level` (n, 1), and z (n, r) or x (n, p), flux with the reference in the place of bad pixels; instead of x,
        `scaled` (n, p) if it is (x − reference) · inverse_noise already.
    """
    limits = a.number("level.limits")
    log_level = a.clip(seen["log_level"], a.part(limits, 0, 0, 1), a.part(limits, 0, 1, 2))
    level = _standardised(a, log_level, "level.scale")
    noise = a.exp(a.add(log_level, log_level))
    if plan.kind == "pca-mlp":
        u = a.divide(seen["z"], a.root(a.add(a.number("variance"), noise)))
        h = _dense(a, a.joined([u, level], 1), "in")
        for i in range(plan.depth):
            h = _residual(a, h, i)
        return _norm(a, h, "out"), level
    scaled = seen.get("scaled")
    if scaled is None:
        scaled = a.multiply(a.subtract(seen["x"], a.number("reference")), a.number("inverse_noise"))
    scaled = a.divide(scaled, a.root(a.add(noise, a.constant(1.0))))
    if plan.kind == "cnn":
        h = a.shaped(scaled, (1, plan.n_inputs))
        for i, kernel in enumerate(KERNELS):
            h = a.relu(a.convolve(h, a.number(f"{i}.w"), a.number(f"{i}.b"), kernel // 2))
        channels = shapes(plan)[f"{len(KERNELS) - 1}.b"][0]
        flat = a.joined([a.shaped(h, (channels * plan.places,)), level], 1)
        return a.relu(_dense(a, flat, "in")), level
    return _vit(a, plan, scaled, level), level


def _vit(a: Arithmetic, plan: NetworkPlan, scaled: Any, level: Any) -> Any:
    w, tokens = plan.width, plan.n_inputs // plan.patch
    of_heads = (tokens + 1, w // HEAD, HEAD)
    t = _dense(a, a.shaped(scaled, (tokens, plan.patch)), "patch")
    t = a.add(t, a.number("positions"))
    t = a.joined([a.shaped(_dense(a, level, "first"), (1, w)), t], 1)
    for i in range(plan.depth):
        inner = _norm(a, t, f"{i}.attention")
        queries, keys, values = (
            a.ordered(a.shaped(_dense(a, inner, f"{i}.{name}"), of_heads), (0, 2, 1, 3))
            for name in ("queries", "keys", "values")
        )
        found = a.ordered(a.attention(queries, keys, values), (0, 2, 1, 3))
        t = a.add(t, _dense(a, a.shaped(found, (tokens + 1, w)), f"{i}.back"))
        t = _residual(a, t, i)
    return _norm(a, a.shaped(a.part(t, 1, 0, 1), (w,)), "out")


def answer(a: Arithmetic, plan: NetworkPlan, seen: Mapping[str, Any]) -> tuple[Any, Any, Any, Any]:
    """Log g of each expert (n, K) and its 1σ (n, K), dex; logits of the gate (n, K); the embedding.

    Parameters
    ----------
    a, plan, seen
        As in `embed`, and the line features `lines` (n, 9).
    """
    k = plan.n_experts
    e, level = embed(a, plan, seen)
    bound = a.constant(LARGEST_LINE)
    lines = a.clip(_standardised(a, seen["lines"], "lines.scale"), a.constant(-LARGEST_LINE), bound)
    logits = _dense(a, a.tanh(_dense(a, a.joined([e, lines, level], 1), "gate.in")), "gate.out")
    # A sum, not a product of matrices: ONNX Runtime cannot multiply an empty batch of them.
    hidden = a.shaped(a.relu(_dense(a, e, "heads.in")), (k + 1, plan.head, 1))
    every = a.add(a.total(a.multiply(hidden, a.number("heads.w")), 2), a.number("heads.b"))
    poor = a.multiply(a.part(every, 1, k, k + 1), a.number("metal_poor"))
    own = a.add(a.part(every, 1, 0, k), poor)
    scale = a.number("log_g.scale")
    mean = a.clip(a.shaped(a.part(own, 2, 0, 1), (k,)), a.constant(-LARGEST_MEAN), a.constant(LARGEST_MEAN))
    log_sd = a.clip(
        a.shaped(a.part(own, 2, 1, 2), (k,)), a.constant(LEAST_LOG_SD), a.constant(LARGEST_LOG_SD)
    )
    spread = a.part(scale, 0, 1, 2)
    log_g = a.add(a.multiply(mean, spread), a.part(scale, 0, 0, 1))
    return log_g, a.multiply(a.exp(log_sd), spread), logits, e
