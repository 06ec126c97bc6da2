"""A space of spectra on the device, and the way from flux and error to the best point of it.

`moefast.kernels.cuda.information` has the kernels; posteriors and velocities begin with the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numba import cuda
from numpy.typing import NDArray

from moefast.kernels.clouds import Space
from moefast.kernels.cuda.information import (
    NUMBERS,
    READ_THREADS,
    Solving,
    add_parts,
    expand_stars,
    multiply_rows,
    parts_of_product,
    product_launch,
    read_spectra,
    subtract_spectra,
)

__all__ = ["DeviceSpace", "Matrices", "SpaceWork", "on_device"]

SCRATCH_BYTES = 80e6
"""Of matrices whose roots are found at the same time: half of them is used, and fits the second cache."""
LEAST_BLOCKS, MOST_BLOCKS = 264, 1056


def on_device(array: NDArray, dtype: Any) -> Any:
    """A contiguous copy of an array on the device."""
    return cuda.to_device(np.ascontiguousarray(array, dtype))


class DeviceSpace:
    """A space on the device, nuisances first: to marginalise them is to begin with them.

    Attributes
    ----------
    n_pixels, n_nuisances, n_cells, width, packed : int
        Pixels, nuisances, cells, directions w, and numbers of a packed triangle w (w + 1)/2.
    pixels : tuple of device arrays
        What `read_spectra` takes: reference, noise shape, pixels of each cell, where these begin, and their shares.
    directions, transposed : device array of shape (p, w), (w, p), float64
    products : device array of shape (cells, w (w + 1)/2), float64
        What a cell's information is multiplied with to give M.
    precision, pull : device array of shape (w, w), (w,), float64
    narrow : device array of shape (q,), or (1,) without nuisances, float64
        Width of each nuisance where slopes are narrow.
    slopes : tuple
        Share of narrow slopes, and `Space.groups` on the device, (groups, w − k + 1, w − k + 1) for k slopes:
        precision, pull behind its columns and constant behind both. Empty where slopes have one width.
    """

    def __init__(self, space: Space) -> None:
        (p, width), q = space.directions.shape, space.n_nuisances
        self.n_pixels, self.n_nuisances, self.n_cells, self.width = p, q, len(space.cells), width
        self.packed = width * (width + 1) // 2
        directions = np.roll(space.directions.astype(np.float64), q, axis=1)
        upper, shape = np.triu_indices(width), space.noise_shape.astype(np.float64)
        products = np.empty((self.n_cells, self.packed))
        there = space.cell_shares > 0
        for row, cell, kept in zip(products, space.cells, there, strict=True):
            row[:] = ((directions[cell[kept]] / shape[cell[kept], None]).T @ directions[cell[kept]])[upper]
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
        self.products = on_device(products, np.float64)
        self.precision = on_device(np.roll(space.precision, (q, q), (0, 1)), np.float64)
        self.pull = on_device(np.roll(space.pull, q), np.float64)
        self.slopes: tuple[Any, ...] = ()
        narrow = np.ones(max(1, q))
        if space.n_slopes:
            share, of_slopes, precision, pull, constant = space.slopes
            narrow[: len(of_slopes)] = of_slopes
            count, rest = pull.shape
            groups = np.zeros((count, rest + 1, rest + 1))
            groups[:, :rest, :rest], groups[:, :rest, rest], groups[:, rest, rest] = precision, pull, constant
            self.slopes = share, on_device(groups, np.float64)
        self.narrow = on_device(narrow, np.float64)

    def doubles(self) -> int:
        """Numbers in double precision of a row of `SpaceWork`, without its scratch."""
        of_parts = sum(columns * count for columns, count in self.in_parts().items())
        return 3 * self.n_pixels + self.n_cells + self.packed + 2 * self.width + NUMBERS + of_parts

    def in_parts(self) -> dict[int, int]:
        """Of the products that are made in parts: how many, by their columns."""
        parts: dict[int, int] = {}
        for matrix in (self.products, self.directions, self.transposed):
            count, _ = parts_of_product(*matrix.shape)
            if count > 1:
                parts[matrix.shape[1]] = max(count, parts.get(matrix.shape[1], 0))
        return parts

    def multiply(self, n: int, rows: Any, matrix: Any, out: Any, work: SpaceWork, stream: Any) -> None:
        """Start the product of the first n rows with a matrix of one of the shapes of this space."""
        c = out.shape[1]
        n_parts, terms = parts_of_product(*matrix.shape)
        blocks, threads = product_launch(n, c, n_parts)
        target = out if n_parts == 1 else work.parts[c]
        multiply_rows[blocks, threads, stream](rows, matrix, n, terms, work.rows, target)
        if n_parts > 1:
            add_parts[-(-n * c // READ_THREADS), READ_THREADS, stream](target, n_parts, work.rows, n, out)

    def to_point(
        self,
        flux: Any,
        error: Any,
        hidden: Any,
        n: int,
        work: SpaceWork,
        quality: tuple[Any, Any, Any],
        solve: tuple[int, int, Any, int],
        stream: Any,
    ) -> list[tuple[str, Callable[[], None]]]:
        """What is done to n spectra up to the best point b of each, y − a′ B b and Bᵀ(y − a′ B b), in its order.

        Parameters
        ----------
        flux, error, hidden : device array
            As `read_spectra` takes them.
        n : int
        work : SpaceWork
        quality : device arrays of shape (n,), float32, int32 and uint32
            SNR, good pixels and flags.
        solve : tuple
            How `expand_stars` is launched.
        stream : Numba stream

        Returns
        -------
        list of (name in words, what starts it in `stream`)
        """

        def multiply(rows: Any, matrix: Any, out: Any) -> None:
            self.multiply(n, rows, matrix, out, work, stream)

        return [
            (
                "read pixels, cells",
                lambda: read_spectra[n, READ_THREADS, stream](
                    flux, error, hidden, self.n_pixels, *self.pixels, work.y, work.information, work.cells,
                    work.numbers, *quality,
                ),
            ),
            ("M", lambda: multiply(work.cells, self.products, work.packed)),
            ("u", lambda: multiply(work.y, self.directions, work.u)),
            (
                "point near the star",
                lambda: expand_stars[solve](
                    n, work.packed, work.u, self.precision, self.pull, work.scratch, work.points
                ),
            ),
            ("its spectrum", lambda: multiply(work.points, self.transposed, work.spectra)),
            (
                "what is left of pixels",
                lambda: subtract_spectra[n, READ_THREADS, stream](
                    work.y, work.information, work.spectra, work.numbers
                ),
            ),
            ("u at the point", lambda: multiply(work.y, self.directions, work.u)),
        ]  # fmt: skip


class Matrices:
    """Where the matrices of stars lie, whose roots are found at the same time.

    In shared memory, if those of all kernels fit there; else in scratch of the device's memory, of so many blocks.

    Parameters
    ----------
    solving : sequence of Solving
        Of the kernels whose matrices may lie in shared memory.
    in_scratch : Solving, optional
        Of a kernel whose matrix, or a second one, lies in scratch always.

    Attributes
    ----------
    in_shared : bool
    of_block, always_of_block : int
        Numbers in scratch of a block: of matrices that are not in shared memory, and of that of `in_scratch`.
    blocks : int
        Blocks that find roots at the same time at most, if any of their matrices lie in scratch.
    """

    def __init__(self, solving: Sequence[Solving], in_scratch: Solving | None = None) -> None:
        every = [*solving, *([] if in_scratch is None else [in_scratch])]
        self.in_shared = all(each.fits for each in every)
        self.of_block = 1 if self.in_shared else max(each.matrix for each in solving) // 8
        self.always_of_block = 0 if in_scratch is None else in_scratch.matrix // 8
        of_block = 8 * (self.of_block + self.always_of_block)
        self.blocks = int(np.clip(SCRATCH_BYTES / of_block, LEAST_BLOCKS, MOST_BLOCKS))
        self.scratch_bytes = self.blocks * of_block

    def launch(
        self, n: int, solving: Solving, stream: Any, *, in_scratch: bool = False
    ) -> tuple[int, int, Any, int]:
        """Blocks, threads, stream and shared memory of a kernel for n stars."""
        blocks = n if self.in_shared and not in_scratch else min(n, self.blocks)
        return blocks, solving.threads, stream, solving.staged + (solving.matrix if self.in_shared else 0)


class SpaceWork:
    """Device memory of up to `rows` spectra up to their best points.

    Parameters
    ----------
    rows : int
    space : DeviceSpace
    matrices : Matrices
    """

    def __init__(self, rows: int, space: DeviceSpace, matrices: Matrices) -> None:
        p, width = space.n_pixels, space.width
        self.rows = rows

        def doubles(*shape: int) -> Any:
            return cuda.device_array(shape, np.float64)

        self.y, self.information, self.spectra = doubles(rows, p), doubles(rows, p), doubles(rows, p)
        self.cells, self.packed = doubles(rows, space.n_cells), doubles(rows, space.packed)
        self.u, self.points, self.numbers = (
            doubles(rows, width),
            doubles(rows, width),
            doubles(rows, NUMBERS),
        )
        self.scratch = doubles(min(rows, matrices.blocks), matrices.of_block)
        self.parts = {columns: doubles(count * rows, columns) for columns, count in space.in_parts().items()}
