"""What the compiler makes of a kernel: registers, shared memory, stack and spills, found without a GPU.

Design: Numba and NVVM turn the kernel into PTX, nvJitLink (the library form of the linker and of ptxas) into machine
code; its verbose log holds the numbers. Nothing here asks the driver for anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

from cuda.bindings import nvjitlink
from numba import cuda
from numba.cuda import dispatcher

from moefast.kernels.cuda.registry import Kernel

__all__ = ["TARGETS", "Resources", "assemble", "compiling_for", "format_table", "link", "resources"]

TARGETS = ((8, 0), (9, 0))
"""Compute capabilities compiled for: A100 (sm_80), and H100 and H200 (sm_90)."""


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one target: registers per thread; bytes of the rest, per block or per thread."""

    kernel: str
    target: tuple[int, int]
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int


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
            launch_bounds=kernel.launch_bounds,
        )
    pieces = [(nvjitlink.InputType.PTX, code.encode()) for code in codes]
    return resources(kernel.name, target, link(pieces, target))


def link(
    pieces: list[tuple[nvjitlink.InputType, bytes]], target: tuple[int, int], options: tuple[str, ...] = ()
) -> str:
    """Link PTX or LTO-IR to machine code for `target` and return the verbose log of linker and assembler."""
    arguments = [f"-arch=sm_{target[0]}{target[1]}", "-verbose", "-Xptxas=-v", *options]
    handle = nvjitlink.create(len(arguments), arguments)
    try:
        for kind, data in pieces:
            nvjitlink.add_data(handle, kind, data, len(data), "kernel")
        nvjitlink.complete(handle)
        log = bytearray(nvjitlink.get_info_log_size(handle))
        nvjitlink.get_info_log(handle, log)
    finally:
        nvjitlink.destroy(handle)
    return log.rstrip(b"\0").decode()


def resources(name: str, target: tuple[int, int], log: str) -> Resources:
    """The numbers in the log of a link that made one kernel.

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
    return Resources(name, target, int(used[0][0]), int(shared[1]) if shared else 0, stack, stores, loads)


def format_table(rows: list[Resources]) -> str:
    """One line per kernel and target."""
    width = max(len(row.kernel) for row in rows)
    lines = [f"{'kernel':<{width}}  target  registers  shared  stack  spilled"]
    lines += [
        f"{row.kernel:<{width}}  sm_{row.target[0]}{row.target[1]}  {row.registers:>10}  {row.shared:>6}"
        f"  {row.stack:>5}  {row.spill_stores + row.spill_loads:>7}"
        for row in rows
    ]
    return "\n".join(lines)
