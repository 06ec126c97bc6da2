"""The kernels on an NVIDIA GPU, in Numba CUDA: the same functions, the same numbers, the same float64 contract.

Design: nothing here is imported by `moefast.kernels` until a caller says `backend="cuda"`, and importing this package
needs no CUDA package: its functions are looked up when they are first used. A public function checks, allocates and
launches; a kernel does neither check nor allocate. Kernels live at module scope and carry the decorator
`moefast.kernels.cuda.registry.kernel`, which enters them in the registry; every tool below goes through the registry.

How CUDA code is tested where there is no GPU:

1. *Simulator.* `tests/kernels/simulator/` runs in a process of its own with NUMBA_ENABLE_CUDASIM=1 (the variable must
   be set before Numba is imported), started by `tests/kernels/test_cuda_simulator.py`. Each CUDA thread is a Python
   thread: it shows wrong indices and wrong edges, at small sizes. `test_races.py` looks at every access to memory for
   missing barriers, and for barriers that not all threads reach.
2. *Compiler.* `python -m moefast.kernels.cuda` compiles every registered kernel for sm_80 and sm_90 with the NVVM and
   nvJitLink wheels, no driver needed, and prints registers, shared memory, stack, spills and instructions of each kind.
   It fails, and so does a test, where a kernel spills or is a tenth away from `compiled_kernels.json`.
3. *Device.* `pytest -m gpu` compares the same functions with the float64 reference on a real device.

How to add a kernel:

1. Write it at module scope, with named launch constants and the launch configuration in its docstring::

       from moefast.kernels.cuda.registry import kernel

       @kernel("void(float32[:,::1], float32[::1])", threads=THREADS, serves=("row_sums",))
       def _add_rows(values, out):
           ...

   `signature` holds the types that the public function passes: it is what the compiler test compiles. `serves` names
   the public functions that launch it. Launch it like any Numba kernel: ``_add_rows[blocks, THREADS, stream](…)``.
   Device functions are plain ``cuda.jit(device=True)`` functions and need no entry.
2. Name its module in `registry.MODULES` and the public function in `PUBLIC` below.
3. Give it tests in `tests/kernels/simulator/`, one of them in `test_races.py`, and in
   `tests/kernels/test_cuda_device.py`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

PUBLIC = {
    "assign_bins": "moefast.kernels.cuda.binning",
    "assign_snr_bins": "moefast.kernels.cuda.binning",
    "sort_by_bin": "moefast.kernels.cuda.binning",
    "normal_equations": "moefast.kernels.cuda.accumulator",
    "NormalEquationsAccumulator": "moefast.kernels.cuda.accumulator",
    "FirstPass": "moefast.kernels.cuda.first_pass",
    "RowsSeen": "moefast.kernels.cuda.first_pass",
    "tangent_posterior": "moefast.kernels.cuda.tangent",
    "template_posterior": "moefast.kernels.cuda.template",
    "score": "moefast.kernels.cuda.scoring",
    "CudaScorer": "moefast.kernels.cuda.scoring",
    "cloud_posterior": "moefast.kernels.cuda.clouds",
    "CudaPosteriorScorer": "moefast.kernels.cuda.clouds",
    "velocity_evidence": "moefast.kernels.cuda.velocity",
    "velocity_step": "moefast.kernels.cuda.velocity",
    "CudaVelocityScan": "moefast.kernels.cuda.velocity",
    "CudaVelocityStep": "moefast.kernels.cuda.velocity",
}
"""Public functions and classes, and the modules that hold them: imported when first used."""

__all__ = ["PUBLIC"]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name]), name)
