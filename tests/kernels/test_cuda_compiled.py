"""Every CUDA kernel compiles for every target, spills nothing, and belongs to a public function; no GPU is needed."""

import dataclasses
import math
import re
import subprocess
import sys

import pytest

import moefast.kernels.cuda as package

pytest.importorskip("numba_cuda")
pytest.importorskip("cuda.bindings")

import numba
from numba import cuda

from moefast.kernels.cuda import assembly, clouds, compiled, registry

KERNELS = registry.load()


TABLE = compiled.read()


@pytest.mark.parametrize("target", assembly.TARGETS, ids=lambda target: f"sm_{target[0]}{target[1]}")
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_compiles_without_spills_to_about_as_many_instructions_as_before(name, target):
    found = assembly.assemble(KERNELS[name], target)
    assert found.registers > 0
    if name.startswith("compare_"):
        # Their dynamic shared memory may take all that a block has; from sm_90 on the system has 1 kB beside that.
        assert found.shared == (1024 if target >= (9, 0) else 0)
    assert compiled.differences(TABLE, [found]) == []


def resources(**changes):
    numbers = {name: 100 for name in compiled.KEPT}
    return assembly.Resources(
        "work", (9, 0), **{"stack": 0, "spill_stores": 0, "spill_loads": 0, **numbers, **changes}
    )


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"instructions": 111}, r"work on sm_90 has 111 instructions, 100 in .*\(\+11 %\); 90 to 110 are allowed"),
    ({"instructions": 89}, r"work on sm_90 has 89 instructions, 100 in .*\(-11 %\); 90 to 110 are allowed"),
    ({"barriers": 113}, r"work on sm_90 has 113 barriers, .*\(\+13 %\); at most 112 are allowed"),
    ({"registers": 109}, r"work on sm_90 has 109 registers, .* at most 108 are allowed"),
    ({"shared": 101}, r"work on sm_90 has 101 bytes of shared memory, .* at most 100 are allowed"),
    ({"spill_stores": 4}, "work on sm_90 spills 4 bytes"),
    ({"kernel": "new"}, "new on sm_90 is not in compiled_kernels.json"),
])  # fmt: skip
def test_what_grew_is_named_with_what_to_do(changes, sentence):
    table = compiled.renewed({"kernels": {"sm_80": {}}}, [resources()])
    assert compiled.differences(table, [resources()]) == []
    few = {kind: 112 for kind in assembly.KINDS}
    assert compiled.differences(table, [resources(instructions=110, registers=108, loads=few["loads"])]) == []
    found = compiled.differences(table, [dataclasses.replace(resources(), **changes)])
    assert len(found) == 2
    assert re.match(sentence, found[0])
    assert "python -m moefast.kernels.cuda --renew" in found[1]
    table["compiler"]["numba-cuda"] = "0.1"
    found = compiled.differences(table, [dataclasses.replace(resources(), **changes)])
    assert re.search(r"the table by numba-cuda 0\.1,", found[1])


def test_what_is_written_down_anew_leaves_other_targets():
    before = {"kernels": {"sm_80": {"old": {}}, "sm_90": {"old": {}}}}
    after = compiled.renewed(before, [resources()])["kernels"]
    assert after["sm_80"] == {"old": {}}
    assert after["sm_90"].keys() == {"work"}


@pytest.mark.parametrize("target", assembly.TARGETS, ids=lambda target: f"sm_{target[0]}{target[1]}")
def test_a_device_gets_the_launch_bounds_that_are_compiled_here(target):
    for vectors in clouds.USUAL_VECTORS:
        launched = clouds.usual(vectors, target) or clouds._made(vectors)
        expected = KERNELS[f"compare_clouds_{vectors}"].bounds_on(target)
        assert launched.targetoptions["launch_bounds"] == expected


def test_only_kernels_that_there_are_have_counts():
    assert len(TABLE["kernels"]) == len(assembly.TARGETS)
    for counts in TABLE["kernels"].values():
        assert counts.keys() == KERNELS.keys()


def test_an_unrolled_loop_shows_in_the_count():
    """The judge judged: the same work written out fourteen times more adds the same number of instructions again."""

    def source(times):
        lines = "\n".join("    x[i] = math.exp(x[i]) + x[i - 1]" for _ in range(times))
        space = {"math": math, "cuda": cuda}
        exec(f"def work(x):\n    i = cuda.grid(1)\n{lines}\n", space)
        return registry.Kernel("work", space["work"], "void(float32[::1])", (32, 1), ())

    few, more, most = (assembly.assemble(source(times), (9, 0)).instructions for times in (2, 16, 30))
    # An exponential and its store are more than four instructions; code is filled up to eight.
    assert more - few > 14 * 4
    assert abs((most - more) - (more - few)) <= 16
    with pytest.raises(ValueError, match="ELF file of 64 bits"):
        assembly.count_instructions(b"no machine code")


@pytest.mark.parametrize("target", assembly.TARGETS)
def test_kinds_of_instructions_are_told_apart(target):
    """The judge judged: a kernel of which every load, store, sum, product and barrier is known."""

    def work(x, y, z):
        shared = cuda.shared.array(64, numba.float32)
        i = cuda.threadIdx.x
        shared[i] = x[i] + x[i + 64]
        cuda.syncthreads()
        y[i] = shared[63 - i] * shared[i ^ 1]
        cuda.syncthreads()
        shared[i] = x[i + 128]
        cuda.syncthreads()
        y[i + 64] = shared[63 - i]
        z[i] = z[i] * z[i + 64] + z[i + 128]

    signature = "void(float32[::1], float32[::1], float64[::1])"
    found = assembly.assemble(registry.Kernel("work", work, signature, (64, 1), ()), target)
    assert (found.loads, found.stores, found.shared_accesses, found.barriers) == (6, 3, 5, 3)
    assert (found.single, found.double) == (2, 1)


def test_every_public_function_has_kernels_and_every_kernel_a_function():
    functions = {name for name in package.PUBLIC if name[0].islower()}
    assert functions
    served = {name for kernel in KERNELS.values() for name in kernel.serves}
    assert functions == served


def test_the_registry_holds_every_kernel_of_its_modules():
    from numba.cuda.dispatcher import CUDADispatcher

    listed = {kernel.function for kernel in KERNELS.values()}
    for module in registry.MODULES:
        for value in vars(sys.modules[module]).values():
            if isinstance(value, CUDADispatcher) and not value.targetoptions.get("device"):
                assert value.py_func in listed


def test_a_kernel_that_spills_is_seen():
    """The judge judged: as many blocks on a multiprocessor as leave a thread 64 registers."""
    tight = dataclasses.replace(KERNELS["add_gram"], launch_bounds=(256, 4))
    found = assembly.assemble(tight, (9, 0))
    assert found.spill_stores > 0
    assert found.stack > 0
    assert "add_gram" in assembly.format_table([found])


def test_a_log_without_numbers_is_refused():
    with pytest.raises(ValueError, match=r"one kernel's numbers expected in the log, found 0"):
        assembly.resources("x", (9, 0), "nothing", b"")


def test_two_kernels_of_one_name_are_refused():
    name = next(iter(KERNELS))

    def again(x):
        x[0] = 0

    again.__name__ = f"_{name}"
    with pytest.raises(ValueError, match=f"two kernels are called {name}"):
        registry.kernel("void(float32[::1])", threads=32, serves=())(again)


def test_the_kernels_import_no_cuda_until_asked():
    code = "import sys, moefast.kernels; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "moefast.kernels" in loaded
    assert not loaded & {"numba.cuda", "cuda.bindings", "moefast.kernels.cuda"}


def test_unknown_names_are_no_attributes():
    with pytest.raises(AttributeError, match="no attribute 'fast'"):
        package.fast  # noqa: B018
    assert callable(package.sort_by_bin)


def test_unknown_targets_are_refused():
    command = [sys.executable, "-m", "moefast.kernels.cuda", "--target", "sm_10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'sm_80', 'sm_90'" in done.stderr
