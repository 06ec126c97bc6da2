"""The posterior of a star's velocity under the library of a posterior mixture.

Design: first all velocities of a grid are compared with the cloud means as templates
(`moefast.kernels.velocity_evidence`); then the star is put to rest by the best one, and one step of Gauss and Newton
marginalises all spectra and nuisances of the library (`moefast.kernels.velocity_step`). The posterior of the velocity
is a normal distribution around the step's answer, and what the scan says of velocities farther away. Libraries of
moving stars hold their scatter: what of their covariance a velocity could make is taken out, else every star could be
at rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from moefast.core.errors import DisagreementError, InputError
from moefast.core.threads import one_blas_thread
from moefast.kernels import (
    Slopes,
    Space,
    VelocityTemplates,
    velocity_conclusion,
    velocity_evidence,
    velocity_step,
)
from moefast.kernels.dispatch import on_cuda
from moefast.kernels.resample import pixel_edges, resample
from moefast.posterior.library_stars import library_stars
from moefast.posterior.mixture import PosteriorMixture
from moefast.spectra.units import LIGHT_SPEED

__all__ = ["DEFAULT_RANGE", "FittedVelocities", "VelocityFit"]

F64 = NDArray[np.float64]
AtRest = Callable[[F64, NDArray[np.intp]], tuple[NDArray, NDArray, NDArray[np.bool_]]]
"""Flux, error and mask on the model's grid of some rows, with a velocity [km/s] of each removed."""
Scan = Callable[[NDArray, NDArray, NDArray[np.bool_]], F64]
Step = Callable[[NDArray, NDArray, NDArray[np.bool_]], tuple[F64, F64]]

DEFAULT_RANGE = 500.0
"""Largest velocity, either way, km/s."""
STEP = 10.0
"""Of the scan, km/s: a third of the width of a line's correlation with itself."""
FINER = 10
"""Steps of the posterior for each one of the scan."""
PLACES = np.arange(FINER) / FINER
BETWEEN = np.stack(
    [
        -PLACES * (PLACES - 1) * (PLACES - 2) / 6, (PLACES + 1) * (PLACES - 1) * (PLACES - 2) / 2,
        -(PLACES + 1) * PLACES * (PLACES - 2) / 2, (PLACES + 1) * PLACES * (PLACES - 1) / 6,
    ],
    axis=1,
)  # fmt: skip
"""Places of these steps between two of the scan, and the weights of four neighbours there, of a cubic."""
SLOPES, SLOPE_WIDTH, SCALE_WIDTH, CONTINUUM_DEGREE = 4, 0.3, 1.0, 5
"""Polynomials, besides the scale, that the continuum is free by, their prior widths, and degree of the continuum."""
LEFT = 1e-3
"""Share of the energy of all lines that components may leave out."""
MARGIN = 4
"""Pixels at the ends that resampling does not give."""
LEAST_SEEN = 0.5
"""Share of the pixels that all velocities must have in common."""
FARTHEST = 1.5
"""Steps of the scan that its best velocity can be off."""
NEAR, NEAR_SIGMAS = 30.0, 4.0
"""Velocities nearer than this, in km/s and in standard errors, are the same answer."""
WIDER = 1.2
"""Where the scan's peak is so much wider than the normal distribution, as of faint stars, it is no normal distribution,
and mean and width are the scan's."""
AMBIGUOUS = 0.05
"""Probability of all other velocities beyond which the answer is one of several."""
NARROW = 2.0
"""Standard error, km/s, below which a velocity is as good as known."""
KNOWN = 5.0
"""Standard error, km/s, up to which a velocity that is given is taken as it is: that costs 0.005 of R² at most."""
N_NODES = 5
"""Velocities at most at which labels are predicted."""
SIGMA = 2 * float(ndtr(1.0)) - 1
"""Probability within one standard deviation."""
N_SHARES, SURPLUS, SEEN = 5, 0.1, 2e-3
"""The scatter of velocities in the library is taken from so many directions that velocities make most of; what is taken
out beyond it, relative to its variance; and share of its variance that is left to any direction."""
N_CHECKED = 16
"""Stars of the library that a device must compare with templates as the CPU does: one of each SNR and kind of gap."""
SCAN_PART, SCAN_LEAST, STEP_PART, SIGMA_PART = 2e-5, 0.02, 2e-3, 1e-4
"""How far it may be off, as in tests: ln E, relative to the star's largest and absolute; the step, in its standard
errors; and these, relatively. Another unit of flux, which changes every rounding, takes 0.03 of it at an SNR of 100."""


@dataclass(frozen=True)
class FittedVelocities:
    """Velocities of n stars.

    Attributes
    ----------
    velocity, error : array of shape (n,), km/s
        The most probable velocity, and half the width of the interval around it that holds 68.3 % of the posterior.
    uncertain : array of shape (n,), bool
        Whether there is another velocity that fits about as well, or the best one is the last that was looked at.
    nodes, weights : array of shape (n, `N_NODES`)
        Velocities that stand for the posterior where labels are averaged over it; weights of those not used are 0.
    """

    velocity: F64
    error: F64
    uncertain: NDArray[np.bool_]
    nodes: F64
    weights: F64


class VelocityFit:
    """Fits velocities with the library of a mixture.

    Parameters
    ----------
    mixture : PosteriorMixture
    largest : float
        Largest velocity, either way, km/s; all in between are equally probable before a star is looked at.

    Attributes
    ----------
    backend : "cpu" or "cuda"
        Where stars are compared with spectra; `use_device` makes it "cuda".

    Raises
    ------
    InputError
        The range is not positive, or moves most of the model's grid away.
    """

    def __init__(self, mixture: PosteriorMixture, largest: float = DEFAULT_RANGE) -> None:
        wave = mixture.wave
        low, high = wave[0] * (1 + largest / LIGHT_SPEED), wave[-1] * (1 - largest / LIGHT_SPEED)
        seen = np.flatnonzero((wave >= low) & (wave <= high))[MARGIN:-MARGIN]
        if not (largest > 0 and len(seen) >= LEAST_SEEN * len(wave)):
            raise InputError(
                f"velocity range {largest:g}: expected velocities above 0 km/s that leave half of the model's pixels "
                f"({wave[0]:.0f} to {wave[-1]:.0f} Å) in sight"
            )
        self.mixture, self.largest, self.backend = mixture, float(largest), "cpu"
        n_steps = max(4, int(np.ceil(2 * largest / STEP)))
        self.grid = np.linspace(-largest, largest, n_steps + 1)
        self._seen = slice(int(seen[0]), int(seen[-1]) + 1)

    @property
    def _star_clouds(self) -> NDArray[np.bool_]:
        """Clouds of stars at rest: those of moving stars would fit at other velocities."""
        return self.mixture.slow_clouds

    @cached_property
    def templates(self) -> VelocityTemplates:
        """Lines of the clouds' mean spectra, at every velocity of the grid."""
        mixture = self.mixture
        reference, wave = mixture.reference.astype(np.float64), mixture.wave
        n = mixture.n_coordinates
        x = 2 * (wave - wave[0]) / (wave[-1] - wave[0]) - 1
        smooth = np.polynomial.Legendre.fit(x, reference, CONTINUUM_DEGREE)(x)
        polynomials = np.stack([np.polynomial.Legendre.basis(k)(x) for k in range(SLOPES + 1)])
        spectra = reference + mixture.keys[self._star_clouds].astype(np.float64) @ mixture.directions[
            :, :n
        ].T.astype(np.float64)
        ratio = spectra / smooth
        levels = ratio @ np.linalg.pinv(polynomials) @ polynomials
        lines = smooth * (ratio / levels - 1)
        widths = np.array([SCALE_WIDTH] + SLOPES * [SLOPE_WIDTH])
        share = np.exp(mixture.log_weights[self._star_clouds].astype(np.float64))
        line_parts, of_lines = _components(lines, share)
        square_parts, of_squares = _components(lines**2, share)
        return VelocityTemplates(
            first=self._seen.start,
            continuum=(smooth * polynomials)[:, self._seen],
            precision=1 / widths**2,
            lines=self._moved(line_parts),
            squares=self._moved(square_parts),
            of_lines=of_lines,
            of_squares=of_squares,
            log_weights=np.log(share / share.sum()).astype(np.float32),
        )

    def _moved(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Rows (r, p) at every velocity (n_v, r, k), of the pixels that are seen."""
        wave, (r, p) = self.mixture.wave, rows.shape
        error, bad, starts = np.ones(rows.size, np.float32), np.zeros(rows.size, bool), np.arange(r + 1) * p
        flat, edges = rows.ravel(), pixel_edges(wave)
        out = np.empty((len(self.grid), r, self._seen.stop - self._seen.start), np.float32)
        for k, velocity in enumerate(self.grid):
            factor = np.full(r, 1 / (1 + velocity / LIGHT_SPEED))
            moved, _, mask, _ = resample(wave, flat, error, bad, starts, factor, edges)
            if mask[:, self._seen].any():
                raise ValueError(f"pixels without a template at {velocity:g} km/s")
            out[k] = moved[:, self._seen]
        return out

    @cached_property
    def slopes(self) -> Slopes:
        """Change of spectra per km/s; nuisances belong to the instrument and do not move."""
        mixture, n = self.mixture, self.mixture.n_coordinates
        directions = np.zeros(mixture.directions.shape, np.float32)
        directions[:, :n] = _slope(mixture.wave, mixture.directions[:, :n].astype(np.float64))
        reference = _slope(mixture.wave, mixture.reference.astype(np.float64))
        return Slopes(reference.astype(np.float32), directions, mixture.n_nuisances)

    @cached_property
    def space(self) -> Space:
        """The mixture's space, with the library as one Gaussian of stars at rest."""
        mixture, n = self.mixture, self.mixture.n_coordinates
        precision, pull = mixture.library_at_rest()
        pull = pull[:, 0]
        covariance = np.linalg.inv(precision[:n, :n])
        mean = covariance @ pull[:n]
        # What velocities make of clouds, in coordinates, as far as the space holds it.
        stars = self._star_clouds
        share = np.exp(mixture.log_weights[stars].astype(np.float64))
        share /= share.sum()
        directions = mixture.directions[:, :n].astype(np.float64)
        spectra = mixture.reference.astype(np.float64)[:, None] + directions @ mixture.keys[stars].T
        white = 1 / np.sqrt(mixture.noise_shape.astype(np.float64))[:, None]
        whitened = directions * white
        seen = whitened.T @ (_slope(mixture.wave, spectra) * white)
        moved = np.linalg.pinv(whitened.T @ whitened, hermitian=True) @ seen
        made = (moved * share) @ moved.T
        root = np.linalg.cholesky(covariance)
        shares, vectors = np.linalg.eigh(np.linalg.solve(root, np.linalg.solve(root, made).T))
        # Where velocities make all of the variance, its quotient with that of 1 km/s is their variance. One direction
        # alone gives too little, and what a star's own velocity makes is spread over several.
        variance = 1 / max(float(shares[-N_SHARES:].mean()), 1e-12)
        left = np.maximum(1 - (1 + SURPLUS) * variance * shares, SEEN)
        covariance = root @ (vectors * left) @ vectors.T @ root.T
        at_rest = precision.copy()
        at_rest[:n, :n] = np.linalg.inv((covariance + covariance.T) / 2)
        return Space(
            reference=mixture.reference, noise_shape=mixture.noise_shape, directions=mixture.directions,
            n_nuisances=mixture.n_nuisances, cells=mixture.cells, cell_shares=mixture.cell_shares,
            precision=at_rest,
            pull=np.concatenate([at_rest[:n, :n] @ mean, pull[n:]]), n_sky=mixture.n_sky,
        )  # fmt: skip

    def prepare(self) -> None:
        """Make now what is made once: it takes a few seconds, and always the same bits."""
        # Sums of BLAS depend on its number of threads in the last bits.
        with one_blas_thread():
            _ = self.templates, self.space, self.slopes

    def use_device(self) -> None:
        """Keep templates and space on the current CUDA device and compare stars with them there.

        Raises
        ------
        BackendError
            There is no usable device, or they are too large for it or its kernels; nothing has changed then.
        DisagreementError
            It gives other numbers than the CPU; nothing has changed then, either.
        """
        self.prepare()
        ones = np.ones((1, self.mixture.n_pixels), np.float32)
        good = np.zeros(ones.shape, bool)
        scan_on, step_on = (on_cuda(name, "cuda") for name in ("CudaVelocityScan", "CudaVelocityStep"))
        # Only now: the CUDA packages are optional.
        from moefast.kernels.cuda.device import first_launch

        with first_launch():
            scan: Scan = scan_on(self.templates, self.mixture.n_pixels)
            step: Step = step_on(self.space, self.slopes)
            scan(ones, ones, good)
            step(ones, ones, good)
            self._require_agreement(scan, step)
        self._compare, self.backend = (scan, step), "cuda"

    def _require_agreement(self, scan: Scan, step: Step) -> None:
        """Raise DisagreementError unless scan and step of a device are those of the CPU."""
        spectra = library_stars(self.mixture, N_CHECKED)
        evidence, there = velocity_evidence(*spectra, self.templates), scan(*spectra)
        (best, sigma), (found, found_sigma) = velocity_step(*spectra, self.space, self.slopes), step(*spectra)
        largest = np.abs(evidence).max(1, keepdims=True)
        compared = (
            ("ln E", there, evidence, SCAN_LEAST + SCAN_PART * largest),
            ("the step [km/s]", found[:, None], best[:, None], STEP_PART * sigma[:, None]),
            ("its error [km/s]", found_sigma[:, None], sigma[:, None], SIGMA_PART * sigma[:, None]),
        )
        for name, a, b, allowed in compared:
            with np.errstate(invalid="ignore"):
                # Numbers that are missing are wrong.
                wrong = ~(np.abs(a - b) <= allowed) & ~(np.isnan(a) & np.isnan(b))
            if wrong.any():
                star, place = np.argwhere(wrong)[0]
                raise DisagreementError(
                    f"backend cuda: velocities on the GPU are not those of the CPU for {wrong.any(1).sum()} of "
                    f"{N_CHECKED} stars made from the model: {name} of star {star} is {a[star, place]:.7g} there and "
                    f"{b[star, place]:.7g} on the CPU, where {allowed[star, 0]:.1g} is allowed; use --backend cpu, and "
                    "please report this line with what moefast doctor prints"
                )

    @cached_property
    def _compare(self) -> tuple[Scan, Step]:
        """Scan and step of flux, error and mask."""
        self.prepare()
        return (
            partial(velocity_evidence, templates=self.templates),
            partial(velocity_step, space=self.space, slopes=self.slopes),
        )

    def fit(self, n: int, at_rest: AtRest, given: tuple[F64, F64] | None = None) -> FittedVelocities:
        """Velocities of n stars.

        Parameters
        ----------
        n : int
        at_rest : callable
            Gives spectra with velocities removed.
        given : (array of shape (n,), array of shape (n,)), km/s, optional
            What is known of each velocity beforehand, a normal distribution that is cut at the ends of the range: its
            mean and standard deviation. Stars of which it is within `KNOWN`, or not a number, or whose mean lies beyond
            the range, are taken to have the mean.
        """
        if given is None:
            return self._fitted(np.arange(n), at_rest, np.zeros(n), np.zeros(n))
        velocity, error = given
        with np.errstate(invalid="ignore"):
            rows = np.flatnonzero((error > KNOWN) & (np.abs(velocity) < self.largest))
        nodes, weights = np.repeat(velocity[:, None], N_NODES, axis=1), np.zeros((n, N_NODES))
        weights[:, 0] = 1
        found = FittedVelocities(velocity.copy(), error.copy(), np.zeros(n, bool), nodes, weights)
        if len(rows):
            part = self._fitted(rows, at_rest, velocity[rows], 1 / error[rows] ** 2)
            for one in fields(found):
                getattr(found, one.name)[rows] = getattr(part, one.name)
        return found

    def _fitted(self, rows: NDArray[np.intp], at_rest: AtRest, mean: F64, precision: F64) -> FittedVelocities:
        """Velocities of some stars, known beforehand with this precision, 0 for not at all."""
        scan, to_best = self._compare
        evidence = scan(*at_rest(np.zeros(len(rows)), rows))
        evidence = evidence - 0.5 * precision[:, None] * (self.grid - mean[:, None]) ** 2
        start = _peaks(self.grid, evidence)
        step, sigma = to_best(*at_rest(start, rows))
        # The product of two normal distributions, the step's and that which was known.
        share = precision * sigma**2
        step, sigma = (step + share * (mean - start)) / (1 + share), sigma / np.sqrt(1 + share)
        reach = FARTHEST * (self.grid[1] - self.grid[0])
        velocity = np.clip(start + np.clip(step, -reach, reach), -self.largest, self.largest)
        return self.posterior(evidence, velocity, sigma)

    def posterior(self, evidence: F64, velocity: F64, sigma: F64) -> FittedVelocities:
        """Answers and nodes from the scan (n, n_v), and velocities (n,) of the step and their standard errors."""
        velocity, sigma, other = velocity_conclusion(
            self.grid, evidence, velocity, sigma, BETWEEN, near=NEAR, near_sigmas=NEAR_SIGMAS, wider=WIDER
        )
        # What is near is one normal distribution.
        ends = [ndtr((end - velocity) / sigma) for end in (-self.largest, self.largest)]
        inside = np.maximum(ends[1] - ends[0], 1e-12)
        uncertain = (other > AMBIGUOUS) | (
            np.abs(velocity) > self.largest - (self.grid[1] - self.grid[0]) / 2
        )
        uncertain |= ~(sigma < self.largest / 2)
        error = sigma * ndtri(0.5 + 0.5 * np.minimum(SIGMA / np.maximum(1 - other, SIGMA), 1 - 1e-9))
        nodes, weights = np.zeros((len(velocity), N_NODES)), np.zeros((len(velocity), N_NODES))
        nodes[:] = velocity[:, None]
        far = np.sqrt(3) * sigma
        known = sigma < NARROW
        weights[:, 0] = np.where(known, 1.0, 2 / 3)
        nodes[:, 1], nodes[:, 2] = velocity - far, velocity + far
        weights[:, 1:3] = np.where(known, 0.0, 1 / 6)[:, None]
        rows = np.flatnonzero(uncertain)
        fine, log_p = _finer(self.grid, evidence[rows])
        for i, values in zip(rows, log_p, strict=True):
            p, apart = np.exp(values - values.max()), np.abs(fine - velocity[i])
            p /= p.sum()
            p[apart < np.maximum(NEAR, NEAR_SIGMAS * sigma[i])] = 0
            whole = p + (1 - other[i]) * _normal(fine, velocity[i], sigma[i], inside[i])
            whole /= whole.sum()
            order = np.argsort(apart, kind="stable")
            error[i] = np.interp(SIGMA, np.cumsum(whole[order]), apart[order])
            nodes[i] = np.interp((np.arange(N_NODES) + 0.5) / N_NODES, np.cumsum(whole), fine)
            weights[i] = 1 / N_NODES
        return FittedVelocities(
            velocity, error, uncertain, np.clip(nodes, -self.largest, self.largest), weights
        )


def _finer(grid: F64, values: F64) -> tuple[F64, F64]:
    """Velocities `FINER` times as dense, and values (n, n_v) there, by cubics through four neighbours."""
    padded = np.column_stack([2 * values[:, 0] - values[:, 1], values, 2 * values[:, -1] - values[:, -2]])
    n_steps = len(grid) - 1
    out = np.empty((len(values), n_steps * FINER + 1))
    out[:, -1] = values[:, -1]
    # Sums term by term, not as products of matrices: no row may depend on its neighbours.
    for k, shares in enumerate(BETWEEN):
        parts = (share * padded[:, i : i + n_steps] for i, share in enumerate(shares))
        out[:, k:-1:FINER] = sum(parts)
    return np.linspace(grid[0], grid[-1], n_steps * FINER + 1), out


def _normal(fine: F64, velocity: float, sigma: float, inside: float) -> F64:
    """Probability of each fine step of a normal distribution that is cut at the ends."""
    half = (fine[1] - fine[0]) / 2
    return (ndtr((fine + half - velocity) / sigma) - ndtr((fine - half - velocity) / sigma)) / inside


def _peaks(grid: F64, evidence: F64) -> F64:
    """Where the evidence (n, n_v) is largest: the vertex of a parabola through the best velocity and its neighbours."""
    best = np.clip(evidence.argmax(1), 1, len(grid) - 2)
    rows = np.arange(len(evidence))
    left, middle, right = (evidence[rows, best + k] for k in (-1, 0, 1))
    bend = left - 2 * middle + right
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = np.where(bend < 0, 0.5 * (left - right) / bend, 0.0)
    return grid[best] + np.clip(shift, -1, 1) * (grid[1] - grid[0])


def _slope(wave: F64, spectra: F64) -> F64:
    """Change of spectra (p, …) per km/s."""
    # Only now: it takes as long to import as NumPy, and predictions at rest need it never.
    from scipy.interpolate import CubicSpline

    change = CubicSpline(wave, spectra, axis=0)(wave, 1)
    return -change * (wave / LIGHT_SPEED).reshape(-1, *(1,) * (spectra.ndim - 1))


def _components(rows: F64, share: F64) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Components (r, p) and coefficients (m, r) of rows (m, p), all but `LEFT` of their energy."""
    weighed = np.sqrt(share / share.sum())[:, None] * rows
    # Far fewer rows than pixels: their products are diagonalised, not the rows.
    squares, vectors = np.linalg.eigh(weighed @ weighed.T)
    energy = np.cumsum(np.maximum(squares[::-1], 0))
    r = int(np.searchsorted(energy, (1 - LEFT) * energy[-1])) + 1
    components = vectors[:, ::-1][:, :r].T @ weighed
    components /= np.maximum(np.linalg.norm(components, axis=1, keepdims=True), 1e-300)
    return components.astype(np.float32), (rows @ components.T).astype(np.float32)
