"""Evidence of all clouds, and the posterior of labels, on the device; see `moefast.kernels.cuda.information`.

Contract: `moefast.posterior.forward`, in the form and the precision of `moefast.kernels.clouds`.

`compare_clouds`: a block of threads owns a star and a panel of clouds, as many as have COLUMNS means and tangents
together. The whitened vectors X = C' · (means, tangents), C' upper triangular, are a matrix product in register tiles,
COORDINATES rows at a time, and stay in shared memory; beyond the coordinates that tangents have (`reach`), the means
alone go on. Then PARTS neighbouring threads share a cloud: each adds up the products of the cloud's vectors over its
part of the coordinates, all of them solve the cloud's small system in registers, and each adds up its part of the
residual at the best point, for the reason that `moefast.kernels.cpu_clouds` gives. The kernel is written for a number
of tangents, so that small matrices live in registers: `compare_kernel` makes it.

`conclude_stars`: a warp owns a star and goes through its clouds, 20 numbers each, in double precision.

Floor in multiply-adds of single precision per star, for m = 712 clouds of t = 5 tangents with r = 97 of n = 130
coordinates: vectors m (n (n + 1) + t r (r + 1))/2 = 23.0 M, products and residuals m (t + 3)(t + 4) r/2 = 2.5 M: 1.0 µs
at 50 TFLOP/s. C' is read once per panel, 2.4 MB, and panels once per COORDINATES rows, 4.7 MB: 1.3 µs at the 5.5 TB/s
of the second cache.

`CudaPosteriorScorer` streams blocks through slots as `moefast.kernels.cuda.scoring` does: a block of BLOCK_ROWS stars
keeps 0.4 MB of each on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import config, cuda, float32, float64
from numpy.typing import NDArray

from moefast.core.errors import BackendError
from moefast.core.threads import CORES
from moefast.kernels.clouds import CloudPosterior, Clouds, Space, without_cuda
from moefast.kernels.cuda.gram import ALIGNED
from moefast.kernels.cuda.information import (
    BEYOND,
    ENERGY,
    EXPLAINED,
    LEVEL,
    N_USED,
    NUMBERS,
    READ_THREADS,
    SCALE,
    STRENGTH,
    TINY,
    expand_stars,
    marginalise_stars,
    multiply_rows,
    product_launch,
    read_spectra,
    root_stars,
    solve_launch,
    subtract_spectra,
    whiten_stars,
)
from moefast.kernels.cuda.lanes import SCRATCH, most_of_warp, sum_of_parts, sum_of_warp
from moefast.kernels.cuda.median import THREADS as MEDIAN_THREADS
from moefast.kernels.cuda.median import median_rows
from moefast.kernels.cuda.registry import kernel, launchable
from moefast.kernels.cuda.scoring import BlockScorer, Slot

__all__ = [
    "BLOCK_ROWS",
    "COLUMNS",
    "CudaPosteriorScorer",
    "DevicePosterior",
    "cloud_posterior",
    "compare_kernel",
    "conclude_stars",
]

BLOCK_ROWS = 1024
"""Most stars of a block: some forty launches and copies, 0.4 ms of the interpreter, are less than the kernels take."""
SLOTS = max(4, min(8, CORES))
"""Blocks on their way: one or two are computed, while the others are read and copied."""
COORDINATES = 32
COLUMNS = 64
"""Sides of the tile of whitened vectors that a block of threads makes at a time; powers of two."""
EACH = 4
"""Rows and columns of the tile that a thread owns."""
PANEL = 16
"""Terms that are staged in shared memory at a time; divides COORDINATES."""
PADDED = COORDINATES + 4
"""Rows of neighbouring terms then begin in different banks of shared memory, and vectors of four where they may."""
MOST_CLOUDS = 16
"""Clouds of a panel, at most."""
PARTS = 8
"""Threads that share a cloud."""
THREADS = MOST_CLOUDS * PARTS
BLOCKS_TOGETHER = 4
LANES = 32
"""Threads of a block of `conclude_stars`: one warp."""
USUAL_VECTORS = 6
"""Tangents of the clouds of models that are shipped, the scale's included."""
SCRATCH_BYTES = 80e6
"""Of matrices whose roots are found at the same time: half of them is used, and fits the second cache."""
LEAST_BLOCKS, MOST_BLOCKS = 264, 1056
EVIDENCE, SQUARE, FIRST_LABEL = 0, 1, 2
"""Places in what `compare_clouds` finds: ln of the evidence, least distance squared, then means, variances and
covariances with the first of all labels."""
LEAST_EVIDENCE = np.float32(-1e30)
LEAST_SPREAD = 1e-4
"""As in `moefast.kernels.cpu_clouds`."""
NAN = np.float32(np.nan)
_NO_MASK = np.zeros(0, np.bool_)

F64 = NDArray[np.float64]


def clouds_of_panel(vectors: int) -> int:
    """Clouds of a panel, each with a mean and `vectors` − 1 tangents."""
    return min(MOST_CLOUDS, COLUMNS // vectors)


SIGNATURE = (
    "void(int64, int64, float32[:,:,::1], float32[::1], float32[:,:,::1], float32[:,::1], float32[:,::1],"
    " float32[:,::1], float32[:,:,::1], float32[:,::1], float32[:,::1], float32, float32[:,:,::1])"
)


def _written_for(vectors: int) -> Callable[..., None]:
    """`compare_clouds` for clouds of so many tangents, the scale's included."""
    t = vectors
    n_clouds = clouds_of_panel(t)
    n_vectors = t + 1
    n_products = (t + 1) * (t + 2) // 2 - 1
    n_lower = t * (t + 1) // 2
    parts = PARTS

    def compare_clouds(  # type: ignore[no-untyped-def]
        n, reach, columns, log_weights, gains, labels, scatter, scatter_with_first,
        roots, centre, spectrum, width, found,
    ):  # fmt: skip
        """Evidence of each cloud, and what it says of the labels of each star.

        `columns` (panels, …, COLUMNS) holds coordinate by coordinate the means of a panel's clouds, then their first
        tangents, and so on; `gains` (m, l, t), `labels`, `scatter` and `scatter_with_first` (m, l) and `log_weights`
        those of `moefast.kernels.Clouds`. Tangents have the first `reach` of n coordinates. `roots`, `centre` and
        `spectrum` are those of `whiten_stars`, `width` the prior width of the scale. `found` (·, 2 + 3 l, m).

        Launch: (panels, n stars) blocks of THREADS threads, with 4 · n · COLUMNS bytes of dynamic shared memory.
        """
        x_of = cuda.shared.array(0, float32)
        left = cuda.shared.array((PANEL, PADDED), float32, alignment=ALIGNED)
        right = cuda.shared.array((PANEL, COLUMNS), float32, alignment=ALIGNED)
        scratch = cuda.shared.array(THREADS, float32)
        sums = cuda.local.array((EACH, EACH), float32)
        a = cuda.local.array(EACH, float32)
        b = cuda.local.array(EACH, float32)
        x = cuda.local.array(n_vectors, float32)
        products = cuda.local.array(n_products, float32)
        lower = cuda.local.array(n_lower, float32)
        inverse = cuda.local.array(t, float32)
        gamma = cuda.local.array(t, float32)
        solved = cuda.local.array(t, float32)
        of_first = cuda.local.array(t, float32)
        threads = MOST_CLOUDS * PARTS
        thread = cuda.threadIdx.x & (threads - 1)
        tx = thread & (COLUMNS // EACH - 1)
        ty = (thread // (COLUMNS // EACH)) & (COORDINATES // EACH - 1)
        panel = cuda.blockIdx.x
        star = cuda.blockIdx.y

        # -- whitened vectors: all of them as far as tangents reach ------------------------------------------------
        for top in range(0, reach, COORDINATES):
            for i in range(EACH):
                for j in range(EACH):
                    sums[i, j] = float32(0)
            for start in range(top, reach, PANEL):
                cuda.syncthreads()
                for place in range(thread, PANEL * COORDINATES, threads):
                    term = place & (PANEL - 1)
                    row = place // PANEL
                    value = float32(0)
                    # What lies below the diagonal was never written.
                    if top + row <= start + term < reach:
                        value = roots[star, top + row, start + term]
                    left[term, row] = value
                for place in range(thread, PANEL * COLUMNS, threads):
                    term = place // COLUMNS
                    column = place & (COLUMNS - 1)
                    right[term, column] = columns[panel, start + term, column]
                cuda.syncthreads()
                for term in range(PANEL):
                    for i in range(EACH):
                        a[i] = left[term, EACH * ty + i]
                    for j in range(EACH):
                        b[j] = right[term, EACH * tx + j]
                    for i in range(EACH):
                        for j in range(EACH):
                            sums[i, j] += a[i] * b[j]
            for i in range(EACH):
                c = top + EACH * ty + i
                if c < reach:
                    turn = EACH * (c & (parts - 1))
                    for j in range(EACH):
                        x_of[c * COLUMNS + ((EACH * tx + j) ^ (turn & (COLUMNS - 1)))] = sums[i, j]

        # -- the means alone, beyond ------------------------------------------------------------------------------
        quads = MOST_CLOUDS // EACH
        quad = thread & (quads - 1)
        line = thread // quads
        for top in range(0, n, COORDINATES):
            c = top + line
            turn = (EACH * (c & (parts - 1))) & (COLUMNS - 1)
            for j in range(EACH):
                b[j] = float32(0)
            for start in range(max(top, reach), n, PANEL):
                cuda.syncthreads()
                for place in range(thread, PANEL * COORDINATES, threads):
                    term = place & (PANEL - 1)
                    row = place // PANEL
                    value = float32(0)
                    if top + row <= start + term < n:
                        value = roots[star, top + row, start + term]
                    left[term, row] = value
                for place in range(thread, PANEL * MOST_CLOUDS, threads):
                    term = place // MOST_CLOUDS
                    column = place & (MOST_CLOUDS - 1)
                    value = float32(0)
                    if column < n_clouds and start + term < n:
                        value = columns[panel, start + term, column]
                    right[term, column] = value
                cuda.syncthreads()
                for term in range(PANEL):
                    one = left[term, line]
                    for j in range(EACH):
                        b[j] += one * right[term, EACH * quad + j]
            if c < n:
                for j in range(EACH):
                    column = EACH * quad + j
                    if column < n_clouds:
                        place = c * COLUMNS + (column ^ turn)
                        x_of[place] = x_of[place] + b[j] if c < reach else b[j]
        cuda.syncthreads()

        # -- the small system of each cloud ------------------------------------------------------------------------
        part = thread & (parts - 1)
        lane = (thread // parts) & (MOST_CLOUDS - 1)
        cloud = panel * n_clouds + lane
        # Threads without a cloud do what the last one does, and keep it to themselves.
        there = lane < n_clouds and cloud < log_weights.size
        lane = min(lane, n_clouds - 1)
        cloud = min(cloud, log_weights.size - 1)
        turn = (EACH * part) & (COLUMNS - 1)
        for k in range(n_products):
            products[k] = float32(0)
        for c in range(part, reach, parts):
            for d in range(t):
                x[d] = x_of[c * COLUMNS + ((d * n_clouds + lane) ^ turn)]
            x[0] -= centre[star, c]
            x[t] = width * (x[0] + spectrum[star, c])
            for k in range(1, t + 1):
                products[k - 1] += x[0] * x[k]
            # Loops of constant length are written out, and their numbers stay in registers.
            for i in range(1, t + 1):
                for k in range(1, t + 1):
                    if k >= i:
                        products[t + (i - 1) * t - (i - 1) * (i - 2) // 2 + k - i] += x[i] * x[k]
        beyond = reach + ((part - reach) & (parts - 1))
        for c in range(beyond, n, parts):
            apart = x_of[c * COLUMNS + (lane ^ turn)] - centre[star, c]
            scaled = width * (apart + spectrum[star, c])
            products[t - 1] += apart * scaled
            products[n_products - 1] += scaled * scaled
        for k in range(n_products):
            products[k] = sum_of_parts(products[k], parts, scratch)

        determinant = float32(0)
        for i in range(t):
            gamma[i] = -products[i]
            for k in range(t):
                if k <= i:
                    # Product (k + 1, i + 1).
                    lower[i * (i + 1) // 2 + k] = products[t + k * t - k * (k - 1) // 2 + i - k]
            lower[i * (i + 1) // 2 + i] += float32(1)
        for k in range(t):
            pivot = lower[k * (k + 1) // 2 + k]
            determinant += math.log(pivot)
            inverse[k] = float32(1) / math.sqrt(pivot)
            gamma[k] *= inverse[k]
            for i in range(t):
                if i > k:
                    lower[i * (i + 1) // 2 + k] *= inverse[k]
            for i in range(t):
                if i > k:
                    less = lower[i * (i + 1) // 2 + k]
                    gamma[i] -= less * gamma[k]
                    for j in range(t):
                        if k < j <= i:
                            lower[i * (i + 1) // 2 + j] -= less * lower[j * (j + 1) // 2 + k]
        for s in range(t):
            k = t - 1 - s
            for i in range(t):
                if i > k:
                    gamma[k] -= lower[i * (i + 1) // 2 + k] * gamma[i]
            gamma[k] *= inverse[k]

        # -- what is left at the best point -------------------------------------------------------------------------
        square = float32(0)
        for c in range(part, reach, parts):
            apart = x_of[c * COLUMNS + (lane ^ turn)] - centre[star, c]
            residual = apart + gamma[t - 1] * (width * (apart + spectrum[star, c]))
            for d in range(1, t):
                residual += gamma[d - 1] * x_of[c * COLUMNS + ((d * n_clouds + lane) ^ turn)]
            square += residual * residual
        for c in range(beyond, n, parts):
            apart = x_of[c * COLUMNS + (lane ^ turn)] - centre[star, c]
            residual = apart + gamma[t - 1] * (width * (apart + spectrum[star, c]))
            square += residual * residual
        square = sum_of_parts(square, parts, scratch)
        for k in range(t):
            square += gamma[k] * gamma[k]
        if there and part == 0:
            found[star, EVIDENCE, cloud] = log_weights[cloud] - float32(0.5) * (square + determinant)
            found[star, SQUARE, cloud] = square

        # -- labels: L⁻¹g of the first and of the thread's own -------------------------------------------------------
        n_labels = labels.shape[1]
        for k in range(t):
            gain = gains[cloud, 0, k]
            for i in range(t):
                if i < k:
                    gain -= lower[k * (k + 1) // 2 + i] * of_first[i]
            of_first[k] = gain * inverse[k]
        for label in range(part, n_labels, parts):
            mean = labels[cloud, label]
            variance = scatter[cloud, label]
            along = scatter_with_first[cloud, label]
            for k in range(t):
                gain = gains[cloud, label, k]
                mean += gamma[k] * gain
                for i in range(t):
                    if i < k:
                        gain -= lower[k * (k + 1) // 2 + i] * solved[i]
                solved[k] = gain * inverse[k]
                variance += solved[k] * solved[k]
                along += solved[k] * of_first[k]
            if there:
                found[star, FIRST_LABEL + label, cloud] = mean
                found[star, FIRST_LABEL + n_labels + label, cloud] = variance
                found[star, FIRST_LABEL + 2 * n_labels + label, cloud] = along

    return compare_clouds


_register_usual = kernel(SIGNATURE, threads=THREADS, blocks=BLOCKS_TOGETHER, serves=("cloud_posterior",))
_usual = _register_usual(_written_for(USUAL_VECTORS))


@cache
def _made(vectors: int) -> Any:
    return launchable(_written_for(vectors), THREADS, 1)


def compare_kernel(vectors: int) -> Any:
    """The kernel `compare_clouds` for clouds of so many tangents, the scale's included."""
    # The simulator compiles nothing, and its tests change the sizes of tiles.
    if config.ENABLE_CUDASIM:  # type: ignore[attr-defined]
        return launchable(_written_for(vectors), THREADS)
    return _usual if vectors == USUAL_VECTORS else _made(vectors)


@kernel(
    "void(float32[:,:,::1], float64[:,::1], int64[::1], int64, float64, float64, float32[:,::1], float32[::1],"
    " float32[:,::1], float32[::1], float64[::1], float64[::1], float64[:,::1], float64[:,::1], float64[:,::1],"
    " float64[:,::1], float64[:,::1], float64[:,::1], float64[::1], float64[::1], float64[::1], float64[::1],"
    " float64[::1])",
    threads=LANES,
    blocks=16,
    serves=("cloud_posterior",),
)
def conclude_stars(  # type: ignore[no-untyped-def]
    found, numbers, first, n, lowest, highest, w1, b1, w2, b2,
    log_g, log_g_err, features, label, sd, covariance, weights, expert, chi2, distance, strength, scale, log_level,
):  # fmt: skip
    """From what clouds say to what is said of each star, as `cpu_clouds.posterior`; n is the number of coordinates.

    `found` is what `compare_clouds` leaves; shares take the place of evidences.

    Launch: a block of LANES threads for each star.
    """
    scratch = cuda.shared.array(SCRATCH, float64)
    lane = cuda.threadIdx.x
    lanes = cuda.blockDim.x
    star = cuda.blockIdx.x
    m = found.shape[2]
    n_labels = label.shape[1]
    n_experts = first.size - 1

    top = float64(LEAST_EVIDENCE)
    nearest = float64(np.inf)
    for j in range(lane, m, lanes):
        # A comparison with NaN is false; max() and min() on a device may be either.
        evidence = float64(found[star, EVIDENCE, j])
        if evidence > top:  # noqa: PLR1730
            top = evidence
        square = float64(found[star, SQUARE, j])
        if square < nearest:  # noqa: PLR1730
            nearest = square
    top = most_of_warp(top, scratch)
    nearest = -most_of_warp(-nearest, scratch)

    total = float64(0)
    best = float64(0)
    for e in range(n_experts):
        most = float64(LEAST_EVIDENCE)
        for j in range(first[e] + lane, first[e + 1], lanes):
            evidence = float64(found[star, EVIDENCE, j])
            if evidence > most:  # noqa: PLR1730
                most = evidence
        most = most_of_warp(most, scratch)
        norm = float64(0)
        mean = float64(0)
        for j in range(first[e] + lane, first[e + 1], lanes):
            evidence = float64(found[star, EVIDENCE, j])
            if evidence > float64(LEAST_EVIDENCE):
                share = math.exp(evidence - most)
                norm += share
                mean += share * float64(found[star, FIRST_LABEL, j])
        norm = sum_of_warp(norm, scratch)
        mean = sum_of_warp(mean, scratch)
        among = math.exp(most - top) if norm > float64(0) else float64(0)
        total += among * norm
        best += among * mean
        if lane == 0:
            weights[star, e] = among * norm
            expert[star, e] = mean / norm if norm > float64(0) else float64(NAN)
    # Beyond single precision, 1e15 times the noise away from any cloud, there is no answer.
    known = top > float64(LEAST_EVIDENCE)
    if not known:
        total = float64(1)
        best = float64(NAN)
    best /= total
    between = float64(0)
    kept = float64(0)
    for j in range(lane, m, lanes):
        evidence = float64(found[star, EVIDENCE, j])
        rounded = float32(0)
        if evidence > float64(LEAST_EVIDENCE):
            rounded = float32(math.exp(evidence - top) / total)
        found[star, EVIDENCE, j] = rounded
        if rounded > float32(0):
            apart = float64(found[star, FIRST_LABEL, j]) - best
            between += float64(rounded) * apart * apart
            kept += float64(rounded)
    between = sum_of_warp(between, scratch)
    kept = sum_of_warp(kept, scratch)
    if not known:
        kept = float64(NAN)
    between /= kept
    cuda.syncthreads()
    for e in range(lane, n_experts, lanes):
        weights[star, e] = weights[star, e] / total if known else float64(NAN)

    first_sd = float64(0)
    second = float64(0)
    third = float64(0)
    for place in range(n_labels):
        middle = float64(0)
        for j in range(lane, m, lanes):
            share = float64(found[star, EVIDENCE, j])
            if share > float64(0):
                middle += share * float64(found[star, FIRST_LABEL + place, j])
        middle = sum_of_warp(middle, scratch) / kept
        if place == 0:
            middle = best
        variance = float64(0)
        along = float64(0)
        for j in range(lane, m, lanes):
            share = float64(found[star, EVIDENCE, j])
            if share > float64(0):
                apart = float64(found[star, FIRST_LABEL + place, j]) - middle
                of_first = float64(found[star, FIRST_LABEL, j]) - best
                variance += share * (float64(found[star, FIRST_LABEL + n_labels + place, j]) + apart * apart)
                along += share * (
                    float64(found[star, FIRST_LABEL + 2 * n_labels + place, j]) + apart * of_first
                )
        variance = sum_of_warp(variance, scratch) / kept
        along = sum_of_warp(along, scratch) / kept
        spread = float64(NAN)
        if known:
            spread = float64(math.sqrt(max(variance, float64(0)) + TINY))
        if place == 0:
            first_sd = spread
        if place == 1:
            second = middle
        if place == 2:
            third = middle
        if lane == 0:
            label[star, place] = middle
            sd[star, place] = spread
            covariance[star, place] = along

    answer = best
    # Not min() and max(), which on a device are not NaN where one of the two is.
    if answer < lowest:  # noqa: PLR1730
        answer = lowest
    if answer > highest:  # noqa: PLR1730
        answer = highest
    of_width = math.log(first_sd + LEAST_SPREAD)
    of_spread = math.log(math.sqrt(between + TINY) + LEAST_SPREAD)
    value = float64(0)
    for h in range(lane, b1.size, lanes):
        active = float64(b1[h])
        active += answer * float64(w1[0, h]) + of_width * float64(w1[1, h]) + of_spread * float64(w1[2, h])
        active += second * float64(w1[3, h]) + third * float64(w1[4, h])
        value += math.tanh(active) * float64(w2[h, 0])
    value = sum_of_warp(value, scratch) + float64(b2[0])
    if lane == 0:
        c0 = numbers[star, SCALE]
        level2 = numbers[star, LEVEL] / (numbers[star, N_USED] + TINY) / (c0 * c0)
        log_g[star] = answer
        log_g_err[star] = math.exp(value)
        features[star, 0] = answer
        features[star, 1] = of_width
        features[star, 2] = of_spread
        features[star, 3] = second
        features[star, 4] = third
        freedom = float64(1) + max(numbers[star, N_USED] - float64(n + 1), float64(0))
        chi2[star] = (numbers[star, ENERGY] - numbers[star, EXPLAINED]) / freedom
        distance[star] = (numbers[star, BEYOND] + nearest) / float64(n)
        strength[star] = numbers[star, STRENGTH]
        scale[star] = c0
        log_level[star] = float64(0.5) * math.log(level2 + TINY)


class Posteriors(NamedTuple):
    """What scoring gives, one row per spectrum: the fields of `moefast.kernels.CloudPosterior`."""

    log_g: NDArray
    log_g_err: NDArray
    error_features: NDArray
    label: NDArray
    label_sd: NDArray
    label_cov: NDArray
    weights: NDArray
    expert_label: NDArray
    chi2: NDArray
    distance: NDArray
    strength: NDArray
    scale: NDArray
    log_level: NDArray
    snr_norm: NDArray
    snr_median: NDArray
    n_good: NDArray
    flag: NDArray


class DevicePosterior:
    """A space and its clouds on the device, laid out as the kernels read them.

    Raises
    ------
    ValueError
        They do not fit each other.
    BackendError
        They need more shared memory than a block has.
    """

    results: Callable[..., Any] = Posteriors

    def __init__(self, space: Space, clouds: Clouds) -> None:
        p, width = space.directions.shape
        n, q = space.n_coordinates, space.n_nuisances
        (m, n_keys), vectors = clouds.keys.shape, clouds.tangents.shape[1] + 1
        if n_keys != n:
            raise ValueError(f"clouds in {n} coordinates expected; found {n_keys}")
        self.vectors, self.shared = vectors, 4 * n * COLUMNS
        self.solve_threads, self.solve_shared = solve_launch(width)
        if lack := without_cuda(space, clouds):
            raise BackendError(f"backend cuda: there are no kernels for {lack}; use backend cpu")
        self.n_pixels, self.n_coordinates, self.n_nuisances, self.n_sky = p, n, q, space.n_sky
        self.n_cells, self.n_clouds, self.n_labels = len(space.cells), m, clouds.labels.shape[1]
        self.n_experts, self.packed = clouds.n_experts, width * (width + 1) // 2
        # Nuisances first: to marginalise them is to begin with them.
        directions = np.roll(space.directions.astype(np.float64), q, axis=1)
        upper, shape = np.triu_indices(width), space.noise_shape.astype(np.float64)
        products = np.empty((self.n_cells, self.packed))
        there = space.cell_shares > 0
        for row, cell, kept in zip(products, space.cells, there, strict=True):
            row[:] = ((directions[cell[kept]] / shape[cell[kept], None]).T @ directions[cell[kept]])[upper]
        precision = np.roll(space.precision.astype(np.float64), (q, q), (0, 1))

        def on_device(array: NDArray, dtype: Any) -> Any:
            return cuda.to_device(np.ascontiguousarray(array, dtype))

        # Pixels of a cell in their order, as on the CPU.
        order = [np.argsort(cell[kept], kind="stable") for cell, kept in zip(space.cells, there, strict=True)]
        pixels = [c[k][o] for c, k, o in zip(space.cells, there, order, strict=True)]
        shares = [s[k][o] for s, k, o in zip(space.cell_shares, there, order, strict=True)]
        self.pixels = (
            on_device(space.reference, np.float32),
            on_device(space.noise_shape, np.float32),
            on_device(np.concatenate(pixels), np.int64),
            on_device(np.concatenate([[0], np.cumsum(there.sum(1))]), np.int64),
            on_device(np.concatenate(shares), np.float64),
        )
        self.directions, self.transposed = (
            on_device(directions, np.float64),
            on_device(directions.T, np.float64),
        )
        self.products, self.precision = on_device(products, np.float64), on_device(precision, np.float64)
        self.pull = on_device(np.roll(space.pull, q), np.float64)
        self.unit = float(clouds.scale_unit)

        n_clouds = clouds_of_panel(vectors)
        self.panels = -(-m // n_clouds)
        seen = np.flatnonzero(clouds.tangents.any((0, 1)))
        reach = int(seen[-1]) + 1 if seen.size else 1
        self.reach = min(n, -(-reach // PANEL) * PANEL)
        # Means first, then first tangents, …; coordinates up to whole panels behind the last.
        drawn = np.zeros((self.panels * n_clouds, vectors, n + PANEL), np.float32)
        drawn[:m, 0, :n], drawn[:m, 1:, :n] = clouds.keys, clouds.tangents
        columns = np.zeros((self.panels, n + PANEL, COLUMNS), np.float32)
        columns[:, :, : n_clouds * vectors] = (
            drawn.reshape(self.panels, n_clouds, vectors, n + PANEL)
            .transpose(0, 3, 2, 1)
            .reshape(self.panels, n + PANEL, -1)
        )
        f32 = np.float32
        self.clouds = (
            on_device(columns, f32), on_device(clouds.log_weights, f32),
            on_device(clouds.gains.transpose(0, 2, 1), f32), on_device(clouds.labels, f32),
            on_device(clouds.scatter, f32), on_device(clouds.scatter_with_first, f32),
        )  # fmt: skip
        self.width = np.float32(clouds.scale_width)
        self.first = on_device(clouds.first, np.int64)
        self.label_range = tuple(float(limit) for limit in clouds.label_range)
        self.error_model = tuple(on_device(part, f32) for part in clouds.error_model)
        self.no_mask = cuda.to_device(_NO_MASK)
        of_block = 8 * (width * (width + 2) + n * (n + 2))
        self.blocks = int(np.clip(SCRATCH_BYTES / of_block, LEAST_BLOCKS, MOST_BLOCKS))
        self.scratch_bytes = self.blocks * of_block

    def kinds(self, rows: int) -> list[tuple[tuple[int, ...], type]]:
        """Shape and dtype of each array of `Posteriors`."""
        vector, of_labels, of_experts = (rows,), (rows, self.n_labels), (rows, self.n_experts)
        shapes = [vector, vector, (rows, 5), *[of_labels] * 3, *[of_experts] * 2, *[vector] * 5]
        kinds: list[type] = [np.float32, np.float32, np.int32, np.uint32]
        return [(shape, np.float64) for shape in shapes] + [(vector, kind) for kind in kinds]

    def bytes_per_row(self) -> int:
        """Device memory of a row, flux, error and mask included, and its share of a block's scratch."""
        p, n, width = self.n_pixels, self.n_coordinates, self.n_coordinates + self.n_nuisances
        doubles = 3 * p + self.n_cells + self.packed + 2 * width + NUMBERS
        singles = n * n + 2 * n + (FIRST_LABEL + 3 * self.n_labels) * self.n_clouds
        results = sum(np.dtype(kind).itemsize * int(np.prod(shape)) for shape, kind in self.kinds(1))
        return 9 * p + 8 * doubles + 4 * singles + results + -(-self.scratch_bytes // BLOCK_ROWS)

    def work(self, rows: int) -> Work:
        """Device memory for so many stars."""
        return Work(rows, self)

    def steps(
        self, flux: Any, error: Any, mask: Any, n: int, work: Work, scores: Posteriors, stream: Any
    ) -> Iterator[tuple[str, Callable[[], None]]]:
        """What is done to n spectra, in its order: a name in words, and what starts it in `stream`; see `launch`."""
        p, c, q = self.n_pixels, self.n_coordinates, self.n_nuisances
        hidden = self.no_mask if mask is None else mask
        solve = (min(n, len(work.scratch)), self.solve_threads, stream, self.solve_shared)

        def multiply(rows: Any, matrix: Any, out: Any) -> None:
            blocks, threads = product_launch(n, out.shape[1])
            multiply_rows[blocks, threads, stream](rows, matrix, n, out)

        yield (
            "read pixels, cells",
            lambda: read_spectra[n, READ_THREADS, stream](
                flux, error, hidden, p, *self.pixels, work.y, work.information, work.cells, work.numbers,
                scores.snr_norm, scores.n_good, scores.flag,
            ),
        )  # fmt: skip
        yield "M", lambda: multiply(work.cells, self.products, work.packed)
        yield "u", lambda: multiply(work.y, self.directions, work.u)
        yield (
            "point near the star",
            lambda: expand_stars[solve](
                n, work.packed, work.u, self.precision, self.pull, work.scratch, work.points
            ),
        )
        yield "its spectrum", lambda: multiply(work.points, self.transposed, work.spectra)
        yield (
            "what is left of pixels",
            lambda: subtract_spectra[n, READ_THREADS, stream](
                work.y, work.information, work.spectra, work.numbers
            ),
        )
        yield "u at the point", lambda: multiply(work.y, self.directions, work.u)
        yield (
            "nuisances",
            lambda: marginalise_stars[solve](
                n, work.packed, work.u, work.points, q, self.n_sky, work.scratch, work.numbers
            ),
        )
        yield (
            "root of M",
            lambda: root_stars[solve](n, work.packed, work.u, c, work.second_scratch, work.numbers),
        )
        yield (
            "spread within clouds",
            lambda: whiten_stars[solve](
                n, work.packed, work.u, self.unit, work.scratch, work.second_scratch,
                work.roots, work.centre, work.spectrum,
            ),
        )  # fmt: skip
        yield (
            "clouds",
            lambda: compare_kernel(self.vectors)[(self.panels, n), THREADS, stream, self.shared](
                c, self.reach, *self.clouds, work.roots, work.centre, work.spectrum, self.width, work.found
            ),
        )
        yield (
            "labels",
            lambda: conclude_stars[n, LANES, stream](
                work.found, work.numbers, self.first, c, *self.label_range, *self.error_model, *scores[:13]
            ),
        )
        yield (
            "median SNR",
            lambda: median_rows[n, MEDIAN_THREADS, stream](flux, error, hidden, p, scores.snr_median),
        )

    def launch(self, flux: Any, error: Any, mask: Any, n: int, work: Work, stream: Any) -> Posteriors:
        """Score n > 0 spectra that are on the device, in `stream`, without waiting; nothing is checked.

        Parameters
        ----------
        flux, error : device array of shape (n · p,) or longer, float32
        mask : device array of shape (n · p,) or longer, bool, or None
        n : int
        work : Work
            For n rows at least.
        stream : Numba stream

        Returns
        -------
        Posteriors
            Device arrays, cut to n rows.
        """
        scores = work.scores if n == work.rows else Posteriors(*(a[:n] for a in work.scores))
        for _, start in self.steps(flux, error, mask, n, work, scores, stream):
            start()
        return scores


class Work:
    """Device memory of up to `rows` spectra between the kernels, and the results."""

    def __init__(self, rows: int, plan: DevicePosterior) -> None:
        p, n, width = plan.n_pixels, plan.n_coordinates, plan.n_coordinates + plan.n_nuisances
        self.rows = rows
        blocks = min(rows, plan.blocks)

        def doubles(*shape: int) -> Any:
            return cuda.device_array(shape, np.float64)

        self.y, self.information, self.spectra = doubles(rows, p), doubles(rows, p), doubles(rows, p)
        self.cells, self.packed = doubles(rows, plan.n_cells), doubles(rows, plan.packed)
        self.u, self.points, self.numbers = (
            doubles(rows, width),
            doubles(rows, width),
            doubles(rows, NUMBERS),
        )
        self.scratch = doubles(blocks, width, width + 2)
        self.second_scratch = doubles(blocks, n, n + 2)
        self.roots = cuda.device_array((rows, n, n), np.float32)
        self.centre, self.spectrum = (cuda.device_array((rows, n), np.float32) for _ in range(2))
        self.found = cuda.device_array((rows, FIRST_LABEL + 3 * plan.n_labels, plan.n_clouds), np.float32)
        self.scores = Posteriors(*(cuda.device_array(*kind) for kind in plan.kinds(rows)))


class CudaPosteriorScorer(BlockScorer):
    """Posteriors over clouds on the device, block by block; several threads may call it.

    Parameters
    ----------
    space : Space
    clouds : Clouds
    block_rows : int
        Rows per block at most; fewer if FREE_SHARE of the free device memory does not hold all slots.
    slots : int
        Blocks on their way at most.

    Raises
    ------
    ValueError
        Space and clouds do not fit each other.
    BackendError
        There is no usable device, or they are too large for the kernels.
    DeviceMemoryError, PinnedMemoryError
        Memory of the device, or pinned memory of the host, is too small for blocks of FLOOR_ROWS rows in all slots.
    """

    def __init__(
        self, space: Space, clouds: Clouds, *, block_rows: int = BLOCK_ROWS, slots: int = SLOTS
    ) -> None:
        super().__init__(lambda: DevicePosterior(space, clouds), block_rows, slots)

    def __call__(
        self,
        flux: NDArray,
        error: NDArray,
        mask: NDArray[np.bool_] | None = None,
        slot: Slot | None = None,
    ) -> CloudPosterior:
        """Posteriors of spectra on the host; see `moefast.kernels.cloud_posterior`, and `BlockScorer.slot`."""
        return CloudPosterior(*self._scored(flux, error, mask, slot))


def cloud_posterior(
    flux: NDArray, error: NDArray, mask: NDArray[np.bool_] | None, space: Space, clouds: Clouds
) -> CloudPosterior:
    """`moefast.kernels.cloud_posterior` on the device, which has checked the arguments.

    Blocks in a loop are better given to one `CudaPosteriorScorer`, which keeps space and clouds on the device.
    """
    rows = min(BLOCK_ROWS, max(len(flux), 1))
    slots = min(SLOTS, -(-max(len(flux), 1) // rows))
    return CudaPosteriorScorer(space, clouds, block_rows=rows, slots=slots)(flux, error, mask)
