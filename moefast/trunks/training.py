"""Fitting a trunk with heads: clean stars, fresh noise in every step.

    loss = (y − Σ w_k μ_k)² − a ln Σ w_k N(y; μ_k, σ_k²) − b ln w_bin + c |(T_eff, [M/H]) − linear(e)|²

with y and μ in units of the spread of log g. The first term is what R² measures, the second a proper score that makes
the σ honest, the others say what the physics of a star is: they help where log g alone says little. The linear layer of
the last is dropped after the fit.

Design: stars lie on the device as they are without noise, and each step draws some of them with noise of their own: in
components, where noise is white, or in pixels (`StarsInComponents`, `StarsInPixels`). Draws depend on seed and step
alone, so that a fit that goes on from a checkpoint takes the steps it would have taken. The search is AdamW with a
warm-up and a cosine; what is kept is a running mean of the weights, at the step where it was best on stars that did not
train. Half precision is used for the products of networks that see pixels, on a GPU; there, loss and gradients are
fused kernels if torch can compile them (`torch.compile`), since what a network does between its products is bound by
memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from moefast.checkpoint import NETWORK_FILE
from moefast.core.atomic import atomic_file
from moefast.core.errors import MoefastError, OutputError
from moefast.ops.arithmetic import FIXED, is_matrix
from moefast.ops.on_torch import TorchArithmetic
from moefast.trunks.heads import Heads
from moefast.trunks.networks import answer

__all__ = [
    "Fitted",
    "Judges",
    "Labels",
    "Schedule",
    "StarsInComponents",
    "StarsInPixels",
    "check_checkpoints",
    "component_covariance",
    "fit_heads",
    "load_torch",
]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

SCORE, BIN, LABELS = 0.2, 0.2, 0.2
"""Weights a, b, c of the loss."""
WARM_UP = 0.03
"""Share of the steps in which the step size rises to its largest."""
DECAY, LARGEST_GRADIENT = 1e-2, 1.0
MEAN_OF = 0.999
"""Decay of the running mean of the weights, per step."""
PATIENCE = 8
"""Looks at the held-out stars without a better one, after which a fit ends."""


@dataclass(frozen=True)
class Schedule:
    """How long and how a network is fitted.

    Attributes
    ----------
    steps, batch : int
        Steps, and stars in each.
    rate : float
        Largest step size.
    looks : int
        How often it is judged.
    seed : int
    """

    steps: int = 8000
    batch: int = 512
    rate: float = 2e-3
    looks: int = 20
    seed: int = 0


class Labels(NamedTuple):
    """Labels of n stars: `log_g` in dex, `others` (n, 2) = T_eff in K and [M/H], `bins` of the grid."""

    log_g: F64
    others: F64
    bins: NDArray[np.integer]


class Judges(NamedTuple):
    """Noisy stars that do not train: what the network sees of them, and log g."""

    seen: Mapping[str, F32]
    log_g: F64


class Fitted(NamedTuple):
    """What a fit gives.

    Attributes
    ----------
    heads : Heads
        The best running mean of the weights, rounded to half precision (7·10⁻⁴ dex at most where it was measured).
    curve : list of dict
        At every look: step, loss, R² of the judges, step size.
    kernels : str
        "fused", or "plain", with the reason if it is not that the fit ran on the CPU.
    """

    heads: Heads
    curve: list[dict[str, float]]
    kernels: str


class TrainingStars(Protocol):
    """Clean stars on a device."""

    def __len__(self) -> int:
        """How many."""
        ...

    def draw(self, index: Any, random: Any) -> dict[str, Any]:
        """What a network sees of some of them, with fresh noise."""
        ...


class StarsInComponents:
    """TrainingStars in noise-white components; their lines get the noise that belongs to that of the components.

    Noise of pixels √D ε gives the columns A = (T, lines) noise of covariance AᵀDA = LLᵀ; times s it is that of a star
    to within what its noise differs in shape from D.

    Parameters
    ----------
    torch : module
    device : torch device
    z, windows : array of shape (n, r), (n, 12), float32
        Without noise; windows of the whole flux.
    log_level : array of shape (n,), float32
    covariance : array of shape (r + 12, r + 12)
        AᵀDA.
    widths : array
        Of the line windows, Å.
    least : float
        Least continuum.
    """

    def __init__(
        self, torch: Any, device: Any, z: F32, windows: F32, log_level: F32, covariance: F64, widths: F32, least: float
    ) -> None:  # fmt: skip
        self._torch, self._device, self._least = torch, device, least
        self._z, self._windows, self._level, self._widths = (
            torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in (z, windows, log_level, widths)
        )
        tiny = 1e-9 * np.trace(covariance) / len(covariance)
        factor = np.linalg.cholesky(covariance + tiny * np.eye(len(covariance))).astype(np.float32)
        self._factor = torch.from_numpy(np.ascontiguousarray(factor.T)).to(device)

    def __len__(self) -> int:
        return len(self._z)

    def draw(self, index: Any, random: Any) -> dict[str, Any]:
        """See `TrainingStars`."""
        torch, r = self._torch, self._z.shape[1]
        level = self._level[index]
        shape = (len(index), len(self._factor))
        noise = torch.randn(shape, generator=random, device=self._device) @ self._factor
        noise *= level.exp()[:, None]
        lines = lines_of(torch, self._windows[index] + noise[:, r:], self._widths, self._least)
        return {"z": self._z[index] + noise[:, :r], "log_level": level[:, None], "lines": lines}


class StarsInPixels:
    """TrainingStars in pixels, as half-precision numbers in units of the mean noise: a thousandth of that is lost.

    Parameters
    ----------
    torch : module
    device : torch device
    flux, error : array of shape (n, p), float16
        (flux − reference) · inverse_noise without noise, and error · inverse_noise.
    log_level : array of shape (n,), float32
    reference, inverse_noise : array of shape (p,)
    columns : array of shape (p, 12)
        Of the lines.
    widths, least
        As in `StarsInComponents`.
    """

    def __init__(
        self, torch: Any, device: Any, flux: NDArray, error: NDArray, log_level: F32, reference: F32,
        inverse_noise: F32, columns: F32, widths: F32, least: float,
    ) -> None:  # fmt: skip
        self._torch, self._device, self._least = torch, device, least
        matrix = (columns / inverse_noise[:, None]).astype(np.float32)
        offsets = (reference.astype(np.float64) @ columns.astype(np.float64)).astype(np.float32)
        self._flux, self._error, self._level, self._matrix, self._offsets, self._widths = (
            torch.from_numpy(np.ascontiguousarray(a)).to(device)
            for a in (flux, error, log_level, matrix, offsets, widths)
        )

    def __len__(self) -> int:
        return len(self._flux)

    def draw(self, index: Any, random: Any) -> dict[str, Any]:
        """See `TrainingStars`."""
        torch = self._torch
        shape = (len(index), self._flux.shape[1])
        scaled = torch.randn(shape, generator=random, device=self._device)
        scaled *= self._error[index]
        scaled += self._flux[index]
        lines = lines_of(torch, scaled @ self._matrix + self._offsets, self._widths, self._least)
        return {"scaled": scaled, "log_level": self._level[index][:, None], "lines": lines}


def component_covariance(basis: F32, columns: F32, noise_shape: F32) -> F64:
    """Noise of components and line windows at the mean noise: AᵀDA, (r + 12, r + 12).

    Parameters
    ----------
    basis, columns : array of shape (p, r), (p, 12)
        The two parts of A.
    noise_shape : array of shape (p,)
        D.
    """
    joint = np.concatenate([basis, columns], axis=1).astype(np.float64)
    return np.asarray(joint.T @ (noise_shape.astype(np.float64)[:, None] * joint))


def lines_of(torch: Any, windows: Any, widths: Any, least: float) -> Any:
    """`moefast.kernels.reference.line_features` in torch, (n, 9)."""
    core, integral, continuum = windows[:, 0::3], windows[:, 1::3], windows[:, 2::3].clamp(min=least)
    depth, width = 1 - core / continuum, widths - integral / continuum
    pairs = torch.stack([depth, width], 2).flatten(1)
    return torch.cat([pairs[:, :-2], width[:, :-1].sum(1, keepdim=True), pairs[:, -2:]], 1)


def load_torch() -> Any:
    """The module.

    Raises
    ------
    MoefastError
        It is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise MoefastError(
            "networks are fitted by torch, which is not installed; install the build for your machine "
            "(pip install torch). Scoring does not need it"
        ) from error
    return torch


def check_checkpoints() -> None:
    """Refuse checkpoints that cannot be written.

    Raises
    ------
    MoefastError
        safetensors is not installed.
    """
    if find_spec("safetensors") is None:
        raise MoefastError(
            "checkpoints of networks are written by safetensors, which is not installed; "
            "pip install 'moefast[networks]', or fit without --checkpoint"
        )


def fit_heads(
    begin: Heads,
    stars: TrainingStars,
    labels: Labels,
    judges: Judges,
    schedule: Schedule,
    *,
    device: str = "cpu",
    checkpoint: Path | None = None,
    key: str = "",
    fused: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Fitted:
    """Fit a network; see the module for the loss.

    Parameters
    ----------
    begin : Heads
        With the numbers to start from; their scales stay as they are.
    stars : StarsInComponents or StarsInPixels
        On `device`.
    labels : Labels
        Of the stars.
    judges : Judges
    schedule : Schedule
    device : "cpu" or "cuda"
    checkpoint : path, optional
        Folder where the state is kept at every look; a fit with the same `key` goes on from there.
    key : str
        What the fit depends on besides the plan and the schedule.
    fused : bool
        Whether loss and gradients are compiled on a GPU.
    progress : callable, optional
        Called with steps done and steps in all.

    Returns
    -------
    Fitted

    Raises
    ------
    MoefastError
        torch is not installed, or the loss is not finite.
    """
    torch = load_torch()
    usual = torch.get_float32_matmul_precision()
    # On a GPU, products of float32 in the tensor cores: ten bits of mantissa are enough for gradients.
    torch.set_float32_matmul_precision("high")
    try:
        return _Training(
            torch, begin, stars, labels, judges, schedule, device, checkpoint, key, fused, progress
        ).run()
    finally:
        torch.set_float32_matmul_precision(usual)


class _Training:
    """State of a fit: weights, their running mean, the moments of the search, the step and the curve."""

    def __init__(
        self, torch: Any, begin: Heads, stars: TrainingStars, labels: Labels, judges: Judges, schedule: Schedule,
        device: str, checkpoint: Path | None, key: str, fused: bool, progress: Callable[[int, int], None] | None,
    ) -> None:  # fmt: skip
        self.torch, self.plan, self.stars, self.schedule = torch, begin.plan, stars, schedule
        self.device, self.progress = torch.device(device), progress or (lambda done, total: None)
        self.file = None if checkpoint is None else checkpoint / NETWORK_FILE
        if self.file is not None:
            check_checkpoints()
        self.key = json.dumps([key, str(begin.plan), str(schedule), torch.__version__, device])

        def there(array: NDArray, dtype: Any = None) -> Any:
            return torch.as_tensor(np.ascontiguousarray(array), dtype=dtype, device=self.device)

        self.fixed = {name: there(begin.numbers[name]) for name in begin.numbers if name in FIXED}
        rng = np.random.default_rng([schedule.seed, 4])
        width = begin.plan.width
        own = {name: array for name, array in begin.numbers.items() if name not in FIXED}
        own["labels.w"] = (rng.standard_normal((width, 2)) / np.sqrt(width)).astype(np.float32)
        own["labels.b"] = np.zeros(2, np.float32)
        self.weights = {name: there(array).clone().requires_grad_() for name, array in own.items()}
        self.mean = {name: value.detach().clone() for name, value in self.weights.items()}
        self.best = {name: value.clone() for name, value in self.mean.items()}
        f32 = torch.float32
        others = (labels.others - labels.others.mean(0)) / labels.others.std(0)
        self.log_g, self.others, self.bins = (
            there(labels.log_g, f32),
            there(others, f32),
            there(labels.bins, torch.int64),
        )
        self.judges = {name: there(value, f32) for name, value in judges.seen.items()}
        self.judged = there(judges.log_g, torch.float64)
        # A decay of biases and norms would pull them to where they have no reason to be.
        matrices = [value for name, value in self.weights.items() if is_matrix(name, value.ndim)]
        others = [value for name, value in self.weights.items() if not is_matrix(name, value.ndim)]
        self.search = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}],
            lr=schedule.rate, fused=self.device.type == "cuda",
        )  # fmt: skip
        self.random = torch.Generator(self.device)
        self.half = self.device.type == "cuda" and begin.plan.sees_flux
        self.step, self.curve = 0, list[dict[str, float]]()
        self.kernels, self._fused = "plain", None
        if fused and self.device.type == "cuda":
            self._fused = torch.compile(self.loss, dynamic=False)

    def run(self) -> Fitted:
        self.resume()
        torch, schedule = self.torch, self.schedule
        self.progress(self.step, schedule.steps)
        every = max(1, schedule.steps // schedule.looks)
        total, count = torch.zeros((), device=self.device), 0
        while self.step < schedule.steps and not self.is_over():
            # A function of the seed and the step, and of nothing that came before.
            self.random.manual_seed((schedule.seed << 32) + self.step)
            index = torch.randint(
                len(self.stars), (schedule.batch,), generator=self.random, device=self.device
            )
            seen = self.stars.draw(index, self.random)
            rate = self.rate(self.step / schedule.steps)
            for group in self.search.param_groups:
                group["lr"] = rate
            loss = self.descend(seen, (self.log_g[index], self.others[index], self.bins[index]))
            torch.nn.utils.clip_grad_norm_(list(self.weights.values()), LARGEST_GRADIENT)
            self.search.step()
            self.step += 1
            keep = min(MEAN_OF, self.step / (self.step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.mean.values()), list(self.weights.values()), 1 - keep)
            total, count = total + loss, count + 1
            if self.step % every == 0 or self.step == schedule.steps:
                self.look(float(total) / count, rate)
                total, count = torch.zeros((), device=self.device), 0
        own = {
            name: value.cpu().numpy() for name, value in self.best.items() if not name.startswith("labels.")
        }
        fixed = {name: value.cpu().numpy() for name, value in self.fixed.items()}
        return Fitted(Heads(self.plan, {**own, **fixed}).rounded(), self.curve, self.kernels)

    def rate(self, share: float) -> float:
        """Step size after this share of the fit."""
        return self.schedule.rate * min(1.0, share / WARM_UP + 1e-2) * 0.5 * (1 + math.cos(math.pi * share))

    def is_over(self) -> bool:
        """Whether the last looks brought nothing."""
        if len(self.curve) <= PATIENCE:
            return False
        found = [look["r2"] for look in self.curve]
        return max(found[-PATIENCE:]) < max(found[:-PATIENCE])

    def forward(self, weights: Mapping[str, Any], seen: Mapping[str, Any]) -> tuple[Any, Any, Any, Any]:
        arithmetic = TorchArithmetic(self.torch, {**weights, **self.fixed})
        with self.torch.autocast(self.device.type, self.torch.bfloat16, enabled=self.half):
            found = answer(arithmetic, self.plan, seen)
        return tuple(value.float() for value in found)

    def descend(self, seen: Mapping[str, Any], labels: tuple[Any, Any, Any]) -> Any:
        """Loss, with its gradients left at the weights; fused where that works."""
        if self._fused is not None:
            self.search.zero_grad(set_to_none=True)
            try:
                loss = self._fused(seen, *labels)
                loss.backward()
                self.kernels = "fused"
                return loss.detach()
            except self.torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                self.kernels, self._fused = f"plain: torch.compile failed ({reason})", None
        self.search.zero_grad(set_to_none=True)
        loss = self.loss(seen, *labels)
        loss.backward()
        return loss.detach()

    def loss(self, seen: Mapping[str, Any], y: Any, others: Any, bins: Any) -> Any:
        """Of a network that has `self.weights`; labels are log g, standardised others and bins."""
        torch = self.torch
        log_g, sd, logits, e = self.forward(self.weights, seen)
        mean, spread = self.fixed["log_g.scale"]
        y, mu, sigma = (y - mean) / spread, (log_g - mean) / spread, sd / spread
        log_weights = logits.log_softmax(1)
        mixed = (log_weights.exp() * mu).sum(1)
        apart = (y[:, None] - mu) / sigma
        score = -torch.logsumexp(log_weights - sigma.log() - 0.5 * apart * apart, 1)
        right = -log_weights.gather(1, bins[:, None])
        of_labels = (others - e @ self.weights["labels.w"] - self.weights["labels.b"]) ** 2
        return (
            ((y - mixed) ** 2).mean() + SCORE * score.mean() + BIN * right.mean() + LABELS * of_labels.mean()
        )

    def look(self, loss: float, rate: float) -> None:
        """Judge the running mean, keep it if it is the best so far, and keep the state."""
        if not math.isfinite(loss):
            raise MoefastError(f"the fit of the network broke down at step {self.step}: the loss is {loss}")
        found = []
        n = len(self.judged)
        with self.torch.no_grad():
            for first in range(0, n, 1024):
                seen = {name: value[first : first + 1024] for name, value in self.judges.items()}
                log_g, _, logits, _ = self.forward(self.mean, seen)
                found.append((logits.softmax(1) * log_g).sum(1).double())
            wrong = self.torch.cat(found) - self.judged
            r2 = float(1 - (wrong @ wrong) / ((self.judged - self.judged.mean()) ** 2).sum())
        if not self.curve or r2 > max(entry["r2"] for entry in self.curve):
            self.best = {name: value.clone() for name, value in self.mean.items()}
        self.curve.append({"step": self.step, "loss": loss, "r2": r2, "rate": rate})
        self.save()
        self.progress(self.step, self.schedule.steps)

    # -- checkpoints --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything that changes, as tensors by name."""
        found: dict[str, Any] = {}
        for name, value in self.weights.items():
            moments = self.search.state[value]
            found |= {
                f"weights/{name}": value.detach(), f"mean/{name}": self.mean[name], f"best/{name}": self.best[name],
                **{f"{moment}/{name}": moments[moment] for moment in ("exp_avg", "exp_avg_sq", "step")},
            }  # fmt: skip
        return found

    def save(self) -> None:
        """Write the state; the file is complete or absent. A disk that does not take it is told, no more."""
        if self.file is None:
            return
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        state = {name: value.contiguous() for name, value in self.state().items()}
        said = {
            "key": self.key, "step": str(self.step), "curve": json.dumps(self.curve), "kernels": self.kernels,
        }  # fmt: skip
        said["sha256"] = self._digest(state, said)
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.file) as partial:
                save_file(state, partial, said)
        except (OSError, OutputError, SafetensorError) as error:
            logging.getLogger(__name__).warning(
                "%s: the checkpoint after step %d could not be written (%s)",
                self.file,
                self.step,
                error.__cause__ or error,
            )

    def _digest(self, state: Mapping[str, Any], said: Mapping[str, str]) -> str:
        """SHA-256 of all that a checkpoint holds, but for this number itself."""
        told = {name: text for name, text in said.items() if name != "sha256"}
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
        for name in sorted(state):
            digest.update(f"{name} {state[name].dtype} {tuple(state[name].shape)} ".encode())
            digest.update(state[name].reshape(-1).view(self.torch.uint8).cpu().numpy().tobytes())
        return digest.hexdigest()

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one of this fit; one that was changed is told and ignored."""
        if self.file is None or not self.file.exists():
            return
        from safetensors import safe_open

        try:
            with safe_open(self.file, "pt", device=str(self.device)) as file:
                said = file.metadata() or {}
                if said.get("key") != self.key:
                    return
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            if said["sha256"] != self._digest(found, said):
                raise ValueError("its content was changed")
        except Exception as error:
            # Damaged headers raise errors of several kinds, some of them of the library's own.
            logging.getLogger(__name__).warning(
                "%s: not a complete checkpoint (%s); the network is fitted from the beginning",
                self.file,
                error,
            )
            return
        self.step, self.curve, self.kernels = int(said["step"]), json.loads(said["curve"]), said["kernels"]
        for name, value in self.weights.items():
            with self.torch.no_grad():
                value.copy_(found[f"weights/{name}"])
            self.mean[name], self.best[name] = found[f"mean/{name}"], found[f"best/{name}"]
            self.search.state[value] = {
                moment: found[f"{moment}/{name}"] for moment in ("exp_avg", "exp_avg_sq", "step")
            }


def scales_of(
    log_g: F64, log_level: F32, noisy_lines: NDArray, knots: NDArray, metal_poor: NDArray[np.bool_]
) -> dict[str, NDArray]:
    """Scales of what every network sees and says; those of its spectra come beside them.

    Parameters
    ----------
    log_g, log_level : array of shape (n,)
        Of the stars that it is fitted on.
    noisy_lines : array of shape (m, 9)
        Line features of stars with noise.
    knots : array of shape (M,)
        ln s of the noise levels, in order.
    metal_poor : array of shape (K,)
        Which bins are.
    """
    return {
        "level.limits": knots[[0, -1]],
        "level.scale": np.array([log_level.mean(), max(log_level.std(), 0.1)]),
        "lines.scale": np.stack([noisy_lines.mean(0), 2 * noisy_lines.std(0) + 1e-6]),
        "log_g.scale": np.array([log_g.mean(), log_g.std()]),
        "metal_poor": metal_poor[:, None],
    }


def scaled(heads: Heads, numbers: Mapping[str, NDArray]) -> Heads:
    """The network with other scales; `numbers` by name, of any type."""
    return replace(
        heads, numbers={**heads.numbers, **{k: np.asarray(v, np.float32) for k, v in numbers.items()}}
    )
