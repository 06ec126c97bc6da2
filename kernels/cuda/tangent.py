"""Posteriors over Gaussian clouds on the device; contract `moefast.kernels.reference_tangent`.

Floor: r (t + 1) multiply-adds per star and cloud, and r differences for every eight tangents; a number of a cloud is
read from the cache once per ROWS stars.

Design: a block of threads owns ROWS stars and one expert, and goes through its clouds in tiles of CLOUDS. Thread
(tx, ty) has the stars 4 tx … 4 tx + 3 and cloud ty: from shared memory come four coordinates, one of the cloud's mean
and those of TANGENTS tangents, in vectors, for 4 differences and 36 multiply-adds. Differences come first, for the
reason that `moefast.kernels.tangent` gives; more tangents go in further rounds. Then two threads share each star: each
adds half of the tile's clouds to what it has, running sums about a running mean, so that the scatter is never the
difference of two large numbers; at the end the two are put together. Nothing of size n × m is ever in memory.

Accuracy: ‖δ‖² is summed panel by panel, and the panels' sums are added: one float32 sum of 160 coordinates leaves the
exponents of clouds at χ² = 1000 off by 7·10⁻⁵ rms, this way 3·10⁻⁵, and the rounding of such a number alone is as much.

Each expert's clouds are filled up to whole tiles with clouds of weight zero, coordinates and tangents with zeros.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda, float32, int32
from numpy.typing import ArrayLike, NDArray

from moefast.kernels.cuda.device import require_device
from moefast.kernels.cuda.gram import ALIGNED
from moefast.kernels.cuda.lanes import bits_float, float_bits
from moefast.kernels.cuda.mix import LOGIT, NOISE, VALUE
from moefast.kernels.cuda.registry import kernel
from moefast.kernels.tangent import (
    HOPELESS,
    LARGEST,
    LEAST_VARIANCE,
    Library,
    TangentPosterior,
    check_stars,
)

__all__ = [
    "BLOCK_ROWS",
    "CLOUDS",
    "LAY_THREADS",
    "PANEL",
    "ROWS",
    "TANGENTS",
    "THREADS",
    "Clouds",
    "DeviceLibrary",
    "lay_stars",
    "tangent_posterior",
    "weigh_clouds",
]

BLOCK_ROWS = 1 << 16
"""Most stars on the device at once: 86 MB of 160 components, which are there twice; a thousand blocks of threads."""
ROWS = 64
"""Stars of a block."""
EACH = 4
"""Stars of a thread."""
CLOUDS = 8
"""Clouds of a tile; a thread has one."""
THREADS = (ROWS // EACH) * CLOUDS
TANGENTS = 8
"""Tangents that are multiplied together."""
PANEL = 16
"""Coordinates that are staged in shared memory at a time."""
WIDE = CLOUDS * TANGENTS
PARTS = THREADS // ROWS
"""Threads that share a star."""
SHARE = CLOUDS // PARTS
"""Clouds of a tile that a thread weighs for its star."""
STAR_LOADS = PANEL // PARTS
TANGENT_LOADS = PANEL * WIDE // THREADS
PADDED = ROWS + 1
STATE = 5
"""Numbers that a thread keeps of a star: largest exponent, Σω, Σω², mean and scatter."""
SO_FAR = 5
"""Numbers that a thread adds up of a star and cloud: ‖δ‖² − Σu², and what the tangents add to χ², the mean, the
variance of log g that is explained, and the logarithm of all variances."""
BLOCKS_TOGETHER = 4
CONCENTRATION = 3
"""Place of Σω²/(Σω)² behind those that `mix_rows` knows."""
PLACES = 4
LAY_THREADS = 256
LAY_PARTS = LAY_THREADS // ROWS
NAN = np.float32(np.nan)
NOTHING = np.float32(-np.inf)
LN_2 = np.float32(0.6931471805599453)
LOW_BITS, ONE_BITS = np.int32(0x007FFFFF), np.int32(0x3F800000)


class DeviceLibrary:
    """A library on the device, tile by tile, as `weigh_clouds` reads it."""

    def __init__(self, library: Library) -> None:
        (m, r), t = library.keys.shape, library.tangents.shape[1]
        self.r, self.n_experts = r, library.n_experts
        self.wide, self.groups = r + -r % PANEL, -(-t // TANGENTS)
        tiles = -(-np.diff(library.first) // CLOUDS)
        first_tile = np.concatenate([[0], np.cumsum(tiles)])
        # Where each cloud goes: its expert's tiles, one after the other.
        expert = np.repeat(np.arange(self.n_experts), np.diff(library.first))
        place = first_tile[expert] * CLOUDS + np.arange(m) - library.first[expert]
        total, filled = int(first_tile[-1]), self.groups * TANGENTS
        keys = np.zeros((total * CLOUDS, self.wide), np.float32)
        tangents = np.zeros((total * CLOUDS, filled, self.wide), np.float32)
        variances, gains = (np.zeros((total * CLOUDS, filled), np.float32) for _ in range(2))
        numbers = np.zeros((4, total * CLOUDS), np.float32)
        numbers[0], numbers[1] = 1, NOTHING
        keys[place, :r], tangents[place, :t, :r] = library.keys, library.tangents
        numbers[:, place] = library.rest, library.log_weights, library.log_g, library.scatter
        # A tangent that is not there has v_t/w = 1.
        variances[:] = numbers[0][:, None]
        variances[place, :t], gains[place, :t] = library.variances, library.gains
        grouped = tangents.reshape(total, CLOUDS, self.groups, TANGENTS, self.wide)
        self.arrays = tuple(
            cuda.to_device(np.ascontiguousarray(a))
            for a in (
                keys.reshape(total, CLOUDS, self.wide).transpose(0, 2, 1).reshape(-1),
                grouped.transpose(0, 2, 4, 1, 3).reshape(-1),
                variances.reshape(total, CLOUDS, self.groups, TANGENTS).transpose(0, 2, 1, 3).reshape(-1),
                gains.reshape(total, CLOUDS, self.groups, TANGENTS).transpose(0, 2, 1, 3).reshape(-1),
                numbers,
                first_tile.astype(np.int64),
            )
        )


class Clouds:
    """Device memory for the posteriors of up to `rows` stars: their coordinates turned, their noise, and the results.

    `found` (rows, 4, K) holds mean, standard deviation, log evidence, and Σω²/(Σω)² over the clouds of each expert.
    """

    def __init__(self, rows: int, library: DeviceLibrary) -> None:
        self.stars = cuda.device_array((library.wide, rows), np.float32)
        self.noise = cuda.device_array(rows, np.float32)
        self.found = cuda.device_array((rows, PLACES, library.n_experts), np.float32)

    @staticmethod
    def bytes_per_row(library: DeviceLibrary) -> int:
        """Device memory of a star."""
        return 4 * (library.wide + 1 + PLACES * library.n_experts)

    def launch(
        self, library: DeviceLibrary, z: Any, log_level: Any, n: int, stream: Any, *, least: float = -np.inf
    ) -> Any:
        """Posteriors of n > 0 stars on the device, in `stream`, without waiting; nothing is checked.

        `z` (n, r or more columns) and `log_level` (n,) are device arrays; levels below `least` count as that. Returns
        `found`, cut to n rows.
        """
        found = self.found[:n]
        blocks = -(-n // ROWS)
        lay_stars[blocks, LAY_THREADS, stream](
            z, log_level, np.float32(least), n, library.r, self.stars, self.noise
        )
        weigh_clouds[(blocks, library.n_experts), THREADS, stream](
            self.stars, self.noise, *library.arrays, library.groups, np.float32(library.r), found
        )
        return found


def tangent_posterior(z: ArrayLike, log_level: ArrayLike, library: Library) -> TangentPosterior:
    """Posterior of log g by each expert of a library; see `moefast.kernels.tangent_posterior`.

    Launch: see `lay_stars` and `weigh_clouds`.

    Raises
    ------
    ValueError
        As the CPU twin.
    BackendError
        There is no usable device.
    """
    stars, _ = check_stars(z, log_level, library)
    require_device()
    n, k = len(stars), library.n_experts
    if n == 0:
        return TangentPosterior(*(np.empty(s, np.float32) for s in ((0, k), (0, k), (0, k), 0)))
    there = DeviceLibrary(library)
    # Levels beyond float32 have no answer, as infinity.
    with np.errstate(over="ignore"):
        level = np.asarray(log_level, np.float64).astype(np.float32)
    work = Clouds(min(n, BLOCK_ROWS), there)
    found = np.empty((n, PLACES, k), np.float32)
    for start in range(0, n, BLOCK_ROWS):
        here = slice(start, min(start + BLOCK_ROWS, n))
        z_block, level_block = cuda.to_device(stars[here]), cuda.to_device(level[here])
        found[here] = work.launch(there, z_block, level_block, here.stop - start, 0).copy_to_host()
    mean, sd, log_evidence, concentration = (np.ascontiguousarray(found[:, i]) for i in range(PLACES))
    return TangentPosterior(mean, sd, log_evidence, _effective(log_evidence, concentration))


def _effective(log_evidence: NDArray, concentration: NDArray) -> NDArray:
    """How many clouds of all experts share the weight, from Σω²/(Σω)² within each: 1 / Σ_k P_k² concentration_k."""
    top = log_evidence.max(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        shares = np.exp((log_evidence - top).astype(np.float64))
    shares /= shares.sum(1, keepdims=True)
    square = np.where(shares > 0, shares**2 * concentration, 0.0).sum(1)
    answer = np.isfinite(top[:, 0])
    return np.where(answer, 1.0 / np.where(answer, square, 1.0), np.nan).astype(np.float32)


@kernel(
    "void(float32[:,::1], float32[::1], float32, int64, int64, float32[:,::1], float32[::1])",
    threads=LAY_THREADS,
    serves=("tangent_posterior", "score"),
)
def lay_stars(z, log_level, least, n, r, stars, noise):  # type: ignore[no-untyped-def]
    """Turn the first r columns of `z`, (n, …), into `stars`, (whole panels, …), and ln s into noise variances s².

    Levels below `least` count as that.

    Stars without an answer get coordinates of zero where theirs are not finite, and a noise of NaN. Coordinates beyond
    r are zero.

    Launch: ⌈n / ROWS⌉ blocks of LAY_THREADS threads.
    """
    sound = cuda.shared.array((LAY_PARTS, ROWS), int32)
    lane = cuda.threadIdx.x & (ROWS - 1)
    part = (cuda.threadIdx.x >> 6) & (LAY_PARTS - 1)
    row = cuda.blockIdx.x * ROWS + lane
    bad = int32(0)
    if row < n:
        for c in range(part, stars.shape[0], LAY_PARTS):
            value = float32(0)
            if c < r:
                value = z[row, c]
                # A comparison with NaN is false.
                if not abs(value) < LARGEST:
                    value = float32(0)
                    bad = int32(1)
            stars[c, row] = value
    sound[part, lane] = bad
    cuda.syncthreads()
    if part == 0 and row < n:
        for other in range(LAY_PARTS):
            bad |= sound[other, lane]
        level = log_level[row]
        # Not max(), which on a device is not NaN where one of the two is.
        if level < least:  # noqa: PLR1730
            level = least
        # The exponential is not asked for what does not fit.
        square = math.exp(float32(2) * level) if abs(level) < float32(40) else NAN
        good = bad == 0 and square >= LEAST_VARIANCE and square < LARGEST
        noise[row] = square if good else NAN


@cuda.jit(device=True)
def _mantissa(bits):  # type: ignore[no-untyped-def]
    """Mantissa of a positive number, from 1 to 2."""
    return bits_float(int32((bits & LOW_BITS) | ONE_BITS))


@kernel(
    "void(float32[:,::1], float32[::1], float32[::1], float32[::1], float32[::1], float32[::1], float32[:,::1],"
    " int64[::1], int64, float32, float32[:,:,::1])",
    threads=THREADS,
    blocks=BLOCKS_TOGETHER,
    serves=("tangent_posterior", "score"),
)
def weigh_clouds(  # type: ignore[no-untyped-def]
    stars, noise, keys, tangents, variances, gains, numbers, first_tile, groups, r, found,
):  # fmt: skip
    """Posterior of each star by each expert; `stars` (panels, …) and `noise` as `lay_stars` leaves them.

    `keys` holds, tile by tile and coordinate by coordinate, CLOUDS numbers; `tangents` tile by tile, group by group and
    coordinate by coordinate, CLOUDS · TANGENTS; `variances` and `gains` the same without coordinates; `numbers` ε²,
    ln π, y and τ² of each cloud. `found` (n, 4, K) gets mean, standard deviation, log evidence and Σω²/(Σω)².

    Launch: (⌈n / ROWS⌉, K) blocks of THREADS threads.
    """
    of_stars = cuda.shared.array((PANEL, ROWS), float32, alignment=ALIGNED)
    of_keys = cuda.shared.array((PANEL, CLOUDS), float32, alignment=ALIGNED)
    of_tangents = cuda.shared.array((PANEL, WIDE), float32, alignment=ALIGNED)
    exponents = cuda.shared.array((CLOUDS, PADDED), float32)
    means = cuda.shared.array((CLOUDS, PADDED), float32)
    scatters = cuda.shared.array((CLOUDS, PADDED), float32)
    state = cuda.shared.array((STATE, ROWS), float32)
    # What a thread adds up over groups of tangents waits in shared memory and leaves registers to the product.
    so_far = cuda.shared.array((SO_FAR, EACH, THREADS), float32)
    u = cuda.local.array((EACH, TANGENTS), float32)
    square = cuda.local.array(EACH, float32)
    variance = cuda.local.array(EACH, float32)
    a = cuda.local.array(EACH, float32)
    b = cuda.local.array(TANGENTS, float32)

    # Masks tell the compiler that indices are not negative: it then reads vectors.
    thread = cuda.threadIdx.x & (THREADS - 1)
    tx = thread & 15
    ty = (thread >> 4) & (CLOUDS - 1)
    lane = thread & (ROWS - 1)
    part = (thread >> 6) & (PARTS - 1)

    n = found.shape[0]
    wide = stars.shape[0]
    top_row = cuda.blockIdx.x * ROWS
    row = top_row + lane
    expert = cuda.blockIdx.y
    for i in range(EACH):
        star = top_row + EACH * tx + i
        variance[i] = noise[star] if star < n else NAN
        if math.isnan(variance[i]):
            variance[i] = float32(1)

    # Of clouds without tangents nothing is loaded; what is multiplied all the same must be numbers.
    for s in range(TANGENT_LOADS):
        of_tangents[(thread >> 6) + PARTS * s, thread & (WIDE - 1)] = float32(0)
    top = NOTHING
    total = float32(0)
    squares = float32(0)
    centre = float32(0)
    spread = float32(0)
    for tile in range(first_tile[expert], first_tile[expert + 1]):
        cloud = tile * CLOUDS + ty
        rest = numbers[0, cloud]
        for i in range(EACH):
            for j in range(SO_FAR):
                so_far[j, i, thread] = float32(0)
        # Without tangents, one round for the distance alone.
        for group in range(max(groups, 1)):
            for i in range(EACH):
                for t in range(TANGENTS):
                    u[i, t] = float32(0)
            for panel in range(0, wide, PANEL):
                for i in range(EACH):
                    square[i] = float32(0)
                cuda.syncthreads()
                for s in range(STAR_LOADS):
                    c = part + PARTS * s
                    of_stars[c, lane] = stars[panel + c, row] if row < n else float32(0)
                of_keys[thread >> 3, thread & 7] = keys[(tile * wide + panel) * CLOUDS + thread]
                if groups > 0:
                    corner = ((tile * groups + group) * wide + panel) * WIDE + thread
                    for s in range(TANGENT_LOADS):
                        c = (thread >> 6) + PARTS * s
                        of_tangents[c, thread & (WIDE - 1)] = tangents[corner + THREADS * s]
                cuda.syncthreads()
                for step in range(PANEL):
                    c = step & (PANEL - 1)
                    key = of_keys[c, ty]
                    for i in range(EACH):
                        a[i] = of_stars[c, EACH * tx + i] - key
                    for t in range(TANGENTS):
                        b[t] = of_tangents[c, TANGENTS * ty + t]
                    for i in range(EACH):
                        square[i] += a[i] * a[i]
                        for t in range(TANGENTS):
                            u[i, t] += a[i] * b[t]
                if group == 0:
                    for i in range(EACH):
                        so_far[0, i, thread] += square[i]
            if groups > 0:
                corner = ((tile * groups + group) * CLOUDS + ty) * TANGENTS
                for i in range(EACH):
                    inverse = float32(1) / (rest + variance[i])
                    inside = float32(0)
                    chi2 = float32(0)
                    shift = float32(0)
                    known = float32(0)
                    mantissa = float32(1)
                    exponent = int32(0)
                    for t in range(0, TANGENTS, 2):
                        # One division for two.
                        v0 = variances[corner + t] + variance[i]
                        v1 = variances[corner + t + 1] + variance[i]
                        both = float32(1) / (v0 * v1)
                        i0 = both * v1
                        i1 = both * v0
                        g0 = gains[corner + t]
                        g1 = gains[corner + t + 1]
                        p0 = u[i, t] * i0
                        p1 = u[i, t + 1] * i1
                        inside += u[i, t] * u[i, t] + u[i, t + 1] * u[i, t + 1]
                        chi2 += u[i, t] * p0 + u[i, t + 1] * p1
                        shift += g0 * p0 + g1 * p1
                        known += g0 * g0 * i0 + g1 * g1 * i1
                        b0 = float_bits(v0 * inverse)
                        b1 = float_bits(v1 * inverse)
                        mantissa *= _mantissa(b0) * _mantissa(b1)
                        exponent += (b0 >> int32(23)) + (b1 >> int32(23)) - int32(254)
                    so_far[0, i, thread] -= inside
                    so_far[1, i, thread] += chi2
                    so_far[2, i, thread] += shift
                    so_far[3, i, thread] += known
                    so_far[4, i, thread] += math.log(mantissa) + LN_2 * float32(exponent)

        log_weight = numbers[1, cloud]
        log_g = numbers[2, cloud]
        scatter = numbers[3, cloud]
        for i in range(EACH):
            beyond = max(so_far[0, i, thread], float32(0))
            whole = so_far[1, i, thread] + beyond / (rest + variance[i]) + so_far[4, i, thread]
            whole += r * math.log(float32(1) + rest / variance[i])
            e = log_weight - float32(0.5) * whole
            exponents[ty, EACH * tx + i] = e if e > HOPELESS else NOTHING
            means[ty, EACH * tx + i] = log_g + so_far[2, i, thread]
            scatters[ty, EACH * tx + i] = max(scatter - so_far[3, i, thread], float32(0))
        cuda.syncthreads()

        largest = top
        for j in range(SHARE):
            largest = max(largest, exponents[SHARE * part + j, lane])
        # Minus infinity from itself would be NaN.
        if largest > NOTHING:
            shrink = math.exp(top - largest)
            top = largest
            total *= shrink
            spread *= shrink
            squares *= shrink * shrink
            for j in range(SHARE):
                share = math.exp(exponents[SHARE * part + j, lane] - largest)
                if share > float32(0):
                    total += share
                    squares += share * share
                    value = means[SHARE * part + j, lane]
                    apart = value - centre
                    centre += apart * (share / total)
                    spread += share * (scatters[SHARE * part + j, lane] + apart * (value - centre))

    if part == 1:
        state[0, lane] = top
        state[1, lane] = total
        state[2, lane] = squares
        state[3, lane] = centre
        state[4, lane] = spread
    cuda.syncthreads()
    if part == 0 and row < n:
        known_star = not math.isnan(noise[row])
        largest = max(top, state[0, lane])
        found[row, VALUE, expert] = NAN
        found[row, NOISE, expert] = NAN
        found[row, LOGIT, expert] = NOTHING if known_star else NAN
        found[row, CONCENTRATION, expert] = NAN
        if largest > NOTHING and known_star:
            shrink = math.exp(top - largest)
            more = math.exp(state[0, lane] - largest)
            mine = total * shrink
            other = state[1, lane] * more
            total = mine + other
            squares = squares * shrink * shrink + state[2, lane] * more * more
            apart = state[3, lane] - centre
            spread = spread * shrink + state[4, lane] * more + apart * apart * (mine * (other / total))
            found[row, VALUE, expert] = centre + apart * (other / total)
            found[row, NOISE, expert] = math.sqrt(spread / total)
            # The noise is divided out of the variances above.
            level = float32(0.5) * r * math.log(noise[row])
            found[row, LOGIT, expert] = (largest + math.log(total)) - level
            found[row, CONCENTRATION, expert] = squares / (total * total)
