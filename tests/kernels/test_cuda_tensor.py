"""The means of compiling the tensor-core kernel without a driver; `.ci/run` compiles it, which takes minutes."""

import subprocess
import sys

import pytest

pytest.importorskip("numba_cuda")
pytest.importorskip("nvmath")

CODE = """
from moefast.kernels.cuda import driverless
print(driverless.stand_in_for_driver())
from nvmath.device import cublasdx_numba
before = cublasdx_numba.get_default_code_type
with driverless.answering_for((9, 0)):
    print(cublasdx_numba.get_default_code_type().cc)
assert cublasdx_numba.get_default_code_type is before
"""


def test_nvmath_loads_without_a_driver():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    driver, capability = done.stdout.splitlines()
    assert driver in ("a stand-in for the driver", "the driver")
    assert capability == "9.0a"


def test_without_driver_and_compiler_the_need_is_named(monkeypatch):
    from moefast.errors import BackendError
    from moefast.kernels.cuda import driverless

    def absent(name):
        raise OSError(name)

    monkeypatch.setattr(driverless.ctypes, "CDLL", absent)
    monkeypatch.setattr(driverless.shutil, "which", lambda name: None)
    with pytest.raises(BackendError, match="needs an NVIDIA driver or a C compiler"):
        driverless.stand_in_for_driver()


def test_unknown_targets_are_refused():
    command = [sys.executable, "-m", "moefast.kernels.cuda", "--target", "sm_10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'sm_80', 'sm_90'" in done.stderr
