"""Loops from flux and error to a star's information (u, M), and its dense algebra; see `moefast.kernels.clouds`.

Design: one look at the row for its scale, a second one for y and the cells; then u and M of `ROWS` stars by
`moefast.kernels.vectors.add_tile`, which sums in one fixed order whatever stands in the other rows: a star's bits do
not depend on its neighbours.

Precision: sums over pixels, u, M and all that is solved with M are in double precision. In single precision M has
negative eigenvalues wherever gaps make it singular.
"""

from __future__ import annotations

import math

import numpy as np

from moefast.core.compiled import njit
from moefast.kernels.cpu import FAST
from moefast.kernels.quality import LARGEST32, LARGEST_ERROR32, ZERO32, median_near, quantile_scratch
from moefast.kernels.vectors import ROWS as STEP
from moefast.kernels.vectors import (
    VECTORS,
    add_rows,
    add_tile,
    copy_row,
    dot_row,
    multiply_row,
    set_tile,
    set_tiles,
    solve_rows,
    subtract_tiles,
    width_of,
)

__all__ = [
    "CHUNK",
    "GROUP",
    "LANES",
    "OVERHANG",
    "ROWS",
    "SPECTRUM",
    "STEP",
    "TINY",
    "chance_of_narrow",
    "filled",
    "multiply_cells",
    "multiply_pixels",
    "read_pixels",
    "refine",
    "solve",
    "unpack",
]

GROUP = width_of(64)
"""Numbers in double precision that are handled together; rows of matrices are filled up to whole groups."""
LANES = VECTORS * GROUP
"""Columns of packed M that lie side by side, and of u at most."""
ROWS = 64
"""Stars whose pixels are read before their products are formed: what is multiplied is read once for all of them."""
SPECTRUM = VECTORS * width_of(32)
"""Pixels of a spectrum that lie side by side."""
OVERHANG = GROUP - 1
"""Numbers behind the packed M of a star that a vector of its last row may reach."""
LATEST = 10
"""Stars whose medians tell where that of the next may be."""
CHUNK = 512
"""Pixels whose directions stay in the second cache while all stars of a block pass over them."""
TINY = 1e-30
SMALL, LARGE = 1e-150, 1e150
"""Products of pivots stay between, before their logarithm is taken."""
LEAST_CURVATURE = 1e-8
"""Added to M where the best point of the whole space is asked for, as in `moefast.posterior.forward`."""
LEAST_INFORMATION = 1e-13
"""Added to M before its root is taken: what a star does not see at all must not become negative by rounding."""
ROUNDING = 1e-14
"""Of a diagonal, what its pivot is not known to: n units of the last place."""
# A sum has one order only, but a product and a sum may become one instruction.
EXACT = {"contract"}


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _first_look(flux, error, mask, masked, reference, noise_shape, weight, ratio):
    """Weights 1/σ², flux/error, and all sums of a row that do not need its scale; bad pixels weigh nothing."""
    curvature, overlap, level = 0.0, 0.0, 0.0
    signal, noise, light, dark = 0.0, 0.0, 0.0, 0.0
    n_good, n_sound, n_wrong = np.int32(0), np.int32(0), np.int32(0)
    for j in range(flux.size):
        f, e = flux[j], error[j]
        shown = not mask[j] if masked else True
        # A comparison with NaN is false. Bits instead of `and` keep the loop free of branches.
        finite = (abs(f) <= LARGEST32) & shown
        sound = (e > ZERO32) & (e <= LARGEST_ERROR32)
        good = finite & sound
        one_sigma = np.float64(e)
        used = good & (one_sigma >= TINY)
        x = np.float64(f) if good else 0.0
        s = one_sigma if good else 0.0
        r = np.float64(reference[j])
        variance = s * s
        w = 1.0 / (one_sigma * one_sigma) if used else 0.0
        weight[j] = w
        curvature += w * r * r
        overlap += w * r * x
        level += variance / np.float64(noise_shape[j]) if used else 0.0
        signal += x * x
        noise += variance
        light += x
        dark += s
        ratio[j] = f / e if good else np.float32(np.inf)
        n_good = np.int32(n_good + np.int32(used))
        n_sound = np.int32(n_sound + np.int32(good))
        n_wrong = np.int32(n_wrong + np.int32(finite & (not sound)))
    return curvature, overlap, level, signal, noise, light, dark, n_good, n_sound, n_wrong


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _second_look(flux, reference, noise_shape, scale, weight, y, information):
    """Fill y, a′, and a′D in place of the weights."""
    share = scale * scale
    for j in range(flux.size):
        w = weight[j]
        apart = (np.float64(flux[j]) if w > 0.0 else 0.0) - scale * np.float64(reference[j])
        weighed = w * apart
        y[j] = np.float32(scale * weighed)
        information[j] = np.float32(scale * w * scale)
        weight[j] = w * np.float64(noise_shape[j]) * share


@njit(nogil=True, cache=True, fastmath=EXACT, error_model="numpy")
def _average_cells(weight, cell, first, pixel, share, cells):
    """Means of `weight` over cells; the k-th of `cell` has the pixels first[k] to first[k + 1] and their shares."""
    for k in range(cell.size):
        total = 0.0
        for j in range(first[k], first[k + 1]):
            total += share[j] * weight[pixel[j]]
        cells[cell[k]] = total


@njit(nogil=True, cache=True)
def _keep_finite(ratio):
    """Move what is not infinite to the front; return how many."""
    m = 0
    for j in range(ratio.size):
        value = ratio[j]
        ratio[m] = value
        # No branch: in a spectrum with bad pixels here and there it would be foretold wrongly.
        m += int(value < np.float32(np.inf))
    return m


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def read_pixels(
    flux, error, mask, reference, noise_shape, cell, first, pixel, share,
    y, information, cells, numbers, snr_norm, snr_median, n_good, flag,
):  # fmt: skip
    """Row by row: y and a′ (n, p), means of a′D over cells (n, k), and `numbers` of the row.

    `numbers` (n, 5): scale c₀, strength, a place for the energy, Σ σ²/D, number of good pixels. SNRs and flags as in
    `moefast.spectra.quality.assess`.
    """
    n, p = flux.shape
    masked = mask.shape[0] > 0
    weight, ratio = np.empty(p), np.empty(p + 1, np.float32)
    keys, scratch = np.empty(p + 2, np.int32), quantile_scratch()
    # Median of flux/error over mean flux by mean error differs by a per cent between stars: it tells where to look.
    usual, seen = np.float32(1.0), 0
    for i in range(n):
        shown = mask[i] if masked else mask.reshape(-1)
        curvature, overlap, level, signal, noise, light, dark, n_used, n_sound, n_wrong = _first_look(
            flux[i], error[i], shown, masked, reference, noise_shape, weight, ratio
        )
        curvature += TINY
        error_of_scale = math.sqrt(curvature)
        scale = (error_of_scale + max(overlap - error_of_scale, 0.0)) / curvature
        numbers[i, 0], numbers[i, 1] = scale, overlap / error_of_scale
        _second_look(flux[i], reference, noise_shape, scale, weight, y[i], information[i])
        numbers[i, 3], numbers[i, 4] = level, n_used
        _average_cells(weight, cell, first, pixel, share, cells[i])
        n_good[i] = n_sound
        flag[i] = np.uint32(4 * (n_wrong > 0) + 2 * (2 * n_sound < p) + (n_sound == 0))
        snr_norm[i], snr_median[i] = np.nan, np.nan
        if n_sound == 0:
            continue
        snr_norm[i] = math.sqrt(signal / noise)
        m = p
        if n_sound < p:
            m = _keep_finite(ratio[:p])
            # An infinite flux/error of a good pixel, 1e38 over 1e-38, went with the bad ones.
            ratio[m:n_sound] = np.float32(np.inf)
            m = n_sound
        ratio_of_means = np.float32(light / dark)
        median = np.float32(median_near(ratio, m, usual * ratio_of_means, keys, scratch))
        snr_median[i] = median
        if ratio_of_means > ZERO32 and median > ZERO32:
            seen = min(seen + 1, LATEST)
            usual += (median / ratio_of_means - usual) / np.float32(seen)


@njit(nogil=True, cache=True, error_model="numpy")
def multiply_pixels(y, rows, directions, u):
    """U = y · directions of the first rows: y (·, p), directions (blocks, p, lanes), u (·, columns)."""
    blocks, p, lanes = directions.shape
    u[:] = 0.0
    for block in range(blocks):
        for c in range(0, p, CHUNK):
            start, size = (block * p + c) * lanes, min(CHUNK, p - c)
            for r in range(0, rows, STEP):
                place = r * u.shape[1] + block * lanes
                add_tile(
                    y, r * p + c, p, directions, start, lanes, size, u, place, u.shape[1], GROUP, lanes // GROUP
                )  # fmt: skip


@njit(nogil=True, cache=True, error_model="numpy")
def multiply_cells(cells, rows, products, packed):
    """Packed M of the first rows: cells (·, g), products (blocks, g, `LANES`), packed (·, columns)."""
    blocks, g, _ = products.shape
    packed[:] = 0.0
    for block in range(blocks):
        for c in range(0, g, CHUNK):
            start, size = (block * g + c) * LANES, min(CHUNK, g - c)
            for r in range(0, rows, STEP):
                place = r * packed.shape[1] + block * LANES
                add_tile(
                    cells, r * g + c, g, products, start, LANES, size, packed, place, packed.shape[1], GROUP, VECTORS
                )  # fmt: skip


@njit(nogil=True, cache=True)
def filled(n):
    """The least multiple of `GROUP` that is not below n."""
    return -(-n // GROUP) * GROUP


@njit(nogil=True, cache=True, fastmath=EXACT, error_model="numpy")
def _pivot(value, least):
    """Root of a pivot and its inverse; what is below `least` is rounding."""
    root = math.sqrt(max(value + least, least))
    return root, 1.0 / root


@njit(nogil=True, cache=True, fastmath=EXACT, error_model="numpy")
def _root_of_corner(a, first, step, n_pivots, n_rows, least):
    """Root l of the rows and columns first, first + step, … of `a`, `STEP` of them: 1/l_rr, l_kr, and l_rr.

    Only the first of them are pivots, and only the first `n_rows` rows are there: l is that of unit vectors beyond.
    Numbers (k, r) are read in the row of the first of the two in `a`, or of the last if `step` is negative.
    """
    i, j, k, m = first, first + step, first + 2 * step, first + 3 * step
    root0, root1, root2, root3 = 1.0, 1.0, 1.0, 1.0
    inverse0, inverse1, inverse2, inverse3 = 1.0, 1.0, 1.0, 1.0
    of01, of02, of03, of12, of13, of23 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    root0, inverse0 = _pivot(a[i, i], least[0])
    if n_rows > 1:
        of01 = a[i, j] * inverse0
    if n_rows > 2:
        of02 = a[i, k] * inverse0
    if n_rows > 3:
        of03 = a[i, m] * inverse0
    if n_pivots > 1:
        root1, inverse1 = _pivot(a[j, j] - of01 * of01, least[1])
        if n_rows > 2:
            of12 = (a[j, k] - of01 * of02) * inverse1
        if n_rows > 3:
            of13 = (a[j, m] - of01 * of03) * inverse1
    if n_pivots > 2:
        root2, inverse2 = _pivot(a[k, k] - of02 * of02 - of12 * of12, least[2])
        if n_rows > 3:
            of23 = (a[k, m] - of02 * of03 - of12 * of13) * inverse2
    if n_pivots > 3:
        root3, inverse3 = _pivot(a[m, m] - of03 * of03 - of13 * of13 - of23 * of23, least[3])
    return (
        (inverse0, inverse1, inverse2, inverse3),
        (of01, of02, of03, of12, of13, of23),
        (root0, root1, root2, root3),
    )


@njit(nogil=True, cache=True, fastmath=EXACT, error_model="numpy")
def factor(a, stop, n, ridge):
    """Rows up to `stop` of U, with UᵀU = a + ridge, in place; rows up to n become what they do not explain.

    Only columns from the diagonal on are read and right; columns from n on go along. Pivots below the ridge, and below
    what rounding leaves of the diagonal, are rounding. Rows of `a` are filled up to whole `STEP`, columns to `GROUP`.
    """
    stride = a.shape[1]
    least = np.empty(filled(stop))
    for k in range(stop):
        least[k] = ridge + ROUNDING * a[k, k] + TINY
    for top in range(0, n, STEP):
        j = top // GROUP * GROUP
        place, count = top * stride + j, (stride - j) // GROUP
        subtract_tiles(a, top, 1, stride, a, j, stride, min(top, stop), a, place, stride, count)
        if top < stop:
            pivots = min(STEP, stop - top)
            inverses, factors, roots = _root_of_corner(a, top, 1, pivots, min(STEP, n - top), least[top:])
            solve_rows(a, place, stride, count, inverses, factors)
            for k in range(pivots):
                a[top + k, top + k] = roots[k]


@njit(nogil=True, cache=True, fastmath=EXACT, error_model="numpy")
def shrink(a, columns, t, n):
    """U ← T⁻¹U in place, with T upper triangular and TTᵀ = I + UUᵀ; columns from n on go along.

    Then UᵀU is (I + M)⁻¹M of what was M = UᵀU: nothing is subtracted from 1, and small information keeps its digits.
    `columns` (Uᵀ) and `t` are scratch of the shape of `a`, without numbers that are not finite. Left of the groups in
    which its diagonal lies `a` is zero.
    """
    stride = a.shape[1]
    for k in range(n):
        # Left of the diagonal, in its group, stands what was there before.
        for j in range(k // GROUP * GROUP, k):
            a[k, j] = 0.0
    for begin in range(0, n, GROUP):
        for k in range(begin, n):
            for j in range(begin, min(begin + GROUP, n)):
                columns[k, j] = a[j, k]
    for top in range(0, n, STEP):
        first = top * stride
        set_tiles(
            a, first + top, stride, 1, columns, first, stride, n - top, t, first, stride, filled(top + STEP) // GROUP
        )  # fmt: skip
    for k in range(n):
        t[k, k] += 1.0
    nothing = np.zeros(STEP)
    # Row k of t becomes column k of T, from the last on.
    for top in range((n - 1) // STEP * STEP, -1, -STEP):
        below, j = top + STEP, top // GROUP * GROUP
        here, count = top * stride + j, (stride - j) // GROUP
        if below < n:
            first = below * stride
            subtract_tiles(
                t, first + top, 1, stride, t, first, stride, n - below, t, top * stride, stride, filled(below) // GROUP
            )  # fmt: skip
            subtract_tiles(t, first + top, 1, stride, a, first + j, stride, n - below, a, here, stride, count)
        for k in range(n, below):
            # A row that is not there is that of a unit vector, whatever a star before has left.
            t[k, :], a[k, :] = 0.0, 0.0
            t[k, k] = 1.0
        inverses, factors, roots = _root_of_corner(t, below - 1, -1, STEP, STEP, nothing)
        solve_rows(t, (below - 1) * stride, -stride, filled(below) // GROUP, inverses, factors)
        solve_rows(a, here + (STEP - 1) * stride, -stride, count, inverses, factors)
        for k in range(STEP):
            t[below - 1 - k, below - 1 - k] = roots[k]


# Packed rows of M are as long as no multiple of a vector: vectors begin at multiples of `GROUP` columns, and what they
# take from a row before or behind falls where nothing is read. `OVERHANG` numbers stand behind the last row.
@njit(nogil=True, cache=True, error_model="numpy")
def unpack(packed, row, a, width):
    """Upper triangle (width, width) of M of one row of a block."""
    start, stride = row * packed.shape[1], a.shape[1]
    for i in range(width):
        j = i // GROUP * GROUP
        copy_row(packed, start + j - i, a, i * stride + j, (filled(width) - j) // GROUP)
        start += width - i


@njit(nogil=True, cache=True, error_model="numpy")
def add_precision(packed, row, precision, a, width):
    """As `unpack`, plus `precision` (width, `filled` width)."""
    start, stride, size = row * packed.shape[1], a.shape[1], precision.shape[1]
    for i in range(width):
        j = i // GROUP * GROUP
        add_rows(packed, start + j - i, precision, i * size + j, a, i * stride + j, (size - j) // GROUP)
        start += width - i


@njit(nogil=True, cache=True, fastmath=EXACT, error_model="numpy")
def _substitute_back(a, n, x):
    """Solve U x = v, where the rows of U in `a` have v in column n; x is 0 from n on."""
    stride = a.shape[1]
    x[:] = 0.0
    for k in range(n - 1, -1, -1):
        # The diagonal's group begins with numbers that mean nothing, of which x has none yet.
        j = (k + 1) // GROUP * GROUP
        for i in range(j, k):
            a[k, i] = 0.0
        x[k] = (a[k, n] - dot_row(a, k * stride + j, x, j, (filled(n) - j) // GROUP)) / a[k, k]


@njit(nogil=True, cache=True, fastmath=EXACT, error_model="numpy")
def _add_product(packed, row, x, out, n):
    """Add to `out` M of one row of a block, times x, which is 0 from n on; beyond n `out` is scratch."""
    start, begin = 0, row * packed.shape[1]
    for i in range(n):
        count = filled(n - i - 1) // GROUP
        total = multiply_row(packed, begin + start + 1, x, i + 1, out, i + 1, x[i], count)
        out[i] += packed[row, start] * x[i] + total
        start += n - i


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def _what_is_left(y, information, row, pixel, tile, left, place, energy):
    """Y − a′ · spectrum of `SPECTRUM` pixels of `STEP` rows; add its squares over a′ to the energy of the rows."""
    for i in range(STEP):
        total = ZERO32
        for j in range(SPECTRUM):
            weight = information[row + i, pixel + j]
            apart = y[row + i, pixel + j] - weight * tile[i, j]
            left[row + i, place + j] = apart
            total += apart * apart / weight if weight > ZERO32 else ZERO32
        energy[row + i] += np.float64(total)


@njit(nogil=True, cache=True, error_model="numpy")
def _gradient(y, information, rows, points, spectra, directions, tile, left, u, energy):
    """U = Bᵀ(y − a′ B b) and the energy left of the first rows; `spectra` (p / `SPECTRUM`, n + q, `SPECTRUM`) is B."""
    blocks, p, lanes = directions.shape
    width, step = spectra.shape[1], points.shape[1]
    u[:], energy[:] = 0.0, 0.0
    for c in range(0, p, CHUNK):
        size = min(CHUNK, p - c)
        for j in range(0, size, SPECTRUM):
            start = (c + j) // SPECTRUM * width * SPECTRUM
            for r in range(0, rows, STEP):
                set_tile(
                    points, r * step, step, spectra, start, SPECTRUM, width, tile, 0, SPECTRUM, SPECTRUM // VECTORS,
                    VECTORS,
                )  # fmt: skip
                _what_is_left(y, information, r, c + j, tile, left, j, energy)
        for block in range(blocks):
            start = (block * p + c) * lanes
            for r in range(0, rows, STEP):
                place = r * u.shape[1] + block * lanes
                add_tile(
                    left, r * CHUNK, CHUNK, directions, start, lanes, size, u, place, u.shape[1], GROUP,
                    lanes // GROUP,
                )  # fmt: skip


@njit(nogil=True, cache=True, error_model="numpy")
def refine(y, information, rows, packed, spectra, directions, precision, pull, numbers, points, u):
    """Expand the likelihood around a point near the star: u is changed, and the energy found.

    `points` (·, n + q) is float32 scratch.
    """
    width = len(pull)
    vector, point = np.zeros(filled(width) + GROUP), np.zeros(filled(width + 1) + GROUP)
    a = np.zeros((filled(width), filled(width + 1)))
    energy = np.empty(len(y))
    tile, left = np.empty((STEP, SPECTRUM), np.float32), np.zeros((len(y), CHUNK), np.float32)
    points[:] = ZERO32
    for i in range(rows):
        add_precision(packed, i, precision, a, width)
        for k in range(width):
            a[k, width] = u[i, k] + pull[k]
        factor(a, width, width, 0.0)
        _substitute_back(a, width, point)
        for k in range(width):
            points[i, k] = np.float32(point[k])
    _gradient(y, information, rows, points, spectra, directions, tile, left, u, energy)
    point[:] = 0.0
    for i in range(rows):
        for k in range(width):
            vector[k], point[k] = u[i, k], np.float64(points[i, k])
        _add_product(packed, i, point, vector, width)
        # What the energy would be without the point, if the likelihood were what it is near it.
        numbers[i, 2] = energy[i]
        for k in range(width):
            numbers[i, 2] += point[k] * (vector[k] + u[i, k])
            u[i, k] = vector[k]


@njit(nogil=True, cache=True, fastmath=EXACT, error_model="numpy")
def _gain_of_slopes(a, rest, k, widths, left):
    """What k slopes of such prior widths w add to the log evidence: ½ (w r)'A⁻¹(w r) − ½ ln |A| with A = 1 + w R w.

    R and r are what `a` holds behind its first `rest` rows; widths of none are 1, and `left` (k, k + 1) is scratch.
    """
    for i in range(k):
        width = widths[i] if widths.size else 1.0
        for j in range(i, k):
            left[i, j] = width * (widths[j] if widths.size else 1.0) * a[rest + i, rest + j]
        left[i, i] += 1.0
        left[i, k] = width * a[rest + i, rest + k]
    gain, determinant, product = 0.0, 0.0, 1.0
    for i in range(k):
        pivot = max(left[i, i], TINY)
        product *= pivot
        # A logarithm takes as long as a row: of products, as long as they are numbers.
        if not SMALL < product < LARGE:
            determinant += math.log(product)
            product = 1.0
        gain += left[i, k] * left[i, k] / pivot
        for j in range(i + 1, k):
            ratio = left[i, j] / pivot
            for m in range(j, k + 1):
                left[j, m] -= ratio * left[i, m]
    return 0.5 * (gain - determinant - math.log(product))


@njit(nogil=True, cache=True, fastmath=EXACT, error_model="numpy")
def chance_of_narrow(
    packed, u, row, n_sky, level2, share, narrow, order, places, precision, pull, of_groups, constants,
    a, part, left, evidences,
):  # fmt: skip
    """Probability, by a star's own evidence, that its slopes are narrow; 0 where there are no groups.

    The equations are those of `moefast.posterior.forward`. `packed` and `u` are M and u of the row; the directions are
    taken in an order in which those in which groups differ follow all others, and slopes are the last. What all groups
    have in common is taken out once. `share` to `constants` are those of `Space.weighing`; `a`, as in `solve`, `part`,
    `left` (k, k + 1) and `evidences` (2, groups) are scratch.
    """
    groups, size, length = of_groups.shape
    stride = a.shape[1]
    if groups == 0:
        return 0.0
    k, width = narrow.size, order.size
    common, own = width - size, size - narrow.size
    for i in range(width):
        for j in range(i, width):
            a[i, j] = packed[row, places[i, j]] + precision[i, j]
        a[i, width] = u[row, order[i]] + pull[i]
    for i in range(n_sky):
        a[i, i] += 1.0 / (level2 + TINY)
    factor(a, common, width, 0.0)
    highest = -np.inf
    for g in range(groups):
        for i in range(size):
            j = i // GROUP * GROUP
            first, place, count = (common + i) * stride + common + j, i * length + j, (length - j) // GROUP
            add_rows(a, first, of_groups, g * size * length + place, part, place, count)
        factor(part, own, size, 0.0)
        gain, determinant, product = 0.0, 0.0, 1.0
        for i in range(own):
            gain += part[i, size] * part[i, size]
            product *= part[i, i]
            if not SMALL < product < LARGE:
                determinant += math.log(product)
                product = 1.0
        known = constants[g] + 0.5 * gain - determinant - math.log(product)
        for place in range(2):
            evidences[place, g] = known + _gain_of_slopes(part, own, k, narrow[: place * k], left)
            highest = max(highest, evidences[place, g])
    wide, tight = 0.0, 0.0
    for g in range(groups):
        wide += (1.0 - share) * math.exp(evidences[0, g] - highest)
        tight += share * math.exp(evidences[1, g] - highest)
    return tight / (wide + tight)


@njit(nogil=True, cache=True, fastmath=EXACT, error_model="numpy")
def solve(a, q, n, n_sky, chance, narrow, level2, scratch, columns, root):
    """Marginalise q nuisances, then the scatter within clouds: `root` (n, ·) becomes C' of M₁ = C C', and λ behind it.

    `a` (q + n, ·) is the upper triangle of M, nuisances first, and u behind it; `scratch` and `columns` are like
    `root`. The last `n_sky` nuisances grow with the noise of the star, of mean square `level2`; the others are of width
    1, or with probability `chance` `narrow`.
    Returns what nuisances and the best point of the space explain, and what the latter gains beyond |λ|² under M₁.
    """
    for i in range(q):
        if i >= q - n_sky:
            a[i, i] += 1.0 / (level2 + TINY)
        else:
            a[i, i] += 1.0 / (1.0 - chance + chance * narrow[i] * narrow[i]) if narrow.size else 1.0
    factor(a, q, q + n, 0.0)
    explained = 0.0
    for i in range(q):
        explained += a[i, q + n] * a[i, q + n]
    stride = root.shape[1]
    for i in range(n):
        j = i // GROUP * GROUP
        first, place, count = (q + i) * a.shape[1] + q + j, i * stride + j, (stride - j) // GROUP
        copy_row(a, first, root, place, count)
        copy_row(a, first, scratch, place, count)
    factor(scratch, n, n, LEAST_CURVATURE)
    factor(root, n, n, LEAST_INFORMATION)
    gain, beyond = 0.0, 0.0
    for i in range(n):
        gain += scratch[i, n] * scratch[i, n]
        # |λ|² = uᵀM⁻¹u − uᵀ(I + M)⁻¹u, and the best point gains the same with the least curvature in M⁻¹ alone.
        beyond -= root[i, n] * root[i, n]
    shrink(root, columns, scratch, n)
    return explained + gain, gain + beyond
