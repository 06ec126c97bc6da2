"""From flux and error to the posterior of labels over Gaussian clouds of clean spectra, at each star's own noise.

The equations are those of `moefast.posterior.forward`, the contract of this kernel, in a form that single precision can
bear. With M₁ = C Cᵀ and λ = C⁻¹u₁, everything happens in coordinates in which a star's noise, and the scatter of
spectra within a cloud, are white:

    δ_j = Cᵀk_j − λ,   A_j = I + T_j C (T_j C)ᵀ,   ρ_j = −T_j C δ_j,   γ_j = A_j⁻¹ρ_j,
    e_j = ln π_j − ½ (|δ_j + CᵀT_jᵀγ_j|² + |γ_j|²) − ½ ln det A_j + const.

No large number is subtracted from another, and the constant cancels in the weights. With M = LLᵀ and an upper
triangular T, TTᵀ = I + LᵀL, it is Cᵀ = T⁻¹Lᵀ and λ = T⁻¹L⁻¹u: upper triangular, too, and without a difference from 1.

Design: `moefast.kernels.cpu_information` reads flux and error once and gives (u, M), C and λ in double precision;
`moefast.kernels.cpu_clouds` passes four stars over all clouds in single precision. Floor in multiply-adds per star, for
p = 4096 pixels, g = 352 cells, n = 82 coordinates, q = 14 nuisances, m = 441 clouds of t = 5 tangents, which have
r = 52 of the coordinates, and the scale, and G = 4 groups that differ, slopes included, in s = 28 directions:

    u                  p (n + q)                                    0.39 M double
    M                  g (n + q)(n + q + 1)/2                       1.64 M double
    expansion          2 p (n + q)                                  0.39 M single, 0.39 M double
    roots              (n + q)³/6 + q (n + q)²/2 + 5 n³/6           0.67 M double
    slopes             ((n + q)³ + (G − 1) s³)/6                    0.16 M double
    clouds             m (n (n + 1) + t r (r + 1))/2                4.54 M single
    their products     m (t (t + 7) r/2 + 5 n)                      0.87 M single

The floor of memory is 8 p bytes, 33 kB; the arrays of clouds, 0.6 MB, are read from the third cache once for four
stars, and the products of cells, 13 MB, once for `cpu_information.ROWS` stars.
All sums have one order, whatever row, block or thread: a row's bits depend on that row alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moefast.core.threads import in_threads
from moefast.kernels import cpu_clouds, cpu_correction, cpu_information
from moefast.kernels.cpu_clouds import LANES
from moefast.kernels.cpu_information import GROUP, OVERHANG, ROWS, SPECTRUM, STEP
from moefast.kernels.cpu_information import LANES as COLUMNS
from moefast.kernels.dispatch import on_cuda

__all__ = ["CloudPosterior", "Clouds", "Groups", "Space", "cloud_posterior", "without_cuda"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
_NO_MASK = np.zeros((0, 0), np.bool_)
CUDA_COORDINATES, CUDA_DIRECTIONS, CUDA_TANGENTS = 160, 320, 15
"""Coordinates, coordinates and nuisances together, and tangents that the CUDA kernels have shared memory and registers
for."""
CUDA_UNITS = 1500
"""Features of the correction, or units of one of its layers, that they have shared memory for."""


def rounded_up(size: int, step: int) -> int:
    """The least multiple of `step` that is not below `size`: what lanes and blocks of a kernel fill."""
    return -(-size // step) * step


@dataclass(frozen=True)
class Groups:
    """The library as a few Gaussians in coordinates and those nuisances that are no slopes, which come last.

    Attributes
    ----------
    precision : array of shape (groups, w, w), float64
        0 for nuisances, which have a prior width of their own or that of the star's noise.
    pull : array of shape (groups, w), float64
        Precision times mean.
    constant : array of shape (groups,), float64
        ln of the group's share, less what its normal density has of determinant and mean.
    """

    precision: F64
    pull: F64
    constant: F64


NO_GROUPS = Groups(np.empty((0, 0, 0)), np.empty((0, 0)), np.empty(0))


@dataclass(frozen=True)
class Space:
    """The space of spectra.

    Attributes
    ----------
    reference, noise_shape : array of shape (p,), float32
        r and D.
    directions : array of shape (p, n + q), float32
        Coordinates, the scale last, then q linear nuisances of unit prior width.
    n_nuisances : int
        q.
    cells : array of shape (k, s), int64
        Pixels of each cell over which a′D is averaged for M, as `moefast.posterior.cells` has them.
    cell_shares : array of shape (k, s), float32
        Weight of each in the mean of its cell; 0 in places without a pixel.
    precision : array of shape (n + q, n + q), float64
        P⁻¹ of the whole library and the nuisances as one Gaussian, near whose best point the likelihood is expanded.
    pull : array of shape (n + q,), float64
        P⁻¹ times its mean.
    n_sky : int
        The last so many nuisances have a prior width that grows with the noise of the star.
    calibrated : tuple of float
        Share of spectra in which the other nuisances, slopes, are narrower, and how wide each of them is there.
    groups : Groups
        By which a star's evidence tells how wide its slopes are; none where the share is 0.
    """

    reference: F32
    noise_shape: F32
    directions: F32
    n_nuisances: int
    cells: NDArray[np.int64]
    cell_shares: F32
    precision: F64
    pull: F64
    n_sky: int = 0
    calibrated: tuple[float, ...] = (0.0,)
    groups: Groups = NO_GROUPS
    arrays: tuple = field(init=False, repr=False)
    slopes: tuple = field(init=False, repr=False)
    weighing: tuple = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("reference", "noise_shape", "directions"):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), np.float32))
        p = self.reference.size
        if self.reference.shape != (p,) or self.noise_shape.shape != (p,):
            raise ValueError(
                "reference and noise_shape of one shape (p,) expected; "
                f"found {self.reference.shape} and {self.noise_shape.shape}"
            )
        if self.directions.ndim != 2 or len(self.directions) != p:
            raise ValueError(f"directions of shape ({p}, n + q) expected; found {self.directions.shape}")
        width = self.directions.shape[1]
        if not 0 <= self.n_nuisances < width:
            raise ValueError(f"n_nuisances from 0 to {width - 1} expected; found {self.n_nuisances}")
        if not 0 <= self.n_sky <= self.n_nuisances:
            raise ValueError(f"n_sky from 0 to {self.n_nuisances} expected; found {self.n_sky}")
        if self.cells.ndim != 2 or self.cell_shares.shape != self.cells.shape:
            raise ValueError(
                f"cell_shares of shape {self.cells.shape} expected; found {self.cell_shares.shape}"
            )
        if self.cells.size == 0 or not 0 <= self.cells.min() <= self.cells.max() < p:
            raise ValueError(f"pixels 0 to {p - 1} in cells expected")
        if not (self.noise_shape > 0).all():
            raise ValueError("noise_shape must be positive in every pixel")
        if self.precision.shape != (width, width) or self.pull.shape != (width,):
            raise ValueError(
                f"precision of shape {(width, width)} and pull of shape {(width,)} expected; "
                f"found {self.precision.shape} and {self.pull.shape}"
            )
        # Nuisances first: to marginalise them is to begin with them.
        q = self.n_nuisances
        inside = np.roll(self.directions.astype(np.float64), q, axis=1)
        pixels = rounded_up(p, SPECTRUM)
        spectra = np.zeros((pixels, width), np.float32)
        spectra[:p] = inside
        spectra = np.ascontiguousarray(spectra.reshape(-1, SPECTRUM, width).transpose(0, 2, 1))
        precision = np.zeros((width, rounded_up(width, GROUP)))
        precision[:, :width] = np.roll(self.precision.astype(np.float64), (q, q), (0, 1))
        # As few lanes as blocks of equal size need: they are added up whether a column is there or not.
        blocks = rounded_up(width, COLUMNS) // COLUMNS
        size = GROUP * rounded_up(-(-width // GROUP), blocks) // blocks
        columns = np.zeros((blocks, pixels, size))
        for block, lanes in enumerate(columns):
            part = inside[:, block * size : (block + 1) * size]
            lanes[:p, : part.shape[1]] = part
        groups, size = len(self.cells), width * (width + 1) // 2
        shape = self.noise_shape.astype(np.float64)
        products = np.zeros((rounded_up(size, COLUMNS) // COLUMNS, groups, COLUMNS))
        upper, packed = np.triu_indices(width), np.zeros((groups, products.shape[0] * COLUMNS))
        for row, group, share in zip(packed, self.cells, self.cell_shares, strict=True):
            ours = group[share > 0]
            row[:size] = ((inside[ours] / shape[ours, None]).T @ inside[ours])[upper]
        for block, lanes in enumerate(products):
            lanes[:] = packed[:, block * COLUMNS : (block + 1) * COLUMNS]
        # Cells of equal size one behind the other: a loop of their length is foretold.
        counts = (self.cell_shares > 0).sum(1)
        cell = np.argsort(counts, kind="stable")
        there = self.cell_shares[cell] > 0
        pixel, share = (
            self.cells[cell][there].astype(np.uint32),
            self.cell_shares[cell][there].astype(np.float64),
        )
        first = np.concatenate([[0], np.cumsum(counts[cell])])
        of_cells = cell.astype(np.uint32), first.astype(np.uint32), pixel, share
        pull = np.roll(self.pull.astype(np.float64), q)
        object.__setattr__(self, "arrays", (columns, products, spectra, precision, pull, of_cells))
        object.__setattr__(self, "slopes", self._slopes())
        object.__setattr__(self, "weighing", self._weighing())

    def _slopes(self) -> tuple:
        """Share and widths of narrow slopes, and groups with the nuisances first."""
        groups, rest = self.groups, self.n_coordinates + self.n_sky
        count = len(groups.constant)
        if bool(count) != (self.calibrated[0] > 0):
            raise ValueError(
                f"groups where slopes have two widths expected; found {count} and {self.calibrated}"
            )
        if count and (groups.precision.shape != (count, rest, rest) or groups.pull.shape != (count, rest)):
            raise ValueError(
                f"precision of shape {(count, rest, rest)} and pull of shape {(count, rest)} of the groups expected; "
                f"found {groups.precision.shape} and {groups.pull.shape}"
            )
        precision = np.ascontiguousarray(
            np.roll(groups.precision, (self.n_sky, self.n_sky), (1, 2)), np.float64
        )
        pull = np.ascontiguousarray(np.roll(groups.pull, self.n_sky, 1), np.float64)
        narrow = np.array(self.calibrated[1:], np.float64)
        if len(narrow) != self.n_slopes:
            raise ValueError(f"widths of {self.n_slopes} narrow slopes expected; found {self.calibrated}")
        return float(self.calibrated[0]), narrow, precision, pull, np.asarray(groups.constant, np.float64)

    def _weighing(self) -> tuple:
        """What `cpu_information.chance_of_narrow` reads of `slopes`.

        Share and widths of narrow slopes; the order of directions (w,), nuisances that are no slopes first, then what
        groups have in common, then what they differ in, then slopes; places of M in that order in what is packed
        (w, w); precision (w, w) and pull (w,) that groups have in common; what each has besides, (groups, s, s + 1
        and more), in the last s of that order, its pull in column s; and constants.
        """
        share, narrow, precision, pull, constants = self.slopes
        width, k = self.directions.shape[1], self.n_slopes
        if not len(constants):
            none = np.empty((0, 0))
            order, places = np.empty(0, np.uint32), np.empty((0, 0), np.uint32)
            return share, narrow, order, places, none, np.empty(0), np.empty((0, 0, 0)), constants
        differs = (precision != precision[0]).any((0, 1)) | (pull != pull[0]).any(0)
        rest = np.concatenate([np.flatnonzero(~differs), np.flatnonzero(differs)])
        common, size = int((~differs).sum()), int(differs.sum()) + k
        shared, shared_pull = np.zeros((width, width)), np.zeros(width)
        rows = len(rest)
        shared[:rows, :rows], shared_pull[:rows] = precision[0][np.ix_(rest, rest)], pull[0][rest]
        shared[common:, common:], shared_pull[common:] = 0, 0
        own = np.zeros((len(constants), size, rounded_up(size + 1, GROUP)))
        here = np.flatnonzero(differs)
        own[:, : len(here), : len(here)] = precision[:, here[:, None], here]
        own[:, : len(here), size] = pull[:, here]
        order = np.concatenate([k + rest, np.arange(k)])
        first, last = np.minimum.outer(order, order), np.maximum.outer(order, order)
        places = first * width - first * (first - 1) // 2 + last - first
        return (
            share,
            narrow,
            order.astype(np.uint32),
            places.astype(np.uint32),
            shared,
            shared_pull,
            own,
            constants,
        )

    @property
    def n_coordinates(self) -> int:
        """Coordinates n, the scale among them."""
        return self.directions.shape[1] - self.n_nuisances

    @property
    def n_slopes(self) -> int:
        """Nuisances whose prior width is the star's to tell."""
        return self.n_nuisances - self.n_sky if len(self.groups.constant) else 0


@dataclass(frozen=True)
class Clouds:
    """m clouds in a space of n coordinates, sorted by expert, and how labels follow from them.

    Attributes
    ----------
    keys : array of shape (m, n), float32
        Means k_j.
    tangents : array of shape (m, t, n), float32
        Directions along which the spectra of a cloud scatter by one, without that of the scale. Last coordinates that
        no tangent of any cloud has cost them nothing.
    gains : array of shape (m, t + 1, l), float32
        Covariance of the coordinate along each tangent, and the scale's, with each label; the first label is log g.
    log_weights : array of shape (m,), float32
        ln π_j.
    labels, scatter, scatter_with_first : array of shape (m, l), float32
        Mean labels, their variances that the tangents do not explain, and such covariances with the first label.
    first : array of shape (K + 1,), int64
        Clouds first[k] to first[k + 1] belong to expert k.
    scale_unit, scale_width : float
        What the last coordinate counts in, relative to the reference spectrum, and prior width of the scale.
    label_range : tuple of float
        The answer is clipped to it.
    error_model : tuple of arrays W₁ (5, h), b₁, W₂ (h, 1), b₂
        From `error_features` to ln of the error.
    correction : tuple of arrays
        The network that corrects log g, as `moefast.posterior.correction.CORRECTION` names its parts; empty if there is
        none.
    """

    keys: F32
    tangents: F32
    gains: F32
    log_weights: F32
    labels: F32
    scatter: F32
    scatter_with_first: F32
    first: NDArray[np.int64]
    scale_unit: float
    scale_width: float
    label_range: tuple[float, float]
    error_model: tuple[F32, F32, F32, F32]
    correction: tuple[F32, ...] = ()
    arrays: tuple = field(init=False, repr=False)

    def __post_init__(self) -> None:
        (m, n), t, labels = self.keys.shape, self.tangents.shape[1], self.labels.shape[1]
        expected = {
            "tangents": (m, t, n),
            "gains": (m, t + 1, labels),
            "log_weights": (m,),
            "scatter": (m, labels),
            "scatter_with_first": (m, labels),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} of shape {shape} expected; found {getattr(self, name).shape}")
        if labels < 3:
            raise ValueError(f"at least three labels expected; found {labels}")
        first = np.ascontiguousarray(self.first, np.int64)
        if first.ndim != 1 or first[0] != 0 or first[-1] != m or (np.diff(first) < 1).any():
            raise ValueError(f"every expert needs clouds, {m} in all; found boundaries {first.tolist()}")
        panels, blocks = -(-m // LANES), -(-n // STEP)
        drawn = np.concatenate([self.keys[:, None], self.tangents], axis=1)
        columns = np.zeros((panels * LANES, t + 1, blocks * STEP), np.float32)
        columns[:m, :, :n] = drawn
        columns = columns.reshape(panels, LANES, t + 1, blocks * STEP).transpose(0, 2, 3, 1)
        log_weights = np.full(panels * LANES, -1e30, np.float32)
        log_weights[:m] = self.log_weights

        def in_panels(array: F32) -> F32:
            """From (m, …) to (panels, …, `LANES`)."""
            out = np.zeros((panels * LANES, *array.shape[1:]), np.float32)
            out[:m] = array
            return np.ascontiguousarray(np.moveaxis(out.reshape(panels, LANES, *array.shape[1:]), 1, -1))

        seen = np.flatnonzero(self.tangents.any((0, 1)))
        reach = int(seen[-1]) + 1 if seen.size else 1
        arrays = (
            (0,) * (t + 1),
            reach,
            np.ascontiguousarray(columns),
            log_weights.reshape(panels, LANES),
            in_panels(self.gains.transpose(0, 2, 1)),
            in_panels(self.labels),
            in_panels(self.scatter),
            in_panels(self.scatter_with_first),
            first,
            float(self.scale_unit),
            np.float32(self.scale_width),
            float(self.label_range[0]),
            float(self.label_range[1]),
            *(np.ascontiguousarray(part, np.float32) for part in self.error_model),
            cpu_correction.NONE if not self.correction else tuple(
                np.ascontiguousarray(part, np.float32) for part in self.correction
            ),
        )  # fmt: skip
        object.__setattr__(self, "arrays", arrays)

    @property
    def n_experts(self) -> int:
        """Number of experts K."""
        return len(self.first) - 1

    @property
    def n_units(self) -> int:
        """Features of the correction, or units of its widest layer, whichever are more; 0 if there is none."""
        return max((part.shape[0] for part in self.correction), default=0)


def without_cuda(space: Space, clouds: Clouds) -> str:
    """Why the CUDA kernels cannot hold a space and its clouds, in words; empty if they can."""
    n, width, t = space.n_coordinates, space.directions.shape[1], clouds.tangents.shape[1]
    if n > CUDA_COORDINATES or width > CUDA_DIRECTIONS or t > CUDA_TANGENTS:
        return (
            f"a posterior in {n} coordinates with {width - n} nuisances and {t} tangents (at most {CUDA_COORDINATES}, "
            f"{CUDA_DIRECTIONS} with the nuisances, and {CUDA_TANGENTS})"
        )
    if clouds.n_units > CUDA_UNITS:
        return f"a correction with {clouds.n_units} features or units of a layer (at most {CUDA_UNITS})"
    return ""


@dataclass(frozen=True)
class CloudPosterior:
    """What `cloud_posterior` returns, one row per spectrum.

    The first fourteen are what `moefast.posterior.forward` calls so, without axes of length 1; the others are those of
    `moefast.spectra.quality.assess`. A row whose distance to every cloud overflows is NaN.
    """

    log_g: F64
    log_g_err: F64
    error_features: F64
    label: F64
    label_sd: F64
    label_cov: F64
    weights: F64
    expert_label: F64
    chi2: F64
    distance: F64
    strength: F64
    scale: F64
    log_level: F64
    point: F32
    snr_norm: F32
    snr_median: F32
    n_good: NDArray[np.int32]
    flag: NDArray[np.uint32]


def cloud_posterior(
    flux: NDArray,
    error: NDArray,
    mask: NDArray[np.bool_] | None,
    space: Space,
    clouds: Clouds,
    *,
    backend: str = "cpu",
) -> CloudPosterior:
    """Posterior of the labels of each star; see the module's equations.

    Parameters
    ----------
    flux, error : array of shape (n, p)
        Flux and its 1σ in any unit, converted to float32. A pixel whose flux is not finite, or whose error is not
        positive or above 1e6, weighs nothing.
    mask : array of shape (n, p), bool, optional
        True where a pixel is bad whatever it holds.
    space : Space
    clouds : Clouds
    backend : "cpu" or "cuda"

    Raises
    ------
    ValueError
        Shapes that do not fit.
    BackendError
        CUDA was asked for and cannot be used.
    """
    flux, error = np.ascontiguousarray(flux, np.float32), np.ascontiguousarray(error, np.float32)
    p, n, q = space.reference.size, space.n_coordinates, space.n_nuisances
    if flux.ndim != 2 or flux.shape[1] != p or error.shape != flux.shape:
        raise ValueError(f"flux and error of shape (n, {p}) expected; found {flux.shape} and {error.shape}")
    if mask is not None and (mask.dtype != np.bool_ or mask.shape != flux.shape):
        raise ValueError(f"mask must be bool of shape {flux.shape}; found {mask.dtype} {mask.shape}")
    if clouds.keys.shape[1] != n:
        raise ValueError(f"clouds in {n} coordinates expected; found {clouds.keys.shape[1]}")
    if backend != "cpu":
        found: CloudPosterior = on_cuda("cloud_posterior", backend)(flux, error, mask, space, clouds)
        return found
    mask = _NO_MASK if mask is None else np.ascontiguousarray(mask)
    rows, labels, k = len(flux), clouds.labels.shape[1], clouds.n_experts
    shapes = ((), (), (5,), (labels,), (labels,), (labels,), (k,), (k,), (), (), (), (), ())
    arrays = [np.empty((rows, *shape)) for shape in shapes]
    arrays.append(np.empty((rows, n + q), np.float32))
    quality = [np.empty(rows, dtype) for dtype in (np.float32, np.float32, np.int32, np.uint32)]

    def run(first_block: int, stop_block: int) -> None:
        columns, products, spectra, precision, pull, of_cells = space.arrays
        y, cells = np.zeros((ROWS, columns.shape[1]), np.float32), np.zeros((ROWS, products.shape[1]))
        information, points = np.zeros_like(y), np.empty((ROWS, n + q), np.float32)
        u = np.empty((ROWS, len(columns) * columns.shape[2]))
        packed = np.empty((ROWS, len(products) * COLUMNS + OVERHANG))
        numbers = np.empty((ROWS, 5))
        for start in range(first_block * ROWS, min(stop_block * ROWS, rows), ROWS):
            here = slice(start, min(start + ROWS, rows))
            count = here.stop - start
            cpu_information.read_pixels(
                flux[here], error[here], mask[here] if mask.size else mask, space.reference, space.noise_shape,
                *of_cells, y, information, cells, numbers, *(array[here] for array in quality),
            )  # fmt: skip
            cpu_information.multiply_pixels(y, count, columns, u)
            cpu_information.multiply_cells(cells, count, products, packed)
            cpu_information.refine(
                y, information, count, packed, spectra, columns, precision, pull, numbers, points, u
            )
            cpu_clouds.posterior(
                numbers[:count],
                u,
                packed,
                q,
                space.n_sky,
                n,
                points,
                *space.weighing,
                *clouds.arrays,
                *(array[here] for array in arrays),
            )

    in_threads(-(-rows // ROWS), run, least=1)
    return CloudPosterior(*arrays, *quality)
