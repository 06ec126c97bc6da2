"""From projected spectra to log g on the device: noise level, features, gate, mixture, error.

Contract: `moefast.kernels.reference.soft_mix_reference`.

Floor: a star's sums of σ²/D over cells (2 kB) are read from memory, and two noise levels of `cell_matrix` (K · 4 kB)
from the L1 cache: 300 cycles of a multiprocessor, a fifth of what `project_rows` takes; some 1500 instructions of a
warp beside.

Design: a warp is a block and does one star; its lanes share the terms of every inner product. Only
the two noise levels around the star's are multiplied, which is what makes the noise of experts cheap here. A row's
numbers depend on that row alone.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda, float32, int64

from moefast.kernels.cuda.lanes import SCRATCH, sum_of_warp
from moefast.kernels.cuda.registry import kernel

__all__ = ["LANES", "LOGIT", "NOISE", "VALUE", "mix_rows", "shared_bytes"]

LANES = 32
"""Threads of a block: one warp."""
BLOCKS_TOGETHER = 24
NOT_NEGATIVE = 0x7FFFFFFFFFFFFFFF
VALUE, NOISE, LOGIT = range(3)
"""Places in what other experts say."""
LEAST_EXPECTED = np.float32(1e-30)


def shared_bytes(n_features: int, n_experts: int, n_hidden: int) -> int:
    """Dynamic shared memory of a launch: features, gate, expert values, their noise, and the larger hidden layer."""
    return 4 * (n_features + 3 + 3 * n_experts + n_hidden)


@cuda.jit(device=True)
def _perceptron(numbers, n_features, w1, b1, w2, active, out, lane, scratch):  # type: ignore[no-untyped-def]
    """numbers[out + k] = Σ_h tanh(b₁ + f W₁)_h W₂[k, h] of the first `n_features` numbers f, for all k."""
    for h in range(lane, b1.size, LANES):
        value = b1[h]
        for f in range(n_features):
            value += numbers[f] * w1[f, h]
        numbers[active + h] = math.tanh(value)
    # A lane reads what it has written itself.
    for k in range(w2.shape[0]):
        total = float32(0)
        for h in range(lane, b1.size, LANES):
            total += numbers[active + h] * w2[k, h]
        total = sum_of_warp(total, scratch)
        if lane == 0:
            numbers[out + k] = total
    cuda.syncthreads()


@kernel(
    "void(float32[:,::1], float32[:,::1], float32[:,::1], float32[::1], float32[::1], float32[::1], float32[:,::1],"
    " int64, int64, float32[::1], float32[:,::1], float32[:,::1], float32[::1], float32[::1], float32,"
    " float32[:,::1], float32[::1], float32[:,::1], float32[::1],"
    " float32[:,::1], float32[::1], float32[:,::1], float32[::1], float32, float32, float32,"
    " float32[:,:,::1], boolean[::1],"
    " float32[::1], float32[::1], float32[::1], float32[:,::1], float32[:,::1], float32[::1])",
    threads=LANES,
    blocks=BLOCKS_TOGETHER,
    serves=("score",),
)
def mix_rows(  # type: ignore[no-untyped-def]
    columns, windows, cells, log_level, energy, expected, cell_matrix,
    n_basis, n_leading, knots, expert_weights, intercepts, offsets, widths, least_continuum,
    gate_w1, gate_b1, gate_w2t, gate_b2, error_w1, error_b1, error_w2t, error_b2, least_spread, low, high,
    given, taken,
    log_g, log_g_err, log_g_err_raw, weights, expert_log_g, chi2,
):  # fmt: skip
    """Mix the experts of each star; arguments as `moefast.kernels.cpu.soft_mix`.

    `cells` holds sums of σ²/D over cells, and `cell_matrix` (M · K, cells) its weights, divided by the pixels of a
    cell. What other experts say is in `given` (n, at least 3, K): log g, its noise, and what is added to the logits of
    the gate, less the largest; `taken` (K,) says whose log g takes the place of the linear expert's, where it is not
    NaN. It is empty if there are no others.

    Launch: n blocks of LANES threads, with `shared_bytes` of dynamic shared memory. A loop over rows inside would make
    the compiler keep the addresses of all arguments in registers, which spill.
    """
    numbers = cuda.shared.array(0, float32)
    scratch = cuda.shared.array(SCRATCH, float32)
    lane = cuda.threadIdx.x
    n_levels, n_experts = intercepts.shape
    n_lines = widths.size
    n_features = 2 * n_lines + 1 + n_leading + 1
    gate = n_features + 3
    each = gate + n_experts
    noise = each + n_experts
    active = noise + n_experts
    first = knots[0]
    last = knots[n_levels - 1]
    step = (last - first) / float32(n_levels - 1)

    row = cuda.blockIdx.x
    level = log_level[row]
    level = first if math.isnan(level) else min(max(level, first), last)
    # The mask says that it is not negative.
    m = min(int64((level - first) / step), n_levels - 2) & NOT_NEGATIVE
    upper = min(max((level - first) / step - float32(m), float32(0)), float32(1))
    lower = float32(1) - upper

    inside = float32(0)
    for c in range(lane, n_basis, LANES):
        inside += columns[row, c] * columns[row, c]
    inside = sum_of_warp(inside, scratch)
    if lane == 0:
        chi2[row] = (energy[row] - inside) / max(expected[row], LEAST_EXPECTED)

    # Depths and equivalent widths; the sum of all widths but the last line's stands before the last line.
    for w in range(lane, n_lines, LANES):
        core = windows[row, 3 * w] + offsets[3 * w]
        integral = windows[row, 3 * w + 1] + offsets[3 * w + 1]
        continuum = max(windows[row, 3 * w + 2] + offsets[3 * w + 2], least_continuum)
        place = 2 * w if w < n_lines - 1 else 2 * w + 1
        numbers[place] = float32(1) - core / continuum
        numbers[place + 1] = widths[w] - integral / continuum
    for c in range(lane, n_leading, LANES):
        numbers[2 * n_lines + 1 + c] = columns[row, c]
    cuda.syncthreads()
    if lane == 0:
        triplet = float32(0)
        for w in range(n_lines - 1):
            triplet += numbers[2 * w + 1]
        numbers[2 * n_lines - 2] = triplet
        numbers[n_features - 1] = level
    cuda.syncthreads()

    _perceptron(numbers, n_features, gate_w1, gate_b1, gate_w2t, active, gate, lane, scratch)
    if taken.size > 0:
        best = float32(-np.inf)
        for k in range(n_experts):
            best = max(best, given[row, LOGIT, k])
        for k in range(lane, n_experts, LANES):
            # Relative to the best: large ones would lose the digits that matter.
            numbers[gate + k] += given[row, LOGIT, k] - best
    below = m * n_experts
    above = below + n_experts
    for k in range(n_experts):
        value = float32(0)
        for c in range(lane, columns.shape[1], LANES):
            weight = lower * expert_weights[below + k, c] + upper * expert_weights[above + k, c]
            value += columns[row, c] * weight
        value = sum_of_warp(value, scratch)
        value += lower * intercepts[m, k] + upper * intercepts[m + 1, k]
        # Chosen by all lanes: a branch inside that of the first one takes registers until they spill.
        if taken.size > 0 and taken[k] and not math.isnan(given[row, VALUE, k]):
            value = given[row, VALUE, k]
        if lane == 0:
            numbers[each + k] = value
    for k in range(n_experts):
        variance = float32(0)
        for g in range(lane, cells.shape[1], LANES):
            weight = lower * cell_matrix[below + k, g] + upper * cell_matrix[above + k, g]
            variance += cells[row, g] * weight
        variance = sum_of_warp(variance, scratch)
        sigma = math.sqrt(variance)
        if taken.size > 0 and taken[k] and not math.isnan(given[row, VALUE, k]):
            sigma = given[row, NOISE, k]
        if lane == 0:
            numbers[noise + k] = sigma
    cuda.syncthreads()

    top = float32(-np.inf)
    for k in range(n_experts):
        top = max(top, numbers[gate + k] + gate_b2[k])
    cuda.syncthreads()
    for k in range(lane, n_experts, LANES):
        numbers[gate + k] = math.exp(numbers[gate + k] + gate_b2[k] - top)
    cuda.syncthreads()
    norm = float32(0)
    for k in range(n_experts):
        norm += numbers[gate + k]
    mixed = float32(0)
    raw = float32(0)
    for k in range(n_experts):
        mixed += numbers[gate + k] / norm * numbers[each + k]
        raw += numbers[gate + k] / norm * numbers[noise + k]
    spread = float32(0)
    for k in range(n_experts):
        apart = numbers[each + k] - mixed
        spread += numbers[gate + k] / norm * apart * apart
    for k in range(lane, n_experts, LANES):
        weights[row, k] = numbers[gate + k] / norm
        expert_log_g[row, k] = numbers[each + k]
    answer = mixed if math.isnan(mixed) else min(max(mixed, low), high)
    if lane == 0:
        numbers[n_features] = answer
        numbers[n_features + 1] = math.log(max(raw, least_spread))
        numbers[n_features + 2] = math.log(max(math.sqrt(spread), least_spread))
    # All have read the gate, which the error's logarithm is written over.
    cuda.syncthreads()
    _perceptron(numbers, n_features + 3, error_w1, error_b1, error_w2t, active, gate, lane, scratch)
    if lane == 0:
        log_g[row] = answer
        log_g_err_raw[row] = raw
        log_g_err[row] = math.exp(error_b2[0] + numbers[gate])
