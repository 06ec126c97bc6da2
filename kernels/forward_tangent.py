"""What `tangent_posterior` computes, described once on an arithmetic; the equations are in `moefast.kernels.tangent`.

Design: in double precision, because ‖z − k‖² is taken as a difference of large numbers: with all clouds at once it is
one product of matrices, and no value has a coordinate of every cloud for every star.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moefast.ops.arithmetic import SolvingArithmetic

__all__ = ["NUMBERS", "Clouds", "tangent_posterior"]

NUMBERS = ("keys", "tangents", "variances", "gains", "rest", "log_weights", "log_g", "scatter")
"""Arrays of a `Library` that the description asks for."""


class Clouds(NamedTuple):
    """Posterior `mean` of each expert, its standard deviation `sd`, and the logarithm of its `evidence`, all (n, K).

    `exponent` (n, m) is that of each cloud.
    """

    mean: Any
    sd: Any
    evidence: Any
    exponent: Any


def tangent_posterior(
    op: SolvingArithmetic, shape: tuple[int, int, int], sizes: Sequence[int], z: Any, log_level: Any
) -> Clouds:
    """Posteriors over the clouds of each expert.

    Parameters
    ----------
    op : SolvingArithmetic
        With the numbers `NUMBERS`, and `sizes`.
    shape : tuple of int
        m, t, r: clouds, tangents, coordinates.
    sizes : sequence of int
        Clouds of each expert. One without clouds has no mean, and evidence −∞.
    z : value of shape (n, r)
    log_level : value of shape (n, 1)
        ln s.
    """
    m, t, r = shape

    def own(name: str) -> Any:
        return op.precise(op.number(name))

    def total(value: Any) -> Any:
        return op.shaped(op.total(value, 1), (1,))

    double = op.double
    zero, half = double(0.0), double(-0.5)
    z, keys, tangents, variances = op.precise(z), own("keys"), own("tangents"), own("variances")
    # u = q (z − k), and what of ‖z − k‖² lies outside of the tangents.
    offset = op.total(op.multiply(tangents, op.reshaped(keys, (m, 1, r))), 2)
    along = op.product(z, op.ordered(op.reshaped(tangents, (m * t, r)), (1, 0)))
    along = op.subtract(op.shaped(along, (m, t)), offset)
    squares = op.multiply(along, along)
    reach = op.total(op.multiply(keys, keys), 1)
    cross = op.multiply(op.product(z, op.ordered(keys, (1, 0))), double(2.0))
    apart = op.subtract(op.add(total(op.multiply(z, z)), reach), cross)
    outside = op.larger(op.subtract(apart, op.total(squares, 2)), zero)

    noise = op.precise(op.exp(op.multiply(log_level, op.constant(2.0))))
    rest = op.add(noise, own("rest"))
    variance = op.add(op.shaped(noise, (1, 1)), variances)
    chi2 = op.add(op.divide(outside, rest), op.total(op.divide(squares, variance), 2))
    volume = op.add(op.multiply(op.log(rest), double(float(r - t))), op.total(op.log(variance), 2))
    exponent = op.add(op.multiply(op.add(chi2, volume), half), own("log_weights"))

    gains = own("gains")
    slope = op.divide(gains, variance)
    means = op.add(op.total(op.multiply(slope, along), 2), own("log_g"))
    left = op.larger(op.subtract(own("scatter"), op.total(op.multiply(slope, gains), 2)), zero)

    columns: dict[str, list[Any]] = {name: [] for name in ("mean", "sd", "evidence")}
    parts = (op.split(value, "sizes", sizes) for value in (exponent, means, left))
    for size, mine, mean_of, left_of in zip(sizes, *parts, strict=True):
        if size == 0:
            nothing = op.multiply(op.part(exponent, 1, 0, 1), zero)
            columns["mean"].append(op.add(nothing, double(np.nan)))
            columns["sd"].append(op.add(nothing, double(np.nan)))
            columns["evidence"].append(op.add(nothing, double(-np.inf)))
            continue
        top = op.largest(mine, 1)
        weight = op.exp(op.subtract(mine, top))
        whole = total(weight)
        share = op.divide(weight, whole)
        mean = total(op.multiply(share, mean_of))
        off = op.subtract(mean_of, mean)
        square = total(op.multiply(share, op.add(op.multiply(off, off), left_of)))
        columns["mean"].append(mean)
        columns["sd"].append(op.root(square))
        columns["evidence"].append(op.add(op.log(whole), top))
    mean, sd, evidence = (op.joined(columns[name], 1) for name in ("mean", "sd", "evidence"))
    return Clouds(mean, sd, evidence, exponent)
