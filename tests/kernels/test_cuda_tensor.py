"""The means of compiling the tensor-core kernel without a driver; `.ci/run` compiles it, which takes minutes."""

import subprocess
import sys
from types import SimpleNamespace

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
    from moefast.core.errors import BackendError
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


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError('Failure finding "libmathdx.so.0"\n  listdir("/lib"):\n    libm.so'),
            'finding "libmathdx.so.0"',
        ),
        (ImportError("nvmath.device needs more"), "needs more"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_a_library_that_does_not_load_is_missing_in_one_line(error, said, monkeypatch):
    from moefast.kernels.cuda import tensor

    def broken(name):
        raise error

    device = SimpleNamespace(compute_capability=(9, 0))
    monkeypatch.setattr(tensor.cuda, "get_current_device", lambda: device)
    monkeypatch.setattr(tensor, "import_module", broken)
    lack = tensor.TensorProducts.missing()
    assert lack.startswith("nvmath.device does not load (")
    assert said in lack
    assert "\n" not in lack
    assert "libm.so" not in lack
