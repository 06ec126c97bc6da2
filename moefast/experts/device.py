"""The first pass on a GPU: totals to be used in the place of `NormalEquations` while rows come in.

Design: the device takes rows as they were read and makes the rest of them (`moefast.kernels.cuda.FirstPass`). It keeps
totals of its own; `finish` brings them home, where all that follows is the same for both backends.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefast.core.grids import Grid, SnrGrid
from moefast.experts.normal_equations import NormalEquations

__all__ = ["DeviceEquations", "DeviceRows"]

F32 = NDArray[np.float32]


class DeviceRows:
    """Rows of the first pass on a CUDA device, and the totals of the fits that see them.

    Parameters
    ----------
    equations : NormalEquations
        Totals of the experts to go on from; they stay on the host until `finish`.
    published : NormalEquations or None
        The same of the published-style ridge, in one bin and fold, which sees clipped flux.
    grid : Grid or SnrGrid
    drawn, published_drawn : bool
        Whether experts, and the published-style ridge, see a draw of noise.
    clipped : bool
        Whether experts see negative flux as zero.
    noise_inside : bool
        Whether flux holds its noise.
    seed : int
        Of the draws.

    Attributes
    ----------
    equations, published : DeviceEquations
        `published` is None if there is none.

    Raises
    ------
    BackendError
        When the first rows are added: there is no usable device, or its memory is too small.
    """

    def __init__(
        self,
        equations: NormalEquations,
        published: NormalEquations | None,
        grid: Grid | SnrGrid,
        *,
        drawn: bool,
        published_drawn: bool,
        clipped: bool,
        noise_inside: bool,
        seed: int,
    ) -> None:
        self._grid, self._n_folds, self._reference = grid, equations.n_folds, equations.reference
        self._draws = drawn, published_drawn
        self._clipped, self._noise_inside, self._seed = clipped, noise_inside, seed
        self._pass: Any = None
        self.n_rows = 0
        self.equations = DeviceEquations(self, equations, other=False)
        self.published = None if published is None else DeviceEquations(self, published, other=True)

    def add(
        self, flux: F32, error: F32, y: NDArray, t_eff: NDArray, m_h: NDArray, folds: NDArray, rows: NDArray
    ) -> None:
        """Add rows; see `moefast.kernels.cuda.FirstPass.add`."""
        if self._pass is None:
            from moefast.kernels.cuda import FirstPass, RowsSeen

            drawn, published_drawn = self._draws
            self._pass = FirstPass(
                self._reference,
                self._grid,
                self._n_folds,
                RowsSeen(drawn, 0.0 if self._clipped else -np.inf),
                None if self.published is None else RowsSeen(published_drawn, 0.0),
                seed=self._seed,
                noise_inside=self._noise_inside,
            )
        self._pass.add(flux, error, y, t_eff, m_h, folds, rows)
        self.n_rows += len(flux)

    def totals(self, *, other: bool) -> dict[str, NDArray] | None:
        """The totals of the rows added so far, by name; None if there are none."""
        if self._pass is None:
            return None
        found = self._pass.fetch(other)
        # By place: a named tuple has a method that is called count.
        return dict(zip(found._fields, found, strict=True))


class DeviceEquations:
    """Totals per bin and fold as `NormalEquations` has them, of rows that a device was given.

    Parameters
    ----------
    rows : DeviceRows
    so_far : NormalEquations
        Totals to go on from.
    other : bool
        Whether it has the totals of the second fit that sees the rows.
    """

    def __init__(self, rows: DeviceRows, so_far: NormalEquations, *, other: bool) -> None:
        self.reference = so_far.reference
        self._rows, self._so_far, self._other = rows, so_far, other

    @property
    def n_rows(self) -> int:
        """Rows seen."""
        return self._rows.n_rows + self._so_far.n_rows

    def end_unit(self) -> None:
        """Nothing: totals on a device are sums in the order of rows."""

    def finish(self) -> NormalEquations:
        """The totals, on the host; more rows may be added later.

        Raises
        ------
        ValueError
            A row was not finite or absurdly large.
        """
        totals = self._rows.totals(other=self._other)
        if totals is None:
            return self._so_far
        found = NormalEquations.of_totals(self.reference, self._so_far.count.shape, totals)
        return self._so_far + found if self._so_far.n_rows else found

    def state(self) -> dict[str, NDArray]:
        """As `NormalEquations.state` gives it."""
        return self.finish().state()
