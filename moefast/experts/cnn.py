"""A small convolutional network on the flux as an expert: fitted by torch, kept and scored without it.

    h₀ = (x − reference) · scale,    h_l = max(0, W_l ∗ h_{l−1} + b_l),  l = 1, 2, 3,
    log g = V₂ max(0, V₁ (h₃, ln s) + c₁) + c₂.

Design: convolutions have no padding and a stride of half their kernel, so that 4096 pixels become 511, 126 and 30
places. Then one convolution is two matrix products, of all pieces of half a kernel with the first half of the weights
and with the second, without a copy of any window. Products are made star by star, of one shape: a star's number
depends on that star alone. `scale` is one over the mean noise of each pixel, so that the noise is white and of variance
s². The head sees every place on its own (a pixel of a spectrum at rest is a wavelength), and the noise level.

torch is needed to fit and for nothing else. Every epoch draws noise anew on clean spectra, and the step of the search
falls with a cosine to zero at the last one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import MoefastError
from moefast.core.random import DRAW_STREAM, add_noise
from moefast.core.threads import in_threads, one_blas_thread
from moefast.experts.protocol import CleanStars, Expert, ExpertValues, Inputs, expert
from moefast.ops.arithmetic import SolvingArithmetic

__all__ = ["ConvNet", "fit_conv_net", "n_places"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

CHANNELS = (32, 64, 32)
KERNELS = (16, 8, 8)
HIDDEN = 64
ROWS = 16
"""Stars whose first layer, 65 kB each, stays in the second cache."""
NOISE = DRAW_STREAM + 1
"""Stream of the noise that a fit draws: rows are counted on from epoch to epoch, and must meet no other draw."""
BATCH = 128
STEP, DECAY, LARGEST_GRADIENT = 2e-3, 1e-2, 1.0
"""Of AdamW: the largest step, after a warm-up over a twentieth of the fit; decay of the weights; norm of a gradient."""

_LAYERS = ("1", "2", "3")


def n_places(n_pixels: int, kernels: tuple[int, ...] = KERNELS) -> int:
    """Places that the last convolution gives of so many pixels; not positive if there are too few."""
    for kernel in kernels:
        n_pixels = n_pixels // (kernel // 2) - 1
    return n_pixels


@expert
@dataclass(frozen=True)
class ConvNet(Expert):
    """Three convolutions and a head; arrays are float32, weights in the layout of ONNX and torch.

    Attributes
    ----------
    reference, scale : arrays of shape (p,)
        Subtracted from flux; multiplied with what is left.
    w1, w2, w3 : arrays of shape (c, channels before, kernel)
        Kernels of even length; strides are half of it.
    b1, b2, b3 : arrays of shape (c,)
    v1 : array of shape (c · places + 1, h)
        Takes channel after channel, then ln s.
    c1, v2, c2 : arrays of shape (h,), (h, 1), (1,)

    Raises
    ------
    ValueError
        The arrays do not fit together, or are not finite.
    """

    reference: F32
    scale: F32
    w1: F32
    b1: F32
    w2: F32
    b2: F32
    w3: F32
    b3: F32
    v1: F32
    c1: F32
    v2: F32
    c2: F32

    family: ClassVar[str] = "cnn"
    requires: ClassVar[tuple[str, ...]] = ("torch",)

    def __post_init__(self) -> None:
        for name, array in self.arrays().items():
            if not isinstance(array, np.ndarray) or array.dtype != np.float32 or not np.isfinite(array).all():
                raise ValueError(f"{name} of a network must be finite and float32")
        before, shapes = 1, [self.reference.shape == self.scale.shape == (self.n_pixels,)]
        for w, b in self._convolutions:
            shapes.append(w.ndim == 3 and w.shape[:2] == (*b.shape, before) and w.shape[2] >= 2)
            shapes.append(w.shape[-1] % 2 == 0)
            before = b.size
        places = (
            n_places(self.n_pixels, tuple(w.shape[-1] for w, _ in self._convolutions)) if all(shapes) else 0
        )
        shapes.append(places > 0 and self.v1.shape == (before * places + 1, *self.c1.shape))
        shapes.append(self.v2.shape == (*self.c1.shape, 1) and self.c2.shape == (1,) and self.c1.ndim == 1)
        if not all(shapes):
            found = ", ".join(f"{name} {array.shape}" for name, array in self.arrays().items())
            raise ValueError(f"the arrays of a network do not fit together: {found}")

    @property
    def needs_flux(self) -> bool:
        """It sees pixels."""
        return True

    @property
    def n_pixels(self) -> int:
        """Number of pixels p."""
        return self.reference.size

    def check(self, n_experts: int, n_components: int, n_pixels: int) -> None:
        """See `Expert.check`."""
        if self.n_pixels != n_pixels:
            raise ValueError(f"a network for {n_pixels} pixels expected; found {self.n_pixels}")

    @property
    def _convolutions(self) -> tuple[tuple[F32, F32], ...]:
        return (self.w1, self.b1), (self.w2, self.b2), (self.w3, self.b3)

    @cached_property
    def _halves(self) -> list[tuple[F32, F32, F32]]:
        """First and second half of each kernel as matrices (half · channels before, c), and the biases."""
        found = []
        for w, b in self._convolutions:
            half = w.shape[2] // 2
            across = w.transpose(2, 1, 0)
            first, second = (
                np.ascontiguousarray(part).reshape(-1, w.shape[0]) for part in (across[:half], across[half:])
            )
            found.append((first, second, b))
        return found

    @cached_property
    def _head(self) -> tuple[F32, F32]:
        """V₁ of the places, one after the other, and of ln s."""
        places = self.v1[:-1].reshape(self.w3.shape[0], -1, self.c1.size)
        return np.ascontiguousarray(places.transpose(1, 0, 2)).reshape(-1, self.c1.size), self.v1[-1]

    def _flux(self, inputs: Inputs) -> NDArray:
        x = inputs.x
        if x is None or x.ndim != 2 or x.shape[1] != self.n_pixels:
            raise ValueError(
                f"this network sees flux of shape (n, {self.n_pixels}); found {None if x is None else x.shape}"
            )
        return x

    def evaluate(self, inputs: Inputs) -> ExpertValues:
        """Log g of each star, (n, 1), dex.

        Raises
        ------
        ValueError
            Flux is missing, or has another number of pixels.
        """
        x = np.asarray(self._flux(inputs), np.float32)
        level = np.asarray(inputs.log_level, np.float32)
        out = np.empty(len(x), np.float32)

        def run(first: int, stop: int) -> None:
            for begin in range(first, stop, ROWS):
                rows = slice(begin, min(begin + ROWS, stop))
                out[rows] = self._scored(x[rows], level[rows])

        # Before the threads begin: cached properties are made by one of them otherwise, or by all.
        _ = self._halves, self._head
        with one_blas_thread():
            in_threads(len(x), run, least=ROWS)
        return ExpertValues(out[:, None])

    def evaluate_reference(self, inputs: Inputs) -> ExpertValues:
        """The same in float64."""
        return super().evaluate_reference(inputs._replace(x=self._flux(inputs)))

    def _scored(self, x: F32, level: F32) -> F32:
        value = ((x - self.reference) * self.scale)[:, :, None]
        for first, second, bias in self._halves:
            n, length, channels = value.shape
            half = len(first) // channels
            pieces = value[:, : length // half * half].reshape(n, -1, half * channels)
            value = np.matmul(pieces[:, :-1], first)
            value += np.matmul(pieces[:, 1:], second)
            value += bias
            np.maximum(value, np.float32(0), out=value)
        places, of_level = self._head
        hidden = np.matmul(value.reshape(len(x), 1, -1), places)[:, 0]
        hidden += level[:, None] * of_level
        hidden += self.c1
        np.maximum(hidden, np.float32(0), out=hidden)
        return np.asarray((hidden * self.v2[:, 0]).sum(1) + self.c2[0])

    @classmethod
    def fit_clean(cls, stars: CleanStars, y: NDArray, *, seed: int) -> ConvNet:
        """A network for the stars of one bin; see `fit_conv_net`."""
        return fit_conv_net(
            stars.flux, stars.error, y, reference=stars.reference, noise_shape=stars.noise_shape, seed=seed
        )

    def describe(self, op: SolvingArithmetic, seen: Mapping[str, Any]) -> ExpertValues:
        """Convolutions and two matrix products; see `moefast.experts.protocol.Expert`."""
        value = op.multiply(op.subtract(seen["x"], op.number("reference")), op.number("scale"))
        value = op.shaped(value, (1, self.n_pixels))
        for layer, (w, _) in zip(_LAYERS, self._convolutions, strict=True):
            weights, bias = op.number(f"w{layer}"), op.number(f"b{layer}")
            value = op.relu(op.convolve(value, weights, bias, w.shape[2] // 2))
        features = op.joined([op.shaped(value, (self.v1.shape[0] - 1,)), seen["log_level"]], 1)
        hidden = op.relu(op.affine(features, op.number("v1"), op.number("c1")))
        return ExpertValues(op.affine(hidden, op.number("v2"), op.number("c2")))


# --- fitting ---------------------------------------------------------------------------------------------------


def fit_conv_net(
    flux: F32,
    error: F32,
    y: NDArray,
    *,
    reference: NDArray,
    noise_shape: NDArray,
    seed: int = 0,
    epochs: int = 30,
    minutes: float = 10.0,
    progress: Callable[[int, int], None] | None = None,
) -> ConvNet:
    """Fit a network to clean spectra with noise that is drawn anew in every epoch: min mean (log g − ŷ)².

    With the same seed and version of torch the result is the same again, unless time was short.

    Parameters
    ----------
    flux : array of shape (n, p), float32
        Without noise.
    error : array of shape (n, p), float32
        1σ.
    y : array of shape (n,), dex
        Log g.
    reference, noise_shape : array of shape (p,)
        Spectrum to be subtracted; mean noise variance D of each pixel, positive.
    seed : int
        Of noise, first weights and order.
    epochs : int
        How often each star is seen.
    minutes : float
        Time there is: after each epoch, those that are left over are cut to what it will allow.
    progress : callable, optional
        Called after every epoch with the epochs done and those there may be.

    Raises
    ------
    ValueError
        Shapes do not fit, a number is not finite, or there are too few pixels.
    MoefastError
        torch is not installed.
    """
    flux, error = np.ascontiguousarray(flux, np.float32), np.ascontiguousarray(error, np.float32)
    target, shape = np.asarray(y, np.float64), np.asarray(noise_shape, np.float64)
    if flux.ndim != 2 or error.shape != flux.shape or target.shape != (len(flux),) or len(flux) < 2:
        raise ValueError(
            f"flux and error (n, p) and y (n,) of two stars at least expected; found {flux.shape}, {error.shape}, "
            f"{target.shape}"
        )
    p = flux.shape[1]
    if np.shape(reference) != (p,) or shape.shape != (p,) or not (shape > 0).all():
        raise ValueError(f"reference and a positive noise_shape of {p} pixels expected")
    if n_places(p) < 1:
        raise ValueError(f"{p} pixels are too few for kernels of {KERNELS}")
    if not all(np.isfinite(a).all() for a in (flux, error, target)) or not (error > 0).all() or epochs < 1:
        raise ValueError("finite flux and y, a positive error and one epoch at least are needed")
    try:
        import torch
    except ImportError as problem:
        raise MoefastError(
            "networks are fitted by torch, which is not installed; install the build for your machine "
            "(pip install torch)"
        ) from problem

    usual = torch.get_num_threads()
    # On cores that others use as well, two take many times as long as one: they wait for each other.
    torch.set_num_threads(1)
    try:
        return _fit(
            torch,
            flux,
            error,
            target,
            np.asarray(reference, np.float32),
            shape,
            seed,
            epochs,
            minutes,
            progress,
        )
    finally:
        torch.set_num_threads(usual)


def _fit(
    torch: Any,
    flux: F32,
    error: F32,
    target: F64,
    centre: F32,
    shape: F64,
    seed: int,
    epochs: int,
    minutes: float,
    progress: Callable[[int, int], None] | None,
) -> ConvNet:
    n, p = flux.shape
    scale = (1 / np.sqrt(shape)).astype(np.float32)
    weight = 1 / shape
    level = np.array([0.5 * np.log(np.mean(row.astype(np.float64) ** 2 * weight)) for row in error])
    mean, spread = target.mean(), max(float(target.std()), 1e-6)
    start = _start(p, np.random.default_rng([seed, 1]))
    weights = {name: torch.tensor(value, requires_grad=True) for name, value in start.items()}
    wanted = torch.tensor((target - mean) / spread, dtype=torch.float32)
    levels = torch.tensor(level[:, None], dtype=torch.float32)
    search = torch.optim.AdamW(list(weights.values()), lr=STEP, weight_decay=DECAY)
    order = np.random.default_rng([seed, 2])
    starts = list(range(0, n, BATCH))
    done, total = 0, epochs * len(starts)
    begun = time.monotonic()
    end = begun + 60 * minutes
    noisy = np.empty((min(BATCH, n), p), np.float32)
    for epoch in range(epochs):
        shuffled = order.permutation(n)
        for first in starts:
            rows = shuffled[first : first + BATCH]
            x = noisy[: len(rows)]
            # A row of the set in one epoch has noise of its own.
            add_noise(flux[rows], error[rows], seed, rows + epoch * n, stream=NOISE, out=x)
            x -= centre
            x *= scale
            share = done / total
            for group in search.param_groups:
                group["lr"] = STEP * min(1.0, 20 * share + 0.01) * 0.5 * (1 + np.cos(np.pi * share))
            search.zero_grad()
            found = _forward(torch, torch.from_numpy(x), levels[rows], weights)
            loss = torch.nn.functional.mse_loss(found[:, 0], wanted[rows])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(list(weights.values()), LARGEST_GRADIENT)
            search.step()
            done += 1
            # A clock in the schedule itself would make every fit another one.
            if done == total or time.monotonic() >= end:
                break
        if progress is not None:
            progress(epoch + 1, epochs)
        if done == total or time.monotonic() >= end:
            break
        pace = done / (time.monotonic() - begun)
        total = min(epochs * len(starts), done + max(1, int(pace * (end - time.monotonic()))))
    own = {name: value.detach().numpy().astype(np.float64) for name, value in weights.items()}
    own["v2"], own["c2"] = own["v2"] * spread, own["c2"] * spread + mean
    return ConvNet(centre, scale, **{name: value.astype(np.float32) for name, value in own.items()})


def _start(n_pixels: int, draw: np.random.Generator) -> dict[str, F32]:
    """Weights before the fit: normal, of a size that keeps the variance from layer to layer (He et al. 2015)."""
    before, out = 1, {}
    for layer, channels, kernel in zip(_LAYERS, CHANNELS, KERNELS, strict=True):
        size = np.sqrt(2 / (before * kernel))
        out[f"w{layer}"] = size * draw.standard_normal((channels, before, kernel))
        out[f"b{layer}"] = np.zeros(channels)
        before = channels
    features = before * n_places(n_pixels) + 1
    out |= {
        "v1": np.sqrt(2 / features) * draw.standard_normal((features, HIDDEN)),
        "c1": np.zeros(HIDDEN),
        "v2": np.sqrt(1 / HIDDEN) * draw.standard_normal((HIDDEN, 1)),
        "c2": np.zeros(1),
    }
    return {name: value.astype(np.float32) for name, value in out.items()}


def _forward(torch: Any, x: Any, level: Any, weights: Mapping[str, Any]) -> Any:
    """Standardised log g (n, 1) of scaled flux (n, p), in torch."""
    value = x[:, None, :]
    for layer in _LAYERS:
        w = weights[f"w{layer}"]
        value = torch.relu(torch.nn.functional.conv1d(value, w, weights[f"b{layer}"], stride=w.shape[2] // 2))
    features = torch.cat([value.flatten(1), level], 1)
    return torch.relu(features @ weights["v1"] + weights["c1"]) @ weights["v2"] + weights["c2"]
