"""The task `fit`: nine ridges, a path of penalties, K folds with hold-out errors, from arrays in memory.

Design: rows x are clean spectra with the mean spectrum subtracted, in units of the mean noise of each pixel. The noise
of a star is then a ridge penalty (noise in closed form), so the same problem is "an expert per noise level" for us and
"refit for every bin, penalty and fold" for a library without that. For bin k with n_k rows, penalty a and fold f

    (w, c) = argmin Σ_{rows of k outside f} (y − wᵀx − c)² + α_a n_k |w|²
    e_ka   = mean over f of [ mean_{rows of k in f} (y − wᵀx − c)² + |w|² ]

e is the expected squared error of stars with noise; |w|² is the noise's part. The penalty with the least e is fitted
again on all rows of the bin. Every engine first solves a reduced problem, whose answer is found in float64 by least
squares on augmented rows, with no normal equations at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefast.benchmarks.adapter import OWN_ENVIRONMENT, Engine, Work
from moefast.core.errors import BackendError

__all__ = ["FIT", "PENALTIES", "TOLERANCE", "Answer", "FitProblem", "compare", "reference_answer"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

PENALTIES = (0.25, 1.0, 4.0)
"""α per row, in units of the mean noise variance: noise levels of a half, one and two times the mean."""
N_FOLDS = 3
TOLERANCE = 1e-3
"""Largest difference in hold-out R² of a bin, and in predictions over the scatter of y, from the float64 reference."""
REDUCED_ROWS = 3000
REDUCED_PIXELS = 256
BLOCK_ROWS = 4096


@dataclass(frozen=True)
class Answer:
    """What a fit must give.

    Attributes
    ----------
    errors : array of shape (K, A), float64
        e, the expected hold-out error; NaN where an engine keeps only the best penalty of each bin.
    chosen : array of shape (K,), int
        Index of the penalty with the least error.
    weights : array of shape (K, p)
        Fit of all rows of the bin with that penalty.
    intercepts : array of shape (K,)
    """

    errors: F64
    chosen: NDArray[np.int64]
    weights: F64
    intercepts: F64


@dataclass
class FitProblem:
    """Rows in memory (or in a file of which the first `n` rows are read), labels, bins and folds.

    Attributes
    ----------
    path : Path or None
        .npy file of the rows.
    n : int
    y : array of shape (n,), float64
    bins, folds : array of shape (n,), int
        Every fold of every bin has rows.
    n_bins : int
    penalties : tuple of float
        α per row of the bin.
    """

    path: Path | None
    n: int
    y: F64
    bins: NDArray[np.int64]
    folds: NDArray[np.int64]
    n_bins: int = 9
    penalties: tuple[float, ...] = PENALTIES

    @classmethod
    def of(cls, path: Path | None, n: int, y: F64, bins: NDArray, **more: Any) -> FitProblem:
        """Folds are dealt out within each bin, row by row."""
        folds = np.empty(n, np.int64)
        bins = np.asarray(bins[:n], np.int64)
        for k in np.unique(bins):
            rows = np.flatnonzero(bins == k)
            folds[rows] = np.arange(rows.size) % N_FOLDS
        return cls(path, n, np.ascontiguousarray(y[:n], np.float64), bins, folds, **more)

    @cached_property
    def x(self) -> F32:
        """(n, p)."""
        if self.path is None:
            raise ValueError("this problem was made without rows")
        stored = np.load(self.path, mmap_mode="r")
        rows = np.empty((self.n, stored.shape[1]), np.float32)
        for first in range(0, self.n, BLOCK_ROWS):
            rows[first : first + BLOCK_ROWS] = stored[first : min(self.n, first + BLOCK_ROWS)]
        return rows

    def load(self) -> int:
        """Read the rows; returns their size in bytes."""
        return self.x.nbytes

    def alphas(self, k: int) -> F64:
        """Penalties of bin k, as scikit-learn's `alpha`."""
        return np.array(self.penalties) * int((self.bins == k).sum())

    def parts(self, k: int) -> list[NDArray[np.int64]]:
        """Rows of bin k, fold by fold."""
        return [np.flatnonzero((self.bins == k) & (self.folds == f)) for f in range(N_FOLDS)]

    def reduced(self) -> FitProblem:
        """A part that is solved in no time: some rows, evenly spaced pixels."""
        n, step = min(self.n, REDUCED_ROWS), max(1, self.x.shape[1] // REDUCED_PIXELS)
        part = FitProblem.of(None, n, self.y, self.bins, n_bins=self.n_bins, penalties=self.penalties)
        part.x = np.ascontiguousarray(self.x[:n, ::step])
        return part

    def r2(self, answer: Answer) -> float:
        """Hold-out R² with noise of the mean level, every star in its true bin."""
        count = np.bincount(self.bins, minlength=self.n_bins)
        best = np.nanmin(answer.errors, axis=1)
        return float(1 - (count @ best) / np.sum((self.y - self.y.mean()) ** 2))


def by_refits(problem: FitProblem, fit: Callable[[F32, F64, F64], tuple[NDArray, NDArray]]) -> Answer:
    """The answer from `fit(x, y, alphas) -> weights (p, A), intercepts (A,)`, once per bin and fold and once more."""
    k_all, a_all = problem.n_bins, len(problem.penalties)
    errors, weights = np.empty((k_all, a_all)), np.empty((k_all, problem.x.shape[1]))
    chosen, intercepts = np.empty(k_all, np.int64), np.empty(k_all)
    for k in range(k_all):
        parts, alphas, folds = problem.parts(k), problem.alphas(k), []
        for f, held in enumerate(parts):
            rows = np.concatenate(parts[:f] + parts[f + 1 :])
            w, c = fit(problem.x[rows], problem.y[rows], alphas)
            residual = problem.y[held, None] - (problem.x[held] @ w + c)
            folds.append((residual**2).mean(0) + (w * w).sum(0))
        errors[k] = np.mean(folds, 0)
        chosen[k] = a = int(errors[k].argmin())
        rows = np.sort(np.concatenate(parts))
        w, c = fit(problem.x[rows], problem.y[rows], alphas[a : a + 1])
        weights[k], intercepts[k] = w[:, 0], c[0]
    return Answer(errors, chosen, weights, intercepts)


def reference_answer(problem: FitProblem) -> Answer:
    """The answer in float64: least squares with the rows (√α I, 0) added, by QR."""
    import scipy.linalg

    def fit(x: F32, y: F64, alphas: F64) -> tuple[F64, F64]:
        wide = x.astype(np.float64)
        mean_x, mean_y = wide.mean(0), y.mean()
        p = len(mean_x)
        weights = np.empty((p, len(alphas)))
        for i, alpha in enumerate(alphas):
            rows = np.concatenate([wide - mean_x, np.sqrt(alpha) * np.eye(p)])
            q, r = scipy.linalg.qr(rows, mode="economic")
            target = np.concatenate([y - mean_y, np.zeros(p)])
            weights[:, i] = scipy.linalg.solve_triangular(r, q.T @ target)
        return weights, mean_y - mean_x @ weights

    return by_refits(problem, fit)


def compare(problem: FitProblem, found: Answer, expected: Answer) -> float:
    """Largest difference: of e over the variance of y in its bin, and of predictions over the scatter of y.

    Raises
    ------
    ValueError
        The answer has another shape, or a bin without any error.
    """
    if found.errors.shape != expected.errors.shape or found.weights.shape != expected.weights.shape:
        raise ValueError(
            f"errors {expected.errors.shape} and weights {expected.weights.shape} expected; "
            f"found {found.errors.shape} and {found.weights.shape}"
        )
    known = np.isfinite(found.errors)
    if not known[np.arange(len(known)), found.chosen].all() or not np.isfinite(found.weights).all():
        return float("inf")
    worst = 0.0
    for k in range(problem.n_bins):
        rows = np.concatenate(problem.parts(k))
        y = problem.y[rows]
        worst = max(worst, float(np.nanmax(np.abs(found.errors[k] - expected.errors[k])) / y.var()))
        # Two penalties may be as good as each other: then either choice is right.
        if found.chosen[k] == expected.chosen[k]:
            mine, theirs = (problem.x[rows] @ a.weights[k] + a.intercepts[k] for a in (found, expected))
            worst = max(worst, float(np.abs(mine - theirs).max() / y.std()))
        else:
            best = expected.errors[k].min()
            worst = max(worst, float((expected.errors[k, found.chosen[k]] - best) / y.var()))
    return worst


# --- ours ----------------------------------------------------------------------------------------------------


def _own(problem: FitProblem) -> Work:
    """`NormalEquations`, noise-white components and one eigendecomposition per bin and fold, as `moefast fit` does."""
    from moefast.experts.normal_equations import NormalEquations

    phases: dict[str, float] = {}

    def run() -> Answer:
        begin = time.perf_counter()
        equations = NormalEquations(np.zeros(problem.x.shape[1]), problem.n_bins, N_FOLDS)
        for first in range(0, problem.n, BLOCK_ROWS):
            here = slice(first, first + BLOCK_ROWS)
            equations.add(
                problem.x[here], problem.y[here], bins=problem.bins[here], folds=problem.folds[here]
            )
        equations.finish()
        phases["normal equations"] = time.perf_counter() - begin
        answer = _solve_own(problem, equations)
        phases["solve"] = time.perf_counter() - begin - phases["normal equations"]
        return answer

    return Work(run, phases=phases)


def _own_cuda(problem: FitProblem) -> Work:
    """The same with Σxxᵀ from the CUDA kernel."""
    from moefast.experts.normal_equations import NormalEquations

    cuda = import_module("moefast.kernels.cuda")

    phases: dict[str, float] = {}
    group = problem.bins * N_FOLDS + problem.folds

    def run() -> Answer:
        begin = time.perf_counter()
        totals = cuda.normal_equations(problem.x, problem.y, group, problem.n_bins * N_FOLDS)
        equations = NormalEquations(np.zeros(problem.x.shape[1]), problem.n_bins, N_FOLDS)
        for name, total in zip(("count", "sum_x", "sum_y", "sum_yy", "sum_xy", "gram"), totals, strict=True):
            setattr(equations, name, total.reshape(getattr(equations, name).shape))
        phases["normal equations"] = time.perf_counter() - begin
        answer = _solve_own(problem, equations)
        phases["solve"] = time.perf_counter() - begin - phases["normal equations"]
        return answer

    return Work(run, phases=phases)


def _solve_own(problem: FitProblem, equations: Any) -> Answer:
    from moefast.experts.ridge import NoisePath, principal_subspace

    pooled = equations.moments()
    subspace = principal_subspace(pooled, np.ones(pooled.mean_x.size))
    small = equations.transform(subspace.basis)
    k_all, a_all = problem.n_bins, len(problem.penalties)
    errors, weights = np.empty((k_all, a_all)), np.empty((k_all, pooled.mean_x.size))
    chosen, intercepts = np.empty(k_all, np.int64), np.empty(k_all)
    for k in range(k_all):
        alphas, folds = problem.alphas(k), []
        for f in range(N_FOLDS):
            path = NoisePath(small.moments(k, without_fold=f))
            held = small.moments(k, fold=f)
            row = []
            for alpha in alphas:
                w, c = path.solve(float(np.sqrt(alpha / path.moments.n)))
                # The basis is orthonormal here, so |w|² is that of the pixels.
                row.append(held.sse(w, c, noise=1.0) / held.n)
            folds.append(row)
        errors[k] = np.mean(folds, 0)
        chosen[k] = a = int(errors[k].argmin())
        path = NoisePath(small.moments(k))
        w, intercepts[k] = path.solve(float(np.sqrt(alphas[a] / path.moments.n)))
        weights[k] = subspace.basis @ w
    return Answer(errors, chosen, weights, intercepts)


# --- other libraries -----------------------------------------------------------------------------------------


def by_normal_equations(
    problem: FitProblem,
    gram: Callable[[F32, F64], tuple[Any, Any, Any]],
    solve: Callable[[Any, Any, float], Any],
    host: Callable[[Any], F64],
    phases: dict[str, float],
) -> Answer:
    """The answer from second moments, one bin after the other, for libraries that know matrices.

    `gram(x, y)` gives Σxxᵀ, Σxy and Σx in float64, `solve(G, b, α)` solves (G + αI) w = b, `host` gives NumPy arrays.
    """
    k_all, a_all, p = problem.n_bins, len(problem.penalties), problem.x.shape[1]
    errors, weights = np.empty((k_all, a_all)), np.empty((k_all, p))
    chosen, intercepts = np.empty(k_all, np.int64), np.empty(k_all)
    phases.update({"normal equations": 0.0, "solve": 0.0})

    def fit(totals: tuple[Any, Any, Any], n: int, sum_y: float, alpha: float) -> tuple[Any, float]:
        g, b, s = totals
        w = solve(g - s[:, None] * (s / n), b - s * (sum_y / n), alpha)
        return w, sum_y / n - float(w @ s) / n

    for k in range(k_all):
        parts, alphas, folds = problem.parts(k), problem.alphas(k), []
        begin = time.perf_counter()
        totals = [gram(problem.x[rows], problem.y[rows]) for rows in parts]
        sums = [float(problem.y[rows].sum()) for rows in parts]
        whole = tuple(a + b + c for a, b, c in zip(*totals, strict=True))
        phases["normal equations"] += time.perf_counter() - begin
        begin = time.perf_counter()
        n = sum(len(rows) for rows in parts)
        for f, rows in enumerate(parts):
            rest = tuple(a - b for a, b in zip(whole, totals[f], strict=True))
            y, row = problem.y[rows], []
            for alpha in alphas:
                w, c = fit(rest, n - len(rows), sum(sums) - sums[f], alpha)
                g, b, s = totals[f]
                # Σ(y − c − wᵀx)² without another look at the rows.
                sse = w @ (g @ w) - 2 * (w @ b) + 2 * c * (w @ s) + float(((y - c) ** 2).sum())
                row.append(float(sse) / len(rows) + float(w @ w))
            folds.append(row)
        errors[k] = np.mean(folds, 0)
        chosen[k] = a = int(errors[k].argmin())
        w, intercepts[k] = fit(whole, n, sum(sums), alphas[a])
        weights[k] = host(w)
        phases["solve"] += time.perf_counter() - begin
    return Answer(errors, chosen, weights, intercepts)


def from_few_rows(
    mapped: Callable[[F32], Any], solve: Callable[[Any, Any, float], Any], host: Callable[[Any], NDArray]
) -> Callable[[F32, F64, F64], tuple[NDArray, NDArray]]:
    """Fit by w = xᵀ (x xᵀ + αI)⁻¹ y, for fewer rows than pixels: a system of the size of the rows.

    `mapped` brings an array to the library; `solve` and `host` are those of `by_normal_equations`.
    """

    def fit(x: F32, y: F64, alphas: F64) -> tuple[NDArray, NDArray]:
        mean_x, mean_y = x.mean(0, dtype=np.float64).astype(np.float32), y.mean()
        rows, target = mapped(x - mean_x), mapped((y - mean_y).astype(np.float32))
        kernel = rows @ rows.T
        weights = np.stack([host(rows.T @ solve(kernel, target, alpha)) for alpha in alphas], 1)
        return weights, mean_y - mean_x @ weights

    return fit


def _few_rows(problem: FitProblem) -> bool:
    """Whether no bin has as many rows as pixels."""
    return int(np.bincount(problem.bins).max()) < problem.x.shape[1]


def _numpy(problem: FitProblem) -> Work:
    """Normal equations in plain NumPy: float32 products, float64 systems; of the rows where those are fewer."""

    def gram(x: F32, y: F64) -> tuple[F64, F64, F64]:
        return (x.T @ x).astype(np.float64), x.T.astype(np.float64) @ y, x.sum(0, dtype=np.float64)

    def solve(g: NDArray, b: NDArray, alpha: float) -> NDArray:
        system = g.astype(np.float64)
        system[np.diag_indices_from(system)] += alpha
        return np.linalg.solve(system, b.astype(np.float64)).astype(b.dtype)

    phases: dict[str, float] = {}
    if _few_rows(problem):
        fit = from_few_rows(np.asarray, solve, np.asarray)
        return Work(lambda: by_refits(problem, fit))
    return Work(lambda: by_normal_equations(problem, gram, solve, np.asarray, phases), phases=phases)


def _torch(problem: FitProblem, device: str) -> Work:
    """Normal equations in torch: float32 products without TF32, float64 Cholesky; of the rows where those are fewer."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"torch {torch.__version__} finds no CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = False

    def there(array: NDArray) -> Any:
        return torch.from_numpy(array).to(device)

    def gram(x: F32, y: F64) -> tuple[Any, Any, Any]:
        rows = there(x)
        wide = rows.double()
        return (rows.T @ rows).double(), wide.T @ there(y), wide.sum(0)

    def solve(g: Any, b: Any, alpha: float) -> Any:
        system = g.to(torch.float64, copy=True)
        system.diagonal().add_(alpha)
        w = torch.cholesky_solve(b.double()[:, None], torch.linalg.cholesky(system))[:, 0]
        return w.to(b.dtype)

    def host(w: Any) -> NDArray:
        # What comes back to the host waits for the device, so the clock needs nothing more.
        return w.cpu().numpy()

    phases: dict[str, float] = {}
    if _few_rows(problem):
        fit = from_few_rows(there, solve, host)
        return Work(lambda: by_refits(problem, fit))
    return Work(lambda: by_normal_equations(problem, gram, solve, host, phases), phases=phases)


def _sklearn(problem: FitProblem) -> Work:
    """`Ridge`, fitted again for every bin, penalty and fold."""
    from sklearn.linear_model import Ridge

    def fit(x: F32, y: F64, alphas: F64) -> tuple[NDArray, NDArray]:
        models = [Ridge(alpha=alpha).fit(x, y) for alpha in alphas]
        return np.stack([m.coef_ for m in models], 1), np.array([m.intercept_ for m in models])

    return Work(lambda: by_refits(problem, fit))


def _sklearn_cv(problem: FitProblem) -> Work:
    """`RidgeCV` over the given folds, with the expected error as its score; it keeps the best penalty's error only."""
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import PredefinedSplit

    def score(model: Any, x: F32, y: F64) -> float:
        return -float(((y - model.predict(x)) ** 2).mean() + model.coef_ @ model.coef_)

    def run() -> Answer:
        k_all = problem.n_bins
        errors = np.full((k_all, len(problem.penalties)), np.nan)
        weights, intercepts = np.empty((k_all, problem.x.shape[1])), np.empty(k_all)
        chosen = np.empty(k_all, np.int64)
        for k in range(k_all):
            rows, alphas = np.flatnonzero(problem.bins == k), problem.alphas(k)
            split = PredefinedSplit(problem.folds[rows])
            model = RidgeCV(alphas=alphas, cv=split, scoring=score).fit(problem.x[rows], problem.y[rows])
            chosen[k] = a = int(np.abs(alphas - model.alpha_).argmin())
            errors[k, a], weights[k], intercepts[k] = -model.best_score_, model.coef_, model.intercept_
        return Answer(errors, chosen, weights, intercepts)

    return Work(run)


def _himalaya(problem: FitProblem, backend: str) -> Work:
    """One target of himalaya per penalty: one decomposition per bin and fold serves the whole path.

    Its kernel ridge where there are fewer rows than pixels, as the library advises.
    """
    from himalaya.backend import set_backend
    from himalaya.kernel_ridge import KernelRidge
    from himalaya.ridge import Ridge

    set_backend(backend)

    def host(array: Any) -> NDArray:
        return np.asarray(array.cpu() if hasattr(array, "cpu") else array)

    def fit(x: F32, y: F64, alphas: F64) -> tuple[NDArray, NDArray]:
        targets = np.repeat(y.astype(np.float32)[:, None], len(alphas), 1)
        # Centred here, so that both of its solvers are asked for the same thing.
        mean_x, mean_y = x.mean(0, dtype=np.float64).astype(np.float32), np.float32(y.mean())
        model: Any
        if len(x) < x.shape[1]:
            model = KernelRidge(alpha=alphas, kernel="linear").fit(x - mean_x, targets - mean_y)
            weights = host(model.get_primal_coef())
        else:
            model = Ridge(alpha=alphas).fit(x - mean_x, targets - mean_y)
            weights = host(model.coef_)
        weights = weights.reshape(x.shape[1], -1)
        return weights, mean_y - mean_x @ weights

    return Work(lambda: by_refits(problem, fit))


def _engines() -> Iterator[Engine]:
    yield Engine("moefast", "moefast", "fit", _own, floor="ssyrk", environment=OWN_ENVIRONMENT)
    yield Engine(
        "moefast-cuda", "moefast, GPU", "fit", _own_cuda, ("moefast.kernels.cuda",), "cuda", "sgemm, GPU",
        environment=OWN_ENVIRONMENT,
    )  # fmt: skip
    yield Engine("numpy", "NumPy normal equations", "fit", _numpy, floor="ssyrk")
    yield Engine(
        "torch", "torch normal equations", "fit", lambda p: _torch(p, "cpu"), ("torch",), floor="ssyrk"
    )
    yield Engine(
        "torch-cuda", "torch normal equations, GPU", "fit", lambda p: _torch(p, "cuda"), ("torch",), "cuda",
        "sgemm, GPU",
    )  # fmt: skip
    yield Engine("sklearn", "scikit-learn Ridge refits", "fit", _sklearn, ("sklearn",), floor="ssyrk")
    yield Engine("sklearn-cv", "scikit-learn RidgeCV", "fit", _sklearn_cv, ("sklearn",), floor="ssyrk")
    yield Engine(
        "himalaya", "himalaya ridge", "fit", lambda p: _himalaya(p, "numpy"), ("himalaya",), floor="ssyrk"
    )
    yield Engine(
        "himalaya-cuda", "himalaya ridge, GPU", "fit", lambda p: _himalaya(p, "torch_cuda"),
        ("himalaya", "torch"), "cuda", "sgemm, GPU",
    )  # fmt: skip


FIT = {engine.name: engine for engine in _engines()}
"""Engines of the task `fit`, by name."""
