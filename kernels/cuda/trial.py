"""Do the CUDA kernels run here: known before a fit begins, not after its first block."""

from __future__ import annotations

import numpy as np

from moefast.kernels.cuda.device import first_launch, require_device

__all__ = ["require_kernels"]


def require_kernels() -> None:
    """Return if CUDA kernels run: a few rows go through the normal equations.

    Raises
    ------
    BackendError
        A package, the driver or the device is missing, or the kernels do not run.
    """
    require_device()
    from moefast.kernels.cuda.accumulator import NormalEquationsAccumulator

    with first_launch():
        totals = NormalEquationsAccumulator(2, 1, method="numba", block_rows=4)
        totals.add_block(np.ones((3, 2), np.float32), np.ones(3), np.zeros(3, np.int64))
        totals.fetch()
