"""Sums and minima over the threads of a block, and the bits of numbers: what the simulator cannot do like a device.

Design: shuffles within a warp, shared memory between warps; every thread gets the result, in an order of additions
that is always the same. The simulator knows no shuffles: there a warp counts one thread, and everything goes through
shared memory.
"""

from __future__ import annotations

import numpy as np
from numba import config, cuda

__all__ = [
    "GROUP",
    "SCRATCH",
    "WRITTEN_OUT",
    "bits_float",
    "float_bits",
    "least_of_block",
    "most_of_warp",
    "sum_of_block",
    "sum_of_group",
    "sum_of_parts",
    "sum_of_warp",
]

SIMULATED = bool(config.ENABLE_CUDASIM)  # type: ignore[attr-defined]
GROUP = 1 if SIMULATED else 32
"""Threads that shuffle their numbers among themselves."""
SCRATCH = 1024 // GROUP
"""Numbers of shared memory that sums and minima over the largest block need."""
EVERY_LANE = 0xFFFFFFFF
WRITTEN_OUT: dict[str, bool] = {} if SIMULATED else {"forceinline": True}
"""For device functions whose loops have bounds, and arrays indices, that are constants where they are called: inlined
first and written out then, they leave numbers in registers. The simulator does not know the option."""

if SIMULATED:

    @cuda.jit(device=True)
    def float_bits(value):  # type: ignore[no-untyped-def]
        """The bits of a float32 as int32."""
        return np.float32(value).view(np.int32)

    @cuda.jit(device=True)
    def bits_float(bits):  # type: ignore[no-untyped-def]
        """The float32 of some bits."""
        return np.int32(bits).view(np.float32)

    @cuda.jit(device=True)
    def sum_of_group(value):  # type: ignore[no-untyped-def]
        """A group of one thread."""
        return value

    @cuda.jit(device=True)
    def least_of_group(value):  # type: ignore[no-untyped-def]
        """A group of one thread."""
        return value

    @cuda.jit(device=True)
    def sum_of_warp(value, scratch):  # type: ignore[no-untyped-def]
        """Sum over a block of one warp, through `scratch`."""
        return sum_of_block(value, scratch)

    @cuda.jit(device=True)
    def most_of_warp(value, scratch):  # type: ignore[no-untyped-def]
        """Maximum over a block of one warp, through `scratch`."""
        return -least_of_block(-value, scratch)

    @cuda.jit(device=True)
    def sum_of_parts(value, parts, scratch):  # type: ignore[no-untyped-def]
        """Sum over `parts` neighbouring threads, a power of two up to 32; `scratch` holds a number of each thread."""
        cuda.syncthreads()
        scratch[cuda.threadIdx.x] = value
        cuda.syncthreads()
        begin = cuda.threadIdx.x // parts * parts
        total = scratch[begin]
        for part in range(1, parts):
            total += scratch[begin + part]
        return total

else:
    from numba.cuda import libdevice

    @cuda.jit(device=True)
    def float_bits(value):  # type: ignore[no-untyped-def]
        """The bits of a float32 as int32."""
        return libdevice.float_as_int(value)

    @cuda.jit(device=True)
    def bits_float(bits):  # type: ignore[no-untyped-def]
        """The float32 of some bits."""
        return libdevice.int_as_float(bits)

    @cuda.jit(device=True)
    def sum_of_group(value):  # type: ignore[no-untyped-def]
        """Sum over the lanes of a warp."""
        value += cuda.shfl_xor_sync(EVERY_LANE, value, 16)
        value += cuda.shfl_xor_sync(EVERY_LANE, value, 8)
        value += cuda.shfl_xor_sync(EVERY_LANE, value, 4)
        value += cuda.shfl_xor_sync(EVERY_LANE, value, 2)
        value += cuda.shfl_xor_sync(EVERY_LANE, value, 1)
        return value

    @cuda.jit(device=True)
    def least_of_group(value):  # type: ignore[no-untyped-def]
        """Minimum over the lanes of a warp."""
        value = min(value, cuda.shfl_xor_sync(EVERY_LANE, value, 16))
        value = min(value, cuda.shfl_xor_sync(EVERY_LANE, value, 8))
        value = min(value, cuda.shfl_xor_sync(EVERY_LANE, value, 4))
        value = min(value, cuda.shfl_xor_sync(EVERY_LANE, value, 2))
        value = min(value, cuda.shfl_xor_sync(EVERY_LANE, value, 1))
        return value

    @cuda.jit(device=True)
    def sum_of_warp(value, scratch):  # type: ignore[no-untyped-def]
        """Sum over a block of one warp; `scratch` is the simulator's."""
        return sum_of_group(value)

    @cuda.jit(device=True)
    def most_of_warp(value, scratch):  # type: ignore[no-untyped-def]
        """Maximum over a block of one warp; `scratch` is the simulator's."""
        return -least_of_group(-value)

    @cuda.jit(device=True)
    def sum_of_parts(value, parts, scratch):  # type: ignore[no-untyped-def]
        """Sum over `parts` neighbouring lanes, a power of two up to 32; `scratch` is the simulator's."""
        # Written out: a loop would keep those around it from being written out.
        if parts > 16:
            value += cuda.shfl_xor_sync(EVERY_LANE, value, 16)
        if parts > 8:
            value += cuda.shfl_xor_sync(EVERY_LANE, value, 8)
        if parts > 4:
            value += cuda.shfl_xor_sync(EVERY_LANE, value, 4)
        if parts > 2:
            value += cuda.shfl_xor_sync(EVERY_LANE, value, 2)
        if parts > 1:
            value += cuda.shfl_xor_sync(EVERY_LANE, value, 1)
        return value


@cuda.jit(device=True)
def sum_of_block(value, scratch):  # type: ignore[no-untyped-def]
    """Sum over all threads of a block, of whole warps. Every thread must call it; `scratch` has SCRATCH numbers."""
    value = sum_of_group(value)
    # Some may still be reading the result before.
    cuda.syncthreads()
    if cuda.threadIdx.x % GROUP == 0:
        scratch[cuda.threadIdx.x // GROUP] = value
    cuda.syncthreads()
    total = scratch[0]
    for group in range(1, cuda.blockDim.x // GROUP):
        total += scratch[group]
    return total


@cuda.jit(device=True)
def least_of_block(value, scratch):  # type: ignore[no-untyped-def]
    """Minimum over all threads of a block, of whole warps. Every thread must call it."""
    value = least_of_group(value)
    cuda.syncthreads()
    if cuda.threadIdx.x % GROUP == 0:
        scratch[cuda.threadIdx.x // GROUP] = value
    cuda.syncthreads()
    least = scratch[0]
    for group in range(1, cuda.blockDim.x // GROUP):
        least = min(least, scratch[group])
    return least
