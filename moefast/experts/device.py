"""Normal equations gathered on a GPU, to be used in the place of `NormalEquations` while rows come in.

Design: the device keeps totals of its own and is told nothing of bins and folds but a group per row. Blocks are centred
on the host and streamed (`moefast.kernels.cuda.NormalEquationsAccumulator`); `finish` brings the totals home, where all
that follows is the same for both backends.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefast.experts.normal_equations import NormalEquations, checked_groups

__all__ = ["DeviceEquations"]


class DeviceEquations:
    """Totals per bin and fold as `NormalEquations` has them, on a CUDA device.

    Parameters
    ----------
    reference : array of shape (p,), float64
        Fixed spectrum subtracted from every row.
    n_bins, n_folds : int
    so_far : NormalEquations, optional
        Totals to go on from; they stay on the host until `finish`.

    Raises
    ------
    BackendError
        When the first rows are added: there is no usable device, or its memory is too small.
    """

    def __init__(
        self,
        reference: NDArray,
        n_bins: int = 1,
        n_folds: int = 1,
        *,
        so_far: NormalEquations | None = None,
    ) -> None:
        self.reference: NDArray[np.float64] = np.array(reference, np.float64)
        self.shape = (n_bins, n_folds)
        self._so_far = so_far
        self._accumulator: Any = None
        self._added = 0

    @classmethod
    def of(cls, so_far: NormalEquations) -> DeviceEquations:
        """Go on from totals on the host."""
        return cls(so_far.reference, so_far.n_bins, so_far.n_folds, so_far=so_far)

    @property
    def n_rows(self) -> int:
        """Rows seen."""
        return self._added + (0 if self._so_far is None else self._so_far.n_rows)

    def add(
        self,
        x: NDArray[np.float32],
        y: NDArray,
        variance: NDArray | None = None,
        bins: NDArray | None = None,
        folds: NDArray | None = None,
        *,
        error: NDArray | None = None,
        clipped: bool = False,
    ) -> None:
        """Add rows; see `NormalEquations.add`. All calls must come with noise, or none."""
        group = checked_groups(self.reference.size, self.shape, x, y, variance, bins, folds, error)
        if error is not None:
            variance = error * error
        if self._accumulator is None:
            from moefast.kernels.cuda import NormalEquationsAccumulator

            self._accumulator = NormalEquationsAccumulator(
                self.reference.size, self.shape[0] * self.shape[1], with_variance=variance is not None
            )
        centred = np.maximum(x, np.float32(0)) if clipped else x
        self._accumulator.add_block(centred - self.reference.astype(np.float32), y, group, variance)
        self._added += len(x)

    def end_unit(self) -> None:
        """Nothing: totals on a device are sums in the order of rows."""

    def finish(self) -> NormalEquations:
        """The totals, on the host; more rows may be added later."""
        found = NormalEquations(self.reference, *self.shape)
        if self._accumulator is not None:
            totals = self._accumulator.fetch()
            # By place: a named tuple has a method that is called count.
            arrays = dict(zip(totals._fields, totals, strict=True))
            found = NormalEquations.of_totals(self.reference, self.shape, arrays)
        return found if self._so_far is None else self._so_far + found

    def state(self) -> dict[str, NDArray]:
        """As `NormalEquations.state` gives it."""
        return self.finish().state()
