"""What the compiler makes of a kernel: instructions, registers, shared memory, stack and spills, without a GPU.

Design: Numba and NVVM turn the kernel into PTX, nvJitLink (the library form of the linker and of ptxas) into machine
code; its verbose log holds the numbers, and the code how many instructions of which kind there are. Nothing here asks
the driver for anything, and no disassembler is needed: the lowest nine bits of an instruction say what it does.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
from cuda.bindings import nvjitlink
from numba import cuda
from numba.cuda import dispatcher

from moefast.kernels.cuda.registry import Kernel

__all__ = ["KINDS", "TARGETS", "Resources", "assemble", "compiling_for", "format_table", "link", "resources"]

TARGETS = ((8, 0), (9, 0))
"""Compute capabilities compiled for: A100 (sm_80), and H100 and H200 (sm_90)."""
INSTRUCTION_BYTES = 16
"""Size of every instruction from sm_70 on."""
OPERATION = 0x1FF
"""The bits of an instruction that say what it does; the next three say where its operands lie."""
KINDS = {
    "single": (0x020, 0x021, 0x023),  # FMUL, FADD, FFMA
    "double": (0x028, 0x029, 0x02B),  # DMUL, DADD, DFMA
    "loads": (0x181,),  # LDG
    "stores": (0x186,),  # STG
    "shared_accesses": (0x184, 0x188),  # LDS, STS
    "barriers": (0x11D,),  # BAR
}
"""Kinds of instructions that are counted, by the operations that NVIDIA's disassembler names so for sm_80 and sm_90."""


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one target: registers per thread; bytes of the rest, per block or per thread.

    `instructions` is their number in the machine code, that of its loops counted once, the filling at its end included.
    Of these are counted apart: arithmetic in single and in double precision, loads from and stores to device memory,
    accesses to shared memory, and barriers of a block.
    """

    kernel: str
    target: tuple[int, int]
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int
    instructions: int
    single: int
    double: int
    loads: int
    stores: int
    shared_accesses: int
    barriers: int


@contextmanager
def compiling_for(target: tuple[int, int]) -> Iterator[None]:
    """Let Numba believe that the current device is `target`.

    `cuda.compile` takes the target as an argument, but the device functions that a kernel calls are compiled for
    the current device, and without a driver there is none.
    """
    asked = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=target)
    try:
        yield
    finally:
        dispatcher.get_current_device = asked


def assemble(kernel: Kernel, target: tuple[int, int]) -> Resources:
    """Compile a kernel for one compute capability and read the assembler's log.

    Raises
    ------
    numba.core.errors.NumbaError, cuda.bindings.nvjitlink.nvJitLinkError
        The kernel does not compile.
    """
    with compiling_for(target):
        codes, _ = cuda.compile_all(
            kernel.function,
            kernel.signature,
            cc=target,
            device=False,
            abi="numba",
            output="ptx",
            launch_bounds=kernel.bounds_on(target),
        )
    pieces = [(nvjitlink.InputType.PTX, code.encode()) for code in codes]
    return resources(kernel.name, target, *link(pieces, target))


def link(
    pieces: list[tuple[nvjitlink.InputType, bytes]], target: tuple[int, int], options: tuple[str, ...] = ()
) -> tuple[str, bytes]:
    """Link PTX or LTO-IR for `target`: the verbose log of linker and assembler, and the machine code, an ELF file."""
    arguments = [f"-arch=sm_{target[0]}{target[1]}", "-verbose", "-Xptxas=-v", *options]
    handle = nvjitlink.create(len(arguments), arguments)
    try:
        for kind, data in pieces:
            nvjitlink.add_data(handle, kind, data, len(data), "kernel")
        nvjitlink.complete(handle)
        log = bytearray(nvjitlink.get_info_log_size(handle))
        nvjitlink.get_info_log(handle, log)
        code = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, code)
    finally:
        nvjitlink.destroy(handle)
    return log.rstrip(b"\0").decode(), bytes(code)


def count_instructions(code: bytes) -> dict[str, int]:
    """How many instructions an ELF file of 64 bits holds in sections whose names begin with ".text": all, and by kind.

    Raises
    ------
    ValueError
        It is no such file.
    """
    if code[:6] != b"\x7fELF\x02\x01":
        raise ValueError("machine code is expected as an ELF file of 64 bits, least byte first")
    (table,) = struct.unpack_from("<Q", code, 40)
    size, count, of_names = struct.unpack_from("<3H", code, 58)
    # Of each section: where its name begins among the names, where it begins in the file, and its size.
    sections = [struct.unpack_from("<I20xQQ", code, table + size * i) for i in range(count)]
    names = code[sections[of_names][1] :]
    text = b"".join(
        code[begin : begin + n_bytes]
        for name, begin, n_bytes in sections
        if names[name:].startswith(b".text")
    )
    operations = np.frombuffer(text, "<u8")[:: INSTRUCTION_BYTES // 8] & OPERATION
    of_kinds = {kind: int(np.isin(operations, codes).sum()) for kind, codes in KINDS.items()}
    return {"instructions": len(operations), **of_kinds}


def resources(name: str, target: tuple[int, int], log: str, code: bytes) -> Resources:
    """The numbers in the log and in the code of a link that made one kernel.

    Raises
    ------
    ValueError
        The log holds no such numbers, or those of several kernels.
    """
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    used = re.findall(r"Used (\d+) registers([^\n]*)", log)
    if len(frames) != 1 or len(used) != 1:
        raise ValueError(f"{name}: one kernel's numbers expected in the log, found {len(used)}:\n{log}")
    stack, stores, loads = (int(number) for number in frames[0])
    # Before sm_90 the assembler names shared memory; from then on the linker does, with 1 kB reserved by the system.
    shared = re.search(r"(\d+) bytes smem", log)
    registers, shared_bytes = int(used[0][0]), int(shared[1]) if shared else 0
    return Resources(name, target, registers, shared_bytes, stack, stores, loads, **count_instructions(code))


def format_table(rows: list[Resources]) -> str:
    """One line per kernel and target."""
    cells = [("kernel", "target", "registers", "shared", "stack", "spilled", "instructions", *KINDS)]
    cells += [
        (
            row.kernel, f"sm_{row.target[0]}{row.target[1]}",
            *map(str, (row.registers, row.shared, row.stack, row.spill_stores + row.spill_loads, row.instructions)),
            *(str(getattr(row, kind)) for kind in KINDS),
        )
        for row in rows
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in cells
    )
