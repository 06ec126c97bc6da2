"""Sums that do not depend on the order of their terms, to the last bit.

Design: float64 adds multiples of one power of two without error for as long as a sum has at most 53 bits. Every term
is therefore rounded to a multiple of a grain, s_a s_b 2⁻⁵¹ for a total Σab, where the scales s are powers of two with
Σa² ≤ s_a²: by Cauchy and Schwarz no total is larger than s_a s_b, that is 51 bits. What is added in any order, in any
number of parts, by any number of processes, then has the same bits. Rounding is (t + 3 s_a s_b) − 3 s_a s_b. The scales
are fixed before the first row is added, from a look at few rows, with `HEADROOM` to spare: terms are rounded to some
10⁻¹² of their total, and rows that are far larger than those looked at cost the certainty, not the result.

Source: J. Demmel and H. D. Nguyen, "Fast reproducible floating-point summation", ARITH 21, 2013.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["HEADROOM", "Scales", "rounded"]

F64 = NDArray[np.float64]

HEADROOM = 2.0**12
"""How much larger the mean square of all rows may be than that of the rows that were looked at."""
_LEAST_SHARE = 1e-6
"""Of the median mean square: pixels that do not vary among the rows that were looked at count as varying by this."""


class Scales(NamedTuple):
    """Powers of two: `x` (p,) with Σx² ≤ x², `v` (p,) with Σv ≤ v, `y` () with Σy² ≤ y², `one` () with n ≤ one²."""

    x: F64
    v: F64
    y: F64
    one: F64

    @classmethod
    def of(cls, n_rows: int, square: F64, variance: F64, largest_y: float) -> Scales:
        """Scales of n rows with the mean squares and variances (p,) of some of them, and the largest |y| of all."""
        n = max(n_rows, 1)
        square, variance = (
            np.maximum(each, max(_LEAST_SHARE * float(np.median(each)), 1e-300))
            for each in (square, variance)
        )
        return cls(
            _power(np.sqrt(n * HEADROOM * square)),
            _power(n * HEADROOM * variance),
            _power(np.array(np.sqrt(n) * max(largest_y, 1e-300))),
            _power(np.array(np.sqrt(n))),
        )

    def array(self) -> F64:
        """All of them in one row, as `of_array` takes it."""
        return np.concatenate([self.x, self.v, [self.y, self.one]])

    @classmethod
    def of_array(cls, array: F64) -> Scales:
        """From what `array` gave."""
        p = (len(array) - 2) // 2
        return cls(array[:p], array[p : 2 * p], np.array(array[-2]), np.array(array[-1]))


def _power(values: F64) -> F64:
    """The next power of two."""
    return np.exp2(np.ceil(np.log2(values)))


def rounded(terms: F64, scale: NDArray) -> F64:
    """Terms as multiples of scale · 2⁻⁵¹."""
    large: F64 = 3.0 * scale
    result: F64 = (terms + large) - large
    return result
