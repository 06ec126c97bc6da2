"""Posterior means over a library of templates on the device; contract `moefast.kernels.reference_template`.

Floor: 2 r multiply-adds per star and template (3 r with a free scale) and an exponential; a template is read from the
cache once per ROWS stars.

Design: flash attention without tensor cores. A block of threads owns ROWS stars and goes through the templates in tiles
of TEMPLATES. χ² of a tile is summed difference by difference, for the reason that `moefast.kernels.template` gives, in
register tiles of 4 × 4; coordinates are staged in shared memory in panels of PANEL. Then four threads share each row:
each takes a quarter of the tile's exponents, all four agree on the running maximum, and each keeps sums of its own,
which are added up at the end. Nothing of size n × m is ever in memory.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda, float32
from numpy.typing import ArrayLike

from moefast.kernels.cuda.device import require_device
from moefast.kernels.cuda.gram import ALIGNED
from moefast.kernels.cuda.registry import kernel
from moefast.kernels.template import TemplatePosterior, check_posterior

__all__ = ["BLOCK_ROWS", "LABELS", "ROWS", "THREADS", "attend", "template_posterior"]

BLOCK_ROWS = 1 << 16
"""Most stars on the device at once: 42 MB of 160 components, a thousand blocks of threads."""

ROWS = 64
"""Stars of a block."""
TEMPLATES = 64
"""Templates of a tile."""
EACH = 4
"""Stars and templates of a thread's register tile."""
THREADS = (ROWS // EACH) * (TEMPLATES // EACH)
PANEL = 16
"""Coordinates that are staged in shared memory at a time."""
LOADS = PANEL * ROWS // THREADS
STEP = THREADS // ROWS
"""Coordinates that all threads fetch at once; also the threads that share a row."""
SHARE = TEMPLATES // STEP
"""Templates of a tile that a thread weighs for its row."""
PADDED = ROWS + 1
LABELS = 8
"""Labels of a block; more take blocks of their own, which make the weights anew."""
BLOCKS_TOGETHER = 2
NAN = np.float32(np.nan)
NOTHING = np.float32(-np.inf)


def template_posterior(
    z: ArrayLike, level: ArrayLike, keys: ArrayLike, values: ArrayLike, *, free_scale: bool = False
) -> TemplatePosterior:
    """Posterior mean over templates; see `moefast.kernels.template_posterior`.

    Launch: see `attend`.

    Raises
    ------
    ValueError
        As the CPU twin.
    BackendError
        There is no usable device.
    """
    stars, weight, templates, labels = check_posterior(z, level, keys, values, free_scale)
    require_device()
    n, q = len(stars), len(labels)
    if n == 0:
        return TemplatePosterior(*(np.empty(s, np.float32) for s in ((0, q), 0, 0)))
    on_device = [cuda.to_device(a) for a in (templates, labels)]
    out = TemplatePosterior(*(np.empty(shape, np.float32) for shape in ((n, q), n, n)))
    for start in range(0, n, BLOCK_ROWS):
        here = slice(start, min(start + BLOCK_ROWS, n))
        rows = here.stop - start
        # Neighbouring threads read neighbouring stars.
        of_stars = [cuda.to_device(np.ascontiguousarray(a)) for a in (stars[here].T, weight[here])]
        found = [cuda.device_array(shape, np.float32) for shape in ((rows, q), rows, rows)]
        grid = (-(-rows // ROWS), max(1, -(-q // LABELS)))
        attend[grid, THREADS](*of_stars, *on_device, free_scale, *found)
        for target, part in zip((out.mean, out.log_evidence, out.effective), found, strict=True):
            target[here] = part.copy_to_host()
    return out


@kernel(
    "void(float32[:,::1], float32[::1], float32[:,::1], float32[:,::1], boolean, float32[:,::1], float32[::1],"
    " float32[::1])",
    threads=THREADS,
    blocks=BLOCKS_TOGETHER,
    serves=("template_posterior",),
)
def attend(z, weight, keys, values, free_scale, mean, log_evidence, effective):  # type: ignore[no-untyped-def]
    """Posterior of each star; `z` (r, n), `weight` (n,) = −1/(2 s²), `keys` (r, m), `values` (q, m).

    A `weight` of NaN gives NaN. With `free_scale`, keys must have length 1 or 0.

    Launch: (⌈n / ROWS⌉, ⌈q / LABELS⌉ or 1) blocks of THREADS threads.
    """
    of_stars = cuda.shared.array((PANEL, ROWS), float32, alignment=ALIGNED)
    of_keys = cuda.shared.array((PANEL, TEMPLATES), float32, alignment=ALIGNED)
    exponents = cuda.shared.array((TEMPLATES, PADDED), float32)
    of_parts = cuda.shared.array((2, STEP, ROWS), float32)
    sums = cuda.shared.array((LABELS, THREADS), float32)
    chi2 = cuda.local.array((EACH, EACH), float32)
    scale = cuda.local.array((EACH, EACH), float32)
    a = cuda.local.array(EACH, float32)
    b = cuda.local.array(EACH, float32)
    shares = cuda.local.array(SHARE, float32)

    # Masks tell the compiler that indices are not negative: it then reads vectors.
    thread = cuda.threadIdx.x & (THREADS - 1)
    tx = thread & 15
    ty = (thread >> 4) & 15
    lane = thread & (ROWS - 1)
    part = (thread >> 6) & (STEP - 1)

    r, n = z.shape
    q, m = values.shape
    top_row = cuda.blockIdx.x * ROWS
    row = top_row + lane
    first_label = cuda.blockIdx.y * LABELS
    labels = min(LABELS, q - first_label)
    one = weight[row] if row < n else NAN
    top = NOTHING
    total = float32(0)
    square = float32(0)
    for label in range(LABELS):
        sums[label, thread] = float32(0)

    for first in range(0, m, TEMPLATES):
        for i in range(EACH):
            for j in range(EACH):
                scale[i, j] = float32(0) if free_scale else float32(1)
        # With a free scale, the first pass makes the scales.
        for differences in range(0 if free_scale else 1, 2):
            for i in range(EACH):
                for j in range(EACH):
                    chi2[i, j] = float32(0)
            for panel in range(0, r, PANEL):
                cuda.syncthreads()
                for s in range(LOADS):
                    c = panel + part + STEP * s
                    of_stars[part + STEP * s, lane] = float32(0)
                    of_keys[part + STEP * s, lane] = float32(0)
                    if c < r:
                        if row < n:
                            of_stars[part + STEP * s, lane] = z[c, row]
                        if first + lane < m:
                            of_keys[part + STEP * s, lane] = keys[c, first + lane]
                cuda.syncthreads()
                for step in range(PANEL):
                    c = step & (PANEL - 1)
                    for i in range(EACH):
                        a[i] = of_stars[c, EACH * ty + i]
                    for j in range(EACH):
                        b[j] = of_keys[c, EACH * tx + j]
                    if differences:
                        for i in range(EACH):
                            for j in range(EACH):
                                d = a[i] - scale[i, j] * b[j]
                                chi2[i, j] += d * d
                    else:
                        for i in range(EACH):
                            for j in range(EACH):
                                scale[i, j] += a[i] * b[j]

        # Whatever is beyond the last template weighs nothing.
        for i in range(EACH):
            star = top_row + EACH * ty + i
            of_star = weight[star] if star < n else NAN
            for j in range(EACH):
                inside = first + EACH * tx + j < m
                exponents[EACH * tx + j, EACH * ty + i] = chi2[i, j] * of_star if inside else NOTHING
        cuda.syncthreads()
        largest = NOTHING
        for i in range(SHARE):
            shares[i] = exponents[SHARE * part + i, lane]
            largest = max(largest, shares[i])
        of_parts[0, part, lane] = largest
        cuda.syncthreads()
        largest = top
        for other in range(STEP):
            largest = max(largest, of_parts[0, other, lane])
        # Exponents that overflowed weigh nothing; minus infinity from itself would be NaN.
        if largest > NOTHING:
            shrink = math.exp(top - largest)
            top = largest
            more = float32(0)
            more_square = float32(0)
            for i in range(SHARE):
                shares[i] = math.exp(shares[i] - largest)
                more += shares[i]
                more_square += shares[i] * shares[i]
            total = total * shrink + more
            square = square * shrink * shrink + more_square
            for label in range(labels):
                product = float32(0)
                for i in range(SHARE):
                    template = min(first + SHARE * part + i, m - 1)
                    product += shares[i] * values[first_label + label, template]
                sums[label, thread] = sums[label, thread] * shrink + product
        cuda.syncthreads()

    of_parts[0, part, lane] = total
    of_parts[1, part, lane] = square
    cuda.syncthreads()
    if part == 0 and row < n:
        total = float32(0)
        square = float32(0)
        for other in range(STEP):
            total += of_parts[0, other, lane]
            square += of_parts[1, other, lane]
        known = total > float32(0) and not math.isnan(one)
        for label in range(labels):
            product = float32(0)
            for other in range(STEP):
                product += sums[label, other * ROWS + lane]
            mean[row, first_label + label] = product / total if known else NAN
        if first_label == 0:
            log_evidence[row] = top + math.log(total / float32(m)) if known else NAN
            effective[row] = total * total / square if known else NAN
