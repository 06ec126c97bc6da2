"""Sums and minima over a block, bits, quotients, four numbers at a time: what the simulator cannot do like a device.

Design: shuffles within a warp, shared memory between warps; every thread gets the result, in an order of additions
that is always the same. The simulator knows no shuffles: there a warp counts one thread, and everything goes through
shared memory. Four neighbours in memory are one load of 128 bits where the compiler can be told so; Numba knows no
other way than to write the instruction.
"""

from __future__ import annotations

import numpy as np
from numba import config, cuda, float32

__all__ = [
    "GROUP",
    "SCRATCH",
    "WRITTEN_OUT",
    "bits_float",
    "float_bits",
    "least_of_block",
    "load_four",
    "most_of_warp",
    "quotient",
    "refined_quotient",
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
VECTORS = not SIMULATED and "mlir" not in cuda.__name__
"""Whether the compiler takes instructions that are written for LLVM, as that of numba-cuda's successor does not."""

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


@cuda.jit(device=True)
def refined_quotient(dividend, divisor, reciprocal):  # type: ignore[no-untyped-def]
    """dividend/divisor, rounded to nearest, of float32 and 1/divisor to within two units of its last place.

    The steps of the compiler's own division, without its question whether a number on the way is too large or too
    small: of both, and of their quotient, the magnitude must lie between 2⁻⁶³ and 2⁶³.
    """
    reciprocal = cuda.fma(cuda.fma(-divisor, reciprocal, float32(1)), reciprocal, reciprocal)
    result = dividend * reciprocal
    result = cuda.fma(cuda.fma(-divisor, result, dividend), reciprocal, result)
    return cuda.fma(cuda.fma(-divisor, result, dividend), reciprocal, result)


if VECTORS:
    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    @intrinsic
    def load_four(typing_context, array, index):  # type: ignore[no-untyped-def]
        """Four neighbours of a flat array, the first of which lies at a multiple of the bytes of four."""

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            numbers = context.make_array(signature.args[0])(context, builder, arguments[0])
            place = builder.gep(numbers.data, [arguments[1]])
            four = ir.VectorType(numbers.data.type.pointee, 4)
            size = context.get_abi_sizeof(numbers.data.type.pointee)
            found = builder.load(builder.bitcast(place, four.as_pointer()), align=4 * size)
            # In memory a bool is a byte.
            model = context.data_model_manager[array.dtype]
            each = [
                model.from_data(builder, builder.extract_element(found, ir.Constant(ir.IntType(32), i)))
                for i in range(4)
            ]
            return context.make_tuple(builder, signature.return_type, each)

        return types.UniTuple(array.dtype, 4)(array, index), generate

    @intrinsic
    def _near_reciprocal(typing_context, number):  # type: ignore[no-untyped-def]
        """1/number of a float32, to within a unit of its last place."""

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            single = ir.FloatType()
            kind = ir.FunctionType(single, [single])
            return builder.call(ir.InlineAsm(kind, "rcp.approx.ftz.f32 $0, $1;", "=f,f"), arguments)

        return types.float32(types.float32), generate

    @cuda.jit(device=True)
    def quotient(dividend, divisor):  # type: ignore[no-untyped-def]
        """dividend/divisor of float32, rounded to nearest; for which numbers, see `refined_quotient`."""
        return refined_quotient(dividend, divisor, _near_reciprocal(divisor))

else:

    @cuda.jit(device=True)
    def load_four(array, index):  # type: ignore[no-untyped-def]
        """Four neighbours of a flat array, the first of which lies at a multiple of the bytes of four."""
        return array[index], array[index + 1], array[index + 2], array[index + 3]

    @cuda.jit(device=True)
    def quotient(dividend, divisor):  # type: ignore[no-untyped-def]
        """dividend/divisor of float32, rounded to nearest; for which numbers, see `refined_quotient`."""
        return dividend / divisor
