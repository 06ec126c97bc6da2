"""From flux and error to the posterior of a star's velocity.

*Scan.* With weights a = 1/σ² (0 where a pixel is bad), a smooth continuum and its slopes as columns of F (F₀ without
slope) and c the scale that they suggest, the spectrum of template j at velocity v is c (F₀ + ℓ_j(v) + F η). With
a′ = c²a, y = a′(x/c − F₀), G = Fᵀ diag(a′) F + H and H the prior precision of η, what the lines ℓ gain over none is

    Δ_j(v) = ℓᵀ(y − a′F G⁻¹Fᵀy) − ½ (ℓᵀ diag(a′) ℓ − |L⁻¹Fᵀa′ℓ|²),      G = L Lᵀ,
    ln E(v) = ln Σ_j π_j exp Δ_j(v).

All velocities are compared on the same pixels, as they were measured: those that some velocity moves beyond the ends of
the templates have no weight at any.

*Step.* Near the right velocity a spectrum is x = c (r + B b + d δ) with d its change with the velocity. With b the
best point of the space B at δ = 0 under the prior N(b₀, P) (`moefast.kernels.clouds`), K = Bᵀ diag(a′) B + P⁻¹ and
w = Bᵀ(a′ d),

    h = dᵀ(a′ d) − wᵀK⁻¹w,      δ = (dᵀ(y − a′ B b) − wᵀK⁻¹(Bᵀ(y − a′ B b) − P⁻¹(b − b₀))) / h,      σ_v = 1/√h:

one step of Gauss and Newton, which marginalises all spectra and nuisances, and the Cramér-Rao error under their prior.

Design: lines are linear combinations of a few components, and so are their squares: a star is multiplied with the
components at all velocities, which is one matrix product, and hundreds of templates follow from that. The loops are in
`moefast.kernels.cpu_velocity`; `moefast.kernels.reference_velocity` has the equations in plain NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moefast.core.threads import in_threads
from moefast.kernels import cpu_information, cpu_velocity
from moefast.kernels.clouds import CUDA_DIRECTIONS, Space, rounded_up
from moefast.kernels.cpu_information import ROWS, SPECTRUM
from moefast.kernels.cpu_velocity import LANES
from moefast.kernels.dispatch import on_cuda

__all__ = [
    "CUDA_CONTINUUM",
    "Slopes",
    "VelocityTemplates",
    "scan_without_cuda",
    "step_without_cuda",
    "velocity_and_error",
    "velocity_conclusion",
    "velocity_evidence",
    "velocity_step",
]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
_NO_MASK = np.zeros((0, 0), np.bool_)
CUDA_CONTINUUM, CUDA_VALUES = 5, 1500
"""Columns of the continuum, and numbers of a star at each velocity that the CUDA kernels have registers and shared
memory for."""


@dataclass(frozen=True)
class VelocityTemplates:
    """Lines of m templates at n_v velocities.

    Attributes
    ----------
    first : int
        First pixel of the spectrum that is used.
    continuum : array of shape (c, k), float64
        F, of k pixels from `first` on; row 0 has no slope.
    precision : array of shape (c,), float64
        H, diagonal.
    lines : array of shape (n_v, r, k), float32
        Components of ℓ at each velocity.
    squares : array of shape (n_v, s, k), float32
        Components of ℓ² at each velocity.
    of_lines, of_squares : array of shape (m, r), (m, s), float32
        ℓ_j and ℓ_j² in components.
    log_weights : array of shape (m,), float32
        ln π_j.
    """

    first: int
    continuum: F64
    precision: F64
    lines: F32
    squares: F32
    of_lines: F32
    of_squares: F32
    log_weights: F32
    arrays: tuple = field(init=False, repr=False)

    @property
    def n_velocities(self) -> int:
        """Velocities n_v."""
        return len(self.lines)

    def __post_init__(self) -> None:
        c, k = self.continuum.shape
        (n_v, r, _), (_, s, _), m = self.lines.shape, self.squares.shape, self.log_weights.size
        expected = {
            "precision": (c,),
            "lines": (n_v, r, k),
            "squares": (n_v, s, k),
            "of_lines": (m, r),
            "of_squares": (m, s),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} of shape {shape} expected; found {getattr(self, name).shape}")
        arrays = (
            np.ascontiguousarray(self.continuum, np.float64),
            np.ascontiguousarray(self.precision, np.float64),
            _in_lanes(self.lines),
            _in_lanes(self.squares),
            np.ascontiguousarray(self.of_lines.T, np.float32),
            np.ascontiguousarray(self.of_squares.T, np.float32),
            np.ascontiguousarray(self.log_weights, np.float32),
        )
        object.__setattr__(self, "arrays", arrays)


def _in_lanes(components: F32) -> F32:
    """Components (n_v, r, k) as (blocks, k, `LANES`)."""
    n_v, r, k = components.shape
    lanes = np.zeros((rounded_up(n_v * r, LANES), k), np.float32)
    lanes[: n_v * r] = components.reshape(n_v * r, k)
    return np.ascontiguousarray(lanes.reshape(-1, LANES, k).transpose(0, 2, 1))


@dataclass(frozen=True)
class Slopes:
    """Change of spectra with velocity.

    Attributes
    ----------
    of_reference : array of shape (p,), float32
        Change of the reference spectrum per km/s.
    of_directions : array of shape (p, n + q), float32
        Change of every column of `Space.directions`; nuisances do not move.
    n_nuisances : int
        q.
    """

    of_reference: F32
    of_directions: F32
    n_nuisances: int
    arrays: tuple = field(init=False, repr=False)

    def __post_init__(self) -> None:
        p, width = self.of_directions.shape
        if self.of_reference.shape != (p,):
            raise ValueError(f"of_reference of shape ({p},) expected; found {self.of_reference.shape}")
        pixels = rounded_up(p, SPECTRUM)
        slopes, reference = np.zeros((pixels, width), np.float32), np.zeros(pixels, np.float32)
        slopes[:p] = np.roll(self.of_directions, self.n_nuisances, axis=1)
        reference[:p] = self.of_reference
        slopes = np.ascontiguousarray(slopes.reshape(-1, SPECTRUM, width).transpose(0, 2, 1))
        object.__setattr__(self, "arrays", (slopes, reference))


def scan_without_cuda(templates: VelocityTemplates) -> str:
    """Why the CUDA kernels cannot hold templates, in words; empty if they can."""
    c, lines, squares = len(templates.continuum), templates.lines.shape[1], templates.squares.shape[1]
    if c <= CUDA_CONTINUUM and (CUDA_CONTINUUM + 1) * lines + squares <= CUDA_VALUES:
        return ""
    return (
        f"velocities by {lines} components of lines, {squares} of their squares and {c} columns of the continuum "
        f"(at most {CUDA_CONTINUUM} columns, and {CUDA_VALUES} components, those of lines {CUDA_CONTINUUM + 1} times)"
    )


def step_without_cuda(space: Space) -> str:
    """Why the CUDA kernels cannot hold a space and one direction more, in words; empty if they can."""
    width = space.directions.shape[1]
    if width < CUDA_DIRECTIONS:
        return ""
    return f"velocities in a space of {width} directions (at most {CUDA_DIRECTIONS - 1})"


def velocity_and_error(found: F64) -> tuple[F64, F64]:
    """Velocities and their 1σ from velocities and curvatures (n, 2)."""
    return found[:, 0].copy(), 1 / np.sqrt(np.maximum(found[:, 1], cpu_information.TINY))


def _checked(
    flux: NDArray, error: NDArray, mask: NDArray[np.bool_] | None, p: int
) -> tuple[F32, F32, NDArray[np.bool_]]:
    flux, error = np.ascontiguousarray(flux, np.float32), np.ascontiguousarray(error, np.float32)
    if flux.ndim != 2 or flux.shape[1] != p or error.shape != flux.shape:
        raise ValueError(f"flux and error of shape (n, {p}) expected; found {flux.shape} and {error.shape}")
    if mask is not None and (mask.dtype != np.bool_ or mask.shape != flux.shape):
        raise ValueError(f"mask must be bool of shape {flux.shape}; found {mask.dtype} {mask.shape}")
    return flux, error, _NO_MASK if mask is None else np.ascontiguousarray(mask)


def velocity_evidence(
    flux: NDArray,
    error: NDArray,
    mask: NDArray[np.bool_] | None,
    templates: VelocityTemplates,
    *,
    backend: str = "cpu",
) -> F64:
    """Ln E(v) (n, n_v) of each star at each velocity, relative to a spectrum without lines.

    Parameters
    ----------
    flux, error : array of shape (n, p)
        Flux and its 1σ in any unit. A pixel whose flux is not finite, or whose error is not positive or above 1e6,
        weighs nothing.
    mask : array of shape (n, p), bool, optional
        True where a pixel is bad whatever it holds.
    templates : VelocityTemplates
    backend : "cpu" or "cuda"

    Raises
    ------
    ValueError
        Shapes that do not fit.
    BackendError
        CUDA was asked for and cannot be used.
    """
    continuum, precision, lines, squares, of_lines, of_squares, log_weights = templates.arrays
    c, k = continuum.shape
    p = flux.shape[1] if flux.ndim == 2 else 0
    flux, error, mask = _checked(flux, error, mask, max(p, templates.first + k))
    if backend != "cpu":
        there: F64 = on_cuda("velocity_evidence", backend)(
            flux, error, mask if mask.size else None, templates
        )
        return there
    n = len(flux)
    out = np.empty((n, templates.n_velocities))
    seen = slice(templates.first, templates.first + k)
    each = c + 1

    def run(first_block: int, stop_block: int) -> None:
        rows, weights = np.zeros((ROWS * each, k), np.float32), np.zeros((ROWS, k), np.float32)
        of_rows = np.empty((len(lines), ROWS * each, LANES), np.float32)
        of_weights = np.empty((len(squares), ROWS, LANES), np.float32)
        for start in range(first_block * ROWS, min(stop_block * ROWS, n), ROWS):
            count = min(ROWS, n - start)
            for i in range(count):
                cpu_velocity.read_star(
                    flux[start + i, seen], error[start + i, seen], mask[start + i, seen] if mask.size else _ROW,
                    mask.size > 0, continuum, precision, rows[i * each : (i + 1) * each], weights[i],
                )  # fmt: skip
            cpu_velocity.multiply(rows, count * each, lines, of_rows)
            cpu_velocity.multiply(weights, count, squares, of_weights)
            for i in range(count):
                cpu_velocity.gains(
                    of_rows, of_weights, i * each, i, each, of_lines, of_squares, log_weights, out[start + i]
                )

    in_threads(-(-n // ROWS), run, least=1)
    return out


_ROW = np.zeros(0, np.bool_)


def velocity_step(
    flux: NDArray,
    error: NDArray,
    mask: NDArray[np.bool_] | None,
    space: Space,
    slopes: Slopes,
    *,
    backend: str = "cpu",
) -> tuple[F64, F64]:
    """How far off the velocity is that stars were put to rest by, and its 1σ, both (n,) in km/s.

    Parameters
    ----------
    flux, error, mask : array of shape (n, p)
        See `velocity_evidence`.
    space : Space
        Its `precision` and `pull` are of spectra at rest.
    slopes : Slopes
    backend : "cpu" or "cuda"

    Raises
    ------
    ValueError
        Shapes that do not fit.
    BackendError
        CUDA was asked for and cannot be used.
    """
    p, width = space.reference.size, space.directions.shape[1]
    if slopes.of_directions.shape != space.directions.shape or slopes.n_nuisances != space.n_nuisances:
        raise ValueError(f"slopes of {space.directions.shape} expected; found {slopes.of_directions.shape}")
    flux, error, mask = _checked(flux, error, mask, p)
    if backend != "cpu":
        there: tuple[F64, F64] = on_cuda("velocity_step", backend)(
            flux, error, mask if mask.size else None, space, slopes
        )
        return there
    n = len(flux)
    found = np.empty((n, 2))

    def run(first_block: int, stop_block: int) -> None:
        columns, products, spectra, precision, pull, of_cells = space.arrays
        of_directions, of_reference = slopes.arrays
        y, cells = np.zeros((ROWS, columns.shape[1]), np.float32), np.zeros((ROWS, products.shape[1]))
        information, weighed = np.zeros_like(y), np.zeros_like(y)
        points, sums = np.empty((ROWS, width), np.float32), np.empty((ROWS, 2))
        u, across = (np.empty((ROWS, len(columns) * columns.shape[2])) for _ in range(2))
        size = len(products) * products.shape[2] + cpu_information.OVERHANG
        packed, numbers = np.empty((ROWS, size)), np.empty((ROWS, 5))
        quality = [np.empty(ROWS, dtype) for dtype in (np.float32, np.float32, np.int32, np.uint32)]
        for start in range(first_block * ROWS, min(stop_block * ROWS, n), ROWS):
            here = slice(start, min(start + ROWS, n))
            count = here.stop - start
            cpu_information.read_pixels(
                flux[here], error[here], mask[here] if mask.size else mask, space.reference, space.noise_shape,
                *of_cells, y, information, cells, numbers, *quality,
            )  # fmt: skip
            cpu_information.multiply_pixels(y, count, columns, u)
            cpu_information.multiply_cells(cells, count, products, packed)
            cpu_information.refine(
                y, information, count, packed, spectra, columns, precision, pull, numbers, points, u
            )
            cpu_velocity.slopes_of(
                y, information, count, points, spectra, of_directions, of_reference, weighed, sums
            )
            cpu_information.multiply_pixels(weighed, count, columns, across)
            cpu_velocity.step(count, points, packed, precision, pull, u, across, sums, found[here])

    in_threads(-(-n // ROWS), run, least=1)
    return velocity_and_error(found)


def velocity_conclusion(
    grid: F64,
    evidence: F64,
    velocity: F64,
    sigma: F64,
    shares: F64,
    *,
    near: float,
    near_sigmas: float,
    wider: float,
) -> tuple[F64, F64, F64]:
    """Velocities, their 1σ and the probability of all other velocities, all (n,), from the scan and the step.

    Parameters
    ----------
    grid : array of shape (n_v,), km/s
        Velocities, equally far apart.
    evidence : array of shape (n, n_v)
    velocity, sigma : array of shape (n,), km/s
        Of the step.
    shares : array of shape (f, 4)
        Weights of the four neighbours of each of f places from one velocity to the next, of which the first is the
        velocity itself.
    near, near_sigmas : float
        Velocities within so many km/s, or so many 1σ, of the star's are no other ones.
    wider : float
        Where the scan's peak is so many times as wide as the step's 1σ, its mean and width are taken.

    Raises
    ------
    ValueError
        Shapes that do not fit.
    """
    evidence = np.ascontiguousarray(evidence, np.float64)
    n, n_v = len(evidence), len(grid)
    if n_v < 3 or evidence.shape != (n, n_v) or velocity.shape != (n,) or sigma.shape != (n,):
        raise ValueError(
            f"evidence of shape (n, {n_v}), n_v at least 3, and velocity and sigma of shape (n,) expected; found "
            f"{evidence.shape}, {velocity.shape} and {sigma.shape}"
        )
    velocity, sigma, other = (np.array(values, np.float64) for values in (velocity, sigma, sigma))
    grid, shares = np.ascontiguousarray(grid, np.float64), np.ascontiguousarray(shares, np.float64)

    def run(first: int, stop: int) -> None:
        rows = slice(first, stop)
        cpu_velocity.conclude(
            grid, evidence[rows], shares, near, near_sigmas, wider, velocity[rows], sigma[rows], other[rows]
        )

    in_threads(n, run)
    return velocity, sigma, other
