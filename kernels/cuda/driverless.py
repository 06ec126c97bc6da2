"""Compile kernels that link cuBLASDx on a machine without a driver.

Design: nvmath-python and Numba ask for the current device while they compile. For a check of registers and spills the
answers are known: the target. `answering_for` gives them, in a process that does nothing else (`python -m
moefast.kernels.cuda --tensor`), never in one that computes.

nvmath also asks the driver's own library for its version before it loads anything. Where there is no driver, a stand-in
of one function, built by the system's C compiler, answers that question.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from cuda.bindings import nvjitlink
from numba import cuda

from moefast.core.errors import BackendError
from moefast.kernels.cuda import tensor
from moefast.kernels.cuda.assembly import Resources, compiling_for, link, resources

__all__ = ["answering_for", "assemble_tensor", "stand_in_for_driver"]

DRIVER = "libcuda.so.1"
VERSION = 13000
"""CUDA 13.0: which of its libraries nvmath loads depends on it."""
SOURCE = f"int cuDriverGetVersion(int *version) {{ *version = {VERSION}; return 0; }}\n"


def stand_in_for_driver() -> str:
    """Load the driver's library or, where there is none, the stand-in; which of the two, in words.

    Raises
    ------
    BackendError
        There is neither a driver nor a C compiler.
    """
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise BackendError(
                "compiling for tensor cores needs an NVIDIA driver or a C compiler (cc)"
            ) from None
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder) / "driver.c", Path(folder) / DRIVER
            source.write_text(SOURCE)
            command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{DRIVER}", "-o", str(library), str(source)]
            subprocess.run(command, check=True)
            # Found by its name from now on, since it is loaded.
            ctypes.CDLL(str(library))
        return "a stand-in for the driver"
    return "the driver"


@contextmanager
def answering_for(target: tuple[int, int]) -> Iterator[None]:
    """Let nvmath and Numba believe that the current device is `target`."""
    from nvmath.device import cublasdx_numba
    from nvmath.device.common_cuda import CodeType

    asked = {
        name: getattr(cublasdx_numba, name)
        for name in dir(cublasdx_numba)
        if name.startswith("compile_blas_")
    }
    asked["get_default_code_type"] = cublasdx_numba.get_default_code_type
    code_type = CodeType("lto", _capability(target))
    for name, function in asked.items():
        # Type inference asks for each device function several times, and each takes its own ten seconds.
        setattr(cublasdx_numba, name, cache(function))
    cublasdx_numba.get_default_code_type = lambda: code_type
    try:
        with compiling_for(target):
            yield
    finally:
        for name, function in asked.items():
            setattr(cublasdx_numba, name, function)


def _capability(target: tuple[int, int]) -> object:
    """The target as nvmath names it on a real device: from 9.0 on, with the architecture's own instructions."""
    from nvmath.device.common_cuda import ComputeCapability

    return ComputeCapability(*target, "a" if target >= (9, 0) else "")


def assemble_tensor(target: tuple[int, int]) -> Resources:
    """Build the kernel of `moefast.kernels.cuda.tensor` for one target and read the assembler's log.

    Takes minutes: cuBLASDx is compiled from C++ templates.
    """
    stand_in_for_driver()
    with answering_for(target):
        function = tensor.make_kernel(tensor.make_matmul(_capability(target)))
        codes, _ = cuda.compile_all(
            function,
            tensor.SIGNATURE,
            cc=target,
            device=False,
            abi="numba",
            output="ltoir",
            launch_bounds=(tensor.THREADS, 1),
        )
    pieces = [(nvjitlink.InputType.LTOIR, code if isinstance(code, bytes) else code.data) for code in codes]
    return resources(function.__name__, target, *link(pieces, target, ("-lto",)))
