"""The network that corrects log g, and the error model that follows it, on the device.

Contract: `moefast.posterior.correction`; features in double precision and layers in single, as
`moefast.kernels.cpu_correction` has them.

`correct_stars`: a block owns STARS stars, whose activations lie beside each other in shared memory, and threads own
hidden units. A thread reads a weight once for all stars of its block, neighbours read neighbouring weights, and the
activations of an input are the same for all of them. The sums of a star are its own, in an order that is always the
same: no other star changes a bit of it.

Floor in multiply-adds of single precision per star, for f = 115 features and three layers of h = 128 units: f h + 2 h²
= 47 000, 0.002 µs at 50 TFLOP/s, a hundredth of what clouds take. Weights, 0.19 MB, are read from the second cache once
for STARS stars: 0.01 µs at 5.5 TB/s. A block waits f + 2 h times for a weight, so that several share a multiprocessor.
None of it has been measured.
"""

from __future__ import annotations

import math

from numba import cuda, float32, float64

from moefast.kernels.cpu_correction import FARTHEST, LEAST_WEIGHT
from moefast.kernels.cuda.gram import ALIGNED
from moefast.kernels.cuda.lanes import SCRATCH, WRITTEN_OUT, sum_of_block
from moefast.kernels.cuda.registry import kernel

__all__ = ["STARS", "THREADS", "answer_star", "correct_stars", "shared_bytes"]

STARS = 4
"""Stars of a block, which share its reads of weights: a vector of activations."""
THREADS = 128
"""Threads of a block; those that have no hidden unit of a narrow layer wait."""
PLACE, PLACE_OF_STARS = 0x7FFFFFFF, 0x7FFFFFFC
"""Masks that tell the compiler that an index is not negative, and that the activations of STARS stars begin there."""


def shared_bytes(units: int) -> int:
    """Dynamic shared memory of a block whose widest layer, or the features, have so many numbers: of two layers."""
    return 2 * 4 * STARS * units


@cuda.jit(device=True)
def answer_star(  # type: ignore[no-untyped-def]
    star, mean, of_width, of_spread, second, third, lowest, highest, w1, b1, w2, b2, scratch, log_g, log_g_err, features
):  # fmt: skip
    """From the posterior mean of log g to the answer within the range of labels and its error, by a whole block.

    `of_width` and `of_spread` are the logarithms that the error model sees, `second` and `third` two further labels.
    """
    lane = cuda.threadIdx.x
    answer = mean
    # Not min() and max(), which on a device are not NaN where one of the two is.
    if answer < lowest:  # noqa: PLR1730
        answer = lowest
    if answer > highest:  # noqa: PLR1730
        answer = highest
    value = float64(0)
    for h in range(lane, b1.size, cuda.blockDim.x):
        active = float64(b1[h])
        active += answer * float64(w1[0, h]) + of_width * float64(w1[1, h]) + of_spread * float64(w1[2, h])
        active += second * float64(w1[3, h]) + third * float64(w1[4, h])
        value += math.tanh(active) * float64(w2[h, 0])
    value = sum_of_block(value, scratch) + float64(b2[0])
    if lane == 0:
        log_g[star] = answer
        log_g_err[star] = math.exp(value)
        features[star, 0] = answer
        features[star, 1] = of_width
        features[star, 2] = of_spread
        features[star, 3] = second
        features[star, 4] = third


@cuda.jit(device=True)
def _feature(star, place, point, label, sd, covariance, weights, expert, of_error, log_level):  # type: ignore[no-untyped-def]
    """The feature of a star in some place, as `moefast.posterior.correction.features` orders them."""
    width = point.shape[1]
    # The scale is the last label, and no feature.
    count = label.shape[1] - 1
    n_experts = weights.shape[1]
    if place < width:
        return float64(point[star, place])
    place -= width
    if place < count:
        return label[star, place]
    place -= count
    if place < count:
        return math.log(sd[star, place])
    place -= count - 1
    if place < count:
        return covariance[star, place] / (sd[star, 0] * sd[star, place])
    place -= count
    if place < n_experts:
        return math.log(weights[star, place] + LEAST_WEIGHT)
    place -= n_experts
    if place < n_experts:
        weight = weights[star, place]
        return weight / (weight + LEAST_WEIGHT) * (expert[star, place] - label[star, 0])
    # What the error model sees of the scatter between clouds is the same logarithm.
    return of_error[star, 2] if place == n_experts else log_level[star]


@cuda.jit(device=True, **WRITTEN_OUT)
def _layer(numbers, source, weights, bias, target):  # type: ignore[no-untyped-def]
    """max(x W + b, 0) of the STARS stars whose x begins at `source`, from `target` on; W row by row."""
    sums = cuda.local.array(STARS, float32)
    n_out = bias.size
    n_in = weights.size // n_out
    cuda.syncthreads()
    for h in range(cuda.threadIdx.x, n_out, cuda.blockDim.x):
        for s in range(STARS):
            sums[s] = bias[h]
        place = h
        at = source
        for _ in range(n_in):
            weight = weights[place & PLACE]
            for s in range(STARS):
                sums[s] += weight * numbers[(at & PLACE_OF_STARS) + s]
            place += n_out
            at += STARS
        at = (target + STARS * h) & PLACE_OF_STARS
        for s in range(STARS):
            value = sums[s]
            numbers[at + s] = value if value > float32(0) else float32(0)


@kernel(
    "void(int64, int64, float64, float64, float32[::1], float32[::1], float32[::1], float32[::1], float32[::1],"
    " float32[::1], float32[::1], float32[::1], float32[::1], float32[::1], float32[:,::1], float32[::1],"
    " float32[:,::1], float32[::1], float32[:,::1], float64[:,::1], float64[:,::1], float64[:,::1], float64[:,::1],"
    " float64[::1], float64[:,::1], float64[::1], float64[::1], float64[:,::1])",
    threads=THREADS,
    blocks=4,
    serves=("cloud_posterior",),
)
def correct_stars(  # type: ignore[no-untyped-def]
    n_stars, units, lowest, highest, mean, inverse_spread, w1, b1, w2, b2, w3, b3, w4, b4,
    error_w1, error_b1, error_w2, error_b2,
    point, sd, covariance, weights, expert, log_level, label, log_g, log_g_err, features,
):  # fmt: skip
    """Add what is learnt to the posterior mean of log g of each star, and answer anew.

    `mean` to `b4` are the parts of `moefast.posterior.correction.CORRECTION`, matrices row by row, and `error_w1` to
    `error_b2` the error model. The others are what `conclude_stars` leaves, of which the mean of log g, the answer, its
    error and the first feature of the error model are changed. NaN stays NaN.

    Launch: a block of THREADS threads for each STARS stars, with `shared_bytes` of the most features or hidden `units`.
    """
    numbers = cuda.shared.array(0, float32, alignment=ALIGNED)
    scratch = cuda.shared.array(SCRATCH, float64)
    thread = cuda.threadIdx.x
    threads = cuda.blockDim.x
    begin = cuda.blockIdx.x * STARS
    behind = STARS * units

    for i in range(thread, STARS * mean.size, threads):
        # In the place of a star that is not there lies the last one.
        star = min(begin + i % STARS, n_stars - 1)
        place = i // STARS
        value = _feature(star, place, point, label, sd, covariance, weights, expert, features, log_level)
        value = (value - float64(mean[place])) * float64(inverse_spread[place])
        # As in `answer_star`.
        if value < -FARTHEST:  # noqa: PLR1730
            value = -FARTHEST
        if value > FARTHEST:  # noqa: PLR1730
            value = FARTHEST
        numbers[i] = value
    _layer(numbers, 0, w1, b1, behind)
    _layer(numbers, behind, w2, b2, 0)
    _layer(numbers, 0, w3, b3, behind)
    cuda.syncthreads()

    for s in range(min(STARS, n_stars - begin)):
        star = begin + s
        plain = label[star, 0]
        value = float64(0)
        for h in range(thread, b3.size, threads):
            value += float64(numbers[behind + STARS * h + s]) * float64(w4[h])
        value = sum_of_block(value, scratch) + float64(b4[0])
        corrected = plain + sd[star, 0] * math.tanh(value)
        # All have read what stood there: they wait for each other in their sum.
        if thread == 0:
            label[star, 0] = corrected
        answer_star(
            star, corrected, features[star, 1], features[star, 2], features[star, 3], features[star, 4],
            lowest, highest, error_w1, error_b1, error_w2, error_b2, scratch, log_g, log_g_err, features,
        )  # fmt: skip
