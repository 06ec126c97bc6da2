"""The task `score`: flux and error to log g, by the same fitted mixture in every engine.

Design: what other engines need of a mixture is taken out of it in one place, `mixture_arrays`. They compute log g
alone; ours and the exported graph give errors, weights and χ² in the same time, and `numpy-full` shows what those cost.
Data are seen in blocks of `BLOCK_ROWS`, as `moefast predict` does. LightGBM cannot hold a mixture: it is a model of its
own.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import moefast
from moefast.benchmarks.adapter import OWN_ENVIRONMENT, Engine, Work
from moefast.core.errors import BackendError
from moefast.core.line_features import LEAST_CONTINUUM
from moefast.core.metrics import r2
from moefast.kernels import Library
from moefast.mixture import Mixture
from moefast.model import Model
from moefast.posterior.mixture import AnyMixture, PosteriorMixture
from moefast.simulate.emulator import LABELS
from moefast.spectra.spectrum_set import open_spectra

__all__ = [
    "BLOCK_ROWS",
    "SCORE",
    "TOLERANCE",
    "MixtureArrays",
    "ScoreProblem",
    "drop_cache",
    "mixture_arrays",
]

F32 = NDArray[np.float32]

BLOCK_ROWS = 2048
TOLERANCE = 1e-4
"""Largest difference in log g (dex) from the mixture in float64: a two-hundredth of the smallest error that we give."""
LIGHTGBM_SEED = 20260203
LIGHTGBM_ROWS, LIGHTGBM_TREES = 4000, 100
"""Stars that LightGBM is trained on, and its trees: enough for a fair speed, not for its best R²."""

PEER_ROWS = 300
"""Stars that the full-spectrum fit is given: it fits some 20 a second."""


@dataclass(frozen=True)
class MixtureArrays:
    """The arrays that log g comes from, float32.

    `reference` and `noise_shape` (p,), `knots` (M,), `components` (p, c), of which the gate sees the first four,
    `experts` (c, K·M) in these, `intercepts` (K, M), `cells` (p / cell, M·K) for their noise, `captured` (p,) of χ²,
    `lines` (p, 12), `line_offsets` (12,), `line_widths` (4,), and two networks
    (W₁, b₁, W₂, b₂): `gate`, and `error_model`, which only errors need. Of the components the gate sees `n_gate`;
    `library` holds the templates of all experts, if there are any.
    """

    reference: F32
    noise_shape: F32
    knots: F32
    components: F32
    experts: F32
    intercepts: F32
    cells: F32
    captured: F32
    n_basis: int
    lines: F32
    line_offsets: F32
    line_widths: F32
    gate: tuple[F32, F32, F32, F32]
    error_model: tuple[F32, F32, F32, F32]
    label_range: tuple[float, float]
    clipped: bool
    n_gate: int
    library: Library | None

    @property
    def columns(self) -> F32:
        """Everything that multiplies the centred flux, (p, c + 12)."""
        return np.ascontiguousarray(np.concatenate([self.components, self.lines], 1))


def mixture_arrays(mixture: AnyMixture) -> MixtureArrays:
    """Take a mixture apart: the only place here that knows how it stores its experts.

    Raises
    ------
    BackendError
        Its experts are of several families or have residuals, or it is a posterior of all labels: only our own engines
        and the ONNX graph know these.
    """
    if isinstance(mixture, PosteriorMixture):
        raise BackendError("a posterior of all labels is not written down for this engine")
    library, marks = mixture.clouds
    if len(mixture.experts) > (library is not None) or not all(marks):
        raise BackendError(
            "experts of several families, or with residuals, are not written down for this engine"
        )
    return MixtureArrays(
        reference=mixture.reference,
        noise_shape=mixture.noise_shape,
        knots=mixture.knots,
        components=mixture.columns,
        experts=np.ascontiguousarray(mixture.expert_weights.transpose(2, 0, 1)).reshape(
            mixture.columns.shape[1], -1
        ),
        intercepts=mixture.expert_intercepts,
        cells=mixture.cell_matrix,
        captured=mixture.captured,
        n_basis=mixture.n_basis,
        lines=mixture.line_columns,
        line_offsets=mixture.line_offsets,
        line_widths=mixture.line_widths,
        gate=mixture.gate,
        error_model=mixture.error_model,
        label_range=mixture.label_range,
        clipped=mixture.clipped,
        n_gate=mixture.n_gate,
        library=library,
    )


@dataclass
class ScoreProblem:
    """Spectra in a file, the first `n` of them; arrays are read when they are first asked for.

    Attributes
    ----------
    path : Path
        Noisy flux as `flux`, `error`, and the label `log_g`.
    folder : Path
        Where an engine may write.
    model_path : str or None
        Model folder; None is the shipped model.
    n : int
    """

    path: Path
    folder: Path
    model_path: str | None
    n: int

    @cached_property
    def model(self) -> Model:
        """The model."""
        return Model.load(self.model_path)

    @property
    def mixture(self) -> AnyMixture:
        """Its mixture."""
        return self.model.mixture

    @cached_property
    def _arrays(self) -> tuple[F32, F32]:
        with contextlib.closing(open_spectra(self.path)) as spectra:
            flux = np.empty((self.n, spectra.n_pixels), np.float32)
            error = np.empty_like(flux)
            for block in spectra.blocks(BLOCK_ROWS, rows=(0, self.n)):
                here = slice(block.first_row, block.first_row + len(block))
                flux[here], error[here] = block.flux, block.error
        return flux, error

    @property
    def flux(self) -> F32:
        """(n, p)."""
        return self._arrays[0]

    @property
    def error(self) -> F32:
        """(n, p)."""
        return self._arrays[1]

    def load(self) -> int:
        """Read the arrays; returns their size in bytes."""
        return self.flux.nbytes + self.error.nbytes

    @cached_property
    def log_g(self) -> NDArray[np.float64]:
        """True log g, (n,)."""
        with contextlib.closing(open_spectra(self.path)) as spectra:
            return spectra.labels(("log_g",))["log_g"][: self.n]

    def r2(self, answer: NDArray) -> float:
        """R² of an answer."""
        return r2(self.log_g, answer)


def in_blocks(problem: ScoreProblem, score: Callable[[F32, F32], NDArray]) -> Work:
    """Work through flux and error in memory, block by block."""
    flux, error = problem.flux, problem.error

    def run() -> NDArray:
        out = np.empty(len(flux), np.float32)
        for first in range(0, len(flux), BLOCK_ROWS):
            here = slice(first, first + BLOCK_ROWS)
            out[here] = score(flux[here], error[here])
        return out

    return Work(run)


# --- ours ----------------------------------------------------------------------------------------------------


def _own(problem: ScoreProblem) -> Work:
    mixture = problem.mixture
    return in_blocks(problem, lambda flux, error: mixture.predict(flux, error).log_g)


def _own_cuda(problem: ScoreProblem) -> Work:
    from moefast.predicting.engines import open_engine

    engine, where = open_engine(problem.mixture, "cuda")
    work = in_blocks(problem, lambda flux, error: engine(flux, error, None, 0)[0].log_g)
    work.facts["device"] = where.device
    return work


def _predict(problem: ScoreProblem, backend: str = "cpu") -> Work:
    """`moefast predict`, from file to table."""
    from moefast.spectra.tables import read_table

    out = problem.folder / f"log_g-{os.getpid()}.h5"
    model = problem.model

    def run() -> Any:
        return moefast.predict(
            problem.path, model, out, limit=problem.n, array="flux", backend=backend, overwrite=True
        )

    return Work(run, lambda _: read_table(out)[0]["log_g"])


def _predict_cold(problem: ScoreProblem) -> Work:
    drop_cache(problem.path)
    warm = _predict(problem)
    return Work(warm.run, warm.answer, lambda: drop_cache(problem.path))


def _predict_cuda(problem: ScoreProblem) -> Work:
    return _predict(problem, "cuda")


def _read(problem: ScoreProblem) -> Work:
    """Merely read flux and error, a block ahead, as `predict` does."""
    spectra = open_spectra(problem.path)

    def run() -> float:
        blocks = spectra.blocks(BLOCK_ROWS, array="flux", rows=(0, problem.n))
        return sum(float(block.flux[0, 0] + block.error[-1, -1]) for block in blocks)

    return Work(run)


def _read_cold(problem: ScoreProblem) -> Work:
    drop_cache(problem.path)
    return Work(_read(problem).run, before=lambda: drop_cache(problem.path))


def drop_cache(path: Path) -> None:
    """Ask the system to forget a file that it keeps in memory.

    Raises
    ------
    BackendError
        The system does not forget it (or has no way to be asked), so that nothing can be read cold.
    """
    if not hasattr(os, "posix_fadvise"):
        raise BackendError("this system cannot be asked to forget a file in memory")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Pages that are not on the disk yet would stay.
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    kept = _share_in_memory(path)
    if kept > 0.01:
        raise BackendError(f"{100 * kept:.0f} % of the file stay in memory when it is to be forgotten")


def _share_in_memory(path: Path) -> float:
    """Share of a file's pages that the system keeps in memory."""
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    seen = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapped:
        start = np.frombuffer(mapped, np.uint8)
        status = libc.mincore(ctypes.c_void_p(start.ctypes.data), ctypes.c_size_t(size), seen)
        # The mapping cannot be closed while an array looks at it.
        del start
    if status != 0:
        raise BackendError(
            f"mincore fails with error {ctypes.get_errno()}, so that nothing says what is cold"
        )
    return float((np.frombuffer(bytes(seen), np.uint8) & 1).mean())


# --- the exported graph --------------------------------------------------------------------------------------


def _onnx(problem: ScoreProblem, backend: str) -> Work:
    from moefast.export import build, open_session

    session = open_session(build(problem.mixture), backend=backend)
    return in_blocks(problem, lambda flux, error: session.run(["log_g"], {"flux": flux, "error": error})[0])


# --- the mixture in other libraries --------------------------------------------------------------------------


def _numpy(problem: ScoreProblem) -> Work:
    """The mixture in plain NumPy, float32."""
    a = mixture_arrays(problem.mixture)
    columns, inverse = a.columns, 1 / a.noise_shape

    def score(flux: F32, error: F32) -> F32:
        flux = np.maximum(flux, 0) if a.clipped else flux
        linear = (flux - a.reference) @ columns
        experts, features, _, posterior = _after_the_product(a, linear, (error * error) @ inverse)
        weights = _softmax(_network(features, a.gate) + posterior.logits)
        return np.clip((weights * experts).sum(1), *a.label_range)

    return in_blocks(problem, score)


def _numpy_full(problem: ScoreProblem) -> Work:
    """The same with everything that `Mixture.predict` gives: errors, propagated noise, χ²."""
    mixture = problem.mixture
    a = mixture_arrays(mixture)
    assert isinstance(mixture, Mixture)
    (k, m), n_cells = a.intercepts.shape, len(a.cells)
    columns, inverse = a.columns, 1 / a.noise_shape
    outside = inverse - a.captured
    error_features = mixture.error_features

    def score(flux: F32, error: F32) -> F32:
        flux = np.maximum(flux, 0) if a.clipped else flux
        x, variance = flux - a.reference, error * error
        linear, ratio = x @ columns, variance * inverse
        experts, features, hat, posterior = _after_the_product(a, linear, ratio.sum(1))
        weights = _softmax(_network(features, a.gate) + posterior.logits)
        mixed = (weights * experts).sum(1)
        log_g = np.clip(mixed, *a.label_range)
        cells = ratio.reshape(len(x), n_cells, -1).mean(2)
        noise = np.sqrt(((cells @ a.cells).reshape(-1, m, k) * hat[:, :, None]).sum(1))
        noise = noise if posterior.sd is None else posterior.sd
        raw = (weights * noise).sum(1)
        spread = np.sqrt((weights * (experts - mixed[:, None]) ** 2).sum(1))
        log_g_err = np.exp(_network(error_features(features, log_g, raw, spread), a.error_model)[:, 0])
        z = linear[:, : a.n_basis]
        chi2 = ((x * x) @ inverse - (z * z).sum(1)) / np.maximum(variance @ outside, np.float32(1e-30))
        return np.stack([log_g, log_g_err, raw, chi2])[0]

    return in_blocks(problem, score)


def _network(features: F32, layers: tuple[F32, F32, F32, F32]) -> F32:
    w1, b1, w2, b2 = layers
    return np.tanh(features @ w1 + b1) @ w2 + b2


def _softmax(logits: F32) -> F32:
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


class _Posterior(NamedTuple):
    """What a library says: `mean` and `sd` (n, K), or None without one; `logits` for the gate, or 0."""

    mean: NDArray | None
    sd: NDArray | None
    logits: Any


def _posterior(library: Library | None, z: NDArray, log_level: NDArray) -> _Posterior:
    """`moefast.kernels.tangent_posterior` in matrix products, in float64: these lose digits."""
    if library is None:
        return _Posterior(None, None, 0)
    (m, r), (_, t) = library.keys.shape, library.variances.shape
    z, keys, tangents = (a.astype(np.float64) for a in (z, library.keys, library.tangents))
    noise = np.exp(2 * log_level.astype(np.float64))[:, None]
    along, outside = library.variances + noise[:, :, None], library.rest + noise
    u = (z @ tangents.reshape(m * t, r).T).reshape(-1, m, t) - np.einsum("mtr,mr->mt", tangents, keys)
    apart = (z * z).sum(1)[:, None] + (keys * keys).sum(1) - 2 * z @ keys.T
    chi2 = (apart - (u * u).sum(2)) / outside + (u * u / along).sum(2)
    exponent = library.log_weights - 0.5 * (chi2 + (r - t) * np.log(outside) + np.log(along).sum(2))
    each = library.log_g + (library.gains * u / along).sum(2)
    left = np.maximum(library.scatter - (library.gains**2 / along).sum(2), 0)
    first = library.first[:-1]
    top = np.maximum.reduceat(exponent, first, axis=1)
    cloud = np.repeat(np.arange(len(first)), np.diff(library.first))
    weights = np.exp(exponent - top[:, cloud])
    total = np.add.reduceat(weights, first, axis=1)
    weights /= total[:, cloud]
    mean = np.add.reduceat(weights * each, first, axis=1)
    sd = np.sqrt(np.add.reduceat(weights * (left + (each - mean[:, cloud]) ** 2), first, axis=1))
    evidence = top + np.log(total)
    return _Posterior(mean, sd, evidence - evidence.max(1, keepdims=True))


def _after_the_product(
    a: MixtureArrays, linear: NDArray, noise: NDArray
) -> tuple[NDArray, NDArray, NDArray, _Posterior]:
    """Values of the experts (n, K), gate features, weights (n, M) of the noise levels, the library's part, in NumPy."""
    k, m = a.intercepts.shape
    z, lines = np.split(linear, [a.components.shape[1]], axis=1)
    components = z[:, : a.n_gate]
    log_level = np.float32(0.5) * np.log(noise / np.float32(len(a.reference)))
    level = np.clip(log_level, a.knots[0], a.knots[-1])
    step = (a.knots[-1] - a.knots[0]) / np.float32(m - 1)
    hat = np.maximum(0, 1 - np.abs(level[:, None] - a.knots) / step)
    posterior = _posterior(a.library, z[:, : a.n_basis], log_level)
    values = posterior.mean
    if values is None:
        values = (((z @ a.experts).reshape(-1, k, m) + a.intercepts) * hat[:, None]).sum(2)
    lines = lines + a.line_offsets
    continuum = np.maximum(lines[:, 2::3], np.float32(LEAST_CONTINUUM))
    depth = 1 - lines[:, 0::3] / continuum
    width = a.line_widths - lines[:, 1::3] / continuum
    pairs = np.stack([depth, width], 2).reshape(len(linear), -1)
    calcium = width[:, :3].sum(1, keepdims=True)
    features = np.concatenate([pairs[:, :6], calcium, pairs[:, 6:], components, level[:, None]], 1)
    return values, features, hat, posterior


def _sklearn(problem: ScoreProblem) -> Work:
    """The fitted numbers in scikit-learn's own models: `Ridge` for all that is linear, `MLPClassifier` for the gate."""
    from sklearn.linear_model import Ridge
    from sklearn.neural_network import MLPClassifier
    from sklearn.preprocessing import LabelBinarizer

    a = mixture_arrays(problem.mixture)
    columns = a.columns
    linear, noise = Ridge(), Ridge(fit_intercept=False)
    linear.coef_ = np.ascontiguousarray(columns.T)
    linear.intercept_ = np.float32(0)
    noise.coef_, noise.intercept_ = 1 / a.noise_shape, np.float32(0)
    k = a.intercepts.shape[0]
    gate = MLPClassifier((a.gate[1].size,), activation="tanh")
    gate.coefs_, gate.intercepts_ = [a.gate[0], a.gate[2]], [a.gate[1], a.gate[3]]
    gate.n_layers_, gate.n_outputs_, gate.out_activation_ = 3, k, "softmax"
    gate.classes_, gate.n_features_in_ = np.arange(k), a.gate[0].shape[0]
    gate._label_binarizer = LabelBinarizer().fit(gate.classes_)

    def score(flux: F32, error: F32) -> NDArray:
        flux = np.maximum(flux, 0) if a.clipped else flux
        experts, features, _, posterior = _after_the_product(
            a, linear.predict(flux - a.reference), noise.predict(error * error)
        )
        weights = gate.predict_proba(features)
        if a.library is not None:
            weights = _softmax(np.log(weights) + posterior.logits)
        return np.clip((weights * experts).sum(1), *a.label_range)

    return in_blocks(problem, score)


def _torch(problem: ScoreProblem, device: str, resident: bool = False) -> Work:
    """The mixture in a few lines of torch, float32 without TF32."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"torch {torch.__version__} finds no CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = False
    a = mixture_arrays(problem.mixture)
    (k, m), c = a.intercepts.shape, a.components.shape[1]

    def there(array: Any) -> Any:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    reference, inverse, columns = there(a.reference), there(1 / a.noise_shape), there(a.columns)
    knots, intercepts, weights_of = there(a.knots), there(a.intercepts), there(a.experts)
    offsets, widths = there(a.line_offsets), there(a.line_widths)
    w1, b1, w2, b2 = (there(layer) for layer in a.gate)
    step = (knots[-1] - knots[0]) / (m - 1)
    library = None if a.library is None else _torch_posterior(a.library, there)

    def score(flux: Any, error: Any) -> Any:
        flux = flux.clamp(min=0) if a.clipped else flux
        z, lines = ((flux - reference) @ columns).split([c, len(offsets)], 1)
        components = z[:, : a.n_gate]
        log_level = 0.5 * torch.log((error * error) @ inverse / len(reference))
        level = log_level.clamp(knots[0], knots[-1])
        if library is None:
            hat = (1 - (level[:, None] - knots).abs() / step).clamp(min=0)
            values = (((z @ weights_of).reshape(-1, k, m) + intercepts) * hat[:, None]).sum(2)
            logits = 0
        else:
            values, logits = library(z[:, : a.n_basis], log_level)
        lines = lines + offsets
        continuum = lines[:, 2::3].clamp(min=LEAST_CONTINUUM)
        depth, width = 1 - lines[:, 0::3] / continuum, widths - lines[:, 1::3] / continuum
        pairs = torch.stack([depth, width], 2).reshape(len(flux), -1)
        calcium = width[:, :3].sum(1, keepdim=True)
        features = torch.cat([pairs[:, :6], calcium, pairs[:, 6:], components, level[:, None]], 1)
        weights = torch.softmax(torch.tanh(features @ w1 + b1) @ w2 + b2 + logits, 1)
        return (weights * values).sum(1).clamp(*a.label_range)

    flux, error = torch.from_numpy(problem.flux), torch.from_numpy(problem.error)
    if resident:
        flux, error = flux.to(device), error.to(device)

    def run() -> NDArray:
        with torch.inference_mode():
            parts = [
                score(flux[i : i + BLOCK_ROWS].to(device), error[i : i + BLOCK_ROWS].to(device))
                for i in range(0, problem.n, BLOCK_ROWS)
            ]
            # The copy waits for the device.
            return torch.cat(parts).cpu().numpy()

    return Work(run, facts={"threads": torch.get_num_threads()} if device == "cpu" else {})


def _torch_posterior(library: Library, there: Callable[[Any], Any]) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Posterior means and logits as `_posterior` has them."""
    import torch

    (m, r), (_, t) = library.keys.shape, library.variances.shape
    keys, tangents = there(library.keys.astype(np.float64)), there(library.tangents.astype(np.float64))
    variances, gains, rest = (there(a) for a in (library.variances, library.gains, library.rest))
    log_weights, log_g = there(library.log_weights), there(library.log_g)
    matrix, offset = tangents.reshape(m * t, r).T.contiguous(), torch.einsum("mtr,mr->mt", tangents, keys)
    length, sizes = (keys * keys).sum(1), np.diff(library.first).tolist()

    def posterior(z: Any, log_level: Any) -> tuple[Any, Any]:
        z, noise = z.double(), torch.exp(2 * log_level.double())[:, None]
        along, outside = variances + noise[:, :, None], rest + noise
        u = (z @ matrix).reshape(-1, m, t) - offset
        apart = (z * z).sum(1, keepdim=True) + length - 2 * z @ keys.T
        chi2 = (apart - (u * u).sum(2)) / outside + (u * u / along).sum(2)
        exponent = log_weights - 0.5 * (chi2 + (r - t) * torch.log(outside) + torch.log(along).sum(2))
        each = log_g + (gains * u / along).sum(2)
        parts = list(zip(exponent.split(sizes, 1), each.split(sizes, 1), strict=True))
        means = [(torch.softmax(e, 1) * value).sum(1) for e, value in parts]
        evidence = torch.stack([torch.logsumexp(e, 1) for e, _ in parts], 1)
        return torch.stack(means, 1), evidence

    return posterior


def _lightgbm(problem: ScoreProblem) -> Work:
    """Trees on raw flux, with the published regularisation but fewer of them, trained here on stars of their own."""
    import lightgbm

    from moefast.simulate import simulate_rows

    kept = problem.folder / "lightgbm.txt"
    if kept.exists():
        trees = lightgbm.Booster(model_file=kept)
    else:
        made = simulate_rows(0, LIGHTGBM_ROWS, seed=LIGHTGBM_SEED, noisy=True)
        settings = {
            "objective": "regression", "max_depth": 5, "num_leaves": 20, "learning_rate": 0.1,
            "feature_fraction": 0.03, "bagging_fraction": 0.7, "bagging_freq": 1, "min_child_samples": 50,
            "reg_alpha": 1.0, "reg_lambda": 1.0, "max_bin": 63, "force_col_wise": True, "seed": 0, "verbose": -1,
        }  # fmt: skip
        data = lightgbm.Dataset(made.noisy, made.params["log_g"], params=settings)
        trees = lightgbm.train(settings, data, num_boost_round=LIGHTGBM_TREES)
        trees.save_model(kept)
    work = in_blocks(problem, lambda flux, _: np.asarray(trees.predict(flux)))
    work.facts.update(trained_on=LIGHTGBM_ROWS, trees=LIGHTGBM_TREES)
    return work


def _chi2(problem: ScoreProblem) -> Work:
    """What others do: a full-spectrum fit of the emulator, star by star on one core."""
    from moefast.core.threads import one_blas_thread
    from moefast.peers.choose import peer
    from moefast.peers.least_squares import fit_labels

    model = peer("chi2").open("z0")
    at = LABELS.index("log_g")

    def score(flux: F32, error: F32) -> NDArray:
        with one_blas_thread():
            stars = zip(flux, error, strict=True)
            return np.array([fit_labels(model, *star).labels[at] for star in stars])

    return in_blocks(problem, score)


def _engines() -> Iterator[Engine]:
    own: dict[str, Any] = {"task": "score", "environment": OWN_ENVIRONMENT}
    file: dict[str, Any] = own | {"in_memory": False}
    yield Engine("read-file", "read flux and error, warm file", make=_read, is_floor=True, **file)
    yield Engine("read-file-cold", "read flux and error, cold file", make=_read_cold, is_floor=True, **file)
    yield Engine("predict", "moefast predict, warm file to table", make=_predict, floor="read-file", **file)
    yield Engine(
        "predict-cold",
        "moefast predict, cold file to table",
        make=_predict_cold,
        floor="read-file-cold",
        **file,
    )
    yield Engine(
        "predict-cuda", "moefast predict, GPU", make=_predict_cuda, floor="read-file", device="cuda", **file
    )
    yield Engine("moefast", "moefast kernels", make=_own, floor="memory read", **own)
    yield Engine("moefast-cuda", "moefast, GPU", make=_own_cuda, floor="host to device", device="cuda", **own)
    yield Engine(
        "onnxruntime",
        "ONNX Runtime",
        "score",
        lambda p: _onnx(p, "cpu"),
        ("onnxruntime",),
        floor="memory read",
    )
    yield Engine(
        "onnxruntime-cuda", "ONNX Runtime, GPU", "score", lambda p: _onnx(p, "cuda"), ("onnxruntime",), "cuda",
        "host to device",
    )  # fmt: skip
    yield Engine("torch", "torch", "score", lambda p: _torch(p, "cpu"), ("torch",), floor="memory read")
    yield Engine(
        "torch-cuda", "torch, GPU", "score", lambda p: _torch(p, "cuda"), ("torch",), "cuda", "host to device"
    )
    yield Engine(
        "torch-cuda-resident", "torch, GPU, data there", "score", lambda p: _torch(p, "cuda", True), ("torch",),
        "cuda", "device copy",
    )  # fmt: skip
    yield Engine("numpy", "NumPy", "score", _numpy, floor="memory read")
    yield Engine("numpy-full", "NumPy, errors and χ² too", "score", _numpy_full, floor="memory read")
    yield Engine("sklearn", "scikit-learn", "score", _sklearn, ("sklearn",), floor="memory read")
    yield Engine(
        "lightgbm",
        "LightGBM (its own model)",
        "score",
        _lightgbm,
        ("lightgbm",),
        floor="memory read",
        same=False,
    )
    yield Engine(
        "chi2", "full-spectrum fit, one core", "score", _chi2, floor="memory read", same=False,
        most_rows=PEER_ROWS, environment=OWN_ENVIRONMENT,
    )  # fmt: skip


SCORE = {engine.name: engine for engine in _engines()}
"""Engines of the task `score`, by name."""
